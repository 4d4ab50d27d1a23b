"""The smallest refinement that has all its parts, for tests of what surrounds it."""

from dataclasses import replace

from refiner.images.views import View
from refiner.training.recipe import Recipe

_TINY = Recipe.cpu(
    batch=4,
    head_steps=4,
    steps=8,
    hidden=8,
    predictor_hidden=8,
    out=4,
    queue=12,
    blocks=(1, 2),
    frozen_blocks=0,
    views=(View(size=8), View(size=8)),
    keep="last",
)


def tiny(**changes) -> Recipe:
    """Heads on both blocks of an encoder for 8 pixels, a few steps of four images."""
    return replace(_TINY, **changes)
