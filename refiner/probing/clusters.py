"""k-means of every block, and how well its clusters match classes.

The k-means is our own, as all restarts of a block share one product: scikit-learn's takes 1.7 to
3.1 times as long (1,000 to 10,000 images, 10 to 100 clusters, one thread of an AMD EPYC) and cannot
work on a GPU.

Shape legend: L blocks, N images, D width, k clusters, R restarts, A of them still moving, T trials.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import (
    chunk_rows,
    class_labels,
    device_for,
    full_precision,
    in_kind,
    standardized,
)
from refiner.probing.measures import check_sets


@dataclass(frozen=True, eq=False)
class KMeans:
    """The best restart of every block.

    Attributes:
        assignments: int64 [L, N], a cluster of each image, 0 to k - 1.
        centers: float32 [L, k, D], the means of their images.
        inertia: float64 [L], sum of squared distances to the centers.
    """

    assignments: Tensor
    centers: Tensor
    inertia: Tensor


def kmeans(
    x: Tensor,
    k: int,
    *,
    restarts: int = 10,
    seed: int = 0,
    max_iter: int = 300,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> KMeans:
    """k-means of every block, all restarts of a block at once, in float32.

    Greedy k-means++ starts (Arthur & Vassilvitskii 2007, with 2 + log k trials a center, as in
    scikit-learn), then Lloyd's steps until no image changes its cluster. An empty cluster moves to
    the image that is farthest from its own center.

    Args:
        x: [L, N, D] or [N, D].
        k: number of clusters.
        restarts: independent starts; the one of lowest inertia is kept.
        seed: of the starts, the same for every block.
        max_iter: largest number of Lloyd steps.
        device: where to work; default CUDA if there is one, else where x is.
        progress: show a bar over blocks.

    Returns:
        :class:`KMeans` on the CPU, without the axis L for [N, D]. With fewer distinct images than
        k some clusters stay empty.

    Raises:
        ValueError: as :func:`refiner.rankme`, or for a k that is not from 1 to N.
    """
    x, k = check_sets(x), int(k)
    n = x.shape[-2]
    if not 1 <= k <= n:
        raise UserError(f"k={k} clusters asked for, but there are {n} images")
    if restarts < 1 or max_iter < 1:
        raise UserError(f"restarts and max_iter must be at least 1, not {restarts}, {max_iter}")
    device = device_for(device, x)
    blocks = x if x.ndim == 3 else x[None]
    with full_precision(device):
        found = [
            _one_block(block.to(device), k, restarts, seed, max_iter)
            for block in tqdm(blocks, desc="k-means", unit="block", disable=not progress)
        ]
    parts = [torch.stack(part).cpu() for part in zip(*found, strict=True)]
    return KMeans(*(parts if x.ndim == 3 else (part[0] for part in parts)))


def _one_block(x_ND: Tensor, k: int, restarts: int, seed: int, max_iter: int):
    """The fields of :class:`KMeans` for one block."""
    x_ND = x_ND.double()
    mean = x_ND.mean(0)
    scale = (x_ND - mean).norm(dim=1).max().clamp_min(1e-300)
    x_ND = ((x_ND - mean) / scale).float()  # centred and scaled, float32 rounds least
    centers_RkD = _plus_plus(x_ND, k, restarts, seed)
    assigned_RN = torch.full((restarts, len(x_ND)), -1, device=x_ND.device)
    moving = torch.arange(restarts, device=x_ND.device)
    for _ in range(max_iter):
        nearest_AN = _nearest(x_ND, centers_RkD[moving])
        moved = (nearest_AN != assigned_RN[moving]).any(1)
        assigned_RN[moving] = nearest_AN
        moving = moving[moved]
        if not len(moving):
            break
        centers_RkD[moving] = _means(x_ND, assigned_RN[moving], centers_RkD[moving])
    inertia_R = torch.stack(
        [
            (x_ND - centers[assigned]).square().sum(dtype=torch.float64)
            for centers, assigned in zip(centers_RkD, assigned_RN, strict=True)
        ]
    )
    best = int(inertia_R.argmin())
    centers = (centers_RkD[best] * scale + mean).float()
    return assigned_RN[best], centers, inertia_R[best] * scale**2


def _nearest(x_ND: Tensor, centers_AkD: Tensor) -> Tensor:
    """The nearest center of each image, [A, N]."""
    (a, k, _), flat = centers_AkD.shape, centers_AkD.flatten(0, 1)
    half = flat.square().sum(1) / 2
    rows = chunk_rows(x_ND.device, 4 * len(flat))
    # ‖x - c‖² = ‖x‖² - 2 (x·c - ‖c‖²/2)
    parts = [torch.addmm(-half, x, flat.T).view(-1, a, k).argmax(-1) for x in x_ND.split(rows)]
    return torch.cat(parts).T


def _means(x_ND: Tensor, assigned_AN: Tensor, centers_AkD: Tensor) -> Tensor:
    """The means of the clusters' images; empty ones move to the images farthest from theirs."""
    a, k, _ = centers_AkD.shape
    counts_Ak = x_ND.new_zeros(a, k, dtype=torch.int64)
    counts_Ak.scatter_add_(1, assigned_AN, torch.ones_like(assigned_AN))
    starts = counts_Ak.flatten().cumsum(0) - counts_Ak.flatten()
    by_cluster = assigned_AN.argsort(dim=1).flatten()
    means = F.embedding_bag(by_cluster, x_ND, starts, mode="mean").view_as(centers_AkD)
    for r in (counts_Ak == 0).any(1).nonzero()[:, 0]:
        empty = (counts_Ak[r] == 0).nonzero()[:, 0]
        means[r, empty] = centers_AkD[r, empty]
        far, images = (x_ND - means[r, assigned_AN[r]]).norm(dim=1).sort(descending=True)
        images = images[: len(empty)][far[: len(empty)] > 0]
        means[r, empty[: len(images)]] = x_ND[images]
    return means


def _plus_plus(x_ND: Tensor, k: int, restarts: int, seed: int) -> Tensor:
    """Greedy k-means++: of a few draws by squared distance, the one that lowers the sum most."""
    n, trials = len(x_ND), 2 + int(math.log(k))
    # Drawn by restart first: more restarts leave the earlier ones as they are.
    draws_RkT = torch.from_numpy(np.random.default_rng(seed).random((restarts, k, trials)))
    draws_RkT = draws_RkT.to(x_ND.device)
    squares, every = x_ND.square().sum(1), torch.arange(restarts, device=x_ND.device)
    chosen = [(draws_RkT[:, 0, 0] * n).long()]
    closest_RN = torch.full((restarts, n), torch.inf, device=x_ND.device)
    for step in range(k):
        if step:
            ladder = closest_RN.double().cumsum(1)
            some_RT = torch.searchsorted(ladder, draws_RkT[:, step] * ladder[:, -1:])
            some_RT = some_RT.clamp_max(n - 1)
        else:
            some_RT = chosen.pop()[:, None]
        c = x_ND[some_RT.flatten()]
        far = torch.addmm(squares, c, x_ND.T, alpha=-2).add_(squares[some_RT].view(-1, 1))
        far_RTN = far.clamp_min_(0).view(restarts, -1, n)
        far_RTN = torch.minimum(far_RTN, closest_RN[:, None])
        best = far_RTN.sum(2, dtype=torch.float64).argmin(1)
        closest_RN = far_RTN[every, best]
        chosen.append(some_RT[every, best])
    return x_ND[torch.stack(chosen, dim=1)]


# ---------------------------------------------------------------- clusters against classes


@in_kind
def clustering(
    x: Tensor,
    labels: Tensor,
    *,
    k: int | None = None,
    restarts: int = 10,
    seed: int = 0,
    standardize: bool = True,
    normalize: bool = True,
    assignments: Tensor | None = None,
    sample: int = 5000,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """How well k-means clusters of every block match classes, and how well they are separated.

    Compare only the same images and k: every one of the scores shifts with N, k and the balance
    of classes, except that AMI and ARI are 0 for random clusters.

    Args:
        x: [L, N, D] or [N, D].
        labels: int64 [N], classes from 0; seen by the scores only.
        k: number of clusters; default the number of classes that occur.
        restarts, seed, device, progress: see :func:`kmeans`.
        standardize: scale each feature to deviation 1 first, as k-NN does.
        normalize: scale each image's features to unit length, after that.
        assignments: clusters int64 [L, N] to be scored instead of running k-means.
        sample: of how many random images the silhouette is taken at most; it costs N².

    Returns:
        A dict of float32 [L] (or scalars) on the CPU: "acc" (accuracy of the best one-to-one
        matching of clusters and classes, Hungarian method), "nmi" and "ami" (normalised and
        adjusted mutual information), "ari" (adjusted Rand index), "silhouette", and
        "davies_bouldin" (lower is better separated). The last two do not know the classes and are
        NaN where there is a single cluster.

    Raises:
        ValueError: as :func:`kmeans`, or for labels or assignments that do not match.
    """
    x = check_sets(x)
    labels = class_labels(labels, x, "clustered")
    assignments = None if assignments is None else torch.as_tensor(assignments)
    if assignments is not None and assignments.shape != x.shape[:-1]:
        raise UserError(
            f"assignments of {list(assignments.shape)} do not match features {list(x.shape)}"
        )
    blocks = x if x.ndim == 3 else x[None]
    if standardize:
        blocks = torch.stack([standardized(a, a[:1])[0] for a in blocks])
    if normalize:
        blocks = F.normalize(blocks.float(), dim=-1)
    if assignments is None:
        k = len(labels.unique()) if k is None else k
        found = kmeans(blocks, k, restarts=restarts, seed=seed, device=device, progress=progress)
        assignments = found.assignments
    truth = labels.cpu().numpy()
    clusters = assignments.cpu().numpy().reshape(len(blocks), -1)
    rows = [
        _agreement(truth, c) | _separation(a.cpu().numpy(), c, sample)
        for a, c in zip(blocks, clusters, strict=True)
    ]
    scores = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return scores if x.ndim == 3 else {name: score[0] for name, score in scores.items()}


def _agreement(truth: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(truth, clusters)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "acc": float(matched / len(truth)),
        "nmi": metrics.normalized_mutual_info_score(truth, clusters),
        "ami": metrics.adjusted_mutual_info_score(truth, clusters),
        "ari": metrics.adjusted_rand_score(truth, clusters),
    }


def _separation(x_ND: np.ndarray, clusters: np.ndarray, sample: int) -> dict[str, float]:
    from sklearn import metrics

    some = np.sort(np.random.default_rng(0).permutation(len(x_ND))[:sample])
    kinds, few = len(np.unique(clusters)), len(np.unique(clusters[some]))
    silhouette = davies_bouldin = math.nan
    if 2 <= few < len(some):
        silhouette = float(metrics.silhouette_score(x_ND[some], clusters[some]))
    if 2 <= kinds < len(x_ND):
        davies_bouldin = float(metrics.davies_bouldin_score(x_ND, clusters))
    return {"silhouette": silhouette, "davies_bouldin": davies_bouldin}
