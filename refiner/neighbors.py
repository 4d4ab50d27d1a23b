"""Exact nearest neighbors by cosine similarity, and what is read off them: votes and agreement.

The search is a matrix product in float32 followed by top-k, a chunk of queries at a time. It keeps
a few more candidates than asked for, computes their similarities again in float64, and checks that
no key outside of the candidates can belong to the result, given the largest error that float32 can
have made. Queries that fail the check (many keys nearly as close as the k-th) are searched in
float64 throughout. So the result is that of a float64 search at the speed of float32, and neither
the chunk size nor the order of the sums can change it.

Shape legend: L blocks of a model, Q queries, K keys, D width, k neighbors, C candidates or classes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tqdm.auto import tqdm

Tensor = torch.Tensor
TIE = 2.0**-38  # similarities closer than this (4e-12) are ties; float64 errs by less than 1e-13
SPARE = 8  # candidates beyond k
NEVER = -2.0  # below every cosine
# A CPU chunk below 32 MiB comes from reused memory; larger ones cost a page fault every 4 KiB.
CHUNK_BYTES = {"cpu": 2**24, "cuda": 2**29}


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
    n_keys, n_usable = keys.shape[-2], keys.shape[-2] - exclude_self
    if exclude_self and queries.shape[-2] != n_keys:
        raise ValueError(
            f"exclude_self needs queries and keys of the same images, not {queries.shape[-2]} "
            f"queries and {n_keys} keys"
        )
    if not 1 <= k <= n_usable:
        raise ValueError(f"k={k} neighbors asked for, but there are {n_usable} keys to choose from")
    home, device = queries.device, _device(device, queries)
    search = _Search(k, exclude_self, normalize, chunk)
    blocks = [(queries, keys)] if queries.ndim == 2 else list(zip(queries, keys, strict=True))
    with (
        _full_precision(device),
        tqdm(total=len(blocks) * queries.shape[-2], desc="neighbors", unit="query",
             disable=not progress) as bar,
    ):  # fmt: skip
        found = [search(q.to(device), x.to(device), bar) for q, x in blocks]
    indices, similarities = ([x.to(home) for x in part] for part in zip(*found, strict=True))
    if queries.ndim == 2:
        return Graph(indices[0], similarities[0])
    return Graph(torch.stack(indices), torch.stack(similarities))


@dataclass(frozen=True)
class _Search:
    k: int
    exclude_self: bool
    normalize: bool
    chunk: int | None

    def __call__(self, q_QD: Tensor, x_KD: Tensor, bar: tqdm) -> tuple[Tensor, Tensor]:
        """Indices int64 [Q, k] and similarities float32 [Q, k]."""
        n_queries, (n_keys, dim) = len(q_QD), x_KD.shape
        # Dividing by these makes every score a cosine, or a dot product shrunk to at most one.
        q_scale, x_scale = _norms(q_QD, "queries"), _norms(x_KD, "keys")
        if not self.normalize:
            x_scale = x_scale.amax().expand(n_keys)
        q_unit, x_unit = (
            x.float() / s[:, None].float() for x, s in ((q_QD, q_scale), (x_KD, x_scale))
        )
        n_candidates = min(self.k + SPARE, n_keys)
        # Largest error of a float32 dot product of rounded unit vectors, any order of summation.
        doubt = (dim + 8) * 2.0**-24 + TIE
        indices = torch.empty(n_queries, self.k, dtype=torch.int64, device=q_QD.device)
        scores = torch.empty(n_queries, self.k, dtype=torch.float64, device=q_QD.device)
        sure = torch.ones(n_queries, dtype=torch.bool, device=q_QD.device)

        step = self.chunk or _chunk_rows(q_QD.device, n_keys * 4 + n_candidates * dim * 8)
        for start in range(0, n_queries, step):
            rows = slice(start, start + step)
            rough_QK = q_unit[rows] @ x_unit.T
            itself = torch.arange(start, start + len(rough_QK), device=q_QD.device)[:, None]
            if self.exclude_self:
                rough_QK.scatter_(1, itself, NEVER)
            rough_QC, some_QC = rough_QK.topk(n_candidates, dim=1)
            exact_QC = _exact(q_QD[rows], x_KD, some_QC, q_scale[rows], x_scale)
            if self.exclude_self:
                exact_QC.masked_fill_(some_QC == itself, NEVER)
            indices[rows], scores[rows] = _best(exact_QC, some_QC, self.k, n_keys)
            if n_candidates < n_keys:
                sure[rows] = scores[rows, -1] > rough_QC[:, -1].double() + doubt
            bar.update(len(rough_QK))

        unsure = (~sure).nonzero()[:, 0]
        step = self.chunk or _chunk_rows(q_QD.device, n_keys * 24)
        for rows in unsure.split(step) if len(unsure) else ():
            exact_QK = self._float64_scores(q_QD, x_KD, rows, q_scale, x_scale)
            every = torch.arange(n_keys, device=rows.device).expand_as(exact_QK)
            indices[rows], _ = _best(exact_QK, every, self.k, n_keys)
            scores[rows] = _exact(q_QD[rows], x_KD, indices[rows], q_scale[rows], x_scale)
        if not self.normalize:
            scores *= q_scale[:, None] * x_scale[0]
        return indices, scores.float()

    def _float64_scores(self, q_QD, x_KD, rows, q_scale, x_scale) -> Tensor:
        """Scores of some queries with all keys, by products in float64, [rows, K]."""
        q = q_QD[rows].double() / q_scale[rows, None]
        # The keys are widened a part at a time: all of them in float64 might not fit.
        parts = zip(x_KD.split(8192), x_scale.split(8192), strict=True)
        exact = torch.cat([q @ (x.double() / s[:, None]).T for x, s in parts], dim=1)
        if self.exclude_self:
            exact.scatter_(1, rows[:, None], NEVER)
        return exact


def _norms(x_ND: Tensor, name: str) -> Tensor:
    """Lengths [N] in float64; zero vectors get a harmless length instead."""
    # In parts: widening all of x would cost more memory and time than the lengths.
    norms = torch.cat([torch.linalg.vector_norm(x.double(), dim=1) for x in x_ND.split(1024)])
    if not norms.isfinite().all():
        raise ValueError(f"the {name} hold NaN or infinity")
    return norms.clamp_min(1e-12)


def _exact(q_QD: Tensor, x_KD: Tensor, some_QC: Tensor, q_scale: Tensor, x_scale: Tensor) -> Tensor:
    """Scores of each query with its own candidates in float64, [Q, C]."""
    # index_select, as x_KD[some_QC] is six times slower on a CPU.
    x_QCD = x_KD.index_select(0, some_QC.flatten()).view(*some_QC.shape, x_KD.shape[1]).double()
    products_QCD = x_QCD.mul_(q_QD.double()[:, None])
    # A plain sum, unlike a matrix product, treats every pair alike: duplicates tie to the bit.
    return products_QCD.sum(-1) / (q_scale[:, None] * x_scale[some_QC])


def _best(scores_QC: Tensor, some_QC: Tensor, k: int, n_keys: int) -> tuple[Tensor, Tensor]:
    """The k best candidates, ties to the lowest index: indices and scores [Q, k].

    Score (as a multiple of TIE) and index are packed into one whole number, so top-k meets no
    ties, which it would break as it likes.
    """
    packed_QC = (scores_QC / TIE).round().to(torch.int64) * n_keys + (n_keys - 1 - some_QC)
    where = packed_QC.topk(k, dim=1).indices
    return some_QC.gather(1, where), scores_QC.gather(1, where)


def _chunk_rows(device: torch.device, bytes_a_row: int) -> int:
    return max(1, CHUNK_BYTES.get(device.type, CHUNK_BYTES["cpu"]) // bytes_a_row)


def _device(device: str | torch.device | None, like: Tensor) -> torch.device:
    if device is None:
        return torch.device("cuda") if torch.cuda.is_available() else like.device
    return torch.device(device)


@contextmanager
def _full_precision(device: torch.device) -> Iterator[None]:
    """No gradients, and float32 products that are float32: no autocast, no TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


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


def knn_accuracy(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    k: int | Sequence[int] = 10,
    temperature: float = 0.07,
    standardize: bool = True,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Tensor:
    """Accuracy of a weighted k-NN classifier on every block.

    Features are standardised by the train set, neighbors found by cosine, and each votes for its
    class with weight exp(similarity / temperature) (Wu et al. 2018, arXiv 1805.01978; the
    standardisation follows MIM-Refiner).

    Args:
        train_x: [N, D], or [L, N, D] for L blocks.
        train_y: int64 [N], classes from 0.
        test_x: [Q, D] or [L, Q, D].
        test_y: int64 [Q].
        k: number of neighbors, or a list of numbers, all answered from one search.
        temperature: of the votes; large values weigh all neighbors alike.
        standardize: shift and scale each feature by the train set's mean and standard deviation,
            block by block; features that are constant on the train set are left out.
        chunk, device, progress: see :func:`nearest_neighbors`.

    Returns:
        float32 shares of correct predictions on the CPU: [L] for [L, N, D], a scalar for [N, D];
        with a list of k a leading axis is added, [K, L] or [K]. Of classes with equal votes the
        lowest wins.

    Raises:
        ValueError: for shapes or lengths that do not match, labels that are not classes, k larger
            than N, or features that are not finite.
    """
    ks = [k] if isinstance(k, int) else list(k)
    _check_labels(test_y, test_x, "test")
    if not ks:
        raise ValueError("k must be a number or a list of at least one")
    ascending = sorted(set(ks))
    correct = []
    for graph, labels in _block_graphs(
        train_x, train_y, test_x, ascending[-1], standardize, chunk, device, progress
    ):
        votes = _votes(graph, labels, ascending, temperature)
        truth = test_y.to(graph.indices.device)
        right = {k: (v.argmax(-1) == truth).double().mean() for k, v in votes}
        correct.append(torch.stack([right[k] for k in ks]))
    scores = torch.stack(correct, dim=1).float().cpu()  # [K, L]
    scores = scores[:, 0] if train_x.ndim == 2 else scores
    return scores[0] if isinstance(k, int) else scores


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
    """Votes and predictions of the classifier of :func:`knn_accuracy`, which takes the same.

    Returns:
        Votes float32 [L, Q, C], a query's adding up to 1, and predicted classes int64 [L, Q], both
        on the CPU; without the L for features of [N, D]. C is the largest train label plus one.

    Raises:
        ValueError: as :func:`knn_accuracy`.
    """
    votes, predictions = [], []
    for graph, labels in _block_graphs(
        train_x, train_y, test_x, k, standardize, chunk, device, progress
    ):
        ((_, votes_QC),) = _votes(graph, labels, [k], temperature)
        predictions.append(votes_QC.argmax(-1).cpu())
        votes.append((votes_QC / votes_QC.sum(-1, keepdim=True)).float().cpu())
    if train_x.ndim == 2:
        return votes[0], predictions[0]
    return torch.stack(votes), torch.stack(predictions)


def _block_graphs(train_x, train_y, test_x, k, standardize, chunk, device, progress):
    """Yields each block's graph of test images among train images, and the labels, on the device.

    A block at a time, so that standardised copies and votes of one block only are held.
    """
    _check_features(test_x, train_x)
    _check_labels(train_y, train_x, "train")
    device = _device(device, test_x)
    blocks = [(train_x, test_x)] if train_x.ndim == 2 else zip(train_x, test_x, strict=True)
    total = 1 if train_x.ndim == 2 else len(train_x)
    for train, test in tqdm(blocks, total=total, desc="k-NN", unit="block", disable=not progress):
        train, test = train.to(device), test.to(device)
        if standardize:
            train, test = standardized(train, test)
        graph = nearest_neighbors(test, train, k=k, chunk=chunk, device=device)
        yield graph, train_y.to(device)


@torch.no_grad()
def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both sets [N, D] and [Q, D] shifted and scaled by the train set's mean and deviation.

    Returns:
        float32. Features that are constant on the train set, up to float32 rounding, become zero
        on both: there is no scale to measure them by.
    """
    std, mean = torch.std_mean(train.double(), dim=0, correction=0)
    scale = torch.where(std > 1e-7 * mean.abs(), 1 / std, 0)
    return tuple(((x.double() - mean) * scale).float() for x in (train, test))


def _votes(graph: Graph, labels: Tensor, ascending: Sequence[int], temperature: float):
    """Yields (k, votes [Q, C]) for each k; every next one adds to the votes of the one before."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    similarities = graph.similarities.double()
    # Divided by the nearest neighbor's weight: the same winners, and no overflow.
    weights_Qk = ((similarities - similarities[:, :1]) / temperature).exp()
    classes_Qk = labels[graph.indices]
    votes_QC = weights_Qk.new_zeros(len(weights_Qk), int(labels.max()) + 1)
    start = 0
    for k in ascending:
        votes_QC.scatter_add_(1, classes_Qk[:, start:k], weights_Qk[:, start:k])
        yield k, votes_QC
        start = k


def _check_labels(labels: Tensor, features: Tensor, name: str) -> None:
    if labels is None:
        raise ValueError(f"the {name} images have no labels")
    n = features.shape[-2]
    if labels.shape != (n,):
        raise ValueError(f"{n} {name} features do not match labels of shape {list(labels.shape)}")
    if labels.is_floating_point() or (n and int(labels.min()) < 0):
        raise ValueError(f"the {name} labels must be whole numbers from 0")


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
    query_labels = labels if query_labels is None else query_labels
    if len(query_labels) != graph.indices.shape[-2]:
        raise ValueError(
            f"{len(query_labels)} query labels do not match {graph.indices.shape[-2]} queries"
        )
    if int(graph.indices.max()) >= len(labels):
        raise ValueError(f"the graph names keys beyond the {len(labels)} labels")
    same = labels[graph.indices] == query_labels[:, None]
    return same.double().mean((-2, -1)).float()
