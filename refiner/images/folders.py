"""Folders of images: splits, classes, and the files in them."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from refiner.base.errors import MissingPackage, UserError
from refiner.images.decode import (
    ARRAYS,
    COLOURS,
    EXTENSIONS,
    SAMPLE,
    ValueRange,
    header,
    measured_range,
)

# The names of splits, the usual one first.
SPLIT_FOLDERS = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "validate", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}
SPLIT_WORDS = {word: part for part, words in SPLIT_FOLDERS.items() for word in words}
SAYS_NOTHING = ("", "images", "data")  # what is left of a name such as train_set


@dataclass(frozen=True)
class Files:
    """What a folder holds of a split.

    Attributes:
        paths: the files, sorted by class and path.
        labels: int64 [N], None when unlabelled.
        classes: the classes' names.
        folder: that of the split.
        root: that of all splits, if there are others.
    """

    paths: list[Path]
    labels: Tensor | None
    classes: tuple[str, ...]
    folder: Path
    root: Path | None = None

    def value_range(self) -> ValueRange:
        """That of all splits' images of more than 8 bits, if a sample of this one has any."""
        if not any(deep for _, deep, _ in _headers(self.paths, SAMPLE)):
            return None
        files = list(image_files(self.root)) if self.root else self.paths
        return measured_range(_some(files, SAMPLE), str(self.root or self.folder))

    def channels(self, asked: int | None = None) -> int:
        """Those of the first file of bands; pictures have three, or as many as are asked for.

        Raises:
            UserError: if no picture can be read with so many.
        """
        if asked not in (None, *COLOURS):
            raise UserError(f"pictures are read with 1, 3 or 4 channels, not {asked!r}")
        return next((c for _, _, c in _headers(self.paths, SAMPLE) if c), asked or 3)


def files_of(folder: Path, split: str) -> Files:
    """A split's files, see :func:`_list_folder`."""
    root, present = _find_splits(folder)
    folder, others = _chosen(root, present, split), [_entered(root / x) for x in present.values()]
    return Files(*_list_folder(folder, others), folder, root)


def split_folder(folder: Path, split: str) -> Path:
    """Where a folder of images keeps a split: its sub-folder of that name, or itself for train.

    Raises:
        ValueError: for a split that it does not have.
    """
    return _chosen(*_find_splits(folder), split)


def _chosen(folder: Path, present: dict[str, str], split: str) -> Path:
    if split in present:
        return _entered(folder / present[split])
    if present:
        raise UserError(f"{folder} has no {split} sub-folder, only {', '.join(present.values())}")
    if split != "train":
        raise UserError(
            f"{folder} has no sub-folders train and {split}: load it whole and call .holdout()"
        )
    return _entered(folder)


def _find_splits(folder: Path) -> tuple[Path, dict[str, str]]:
    """The folder with the split folders, and their names by split: empty where there are none.

    Archives often unpack into one more folder, so the only sub-folder with images is entered.
    """
    inside = _sub_folders(folder)
    parts: dict[tuple[str, ...], dict[str, str]] = {}
    for name in sorted(inside, key=_rank):
        if found := _split_of(name):
            part, rest = found
            parts.setdefault(rest, {}).setdefault(part, name)
    # One of them beside other folders with images is a class: "train" is also a vehicle.
    for rest, present in sorted(parts.items()):
        others = [name for name in inside if name not in present.values()]
        if len(present) >= 2 or (not rest and not any(_with_images(folder, others))):
            return folder, present
    if len(some := list(islice(_with_images(folder, inside), 2))) == 1:
        deeper, present = _find_splits(folder / some[0])
        if present:
            return deeper, present
    return folder, {}


def _split_of(name: str) -> tuple[str, tuple[str, ...]] | None:
    """The split that a folder's name means, and the words that say something else.

    "imgs_train" and "imgs_test" are splits as they differ in that one word alone, "toy_train" and
    "test_tube" are classes.
    """
    words = [re.sub("set$", "", word) for word in re.findall(r"[^\W\d_]+", name.lower())]
    part = next((SPLIT_WORDS[word] for word in words if word in SPLIT_WORDS), None)
    known = (*SPLIT_WORDS, *SAYS_NOTHING)
    return part and (part, tuple(word for word in words if word not in known))


def _rank(name: str) -> tuple[int, str]:
    """The usual names first."""
    usual = list(SPLIT_WORDS)
    return usual.index(name.lower()) if name.lower() in usual else len(usual), name


def _entered(folder: Path) -> Path:
    """A folder, or the one inside that holds all its images and is called the same or "images"."""
    names = list(islice(_with_images(folder, _sub_folders(folder)), 2))
    same = len(names) == 1 and names[0].lower() in (folder.name.lower(), *SAYS_NOTHING)
    return _entered(folder / names[0]) if same else folder


def _with_images(folder: Path, names: Sequence[str]) -> Iterator[str]:
    """Those of the sub-folders that hold images."""
    return (name for name in names if any(image_files(folder / name)))


def _sub_folders(folder: Path) -> list[str]:
    around = _around(folder)
    return sorted(
        x.name
        for x in os.scandir(folder)
        if _is(x, "dir") and not x.name.startswith(".") and os.path.realpath(x) not in around
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
    inside = set.intersection(*(set(_sub_folders(folder / name)) for name in names))
    if len(names) > 1 and (len(inside) > 1 or any(map(_split_of, inside))):
        yield (
            f"{', '.join(names[:5])} in {folder} are taken for classes, but all have the same "
            f"sub-folders {', '.join(sorted(inside)[:5])}: if those are the classes, call these "
            "train, val or test, or give one of them"
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

    Links are followed, but no folder is entered twice. Arrays beside pictures are something else:
    they count where there are no pictures.
    """
    pictures = _files(folder, EXTENSIONS)
    first = next(pictures, None)
    if first is None:
        yield from _files(folder, ARRAYS)
    else:
        yield first
        yield from pictures


def _files(folder: Path, extensions: tuple[str, ...]) -> Iterator[Path]:
    seen, ahead = _around(folder), [os.fspath(folder)]
    while ahead:
        try:
            entries = sorted(os.scandir(ahead.pop()), key=lambda entry: entry.name)
        except OSError:  # gone, or not ours to look into
            continue
        entries = [entry for entry in entries if not entry.name.startswith(".")]
        for entry in entries:  # a FIFO would be waited for
            if entry.name.lower().endswith(extensions) and _is(entry, "file"):
                yield Path(entry.path)
        inside = {os.path.realpath(x): x.path for x in reversed(entries) if _is(x, "dir")}
        ahead += sorted((inside[real] for real in inside.keys() - seen), reverse=True)
        seen |= inside.keys()


def _is(entry: os.DirEntry, kind: str) -> bool:
    """Whether it is a "file" or "dir", or a link to one; a link to itself would be an OSError."""
    if entry.is_symlink():
        return getattr(os.path, f"is{kind}")(entry)
    return getattr(entry, f"is_{kind}")()


def shorter_sides(folder: Path, sample: int = 64) -> list[int]:
    """Shorter sides of a sample of a folder's images, pixels; none where there is no folder."""
    return [min(size) for size, _, _ in _headers(list(image_files(folder)), sample)]


def _some(paths: Sequence[Path], sample: int) -> Sequence[Path]:
    """Some of the files, evenly spread."""
    return paths[:: max(1, len(paths) // sample)]


def _headers(paths: Sequence[Path], sample: int = 64) -> Iterator[tuple]:
    """The headers of some of the files, without those that cannot be read.

    Raises:
        MissingPackage: if every one of them needs it.
    """
    found, missing = 0, None
    for path in _some(paths, sample):
        try:
            yield header(path)
            found += 1
        except MissingPackage as error:
            missing = error
        # As in read_files, which names them later, with the other broken ones.
        except Exception:
            continue
    if missing and not found:
        raise missing


def common_size(paths: Sequence[Path]) -> int:
    """The square size that a sample of the files shares, else 224."""
    sizes = {size for size, _, _ in _headers(paths)}
    width, height = sizes.pop() if len(sizes) == 1 else (0, 1)
    return width if width == height else 224
