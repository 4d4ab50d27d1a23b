"""One step of a refinement: views → blocks → heads → neighbors → NNA loss.

Alkin et al. 2025, arXiv 2402.10093. The loss, the heads and the queue are in
:mod:`refiner.training.heads`, the stages that take the steps in :mod:`refiner.training.refining`.
"""

from __future__ import annotations

import math
from contextlib import nullcontext
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner.base import parallel
from refiner.base.tensors import draw
from refiner.images.views import make_views
from refiner.models.encoders import Encoder, head_features, normalize
from refiner.training.groups import barred
from refiner.training.heads import IDHeads, NeighborQueue, nna_loss
from refiner.training.recipe import Recipe


def draw_patches(
    views: int, batch: int, patches: int, keep: float, generator=None, rows=None
) -> Tensor:
    """Random patches that stay, int64 [views * B, K], other ones for each view and sample."""
    first, total = rows or (0, batch)
    chance_VBN = draw(views, total, patches, generator=generator)[:, first : first + batch]
    kept = max(1, round(patches * keep))
    return chance_VBN.flatten(0, 1).argsort(dim=1)[:, :kept]


def view_features(
    model: Encoder,
    views: list[Tensor],
    recipe: Recipe,
    *,
    frozen_blocks: int,
    generator: torch.Generator | None = None,
    rows: tuple[int, int] | None = None,
) -> Tensor:
    """Features of all views, [L, V, B, D]; views of one size share a forward pass."""
    groups: dict[tuple[int, float], list[int]] = {}
    for position, spec in enumerate(recipe.views):
        groups.setdefault((spec.size, spec.keep), []).append(position)
    features: list[Tensor] = [torch.empty(0)] * len(views)
    for (_, keep), members in groups.items():
        batch = torch.cat([views[m] for m in members])
        kept_BK = None
        if keep < 1:
            patches = recipe.views[members[0]].pixels // model.patch_embed.patch_size[0] ** 2
            kept_BK = draw_patches(len(members), len(views[0]), patches, keep, generator, rows)
            kept_BK = kept_BK.to(batch.device)
        how = {"kept_BK": kept_BK, "frozen": frozen_blocks, "recompute": recipe.checkpoint}
        out_LMD = head_features(model, batch, recipe.blocks, pooling=recipe.pooling, **how)
        for member, chunk in zip(members, out_LMD.chunk(len(members), dim=1), strict=True):
            features[member] = chunk
    return torch.stack(features, dim=1)


# ---------------------------------------------------------------- one step


@dataclass
class Step:
    """Loss and observations of one step: all [L] tensors on the device.

    Attributes:
        loss: NNA loss of this process's samples.
        similarity: mean cosine similarity of the neighbors.
        neighbor_accuracy: share of neighbors with their query's label; None without labels.
        age: how many steps ago the neighbors entered the queue, in the mean.
        spread: standard deviation of the normalised projections over samples, times √O: 1 when
            they point everywhere, 0 when all are the same.
    """

    loss: Tensor
    similarity: Tensor
    neighbor_accuracy: Tensor | None
    age: Tensor
    spread: Tensor


def batch_features(
    model, pixels: Tensor, recipe: Recipe, *, stage: int, total: int, generator: torch.Generator
) -> Tensor:
    """Pooled features of the views of one batch, [L, V, b, D].

    Args:
        pixels: uint8 [b, C, H, W] on the device; with several processes, this one's rows.
        stage: 2 keeps the encoder out of the graph.
        total: images of the whole batch.
        generator: of views and dropped patches.
    """
    rows = parallel.rows(total)[0], total
    views = make_views(pixels, recipe.views, generator, rows=rows)
    views = [normalize(view, model.refiner_card) for view in views]
    frozen = recipe.frozen_blocks if stage == 3 else len(model.blocks)
    how = {"frozen_blocks": frozen, "generator": generator, "rows": rows}
    with torch.no_grad() if stage == 2 else nullcontext():
        return view_features(model, views, recipe, **how)


def refine_step(
    model,
    heads: IDHeads,
    queue: NeighborQueue,
    pixels: Tensor | None,
    ids: Tensor,
    recipe: Recipe,
    *,
    stage: int,
    swap_chance: float,
    generator: torch.Generator,
    labels: Tensor | None = None,
    groups: Tensor | None = None,
    features: Tensor | None = None,
) -> Step:
    """Views → features → heads → neighbors → NNA loss of one batch; fills the queue.

    With several processes each hands in its rows of the batch and the ids of the whole one. The
    batch's loss is the mean of the processes' losses, its gradient the mean of their gradients.

    Args:
        pixels: uint8 [b, C, H, W] on the device.
        ids: int64 [B] sample ids on the device; b = B with one process.
        stage: 2 keeps the encoder out of the graph.
        swap_chance: probability that a sample's target is swapped for its neighbor.
        generator: of views and draws; on the device it is fastest.
        labels: int64 [all samples] on the device; only watched, never learned from.
        groups: int64 [all samples] on the device; then the batch is one of
            :class:`refiner.training.groups.GroupedOrder`, and compared group by group.
        features: what :func:`batch_features` gave, in place of the pixels.
    """
    first, count = parallel.rows(len(ids))
    own, g = ids[first : first + count], recipe.global_views
    x_LVBD = features
    if x_LVBD is None:
        x_LVBD = batch_features(
            model, pixels, recipe, stage=stage, total=len(ids), generator=generator
        )
    parts = 1 if groups is None else max(1, recipe.groups_a_step)
    z_LVBO, p_LVBO = projected(heads, x_LVBD, parts)
    wrong = None if groups is None else barred(groups, queue.ids, own, recipe.neighbors_from)
    # In bfloat16 the nearest neighbor would be one of many equals, and logits off by a hundredth.
    with torch.autocast(z_LVBO.device.type, enabled=False):
        targets = z_LVBO.detach().float()[:, :g]
        k, rows = 1 if stage == 2 else recipe.top_k, (first, len(ids))
        found = queue.lookup(targets.flatten(1, 2), own, k, generator, rows, wrong)
        neighbors = found.vectors.unflatten(1, (g, count))
        chance = 0.0 if recipe.swap == "none" else swap_chance
        if chance < 1:
            drawn = draw(1, g, len(ids), 1, generator=generator, device=targets.device)
            swapped = drawn[:, :, first : first + count] < chance
            neighbors = torch.where(swapped, neighbors, targets)
        p_LVBO = parallel.gather(p_LVBO, dim=2).float()
        loss_L = _loss(recipe, p_LVBO, targets, neighbors, parts, first)
    step = Step(
        loss_L,
        found.similarity.mean(dim=1),
        _right(found, queue, labels, own, g),
        _age(found, queue),
        _spread(targets[:, 0]),
    )
    queue.push(parallel.gather(targets[:, 0], dim=1), ids)
    return step


def projected(heads: IDHeads, x_LVBD: Tensor, parts: int) -> tuple[Tensor, Tensor]:
    """Projections and predictions [L, V, b, O]; each interleaved part has its own BatchNorm."""
    if parts == 1:
        return heads(x_LVBD)
    found = zip(*(heads(x_LVBD[:, :, part::parts]) for part in range(parts)), strict=True)
    return tuple(torch.stack(each, dim=3).flatten(2, 3) for each in found)  # [L, V, b / A, A, O]


def _loss(recipe: Recipe, p_LVBO: Tensor, z_LGBO: Tensor, nn_LGBO: Tensor, parts: int, first: int):
    """NNA loss [L], the mean of those of the interleaved parts of the batch."""
    losses = []
    for part in range(parts):
        p, z, nn = (x[:, :, part::parts] for x in (p_LVBO, z_LGBO, nn_LGBO))
        both = nn if recipe.swap == "both" else None
        how = {"temperature": recipe.temperature, "swap_negatives": both, "per_head": True}
        losses.append(nna_loss(p, z, nn, first=first // parts, **how))
    return losses[0] if parts == 1 else torch.stack(losses).mean(dim=0)


def _right(found, queue: NeighborQueue, labels: Tensor | None, own: Tensor, g: int):
    """Share of the neighbors with their query's label, [L]."""
    if labels is None:
        return None
    same = labels[queue.ids[found.positions]] == labels[own].repeat(g)
    return (same & (found.positions >= 0)).float().mean(dim=1)


def _age(found, queue: NeighborQueue) -> Tensor:
    """Steps since the neighbors were pushed, [L]; a query that found nobody counts 0."""
    age_LM = queue.pushes - queue.born[found.positions]
    return torch.where(found.positions >= 0, age_LM, 0).float().mean(dim=1)


def _spread(z_LBO: Tensor) -> Tensor:
    deviation_LO = F.normalize(z_LBO, dim=-1).std(dim=1, correction=0)
    return deviation_LO.mean(dim=1) * math.sqrt(z_LBO.shape[-1])
