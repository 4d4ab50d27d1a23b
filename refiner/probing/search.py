"""The nearest neighbors of every block, exactly."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import _check_features, _chunk_rows, device_for, full_precision, largest

TIE = 2.0**-38  # similarities closer than this (4e-12) are ties; float64 errs by less than 1e-13
SPARE = 8  # candidates beyond k
NEVER = -2.0  # below every cosine
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
            raise UserError(f"the graph holds {self.k} neighbors, not {k}")
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
            raise UserError(f"the {name} hold NaN or infinity")
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
        from refiner.probing import scan

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
        from refiner.probing import scan

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


def _check_k(k: int, queries: Tensor, keys: Tensor, exclude_self: bool) -> None:
    n_keys, n_usable = keys.shape[-2], keys.shape[-2] - exclude_self
    if exclude_self and queries.shape[-2] != n_keys:
        raise UserError(
            f"exclude_self needs queries and keys of the same images, not {queries.shape[-2]} "
            f"queries and {n_keys} keys"
        )
    if not 1 <= k <= n_usable:
        raise UserError(f"k={k} neighbors asked for, but there are {n_usable} keys to choose from")
