"""What features say without labels, k-means, and how similar blocks are.

Every function takes all blocks at once, [L, N, D], or one set, [N, D]. Arithmetic is float64
unless a docstring says otherwise, on the features' device; the results are float32 on the CPU.
A measure without labels is a symptom, not a score: each docstring names what may be compared.

Shape legend: L blocks, N images, V views of an image, D width, k clusters, R restarts, T trials.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import check_labels, full_precision, standardized
from refiner.probing.search import Graph, nearest_neighbors

CHUNK_BYTES = 2**26  # of scores held at once


# ---------------------------------------------------------------- spectra


def rankme(x: Tensor, *, center: bool = False) -> Tensor:
    """RankMe, or effective rank: how many directions the features really use.

    ``exp(-Σ p log p)`` with ``p = σ / Σσ``, σ the singular values of the features [N, D] (Roy &
    Vetterli 2007; Garrido et al. 2023, arXiv 2210.02885, whose constant of 1e-7 is left out).

    Compare only sets of the same N and D: it is at most min(N, D) and still grows with N below
    several times D. Its authors compare runs of one method; across methods a higher rank need not
    be better. Features are not centred, as in the paper, so a large common mean lowers it.

    Args:
        x: [L, N, D] or [N, D].
        center: subtract the mean first.

    Returns:
        float32 [L] or scalar, 1 to min(N, D); NaN for features that are all zero.

    Raises:
        ValueError: for other shapes, fewer than two images, or features that are not finite.
    """
    return _each(x, lambda x_ND: _effective_rank(_spectrum(x_ND, center=center).sqrt()))


def participation_ratio(x: Tensor) -> Tensor:
    """Participation ratio: ``(Σλ)² / Σλ²``, λ the eigenvalues of the covariance.

    D for isotropic features, 1 for features on a line (Gao et al. 2017, doi 10.1101/214262). Large
    eigenvalues dominate it, more than they dominate :func:`rankme`.

    Compare only sets of the same N: few images bias it downwards (isotropic Gaussian features give
    about ``N D / (N + D)``). It changes with the scale of single features.

    Returns:
        float32 [L] or scalar, 1 to D; NaN for constant features.

    Raises:
        ValueError: as :func:`rankme`.
    """

    def ratio(x_ND: Tensor) -> Tensor:
        gram = _gram(x_ND, center=True)
        return _defined(gram.trace() ** 2 / gram.square().sum(), where=gram.trace() > 0)

    return _each(x, ratio)


def alpha_req(x: Tensor, *, ranks: tuple[int, int] = (11, 100)) -> Tensor:
    """α-ReQ: how fast the eigenvalues of the covariance decay, ``λ_j ∝ j^-α``.

    α is the slope of log λ over log j, fitted with weights 1/j (Agrawal et al. 2022, "α-ReQ",
    NeurIPS; the fit is Stringer et al.'s, doi 10.1038/s41586-019-1346-5). Near 1 the spectrum is
    neither collapsed (large α) nor white (α near 0).

    Compare only fits over the same ranks of sets of the same N and D, and look at the spectrum
    once: α of a spectrum that is no power law says little. With few images the tail falls too fast.

    Args:
        x: [L, N, D] or [N, D].
        ranks: first and last j of the fit, counted from 1; cut where eigenvalues vanish.

    Returns:
        float32 [L] or scalar; NaN where fewer than two eigenvalues are left to fit.

    Raises:
        ValueError: as :func:`rankme`, or for ranks that are no range.
    """
    first, last = ranks
    if not 1 <= first < last:
        raise UserError(f"ranks must be a range from at least 1, like (11, 100), not {ranks}")

    def slope(x_ND: Tensor) -> Tensor:
        spectrum = _spectrum(x_ND, center=True)
        spectrum = spectrum[spectrum > 1e-12 * spectrum[0]][first - 1 : last]
        if len(spectrum) < 2:
            return spectrum.new_tensor(torch.nan)
        j = torch.arange(first, first + len(spectrum), dtype=torch.float64, device=x_ND.device)
        u, v, w = j.log(), spectrum.log(), 1 / j / (1 / j).sum()
        u, v = u - (w * u).sum(), v - (w * v).sum()
        return -(w * u * v).sum() / (w * u * u).sum()

    return _each(x, slope)


def lidar(views: Tensor, *, delta: float = 1e-4) -> Tensor:
    """LiDAR: the effective rank of what tells images apart, beyond what tells their views apart.

    The eigenvalues of ``Σ_w^-½ Σ_b Σ_w^-½`` (linear discriminant analysis with every image its own
    class: Σ_b of the images' means, Σ_w of the views around them, plus δ on its diagonal) go
    through the entropy of :func:`rankme` (Thilak et al. 2023, arXiv 2312.04000).

    Compare only the same images, views, V and D. At most min(N - 1, D). Σ_w needs N (V - 1) well
    above D, the paper takes 1000 images of 50 views; δ is absolute, so a change of the features'
    scale matters.

    Args:
        views: [L, N, V, D] or [N, V, D], several augmented views of each image.
        delta: δ.

    Returns:
        float32 [L] or scalar; NaN where all images have the same mean.

    Raises:
        ValueError: as :func:`rankme`, or for fewer than two views.
    """
    _check_views(views)

    def rank(x_NVD: Tensor) -> Tensor:
        mean_ND = x_NVD.double().mean(1)
        within_DD = _gram((x_NVD.double() - mean_ND[:, None]).flatten(0, 1), side="features")
        n, v, dim = x_NVD.shape
        within_DD = within_DD / (n * (v - 1)) + delta * torch.eye(dim).to(within_DD)
        between_DD = _gram(mean_ND, center=True, side="features") / (n - 1)
        factor = torch.linalg.cholesky(within_DD)
        half = torch.linalg.solve_triangular(factor, between_DD, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
        return _effective_rank(torch.linalg.eigvalsh(whitened).clamp_min(0))

    return _each(views, rank, views=True)


def _effective_rank(values: Tensor) -> Tensor:
    rank = torch.special.entr(values / values.sum()).sum().exp()
    return _defined(rank, where=values.sum() > 0)


def _spectrum(x_ND: Tensor, *, center: bool) -> Tensor:
    """Squared singular values, falling: the eigenvalues of XᵀX, at most min(N, D)."""
    return torch.linalg.eigvalsh(_gram(x_ND, center=center)).clamp_min(0).flip(0)


def _gram(x_ND: Tensor, *, center: bool = False, side: str = "smaller") -> Tensor:
    """XᵀX [D, D], or the smaller XXᵀ [N, N], which has the same eigenvalues other than zero."""
    x_ND = x_ND.double()
    if center:
        mean = x_ND.mean(0)
        x_ND = x_ND - mean
        # What is left of a constant feature is rounding, not variance.
        x_ND = x_ND * (x_ND.abs().amax(0) > 1e-12 * mean.abs())
    few = side == "smaller" and len(x_ND) < x_ND.shape[1]
    return x_ND @ x_ND.T if few else x_ND.T @ x_ND


# ---------------------------------------------------------------- on the unit sphere


def alignment(views: Tensor, *, alpha: float = 2.0) -> Tensor:
    """How far apart views of one image lie: mean of ``‖u - v‖^α`` over pairs of unit vectors.

    Wang & Isola 2020 (arXiv 2005.10242). Small is aligned. Only together with
    :func:`uniformity` it means something: collapsed features are perfectly aligned. Compare only
    the same images and the same augmentation.

    Args:
        views: [L, N, V, D] or [N, V, D].
        alpha: α.

    Returns:
        float32 [L] or scalar, 0 to ``2^α``.

    Raises:
        ValueError: as :func:`lidar`, or for a zero vector.
    """
    _check_views(views)

    def distance(x_NVD: Tensor) -> Tensor:
        unit = _unit(x_NVD)
        pairs = torch.combinations(torch.arange(unit.shape[1])).tolist()
        far = [(unit[:, a] - unit[:, b]).norm(dim=-1).pow(alpha).mean() for a, b in pairs]
        return torch.stack(far).mean()

    return _each(views, distance, views=True)


def uniformity(x: Tensor, *, t: float = 2.0) -> Tensor:
    """How evenly features cover the sphere: ``log mean exp(-t ‖u_i - u_j‖²)`` over all i ≠ j.

    Wang & Isola 2020 (arXiv 2005.10242). Lower is more uniform; 0 is total collapse. Features
    that are uniform on the sphere give ``log 0F1(; D/2; t²) - 2t``, near -2t for a large D, so
    compare only the same D and t. The mean of uncentred features counts: it pulls towards 0.
    Products are float32, sums float64.

    Returns:
        float32 [L] or scalar, at most 0.

    Raises:
        ValueError: as :func:`rankme`, or for a zero vector.
    """

    def log_mean(x_ND: Tensor) -> Tensor:
        unit, n = _unit(x_ND).float(), len(x_ND)
        total = torch.zeros((), dtype=torch.float64, device=unit.device)
        for start in range(0, n, step := _rows(4 * n)):
            with full_precision(unit.device):
                cosine = unit[start : start + step] @ unit.T
            # ‖u - v‖² = 2 - 2 cos; the diagonal is left out.
            potential = cosine.sub_(1).mul_(2 * t).exp_()
            potential.diagonal(start).zero_()
            total += potential.sum(dtype=torch.float64)
        return (total / (n * (n - 1))).log()

    return _each(x, log_mean)


def collapse_std(x: Tensor) -> Tensor:
    """Standard deviation of unit-length features, times √D: 1 if isotropic, 0 if collapsed.

    The mean over features of their deviation over images, as SimSiam watches it (Chen & He 2021,
    arXiv 2011.10566; there without the √D). Total collapse alone shows: features that fill half of
    the dimensions evenly still give 0.7. May be compared across D and N.

    Returns:
        float32 [L] or scalar, 0 to 1.

    Raises:
        ValueError: as :func:`rankme`, or for a zero vector.
    """
    return _each(x, lambda a: _unit(a).std(0, correction=0).mean() * math.sqrt(a.shape[-1]))


def _unit(x: Tensor) -> Tensor:
    x = x.double()
    norm = x.norm(dim=-1, keepdim=True)
    if not (norm > 0).all():
        raise UserError("a feature vector is zero and has no direction")
    return x / norm


# ---------------------------------------------------------------- similarity of blocks


@torch.no_grad()
def linear_cka(x: Tensor, y: Tensor | None = None, *, debiased: bool = False) -> Tensor:
    """Linear CKA of every block of x with every block of y.

    ``‖YᵀX‖² / (‖XᵀX‖ ‖YᵀY‖)`` in Frobenius norms of centred features (Kornblith et al. 2019, arXiv
    1905.00414): 1 if a rotation and one scale turn one into the other. y may be of another model or
    width, such as the same images before and after refining.

    With N below several times D the value is biased towards 1, so compare only the same N, or take
    ``debiased``, whose expectation is 0 for independent features (the unbiased HSIC of Song et al.
    2012, as in Nguyen et al. 2021, arXiv 2010.15327). A few directions of large variance dominate.

    Args:
        x: [L1, N, D1] or [N, D1].
        y: [L2, N, D2] or [N, D2], of the same images in the same order; default x itself.
        debiased: see above; can be slightly below 0. Needs at least four images.

    Returns:
        float32 [L1, L2]; without the axis of what has no blocks. Products are float32 and sums
        float64: right to about 1e-5. NaN for constant features.

    Raises:
        ValueError: as :func:`rankme`, or for different numbers of images.
    """
    y = x if y is None else y
    _check(x), _check(y)
    n = x.shape[-2]
    if y.shape[-2] != n:
        raise UserError(f"the same images are needed, not {n} and {y.shape[-2]}")
    if debiased and n < 4:
        raise UserError(f"debiased CKA needs at least 4 images, not {n}")
    mine = [_centred(a) for a in (x if x.ndim == 3 else x[None])]
    theirs = mine if y is x else [_centred(a) for a in (y if y.ndim == 3 else y[None])]
    every = mine if y is x else mine + theirs
    with full_precision(x.device):
        d = max(a.shape[1] for a in every)
        by_images = debiased or n * len(every) < d * len(every) ** 2 / 2
        hsic = _hsic_by_images(every, debiased) if by_images else _hsic_by_features(every)
    own = hsic.diagonal()
    own = torch.where(own > 0, own, torch.nan).sqrt()
    cka = (hsic / (own[:, None] * own))[: len(mine), -len(theirs) :].float().cpu()
    cka = cka if y.ndim == 3 else cka[:, 0]
    return cka if x.ndim == 3 else cka[0]


def _centred(x_ND: Tensor) -> Tensor:
    """float32, centred, and scaled such that no square overflows."""
    x_ND = x_ND.double()
    largest_D = x_ND.abs().amax(0)
    x_ND = x_ND - x_ND.mean(0)
    # The mean of a constant feature is rounded; what is left of it would become a direction.
    x_ND[:, x_ND.abs().amax(0) <= 1e-12 * largest_D] = 0
    return (x_ND / x_ND.norm().clamp_min(1e-300)).float()


def _hsic_by_features(every: list[Tensor]) -> Tensor:
    """‖YᵀX‖² of all pairs of blocks, [L, L]."""
    hsic = torch.zeros(len(every), len(every), dtype=torch.float64, device=every[0].device)
    for i, a in enumerate(every):
        for j, b in enumerate(every[: i + 1]):
            hsic[i, j] = hsic[j, i] = (a.T @ b).double().square().sum()
    return hsic


def _hsic_by_images(every: list[Tensor], debiased: bool) -> Tensor:
    """The same from the images' Gram matrices, some rows at a time; cheaper when N is small."""
    n, n_sets = len(every[0]), len(every)
    device = every[0].device
    hsic = torch.zeros(n_sets, n_sets, dtype=torch.float64, device=device)
    sums = torch.zeros(n_sets, n, dtype=torch.float64, device=device)
    for start in range(0, n, step := _rows(12 * n * n_sets)):
        rows_SRN = torch.stack([a[start : start + step] @ a.T for a in every])
        if debiased:
            rows_SRN.diagonal(start, dim1=1, dim2=2).zero_()
        flat = rows_SRN.flatten(1).double()
        hsic += flat @ flat.T
        sums[:, start : start + step] = rows_SRN.double().sum(2)
    if debiased:
        total = sums.sum(1)
        hsic += total[:, None] * total / ((n - 1) * (n - 2)) - 2 / (n - 2) * (sums @ sums.T)
    return hsic


# ---------------------------------------------------------------- intrinsic dimension


def intrinsic_dimension(
    x: Tensor, graph: Graph | None = None, *, normalize: bool = False, discard: float = 0.1
) -> Tensor:
    """TwoNN: the dimension of the surface that features lie on, from two neighbors each.

    With μ the ratio of the distances to the second and the first neighbor, ``-log(1 - F(μ))`` is a
    line through the origin over log μ, and its slope is the dimension; F is the share of images
    with at most this μ, and the images with the largest μ are left out of the fit (Facco et al.
    2017, doi 10.1038/s41598-017-11873-y). The two neighbors are exact, the distances float64.

    Compare only the same N (and images): the estimate looks at the scale of neighbor distances,
    which shrinks as N grows, and it falls short above about 20 dimensions. Of duplicates one is
    kept; with a graph of your own, images whose first distance is 0 are left out.

    Args:
        x: [L, N, D] or [N, D].
        graph: the images' two (or more) neighbors among themselves, found with
            ``exclude_self=True`` by the same distance; default searched here. The graph of
            :func:`refiner.nearest_neighbors` is by cosine: give it with ``normalize=True``.
        normalize: distances between unit vectors, which is one dimension less.
        discard: share of the largest μ to leave out.

    Returns:
        float32 [L] or scalar; NaN where fewer than ten images have two distinct distances.

    Raises:
        ValueError: as :func:`rankme`, for fewer than three images, or a graph of other images.
    """
    _check(x, least=3)
    if not 0 <= discard < 1:
        raise UserError(f"discard must be from 0 to below 1, not {discard}")
    if graph is not None and (graph.indices.shape[:-1] != x.shape[:-1] or graph.k < 2):
        raise UserError(
            f"the graph is {list(graph.indices.shape)}, but {[*x.shape[:-1], 2]} is needed: two "
            "neighbors of every image"
        )
    graphs = iter([graph] if x.ndim == 2 else graph or ())

    def dimension(x_ND: Tensor) -> Tensor:
        x_ND = _unit(x_ND) if normalize else x_ND.double()
        x_ND = x_ND if graph else x_ND.unique(dim=0)
        if len(x_ND) < 10:
            return x_ND.new_tensor(torch.nan)
        indices = _two_nearest(x_ND) if graph is None else next(graphs).indices[:, :2]
        distances = [(x_ND - x_ND[i]).norm(dim=1) for i in indices.to(x_ND.device).unbind(1)]
        first, second = torch.stack(distances).sort(dim=0).values
        mu = (second / first)[first > 0].sort().values
        n = len(mu)
        kept = mu[: max(1, round(n * (1 - discard)))].log()
        if n < 10 or kept[-1] == 0:
            return kept.new_tensor(torch.nan)
        share = torch.arange(1, len(kept) + 1, dtype=torch.float64, device=mu.device) / n
        height = -torch.log1p(-share.clamp_max(1 - 0.5 / n))
        return (kept @ height) / (kept @ kept)

    return _each(x, dimension, least=3)


def _two_nearest(x_ND: Tensor) -> Tensor:
    """Indices [N, 2] of the nearest others by Euclidean distance."""
    x_ND = x_ND - x_ND.mean(0)
    x_ND = x_ND / x_ND.norm(dim=1).max().clamp_min(1e-300)
    # q·x - ‖x‖²/2 is largest where ‖q - x‖ is smallest: a dot product in one more dimension.
    keys = torch.cat([x_ND, -x_ND.square().sum(1, keepdim=True) / 2], dim=1)
    queries = torch.cat([x_ND, torch.ones_like(x_ND[:, :1])], dim=1)
    return nearest_neighbors(queries, keys, k=2, exclude_self=True, normalize=False).indices


# ---------------------------------------------------------------- k-means


@dataclass(frozen=True, eq=False)
class KMeans:
    """The best restart of every block.

    Attributes:
        assignments: int64 [L, N], a cluster of each image, 0 to k - 1.
        centers: float32 [L, k, D], the means of their images.
        inertia: float64 [L], sum of squared distances to the centers.
        iterations: int64 [L], Lloyd steps until nothing changed (or until the limit).
    """

    assignments: Tensor
    centers: Tensor
    inertia: Tensor
    iterations: Tensor


@torch.no_grad()
def kmeans(
    x: Tensor,
    k: int,
    *,
    restarts: int = 10,
    seed: int = 0,
    max_iter: int = 300,
    chunk: int | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> KMeans:
    """k-means of every block, all restarts of a block at once.

    Greedy k-means++ starts (Arthur & Vassilvitskii 2007, with 2 + log k trials a center, as in
    scikit-learn), then Lloyd's steps until no image changes its cluster. An empty cluster moves to
    the image that is farthest from its own center. Products are float32; where two centers are
    closer than its rounding allows to tell apart, float64 decides, ties to the lower cluster.

    Args:
        x: [L, N, D] or [N, D].
        k: number of clusters.
        restarts: independent starts; the one of lowest inertia is kept.
        seed: of the starts, the same for every block.
        max_iter: largest number of Lloyd steps.
        chunk: images at once. Changes memory and speed, not the assignments.
        device: where to work; default CUDA if there is one, else where x is.
        progress: show a bar over blocks.

    Returns:
        :class:`KMeans` on the CPU, without the axis L for [N, D]. With fewer distinct images than
        k some clusters stay empty.

    Raises:
        ValueError: as :func:`rankme`, or for a k that is not from 1 to N.
    """
    _check(x)
    n = x.shape[-2]
    if not 1 <= k <= n:
        raise UserError(f"k={k} clusters asked for, but there are {n} images")
    if restarts < 1 or max_iter < 1:
        raise UserError(f"restarts and max_iter must be at least 1, not {restarts}, {max_iter}")
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else x.device))
    blocks = x if x.ndim == 3 else x[None]
    with full_precision(device):
        found = [
            _Lloyd(a.to(device), k, restarts, seed, chunk).run(max_iter)
            for a in tqdm(blocks, desc="k-means", unit="block", disable=not progress)
        ]
    parts = [torch.stack(part).cpu() for part in zip(*found, strict=True)]
    return KMeans(*(parts if x.ndim == 3 else (part[0] for part in parts)))


class _Lloyd:
    """All restarts of one block. Sums and counts are float64 and follow the images that move."""

    def __init__(self, x_ND: Tensor, k: int, restarts: int, seed: int, chunk: int | None):
        x_ND, (n, dim) = x_ND.double(), x_ND.shape
        self.mean = x_ND.mean(0)
        self.scale = (x_ND - self.mean).norm(dim=1).max().clamp_min(1e-300)
        # Centred and scaled, as float32 then rounds least. From here on these are the features.
        self.x_ND = ((x_ND - self.mean) / self.scale).float()
        self.norms = self.x_ND.double().norm(dim=1)
        self.chunk = chunk or _rows(24 * restarts * k)
        self.centers_RkD = _plus_plus(self.x_ND, k, restarts, seed).double()
        self.assigned_RN = torch.full((restarts, n), -1, device=x_ND.device)
        self.sums_RkD = x_ND.new_zeros(restarts, k, dim)
        self.counts_Rk = x_ND.new_zeros(restarts, k)

    def run(self, max_iter: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The fields of :class:`KMeans` for this block."""
        every = active = torch.arange(len(self.counts_Rk), device=self.x_ND.device)
        steps = torch.zeros_like(every)
        for _ in range(max_iter):
            steps[active] += 1
            moved = self.assign(active, self.nearest(active))
            active = active[moved]
            if not len(active):
                break
            self.move_centers(active)
        self.move_centers(every, repair=False)
        inertia = torch.stack([self.distances(r).square().sum() for r in every])
        best = int(inertia.argmin())
        centers = (self.centers_RkD[best] * self.scale + self.mean).float()
        return self.assigned_RN[best], centers, inertia[best] * self.scale**2, steps[best]

    def nearest(self, active: Tensor) -> Tensor:
        """The nearest center of each image for the active restarts, [R, N]."""
        centers = self.centers_RkD[active]
        half_Rk = centers.square().sum(-1) / 2
        rough, half = centers.float().flatten(0, 1), half_Rk.float().flatten()
        n_restarts, k, dim = centers.shape
        longest = half_Rk.mul(2).sqrt().amax(1)
        nearest = torch.empty(n_restarts, len(self.x_ND), dtype=torch.int64, device=active.device)
        for start in range(0, len(self.x_ND), self.chunk):
            rows = slice(start, start + self.chunk)
            # ‖x - c‖² = ‖x‖² - 2 (x·c - ‖c‖²/2)
            scores = torch.addmm(-half, self.x_ND[rows], rough.T).view(-1, n_restarts, k)
            best, where = scores.max(-1)
            scores.scatter_(2, where[..., None], -torch.inf)
            gap_BR = best.double() - scores.amax(-1)
            size_BR = longest * (self.norms[rows, None] + longest)
            # Largest error of two such scores in float32, any order of summation.
            unsure_BR = gap_BR <= 2 * (dim + 8) * 2.0**-24 * size_BR
            for r in unsure_BR.any(0).nonzero()[:, 0]:
                b = unsure_BR[:, r].nonzero()[:, 0]
                exact = self.x_ND[rows][b].double() @ centers[r].T - half_Rk[r]
                tied = exact >= exact.amax(1, keepdim=True) - 2.0**-45 * size_BR[b, r, None]
                where[b, r] = tied.byte().argmax(1)  # the first
            nearest[:, rows] = where.T
        return nearest

    def assign(self, active: Tensor, nearest_RN: Tensor) -> Tensor:
        """Takes the new clusters; which of the restarts changed, bool [R]."""
        moved_RN = nearest_RN != self.assigned_RN[active]
        for r, now, moved in zip(active, nearest_RN, moved_RN, strict=True):
            i = moved.nonzero()[:, 0]
            x, before = self.x_ND[i].double(), self.assigned_RN[r, i]
            for where, sign in ((now[i], 1.0), (before, -1.0)):
                known = where >= 0
                if known.any():
                    self.sums_RkD[r].index_add_(0, where[known], x[known], alpha=sign)
                    self.counts_Rk[r].index_add_(
                        0, where[known], x.new_full((len(x),), sign)[known]
                    )
        self.assigned_RN[active] = nearest_RN
        return moved_RN.any(1)

    def move_centers(self, active: Tensor, *, repair: bool = True) -> None:
        """To the means of their images; empty ones to the images farthest from their centers."""
        for r in active:
            filled = self.counts_Rk[r] > 0
            means = self.sums_RkD[r] / self.counts_Rk[r].clamp_min(1)[:, None]
            self.centers_RkD[r] = torch.where(filled[:, None], means, self.centers_RkD[r])
            empty = (~filled).nonzero()[:, 0]
            if repair and len(empty):
                far, images = self.distances(r).sort(descending=True, stable=True)
                images = images[: len(empty)][far[: len(empty)] > 0]
                self.centers_RkD[r, empty[: len(images)]] = self.x_ND[images].double()

    def distances(self, r: int | Tensor) -> Tensor:
        """Each image's distance to its own center, float64 [N]."""
        pairs = zip(self.x_ND.split(4096), self.assigned_RN[r].split(4096), strict=True)
        return torch.cat([(x - self.centers_RkD[r][a]).norm(dim=1) for x, a in pairs])


def _plus_plus(x_ND: Tensor, k: int, restarts: int, seed: int) -> Tensor:
    """Greedy k-means++: of a few draws by squared distance, the one that lowers the sum most."""
    n, trials = len(x_ND), 2 + int(math.log(k))
    # Drawn by restart first: more restarts leave the earlier ones as they are.
    draws_RkT = torch.from_numpy(np.random.default_rng(seed).random((restarts, k, trials)))
    draws_RkT = draws_RkT.to(x_ND.device)
    squares, every = x_ND.square().sum(1), torch.arange(restarts, device=x_ND.device)
    chosen = [(draws_RkT[:, 0, 0] * n).long()]
    closest_RN = torch.full((restarts, n), torch.inf, device=x_ND.device)
    for step in range(k):
        if step:
            ladder = closest_RN.double().cumsum(1)
            some_RT = torch.searchsorted(ladder, draws_RkT[:, step] * ladder[:, -1:])
            some_RT = some_RT.clamp_max(n - 1)
        else:
            some_RT = chosen.pop()[:, None]
        c = x_ND[some_RT.flatten()]
        far = torch.addmm(squares, c, x_ND.T, alpha=-2).add_(squares[some_RT].view(-1, 1))
        far_RTN = far.clamp_min_(0).view(restarts, -1, n)
        far_RTN = torch.minimum(far_RTN, closest_RN[:, None])
        best = far_RTN.sum(2, dtype=torch.float64).argmin(1)
        closest_RN = far_RTN[every, best]
        chosen.append(some_RT[every, best])
    return x_ND[torch.stack(chosen, dim=1)]


# ---------------------------------------------------------------- clusters against classes


def clustering(
    x: Tensor,
    labels: Tensor,
    *,
    k: int | None = None,
    restarts: int = 10,
    seed: int = 0,
    standardize: bool = True,
    normalize: bool = True,
    assignments: Tensor | None = None,
    sample: int = 5000,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> dict[str, Tensor]:
    """How well k-means clusters of every block match classes, and how well they are separated.

    Compare only the same images and k: every one of the scores shifts with N, k and the balance
    of classes, except that AMI and ARI are 0 for random clusters.

    Args:
        x: [L, N, D] or [N, D].
        labels: int64 [N], classes from 0; seen by the scores only.
        k: number of clusters; default the number of classes that occur.
        restarts, seed, device, progress: see :func:`kmeans`.
        standardize: scale each feature to deviation 1 first, as k-NN does.
        normalize: scale each image's features to unit length, after that.
        assignments: clusters int64 [L, N] to be scored instead of running k-means.
        sample: of how many random images the silhouette is taken at most; it costs N².

    Returns:
        A dict of float32 [L] (or scalars) on the CPU: "acc" (accuracy of the best one-to-one
        matching of clusters and classes, Hungarian method), "nmi" and "ami" (normalised and
        adjusted mutual information), "ari" (adjusted Rand index), "silhouette", and
        "davies_bouldin" (lower is better separated). The last two do not know the classes and are
        NaN where there is a single cluster.

    Raises:
        ValueError: as :func:`kmeans`, or for labels or assignments that do not match.
    """
    _check(x)
    labels = check_labels(labels, x, "clustered")
    if assignments is not None and assignments.shape != x.shape[:-1]:
        raise UserError(
            f"assignments of {list(assignments.shape)} do not match features {list(x.shape)}"
        )
    blocks = x if x.ndim == 3 else x[None]
    if standardize:
        blocks = torch.stack([standardized(a, a[:1])[0] for a in blocks])
    if normalize:
        blocks = torch.nn.functional.normalize(blocks.float(), dim=-1)
    if assignments is None:
        k = len(labels.unique()) if k is None else k
        found = kmeans(blocks, k, restarts=restarts, seed=seed, device=device, progress=progress)
        assignments = found.assignments
    truth = labels.cpu().numpy()
    clusters = assignments.cpu().numpy().reshape(len(blocks), -1)
    rows = [
        _agreement(truth, c) | _separation(a.cpu().numpy(), c, sample)
        for a, c in zip(blocks, clusters, strict=True)
    ]
    scores = {name: torch.tensor([row[name] for row in rows]) for name in rows[0]}
    return scores if x.ndim == 3 else {name: score[0] for name, score in scores.items()}


def _agreement(truth: np.ndarray, clusters: np.ndarray) -> dict[str, float]:
    from scipy.optimize import linear_sum_assignment
    from sklearn import metrics
    from sklearn.metrics.cluster import contingency_matrix

    table = contingency_matrix(truth, clusters)
    matched = table[linear_sum_assignment(table, maximize=True)].sum()
    return {
        "acc": float(matched / len(truth)),
        "nmi": metrics.normalized_mutual_info_score(truth, clusters),
        "ami": metrics.adjusted_mutual_info_score(truth, clusters),
        "ari": metrics.adjusted_rand_score(truth, clusters),
    }


def _separation(x_ND: np.ndarray, clusters: np.ndarray, sample: int) -> dict[str, float]:
    from sklearn import metrics

    some = np.sort(np.random.default_rng(0).permutation(len(x_ND))[:sample])
    kinds, few = len(np.unique(clusters)), len(np.unique(clusters[some]))
    silhouette = davies_bouldin = math.nan
    if 2 <= few < len(some):
        silhouette = float(metrics.silhouette_score(x_ND[some], clusters[some]))
    if 2 <= kinds < len(x_ND):
        davies_bouldin = float(metrics.davies_bouldin_score(x_ND, clusters))
    return {"silhouette": silhouette, "davies_bouldin": davies_bouldin}


# ---------------------------------------------------------------- shared


def _each(x: Tensor, measure: Callable[[Tensor], Tensor], *, least=2, views=False) -> Tensor:
    """The measure of every block, float32 [L] or scalar on the CPU."""
    _check(x, least=least, views=views)
    blocks = x if x.ndim == 3 + views else x[None]
    with torch.no_grad():
        values = torch.stack([measure(a) for a in blocks]).float().cpu()
    return values if x.ndim == 3 + views else values[0]


def _check(x: Tensor, *, least: int = 2, views: bool = False) -> None:
    shape = "[L, N, V, D] or [N, V, D]" if views else "[L, N, D] or [N, D]"
    if x.ndim not in (2 + views, 3 + views) or not x.is_floating_point() or 0 in x.shape:
        raise UserError(f"features must be floats {shape}, not {x.dtype} {list(x.shape)}")
    n = x.shape[-2 - views]
    if n < least:
        raise UserError(f"at least {least} images are needed, not {n}")
    # A sum is finite only if everything is, unless it overflows; isfinite would need a copy.
    if not x.sum(dtype=torch.float64).isfinite() and not x.isfinite().all():
        raise UserError("the features hold NaN or infinity")


def _check_views(views: Tensor) -> None:
    if views.ndim >= 3 and views.shape[-2] < 2:
        raise UserError(f"at least two views of each image are needed, not {views.shape[-2]}")


def _defined(value: Tensor, *, where: Tensor) -> Tensor:
    return torch.where(where, value, torch.nan)


def _rows(bytes_a_row: int) -> int:
    return max(1, CHUNK_BYTES // bytes_a_row)
