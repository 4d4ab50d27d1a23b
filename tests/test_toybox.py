"""Toybox: reproducible to the bit, balanced, and true to its factors."""

import numpy as np
import pytest
import torch

from refiner.images import toybox
from refiner.images.toybox import FACTORS, HELD_OUT, TOYS, render


def test_image_depends_on_its_index_alone():
    whole = render(120)
    indices = [97, 3, 50, 3, 119]
    for chunk in (1, 2, 7, 512):
        part = render(indices, chunk=chunk)
        assert torch.equal(part.images, whole.images[indices])
        assert torch.equal(part.labels, whole.labels[indices])
        for name in FACTORS:
            assert np.array_equal(part.factors[name], whole.factors[name][indices])


def test_threads_change_nothing():
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        single = render(40).images
    finally:
        torch.set_num_threads(before)
    assert torch.equal(single, render(40).images)


@pytest.mark.parametrize("change", [{"split": "test"}, {"seed": 1}, {"variant": "toybox-hard"}])
def test_another_split_seed_or_variant_is_another_image(change):
    assert (render(16).images != render(16, **change).images).float().mean() > 0.5


def test_a_size_shows_the_same_scene():
    small, large = render(32), render(32, size=64)
    assert all(np.array_equal(small.factors[f], large.factors[f]) for f in FACTORS)
    shrunk = torch.nn.functional.avg_pool2d(large.masks[:, None], 2)[:, 0]
    assert (shrunk - small.masks).abs().mean() < 0.03


def test_classes_are_balanced_and_named():
    scene = render(64)
    assert scene.classes == TOYS
    assert scene.labels.bincount().tolist() == [4] * 16
    assert render(8, variant="toybox-new").classes == HELD_OUT
    assert set(TOYS).isdisjoint(HELD_OUT)


def test_every_toy_is_visible_and_inside_the_frame():
    scene = render(320, seed=3)
    covered = scene.masks.mean(dim=(1, 2))
    assert covered.min() > 0.03 and covered.max() < 0.7
    border = torch.cat([scene.masks[:, 0], scene.masks[:, -1]], dim=1)
    assert (border > 0.5).float().mean() < 0.01


def test_masks_are_where_the_colours_change():
    """With the same draws, two toys differ only where one of them stands."""
    one = toybox._draw_factors(toybox._generator(0, "train", 0), toybox.VARIANTS["toybox"])
    cpu = torch.device("cpu")
    (a, ca), (b, cb) = (
        toybox._render_group(toy, [one], 32, toybox.VARIANTS["toybox"], cpu)
        for toy in ("ball", "plus")
    )
    outside = (ca + cb)[0] == 0
    assert outside.any() and torch.equal(a[0][:, outside], b[0][:, outside])


@pytest.mark.parametrize("toy", TOYS + HELD_OUT)
def test_distance_functions_are_lower_bounds(toy):
    """Sphere tracing is right only if no function overestimates: |f(p) - f(q)| <= |p - q|."""
    shape = toybox._SHAPES[toy]
    rng = torch.Generator().manual_seed(0)
    p = (torch.rand(3, 20_000, generator=rng, dtype=torch.float64) - 0.5) * 3
    q = p + 0.05 * torch.randn(3, 20_000, generator=rng, dtype=torch.float64)
    change = (shape(*p) - shape(*q)).abs()
    assert (change <= (p - q).norm(dim=0) * (1 + 1e-6) + 1e-9).all()
    assert shape(*p).min() < 0 < shape(*p).max()


def test_hue_factor_is_the_colour_that_is_seen():
    scene = render(400, noise=0.0)
    solid = scene.masks > 0.99
    for i in range(0, 400, 37):
        if scene.factors["saturation"][i] < 0.5:
            continue
        rgb = scene.images[i][:, solid[i]].float().mean(dim=1) / 255
        import colorsys

        seen = colorsys.rgb_to_hsv(*rgb.tolist())[0]
        distance = abs(seen - scene.factors["hue"][i])
        assert min(distance, 1 - distance) < 0.05


def test_clear_errors():
    with pytest.raises(ValueError, match="split 'dev'.*train, val, test"):
        render(2, split="dev")
    with pytest.raises(ValueError, match="variant 'zoo'.*toybox"):
        render(2, variant="zoo")
