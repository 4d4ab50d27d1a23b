"""Refinement: stages touch what they should, draws repeat, runs resume, bad input is refused."""

import copy
import importlib
import json
from dataclasses import replace
from functools import partialmethod

import pytest
import torch
import torch.nn.functional as F

from refiner.images.load import load_images
from refiner.images.sets import ImageSet
from refiner.images.toybox import render
from refiner.images.views import View
from refiner.models.encoders import allow_any_size, head_features, keep_patches
from refiner.models.load import build_vit, copy_model, load_model
from refiner.training import step as step_module
from refiner.training.heads import IDHeads, NeighborQueue, load_heads, nna_loss
from refiner.training.step import draw_patches, view_features

R = importlib.import_module(
    "refiner.training.refining"
)  # the attribute of that name is the function
TINY = R.Recipe.cpu(
    batch=8,
    head_steps=4,
    steps=6,
    hidden=16,
    predictor_hidden=16,
    out=8,
    queue=24,
    frozen_blocks=1,
    blocks=(2, 3),
    keep="last",
)


@pytest.fixture(scope="module")
def images():
    scene = render(48)
    return ImageSet(
        images=scene.images,
        labels=scene.labels,
        classes=scene.classes,
        factors=scene.factors,
        name="toybox",
    )


@pytest.fixture
def model():
    return build_vit(dim=16, depth=3, heads=2, seed=0)


def test_stage_2_leaves_the_encoder_bit_identical(model, images):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = R.refine(model, images, recipe=replace(TINY, steps=0), progress=False)
    assert all(torch.equal(before[k], v) for k, v in run.model.state_dict().items())
    fresh = IDHeads(2, 16, hidden=16, predictor_hidden=16, out=8)
    torch.manual_seed(TINY.seed)
    fresh = IDHeads(2, 16, hidden=16, predictor_hidden=16, out=8)
    moved = (fresh.projector[0].weight - run.heads.projector[0].weight).abs().max()
    assert moved > 0, "the heads did train"


def test_stage_3_trains_all_but_the_frozen_blocks_and_not_the_original(model, images):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = R.refine(model, images, recipe=TINY, progress=False)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())
    after = run.model.state_dict()
    frozen = ("patch_embed", "cls_token", "pos_embed", "blocks.0.")
    for key, value in after.items():
        same = torch.equal(before[key], value)
        assert same == key.startswith(frozen), f"{key} {'kept' if same else 'changed'}"


def test_features_of_all_blocks_match_timms_own_pass(model):
    allow_any_size(model)
    x = torch.randn(4, 3, 32, 32)
    with torch.no_grad():
        ours = head_features(model, x, (1, 2, 3), pooling="cls")
        middle = model.forward_intermediates(
            x, return_prefix_tokens=True, norm=False, intermediates_only=True, output_fmt="NLC"
        )
        final = model.forward_features(x)
        patch = head_features(model, x, (2, 3), pooling="patch")
    assert torch.allclose(ours[0], middle[0][1][:, 0], atol=1e-5)
    assert torch.allclose(ours[1], middle[1][1][:, 0], atol=1e-5)
    assert torch.allclose(ours[2], final[:, 0], atol=1e-5)
    assert torch.allclose(patch[1], final[:, 1:].mean(1), atol=1e-5)


def test_grouping_views_by_size_changes_nothing(model):
    recipe = replace(TINY, pooling="cls", views=(View(size=32), View(size=16), View(size=32)))
    allow_any_size(model)
    views = [torch.randn(5, 3, v.size, v.size) for v in recipe.views]
    with torch.no_grad():
        together = view_features(model, views, recipe, frozen_blocks=0)
        for v, x in enumerate(views):
            alone = head_features(model, x, recipe.blocks)
            assert torch.allclose(together[:, v], alone, atol=1e-5)


def test_dropping_patches_keeps_the_class_token_and_the_share(model):
    tokens = torch.randn(6, 65, 16)
    chosen = draw_patches(2, 3, 64, 0.5, generator=torch.Generator().manual_seed(0))
    kept, _ = keep_patches(model, tokens, {}, chosen)
    assert kept.shape == (6, 33, 16) and torch.equal(kept[:, 0], tokens[:, 0])
    for b in range(6):
        matches = (kept[b, 1:, None] == tokens[b, None, 1:]).all(-1)
        assert matches.sum() == 32 and matches.any(0).sum() == 32, "different patches, all own"


def test_gradient_reaches_every_trained_block_through_every_head(model, images):
    recipe = R.complete_recipe(TINY, model, images)
    allow_any_size(model)
    heads = IDHeads(2, 16, hidden=16, predictor_hidden=16, out=8)
    queue = NeighborQueue(24, 8, heads=2)
    ids = torch.arange(8)
    step = R.refine_step(
        model,
        heads,
        queue,
        images.images[:8],
        ids,
        recipe,
        stage=3,
        swap_chance=1.0,
        generator=torch.Generator().manual_seed(0),
    )
    step.loss.sum().backward()
    assert model.patch_embed.proj.weight.grad is None
    assert model.blocks[0].mlp.fc1.weight.grad is None
    for block in model.blocks[1:]:
        assert block.mlp.fc1.weight.grad.abs().sum() > 0
    assert sorted(queue.ids[queue.ids >= 0].tolist()) == list(range(8))


def test_neighbors_and_loss_are_float32_where_the_heads_are_bfloat16(model, images):
    """As on a GPU; the same from the same projections in float64."""
    recipe = R.complete_recipe(replace(TINY, queue=512), model, images)
    heads = IDHeads(2, 16, hidden=16, predictor_hidden=16, out=8)
    queue = NeighborQueue(512, 8, heads=2)
    queue.push(torch.randn(2, 512, 8), torch.arange(100, 612))
    made = []
    heads.register_forward_hook(lambda module, given, result: made.extend(result))
    features = torch.randn(2, len(recipe.views), 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        step = R.refine_step(
            model,
            heads,
            copy.deepcopy(queue),
            None,
            torch.arange(8),
            recipe,
            stage=2,
            swap_chance=1.0,
            generator=torch.Generator().manual_seed(0),
            features=features,
        )
    z, p = (x.double() for x in made)
    assert made[1].dtype == torch.bfloat16 and step.similarity.dtype == torch.float32
    z = F.normalize(z[:, : recipe.global_views].detach(), dim=-1)
    similarities = z.flatten(1, 2) @ queue.vectors.double().mT
    value, where = similarities.max(-1)
    assert torch.allclose(step.similarity.double(), value.mean(1), atol=1e-6)
    neighbors = torch.stack([v[w] for v, w in zip(queue.vectors.double(), where, strict=True)])
    loss = nna_loss(p, z, neighbors.view_as(z), temperature=recipe.temperature, per_head=True)
    assert torch.allclose(step.loss.double(), loss, rtol=1e-6)


@pytest.mark.parametrize("decay_last", [False, True])
def test_layer_decay_is_a_power_of_the_depth(model, images, decay_last):
    recipe = replace(TINY, frozen_blocks=0, layer_decay=0.5, decay_last=decay_last)
    recipe = R.complete_recipe(recipe, model, images)
    heads = IDHeads(2, 16, hidden=16, predictor_hidden=16, out=8)
    run = R.Refined(model, heads, NeighborQueue(8, 8, heads=2), recipe)
    scale = {}
    for group in R._optimizer(run, 3).param_groups:
        for parameter in group["params"]:
            scale[id(parameter)] = group.get("lr_scale", 1.0)
    names = dict(model.named_parameters())
    assert set(scale) >= {id(p) for p in model.parameters()}
    # Layers from the top: block 2 with the final norm, block 1, block 0, embedding. In the authors'
    # code the norm is a layer of its own: scales decay ** (blocks + 1 - i), embedding first.
    powers = {
        "blocks.2.mlp.fc1.weight": 0,
        "blocks.1.norm1.bias": 1,
        "blocks.0.mlp.fc1.weight": 2,
        "patch_embed.proj.weight": 3,
        "cls_token": 3,
    }
    for name, power in powers.items():
        assert scale[id(names[name])] == pytest.approx(0.5 ** (power + decay_last)), name
    assert scale[id(names["norm.weight"])] == scale[id(names["norm.bias"])] == 1.0
    assert scale[id(heads.projector[0].weight)] == 1.0


def test_the_same_seed_gives_the_same_run(model, images):
    one, two = (R.refine(model, images, recipe=TINY, progress=False) for _ in range(2))
    for key, value in one.model.state_dict().items():
        assert torch.equal(value, two.model.state_dict()[key])
    other = R.refine(model, images, recipe=replace(TINY, seed=1), progress=False)
    assert not torch.equal(other.model.norm.weight, one.model.norm.weight)


def naive_kept_features(steps, step):
    """Each image's features from the step that drew its views, computed all over again."""
    recipe, pixels = steps.run.recipe, steps.source.pixels
    per_epoch = len(pixels) // recipe.batch
    ids, epoch = steps.order(step), step // per_epoch % recipe.cached_views
    features = []
    for i in ids.tolist():
        for earlier in range(epoch * per_epoch, (epoch + 1) * per_epoch):
            drawn = steps.order(earlier)
            if i in drawn:
                generator = R.step_generator(recipe.seed, earlier)
                x_LVBD = R.batch_features(
                    steps.run.model,
                    pixels[drawn],
                    recipe,
                    stage=2,
                    total=len(drawn),
                    generator=generator,
                )
                features.append(x_LVBD[:, :, drawn.tolist().index(i)])
    return torch.stack(features, dim=2), ids


def test_kept_features_are_those_of_the_same_views(model, images, monkeypatch):
    """Twenty images make two batches an epoch and four that wait for another epoch."""
    recipe = replace(TINY, head_steps=10, steps=2, cached_views=2)
    passes = []
    counted = R.batch_features
    for module in (R, step_module):
        counter = lambda *a, **k: passes.append(1) or counted(*a, **k)  # noqa: E731
        monkeypatch.setattr(module, "batch_features", counter)
    options = {"recipe": recipe, "progress": False, "log_every": 1}
    run = R.refine(model, images[:20], **options)
    assert len(passes) == 4 + 2, "two epochs of two batches, then stage 3"
    monkeypatch.setattr(R.Steps, "kept_features", naive_kept_features)
    naive = R.refine(model, images[:20], **options)
    for ours, theirs in zip(run.history, naive.history, strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=1e-5)
    new = R.refine(model, images[:20], **options | {"recipe": replace(recipe, cached_views=0)})
    same = [a["loss"] == b["loss"] for a, b in zip(run.history, new.history, strict=True)]
    assert all(same[:4]) and not any(same[4:10]), "the first epochs are as without"


def test_later_epochs_deal_the_kept_images_out_anew(model, images):
    recipe = R.complete_recipe(replace(TINY, head_steps=10, cached_views=2), model, images)
    cpu = torch.device("cpu")
    order = R.Steps(R.begin(model, recipe, cpu), images[:20], cpu).order
    epochs = [torch.cat([order(2 * e), order(2 * e + 1)]) for e in range(5)]
    for first, later in ((0, 2), (1, 3), (0, 4)):
        assert sorted(epochs[first].tolist()) == sorted(epochs[later].tolist())
        assert not torch.equal(epochs[first], epochs[later])
    assert not torch.equal(epochs[2], epochs[4])


@pytest.mark.parametrize("kill_at", [3, 7])
def test_a_run_with_kept_features_resumes_to_the_same(
    model, images, tmp_path, monkeypatch, kill_at
):
    recipe = replace(TINY, head_steps=9, steps=2, cached_views=2)
    options = {"recipe": recipe, "progress": False, "log_every": 1}
    whole = R.refine(model, images[:20], **options)
    step, calls = R.Loop.one_step, []

    def interrupt(self, *args):
        calls.append(1)
        if len(calls) > kill_at:
            raise KeyboardInterrupt
        return step(self, *args)

    monkeypatch.setattr(R.Loop, "one_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        R.refine(model, images[:20], out=tmp_path, save_every=1, **options)
    monkeypatch.setattr(R.Loop, "one_step", step)
    resumed = R.refine(model, images[:20], out=tmp_path, save_every=1, resume=True, **options)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]
    assert torch.equal(whole.model.norm.weight, resumed.model.norm.weight)


@pytest.mark.parametrize("kill_at", [3, 7])
def test_resumed_is_the_uninterrupted_run(model, images, tmp_path, monkeypatch, kill_at):
    whole = R.refine(model, images, recipe=TINY, progress=False, log_every=1)
    step, calls = R.refine_step, []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) > kill_at:
            raise KeyboardInterrupt
        return step(*args, **kwargs)

    options = {"recipe": TINY, "out": tmp_path, "save_every": 1, "progress": False, "log_every": 1}
    monkeypatch.setattr(R, "refine_step", interrupt)
    with pytest.raises(KeyboardInterrupt):
        R.refine(model, images, **options)
    monkeypatch.setattr(R, "refine_step", step)
    resumed = R.refine(model, images, resume=True, **options)
    for a, b in ((whole.model, resumed.model), (whole.heads, resumed.heads)):
        for key, value in a.state_dict().items():
            assert torch.equal(value, b.state_dict()[key]), key
    assert torch.equal(whole.queue.vectors, resumed.queue.vectors)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]


def test_saved_model_is_the_refined_one(model, images, tmp_path):
    run = R.refine(model, images, recipe=TINY, out=tmp_path / "refined", progress=False)
    again = load_model(tmp_path / "refined")
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(again.forward_features(x), run.model.forward_features(x), atol=1e-6)
    assert again.refiner_card["refine_recipe"]["blocks"] == [2, 3]
    assert again.refiner_card["refined_from"] == "random"


def test_a_model_that_cannot_be_saved_is_refused_before_training(
    model, images, tmp_path, monkeypatch
):
    """Not after hours; without ``out`` it can be refined all the same."""
    del model.refiner_card["architecture"]
    model.blocks[1].mlp.fc1 = torch.nn.Linear(16, 7)
    model.blocks[1].mlp.fc2 = torch.nn.Linear(7, 16)
    taken, step = [], R.refine_step
    monkeypatch.setattr(R, "refine_step", lambda *a, **k: taken.append(1) or step(*a, **k))
    with pytest.raises(ValueError, match="cannot describe this VisionTransformer"):
        R.refine(model, images, recipe=TINY, out=tmp_path / "refined", progress=False)
    assert not taken and not (tmp_path / "refined").exists()
    assert R.refine(model, images, recipe=TINY, progress=False).history


def test_heads_come_back_with_their_queue(model, images, tmp_path):
    run = R.refine(model, images, recipe=TINY, out=tmp_path, progress=False)
    heads, queue, recipe = load_heads(tmp_path)
    assert recipe == run.recipe
    x_LVBD = torch.randn(2, 2, 8, 16)
    run.heads.eval()
    for ours, theirs in zip(heads(x_LVBD), run.heads(x_LVBD), strict=True):
        assert torch.equal(ours, theirs)
    assert all(torch.equal(v, run.queue.state_dict()[k]) for k, v in queue.state_dict().items())
    with pytest.raises(FileNotFoundError, match="no heads"):
        load_heads("mae_toybox")


def test_a_run_goes_on_from_given_heads_and_queue(model, images):
    """They are copied; without a step the run has exactly these."""
    first = R.refine(model, images, recipe=TINY, progress=False)
    before = copy.deepcopy((first.heads.state_dict(), first.queue.state_dict()))
    options = {"recipe": TINY, "heads": first.heads.eval(), "queue": first.queue, "progress": False}
    same = R.refine(first.model, images, stop=lambda: True, **options)
    for ours, theirs in zip(
        before, (same.heads.state_dict(), same.queue.state_dict()), strict=True
    ):
        assert all(torch.equal(value, theirs[key]) for key, value in ours.items())
    run = R.refine(first.model, images, log_every=1, **options)
    fresh = R.refine(first.model, images, recipe=TINY, progress=False, log_every=1)
    assert run.history[0]["age"][0] > 0 == fresh.history[0]["age"][0], "neighbors from the start"
    assert run.heads.training and not first.heads.training
    for ours, module in zip(before, (first.heads, first.queue), strict=True):
        assert all(torch.equal(value, module.state_dict()[key]) for key, value in ours.items())


def test_heads_and_queues_of_other_sizes_are_refused(model, images):
    run = R.refine(model, images, recipe=TINY, progress=False)
    options = {"recipe": replace(TINY, hidden=8), "progress": False}
    with pytest.raises(ValueError, match=r"the heads given.*is \[2, 16, 16\], not \[2, 16, 8\]"):
        R.refine(model, images, heads=run.heads, **options)
    options["recipe"] = replace(TINY, queue=30)
    with pytest.raises(ValueError, match=r"the queue given.*use the recipe that they were made"):
        R.refine(model, images, queue=run.queue, **options)
    options["recipe"] = TINY
    with pytest.raises(ValueError, match="holds image [0-9]+, but there are only 8 images"):
        R.refine(model, images[:8], queue=run.queue, **options)


def test_compiled_blocks_share_one_graph_for_each_size_and_change_no_number(
    model, images, monkeypatch
):
    """Shapes are fixed: none of the graphs is for all sizes. The last block's shortcut has none."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([tuple(x.shape) for x in inputs if isinstance(x, torch.Tensor)])
        return graph.forward

    compiled = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    recipe = replace(TINY, frozen_blocks=0, pooling="patch")
    run = R.refine(model, images, recipe=replace(recipe, compile=True), progress=False)
    # Two sizes of views, without gradients in stage 2 and with them in stage 3.
    assert len(graphs) == 4 and all(isinstance(n, int) for g in graphs for s in g for n in s)
    plain = R.refine(model, images, recipe=recipe, progress=False)
    for key, value in plain.model.state_dict().items():
        assert torch.allclose(value, run.model.state_dict()[key], atol=1e-4), key
    torch._dynamo.reset()


def test_a_folder_from_when_blocks_counted_from_0_is_converted(model, images, tmp_path):
    """Its card and its state name the blocks one lower; nothing else of them differs."""
    options = {"recipe": TINY, "out": tmp_path, "save_every": 5, "progress": False, "log_every": 1}
    run = R.refine(model, images, **options)
    card = json.loads((tmp_path / "card.json").read_text())
    (tmp_path / "card.json").write_text(json.dumps(card | {"refine_recipe": older(card)}))
    heads, _, recipe = load_heads(tmp_path)
    assert recipe == run.recipe and recipe.blocks == (2, 3)
    assert_same_state(heads, run.heads)
    state = torch.load(tmp_path / "state.previous.pt")
    assert 0 < state["done"] < TINY.head_steps + TINY.steps
    torch.save(state | {"recipe": older({"refine_recipe": state["recipe"]})}, tmp_path / "state.pt")
    resumed = R.refine(model, images, resume=True, **options)
    assert_same_state(resumed.model, run.model)
    assert_same_state(resumed.queue, run.queue)


def older(card):
    """The recipe as it was written before blocks counted from 1."""
    recipe = {name: value for name, value in card["refine_recipe"].items() if name != "blocks_from"}
    return recipe | {"blocks": [block - 1 for block in recipe["blocks"]]}


def assert_same_state(one, other):
    assert all(torch.equal(v, other.state_dict()[k]) for k, v in one.state_dict().items())


def test_embedded_heads_know_the_embedded_encoder():
    """An image's projection lies close to that of the same image in the queue, mirrored or not."""
    heads, queue, recipe = load_heads("mae_toybox_refined")
    model = allow_any_size(load_model("mae_toybox_refined"))
    newest = queue.ids[(queue.pushed - 1 - torch.arange(64)) % recipe.queue]
    assert len(newest.unique()) == 64
    shown = load_images("toybox", split="train", progress=False).images[newest]
    x = (shown.float() / 255 - 0.5) / 0.25
    with torch.no_grad():
        x_LBD = head_features(model, x, recipe.blocks, pooling=recipe.pooling)
        z_LVBO, _ = heads(x_LBD[:, None])
    similar_LBB = (
        z_LVBO[:, 0] @ queue.vectors[:, (queue.pushed - 1 - torch.arange(64)) % recipe.queue].mT
    )
    own_L = similar_LBB.diagonal(dim1=1, dim2=2).mean(1)
    others_L = (similar_LBB.sum((1, 2)) - similar_LBB.diagonal(dim1=1, dim2=2).sum(1)) / (64 * 63)
    assert (own_L > others_L + 0.3).all()


def test_labels_are_watched_but_never_learned_from(model, images):
    shuffled = ImageSet(images=images.images, labels=images.labels.flip(0), classes=images.classes)
    with_labels = R.refine(model, images, recipe=TINY, progress=False)
    for other in (images.images, shuffled):
        run = R.refine(model, other, recipe=TINY, progress=False)
        for key, value in with_labels.model.state_dict().items():
            assert torch.equal(value, run.model.state_dict()[key])


def test_swap_ramp():
    recipe = R.Recipe.cpu(steps=100, swap_from=0.2, swap_full=0.6)
    chances = [R.swap_chance(recipe, s) for s in (0, 20, 40, 60, 99)]
    assert chances == pytest.approx([0, 0, 0.5, 1, 1])
    assert R.swap_chance(R.Recipe.cpu(swap_from=0.0, swap_full=0.0), 0) == 1.0


def test_runs_without_anything_to_do_are_refused(model, images):
    with pytest.raises(ValueError, match="both 0: there is nothing to train"):
        R.refine(model, images, recipe=replace(TINY, head_steps=0, steps=0), progress=False)
    with pytest.raises(ValueError, match="evaluate_every needs an evaluate"):
        R.refine(model, images, recipe=TINY, progress=False, evaluate_every=2)


def test_evaluation_sees_the_average_and_does_not_disturb_the_run(model, images):
    seen = []

    def evaluate(encoder):
        seen.append(copy_model(encoder).norm.weight.detach())
        return {"knn": 0.5}

    plain = R.refine(model, images, recipe=TINY, progress=False)
    watched = R.refine(
        model, images, recipe=TINY, progress=False, evaluate=evaluate, evaluate_every=2, log_every=2
    )
    assert torch.equal(plain.model.norm.weight, watched.model.norm.weight)
    assert torch.equal(seen[-1], watched.model.norm.weight)
    assert [e["knn"] for e in watched.history if "knn" in e] == [0.5] * 3


@pytest.mark.parametrize(
    "change, message",
    [
        ({"blocks": (1, 7)}, r"heads on blocks \[1, 7\].*1 to 3"),
        ({"blocks": (1, 3), "frozen_blocks": 2}, "trains nothing"),
        ({"batch": 64}, "48 images are fewer than one batch of 64"),
        ({"views": (View(size=30), View(size=32))}, "30 pixels is no multiple of the patch of 4"),
        ({"views": (View(size=32),)}, "it needs to be 2 or more values"),
        ({"pooling": "max"}, "pooling is 'max'"),
        ({"swap": "all"}, "swap is 'all'"),
    ],
)
def test_bad_recipes_are_refused_before_training(model, images, change, message):
    with pytest.raises(ValueError, match=message):
        R.refine(model, images, recipe=replace(TINY, **change), progress=False)


def test_a_broken_loss_stops_with_an_explanation(model, images):
    with pytest.raises(FloatingPointError, match="not finite at stage 3, step 2"):
        R.refine(
            model, images, recipe=replace(TINY, lr=1e38, warmup=0), progress=False, log_every=1
        )
