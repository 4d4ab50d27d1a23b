"""What the explorer's page is given and asks, without a browser; errors are seen and not lost."""

import base64
import csv
import io
import json
import os
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch
from eyes import seen
from matplotlib.colors import to_hex
from PIL import Image

import refiner
from refiner.course.execute import execute
from refiner.images.sets import ImageSet
from refiner.visuals import explorer_page
from refiner.visuals.style import class_styles

ROOT = Path(__file__).parent.parent
N, L, K = 40, 3, 4
NAMES = ("ball", "cube", "<cone>", "can")


def inputs():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(N) % 4
    pixels = torch.randint(256, (N, 3, 8, 8), generator=generator, dtype=torch.uint8)
    images = ImageSet(pixels, labels, NAMES, {"hue": np.linspace(0, 1, N)})
    centres = torch.randn(4, 6, generator=generator)[labels]
    features = {
        name: torch.randn(L, N, 6, generator=generator) + strength * centres
        for name, strength in (("before", 1), ("after", 3))
    }
    return images, features


@pytest.fixture
def explorer():
    return refiner.explore(*inputs(), k=K, progress=False)


def sent(explorer):
    """The tables that the page was given."""
    return explorer.widget.tables


def send(explorer, **changes):
    """Changes the state as the page does."""
    explorer.widget.state = {**explorer.widget.state, **changes}


# ---------------------------------------------------------------- the page and the names agree


def test_the_first_view_is_the_last_block_of_both(explorer):
    shown = explorer.widget.state
    assert (shown["left"], shown["right"], shown["block"]) == ("before", "after", L)


@pytest.mark.parametrize("layout", ["pca", "umap"])
def test_the_page_holds_every_block_in_its_own_range(explorer, layout):
    tables = explorer.exploration.tables
    generator = np.random.default_rng(0)
    for table in tables.values():
        table.xy["umap"] = generator.normal(size=(L, N, 2)).astype(np.float32)
    for model in explorer_page.tables(explorer.exploration)["models"]:
        xy = np.frombuffer(model["xy"][layout], np.int16).reshape(L, N, 2) / 32767
        for block, own in enumerate(tables[model["name"]].xy[layout]):
            low, high = own.min(0), own.max(0)
            wanted = (own - (low + high) / 2) / ((high - low).max() / 2)
            assert np.allclose(xy[block], wanted, atol=1e-4)


def test_the_page_holds_the_neighbors_accuracies_and_votes(explorer):
    for model in sent(explorer)["models"]:
        table = explorer.exploration.tables[model["name"]]
        near = np.frombuffer(model["near"], np.uint16).reshape(L, N, K)
        assert (near == table.graph.indices[:, :, :K].numpy()).all()
        report = refiner.knn_report(inputs()[1][model["name"]], inputs()[0].labels, k=K)
        assert model["accuracy"] == pytest.approx(report.accuracy.tolist())
        wrong = np.frombuffer(model["wrong"], np.uint8).reshape(L, N) / 254
        assert np.allclose(wrong, 1 - table.own_votes, atol=1 / 254)


@pytest.mark.parametrize(
    "labels",
    [[0, 1, 2], [1, 2], [2], [0, 2]],
    ids=["all", "without the first", "one", "without the middle"],
)
def test_each_label_has_the_colour_of_its_name_although_others_are_absent(labels):
    images, features = inputs()
    chosen = torch.tensor(labels)[torch.arange(N) % len(labels)]
    pattern = {"pattern": chosen.numpy().astype(float)}
    images = ImageSet(images.images, chosen, ("a", "b", "c"), pattern)
    explorer = refiner.explore(images, features, k=K, progress=False)
    looks = class_styles(24)
    for colour in sent(explorer)["colours"][:2]:
        codes = np.frombuffer(colour["codes"], np.uint16)
        assert codes.tolist() == chosen.tolist()
        for code in labels:
            shade, marker = looks[code]
            assert colour["palette"][code] == shade
            assert colour["marks"][code] == explorer_page.SHAPES[marker]
        explorer.set(colour=colour["name"])
        drawn = explorer.figure()
        points = drawn.subfigs[0].axes[0].collections[: len(colour["names"])]
        for code, some in enumerate(points):
            assert len(some.get_offsets()) == labels.count(code) * (codes == code).sum()
            assert to_hex(some.get_facecolor()[0]) == looks[code][0].lower()
        plt.close(drawn)


def test_numbers_that_are_not_known_are_gray_and_units_are_named():
    images, features = inputs()
    yaw = np.linspace(0, 90, N)
    yaw[3] = np.nan
    images = replace(images, factors={"yaw": yaw, "hue": np.linspace(0, 1, N)})
    colours = sent(refiner.explore(images, features, k=K, progress=False))["colours"]
    shown = {colour["name"]: colour for colour in colours}
    codes = np.frombuffer(shown["yaw"]["codes"], np.uint16)
    assert codes[3] == 255 and shown["yaw"]["palette"][255] == "#999999"
    assert (codes[0], codes[-1]) == (0, 254) and shown["yaw"]["limits"] == ["0", "90"]
    assert shown["yaw"]["label"] == "yaw (degrees)" and shown["hue"]["label"] == "hue (turns)"
    assert len(shown["hue"]["palette"]) == 256


@pytest.mark.parametrize("vision", ["normal", "protan", "deutan"])
@pytest.mark.parametrize("n", [2, 16, 42])
def test_classes_differ_in_mark_or_well_in_colour_for_every_vision(vision, n):
    images, features = inputs()
    names = tuple(f"class {i}" for i in range(n))
    images = ImageSet(images.images, torch.arange(N) % n, names)
    explorer = refiner.explore(images, features, k=K, progress=False)
    colour = sent(explorer)["colours"][0]
    lab = seen(colour["palette"], vision)
    apart = np.linalg.norm(lab[:, None] - lab[None], axis=-1)
    marks = np.array(colour["marks"])
    pairs = (marks[:, None] == marks[None]) & ~np.eye(n, dtype=bool)
    assert not pairs.any() or apart[pairs].min() > 15


def test_what_the_page_says_is_the_state(explorer):
    send(explorer, left="after", right_block=1, colour="hue", selected=7, group=[1, 2])
    wanted = replace(explorer.state, left="after", right_block=1, colour="hue", selected=7)
    assert explorer.state == replace(wanted, group=(1, 2)) and explorer.view.sides[1].block == 1
    clicked = explorer.view.near[0].indices
    explorer.set(selected=None)
    assert explorer.widget.state["selected"] is None
    assert (explorer.select(7).near[0].indices == clicked).all()


def test_a_search_takes_the_place_of_what_was_chosen(explorer):
    explorer.select(12)
    view = explorer.search("ball")
    assert view.state.group == tuple(range(0, N, 4)) and view.state.selected is None
    explorer.set(selected=3)
    assert explorer.state.group == view.state.group, "one can look at an image beside the group"
    view = explorer.search("12")
    assert view.state.selected == 12 and view.state.group == ()
    assert explorer.lasso([3, 7, 11]).state.selected is None
    view = explorer.search(" ")
    assert view.state.selected is None and view.state.group == ()
    with pytest.raises(ValueError, match="did you mean 'ball'"):
        explorer.search("bal")
    assert "did you mean 'ball'" in explorer.widget.message[0] and explorer.widget.message[1]
    explorer.search("3")
    assert explorer.widget.message == ["", False], "the next good step wipes the message"


def test_the_selection_is_public_and_observable(explorer):
    heard = []
    explorer.observe(heard.append)
    assert explorer.selection is None and explorer.indices == ()
    explorer.lasso([9, 4])
    send(explorer, selected=20)
    explorer.set(block=1)
    assert explorer.indices == (4, 9, 20) and [len(x) for x in heard] == [2, 3]
    chosen, images = explorer.selection, inputs()[0]
    assert torch.equal(chosen.images, images.images[[4, 9, 20]]) and chosen.classes == NAMES
    assert chosen.labels.tolist() == images.labels[[4, 9, 20]].tolist()
    assert chosen.factors["hue"].tolist() == images.factors["hue"][[4, 9, 20]].tolist()


def answers(explorer, monkeypatch, **message):
    """What the kernel sends when the page asks."""
    found = []
    monkeypatch.setattr(
        type(explorer.widget), "send", lambda self, x, buffers=None: found.append(x)
    )
    explorer.widget._handle_custom_msg(message, [])
    return found[0]


def test_pictures_and_rare_neighbors_come_when_the_page_asks(explorer, monkeypatch):
    sent = answers(explorer, monkeypatch, pictures=[6, 11])["pictures"]
    assert list(sent) == [6, 11]
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(sent[11].split(",")[1]))))
    assert (pixels.transpose(2, 0, 1) == inputs()[0].images[11].numpy()).all()
    found = answers(explorer, monkeypatch, near=["after", 1, 5])
    wanted = explorer.exploration.tables["after"].graph.indices[1, 5, :K]
    assert found == {"near": ["after", 1, 5], "ids": wanted.tolist()}


def test_a_figure_is_drawn_in_every_state(explorer):
    for changes in (
        {},
        {"selected": 3},
        {"colour": "hue", "group": (1, 2)},
        {"right": "before"},
        {"colour": "none", "block": 1},
    ):
        explorer.set(**changes)
        drawn = explorer.figure()
        drawn.canvas.draw()
        titles = [ax.get_title() for part in drawn.subfigs for ax in part.axes]
        assert f"before, block {explorer.state.block}" in titles
        plt.close(drawn)


def test_names_that_are_no_formulas_or_no_utf_8_are_shown():
    images, features = inputs()
    odd = os.fsdecode(b"caf\xe9")
    images = replace(images, classes=(r"a$\frac$", "5 $ or $ 6", odd, "can"))
    renamed = {r"x$\frac$": features["before"], odd: features["after"]}
    explorer = refiner.explore(images, renamed, k=K, progress=False)
    explorer.set(selected=1, group=(1, 2, 3))
    assert [m["name"] for m in sent(explorer)["models"]] == [r"x$\frac$", "caf?"]
    assert sent(explorer)["classes"][2] == "caf?"
    repr(explorer.view).encode("utf-8")
    drawn = explorer.figure()
    drawn.canvas.draw()
    plt.close(drawn)


def test_unlabelled_images_and_one_model_can_be_explored():
    images, features = inputs()
    explorer = refiner.explore(images.images, features["after"], k=K, progress=False)
    explorer.set(selected=1, group=(1, 2, 3), colour="neighbor change")
    assert [m["accuracy"] for m in sent(explorer)["models"]] == [None]
    assert [c["name"] for c in sent(explorer)["colours"]] == ["neighbor change", "none"]
    drawn = explorer.figure()
    drawn.canvas.draw()
    plt.close(drawn)


# ---------------------------------------------------------------- saving


def test_csv_holds_what_was_chosen(explorer, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="nothing is chosen"):
        explorer.save_csv(tmp_path / "none.csv")
    assert not list(tmp_path.iterdir())
    view = explorer.set(selected=5, group=(8, 9))
    path = explorer.save_csv(tmp_path / "explorer.csv")
    rows = list(csv.DictReader(path.open(encoding="utf-8")))
    how = {int(row["image"]): row["chosen"] for row in rows}
    near = [set(x.indices.tolist()) for x in view.near]
    wanted = {j: "near on the left" for j in near[0]} | {j: "near on the right" for j in near[1]}
    wanted |= dict.fromkeys(near[0] & near[1], "near on both sides")
    assert how == wanted | {8: "group", 9: "group", 5: "selected"}
    row = next(row for row in rows if row["image"] == "9")
    assert row["class"] == "cube" and float(row["hue"]) == pytest.approx(9 / 39, abs=1e-5)
    places = [float(row[c]) for c in ("left_x", "left_y", "right_x", "right_y")]
    assert np.allclose(places, [*view.sides[0].xy[9], *view.sides[1].xy[9]], atol=1e-5)
    download = answers(explorer, monkeypatch, save="csv")
    assert download["file"] == "explorer.csv"
    assert base64.b64decode(download["address"].split(",")[1]) == path.read_bytes()
    download = answers(explorer, monkeypatch, save="png")
    assert base64.b64decode(download["address"].split(",")[1]).startswith(b"\x89PNG")


@pytest.mark.parametrize("save", ["save_csv", "save_png", "to_html", "to_parquet"])
def test_nothing_is_written_over(explorer, tmp_path, save):
    explorer.select(1)
    path = getattr(explorer, save)(tmp_path / "mine")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="mine is there already"):
        getattr(explorer, save)(path)
    assert before and path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_the_parquet_file_has_the_columns_of_embedding_atlas(explorer, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    explorer.set(block=2)
    rows = parquet.read_table(explorer.to_parquet(tmp_path / "e.parquet")).to_pylist()
    side = explorer.view.sides[1]
    graph = explorer.exploration.tables["after"].graph
    for i, row in enumerate(rows):
        assert (row["x"], row["y"]) == tuple(side.xy[i].tolist())
        assert row["neighbors"]["ids"] == graph.indices[1, i, :K].tolist()
        cosines = 1 - np.asarray(row["neighbors"]["distances"])
        assert np.allclose(cosines, graph.similarities[1, i, :K], atol=1e-6)
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])))
        assert (pixels.transpose(2, 0, 1) == inputs()[0].images[i].numpy()).all()
    assert rows[1]["class"] == "cube" and rows[-1]["hue"] == 1


def test_a_file_of_too_many_images_is_refused(explorer, tmp_path, monkeypatch):
    monkeypatch.setattr(explorer_page, "MOST_IN_FILE", N - 1)
    with pytest.raises(ValueError, match=f"at most {N - 1} images, not {N}"):
        explorer.to_html(tmp_path / "e.html")
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- UMAP on request


def test_umap_comes_by_itself_while_pca_is_shown(explorer, monkeypatch):
    generator = np.random.default_rng(0)
    made = {name: generator.normal(size=(L, N, 2)) for name in ("before", "after")}

    def slow(features, graphs, start, *, report, **options):
        assert explorer.state.layout == "pca"
        report(3, 6, 125.0)
        assert "3 of 6 maps, 2:05 left" in explorer.widget.message[0]
        return made

    monkeypatch.setattr("refiner.visuals.maps.umap_maps", slow)
    send(explorer, layout="umap")
    explorer._thread.join(30)
    assert explorer.state.layout == explorer.widget.state["layout"] == "umap"
    assert not explorer.widget.message[0] and "umap" in sent(explorer)["models"][0]["xy"]
    assert np.array_equal(explorer.view.sides[0].xy, made["before"][-1])


def test_umap_that_fails_is_shown(explorer, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("refiner.visuals.maps.umap_maps", broken)
    heard = []
    monkeypatch.setattr("threading.excepthook", lambda args: heard.append(args.exc_value))
    send(explorer, layout="umap")
    explorer._thread.join(30)
    assert explorer.widget.message == ["RuntimeError: no memory", True] and len(heard) == 1
    assert explorer.state.layout == "pca"
    with pytest.raises(RuntimeError, match="no memory"):
        explorer.set(layout="umap")


# ---------------------------------------------------------------- errors


def test_what_cannot_be_shown_is_said_and_changes_nothing(explorer):
    before = explorer.state
    with pytest.raises(ValueError, match="no image 99"):
        explorer.select(99)
    assert "there is no image 99" in explorer.widget.message[0] and explorer.state == before
    explorer.select(1)
    assert explorer.widget.message[0] == ""


def test_an_unknown_layout_is_refused_before_anything_is_computed():
    with pytest.raises(ValueError, match="'pca' or 'umap', not 'tsne'"):
        refiner.explore(*inputs(), layout="tsne")


SHOWN = """
import torch, refiner
from refiner.visuals.explorer_state import Exploration
images = torch.zeros(20, 3, 4, 4, dtype=torch.uint8)
explorer = refiner.explore(images, {"a": torch.randn(3, 20, 4)}, k=2, layout="pca")
explorer
"""
BREAK = """
def broken(self, state):
    raise KeyError(f"no block {state.block} today")
def silent(self, at, i):
    raise KeyError("no block 3 today")
Exploration.compute, Exploration.neighbors_of = broken, silent
"""
CLICK = "explorer.widget._handle_custom_msg({'near': ['a', 0, 1]}, [])"
SAYS = "\nfinally:\n    print(explorer.widget.message[0])"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A notebook whose explorer breaks: where ipywidgets swallows it, then where it raises."""
    cells = [
        SHOWN,
        BREAK,
        f"try:\n    {CLICK}{SAYS}",
        f"try:\n    explorer.set(block=2){SAYS}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    return execute(notebook, cwd=tmp_path_factory.mktemp("run"), timeout=120)


def test_an_error_in_a_callback_fails_the_run_and_is_shown(run):
    assert [problem.cell for problem in run.problems] == [3, 4]
    for problem, cell, block in zip(run.problems, run.notebook.cells[2:], (3, 2), strict=True):
        assert f"no block {block} today" in problem.error
        said = "".join(o.get("text", "") for o in cell.outputs)
        assert f"no block {block} today" in said


def test_a_notebook_keeps_the_figure_and_no_widget_state(run):
    kinds = [set(o.data) for o in run.notebook.cells[0].outputs]
    assert {"text/plain"} in kinds and any("image/png" in kind for kind in kinds)
    assert "jupyter.widget" not in json.dumps(run.notebook)


# ---------------------------------------------------------------- start-up


def test_a_missing_package_is_named(monkeypatch):
    """That the library can be imported without it is seen by test_one_gpu.py."""
    monkeypatch.setitem(sys.modules, "anywidget", None)
    message = r"needs the package anywidget: pip install 'mim-refiner-lab\[lab\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        refiner.explore(torch.zeros(9, 3, 4, 4).byte(), torch.randn(2, 9, 4), k=2)
