"""What :func:`refiner.extract` is given becomes batches: sets, arrays, pictures, loaders."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refiner.base.errors import UserError
from refiner.images.decode import FORM, as_pixels
from refiner.images.sets import ImageSet, LazyImages
from refiner.images.streams import PREFERRED
from refiner.models.encoders import check_channels, prepared, preprocess

KEYS = ("pixel_values", "images", *PREFERRED, "x", "inputs")  # of images in a dict, best first


def image_batches(images, size: int, card: dict) -> Iterator[Tensor]:
    """Batches of pixels, uint8 [B, C, H, W], or of a model's input, float [B, C, S, S].

    Args:
        images: see :func:`refiner.extract`.
        size: images of a batch, where they come without batches.
        card: see :func:`refiner.models.encoders.preprocess`.

    Raises:
        ValueError: for what is no images, or where there are none.
    """
    images = images.images if isinstance(images, ImageSet) else images
    if isinstance(images, Tensor | LazyImages | np.ndarray) and len(images.shape) == 4:
        items = (images[i : i + size] for i in range(0, len(images), size))
    elif isinstance(images, Tensor | np.ndarray | Mapping | Image.Image):
        items = [images]
    elif isinstance(images, Iterable) and not isinstance(images, str | bytes):
        items = images
    elif hasattr(images, "__getitem__") and hasattr(images, "__len__"):  # torch's datasets
        items = (images[i] for i in range(len(images)))
    else:
        raise UserError(f"{FORM}, pictures, or batches of them, not {type(images).__name__}")
    floats, empty = _Floats(card), True
    for batch in _in_batches(items, size, card, floats):
        if len(batch):
            check_channels(batch, card)
            empty = False
            yield batch
    if empty:
        raise UserError("there are no images to extract features from")


def _in_batches(items: Iterable, size: int, card: dict, floats: _Floats) -> Iterator[Tensor]:
    """Batches as they come; single images gathered to batches of a size."""
    alone: list[Tensor] = []
    for item in items:
        found = _images_in(item)
        single = isinstance(found, Tensor) and found.ndim == 3
        if alone and (not single or len(alone) == size):
            yield _stacked(alone, card)
            alone = []
        if single:
            alone.append(_ready(found, floats))
        elif isinstance(found, list):
            yield _stacked([_ready(x, floats) for x in found], card)
        else:
            yield _ready(found, floats)
    if alone:
        yield _stacked(alone, card)


def _images_in(item) -> Tensor | list[Tensor]:
    """The images of an item: [B, C, H, W], one [C, H, W], or a list of those.

    An item is images, or a tuple or list that begins with them, or a dict that names them.
    """
    if isinstance(item, Mapping):
        key = next((key for key in KEYS if key in item), None)
        if key is None:
            raise UserError(
                f"a batch is a dict with {', '.join(map(str, item))}, and none of them is called "
                f"{', '.join(KEYS)}: give the images themselves"
            )
        return _images_in(item[key])
    if isinstance(item, list | tuple):
        views = [x for x in item if isinstance(x, Tensor) and x.ndim == 4]
        if len(views) > 1:
            raise UserError(
                f"a batch holds {len(views)} views of its images: give one of them, as in "
                "(views[0] for views, labels in loader)"
            )
        if not item:
            raise UserError(f"{FORM}, not an empty list")
        pictures = [isinstance(x, Image.Image) or np.ndim(x) == 3 for x in item]
        if len(item) > 1 and all(pictures):
            return [as_pixels(x) for x in item]
        return _images_in(item[0])
    return as_pixels(item)


def _ready(x: Tensor, floats: _Floats) -> Tensor:
    if x.dtype == torch.uint8:
        return x
    return floats(x) if x.ndim == 4 else floats(x[None])[0]


def _stacked(images: list[Tensor], card: dict) -> Tensor:
    """Single images as a batch; where sizes or kinds differ, each fitted to the model."""
    if len({(x.shape, x.dtype) for x in images}) > 1:
        images = [preprocess(x[None], card)[0] if x.dtype == torch.uint8 else x for x in images]
    shapes = {tuple(x.shape[1:]) for x in images}
    if len(shapes) > 1:
        raise UserError(f"normalised images have different sizes, {sorted(shapes)}: give uint8")
    return torch.stack(images)


class _Floats:
    """Float images as a model's input; the first ones tell whether they are normalised already.

    Normalised images have values below 0. Those from 0 to 1 come from torchvision's ``ToTensor``.
    """

    def __init__(self, card: dict):
        self.card, self.top = card, None

    def __call__(self, x: Tensor) -> Tensor:
        low, high = (float(v) for v in x.aminmax()) if x.numel() else (-1.0, 1.0)
        if self.top is None:
            self.top = 0 if low < 0 or not high <= 255 else 1 if high <= 1 else 255
            if self.top:
                warnings.warn(
                    f"float images without values below 0 are not normalised: they are taken as 0 "
                    f"to {self.top}, and resized and normalised as the model needs",
                    stacklevel=2,
                )
        if self.top and not 0 <= low <= high <= self.top:
            raise UserError(
                f"float images go from {low:g} to {high:g}, but those before them from 0 to "
                f"{self.top}: give all of them as uint8, or all normalised"
            )
        return prepared(x / self.top, self.card) if self.top else x
