"""The search against float64 references, and the classifier against scikit-learn."""

import math

import numpy as np
import pandas
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler, normalize

import refiner
from refiner.base import tensors
from refiner.base.errors import UserError
from refiner.base.tensors import standardized
from refiner.probing import search
from refiner.probing.neighbors import (
    knn_accuracy,
    knn_predict,
    knn_report,
    knn_swept,
    neighbor_agreement,
)
from refiner.probing.search import Graph, nearest_neighbors

TIE = 2.0**-38  # closer than this (4e-12) float64 similarities are equal


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def reference(queries, keys, k, *, exclude_self=False, unit=True):
    """A slow loop in float64: similarities to multiples of TIE, then by index."""
    rows, values = [], []
    for i, q in enumerate(queries.double().numpy()):
        found = []
        for j, x in enumerate(keys.double().numpy()):
            if exclude_self and i == j:
                continue
            length = max(math.sqrt(q @ q), 1e-12) * max(math.sqrt(x @ x), 1e-12) if unit else 1
            s = float((q * x).sum()) / length
            found.append((-round(s / TIE), j, s))
        found.sort()
        rows.append([j for _, j, _ in found[:k]])
        values.append([s for _, _, s in found[:k]])
    return torch.tensor(rows), torch.tensor(values, dtype=torch.float64)


SETS = {
    "random": (normal(30, 8), normal(60, 8, seed=1)),
    # All vectors nearly the same: float32 cannot tell the neighbors apart.
    "crowded": (100 + 0.01 * normal(30, 8), 100 + 0.01 * normal(60, 8, seed=1)),
    # Every key twenty times: exact ties everywhere.
    "duplicates": (normal(30, 8), normal(3, 8, seed=1).repeat(20, 1)),
    "constant": (torch.ones(30, 8), torch.ones(60, 8)),
    "zeros": (torch.zeros(30, 8), normal(60, 8, seed=1)),
    "wild scales": (
        normal(30, 8) * 10.0 ** torch.arange(-15, 15)[:, None],
        normal(60, 8, seed=1) * 10.0 ** torch.arange(-6, 6).repeat(5)[:, None],
    ),
    "few keys": (normal(30, 8), normal(9, 8, seed=1)),
    "float64": (normal(30, 8).double(), normal(60, 8, seed=1).double()),
}


@pytest.fixture(params=["topk", "groups"])
def way(request, monkeypatch):
    """Both ways to the largest scores, at a size that a loop can follow."""
    if request.param == "groups":
        monkeypatch.setattr(tensors, "GROUPED_KEYS", 0)
        monkeypatch.setattr(tensors, "GROUP", 3)


@pytest.mark.parametrize("name", SETS)
@pytest.mark.parametrize("k", [1, 7])
def test_neighbors_equal_a_float64_loop(name, k, way):
    queries, keys = SETS[name]
    indices, similarities = reference(queries, keys, k)
    graph = nearest_neighbors(queries.double(), keys.double(), k=k)
    assert torch.equal(graph.indices, indices)
    assert torch.allclose(graph.similarities, similarities.float(), atol=1e-7)
    assert graph.similarities.dtype == torch.float32 and graph.indices.dtype == torch.int64
    # In float32 a key may take the place of another that is as near but for its rounding.
    graph = nearest_neighbors(queries, keys, k=k)
    assert torch.equal(graph.indices, indices) or name == "crowded"
    assert torch.allclose(graph.similarities, similarities.float(), atol=2e-7)
    unit = [torch.nn.functional.normalize(x.double(), dim=1) for x in (queries, keys)]
    exact = (unit[0][:, None] * unit[1][graph.indices]).sum(-1)
    assert torch.allclose(exact, similarities, atol=2e-7)


@pytest.mark.parametrize("name", SETS)
def test_leave_one_out_equals_a_float64_loop_and_never_finds_itself(name, way):
    _, keys = SETS[name]
    indices, similarities = reference(keys, keys, 8, exclude_self=True)
    for x in (keys.double(), keys):
        graph = nearest_neighbors(x, x, k=8, exclude_self=True)
        assert torch.equal(graph.indices, indices) or name == "crowded"
        assert torch.allclose(graph.similarities, similarities.float(), atol=2e-7)
        assert not (graph.indices == torch.arange(len(keys))[:, None]).any()


def test_leave_one_out_may_take_all_the_others_and_no_more():
    keys = normal(9, 4)
    graph = nearest_neighbors(keys, keys, k=8, exclude_self=True)
    assert all(sorted({*row, i}) == list(range(9)) for i, row in enumerate(graph.indices.tolist()))
    with pytest.raises(ValueError, match="k=9 .* 8 keys"):
        nearest_neighbors(keys, keys, k=9, exclude_self=True)


def test_dot_products_equal_a_float64_loop(way):
    queries, keys = SETS["random"]
    graph = nearest_neighbors(queries, keys, k=5, normalize=False)
    indices, similarities = reference(queries, keys, 5, unit=False)
    assert torch.equal(graph.indices, indices)
    assert torch.allclose(graph.similarities, similarities.float(), rtol=1e-6)


@pytest.mark.parametrize("k", [1, 20, 59])
def test_equal_products_come_by_index(k, way):
    """Small whole numbers multiply without rounding, and tie in all places, the last included."""
    generator = torch.Generator().manual_seed(0)
    queries, keys = (torch.randint(-2, 3, (n, 5), generator=generator).float() for n in (40, 60))
    indices, similarities = reference(queries, keys, k, unit=False)
    graph = nearest_neighbors(queries, keys, k=k, normalize=False)
    assert torch.equal(graph.indices, indices)
    assert torch.equal(graph.similarities.double(), similarities)


@pytest.mark.parametrize("name", SETS)
def test_the_chunk_changes_nothing_but_rounding(name, way, monkeypatch):
    queries, keys = SETS[name]
    whole = nearest_neighbors(queries, keys, k=7)
    for rows in (1, 4, 29):
        monkeypatch.setattr(search, "FEWEST_ROWS", rows)
        monkeypatch.setattr(tensors, "CHUNK_BYTES", {"cpu": 1})
        graph = nearest_neighbors(queries, keys, k=7)
        assert torch.equal(graph.indices, whole.indices) or name == "crowded"
        assert torch.allclose(graph.similarities, whole.similarities, atol=2e-7)


@pytest.mark.parametrize("k", [1, 20, 200])
def test_large_searches_equal_float64_products(k):
    """A realistic size, through the maxima of groups; five keys in a hundred are duplicates."""
    queries, keys = normal(300, 64), normal(9000, 64, seed=1)
    keys[:450] = keys[4500:4950]
    assert len(keys) > tensors.GROUPED_KEYS
    graph = nearest_neighbors(queries, keys, k=k)
    unit = [x.double() / x.double().norm(dim=1, keepdim=True) for x in (queries, keys)]
    cosines = unit[0] @ unit[1].T
    indices = ((cosines / TIE).round() * 9000 - torch.arange(9000)).topk(k, dim=1).indices
    # Places differ only where float32 cannot tell the keys apart, which is seldom.
    moved = graph.indices != indices
    assert moved.double().mean() < 1e-3
    found = cosines.gather(1, graph.indices)
    assert torch.allclose(found, cosines.gather(1, indices), atol=1e-7)
    assert torch.allclose(graph.similarities.double(), found, atol=2e-7)
    # Copies that are as near as each other come in order.
    pairs = graph.indices.diff(dim=1)[graph.similarities.diff(dim=1) == 0]
    assert (pairs > 0).all() and (pairs == 4500).any() == (k > 1)


def test_results_do_not_depend_on_reduced_precision_around_them():
    queries, keys = SETS["random"]
    plain = nearest_neighbors(queries, keys, k=7)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16):
            graph = nearest_neighbors(queries, keys, k=7)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(graph.similarities, plain.similarities)


def test_blocks_are_searched_one_by_one():
    queries, keys = normal(3, 20, 8), normal(3, 40, 8, seed=1)
    graph = nearest_neighbors(queries, keys, k=5)
    assert graph.indices.shape == (3, 20, 5)
    for l in range(3):
        alone = nearest_neighbors(queries[l], keys[l], k=5)
        assert torch.equal(graph[l].indices, alone.indices)
        assert torch.equal(graph[l].similarities, alone.similarities)


def test_permuting_and_scaling_the_keys():
    queries, keys = SETS["random"]
    graph = nearest_neighbors(queries, keys, k=7)
    order = torch.randperm(60, generator=torch.Generator().manual_seed(0))
    permuted = nearest_neighbors(queries, keys[order], k=7)
    assert torch.equal(order[permuted.indices], graph.indices)
    # Powers of two scale without rounding.
    scaled = nearest_neighbors(queries * 4, keys * 2.0 ** (torch.arange(60) % 9)[:, None], k=7)
    assert torch.equal(scaled.indices, graph.indices)
    assert torch.allclose(scaled.similarities, graph.similarities, atol=1e-7)


def test_fewer_neighbors_are_a_prefix():
    queries, keys = SETS["random"]
    graph = nearest_neighbors(queries, keys, k=12)
    for k in (1, 5, 12):
        assert torch.equal(graph.first(k).indices, nearest_neighbors(queries, keys, k=k).indices)
    assert (graph.similarities.diff(dim=1) <= 0).all() and graph.k == 12
    with pytest.raises(ValueError, match="holds 12"):
        graph.first(13)
    with pytest.raises(IndexError):
        graph[0]


@pytest.mark.parametrize(
    ("queries", "keys", "options", "message"),
    [
        (normal(4, 8), normal(5, 8), {"k": 6}, "k=6 .* 5 keys"),
        (normal(4, 8), normal(5, 8), {"k": 0}, "k=0"),
        (normal(4, 8), normal(5, 7), {"k": 1}, "same D and L"),
        (normal(2, 4, 8), normal(3, 5, 8), {"k": 1}, "same D and L"),
        (normal(4, 8), normal(1, 5, 8), {"k": 1}, "same D and L"),
        (normal(4, 8).long(), normal(5, 8), {"k": 1}, "floats"),
        (normal(4, 8) / 0, normal(5, 8), {"k": 1}, "queries hold NaN"),
        (normal(4, 8), normal(5, 8) * torch.nan, {"k": 1}, "keys hold NaN"),
        (normal(4, 8), normal(5, 8), {"k": 1, "exclude_self": True}, "same images"),
    ],
)
def test_wrong_searches_are_refused(queries, keys, options, message):
    with pytest.raises(ValueError, match=message):
        nearest_neighbors(queries, keys, **options)


# ---------------------------------------------------------------- classification


def problem(blocks=None, seed=0):
    """Four overlapping classes in features of very different scales."""
    shape = () if blocks is None else (blocks,)
    train_y, test_y = torch.arange(120) % 4, torch.arange(60) % 4
    centres = normal(4, 10, seed=seed + 5)
    scale = 10.0 ** torch.linspace(-2, 2, 10)
    train = (normal(*shape, 120, 10, seed=seed) * 1.5 + centres[train_y]) * scale + 3
    test = (normal(*shape, 60, 10, seed=seed + 1) * 1.5 + centres[test_y]) * scale + 3
    return train, train_y, test, test_y


@pytest.mark.parametrize("k", [1, 10, 120])
@pytest.mark.parametrize("standardize", [True, False])
def test_predictions_equal_scikit_learn(k, standardize, way):
    train_x, train_y, test_x, test_y = problem()
    a, b = train_x.double().numpy(), test_x.double().numpy()
    if standardize:
        scaler = StandardScaler().fit(a)
        a, b = scaler.transform(a), scaler.transform(b)
    theirs = KNeighborsClassifier(
        k, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(normalize(a), train_y.numpy())
    votes, predictions = knn_predict(train_x, train_y, test_x, k=k, standardize=standardize)
    assert predictions.tolist() == theirs.predict(normalize(b)).tolist()
    assert np.allclose(votes.numpy(), theirs.predict_proba(normalize(b)), atol=1e-4)
    accuracy = knn_accuracy(train_x, train_y, test_x, test_y, k=k, standardize=standardize)
    assert accuracy.ndim == 0
    assert float(accuracy) == pytest.approx(theirs.score(normalize(b), test_y.numpy()))


def slow_accuracy(train_x, train_y, test_x, test_y, k, temperature):
    """Image by image in float64."""
    train_x, test_x = train_x.double(), test_x.double()
    mean, std = train_x.mean(0), train_x.std(0, correction=0)
    right = 0
    for x, y in zip((test_x - mean) / std, test_y, strict=True):
        cosines = [float(x @ z / x.norm() / z.norm()) for z in (train_x - mean) / std]
        votes = [0.0] * 4
        for j in sorted(range(len(cosines)), key=lambda j: -cosines[j])[:k]:
            votes[train_y[j]] += math.exp(cosines[j] / temperature)
        right += votes.index(max(votes)) == y
    return right / len(test_y)


def test_several_k_and_blocks_equal_a_slow_loop_each():
    train_x, train_y, test_x, test_y = problem(blocks=2)
    ks = [7, 1, 20, 7]
    scores = knn_accuracy(train_x, train_y, test_x, test_y, k=ks, temperature=0.3)
    assert scores.shape == (4, 2)
    for i, k in enumerate(ks):
        assert torch.equal(
            knn_accuracy(train_x, train_y, test_x, test_y, k=k, temperature=0.3), scores[i]
        )
        for l in range(2):
            slow = slow_accuracy(train_x[l], train_y, test_x[l], test_y, k, 0.3)
            assert float(scores[i, l]) == pytest.approx(slow)
    flat = knn_accuracy(train_x[0], train_y, test_x[0], test_y, k=ks, temperature=0.3)
    assert torch.equal(flat, scores[:, 0])


def test_standardising_undoes_any_scale_and_shift():
    train_x, train_y, test_x, _ = problem()
    scale, shift = 2.0 ** torch.arange(-5, 5), torch.arange(10) - 5.0
    moved = knn_predict(train_x * scale + shift, train_y, test_x * scale + shift)[1]
    assert torch.equal(moved, knn_predict(train_x, train_y, test_x)[1])


def test_the_order_of_the_train_set_does_not_matter():
    train_x, train_y, test_x, _ = problem()
    order = torch.randperm(120, generator=torch.Generator().manual_seed(1))
    votes, predictions = knn_predict(train_x, train_y, test_x, k=15)
    other_votes, other = knn_predict(train_x[order], train_y[order], test_x, k=15)
    assert torch.equal(predictions, other)
    assert torch.allclose(votes, other_votes, atol=1e-5)


def test_constant_features_are_left_out():
    train_x, train_y, test_x, _ = problem()
    # Constant but different on the test set; constant but for float32's last digit.
    noise = torch.where(torch.arange(120) % 2 == 0, 1000.0, 1000.0 + 2**-14)
    more_train = torch.cat([train_x, torch.full((120, 1), 0.1), noise[:, None]], dim=1)
    more_test = torch.cat([test_x, torch.full((60, 1), 7.0), noise[:60, None]], dim=1)
    assert len(noise.unique()) == 2
    votes, predictions = knn_predict(more_train, train_y, more_test)
    expected_votes, expected = knn_predict(train_x, train_y, test_x)
    assert torch.equal(predictions, expected)
    assert torch.allclose(votes, expected_votes, atol=1e-6)
    a, b = standardized(torch.ones(5, 3), torch.zeros(5, 3))
    assert not a.any() and not b.any()
    collapsed = torch.ones(9, 3)
    assert knn_predict(collapsed, torch.arange(9) % 2, collapsed, k=5)[0].isfinite().all()


def test_equal_votes_go_to_the_lowest_class():
    train = torch.eye(4)
    test = torch.ones(1, 4)  # as near to each
    labels = torch.tensor([3, 1, 2, 1])
    for k, winner in ((1, 3), (2, 1), (3, 1), (4, 1)):
        votes, prediction = knn_predict(train, labels, test, k=k, standardize=False)
        assert prediction.tolist() == [winner]
        assert float(votes.sum()) == pytest.approx(1)


def test_extreme_temperatures():
    train_x, train_y, test_x, test_y = problem()
    nearest = knn_predict(train_x, train_y, test_x, k=1)[1]
    votes, cold = knn_predict(train_x, train_y, test_x, k=20, temperature=1e-5)
    assert torch.equal(cold, nearest) and torch.isfinite(votes).all()
    votes, _ = knn_predict(train_x, train_y, test_x, k=20, temperature=1e6)
    assert torch.allclose(votes * 20, (votes * 20).round(), atol=1e-4)  # plain counts
    with pytest.raises(ValueError, match="temperature must be positive"):
        knn_accuracy(train_x, train_y, test_x, test_y, temperature=0)


def test_test_classes_that_the_train_set_lacks_count_as_wrong():
    x = torch.eye(3)
    accuracy = knn_accuracy(
        x, torch.tensor([0, 1, 1]), x, torch.tensor([0, 1, 9]), k=1, standardize=False
    )
    assert float(accuracy) == pytest.approx(2 / 3)


def float64_votes(train_x, train_y, test_x, ks, temperature, itself=False):
    """Votes [S, Q, C] by plain float64 products; ties by index."""
    mean, std = train_x.double().mean(0), train_x.double().std(0, correction=0)
    a, b = (
        torch.nn.functional.normalize((x.double() - mean) / std, dim=1) for x in (test_x, train_x)
    )
    cosines = a @ b.T
    if itself:
        cosines.fill_diagonal_(-torch.inf)
    packed = (cosines / TIE).round().clamp_min(-(2.0**39)) * len(b) - torch.arange(len(b))
    order = packed.topk(max(ks), dim=1).indices
    votes = torch.zeros(len(ks), len(a), int(train_y.max()) + 1, dtype=torch.float64)
    for s, k in enumerate(ks):
        some = order[:, :k]
        weights = (cosines.gather(1, some) / temperature).exp()
        votes[s].scatter_add_(1, train_y[some], weights)
    return votes / votes.sum(-1, keepdim=True)


@pytest.mark.parametrize("itself", [False, True])
def test_predictions_at_a_realistic_size_equal_float64(itself):
    ks = [1, 10, 20, 100, 200]
    labels = torch.randint(0, 10, (4200,), generator=torch.Generator().manual_seed(3))
    centres = normal(10, 48, seed=4)
    train = (centres[labels] + 4 * normal(4200, 48)) * 10.0 ** torch.linspace(-2, 2, 48) + 3
    test, truth = (None, None) if itself else (train[:400] + 1e-3 * normal(400, 48), labels[:400])
    report = knn_report(train, labels, test, truth, k=ks)
    truth = labels if itself else truth
    expected = float64_votes(train, labels, train if itself else test, ks, 0.07, itself)
    assert torch.equal(report.predictions, expected.argmax(-1))
    assert torch.allclose(report.votes.double(), expected, atol=1e-6)
    assert torch.equal(report.accuracy, (expected.argmax(-1) == truth).double().mean(-1).float())
    assert torch.equal(
        knn_accuracy(train, labels, test, None if itself else truth, k=ks), report.accuracy
    )


def test_leave_one_out_never_counts_the_image_itself():
    x, y = normal(40, 5), torch.arange(40)  # each a class of its own
    assert float(knn_accuracy(x, y, k=1)) == 0
    assert float(knn_accuracy(x, y, x, y, k=1)) == 1
    report = knn_report(x, y, k=39)
    assert not (report.graph.indices == torch.arange(40)[:, None]).any()
    with pytest.raises(ValueError, match="k=40 .* 39 keys"):
        knn_report(x, y, k=40)
    with pytest.raises(ValueError, match="leave both out"):
        knn_report(x, y, None, y)


def test_a_report_agrees_with_itself_and_with_the_parts():
    train_x, train_y, test_x, test_y = problem(blocks=2)
    test_y = test_y.clone()
    test_y[0] = 6  # a class that the train set lacks; class 4 and 5 occur nowhere
    ks = [20, 3]
    report = knn_report(train_x, train_y, test_x, test_y, k=ks)
    assert report.votes.shape == (2, 2, 60, 7) and report.confusion.shape == (2, 2, 7, 7)
    assert torch.equal(report.predictions, report.votes.argmax(-1))
    assert torch.equal(report.accuracy, knn_accuracy(train_x, train_y, test_x, test_y, k=ks))
    for s, k in enumerate(ks):
        votes, predictions = knn_predict(train_x, train_y, test_x, k=k)
        assert torch.equal(report.predictions[s], predictions)
        assert torch.equal(report.votes[s, ..., :4], votes) and not report.votes[s, ..., 4:].any()
        for l in range(2):
            for a in range(7):
                for b in range(7):
                    cell = (test_y == a) & (predictions[l] == b)
                    assert int(report.confusion[s, l, a, b]) == int(cell.sum())
    shares = report.class_accuracy
    assert shares[..., 4:6].isnan().all() and (shares[..., 6] == 0).all()
    weights = torch.bincount(test_y, minlength=7) / 60
    assert torch.allclose((shares.nan_to_num() * weights).sum(-1), report.accuracy)
    a, b = standardized(train_x[1], test_x[1])
    graph = nearest_neighbors(b, a, k=20)
    assert torch.equal(report.graph[1].indices, graph.indices)
    assert torch.allclose(report.graph[1].similarities, graph.similarities, atol=1e-6)


@pytest.mark.parametrize("standardize", [True, False])
def test_a_sweep_chooses_on_train_alone_and_scores_as_the_choice_does(standardize):
    """Against one leave-one-out and one test score for each k and temperature."""
    x, y, z, t = problem(blocks=2)
    ks, temperatures = [200, 20, 1, 5], [0.05, 2.0]  # 200 are more than there are
    how = {"standardize": standardize}
    found = knn_swept(x, y, z, t, k=ks, temperatures=temperatures, **how)
    for block in range(2):
        cells = [(k, heat) for k in (1, 5, 20) for heat in temperatures]
        own = [knn_accuracy(x[block], y, k=k, temperature=heat, **how) for k, heat in cells]
        k, heat = cells[int(torch.stack(own).argmax())]
        assert found.k[block] == k and found.temperature[block] == pytest.approx(heat)
        score = knn_accuracy(x[block], y, z[block], t, k=k, temperature=heat, **how)
        assert found.accuracy[block] == score
        one = knn_swept(x[block], y, z[block], t, k=ks, temperatures=temperatures, **how)
        assert one.accuracy == score and one.k.shape == ()
    blind = knn_swept(x, y, z, t.roll(1), k=ks, temperatures=temperatures, **how)
    assert torch.equal(blind.k, found.k) and torch.equal(blind.temperature, found.temperature)
    with pytest.raises(UserError, match="numbers of neighbors below"):
        knn_swept(x, y, z, t, k=[10**4])


def test_a_report_loses_the_axes_that_were_not_asked_for():
    train_x, train_y, test_x, test_y = problem(blocks=2)
    every = knn_report(train_x, train_y, test_x, test_y, k=[5])
    for x, z, k, shape in (
        (train_x, test_x, 5, (2,)),
        (train_x[0], test_x[0], [5], (1,)),
        (train_x[0], test_x[0], 5, ()),
    ):
        report = knn_report(x, train_y, z, test_y, k=k, keep_votes=False)
        assert report.votes is None and report.accuracy.shape == shape
        assert report.predictions.shape == (*shape, 60)
        assert report.confusion.shape == (*report.class_accuracy.shape, 4) == (*shape, 4, 4)
        assert torch.equal(report.predictions.flatten()[:60], every.predictions[0, 0])
        assert report.graph.indices.shape == (*x.shape[:-2], 60, 5)


@pytest.mark.parametrize(
    "kind",
    [
        lambda y: y.to(torch.uint8),
        lambda y: y.to(torch.int16),
        lambda y: y.numpy(),
        lambda y: y.numpy().astype(np.uint16),
        lambda y: y.tolist(),
    ],
)
def test_labels_of_every_kind_of_integer_give_the_same(kind):
    """20 · 20 cells of the confusion matrix are more than 8 bits tell apart."""
    x, z = normal(200, 6), normal(90, 6, seed=1)
    y, t = torch.arange(200) % 20, torch.arange(90) % 20
    expected, found = knn_report(x, y, z, t, k=5), knn_report(x, kind(y), z, kind(t), k=5)
    assert torch.equal(found.confusion, expected.confusion)
    assert torch.equal(found.votes, expected.votes)
    assert knn_accuracy(x, kind(y), k=5) == knn_accuracy(x, y, k=5)
    assert torch.equal(knn_predict(x, kind(y), z)[1], knn_predict(x, y, z)[1])
    alone = [refiner.clustering(x[:, :2], labels, k=3)["acc"] for labels in (y, kind(y))]
    assert alone[0] == alone[1]


def test_a_series_with_another_index_is_labels_too():
    x, y = normal(50, 4), torch.arange(50) % 2
    series = pandas.Series(y.numpy(), index=range(100, 150))
    assert torch.equal(knn_report(x, series).predictions, knn_report(x, y).predictions)


def test_words_are_classes_numbered_over_both_sets():
    (x, y, z, t), names = problem(), np.array(["ant", "bee", "cat", "dog", "eel", "fly", "gnu"])
    some = y != 1  # a bee is met in the test images alone
    x, y = x[..., some, :], y[some]
    words = names[y.numpy()].tolist(), names[t.numpy()]
    assert torch.equal(
        knn_report(x, words[0], z, words[1]).confusion, knn_report(x, y, z, t).confusion
    )
    probes = refiner.linear_probe(x, words[0], z, words[1]), refiner.linear_probe(x, y, z, t)
    assert torch.equal(probes[0].accuracy, probes[1].accuracy)
    clusters = [refiner.clustering(z, labels, k=3, restarts=1)["ari"] for labels in (words[1], t)]
    assert torch.equal(*clusters)


def test_huge_ids_have_columns_only_if_they_occur():
    x, y, z, t = problem()
    plain, huge = knn_report(x, y, z, t), knn_report(x, y * 10**12, z, t * 10**12)
    assert torch.equal(huge.predictions, plain.predictions * 10**12)
    assert torch.equal(huge.accuracy, plain.accuracy)
    present = torch.cat([y, t]).unique()
    assert torch.equal(huge.classes, present * 10**12)
    assert torch.equal(huge.votes, plain.votes[..., present])
    assert torch.equal(huge.confusion, plain.confusion[..., present, :][..., present])
    votes, predicted = knn_predict(x, y * 10**12, z)
    assert torch.equal(predicted, plain.predictions * 10**12)
    assert votes.shape[-1] == len(y.unique())


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (lambda y: y - 1, "that of image 0 is -1: leave images without a class out"),
        (lambda y: y.double(), "words or whole numbers from 0, not torch.float64"),
        (lambda y: [None, 1] * 25, "words or whole numbers from 0, not object"),
        (lambda y: y[:-1], "do not match labels"),
        (lambda y: None, "no labels"),
    ],
)
def test_what_is_no_label_is_refused(labels, message):
    x, y = normal(50, 4), torch.arange(50) % 2
    for call in (
        lambda: knn_accuracy(x, labels(y)),
        lambda: refiner.linear_probe(x, labels(y), x, y),
        lambda: refiner.clustering(x, labels(y)),
    ):
        with pytest.raises(ValueError, match=message):
            call()


KINDS = {
    "array": lambda x: x.numpy(),
    "rows": lambda x: [row.numpy() for row in x],
    "tensors": list,
    "lists": lambda x: x.tolist(),
    "with gradients": lambda x: x.clone().requires_grad_(),
    "rows with gradients": lambda x: list(x.clone().requires_grad_()),
    "not contiguous": lambda x: x.T.contiguous().T,
    "half": lambda x: x.half(),
    "half array": lambda x: x.numpy().astype(np.float16),
}


@pytest.mark.parametrize("kind", KINDS)
def test_features_of_every_kind_give_the_same_in_their_kind(kind):
    given = KINDS[kind]
    x, z, y, t = normal(60, 4), normal(30, 4, seed=1), torch.arange(60) % 3, torch.arange(30) % 3
    x, z = x.half().float(), z.half().float()  # half has the same numbers
    is_tensor = kind not in ("array", "rows", "lists", "half array")
    near = {"rel": 2e-2, "abs": 2e-2} if "half" in kind else {"rel": 1e-5, "abs": 1e-6}
    report, expected = (
        knn_report(given(x), y, given(z), t, k=np.array([1, 5])),
        knn_report(x, y, z, t, k=[1, 5]),
    )
    assert torch.equal(report.predictions, expected.predictions)
    graph = nearest_neighbors(given(z), given(x), k=np.int64(5))
    assert torch.equal(graph.indices, nearest_neighbors(z, x, k=5).indices)
    factors = [
        {"f": 1.0 * torch.arange(n), "class": np.array(["a", "b"] * (n // 2))} for n in (60, 30)
    ]
    probe = refiner.linear_probe(given(x), y, given(z), t, penalties=[0.01])
    assert torch.equal(torch.as_tensor(probe.predict(given(z))), probe.predict(z))
    assert refiner.kmeans(given(x), np.int64(3), restarts=1).centers.shape == (3, 4)
    shots = [
        refiner.low_shot(a, y, b, t, shots=[2], draws=2) for a, b in ((x, z), (given(x), given(z)))
    ]
    assert shots[0].mean.tolist() == pytest.approx(shots[1].mean.tolist(), **near)
    functions = [
        lambda a, b: refiner.knn_accuracy(a, y, b, t, k=np.int64(3)),
        lambda a, b: refiner.knn_predict(a, y, b, k=np.int64(3)),
        lambda a, b: refiner.factor_probe(a, factors[0], b, factors[1], categorical=["class"]),
        lambda a, b: refiner.clustering(a, y, k=3, restarts=1),
        lambda a, b: refiner.linear_cka(a),
        lambda a, b: refiner.linear_cka(a, a),
    ]
    for name in ("rankme", "participation_ratio", "alpha_req", "uniformity", "collapse_std"):
        functions.append(lambda a, b, name=name: getattr(refiner, name)(a))
    functions.append(lambda a, b: refiner.intrinsic_dimension(a))
    for function in functions:
        found, wanted = flat(function(given(x), given(z))), flat(function(x, z))
        assert all(isinstance(value, torch.Tensor) == is_tensor for value in found)
        for a, b in zip(found, wanted, strict=True):
            assert np.asarray(a) == pytest.approx(np.asarray(b), nan_ok=True, **near)


def flat(found) -> list:
    values = found.values() if isinstance(found, dict) else found
    return list(values) if isinstance(found, dict | tuple) else [found]


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ([[1.0, 2.0], [1.0]], "must be an array of floats, not list"),
        ("features", "features must be floats|array of floats"),
        (torch.zeros(0, 4), r"at least one, but the .* are torch.float32 \[0, 4\]"),
        (np.zeros((3, 4), dtype=np.int64), "must be floats"),
    ],
)
def test_what_is_no_features_is_refused(wrong, message):
    x, y = normal(60, 4), torch.arange(60) % 3
    for call in (
        lambda: knn_accuracy(x, y, wrong, y[:0]),
        lambda: nearest_neighbors(wrong, x),
        lambda: refiner.linear_probe(x, y, wrong, y[:0]),
        lambda: refiner.rankme(wrong),
        lambda: refiner.kmeans(wrong, 2),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_yes_and_no_are_classes():
    x, y = normal(50, 4), torch.arange(50) % 2
    assert torch.equal(knn_report(x, y == 1).confusion, knn_report(x, y).confusion)


def test_votes_are_counted_in_chunks(monkeypatch):
    arguments = problem()
    whole = knn_report(*arguments, k=[3, 9])
    monkeypatch.setattr(tensors, "CHUNK_BYTES", {"cpu": 7 * 8 * 4 * 3})  # seven queries at a time
    part = knn_report(*arguments, k=[3, 9])
    assert torch.equal(part.votes, whole.votes)
    assert torch.equal(part.predictions, whole.predictions)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"train_y": torch.zeros(5, dtype=torch.int64)}, "120 train features do not match"),
        ({"test_y": torch.zeros(5, dtype=torch.int64)}, "60 test features do not match"),
        ({"test_y": None}, "test images have no labels"),
        ({"train_y": torch.zeros(120)}, "whole numbers.*not torch.float32"),
        ({"train_y": [0.5] * 120}, "whole numbers"),
        ({"train_x": torch.full((120, 10), torch.nan)}, "the train features hold NaN"),
        ({"train_y": torch.full((120,), -1)}, "whole numbers"),
        ({"k": 121}, "k=121 .* 120 keys"),
        ({"k": []}, "k must be"),
        ({"test_x": torch.full((60, 10), torch.nan)}, "NaN"),
        ({"test_x": normal(60, 9)}, "same D and L"),
    ],
)
def test_wrong_problems_are_refused(change, message):
    names = ("train_x", "train_y", "test_x", "test_y")
    arguments = dict(zip(names, problem(), strict=True)) | {"k": 5} | change
    positional = [arguments.pop(name) for name in names]
    with pytest.raises(ValueError, match=message):
        knn_accuracy(*positional, **arguments)


# ---------------------------------------------------------------- what a graph tells


def graph_of(rows) -> Graph:
    indices = torch.tensor(rows)
    return Graph(indices, torch.zeros(indices.shape))


def test_agreement_counts_shared_neighbors_in_any_order():
    a = graph_of([[1, 2, 3], [0, 2, 3]])
    b = graph_of([[3, 1, 9], [7, 8, 9]])
    assert float(neighbor_agreement(a, b)) == pytest.approx(2 / 6)
    assert float(neighbor_agreement(a, a)) == 1
    stacked = Graph(torch.stack([a.indices, a.indices]), torch.zeros(2, 2, 3))
    other = Graph(torch.stack([b.indices, a.indices]), torch.zeros(2, 2, 3))
    assert neighbor_agreement(stacked, other).tolist() == pytest.approx([2 / 6, 1])
    with pytest.raises(ValueError, match="cannot be compared"):
        neighbor_agreement(a, a.first(2))
