"""Pretraining a masked autoencoder."""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from tqdm.auto import tqdm

from refiner.base.errors import NotFinite, UserError
from refiner.base.files import write_json
from refiner.base.places import machine
from refiner.base.settings import checked, settings_from
from refiner.base.tensors import constant, step_generator, take
from refiner.images.views import View, make_view
from refiner.models.encoders import preprocess
from refiner.models.load import read_checkpoint
from refiner.models.mae import MAERecipe, MaskedAutoencoder, decoder_state, random_masking
from refiner.models.save import check_savable, save_model
from refiner.training.loop import (
    EMA,
    Stop,
    all_finite,
    autocast,
    batch_indices,
    compile_blocks,
    cosine_schedule,
    keep_on,
    save_is_due,
    stopper,
)
from refiner.training.states import check_origin, load_state, origin, save_state, set_states_aside


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
        images: an ImageSet or uint8 [N, 3, H, W]; labels are not used.
        recipe: a :class:`MAERecipe`; the default is the embedded checkpoint's.
        start: continue from this autoencoder (it is trained in place) instead of fresh weights.
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
    pixels = getattr(images, "images", images)
    _check_images(pixels, recipe)
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    pixels = keep_on(device, pixels)
    mae = (start or recipe.build()).to(device).train()
    card = mae.encoder.refiner_card
    if out:
        check_savable(mae.encoder)
    optimizer = torch.optim.AdamW(
        parameter_groups(mae, recipe.weight_decay), lr=recipe.lr, betas=(0.9, 0.95), fused=True
    )
    ema = EMA(mae, recipe.ema)
    run = Pretrained(mae)
    began_with = origin(images, start=card.get("started_from"))
    first, losses = 0, []  # losses: of the steps since the last entry of the history
    if resume:
        first, losses = _restore(Path(out or "."), mae, optimizer, ema, run, recipe, began_with)
    elif out:
        set_states_aside(Path(out) / "state.pt")
    if recipe.compile:
        compile_blocks([*mae.encoder.blocks, *mae.decoder_blocks])
    is_over, done = stopper(stop), first
    began = saved = time.monotonic()
    before = run.history[-1]["seconds"] if run.history else 0.0
    bar = tqdm(range(first, recipe.steps), initial=first, total=recipe.steps, desc="pretraining",
               unit="step", disable=not progress, mininterval=1.0)  # fmt: skip
    for step in bar:
        if is_over():
            if out:
                _save(Path(out), mae, optimizer, ema, run, recipe, began_with, done, losses)
            break
        lr = cosine_schedule(
            step, total=recipe.steps, warmup=int(recipe.warmup * recipe.steps), peak=recipe.lr
        )
        for group in optimizer.param_groups:
            group["lr"] = lr
        index = batch_indices(len(pixels), recipe.batch, seed=recipe.seed, step=step)
        losses.append(_one_step(mae, optimizer, take(pixels, index, device), recipe, step))
        ema.update(mae)
        done = step + 1
        if done % log_every == 0 or done == recipe.steps:
            mean = torch.stack(losses).mean().item()
            losses.clear()
            if not math.isfinite(mean):
                raise NotFinite(f"the loss is not finite at step {done}; try a lower lr")
            seconds = round(before + time.monotonic() - began, 3)
            run.history.append({"step": done, "loss": mean, "lr": lr, "seconds": seconds})
            bar.set_postfix(loss=f"{mean:.4f}")
        if out and save_is_due(done, recipe.steps, save_every, saved):
            _save(Path(out), mae, optimizer, ema, run, recipe, began_with, done, losses)
            saved = time.monotonic()
    ema.copy_to(mae)
    run.mae = (deepcopy(mae) if recipe.compile else mae).eval()  # a copy is not compiled
    run.steps = done
    if out:
        save_pretrained(run, out, recipe=recipe)
    return run


def _one_step(
    mae: MaskedAutoencoder, optimizer, pixels: Tensor, recipe: MAERecipe, step: int
) -> Tensor:
    """Crops, masks, predicts, and learns from one batch; its loss, still on the device."""
    # Drawn where the images are: on a GPU the host would have to wait for a copy of the masks.
    device = pixels.device
    generator = step_generator(recipe.seed, step, device)
    x = _views(pixels, recipe, mae.encoder.refiner_card, generator)
    visible, mask = random_masking(len(x), mae.patches, recipe.mask_ratio, generator, device)
    with autocast(device):
        loss, _ = mae(x, visible, mask)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    optimizer.step()
    return loss.detach()


def _views(pixels: Tensor, recipe: MAERecipe, card: dict, generator: torch.Generator) -> Tensor:
    """Normalised images [B, 3, H, W], cropped and mirrored as the recipe says."""
    if recipe.crop is None and not recipe.flip:
        return preprocess(pixels, card)
    whole = recipe.crop is None
    view = View(
        size=recipe.size,
        scale=(1.0, 1.0) if whole else recipe.crop,
        ratio=(1.0, 1.0) if whole else View.ratio,
        flip=0.5 if recipe.flip else 0.0,
        jitter=0.0,
        gray=0.0,
    )
    how = card["preprocessing"]
    mean, std = (constant(tuple(how[k]), pixels.device)[:, None, None] for k in ("mean", "std"))
    return (make_view(pixels, view, generator) - mean) / std


def _checked(recipe: MAERecipe) -> MAERecipe:
    """The recipe with every value in its range, if a run can follow it."""
    recipe = checked(recipe)
    patches = (recipe.size // recipe.patch) ** 2
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
    height, width = pixels.shape[-2:]
    if (height, width) != (recipe.size, recipe.size):
        raise UserError(
            f"images are {height}x{width} but the recipe is for {recipe.size}x{recipe.size}; "
            f"load them with size={recipe.size} or change the recipe's size"
        )


def _save(out: Path, mae, optimizer, ema: EMA, run: Pretrained, recipe: MAERecipe,
          began_with: dict, step: int, losses: list[Tensor]) -> None:  # fmt: skip
    if not all_finite(mae):  # the loss is looked at more rarely
        raise NotFinite(f"a weight is no longer finite at step {step}; start again with a lower lr")
    state = {
        "step": step,
        "recipe": asdict(recipe),
        "origin": began_with,
        "mae": mae.state_dict(),
        "optimizer": optimizer.state_dict(),
        "ema": ema.state_dict(),
        "history": run.history,
        "losses": losses,
    }
    save_state(out / "state.pt", state, keep_previous=True)


def _restore(out: Path, mae, optimizer, ema: EMA, run: Pretrained, recipe: MAERecipe,
             began_with: dict) -> tuple[int, list[Tensor]]:  # fmt: skip
    state = load_state(out / "state.pt")
    # What an older one lacks has its default.
    saved = asdict(settings_from(MAERecipe, state["recipe"]))
    if saved != asdict(recipe):
        changed = [k for k, v in asdict(recipe).items() if saved[k] != v]
        raise UserError(
            f"cannot resume {out}: the recipe changed in {', '.join(changed)}; "
            "use the same values, or start again without --resume"
        )
    check_origin(state.get("origin"), began_with, out)
    mae.load_state_dict(state["mae"])
    optimizer.load_state_dict(state["optimizer"])
    ema.load_state_dict(state["ema"])
    for key, value in ema.shadow.items():
        ema.shadow[key] = value.to(mae.mask_token.device)
    run.history[:] = state["history"]
    return state["step"], [loss.to(mae.mask_token.device) for loss in state["losses"]]


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


ENCODER_SIZES = ("size", "patch", "dim", "depth", "heads")


def recipe_for(name: str | Path) -> MAERecipe:
    """The default recipe with the encoder of a checkpoint, to train that one on.

    Raises:
        FileNotFoundError: for a name that is no checkpoint.
    """
    architecture = _checkpoint(name)[0]["architecture"]
    return MAERecipe(**{size: architecture[size] for size in ENCODER_SIZES})


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
            f"{', '.join(f'{size}={getattr(recipe, size)}' for size in ENCODER_SIZES)}; "
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
