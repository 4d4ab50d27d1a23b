"""Draws MIM-Refiner in one picture: views, encoder, heads, queue and Nearest Neighbor Alignment.

    python docs/schematic.py

Writes ``schematic.png`` beside itself. The first notebook and the site's front page show it.
"""

from __future__ import annotations

from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from refiner.visuals.style import COLOURS, style

DEPTH, HEADS, FROZEN = 12, (9, 10, 11, 12), 6  # blocks, those with a head, those left as they were
LEFT, WIDTH = 18.0, 44.0 / DEPTH  # of the encoder and of a block, in the picture's units


def main() -> None:
    with style():
        figure = draw()
        figure.savefig(Path(__file__).with_name("schematic.png"), dpi=110)


def draw() -> plt.Figure:
    figure, ax = plt.subplots(figsize=(10.0, 4.6), layout="constrained")
    for block in range(1, DEPTH + 1):
        x = LEFT + (block - 1) * WIDTH
        look = {"colour": "0.88", "hatch": "//"} if block <= FROZEN else {"colour": COLOURS[5]}
        box(ax, x + 0.2, 8, WIDTH - 0.4, 14, str(block), **look)
        if block in HEADS:
            box(ax, x + 0.3, 28, WIDTH - 0.6, 6, "head", COLOURS[4], size=7)
            arrow(ax, (x + WIDTH / 2, 22.2), (x + WIDTH / 2, 27.8))
    for y, name, colour in ((17, "view A", COLOURS[0]), (10, "view B", COLOURS[1])):
        box(ax, 1, y - 2, 11, 6, name, colour, text="white")
        arrow(ax, (12.4, y + 1), (LEFT - 0.3, y + 1))
    rest = LEFT + FROZEN * WIDTH
    ax.text((LEFT + rest) / 2, 5.5, "stay as they were", ha="center", va="center", fontsize=9)
    ax.text((rest + LEFT + 44) / 2, 5.5, "refined", ha="center", va="center", fontsize=9)
    ax.text(40, 2, f"encoder: {DEPTH} transformer blocks", ha="center", fontsize=11)
    heads = "instance-discrimination heads:\nprojector → z, predictor → p"
    ax.text(LEFT, 31, heads, va="center", fontsize=9)
    loss(ax, (LEFT + (max(HEADS) - 0.5) * WIDTH, 34))
    ax.set(xlim=(0, 100), ylim=(0, 46), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    return figure


def loss(ax: Axes, start: tuple[float, float]) -> None:
    """The right half: target, queue, neighbor, prediction, and what the loss does with them."""
    box(ax, 68, 36, 11, 6, "z of view A", COLOURS[0], text="white")
    box(ax, 68, 8, 11, 6, "p of view B", COLOURS[1], text="white")
    x, y = start
    arrow(ax, (x, y + 0.2), (67.7, 39), bend=-0.25)
    arrow(ax, (x + 1.6, y - 3.2), (67.7, 13), bend=-0.2)
    ax.text(80.2, 42.6, "no gradient", fontsize=8, ha="left", va="bottom")
    for i in range(7):
        name, colour = ("NN", COLOURS[2]) if i == 4 else ("", "0.95")
        box(ax, 68 + 4 * i, 26, 3.6, 5, name, colour, text="white", size=8)
    ax.text(96.5, 33.5, "queue of past z", fontsize=9, ha="right", va="center")
    arrow(ax, (79.3, 38), (85.4, 31.3))
    arrow(ax, (85.8, 25.7), (77, 14.3), ends="<|-|>")
    ax.text(83.5, 20, "NNA: alike", fontsize=10, fontweight="bold")
    ax.text(83.5, 16.8, "unlike z of\nother images", fontsize=9, va="top")


def box(ax: Axes, x, y, width, height, name, colour, *, text="black", size=9, hatch=None) -> None:
    look = {"facecolor": colour, "edgecolor": "0.25", "linewidth": 0.9, "hatch": hatch}
    shape = "round,pad=0,rounding_size=0.6"
    ax.add_patch(FancyBboxPatch((x, y), width, height, boxstyle=shape, **look))
    middle = (x + width / 2, y + height / 2)
    label = ax.text(*middle, name, ha="center", va="center", color=text, fontsize=size)
    if hatch:
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1.5})


def arrow(ax: Axes, start, end, *, bend: float = 0.0, ends: str = "-|>") -> None:
    look = {"arrowstyle": ends, "mutation_scale": 11, "color": "0.25", "linewidth": 1.2}
    ax.add_patch(FancyArrowPatch(start, end, connectionstyle=f"arc3,rad={bend}", **look))


if __name__ == "__main__":
    main()
