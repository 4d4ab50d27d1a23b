"""The course's figures: curves, bars and maps here, pictures and tables in ``pictures.py``.

Every function draws on new or given axes and returns them; what cannot be drawn is a ValueError.
Call :func:`style` once for readable sizes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import named_labels
from refiner.visuals.pictures import contact_sheet as contact_sheet
from refiner.visuals.pictures import factor_heatmap as factor_heatmap
from refiner.visuals.pictures import neighbor_grid as neighbor_grid
from refiner.visuals.pictures import query_maps as query_maps
from refiner.visuals.pictures import reconstruction as reconstruction
from refiner.visuals.pictures import similarity_map as similarity_map
from refiner.visuals.style import COLOURS as COLOURS
from refiner.visuals.style import (
    GRAY,
    MARKERS,
    array,
    axes_for,
    name_of,
    named,
    place_legend,
    plain,
)
from refiner.visuals.style import curve_style as curve_style
from refiner.visuals.style import style as style
from refiner.visuals.style import styles_of as styles_of

# ---------------------------------------------------------------- curves by block


def block_curve(
    curves: Mapping[str, object],
    *,
    ylabel: str = "accuracy",
    chance: float | None = None,
    best: bool = True,
    blocks: Sequence[int] | None = None,
    percent: bool | None = None,
    title: str | None = None,
    legend: bool = True,
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
        legend: name the curves; of several axes with the same curves one will do.
    """
    means = named({name: x[0] if isinstance(x, tuple) else x for name, x in curves.items()})
    spreads = [array(x[1]) if isinstance(x, tuple) else None for x in curves.values()]
    percent = _are_shares(means) if percent is None else percent
    (ax,) = axes_for(ax, 1, (6.8, 4.0))
    looks = styles_of(means)
    for i, (name, mean) in enumerate(means.items()):
        at = np.arange(1, len(mean) + 1) if blocks is None else np.asarray(blocks)
        look = looks[i]
        if best:
            top = int(mean.argmax())
            name = f"{name} (best: block {at[top]}, {_in_words(mean[top], percent)})"
            _ring(ax, at[top], mean[top], look["color"])
        ax.plot(at, mean, label=name, markersize=6, **look)
        if spreads[i] is not None:
            low, high = mean - spreads[i], mean + spreads[i]
            ax.fill_between(at, low, high, alpha=0.2, linewidth=0, color=look["color"])
    if chance is not None:
        ax.axhline(chance, color=GRAY, linestyle=":", label="chance")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=13))
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    title = f"{_capital(ylabel)} of every block" if title is None else title
    ax.set(xlabel="block", ylabel=plain(ylabel), title=plain(title))
    if legend:
        place_legend(ax)
    return ax


def _are_shares(values: Mapping[str, np.ndarray]) -> bool:
    return all(0 <= x.min() and x.max() <= 1 for x in values.values())


def _in_words(value: float, percent: bool) -> str:
    return f"{value:.1%}" if percent else f"{value:.3g}"


def _capital(text: str) -> str:
    return text if text.startswith("k-NN") else text[:1].upper() + text[1:]


def _ring(ax: Axes, x: float, y: float, colour: str) -> None:
    ax.plot(x, y, "o", markersize=15, fillstyle="none", color=colour)


# ---------------------------------------------------------------- training


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
    """
    if not history:
        raise UserError("the history is empty")
    steps, borders = _total_steps(history)
    known = {"stage", "step", "loss", "similarity", "neighbor_accuracy", "lr", "seconds"}
    numbers = {k for entry in history for k, v in entry.items() if isinstance(v, int | float)}
    extra = sorted(numbers - known)
    with_neighbors = any(entry.get("neighbor_accuracy") for entry in history)
    panels = 1 + with_neighbors + bool(extra)
    axes = axes_for(ax, panels, (5.0 * panels, 3.6))
    _per_head(axes[0], steps, history, "loss", heads)
    axes[0].set(ylabel="loss", title="Loss")
    if with_neighbors:
        _per_head(axes[1], steps, history, "neighbor_accuracy", heads)
        axes[1].yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
        axes[1].set(ylabel="neighbors of the query's class", title="Are the neighbors right?")
    for i, key in enumerate(extra):
        points = [(s, e[key]) for s, e in zip(steps, history, strict=True) if key in e]
        axes[-1].plot(*zip(*points, strict=True), label=key, **curve_style(i))
    if extra:
        axes[-1].set(ylabel="value", title="Evaluation on the way")
        axes[-1].legend()
    beside = {"xytext": (3, 0), "textcoords": "offset points", "va": "top", "fontsize": 9}
    for panel in axes:
        panel.set_xlabel("step")
        for at, stage in borders:
            panel.axvline(at, color=GRAY, linestyle=":")
            place = {"xy": (at, 0.98), "xycoords": ("data", "axes fraction")}
            panel.annotate(f"stage {stage}", **place, **beside, color=GRAY)
    return axes


def _total_steps(history: Sequence[Mapping]) -> tuple[list[int], list[tuple[int, int]]]:
    """Steps counted through all stages, and where each later stage begins."""
    steps, borders, offset, before = [], [], 0, history[0].get("stage")
    for entry in history:
        stage = entry.get("stage")
        if stage != before:
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
    every = max(1, len(at) // 8)
    for i, (name, curve) in enumerate(zip(names, zip(*values, strict=True), strict=True)):
        # Each curve's markers come a little later than the one's before, so that none is hidden.
        look = curve_style(i) | {"markersize": 5, "markevery": (i % every, every)}
        ax.plot(at, curve, label=plain(name), **look)
    ax.legend(ncols=1 + (len(names) > 5), fontsize=9)


# ---------------------------------------------------------------- bars and comparisons


def bars_with_spread(
    values: Mapping[str, object],
    *,
    ylabel: str = "accuracy",
    chance: float | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Axes:
    """Means as bars with every single run as a point; in percent if all values lie in 0..1.

    Args:
        values: by name the results [S] of several seeds or draws.
        ylabel: what they are.
        chance: drawn as a dotted line.
    """
    runs = {name: np.atleast_1d(x) for name, x in named(values).items()}
    percent = _are_shares(runs)
    (ax,) = axes_for(ax, 1, (max(4.0, 1.4 * len(runs) + 1.5), 3.8))
    for i, (x, look) in enumerate(zip(runs.values(), styles_of(runs), strict=True)):
        look |= {"linestyle": "", "markersize": 5}
        ax.bar(i, x.mean(), 0.65, color=look["color"], alpha=0.55)
        across = np.linspace(-0.18, 0.18, len(x)) if len(x) > 1 else np.zeros(1)
        ax.plot(i + across, x, **look, markeredgecolor="black", markeredgewidth=0.6)
        above = {"xytext": (0, 7), "textcoords": "offset points", "ha": "center"}
        ax.annotate(_in_words(x.mean(), percent), (i, max(x.max(), x.mean(), 0)), **above)
    if chance is not None:
        ax.axhline(chance, color=GRAY, linestyle=":", label="chance")
        ax.legend()
    if percent:
        ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.margins(y=0.12)
    ax.set_xticks(range(len(runs)), list(runs))
    ax.grid(False, axis="x")
    most = max(len(x) for x in runs.values())
    ax.set_xlabel(f"bars: means; points: up to {most} single runs" if most > 1 else "model")
    ax.set(ylabel=plain(ylabel), title=plain(_capital(ylabel) if title is None else title))
    return ax


def spider(values: Mapping[str, object], names: Sequence[str], *, ax: Axes | None = None) -> Axes:
    """Several qualities at once, a spoke each, from 0 % in the middle to 100 % at the rim.

    Spokes of different protocols share a scale but no meaning: only the two outlines on one spoke
    can be compared, never one spoke with the next or the enclosed areas.

    Args:
        values: by name shares [Q] from 0 to 1.
        names: the Q spokes'; at least three.
        ax: polar Axes; default a new figure.
    """
    outlines, names = named(values), [plain(name) for name in names]
    if len(names) < 3 or any(x.shape != (len(names),) for x in outlines.values()):
        raise UserError(f"a spider plot needs three or more spokes and a value for each of {names}")
    if ax is None:
        figure = plt.figure(figsize=(6.4, 5.6), layout="constrained")
        ax = figure.add_subplot(projection="polar")
    around, told = np.linspace(0, 2 * np.pi, len(names), endpoint=False), []
    for (name, x), look in zip(outlines.items(), styles_of(outlines), strict=True):
        closed = np.append(around, around[0]), np.append(x, x[0])
        ax.plot(*closed, label=name, markersize=6, **look)
        ax.fill(*closed, color=look["color"], alpha=0.08)
        shares = ", ".join(f"{n} {v:.0%}" for n, v in zip(names, x, strict=True))
        told.append(f"{name}: {shares}")
    ax.set_theta_zero_location("N")
    ax.set_theta_direction(-1)
    ax.set_xticks(around, names)
    for angle, label in zip(around, ax.get_xticklabels(), strict=True):
        side = np.round(np.sin(angle), 1)  # near the top and the bottom 0
        label.set_horizontalalignment({0: "center", 1: "left", -1: "right"}[int(np.sign(side))])
    ax.set(ylim=(0, 1), yticks=[0.25, 0.5, 0.75, 1.0])
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    ax.set_rlabel_position(180 / len(names))
    ax.set_ylabel("0 % in the middle, 100 % at the rim")
    ax.yaxis.label.set_visible(False)  # the circles say it; the words are for the description
    ax.figure.set_label(". ".join(told))
    ax.spines[:].set_visible(False)
    ax.legend(loc="lower center", bbox_to_anchor=(0.5, -0.22), ncols=len(outlines))
    return ax


def differences(
    names: Sequence[str],
    values: object,
    spreads: object,
    *,
    title: str = "",
    ax: Axes | None = None,
) -> Axes:
    """What changed, a line each, with bars of two spreads either side of it.

    Args:
        names: Q of them, drawn from the top.
        values, spreads: shares [Q] after − before, shown as percentage points.

    Returns:
        The Axes. Filled circles are more than two spreads away from 0, open ones are not.
    """
    values, spreads = 100 * array(values), 100 * array(spreads)
    (ax,) = axes_for(ax, 1, (8.0, 0.25 * len(names) + 1.1))
    at, clear = np.arange(len(names)), np.abs(values) > 2 * spreads
    look = {"linestyle": "", "color": COLOURS[0], "elinewidth": 1.3, "marker": "o", "markersize": 6}
    for some, fill in ((clear, "full"), (~clear, "none")):
        if some.any():
            bars = 2 * spreads[some]
            ax.errorbar(values[some], at[some], xerr=bars, fillstyle=fill, **look)
    ax.axvline(0, color=GRAY, linewidth=1)
    ax.set_yticks(at, [plain(name) for name in names], fontsize=9)
    ax.set(ylim=(len(names) - 0.4, -0.6), xlabel="after − before, points", title=plain(title))
    filled = ", ".join(f"{plain(names[i])} {values[i]:+.0f}" for i in at[clear]) or "none"
    told = f"{clear.sum()} of {len(names)} filled: {filled}"
    ax.figure.set_label(". ".join(filter(None, (ax.figure.get_label(), told))))
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
    """
    points = named(maps)
    if labels is not None:
        labels, classes = named_labels(labels, len(labels), classes or ())
        labels = labels.cpu().numpy()
    for name, xy in points.items():
        if xy.ndim != 2 or xy.shape[1] != 2 or (labels is not None and len(labels) != len(xy)):
            n = "N" if labels is None else len(labels)
            raise UserError(f"the map {name!r} must be [{n}, 2], not {list(xy.shape)}")
    present = [] if labels is None else np.unique(labels).tolist()
    legend = 0 < len(present) <= 24
    axes = axes_for(ax, len(points), (4.4 * len(points) + 1.6 * legend, 4.4))
    size = float(np.clip(12000 / len(next(iter(points.values()))), 8, 36))
    for panel, (name, xy) in zip(axes, points.items(), strict=True):
        if not present:
            panel.scatter(*xy.T, s=size, color=COLOURS[0], linewidths=0)
        for label in present:
            own, text = xy[labels == label], name_of(label, classes)
            # The marker goes round after 16 classes, the colour after 8: shifted, no pair repeats.
            colour = COLOURS[(label + label // len(MARKERS)) % len(COLOURS)]
            look = {"color": colour, "marker": MARKERS[label % len(MARKERS)], "alpha": 0.8}
            panel.scatter(*own.T, s=size, linewidths=0, label=text, **look)
            if not legend:
                panel.text(*np.median(own, axis=0), text, fontsize=7, ha="center")
        panel.set(title=name, xlabel="first axis (no unit)", xticks=[], yticks=[])
    axes[0].set_ylabel("second axis (no unit)")
    if legend:
        axes[-1].legend(loc="upper left", bbox_to_anchor=(1.02, 1), fontsize=9, markerscale=1.5)
    return axes
