"""Models: build, load and save encoders: the front door to every masked-image model.

Every model is one of timm's (a VisionTransformer, mostly; see :mod:`refiner.encoders`) in eval mode
that carries ``refiner_card``, a plain dict: where it comes from, how it was made, and how images
have to be preprocessed for it.
"""

from __future__ import annotations

import copy
import json
import os
from importlib.resources import files
from pathlib import Path

import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import build_sincos2d_pos_embed
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from refiner.catalogue import Entry, find, nearest
from refiner.convert import DECODER_PREFIXES, convert, read_file
from refiner.download import download, from_hub
from refiner.encoders import (
    Encoder,
    Eva,
    Hiera,
    PostNormBlock,
    allow_any_size,
    check_supported,
    plain_vit,
    timm_arguments,
)
from refiner.files import replacing, write_json, write_text

__all__ = [
    "allow_any_size", "build_vit", "check_savable", "copy_model", "embedded_models", "load_model",
    "random_like", "read_checkpoint", "save_model",
]  # fmt: skip

PREPROCESSING = {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
# What the repositories of MAE, MAWS, data2vec 2.0, dBOT, CrossMAE, I-JEPA and MIM-Refiner use.
IMAGENET = {"mean": list(IMAGENET_DEFAULT_MEAN), "std": list(IMAGENET_DEFAULT_STD),
            "interpolation": "bicubic", "crop_pct": 0.875}  # fmt: skip
FILE_KINDS = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")


def data_folder() -> Path:
    """Where the embedded checkpoints lie: in the installed package, or in the repository."""
    package = Path(str(files("refiner")))
    installed = package / "_data"  # see setup.py
    return installed if installed.is_dir() else package.parent / "data"


def embedded_models() -> list[str]:
    """Names of the checkpoints that come with the course."""
    return sorted(path.stem for path in data_folder().glob("*.safetensors"))


def build_vit(*, size: int = 32, patch: int = 4, dim: int = 96, depth: int = 12, heads: int = 3,
              seed: int | None = None, **details) -> VisionTransformer:  # fmt: skip
    """A plain ViT with random weights.

    Positions start as 2-D sine-cosine (as in MAE) and are trained; those of prefix tokens are zero.

    Args:
        size: image height and width, pixels.
        patch: patch height and width, pixels.
        seed: of the weights; None uses torch's global generator.
        **details: ``class_token``, ``registers``, ``mlp``, ``qkv_bias``, ``layer_scale``,
            ``final_norm``, ``post_norm``: see :func:`refiner.encoders.plain_vit`. By default a
            pre-norm ViT with a class token.

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
    architecture |= details
    with torch.random.fork_rng(devices=[], enabled=seed is not None):
        if seed is not None:
            torch.manual_seed(seed)
        model = plain_vit(**architecture)
    positions = build_sincos2d_pos_embed(model.patch_embed.grid_size, dim, interleave_sin_cos=False)
    with torch.no_grad():
        model.pos_embed.zero_()
        model.pos_embed[0, model.num_prefix_tokens :] = positions
    model.refiner_card = {
        "name": "random",
        "architecture": architecture,
        "preprocessing": {"size": size, **PREPROCESSING},
    }
    return model.eval()


def random_like(model: Encoder, *, seed: int = 0) -> Encoder:
    """The same architecture with fresh weights: the control for everything that is measured.

    Raises:
        ValueError: for a model that neither :func:`build_vit` nor :func:`load_model` made.
    """
    card = getattr(model, "refiner_card", {})
    if "architecture" in card:
        twin = build_vit(**card["architecture"], seed=seed)
    elif "timm" in card:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            twin = timm.create_model(card["timm"]["architecture"], **card["timm"]["model_args"])
        twin.eval().refiner_card = {"name": "random", "timm": copy.deepcopy(card["timm"])}
    else:
        raise ValueError(
            "random_like needs a model of build_vit or load_model; build a random one in timm"
        )
    twin.refiner_card["preprocessing"] = dict(card["preprocessing"])
    return twin


# ---------------------------------------------------------------- loading


def load_model(name: str | Path, *, num_heads: int | None = None,
               size: int | None = None) -> Encoder:  # fmt: skip
    """Loads an encoder by name, path or address.

    Args:
        name: one of
            an embedded checkpoint (``"mae_toybox"``);
            a model of the catalogue (``"mae_refined_l16"``; ``refiner models`` lists them) or any
            other model of timm of a supported class (``"vit_base_patch16_224.mae"``), fetched on
            first use;
            a folder written by :func:`save_model` or by timm (or its ``model.safetensors``), or a
            repository ``"hf-hub:…"``;
            a file (``.safetensors``, ``.pth``, ``.pt``, ``.th``, …) in the format of MAE, MAWS,
            data2vec 2.0, dBOT, CrossMAE, I-JEPA, iBOT or MIM-Refiner, told apart by its keys;
            an http(s) address of such a file.
        num_heads: attention heads a block, for a file: its keys cannot tell. Default 64 channels a
            head, or what the known models of that width have; needed where 64 does not divide it.
        size: other image size than the model's own, pixels; positions are interpolated.

    Returns:
        A timm model in eval mode; ``.refiner_card`` tells origin, architecture and preprocessing.

    Raises:
        ValueError: for an unknown name, with the nearest known ones; an unsupported model; a file
            that is damaged, wants to run code or does not fit (what is missing, extra or of wrong
            shape is listed).
        FileNotFoundError: when a file is missing or cannot be fetched; it says what to put where.
    """
    model = _load(str(name), num_heads)
    return model if size is None else resized(model, size)


def _load(name: str, num_heads: int | None) -> Encoder:
    name = str(_whole(name))
    path, entry = Path(name), find(name)
    if name in embedded_models() or path.is_dir() or _has_card(path):
        if num_heads is not None:
            raise ValueError(f"{name} tells its number of heads itself; leave num_heads out")
        return _load_carded(name)
    if path.is_file():
        return _load_file(path, num_heads, name=path.stem)
    if entry is not None and entry.address:
        return _load_entry(entry, num_heads)
    if name.startswith(("http://", "https://")):
        return _load_file(download(name), num_heads, name=Path(name).stem)
    if path.suffix in FILE_KINDS or (len(path.parts) > 1 and not name.startswith("hf-hub:")):
        raise FileNotFoundError(f"there is no file or folder {name}")
    if num_heads is not None:
        raise ValueError(f"{name} tells its number of heads itself; leave num_heads out")
    return _load_timm(name)


def _whole(name: str | Path) -> str | Path:
    """The folder of a saved model whose weights are named: they alone do not tell the network."""
    path = Path(name)
    if path.name != "model.safetensors" or not path.is_file():
        return name
    if (path.parent / "card.json").is_file():
        return path.parent
    config = path.parent / "config.json"  # of timm, unless of another library
    timms = config.is_file() and "architecture" in json.loads(config.read_text(encoding="utf-8"))
    return path.parent if timms else name


def _has_card(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.with_suffix(".json").is_file()


def _load_carded(name: str) -> Encoder:
    """An embedded checkpoint, or a folder of ours or of timm's."""
    folder = Path(name)
    ours = not folder.is_dir() or (folder / "card.json").is_file()
    if not ours and (folder / "config.json").is_file():
        return _load_timm_folder(f"local-dir:{name}", folder / "config.json")
    card = read_card(name)
    if "architecture" not in card:  # one of timm's models, or refined from one
        model = timm.create_model(f"local-dir:{name}", pretrained=True)
        check_supported(model, name)
    else:
        model = build_vit(**card["architecture"])
        model.load_state_dict(read_checkpoint(name)[1])
    model.refiner_card = card
    return model.eval()


def _load_file(path: Path, num_heads: int | None, *, name: str) -> VisionTransformer:
    """A checkpoint in another repository's format."""
    found = convert(read_file(path), name=str(path), num_heads=num_heads)
    with torch.device("meta"):  # large models would take their time to draw random weights
        model = build_vit(**found.architecture)
    model.load_state_dict(found.encoder, assign=True)
    model.refiner_card |= {
        "name": name,
        "format": found.format,
        "left_out": list(found.left_out),
        "preprocessing": {"size": found.architecture["size"], **IMAGENET},
    }
    return model


def _load_entry(entry: Entry, num_heads: int | None) -> VisionTransformer:
    """A model of the catalogue that lies at an address."""
    path = download(entry.address, file=entry.file, md5=entry.md5, sha256=entry.sha256)
    model = _load_file(path, num_heads or entry.shape[2], name=entry.name)
    model.refiner_card |= {"origin": entry.address, **_told(entry)}
    return model


def resized(model: Encoder, size: int) -> Encoder:
    """The same model made for another image size, its positions interpolated.

    Raises:
        ValueError: for a Hiera, or a size that the patch does not divide.
    """
    if isinstance(model, Hiera):
        raise ValueError("a Hiera takes one image size only")
    patch = model.patch_embed.patch_size[0]
    if size % patch:
        raise ValueError(f"size {size} is no multiple of the patch of {patch} pixels")
    model.set_input_size(img_size=(size, size))
    card = model.refiner_card = copy.deepcopy(model.refiner_card)
    card["preprocessing"]["size"] = size
    if "architecture" in card:
        card["architecture"]["size"] = size
    if "timm" in card:
        card["timm"]["model_args"]["img_size"] = size
    return model


def read_checkpoint(name: str | Path, *,
                    num_heads: int | None = None) -> tuple[dict, dict, dict] | None:  # fmt: skip
    """Card, encoder and decoder of an embedded checkpoint, a folder, a file or a catalogue model.

    Args:
        name: as for :func:`load_model`, but for timm's models.
        num_heads: for a file in another repository's format.

    Returns:
        The card and two dicts of float32 tensors, the decoder's empty where there is none; None
        when ``name`` is none of these.

    Raises:
        FileNotFoundError: when weights or card are missing.
    """
    name = _whole(name)
    path, entry = Path(name), find(str(name))
    if str(name) in embedded_models():
        path = data_folder() / f"{name}.safetensors"
    elif entry is not None and entry.address:
        path = download(entry.address, file=entry.file, md5=entry.md5, sha256=entry.sha256)
    if path.is_dir():
        card, state = read_card(path), load_file(path / "model.safetensors")
        decoder = path / "decoder.safetensors"
        state |= load_file(decoder) if decoder.is_file() else {}
    elif _has_card(path):
        card, state = read_card(name), load_file(path)
    elif path.is_file():
        found = convert(read_file(path), name=str(path), num_heads=num_heads)
        preprocessing = {"size": found.architecture["size"], **IMAGENET}
        card = {"name": path.stem, "architecture": found.architecture, "format": found.format,
                "preprocessing": preprocessing}  # fmt: skip
        return card, found.encoder, found.decoder
    else:
        return None
    state = {k: v.float() for k, v in state.items()}
    decoder = {k: v for k, v in state.items() if k.startswith(DECODER_PREFIXES)}
    return card, {k: v for k, v in state.items() if k not in decoder}, decoder


def read_card(name: str | Path) -> dict:
    """The card alone of an embedded checkpoint, a folder of :func:`save_model`, or a file.

    Raises:
        FileNotFoundError: when card or weights are missing.
    """
    path = Path(_whole(name))
    if str(name) in embedded_models():
        path = data_folder() / f"{name}.safetensors"
    if path.is_dir():
        missing = [f for f in ("card.json", "model.safetensors") if not (path / f).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} is not a saved model: {' and '.join(missing)} missing. "
                "Give a folder that save_model, `refiner pretrain` or `refiner refine` wrote."
            )
        return json.loads((path / "card.json").read_text())
    return json.loads(path.with_suffix(".json").read_text())


def _load_timm(name: str) -> Encoder:
    """A pretrained model of timm, by name or from the hub."""
    hub = name.startswith("hf-hub:")
    known = timm.is_model(name) and ("." not in name or name in timm.list_pretrained())
    if not hub and not known:
        near = nearest(name, [*embedded_models(), *timm.list_pretrained("*vit*")])
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ValueError(
            f"no model {name!r}: neither a path nor one of the embedded models "
            f"({', '.join(embedded_models())}) nor of the catalogue (`refiner models`) nor a "
            f"pretrained model of timm.{hint}"
        )
    if hub:
        repository = name.removeprefix("hf-hub:")
        from_hub(repository, "model.safetensors")
        return _load_timm_folder(name, from_hub(repository, "config.json"))
    options = _timm_options(name, name)
    path = _timm_file(name)
    if path.suffix != ".safetensors":  # I-JEPA's original files
        model = _load_file(path, None, name=name)
        return _carded(model, name, "timm")
    overlay = {"pretrained_cfg_overlay": {"file": str(path)}}
    model = timm.create_model(name, pretrained=True, **options, **overlay)
    return _carded(model, name, "timm", {"architecture": name.split(".")[0], "model_args": options})


def _load_timm_folder(source: str, config: Path) -> Encoder:
    """A folder or repository that timm wrote; ``config`` is its ``config.json``."""
    told = json.loads(config.read_text())
    name, given = told["architecture"], told.get("model_args", {})
    options = given | _timm_options(name, source, **given)
    model = timm.create_model(source, pretrained=True, **options)
    return _carded(model, source, source, {"architecture": name, "model_args": options})


def _timm_options(architecture: str, name: str, **given) -> dict:
    """Arguments for timm; checks, before anything is fetched, that the class is supported."""
    with torch.device("meta"):
        model = timm.create_model(architecture, **given | {"num_classes": 0})
    check_supported(model, name)
    # Rotary positions are computed for one size otherwise.
    return {"num_classes": 0} | ({"dynamic_img_size": True} if isinstance(model, Eva) else {})


def _timm_file(name: str) -> Path:
    """The weights of one of timm's models in the cache, fetched if need be."""
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise ValueError(f"timm has no pretrained weights for {name}")
    if config.hf_hub_id:
        repository = config.hf_hub_id
        return from_hub(repository, config.hf_hub_filename or "model.safetensors")
    return download(config.url)


def _carded(model: torch.nn.Module, name: str, origin: str, recipe: dict | None = None) -> Encoder:
    """A model of timm with the card that tells where it is from and what it needs."""
    check_supported(model, name)
    known = model.pretrained_cfg if recipe else get_pretrained_cfg(name).to_dict()
    config = timm.data.resolve_data_config(pretrained_cfg=known)
    card = getattr(model, "refiner_card", {}) | {
        "name": name,
        "origin": origin,
        "preprocessing": {
            "size": config["input_size"][1],
            "mean": list(config["mean"]),
            "std": list(config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": config["crop_pct"],
        },
    }
    if recipe:
        card["timm"] = recipe
    if entry := find(name):
        card |= _told(entry)
    model.refiner_card = card
    return model.eval()


def _told(entry: Entry) -> dict:
    """What the catalogue adds to a card."""
    return {
        "method": f"{entry.method} (arXiv {entry.paper})",
        "licence": entry.licence,
        "pooling": entry.pooling.split(),
    }


# ---------------------------------------------------------------- saving


def copy_model(model: Encoder) -> Encoder:
    """An independent copy, card included."""
    return copy.deepcopy(model)


def save_model(model: Encoder, folder: str | os.PathLike, *,
               extra: dict[str, torch.Tensor] | None = None) -> Path:  # fmt: skip
    """Saves an encoder as a folder that refiner and timm open.

    Writes ``model.safetensors``, timm's ``config.json``, ``card.json`` and a model card
    ``README.md``; ``timm.create_model("local-dir:<folder>")`` gives the same network, and
    ``"hf-hub:…"`` does once the folder was pushed to the hub. A post-norm model (data2vec 2.0) has
    no counterpart in timm: it gets no ``config.json``, and only :func:`load_model` opens it.

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
    """Finds out before the work that :func:`save_model` would refuse the result.

    Raises:
        ValueError: as ``save_model`` does.
    """
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
        raise ValueError(
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
            "input_size": [3, how["size"], how["size"]],
            "mean": how["mean"],
            "std": how["std"],
            "interpolation": how["interpolation"],
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
        return "vit_base_patch16_224", timm_arguments(**card["architecture"])
    if "timm" in card:
        options = {k: v for k, v in card["timm"]["model_args"].items() if k != "num_classes"}
        return card["timm"]["architecture"], options
    config = getattr(model, "pretrained_cfg", None) or {}
    patch = model.patch_embed
    arguments = {"img_size": patch.img_size[0], "patch_size": patch.patch_size[0]}
    if config.get("architecture"):
        return config["architecture"], arguments
    block = model.blocks[0]
    return "vit_base_patch16_224", arguments | {
        "embed_dim": model.embed_dim, "depth": len(model.blocks),
        "num_heads": block.attn.num_heads,
    }  # fmt: skip


def model_card(card: dict, *, timm_opens: bool = True) -> str:
    """The text of a ``README.md`` for a model, as the Hugging Face hub shows it.

    Args:
        card: a ``refiner_card``.
        timm_opens: whether timm can build the model.
    """
    how = card["preprocessing"]
    lines = ["---", "library_name: timm", "tags: [masked-image-modeling, image-feature-extraction]",
             "---", "", f"# {card['name']}", ""]  # fmt: skip
    told = {"method": "Method", "refined_from": "Refined from", "origin": "Origin",
            "licence": "Licence of the original weights", "machine": "Machine",
            "seconds": "Seconds of training", "loss": "Loss"}  # fmt: skip
    lines += [f"- {label}: {card[key]}" for key, label in told.items() if key in card]
    lines += [f"- {k}: {v}" for k, v in card.get("architecture", {}).items()]
    lines += [
        f"- Images: {how['size']} pixels, mean {how['mean']}, std {how['std']}, "
        f"{how['interpolation']}, crop {how.get('crop_pct', 1.0)}",
        "", "```python", "import refiner", 'model = refiner.load_model("path/to/this/folder")',
    ]  # fmt: skip
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
