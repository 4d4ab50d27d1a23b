"""Maps of every block: chained, kept on disk by content, and recognised by their neighbors."""

import numpy as np
import pytest
import torch

from refiner.probing.search import Graph, nearest_neighbors
from refiner.visuals import maps

N, L = 40, 3


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
        dict.fromkeys(names, start), progress=False, **options,
    )  # fmt: skip


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
    graph = Graph(*(torch.cat([p[:2], q[2:]]) for p, q in (
        (a[1].indices, graph.indices), (a[1].similarities, graph.similarities))))  # fmt: skip
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
