"""States of a run: saved, checked, set aside, loaded."""

from __future__ import annotations

import os
import warnings
import zipfile
from contextlib import suppress
from dataclasses import fields
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import torch
from torch import nn

from refiner.base.errors import Damaged, UserError
from refiner.base.files import replacing
from refiner.base.settings import Whole, in_range
from refiner.images.sets import pixels_of


def save_state(path: str | Path, state: dict, *, keep_previous: bool = False) -> None:
    """Writes a training state atomically and durably.

    Args:
        path: the file.
        state: tensors and plain containers.
        keep_previous: the state that was there stays as ``<name>.previous<suffix>``.

    Raises:
        OSError: when it cannot be written (a full disk); the states that were there stay.
    """
    path = Path(path)
    with replacing(path) as temporary:
        try:
            with open(temporary, "wb") as file:
                torch.save(state, file)
                file.flush()
                os.fsync(file.fileno())  # before the rename, or a power cut leaves an empty file
        except RuntimeError as error:  # torch's writer hides the reason, a full disk in the main
            raise OSError(f"cannot write {path}: is the disk full? ({error})") from error
        if keep_previous and path.is_file():
            with replacing(previous_state(path)) as second:
                second.unlink()
                _same_file(path, second)


def _same_file(old: Path, new: Path) -> None:
    """A second name for a file, or a copy of it where the file system knows no hard links."""
    try:
        os.link(old, new)
    except OSError:
        new.write_bytes(old.read_bytes())


def previous_state(path: Path) -> Path:
    """Where the state before the last one lies."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def set_states_aside(path: str | Path) -> None:
    """Takes the states of an earlier run out of the way, so that nobody goes on from them.

    The last one is kept as ``*.old.pt``: a forgotten ``resume`` should not cost a long run.
    """
    path = Path(path)
    states = [p for p in (path, previous_state(path)) if p.is_file()]
    if not states:
        return
    old = path.with_name(f"{path.stem}.old{path.suffix}")
    states[0].replace(old)
    for rest in states[1:]:
        rest.unlink()
    warnings.warn(
        f"{path.parent} held the state of an earlier run, now {old.name}: to go on from it, rename "
        f"it to {path.name} and resume",
        stacklevel=3,
    )


def origin(
    images,
    model: nn.Module | None = None,
    *,
    start: str | None = None,
    groups: torch.Tensor | None = None,
) -> dict:
    """What a run starts from, in a few numbers that its states hold (:func:`check_origin`).

    Args:
        images: an ImageSet, a tensor or an ImageStream.
        model: with the weights at the start; left out where the run itself changes it.
        start: name of the checkpoint that was trained on.
        groups: int64 [N] of the images.
    """
    shards, name = getattr(images, "shards", None), getattr(images, "name", None)
    found = {
        "images": len(images) if shards is None else shards,
        "set": name and Path(name).name,  # a folder may have moved
        "start": start,
    }
    if shards is None:
        pixels = pixels_of(images)
        some = pixels[torch.linspace(0, len(pixels) - 1, min(16, len(pixels))).long()]
        found["brightness"] = some.double().mean(dim=(1, 2, 3)).tolist()
    if groups is not None:
        places = torch.arange(len(groups)) % 1009
        found["groups"] = [*torch.bincount(groups).tolist(), int((groups * places).sum())]
    if model is not None:
        sums = [v.detach().cpu().double().abs().sum() for v in model.state_dict().values()]
        found["weights"] = torch.stack(sums).tolist()
    return found


def check_origin(saved: dict | None, now: dict, out: Path | None) -> None:
    """Makes sure that a run goes on with the model and the images that it started with.

    Args:
        saved: what its state holds; None in those of older versions.
        now: :func:`origin` of what it is given now.
        out: the run's folder, for the message.

    Raises:
        ValueError: saying what is another one.
    """
    if saved is None:
        return
    different = []
    saved = dict.fromkeys(now) | saved
    if saved["images"] != now["images"]:
        different.append(f"it has seen {saved['images']} images (or shards), not {now['images']}")
    if saved["set"] and now["set"] and saved["set"] != now["set"]:
        different.append(f"its images were {saved['set']!r}, not {now['set']!r}")
    if saved["start"] != now["start"]:
        different.append(f"it started from {saved['start']!r}, not {now['start']!r}")
    if saved.get("groups") != now.get("groups"):
        different.append("its images were grouped in another way")
    seen = [np.array(x.get("brightness") or ()) for x in (saved, now)]
    # Decoders of JPEG differ a little.
    if not different and seen[0].size and not np.allclose(*seen, rtol=0, atol=0.5):
        different.append("its images had other pixels")
    # Sums of the same weights differ a little from device to device.
    sums = [np.array(x.get("weights", [])) for x in (saved, now)]
    if sums[0].shape != sums[1].shape or not np.allclose(*sums, rtol=1e-6, atol=0):
        different.append("its model had other weights at the start")
    if different:
        raise UserError(
            f"cannot resume {out}: {'; '.join(different)}; give it the same again, or start "
            "without --resume"
        )


def as_now(state: dict) -> dict:
    """A training state as it is written now, from one that an older version may have written.

    Raises:
        UserError: for a table that lacks a field, or holds another kind of value there.
    """
    state = dict(state)
    if "step" in state:
        state["done"] = state.pop("step")
    if "optimizer" in state:
        state["optimizers"] = {"1": state.pop("optimizer")}
    if "shadow" in (state.get("ema") or {}):
        state["ema"] = state["ema"]["shadow"]
    state.setdefault("source", state.pop("stream", None))
    state.setdefault("seen", [{"loss": loss} for loss in state.pop("losses", ())])
    return in_range("", state, State)


def check_recipe(saved, now, changeable: tuple[str, ...], folder: Path) -> None:
    """Makes sure that a run goes on with the recipe that it started with.

    Args:
        saved, now: dataclasses of one kind: what its state holds, and what it is given now.
        changeable: names of fields in which they may differ.
        folder: the run's, for the message.

    Raises:
        ValueError: naming the fields that are others.
    """
    others = [f.name for f in fields(now) if getattr(saved, f.name) != getattr(now, f.name)]
    others = [name for name in others if name not in changeable]
    if others:
        raise UserError(
            f"cannot resume {folder}: its recipe is another one ({', '.join(others)}); use the "
            "same settings, or start again without --resume"
        )


def load_state(path: str | Path) -> dict:
    """Reads a training state, or the one before it where that is damaged or missing.

    Tensors and plain containers only; no code is run.

    Raises:
        FileNotFoundError: when there is nothing to resume from, saying so.
        Damaged: when what is there cannot be read, saying why.
    """
    path = Path(path)
    there = [p for p in (path, previous_state(path)) if p.is_file()]
    if not there:
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without --resume")
    for file in there:
        try:
            return _read(file)
        except Damaged as error:
            broken = str(error)
            warnings.warn(broken, stacklevel=2)
    raise Damaged(f"cannot resume: {broken}")


def _read(file: Path) -> dict:
    """One state.

    Raises:
        Damaged: saying how, whatever torch and zipfile meet.
    """
    try:
        with zipfile.ZipFile(file) as archive:  # torch compares no checksums
            if changed := archive.testzip():
                raise Damaged(f"{changed} in it has changed")
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise Damaged(f"it holds a {type(state).__name__}")
        return state
    except Exception as error:
        strange = []
        with suppress(Exception):
            strange = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        if strange:
            raise Damaged(
                f"{file} holds {', '.join(strange)}; only tensors and plain Python values can be "
                "loaded"
            ) from error
        raise Damaged(f"{file} is damaged ({' '.join(str(error).split())})") from error


class State(TypedDict):
    """What every training saves, besides the weights of its parts."""

    done: Whole
    recipe: dict[str, object]
    origin: NotRequired[dict[str, object] | None]
    source: object
    ema: dict[str, object] | None
    optimizers: dict[str, dict[str, object]]
    history: list[dict[str, object]]
    seen: list[dict[str, object]]
