"""Image files become pixels: any mode to RGB, gray of many bits to 8, any size to one.

Files of bands (``.npy``, and TIFF of several bands or gray pages) keep all their channels.
"""

from __future__ import annotations

import math
import os
import sys
import warnings
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import IO

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import MissingPackage, UserError
from refiner.base.tensors import sides

# What Pillow reads itself: stubs know only the header, and EPS is a program for another program.
NOT_READ = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")
EXTENSIONS = tuple(
    sorted(
        extension
        for extension, kind in Image.registered_extensions().items()
        if kind in Image.OPEN and kind not in NOT_READ
    )
)
ARRAYS = (".npy",)
TIFF = (".tif", ".tiff")
COLOURS = {1: "L", 3: "RGB", 4: "RGBA"}  # what pictures can be read as
FORM = "images must be uint8 or float [B, C, H, W]"
ValueRange = tuple[float, float] | None  # the gray values that become 0 and 255
DEEP = ("I", "F")  # how Pillow's modes of more than 8 bits begin
DEPTHS = (1, 4, 8, 10, 12, 14, 16)  # bits that cameras and scanners give, and masks
ORIENTATION = 274  # the EXIF tag
EXTRA_SAMPLES = 338  # the TIFF tag that says what bands beyond colours are; 0 is unknown
SAMPLE = 32  # files that a set's range is measured on
LONGEST = 16  # of a longer picture, in shorter sides, only the middle is resized
LARGE = 2**25  # pixels; larger pictures are decoded one at a time
_one_large = Lock()


# ---------------------------------------------------------------- sizes


@torch.no_grad()
def resize(images: Tensor, size: int | tuple[int, int], *, chunk: int = 1024) -> Tensor:
    """Resizes uint8 [N, C, H, W] to cover a size (a square's side, or both), and cuts the middle.

    Returns:
        uint8 [N, C, S, S], or [N, C, *size].
    """
    if sides(size) == tuple(images.shape[-2:]):
        return images
    top, left, h, w = _middle(*images.shape[-2:])
    images = images[..., top : top + h, left : left + w]
    (height, width), (top, left) = fitted((h, w), size)
    rows, columns = sides(size)
    shape = *images.shape[:2], rows, columns
    out = torch.empty(shape, dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].float()
        x = F.interpolate(x, (height, width), mode="bicubic", antialias=True, align_corners=False)
        x = x[:, :, top : top + rows, left : left + columns]
        out[start : start + chunk] = x.round_().clamp_(0, 255).to(torch.uint8)
    return out


def fitted(own: tuple[int, int], size) -> tuple[tuple[int, int], tuple[int, int]]:
    """The smallest sides that cover a size, and where that begins in their middle."""
    wanted = sides(size)
    scale = max(wanted[0] / own[0], wanted[1] / own[1])
    covering = tuple(max(a, round(b * scale)) for a, b in zip(wanted, own, strict=True))
    return covering, tuple((b - a) // 2 for a, b in zip(wanted, covering, strict=True))


def cut(image: Image.Image, size, resample: Image.Resampling) -> Image.Image:
    """A picture resized to cover a size, and cropped at the centre."""
    height, width = sides(size)
    if image.size == (width, height):
        return image
    left, top, w, h = _middle(*image.size)
    if (w, h) != image.size:
        image = image.crop((left, top, left + w, top + h))
    covering, (left, top) = fitted(image.size, (width, height))
    return image.resize(covering, resample).crop((left, top, left + width, top + height))


def _middle(a: int, b: int) -> tuple[int, int, int, int]:
    """Start and length along both sides; a line of 1×60000 would be resized to gigabytes."""
    most = LONGEST * min(a, b)
    a_kept, b_kept = min(a, most), min(b, most)
    return (a - a_kept) // 2, (b - b_kept) // 2, a_kept, b_kept


# ---------------------------------------------------------------- arrays and pictures


def as_pixels(x) -> Tensor:
    """[B, C, H, W] or [C, H, W] of a tensor, an array (channels last too) or a picture.

    Three channels are told by their number, others by the smaller of the two axes, first or last.
    """
    if isinstance(x, Image.Image):
        return torch.from_numpy(np.array(to_rgb(x))).permute(2, 0, 1)
    if not isinstance(x, Tensor | np.ndarray):
        raise UserError(f"{FORM}, pictures, or batches of them, not {type(x).__name__}")
    x = x if isinstance(x, Tensor) else torch.from_numpy(x if x.flags.writeable else x.copy())
    if x.ndim in (3, 4) and _channels_last(*x.shape[-3:]):
        x = x.movedim(-1, -3)
    if x.ndim not in (3, 4) or not (x.dtype == torch.uint8 or x.is_floating_point()):
        raise UserError(f"{FORM}, not {x.dtype} {list(x.shape)}")
    return x


def _channels_last(first: int, _: int, last: int) -> bool:
    return first != 3 and (last == 3 or last < first)


# ---------------------------------------------------------------- files


def read_files(
    paths: Sequence[Path],
    size: int | tuple[int, int],
    *,
    value_range: ValueRange = None,
    channels: int = 3,
    progress: bool = True,
    block: int = 64,
) -> tuple[Tensor, dict[Path, str]]:
    """Decodes image files with a few threads.

    Args:
        paths: the files.
        size: of the result, pixels: a square's side, or height and width; resized to cover it,
            centre cropped.
        value_range: see :func:`refiner.load_images`.
        channels: of the result; a file of bands has to have as many.
        progress: show a bar.
        block: files a thread takes at once.

    Returns:
        uint8 [N, C, *size], and the files that cannot be read with the reason; their pixels
        are zero.
    """
    pixels = np.zeros((len(paths), channels, *sides(size)), dtype=np.uint8)
    broken: dict[Path, str] = {}

    def read(start: int) -> int:
        some = paths[start : start + block]
        for i, path in enumerate(some, start):
            try:
                pixels[i] = read_image(path, size, value_range, channels)
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


def read_image(
    file: Path | IO[bytes], size, value_range: ValueRange = None, channels: int = 3
) -> np.ndarray:
    """One file as uint8 [C, *size]; without a range, more than 8 bits are measured themselves."""
    bands = read_bands(file)
    if bands is not None:
        if len(bands) != channels:
            raise UserError(f"it has {len(bands)} channels, not {channels}")
        x_CHW = bands if bands.dtype == np.uint8 else scaled(bands, value_range)
        cuts = [cut(Image.fromarray(x), size, Image.Resampling.BICUBIC) for x in x_CHW]
        return np.stack([np.asarray(x) for x in cuts])
    with Image.open(file) as image:
        # A large JPEG is decoded at an eighth to a half of its size, but at twice ours or more.
        image.draft("RGB", (2 * max(sides(size)), 2 * max(sides(size))))
        with _one_large if image.width * image.height > LARGE else nullcontext():
            whole = _of_8_bits(image, value_range)
            ImageOps.exif_transpose(whole, in_place=True)
            whole = to_rgb(whole, channels=channels)
            x = np.asarray(cut(whole, size, Image.Resampling.BICUBIC))
            return x.transpose(2, 0, 1) if channels > 1 else x[None]


def to_rgb(image: Image.Image, value_range: ValueRange = None, channels: int = 3) -> Image.Image:
    """A picture of any mode as RGB or gray, transparency onto white; with 4 channels as RGBA."""
    if channels not in COLOURS:
        raise UserError(f"it is a picture, which has 1, 3 or 4 channels, not {channels}")
    image = _of_8_bits(image, value_range)
    if image.has_transparency_data and channels < 4:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert(COLOURS[channels])


def _of_8_bits(image: Image.Image, value_range: ValueRange) -> Image.Image:
    """A picture whose values of more than 8 bits are scaled: a plain convert would clip at 255."""
    values, alpha = _deep_values(image)
    if values is None:
        return image
    x = scaled(values, value_range)
    result = Image.fromarray(x if alpha is None else np.dstack([x, alpha]))
    result.getexif().update({ORIENTATION: image.getexif().get(ORIENTATION, 1)})
    return result


def _deep_values(image: Image.Image) -> tuple[np.ndarray | None, np.ndarray | None]:
    """Values [H, W] or [H, W, 3] of more than 8 bits, None if there are none; and uint8 alpha."""
    if image.mode.startswith(DEEP):
        return np.asarray(image), None
    if not _deep_colours(image):
        return None, None
    # Pillow keeps the upper byte of a colour; told the other order of bytes, it keeps the lower.
    upper, lower = Image.open(image.fp), Image.open(image.fp)
    lower.tile = [tile._replace(args=_swapped(tile.args)) for tile in lower.tile]
    upper, lower = np.asarray(upper), np.asarray(lower)
    alpha = upper[..., 3] if upper.shape[2] == 4 else None
    return upper[..., :3].astype(np.uint16) << 8 | lower[..., :3], alpha


def _deep_colours(image: Image.Image) -> bool:
    """Whether its colours have 16 bits, of which Pillow drops the lower: 12 bits would be black."""
    tile = next(iter(getattr(image, "tile", ())), None)
    return image.mode in ("RGB", "RGBA") and ";16" in str(tile and tile.args)


def _swapped(args: str | tuple) -> str | tuple:
    """A decoder's arguments with the other order of bytes; N is this machine's."""
    if not isinstance(args, str):
        return _swapped(args[0]), *args[1:]
    order = args[-1] if args[-1] != "N" else "BL"[sys.byteorder == "little"]
    return args[:-1] + {"B": "L", "L": "B"}[order]


# ---------------------------------------------------------------- files of bands


def read_bands(file: Path | IO[bytes]) -> np.ndarray | None:
    """The channels [C, H, W] of a file of bands, in their own numbers; None for a picture.

    Arrays are mapped, not read. In [H, W, C] and [C, H, W] the channels are the smaller axis, see
    :func:`as_pixels`; [H, W] is one channel.

    Raises:
        UserError: for arrays of other shapes or kinds.
        MissingPackage: for a TIFF that Pillow cannot read in full.
    """
    suffix = file.suffix.lower() if isinstance(file, Path) else ""
    if suffix not in (*ARRAYS, *TIFF):
        return None
    bands = np.load(file, "r", allow_pickle=False) if suffix in ARRAYS else _tiff_bands(file)
    if bands is None:
        return None
    if bands.ndim not in (2, 3) or not bands.size or bands.dtype.kind not in "buif":
        raise UserError(
            f"it is an array {list(bands.shape)} of {bands.dtype}, and images are [H, W, C], "
            "[C, H, W] or [H, W] of real numbers"
        )
    bands = bands[None] if bands.ndim == 2 else bands
    return np.moveaxis(bands, -1, 0) if _channels_last(*bands.shape) else bands


def _tiff_bands(path: Path) -> np.ndarray | None:
    """A TIFF of several gray pages, or of bands; None for one that is a picture.

    Pillow knows no TIFF of other bands than colours, and drops extra ones of unknown meaning; of
    the readers that know them, tifffile needs no other library.
    """
    try:
        with Image.open(path) as image:
            pages = [image.copy() for _ in ImageSequence.Iterator(image)] if _paged(image) else []
            if pages and len({(page.mode, page.size) for page in pages}) == 1:
                return np.stack([np.asarray(page) for page in pages])
            if 0 not in image.tag_v2.get(EXTRA_SAMPLES, ()):
                return None
    except UnidentifiedImageError:
        pass
    try:
        from tifffile import imread
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"{path} is a TIFF of bands that Pillow cannot read: pip install tifffile"
        ) from error
    return imread(path)


def _paged(image: Image.Image) -> bool:
    """Whether a TIFF has several pages, gray ones: those of a microscope's channels."""
    return getattr(image, "n_frames", 1) > 1 and (image.mode == "L" or image.mode.startswith(DEEP))


def header(path: Path) -> tuple[tuple[int, int], bool, int | None]:
    """(width, height), whether it has more than 8 bits, and its channels if it is of bands."""
    bands = read_bands(path)
    if bands is not None:
        return bands.shape[:0:-1], bands.dtype != np.uint8, len(bands)
    with Image.open(path) as image:  # reads the header only
        return image.size, image.mode.startswith(DEEP) or _deep_colours(image), None


# ---------------------------------------------------------------- more than 8 bits


def scaled(values: np.ndarray, value_range: ValueRange = None) -> np.ndarray:
    """Values of more than 8 bits as uint8 of the same shape; what is no number is 0."""
    low, high = value_range or _range_of([_extremes(values)])
    x = np.nan_to_num((values.astype(np.float32) - low) * 255 / (high - low), posinf=0, neginf=0)
    return x.clip(0, 255).round().astype(np.uint8)


def check_range(value_range: ValueRange) -> None:
    """Does nothing for None, or two numbers that rise.

    Raises:
        ValueError: for anything else.
    """
    try:
        low, high = value_range or (0, 1)
        rises = low < high < float("inf") and low > -float("inf")
    except (TypeError, ValueError):
        rises = False
    if not rises:
        raise UserError(
            f"value_range must be the values of black and white, as in (0, 4095), not {value_range}"
        )


def measured_range(files: Iterable[Path | IO[bytes]], name: str) -> ValueRange:
    """The one range of a set's values of more than 8 bits, in all channels; None without any.

    Scaled by its own maximum, each image would get another brightness; scaled by all that 16 or 32
    bits can hold, scans of 12 bits would be nearly black.

    Args:
        files: a sample of the set.
        name: of the set, for the warning.

    Warns:
        UserWarning: saying the range.
    """
    found = []
    for file in files:
        try:
            bands = read_bands(file)
            if bands is None:
                with Image.open(file) as image:  # reads the header only, of 8 bits
                    bands, _ = _deep_values(image)
            if bands is not None and bands.dtype != np.uint8:
                found.append(_extremes(bands))
        except Exception:  # read_files names them, with the other broken ones
            continue
    if not found:
        return None
    low, high = _range_of(found)
    warnings.warn(
        f"{name} has images of more than 8 bits: values from {low:g} to {high:g} become 0 to 255, "
        f"as {len(found)} of them suggest; value_range=(low, high) sets another range",
        stacklevel=4,
    )
    return low, high


def _extremes(values: np.ndarray) -> tuple[float, float, bool]:
    """Least and largest finite value, and whether values are floats."""
    floats = values.dtype.kind == "f"
    values = values[np.isfinite(values)] if floats else values
    return (float(values.min()), float(values.max()), floats) if values.size else (0, 1, True)


def _range_of(extremes: Sequence[tuple[float, float, bool]]) -> tuple[float, float]:
    """From 0 to the least usual depth that holds all values; what they span, if some are negative.

    Floats up to 1 come from 0 to 1, or from -1 to 1; where all are far smaller, to the power of ten
    above them, as they would be black otherwise.
    """
    lows, highs, floats = zip(*extremes, strict=True)
    low, high = min(lows), max(highs)
    if all(floats) and -1 <= low and high <= 1:
        most = max(-low, high)
        top = 10.0 ** math.ceil(math.log10(most)) if 0 < most < 0.1 else 1.0
        return (0.0 if low >= 0 else -top), top
    if low < 0:
        return low, max(high, low + 1)
    return 0.0, float(next((2**b - 1 for b in DEPTHS if high < 2**b), high))
