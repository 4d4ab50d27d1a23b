"""The look of the course's figures, and the pieces that their functions share.

Nothing is told by colour alone: curves differ in marker and line as well, classes in marker, right
and wrong neighbors in a mark. The colours are those of Okabe and Ito (2008), which readers with
any common colour vision can tell apart.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.files import readable, replacing
from refiner.base.pages import figure_html
from refiner.visuals.alt_text import accompany_figures, describe

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#999933")
MARKERS = (*"os^DvPX*<>ph8dH", (4, 1, 0))  # the last: a star of four points
LINES = ("-", "--", "-.", (0, (1, 1)), (0, (5, 1, 1, 1, 1, 1)))
RIGHT, WRONG = COLOURS[0], COLOURS[1]
# Any two differ by 17 or more in CIELAB, also for protan and deutan eyes.
CLASS_COLOURS = COLOURS[:6]
CLASS_MARKS = ("o", "s", "^", "D", "v", "P", "X")
ROLES = (  # words in a curve's name, the first that fits, and which colour is theirs
    (r"control|\brandom\b", 2),
    (r"\bbefore\b|unrefined", 0),
    (r"whitened", 3),
    (r"refined|refinement|\bafter\b", 1),
)
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


def save_figures(
    out: Path, draw: Callable[[], Iterable[tuple[str, str, plt.Figure]]]
) -> dict[str, str]:
    """Writes a report's ``figures/*.png`` in the course's look.

    Args:
        out: the report's folder.
        draw: makes file names, captions and figures.

    Returns:
        By name an HTML figure with the picture inside and its description as alt text.
    """
    shown = {}
    with style():
        for name, caption, figure in draw():
            path = out / "figures" / f"{name}.png"
            with replacing(path) as temporary:
                figure.savefig(temporary, format="png", dpi=100)
            picture = base64.b64encode(path.read_bytes()).decode()
            shown[name] = figure_html(picture, caption, describe(figure))
            plt.close(figure)
    return shown


# ---------------------------------------------------------------- for the figures' functions


def plain(name: object) -> str:
    """A user's name as matplotlib can draw it: without a formula between dollar signs."""
    return readable(name).replace("$", r"\$")


def named(values: Mapping[str, object]) -> dict[str, np.ndarray]:
    """Names that can be drawn, with what belongs to them as float64 arrays."""
    return {plain(name): array(x) for name, x in values.items()}


def array(x) -> np.ndarray:
    """Numbers, or a tensor on any device, as a float64 array."""
    return np.asarray(x.detach().cpu() if isinstance(x, Tensor) else x, dtype=np.float64)


def name_of(label: int, classes: Sequence[str] | None) -> str:
    """A class's name, or its number where there are no names."""
    return plain(classes[label]) if classes else str(label)


def axes_for(ax, columns: int, size: tuple[float, float]) -> np.ndarray:
    """Axes [columns]: the given ones, or those of a new figure of a size in inches."""
    if ax is None:
        _, ax = plt.subplots(1, columns, figsize=size, layout="constrained", squeeze=False)
    axes = np.atleast_1d(np.asarray(ax, dtype=object)).ravel()
    if len(axes) != columns:
        raise UserError(f"this figure needs {columns} axes, not {len(axes)}")
    return axes


def curve_style(i: int) -> dict:
    """Colour, marker and line of the i-th curve."""
    looks = {"color": COLOURS, "marker": MARKERS, "linestyle": LINES}
    return {key: values[i % len(values)] for key, values in looks.items()}


def class_styles(n: int) -> list[tuple[str, str]]:
    """Colour and marker of n classes: 42 differ, and those of one marker differ well in colour."""
    looks = len(CLASS_COLOURS), len(CLASS_MARKS)
    return [(CLASS_COLOURS[i % looks[0]], CLASS_MARKS[i % looks[1]]) for i in range(n)]


def styles_of(names: Iterable[str]) -> list[dict]:
    """Colour, marker and line of named curves: what the course compares always has its own colour.

    Controls, the encoder before, what is whitened and what is refined are told by words in the
    names. Where one of them is drawn, the other curves take colours that mean nothing.
    """
    names = list(names)
    roles = [next((c for word, c in ROLES if re.search(word, n.lower())), None) for n in names]
    free = cycle([c for c in range(len(COLOURS)) if c not in dict(ROLES).values()])
    looks = [curve_style(i) for i in range(len(names))]
    if any(role is not None for role in roles):
        for look, role in zip(looks, roles, strict=True):
            look["color"] = COLOURS[next(free) if role is None else role]
    return looks


def place_legend(ax: Axes) -> None:
    """A legend inside if it hides no line there, else below: "best" may lie on a line."""
    legend = ax.legend()
    ax.figure.draw_without_rendering()
    box = legend.get_window_extent()
    drawn = [line.get_transform().transform_path(line.get_path()) for line in ax.get_lines()]
    if any(path.intersects_bbox(box, filled=False) for path in drawn):
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.16))
