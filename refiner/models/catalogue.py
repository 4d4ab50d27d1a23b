"""The catalogue of models, masked-image ones mostly: what ``load_model`` takes by name.

Its entries stand in ``data/catalogue.csv``. Facts are those of the papers and repositories that are
named; names of MIM-Refiner's models are those of its torch.hub file. Parameters are of the encoder
alone and are counted by the tests, on the meta device, for every entry.
"""

from __future__ import annotations

import csv
import difflib
from dataclasses import asdict, dataclass

from refiner.base.places import data_folder


@dataclass(frozen=True)
class Entry:
    """One model.

    Attributes:
        name: for ``load_model``. Without an address it is timm's own name.
        method: how it was trained.
        paper: arXiv number, or DOI.
        parameters: of the encoder, millions.
        patch, size: height and width of a patch and of the images it was trained on, pixels; a
            number for squares.
        shape: width (of the last block in a Hiera), blocks, attention heads (0 where they vary).
        pooling: which features carry what it knows, the better first: class token ("cls"), mean of
            the patches ("patch").
        licence: of the weights, as their repository states it.
        address: where the file lies, empty for timm's.
        file: name in the cache where the address's own is used by several models.
        kind: timm's class.
        training: "masked-image", which refinement was published for, "self-distilled" or "with
            text".
        post_norm: data2vec 2.0's architecture.
        labels: it was also trained with labels, so that a probe does not measure masking alone.
        md5: how that of the file begins; None where nobody published it.
        channels: of the images.
        scale: mean and deviation of each channel of images from 0 to 1, where they are not
            ImageNet's; None where nobody published any that fit images from 0 to 1.
    """

    name: str
    method: str
    paper: str
    parameters: float
    patch: int
    size: int | tuple[int, int]
    shape: tuple[int, int, int]
    pooling: str
    licence: str
    address: str = ""
    file: str | None = None
    kind: str = "VisionTransformer"
    training: str = "masked-image"
    post_norm: bool = False
    labels: bool = False
    md5: str | None = None
    channels: int = 3
    scale: tuple[float, float] | None = None

    @property
    def images(self) -> str:
        """Their size, after the number of channels where that is not 3."""
        size = "×".join(map(str, (self.size,) if isinstance(self.size, int) else self.size))
        return size if self.channels == 3 else f"{self.channels}×{size}"

    @property
    def reference(self) -> str:
        """Where the paper is."""
        return f"doi:{self.paper}" if "/" in self.paper else f"arXiv {self.paper}"

    @property
    def gigabytes(self) -> float:
        """What the encoder's float32 weights take; files with decoder or optimizer are larger."""
        return self.parameters * 4e6 / 1e9

    @property
    def source(self) -> str:
        """Where it comes from, in a word."""
        return self.address.split("/")[2] if self.address else "timm"

    def as_dict(self) -> dict:
        """Plain JSON types."""
        return asdict(self) | {
            "shape": list(self.shape),
            "gigabytes": round(self.gigabytes, 2),
            "source": self.source,
        }


def _entries() -> tuple[Entry, ...]:
    with open(data_folder() / "catalogue.csv", newline="", encoding="utf-8") as file:
        return tuple(_entry(row) for row in csv.DictReader(file))


def _entry(row: dict[str, str]) -> Entry:
    """A row of the file, where empty cells stand for what an entry has by default."""
    shape = tuple(int(row.pop(name)) for name in ("width", "blocks", "heads"))
    kinds = {"parameters": float, "patch": int, "labels": bool, "post_norm": bool, "channels": int}
    kinds |= {"size": _size, "scale": lambda cell: tuple(map(float, cell.split()))}
    given = {name: kinds.get(name, str)(cell) for name, cell in row.items() if cell}
    return Entry(shape=shape, **given)


def _size(cell: str) -> int | tuple[int, int]:
    height, _, width = cell.partition("x")
    return (int(height), int(width)) if width else int(height)


CATALOGUE = _entries()


def find(name: str) -> Entry | None:
    """The entry of this name, or None."""
    return next((entry for entry in CATALOGUE if entry.name == name), None)


def search(text: str = "") -> list[Entry]:
    """Entries whose name, method, training, class or source holds every word; all for none."""

    def described(e: Entry) -> str:
        return f"{e.name} {e.method} {e.training} {e.kind} {e.source}".lower()

    return [e for e in CATALOGUE if all(word in described(e) for word in text.lower().split())]


def nearest(name: str, others: list[str], n: int = 3) -> list[str]:
    """Known names most like a wrong one."""
    known = [*others, *(entry.name for entry in CATALOGUE)]
    return difflib.get_close_matches(name, dict.fromkeys(known), n=n, cutoff=0.4)


COLUMNS = ["name", "method", "training", "params", "GB", "patch", "size"]
COLUMNS += ["pooling", "labels", "paper", "licence", "from"]


def table(entries: list[Entry]) -> str:
    """Entries as lines of text in columns."""
    rows = [COLUMNS]
    for e in entries:
        sizes = [f"{e.parameters:,.0f}M", f"{e.gigabytes:.1f}", str(e.patch), e.images]
        rest = [e.pooling, "yes" if e.labels else "no", e.reference, e.licence, e.source]
        rows.append([e.name, e.method, e.training, *sizes, *rest])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = [[cell.ljust(w) for cell, w in zip(row, widths, strict=True)] for row in rows]
    return "\n".join("  ".join(row).rstrip() for row in padded)
