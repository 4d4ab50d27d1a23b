"""Instance-discrimination heads on many blocks, the neighbor queue, and the NNA loss.

From MIM-Refiner (Alkin et al. 2025, arXiv 2402.10093): every chosen block of the encoder gets its
own projector and predictor; Nearest Neighbor Alignment pulls the prediction of one view towards
the *neighbor* of another view, and pushes it away from the other samples themselves.

All heads run at once: weights, queues and losses carry a leading axis of heads, and each layer is
one batched product.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.files import fitting
from refiner.base.places import check_memory, data_folder
from refiner.base.tensors import draw, largest
from refiner.models.load import read_checkpoint
from refiner.training.recipe import Recipe, recipe_from
from refiner.training.states import load_state, save_state

# ---------------------------------------------------------------- the loss


def nna_loss(
    predictions: Tensor,
    targets: Tensor,
    neighbors: Tensor,
    *,
    temperature: float = 0.2,
    swap_negatives: Tensor | None = None,
    reference_indexing: bool = False,
    per_head: bool = False,
    first: int = 0,
) -> Tensor:
    """Nearest Neighbor Alignment (MIM-Refiner, section 3.2).

    For a pair of views g (global) and v != g, and sample i, with unit vectors z (target),
    p (prediction) and NN(z) (the target's neighbor from the queue):

        -log  exp(NN(z_i^g)·p_i^v / τ) / (exp(NN(z_i^g)·p_i^v / τ) + Σ_{j≠i} exp(z_i^g·p_j^v / τ))

    Only the positive is swapped for its neighbor. The gradient flows through the predictions only.
    With ``neighbors=targets`` this is plain instance discrimination (InfoNCE); with
    ``swap_negatives=neighbors`` it is NNCLR (Dwibedi et al. 2021, arXiv 2104.14548), which uses
    the neighbor in both roles.

    Args:
        predictions: [V, B, O] or [L, V, B, O]; normalised here.
        targets: [G, B, O] or [L, G, B, O], G <= V; view g of targets and predictions are the same
            images. Normalised and detached here.
        neighbors: like targets.
        temperature: τ.
        swap_negatives: what to use instead of the targets in the sum over j, like targets.
        reference_indexing: reproduce the authors' loop, which reads local view k from position k
            instead of G + k: self-pairs enter and the last G local views get no gradient.
        per_head: return [L] instead of its sum.
        first: where targets of fewer samples than predictions begin among these: one process's
            share of a batch, against the predictions gathered from all.

    Returns:
        A scalar: mean over pairs and samples, summed over heads.

    Raises:
        ValueError: for shapes that do not fit, or when no pair of different views exists.
    """
    if predictions.dim() == 3:
        predictions, targets, neighbors = predictions[None], targets[None], neighbors[None]
        swap_negatives = None if swap_negatives is None else swap_negatives[None]
    if neighbors.shape != targets.shape or predictions.dim() != 4 or targets.dim() != 4:
        raise UserError(
            f"expected predictions [L, V, B, O] with targets and neighbors [L, G, B, O], got "
            f"{list(predictions.shape)}, {list(targets.shape)}, {list(neighbors.shape)}"
        )
    l, v, b, o = predictions.shape
    g, m = targets.shape[1:3]  # m = b but for a share of the batch
    if first + m > b:
        raise UserError(f"targets {first} to {first + m} of only {b} predictions")
    weight_GV = _pair_weights(g, v, reference_indexing, predictions.device)

    p_LVBO = F.normalize(predictions, dim=-1)
    z_LGBO = F.normalize(targets.detach(), dim=-1)
    nn_LGBO = F.normalize(neighbors.detach(), dim=-1)
    negatives = z_LGBO if swap_negatives is None else F.normalize(swap_negatives.detach(), dim=-1)

    # One product gives the logits of every pair of views; then the diagonal gets the neighbors.
    flat = torch.bmm(negatives.reshape(l, g * m, o), p_LVBO.reshape(l, v * b, o).mT) / temperature
    logits_LGVBB = flat.reshape(l, g, m, v, b).transpose(2, 3)
    own_LVBO = p_LVBO[:, :, first : first + m]
    positive_LGVB = (nn_LGBO[:, :, None] * own_LVBO[:, None]).sum(-1) / temperature
    eye = torch.eye(b, dtype=torch.bool, device=predictions.device)[first : first + m]
    logits_LGVBB = torch.where(eye, positive_LGVB[..., None], logits_LGVBB)
    loss_LGV = (logits_LGVBB.logsumexp(dim=-1) - positive_LGVB).mean(dim=-1)
    loss_L = (loss_LGV * weight_GV.to(loss_LGV.dtype)).sum(dim=(1, 2))
    return loss_L if per_head else loss_L.sum()


@lru_cache(maxsize=8)  # on a GPU, copying it there at every step would make the host wait
def _pair_weights(g: int, v: int, reference_indexing: bool, device: torch.device) -> Tensor:
    """How much each pair (global target, view) counts, [G, V], summing to 1."""
    if v < g or v < 2 or g < 1:
        raise UserError(f"NNA needs a pair of different views; got {g} global of {v} views")
    weight = torch.ones(g, v, dtype=torch.float64)
    weight[torch.arange(g), torch.arange(g)] = 0  # a view is no pair with itself
    if reference_indexing:
        weight[:, g:] = 0
        weight[:, : v - g] += 1  # their local loop starts at view 0
    return (weight / weight.sum()).to(device)


# ---------------------------------------------------------------- the queue


class Neighbors(NamedTuple):
    """What a lookup found: vectors [L, M, O], similarity [L, M], queue positions [L, M]."""

    vectors: Tensor
    similarity: Tensor
    positions: Tensor


class NeighborQueue(nn.Module):
    """First in, first out memory of past projections, one row of vectors a head.

    Vectors are stored normalised, with the ids of their samples, so that a sample is never given
    itself as neighbor.

    Args:
        size: Q, entries kept.
        dim: O.
        heads: L.
    """

    def __init__(self, size: int, dim: int, *, heads: int = 1):
        super().__init__()
        if size < 1:
            raise UserError(f"a queue needs at least one entry, got size={size}")
        self.size = size
        self.register_buffer("vectors", torch.zeros(heads, size, dim))
        self.register_buffer("ids", torch.full((size,), -1, dtype=torch.int64))
        self.register_buffer("born", torch.zeros(size, dtype=torch.int64))  # push that wrote it
        self.register_buffer("pushed", torch.zeros((), dtype=torch.int64))
        self.register_buffer("pushes", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def push(self, z: Tensor, sample_ids: Tensor) -> None:
        """Stores projections, overwriting the oldest.

        Args:
            z: [B, O] or [L, B, O]; normalised here. Of more than Q samples the last Q are kept.
            sample_ids: int64 [B], non-negative.
        """
        z_LBO = F.normalize(z.detach() if z.dim() == 3 else z.detach()[None], dim=-1)
        z_LBO, ids_B = z_LBO[:, -self.size :], sample_ids[-self.size :]
        b = len(ids_B)
        at = (self.pushed + torch.arange(b, device=ids_B.device)) % self.size
        self.vectors[:, at] = z_LBO.to(self.vectors.dtype)
        self.ids[at] = ids_B
        self.born[at] = self.pushes
        self.pushed += b
        self.pushes += 1

    @torch.no_grad()
    def lookup(
        self,
        z: Tensor,
        sample_ids: Tensor,
        k: int = 1,
        generator: torch.Generator | None = None,
        rows: tuple[int, int] | None = None,
        barred: Tensor | None = None,
    ) -> Neighbors:
        """One neighbor of each query, drawn uniformly from its k nearest queue entries.

        A query with no candidate (empty queue, or only its own entries) gets itself back, with
        similarity 1 and position -1.

        Args:
            z: [M, O] or [L, M, O]; M may be several views of the B samples, view after view.
            sample_ids: int64 [B]; entries with the query's own id are never returned.
            k: 1 gives the nearest (the paper's stage 2), 20 its stage 3.
            generator: for the draw.
            rows: (first, total) when the B samples are some rows of a batch: the draws are those
                that a lookup of the whole batch would make.
            barred: bool [B, Q], entries that are no neighbors of a sample either.

        Returns:
            A :class:`Neighbors`; without the head axis if z had none.
        """
        stacked = z.dim() == 3
        z_LMO = F.normalize(z.detach() if stacked else z.detach()[None], dim=-1)
        l, m, o = z_LMO.shape
        b = len(sample_ids)
        ids_M = sample_ids.repeat(m // b)
        similarity_LMQ = torch.bmm(z_LMO.to(self.vectors.dtype), self.vectors.mT)
        forbidden_MQ = (ids_M[:, None] == self.ids) | (self.ids < 0)
        if barred is not None:
            forbidden_MQ |= barred.repeat(m // b, 1)
        similarity_LMQ.masked_fill_(forbidden_MQ, -torch.inf)
        k = min(k, self.size)
        found_MK = largest(similarity_LMQ.flatten(0, 1), k)
        values_LMK, where_LMK = (x.unflatten(0, (l, m)) for x in found_MK)
        # With fewer than k candidates, draw among those that exist.
        candidates_LM = values_LMK.isfinite().sum(-1)
        first, total = rows or (0, b)
        draw_LVB = draw(l, m // b, total, generator=generator, device=z.device)
        draw_LM = draw_LVB[..., first : first + b].reshape(l, m)
        pick_LM1 = (draw_LM * candidates_LM).long().clamp(max=k - 1)[..., None]
        value_LM, where_LM = (x.gather(-1, pick_LM1)[..., 0] for x in (values_LMK, where_LMK))
        found_LMO = self.vectors.gather(1, where_LM[..., None].expand(-1, -1, o)).to(z.dtype)
        none_LM = candidates_LM == 0
        result = Neighbors(
            torch.where(none_LM[..., None], z_LMO, found_LMO),
            value_LM.masked_fill(none_LM, 1.0),
            where_LM.masked_fill(none_LM, -1),
        )
        return result if stacked else Neighbors(*(x[0] for x in result))


# ---------------------------------------------------------------- the heads


class StackedLinear(nn.Module):
    """One linear layer per head, without bias: [L, B, in] to [L, B, out] in one product."""

    def __init__(self, heads: int, inputs: int, outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, inputs, outputs))
        for head in self.weight:  # Xavier-uniform of each head's own matrix
            nn.init.xavier_uniform_(head)

    def forward(self, x_LBI: Tensor) -> Tensor:
        return torch.bmm(x_LBI, self.weight)


class StackedBatchNorm(nn.Module):
    """BatchNorm without learned scale and shift, over the samples of each head: [L, B, F]."""

    def __init__(self, heads: int, features: int, *, momentum: float = 0.1, eps: float = 1e-5):
        super().__init__()
        self.momentum, self.eps = momentum, eps
        self.register_buffer("mean", torch.zeros(heads, 1, features))
        self.register_buffer("var", torch.ones(heads, 1, features))

    def forward(self, x_LBF: Tensor) -> Tensor:
        if not self.training:
            return ((x_LBF - self.mean) * (self.var + self.eps).rsqrt()).to(x_LBF.dtype)
        y_LBF, mean, var = _Normalise.apply(x_LBF, self.eps)
        with torch.no_grad():  # running averages, unbiased variance as in torch
            b = x_LBF.shape[1] * parallel.world()
            self.mean.lerp_(mean.to(self.mean.dtype), self.momentum)
            self.var.lerp_((var * b / max(1, b - 1)).to(self.var.dtype), self.momentum)
        return y_LBF


class _Normalise(torch.autograd.Function):
    """Subtracts the mean over all processes' samples and divides by their standard deviation.

    Written out because autograd's version takes twice as many passes, and on a CPU torch.var_mean
    over an inner axis takes ten times as long as the mean of squares. With y the output, r one over
    the deviation and means over samples: dx = r (dy - mean(dy) - y mean(dy y)).
    """

    @staticmethod
    def forward(ctx, x_LBF: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
        wide = x_LBF if x_LBF.dtype == torch.float64 else x_LBF.float()  # never in bf16
        mean = wide.mean(dim=1, keepdim=True)
        centred = wide - mean
        var = centred.square().mean(dim=1, keepdim=True)
        if parallel.world() > 1:
            own = mean
            mean, var = parallel.pooled_statistics(mean, var)
            centred += own - mean
        scale = (var + eps).rsqrt()
        y_LBF = (centred * scale).to(x_LBF.dtype)
        ctx.save_for_backward(y_LBF, scale)
        ctx.mark_non_differentiable(mean, var)
        return y_LBF, mean, var

    @staticmethod
    def backward(ctx, grad_LBF: Tensor, *_) -> tuple[Tensor, None]:
        y_LBF, scale = ctx.saved_tensors
        wide = grad_LBF.to(scale.dtype)
        means = [x.mean(dim=1, keepdim=True) for x in (wide, wide * y_LBF)]
        mean, along = parallel.mean(torch.stack(means))
        inner_LBF = torch.addcmul(wide - mean, y_LBF.to(along), along, value=-1)
        return (inner_LBF * scale).to(grad_LBF.dtype), None


def _mlp(heads: int, *sizes: int) -> nn.Sequential:
    """Linear, BatchNorm, GELU, …; the last layer ends with its BatchNorm."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise(sizes):
        norm = StackedBatchNorm(heads, outputs)
        layers += [StackedLinear(heads, inputs, outputs), norm, nn.GELU()]
    return nn.Sequential(*layers[:-1])


class IDHeads(nn.Module):
    """Instance-discrimination heads for L blocks (MIM-Refiner, appendix).

    Projector D→hidden→hidden→out, predictor out→predictor_hidden→out; BatchNorm without learned
    scale and shift after every linear layer, GELU between, Xavier-uniform weights, no bias, no
    momentum encoder.

    Args:
        heads: L.
        dim: D, the encoder's width.
        hidden: width inside the projector; the paper's is 2048.
        predictor_hidden: width inside the predictor; the paper's is 4096.
        out: O; the paper's is 256.
    """

    def __init__(
        self,
        heads: int,
        dim: int,
        *,
        hidden: int = 2048,
        predictor_hidden: int = 4096,
        out: int = 256,
    ):
        super().__init__()
        self.projector = _mlp(heads, dim, hidden, hidden, out)
        self.predictor = _mlp(heads, out, predictor_hidden, out)

    def forward(self, x_LVBD: Tensor) -> tuple[Tensor, Tensor]:
        """Projections and predictions, both [L, V, B, O], of pooled features [L, V, B, D].

        Statistics of BatchNorm are taken over all views together, as the authors do.
        """
        l, v, b, d = x_LVBD.shape
        z_LMO = self.projector(x_LVBD.reshape(l, v * b, d))
        p_LMO = self.predictor(z_LMO)
        return z_LMO.reshape(l, v, b, -1), p_LMO.reshape(l, v, b, -1)


# ---------------------------------------------------------------- saving and loading


def fresh_heads(recipe: Recipe, dim: int) -> tuple[IDHeads, NeighborQueue]:
    """Heads with new weights and an empty queue, of a recipe's sizes, for an encoder's width."""
    l, hidden, predictor = len(recipe.blocks), recipe.hidden, recipe.predictor_hidden
    out = recipe.out
    weights = l * (dim * hidden + hidden**2 + hidden * out + 2 * out * predictor)
    check_memory(4 * (weights + l * recipe.queue * out), "the heads and their queue together")
    heads = IDHeads(l, dim, hidden=hidden, predictor_hidden=predictor, out=out)
    return heads, NeighborQueue(recipe.queue, out, heads=l)


def copy_weights(name: str, given: nn.Module, new: nn.Module) -> None:
    """Weights and averages of the heads or the queue, if they have the recipe's sizes."""
    theirs, ours = ({k: list(v.shape) for k, v in m.state_dict().items()} for m in (given, new))
    if theirs != ours:
        key = next(k for k in ours if theirs.get(k) != ours[k])
        raise UserError(
            f"the {name} given do not fit the recipe and the model: {key} is {theirs.get(key)}, "
            f"not {ours[key]}; use the recipe that they were made with"
        )
    new.load_state_dict(given.state_dict())


def check_ids(queue: NeighborQueue, images) -> None:
    """Refuses a queue of other images, whose ids would have no labels here.

    Raises:
        ValueError: for an id that no image has.
    """
    labels, largest = getattr(images, "labels", None), int(queue.ids.max())
    if labels is not None and largest >= len(labels):
        raise UserError(
            f"the queue given holds image {largest}, but there are only {len(labels)} images; "
            "give the images that it was filled with, or no queue"
        )


def save_heads(file: Path, heads: IDHeads, queue: NeighborQueue) -> None:
    """Writes heads and queue, for :func:`load_heads`."""
    parts = {"heads": heads, "queue": queue}
    save_state(file, {f"{n}.{k}": v for n, m in parts.items() for k, v in m.state_dict().items()})


def load_heads(name: str | Path = "mae_toybox_refined") -> tuple[IDHeads, NeighborQueue, Recipe]:
    """The ID heads and the filled queue that a refined encoder was trained with.

    Args:
        name: an embedded refined checkpoint, or a folder that :func:`refiner.refine` wrote.

    Returns:
        The heads in eval mode, the queue, and the recipe that made them.

    Raises:
        FileNotFoundError: when the checkpoint has no heads.
    """
    embedded, saved = data_folder() / "heads" / f"{name}.safetensors", Path(name) / "heads.pt"
    if not (embedded.is_file() or saved.is_file()):
        raise FileNotFoundError(
            f"{name} has no heads: give a folder that refine wrote, or 'mae_toybox_refined'"
        )
    state = load_file(embedded) if embedded.is_file() else load_state(saved)
    card, encoder, _ = read_checkpoint(name)
    with fitting(name):
        recipe = recipe_from(card["refine_recipe"])
        heads, queue = fresh_heads(recipe, encoder["patch_embed.proj.weight"].shape[0])
        for part, module in (("heads.", heads), ("queue.", queue)):
            own = {k.removeprefix(part): v for k, v in state.items() if k.startswith(part)}
            module.load_state_dict(own)  # half precision becomes float32
    return heads.eval(), queue, recipe
