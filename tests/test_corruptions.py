"""Corruptions: each does what its name says, more of it with every severity."""

import io
import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from PIL import Image

import refiner
from refiner.images.corruptions import (
    CORRUPTIONS,
    SEVERITIES,
    corrupt,
    corrupted,
    line_kernels,
    shot_noise,
)


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def images():
    return refiner.load_images("toybox", split="test", n=32, progress=False).images


def gray(n=16, value=128, side=32):
    return torch.full((n, 3, side, side), value, dtype=torch.uint8)


def distance(a, b):
    return float((a.float() - b.float()).square().mean().sqrt())


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_every_severity_is_further_from_the_image(name, images):
    found = [corrupt(images, name, s, generator=seeded()) for s in SEVERITIES]
    assert all(x.dtype == torch.uint8 and x.shape == images.shape for x in found)
    far = [distance(x, images) for x in found]
    assert far[0] > 0.5 and all(a < b for a, b in pairwise(far)), far


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_the_same_draws_give_the_same_images_and_the_original_stays(name, images):
    before = images.clone()
    a, b = (corrupt(images, name, 3, generator=seeded(4)) for _ in range(2))
    assert torch.equal(a, b) and torch.equal(images, before)


@pytest.mark.parametrize("name", CORRUPTIONS)
@pytest.mark.parametrize("side", [20, 224])
def test_other_sizes_keep_their_shape(name, side):
    x = torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=seeded())
    assert corrupt(x, name, 5, generator=seeded()).shape == x.shape


MOVING = (
    "defocus_blur",
    "glass_blur",
    "motion_blur",
    "zoom_blur",
    "elastic",
    "pixelate",
    "contrast",
)


@pytest.mark.parametrize("name", MOVING)
def test_what_moves_or_averages_pixels_leaves_one_colour_alone(name):
    x = gray()
    x[:, 0] = 200
    assert torch.equal(corrupt(x, name, 5, generator=seeded()), x)


def test_gaussian_noise_has_its_deviation():
    x = corrupt(gray(64), "gaussian_noise", 2, generator=seeded()).float() - 128
    # Rounding to whole levels adds 1/12; the deviation of 200,000 draws errs by 0.2 %.
    assert float(x.std()) == pytest.approx(math.hypot(0.06 * 255, 12**-0.5), rel=0.01)
    assert abs(float(x.mean())) < 0.2


def test_shot_noise_grows_with_the_square_root_of_light():
    for value in (40, 160):
        x = shot_noise(gray(64, value).float() / 255, 250, seeded())
        assert float(x.mean()) == pytest.approx(value / 255, rel=0.003)
        assert float(x.var()) == pytest.approx(value / 255 / 250, rel=0.02)


def test_impulse_noise_hits_its_share():
    x = corrupt(gray(64), "impulse_noise", 4, generator=seeded())
    for extreme in (0, 255):
        assert float((x == extreme).float().mean()) == pytest.approx(0.035, rel=0.05)
    assert set(x.unique().tolist()) == {0, 128, 255}


def test_brightness_and_contrast_in_closed_form(images):
    x = images.double()
    light = (x + 0.18 * 255).clamp(max=255)
    assert (corrupt(images, "brightness", 3).double() - light).abs().max() <= 0.51
    mean = x.mean((2, 3), keepdim=True)
    assert (corrupt(images, "contrast", 3).double() - mean - 0.35 * (x - mean)).abs().max() <= 0.51


def test_pixels_are_block_means(images):
    x = corrupt(images, "pixelate", 2).double()
    means = images.double().unflatten(2, (16, 2)).unflatten(4, (16, 2)).mean((3, 5))
    assert (x[:, :, ::2, ::2] - means).abs().max() <= 0.51
    assert torch.equal(x[:, :, ::2], x[:, :, 1::2])


def test_a_horizontal_line_is_a_running_mean():
    x = torch.rand(2, 3, 16, 16, generator=seeded())
    kernel = line_kernels(torch.zeros(2), 3.0, x)
    middle = kernel.shape[-1] // 2
    expected = torch.zeros_like(kernel)
    expected[:, middle, middle - 1 : middle + 2] = 1 / 3
    torch.testing.assert_close(kernel, expected)
    upright = line_kernels(torch.full((2,), math.pi / 2), 3.0, x)
    torch.testing.assert_close(upright, expected.mT, atol=1e-6, rtol=0)


def test_blurs_agree_with_a_slow_convolution(images):
    """The disc, pixel by pixel in numpy."""
    radius = 0.045 * 32
    reach = math.ceil(radius + 0.5)
    steps = np.arange(-reach, reach + 1)
    disc = np.clip(radius + 0.5 - np.hypot(steps[None], steps[:, None]), 0, 1)
    disc /= disc.sum()
    picture = images[0, 1].double().numpy()
    padded = np.pad(picture, reach, mode="reflect")
    naive = np.array(
        [
            [(padded[i : i + len(disc), j : j + len(disc)] * disc).sum() for j in range(32)]
            for i in range(32)
        ]
    )
    assert np.abs(corrupt(images, "defocus_blur", 3)[0, 1].numpy() - naive).max() <= 0.51


def slow_jpeg(picture, quality):
    """What JPEG loses, by its standard's formulas (ITU T.81, T.871), for sides in eights."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8)).save(file, "JPEG", quality=quality)  # for its tables only
    tables = Image.open(file).quantization
    k = np.arange(8.0)
    dct = np.cos((2 * k[None] + 1) * k[:, None] * math.pi / 16) / 2
    dct[0] /= math.sqrt(2)
    to_ycc = np.array(
        [(0.299, 0.587, 0.114), (-0.168736, -0.331264, 0.5), (0.5, -0.418688, -0.081312)]
    )
    ycc = (to_ycc @ picture.reshape(3, -1)).round().reshape(picture.shape)
    ycc[0] -= 128
    for channel in range(3):
        steps = np.array(tables[min(channel, 1)]).reshape(8, 8)
        for i in range(0, picture.shape[1], 8):
            for j in range(0, picture.shape[2], 8):
                waves = dct @ ycc[channel, i : i + 8, j : j + 8] @ dct.T / steps
                kept = np.sign(waves) * np.floor(np.abs(waves) + 0.5 + 1e-4) * steps  # a half: up
                ycc[channel, i : i + 8, j : j + 8] = dct.T @ kept @ dct
    ycc[0] += 128
    rgb = np.linalg.inv(to_ycc) @ ycc.round().reshape(3, -1)
    return rgb.reshape(picture.shape).round().clip(0, 255)


@pytest.mark.parametrize("severity", SEVERITIES)
def test_jpeg_is_that_of_the_standard_with_all_colours(severity, images):
    quality = CORRUPTIONS["jpeg"][1][severity - 1]
    mine = corrupt(images, "jpeg", severity)
    theirs = np.stack([slow_jpeg(picture.double().numpy(), quality) for picture in images])
    theirs = torch.from_numpy(theirs)
    # Pillow's whole-number arithmetic tips a coefficient the other way now and then.
    assert float((mine - theirs).abs().mean()) < 0.35
    assert distance(mine, theirs) < 0.12 * distance(theirs, images)


def test_fog_is_a_convex_mix_with_light_gray():
    for value in (0, 255):
        x = corrupt(gray(8, value), "fog", 5, generator=seeded()).float() / 255
        veil = (x - 0.4 * value / 255) / 0.6
        assert 0.54 < float(veil.min()) and float(veil.max()) < 0.96


def test_batches_are_seeded_and_the_same_for_every_model(images):
    many = images.repeat(9, 1, 1, 1)  # 288: two chunks
    parts = list(corrupted(many, "gaussian_noise", 2, seed=1))
    assert [len(p) for p in parts] == [256, 32]
    again = torch.cat(list(corrupted(many, "gaussian_noise", 2, seed=1)))
    assert torch.equal(torch.cat(parts), again)
    noise = again[:32].int() - images.int()
    for other in (again[256:], next(corrupted(many, "gaussian_noise", 2, seed=2))[:32]):
        assert not torch.equal(noise, other.int() - images.int())


def test_extract_takes_the_batches(images):
    model = refiner.load_model("mae_toybox")
    found = refiner.extract(model, corrupted(images, "jpeg", 5), progress=False)["final"]
    direct = refiner.extract(model, corrupt(images, "jpeg", 5), progress=False)["final"]
    torch.testing.assert_close(found, direct, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize(
    ("name", "severity", "dtype", "message"),
    [
        ("rain", 1, torch.uint8, "choose among"),
        ("fog", 0, torch.uint8, "from 1 to 5"),
        ("fog", 1, torch.float32, "must be uint8"),
    ],
)
def test_what_cannot_be_done_is_said(name, severity, dtype, message):
    with pytest.raises(ValueError, match=message):
        corrupt(torch.zeros(1, 3, 8, 8, dtype=dtype), name, severity)
