"""Labelled image sets that torchvision fetches: which class, which splits, where the files lie.

The sets of linear-probe and transfer tables: Flowers102 (Nilsback & Zisserman 2008), Oxford-IIIT
Pets (Parkhi et al. 2012), DTD (Cimpoi et al. 2014), Caltech101 (Fei-Fei et al. 2004), SUN397 (Xiao
et al. 2010), Food101 (Bossard et al. 2014) and Imagenette (ten classes of ImageNet).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path

import numpy as np


@dataclass(frozen=True)
class Source:
    """One of torchvision's image sets.

    Attributes:
        kind: the class in ``torchvision.datasets``.
        splits: our names → torchvision's; None where it has no splits.
        train: without splits, so many images of each class, drawn once and for all, are the train
            split and the others the test split.
    """

    kind: str
    splits: Mapping[str, str | None]
    train: int = 0


SOURCES = {
    "flowers102": Source("Flowers102", {"train": "train", "val": "val", "test": "test"}),
    "oxfordiiitpet": Source("OxfordIIITPet", {"train": "trainval", "test": "test"}),
    "dtd": Source("DTD", {"train": "train", "val": "val", "test": "test"}),
    "caltech101": Source("Caltech101", {"train": None, "test": None}, train=30),
    "sun397": Source("SUN397", {"train": None, "test": None}, train=50),
    "food101": Source("Food101", {"train": "train", "test": "test"}),
    "imagenette": Source("Imagenette", {"train": "train", "test": "val"}),
}


def list_files(name: str, split: str, cache: Path) -> tuple[list[Path], list[int], tuple[str, ...]]:
    """Files, labels and classes of a set; torchvision downloads it on first use and shows bars.

    Args:
        name: a key of :data:`SOURCES`.
        split: one of its splits.
        cache: where downloads are kept, a folder for each set.

    Returns:
        The files, a label for each, and the classes' names.

    Raises:
        ConnectionError: when it is not on disk and cannot be downloaded, saying what to put where.
        FileNotFoundError: when what is on disk is not the whole set.
    """
    source = SOURCES[name]
    data = _opened(name, source, split, cache / name)
    if source.kind == "OxfordIIITPet":
        pairs = list(zip(data._images, data._labels, strict=True))
    elif source.kind == "Caltech101":
        root = Path(data.root) / "101_ObjectCategories"
        pairs = [
            (root / data.categories[y] / f"image_{i:04d}.jpg", y)
            for i, y in zip(data.index, data.y, strict=True)
        ]
    else:
        pairs = [data[i] for i in range(len(data))]  # our loader hands the path through
    pairs = sorted((Path(path), int(label)) for path, label in pairs)
    if source.train:
        pairs = _drawn(pairs, source.train, split)
    names = data.categories if source.kind == "Caltech101" else data.classes
    classes = tuple(c if isinstance(c, str) else c[0] for c in names)
    return [path for path, _ in pairs], [label for _, label in pairs], classes


def _opened(name: str, source: Source, split: str, root: Path):
    """torchvision's data set; downloaded beside its place and moved there when it is whole."""
    if root.is_dir():
        try:
            return _made(source, split, root, download=False)
        except (RuntimeError, OSError) as error:
            raise FileNotFoundError(
                f"{root} does not hold {name} as torchvision unpacks it ({error}); delete the "
                "folder to download it again"
            ) from error
    partial = root.with_name(f"{name}.partial")
    _remove_unpacked(partial)
    partial.mkdir(parents=True, exist_ok=True)
    try:
        _made(source, split, partial, download=True)
    except (RuntimeError, OSError, HTTPException) as error:
        reason = " ".join(str(error).split())
        raise ConnectionError(
            f"{name} could not be downloaded ({reason}): try again, or put it, as torchvision's "
            f"{source.kind} unpacks it, into {root}"
        ) from error
    os.replace(partial, root)
    return _made(source, split, root, download=False)


def _made(source: Source, split: str, root: Path, *, download: bool):
    from torchvision import datasets

    options = {"download": download}
    if source.splits[split] is not None:
        options["split"] = source.splits[split]
    if source.kind not in ("OxfordIIITPet", "Caltech101"):
        options["loader"] = Path
    return getattr(datasets, source.kind)(root, **options)


def _remove_unpacked(partial: Path) -> None:
    """After an interruption archives are kept (torchvision checks them), half-unpacked files go.

    torchvision unpacks beside the archive and takes a folder for the whole set.
    """
    archives = (".tgz", ".gz", ".tar", ".zip", ".mat")
    for folder in [p for p in partial.rglob("*") if p.is_dir()]:
        if folder.is_dir() and not any(p.name.endswith(archives) for p in folder.rglob("*")):
            shutil.rmtree(folder)


def _drawn(pairs: list[tuple[Path, int]], train: int, split: str) -> list[tuple[Path, int]]:
    labels = np.array([label for _, label in pairs])
    rng, first = np.random.default_rng(0), np.zeros(len(pairs), dtype=bool)
    for c in np.unique(labels):
        first[rng.permutation(np.flatnonzero(labels == c))[:train]] = True
    return [p for p, chosen in zip(pairs, first, strict=True) if chosen == (split == "train")]
