"""Models and images of other than three channels: how they are brought together."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from refiner.images.sources import some
from refiner.models.adapt import with_channels
from refiner.models.encoders import Encoder, channels_of
from refiner.models.load import copy_model

MEASURED = 1024  # images of a set, evenly spread


def fit_channels(model: Encoder, images) -> Encoder:
    """The model for the channels of some images.

    For images of another number of channels its patch embedding is adapted, by timm's convention.
    A mean and a deviation that nothing told are measured on the images, channel by channel, and
    stand in the card from then on.

    Args:
        model: an encoder with a ``refiner_card``.
        images: an ImageSet or uint8 [N, C, H, W], those to train on.

    Returns:
        The model itself where nothing has to be done; else a copy.

    Warns:
        UserWarning: saying how the patch embedding was adapted.
    """
    pixels = some(images, 1)
    own, given = channels_of(model), pixels.shape[1]
    if own == given and not model.refiner_card["preprocessing"].get("assumed"):
        return model
    model = with_channels(copy_model(model), given)
    if own != given:
        done = f"The images have {given} channels: {model.refiner_card['assumed']}"
        warnings.warn(done, stacklevel=2)
    measure_channels(model, pixels)
    return model


def measure_channels(model: Encoder, pixels) -> None:
    """Puts mean and deviation of the images' channels into a card where they are assumed."""
    how = model.refiner_card["preprocessing"]
    if how.pop("assumed", None):
        how["mean"], how["std"] = channel_means(pixels)


def channel_means(pixels) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel of [N, C, H, W], uint8 or float, in 0 to 1."""
    n = len(pixels)
    chosen = torch.linspace(0, n - 1, min(n, MEASURED)).long().unique()
    total = squares = torch.zeros(pixels.shape[1], dtype=torch.float64)
    for part in chosen.split(64):
        x: Tensor = pixels[part].cpu()
        x = x.double() / (255 if x.dtype == torch.uint8 else 1)
        total, squares = total + x.mean((2, 3)).sum(0), squares + x.square().mean((2, 3)).sum(0)
    mean = total / len(chosen)
    std = (squares / len(chosen) - mean.square()).clamp(min=0).sqrt()
    # A channel of one value has no deviation; a step of brightness is the least that is seen.
    return [[round(v, 6) for v in x.tolist()] for x in (mean, std.clamp(min=1 / 255))]
