"""Figures made of pictures: images, neighbors, and tables whose numbers are shown as colours.

Every function draws on new or given axes and returns them; what cannot be drawn is a ValueError.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import named_labels
from refiner.images.sets import ImageSet, pixels_of, shown_channels
from refiner.probing.search import Graph
from refiner.visuals.style import RIGHT, WRONG, array, axes_for, name_of, named, plain

# ---------------------------------------------------------------- images


def contact_sheet(
    images: ImageSet | Tensor,
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    columns: int = 8,
    n: int = 64,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """A grid of images.

    Args:
        images: an ImageSet, uint8 [N, C, H, W], or floats in 0..1.
        labels: int64 [N], written above the images; default an ImageSet's own.
        classes: names to write instead of numbers.
        columns: images a row.
        n: at most so many, the first ones.
    """
    n = min(n, len(images))
    if n == 0:
        raise UserError("there are no images to show")
    labels, classes = _labels_of(images, labels, classes)
    pictures = _pixels(images, slice(n))
    columns = min(columns, n)
    height = 1.0 if labels is None else 1.25  # of a row, with room for the label
    rows, width = -(-n // columns) * height, min(12.0, 1.2 * columns)
    inches = width / columns
    look = {"ha": "center", "va": "bottom", "fontsize": max(6, min(10, 9 * inches))}
    (ax,) = axes_for(ax, 1, (width, rows * inches + 0.4))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        top = row * height + height - 1
        _tile(ax, picture, column, top)
        if labels is not None:
            ax.text(column + 0.5, top, name_of(labels[i], classes), **look)
    _grid(ax, columns, rows, title)
    return ax


def reconstruction(
    images: Tensor, masked: Tensor, predicted: Tensor, *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Originals, what the model saw, and what it painted, one column an image.

    Args:
        images, masked, predicted: [B, C, H, W] each, uint8 or floats in 0..1.
    """
    rows = {"original": images, "masked": masked, "reconstruction": predicted}
    pictures = [_pixels(x) for x in rows.values()]
    columns = len(pictures[0])
    if {len(x) for x in pictures} != {columns}:
        raise UserError("original, masked and predicted images must be equally many")
    (ax,) = axes_for(ax, 1, (min(12.0, 1.2 * columns + 1.2), 3 * min(1.2, 10.8 / columns) + 0.4))
    for row, some in enumerate(pictures):
        for column, picture in enumerate(some):
            _tile(ax, picture, column, row)
    _grid(ax, columns, 3, title, list(rows))
    return ax


def neighbor_grid(
    images: ImageSet | Tensor,
    queries: Sequence[int] | Tensor,
    graphs: Mapping[str, Graph],
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    keys: ImageSet | Tensor | None = None,
    k: int = 6,
    title: str = "Nearest neighbors, nearest first",
    ax: Axes | None = None,
) -> Axes:
    """Some images and their nearest neighbors by one or several models, one row an image.

    Neighbors of the query's class have a solid blue frame and a ✓, others a dashed orange frame
    and a ✗. A model's name comes with the share of right neighbors among those shown.

    Args:
        images: the set whose images were the graphs' queries.
        queries: which of them to show.
        graphs: a graph [N, ≥k] of one block by model name.
        labels: int64 [N]; default an ImageSet's own. Without labels there are no marks.
        classes: names of the classes.
        keys: the set in which the neighbors were searched; default ``images``.
        k: neighbors shown a model.
    """
    where = torch.as_tensor(queries).reshape(-1).cpu()
    labels, classes = _labels_of(images, labels, classes)
    key_labels = labels if keys is None else _labels_of(keys, None, None)[0]
    keys = images if keys is None else keys
    marked = labels is not None and key_labels is not None
    for name, graph in graphs.items():
        if graph.indices.ndim != 2 or len(graph.indices) != len(images) or graph.k < k:
            raise UserError(
                f"the graph {name!r} is {list(graph.indices.shape)}, but [{len(images)}, ≥{k}] is "
                "needed: one block's neighbors of all images"
            )
    gap, rows = 0.4, len(where)
    columns = 1 + len(graphs) * (k + gap)
    scale = min(1.0, 13 / columns)
    (ax,) = axes_for(ax, 1, (columns * scale + 1, rows * scale + 0.6))
    above = {"ha": "center", "va": "bottom", "fontweight": "bold"}
    ax.text(0.5, -0.12, "query", **above)
    for row, picture in enumerate(_pixels(images, where)):
        _tile(ax, picture, 0, row)
    for part, (name, graph) in enumerate(graphs.items()):
        first, name = 1 + gap + part * (k + gap), plain(name)
        found_Bk = graph.indices[where.to(graph.indices.device), :k].cpu()
        if marked:
            right_Bk = np.asarray(key_labels)[found_Bk.numpy()] == labels[where.numpy()][:, None]
            name = f"{name}: {right_Bk.mean():.0%} right"
        ax.text(first + k / 2, -0.12, name, **above)
        for row in range(rows):
            for column, picture in enumerate(_pixels(keys, found_Bk[row])):
                _tile(ax, picture, first + column, row)
                if marked:
                    _mark(ax, first + column, row, bool(right_Bk[row, column]), 11 * scale)
    names = [""] * rows if labels is None else [name_of(y, classes) for y in labels[where.numpy()]]
    _grid(ax, columns, rows, names=names)
    ax.set_title(plain(title), pad=26)
    return ax


def query_maps(
    images: ImageSet | Tensor,
    attention: Tensor,
    *,
    shown: int = 5,
    title: str = "Where the queries look",
    ax: Axes | None = None,
) -> Axes:
    """Where the queries of an attentive probe look: images, lit by attention, one row an image.

    The second column is the mean over all queries. The others are single queries: first the one
    whose map is farthest from that mean, then each the farthest from those before.

    Args:
        images: [N, C, H, W] or an ImageSet of N.
        attention: [N, M, T] of one block (``AttentiveProbe.attention``); the last tokens are a
            grid of patches in the shape of the images.
        shown: single queries.
    """
    pictures = _pixels(images)
    grid = grid_like(pictures.shape[1:3], attention.shape[-1])
    maps_NMT = attention.detach().float().cpu()[..., -math.prod(grid) :]
    if len(maps_NMT) != len(images):
        raise UserError(f"{len(images)} images do not match attention {list(attention.shape)}")
    mean_NT, flat_MX = maps_NMT.mean(1), maps_NMT.transpose(0, 1).flatten(1)
    chosen, far_M = [], (flat_MX - mean_NT.flatten()).norm(dim=1)
    for _ in range(min(shown, maps_NMT.shape[1])):
        chosen.append(int(far_M.argmax()))
        far_M = far_M.minimum((flat_MX - flat_MX[chosen[-1]]).norm(dim=1))
    columns = {"image": torch.ones_like(mean_NT), "mean": mean_NT}
    columns |= {f"q{m + 1}": maps_NMT[:, m] for m in chosen}
    count = len(columns)
    (ax,) = axes_for(ax, 1, (1.2 * count, 1.2 * len(pictures) + 0.6))
    for column, (name, maps_NT) in enumerate(columns.items()):
        ax.text(column + 0.5, -0.08, name, ha="center", va="bottom")
        for row, (picture, light_T) in enumerate(zip(pictures, maps_NT, strict=True)):
            light = light_T.view(1, 1, *grid) / light_T.max()
            light = torch.nn.functional.interpolate(light, picture.shape[:2])[0, 0, :, :, None]
            _tile(ax, picture * (0.1 + 0.9 * light.numpy()), column, row)
    _grid(ax, count, len(pictures))
    ax.set_title(plain(title), pad=20)
    return ax


def grid_like(own: Sequence[int], tokens: int) -> tuple[int, int]:
    """Rows and columns of the last tokens: patches of images of these sides, or of a square."""
    for n in (tokens, tokens - 1):  # a class token may come first
        rows = round((n * own[0] / own[1]) ** 0.5)
        if rows and n % rows == 0 and rows * own[1] == n // rows * own[0]:
            return rows, n // rows
    return math.isqrt(tokens), math.isqrt(tokens)


def _mark(ax: Axes, column: float, row: float, right: bool, size: float) -> None:
    colour, line, sign = (RIGHT, "-", "✓") if right else (WRONG, (0, (3, 1.5)), "✗")
    look = {"fill": False, "edgecolor": colour, "linewidth": 2, "linestyle": line}
    ax.add_patch(Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, **look))
    box = {"facecolor": colour, "edgecolor": "none", "pad": 1}
    look = {"ha": "right", "va": "top", "fontsize": size, "color": "white", "bbox": box}
    ax.text(column + 0.93, row + 0.07, sign, **look)


def _pixels(images: ImageSet | Tensor, index=slice(None)) -> np.ndarray:
    """uint8 or float [B, C, H, W] or an ImageSet as float [B, H, W, 3] in 0..1."""
    x = shown_channels(pixels_of(images)[index], getattr(images, "shown", ImageSet.shown))
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    return x.detach().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _tile(ax: Axes, picture: np.ndarray, column: float, row: float) -> None:
    """Draws a picture into the unit square at a column and row of a grid, with a small gap."""
    extent = (column + 0.03, column + 0.97, row + 0.97, row + 0.03)
    ax.imshow(picture, extent=extent, interpolation="nearest" if len(picture) < 100 else None)


def _grid(
    ax: Axes, columns: float, rows: float, title: str = "", names: Sequence[str] = ()
) -> None:
    """Makes axes a bare grid of unit squares, first row on top, with a name before each row."""
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], title=plain(title))
    ax.set_yticks(np.arange(len(names)) + 0.5, names)
    ax.tick_params(length=0)
    ax.grid(False)
    ax.spines[:].set_visible(False)


def _labels_of(images, labels, classes) -> tuple[np.ndarray | None, Sequence[str] | None]:
    """Labels and class names as given, or else an ImageSet's own."""
    labels = getattr(images, "labels", None) if labels is None else labels
    classes = getattr(images, "classes", None) if classes is None else classes
    if labels is None:
        return None, classes or None
    labels, classes = named_labels(labels, len(labels), classes or ())
    return labels.cpu().numpy(), classes or None


# ---------------------------------------------------------------- tables


def similarity_map(
    similarity: Tensor | np.ndarray,
    *,
    rows: str = "block",
    columns: str = "block",
    title: str = "Linear CKA",
    ax: Axes | None = None,
) -> Axes:
    """How similar blocks are, a square a pair.

    Args:
        similarity: [L1, L2] in 0..1, such as :func:`refiner.linear_cka` gives.
        rows, columns: what L1 and L2 are.
    """
    table = array(similarity)
    if table.ndim != 2:
        raise UserError(f"the similarities must be [L1, L2], not {list(table.shape)}")
    (ax,) = axes_for(ax, 1, (0.3 * table.shape[1] + 1.8, 0.3 * table.shape[0] + 1.2))
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=1)
    for n, set_ticks in zip(table.shape, (ax.set_yticks, ax.set_xticks), strict=True):
        shown = range(0, n, max(1, -(-n // 12)))  # at most 12 numbers a side
        set_ticks(shown, [i + 1 for i in shown])
    ax.grid(False)
    ax.set(xlabel=plain(columns), ylabel=plain(rows), title=plain(title))
    ax.figure.colorbar(image, ax=ax, label="linear CKA")
    return ax


def factor_heatmap(
    scores: Mapping[str, Tensor | np.ndarray],
    factors: Sequence[str],
    *,
    label: str = "how well it can be read, 0 = not, 1 = fully",
    blocks: Sequence[int] | None = None,
    ax=None,
) -> np.ndarray:
    """Which block knows which factor, one panel a model, all on one colour scale from 0 to 1.

    Args:
        scores: by name [L, F]; NaN is left white, with a dash.
        factors: the F factors' names.
        label: what the numbers are, for the colour bar.
        blocks: the blocks' numbers; default 1 to L.
        ax: as many Axes as models; default a new figure.
    """
    tables = named(scores)
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[1] != len(factors):
            raise UserError(
                f"the scores {name!r} must be [L, {len(factors)}], not {list(table.shape)}"
            )
    width = max(3.0, 0.42 * max(len(table) for table in tables.values()))
    axes = axes_for(ax, len(tables), (width * len(tables) + 2.6, 0.34 * len(factors) + 1.4))
    for panel, (name, table) in zip(axes, tables.items(), strict=True):
        image = panel.imshow(table.T, aspect="auto", cmap="cividis", vmin=0, vmax=1)
        for (block, factor), value in np.ndenumerate(table):
            look = {"fontsize": 7, "color": "white" if value < 0.55 else "black"}
            panel.text(block, factor, _short(value), ha="center", va="center", **look)
        numbers = range(1, len(table) + 1) if blocks is None else blocks
        panel.set_xticks(range(len(table)), numbers)
        panel.set_yticks(range(len(factors)), map(plain, factors) if panel is axes[0] else [])
        panel.grid(False)
        panel.set(title=name, xlabel="block")
    axes[0].set_ylabel("factor")
    axes[0].figure.colorbar(image, ax=list(axes), label=plain(label))
    return axes


def _short(value: float) -> str:
    """A share in few letters; a dash for what is not known."""
    if np.isnan(value):
        return "–"
    return f"{value:.2f}".lstrip("0") if value < 1 else "1"
