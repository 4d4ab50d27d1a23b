"""A guard for refining: the best weights are kept, and a verdict says what refining was good for.

A part of the images is held out of training. A few times on the way, and at points of the straight
line between the weights before and after (Wortsman et al. 2022, arXiv 2109.01903), the best reading
of the averaged encoder is chosen on train images, anew each time, and measured on that part.

Which weights are best is chosen on the held-out images, and a best of several flatters itself. So
the verdict is cross-fitted: each half of the held-out images judges the weights that are best on
the other half. It uses every image, and none of them judges what it has chosen.

Shape legend: N images, M of them held out, C weights that were tried.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base import parallel
from refiner.images.sets import held_out_rows, pixels_of
from refiner.images.sources import come_again
from refiner.models.encoders import Encoder, patch_count, prefix_tokens
from refiner.probing.choosing import (
    MEASURES,
    TRUSTED,
    best_reading,
    bootstrap,
    by_knn,
    rank_readings,
    right_across,
)
from refiner.probing.features import Features, extract, extract_part
from refiner.probing.readings import pooling_words
from refiner.training.recipe import Recipe

LEAST, MOST = 100, 1000  # images that are held out: a tenth, within these
BANK = 1000  # train images that vote
MOMENTS = 4  # of stage 3, evenly spaced; the last one is its end
SHARES = {f"{share} of the way": share for share in (0.25, 0.5, 0.75)}  # from before to after
TIMES = 1 + MOMENTS + len(SHARES)  # that something is measured

Weights = dict[str, Tensor]


class Measured(NamedTuple):
    """What was found of some weights.

    Attributes:
        name: "before", "step 80" or "0.25 of the way".
        score: accuracy of the best reading; without labels the largest participation ratio.
        reading: which one, in words.
        right_M: which held-out images it gets right, bool [M]; None without labels.
    """

    name: str
    score: float
    reading: str
    right_M: Tensor | None


# ---------------------------------------------------------------- the verdict


@dataclass(frozen=True)
class Verdict:
    """Whether to keep the refined model; ``print`` it.

    Attributes:
        kept: the weights that were best on the held-out images and are returned: "before",
            "step 80" or "0.25 of the way" from the weights before to those after.
        images: how many were held out.
        by: "k-NN", or without labels the name of the measure.
        refined, before: what the best reading of each has. That of the refined model is
            cross-fitted: each half of the images judges the weights that the other half chose.
        readings: the best reading of the refined model and of the one before, in words.
        interval: 95 % of the resampled accuracies of the refined model; None without labels.
        gain: the same of the differences to the model before, by the same images.
    """

    kept: str
    images: int
    by: str
    refined: float
    before: float
    readings: tuple[str, str]
    interval: tuple[float, float] | None = None
    gain: tuple[float, float] | None = None

    @property
    def real(self) -> bool:
        """Whether the two differ by more than chance among the held-out images."""
        return self.gain is not None and (self.gain[0] > 0 or self.gain[1] < 0)

    def __str__(self) -> str:
        refined, before = self.readings
        new = self.kept != "before"
        if self.interval is None:
            which = f"refined model, read at {refined}" if new else f"model before, at {before}"
            return (
                f"Keep the {which}: a guess, as there are no labels to measure by. On "
                f"{self.images} held-out images the {self.by} of the refined model is "
                f"{self.refined:.2f}, that of the model before {self.before:.2f}."
            )
        low, high = (f"{100 * end:.1f}" for end in self.interval)
        has = f"{100 * self.refined:.1f} % by {self.by} ({low}–{high})"
        had = f"{100 * self.before:.1f} %"
        if not self.real:
            return (
                f"No difference that {self.images} held-out images could show: the refined model, "
                f"read at {refined}, has {has}, the model before, read at {before}, {had}; "
                f"{'the refined weights' if new else 'those before'} are kept."
            )
        if new:
            return (
                f"Keep the refined model, read at {refined}: {has} on {self.images} held-out "
                f"images; the best reading of the model before has {had}."
            )
        return (
            f"Keep the model before, read at {before}: {had} by {self.by} on {self.images} "
            f"held-out images; the best reading of the refined model has {has}."
        )


def verdict_of(measured: Sequence[Measured], images: int, seed: int = 0) -> Verdict:
    """The verdict on refined weights by what was measured; the first are those before.

    The weights that are kept have the highest score of all, the earliest of equals. Where the
    refined ones are really worse, those before are kept.

    Args:
        measured: at least two.
        images: how many were held out.
        seed: of the halves and the resamples.
    """
    before, *others = measured
    best, refined = (max(some, key=lambda m: m.score) for some in (measured, others))
    readings = refined.reading, before.reading
    if before.right_M is None:
        name = MEASURES[TRUSTED].name
        return Verdict(best.name, images, name, refined.score, before.score, readings)
    right_M = cross_fitted(torch.stack([m.right_M for m in others]), seed)
    gain = bootstrap((right_M - before.right_M.double())[None], seed=seed)
    kept, name = "before" if gain[1] < 0 else best.name, by_knn().words
    interval, score = bootstrap(right_M[None], seed=seed), float(right_M.mean())
    return Verdict(kept, images, name, score, before.score, readings, interval, gain)


def cross_fitted(right_CM: Tensor, seed: int = 0) -> Tensor:
    """Which images are right by what the other half of the images chose, float64 [M].

    Args:
        right_CM: which of M images each of C candidates gets right.
        seed: of the halves.
    """
    order = torch.randperm(right_CM.shape[1], generator=torch.Generator().manual_seed(seed))
    halves, found = order.chunk(2), right_CM.double()
    chosen = [int(found[:, half].mean(1).argmax()) for half in reversed(halves)]
    judged = torch.empty_like(found[0])
    for half, c in zip(halves, chosen, strict=True):
        judged[half] = found[c, half]
    return judged


# ---------------------------------------------------------------- while it trains


@dataclass(eq=False)
class Keeper:
    """Measures the averaged encoder on the way, and remembers the best of its weights.

    Of several processes the first measures, and tells the others what it found.

    Attributes:
        model: the encoder before; it stays as it is.
        images: all of them.
        used, bank, held: positions of those that are trained on, vote (some of these, none without
            labels), and ask.
        labels: int64 [N]; None without labels that tell classes.
        groups: int64 [N]; then each image is asked of the voters of other groups only.
        recipe: the run's.
        device: where to measure.
        measured: the weights before, then those of each moment.
        best: the weights of the best moment.
    """

    model: Encoder
    images: object
    used: Tensor
    bank: Tensor
    held: Tensor
    labels: Tensor | None
    groups: Tensor | None
    recipe: Recipe
    device: torch.device
    measured: list[Measured] = field(default_factory=list)
    best: Weights | None = None

    def due(self, step: int) -> bool:
        """Whether to measure after so many steps of stage 3."""
        return step in {math.ceil(self.recipe.steps * i / MOMENTS) for i in range(1, MOMENTS + 1)}

    def look(self, step: int, model: Encoder) -> dict[str, float]:
        """Measures an encoder after a step of stage 3; its score, for the history."""
        if not self.measured:
            self._add("before", self.model)
        found = self._add(_moment(step), model)
        if self.best is None or found.score > max(m.score for m in self.measured[1:-1]):
            self.best = _weights(model)
        return {"held_out": round(found.score, 4)}

    def decide(self, step: int, model: Encoder, *, progress: bool = False) -> Verdict:
        """Tries the straight line between the weights before and after, and takes the best.

        Args:
            step: of stage 3 after which ``model`` stands.
            model: is left with the best weights.
            progress: show a bar.
        """
        if not self.measured or self.measured[-1].name != _moment(step):
            self.look(step, model)
        before, after = _weights(self.model), _weights(model)
        for name in tqdm(SHARES, desc="between before and after", disable=not progress):
            model.load_state_dict(_between(before, after, SHARES[name]))
            self._add(name, model)
        verdict = verdict_of(self.measured, len(self.held), self.recipe.seed)
        kept = before if verdict.kept == "before" else self.best  # of the moments only it can win
        if verdict.kept in SHARES:
            kept = _between(before, after, SHARES[verdict.kept])
        model.load_state_dict(kept)
        return verdict

    def state(self) -> dict:
        """What a resumed run needs."""
        return {"measured": [tuple(m) for m in self.measured], "best": self.best}

    def restore(self, state: dict) -> None:
        """Goes on where :meth:`state` was."""
        self.measured, self.best = [Measured(*m) for m in state["measured"]], state["best"]

    def _add(self, name: str, model: Encoder) -> Measured:
        """Measures some weights."""
        own = self._measure(name, model) if parallel.rank() == 0 else None
        self.measured.append(parallel.first_gives(own))
        return self.measured[-1]

    def _measure(self, name: str, model: Encoder) -> Measured:
        """Reads an encoder by what is chosen among its frozen blocks, read once, and the others."""
        if not self._first:
            found = [self._read(extract(model, self._pixels, device=self.device, progress=False))]
        else:
            blocks, (below, tokens) = range(self._first + 1, len(model.blocks) + 1), self._below
            known = self._first, tokens
            above, _ = extract_part(model, self._pixels, blocks, known, device=self.device)
            found = [self._read(above), below]
        return Measured(name, *max(found, key=lambda f: f[0])[1:])

    def _read(self, features: Features) -> tuple:
        """What the best reading is chosen by, and what :class:`Measured` says of it."""
        voters = len(self.bank)
        bank, held = features.rows(slice(voters)), features.rows(slice(voters, None))
        if self.labels is None:
            ranking = rank_readings(held)
            block, pooling = ranking.order()[0]
            score = float(ranking.scores(TRUSTED).nan_to_num(-math.inf).max())
            return score, score, f"block {block}, {pooling_words(pooling)}", None
        own, asked = (
            None if self.groups is None else self.groups[i] for i in (self.bank, self.held)
        )
        choice = best_reading(bank, self.labels[self.bank], groups=own, device=self.device)
        reading, truth = choice.reading, self.labels[self.held]
        x, z = (reading.apply(side).to(self.device) for side in (bank, held))
        right_M = right_across(choice.objective, x, choice.labels, z, truth, own, asked)[0]
        best = max(choice.scores.values())
        return best, float(right_M.double().mean()), str(reading), right_M

    @cached_property
    def _pixels(self) -> Tensor:
        """Of the bank, then of the held-out images: read from their files once."""
        return pixels_of(self.images)[torch.cat([self.bank, self.held])]

    @cached_property
    def _first(self) -> int:
        """How many frozen blocks are run only once, if the tokens after them fit in memory."""
        tokens = prefix_tokens(self.model) + patch_count(self.model)
        size = 4 * len(self._pixels) * tokens * self.model.embed_dim
        return self.recipe.frozen_blocks if size <= 2**30 else 0

    @cached_property
    def _below(self) -> tuple[tuple, Tensor]:
        """The frozen blocks' best reading, and the tokens after them, [N, T, D]."""
        blocks = range(1, self._first + 1)
        below, tokens = extract_part(self.model, self._pixels, blocks, device=self.device)
        return self._read(below), tokens


def keeper_of(
    recipe: Recipe, model: Encoder, images, device: torch.device, groups: Tensor | None = None
) -> Keeper | None:
    """The keeper that a recipe asks for, if the images allow one.

    Warns:
        UserWarning: where they do not.
    """
    if recipe.keep == "last" or not recipe.steps:
        return None
    if not come_again(images):
        return _without("a stream has no images to hold out")
    n, labels = len(images), _telling(images)
    held = min(max(LEAST, n // 10), MOST)
    if n < 4 * held or n - held < recipe.batch:
        return _without(f"{n} images are too few to hold {held} out")
    used, held = held_out_rows(labels, n, held / n, seed=recipe.seed)
    bank = used if labels is not None else used[:0]
    if len(bank) > BANK:
        share = BANK / len(used)
        bank = used[held_out_rows(labels[used], len(used), share, seed=recipe.seed)[1]]
    if groups is not None and len(groups[bank].unique()) < 2:
        groups = None
    return Keeper(model, images, used, bank, held, labels, groups, recipe, device)


def _without(reason: str) -> None:
    if parallel.rank() == 0:
        warnings.warn(f"{reason}: the last weights are kept, without a verdict", stacklevel=2)


def _telling(images) -> Tensor | None:
    """Labels by which readings can be chosen."""
    labels = getattr(images, "labels", None)
    classes = 0 if labels is None else len(labels.unique())
    return labels.cpu() if 1 < classes <= len(images) // 4 else None


def _moment(step: int) -> str:
    return f"step {step}"


def _weights(model: Encoder) -> Weights:
    """A copy on the CPU."""
    return {name: value.detach().cpu().clone() for name, value in model.state_dict().items()}


def _between(before: Weights, after: Weights, share: float) -> Weights:
    """The weights at a share of the straight line."""
    return {
        name: before[name].lerp(value, share) if value.is_floating_point() else value
        for name, value in after.items()
    }
