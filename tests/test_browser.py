"""The explorer in a real JupyterLab in a real Chromium, with every other machine out of reach.

Needs a Chromium or Chrome (Debian: ``apt-get install chromium``); without one the tests are
skipped. Screenshots go to ``runs/browser``.
"""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from urllib.parse import urlparse

import nbformat
import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SHOTS = ROOT / "runs" / "browser"
MINUTES = 60_000  # in the milliseconds of Playwright
REACH = 1.06  # of a map's axes, as in refiner.explorer
SETTINGS = {
    # Otherwise cells outside of the window, and the explorer in them, leave the page.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}
LAST_CELL = """
import json
import numpy as np
from dataclasses import replace
from refiner import panels

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
colours = [panels.palette(16)[c] for c in explorer.exploration.labels]
print("EXPECTED " + json.dumps({"alone": alone, "said": said, "colours": colours}))
"""

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    """JupyterLab with notebook 08 and one more cell, which says what is to be expected."""
    home = tmp_path_factory.mktemp("lab")
    work = home / "work"
    work.mkdir()
    notebook = nbformat.read(ROOT / "notebooks" / "08_explore.ipynb", as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(LAST_CELL))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, work / "explore.ipynb")
    for name, content in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    folders = {"IPYTHONDIR": "ipython", "JUPYTER_CONFIG_DIR": "config", "JUPYTER_DATA_DIR": "data",
               "JUPYTER_RUNTIME_DIR": "runtime", "JUPYTERLAB_SETTINGS_DIR": "settings",
               "JUPYTERLAB_WORKSPACES_DIR": "workspaces"}  # fmt: skip
    env = os.environ | {key: str(home / name) for key, name in folders.items()}
    env |= {"PYTHONPATH": str(ROOT), "JUPYTER_PREFER_ENV_PATH": "1"}
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="),
        f"--ServerApp.root_dir={work}",
    ]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(command, env=env, cwd=work, stdout=log, stderr=subprocess.STDOUT)
        try:
            wait_for(url + "/api/status", server, home / "log.txt")
            yield url + "/lab/tree/explore.ipynb"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def wait_for(url, server, log):
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@pytest.fixture(scope="module")
def open_lab(lab):
    """The page after running all cells, what was expected, and addresses that were blocked."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    SHOTS.mkdir(parents=True, exist_ok=True)
    blocked = []

    def only_local(route):
        if urlparse(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            blocked.append(route.request.url)
            route.abort()

    # No graphics card is needed: WebGL is drawn in software. Root has no sandbox.
    flags = ["--no-sandbox", "--use-gl=angle", "--use-angle=swiftshader",
             "--enable-unsafe-swiftshader", "--ignore-gpu-blocklist"]  # fmt: skip
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        try:
            context = browser.new_context(viewport={"width": 1500, "height": 1400})
            context.set_default_timeout(2 * MINUTES)
            context.route("**/*", only_local)
            page = context.new_page()
            page.goto(lab)
            page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
            page.locator(".jp-Notebook .jp-Cell").first.click()
            page.get_by_role("menuitem", name="Run", exact=True).click()
            page.get_by_text("Run All Cells", exact=True).click()
            done = page.locator(".jp-OutputArea-output pre", has_text="EXPECTED ")
            failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
            done.or_(failed).first.wait_for(timeout=5 * MINUTES)
            assert failed.count() == 0, failed.first.inner_text()
            expected = json.loads(done.inner_text().removeprefix("EXPECTED "))
            explorer = page.locator(".refiner-explorer")
            explorer.locator("canvas").first.wait_for()
            explorer.scroll_into_view_if_needed()
            yield SimpleNamespace(page=page, explorer=explorer, blocked=blocked, **expected)
        except Exception:
            page.screenshot(path=SHOTS / "failed.png")
            raise
        finally:
            browser.close()


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
    says(open_lab, "before, block 10", "after, block 10",
         f"{said['common']} of 10 neighbors in common")  # fmt: skip
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
