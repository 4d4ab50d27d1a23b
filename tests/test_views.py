"""Augmentations against torchvision, closed forms and invariants."""

import importlib
import math
from pathlib import Path

import pytest
import torch
import torchvision.transforms.functional as TF

from refiner.images import views
from refiner.images.views import View, make_view, make_views

PLAIN = View(size=32, scale=(1.0, 1.0), ratio=(1.0, 1.0), flip=0, jitter=0, gray=0)


def photos(n=6, size=32, seed=0):
    rng = torch.Generator().manual_seed(seed)
    smooth = torch.rand(n, 3, 8, 8, generator=rng)
    x = torch.nn.functional.interpolate(smooth, size, mode="bicubic").clamp(0, 1)
    return (x * 255).round().to(torch.uint8)


def test_a_view_without_changes_is_the_image():
    x = photos()
    assert torch.allclose(make_view(x, PLAIN), x.float() / 255, atol=1e-6)


def test_same_generator_same_views_and_samples_differ():
    x = photos(1).repeat(8, 1, 1, 1)
    specs = (View(size=32), View(size=16, blur=1.0, solarize=0.5))
    one = make_views(x, specs, torch.Generator().manual_seed(3))
    two = make_views(x, specs, torch.Generator().manual_seed(3))
    for a, b, size in zip(one, two, (32, 16), strict=True):
        assert torch.equal(a, b) and a.shape == (8, 3, size, size)
        assert 0 <= a.min() and a.max() <= 1
        assert len(torch.unique(a.flatten(1), dim=0)) == 8, "randomness is per sample"


def test_views_are_the_same_amid_bfloat16():
    """As on a GPU, where a step runs under autocast."""
    specs = (View(size=32, blur=1.0, solarize=0.5), View(size=16, jitter=0.0, gray=0.5))
    plain = make_views(photos(), specs, torch.Generator().manual_seed(0))
    with torch.autocast("cpu", torch.bfloat16):
        amid = make_views(photos(), specs, torch.Generator().manual_seed(0))
        assert torch.ones(2, 2).mm(torch.ones(2, 2)).dtype == torch.bfloat16, "still on"
    for a, b in zip(plain, amid, strict=True):
        assert b.dtype == torch.float32 and torch.equal(a, b)


def test_crop_boxes_stay_inside_and_follow_the_ranges():
    boxes = views.crop_boxes(20_000, 40, 60, (0.2, 0.5), (3 / 4, 4 / 3))
    x0, y0, x1, y1 = boxes.T
    assert x0.min() >= 0 and y0.min() >= 0 and x1.max() <= 60 + 1e-4 and y1.max() <= 40 + 1e-4
    area = (x1 - x0) * (y1 - y0) / 2400
    assert area.min() > 0.15 and area.max() < 0.5 + 1e-4
    assert area.mean().item() == pytest.approx(0.35, abs=0.01)
    aspect = ((x1 - x0) / (y1 - y0)).log()
    assert aspect.abs().max() <= math.log(4 / 3) + 1e-4 and abs(aspect.mean()) < 0.02


def test_crop_is_an_antialiased_resize():
    x = photos(size=64).float() / 255
    box = torch.tensor([[8.0, 16.0, 40.0, 48.0]]).repeat(len(x), 1)
    ours = views.crop(x, box, 16)
    assert torch.allclose(ours, torch.nn.functional.avg_pool2d(x[:, :, 16:48, 8:40], 2), atol=1e-5)


@pytest.mark.parametrize("kind", ["brightness", "contrast", "saturation"])
def test_each_jitter_is_torchvisions(kind):
    x = (photos().float() / 255) * 0.6 + 0.2  # far from 0 and 1: nothing is clamped
    view = View(
        **{
            "brightness": 0,
            "contrast": 0,
            "saturation": 0,
            "hue": 0,
            "gray": 0,
            "jitter": 1,
            kind: 0.2,
        }
    )
    matrices = views.colour_matrices(len(x), view, torch.Generator().manual_seed(1))
    ours = views._jitter(x, matrices)
    adjust = getattr(TF, f"adjust_{kind}")
    for image, got in zip(x, ours, strict=True):
        factors = torch.linspace(0.8, 1.2, 4001)
        # The factor is not returned; find it from the result, then every pixel has to agree.
        low, high = adjust(image, 0.8), adjust(image, 1.2)
        at = ((got - low) * (high - low)).sum() / (high - low).square().sum()
        factor = 0.8 + 0.4 * at.item()
        assert factors.min() - 1e-3 <= factor <= factors.max() + 1e-3
        assert torch.allclose(got, adjust(image, factor), atol=3e-3)


def test_gray_and_hue_keep_luminance():
    x = (photos().float() / 255) * 0.3 + 0.35
    weights = torch.tensor([0.299, 0.587, 0.114])
    luminance = torch.einsum("bchw,c->bhw", x, weights)
    for view in (
        View(jitter=0, gray=1),
        View(jitter=1, hue=0.5, brightness=0, contrast=0, saturation=0, gray=0),
    ):
        out = views._jitter(x, views.colour_matrices(len(x), view))
        assert torch.allclose(torch.einsum("bchw,c->bhw", out, weights), luminance, atol=2e-3)
        if view.gray == 1:
            assert (out - out.mean(dim=1, keepdim=True)).abs().max() < 1e-5
        else:
            assert (out - x).abs().mean() > 0.01


def test_hue_of_a_full_turn_is_the_identity():
    turns = torch.tensor([0.0, 1.0, 0.25])
    matrices = views.hue_rotation(turns)
    assert torch.allclose(matrices[:2], torch.eye(3).expand(2, 3, 3), atol=1e-5)
    quarter = torch.linalg.matrix_power(matrices[2], 4)
    assert torch.allclose(quarter, torch.eye(3), atol=1e-4)


def test_blur_is_torchvisions_gaussian():
    x = photos().float() / 255
    ours = views._blur(x, torch.full((len(x),), 1.5), 1.5)
    assert torch.allclose(ours, TF.gaussian_blur(x, [11, 11], [1.5, 1.5]), atol=1e-4)


def test_solarize_inverts_the_bright_half():
    x = photos().float() / 255
    out = make_view(x, View(**{**vars(PLAIN), "solarize": 1.0}))
    assert torch.allclose(out, torch.where(x > 0.5, 1 - x, x), atol=1e-5)


def test_flip_happens_at_its_rate():
    x = photos(1).repeat(2000, 1, 1, 1)
    out = make_view(x, View(**{**vars(PLAIN), "flip": 0.3}), torch.Generator().manual_seed(0))
    flipped = torch.isclose(out, (x.float() / 255).flip(3), atol=1e-5).flatten(1).all(dim=1)
    assert flipped.float().mean().item() == pytest.approx(0.3, abs=0.04)


def test_the_benchmark_hands_all_sides_the_same_work(monkeypatch):
    """Without any change to colours, each side's views of a flat image are that flat image."""
    pytest.importorskip("kornia")
    monkeypatch.syspath_prepend(Path(__file__).parent.parent / "benchmarks")
    bench = importlib.import_module("views")
    specs = (
        View(size=16, jitter=0, gray=0, blur=1.0),
        View(size=8, jitter=0, gray=0, solarize=1.0),
    )
    pixels = torch.full((3, 3, 16, 16), 51, dtype=torch.uint8)
    for name, make in bench.sides(pixels, specs).items():
        for view, spec in zip(make(), specs, strict=True):
            assert view.shape == (3, 3, spec.size, spec.size), name
            assert torch.allclose(view, torch.full_like(view, 0.2), atol=1e-2), name
    bright = 255 - pixels
    for name, make in bench.sides(bright, specs[1:]).items():
        assert torch.allclose(make()[0], torch.full((3, 3, 8, 8), 0.2), atol=1e-2), name


def test_negatives_and_noise_are_what_they_say():
    """A negative is one minus the view; noise has a strength of its own in each sample."""
    plain = {"size": 16, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
    plain |= {"jitter": 0.0, "gray": 0.0}
    images = torch.full((400, 3, 16, 16), 128, dtype=torch.uint8)
    images[:, :, :8] = 90

    def made(**changes):
        view = View(**plain | changes)
        return views.make_view(images, view, torch.Generator().manual_seed(0))

    x = made()
    assert torch.allclose(made(invert=1.0), 1 - x, atol=1e-6)
    half = made(invert=0.5)
    negative = (half - x).abs().amax(dim=(1, 2, 3)) > 0.1
    assert 150 < int(negative.sum()) < 250 and torch.allclose(half[negative], 1 - x[negative])
    sigma = (made(noise=0.12) - x).flatten(1).std(dim=1)
    assert sigma.max() < 0.13 and sigma.min() < 0.01
    assert sigma.square().mean().sqrt() == pytest.approx(0.12 / 3**0.5, rel=0.05)
    kept = (made(noise=0.12) - x).mean()
    assert abs(kept) < 1e-3, "as much brighter as darker"
