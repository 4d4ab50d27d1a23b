"""The linked explorer: two maps of the same images, a slider through the blocks, and what is near.

A thin layer of ipywidgets and jupyter-scatter: every change of a control makes a
:class:`refiner.visuals.explorer_state.State`, ``Exploration.compute`` answers it, and the answer is
shown. ``select``, ``lasso``, ``search`` and ``set`` do by name what mouse and keyboard do.
"""

from __future__ import annotations

import asyncio
import csv
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure

from refiner.base.errors import MissingPackage, UserError
from refiner.base.places import clock
from refiner.visuals import explorer_html
from refiner.visuals.explorer_state import Colour, Exploration, State, View, prepare
from refiner.visuals.style import RIGHT, WRONG

GLIDE = 500  # milliseconds that jupyter-scatter may take for points it was sent
MARGIN = 300  # and what a busy browser may need besides
REACH = 1.06  # of the axes; points lie within -1…1
HEIGHT = 380  # pixels of a map
SAME = "as on the left"


def explore(
    images,
    features,
    *,
    labels=None,
    classes: Sequence[str] | None = None,
    kind: str | None = None,
    k: int = 10,
    layout: str | None = None,
    progress: bool = True,
) -> Explorer:
    """Opens the explorer: maps of two models side by side, block by block, with their neighbors.

    Args:
        images: an ImageSet, uint8 [N, 3, H, W], or a list of [3, H, W]; at most 200,000.
        features: by model :class:`refiner.probing.features.Features`, or [L, N, D] or [N, D], such
            as ``{"before": …, "after": …}``. With one model its blocks are compared.
        labels, classes: int64 [N] and their names; default an ImageSet's own. Without labels
            nothing speaks of classes.
        kind: which features of a ``Features``: "cls", "patch", …; default what refining pools.
        k: neighbors that vote and are shown.
        layout: "pca" is instant, "umap" takes seconds to minutes once and is kept on disk. Default
            "umap" for the embedded checkpoints' first 1,024 Toybox test images, whose maps come
            with the course, else "pca".
        progress: show bars.

    Returns:
        An :class:`Explorer`; as the last line of a cell it shows itself.

    Raises:
        ValueError: for numbers of images that do not match, images of different sizes, features
            that are not finite, too many images, or a k that is too large.
        ModuleNotFoundError: the packages of the extra ``lab`` are missing.
    """
    if layout not in (None, "pca", "umap"):
        raise UserError(f"layout must be 'pca' or 'umap', not {layout!r}")
    how = {"labels": labels, "classes": classes, "kind": kind, "k": k, "progress": progress}
    explored = prepare(images, features, **how)
    if layout == "umap" and explored.start().layout != "umap":
        explored.add_umap(progress=progress)
    start = explored.start()
    return Explorer(explored, start if layout is None else replace(start, layout=layout))


class Explorer:
    """Controls, maps and panels over an :class:`refiner.visuals.explorer_state.Exploration`."""

    def __init__(self, exploration: Exploration, state: State):
        self.exploration = exploration
        self._quiet = False
        self._thread: threading.Thread | None = None
        self.view = exploration.compute(state)  # what is shown
        self._widgets()  # in self.panel, to be put among others
        self._show(self.view, everything=True)

    @property
    def state(self) -> State:
        """The state that is shown."""
        return self.view.state

    # ------------------------------------------------------------ by name

    def set(self, **changes) -> View:
        """Changes fields of the state and shows it: ``set(block=3, layout="umap", colour="hue")``.

        Raises:
            ValueError: for what is not there; the explorer shows the reason and stays as it was.
        """
        with self._reporting():
            if changes.get("layout") == "umap" and not self._has_umap:
                self.exploration.add_umap()
            view = self.exploration.compute(replace(self.state, **changes))
            self._show(view)
        return view

    def select(self, i: int | None) -> View:
        """Selects an image, as a click on its point does; None selects none."""
        return self.set(selected=None if i is None else int(i))

    def lasso(self, indices: Sequence[int]) -> View:
        """Chooses a group of images, as a lasso around their points does."""
        return self.set(group=tuple(int(i) for i in indices))

    def search(self, text: str) -> View:
        """Selects by position ("17"), or chooses a group by positions ("3, 5-9") or class."""
        with self._reporting():
            found = self.exploration.find(text)
        return self.select(found[0]) if len(found) == 1 else self.lasso(found)

    def figure(self) -> Figure:
        """The present view as a matplotlib figure."""
        return explorer_html.figure(self.exploration, self.view)

    def save_png(self, path: str | Path = "explorer.png") -> Path:
        """Writes :meth:`figure`; returns the path."""
        drawn = self.figure()
        drawn.savefig(path, dpi=150)
        plt.close(drawn)
        return Path(path)

    def save_csv(self, path: str | Path = "explorer.csv") -> Path:
        """Writes the group, the selected image and its neighbors, one row an image.

        Columns: image, class, how it was chosen, place on both maps, the factors.
        """
        rows = self._chosen()
        if not rows:
            raise UserError("nothing is chosen: click a point, lasso some, or search for a class")
        explored, (left, right) = self.exploration, self.view.sides
        names = ["image", "class", "chosen", "left_x", "left_y", "right_x", "right_y"]
        with open(path, "w", newline="", encoding="utf-8") as file:
            table = csv.writer(file)
            table.writerow([*names, *explored.factors])
            for i, how in rows.items():
                label = None if explored.labels is None else int(explored.labels[i])
                places = [f"{x:.5f}" for x in (*left.xy[i], *right.xy[i])]
                factors = [f"{values[i]:.6g}" for values in explored.factors.values()]
                table.writerow([i, explored.name_of(label), how, *places, *factors])
        return Path(path)

    def _chosen(self) -> dict[int, str]:
        """Chosen images and how they were: the strongest reason counts."""
        rows: dict[int, str] = {}
        for name, near in zip(("left", "right"), self.view.near or (), strict=False):
            for j in near.indices.tolist():
                rows[j] = "near on both sides" if j in rows else f"near on the {name}"
        rows |= dict.fromkeys(self.state.group, "group")
        return rows if self.state.selected is None else rows | {self.state.selected: "selected"}

    # ------------------------------------------------------------ widgets

    def _widgets(self) -> None:
        try:
            import ipywidgets as w

            self.maps = [_Map(self, side) for side in (0, 1)]
        except ModuleNotFoundError as error:
            raise MissingPackage(
                f"the explorer needs the package {error.name}: pip install 'mim-refiner-lab[lab]'"
            ) from error
        explored, state = self.exploration, self.state
        names, depth = list(explored.tables), max(len(t.blocks) for t in explored.tables.values())
        short = {"layout": w.Layout(width="auto"), "style": {"description_width": "initial"}}
        drop = lambda label, known: w.Dropdown(options=known, description=label, **short)  # noqa: E731
        self.left, self.right = drop("left", names), drop("right", names)
        fixed = [(SAME, 0)] + [(f"block {b}", b) for b in range(1, depth + 1)]
        self.right_block = drop("right block", fixed)
        self.layout = drop("map", [("PCA", "pca"), ("UMAP", "umap")])
        self.colour = drop("colour by", explored.colours)
        wide = w.Layout(width="420px")
        self.slider = w.IntSlider(state.block, 1, depth, description="block", layout=wide)
        self.play = w.Play(value=state.block, min=1, max=depth, interval=1500, show_repeat=True)
        w.jslink((self.play, "value"), (self.slider, "value"))
        example = "image 17, or 3, 5-9, or a class"
        self.searching = w.Text(placeholder=example, description="find", continuous_update=False)
        auto = w.Layout(width="auto")
        button = lambda text, tip: w.Button(description=text, tooltip=tip, layout=auto)  # noqa: E731
        self.clear = button("clear", "choose nothing")
        self.to_csv = button("save CSV", "write what is chosen into explorer.csv")
        self.to_png = button("save PNG", "write the figure into explorer.png")
        self.captions, self.legend = [w.HTML(), w.HTML()], w.HTML()
        self.message, self.near, self.group = w.HTML(), w.HTML(), w.HTML()
        self.progress = w.IntProgress(0, 0, 1, layout=w.Layout(display="none", width="420px"))
        half = w.Layout(width="50%", padding="0 4px")
        pairs = zip(self.captions, self.maps, strict=True)
        columns = w.HBox([w.VBox([words, one.widget], layout=half) for words, one in pairs])
        wrap = w.Layout(flex_flow="row wrap", align_items="center")
        chosen = [self.left, self.right, self.right_block, self.layout, self.colour]
        moving = [self.slider, self.play, self.progress]
        finding = [self.searching, self.clear, self.to_csv, self.to_png]
        chosen, moving, finding = (w.Box(row, layout=wrap) for row in (chosen, moving, finding))
        below = [self.message, self.near, self.group]
        self.panel = w.VBox([chosen, moving, columns, self.legend, finding, *below])
        self.panel.add_class("refiner-explorer")
        self._listen()

    def _listen(self) -> None:
        for name in ("left", "right", "colour"):
            self._on(getattr(self, name), lambda value, name=name: self.set(**{name: value}))
        self._on(self.right_block, lambda value: self.set(right_block=value or None))
        self._on(self.slider, lambda value: self.set(block=value))
        self._on(self.layout, self._change_layout)
        self._on(self.searching, self._find)
        self.clear.on_click(lambda _: self.set(selected=None, group=()))
        self.to_csv.on_click(lambda _: self._save(self.save_csv))
        self.to_png.on_click(lambda _: self._save(self.save_png))

    def _on(self, widget, handler: Callable, trait: str = "value") -> None:
        """Calls a handler with a trait's new value, unless we changed it ourselves."""
        widget.observe(lambda change: self._quiet or handler(change["new"]), names=trait)

    def _find(self, text: str) -> None:
        if not text.strip():
            return
        with suppress(ValueError):  # a slip of the keyboard; what is wrong with it is shown
            self.search(text)

    def _save(self, save: Callable[[], Path]) -> None:
        with self._reporting():
            try:
                path = save()
            except ValueError as error:  # nothing is chosen yet
                self._say(str(error))
                return
        self._say(f"saved {path.name} beside the notebook", bad=False)

    # ------------------------------------------------------------ UMAP, while PCA is used

    @property
    def _has_umap(self) -> bool:
        return all("umap" in table.xy for table in self.exploration.tables.values())

    def _change_layout(self, layout: str) -> None:
        if layout == "pca" or self._has_umap:
            self.set(layout=layout)
            return
        with self._silently():
            self.layout.value = self.state.layout  # until there is something to show
        if self._thread is None or not self._thread.is_alive():
            self._thread = threading.Thread(target=self._make_umap, daemon=True)
            self._thread.start()

    def _make_umap(self) -> None:
        with self._reporting():
            self._say("UMAP is being computed; the PCA map can be used meanwhile", bad=False)
            self.progress.layout.display = ""
            try:
                self.exploration.add_umap(progress=False, report=self._progressed)
            finally:
                self.progress.layout.display = "none"
            self.set(layout="umap")

    def _progressed(self, done: int, total: int, left: float) -> None:
        self.progress.max, self.progress.value = total, done
        self.progress.description = f"{clock(left)} left"

    # ------------------------------------------------------------ showing

    @contextmanager
    def _reporting(self):
        """Shows an error where the user looks, and passes it on: no run may go on as if well."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._say(f"{kind}{error}")
            raise

    @contextmanager
    def _silently(self):
        """Our own changes of the controls are not taken for the user's."""
        before, self._quiet = self._quiet, True
        try:
            yield
        finally:
            self._quiet = before

    def _say(self, text: str, *, bad: bool = True) -> None:
        colour = WRONG if bad else RIGHT
        words = f'<div role="alert" style="color:{colour}"><b>{escape(text)}</b></div>'
        self.message.value = words if text else ""

    def _show(self, view: View, *, everything: bool = False) -> None:
        before, self.view = self.view, view
        state, old = view.state, before.state
        explored = self.exploration
        with self._silently():
            for name in ("left", "right", "layout", "colour"):
                getattr(self, name).value = getattr(state, name)
            self.right_block.value = state.right_block or 0
            self.slider.value = state.block
            for side, one in enumerate(self.maps):
                one.show(view)
                self.captions[side].value = explorer_html.caption(explored, view, side)
            if everything or state.colour != old.colour:
                self.legend.value = explorer_html.legend(view.sides[0].colour)
            self.near.value = explorer_html.near_panel(explored, view)
            self.group.value = explorer_html.group_panel(explored, view)
            self._say("")

    def _ipython_display_(self) -> None:
        from IPython.display import display

        display(self.panel)
        drawn = self.figure()
        display(drawn)
        plt.close(drawn)


class _Map:
    """One of the two scatter plots."""

    def __init__(self, explorer: Explorer, side: int):
        import jscatter
        import pandas as pd

        self.explorer, self.side = explorer, side
        self._drawn: View | None = None
        self._next: View | None = None  # to be drawn when the points have come to rest
        self._rests = 0.0  # the time of the clock when they will have
        try:
            self.loop = asyncio.get_running_loop()
        except RuntimeError:
            self.loop = None  # not in a notebook: nobody looks, nothing has to wait
        explored, shown = explorer.exploration, explorer.view.sides[side]
        frame = pd.DataFrame({"x": shown.xy[:, 0], "y": shown.xy[:, 1]})
        size = float(np.clip(6000 / len(frame), 2, 8))
        axes = {"x_scale": (-REACH, REACH), "y_scale": (-REACH, REACH), "axes": False}
        look = {"opacity": 0.8, "opacity_unselected": 0.35, "color_selected": "black"}
        look |= {"transition_points_duration": GLIDE, "lasso_color": RIGHT, "height": HEIGHT}
        self.scatter = jscatter.Scatter("x", "y", frame, **axes, size=size, **look)
        self.widget = self.scatter.widget
        self.widget.toolbar_buttons = ["pan_zoom", "lasso", "divider", "full_screen", "reset"]
        self._show_pictures(explored)
        explorer._on(self.widget, self._selected, "selection")
        explorer._on(self.widget, self._hovered, "hovering")

    def _show_pictures(self, explored: Exploration) -> None:
        """Pictures at the mouse, made when asked for: all at once would cost memory and time."""
        widget, labelled = self.widget, explored.labels is not None
        widget.tooltip_preview, widget.tooltip_preview_type = "picture", "image"
        widget.tooltip_preview_image_height, widget.tooltip_preview_image_size = 64, "contain"
        names = ["image", *(["class"] if labelled else [])]
        nothing = dict.fromkeys(("scale", "domain", "range", "histogram"))
        widget.tooltip_properties_non_visual_info = dict.fromkeys(names, nothing)
        widget.tooltip_properties, widget.tooltip_histograms = names, False
        widget.tooltip_enable = True

        def answer(message, buffers):
            if message.get("type") == "tooltip":
                widget.send(self._about(int(message["index"])))

        # jupyter-scatter has this method answer from its table, before any callback is asked.
        widget._handle_custom_msg = answer

    def _about(self, i: int) -> dict:
        """What the tooltip says of an image."""
        explored, about = self.explorer.exploration, {"image": str(i)}
        if explored.labels is not None:
            about["class"] = explored.name_of(int(explored.labels[i]))
        picture = explorer_html.thumbnail(explored, i)
        return {"type": "tooltip", "index": i, "preview": picture, "properties": about}

    def _selected(self, indices) -> None:
        chosen = [] if indices is None else np.asarray(indices).tolist()
        if len(chosen) == 1:
            self.explorer.select(chosen[0])
        elif chosen:
            self.explorer.lasso(chosen)
        else:
            self.explorer.set(selected=None, group=())

    def _hovered(self, i: int | None) -> None:
        with self.explorer._silently():
            # -1 is no point; None would be taken for point 0.
            self.explorer.maps[1 - self.side].widget.hovering = -1 if i is None else i

    def show(self, view: View) -> None:
        """Shows a view; where a loop runs, once the points have come to rest.

        The browser drops points that reach it while it still draws others, so of views that follow
        each other quickly the first and the last are drawn.
        """
        wait = self._rests - time.monotonic()
        if wait > 0 and self.loop is not None and self._points_differ(view):
            if self._next is None:
                self.loop.call_soon_threadsafe(self.loop.call_later, wait, self._draw_next)
            self._next = view
        else:
            self._next = None if self._next is None else view
            self._draw(view)

    def _draw_next(self) -> None:
        view, self._next = self._next, None
        if view is not None:
            self._rests = 0.0
            with self.explorer._reporting(), self.explorer._silently():
                self._draw(view)

    def _points_differ(self, view: View) -> bool:
        new, old = view.sides[self.side], self._drawn and self._drawn.sides[self.side]
        return not old or new.xy is not old.xy or not _alike(new.colour, old.colour)

    def _draw(self, view: View) -> None:
        """Moves, colours and highlights the points."""
        new, old = view.sides[self.side], self._drawn and self._drawn.sides[self.side]
        if self._points_differ(view):
            if not old or not _alike(new.colour, old.colour):
                self._colour(new.colour)
            axes = {"x_scale": (-REACH, REACH), "y_scale": (-REACH, REACH)}
            # Not animated: after quick steps, gliding points ended on a block passed on the way.
            self.scatter.xy(new.xy[:, 0], new.xy[:, 1], **axes, animate=False)
            self._rests = time.monotonic() + (GLIDE + MARGIN) / 1000
        self._drawn = view
        chosen = list(view.state.group)
        if view.state.selected is not None and view.state.selected not in chosen:
            chosen.append(view.state.selected)
        self.scatter.selection(chosen)

    def _colour(self, colour: Colour) -> None:
        """Sets the colours; the points that carry them are sent when they are moved."""
        import pandas as pd

        if colour.names is None:
            table = plt.get_cmap(explorer_html.colour_map(colour))
            # What is not known is drawn like the least: jupyter-scatter can leave no point out.
            values = np.nan_to_num(colour.values.astype(float))
            shades = [table(i / 255) for i in range(256)]
        else:
            names = [f"{i} {name}" for i, name in enumerate(colour.names)]
            values = pd.Categorical.from_codes(colour.values, categories=names)
            shades = explorer_html.palette(len(names))
        self.scatter.color(by=values, norm=(0, 1), map=shades, skip_widget_update=True)


def _alike(a: Colour, b: Colour) -> bool:
    return (
        a.names == b.names
        and a.circle == b.circle
        and np.array_equal(a.values, b.values, equal_nan=True)
    )
