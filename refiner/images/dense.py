"""Images with a class for every pixel."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from refiner.base.errors import UserError
from refiner.images.decode import cut, read_files
from refiner.images.folders import Files, image_files
from refiner.images.sets import ImageSet

IGNORE = 255  # pixels without a class
FOLDERS = {"train": ("training", "train"), "test": ("test", "testing", "validation", "val")}


# ---------------------------------------------------------------- images with maps


@dataclass(repr=False)
class DenseSet:
    """Images with a class for every pixel.

    Attributes:
        images: uint8 [N, C, H, W].
        maps: uint8 [N, H, W], indices into ``classes``, :data:`IGNORE` where nothing is known.
        classes: the classes' names.
        name: where they come from.
        background: the class that is no object; None if there is none.
    """

    images: Tensor
    maps: Tensor
    classes: tuple[str, ...]
    name: str = "dense"
    background: int | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        size = "×".join(map(str, self.images.shape[1:]))
        return f"DenseSet({self.name!r}: {len(self)} images of {size}, {len(self.classes)} classes)"


def object_maps(images: ImageSet, *, threshold: float = 0.5) -> DenseSet:
    """The map of each image: background, or the image's class where its object covers a pixel.

    Args:
        images: with labels and ``masks``, as Toybox has them.
        threshold: of a pixel's coverage.

    Returns:
        A :class:`DenseSet`; class 0 is the background.

    Raises:
        ValueError: without masks or labels.
    """
    if images.masks is None or images.labels is None:
        raise UserError(f"{images.name} has no masks; Toybox has")
    inside = images.masks >= threshold
    maps = torch.where(inside, images.labels[:, None, None] + 1, 0).to(torch.uint8)
    return DenseSet(images.images, maps, ("background", *images.classes), images.name, 0)


def check_dense(folder: str | os.PathLike) -> None:
    """Does nothing for a folder that has both of its parts.

    Raises:
        FileNotFoundError: naming the part that is missing.
    """
    for part in ("images", "annotations"):
        if not Path(folder, part).is_dir():
            raise FileNotFoundError(f"{folder} has no sub-folder {part!r}")


def load_dense(
    folder: str | os.PathLike,
    *,
    split: str = "train",
    n: int | None = None,
    size: int | tuple[int, int] = 224,
    progress: bool = True,
) -> DenseSet:
    """Images and maps from a folder in ADE20K's form.

    ``images/`` and ``annotations/`` hold files of the same names, the annotations as PNG with one
    channel of 8 bits: 0 is unknown and left out, k is the k-th class. Both may be divided into
    ``training`` and ``validation`` (or train, val, test); if not, or if only one of both is there,
    every fifth file is the test split and the others are the train split. Images are resized by the
    shorter side and cropped at the centre, maps likewise by the nearest pixel.

    Args:
        folder: holds ``images`` and ``annotations``.
        split: "train", or "test" (which takes the validation part where there is no test part).
        n: only the first so many.
        size: height and width, pixels; a number for squares.
        progress: show a bar.

    Returns:
        A :class:`DenseSet`.

    Raises:
        FileNotFoundError: when a folder or an image's annotation is missing.
        ValueError: for another split, or a file that cannot be read.
    """
    folder = Path(folder)
    if split not in ("train", "test"):
        raise UserError(f"a folder with annotations has splits train and test, not {split!r}")
    check_dense(folder)
    files = _split_files(folder / "images", split)[:n]
    pairs = [(path, _annotation(path, folder)) for path in files]
    told = Files(files, None, (), folder, folder / "images")
    form = {"value_range": told.value_range(), "channels": told.channels()}
    pixels, broken = read_files(files, size, **form, progress=progress)
    if broken:
        path, reason = next(iter(broken.items()))
        raise UserError(f"cannot read {path}: {reason}")
    maps = torch.from_numpy(np.stack([_read_map(path, size) for _, path in pairs]))
    known = maps[maps != IGNORE]
    count = int(known.max()) + 1 if len(known) else 0
    names = tuple(f"class {i + 1}" for i in range(count))
    return DenseSet(pixels, maps, names, f"{folder} {split}")


def _split_files(folder: Path, split: str) -> list[Path]:
    """A split's files: those of its folder, or a part of what the one folder there is holds."""
    present = {
        part: folder / found[0]
        for part, names in FOLDERS.items()
        if (found := [name for name in names if (folder / name).is_dir()])
    }
    where = present.get(split) or next(iter(present.values()), folder)
    files = sorted(image_files(where))
    if not files:
        raise FileNotFoundError(f"{where} holds no images")
    if split in present and len(present) == 2:
        return files
    # Both splits divide the same files, or an image could be in both.
    return [f for i, f in enumerate(files) if (i % 5 == 4) == (split == "test")]


def _annotation(path: Path, folder: Path) -> Path:
    place = folder / "annotations" / path.relative_to(folder / "images").with_suffix(".png")
    if not place.is_file():
        raise FileNotFoundError(f"{path.name} has no annotation: {place} is missing")
    return place


def _read_map(path: Path, size: int | tuple[int, int]) -> np.ndarray:
    """One annotation as uint8 [H, W]."""
    with Image.open(path) as image:
        if image.mode not in ("L", "P", "1"):
            raise UserError(f"{path} has mode {image.mode}: annotations have one channel of 8 bits")
        values = np.asarray(cut(image, size, Image.Resampling.NEAREST)).astype(np.uint8)
    return values - np.uint8(1)  # 0 becomes IGNORE
