"""Presets are the paper's, scaled by the stated rules; bad input is refused; schedules by hand."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.training.heads import IDHeads, NeighborQueue
from refiner.training.recipe import (
    Recipe,
    complete_recipe,
    head_loss_weights,
    recipe_dict,
    recipe_from,
    swap_chance,
)
from refiner.training.refining import Refined, loop_of

TINY = Recipe.cpu(batch=8, blocks=(2, 3), frozen_blocks=1, queue=24, keep="last")


def pixels(n=16, size=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, size, size), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def model():
    return build_vit(dim=16, depth=3, heads=2, seed=0)


# ---------------------------------------------------------------- presets


@pytest.mark.parametrize(
    "name, depth, heads, temperature, batch, epochs, frozen, local",
    [
        ("L/16", 24, [17, 18, 19, 20, 21, 22, 23, 24], 0.2, 1024, 30, 0, 96),
        ("H/14", 32, [21, 22, 23, 24, 25, 26, 27, 28, 29, 30, 31, 32], 0.3, 512, 30, 0, 98),
        ("2B/14", 24, [17, 18, 19, 20, 21, 22, 23, 24], 0.35, 512, 20, 6, 98),
    ],
)
def test_paper_presets(name, depth, heads, temperature, batch, epochs, frozen, local):
    recipe = Recipe.paper(name)
    per_epoch = 1_281_167 // batch
    assert list(recipe.blocks) == heads and heads[-1] == depth, "the last is the final output"
    assert (recipe.temperature, recipe.batch, recipe.frozen_blocks) == (temperature, batch, frozen)
    assert (recipe.head_steps, recipe.steps) == (20 * per_epoch, epochs * per_epoch)
    assert (recipe.head_lr, recipe.lr, recipe.layer_decay) == (2e-4, 4e-4, 0.65)
    assert recipe.decay_last and not Recipe.cpu().decay_last
    assert (recipe.weight_decay, recipe.head_weight_decay) == (0.05, 1e-5)
    assert (recipe.queue, recipe.top_k, recipe.ema) == (65_536, 20, 0.9999)
    assert (recipe.hidden, recipe.predictor_hidden, recipe.out) == (2048, 4096, 256)
    assert [v.size for v in recipe.views] == [224] * 2 + [local] * 10
    assert [v.scale for v in recipe.views] == [(0.25, 1.0)] * 2 + [(0.05, 0.25)] * 10
    assert [v.blur for v in recipe.views] == [1.0, 0.1] + [0.5] * 10
    assert [v.solarize for v in recipe.views] == [0.0, 0.2] + [0.0] * 10
    assert local % int(name.split("/")[1]) == 0


def test_paper_epochs_follow_the_data():
    assert Recipe.paper("L/16", data2vec=True).steps == 20 * 1251
    assert Recipe.paper("2B/14", data2vec=True).steps == 20 * 2502
    small = Recipe.paper("H/14", images=5000, batch=500, temperature=0.25)
    assert (small.head_steps, small.steps, small.temperature) == (200, 300, 0.25)
    with pytest.raises(ValueError, match="'B/16'.*L/16, H/14, 2B/14"):
        Recipe.paper("B/16")
    with pytest.raises(ValueError, match="100 images are fewer than one batch of 1024"):
        Recipe.paper("L/16", images=100)


@pytest.mark.parametrize("stage, epochs", [(2, 20), (3, 30)])
def test_warm_up_of_the_paper_is_four_epochs_in_both_stages(stage, epochs):
    recipe = Recipe.paper("L/16")
    small = build_vit(size=8, patch=4, dim=8, depth=24, heads=2, seed=0)
    heads = IDHeads(8, 8, hidden=8, predictor_hidden=8, out=4)
    steps = SimpleNamespace(
        run=Refined(small, heads, NeighborQueue(4, 4, heads=8), recipe),
        take=print,
        source=None,
        device="cpu",
    )
    found = loop_of(steps).stages[stage]
    assert found.steps == 1251 * epochs
    rate = found.set_rate
    peak = (recipe.head_lr if stage == 2 else recipe.lr) * 4  # batch 1024 / 256
    four = 4 * 1251
    assert rate(four - 1) == pytest.approx(peak) and rate(four - 2) < peak
    assert rate(four // 2 - 1) == pytest.approx(peak / 2)
    assert rate(1251 * epochs) == pytest.approx(1e-6)
    middle = four + (1251 * epochs - four) // 2
    assert rate(middle) == pytest.approx((peak + 1e-6) / 2)
    for group in found.optimizer.param_groups:
        assert group["lr"] == rate(middle) * group.get("lr_scale", 1.0)


def shaped(width, *, size=224, patch=16, depth=24):
    card = {"preprocessing": {"size": size}}
    embed = SimpleNamespace(patch_size=(patch, patch))
    return SimpleNamespace(
        embed_dim=width, blocks=[0] * depth, refiner_card=card, patch_embed=embed
    )


def test_fitted_to_imagenet_and_a_large_model_is_nearly_the_papers():
    fitted, paper = Recipe.fitted(shaped(1024), 1_281_167), Recipe.paper("L/16")
    same = (
        "views",
        "batch",
        "queue",
        "top_k",
        "temperature",
        "hidden",
        "predictor_hidden",
        "out",
        "head_steps",
        "steps",
        "warmup",
        "head_warmup",
        "lr",
        "layer_decay",
        "decay_last",
        "blocks",
    )
    for name in same:
        assert getattr(fitted, name) == getattr(paper, name), name
    assert fitted.ema == pytest.approx(paper.ema, abs=1e-5)
    widths = {1024: 0.2, 1280: 0.3, 2560: 0.35, 384: 0.2, 1920: 0.325, 5000: 0.35}
    for width, temperature in widths.items():
        assert Recipe.fitted(shaped(width), 10**6).temperature == pytest.approx(temperature)


@pytest.mark.parametrize("n, size, patch", [(512, 32, 4), (8192, 64, 8), (50_000, 224, 14)])
def test_fitted_keeps_its_rules(n, size, patch):
    recipe = Recipe.fitted(shaped(384, size=size, patch=patch, depth=12), n)
    assert recipe.batch <= n / 32 and math.log2(recipe.batch) % 1 == 0
    assert n / 8 < recipe.queue <= n / 4
    assert recipe.steps == 30 * (n // recipe.batch) and recipe.blocks == (9, 10, 11, 12)
    assert recipe.top_k == max(1, round(20 * (recipe.queue / 65_536) ** 0.5))
    for view in recipe.views:
        assert view.size % patch == 0 and view.size <= size
        assert view.scale[0] ** 0.5 * size >= min(16, 0.7 * size) or view.scale[0] == 0.05
        assert 0 < view.scale[0] < view.scale[1] <= 1


def test_another_batch_changes_the_steps_of_a_fitted_recipe():
    recipe = Recipe.fitted(shaped(384), 6400, batch=64)
    assert recipe.batch == 64 and (recipe.head_steps, recipe.steps) == (2000, 3000)


@pytest.mark.parametrize("patch", [14, 16, 32])
def test_views_of_the_gpu_preset_suit_the_patch(patch):
    assert all(v.size % patch == 0 for v in Recipe.gpu(size=224, patch=patch).views)


def test_fitted_recipe_fits(model):
    recipe = complete_recipe(Recipe.fitted(model, pixels(64)), model, pixels(64))
    assert recipe.batch == 2 and recipe.queue == 16


def test_recipes_survive_json_and_older_ones_get_defaults():
    recipe = Recipe.paper("H/14", pooling=("cls", "patch") * 6)
    assert recipe_from(recipe_dict(recipe)) == recipe
    old = recipe_dict(Recipe.cpu())
    for name in ("loss_weights", "checkpoint", "compile", "head_warmup"):
        del old[name]
    assert recipe_from(old) == Recipe.cpu()


@pytest.mark.parametrize(
    "blocks, converted",
    [
        ([8, 9, 10, 11], (9, 10, 11, 12)),
        ([0, -1], (1, -1)),
        (11, (12,)),
        (-2, (-2,)),
        (None, None),
    ],
)
def test_blocks_of_older_recipes_count_from_0_and_are_converted(blocks, converted):
    new = recipe_dict(Recipe.cpu()) | {"blocks": blocks}
    old = {name: value for name, value in new.items() if name != "blocks_from"}
    assert recipe_from(old).blocks == converted
    several = [blocks] if isinstance(blocks, int) else blocks
    assert recipe_from(new).blocks == (several and tuple(several))
    assert recipe_from(json.loads(json.dumps(recipe_dict(recipe_from(old))))).blocks == converted


# ---------------------------------------------------------------- schedules


def test_swapping_may_begin_all_at_once():
    recipe = Recipe.cpu(steps=100, swap_from=0.4, swap_full=0.4)
    assert [swap_chance(recipe, step) for step in (0, 39, 40, 99)] == [0, 0, 1, 1]


def test_loss_weights():
    recipe = Recipe.cpu(blocks=(2, 3, 4), steps=100)
    assert head_loss_weights(recipe, 50) is None
    decay = replace(recipe, loss_weights="decay")
    assert head_loss_weights(decay, 25) == pytest.approx([0.75, 0.75, 1])
    staggered = replace(recipe, loss_weights="staggered")
    expected = {0: [1, 1, 1], 25: [0.5, 1, 1], 50: [0, 1, 1], 75: [0, 0.5, 1], 100: [0, 0, 1]}
    for step, weights in expected.items():
        assert head_loss_weights(staggered, step) == pytest.approx(weights)
    assert head_loss_weights(replace(decay, blocks=(4,)), 50) is None


# ---------------------------------------------------------------- filled in


@pytest.mark.parametrize("blocks", [(3, 2), (-1, 2), (2, 3)])
def test_poolings_move_with_their_blocks(model, blocks):
    pooling = ("cls", "patch") if blocks == (2, 3) else ("patch", "cls")
    recipe = complete_recipe(replace(TINY, blocks=blocks, pooling=pooling), model, pixels())
    assert recipe.blocks == (2, 3) and recipe.pooling == ("cls", "patch")


def test_counts_become_ints_and_one_block_a_tuple(model):
    recipe = complete_recipe(replace(TINY, blocks=-1, steps=1e4, top_k=3.0), model, pixels())
    assert recipe == complete_recipe(
        replace(TINY, blocks=(3,), steps=10_000, top_k=3), model, pixels()
    )
    assert type(recipe.steps) is type(recipe.top_k) is int


# ---------------------------------------------------------------- bad input


def nan_pixels():
    x = pixels().float() / 255
    x[3, 1, 2, 2] = math.nan
    return x


@pytest.mark.parametrize(
    "change, images, message",
    [
        ({}, pixels(4), "4 images are fewer than one batch of 8"),
        ({}, pixels(size=16), "images of 16 pixels are smaller than a view of 32"),
        ({}, pixels(1).repeat(16, 1, 1, 1), "look all alike"),
        ({}, nan_pixels(), "NaN or outside of 0 to 1"),
        ({}, pixels().float(), "NaN or outside of 0 to 1"),
        ({}, pixels()[:, :1], "takes images of 3 channels, and these have 1"),
        ({"views": (View(size=30), View(size=16))}, pixels(), "no multiple of the patch of 4"),
        ({"blocks": (2, 4)}, pixels(), "different blocks from 1 to 3"),
        ({"blocks": (0, 2)}, pixels(), "blocks count from 1, choose different blocks from 1 to 3"),
        ({"blocks": (-4, 2)}, pixels(), "different blocks from 1 to 3"),
        ({"pooling": ("cls", "patch", "cls")}, pixels(), "3 poolings for 2 heads"),
        ({"pooling": ("cls", "mean")}, pixels(), "pooling is 'mean'; choose 'cls', 'patch'"),
        ({"loss_weights": "linear"}, pixels(), "choose 'constant', 'decay', 'staggered'"),
        ({"temperature": 0.0}, pixels(), "temperature is 0.0"),
        ({"batch": 1}, pixels(), "batch is 1; it needs to be 2 or more"),
        ({"top_k": 0}, pixels(), "top_k is 0"),
        ({"top_k": 2.5}, pixels(), "top_k is 2.5; it needs to be a whole number"),
        ({"steps": math.inf}, pixels(), "steps is inf; it needs to be a whole number"),
        ({"steps": None}, pixels(), "steps is None; it needs to be a whole number"),
        ({"seed": -1}, pixels(), "seed is -1; it needs to be 0 or more"),
        ({"blocks": 1.5}, pixels(), "blocks is 1.5; it needs to be a whole number"),
        ({"blocks": (2, 3), "frozen_blocks": 2}, pixels(), "block 2 trains nothing when 2 blocks"),
        ({"out": 0}, pixels(), "out is 0"),
        ({"lr": math.nan}, pixels(), "lr is nan"),
        ({"ema": 1.5}, pixels(), "ema is 1.5; it needs to be between 0 and 1"),
        ({"clip": 0.0}, pixels(), "clip is 0.0; it needs to be above 0"),
        ({"swap_from": 0.5, "swap_full": 0.2}, pixels(), "cannot begin at 0.5 and be full at 0.2"),
    ],
)
def test_bad_input_is_refused_before_training(model, change, images, message):
    with pytest.raises(ValueError, match=message):
        complete_recipe(replace(TINY, **change), model, images)


def test_floats_from_0_to_1_are_images(model):
    assert complete_recipe(TINY, model, pixels().float() / 255).pooling == "cls"
