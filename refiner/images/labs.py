"""Labs: one scene, photographed as another laboratory would photograph it.

A microscope, a stain, a season or a sensor leaves its mark on every image of one origin. Here a lab
has its own light, background, colours, exposure, sharpness and noise, all fixed by the lab's
number. ``refiner.load_images("toybox-labs")`` photographs Toybox in several labs; the question of
that set is whether labels from some labs serve the images of another.

Every operation that touches a pixel is one that IEEE 754 rounds correctly (+ - * / min max), as in
:mod:`refiner.images.toybox`, so images are the same to the bit on every machine.

Shape legend: N images of one lab, R pixels of an image (S × S).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from refiner.base.errors import UserError
from refiner.images.views import hue_rotation

MOST = 1000  # numbers of labs: more would only lie closer together
PRIMES = (2, 3, 5, 7, 11, 13, 19, 23, 29, 31, 41, 43, 53)  # one for each setting


@dataclass(frozen=True)
class Lab:
    """How a lab photographs.

    Attributes:
        azimuth, elevation: of its lamp, degrees; scenes differ by a quarter of Toybox's range.
        background: brightness of its table, 0 to 1, around which scenes differ little.
        background_hue: a circle from 0 to 1.
        turn: its sensor's colours are turned by this angle, in turns.
        cast: factors on red, green and blue.
        exposure: e of the curve v ↦ v / (v + e (1 - v)), which keeps black and white; it is steep
            in the shadows for e < 1 and flat for e > 1.
        offset: added to every value: veiling light, or a black level set too high.
        blur: standard deviation of its lens's blur, in pixels of a 32-pixel image.
        noise: standard deviation of its sensor's noise, in units of full brightness.
        negative: whether it keeps negatives, as some X-ray archives do.
    """

    azimuth: float
    elevation: float
    background: float
    background_hue: float
    turn: float
    cast: tuple[float, float, float]
    exposure: float
    offset: float
    blur: float
    noise: float
    negative: bool


@cache
def lab(number: int) -> Lab:
    """The lab of a number, from 0.

    Its settings are fractions of multiples of square roots, a sequence that fills every range
    evenly (Richtmyer 1951), so that even the first few labs differ in each.

    Raises:
        ValueError: for a number below 0 or from :data:`MOST` on.
    """
    if not 0 <= number < MOST:
        raise UserError(f"labs are numbered from 0 to {MOST - 1}, there is none of number {number}")
    u = [(number + 1) * math.sqrt(prime) % 1 for prime in PRIMES]
    signed = [2 * x - 1 for x in u]
    return Lab(
        azimuth=45.0 * signed[0],
        elevation=30.0 + 30.0 * u[1],
        background=0.4 + 0.4 * u[2],
        background_hue=u[3],
        turn=0.5 * signed[4],
        cast=tuple(1.0 + 0.3 * s for s in signed[5:8]),
        exposure=3.0 ** signed[8],
        offset=0.15 * signed[9],
        blur=0.9 * u[10],
        noise=0.06 * u[11],
        negative=u[12] > 0.5,
    )


def staged(factors: dict[str, float], here: Lab) -> dict[str, float]:
    """A scene's factors as they are in a lab: its lamp and its table, with the scene's own rest."""
    return factors | {
        "light_azimuth": here.azimuth + factors["light_azimuth"] / 2,
        "light_elevation": here.elevation + (factors["light_elevation"] - 45.0) / 2,
        "background_hue": (here.background_hue + factors["background_hue"] / 2) % 1,
        "background_brightness": here.background + (factors["background_brightness"] - 0.6) * 0.8,
    }


def photographed(colours: Tensor, here: Lab, size: int) -> Tensor:
    """What a lab's lens and sensor make of scenes, before its noise.

    Args:
        colours: float32 [N, 3, R], 0 to 1.
        here: the lab.
        size: height and width S in pixels; R = S².

    Returns:
        float32 [N, 3, R].
    """
    rows = hue_rotation(torch.tensor([here.turn]))[0].tolist()
    red, green, blue = colours.clamp(0, 1).unbind(1)
    turned = [r * red + g * green + b * blue for r, g, b in rows]
    x = torch.stack([gain * v for gain, v in zip(here.cast, turned, strict=True)], 1).clamp(0, 1)
    x = x / (x + here.exposure * (1 - x))
    x = 1 - x if here.negative else x
    return _blurred(x + here.offset, here.blur * size / 32, size)


def _blurred(x: Tensor, sigma: float, size: int) -> Tensor:
    """Gaussian blur as sums of shifted images; a convolution would add in an order of its own."""
    if sigma < 0.05:
        return x
    radius = min(math.ceil(3 * sigma), size - 1)
    weights = [math.exp(-0.5 * (i / sigma) ** 2) for i in range(-radius, radius + 1)]
    image = x.unflatten(-1, (size, size))  # [N, 3, R] -> [N, 3, S, S]
    for padding, axis in (((0, 0, radius, radius), 2), ((radius, radius, 0, 0), 3)):
        padded = F.pad(image, padding, mode="replicate")
        parts = (padded.narrow(axis, i, size) * (w / sum(weights)) for i, w in enumerate(weights))
        image = sum(parts)
    return image.flatten(2)
