"""Linear probes of every block: what can be read from features, with how many labels.

Multinomial logistic regression with an L2 penalty on the weights (not on the bias), the objective
of scikit-learn's LogisticRegression divided by C·N:

    f(W, b) = 1/N Σ_n −log softmax(W x_n + b)[y_n]  +  λ/2 ‖W‖²,      λ = 1 / (C·N)

Three things make it fast. Penalties are solved from the strongest to the weakest, each from where
the two before point to (the solution is smooth in log λ). A Newton step needs only products with
the Hessian, by conjugate gradients, which cost as much as the gradient and no exponentials. And
those are preconditioned by the Hessian's diagonal blocks, one a class, taken from the few images
that are still undecided, where nearly all of its curvature sits.

A fit stops when its distance to the minimum is proven: with the dual variables softmax − one-hot
the duality gap is ‖∂f/∂W‖² / (2λ), up to the bias, whose share is estimated by its curvature.

Shape legend: L blocks, N train and M test images, D width, E = D + 1 (bias last), C classes,
G groups with features of their own (blocks, draws), R penalties, S sizes of the labelled set,
K draws, T targets of a regression.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import (
    as_features,
    axes_of,
    class_labels,
    device_for,
    feature_pair,
    full_precision,
    in_kind,
    numbered,
)
from refiner.probing.logistic import (
    PENALTIES,
    PenaltyChoice,
    Scaling,
    best_class,
    fit_logistic,
    group_chunks,
    penalty_grid,
)

RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CIRCULAR = {"hue": 1.0, "background_hue": 1.0, "background_angle": 360.0}  # period of each
CATEGORICAL = ("pattern", "class", "lab", "parent")


# ---------------------------------------------------------------- what all probes share


def labels_to_probe(train_y, test_y, train_x, test_x) -> tuple[Tensor, Tensor, Tensor]:
    """Train's classes [C], its labels as indices into them [N], test's labels [M], on the CPU.

    Raises:
        ValueError: for labels that do not fit the features [..., N, D] and [..., M, D], or fewer
            than two classes.
    """
    train_y, test_y = numbered(train_y, test_y)
    y, t = class_labels(train_y, train_x, "train").cpu(), class_labels(test_y, test_x, "test").cpu()
    classes, y = y.unique(return_inverse=True)
    if len(classes) < 2:
        raise UserError("a probe needs at least two classes in the train labels")
    return classes, y, t


def _blocks(train_x, test_x) -> tuple[Tensor, Tensor]:
    """Features as [L, N, D] and [L, M, D]."""
    x, z = feature_pair(train_x, test_x, names=("train features", "test features"))
    return (x, z) if x.ndim == 3 else (x[None], z[None])


def shuffled_by_class(y_N: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """The shuffled positions of each class that occurs."""
    labels = y_N.numpy()
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def held_out(y_N: Tensor, share: float, seed: int, choose: str = "") -> tuple[Tensor, Tensor]:
    """Positions to fit on and to choose with; a class of one image stays in the first part.

    Raises:
        ValueError: if something is to ``choose`` ("penalty") and there is no image to do it with.
    """
    if not 0 < share < 1:
        raise UserError(f"validation must be a share above 0 and below 1, not {share}")
    groups = shuffled_by_class(y_N, np.random.default_rng(seed))
    cut = [min(round(share * len(g)), len(g) - 1) for g in groups]
    fit = np.concatenate([g[n:] for g, n in zip(groups, cut, strict=True)])
    held = np.concatenate([g[:n] for g, n in zip(groups, cut, strict=True)])
    if choose and not len(held):
        raise UserError(
            f"no image left to choose a {choose} with: give one {choose}, or more images"
        )
    return torch.from_numpy(np.sort(fit)), torch.from_numpy(np.sort(held))


# ---------------------------------------------------------------- the linear probe


@dataclass(frozen=True, eq=False)
class LinearProbe:
    """What :func:`linear_probe` returns, on the CPU; the axis L is missing for features [N, D].

    Attributes:
        accuracy: on the test images, float32 [L].
        penalty: the λ that was chosen, [L].
        validation: accuracy on the held-out train images, [R, L]; NaN where nothing was chosen.
        penalties: the grid, R numbers, strongest first.
        weights, bias: for features as they came, float64 [L, D, C] and [L, C].
        classes: int64 [C], the labels that occur in train, in the order of the weights.
        objective: f on all train images with the chosen λ, float64 [L].
        gap: how far f can be above its minimum, as a share of f (proven, see the module).
        converged: whether the gap is within the tolerance, [L].
    """

    accuracy: Tensor
    penalty: Tensor
    validation: Tensor
    penalties: tuple[float, ...]
    weights: Tensor
    bias: Tensor
    classes: Tensor
    objective: Tensor
    gap: Tensor
    converged: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Labels of features [L, M, D] (or [M, D]), int64 [L, M] (or [M])."""
        x = as_features(x, "features")
        if x.ndim != self.weights.ndim or x.shape[-1] != self.weights.shape[-2]:
            raise UserError(
                f"features {list(x.shape)} do not fit a probe of weights {list(self.weights.shape)}"
            )
        if x.ndim == 2:
            return self.classes[best_class(x.cpu()[None], self.weights[None], self.bias[None])[0]]
        return self.classes[best_class(x.cpu(), self.weights, self.bias)]


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    validation: float = 0.2,
    standardize: bool = True,
    tolerance: float = 1e-4,
    max_steps: int = 50,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> LinearProbe:
    """Fits a linear classifier on every block; the penalty is chosen without the test images.

    For each block all penalties are fitted on a part of the train images; the one that is best on
    the rest (the stronger one in a tie) is fitted again on all of them and asked once on the test
    images.

    Args:
        train_x, test_x: features [L, N, D] and [L, M, D], or [N, D] and [M, D]; any float dtype.
        train_y, test_y: labels [N] and [M], integers or words (which count by their place in the
            alphabet of both sets together). A test image of a class that train lacks counts as
            wrong. A class of a single train image is fitted on, never chosen with.
        penalties: values of λ; scikit-learn's C is 1 / (λ·N). One value needs no choice.
        validation: share of each class's train images that choose.
        standardize: scale each feature by the train set's mean and deviation, as for k-NN (constant
            ones then carry nothing). Without it the penalty depends on the features' scale.
        tolerance: largest proven distance of f to its minimum, as a share of f.
        max_steps: Newton steps of a penalty at most; more than ten are rare.
        seed: of the part that chooses.
        device: where to fit; default CUDA if there is one, else where train_x is.
        progress: show a bar over blocks.

    Returns:
        A :class:`LinearProbe`.

    Raises:
        ValueError: for features and labels that do not match, that are not finite, fewer than two
            classes, or a grid without an image left to choose with.
    """
    x_LND, z_LMD = _blocks(train_x, test_x)
    classes, y, t = labels_to_probe(train_y, test_y, x_LND, z_LMD)
    grid, device = penalty_grid(penalties), device_for(device, x_LND)
    fit, held = held_out(y, validation, seed, "penalty" if len(grid) > 1 else "")
    options = {"classes": len(classes), "tolerance": tolerance, "max_steps": max_steps}
    data = (part.to(device) for part in (y, fit, held, torch.tensor(grid)))
    problem = PenaltyChoice(*data, options)
    columns = []
    with (
        full_precision(device),
        tqdm(total=len(x_LND), desc="linear probes", unit="block", disable=not progress) as bar,
    ):
        for chunk in group_chunks(len(x_LND), x_LND[0].numel() * 4, device):
            x_GND = x_LND[chunk].to(device)
            scaling = Scaling.of(x_GND, standardize, device)
            penalty, right, solved = problem.solve(scaling(x_GND))
            weights, bias = scaling.undo(solved.weights[0])
            label = classes[best_class(z_LMD[chunk].to(device), weights, bias).cpu()]
            accuracy = (label == t).float().mean(1)
            gap = solved.gap[0] / solved.objective[0].clamp(min=1e-300)
            column = accuracy, penalty, right, weights, bias, solved.objective[0], gap
            columns.append([part.cpu() for part in column])
            bar.update(len(x_GND))
    parts = [torch.cat(column) for column in zip(*columns, strict=True)]
    parts = parts if axes_of(train_x) == 3 else [part[0] for part in parts]
    accuracy, penalty, right, weights, bias, objective, gap = parts
    right = right.T if axes_of(train_x) == 3 else right
    return LinearProbe(
        accuracy, penalty, right, grid, weights, bias, classes, objective, gap, gap <= tolerance
    )


# ---------------------------------------------------------------- few labels


@dataclass(frozen=True, eq=False)
class LowShot:
    """What :func:`low_shot` returns; the axis L is missing for features [N, D].

    Attributes:
        sizes: what was asked for: shots (ints), then fractions (floats).
        images: how many labelled images each size has in all, [S].
        mean, spread: mean and standard deviation over the draws, float32 [S, L].
        draws: every draw's accuracy, [S, K, L].
        right: which test images a draw gets right, bool [S, K, L, M].
    """

    sizes: tuple[int | float, ...]
    images: tuple[int, ...]
    mean: Tensor
    spread: Tensor
    draws: Tensor
    right: Tensor


def low_shot(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    shots: Sequence[int] = (1, 2, 5, 10),
    fractions: Sequence[float] = (),
    draws: int = 10,
    penalty: float = 1e-2,
    standardize: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> LowShot:
    """Accuracy of a linear classifier that sees only a few labels, over several draws.

    Every block sees the same draws, and a draw's smaller sets are part of its larger ones.
    Standardising uses all train features, which needs no label; one penalty serves all sizes,
    because there are no images left to choose it with.

    Args:
        train_x, test_x: features [L, N, D] and [L, M, D], or [N, D] and [M, D].
        train_y, test_y: int labels [N] and [M].
        shots: labelled images a class.
        fractions: shares of each class's images, at least one image; 0.01 is "1 %".
        draws: how many random labelled sets.
        penalty: λ of the objective.
        standardize: see :func:`linear_probe`.
        seed: of the draws.
        device: where to fit; default CUDA if there is one, else where train_x is.
        progress: show a bar over sizes and blocks.

    Returns:
        A :class:`LowShot`.

    Raises:
        ValueError: when a class has fewer images than asked for, or as in :func:`linear_probe`.
    """
    x_LND, z_LMD = _blocks(train_x, test_x)
    classes, y, t = labels_to_probe(train_y, test_y, x_LND, z_LMD)
    (penalty,), device = penalty_grid([penalty]), device_for(device, x_LND)
    counts = y.bincount().tolist()
    _check_sizes(shots, fractions, draws, counts)
    wanted = [[s] * len(counts) for s in shots]
    wanted += [[max(1, round(f * n)) for n in counts] for f in fractions]
    orders = [shuffled_by_class(y, np.random.default_rng([seed, d])) for d in range(draws)]
    right = torch.empty(len(wanted), draws, len(x_LND), len(t), dtype=torch.bool)
    total = right[..., 0].numel()
    bar = tqdm(total=total, desc="low-shot probes", unit="fit", disable=not progress)
    with full_precision(device), bar:
        scaling = Scaling.of(x_LND, standardize, device)
        for size, numbers in enumerate(wanted):
            few = _FewLabels(x_LND, y, scaling, _drawn(orders, numbers), penalty, len(classes))
            weights_LKCE = few.solve(bar)
            for block, z_MD in enumerate(z_LMD):
                z_ME = scaling.of_blocks(torch.tensor([block]))(z_MD[None].to(device))[0]
                label = classes[(z_ME @ weights_LKCE[block].mT).argmax(-1).cpu()]
                right[size, :, block] = label == t
    right = right if axes_of(train_x) == 3 else right[:, :, 0]
    accuracy = right.float().mean(-1)
    sizes, images = (*shots, *fractions), tuple(map(sum, wanted))
    mean, spread = accuracy.mean(1), accuracy.std(1, correction=0)
    return LowShot(sizes, images, mean, spread, accuracy, right)


@dataclass(frozen=True, eq=False)
class _FewLabels:
    """The fits of one size: all draws of all blocks, as many at once as fit."""

    x_LND: Tensor
    y_N: Tensor
    scaling: Scaling
    chosen_KN: Tensor
    penalty: float
    classes: int

    def solve(self, bar: tqdm) -> Tensor:
        """Weights, float32 [L, K, C, E]."""
        (draws, n), device = self.chosen_KN.shape, self.scaling.mean.device
        blocks, _, dim = self.x_LND.shape
        found = []
        for part in group_chunks(blocks * draws, n * (dim + 1) * 4, device):
            group = torch.arange(blocks * draws)[part]
            block_G, rows_GN = group // draws, self.chosen_KN[group % draws]
            home = self.x_LND.device
            x_GND = self.x_LND[block_G[:, None].to(home), rows_GN.to(home)].to(device)
            penalty_RG = torch.full((1, len(group)), self.penalty, dtype=torch.float64)
            x_GNE = self.scaling.of_blocks(block_G)(x_GND)
            solved = fit_logistic(
                x_GNE, self.y_N[rows_GN].to(device), penalty_RG.to(device), classes=self.classes
            )
            found.append(solved.weights[0].float())
            bar.update(len(group))
        return torch.cat(found).unflatten(0, (blocks, draws))


def _drawn(orders: list[list[np.ndarray]], numbers: list[int]) -> Tensor:
    """The first images of each class in each draw's order, [K, N]."""
    draws = [
        np.concatenate([g[:n] for g, n in zip(order, numbers, strict=True)]) for order in orders
    ]
    return torch.from_numpy(np.stack(draws))


def _check_sizes(shots, fractions, draws: int, counts: list[int]) -> None:
    fewest = min(counts)
    if any(s != int(s) or not 1 <= s <= fewest for s in shots):
        raise UserError(
            f"shots must be from 1 to {fewest}, the images of the smallest class, not {list(shots)}"
        )
    if not (*shots, *fractions):
        raise UserError("give shots or fractions: there is no number of labels to draw")
    if any(not 0 < f <= 1 for f in fractions) or draws < 1:
        raise UserError("fractions must be above 0 and at most 1, and draws at least 1")


def possible_shots(shots: Sequence[int], fractions: Sequence[float], labels: Tensor) -> list[int]:
    """The shots that every class has images for.

    Raises:
        ValueError: where none is left, and no fractions either.
    """
    fewest = int(labels.unique(return_counts=True)[1].min())
    possible = [k for k in shots if k <= fewest]
    if shots and not possible and not fractions:
        raise UserError(
            f"the smallest class has {fewest} train images, too few for {min(shots)} labels a class"
        )
    return possible


# ---------------------------------------------------------------- what else is in the features


@in_kind
def factor_probe(
    train_x: Tensor,
    train_factors: Mapping[str, np.ndarray | Tensor],
    test_x: Tensor,
    test_factors: Mapping[str, np.ndarray | Tensor],
    *,
    circular: Mapping[str, float] = CIRCULAR,
    categorical: Sequence[str] = CATEGORICAL,
    penalties: Sequence[float] = RIDGE_PENALTIES,
    validation: float = 0.2,
    standardize: bool = True,
    seed: int = 0,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """How well each known factor can be read from each block by a linear map.

    Continuous factors: ridge regression, its penalty chosen on held-out train images, scored by R²
    on the test images (1 is exact; 0 is no better than the mean; below 0 is worse). A factor on a
    circle is predicted as its cosine and sine, as the number itself jumps. Categorical factors:
    :func:`linear_probe`'s accuracy, whose chance level is not 0.

    Args:
        train_x, test_x: features [L, N, D] and [L, M, D], or [N, D] and [M, D].
        train_factors, test_factors: name -> [N] and name -> [M], as in an ImageSet's ``factors``;
            add ``{"class": labels}`` to compare with the class.
        circular: name -> period of the factors that live on a circle.
        categorical: names whose values are indices.
        penalties: of the ridge, in units of the features' mean square.
        validation, seed: the part of the train images that chooses.
        standardize, device, progress: see :func:`linear_probe`.

    Returns:
        Name -> scores float32 [L] (0-dim for [N, D]), in the order of ``train_factors``.

    Raises:
        ValueError: when names or lengths do not match, or a factor is constant or not finite.
    """
    x_LND, z_LMD = _blocks(train_x, test_x)
    _check_factors(train_factors, test_factors, x_LND.shape[1], z_LMD.shape[1])
    device, grid = device_for(device, x_LND), penalty_grid(penalties)
    common = {"validation": validation, "standardize": standardize, "seed": seed, "device": device}
    found: dict[str, Tensor] = {}
    for name in train_factors:
        if name in categorical:
            y, t = numbered(train_factors[name], test_factors[name])
            y, t = (torch.as_tensor(v).long() for v in (y, t))  # whole floats, in Toybox
            found[name] = linear_probe(x_LND, y, z_LMD, t, progress=progress, **common).accuracy
    plain = [name for name in train_factors if name not in found]
    if plain:
        targets = [
            [_targets(f[name], circular.get(name)).to(device) for name in plain]
            for f in (train_factors, test_factors)
        ]
        fit, held = held_out(torch.zeros(x_LND.shape[1], dtype=torch.int64), validation, seed)
        rows = []
        with full_precision(device):
            blocks = list(zip(x_LND, z_LMD, strict=True))
            for x_ND, z_MD in tqdm(blocks, desc="factors", unit="block", disable=not progress):
                x_ND, z_MD = x_ND.to(device), z_MD.to(device)
                scaling = Scaling.of(x_ND[None], standardize, device)
                x_NE, z_ME = scaling(x_ND[None])[0].double(), scaling(z_MD[None])[0].double()
                rows.append(
                    _ridge_scores(x_NE, z_ME, *targets, grid, fit.to(device), held.to(device))
                )
        found |= dict(zip(plain, torch.tensor(rows).T, strict=True))
    pick = (lambda scores: scores) if axes_of(train_x) == 3 else (lambda scores: scores[0])
    return {name: pick(found[name]) for name in train_factors}


def _check_factors(train: Mapping, test: Mapping, n: int, m: int) -> None:
    if set(train) != set(test) or not train:
        raise UserError(
            f"train and test must have the same factors, not {sorted(train)} and {sorted(test)}"
        )
    for name in train:
        a, b = map(np.asarray, numbered(train[name], test[name]))
        if a.shape != (n,) or b.shape != (m,):
            raise UserError(
                f"factor {name!r} has values {list(a.shape)} and {list(b.shape)}, "
                f"the images are {n} and {m}"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise UserError(f"factor {name!r} has NaN or infinite values")
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            raise UserError(f"factor {name!r} is constant, so there is nothing to read")


def _targets(values, period: float | None) -> Tensor:
    """What the ridge predicts: the value [N, 1], or a point on the circle [N, 2]."""
    v = torch.as_tensor(np.asarray(values), dtype=torch.float64)
    if period is None:
        return v[:, None]
    angle = v * (2 * torch.pi / period)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _ridge_scores(x_NE, z_ME, train: list[Tensor], test: list[Tensor], grid, fit, held):
    """R² of each factor on the test images, with the penalty that is best on the held-out part."""
    joint = torch.cat(train, dim=1)
    tried_RET = _ridge(x_NE[fit], joint[fit], grid)
    guesses_RNT = x_NE[held] @ tried_RET
    final_RET = _ridge(x_NE, joint, grid)
    scores, start = [], 0
    for a, b in zip(train, test, strict=True):
        own = slice(start, start + a.shape[1])
        best = int(_r2(guesses_RNT[..., own], a[held]).argmax()) if len(held) else 0
        scores.append(float(_r2(z_ME @ final_RET[best, :, own], b)))
        start = own.stop
    return scores


def _r2(prediction: Tensor, truth: Tensor) -> Tensor:
    """R² of [..., N, T] against [N, T], over all T together."""
    spread = (truth - truth.mean(0)).square().sum().clamp(min=1e-300)
    return 1 - (prediction - truth).square().sum(dim=(-2, -1)) / spread


def _ridge(x_NE: Tensor, t_NT: Tensor, grid: Sequence[float]) -> Tensor:
    """Ridge solutions for every penalty, [R, E, T]; the bias (last) is not penalised."""
    x_ND, t_mean = x_NE[:, :-1], t_NT.mean(0)
    mean = x_ND.mean(0)
    x_ND = x_ND - mean
    scale_D, turn_DD = torch.linalg.eigh(x_ND.T @ x_ND / len(x_ND))
    right_DT = turn_DD.T @ (x_ND.T @ (t_NT - t_mean)) / len(x_ND)
    weights = [turn_DD @ (right_DT / (scale_D.clamp(min=0) + p)[:, None]) for p in grid]
    return torch.stack([torch.cat([w, (t_mean - mean @ w)[None]]) for w in weights])
