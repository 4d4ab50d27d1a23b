"""BEiT's relative positions on other grids than a model was built for, and for some patches only.

timm's Beit adds a bias to the attention of two tokens that depends on their offset. Its table is
made for one grid; here it is resized as timm does, and indexed by the patches that are there.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from timm.layers import (
    gen_relative_position_index,
    resample_abs_pos_embed,
    resize_rel_pos_bias_table,
)
from timm.models.beit import Beit
from torch import Tensor, nn


def embed_beit(model: Beit, patches: Tensor, grid: tuple[int, int]) -> tuple[Tensor, dict]:
    """Tokens [B, T, D] from patches [B, N, D] of a grid, and what its blocks need to know."""
    own = tuple(model.patch_embed.grid_size)
    x_BTD = torch.cat([model.cls_token.expand(patches.shape[0], -1, -1), patches], dim=1)
    if model.pos_embed is not None:
        x_BTD = x_BTD + resample_abs_pos_embed(model.pos_embed, grid, own)
    x_BTD = model.pos_drop(x_BTD)
    if grid != own:
        return x_BTD, {"grid": grid, "kept_BK": None, "shared": model.rel_pos_bias}
    if model.rel_pos_bias is None:
        return x_BTD, {}
    return x_BTD, {"shared_rel_pos_bias": model.rel_pos_bias()}


def beit_block(
    block: nn.Module,
    x_BTD: Tensor,
    grid: tuple[int, int],
    kept_BK: Tensor | None,
    shared: nn.Module | None,
) -> Tensor:
    """timm's BEiT block with relative positions of another grid, or of some patches only."""
    sources = [s for s in (block.attn, shared) if s is not None and s.window_size]
    bias = sum(
        relative_bias(s.relative_position_bias_table, tuple(s.window_size), grid, kept_BK)
        for s in sources
    )
    attended = _biased_attention(block.attn, block.norm1(x_BTD), bias if sources else None)
    gamma1, gamma2 = (1 if g is None else g for g in (block.gamma_1, block.gamma_2))
    x_BTD = x_BTD + block.drop_path1(gamma1 * attended)
    return x_BTD + block.drop_path2(gamma2 * block.mlp(block.norm2(x_BTD)))


def _biased_attention(attn: nn.Module, x_BTD: Tensor, bias: Tensor | None) -> Tensor:
    b, t, _ = x_BTD.shape
    offset = None if attn.q_bias is None else torch.cat([attn.q_bias, attn.k_bias, attn.v_bias])
    qkv = F.linear(x_BTD, attn.qkv.weight, offset)
    q, k, v = qkv.reshape(b, t, 3, attn.num_heads, -1).permute(2, 0, 3, 1, 4)
    bias = None if bias is None else bias.to(q.dtype)
    x_BTD = F.scaled_dot_product_attention(q, k, v, attn_mask=bias).transpose(1, 2)
    return attn.proj_drop(attn.proj(x_BTD.reshape(b, t, -1)))


def relative_bias(
    table_RA: Tensor, window: tuple[int, int], grid: tuple[int, int], kept_BK: Tensor | None = None
) -> Tensor:
    """BEiT's attention bias for a grid other than the one its table was made for.

    Args:
        table_RA: one bias per offset of two patches and head, then three for the class token.
        window: the table's grid of patches (rows, columns).
        grid: the images' grid.
        kept_BK: which patches are there; None is all.

    Returns:
        [1, A, 1 + N, 1 + N], or [B, A, 1 + K, 1 + K] for kept patches; differentiable.
    """
    if window != grid:
        table_RA = _resizing(window, grid).to(table_RA) @ table_RA
    index = gen_relative_position_index(grid, class_token=True, device=table_RA.device)
    if kept_BK is None:
        return table_RA[index].permute(2, 0, 1)[None]
    token_BT = F.pad(kept_BK + 1, (1, 0))  # the class token is token 0
    return table_RA[index[token_BT[:, :, None], token_BT[:, None, :]]].permute(0, 3, 1, 2)


@lru_cache(maxsize=16)
def _resizing(window: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """timm's interpolation of a table as a matrix [new R, R]: it is linear in the values."""
    old, new = ((2 * h - 1) * (2 * w - 1) + 3 for h, w in (window, grid))
    return resize_rel_pos_bias_table(torch.eye(old), grid, (new, old), old_window_size=window)
