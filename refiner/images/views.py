"""Batched augmentation: several random views of each image, on the images' own device.

The operations are those of BYOL (Grill et al. 2020, arXiv 2006.07733, appendix B) with multi-crop
(Caron et al. 2020, arXiv 2006.09882). All random numbers are drawn per sample; every operation
runs once over the batch. Brightness, contrast, saturation, hue and gray are affine maps of a
pixel's colour, so they are multiplied into one 3×4 matrix a sample and applied in one product.

Images of other than three channels have no colours; what suits any channels is :func:`by_channel`.

Shape legend: B batch, C channels, H W input size, S output size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.ops import roi_align

from refiner.base.errors import UserError
from refiner.base.settings import Count, Entries, NotNegative, Portion, Positive, Range, Share
from refiner.base.tensors import constant, draw, sides


@dataclass(frozen=True)
class View:
    """How one view of an image is made. Probabilities are per sample.

    Attributes:
        size: output height and width, pixels; a number for squares.
        scale: range of the crop's share of the image's area.
        ratio: range of the crop's width / height, in that of the view.
        flip: probability of a mirror image.
        jitter: probability of colour jitter.
        brightness, contrast, saturation: jitter factors drawn from [max(0, 1-x), 1+x].
        hue: jitter angle drawn from [-x, x], in turns; 0.5 is any hue.
        gray: probability of losing all colour.
        blur: probability of a Gaussian blur.
        sigma: range of the blur's standard deviation, in pixels of a 224-pixel view; scaled to
            ``size``.
        solarize: probability of inverting all values above one half.
        turn: probability of a turn by 90, 180 or 270 degrees; views that are not square are turned
            by 180.
        channel_brightness: each channel has a factor of its own from [max(0, 1-x), 1+x].
        drop: probability of each channel to lose its pattern to its mean; one always stays.
        invert: probability of a negative.
        noise: largest standard deviation of added noise, in units of full brightness; each sample
            draws its own from 0 to it.
        keep: share of the patches that the encoder sees; below 1 the rest are dropped, which
            saves time. A masked autoencoder has seen such input throughout its pretraining.
    """

    size: tuple[Count, Count] | Count = 224
    scale: Annotated[tuple[Portion, Portion], Entries(rising=True)] = (0.25, 1.0)
    ratio: Annotated[tuple[Positive, Positive], Entries(rising=True)] = (3 / 4, 4 / 3)
    flip: Share = 0.5
    jitter: Share = 0.8
    brightness: NotNegative = 0.4
    contrast: NotNegative = 0.4
    saturation: NotNegative = 0.2
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    gray: Share = 0.2
    blur: Share = 0.0
    sigma: Annotated[tuple[Positive, Positive], Entries(rising=True)] = (0.1, 2.0)
    solarize: Share = 0.0
    turn: Share = 0.0
    channel_brightness: NotNegative = 0.0
    drop: Share = 0.0
    invert: Share = 0.0
    noise: NotNegative = 0.0
    keep: Portion = 1.0

    @property
    def pixels(self) -> int:
        """Of a view, in one channel."""
        return math.prod(sides(self.size))


def without_colour(view: View) -> View:
    """The same view without what is only known of three colours."""
    return replace(view, saturation=0.0, hue=0.0, gray=0.0, solarize=0.0)


def by_channel(view: View) -> View:
    """The same view with the operations that suit channels of any number and meaning.

    Crop and size, flips, blur and the share of patches are the view's own; turns, brightness and
    noise of each channel and the dropping of channels take the place of colours.
    """
    view = replace(without_colour(view), jitter=0.0, invert=0.0)
    return replace(view, turn=0.5, channel_brightness=0.3, drop=0.1, noise=max(view.noise, 0.03))


def check_colour(view: View, channels: int) -> None:
    """Refuses colours of images that have none.

    Raises:
        ValueError: naming the operations.
    """
    names = (*(("saturation", "hue") if view.jitter else ()), "gray", "solarize")
    wanted = [name for name in names if getattr(view, name)]
    if channels != 3 and wanted:
        raise UserError(
            f"{', '.join(wanted)} in a view: these are operations on 3 colours, and the images "
            f"have {channels} channels; set them to 0, or take the views 'channels', as in "
            "Recipe.cpu(views='channels')"
        )


Generator = torch.Generator | None


def _uniform(n: int, low: float, high: float, generator: Generator) -> Tensor:
    return low + (high - low) * draw(n, generator=generator)


def _chance(n: int, p: float, generator: Generator) -> Tensor:
    return draw(n, generator=generator) < p


def crop_boxes(
    n: int,
    height: int,
    width: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    generator: Generator = None,
) -> Tensor:
    """Random crop boxes [n, 4] as (x0, y0, x1, y1) in pixels, inside of the image.

    Area share uniform in ``scale``, log of the aspect ratio uniform in ``log(ratio)``. Where
    torchvision's RandomResizedCrop draws again when a box does not fit, the side that is too long
    is cut, which needs no loop.
    """
    area = _uniform(n, *scale, generator) * height * width
    aspect = _uniform(n, math.log(ratio[0]), math.log(ratio[1]), generator).exp()
    w = (area * aspect).sqrt().clamp(max=width)
    h = (area / aspect).sqrt().clamp(max=height)
    x0 = draw(n, generator=generator) * (width - w)
    y0 = draw(n, generator=generator) * (height - h)
    return torch.stack([x0, y0, x0 + w, y0 + h], dim=1)


def crop(images: Tensor, boxes: Tensor, size: int | tuple[int, int]) -> Tensor:
    """Cuts boxes [B, 4] out of images [B, C, H, W] and resizes them to [B, C, *size].

    roi_align averages bilinear samples inside each output pixel: an anti-aliased resize with one
    box a sample, in one call. Two samples a side, more when the crop is much larger than the
    view.
    """
    index = torch.arange(len(boxes), device=images.device, dtype=images.dtype)[:, None]
    rois = torch.cat([index, boxes.to(images)], dim=1)
    samples = max(1, min(2, -(-images.shape[-1] // sides(size)[1])))
    return roi_align(images, rois, sides(size), sampling_ratio=samples, aligned=True)


_GRAY = (0.299, 0.587, 0.114)
_TO_YIQ = (_GRAY, (0.5959, -0.2746, -0.3213), (0.2115, -0.5227, 0.3112))
_TO_RGB = tuple(map(tuple, torch.linalg.inv(torch.tensor(_TO_YIQ)).tolist()))


def colour_matrices(n: int, view: View, generator: Generator = None) -> Tensor:
    """Random colour maps [n, 3, 5]: a matrix on the pixel (3), on the image's mean gray (1), 1.

    Order: brightness, contrast, saturation, hue, gray. torchvision shuffles the first four and
    clamps between them; here nothing is clamped before the end, which keeps them one linear map.
    """
    jitter_n = _chance(n, view.jitter, generator)
    gray_3 = constant(_GRAY, jitter_n.device)
    eye_33 = torch.eye(3, device=jitter_n.device).expand(n, 3, 3)
    to_gray_33 = gray_3.expand(3, 3)

    def factor(strength: float) -> Tensor:
        drawn = _uniform(n, max(0.0, 1 - strength), 1 + strength, generator)
        return torch.where(jitter_n, drawn, 1.0)[:, None, None]

    brightness, contrast, saturation = map(
        factor, (view.brightness, view.contrast, view.saturation)
    )
    turns = torch.where(jitter_n, _uniform(n, -view.hue, view.hue, generator), 0.0)
    saturate = saturation * eye_33 + (1 - saturation) * to_gray_33
    grayed = _chance(n, view.gray, generator)[:, None, None]
    colour = hue_rotation(turns) @ saturate
    colour = torch.where(grayed, to_gray_33 @ colour, colour)
    # contrast * (b * x) + (1 - contrast) * b * mean, then colour; gray is a fixed point of colour.
    pixel = colour @ (eye_33 * (brightness * contrast))
    mean = ((1 - contrast) * brightness).expand(n, 3, 1)
    return torch.cat([pixel, mean, torch.zeros_like(mean)], dim=2)


def hue_rotation(turns: Tensor) -> Tensor:
    """Rotation of the colour plane of YIQ by angles [n], in turns, as RGB matrices [n, 3, 3]."""
    to_yiq, to_rgb = (constant(rows, turns.device) for rows in (_TO_YIQ, _TO_RGB))
    cos, sin = (2 * math.pi * turns).cos(), (2 * math.pi * turns).sin()
    zero, one = torch.zeros_like(cos), torch.ones_like(cos)
    rotation = torch.stack([one, zero, zero, zero, cos, -sin, zero, sin, cos], dim=1)
    return to_rgb @ rotation.reshape(-1, 3, 3) @ to_yiq


def _jitter(images: Tensor, matrices: Tensor) -> Tensor:
    b, c, h, w = images.shape
    matrices = matrices.to(images)
    gray = constant(_GRAY, images.device).to(images.dtype)
    mean_B1 = torch.einsum("bchw,c->b", images, gray)[:, None] / (h * w)
    offset_B31 = matrices[:, :, 3:4] * mean_B1[:, None] + matrices[:, :, 4:5]
    pixels = torch.baddbmm(offset_B31, matrices[:, :, :3], images.reshape(b, c, h * w))
    return pixels.reshape(b, c, h, w).clamp(0, 1)


def _by_channel(x: Tensor, view: View, n: int, generator: Generator, mine: slice) -> Tensor:
    """Brightness and contrast of each sample where there are no colours, and what channels have of
    their own: a line for each channel, about its mean."""
    c, home = x.shape[1], None if generator is None else generator.device
    # Each channel x becomes scale · x + shift · its mean.
    scale, shift = torch.ones(n, c, device=home), torch.zeros(n, c, device=home)
    if view.jitter and c != 3:
        jittered = _chance(n, view.jitter, generator)
        light, contrast = (
            torch.where(jittered, _uniform(n, max(0.0, 1 - s), 1 + s, generator), 1.0)[:, None]
            for s in (view.brightness, view.contrast)
        )
        scale, shift = light * contrast * scale, light * (1 - contrast) * scale
    if view.channel_brightness:
        strength = view.channel_brightness
        low = max(0.0, 1 - strength)
        factor = low + (1 + strength - low) * draw(n, c, generator=generator)
        scale, shift = scale * factor, shift * factor
    if view.drop:
        drawn = draw(n, c, generator=generator)
        dropped = (drawn < view.drop) & (drawn < drawn.amax(1, keepdim=True))
        scale, shift = torch.where(dropped, 0.0, scale), torch.where(dropped, scale + shift, shift)
    scale, shift = (v[mine].to(x)[:, :, None, None] for v in (scale, shift))
    return (scale * x + shift * x.mean((2, 3), keepdim=True)).clamp(0, 1)


def _turned(x: Tensor, view: View, n: int, generator: Generator, mine: slice) -> Tensor:
    """Some samples turned; every turn is made of all, as a count would make a GPU's host wait."""
    chosen = _chance(n, view.turn, generator)
    square = x.shape[2] == x.shape[3]
    quarters = (1 + 3 * draw(n, generator=generator)).long() if square else 2
    quarters = torch.where(chosen, quarters, 0)[mine].to(x.device)[:, None, None, None]
    for k in (1, 2, 3) if square else (2,):
        x = torch.where(quarters == k, x.rot90(k, (2, 3)), x)
    return x


def _blur(images: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur with one standard deviation (pixels) a sample, reflected at the border.

    The kernel reaches three times ``largest``: a radius from the samples' own largest would make
    the result depend on who shares the batch, and the host wait for a GPU.
    """
    b, c, h, w = images.shape
    radius = max(1, min(math.ceil(3 * largest), h - 1, w - 1))
    offsets = torch.arange(-radius, radius + 1, dtype=images.dtype, device=images.device)
    kernel = (-0.5 * (offsets / sigma.to(images)[:, None].clamp(min=1e-3)).square()).exp()
    kernel_BK = (kernel / kernel.sum(1, keepdim=True)).repeat_interleave(c, dim=0)
    x = F.pad(images, (radius,) * 4, mode="reflect").reshape(1, b * c, h + 2 * radius, -1)
    x = F.conv2d(x, kernel_BK[:, None, :, None], groups=b * c)
    return F.conv2d(x, kernel_BK[:, None, None, :], groups=b * c).reshape(b, c, h, w)


def make_view(
    images: Tensor, view: View, generator: Generator = None, *, rows: tuple[int, int] | None = None
) -> Tensor:
    """One random view of each image.

    Args:
        images: uint8 [B, C, H, W], or float in 0..1.
        view: what to do.
        generator: the same state gives the same views; on the images' device it is fastest.
        rows: (first, total) when the images are some rows of a batch: they get the views that they
            get in the whole batch.

    Returns:
        float32 [B, C, *view.size] in 0..1 on the images' device.

    Raises:
        ValueError: for images of another shape, and for colours where there are not three.
    """
    if images.ndim != 4:
        raise UserError(f"views are made of images [B, C, H, W], not {list(images.shape)}")
    check_colour(view, images.shape[1])
    # In bfloat16 colours would be off by several of 256 steps.
    with torch.autocast(images.device.type, enabled=False):
        return _view_of(images, view, generator, rows)


def _view_of(
    images: Tensor, view: View, generator: Generator, rows: tuple[int, int] | None
) -> Tensor:
    b, c, h, w = images.shape
    first, n = rows or (0, b)
    mine = slice(first, first + b)
    x = images.float() / 255 if images.dtype == torch.uint8 else images
    height, width = sides(view.size)
    ratio = tuple(r * width / height for r in view.ratio)
    x = crop(x, crop_boxes(n, h, w, view.scale, ratio, generator)[mine], view.size)
    flip = _chance(n, view.flip, generator)[mine].to(x.device)
    x = torch.where(flip[:, None, None, None], x.flip(3), x)
    if view.turn:
        x = _turned(x, view, n, generator, mine)
    if c == 3 and (view.jitter or view.gray):
        x = _jitter(x, colour_matrices(n, view, generator)[mine])
    if view.channel_brightness or view.drop or (c != 3 and view.jitter):
        x = _by_channel(x, view, n, generator, mine)
    if view.blur:
        x = _blurred(x, _chance(n, view.blur, generator), view, generator, mine)
    if view.solarize:
        flip = _chance(n, view.solarize, generator)[mine].to(x.device)[:, None, None, None]
        x = torch.where(flip & (x > 0.5), 1 - x, x)
    if view.invert:
        negative = _chance(n, view.invert, generator)[mine].to(x.device)[:, None, None, None]
        x = torch.where(negative, 1 - x, x)
    if view.noise:
        x = (x + _grain(n, c, view, generator, mine, x.device)).clamp(0, 1)
    return x


def _grain(n: int, c: int, view: View, generator: Generator, mine: slice, device) -> Tensor:
    """Noise of a strength that each sample draws; near enough normal, as a sum of uniforms is."""
    sigma = _uniform(n, 0.0, view.noise, generator)[mine].to(device)[:, None, None, None]
    shape = n, c, *sides(view.size)
    total = sum(draw(*shape, generator=generator, device=device)[mine] for _ in range(3))
    return sigma * (2 * total - 3)  # a uniform's variance is 1 / 12


def _blurred(x: Tensor, chosen: Tensor, view: View, generator, mine: slice) -> Tensor:
    """Some samples blurred; on a GPU all are and some are taken, as a count would make it wait."""
    return (_blur_all if chosen.is_cuda else _blur_some)(x, chosen, view, generator, mine)


def _blur_all(x: Tensor, chosen: Tensor, view: View, generator, mine: slice) -> Tensor:
    scale = min(sides(view.size)) / 224
    sigma = _uniform(len(chosen), *view.sigma, generator)[mine] * scale
    blurred = _blur(x, sigma, view.sigma[1] * scale)
    return torch.where(chosen[mine, None, None, None], blurred, x)


def _blur_some(x: Tensor, chosen: Tensor, view: View, generator, mine: slice) -> Tensor:
    scale = min(sides(view.size)) / 224
    sigma = _uniform(int(chosen.sum()), *view.sigma, generator) * scale
    sigma = sigma[chosen.cumsum(0)[mine][chosen[mine]] - 1]  # of the chosen ones among mine
    at = chosen[mine].nonzero()[:, 0].to(x.device)
    if not len(at):
        return x
    return x.index_copy(0, at, _blur(x[at], sigma, view.sigma[1] * scale))


def make_views(
    images: Tensor,
    views: tuple[View, ...],
    generator: Generator = None,
    *,
    rows: tuple[int, int] | None = None,
) -> list[Tensor]:
    """All views of a batch: a list of float [B, C, S_v, S_v] in the order of ``views``."""
    return [make_view(images, view, generator, rows=rows) for view in views]
