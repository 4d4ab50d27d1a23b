"""The explorer's widgets do what State says, without a browser; errors are seen and not lost."""

import asyncio
import csv
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pytest
import torch

import refiner
from refiner.course.execute import execute
from refiner.images.sets import ImageSet
from refiner.visuals import explorer_html

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


def shown_points(explorer, side):
    """What was sent to a map, [N, 2] in -1…1 of the axes."""
    return np.asarray(explorer.maps[side].widget.points)[:, :2]


# ---------------------------------------------------------------- controls and names agree


def test_the_first_view_is_the_last_block_of_both(explorer):
    assert explorer.slider.value == L and (explorer.left.value, explorer.right.value) == (
        "before",
        "after",
    )
    for side in (0, 1):
        wanted = explorer.view.sides[side].xy / 1.06
        assert np.allclose(shown_points(explorer, side), wanted, atol=1e-6)


def test_the_slider_moves_both_maps_and_says_the_accuracy(explorer):
    x = inputs()[1]
    for block in (1, 2, 3):
        explorer.slider.value = block
        for side, name in enumerate(("before", "after")):
            report = refiner.knn_report(x[name], inputs()[0].labels, k=K)
            words = explorer.captions[side].value
            assert f"{name}, block {block}" in words
            right = int((report.predictions[block - 1] == inputs()[0].labels).sum())
            assert f"accuracy <b>{explorer_html.percent(right / N)}</b>" in words
            xy = explorer.exploration.tables[name].xy["pca"][block - 1]
            assert np.allclose(shown_points(explorer, side), xy / 1.06, atol=1e-6)
            assert not explorer.maps[side].widget.transition_points


def test_each_control_changes_its_part_of_the_state(explorer):
    explorer.left.value = "after"
    explorer.right_block.value = 1
    explorer.colour.value = "hue"
    wanted = replace(explorer.state, left="after", right_block=1, colour="hue")
    assert explorer.state == wanted and explorer.view.sides[1].block == 1
    explorer.set(left="before", right_block=None, colour="prediction error", block=2)
    assert explorer.left.value == "before" and explorer.right_block.value == 0
    assert explorer.colour.value == "prediction error" and explorer.slider.value == 2


@pytest.mark.parametrize("side", [0, 1])
def test_a_click_on_either_map_is_select(explorer, side):
    explorer.maps[side].widget.selection = np.array([7], dtype=np.uint32)
    clicked = explorer.near.value
    assert explorer.state.selected == 7 and "Image 7" in clicked
    other = explorer.maps[1 - side].widget
    assert np.asarray(other.selection).tolist() == [7], "the other map follows"
    explorer.set(selected=None)
    explorer.select(7)
    assert explorer.near.value == clicked


def test_a_lasso_is_a_group_and_nothing_clears_it(explorer):
    explorer.maps[0].widget.selection = np.array([3, 7, 11], dtype=np.uint32)
    assert explorer.state.group == (3, 7, 11) and "3 images" in explorer.group.value
    assert "can 3" in explorer.group.value
    explorer.select(5)
    assert explorer.state.group == (3, 7, 11), "one can look at an image beside the group"
    explorer.clear.click()
    assert explorer.state.group == () and explorer.state.selected is None
    assert "Click a point" in explorer.near.value


def test_hovering_is_linked(explorer):
    left, right = (m.widget for m in explorer.maps)
    left.hovering = 9
    assert right.hovering == 9
    right.hovering = 4
    assert left.hovering == 4
    right.hovering = None
    assert left.hovering == -1


def test_a_colour_that_depends_on_the_block_follows_the_slider(explorer):
    explorer.set(colour="prediction error", block=1)
    for block in (1, 3):
        explorer.slider.value = block
        for side in (0, 1):
            sent = np.asarray(explorer.maps[side].widget.points)[:, 2]
            assert np.allclose(sent, explorer.view.sides[side].colour.values, atol=1e-6)
    explorer.colour.value = "class"
    sent = np.asarray(explorer.maps[0].widget.points)[:, 2]
    assert sent.tolist() == inputs()[0].labels.tolist()


def test_quick_steps_end_at_the_last_one_and_leave_out_what_a_browser_would_drop():
    async def steps():
        explorer = refiner.explore(*inputs(), k=K, progress=False)
        sent = []
        explorer.maps[0].widget.observe(lambda _: sent.append(shown_points(explorer, 0)), "points")
        await asyncio.sleep(1)  # the first view has come to rest
        for block in (2, 1, 2, 1):
            explorer.slider.value = block
            assert f"before, block {block}" in explorer.captions[0].value, "words do not wait"
        explorer.set(colour="prediction error")
        explorer.set(colour="class", selected=3)
        until = time.monotonic() + 20
        while explorer.maps[0]._next is not None and time.monotonic() < until:
            await asyncio.sleep(0.05)
        return explorer, sent

    explorer, sent = asyncio.run(steps())
    xy = explorer.exploration.tables["before"].xy["pca"] / 1.06
    assert len(sent) == 2, "the first at once, and the last"
    assert np.allclose(sent[0], xy[1], atol=1e-6) and np.allclose(sent[1], xy[0], atol=1e-6)
    codes = np.asarray(explorer.maps[0].widget.points)[:, 2]
    assert codes.tolist() == inputs()[0].labels.tolist()
    assert np.asarray(explorer.maps[0].widget.selection).tolist() == [3]


def test_tooltips_show_the_picture_of_the_point(explorer, monkeypatch):
    sent = []
    widget = explorer.maps[1].widget
    monkeypatch.setattr(
        type(widget), "send", lambda self, content, buffers=None: sent.append(content)
    )
    message = {"method": "custom", "content": {"type": "tooltip", "index": 6}}
    widget._handle_msg({"content": {"data": message}, "buffers": []})  # as the browser sends it
    (content,) = sent
    assert content["index"] == 6 and content["properties"] == {"image": "6", "class": "<cone>"}
    assert content["preview"] == explorer_html.thumbnail(explorer.exploration, 6)


def test_search_selects_or_groups_and_says_what_is_unknown(explorer):
    explorer.searching.value = "12"
    assert explorer.state.selected == 12
    explorer.searching.value = "ball"
    assert explorer.state.group == tuple(range(0, N, 4))
    explorer.searching.value = "bal"
    assert "did you mean &#x27;ball&#x27;" in explorer.message.value
    with pytest.raises(ValueError, match="did you mean 'ball'"):
        explorer.search("bal")
    explorer.searching.value = "3"
    assert explorer.message.value == "", "the next good step wipes the message"


# ---------------------------------------------------------------- panels


def test_the_panel_marks_class_and_agreement(explorer):
    view = explorer.select(5)
    text = explorer.near.value
    common = set(view.near[0].indices) & set(view.near[1].indices)
    assert f"{len(common)} of {K} neighbors in common" in text
    right = sum(int(near.right.sum()) for near in view.near)
    assert text.count("border:3px solid #0072B2") == right
    assert text.count("border:3px dashed") == 2 * K - right
    assert text.count("★</span>") == 2 * len(common)
    assert "<cone>" not in text and text.count("<img") == 1 + 2 * K


def test_thumbnails_are_the_images(explorer):
    import base64
    import io

    from PIL import Image

    address = explorer_html.thumbnail(explorer.exploration, 11)
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(address.split(",")[1]))))
    assert (pixels.transpose(2, 0, 1) == inputs()[0].images[11].numpy()).all()


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
    shown = [*(c.value for c in explorer.captions), explorer.near.value, explorer.group.value]
    assert "caf?" in shown[1]
    "".join([*shown, explorer.legend.value, repr(explorer.view)]).encode("utf-8")
    drawn = explorer.figure()
    drawn.canvas.draw()
    plt.close(drawn)


def test_unlabelled_images_and_one_model_can_be_explored():
    images, features = inputs()
    explorer = refiner.explore(images.images, features["after"], k=K, progress=False)
    explorer.set(selected=1, group=(1, 2, 3), colour="neighbor agreement")
    assert "accuracy" not in explorer.captions[0].value and "✓" not in explorer.near.value
    drawn = explorer.figure()
    drawn.canvas.draw()
    plt.close(drawn)


# ---------------------------------------------------------------- saving


def test_csv_holds_what_was_chosen(explorer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    explorer.to_csv.click()
    assert "nothing is chosen" in explorer.message.value and not list(tmp_path.iterdir())
    view = explorer.set(selected=5, group=(8, 9))
    explorer.to_csv.click()
    assert "saved explorer.csv" in explorer.message.value
    rows = list(csv.DictReader((tmp_path / "explorer.csv").open(encoding="utf-8")))
    how = {int(row["image"]): row["chosen"] for row in rows}
    near = [set(x.indices.tolist()) for x in view.near]
    wanted = {j: "near on the left" for j in near[0]} | {j: "near on the right" for j in near[1]}
    wanted |= dict.fromkeys(near[0] & near[1], "near on both sides")
    assert how == wanted | {8: "group", 9: "group", 5: "selected"}
    row = next(row for row in rows if row["image"] == "9")
    assert row["class"] == "cube" and float(row["hue"]) == pytest.approx(9 / 39, abs=1e-5)
    places = [float(row[c]) for c in ("left_x", "left_y", "right_x", "right_y")]
    assert np.allclose(places, [*view.sides[0].xy[9], *view.sides[1].xy[9]], atol=1e-5)
    explorer.to_png.click()
    assert (tmp_path / "explorer.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------- UMAP on request


def test_umap_comes_by_itself_while_pca_is_shown(explorer, monkeypatch):
    made = {name: np.zeros((L, N, 2), np.float32) for name in ("before", "after")}

    def slow(features, graphs, start, *, report, **options):
        assert explorer.layout.value == explorer.state.layout == "pca"
        report(3, 6, 125.0)
        assert "2:05 left" in explorer.progress.description and explorer.progress.value == 3
        return made

    monkeypatch.setattr("refiner.visuals.maps.umap_maps", slow)
    explorer.layout.value = "umap"
    explorer._thread.join(30)
    assert explorer.state.layout == explorer.layout.value == "umap" and not explorer.message.value
    assert np.array_equal(explorer.view.sides[0].xy, made["before"][-1])


def test_umap_that_fails_is_shown(explorer, monkeypatch):
    def broken(*args, **options):
        raise RuntimeError("no memory")

    monkeypatch.setattr("refiner.visuals.maps.umap_maps", broken)
    heard = []
    monkeypatch.setattr("threading.excepthook", lambda args: heard.append(args.exc_value))
    explorer.layout.value = "umap"
    explorer._thread.join(30)
    assert "RuntimeError: no memory" in explorer.message.value and len(heard) == 1
    assert explorer.layout.value == "pca" and explorer.progress.layout.display == "none"
    with pytest.raises(RuntimeError, match="no memory"):
        explorer.set(layout="umap")


# ---------------------------------------------------------------- errors


def test_what_cannot_be_shown_is_said_and_changes_nothing(explorer):
    before = explorer.state
    with pytest.raises(ValueError, match="no image 99"):
        explorer.select(99)
    assert "there is no image 99" in explorer.message.value and explorer.state == before
    explorer.select(1)
    assert explorer.message.value == ""


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
Exploration.compute = broken
"""
SAYS = "\nfinally:\n    print(explorer.message.value)"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A notebook whose explorer breaks: where ipywidgets swallows it, then where it raises."""
    cells = [
        SHOWN,
        BREAK,
        f"try:\n    explorer.clear.click(){SAYS}",
        f"try:\n    explorer.slider.value = 2{SAYS}",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells])
    return execute(notebook, cwd=tmp_path_factory.mktemp("run"), timeout=120)


def test_an_error_in_a_callback_fails_the_run_and_is_shown(run):
    assert [problem.cell for problem in run.problems] == [3, 4]
    for problem, cell, block in zip(run.problems, run.notebook.cells[2:], (1, 2), strict=True):
        assert f"no block {block} today" in problem.error
        said = "".join(o.get("text", "") for o in cell.outputs)
        assert 'role="alert"' in said and f"no block {block} today" in said


def test_a_notebook_keeps_the_figure_and_no_widget_state(run):
    kinds = [set(o.data) for o in run.notebook.cells[0].outputs]
    assert {"text/plain"} in kinds and any("image/png" in kind for kind in kinds)
    assert "jupyter.widget" not in json.dumps(run.notebook)


# ---------------------------------------------------------------- start-up


def test_a_missing_package_is_named(monkeypatch):
    """That the library can be imported without it is seen by test_one_gpu.py."""
    monkeypatch.setitem(sys.modules, "jscatter", None)
    message = r"needs the package jscatter: pip install 'mim-refiner-lab\[lab\]'"
    with pytest.raises(ModuleNotFoundError, match=message):
        refiner.explore(torch.zeros(9, 3, 4, 4).byte(), torch.randn(2, 9, 4), k=2)
