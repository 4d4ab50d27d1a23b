"""Random damage to whatever lies on disk, and random settings: a result, or one sentence.

``FUZZ_ROUNDS=1000 FUZZ_SEED=7 pytest tests/test_fuzz.py`` runs it longer, with other damage. A
failure names its round: the same seed and number of rounds make it again.
"""

import copy
import json
import math
import os
import random
import resource
import shutil
import signal
import traceback
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal, get_args, get_origin, get_type_hints

import matplotlib.pyplot as plt
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import tiny

import refiner
from refiner.base.errors import UserError
from refiner.base.settings import Range, changed
from refiner.course import run as course
from refiner.evaluation import compare, probe, report
from refiner.evaluation.protocols import EvaluationSettings
from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models.load import load_model
from refiner.models.mae import MAERecipe, load_mae
from refiner.training.finetuning import FinetuneRecipe, finetune
from refiner.training.heads import load_heads
from refiner.training.pretraining import pretrain
from refiner.training.recipe import Recipe
from refiner.training.refining import refine
from refiner.visuals import plots

ROUNDS = int(os.environ.get("FUZZ_ROUNDS", 0))
SEED = int(os.environ.get("FUZZ_SEED", 0))
SECONDS, BYTES = 20, 4 * 2**30  # of processor and memory that a round may take
VALUES = (None, True, -1, 0, 3, 10**9, 10**30, 0.5, -1.5, 1e300, "", "text", "../x", "\x1b[2J")
VALUES += ([], {}, [[]], [1, 2, 3], {"a": None}, [None], ["a"] * 3, "x" * 1000)
MAE = MAERecipe(
    size=8, patch=4, dim=8, depth=2, heads=2, decoder_dim=8, decoder_heads=2, batch=4, steps=3
)
REFINE = tiny(head_steps=1, steps=2, views=(View(size=8, keep=0.5), View(size=8)))


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet(pixels, torch.arange(24) % 2, ("a", "b"), name="noise")


@pytest.fixture(scope="module")
def disk(images, tmp_path_factory):
    """What every command leaves, tiny; the folder."""
    folder = tmp_path_factory.mktemp("disk")
    options = {"save_every": 1, "log_every": 1, "progress": False}
    mae = pretrain(images, recipe=MAE, out=folder / "mae", **options)
    refine(mae.model, images, recipe=REFINE, out=folder / "refined", **options)
    theirs = Path(shutil.copytree(folder / "mae", folder / "theirs"))
    (theirs / "card.json").unlink()
    (folder / "file").mkdir()
    torch.save({"model": mae.mae.encoder.state_dict()}, folder / "file" / "w.pth")
    return folder


@pytest.fixture(autouse=True)
def small_machine(monkeypatch):
    """Little memory, and less that a process may take; warnings are no matter here."""
    free = SimpleNamespace(available=2**30, total=2**31)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    limits = resource.getrlimit(resource.RLIMIT_AS)
    used = psutil.Process().memory_info().vms
    resource.setrlimit(resource.RLIMIT_AS, (used + BYTES, limits[1]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    resource.setrlimit(resource.RLIMIT_AS, limits)


def attempt(what, run, *args) -> str:
    """Runs something that may be refused in a sentence; what came of it.

    Any other error, and more time or memory than a round may take, fails the test.
    """

    def late(*_):
        raise TimeoutError(f"after {SECONDS} seconds")

    before = signal.signal(signal.SIGPROF, late)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        run(*args)
        return "a result"
    except TimeoutError as error:
        pytest.fail(f"{what}: {error}")
    except (UserError, OSError) as error:
        said = str(error)
        assert said and "Traceback" not in said, f"{what}: {said!r}"
        return "a sentence"
    except Exception as error:
        where = "".join(traceback.format_tb(error.__traceback__)[-3:])
        pytest.fail(f"{what}: {type(error).__name__}: {error}\n{where}")
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


# ---------------------------------------------------------------- damage


def places(content, path=()):
    """Where fields stand in nested lists and tables, from the outside in."""
    inner = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in inner:
        yield (*path, key)
        if isinstance(value, dict | list) and len(path) < 4:
            yield from places(value, (*path, key))


def wrong_field(content, rng, values=VALUES):
    """The content with one field deleted, renamed or replaced; what was done."""
    content = copy.deepcopy(content)
    *path, key = rng.choice(list(places(content)))
    inner = content
    for step in path:
        inner = inner[step]
    how = rng.choice(("delete", "rename", "replace", "replace"))
    if how == "replace":
        inner[key] = rng.choice(values)
    elif how == "rename" and isinstance(inner, dict):
        inner[f"{key}x"] = inner.pop(key)
    else:
        del inner[key]
    return content, f"{how} {'.'.join(map(str, (*path, key)))} ({str(inner)[:80]})"


def wrong_bytes(path, rng):
    """Damages a file as disks and transfers do; what was done."""
    content = bytearray(path.read_bytes())
    how = rng.choice(("cut", "flip", "empty", "mark", "null", "zeros", "noise"))
    if how == "cut":
        del content[rng.randrange(len(content)) :]
    elif how == "flip":
        for _ in range(rng.randint(1, 8)):
            content[rng.randrange(min(len(content), rng.choice((64, 10**6))))] ^= (
                1 << rng.randrange(8)
            )
    elif how == "mark":
        content[:0] = b"\xef\xbb\xbf"
    elif how == "zeros":
        start = rng.randrange(len(content))
        content[start : start + 100] = bytes(len(content[start : start + 100]))
    else:
        content = {"empty": b"", "null": b"null", "noise": rng.randbytes(1000)}[how]
    path.write_bytes(bytes(content))
    return how


TENSORS = (torch.zeros(()), torch.ones(3), torch.full((2, 2), math.nan), torch.zeros(0, 5))
TENSORS += (torch.zeros(8, 3, 4, 4), torch.ones(2, 2, dtype=torch.complex64), torch.arange(3))


def wrong_tensors(state, rng):
    """Tensors by name with one of them gone, renamed, of another shape or of a block far away."""
    state, key = dict(state), rng.choice(list(state))
    how = rng.choice(("delete", "rename", "replace", "transpose", "far", "half"))
    value = state.pop(key)
    new = {
        "rename": {f"{key}x": value},
        "replace": {key: rng.choice(TENSORS).clone()},
        "transpose": {key: value.mT.contiguous() if value.ndim > 1 else value[None]},
        "far": {key: value, "blocks.99999999.norm1.weight": torch.ones(3)},
        "half": {key: value.half()},
    }
    return state | new.get(how, {}), f"{how} {key}"


def damage(path, rng):
    """Damages a file in its bytes or in what it says; what was done."""
    if rng.random() < 0.3:
        return wrong_bytes(path, rng)
    if path.suffix == ".json":
        content, said = wrong_field(json.loads(path.read_text()), rng)
        path.write_text(json.dumps(content))
    elif path.suffix == ".safetensors":
        state, said = wrong_tensors(load_file(path), rng)
        save_file(state, path)
    else:
        content = torch.load(path, weights_only=True)
        if path.suffix == ".pth" and rng.random() < 0.7:
            state, said = wrong_tensors(content["model"], rng)
            content = {"model": state}
        else:
            content, said = wrong_field(content, rng, VALUES + TENSORS)
        torch.save(content, path)
    return said


# ---------------------------------------------------------------- what is read again


def read_model(folder, images):
    refiner.extract(load_model(folder), images.images[:2], progress=False)


def read_mae(folder, images):
    load_mae(folder)


def read_heads(folder, images):
    load_heads(folder)


def read_file(folder, images):
    load_model(folder / "w.pth", num_heads=2)
    load_mae(folder / "w.pth", num_heads=2)


def go_on_pretraining(folder, images):
    (folder / "state.previous.pt").unlink(missing_ok=True)
    pretrain(images, recipe=MAE, out=folder, resume=True, progress=False)


def go_on_refining(folder, images):
    (folder / "state.previous.pt").unlink(missing_ok=True)
    model = load_model(folder.parent / "start")
    refine(model, images, recipe=REFINE, out=folder, resume=True, progress=False)


READERS = [
    ("mae", "card.json", read_model, 12),
    ("refined", "card.json", read_model, 6),
    ("theirs", "config.json", read_model, 12),
    ("mae", "model.safetensors", read_model, 8),
    ("theirs", "model.safetensors", read_model, 8),
    ("mae", "card.json", read_mae, 8),
    ("mae", "decoder.safetensors", read_mae, 8),
    ("refined", "card.json", read_heads, 8),
    ("refined", "heads.pt", read_heads, 8),
    ("file", "w.pth", read_file, 20),
    ("mae", "state.pt", go_on_pretraining, 4),
    ("refined", "state.pt", go_on_refining, 4),
]


@pytest.mark.parametrize(("kind", "file", "read", "rounds"), READERS)
def test_a_damaged_file_gives_a_result_or_a_sentence(
    disk, images, tmp_path, kind, file, read, rounds
):
    rng, seen = random.Random(f"{SEED} {kind} {file} {read.__name__}"), []
    shutil.copytree(disk / "mae", tmp_path / "start")
    for number in range(ROUNDS or rounds):
        shutil.rmtree(tmp_path / "m", ignore_errors=True)
        shutil.copytree(disk / kind, tmp_path / "m")
        said = damage(tmp_path / "m" / file, rng)
        what = f"round {number}, {file} of {kind}: {said}"
        seen.append(attempt(what, read, tmp_path / "m", images))
        assert not list((tmp_path / "m").glob(".*")), f"{what} left {os.listdir(tmp_path / 'm')}"
    assert "a sentence" in seen


# ---------------------------------------------------------------- reports


@pytest.fixture
def drawn(monkeypatch):
    """Figures are drawn, but no pictures made of them."""

    def draw(out, figures):
        for _, _, figure in figures():
            plt.close(figure)
        return {}

    monkeypatch.setattr(probe, "save_figures", draw)
    monkeypatch.setattr(report, "save_figures", draw)
    monkeypatch.setattr(plots, "place_legend", lambda ax: ax.legend())  # without a layout


def probe_again(folder, resume=True):
    settings = probe.Settings(parts=("knn", "measures", "clustering"), k=(1, 3))
    options = {"n": 40, "n_test": 20, "settings": settings, "resume": resume, "progress": False}
    probe.probe(str(folder.parent / "start"), "digits", folder, **options)


def evaluate_again(folder, resume=True):
    settings = EvaluationSettings.cpu(n=40, n_test=20)
    options = {"rows": ["knn", "clusters"], "settings": settings, "resume": resume}
    compare.evaluate(
        str(folder.parent / "start"), None, "digits", folder, progress=False, **options
    )


@pytest.mark.parametrize("again", [probe_again, evaluate_again])
def test_a_damaged_report_gives_a_report_or_a_sentence(disk, drawn, tmp_path, again):
    rng, seen = random.Random(f"{SEED} {again.__name__}"), []
    shutil.copytree(disk / "mae", tmp_path / "start")
    again(tmp_path / "m", resume=False)
    whole = (tmp_path / "m" / "report.json").read_bytes()
    for number in range(ROUNDS or 8):
        (tmp_path / "m" / "report.json").write_bytes(whole)
        said = damage(tmp_path / "m" / "report.json", rng)
        seen.append(attempt(f"round {number}, {again.__name__}: {said}", again, tmp_path / "m"))
    assert "a sentence" in seen


def test_a_damaged_summary_gives_an_index_or_a_sentence(tmp_path):
    entry = {"title": "What?", "status": "ok", "seconds": 1.5, "preset": "cpu", "problems": ["no"]}
    entry |= {"metrics": {"a": 0.5, "b": [1, 2]}, "fingerprint": "0" * 8, "peak_memory_mb": 7}
    cells = [{"cell_type": "markdown", "source": "# What?"}]
    (tmp_path / "01_a.ipynb").write_text(json.dumps({"cells": cells}))
    rng, path, seen = random.Random(SEED), tmp_path / "summary.json", []

    def again():
        entries = course._read_summary(path)
        summary = {"machine": {}, "notebooks": entries, "selected": ["01_a"]}
        course._save(tmp_path, tmp_path, summary, "01_a", entry)
        course.table(summary)

    for number in range(ROUNDS or 30):
        path.write_text(json.dumps({"machine": {}, "notebooks": {"01_a": entry, "02_b": entry}}))
        said = damage(path, rng)
        seen.append(attempt(f"round {number}: {said}", again))
    assert "a sentence" in seen


# ---------------------------------------------------------------- settings


def value_of(hint, rng):
    """A value of a declared type, mostly in its range and mostly small."""
    origin, parts = get_origin(hint), get_args(hint)
    if rng.random() < 0.03:
        return rng.choice(VALUES)
    if origin is Annotated and isinstance(parts[1], Range):
        low, high = max(parts[1].low, parts[1].above), parts[1].high
        low = rng.choice((-3, 0)) if low == -math.inf else low
        high = low + rng.choice((1, 10, 10, 1000, 10**9)) if high == math.inf else high
        value = rng.uniform(low, high) if parts[0] is float else rng.randint(low, math.ceil(high))
        return rng.choice((value, value, low, min(high, low + 8)))
    if origin is Annotated:
        return value_of(parts[0], rng)
    if origin is Literal:
        return rng.choice(parts)
    if origin is tuple:
        few = rng.randint(0, 3) if parts[-1] is ... else len(parts)
        return tuple(value_of(h, rng) for h in (parts[:1] * few if parts[-1] is ... else parts))
    if parts:  # one of several
        return value_of(rng.choice(parts), rng)
    return {bool: rng.random() < 0.5, View: View(size=8), type(None): None}.get(hint, 1)


def some_settings(kind, start, rng):
    """A few of the settings of a recipe drawn anew, but for those that only take long."""
    hints = get_type_hints(kind, include_extras=True)
    names = rng.sample(sorted(hints.keys() - {"compile", "views"}), rng.randint(1, 4))
    return replace(start, **{name: value_of(hints[name], rng) for name in names})


@pytest.mark.parametrize(
    ("kind", "start", "run"),
    [
        (MAERecipe, MAE, lambda images, **how: pretrain(images, **how)),
        (Recipe, REFINE, lambda images, **how: refine(MAE.build().encoder, images, **how)),
        (
            FinetuneRecipe,
            FinetuneRecipe.cpu(batch=4, epochs=1),
            lambda images, **how: finetune(MAE.build().encoder, images, **how),
        ),
    ],
    ids=["pretrain", "refine", "finetune"],
)
def test_random_settings_train_or_are_refused_in_a_sentence(images, kind, start, run):
    rng, seen = random.Random(f"{SEED} {kind}"), []
    for number in range(ROUNDS or 25):
        recipe, asked = some_settings(kind, start, rng), []
        differ = {k: v for k, v in vars(recipe).items() if v != getattr(start, k)}
        how = {"recipe": recipe, "stop": lambda: asked.append(1) or len(asked) > 2}  # noqa: B023
        seen.append(
            attempt(f"round {number}: {differ}", lambda: run(images, progress=False, **how))  # noqa: B023
        )
    assert set(seen) == {"a result", "a sentence"}


def test_random_texts_are_settings_or_refused_in_a_sentence():
    rng, seen = random.Random(SEED), set()
    pieces = [
        "=",
        "[",
        "]",
        "(",
        ")",
        "{",
        "}",
        ",",
        "1",
        "e",
        "9" * 30,
        "None",
        "'",
        "-",
        ".",
        "\0",
    ]
    for _ in range(ROUNDS or 300):
        kind = rng.choice((MAERecipe, Recipe, FinetuneRecipe, EvaluationSettings, probe.Settings))
        name = rng.choice(sorted(get_type_hints(kind)))
        text = "".join(rng.choices(pieces, k=rng.choice((1, 2, 3, 8, 100))))
        text = rng.choice((f"{name}={text}", text, f"{name}={'(' * 1000}"))
        seen.add(attempt(f"{kind.__name__} {text[:80]}", changed, kind(), [text]))
    assert seen == {"a result", "a sentence"}
