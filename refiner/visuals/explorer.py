"""The linked explorer: two maps of the same images, a curve of all blocks, and what is near.

The page (``explorer.js``) holds what every block of every model says, so that a click or a step of
the slider waits for no kernel; ``Exploration.compute`` answers the same states in Python. What
mouse and keyboard do, ``select``, ``lasso``, ``search`` and ``set`` do by name.
"""

from __future__ import annotations

import csv
import io
import threading
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.figure import Figure

from refiner.base.errors import MissingPackage, UserError
from refiner.base.places import clock
from refiner.images.sets import ImageSet
from refiner.visuals import explorer_figure, explorer_page, static_copy
from refiner.visuals.explorer_state import Exploration, State, View, prepare

KINDS = {"csv": "text", "png": "image"}


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
        images: an ImageSet, uint8 [N, C, H, W], or a list of [C, H, W]; at most 200,000.
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
    """The page over an ``Exploration``, and its names in Python.

    ``widget`` is the page, to be put among others.
    """

    def __init__(self, exploration: Exploration, state: State):
        self.exploration = exploration
        self._heard: list[Callable[[ImageSet], None]] = []
        self._thread: threading.Thread | None = None
        self.view = exploration.compute(state)  # what is shown
        self.widget = _page(self)

    @property
    def state(self) -> State:
        """The state that is shown."""
        return self.view.state

    @property
    def indices(self) -> tuple[int, ...]:
        """Positions of the chosen images: the group and the selected one, not its neighbors."""
        selected = self.state.selected
        return tuple(sorted({*self.state.group, *([] if selected is None else [selected])}))

    @property
    def selection(self) -> ImageSet | None:
        """The chosen images with labels and factors; None where none is chosen."""
        return self.exploration.source[list(self.indices)] if self.indices else None

    def observe(self, handler: Callable[[ImageSet | None], None]) -> None:
        """Calls a function with :attr:`selection` whenever other images are chosen."""
        self._heard.append(handler)

    # ------------------------------------------------------------ by name

    def set(self, **changes) -> View:
        """Changes fields of the state and shows it: ``set(block=3, layout="umap", colour="hue")``.

        Raises:
            ValueError: for what is not there; the explorer shows the reason and stays as it was.
        """
        with self._reporting():
            if changes.get("layout") == "umap" and not self._has_umap:
                self._add_umap()
            view = self.exploration.compute(replace(self.state, **changes))
        self._show(view)
        return view

    def select(self, i: int | None) -> View:
        """Selects an image, as a click on its point does; None selects none."""
        return self.set(selected=None if i is None else int(i))

    def lasso(self, indices: Sequence[int]) -> View:
        """Chooses a group of images instead of what was chosen, as a lasso does."""
        return self.set(selected=None, group=tuple(int(i) for i in indices))

    def search(self, text: str) -> View:
        """Selects by position ("17"), or chooses a group by positions ("3, 5-9") or class.

        It takes the place of what was chosen; an empty text chooses nothing.
        """
        if not text.strip():
            return self.set(selected=None, group=())
        with self._reporting():
            found = self.exploration.find(text)
        alone = len(found) == 1
        return self.set(selected=found[0], group=()) if alone else self.lasso(found)

    # ------------------------------------------------------------ to keep

    def figure(self) -> Figure:
        """The present view as a matplotlib figure."""
        return explorer_figure.figure(self.exploration, self.view)

    def save_png(self, path: str | Path = "explorer.png") -> Path:
        """Writes :meth:`figure` where nothing is yet; returns the path."""
        return self._keep(path, self._png)

    def save_csv(self, path: str | Path = "explorer.csv") -> Path:
        """Writes the group, the selected image and its neighbors, one row an image.

        Columns: image, class, how it was chosen, place on both maps, the factors.

        Raises:
            ValueError: where nothing is chosen, or where a file is in the way.
        """
        return self._keep(path, self._csv)

    def to_html(self, path: str | Path = "explorer.html") -> Path:
        """Writes the explorer as one HTML file that needs neither kernel nor network.

        All blocks of all models, neighbors and thumbnails are inside, of at most 2,000 images.
        """
        write = explorer_page.write_html
        return write(self.exploration, self.state, _free(path))

    def to_parquet(self, path: str | Path = "explorer.parquet", *, side: int = 1) -> Path:
        """Writes a table that Embedding Atlas opens; needs the package pyarrow.

        Start it as ``embedding-atlas FILE --x x --y y --image image --neighbors neighbors``
        (apple.github.io/embedding-atlas/tool.html).

        Args:
            path: where nothing is yet.
            side: 0 writes what the left map shows, 1 the right one.

        Returns:
            The path. Columns: x, y; image, a PNG as bytes; neighbors, the rows of the nearest with
            their cosine distances; class, and the factors.
        """
        table, path = explorer_page.atlas_table(self.exploration, self.view, side), _free(path)
        import pyarrow.parquet

        pyarrow.parquet.write_table(table, path)
        return path

    def _keep(self, path: str | Path, made: Callable[[], bytes]) -> Path:
        content, path = made(), _free(path)
        path.write_bytes(content)
        return path

    def _png(self) -> bytes:
        drawn, file = self.figure(), io.BytesIO()
        drawn.savefig(file, format="png", dpi=150)
        plt.close(drawn)
        return file.getvalue()

    def _csv(self) -> bytes:
        explored, (left, right) = self.exploration, self.view.sides
        rows = explored.chosen(self.view)
        if not rows:
            raise UserError("nothing is chosen: click a point, lasso some, or search for a class")
        names = ["image", "class", "chosen", "left_x", "left_y", "right_x", "right_y"]
        file = io.StringIO(newline="")
        table = csv.writer(file)
        table.writerow([*names, *explored.factors])
        for i, how in rows.items():
            label = None if explored.labels is None else int(explored.labels[i])
            places = [f"{x:.5f}" for x in (*left.xy[i], *right.xy[i])]
            factors = [f"{values[i]:.6g}" for values in explored.factors.values()]
            table.writerow([i, explored.name_of(label), how, *places, *factors])
        return file.getvalue().encode()

    # ------------------------------------------------------------ what the page asks

    def _asked(self, _, message: dict, buffers=None) -> None:
        """Thumbnails, neighbors that no table holds, and files to download."""
        explored = self.exploration
        if "pictures" in message:
            some = {i: explorer_page.thumbnail(explored, int(i)) for i in message["pictures"]}
            self.widget.send({"pictures": some})
        if "near" in message:
            name, block, i = message["near"]
            with self._reporting():
                ids = explored.neighbors_of((name, block), i)[0]
            self.widget.send({"near": message["near"], "ids": ids.tolist()})
        if "save" in message:
            with self._reporting():
                kind = message["save"]
                content = self._csv() if kind == "csv" else self._png()
                address = explorer_page.address(content, f"{KINDS[kind]}/{kind}")
                self.widget.send({"file": f"explorer.{kind}", "address": address})

    def _changed(self, change) -> None:
        """The page, or somebody in Python, has changed the widget's state."""
        asked = State(**{**change["new"], "group": tuple(change["new"]["group"])})
        if asked == self.state:
            return
        if asked.layout == "umap" and not self._has_umap:
            self._show(self.view)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._make_umap, daemon=True)
                self._thread.start()
            return
        with self._reporting():
            view = self.exploration.compute(asked)
        self._show(view)

    @property
    def _has_umap(self) -> bool:
        return all("umap" in table.xy for table in self.exploration.tables.values())

    def _add_umap(self, **how) -> None:
        self.exploration.add_umap(**how)
        self.widget.tables = explorer_page.tables(self.exploration)

    def _make_umap(self) -> None:
        with self._reporting():
            self._say("UMAP is being computed; the PCA map can be used meanwhile")
            self._add_umap(progress=False, report=self._progressed)
            self.set(layout="umap")

    def _progressed(self, done: int, total: int, left: float) -> None:
        self._say(f"UMAP: {done} of {total} maps, {clock(left)} left")

    # ------------------------------------------------------------ showing

    @contextmanager
    def _reporting(self):
        """Shows an error where the user looks, and passes it on: no run may go on as if well."""
        try:
            yield
        except Exception as error:
            kind = "" if isinstance(error, ValueError) else f"{type(error).__name__}: "
            self._say(f"{kind}{error}", bad=True)
            raise

    def _say(self, text: str, *, bad: bool = False) -> None:
        self.widget.message = [text, bad]

    def _show(self, view: View) -> None:
        before, self.view = self.indices, view
        self.widget.state = asdict(view.state) | {"group": list(view.state.group)}
        self._say("")
        if self.indices != before:
            for handler in self._heard:
                handler(self.selection)

    def _ipython_display_(self) -> None:
        static_copy.show(self.widget, self.figure())


def _free(path: str | Path) -> Path:
    path = Path(path)
    if path.exists():
        raise UserError(f"{path} is there already: remove it, or give another name")
    return path


def _page(explorer: Explorer):
    """The widget that runs ``explorer.js``."""
    try:
        import anywidget
        import traitlets
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"the explorer needs the package {error.name}: pip install 'mim-refiner-lab[lab]'"
        ) from error

    class Page(anywidget.AnyWidget):
        _esm = explorer_page.HERE / "explorer.js"
        _css = explorer_page.HERE / "explorer.css"
        tables = traitlets.Dict().tag(sync=True)
        state = traitlets.Dict().tag(sync=True)
        message = traitlets.List(["", False]).tag(sync=True)

    state = asdict(explorer.state) | {"group": list(explorer.state.group)}
    page = Page(tables=explorer_page.tables(explorer.exploration), state=state)
    page.observe(explorer._changed, "state")
    page.on_msg(explorer._asked)
    return page
