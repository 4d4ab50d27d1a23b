"""Masked autoencoders (He et al. 2022, arXiv 2111.06377) over timm's VisionTransformer.

The encoder sees a quarter of the patches; a small decoder puts mask tokens in the gaps and paints
the rest. Parameter names follow the authors' repository (facebookresearch/mae), so their released
files fit.

Shape legend: B batch, C channels, H W image, N patches, K visible patches, D encoder width,
E decoder width, P pixels of a patch (patch * patch * C).
"""

from __future__ import annotations

import math
import time
from copy import deepcopy
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import nn
from tqdm.auto import tqdm

from refiner.features import preprocess
from refiner.files import write_json
from refiner.models import build_vit, check_savable, read_checkpoint, save_model
from refiner.training import (
    EMA,
    Stop,
    all_finite,
    autocast,
    batch_indices,
    check_origin,
    compile_blocks,
    constant,
    cosine_schedule,
    keep_on,
    load_state,
    machine,
    origin,
    save_is_due,
    save_state,
    set_states_aside,
    step_generator,
    stopper,
    take,
    whole_numbers,
)
from refiner.views import View, make_view

Tensor = torch.Tensor


# ---------------------------------------------------------------- the model


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images [B, C, H, W] into patches [B, N, P], row by row, channels last as in MAE."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int) -> Tensor:
    """The inverse of :func:`patchify` for square images: [B, N, P] to [B, C, H, W]."""
    b, n, p = patches.shape
    side, c = round(n**0.5), p // patch**2
    x = patches.reshape(b, side, side, patch, patch, c)
    return x.permute(0, 5, 1, 3, 2, 4).reshape(b, c, side * patch, side * patch)


def random_masking(batch: int, n: int, ratio: float, generator: torch.Generator | None = None,
                   device: str | torch.device = "cpu") -> tuple[Tensor, Tensor]:  # fmt: skip
    """Chooses the visible patches of each image by sorting noise, as MAE does.

    Returns:
        visible [B, K] int64, the indices of the patches to keep, and mask [B, N] bool, True where
        a patch is hidden. K is ``round(n * (1 - ratio))``, at least 1.
    """
    keep = max(1, round(n * (1 - ratio)))
    noise_BN = torch.rand(batch, n, generator=generator, device=device)
    visible_BK = noise_BN.argsort(dim=1)[:, :keep]
    mask_BN = torch.ones(batch, n, dtype=torch.bool, device=device)
    return visible_BK, mask_BN.scatter(1, visible_BK, False)


def encode_visible(encoder: VisionTransformer, images: Tensor, visible: Tensor | None) -> Tensor:
    """The encoder's tokens before its last norm, [B, 1+K, D], class token first.

    Args:
        encoder: a VisionTransformer with a class token and a position for it.
        images: normalised [B, C, H, W].
        visible: [B, K] patches to keep, or None for all.
    """
    x_BND = encoder.patch_embed(images) + encoder.pos_embed[:, 1:]
    if visible is not None:
        x_BND = x_BND.gather(1, visible[:, :, None].expand(-1, -1, x_BND.shape[2]))
    return _through_blocks(encoder, x_BND)


def encode_gaps(encoder: VisionTransformer, images: Tensor, mask: Tensor, gap: Tensor) -> Tensor:
    """The encoder's tokens before its last norm with gaps to fill, [B, 1+N, D], class token first.

    As in SimMIM (Xie et al. 2022, arXiv 2111.09886) and BEiT: hidden patches enter the encoder too,
    as one learned token at their positions, so that the encoder itself has to paint.

    Args:
        encoder: a VisionTransformer with a class token and a position for it.
        images: normalised [B, C, H, W].
        mask: bool [B, N], True where a patch is hidden.
        gap: [1, 1, D] the token that stands for hidden patches.
    """
    x_BND = encoder.patch_embed(images)
    x_BND = torch.where(mask[:, :, None], gap.to(x_BND.dtype), x_BND) + encoder.pos_embed[:, 1:]
    return _through_blocks(encoder, x_BND)


def _through_blocks(encoder: VisionTransformer, x_BND: Tensor) -> Tensor:
    cls_B1D = (encoder.cls_token + encoder.pos_embed[:, :1]).expand(len(x_BND), -1, -1)
    return encoder.blocks(encoder.norm_pre(torch.cat([cls_B1D, x_BND], dim=1)))


class MaskedAutoencoder(nn.Module):
    """An encoder, a small decoder, and the loss on hidden patches.

    Args:
        encoder: timm VisionTransformer with a class token.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder. One narrow block leaves decoding work to the encoder;
            0 leaves it all: mask tokens enter the encoder (:func:`encode_gaps`), a linear layer
            reads the pixels, and the other sizes of the decoder mean nothing.
        decoder_heads: attention heads of the decoder.
        normalize_targets: predict each patch with its mean removed and divided by its standard
            deviation, as MAE recommends for photos. False predicts the pixels: on images with
            flat backgrounds the division would make the sensor's noise the target.

    Raises:
        ValueError: for a width that the decoder's heads cannot share.
    """

    def __init__(self, encoder: VisionTransformer, *, decoder_dim: int = 96, decoder_depth: int = 1,
                 decoder_heads: int = 3, normalize_targets: bool = False):  # fmt: skip
        super().__init__()
        self.encoder = encoder
        self.patch = encoder.patch_embed.patch_size[0]
        self.patches = encoder.patch_embed.num_patches
        self.normalize_targets = normalize_targets
        grid, width = encoder.patch_embed.grid_size, encoder.embed_dim
        has_decoder = decoder_depth > 0
        if not has_decoder:
            decoder_dim = width
        elif decoder_dim % decoder_heads or decoder_dim % 4:
            raise ValueError(
                f"a decoder_dim of {decoder_dim} does not suit {decoder_heads} heads; choose a "
                "multiple of decoder_heads and of 4, which its positions need"
            )
        self.decoder_embed = nn.Linear(width, decoder_dim) if has_decoder else nn.Identity()
        self.mask_token = nn.Parameter(torch.zeros(1, 1, decoder_dim))
        if has_decoder:
            positions = build_sincos2d_pos_embed(grid, decoder_dim, interleave_sin_cos=False)
            positions = torch.cat([torch.zeros(1, decoder_dim), positions])[None]  # class token: 0
            self.decoder_pos_embed = nn.Parameter(positions, requires_grad=False)
        self.decoder_blocks = nn.Sequential(
            *(Block(decoder_dim, decoder_heads, qkv_bias=True) for _ in range(decoder_depth))
        )
        self.decoder_norm = nn.LayerNorm(decoder_dim, eps=1e-6) if has_decoder else nn.Identity()
        self.decoder_pred = nn.Linear(decoder_dim, self.patch**2 * 3)
        nn.init.normal_(self.mask_token, std=0.02)
        for module in [self.decoder_embed, self.decoder_blocks, self.decoder_pred]:
            module.apply(_xavier)

    def decode(self, tokens_BKD: Tensor, visible_BK: Tensor) -> Tensor:
        """Predicts every patch [B, N, P] from the encoder's normed tokens [B, 1+K, D]."""
        x_BKE = self.decoder_embed(tokens_BKD)
        b, e = len(x_BKE), x_BKE.shape[2]
        gaps_BNE = self.mask_token.expand(b, self.patches, e).to(x_BKE.dtype)
        filled_BNE = gaps_BNE.scatter(1, visible_BK[:, :, None].expand(-1, -1, e), x_BKE[:, 1:])
        x_BNE = torch.cat([x_BKE[:, :1], filled_BNE], dim=1) + self.decoder_pos_embed
        return self.decoder_pred(self.decoder_norm(self.decoder_blocks(x_BNE)))[:, 1:]

    def predict(self, images: Tensor, visible: Tensor, mask: Tensor) -> Tensor:
        """Every patch [B, N, P] as painted by the decoder, or without one by the encoder itself."""
        if len(self.decoder_blocks):
            tokens = self.encoder.norm(encode_visible(self.encoder, images, visible))
            return self.decode(tokens, visible)
        tokens = self.encoder.norm(encode_gaps(self.encoder, images, mask, self.mask_token))
        return self.decoder_pred(tokens[:, 1:])

    def targets(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Patches to predict [B, N, P], and the means and deviations [B, N, 1] that undo them."""
        patches = patchify(images, self.patch)
        mean = patches.mean(dim=2, keepdim=True)
        std = (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
        if not self.normalize_targets:
            mean, std = torch.zeros_like(mean), torch.ones_like(std)
        return (patches - mean) / std, mean, std

    def forward(self, images: Tensor, visible: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Loss (scalar, mean squared error over hidden patches) and prediction [B, N, P]."""
        prediction = self.predict(images, visible, mask)
        target, _, _ = self.targets(images)
        error_BN = (prediction - target).square().mean(dim=2)
        return (error_BN * mask).sum() / mask.sum(), prediction


def _xavier(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)


# ---------------------------------------------------------------- pretraining


@dataclass(frozen=True)
class MAERecipe:
    """Everything that decides a pretraining run, with the defaults of the embedded checkpoint.

    Attributes:
        size, patch, dim, depth, heads: the encoder; see :func:`refiner.models.build_vit`.
        decoder_dim, decoder_depth, decoder_heads, normalize_targets: the decoder; see
            :class:`MaskedAutoencoder`.
        mask_ratio: share of hidden patches.
        crop: range of a random crop's share of the area, such as MAE's (0.2, 1.0) for photographs;
            None takes the whole image, as the Toybox's are small and many.
        flip: whether half of the images are mirrored.
        batch: images a step. Small, because on two cores the number of steps counts.
        steps: optimiser steps of the whole run.
        lr: peak learning rate of AdamW (betas 0.9, 0.95), not scaled by the batch.
        weight_decay: on matrices; vectors (biases, norms, tokens, positions) have none.
        warmup: share of the steps.
        ema: decay of the averaged weights that are kept.
        compile: fuse each block with torch.compile; needs a C++ compiler.
        seed: of weights, batches and masks.
    """

    size: int = 32
    patch: int = 4
    dim: int = 96
    depth: int = 12
    heads: int = 3
    decoder_dim: int = 96
    decoder_depth: int = 1
    decoder_heads: int = 3
    normalize_targets: bool = False
    mask_ratio: float = 0.75
    crop: tuple[float, float] | None = None
    flip: bool = False
    batch: int = 64
    steps: int = 11_000
    lr: float = 3e-3
    weight_decay: float = 0.05
    warmup: float = 0.05
    ema: float = 0.999
    compile: bool = False
    seed: int = 0

    def build(self) -> MaskedAutoencoder:
        """A fresh autoencoder; the same seed gives the same weights.

        Raises:
            ValueError: for sizes that do not go together.
        """
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = build_vit(
                size=self.size, patch=self.patch, dim=self.dim, depth=self.depth, heads=self.heads
            )
            return MaskedAutoencoder(
                encoder,
                decoder_dim=self.decoder_dim,
                decoder_depth=self.decoder_depth,
                decoder_heads=self.decoder_heads,
                normalize_targets=self.normalize_targets,
            )


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
                raise FloatingPointError(f"the loss is not finite at step {done}; try a lower lr")
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
    """The recipe with whole numbers, if a run can follow it."""
    recipe = whole_numbers(recipe)
    for name, low in {"batch": 1, "steps": 1, "seed": 0}.items():
        if getattr(recipe, name) < low:
            raise ValueError(f"{name} is {getattr(recipe, name)}; it needs to be {low} or more")
    if recipe.crop is not None:
        low, high = recipe.crop
        if not 0 < low <= high <= 1:
            raise ValueError(
                f"crop is {recipe.crop}; it needs to be two shares of the area above 0 and up to "
                "1, the smaller one first"
            )
    patches = (recipe.size // max(1, recipe.patch)) ** 2
    if not 0 < recipe.mask_ratio <= 1 or round(patches * (1 - recipe.mask_ratio)) == patches:
        raise ValueError(
            f"mask_ratio is {recipe.mask_ratio}; it needs to hide at least one of {patches} "
            "patches, and to be at most 1"
        )
    return recipe


def _check_images(pixels: Tensor, recipe: MAERecipe) -> None:
    if len(pixels) < recipe.batch:
        raise ValueError(
            f"{len(pixels)} images are fewer than one batch of {recipe.batch}; "
            "give more images or a smaller batch"
        )
    height, width = pixels.shape[-2:]
    if (height, width) != (recipe.size, recipe.size):
        raise ValueError(
            f"images are {height}x{width} but the recipe is for {recipe.size}x{recipe.size}; "
            f"load them with size={recipe.size} or change the recipe's size"
        )


def _save(out: Path, mae, optimizer, ema: EMA, run: Pretrained, recipe: MAERecipe,
          began_with: dict, step: int, losses: list[Tensor]) -> None:  # fmt: skip
    if not all_finite(mae):  # the loss is looked at more rarely
        raise FloatingPointError(
            f"a weight is no longer finite at step {step}; start again with a lower lr"
        )
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
    saved = asdict(MAERecipe(**state["recipe"]))  # what an older one lacks has its default
    if saved != asdict(recipe):
        changed = [k for k, v in asdict(recipe).items() if saved[k] != v]
        raise ValueError(
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


def decoder_state(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of facebookresearch/mae."""
    return {k: v for k, v in mae.state_dict().items() if not k.startswith("encoder.")}


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


def load_mae(
    name: str | Path = "mae_toybox",
    *,
    num_heads: int | None = None,
    decoder_heads: int = 16,
    normalize_targets: bool = False,
) -> MaskedAutoencoder:
    """Loads encoder and decoder.

    Args:
        name: an embedded checkpoint, a folder of :func:`pretrain`, or a file in the format of
            facebookresearch/mae with a decoder (in the catalogue: ``"mae_l16_with_decoder"``).
        num_heads, decoder_heads, normalize_targets: for such a file, whose keys cannot tell them;
            others tell them themselves. By default the encoder's usual number (see
            :func:`refiner.models.load_model`), 16 heads, and plain pixels, as in that repository's
            file for looking at.

    Returns:
        A :class:`MaskedAutoencoder` in eval mode.

    Raises:
        FileNotFoundError: when the checkpoint has no decoder (a refined encoder has none).
    """
    found = read_checkpoint(name, num_heads=num_heads)
    if found is None:
        raise FileNotFoundError(f"no masked autoencoder {str(name)!r}; try 'mae_toybox'")
    card, encoder, decoder = found
    if not decoder:
        raise FileNotFoundError(f"{name} has no decoder, so it cannot reconstruct")
    mae = _built(card, decoder, decoder_heads, normalize_targets)
    mae.load_state_dict({f"encoder.{k}": v for k, v in encoder.items()} | decoder)
    mae.encoder.refiner_card = card
    return mae.eval()


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
        raise ValueError(
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


def _built(card: dict, decoder: dict[str, Tensor], heads: int,
           normalize_targets: bool) -> MaskedAutoencoder:  # fmt: skip
    """A fresh autoencoder of the right shape, by the recipe or else by the decoder's tensors."""
    if "recipe" in card:
        return MAERecipe(**card["recipe"]).build()
    blocks = {key.split(".")[1] for key in decoder if key.startswith("decoder_blocks.")}
    return MaskedAutoencoder(
        build_vit(**card["architecture"]),
        decoder_dim=len(decoder["decoder_embed.weight"]),
        decoder_depth=len(blocks),
        decoder_heads=heads,
        normalize_targets=normalize_targets,
    )


@torch.no_grad()
def reconstruct(mae: MaskedAutoencoder, images: Tensor, *, mask_ratio: float = 0.75,
                seed: int = 0) -> dict[str, Tensor]:  # fmt: skip
    """Hides patches and lets the autoencoder paint them.

    Where the model predicts normalised patches, mean and deviation of the true patch are put back
    to make a picture, as in the paper's figures.

    Args:
        mae: on any device.
        images: uint8 [B, 3, H, W], on any device; the results lie beside them.

    Returns:
        ``original``, ``masked`` (hidden patches gray) and ``painted`` (hidden patches predicted),
        float [B, 3, H, W] in 0..1; ``mask`` bool [B, N]; ``loss``, the mean squared error over
        hidden patches in the units of the target, a scalar.
    """
    card = mae.encoder.refiner_card
    home, device = images.device, mae.mask_token.device
    x = preprocess(images.to(device), card)
    generator = torch.Generator().manual_seed(seed)  # the same masks on every device
    visible, mask = random_masking(len(x), mae.patches, mask_ratio, generator)
    loss, prediction = mae(x, visible.to(device), mask.to(device))
    _, mean, std = mae.targets(x)
    hidden = mask[:, :, None].to(device)
    true = patchify(x, mae.patch)
    pre = card["preprocessing"]
    scale, shift = (torch.tensor(pre[k])[:, None, None].to(x) for k in ("std", "mean"))

    def picture(patches: Tensor) -> Tensor:
        return (unpatchify(patches, mae.patch) * scale + shift).clamp(0, 1).to(home)

    return {
        "original": picture(true),
        "masked": picture(torch.where(hidden, torch.zeros(()).to(x), true)),
        "painted": picture(torch.where(hidden, prediction * std + mean, true)),
        "mask": mask.to(home),
        "loss": loss.to(home),
    }
