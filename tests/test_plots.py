"""Every figure: what is drawn where, that it is labelled, and that it works without colour."""

import os
from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from eyes import VISIONS, luminance, seen
from matplotlib.colors import to_hex
from matplotlib.text import Text

from refiner.images.sets import ImageSet
from refiner.probing.search import Graph
from refiner.visuals import plots
from refiner.visuals.alt_text import describe
from refiner.visuals.style import COLOURS, MARKERS, STYLE, styles_of

pytestmark = pytest.mark.filterwarnings("error")


@pytest.fixture(autouse=True)
def closing():
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()  # what cannot be drawn fails here
    plt.close("all")


def image_set(n=12, size=6) -> ImageSet:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return ImageSet(pixels, torch.arange(n) % 3, ("ant", "bee", "cow"))


def texts(ax) -> list[str]:
    return [text.get_text() for text in ax.texts]


def shown(image) -> np.ndarray:
    return np.asarray(image.get_array())


# ---------------------------------------------------------------- style


def test_style_sets_the_look_and_can_take_it_back():
    before = plt.rcParams["font.size"]
    with plots.style():
        assert plt.rcParams["font.size"] == STYLE["font.size"] != before
    assert plt.rcParams["font.size"] == before


def test_every_colour_stands_out_from_white_paper():
    assert len(set(COLOURS)) == len(COLOURS)
    # The lightest, orange and sky blue, reach 2 : 1; markers and lines carry the rest.
    assert all(1.05 / (luminance(colour) + 0.05) > 2 for colour in COLOURS)


@pytest.mark.parametrize("kind", [kind for kind in VISIONS if kind != "normal"])
def test_colours_stay_apart_for_eyes_without_a_kind_of_cone(kind):
    colours = seen(COLOURS, kind)
    apart = [np.linalg.norm(a - b) for i, a in enumerate(colours) for b in colours[:i]]
    assert min(apart) > 10


# ---------------------------------------------------------------- images


def test_contact_sheet_shows_the_first_images_in_order_with_their_classes():
    images = image_set()
    ax = plots.contact_sheet(images, columns=4, n=10, title="some")
    assert len(ax.images) == 10 and ax.get_title() == "some"
    assert texts(ax) == ["ant", "bee", "cow"] * 3 + ["ant"]
    for i, picture in enumerate(ax.images):
        assert np.allclose(shown(picture), images.images[i].permute(1, 2, 0) / 255)
        left, _, bottom, top = picture.get_extent()
        assert int(left) == i % 4 and int(top / 1.25) == i // 4 and bottom > top


def test_contact_sheet_takes_floats_and_given_labels():
    ax = plots.contact_sheet(torch.rand(3, 3, 5, 5), torch.tensor([1, 0, 7]))
    assert texts(ax) == ["1", "0", "7"] and len(ax.images) == 3
    ax = plots.contact_sheet(torch.rand(3, 3, 5, 5))
    assert texts(ax) == []
    with pytest.raises(ValueError, match="no images"):
        plots.contact_sheet(image_set()[:0])
    with pytest.raises(ValueError, match="N, C, H, W"):
        plots.contact_sheet(torch.rand(3, 5, 5))


def test_reconstruction_has_three_named_rows():
    original, masked, painted = (torch.full((4, 3, 5, 5), v) for v in (0.2, 0.5, 1.7))
    ax = plots.reconstruction(original, masked, painted, title="painted")
    rows = [label.get_text() for label in ax.get_yticklabels()]
    assert rows == ["original", "masked", "reconstruction"] and ax.get_title() == "painted"
    values = {
        (int(p.get_extent()[0]), int(p.get_extent()[3])): float(shown(p).max()) for p in ax.images
    }
    expected = {(c, r): v for c in range(4) for r, v in enumerate((0.2, 0.5, 1.0))}
    assert values == pytest.approx(expected)
    with pytest.raises(ValueError, match="equally many"):
        plots.reconstruction(original, masked[:2], painted)


def test_neighbor_grid_marks_right_and_wrong_by_frame_and_sign():
    images = image_set()
    right = (torch.arange(12)[:, None] + torch.tensor([3, 6, 9])) % 12  # of the same class
    mixed = (torch.arange(12)[:, None] + torch.tensor([3, 1, 2])) % 12
    graphs = {name: Graph(i, torch.zeros(12, 3)) for name, i in (("b", mixed), ("a", right))}
    ax = plots.neighbor_grid(images, [4, 0], graphs, k=3)
    assert len(ax.images) == 2 * (1 + 2 * 3)
    assert texts(ax).count("✓") == 2 * 4 and texts(ax).count("✗") == 2 * 2
    assert {"query", "b: 33% right", "a: 100% right"} <= set(texts(ax))
    assert [label.get_text() for label in ax.get_yticklabels()] == ["bee", "ant"]
    looks = {(to_hex(p.get_edgecolor()).upper(), str(p.get_linestyle())) for p in ax.patches}
    assert len(ax.patches) == 12 and len(looks) == 2
    assert len({line for _, line in looks}) == 2  # the frames differ in line too
    drawn = [shown(p) for p in ax.images]
    for row, query in enumerate((4, 0)):
        assert np.allclose(drawn[row], images.images[query].permute(1, 2, 0) / 255)
    first = images.images[mixed[4, 0]].permute(1, 2, 0) / 255
    assert np.allclose(drawn[2], first)
    assert ax.get_title()


def test_neighbor_grid_over_another_set_and_without_labels():
    queries, keys = image_set(4), image_set(9, size=8)
    graph = Graph(torch.tensor([[8], [7], [6], [5]]), torch.zeros(4, 1))
    ax = plots.neighbor_grid(queries, torch.tensor([1]), {"m": graph}, keys=keys, k=1)
    assert np.allclose(shown(ax.images[1]), keys.images[7].permute(1, 2, 0) / 255)
    assert "✓" in texts(ax)
    ax = plots.neighbor_grid(queries.images, [1], {"m": graph}, keys=keys.images, k=1)
    assert texts(ax) == ["query", "m"] and not ax.patches
    for wrong in (graph.first(1).indices[:2], graph.indices[None]):
        with pytest.raises(ValueError, match="one block's neighbors"):
            plots.neighbor_grid(queries, [1], {"m": Graph(wrong, wrong.float())}, keys=keys, k=1)
    with pytest.raises(ValueError, match="≥2"):
        plots.neighbor_grid(queries, [1], {"m": graph}, keys=keys, k=2)


# ---------------------------------------------------------------- curves and bars


def test_query_maps_light_what_is_attended_and_show_the_queries_that_differ_most():
    """Three queries look everywhere, one at the last patch; a class token stands before them."""
    images, maps = image_set(2), torch.full((2, 4, 10), 0.1)
    maps[:, 2] = torch.nn.functional.one_hot(torch.tensor(9), 10)
    ax = plots.query_maps(images, maps, shown=2)
    assert texts(ax)[:3] == ["image", "mean", "q3"] and len(texts(ax)) == 4
    picture, mean, alone = (shown(image) for image in ax.images[0:6:2])
    np.testing.assert_allclose(picture, images.images[0].permute(1, 2, 0) / 255, atol=1e-6)
    np.testing.assert_allclose(alone[4:, 4:], picture[4:, 4:], rtol=1e-5)
    np.testing.assert_allclose(alone[:4, :4], 0.1 * picture[:4, :4], rtol=1e-5)
    assert (mean[:4] < 0.5 * picture[:4] + 1e-6).all()
    with pytest.raises(ValueError, match="2 images do not match"):
        plots.query_maps(images, maps[:1])


def test_block_curve_counts_blocks_from_one_and_names_the_best():
    values = torch.tensor([0.1, 0.4, 0.3])
    spread = torch.tensor([0.01, 0.02, 0.03])
    ax = plots.block_curve(
        {"mae": (values, spread), "random": values.flip(0)}, ylabel="k-NN accuracy", chance=0.05
    )
    curves = {line.get_label(): line for line in ax.lines if not line.get_label().startswith("_")}
    assert list(curves) == ["mae (best: block 2, 40.0%)", "random (best: block 2, 40.0%)", "chance"]
    first, second, _ = curves.values()
    assert first.get_xdata().tolist() == [1, 2, 3]
    assert np.allclose(first.get_ydata(), values)
    for trait in ("get_color", "get_marker", "get_linestyle"):
        assert getattr(first, trait)() != getattr(second, trait)()
    assert len(ax.collections) == 1  # the band
    band = ax.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() == pytest.approx(0.42)
    rings = [line for line in ax.lines if line.get_fillstyle() == "none"]
    assert [ring.get_xdata()[0] for ring in rings] == [2, 2]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("block", "k-NN accuracy")
    assert ax.get_title() == "k-NN accuracy of every block"
    ax.figure.canvas.draw()
    assert ax.get_yticklabels()[0].get_text().endswith("%")


def test_block_curve_with_other_numbers_and_units():
    _, ax = plt.subplots()
    returned = plots.block_curve(
        {"rank": [3.0, 80.0]}, ylabel="rank", blocks=[7, 12], best=False, title="t", ax=ax
    )
    assert returned is ax and len(ax.lines) == 1
    assert ax.lines[0].get_xdata().tolist() == [7, 12] and ax.get_title() == "t"
    ax.figure.canvas.draw()
    assert not ax.get_yticklabels()[0].get_text().endswith("%")


def refinement(neighbors=True):
    entries = []
    for stage, steps in ((2, 3), (3, 4)):
        for step in range(1, steps + 1):
            entries.append(
                {
                    "stage": stage,
                    "step": 10 * step,
                    "loss": [3.0 - step, 2.0 - step],
                    "lr": 0.1,
                    "similarity": [0.0, 0.0],
                    "seconds": 1.0,
                    "neighbor_accuracy": [0.1 * step, 0.2] if neighbors else None,
                }
            )
    entries[-1]["knn"] = 0.5
    return entries


def test_history_of_a_refinement_goes_through_the_stages():
    axes = plots.history(refinement(), heads=["block 5", "block 6"])
    assert len(axes) == 3
    loss, neighbors, evaluation = axes
    assert loss.lines[0].get_xdata().tolist() == [10, 20, 30, 40, 50, 60, 70]
    assert loss.lines[1].get_ydata().tolist() == [1, 0, -1, 1, 0, -1, -2]
    names = [text.get_text() for text in neighbors.get_legend().get_texts()]
    assert names == ["block 5", "block 6"]
    assert evaluation.lines[0].get_xdata().tolist() == [70]
    for ax in axes:
        assert ax.get_title() and ax.get_xlabel() == "step" and ax.get_ylabel()
        assert "stage 3" in texts(ax)
        assert any(np.all(np.asarray(line.get_xdata()) == 30) for line in ax.lines)


def test_history_of_other_runs():
    assert len(plots.history(refinement(neighbors=False)[:-1])) == 1
    (loss,) = plots.history([{"step": 5, "loss": 1.0, "lr": 1.0, "seconds": 0.5}])
    assert loss.lines[0].get_ydata().tolist() == [1.0] and not loss.texts
    with pytest.raises(ValueError, match="empty"):
        plots.history([])
    with pytest.raises(ValueError, match="needs 3 axes, not 1"):
        plots.history(refinement(), ax=plt.subplots()[1])


def test_bars_show_means_and_every_run():
    runs = {"before": torch.tensor([0.2, 0.3, 0.4]), "after": [0.6]}
    ax = plots.bars_with_spread(runs, ylabel="accuracy, 5 labels", chance=0.1)
    assert [bar.get_height() for bar in ax.patches] == pytest.approx([0.3, 0.6])
    points = [line.get_ydata().tolist() for line in ax.lines[:2]]
    assert points[0] == pytest.approx([0.2, 0.3, 0.4]) and points[1] == [0.6]
    assert texts(ax) == ["30.0%", "60.0%"]
    assert [label.get_text() for label in ax.get_xticklabels()] == ["before", "after"]
    assert "points" in ax.get_xlabel() and ax.get_ylabel() == "accuracy, 5 labels"
    assert ax.get_title() == "Accuracy, 5 labels"
    assert "%" not in texts(plots.bars_with_spread({"a": [3.0, 4.0]}, ylabel="rank"))[0]


def test_similarity_map_is_a_square_a_pair():
    table = torch.rand(2, 24)
    ax = plots.similarity_map(table, rows="before", columns="after")
    assert np.allclose(shown(ax.images[0]), table) and ax.images[0].get_clim() == (0, 1)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["1", "2"]
    assert [label.get_text() for label in ax.get_xticklabels()][:3] == ["1", "3", "5"]
    assert (ax.get_ylabel(), ax.get_xlabel()) == ("before", "after")
    with pytest.raises(ValueError, match="must be"):
        plots.similarity_map([0.1, 0.2])


# ---------------------------------------------------------------- maps


def test_embedding_draws_every_class_with_its_own_marker():
    labels = torch.arange(48) % 16
    classes = [f"toy {i}" for i in range(16)]
    maps = {name: torch.randn(48, 2) for name in ("before", "after")}
    axes = plots.embedding(maps, labels, classes)
    assert [ax.get_title() for ax in axes] == ["before", "after"]
    for ax, xy in zip(axes, maps.values(), strict=True):
        assert len(ax.collections) == 16 and ax.get_xlabel()
        for label, points in enumerate(ax.collections):
            assert np.allclose(points.get_offsets(), xy[labels == label])
    assert axes[0].get_ylabel()
    outlines = {points.get_paths()[0].vertices.tobytes() for points in axes[0].collections}
    assert len(outlines) == 16
    assert axes[0].get_legend() is None  # once is enough
    assert [t.get_text() for t in axes[1].get_legend().get_texts()] == classes


def test_no_two_of_a_hundred_classes_look_alike():
    labels = torch.arange(100)
    (ax,) = plots.embedding({"map": torch.randn(100, 2)}, labels)
    looks = {
        (to_hex(p.get_facecolor()[0]), p.get_paths()[0].vertices.tobytes()) for p in ax.collections
    }
    assert len(looks) == 100
    assert ax.get_legend() is None and texts(ax) == [str(i) for i in range(100)]


def test_embedding_without_labels_and_with_wrong_ones():
    (ax,) = plots.embedding({"map": np.zeros((5, 2))})
    assert len(ax.collections) == 1 and ax.get_legend() is None
    with pytest.raises(ValueError, match=r"'map' must be \[4, 2\]"):
        plots.embedding({"map": np.zeros((5, 2))}, torch.zeros(4, dtype=torch.int64))
    with pytest.raises(ValueError, match="must be"):
        plots.embedding({"map": np.zeros((5, 3))})


def test_factor_heatmap_has_factors_down_and_blocks_across():
    before = torch.tensor([[0.0, 0.5], [0.25, 1.0], [0.1, 0.2]])  # 3 blocks, 2 factors
    axes = plots.factor_heatmap({"before": before, "after": 1 - before}, ["hue", "yaw"])
    assert [ax.get_title() for ax in axes] == ["before", "after"]
    assert np.allclose(shown(axes[0].images[0]), before.T)
    assert {ax.images[0].get_clim() for ax in axes} == {(0.0, 1.0)}  # one scale
    assert [label.get_text() for label in axes[0].get_yticklabels()] == ["hue", "yaw"]
    assert [label.get_text() for label in axes[0].get_xticklabels()] == ["1", "2", "3"]
    assert axes[0].get_ylabel() == "factor" and axes[0].get_xlabel() == "block"
    assert sorted(texts(axes[0])) == sorted([".00", ".50", ".25", "1", ".10", ".20"])
    bars = [ax for ax in axes[0].figure.axes if ax not in axes]
    assert len(bars) == 1 and "0 = not" in bars[0].get_ylabel()
    with pytest.raises(ValueError, match=r"must be \[L, 3\]"):
        plots.factor_heatmap({"before": before}, ["a", "b", "c"])


def test_factor_heatmap_shows_a_dash_where_nothing_is_known():
    scores = torch.tensor([[0.5, torch.nan], [-0.25, 1.0]])
    (ax,) = plots.factor_heatmap({"model": scores}, ["hue", "yaw"])
    assert sorted(texts(ax)) == sorted([".50", "–", "-0.25", "1"])


def test_a_spider_closes_its_outlines_and_keeps_one_scale():
    values = {"before": [0.2, 0.5, 0.9, 0.4], "after": np.array([0.4, 0.6, 0.8, 0.4])}
    ax = plots.spider(values, ["k-NN", "linear", "clusters", "dense"])
    for line, x in zip(ax.lines, values.values(), strict=True):
        angle, radius = line.get_data()
        assert radius.tolist() == [*x, x[0]] and angle[-1] == angle[0]
        np.testing.assert_allclose(angle[:-1], np.arange(4) * np.pi / 2)
    assert ax.get_ylim() == (0, 1)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["k-NN", "linear", "clusters", "dense"]
    assert [t.get_text() for t in ax.get_legend().get_texts()] == ["before", "after"]
    assert len({line.get_marker() for line in ax.lines}) == 2
    for wrong in (["a", "b"], ["a", "b", "c"]):
        with pytest.raises(ValueError, match="three or more spokes"):
            plots.spider({"x": [0.1] * len(wrong[:2])}, wrong)


def test_differences_are_filled_where_they_are_more_than_two_spreads():
    ax = plots.differences(["up", "flat", "down"], [0.1, 0.01, -0.2], [0.04, 0.04, 0.01])
    filled, hollow = ax.containers
    assert filled.lines[0].get_data()[0].tolist() == pytest.approx([10, -20])
    assert filled.lines[0].get_data()[1].tolist() == [0, 2]
    assert hollow.lines[0].get_data()[0].tolist() == pytest.approx([1])
    assert hollow.lines[0].get_fillstyle() == "none" != filled.lines[0].get_fillstyle()
    (bars,) = hollow.lines[2]
    np.testing.assert_allclose(bars.get_segments()[0][:, 0], [1 - 8, 1 + 8])
    assert [t.get_text() for t in ax.get_yticklabels()] == ["up", "flat", "down"]
    assert ax.get_ylim()[0] > ax.get_ylim()[1]  # the first on top
    plots.differences(["a"], [0.1], [0.1], ax=ax)
    assert ax.figure.get_label() == "2 of 3 filled: up +10, down -20. 0 of 1 filled: none"


# A formula that is none, and a file name that is no UTF-8, as the file system gives it.
ODD = [r"a$\frac$", "5 $ or $ 6", os.fsdecode(b"caf\xe9")]


def each(value) -> dict:
    return {name: value for name in ODD}


@pytest.mark.parametrize(
    "draw",
    [
        lambda images, graph: plots.contact_sheet(images, title=ODD[0]),
        lambda images, graph: plots.reconstruction(*[images.images] * 3, title=ODD[0]),
        lambda images, graph: plots.neighbor_grid(images, [0, 1, 2], each(graph)),
        lambda images, graph: plots.block_curve(each([0.1, 0.2]), ylabel=ODD[0]),
        lambda images, graph: plots.bars_with_spread(each([0.1]), title=ODD[2]),
        lambda images, graph: plots.similarity_map([[0.1]], rows=ODD[0], columns=ODD[2]),
        lambda images, graph: plots.spider(each([0.1] * 3), ODD),
        lambda images, graph: plots.differences(ODD, [0.1] * 3, [0.1] * 3, title=ODD[2]),
        lambda images, graph: plots.factor_heatmap(each(np.zeros((2, 3))), ODD),
        lambda images, graph: plots.embedding(
            each(np.zeros((12, 2))), images.labels, images.classes
        ),
        lambda images, graph: plots.history([{"step": 1, "loss": [0.1] * 3}], heads=ODD),
    ],
)
def test_names_of_users_are_no_formulas_and_need_not_be_utf_8(draw):
    images = replace(image_set(), classes=tuple(ODD))
    drawn = draw(images, Graph(torch.zeros(12, 6, dtype=torch.int64), torch.zeros(12, 6)))
    figure = np.ravel(drawn)[0].figure
    figure.canvas.draw()  # raised for formulas and for lone surrogates
    shown = " ".join(text.get_text() for text in figure.findobj(Text))
    assert any(word in shown for word in (r"a\$\frac\$", r"5 \$ or \$ 6", "caf?"))
    describe(figure).encode("utf-8")


@pytest.mark.parametrize(
    "name",
    [
        "contact_sheet",
        "reconstruction",
        "neighbor_grid",
        "block_curve",
        "bars_with_spread",
        "similarity_map",
    ],
)
def test_given_axes_are_used(name):
    images = image_set()
    graph = Graph(torch.zeros(12, 6, dtype=torch.int64), torch.zeros(12, 6))
    arguments = {
        "contact_sheet": (images,),
        "reconstruction": (images.images,) * 3,
        "neighbor_grid": (images, [0], {"m": graph}),
        "block_curve": ({"a": [0.1, 0.2]},),
        "bars_with_spread": ({"a": [0.1, 0.2]},),
        "similarity_map": ([[0.1, 0.2]],),
    }[name]
    _, ax = plt.subplots()
    assert getattr(plots, name)(*arguments, ax=ax) is ax
    assert len(plt.get_fignums()) == 1


def test_one_colour_for_one_thing_in_whatever_order_and_never_by_colour_alone():
    def colours(*names):
        return {name: look["color"] for name, look in zip(names, styles_of(names), strict=True)}

    first = colours("before", "refined", "random weights (control)", "k-NN, whitened")
    again = colours("noise (control)", "no decoder, refined", "linear probe", "unrefined")
    assert len(set(first.values())) == 4
    assert first["before"] == again["unrefined"]
    assert first["refined"] == again["no decoder, refined"] == colours("x", "after")["after"]
    assert first["random weights (control)"] == again["noise (control)"]
    assert again["linear probe"] not in first.values()
    assert list(colours("a", "b").values()) == list(COLOURS[:2]), "nothing to be told apart"
    two = styles_of(["pixels (control)", "random weights (control)"])
    assert two[0]["color"] == two[1]["color"] and two[0]["marker"] != two[1]["marker"]
    assert [look["marker"] for look in styles_of("abc")] == list(MARKERS[:3])
