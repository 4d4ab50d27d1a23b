"""The protocols of the paper's tables: functions from a model and its images to plain scores.

Linear probing, k-NN, few labels, clusters, transfer, robustness, dense labels and fine-tuning; each
protocol takes a :class:`Subject` and returns a list of dicts made by :func:`score`.

Nothing is ever chosen with test labels: they are read by the last line of a protocol, which counts
what is right. Blocks, poolings and penalties are chosen on held-out train images; a recipe is what
it is before the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from typing import Annotated

import numpy as np
import torch
from torch import Tensor

from refiner.base import tensors
from refiner.base.pages import json_ready
from refiner.base.settings import Count, Entries, Portion, Positive, Range, Whole
from refiner.evaluation.segmentation import linear_segmentation
from refiner.images import toybox
from refiner.images.corruptions import CORRUPTIONS, corrupted
from refiner.images.dense import DenseSet
from refiner.images.sets import ImageSet
from refiner.models.encoders import Encoder
from refiner.probing import neighbors, probes
from refiner.probing.clusters import clustering
from refiner.probing.features import NAMES, Features, extract
from refiner.probing.probes import LinearProbe, linear_probe
from refiner.training.finetuning import FinetuneRecipe, few_labels, finetune

K = 10  # neighbors that vote
# Toybox factors outside of what the train images show: the variant's changes, and what is kept of
# its images (None keeps all). Angles in degrees.
_far = lambda f: np.maximum(np.abs(f["x"]), np.abs(f["y"])) > 0.12  # noqa: E731
_busy = {"busy": True, "background_contrast": 0.3, "background_saturation": 0.4}
SHIFTS: dict[str, tuple[dict, Callable | None]] = {
    "turned further (yaw 50 to 90°)": ({"yaw": 90.0}, lambda f: np.abs(f["yaw"]) > 50),
    "tilted further (roll 11 to 30°)": ({"roll": 30.0}, lambda f: np.abs(f["roll"]) > 11),
    "smaller (scale 0.5 to 0.75)": ({"scale": (0.5, 0.75)}, None),
    "moved away (0.12 to 0.3)": ({"shift": 0.3}, _far),
    "stronger colours": ({"saturation": (0.8, 1.0)}, None),
    "busy background": (_busy, None),
}


@dataclass(frozen=True)
class EvaluationSettings:
    """How much is measured. Numbers of images are upper limits.

    Attributes:
        n, n_test: train and test images; None takes all.
        linear_blocks: last blocks of the linear probes to choose from, evenly spaced over the
            second half of the depth; 0 takes every block.
        shots, fractions, draws: of the probes with few labels.
        kmeans_seeds: runs of k-means.
        corrupted: test images that are corrupted.
        severities: of the corruptions.
        shifted: images rendered for each shift.
        dense, dense_test: images of the segmentation.
        dense_pixels: of each that its classifier learns from.
        full: recipe of full fine-tuning.
        full_images, full_seeds: train images and runs of it.
        few: recipe of fine-tuning with few labels.
        few_sizes, few_draws: labels a class (or shares), and runs of it.
        finetune_test: test images for both.
        seed: of everything random.
    """

    n: Count | None = None
    n_test: Count | None = None
    linear_blocks: Whole = 0
    shots: tuple[Count, ...] = (1, 2, 5)
    fractions: tuple[Portion, ...] = (0.01, 0.1)
    draws: Count = 10
    kmeans_seeds: Count = 5
    corrupted: Count | None = 5000
    severities: Annotated[tuple[Annotated[int, Range(1, 5)], ...], Entries(1)] = (1, 2, 3, 4, 5)
    shifted: Count = 2048
    dense: Count | None = 5000
    dense_test: Count | None = 2000
    dense_pixels: Count = 32
    full: FinetuneRecipe = field(default_factory=FinetuneRecipe.gpu)
    full_images: Count | None = None
    full_seeds: Count = 3
    few: FinetuneRecipe = field(default_factory=lambda: FinetuneRecipe.low_shot("gpu"))
    few_sizes: tuple[Positive, ...] = (1, 5, 0.01, 0.1)
    few_draws: Count = 3
    finetune_test: Count | None = None
    seed: Whole = 0

    @classmethod
    def cpu(cls, **changes) -> EvaluationSettings:
        """Minutes for the embedded models on two cores."""
        frozen = dict(n=3200, n_test=1024, linear_blocks=3, fractions=(0.02, 0.1), kmeans_seeds=3)
        images = dict(corrupted=96, shifted=192, dense=512, dense_test=256, dense_pixels=16)
        full = dict(full=FinetuneRecipe.cpu(), full_images=640, full_seeds=2, finetune_test=512)
        few = dict(few=FinetuneRecipe.low_shot("cpu"), few_sizes=(5,), few_draws=2)
        return replace(cls(**frozen, **images, **full, **few), **changes)

    @classmethod
    def gpu(cls, **changes) -> EvaluationSettings:
        """Everything, on all images."""
        return replace(cls(), **changes)


# ---------------------------------------------------------------- a model and its images


@dataclass(eq=False)
class Subject:
    """A model with the images it is measured on; what several rows need is made once.

    Attributes:
        model: the encoder.
        train, test: the images, with labels.
        settings: see :class:`EvaluationSettings`.
        device: where to run; None decides by itself.
        dense: images with maps, train and test, if there are any.
        progress: show a bar while fine-tuning.
    """

    model: Encoder
    train: ImageSet
    test: ImageSet
    settings: EvaluationSettings
    device: torch.device | str | None = None
    dense: tuple[DenseSet, DenseSet] | None = None
    progress: bool = False

    @property
    def options(self) -> dict:
        """Seed and device, as the probes take them."""
        return {"seed": self.settings.seed, "device": self.device}

    def extract(self, images: ImageSet | Iterable[Tensor]) -> Features:
        return extract(self.model, images, device=self.device, progress=False)

    @cached_property
    def features(self) -> tuple[Features, Features]:
        """Of train and test images."""
        return self.extract(self.train), self.extract(self.test)

    @property
    def poolings(self) -> list[str]:
        """The kinds of features: the patch mean, and before it the class token if there is one."""
        return [p for p in ("cls", "patch") if p in self.features[0]]

    @cached_property
    def linear(self) -> ChosenProbe:
        """The linear probe that is best on held-out train images."""
        count = self.settings.linear_blocks
        return choose_probe(self.features[0], self.train.labels, count=count, **self.options)


def score(name: str, value: float, spread: float, of: str, **more) -> dict:
    """One figure of a row.

    Args:
        name: what was measured.
        value: a share, from 0 to 1.
        spread: its standard deviation over ``of``.
        of: what was varied: "test images", "draws", "seeds", or two of them.
        **more: ``main=True`` for the figure that stands for its row, ``choice`` for what was chosen
            on train images, ``detail`` for more numbers.
    """
    figure = {"name": name, "value": float(value), "spread": float(spread), "of": of}
    return figure | json_ready(more)


def share(name: str, right: Tensor, **more) -> dict:
    """The score of a share of right answers, bool [N] (or their mean over some trials, [N]).

    Its spread is the standard error over the images.
    """
    right = right.double()
    spread = right.std(correction=0) / math.sqrt(len(right))
    return score(name, float(right.mean()), float(spread), "test images", **more)


# ---------------------------------------------------------------- frozen features


def knn(s: Subject) -> list[dict]:
    """Weighted k-NN: the last block, and the block that train images choose by leave-one-out."""
    (x, z), y, t = s.features, s.train.labels, s.test.labels
    scores, candidates = [], []
    for i, pooling in enumerate(s.poolings):
        right = _knn_predictions(x[pooling][-1], y, z[pooling][-1], s.device) == t
        scores.append(share(f"last block, {NAMES[pooling]}", right, main=i == 0))
        alone = neighbors.knn_accuracy(x[pooling], y, k=K, device=s.device)
        candidates += [(float(a), pooling, b) for b, a in enumerate(alone)]
    alone, pooling, b = max(candidates, key=lambda c: c[0])
    right = _knn_predictions(x[pooling][b], y, z[pooling][b], s.device) == t
    choice = {"block": x.blocks[b], "pooling": pooling, "leave_one_out": alone}
    return [*scores, share("chosen block and pooling", right, choice=choice)]


def _knn_predictions(x: Tensor, y: Tensor, z: Tensor, device) -> Tensor:
    return neighbors.knn_predict(x, y, z, k=min(K, len(x)), device=device)[1]


@dataclass(frozen=True, eq=False)
class ChosenProbe:
    """A linear probe and the features it reads.

    Attributes:
        poolings: which are joined.
        rows: which of the extracted blocks are joined.
        probe: fitted on the joined features [N, D].
        choice: what was chosen, and its accuracy on held-out train images.
    """

    poolings: tuple[str, ...]
    rows: tuple[int, ...]
    probe: LinearProbe
    choice: dict

    def joined(self, features: Features) -> Tensor:
        """The probe's input, [N, D], of features that hold every block."""
        return _joined(features, self.poolings, self.rows)

    def predict(self, features: Features) -> Tensor:
        """Labels, int64 [N]."""
        return self.probe.predict(self.joined(features))


def choose_probe(
    features: Features, labels: Tensor, *, count: int = 0, seed: int = 0, device=None
) -> ChosenProbe:
    """The best linear probe on held-out train images.

    Tried are blocks × {class token, class token and patch mean} × {one block, the last four up to
    it} × penalties, as in DINOv2's linear evaluation (Oquab et al. 2023, arXiv 2304.07193).

    Args:
        features: of the train images.
        labels: int64 [N].
        count: how many blocks of the second half of the depth; 0 tries every block.
        seed: of the held-out part.
        device: where to fit.
    """
    depth = len(features.blocks)
    ends = range(depth)
    if count:
        ends = np.linspace(depth - 1, depth // 2, min(count, depth - depth // 2)).round()
        ends = sorted({int(e) for e in ends})
    kinds = [("cls",), ("cls", "patch")] if "cls" in features else [("patch",)]
    best = (-1.0, None)
    for poolings, width in product(kinds, sorted({1, min(4, depth)})):
        spans = [tuple(range(e - width + 1, e + 1)) for e in ends if e >= width - 1]
        x = torch.stack([_joined(features, poolings, rows) for rows in spans])
        # The last argument's labels only score what is not read here.
        found = linear_probe(x, labels, x[:, :1], labels[:1], seed=seed, device=device)
        held = found.validation.amax(0)
        i = int(held.argmax())
        if float(held[i]) > best[0]:
            best = float(held[i]), (poolings, spans[i], _one_block(found, i))
    held, (poolings, rows, probe) = best
    choice = {"blocks": [features.blocks[r] for r in rows], "poolings": list(poolings)}
    choice |= {"penalty": float(probe.penalty), "validation": held}
    return ChosenProbe(poolings, rows, probe, choice)


def _joined(features: Features, poolings: Sequence[str], rows: Sequence[int]) -> Tensor:
    """Features of some blocks and poolings side by side, [N, D]."""
    return torch.cat([features[p][r] for r in rows for p in poolings], dim=-1)


def _one_block(probe: LinearProbe, i: int) -> LinearProbe:
    by_block = ("accuracy", "penalty", "weights", "bias", "objective", "gap", "converged")
    values = {name: getattr(probe, name)[i] for name in by_block}
    return replace(probe, validation=probe.validation[:, i], **values)


def linear(s: Subject) -> list[dict]:
    """Linear probes: the one chosen on held-out train images, and the last block's."""
    (x, z), y, t = s.features, s.train.labels, s.test.labels
    scores = [share("chosen probe", s.linear.predict(z) == t, main=True, choice=s.linear.choice)]
    for pooling in s.poolings:
        found = linear_probe(x[pooling][-1], y, z[pooling][-1], t, **s.options)
        right = found.predict(z[pooling][-1]) == t
        choice = {"penalty": float(found.penalty)}
        scores.append(share(f"last block, {NAMES[pooling]}", right, choice=choice))
    return scores


def low_shot(s: Subject) -> list[dict]:
    """Linear classifiers that see a few labels, over several draws; last block."""
    (x, z), settings, scores = s.features, s.settings, []
    shots = probes.possible_shots(settings.shots, settings.fractions, s.train.labels)
    options = {"fractions": settings.fractions, "draws": settings.draws, **s.options}
    for pooling in s.poolings:
        data = x[pooling][-1], s.train.labels, z[pooling][-1], s.test.labels
        found = probes.low_shot(*data, shots=shots, **options)
        for size, mean, spread in zip(found.sizes, found.mean, found.spread, strict=True):
            main = size == 1 and pooling == s.poolings[0]
            name = f"{_labels(size)}, {NAMES[pooling]}"
            scores.append(score(name, mean, spread, "draws", main=main))
    return scores


def _labels(size: float) -> str:
    if size < 1:
        return f"{100 * size:g} % of the labels"
    return f"{size:g} label{'s' if size > 1 else ''} a class"


def clusters(s: Subject) -> list[dict]:
    """k-means on the test images, as many clusters as the train images have classes."""
    k, scores = len(s.train.labels.unique()), []
    for pooling in s.poolings:
        z = s.features[1][pooling][-1]
        runs = [
            clustering(z, s.test.labels, k=k, seed=s.settings.seed + i, device=s.device)
            for i in range(s.settings.kmeans_seeds)
        ]
        for name in ("acc", "nmi", "ari"):
            values = torch.stack([run[name] for run in runs]).double()
            main = name == "acc" and pooling == s.poolings[0]
            name = f"{name.upper()}, {NAMES[pooling]}"
            scores.append(score(name, values.mean(), values.std(correction=0), "seeds", main=main))
    return scores


# ---------------------------------------------------------------- other images


def transfer(s: Subject) -> list[dict]:
    """k-NN and the chosen linear probe on another image set."""
    (x, z), right = s.features, s.linear.predict(s.features[1]) == s.test.labels
    scores = [share("linear probe", right, main=True, choice=s.linear.choice)]
    for pooling in s.poolings:
        right = _knn_predictions(x[pooling][-1], s.train.labels, z[pooling][-1], s.device)
        scores.append(share(f"k-NN, {NAMES[pooling]}", right == s.test.labels))
    return scores


def _right(s: Subject, features: Features, labels: Tensor) -> dict[str, Tensor]:
    """Which of some images the clean train images' probe and neighbors get right, bool [N] each."""
    x, y, main = s.features[0], s.train.labels, s.poolings[0]
    near = _knn_predictions(x[main][-1], y, features[main][-1], s.device)
    return {"linear probe": s.linear.predict(features) == labels, "k-NN": near == labels}


def corruptions(s: Subject) -> list[dict]:
    """The chosen probe and k-NN, learned from clean images, on corrupted test images."""
    test = s.test[: s.settings.corrupted]
    right = {"linear probe": [], "k-NN": []}
    device = tensors.device_for(s.device, test.labels)
    for name in CORRUPTIONS:
        for severity in s.settings.severities:
            batches = corrupted(test, name, severity, seed=s.settings.seed, device=device)
            for kind, r in _right(s, s.extract(batches), test.labels).items():
                right[kind].append(r)
    clean = _right(s, s.extract(test), test.labels)
    scores = []
    for kind, each in right.items():
        # [corruptions, severities, N]; an image's trials are no independent images.
        table = torch.stack(each).double().unflatten(0, (len(CORRUPTIONS), -1))
        detail = {
            "corruptions": list(CORRUPTIONS),
            "severities": s.settings.severities,
            "accuracy": table.mean(-1),
            "clean": float(clean[kind].double().mean()),
        }
        scores.append(share(kind, table.mean((0, 1)), main=kind == "linear probe", detail=detail))
    return scores


def shifts(s: Subject) -> list[dict]:
    """The same on Toybox images whose factors lie outside of what the train images show."""
    size, scores, every = s.test.images.shape[-1], [], []
    for name in SHIFTS:
        images = shifted_toybox(name, s.settings.shifted, size=size, seed=s.settings.seed)
        right = _right(s, s.extract(images), images.labels)["linear probe"]
        every.append(right.double().mean())
        scores.append(share(name, right))
    mean = torch.stack(every).mean()
    spread = math.sqrt(sum(x["spread"] ** 2 for x in scores)) / len(scores)
    return [score("mean, linear probe", mean, spread, "test images", main=True), *scores]


def shifted_toybox(name: str, n: int, *, size: int = 32, seed: int = 0) -> ImageSet:
    """Test images of Toybox with one factor outside of the train images' range.

    Args:
        name: a key of :data:`SHIFTS`.
        n: images to render; where a range has a hole about half of them are kept.
        size: height and width, pixels.
        seed: of the scenes.
    """
    changes, keep = SHIFTS[name]
    variant = replace(toybox.VARIANTS["toybox"], **changes)
    images = toybox.render(n, split="test", size=size, seed=seed, variant=variant)
    images.name = name
    return images if keep is None else images[torch.from_numpy(keep(images.factors))]


def segmentation(s: Subject) -> list[dict]:
    """Linear segmentation on patch features: the last block, and one that train images choose."""
    train, test = s.dense
    depth = len(s.model.blocks)
    blocks = sorted({depth, max(1, round(depth * 5 / 6)), max(1, round(depth * 2 / 3))})
    options = {"blocks": blocks, "pixels": s.settings.dense_pixels, **s.options}
    found = linear_segmentation(s.model, train, test, **options)
    last, best, of = len(blocks) - 1, found.best, "test images"
    choice = {"block": blocks[best], "validation": found.validation[best]}
    scores = [
        score("mIoU, last block", found.miou[last], found.spread[last], of, main=True),
        score("mIoU, chosen block", found.miou[best], found.spread[best], of, choice=choice),
    ]
    objects = found.object_iou[last], found.object_spread[last]
    return scores + ([] if objects[0].isnan() else [score("object IoU, last block", *objects, of)])


# ---------------------------------------------------------------- fine-tuning


def full_finetuning(s: Subject) -> list[dict]:
    """The whole encoder trained on all labels, over several seeds."""
    settings = s.settings
    train, test = s.train[: settings.full_images], s.test[: settings.finetune_test]
    seeds = range(settings.seed, settings.seed + settings.full_seeds)
    runs = [_finetuned(s, train, test, replace(settings.full, seed=seed)) for seed in seeds]
    name = f"{len(train)} images, {settings.full_seeds} seeds"
    return [_over_runs(name, runs, "seeds", len(test), main=True)]


def few_finetuning(s: Subject) -> list[dict]:
    """The same on a few labels, over several draws."""
    settings, scores = s.settings, []
    test = s.test[: settings.finetune_test]
    for i, size in enumerate(settings.few_sizes):
        runs = []
        for draw in range(settings.few_draws):
            train = few_labels(s.train, size, draw=draw, seed=settings.seed)
            recipe = replace(settings.few, seed=settings.seed + draw)
            runs.append(_finetuned(s, train, test, recipe))
        scores.append(_over_runs(_labels(size), runs, "draws", len(test), main=i == 0))
    return scores


def _finetuned(s: Subject, train: ImageSet, test: ImageSet, recipe: FinetuneRecipe) -> float:
    run = finetune(s.model, train, recipe=recipe, device=s.device, progress=s.progress)
    return run.accuracy(test)


def _over_runs(name: str, runs: Sequence[float], of: str, n_test: int, **more) -> dict:
    """Mean over runs. Spread: of a run, by what is drawn for it and by its test images.

    A few runs that happen to agree would otherwise look infinitely sure.
    """
    mean = float(np.mean(runs))
    images = mean * (1 - mean) / n_test
    spread = math.sqrt(images + (np.var(runs, ddof=1) if len(runs) > 1 else 0.0))
    of = f"{of} and test images" if len(runs) > 1 else "test images"
    return score(name, mean, spread, of, detail={"runs": list(runs)}, **more)
