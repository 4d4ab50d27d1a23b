"""Masked autoencoder: masking, loss, decoder against plain versions; exact resuming."""

import json
import time
from dataclasses import replace
from functools import partialmethod
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from refiner.images.toybox import render
from refiner.images.views import crop, crop_boxes
from refiner.models import mae as M
from refiner.models.encoders import last_tokens
from refiner.models.load import load_model
from refiner.training import loop, pretraining
from refiner.training.states import load_state, save_state

TINY = M.MAERecipe(dim=16, depth=2, heads=2, decoder_dim=12, decoder_heads=2, batch=8, steps=12)


@pytest.fixture(scope="module")
def pixels():
    return render(40).images


def test_patchify_takes_rows_of_patches_channels_last():
    x = torch.arange(2 * 3 * 8 * 12, dtype=torch.float32).reshape(2, 3, 8, 12)
    patches = M.patchify(x, 4)
    assert patches.shape == (2, 6, 48)
    row, column = 1, 2
    block = x[0, :, 4:8, 8:12].permute(1, 2, 0).flatten()
    assert torch.equal(patches[0, row * 3 + column], block)


def test_unpatchify_is_the_inverse():
    x = torch.randn(2, 3, 16, 16)
    assert torch.equal(M.unpatchify(M.patchify(x, 4), 4), x)


@pytest.mark.parametrize("ratio, kept", [(0.75, 16), (0.5, 32), (0.999, 1)])
def test_masking_hides_the_rest_and_is_uniform(ratio, kept):
    visible, mask = M.random_masking(500, 64, ratio, torch.Generator().manual_seed(0))
    assert visible.shape == (500, kept) and mask.sum(dim=1).eq(64 - kept).all()
    assert not mask.gather(1, visible).any()
    rate = (~mask).float().mean(dim=0)
    assert (rate - kept / 64).abs().max() < 0.12


def test_hidden_pixels_never_reach_the_encoder(pixels):
    mae = TINY.build().eval()
    x = pixels[:4].float() / 255
    visible, mask = M.random_masking(4, 64, 0.75, torch.Generator().manual_seed(0))
    hidden = M.unpatchify(mask[:, :, None].float().expand(-1, -1, 48), 4).bool()
    noisy = torch.where(hidden, torch.rand_like(x), x)
    with torch.no_grad():
        a, b = (last_tokens(mae.encoder, image, kept_BK=visible) for image in (x, noisy))
    assert torch.equal(a, b)


def test_without_a_mask_it_is_timms_own_forward(pixels):
    encoder = TINY.build().encoder.eval()
    x = pixels[:4].float() / 255
    with torch.no_grad():
        ours = encoder.norm(last_tokens(encoder, x))
        assert torch.allclose(ours, encoder.forward_features(x), atol=1e-5)


def test_order_of_the_visible_patches_is_irrelevant(pixels):
    mae = TINY.build().eval()
    x = pixels[:4].float() / 255
    visible, mask = M.random_masking(4, 64, 0.75, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, prediction = mae(x, visible, mask)
        loss2, prediction2 = mae(x, visible.flip(1), mask)
    assert torch.allclose(loss, loss2, atol=1e-6)
    assert torch.allclose(prediction, prediction2, atol=1e-5)


def test_without_a_decoder_mask_tokens_enter_the_encoder(pixels):
    """Against a plain version; hidden pixels change nothing, and all of the encoder learns."""
    mae = replace(TINY, decoder_depth=0).build().eval()
    x = pixels[:4].float() / 255
    visible, mask = M.random_masking(4, 64, 0.75, torch.Generator().manual_seed(0))
    loss, prediction = mae(x, visible, mask)
    loss.backward()
    unused = [name for name, p in mae.named_parameters() if p.grad is None]
    assert unused == [] and mae.mask_token.shape == (1, 1, 16)
    encoder, wanted = mae.encoder, torch.empty_like(prediction)
    with torch.no_grad():
        for b in range(4):
            tokens = [encoder.cls_token[0, 0] + encoder.pos_embed[0, 0]]
            patches = encoder.patch_embed(x[b : b + 1])[0]
            for n in range(64):
                seen = mae.mask_token[0, 0] if mask[b, n] else patches[n]
                tokens.append(seen + encoder.pos_embed[0, 1 + n])
            y = encoder.norm(encoder.blocks(torch.stack(tokens)[None]))
            wanted[b] = mae.decoder_pred(y)[0, 1:]
        assert torch.allclose(prediction, wanted, atol=1e-5)
        hidden = M.unpatchify(mask[:, :, None].float().expand(-1, -1, 48), 4).bool()
        noisy = torch.where(hidden, torch.rand_like(x), x)
        assert torch.equal(mae.predict(noisy, visible, mask), prediction)


def test_without_a_decoder_it_is_saved_and_painted_with(pixels, tmp_path):
    recipe = replace(TINY, decoder_depth=0)
    run = pretraining.pretrain(pixels, recipe=recipe, out=tmp_path, progress=False)
    again = M.reconstruct(M.load_mae(tmp_path), pixels[:4])
    assert torch.equal(again["painted"], M.reconstruct(run.mae, pixels[:4])["painted"])
    assert "without a decoder" in json.loads((tmp_path / "card.json").read_text())["method"]


@pytest.mark.parametrize("normalize", [False, True])
def test_loss_is_the_mean_over_hidden_patches_only(pixels, normalize):
    mae = replace(TINY, normalize_targets=normalize).build().eval()
    x = pixels[:3].float() / 255
    visible, mask = M.random_masking(3, 64, 0.75, torch.Generator().manual_seed(0))
    with torch.no_grad():
        loss, prediction = mae(x, visible, mask)
    total, count = 0.0, 0
    for b in range(3):
        for n in range(64):
            if not mask[b, n]:
                continue
            r, c = divmod(n, 8)
            patch = x[b, :, 4 * r : 4 * r + 4, 4 * c : 4 * c + 4].permute(1, 2, 0).double().numpy()
            if normalize:
                patch = (patch - patch.mean()) / np.sqrt(patch.var(ddof=1) + 1e-6)
            total += ((prediction[b, n].numpy() - patch.ravel()) ** 2).mean()
            count += 1
    assert loss.item() == pytest.approx(total / count, rel=1e-5)


def test_training_lowers_the_loss_and_repeats_exactly(pixels):
    recipe = replace(TINY, steps=60, lr=5e-3)
    one, two = (
        pretraining.pretrain(pixels, recipe=recipe, progress=False, log_every=10) for _ in range(2)
    )
    losses = [entry["loss"] for entry in one.history]
    assert losses[-1] < 0.9 * losses[0]
    assert losses == [entry["loss"] for entry in two.history]


def test_interrupted_and_resumed_is_the_uninterrupted_run(pixels, tmp_path, monkeypatch):
    whole = pretraining.pretrain(pixels, recipe=TINY, progress=False, log_every=3)
    calls = []

    def interrupt(*args, **kwargs):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return masking(*args, **kwargs)

    masking = M.random_masking
    monkeypatch.setattr(pretraining, "random_masking", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(
            pixels, recipe=TINY, out=tmp_path, save_every=6, progress=False, log_every=3
        )
    monkeypatch.setattr(pretraining, "random_masking", masking)
    resumed = pretraining.pretrain(
        pixels, recipe=TINY, out=tmp_path, resume=True, save_every=6, progress=False, log_every=3
    )
    for key, value in whole.mae.state_dict().items():
        assert torch.equal(value, resumed.mae.state_dict()[key]), key
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]


def test_stopped_and_resumed_is_the_uninterrupted_run(pixels, tmp_path):
    """What a stopped run returns is the average of that moment, as the shadow in its state."""
    options = {"recipe": TINY, "out": tmp_path, "progress": False, "log_every": 3}
    whole = pretraining.pretrain(pixels, **options | {"out": None})
    asked = []
    stopped = pretraining.pretrain(
        pixels, stop=lambda: asked.append(1) or len(asked) > 5, **options
    )
    assert stopped.steps == 5 and [e["step"] for e in stopped.history] == [3]
    state = load_state(tmp_path / "state.pt")
    assert state["done"] == 5
    for key, value in stopped.mae.state_dict().items():
        assert torch.equal(value, state["ema"][key]), key
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["stopped_after_steps"] == 5
    resumed = pretraining.pretrain(pixels, resume=True, **options)
    assert resumed.steps == 12 and "stopped_after_steps" not in resumed.model.refiner_card
    for key, value in whole.mae.state_dict().items():
        assert torch.equal(value, resumed.mae.state_dict()[key]), key
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]


def test_a_deadline_that_is_over_leaves_the_weights_of_the_start(pixels, tmp_path):
    run = pretraining.pretrain(
        pixels, recipe=TINY, stop=time.monotonic(), out=tmp_path, progress=False
    )
    assert run.steps == 0 and run.history == []
    for key, value in TINY.build().state_dict().items():
        assert torch.equal(value, run.mae.state_dict()[key]), key
    assert M.load_mae(tmp_path).patches == 64
    later = pretraining.pretrain(pixels, recipe=TINY, stop=time.monotonic() + 600, progress=False)
    assert later.steps == 12


def test_by_default_states_are_saved_a_minute_apart(pixels, tmp_path, monkeypatch):
    """A step takes 25 seconds of this clock: three of them are more than a minute."""
    step, taken, saved = pretraining.loss_of, [], []
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(taken)))
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    monkeypatch.setattr(pretraining, "loss_of", lambda *a: taken.append(1) or step(*a))
    monkeypatch.setattr(loop, "save_state", lambda *_, **__: saved.append(len(taken)))
    pretraining.pretrain(pixels, recipe=replace(TINY, steps=11), out=tmp_path, progress=False)
    assert saved == [4, 8, 11], "the last one, too"


def test_crops_are_the_views_of_the_step_and_mirrors_the_half(pixels):
    """A crop against torchvision's crop and resize; whole images are only mirrored."""
    card = TINY.build().encoder.refiner_card
    plain = pretraining._views(pixels, TINY, card, None)
    flipped = pretraining._views(
        pixels, replace(TINY, flip=True), card, torch.Generator().manual_seed(0)
    )
    same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(plain, flipped, strict=True)]
    mirrored = [
        torch.allclose(a.flip(2), b, atol=1e-5) for a, b in zip(plain, flipped, strict=True)
    ]
    assert all(a or b for a, b in zip(same, mirrored, strict=True))
    assert 8 < sum(mirrored) < 32
    recipe = replace(TINY, crop=(0.2, 0.6))
    x = pretraining._views(pixels, recipe, card, torch.Generator().manual_seed(1))
    boxes = crop_boxes(40, 32, 32, (0.2, 0.6), (3 / 4, 4 / 3), torch.Generator().manual_seed(1))
    wanted = (crop(pixels.float() / 255, boxes, 32) - 0.5) / 0.25
    assert x.shape == plain.shape and torch.allclose(x, wanted, atol=1e-5)


def test_a_run_with_crops_repeats_and_differs(pixels):
    recipe = replace(TINY, crop=(0.2, 1.0), flip=True)
    one, two, plain = (
        [
            e["loss"]
            for e in pretraining.pretrain(pixels, recipe=r, progress=False, log_every=1).history
        ]
        for r in (recipe, recipe, TINY)
    )
    assert one == two and one != plain


def test_states_of_older_versions_still_load(pixels, tmp_path):
    """Which knew no crops, and had other names for some parts; losses wait for their entry."""
    options = {"recipe": TINY, "out": tmp_path, "progress": False, "log_every": 5}
    whole = pretraining.pretrain(pixels, save_every=6, **options)
    state = load_state(tmp_path / "state.previous.pt")
    del state["recipe"]["crop"], state["recipe"]["flip"], state["source"]
    state["step"], state["losses"] = state.pop("done"), [x["loss"] for x in state.pop("seen")]
    state["optimizer"] = state.pop("optimizers")["1"]
    state["ema"] = {"shadow": state["ema"], "updates": state["step"]}
    assert state["step"] == 6 and len(state["losses"]) == 1
    save_state(tmp_path / "state.pt", state)
    resumed = pretraining.pretrain(pixels, resume=True, **options)
    assert torch.equal(whole.mae.mask_token, resumed.mae.mask_token)
    assert [e["loss"] for e in whole.history] == [e["loss"] for e in resumed.history]
    with pytest.raises(ValueError, match=r"recipe is another one \(flip\)"):
        pretraining.pretrain(pixels, resume=True, **options | {"recipe": replace(TINY, flip=True)})


def test_compiling_fuses_blocks_and_changes_no_number(pixels, monkeypatch):
    """One graph for the blocks of each network, whatever the depth; torch's own, uncompiled."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    compiled = partialmethod(torch.nn.Module.compile, backend=backend)
    monkeypatch.setattr(torch.nn.Module, "compile", compiled)
    torch._dynamo.reset()
    run = pretraining.pretrain(pixels, recipe=replace(TINY, depth=4, compile=True), progress=False)
    assert len(graphs) == 2, "one of width 16 for the encoder, one of width 12 for the decoder"
    plain = pretraining.pretrain(pixels, recipe=replace(TINY, depth=4), progress=False)
    for key, value in plain.mae.state_dict().items():
        assert torch.allclose(value, run.mae.state_dict()[key], atol=1e-5), key
    run.mae(torch.randn(3, 3, 32, 32), *M.random_masking(3, 64, 0.75))
    assert len(graphs) == 2, "what is returned is not compiled"
    torch._dynamo.reset()


def test_a_broken_weight_is_never_saved(pixels, tmp_path, monkeypatch):
    """Between two looks at the loss; the last two states stay."""
    update = loop.EMA.update

    def broken(self, mae, t):
        update(self, mae, t)
        if t == 10:
            torch.nn.init.constant_(mae.decoder_pred.weight, float("nan"))

    monkeypatch.setattr(loop.EMA, "update", broken)
    with pytest.raises(FloatingPointError, match="weight is no longer finite at step 10"):
        pretraining.pretrain(
            pixels, recipe=TINY, out=tmp_path, save_every=2, progress=False, log_every=12
        )
    for name, at in (("state.pt", 8), ("state.previous.pt", 6)):
        state = load_state(tmp_path / name)
        assert state["done"] == at and all(v.isfinite().all() for v in state["mae"].values())


def test_only_the_same_images_and_start_go_on(pixels, tmp_path):
    pretraining.pretrain(pixels, recipe=TINY, out=tmp_path / "one", progress=False)
    options = {"recipe": TINY, "out": tmp_path / "two", "progress": False}
    start = pretraining.start_from(tmp_path / "one", TINY)
    pretraining.pretrain(pixels, start=start, save_every=6, **options)
    state = load_state(tmp_path / "two" / "state.previous.pt")
    with pytest.raises(ValueError, match="has seen 40 images"):
        pretraining.pretrain(pixels[:32], start=start, resume=True, **options)
    with pytest.raises(ValueError, match="it started from 'one', not None"):
        pretraining.pretrain(pixels, resume=True, **options)
    del state["origin"]
    save_state(tmp_path / "two" / "state.pt", state)  # as an older version would have left it
    assert (
        pretraining.pretrain(pixels, start=start, resume=True, **options).history[-1]["step"] == 12
    )


def test_a_fresh_start_sets_the_state_of_an_earlier_run_aside(pixels, tmp_path, monkeypatch):
    pretraining.pretrain(pixels, recipe=TINY, out=tmp_path, save_every=6, progress=False)

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pretraining, "loss_of", interrupt)
    with pytest.raises(KeyboardInterrupt):
        pretraining.pretrain(pixels, recipe=replace(TINY, seed=1), out=tmp_path, progress=False)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pretraining.pretrain(pixels, recipe=replace(TINY, seed=1), out=tmp_path, resume=True)
    assert (tmp_path / "state.old.pt").is_file()


def test_saved_folder_loads_as_encoder_and_as_autoencoder(pixels, tmp_path):
    run = pretraining.pretrain(pixels, recipe=TINY, out=tmp_path / "m", progress=False)
    x = pixels[:2].float() / 255
    with torch.no_grad():
        expected = run.model.forward_features(x)
        assert torch.equal(load_model(tmp_path / "m").forward_features(x), expected)
    again, original = (M.reconstruct(m, pixels[:4]) for m in (M.load_mae(tmp_path / "m"), run.mae))
    assert torch.equal(again["painted"], original["painted"])
    card = json.loads((tmp_path / "m" / "card.json").read_text())
    assert card["recipe"]["steps"] == 12 and card["machine"]["cores"] >= 1


def test_reconstruction_keeps_what_was_visible(pixels):
    result = M.reconstruct(TINY.build().eval(), pixels[:4])
    hidden = M.unpatchify(result["mask"][:, :, None].float().expand(-1, -1, 48), 4).bool()
    true = pixels[:4].float() / 255
    assert torch.allclose(result["original"], true, atol=1e-6)
    assert torch.allclose(result["painted"][~hidden], true[~hidden], atol=1e-6)
    assert torch.allclose(result["masked"][hidden], torch.tensor(0.5))


def test_training_starts_from_a_checkpoint(pixels, tmp_path):
    """With its decoder where that fits; another decoder is new, another encoder is refused."""
    first = pretraining.pretrain(pixels, recipe=TINY, out=tmp_path / "first", progress=False)
    recipe = replace(
        pretraining.recipe_for(tmp_path / "first"), decoder_dim=12, decoder_heads=2, steps=0
    )
    assert (recipe.dim, recipe.depth, recipe.heads) == (TINY.dim, TINY.depth, TINY.heads)
    whole = pretraining.start_from(tmp_path / "first", recipe)
    for key, value in first.mae.state_dict().items():
        assert torch.equal(whole.state_dict()[key], value), key
    other = pretraining.start_from(tmp_path / "first", replace(recipe, decoder_depth=0))
    for key, value in first.model.state_dict().items():
        assert torch.equal(other.encoder.state_dict()[key], value), key
    assert other.encoder.refiner_card["started_from"] == "first"
    with pytest.raises(ValueError, match="not the recipe's encoder.*dim=16.*depth=3"):
        pretraining.start_from(tmp_path / "first", replace(recipe, depth=3))
    with pytest.raises(FileNotFoundError, match="no checkpoint 'nothing' to start from"):
        pretraining.recipe_for("nothing")


def test_clear_errors(pixels, tmp_path):
    with pytest.raises(ValueError, match="40 images are fewer than one batch of 64"):
        pretraining.pretrain(pixels, recipe=replace(TINY, batch=64))
    with pytest.raises(ValueError, match="images are 32x32 but the recipe is for 16x16"):
        pretraining.pretrain(pixels, recipe=replace(TINY, size=16))
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        pretraining.pretrain(pixels, recipe=TINY, out=tmp_path, resume=True)
    pretraining.pretrain(pixels, recipe=TINY, out=tmp_path, progress=False)
    with pytest.raises(ValueError, match=r"recipe is another one \(lr\)"):
        pretraining.pretrain(pixels, recipe=replace(TINY, lr=1.0), out=tmp_path, resume=True)
    with pytest.raises(FileNotFoundError, match="no masked autoencoder 'nothing'"):
        M.load_mae("nothing")


@pytest.mark.parametrize(
    "change, message",
    [
        ({"steps": 0}, "steps is 0; it needs to be 1 or more"),
        ({"steps": 2.5}, "steps is 2.5; it needs to be a whole number"),
        ({"batch": 0}, "batch is 0; it needs to be 1 or more"),
        ({"seed": -1}, "seed is -1; it needs to be 0 or more"),
        ({"mask_ratio": 0.0}, "mask_ratio is 0.0; it needs to be above 0 and at most 1"),
        ({"mask_ratio": 0.001}, "mask_ratio is 0.001; it needs to hide at least one of 64 patches"),
        ({"mask_ratio": 0.001}, "at least one of 64 patches"),
        ({"mask_ratio": 1.5}, "at most 1"),
        ({"crop": (0.0, 1.0)}, r"crop is 0.0; it needs to be above 0 and at most 1"),
        ({"crop": (0.9, 0.2)}, "in rising order"),
        ({"decoder_dim": 12, "decoder_heads": 5}, "decoder_dim of 12 does not suit 5 heads"),
        ({"decoder_dim": 6}, "decoder_dim of 6 does not suit 2 heads; choose a multiple of"),
    ],
)
def test_recipes_that_cannot_work_are_refused_at_the_start(pixels, tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        pretraining.pretrain(
            pixels, recipe=replace(TINY, **change), out=tmp_path / "out", progress=False
        )
    assert not (tmp_path / "out").exists()


def test_a_nan_loss_stops_with_an_explanation(pixels):
    with pytest.raises(FloatingPointError, match="not finite at step"):
        pretraining.pretrain(pixels, recipe=replace(TINY, lr=1e30), progress=False, log_every=2)
