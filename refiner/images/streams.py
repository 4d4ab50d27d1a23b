"""Images that arrive as a stream: tar shards, or a Hugging Face set, larger than any disk.

A stream consists of shards that are read from front to back. Image k of shard s always has the id
s · 2³² + k, so the neighbor queue knows a sample again in whatever order it comes. With several
processes each has its own shards, every ``world``-th; it reads them in another order every epoch,
and shuffles what it reads in blocks of a few thousand images. Where it stands is saved with a
training's state: a resumed run reads on at that block and meets the images that an uninterrupted
run meets.

Tar shards are those of WebDataset (github.com/webdataset/webdataset): ``shards-{000..010}.tar``,
local or behind any address that fsspec opens. Their reader is our own, as the package webdataset
(1.0.2) keeps no position that a run could resume from, and takes all files of a sample, which is
whatever agrees up to the first dot, for one image's. Hugging Face sets need the package
``datasets``.

Shape legend: B images of a batch, S height and width.
"""

from __future__ import annotations

import io
import os
import re
import tarfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from glob import glob
from itertools import groupby, islice

import numpy as np
import torch
from torch import Tensor

from refiner.base import parallel
from refiner.base.errors import MissingPackage, UserError
from refiner.base.tensors import sides
from refiner.images.decode import (
    EXTENSIONS,
    SAMPLE,
    ValueRange,
    check_range,
    measured_range,
    read_image,
)

SHARD = 2**32  # ids from one shard's first image to the next one's
MOST_SHARDS = 10**6
MOST_BYTES = 2**28  # of an encoded image; what is larger counts as broken
PREFETCH = 2  # batches that are prepared while a step runs
MOST_KEYS = 64  # images of a sample that are held to choose among
PREFERRED = ("image", "img", "jpg", "jpeg", "png", "webp")  # keys and columns, best first
Reader = Callable[[int, int], Iterator[bytes]]


@dataclass(repr=False)
class ImageStream:
    """Images of shards, decoded while they are read; what :func:`open_stream` returns.

    Attributes:
        read: (shard, images to skip) → the encoded images of a shard in their order; empty where
            one cannot be had.
        shards: how many there are.
        size: pixels, a square's side or height and width.
        name: where they come from.
        n: images in all shards; None when nobody said. ``len()`` is then an error.
        block: images that are shuffled together; they are held encoded.
        column: where the images stand, in a Hugging Face set.
        value_range: see :func:`refiner.load_images`; without one, :meth:`sample` measures it.
    """

    read: Reader
    shards: int
    size: int | tuple[int, int]
    name: str = "stream"
    n: int | None = None
    block: int = 2048
    column: str = ""
    value_range: ValueRange = None
    seen: list[bytes] = field(default_factory=list)

    dtype = torch.uint8
    labels = None

    def __len__(self) -> int:
        if self.n is None:
            raise UserError(
                f"nobody knows how many images {self.name} holds: say it with --images N (n=N)"
            )
        return self.n

    def __repr__(self) -> str:
        count = "" if self.n is None else f"{self.n} "
        where = f", column {self.column!r}" if self.column else ""
        size = "×".join(map(str, dict.fromkeys(sides(self.size))))
        return (
            f"ImageStream({self.name!r}{where}: {count}images of {size} px in {self.shards} shards)"
        )

    def encoded(self, shard: int, skip: int = 0) -> Iterator[bytes]:
        """The images of a shard as far as it can be read; a warning tells where that ends."""
        count = skip
        try:
            for image in self.read(shard, skip):
                count += 1
                yield image
        except (MissingPackage, ImportError):
            raise
        except Exception as error:
            warnings.warn(
                f"shard {shard} of {self.name} cannot be read beyond its first {count} images "
                f"({' '.join(str(error).split()) or type(error).__name__}); the rest is left out",
                stacklevel=2,
            )

    def decode(self, encoded: bytes) -> Tensor | None:
        """uint8 [3, S, S], or None when it cannot be read."""
        try:
            pixels = read_image(io.BytesIO(encoded), self.size, self.value_range)
        except Exception:  # Pillow's decoders meet damaged files with errors of a dozen types
            return None
        return torch.from_numpy(pixels.copy())

    def sample(self, k: int) -> Tensor:
        """The first k readable images, uint8 [k, 3, S, S], read once.

        Raises:
            ValueError: when all shards hold fewer.
        """
        if len(self.seen) < k:
            everything = (x for s in range(self.shards) for x in self.encoded(s))
            self.seen = list(islice((x for x in everything if self.decode(x) is not None), k))
            files = map(io.BytesIO, self.seen[:SAMPLE])
            self.value_range = self.value_range or measured_range(files, self.name)
        if len(self.seen) < k:
            raise UserError(
                f"{len(self.seen)} images in {self.name} are fewer than one batch of {k}; "
                "give more images or a smaller batch"
            )
        return torch.stack([self.decode(x) for x in self.seen[:k]])


def open_stream(
    name: str,
    *,
    size: int | tuple[int, int],
    split: str = "train",
    n: int | None = None,
    block: int = 2048,
    value_range: ValueRange = None,
) -> ImageStream:
    """Opens tar shards or a Hugging Face set for :func:`refiner.refine`.

    Args:
        name: ``"path/shards-{000..010}.tar"``, also with ``*`` or an address (``https://…``,
            ``s3://…``); or ``"hf:owner/name"``, ``"hf:owner/name:configuration"``, or ``"hf:"`` and
            a local folder of parquet files.
        size: see :func:`refiner.load_images`.
        split: of a Hugging Face set.
        n: how many images there are, where it is known: an epoch's length, for the plan.
        block: images that are shuffled together.
        value_range: see :func:`refiner.load_images`.

    Raises:
        FileNotFoundError: naming the shard that is not there.
        ModuleNotFoundError: when ``datasets`` is needed and missing.
        ValueError: for a set without images, or a pattern that names no shard.

    Warns:
        UserWarning: where images had to be chosen among several of a sample, or several columns;
            later, where a shard or an image cannot be read.
    """
    check_range(value_range)
    name, column = str(name), ""
    if name.startswith("hf:"):
        read, shards, column = _hugging_face(name.removeprefix("hf:"), split)
    else:
        paths = shard_paths(name)
        read, shards = partial(_read_tar, paths, []), len(paths)
    return ImageStream(read, shards, size, name, n, block, column, value_range)


# ---------------------------------------------------------------- tar shards


def shard_paths(pattern: str) -> list[str]:
    """``a-{08..10}.tar`` → a-08.tar, a-09.tar, a-10.tar; ``*`` and ``?`` match local files.

    Raises:
        FileNotFoundError: for a local file that is missing, or when nothing matches.
        ValueError: for numbers that fall, or more than a million.
    """
    found = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    if found:
        low, high = found.groups()
        if not 0 <= int(high) - int(low) < MOST_SHARDS:
            raise UserError(
                f"{found[0]} in {pattern} must count up, and to at most {MOST_SHARDS:,} shards"
            )
        numbers = (f"{i:0{len(low)}d}" for i in range(int(low), int(high) + 1))
        each = (pattern[: found.start()] + i + pattern[found.end() :] for i in numbers)
        return [path for one in each for path in shard_paths(one)]
    if "://" in pattern:
        return [pattern]
    matching = sorted(glob(pattern)) if set("*?") & set(pattern) else [pattern]
    if not matching or not all(map(os.path.isfile, matching)):
        raise FileNotFoundError(
            f"there is no shard {pattern}; give tar files such as shards-{{000..010}}.tar"
        )
    return matching


def _read_tar(paths: Sequence[str], told: list, shard: int, skip: int) -> Iterator[bytes]:
    """Encoded images of one tar file: of each sample (files alike to the first dot) the best.

    The first choice among several keys is told, and noted in ``told``.
    """
    import fsspec

    failure = []  # raised behind the images that came before it

    def pictures(tar: tarfile.TarFile) -> Iterator[tuple[tuple[str, str], str, bytes]]:
        """Folder and stem, key, and content of every image file that is not hidden."""
        try:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, key = base.lower().partition(".")
                hidden = any(part.startswith(".") for part in member.name.split("/") if part != ".")
                if member.isfile() and base.lower().endswith(EXTENSIONS) and not hidden:
                    small = member.size <= MOST_BYTES
                    yield (folder, stem), key, tar.extractfile(member).read() if small else b""
        except Exception as error:  # of tarfile, of a decompressor, of a protocol's own package
            failure.append(error)

    def chosen(tar: tarfile.TarFile) -> Iterator[bytes]:
        for _, sample in groupby(pictures(tar), key=lambda picture: picture[0]):
            # Names with dots of their own may all be alike to the first one.
            while some := list(islice(sample, MOST_KEYS)):
                best = min(_rank(key) for _, key, _ in some)
                best_keys = {key for _, key, _ in some if _rank(key) == best}
                if not told and (others := {key for _, key, _ in some} - best_keys):
                    told.append(
                        f"{' and '.join(sorted(best_keys))}, not {', '.join(sorted(others))}"
                    )
                    warnings.warn(
                        f"of each sample in {paths[shard]} is read {told[0]}", stacklevel=2
                    )
                yield from (content for _, key, content in some if key in best_keys)

    with fsspec.open(paths[shard], "rb") as file, tarfile.open(fileobj=file, mode="r|*") as tar:
        yield from islice(chosen(tar), skip, None)
    if failure:
        raise failure[0]


def _rank(key: str) -> int:
    """How well a key or column names the image itself: "png" well, "mask.png" worst of all."""
    first = key.lower().partition(".")[0]
    if first in PREFERRED:
        return PREFERRED.index(first)
    return len(PREFERRED) + ("." in key)


# ---------------------------------------------------------------- Hugging Face


def _hugging_face(name: str, split: str) -> tuple[Reader, int, str]:
    """What reads a shard, how many there are, and the column of the images."""
    try:
        from datasets import Image, load_dataset
    except ModuleNotFoundError as error:
        raise MissingPackage(
            "hf: needs the package datasets: pip install 'mim-refiner-lab[stream]'"
        ) from error
    path, _, configuration = name.partition(":")
    data = load_dataset(path, configuration or None, split=split, streaming=True)
    data = data if data.features else data._resolve_features()
    column = _image_column(data.features, name)
    if hasattr(data.features[column], "decode"):
        data = data.cast_column(column, Image(decode=False))

    def read(shard: int, skip: int) -> Iterator[bytes]:
        for row in data.shard(data.num_shards, shard).skip(skip):
            yield _encoded(row[column])

    return read, data.num_shards, column


def _encoded(value: dict | bytes | str | None) -> bytes:
    """What a row holds of an image: its bytes, or those of the file that it names; else nothing."""
    import fsspec

    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if not isinstance(value, str):
        return value or b""
    try:
        with fsspec.open(value, "rb") as file:
            return file.read()
    except Exception:  # a protocol's own errors, too
        return b""


def _image_column(features, name: str) -> str:
    """The column of images, or of a file's bytes; of several the one that is called so."""

    def is_image(kind) -> bool:
        return type(kind).__name__ == "Image"

    def holds_bytes(kind) -> bool:
        binary = getattr(kind, "dtype", None) in ("binary", "large_binary")
        return binary or (isinstance(kind, dict) and "bytes" in kind)

    found = [c for c, kind in features.items() if is_image(kind) or holds_bytes(kind)]
    if not found:
        raise UserError(f"{name} has no column of images, only {', '.join(features)}")
    found.sort(key=lambda column: (_rank(column), not is_image(features[column])))
    if found[1:]:
        others = ", ".join(found[1:])
        warnings.warn(f"of each row of {name} is read {found[0]}, not {others}", stacklevel=4)
    return found[0]


# ---------------------------------------------------------------- batches


class StreamBatches:
    """The images of each step, read and decoded ahead of it.

    An image that cannot be had or decoded is replaced by another of its batch, with a warning once.

    Args:
        stream: the images.
        batch: images a step that this process takes.
        device: where they shall be.
        seed: of the order.
        steps: no batch is prepared from this step on.

    Raises:
        ValueError: for fewer shards than processes.
    """

    def __init__(
        self, stream: ImageStream, batch: int, device: torch.device, *, seed: int = 0, steps: int
    ):
        rank, world = parallel.rank(), parallel.world()
        if stream.shards < world:
            raise UserError(
                f"{stream.shards} shards of {stream.name} cannot be shared by {world} processes; "
                "give each at least one"
            )
        self.stream, self.share, self.device, self.seed = stream, batch, device, seed
        self.rank, self.own = rank, np.arange(rank, stream.shards, world)
        self.steps, self.next = steps, 0
        # Number of a block's first image → block, epoch, shard and image from which to read on.
        self.starts: dict[int, tuple[int, int, int, int]] = {0: (0, 0, 0, 0)}
        self.reader, self.decoders = ThreadPoolExecutor(1), None
        self.coming: dict[int, Future] = {}
        self.samples: Iterator[tuple[int, bytes]] | None = None
        self.warned = False

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        """This process's images of a step, uint8 [b, 3, S, S], and the ids of the whole batch.

        Steps come one after another.
        """
        if self.samples is None:
            self.next = step
            (first,) = self.starts
            self.samples = islice(self._shuffled(first), step * self.share - first, None)
            self.decoders = ThreadPoolExecutor(min(16, os.cpu_count() or 1))
        for soon in range(self.next, min(step + 1 + PREFETCH, self.steps)):
            self.coming[soon] = self.reader.submit(self._take)
            self.next = soon + 1
        pixels, own = self.coming.pop(step).result()
        return pixels, parallel.gather(own.to(self.device, non_blocking=True))

    def state(self, done: int) -> list[list[int]]:
        """Where each process reads on after so many steps: the start of a block, five numbers."""
        first = max(b for b in list(self.starts) if b <= done * self.share)
        for earlier in [b for b in list(self.starts) if b < first]:
            del self.starts[earlier]
        own = torch.tensor([[first, *self.starts[first]]], device=self.device)
        return parallel.gather(own).tolist()

    def restore(self, state: list[list[int]] | None) -> None:
        """Reads on where :meth:`state` was.

        Raises:
            ValueError: when there were more processes then, or fewer.
        """
        found = len(state or ())
        if found != parallel.world():
            raise UserError(
                f"cannot resume: {found or 'no'} processes read the stream then, "
                f"{parallel.world()} now; start as many"
            )
        first, *start = state[parallel.rank()]
        self.starts = {first: tuple(start)}

    def close(self) -> None:
        """Ends the threads; what they had begun is thrown away."""
        for pool in (self.reader, self.decoders):
            if pool:
                pool.shutdown(cancel_futures=True)
        # The generator knows this object: a cycle, which would keep batches on the device.
        self.samples = None
        self.coming.clear()

    def _take(self) -> tuple[Tensor, Tensor]:
        ids, encoded = zip(*islice(self.samples, self.share), strict=True)
        pixels = list(self.decoders.map(self.stream.decode, encoded))
        good = [i for i, x in enumerate(pixels) if x is not None]
        if not good:
            raise OSError(f"no image of a whole batch of {self.stream.name} can be read")
        if len(good) < len(ids) and not self.warned:
            self.warned = True
            bad = next(i for i, x in enumerate(pixels) if x is None)
            warnings.warn(
                f"image {ids[bad] % SHARD} of shard {ids[bad] // SHARD} of {self.stream.name} "
                "cannot be read; such images are replaced by others",
                stacklevel=2,
            )
        use = [i if pixels[i] is not None else good[i % len(good)] for i in range(len(ids))]
        batch = torch.stack([pixels[i] for i in use])
        if self.device.type == "cuda":
            batch = batch.pin_memory().to(self.device, non_blocking=True)
        return batch, torch.tensor([ids[i] for i in use])

    def _shuffled(self, first: int) -> Iterator[tuple[int, bytes]]:
        """Ids and encoded images without end, shuffled within blocks, from a block's start on."""
        block, epoch, at, image = self.starts[first]
        while True:
            rest, whole = self._epoch(epoch, at, image), (at, image) == (0, 0)
            while held := list(islice(rest, self.stream.block)):
                first, block, whole = first + len(held), block + 1, False
                self.starts[first] = (block, *held[-1][0])
                for i in self._order(block, len(held)):
                    yield held[i][1:]
            if whole:
                raise OSError(f"no images in the shards of {self.stream.name}")
            epoch, at, image = epoch + 1, 0, 0

    def _epoch(self, epoch: int, at: int, image: int) -> Iterator[tuple[tuple, int, bytes]]:
        """(where to read on, id, encoded image) of this process's shards from some image on."""
        order = self._order(-epoch - 1, len(self.own))
        while at < len(order):
            shard = int(self.own[order[at]])
            for encoded in self.stream.encoded(shard, image):
                image += 1
                yield (epoch, at, image), shard * SHARD + image - 1, encoded
            at, image = at + 1, 0

    def _order(self, which: int, n: int) -> np.ndarray:
        """A permutation by seed, process and a number: of blocks above 0, of epochs below."""
        mixed = [self.seed, self.rank, abs(which), int(which < 0)]
        return np.random.default_rng(mixed).permutation(n)
