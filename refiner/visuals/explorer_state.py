"""What the explorer knows, without a browser: ``Exploration.compute(state)`` says what to show.

:func:`prepare` finds every block's exact neighbors and what is read off them once; after that a
state is answered from tables, so that a step of the slider is instant.

Shape legend: L blocks, N images, D width, k neighbors, S sampled images, G images of a group.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import mean_and_scale, standardized
from refiner.images import toybox
from refiner.images.sets import ImageSet
from refiner.probing.features import Features
from refiner.probing.neighbors import classify
from refiner.probing.search import Graph, nearest_neighbors
from refiner.visuals import maps

MOST_IMAGES = 200_000
ALL_NEIGHBORS = 20_000  # images up to which everybody's neighbors are searched
SPARE = 64  # candidates beyond k of a single search: float32 misplaces none by so many
SAMPLE = 1_000  # images whose neighbors stand for all in larger sets
TEMPERATURE = 0.07  # of the votes, as in refiner.knn_accuracy
FEW_VALUES = 24  # a factor of so few whole numbers is shown as categories
CIRCLES = ("hue", "background_hue", "background_angle")


# ---------------------------------------------------------------- what is asked and answered


@dataclass(frozen=True)
class State:
    """What the controls say.

    Attributes:
        left, right: names of the models on the two maps.
        block: the block both show, counted from 1; a model with fewer shows its last.
        right_block: a block for the right map alone; None follows ``block``.
        layout: "pca" or "umap".
        colour: one of :attr:`Exploration.colours`.
        selected: the image whose neighbors are shown.
        group: images chosen together, by lasso or search.
    """

    left: str
    right: str
    block: int = 1
    right_block: int | None = None
    layout: str = "pca"
    colour: str = "none"
    selected: int | None = None
    group: tuple[int, ...] = ()


@dataclass(frozen=True, eq=False)
class Colour:
    """How points are coloured.

    Attributes:
        values: int64 [N] categories, or float32 [N] in 0…1.
        names: the categories' names; None for numbers.
        limits: what 0 and 1 stand for.
        circle: 0 and 1 are the same.
    """

    values: np.ndarray
    names: tuple[str, ...] | None = None
    limits: tuple[float, float] = (0.0, 1.0)
    circle: bool = False


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two maps.

    Attributes:
        model, block: what it shows; ``block`` is the model's own number.
        xy: float32 [N, 2] in -1…1.
        colour: of the points.
        accuracy: share of the images whose class their neighbors vote for; None without labels.
        kept: share of the neighbors that are neighbors in the model's last block too.
    """

    model: str
    block: int
    xy: np.ndarray
    colour: Colour
    accuracy: float | None
    kept: float


@dataclass(frozen=True, eq=False)
class Near:
    """The neighbors of the selected image on one side, nearest first, all [k].

    Attributes:
        indices: which images.
        similarities: cosines of the standardised features.
        shared: whether the other side has the image among its neighbors too.
        right: whether it is of the selected image's class; None without labels.
        vote: the class that the neighbors vote for; None without labels.
    """

    indices: np.ndarray
    similarities: np.ndarray
    shared: np.ndarray
    right: np.ndarray | None
    vote: int | None


@dataclass(frozen=True, eq=False)
class Group:
    """What is common to the images of a group.

    Attributes:
        indices: int64 [G], sorted.
        counts: images by class, most frequent first; empty without labels.
        inside: share of the group's neighbors that are in the group, left and right.
        right: share of them that are of their image's class, left and right; None without labels.
        shared: share of the neighbors that both sides have in common.
        moved: the group's images, those that lost most of their neighbors from left to right first.
    """

    indices: np.ndarray
    counts: dict[int, int]
    inside: tuple[float, float]
    right: tuple[float, float] | None
    shared: float
    moved: np.ndarray


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Everything that the explorer shows in one state.

    Attributes:
        state: the state, with numbers that are out of reach brought back.
        sides: left and right.
        shared: share of the neighbors that both sides have in common.
        near: the selected image's neighbors, left and right; None without one.
        group: None without a group.
    """

    state: State
    sides: tuple[Side, Side]
    shared: float
    near: tuple[Near, Near] | None = None
    group: Group | None = None

    def __repr__(self) -> str:
        parts = [f"{side.model}, block {side.block}" for side in self.sides]
        parts = [" | ".join(parts), f"{self.shared:.0%} of the neighbors in common"]
        if self.near:
            own = [
                f"{near.right.sum()} of its class"
                if near.right is not None
                else f"{near.shared.sum()} in common"
                for near in self.near
            ]
            parts.append(f"image {self.state.selected}: {' | '.join(own)}")
        if self.group:
            parts.append(f"a group of {len(self.group.indices)}")
        return f"View({'; '.join(parts)})"


# ---------------------------------------------------------------- the tables


@dataclass(eq=False)
class Table:
    """One model's blocks, looked up at every step.

    Attributes:
        features: [L, N, D].
        blocks: the blocks' numbers.
        graph: the neighbors of the sampled images, int64 [L, S, K ≥ k].
        accuracy: [L]; NaN without labels.
        kept: [L].
        own_votes: float32 [L, S], the share of the vote for the image's own class.
        scaling: of each block mean and inverse deviation [D], and the lengths [N] of the
            standardised features; only beside a sample.
        xy: by layout float32 [L, N, 2].
    """

    features: Tensor
    blocks: tuple[int, ...]
    graph: Graph
    accuracy: np.ndarray
    kept: np.ndarray
    own_votes: np.ndarray
    scaling: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    xy: dict[str, np.ndarray] = field(default_factory=dict)


@dataclass(eq=False)
class Exploration:
    """Images and what every block of every model makes of them. Made by :func:`prepare`.

    Attributes:
        images: uint8 [N, 3, H, W] or read on demand.
        tables: by model.
        k: neighbors that vote and are shown.
        labels: int64 [N] or None.
        classes: their names.
        factors: by name [N].
        sample: positions [S] of the images whose neighbors were searched.
        pictures: by position the thumbnails that have been shown.
    """

    images: object
    tables: dict[str, Table]
    k: int
    labels: np.ndarray | None
    classes: tuple[str, ...]
    factors: dict[str, np.ndarray]
    sample: np.ndarray
    pictures: dict[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def complete(self) -> bool:
        """Whether everybody's neighbors are known."""
        return len(self.sample) == len(self)

    @property
    def colours(self) -> tuple[str, ...]:
        """What points can be coloured by."""
        known = (["class"] if self.labels is not None else []) + list(self.factors)
        if self.complete:
            known += ["neighbor agreement"]
            known += ["prediction error"] if self.labels is not None else []
        return (*known, "none")

    def start(self) -> State:
        """The first view: first and last model, last block; one model: first and last block."""
        names = list(self.tables)
        depth = max(len(t.blocks) for t in self.tables.values())
        layout = "umap" if all("umap" in t.xy for t in self.tables.values()) else "pca"
        start = State(names[0], names[-1], depth, layout=layout, colour=self.colours[0])
        return start if len(names) > 1 else replace(start, block=1, right_block=depth)

    def name_of(self, label: int | None) -> str:
        """A class's name, or its number; empty without one."""
        if label is None:
            return ""
        return self.classes[label] if self.classes else str(label)

    # ------------------------------------------------------------ a state's view

    def compute(self, state: State) -> View:
        """What to show in a state. Depends on nothing else and changes nothing.

        Raises:
            ValueError: for a model, layout, colour or image that is not there.
        """
        state = self._checked(state)
        at = [
            self._at(state.left, state.block),
            self._at(state.right, state.right_block or state.block),
        ]
        shared_S = self._shared(*at)
        sides = tuple(self._side(where, state, shared_S) for where in at)
        near = None if state.selected is None else self._near(at, state.selected)
        group = self._group(at, state.group) if state.group else None
        return View(state, sides, float(shared_S.mean()), near, group)

    def _checked(self, state: State) -> State:
        for what, value, known in (
            ("model", state.left, self.tables),
            ("model", state.right, self.tables),
            ("layout", state.layout, self.tables[next(iter(self.tables))].xy),
            ("colour", state.colour, self.colours),
        ):
            if value not in known:
                raise UserError(f"there is no {what} {value!r}, only {', '.join(known)}")
        chosen = np.asarray([*state.group, *([] if state.selected is None else [state.selected])])
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(wrong):
            raise UserError(f"there is no image {wrong[0]}, only 0 to {len(self) - 1}")
        clamp = lambda block, name: min(max(block, 1), len(self.tables[name].blocks))  # noqa: E731
        deepest = max((state.left, state.right), key=lambda name: len(self.tables[name].blocks))
        right = state.right_block and clamp(state.right_block, state.right)
        return replace(
            state,
            block=clamp(state.block, deepest),
            right_block=right,
            group=tuple(sorted(set(state.group))),
        )

    def _at(self, name: str, block: int) -> tuple[str, int]:
        """Model, and position of the block in its table."""
        return name, min(block, len(self.tables[name].blocks)) - 1

    def _neighbors(self, at: tuple[str, int]) -> np.ndarray:
        name, block = at
        return self.tables[name].graph.indices[block, :, : self.k].numpy()

    def _shared(self, left, right) -> np.ndarray:
        """Share of each sampled image's neighbors that both sides have, float64 [S]."""
        return _common(self._neighbors(left), self._neighbors(right)).mean(1)

    def _side(self, at, state: State, shared_S: np.ndarray) -> Side:
        name, block = at
        table = self.tables[name]
        accuracy = None if self.labels is None else float(table.accuracy[block])
        colour = self._colour(state.colour, at, shared_S)
        return Side(
            name,
            table.blocks[block],
            table.xy[state.layout][block],
            colour,
            accuracy,
            float(table.kept[block]),
        )

    def _colour(self, name: str, at, shared_S: np.ndarray) -> Colour:
        if name == "none":
            return Colour(np.zeros(len(self), np.int64), ("image",))
        if name == "class":
            names = self.classes or tuple(map(str, range(int(self.labels.max()) + 1)))
            return Colour(self.labels, names)
        if name == "neighbor agreement":
            return Colour(shared_S.astype(np.float32))
        if name == "prediction error":
            return Colour(1 - self.tables[at[0]].own_votes[at[1]])
        return _factor_colour(name, self.factors[name])

    def _near(self, at, i: int) -> tuple[Near, Near]:
        found = [self._neighbors_of(where, i) for where in at]
        result = []
        for (indices, similarities), (others, _) in zip(found, found[::-1], strict=True):
            right = vote = None
            if self.labels is not None:
                right = self.labels[indices] == self.labels[i]
                vote = int(_votes(indices[None], similarities[None], self.labels)[0].argmax())
            result.append(Near(indices, similarities, np.isin(indices, others), right, vote))
        return tuple(result)

    def _neighbors_of(self, at, i: int) -> tuple[np.ndarray, np.ndarray]:
        """Neighbors and similarities [k] of any image; searched where it is not in the sample."""
        name, block = at
        table, row = self.tables[name], int(np.searchsorted(self.sample, i))
        if row < len(self.sample) and self.sample[row] == i:
            graph = Graph(table.graph.indices[block, row], table.graph.similarities[block, row])
        else:
            graph = self._search(table, block, i)
        return graph.indices[: self.k].numpy(), graph.similarities[: self.k].numpy()

    def _search(self, table: Table, block: int, i: int) -> Graph:
        """One image's neighbors [k] among all: a product in float32 tells who can be one."""
        x_ND = table.features[block]
        mean_D, scale_D, length_N = table.scaling[block]
        query_D = (x_ND[i] - mean_D) * scale_D
        weights_D = scale_D * query_D
        rough_N = (x_ND @ weights_D - mean_D @ weights_D) / length_N
        some = rough_N.topk(min(self.k + SPARE, len(self))).indices.sort().values
        some = some[some != i]  # in the order of the images, for ties
        near_ND = (x_ND[some] - mean_D) * scale_D
        graph = nearest_neighbors(query_D[None], near_ND, k=self.k)
        return Graph(some[graph.indices[0]], graph.similarities[0])

    def _group(self, at, chosen: Sequence[int]) -> Group:
        indices = np.asarray(chosen, dtype=np.int64)
        rows = np.flatnonzero(np.isin(self.sample, indices))
        if not len(rows):  # a small group in a large set
            rows = np.zeros(0, np.int64)
        found = [self._neighbors(where)[rows] for where in at]
        mean = lambda x: float(x.mean()) if len(rows) else float("nan")  # noqa: E731
        counts, right = {}, None
        if self.labels is not None:
            labels, n = np.unique(self.labels[indices], return_counts=True)
            order = np.lexsort((labels, -n))
            counts = {int(labels[o]): int(n[o]) for o in order}
            own = self.labels[self.sample[rows]][:, None]
            right = tuple(mean(self.labels[x] == own) for x in found)
        shared_G = _common(*found).mean(1)
        order = np.argsort(shared_G, kind="stable")
        rest = np.setdiff1d(indices, self.sample[rows])
        moved = np.concatenate([self.sample[rows][order], rest])
        inside = tuple(mean(np.isin(x, indices)) for x in found)
        return Group(indices, counts, inside, right, mean(shared_G), moved)

    # ------------------------------------------------------------ search

    def find(self, text: str) -> tuple[int, ...]:
        """Images by position ("17", "3, 5, 8"), range ("10-20") or name of the class ("cone").

        Raises:
            ValueError: for a text that names nothing, with the nearest class.
        """
        from difflib import get_close_matches

        asked = text.strip().lower()
        classes = self.classes or (
            () if self.labels is None else tuple(map(str, range(int(self.labels.max()) + 1)))
        )
        names = [name.lower() for name in classes]
        if asked in names:
            return tuple(np.flatnonzero(self.labels == names.index(asked)).tolist())
        try:
            chosen = [i for part in asked.split(",") for i in _span(part)]
        except ValueError:
            near = get_close_matches(asked, names, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else (
                    f"type a position from 0 to {len(self) - 1}"
                    + (f", or a class: {', '.join(classes[:20])}" if classes else "")
                )
            )
            raise UserError(f"nothing is called {text.strip()!r}; {hint}") from None
        if not chosen or not all(0 <= i < len(self) for i in chosen):
            raise UserError(f"there are images 0 to {len(self) - 1}, not {text.strip()!r}")
        return tuple(chosen)

    # ------------------------------------------------------------ UMAP

    def add_umap(self, *, seed: int = 0, progress: bool = True, report=lambda *_: None) -> None:
        """Makes the layout "umap" for every block of every model, or reads it from the cache.

        Raises:
            ValueError: for so many images that not everybody's neighbors are known.
        """
        if not self.complete:
            raise UserError(
                f"UMAP needs everybody's neighbors, which are searched for at most "
                f"{ALL_NEIGHBORS:,} images, not {len(self):,}: explore a part, or stay with PCA"
            )
        if len(self) <= maps.N_NEIGHBORS:
            raise UserError(f"UMAP needs more than {maps.N_NEIGHBORS} images, not {len(self)}")
        made = maps.umap_maps(
            {name: t.features for name, t in self.tables.items()},
            {name: t.graph for name, t in self.tables.items()},
            {name: t.xy["pca"][0] for name, t in self.tables.items()},
            seed=seed,
            progress=progress,
            report=report,
        )
        for name, xy in made.items():
            self.tables[name].xy["umap"] = xy


def _span(part: str) -> range:
    first, dash, last = part.partition("-")
    return range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)


def _common(a_Sk: np.ndarray, b_Sk: np.ndarray) -> np.ndarray:
    """Which of a's neighbors are b's too, bool [S, k]."""
    return (a_Sk[:, :, None] == b_Sk[:, None, :]).any(-1)


def _factor_colour(name: str, values: np.ndarray) -> Colour:
    whole = np.all(values == np.round(values)) and values.min() >= 0
    if whole and values.max() < FEW_VALUES:
        count = int(values.max()) + 1
        known = toybox.PATTERNS if name == "pattern" and count <= len(toybox.PATTERNS) else None
        return Colour(values.astype(np.int64), known or tuple(map(str, range(count))))
    low, high = float(values.min()), float(values.max())
    scaled = (values - low) / ((high - low) or 1.0)
    return Colour(scaled.astype(np.float32), None, (low, high), name in CIRCLES)


# ---------------------------------------------------------------- preparing


def prepare(
    images: ImageSet | Tensor | Sequence,
    features: Mapping[str, Features | Tensor],
    *,
    labels: Tensor | Sequence[int] | None = None,
    classes: Sequence[str] | None = None,
    kind: str | None = None,
    k: int = 10,
    progress: bool = True,
) -> Exploration:
    """Finds every block's neighbors, and the PCA maps.

    Args:
        images: an ImageSet, uint8 [N, 3, H, W], or a list of [3, H, W].
        features: by model :class:`refiner.probing.features.Features`, or [L, N, D] or [N, D].
        labels: int64 [N]; default an ImageSet's own.
        classes: their names; default an ImageSet's own.
        kind: which features of a ``Features``: "cls", "patch", …; default what refining pools.
        k: neighbors that vote and are shown.
        progress: show a bar.

    Returns:
        An :class:`Exploration` with the layout "pca", and "umap" where it comes with the course.

    Raises:
        ValueError: for numbers of images that do not match, images of different sizes, features
            that are not finite, more than 200,000 images, or a k that is too large.
    """
    pixels = _pixels(images)
    n = len(pixels)
    labels = getattr(images, "labels", None) if labels is None else labels
    classes = tuple(getattr(images, "classes", ()) if classes is None else classes)
    factors = dict(getattr(images, "factors", {}))
    found = _features(features, n, kind)
    labels = _labels(labels, n, classes)
    if not 1 <= k < n:
        raise UserError(f"k must be from 1 to {n - 1} neighbors among {n} images, not {k}")
    sample = np.arange(n)
    if n > ALL_NEIGHBORS:
        sample = np.sort(np.random.default_rng(0).permutation(n)[:SAMPLE])
    axes = maps.shared_axes({name: x for name, (x, _) in found.items()})
    total = sum(len(x) for x, _ in found.values())
    with tqdm(total=total, desc="neighbors", unit="block", disable=not progress) as bar:
        tables = {
            name: _table(x, blocks, axes[name], labels, sample, k, bar)
            for name, (x, blocks) in found.items()
        }
    _frame_together([t.xy for t in tables.values()])
    ready = maps.prepared_maps({name: t.graph for name, t in tables.items()})
    for name, xy in (ready or {}).items():
        tables[name].xy["umap"] = xy
    return Exploration(pixels, tables, k, labels, classes, factors, sample)


@torch.no_grad()
def _table(x_LND: Tensor, blocks, axes_D2: Tensor, labels, sample, k: int, bar) -> Table:
    n = x_LND.shape[1]
    more = min(n - 1, max(k, maps.N_NEIGHBORS - 1))  # UMAP may want more neighbors than are shown
    points, graphs, accuracy, own, scaling = [], [], [], [], []
    for raw_ND in x_LND:
        x_ND = standardized(raw_ND, raw_ND[:1])[0]
        points.append((x_ND @ axes_D2).numpy())
        if len(sample) == n:
            graph = nearest_neighbors(x_ND, x_ND, k=more, exclude_self=True)
        else:
            graph = _others(nearest_neighbors(x_ND[sample], x_ND, k=k + 1), sample)
            how = [v.float() for v in mean_and_scale(raw_ND)]
            scaling.append((*how, x_ND.norm(dim=1).clamp_min(1e-12)))
        graphs.append(graph)
        if labels is not None:
            votes_SC = _votes(
                graph.indices[:, :k].numpy(), graph.similarities[:, :k].numpy(), labels
            )
            accuracy.append((votes_SC.argmax(1) == labels[sample]).mean())
            own.append(votes_SC[np.arange(len(sample)), labels[sample]].astype(np.float32))
        bar.update()
    last = graphs[-1].indices[:, :k].numpy()
    kept = [_common(g.indices[:, :k].numpy(), last).mean() for g in graphs]
    graph = Graph(
        *(torch.stack([getattr(g, part) for g in graphs]) for part in ("indices", "similarities"))
    )
    return Table(
        x_LND,
        blocks,
        graph,
        np.asarray(accuracy or np.full(len(blocks), np.nan)),
        np.asarray(kept),
        np.asarray(own),
        scaling,
        {"pca": np.stack(points)},
    )


def _frame_together(layouts: list[dict[str, np.ndarray]]) -> None:
    """One scale for the PCA of all blocks and models, so that distances can be compared."""
    reach = max(float(np.abs(xy["pca"]).max()) for xy in layouts)
    for xy in layouts:
        xy["pca"] = (xy["pca"] / max(reach, 1e-12)).astype(np.float32)


def _others(graph: Graph, themselves) -> Graph:
    """A graph of [S, k] without the queries themselves, [S, k-1]."""
    itself = graph.indices == torch.as_tensor(np.asarray(themselves))[:, None]
    # Duplicates can push an image out of its own neighbors; then the farthest goes.
    itself[~itself.any(1), -1] = True
    keep = lambda x: x[~itself].view(len(x), -1)  # noqa: E731
    return Graph(keep(graph.indices), keep(graph.similarities))


def _votes(indices_Sk: np.ndarray, similarities_Sk: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Shares of the vote by class, float32 [S, C], weighted as in refiner.knn_accuracy."""
    found = map(torch.as_tensor, (indices_Sk, similarities_Sk.astype(np.float64), labels))
    k, n_classes = indices_Sk.shape[1], int(labels.max()) + 1
    votes_1SC, _ = classify(*found, [k], TEMPERATURE, n_classes)
    return votes_1SC[0].numpy()


# ---------------------------------------------------------------- input, checked


def _pixels(images):
    """uint8 [N, 3, H, W], or images that are read on demand."""
    pixels = getattr(images, "images", images)
    if not hasattr(pixels, "shape"):
        pixels = [torch.as_tensor(np.asarray(x)) for x in pixels]
        sizes = [tuple(x.shape) for x in pixels]
        odd = next((i for i, size in enumerate(sizes) if size != sizes[0]), None)
        if odd is not None:
            raise UserError(
                f"the images have different sizes: image 0 is {_size(sizes[0])} and image {odd} is "
                f"{_size(sizes[odd])}; refiner.load_images(folder, size=…) makes them alike"
            )
        pixels = torch.stack(pixels) if pixels else torch.zeros(0, 3, 1, 1, dtype=torch.uint8)
    if (
        len(pixels.shape) != 4
        or pixels.shape[1] != 3
        or pixels.dtype not in (torch.uint8, np.uint8)
    ):
        raise UserError(
            f"images must be uint8 [N, 3, H, W], not {pixels.dtype} {list(pixels.shape)}"
        )
    if len(pixels) < 2:
        raise UserError(f"there is nothing to explore in {len(pixels)} images")
    if len(pixels) > MOST_IMAGES:
        raise UserError(
            f"the explorer shows at most {MOST_IMAGES:,} images, not {len(pixels):,}: take a part "
            f"of the images and of the features, such as the first {MOST_IMAGES:,}"
        )
    return torch.as_tensor(pixels) if isinstance(pixels, np.ndarray) else pixels


def _size(shape: tuple[int, ...]) -> str:
    return "×".join(map(str, shape))


def _features(features, n: int, kind: str | None) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """By model [L, N, D] float32 on the CPU, and the blocks' numbers."""
    if isinstance(features, Features) or not isinstance(features, Mapping):
        features = {"model": features}
    if not features:
        raise UserError('there are no features: give them by model, {"before": …, "after": …}')
    found = {}
    for name, given in features.items():
        whole = isinstance(given, Features)
        x = (given[kind] if kind else given.main) if whole else torch.as_tensor(given)
        x = x[None] if x.ndim == 2 else x
        if x.ndim != 3 or not x.is_floating_point() or x.shape[2] < 2:
            raise UserError(
                f"the features {name!r} must be floats [L, N, D], not {x.dtype} {list(x.shape)}"
            )
        if x.shape[1] != n:
            raise UserError(
                f"the features {name!r} are of {x.shape[1]} images, but there are {n} images: "
                "extract them from the very images that you explore"
            )
        _check_finite(name, x)
        blocks = given.blocks if whole and len(given.blocks) == len(x) else range(1, len(x) + 1)
        found[str(name)] = x.detach().float().cpu(), tuple(blocks)
    return found


def _check_finite(name: str, x_LND: Tensor) -> None:
    for number, x_ND in enumerate(x_LND, start=1):
        if not torch.isfinite(x_ND.sum(dtype=torch.float64)):
            bad = (~torch.isfinite(x_ND)).any(1).nonzero()[:, 0]
            if len(bad):
                raise UserError(
                    f"the features {name!r} hold NaN or infinity in block {number}, first at image "
                    f"{int(bad[0])}: extract them again, or leave those images out"
                )


def _labels(labels, n: int, classes: tuple[str, ...]) -> np.ndarray | None:
    if labels is None:
        return None
    labels = np.asarray(labels.cpu() if isinstance(labels, Tensor) else labels)
    if labels.shape != (n,):
        raise UserError(f"{n} images do not match labels of shape {list(labels.shape)}")
    if labels.dtype.kind not in "iu" or labels.min() < 0:
        raise UserError("the labels must be whole numbers from 0")
    if classes and int(labels.max()) >= len(classes):
        raise UserError(f"label {int(labels.max())} has no name among {len(classes)} classes")
    return labels.astype(np.int64)
