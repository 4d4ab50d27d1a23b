"""Folders and repositories of transformers (Hugging Face), in timm's names.

``config.json`` names the kind of model before any weight is read or fetched, and tells what tensors
cannot: heads, and the epsilon of the norms. All sizes are those of the tensors. Names are those of
transformers 4 on disk, which version 5 still writes, and of version 5 in memory.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict

import torch
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.files import fitting, naming, read_json
from refiner.base.settings import Range, in_range
from refiner.base.tensors import as_size, sides
from refiner.models.cards import Channels, Deviations, Heads, Made, Means, Norm, Sides
from refiner.models.convert import Converted, depth_of, finished, joined, need, read_file, shortened
from refiner.models.encoders import nearest_to
from refiner.models.positions import with_positions

PLAIN = ("vit_mae", "vit", "dinov2", "dinov2_with_registers", "ijepa")
BEIT = ("beit", "data2vec-vision")
SUPPORTED = (*PLAIN, *BEIT, "dinov3_vit")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")
INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
# What the classes' own settings are where a file leaves them out.
USUAL = {"num_attention_heads": 12, "layer_norm_eps": 1e-12, "image_size": 224}
EPSILON = {"dinov2": 1e-6, "dinov2_with_registers": 1e-6, "dinov3_vit": 1e-5}
# Each is tried in turn; the first of a group that fits renames.
OUTER = (
    (r"embeddings\.cls_token$", "cls_token"),
    (r"embeddings\.position_embeddings$", "pos_embed"),
    (r"embeddings\.register_tokens$", "reg_token"),
    (r"embeddings\.patch_embeddings\.(?:projection\.)?", "patch_embed.proj."),
    (r"(?:encoder\.layer|model\.layer|layers|layer)\.(\d+)\.", r"blocks.\1."),
    (r"(?:layernorm|norm)\.", "norm."),
    (r"pooler\.layernorm\.", "fc_norm."),
    (r"(?:encoder\.relative_position_bias|shared_position_bias)\.", "rel_pos_bias."),
    (r"decoder\.decoder_(?:encoder\.layer|layers)\.(\d+)\.", r"decoder_blocks.\1."),
    (r"decoder\.(mask_token|decoder_(?:pos_embed|embed|norm|pred))", r"\1"),
)
INNER = (
    (r"attention\.(?:attention\.query|q_proj)\.", "attn.q."),
    (r"attention\.(?:attention\.key|k_proj)\.", "attn.k."),
    (r"attention\.(?:attention\.value|v_proj)\.", "attn.v."),
    (r"attention\.(?:output\.dense|o_proj)\.", "attn.proj."),
    (r"(?:intermediate\.dense|mlp\.up_proj)\.", "mlp.fc1."),
    (r"(?:output\.dense|mlp\.down_proj)\.", "mlp.fc2."),
    (r"mlp\.weights_in\.", "mlp.fc1."),
    (r"mlp\.weights_out\.", "mlp.fc2."),
    (r"(?:attention\.attention\.)?relative_position_bias\.(?=relative_position)", "attn."),
    (r"lambda_([12])$", r"gamma_\1"),
    (r"layernorm_before\.", "norm1."),
    (r"layernorm_after\.", "norm2."),
    (r"layer_scale([12])\.lambda1$", r"ls\1.gamma"),
)
HEAD = re.compile(r"(classifier|pooler|lm_head|decoder|embeddings\.mask_token|\w*_head)\b")
BUFFERS = ("relative_position_index", "inv_freq")  # computed, not learned


NO_NORM = "a last norm without scale and shift, as the folder has none (nor a pooler)"


class Settings(TypedDict):
    """What is read of a ``config.json`` of transformers."""

    model_type: str
    num_attention_heads: NotRequired[Heads]
    layer_norm_eps: NotRequired[Norm]
    image_size: NotRequired[Sides]
    hidden_act: NotRequired[Literal["gelu", "silu"]]
    use_gated_mlp: NotRequired[bool]
    num_channels: NotRequired[Channels]
    rope_theta: NotRequired[Literal[100.0]]


class Index(TypedDict):
    """Which file of several holds which tensor."""

    weight_map: dict[str, str]


class Processor(TypedDict):
    """What is read of a ``preprocessor_config.json``."""

    image_mean: NotRequired[Means | None]
    image_std: NotRequired[Deviations | None]
    resample: NotRequired[Annotated[int, Range(0, 5)] | None]
    size: NotRequired[object]
    crop_size: NotRequired[object]
    do_center_crop: NotRequired[bool | None]


def is_transformers(config: Path) -> bool:
    """Whether a ``config.json`` is of transformers and of no other library."""
    found = read_json(config, dict[str, object])
    return "model_type" in found and "architecture" not in found


def read_settings(config: Path) -> Settings:
    """A ``config.json``, checked.

    Raises:
        UserError: for a kind of model that is not supported, or a value that cannot be.
    """
    kind = read_json(config, dict[str, object])["model_type"]
    if kind not in SUPPORTED:
        raise UserError(
            f"{config} is of transformers' model_type {kind!r:.60}; supported are "
            f"{', '.join(SUPPORTED)}, and of other models those that timm has (`refiner models`)"
            f"{nearest_to(str(kind))}"
        )
    found = USUAL | {"layer_norm_eps": EPSILON.get(kind, 1e-12)} | read_json(config, Settings)
    activation = "silu" if found.get("use_gated_mlp") else "gelu"  # DINOv3's larger models
    if found.get("hidden_act", activation) != activation:
        raise UserError(
            f"{config}: hidden_act is {found['hidden_act']!r}; timm's network has {activation!r}"
        )
    return found


def read_weights(file: Callable[[str], Path]) -> dict[str, Tensor]:
    """The tensors of a folder or repository, from one file or several.

    Args:
        file: gives the place of a file by its name.

    Raises:
        FileNotFoundError: where there are none, or one of several is missing.
    """
    missing = []
    for name in (*WEIGHTS[:1], *INDICES[:1], *WEIGHTS[1:], *INDICES[1:]):
        try:
            path = file(name)
        except FileNotFoundError as error:
            missing.append(error)
            continue
        if name in WEIGHTS:
            return dict(read_file(path))
        parts = sorted(set(read_json(path, Index)["weight_map"].values()))
        if strange := [part for part in parts if not re.fullmatch(r"[\w-]+(\.[\w-]+)+", part)]:
            raise UserError(f"{path} names {strange[0]!r:.60}, which is no file beside it")
        return {k: v for part in parts for k, v in read_file(file(part)).items()}
    raise missing[0]


def from_transformers(settings: Settings, state: Mapping[str, Tensor], name: str) -> Converted:
    """A model of transformers in timm's names; a ViTMAE's decoder, too.

    Raises:
        UserError: listing what is missing, extra or of wrong shape.
    """
    kind, named = settings["model_type"], f"transformers' {settings['model_type']}"
    with fitting(name):
        state, decoder, left_out = _renamed(state)
        gated = "blocks.0.mlp.fc1.weight" in state and (
            len(state["blocks.0.mlp.fc1.weight"]) != state["blocks.0.mlp.fc2.weight"].shape[1]
        )
        if kind in PLAIN and not gated:
            heads, eps = settings["num_attention_heads"], settings["layer_norm_eps"]
            found = Converted(named, {}, state, decoder, shortened(left_out))
            told = [settings["image_size"]]
            return finished(found, name, num_heads=heads, told=told, eps=eps)
        place = _as_beit if kind in BEIT else _as_dinov2 if kind in PLAIN else _as_dinov3
        need(state, ("patch_embed.proj.weight", "blocks.0.mlp.fc2.weight"), name, named)
        assumed = "" if {"norm.weight", "fc_norm.weight"} & set(state) else NO_NORM
        architecture, state, options = place(state, settings["image_size"])
        options = _sizes(settings, state) | options
        made = {"architecture": architecture, "model_args": options}
        with naming(name):  # a key such as layer.99999999.x makes no model
            made = in_range("", made | {"eps": settings["layer_norm_eps"]}, Made)
        state = {k: v.float().contiguous() for k, v in state.items()}
        return Converted(named, {}, state, {}, shortened(left_out), made, assumed)


def _sizes(settings: Settings, state: Mapping[str, Tensor]) -> dict:
    """What timm's constructors have to know of any model."""
    dim, channels, _, patch = state["patch_embed.proj.weight"].shape
    size = settings["image_size"]
    return ({} if channels == 3 else {"in_chans": channels}) | {
        "img_size": as_size(*sides(size)),
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth_of(state),
        "num_heads": settings["num_attention_heads"],
        "mlp_ratio": (state["blocks.0.mlp.fc2.weight"].shape[1] + 0.5) / dim,
    }


def _as_beit(state: dict[str, Tensor], size) -> tuple[str, dict[str, Tensor], dict]:
    """timm's architecture, the tensors as it names them, and the options that they need."""
    state = _without_key_bias(state)
    if not {"norm.weight", "fc_norm.weight"} & set(state):  # saved without its pooler
        ones = torch.ones(len(state["patch_embed.proj.weight"]))
        state |= {"fc_norm.weight": ones, "fc_norm.bias": torch.zeros_like(ones)}
    return (
        "beit_base_patch16_224",
        state,
        {
            "global_pool": "avg" if "fc_norm.weight" in state else "token",
            "qkv_bias": "blocks.0.attn.q_bias" in state,
            "init_values": 0.1 if "blocks.0.gamma_1" in state else None,
            "use_abs_pos_emb": "pos_embed" in state,
            "use_rel_pos_bias": "blocks.0.attn.relative_position_bias_table" in state,
            "use_shared_rel_pos_bias": "rel_pos_bias.relative_position_bias_table" in state,
        },
    )


def _as_dinov2(state: dict[str, Tensor], size) -> tuple[str, dict[str, Tensor], dict]:
    """DINOv2 with gates, as in its giant model; the gates are the first half of ``fc1``."""
    dim, _, _, patch = state["patch_embed.proj.weight"].shape
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    height, width = sides(size)
    n = state["pos_embed"].shape[1] - 1
    if (height // patch) * (width // patch) != n and height == width:
        height = width = patch * math.isqrt(n)
    size = as_size(height, width)
    told = {"size": size, "patch": patch, "dim": dim, "registers": registers}
    state = with_positions(state, told, "")
    options = {
        "img_size": size,
        "mlp_ratio": (len(state["blocks.0.mlp.fc1.weight"]) + 0.5) / dim,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "reg_tokens": registers,
    }
    return "vit_giant_patch14_dinov2", state, options


def _as_dinov3(state: dict[str, Tensor], size) -> tuple[str, dict[str, Tensor], dict]:
    """DINOv3, whose rotary positions timm's Eva has."""
    state = {re.sub(r"\.ls([12])\.gamma$", r".gamma_\1", k): v for k, v in state.items()}
    gates = "blocks.0.mlp.gate_proj.weight" in state
    if gates:
        names = (("mlp.fc1.", "mlp.fc1_x."), ("mlp.gate_proj.", "mlp.fc1_g."))
        for old, new in names:
            state = {k.replace(old, new): v for k, v in state.items()}
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    biased = "_qkvb" if "blocks.0.attn.qkv.bias" in state else ""
    return (
        f"vit_small{'_plus' * gates}_patch16_dinov3{biased}",
        _without_key_bias(state),
        {"num_reg_tokens": registers, "global_pool": "token"},
    )


def _without_key_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Biases of queries and values alone, as timm's Beit and Eva have them.

    Raises:
        UserError: where keys have a bias of their own.
    """
    found = {}
    for key, value in state.items():
        if not key.endswith("attn.qkv.bias"):
            found[key] = value
            continue
        q, k, v = value.chunk(3)
        if k.any():
            raise UserError("keys have a bias, for which timm's network has no place")
        found |= {key.replace("qkv.bias", "q_bias"): q, key.replace("qkv.bias", "v_bias"): v}
    return found


def _renamed(state: Mapping[str, Tensor]) -> tuple[dict, dict, list[str]]:
    """Tensors in timm's names, those of a decoder, and keys that were dropped."""
    patches = "embeddings.patch_embeddings."
    prefix = next((k.partition(patches)[0] for k in state if patches in k), "")
    encoder, decoder, dropped = {}, {}, []
    for key, value in state.items():
        new = _first(OUTER, key.removeprefix(prefix))
        block, dot, rest = re.match(r"((?:decoder_)?blocks\.\d+|)(\.?)(.*)", new).groups()
        new = block + dot + _first(INNER, rest) if block else new
        if new.endswith(BUFFERS) or not value.numel():  # no registers are registers of no rows
            continue
        if new.startswith(("decoder_", "mask_token")):
            decoder[new] = value
        elif HEAD.match(new):
            dropped.append(key.removeprefix(prefix).removeprefix("embeddings."))
        else:
            encoder[new] = value
    return joined(encoder), joined(decoder), dropped


def _first(names: tuple, key: str) -> str:
    """A key renamed by the first pattern at its beginning, or as it is."""
    found = ((re.sub(rf"^{a}", b, key), a) for a, b in names if re.match(a, key))
    return next(found, (key, ""))[0]


def preprocessing(processor: Path) -> dict:
    """What a ``preprocessor_config.json`` says, in a card's words.

    Raises:
        UserError: for a value that cannot be.
    """
    found = read_json(processor, Processor)
    words = {"mean": found.get("image_mean"), "std": found.get("image_std")}
    if found.get("resample") is not None:
        words["interpolation"] = "bilinear" if found["resample"] == 2 else "bicubic"
    shorter, crop = _side(found.get("size")), _side(found.get("crop_size"))
    cropped = found.get("do_center_crop") and shorter and crop
    return {k: v for k, v in words.items() if v} | {
        "crop_pct": min(1.0, crop / shorter) if cropped else 1.0
    }


def _side(size: object) -> int:
    """Pixels of the shorter side, which is told in several ways; 0 where it is not."""
    if isinstance(size, dict):
        size = size.get("shortest_edge") or size.get("height")
    return size if isinstance(size, int) and 0 < size < 2**14 else 0
