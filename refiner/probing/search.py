"""Exact nearest neighbors by cosine similarity: a matrix product and the largest of each row.

Queries are multiplied with all keys, some at a time, in float32, or in float64 if the features are
float64. Every key is compared, so the result is exact up to the rounding of these products: keys
whose similarities differ by less than about 1e-7 may change places. Equal ones come by index.

Shape legend: L blocks, Q queries, K keys, D width, R queries with ties, k neighbors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import chunk_rows, device_for, feature_pair, full_precision, largest

FEWEST_ROWS = 256  # a product of fewer queries would spend its time on reading the keys


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


def nearest_neighbors(
    queries: Tensor,
    keys: Tensor,
    *,
    k: int = 20,
    exclude_self: bool = False,
    normalize: bool = True,
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
        device: where to search; default CUDA if there is one, else where the queries are.
        progress: show a bar.

    Returns:
        A :class:`Graph` on the queries' device, [Q, k] or [L, Q, k]. Products are float32, or
        float64 if queries or keys are; equal neighbors come by index. A zero vector has similarity
        0 to everything.

    Raises:
        ValueError: for shapes that do not match, k larger than the number of keys, or features
            that are not finite.
    """
    queries, keys = feature_pair(queries, keys)
    check_k(k, queries, keys, exclude_self)
    home, device = queries.device, device_for(device, queries)
    found = []
    with tqdm(
        total=queries.shape[:-1].numel(), desc="neighbors", unit="query", disable=not progress
    ) as bar:
        for q, x in [(queries, keys)] if queries.ndim == 2 else zip(queries, keys, strict=True):
            q, x = q.to(device), x.to(device)
            found.append(search(q, x, k, exclude_self=exclude_self, normalize=normalize))
            bar.update(len(q))
    indices, similarities = (torch.stack(part).to(home) for part in zip(*found, strict=True))
    similarities = similarities.float()
    graph = Graph(indices, similarities.clamp_(-1, 1) if normalize else similarities)
    return graph[0] if queries.ndim == 2 else graph


@torch.no_grad()
def search(
    q_QD: Tensor, x_KD: Tensor, k: int, *, exclude_self: bool = False, normalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Indices int64 [Q, k] and products [Q, k] of one block's neighbors."""
    dtype = torch.promote_types(torch.promote_types(q_QD.dtype, x_KD.dtype), torch.float32)
    q_QD, x_KD = q_QD.to(dtype), x_KD.to(dtype)
    if normalize:
        q_QD, x_KD = F.normalize(q_QD, dim=1), F.normalize(x_KD, dim=1)
    n_keys, found = len(x_KD), []
    rows = max(FEWEST_ROWS, chunk_rows(q_QD.device, n_keys * dtype.itemsize))
    buffer = torch.empty(min(rows, len(q_QD)), n_keys, dtype=dtype, device=q_QD.device)

    def scores_of(some: Tensor) -> Tensor:
        """Products [R, K] of some queries with all keys; overwrites those before."""
        scores = torch.mm(q_QD[some], x_KD.T, out=buffer[: len(some)])
        return scores.scatter_(1, some[:, None], -torch.inf) if exclude_self else scores

    with full_precision(q_QD.device):
        for some in torch.arange(len(q_QD), device=q_QD.device).split(rows):
            # One more than k shows whether other keys are as near as the last.
            found.append(largest(scores_of(some), min(k + 1, n_keys)))
        scores, indices = (torch.cat(part) for part in zip(*found, strict=True))
        tied = scores[:, 1:] == scores[:, :-1]
        # Equal scores stand in any order, and of those that tie for the last place any were taken.
        _sort_ties(scores, indices, tied.any(1).nonzero()[:, 0])
        for some in tied[:, k - 1 :].any(1).nonzero()[:, 0].split(rows):
            ordered = scores_of(some).sort(dim=1, descending=True, stable=True)
            scores[some, :k], indices[some, :k] = (part[:, :k] for part in ordered)
    return indices[:, :k], scores[:, :k]


def _sort_ties(scores_Qk: Tensor, indices_Qk: Tensor, some: Tensor) -> None:
    """Sorts some rows by falling score, equal ones by index."""
    by_index, order = indices_Qk[some].sort(dim=1)
    scores, place = scores_Qk[some].gather(1, order).sort(dim=1, descending=True, stable=True)
    scores_Qk[some], indices_Qk[some] = scores, by_index.gather(1, place)


def check_k(k: int, queries: Tensor, keys: Tensor, exclude_self: bool) -> None:
    n_keys, n_usable = keys.shape[-2], keys.shape[-2] - exclude_self
    if exclude_self and queries.shape[-2] != n_keys:
        raise UserError(
            f"exclude_self needs queries and keys of the same images, not {queries.shape[-2]} "
            f"queries and {n_keys} keys"
        )
    if not 1 <= k <= n_usable:
        raise UserError(f"k={k} neighbors asked for, but there are {n_usable} keys to choose from")
