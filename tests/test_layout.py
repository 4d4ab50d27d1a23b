"""Maps: PCA is the textbook's, UMAP keeps neighborhoods of the exact graph."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from refiner.layout import pca_embedding, umap_embedding
from refiner.neighbors import nearest_neighbors


@pytest.fixture(scope="module")
def blobs():
    rng = torch.Generator().manual_seed(0)
    centres = 3 * torch.randn(5, 10, generator=rng)
    return (centres[:, None] + 0.3 * torch.randn(5, 30, 10, generator=rng)).reshape(150, 10)


def test_pca_is_scikit_learns_up_to_sign(blobs):
    ours, theirs = pca_embedding(blobs), PCA(2).fit_transform(blobs.numpy())
    for axis in range(2):
        same = np.abs(ours[:, axis] - theirs[:, axis]).max()
        mirrored = np.abs(ours[:, axis] + theirs[:, axis]).max()
        assert min(same, mirrored) < 1e-3
    assert np.allclose(pca_embedding(blobs + 5.0), ours, atol=1e-3), "centred"


def test_umap_keeps_neighborhoods_repeats_and_starts_where_told(blobs):
    graph = nearest_neighbors(blobs, blobs, k=20, exclude_self=True)
    one = umap_embedding(blobs, graph, seed=3)
    assert np.array_equal(one, umap_embedding(blobs, graph, seed=3))
    random = np.random.default_rng(0).standard_normal((150, 2))
    kept = trustworthiness(blobs.numpy(), one, n_neighbors=10, metric="cosine")
    assert kept > 0.9 > trustworthiness(blobs.numpy(), random, n_neighbors=10, metric="cosine")
    moved = umap_embedding(blobs, graph, seed=3, init=one)
    distance = lambda a, b: np.linalg.norm(a - b, axis=1).mean()  # noqa: E731
    assert distance(one, moved) < distance(one, one[::-1])


def test_a_graph_of_other_points_is_refused(blobs):
    graph = nearest_neighbors(blobs, blobs, k=5, exclude_self=True)
    with pytest.raises(ValueError, match="n_neighbors=15 needs 14 other points"):
        umap_embedding(blobs, graph)
    with pytest.raises(ValueError, match="for 100 points"):
        umap_embedding(blobs[:100], graph, n_neighbors=5)
