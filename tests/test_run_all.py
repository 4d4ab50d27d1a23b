"""Run All for every notebook in a real JupyterLab and Chromium, as a reader would press it.

Takes as long as the course once more, so it is asked for: ``make browse``. Screenshots go to
``runs/browser``.
"""

import os

import nbformat
import pytest
from browser import BROWSER, ROOT, SHOTS, browsing, copy_with, new_page, run_all, serving

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BROKEN = ("Error displaying widget", "Error creating widget", "Javascript Error", "Loading widget")

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif("RUN_ALL" not in os.environ, reason="a quarter of an hour: make browse"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def url(tmp_path_factory):
    """JupyterLab with all notebooks, each with one more cell that says that it came to its end."""
    home = tmp_path_factory.mktemp("lab")
    for path in NOTEBOOKS:
        copy_with(home, path, f"print('THE END of {path.stem}')")
    with serving(home) as address:
        yield address


@pytest.fixture(scope="module")
def browser():
    with browsing() as running:
        yield running


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all(path, url, browser):
    blocked, errors = [], []
    page = new_page(browser, blocked)
    page.on("pageerror", lambda error: errors.append(str(error)))
    stated = nbformat.read(path, as_version=4).metadata["refiner"]["minutes_cpu"]
    try:
        run_all(page, f"{url}/lab/tree/{path.name}", "THE END of", minutes=3 + 3 * stated)
        page.wait_for_timeout(2000)  # for widgets that come after the last cell
        text = page.locator(".jp-Notebook").inner_text()
        assert not [words for words in BROKEN if words in text]
        # In a page without windowing all outputs are there: every figure has its size.
        sizes = page.eval_on_selector_all(
            ".jp-OutputArea-output img", "images => images.map(image => image.naturalWidth)"
        )
        assert sizes and min(sizes) > 0, "a figure is missing or broken"
    finally:
        page.screenshot(path=SHOTS / f"run-all-{path.stem}.png")
        page.context.close()
    assert blocked == [] and errors == []
