"""Checkpoints of other repositories, read safely and renamed to timm's names.

Formats, told apart by their keys (facts from the named repositories; nothing is guessed):

- *MAE* (facebookresearch/mae, also MAWS, iBOT's teacher, RETFound): timm's names; ``decoder_*`` and
  ``mask_token`` where a decoder is included.
- *dBOT* (liuxingbin/dbot): MAE's, with ``decoder_predp``, which predicts features, not pixels.
- *Scale-MAE* (bair-climate-initiative/scale-mae): MAE's, with ``fpn`` and ``fcn_*`` behind its
  decoder; positions are multiplied with the images' ground sample distance.
- *Bird-MAE* (DBD-research-group/Bird-MAE): MAE's, for spectrograms of one channel, time from top to
  bottom; its sines and cosines are for the turned grid.
- *CrossMAE* (TonyLianLong/CrossMAE): MAE's encoder without final norm, a cross-attention decoder.
- *I-JEPA* (facebookresearch/ijepa): ``target_encoder`` under ``module.``, no class token.
- *data2vec 2.0* (facebookresearch/fairseq, examples/data2vec): ``modality_encoders.IMAGE.*``;
  post-norm; the first blocks may lie in ``context_encoder.blocks`` (two of the base model's).
- *MIM-Refiner* (ml-jku/MIM-Refiner): ``pos_embed.embed``, ``cls_tokens.tokens``; post-norm where
  there is an ``embed_norm``.

Other files have the names of one of these, behind prefixes and in tables that are looked for, not
listed. Of several encoders in a file one that was averaged over training is taken.

Positions get one row for each prefix token; it is zero where the original adds none.
"""

from __future__ import annotations

import argparse
import inspect
import pickle
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from refiner.base.errors import Damaged, UserError
from refiner.base.files import fitting, naming
from refiner.base.settings import in_range
from refiner.base.tensors import as_size, sides
from refiner.models.cards import Architecture
from refiner.models.encoders import EPSILON, plain_vit, timm_arguments
from refiner.models.positions import at_distance, grid_of, with_positions

DECODER_PREFIXES = ("decoder_", "mask_token")
SIZES = ("img_size", "image_size", "input_size")  # how settings beside weights name it
AVERAGED = {"ema", "target", "teacher", "momentum"}  # of two encoders these are better features
# The usual rule is 64 channels a head; the last six of these widths of known models break it.
HEADS = {384: 6, 768: 12, 1024: 16, 1280: 16, 1408: 16, 2560: 32, 4096: 32, 2688: 21, 3072: 24}
ASSUMED = (
    "{heads} heads of 64 channels in each block, which the file cannot tell; give others as in "
    "load_model(path, num_heads=6)"
)
DISTANCE = (
    "images of a ground sample distance of 1, as its repository evaluates it; give another as in "
    "load_model(path, gsd=0.3)"
)
TURNED = (
    "images of {0} × {1} pixels, with time from top to bottom, as in Bird-MAE, whose sines are for "
    "the turned grid; if yours are not turned, say so as in load_model(path, size=({1}, {0}))"
)
HEAD = re.compile(
    r"(\w*heads?(_\w+)?|fc_norm|classifier|projector|predictor|fpn|fcn(_\w+)?|pos_emb_projection)\."
)
FORMATS = "MAE, MAWS, iBOT, dBOT, CrossMAE, Scale-MAE, I-JEPA, data2vec 2.0 (fairseq), MIM-Refiner"
IMAGE = "modality_encoders.IMAGE."
# What every encoder has: the patch embedding, behind any prefix.
PATCHES = re.compile(rf"(|.*\.)(patch_embed|{re.escape(IMAGE)}local_encoder)\.proj\.weight")
DATA2VEC_NAMES = (
    (f"{IMAGE}local_encoder.proj.", "patch_embed.proj."),
    (f"{IMAGE}extra_tokens", "prefix_tokens"),
    (f"{IMAGE}fixed_positional_encoder.positions", "pos_embed"),
    (f"{IMAGE}context_encoder.norm.", "norm_pre."),
    (f"{IMAGE}context_encoder.blocks.", "blocks."),
)
REFINER_NAMES = (
    ("pos_embed.embed", "pos_embed"),
    ("cls_tokens.tokens", "prefix_tokens"),
    ("embed_norm.", "norm_pre."),
)
PLAIN_NAMES = (("register_tokens", "reg_token"),)
USUAL = inspect.signature(timm_arguments).parameters | inspect.signature(plain_vit).parameters


@dataclass(frozen=True)
class Converted:
    """A checkpoint in timm's names.

    Attributes:
        format: which of the formats above it was.
        architecture: for :func:`refiner.models.load.build_vit`.
        encoder: float32 tensors, exactly those of the model.
        decoder: MAE's decoder where the file has one, else empty.
        left_out: keys that have no place in an encoder (heads, other decoders), shortened.
        timm: how timm makes the model, where it is no plain ViT and ``architecture`` is empty.
        assumed: what nothing tells and a rule stands for.
    """

    format: str
    architecture: dict
    encoder: dict[str, Tensor]
    decoder: dict[str, Tensor] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    timm: dict | None = None
    assumed: str = ""


# ---------------------------------------------------------------- reading


def read_file(path: str | Path) -> Mapping:
    """Reads a checkpoint without running anything in it.

    Its first bytes, not its name, say whether ``torch.load(weights_only=True)`` or safetensors
    reads it. Of Python's own types only plain containers, NumPy numbers and ``argparse.Namespace``
    (the settings in full checkpoints of MAE and its kin) are let through.

    Raises:
        FileNotFoundError: without such a file.
        Damaged: for a damaged or incomplete file.
        UserError: for one that wants to run code.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        zipped = zipfile.is_zipfile(path)
        with open(path, "rb") as file:
            pickled = file.read(1) == b"\x80"
        if not (zipped or pickled):
            return load_file(path)
        with torch.serialization.safe_globals(_harmless()):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except pickle.UnpicklingError as error:
        if wanted := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{path} was refused: reading it would call {wanted.group(1)}, and a file that "
                "calls code can do anything to your machine; ask its authors for the weights alone "
                "(safetensors, or a plain state_dict)"
            ) from None
        if "Unsupported operand" in str(error) and pickled:
            raise UserError(
                f"{path} was refused: it is a Python pickle, not torch's, and reading it could run "
                "code; ask its authors for the weights alone (safetensors, or a plain state_dict)"
            ) from None
        raise _damaged(path) from error
    # Readers meet damage with errors of a dozen types.
    except Exception as error:
        raise _damaged(path) from error
    if not isinstance(content, Mapping):
        raise UserError(f"{path} holds a {type(content).__name__}, not a checkpoint's dict")
    return content


def _harmless() -> list:
    scalar = np.float64(1).__reduce__()[0]  # NumPy's function for a pickled number
    homes = ("numpy.core.multiarray.scalar", "numpy._core.multiarray.scalar")
    kinds = ("float64", "float32", "int64", "int32", "bool")
    return [
        argparse.Namespace,
        np.dtype,
        *((scalar, home) for home in homes),
        *(type(np.dtype(kind)) for kind in kinds),
    ]


def _damaged(path: Path) -> Damaged:
    size = path.stat().st_size
    return Damaged(
        f"{path} ({size:,} bytes) is damaged, incomplete or no checkpoint; download it again"
    )


# ---------------------------------------------------------------- converting


def convert(
    content: Mapping,
    *,
    name: str = "the file",
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    gsd: float | None = None,
    known: Sequence = (),
) -> Converted:
    """Renames a checkpoint's tensors and works out its architecture.

    Args:
        content: of :func:`read_file`.
        name: for error messages.
        num_heads: attention heads a block, which the keys cannot tell; default the width / 64, or
            what models of this width have.
        size: of the images, where the file has no positions (they are then sine-cosine, by default
            of 224 pixels), or as many as more than one grid has.
        gsd: ground sample distance of the images, for Scale-MAE's positions.
        known: sizes of images that the file is known to be for.

    Raises:
        ValueError: for an unknown format, or listing what is missing, extra or of wrong shape.
    """
    with fitting(name):
        state, left_out = _unwrap(content, name)
        kind = _format(state, name)
        state, decoder, dropped = _renamed(state, kind)
        found = Converted(kind, {}, state, decoder, shortened(left_out + dropped))
        told = [*known, *_told_sizes(content)]
        return finished(found, name, num_heads=num_heads, told=told, asked=size, gsd=gsd)


def finished(
    found: Converted,
    name: str,
    *,
    num_heads: int | None,
    told: Sequence = (),
    asked: int | tuple[int, int] | None = None,
    eps: float = EPSILON,
    gsd: float | None = None,
) -> Converted:
    """A checkpoint in timm's names: told what it is, completed and compared.

    Args:
        found: its tensors, without an architecture.
        name, num_heads: see :func:`convert`.
        told: sizes of images that its positions may be for, the likeliest first.
        asked: the size that somebody asked for.
        eps: of the norms.
        gsd: see :func:`convert`.
    """
    kind, state = found.format, found.encoder
    need(state, ("patch_embed.proj.weight", "blocks.0.mlp.fc1.weight"), name, kind)
    told = [sides(size) for size in told]
    sizes = told if asked is None else [sides(asked), *told]
    architecture = _architecture(state, kind, num_heads, sizes, name)
    architecture |= {"eps": eps} if eps != EPSILON else {}
    known = num_heads or architecture["dim"] in HEADS
    assumed = [] if known else [ASSUMED.format(**architecture)]
    assumed += _size_assumed(architecture["size"], told, asked, name)
    rows, columns = sides(architecture["size"])
    if architecture.get("channels") == 1 and not sizes and rows < columns:
        # Sines told a wide grid: those of Bird-MAE are for the turned one (util/patch_embed.py).
        height, width = architecture["size"] = columns, rows
        assumed += [TURNED.format(height, width)]
    state = with_positions(state, architecture, name)
    if gsd is not None:
        state, architecture = at_distance(state, architecture, gsd, asked, name)
        assumed += [f"images of a ground sample distance of {gsd}, as asked for"]
    elif kind == "Scale-MAE":
        assumed += [DISTANCE]
    _check(state, architecture, name, kind)
    encoder, decoder = (
        {k: v.to(torch.float32, copy=True).contiguous() for k, v in part.items()}
        for part in (state, found.decoder)
    )
    return replace(
        found,
        architecture=architecture,
        encoder=encoder,
        decoder=decoder,
        assumed="; ".join(assumed),
    )


def _size_assumed(own, told: list[tuple[int, int]], asked, name: str) -> list[str]:
    """What is noted of a size; one that is told must not be given up for a square unsaid."""
    oblong = next((size for size in told if size[0] != size[1]), None)
    if oblong and isinstance(own, int):
        raise UserError(
            f"{name} is said to be for images of {oblong[0]} × {oblong[1]} pixels, but has as many "
            f"positions as {own} × {own} pixels have patches: put right what its settings say"
        )
    if isinstance(own, int) or asked is None or sides(asked) != own:
        return []
    return [f"images of {own[0]} × {own[1]} pixels, as asked for"]


def joined(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Queries, keys and values that lie apart in one tensor, as timm has them.

    ``attn.q.weight``, ``attn.k.weight`` and ``attn.v.weight`` become ``attn.qkv.weight``; so do
    their biases, and the ``q_bias`` and ``v_bias`` of EVA and BEiT. A bias that is missing is zero.
    """
    whole, parts = {}, {}
    for key, value in state.items():
        found = re.fullmatch(r"(.*attn\.)([qkv])(?:_proj)?[._](weight|bias)", key)
        if found is None:
            whole[key] = value
        else:
            parts.setdefault(f"{found[1]}qkv.{found[3]}", {})[found[2]] = value
    for key, found in parts.items():
        if key.endswith("weight") and len(found) < 3:
            raise UserError(f"{key} lacks one of q, k and v: there are {', '.join(found)} only")
        like = next(iter(found.values()))
        whole[key] = torch.cat([found.get(part, torch.zeros_like(like)) for part in "qkv"])
    return whole


def _told_sizes(content: Mapping) -> list[tuple[int, int]]:
    """The sizes of images that the settings beside the weights tell."""
    found = []
    for settings in (content, *content.values()):
        told = vars(settings) if isinstance(settings, argparse.Namespace) else settings
        for key in SIZES if isinstance(told, Mapping) else ():
            value = told.get(key)
            value = value[-2:] if isinstance(value, tuple | list) else (value, value)
            if len(value) == 2 and all(isinstance(x, int) and x > 0 for x in value):
                found.append(tuple(value))
    return found


def _unwrap(content: Mapping, name: str) -> tuple[dict[str, Tensor], list[str]]:
    """The encoder's tensors without prefixes of wrapping modules, and what lay beside them.

    Of several encoders an average over training (a teacher, a target, an EMA) is taken.
    """
    places = _places(content)
    if not places:  # nothing that is known; the largest table shows what there is
        tables = [content, *(v for v in content.values() if isinstance(v, Mapping))]
        tensors = max(map(_tensors, tables), key=len)
        if not tensors:
            raise UserError(
                f"{name} holds no weights; at its top are {', '.join(map(str, content))}"
            )
        return tensors, []
    path, table, prefix = max(places, key=lambda place: _is_averaged(*place))
    inner = [p for _, t, p in places if t is table and p != prefix and p.startswith(prefix)]
    tensors, left_out, around = {}, [], content
    for step in path:
        left_out += [k for k, v in around.items() if k != step and _holds_weights(k, v)]
        around = around[step]
    for key, value in table.items():
        if isinstance(value, Tensor) and key.startswith(prefix) and not key.startswith((*inner,)):
            tensors[key.removeprefix(prefix)] = value
        else:
            left_out.append(_beyond(str(key), prefix))
    return tensors, left_out


def _places(content: Mapping) -> list[tuple[tuple, Mapping, str]]:
    """The encoders in a checkpoint: the path to a table, the table, and their keys' prefix in it.

    They are those of the first level of nested tables that has any.
    """
    tables = [((), content)]
    for _ in range(3):
        found = [
            (path, table, match[1])
            for path, table in tables
            for key in _tensors(table)
            if (match := PATCHES.fullmatch(key))
        ]
        if found:
            return found
        tables = [
            ((*path, k), v) for path, t in tables for k, v in t.items() if isinstance(v, Mapping)
        ]
    return []


def _tensors(table: Mapping) -> dict[str, Tensor]:
    return {k: v for k, v in table.items() if isinstance(k, str) and isinstance(v, Tensor)}


def _is_averaged(path: tuple, table: Mapping, prefix: str) -> bool:
    return bool(AVERAGED & set(re.split(r"[._]", ".".join((*map(str, path), prefix)))))


def _holds_weights(key: object, value: object) -> bool:
    """Whether it is an optimizer, or another table with tensors."""
    if not isinstance(value, Mapping):
        return False
    tensor = any(isinstance(v, Tensor) or _holds_weights("", v) for v in value.values())
    return tensor or str(key).startswith("opt")


def _beyond(key: str, prefix: str) -> str:
    """A key without the first parts that it shares with a prefix."""
    parts, others = key.split("."), prefix.split(".")
    while len(parts) > 1 and others and parts[0] == others.pop(0):
        parts.pop(0)
    return ".".join(parts)


def _format(state: Mapping, name: str) -> str:
    """The format's name, from the keys alone."""
    if any(k.startswith(IMAGE) for k in state):
        return "data2vec 2.0"
    if "pos_embed.embed" in state:
        return "MIM-Refiner"
    if any("relative_position" in k or "rope" in k or "w12" in k for k in state):
        raise UserError(
            f"{name} has relative or rotary positions, as BEiT and EVA-02; load those by timm's "
            "name, such as 'beitv2_base_patch16_224.in1k_ft_in22k' (see `refiner models`)"
        )
    if not ({"patch_embed.proj.weight", "blocks.0.attn.qkv.weight"} & set(state)):
        first = ", ".join(list(state)[:3])
        if any("embeddings.patch_embeddings." in k for k in state):
            raise UserError(
                f"{name} is of transformers; put its config.json beside it and load the folder"
            )
        raise UserError(f"{name} has keys of no known format ({first}, …); known are {FORMATS}")
    if any(".cross_attn." in k for k in state):
        return "CrossMAE"
    if "decoder_predp.weight" in state:
        return "dBOT"
    if "mask_token_decoder" in state:
        return "Scale-MAE"
    return "MAE" if "cls_token" in state else "I-JEPA"


def _renamed(state: Mapping, kind: str) -> tuple[dict, dict, list[str]]:
    """Tensors in timm's names, MAE's decoder, and keys that were dropped."""
    names = {"data2vec 2.0": DATA2VEC_NAMES, "MIM-Refiner": REFINER_NAMES}.get(kind, PLAIN_NAMES)
    first = 0
    if kind == "data2vec 2.0":
        numbers = [re.match(rf"{IMAGE}context_encoder\.blocks\.(\d+)\.", k) for k in state]
        first = 1 + max((int(m.group(1)) for m in numbers if m), default=-1)
    # A fine-tuned MAE that reads the mean of its patches has its last norm behind it.
    pooled = kind == "MAE" and "norm.weight" not in state
    encoder, decoder, dropped = {}, {}, []
    for key, value in state.items():
        if _is_decoder(key, kind):
            decoder[key] = value
        elif HEAD.match(key) and not (pooled and key.startswith("fc_norm.")):
            dropped.append(key)
        else:
            new = next((b + key.removeprefix(a) for a, b in names if key.startswith(a)), key)
            new = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", new)
            if first and key.startswith("blocks."):
                new = re.sub(r"\d+", lambda m: str(int(m.group()) + first), new, count=1)
            encoder[new] = value
    if "prefix_tokens" in encoder:
        tokens = encoder.pop("prefix_tokens")
        encoder["cls_token"] = tokens[:, :1]
        if tokens.shape[1] > 1:
            encoder["reg_token"] = tokens[:, 1:]
    if kind != "MAE" or "decoder_pred.weight" not in decoder:
        dropped, decoder = dropped + list(decoder), {}
    return joined(encoder), decoder, dropped


def _is_decoder(key: str, kind: str) -> bool:
    if kind == "data2vec 2.0":
        return "decoder" in key or key.startswith("recon_proj.")
    return key.startswith((*DECODER_PREFIXES, "masked_embed", "dec_norms.", "wfm."))


def _architecture(state: Mapping, kind: str, num_heads: int | None, told: list, name: str) -> dict:
    """What build_vit needs; only what differs from its defaults beyond the five sizes."""
    patch_weight = state["patch_embed.proj.weight"]
    if patch_weight.ndim != 4:
        shape = list(patch_weight.shape)
        raise UserError(f"{name}: patch_embed.proj.weight is {shape}, expected [D, C, P, P]")
    dim, channels, patch, _ = patch_weight.shape
    mlp = len(state["blocks.0.mlp.fc1.weight"])
    registers = state["reg_token"].shape[1] if "reg_token" in state else 0
    details = {
        "channels": channels,
        "mlp": None if mlp == 4 * dim else mlp,
        "class_token": "cls_token" in state,
        "registers": registers,
        "qkv_bias": "blocks.0.attn.qkv.bias" in state,
        "layer_scale": "blocks.0.ls1.gamma" in state,
        "final_norm": "norm.weight" in state or "fc_norm.weight" in state,
        "fc_norm": "fc_norm.weight" in state,
        "post_norm": "norm_pre.weight" in state,
    }
    if details["post_norm"]:
        del details["final_norm"]
    height, width = told[0] if told else (224, 224)
    if "pos_embed" in state:
        rows, columns = grid_of(state["pos_embed"], details, kind, told, patch, name)
        height, width = rows * patch, columns * patch
    return {
        "size": as_size(height, width),
        "patch": patch,
        "dim": dim,
        "depth": depth_of(state),
        "heads": _heads(dim, num_heads, name),
    } | {k: v for k, v in details.items() if v != USUAL[k].default}


def depth_of(state: Mapping) -> int:
    """How many blocks there are."""
    return 1 + max(int(m.group(1)) for k in state if (m := re.match(r"blocks\.(\d+)\.", k)))


def _heads(dim: int, num_heads: int | None, name: str) -> int:
    usual = 0 if dim % 64 else dim // 64
    heads = num_heads or HEADS.get(dim) or usual
    if heads and dim % heads == 0:
        return heads
    if num_heads is None:
        raise UserError(
            f"{name}: the number of heads cannot be told for a model {dim} wide; give it, as in "
            "load_model(path, num_heads=2)"
        )
    raise UserError(f"{name}: num_heads={num_heads} does not divide the width {dim}")


# ---------------------------------------------------------------- checking


def need(state: Mapping, keys: tuple[str, ...], name: str, kind: str) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        raise UserError(f"{name} ({kind}'s format) does not fit a ViT: missing {_listed(missing)}")


def _check(state: Mapping, architecture: Mapping, name: str, kind: str) -> None:
    """Compares keys and shapes with the model's; no memory is used for it."""
    with naming(name):  # a key such as blocks.99999999.x makes no model
        in_range("", dict(architecture), Architecture)
    with torch.device("meta"):
        expected = plain_vit(**architecture).state_dict()
    model = f"a ViT of {architecture['depth']} blocks, {architecture['dim']} wide"
    check_shapes(expected, state, f"{name} ({kind}'s format) does not fit {model}")


def check_shapes(expected: Mapping, state: Mapping, complaint: str) -> None:
    """Compares keys and shapes of tensors.

    Raises:
        UserError: the complaint, and a list of what is missing, extra or of wrong shape.
    """
    missing = [k for k in expected if k not in state]
    extra = [k for k in state if k not in expected]
    wrong = [
        f"{k} {list(state[k].shape)} instead of {list(value.shape)}"
        for k, value in expected.items()
        if k in state and state[k].shape != value.shape
    ]
    problems = {"missing": missing, "extra": extra, "of wrong shape": wrong}
    if found := [f"{word} {_listed(keys)}" for word, keys in problems.items() if keys]:
        raise UserError(f"{complaint}: {'; '.join(found)}")


def _listed(keys: list[str], most: int = 6) -> str:
    more = f" and {len(keys) - most} more" if len(keys) > most else ""
    return ", ".join(keys[:most]) + more


def shortened(keys: list[str]) -> tuple[str, ...]:
    """First parts of keys: ``decoder_blocks.0.norm1.bias`` → ``decoder_blocks``."""
    return tuple(dict.fromkeys(key.split(".")[0] for key in keys))
