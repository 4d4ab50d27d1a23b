"""The explorer in a real JupyterLab in a real Chromium, with every other machine out of reach.

Needs a Chromium or Chrome (Debian: ``apt-get install chromium``); without one the tests are
skipped. Screenshots go to ``runs/browser``.
"""

import json
from types import SimpleNamespace

import numpy as np
import pytest
from browser import BROWSER, ROOT, SHOTS, browsing, copy_with, new_page, run_all, serving
from PIL import Image

REACH = 1.06  # of a map's axes, as in refiner.visuals.explorer
LAST_CELL = """
import json
import numpy as np
from dataclasses import replace
from refiner.visuals import explorer_html

explorer.set(left="before", right="after", block=12, right_block=None, layout="umap",
             colour="class", selected=None, group=())


def apart_of(xy):
    apart = ((xy[:, None] - xy[None]) ** 2).sum(-1)
    np.fill_diagonal(apart, np.inf)
    return np.argsort(-apart.min(1))[:8].tolist()


alone = apart_of(explorer.view.sides[0].xy)[0]
said = {}
for block in (12, 10):
    view = explorer.exploration.compute(replace(explorer.state, block=block, selected=alone))
    said[block] = {
        "accuracy": [f"{100 * side.accuracy:.0f} %" for side in view.sides],
        "common": int(view.near[0].shared.sum()),
        "right": [int(near.right.sum()) for near in view.near],
        "xy": view.sides[0].xy.round(4).tolist(),
        "alone": apart_of(view.sides[0].xy),
    }
colours = [explorer_html.palette(16)[c] for c in explorer.exploration.labels]
print("EXPECTED " + json.dumps({"alone": alone, "said": said, "colours": colours}))
"""

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab with notebook 08 and one more cell, which says what is to be expected."""
    home = tmp_path_factory.mktemp("lab")
    copy_with(home, ROOT / "notebooks" / "08_explore.ipynb", LAST_CELL)
    with serving(home) as url:
        yield f"{url}/lab/tree/08_explore.ipynb"


@pytest.fixture(scope="module")
def open_lab(lab):
    """The page after running all cells, what was expected, and addresses that were blocked."""
    blocked = []
    with browsing() as browser:
        page = new_page(browser, blocked)
        try:
            said = run_all(page, lab, "EXPECTED ", minutes=5)
            expected = json.loads(said.removeprefix("EXPECTED "))
            explorer = page.locator(".refiner-explorer")
            explorer.locator("canvas").first.wait_for()
            explorer.scroll_into_view_if_needed()
            yield SimpleNamespace(page=page, explorer=explorer, blocked=blocked, **expected)
        except Exception:
            page.screenshot(path=SHOTS / "failed.png")
            raise


def shoot(open_lab, name):
    open_lab.page.wait_for_timeout(800)  # for the eye only: points have come to rest
    open_lab.page.screenshot(path=SHOTS / f"{name}.png")


def says(open_lab, *words):
    """Waits until the explorer says all of it."""
    for text in words:
        open_lab.explorer.get_by_text(text).first.wait_for()


def place(open_lab, x, y, side=0):
    """Where on the page a point of a map lies; each map has two canvases."""
    box = open_lab.explorer.locator("canvas").nth(2 * side).bounding_box()
    middle = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2
    unit = box["height"] / 2 / REACH
    return middle[0] + x * unit, middle[1] - y * unit


def points(open_lab, block):
    return np.asarray(open_lab.said[str(block)]["xy"])


def click_until_it_says(open_lab, where, text):
    """Clicks again while points may still be moving; fails if they never come to rest there."""
    said = open_lab.explorer.get_by_text(text).first
    for _ in range(10):
        open_lab.page.mouse.click(*where)
        try:
            return said.wait_for(timeout=3000)
        except Exception:
            open_lab.page.mouse.move(where[0] - 30, where[1] - 30)
    said.wait_for(timeout=1000)


def test_the_notebook_runs_and_the_maps_are_shown(open_lab):
    for name, accuracy in zip(("before", "after"), open_lab.said["12"]["accuracy"], strict=True):
        says(open_lab, f"{name}, block 12")
        assert accuracy in open_lab.explorer.inner_text()
    assert open_lab.explorer.locator("canvas").count() == 4
    shoot(open_lab, "1-open")
    picture = np.asarray(Image.open(SHOTS / "1-open.png").convert("RGB")) / 255
    for i in open_lab.said["12"]["alone"]:  # points are drawn nearly opaque
        x, y = place(open_lab, *points(open_lab, 12)[i])
        seen, wanted = picture[round(y), round(x)], np.asarray(open_lab.colours[i])
        assert np.abs(seen - (0.8 * wanted + 0.2)).max() < 0.12, f"image {i} has a wrong colour"


def test_resting_the_mouse_on_a_point_shows_its_image(open_lab):
    x, y = place(open_lab, *points(open_lab, 12)[open_lab.alone])
    open_lab.page.mouse.move(x - 40, y - 40)
    open_lab.page.mouse.move(x, y, steps=5)
    open_lab.explorer.locator('div[style*="data:image/png"]').first.wait_for()
    assert str(open_lab.alone) in open_lab.explorer.inner_text()
    shoot(open_lab, "2-hover")


def test_a_click_shows_the_neighbors_in_both_models(open_lab):
    open_lab.page.mouse.click(*place(open_lab, *points(open_lab, 12)[open_lab.alone]))
    said = open_lab.said["12"]
    says(open_lab, f"Image {open_lab.alone},", f"{said['common']} of 10 neighbors in common")
    text = open_lab.explorer.inner_text()
    for right in said["right"]:
        assert f"{right} of 10 of its class" in text
    assert open_lab.explorer.locator("img").count() == 21
    shoot(open_lab, "3-click")


def test_the_slider_moves_by_keyboard(open_lab):
    slider = open_lab.explorer.get_by_role("slider").first
    slider.focus()
    open_lab.page.keyboard.press("ArrowLeft")
    open_lab.page.keyboard.press("ArrowLeft")
    said = open_lab.said["10"]
    says(
        open_lab,
        "before, block 10",
        "after, block 10",
        f"{said['common']} of 10 neighbors in common",
    )
    assert all(share in open_lab.explorer.inner_text() for share in said["accuracy"])
    shoot(open_lab, "4-slider")
    # The maps have arrived there, too: a click where an image lies in block 10 finds it.
    i = next(i for i in said["alone"] if i != open_lab.alone)
    click_until_it_says(open_lab, place(open_lab, *points(open_lab, 10)[i]), f"Image {i},")


def test_a_lasso_makes_a_group(open_lab):
    xy = points(open_lab, 10)
    low, high = np.quantile(xy[:, 0], [0.3, 0.9]), np.quantile(xy[:, 1], [0.2, 0.8])
    inside = ((xy > [low[0], high[0]]) & (xy < [low[1], high[1]])).all(1).sum()
    corners = [(low[0], high[0]), (low[1], high[0]), (low[1], high[1]), (low[0], high[1])]
    open_lab.explorer.locator('button[title="Activate lasso selection"]').first.click()
    mouse = open_lab.page.mouse
    mouse.move(*place(open_lab, *corners[0]))
    mouse.down()
    for corner in [*corners[1:], corners[0]]:
        mouse.move(*place(open_lab, *corner), steps=12)
    mouse.up()
    says(open_lab, "neighbors in common left and right")
    title = open_lab.explorer.get_by_text("images", exact=False).locator("visible=true")
    counts = [t.split(" ")[0] for t in title.all_inner_texts() if t.split(" ")[0].isdigit()]
    found = int(counts[0])
    assert abs(found - inside) <= max(3, 0.03 * inside), f"{found} images, {inside} lie inside"
    shoot(open_lab, "5-lasso")


def test_search_and_dropdowns_are_ways_without_a_mouse(open_lab):
    page, find = open_lab.page, open_lab.explorer.get_by_label("find")
    find.fill("cone")
    page.keyboard.press("Enter")
    says(open_lab, "64 images")
    find.fill("zebra")
    page.keyboard.press("Enter")
    says(open_lab, "nothing is called 'zebra'")
    open_lab.explorer.get_by_label("colour by").select_option("hue")
    says(open_lab, "0.998")
    open_lab.explorer.get_by_label("map").select_option("PCA")
    open_lab.explorer.get_by_label("right block").select_option("block 12")
    says(open_lab, "after, block 12")
    shoot(open_lab, "6-keyboard")


def test_a_patch_is_hidden_by_keyboard(open_lab):
    page = open_lab.page
    patch = page.locator('button[title="hide patch 27"]').first
    panel = page.locator(".widget-vbox", has=patch).filter(has=page.locator("img.widget-image"))
    picture = panel.last.locator("img.widget-image")
    before = picture.get_attribute("src")
    patch.focus()
    page.keyboard.press("Space")
    page.wait_for_function(
        "([image, before]) => image.getAttribute('src') !== before",
        arg=[picture.element_handle(), before],
    )
    shoot(open_lab, "7-mask")


def test_nothing_was_asked_of_another_machine(open_lab):
    assert open_lab.blocked == []
