"""A real JupyterLab in a real Chromium, with every other machine out of reach."""

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import nbformat
import pytest
from solutions import answered, solutions_of

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome-stable", "google-chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
SHOTS = ROOT / "runs" / "browser"
MINUTES = 60_000  # in the milliseconds of Playwright
SETTINGS = {
    # Otherwise cells outside of the window, and the widgets in them, leave the page.
    "notebook-extension/tracker": {"windowingMode": "none"},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False},
}


def copy_with(home, path, last_cell, *, solved=False):
    """Writes the notebook without outputs, and with one more cell, to where Jupyter serves it.

    Solved: every exercise's solution stands in its cell, as if a learner had found it.
    """
    notebook = nbformat.read(path, as_version=4)
    if solved:
        for cell, solution in list(solutions_of(notebook)):
            cell.source = answered(cell.source, solution)
    notebook.cells.append(nbformat.v4.new_code_cell(last_cell))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    (home / "work").mkdir(exist_ok=True)
    nbformat.write(notebook, home / "work" / path.name)


@contextmanager
def serving(home):
    """JupyterLab for ``home / work`` as nobody has configured it yet; its address."""
    for name, content in SETTINGS.items():
        path = home / "settings" / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    folders = {
        "IPYTHONDIR": "ipython",
        "JUPYTER_CONFIG_DIR": "config",
        "JUPYTER_DATA_DIR": "data",
        "JUPYTER_RUNTIME_DIR": "runtime",
        "JUPYTERLAB_SETTINGS_DIR": "settings",
        "JUPYTERLAB_WORKSPACES_DIR": "workspaces",
    }
    env = os.environ | {key: str(home / name) for key, name in folders.items()}
    env |= {
        "PYTHONPATH": str(ROOT),
        "JUPYTER_PREFER_ENV_PATH": "1",
        "REFINER_ANSWERS": str(home / "answers"),
    }
    port = free_port()
    command = [
        *(sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", f"--port={port}"),
        *("--ServerApp.port_retries=0", "--ServerApp.ip=127.0.0.1", "--IdentityProvider.token="),
        # Kernels whose page was closed end after a minute; ten would fill the memory.
        *("--MappingKernelManager.cull_idle_timeout=60", "--MappingKernelManager.cull_interval=10"),
        "--MappingKernelManager.cull_busy=True",
        f"--ServerApp.root_dir={home / 'work'}",
    ]
    with open(home / "log.txt", "w") as log:
        server = subprocess.Popen(
            command, env=env, cwd=home / "work", stdout=log, stderr=subprocess.STDOUT
        )
        try:
            wait_for(f"http://127.0.0.1:{port}/api/status", server, home / "log.txt")
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def wait_for(url, server, log):
    until = time.monotonic() + 120
    while time.monotonic() < until and server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"JupyterLab does not answer:\n{log.read_text()[-2000:]}")


@contextmanager
def browsing():
    """A Chromium without a window."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install it")
    SHOTS.mkdir(parents=True, exist_ok=True)
    flags = ["--no-sandbox", "--disable-gpu"]  # root has no sandbox, and drawings need no card
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=BROWSER, args=flags)
        try:
            yield browser
        finally:
            browser.close()


def new_page(browser, blocked):
    """A page that reaches this machine only; other addresses are added to ``blocked``."""

    def only_local(route):
        if urlparse(route.request.url).hostname == "127.0.0.1":
            route.continue_()
        else:
            blocked.append(route.request.url)
            route.abort()

    context = browser.new_context(viewport={"width": 1500, "height": 1400})
    context.set_default_timeout(2 * MINUTES)
    context.route("**/*", only_local)
    return context.new_page()


def wait_for_kernel(page, url):
    """Waits until the page's kernel runs and is connected.

    JupyterLab shows its kernel as idle a little earlier. Cells that are run in between are dropped,
    or it asks which kernel to take.
    """
    server, _, path = url.partition("/lab")
    until = time.monotonic() + 120
    while time.monotonic() < until:
        for session in page.request.get(f"{server}/api/sessions").json():
            kernel, here = session["kernel"], path.endswith(session["path"])
            if here and kernel["connections"] and kernel["execution_state"] == "idle":
                return
        page.wait_for_timeout(500)
    pytest.fail(f"no kernel for {url} after two minutes")


def run_all(page, url, last, *, minutes):
    """Opens a notebook, runs all of its cells, and returns what the last one says.

    Args:
        last: how the last cell's output starts.
        minutes: after which it has failed.
    """
    page.goto(url)
    page.wait_for_selector('.jp-Notebook-ExecutionIndicator[data-status="idle"]')
    page.locator(".jp-Notebook .jp-Cell").first.click()
    wait_for_kernel(page, url)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text("Run All Cells", exact=True).click()
    done = page.locator(".jp-OutputArea-output pre", has_text=last)
    failed = page.locator('[data-mime-type="application/vnd.jupyter.error"]')
    done.or_(failed).first.wait_for(timeout=minutes * MINUTES)
    assert failed.count() == 0, failed.first.inner_text()
    return done.inner_text()
