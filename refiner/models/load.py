"""Models: build, load and save encoders: the front door to every masked-image model.

Every model is one of timm's (a VisionTransformer, mostly; see :mod:`refiner.models.encoders`) in
eval mode that carries ``refiner_card``, a plain dict: where it comes from, how it was made, and how
images have to be preprocessed for it.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path

import timm
import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models import get_pretrained_cfg
from timm.models.vision_transformer import VisionTransformer

from refiner.base.errors import UserError
from refiner.base.files import naming, read_json
from refiner.base.places import check_memory, data_folder
from refiner.base.settings import in_range
from refiner.base.tensors import as_size, sides
from refiner.models.adapt import resized, with_channels
from refiner.models.cards import Architecture, Card, Config
from refiner.models.catalogue import Entry, find, nearest
from refiner.models.convert import DECODER_PREFIXES, Converted, check_shapes, convert, read_file
from refiner.models.download import download, file_name, from_hub
from refiner.models.encoders import (
    Encoder,
    Eva,
    channel_statistics,
    channels_of,
    check_supported,
    plain_vit,
    with_epsilon,
)
from refiner.models.transformers_names import (
    SUPPORTED,
    from_transformers,
    is_transformers,
    preprocessing,
    read_settings,
    read_weights,
)

# What the repositories of MAE, MAWS, data2vec 2.0, dBOT, CrossMAE, I-JEPA and MIM-Refiner use, and
# ImageNet's mean and deviation.
IMAGENET = {"interpolation": "bicubic", "crop_pct": 0.875}
FILE_KINDS = (".safetensors", ".pth", ".pt", ".th", ".tar", ".bin", ".ckpt")
WEIGHTS = ("model.safetensors", "pytorch_model.bin")  # where timm keeps them in a folder


def embedded_models() -> list[str]:
    """Names of the checkpoints that come with the course."""
    return sorted(path.stem for path in data_folder().glob("*.safetensors"))


def build_vit(
    *,
    size: int | tuple[int, int] = 32,
    patch: int = 4,
    dim: int = 96,
    depth: int = 12,
    heads: int = 3,
    channels: int = 3,
    seed: int | None = None,
    **details,
) -> VisionTransformer:
    """A plain ViT with random weights.

    Positions start as 2-D sine-cosine (as in MAE) and are trained; those of prefix tokens are zero.

    Args:
        size: image height and width, pixels; a number for squares.
        patch: patch height and width, pixels.
        channels: of the images.
        seed: of the weights; None uses torch's global generator.
        **details: ``class_token``, ``registers``, ``mlp``, ``qkv_bias``, ``layer_scale``,
            ``final_norm``, ``fc_norm``, ``post_norm``, ``eps``: see
            :func:`refiner.models.encoders.plain_vit`.
            By default a pre-norm ViT with a class token.

    Returns:
        A timm VisionTransformer in eval mode, with a ``refiner_card``.

    Raises:
        ValueError: when the patch does not divide the size or the heads the width.
    """
    sizes = {"size": size, "patch": patch, "dim": dim, "depth": depth, "heads": heads}
    sizes |= {} if channels == 3 else {"channels": channels}
    architecture = in_range("", sizes | details, Architecture)
    height, width = sides(architecture["size"])
    size = architecture["size"] = as_size(height, width)
    if height % patch or width % patch or dim % heads or dim % 4:
        raise UserError(
            f"patch {patch} must divide size {size}, and heads {heads} and 4 must divide dim {dim}"
        )
    if torch.get_default_device().type != "meta":
        hidden = details.get("mlp") or 4 * dim
        patches = (height // patch) * (width // patch)
        weights = depth * 2 * dim * (2 * dim + hidden) + dim * (channels * patch**2 + patches)
        check_memory(4 * weights, f"a ViT of {depth} blocks, {dim} wide, for {size} pixels")
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
        "preprocessing": {
            "size": size,
            "mean": [0.5] * channels,
            "std": [0.25] * channels,
            **({} if channels == 3 else {"assumed": True}),
            "interpolation": "bicubic",
        },
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
        with_epsilon(twin, card["timm"].get("eps"))
        twin.eval().refiner_card = {"name": "random", "timm": copy.deepcopy(card["timm"])}
    else:
        raise UserError(
            "random_like needs a model of build_vit or load_model; build a random one in timm"
        )
    twin.refiner_card["preprocessing"] = dict(card["preprocessing"])
    return twin


# ---------------------------------------------------------------- loading


def load_model(
    name: str | Path,
    *,
    num_heads: int | None = None,
    size: int | tuple[int, int] | None = None,
    channels: int | None = None,
    gsd: float | None = None,
) -> Encoder:
    """Loads an encoder by name, path or address.

    Args:
        name: one of
            an embedded checkpoint (``"mae_toybox"``);
            a model of the catalogue (``"mae_refined_l16"``; ``refiner models`` lists them) or any
            other model of timm of a supported class (``"vit_base_patch16_224.mae"``), fetched on
            first use;
            a folder written by :func:`save_model`, by timm or by transformers (or its
            ``model.safetensors``), or a repository ``"hf-hub:…"``;
            a file (``.safetensors``, ``.pth``, ``.pt``, ``.th``, …) in the format of MAE, MAWS,
            data2vec 2.0, dBOT, CrossMAE, Scale-MAE, I-JEPA, iBOT or MIM-Refiner, told apart by its
            keys;
            an http(s) address of such a file.
        num_heads: attention heads a block, for a file: its keys cannot tell. Default 64 channels a
            head, or what the known models of that width have; needed where 64 does not divide it.
        size: other image size than the model's own, pixels; positions are interpolated. For images
            that are not square (height, width); of a file with positions for such images it says
            how they lie, where nothing else does.
        channels: of the images; a model of others is adapted (:func:`with_channels`), and a warning
            says how. Default: the model's own, which its weights tell.
        gsd: ground sample distance of the images as the model gets them, for Scale-MAE, relative to
            that of its training; default 1.

    Returns:
        A timm model in eval mode; ``.refiner_card`` tells origin, architecture and preprocessing.

    Raises:
        ValueError: for an unknown name, with the nearest known ones; an unsupported model; a file
            that is damaged, wants to run code or does not fit (what is missing, extra or of wrong
            shape is listed).
        FileNotFoundError: when a file is missing or cannot be fetched; it says what to put where.
    """
    model = _load(str(name), num_heads, size, gsd)
    if size is not None and sides(size) != sides(model.refiner_card["preprocessing"]["size"]):
        model = resized(model, size)
    if channels not in (None, channels_of(model)):
        model = with_channels(model, channels)
        warnings.warn(f"{name}: assumed is {model.refiner_card['assumed']}", stacklevel=2)
    if model.refiner_card["preprocessing"].get("assumed"):
        warnings.warn(
            f"{name}: assumed are a mean of 0.5 and a deviation of 0.25 of its "
            f"{channels_of(model)} channels; refiner.fit_channels(model, images) measures them",
            stacklevel=2,
        )
    return model


def _load(name: str, num_heads: int | None, size=None, gsd=None) -> Encoder:
    path, entry = _located(name), find(name)
    carded = path is not None and _is_carded(path)
    if num_heads is not None and (path is None or carded):
        raise UserError(f"{name} tells its number of heads itself; leave num_heads out")
    if gsd is not None and (path is None or carded):
        raise UserError(f"{name} has positions of its own; gsd is for files of Scale-MAE")
    if path is None:
        return _load_timm(name)
    if carded:
        return _load_carded(path)
    if entry is None or path == Path(name):
        return _load_file(path, num_heads, name=path.stem, size=size, gsd=gsd)
    heads = num_heads or entry.shape[2]
    model = _load_file(path, heads, name=name, size=size, gsd=gsd, known=[entry.size])
    model.refiner_card |= {"origin": entry.address, **_told(entry)}
    if entry.scale:
        how = model.refiner_card["preprocessing"]
        how["mean"], how["std"] = ([x] * entry.channels for x in entry.scale)
        how.pop("assumed", None)
    return model


def _located(name: str | Path) -> Path | None:
    """The folder or file that a name stands for, fetched if need be; None for one of timm's."""
    name, path, entry = str(name), Path(name), find(str(name))
    if name in embedded_models():
        return data_folder() / f"{name}.safetensors"
    if path.exists():
        return _whole(path)
    if entry is not None and entry.address:
        file = entry.file or file_name(entry.address)
        return download(entry.address, file=file, md5=entry.md5)
    if name.startswith(("http://", "https://")):
        return download(name)
    if path.suffix in FILE_KINDS or (len(path.parts) > 1 and not name.startswith("hf-hub:")):
        raise FileNotFoundError(f"there is no file or folder {name}")
    return None


def _whole(path: Path) -> Path:
    """The folder of a saved model whose weights are named: they alone do not tell the network."""
    if path.name not in WEIGHTS:
        return path
    if (path.parent / "card.json").is_file():
        return path.parent
    config = path.parent / "config.json"  # of timm, unless of another library
    told = read_json(config, dict[str, object]) if config.is_file() else {}
    known = "architecture" in told or told.get("model_type") in SUPPORTED
    return path.parent if known else path


def _is_carded(path: Path) -> bool:
    """Whether it is a folder, or weights with a card beside them, and no other library's file."""
    return path.is_dir() or (path.suffix == ".safetensors" and path.with_suffix(".json").is_file())


def _load_carded(path: Path) -> Encoder:
    """An embedded checkpoint, or a folder of ours or of timm's."""
    config = path / "config.json"
    if config.is_file() and not (path / "card.json").is_file():
        if is_transformers(config):
            return _load_transformers(str(path), _beside(path))
        weights = next((path / name for name in WEIGHTS if (path / name).is_file()), None)
        if weights is None:
            raise FileNotFoundError(f"{path} holds no weights: {' or '.join(WEIGHTS)} is missing")
        return _load_timm_folder(f"local-dir:{path}", config, weights)
    card = read_card(path)
    if "architecture" not in card:  # one of timm's models, or refined from one
        if not config.is_file():
            raise FileNotFoundError(f"{path}: config.json is missing, which tells the network")
        model = _load_timm_folder(str(path), config, path / WEIGHTS[0])
        with_epsilon(model, card.get("timm", {}).get("eps"))
    else:
        model = _built(card["architecture"], read_checkpoint(path)[1], str(path))
    _check_card(model, card, str(path))
    model.refiner_card = card
    return model.eval()


def _beside(folder: Path) -> Callable[[str], Path]:
    """Gives the files of a folder by their names."""

    def file(name: str) -> Path:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder / name} is missing")
        return folder / name

    return file


def _load_transformers(source: str, file: Callable[[str], Path]) -> Encoder:
    """A folder or repository of transformers."""
    found, card = _from_transformers(source, file)
    if found.timm:
        name, options = card["timm"]["architecture"], card["timm"]["model_args"]
        options |= _timm_options(name, source, options)
        model = _timm_built(name, options, found.encoder, source)
        with_epsilon(model, card["timm"]["eps"])
    else:
        model = _built(found.architecture, found.encoder, source)
    model.refiner_card = card
    return model.eval()


def _from_transformers(source: str, file: Callable[[str], Path]) -> tuple[Converted, dict]:
    """The tensors of a folder or repository of transformers in timm's names, and their card."""
    settings = read_settings(file("config.json"))
    found = from_transformers(settings, read_weights(file), source)
    card = _file_card(found, source)
    with suppress(FileNotFoundError):  # without it, ImageNet's
        told = preprocessing(file("preprocessor_config.json"))
        channels = found.encoder["patch_embed.proj.weight"].shape[1]
        told |= channel_statistics(channels, told.get("mean"), told.get("std"))
        card["preprocessing"].pop("assumed", None)
        card["preprocessing"] |= told
    return found, card


def _check_card(model: Encoder, card: dict, name: str) -> None:
    """Refuses a card of other images than the network takes."""
    channels, how = channels_of(model), card["preprocessing"]
    if {len(how["mean"]), len(how["std"])} != {channels}:
        raise UserError(
            f"{name} says mean and deviation of {len(how['mean'])} and {len(how['std'])} channels, "
            f"but its network is for {channels}"
        )
    told, own = card["preprocessing"]["size"], getattr(model.patch_embed, "img_size", None)
    if own and tuple(own) != sides(told):
        raise UserError(f"{name} says {told} pixels, but its network is for {as_size(*own)}")


def _built(architecture: dict, state: dict, name: str) -> VisionTransformer:
    """A plain ViT with these weights, which are compared with it before anything is built."""
    with naming(name), torch.device("meta"):  # to draw random weights would take its time
        model = build_vit(**architecture)
        check_shapes(model.state_dict(), state, f"the weights do not fit {architecture}")
    model.load_state_dict(state, assign=True)
    return model


def _load_file(
    path: Path, num_heads: int | None, *, name: str, size=None, gsd=None, known=()
) -> VisionTransformer:
    """A checkpoint in another repository's format."""
    how = {"num_heads": num_heads, "size": size, "gsd": gsd, "known": known}
    found = convert(read_file(path), name=str(path), **how)
    if found.assumed:
        warnings.warn(f"{path}: assumed are {found.assumed}", stacklevel=4)
    model = _built(found.architecture, found.encoder, str(path))
    model.refiner_card = _file_card(found, name)
    return model


def _file_card(found: Converted, name: str) -> dict:
    made = {"timm": found.timm} if found.timm else {"architecture": found.architecture}
    size = found.timm["model_args"]["img_size"] if found.timm else found.architecture["size"]
    channels = found.encoder["patch_embed.proj.weight"].shape[1]
    return {
        "name": name,
        **made,
        "format": found.format,
        "left_out": list(found.left_out),
        **({"assumed": found.assumed} if found.assumed else {}),
        "preprocessing": {"size": size, **channel_statistics(channels), **IMAGENET},
    }


def read_checkpoint(
    name: str | Path, *, num_heads: int | None = None
) -> tuple[dict, dict, dict] | None:
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
    path = _located(name)
    if path is None:
        return None
    if not _is_carded(path):
        found = convert(read_file(path), name=str(path), num_heads=num_heads)
        return _file_card(found, path.stem), found.encoder, found.decoder
    config = path / "config.json"
    if config.is_file() and not (path / "card.json").is_file() and is_transformers(config):
        found, card = _from_transformers(str(path), _beside(path))
        return card, found.encoder, found.decoder
    card = read_card(path)
    files = [path / "model.safetensors", path / "decoder.safetensors"] if path.is_dir() else [path]
    state = {k: v.float() for file in files if file.is_file() for k, v in read_file(file).items()}
    decoder = {k: v for k, v in state.items() if k.startswith(DECODER_PREFIXES)}
    return card, {k: v for k, v in state.items() if k not in decoder}, decoder


def read_card(name: str | Path) -> dict:
    """The card alone of an embedded checkpoint, a folder of :func:`save_model`, or a file.

    Raises:
        FileNotFoundError: when card or weights are missing.
    """
    path = _located(name) or Path(name)
    if path.is_dir():
        missing = [f for f in ("card.json", "model.safetensors") if not (path / f).is_file()]
        if missing:
            raise FileNotFoundError(
                f"{path} is not a saved model: {' and '.join(missing)} missing. "
                "Give a folder that save_model, `refiner pretrain` or `refiner refine` wrote."
            )
        return read_json(path / "card.json", Card)
    return read_json(path.with_suffix(".json"), Card)


def _load_timm(name: str) -> Encoder:
    """A pretrained model of timm, by name or from the hub."""
    hub = name.startswith("hf-hub:")
    known = timm.is_model(name) and ("." not in name or name in timm.list_pretrained())
    if not hub and not known:
        near = nearest(name, [*embedded_models(), *timm.list_pretrained("*vit*")])
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise UserError(
            f"no model {name!r}: neither a path nor one of the embedded models "
            f"({', '.join(embedded_models())}) nor of the catalogue (`refiner models`) nor a "
            f"pretrained model of timm.{hint}"
        )
    if hub:
        file = partial(from_hub, name.removeprefix("hf-hub:"))
        if is_transformers(config := file("config.json")):
            return _load_transformers(name, file)
        return _load_timm_folder(name, config, file("model.safetensors"))
    architecture = name.split(".")[0]
    options = _timm_options(name, name, {})
    path = _timm_file(name)
    known = get_pretrained_cfg(name).to_dict()
    if path.suffix != ".safetensors":  # I-JEPA's original files
        model = _load_file(path, None, name=name)
        known["input_size"] = (3, *model.patch_embed.img_size)  # the file's positions tell
        return _carded(model, name, "timm", known)
    model = _timm_model(name, options, path, known)
    recipe = {"architecture": architecture, "model_args": options}
    return _carded(model, name, "timm", known, recipe)


def _load_timm_folder(source: str, config: Path, weights: Path) -> Encoder:
    """A folder or repository that timm wrote, without timm's loader: it trusts ``config.json``."""
    told = read_json(config, Config)
    name, known = told["architecture"], told.get("pretrained_cfg", told)
    given = told.get("model_args", {})
    options = given | _timm_options(name, str(config), given)
    model = _timm_model(name, options, weights, known)
    return _carded(model, source, source, known, {"architecture": name, "model_args": options})


def _timm_model(name: str, options: dict, weights: Path, known: dict) -> Encoder:
    """One of timm's architectures with the weights of a file, which is read by us.

    Args:
        name: of the architecture.
        options: arguments for it.
        weights: the file.
        known: what timm notes about the weights.
    """
    with torch.device("meta"):
        twin = timm.create_model(name, **options)
    state = dict(read_file(weights))
    # timm's own, which renames and resizes what needs it; it may be strict about what it meets.
    adapted = sys.modules[type(twin).__module__].checkpoint_filter_fn
    try:
        state = adapted(state, twin)
    except Exception as error:
        raise UserError(f"{weights} does not fit {name}: {error!r}") from error
    names = known.get("classifier") or "head"
    head = tuple(f"{n}." for n in ([names] if isinstance(names, str) else names))
    state = {k: v for k, v in state.items() if k in twin.state_dict() or not k.startswith(head)}
    return _timm_built(name, options, state, str(weights))


def _timm_built(name: str, options: dict, state: dict, source: str) -> Encoder:
    """One of timm's architectures with these weights, which are compared with it first."""
    with torch.device("meta"):
        expected = timm.create_model(name, **options).state_dict()
    check_shapes(expected, state, f"{source} does not fit {name}")
    check_memory(sum(4 * v.numel() for v in state.values()), f"the model of {source}")
    model = timm.create_model(name, **options)
    model.load_state_dict(state)
    return model


def _timm_options(architecture: str, source: str, given: dict) -> dict:
    """Arguments for timm; checks, before anything is built, that the class is supported."""
    try:
        with torch.device("meta"):
            model = timm.create_model(architecture, **given | {"num_classes": 0})
    # Its constructors meet sizes that do not go together with errors of a dozen types.
    except Exception as error:
        raise UserError(
            f"{source}: timm cannot build {architecture} with {given}: {error}"
        ) from error
    check_supported(model, source)
    # Rotary positions are computed for one size otherwise.
    return {"num_classes": 0} | ({"dynamic_img_size": True} if isinstance(model, Eva) else {})


def _timm_file(name: str) -> Path:
    """The weights of one of timm's models in the cache, fetched if need be."""
    config = get_pretrained_cfg(name)
    if config is None or not config.has_weights:
        raise UserError(f"timm has no pretrained weights for {name}")
    if config.hf_hub_id:
        repository = config.hf_hub_id
        return from_hub(repository, config.hf_hub_filename or "model.safetensors")
    return download(config.url, file=file_name(config.url))


def _carded(
    model: torch.nn.Module, name: str, origin: str, known: dict, recipe: dict | None = None
) -> Encoder:
    """A model of timm with the card that tells where it is from and what it needs.

    Args:
        model: the model.
        name: for ``load_model``.
        origin: where it is from.
        known: what timm notes about its weights.
        recipe: how timm makes it.
    """
    check_supported(model, name)
    config = timm.data.resolve_data_config(pretrained_cfg=known)
    card = getattr(model, "refiner_card", {}) | {
        "name": name,
        "origin": origin,
        "preprocessing": {
            "size": as_size(*config["input_size"][1:]),
            **channel_statistics(channels_of(model), config["mean"], config["std"]),
            "interpolation": config["interpolation"],
            "crop_pct": config["crop_pct"],
        },
    }
    if recipe:
        card["timm"] = recipe
    if entry := find(name):
        card |= _told(entry)
    _check_card(model, card, name)
    model.refiner_card = card
    return model.eval()


def _told(entry: Entry) -> dict:
    """What the catalogue adds to a card."""
    return {
        "method": f"{entry.method} ({entry.reference})",
        "licence": entry.licence,
        "pooling": entry.pooling.split(),
    }


def copy_model(model: Encoder) -> Encoder:
    """An independent copy, card included."""
    return copy.deepcopy(model)
