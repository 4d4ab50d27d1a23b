"""Masked autoencoders (He et al. 2022, arXiv 2111.06377) over timm's VisionTransformer.

The encoder sees a quarter of the patches; a small decoder puts mask tokens in the gaps and paints
the rest. Parameter names follow the authors' repository (facebookresearch/mae), so their released
files fit.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from refiner.base.errors import UserError
from refiner.base.files import fitting
from refiner.base.places import check_memory
from refiner.base.settings import (
    Count,
    Entries,
    NotNegative,
    Portion,
    Range,
    Share,
    Whole,
    settings_from,
)
from refiner.models.cards import Blocks, Channels, Heads, Side, Sides, Width
from refiner.models.convert import check_shapes
from refiner.models.encoders import channels_of, last_tokens, preprocess
from refiner.models.load import build_vit, read_checkpoint

# ---------------------------------------------------------------- the model


def patchify(images: Tensor, patch: int) -> Tensor:
    """Cuts images [B, C, H, W] into patches [B, N, P], row by row, channels last as in MAE."""
    b, c, h, w = images.shape
    x = images.reshape(b, c, h // patch, patch, w // patch, patch)
    return x.permute(0, 2, 4, 3, 5, 1).reshape(b, (h // patch) * (w // patch), patch * patch * c)


def unpatchify(patches: Tensor, patch: int, grid: tuple[int, int] | None = None) -> Tensor:
    """The inverse of :func:`patchify`: [B, N, P] to [B, C, H, W]; without a grid, a square."""
    b, n, p = patches.shape
    rows, columns = grid or (math.isqrt(n), math.isqrt(n))
    x = patches.reshape(b, rows, columns, patch, patch, p // patch**2)
    return x.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def random_masking(
    batch: int,
    n: int,
    ratio: float,
    generator: torch.Generator | None = None,
    device: str | torch.device = "cpu",
) -> tuple[Tensor, Tensor]:
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


class MaskedAutoencoder(nn.Module):
    """An encoder, a small decoder, and the loss on hidden patches.

    Args:
        encoder: timm VisionTransformer with a class token.
        decoder_dim: width of the decoder.
        decoder_depth: blocks of the decoder. One narrow block leaves decoding work to the encoder;
            0 leaves it all, as in SimMIM (Xie et al. 2022, arXiv 2111.09886) and BEiT: mask tokens
            enter the encoder at the hidden patches' positions, a linear layer reads the pixels, and
            the other sizes of the decoder mean nothing.
        decoder_heads: attention heads of the decoder.
        normalize_targets: predict each patch with its mean removed and divided by its standard
            deviation, as MAE recommends for photos. False predicts the pixels: on images with
            flat backgrounds the division would make the sensor's noise the target.

    Raises:
        ValueError: for a width that the decoder's heads cannot share.
    """

    def __init__(
        self,
        encoder: VisionTransformer,
        *,
        decoder_dim: int = 96,
        decoder_depth: int = 1,
        decoder_heads: int = 3,
        normalize_targets: bool = False,
    ):
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
            raise UserError(
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
        self.decoder_pred = nn.Linear(decoder_dim, self.patch**2 * channels_of(encoder))
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
            tokens = self.encoder.norm(last_tokens(self.encoder, images, kept_BK=visible))
            return self.decode(tokens, visible)
        tokens = last_tokens(self.encoder, images, gaps=(mask, self.mask_token))
        return self.decoder_pred(self.encoder.norm(tokens)[:, 1:])

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
        size, patch, channels, dim, depth, heads: the encoder; see
            :func:`refiner.models.load.build_vit`.
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

    size: Sides = 32
    patch: Side = 4
    channels: Channels = 3
    dim: Width = 96
    depth: Blocks = 12
    heads: Heads = 3
    decoder_dim: Width = 96
    decoder_depth: Annotated[int, Range(0, 256)] = 1
    decoder_heads: Heads = 3
    normalize_targets: bool = False
    mask_ratio: Portion = 0.75
    crop: Annotated[tuple[Portion, Portion], Entries(rising=True)] | None = None
    flip: bool = False
    batch: Count = 64
    steps: Count = 11_000
    lr: NotNegative = 3e-3
    weight_decay: NotNegative = 0.05
    warmup: Share = 0.05
    ema: Share = 0.999
    compile: bool = False
    seed: Whole = 0
    ENCODER = ("size", "patch", "channels", "dim", "depth", "heads")  # no settings: their names
    DECODER = ("decoder_dim", "decoder_depth", "decoder_heads", "normalize_targets")

    def build(self) -> MaskedAutoencoder:
        """A fresh autoencoder; the same seed gives the same weights.

        Raises:
            ValueError: for sizes that do not go together.
        """
        depth, dim = self.decoder_depth, self.decoder_dim
        check_memory(48 * depth * dim**2, f"a decoder of {depth} blocks, {dim} wide,")
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            encoder = build_vit(**{name: getattr(self, name) for name in self.ENCODER})
            decoder = {name: getattr(self, name) for name in self.DECODER}
            return MaskedAutoencoder(encoder, **decoder)


def decoder_state(mae: MaskedAutoencoder) -> dict[str, Tensor]:
    """The decoder's tensors under the names of facebookresearch/mae."""
    return {k: v for k, v in mae.state_dict().items() if not k.startswith("encoder.")}


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
            :func:`refiner.models.load.load_model`), 16 heads, and plain pixels, as in that
            repository's file for looking at.

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
    with fitting(name), torch.device("meta"):  # shapes are compared before anything is built
        mae = _described(card, decoder, decoder_heads, normalize_targets)
        state = {f"encoder.{k}": v for k, v in encoder.items()} | decoder
        check_shapes(mae.state_dict(), state, f"the weights of {name} are of another model")
    mae.load_state_dict(state, assign=True)
    mae.encoder.refiner_card = card
    return mae.eval()


def _described(
    card: dict, decoder: dict[str, Tensor], decoder_heads: int, normalize_targets: bool
) -> MaskedAutoencoder:
    """An autoencoder as a card says or, for a file that has none, as its weights and the caller."""
    if "recipe" in card:
        return settings_from(MAERecipe, card["recipe"]).build()
    return MaskedAutoencoder(
        build_vit(**card["architecture"]),
        decoder_dim=len(decoder["decoder_embed.weight"]),
        decoder_depth=len({k.split(".")[1] for k in decoder if k.startswith("decoder_blocks.")}),
        decoder_heads=decoder_heads,
        normalize_targets=normalize_targets,
    )


@torch.no_grad()
def reconstruct(
    mae: MaskedAutoencoder,
    images: Tensor,
    *,
    mask_ratio: float = 0.75,
    seed: int = 0,
    mask: Tensor | None = None,
) -> dict[str, Tensor]:
    """Hides patches and lets the autoencoder paint them.

    Where the model predicts normalised patches, mean and deviation of the true patch are put back
    to make a picture, as in the paper's figures.

    Args:
        mae: on any device.
        images: uint8 [B, C, H, W], on any device; the results lie beside them.
        mask: bool [B, N], equally many hidden in each image; default random by share and seed.

    Returns:
        ``original``, ``masked`` (hidden patches gray) and ``painted`` (hidden patches predicted),
        float [B, C, H, W] in 0..1; ``mask`` bool [B, N]; ``loss``, the mean squared error over
        hidden patches in the units of the target, a scalar.
    """
    images, card = torch.as_tensor(images), mae.encoder.refiner_card
    home, device = images.device, mae.mask_token.device
    x = preprocess(images.to(device), card)
    generator = torch.Generator().manual_seed(seed)  # the same masks on every device
    if mask is None:
        visible, mask = random_masking(len(x), mae.patches, mask_ratio, generator)
    else:
        visible = (~mask).nonzero()[:, 1].view(len(x), -1)
    loss, prediction = mae(x, visible.to(device), mask.to(device))
    _, mean, std = mae.targets(x)
    hidden = mask[:, :, None].to(device)
    true = patchify(x, mae.patch)
    pre, grid = card["preprocessing"], mae.encoder.patch_embed.grid_size
    scale, shift = (torch.tensor(pre[k])[:, None, None].to(x) for k in ("std", "mean"))

    def picture(patches: Tensor) -> Tensor:
        return (unpatchify(patches, mae.patch, grid) * scale + shift).clamp(0, 1).to(home)

    return {
        "original": picture(true),
        "masked": picture(torch.where(hidden, torch.zeros(()).to(x), true)),
        "painted": picture(torch.where(hidden, prediction * std + mean, true)),
        "mask": mask.to(home),
        "loss": loss.to(home),
    }
