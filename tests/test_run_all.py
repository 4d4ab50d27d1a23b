"""Run All for every notebook in a real JupyterLab and Chromium, as a reader would press it.

Once as the notebooks come, once with every exercise solved. Takes as long as the course twice more,
so it is asked for: ``make browse``. Screenshots go to
``runs/browser``.
"""

import os
from types import SimpleNamespace

import nbformat
import pytest
from browser import BROWSER, ROOT, SHOTS, browsing, copy_with, new_page, run_all, serving
from solutions import solutions_of

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
BROKEN = ("Error displaying widget", "Error creating widget", "Javascript Error", "Loading widget")

pytestmark = [
    pytest.mark.notebooks,
    pytest.mark.skipif("RUN_ALL" not in os.environ, reason="half an hour: make browse"),
    pytest.mark.skipif(BROWSER is None, reason="no Chromium: apt-get install chromium"),
]


@pytest.fixture(scope="module", params=["unsolved", "solved"])
def lab(request, tmp_path_factory):
    """JupyterLab with all notebooks, each with one more cell that says that it came to its end."""
    home = tmp_path_factory.mktemp("lab")
    solved = request.param == "solved"
    for path in NOTEBOOKS:
        copy_with(home, path, f"print('THE END of {path.stem}')", solved=solved)
    with serving(home) as address:
        yield SimpleNamespace(url=f"{address}/lab/workspaces", solved=solved)


@pytest.fixture(scope="module")
def browser():
    with browsing() as running:
        yield running


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_run_all(path, lab, browser):
    blocked, errors = [], []
    page = new_page(browser, blocked)
    page.on("pageerror", lambda error: errors.append(str(error)))
    notebook = nbformat.read(path, as_version=4)
    minutes = 3 + 3 * notebook.metadata["refiner"]["minutes_cpu"]
    exercises = len(list(solutions_of(notebook)))
    try:
        run_all(
            page,
            f"{lab.url}/{path.stem}/tree/{path.name}",
            f"THE END of {path.stem}",
            minutes=minutes,
        )
        page.wait_for_timeout(2000)  # for widgets that come after the last cell
        text = page.locator(".jp-Notebook").inner_text()
        assert not [words for words in BROKEN if words in text]
        said = page.locator(".jp-OutputArea-output pre").all_inner_texts()
        assert sum(line.count("solved ✓") for line in said) == lab.solved * exercises
        # In a page without windowing all outputs are there: every figure has its size.
        sizes = page.eval_on_selector_all(
            ".jp-OutputArea-output img", "images => images.map(image => image.naturalWidth)"
        )
        assert sizes and min(sizes) > 0, "a figure is missing or broken"
    finally:
        how = "solved" if lab.solved else "unsolved"
        page.screenshot(path=SHOTS / f"run-all-{path.stem}-{how}.png")
        page.context.close()
    assert blocked == [] and errors == []
