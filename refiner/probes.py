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

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from tqdm.auto import tqdm

from refiner.neighbors import device_for, full_precision, mean_and_scale

Tensor = torch.Tensor
PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
RIDGE_PENALTIES = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
CIRCULAR = {"hue": 1.0, "background_hue": 1.0, "background_angle": 360.0}  # period of each
CATEGORICAL = ("pattern", "class")
UNDECIDED = 256  # images that a class's diagonal block is taken from
BLOCK_BYTES = 2**29  # of diagonal blocks; with more, all classes share one
# Of features in one product. On a CPU what fits its cache, on a GPU as much as there is room for.
GROUP_BYTES = {"cpu": 2**22, "cuda": 2**31}


# ---------------------------------------------------------------- the solver


class _Newton:
    """G logistic regressions: their function, and Newton steps towards the minimum.

    Args:
        x_GNE: float32 features, the last column all ones.
        y_GN: int64 labels.
        classes: C.
    """

    def __init__(self, x_GNE: Tensor, y_GN: Tensor, classes: int):
        self.x, self.classes, self.n = x_GNE, classes, x_GNE.shape[1]
        self.hot = F.one_hot(y_GN, classes).to(x_GNE.dtype)
        self.wide = False  # evaluate f and its gradient in float64

    def evaluate(self, w_GCE: Tensor, penalty_G1E: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """f float64 [G], its gradient [G, C, E], the softmax [G, N, C]."""
        dtype = torch.float64 if self.wide else torch.float32
        w = w_GCE.to(dtype)
        losses, gradient, shares = 0, 0, []
        rows = max(1, 2**25 // max(1, self.x[:, 0].numel()))
        for x, hot in zip(self.x.split(rows, 1), self.hot.split(rows, 1), strict=True):
            x = x.to(dtype)
            log_p = F.log_softmax(x @ w.mT, dim=-1)
            losses = losses - (log_p * hot).sum((1, 2), dtype=torch.float64)
            p = log_p.exp_()
            gradient = gradient + (p - hot).mT @ x
            shares.append(p.float())
        norm = (penalty_G1E.double() * w_GCE.double().square()).sum((1, 2))
        gradient = gradient / self.n + penalty_G1E.to(dtype) * w
        p_GNC = shares[0] if len(shares) == 1 else torch.cat(shares, dim=1)
        return losses / self.n + norm / 2, gradient, p_GNC

    def curve(self, v_GCE: Tensor, p_GNC: Tensor, penalty_G1E: Tensor) -> Tensor:
        """The Hessian times v."""
        u = (self.x @ v_GCE.mT).mul_(p_GNC)
        u.addcmul_(p_GNC, u.sum(-1, keepdim=True), value=-1)
        return (u.mT @ self.x).div_(self.n).add_(penalty_G1E * v_GCE)

    def preconditioner(self, p_GNC: Tensor, penalty_G1E: Tensor) -> Callable[[Tensor], Tensor]:
        """Applies the inverse of the Hessian's diagonal blocks to [G, C, E].

        A block is Σ_n p(1−p) x xᵀ / N. The images with the largest p(1−p) are taken as they are,
        the others as if all had the mean x xᵀ. Where blocks would cost more than they
        save (few images, very many classes), one serves all classes.
        """
        (g, n, e), c = self.x.shape, self.classes
        weight_GKN = (p_GNC * (1 - p_GNC)).mT
        if n < 4 * e or g * c * e * e * 4 > BLOCK_BYTES:
            weight_GKN = weight_GKN.mean(1, keepdim=True)
        k = weight_GKN.shape[1]
        most_GKU, where = weight_GKN.topk(min(n, max(UNDECIDED, 2 * e)), sorted=False)
        rest_GK = (weight_GKN.sum(-1) - most_GKU.sum(-1)).clamp_(min=0)
        flat = (where + torch.arange(g, device=where.device)[:, None, None] * n).flatten()
        x_GKUE = self.x.reshape(g * n, e).index_select(0, flat).view(g, k, -1, e)
        block = (x_GKUE * most_GKU[..., None]).mT @ x_GKUE
        if most_GKU.shape[-1] < n:
            block += rest_GK[..., None, None] * self.mean_product()[:, None]
        block /= n
        diagonal = block.diagonal(dim1=-2, dim2=-1)
        diagonal += penalty_G1E + 1e-5 * diagonal.mean(-1, keepdim=True) + 1e-12
        factor, failed = torch.linalg.cholesky_ex(block)
        lost = failed.bool()[..., None, None]  # rounding made it indefinite: its diagonal will do
        factor = torch.where(lost, torch.diag_embed(diagonal.sqrt()), factor)
        one = torch.eye(e, device=block.device).expand_as(block)
        half = torch.linalg.solve_triangular(factor, one, upper=False)
        inverse = (half.mT @ half).view(g * k, e, e)
        return lambda r: torch.bmm(r.reshape(g * k, c // k, e), inverse).view(g, c, e)

    def mean_product(self) -> Tensor:
        """The mean of x xᵀ, [G, E, E]."""
        if not hasattr(self, "_mean_product"):
            self._mean_product = self.x.mT @ self.x / self.n
        return self._mean_product

    def gap(self, gradient_GCE: Tensor, p_GNC: Tensor, penalty_G: Tensor) -> Tensor:
        """How far f is above its minimum at most, float64 [G]."""
        square = gradient_GCE.double().square()
        curvature_GC = (p_GNC * (1 - p_GNC)).mean(1).clamp_(min=1e-12).double()
        bias = (square[..., -1] / curvature_GC).sum(1)
        return square[..., :-1].sum((1, 2)) / (2 * penalty_G) + bias / 2

    def step(self, gradient, p_GNC, penalty_G1E, solve, goal_G: Tensor, live_G: Tensor) -> Tensor:
        """The Newton step of the live groups by preconditioned conjugate gradients.

        A group's ends when what its gradient would be after the step meets ``goal_G`` (of
        ‖∂f/∂W‖²), or is a twentieth of what it was.
        """
        r = gradient.float()
        d, z = torch.zeros_like(r), solve(r)
        v, rz = z, _dot(r, z)
        enough = rz / 400
        for _ in range(500):
            curved = self.curve(v, p_GNC, penalty_G1E)
            a = torch.where(live_G, rz / _dot(v, curved).clamp_(min=1e-38), 0.0)[:, None, None]
            d = torch.addcmul(d, v, a, value=-1)
            r = torch.addcmul(r, curved, a, value=-1)
            z, before = solve(r), rz
            rz = _dot(r, z)
            live_G = live_G & (r[..., :-1].square().sum((1, 2)) > goal_G) & (rz > enough)
            if not live_G.any():
                break
            v = torch.addcmul(z, v, (rz / before.clamp(min=1e-38))[:, None, None])
        return d


def _dot(a_GCE: Tensor, b_GCE: Tensor) -> Tensor:
    return (a_GCE * b_GCE).sum((1, 2))


@dataclass(frozen=True, eq=False)
class _Fit:
    """Solutions: weights [R, G, C, E], f [R, G] and how far above the minimum it can be [R, G]."""

    weights: Tensor
    objective: Tensor
    gap: Tensor


def fit_logistic(x_GNE: Tensor, y_GN: Tensor, penalty_RG: Tensor, *, classes: int,
                 start: Tensor | None = None, tolerance: float = 1e-4,
                 max_steps: int = 50) -> _Fit:  # fmt: skip
    """Solves G·R logistic regressions.

    Args:
        x_GNE: float32 features of about unit variance, the last column all ones.
        y_GN: int64 labels.
        penalty_RG: λ, float64, from the strongest to the weakest.
        classes: C.
        start: weights [G, C, E] to begin with; zeros otherwise.
        tolerance: a problem has converged when f is proven to be above its minimum by no more than
            this share of f.
        max_steps: Newton steps of a penalty at most.

    Returns:
        A :class:`_Fit`.
    """
    problem = _Newton(x_GNE, y_GN, classes)
    w = torch.zeros(len(x_GNE), classes, x_GNE.shape[2], dtype=torch.float64, device=x_GNE.device)
    w = w if start is None else start.double()
    log_RG = penalty_RG.log()
    found: list[tuple[Tensor, Tensor, Tensor]] = []
    for i, penalty_G in enumerate(penalty_RG):
        if i > 1:
            ahead_G = (log_RG[i] - log_RG[i - 1]) / (log_RG[i - 1] - log_RG[i - 2])
            w = w + ahead_G.clamp(max=1)[:, None, None] * (w - found[-2][0])
        found.append(_solve(problem, w, penalty_G, tolerance, max_steps))
        w = found[-1][0]
    return _Fit(*(torch.stack(part) for part in zip(*found, strict=True)))


def _solve(problem: _Newton, w: Tensor, penalty_G: Tensor, tolerance: float, max_steps: int):
    """Weights [G, C, E], f [G] and its gap [G] for one penalty a group."""
    penalty_G1E = penalty_G.float()[:, None, None].repeat(1, 1, w.shape[-1])
    penalty_G1E[..., -1] = 0
    problem.wide = False
    value, gradient, p = problem.evaluate(w, penalty_G1E)
    for step in range(max_steps + 1):
        gap = problem.gap(gradient, p, penalty_G)
        live = gap > tolerance * value
        if not live.any() or step == max_steps:
            break
        # Float32 is soon as far as it gets; where that is not enough float64 goes on.
        if step == 4:
            problem.wide = True
            value, gradient, p = problem.evaluate(w, penalty_G1E)
        if step % 3 == 0:
            solve = problem.preconditioner(p, penalty_G1E)
        goal = (tolerance * value * penalty_G).float()  # half of what is allowed
        d = problem.step(gradient, p, penalty_G1E, solve, goal, live).double()
        w, value, gradient, p = _search(problem, (w, value, gradient, p), d, penalty_G1E)
    return w, value, gap


def _search(problem: _Newton, here: tuple[Tensor, ...], d: Tensor, penalty_G1E: Tensor):
    """Halves each group's step until f falls as much as its slope promises (Armijo)."""
    w, value, gradient, _ = here
    slope, size = _dot(gradient.double(), d), torch.ones_like(value)
    for _ in range(30):
        trial = w + size[:, None, None] * d
        there = trial, *problem.evaluate(trial, penalty_G1E)
        bad = ~(there[1] <= value + 1e-4 * size * slope + 1e-7 * value)
        if not bad.any():
            return there
        size = torch.where(bad, size / 2, size)
    # What is left cannot get any lower.
    wide = [bad.view(-1, *(1,) * (old.ndim - 1)) for old in here]
    return tuple(torch.where(*part) for part in zip(wide, here, there, strict=True))


# ---------------------------------------------------------------- what all probes share


def _check(train_x, train_y, test_x, test_y) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Features [L, N, D] and [L, M, D], labels on the CPU; one clear error for what cannot be."""
    x_LND, z_LMD = _check_features(train_x, test_x)
    labels = []
    for name, y, x in (("train", train_y, x_LND), ("test", test_y, z_LMD)):
        if y is None:
            raise ValueError(f"the {name} images have no labels")
        y = torch.as_tensor(y).cpu()
        if y.shape != x.shape[1:2]:
            raise ValueError(f"{list(y.shape)} {name} labels for {x.shape[1]} {name} images")
        if y.is_floating_point() or len(y) == 0 or int(y.min()) < 0:
            raise ValueError(f"{name} labels must be classes from 0 on, one an image")
        labels.append(y.long())
    if len(labels[0].unique()) < 2:
        raise ValueError("a probe needs at least two classes in the train labels")
    return x_LND, labels[0], z_LMD, labels[1]


def _check_features(train_x: Tensor, test_x: Tensor) -> tuple[Tensor, Tensor]:
    for name, x in (("train_x", train_x), ("test_x", test_x)):
        if x.ndim not in (2, 3) or not x.is_floating_point() or 0 in x.shape:
            raise ValueError(f"{name} must be floats [N, D] or [L, N, D], not {list(x.shape)}")
        # A sum is finite only if everything is, unless it overflows.
        if not x.sum(dtype=torch.float64).isfinite() and not x.isfinite().all():
            raise ValueError(
                f"{name} has NaN or infinite values; look at the model or its precision"
            )
    if train_x.shape[:-2] != test_x.shape[:-2] or train_x.shape[-1] != test_x.shape[-1]:
        raise ValueError(
            f"train and test features do not match: {list(train_x.shape)}, {list(test_x.shape)}"
        )
    return (train_x, test_x) if train_x.ndim == 3 else (train_x[None], test_x[None])


def shuffled_by_class(y_N: Tensor, rng: np.random.Generator) -> list[np.ndarray]:
    """The shuffled positions of each class that occurs."""
    labels = y_N.numpy()
    return [rng.permutation(np.flatnonzero(labels == c)) for c in np.unique(labels)]


def _held_out(y_N: Tensor, share: float, seed: int) -> tuple[Tensor, Tensor]:
    """Positions to fit on and to choose with; a class of one image stays in the first part."""
    if not 0 < share < 1:
        raise ValueError(f"validation must be a share above 0 and below 1, not {share}")
    groups = shuffled_by_class(y_N, np.random.default_rng(seed))
    cut = [min(round(share * len(g)), len(g) - 1) for g in groups]
    fit = np.concatenate([g[n:] for g, n in zip(groups, cut, strict=True)])
    held = np.concatenate([g[:n] for g, n in zip(groups, cut, strict=True)])
    return torch.from_numpy(np.sort(fit)), torch.from_numpy(np.sort(held))


@dataclass(frozen=True, eq=False)
class Scaling:
    """x ↦ (x − mean) · scale of some blocks, float64 [G, 1, D] each."""

    mean: Tensor
    scale: Tensor

    @classmethod
    def of(cls, x_GND: Tensor, standardize: bool, device: torch.device) -> Scaling:
        if not standardize:
            mean = torch.zeros(len(x_GND), 1, x_GND.shape[2], dtype=torch.float64, device=device)
            return cls(mean, torch.ones_like(mean))
        parts = zip(*(mean_and_scale(x.to(device)) for x in x_GND), strict=True)
        return cls(*(torch.stack(part)[:, None] for part in parts))

    def of_blocks(self, index: Tensor) -> Scaling:
        index = index.to(self.mean.device)
        return Scaling(self.mean[index], self.scale[index])

    def __call__(self, x_GND: Tensor) -> Tensor:
        """float32 [G, N, E], the last column all ones."""
        g, n, d = x_GND.shape
        ready = torch.ones(g, n, d + 1, device=x_GND.device)
        for block in range(g):  # float64 of all blocks at once might not fit
            ready[block, :, :d] = (x_GND[block] - self.mean[block]) * self.scale[block]
        return ready

    def undo(self, w_GCE: Tensor) -> tuple[Tensor, Tensor]:
        """Weights [G, D, C] and bias [G, C] for features as they came, float64."""
        w_GDC = (w_GCE[..., :-1] * self.scale).mT
        return w_GDC, w_GCE[..., -1] - (self.mean @ w_GDC)[:, 0]


def _chunks(groups: int, bytes_a_group: int, device: torch.device) -> list[slice]:
    """Groups that are solved together."""
    step = max(1, GROUP_BYTES.get(device.type, GROUP_BYTES["cpu"]) // bytes_a_group)
    return [slice(i, min(i + step, groups)) for i in range(0, groups, step)]


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
        if x.ndim != self.weights.ndim or x.shape[-1] != self.weights.shape[-2]:
            raise ValueError(
                f"features {list(x.shape)} do not fit a probe of weights {list(self.weights.shape)}"
            )
        if x.ndim == 2:
            return self.classes[_best(x.cpu()[None], self.weights[None], self.bias[None])[0]]
        return self.classes[_best(x.cpu(), self.weights, self.bias)]


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
        train_y, test_y: int labels [N] and [M]. A test image of a class that train lacks counts as
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
    x_LND, y, z_LMD, t = _check(train_x, train_y, test_x, test_y)
    grid = penalty_grid(penalties)
    device = device_for(device, train_x)
    classes, y = y.unique(return_inverse=True)
    fit, held = _held_out(y, validation, seed)
    if len(grid) > 1 and not len(held):
        raise ValueError("no image left to choose a penalty with: give one penalty, or more images")
    problem = PenaltyChoice(
        y.to(device),
        fit.to(device),
        held.to(device),
        torch.tensor(grid).to(device),
        {"classes": len(classes), "tolerance": tolerance, "max_steps": max_steps},
    )
    columns = []
    with (
        full_precision(device),
        tqdm(total=len(x_LND), desc="linear probes", unit="block", disable=not progress) as bar,
    ):
        for chunk in _chunks(len(x_LND), x_LND[0].numel() * 4, device):
            x_GND = x_LND[chunk].to(device)
            scaling = Scaling.of(x_GND, standardize, device)
            penalty, right, solved = problem.solve(scaling(x_GND))
            weights, bias = scaling.undo(solved.weights[0])
            label = classes[_best(z_LMD[chunk].to(device), weights, bias).cpu()]
            accuracy = (label == t).float().mean(1)
            gap = solved.gap[0] / solved.objective[0].clamp(min=1e-300)
            column = accuracy, penalty, right, weights, bias, solved.objective[0], gap
            columns.append([part.cpu() for part in column])
            bar.update(len(x_GND))
    parts = [torch.cat(column) for column in zip(*columns, strict=True)]
    parts = parts if train_x.ndim == 3 else [part[0] for part in parts]
    accuracy, penalty, right, weights, bias, objective, gap = parts
    right = right.T if train_x.ndim == 3 else right
    return LinearProbe(accuracy, penalty, right, grid, weights, bias, classes, objective, gap,
                       gap <= tolerance)  # fmt: skip


def penalty_grid(penalties: Sequence[float]) -> tuple[float, ...]:
    """The penalties without repeats, falling.

    Raises:
        ValueError: for none, or for one that is not a positive number.
    """
    grid = tuple(sorted({float(p) for p in penalties}, reverse=True))
    if not grid or not 0 < grid[-1] <= grid[0] < math.inf:
        raise ValueError(f"penalties must be above 0, not {list(penalties)}")
    return grid


def _best(x_LND: Tensor, weights_LDC: Tensor, bias_LC: Tensor) -> Tensor:
    """The class of the largest logit, float64 throughout, [L, N]."""
    found = [
        (x.double() @ w + b).argmax(-1) for x, w, b in zip(x_LND, weights_LDC, bias_LC, strict=True)
    ]
    return torch.stack(found)


@dataclass(frozen=True, eq=False)
class PenaltyChoice:
    """Fits a grid on one part, chooses on the other, fits again on both."""

    y_N: Tensor
    fit: Tensor
    held: Tensor
    grid_R: Tensor
    options: dict

    def solve(self, x_GNE: Tensor) -> tuple[Tensor, Tensor, _Fit]:
        """The chosen penalty [G], accuracies on the held-out part [G, R] and the last fit."""
        groups, start = len(x_GNE), None
        penalty_RG = self.grid_R.double()[:, None].expand(-1, groups)
        right_GR = torch.full((groups, len(self.grid_R)), torch.nan)
        best = torch.zeros(groups, dtype=torch.int64, device=x_GNE.device)
        if len(self.grid_R) > 1:
            y_GN = self.y_N[self.fit].expand(groups, -1)
            tried = fit_logistic(x_GNE[:, self.fit], y_GN, penalty_RG, **self.options)
            logits = x_GNE[:, self.held] @ tried.weights.float().mT  # [R, G, n, C]
            right_GR = (logits.argmax(-1) == self.y_N[self.held]).float().mean(-1).T
            best = right_GR.argmax(1)
            start = tried.weights[best, torch.arange(groups, device=best.device)]
        solved = fit_logistic(x_GNE, self.y_N.expand(groups, -1), self.grid_R.double()[best][None],
                              start=start, **self.options)  # fmt: skip
        return self.grid_R[best], right_GR, solved


# ---------------------------------------------------------------- few labels


@dataclass(frozen=True, eq=False)
class LowShot:
    """What :func:`low_shot` returns; the axis L is missing for features [N, D].

    Attributes:
        sizes: what was asked for: shots (ints), then fractions (floats).
        images: how many labelled images each size has in all, [S].
        mean, spread: mean and standard deviation over the draws, float32 [S, L].
        draws: every draw's accuracy, [S, K, L].
    """

    sizes: tuple[int | float, ...]
    images: tuple[int, ...]
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
    x_LND, y, z_LMD, t = _check(train_x, train_y, test_x, test_y)
    (penalty,), device = penalty_grid([penalty]), device_for(device, train_x)
    classes, y = y.unique(return_inverse=True)
    counts = y.bincount().tolist()
    _check_sizes(shots, fractions, draws, counts)
    wanted = [[s] * len(counts) for s in shots]
    wanted += [[max(1, round(f * n)) for n in counts] for f in fractions]
    orders = [shuffled_by_class(y, np.random.default_rng([seed, d])) for d in range(draws)]
    accuracy = torch.empty(len(wanted), draws, len(x_LND))
    with (
        full_precision(device),
        tqdm(total=len(wanted) * draws * len(x_LND), desc="low-shot probes", unit="fit",
             disable=not progress) as bar,
    ):  # fmt: skip
        scaling = Scaling.of(x_LND, standardize, device)
        for size, numbers in enumerate(wanted):
            few = _FewLabels(x_LND, y, scaling, _drawn(orders, numbers), penalty, len(classes))
            weights_LKCE = few.solve(bar)
            for block, z_MD in enumerate(z_LMD):
                z_ME = scaling.of_blocks(torch.tensor([block]))(z_MD[None].to(device))[0]
                label = classes[(z_ME @ weights_LKCE[block].mT).argmax(-1).cpu()]
                accuracy[size, :, block] = (label == t).float().mean(1)
    accuracy = accuracy if train_x.ndim == 3 else accuracy[..., 0]
    return LowShot((*shots, *fractions), tuple(map(sum, wanted)), accuracy.mean(1),
                   accuracy.std(1, correction=0), accuracy)  # fmt: skip


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
        for part in _chunks(blocks * draws, n * (dim + 1) * 4, device):
            group = torch.arange(blocks * draws)[part]
            block_G, rows_GN = group // draws, self.chosen_KN[group % draws]
            home = self.x_LND.device
            x_GND = self.x_LND[block_G[:, None].to(home), rows_GN.to(home)].to(device)
            penalty_RG = torch.full((1, len(group)), self.penalty, dtype=torch.float64)
            x_GNE = self.scaling.of_blocks(block_G)(x_GND)
            solved = fit_logistic(x_GNE, self.y_N[rows_GN].to(device), penalty_RG.to(device),
                                  classes=self.classes)  # fmt: skip
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
        raise ValueError(
            f"shots must be from 1 to {fewest}, the images of the smallest class, not {list(shots)}"
        )
    if not (*shots, *fractions):
        raise ValueError("give shots or fractions: there is no number of labels to draw")
    if any(not 0 < f <= 1 for f in fractions) or draws < 1:
        raise ValueError("fractions must be above 0 and at most 1, and draws at least 1")


def possible_shots(shots: Sequence[int], fractions: Sequence[float], labels: Tensor) -> list[int]:
    """The shots that every class has images for.

    Raises:
        ValueError: where none is left, and no fractions either.
    """
    fewest = int(labels.unique(return_counts=True)[1].min())
    possible = [k for k in shots if k <= fewest]
    if shots and not possible and not fractions:
        raise ValueError(
            f"the smallest class has {fewest} train images, too few for {min(shots)} labels a class"
        )
    return possible


# ---------------------------------------------------------------- what else is in the features


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
    x_LND, z_LMD = _check_features(train_x, test_x)
    _check_factors(train_factors, test_factors, x_LND.shape[1], z_LMD.shape[1])
    device, grid = device_for(device, train_x), penalty_grid(penalties)
    common = {"validation": validation, "standardize": standardize, "seed": seed, "device": device}
    found: dict[str, Tensor] = {}
    for name in train_factors:
        if name in categorical:
            y, t = (torch.as_tensor(f[name]).long() for f in (train_factors, test_factors))
            found[name] = linear_probe(x_LND, y, z_LMD, t, progress=progress, **common).accuracy
    plain = [name for name in train_factors if name not in found]
    if plain:
        targets = [
            [_targets(f[name], circular.get(name)).to(device) for name in plain]
            for f in (train_factors, test_factors)
        ]
        fit, held = _held_out(torch.zeros(x_LND.shape[1], dtype=torch.int64), validation, seed)
        rows = []
        with full_precision(device):
            for x_ND, z_MD in tqdm(zip(x_LND, z_LMD, strict=True), total=len(x_LND),
                                   desc="factors", unit="block", disable=not progress):  # fmt: skip
                x_ND, z_MD = x_ND.to(device), z_MD.to(device)
                scaling = Scaling.of(x_ND[None], standardize, device)
                x_NE, z_ME = scaling(x_ND[None])[0].double(), scaling(z_MD[None])[0].double()
                rows.append(_ridge_scores(x_NE, z_ME, *targets, grid, fit.to(device),
                                          held.to(device)))  # fmt: skip
        found |= dict(zip(plain, torch.tensor(rows).T, strict=True))
    pick = (lambda scores: scores) if train_x.ndim == 3 else (lambda scores: scores[0])
    return {name: pick(found[name]) for name in train_factors}


def _check_factors(train: Mapping, test: Mapping, n: int, m: int) -> None:
    if set(train) != set(test) or not train:
        raise ValueError(
            f"train and test must have the same factors, not {sorted(train)} and {sorted(test)}"
        )
    for name in train:
        a, b = np.asarray(train[name]), np.asarray(test[name])
        if a.shape != (n,) or b.shape != (m,):
            raise ValueError(
                f"factor {name!r} has values {list(a.shape)} and {list(b.shape)}, "
                f"the images are {n} and {m}"
            )
        if not (np.isfinite(a).all() and np.isfinite(b).all()):
            raise ValueError(f"factor {name!r} has NaN or infinite values")
        if np.ptp(a) == 0 or np.ptp(b) == 0:
            raise ValueError(f"factor {name!r} is constant, so there is nothing to read")


def _targets(values, period: float | None) -> Tensor:
    """What the ridge predicts: the value [N, 1], or a point on the circle [N, 2]."""
    v = torch.as_tensor(values, dtype=torch.float64)
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
