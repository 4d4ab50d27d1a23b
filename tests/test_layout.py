"""Maps of features: faithful to the neighbors, repeatable, and honest about wrong input."""

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from refiner.probing.search import Graph, nearest_neighbors
from refiner.visuals.maps import _with_self_first, pca_embedding, umap_embedding


def clusters(n=120, dim=10, seed=0):
    generator = torch.Generator().manual_seed(seed)
    centres = 4 * torch.randn(6, dim, generator=generator)
    return centres[torch.arange(n) % 6] + torch.randn(n, dim, generator=generator)


def test_pca_equals_scikit_learn():
    x = clusters() * torch.arange(1, 11)
    ours, theirs = pca_embedding(x), PCA(2).fit_transform(x.double().numpy())
    assert np.allclose(ours.abs().numpy(), np.abs(theirs), rtol=1e-4, atol=1e-3)
    assert ours.dtype == torch.float32 and torch.equal(ours, pca_embedding(x))


def test_pca_can_share_its_axes():
    x, y = clusters(), clusters(seed=1)
    assert torch.allclose(pca_embedding(x, axes_of=x), pca_embedding(x))
    both = pca_embedding(torch.cat([x, y]), axes_of=x)
    assert torch.allclose(both[len(x) :], pca_embedding(y, axes_of=x), atol=1e-5)
    # The same point lies at the same place in both maps.
    assert torch.allclose(both[: len(x)], pca_embedding(x), atol=1e-5)


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(5, 1), torch.zeros(0, 4)])
def test_pca_refuses_other_shapes(wrong):
    with pytest.raises(ValueError, match="N, D"):
        pca_embedding(wrong)
    with pytest.raises(ValueError, match="NaN"):
        pca_embedding(torch.full((3, 3), torch.nan))


def test_the_graph_is_cut_and_begins_with_the_image_itself():
    x = clusters(20)
    graph = nearest_neighbors(x, x, k=9, exclude_self=True)
    indices, distances = _with_self_first(graph, 20, 5)
    assert indices.shape == distances.shape == (20, 5)
    assert (indices[:, 0] == np.arange(20)).all() and (distances[:, 0] == 0).all()
    assert (indices[:, 1:] == graph.indices[:, :4].numpy()).all()
    assert np.allclose(distances[:, 1:], 1 - graph.similarities[:, :4], atol=1e-6)
    assert (np.diff(distances, axis=1) >= 0).all()


def test_umap_refuses_what_would_mislead_it():
    x = clusters(20)
    graph = nearest_neighbors(x, x, k=5, exclude_self=True)
    blocks = Graph(graph.indices[None], graph.similarities[None])
    with_itself = nearest_neighbors(x, x, k=5)
    for arguments, options, message in (
        ((x, with_itself), {"n_neighbors": 5}, "exclude_self"),
        ((x, graph), {"n_neighbors": 7}, "≥6"),
        ((x[:9], graph), {"n_neighbors": 5}, r"\[9, ≥4\]"),
        ((x, blocks), {"n_neighbors": 5}, "one block"),
        ((x, graph), {"n_neighbors": 5, "init": x}, "init"),
        ((x,), {"n_neighbors": 21}, "from 2 to the 20"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            umap_embedding(*arguments, **options)


@pytest.mark.filterwarnings("error:precomputed_knn")
@pytest.mark.filterwarnings("error:n_jobs")
def test_umap_keeps_neighbors_repeats_itself_and_starts_where_told():
    x = clusters()
    graph = nearest_neighbors(x, x, k=19, exclude_self=True)
    points = umap_embedding(x, graph, n_neighbors=10, seed=3)
    assert points.shape == (len(x), 2) and points.dtype == torch.float32
    assert torch.equal(points, umap_embedding(x, graph, n_neighbors=10, seed=3))
    assert torch.equal(points, umap_embedding(x, n_neighbors=10, seed=3))  # the same graph, inside

    shuffled = points[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))]
    kept = trustworthiness(x, points, n_neighbors=10, metric="cosine")
    assert kept > 0.8 > trustworthiness(x, shuffled, n_neighbors=10, metric="cosine") + 0.2

    # From a mirrored start comes a mirrored map: every cluster stays on its side.
    turned = umap_embedding(x, graph, n_neighbors=10, seed=3, init=-points)
    middle = lambda p: torch.stack([p[i::6].mean(0) for i in range(6)])  # noqa: E731
    agreement = torch.corrcoef(torch.stack([middle(points)[:, 0], middle(turned)[:, 0]]))[0, 1]
    assert agreement < -0.5  # about +1 if the start were ignored
