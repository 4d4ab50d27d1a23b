"""Classes other than VisionTransformer, run block by block."""

import pytest
import timm
import torch
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from torch import nn

from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models import encoders
from refiner.models.beit import relative_bias
from refiner.models.encoders import head_features
from refiner.models.load import build_vit, copy_model, load_model, random_like, resized
from refiner.models.save import save_model
from refiner.probing.features import extract
from refiner.probing.neighbors import knn_accuracy
from refiner.probing.readings import Reading
from refiner.training.recipe import Recipe
from refiner.training.refining import refine

CARD = {
    "name": "tiny",
    "preprocessing": {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"},
}
SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 2}
EVA = {
    "swiglu_mlp": True,
    "scale_mlp": True,
    "use_rot_pos_emb": True,
    "qkv_fused": False,
    "ref_feat_shape": (4, 4),
    "dynamic_img_size": True,
}


def beit(**options):
    return Beit(
        **SMALL
        | {"use_abs_pos_emb": False, "use_rel_pos_bias": True, "init_values": 0.1, "num_classes": 0}
        | options
    )


MODELS = {
    "post-norm": lambda: build_vit(size=32, patch=8, dim=24, depth=3, heads=2, post_norm=True),
    "no class token": lambda: build_vit(
        size=32, patch=8, dim=24, depth=3, heads=2, class_token=False
    ),
    "registers": lambda: build_vit(size=32, patch=8, dim=24, depth=3, heads=2, registers=2),
    "BEiT": beit,
    "BEiT, shared bias": lambda: beit(use_rel_pos_bias=False, use_shared_rel_pos_bias=True),
    "BEiT, both biases": lambda: beit(use_shared_rel_pos_bias=True, use_abs_pos_emb=True),
    "EVA-02": lambda: Eva(**SMALL | EVA, num_classes=0),
}


def built(kind):
    torch.manual_seed(0)
    model = MODELS[kind]()
    for parameter in model.parameters():  # many start at zero or one and would hide a mix-up
        torch.nn.init.normal_(parameter, std=0.2)
    model.refiner_card = CARD if not hasattr(model, "refiner_card") else model.refiner_card
    return model.eval()


@pytest.fixture(params=MODELS)
def model(request):
    return built(request.param)


def run(model, x, kept=None):
    tokens, context = encoders.embed(model, x)
    if kept is not None:
        tokens, context = encoders.keep_patches(model, tokens, context, kept)
    for block in model.blocks:
        tokens = encoders.run_block(block, tokens, context)
    return tokens


def test_a_walk_gives_the_tokens_after_each_block(model):
    x, kept = torch.randn(2, 3, 32, 32), torch.tensor([[3, 0, 7], [1, 2, 15]])
    found = dict(encoders.walk(model, x, kept_BK=kept))
    assert list(found) == [0, 1, 2, 3]
    tokens, context = encoders.keep_patches(model, *encoders.embed(model, x), kept)
    assert torch.equal(found[0], tokens)
    for number, block in enumerate(model.blocks, start=1):
        tokens = encoders.run_block(block, tokens, context)
        assert torch.equal(found[number], tokens)
    assert torch.equal(encoders.last_tokens(model, x, kept_BK=kept), tokens)
    *_, (number, first) = encoders.walk(model, x, kept_BK=kept, top=2, class_token_only=True)
    assert number == 2
    torch.testing.assert_close(first[:, :1], found[2][:, :1])


def test_a_walk_freezes_the_first_blocks_and_leaves_the_callers_gradients_alone(model):
    x, learns = torch.randn(2, 3, 32, 32), {}
    for number, tokens in encoders.walk(model, x, frozen=2):
        assert torch.is_grad_enabled()
        learns[number] = tokens.requires_grad
    assert learns == {0: False, 1: False, 2: False, 3: True}
    with torch.no_grad():
        assert not any(tokens.requires_grad for _, tokens in encoders.walk(model, x))


def test_tokens_take_the_place_of_hidden_patches(model):
    """They make the hidden pixels meaningless, and only these."""
    mask = torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 5] = True
    x = torch.randn(2, 3, 32, 32)
    hidden, seen = x.clone(), x.clone()
    hidden[:, :, 8:16, 8:16] = 0  # patch 5: row 1, column 1
    seen[:, :, :8, :8] = 0
    gaps = mask, torch.ones(1, 1, 24)
    a, b, c = (encoders.last_tokens(model, pixels, gaps=gaps) for pixels in (x, hidden, seen))
    assert torch.equal(a, b) and not torch.allclose(a, c)


@torch.no_grad()
def test_block_by_block_is_timms_own_pass(model):
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model.norm(run(model, x)), model.forward_features(x))


@torch.no_grad()
def test_another_size_is_that_of_timm_set_to_it(model):
    x = torch.randn(2, 3, 48, 48)
    twin = copy_model(model)
    twin.set_input_size(img_size=(48, 48))
    expected = twin.forward_features(x)
    found = model.norm(run(encoders.allow_any_size(model), x))
    torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("size", [32, 48])
def test_keeping_every_patch_changes_nothing_and_order_does_not_count(model, size):
    x = torch.randn(2, 3, size, size)
    encoders.allow_any_size(model)
    expected = run(model, x)
    n, prefix = (size // 8) ** 2, encoders.prefix_tokens(model)
    everything = torch.arange(n).expand(2, -1)
    torch.testing.assert_close(run(model, x, everything), expected, atol=1e-5, rtol=1e-5)
    order = torch.stack([torch.randperm(n), torch.randperm(n)])
    shuffled = run(model, x, order)[:, prefix:]
    for b in range(2):
        back = shuffled[b][order[b].argsort()]
        torch.testing.assert_close(back, expected[b, prefix:], atol=1e-5, rtol=1e-5)


class Keep(nn.Module):
    """Stands in for timm's random dropping of patches and keeps chosen ones."""

    def __init__(self, prefix, kept, *, tells):
        super().__init__()
        self.prefix, self.kept, self.tells = prefix, kept, tells

    def forward(self, tokens):
        chosen = torch.stack([t[self.prefix :][k] for t, k in zip(tokens, self.kept, strict=True)])
        tokens = torch.cat([tokens[:, : self.prefix], chosen], dim=1)
        return (tokens, self.kept) if self.tells else tokens


@torch.no_grad()
@pytest.mark.parametrize("kind", ["EVA-02", "post-norm", "no class token", "registers"])
def test_dropping_patches_is_timms(kind):
    model, kept = built(kind), torch.tensor([[3, 9, 1], [0, 15, 4]])
    x = torch.randn(2, 3, 32, 32)
    found = model.norm(run(model, x, kept))
    tells = isinstance(model, Eva)  # there the kept patches choose their rotations
    model.patch_drop = Keep(encoders.prefix_tokens(model), kept, tells=tells)
    torch.testing.assert_close(found, model.forward_features(x))


@torch.no_grad()
def test_the_bias_of_dropped_patches_is_cut_out_of_the_whole():
    table = torch.randn(7 * 7 + 3, 2)
    whole = relative_bias(table, (4, 4), (4, 4))
    kept = torch.tensor([[5, 0, 11], [2, 3, 15]])
    cut = relative_bias(table, (4, 4), (4, 4), kept)
    for b in range(2):
        rows = [0, *(kept[b] + 1).tolist()]  # the class token is the first
        assert torch.equal(cut[b], whole[0][:, rows][:, :, rows])


def test_gradients_reach_the_relative_positions_of_a_small_crop():
    model = encoders.allow_any_size(built("BEiT, both biases"))
    run(model, torch.randn(1, 3, 16, 16)).square().sum().backward()
    for table in (
        model.blocks[0].attn.relative_position_bias_table,
        model.rel_pos_bias.relative_position_bias_table,
    ):
        assert table.grad.abs().sum() > 0


# ---------------------------------------------------------------- the rest of refiner on them


def images(n=10, size=32):
    generator = torch.Generator().manual_seed(3)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


@torch.no_grad()
def test_features_are_the_tokens_pooled(model):
    found = extract(model, images(3), progress=False)
    x = (images(3) / 255 - 0.5) / model.refiner_card["preprocessing"]["std"][0]
    tokens, context = encoders.embed(model, x)
    prefix = encoders.prefix_tokens(model)
    for i, block in enumerate(model.blocks):
        tokens = encoders.run_block(block, tokens, context)
        torch.testing.assert_close(found["patch"][i], tokens[:, prefix:].mean(1))
        if encoders.has_class_token(model):
            torch.testing.assert_close(found["cls"][i], tokens[:, 0])
    final = model.forward_head(model.forward_features(x), pre_logits=True)
    torch.testing.assert_close(found["final"], final)  # pooled as the model was made for


TINY = Recipe(
    blocks=(2, 3),
    hidden=16,
    predictor_hidden=16,
    out=8,
    batch=4,
    head_steps=1,
    steps=2,
    queue=8,
    views=(View(size=32, keep=0.5), View(size=32), View(size=16)),
    layer_decay=0.7,
    ema=0.5,
    lr=1e-2,
    frozen_blocks=1,
)


def test_refining_trains_what_is_not_frozen_and_takes_small_crops(model):
    before = {k: v.clone() for k, v in model.state_dict().items()}
    run = refine(model, ImageSet(images()), recipe=TINY, progress=False)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    moved = {k for k, v in run.model.state_dict().items() if not torch.equal(v, before[k])}
    assert not [k for k in moved if k.startswith(("patch_embed", "blocks.0."))]
    assert [k for k in moved if k.startswith("blocks.1.")]
    x = torch.randn(2, 3, 16, 16)
    pooled = head_features(run.model, x, (2, 3), pooling="patch")
    assert pooled.shape == (2, 2, 24) and pooled.isfinite().all()


@pytest.mark.parametrize("kind", ["post-norm", "no class token", "registers"])
@torch.no_grad()
def test_a_plain_vit_is_saved_for_refiner_and_where_it_can_for_timm(kind, tmp_path):
    model = built(kind)
    save_model(model, tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    expected = model.forward_features(x)
    again = load_model(tmp_path / "m")
    assert torch.equal(again.forward_features(x), expected)
    assert again.refiner_card == model.refiner_card
    text = (tmp_path / "m" / "README.md").read_text()
    if kind == "post-norm":
        assert not (tmp_path / "m" / "config.json").exists() and "only refiner opens it" in text
        return
    opened = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    torch.testing.assert_close(opened.forward_features(x), expected)
    assert "only refiner opens it" not in text


@torch.no_grad()
@pytest.mark.parametrize(
    "name",
    ["beit_base_patch16_224", "eva02_tiny_patch14_224", "vit_base_patch16_224", "hiera_tiny_224"],
)
def test_timms_own_are_saved_and_opened_by_both(name, tmp_path):
    options = {"num_classes": 0} | ({"dynamic_img_size": True} if "eva" in name else {})
    small = {"embed_dim": 24, "depth": 2, "num_heads": 2}
    options |= {"embed_dim": 16, "stages": (1, 1, 1, 1)} if "hiera" in name else small
    torch.manual_seed(0)
    model = timm.create_model(name, **options).eval()
    size = model.pretrained_cfg["input_size"][1]
    model.refiner_card = {
        "name": name,
        "timm": {"architecture": name, "model_args": options},
        "preprocessing": CARD["preprocessing"] | {"size": size},
    }
    save_model(model, tmp_path / "m")
    x = torch.randn(1, 3, size, size)
    expected = model.forward_features(x)
    again = load_model(tmp_path / "m")
    assert torch.equal(again.forward_features(x), expected) and type(again) is type(model)
    opened = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    torch.testing.assert_close(opened.forward_features(x), expected)
    twin = random_like(again, seed=1)
    assert [p.shape for p in twin.parameters()] == [p.shape for p in model.parameters()]
    assert not torch.equal(twin.forward_features(x), expected)
    if "hiera" not in name:
        patch = model.patch_embed.patch_size[0]
        other = resized(again, 4 * patch)
        save_model(other, tmp_path / "small")
        x = torch.randn(1, 3, 4 * patch, 4 * patch)
        small = load_model(tmp_path / "small")
        assert torch.equal(small.forward_features(x), other.forward_features(x))
        assert small.refiner_card["preprocessing"]["size"] == 4 * patch


# ---------------------------------------------------------------- Hiera: probing only


def hiera():
    torch.manual_seed(0)
    model = Hiera(
        img_size=(64, 64),
        embed_dim=16,
        num_heads=1,
        stages=(1, 1, 2, 1),
        num_classes=0,
        mask_unit_size=(8, 8),
    )
    model.refiner_card = {"name": "hiera", "preprocessing": CARD["preprocessing"] | {"size": 64}}
    return model.eval()


@torch.no_grad()
def test_hieras_blocks_are_pooled_and_narrow_ones_filled_with_zeros():
    model = hiera()
    pixels = images(4, 64)
    found = extract(model, pixels, progress=False)
    x = (pixels / 255 - 0.5) / 0.5
    _, maps = model.forward_intermediates(x, coarse=False)
    assert len(maps) == 5 and "cls" not in found
    for i, grid in enumerate(maps):  # [B, D, H, W] in spatial order
        mean = grid.mean((2, 3))
        torch.testing.assert_close(found["patch"][i, :, : mean.shape[1]], mean)
        assert not found["patch"][i, :, mean.shape[1] :].any()
    torch.testing.assert_close(found["final"], model(x))
    reading = Reading.fit(found, 1)  # of a narrow block
    torch.testing.assert_close(reading.module(model)(pixels), reading.apply(found))


def test_zeros_do_not_change_what_neighbors_see():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 60, 6, generator=generator)
    y = torch.randint(0, 3, (60,), generator=generator)
    filled = torch.nn.functional.pad(x, (0, 10))
    scores = [knn_accuracy(z[:, :40], y[:40], z[:, 40:], y[40:], k=5) for z in (x, filled)]
    assert torch.equal(*map(torch.as_tensor, scores))


def test_a_hiera_says_that_it_cannot_be_refined():
    with pytest.raises(ValueError, match="Hiera can be probed but not refined"):
        refine(hiera(), ImageSet(images(8, 64)), recipe=TINY, progress=False)
    with pytest.raises(ValueError, match="one image size only"):
        resized(hiera(), 32)


def test_an_eva_made_for_one_size_says_so():
    model = Eva(**SMALL | EVA | {"dynamic_img_size": False})
    with pytest.raises(ValueError, match="dynamic_img_size=True"):
        encoders.allow_any_size(model)


# ---------------------------------------------------------------- the class token alone


@pytest.mark.parametrize("kind", MODELS)
def test_a_block_asked_for_its_class_token_gives_the_same_and_its_gradients(kind):
    model = built(kind).double()
    pixels = torch.randn(3, 3, 32, 32, dtype=torch.float64)
    block, found = model.blocks[1], []
    for run_it in (encoders.run_block, encoders.class_token_of):
        tokens, context = encoders.embed(model, pixels)
        x = tokens.detach().requires_grad_()
        out = run_it(block, x, context)[:, :1]
        (out * torch.arange(24)).sum().backward()
        found.append([out, x.grad, *(p.grad.clone() for p in block.parameters())])
        block.zero_grad()
    assert found[0][1].abs().max() > 0.1
    for whole, alone in zip(*found, strict=True):
        assert torch.allclose(whole, alone, rtol=1e-9, atol=1e-9)


def test_a_plain_block_runs_its_mlp_for_the_class_token_only():
    for kind in ("post-norm", "registers"):
        block, seen = built(kind).blocks[0], []
        block.mlp.register_forward_pre_hook(lambda _, x: seen.append(x[0].shape))  # noqa: B023
        encoders.class_token_of(block, torch.randn(2, 9, 24), {})
        assert seen == [(2, 1, 24)], kind
