"""Exact nearest neighbors by cosine similarity, and what is read off them: votes and agreement.

The search is a matrix product in float32, a chunk of queries at a time. It keeps every key that can
belong to the result, given the largest error that float32 can have made, and computes the scores of
these candidates again in float64, from the features as they came. Queries with too many candidates
(keys nearly as close as the k-th) are searched in float64 throughout. So the result is that of a
float64 search at the speed of float32, and neither the chunk size nor the order of the sums can
change it.

Large searches on a CPU collect the candidates with the compiled loops of :mod:`refiner.scan`, while
the scores are still in the cache. They meet the keys in random order, expect of the rest what the
first ones showed, and notice where that was wrong; such queries are searched once more. All other
searches take a top-k through the maxima of groups of keys.

Shape legend: L blocks of a model, Q queries, K keys, D width, k neighbors, C candidates or classes,
S several k.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

Tensor = torch.Tensor
TIE = 2.0**-38  # similarities closer than this (4e-12) are ties; float64 errs by less than 1e-13
SPARE = 8  # candidates beyond k
NEVER = -2.0  # below every cosine
GROUP = 16  # keys whose maximum stands for them
# A CPU chunk below 32 MiB comes from reused memory; larger ones cost a page fault every 4 KiB.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}
SCAN = 2**31  # multiplications from which on the compiled loops pay: a tenth of a second
SCAN_KEYS = 512  # keys of one product: a tile of 512 queries takes 1 MiB, in the cache


@dataclass(frozen=True, eq=False)
class Graph:
    """Nearest neighbors of every query, nearest first.

    Attributes:
        indices: int64 [..., Q, k], positions among the keys.
        similarities: float32 [..., Q, k], cosine (or dot product), falling along k.
    """

    indices: Tensor
    similarities: Tensor

    @property
    def k(self) -> int:
        return self.indices.shape[-1]

    def first(self, k: int) -> Graph:
        """The graph of the nearest k only."""
        if not 1 <= k <= self.k:
            raise ValueError(f"the graph holds {self.k} neighbors, not {k}")
        return Graph(self.indices[..., :k], self.similarities[..., :k])

    def __getitem__(self, block: int) -> Graph:
        """One block's graph out of a graph of [L, Q, k]."""
        if self.indices.ndim < 3:
            raise IndexError("the graph is of one block; only graphs of [L, Q, k] are indexed")
        return Graph(self.indices[block], self.similarities[block])


# ---------------------------------------------------------------- search


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    *,
    k: int = 20,
    exclude_self: bool = False,
    normalize: bool = True,
    products: torch.dtype = torch.float32,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Graph:
    """Finds each query's k nearest keys, exactly.

    Args:
        queries: [Q, D], or [L, Q, D] for L blocks at once; any float dtype.
        keys: [K, D] or [L, K, D].
        k: number of neighbors.
        exclude_self: queries and keys are the same images in the same order, and none is its own
            neighbor (leave-one-out). A duplicate of an image still is.
        normalize: cosine similarity; False compares by the plain dot product.
        products: torch.bfloat16 finds the candidates faster on hardware made for it. More of them
            have to be scored again; the result is the same.
        chunk: queries at once; default as many as fit 16 MiB on a CPU and 512 MiB on a GPU.
            Changes memory and speed, not the result.
        device: where to search; default CUDA if there is one, else where the queries are.
        progress: show a bar.

    Returns:
        A :class:`Graph` on the queries' device, [Q, k] or [L, Q, k]. Neighbors are ordered by
        float64 similarity; of those closer than 4e-12 the lowest index comes first. A zero vector
        has similarity 0 to everything.

    Raises:
        ValueError: for shapes that do not match, k larger than the number of keys, or features
            that are not finite.
    """
    _check_features(queries, keys)
    _check_k(k, queries, keys, exclude_self)
    home, device = queries.device, device_for(device, queries)
    search = _Search(k, exclude_self, normalize, products, chunk)
    blocks = [(queries, keys)] if queries.ndim == 2 else list(zip(queries, keys, strict=True))
    with tqdm(total=len(blocks) * queries.shape[-2], desc="neighbors", unit="query",
              disable=not progress) as bar:  # fmt: skip
        found = [search(q.to(device), x.to(device), bar) for q, x in blocks]
    indices = torch.stack([i for i, _ in found]).to(home)
    similarities = torch.stack([s.float() for _, s in found]).to(home)
    graph = Graph(indices, similarities)
    return graph[0] if queries.ndim == 2 else graph


@dataclass(frozen=True)
class _Search:
    """One block's search: ``search(queries, keys)`` gives indices [Q, k], float64 scores [Q, k]."""

    k: int
    exclude_self: bool = False
    normalize: bool = True
    products: torch.dtype = torch.float32
    chunk: int | None = None
    # Subtracted from and multiplied with every vector first, float64 [D] each.
    mean: Tensor | None = None
    scale: Tensor | None = None

    def __call__(self, q_QD: Tensor, x_KD: Tensor, bar: tqdm | None = None):
        n_queries, device = len(q_QD), q_QD.device
        with full_precision(device):
            sides = self.side(q_QD, "queries"), self.side(x_KD, "keys", shared=not self.normalize)
            indices = torch.empty(n_queries, self.k, dtype=torch.int64, device=device)
            scores = torch.empty(n_queries, self.k, dtype=torch.float64, device=device)
            large = device.type == "cpu" and n_queries * x_KD.numel() >= SCAN
            scan = large and self.products == torch.float32 and len(x_KD) >= SCAN_KEYS
            sure = (self.by_scan if scan else self.by_topk)(*sides, indices, scores, bar)
            self.by_float64(*sides, indices, scores, (~sure).nonzero()[:, 0])
        if not self.normalize:
            scores *= sides[0].norm[:, None] * sides[1].norm[0]
        return indices, scores

    def side(self, x_ND: Tensor, name: str, *, shared: bool = False) -> _Side:
        """Queries or keys, with what every score is divided by; ``shared``: the largest norm."""
        x_ND = (x_ND if x_ND.dtype == torch.float64 else x_ND.float()).contiguous()
        norm = torch.empty(len(x_ND), dtype=torch.float64, device=x_ND.device)
        unit = torch.empty(x_ND.shape, dtype=torch.float32, device=x_ND.device)
        # Widening all of x at once would cost more memory and time.
        for x, n, u in zip(*(t.split(512) for t in (x_ND, norm, unit)), strict=True):
            wide = self.wide(x)
            # Zero vectors get a harmless length.
            torch.linalg.vector_norm(wide, dim=1, out=n).clamp_min_(1e-12)
            u.copy_(wide.div_(n[:, None]))
        if not norm.isfinite().all():
            raise ValueError(f"the {name} hold NaN or infinity")
        if shared:
            unit *= (norm / norm.amax()).float()[:, None]
            norm = norm.amax().repeat(len(norm))
        return _Side(x_ND, norm, unit)

    def wide(self, x: Tensor) -> Tensor:
        """The vectors in float64, a copy, shifted and scaled."""
        x = x.to(torch.float64, copy=True)
        return x if self.mean is None else x.sub_(self.mean).mul_(self.scale)

    def doubt(self, dim: int) -> float:
        """Largest error of a product of rounded unit vectors, any order of summation."""
        # bfloat16 rounds both factors and the sum, which is held in float32, by 2^-9 each.
        rounding = 3.1 * 2.0**-9 if self.products == torch.bfloat16 else 0
        return rounding + (dim + 8) * 2.0**-24 + TIE

    def by_topk(self, q: _Side, x: _Side, indices, scores, bar) -> Tensor:
        """Candidates by top-k; fills indices and scores and tells which queries are sure, [Q]."""
        (n_queries, dim), n_keys, device = q.unit.shape, len(x.unit), q.unit.device
        spare = SPARE if self.products == torch.float32 else 3 * self.k + 64
        n_candidates, doubt = min(self.k + spare, n_keys), self.doubt(dim)
        x_unit, q_unit = x.unit.to(self.products), q.unit.to(self.products)
        sure = torch.ones(n_queries, dtype=torch.bool, device=device)
        step = self.chunk or _chunk_rows(device, n_keys * 4)
        for start in range(0, n_queries, step):
            rows = slice(start, start + step)
            rough_QK = q_unit[rows] @ x_unit.T
            itself = torch.arange(start, start + len(rough_QK), device=device)[:, None]
            if self.exclude_self:
                rough_QK.scatter_(1, itself, NEVER)
            rough_QC, some_QC = largest(rough_QK, n_candidates)
            exact_QC = self.exact(q, x, rows, some_QC)
            if self.exclude_self:
                exact_QC.masked_fill_(some_QC == itself, NEVER)
            indices[rows], scores[rows] = _best(exact_QC, some_QC, self.k, n_keys)
            if n_candidates < n_keys:
                sure[rows] = scores[rows, -1] > rough_QC[:, -1].double() + doubt
            _advance(bar, len(rough_QK))
        return sure

    def by_scan(self, q: _Side, x: _Side, indices, scores, bar) -> Tensor:
        """The same, with the compiled loops, a tile of queries and keys at a time."""
        from refiner import scan

        n_queries, n_keys = len(q.unit), len(x.unit)
        step = min(self.chunk or 512, n_queries)
        likely = scan.ranks(self.k, n_keys, SCAN_KEYS)
        tile = _Tile(self, q, x, torch.empty(step * SCAN_KEYS))
        sure = torch.zeros(n_queries, dtype=torch.bool)
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            for rows in torch.arange(n_queries).split(step):
                sure[rows] = tile(rows, likely, indices, scores, pool)
                _advance(bar, len(rows))
            # The few whose best keys came late are searched again, keeping k from the start.
            missed = (~sure).nonzero()[:, 0]
            for rows in missed.split(step) if len(missed) else ():
                sure[rows] = tile(rows, [self.k] * len(likely), indices, scores, pool)
        return sure

    def by_float64(self, q: _Side, x: _Side, indices, scores, unsure: Tensor) -> None:
        """Fills in the queries that float32 could not decide, by products in float64."""
        n_keys, device = len(x.unit), unsure.device
        step = self.chunk or _chunk_rows(device, n_keys * 24)
        for rows in unsure.split(step) if len(unsure) else ():
            some = self.wide(q.x[rows]) / q.norm[rows, None]
            # The keys are widened a part at a time: all of them in float64 might not fit.
            parts = zip(x.x.split(8192), x.norm.split(8192), strict=True)
            exact_QK = torch.cat([some @ (self.wide(y) / n[:, None]).T for y, n in parts], dim=1)
            if self.exclude_self:
                exact_QK.scatter_(1, rows[:, None], NEVER)
            every = torch.arange(n_keys, device=device).expand_as(exact_QK)
            indices[rows], _ = _best(exact_QK, every, self.k, n_keys)
            scores[rows] = self.exact(q, x, rows, indices[rows])

    def exact(self, q: _Side, x: _Side, rows, some_QC: Tensor) -> Tensor:
        """Scores of some queries with their own candidates in float64, [Q, C]."""
        wide_QD, norm_Q, parts = self.wide(q.x[rows]), q.norm[rows, None], []
        step = _chunk_rows(some_QC.device, some_QC.shape[1] * wide_QD.shape[1] * 8)
        for start in range(0, len(some_QC), step):
            part = slice(start, start + step)
            # index_select, as x[some] is six times slower on a CPU.
            x_QCD = self.wide(x.x.index_select(0, some_QC[part].flatten()))
            products_QCD = x_QCD.view(*some_QC[part].shape, -1).mul_(wide_QD[part, None])
            # A plain sum, unlike a matrix product, treats every pair alike: duplicates tie to the
            # bit.
            parts.append(products_QCD.sum(-1) / (norm_Q[part] * x.norm[some_QC[part]]))
        return torch.cat(parts)


@dataclass(frozen=True)
class _Side:
    """Queries or keys of a search.

    Attributes:
        x: [N, D] as they came, float32 or float64.
        norm: float64 [N], lengths (shifted and scaled), or one number for all.
        unit: float32 [N, D], divided by them.
    """

    x: Tensor
    norm: Tensor
    unit: Tensor


class _Tile:
    """Searches some queries among all keys with the compiled loops, SCAN_KEYS keys at a time."""

    def __init__(self, search: _Search, q: _Side, x: _Side, scores: Tensor):
        dim = q.unit.shape[1]
        self.k, self.exclude_self, self.q, self.x = search.k, search.exclude_self, q, x
        self.slack = np.float32(2.02 * search.doubt(dim))  # a little more: limits are float32 too
        self.shift = torch.zeros(dim, dtype=torch.float64) if search.mean is None else search.mean
        self.factor = torch.ones_like(self.shift) if search.scale is None else search.scale
        # In random order the first parts of the keys tell what the others will be like.
        self.order = torch.randperm(len(x.unit), generator=torch.Generator().manual_seed(0))
        self.place = self.order.argsort()
        self.unit_KD, self.scores = x.unit.index_select(0, self.order), scores

    def __call__(self, rows: Tensor, ranks: list[int], indices, scores, pool) -> Tensor:
        """Fills in these rows of indices and scores, and tells which of them are sure."""
        from refiner import scan

        n, room = len(rows), 2 * self.k + 16 * scan.STRIDE
        found = (
            np.full(n, -1.5, np.float32), np.zeros(n, np.int64),
            np.empty((n, room), np.float32), np.empty((n, room), np.int32),
        )  # fmt: skip
        q_QD = self.q.unit[rows]
        bases = range(0, len(self.unit_KD), SCAN_KEYS)
        for base, rank in zip(bases, ranks, strict=True):
            keys = self.unit_KD[base : base + SCAN_KEYS]
            rough_QB = torch.mm(q_QD, keys.T, out=self.scores[: n * len(keys)].view(n, -1))
            if self.exclude_self:
                _leave_out(rough_QB, self.place[rows] - base)
            _shared(pool, n, scan.collect, rough_QB.numpy(), base, rank, self.slack, *found)
        best, exact = torch.empty(n, self.k, dtype=torch.int64), torch.empty(n, self.k).double()
        features = (self.q.x[rows], self.x.x, self.q.norm[rows], self.x.norm)
        features = [t.numpy() for t in (*features, self.shift, self.factor, self.order.int())]
        _shared(pool, n, scan.finish, *features, self.k, self.slack, TIE, *found,
                best.numpy(), exact.numpy())  # fmt: skip
        indices[rows], scores[rows] = best, exact
        return torch.from_numpy(found[1] >= 0)


def largest(scores_QK: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their keys: those of the k groups with the largest maxima."""
    n_keys = scores_QK.shape[1]
    n_groups = n_keys // GROUP
    if n_groups < 2 * k:
        return scores_QK.topk(k, dim=1)
    grouped = scores_QK[:, : n_groups * GROUP].unflatten(1, (GROUP, n_groups))
    groups_Qk = grouped.amax(1).topk(k, dim=1, sorted=False).indices
    members = torch.arange(GROUP, device=scores_QK.device) * n_groups
    some = (groups_Qk[:, :, None] + members).flatten(1)
    rest = torch.arange(n_groups * GROUP, n_keys, device=scores_QK.device)
    some = torch.cat([some, rest.expand(len(some), -1)], dim=1)
    top, where = scores_QK.gather(1, some).topk(k, dim=1)
    return top, some.gather(1, where)


def _best(scores_QC: Tensor, some_QC: Tensor, k: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """The k best candidates, ties to the lowest index: indices and scores [Q, k].

    Score (as a multiple of TIE) and index are packed into one whole number, so top-k meets no
    ties, which it would break as it likes.
    """
    packed_QC = (scores_QC / TIE).round().to(torch.int64) * n_keys + (n_keys - 1 - some_QC)
    where = packed_QC.topk(k, dim=1).indices
    return some_QC.gather(1, where), scores_QC.gather(1, where)


def _leave_out(scores_QB: Tensor, itself: Tensor) -> None:
    """Query i is key itself[i] of this tile, if it is in it; no key of its own."""
    i = ((itself >= 0) & (itself < scores_QB.shape[1])).nonzero()[:, 0]
    scores_QB[i, itself[i]] = NEVER


def _shared(pool: ThreadPoolExecutor, n: int, loop, *arguments) -> None:
    """Runs a compiled loop over rows 0 to n, shared among the pool's threads."""
    threads = torch.get_num_threads()
    if threads == 1:  # another thread may be on another core, with a cold cache
        loop(*arguments, 0, n)
        return
    cuts = np.linspace(0, n, threads + 1).astype(int).tolist()
    list(pool.map(lambda a, b: loop(*arguments, a, b), cuts[:-1], cuts[1:]))


def _advance(bar: tqdm | None, n: int) -> None:
    if bar is not None:
        bar.update(n)


def _chunk_rows(device: torch.device, bytes_a_row: int) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // bytes_a_row)


def device_for(device: str | torch.device | None, like: Tensor) -> torch.device:
    """The device asked for; by default a GPU if there is one, else where ``like`` is."""
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else like.device
    return torch.device(device)


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 products that are float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    matmul = torch.backends.cuda.matmul
    reduced = matmul.allow_bf16_reduced_precision_reduction
    torch.set_float32_matmul_precision("highest")
    matmul.allow_bf16_reduced_precision_reduction = False
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.allow_bf16_reduced_precision_reduction = reduced


def _check_k(k: int, queries: Tensor, keys: Tensor, exclude_self: bool) -> None:
    n_keys, n_usable = keys.shape[-2], keys.shape[-2] - exclude_self
    if exclude_self and queries.shape[-2] != n_keys:
        raise ValueError(
            f"exclude_self needs queries and keys of the same images, not {queries.shape[-2]} "
            f"queries and {n_keys} keys"
        )
    if not 1 <= k <= n_usable:
        raise ValueError(f"k={k} neighbors asked for, but there are {n_usable} keys to choose from")


def _check_features(queries: Tensor, keys: Tensor) -> None:
    match = (
        queries.ndim == keys.ndim
        and queries.ndim in (2, 3)
        and queries.shape[-1] == keys.shape[-1]
        and queries.shape[:-2] == keys.shape[:-2]
    )
    if not match:
        raise ValueError(
            "features must be [N, D] or [L, N, D] with the same D and L, not "
            f"{list(queries.shape)} and {list(keys.shape)}"
        )
    if keys.shape[-2] >= 2**24:
        raise ValueError(f"at most {2**24 - 1} keys can be searched, not {keys.shape[-2]}")
    for name, x in (("queries", queries), ("keys", keys)):
        if not x.is_floating_point():
            raise ValueError(f"features must be floats, but the {name} are {x.dtype}")


# ---------------------------------------------------------------- k-NN classification


@dataclass(frozen=True, eq=False)
class KNNReport:
    """What a k-NN classifier says of every block; [S] stands first if a list of S k was asked for.

    Attributes:
        accuracy: float32 [S, L], share of correct predictions.
        predictions: int64 [S, L, Q].
        votes: float32 [S, L, Q, C], a query's adding up to 1; None if not kept.
        confusion: int64 [S, L, C, C], test images by class (row) and prediction (column).
        graph: the neighbors, [L, Q, largest k], cosines of the standardised features. Of a
            leave-one-out report it goes to :func:`refiner.layout.umap_embedding` as it is.

    Everything lies on the CPU and lacks the axis L for features of [N, D].
    """

    accuracy: Tensor
    predictions: Tensor
    votes: Tensor | None
    confusion: Tensor
    graph: Graph

    @property
    def class_accuracy(self) -> Tensor:
        """Share of correct predictions by class, float32 [S, L, C]; NaN for absent classes."""
        return (self.confusion.diagonal(dim1=-2, dim2=-1) / self.confusion.sum(-1)).float()


def knn_report(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor | None = None,
    test_y: Tensor | None = None,
    *,
    k: int | Sequence[int] = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    keep_votes: bool = True,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> KNNReport:
    """All that a weighted k-NN classifier tells about every block, from one search.

    Features are standardised by the train set, neighbors found by cosine, and each votes for its
    class with weight exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978; the
    standardisation follows MIM-Refiner). Everything equals a float64 computation on the features
    as given; of classes with equal votes the lowest wins.

    Args:
        train_x: [N, D], or [L, N, D] for L blocks.
        train_y: integers [N], classes from 0.
        test_x: [Q, D] or [L, Q, D]. Without it the train images are classified by each other, none
            by itself (leave-one-out).
        test_y: integers [Q].
        k: number of neighbors, or a list of numbers.
        temperature: of the votes; large values weigh all neighbors alike.
        standardize: shift and scale each feature by the train set's mean and standard deviation,
            block by block; features that are constant on the train set are left out.
        keep_votes: votes take 4 bytes for each of S · L · Q · C.
        chunk, device, progress: see :func:`nearest_neighbors`.

    Returns:
        A :class:`KNNReport`. C is the largest label plus one.

    Raises:
        ValueError: for shapes or lengths that do not match, labels that are not classes, k larger
            than N, or features that are not finite.
    """
    test_y = _test_labels(train_y, test_x, test_y)
    ks, ascending = _several(k)
    test_y = check_labels(test_y, train_x if test_x is None else test_x, "test")
    train_y = check_labels(train_y, train_x, "train")
    n_classes = int(max(train_y.max(), test_y.max())) + 1
    truth = test_y.cpu()
    found = []
    for indices, scores, labels in _block_neighbors(
        train_x, train_y, test_x, ascending[-1], standardize, chunk, device, progress
    ):
        votes, predicted = classify(
            indices, scores, labels, ascending, temperature, n_classes if keep_votes else None
        )
        found.append((predicted, votes, indices.cpu(), scores.float().cpu()))
    order = [ascending.index(k) for k in ks]
    predictions = torch.stack([p for p, *_ in found], dim=1)[order]  # [S, L, Q]
    votes = torch.stack([v for _, v, *_ in found], dim=1)[order] if keep_votes else None
    cells = (truth * n_classes + predictions).flatten(0, 1)  # [S L, Q]
    confusion = torch.stack([torch.bincount(c, minlength=n_classes**2) for c in cells])
    confusion = confusion.view(len(ks), len(found), n_classes, n_classes)
    accuracy = (predictions == truth).double().mean(-1).float()
    parts = [accuracy, predictions, votes, confusion]
    if not isinstance(k, Sequence):
        parts = [None if x is None else x[0] for x in parts]
    if train_x.ndim == 2:
        axis = 1 if isinstance(k, Sequence) else 0
        parts = [None if x is None else x.squeeze(axis) for x in parts]
    graph = Graph(torch.stack([i for *_, i, _ in found]), torch.stack([s for *_, s in found]))
    return KNNReport(*parts, graph[0] if train_x.ndim == 2 else graph)


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor | None = None,
    test_y: Tensor | None = None,
    *,
    k: int | Sequence[int] = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """Accuracy of a weighted k-NN classifier on every block; see :func:`knn_report` for the rest.

    Returns:
        float32 shares of correct predictions on the CPU: [L] for [L, N, D], a scalar for [N, D];
        with a list of S k a leading axis is added, [S, L] or [S].

    Raises:
        ValueError: as :func:`knn_report`.
    """
    test_y = _test_labels(train_y, test_x, test_y)
    ks, ascending = _several(k)
    test_y = check_labels(test_y, train_x if test_x is None else test_x, "test")
    correct = []
    for indices, scores, labels in _block_neighbors(
        train_x, train_y, test_x, ascending[-1], standardize, chunk, device, progress
    ):
        _, predicted = classify(indices, scores, labels, ascending, temperature, None)
        correct.append((predicted == test_y.cpu()).double().mean(-1).float())
    accuracy = torch.stack(correct, dim=1)[[ascending.index(k) for k in ks]]  # [S, L]
    accuracy = accuracy[:, 0] if train_x.ndim == 2 else accuracy
    return accuracy if isinstance(k, Sequence) else accuracy[0]


def knn_predict(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    *,
    k: int = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Votes and predictions for images without labels; see :func:`knn_report` for the rest.

    Returns:
        Votes float32 [L, Q, C], a query's adding up to 1, and predicted classes int64 [L, Q], both
        on the CPU; without the L for features of [N, D]. C is the largest train label plus one.

    Raises:
        ValueError: as :func:`knn_report`.
    """
    found = [
        classify(indices, scores, labels, [k], temperature, int(labels.max()) + 1)
        for indices, scores, labels in _block_neighbors(
            train_x, train_y, test_x, k, standardize, chunk, device, progress
        )
    ]
    votes, predictions = (torch.stack(part, dim=1)[0] for part in zip(*found, strict=True))
    return (votes[0], predictions[0]) if train_x.ndim == 2 else (votes, predictions)


def _several(k: int | Sequence[int]) -> tuple[list[int], list[int]]:
    """As a list, and sorted without repeats."""
    ks = list(k) if isinstance(k, Sequence) else [k]
    if not ks:
        raise ValueError("k must be a number or a list of at least one")
    return ks, sorted(set(ks))


def _test_labels(train_y: Tensor, test_x: Tensor | None, test_y: Tensor | None) -> Tensor | None:
    if test_x is None and test_y is not None:
        raise ValueError("test labels without test features; leave both out for leave-one-out")
    return train_y if test_x is None else test_y


def _block_neighbors(train_x, train_y, test_x, k, standardize, chunk, device, progress):
    """Yields each block's neighbors: indices [Q, k], float64 scores [Q, k], and the labels.

    A block at a time, on the device, so that copies and votes of one block only are held.
    """
    alone = test_x is None
    test_x = train_x if alone else test_x
    _check_features(test_x, train_x)
    train_y = check_labels(train_y, train_x, "train")
    _check_k(k, test_x, train_x, alone)
    device = device_for(device, test_x)
    blocks = [(train_x, test_x)] if train_x.ndim == 2 else zip(train_x, test_x, strict=True)
    total = 1 if train_x.ndim == 2 else len(train_x)
    for train, test in tqdm(blocks, total=total, desc="k-NN", unit="block", disable=not progress):
        train, test = train.to(device), test.to(device)
        how = mean_and_scale(train) if standardize else (None, None)
        if standardize and not how[0].isfinite().all():  # it would make NaN of the queries
            raise ValueError("the train features hold NaN or infinity")
        search = _Search(k, alone, chunk=chunk, mean=how[0], scale=how[1])
        yield *search(test, train), train_y.to(device)


@torch.no_grad()
def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets [N, D] and [Q, D] shifted and scaled by the train set's mean and deviation.

    Returns:
        float32. Features that are constant on the train set, up to float32 rounding, become zero
        on both: there is no scale to measure them by.
    """
    mean, scale = mean_and_scale(train)
    return tuple(((x.double() - mean) * scale).float() for x in (train, test))


def mean_and_scale(x_ND: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and inverse deviation of every feature, float64 [D]."""
    parts = x_ND.split(512)  # in the cache
    mean = sum(x.sum(0, dtype=torch.float64) for x in parts) / len(x_ND)
    variance = sum((x.double() - mean).square_().sum(0) for x in parts) / len(x_ND)
    std = variance.sqrt()
    return mean, torch.where(std > 1e-7 * mean.abs(), 1 / std, 0)


def classify(indices, scores, labels, ascending, temperature: float, n_classes: int | None):
    """Votes float32 [S, Q, C] (None without n_classes) and predictions int64 [S, Q], on the CPU."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    width = n_classes or int(labels.max()) + 1
    step = _chunk_rows(indices.device, 8 * width * (1 + len(ascending)))
    votes, predictions = [], []
    for some, close in zip(indices.split(step), scores.split(step), strict=True):
        # Divided by the nearest neighbor's weight: the same winners, and no overflow.
        weights_Qk = ((close - close[:, :1]) / temperature).exp()
        classes_Qk = labels[some]
        votes_QC = weights_Qk.new_zeros(len(weights_Qk), width)
        start, winners, shares = 0, [], []
        for k in ascending:  # each adds to the votes of the one before
            votes_QC.scatter_add_(1, classes_Qk[:, start:k], weights_Qk[:, start:k])
            winners.append(votes_QC.argmax(1))
            if n_classes:
                shares.append((votes_QC / votes_QC.sum(1, keepdim=True)).float())
            start = k
        predictions.append(torch.stack(winners).cpu())
        votes += [torch.stack(shares).cpu()] if n_classes else []
    return torch.cat(votes, dim=1) if n_classes else None, torch.cat(predictions, dim=1)


def check_labels(labels: Tensor, features: Tensor, name: str) -> Tensor:
    """Labels as int64, where small integers would overflow; they may be an array or a list.

    Raises:
        ValueError: unless they are integers from 0, one a feature.
    """
    if labels is None:
        raise ValueError(f"the {name} images have no labels")
    labels, n = torch.as_tensor(labels), features.shape[-2]
    if labels.shape != (n,):
        raise ValueError(f"{n} {name} features do not match labels of shape {list(labels.shape)}")
    if labels.is_floating_point() or (n and int(labels.long().min()) < 0):
        raise ValueError(
            f"the {name} labels must be whole numbers from 0, integers, not {labels.dtype}"
        )
    return labels.long()


# ---------------------------------------------------------------- what a graph tells


def neighbor_agreement(a: Graph, b: Graph) -> Tensor:
    """Mean share of neighbors that two graphs of the same queries and keys have in common.

    Returns:
        float32, [L] for graphs of [L, Q, k], a scalar for [Q, k]; 0 (none) to 1 (the same sets).

    Raises:
        ValueError: for graphs of different shapes.
    """
    if a.indices.shape != b.indices.shape:
        raise ValueError(
            f"graphs of {list(a.indices.shape)} and {list(b.indices.shape)} cannot be compared"
        )
    if a.indices.ndim == 3:
        return torch.stack([neighbor_agreement(a[l], b[l]) for l in range(len(a.indices))])
    shared_Qk = (a.indices[:, :, None] == b.indices[:, None, :]).any(-1)
    return shared_Qk.double().mean().float()


def neighbor_accuracy(graph: Graph, labels: Tensor, query_labels: Tensor | None = None) -> Tensor:
    """Mean share of neighbors that are of the query's class.

    Args:
        graph: [Q, k] or [L, Q, k].
        labels: the keys' classes, int64 [K].
        query_labels: int64 [Q]; left out when queries and keys are the same images.

    Returns:
        float32, [L] or a scalar.

    Raises:
        ValueError: for labels that do not match the graph.
    """
    labels = torch.as_tensor(labels)
    query_labels = labels if query_labels is None else torch.as_tensor(query_labels)
    if len(query_labels) != graph.indices.shape[-2]:
        raise ValueError(
            f"{len(query_labels)} query labels do not match {graph.indices.shape[-2]} queries"
        )
    if int(graph.indices.max()) >= len(labels):
        raise ValueError(f"the graph names keys beyond the {len(labels)} labels")
    same = labels[graph.indices] == query_labels[:, None]
    return same.double().mean((-2, -1)).float()
