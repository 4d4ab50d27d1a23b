"""The images of each step of a training: from a tensor, from files, or from a stream.

:func:`open_source` decides which, once; whoever trains asks for :class:`Source` and need not know.

Shape legend: N images, B samples of the global batch, b of them here, S height and width.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Protocol

import torch
from torch import Tensor

from refiner.base import parallel
from refiner.base.tensors import sides, take
from refiner.images.sets import pixels_of
from refiner.images.streams import PREFETCH, ImageStream, StreamBatches


class Source(Protocol):
    """Images of each step. Steps come one after another, from 0 or from where ``restore`` says."""

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images, uint8 [b, 3, H, W], and the whole batch's ids, int64 [B]."""

    def state(self, done: int) -> object:
        """Where to go on after so many steps, for :meth:`restore`; asked in every process."""

    def restore(self, state: object) -> None:
        """Goes on where :meth:`state` was."""

    def close(self) -> None:
        """Ends what was begun ahead of the steps."""


def open_source(
    images,
    order: Callable[[int], Tensor],
    *,
    batch: int,
    steps: int,
    device: torch.device,
    seed: int = 0,
) -> Source:
    """The source that suits some images.

    Args:
        images: an ImageSet, pixels uint8 [N, 3, H, W], images that are read when indexed, or an
            ImageStream, which has an order of its own.
        order: gives the indices of a step's batch, int64 [B], the same in every process.
        batch: B, of all processes together.
        steps: no batch is prepared from this step on.
        device: where the images shall be.
        seed: of a stream's order.

    Raises:
        ValueError: when the processes have other images, or a batch cannot be shared evenly.
    """
    if isinstance(images, ImageStream):
        parallel.check_same(images.shards, "the number of shards")
        return StreamBatches(images, parallel.rows(batch)[1], device, seed=seed, steps=steps)
    return Batches(keep_on(device, pixels_of(images)), order, batch, device, steps=steps)


def keep_on(device: torch.device, pixels):
    """Images as they are, or on the GPU where they take at most half of its free memory.

    Only tensors move; what is read from files stays there.
    """
    if not isinstance(pixels, Tensor) or pixels.device.type == device.type:
        return pixels
    if device.type == "cuda" and 2 * pixels.nbytes > torch.cuda.mem_get_info(device)[0]:
        return pixels
    return pixels.to(device)


def count(images) -> int:
    """How many images there are; 0 for a stream that nobody has counted."""
    return (images.n or 0) if isinstance(images, ImageStream) else len(images)


def some(images, k: int):
    """Pixels to look at beforehand: all there are or, of a stream, the first k, read once.

    Raises:
        ValueError: for a stream of fewer.
    """
    if isinstance(images, ImageStream):
        return images.sample(k)
    return pixels_of(images)


def come_again(images) -> bool:
    """Whether each epoch has the same images: not so in a stream, which is read across epochs."""
    return not isinstance(images, ImageStream)


def in_words(images) -> str:
    """How many images of which size there are."""
    if isinstance(images, ImageStream):
        n = f"{images.n} " if images.n else ""
        where = f" (column {images.column})" if images.column else ""
        h, w = sides(images.size)
        return f"{images.shards} shards of {n}images{where}, decoded to {h}×{w}"
    pixels = pixels_of(images)
    return f"{len(pixels)} images of {pixels.shape[2]}×{pixels.shape[3]}"


class Batches:
    """Images that can be indexed: a tensor, or files that are decoded ahead of their step."""

    def __init__(self, pixels, order: Callable, batch: int, device: torch.device, *, steps: int):
        parallel.check_same(len(pixels), "the number of images")
        first, own = parallel.rows(batch)
        self.mine = slice(first, first + own)
        self.pixels, self.order, self.device, self.steps = pixels, order, device, steps
        self.pool = None if isinstance(pixels, Tensor) else ThreadPoolExecutor(1)
        self.coming: dict[int, Future] = {}

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        ids = self.order(step)
        if self.pool is None:
            return self._take(ids), ids.to(self.device, non_blocking=True)
        for soon in range(step, min(step + 1 + PREFETCH, self.steps)):
            if soon not in self.coming:
                self.coming[soon] = self.pool.submit(self._take, self.order(soon))
        return self.coming.pop(step).result(), ids.to(self.device, non_blocking=True)

    def _take(self, ids: Tensor) -> Tensor:
        return take(self.pixels, ids[self.mine], self.device)

    def state(self, done: int) -> None:
        """Nothing: the step says which images are next."""

    def restore(self, state: object) -> None:
        """Nothing has to be done."""

    def close(self) -> None:
        if self.pool:
            self.pool.shutdown(cancel_futures=True)
        self.coming.clear()
