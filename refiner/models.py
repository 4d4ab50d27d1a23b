"""Models: build small ViTs, load and save them, and the embedded checkpoints.

Every model is a timm VisionTransformer in eval mode that carries ``refiner_card``, a plain dict:
where it comes from, how it was made, and how images have to be preprocessed for it.
"""

from __future__ import annotations

import copy
import difflib
import json
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.layers import Format, build_sincos2d_pos_embed
from timm.models.vision_transformer import VisionTransformer

from refiner.files import replacing, write_json

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
DECODER_PREFIXES = ("decoder_", "mask_token")


def data_folder() -> Path:
    """Where the embedded checkpoints lie: in the installed package, or in the repository."""
    installed = Path(__file__).parent / "data"
    return installed if installed.is_dir() else Path(__file__).parent.parent / "data"


def embedded_models() -> list[str]:
    """Names of the checkpoints that come with the course."""
    return sorted(path.stem for path in data_folder().glob("*.safetensors"))


def build_vit(*, size: int = 32, patch: int = 4, dim: int = 96, depth: int = 12, heads: int = 3,
              seed: int | None = None) -> VisionTransformer:  # fmt: skip
    """A plain pre-norm ViT with a class token and random weights.

    Positions start as 2-D sine-cosine (as in MAE) and are trained; the class token's is zero.

    Args:
        size: image height and width, pixels.
        patch: patch height and width, pixels.
        seed: of the weights; None uses torch's global generator.

    Returns:
        A timm VisionTransformer in eval mode, with a ``refiner_card``.

    Raises:
        ValueError: when the patch does not divide the size or the heads the width.
    """
    if size % patch or dim % heads or dim % 4:
        raise ValueError(
            f"patch {patch} must divide size {size}, and heads {heads} and 4 must divide dim {dim}"
        )
    architecture = {"size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=size, patch_size=patch, embed_dim=dim, depth=depth, num_heads=heads,
            num_classes=0,
        )  # fmt: skip
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim, interleave_sin_cos=False)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, 1:] = positions
    model.refiner_card = {
        "name": "random",
        "architecture": architecture,
        "preprocessing": {"size": size, **PREPROCESSING},
    }
    return model.eval()


def random_like(model: VisionTransformer, *, seed: int = 0) -> VisionTransformer:
    """The same architecture with fresh weights: the control for everything that is measured.

    Raises:
        ValueError: for a model that :func:`build_vit` cannot build.
    """
    if "architecture" not in model.refiner_card:
        raise ValueError(
            "random_like needs a model that build_vit made; build a random one in timm"
        )
    twin = build_vit(**model.refiner_card["architecture"], seed=seed)
    twin.refiner_card["preprocessing"] = dict(model.refiner_card["preprocessing"])
    return twin


def allow_any_size(model: VisionTransformer) -> VisionTransformer:
    """Lets a ViT take other image sizes by interpolating its positions; returns the model."""
    model.dynamic_img_size = True
    patch = model.patch_embed
    patch.strict_img_size, patch.flatten, patch.output_fmt = False, False, Format.NHWC
    return model


# ---------------------------------------------------------------- loading


def load_model(name: str | Path) -> VisionTransformer:
    """Loads an encoder by name or path.

    Args:
        name: an embedded checkpoint (``"mae_toybox"``), a folder written by :func:`save_model`, a
            ``.safetensors`` file with its card (a ``.json`` of the same name) beside it, or a
            pretrained VisionTransformer of timm (``"vit_base_patch16_224.mae"``; downloads).

    Returns:
        A timm VisionTransformer in eval mode; ``.refiner_card`` tells origin, architecture and
        preprocessing.

    Raises:
        ValueError: for an unknown name, with the nearest known ones, or an unsupported model.
        FileNotFoundError: when a path lacks its weights or card.
    """
    found = read_checkpoint(name)
    if found is None:
        return _load_timm(str(name))
    card, encoder, _ = found
    if "architecture" not in card:  # refined from one of timm's models
        model = timm.create_model(f"local-dir:{name}", pretrained=True)
        model.refiner_card = card
        return model.eval()
    model = build_vit(**card["architecture"])
    model.load_state_dict(encoder)
    model.refiner_card = card
    return model


def read_checkpoint(name: str | Path) -> tuple[dict, dict, dict] | None:
    """Card, encoder and decoder of an embedded checkpoint, a saved folder or a ``.safetensors``.

    Returns:
        The card and two dicts of float32 tensors, the decoder's empty where there is none; None
        when ``name`` is neither.

    Raises:
        FileNotFoundError: when weights or card are missing.
    """
    path = Path(name)
    if str(name) in embedded_models():
        path = data_folder() / f"{name}.safetensors"
    if path.is_dir():
        card, state = read_folder(path)
        decoder = path / "decoder.safetensors"
        state |= load_file(decoder) if decoder.is_file() else {}
    elif path.suffix == ".safetensors" and path.is_file():
        card, state = _read_card(path.with_suffix(".json")), load_file(path)
    else:
        return None
    state = {k: v.float() for k, v in state.items()}
    decoder = {k: v for k, v in state.items() if k.startswith(DECODER_PREFIXES)}
    return card, {k: v for k, v in state.items() if k not in decoder}, decoder


def _read_card(path: Path) -> dict:
    if not path.is_file():
        raise FileNotFoundError(f"the model's card {path.name} is missing beside its weights")
    return json.loads(path.read_text())


def read_folder(folder: Path) -> tuple[dict, dict[str, torch.Tensor]]:
    """Card and weights of a folder that :func:`save_model` wrote."""
    card, weights = folder / "card.json", folder / "model.safetensors"
    missing = [path.name for path in (card, weights) if not path.is_file()]
    if missing:
        raise FileNotFoundError(
            f"{folder} is not a saved model: {' and '.join(missing)} missing. "
            "Give a folder that save_model, `refiner pretrain` or `refiner refine` wrote."
        )
    return _read_card(card), load_file(weights)


def _load_timm(name: str) -> VisionTransformer:
    known = timm.list_pretrained("*vit*")
    if name not in known and name not in timm.list_models("*vit*"):
        near = difflib.get_close_matches(name, [*embedded_models(), *known], n=3, cutoff=0.4)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"no model {name!r}: neither a path nor one of the embedded models "
            f"({', '.join(embedded_models())}) nor a pretrained ViT of timm.{hint}"
        )
    try:
        model = timm.create_model(name, pretrained=True, num_classes=0)
    except OSError as error:  # no network, or the hub refused
        raise FileNotFoundError(
            f"the weights of {name} are not in the local cache and could not be downloaded; "
            "connect once, or use an embedded model such as 'mae_toybox'"
        ) from error
    if not isinstance(model, VisionTransformer):
        raise ValueError(
            f"{name} is a {type(model).__name__}; only VisionTransformer is supported so far"
        )
    config = timm.data.resolve_data_config(model=model)
    preprocessing = {
        "size": config["input_size"][1],
        "mean": list(config["mean"]),
        "std": list(config["std"]),
        "interpolation": config["interpolation"],
    }
    model.refiner_card = {"name": name, "origin": "timm", "preprocessing": preprocessing}
    return model.eval()


# ---------------------------------------------------------------- saving


def copy_model(model: VisionTransformer) -> VisionTransformer:
    """An independent copy, card included."""
    return copy.deepcopy(model)


def save_model(model: VisionTransformer, folder: str | os.PathLike, *,
               extra: dict[str, torch.Tensor] | None = None) -> Path:  # fmt: skip
    """Saves an encoder as a folder that refiner and timm open.

    Writes ``model.safetensors``, timm's ``config.json`` and ``card.json``;
    ``timm.create_model("local-dir:<folder>")`` gives the same network.

    Args:
        model: a VisionTransformer with a ``refiner_card``.
        folder: made if missing; files in it are replaced one by one, each atomically.
        extra: more tensors (an MAE's decoder), saved in ``decoder.safetensors``.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary)
    if extra:
        with replacing(folder / "decoder.safetensors") as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in extra.items()}, temporary)
    write_json(folder / "config.json", _timm_config(model))
    write_json(folder / "card.json", model.refiner_card)
    return folder


def _timm_config(model: VisionTransformer) -> dict:
    """timm's config.json: a registered architecture plus the arguments that differ."""
    patch, block = model.patch_embed, model.blocks[0]
    size = patch.img_size if isinstance(patch.img_size, int) else patch.img_size[0]
    preprocessing = model.refiner_card["preprocessing"]
    return {
        "architecture": "vit_base_patch16_224",
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": {
            "img_size": size,
            "patch_size": patch.patch_size[0],
            "embed_dim": model.embed_dim,
            "depth": len(model.blocks),
            "num_heads": block.attn.num_heads,
        },
        "pretrained_cfg": {
            "input_size": [3, size, size],
            "mean": preprocessing["mean"],
            "std": preprocessing["std"],
            "interpolation": preprocessing["interpolation"],
            "num_classes": 0,
            "pool_size": None,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }
