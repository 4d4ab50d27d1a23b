"""Every original format: a small file with exactly its keys, against a ViT written out in torch.

The references below read the original keys and know nothing of timm. Names of keys are those of
facebookresearch/mae, facebookresearch/maws, bytedance/ibot, liuxingbin/dbot,
TonyLianLong/CrossMAE, bair-climate-initiative/scale-mae, facebookresearch/ijepa,
facebookresearch/fairseq (examples/data2vec) and ml-jku/MIM-Refiner.
"""

import argparse
import os
import pickle
import warnings
from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from tiny import tiny

from refiner.base.tensors import sides
from refiner.models.catalogue import CATALOGUE, find
from refiner.models.convert import _heads, convert, read_file
from refiner.models.encoders import allow_any_size, preprocess
from refiner.models.load import load_model
from refiner.models.mae import load_mae, reconstruct
from refiner.models.positions import sincos_positions
from refiner.models.save import save_model
from refiner.probing.features import extract
from refiner.training.refining import refine

DIM, HEADS, PATCH, SIZE, DEPTH = 24, 3, 8, 32, 2
GRID = SIZE // PATCH


class Weights(dict):
    """Random tensors by name; norms and positions are as large as the rest, so that none hides."""

    def __init__(self, seed=0):
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)

    def add(self, name, *shape):
        self[name] = torch.randn(*shape, generator=self.generator) * 0.2

    def linear(self, name, out, into):
        self.add(f"{name}.weight", out, into)
        self.add(f"{name}.bias", out)

    def norm(self, name, dim=DIM):
        self.add(f"{name}.weight", dim)
        self.add(f"{name}.bias", dim)

    def patch_embedding(self, name, channels=3):
        self.add(f"{name}.weight", DIM, channels, PATCH, PATCH)
        self.add(f"{name}.bias", DIM)

    def block(self, name, dim=DIM):
        self.norm(f"{name}.norm1", dim)
        self.linear(f"{name}.attn.qkv", 3 * dim, dim)
        self.linear(f"{name}.attn.proj", dim, dim)
        self.norm(f"{name}.norm2", dim)
        self.linear(f"{name}.mlp.fc1", 4 * dim, dim)
        self.linear(f"{name}.mlp.fc2", dim, 4 * dim)

    def under(self, prefix):
        return {f"{prefix}{k}": v for k, v in self.items()}


# ---------------------------------------------------------------- the reference


def norm(x, w, name):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    return x * w[f"{name}.weight"] + w[f"{name}.bias"]


def linear(x, w, name):
    return x @ w[f"{name}.weight"].T + w[f"{name}.bias"]


def attention(x, w, name):
    d = x.shape[2]
    q, k, v = linear(x, w, f"{name}.qkv").split(d, dim=-1)
    out = torch.empty_like(x)
    for head in torch.arange(d).split(d // HEADS):
        scores = q[..., head] @ k[..., head].transpose(1, 2) / len(head) ** 0.5
        out[..., head] = scores.softmax(-1) @ v[..., head]
    return linear(out, w, f"{name}.proj")


def mlp(x, w, name):
    x = linear(x, w, f"{name}.fc1")
    return linear(x * 0.5 * (1 + torch.erf(x / 2**0.5)), w, f"{name}.fc2")


def pre_norm_block(x, w, name):
    x = x + attention(norm(x, w, f"{name}.norm1"), w, f"{name}.attn")
    return x + mlp(norm(x, w, f"{name}.norm2"), w, f"{name}.mlp")


def post_norm_block(x, w, name):
    x = norm(x + attention(x, w, f"{name}.attn"), w, f"{name}.norm1")
    return norm(x + mlp(x, w, f"{name}.mlp"), w, f"{name}.norm2")


def patches(x, w, name):
    """[B, N, D]: every patch, row by row, times the kernel."""
    cut = x.unfold(2, PATCH, PATCH).unfold(3, PATCH, PATCH).permute(0, 2, 3, 1, 4, 5)
    return linear(
        cut.flatten(3).flatten(1, 2),
        {k: v.flatten(1) if v.ndim == 4 else v for k, v in w.items()},
        name,
    )


def positions(grid_positions, x):
    """[1, N, D] for the image's size, by bicubic interpolation of [1, G, G, D]."""
    side = x.shape[-1] // PATCH
    if side != grid_positions.shape[1]:
        grid_positions = F.interpolate(
            grid_positions.permute(0, 3, 1, 2), (side, side), mode="bicubic", antialias=True
        ).permute(0, 2, 3, 1)
    return grid_positions.flatten(1, 2)


def with_class_token(x, token):
    return torch.cat([token.expand(len(x), -1, -1), x], dim=1)


def mae_reference(x, w, final="norm"):
    pos = w["pos_embed"]
    tokens = patches(x, w, "patch_embed.proj")
    tokens = tokens + positions(pos[:, 1:].reshape(1, GRID, GRID, DIM), x)
    tokens = with_class_token(tokens, w["cls_token"] + pos[:, :1])
    for i in range(DEPTH):
        tokens = pre_norm_block(tokens, w, f"blocks.{i}")
    return norm(tokens, w, final) if final else tokens


def ijepa_reference(x, w):
    tokens = patches(x, w, "patch_embed.proj")
    tokens = tokens + positions(w["pos_embed"].reshape(1, GRID, GRID, DIM), x)
    for i in range(DEPTH):
        tokens = pre_norm_block(tokens, w, f"blocks.{i}")
    return norm(tokens, w, "norm")


def data2vec_reference(x, w):
    image = "modality_encoders.IMAGE."
    tokens = patches(x, w, f"{image}local_encoder.proj")
    pos = w[f"{image}fixed_positional_encoder.positions"].reshape(1, GRID, GRID, DIM)
    tokens = with_class_token(tokens + positions(pos, x), w[f"{image}extra_tokens"])
    tokens = norm(tokens, w, f"{image}context_encoder.norm")
    tokens = post_norm_block(tokens, w, f"{image}context_encoder.blocks.0")
    for i in range(DEPTH):
        tokens = post_norm_block(tokens, w, f"blocks.{i}")
    return tokens


def refiner_reference(x, w):
    tokens = patches(x, w, "patch_embed.proj") + positions(w["pos_embed.embed"], x)
    tokens = with_class_token(tokens, w["cls_tokens.tokens"])
    post = "embed_norm.weight" in w
    tokens = norm(tokens, w, "embed_norm") if post else tokens
    for i in range(DEPTH):
        tokens = (post_norm_block if post else pre_norm_block)(tokens, w, f"blocks.{i}")
    return tokens if post else norm(tokens, w, "norm")


# ---------------------------------------------------------------- the files


def encoder_weights(seed=0, class_token=True, final=True, channels=3):
    """MAE's encoder; its kin have the same names."""
    w = Weights(seed)
    w.patch_embedding("patch_embed.proj", channels)
    w.add("pos_embed", 1, GRID**2 + int(class_token), DIM)
    if class_token:
        w.add("cls_token", 1, 1, DIM)
    for i in range(DEPTH):
        w.block(f"blocks.{i}")
    if final:
        w.norm("norm")
    return w


def decoder_weights(predictor, outputs):
    w = Weights(9)
    w.add("mask_token", 1, 1, 32)
    w.add("decoder_pos_embed", 1, GRID**2 + 1, 32)
    w.linear("decoder_embed", 32, DIM)
    w.block("decoder_blocks.0", 32)
    w.norm("decoder_norm", 32)
    w.linear(predictor, outputs, 32)
    return w


def mae_file():
    w = encoder_weights()
    return {"model": dict(w)}, lambda x: mae_reference(x, w)


def mae_full_file():
    """As training writes it: decoder, optimizer and the command line beside the weights."""
    w = encoder_weights(1)
    settings = argparse.Namespace(model="mae_vit", batch_size=64, lr=1e-3)
    content = {
        "model": w | decoder_weights("decoder_pred", PATCH**2 * 3),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 1e-3}]},
        "epoch": 3,
        "scaler": {"scale": 65536.0},
        "args": settings,
    }
    return content, lambda x: mae_reference(x, w)


def maws_file():
    w = encoder_weights(2)
    return dict(w), lambda x: mae_reference(x, w)


def ibot_file():
    w = encoder_weights(3)
    head = {"head.mlp.0.weight": torch.zeros(4, DIM), "head.last_layer.weight_v": torch.zeros(4, 4)}
    w.add("masked_embed", 1, DIM)
    teacher = w.under("backbone.") | head
    student = {f"module.{k}": v for k, v in (w.under("backbone.") | head).items()}
    return {"student": student, "teacher": teacher, "epoch": 5}, lambda x: mae_reference(x, w)


def dbot_file():
    w = encoder_weights(4)
    content = {"model": w | decoder_weights("decoder_predp", DIM)}
    return content, lambda x: mae_reference(x, w)


def crossmae_file():
    """Its encoder has no norm of its own: one norm for each decoder block takes its place."""
    w = encoder_weights(5, final=False)
    decoder = Weights(6)
    for key, shape in {
        "mask_token": (1, 1, 16),
        "decoder_pos_embed": (1, GRID**2 + 1, 16),
        "wfm.linear.weight": (1, DEPTH + 1),
    }.items():
        decoder.add(key, *shape)
    decoder.norm("dec_norms.0")
    decoder.linear("decoder_blocks.0.cross_attn.q", 16, 16)
    decoder.linear("decoder_blocks.0.cross_attn.kv", 32, DIM)
    decoder.norm("decoder_norm", 16)
    decoder.linear("decoder_pred", PATCH**2 * 3, 16)
    content = {"model": w | decoder, "args": argparse.Namespace(cross_mae=True)}
    return content, lambda x: mae_reference(x, w, final=None)


def fixed_positions(rows=GRID, columns=GRID, gsd=1.0):
    """MAE's sines and cosines of the column and then of the row, [1, 1 + N, D]."""
    rates = torch.tensor([10000 ** -(i / (DIM // 4)) for i in range(DIM // 4)])
    found = torch.zeros(1, 1 + rows * columns, DIM)
    for row in range(rows):
        for column in range(columns):
            angles = torch.stack([place * gsd * rates for place in (column, row)])
            both = torch.cat([angles.sin(), angles.cos()], dim=1)
            found[0, 1 + row * columns + column] = both.flatten()
    return found


def scale_mae_file():
    """Its decoder ends in a pyramid; its positions are for a ground sample distance of 1."""
    w = encoder_weights(13)
    w["pos_embed"] = fixed_positions()
    decoder = decoder_weights("fpn.layer.0", 8)
    for name in ("fcn_high.layers.0", "fcn_low.layers.0"):
        decoder.linear(name, 8, 8)
    decoder.add("mask_token_decoder", 1, 1, 32)
    content = {
        "model": w | decoder,
        "args": argparse.Namespace(input_size=SIZE, base_resolution=2.5),
    }
    return content, lambda x: mae_reference(x, w)


def ijepa_file():
    w = encoder_weights(7, class_token=False)
    student = encoder_weights(8, class_token=False).under("module.")
    content = {
        "encoder": student,
        "predictor": {"module.predictor_norm.bias": torch.zeros(3)},
        "target_encoder": w.under("module."),
        "opt": {"state": {}, "param_groups": []},
        "epoch": 300,
        "loss": np.float64(0.1),
        "lr": 1e-3,
    }
    return content, lambda x: ijepa_reference(x, w)


def data2vec_weights():
    w, image = Weights(10), "modality_encoders.IMAGE."
    w.patch_embedding(f"{image}local_encoder.proj")
    w.add(f"{image}extra_tokens", 1, 1, DIM)
    w.add(f"{image}fixed_positional_encoder.positions", 1, GRID**2, DIM)
    w.norm(f"{image}context_encoder.norm")
    w.block(f"{image}context_encoder.blocks.0")  # the base model's first blocks lie here
    for i in range(DEPTH):
        w.block(f"blocks.{i}")
    return w


def data2vec_file():
    w = data2vec_weights()
    decoder = {
        "modality_encoders.IMAGE.decoder.blocks.0.0.weight": torch.zeros(3),
        "modality_encoders.IMAGE.decoder.proj.bias": torch.zeros(3),
    }
    model = w | decoder | {"_ema": {"blocks.0.norm1.weight": torch.zeros(DIM)}}
    content = {
        "args": None,
        "cfg": {"model": {"depth": DEPTH}},
        "model": model,
        "criterion": None,
        "optimizer_history": [{"num_updates": 3}],
        "task_state": {},
        "extra_state": {"metrics": [], "previous_training_time": 2.5},
    }
    return content, lambda x: data2vec_reference(x, w)


def data2vec_fine_tuned_file():
    w = data2vec_weights()
    head = {"head.weight": torch.zeros(5, DIM), "fc_norm.weight": torch.zeros(DIM)}
    return {"model": w.under("model.") | head}, lambda x: data2vec_reference(x, w)


def refiner_file(post=False):
    w = Weights(11)
    w.patch_embedding("patch_embed.proj")
    w.add("pos_embed.embed", 1, GRID, GRID, DIM)
    w.add("cls_tokens.tokens", 1, 1, DIM)
    for i in range(DEPTH):
        w.block(f"blocks.{i}")
    w.norm("embed_norm" if post else "norm")
    return {"state_dict": dict(w)}, lambda x: refiner_reference(x, w)


FILES = {
    "MAE": mae_file,
    "MAE, full": mae_full_file,
    "MAWS": maws_file,
    "iBOT": ibot_file,
    "dBOT": dbot_file,
    "CrossMAE": crossmae_file,
    "Scale-MAE": scale_mae_file,
    "I-JEPA": ijepa_file,
    "data2vec 2.0": data2vec_file,
    "data2vec 2.0, fine-tuned": data2vec_fine_tuned_file,
    "MIM-Refiner": refiner_file,
    "MIM-Refiner, post-norm": lambda: refiner_file(post=True),
}


@pytest.mark.parametrize("size", [SIZE, 48], ids="size {}".format)
@pytest.mark.parametrize("kind", FILES)
def test_a_file_gives_the_outputs_of_its_architecture(kind, size, tmp_path):
    content, reference = FILES[kind]()
    torch.save(content, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", num_heads=HEADS)
    x = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        found = (model if size == SIZE else allow_any_size(model)).forward_features(x)
        torch.testing.assert_close(found, reference(x), atol=1e-5, rtol=1e-5)
    assert model.refiner_card["format"] == kind.split(",")[0] or kind in ("MAWS", "iBOT")
    assert model.refiner_card["preprocessing"]["size"] == SIZE and not model.training


@pytest.mark.parametrize("kind", FILES)
def test_what_was_loaded_is_refined_and_opened_again_by_refiner_and_timm(kind, tmp_path):
    content, reference = FILES[kind]()
    torch.save(content, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", num_heads=HEADS)
    x = torch.randn(2, 3, SIZE, SIZE)
    images = torch.randint(0, 256, (12, 3, SIZE, SIZE), dtype=torch.uint8)
    refined = refine(model, images, recipe=tiny(steps=1, head_steps=1)).model
    with torch.no_grad():
        for name, saved, expected in (
            ("as it was", model, reference(x)),
            ("refined", refined, refined.forward_features(x)),
        ):
            save_model(saved, tmp_path / name)
            opened = [load_model(tmp_path / name)]
            if not model.refiner_card["architecture"].get("post_norm"):  # timm has none
                opened.append(timm.create_model(f"local-dir:{tmp_path / name}", pretrained=True))
            for again in opened:
                found = again.eval().forward_features(x)
                torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(expected, reference(x), atol=1e-5)


def test_interpolated_once_is_interpolated_each_time(tmp_path):
    content, reference = mae_file()
    torch.save(content, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", num_heads=HEADS, size=48)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        torch.testing.assert_close(model.forward_features(x), reference(x), atol=1e-5, rtol=1e-5)
    assert model.refiner_card["preprocessing"]["size"] == 48
    with pytest.raises(ValueError, match="size 50 is no multiple of the patch of 8"):
        load_model(tmp_path / "w.pth", num_heads=HEADS, size=50)


def test_safetensors_without_a_card_are_told_by_their_keys(tmp_path):
    content, reference = maws_file()
    save_file(content, tmp_path / "w.safetensors")
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = load_model(tmp_path / "w.safetensors", num_heads=HEADS).forward_features(x)
    torch.testing.assert_close(found, reference(x), atol=1e-5, rtol=1e-5)


def test_layer_scale_and_registers(tmp_path):
    w = encoder_weights(12)
    gammas = {}
    for i in range(DEPTH):
        for place, layers in (("1", ("attn.proj",)), ("2", ("mlp.fc2",))):
            gamma = torch.rand(DIM, generator=w.generator) + 0.5
            gammas[f"blocks.{i}.gamma_{place}"] = gamma
            gammas |= {f"scaled blocks.{i}.{layer}": gamma for layer in layers}
    # A scale behind a linear layer is the same as scaled rows of that layer.
    scaled = Weights()
    scaled.update(w)
    for key, gamma in gammas.items():
        if key.startswith("scaled "):
            name = key.removeprefix("scaled ")
            scaled[f"{name}.weight"] = w[f"{name}.weight"] * gamma[:, None]
            scaled[f"{name}.bias"] = w[f"{name}.bias"] * gamma
    content = dict(w) | {k: v for k, v in gammas.items() if not k.startswith("scaled ")}
    torch.save(content, tmp_path / "w.pth")
    x = torch.randn(2, 3, SIZE, SIZE)
    with torch.no_grad():
        found = load_model(tmp_path / "w.pth", num_heads=HEADS).forward_features(x)
        torch.testing.assert_close(found, mae_reference(x, scaled), atol=1e-5, rtol=1e-5)

    registers = torch.randn(1, 3, DIM)
    content = dict(w) | {"register_tokens": registers}  # positions: class token and patches only
    model_of = convert(content, num_heads=HEADS)
    positions_ = model_of.encoder["pos_embed"]
    assert model_of.architecture["registers"] == 3 and positions_.shape[1] == 4 + GRID**2
    assert torch.equal(positions_[:, :1], w["pos_embed"][:, :1])
    assert not positions_[:, 1:4].any() and torch.equal(positions_[:, 4:], w["pos_embed"][:, 1:])


def test_a_file_without_positions_gets_sine_and_cosine():
    w = encoder_weights()
    del w["pos_embed"]
    found = convert(dict(w), num_heads=HEADS, size=SIZE).encoder["pos_embed"]
    torch.testing.assert_close(found, fixed_positions(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("size", [None, (16, 48)])
def test_scale_mae_is_made_for_the_distance_of_the_images(size, tmp_path):
    content, _ = scale_mae_file()
    torch.save(content, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="assumed are images of a ground sample distance of 1,"):
        load_model(tmp_path / "w.pth", num_heads=HEADS)
    with pytest.warns(UserWarning, match="distance of 0.4, as asked for"):
        model = load_model(tmp_path / "w.pth", num_heads=HEADS, size=size, gsd=0.4)
    rows, columns = (side // PATCH for side in size or (SIZE, SIZE))
    tokens = patches(
        x := torch.randn(2, 3, *(size or (SIZE, SIZE))), w := content["model"], "patch_embed.proj"
    )
    tokens = with_class_token(tokens, w["cls_token"]) + fixed_positions(rows, columns, gsd=0.4)
    for i in range(DEPTH):
        tokens = pre_norm_block(tokens, w, f"blocks.{i}")
    with torch.no_grad():
        found = model.forward_features(x)
    torch.testing.assert_close(found, norm(tokens, w, "norm"), atol=1e-5, rtol=1e-5)
    left_out = set(model.refiner_card["left_out"])
    assert {"fpn", "fcn_high", "fcn_low", "mask_token_decoder"} < left_out


@pytest.mark.parametrize("channels", [2, 13])
def test_files_of_ssl4eo_are_those_of_mae_with_more_channels(channels, tmp_path, monkeypatch):
    w = encoder_weights(14, channels=channels)
    decoder = decoder_weights("decoder_pred", PATCH**2 * channels)
    torch.save({"model": w | decoder, "epoch": 99}, tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="fit_channels"):
        model = load_model(tmp_path / "w.pth", num_heads=HEADS)
    x = torch.randn(2, channels, SIZE, SIZE)
    with torch.no_grad():
        found = model.forward_features(x)
    torch.testing.assert_close(found, mae_reference(x, w), atol=1e-5, rtol=1e-5)
    # By its name in the catalogue it knows how its images were scaled.
    entry = replace(find("ssl4eo_s1_s16"), channels=channels, size=SIZE, shape=(DIM, DEPTH, HEADS))
    monkeypatch.setattr("refiner.models.load.find", lambda name: entry)
    monkeypatch.setattr("refiner.models.load._located", lambda name: tmp_path / "w.pth")
    how = load_model(entry.name).refiner_card["preprocessing"]
    assert (how["mean"], how["std"]) == ([0.0] * channels, [1.0] * channels)
    assert "assumed" not in how


def test_bird_mae_has_time_from_top_to_bottom(tmp_path):
    """Its 2-D sines and cosines are those of the turned grid, taken row by row."""
    w = encoder_weights(15, channels=1)
    w["pos_embed"] = fixed_positions(rows=2, columns=8)
    w.norm("fc_norm")
    save_file(dict(w), tmp_path / "w.safetensors")
    with pytest.warns(UserWarning, match=r"images of 64 × 16 pixels, with time from top"):
        model = load_model(tmp_path / "w.safetensors", num_heads=HEADS)
    assert model.refiner_card["left_out"] == ["fc_norm"]
    x = torch.randn(2, 1, 64, 16)
    tokens = patches(x, w, "patch_embed.proj") + w["pos_embed"][:, 1:]
    tokens = with_class_token(tokens, w["cls_token"])
    for i in range(DEPTH):
        tokens = pre_norm_block(tokens, w, f"blocks.{i}")
    with torch.no_grad():
        found = model.forward_features(x)
    torch.testing.assert_close(found, norm(tokens, w, "norm"), atol=1e-5, rtol=1e-5)
    known = convert(dict(w), num_heads=HEADS, known=[(64, 16)])
    assert (known.architecture["size"], known.assumed) == ((64, 16), "")
    asked = convert(dict(w), num_heads=HEADS, size=(16, 64))
    assert asked.architecture["size"] == (16, 64)
    w["pos_embed"] = fixed_positions(rows=8, columns=2)  # sines as the patches lie
    assert (tall := convert(dict(w), num_heads=HEADS)).architecture["size"] == (64, 16)
    assert not tall.assumed


def test_a_distance_is_for_positions_that_have_one(tmp_path):
    with pytest.raises(ValueError, match="positions of its own.*Scale-MAE"):
        convert(mae_file()[0], num_heads=HEADS, gsd=2)
    for gsd in (0, -1, float("nan"), "2"):
        with pytest.raises(ValueError, match="no ground sample distance"):
            convert(scale_mae_file()[0], num_heads=HEADS, gsd=gsd)
    with pytest.raises(ValueError, match="mae_toybox has positions of its own"):
        load_model("mae_toybox", gsd=2)


# ---------------------------------------------------------------- wrappers and prefixes


PREFIXES = ("", "module.", "_orig_mod.", "model.", "backbone.", "encoder.", "vit.")
NESTED = ("module._orig_mod.", "model.encoder.", "_forward_module.model.backbone.")
NESTINGS = {
    "plain": lambda w: w,
    "Lightning": lambda w: {"state_dict": w, "optimizer_states": [], "epoch": 3},
    "MAE": lambda w: {"model": w, "optimizer": {"state": {}}, "scaler": {"scale": 2.0}},
    "DeepSpeed": lambda w: {"module": w, "dp_world_size": 8, "optimizer": None},
    "PyTorch": lambda w: {"model_state_dict": w, "loss": 0.5},
    "twice": lambda w: {"checkpoint": {"model": w}},
}


@pytest.mark.parametrize("nesting", NESTINGS)
@pytest.mark.parametrize("prefix", PREFIXES + NESTED)
def test_an_encoder_is_found_behind_any_prefix(prefix, nesting):
    w = encoder_weights()
    before = prefix[: prefix.rstrip(".").rfind(".") + 1]  # a head is beside the encoder, or in it
    content = w.under(prefix) | {f"{before}head.weight": torch.zeros(3, DIM)}
    found = convert(NESTINGS[nesting](content), num_heads=HEADS)
    assert found.encoder.keys() == w.keys()
    assert all(torch.equal(found.encoder[key], value) for key, value in w.items())
    assert set(found.left_out) == {"head"} | ({"optimizer"} if nesting == "MAE" else set())


def pair(one, other, apart):
    """Two encoders with their names, each in a table of its own or both in one."""
    names = ((one, encoder_weights(1)), (other, encoder_weights(2)))
    if apart:
        return {name: dict(w) for name, w in names}
    return {"state_dict": {k: v for name, w in names for k, v in w.under(f"{name}.").items()}}


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize(
    ("plain", "averaged"),
    [
        ("student", "teacher"),
        ("encoder", "target_encoder"),
        ("encoder", "encoder_ema"),
        ("base_encoder", "momentum_encoder"),
        ("state_dict", "state_dict_ema"),
        ("model", "model_ema"),
    ],
)
def test_of_two_encoders_the_average_is_taken_and_the_other_named(plain, averaged, apart):
    for names, which in (((plain, averaged), 2), ((averaged, plain), 1)):
        found = convert(pair(*names, apart), num_heads=HEADS)
        assert torch.equal(found.encoder["cls_token"], encoder_weights(which)["cls_token"])
        assert found.left_out == (plain,)


def test_an_encoder_inside_another_is_left_out():
    w = encoder_weights(1)
    content = w | encoder_weights(2).under("auxiliary.")
    found = convert(content, num_heads=HEADS)
    assert torch.equal(found.encoder["cls_token"], w["cls_token"])
    assert found.left_out == ("auxiliary",)


@pytest.mark.parametrize("names", ["attn.{}.{}", "attn.{}_proj.{}", "attn.{}_{}"])
def test_queries_keys_and_values_apart_are_joined(names):
    w, apart = encoder_weights(), {}
    for key, value in w.items():
        if (part := key.rpartition(".")[2]) in ("weight", "bias") and "attn.qkv" in key:
            if names == "attn.{}_{}" and part == "weight":  # EVA-01 has only the biases apart
                apart[key] = value
                continue
            for one, third in zip("qkv", value.chunk(3), strict=True):
                new = names.format(one, part)
                if not new.endswith("k_bias"):
                    apart[key.replace(f"attn.qkv.{part}", new)] = third
        else:
            apart[key] = value
    found = convert(apart, num_heads=HEADS).encoder
    for key, value in w.items():
        if names == "attn.{}_{}" and key.endswith("qkv.bias"):  # a bias of keys changes nothing
            value = value.clone()
            value[DIM : 2 * DIM] = 0
        assert torch.equal(found[key], value)
    del apart[next(key for key in apart if "attn" in key and key.endswith("weight"))]
    with pytest.raises(ValueError, match="lacks one of q, k and v|missing blocks.0.attn.qkv"):
        convert(apart, num_heads=HEADS)


# ---------------------------------------------------------------- fine-tuned by the mean


def test_a_norm_behind_the_mean_is_kept(tmp_path):
    options = {"img_size": SIZE, "patch_size": PATCH, "embed_dim": DIM, "depth": DEPTH}
    options |= {"num_heads": HEADS, "num_classes": 5, "global_pool": "avg", "fc_norm": True}
    theirs = VisionTransformer(**options).eval()
    for parameter in theirs.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    torch.save({"model": theirs.state_dict()}, tmp_path / "w.pth")
    model = load_model(tmp_path / "w.pth", num_heads=HEADS)
    assert model.refiner_card["architecture"]["fc_norm"]
    assert model.refiner_card["left_out"] == ["head"]
    save_model(model, tmp_path / "m")
    timms = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    images = torch.randint(0, 256, (3, 3, SIZE, SIZE), dtype=torch.uint8)
    x = preprocess(images, model.refiner_card)
    with torch.no_grad():
        expected = theirs.forward_head(theirs.forward_features(x), pre_logits=True)
        torch.testing.assert_close(timms(x), expected, atol=1e-5, rtol=1e-5)
        for ours in (model, load_model(tmp_path / "m")):
            final = extract(ours, images)["final"]
            torch.testing.assert_close(final, expected, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(theirs.head(final), theirs(x), atol=1e-5, rtol=1e-5)
    refined = refine(model, images.repeat(4, 1, 1, 1), recipe=tiny()).model
    assert not torch.equal(refined.fc_norm.weight, model.fc_norm.weight)
    assert refined.refiner_card["architecture"] == model.refiner_card["architecture"]


# ---------------------------------------------------------------- decoders


def test_the_decoder_of_a_full_file_paints(tmp_path):
    content, _ = mae_full_file()
    torch.save(content, tmp_path / "w.pth")
    mae = load_mae(tmp_path / "w.pth", num_heads=HEADS, decoder_heads=2)
    for key in ("mask_token", "decoder_pos_embed", "decoder_pred.weight"):
        assert torch.equal(mae.state_dict()[key], content["model"][key])
    images = torch.randint(0, 256, (2, 3, SIZE, SIZE), dtype=torch.uint8)
    assert reconstruct(mae, images)["painted"].shape == images.shape
    torch.save(mae_file()[0], tmp_path / "encoder.pth")
    with pytest.raises(FileNotFoundError, match="has no decoder"):
        load_mae(tmp_path / "encoder.pth", num_heads=HEADS)


def test_what_an_encoder_has_no_place_for_is_reported():
    assert convert(dbot_file()[0], num_heads=HEADS).left_out == (
        "mask_token",
        "decoder_pos_embed",
        "decoder_embed",
        "decoder_blocks",
        "decoder_norm",
        "decoder_predp",
    )
    assert convert(data2vec_file()[0], num_heads=HEADS).left_out == ("_ema", "modality_encoders")
    assert convert(mae_file()[0], num_heads=HEADS).left_out == ()


# ---------------------------------------------------------------- errors


def test_missing_extra_and_misshapen_keys_are_listed_at_once(tmp_path):
    content, _ = mae_file()
    del content["model"]["blocks.1.norm2.bias"]
    content["model"]["surprise.weight"] = torch.zeros(3)
    content["model"]["blocks.0.attn.proj.weight"] = torch.zeros(DIM, 5)
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(ValueError) as caught:
        load_model(tmp_path / "w.pth", num_heads=HEADS)
    said = str(caught.value)
    assert "missing blocks.1.norm2.bias;" in said and "extra surprise.weight;" in said
    assert "of wrong shape blocks.0.attn.proj.weight [24, 5] instead of [24, 24]" in said
    assert "w.pth" in said and "MAE" in said and "\n" not in said


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("patch_embed.proj.weight"), "missing patch_embed.proj.weight"),
        (
            lambda w: w.update({"patch_embed.proj.weight": torch.zeros(DIM, 3, 8)}),
            r"is \[24, 3, 8\], expected \[D, C, P, P\]",
        ),
        (
            lambda w: w.update({"pos_embed": torch.zeros(1, 19, DIM)}),
            "19 positions are no grid that is known; say .* size=",
        ),
        (lambda w: w.update({"pos_embed": torch.zeros(17, DIM)}), r"pos_embed is \[17, 24\]"),
        (
            lambda w: w.update({"blocks.0.attn.relative_position_bias_table": torch.zeros(3)}),
            "relative or rotary positions.*BEiT",
        ),
    ],
)
def test_a_file_that_cannot_be_placed(change, message):
    content, _ = mae_file()
    change(content["model"])
    with pytest.raises(ValueError, match=message):
        convert(content, num_heads=HEADS)


def test_an_oblong_grid_does_not_pass_for_a_square_one():
    w = refiner_file()[0]["state_dict"]
    w["pos_embed.embed"] = w["pos_embed.embed"].reshape(1, 2, 8, DIM)

    def size(content, **how):
        found = convert(content, num_heads=HEADS, **how)
        return found.architecture["size"], found.assumed

    assert size({"state_dict": w}) == ((16, 64), "")  # as the positions lie
    for settings in ({"img_size": [16, 64]}, {"input_size": (3, 16, 64)}):
        for told in (argparse.Namespace(**settings), settings):
            assert size({"args": told, **mae_file()[0]}) == ((16, 64), "")
    for settings in ({"img_size": [32, 32]}, {"img_size": (32,)}, {"input_size": 32}, {}):
        assert size({"args": argparse.Namespace(**settings), **mae_file()[0]}) == (32, "")
    assert size(mae_file()[0], size=(64, 16)) == (
        (64, 16),
        "images of 64 × 16 pixels, as asked for",
    )
    assert size(mae_file()[0], size=(64, 64)) == (32, "")  # load_model resizes it
    with pytest.raises(ValueError, match="said to be for images of 16 × 32 pixels, but"):
        size({"args": {"img_size": [16, 32]}, **mae_file()[0]})
    fixed = mae_file()[0]
    fixed["model"]["pos_embed"] = sincos_positions((8, 2), DIM, 1)
    assert size(fixed) == ((64, 16), "")  # as sines and cosines say


def test_files_of_no_known_format():
    with pytest.raises(ValueError, match="no known format.*layer1.conv.*known are MAE"):
        convert({"state_dict": {"layer1.conv": torch.zeros(2)}})
    with pytest.raises(ValueError, match="of transformers; put its config.json beside it"):
        convert({"vit.embeddings.patch_embeddings.projection.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match="holds no weights; at its top are epoch"):
        convert({"epoch": 3})


def test_heads_are_inferred_by_the_rule_or_asked_for():
    content, _ = mae_file()
    with pytest.raises(ValueError, match="number of heads cannot be told.*24 wide.*num_heads=2"):
        convert(content)
    assert [_heads(dim, None, "w.pth") for dim in (64, 768, 1280, 1408)] == [1, 12, 16, 16]
    for dim, heads in ((192, 3), (768, 12)):
        assert _heads(dim, None, "w.pth") == heads
    for dim in (96, 100, 1000):  # 64 channels a head would be a guess that nothing speaks for
        with pytest.raises(ValueError, match=f"w.pth.*{dim} wide.*num_heads="):
            _heads(dim, None, "w.pth")
    with pytest.raises(ValueError, match="num_heads=5 does not divide the width 24"):
        convert(content, num_heads=5)
    assert convert(content, num_heads=2).architecture["heads"] == 2


def test_a_number_of_heads_that_is_a_guess_is_told(tmp_path):
    theirs = VisionTransformer(img_size=16, patch_size=8, embed_dim=192, depth=1, num_heads=6)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    with pytest.warns(UserWarning, match="w.pth: assumed are 3 heads of 64.*num_heads=6"):
        model = load_model(tmp_path / "w.pth")
    assert model.refiner_card["assumed"].startswith("3 heads of 64 channels")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        told = load_model(tmp_path / "w.pth", num_heads=6)
    assert "assumed" not in told.refiner_card and told.blocks[0].attn.num_heads == 6


def test_a_truncated_file(tmp_path):
    for name, write in (("w.pth", torch.save), ("w.safetensors", save_file)):
        write(maws_file()[0], tmp_path / name)
        whole = (tmp_path / name).read_bytes()
        (tmp_path / name).write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ValueError, match=r"bytes\) is damaged, incomplete.*download it again"):
            load_model(tmp_path / name)
    (tmp_path / "page.pth").write_text("<html>404 not found</html>")
    with pytest.raises(ValueError, match="is damaged, incomplete or no checkpoint"):
        load_model(tmp_path / "page.pth")


class Malicious:
    """Runs a command when it is unpickled."""

    def __init__(self, command):
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_a_malicious_pickle_is_refused_and_does_not_run(tmp_path):
    trace = tmp_path / "trace"
    evil = {"model": Malicious(f"touch {trace}")}
    torch.save(evil, tmp_path / "zip.pth")
    torch.save(evil, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    (tmp_path / "plain.pth").write_bytes(pickle.dumps(evil))
    wants = {
        "zip.pth": r"would call \w+\.system",
        "old.pth": r"would call \w+\.system",
        "plain.pth": "is a Python pickle, not torch's",
    }
    for name, message in wants.items():
        with pytest.raises(ValueError, match=f"was refused: .*{message}"):
            load_model(tmp_path / name)
    assert not trace.exists()
    torch.load(tmp_path / "zip.pth", weights_only=False)
    assert trace.exists(), "the trap works: the test above can fail"


def test_settings_and_numbers_beside_the_weights_are_let_through(tmp_path):
    content = {"args": argparse.Namespace(lr=np.float64(0.5), n=np.int64(3)), "w": torch.ones(2)}
    torch.save(content, tmp_path / "w.pth")
    found = read_file(tmp_path / "w.pth")
    assert found["args"].lr == 0.5 and found["args"].n == 3
    assert torch.equal(found["w"], content["w"])
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(ValueError, match="holds a list, not a checkpoint's dict"):
        read_file(tmp_path / "list.pth")


# ---------------------------------------------------------------- full size, no memory


def original_keys(entry):
    """The tensors of a catalogue entry's file, by its format, on the meta device."""
    dim, depth, _ = entry.shape
    rows, columns = (side // entry.patch for side in sides(entry.size))
    patch, channels, n = entry.patch, entry.channels, rows * columns
    shape = lambda *s: torch.empty(*s, device="meta")  # noqa: E731
    mlp = 6144 if dim == 1408 else 4 * dim

    def block(name):
        sizes = {
            "norm1": (dim,),
            "norm2": (dim,),
            "attn.qkv": (3 * dim, dim),
            "attn.proj": (dim, dim),
            "mlp.fc1": (mlp, dim),
            "mlp.fc2": (dim, mlp),
        }
        return {
            f"{name}.{k}.{part}": shape(*(s if part == "weight" else s[:1]))
            for k, s in sizes.items()
            for part in ("weight", "bias")
        }

    def vector(name):
        return {f"{name}.weight": shape(dim), f"{name}.bias": shape(dim)}

    def conv(name):
        return {f"{name}.weight": shape(dim, channels, patch, patch), f"{name}.bias": shape(dim)}

    blocks = {}
    image = "modality_encoders.IMAGE."
    first = 2 if entry.name == "data2vec2_b16" else 0
    for i in range(depth):
        data2vec = f"{image}context_encoder.blocks.{i}" if i < first else f"blocks.{i - first}"
        blocks |= block(data2vec)
    if entry.name.startswith("data2vec2"):
        return {
            "model": conv(f"{image}local_encoder.proj")
            | vector(f"{image}context_encoder.norm")
            | {
                f"{image}extra_tokens": shape(1, 1, dim),
                f"{image}fixed_positional_encoder.positions": shape(1, n, dim),
            }
            | blocks
        }
    common = conv("patch_embed.proj") | blocks
    if "_refined_" in entry.name:
        last = vector("embed_norm" if entry.post_norm else "norm")
        return {
            "state_dict": common
            | last
            | {
                "pos_embed.embed": shape(1, rows, columns, dim),
                "cls_tokens.tokens": shape(1, 1, dim),
            }
        }
    if entry.name.startswith("ijepa"):
        state = common | vector("norm") | {"pos_embed": shape(1, n, dim)}
        return {"target_encoder": {f"module.{k}": v for k, v in state.items()}}
    state = common | {"cls_token": shape(1, 1, dim), "pos_embed": shape(1, 1 + n, dim)}
    if entry.name.startswith("crossmae"):
        return {"model": state | {"decoder_blocks.0.cross_attn.q.bias": shape(8)}}
    state |= vector("norm")
    if entry.name.startswith("scalemae"):
        return {"model": state | {"mask_token_decoder": shape(1, 1, 512), "fpn.bias": shape(8)}}
    return (
        state
        if entry.name.startswith(("maws", "mae_ig3b", "mae_2b", "webmae"))
        else {"model": state}
    )


@pytest.mark.parametrize("entry", [e for e in CATALOGUE if e.address], ids=lambda e: e.name)
def test_a_full_size_file_of_every_entry_would_load(entry):
    found = convert(original_keys(entry), name=entry.name, known=[entry.size])
    architecture = found.architecture
    assert architecture["size"] == entry.size and architecture["patch"] == entry.patch
    assert architecture.get("channels", 3) == entry.channels
    assert tuple(architecture[k] for k in ("dim", "depth", "heads")) == entry.shape
    assert architecture.get("post_norm", False) == entry.post_norm
    assert ("cls" in entry.pooling) == architecture.get("class_token", True)
    # convert compared every shape with the whole model's; positions are parameters of ours.
    millions = sum(tensor.numel() for tensor in found.encoder.values()) / 1e6
    assert millions == pytest.approx(entry.parameters, abs=0.06)
