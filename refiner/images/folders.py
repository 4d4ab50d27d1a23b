"""Folders of images: splits, classes, and reading files."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError

# What Pillow reads itself: stubs know only the header, and EPS is a program for another program.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
EXTENSIONS = tuple(
    sorted(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_READ
    )
)
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "dev"),
    "test": ("test", "testing", "eval"),
}


@torch.no_grad()
def resize(images: Tensor, size: int, *, chunk: int = 1024) -> Tensor:
    """Resizes uint8 [N, 3, H, W] to uint8 [N, 3, size, size]: shorter side, then centre crop."""
    h, w = images.shape[-2:]
    if h == w == size:
        return images
    (height, width), (top, left) = fitted((h, w), size)
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].float()
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
        x = x[:, :, top : top + size, left : left + size]
        out[start : start + chunk] = x.round_().clamp_(0, 255).to(torch.uint8)
    return out


def fitted(sides: tuple[int, int], size: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """The sides whose shorter one is ``size``, and where the square in their middle begins."""
    scale = size / min(sides)
    sides = max(size, round(sides[0] * scale)), max(size, round(sides[1] * scale))
    return sides, ((sides[0] - size) // 2, (sides[1] - size) // 2)


def squared(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """A picture resized by the shorter side and cropped at the centre."""
    if image.size == (size, size):
        return image
    sides, (left, top) = fitted(image.size, size)
    return image.resize(sides, resample).crop((left, top, left + size, top + size))


def files_of(folder: Path, split: str) -> tuple[list[Path], Tensor | None, tuple[str, ...], Path]:
    """A split's files, labels, classes and folder; see :func:`_list_folder`."""
    root, present = _find_splits(folder)
    folder = split_folder(root, split)
    return *_list_folder(folder, [root / name for name in present.values()]), folder


def split_folder(folder: Path, split: str) -> Path:
    """Where a folder of images keeps a split: its sub-folder of that name, or itself for train.

    Raises:
        ValueError: for a split that it does not have.
    """
    folder, present = _find_splits(folder)
    if split in present:
        return folder / present[split]
    if present:
        raise UserError(f"{folder} has no {split} sub-folder, only {', '.join(present.values())}")
    if split != "train":
        raise UserError(
            f"{folder} has no sub-folders train and {split}: load it whole and call .holdout()"
        )
    return folder


def _find_splits(folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder with the split folders, and their names by split: empty where there are none.

    Archives often unpack into one more folder, so the only sub-folder with images is entered.
    """
    inside = _sub_folders(folder)
    words = {name: re.sub(r"[ _-]?(set|images|data)$", "", name.lower()) for name in inside}
    present = {}
    for part, known in SPLIT_FOLDERS.items():
        if found := [name for word in known for name in inside if words[name] == word]:
            present[part] = found[0]
    # One of them beside other folders with images is a class: "train" is also a vehicle.
    others = [name for name in inside if name not in present.values()]
    if len(present) >= 2 or (present and not any(_with_images(folder, others))):
        return folder, present
    if len(some := list(islice(_with_images(folder, inside), 2))) == 1:
        deeper, present = _find_splits(folder / some[0])
        if present:
            return deeper, present
    return folder, {}


def _with_images(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Those of the sub-folders that hold images."""
    return (name for name in names if any(image_files(folder / name)))


def _sub_folders(folder: Path) -> list[str]:
    around = _around(folder)
    return sorted(
        x.name
        for x in os.scandir(folder)
        if x.is_dir() and not x.name.startswith(".") and os.path.realpath(x) not in around
    )


def _around(folder: Path) -> set[str]:
    """A folder and those that it lies in: a link to one of them leads in a circle."""
    home = Path(os.path.realpath(folder))
    return {str(home), *map(str, home.parents)}


def _list_folder(
    folder: Path, splits: Sequence[Path] = ()
) -> tuple[list[Path], Tensor | None, tuple[str, ...]]:
    """Files sorted by class and path, labels int64 [N] or None, and the classes' names.

    Args:
        folder: that of one split, or the whole set.
        splits: the folders of all splits. A class that one of them lacks keeps its number there.
    """
    found = {name: list(image_files(folder / name)) for name in _sub_folders(folder)}
    by_class = {name: files for name, files in found.items() if files}
    if not by_class:
        paths = list(image_files(folder))
        if not paths:
            seen = _extensions_in(folder)
            seen = f"; its files end in {seen}" if seen else ""
            raise UserError(f"{folder} holds no images, such as .jpg or .png files{seen}")
        return paths, None, ()
    others = (class_folders(other) for other in splits if other != folder)
    classes = tuple(sorted(set(by_class).union(*others)))
    for problem in _doubts(folder, found, classes):
        warnings.warn(problem, stacklevel=4)
    paths = [path for files in by_class.values() for path in files]
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name] for name, files in by_class.items() for _ in files]
    return paths, torch.tensor(labels, dtype=torch.int64), classes


def class_folders(folder: Path) -> list[str]:
    """The sub-folders that are classes, as they hold images."""
    return list(_with_images(folder, _sub_folders(folder)))


def _doubts(folder: Path, found: dict[str, list[Path]], classes: tuple[str, ...]) -> Iterator[str]:
    """What may be wrong with the classes, a sentence each."""
    names = [name for name, files in found.items() if files]
    if len(names) == 1:
        advice = "if there are classes, give the folder that holds theirs"
        if len(classes) > 1:
            advice = f"the set has {len(classes)} classes"
        yield (
            f"all images in {folder} are of one class, {names[0]!r}: k-NN and probes have nothing "
            f"to tell apart; {advice}"
        )
    inside = _sub_folders(folder / names[0])
    if len(names) > 1 < len(inside) and all(
        _sub_folders(folder / name) == inside for name in names[1:]
    ):
        yield (
            f"{', '.join(names[:5])} in {folder} are taken for classes, but all have the same "
            f"sub-folders {', '.join(inside[:5])}: if those are the classes, call these train, val "
            "or test, or give one of them"
        )
    for name in (name for name, files in found.items() if not files):
        if seen := _extensions_in(folder / name):
            yield f"{folder / name} holds no images and is left out; its files end in {seen}"
    if loose := sum(path.parent == folder for path in image_files(folder)):
        yield f"{loose} images directly in {folder} belong to no class and are left out"


def _extensions_in(folder: Path) -> str:
    """The extensions of the files below a folder without images, without hidden files."""
    files = (Path(name) for _, _, names in os.walk(folder) for name in names)
    return ", ".join(sorted({x.suffix or x.name for x in files if x.name[0] != "."})[:10])


def image_files(folder: Path) -> Iterator[Path]:
    """Every image file below a folder, sorted, without hidden ones.

    Links are followed, but no folder is entered twice.
    """
    seen = _around(folder)
    for where, folders, files in os.walk(folder, followlinks=True):
        inside = sorted((x for x in folders if not x.startswith(".")), reverse=True)
        real = {os.path.realpath(Path(where, x)): x for x in inside}
        folders[:] = sorted(real[path] for path in real.keys() - seen)
        seen |= real.keys()
        for name in sorted(files):
            if name.lower().endswith(EXTENSIONS) and not name.startswith("."):
                yield Path(where, name)


def shorter_sides(folder: Path, sample: int = 64) -> list[int]:
    """Shorter sides of a sample of a folder's images, pixels; none where there is no folder."""
    return [min(size) for size in _some_sizes(list(image_files(folder)), sample)]


def _some_sizes(paths: Sequence[Path], sample: int = 64) -> Iterator[tuple[int, int]]:
    """(width, height) of some of the files, without those that cannot be read."""
    for path in paths[:: max(1, len(paths) // sample)]:
        try:
            with Image.open(path) as image:  # reads the header only
                yield image.size
        # As in read_files, which names them later, with the other broken ones.
        except Exception:
            continue


def common_size(paths: Sequence[Path]) -> int:
    """The square size that a sample of the files shares, else 224."""
    sizes = set(_some_sizes(paths))
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return width if width == height else 224


def read_files(
    paths: Sequence[Path], size: int, *, progress: bool = True, block: int = 64
) -> tuple[Tensor, dict[Path, str]]:
    """Decodes image files with a few threads.

    Args:
        paths: the files.
        size: height and width of the result, pixels: shorter side resized, centre cropped.
        progress: show a bar.
        block: files a thread takes at once.

    Returns:
        uint8 [N, 3, size, size], and the files that cannot be read with the reason; their pixels
        are zero.
    """
    pixels = np.zeros((len(paths), 3, size, size), dtype=np.uint8)
    broken: dict[Path, str] = {}

    def read(start: int) -> int:
        some = paths[start : start + block]
        for i, path in enumerate(some, start):
            try:
                pixels[i] = read_image(path, size).transpose(2, 0, 1)
            # Pillow's decoders meet damaged files with errors of a dozen types.
            except Exception as error:
                broken[path] = str(error) or type(error).__name__
        return len(some)

    starts = range(0, len(paths), block)
    with (
        tqdm(total=len(paths), desc="reading images", unit="image", disable=not progress) as bar,
        ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool,
    ):
        for done in pool.map(read, starts):
            bar.update(done)
    return torch.from_numpy(pixels), broken


def read_image(path: Path, size: int) -> np.ndarray:
    """One file as uint8 [size, size, 3]."""
    with Image.open(path) as image:
        # A large JPEG is decoded at an eighth to a half of its size, but at twice ours or more.
        image.draft("RGB", (2 * size, 2 * size))
        ImageOps.exif_transpose(image, in_place=True)
        image = _to_rgb(image)
    return np.asarray(squared(image, size, Image.Resampling.BICUBIC))


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith(("I", "F")):  # a plain convert would clip at 255
        gray = np.nan_to_num(np.asarray(image).astype(np.float64), posinf=0, neginf=0)
        gray = gray * _brightness_scale(image.mode, float(gray.max()))
        image = Image.fromarray(gray.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _brightness_scale(mode: str, top: float) -> float:
    """What makes 0 to 255 of the gray values of a mode; in 32 bits, their maximum tells the range.

    Args:
        mode: of Pillow: "I;16" has 16 bits, "I" and "F" are integers and floats of 32.
        top: the largest value.
    """
    if mode == "F" and top <= 1:
        return 255.0
    if not mode.startswith("I;16") and top <= 255:
        return 1.0
    return 1 / 257 if top <= 65535 else 255 / top
