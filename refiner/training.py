"""What pretraining and refining share: schedule, averaged weights, and state that survives a kill.

Every random draw of a step comes from ``step_generator(seed, step)`` and every batch from
``batch_indices(seed, step)``. Neither needs a stored random state, so a resumed run meets exactly
the batches, masks and views that an uninterrupted run meets.
"""

from __future__ import annotations

import math
import os
import pickle
import time
import warnings
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from torch import nn

from refiner import parallel
from refiner.files import replacing

Tensor = torch.Tensor
SAVE_EVERY, SAVE_SECONDS = 100, 60.0  # by default, both have to be over
Stop = Callable[[], bool] | float | None


def cosine_schedule(step: int, *, total: int, warmup: int, peak: float, floor: float = 1e-6):
    """Learning rate: linear warm-up to ``peak``, then half a cosine down to ``floor``.

    Args:
        step: the step about to be taken, from 0.
        total: steps of the whole run.
        warmup: steps of the linear part.

    Returns:
        The learning rate as a float (Loshchilov & Hutter 2017, as in MAE and MIM-Refiner).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on (seed, step) alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def batch_indices(n: int, batch: int, *, seed: int, step: int) -> Tensor:
    """Indices of the images of one step, int64 [batch].

    Each epoch is its own permutation of all n images; what does not fill a last batch is left to
    the next epoch's draw. A set smaller than a batch is an error upstream.
    """
    epoch, position = divmod(step, n // batch)
    order = _epoch_order(n, seed, epoch)
    return torch.from_numpy(order[position * batch : (position + 1) * batch].copy())


def repeated_indices(n: int, batch: int, *, seed: int, step: int, epochs: int) -> Tensor:
    """Like :func:`batch_indices`, but epoch e holds the images of epoch e modulo ``epochs``.

    The first ``epochs`` are those of :func:`batch_indices`; later ones deal their images out anew.
    Only where n is no multiple of the batch do epochs differ in their images.
    """
    epoch, position = divmod(step, n // batch)
    if epoch < epochs:
        return batch_indices(n, batch, seed=seed, step=step)
    seen = _epoch_order(n, seed, epoch % epochs)[: n // batch * batch]
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(seen))
    return torch.from_numpy(seen[order[position * batch : (position + 1) * batch]])


# Every step of an epoch asks for it, and shuffling a million images takes time.
@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def draw(*shape: int, generator: torch.Generator | None = None,
         device: torch.device | None = None) -> Tensor:  # fmt: skip
    """Uniform numbers from 0 to 1, drawn where the generator lives and given on ``device``.

    With a generator on the GPU nothing travels, and the host need not wait.
    """
    home = device if generator is None else generator.device
    return torch.rand(*shape, generator=generator, device=home).to(device or home)


@lru_cache(maxsize=64)
def constant(values: tuple, device: torch.device, dtype: torch.dtype = torch.float32) -> Tensor:
    """A small tensor that is copied to a device once, not at every step."""
    return torch.tensor(values, dtype=dtype, device=device)


def take(pixels, index: Tensor, device: torch.device) -> Tensor:
    """The images of one step on the device; a tensor that lies there already is not copied."""
    on_device = isinstance(pixels, Tensor) and pixels.device.type == device.type
    if on_device:
        return pixels[index.to(device, non_blocking=True)]
    chosen = pixels[index]
    return chosen.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else chosen


def keep_on(device: torch.device, pixels):
    """Images as they are, or on the GPU where they take at most half of its free memory.

    Only tensors move; what is read from files stays there.
    """
    if not isinstance(pixels, Tensor) or pixels.device.type == device.type:
        return pixels
    if device.type == "cuda" and 2 * pixels.nbytes > torch.cuda.mem_get_info(device)[0]:
        return pixels
    return pixels.to(device)


class Batches:
    """The images of each step; files are decoded ahead of it by a thread.

    Args:
        pixels: a tensor, or images that are read when indexed.
        index: gives a step's indices.
        device: where the images shall be.
        steps: no batch is prepared from this step on.
        ahead: batches that are prepared while a step runs.
    """

    def __init__(self, pixels, index: Callable[[int], Tensor], device: torch.device, *,
                 steps: int, ahead: int = 2):  # fmt: skip
        self.pixels, self.index, self.device, self.steps = pixels, index, device, steps
        self.ahead = 0 if isinstance(pixels, Tensor) else ahead
        self.pool = ThreadPoolExecutor(1) if self.ahead else None
        self.coming: dict[int, Future] = {}

    def __getitem__(self, step: int) -> Tensor:
        if self.pool is None:
            return self._take(step)
        for soon in range(step, min(step + 1 + self.ahead, self.steps)):
            if soon not in self.coming:
                self.coming[soon] = self.pool.submit(self._take, soon)
        return self.coming.pop(step).result()

    def _take(self, step: int) -> Tensor:
        return take(self.pixels, self.index(step), self.device)

    def close(self) -> None:
        """Ends the thread; what it had begun is thrown away."""
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.coming.clear()


def whole_numbers(recipe):
    """A recipe whose counts are ints: 1e4 becomes 10000.

    Raises:
        ValueError: for a count that is no whole number.
    """
    changes = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.type == "int" or (field.type == "int | None" and value is not None):
            try:
                whole = int(value) == value and not isinstance(value, bool)
            except (TypeError, ValueError, OverflowError):  # None, texts, NaN, infinity
                whole = False
            if not whole:
                raise ValueError(f"{field.name} is {value!r}; it needs to be a whole number")
            changes[field.name] = int(value)
    return replace(recipe, **changes)


def autocast(device: torch.device):
    """bf16 products on a GPU, nothing on a CPU, where they would be slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Fuses each block by torch.compile, for every shape that it meets.

    Blocks share their code: one of them takes seconds, the others none. Shapes are fixed, as a
    graph for all sizes would be slower at each. Every size of the views, with and without
    gradients, is one of the graphs that torch would by default stop at eight of.
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(dynamic=False)


def stopper(stop: Stop) -> Callable[[], bool]:
    """The question for before each step whether to stop; the first process answers for all.

    Args:
        stop: None for never, a function that says True to stop, or a moment of
            ``time.monotonic()``.
    """
    if stop is None:
        return lambda: False
    ask = stop if callable(stop) else lambda: time.monotonic() >= stop
    return lambda: parallel.first_decides(bool(ask()))


def save_is_due(done: int, total: int, every: int | None, saved: float) -> bool:
    """Whether to save after so many steps; the first process answers for all.

    Args:
        done, total: steps taken, and steps of the whole run; after the last one is always saved.
        every: steps between two saves. None saves after every 100th if the last was a minute ago:
            a state is large, and a GPU waits while it is written.
        saved: the moment of the last save, by ``time.monotonic()``.
    """
    if done == total:
        return True
    if every is not None:
        return done % every == 0
    if done % SAVE_EVERY:
        return False
    return parallel.first_decides(time.monotonic() - saved >= SAVE_SECONDS)


def all_finite(*modules: nn.Module) -> bool:
    """Whether all weights are numbers, so that a state with them is a good one."""
    weights = [p.detach() for m in modules for p in m.parameters()]
    largest = torch._foreach_norm(weights, float("inf"))  # squares would overflow
    return bool(torch.stack(largest).isfinite().all())


class EMA:
    """Exponential moving average of a module's weights, for evaluation.

    The decay grows with the number of updates, ``min(decay, (1+t)/(10+t))``, so that a short run
    is not an average with its own starting point (the rule of TensorFlow's moving averages).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats, news = [], []
        for key, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                floats.append(self.shadow[key])
                news.append(value)
            else:
                self.shadow[key].copy_(value)
        torch._foreach_lerp_(floats, news, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


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


def origin(images, model: nn.Module | None = None, *, start: str | None = None) -> dict:
    """What a run starts from, in a few numbers that its states hold (:func:`check_origin`).

    Args:
        images: an ImageSet, a tensor or an ImageStream.
        model: with the weights at the start; left out where the run itself changes it.
        start: name of the checkpoint that was trained on.
    """
    shards, name = getattr(images, "shards", None), getattr(images, "name", None)
    found = {
        "images": len(images) if shards is None else shards,
        "set": name and Path(name).name,  # a folder may have moved
        "start": start,
    }
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
    if saved["images"] != now["images"]:
        different.append(f"it has seen {saved['images']} images (or shards), not {now['images']}")
    if saved["set"] and now["set"] and saved["set"] != now["set"]:
        different.append(f"its images were {saved['set']!r}, not {now['set']!r}")
    if saved["start"] != now["start"]:
        different.append(f"it started from {saved['start']!r}, not {now['start']!r}")
    # Sums of the same weights differ a little from device to device.
    sums = [np.array(x.get("weights", [])) for x in (saved, now)]
    if sums[0].shape != sums[1].shape or not np.allclose(*sums, rtol=1e-6, atol=0):
        different.append("its model had other weights at the start")
    if different:
        raise ValueError(
            f"cannot resume {out}: {'; '.join(different)}; give it the same again, or start "
            "without --resume"
        )


def load_state(path: str | Path) -> dict:
    """Reads a training state, or the one before it where that is damaged or missing.

    Tensors and plain containers only; no code is run.

    Raises:
        FileNotFoundError: when there is nothing to resume from, saying so.
        OSError: when what is there cannot be read, saying why.
    """
    path = Path(path)
    there = [p for p in (path, previous_state(path)) if p.is_file()]
    if not there:
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without --resume")
    for file in there:
        try:
            return torch.load(file, map_location="cpu", weights_only=True)
        except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
            broken = _what_is_wrong(file, error)
            warnings.warn(f"{file} {broken}", stacklevel=2)
    raise OSError(f"cannot read {path}: it {broken}")


def _what_is_wrong(file: Path, error: Exception) -> str:
    """Of a state that could not be loaded: damage, or an object that torch does not load safely."""
    try:
        strange = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError):
        strange = []
    if strange:
        return f"holds {', '.join(strange)}; only tensors and plain Python values can be loaded"
    return f"is damaged ({error})"


def machine() -> dict[str, object]:
    """The machine in words, for cards and result files: processor, cores, GPU, versions."""
    processor = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        processor = names[0].strip() if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }
