"""The course's figures. Every function draws one, on new or given axes, and returns its Axes.

Nothing is told by colour alone: curves differ in marker and line as well, classes in marker, right
and wrong neighbors in a mark. The colours are those of Okabe and Ito (2008), which readers with
any common colour vision can tell apart. Call :func:`style` once for readable sizes.

Shape legend: N images, B images shown, H height, W width, L blocks, F factors, S seeds.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.files import replacing
from refiner.base.pages import figure_html
from refiner.images.sets import ImageSet
from refiner.probing.search import Graph
from refiner.visuals import plots
from refiner.visuals.alt_text import accompany_figures, describe

# ---------------------------------------------------------------- the page


def save_figures(out: Path, draw: Callable[[], Iterable[tuple[str, str, plt.Figure]]]) -> list[str]:
    """Writes ``figures/*.png`` in the course's look.

    Args:
        out: the report's folder.
        draw: makes file names, captions and figures.

    Returns:
        Each as an HTML figure with the picture inside and its description as alt text.
    """
    shown = []
    with plots.style():
        for name, caption, figure in draw():
            path = out / "figures" / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            picture = base64.b64encode(path.read_bytes()).decode()
            shown.append(figure_html(picture, caption, describe(figure)))
            plt.close(figure)
    return shown


COLOURS = (
    "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933",
)  # fmt: skip
MARKERS = (*"os^DvPX*<>ph8dH", (4, 1, 0))  # the last: a star of four points
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
RIGHT, WRONG = COLOURS[0], COLOURS[1]
GRAY = "0.4"
STYLE = {
    "font.size": 11,
    "axes.titlesize": 12,
    "axes.labelsize": 11,
    "legend.fontsize": 10,
    "xtick.labelsize": 10,
    "ytick.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "figure.dpi": 100,
    "figure.facecolor": "white",  # solid: the same on a dark page
    "savefig.facecolor": "white",
    "axes.prop_cycle": plt.cycler(color=COLOURS),
}


def style() -> ExitStack:
    """Sets the course's look for all figures that follow, and their alt text in a notebook.

    Returns:
        A context manager that puts the old look back: ``with style(): ...``. Ignore it to keep
        the look for the session.
    """
    restore = ExitStack()
    restore.callback(plt.rcParams.update, {key: plt.rcParams[key] for key in STYLE})
    plt.rcParams.update(STYLE)
    accompany_figures()
    return restore


# ---------------------------------------------------------------- shared pieces


def _axes(ax, columns: int, size: tuple[float, float]) -> np.ndarray:
    """Axes [columns]: the given ones, or those of a new figure of a size in inches."""
    if ax is None:
        _, ax = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != columns:
        raise UserError(f"this figure needs {columns} axes, not {len(axes)}")
    return axes


def _pixels(images: ImageSet | Tensor, index=slice(None)) -> np.ndarray:
    """uint8 or float [B, 3, H, W] or an ImageSet as float [B, H, W, 3] in 0..1."""
    x = images.batch(index) if isinstance(images, ImageSet) else torch.as_tensor(images)[index]
    if x.ndim != 4 or x.shape[1] != 3:
        raise UserError(f"images must be [B, 3, H, W], not {list(x.shape)}")
    x = x / 255 if x.dtype == torch.uint8 else x.float()
    return x.detach().clamp(0, 1).permute(0, 2, 3, 1).cpu().numpy()


def _tile(ax: Axes, picture: np.ndarray, column: float, row: float) -> None:
    """Draws a picture into the unit square at a column and row of a grid, with a small gap."""
    extent = (column + 0.03, column + 0.97, row + 0.97, row + 0.03)
    ax.imshow(picture, extent=extent, interpolation="nearest" if len(picture) < 100 else None)


def _grid(ax: Axes, columns: float, rows: float) -> None:
    """Makes axes a bare grid of unit squares, first row on top."""
    ax.set(xlim=(0, columns), ylim=(rows, 0), aspect="equal", xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)


def place_legend(ax: Axes) -> None:
    """A legend inside if it hides no line there, else below: "best" may lie on a line."""
    legend = ax.legend()
    ax.figure.draw_without_rendering()
    box = legend.get_window_extent()
    drawn = [line.get_transform().transform_path(line.get_path()) for line in ax.get_lines()]
    if any(path.intersects_bbox(box, filled=False) for path in drawn):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))


def curve_style(i: int) -> dict:
    """Colour, marker and line of the i-th curve."""
    return {
        "color": COLOURS[i % len(COLOURS)],
        "marker": MARKERS[i % len(MARKERS)],
        "linestyle": LINES[i % len(LINES)],
    }


def _array(x) -> np.ndarray:
    x = x.detach().cpu() if isinstance(x, Tensor) else x
    return np.asarray(x, dtype=np.float64)


def _labels_of(images, labels, classes) -> tuple[np.ndarray | None, Sequence[str] | None]:
    """Labels and class names as given, or else an ImageSet's own."""
    labels = getattr(images, "labels", None) if labels is None else labels
    classes = getattr(images, "classes", None) if classes is None else classes
    labels = None if labels is None else torch.as_tensor(labels).cpu().numpy()
    return labels, classes or None


def _name(label: int, classes: Sequence[str] | None) -> str:
    return classes[label] if classes else str(label)


# ---------------------------------------------------------------- images


def contact_sheet(
    images: ImageSet | Tensor,
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    columns: int = 8,
    n: int = 64,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A grid of images.

    Args:
        images: an ImageSet, uint8 [N, 3, H, W], or floats in 0..1.
        labels: int64 [N], written above the images; default an ImageSet's own.
        classes: names to write instead of numbers.
        columns: images a row.
        n: at most so many, the first ones.

    Returns:
        The Axes.

    Raises:
        ValueError: without images.
    """
    n = min(n, len(images))
    if n == 0:
        raise UserError("there are no images to show")
    labels, classes = _labels_of(images, labels, classes)
    pictures = _pixels(images, slice(n))
    columns = min(columns, n)
    rows = -(-n // columns)
    height = 1.0 if labels is None else 1.25  # of a row, with room for the label
    width = min(12.0, 1.2 * columns)
    inches = width / columns
    (ax,) = _axes(ax, 1, (width, rows * height * inches + 0.4))
    for i, picture in enumerate(pictures):
        row, column = divmod(i, columns)
        _tile(ax, picture, column, row * height + height - 1)
        if labels is not None:
            ax.text(
                column + 0.5, row * height + height - 1, _name(labels[i], classes), ha="center",
                va="bottom", fontsize=max(6, min(10, 9 * inches)),
            )  # fmt: skip
    _grid(ax, columns, rows * height)
    if title:
        ax.set_title(title)
    return ax


def reconstruction(
    images: Tensor, masked: Tensor, predicted: Tensor, *, title: str | None = None,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """Originals, what the model saw, and what it painted, one column an image.

    Args:
        images, masked, predicted: [B, 3, H, W] each, uint8 or floats in 0..1.

    Returns:
        The Axes.
    """
    rows = {"original": images, "masked": masked, "reconstruction": predicted}
    pictures = {name: _pixels(x) for name, x in rows.items()}
    columns = len(pictures["original"])
    if {len(x) for x in pictures.values()} != {columns}:
        raise UserError("original, masked and predicted images must be equally many")
    (ax,) = _axes(ax, 1, (min(12.0, 1.2 * columns + 1.2), 3 * min(1.2, 10.8 / columns) + 0.4))
    for row, some in enumerate(pictures.values()):
        for column, picture in enumerate(some):
            _tile(ax, picture, column, row)
    _grid(ax, columns, 3)
    ax.set_yticks([0.5, 1.5, 2.5], list(rows))
    ax.tick_params(length=0)
    if title:
        ax.set_title(title)
    return ax


def neighbor_grid(
    images: ImageSet | Tensor,
    queries: Sequence[int] | Tensor,
    graphs: Mapping[str, Graph],
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    keys: ImageSet | Tensor | None = None,
    key_labels: Tensor | None = None,
    k: int = 6,
    title: str | None = None,
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
        key_labels: the keys' labels; default the key set's own, or ``labels`` without ``keys``.
        k: neighbors shown a model.

    Returns:
        The Axes.

    Raises:
        ValueError: for a graph of several blocks, of other queries or with fewer than k neighbors.
    """
    where = torch.as_tensor(queries).reshape(-1).cpu()
    labels, classes = _labels_of(images, labels, classes)
    if key_labels is None:
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
    (ax,) = _axes(ax, 1, (columns * scale + 1, rows * scale + 0.6))
    for row, picture in enumerate(_pixels(images, where)):
        _tile(ax, picture, 0, row)
    ax.text(0.5, -0.12, "query", ha="center", va="bottom", fontweight="bold")
    for part, (name, graph) in enumerate(graphs.items()):
        first = 1 + gap + part * (k + gap)
        found = graph.indices[where.to(graph.indices.device), :k].cpu()
        right = None
        if marked:
            right = np.asarray(key_labels)[found.numpy()] == labels[where.numpy()][:, None]
            name = f"{name}: {right.mean():.0%} right"
        ax.text(first + k / 2, -0.12, name, ha="center", va="bottom", fontweight="bold")
        for row in range(rows):
            for column, picture in enumerate(_pixels(keys, found[row])):
                _tile(ax, picture, first + column, row)
                if marked:
                    _mark(ax, first + column, row, bool(right[row, column]), 11 * scale)
    _grid(ax, columns, rows)
    names = [""] * rows if labels is None else [_name(y, classes) for y in labels[where.numpy()]]
    ax.set_yticks(np.arange(rows) + 0.5, names)
    ax.tick_params(length=0)
    ax.set_title(title or "Nearest neighbors, nearest first", pad=26)
    return ax


def _mark(ax: Axes, column: float, row: float, right: bool, size: float) -> None:
    colour = RIGHT if right else WRONG
    ax.add_patch(
        Rectangle((column + 0.03, row + 0.03), 0.94, 0.94, fill=False, edgecolor=colour,
                  linewidth=2, linestyle="-" if right else (0, (3, 1.5)))
    )  # fmt: skip
    ax.text(
        column + 0.93, row + 0.07, "✓" if right else "✗", ha="right", va="top", fontsize=size,
        color="white", bbox={"facecolor": colour, "edgecolor": "none", "pad": 1},
    )  # fmt: skip


# ---------------------------------------------------------------- curves and bars


def block_curve(
    curves: Mapping[str, object],
    *,
    ylabel: str = "accuracy",
    chance: float | None = None,
    best: bool = True,
    blocks: Sequence[int] | None = None,
    percent: bool | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """A quality of every block, one curve a model.

    Args:
        curves: by name values [L], or a pair (mean [L], spread [L]) drawn with a band of ± spread.
        ylabel: what the values are.
        chance: drawn as a dotted line.
        best: ring the best (highest) block of each curve, and name it in the legend.
        blocks: the blocks' numbers; default 1 to L.
        percent: the values are shares and shown in percent; default if all lie in 0..1.

    Returns:
        The Axes.
    """
    values = {}
    for name, curve in curves.items():
        mean, spread = curve if isinstance(curve, tuple) else (curve, None)
        values[name] = (_array(mean), None if spread is None else _array(spread))
    means = [mean for mean, _ in values.values()]
    if percent is None:
        percent = all(0 <= m.min() and m.max() <= 1 for m in means)
    (ax,) = _axes(ax, 1, (6.8, 4.0))
    for i, (name, (mean, spread)) in enumerate(values.items()):
        at = np.arange(1, len(mean) + 1) if blocks is None else np.asarray(blocks)
        top = int(mean.argmax())
        if best:
            shown = f"{mean[top]:.1%}" if percent else f"{mean[top]:.3g}"
            name = f"{name} (best: block {at[top]}, {shown})"
            ax.plot(at[top], mean[top], "o", markersize=15, fillstyle="none",
                    color=COLOURS[i % len(COLOURS)])  # fmt: skip
        ax.plot(at, mean, label=name, markersize=6, **curve_style(i))
        if spread is not None:
            ax.fill_between(at, mean - spread, mean + spread, alpha=0.2, linewidth=0,
                            color=COLOURS[i % len(COLOURS)])  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=GRAY, linestyle=":", label="chance")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set(xlabel="block", ylabel=ylabel, title=title or f"{_capital(ylabel)} of every block")
    place_legend(ax)
    return ax


def error_and_knn(
    error: Tensor | np.ndarray | Mapping[str, object],
    knn: Tensor | np.ndarray | Mapping[str, object],
    *,
    blocks: Sequence[int] | None = None,
    error_label: str = "reconstruction error",
    knn_label: str = "k-NN accuracy",
    title: str = "Does a block paint, or does it see?",
    ax: Axes | None = None,
) -> Axes:
    """Reconstruction error (left axis) and k-NN accuracy (right axis) of every block.

    MIM-Refiner's argument (Alkin et al. 2024, arXiv 2402.10093): where the error falls while the
    accuracy falls too, blocks have taken over the decoder's work. The ring marks each curve's
    best block: the lowest error, the highest accuracy.

    Args:
        error: [L], or several by name.
        knn: [L], or several by name.
        blocks: the blocks' numbers; default 1 to L.
        error_label, knn_label: what they are.
        title: of the figure.

    Returns:
        The Axes of the errors; those of the accuracies are its ``.figure.axes[-1]``.

    Raises:
        ValueError: for curves of different lengths.
    """
    sides = [x if isinstance(x, Mapping) else {"": x} for x in (error, knn)]
    sides = [{name: _array(x) for name, x in side.items()} for side in sides]
    lengths = {len(x) for side in sides for x in side.values()}
    if len(lengths) != 1:
        raise UserError(f"errors and accuracies must have as many blocks, not {sorted(lengths)}")
    at = np.arange(1, lengths.pop() + 1) if blocks is None else np.asarray(blocks)
    (ax,) = _axes(ax, 1, (6.8, 4.0))
    twin = ax.twinx()
    drawn = []
    for panel, side, label, best, colour in (
        (ax, sides[0], error_label, np.argmin, COLOURS[1]),
        (twin, sides[1], knn_label, np.argmax, COLOURS[0]),
    ):
        for i, (name, values) in enumerate(side.items()):
            look = curve_style(i) | {"color": colour, "marker": MARKERS[2 * i + (panel is twin)]}
            drawn += panel.plot(at, values, label=f"{label} {name}".strip(), markersize=6, **look)
            top = int(best(values))
            panel.plot(at[top], values[top], "o", markersize=15, fillstyle="none", color=colour)
        panel.set_ylabel(label, color=colour)
    if all(x.max() <= 1 for x in sides[1].values()):
        twin.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    twin.spines["right"].set_visible(True)
    twin.grid(False)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    ax.set(xlabel="block", title=title)
    ax.legend(handles=drawn, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=2)
    return ax


def similarity_map(
    similarity: Tensor | np.ndarray,
    *,
    rows: str = "block",
    columns: str = "block",
    label: str = "linear CKA",
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """How similar blocks are, a square a pair.

    Args:
        similarity: [L1, L2] in 0..1, such as :func:`refiner.linear_cka` gives.
        rows, columns: what L1 and L2 are.
        label: what the numbers are, for the colour bar.
        title: default the label.

    Returns:
        The Axes.

    Raises:
        ValueError: for anything but a matrix.
    """
    table = _array(similarity)
    if table.ndim != 2:
        raise UserError(f"the similarities must be [L1, L2], not {list(table.shape)}")
    (ax,) = _axes(ax, 1, (0.3 * table.shape[1] + 1.8, 0.3 * table.shape[0] + 1.2))
    image = ax.imshow(table, cmap="cividis", vmin=0, vmax=1)
    every = [max(1, -(-n // 12)) for n in table.shape]  # at most 12 numbers a side
    numbers = [range(0, n, step) for n, step in zip(table.shape, every, strict=True)]
    ax.set_yticks(numbers[0], [i + 1 for i in numbers[0]])
    ax.set_xticks(numbers[1], [i + 1 for i in numbers[1]])
    ax.grid(False)
    ax.set(xlabel=columns, ylabel=rows, title=title or _capital(label))
    ax.figure.colorbar(image, ax=ax, label=label)
    return ax


def _capital(text: str) -> str:
    return text if text.startswith("k-NN") else text[:1].upper() + text[1:]


def history(
    history: Sequence[Mapping], *, heads: Sequence[str] | None = None, ax=None
) -> np.ndarray:
    """Training curves of a refinement or a pretraining.

    Args:
        history: the run's ``history``: one dict a logged step with "step" and "loss" (a number, or
            a list with one a head), and maybe "stage", "neighbor_accuracy" (a list, or None) and
            numbers from an evaluation. Steps count anew in each stage.
        heads: the heads' names; default "head 1" and so on.
        ax: as many Axes as there are panels; default a new figure.

    Returns:
        Axes [P]: the loss, then neighbor accuracy and the evaluation's numbers where there are any.

    Raises:
        ValueError: for an empty history.
    """
    if not history:
        raise UserError("the history is empty")
    steps, borders = _total_steps(history)
    known = {"stage", "step", "loss", "similarity", "neighbor_accuracy", "lr", "seconds"}
    extra = sorted({
        key for entry in history for key, value in entry.items()
        if key not in known and isinstance(value, int | float)
    })  # fmt: skip
    with_neighbors = any(entry.get("neighbor_accuracy") for entry in history)
    axes = _axes(ax, 1 + with_neighbors + bool(extra), (
        5.0 * (1 + with_neighbors + bool(extra)), 3.6))  # fmt: skip
    panels = iter(axes)
    loss = next(panels)
    _per_head(loss, steps, history, "loss", heads)
    loss.set(ylabel="loss", title="Loss")
    if with_neighbors:
        panel = next(panels)
        _per_head(panel, steps, history, "neighbor_accuracy", heads)
        panel.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        panel.set(ylabel="neighbors of the query's class", title="Are the neighbors right?")
    if extra:
        panel = next(panels)
        for i, key in enumerate(extra):
            points = [(s, e[key]) for s, e in zip(steps, history, strict=True) if key in e]
            panel.plot(*zip(*points, strict=True), label=key, **curve_style(i))
        panel.set(ylabel="value", title="Evaluation on the way")
        panel.legend()
    for panel in axes:
        panel.set_xlabel("step")
        for at, stage in borders:
            panel.axvline(at, color=GRAY, linestyle=":")
            panel.annotate(f"stage {stage}", (at, 0.98), xycoords=("data", "axes fraction"),
                           xytext=(3, 0), textcoords="offset points", va="top", fontsize=9,
                           color=GRAY)  # fmt: skip
    return axes


def _total_steps(history: Sequence[Mapping]) -> tuple[list[int], list[tuple[int, int]]]:
    """Steps counted through all stages, and where each later stage begins."""
    steps, borders, offset, before = [], [], 0, None
    for entry in history:
        stage = entry.get("stage")
        if before is not None and stage != before:
            offset = steps[-1]
            borders.append((offset, stage))
        before = stage
        steps.append(offset + entry["step"])
    return steps, borders


def _per_head(ax: Axes, steps, history, key: str, heads: Sequence[str] | None) -> None:
    points = [(s, e[key]) for s, e in zip(steps, history, strict=True) if e.get(key) is not None]
    at, values = zip(*points, strict=True)
    if not isinstance(values[0], list | tuple):
        ax.plot(at, values, **curve_style(0), markevery=max(1, len(at) // 10), markersize=5)
        return
    names = heads or [f"head {i + 1}" for i in range(len(values[0]))]
    for i, (name, curve) in enumerate(zip(names, zip(*values, strict=True), strict=True)):
        # Markers at every tenth point, each curve's a little later, so that they do not hide.
        every = max(1, len(at) // 8)
        ax.plot(at, curve, label=name, markersize=5, markevery=(i % every, every), **curve_style(i))
    ax.legend(ncols=1 + (len(names) > 5), fontsize=9)


def bars_with_spread(
    values: Mapping[str, object],
    *,
    ylabel: str = "accuracy",
    chance: float | None = None,
    percent: bool | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Means as bars with every single run as a point.

    Args:
        values: by name the results [S] of several seeds or draws.
        ylabel: what they are.
        chance: drawn as a dotted line.
        percent: the values are shares and shown in percent; default if all lie in 0..1.

    Returns:
        The Axes.
    """
    runs = {name: np.atleast_1d(_array(x)) for name, x in values.items()}
    if percent is None:
        percent = all(0 <= x.min() and x.max() <= 1 for x in runs.values())
    (ax,) = _axes(ax, 1, (max(4.0, 1.4 * len(runs) + 1.5), 3.8))
    for i, x in enumerate(runs.values()):
        ax.bar(i, x.mean(), 0.65, color=COLOURS[i % len(COLOURS)], alpha=0.55)
        across = np.linspace(-0.18, 0.18, len(x)) if len(x) > 1 else np.zeros(1)
        ax.plot(i + across, x, **curve_style(i) | {"linestyle": ""}, markeredgecolor="black",
                markeredgewidth=0.6, markersize=5)  # fmt: skip
        text = f"{x.mean():.1%}" if percent else f"{x.mean():.3g}"
        ax.annotate(text, (i, max(x.max(), x.mean(), 0)), xytext=(0, 7), ha="center",
                    textcoords="offset points")  # fmt: skip
    if chance is not None:
        ax.axhline(chance, color=GRAY, linestyle=":", label="chance")
        ax.legend()
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.margins(y=0.12)
    ax.set_xticks(range(len(runs)), list(runs))
    ax.grid(False, axis="x")
    most = max(len(x) for x in runs.values())
    ax.set(xlabel=f"bars: means; points: up to {most} single runs" if most > 1 else "model",
           ylabel=ylabel, title=title or _capital(ylabel))  # fmt: skip
    return ax


def spider(
    values: Mapping[str, object], names: Sequence[str], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Several qualities at once, a spoke each, from 0 % in the middle to 100 % at the rim.

    Spokes of different protocols share a scale but no meaning: only the two outlines on one spoke
    can be compared, never one spoke with the next or the enclosed areas.

    Args:
        values: by name shares [Q] from 0 to 1.
        names: the Q spokes'; at least three.
        title: of the figure.
        ax: polar Axes; default a new figure.

    Returns:
        The Axes.

    Raises:
        ValueError: for fewer than three spokes or other numbers of values.
    """
    outlines = {name: _array(x) for name, x in values.items()}
    if len(names) < 3 or any(x.shape != (len(names),) for x in outlines.values()):
        raise UserError(f"a spider plot needs three or more spokes and a value for each of {names}")
    if ax is None:
        figure = plt.figure(figsize=(6.4, 5.6), layout="constrained")
        ax = figure.add_subplot(projection="polar")
    around = np.linspace(0, 2 * np.pi, len(names), endpoint=False)
    for i, (name, x) in enumerate(outlines.items()):
        closed = np.append(around, around[0]), np.append(x, x[0])
        ax.plot(*closed, label=name, markersize=6, **curve_style(i))
        ax.fill(*closed, color=COLOURS[i % len(COLOURS)], alpha=0.08)
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.set_xticks(around, names)
    for angle, label in zip(around, ax.get_xticklabels(), strict=True):
        side = np.sin(angle)
        label.set_horizontalalignment(
            "center" if abs(side) < 0.1 else "left" if side > 0 else "right"
        )
    ax.set(ylim=(0, 1), title=title)
    ax.set_yticks([0.25, 0.5, 0.75, 1.0])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_rlabel_position(180 / len(names))
    ax.set_ylabel("0 % in the middle, 100 % at the rim")
    ax.yaxis.label.set_visible(False)  # the circles say it; the words are for the description
    told = [
        ", ".join(f"{n} {v:.0%}" for n, v in zip(names, x, strict=True)) for x in outlines.values()
    ]
    ax.figure.set_label(". ".join(f"{n}: {t}" for n, t in zip(outlines, told, strict=True)))
    ax.spines[:].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22), ncols=len(outlines))
    return ax


def differences(
    names: Sequence[str],
    values: object,
    spreads: object,
    *,
    xlabel: str = "after − before, points",
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What changed, a line each, with bars of two spreads either side of it.

    Args:
        names: Q of them, drawn from the top.
        values, spreads: shares [Q], shown as percentage points.
        xlabel: what the values are.
        title: of the figure.

    Returns:
        The Axes. Filled circles are more than two spreads away from 0, open ones are not.
    """
    values, spreads = 100 * _array(values), 100 * _array(spreads)
    (ax,) = _axes(ax, 1, (8.0, 0.25 * len(names) + 1.1))
    at = np.arange(len(names))
    clear = np.abs(values) > 2 * spreads
    for group, look in ((clear, {"marker": "o"}), (~clear, {"marker": "o", "fillstyle": "none"})):
        if group.any():
            ax.errorbar(values[group], at[group], xerr=2 * spreads[group], linestyle="",
                        color=COLOURS[0], elinewidth=1.3, markersize=6, **look)  # fmt: skip
    ax.axvline(0, color=GRAY, linewidth=1)
    ax.set_yticks(at, names, fontsize=9)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel=xlabel, title=title)
    return ax


# ---------------------------------------------------------------- maps


def embedding(
    maps: Mapping[str, Tensor | np.ndarray],
    labels: Tensor | None = None,
    classes: Sequence[str] | None = None,
    *,
    ax=None,
) -> np.ndarray:
    """Images as points in the plane, one panel a map; classes differ in colour and marker.

    Args:
        maps: by name coordinates [N, 2].
        labels: int64 [N]; None draws all points alike.
        classes: names for the legend. More than 24 classes have no legend; their names are
            written at the median of their points.
        ax: as many Axes as maps; default a new figure.

    Returns:
        Axes, one a map.

    Raises:
        ValueError: for coordinates or labels that do not match.
    """
    points = {name: _array(xy) for name, xy in maps.items()}
    labels = None if labels is None else torch.as_tensor(labels).cpu().numpy()
    for name, xy in points.items():
        if xy.ndim != 2 or xy.shape[1] != 2 or (labels is not None and len(labels) != len(xy)):
            n = "N" if labels is None else len(labels)
            raise UserError(f"the map {name!r} must be [{n}, 2], not {list(xy.shape)}")
    present = [] if labels is None else np.unique(labels).tolist()
    legend = 0 < len(present) <= 24
    axes = _axes(ax, len(points), (4.4 * len(points) + 1.6 * legend, 4.4))
    size = float(np.clip(12000 / len(next(iter(points.values()))), 8, 36))
    for panel, (name, xy) in zip(axes, points.items(), strict=True):
        if not present:
            panel.scatter(*xy.T, s=size, color=COLOURS[0], linewidths=0)
        for label in present:
            own = xy[labels == label]
            # The marker goes round after 16 classes, the colour after 8: shifted, no pair repeats.
            colour = COLOURS[(label + label // len(MARKERS)) % len(COLOURS)]
            panel.scatter(*own.T, s=size, color=colour, marker=MARKERS[label % len(MARKERS)],
                          alpha=0.8, linewidths=0, label=_name(label, classes))  # fmt: skip
            if not legend:
                panel.text(*np.median(own, axis=0), _name(label, classes), fontsize=7,
                           ha="center")  # fmt: skip
        panel.set(title=name, xlabel="first axis (no unit)", xticks=[], yticks=[])
    axes[0].set_ylabel("second axis (no unit)")
    if legend:
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9, markerscale=1.5)
    return axes


def factor_heatmap(
    scores: Mapping[str, Tensor | np.ndarray],
    factors: Sequence[str],
    *,
    label: str = "how well it can be read, 0 = not, 1 = fully",
    limits: tuple[float, float] = (0.0, 1.0),
    blocks: Sequence[int] | None = None,
    ax=None,
) -> np.ndarray:
    """Which block knows which factor, one panel a model, all on one colour scale.

    Args:
        scores: by name [L, F]; NaN is left white, with a dash.
        factors: the F factors' names.
        label: what the numbers are, for the colour bar.
        limits: values at the ends of the colour scale.
        blocks: the blocks' numbers; default 1 to L.
        ax: as many Axes as models; default a new figure.

    Returns:
        Axes, one a model.

    Raises:
        ValueError: for scores that are not [L, F].
    """
    tables = {name: _array(x) for name, x in scores.items()}
    for name, table in tables.items():
        if table.ndim != 2 or table.shape[1] != len(factors):
            raise UserError(
                f"the scores {name!r} must be [L, {len(factors)}], not {list(table.shape)}"
            )
    depth = max(len(table) for table in tables.values())
    width = max(3.0, 0.42 * depth)
    axes = _axes(ax, len(tables), (width * len(tables) + 2.6, 0.34 * len(factors) + 1.4))
    low, high = limits
    for panel, (name, table) in zip(axes, tables.items(), strict=True):
        image = panel.imshow(table.T, aspect="auto", cmap="cividis", vmin=low, vmax=high)
        for (block, factor), value in np.ndenumerate(table):
            dark = value < low + 0.55 * (high - low)
            panel.text(block, factor, _short(value), fontsize=7, ha="center", va="center",
                       color="white" if dark else "black")  # fmt: skip
        numbers = range(1, len(table) + 1) if blocks is None else blocks
        panel.set_xticks(range(len(table)), numbers)
        panel.set_yticks(range(len(factors)), factors if panel is axes[0] else [])
        panel.grid(False)
        panel.set(title=name, xlabel="block")
    axes[0].set_ylabel("factor")
    axes[0].figure.colorbar(image, ax=list(axes), label=label)
    return axes


def _short(value: float) -> str:
    """A share in few letters; a dash for what is not known."""
    if np.isnan(value):
        return "–"
    return f"{value:.2f}".lstrip("0") if value < 1 else "1"


# ---------------------------------------------------------------- the method


def schematic(
    depth: int = 12, heads: Sequence[int] = (9, 10, 11, 12), frozen: int = 6, *,
    ax: Axes | None = None,
) -> Axes:  # fmt: skip
    """MIM-Refiner in one picture: views, encoder, heads, queue and Nearest Neighbor Alignment.

    Args:
        depth: blocks of the encoder.
        heads: numbers, from 1, of the blocks that carry a head.
        frozen: how many first blocks stay as they were.

    Returns:
        The Axes, in units of its own without ticks.

    Raises:
        ValueError: for a head on a block that does not exist.
    """
    if not heads or not all(1 <= block <= depth for block in heads):
        raise UserError(f"heads sit on blocks 1 to {depth}, not {list(heads)}")
    (ax,) = _axes(ax, 1, (10.0, 4.6))
    left, width = 18.0, 44.0 / depth
    for block in range(1, depth + 1):
        x = left + (block - 1) * width
        still = block <= frozen
        _box(ax, x + 0.2, 8, width - 0.4, 14, str(block), COLOURS[5] if not still else "0.88",
             hatch="//" if still else None)  # fmt: skip
        if block in heads:
            _box(ax, x + 0.3, 28, width - 0.6, 6, "head", COLOURS[4], size=7)
            _arrow(ax, (x + width / 2, 22.2), (x + width / 2, 27.8))
    for y, name, colour in ((17, "view A", COLOURS[0]), (10, "view B", COLOURS[1])):
        _box(ax, 1, y - 2, 11, 6, name, colour, text="white")
        _arrow(ax, (12.4, y + 1), (left - 0.3, y + 1))
    rest = left + frozen * width
    if frozen:
        ax.text((left + rest) / 2, 5.5, "stay as they were", ha="center", va="center", fontsize=9)
    ax.text((rest + left + 44) / 2, 5.5, "refined", ha="center", va="center", fontsize=9)
    ax.text(40, 2, f"encoder: {depth} transformer blocks", ha="center", fontsize=11)
    ax.text(left, 31, "instance-discrimination heads:\nprojector → z, predictor → p", va="center",
            fontsize=9)  # fmt: skip
    _schematic_loss(ax, (left + (max(heads) - 0.5) * width, 34))
    ax.set(xlim=(0, 100), ylim=(0, 46), xticks=[], yticks=[])
    ax.grid(False)
    ax.spines[:].set_visible(False)
    ax.figure.set_label(
        f"Schematic: two views of an image pass an encoder of {depth} blocks, the first {frozen} "
        f"unchanged. Heads on blocks {', '.join(map(str, heads))} give a target z of view A and a "
        "prediction p of view B. A queue of past targets is searched for the nearest neighbor of "
        "z, and p is drawn to that neighbor and pushed from the targets of other images"
    )
    return ax


def _schematic_loss(ax: Axes, start: tuple[float, float]) -> None:
    """The right half: target, queue, neighbor, prediction, and what the loss does with them."""
    _box(ax, 68, 36, 11, 6, "z of view A", COLOURS[0], text="white", size=9)
    _box(ax, 68, 8, 11, 6, "p of view B", COLOURS[1], text="white", size=9)
    x, y = start
    _arrow(ax, (x, y + 0.2), (67.7, 39), bend=-0.25)
    _arrow(ax, (x + 1.6, y - 3.2), (67.7, 13), bend=-0.2)
    ax.text(80.2, 42.6, "no gradient", fontsize=8, ha="left", va="bottom")
    for i in range(7):
        near = i == 4
        _box(ax, 68 + 4 * i, 26, 3.6, 5, "NN" if near else "", COLOURS[2] if near else "0.95",
             text="white", size=8)  # fmt: skip
    ax.text(96.5, 33.5, "queue of past z", fontsize=9, ha="right", va="center")
    _arrow(ax, (79.3, 38), (85.4, 31.3))
    _arrow(ax, (85.8, 25.7), (77, 14.3), both=True)
    ax.text(83.5, 20, "NNA: alike", fontsize=10, fontweight="bold")
    ax.text(83.5, 16.8, "unlike z of\nother images", fontsize=9, va="top")


def _box(ax: Axes, x, y, width, height, name, colour, *, text="black", size=9, hatch=None) -> None:
    style = "round,pad=0,rounding_size=0.6"
    ax.add_patch(
        FancyBboxPatch((x, y), width, height, boxstyle=style, facecolor=colour, edgecolor="0.25",
                       linewidth=0.9, hatch=hatch)
    )  # fmt: skip
    label = ax.text(x + width / 2, y + height / 2, name, ha="center", va="center", color=text,
                    fontsize=size)  # fmt: skip
    if hatch:
        label.set_bbox({"facecolor": colour, "edgecolor": "none", "pad": 1.5})


def _arrow(ax: Axes, start, end, *, bend: float = 0.0, both: bool = False) -> None:
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="<|-|>" if both else "-|>", mutation_scale=11,
                        connectionstyle=f"arc3,rad={bend}", color="0.25", linewidth=1.2)
    )  # fmt: skip
