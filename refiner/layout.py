"""Flat maps of a feature space: PCA at once, UMAP from our exact neighbor graph.

Shape legend: N points, D features, k neighbors.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch

from refiner.neighbors import Graph

Tensor = torch.Tensor


def pca_embedding(features: Tensor) -> np.ndarray:
    """The two directions of largest variance, float32 [N, 2], with a fixed sign.

    Args:
        features: [N, D].
    """
    x_ND = features.double() - features.double().mean(0)
    _, _, v_DD = torch.linalg.svd(x_ND, full_matrices=False)
    axes_2D = v_DD[:2]
    # A direction's sign is arbitrary: let its largest entry be positive.
    largest = axes_2D.gather(1, axes_2D.abs().argmax(1, keepdim=True))
    return (x_ND @ (axes_2D * largest.sign()).T).float().numpy()


def umap_embedding(
    features: Tensor,
    graph: Graph,
    *,
    n_neighbors: int = 15,
    seed: int = 0,
    min_dist: float = 0.1,
    init: np.ndarray | None = None,
) -> np.ndarray:
    """UMAP (McInnes et al. 2018, arXiv 1802.03426) from an exact graph, float32 [N, 2].

    Args:
        features: [N, D], the points of the graph.
        graph: of ``nearest_neighbors(x, x, k=…, exclude_self=True)``, at least n_neighbors - 1
            neighbors a point.
        n_neighbors: neighbors that shape the map; the point itself counts, as in umap-learn.
        seed: fixes the map on one machine; coordinates differ between systems.
        min_dist: how close points may come.
        init: [N, 2] to start from, such as another map; default umap-learn's spectral start.

    Returns:
        Coordinates [N, 2].

    Raises:
        ValueError: when the graph is of other points or has too few neighbors.
    """
    n = len(features)
    if len(graph.indices) != n or graph.indices.shape[1] < n_neighbors - 1:
        raise ValueError(
            f"the graph has {list(graph.indices.shape)} neighbors for {n} points; "
            f"n_neighbors={n_neighbors} needs {n_neighbors - 1} other points each"
        )
    itself = torch.arange(n)[:, None]
    indices = torch.cat([itself, graph.indices.cpu()[:, : n_neighbors - 1]], dim=1).numpy()
    distances = (1 - graph.similarities.cpu()[:, : n_neighbors - 1]).clamp(min=0)
    distances = torch.cat([torch.zeros(n, 1), distances], dim=1).numpy().astype(np.float32)
    import umap  # slow: compiles its kernels

    with warnings.catch_warnings():
        # It warns that a seed means one thread, and that a given graph cannot transform new points.
        warnings.simplefilter("ignore")
        mapper = umap.UMAP(
            n_neighbors=n_neighbors, min_dist=min_dist, metric="cosine", random_state=seed,
            n_jobs=1, init="spectral" if init is None else np.asarray(init, dtype=np.float32),
            precomputed_knn=(indices.astype(np.int64), distances),
        )  # fmt: skip
        return mapper.fit_transform(features.cpu().numpy())
