"""What can be painted from each block: one small MAE decoder on every frozen block.

The encoder sees the visible patches only and is never trained. Every decoder starts from the same
weights and sees the same images and masks, so that errors differ by what the blocks hold. After He
et al. 2022 (arXiv 2111.06377); MIM-Refiner (arXiv 2402.10093) compares the errors of blocks with
their k-NN accuracy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.tensors import step_generator, take
from refiner.images.sets import pixels_of
from refiner.models.encoders import (
    Encoder,
    block_numbers,
    borrowed,
    channels_of,
    check_refinable,
    prefix_tokens,
    preprocess,
    preprocessing_card,
    walk,
)
from refiner.models.mae import patchify, random_masking
from refiner.training.loop import Loop, Stage, autocast, shuffled
from refiner.training.pretraining import parameter_groups

WARMUP = 0.1  # share of the steps


class Decoder(nn.Module):
    """The decoder of MAE: mask tokens in the gaps, positions, transformer blocks, a linear map.

    Args:
        width: of the encoder's tokens, D.
        grid: rows and columns of patches.
        prefix: tokens before the patches.
        values: values of a patch, P.
        dim, depth, heads: of the decoder.
    """

    def __init__(
        self,
        width: int,
        grid: tuple[int, int],
        prefix: int,
        values: int,
        *,
        dim: int,
        depth: int,
        heads: int,
    ):
        super().__init__()
        self.prefix = prefix
        self.embed = nn.Linear(width, dim)
        self.mask_token = nn.Parameter(torch.randn(1, 1, dim) * 0.02)
        positions_NE = build_sincos2d_pos_embed(grid, dim, interleave_sin_cos=False)
        self.register_buffer("positions", positions_NE[None])
        self.blocks = nn.Sequential(*(Block(dim, heads, qkv_bias=True) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim, eps=1e-6)
        self.predict = nn.Linear(dim, values)

    def forward(self, tokens_BTD: Tensor, visible_BK: Tensor) -> Tensor:
        """Every patch [B, N, P] from a block's tokens."""
        # Blocks differ in scale; here, as nothing is learned, all decoders see the same one.
        x_BTE = self.embed(F.layer_norm(tokens_BTD, tokens_BTD.shape[-1:]))
        gaps_BNE = self.mask_token.to(x_BTE.dtype).expand(len(x_BTE), self.positions.shape[1], -1)
        where_BKE = visible_BK[:, :, None].expand(-1, -1, x_BTE.shape[2])
        filled_BNE = gaps_BNE.scatter(1, where_BKE, x_BTE[:, self.prefix :]) + self.positions
        x_BTE = torch.cat([x_BTE[:, : self.prefix], filled_BNE], dim=1)
        return self.predict(self.norm(self.blocks(x_BTE)))[:, self.prefix :]


@dataclass
class BlockDecoders:
    """What :func:`decode_blocks` returns.

    Attributes:
        blocks: the number of each of the L blocks, counted from 1.
        error: mean squared error over the hidden patches of the test images, float32 [L], in the
            units of the target.
        guess: that error when every patch is guessed to be the train images' mean patch.
        decoders: the L trained decoders.
        history: one dict a logged step: step, loss (a list of L), lr, seconds.
    """

    blocks: tuple[int, ...]
    error: Tensor
    guess: float
    decoders: nn.ModuleList
    history: list[dict] = field(default_factory=list)

    @property
    def relative_error(self) -> Tensor:
        """``error / guess``: 1 is as good as knowing nothing of the image, 0 is perfect."""
        return self.error / self.guess


@parallel.alone()
def decode_blocks(
    model: Encoder,
    train,
    test,
    *,
    blocks: Sequence[int] | None = None,
    steps: int = 200,
    batch: int = 32,
    lr: float = 4e-3,
    weight_decay: float = 0.05,
    decoder_dim: int = 32,
    decoder_depth: int = 1,
    decoder_heads: int = 2,
    mask_ratio: float = 0.75,
    normalize_targets: bool = False,
    log_every: int = 20,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> BlockDecoders:
    """Trains one small decoder on each frozen block, all in one loop, and measures their errors.

    Compare errors of the same images, masks and sizes only. A decoder that is small and briefly
    trained finds what a block offers *readily*; a larger one does more of the work itself.

    Args:
        model: a VisionTransformer, Beit or Eva; it is neither trained nor changed.
        train, test: ImageSets or uint8 [N, C, H, W]; labels are not used.
        blocks: which blocks, counted from 1, negative from the end; default all.
        steps, batch, lr, weight_decay: of AdamW (betas 0.9, 0.95), with warm-up and a cosine.
        decoder_dim, decoder_depth, decoder_heads: the size of each decoder; the width must be a
            multiple of 4 and of the heads.
        mask_ratio: share of hidden patches.
        normalize_targets: predict patches with mean 0 and deviation 1 each.
        log_every: steps averaged into one entry of the history.
        seed: of weights, batches and masks.
        device: default CUDA if there is one, else the model's device.
        progress: show a bar with the mean loss and the remaining time.

    Returns:
        A :class:`BlockDecoders`.

    Raises:
        ValueError: for fewer train images than a batch, no test images, widths that do not fit, a
            block that the model does not have, or a Hiera, whose blocks merge patches.
        FloatingPointError: when a loss is no longer finite.
    """
    check_refinable(model)
    train, test = (pixels_of(images) for images in (train, test))
    if len(train) < batch or not len(test):
        raise UserError(
            f"{len(train)} train and {len(test)} test images are too few: at least a batch of "
            f"{batch} and 1 are needed"
        )
    if decoder_dim % 4 or decoder_dim % decoder_heads:
        raise UserError(f"decoder_dim={decoder_dim} must be a multiple of 4 and of decoder_heads")
    if device is None and not torch.cuda.is_available():
        device = next(model.parameters()).device
    device = torch.device(device or "cuda")
    numbers = block_numbers(blocks, len(model.blocks))
    source = _Frozen(model, numbers, mask_ratio, normalize_targets, device)
    sizes = {"dim": decoder_dim, "depth": decoder_depth, "heads": decoder_heads}
    decoders = nn.ModuleList(source.decoder(seed, sizes) for _ in numbers).to(device)
    optimizer = torch.optim.AdamW(
        parameter_groups(decoders, weight_decay), lr=lr, betas=(0.9, 0.95), fused=True
    )
    batches = shuffled(train, batch, steps, device, seed)

    def step(number: int) -> tuple[None, dict[str, Tensor]]:
        """Leaves the gradients of one decoder after the other: none of them holds two graphs."""
        pixels, _ = batches.batch(number)
        problem = source.problem(pixels, step_generator(seed, number, device))
        optimizer.zero_grad(set_to_none=True)
        losses = [_backward(*pair) for pair in zip(decoders, problem, strict=True)]
        return None, {"loss": torch.stack(losses)}

    stage = Stage(steps, step, optimizer, peak=lr, warmup=int(WARMUP * steps))
    loop = Loop({"decoders": decoders}, {1: stage}, batches, device, log_every=log_every, mean=True)
    with borrowed(model, device), torch.enable_grad():
        loop.run("decoders", progress=progress)
    decoders.eval()
    error, guess = _measure(model, source, decoders, train, test, seed)
    return BlockDecoders(numbers, error, guess, decoders, loop.history)


@dataclass
class _Frozen:
    """The frozen encoder's side: tokens of the wanted blocks, and what to paint from them."""

    model: Encoder
    numbers: tuple[int, ...]
    mask_ratio: float
    normalize: bool
    device: torch.device

    def decoder(self, seed: int, sizes: dict) -> Decoder:
        """A fresh decoder; the same seed gives the same weights."""
        patch, grid = self.model.patch_embed.patch_size[0], self.model.patch_embed.grid_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            values, prefix = patch**2 * channels_of(self.model), prefix_tokens(self.model)
            return Decoder(self.model.num_features, tuple(grid), prefix, values, **sizes)

    def target(self, x: Tensor) -> Tensor:
        """What is painted, [B, N, P]."""
        patches = patchify(x, self.model.patch_embed.patch_size[0])
        if self.normalize:
            deviation = (patches.var(dim=2, keepdim=True) + 1e-6).sqrt()
            patches = (patches - patches.mean(dim=2, keepdim=True)) / deviation
        return patches

    def problem(self, pixels: Tensor, generator: torch.Generator) -> list[tuple]:
        """For each wanted block: tokens [B, T, D], visible, mask, target."""
        x = preprocess(pixels, preprocessing_card(self.model))
        target_BNP = self.target(x)
        visible, mask = random_masking(
            len(x), target_BNP.shape[1], self.mask_ratio, generator, x.device
        )
        with torch.no_grad(), autocast(self.device):
            top = max(self.numbers)
            steps = walk(self.model, x, kept_BK=visible, top=top)
            kept = {number: tokens for number, tokens in steps if number in self.numbers}
        return [(kept[number], visible, mask, target_BNP) for number in self.numbers]


def _loss(decoder: Decoder, problem: tuple) -> Tensor:
    tokens_BTD, visible_BK, mask_BN, target_BNP = problem
    with autocast(tokens_BTD.device):
        painted_BNP = decoder(tokens_BTD, visible_BK)
    error_BN = (painted_BNP.float() - target_BNP).square().mean(dim=2)
    return (error_BN * mask_BN).sum() / mask_BN.sum()


def _backward(decoder: Decoder, problem: tuple) -> Tensor:
    """One block at a time: decoders share nothing, so a single graph has to be held."""
    loss = _loss(decoder, problem)
    loss.backward()
    return loss.detach()


@torch.no_grad()
def _measure(model, source: _Frozen, decoders, train, test, seed: int) -> tuple[Tensor, float]:
    """Errors of the decoders and of the mean patch on the test images, each with one mask."""
    card, step, device = preprocessing_card(model), 256, source.device
    some = preprocess(take(train, torch.arange(min(1024, len(train))), device), card)
    mean_P = source.target(some).mean(dim=(0, 1))
    generator = step_generator(seed, -1 % 2**32, device)  # masks that no training step has
    total_L, guess, n = torch.zeros(len(decoders), device=device), 0.0, 0
    with borrowed(model, device):
        for start in range(0, len(test), step):
            pixels = take(test, torch.arange(start, min(start + step, len(test))), device)
            problems = source.problem(pixels, generator)
            losses = [_loss(*pair) for pair in zip(decoders, problems, strict=True)]
            total_L += torch.stack(losses) * len(pixels)
            _, _, mask_BN, target_BNP = problems[0]
            error_BN = (target_BNP - mean_P).square().mean(dim=2)
            guess += float((error_BN * mask_BN).sum() / mask_BN.sum()) * len(pixels)
            n += len(pixels)
    return total_L.cpu() / n, guess / n
