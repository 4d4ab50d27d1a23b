"""Figures: labelled, complete, and right about what they mark."""

import matplotlib
import numpy as np
import pytest
import torch

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.collections import PathCollection

from refiner import plots
from refiner.images import ImageSet
from refiner.neighbors import nearest_neighbors


@pytest.fixture(autouse=True)
def closed():
    plots.style()
    yield
    plt.close("all")


@pytest.fixture
def images():
    pixels = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    return ImageSet(images=pixels, labels=torch.arange(12) % 3, classes=("a", "b", "c"))


def test_contact_sheet_shows_every_pixel_in_order(images):
    sheet = plots.contact_sheet(images, columns=5).images[0].get_array()
    assert sheet.shape == (30, 50, 3)
    seventh = images.images[6].permute(1, 2, 0).numpy()
    assert np.array_equal(sheet[11:19, 11:19], seventh)
    with pytest.raises(ValueError, match="no images"):
        plots.contact_sheet(images.images[:0])


def test_block_curve_rings_the_best_block_and_labels_axes():
    ax = plots.block_curve(
        {"one": [0.1, 0.5, 0.3], "seeds": np.array([[0.1, 0.2, 0.3], [0.3, 0.4, 0.5]])},
        ylabel="accuracy", chance=0.1,
    )  # fmt: skip
    rings = [c.get_offsets()[0] for c in ax.collections if isinstance(c, PathCollection)]
    assert np.allclose(rings, [(2, 0.5), (3, 0.4)])
    assert ax.get_xlabel() and ax.get_ylabel() == "accuracy" and ax.get_title()
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["one", "seeds", "chance"]
    looks = {(line.get_color(), line.get_marker()) for line in ax.lines[:2]}
    assert len(looks) == 2


def test_neighbor_grid_marks_the_classes_in_words_too(images):
    x = torch.nn.functional.one_hot(images.labels, 3).float() + 0.01 * torch.randn(12, 3)
    graph = nearest_neighbors(x, x, k=3, exclude_self=True)
    axes = plots.neighbor_grid(images, [0, 4], {"before": graph, "after": graph}, k=3)
    assert axes.shape == (2, 7)
    for row, query in zip(axes, [0, 4], strict=True):
        for axis, key in zip(row[1:4], graph.indices[query].tolist(), strict=True):
            same = images.labels[query] == images.labels[key]
            assert axis.get_xlabel() == ("✓" if same else "✗")
            shown = axis.images[0].get_array()
            assert np.array_equal(shown, images.images[key].permute(1, 2, 0).numpy())


def test_embedding_has_one_look_per_class_and_one_legend():
    labels = np.arange(32) % 16
    axes = plots.embedding({"x": np.random.rand(32, 2), "y": np.random.rand(32, 2)}, labels,
                           [str(c) for c in range(16)])  # fmt: skip
    assert [a.get_title() for a in axes] == ["x", "y"]
    assert len(axes[0].figure.legends) == 1
    looks = {(tuple(s.get_facecolor()[0][:3]), len(s.get_paths()[0].vertices), i >= 8)
             for i, s in enumerate(axes[0].collections)}  # fmt: skip
    assert len(axes[0].collections) == 16 and len(looks) == 16


def test_history_takes_runs_with_and_without_labels():
    entry = {"stage": 2, "step": 5, "loss": [1.0, 2.0], "neighbor_accuracy": [0.1, 0.2]}
    axes = plots.history([entry, entry | {"stage": 3, "step": 10}])
    assert axes[0].lines[0].get_xdata().tolist() == [5, 15]
    assert all(a.get_xlabel() and a.get_ylabel() for a in axes)
    bare = plots.history([entry | {"neighbor_accuracy": None}])
    assert "no labels" in [t.get_text() for t in bare[1].texts]


def test_bars_show_every_value():
    ax = plots.bars_with_spread({"a": [0.1, 0.3], "b": [0.5]}, ylabel="accuracy")
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.2, 0.5])
    assert [len(c.get_offsets()) for c in ax.collections] == [2, 1]


def test_reconstruction_has_three_named_rows():
    x = torch.rand(4, 3, 8, 8)
    axes = plots.reconstruction(x, x, x)
    assert axes.shape == (3, 4)
    assert [row[0].get_ylabel() for row in axes] == ["original", "visible", "painted"]
