"""Sets of images in memory or on disk, their labels and factors."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import named_labels, sides
from refiner.images.decode import ValueRange, as_pixels, read_files, resize

# ---------------------------------------------------------------- the set


@dataclass(repr=False)
class ImageSet:
    """Images with what is known about them.

    Indexing with a slice, list, array or tensor (indices or a boolean mask) gives a smaller
    ImageSet; an int gives a set of one image.

    Attributes:
        images: uint8 [N, C, H, W], given as a tensor or an array; for a large folder a
            :class:`LazyImages`, which is indexed the same way and reads the files on demand.
        labels: int64 [N], indices into ``classes``; None when unlabelled. They may be given as a
            list, an array or a series, and as names of classes.
        classes: the classes' names; empty when unlabelled.
        factors: one float array [N] per known factor of variation; empty when unknown. For units
            see :data:`refiner.images.toybox.FACTORS`.
        name: where the images come from.
        masks: float32 [N, H, W], how much of each pixel the object covers, 0 to 1; None when
            unknown.
        shown: which channels figures show as red, green and blue, or one as gray. By default the
            first three; where there are two they are red and green.
    """

    images: Tensor | LazyImages
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    name: str = "images"
    masks: Tensor | None = None
    shown: tuple[int, ...] = (0, 1, 2)

    def __post_init__(self):
        self.images = pixels_of(self.images)
        n = len(self.images)
        self.classes = tuple(map(str, self.classes))
        self.factors = {str(name): np.asarray(values) for name, values in self.factors.items()}
        lengths = {"factor " + k: len(v) for k, v in self.factors.items()}
        lengths |= {k: len(v) for k in ("labels", "masks") if (v := getattr(self, k)) is not None}
        wrong = [f"{length} {what}" for what, length in lengths.items() if length != n]
        if wrong:
            raise UserError(f"{n} images do not match {', '.join(wrong)}")
        # On a GPU they come from a set that was checked, and the host would have to wait.
        if self.labels is not None and not getattr(self.labels, "is_cuda", False):
            self.labels, self.classes = named_labels(self.labels, n, self.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.images.shape[1:]))
        parts = [f"{len(self)} images of {size}"]
        parts.append(f"{len(self.classes)} classes" if self.labels is not None else "unlabelled")
        if self.factors:
            parts.append(f"{len(self.factors)} factors")
        if isinstance(self.images, LazyImages):
            parts.append("read on demand")
        return f"ImageSet({self.name!r}: {', '.join(parts)})"

    def __getitem__(self, index) -> ImageSet:
        where = _positions(index, len(self))
        lazy = isinstance(self.images, LazyImages)
        pick = lambda x: None if x is None else x[where.to(x.device)]  # noqa: E731
        return replace(
            self,
            images=self.images.select(where) if lazy else pick(self.images),
            labels=pick(self.labels),
            factors={name: values[where.numpy()] for name, values in self.factors.items()},
            masks=pick(self.masks),
        )

    def batch(self, indices, size: int | tuple[int, int] | None = None) -> Tensor:
        """Pixels of some images, uint8 [B, C, H, W], of a size if one is given."""
        where = _positions(indices, len(self))
        if isinstance(self.images, Tensor):
            where = where.to(self.images.device)
        pixels = self.images[where]
        return pixels if size is None else resize(pixels, size)

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set with images, labels and masks on another device (lazy images stay files)."""
        kept = {
            k: v for k in ("images", "labels", "masks") if isinstance(v := getattr(self, k), Tensor)
        }
        return replace(self, **{k: v.to(device) for k, v in kept.items()})

    def holdout(self, share: float = 0.2, *, seed: int = 0) -> tuple[ImageSet, ImageSet]:
        """Splits off the same share of every class, for choosing settings without the test images.

        Of a class of n images, share · n are held out, rounded so that the total is right, and at
        most n − 1: every class stays in the rest.

        Args:
            share: of the images that are held out, above 0 and below 1.
            seed: which images.

        Returns:
            The rest and the held-out part; together every image once.

        Raises:
            ValueError: when a part would be empty.
        """
        rest, held = held_out_rows(self.labels, len(self), share, seed=seed)
        return self[rest], self[held]


def pixels_of(images) -> Tensor | LazyImages:
    """The pixels of an ImageSet, a tensor, an array or a list of pictures of one size.

    Returns:
        [N, C, H, W], or what is read on demand in that shape.

    Raises:
        ValueError: for another shape.
    """
    pixels = getattr(images, "images", images)
    if isinstance(pixels, list | tuple) and pixels:
        found = [as_pixels(x) for x in pixels]
        sizes = ["×".join(map(str, x.shape)) for x in found]
        odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            raise UserError(
                f"the images have different sizes: image 0 is {sizes[0]} and image {odd} is "
                f"{sizes[odd]}; refiner.load_images(folder, size=…) makes them alike"
            )
        pixels = torch.stack(found)
    pixels = as_pixels(pixels) if isinstance(pixels, np.ndarray) else pixels
    shape = list(getattr(pixels, "shape", ()))
    if len(shape) != 4 or not shape[1]:
        kind = getattr(pixels, "dtype", type(pixels).__name__)
        raise UserError(f"images must be uint8 [N, C, H, W], not {kind} {shape}")
    return pixels


def shown_channels(x_BCHW: Tensor, shown: tuple[int, ...] = (0, 1, 2)) -> Tensor:
    """The channels that a figure shows, [B, 3, H, W]; see :attr:`ImageSet.shown`.

    Raises:
        ValueError: for channels that there are not.
    """
    channels = x_BCHW.shape[1]
    shown = shown[:channels] if shown == ImageSet.shown else tuple(shown)
    if not 1 <= len(shown) <= 3 or not all(0 <= channel < channels for channel in shown):
        raise UserError(
            f"shown is {shown}; choose one to three of the channels 0 to {channels - 1}"
        )
    if shown == ImageSet.shown:
        return x_BCHW if channels == 3 else x_BCHW[:, :3]
    x = x_BCHW[:, list(shown)]
    if len(shown) == 1:
        return x.expand(-1, 3, -1, -1)
    return torch.cat([x, torch.zeros_like(x[:, : 3 - len(shown)])], dim=1)


def _positions(index, n: int) -> Tensor:
    """Any index as int64 positions [B] on the CPU, negative ones resolved."""
    if isinstance(index, slice):
        return torch.from_numpy(np.arange(n)[index].copy())  # torch has no negative steps
    where = torch.as_tensor(index).cpu().reshape(-1)
    if where.is_floating_point() and len(where):
        raise IndexError("images are indexed by whole numbers or a boolean mask, not by floats")
    if where.dtype == torch.bool:
        if len(where) != n:
            raise IndexError(f"a mask of {len(where)} does not fit {n} images")
        return where.nonzero()[:, 0]
    where = where.to(torch.int64)
    if len(where) and not (-n <= int(where.min()) and int(where.max()) < n):
        raise IndexError(f"index out of range for {n} images")
    return torch.where(where < 0, where + n, where)


def held_out_rows(
    labels: Tensor | None, n: int, share: float, *, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Positions of the two parts of :meth:`ImageSet.holdout`, int64, rising."""
    held = round(share * n)
    if not 0 < held < n:
        raise UserError(f"a share of {share} of {n} images leaves one part empty")
    order = balanced_order(labels, n, seed=seed)
    if labels is not None:
        order, most = _by_share(order, labels.cpu(), share)
        held = min(held, most)
        if held == 0:
            raise UserError("every class has one image: none can be held out")
    return order[held:].sort().values, order[:held].sort().values


def balanced_order(labels: Tensor | None, n: int, *, seed: int = 0) -> Tensor:
    """A seeded shuffle whose every prefix holds the classes in equal numbers, as far as they last.

    Args:
        labels: int64 [N], or None for a plain shuffle.
        n: number of images.

    Returns:
        int64 [N], a permutation.
    """
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    if labels is None:
        return shuffled
    # Sorting by rank deals the classes out in turn.
    return shuffled[torch.argsort(_ranks(labels.cpu()[shuffled]), stable=True)]


def _ranks(y: Tensor) -> Tensor:
    """How many of its own class come before each image, int64 [N]."""
    y = y.unique(return_inverse=True)[1]  # ids may be huge
    by_class = torch.argsort(y, stable=True)
    counts = torch.bincount(y)
    starts = counts.cumsum(0) - counts
    rank = torch.empty(len(y), dtype=torch.int64)
    rank[by_class] = torch.arange(len(y)) - starts[y[by_class]]
    return rank


def _by_share(order: Tensor, labels: Tensor, share: float) -> tuple[Tensor, int]:
    """A balanced order with the same share of each class in front, and how many may be taken.

    Args:
        order: of :func:`balanced_order`.
        labels: int64 [N].
        share: above 0 and below 1.
    """
    y = labels[order].unique(return_inverse=True)[1]
    counts = torch.bincount(y)
    present = counts[counts > 0]
    # Classes that differ by one image at most are dealt out in equal numbers.
    equal = int(present.max() - present.min() <= 1)
    lower = (share * (counts - equal) + 1e-9).floor()  # 0.1 · 30 is a little more than 3
    upper = (share * (counts + equal) - 1e-9).ceil()
    lower, upper = (torch.minimum(x.long(), counts - 1).clamp(min=0) for x in (lower, upper))
    rank = _ranks(y)
    turn = (rank >= lower[y]).long() + (rank >= upper[y]).long()
    return order[torch.argsort(turn, stable=True)], int(upper.sum())


# ---------------------------------------------------------------- folders


class LazyImages:
    """Image files that look like a uint8 tensor [N, C, *size] and are read when indexed.

    Attributes:
        paths: the files.
        size: a square's side, or height and width, pixels.
        value_range: see :func:`refiner.load_images`.
        channels: C.
    """

    dtype = torch.uint8

    def __init__(
        self, paths: Sequence[Path], size, value_range: ValueRange = None, channels: int = 3
    ):
        self.paths, self.size = list(paths), size
        self.value_range, self.channels = value_range, channels

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.paths), self.channels, *sides(self.size)])

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, index) -> LazyImages:
        """Some of the files, still unread."""
        some = [self.paths[i] for i in _positions(index, len(self))]
        return LazyImages(some, self.size, self.value_range, self.channels)

    def __getitem__(self, index) -> Tensor:
        """Pixels, uint8 [B, C, *size], or [C, *size] for an int.

        Raises:
            OSError: when a file cannot be read, with its name.
        """
        chosen = self.select(index)
        options = {"value_range": self.value_range, "channels": self.channels, "progress": False}
        pixels, broken = read_files(chosen.paths, self.size, **options)
        if broken:
            path, reason = next(iter(broken.items()))
            raise OSError(f"cannot read {path}: {reason}")
        return pixels[0] if isinstance(index, int) else pixels
