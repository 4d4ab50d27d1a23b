"""Says in words what a matplotlib figure shows, and sends it along with the picture.

:func:`refiner.visuals.plots.style` turns it on. The words become the ``alt`` text of the output
``image/png``, which pages made by nbconvert and the course's site read out. A figure's own label
(``figure.set_label("…")``) comes first, where the author has more to say.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import PathCollection
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

MOST = 8  # names or values in a row; more are counted
UNLABELLED = "axis without a label"


def describe(figure: Figure) -> str:
    """One paragraph about a drawn figure: titles, axes, curves with their ends, bars, images.

    Args:
        figure: a figure that has been drawn once, so that its ticks are known.

    Returns:
        The text. An axis with numbers but no label is called ``axis without a label``, which lets
        a test find it in a stored notebook.
    """
    # A colour bar's axes are labelled "<colorbar>"; what it says belongs to its map.
    panels = [ax for ax in figure.axes if ax.get_visible() and ax.get_label() != "<colorbar>"]
    parts = [figure.get_label(), figure.get_suptitle()]
    if len(panels) > 4 and not any(ax.get_title() for ax in panels):
        parts.append(f"{len(panels)} small panels, like this: {_panel(panels[0])}")
    else:
        parts += [_panel(ax) for ax in panels]
    bars = [ax for ax in figure.axes if ax.get_label() == "<colorbar>"]
    parts += [f"Colour scale: {ax.get_ylabel() or ax.get_xlabel() or UNLABELLED}" for ax in bars]
    text = ". ".join(" ".join(part.split()).rstrip(".") for part in parts if part.strip())
    text = text.replace(r"\$", "$")  # as plain() of the figures' names wrote it
    return f"{text}." if text else "A figure."


def _panel(ax: Axes) -> str:
    parts = [ax.get_title(), *_images(ax), *_lines(ax), *_bars(ax), *_points(ax)]
    parts += [_axis("x", ax.xaxis, ax.get_xlabel()), _axis("y", ax.yaxis, ax.get_ylabel())]
    return "; ".join(part for part in parts if part)


def _axis(name: str, axis: Axis, label: str) -> str:
    texts = [t.get_text() for t in axis.get_ticklabels() if t.get_visible() and t.get_text()]
    if not axis.get_visible() or not axis.axes.axison:
        texts = []
    numbers = bool(texts) and all(_is_number(text) for text in texts)
    if label:
        return f"{name} axis: {label}" + ("" if numbers or not texts else f" ({_list(texts)})")
    if numbers:
        return f"{name} {UNLABELLED}"
    return f"{name} axis: {_list(texts)}" if texts else ""


def _is_number(text: str) -> bool:
    plain = text.replace("−", "-").strip("%$ ").replace("\\mathdefault", "").strip("{}")
    plain = plain.replace("10^{", "1e").rstrip("}")
    try:
        float(plain)
    except ValueError:
        return False
    return True


def _list(names: list[str]) -> str:
    names = [" ".join(name.split()) for name in names]
    return ", ".join(names) if len(names) <= 2 * MOST else f"{len(names)} of them"


def _value(axis: Axis, value: float) -> str:
    formatter = axis.get_major_formatter()
    percent = isinstance(formatter, PercentFormatter)
    if percent:
        return f"{value / formatter.xmax:.0%}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def _images(ax: Axes) -> list[str]:
    pictures = [np.shape(image.get_array()) for image in ax.images]
    maps = [image for image in ax.images if np.ndim(image.get_array()) == 2]
    if len(pictures) == 1 and maps:
        values = np.asarray(maps[0].get_array(), float)
        low, high = np.nanmin(values), np.nanmax(values)
        return [f"map of {values.shape[0]} × {values.shape[1]} values, {low:.3g} to {high:.3g}"]
    return [f"{len(pictures)} image{'s' if len(pictures) > 1 else ''}"] if pictures else []


def _lines(ax: Axes) -> list[str]:
    told = []
    for line in ax.lines:
        name, x, y = line.get_label(), *map(np.asarray, line.get_data())
        if name.startswith("_") or not len(y):
            continue
        if len(y) == 2 and y[0] == y[1] and line.get_transform() != ax.transData:
            told.append(f"level “{name}” at {_value(ax.yaxis, y[0])}")
        else:
            ends = [(_value(ax.yaxis, y[i]), _value(ax.xaxis, float(x[i]))) for i in (0, -1)]
            told.append(f"curve “{name}” from {' to '.join(f'{v} at {u}' for v, u in ends)}")
    return told if len(told) <= MOST else [f"{len(told)} curves", *told[:MOST]]


def _bars(ax: Axes) -> list[str]:
    sizes: dict[str, list[str]] = {}
    for group in ax.containers:
        lying = getattr(group, "orientation", None) == "horizontal"
        axis = ax.xaxis if lying else ax.yaxis
        name = "" if group.get_label().startswith("_") else f" “{group.get_label()}”"
        for patch in getattr(group, "patches", []):
            size = patch.get_width() if lying else patch.get_height()
            sizes.setdefault(name, []).append(_value(axis, size))
    told = [f"bars{name}: {_list(values)}" for name, values in sizes.items()]
    return told if len(told) <= MOST else [f"{len(told)} groups of bars"]


def _points(ax: Axes) -> list[str]:
    groups = [c for c in ax.collections if isinstance(c, PathCollection)]
    if not groups:
        return []
    count = sum(len(c.get_offsets()) for c in groups)
    names = [c.get_label() for c in groups if not c.get_label().startswith("_")]
    return [f"{count} points" + (f" in the groups {_list(names)}" if names else "")]


def accompany_figures() -> None:
    """Lets every figure that this IPython session shows carry its description as alt text."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython else None
    formatter = getattr(shell, "display_formatter", None)
    if formatter is None or getattr(shell, "kernel", None) is None:
        return
    import matplotlib_inline.backend_inline  # noqa: F401, its import registers how figures show

    png = formatter.formatters["image/png"]
    draw = png.type_printers.get(Figure)
    if draw is not None and not hasattr(draw, "tells"):
        png.for_type(Figure, _telling(draw))


def _telling(draw: Callable) -> Callable:
    """A way to draw that adds the description to the picture's metadata."""

    def drawn(figure: Figure):
        found = draw(figure)
        data, metadata = found if isinstance(found, tuple) else (found, {})
        return data, {**metadata, "alt": describe(figure)}

    drawn.tells = True
    return drawn
