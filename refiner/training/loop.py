"""What pretraining and refining share: schedule, averaged weights, and state that survives a kill.

Every random draw of a step comes from ``step_generator(seed, step)`` and every batch from
``batch_indices(seed, step)``. Neither needs a stored random state, so a resumed run meets exactly
the batches, masks and views that an uninterrupted run meets.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor, nn

from refiner.base import parallel
from refiner.base.tensors import take

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
