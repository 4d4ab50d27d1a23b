"""Dense labels: what single patches know, by linear segmentation.

A linear classifier on patch features whose logits are interpolated to every pixel: the "linear"
protocol of ADE20K (Zhou et al. 2017) as DINOv2 uses it (Oquab et al. 2023, arXiv 2304.07193).
Interpolation and the linear map commute, so features are interpolated to a few random pixels of
each train image and the classifier is the exact minimum of :mod:`refiner.probing.probes`' objective
on them, instead of the end of a schedule.

Shape legend: L blocks, N images, B images of a batch, Q pixels an image, D C classes,
H W sides of the images, h w grid of patches, E = D + 1 (bias last).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import device_for, full_precision
from refiner.images.dense import IGNORE, DenseSet
from refiner.models.encoders import (
    Encoder,
    Hiera,
    block_numbers,
    borrowed,
    default_batch,
    preprocess,
    preprocessing_card,
)
from refiner.probing.logistic import PENALTIES, PenaltyChoice, Scaling, penalty_grid

# ---------------------------------------------------------------- features of patches


def patch_maps(model: Encoder, images: Tensor, blocks: Sequence[int]) -> list[Tensor]:
    """Patch features of some blocks, before the final norm.

    Args:
        model: an encoder in eval mode.
        images: uint8 [B, 3, H, W] on the model's device.
        blocks: counted from 1.

    Returns:
        float32 [B, D, h, w] for each block. Narrower blocks of a Hiera are filled up with zeros to
        the last one's width, as in :func:`refiner.extract`.
    """
    x = preprocess(images, preprocessing_card(model))
    bf16 = torch.autocast(x.device.type, torch.bfloat16, enabled=x.is_cuda)
    options = {"coarse": False} if isinstance(model, Hiera) else {}  # or indices count its stages
    with torch.no_grad(), bf16:
        found = model.forward_intermediates(
            x, indices=[b - 1 for b in blocks], intermediates_only=True, norm=False, **options
        )
    return [F.pad(f.float(), (0, 0, 0, 0, 0, model.num_features - f.shape[1])) for f in found]


def at_pixels(
    maps_BDhw: Tensor, rows_BQ: Tensor, columns_BQ: Tensor, size: tuple[int, int]
) -> Tensor:
    """Bilinear features at pixels of a picture of a height and width, [B, Q, D]."""
    where = torch.stack([columns_BQ, rows_BQ], dim=-1)[:, None]  # [B, 1, Q, 2]
    where = (2 * where.to(maps_BDhw) + 1) / where.new_tensor(size[::-1]) - 1
    found = F.grid_sample(maps_BDhw, where, padding_mode="border", align_corners=False)
    return found[:, :, 0].mT


# ---------------------------------------------------------------- the protocol


@dataclass(frozen=True, eq=False)
class Segmentation:
    """What :func:`linear_segmentation` returns, on the CPU.

    Attributes:
        blocks: the blocks' numbers, L of them.
        miou: mean over classes of intersection over union, float32 [L].
        spread: its standard deviation over resampled test images, [L].
        pixel_accuracy: share of right pixels, [L].
        object_iou, object_spread: of objects of any class against the background, [L]; NaN without
            background.
        iou: of each class, [L, C]; NaN where a class neither occurs nor is predicted.
        penalty: the λ that was chosen, [L].
        validation: pixel accuracy on held-out train images, [L].
    """

    blocks: tuple[int, ...]
    miou: Tensor
    spread: Tensor
    pixel_accuracy: Tensor
    object_iou: Tensor
    object_spread: Tensor
    iou: Tensor
    penalty: Tensor
    validation: Tensor

    @property
    def best(self) -> int:
        """The place of the block that is best on the held-out train images."""
        return int(self.validation.argmax())


def linear_segmentation(
    model: Encoder,
    train: DenseSet,
    test: DenseSet,
    *,
    blocks: Sequence[int] = (-1,),
    pixels: int = 16,
    penalties: Sequence[float] = PENALTIES,
    validation: float = 0.2,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Segmentation:
    """Segments images by a linear classifier on the patch features of each block.

    Args:
        model: an encoder.
        train, test: of the same classes.
        blocks: counted from 1, or from the end with negative numbers.
        pixels: random pixels of each train image that the classifier learns from.
        penalties: grid of λ; each block's is chosen on held-out train images.
        validation: their share, of whole images; one at least is held out and one is not.
        seed: of pixels and held-out images.
        device: where to work; default CUDA if there is one, else the model's.
        progress: show a bar.

    Returns:
        A :class:`Segmentation`.

    Raises:
        ValueError: for fewer than two train images with known pixels, fewer than two classes, or a
            block that the model does not have.
    """
    device = device_for(device, next(model.parameters()))
    numbers = block_numbers(blocks, len(model.blocks))
    total = len(train) + len(test)
    bar = tqdm(total=total, desc="segmentation", unit="image", disable=not progress)
    with borrowed(model, device), bar:
        order = sorted(set(numbers))  # as timm gives them
        x_LMD, y_M, image_M = _sampled_features(model, train, order, pixels, seed, device, bar)
        with full_precision(device):
            fits = [_fit(x_MD, y_M, image_M, penalties, validation, seed) for x_MD in x_LMD]
        counts = _test_counts(model, test, order, fits, device, bar)
    rows = [order.index(b) for b in numbers]
    return _scores(numbers, [fits[r] for r in rows], [counts[r] for r in rows], test)


def _batches(model: Encoder, images: Tensor, device: torch.device):
    step = min(128, default_batch(model, device))
    for start in range(0, len(images), step):
        yield slice(start, start + step), images[start : start + step].to(device)


def _sampled_features(model, train: DenseSet, blocks, pixels: int, seed: int, device, bar: tqdm):
    """Features [L, M, D], classes [M] and images [M] of the pixels that are known."""
    if len(train) < 2:
        raise UserError("segmentation needs at least two train images")
    (n, *size), generator = train.maps.shape, np.random.default_rng(seed)
    drawn = torch.stack([torch.from_numpy(generator.integers(0, s, (n, pixels))) for s in size])
    parts = []
    for rows, x in _batches(model, train.images, device):
        r_BQ, c_BQ = drawn[:, rows].to(device)
        maps = patch_maps(model, x, blocks)
        parts.append(torch.stack([at_pixels(m, r_BQ, c_BQ, size).flatten(0, 1) for m in maps]))
        bar.update(len(x))
    y_NQ = train.maps[torch.arange(n)[:, None], drawn[0], drawn[1]].long()
    known = (y_NQ != IGNORE).flatten()
    image_M = torch.arange(n).repeat_interleave(pixels)[known].to(device)
    return (torch.cat(parts, dim=1)[:, known.to(device)], y_NQ.flatten()[known].to(device), image_M)


@dataclass(frozen=True, eq=False)
class _Head:
    """A fitted classifier: weights [D, K], bias [K], the classes [K]; how it was chosen."""

    weights: Tensor
    bias: Tensor
    classes: Tensor
    penalty: float
    validation: float


def _fit(
    x_MD: Tensor, y_M: Tensor, image_M: Tensor, penalties, validation: float, seed: int
) -> _Head:
    classes, y = y_M.unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError("segmentation needs at least two classes in the train maps")
    images = image_M.unique()
    if len(images) < 2 and len(penalties) > 1:
        raise UserError(
            "only one train image has known pixels, and none is left to choose a penalty with: "
            "give more images, or a single penalty"
        )
    shuffled = torch.from_numpy(np.random.default_rng(seed).permutation(len(images)))
    count = max(1, min(round(validation * len(images)), len(images) - 1))
    held = images[shuffled[:count].to(images.device)]
    chooses = torch.isin(image_M, held)
    grid = torch.tensor(penalty_grid(penalties)).to(x_MD.device)
    options = {"classes": len(classes), "tolerance": 1e-4, "max_steps": 50}
    choice = PenaltyChoice(y, (~chooses).nonzero()[:, 0], chooses.nonzero()[:, 0], grid, options)
    scaling = Scaling.of(x_MD[None], True, x_MD.device)
    penalty, right, solved = choice.solve(scaling(x_MD[None]))
    weights, bias = scaling.undo(solved.weights[0])
    return _Head(weights[0].float(), bias[0].float(), classes, float(penalty), float(right.max()))


def _test_counts(model, test: DenseSet, blocks, fits: list[_Head], device, bar: tqdm):
    """For each block int64 [N, 3, C + 2]: pixels of truth, prediction and both, an image.

    The last two columns are background and object, where there is a background.
    """
    size, found = test.maps.shape[1:], [[] for _ in fits]
    n_classes = max(len(test.classes), *(int(f.classes.max()) + 1 for f in fits))
    for rows, x in _batches(model, test.images, device):
        truth = test.maps[rows].to(device).long()
        for maps, head, parts in zip(patch_maps(model, x, blocks), fits, found, strict=True):
            logits = torch.einsum("bdhw,dc->bchw", maps, head.weights)
            logits = logits + head.bias[:, None, None]
            logits = F.interpolate(logits, size, mode="bilinear", align_corners=False)
            guess = head.classes[logits.argmax(1)]
            counts = class_counts(truth, guess, n_classes)
            merged = class_counts(truth, guess, 2, background=test.background)
            parts.append(torch.cat([counts, merged], dim=2).cpu())
        bar.update(len(x))
    return [torch.cat(parts) for parts in found]


def class_counts(
    truth: Tensor, guess: Tensor, classes: int, *, background: int | None = -1
) -> Tensor:
    """Pixels of each class in truth, in prediction and in both, int64 [B, 3, C].

    Args:
        truth, guess: int64 [B, H, W]; where truth is :data:`IGNORE` nothing counts.
        classes: C.
        background: merge all other classes into one: 0 background, 1 object. -1 leaves them;
            None gives zeros.
    """
    if background is None:
        return torch.zeros(len(truth), 3, classes, dtype=torch.int64, device=truth.device)
    known = (truth != IGNORE).flatten(1)
    t, g = truth.flatten(1), guess.flatten(1)
    if background >= 0:
        t, g = (t != background).long(), (g != background).long()
    bins = torch.where(known, t, classes), torch.where(known, g, classes)
    both = torch.where(known & (t == g), t, classes)
    out = torch.zeros(len(t), 3, classes + 1, dtype=torch.int64, device=t.device)
    for i, index in enumerate((*bins, both)):
        out[:, i].scatter_add_(1, index, torch.ones_like(index))
    return out[:, :, :classes]


def iou_of(counts: Tensor) -> Tensor:
    """Intersection over union of each class, float64 [..., C], from counts [..., 3, C]."""
    truth, guess, both = counts.double().unbind(-2)
    union = truth + guess - both
    return torch.where(union > 0, both / union.clamp(min=1), torch.nan)


def _scores(numbers, fits: list[_Head], counts: list[Tensor], test: DenseSet) -> Segmentation:
    total = torch.stack([c.sum(0) for c in counts])  # [L, 3, C + 2]
    iou, n = iou_of(total), len(test)
    right = total[:, 2, :-2].sum(-1) / total[:, 0, :-2].sum(-1).clamp(min=1)
    resampled = torch.from_numpy(np.random.default_rng(0).integers(0, n, (200, n)))
    times = torch.zeros(200, n).scatter_add_(1, resampled, torch.ones(200, n)).double()
    spread = []
    for c in counts:
        drawn = iou_of((times @ c.double().flatten(1)).unflatten(1, (3, -1)))
        both = drawn[:, :-2].nanmean(-1), drawn[:, -1]
        spread.append(torch.stack(both).std(1, correction=0))
    spread, objects = torch.stack(spread, dim=1).float()
    right, each, merged = right.float(), iou[:, :-2].float(), iou[:, -1].float()
    miou = iou[:, :-2].nanmean(-1).float()
    told = (torch.tensor([getattr(f, name) for f in fits]) for name in ("penalty", "validation"))
    return Segmentation(numbers, miou, spread, right, merged, objects, each, *told)
