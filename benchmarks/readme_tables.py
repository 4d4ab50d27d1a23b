"""Writes README's tables of the training studies from their result files and the cards.

    python benchmarks/readme_tables.py

Each table stands between ``<!-- name -->`` and ``<!-- end -->``; a test compares README with what
this would write.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURES = {"knn": "k-NN", "linear": "linear", "1-shot": "1-shot", "5-shot": "5-shot",
            "kmeans_acc": "k-means ACC", "kmeans_nmi": "NMI"}  # fmt: skip
SWAPS = {"none": "never", "start": "from the start", "ramp": "growing"}
CIFAR = {
    "mae": "MAE",
    "mae_longer": "MAE, longer by the time of refining (control)",
    "from_scratch": "NNA without MAE, same total time (control)",
    "swap_both": "refined, NNCLR's swap of both roles",
    "one_head": "refined, NNA, 1 head",
    "all_heads": "refined, NNA, 4 heads",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def cards() -> str:
    """The embedded pairs, last block."""
    rows = []
    for name in ("mae_toybox", "mae_toybox_refined", "mae_cifar10", "mae_cifar10_refined"):
        results = read(ROOT / "data" / f"{name}.json")["results"]
        for pooling, word in (("cls", "class token"), ("patch", "patch mean")):
            scores = [percent(results[pooling][m][-1]) for m in MEASURES]
            rows.append([f"`{name}`", word, *scores])
    return table(["Checkpoint", "last block's", *MEASURES.values()], rows)


def ladder() -> str:
    """The Toybox ladder, last block."""
    result = read(RESULTS / "toybox_ladder.json")
    rows = [["unrefined", "", *_pair(result["before"])]]
    for cell in result["cells"]:
        colour, swap, *patch = cell["rung"].split("-")
        rows.append([colour + (", heads on the patch mean" if patch else ""), SWAPS[swap],
                     *_pair(cell)])  # fmt: skip
    head = ["Colour jitter", "Neighbor as positive", "k-NN", "1-shot", "k-means ACC",
            "k-NN, patch mean"]  # fmt: skip
    return table(head, rows)


def _pair(cell: dict) -> list[str]:
    cls = [percent(cell["cls"][m][-1]) for m in ("knn", "1-shot", "kmeans_acc")]
    return [*cls, percent(cell["patch"]["knn"][-1])]


def cifar() -> str:
    """CIFAR-10 on two cores, last block."""
    cells = {c["rung"]: c for c in read(RESULTS / "cifar10_cpu.json")["cells"]}
    rows = [
        [words, f"{cells[rung]['seconds'] / 60:.0f}",
         *(percent(cells[rung][p][k][-1]) for k in ("k200", "k10") for p in ("cls", "patch"))]
        for rung, words in CIFAR.items() if rung in cells
    ]  # fmt: skip
    head = ["", "minutes", "k=200, class token", "k=200, patch mean", "k=10, class token",
            "k=10, patch mean"]  # fmt: skip
    return table(head, rows)


TABLES = {"cards": cards, "ladder": ladder, "cifar": cifar}


def filled(text: str) -> str:
    """README's text with every table as the files have it."""
    for name, make in TABLES.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.S)
        text, count = pattern.subn(lambda _: f"<!-- {name} -->\n{make()}\n<!-- end -->", text)  # noqa: B023
        if count != 1:
            raise ValueError(f"README has {count} places for the table {name!r}, expected one")
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(filled(readme.read_text()))
    print("wrote README.md")
