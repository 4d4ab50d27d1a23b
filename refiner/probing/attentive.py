"""Attentive probes of every block: queries learn where to look, a classifier reads what they saw.

A linear probe reads one vector of an image, while masked-image models keep much of what they know
spread over the patches. Efficient probing (EP; Psomas et al., "Attention, Please! Revisiting
Attentive Probing Through the Lens of Efficiency", ICLR 2026, arXiv 2506.10178) lets M learned
queries of the encoder's width attend over the raw tokens:

    a_mt = softmax_t(q_m · x_t / √D)        y_m = V_m Σ_t a_mt x_t

V is one linear map of the tokens without bias, whose channels are split over the queries, D / M
each; where M does not divide D, each query gets D / M rounded up. The parts y_1 … y_M, side by
side, are normalised as in the paper's code (batch norm without learned scale) and read by a linear
classifier. As there, patches are attended, the class token beside them only if asked for.

Two things are arranged otherwise and change no function: V maps the M means, not T · M tokens, and
training sees tokens standardised channel by channel, so that the same learning rates serve every
block (the shift cancels in softmax and norm, the scale goes into q and V, as they are returned).

Shape legend: L blocks, R learning rates, B images, T tokens, D width, M queries, P channels of a
query, F = M · P, C classes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import device_for, step_generator
from refiner.images.sets import ImageSet
from refiner.models.encoders import Encoder, block_numbers, borrowed, has_class_token
from refiner.probing.logistic import penalty_grid
from refiner.probing.probes import held_out, labels_to_probe
from refiner.probing.tokens import Tokens

RATES = (1e-1, 3e-2, 1e-2, 3e-3)
DECAY, EPS = 0.1, 1e-6  # of AdamW's weights; of the norm


# ---------------------------------------------------------------- the paper's pooling


def attention_over_tokens(x_LBTD: Tensor, queries_LRMD: Tensor) -> Tensor:
    """How much each query attends to each token, [L, B, R, M, T], adding up to 1 over T."""
    asked = queries_LRMD.flatten(1, 2)[:, None] / math.sqrt(x_LBTD.shape[-1])
    return (asked @ x_LBTD.mT).softmax(-1).unflatten(2, queries_LRMD.shape[1:3])


def efficient_pooling(x_LBTD: Tensor, queries_LRMD: Tensor, values_LRMPD: Tensor) -> Tensor:
    """The queries' parts of each image side by side, [L, R, B, F]."""
    attention_LBRMT = attention_over_tokens(x_LBTD, queries_LRMD)
    means_LBRMD = (attention_LBRMT.flatten(2, 3) @ x_LBTD).unflatten(2, queries_LRMD.shape[1:3])
    return torch.einsum("lbrmd,lrmpd->lrbmp", means_LBRMD, values_LRMPD).flatten(3)


# ---------------------------------------------------------------- training


class _Probes:
    """Probes of some blocks at some learning rates, trained side by side, each on its own.

    Args:
        start: queries [M, D], values [M, P, D], weights [F, C] and bias [C] of them all.
        rates_LR: largest learning rates, after a tenth of the steps; they fall as a cosine.
    """

    def __init__(self, start: Sequence[Tensor], rates_LR: Tensor, steps: int):
        self.shape, rates = rates_LR.shape, rates_LR.flatten().tolist()
        self.each = [[part.clone().requires_grad_() for part in start] for _ in rates]
        groups = [{"params": own, "lr": r} for own, r in zip(self.each, rates, strict=True)]
        self.optimizer = torch.optim.AdamW(groups, weight_decay=DECAY)
        share = lambda s: min(10 * (s + 1) / steps, (1 + math.cos(math.pi * s / steps)) / 2)  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, share)
        channels = len(rates) * len(start[2])
        self.norm = torch.nn.BatchNorm1d(channels, EPS, affine=False, device=start[2].device)

    def parameters(self) -> list[Tensor]:
        """Queries [L, R, M, D], values [L, R, M, P, D], weights [L, R, F, C], bias [L, R, C]."""
        return [torch.stack(part).unflatten(0, self.shape) for part in zip(*self.each, strict=True)]

    def logits(self, x_LBTD: Tensor) -> Tensor:
        """[L, R, B, C]."""
        queries, values, weights, bias = self.parameters()
        y_LRBF = efficient_pooling(x_LBTD, queries, values)
        y_BG = y_LRBF.permute(2, 0, 1, 3).flatten(1)  # G = L · R · F
        y_LRBF = self.norm(y_BG).unflatten(1, (*self.shape, -1)).permute(1, 2, 0, 3)
        return y_LRBF @ weights + bias[:, :, None]

    @torch.enable_grad()
    def step(self, x_LBTD: Tensor, y_B: Tensor) -> None:
        logits = self.logits(x_LBTD).flatten(0, 2)  # [L · R · B, C]
        loss = F.cross_entropy(logits, y_B.repeat(len(self.each)), reduction="sum") / len(y_B)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.schedule.step()

    @torch.no_grad()
    def right(self, x_LBTD: Tensor, y_B: Tensor) -> Tensor:
        """How many are right, [L, R]."""
        self.norm.eval()
        return (self.logits(x_LBTD).argmax(-1) == y_B).sum(-1)

    @torch.no_grad()
    def for_raw(self, mean_L11D: Tensor, scale_L11D: Tensor) -> list[Tensor]:
        """Parameters of the first rate without norm and standardising, on the CPU."""
        queries, values, weights, bias = (part[:, 0].double() for part in self.parameters())
        queries, values = queries * scale_L11D[:, 0], values * scale_L11D
        weights = weights / (self.norm.running_var + EPS).sqrt().view(len(bias), -1, 1)
        centre_LF = self.norm.running_mean.view(len(bias), -1)
        centre_LF = centre_LF + (values * mean_L11D).sum(-1).flatten(1)
        bias = bias - (centre_LF[:, None] @ weights)[:, 0]
        return [part.float().cpu() for part in (queries, values, weights, bias)]


@dataclass(frozen=True, eq=False)
class _Training:
    """What all fits of one call share: the labels, a start, and how long."""

    y_N: Tensor
    start: Sequence[Tensor]
    epochs: int
    batch_size: int
    seed: int
    bar: tqdm

    def fit(self, tokens: Tokens, index: Tensor, rates_LR: Tensor) -> _Probes:
        batches = -(-len(index) // self.batch_size)
        probes = _Probes(self.start, rates_LR, self.epochs * batches)
        for epoch in range(self.epochs):
            order = torch.randperm(len(index), generator=step_generator(self.seed, epoch))
            for some in index[order].tensor_split(batches):
                probes.step(tokens(some), self.y_N[some].to(tokens.device))
                self.bar.update(len(some) * rates_LR.numel())
        return probes

    def choose(self, tokens: Tokens, fit: Tensor, held: Tensor, grid_R: Tensor) -> Tensor:
        """Accuracy of each learning rate on the held-out images, [L, R]."""
        if len(grid_R) == 1:
            return torch.full((len(tokens.blocks), 1), torch.nan)
        probes = self.fit(tokens, fit, grid_R.expand(len(tokens.blocks), -1))
        parts = held.split(self.batch_size)
        right = sum(probes.right(tokens(i), self.y_N[i].to(tokens.device)) for i in parts)
        return right.cpu() / len(held)


def _start(dim: int, queries: int, classes: int, seed: int, device: torch.device) -> list[Tensor]:
    """Queries [M, D] and values [M, P, D] drawn as in the paper's code, a classifier of zeros."""
    generator, parts = torch.Generator().manual_seed(seed), -(-dim // queries)
    drawn = torch.randn(queries, dim, generator=generator) * 0.02
    values = (2 * torch.rand(queries, parts, dim, generator=generator) - 1) / math.sqrt(dim)
    zeros = torch.zeros(queries * parts, classes), torch.zeros(classes)
    return [part.to(device) for part in (drawn, values, *zeros)]


# ---------------------------------------------------------------- the probe


@dataclass(frozen=True, eq=False)
class AttentiveProbe:
    """What :func:`attentive_probe` returns, on the CPU.

    Attributes:
        accuracy: on the test images, float32 [L].
        rate: the learning rate that was chosen, [L].
        validation: accuracy on the held-out train images, [R, L]; NaN where nothing was chosen.
        rates: the grid, R numbers, largest first.
        queries, values: q [L, M, D] and V [L, M, P, D], for raw tokens.
        weights, bias: of the classifier, [L, F, C] and [L, C], the norm included.
        classes: int64 [C], the labels that occur in train, in the order of the weights.
        blocks: the number of each of the L blocks, counted from 1.
        class_token: whether it is attended, as the first token.
    """

    accuracy: Tensor
    rate: Tensor
    validation: Tensor
    rates: tuple[float, ...]
    queries: Tensor
    values: Tensor
    weights: Tensor
    bias: Tensor
    classes: Tensor
    blocks: tuple[int, ...]
    class_token: bool

    def predict(self, model: Encoder, images: ImageSet | Tensor, device=None) -> Tensor:
        """Labels of images (a set, or uint8 [N, 3, H, W]) by every block, int64 [L, N]."""
        found = []
        for x_LBTD, (queries, values, weights, bias) in self._walk(model, images, device):
            y_LBF = efficient_pooling(x_LBTD, queries[:, None], values[:, None])[:, 0]
            found.append((y_LBF @ weights + bias[:, None]).argmax(-1).cpu())
        return self.classes[torch.cat(found, dim=1)]

    def attention(self, model: Encoder, images: ImageSet | Tensor, device=None) -> Tensor:
        """How much each query attends to each token, float32 [L, N, M, T]."""
        batches = self._walk(model, images, device)
        found = [attention_over_tokens(x, q[:, None])[:, :, 0].cpu() for x, (q, *_) in batches]
        return torch.cat(found, dim=1)

    def _walk(self, model, images, device) -> Iterator[tuple[Tensor, list[Tensor]]]:
        """Batches of raw tokens [L, B, T, D], and the parameters on the device."""
        device = device_for(device, next(model.parameters()))
        images = images if isinstance(images, ImageSet) else ImageSet(images)
        tokens = Tokens(model, images, self.blocks, self.class_token, device)
        own = self.queries, self.values, self.weights, self.bias
        parts = [part.to(device) for part in own]
        with borrowed(model, device):
            for index in tokens.batches():
                yield tokens.raw(index), parts


def attentive_probe(
    model: Encoder,
    train: ImageSet,
    test: ImageSet,
    *,
    queries: int = 32,
    rates: Sequence[float] = RATES,
    epochs: int = 20,
    batch_size: int = 64,
    validation: float = 0.2,
    blocks: Sequence[int] | None = None,
    class_token: bool = False,
    memory: int = 2**32,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> AttentiveProbe:
    """Trains EP on every block; the learning rate is chosen without the test images.

    For each block all learning rates are trained on a part of the train images; the one that is
    best on the rest (the larger one in a tie) is trained again on all of them and asked once on
    the test images. AdamW with a weight decay of 0.1 takes the place of the paper's LARS.

    Args:
        model: an encoder, see :func:`refiner.extract`; it is left as it was found.
        train, test: labelled images. A test image of a class that train lacks counts as wrong.
        queries: M; the paper's tables have 32.
        rates: largest learning rates of the schedule; one needs no choice.
        epochs: over the train images.
        batch_size: images of a step; an epoch is cut into equal batches of at most so many.
        validation: share of each class's train images that choose.
        blocks: which blocks, counted from 1, negative from the end; default all.
        class_token: attend it, too, as the paper does if pretraining is defined on it. Registers
            never are.
        memory: bytes of train tokens to keep, in half precision. Where all blocks' take more, some
            blocks are trained at a time; where one block's do, the encoder runs in every epoch.
        seed: of the start, the order of the images and the part that chooses.
        device: where to run; default CUDA if there is one, else the model's device.
        progress: show a bar with the remaining time.

    Returns:
        An :class:`AttentiveProbe`. Blocks do not depend on which others are trained beside them.

    Raises:
        ValueError: without labels or two classes, for numbers that make no sense, tokens that are
            not finite, or blocks of different shape (Hiera's stages).
    """
    numbers = tuple(sorted(set(block_numbers(blocks, len(model.blocks)))))
    grid = penalty_grid(rates, "learning rates")
    like = (torch.empty(len(part), 1) for part in (train, test))
    classes, y, t = labels_to_probe(train.labels, test.labels, *like)
    fit, held = held_out(y, validation, seed, "learning rate" if len(grid) > 1 else "")
    if queries < 1 or epochs < 1 or batch_size < 2:
        raise UserError("queries and epochs must be at least 1, batch_size at least 2")
    if class_token and not has_class_token(model):
        raise UserError("this model has no class token: leave class_token=False")
    device = device_for(device, next(model.parameters()))
    every, grid_R, columns = torch.arange(len(train)), torch.tensor(grid), []
    with (
        borrowed(model, device),
        tqdm(desc="attentive probes", unit="image", disable=not progress, unit_scale=True) as bar,
    ):
        tokens = Tokens(model, train, numbers, class_token, device).standardized_by_some(seed)
        start = _start(tokens.scale_L11D.shape[-1], queries, len(classes), seed, device)
        training = _Training(y, start, epochs, batch_size, seed, bar)
        tried = len(fit) * len(grid) if len(grid) > 1 else 0
        bar.reset(len(numbers) * epochs * (len(train) + tried))
        for some in tokens.parts(memory, batch_size * len(grid) * start[0].numel() * 4):
            right_LR = training.choose(some, fit, held, grid_R)
            rate_L = grid_R[right_LR.nan_to_num().argmax(1)]
            probes = training.fit(some, every, rate_L[:, None])
            columns.append((rate_L, right_LR, *probes.for_raw(some.mean_L11D, some.scale_L11D)))
    rate, right, *parts = (torch.cat(column) for column in zip(*columns, strict=True))
    probe = AttentiveProbe(rate, rate, right.T, grid, *parts, classes, numbers, class_token)
    return replace(probe, accuracy=(probe.predict(model, test, device) == t).float().mean(1))
