"""Fine-tuning: the whole encoder with a linear head, on all labels or on a few.

The recipe is the one that masked-image models are compared with (BEiT, Bao et al. 2022, arXiv
2106.08254; MAE, He et al. 2022, arXiv 2111.06377): AdamW with layer-wise decay of the learning
rate, mixup, CutMix, label smoothing, stochastic depth and averaged weights, all of them timm's.
RandAugment and random erasing are left out: crop, flip and mild colour jitter take their place.

Everything random in a step depends on (seed, step) alone, so a resumed run equals an uninterrupted
one. No test image is ever seen: a run is a function of the train images and the recipe.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from timm.data import Mixup
from timm.layers import DropPath
from timm.loss import SoftTargetCrossEntropy
from torch import Tensor, nn

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.files import one_run_a_folder
from refiner.base.settings import (
    Entries,
    NotNegative,
    Portion,
    Positive,
    Range,
    Share,
    Whole,
    checked,
)
from refiner.base.tensors import step_generator
from refiner.images.sets import ImageSet
from refiner.images.views import View, make_view, without_colour
from refiner.models.encoders import (
    Encoder,
    channels_of,
    final_pooling,
    has_class_token,
    head_features,
    normalize,
    preprocess,
    preprocessing_card,
)
from refiner.models.load import copy_model
from refiner.probing.logistic import PENALTIES
from refiner.probing.probes import linear_probe, shuffled_by_class
from refiner.training.loop import EMA, Loop, Stage, Stop, autocast, layer_groups, shuffled
from refiner.training.states import origin


@dataclass(frozen=True)
class FinetuneRecipe:
    """How an encoder is fine-tuned.

    Attributes:
        epochs: passes over the train images.
        least_steps: with few images, go on for at least so many steps.
        batch: images a step; at most as many as there are, and an even number.
        lr: peak learning rate of the head for a batch of 256; scaled linearly with the batch.
        layer_decay: each block's learning rate is this share of the next one's.
        weight_decay: of matrices; vectors, positions and tokens have none.
        warmup: share of the steps with a rising learning rate.
        mixup, cutmix: parameter of their Beta distributions; 0 turns one off. Each batch is mixed
            by one of the two.
        smoothing: share of the target that is spread over all classes.
        drop_path: stochastic depth of the last block, rising linearly from 0 in the first.
        ema: largest decay of the averaged weights, which are the result; 0 takes the last weights.
        crop: range of the random crop's share of the area.
        ratio: range of its width / height.
        flip: probability of a mirror image.
        jitter: strength of brightness, contrast and saturation.
        pooling: "cls" or "patch"; None takes what the model's final norm is made for.
        head: "zero" starts all classes alike, as the published recipes do; "probe" starts from a
            linear probe of the train images (Kumar et al. 2022, arXiv 2202.10054), for runs that
            are too short to find a head as well.
        seed: of everything random.
    """

    epochs: NotNegative = 50
    least_steps: Whole = 0
    batch: Annotated[int, Range(2)] = 512
    lr: NotNegative = 1e-3
    layer_decay: Positive = 0.75
    weight_decay: NotNegative = 0.05
    warmup: Share = 0.1
    mixup: NotNegative = 0.8
    cutmix: NotNegative = 1.0
    smoothing: Share = 0.1
    drop_path: Share = 0.1
    ema: Share = 0.9999
    crop: Annotated[tuple[Portion, Portion], Entries(rising=True)] = (0.2, 1.0)
    ratio: Annotated[tuple[Positive, Positive], Entries(rising=True)] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    jitter: NotNegative = 0.3
    pooling: Literal["cls", "patch"] | None = None
    head: Literal["zero", "probe"] = "zero"
    seed: Whole = 0

    @classmethod
    def cpu(cls, **changes) -> FinetuneRecipe:
        """A run of seconds to minutes on two cores: small steps, little augmentation."""
        plain = dict(mixup=0.0, cutmix=0.0, drop_path=0.0, crop=(1.0, 1.0), ratio=(1.0, 1.0))
        short = dict(epochs=2, batch=32, lr=2e-3, ema=0.99, jitter=0.1, head="probe")
        return replace(cls(**plain, **short), **changes)

    @classmethod
    def gpu(cls, **changes) -> FinetuneRecipe:
        """The published recipes' values, for models of ViT-B's and ViT-L's size."""
        return replace(cls(), **changes)

    @classmethod
    def low_shot(cls, preset: str = "gpu", **changes) -> FinetuneRecipe:
        """For a few labels a class: no mixing of images, at least so many steps."""
        few = {"mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0}
        few |= {"epochs": 8, "least_steps": 24} if preset == "cpu" else {"least_steps": 500}
        return getattr(cls, preset)(**few | changes)


# ---------------------------------------------------------------- the classifier


class Classifier(nn.Module):
    """An encoder and a linear head on its pooled output after the final norm.

    Args:
        encoder: any encoder of the course; it becomes part of this module.
        classes: int64 [C], the label of each output.
        pooling: "cls" or "patch".
    """

    def __init__(self, encoder: Encoder, classes: Tensor, pooling: str):
        super().__init__()
        self.encoder, self.pooling = encoder, pooling
        self.head = nn.Linear(encoder.num_features, len(classes))
        nn.init.trunc_normal_(self.head.weight, std=2e-5)  # MAE's: all classes start alike
        nn.init.zeros_(self.head.bias)
        self.register_buffer("classes", classes)

    def pooled(self, x_BCHW: Tensor) -> Tensor:
        """What the head sees of normalised images, [B, D]."""
        return head_features(self.encoder, x_BCHW, (-1,), pooling=self.pooling)[0]

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """Logits [B, C] of normalised images."""
        return self.head(self.pooled(x_BCHW))

    @torch.no_grad()
    def start_from_probe(self, pixels, y_N: Tensor, *, seed: int = 0) -> None:
        """Sets the head to a linear probe of the encoder as it is.

        Args:
            pixels: uint8 [N, C, H, W].
            y_N: places of the labels among the classes.
            seed: of the part that chooses the penalty; with fewer than five images in a class
                there is no such part, and the penalty is :func:`refiner.low_shot`'s.
        """
        device = self.head.weight.device
        self.eval()
        x_ND = _over_batches(self.pooled, self.encoder, pixels, device).float()
        grid = PENALTIES if int(y_N.bincount().min()) >= 5 else (1e-2,)
        probe = linear_probe(x_ND, y_N, x_ND[:1], y_N[:1], penalties=grid, seed=seed, device=device)
        self.head.weight.copy_(probe.weights.T)
        self.head.bias.copy_(probe.bias)


def _over_batches(
    function, encoder: Encoder, pixels, device: torch.device, batch: int = 256
) -> Tensor:
    """A function of normalised images, batch by batch under autocast, joined."""
    card, found = preprocessing_card(encoder), []
    for start in range(0, len(pixels), batch):
        x = preprocess(pixels[start : start + batch].to(device), card)
        with autocast(device):
            found.append(function(x))
    return torch.cat(found)


@dataclass
class Finetuned:
    """What :func:`finetune` returns.

    Attributes:
        model: the :class:`Classifier` with averaged weights, eval mode.
        history: "step", "loss", "lr" and "seconds" of some steps.
        recipe: how it was made.
    """

    model: Classifier
    history: list[dict]
    recipe: FinetuneRecipe

    @torch.no_grad()
    def predict(self, images: ImageSet | Tensor, *, batch: int = 256) -> Tensor:
        """Labels, int64 [N] on the CPU, of an ImageSet or uint8 [N, C, H, W]."""
        pixels = images.images if isinstance(images, ImageSet) else images
        device = self.model.head.weight.device
        place = _over_batches(
            lambda x: self.model(x).argmax(1), self.model.encoder, pixels, device, batch
        )
        return self.model.classes[place].cpu()

    def accuracy(self, images: ImageSet) -> float:
        """Share of an ImageSet's labels that are predicted."""
        return float((self.predict(images) == images.labels.cpu()).double().mean())


# ---------------------------------------------------------------- training


@parallel.alone()
@one_run_a_folder
def finetune(
    model: Encoder,
    images: ImageSet,
    *,
    recipe: FinetuneRecipe | None = None,
    out: str | Path | None = None,
    resume: bool = False,
    save_every: int | None = None,
    stop: Stop = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Finetuned:
    """Trains a copy of an encoder and a linear head to tell classes apart.

    Args:
        model: the encoder; it stays as it is.
        images: train images with labels.
        recipe: default :meth:`FinetuneRecipe.cpu` on a CPU, else :meth:`FinetuneRecipe.gpu`.
        out: a folder for the training state; without it nothing is written. The state of an
            earlier run there becomes ``finetune.old.pt``.
        resume: go on from the state in ``out``, with the same model and images.
        save_every: steps between saved states; by default every 100th, if the last was a minute
            ago. The last step is always saved.
        stop: ends the run before its last step: a function that is asked before each step and says
            True to stop, or a moment of ``time.monotonic()``; ``resume`` goes on from there.
        device: default CUDA if there is one, else the CPU. On CUDA products are bf16.
        progress: show a bar with the loss and the remaining time.

    Returns:
        A :class:`Finetuned`.

    Raises:
        ValueError: without labels, with fewer than two classes, for a pooling that the model does
            not have or a recipe that does not work; to resume with another model, other images or
            another recipe.
        FloatingPointError: when the loss or a weight is no longer finite; the last saved state is
            kept.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    recipe = recipe or getattr(FinetuneRecipe, "cpu" if device.type == "cpu" else "gpu")()
    options = {"file": Path(out) / "finetune.pt" if out else None}
    options["origin"] = origin(images, model) if out or resume else None
    steps = begin(model, images, recipe, device)
    loop = loop_of(steps, **options, save_every=save_every, stop=stop)
    loop.run("fine-tuning", resume=resume, progress=progress)
    tuned = loop.ema.module if loop.ema else loop.parts["model"]
    return Finetuned(tuned.eval(), loop.history, recipe)


def begin(model: Encoder, images: ImageSet, recipe: FinetuneRecipe, device: torch.device) -> Steps:
    """A copy of a model with a head, before its first step; arguments as for :func:`finetune`."""
    recipe = checked(recipe)
    classes, y_N = _classes(images)
    pooling = _pooling(model, recipe)
    with _random(recipe.seed, 0, device):
        classifier = Classifier(copy_model(model), classes, pooling).to(device)
    if recipe.head == "probe":
        classifier.start_from_probe(images.images, y_N, seed=recipe.seed)
    set_drop_path(classifier.encoder, recipe.drop_path)
    return Steps(classifier, images, y_N, recipe, device)


def loop_of(steps: Steps, **options) -> Loop:
    """The loop that fine-tunes; the options are others of :class:`refiner.training.loop.Loop`."""
    model, recipe = steps.model, steps.recipe
    groups, fused = parameter_groups(model, recipe), steps.device.type == "cuda"
    optimizer = torch.optim.AdamW(groups, lr=recipe.lr, fused=fused)
    peak, warmup = recipe.lr * steps.batch / 256, math.ceil(recipe.warmup * steps.count)
    stages = {1: Stage(steps.count, steps.take, optimizer, peak, warmup)}
    options["ema"] = EMA(model, recipe.ema, warmup=_warmup) if recipe.ema else None
    return Loop({"model": model}, stages, steps.source, steps.device, recipe, **options)


def _warmup(t: int) -> float:
    """timm's decay of the average at update t: 1 - (1 + t)^-2/3."""
    return 1 - (1 + t) ** (-2 / 3)


class Steps:
    """What takes a step: augmented and mixed images in, the loss out.

    Args:
        model: the classifier.
        images: train images.
        y_N: places of their labels among the classes.
        recipe, device: as for :func:`finetune`.
    """

    def __init__(
        self,
        model: Classifier,
        images: ImageSet,
        y_N: Tensor,
        recipe: FinetuneRecipe,
        device: torch.device,
    ):
        self.model, self.recipe, self.device = model, recipe, device
        self.batch = min(recipe.batch, len(images)) // 2 * 2
        per_epoch = len(images) // self.batch
        self.count = max(1, round(recipe.epochs * per_epoch), recipe.least_steps)
        self.source = shuffled(images, self.batch, self.count, device, recipe.seed)
        self.labels = y_N.to(device)
        self.card = preprocessing_card(model.encoder)
        view = _view(self.card["preprocessing"]["size"], recipe)
        self.view = view if channels_of(model.encoder) == 3 else without_colour(view)
        how = {"label_smoothing": recipe.smoothing, "num_classes": len(model.classes)}
        self.mix = Mixup(recipe.mixup, recipe.cutmix, **how)
        self.mix.mixup_enabled = recipe.mixup > 0 or recipe.cutmix > 0
        self.loss = SoftTargetCrossEntropy()

    def take(self, step: int) -> tuple[Tensor, dict[str, Tensor]]:
        """A step's loss, to be minimised and to be logged."""
        self.model.train()
        with _random(self.recipe.seed, step, self.device), autocast(self.device):
            x, target = self.mixed(step)
            loss = self.loss(self.model(x).float(), target)
        return loss, {"loss": loss}

    def mixed(self, step: int) -> tuple[Tensor, Tensor]:
        """A step's normalised images [B, C, S, S] and soft targets [B, C]."""
        generator = step_generator(self.recipe.seed, step, self.device)
        pixels, ids = self.source.batch(step)
        x = make_view(pixels, self.view, generator)
        return self.mix(normalize(x, self.card), self.labels[ids])


def _classes(images: ImageSet) -> tuple[Tensor, Tensor]:
    """The labels that occur, and each image's place among them, int64 [N]."""
    if images.labels is None:
        raise UserError("fine-tuning needs labels; give a folder with one sub-folder a class")
    classes, y_N = images.labels.cpu().unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError("fine-tuning needs at least two classes")
    return classes, y_N


def _pooling(model: Encoder, recipe: FinetuneRecipe) -> str:
    pooling = recipe.pooling or final_pooling(model)
    if pooling not in ("cls", "patch") or (pooling == "cls" and not has_class_token(model)):
        raise UserError(f"this model cannot be pooled by {pooling!r}")
    return pooling


def _view(size: int, recipe: FinetuneRecipe) -> View:
    light = dict.fromkeys(("brightness", "contrast", "saturation"), recipe.jitter)
    crop = dict(size=size, scale=recipe.crop, ratio=recipe.ratio, flip=recipe.flip)
    return View(**crop, **light, jitter=float(recipe.jitter > 0), hue=0.0, gray=0.0)


@contextmanager
def _random(seed: int, step: int, device: torch.device) -> Iterator[None]:
    """torch's and numpy's global draws of a step; afterwards both are as they were.

    timm's mixup and stochastic depth draw from them.
    """
    before = np.random.get_state()
    drawn = np.random.SeedSequence([seed, step, 7]).generate_state(1)[0]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(int(drawn))
        np.random.seed(drawn)
        try:
            yield
        finally:
            np.random.set_state(before)


def set_drop_path(model: Encoder, rate: float) -> None:
    """Stochastic depth that rises linearly over the blocks (Huang et al. 2016, arXiv 1603.09382).

    Args:
        model: changed in place.
        rate: of the last block; the first has none.
    """
    depth = len(model.blocks)
    for i, block in enumerate(model.blocks):
        share = rate * i / max(1, depth - 1)
        for name in ("drop_path1", "drop_path2"):
            if hasattr(block, name):
                setattr(block, name, DropPath(share) if share else nn.Identity())


def parameter_groups(model: Classifier, recipe: FinetuneRecipe) -> list[dict]:
    """AdamW's groups with layer-wise decay: the head at the full rate, the last block below it."""
    decay = recipe.layer_decay
    groups = layer_groups(model.encoder, recipe.weight_decay, decay)
    below = [group | {"lr_scale": group["lr_scale"] * decay} for group in groups]
    head = [
        {"params": [model.head.weight], "weight_decay": recipe.weight_decay, "lr_scale": 1.0},
        {"params": [model.head.bias], "weight_decay": 0.0, "lr_scale": 1.0},
    ]
    return below + head


# ---------------------------------------------------------------- few labels


def few_labels(images: ImageSet, size: float, *, draw: int = 0, seed: int = 0) -> ImageSet:
    """The labelled images of one draw, those that :func:`refiner.low_shot` takes.

    Args:
        images: train images with labels.
        size: labels a class if a whole number from 1 on, else a share of each class, at least one.
        draw, seed: which draw.

    Returns:
        The chosen images.

    Raises:
        ValueError: without labels, or for a size that the smallest class does not have.
    """
    _, y_N = _classes(images)
    groups = shuffled_by_class(y_N, np.random.default_rng([seed, draw]))
    share = size < 1
    counts = [max(1, round(size * len(g))) if share else int(size) for g in groups]
    if size <= 0 or (not share and (size != int(size) or size > min(map(len, groups)))):
        raise UserError(
            f"{size} labels a class cannot be drawn: give a share below 1, or a whole number up to "
            f"{min(map(len, groups))}, the images of the smallest class"
        )
    chosen = np.concatenate([g[:n] for g, n in zip(groups, counts, strict=True)])
    return images[torch.from_numpy(np.sort(chosen))]
