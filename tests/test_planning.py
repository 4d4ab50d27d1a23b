"""The plan before a run: memory by counting, what would fit, and that nothing is touched."""

import gc
import importlib
import math
import weakref
from dataclasses import replace

import pytest
import torch
from torch import nn

from refiner.base.places import amount, duration
from refiner.images.sets import ImageSet, LazyImages
from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.training import planning
from refiner.training.planning import (
    activations,
    describe,
    memory_needed,
    plan,
    saved_bytes,
    smaller,
)
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import begin

CPU = torch.device("cpu")
R = importlib.import_module(
    "refiner.training.refining"
)  # the attribute of that name is the function
TINY = Recipe.cpu(
    batch=8,
    head_steps=10,
    steps=20,
    hidden=16,
    predictor_hidden=16,
    out=8,
    queue=12,
    blocks=(2, 3, 4),
    frozen_blocks=0,
    keep="last",
    views=(View(size=16), View(size=8)),
    swap_from=0.3,
    swap_full=0.9,
)


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (16, 3, 16, 16), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def model():
    return build_vit(size=16, patch=4, dim=16, depth=4, heads=2, seed=0)


def test_plan_says_what_how_long_and_how_much(model, images):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    made = plan(model, images, recipe=TINY, device="cpu")
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    heads, encoder = made.step_seconds
    assert 0 < heads and 0 < encoder and made.seconds == pytest.approx(10 * heads + 20 * encoder)
    assert made.fits and not made.changes
    text = str(made)
    for part in (
        "4 blocks of width 16",
        "16 images of 16×16; views: 1 of 16 px, 1 of 8 px",
        "blocks 2, 3, 4 (the final output)",
        "10 steps, 5 epochs of batch 8",
        "20 steps, 10 epochs",
        "growing from 30% to 90%",
        "time     about",
        "GB:",
    ):
        assert part in text, part


def test_measuring_held_out_images_is_said_and_its_time_counted(model, monkeypatch):
    """A forward pass of a whole image takes its share of a step of stage 2, by pixels."""
    pixels = torch.randint(256, (2000, 3, 16, 16), dtype=torch.uint8)
    monkeypatch.setattr(planning, "_step_seconds", lambda *_, **__: (2.0, 3.0))
    recipe = replace(TINY, keep="best", frozen_blocks=1)
    made = plan(model, pixels, recipe=recipe, device="cpu", available=1e12)
    step = 8 * sum(v.keep * v.size**2 / 16**2 for v in recipe.views)  # whole images
    assert made.seconds == pytest.approx(10 * 2 + 20 * 3 + 8 * 200 * 3 / 4 * 2 / step)
    assert "keeps    the best weights, measured 8 times on 200 images" in str(made)
    assert plan(model, pixels, recipe=TINY, device="cpu", available=1e12).seconds == 10 * 2 + 20 * 3


def test_many_epochs_are_written_out(model, images):
    recipe = complete_recipe(replace(TINY, head_steps=3001), model, images)
    assert any("3001 steps, 1,500 epochs of batch 8" in x for x in describe(model, images, recipe))


def test_a_sudden_swap_is_said_in_words(model, images):
    lines = describe(model, images, complete_recipe(replace(TINY, swap_from=0.9), model, images))
    assert any("NNA, from 90% of stage 3 on" in line for line in lines)


def test_what_does_not_fit_comes_with_changes_that_need_less(model, images):
    made = plan(model, images, recipe=TINY, device="cpu", available=1000)
    assert not made.fits and "will probably not fit" in str(made)
    assert list(made.changes) == [
        "checkpoint=True",
        "frozen_blocks=1",
        "blocks=(2, 4)",
        "batch=4",
        "all of these",
    ]
    assert all(size < made.bytes for size in made.changes.values())
    assert made.changes["all of these"] == min(made.changes.values())


def test_suggested_changes_are_recipes_that_work(model, images):
    for how, recipe in smaller(complete_recipe(TINY, model, images), 4).items():
        assert complete_recipe(recipe, model, images) == recipe, how


def test_weights_are_counted_with_their_gradients_and_averages(model, images):
    recipe = complete_recipe(replace(TINY, frozen_blocks=1), model, images)
    memory = memory_needed(model, images, recipe, CPU)
    everything = sum(p.numel() for p in model.parameters())
    frozen = [model.patch_embed, model.blocks[0]]
    frozen = sum(p.numel() for m in frozen for p in m.parameters())
    frozen += model.cls_token.numel() + model.pos_embed.numel()
    assert memory["encoder"] == 4 * (2 * everything + 3 * (everything - frozen))
    # 16 → 16 → 16 → 8 and 8 → 16 → 8, three heads; weight, gradient and two averages.
    assert memory["heads"] == 16 * 3 * (16 * 16 + 16 * 16 + 16 * 8 + 8 * 16 + 16 * 8)
    assert memory["queue"] == 4 * 12 * 8 * 3


def test_activations_are_those_that_the_graph_holds(model, images):
    """They grow with the batch and with nothing else; checkpointing leaves a few."""
    run = begin(model, complete_recipe(TINY, model, images), CPU)
    image, copies = activations(run, images, CPU)
    assert copies < image / 4
    for n in (8, 16):
        assert saved_bytes(run, images, CPU, n) == pytest.approx(n * image, rel=0.05)
    # Each block keeps at least its input of attention and MLP and the four-fold hidden layer.
    tokens = (1 + 16) + (1 + 4)
    assert image > tokens * 16 * (1 + 3 + 1 + 4 + 4) * 4
    checkpointed = replace(run, recipe=replace(run.recipe, checkpoint=True))
    assert activations(checkpointed, images, CPU)[0] < image / 2


def test_copies_of_the_weights_in_bfloat16_are_not_multiplied_by_the_batch(
    model, images, monkeypatch
):
    """As a GPU makes them, once a step: two bytes for each number of a matrix."""
    run = begin(model, complete_recipe(TINY, model, images), CPU)
    monkeypatch.setattr(planning, "autocast", lambda _: torch.autocast("cpu", torch.bfloat16))
    image, copies = activations(run, images, CPU)
    matrices = [m.weight for m in run.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    matrices += [p for p in run.heads.parameters() if p.dim() == 3]
    expected = 2 * sum(p.numel() for p in matrices)
    assert copies == pytest.approx(expected, rel=0.2)
    assert saved_bytes(run, images, CPU, 16) == pytest.approx(16 * image + copies, rel=0.05)


def test_images_that_are_copied_to_the_device_are_counted(images):
    """Not those that lie there already, nor those that are read from files."""
    labelled = ImageSet(images=images, labels=torch.arange(16))
    assert planning._resident(labelled, torch.device("cuda")) == 16 * 3 * 16 * 16
    for there in (images, LazyImages(["a.png"], 16)):
        assert planning._resident(there, CPU) == 0


def test_memory_is_counted_elsewhere_if_the_device_is_too_small_to_look(model, images, monkeypatch):
    def full(model, recipe, device):
        if device.type == "cuda":
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return begin(model, recipe, device)

    monkeypatch.setattr(planning, "begin", full)
    recipe = complete_recipe(TINY, model, images)
    found = planning._memory(model, images, recipe, torch.device("cuda"))
    assert found == memory_needed(model, images, recipe, CPU) | {"images": images.nbytes}


# ---------------------------------------------------------------- time


@pytest.fixture
def whole_steps(monkeypatch):
    """Batches whose step was tried; above ``limit`` a step is out of memory."""
    step, tried = R.Loop.one_step, []

    def one_step(self, *args):
        tried.append(self.recipe.batch)
        if tried[-1] > one_step.limit:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        step(self, *args)

    one_step.limit = math.inf
    monkeypatch.setattr(R.Loop, "one_step", one_step)
    return one_step, tried


def test_no_batch_is_timed_that_will_not_fit(model, images, whole_steps):
    """Steps of 4, 16 and 64 images; what 16 need is there, what 64 need is not."""
    many = images.repeat(4, 1, 1, 1)
    recipe = complete_recipe(replace(TINY, batch=64), model, many)
    _, tried = whole_steps
    assert plan(model, many, recipe=recipe, device="cpu").fits and set(tried) == {4, 16, 64}
    tried.clear()
    some = memory_needed(model, many, replace(recipe, batch=16), CPU)
    room = planning.NOT_COUNTED * sum(some.values())
    made = plan(model, many, recipe=recipe, device="cpu", available=room)
    assert not made.fits and "will probably not fit" in str(made)
    assert set(tried) == {4, 16} and 0 < made.seconds < math.inf


@pytest.mark.parametrize("limit, what", [(16, "time     about"), (2, "unknown: no step fits")])
def test_a_device_without_the_memory_is_no_error(model, images, whole_steps, limit, what):
    """It may have less than was counted on; then the time follows from what it could do."""
    many = images.repeat(4, 1, 1, 1)
    whole_steps[0].limit = limit
    made = plan(model, many, recipe=replace(TINY, batch=64), device="cpu")
    assert what in str(made) and math.isnan(made.seconds) == (limit == 2)


@pytest.fixture
def without_gc(monkeypatch):
    """What is part of a cycle stays: on a GPU it would take the next run's memory."""
    gc.collect()
    gc.disable()
    monkeypatch.setattr(gc, "collect", lambda: None)
    yield
    gc.enable()


@pytest.mark.parametrize("limit", [math.inf, 16])
def test_what_was_timed_is_gone_before_the_next(
    model, images, whole_steps, without_gc, monkeypatch, limit
):
    made, stale, start = [], [], R.Loop.__init__

    def counted(self, *args, **kwargs):
        stale.append(sum(there() is not None for there in made))
        made.extend([weakref.ref(self), weakref.ref(args[0]["model"])])
        start(self, *args, **kwargs)

    monkeypatch.setattr(R.Loop, "__init__", counted)
    whole_steps[0].limit = limit
    many = images.repeat(4, 1, 1, 1)
    plan(model, many, recipe=replace(TINY, batch=64), device="cpu")
    assert stale == [0, 0, 0]
    R.refine(model, many, recipe=replace(TINY, batch=16), device="cpu", progress=False)
    assert stale[3] == 0 and all(there() is None for there in made)


def test_amounts_and_times_in_words():
    assert amount(2.44e9) == "2.4 GB" and amount(12.6e6) == "13 MB"
    assert [duration(s) for s in (50, 600, 36_000, 400_000)] == [
        "50 seconds",
        "10 minutes",
        "10 hours",
        "5 days",
    ]
