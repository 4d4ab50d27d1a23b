"""What the explorer says, against slow loops: no browser, no widgets."""

from dataclasses import replace

import numpy as np
import pytest
import torch

import refiner
from refiner.images.sets import ImageSet
from refiner.probing.search import Graph
from refiner.visuals import explorer_state, maps
from refiner.visuals.explorer_state import State, prepare

N, L, D, K = 60, 3, 8, 5
NAMES = ("ball", "cube", "cone", "can")


def make_images(n=N):
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % 4
    factors = {"hue": np.linspace(0.2, 0.8, n), "pattern": np.arange(n) % 3 * 1.0}
    pixels = torch.randint(256, (n, 3, 4, 4), generator=generator, dtype=torch.uint8)
    return ImageSet(pixels, labels, NAMES, factors)


def make_features(seed, n=N):
    """Classes that come apart with the blocks."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(4, D, generator=generator)[torch.arange(n) % 4]
    noise = torch.randn(L, n, D, generator=generator)
    return noise + centres * torch.tensor([0.3, 1.0, 2.0])[:, None, None]


FEATURES = {"before": make_features(1), "after": make_features(2)}


@pytest.fixture(scope="module")
def explored():
    return prepare(make_images(), FEATURES, k=K, progress=False)


def naive_neighbors(name, block):
    """Neighbors and cosines of the standardised features, by sorting in float64."""
    x = FEATURES[name][block].double().numpy()
    x = (x - x.mean(0)) / x.std(0)
    x /= np.linalg.norm(x, axis=1, keepdims=True)
    cosines = x @ x.T
    np.fill_diagonal(cosines, -2)
    order = np.argsort(-cosines, axis=1)[:, :K]
    return order, np.take_along_axis(cosines, order, 1)


def naive_votes(order, cosines, labels):
    votes = np.zeros((len(order), 4))
    for i, (row, close) in enumerate(zip(order, cosines, strict=True)):
        for j, s in zip(row, close, strict=True):
            votes[i, labels[j]] += np.exp(s / 0.07)
    return votes / votes.sum(1, keepdims=True)


def test_accuracy_is_that_of_knn_report(explored):
    for name, x in FEATURES.items():
        wanted = refiner.knn_report(x, make_images().labels, k=K).accuracy
        assert np.allclose(explored.tables[name].accuracy, wanted, atol=1e-7)


def test_a_view_equals_the_loops(explored):
    labels = make_images().labels.numpy()
    for block in range(1, L + 1):
        state = State("before", "after", block, selected=7, group=(7, 3, 20, 9), colour="class")
        view = explored.compute(state)
        graphs = [naive_neighbors(name, block - 1) for name in ("before", "after")]
        common = [set(a) & set(b) for a, b in zip(graphs[0][0], graphs[1][0], strict=True)]
        assert view.shared == pytest.approx(np.mean([len(c) / K for c in common]))
        for side, near, (order, cosines) in zip(view.sides, view.near, graphs, strict=True):
            last, _ = naive_neighbors(side.model, L - 1)
            kept = np.mean([np.isin(a, b).mean() for a, b in zip(order, last, strict=True)])
            votes = naive_votes(order, cosines, labels)
            assert side.kept == pytest.approx(kept)
            assert side.accuracy == pytest.approx((votes.argmax(1) == labels).mean())
            assert near.indices.tolist() == order[7].tolist()
            assert np.allclose(near.similarities, cosines[7], atol=1e-6)
            assert near.shared.tolist() == [j in common[7] for j in order[7]]
            assert near.right.tolist() == (labels[order[7]] == labels[7]).tolist()
        group, chosen = view.group, [3, 7, 9, 20]
        assert group.indices.tolist() == chosen
        assert group.shared == pytest.approx(np.mean([len(common[i]) / K for i in chosen]))
        for side, (order, _) in enumerate(graphs):
            right = labels[order[chosen]] == labels[chosen][:, None]
            assert group.right[side] == pytest.approx(right.mean())


def test_the_last_block_keeps_all_of_its_neighbors(explored):
    assert explored.compute(State("before", "after", L)).sides[1].kept == 1


def test_a_model_beside_itself_shares_all(explored):
    view = explored.compute(State("after", "after", 2, selected=0))
    assert view.shared == 1 and view.near[0].shared.all()


def test_two_blocks_of_one_model(explored):
    view = explored.compute(State("after", "after", 1, right_block=3))
    assert [side.block for side in view.sides] == [1, 3]
    a, b = naive_neighbors("after", 0)[0], naive_neighbors("after", 2)[0]
    wanted = np.mean([np.isin(x, y).mean() for x, y in zip(a, b, strict=True)])
    assert view.shared == pytest.approx(wanted) == pytest.approx(view.sides[0].kept)


def test_a_view_says_in_a_line_what_it_shows(explored):
    view = explored.compute(State("before", "after", 2, selected=7, group=(1, 2)))
    own = [int(near.right.sum()) for near in view.near]
    assert repr(view) == (
        f"View(before, block 2 | after, block 2; {view.shared:.0%} of the neighbors in common; "
        f"image 7: {own[0]} of its class | {own[1]} of its class; a group of 2)"
    )


def test_compute_changes_nothing(explored):
    state = State("before", "after", 2, selected=3, group=(1, 2), colour="wrong votes")
    first, _ = explored.compute(state), explored.compute(replace(state, block=1))
    again = explored.compute(state)
    assert first.state == again.state and first.shared == again.shared
    for a, b in zip(first.sides, again.sides, strict=True):
        assert np.array_equal(a.xy, b.xy) and np.array_equal(a.colour.values, b.colour.values)


def test_colours(explored):
    images = make_images()
    colour = lambda name: explored.compute(State("before", "after", 3, colour=name)).sides  # noqa: E731
    assert colour("class")[0].colour.names == NAMES
    hue, pattern = colour("hue")[0].colour, colour("pattern")[0].colour
    assert hue.circle and hue.limits == (0.2, 0.8)
    assert np.allclose(hue.values, (images.factors["hue"] - 0.2) / 0.6, atol=1e-6)
    assert pattern.names == ("plain", "stripes", "checks", "bands")
    assert pattern.values.tolist() == images.factors["pattern"].tolist()
    for side, name in zip(colour("wrong votes"), FEATURES, strict=True):
        votes = naive_votes(*naive_neighbors(name, 2), images.labels.numpy())
        own = votes[np.arange(N), images.labels]
        assert np.allclose(side.colour.values, 1 - own, atol=1e-5)
    change = colour("neighbor change")[1].colour.values
    assert 1 - change.mean() == pytest.approx(explored.compute(State("before", "after", 3)).shared)


def test_what_is_not_known_of_a_factor_spoils_no_other_image():
    yaw, none = np.linspace(0, 90, N), np.full(N, np.nan)
    yaw[[3, 5]] = np.nan, np.inf
    images = replace(make_images(), factors={"yaw": yaw, "none": none})
    explored = prepare(images, FEATURES, k=K, progress=False)
    shown = explored.compute(State("before", "after", colour="yaw")).sides[0].colour
    assert shown.limits == (0, 90) and np.flatnonzero(np.isnan(shown.values)).tolist() == [3, 5]
    assert np.allclose(np.delete(shown.values, [3, 5]), np.delete(yaw, [3, 5]) / 90, atol=1e-6)
    shown = explored.compute(State("before", "after", colour="none")).sides[0].colour
    assert shown.values.tolist() == [0] * N and shown.names is not None


def test_pca_has_one_frame_for_all_blocks_and_models(explored):
    points = np.stack([t.xy["pca"] for t in explored.tables.values()])
    assert points.shape == (2, L, N, 2) and np.abs(points).max() == pytest.approx(1)
    # A linear map of the standardised features, one for all: distances shrink alike.
    axes = maps.shared_axes(FEATURES)
    assert torch.equal(axes["before"], axes["after"])
    assert torch.allclose(axes["before"].T @ axes["before"], torch.eye(2), atol=1e-5)
    scaled = lambda x: (x - x.mean(0)) / x.std(0, correction=0)  # noqa: E731
    last = torch.linalg.svd(scaled(FEATURES["after"][-1]), full_matrices=False).Vh[:2].T
    assert torch.allclose((last * axes["after"]).sum(0).abs(), torch.ones(2), atol=1e-4)
    flat = (scaled(FEATURES["after"][1]) @ axes["after"]).numpy()
    ours = explored.tables["after"].xy["pca"][1]
    ratio = (flat * ours).sum() / (flat * flat).sum()
    assert np.allclose(ours, ratio * flat, atol=1e-5)


def test_models_of_different_depth_stop_at_their_last_block():
    short = {"deep": FEATURES["before"], "short": FEATURES["after"][:2]}
    explored = prepare(make_images(), short, k=K, progress=False)
    view = explored.compute(State("deep", "short", 9))
    assert [side.block for side in view.sides] == [3, 2] and view.state.block == 3


def test_one_model_starts_with_its_first_and_last_block():
    state = prepare(make_images(), FEATURES["after"], k=K, progress=False).start()
    assert (state.left, state.right, state.block, state.right_block) == ("model", "model", 1, L)


def test_without_labels_nothing_speaks_of_classes():
    pixels = make_images().images
    explored = prepare(pixels, FEATURES, k=K, progress=False)
    view = explored.compute(replace(explored.start(), selected=2, group=(1, 2)))
    assert view.sides[0].accuracy is None and view.near[0].right is None
    assert view.group.right is None
    assert explored.colours == ("neighbor change", "none")


# ---------------------------------------------------------------- many images


def test_a_sample_stands_for_all_and_anybody_can_be_selected(monkeypatch, explored):
    monkeypatch.setattr(explorer_state, "ALL_NEIGHBORS", 50)
    monkeypatch.setattr(explorer_state, "SAMPLE", 20)
    monkeypatch.setattr(explorer_state, "SPARE", 8)  # so that candidates are few among 60 images
    sampled = prepare(make_images(), FEATURES, k=K, progress=False)
    assert len(sampled.sample) == 20 and not sampled.complete
    assert "neighbor change" not in sampled.colours and "wrong votes" not in sampled.colours
    for i in range(N):
        state = State("before", "after", 3, selected=i)
        for ours, full in zip(
            sampled.compute(state).near, explored.compute(state).near, strict=True
        ):
            assert ours.indices.tolist() == full.indices.tolist()
            assert np.allclose(ours.similarities, full.similarities, atol=1e-6)
    labels = make_images().labels.numpy()
    votes = naive_votes(*naive_neighbors("after", 2), labels)
    right = (votes.argmax(1) == labels)[sampled.sample]
    view = sampled.compute(State("before", "after", 3, group=tuple(range(N))))
    assert view.sides[1].accuracy == pytest.approx(right.mean())
    with pytest.raises(ValueError, match="at most 50 images, not 60: explore a part"):
        sampled.add_umap()


def test_queries_leave_themselves_out_even_beside_their_duplicates():
    graph = Graph(torch.tensor([[0, 4, 2], [3, 5, 4]]), torch.tensor([[1.0, 0.9, 0.8]] * 2))
    others = explorer_state._others(graph, [4, 1])
    assert others.indices.tolist() == [[0, 2], [3, 5]]


# ---------------------------------------------------------------- search and wrong input


def test_search_by_position_range_and_class(explored):
    assert explored.find("7") == (7,) and explored.find(" 3, 5-7 ") == (3, 5, 6, 7)
    assert explored.find("Cone") == tuple(range(2, N, 4))
    with pytest.raises(ValueError, match="did you mean 'cone'"):
        explored.find("coen")
    with pytest.raises(ValueError, match="position from 0 to 59, or a class: ball"):
        explored.find("zebra")
    for beyond in ("60", "58-61", "9-5", "0-99999999999", "1,2-99999999999"):
        with pytest.raises(ValueError, match="images 0 to 59"):
            explored.find(beyond)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"left": "befor"}, "no model 'befor', only before, after"),
        ({"layout": "umap"}, "no layout 'umap', only pca"),
        ({"colour": "yaw"}, "no colour 'yaw', only class, hue"),
        ({"selected": N}, f"no image {N}, only 0 to {N - 1}"),
        ({"group": (1, -2)}, "no image -2"),
    ],
)
def test_a_state_that_cannot_be_shown(explored, changes, message):
    with pytest.raises(ValueError, match=message):
        explored.compute(replace(explored.start(), **changes))


def test_blocks_beyond_the_ends_are_brought_back(explored):
    view = explored.compute(State("before", "after", 99, right_block=-3))
    assert (view.state.block, view.state.right_block) == (L, 1)


def bad(**changes):
    arguments = {"images": make_images(), "features": FEATURES, "k": K} | changes
    images, features = arguments.pop("images"), arguments.pop("features")
    return lambda: prepare(images, features, progress=False, **arguments)


def test_labels_may_be_words_or_ids_with_gaps():
    pixels, y = make_images().images, make_images().labels
    features = {"a": FEATURES["after"][-1:].numpy()}
    for labels, names in (
        ([NAMES[i] for i in y], sorted(NAMES)),
        ((y * 10**9).numpy(), ["0", "1000000000", "2000000000", "3000000000"]),
        (y.to(torch.uint8), ["0", "1", "2", "3"]),
    ):
        explored = prepare(pixels, features, labels=labels, k=K, progress=False)
        assert explored.classes == tuple(names)
        accuracy = prepare(pixels, features, labels=y, k=K, progress=False).tables["a"].accuracy
        assert np.array_equal(explored.tables["a"].accuracy, accuracy)
        assert explored.find(names[1]) == tuple(np.flatnonzero(explored.labels == 1).tolist())


HOLED = FEATURES["after"].clone()
HOLED[1, 17, 2] = torch.nan
UNEQUAL = [np.zeros((3, 4, 4), np.uint8)] * 2 + [np.zeros((3, 4, 6), np.uint8)]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (bad(images=make_images(59)), "'before' are of 60 images, but there are 59 images"),
        (bad(features={"a": HOLED}), "'a' hold NaN or infinity in block 2, first at image 17"),
        (bad(images=UNEQUAL), "image 0 is 3×4×4 and image 2 is 3×4×6"),
        (bad(images=torch.zeros(N, 3, 4, 4)), r"must be uint8 \[N, C, H, W\], not torch.float32"),
        (bad(images=make_images(1)), "nothing to explore in 1 images"),
        (bad(features={}), "there are no features"),
        (bad(features={"a": torch.zeros(N)}), r"'a' must be floats \[L, N, D\]"),
        (bad(labels=torch.zeros(9, dtype=torch.int64)), "60 images do not match labels"),
        (bad(labels=torch.zeros(N)), "whole numbers from 0"),
        (bad(labels=torch.arange(N) - 1), "that of image 0 is -1: leave images without a class"),
        (bad(classes=("a", "b")), "label 3 has no name among 2 classes"),
        (bad(k=N), f"k must be from 1 to {N - 1}"),
    ],
)
def test_wrong_input_is_named_in_one_sentence(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_too_many_images(monkeypatch):
    monkeypatch.setattr(explorer_state, "MOST_IMAGES", 50)
    with pytest.raises(ValueError, match="at most 50 images, not 60: take a part"):
        prepare(make_images(), FEATURES)


def test_a_list_of_equal_images_will_do():
    explored = prepare(list(make_images().images), FEATURES, k=K, progress=False)
    assert torch.equal(explored.images, make_images().images)
