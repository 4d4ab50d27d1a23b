"""Image sets: the embedded Toybox, scikit-learn's digits, what torchvision fetches, your folder.

Every set comes as an :class:`ImageSet`. Its order is such that every prefix is a fair sample:
``images[:100]`` shows all classes about equally often, and ``load_images(name, n=100)`` gives the
same hundred images.

Shape legend: N images, B images of a batch, H height, W width, S output size (height and width).
"""

from __future__ import annotations

import difflib
import hashlib
import os
import sys
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from tqdm.auto import tqdm

from refiner import named_sets, toybox
from refiner.files import replacing

Tensor = torch.Tensor
BUILT_IN = (*toybox.VARIANTS, "digits", "cifar10", "cifar100", *named_sets.SOURCES)
EXTENSIONS = (
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp",
)  # fmt: skip
TARS = (".tar", ".tar.gz", ".tgz")
SPLIT_FOLDERS = {"train": ("train",), "val": ("val", "valid", "validation"), "test": ("test",)}
MEMORY_LIMIT = 2 * 1024**3  # bytes of uint8 pixels; a larger folder stays on disk
TOYBOX_DEFAULT_N = {"train": 8192, "val": 2048, "test": 2048}


# ---------------------------------------------------------------- the set


@dataclass(repr=False)
class ImageSet:
    """Images with what is known about them.

    Indexing with a slice, list, array or tensor (indices or a boolean mask) gives a smaller
    ImageSet; an int gives a set of one image.

    Attributes:
        images: uint8 [N, 3, H, W]; for a large folder a :class:`LazyImages`, which is indexed the
            same way and reads the files on demand.
        labels: int64 [N], indices into ``classes``; None when unlabelled.
        classes: the classes' names; empty when unlabelled.
        factors: one float array [N] per known factor of variation; empty when unknown. For units
            see :data:`refiner.toybox.FACTORS`.
        name: where the images come from.
        masks: float32 [N, H, W], how much of each pixel the object covers, 0 to 1; None when
            unknown.
    """

    images: Tensor | LazyImages
    labels: Tensor | None = None
    classes: tuple[str, ...] = ()
    factors: dict[str, np.ndarray] = field(default_factory=dict)
    name: str = "images"
    masks: Tensor | None = None

    def __post_init__(self):
        n = len(self.images)
        lengths = {"factor " + k: len(v) for k, v in self.factors.items()}
        lengths |= {k: len(v) for k in ("labels", "masks") if (v := getattr(self, k)) is not None}
        wrong = [f"{length} {what}" for what, length in lengths.items() if length != n]
        if wrong:
            raise ValueError(f"{n} images do not match {', '.join(wrong)}")

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

    def batch(self, indices, size: int | None = None) -> Tensor:
        """Pixels of some images, uint8 [B, 3, H, W], or [B, 3, size, size] when a size is given."""
        where = _positions(indices, len(self))
        if isinstance(self.images, Tensor):
            where = where.to(self.images.device)
        pixels = self.images[where]
        return pixels if size is None else resize(pixels, size)

    def to(self, device: str | torch.device) -> ImageSet:
        """The same set with images, labels and masks on another device (lazy images stay files)."""
        move = lambda x: x.to(device) if isinstance(x, Tensor) else x  # noqa: E731
        return replace(
            self, images=move(self.images), labels=move(self.labels), masks=move(self.masks)
        )

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
            ValueError: when a part would be empty, or for labels below 0.
        """
        held = round(share * len(self))
        if not 0 < held < len(self):
            raise ValueError(f"a share of {share} of {len(self)} images leaves one part empty")
        order = balanced_order(self.labels, len(self), seed=seed)
        if self.labels is not None:
            order, most = _by_share(order, self.labels.cpu(), share)
            held = min(held, most)
            if held == 0:
                raise ValueError("every class has one image: none can be held out")
        return self[order[held:].sort().values], self[order[:held].sort().values]


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


def balanced_order(labels: Tensor | None, n: int, *, seed: int = 0) -> Tensor:
    """A seeded shuffle whose every prefix holds the classes in equal numbers, as far as they last.

    Args:
        labels: int64 [N], or None for a plain shuffle.
        n: number of images.

    Returns:
        int64 [N], a permutation.

    Raises:
        ValueError: for labels below 0.
    """
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(n))
    if labels is None:
        return shuffled
    if n and int(labels.min()) < 0:
        raise ValueError(
            f"labels are classes from 0, not {int(labels.min())}: leave images without a class "
            "out, or give no labels"
        )
    # Sorting by rank deals the classes out in turn.
    return shuffled[torch.argsort(_ranks(labels.cpu()[shuffled]), stable=True)]


def _ranks(y: Tensor) -> Tensor:
    """How many of its own class come before each image, int64 [N]."""
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
    y = labels[order]
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


@torch.no_grad()
def resize(images: Tensor, size: int, *, chunk: int = 1024) -> Tensor:
    """Resizes uint8 [N, 3, H, W] to uint8 [N, 3, size, size]: shorter side, then centre crop."""
    h, w = images.shape[-2:]
    if h == w == size:
        return images
    scale = size / min(h, w)
    sides = (max(size, round(h * scale)), max(size, round(w * scale)))
    top, left = (sides[0] - size) // 2, (sides[1] - size) // 2
    out = torch.empty(len(images), 3, size, size, dtype=torch.uint8, device=images.device)
    for start in range(0, len(images), chunk):
        x = images[start : start + chunk].float()
        x = F.interpolate(x, sides, mode="bicubic", antialias=True, align_corners=False)
        x = x[:, :, top : top + size, left : left + size]
        out[start : start + chunk] = x.round_().clamp_(0, 255).to(torch.uint8)
    return out


# ---------------------------------------------------------------- loading


def load_images(
    name: str | os.PathLike,
    *,
    split: str = "train",
    n: int | None = None,
    size: int | None = None,
    seed: int = 0,
    cache: bool = True,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """Loads images by name, or from a folder.

    - ``"toybox"``, ``"toybox-hard"``, ``"toybox-new"`` are rendered (see :mod:`refiner.toybox`),
      with every factor known. Splits train, val, test; by default 8192, 2048, 2048 images.
    - ``"cifar10"``, ``"cifar100"`` are downloaded once through torchvision. Splits train, test.
    - ``"flowers102"``, ``"oxfordiiitpet"``, ``"dtd"``, ``"caltech101"``, ``"sun397"``,
      ``"food101"``, ``"imagenette"`` are downloaded once through torchvision. Splits train, test,
      and val where the set has one. Caltech101 and SUN397 have none: 30 and 50 images of each
      class, always the same, are the train split.
    - ``"digits"`` comes with scikit-learn; every fifth image is the test split.
    - A folder: its sub-folders are the classes, sorted by name; images deeper inside belong to the
      class too. A folder that holds images and no such sub-folders is unlabelled. If two or more
      sub-folders, or all, are called train, val (valid, validation) or test, ``split`` chooses
      among them, also one folder further inside, as archives unpack, and the classes are those of
      all splits together; if not, the whole folder is the train split and other splits are an
      error (:meth:`ImageSet.holdout` makes one).
      Hidden files and other file types are ignored. Images are turned upright (EXIF), converted to
      RGB (transparency onto white), resized by the shorter side and cropped at the centre.

    Args:
        name: one of the names above, or the path of a folder.
        split: "train", "val" or "test".
        n: only so many images, the classes balanced; None for all. A smaller n is a prefix.
        size: height and width in pixels. Default: 32 for Toybox, CIFAR and digits; in other sets
            the size that a sample of 64 files agrees on if it is square, else 224.
        seed: of Toybox's scenes; for the other sets of the order, and so of which n.
        cache: keep rendered Toybox images on disk, see :func:`cache_folder`.
        progress: show a bar while rendering or reading.
        device: where the images are rendered and kept.

    Returns:
        An :class:`ImageSet`. A folder of more than 2 GB of pixels is not read into memory but
        on demand; there, a broken file is an error when it is reached.

    Raises:
        ValueError: for an unknown split, an n that is not positive or larger than the set, or a
            folder without readable images.
        FileNotFoundError: for a name that is neither built in nor a folder, with the nearest name.
        ConnectionError: when a set is not on disk and cannot be downloaded.

    Warns:
        UserWarning: once, when images of a folder cannot be read (they are left out) or are all of
            one class, or when a cache file is damaged (it is made again) or cannot be written.
    """
    _check_n(n)
    if size is not None and size < 1:
        raise ValueError(f"size must be at least 1 pixel, not {size}")
    if str(name) in toybox.VARIANTS:
        found = _load_toybox(str(name), split, n, size or 32, seed, cache, progress, device)
    elif str(name) in ("cifar10", "cifar100"):
        found = _load_cifar(str(name), split, n, size or 32, seed)
    elif str(name) == "digits":
        found = _load_digits(split, n, size or 32, seed)
    elif str(name) in named_sets.SOURCES:
        found = _load_named(str(name), split, n, size, seed, progress)
    else:
        found = _load_folder(Path(name), split, n, size, seed, progress)
    return found.to(device)


def cache_folder() -> Path:
    """Where rendered and downloaded images are kept; safe to delete at any time.

    ``$REFINER_CACHE`` if it is set, else ``refiner`` in the platform's cache folder:
    ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on a Mac, ``%LOCALAPPDATA%`` on
    Windows.
    """
    if os.environ.get("REFINER_CACHE"):
        return Path(os.environ["REFINER_CACHE"]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "refiner"


def _check_split(split: str, known: Sequence[str], name: str) -> None:
    if split not in known:
        raise ValueError(f"{name} has no split {split!r}: choose one of {', '.join(known)}")


def _check_n(n: int | None) -> None:
    if n is not None and n < 1:
        raise ValueError(f"n must be at least 1, not {n}")


def _first(n: int | None, available: int, name: str) -> int:
    if n is not None and n > available:
        raise ValueError(f"{name} has {available} images, fewer than the {n} asked for")
    return available if n is None else n


# ---------------------------------------------------------------- Toybox and its cache


def _load_toybox(variant, split, n, size, seed, cache, progress, device) -> ImageSet:
    _check_split(split, tuple(toybox.SPLITS), variant)
    n = TOYBOX_DEFAULT_N[split] if n is None else n
    # The renderer's source is part of the key: an edited renderer never meets old images.
    source = hashlib.sha256(Path(toybox.__file__).read_bytes()).hexdigest()[:12]
    path = cache_folder() / f"{variant}-{split}-{size}px-seed{seed}-{source}.npz"
    arrays = _read_cache(path) if cache else None
    have = len(arrays["images"]) if arrays else 0
    if have < n:  # image i does not depend on n, so only the missing ones are rendered
        scene = toybox.render(
            range(have, n), split=split, size=size, seed=seed, variant=variant,
            device=device, progress=progress,
        )  # fmt: skip
        new = {"images": scene.images, "labels": scene.labels, "masks": scene.masks}
        new = {k: v.cpu().numpy() for k, v in new.items()}
        new |= {f"factor/{k}": v for k, v in scene.factors.items()}
        arrays = {k: np.concatenate([arrays[k], v]) if arrays else v for k, v in new.items()}
        if cache:
            _write_cache(path, arrays)
    take = {k: v[:n] for k, v in arrays.items()}
    return ImageSet(
        torch.from_numpy(take["images"]),
        torch.from_numpy(take["labels"]),
        toybox.VARIANTS[variant].toys,
        {k.removeprefix("factor/"): v for k, v in take.items() if k.startswith("factor/")},
        f"{variant} {split}",
        torch.from_numpy(take["masks"]),
    )


def _read_cache(path: Path) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file; None when there is none or it cannot be used."""
    try:
        # An npz file is a zip file: reading an array checks its CRC, so damage is noticed.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        wanted = {"images", "labels", "masks", *(f"factor/{k}" for k in toybox.FACTORS)}
        if set(arrays) != wanted or len({len(v) for v in arrays.values()}) != 1:
            raise ValueError("not the expected arrays")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile) as error:
        warnings.warn(
            f"the cached images in {path} are damaged ({error}) and are rendered again",
            stacklevel=4,
        )
        return None
    return arrays


def _write_cache(path: Path, arrays: dict[str, np.ndarray]) -> None:
    # Written beside and renamed: a second process sees no file or a whole one.
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            np.savez(file, **arrays)
    except OSError as error:
        warnings.warn(
            f"the rendered images cannot be kept in {path.parent} ({error.strerror or error}); "
            "they will be rendered again next time. Set REFINER_CACHE to a writable folder.",
            stacklevel=4,
        )


# ---------------------------------------------------------------- small known sets


def _load_digits(split: str, n: int | None, size: int, seed: int) -> ImageSet:
    from sklearn.datasets import load_digits

    _check_split(split, ("train", "test"), "digits")
    data = load_digits()
    fifth = np.arange(len(data.images)) % 5 == 4
    part = fifth if split == "test" else ~fifth
    gray = torch.from_numpy(data.images[part] * (255 / 16)).round().to(torch.uint8)
    labels = torch.from_numpy(data.target[part]).to(torch.int64)
    order = balanced_order(labels, len(labels), seed=seed)[: _first(n, len(labels), "digits")]
    images = resize(gray[order, None].expand(-1, 3, -1, -1), size)
    return ImageSet(images, labels[order], tuple(map(str, range(10))), name=f"digits {split}")


def _load_cifar(name: str, split: str, n: int | None, size: int, seed: int) -> ImageSet:
    from torchvision import datasets

    _check_split(split, ("train", "test"), name)
    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = cache_folder() / name
    _fetch(kind.url, root / kind.filename, kind.tgz_md5, name)
    data = kind(root, train=split == "train", download=True)  # unpacks, and checks what is there
    labels = torch.tensor(data.targets, dtype=torch.int64)
    order = balanced_order(labels, len(labels), seed=seed)[: _first(n, len(labels), name)]
    pixels = torch.from_numpy(data.data[order.numpy()])  # [N, H, W, 3]
    images = resize(pixels.permute(0, 3, 1, 2).contiguous(), size)
    return ImageSet(images, labels[order], tuple(data.classes), name=f"{name} {split}")


def _fetch(url: str, path: Path, md5: str, name: str) -> None:
    """Downloads a file once; a failure leaves nothing behind and says what to put where."""
    from torchvision.datasets.utils import check_integrity, download_url

    if check_integrity(path, md5):
        return
    try:
        with replacing(path) as temporary:
            download_url(url, temporary.parent, temporary.name, md5)
    except (OSError, HTTPException, RuntimeError) as error:
        raise ConnectionError(
            f"{name} could not be downloaded ({error}): put {path.name}, "
            f"from the data set's own page, into {path.parent}"
        ) from error


def _load_named(name: str, split: str, n: int | None, size, seed: int, progress: bool) -> ImageSet:
    _check_split(split, tuple(named_sets.SOURCES[name].splits), name)
    paths, labels, classes = named_sets.list_files(name, split, cache_folder())
    labels = torch.tensor(labels, dtype=torch.int64)
    found = _read_set(paths, labels, classes, cache_folder() / name, n, size, seed, progress)
    return replace(found, name=f"{name} {split}")


# ---------------------------------------------------------------- folders


class LazyImages:
    """Image files that look like a uint8 tensor [N, 3, S, S] and are read when indexed.

    Attributes:
        paths: the files.
        size: S, in pixels.
    """

    dtype = torch.uint8

    def __init__(self, paths: Sequence[Path], size: int):
        self.paths, self.size = list(paths), size

    @property
    def shape(self) -> torch.Size:
        return torch.Size([len(self.paths), 3, self.size, self.size])

    def __len__(self) -> int:
        return len(self.paths)

    def select(self, index) -> LazyImages:
        """Some of the files, still unread."""
        return LazyImages([self.paths[i] for i in _positions(index, len(self))], self.size)

    def __getitem__(self, index) -> Tensor:
        """Pixels, uint8 [B, 3, S, S], or [3, S, S] for an int.

        Raises:
            OSError: when a file cannot be read, with its name.
        """
        chosen = self.select(index)
        pixels, broken = read_files(chosen.paths, self.size, progress=False)
        if broken:
            path, reason = next(iter(broken.items()))
            raise OSError(f"cannot read {path}: {reason}")
        return pixels[0] if isinstance(index, int) else pixels


def _load_folder(
    folder: Path, split: str, n: int | None, size: int | None, seed: int, progress: bool
) -> ImageSet:
    if not folder.is_dir():
        raise FileNotFoundError(_no_folder(folder))
    return _read_set(*_files_of(folder, split), n, size, seed, progress)


def load_holdout(
    folder: str | os.PathLike, share: float = 0.2, *, n: int | None = None,
    n_test: int | None = None, size: int | None = None, seed: int = 0, progress: bool = True,
) -> tuple[ImageSet, ImageSet]:  # fmt: skip
    """Train images of a folder, and a part of them that is held out to test on.

    The part does not depend on n and n_test, and only as many files are read as they ask for.

    Args:
        folder: see :func:`load_images`.
        share: of the train images that is held out, see :meth:`ImageSet.holdout`.
        n, n_test: only so many of the rest and of the part.
        size, seed, progress: see :func:`load_images`.

    Raises:
        ValueError: as :func:`load_images`, and for n or n_test above what the parts hold.
    """
    paths, labels, classes, folder = _files_of(Path(folder), "train")
    size = size or _common_size(paths)
    order = balanced_order(labels, len(paths), seed=seed)
    files = ImageSet(LazyImages(paths, size), labels, classes)[order]
    parts = []
    for part, limit, what in zip(files.holdout(share), (n, n_test), ("train", "test"), strict=True):
        _check_n(limit)
        _first(limit, len(part), f"the {what} part of {folder}")
        some = part.images.paths, part.labels, classes, folder
        parts.append(_read_set(*some, limit, size, seed, progress))
    return parts[0], parts[1]


def _files_of(folder: Path, split: str) -> tuple[list[Path], Tensor | None, tuple[str, ...], Path]:
    """A split's files, labels, classes and folder; see :func:`_list_folder`."""
    root, present = _find_splits(folder)
    folder = split_folder(root, split)
    return *_list_folder(folder, [root / name for name in present.values()]), folder


def _read_set(
    paths: list[Path], labels: Tensor | None, classes: tuple[str, ...], folder: Path,
    n: int | None, size: int | None, seed: int, progress: bool,
) -> ImageSet:  # fmt: skip
    """Files as an ImageSet in a balanced order: read, or where they are too many left on disk."""
    order = balanced_order(labels, len(paths), seed=seed)[: _first(n, len(paths), str(folder))]
    paths = [paths[i] for i in order]
    labels = None if labels is None else labels[order]
    size = size or _common_size(paths)
    if len(paths) * 3 * size * size > MEMORY_LIMIT:
        return ImageSet(LazyImages(paths, size), labels, classes, name=str(folder))

    pixels, broken = read_files(paths, size, progress=progress)
    if not broken:
        return ImageSet(pixels, labels, classes, name=str(folder))
    if len(broken) == len(paths):
        path, reason = next(iter(broken.items()))
        raise ValueError(
            f"none of the {len(paths)} images in {folder} can be read; {path.name}: {reason}"
        )
    named = ", ".join(str(path.relative_to(folder)) for path in sorted(broken)[:5])
    rest = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    warnings.warn(
        f"{len(broken)} of {len(paths)} images cannot be read and are left out: {named}{rest}",
        stacklevel=4,
    )
    good = torch.tensor([path not in broken for path in paths])
    labels = None if labels is None else labels[good]
    return ImageSet(pixels[good], labels, classes, name=str(folder))


def is_stream(name: str | os.PathLike) -> bool:
    """Whether a name is that of tar shards or of a Hugging Face set (``hf:…``)."""
    return str(name).startswith("hf:") or str(name).lower().endswith(TARS)


def _no_folder(folder: Path) -> str:
    if is_stream(folder):
        return (
            f"{folder} is a stream, which only `refiner refine` and refiner.open_stream read; for "
            "all else unpack it into a folder"
        )
    if folder.exists():
        return f"{folder} is a file: give the folder that holds the images"
    near = difflib.get_close_matches(str(folder), BUILT_IN, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]!r}?" if near else f"built in are {', '.join(BUILT_IN)}"
    return f"no image set or folder called {str(folder)!r}; {hint}"


def split_folder(folder: Path, split: str) -> Path:
    """Where a folder of images keeps a split: its sub-folder of that name, or itself for train.

    Raises:
        ValueError: for a split that it does not have.
    """
    folder, present = _find_splits(folder)
    if split in present:
        return folder / present[split]
    if present:
        raise ValueError(f"{folder} has no {split} sub-folder, only {', '.join(present.values())}")
    if split != "train":
        raise ValueError(
            f"{folder} has no sub-folders train and {split}: load it whole and call .holdout()"
        )
    return folder


def _find_splits(folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder with the split folders, and their names by split: empty where there are none.

    Archives often unpack into one more folder, so a lone sub-folder that holds splits is entered.
    """
    inside = _sub_folders(folder)
    present = {
        part: found[0] for part, names in SPLIT_FOLDERS.items()
        if (found := [name for name in names if name in inside])
    }  # fmt: skip
    # One of them beside other folders is a class: "train" is also a vehicle.
    if len(present) >= 2 or len(present) == len(inside) > 0:
        return folder, present
    if len(inside) == 1:
        deeper, present = _find_splits(folder / inside[0])
        if present:
            return deeper, present
    return folder, {}


def _sub_folders(folder: Path) -> list[str]:
    around = _around(folder)
    return sorted(
        x.name for x in folder.iterdir()
        if x.is_dir() and not x.name.startswith(".") and os.path.realpath(x) not in around
    )  # fmt: skip


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
    by_class = {
        name: files for name in _sub_folders(folder) if (files := list(image_files(folder / name)))
    }
    if not by_class:
        paths = list(image_files(folder))
        if not paths:
            raise ValueError(
                f"{folder} holds no images: looked for files that end in {', '.join(EXTENSIONS)}"
            )
        return paths, None, ()
    others = (_class_folders(other) for other in splits if other != folder)
    classes = tuple(sorted(set(by_class).union(*others)))
    _warn_of_few(folder, by_class, classes)
    paths = [path for files in by_class.values() for path in files]
    number = {name: label for label, name in enumerate(classes)}
    labels = [number[name] for name, files in by_class.items() for _ in files]
    return paths, torch.tensor(labels, dtype=torch.int64), classes


def has_classes(folder: Path) -> bool:
    """Whether a folder of images has sub-folders that are classes."""
    return bool(_class_folders(folder))


def _class_folders(folder: Path) -> list[str]:
    """The sub-folders that hold images."""
    return [name for name in _sub_folders(folder) if any(image_files(folder / name))]


def _warn_of_few(folder: Path, by_class: dict, classes: tuple[str, ...]) -> None:
    """Warns when all images are of one class, and of images that are of none."""
    if len(by_class) == 1:
        advice = "if there are classes, give the folder that holds theirs"
        if len(classes) > 1:
            advice = f"the set has {len(classes)} classes"
        warnings.warn(
            f"all images in {folder} are of one class, {next(iter(by_class))!r}: k-NN and probes "
            f"have nothing to tell apart; {advice}",
            stacklevel=6,
        )
    loose = sum(path.parent == folder for path in image_files(folder))
    if loose:
        warnings.warn(
            f"{loose} images directly in {folder} belong to no class and are left out",
            stacklevel=6,
        )


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


def _common_size(paths: Sequence[Path]) -> int:
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
    width, height = image.size
    if (width, height) != (size, size):
        scale = size / min(width, height)
        sides = max(size, round(width * scale)), max(size, round(height * scale))
        left, top = (sides[0] - size) // 2, (sides[1] - size) // 2
        image = image.resize(sides, Image.Resampling.BICUBIC)
        image = image.crop((left, top, left + size, top + size))
    return np.asarray(image)


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
