"""What the explorer knows, without a browser: ``Exploration.compute(state)`` says what to show.

:func:`prepare` finds every block's exact neighbors and what is read off them once; after that a
state is answered from tables, so that a step of the slider is instant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.files import readable
from refiner.base.tensors import as_features, mean_and_scale, named_labels, standardized
from refiner.images import toybox
from refiner.images.sets import ImageSet, pixels_of
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
    """What the controls say."""

    left: str  # the model on the left map
    right: str
    block: int = 1  # that both show, counted from 1; a model with fewer shows its last
    right_block: int | None = None  # a block for the right map alone; None follows ``block``
    layout: str = "pca"  # or "umap"
    colour: str = "none"  # one of ``Exploration.colours``
    selected: int | None = None  # the image whose neighbors are shown
    group: tuple[int, ...] = ()  # images chosen together, by lasso or search


@dataclass(frozen=True, eq=False)
class Colour:
    """How points are coloured."""

    values: np.ndarray  # int64 [N] categories, or float32 [N] in 0…1, NaN where not known
    names: tuple[str, ...] | None = None  # the categories'; None for numbers
    limits: tuple[float, float] = (0.0, 1.0)  # what 0 and 1 stand for
    circle: bool = False  # 0 and 1 are the same


@dataclass(frozen=True, eq=False)
class Side:
    """One of the two maps."""

    model: str
    block: int  # the model's own number
    xy: np.ndarray  # float32 [N, 2] in -1…1
    colour: Colour
    accuracy: float | None  # share whose class their neighbors vote for; None without labels
    kept: float  # share of the neighbors that are neighbors in the model's last block too


@dataclass(frozen=True, eq=False)
class Near:
    """The neighbors of the selected image on one side, nearest first, all [k]."""

    indices: np.ndarray
    similarities: np.ndarray  # cosines of the standardised features
    shared: np.ndarray  # whether the other side has the image among its neighbors too
    right: np.ndarray | None  # whether it is of the selected image's class; None without labels


@dataclass(frozen=True, eq=False)
class Group:
    """What is common to the images of a group."""

    indices: np.ndarray  # int64 [G], sorted
    right: tuple[float, float] | None  # share of neighbors of their image's class
    shared: float  # share of the neighbors that both sides have in common


@dataclass(frozen=True, eq=False, repr=False)
class View:
    """Everything that the explorer shows in one state."""

    state: State  # with numbers that are out of reach brought back
    sides: tuple[Side, Side]
    shared: float  # share of the neighbors that both sides have in common
    near: tuple[Near, Near] | None = None  # of the selected image
    group: Group | None = None

    def __repr__(self) -> str:
        parts = [" | ".join(f"{side.model}, block {side.block}" for side in self.sides)]
        parts.append(f"{self.shared:.0%} of the neighbors in common")
        if self.near:
            known = self.near[0].right is not None
            what = [near.right if known else near.shared for near in self.near]
            own = [f"{x.sum()} {'of its class' if known else 'in common'}" for x in what]
            parts.append(f"image {self.state.selected}: {' | '.join(own)}")
        if self.group:
            parts.append(f"a group of {len(self.group.indices)}")
        return f"View({'; '.join(parts)})"


# ---------------------------------------------------------------- the tables


@dataclass(eq=False)
class Table:
    """One model's blocks, looked up at every step."""

    features: Tensor  # [L, N, D]
    blocks: tuple[int, ...]  # their numbers
    graph: Graph  # the neighbors [L, S, K ≥ k] of the S sampled images
    accuracy: np.ndarray  # [L]; NaN without labels
    kept: np.ndarray  # [L]
    own_votes: np.ndarray  # float32 [L, S], the share of the vote for the image's own class
    # Of each block mean and inverse deviation [D], and the lengths [N] of the standardised
    # features; only beside a sample.
    scaling: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list)
    xy: dict[str, np.ndarray] = field(default_factory=dict)  # by layout float32 [L, N, 2]


@dataclass(eq=False)
class Exploration:
    """Images and what every block of every model makes of them. Made by :func:`prepare`."""

    images: object  # uint8 [N, C, H, W], or read on demand
    tables: dict[str, Table]  # by model
    k: int  # neighbors that vote and are shown
    labels: np.ndarray | None  # int64 [N]
    classes: tuple[str, ...]  # their names, or numbers; empty without labels
    factors: dict[str, np.ndarray]  # by name [N]
    sample: np.ndarray  # positions [S] of the images whose neighbors were searched
    pictures: dict[int, str] = field(default_factory=dict)  # thumbnails that have been shown
    source: ImageSet | None = None  # the images with labels and factors, to take parts of

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
            known += ["neighbor change"]
            known += ["wrong votes"] if self.labels is not None else []
        return (*known, "none")

    def start(self) -> State:
        """The first view: first and last model, last block; one model: first and last block."""
        names = list(self.tables)
        depth = max(len(t.blocks) for t in self.tables.values())
        layout = "umap" if all("umap" in t.xy for t in self.tables.values()) else "pca"
        start = State(names[0], names[-1], depth, layout=layout, colour=self.colours[0])
        return start if len(names) > 1 else replace(start, block=1, right_block=depth)

    def name_of(self, label: int | None) -> str:
        """A class's name; empty without a label."""
        return "" if label is None else self.classes[label]

    # ------------------------------------------------------------ a state's view

    def compute(self, state: State) -> View:
        """What to show in a state. Depends on nothing else and changes nothing."""
        state = self._checked(state)
        asked = [(state.left, state.block), (state.right, state.right_block or state.block)]
        # Model, and position of the block in its table.
        at = [(name, min(block, len(self.tables[name].blocks)) - 1) for name, block in asked]
        shared_S = _common(*map(self._neighbors, at)).mean(1)
        sides = tuple(self._side(where, state, shared_S) for where in at)
        near = None if state.selected is None else self._near(at, state.selected)
        group = self._group(at, state.group) if state.group else None
        return View(state, sides, float(shared_S.mean()), near, group)

    def chosen(self, view: View) -> dict[int, str]:
        """Chosen images and how they were chosen: the strongest reason counts."""
        rows: dict[int, str] = {}
        for name, near in zip(("left", "right"), view.near or (), strict=False):
            for j in near.indices.tolist():
                rows[j] = "near on both sides" if j in rows else f"near on the {name}"
        rows |= dict.fromkeys(view.state.group, "group")
        return rows if view.state.selected is None else rows | {view.state.selected: "selected"}

    def _checked(self, state: State) -> State:
        layouts = next(iter(self.tables.values())).xy
        asked = [("model", state.left, self.tables), ("model", state.right, self.tables)]
        asked += [("layout", state.layout, layouts), ("colour", state.colour, self.colours)]
        for what, value, known in asked:
            if value not in known:
                raise UserError(f"there is no {what} {value!r}, only {', '.join(known)}")
        chosen = np.asarray([*state.group, *([] if state.selected is None else [state.selected])])
        wrong = chosen[(chosen < 0) | (chosen >= len(self))]
        if len(wrong):
            raise UserError(f"there is no image {wrong[0]}, only 0 to {len(self) - 1}")
        clamp = lambda block, name: min(max(block, 1), len(self.tables[name].blocks))  # noqa: E731
        deepest = max((state.left, state.right), key=lambda name: len(self.tables[name].blocks))
        block, group = clamp(state.block, deepest), tuple(sorted(set(state.group)))
        right = state.right_block and clamp(state.right_block, state.right)
        return replace(state, block=block, right_block=right, group=group)

    def _neighbors(self, at: tuple[str, int]) -> np.ndarray:
        name, block = at
        return self.tables[name].graph.indices[block, :, : self.k].numpy()

    def _side(self, at, state: State, shared_S: np.ndarray) -> Side:
        name, block = at
        table = self.tables[name]
        what = name, table.blocks[block], table.xy[state.layout][block]
        accuracy = None if self.labels is None else float(table.accuracy[block])
        return Side(
            *what, self._colour(state.colour, at, shared_S), accuracy, float(table.kept[block])
        )

    def _colour(self, name: str, at, shared_S: np.ndarray) -> Colour:
        if name == "none":
            return Colour(np.zeros(len(self), np.int64), ("image",))
        if name == "class":
            return Colour(self.labels, self.classes)
        if name == "neighbor change":
            return Colour((1 - shared_S).astype(np.float32))
        if name == "wrong votes":
            return Colour(1 - self.tables[at[0]].own_votes[at[1]])
        return _factor_colour(name, self.factors[name])

    def _near(self, at, i: int) -> tuple[Near, Near]:
        found = [self.neighbors_of(where, i) for where in at]
        result = []
        for (indices, similarities), (others, _) in zip(found, found[::-1], strict=True):
            right = None if self.labels is None else self.labels[indices] == self.labels[i]
            result.append(Near(indices, similarities, np.isin(indices, others), right))
        return tuple(result)

    def neighbors_of(self, at: tuple[str, int], i: int) -> tuple[np.ndarray, np.ndarray]:
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
        rows = np.flatnonzero(np.isin(self.sample, indices))  # none of a small group in a large set
        found = [self._neighbors(where)[rows] for where in at]
        mean = lambda x: float(x.mean()) if len(rows) else float("nan")  # noqa: E731
        right = None
        if self.labels is not None:
            own = self.labels[self.sample[rows]][:, None]
            right = tuple(mean(self.labels[x] == own) for x in found)
        return Group(indices, right, mean(_common(*found)))

    # ------------------------------------------------------------ search

    def find(self, text: str) -> tuple[int, ...]:
        """Images by position ("17", "3, 5, 8"), range ("10-20") or name of the class ("cone")."""
        from difflib import get_close_matches

        asked, last = text.strip().lower(), len(self) - 1
        names = [name.lower() for name in self.classes]
        if asked in names:
            return tuple(np.flatnonzero(self.labels == names.index(asked)).tolist())
        try:
            spans = [_span(part) for part in asked.split(",")]
        except ValueError:
            near = get_close_matches(asked, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"type a position from 0 to {last}"
            if names and not near:
                hint += f", or a class: {', '.join(self.classes[:20])}"
            raise UserError(f"nothing is called {text.strip()!r}; {hint}") from None
        if not all(span and 0 <= span[0] and span[-1] <= last for span in spans):
            raise UserError(f"there are images 0 to {last}, not {text.strip()!r}")
        return tuple(i for span in spans for i in span)

    # ------------------------------------------------------------ UMAP

    def add_umap(self, *, progress: bool = True, report=lambda *_: None) -> None:
        """Makes the layout "umap" for every block of every model, or reads it from the cache."""
        if not self.complete:
            raise UserError(
                f"UMAP needs everybody's neighbors, which are searched for at most "
                f"{ALL_NEIGHBORS:,} images, not {len(self):,}: explore a part, or stay with PCA"
            )
        if len(self) <= maps.N_NEIGHBORS:
            raise UserError(f"UMAP needs more than {maps.N_NEIGHBORS} images, not {len(self)}")
        features = {name: t.features for name, t in self.tables.items()}
        graphs = {name: t.graph for name, t in self.tables.items()}
        start = {name: t.xy["pca"][0] for name, t in self.tables.items()}
        how = {"progress": progress, "report": report}
        for name, xy in maps.umap_maps(features, graphs, start, **how).items():
            self.tables[name].xy["umap"] = xy


def _span(part: str) -> range:
    first, dash, last = part.partition("-")
    return range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)


def _common(a_Sk: np.ndarray, b_Sk: np.ndarray) -> np.ndarray:
    """Which of a's neighbors are b's too, bool [S, k]."""
    return (a_Sk[:, :, None] == b_Sk[:, None, :]).any(-1)


def _factor_colour(name: str, values: np.ndarray) -> Colour:
    if not np.isfinite(values).any():
        return Colour(np.zeros(len(values), np.int64), ("not known",))
    whole = np.all(values == np.round(values)) and values.min() >= 0
    if whole and values.max() < FEW_VALUES:
        count = int(values.max()) + 1
        known = toybox.PATTERNS if name == "pattern" and count <= len(toybox.PATTERNS) else None
        return Colour(values.astype(np.int64), known or tuple(map(str, range(count))))
    values = np.where(np.isfinite(values), values, np.nan)
    low, high = float(np.nanmin(values)), float(np.nanmax(values))
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
    """Finds every block's neighbors, and the PCA maps; for arguments see :func:`refiner.explore`.

    Returns:
        An :class:`Exploration` with the layout "pca", and "umap" where it comes with the course.
    """
    pixels = _pixels(images)
    n = len(pixels)
    labels = getattr(images, "labels", None) if labels is None else labels
    classes = getattr(images, "classes", ()) if classes is None else classes
    factors = {k: np.asarray(v) for k, v in getattr(images, "factors", {}).items()}
    found = _features(features, n, kind)
    if labels is not None:
        labels, classes = named_labels(labels, n, classes)
        if not classes:  # ids, with gaps or without
            ids, labels = labels.unique(return_inverse=True)
            classes = map(str, ids.tolist())
        labels = labels.cpu().numpy()
    classes = () if labels is None else tuple(map(readable, classes))
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
    # One scale for the PCA of all blocks and models, so that distances can be compared.
    reach = max(float(np.abs(t.xy["pca"]).max()) for t in tables.values())
    for table in tables.values():
        table.xy["pca"] = (table.xy["pca"] / max(reach, 1e-12)).astype(np.float32)
    ready = maps.prepared_maps({name: t.graph for name, t in tables.items()})
    for name, xy in (ready or {}).items():
        tables[name].xy["umap"] = xy
    source = ImageSet(pixels, labels, classes, factors)
    return Exploration(pixels, tables, k, labels, classes, factors, sample, source=source)


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
            near = graph.first(k)
            votes_SC = _votes(near.indices.numpy(), near.similarities.numpy(), labels)
            accuracy.append((votes_SC.argmax(1) == labels[sample]).mean())
            own.append(votes_SC[np.arange(len(sample)), labels[sample]].astype(np.float32))
        bar.update()
    last = graphs[-1].indices[:, :k].numpy()
    kept = [_common(g.indices[:, :k].numpy(), last).mean() for g in graphs]
    indices, similarities = zip(*((g.indices, g.similarities) for g in graphs), strict=True)
    graph = Graph(torch.stack(indices), torch.stack(similarities))
    accuracy = np.asarray(accuracy or np.full(len(blocks), np.nan))
    known = accuracy, np.asarray(kept), np.asarray(own), scaling
    return Table(x_LND, blocks, graph, *known, {"pca": np.stack(points)})


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
    """uint8 [N, C, H, W], or images that are read on demand."""
    pixels = pixels_of(images)
    if pixels.dtype != torch.uint8:
        raise UserError(f"images must be uint8 [N, C, H, W], not {pixels.dtype}")
    if len(pixels) < 2:
        raise UserError(f"there is nothing to explore in {len(pixels)} images")
    if len(pixels) > MOST_IMAGES:
        raise UserError(
            f"the explorer shows at most {MOST_IMAGES:,} images, not {len(pixels):,}: take a part "
            f"of the images and of the features, such as the first {MOST_IMAGES:,}"
        )
    return pixels


def _features(features, n: int, kind: str | None) -> dict[str, tuple[Tensor, tuple[int, ...]]]:
    """By model [L, N, D] float32 on the CPU, and the blocks' numbers."""
    if isinstance(features, Features) or not isinstance(features, Mapping):
        features = {"model": features}
    if not features:
        raise UserError('there are no features: give them by model, {"before": …, "after": …}')
    found = {}
    for name, given in features.items():
        whole = isinstance(given, Features)
        x = (given[kind] if kind else given.main) if whole else given
        x = x if isinstance(x, Tensor) else as_features(x, f"features {name!r}")
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
        found[readable(name)] = x.detach().float().cpu(), tuple(blocks)
    return found


def _check_finite(name: str, x_LND: Tensor) -> None:
    for number, x_ND in enumerate(x_LND, start=1):
        bad = (~x_ND.isfinite()).any(1).nonzero()[:, 0]
        if len(bad):
            raise UserError(
                f"the features {name!r} hold NaN or infinity in block {number}, first at image "
                f"{int(bad[0])}: extract them again, or leave those images out"
            )
