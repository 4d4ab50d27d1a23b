"""Where patches lie: the positions of a checkpoint, and the grid that they are for."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import as_size, sides


def grid_of(
    positions: Tensor, details: Mapping, kind: str, told: list, patch: int, name: str
) -> tuple[int, int]:
    """Rows and columns of the patches that the positions are for.

    As told, as they lie, as their sines and cosines say, or a square.
    """
    if positions.ndim == 4:
        return tuple(positions.shape[1:3])
    if positions.ndim != 3:
        raise UserError(f"{name}: pos_embed is {list(positions.shape)}, expected [1, N, D]")
    n, cls = positions.shape[1], int(details["class_token"])
    choices = [0] if kind in ("data2vec 2.0", "MIM-Refiner") else [cls + details["registers"], cls]
    counts = [n - prefix for prefix in choices if n > prefix]  # of patches
    grids = [(height // patch, width // patch) for height, width in told]
    if fit := [grid for grid in grids if grid[0] * grid[1] in counts]:
        return fit[0]
    for count in counts:
        side, some = math.isqrt(count), positions[0, n - count :].float()
        shorter = [rows for rows in range(side, 0, -1) if count % rows == 0]
        grids = [g for rows in shorter for g in ((rows, count // rows), (count // rows, rows))]
        comparable = some.shape[1] % 4 == 0 and not some.is_meta
        for grid in grids if comparable else ():
            if torch.allclose(some, sincos_positions(grid, some.shape[1], 0)[0], atol=1e-3):
                return grid
        if side**2 == count:
            return side, side
    raise UserError(
        f"{name}: its {n} positions are no grid that is known; say the height and width of its "
        f"images, as in load_model(path, size=({patch * 2}, {patch * 8}))"
    )


def sincos_positions(grid: tuple[int, int], dim: int, prefix: int, *, gsd: float = 1.0) -> Tensor:
    """MAE's fixed 2-D sine-cosine positions, [1, prefix + N, dim]; zero for prefix tokens.

    The order of channels is that of facebookresearch/mae (sines and cosines of the column, then of
    the row), so that its files without positions can be completed; timm's own order is another.

    Args:
        grid: rows and columns of patches.
        dim: width of the model; 4 divides it.
        prefix: how many tokens come before the patches.
        gsd: what the numbers of rows and columns are multiplied with (Scale-MAE, arXiv 2212.14532).
    """
    rates = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angles = [torch.arange(n)[:, None] * gsd * rates for n in grid]  # [n, dim / 4] each
    rows, columns = (torch.cat([angle.sin(), angle.cos()], dim=1) for angle in angles)
    pairs = [columns.repeat(grid[0], 1), rows.repeat_interleave(grid[1], dim=0)]
    return F.pad(torch.cat(pairs, dim=1).float(), (0, 0, prefix, 0))[None]


def with_positions(state: dict, architecture: Mapping, name: str) -> dict:
    """Positions [1, prefix + N, D] with a row for every prefix token."""
    rows, columns = (side // architecture["patch"] for side in sides(architecture["size"]))
    prefix = int(architecture.get("class_token", True)) + architecture.get("registers", 0)
    if "pos_embed" not in state:
        dim = architecture["dim"]
        return state | {"pos_embed": sincos_positions((rows, columns), dim, prefix)}
    positions = state["pos_embed"].flatten(1, -2)  # MIM-Refiner's are [1, rows, columns, D]
    # Rows of the class token, and maybe of the registers.
    have = positions.shape[1] - rows * columns
    if have < prefix:
        gap = positions.new_zeros(*positions.shape[:1], prefix - have, positions.shape[2])
        positions = torch.cat([positions[:, :have], gap, positions[:, have:]], dim=1)
    return state | {"pos_embed": positions}


def at_distance(
    state: dict, architecture: dict, gsd: float, asked: tuple[int, int] | None, name: str
) -> tuple[dict, dict]:
    """Scale-MAE's positions for one ground sample distance, and the architecture they are for.

    Its encoder multiplies rows and columns with the images' distance whenever it runs; a model that
    is made for one distance has the products as its positions.

    Args:
        state: a checkpoint with positions for a distance of 1.
        architecture: of the model.
        gsd: ground sample distance of the images as the model gets them.
        asked: height and width of the images; default those of the file.

    Raises:
        UserError: for positions that are no sines and cosines, or a distance that is none.
    """
    if not (isinstance(gsd, int | float) and 0 < gsd < math.inf):
        raise UserError(f"gsd={gsd!r} is no ground sample distance; give a number above 0")
    patch, dim = architecture["patch"], architecture["dim"]
    positions = state["pos_embed"]
    grid, wanted = (
        tuple(side // patch for side in sides(size))
        for size in (architecture["size"], asked or architecture["size"])
    )
    prefix = positions.shape[1] - grid[0] * grid[1]
    fixed = dim % 4 == 0 and (
        positions.is_meta
        or torch.allclose(positions.float(), sincos_positions(grid, dim, prefix), atol=1e-3)
    )
    if not fixed:
        raise UserError(
            f"{name} has positions of its own, which no distance changes; gsd is for Scale-MAE's"
        )
    state = state | {"pos_embed": sincos_positions(wanted, dim, prefix, gsd=gsd)}
    return state, architecture | {"size": as_size(*(side * patch for side in wanted))}
