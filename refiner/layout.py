"""Features as points in the plane: UMAP on our exact neighbors, and PCA.

UMAP shows who is whose neighbor, and bends everything else to show it: distances between groups
and the size of a group mean little. PCA is a plain projection: instant, faithful, less telling.

Shape legend: N images, D width of the features, k neighbors.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from refiner.neighbors import Graph, nearest_neighbors

Tensor = torch.Tensor


@torch.no_grad()
def pca_embedding(features: Tensor, *, axes_of: Tensor | None = None) -> Tensor:
    """Projects features onto the two directions in which they vary most.

    Args:
        features: [N, D].
        axes_of: other features [M, D] whose directions and mean are used, so that several sets
            share one map; default the features themselves.

    Returns:
        float32 [N, 2], in the features' unit. The sign of each axis, which is free, is chosen such
        that its largest weight is positive.

    Raises:
        ValueError: for features that are not [N, D] with D at least 2, or not finite.
    """
    base = features if axes_of is None else axes_of
    for x in (features, base):
        if x.ndim != 2 or x.shape[1] < 2 or x.shape[1] != base.shape[1] or len(x) == 0:
            raise ValueError(f"features must be [N, D] with D at least 2, not {list(x.shape)}")
        if not x.isfinite().all():
            raise ValueError("the features hold NaN or infinity")
    mean, axes_D2 = pca_axes(base)
    return ((features.double() - mean) @ axes_D2).float()


@torch.no_grad()
def pca_axes(features: Tensor) -> tuple[Tensor, Tensor]:
    """Mean float64 [D] and the two directions of most variance, float64 [D, 2], of [N, D]."""
    mean = features.double().mean(0)
    centred = features.double() - mean
    _, vectors_DD = torch.linalg.eigh(centred.T @ centred)  # ascending
    axes_D2 = vectors_DD[:, -2:].flip(1)
    largest = axes_D2.abs().argmax(0)
    return mean, axes_D2 * axes_D2[largest, torch.arange(2, device=largest.device)].sign()


def umap_embedding(
    features: Tensor,
    graph: Graph | None = None,
    *,
    n_neighbors: int = 15,
    seed: int = 0,
    init: Tensor | np.ndarray | None = None,
    min_dist: float = 0.1,
    epochs: int | None = None,
) -> Tensor:
    """Lays images out such that neighbors stay neighbors (McInnes et al. 2018, arXiv 1802.03426).

    Args:
        features: [N, D].
        graph: their nearest neighbors among themselves, [N, ≥ n_neighbors - 1], searched with
            ``exclude_self=True``; default searched here.
        n_neighbors: how many neighbors count, the image itself included, as in umap-learn. Few
            show fine structure, many the large one.
        seed: of the optimisation. The same seed gives the same points on one machine; other
            machines round differently and differ in detail.
        init: where the points start, [N, 2]; default the PCA. Start a map from that of the block
            before, and the same groups stay about where they were.
        min_dist: how close points may come in the map.
        epochs: rounds of optimisation; default umap-learn's, 500 up to 10,000 images and 200
            beyond. A map that starts from a good one needs fewer.

    Returns:
        float32 [N, 2], no unit.

    Raises:
        ValueError: for a graph of other images, with too few neighbors or with images that are
            their own neighbors, or an init that is not [N, 2].
    """
    n = len(features)
    if not 2 <= n_neighbors <= n:
        raise ValueError(f"n_neighbors must be from 2 to the {n} images, not {n_neighbors}")
    if graph is None:
        graph = nearest_neighbors(features, features, k=n_neighbors - 1, exclude_self=True)
    indices, distances = _with_self_first(graph, n, n_neighbors)
    start = pca_embedding(features) if init is None else torch.as_tensor(init)
    if start.shape != (n, 2):
        raise ValueError(f"init must be [{n}, 2], not {list(start.shape)}")

    import umap  # takes many seconds, so only when it is needed

    mapper = umap.UMAP(
        n_neighbors=n_neighbors, min_dist=min_dist, metric="cosine", random_state=seed,
        n_jobs=1,  # a seed allows no more
        n_epochs=epochs,
        init=start.detach().cpu().numpy().astype(np.float32),
        precomputed_knn=(indices, distances),
    )  # fmt: skip
    with warnings.catch_warnings():
        # New images could not be added to the map. Nobody asks for that.
        warnings.filterwarnings("ignore", message="precomputed_knn.*NNDescent")
        points = mapper.fit_transform(features.detach().cpu().float().numpy())
    return torch.from_numpy(np.ascontiguousarray(points, dtype=np.float32))


def _with_self_first(graph: Graph, n: int, n_neighbors: int) -> tuple[np.ndarray, np.ndarray]:
    """The graph as umap-learn wants it: [N, n_neighbors], each image its own first neighbor.

    Cut to size here, because umap-learn (0.5.12) uses surplus columns below 4096 images.
    """
    indices, similarities = graph.indices.cpu(), graph.similarities.cpu()
    if indices.ndim != 2 or len(indices) != n or graph.k < n_neighbors - 1:
        raise ValueError(
            f"the graph is {list(indices.shape)}, but [{n}, ≥{n_neighbors - 1}] is needed: one "
            "block's neighbors of all images"
        )
    itself = torch.arange(n)[:, None]
    if (indices == itself).any():
        raise ValueError("the graph must leave out the images themselves: exclude_self=True")
    others = slice(n_neighbors - 1)
    indices = torch.cat([itself, indices[:, others]], dim=1)
    distances = torch.cat([torch.zeros(n, 1), 1 - similarities[:, others].float()], dim=1)
    return indices.numpy(), distances.clamp_min(0).numpy()
