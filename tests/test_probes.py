"""Probes against scikit-learn, closed forms, and invariants: what chooses never sees the test."""

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression, Ridge

from refiner.probing.probes import _drawn, factor_probe, linear_probe, low_shot, shuffled_by_class

CLASSES = 5


def blobs(n: int, *, blocks: int = 2, dim: int = 12, seed: int = 0):
    """Overlapping classes, correlated features of very different scale, shifted off zero."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % CLASSES
    centres = torch.randn(blocks, CLASSES, dim, generator=torch.Generator().manual_seed(9))
    mix = torch.randn(blocks, dim, dim, generator=torch.Generator().manual_seed(8))
    x = (centres[:, y] + 1.2 * torch.randn(blocks, n, dim, generator=g)) @ mix
    return x * torch.logspace(-2, 2, dim) + 3, y


def objective(weights, bias, x, y, penalty) -> float:
    """f in float64, written out."""
    logits = x.double() @ weights.double() + bias.double()
    std = x.double().std(0, correction=0)
    return float(
        torch.nn.functional.cross_entropy(logits, y)
        + 0.5 * penalty * (weights.double() * std[:, None]).square().sum()
    )


@pytest.mark.parametrize("penalty", [1e-5, 1e-3, 3e-2])
def test_the_minimum_is_scikit_learns(penalty):
    x, y = blobs(400)
    probe = linear_probe(x, y, x, y, penalties=[penalty])
    assert probe.converged.all()
    for block in range(2):
        z = (x[block] - x[block].mean(0)) / x[block].std(0, correction=0)
        peer = LogisticRegression(C=1 / (penalty * len(y)), tol=1e-8, max_iter=5000).fit(
            z.double().numpy(), y
        )
        std = x[block].std(0, correction=0).double()
        weights = torch.from_numpy(peer.coef_.T) / std[:, None]
        bias = torch.from_numpy(peer.intercept_) - x[block].double().mean(0) @ weights
        ours = objective(probe.weights[block], probe.bias[block], x[block], y, penalty)
        best = objective(weights, bias, x[block], y, penalty)
        assert ours == pytest.approx(best, rel=1e-4) and ours > best * (1 - 1e-6)
        assert float(probe.objective[block]) == pytest.approx(best, rel=1e-4)


@pytest.mark.parametrize("penalty", [1e-6, 1e-3, 1e-1])
def test_the_gap_bounds_the_distance_to_the_minimum(penalty):
    """The gap that is reported is never smaller than the true one, and tolerances are kept."""
    x, y = blobs(300)
    best = linear_probe(x, y, x, y, penalties=[penalty], tolerance=1e-9)
    assert best.converged.all() and (best.gap <= 1e-9).all(), "float64 takes over from float32"
    for tolerance in (1e-1, 1e-2, 1e-4):
        rough = linear_probe(x, y, x, y, penalties=[penalty], tolerance=tolerance)
        true = rough.objective / best.objective - 1
        assert rough.converged.all() and (rough.gap <= tolerance).all()
        assert (true <= rough.gap + 1e-6).all() and (true >= -1e-6).all()


def test_a_fit_that_may_not_finish_says_so():
    x, y = blobs(300)
    probe = linear_probe(x, y, x, y, penalties=[1e-5], max_steps=1)
    assert not probe.converged.any() and (probe.gap > 1e-4).all()


def test_more_features_than_images():
    (x, y), (z, t) = blobs(40, dim=60), blobs(40, dim=60, seed=1)
    probe = linear_probe(x, y, z, t, penalties=[1e-2])
    assert probe.converged.all()
    mean, std = x[0].mean(0), x[0].std(0, correction=0)
    peer = LogisticRegression(C=1 / (1e-2 * 40), tol=1e-8, max_iter=5000)
    peer.fit(((x[0] - mean) / std).double().numpy(), y)
    weights = torch.from_numpy(peer.coef_.T) / std[:, None].double()
    bias = torch.from_numpy(peer.intercept_) - mean.double() @ weights
    best = objective(weights, bias, x[0], y, 1e-2)
    assert objective(probe.weights[0], probe.bias[0], x[0], y, 1e-2) == pytest.approx(
        best, rel=1e-4
    )


def test_labels_need_not_be_dense_and_a_class_may_have_one_image():
    (x, y), (z, t) = blobs(300, blocks=1), blobs(200, blocks=1, seed=1)
    names = torch.tensor([2, 3, 5, 7, 11])
    y, t = names[y], names[t]
    y[0] = 13  # its only image
    t[:10] = 17  # a class that train does not have
    probe = linear_probe(x, y, z, t)
    assert probe.classes.tolist() == [2, 3, 5, 7, 11, 13]
    guess = probe.predict(z)
    assert set(guess.unique().tolist()) <= set(probe.classes.tolist())
    assert float(probe.accuracy[0]) == pytest.approx(float((guess[0] == t).float().mean()))
    assert (guess[0, :10] != t[:10]).all()
    assert low_shot(x, y, z, t, shots=(1,), draws=2).images == (6,)


def test_without_standardizing_the_features_are_used_as_they_come():
    x, y = blobs(200, blocks=1)
    x = x / x.std()
    probe = linear_probe(x, y, x, y, penalties=[1e-3], standardize=False)
    peer = LogisticRegression(C=1 / (1e-3 * 200), tol=1e-8, max_iter=5000)
    peer.fit(x[0].double().numpy(), y)
    for weights, bias in (
        (probe.weights[0], probe.bias[0]),
        (torch.from_numpy(peer.coef_.T), torch.from_numpy(peer.intercept_)),
    ):
        value = torch.nn.functional.cross_entropy(x[0].double() @ weights + bias, y)
        value += 0.5e-3 * weights.square().sum()
        assert float(value) == pytest.approx(float(probe.objective[0]), rel=1e-4)


def test_draws_are_nested_and_the_same_for_every_block():
    """A block that is a copy of another has its scores; more labels only add to the fewer."""
    (x, y), (z, t) = blobs(200, blocks=1), blobs(100, blocks=1, seed=1)
    found = low_shot(x.repeat(2, 1, 1), y, z.repeat(2, 1, 1), t, shots=(1, 2), draws=3)
    assert (found.draws[:, :, 0] - found.draws[:, :, 1]).abs().max() < 0.021
    orders = [shuffled_by_class(y, np.random.default_rng([0, draw])) for draw in range(3)]
    few, more = (_drawn(orders, [n] * CLASSES) for n in (1, 2))
    for a, b in zip(few, more, strict=True):
        assert set(a.tolist()) < set(b.tolist())
        assert y[a].bincount().tolist() == [1] * CLASSES


def test_a_grid_gives_what_its_members_give_alone():
    x, y = blobs(300)
    together = linear_probe(x, y, x, y, penalties=[1e-4, 1e-2])
    alone = [linear_probe(x, y, x, y, penalties=[p]) for p in (1e-4, 1e-2)]
    for block, chosen in enumerate(together.penalty.tolist()):
        single = alone[[1e-4, 1e-2].index(pytest.approx(chosen))]
        assert float(together.objective[block]) == pytest.approx(
            float(single.objective[block]), rel=1e-4
        )


def test_blocks_do_not_see_each_other_and_two_dimensions_are_one_block():
    (x, y), (z, t) = blobs(300), blobs(200, seed=1)
    both = linear_probe(x, y, z, t)
    for block in range(2):
        one = linear_probe(x[block], y, z[block], t)
        assert one.accuracy.dim() == 0 and one.validation.shape == (8,)
        assert abs(one.accuracy - both.accuracy[block]) < 0.011
        assert torch.allclose(one.objective, both.objective[block], rtol=1e-4)


def test_predict_is_what_was_scored():
    (x, y), (z, t) = blobs(300), blobs(200, seed=1)
    probe = linear_probe(x, y, z, t)
    assert torch.allclose((probe.predict(z) == t).float().mean(1), probe.accuracy, atol=0.006)
    assert (probe.accuracy > 2 / CLASSES).all()


def test_test_labels_choose_nothing():
    (x, y), (z, t) = blobs(300), blobs(200, seed=1)
    shuffled = t[torch.randperm(len(t), generator=torch.Generator().manual_seed(0))]
    one, two = linear_probe(x, y, z, t), linear_probe(x, y, z, shuffled)
    assert torch.equal(one.penalty, two.penalty) and torch.equal(one.weights, two.weights)
    assert not torch.equal(one.accuracy, two.accuracy)


def test_constant_features_change_nothing():
    (x, y), (z, t) = blobs(300), blobs(200, seed=1)
    wide = [torch.cat([v, torch.full_like(v[..., :1], 7.0)], dim=-1) for v in (x, z)]
    probe = linear_probe(wide[0], y, wide[1], t, penalties=[1e-2])
    assert (probe.weights[:, -1] == 0).all()
    narrow = linear_probe(x, y, z, t, penalties=[1e-2])
    assert torch.allclose(probe.objective, narrow.objective, rtol=1e-4)


def test_low_shot_against_one_fit_at_a_time():
    """Every draw's accuracy, with one scikit-learn fit a draw on the same images."""
    (x, y), (z, t) = blobs(200, blocks=1), blobs(300, blocks=1, seed=1)
    found = low_shot(x, y, z, t, shots=(1, 3), draws=4, penalty=1e-2)
    assert found.mean.shape == (2, 1) and found.draws.shape == (2, 4, 1)
    mean, std = x[0].mean(0), x[0].std(0, correction=0)
    for size, shots in enumerate((1, 3)):
        for draw in range(4):
            rng = np.random.default_rng([0, draw])
            order = [
                rng.permutation(np.flatnonzero(y.numpy() == c))[:shots] for c in range(CLASSES)
            ]
            chosen = np.concatenate(order)
            peer = LogisticRegression(C=1 / (1e-2 * len(chosen)), tol=1e-8, max_iter=2000)
            peer.fit(((x[0, chosen] - mean) / std).double().numpy(), y[chosen])
            score = peer.score(((z[0] - mean) / std).double().numpy(), t)
            assert float(found.draws[size, draw, 0]) == pytest.approx(score, abs=0.011)
    assert torch.allclose(found.mean, found.draws.mean(1))


def test_more_labels_help_and_a_fraction_is_stratified():
    (x, y), (z, t) = blobs(400, blocks=1), blobs(400, blocks=1, seed=1)
    found = low_shot(x, y, z, t, shots=(1, 20), fractions=(0.05, 1.0), draws=5)
    assert found.sizes == (1, 20, 0.05, 1.0)
    assert found.mean[1, 0] > found.mean[0, 0] + 0.1
    assert found.spread[3, 0] < 1e-3, "with all labels every draw is the same set"
    assert torch.equal(found.draws[2], low_shot(x, y, z, t, shots=(4,), draws=5).draws[0])


def test_factor_probe_is_ridge_regression():
    g = torch.Generator().manual_seed(3)
    x, z = torch.randn(500, 6, generator=g), torch.randn(400, 6, generator=g)
    rule = torch.randn(6, generator=g)
    noise = lambda n: 0.5 * torch.randn(n, generator=g)  # noqa: E731
    a, b = (x @ rule + noise(500)).numpy(), (z @ rule + noise(400)).numpy()
    ours = factor_probe(x, {"size": a}, z, {"size": b}, penalties=[1e-2])["size"]
    mean, std = x.mean(0), x.std(0, correction=0)
    peer = Ridge(alpha=1e-2 * 500).fit(((x - mean) / std).double().numpy(), a)
    assert float(ours) == pytest.approx(
        peer.score(((z - mean) / std).double().numpy(), b), abs=1e-6
    )


def test_a_hue_is_a_circle():
    """A linear map reads the point on the circle; the number itself jumps from 1 to 0."""
    g = torch.Generator().manual_seed(4)
    hues = [torch.rand(n, generator=g) for n in (400, 300)]
    x, z = (torch.stack([(6.2832 * h).cos(), (6.2832 * h).sin()], dim=1) for h in hues)
    factors = [{"hue": h.numpy(), "plain": h.numpy()} for h in hues]
    found = factor_probe(x, factors[0], z, factors[1])
    assert found["hue"] > 0.999 and found["plain"] < 0.8


def test_noise_tells_nothing_and_categories_are_accuracies():
    g = torch.Generator().manual_seed(5)
    x, z = torch.randn(2, 400, 5, generator=g), torch.randn(2, 300, 5, generator=g)
    a = {"pattern": (x[1, :, 0] > 0).long().numpy(), "yaw": torch.randn(400, generator=g).numpy()}
    b = {"pattern": (z[1, :, 0] > 0).long().numpy(), "yaw": torch.randn(300, generator=g).numpy()}
    found = factor_probe(x, a, z, b)
    assert list(found) == ["pattern", "yaw"]
    assert found["pattern"][1] > 0.95 and found["pattern"][0] < 0.65
    assert (found["yaw"].abs() < 0.08).all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: a.update(train_x=torch.full((2, 20, 12), torch.nan)), "train features hold NaN"),
        (lambda a: a.update(train_y=torch.zeros(20).long()), "at least two classes"),
        (lambda a: a.update(train_y=torch.arange(19) % 5), "20 train features do not match"),
        (lambda a: a.update(test_x=torch.zeros(2, 20, 11)), "same D and L"),
        (lambda a: a.update(test_y=torch.arange(20) % 5 - 1), "whole numbers from 0"),
    ],
)
def test_bad_input_is_one_clear_error(change, message):
    x, y = blobs(20)
    arguments = {"train_x": x, "train_y": y, "test_x": x, "test_y": y}
    change(arguments)
    with pytest.raises(ValueError, match=message):
        linear_probe(**arguments)


def test_bad_options_are_clear_errors():
    x, y = blobs(20)
    with pytest.raises(ValueError, match="1 to 4, the images of the smallest class"):
        low_shot(x, y, x, y, shots=(5,))
    with pytest.raises(ValueError, match="above 0"):
        linear_probe(x, y, x, y, penalties=[0.0])
    with pytest.raises(ValueError, match="constant"):
        factor_probe(x, {"yaw": np.ones(20)}, x, {"yaw": np.ones(20)})
    lonely, few = blobs(CLASSES)  # one image a class: nothing to choose with
    with pytest.raises(ValueError, match="one penalty"):
        linear_probe(lonely, few, lonely, few)
    assert linear_probe(lonely, few, lonely, few, penalties=[1e-2]).accuracy.min() == 1
