"""Image sets: the embedded Toybox, scikit-learn's digits, what torchvision fetches, your folder.

Every set comes as an :class:`ImageSet`. Its order is such that every prefix is a fair sample:
``images[:100]`` shows all classes about equally often, and ``load_images(name, n=100)`` gives the
same hundred images.

Shape legend: N images, B images of a batch, H height, W width, S output size (height and width).
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import warnings
import zipfile
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from http.client import HTTPException
from pathlib import Path

import numpy as np
import torch

from refiner.base.errors import TooFew, UserError
from refiner.base.files import keep_in_cache, replacing
from refiner.base.places import cache_folder
from refiner.base.tensors import as_size, sides
from refiner.images import labs as labs_module
from refiner.images import named_sets, toybox
from refiner.images.decode import ValueRange, check_range, read_files, resize
from refiner.images.folders import Files, class_folders, common_size, files_of, split_folder
from refiner.images.sets import ImageSet, LazyImages, balanced_order


def train_and_test(
    data, n: int | None, n_test: int | None, size, channels: int | None = None
) -> tuple[ImageSet, ImageSet]:
    """Train and test images; a folder without a test part lends a fifth, whatever n is.

    Raises:
        ValueError: as :func:`load_images`, and for two labelled parts of different classes.
    """
    split = _test_split(data)
    if split is None:
        return load_holdout(data, 0.2, n=n, n_test=n_test, size=size, channels=channels)
    train = load_images(data, split="train", n=n, size=size, channels=channels)
    test = load_images(data, split=split, n=n_test, size=size, channels=channels)
    labelled = train.labels is not None and test.labels is not None
    if labelled and train.classes != test.classes:
        apart = sorted(set(train.classes) ^ set(test.classes)) or ["their order"]
        raise UserError(
            f"the classes of {train.name} and {test.name} differ in {', '.join(apart[:10])}: give "
            "both splits the same class folders"
        )
    return train, test


def _test_split(data) -> str | None:
    """The split to test on: labelled, if train is; None where the train part has to lend one."""
    if str(data) in BUILT_IN or not Path(data).is_dir():
        return "test"
    labelled = class_folders(split_folder(Path(data), "train"))
    for split in ("test", "val"):
        try:
            folder = split_folder(Path(data), split)
        except UserError:
            continue
        if class_folders(folder) or not labelled:
            return split
    return None


BUILT_IN = (*toybox.VARIANTS, "digits", "cifar10", "cifar100", *named_sets.SOURCES)
TARS = (".tar", ".tar.gz", ".tgz")
MEMORY_LIMIT = 2 * 1024**3  # bytes of uint8 pixels; a larger folder stays on disk
TOYBOX_DEFAULT_N = {"train": 8192, "val": 2048, "test": 2048}


# ---------------------------------------------------------------- loading


def load_images(
    name: str | os.PathLike,
    *,
    split: str = "train",
    n: int | None = None,
    size: int | tuple[int, int] | None = None,
    seed: int = 0,
    value_range: ValueRange = None,
    channels: int | None = None,
    labs: Sequence[int] | None = None,
    group_by: str | None = None,
    cache: bool = True,
    progress: bool = True,
    device: str | torch.device = "cpu",
) -> ImageSet:
    """Loads images by name, or from a folder.

    - ``"toybox"``, ``"toybox-hard"``, ``"toybox-new"`` and ``"toybox-labs"`` are rendered (see
      :mod:`refiner.images.toybox`), with every factor known. Splits train, val, test; by default
      8192, 2048, 2048 images. The last comes from six labs (:mod:`refiner.images.labs`).
    - ``"cifar10"``, ``"cifar100"`` are downloaded once through torchvision. Splits train, test.
    - ``"flowers102"``, ``"oxfordiiitpet"``, ``"dtd"``, ``"caltech101"``, ``"sun397"``,
      ``"food101"``, ``"imagenette"`` are downloaded once through torchvision. Splits train, test,
      and val where the set has one. Caltech101 and SUN397 have none: 30 and 50 images of each
      class, always the same, are the train split.
    - ``"digits"`` comes with scikit-learn; every fifth image is the test split.
    - A folder: its sub-folders are the classes, sorted by name; images deeper inside belong to the
      class too. A folder that holds images and no such sub-folders is unlabelled. If two or more
      sub-folders, or all, are called train (training), val (valid, validation, dev) or test
      (testing, eval), or differ in that word alone (imgs_train, imgs_test), ``split`` chooses among
      them, also one folder further inside, as archives unpack, and the classes are those of all
      splits together; if not, the whole folder is the train split and other splits are an error
      (:meth:`ImageSet.holdout` makes one). Hidden files and other file types are ignored. Images
      are turned upright (EXIF), converted to RGB (transparency onto white), resized by the shorter
      side (to cover the size) and cropped at the centre. ``.npy`` arrays ([H, W, C] or [C, H, W],
      the smaller axis being the channels, or [H, W]) and TIFF of several bands or gray pages keep
      all their channels; all files of a set have as many.

    Args:
        name: one of the names above, or the path of a folder.
        split: "train", "val" or "test".
        n: only so many images, the classes balanced; None for all. A smaller n is a prefix.
        size: pixels, a number for squares or (height, width). Default: 32 for Toybox, CIFAR and
            digits; in other sets the size that a sample of 64 files agrees on if it is square, else
            224.
        seed: of Toybox's scenes; for the other sets of the order, and so of which n.
        value_range: the values that become black and white, where images of a folder have more than
            8 bits. By default one range for all splits and channels, measured on a sample: 0 to the
            least usual depth, such as 12 bits, that holds it, or its span if some are negative.
        channels: as how many a folder's pictures are read: 3 (default), 1 for gray, or 4 with the
            fourth of RGBA. Files of bands bring their own.
        labs: of ``"toybox-labs"``, the numbers of the labs that take the pictures, such as
            ``range(3)``; by default the first six. The factor "lab" says which one took an image.
        group_by: "parent" numbers the images of a folder by the name of the folder that each lies
            in, in the factor "parent": labs, say, inside of each class.
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
        UserWarning: once, when images of a folder cannot be read (they are left out), when its
            classes look wrong, when a range of gray values was measured, or when a cache file is
            damaged (it is made again) or cannot be written.
    """
    check_source(name)
    _check_n(n)
    check_range(value_range)
    size = None if size is None else as_size(*sides(size))
    if str(name) in toybox.VARIANTS and isinstance(size, tuple):
        raise UserError(f"{name} is rendered square: give one number as its size, not {size}")
    if channels not in (None, 3) and str(name) in BUILT_IN:
        raise UserError(f"the images of {name} have 3 channels, not {channels}")
    if labs is not None and str(name) != "toybox-labs":
        raise UserError(f"labs are those of 'toybox-labs'; {name} has none to choose from")
    if group_by not in (None, "parent"):
        raise UserError(f"images of a folder are grouped by 'parent', not by {group_by!r}")
    if group_by and (str(name) in BUILT_IN):
        raise UserError(f"{name} has no folders to group by; group by one of its factors")
    if str(name) in toybox.VARIANTS:
        options = {"split": split, "size": size or 32, "seed": seed, "device": device}
        found = _load_toybox(str(name), n, _lab_numbers(name, labs), options, cache, progress)
    elif str(name) in ("cifar10", "cifar100"):
        found = _load_cifar(str(name), split, n, size or 32, seed)
    elif str(name) == "digits":
        found = _load_digits(split, n, size or 32, seed)
    elif str(name) in named_sets.SOURCES:
        found = _load_named(str(name), split, n, size, seed, progress)
    else:
        files = files_of(Path(name), split)
        channels = files.channels(channels)
        found = _read_set(
            files, n, size, seed, progress, value_range, group_by == "parent", channels
        )
    return found.to(device)


def check_source(name: str | os.PathLike) -> None:
    """Does nothing for the name of a set, or a folder that is there.

    Raises:
        ValueError: for an empty name, which would be the current folder.
        FileNotFoundError: for any other name, with the nearest one.
    """
    if not str(name):
        raise UserError("the name of the images is empty: give a set or a folder")
    if str(name) not in BUILT_IN and not Path(name).is_dir():
        raise FileNotFoundError(_no_folder(Path(name)))


def _check_split(split: str, known: Sequence[str], name: str) -> None:
    if split not in known:
        raise UserError(f"{name} has no split {split!r}: choose one of {', '.join(known)}")


def _check_n(n: int | None) -> None:
    if n is not None and n < 1:
        raise UserError(f"n must be at least 1, not {n}")


def _first(n: int | None, available: int, name: str) -> int:
    if n is not None and n > available:
        raise TooFew(f"{name} has {available} images, fewer than the {n} asked for", n)
    return available if n is None else n


# ---------------------------------------------------------------- Toybox and its cache


def _lab_numbers(name, labs: Sequence[int] | None) -> tuple[int, ...]:
    """Those asked for, or the set's own; none but for a set of labs."""
    numbers = toybox.VARIANTS[str(name)].labs if labs is None else tuple(map(int, labs))
    if labs is not None and (not numbers or len(set(numbers)) < len(numbers)):
        raise UserError(f"labs must be one or more different numbers, not {list(labs)}")
    for number in numbers:
        labs_module.lab(number)
    return numbers


def _load_toybox(variant: str, n: int | None, labs: tuple, options, cache, progress) -> ImageSet:
    split, size, seed = options["split"], options["size"], options["seed"]
    _check_split(split, tuple(toybox.SPLITS), variant)
    n = TOYBOX_DEFAULT_N[split] if n is None else n
    # The renderer's source is part of the key: an edited renderer never meets old images.
    files = toybox, *([labs_module] if labs else [])
    source = hashlib.sha256(b"".join(Path(m.__file__).read_bytes() for m in files)).hexdigest()[:12]
    which = "".join(f"-{number}" for number in labs)
    path = cache_folder() / f"{variant}{which}-{split}-{size}px-seed{seed}-{source}.npz"
    options = options | {"variant": variant, "labs": labs}
    arrays = _read_cache(path, options) if cache else None
    have = len(arrays["images"]) if arrays else 0
    if have < n:  # image i does not depend on n, so only the missing ones are rendered
        new = _arrays(toybox.render(range(have, n), **options, progress=progress))
        arrays = {k: np.concatenate([arrays[k], v]) if arrays else v for k, v in new.items()}
        if cache:
            keep_in_cache(path, "the rendered images", partial(np.savez, **arrays))
    factors = {k.removeprefix("factor/"): v[:n] for k, v in arrays.items() if "factor/" in k}
    images, labels, masks = (torch.from_numpy(arrays[k][:n]) for k in ("images", "labels", "masks"))
    toys, name = toybox.VARIANTS[variant].toys, f"{variant} {split}"
    return ImageSet(images, labels, toys, factors, name, masks)


def _arrays(scene: ImageSet) -> dict[str, np.ndarray]:
    """What the cache keeps of a scene."""
    found = {k: getattr(scene, k).cpu().numpy() for k in ("images", "labels", "masks")}
    return found | {f"factor/{k}": v for k, v in scene.factors.items()}


def _read_cache(path: Path, options: dict) -> dict[str, np.ndarray] | None:
    """The arrays of a cache file; None when there is none or it is not what would be rendered."""
    try:
        # An npz file is a zip file: reading an array checks its CRC, so damage is noticed.
        with open(path, "rb") as file, np.load(file, allow_pickle=False) as archive:
            arrays = dict(archive)
        if "images" not in arrays or not (n := len(arrays["images"])):
            raise UserError("no images")
        last = _arrays(toybox.render([n - 1], **options))
        if set(arrays) != set(last) or not all(_fits(arrays[k], last[k], n) for k in last):
            raise UserError("not the images that belong there")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, EOFError, KeyError, TypeError, zipfile.BadZipFile) as error:
        warnings.warn(
            f"the cached images in {path} are damaged ({error}) and are rendered again",
            stacklevel=4,
        )
        return None
    return arrays


def _fits(cached: np.ndarray, last: np.ndarray, n: int) -> bool:
    """Whether an array is of n images and ends with the last one, as any machine rounds it."""
    if cached.dtype != last.dtype or cached.shape != (n, *last.shape[1:]):
        return False
    return np.abs(cached[-1:].astype(float) - last).mean() <= 0.01 * (1.0 + np.abs(last).max())


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
    files = Files(paths, labels, classes, cache_folder() / name)
    found = _read_set(files, n, size, seed, progress)
    return replace(found, name=f"{name} {split}")


def load_holdout(
    folder: str | os.PathLike,
    share: float = 0.2,
    *,
    n: int | None = None,
    n_test: int | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> tuple[ImageSet, ImageSet]:
    """Train images of a folder, and a part of them that is held out to test on.

    The part does not depend on n and n_test, and only as many files are read as they ask for.

    Args:
        folder: see :func:`load_images`.
        share: of the train images that is held out, see :meth:`ImageSet.holdout`.
        n, n_test: only so many of the rest and of the part.
        size, channels, seed, progress: see :func:`load_images`.

    Raises:
        ValueError: as :func:`load_images`, and for n or n_test above what the parts hold.
    """
    files = files_of(Path(folder), "train")
    size, value_range = size or common_size(files.paths), files.value_range()
    channels = files.channels(channels)
    order = balanced_order(files.labels, len(files.paths), seed=seed)
    whole = ImageSet(LazyImages(files.paths, size), files.labels, files.classes)[order]
    parts = []
    for part, limit, what in zip(whole.holdout(share), (n, n_test), ("train", "test"), strict=True):
        _check_n(limit)
        _first(limit, len(part), f"the {what} part of {files.folder}")
        some = replace(files, paths=part.images.paths, labels=part.labels)
        parts.append(_read_set(some, limit, size, seed, progress, value_range, False, channels))
    return parts[0], parts[1]


def _read_set(
    files: Files,
    n: int | None,
    size,
    seed: int,
    progress: bool,
    value_range: ValueRange = None,
    by_parent: bool = False,
    channels: int = 3,
) -> ImageSet:
    """Files as an ImageSet in a balanced order: read, or where they are too many left on disk."""
    folder, classes, available = files.folder, files.classes, len(files.paths)
    order = balanced_order(files.labels, available, seed=seed)[: _first(n, available, str(folder))]
    paths = [files.paths[i] for i in order]
    labels = None if files.labels is None else files.labels[order]
    size, value_range = size or common_size(paths), value_range or files.value_range()
    names = [path.parent.name for path in paths]
    factors = {"parent": np.unique(names, return_inverse=True)[1] * 1.0} if by_parent else {}
    if len(paths) * channels * math.prod(sides(size)) > MEMORY_LIMIT:
        lazy = LazyImages(paths, size, value_range, channels)
        return ImageSet(lazy, labels, classes, factors, str(folder))

    options = {"value_range": value_range, "channels": channels, "progress": progress}
    pixels, broken = read_files(paths, size, **options)
    if not broken:
        return ImageSet(pixels, labels, classes, factors, str(folder))
    if len(broken) == len(paths):
        path, reason = next(iter(broken.items()))
        raise UserError(
            f"none of the {len(paths)} images in {folder} can be read; {path.name}: {reason}"
        )
    named = ", ".join(str(path.relative_to(folder)) for path in sorted(broken)[:5])
    rest = f" and {len(broken) - 5} more" if len(broken) > 5 else ""
    warnings.warn(
        f"{len(broken)} of {len(paths)} images cannot be read and are left out: {named}{rest}",
        stacklevel=3,
    )
    good = torch.tensor([path not in broken for path in paths])
    return ImageSet(pixels, labels, classes, factors, str(folder))[good]


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
