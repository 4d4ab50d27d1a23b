"""Maps: faithful to the neighbors, repeatable, kept on disk by content, and never NaN."""

import numpy as np
import pytest
import torch
import umap
from sklearn.decomposition import PCA
from sklearn.manifold import trustworthiness

from refiner.probing.search import Graph, nearest_neighbors
from refiner.visuals import maps
from refiner.visuals.maps import _with_self_first, pca_embedding, umap_embedding

N, L = 40, 3


# ---------------------------------------------------------------- one map


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


@pytest.mark.parametrize("wrong", [torch.zeros(5), torch.zeros(5, 1), torch.zeros(1, 4)])
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
    ):
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


def equal_and_constant():
    generator = torch.Generator().manual_seed(0)
    line = torch.randn(N, 1, generator=generator)
    return {
        "constant": torch.ones(N, 6),
        "zero": torch.zeros(N, 6),
        "rank 1": line @ torch.randn(1, 6, generator=generator),
        "one feature": torch.cat([line, torch.zeros(N, 5)], dim=1),
        "two images, repeated": torch.randn(2, 6, generator=generator)[torch.arange(N) % 2],
    }


@pytest.mark.parametrize("kind", equal_and_constant())
def test_features_that_hardly_differ_have_finite_maps(kind, monkeypatch, tmp_path):
    monkeypatch.setenv("REFINER_CACHE", str(tmp_path))
    x = equal_and_constant()[kind]
    graph = nearest_neighbors(x, x, k=14, exclude_self=True)
    flat = pca_embedding(x)
    assert flat.isfinite().all() and umap_embedding(x, graph, epochs=20).isfinite().all()
    blocks = Graph(graph.indices[None], graph.similarities[None])
    one = {"model": x[None]}, {"model": blocks}, {"model": flat.numpy()}
    found = maps.umap_maps(*one, progress=False)["model"]
    (kept,) = (tmp_path / "maps").iterdir()
    assert np.isfinite(np.load(kept)).all() and np.array_equal(np.load(kept), found[0])


def test_a_map_that_is_not_finite_is_an_error_and_is_not_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("REFINER_CACHE", str(tmp_path))
    monkeypatch.setattr(umap.UMAP, "fit_transform", lambda self, x: np.full((len(x), 2), np.nan))
    with pytest.raises(ValueError, match="no finite places"):
        made(example())
    assert not (tmp_path / "maps").exists()


# ---------------------------------------------------------------- chains


@pytest.fixture
def calls(monkeypatch, tmp_path):
    """UMAP that only notes its calls: a map is its start, moved a little by features and graph."""
    monkeypatch.setenv("REFINER_CACHE", str(tmp_path))
    noted = []

    def embed(x, graph, *, init, epochs, **options):
        noted.append({"graph": graph, "init": init, "epochs": epochs})
        return torch.as_tensor(init) + x[:, :2] / 100 + graph.indices[:, :2] / 1000

    monkeypatch.setattr(maps, "umap_embedding", embed)
    return noted


def example(seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(L, N, 6, generator=generator)
    return x, nearest_neighbors(x, x, k=20, exclude_self=True)


def made(*models, **options):
    names = [f"model {i}" for i in range(len(models))]
    start = np.random.default_rng(0).normal(size=(N, 2))
    return maps.umap_maps(
        {name: x for name, (x, _) in zip(names, models, strict=True)},
        {name: graph for name, (_, graph) in zip(names, models, strict=True)},
        dict.fromkeys(names, start),
        progress=False,
        **options,
    )


def test_each_block_starts_where_the_one_before_ended(calls):
    found = made(example())["model 0"]
    assert found.shape == (L, N, 2) and len(calls) == L
    for block in range(1, L):
        assert np.array_equal(calls[block]["init"], found[block - 1])
    assert [c["epochs"] for c in calls] == [maps.FIRST_EPOCHS, *[maps.NEXT_EPOCHS] * (L - 1)]
    assert all(c["graph"].k == maps.N_NEIGHBORS - 1 for c in calls)
    assert np.abs(found).max() <= 1 + 1e-6


def test_kept_maps_are_not_made_again_and_changed_ones_are(calls):
    first = made(example())["model 0"]
    again = made(example())["model 0"]
    assert np.array_equal(first, again) and len(calls) == L
    made(example(), seed=1)
    assert len(calls) == 2 * L
    x, graph = example()
    changed = graph.indices.clone()
    changed[1, 0, :2] = changed[1, 0, :2].flip(0)
    made((x, Graph(changed, graph.similarities)))
    assert len(calls) == 2 * L + 2, "block 1 is known, 2 has another graph, 3 another start"
    made(example(), cache=False)
    assert len(calls) == 3 * L + 2


def test_blocks_that_two_models_share_are_made_once(calls):
    a, (x, graph) = example(), example(1)
    x = torch.cat([a[0][:2], x[2:]])
    graph = Graph(
        *(
            torch.cat([p[:2], q[2:]])
            for p, q in ((a[1].indices, graph.indices), (a[1].similarities, graph.similarities))
        )
    )
    found = made(a, (x, graph))
    assert len(calls) == L + 1
    assert np.array_equal(found["model 0"][:2], found["model 1"][:2])
    assert not np.array_equal(found["model 0"][2], found["model 1"][2])


def test_a_damaged_map_is_made_again(calls, tmp_path):
    first = made(example())["model 0"]
    files = sorted((tmp_path / "maps").iterdir())
    assert len(files) == L
    files[0].write_bytes(files[0].read_bytes()[:100])
    np.save(files[1], np.full((N, 2), np.nan))
    with pytest.warns(UserWarning, match="damaged"):
        again = made(example())["model 0"]
    assert np.array_equal(first, again) and len(calls) == L + 2


def test_a_folder_that_cannot_be_written_is_no_obstacle(calls, tmp_path):
    (tmp_path / "maps").write_text("a file where the folder should be")
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert made(example())["model 0"].shape == (L, N, 2)


def test_progress_is_reported_with_an_estimate(calls):
    seen = []
    made(example(), example(1), report=lambda *now: seen.append(now))
    assert [done for done, _, _ in seen] == list(range(1, 2 * L + 1))
    assert {total for _, total, _ in seen} == {2 * L} and seen[-1][2] == 0
    assert all(left >= 0 for _, _, left in seen)


def test_framed_keeps_the_shape():
    xy = np.random.default_rng(0).normal(size=(N, 2)) * [3, 1] + 5
    ours = maps.framed(xy)
    assert np.abs(ours).max() == pytest.approx(1) and ours.min(0) == pytest.approx(-ours.max(0))
    span = xy.max(0) - xy.min(0)
    assert np.allclose(ours, (xy - xy.min(0) - span / 2) * 2 / span.max(), atol=1e-6)
    assert np.isfinite(maps.framed(np.zeros((4, 2)))).all()


def test_a_prepared_map_is_recognised_although_some_neighbors_differ(monkeypatch, tmp_path):
    monkeypatch.setattr(maps, "data_folder", lambda: tmp_path)
    maps._prepared_file.cache_clear()
    _, graph = example()
    signatures = np.stack([maps.signature(graph[i]) for i in range(L)])
    stored = np.round(np.random.default_rng(0).uniform(-1, 1, (L, N, 2)) * 32767).astype(np.int16)
    (tmp_path / "maps").mkdir()
    np.savez(tmp_path / "maps" / f"toybox_test_{N}.npz", signatures=signatures, maps=stored)
    rounded = graph.indices.clone()
    rounded[:, :2, 0] = (rounded[:, :2, 0] + 1) % N
    swapped = [2, 0, 1]
    found = maps.prepared_maps({"a": Graph(rounded[swapped], graph.similarities)})
    assert np.allclose(found["a"], stored[swapped] / 32767, atol=1e-6)
    rounded[1, :9, 0] = (rounded[1, :9, 0] + 1) % N
    assert maps.prepared_maps({"a": graph, "b": Graph(rounded, graph.similarities)}) is None
    _, others = example(1)
    assert maps.prepared_maps({"a": others}) is None
    maps._prepared_file.cache_clear()
