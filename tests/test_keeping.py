"""The best weights are kept, nothing that was held out is trained on, and the verdict is honest."""

import importlib
import json
import re
from dataclasses import replace

import pytest
import torch
from tiny import tiny

from refiner import cli
from refiner.images.sets import ImageSet
from refiner.images.streams import ImageStream
from refiner.models.load import build_vit, copy_model, load_model
from refiner.models.save import save_model
from refiner.probing.choosing import by_knn, right_across
from refiner.training import keeping, loop, planning
from refiner.training.keeping import (
    Keeper,
    Measured,
    cross_fitted,
    keeper_of,
    verdict_of,
)
from refiner.training.recipe import Recipe, recipe_dict, recipe_from
from refiner.training.watch import CollapseGuard, Guard

R = importlib.import_module("refiner.training.refining")
BEST = tiny(keep="best", seed=3)
MOMENTS = ["step 2", "step 4", "step 6", "step 8"]
LINE = list(keeping.SHARES)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True, scope="module")
def few():
    """A quarter of 80 images is held out."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LEAST", 20)
        yield


@pytest.fixture(scope="module")
def images():
    """80 images in four classes, each a pattern under noise that hides none of it."""
    rng = torch.Generator().manual_seed(0)
    labels = torch.arange(80) % 4
    patterns = torch.randint(256, (4, 3, 8, 8), generator=rng)
    noise = torch.randint(-20, 21, (80, 3, 8, 8), generator=rng)
    return ImageSet((patterns[labels] + noise).clamp(0, 255).byte(), labels, tuple("abcd"))


@pytest.fixture(scope="module")
def model():
    return build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)


@pytest.fixture(scope="module")
def whole(model, images):
    return refined(model, images)


def refined(model, images, recipe=BEST, **options):
    return R.refine(model, images, recipe=recipe, progress=False, **options)


def assert_weights(model, weights):
    for key, value in model.state_dict().items():
        assert torch.equal(value, weights[key]), key


def blinded(model):
    """A copy that sees nothing: beside a sum so large every pixel is rounded away."""
    model = copy_model(model)
    with torch.no_grad():
        model.patch_embed.proj.bias.copy_(1e9 * torch.arange(1.0, 9))
    return model


# ---------------------------------------------------------------- the verdict


def test_a_best_of_many_guesses_is_not_flattered():
    """A hundred candidates that toss coins: their best looks good, the judged one does not."""
    rng, judged = torch.Generator().manual_seed(0), []
    for seed in range(40):
        right_CM = torch.rand(100, 200, generator=rng) < 0.5
        assert right_CM.double().mean(1).max() > 0.54
        judged.append(cross_fitted(right_CM, seed).mean())
    assert abs(torch.stack(judged).mean() - 0.5) < 0.015


def test_each_half_is_judged_by_what_the_other_half_chose():
    right_CM = torch.rand(5, 31, generator=torch.Generator().manual_seed(1)) < 0.6
    order = torch.randperm(31, generator=torch.Generator().manual_seed(7)).tolist()
    judged = cross_fitted(right_CM, seed=7)
    for mine, others in ((order[:16], order[16:]), (order[16:], order[:16])):
        chosen = max(range(5), key=lambda c: sum(right_CM[c, m].item() for m in others))
        assert [judged[m].item() for m in mine] == [float(right_CM[chosen, m]) for m in mine]


def measured(**accuracies) -> list[Measured]:
    """As many of 200 images right as the accuracies say; other ones for each."""
    rng, found = torch.Generator().manual_seed(0), []
    for name, accuracy in accuracies.items():
        right_M = torch.randperm(200, generator=rng) < 200 * accuracy
        found.append(Measured(name, float(right_M.double().mean()), f"block {name}", right_M))
    return found


@pytest.mark.parametrize(
    ("accuracies", "kept", "said"),
    [
        ({"before": 0.5, "a": 0.8, "b": 0.9}, "b", r"Keep the refined model, read at block b: 90"),
        ({"before": 0.9, "a": 0.5, "b": 0.6}, "before", r"Keep the model before, read at block be"),
        (
            {"before": 0.7, "a": 0.72},
            "a",
            r"No difference that 200 .* the refined weights are kept",
        ),
        ({"before": 0.7, "a": 0.7}, "before", r"No difference that 200 .* those before are kept"),
    ],
)
def test_the_sentence_says_what_was_measured(accuracies, kept, said):
    verdict = verdict_of(measured(**accuracies), 200)
    assert verdict.kept == kept
    assert verdict.real == str(verdict).startswith("Keep")
    assert verdict.gain[0] <= verdict.refined - verdict.before <= verdict.gain[1]
    for number in (verdict.refined, verdict.before, *verdict.interval):
        assert f"{100 * number:.1f}" in str(verdict)
    assert re.match(said, str(verdict)), str(verdict)


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("helps", [True, False])
def test_training_that_helps_is_kept_and_training_that_destroys_is_not(
    model, images, monkeypatch, helps
):
    """What the averaged encoder becomes is set; all else is a run as it is."""
    before, after = (blinded(model), model) if helps else (model, blinded(model))
    monkeypatch.setattr(CollapseGuard, "check", Guard.check)  # it would notice who is blind
    end = {k: v.clone() for k, v in after.state_dict().items()}
    monkeypatch.setattr(
        loop.EMA, "update", lambda self, module, t: self.module.load_state_dict(end)
    )
    run = refined(before, images)
    assert_weights(run.model, after.state_dict() if helps else before.state_dict())
    assert run.verdict.kept == ("step 2" if helps else "before") and run.verdict.real
    which = "refined model" if helps else "model before"
    assert str(run.verdict).startswith(f"Keep the {which}, read at block ")
    assert run.verdict.images == 20 and max(run.verdict.refined, run.verdict.before) == 1


@pytest.mark.parametrize("winner", ["before", *MOMENTS, *LINE])
def test_the_weights_with_the_highest_score_are_returned(model, images, monkeypatch, winner):
    seen = {}

    def scored(self, name, encoder):
        seen[name] = {k: v.clone() for k, v in encoder.state_dict().items()}
        return Measured(name, float(name == winner), "block 1", None)

    monkeypatch.setattr(Keeper, "_measure", scored)
    run = refined(model, images)
    assert list(seen) == ["before", *MOMENTS, *LINE] and run.verdict.kept == winner
    assert_weights(run.model, seen[winner])
    assert_weights(model, seen["before"])
    for name, share in keeping.SHARES.items():
        for key, value in seen[name].items():
            wanted = (1 - share) * seen["before"][key] + share * seen["step 8"][key]
            assert torch.allclose(value, wanted, atol=1e-6)
    found = {f"step {e['step']}": e["held_out"] for e in run.history if "held_out" in e}
    assert found == {name: float(name == winner) for name in MOMENTS}


def test_the_score_of_what_is_returned_is_what_was_measured(model, images, whole):
    keeper = keeper_of(BEST, model, images, CPU)
    assert whole.verdict.before == keeper._measure("again", model).score
    best = keeper._measure("again", whole.model).score
    on_the_way = [e["held_out"] for e in whole.history if "held_out" in e]
    assert best >= max([*on_the_way, whole.verdict.before]) - 1e-4


def test_frozen_blocks_are_read_once_and_count_as_much(model, images):
    """Measured with what is known of the first block, as without, where no two readings tie."""
    noise = torch.randint(256, images.images.shape, generator=torch.Generator().manual_seed(5))
    hard = replace(images, images=(0.4 * images.images + 0.6 * noise).byte())
    keepers = [keeper_of(replace(BEST, frozen_blocks=f), model, hard, CPU) for f in (0, 1)]
    other = copy_model(model)
    with torch.no_grad():
        other.blocks[1].mlp.fc2.weight.mul_(3)
    for encoder in (model, other):
        one, two = (keeper._measure("a", encoder) for keeper in keepers)
        assert one[:3] == two[:3] and torch.equal(one.right_M, two.right_M)


def test_across_groups_only_others_vote():
    """By a loop over the images: each asks the train images of all groups but its own."""
    rng = torch.Generator().manual_seed(0)
    x, z = (torch.randn(n, 4, generator=rng) for n in (60, 25))
    y, t, own, asked = (torch.randint(3, (n,), generator=rng) for n in (60, 25, 60, 25))
    found = right_across(by_knn(3), x, y, z, t, own, asked)[0]
    for m in range(25):
        others = own != asked[m]
        alone = by_knn(3).right(x[others], y[others], z[m : m + 1], t[m : m + 1])
        assert found[m] == alone[0, 0]
    everyone = right_across(by_knn(3), x, y, z, t, None, None)
    assert torch.equal(everyone, by_knn(3).right(x, y, z, t))


@pytest.mark.parametrize(
    ("changes", "groups"),
    [({}, None), ({"cached_views": 1, "head_steps": 30}, None), ({}, torch.arange(80) // 40)],
)
def test_what_is_held_out_is_never_trained_on(model, images, monkeypatch, changes, groups):
    recipe, step, ids = tiny(keep="best", steps=75, **changes), R.refine_step, []
    monkeypatch.setattr(R, "refine_step", lambda *a, **k: (ids.append(a[4]), step(*a, **k))[1])
    monkeypatch.setattr(Keeper, "_measure", lambda self, name, _: Measured(name, 0.0, "", None))
    run, keeper = (
        refined(model, images, recipe, groups=groups),
        keeper_of(recipe, model, images, CPU),
    )
    used, held = set(torch.cat(ids).tolist()), set(keeper.held.tolist())
    assert len(held) == 20 and not used & held and used | held == set(range(80))
    assert set(run.queue.ids.tolist()) <= used
    assert set(keeper.bank.tolist()) <= used
    assert images.labels[keeper.held].bincount().tolist() == [5] * 4


@pytest.mark.parametrize(
    ("n", "held", "bank"), [(400, 100, 300), (3000, 300, 1000), (20_000, 1000, 1000)]
)
@pytest.mark.parametrize("labelled", [True, False])
def test_a_tenth_is_held_out_within_bounds(model, monkeypatch, n, held, bank, labelled):
    monkeypatch.setattr(keeping, "LEAST", 100)
    pixels = torch.zeros(1, 3, 8, 8, dtype=torch.uint8).expand(n, -1, -1, -1)
    some = ImageSet(pixels, torch.arange(n) % 7 if labelled else None)
    keeper = keeper_of(BEST, model, some, CPU)
    assert [len(x) for x in (keeper.held, keeper.bank)] == [held, bank * labelled]
    assert torch.cat([keeper.held, keeper.used]).unique().tolist() == list(range(n))


@pytest.mark.parametrize("at", [3, 6, 7])
def test_resumed_it_ends_as_the_uninterrupted_run(model, images, whole, tmp_path, at):
    """In stage 2, after a moment, between two of them."""
    asked = []
    options = {"out": tmp_path}
    stopped = refined(model, images, stop=lambda: asked.append(1) or len(asked) > at, **options)
    assert (stopped.verdict is None) == (at <= BEST.head_steps)
    resumed = refined(model, images, resume=True, **options)
    again = refined(model, images, resume=True, **options)  # from the state after the last step
    for run in (resumed, again):
        assert_weights(run.model, whole.model.state_dict())
        assert run.verdict == whole.verdict
    card = load_model(tmp_path).refiner_card
    assert card["verdict"] == str(whole.verdict) and card["held_out"]["images"] == 20
    assert f"- Verdict: {whole.verdict}" in (tmp_path / "README.md").read_text()


def test_without_labels_the_verdict_is_a_guess(model, images):
    for some in (images.images, replace(images, labels=images.labels * 0)):
        verdict = refined(model, some).verdict
        assert verdict.interval is None and not verdict.real and verdict.by == "participation ratio"
        assert "a guess, as there are no labels" in str(verdict) and "block" in str(verdict)
        assert (verdict.kept == "before") == (verdict.before >= verdict.refined)


def test_sets_that_are_too_small_and_streams_go_on_without(model, images):
    few = images[:79]
    with pytest.warns(UserWarning, match="79 images are too few to hold 20 out"):
        run = refined(model, few)
    assert run.verdict is None and not any("held_out" in e for e in run.history)
    assert_weights(run.model, refined(model, few, tiny(seed=3)).model.state_dict())
    with pytest.warns(UserWarning, match="a stream has no images to hold out"):
        assert keeper_of(BEST, model, ImageStream.__new__(ImageStream), CPU) is None


def test_only_the_presets_of_the_course_hold_images_out(model):
    assert Recipe().keep == Recipe.paper("L/16").keep == Recipe.fitted(model, 4000).keep == "last"
    assert Recipe.cpu().keep == Recipe.gpu().keep == "best"
    old = {name: value for name, value in recipe_dict(Recipe.cpu()).items() if name != "keep"}
    assert recipe_from(old) == Recipe.cpu(keep="last")


def test_the_command_says_the_verdict_last(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(planning, "plan", lambda *_, **__: "")
    save_model(model, tmp_path / "mae")
    words = ["refine", "--model", str(tmp_path / "mae"), "--data", "digits", "--images", "80"]
    words += ["--out", str(tmp_path / "out")]
    for name in ("batch", "head_steps", "steps", "hidden", "predictor_hidden", "out", "queue"):
        words += ["--set", f"{name}={getattr(BEST, name)}"]
    words += ["--set", "blocks=(1, 2)", "--set", "frozen_blocks=0"]
    assert cli.main(words) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert capsys.readouterr().out.splitlines()[-1] == card["verdict"]
