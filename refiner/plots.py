"""Figures of the course. Every function draws with matplotlib and returns its Axes.

One style for all: the Okabe-Ito palette, which stays distinct for colour-blind readers, and a
marker or line style beside every colour, so that nothing is said by colour alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#F0E442", "#000000")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")


def style() -> None:
    """Sets the course's look for all following figures."""
    plt.rcParams.update({
        "figure.facecolor": "white",  # readable in a dark notebook too
        "figure.dpi": 80,
        "savefig.dpi": 80,
        "axes.prop_cycle": plt.cycler(color=PALETTE),
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.grid": True,
        "grid.alpha": 0.25,
        "image.interpolation": "nearest",
        "font.size": 11,
        "legend.frameon": False,
    })  # fmt: skip


def _look(i: int) -> dict[str, str]:
    return {
        "color": PALETTE[i % len(PALETTE)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
    }


def _picture(image: torch.Tensor) -> np.ndarray:
    """One image [3, H, W], uint8 or float 0..1, as [H, W, 3] for matplotlib."""
    return image.detach().cpu().permute(1, 2, 0).numpy()


def _show(axis: Axes, image: torch.Tensor) -> None:
    axis.imshow(_picture(image))
    axis.set(xticks=[], yticks=[])
    axis.grid(False)
    for spine in axis.spines.values():
        spine.set_visible(False)


def contact_sheet(images, *, columns: int = 8, title: str | None = None) -> Axes:
    """A grid of images, row by row, in one Axes.

    Args:
        images: an ImageSet, or uint8 or float (0 to 1) [N, 3, H, W].
        columns: images in a row.
        title: above the grid.

    Raises:
        ValueError: without images.
    """
    pixels = images if torch.is_tensor(images) else images.images[:]
    n, c, h, w = pixels.shape
    if not n:
        raise ValueError("there are no images to show")
    rows = -(-n // columns)
    white = 255 if pixels.dtype == torch.uint8 else 1
    sheet = torch.full((rows * columns, c, h + 2, w + 2), white, dtype=pixels.dtype)
    sheet[:n, :, 1:-1, 1:-1] = pixels.cpu()
    grid = sheet.reshape(rows, columns, c, h + 2, w + 2).permute(2, 0, 3, 1, 4)
    _, axis = plt.subplots(figsize=(0.7 * columns, 0.7 * rows))
    _show(axis, grid.reshape(c, rows * (h + 2), columns * (w + 2)))
    if title:
        axis.set_title(title)
    return axis


def block_curve(
    curves: Mapping[str, Sequence[float]],
    *,
    ylabel: str,
    chance: float | None = None,
    title: str = "Quality of every block",
    ax: Axes | None = None,
) -> Axes:
    """Quality against block, one line a model; the best block of each is ringed.

    Args:
        curves: values of blocks 1 to L by name; a 2-D value [seeds, L] gives the mean, and a band
            from the lowest to the highest seed.
        ylabel: what is measured.
        chance: drawn as a dotted line.
    """
    ax = ax or plt.subplots(figsize=(6.5, 4))[1]
    for i, (name, values) in enumerate(curves.items()):
        seeds = np.atleast_2d(np.asarray(values, dtype=float))
        mean, blocks = seeds.mean(0), np.arange(1, seeds.shape[1] + 1)
        ax.plot(blocks, mean, label=name, markersize=5, **_look(i))
        if len(seeds) > 1:
            ax.fill_between(blocks, seeds.min(0), seeds.max(0), color=_look(i)["color"], alpha=0.2)
        best = int(mean.argmax())
        ax.scatter(blocks[best], mean[best], s=140, facecolors="none", edgecolors=_look(i)["color"])
    if chance is not None:
        ax.axhline(chance, color="0.4", linestyle=":", label="chance")
    ax.set(xlabel="block (ring: best)", ylabel=ylabel, title=title, xticks=blocks)
    ax.legend()
    return ax


def neighbor_grid(images, queries: Sequence[int], graphs: Mapping, *, keys=None, k: int = 6):
    """Queries with their nearest neighbors, one group of columns a model.

    A tick and a green frame mark a neighbor of the query's class, a cross and a vermilion frame
    another class.

    Args:
        images: the ImageSet that the queries index.
        queries: one row each.
        graphs: name → graph of ``nearest_neighbors`` whose rows are ``images``.
        keys: the ImageSet that the graphs' indices point into; default ``images``.
        k: neighbors shown.

    Returns:
        Axes [queries, 1 + models * k].
    """
    keys = images if keys is None else keys
    columns = 1 + len(graphs) * k
    fig, axes = plt.subplots(
        len(queries), columns, figsize=(0.75 * columns, 0.95 * len(queries)), squeeze=False
    )
    for row, query in zip(axes, queries, strict=True):
        _show(row[0], images.images[query : query + 1][0])
        for g, graph in enumerate(graphs.values()):
            for axis, key in zip(row[1 + g * k :], graph.indices[query, :k].tolist(), strict=False):
                _show(axis, keys.images[key : key + 1][0])
                if images.labels is not None:
                    _mark(axis, bool(images.labels[query] == keys.labels[key]))
    axes[0, 0].set_title("query", fontsize=10, loc="left")
    for g, name in enumerate(graphs):
        axes[0, 1 + g * k].set_title(f"{name}, nearest first →", fontsize=10, loc="left")
    fig.subplots_adjust(wspace=0.08, hspace=0.3)
    return axes


def _mark(axis: Axes, same: bool) -> None:
    colour = PALETTE[2] if same else PALETTE[1]
    for spine in axis.spines.values():
        spine.set(visible=True, color=colour, linewidth=2)
    axis.set_xlabel("✓" if same else "✗", color=colour, fontsize=9, labelpad=1)


def reconstruction(original, masked, painted) -> np.ndarray:
    """Rows of originals, what the encoder saw, and what was painted; each [B, 3, H, W] in 0..1.

    Returns:
        Axes [3, B].
    """
    rows = {"original": original, "visible": masked, "painted": painted}
    b = len(original)
    _, axes = plt.subplots(3, b, figsize=(0.9 * b + 0.6, 2.9), squeeze=False)
    for row, (name, images) in zip(axes, rows.items(), strict=True):
        for axis, image in zip(row, images, strict=True):
            _show(axis, image)
        row[0].set_ylabel(name)
    return axes


def embedding(maps: Mapping, labels, classes: Sequence[str]) -> np.ndarray:
    """Side-by-side maps [N, 2], coloured and marked by class, with one legend.

    Returns:
        one Axes a map.
    """
    labels = np.asarray(labels)
    fig, axes = plt.subplots(1, len(maps), figsize=(4.6 * len(maps), 4.6), squeeze=False)
    for axis, (name, xy) in zip(axes[0], maps.items(), strict=True):
        xy = np.asarray(xy)
        for c, toy in enumerate(classes):
            look = _look(c) | {"marker": MARKERS[(c + c // len(PALETTE)) % len(MARKERS)]}
            at = labels == c
            axis.scatter(xy[at, 0], xy[at, 1], s=14, alpha=0.7, label=toy, linewidths=0.3,
                         c=look["color"], marker=look["marker"])  # fmt: skip
        axis.set(title=name, xlabel="first axis", ylabel="second axis", xticks=[], yticks=[])
    handles, names = axes[0, -1].get_legend_handles_labels()
    fig.legend(handles, names, loc="center left", bbox_to_anchor=(0.91, 0.5), fontsize=9)
    return axes[0]


def history(entries: Sequence[dict]) -> np.ndarray:
    """Course of a refinement: loss of each head, and how often neighbors are right.

    Args:
        entries: ``history`` of :func:`refiner.refine`.

    Returns:
        two Axes.
    """
    offset = max((e["step"] for e in entries if e["stage"] == 2), default=0)
    steps = [e["step"] + (offset if e["stage"] == 3 else 0) for e in entries]
    _, axes = plt.subplots(1, 2, figsize=(10, 3.6))
    panels = (("loss", "NNA loss"), ("neighbor_accuracy", "neighbors of the query's class"))
    for axis, (key, label) in zip(axes, panels, strict=True):
        rows = [e[key] for e in entries if e[key] is not None]
        for head, values in enumerate(zip(*rows, strict=True)):
            axis.plot(steps, values, label=f"head {head + 1}", markersize=3, **_look(head))
        if 0 < offset < steps[-1]:
            axis.axvline(offset, color="0.4", linestyle=":")
            axis.annotate("encoder joins", (offset, axis.get_ylim()[1]), fontsize=9, va="top")
        if not rows:
            axis.text(0.5, 0.5, "no labels", transform=axis.transAxes, ha="center")
        axis.set(xlabel="step", ylabel=label, title=label)
    axes[0].legend(fontsize=9)
    return axes


def bars_with_spread(groups: Mapping[str, Sequence[float]], *, ylabel: str, title: str = "",
                     ax: Axes | None = None) -> Axes:  # fmt: skip
    """Means as bars, with every single value as a point on top."""
    ax = ax or plt.subplots(figsize=(1.6 * len(groups) + 1.5, 3.6))[1]
    for i, values in enumerate(groups.values()):
        values = np.asarray(values, dtype=float)
        ax.bar(i, values.mean(), width=0.6, color=PALETTE[i % len(PALETTE)], alpha=0.6)
        ax.scatter(
            np.linspace(i - 0.15, i + 0.15, len(values)), values, s=14, color="black", zorder=3
        )
        ax.annotate(f"{values.mean():.2f}", (i, 0), xytext=(0, 4), textcoords="offset points",
                    ha="center", fontsize=10)  # fmt: skip
    ax.set(xticks=range(len(groups)), xticklabels=list(groups), ylabel=ylabel, title=title)
    ax.set_xlabel("points: single runs or draws")
    return ax
