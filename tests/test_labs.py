"""Toybox-labs: each lab leaves its mark, and image i of a lab is always the same."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from refiner.base.errors import UserError
from refiner.images import labs
from refiner.images.load import load_images
from refiner.images.toybox import render
from refiner.probing.choosing import best_reading, by_few_labels
from refiner.probing.features import Features
from refiner.probing.readings import standardize_groups


def test_a_picture_depends_on_its_index_and_lab_alone():
    whole = render(192, variant="toybox-labs")
    assert np.bincount(whole.factors["lab"].astype(int)).tolist() == [32] * 6
    pairs = torch.tensor(whole.factors["lab"]).long() * 16 + whole.labels
    assert pairs.bincount().tolist() == [2] * 96, "each lab shows each toy as often"
    indices = [97, 3, 50, 3, 119]
    for chunk in (1, 3, 512):
        part = render(indices, variant="toybox-labs", chunk=chunk)
        assert torch.equal(part.images, whole.images[indices])
        assert np.array_equal(part.factors["lab"], whole.factors["lab"][indices])
    third, alone = (
        render(range(32, 48), variant="toybox-labs", labs=some) for some in ((5, 4, 2), (2,))
    )
    assert torch.equal(third.images, alone.images) and set(alone.factors["lab"]) == {2}


def test_labs_differ_and_show_the_same_toys():
    sides = [render(32, variant="toybox-labs", labs=(number,)) for number in range(6)]
    for one in range(6):
        for other in range(one):
            apart = (sides[one].images.float() - sides[other].images.float()).abs().mean()
            assert apart > 15, "of 255, between the same scenes in two labs"
        assert np.array_equal(sides[one].factors["yaw"], sides[0].factors["yaw"])
        assert torch.equal(sides[one].masks, sides[0].masks)
        assert not np.array_equal(
            sides[one].factors["background_brightness"], render(32).factors["background_brightness"]
        )


def test_the_lens_blurs_as_a_convolution_does():
    x = torch.rand(2, 3, 12 * 12)
    sigma = 1.3
    offsets = torch.arange(-4, 5.0)
    kernel = (-0.5 * (offsets / sigma).square()).exp()
    kernel = (kernel / kernel.sum())[None, None]
    image = F.pad(x.view(6, 1, 12, 12), (4, 4, 4, 4), mode="replicate")
    naive = F.conv2d(F.conv2d(image, kernel[..., None]), kernel[:, :, None])
    ours = labs._blurred(x, sigma, 12)
    assert torch.allclose(ours, naive.reshape(2, 3, 144), atol=1e-6)


def test_a_sensor_turns_colours_and_keeps_black_and_white():
    plain = dict(vars(labs.lab(0)), turn=0.0, cast=(1.0, 1.0, 1.0), offset=0.0, blur=0.0)
    x = torch.rand(1, 3, 16)
    for exposure in (0.5, 1.0, 2.0):
        here = labs.Lab(**plain | {"exposure": exposure, "negative": False})
        found = labs.photographed(x, here, 4)
        assert torch.allclose(found, x / (x + exposure * (1 - x)), atol=1e-5)
        negative = labs.Lab(**plain | {"exposure": exposure, "negative": True})
        assert torch.allclose(labs.photographed(x, negative, 4), 1 - found, atol=1e-6)
    gray = torch.full((1, 3, 16), 0.4)
    turned = labs.Lab(**plain | {"exposure": 1.0, "negative": False, "turn": 0.3})
    assert torch.allclose(labs.photographed(gray, turned, 4), gray, atol=1e-4)


def test_labs_are_loaded_kept_and_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINER_CACHE", str(tmp_path))
    some = load_images("toybox-labs", n=32, labs=range(2), progress=False)
    again = load_images("toybox-labs", n=32, labs=(0, 1), progress=False)
    assert torch.equal(some.images, again.images) and len(list(tmp_path.iterdir())) == 1
    assert not torch.equal(
        some.images, load_images("toybox-labs", n=32, labs=(1, 0), progress=False).images
    )
    with pytest.raises(UserError, match="labs are those of 'toybox-labs'; toybox has none"):
        load_images("toybox", n=16, labs=(0,))
    for wrong in ((), (1, 1), (-1,), (1000,)):
        with pytest.raises(UserError, match="labs"):
            load_images("toybox-labs", n=16, labs=wrong)


# ---------------------------------------------------------------- reading across labs


def test_groups_are_standardised_each_by_itself():
    g = torch.Generator().manual_seed(0)
    groups = torch.tensor([0, 1, 1, 0, 2, 1, 0])
    x = Features({"cls": torch.randn(2, 7, 3, generator=g), "final": torch.randn(7, 3)}, (1, 2))
    found = standardize_groups(x, groups.numpy())
    for kind in x:
        for group in (0, 1):
            some, own = x[kind][..., groups == group, :], found[kind][..., groups == group, :]
            naive = (some - some.mean(-2, keepdim=True)) / some.std(-2, correction=0, keepdim=True)
            assert torch.allclose(own, naive, atol=1e-5)
        assert not found[kind][..., 4, :].any(), "a group of one has nothing but its mean"
    with pytest.raises(UserError, match="7 images need as many groups"):
        standardize_groups(x, groups[:3])


def test_a_reading_is_chosen_across_groups():
    """Block 1 knows the class within a lab only; block 2 a little less, but in all labs."""
    g = torch.Generator().manual_seed(0)
    lab, y = torch.arange(240) % 3, torch.arange(240) // 3 % 2
    sign = torch.where(lab == 0, 1.0, -1.0) * (2 * y - 1)
    within = torch.stack([sign + 6 * lab, 5.0 * lab], dim=1) + 0.05 * torch.randn(
        240, 2, generator=g
    )
    everywhere = torch.stack([2.0 * y - 1, 0 * y], dim=1) + 0.6 * torch.randn(240, 2, generator=g)
    x = Features({"patch": torch.stack([within, everywhere])}, (1, 2))
    assert best_reading(x, y).reading.block == 1
    across = best_reading(x, y, groups=lab)
    assert across.reading.block == 2
    wrong = {"240 images need as many groups": lab[:5], "there is only one group": [0] * 240}
    for said, groups in wrong.items():
        with pytest.raises(UserError, match=said):
            best_reading(x, y, groups=groups)
    words = best_reading(x, y, groups=[f"lab {g}" for g in lab.tolist()])
    assert words.scores == across.scores
    few = best_reading(x, y, groups=lab, by=by_few_labels(5, draws=3))
    assert few.reading.block == 2
