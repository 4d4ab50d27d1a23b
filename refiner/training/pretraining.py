"""Pretraining a masked autoencoder."""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.files import one_run_a_folder, write_json
from refiner.base.places import machine
from refiner.base.settings import checked
from refiner.base.tensors import sides, step_generator
from refiner.images.channels import measure_channels
from refiner.images.sets import pixels_of
from refiner.images.views import View, make_view
from refiner.models.encoders import normalize, preprocess
from refiner.models.load import read_checkpoint
from refiner.models.mae import MAERecipe, MaskedAutoencoder, decoder_state, random_masking
from refiner.models.save import check_savable, save_model
from refiner.training.loop import EMA, Loop, Stage, Stop, autocast, compile_blocks, shuffled
from refiner.training.states import origin


@dataclass
class Pretrained:
    """What :func:`pretrain` returns.

    Attributes:
        mae: the autoencoder with averaged weights, in eval mode.
        history: one dict per logged step: step, loss, lr, seconds.
        steps: taken; fewer than the recipe's where the run was stopped.
    """

    mae: MaskedAutoencoder
    history: list[dict] = field(default_factory=list)
    steps: int = 0

    @property
    def model(self) -> VisionTransformer:
        """The encoder."""
        return self.mae.encoder


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Matrices with weight decay, vectors and tokens without."""
    named = [(n, p) for n, p in module.named_parameters() if p.requires_grad]
    plain = [p for n, p in named if p.dim() <= 1 or n.endswith(("_token", "pos_embed"))]
    chosen = {id(p) for p in plain}
    decayed = [p for _, p in named if id(p) not in chosen]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": plain, "weight_decay": 0.0},
    ]


@parallel.alone()
@one_run_a_folder
def pretrain(
    images,
    *,
    recipe: MAERecipe | None = None,
    start: MaskedAutoencoder | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    log_every: int = 50,
    stop: Stop = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Pretrained:
    """Trains a masked autoencoder.

    Args:
        images: an ImageSet or uint8 [N, C, H, W]; labels are not used.
        recipe: a :class:`MAERecipe`; the default is the embedded checkpoint's.
        start: continue from a copy of this autoencoder instead of fresh weights.
        out: folder for the model, ``history.json`` and the training state, of which the last two
            are kept; that of an earlier run there becomes ``state.old.pt``. None keeps nothing.
        resume: go on from the state in ``out``, with the same images and start. The result is that
            of an uninterrupted run.
        save_every: steps between saved states; by default every 100th, if the last was a minute
            ago. The last step is always saved.
        log_every: steps averaged into one entry of the history.
        stop: ends the run before its last step: a function that is asked before each step and says
            True to stop, or a moment of ``time.monotonic()``. What is returned and saved then is
            the average of that moment; ``resume`` goes on from there.
        device: default CUDA if there is one, else CPU.
        progress: show a bar with loss and remaining time.

    Returns:
        A :class:`Pretrained`.

    Raises:
        ValueError: for a recipe that does not work, fewer images than a batch, a size that is not
            the recipe's and, with ``out``, an encoder that cannot be saved; to resume with another
            recipe, other images or another start.
        FileNotFoundError: to resume where nothing was saved.
        FloatingPointError: when the loss or a weight is no longer finite; saved states are kept.
    """
    recipe = _checked(recipe or MAERecipe())
    pixels = pixels_of(images)
    _check_images(pixels, recipe)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    mae = (deepcopy(start) if start else recipe.build()).to(device).train()
    measure_channels(mae.encoder, pixels)
    if out:
        check_savable(mae.encoder)
    if recipe.compile:
        compile_blocks([*mae.encoder.blocks, *mae.decoder_blocks])
    options = {"save_every": save_every, "log_every": log_every, "stop": stop}
    options["origin"] = origin(images, start=mae.encoder.refiner_card.get("started_from"))
    options["file"] = Path(out) / "state.pt" if out else None
    loop = loop_of(mae, pixels, recipe, device, **options)
    loop.run("pretraining", resume=resume, progress=progress)
    run = Pretrained(loop.ema.module, loop.history, loop.done)
    if out:
        save_pretrained(run, out, recipe=recipe)
    return run


def loop_of(
    mae: MaskedAutoencoder, pixels, recipe: MAERecipe, device: torch.device, **options
) -> Loop:
    """The loop that trains an autoencoder; the options are others of :class:`Loop`."""
    source = shuffled(pixels, recipe.batch, recipe.steps, device, recipe.seed)
    groups = parameter_groups(mae, recipe.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, betas=(0.9, 0.95), fused=True)
    rates = {"peak": recipe.lr, "warmup": int(recipe.warmup * recipe.steps)}

    def step(number: int) -> tuple[Tensor, dict[str, Tensor]]:
        return loss_of(mae, source.batch(number)[0], recipe, number)

    stages = {1: Stage(recipe.steps, step, optimizer, **rates)}
    options |= {"ema": EMA(mae, recipe.ema), "mean": True}
    return Loop({"mae": mae}, stages, source, device, recipe, **options)


def loss_of(
    mae: MaskedAutoencoder, pixels: Tensor, recipe: MAERecipe, step: int
) -> tuple[Tensor, dict[str, Tensor]]:
    """A step's loss on one batch of pixels, which are cropped and masked, twice: to log it, too."""
    # Drawn where the images are: on a GPU the host would have to wait for a copy of the masks.
    device = pixels.device
    generator = step_generator(recipe.seed, step, device)
    x = _views(pixels, recipe, mae.encoder.refiner_card, generator)
    visible, mask = random_masking(len(x), mae.patches, recipe.mask_ratio, generator, device)
    with autocast(device):
        loss, _ = mae(x, visible, mask)
    return loss, {"loss": loss}


def _views(pixels: Tensor, recipe: MAERecipe, card: dict, generator: torch.Generator) -> Tensor:
    """Normalised images [B, C, H, W], cropped and mirrored as the recipe says."""
    if recipe.crop is None and not recipe.flip:
        return preprocess(pixels, card)
    whole = {"scale": (1.0, 1.0), "ratio": (1.0, 1.0)}
    crop = whole if recipe.crop is None else {"scale": recipe.crop}
    view = View(size=recipe.size, **crop, flip=0.5 if recipe.flip else 0.0, jitter=0.0, gray=0.0)
    return normalize(make_view(pixels, view, generator), card)


def _checked(recipe: MAERecipe) -> MAERecipe:
    """The recipe with every value in its range, if a run can follow it."""
    recipe = checked(recipe)
    patches = math.prod(side // recipe.patch for side in sides(recipe.size))
    if round(patches * (1 - recipe.mask_ratio)) == patches:
        raise UserError(
            f"mask_ratio is {recipe.mask_ratio}; it needs to hide at least one of {patches} patches"
        )
    return recipe


def _check_images(pixels: Tensor, recipe: MAERecipe) -> None:
    if len(pixels) < recipe.batch:
        raise UserError(
            f"{len(pixels)} images are fewer than one batch of {recipe.batch}; "
            "give more images or a smaller batch"
        )
    if pixels.shape[1] != recipe.channels:
        raise UserError(
            f"images have {pixels.shape[1]} channels but the recipe is for {recipe.channels}; "
            "change the recipe's channels"
        )
    height, width = pixels.shape[-2:]
    rows, columns = sides(recipe.size)
    if (height, width) != sides(recipe.size):
        raise UserError(
            f"images are {height}x{width} but the recipe is for {rows}x{columns}; "
            f"load them with size={recipe.size} or change the recipe's size"
        )


# ---------------------------------------------------------------- saving, loading, looking

METHODS = {  # by whether there is a decoder
    True: "masked autoencoder (He et al. 2022, arXiv 2111.06377)",
    False: "masked image modeling without a decoder (Xie et al. 2022, arXiv 2111.09886)",
}


def save_pretrained(run: Pretrained, out: str | Path, *, recipe: MAERecipe) -> None:
    """Writes encoder, decoder, card and history of a run into a folder."""
    encoder = run.model
    encoder.refiner_card |= {
        "name": Path(out).name,
        "method": METHODS[recipe.decoder_depth > 0],
        "recipe": asdict(recipe),
        "machine": machine(),
        "seconds": run.history[-1]["seconds"] if run.history else 0.0,
        "loss": run.history[-1]["loss"] if run.history else None,
    }
    if run.steps < recipe.steps:
        encoder.refiner_card["stopped_after_steps"] = run.steps
    save_model(encoder, out, extra=decoder_state(run.mae))
    write_json(Path(out) / "history.json", run.history)


def recipe_for(name: str | Path) -> MAERecipe:
    """The default recipe with the encoder of a checkpoint, to train that one on.

    Raises:
        FileNotFoundError: for a name that is no checkpoint.
    """
    architecture = _checkpoint(name)[0]["architecture"]
    return MAERecipe(**{k: v for k, v in architecture.items() if k in MAERecipe.ENCODER})


def start_from(name: str | Path, recipe: MAERecipe) -> MaskedAutoencoder:
    """The recipe's autoencoder with a checkpoint's weights: :func:`pretrain`'s ``start``.

    The decoder is taken along where the checkpoint has one of the recipe's shape; otherwise it is
    new.

    Args:
        name: an embedded checkpoint, a folder of :func:`pretrain` or :func:`refiner.save_model`, or
            a file in the format of facebookresearch/mae.
        recipe: with the encoder of :func:`recipe_for`.

    Raises:
        FileNotFoundError: for a name that is no checkpoint.
        ValueError: when the recipe's encoder is another one.
    """
    card, encoder, decoder = _checkpoint(name)
    mae = recipe.build()
    theirs = {k: v.shape for k, v in encoder.items()}
    if theirs != {k: v.shape for k, v in mae.encoder.state_dict().items()}:
        raise UserError(
            f"{name} is not the recipe's encoder, a plain ViT with class token and "
            f"{', '.join(f'{size}={getattr(recipe, size)}' for size in recipe.ENCODER)}; "
            f"it has {card['architecture']}"
        )
    mae.encoder.load_state_dict(encoder)
    ours = {k: v.shape for k, v in decoder_state(mae).items()}
    if {k: v.shape for k, v in decoder.items()} == ours:
        mae.load_state_dict(decoder, strict=False)
    mae.encoder.refiner_card |= {
        "preprocessing": dict(card["preprocessing"]),
        "started_from": card["name"],
    }
    return mae


def _checkpoint(name: str | Path) -> tuple[dict, dict[str, Tensor], dict[str, Tensor]]:
    found = read_checkpoint(name)
    if found is None:
        raise FileNotFoundError(
            f"no checkpoint {str(name)!r} to start from: give an embedded one ('mae_toybox'), a "
            "folder of pretrain or refine, or a file of facebookresearch/mae"
        )
    return found
