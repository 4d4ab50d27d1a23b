"""Measures against closed forms, k-means against a float64 loop, scores against their extremes."""

import math

import numpy as np
import pytest
import torch
from scipy.special import hyp0f1
from sklearn.cluster import KMeans as TheirKMeans

from refiner.probing.clusters import clustering, kmeans
from refiner.probing.measures import (
    alignment,
    alpha_req,
    collapse_std,
    intrinsic_dimension,
    lidar,
    linear_cka,
    participation_ratio,
    rankme,
    uniformity,
)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def uniform(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def rotation(dim, seed=0):
    return torch.linalg.qr(normal(dim, dim, seed=seed).double())[0]


def with_spectrum(values, n=400, seed=0):
    """Centred float64 features [n, D] with exactly these singular values, in random directions."""
    x = normal(n, len(values), seed=seed).double()
    left = torch.linalg.qr(x - x.mean(0))[0]
    return left * torch.as_tensor(values, dtype=torch.float64) @ rotation(len(values), seed + 1)


def entropy_rank(values):
    p = [v / sum(values) for v in values if v > 0]
    return math.exp(-sum(q * math.log(q) for q in p))


# ---------------------------------------------------------------- spectra

SPECTRA = {"flat": [3.0] * 6, "one": [2.0, 0, 0, 0], "falling": [8.0, 4.0, 2.0, 1.0, 0.5]}


@pytest.mark.parametrize("name", SPECTRA)
def test_ranks_of_known_spectra(name):
    values = SPECTRA[name]
    x = with_spectrum(values)
    assert float(rankme(x)) == pytest.approx(entropy_rank(values), rel=1e-4)
    squares = [v * v for v in values]
    ratio = sum(squares) ** 2 / sum(s * s for s in squares)
    assert float(participation_ratio(x)) == pytest.approx(ratio, rel=1e-5)


def test_rankme_takes_the_mean_as_a_direction_unless_centred():
    x = with_spectrum([3.0] * 6) + 1000
    assert float(rankme(x)) < 1.1
    assert float(rankme(x, center=True)) == pytest.approx(6, rel=1e-4)
    assert float(participation_ratio(x)) == pytest.approx(6, rel=1e-4)


def test_fewer_images_than_features_give_the_same_spectrum():
    x = with_spectrum([5.0, 3.0, 1.0], n=40).T.contiguous()  # 3 images of 40 features
    assert float(rankme(x)) == pytest.approx(entropy_rank([5, 3, 1]), rel=1e-4)


def test_participation_ratio_of_gaussian_features_is_that_of_a_wishart_matrix():
    n, dim = 200, 100
    found = float(participation_ratio(normal(n, dim)))
    # E tr(C)² / E tr(C²) of a Wishart matrix with n - 1 degrees of freedom.
    m = n - 1
    assert found == pytest.approx((m * dim + 2) / (m + dim + 1), rel=0.02)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_alpha_is_the_exponent_of_a_power_law(alpha):
    eigenvalues = torch.arange(1, 41, dtype=torch.float64) ** -alpha
    # Another law before rank 5 must not matter.
    eigenvalues[:4] = 7
    x = with_spectrum(eigenvalues.sqrt())
    assert float(alpha_req(x, ranks=(5, 40))) == pytest.approx(alpha, rel=1e-4)
    assert float(alpha_req(x, ranks=(5, 400))) == pytest.approx(alpha, rel=1e-4)
    assert alpha_req(x, ranks=(40, 80)).isnan()


def test_alpha_weighs_ranks_by_their_inverse():
    eigenvalues = [9.0, 4.0, 3.0, 0.5]
    x = with_spectrum([math.sqrt(e) for e in eigenvalues])
    j = np.arange(1, 5)
    slope = np.polyfit(np.log(j), np.log(eigenvalues), 1, w=np.sqrt(1 / j))[0]
    assert float(alpha_req(x, ranks=(1, 4))) == pytest.approx(-slope, rel=1e-4)


def cross(between, within):
    """Views [2D, 2D, D]: images at ±between along each axis, each with views at ±within."""
    dim = len(between)
    axes = torch.eye(dim, dtype=torch.float64)
    means = torch.cat([axes, -axes]) * torch.tensor(between, dtype=torch.float64)
    offsets = torch.cat([axes, -axes]) * torch.tensor(within, dtype=torch.float64)
    return means[:, None] + offsets


def test_lidar_of_a_known_scatter():
    between, within = [4.0, 2.0, 1.0], [1.0, 0.5, 3.0]
    views = cross(between, within) @ rotation(3)
    n, v, delta = 6, 6, 1e-4
    ratios = [
        (2 * b * b / (n - 1)) / (n * 2 * w * w / (n * (v - 1)) + delta)
        for b, w in zip(between, within, strict=True)
    ]
    assert float(lidar(views)) == pytest.approx(entropy_rank(ratios), rel=1e-5)
    assert float(lidar(views, delta=1e6)) == pytest.approx(entropy_rank([16, 4, 1]), rel=1e-4)


def test_lidar_ignores_directions_in_which_only_views_differ():
    views = torch.zeros(60, 20, 8)
    views[..., :3] = normal(60, 1, 3)
    views[..., 3:] = 100 * normal(60, 20, 5, seed=1)
    views[..., :3] += 0.1 * normal(60, 20, 3, seed=2)
    assert float(rankme(views.flatten(0, 1))) > 5
    assert 2.5 < float(lidar(views)) < 3.1


# ---------------------------------------------------------------- on the unit sphere


def test_alignment_of_known_angles():
    angle = math.radians(60)
    views = torch.tensor([[[2.0, 0.0], [math.cos(angle), math.sin(angle)]]]).expand(4, 2, 2)
    assert float(alignment(views)) == pytest.approx(1)  # a chord of 60° is as long as the radius
    assert float(alignment(views * 7, alpha=1)) == pytest.approx(1)
    three = torch.eye(3)[None].expand(2, 3, 3)
    assert float(alignment(three)) == pytest.approx(2)
    assert float(alignment(three, alpha=4)) == pytest.approx(4)


def test_uniformity_of_a_simplex_and_of_the_sphere():
    n = 5
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    assert float(uniformity(simplex, t=3)) == pytest.approx(-3 * (2 + 2 / (n - 1)), rel=1e-5)
    for dim in (3, 16):
        expected = math.log(hyp0f1(dim / 2, 4.0)) - 4
        assert float(uniformity(normal(3000, dim))) == pytest.approx(expected, abs=0.01)
    assert float(uniformity(torch.ones(9, 4))) == pytest.approx(0, abs=1e-6)


def test_uniformity_does_not_depend_on_the_chunk(monkeypatch):
    x = normal(50, 6)
    whole = float(uniformity(x))
    monkeypatch.setattr("refiner.probing.measures.CHUNK_BYTES", 8 * 50 * 7)
    assert float(uniformity(x)) == pytest.approx(whole, rel=1e-6)


def test_collapse_std():
    assert float(collapse_std(normal(4000, 32))) == pytest.approx(1, abs=0.02)
    assert float(collapse_std(torch.ones(9, 4))) == pytest.approx(0, abs=1e-6)
    half = torch.cat([normal(4000, 32), torch.zeros(4000, 32)], dim=1)
    assert float(collapse_std(half)) == pytest.approx(math.sqrt(0.5), abs=0.02)


@pytest.mark.parametrize("measure", [uniformity, collapse_std])
def test_a_zero_vector_has_no_direction(measure):
    with pytest.raises(ValueError, match="zero"):
        measure(torch.cat([torch.zeros(1, 3), torch.ones(3, 3)]))


# ---------------------------------------------------------------- similarity of blocks


def slow_cka(x, y, debiased):
    x, y = (a.double().numpy() - a.double().numpy().mean(0) for a in (x, y))
    n = len(x)
    if not debiased:
        return np.sum((y.T @ x) ** 2) / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))

    def hsic(k, l):
        k, l = k - np.diag(np.diag(k)), l - np.diag(np.diag(l))
        one = np.ones(n)
        middle = (one @ k @ one) * (one @ l @ one) / ((n - 1) * (n - 2))
        return np.trace(k @ l) + middle - 2 / (n - 2) * (one @ k @ l @ one)

    k, l = x @ x.T, y @ y.T
    return hsic(k, l) / math.sqrt(hsic(k, k) * hsic(l, l))


@pytest.mark.parametrize("n", [12, 60])
@pytest.mark.parametrize("debiased", [False, True])
def test_cka_of_all_blocks_equals_the_formula(n, debiased, monkeypatch):
    x, y = normal(3, n, 10) + 3, normal(2, n, 7, seed=1)
    y[:, :, :4] += x[:2, :, :4]
    monkeypatch.setattr(
        "refiner.probing.measures.CHUNK_BYTES", 12 * n * 5 * 5
    )  # five rows at a time
    cka = linear_cka(x, y, debiased=debiased)
    expected = [[slow_cka(a, b, debiased) for b in y] for a in x]
    assert np.allclose(cka.numpy(), expected, atol=1e-5)
    own = linear_cka(x, debiased=debiased)
    assert torch.allclose(own.diagonal(), torch.ones(3), atol=1e-5) and torch.equal(own, own.T)
    assert torch.allclose(linear_cka(x[0], y[1], debiased=debiased), cka[0, 1], atol=1e-5)
    assert linear_cka(x[0], y).shape == (2,) and linear_cka(x, y[0]).shape == (3,)


def test_cka_ignores_rotation_scale_and_shift_but_not_a_stretch():
    x = normal(100, 8).double()
    assert float(linear_cka(x, x @ rotation(8) * 1e4 + 7)) == pytest.approx(1, abs=1e-5)
    assert float(linear_cka(x, x * torch.tensor([20.0, 1, 1, 1, 1, 1, 1, 1]))) < 0.6


def test_debiasing_takes_away_what_few_images_add():
    x, y = normal(40, 300), normal(40, 300, seed=1)
    assert float(linear_cka(x, y)) > 0.8
    assert abs(float(linear_cka(x, y, debiased=True))) < 0.1


def test_cka_of_different_images_is_refused():
    with pytest.raises(ValueError, match="same images"):
        linear_cka(normal(9, 3), normal(8, 3))
    with pytest.raises(ValueError, match="at least 4"):
        linear_cka(normal(3, 3), debiased=True)


@pytest.mark.parametrize("debiased", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cka_of_constant_features_is_not_known(dtype, debiased):
    """0.1 has no exact mean: what rounding leaves must not count as features."""
    y = normal(9, 3).to(dtype)
    for value in (0, 0.1, 0.3, 1):
        x = torch.full((9, 3), value, dtype=dtype)
        assert linear_cka(x, y, debiased=debiased).isnan()
        beside = torch.cat([1e6 * x, 1e-6 * y], dim=1)
        expected = float(linear_cka(y, y, debiased=debiased))
        assert float(linear_cka(beside, y, debiased=debiased)) == pytest.approx(expected, abs=1e-5)


# ---------------------------------------------------------------- intrinsic dimension


@pytest.mark.parametrize("dim", [1, 2, 5])
def test_dimension_of_a_cube_in_a_larger_space(dim):
    x = uniform(3000, dim).double() @ rotation(12)[:dim] + 5
    assert float(intrinsic_dimension(x)) == pytest.approx(dim, rel=0.06)


def test_dimension_of_a_sphere():
    x = torch.nn.functional.normalize(normal(3000, 4), dim=1)
    found = intrinsic_dimension(x.repeat(2, 1, 1))
    assert found.tolist() == pytest.approx([3, 3], rel=0.06) and found[0] == found[1]


def test_dimension_equals_the_formula_on_a_slow_loop():
    x = normal(40, 3).double()
    far = torch.cdist(x, x).fill_diagonal_(torch.inf).sort(dim=1).values
    mu = (far[:, 1] / far[:, 0]).sort().values[:30].log()
    height = -(1 - torch.arange(1, 31) / 40).log()
    slope = np.linalg.lstsq(mu[:, None].numpy(), height.numpy(), rcond=None)[0][0]
    assert float(intrinsic_dimension(x, discard=0.25)) == pytest.approx(slope, rel=1e-5)


def test_duplicates_are_left_out():
    x = uniform(1000, 2)
    found = intrinsic_dimension(x)
    assert torch.equal(intrinsic_dimension(torch.cat([x, x[:100]])), found)
    assert intrinsic_dimension(torch.ones(20, 3)).isnan()


# ---------------------------------------------------------------- what all measures share

MEASURES = [rankme, participation_ratio, alpha_req, uniformity, collapse_std, intrinsic_dimension]


@pytest.mark.parametrize("measure", MEASURES)
def test_blocks_are_measured_one_by_one_and_rotations_do_not_matter(measure):
    x = normal(3, 80, 20)
    every = measure(x)
    assert every.shape == (3,) and every.dtype == torch.float32 and every.isfinite().all()
    for l in range(3):
        alone = measure(x[l])
        assert alone.ndim == 0 and torch.allclose(alone, every[l], rtol=1e-6)
    if measure is not collapse_std:  # which looks at single features
        assert torch.allclose(measure((x.double() @ rotation(20)).float()), every, rtol=1e-4)


@pytest.mark.parametrize("measure", [lidar, alignment])
def test_measures_of_views_take_blocks_too(measure):
    views = normal(3, 30, 4, 5)
    assert measure(views).tolist() == pytest.approx([float(measure(v)) for v in views])
    with pytest.raises(ValueError, match="two views"):
        measure(views[:, :, :1])
    with pytest.raises(ValueError, match=r"\[L, N, V, D\]"):
        measure(views[0, 0])


@pytest.mark.parametrize("measure", [*MEASURES, linear_cka, lambda x: kmeans(x, 2)])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (normal(5, 3) / 0, "NaN or infinity"),
        (normal(2, 5, 3) * torch.nan, "NaN or infinity"),
        (normal(5), "must be floats"),
        (normal(5, 3).long(), "must be floats"),
        (normal(1, 3), "at least"),
        (normal(0, 3), "must be floats"),
    ],
)
def test_bad_features_are_refused(measure, x, message):
    with pytest.raises(ValueError, match=message):
        measure(x)


@pytest.mark.parametrize(
    ("measure", "expected"),
    [(rankme, 1), (participation_ratio, math.nan), (alpha_req, math.nan), (collapse_std, 0)],
)
def test_constant_features(measure, expected):
    found = float(measure(torch.full((30, 8), 0.1)))
    assert found == pytest.approx(expected, abs=1e-5, nan_ok=True)


# ---------------------------------------------------------------- k-means


def groups(n=300, k=4, dim=6, spread=0.7, seed=0):
    """Overlapping Gaussian groups and their classes."""
    labels = torch.arange(n) % k
    return normal(k, dim, seed=seed + 9)[labels] * 2 + spread * normal(n, dim, seed=seed), labels


def slow_lloyd(x, centers):
    """Lloyd's steps in float64, image by image."""
    x, centers = x.double(), centers.double().clone()
    before = None
    while True:
        now = torch.stack([(centers - v).norm(dim=1).argmin() for v in x])
        if before is not None and torch.equal(now, before):
            return now, sum(
                float((v - centers[c]).square().sum()) for v, c in zip(x, now, strict=True)
            )
        before = now
        centers = torch.stack([x[now == c].mean(0) for c in range(len(centers))])


def test_lloyd_steps_equal_a_float64_loop(monkeypatch):
    x, _ = groups()
    start = x[[0, 1, 4, 5]]  # a poor start: two centers in two groups
    monkeypatch.setattr("refiner.probing.clusters._plus_plus", lambda a, *_: a[[0, 1, 4, 5]][None])
    found = kmeans(x, 4, restarts=1)
    assigned, inertia = slow_lloyd(x, start)
    first = torch.cdist(x, start).argmin(1)
    assert torch.equal(found.assignments, assigned) and not torch.equal(first, assigned)
    assert float(found.inertia) == pytest.approx(inertia, rel=1e-6)
    for c in range(4):
        assert torch.allclose(found.centers[c], x[assigned == c].mean(0), atol=1e-5)


@pytest.mark.parametrize("k", [1, 4, 25])
def test_inertia_is_as_low_as_scikit_learns(k):
    x, _ = groups()
    theirs = TheirKMeans(k, n_init=10, random_state=0, tol=0).fit(x.double().numpy())
    found = kmeans(x, k, restarts=10)
    assert float(found.inertia) <= theirs.inertia_ * 1.01
    centers = found.centers.double()[found.assignments]
    assert float((x - centers).square().sum()) == pytest.approx(float(found.inertia), rel=1e-5)


def test_the_chunk_and_the_other_blocks_change_nothing(monkeypatch):
    x = torch.stack([groups(n=90, seed=s, spread=1.5)[0] for s in range(3)])
    # On a grid many images are as near to two centers.
    x[2] = x[2].round()
    whole = kmeans(x, 7, restarts=3)
    for rows in (13, 89):
        with monkeypatch.context() as patch:
            patch.setattr("refiner.probing.clusters.chunk_rows", lambda *_, rows=rows: rows)
            part = kmeans(x, 7, restarts=3)
        assert torch.equal(part.assignments, whole.assignments)
        assert torch.equal(part.inertia, whole.inertia)
    for l in range(3):
        alone = kmeans(x[l], 7, restarts=3)
        assert torch.equal(alone.assignments, whole.assignments[l])
        assert torch.equal(alone.centers, whole.centers[l])


def test_more_restarts_keep_the_earlier_ones():
    x, _ = groups(k=9, spread=1.5)
    inertias = [float(kmeans(x, 9, restarts=r).inertia) for r in (1, 3, 8)]
    assert inertias == sorted(inertias, reverse=True)
    assert float(kmeans(x, 9, restarts=1, seed=5).inertia) != inertias[0]


def test_a_large_offset_and_another_unit_change_nothing():
    x, _ = groups()
    x = (x * 64).round() / 64  # so that the shifted features are the same numbers
    plain = kmeans(x, 4)
    moved = kmeans(x.double() * 1e-20 + 2.0**-40, 4)
    assert torch.equal(moved.assignments, plain.assignments)
    assert float(moved.inertia) == pytest.approx(1e-40 * float(plain.inertia), rel=1e-3)


def test_empty_clusters_are_filled(monkeypatch):
    x, labels = groups(spread=0.1)
    # Two centers start at one place; without repair the second would never get an image.
    monkeypatch.setattr("refiner.probing.clusters._plus_plus", lambda a, *_: a[[0, 1, 2, 2]][None])
    found = kmeans(x, 4, restarts=1)
    assert float(clustering(x, labels, assignments=found.assignments)["acc"]) == 1


def test_fewer_distinct_images_than_clusters():
    x = normal(3, 5).repeat(10, 1)
    found = kmeans(x, 5)
    assert float(found.inertia) == pytest.approx(0, abs=1e-9)
    assert len(found.assignments.unique()) == 3 and found.centers.isfinite().all()
    assert not kmeans(torch.ones(6, 2), 2).assignments.any()


@pytest.mark.parametrize("bad", [{"k": 0}, {"k": 10}, {"k": 2, "restarts": 0}])
def test_wrong_kmeans_arguments_are_refused(bad):
    with pytest.raises(ValueError, match="k=|restarts"):
        kmeans(normal(9, 2), **bad)


# ---------------------------------------------------------------- clusters against classes


def test_scores_are_perfect_on_separate_groups_and_zero_on_noise():
    x, labels = groups(n=600, spread=0.01)
    scores = clustering(torch.stack([x, normal(600, 6)]), labels)
    for name in ("acc", "nmi", "ami", "ari"):
        assert float(scores[name][0]) == pytest.approx(1)
    assert abs(float(scores["ari"][1])) < 0.02 and abs(float(scores["ami"][1])) < 0.02
    assert scores["acc"][1] < 0.35
    assert scores["silhouette"][0] > 0.9 > 0.4 > scores["silhouette"][1]
    assert scores["davies_bouldin"][0] < 0.1 < scores["davies_bouldin"][1]


def test_accuracy_is_of_the_best_matching():
    labels = torch.tensor([0, 0, 0, 1, 1, 1])
    x = normal(6, 2)
    for assignments, accuracy in (
        ([1, 1, 1, 0, 0, 0], 1),
        ([0, 0, 1, 1, 1, 1], 5 / 6),
        # Both clusters are mostly class 0, but only one of them may be matched to it.
        ([5, 5, 9, 9, 2, 2], 4 / 6),
    ):
        found = clustering(x, labels, assignments=torch.tensor(assignments))["acc"]
        assert float(found) == pytest.approx(accuracy)


def test_more_clusters_than_classes_and_one_cluster():
    x, labels = groups()
    assert clustering(x, labels, k=8)["acc"] < 1
    one = clustering(x, labels, k=1)
    assert float(one["acc"]) == pytest.approx(0.25) and float(one["nmi"]) == 0
    assert one["silhouette"].isnan() and one["davies_bouldin"].isnan()


def test_wrong_labels_are_refused():
    x, labels = groups()
    with pytest.raises(ValueError, match="do not match labels"):
        clustering(x, labels[:-1])
    with pytest.raises(ValueError, match="no labels"):
        clustering(x, None)
    with pytest.raises(ValueError, match="assignments"):
        clustering(x, labels, assignments=labels[:-1])
