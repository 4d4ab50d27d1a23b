"""Linear probes of every block: what can be read from features, with how many labels.

Multinomial logistic regression with an L2 penalty on the weights (not on the bias), the objective
of scikit-learn's LogisticRegression divided by C·N:

    f(W, b) = 1/N Σ_n −log softmax(x_n W + b)[y_n]  +  λ/2 ‖W‖²,      λ = 1 / (C·N)

Features are standardised with the train set's mean and deviation and turned into their principal
axes. A rotation changes neither f nor its minimum, but in these axes the curvature is nearly
diagonal, so L-BFGS (Liu & Nocedal 1989) with that diagonal as its first guess needs few steps. All
penalties of a block share one matrix product a step, all draws of a low-shot experiment one batched
product, and each problem stops by its own test.

Shape legend: L blocks, N train and M test images, D width, E = D + 1 (bias last), C classes,
G groups (draws) with features of their own, R penalties, S sizes of the labelled set.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

Tensor = torch.Tensor
PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CIRCULAR = {"hue": 1.0, "background_hue": 1.0, "background_angle": 360.0}  # period of each
CATEGORICAL = ("pattern", "class")


# ---------------------------------------------------------------- the solver


@dataclass
class _Problem:
    """Problems still being solved: G groups with their own samples, R penalties each."""

    x_GNE: Tensor
    y_GN: Tensor
    penalty_R: Tensor
    scale_GE: Tensor  # how curved f is along each axis, for the first guess
    classes: int

    def value_and_grad(self, w_GERC: Tensor) -> tuple[Tensor, Tensor]:
        """f [G, R] and its gradient [G, E, R, C]."""
        g, n, e = self.x_GNE.shape
        r, c = w_GERC.shape[2:]
        logits_GNRC = (self.x_GNE @ w_GERC.reshape(g, e, r * c)).reshape(g, n, r, c)
        at_GNR1 = self.y_GN[:, :, None, None].expand(g, n, r, 1)
        picked_GNR = logits_GNRC.gather(3, at_GNR1).squeeze(3)
        total_GNR = logits_GNRC.logsumexp(dim=3)
        # Sums in float64: the line search compares values that differ in the seventh digit.
        value_GR = (total_GNR - picked_GNR).double().mean(dim=1)
        residual_GNRC = logits_GNRC.sub_(total_GNR[..., None]).exp_()
        residual_GNRC.scatter_add_(3, at_GNR1, -torch.ones_like(picked_GNR)[..., None])
        grad = self.x_GNE.transpose(1, 2) @ residual_GNRC.reshape(g, n, r * c)
        grad_GERC = grad.reshape(g, e, r, c) / n
        free_GERC = w_GERC[:, :-1]  # all but the bias
        grad_GERC[:, :-1] += self.penalty_R[None, None, :, None] * free_GERC
        norm_GR = free_GERC.double().square().sum(dim=(1, 3))
        return value_GR + 0.5 * self.penalty_R.double() * norm_GR, grad_GERC

    def curvature(self) -> Tensor:
        """Diagonal guess of the Hessian, [G, E, R, 1]."""
        penalty_ER = torch.cat(
            [
                self.penalty_R.expand(self.x_GNE.shape[2] - 1, -1),
                torch.zeros_like(self.penalty_R)[None],
            ]
        )
        return (self.scale_GE[:, :, None] / self.classes + penalty_ER)[..., None]

    def keep(self, groups: Tensor, penalties: Tensor) -> None:
        if len(groups) < len(self.x_GNE):
            self.x_GNE, self.y_GN = self.x_GNE[groups], self.y_GN[groups]
            self.scale_GE = self.scale_GE[groups]
        self.penalty_R = self.penalty_R[penalties]


def _dot(a_GERC: Tensor, b_GERC: Tensor) -> Tensor:
    return (a_GERC * b_GERC).sum(dim=(1, 3), dtype=torch.float64)  # [G, R]


def _wide(a_GR: Tensor) -> Tensor:
    return a_GR.float()[:, None, :, None]


def _direction(grad: Tensor, curvature: Tensor, pairs: list[tuple[Tensor, Tensor, Tensor]]):
    """L-BFGS's two loops: minus the inverse Hessian's estimate times the gradient."""
    q, steps = grad, []
    for s, y, rho in reversed(pairs):
        a = rho * _dot(s, q)
        steps.append(a)
        q = q - _wide(a) * y
    q = q / curvature
    if pairs:  # the guess knows the shape of the curvature, the last pair its size
        s, y, rho = pairs[-1]
        ratio = 1 / (rho * _dot(y, y / curvature)).clamp(min=1e-30)
        q = q * _wide(torch.where(rho > 0, ratio, torch.ones_like(ratio)))
    for (s, y, rho), a in zip(pairs, reversed(steps), strict=True):
        q = q + _wide(a - rho * _dot(y, q)) * s
    return -q


def _search(problem: _Problem, w, value, grad, direction) -> tuple[Tensor, Tensor, Tensor]:
    """Halves each problem's step until f falls as much as its slope promises (Armijo)."""
    slope_GR = _dot(grad, direction)
    step_GR = torch.ones_like(value)
    for _ in range(20):
        trial = w + _wide(step_GR) * direction
        new_value, new_grad = problem.value_and_grad(trial)
        bad_GR = ~(new_value <= value + 1e-4 * step_GR * slope_GR + 1e-7 * value.abs())
        if not bad_GR.any():
            break
        step_GR = torch.where(bad_GR, step_GR / 2, step_GR)
    stuck = _wide(bad_GR.float()).bool()
    return (torch.where(stuck, w, trial), torch.where(bad_GR, value, new_value),
            torch.where(stuck, grad, new_grad))  # fmt: skip


def fit_logistic(x_GNE: Tensor, y_GN: Tensor, penalty_R: Tensor, scale_GE: Tensor, *, classes: int,
                 start: Tensor | None = None, tolerance: float = 5e-7, max_steps: int = 500,
                 memory: int = 10):  # fmt: skip
    """Solves G·R logistic regressions at once.

    Args:
        x_GNE: float32 features, the last column all ones.
        y_GN: int64 labels.
        penalty_R: λ of each problem, float32.
        scale_GE: mean square of each column.
        start: weights to begin with, [G, E, R, C]; zeros otherwise.
        tolerance: a problem has converged when the decrease that its gradient still promises,
            gᵀH⁻¹g / 2 with the diagonal guess of H, is below this share of f.

    Returns:
        Weights [G, E, R, C], objective [G, R] and whether each problem converged [G, R].
    """
    groups, _, e = x_GNE.shape
    r = len(penalty_R)
    problem = _Problem(x_GNE, y_GN, penalty_R, scale_GE, classes)
    w = x_GNE.new_zeros(groups, e, r, classes) if start is None else start.clone()
    result = w.clone(), torch.zeros(groups, r, dtype=torch.float64), torch.zeros(groups, r).bool()
    at_G, at_R = torch.arange(groups), torch.arange(r)
    value, grad = problem.value_and_grad(w)
    pairs: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in range(max_steps + 1):
        curvature = problem.curvature()
        done_GR = 0.5 * _dot(grad, grad / curvature) <= tolerance * value.clamp(min=1e-6)
        block = at_G[:, None], at_R[None, :]
        result[0].permute(0, 2, 1, 3)[block] = w.permute(0, 2, 1, 3)
        result[1][block], result[2][block] = value.cpu(), done_GR.cpu()
        if done_GR.all() or step == max_steps:
            break
        # Only whole groups and, when there is one group, whole penalties can be left out.
        rows, columns = (~done_GR).any(1).nonzero()[:, 0], (~done_GR).any(0).nonzero()[:, 0]
        if len(rows) < len(at_G) or len(columns) < len(at_R):
            problem.keep(rows, columns)
            at_G, at_R = at_G[rows.cpu()], at_R[columns.cpu()]
            cut = lambda t: t[rows][:, :, columns]  # noqa: B023, E731
            w, grad, value = cut(w), cut(grad), value[rows][:, columns]
            pairs = [(cut(s), cut(y), rho[rows][:, columns]) for s, y, rho in pairs]
            curvature = problem.curvature()
        direction = _direction(grad, curvature, pairs)
        downhill = _wide((_dot(grad, direction) < 0).float()).bool()
        direction = torch.where(downhill, direction, -grad / curvature)
        new_w, new_value, new_grad = _search(problem, w, value, grad, direction)
        s, y = new_w - w, new_grad - grad
        sy = _dot(s, y)
        rho = torch.where(sy > 1e-12, 1 / sy.clamp(min=1e-12), torch.zeros_like(sy))
        pairs = [*pairs[-(memory - 1) :], (s, y, rho)]
        w, value, grad = new_w, new_value, new_grad
    return result


# ---------------------------------------------------------------- features, ready for the solver


@dataclass
class _Axes:
    """Standardised features in their principal axes: x ↦ ((x − mean) / std) @ turn, then a one."""

    mean: Tensor
    std: Tensor
    turn_DD: Tensor
    scale_E: Tensor

    @classmethod
    def of(cls, x_ND: Tensor) -> _Axes:
        x = x_ND.double()
        mean, std = x.mean(0), x.std(0, correction=0)
        # A constant feature carries nothing; up to rounding its deviation is zero.
        std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.full_like(std, torch.inf))
        z = (x - mean) / std
        scale, turn = torch.linalg.eigh(z.T @ z / len(z))
        ones = torch.ones(1, dtype=scale.dtype, device=x.device)
        return cls(mean, std, turn, torch.cat([scale.clamp(min=1e-9), ones]).float())

    def __call__(self, x_ND: Tensor) -> Tensor:
        z_ND = ((x_ND.double() - self.mean) / self.std) @ self.turn_DD
        return torch.cat([z_ND, z_ND.new_ones(len(z_ND), 1)], dim=1).float()

    def undo(self, w_EC: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [D, C] and bias [C] for features as they came."""
        w_DC = (self.turn_DD @ w_EC[:-1].double()) / self.std[:, None]
        return w_DC.float(), (w_EC[-1].double() - self.mean @ w_DC).float()


def _stacked(x: Tensor, name: str) -> Tensor:
    if x.dim() not in (2, 3):
        raise ValueError(f"{name} must be [N, D] or [L, N, D], not {list(x.shape)}")
    if not x.isfinite().all():
        raise ValueError(f"{name} has NaN or infinite values; look at the model or its precision")
    return x if x.dim() == 3 else x[None]


def _check(train_x, train_y, test_x, test_y) -> tuple[Tensor, Tensor, Tensor, Tensor, int]:
    x_LND, z_LMD = _stacked(train_x, "train_x"), _stacked(test_x, "test_x")
    if len(x_LND) != len(z_LMD) or x_LND.shape[2] != z_LMD.shape[2]:
        raise ValueError(
            f"train and test features do not match: {list(train_x.shape)}, {list(test_x.shape)}"
        )
    train_y, test_y = torch.as_tensor(train_y).long(), torch.as_tensor(test_y).long()
    for name, y, x in (("train", train_y, x_LND), ("test", test_y, z_LMD)):
        if y.shape != x.shape[1:2]:
            raise ValueError(f"{list(y.shape)} {name} labels for {x.shape[1]} {name} images")
        if len(y) == 0 or y.min() < 0:
            raise ValueError(f"{name} labels must be classes from 0 on, one an image")
    if len(train_y.unique()) < 2:
        raise ValueError("a probe needs at least two classes in the train labels")
    return x_LND, train_y, z_LMD, test_y, int(max(train_y.max(), test_y.max())) + 1


def _by_class(y_N: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """The shuffled positions of each class that occurs."""
    labels = y_N.cpu().numpy()
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def _held_out(y_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and to choose with; a class of one image stays in the first part."""
    groups = _by_class(y_N, np.random.default_rng(seed))
    cut = [round(share * len(g)) if len(g) > 1 else 0 for g in groups]
    fit = np.concatenate([g[n:] for g, n in zip(groups, cut, strict=True)])
    held = np.concatenate([g[:n] for g, n in zip(groups, cut, strict=True)])
    return torch.from_numpy(np.sort(fit)), torch.from_numpy(np.sort(held))


# ---------------------------------------------------------------- the linear probe


@dataclass
class LinearProbe:
    """What :func:`linear_probe` returns; the leading L is missing for features [N, D].

    Attributes:
        accuracy: on the test images, [L].
        penalty: the λ that was chosen, [L].
        validation: accuracy on the held-out train images, [R, L].
        penalties: the grid, R numbers.
        weights, bias: for features as they came, [L, D, C] and [L, C].
        objective: the minimum of f on all train images, [L] float64.
        converged: whether each final fit met its test, [L].
    """

    accuracy: Tensor
    penalty: Tensor
    validation: Tensor
    penalties: tuple[float, ...]
    weights: Tensor
    bias: Tensor
    objective: Tensor
    converged: Tensor

    def predict(self, x: Tensor) -> Tensor:
        """Classes of features [L, N, D] (or [N, D]), int64 [L, N]."""
        return (x.to(self.weights) @ self.weights + self.bias.unsqueeze(-2)).argmax(-1)


def linear_probe(
    train_x: Tensor,
    train_y: Tensor,
    test_x: Tensor,
    test_y: Tensor,
    *,
    penalties: Sequence[float] = PENALTIES,
    validation: float = 0.2,
    seed: int = 0,
    tolerance: float = 5e-7,
    max_steps: int = 500,
) -> LinearProbe:
    """Fits a linear classifier on every block; the penalty is chosen without the test images.

    For each block all penalties are fitted on a part of the train images, the one that is best on
    the rest (the larger one in a tie) is fitted again on all of them and asked once on the test
    images.

    Args:
        train_x, test_x: features [L, N, D] and [L, M, D], or [N, D] and [M, D].
        train_y, test_y: int labels [N] and [M].
        penalties: values of λ; scikit-learn's C is 1 / (λ·N). One value needs no choice.
        validation: share of each class's train images that choose.
        seed: of that part.
        tolerance, max_steps: see :func:`fit_logistic`.

    Returns:
        A :class:`LinearProbe`.

    Raises:
        ValueError: for features and labels that do not match, that are not finite, or fewer than
            two classes.
    """
    x_LND, y, z_LMD, t, classes = _check(train_x, train_y, test_x, test_y)
    grid = tuple(sorted((float(p) for p in penalties), reverse=True))
    if not grid or grid[-1] <= 0:
        raise ValueError(f"penalties must be above 0, not {list(penalties)}")
    fit, held = _held_out(y, validation, seed)
    if len(grid) > 1 and not len(held):
        raise ValueError("no image left to choose a penalty with: give one penalty, or more images")
    options = {"classes": classes, "tolerance": tolerance, "max_steps": max_steps}
    rows = []
    for x_ND, z_MD in zip(x_LND, z_LMD, strict=True):
        axes = _Axes.of(x_ND)
        x_NE, scale = axes(x_ND), axes.scale_E[None]
        best, right, start = 0, torch.full((len(grid),), torch.nan), None
        if len(grid) > 1:
            w_GERC, _, _ = fit_logistic(
                x_NE[fit][None],
                y[fit][None].to(x_NE.device),
                x_NE.new_tensor(grid),
                scale,
                **options,
            )
            logits = torch.einsum("ne,erc->rnc", x_NE[held], w_GERC[0])
            right = (logits.argmax(2).cpu() == y[held].cpu()).float().mean(1)
            best = int(right.argmax())
            start = w_GERC[:, :, best : best + 1]
        w_GERC, value, done = fit_logistic(
            x_NE[None], y[None].to(x_NE.device), x_NE.new_tensor(grid[best : best + 1]), scale,
            start=start, **options,
        )  # fmt: skip
        w_EC = w_GERC[0, :, 0]
        hit = ((axes(z_MD) @ w_EC).argmax(1).cpu() == t.cpu()).float().mean()
        rows.append(
            (hit, torch.tensor(grid[best]), right, *axes.undo(w_EC), value[0, 0], done[0, 0])
        )
    accuracy, penalty, right, weights, bias, value, done = (
        torch.stack(column) for column in zip(*rows, strict=True)
    )
    found = LinearProbe(accuracy, penalty, right.T, grid, weights, bias, value, done)
    if train_x.dim() == 2:
        for name in ("accuracy", "penalty", "weights", "bias", "objective", "converged"):
            setattr(found, name, getattr(found, name)[0])
        found.validation = found.validation[:, 0]
    return found


# ---------------------------------------------------------------- few labels


@dataclass
class LowShot:
    """What :func:`low_shot` returns.

    Attributes:
        sizes: what was asked for: shots (ints), then fractions (floats).
        mean, spread: mean and standard deviation over the draws, [S, L] (or [S]).
        draws: every draw's accuracy, [S, K, L] (or [S, K]).
    """

    sizes: tuple[int | float, ...]
    mean: Tensor
    spread: Tensor
    draws: Tensor


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
    seed: int = 0,
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
        seed: of the draws.

    Returns:
        A :class:`LowShot`.

    Raises:
        ValueError: when a class has fewer images than asked for, or as in :func:`linear_probe`.
    """
    x_LND, y, z_LMD, t, classes = _check(train_x, train_y, test_x, test_y)
    counts = [len(g) for g in _by_class(y, np.random.default_rng(0))]
    if any(s < 1 or s > min(counts) for s in shots):
        raise ValueError(
            f"shots {list(shots)}: choose from 1 to {min(counts)}, the images of the smallest class"
        )
    if any(not 0 < f <= 1 for f in fractions) or draws < 1:
        raise ValueError("fractions must be above 0 and at most 1, and draws at least 1")
    orders = [_by_class(y, np.random.default_rng([seed, d])) for d in range(draws)]
    wanted = [[s] * len(counts) for s in shots]
    wanted += [[max(1, round(f * n)) for n in counts] for f in fractions]
    result = torch.empty(len(wanted), draws, len(x_LND))
    for block, (x_ND, z_MD) in enumerate(zip(x_LND, z_LMD, strict=True)):
        axes = _Axes.of(x_ND)
        x_NE, z_ME = axes(x_ND), axes(z_MD)
        for size, numbers in enumerate(wanted):
            chosen_KN = torch.from_numpy(np.stack([
                np.concatenate([g[:n] for g, n in zip(order, numbers, strict=True)])
                for order in orders
            ]))  # fmt: skip
            scale_KE = axes.scale_E.expand(draws, -1)
            w_KERC, _, _ = fit_logistic(
                x_NE[chosen_KN], y[chosen_KN].to(x_NE.device), x_NE.new_tensor([penalty]), scale_KE,
                classes=classes,
            )  # fmt: skip
            logits = torch.einsum("me,kec->kmc", z_ME, w_KERC[:, :, 0])
            result[size, :, block] = (logits.argmax(2).cpu() == t.cpu()).float().mean(1)
    if train_x.dim() == 2:
        result = result[:, :, 0]
    return LowShot((*shots, *fractions), result.mean(1), result.std(1, correction=0), result)


# ---------------------------------------------------------------- what else is in the features


def factor_probe(
    train_x: Tensor,
    train_factors: Mapping[str, np.ndarray],
    test_x: Tensor,
    test_factors: Mapping[str, np.ndarray],
    *,
    circular: Mapping[str, float] = CIRCULAR,
    categorical: Sequence[str] = CATEGORICAL,
    penalties: Sequence[float] = RIDGE_PENALTIES,
    validation: float = 0.2,
    seed: int = 0,
) -> dict[str, Tensor]:
    """How well each known factor can be read from each block by a linear map.

    Continuous factors: ridge regression, its penalty chosen on held-out train images, scored by R²
    on the test images (1 is exact; 0 is no better than the mean; below 0 is worse). A factor on a
    circle is predicted as its cosine and sine. Categorical ones: :func:`linear_probe`'s accuracy.

    Args:
        train_x, test_x: features [L, N, D] and [L, M, D], or [N, D] and [M, D].
        train_factors, test_factors: name -> [N] and name -> [M], as in an ImageSet's ``factors``;
            add ``{"class": labels}`` to compare with the class.
        circular: name -> period of the factors that live on a circle.
        categorical: names whose values are indices.
        penalties: of the ridge, in units of the features' mean square.
        validation, seed: the part of the train images that chooses.

    Returns:
        Name -> scores [L] (0-dim for [N, D]).

    Raises:
        ValueError: when names or lengths do not match, or a factor is constant.
    """
    x_LND, z_LMD = _stacked(train_x, "train_x"), _stacked(test_x, "test_x")
    if set(train_factors) != set(test_factors):
        raise ValueError("train and test must have the same factors")
    found: dict[str, Tensor] = {}
    targets = {}
    for name in train_factors:
        a, b = np.asarray(train_factors[name]), np.asarray(test_factors[name])
        if len(a) != x_LND.shape[1] or len(b) != z_LMD.shape[1]:
            raise ValueError(f"factor {name!r} has {len(a)} and {len(b)} values, not one an image")
        if name in categorical:
            a, b = torch.as_tensor(a).long(), torch.as_tensor(b).long()
            found[name] = linear_probe(x_LND, a, z_LMD, b, seed=seed).accuracy
        elif np.ptp(a) == 0 or np.ptp(b) == 0:
            raise ValueError(f"factor {name!r} is constant, so there is nothing to read")
        else:
            targets[name] = [_targets(v, circular.get(name)) for v in (a, b)]
    fit, held = _held_out(torch.zeros(x_LND.shape[1]), validation, seed)
    blocks = zip(x_LND, z_LMD, strict=True)
    rows = [_ridge(x, z, list(targets.values()), penalties, fit, held) for x, z in blocks]
    found |= dict(zip(targets, torch.tensor(rows).T, strict=True)) if targets else {}
    if train_x.dim() == 2:
        found = {name: scores[0] for name, scores in found.items()}
    return {name: found[name] for name in train_factors}


def _targets(values: np.ndarray, period: float | None) -> Tensor:
    """What the ridge predicts: the value [N, 1], or a point on the circle [N, 2]."""
    v = torch.as_tensor(values, dtype=torch.float64)
    if period is None:
        return v[:, None]
    angle = v * (2 * torch.pi / period)
    return torch.stack([angle.cos(), angle.sin()], dim=1)


def _r2(prediction: Tensor, truth: Tensor) -> Tensor:
    """R² of [..., N, T] against [N, T], over all targets together."""
    spread = (truth - truth.mean(0)).square().sum()
    return 1 - (prediction - truth).square().sum(dim=(-2, -1)) / spread


def _ridge(x_ND, z_MD, targets: list, penalties, fit: Tensor, held: Tensor) -> list[float]:
    """R² on the test images for each target; closed form in the principal axes."""
    axes = _Axes.of(x_ND[fit])
    x_NE, z_ME = axes(x_ND).double(), axes(z_MD).double()
    scores = []
    for train, test in targets:
        train, test = train.to(x_NE), test.to(x_NE)
        weights = _ridge_weights(x_NE[fit], train[fit], penalties)
        best = int(_r2(x_NE[held] @ weights, train[held]).argmax())
        final = _ridge_weights(x_NE, train, penalties[best : best + 1])[0]
        scores.append(float(_r2(z_ME @ final, test)))
    return scores


def _ridge_weights(x_NE: Tensor, t_NT: Tensor, penalties: Sequence[float]) -> Tensor:
    """Ridge solutions for every penalty, [R, E, T]; the bias (last) is not penalised."""
    gram = x_NE.T @ x_NE / len(x_NE)
    identity = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    identity[-1, -1] = 0
    right = x_NE.T @ t_NT / len(x_NE)
    systems = torch.stack([gram + p * identity for p in penalties])
    return torch.linalg.lstsq(
        systems, right.expand(len(penalties), -1, -1), driver="gelsd"
    ).solution
