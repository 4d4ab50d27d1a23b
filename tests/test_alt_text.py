"""The words that go with a picture say what it shows; test_course.py follows them to a page."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from refiner.visuals import plots
from refiner.visuals.alt_text import UNLABELLED, describe


@pytest.fixture(autouse=True)
def closing():
    yield
    plt.close("all")


def words(figure):
    figure.canvas.draw()
    return describe(figure)


def test_curves_are_told_with_their_ends_in_the_axis_units():
    ax = plots.block_curve({"before": [0.25, 0.5, 0.75]}, chance=0.1, best=False, title="Votes")
    assert words(ax.figure) == (
        "Votes; curve “before” from 25% at 1 to 75% at 3; level “chance” at 10%; x axis: block; "
        "y axis: accuracy."
    )
    ax = plots.block_curve({"a": [0.25, 0.5]}, blocks=[128, 2048], best=False)
    assert "25% at 128 to 50% at 2,048" in words(ax.figure)


def test_bars_are_told_with_their_names():
    text = words(plots.bars_with_spread({"before": [0.1, 0.3], "after": [0.4, 0.5]}).figure)
    assert "bars: 20%, 45%" in text and "(before, after)" in text


def test_maps_points_and_images_are_told():
    text = words(plots.similarity_map(torch.eye(4)).figure)
    assert "map of 4 × 4 values, 0 to 1" in text and "Colour scale: linear CKA" in text
    xy = {"one": np.random.default_rng(0).random((9, 2))}
    axes = plots.embedding(xy, torch.arange(9) % 3, ("ant", "bee", "cow"))
    assert "9 points in the groups ant, bee, cow" in words(axes[0].figure)
    pictures = torch.rand(2, 3, 8, 8)
    text = words(plots.reconstruction(pictures, pictures, pictures).figure)
    assert "6 images" in text and "original, masked, reconstruction" in text


def test_an_axis_with_numbers_but_no_label_is_told():
    figure, axis = plt.subplots()
    axis.plot([1, 2], [3, 4])
    axis.set_xlabel("step")
    assert f"y {UNLABELLED}" in words(figure) and f"x {UNLABELLED}" not in words(figure)
    axis.set_ylabel("loss")
    assert UNLABELLED not in words(figure)
    axis.set(xlabel="", xticks=[1, 2], xticklabels=["cat", "dog"])
    assert UNLABELLED not in words(figure), "names speak for themselves"


def test_the_figures_own_label_comes_first_and_many_panels_are_told_once():
    figure, _ = plt.subplots(3, 3)
    figure.set_label("Nine patches")
    assert words(figure).startswith("Nine patches. 9 small panels, like this: ")


def test_every_figure_is_solid_so_that_a_dark_page_does_not_shine_through():
    with plots.style():
        figure, _ = plt.subplots()
        figure.canvas.draw()
        assert np.asarray(figure.canvas.buffer_rgba())[0, 0].tolist() == [255] * 4
