"""Saving an encoder so that this library and plain timm can load it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import timm
import torch
from safetensors.torch import save_file

from refiner.base.errors import UserError
from refiner.base.files import replacing, write_json, write_text
from refiner.base.tensors import as_size, sides
from refiner.models.encoders import Encoder, PostNormBlock, channels_of, timm_arguments

TAGS = "tags: [masked-image-modeling, image-feature-extraction]"
HEADER = ("---", "library_name: timm", TAGS, "---")  # of a README on the Hugging Face hub


def save_model(
    model: Encoder, folder: str | os.PathLike, *, extra: dict[str, torch.Tensor] | None = None
) -> Path:
    """Saves an encoder as a folder that refiner and timm open.

    Writes ``model.safetensors``, timm's ``config.json``, ``card.json`` and a model card
    ``README.md``; ``timm.create_model("local-dir:<folder>")`` gives the same network, and
    ``"hf-hub:…"`` does once the folder was pushed to the hub. A post-norm model (data2vec 2.0) has
    no counterpart in timm: it gets no ``config.json``, and only :func:`load_model` opens it. timm
    takes its own 1e-6 for the norms' epsilon, whatever that of a model of transformers is.

    Args:
        model: an encoder with a ``refiner_card``.
        folder: made if missing; files in it are replaced one by one, each atomically.
        extra: more tensors (an MAE's decoder), saved in ``decoder.safetensors``.

    Returns:
        The folder.

    Raises:
        ValueError: for a model that neither timm nor :func:`build_vit` could build again.
    """
    folder = Path(folder)
    config = _timm_config(model)
    folder.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(folder / "model.safetensors") as temporary:
        save_file(weights, temporary, metadata={"format": "pt"})
    if extra:
        with replacing(folder / "decoder.safetensors") as temporary:
            save_file({k: v.detach().cpu().contiguous() for k, v in extra.items()}, temporary)
    if config is None:
        (folder / "config.json").unlink(missing_ok=True)
    else:
        write_json(folder / "config.json", config)
    write_json(folder / "card.json", model.refiner_card)
    write_text(folder / "README.md", model_card(model.refiner_card, timm_opens=config is not None))
    return folder


def check_savable(model: Encoder) -> None:
    """Finds out before the work that :func:`save_model` would refuse the result, as it would."""
    _timm_config(model)


def _timm_config(model: Encoder) -> dict | None:
    """timm's config.json: a registered architecture plus the arguments that differ.

    None for post-norm models, which timm cannot build.

    Raises:
        ValueError: when what they build has other weights than the model.
    """
    if isinstance(model.blocks[0], PostNormBlock):
        return None
    name, arguments = _timm_recipe(model)
    with torch.device("meta"):
        twin = timm.create_model(name, num_classes=0, **arguments)
    shapes = [{k: v.shape for k, v in m.state_dict().items()} for m in (model, twin)]
    if shapes[0] != shapes[1]:
        raise UserError(
            f"cannot describe this {type(model).__name__} so that timm builds it again; load it "
            "with load_model, or build it with build_vit"
        )
    how = model.refiner_card["preprocessing"]
    return {
        "architecture": name,
        "num_classes": 0,
        "num_features": model.num_features,
        "model_args": arguments,
        "pretrained_cfg": {
            "input_size": [channels_of(model), *sides(how["size"])],
            **{name: how[name] for name in ("mean", "std", "interpolation")},
            "crop_pct": how.get("crop_pct", 1.0),
            "num_classes": 0,
            "pool_size": None,
            "classifier": "head",
            "first_conv": "patch_embed.proj",
        },
    }


def _timm_recipe(model: Encoder) -> tuple[str, dict]:
    """timm's name of the architecture, and the arguments that make it this model."""
    card = model.refiner_card
    if "architecture" in card:
        told = {k: v for k, v in card["architecture"].items() if k != "eps"}  # timm has no word
        return "vit_base_patch16_224", timm_arguments(**told)
    if "timm" in card:
        options = {k: v for k, v in card["timm"]["model_args"].items() if k != "num_classes"}
        return card["timm"]["architecture"], options
    config = getattr(model, "pretrained_cfg", None) or {}
    patch = model.patch_embed
    arguments = {"img_size": as_size(*patch.img_size), "patch_size": patch.patch_size[0]}
    arguments |= {} if channels_of(model) == 3 else {"in_chans": channels_of(model)}
    if config.get("architecture"):
        return config["architecture"], arguments
    block = model.blocks[0]
    return "vit_base_patch16_224", arguments | {
        "embed_dim": model.embed_dim,
        "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
    }


def model_card(card: dict, *, timm_opens: bool = True) -> str:
    """The text of a ``README.md`` for a model, as the Hugging Face hub shows it.

    Args:
        card: a ``refiner_card``.
        timm_opens: whether timm can build the model.
    """
    how = card["preprocessing"]
    lines = [*HEADER, "", f"# {card['name']}", ""]
    told = {
        "method": "Method",
        "refined_from": "Refined from",
        "origin": "Origin",
        "assumed": "Assumed",
        "licence": "Licence of the original weights",
        "machine": "Machine",
        "seconds": "Seconds of training",
        "loss": "Loss",
        "verdict": "Verdict",
    }
    lines += [f"- {label}: {card[key]}" for key, label in told.items() if key in card]
    lines += [f"- {k}: {v}" for k, v in card.get("architecture", {}).items()]
    lines += [
        f"- Images: {how['size']} pixels, mean {how['mean']}, std {how['std']}, "
        f"{how['interpolation']}, crop {how.get('crop_pct', 1.0)}",
        "",
        "```python",
        "import refiner",
        'model = refiner.load_model("path/to/this/folder")',
    ]
    if timm_opens:
        opened = 'timm.create_model("local-dir:path/to/this/folder", pretrained=True)'
        lines += ["", "import timm", f"model = {opened}"]
    lines += ["```", ""]
    if not timm_opens:
        lines += ["A post-norm ViT: timm has no such architecture, only refiner opens it.", ""]
    for key, title in (("results", "Figures"), ("recipe", "Recipe"), ("refine_recipe", "Recipe")):
        if key in card:
            lines += [f"## {title}", "", "```json", json.dumps(card[key], indent=1), "```", ""]
    return "\n".join(lines)
