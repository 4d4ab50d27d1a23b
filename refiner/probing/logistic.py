"""Many L2-penalised logistic regressions at once."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import mean_and_scale

PENALTIES = (1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
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


def fit_logistic(
    x_GNE: Tensor,
    y_GN: Tensor,
    penalty_RG: Tensor,
    *,
    classes: int,
    start: Tensor | None = None,
    tolerance: float = 1e-4,
    max_steps: int = 50,
) -> _Fit:
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


def group_chunks(groups: int, bytes_a_group: int, device: torch.device) -> list[slice]:
    """Groups that are solved together."""
    step = max(1, GROUP_BYTES.get(device.type, GROUP_BYTES["cpu"]) // bytes_a_group)
    return [slice(i, min(i + step, groups)) for i in range(0, groups, step)]


def penalty_grid(penalties: Sequence[float], name: str = "penalties") -> tuple[float, ...]:
    """The penalties, or what ``name`` says, without repeats, falling.

    Raises:
        ValueError: for none, or for one that is not a positive number.
    """
    grid = tuple(sorted({float(p) for p in penalties}, reverse=True))
    if not grid or not 0 < grid[-1] <= grid[0] < math.inf:
        raise UserError(f"{name} must be above 0, not {list(penalties)}")
    return grid


def best_class(x_LND: Tensor, weights_LDC: Tensor, bias_LC: Tensor) -> Tensor:
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
        y_GN, penalty_1G = self.y_N.expand(groups, -1), self.grid_R.double()[best][None]
        solved = fit_logistic(x_GNE, y_GN, penalty_1G, start=start, **self.options)
        return self.grid_R[best], right_GR, solved
