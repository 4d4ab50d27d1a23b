"""A view of the explorer as a figure, which stays where there is no kernel."""

from __future__ import annotations

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from refiner.probing.search import Graph
from refiner.visuals.explorer_page import colour_map, percent, title_of
from refiner.visuals.explorer_state import Colour, Exploration, View
from refiner.visuals.pictures import neighbor_grid
from refiner.visuals.style import class_styles, curve_style, plain, style


def figure(explored: Exploration, view: View) -> Figure:
    """The view as a matplotlib figure: maps, k-NN by block, the selected image's neighbors."""
    with style():
        rows = (4.4, 1.9) if view.near else (4.4,)
        drawn = plt.figure(figsize=(13, sum(rows)), layout="constrained")
        parts = drawn.subfigures(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        left, right, curve = parts[0].subplots(1, 3)
        for panel, side in zip((left, right), view.sides, strict=True):
            _map(panel, side.xy, side.colour, view.state.layout.upper())
            _chosen(panel, side.xy, view)
            panel.set_title(plain(f"{side.model}, block {side.block}"))
        _names(right, view.sides[1].colour, view.state.colour)
        _curve(curve, explored, view)
        if view.near:
            _near_grid(parts[1], explored, view)
        drawn.set_label(in_words(explored, view))
    return drawn


def in_words(explored: Exploration, view: View) -> str:
    """The figure for those who cannot see it."""
    parts = []
    for side in view.sides:
        about = "" if side.accuracy is None else f", k-NN accuracy {percent(side.accuracy)}"
        parts.append(f"{side.model}, block {side.block}{about}")
    text = f"Two maps of {len(explored):,} images coloured by {view.state.colour}: "
    text += f"{parts[0]}, and {parts[1]}; they share {percent(view.shared)} of the neighbors"
    if view.near:
        counts = [f"{int(near.right.sum())}" for near in view.near if near.right is not None]
        text += (
            f". Below, image {view.state.selected} with its {explored.k} neighbors on both sides"
        )
        text += f", {' and '.join(counts)} of them of its class" if counts else ""
    return text


def _map(ax: Axes, xy: np.ndarray, colour: Colour, layout: str) -> None:
    size = float(np.clip(8000 / len(xy), 2, 30))
    if colour.names is None:
        look = {"cmap": colour_map(colour), "vmin": 0, "vmax": 1}
        ax.scatter(*xy.T, s=size, c=colour.values, linewidths=0, **look)
    else:
        for code, (shade, marker) in enumerate(class_styles(len(colour.names))):
            some = xy[colour.values == code]
            ax.scatter(*some.T, s=size, color=shade, marker=marker, linewidths=0, alpha=0.8)
    ax.set(xticks=[], yticks=[], aspect="equal", xlabel=f"{layout} 1 (axes have no meaning)")
    ax.set_ylabel(f"{layout} 2")
    ax.grid(False)


def _chosen(ax: Axes, xy: np.ndarray, view: View) -> None:
    group, selected = view.group, view.state.selected
    if group is not None:
        ring = {"facecolors": "none", "edgecolors": "black", "linewidths": 0.7}
        ax.scatter(*xy[group.indices].T, s=40, **ring)
    if selected is not None:
        ax.scatter(*xy[selected], s=160, marker="*", color="black", edgecolors="white", zorder=3)


def _names(ax: Axes, colour: Colour, name: str) -> None:
    if colour.names is None:
        cmap = plt.get_cmap(colour_map(colour))
        scale = plt.cm.ScalarMappable(plt.Normalize(*colour.limits), cmap)
        ax.figure.colorbar(scale, ax=ax, shrink=0.8, label=plain(title_of(name)))
    elif 1 < len(colour.names) <= 24:
        dots = []
        looks = class_styles(len(colour.names))
        for (shade, marker), name in zip(looks, colour.names, strict=True):
            look = {"linestyle": "", "marker": marker, "color": shade}
            dots.append(plt.Line2D([], [], label=plain(name), **look))
        beside = {"loc": "center left", "bbox_to_anchor": (1, 0.5), "fontsize": 8}
        ax.legend(handles=dots, **beside, labelspacing=0.3, handletextpad=0.1)


def _curve(ax: Axes, explored: Exploration, view: View) -> None:
    labelled = explored.labels is not None
    shown = dict.fromkeys(side.model for side in view.sides)
    for i, name in enumerate(shown):
        table = explored.tables[name]
        values = table.accuracy if labelled else table.kept
        ax.plot(table.blocks, 100 * values, label=plain(name), markersize=5, **curve_style(i))
    for block in {side.block for side in view.sides}:
        ax.axvline(block, color="0.6", linewidth=1, linestyle=":")
    ax.set_ylabel(f"k-NN accuracy (%), k = {explored.k}" if labelled else "neighbors kept (%)")
    title = f"left and right share {percent(view.shared)} of their neighbors"
    ax.set(xlabel="block", title=title)
    ax.legend()


def _near_grid(panel, explored: Exploration, view: View) -> None:
    i = view.state.selected
    near = [i, *np.concatenate([x.indices for x in view.near])]
    pixels = torch.stack([torch.as_tensor(explored.images[int(j)]) for j in near])
    k = len(view.near[0].indices)
    labels = None if explored.labels is None else torch.from_numpy(explored.labels[near])
    names = [f"{s.model}, block {s.block}" for s in view.sides]
    if names[0] == names[1]:
        names[1] += " "
    graphs = {}
    for part, name in enumerate(names):
        indices = torch.arange(1 + part * k, 1 + part * k + k).expand(len(near), k)
        graphs[name] = Graph(indices, torch.zeros(indices.shape))
    how = {"k": k, "title": f"Image {i} and its nearest neighbors", "ax": panel.subplots()}
    neighbor_grid(pixels, [0], graphs, labels, explored.classes or None, **how)
