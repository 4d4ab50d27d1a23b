"""Common corruptions in five severities, on the images' own device, to measure robustness.

After Hendrycks & Dietterich 2019 (arXiv 1903.12261), who corrupt ImageNet in fifteen ways. These
are made anew for small images, so the figures are not those of ImageNet-C or CIFAR-10-C: blurs and
displacements are shares of the image's side, strengths are our own, frost and snow (which need
photographs) are left out.

Shape legend: B images, H height, W width, K kernel's side, S side of a coarse grid.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import step_generator
from refiner.images.sets import ImageSet, pixels_of

Generator = torch.Generator | None
SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 256  # images whose draws come from one generator


# ---------------------------------------------------------------- noise


def _draw(kind: Callable, shape, like: Tensor, generator: Generator) -> Tensor:
    home = like.device if generator is None else generator.device
    return kind(shape, generator=generator, device=home).to(like.device)


def gaussian_noise(x: Tensor, sigma: float, generator: Generator = None) -> Tensor:
    """Sensor noise of one deviation (of full brightness)."""
    return x + sigma * _draw(torch.randn, x.shape, x, generator)


def shot_noise(x: Tensor, photons: float, generator: Generator = None) -> Tensor:
    """Poisson noise; white is so many photons."""
    home = x.device if generator is None else generator.device
    return torch.poisson((x * photons).to(home), generator).to(x.device) / photons


def impulse_noise(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """Salt and pepper on a share of all values."""
    u = _draw(torch.rand, x.shape, x, generator)
    x = torch.where(u < share / 2, 0.0, x)
    return torch.where(u > 1 - share / 2, 1.0, x)


# ---------------------------------------------------------------- blur


def _filtered(x: Tensor, kernel_BKK: Tensor) -> Tensor:
    """Each image with its own kernel, reflected at the border."""
    b, c, h, w = x.shape
    reach = kernel_BKK.shape[-1] // 2
    weight = kernel_BKK.repeat_interleave(c, dim=0)[:, None]
    padded = F.pad(x, (reach,) * 4, mode="reflect").reshape(1, b * c, h + 2 * reach, -1)
    return F.conv2d(padded, weight, groups=b * c).reshape(b, c, h, w)


def _offsets(reach: float, x: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and rows of a kernel around 0, pixels; at most what reflection allows."""
    k = min(math.ceil(reach), min(x.shape[-2:]) - 1)
    steps = torch.arange(-k, k + 1, device=x.device, dtype=x.dtype)
    return steps[None, :], steps[:, None]


def defocus_blur(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """A disc with a soft edge; ``share`` is its radius."""
    radius = share * x.shape[-1]
    dx, dy = _offsets(radius + 0.5, x)
    kernel = (radius + 0.5 - (dx**2 + dy**2).sqrt()).clamp(0, 1)
    return _filtered(x, (kernel / kernel.sum()).expand(len(x), -1, -1))


def motion_blur(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """A line of length ``share`` in a random direction for each image."""
    angle = math.pi * _draw(torch.rand, (len(x),), x, generator)
    return _filtered(x, line_kernels(angle, share * x.shape[-1], x))


def line_kernels(angle_B: Tensor, length: float, x: Tensor) -> Tensor:
    """Lines one pixel wide through the middle, [B, K, K], each of sum 1."""
    dx, dy = _offsets(length / 2 + 0.5, x)
    cos, sin = angle_B.cos()[:, None, None], angle_B.sin()[:, None, None]
    along, across = (dx * cos + dy * sin).abs(), (dy * cos - dx * sin).abs()
    kernel = (length / 2 + 0.5 - along).clamp(0, 1) * (1 - across).clamp(min=0)
    return kernel / kernel.sum((1, 2), keepdim=True)


def _grid(b: int, h: int, w: int, x: Tensor) -> Tensor:
    eye = torch.eye(2, 3, device=x.device, dtype=x.dtype).expand(b, -1, -1)
    return F.affine_grid(eye, (b, 3, h, w), align_corners=False)


def _sampled(x: Tensor, grid: Tensor, mode: str = "bilinear") -> Tensor:
    return F.grid_sample(x, grid, mode, padding_mode="border", align_corners=False)


def glass_blur(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """Every pixel shows a random place up to ``share`` away."""
    b, _, h, w = x.shape
    moved = _draw(torch.rand, (b, h, w, 2), x, generator) * 2 - 1
    return _sampled(x, _grid(b, h, w, x) + moved * 2 * share, "nearest")


def zoom_blur(x: Tensor, zoom: float, generator: Generator = None) -> Tensor:
    """The mean of the image at zooms from 1 to ``zoom``."""
    b, _, h, w = x.shape
    grid, steps = _grid(b, h, w, x), 8
    factors = [1 + (zoom - 1) * i / (steps - 1) for i in range(steps)]
    return sum(_sampled(x, grid / f) for f in factors) / steps


# ---------------------------------------------------------------- weather and light


def fog(x: Tensor, amount: float, generator: Generator = None) -> Tensor:
    """A veil of light gray with clouds of all sizes."""
    b, _, h, w = x.shape
    clouds, weight = torch.zeros(b, 1, h, w, device=x.device), 0.0
    for octave in range(4):
        side = 2 ** (octave + 1)
        coarse = _draw(torch.rand, (b, 1, side, side), x, generator)
        clouds += 0.5**octave * F.interpolate(coarse, (h, w), mode="bilinear", align_corners=True)
        weight += 0.5**octave
    veil = 0.55 + 0.4 * clouds / weight
    return x + amount * (veil - x)


def brightness(x: Tensor, amount: float, generator: Generator = None) -> Tensor:
    """Adds light."""
    return x + amount


def contrast(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """Keeps a share of each channel's distance to its mean."""
    mean = x.mean((2, 3), keepdim=True)
    return mean + share * (x - mean)


# ---------------------------------------------------------------- digital


def elastic(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """A smooth random displacement of deviation ``share``."""
    b, _, h, w = x.shape
    coarse = share * _draw(torch.randn, (b, 2, 5, 5), x, generator)
    field = F.interpolate(coarse, (h, w), mode="bicubic", align_corners=True)
    return _sampled(x, _grid(b, h, w, x) + 2 * field.permute(0, 2, 3, 1))


def pixelate(x: Tensor, share: float, generator: Generator = None) -> Tensor:
    """Only a share of the pixels a side, each of them the mean of what it covers."""
    h, w = x.shape[-2:]
    few = F.interpolate(x, (max(1, round(h * share)), max(1, round(w * share))), mode="area")
    return F.interpolate(few, (h, w), mode="nearest-exact")


def jpeg(x: Tensor, quality: int, generator: Generator = None) -> Tensor:
    """What JPEG of a quality (1 to 100) loses, without subsampling of colour.

    By Pillow, as torchvision's encoder always halves the resolution of colour.
    """

    def coded(pixels_HWC: np.ndarray) -> np.ndarray:
        file = io.BytesIO()
        Image.fromarray(pixels_HWC).save(file, "JPEG", quality=quality, subsampling=0)
        return np.asarray(Image.open(file))

    pixels_BHWC = (x * 255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        found = np.stack(list(pool.map(coded, pixels_BHWC)))
    return torch.from_numpy(found).permute(0, 3, 1, 2).to(x) / 255


# ---------------------------------------------------------------- all of them

# name → function and the strengths of severities 1 to 5
CORRUPTIONS: dict[str, tuple[Callable, tuple]] = {
    "gaussian_noise": (gaussian_noise, (0.03, 0.06, 0.09, 0.13, 0.18)),
    "shot_noise": (shot_noise, (250, 120, 60, 30, 15)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.04, 0.07, 0.11)),
    "defocus_blur": (defocus_blur, (0.02, 0.032, 0.045, 0.06, 0.08)),
    "glass_blur": (glass_blur, (0.02, 0.03, 0.045, 0.06, 0.08)),
    "motion_blur": (motion_blur, (0.06, 0.10, 0.15, 0.21, 0.28)),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.17, 1.24, 1.32)),
    "fog": (fog, (0.15, 0.25, 0.35, 0.47, 0.6)),
    "brightness": (brightness, (0.06, 0.12, 0.18, 0.25, 0.33)),
    "contrast": (contrast, (0.7, 0.5, 0.35, 0.25, 0.15)),
    "elastic": (elastic, (0.01, 0.018, 0.027, 0.038, 0.05)),
    "pixelate": (pixelate, (0.75, 0.5, 0.4, 0.3, 0.2)),
    "jpeg": (jpeg, (60, 35, 20, 12, 7)),
}


@torch.no_grad()
def corrupt(images: Tensor, name: str, severity: int, *, generator: Generator = None) -> Tensor:
    """Corrupts images.

    Args:
        images: uint8 [B, 3, H, W].
        name: a key of :data:`CORRUPTIONS`.
        severity: 1 (mild) to 5.
        generator: of the random ones; on the images' device it is fastest.

    Returns:
        uint8 [B, 3, H, W] on the images' device.

    Raises:
        ValueError: for another name, severity or kind of images.
    """
    if name not in CORRUPTIONS:
        raise UserError(f"no corruption {name!r}: choose among {', '.join(CORRUPTIONS)}")
    if severity not in SEVERITIES:
        raise UserError(f"severity must be a whole number from 1 to 5, not {severity}")
    images = pixels_of(images)
    if images.dtype != torch.uint8 or images.shape[1] != 3:
        raise UserError(
            "corruptions are those of photographs: images must be uint8 [B, 3, H, W], not "
            f"{images.dtype} {list(images.shape)}"
        )
    function, strengths = CORRUPTIONS[name]
    x = function(images.float() / 255, strengths[severity - 1], generator)
    return (x * 255).round_().clamp_(0, 255).to(torch.uint8)


def corrupted(
    images: ImageSet | Tensor,
    name: str,
    severity: int,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> Iterator[Tensor]:
    """Corrupted batches for :func:`refiner.extract`, made on the fly.

    Args:
        images: an ImageSet or uint8 [N, 3, H, W].
        name, severity: see :func:`corrupt`.
        seed: the same seed corrupts the same images in the same way, for every model.
        device: where to corrupt.

    Yields:
        uint8 [B, 3, H, W].
    """
    pixels = pixels_of(images)
    kind = 10 * list(CORRUPTIONS).index(name) + severity if name in CORRUPTIONS else 0
    for chunk, start in enumerate(range(0, len(pixels), CHUNK)):
        some = pixels[start : start + CHUNK].to(device)
        generator = step_generator(1000 * seed + kind, chunk, device)
        yield corrupt(some, name, severity, generator=generator)
