"""Fine-tuning: the parts do what their names say, and a run is a function of (images, recipe)."""

import gc
import math
import weakref
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import refiner
from refiner.images.sets import ImageSet
from refiner.images.sources import keep_on
from refiner.models.load import build_vit
from refiner.training import finetuning
from refiner.training.finetuning import (
    Classifier,
    FinetuneRecipe,
    few_labels,
    finetune,
    parameter_groups,
    set_drop_path,
)
from refiner.training.loop import Loop, Stage
from refiner.training.states import load_state, save_state

PLAIN = FinetuneRecipe(
    epochs=1,
    batch=8,
    mixup=0.0,
    cutmix=0.0,
    smoothing=0.0,
    drop_path=0.0,
    crop=(1.0, 1.0),
    flip=0.0,
    jitter=0.0,
    ema=0.0,
)


def encoder(**options):
    return build_vit(size=16, patch=4, dim=24, depth=3, heads=2, seed=0, **options)


def coloured(n=32, classes=4, seed=0, names=(3, 5, 6, 9)):
    """Noise whose mean colour tells the class; labels are not 0, 1, 2, …"""
    g = torch.Generator().manual_seed(seed)
    y = torch.arange(n) % classes
    colour = torch.tensor([[200, 40, 40], [40, 200, 40], [40, 40, 200], [200, 200, 40]])[y]
    noise = torch.randint(-30, 31, (n, 3, 16, 16), generator=g)
    return ImageSet((colour[:, :, None, None] + noise).to(torch.uint8), torch.tensor(names)[y])


def begin(recipe, images=None, **options):
    steps = finetuning.begin(encoder(**options), images or coloured(), recipe, torch.device("cpu"))
    steps.view = replace(steps.view, ratio=(1.0, 1.0))  # with a scale of 1: the whole image
    return steps


def test_it_learns_what_colour_tells_and_leaves_the_model_alone():
    model = encoder()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = finetune(model, coloured(), recipe=FinetuneRecipe.cpu(epochs=12, seed=1), progress=False)
    assert run.accuracy(coloured(seed=5)) > 0.9
    assert set(run.predict(coloured(seed=5)).tolist()) <= {3, 5, 6, 9}
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert not model.training and not run.model.training


def test_the_first_step_is_plain_adamw_on_the_cross_entropy():
    """Without augmentation, one step equals a computation by hand."""
    steps, images = begin(PLAIN), coloured()
    twin = Classifier(encoder(), steps.model.classes, "cls")
    twin.load_state_dict(steps.model.state_dict())
    index = steps.source.order(0)
    pixels = (images.images[index].float() / 255 - 0.5) / 0.25
    pooled = twin.encoder.forward_features(pixels)[:, 0]
    loss = F.cross_entropy(twin.head(pooled), steps.labels[index])
    loss.backward()
    run = finetuning.loop_of(steps)
    run.one_step(1, 0)
    assert run.seen[0]["loss"].item() == pytest.approx(loss.item(), rel=1e-5)
    for mine, theirs in zip(steps.model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, atol=1e-6, rtol=1e-3)
    # AdamW's first step moves each weight by its learning rate against the gradient's sign.
    weight, origin = steps.model.head.weight, twin.head.weight
    lr = run.stages[1].optimizer.param_groups[-2]["lr"]
    expected = origin * (1 - lr * PLAIN.weight_decay) - lr * origin.grad.sign()
    torch.testing.assert_close(weight, expected, atol=2e-3 * lr + 1e-7, rtol=1e-3)


def test_learning_rates_fall_by_layer_and_vectors_do_not_decay():
    model = Classifier(encoder(), torch.arange(4), "cls")
    groups = parameter_groups(model, FinetuneRecipe(layer_decay=0.5, weight_decay=0.1))
    scale = {id(p): g["lr_scale"] for g in groups for p in g["params"]}
    decay = {id(p): g["weight_decay"] for g in groups for p in g["params"]}
    names = dict(model.named_parameters())
    assert set(scale) == {id(p) for p in names.values()}
    for name, p in names.items():
        if name.startswith("encoder.blocks."):
            block = int(name.split(".")[2])
            assert scale[id(p)] == 0.5 ** (3 - block)
        elif name.startswith(("encoder.patch_embed", "encoder.cls_token", "encoder.pos_embed")):
            assert scale[id(p)] == 0.5**4
        else:
            assert scale[id(p)] == (1.0 if name.startswith("head") else 0.5)
        free = p.ndim == 1 or name in ("encoder.cls_token", "encoder.pos_embed")
        assert decay[id(p)] == (0.0 if free else 0.1), name


def test_targets_are_mixed_as_the_images_are():
    images = coloured(16)
    recipe = FinetuneRecipe(
        batch=16, mixup=1.0, cutmix=0.0, smoothing=0.1, crop=(1.0, 1.0), flip=0.0, jitter=0.0
    )
    run = begin(recipe, images)
    x, target = run.mixed(3)
    torch.testing.assert_close(target.sum(1), torch.ones(16))
    index = run.source.order(3)
    pixels = (images.images[index].float() / 255 - 0.5) / 0.25
    y = F.one_hot(run.labels[index], 4) * 0.9 + 0.1 / 4
    # One share λ explains both the pixels and the targets.
    spread = pixels - pixels.flip(0)
    share = float(((x - pixels.flip(0)) * spread).sum() / spread.square().sum())
    assert 0 < share < 1
    torch.testing.assert_close(x, share * pixels + (1 - share) * pixels.flip(0), atol=1e-4, rtol=0)
    torch.testing.assert_close(target, share * y + (1 - share) * y.flip(0), atol=1e-4, rtol=0)


def test_smoothing_alone_keeps_images_and_gives_every_class_its_share():
    recipe = FinetuneRecipe(batch=8, mixup=0.0, cutmix=0.0, smoothing=0.2)
    target = begin(recipe).mixed(0)[1]
    assert sorted(set(target.flatten().tolist())) == pytest.approx([0.05, 0.85])


def test_the_average_follows_the_weights():
    """Against the sum by hand: timm's warm-up of the decay, 1 - (1 + t)^-2/3."""
    recipe = FinetuneRecipe.cpu(epochs=3, batch=8, ema=0.5)
    steps = begin(recipe)
    run, average = finetuning.loop_of(steps), {}
    average = {k: v.clone() for k, v in steps.model.named_parameters()}
    for step in range(4):
        run.one_step(1, step)
        decay = min(0.5, 1 - (step + 2) ** (-2 / 3))
        for k, v in steps.model.named_parameters():
            average[k].mul_(decay).add_(v.detach(), alpha=1 - decay)
    for k, v in run.ema.module.named_parameters():
        torch.testing.assert_close(v, average[k], atol=1e-6, rtol=1e-4)


def test_stochastic_depth_rises_to_its_rate():
    model = encoder()
    set_drop_path(model, 0.3)
    rates = [getattr(block.drop_path1, "drop_prob", 0.0) for block in model.blocks]
    assert rates == pytest.approx([0, 0.15, 0.3])
    model.eval()
    x = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(model(x), encoder()(x))
    set_drop_path(model, 0.0)
    assert isinstance(model.blocks[2].drop_path1, nn.Identity)


def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path):
    recipe = FinetuneRecipe(epochs=2, batch=8, mixup=0.8, cutmix=1.0, drop_path=0.3, ema=0.99)
    whole = finetune(encoder(), coloured(), recipe=recipe, progress=False)
    asked = []
    stopped = finetune(
        encoder(),
        coloured(),
        recipe=recipe,
        out=tmp_path,
        progress=False,
        stop=lambda: asked.append(1) or len(asked) > 5,
    )
    assert not stopped.history and load_state(tmp_path / "finetune.pt")["done"] == 5
    torch.manual_seed(123)  # the global state must not matter
    np.random.seed(5)
    again = finetune(
        encoder(), coloured(), recipe=recipe, out=tmp_path, resume=True, progress=False
    )
    for a, b in zip(whole.model.parameters(), again.model.parameters(), strict=True):
        assert torch.equal(a, b)
    with pytest.raises(ValueError, match="recipe is another one"):
        finetune(encoder(), coloured(), recipe=PLAIN, out=tmp_path, resume=True, progress=False)


def test_global_random_states_are_left_as_they_were():
    torch.manual_seed(1)
    np.random.seed(1)
    expected = torch.rand(3).tolist(), np.random.rand(3).tolist()
    torch.manual_seed(1)
    np.random.seed(1)
    finetune(encoder(), coloured(16), recipe=FinetuneRecipe(epochs=1, batch=8), progress=False)
    assert (torch.rand(3).tolist(), np.random.rand(3).tolist()) == expected


def test_other_seeds_other_runs_and_the_same_seed_the_same():
    recipes = [FinetuneRecipe.cpu(epochs=1, seed=s) for s in (0, 0, 1)]
    runs = [finetune(encoder(), coloured(), recipe=r, progress=False) for r in recipes]
    weights = [r.model.head.weight for r in runs]
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[0], weights[2])


def test_few_images_still_get_their_steps_and_an_even_batch():
    recipe = FinetuneRecipe.low_shot("cpu", epochs=1, least_steps=7)
    run = begin(recipe, coloured(5))
    assert run.batch == 4 and run.count == 7
    assert recipe.mixup == recipe.cutmix == 0


def test_few_labels_are_the_images_of_the_low_shot_probe():
    """The same draws: a linear probe on them gives the low-shot probe's accuracies."""
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 3
    x = torch.randn(60, 5, generator=g) + y[:, None]
    images = ImageSet(
        torch.zeros(60, 3, 4, 4, dtype=torch.uint8), y, factors={"at": np.arange(60.0)}
    )
    expected = refiner.low_shot(
        x, y, x, y, shots=(2,), fractions=(0.25,), draws=2, standardize=False
    )
    for s, size in enumerate((2, 0.25)):
        for draw in range(2):
            some = few_labels(images, size, draw=draw)
            at = torch.tensor(some.factors["at"]).long()
            found = refiner.linear_probe(x[at], y[at], x, y, penalties=[1e-2], standardize=False)
            assert float(found.accuracy) == pytest.approx(float(expected.draws[s, draw]))
    assert few_labels(images, 0.01).labels.tolist().count(0) == 1
    for wrong in (0, 21, 1.5, -1):
        with pytest.raises(ValueError, match="cannot be drawn"):
            few_labels(images, wrong)


def test_without_class_token_the_patches_are_pooled():
    images = coloured(16)
    run = finetune(
        encoder(class_token=False), images, recipe=FinetuneRecipe.cpu(epochs=1), progress=False
    )
    assert run.model.pooling == "patch" and len(run.predict(images)) == 16
    with pytest.raises(ValueError, match="pooled by 'cls'"):
        finetune(encoder(class_token=False), images, recipe=FinetuneRecipe.cpu(pooling="cls"))


def test_predictions_do_not_depend_on_the_batch():
    run = finetune(encoder(), coloured(), recipe=FinetuneRecipe.cpu(epochs=1), progress=False)
    assert torch.equal(run.predict(coloured(), batch=5), run.predict(coloured().images))


@pytest.mark.parametrize("labels", [None, torch.zeros(4, dtype=torch.int64)])
def test_labels_are_needed(labels):
    images = ImageSet(torch.zeros(4, 3, 16, 16, dtype=torch.uint8), labels)
    with pytest.raises(ValueError, match="needs"):
        finetune(encoder(), images, progress=False)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"batch": 1}, "batch is 1; it needs to be 2 or more"),
        ({"batch": 2.5}, "batch is 2.5; it needs to be a whole number"),
        ({"epochs": math.inf}, "epochs is inf"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_recipes_that_cannot_work_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        finetune(encoder(), coloured(), recipe=FinetuneRecipe.cpu(**change), progress=False)


def test_a_loss_that_is_not_finite_stops_the_run():
    with pytest.raises(FloatingPointError, match="try a lower learning rate"):
        finetune(
            encoder(), coloured(), recipe=FinetuneRecipe.cpu(lr=1e30, epochs=3), progress=False
        )


def test_only_the_same_model_and_images_go_on(tmp_path):
    options = {"recipe": FinetuneRecipe.cpu(epochs=2, batch=8), "out": tmp_path, "progress": False}
    finetune(encoder(), coloured(), save_every=3, **options)
    with pytest.raises(ValueError, match="has seen 32 images"):
        finetune(encoder(), coloured(24), resume=True, **options)
    other = encoder()
    torch.nn.init.normal_(other.norm.weight)
    with pytest.raises(ValueError, match="other weights at the start"):
        finetune(other, coloured(), resume=True, **options)
    assert finetune(encoder(), coloured(), resume=True, **options).history


def test_states_of_older_versions_still_load(tmp_path):
    options = {"recipe": FinetuneRecipe.cpu(epochs=2, batch=8), "out": tmp_path, "progress": False}
    whole = finetune(encoder(), coloured(), save_every=3, **options)
    state = load_state(tmp_path / "finetune.previous.pt")
    del state["source"], state["seen"]
    state["optimizer"] = state.pop("optimizers")["1"]
    save_state(tmp_path / "finetune.pt", state)
    resumed = finetune(encoder(), coloured(), resume=True, **options)
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_broken_weight_is_never_saved(tmp_path, monkeypatch):
    set_rate = Stage.set_rate
    options = {"recipe": FinetuneRecipe.cpu(epochs=2, batch=8), "out": tmp_path, "progress": False}

    def broken(self, step):
        if step == 4:
            torch.nn.init.constant_(self.optimizer.param_groups[0]["params"][0], math.nan)
        return set_rate(self, step)

    monkeypatch.setattr(Stage, "set_rate", broken)
    with pytest.raises(FloatingPointError, match="weight is no longer finite at step 6"):
        finetune(encoder(), coloured(), save_every=3, **options)
    assert load_state(tmp_path / "finetune.pt")["done"] == 3


@pytest.mark.parametrize("free, home", [(2, "cuda"), (1, "cpu")])
def test_pixels_move_to_a_gpu_that_has_room_for_them_twice(monkeypatch, free, home):
    """On tensors without numbers; what lies in files stays there."""
    if not torch.backends.cuda.is_built():
        pytest.skip("this torch knows no CUDA devices")
    gpu = torch.device("cuda", 0)
    with FakeTensorMode():
        pixels = torch.empty(100, 3, 8, 8, dtype=torch.uint8)
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (free * pixels.nbytes, 0))
        assert keep_on(gpu, pixels).device.type == home
        assert keep_on(torch.device("cpu"), pixels) is pixels
    assert keep_on(gpu, "files") == "files"


def test_a_finished_run_leaves_nothing_behind(monkeypatch):
    """Not even without the garbage collector: its weights would fill a GPU."""
    runs, start = [], Loop.__init__

    def counted(self, *args, **options):
        runs.append(weakref.ref(self))
        start(self, *args, **options)

    monkeypatch.setattr(Loop, "__init__", counted)
    gc.collect()
    gc.disable()
    try:
        finetune(encoder(), coloured(), recipe=FinetuneRecipe.cpu(epochs=1), progress=False)
        assert [there() for there in runs] == [None]
    finally:
        gc.enable()
