"""Draws the figures of README, the tour and docs/results.md from committed results and cards.

    python benchmarks/readme_figure.py

``before_after.png``: k-NN of every block of the encoder without a decoder, before and after
refining, and what it has at its best reading without training; and beside it ``labs.png``: what
helps when labels come from some labs and images from others.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from statistics import mean

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

from results_tables import seeds_of

from refiner.base.files import read_json
from refiner.base.places import data_folder
from refiner.visuals import plots
from refiner.visuals.style import COLOURS, GRAY

RESULTS = Path(__file__).parent / "results"
LABS = {
    "before": "before: has seen none of the labs",
    "nna_mixed": "refined, neighbors as positives,\nlabs mixed",
    "mixed": "refined, other views as positives,\nlabs mixed",
    "one_lab": "refined, other views as positives,\none lab a batch",
    "more_mae": "masked training on their images,\n2,244 steps (less time)",
    "long_mae": "masked training, 4,000 steps",
    "long_refined": "these 4,000 steps, then refined,\none lab a batch",
}


def draw_curve(ax) -> None:
    """The curve that falls, refined, and the reading that needs no training."""
    names = {"before": "simmim_toybox", "refined": "simmim_toybox_refined"}
    cards = {word: read_json(data_folder() / f"{n}.json") for word, n in names.items()}
    curves = {word: card["results"]["cls"]["knn"] for word, card in cards.items()}
    title = "An encoder that paints by itself"
    plots.block_curve(curves, ylabel="k-NN accuracy (class token)", best=False, title=title, ax=ax)
    fair = read_json(RESULTS / "fair.json")["rows"]["no decoder"]
    for i, (word, name) in enumerate(names.items()):
        at = fair[name]["knn"]
        ax.axhline(at, color=COLOURS[i], linestyle=":", label=f"{word}, best reading")
    ax.legend(loc="lower right")
    ax.set_ylim(0, 1)


def draw_labs(ax) -> None:
    """A row a rung: its best reading as it is, and with each lab standardised by itself."""
    rows = read_json(RESULTS / "labs.json")["rows"]
    rungs = {rung: seeds_of(rows, rung) for rung in LABS}
    rungs = {rung: found for rung, found in rungs.items() if found}
    looks = {"as they are": ("o", COLOURS[6]), "per lab": ("D", COLOURS[4])}
    words = {"as they are": "best reading", "per lab": "best reading, each lab standardised"}
    for at, found in enumerate(rungs.values()):
        usual = mean(row["as they are"]["usual"] for row in found)
        ax.plot(100 * usual, at, "|", color=GRAY, markersize=12, label="usual reading")
        for how, (marker, colour) in looks.items():
            values = [100 * row[how]["knn"] for row in found]
            ax.plot(values, [at] * len(values), marker, color=colour, label=words[how])
    ax.set_yticks(range(len(rungs)), [LABS[rung] for rung in rungs])
    ax.invert_yaxis()
    ax.set(xlabel="k-NN accuracy (%), labels of labs 0 to 2, images of labs 3 to 5")
    ax.set_title("Labels from some labs, images from others")
    shown = dict(zip(*ax.get_legend_handles_labels()[::-1], strict=True))
    ax.legend(shown.values(), shown.keys(), loc="lower left")


def main() -> None:
    plots.style()
    figure, ax = plt.subplots(figsize=(8.2, 4.6), layout="constrained")
    draw_labs(ax)
    figure.savefig(RESULTS / "labs.png", dpi=90)
    figure, axes = plt.subplots(
        1, 2, figsize=(14, 4.8), width_ratios=(1, 1.25), layout="constrained"
    )
    draw_curve(axes[0])
    draw_labs(axes[1])
    figure.savefig(RESULTS / "before_after.png", dpi=90)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
