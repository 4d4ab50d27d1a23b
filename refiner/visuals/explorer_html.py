"""A view of the explorer as HTML and as a figure; pure functions of what was computed."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable
from html import escape

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from refiner.images.decode import resize
from refiner.probing.search import Graph
from refiner.visuals.explorer_state import Colour, Exploration, Near, View
from refiner.visuals.pictures import neighbor_grid
from refiner.visuals.style import RIGHT, WRONG, curve_style, plain, style

# Of a neighbor in the query's class, in another, and without labels: colour, frame, sign.
MARKS = {
    True: (RIGHT, "solid", "✓"),
    False: (WRONG, "dashed", "✗"),
    None: ("#767676", "solid", ""),
}
LARGEST = 64  # pixels of a thumbnail
SHOWN = 36  # images of a group
NUMBERS, CIRCLE = "viridis", "hsv"  # colours of numbers, and of angles and hues


# ---------------------------------------------------------------- pieces


def thumbnail(explored: Exploration, i: int) -> str:
    """An image as a PNG in a data address, at most 64 pixels high; kept once it is made."""
    if i in explored.pictures:
        return explored.pictures[i]
    pixels = torch.as_tensor(explored.images[int(i)])
    if max(pixels.shape[1:]) > LARGEST:
        pixels = resize(pixels[None], LARGEST)[0]
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy()).save(file, "png")
    address = "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
    return explored.pictures.setdefault(i, address)


def palette(n: int) -> list[tuple[float, float, float]]:
    """Colours of n categories; they repeat after twenty."""
    strong_then_pale = [*range(0, 20, 2), *range(1, 20, 2)]
    table = plt.get_cmap("tab20").colors
    return [table[strong_then_pale[i % 20]] for i in range(n)]


def colour_map(colour: Colour) -> str:
    """The name of the colour map of a factor's numbers."""
    return CIRCLE if colour.circle else NUMBERS


def _picture(explored: Exploration, i: int, size: int, *, frame: str = "", note: str = "") -> str:
    label = "" if explored.labels is None else explored.name_of(int(explored.labels[i]))
    words = f"image {i}{', ' + label if label else ''}{', ' + note if note else ''}"
    return (
        f'<figure style="margin:2px;text-align:center;font-size:11px;line-height:1.2">'
        f'<img src="{thumbnail(explored, i)}" alt="{escape(words)}" title="{escape(words)}" '
        f'width="{size}" height="{size}" '
        f'style="image-rendering:pixelated;box-sizing:border-box;{frame}">'
        f"<figcaption>{escape(label or str(i))}</figcaption></figure>"
    )


def _row(pieces: Iterable[str]) -> str:
    inner = "".join(pieces)
    return f'<div style="display:flex;flex-wrap:wrap;align-items:flex-start">{inner}</div>'


def percent(share: float | None) -> str:
    return "–" if share is None or share != share else f"{100 * share:.0f} %"


# ---------------------------------------------------------------- HTML


def caption(explored: Exploration, view: View, side: int) -> str:
    """What stands above a map."""
    shown = view.sides[side]
    about = [] if shown.accuracy is None else [f"k-NN accuracy <b>{percent(shown.accuracy)}</b>"]
    about.append(f"neighbors kept to the last block <b>{percent(shown.kept)}</b>")
    if not explored.complete:
        about.append(f"from {len(explored.sample):,} of {len(explored):,} images")
    return (
        f'<div style="line-height:1.4"><b>{escape(shown.model)}, block {shown.block}</b><br>'
        f"{' · '.join(about)}</div>"
    )


def legend(colour: Colour) -> str:
    """What the colours mean."""
    if colour.names is None:
        cmap = plt.get_cmap(colour_map(colour))
        stops = ",".join(_css(cmap(x)) for x in np.linspace(0, 1, 9))
        low, high = (f"{x:.3g}" for x in colour.limits)
        bar = f"background:linear-gradient(90deg,{stops})"
        size = "display:inline-block;width:140px;height:10px"
        return f'<span>{low} <span style="{size};{bar}"></span> {high}</span>'
    if len(colour.names) < 2:
        return ""
    dot = '<span style="color:{};font-size:15px">●</span> {}'
    pairs = zip(palette(len(colour.names)), colour.names, strict=True)
    return _row(
        f'<span style="margin-right:10px">{dot.format(_css(c), escape(name))}</span>'
        for c, name in list(pairs)[:40]
    )


def _css(rgb) -> str:
    return "#" + "".join(f"{round(255 * x):02x}" for x in rgb[:3])


def near_panel(explored: Exploration, view: View) -> str:
    """The selected image with its neighbors on both sides."""
    if view.near is None:
        return "<i>Click a point, or type an image's position, to see its neighbors.</i>"
    i = view.state.selected
    rows = [
        _near_row(explored, side.model, side.block, near)
        for side, near in zip(view.sides, view.near, strict=True)
    ]
    common = int(view.near[0].shared.sum())
    marks = "★ near on both sides"
    if view.near[0].right is not None:
        marks += "; solid blue frame ✓: same class, dashed orange ✗: another"
    query = _picture(explored, i, 72, frame="border:3px solid #000;")
    words = f"<b>Image {i}</b>, {common} of {explored.k} neighbors in common"
    words += f"<br><small>{marks}</small>"
    return _row([query, f'<div style="margin:8px">{words}</div>']) + "".join(rows)


def _near_row(explored: Exploration, model: str, block: int, near: Near) -> str:
    words = f"<b>{escape(model)}, block {block}</b>"
    if near.right is not None:
        words += f": {int(near.right.sum())} of {len(near.right)} of its class, vote: "
        words += escape(explored.name_of(near.vote))
    rights = [None] * len(near.indices) if near.right is None else near.right.tolist()
    pieces = []
    for j, cosine, shared, right in zip(
        near.indices, near.similarities, near.shared, rights, strict=True
    ):
        colour, line, mark = MARKS[right]
        note = f"cosine {cosine:.2f}" + (", near on both sides" if shared else "")
        picture = _picture(explored, j, 56, frame=f"border:3px {line} {colour};", note=note)
        badge = f"{mark}{'★' if shared else ''}" or "&nbsp;"
        sign = f'<span style="color:{colour};font-size:11px">{badge}</span>'
        pieces.append(f'<div style="text-align:center">{sign}{picture}</div>')
    return f'<div style="margin-top:4px">{words}</div>' + _row(pieces)


def group_panel(explored: Exploration, view: View) -> str:
    """The images chosen by lasso or search."""
    group = view.group
    if group is None:
        return "<i>Lasso points, or search for a class, to see a group.</i>"
    lines = [f"<b>{len(group.indices)} images</b>"]
    if group.counts:
        counts = list(group.counts.items())
        named = ", ".join(f"{escape(explored.name_of(c))} {n}" for c, n in counts[:8])
        lines.append(named + (f" and {len(counts) - 8} more classes" if len(counts) > 8 else ""))
    inside = " → ".join(map(percent, group.inside))
    about = f"neighbors in common left and right: <b>{percent(group.shared)}</b>; "
    about += f"inside the group: {inside}"
    if group.right:
        about += f"; of the own class: {' → '.join(map(percent, group.right))}"
    lines.append(about)
    if len(group.indices) > 1:
        lines.append("<small>those that changed most of their neighbors first</small>")
    pictures = _row(_picture(explored, i, 48) for i in group.moved[:SHOWN])
    rest = len(group.indices) - SHOWN
    return "<br>".join(lines) + pictures + (f"<i>and {rest} more</i>" if rest > 0 else "")


# ---------------------------------------------------------------- figure


def figure(explored: Exploration, view: View) -> Figure:
    """The view as a matplotlib figure: maps, k-NN by block, the selected image's neighbors."""
    with style():
        rows = (4.4, 1.9) if view.near else (4.4,)
        drawn = plt.figure(figsize=(13, sum(rows)), layout="constrained")
        parts = drawn.subfigures(len(rows), 1, squeeze=False, height_ratios=rows)[:, 0]
        left, right, curve = parts[0].subplots(1, 3)
        for panel, side in zip((left, right), view.sides, strict=True):
            _map(panel, side.xy, side.colour)
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


def _map(ax: Axes, xy: np.ndarray, colour: Colour) -> None:
    size = float(np.clip(8000 / len(xy), 2, 30))
    if colour.names is None:
        look = {"cmap": colour_map(colour), "vmin": 0, "vmax": 1}
        ax.scatter(*xy.T, s=size, c=colour.values, linewidths=0, **look)
    else:
        table = np.asarray(palette(len(colour.names)))
        ax.scatter(*xy.T, s=size, c=table[colour.values], linewidths=0, alpha=0.8)
    ax.set(xticks=[], yticks=[], aspect="equal", xlabel="first axis (no unit)")
    ax.set_ylabel("second axis (no unit)")
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
        ax.figure.colorbar(scale, ax=ax, shrink=0.8, label=plain(name))
    elif 1 < len(colour.names) <= 24:
        look, dots = {"linestyle": "", "marker": "o"}, []
        for shade, name in zip(palette(len(colour.names)), colour.names, strict=True):
            dots.append(plt.Line2D([], [], color=shade, label=plain(name), **look))
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
