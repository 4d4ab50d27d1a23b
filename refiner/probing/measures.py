"""What features say without labels, and how similar blocks are.

Every function takes all blocks at once, [L, N, D], or one set, [N, D]. Arithmetic is float64
unless a docstring says otherwise, on the features' device; the results are float32 on the CPU.
A measure without labels is a symptom, not a score: each docstring names what may be compared.

Shape legend: L blocks, N images, V views of an image, D width.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.tensors import as_features, full_precision, in_kind
from refiner.probing.search import nearest_neighbors

CHUNK_BYTES = 2**26  # of scores held at once


# ---------------------------------------------------------------- spectra


@in_kind
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


@in_kind
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


@in_kind
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


@in_kind
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


@in_kind
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

    def distance(x_NVD: Tensor) -> Tensor:
        unit = _unit(x_NVD)
        pairs = torch.combinations(torch.arange(unit.shape[1])).tolist()
        far = [(unit[:, a] - unit[:, b]).norm(dim=-1).pow(alpha).mean() for a, b in pairs]
        return torch.stack(far).mean()

    return _each(views, distance, views=True)


@in_kind
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


@in_kind
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
@in_kind
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
    x = check_sets(x)
    y = x if y is None else check_sets(y)
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


@in_kind
def intrinsic_dimension(x: Tensor, *, discard: float = 0.1) -> Tensor:
    """TwoNN: the dimension of the surface that features lie on, from two neighbors each.

    With μ the ratio of the distances to the second and the first neighbor, ``-log(1 - F(μ))`` is a
    line through the origin over log μ, and its slope is the dimension; F is the share of images
    with at most this μ, and the images with the largest μ are left out of the fit (Facco et al.
    2017, doi 10.1038/s41598-017-11873-y). The two neighbors are exact, the distances float64.

    Compare only the same N (and images): the estimate looks at the scale of neighbor distances,
    which shrinks as N grows, and it falls short above about 20 dimensions. Of duplicates one is
    kept.

    Args:
        x: [L, N, D] or [N, D].
        discard: share of the largest μ to leave out.

    Returns:
        float32 [L] or scalar; NaN where fewer than ten images have two distinct distances.

    Raises:
        ValueError: as :func:`rankme`, or for fewer than three images.
    """
    if not 0 <= discard < 1:
        raise UserError(f"discard must be from 0 to below 1, not {discard}")

    def dimension(x_ND: Tensor) -> Tensor:
        x_ND = x_ND.double().unique(dim=0)
        if len(x_ND) < 10:
            return x_ND.new_tensor(torch.nan)
        distances = [(x_ND - x_ND[i]).norm(dim=1) for i in _two_nearest(x_ND).unbind(1)]
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
    """Indices [N, 2] of the nearest others by Euclidean distance, searched in float64."""
    x_ND = x_ND - x_ND.mean(0)
    x_ND = x_ND / x_ND.norm(dim=1).max().clamp_min(1e-300)
    # q·x - ‖x‖²/2 is largest where ‖q - x‖ is smallest: a dot product in one more dimension.
    keys = torch.cat([x_ND, -x_ND.square().sum(1, keepdim=True) / 2], dim=1)
    queries = torch.cat([x_ND, torch.ones_like(x_ND[:, :1])], dim=1)
    return nearest_neighbors(queries, keys, k=2, exclude_self=True, normalize=False).indices


# ---------------------------------------------------------------- shared


def _each(x: Tensor, measure: Callable[[Tensor], Tensor], *, least=2, views=False) -> Tensor:
    """The measure of every block, float32 [L] or scalar on the CPU."""
    x = check_sets(x, least=least, views=views)
    blocks = x if x.ndim == 3 + views else x[None]
    # A bar for those that take their time.
    shown = tqdm(blocks, desc="measuring", unit="block", delay=3.0, leave=False)
    with torch.no_grad():
        values = torch.stack([measure(a) for a in shown]).float().cpu()
    return values if x.ndim == 3 + views else values[0]


def check_sets(x, *, least: int = 2, views: bool = False) -> Tensor:
    """Features as a tensor [L, N, D] or [N, D], or those of views, with at least so many images."""
    x = as_features(x, "features")
    if x.ndim not in (2 + views, 3 + views):
        shape = "[L, N, V, D] or [N, V, D]" if views else "[L, N, D] or [N, D]"
        raise UserError(f"features must be floats {shape}, not {x.dtype} {list(x.shape)}")
    if views and x.shape[-2] < 2:
        raise UserError(f"at least two views of each image are needed, not {x.shape[-2]}")
    n = x.shape[-2 - views]
    if n < least:
        raise UserError(f"at least {least} images are needed, not {n}")
    return x


def _defined(value: Tensor, *, where: Tensor) -> Tensor:
    return torch.where(where, value, torch.nan)


def _rows(bytes_a_row: int) -> int:
    return max(1, CHUNK_BYTES // bytes_a_row)
