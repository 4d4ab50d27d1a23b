"""The choice among readings: on train images alone, or without labels.

An objective says what a reading shall be good at, a measure what can be said of it without labels.
A new one of either is one function, and a line in ``OBJECTIVES`` or ``MEASURES``.

Shape legend: L blocks, N train and M test images, D width of a reading, P places (block and
pooling), V views, R trials (draws of labels, or one).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.settings import checked
from refiner.base.tensors import class_labels, group_numbers
from refiner.probing import measures, neighbors, probes
from refiner.probing.features import Features
from refiner.probing.readings import (
    STANDARDISED,
    TRANSFORMS,
    Reading,
    Spectrum,
    Transform,
    affine,
    check_kinds,
    pooled,
    pooling_words,
    poolings_of,
)

# ---------------------------------------------------------------- objectives


class Objective(NamedTuple):
    """What a reading shall be good at.

    Attributes:
        words: "k-NN"; stands behind "by".
        chosen: (x_ND, y_N) → accuracy on train images alone.
        right: (x_ND, y_N, z_MD, t_M) → which test images are right in each trial, bool [R, M].
    """

    words: str
    chosen: Callable[[Tensor, Tensor], float]
    right: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def by_knn(k: int = 10) -> Objective:
    """Weighted k-NN by cosine; train images are asked of all others (leave-one-out)."""

    def chosen(x, y):
        near = min(k, len(x) - 1)
        return neighbors.knn_accuracy(x, y, k=near, standardize=False, device=x.device)

    def right(x, y, z, t):
        how = {"k": min(k, len(x)), "standardize": False, "device": x.device}
        return (neighbors.knn_predict(x, y, z, **how)[1] == t)[None]

    return Objective("k-NN", chosen, right)


def by_linear_probe(seed: int = 0) -> Objective:
    """A linear probe; a fifth of the train images is held out to choose by, penalties included."""

    def fitted(x, y, z, t):
        return probes.linear_probe(x, y, z, t, seed=seed, device=x.device)

    return Objective(
        "a linear probe",
        lambda x, y: fitted(x, y, x[:1], y[:1]).validation.max(),
        lambda x, y, z, t: (fitted(x, y, z, t).predict(z) == t)[None],
    )


def by_few_labels(shots: int = 5, draws: int = 10, seed: int = 0) -> Objective:
    """A linear classifier with a few labels a class; one half of the train images asks the
    other."""

    def right(x, y, z, t):
        how = {"shots": [shots], "draws": draws, "seed": seed, "device": x.device}
        return probes.low_shot(x, y, z, t, **how).right[0]

    def chosen(x, y):
        fit, held = probes.held_out(y, 0.5, seed)
        return right(x[fit], y[fit], x[held], y[held]).float().mean()

    return Objective(f"a linear classifier with {shots} labels a class", chosen, right)


def across(objective: Objective, groups_N: Tensor) -> Objective:
    """The same, chosen across groups: the train images of each group are asked of the others'."""

    def chosen(x, y):
        return right_across(objective, x, y, x, y, groups_N, groups_N).double().mean()

    return objective._replace(chosen=chosen)


def right_across(
    objective: Objective, x, y, z, t, own_N: Tensor | None, asked_M: Tensor | None
) -> Tensor:
    """As the objective's ``right``, each image asked of the train images of other groups alone.

    Args:
        x, y, z, t: features and labels of the train and the other images.
        own_N, asked_M: groups of both; without groups each is asked of all.

    Returns:
        bool [R, M], on the CPU.
    """
    if own_N is None:
        return objective.right(x, y, z, t).cpu()
    order, parts = [], []
    for group in asked_M.unique():
        mine, others = (asked_M == group).nonzero()[:, 0], own_N != group
        order.append(mine)
        parts.append(objective.right(x[others], y[others], z[mine], t[mine]).cpu())
    return torch.cat(parts, dim=1)[:, torch.cat(order).argsort()]


OBJECTIVES = {"knn": by_knn, "linear": by_linear_probe, "few": by_few_labels}


# ---------------------------------------------------------------- the choice


class Candidate(NamedTuple):
    """A reading that was tried."""

    block: int
    pooling: str
    transform: Transform


@dataclass(frozen=True, eq=False)
class Choice:
    """What :func:`best_reading` returns.

    Attributes:
        scores: accuracy of every candidate on train images, best first.
        features, labels: of the train images.
        objective: what was chosen by.
        device: where.
    """

    scores: dict[Candidate, float]
    features: Features
    labels: Tensor
    objective: Objective
    device: str | torch.device | None = None

    def fit(self, place: int = 0) -> Reading:
        """The candidate of a place, fitted on all train images; 0 is the best."""
        return Reading.fit(self.features, *list(self.scores)[place])

    @property
    def reading(self) -> Reading:
        """The best."""
        return self.fit()

    @torch.no_grad()
    def test(self, features: Features, labels: Tensor, *, seed: int = 0) -> Tested:
        """Asks the best reading, the runner-up and the usual one about test images.

        Args:
            features, labels: of the test images, [M].
            seed: of the resamples.
        """
        labels = class_labels(labels, features.main, "test").cpu()
        known = {"best": self.fit(), "usual": Reading.fit(self.features)}
        known |= {"runner_up": self.fit(1)} if len(self.scores) > 1 else {}
        right = {}
        for name, reading in known.items():
            x, z = (reading.apply(f) for f in (self.features, features))
            x, z = (v.to(self.device or v.device) for v in (x, z))
            right[name] = self.objective.right(x, self.labels, z, labels)
        return Tested(known, right, self.objective.words, seed)

    @torch.no_grad()
    def on_test(
        self, features: Features, labels: Tensor, transforms: Iterable[Transform] = ()
    ) -> dict[Candidate, float]:
        """Test accuracy of every block and pooling that was tried: to look at, not to choose by.

        Args:
            features, labels: of the test images, [M].
            transforms: by default those that were tried.
        """
        labels, found = class_labels(labels, features.main, "test").cpu(), {}
        transforms = dict.fromkeys(transforms or (c.transform for c in self.scores))
        for block, pooling in dict.fromkeys(candidate[:2] for candidate in self.scores):
            sides = [pooled(f, block, pooling) for f in (self.features, features)]
            sides = [x.to(self.device or x.device) for x in sides]
            spectrum = Spectrum(sides[0])
            for transform in transforms:
                bank, asked = (affine(x, *spectrum.fitted(transform)) for x in sides)
                right = self.objective.right(bank, self.labels, asked, labels)
                found[Candidate(block, pooling, transform)] = float(right.double().mean())
        return found

    def __str__(self) -> str:
        best, score = next(iter(self.scores.items()))
        words = f"block {best.block}, {pooling_words(best.pooling)}, {best.transform}"
        return f"{words}: {score:.1%} of the train images by {self.objective.words}"


@dataclass(frozen=True, eq=False)
class Tested:
    """Readings on test images, which had no part in the choice.

    Attributes:
        readings: "best", "usual" (the last block's class token, standardised) and "runner_up".
        right: which test images each gets right, bool [R, M].
        words: the objective.
        seed: of the resamples.
    """

    readings: dict[str, Reading]
    right: dict[str, Tensor]
    words: str
    seed: int = 0

    def accuracy(self, name: str = "best") -> float:
        return float(self.right[name].double().mean())

    def interval(self, name: str = "best", less: str = "") -> tuple[float, float]:
        """95 % of the resampled accuracies, or of their differences to another reading.

        Both images and trials are drawn with replacement, the same for both readings.
        """
        right = self.right[name].double() - (self.right[less].double() if less else 0)
        return bootstrap(right, seed=self.seed)

    def real(self, than: str = "runner_up") -> bool:
        """Whether the best reading and another differ by more than chance among test images."""
        low, high = self.interval("best", less=than)
        return low > 0 or high < 0

    def __str__(self) -> str:
        low, high = (f"{100 * end:.1f}" for end in self.interval())
        best, usual = self.readings["best"], self.readings["usual"]
        own = f"{100 * self.accuracy():.1f} % ({low}–{high}) by {self.words}."
        if str(best) == str(usual):
            return f"Use {best}, which is the usual reading: {own}"
        told = (
            f"Use {best}: {own} The usual reading, the last block's "
            f"{pooling_words(usual.pooling)}, has {100 * self.accuracy('usual'):.1f} %."
        )
        if self.real(than="usual"):
            return told
        return f"{told} With {self.right['best'].shape[-1]} test images that may be chance."


def bootstrap(right_RM: Tensor, *, samples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """The middle 95 % of means over trials and images, both drawn with replacement."""
    rng, (trials, images) = np.random.default_rng(seed), right_RM.shape
    means, right = [], right_RM.double().numpy()
    for _ in range(samples):  # one at a time: counts of all would not fit
        drawn = np.bincount(rng.integers(trials, size=trials), minlength=trials) @ right / trials
        means.append(drawn[rng.integers(images, size=images)].mean())
    return tuple(float(end) for end in np.quantile(means, (0.025, 0.975)))


@torch.no_grad()
def best_reading(
    features: Features,
    labels: Tensor,
    *,
    by: str | Objective = "knn",
    poolings: Sequence[str] | None = None,
    transforms: Sequence[Transform] = TRANSFORMS,
    groups: Tensor | None = None,
    most: int = 4096,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Choice:
    """Chooses block, pooling and transform on train images; test images have no way in.

    Args:
        features: of the train images; every block that they hold is tried.
        labels: int [N].
        by: "knn", "linear", "few", or an :class:`Objective` such as ``by_knn(k=20)``.
        poolings: such as ``("cls", "cls+patch")``; default all that the features have.
        transforms: of equals the first is chosen.
        groups: [N] numbers or words, such as the lab that each image comes from; then a reading is
            chosen by how well the images of some groups serve those of another.
        most: images to choose on; of more a random part is taken. Readings are fitted on all.
        seed: of this part.
        device: where to work; default where the features are.
        progress: show a bar.

    Returns:
        A :class:`Choice`; ``.reading`` is the best, ``.test(features, labels)`` measures it. Of
        constant features every candidate guesses, and the first is taken.

    Raises:
        ValueError: without labels, with fewer than two classes, or without a class of two images.
    """
    if isinstance(by, str) and by not in OBJECTIVES:
        raise UserError(f"a reading is chosen by one of {', '.join(OBJECTIVES)}, not {by!r}")
    objective = OBJECTIVES[by]() if isinstance(by, str) else by
    tried = list(product(check_kinds(features).blocks, poolings or poolings_of(features)))
    labels = _choosable(labels, features)
    rng = np.random.default_rng(seed)
    some = torch.from_numpy(np.sort(rng.permutation(len(labels))[:most]))
    y_N, scores = labels[some], {}
    if groups is not None:
        groups = group_numbers(groups, len(labels))[some]
        if len(groups.unique()) < 2:
            raise UserError("a reading is chosen across groups, and there is only one group")
        objective = across(objective, groups)
    for block, pooling in tqdm(tried, desc="readings", disable=not progress):
        x_ND = pooled(features, block, pooling)
        x_ND = x_ND.to(device or x_ND.device)
        spectrum, mine = Spectrum(x_ND), x_ND[some.to(x_ND.device)]
        for transform in map(checked, transforms):
            ready = affine(mine, *spectrum.fitted(transform))
            scores[Candidate(block, pooling, transform)] = float(objective.chosen(ready, y_N))
    # A sort keeps the order of equals: the simplest transform, the fewest features, the last block.
    order = sorted(scores, key=lambda c: (transforms.index(c.transform), len(c.pooling), -c.block))
    order.sort(key=scores.get, reverse=True)
    return Choice({c: scores[c] for c in order}, features, labels, objective, device)


def _choosable(labels, features: Features) -> Tensor:
    """Labels by which readings can differ, on the CPU."""
    if labels is None:
        raise UserError("a reading is chosen with labels; rank_readings orders blocks without")
    labels = class_labels(labels, features.main, "train").cpu()
    ordered = labels.sort().values
    classes = 1 + int((ordered[1:] != ordered[:-1]).sum())
    if classes in (1, len(labels)):
        what = "one class" if classes == 1 else "one image a class"
        raise UserError(
            f"with {what} no reading is better than another; rank_readings needs no labels"
        )
    return labels


# ---------------------------------------------------------------- without labels


class Measure(NamedTuple):
    """A measure without labels: its name, its value of [N, D] (or views [N, V, D]), and what
    of the value is larger for better features, if the measure is right."""

    name: str
    value: Callable[[Tensor], Tensor]
    better: Callable[[Tensor], Tensor]
    views: bool = False


def _same(x: Tensor) -> Tensor:
    return x


MEASURES = {
    "rankme": Measure("RankMe", measures.rankme, _same),
    "participation_ratio": Measure("participation ratio", measures.participation_ratio, _same),
    "alpha_req": Measure("α-ReQ, distance to 1", measures.alpha_req, lambda x: -(x - 1).abs()),
    "intrinsic_dimension": Measure(
        "intrinsic dimension (TwoNN)", measures.intrinsic_dimension, _same
    ),
    "uniformity": Measure("uniformity", measures.uniformity, torch.neg),
    "lidar": Measure("LiDAR", measures.lidar, _same, views=True),
    "alignment": Measure("alignment", measures.alignment, torch.neg, views=True),
}
TRUSTED = "participation_ratio"  # its first choice loses least in docs/results.md


@dataclass(frozen=True, eq=False)
class Ranking:
    """What :func:`rank_readings` returns.

    Attributes:
        places: block and pooling of each entry.
        values: what each measure says, float32, one for each place; NaN where it cannot tell.
    """

    places: list[tuple[int, str]]
    values: dict[str, Tensor]

    def scores(self, measure: str) -> Tensor:
        """A measure turned so that larger is better, by its own account."""
        return MEASURES[measure].better(self.values[measure])

    def order(self, measure: str = TRUSTED) -> list[tuple[int, str]]:
        """Blocks and poolings, the best by a measure first, those it cannot tell last."""
        scores = self.scores(measure).nan_to_num(-torch.inf)
        return [self.places[i] for i in scores.argsort(descending=True, stable=True)]

    def agreement(self, accuracy: Sequence[float]) -> dict[str, float]:
        """Spearman's rank correlation of every measure with the accuracy at each place.

        1 orders them as labels would, 0 says nothing, −1 is upside down; NaN where either is
        constant.
        """
        known = np.asarray(accuracy, dtype=float)
        if len(known) != len(self.places):
            raise UserError(f"{len(known)} accuracies for {len(self.places)} places")
        return {m: _spearman(self.scores(m).numpy(), known) for m in self.values}


def _spearman(a: np.ndarray, b: np.ndarray) -> float:
    from scipy.stats import spearmanr  # slow to import

    both = np.isfinite(a) & np.isfinite(b)
    a, b = a[both], b[both]
    varied = len(a) > 2 and np.ptp(a) > 0 and np.ptp(b) > 0
    return float(spearmanr(a, b).statistic) if varied else float("nan")


def rank_readings(
    features: Features, views: Sequence[Features] = (), *, transform: Transform = STANDARDISED
) -> Ranking:
    """Orders blocks and poolings by measures that need no labels.

    All are compared after the same transform and at the same width, as spectra of other widths or
    transforms cannot be: whitened features have the largest rank, whatever they show. How far each
    measure is to be trusted is in ``docs/results.md``.

    Args:
        features: of some images, at least two.
        views: of other views of one and the same set of images, at least two (as of
            :func:`refiner.images.views.make_view`); without them some measures are left out.
        transform: fitted on ``features``.
    """
    kinds = [kind for kind in poolings_of(features) if "+" not in kind]
    places = [(block, kind) for kind in kinds for block in features.blocks]
    readings = [Reading.fit(features, *place, transform) for place in places]
    values = {m: [] for m, measure in MEASURES.items() if len(views) > 1 or not measure.views}
    for reading in readings:
        x_ND = reading.apply(features)
        x_NVD = torch.stack([reading.apply(v) for v in views], dim=1) if len(views) > 1 else None
        for name, found in values.items():
            found.append(_value(MEASURES[name], x_NVD if MEASURES[name].views else x_ND))
    return Ranking(places, {name: torch.stack(found) for name, found in values.items()})


def _value(measure: Measure, x: Tensor) -> Tensor:
    """NaN where a measure cannot tell, as of constant features."""
    try:
        return measure.value(x)
    except UserError:
        return torch.tensor(torch.nan)
