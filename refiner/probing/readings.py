"""Readings: which block, which tokens, which transform, and the choice among them.

A reading turns what :func:`refiner.extract` found into one vector an image. The transform is fitted
on train images without labels, and it matters as much as the block: a masked autoencoder's features
vary most along a few directions that say little about classes, and cosines see little else.

    choice = refiner.best_reading(train_features, train_labels)  # sees train images alone
    print(choice.test(test_features, test_labels))
    x_ND = choice.reading.apply(features)

Shape legend: L blocks, N train and M test images, D width of a reading (of its poolings side by
side), P poolings, R trials (draws of labels, or one), S resamples.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from refiner.base.errors import UserError
from refiner.base.files import replacing
from refiner.base.settings import Range, Share, Whole, checked, settings_from
from refiner.base.tensors import as_features, feature_pair, group_numbers, mean_and_scale, sides
from refiner.models.encoders import Encoder, channels_of, last_tokens, pool, preprocessing_card
from refiner.models.load import copy_model
from refiner.probing.features import NAMES, Features

NULL = 1e-8  # of the largest eigenvalue; below is rounding, not variance
ROWS = 4096  # of features in float64 at once

# ---------------------------------------------------------------- transforms


@dataclass(frozen=True)
class Transform:
    """What happens to pooled features before they are compared; no label is needed to fit it.

    With C the correlation matrix of the train features, λ its eigenvalues and m their mean (1 where
    no feature is constant), x becomes ``(x − mean) / deviation · C^(−power / 2)``. This is ZCA-cor
    whitening for power 1 (Kessy et al. 2018, arXiv 1512.00809); cosines are those of PCA whitening.

    Attributes:
        power: 0 standardises, 1 makes all directions vary alike, what lies between goes part of the
            way; None leaves features as they are.
        shrinkage: s of ``(1 − s) λ + s m`` in place of λ, for a power above 0: the smaller a
            direction's variance, the more of it is noise of the sample.
        removed: how many of the directions of largest variance are taken out.
    """

    power: Annotated[float, Range(0, 2)] | None = 0.0
    shrinkage: Share = 1e-3
    removed: Whole = 0

    def __str__(self) -> str:
        if self.power is None:
            return "as it is"
        names = {0: "standardised", 1: "whitened"}
        name = names.get(self.power, f"whitened with power {self.power:g}")
        return name + f" without the first {self.removed} components" * (self.removed > 0)


STANDARDISED = Transform()
# The simplest first: of equals the first is taken. What is left out has never been the best on our
# images: features as they are, and components that are removed instead of scaled.
TRANSFORMS = (STANDARDISED, Transform(0.5), Transform(0.75), Transform(1.0))


class Spectrum:
    """Mean, deviation and correlation matrix of features [N, D], its eigenvalues once for all."""

    def __init__(self, x_ND: Tensor):
        self.mean, self.scale = mean_and_scale(x_ND)
        unit = ((x.double() - self.mean) * self.scale for x in x_ND.split(ROWS))
        self.values, self.axes_DD = torch.linalg.eigh(sum(u.T @ u for u in unit) / len(x_ND))

    def fitted(self, transform: Transform) -> tuple[Tensor, Tensor]:
        """Mean [D] and matrix [D, D] of ``x ↦ (x − mean) @ matrix``, float64.

        Directions without variance on the train images, as those that fewer images than features
        leave over, are taken out: there is no scale to measure them by.
        """
        if transform.power is None:
            return torch.zeros_like(self.mean), torch.eye(len(self.mean)).to(self.mean)
        if transform.removed >= len(self.mean):
            raise UserError(
                f"{transform.removed} of {len(self.mean)} components removed leave nothing"
            )
        s, kept = transform.shrinkage, self.values > NULL * self.values[-1].clamp_min(1e-300)
        kept[len(kept) - transform.removed :] = False  # eigenvalues rise
        shrunk = ((1 - s) * self.values + s * self.values.mean()).clamp_min(1e-300)
        gain_D = torch.where(kept, shrunk ** (-transform.power / 2), 0)
        return self.mean, self.scale[:, None] * (self.axes_DD * gain_D @ self.axes_DD.T)


def affine(x_ND: Tensor, mean: Tensor, matrix: Tensor) -> Tensor:
    """float32 [N, D]."""
    return torch.cat([((x.double() - mean) @ matrix).float() for x in x_ND.split(ROWS)])


@torch.no_grad()
def whiten(train: Tensor, *others: Tensor, power: float = 1.0, shrinkage=1e-3, removed: int = 0):
    """Whitens features, every block by itself, as :class:`Transform` says.

    Args:
        train: [N, D], or [L, N, D] for L blocks; fits mean, deviations and correlations, which are
            float64.
        *others: features [M, D] or [L, M, D] that the same maps are applied to.
        power, shrinkage, removed: see :class:`Transform`.

    Returns:
        float32 of the same shapes, ready for cosines: one tensor, or with ``others`` a tuple.

    Raises:
        ValueError: for shapes that do not match, features that are not finite, fewer than two
            images, or settings out of their range.
    """
    transform = checked(Transform(power, shrinkage, removed))
    train = as_features(train, "train features")
    _check_count(train.shape[-2])
    sets = [train, *(feature_pair(x, train, ("features", "train features"))[0] for x in others)]
    blocks = [x[None] for x in sets] if train.ndim == 2 else sets
    maps = [Spectrum(x).fitted(transform) for x in blocks[0]]
    found = [torch.stack([affine(x, *m) for x, m in zip(b, maps, strict=True)]) for b in blocks]
    found = [x[0] for x in found] if train.ndim == 2 else found
    return tuple(found) if others else found[0]


@torch.no_grad()
def standardize_groups(features: Features, groups) -> Features:
    """Takes each group's own mean and deviation out of its features.

    What is done today about images from several labs, and needs to know only which lab each is
    from: Johnson et al. 2007 ("Adjusting batch effects", ComBat) without its prior.

    Args:
        features: of N images.
        groups: [N] numbers or words, such as ``images.factors["lab"]``.

    Returns:
        Features, float32: each feature has mean 0 and deviation 1 in each group of two images or
        more, and is 0 in a group of one and where it is constant.

    Raises:
        ValueError: for groups of another number.
    """
    groups = group_numbers(groups, features.main.shape[1])
    found = {kind: x.float().clone() for kind, x in features.items()}
    for x in found.values():
        members = [(groups == group).nonzero()[:, 0].to(x.device) for group in groups.unique()]
        for x_ND in x if x.ndim == 3 else x[None]:
            for mine in members:
                mean, scale = mean_and_scale(x_ND[mine])
                x_ND[mine] = ((x_ND[mine].double() - mean) * scale).float()
    return Features(found, features.blocks)


def _check_count(n: int) -> None:
    if n < 2:
        raise UserError(f"a transform is fitted on at least two images, not {n}")


# ---------------------------------------------------------------- readings


@dataclass(frozen=True, eq=False)
class Reading:
    """One vector an image: a block, a pooling and a fitted transform.

    Attributes:
        block: counted from 1.
        pooling: "cls", "patch" or "registers", or several joined by "+", side by side.
        transform: what was fitted.
        mean, matrix: of ``x ↦ (x − mean) @ matrix``, float64 [D] and [D, D].
    """

    block: int
    pooling: str
    transform: Transform
    mean: Tensor
    matrix: Tensor

    @classmethod
    @torch.no_grad()
    def fit(cls, features: Features, block: int = -1, pooling="", transform=STANDARDISED):
        """A reading fitted on train images; by default the usual one.

        Args:
            features: of the train images.
            block: counted from 1, or from the end.
            pooling: by default the class token, or the patch mean of a model without one.
            transform: a :class:`Transform`.

        Raises:
            ValueError: for a block or pooling that the features lack, or fewer than two images.
        """
        pooling, transform = pooling or poolings_of(features)[0], checked(transform)
        block = features.blocks[block] if block < 0 else block
        x_ND = pooled(features, block, pooling)
        _check_count(len(x_ND))
        return cls(block, pooling, transform, *Spectrum(x_ND).fitted(transform))

    def apply(self, features: Features) -> Tensor:
        """float32 [N, D], ready for cosines without further standardising, and for probes."""
        x_ND = pooled(features, self.block, self.pooling)
        return affine(x_ND, self.mean.to(x_ND.device), self.matrix.to(x_ND.device))

    def __str__(self) -> str:
        return f"block {self.block}, {pooling_words(self.pooling)}, {self.transform}"

    def save(self, path: str | os.PathLike) -> Path:
        """Writes a safetensors file, atomically; :meth:`load` reads it."""
        told = {"block": self.block, "pooling": self.pooling, "transform": asdict(self.transform)}
        tensors = {name: getattr(self, name).cpu().contiguous() for name in ("mean", "matrix")}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={"reading": json.dumps(told)})
        return Path(path)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Reading:
        """A reading from a file.

        Raises:
            ValueError: for a file that holds none.
        """
        try:
            with safe_open(path, "pt") as file:
                told = json.loads(file.metadata()["reading"])
                mean, matrix = (file.get_tensor(name) for name in ("mean", "matrix"))
            transform = settings_from(Transform, told["transform"])
            return cls(int(told["block"]), str(told["pooling"]), transform, mean, matrix)
        except FileNotFoundError:
            raise
        except Exception as error:
            raise UserError(
                f"{path} holds no reading ({error}); Reading.save writes one"
            ) from error

    def module(self, model: Encoder) -> nn.Module:
        """Encoder up to the block, pooling and transform: pixels in, float32 [B, D] out."""
        return _Read(model, self)

    def export(self, model: Encoder, path: str | os.PathLike) -> Path:
        """Writes one file that needs torch alone: ``torch.export.load(path).module()(pixels)``.

        ``pixels`` are uint8 [B, C, H, W] of the model's own size, any number of them.

        Args:
            model: the encoder that the reading was fitted on; it is copied.
            path: a file that ends in ``.pt2``.
        """
        size = preprocessing_card(model)["preprocessing"]["size"]
        pixels = torch.zeros(2, channels_of(model), *sides(size), dtype=torch.uint8)
        batch = {"pixels": {0: torch.export.Dim("batch", min=1)}}
        program = torch.export.export(self.module(model), (pixels,), dynamic_shapes=batch)
        with replacing(path) as temporary, open(temporary, "wb") as file:
            torch.export.save(program, file)
        return Path(path)


class _Read(nn.Module):
    """A reading as a network."""

    def __init__(self, model: Encoder, reading: Reading):
        super().__init__()
        self.encoder, self.reading = copy_model(model).cpu().eval().requires_grad_(False), reading
        self.encoder.blocks = self.encoder.blocks[: reading.block]
        how = preprocessing_card(model)["preprocessing"]
        for name in ("mean", "std"):
            self.register_buffer(name, torch.tensor(how[name])[:, None, None])
        self.register_buffer("center", reading.mean.cpu())
        self.register_buffer("matrix", reading.matrix.cpu())

    def forward(self, pixels: Tensor) -> Tensor:
        """uint8 [B, C, H, W] of the model's own size → [B, D]."""
        x_BTD = last_tokens(self.encoder, (pixels.float() / 255 - self.mean) / self.std)
        kinds = self.reading.pooling.split("+")
        narrower = len(self.matrix) // len(kinds) - x_BTD.shape[2]  # of early blocks (Hiera)
        parts = [F.pad(pool(self.encoder, x_BTD, kind), (0, narrower)) for kind in kinds]
        x_BD = torch.cat(parts, dim=1)
        return ((x_BD.double() - self.center) @ self.matrix).float()


def check_kinds(features: Features) -> Features:
    """The same, if they say which blocks and poolings they are of.

    Raises:
        ValueError: for a bare tensor or another type.
    """
    if not isinstance(features, Features):
        raise UserError(
            f"readings take what refiner.extract gives, not a {type(features).__name__}; "
            'Features({"patch": x_LND}, blocks) of refiner.probing.features holds your own'
        )
    return features


def poolings_of(features: Features) -> list[str]:
    """The single kinds that features have, then those side by side; the usual one comes first."""
    kinds = [kind for kind in NAMES if kind in check_kinds(features) and kind != "final"]
    joined = ["+".join(k for k in kinds if k != "registers"), "+".join(kinds)]
    return list(dict.fromkeys([*kinds, *joined]))


def pooling_words(pooling: str) -> str:
    """``class token and patch mean``."""
    return " and ".join(NAMES[kind] for kind in pooling.split("+"))


def pooled(features: Features, block: int, pooling: str) -> Tensor:
    """One block's features, [N, D], several poolings side by side.

    Raises:
        ValueError: for a block or pooling that is not there.
    """
    kinds = [kind for kind in check_kinds(features) if kind != "final"]
    missing = set(pooling.split("+")) - set(kinds)
    if missing or block not in features.blocks:
        raise UserError(
            f"there is no block {block}, {pooling}, in features of the blocks "
            f"{', '.join(map(str, features.blocks))} and of {', '.join(poolings_of(features))}"
        )
    row = features.blocks.index(block)
    return torch.cat([features[kind][row] for kind in pooling.split("+")], dim=1)
