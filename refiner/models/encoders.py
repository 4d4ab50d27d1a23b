"""Encoders of several classes behind one interface: tokens in, one block at a time.

timm's masked-image models are VisionTransformer (MAE, I-JEPA, BEiT-3, …), Beit (relative
positions), Eva (rotary positions) and Hiera (stages of growing width). :func:`embed` makes the
tokens of the first block, :func:`run_block` applies a block, whatever the class, and :func:`walk`
goes through them all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import Attention, Format
from timm.models.beit import Beit
from timm.models.eva import Eva
from timm.models.hiera import Hiera
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from refiner.base.errors import UserError
from refiner.base.tensors import as_size, constant, sides
from refiner.models.beit import beit_block, embed_beit

Encoder = VisionTransformer | Beit | Eva | Hiera
EPSILON = 1e-6  # of timm's layer norms, and of MAE's
SUPPORTED = "VisionTransformer, Beit (BEiT, BEiT v2), Eva (EVA-02) and, for probing only, Hiera"

# Of other classes, by their names' beginnings, what does similar work and is supported.
NEAREST = {
    "resnet": "vit_small_patch16_224.dino",
    "convnext": "vit_small_patch16_dinov3.lvd1689m",
    "swin": "hiera_base_224.mae",
    "naflex": "vit_base_patch16_siglip_224.v2_webli",
}


class PostNormBlock(Block):
    """A transformer block with its norms behind the additions (data2vec 2.0, arXiv 2212.07525).

    ``x = norm1(x + attn(x)); x = norm2(x + mlp(x))``. Parameter names are those of timm's Block.
    """

    def forward(self, x_BTD: Tensor) -> Tensor:
        x_BTD = self.norm1(x_BTD + self.drop_path1(self.ls1(self.attn(x_BTD))))
        return self.norm2(x_BTD + self.drop_path2(self.ls2(self.mlp(x_BTD))))


# ---------------------------------------------------------------- plain ViTs


def timm_arguments(
    *,
    size: int | tuple[int, int],
    patch: int,
    dim: int,
    depth: int,
    heads: int,
    channels: int = 3,
    mlp: int | None = None,
    class_token: bool = True,
    registers: int = 0,
    qkv_bias: bool = True,
    layer_scale: bool = False,
    final_norm: bool = True,
    fc_norm: bool = False,
) -> dict:
    """timm's arguments for a ViT described in our words; plain JSON types.

    Args:
        size: height and width of the images, pixels; a number for squares.
        patch: height and width of a patch, pixels.
        dim, depth, heads: width, blocks, attention heads a block.
        channels: of the images.
        mlp: hidden width of the blocks' perceptrons; default four times ``dim``.
        class_token, registers: the prefix tokens, in this order. Each has a row in the positions.
        qkv_bias: whether queries, keys and values have biases.
        layer_scale: whether each block's two additions are scaled by channel.
        final_norm: whether there is a norm after the last block.
        fc_norm: whether that norm is behind the mean of the patches, as in fine-tuned MAEs.
    """
    ratio = 4.0 if mlp in (None, 4 * dim) else (mlp + 0.5) / dim  # timm rounds down
    return {
        "img_size": size,
        "patch_size": patch,
        "embed_dim": dim,
        "depth": depth,
        "num_heads": heads,
        "mlp_ratio": ratio,
        "class_token": class_token,
        "global_pool": "token" if class_token and not fc_norm else "avg",
        "fc_norm": fc_norm,
        "reg_tokens": registers,
        "qkv_bias": qkv_bias,
        "init_values": 1e-5 if layer_scale else None,
        "final_norm": final_norm,
    } | ({} if channels == 3 else {"in_chans": channels})


def plain_vit(*, post_norm: bool = False, eps: float = EPSILON, **description) -> VisionTransformer:
    """A VisionTransformer without head, with timm's initial weights (none on the meta device).

    Args:
        post_norm: data2vec 2.0's architecture: a norm after the embedding (``norm_pre``), blocks of
            :class:`PostNormBlock`, no norm after them.
        eps: of the norms, below their variance.
        **description: see :func:`timm_arguments`.
    """
    shapes_only = torch.get_default_device().type == "meta"
    options = {"num_classes": 0, "weight_init": "skip" if shapes_only else ""}
    if not post_norm:
        return with_epsilon(VisionTransformer(**timm_arguments(**description), **options), eps)
    arguments = timm_arguments(**description | {"final_norm": False})
    model = VisionTransformer(**arguments, **options, block_fn=PostNormBlock)
    # timm's own pre_norm would take the bias from the patch embedding.
    model.norm_pre = type(model.blocks[0].norm1)(model.embed_dim)
    return with_epsilon(model, eps)


def with_epsilon(model: nn.Module, eps: float | None) -> nn.Module:
    """The same model, with this epsilon in all its layer norms; None leaves what they have."""
    for module in model.modules():
        if eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = eps
    return model


# ---------------------------------------------------------------- what a model is


def check_supported(model: nn.Module, name: str) -> None:
    """Refuses a model that cannot be run block by block.

    Raises:
        ValueError: saying what is supported.
    """
    kind = type(model).__name__
    if isinstance(_inside(model), nn.Module):
        raise UserError(f"{name} is in a {kind}: give what it holds, ._orig_mod or .module")
    if not isinstance(model, Encoder) or getattr(model, "rope_mixed", False):
        raise UserError(f"{name} is a {kind}; supported are {SUPPORTED}{nearest_to(kind)}")


def nearest_to(kind: str) -> str:
    """The end of a sentence that names a model which would work instead, if one is known."""
    found = (name for word, name in NEAREST.items() if kind.lower().startswith(word))
    return next((f"; the nearest of them is {name!r}" for name in found), "")


def _inside(model: nn.Module) -> object:
    """What torch.compile, DataParallel or another wrapper holds."""
    return getattr(model, "_orig_mod", None) or getattr(model, "module", None)


def encoder_of(model: nn.Module) -> Encoder:
    """The model itself, where torch.compile, DataParallel or another wrapper holds it.

    Raises:
        ValueError: as :func:`check_supported`.
    """
    if isinstance(inside := _inside(model), nn.Module):
        return encoder_of(inside)
    check_supported(model, "the model")
    return model


def check_refinable(model: Encoder) -> None:
    """Refuses a model that can be probed but not refined.

    Raises:
        ValueError: saying why.
    """
    check_supported(model, "the model")
    if isinstance(model, Hiera):
        raise UserError(
            "Hiera can be probed but not refined: its blocks have different widths and its tokens "
            "no fixed place; choose a model of the classes VisionTransformer, Beit or Eva"
        )


def has_class_token(model: Encoder) -> bool:
    """Whether the first token is a class token."""
    return getattr(model, "cls_token", None) is not None


def prefix_tokens(model: Encoder) -> int:
    """How many tokens stand before the patches."""
    return getattr(model, "num_prefix_tokens", 0)


def channels_of(model: Encoder) -> int:
    """Channels of the images that a model takes."""
    return model.patch_embed.proj.weight.shape[1]


def patch_count(model: Encoder) -> int:
    """Patches of an image of the model's own size."""
    if isinstance(model, Hiera):
        rows, columns = model.tokens_spatial_shape
        return rows * columns
    return model.patch_embed.num_patches


def final_pooling(model: Encoder) -> str:
    """What the final norm is made for: "cls", or "patch" for the mean of the patches."""
    return "cls" if has_class_token(model) and model.global_pool != "avg" else "patch"


def allow_any_size(model: Encoder) -> Encoder:
    """Lets a model take other image sizes by interpolating its positions; returns the model.

    Raises:
        ValueError: for a Hiera, and for an Eva with rotary positions that were computed for one
            size (load_model's are not).
    """
    check_refinable(model)
    patch = model.patch_embed
    patch.strict_img_size = False
    if isinstance(model, Beit):
        return model  # its relative positions are interpolated in run_block
    if isinstance(model, Eva) and model.rope is not None and not model.dynamic_img_size:
        raise UserError("an Eva takes other sizes only if created with dynamic_img_size=True")
    model.dynamic_img_size = True
    patch.flatten, patch.output_fmt = False, Format.NHWC
    return model


# ---------------------------------------------------------------- block by block


def walk(
    model: Encoder,
    images: Tensor,
    *,
    top: int | None = None,
    kept_BK: Tensor | None = None,
    gaps: tuple[Tensor, Tensor] | None = None,
    known: tuple[int, Tensor] | None = None,
    frozen: int = 0,
    recompute: bool = False,
    class_token_only: bool = False,
) -> Iterator[tuple[int, Tensor]]:
    """The tokens after each block in turn: ``for number, x_BTD in walk(model, images)``.

    Number 0 comes first, with the tokens that enter block 1, or what is known. Nothing is kept on
    the way: a block's tokens are freed when the next ones are there, unless the caller or a
    gradient needs them.

    Args:
        model: an encoder, whatever its class.
        images: normalised [B, C, H, W].
        top: the last block to run, counted from 1; default the model's last.
        kept_BK: int64 [B, K], the patches that stay; None keeps all.
        gaps: a mask [B, N], True where a patch is hidden, and the token [1, 1, D] in its place.
        known: a block's number and the tokens [B, T, D] after it; the blocks up to it do not run.
        frozen: the embedding and this many blocks run without gradient; with 0, nothing does.
        recompute: run the other blocks again in the backward pass instead of storing activations.
        class_token_only: of the top block only the first token will be read, so that it may be the
            only one that is given, [B, 1, D] (:func:`class_token_of`).
    """
    with torch.no_grad() if frozen else nullcontext():
        x_BTD, context = embed(model, images, gaps)
        if kept_BK is not None:
            x_BTD, context = keep_patches(model, x_BTD, context, kept_BK)
    first, x_BTD = known or (0, x_BTD)
    yield first, x_BTD
    top = len(model.blocks) if top is None else top
    for number, block in enumerate(model.blocks[first:top], start=first + 1):
        run = class_token_of if class_token_only and number == top else run_block
        # The context ends before the tokens are handed out: the caller's gradients are his own.
        with torch.no_grad() if number <= frozen else nullcontext():
            if recompute and number > frozen and torch.is_grad_enabled():
                x_BTD = checkpoint(run, block, x_BTD, context, use_reentrant=False)
            else:
                x_BTD = run(block, x_BTD, context)
        yield number, x_BTD


def last_tokens(model: Encoder, images: Tensor, **how) -> Tensor:
    """The tokens at the end of a :func:`walk`, which ``how`` is for; before the final norm."""
    return deque(walk(model, images, **how), maxlen=1)[0][1]


def embed(
    model: Encoder, images: Tensor, gaps: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, dict]:
    """The tokens that enter the first block.

    Args:
        images: normalised [B, C, H, W].
        gaps: see :func:`walk`.

    Returns:
        Tokens [B, T, D], and what the blocks need besides them, for :func:`run_block`.
    """
    x = model.patch_embed(images)
    if gaps is not None:
        mask_BN, gap_11D = gaps
        x = torch.where(mask_BN.view(*x.shape[:-1], 1), gap_11D.to(x.dtype), x)
    if isinstance(model, VisionTransformer):
        return model.norm_pre(model.patch_drop(model._pos_embed(x))), {}
    if isinstance(model, Eva):
        x_BTD, rope = model._pos_embed(x)
        return model.norm_pre(x_BTD), {} if rope is None else {"rope": rope}
    if isinstance(model, Hiera):
        return model.unroll(model._pos_embed(x)), {}
    return embed_beit(model, x, _grid(model, images))


def run_block(block: nn.Module, x_BTD: Tensor, context: dict) -> Tensor:
    """One block's output, [B, T, D]; ``context`` is that of :func:`embed`."""
    if "grid" in context:
        return beit_block(block, x_BTD, **context)
    return block(x_BTD, **context)


def class_token_of(block: nn.Module, x_BTD: Tensor, context: dict) -> Tensor:
    """A block's output for its first token, where no other is read afterwards.

    A plain block asks, adds and multiplies for that token alone, 10 of its 12 D² multiplications a
    token less; in the others everything runs.

    Returns:
        [B, 1, D], or [B, T, D] where everything ran.
    """
    attn = getattr(block, "attn", None)
    plain = type(block) in (Block, PostNormBlock) and type(attn) is Attention and attn.gate is None
    if not plain or context:
        return run_block(block, x_BTD, context)
    first_B1D = x_BTD[:, :1]
    if isinstance(block, PostNormBlock):
        first_B1D = block.norm1(first_B1D + block.drop_path1(block.ls1(_ask_first(attn, x_BTD))))
        return block.norm2(first_B1D + block.drop_path2(block.ls2(block.mlp(first_B1D))))
    attended = _ask_first(attn, block.norm1(x_BTD))
    first_B1D = first_B1D + block.drop_path1(block.ls1(attended))
    return first_B1D + block.drop_path2(block.ls2(block.mlp(block.norm2(first_B1D))))


def _ask_first(attn: Attention, x_BTD: Tensor) -> Tensor:
    """Attention of the first token to all, [B, 1, D]."""
    b, t, _ = x_BTD.shape
    d, bias = attn.attn_dim, attn.qkv.bias
    q_bias, kv_bias = (None, None) if bias is None else (bias[:d], bias[d:])
    q = F.linear(x_BTD[:, :1], attn.qkv.weight[:d], q_bias)
    kv = F.linear(x_BTD, attn.qkv.weight[d:], kv_bias)
    q = attn.q_norm(q.reshape(b, 1, attn.num_heads, -1).transpose(1, 2))
    k, v = kv.reshape(b, t, 2, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    drop = attn.attn_drop.p if attn.training else 0.0
    x_B1D = F.scaled_dot_product_attention(q, attn.k_norm(k), v, dropout_p=drop)
    return attn.proj_drop(attn.proj(attn.norm(x_B1D.transpose(1, 2).flatten(2))))


def keep_patches(
    model: Encoder, x_BTD: Tensor, context: dict, kept_BK: Tensor
) -> tuple[Tensor, dict]:
    """Drops patches before the first block.

    Args:
        x_BTD, context: of :func:`embed`.
        kept_BK: int64 [B, K], which of the N patches stay, on the tokens' device.

    Returns:
        Tokens [B, T, D], T prefix tokens and kept patches, and the context that goes with them.
    """
    prefix = prefix_tokens(model)
    patches = x_BTD[:, prefix:].gather(1, kept_BK[:, :, None].expand(-1, -1, x_BTD.shape[2]))
    x_BTD = torch.cat([x_BTD[:, :prefix], patches], dim=1)
    if "rope" in context:  # [N, 2 * D / A] for every image → [B, 1, K, …]
        context = {"rope": context["rope"][kept_BK][:, None]}
    if isinstance(model, Beit):
        grid = context.get("grid", tuple(model.patch_embed.grid_size))
        context = {"grid": grid, "kept_BK": kept_BK, "shared": model.rel_pos_bias}
    return x_BTD, context


def pool(model: Encoder, x_BTD: Tensor, pooling: str) -> Tensor:
    """Class token ("cls"), mean of the patch tokens ("patch") or of "registers", [B, D]."""
    if pooling == "registers":
        return x_BTD[:, has_class_token(model) : prefix_tokens(model)].mean(1)
    return x_BTD[:, 0] if pooling == "cls" else x_BTD[:, prefix_tokens(model) :].mean(1)


def final_features(model: Encoder, x_BTD: Tensor, pooling: str) -> Tensor:
    """Pooled output of the last block after the model's final norm, [B, D].

    Models made for mean pooling have that norm behind the pooling, under another name.
    """
    if isinstance(model, Hiera):
        return model.forward_head(x_BTD, pre_logits=True)
    return model.fc_norm(pool(model, model.norm(x_BTD), pooling))


def _grid(model: Encoder, images: Tensor) -> tuple[int, int]:
    patch = model.patch_embed.patch_size
    return images.shape[-2] // patch[0], images.shape[-1] // patch[1]


TOKENS_A_BATCH = {"cpu": 2**13, "cuda": 2**17}  # on a CPU, larger batches are no faster


# ---------------------------------------------------------------- preprocessing


def preprocess(images: Tensor, card: dict) -> Tensor:
    """Turns pixels into a model's input, on the images' own device.

    Args:
        images: uint8 [B, C, H, W], values 0 to 255.
        card: a model's ``refiner_card``; its "preprocessing" holds "size" (pixels, or height
            and width), "mean" and "std" (of brightness 0 to 1, one for each of the C channels),
            "interpolation" ("bicubic" or "bilinear") and, optional, "crop_pct", the share of the
            shorter side that is kept.

    Returns:
        Normalised [B, C, S, S], or [B, C, *size]. If the size differs, images are cropped to the
        largest part in their middle of that shape (its middle ``crop_pct``) and resized with
        antialiasing.

    Raises:
        ValueError: for anything but uint8 [B, C, H, W].
    """
    kind, shape = getattr(images, "dtype", type(images).__name__), getattr(images, "shape", ())
    if kind != torch.uint8 or len(shape) != 4:
        raise UserError(f"preprocess takes uint8 images [B, C, H, W], not {kind} {list(shape)}")
    return prepared(images.float() / 255, card)


def prepared(x_BCHW: Tensor, card: dict) -> Tensor:
    """Brightness from 0 to 1, [B, C, H, W], as a model's input; see :func:`preprocess`."""
    how, x = card["preprocessing"], x_BCHW
    (height, width), (h, w) = sides(how["size"]), x.shape[2:]
    if (h, w) != (height, width):
        rows = min(h, w * height / width) * how.get("crop_pct", 1.0)
        rows, columns = max(1, round(rows)), max(1, round(rows * width / height))
        top, left = (h - rows) // 2, (w - columns) // 2
        x = x[:, :, top : top + rows, left : left + columns]
        mode = how.get("interpolation", "bicubic")
        x = F.interpolate(x, (height, width), mode=mode, antialias=True, align_corners=False)
        x = x.clamp(0, 1)  # bicubic overshoots at edges
    return normalize(x, card)


def check_channels(x_BCHW: Tensor, card: dict) -> None:
    """Refuses images of other channels than the model has.

    Raises:
        ValueError: saying how to go on.
    """
    own, given = len(card["preprocessing"]["mean"]), x_BCHW.shape[1]
    if own != given:
        raise UserError(
            f"the model takes images of {own} channels, and these have {given}: "
            "refiner.fit_channels(model, images) adapts the model, x[:, [3, 2, 1]] chooses among "
            "channels, and load_images(folder, channels=1) reads pictures as gray"
        )


def normalize(x_BCHW: Tensor, card: dict) -> Tensor:
    """Brightness from 0 to 1, less a card's mean and by its deviation, channel by channel."""
    check_channels(x_BCHW, card)  # one channel would be spread over three, and not be noticed
    how, device, dtype = card["preprocessing"], x_BCHW.device, x_BCHW.dtype
    mean, std = (constant(tuple(how[key]), device, dtype)[:, None, None] for key in ("mean", "std"))
    return (x_BCHW - mean) / std


def channel_statistics(channels: int, mean=None, std=None) -> dict:
    """Mean and deviation of each channel for a card; ImageNet's, where none are told.

    Where there is not one for each channel, they are assumed, and the card says so.
    """
    mean, std = mean or IMAGENET_DEFAULT_MEAN, std or IMAGENET_DEFAULT_STD
    if len(mean) == len(std) == channels:
        return {"mean": list(mean), "std": list(std)}
    return {"mean": [0.5] * channels, "std": [0.25] * channels, "assumed": True}


def preprocessing_card(model: Encoder) -> dict:
    """The model's ``refiner_card``, or what timm knows about a model that has none.

    Returns:
        A dict with the key "preprocessing", see :func:`preprocess`. Where timm says nothing
        either, ImageNet's mean and deviation and the size that the model was built for.
    """
    card = getattr(model, "refiner_card", None)
    if card and "preprocessing" in card:
        return card
    known = getattr(model, "pretrained_cfg", None) or {}
    known = known if isinstance(known, dict) else known.to_dict()
    built_for = getattr(model.patch_embed, "img_size", None)
    how = {
        "size": as_size(*(built_for or known["input_size"][1:])),
        **channel_statistics(channels_of(model), known.get("mean"), known.get("std")),
        "interpolation": known.get("interpolation") or "bicubic",
    }
    if known.get("crop_pct"):
        how["crop_pct"] = known["crop_pct"]
    return {"preprocessing": how}


def block_numbers(blocks: Sequence[int] | None, depth: int) -> tuple[int, ...]:
    """The blocks asked for, from 1; None is every block of the model.

    Raises:
        ValueError: for blocks that the model does not have.
    """
    if blocks is None:
        return tuple(range(1, depth + 1))
    numbers = tuple(int(b) + depth + 1 if b < 0 else int(b) for b in blocks)
    if not numbers or not all(1 <= number <= depth for number in numbers):
        raise UserError(
            f"blocks count from 1: choose among 1 to {depth} (or -{depth} to -1, from the end), "
            f"not {blocks}"
        )
    return numbers


def default_batch(model: Encoder, device: torch.device) -> int:
    """As many images as keep the tokens of a pass within the device's budget."""
    tokens = patch_count(model) + prefix_tokens(model)
    budget = TOKENS_A_BATCH.get(device.type, TOKENS_A_BATCH["cpu"])
    return min(1024, max(1, budget // tokens))


@contextmanager
def borrowed(model: Encoder, device: torch.device) -> Iterator[None]:
    """Eval mode on a device without gradients; afterwards every module is as it was."""
    modes = {module: module.training for module in model.modules()}
    home = next(model.parameters()).device
    try:
        model.eval()
        if home != device:
            model.to(device)
        # Not inference_mode: its tensors could not be used to train a probe.
        with torch.no_grad():
            yield
    finally:
        if home != device:
            model.to(home)
        for module, training in modes.items():
            module.training = training


# ---------------------------------------------------------------- features of the views


def head_features(
    model: Encoder,
    x_BCHW: Tensor,
    blocks: tuple[int, ...],
    *,
    pooling: str | tuple[str, ...] = "cls",
    **how,
) -> Tensor:
    """Pooled output of the chosen blocks, [L, B, D], in one pass.

    Args:
        model: an encoder that takes any size (:func:`allow_any_size`).
        x_BCHW: normalised views of one size.
        blocks: counted from 1, ascending; the last block's is read after the final norm.
        pooling: "cls" or "patch", or one for each of ``blocks``.
        **how: ``kept_BK``, ``frozen`` and ``recompute`` of :func:`walk`.
    """
    depth = len(model.blocks)
    numbers = block_numbers(blocks, depth)
    poolings = [pooling] * len(numbers) if isinstance(pooling, str) else pooling
    reads = dict(zip(numbers, poolings, strict=True))
    top, pooled = max(numbers), []
    how |= {"top": top, "class_token_only": reads[top] == "cls"}
    for number, x_BTD in walk(model, x_BCHW, **how):
        if number in reads:
            take_out = final_features if number == depth else pool
            pooled.append(take_out(model, x_BTD, reads[number]))
    return torch.stack(pooled)


def freeze_first(model: Encoder, blocks: int) -> None:
    """Takes the embedding and the first ``blocks`` blocks out of training; 0 freezes nothing."""
    model.requires_grad_(True)
    if blocks:
        for part in (model.patch_embed, *model.blocks[:blocks]):
            part.requires_grad_(False)
        for name in ("cls_token", "pos_embed", "reg_token"):
            if getattr(model, name, None) is not None:
                getattr(model, name).requires_grad_(False)
