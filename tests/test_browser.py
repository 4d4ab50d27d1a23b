"""The explorer in a real JupyterLab in a real Chromium, with every other machine out of reach.

Needs a Chromium or Chrome (Debian: ``apt-get install chromium``); without one the tests are
skipped. Screenshots go to ``runs/browser``.
"""

import json
from types import SimpleNamespace

import pytest
from browser import BROWSER, ROOT, SHOTS, browsing, copy_with, new_page, run_all, serving

LAST_CELL = """
import json
from dataclasses import replace

explorer.set(left="before", right="after", block=12, right_block=None, layout="umap",
             colour="class", selected=None, group=())
said = {}
for block in (12, 10):
    view = explorer.exploration.compute(replace(explorer.state, block=block, selected=17))
    said[block] = {
        "accuracy": [f"{100 * side.accuracy:.0f} %" for side in view.sides],
        "common": int(view.near[0].shared.sum()),
        "right": [int(near.right.sum()) for near in view.near],
    }
looks = {c["name"]: c["palette"] for c in explorer.widget.tables["colours"]}
print("EXPECTED " + json.dumps({"said": said, "palette": looks["class"]}))
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


def place(open_lab, i, side=0):
    """Where on the page a point of a map lies."""
    ask = "([side, i]) => document.querySelector('.refiner-explorer').explorer.at(side, i)"
    return open_lab.page.evaluate(ask, [side, i])


def test_the_notebook_runs_and_the_maps_are_shown(open_lab):
    for name, accuracy in zip(("before", "after"), open_lab.said["12"]["accuracy"], strict=True):
        says(open_lab, f"{name}, block 12")
        assert accuracy in open_lab.explorer.inner_text()
    assert open_lab.explorer.locator("canvas").count() == 2
    assert open_lab.explorer.bounding_box()["height"] <= 640
    shoot(open_lab, "1-open")


def test_a_live_widget_hides_its_static_copy(open_lab):
    """Five explorers stand in the notebook; only their copies are pictures beside a widget."""
    live = open_lab.page.locator(".refiner-explorer, img.widget-image")
    areas = open_lab.page.locator(".jp-OutputArea", has=live)
    assert areas.count() == 5
    for area in areas.all():
        copies = area.locator(".jp-OutputArea-child .jp-RenderedImage")
        assert copies.count() == 1 and not copies.first.is_visible()


def test_resting_the_mouse_on_a_point_shows_its_image(open_lab):
    x, y = place(open_lab, 17)
    open_lab.page.mouse.move(x - 40, y - 40)
    open_lab.page.mouse.move(x, y, steps=5)
    picture = open_lab.explorer.locator('.rx-tip .rx-picture[style*="data:image/png"]')
    picture.first.wait_for()
    shoot(open_lab, "2-hover")


def test_a_click_shows_the_neighbors_in_both_models(open_lab):
    open_lab.explorer.get_by_label("Find").last.fill("17")
    open_lab.page.keyboard.press("Enter")
    (before, after), common = open_lab.said["12"]["right"], open_lab.said["12"]["common"]
    says(open_lab, "Image 17", f"Right neighbors {before} → {after} of 10; {common} of 10 shared")
    inspector = open_lab.explorer.locator(".rx-inspector")
    inspector.locator('.rx-picture[style*="data:image/png"]').nth(20).wait_for()
    shoot(open_lab, "3-click")


def test_the_slider_moves_by_keyboard(open_lab):
    open_lab.explorer.get_by_role("slider").focus()
    open_lab.page.keyboard.press("ArrowLeft")
    open_lab.page.keyboard.press("ArrowLeft")
    said = open_lab.said["10"]
    says(open_lab, "before, block 10", "after, block 10", f"{said['common']} of 10 shared")
    assert all(share in open_lab.explorer.inner_text() for share in said["accuracy"])
    shoot(open_lab, "4-slider")


def test_dropdowns_are_ways_without_a_mouse(open_lab):
    open_lab.explorer.get_by_label("Colour by").select_option("hue")
    says(open_lab, "hue (turns)")
    open_lab.explorer.get_by_label("Map", exact=True).select_option("PCA")
    open_lab.explorer.get_by_label("Right block").select_option("block 12")
    says(open_lab, "after, block 12", "PCA 1 and 2")
    shoot(open_lab, "6-keyboard")


def test_the_figure_is_downloaded(open_lab):
    with open_lab.page.expect_download() as download:
        open_lab.explorer.get_by_role("button", name="Save PNG").click()
    assert download.value.path().read_bytes().startswith(b"\x89PNG")
    says(open_lab, "Saved as explorer.png")


def test_a_patch_is_hidden_by_click_and_by_keyboard(open_lab):
    page = open_lab.page
    board = page.locator(".refiner-patches[aria-label^='Patches to hide']").first
    panel = page.locator(".widget-vbox", has=board).filter(has=page.locator("img.widget-image"))
    picture = panel.last.locator("img.widget-image")

    def changes(act):
        before = picture.get_attribute("src")
        act()
        page.wait_for_function(
            "([image, before]) => image.getAttribute('src') !== before",
            arg=[picture.element_handle(), before],
        )

    board.scroll_into_view_if_needed()
    box = board.bounding_box()
    changes(lambda: page.mouse.click(box["x"] + 20, box["y"] + 20))
    changes(lambda: page.keyboard.press("Space"))
    shoot(open_lab, "7-mask")


def test_after_a_restart_a_line_says_so_and_the_pictures_return(open_lab):
    page = open_lab.page
    page.get_by_role("menuitem", name="Kernel", exact=True).click()
    page.get_by_text("Restart Kernel…", exact=True).click()
    page.locator(".jp-Dialog").get_by_role("button", name="Confirm Kernel Restart").click()
    ended = page.get_by_text("The kernel has ended: run this cell again")
    ended.nth(4).wait_for()
    areas = page.locator(".jp-OutputArea", has=page.get_by_text("The kernel has ended"))
    assert areas.count() == 5
    for area in areas.all():
        assert area.locator(".jp-OutputArea-child .jp-RenderedImage").is_visible()
    assert not open_lab.explorer.is_visible()
    shoot(open_lab, "8-restart")


def test_nothing_was_asked_of_another_machine(open_lab):
    assert open_lab.blocked == []
