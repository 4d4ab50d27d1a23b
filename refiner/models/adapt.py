"""A model made for other images than it was trained on: of another size, or of other channels."""

from __future__ import annotations

import copy

import torch
from timm.models import adapt_input_conv

from refiner.base.errors import UserError
from refiner.base.settings import in_range
from refiner.base.tensors import as_size, sides
from refiner.models.cards import Channels
from refiner.models.encoders import Encoder, Hiera, channel_statistics, channels_of


def resized(model: Encoder, size: int | tuple[int, int]) -> Encoder:
    """The same model made for another image size, its positions interpolated.

    Raises:
        ValueError: for a Hiera, or a size that the patch does not divide.
    """
    if isinstance(model, Hiera):
        raise UserError("a Hiera takes one image size only")
    height, width = sides(size)
    size, patch = as_size(height, width), model.patch_embed.patch_size[0]
    if height % patch or width % patch:
        raise UserError(f"size {size} is no multiple of the patch of {patch} pixels")
    model.set_input_size(img_size=(height, width))
    card = model.refiner_card = copy.deepcopy(model.refiner_card)
    card["preprocessing"]["size"] = size
    if "architecture" in card:
        card["architecture"]["size"] = size
    if "timm" in card:
        card["timm"]["model_args"]["img_size"] = size
    return model


def with_channels(model: Encoder, channels: int) -> Encoder:
    """The same model made for images of other channels, by timm's convention for ``in_chans``.

    The weights of the patch embedding are summed for one channel; for others they are repeated and
    scaled by old / new, so that its output keeps its size. Mean and deviation of the new channels
    are assumed until :func:`refiner.fit_channels` measures them.

    Returns:
        The model itself; its card says under "assumed" what was done.
    """
    channels, own = in_range("channels", channels, Channels), channels_of(model)
    if channels == own:
        return model
    proj = model.patch_embed.proj
    weight = adapt_input_conv(channels, proj.weight.detach(), own).contiguous()
    proj.weight, proj.in_channels = torch.nn.Parameter(weight), channels
    how = (
        "summed for one"
        if channels == 1
        else f"repeated for {channels} and scaled by {own}/{channels}"
    )
    done = f"the patch embedding of {own} channels, {how}"
    card = model.refiner_card = copy.deepcopy(model.refiner_card)
    card["assumed"] = "; ".join([*filter(None, [card.get("assumed")]), done])
    card["preprocessing"].pop("assumed", None)
    card["preprocessing"] |= channel_statistics(channels, (), ())
    if "architecture" in card:
        card["architecture"]["channels"] = channels
    if "timm" in card:
        card["timm"]["model_args"]["in_chans"] = channels
    return model
