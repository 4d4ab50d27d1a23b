"""Readings: their transforms against closed forms, and a choice that train images alone make."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import refiner
from refiner.base.tensors import standardized
from refiner.models.load import build_vit
from refiner.probing.choosing import bootstrap, by_knn
from refiner.probing.features import Features
from refiner.probing.readings import Reading, Transform, pooled, poolings_of


def mixed(n=300, d=6, seed=0):
    """Correlated features of different scales and means, [N, D]."""
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 3 + 1)


def cosines(x):
    x = x.double() / x.double().norm(dim=1, keepdim=True)
    return x @ x.T


# ---------------------------------------------------------------- transforms


@pytest.mark.parametrize("power", [0, 0.5, 0.75, 1])
def test_what_whitening_leaves_is_the_correlation_to_the_rest_of_its_power(power):
    x = mixed()
    corr = np.corrcoef(x.numpy().T)
    values, axes = np.linalg.eigh(corr)
    expected = axes * values ** (1 - power) @ axes.T
    white = refiner.whiten(x, power=power, shrinkage=0)
    assert np.cov(white.numpy().T, bias=True) == pytest.approx(expected, abs=1e-5)
    assert white.mean(0).abs().max() < 1e-6 and white.dtype == torch.float32


def test_cosines_are_those_of_plain_pca():
    """Shrunk, and without the two largest components, by a singular value decomposition."""
    x = mixed()
    unit = (x - x.mean(0)) / x.std(0, correction=0)
    _, singular, axes = np.linalg.svd(unit.numpy(), full_matrices=False)
    values = singular**2 / len(x)
    scores = unit.numpy() @ axes.T / (0.9 * values + 0.1 * values.mean()) ** 0.375
    white = refiner.whiten(x, power=0.75, shrinkage=0.1, removed=2)
    assert torch.allclose(cosines(white), cosines(torch.from_numpy(scores[:, 2:])), atol=1e-5)


def test_blocks_are_whitened_one_by_one_and_others_by_the_train_images_maps():
    x_LND, z_LMD = (torch.stack([mixed(n, seed=s) for s in (1, 2)]) for n in (50, 20))
    x, z = refiner.whiten(x_LND, z_LMD, power=0.5)
    for block in (0, 1):
        alone = refiner.whiten(x_LND[block], torch.cat([z_LMD[block], x_LND[block]]), power=0.5)
        assert torch.equal(alone[0], x[block])
        assert torch.allclose(alone[1], torch.cat([z[block], x[block]]))
    ours, theirs = refiner.whiten(x_LND[0], z_LMD[0], power=0), standardized(x_LND[0], z_LMD[0])
    assert all(map(torch.allclose, ours, theirs))


@pytest.mark.parametrize("n", [4, 40])
def test_directions_without_variance_are_taken_out(n):
    """Fewer images than features, a constant feature, one that repeats another."""
    x = mixed(n, 8).float()
    x[:, 3], x[:, 5] = 1e4, 2 * x[:, 0] - 1
    white, other = refiner.whiten(x, mixed(30, 8, seed=1), shrinkage=0)
    values = torch.linalg.eigvalsh(white.double().T @ white.double() / n)
    rank = min(n - 1, 6)
    assert values[-rank:] == pytest.approx(torch.ones(rank), abs=1e-4)
    assert values[:-rank].abs().max() < 1e-6
    assert other.isfinite().all() and other.abs().max() < 1e3


def test_settings_out_of_range_are_named():
    for wrong, words in (
        ({"power": -1}, "power is -1"),
        ({"shrinkage": 2}, "shrinkage is 2"),
        ({"removed": 6}, "6 of 6 components removed leave nothing"),
    ):
        with pytest.raises(refiner.UserError, match=words):
            refiner.whiten(mixed(), **wrong)
    with pytest.raises(refiner.UserError, match="at least two images, not 1"):
        refiner.whiten(mixed(1))
    with pytest.raises(refiner.UserError, match="same D and L"):
        refiner.whiten(mixed(), mixed(d=5))


# ---------------------------------------------------------------- readings


@pytest.fixture(scope="module")
def model():
    return build_vit(size=16, patch=8, dim=24, depth=3, heads=2, registers=2, seed=0).eval()


@pytest.fixture(scope="module")
def pixels():
    return torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(0)).byte()


@pytest.fixture(scope="module")
def features(model, pixels):
    return refiner.extract(model, pixels, progress=False)


def test_poolings_of_a_model_with_registers(features):
    assert poolings_of(features) == [
        "cls",
        "patch",
        "registers",
        "cls+patch",
        "cls+patch+registers",
    ]
    both = pooled(features, 2, "cls+patch")
    assert torch.equal(both, torch.cat([features["cls"][1], features["patch"][1]], dim=1))


def test_a_reading_is_saved_with_what_it_needs(model, pixels, features, tmp_path):
    reading = Reading.fit(features, 2, "cls+patch", Transform(0.75))
    again = Reading.load(reading.save(tmp_path / "reading.safetensors"))
    assert str(again) == "block 2, class token and patch mean, whitened with power 0.75"
    one_block = refiner.extract(model, pixels, blocks=[2], progress=False)
    assert torch.allclose(again.apply(one_block), reading.apply(features), atol=1e-4)
    assert again.transform == reading.transform
    (tmp_path / "other.safetensors").write_bytes(b"no reading")
    with pytest.raises(refiner.UserError, match="holds no reading"):
        Reading.load(tmp_path / "other.safetensors")
    with pytest.raises(refiner.UserError, match="no block 3, cls, in features of the blocks 2"):
        Reading.fit(features, 3).apply(one_block)


def test_an_exported_reading_needs_torch_alone(model, pixels, features, tmp_path):
    reading = Reading.fit(features, 1, "patch+registers", Transform(0.5))
    program = torch.export.load(reading.export(model, tmp_path / "reading.pt2"))
    for some in (pixels[:1], pixels[:7]):
        expected = reading.apply(refiner.extract(model, some, progress=False))
        assert torch.allclose(program.module()(some), expected, atol=1e-3)
    called = [node.target for node in program.graph.nodes if node.op == "call_function"]
    assert {type(target).__module__ for target in called} <= {"torch._ops", "builtins"}
    assert len(model.blocks) == 3  # the model is left alone


# ---------------------------------------------------------------- the choice


def planted(n: int, seed: int, classes: int = 4) -> tuple[Features, torch.Tensor]:
    """Classes in a few directions of block 2's patch mean, below larger ones that say nothing."""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    cls, patch = (torch.randn(3, n, 12, generator=g) for _ in range(2))
    patch[1, :, :classes] += 4 * torch.eye(classes)[y]
    loud = torch.randn(12, 12, generator=torch.Generator().manual_seed(9))
    patch[1] = patch[1] @ loud + 30 * torch.randn(n, 1, generator=g) * loud[0]
    return Features({"cls": cls, "patch": patch}, (1, 2, 3)), y


@pytest.mark.parametrize("by", ["knn", "linear", "few"])
def test_the_choice_finds_what_was_planted(by):
    (x, y), (z, t) = planted(240, 0), planted(120, 1)
    transforms = Transform(), Transform(1)
    choice = refiner.best_reading(x, y, by=by, poolings=("cls", "patch"), transforms=transforms)
    assert len(choice.scores) == 3 * 2 * 2 and choice.reading.block == 2
    tested = choice.test(z, t)
    assert choice.reading.pooling == "patch" and tested.accuracy() > 0.8
    low, high = tested.interval()
    assert low < tested.accuracy() < high and tested.real("usual")
    assert str(tested).startswith("Use block 2, patch mean, ")
    assert str(tested).endswith(f"has {100 * tested.accuracy('usual'):.1f} %.")
    same = replace(tested, right={name: tested.right["usual"] for name in tested.right})
    assert str(same).endswith("With 120 test images that may be chance.")
    usual = replace(same, readings=tested.readings | {"best": tested.readings["usual"]})
    assert ", which is the usual reading: " in str(usual) and "chance" not in str(usual)
    everywhere = choice.on_test(z, t)
    assert everywhere.keys() == choice.scores.keys()
    for place, name in enumerate(("best", "runner_up")):
        known = everywhere[list(choice.scores)[place]]
        assert known == pytest.approx(tested.accuracy(name), abs=1e-6)
    assert set(choice.on_test(z, t, [Transform(0.5)])) == {
        (block, pooling, Transform(0.5)) for block, pooling, _ in choice.scores
    }


def test_test_labels_have_no_part_in_the_choice():
    (x, y), (z, t) = planted(240, 0), planted(400, 1)
    choice = refiner.best_reading(x, y, transforms=(Transform(), Transform(1)))
    before = list(choice.scores)
    assert choice.reading.transform == Transform(1)
    tested = choice.test(z, t[torch.randperm(400, generator=torch.Generator().manual_seed(0))])
    assert tested.accuracy() == pytest.approx(0.25, abs=0.08)
    assert list(choice.scores) == before and tested.readings["best"].block == before[0].block


def test_scores_are_leave_one_out_accuracies_on_transformed_features():
    x, y = planted(60, 3)
    choice = refiner.best_reading(x, y, by=by_knn(5), poolings=("patch",))
    for candidate, score in choice.scores.items():
        ready = Reading.fit(x, *candidate).apply(x)
        assert score == pytest.approx(
            float(refiner.knn_accuracy(ready, y, k=5, standardize=False)), abs=0.02
        )
    assert list(choice.scores.values()) == sorted(choice.scores.values(), reverse=True)


def test_a_part_chooses_and_all_are_fitted_on():
    x, y = planted(300, 0)
    choice = refiner.best_reading(x, y, most=100)
    assert choice.reading.block == 2
    assert torch.allclose(
        choice.reading.mean, pooled(x, 2, choice.reading.pooling).double().mean(0)
    )


def test_the_interval_of_a_share_is_the_binomials():
    right = torch.zeros(1, 400, dtype=torch.bool)
    right[0, :300] = True
    deviation = (0.75 * 0.25 / 400) ** 0.5
    expected = 0.75 - 1.96 * deviation, 0.75 + 1.96 * deviation
    assert bootstrap(right) == pytest.approx(expected, abs=0.006)
    draws = torch.tensor([[True], [False]] * 8).expand(-1, 50)  # only the draws differ
    low, high = bootstrap(draws)
    assert (low, high) == pytest.approx((0.25, 0.75), abs=0.07)


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        (None, "chosen with labels; rank_readings orders blocks without"),
        (torch.zeros(40, dtype=torch.int64), "with one class no reading is better"),
        (torch.arange(40), "with one image a class no reading is better"),
        (torch.zeros(39, dtype=torch.int64), "40 train features do not match"),
    ],
)
def test_labels_that_cannot_choose(labels, words, features):
    with pytest.raises(refiner.UserError, match=words):
        refiner.best_reading(features, labels)
    with pytest.raises(refiner.UserError, match="one of knn, linear, few, not 'luck'"):
        refiner.best_reading(features, torch.arange(40) % 2, by="luck")
    with pytest.raises(refiner.UserError, match="what refiner.extract gives, not a Tensor"):
        refiner.best_reading(features["cls"], torch.arange(40) % 2)


def test_constant_features_leave_the_usual_reading_and_few_images_a_finite_one():
    y = torch.arange(6) % 2
    same = Features({"cls": torch.ones(2, 6, 12), "patch": torch.ones(2, 6, 12)}, (1, 2))
    reading = refiner.best_reading(same, y).reading
    assert str(reading) == "block 2, class token, standardised"
    assert not reading.apply(same).any()
    assert all(value.isnan().all() for value in refiner.rank_readings(same).values.values())
    few = planted(6, 0)[0]  # fewer images than features
    choice = refiner.best_reading(few, y)
    assert choice.reading.apply(planted(9, 1)[0]).isfinite().all()
    assert choice.test(few, y).accuracy() <= 1


# ---------------------------------------------------------------- without labels


def test_measures_order_blocks_without_labels():
    """A block of three directions, one of six, one of twelve: rank tells, up to which end is up."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(3, 200, 12, generator=g)
    for block, kept in enumerate((3, 6)):
        x[block] = x[block, :, :kept] @ torch.randn(kept, 12, generator=g)
    known = Features({"patch": x}, (4, 5, 6))
    views = [
        Features({"patch": x[:, :90] + 0.1 * torch.randn(3, 90, 12, generator=g)}, (4, 5, 6))
        for _ in range(4)
    ]
    ranking = refiner.rank_readings(known, views)
    assert set(ranking.values) == set(refiner.probing.choosing.MEASURES)
    assert ranking.places == [(4, "patch"), (5, "patch"), (6, "patch")]
    for measure in ("rankme", "participation_ratio", "intrinsic_dimension", "lidar", "uniformity"):
        assert ranking.order(measure) == ranking.places[::-1]
    agreement = ranking.agreement([0.1, 0.2, 0.3])
    assert agreement["rankme"] == 1 and ranking.agreement([3, 2, 1])["lidar"] == -1
    assert np.isnan(ranking.agreement([1, 1, 1])["rankme"])
    assert "lidar" not in refiner.rank_readings(known).values
    with pytest.raises(refiner.UserError, match="2 accuracies for 3 places"):
        ranking.agreement([0.1, 0.2])
