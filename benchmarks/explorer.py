"""What the explorer costs, in the kernel and in the browser.

    python benchmarks/explorer.py [--sizes 10000 100000] [--steps 24]
    python benchmarks/explorer.py --browser [--sizes 10000 100000] [--steps 24]

Random features of 12 blocks and 2 models, 16 classes, 32×32 images, one thread. A step moves the
slider by a block with an image selected and 200 images in the group: it computes the view that
Python sees, coloured by the wrong votes (where only a sample's neighbors are known: by class). The
page has drawn by then, as it holds all blocks. Also measured: the first view of the embedded
checkpoints' 1,024 Toybox images, from ``explore`` to the widget, in a process of its own that has
not imported the widgets yet.

With ``--browser`` the same explorers are shown by JupyterLab in Chromium (as in the tests; pip
install playwright jupyterlab, apt-get install chromium), at 1440×900, drawn without a graphics
card. The browser's own clock runs from an event to the frame that answers it: from "Run" to the
first view, once the kernel has the explorer; from a click on a point to its neighbors on the maps,
and to their thumbnails, which the kernel sends; from an arrow key to the next block's maps, with an
image selected. Processor times are the page's process, by the system.

Writes its part of ``explorer.json`` in benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
RESULT = ROOT / "benchmarks" / "results" / "explorer.json"
sys.path.insert(0, str(ROOT))

import refiner  # noqa: E402
from refiner.base.files import write_json  # noqa: E402
from refiner.base.places import machine  # noqa: E402

BLOCKS, WIDTH, CLASSES, GROUP = 12, 96, 16, 200


def inputs(n: int):
    """Images and features of two models whose classes come apart with the blocks."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(n) % CLASSES
    pixels = torch.randint(256, (n, 3, 32, 32), generator=generator, dtype=torch.uint8)
    centres = torch.randn(CLASSES, WIDTH, generator=generator)[labels]
    strength = torch.linspace(0, 0.5, BLOCKS)[:, None, None]
    features = {}
    for name, gain in (("before", 1.0), ("after", 1.5)):
        noise = torch.randn(BLOCKS, n, WIDTH, generator=generator)
        features[name] = noise.add_(gain * strength * centres)
    return refiner.ImageSet(pixels, labels, tuple(f"class {i}" for i in range(CLASSES))), features


def measure(n: int, steps: int) -> dict:
    """Times of one size, and the highest memory so far."""
    images, features = inputs(n)
    held = (images.images.nbytes + sum(x.nbytes for x in features.values())) / 2**20
    began = time.perf_counter()
    explorer = refiner.explore(images, features, progress=False)
    opened = time.perf_counter() - began
    colour = "wrong votes" if explorer.exploration.complete else "class"
    explorer.set(selected=1, group=tuple(range(GROUP)), colour=colour)
    taken = []
    for step in range(steps):
        wall, processor = time.perf_counter(), time.process_time()
        explorer.set(block=1 + step % BLOCKS)
        taken.append((time.perf_counter() - wall, time.process_time() - processor))
    walls, processors = zip(*taken[2:], strict=True)  # the first ones make thumbnails
    return {
        "images": n,
        "open_seconds": round(opened, 2),
        "step_milliseconds": round(1000 * statistics.median(walls), 1),
        "step_cpu_milliseconds": round(1000 * statistics.median(processors), 1),
        "slowest_step_milliseconds": round(1000 * max(walls), 1),
        "inputs_megabytes": round(held),
        "peak_megabytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
    }


def first_view() -> dict:
    """Seconds until the embedded checkpoints' explorer is there, once features are extracted."""
    images = refiner.load_images("toybox", split="test", n=1024)
    names = {"before": "mae_toybox", "after": "mae_toybox_refined"}
    features = {
        side: refiner.extract(refiner.load_model(name), images, progress=False)
        for side, name in names.items()
    }
    wall, processor = time.perf_counter(), time.process_time()
    explorer = refiner.explore(images, features, progress=False)
    return {
        "map": explorer.state.layout,
        "seconds": round(time.perf_counter() - wall, 2),
        "cpu_seconds": round(time.process_time() - processor, 2),
    }


# ---------------------------------------------------------------- in the browser

CELLS = (
    """from benchmarks.explorer import inputs
import refiner
explorer = refiner.explore(*inputs({n}), progress=False)
print("READY")""",
    "explorer",
)
# Milliseconds from the next event of a kind until a condition holds and its frame has been drawn.
CLOCK = """([kind, condition]) => {
  const holds = new Function("return " + condition);
  (window.clocks ??= []).push(new Promise((tell) => addEventListener(kind, (event) => {
    const began = event.timeStamp, done = () => tell(performance.now() - began);
    const look = () => requestAnimationFrame(holds() ? () => setTimeout(done) : look);
    look();
  }, { capture: true, once: true })));
}"""
EXPLORER = "document.querySelector('.refiner-explorer')?.explorer"


class Page:
    """A page of the browser, its clock, and its process."""

    def __init__(self, page):
        self.page = page
        system = page.context.browser.new_browser_cdp_session()
        found = system.send("SystemInfo.getProcessInfo")["processInfo"]
        self.processes = [Path(f"/proc/{p['id']}") for p in found if p["type"] == "renderer"]

    def time(self, kind: str, act, *conditions: str) -> list[float]:
        """Milliseconds from the event that ``act`` makes to each condition, and the processor's."""
        before = self.processor()
        for condition in conditions:
            self.page.evaluate(CLOCK, [kind, condition])
        act()
        times = self.page.evaluate("Promise.all(window.clocks.splice(0))")
        return [*times, 1000 * (self.processor() - before)]

    def processor(self) -> float:
        """Seconds that the page's processes have computed."""
        fields = [(p / "stat").read_text().rsplit(")", 1)[1].split() for p in self.processes]
        return sum(int(f[11]) + int(f[12]) for f in fields) / os.sysconf("SC_CLK_TCK")

    def megabytes(self) -> int:
        """Resident memory of the page's processes."""
        pages = [int((p / "statm").read_text().split()[1]) for p in self.processes]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE") // 2**20

    def heap(self) -> int:
        """Megabytes of JavaScript's objects, without what typed arrays hold."""
        return round(self.page.evaluate("performance.memory.usedJSHeapSize") / 2**20)


def in_browser(n: int, steps: int) -> dict:
    """Times and memory of the page that shows n images, in JupyterLab in Chromium."""
    import nbformat

    sys.path.insert(0, str(ROOT / "tests"))
    from browser import browsing, new_page, serving, wait_for_kernel

    cells = [nbformat.v4.new_code_cell(cell.format(n=n)) for cell in CELLS]
    with tempfile.TemporaryDirectory() as folder:
        home = Path(folder)
        (home / "work").mkdir()
        python = {"kernelspec": {"name": "python3", "display_name": "Python 3"}}
        notebook = nbformat.v4.new_notebook(cells=cells, metadata=python)
        nbformat.write(notebook, home / "work" / "explorer.ipynb")
        with serving(home) as lab, browsing() as browser:
            page, url = new_page(browser, []), f"{lab}/lab/tree/explorer.ipynb"
            page.set_viewport_size({"width": 1440, "height": 900})
            page.context.set_default_timeout(600_000)
            page.goto(url)
            page.locator(".jp-Notebook .jp-Cell").first.click()
            wait_for_kernel(page, url)
            page.keyboard.press("Shift+Enter")
            page.locator(".jp-OutputArea-output pre", has_text="READY").wait_for()
            return {"images": n} | _used(Page(page), n, steps)


def _used(lab: Page, n: int, steps: int) -> dict:
    """Shows the explorer, clicks points, and steps through blocks."""
    page, without = lab.page, lab.megabytes()
    page.emulate_media(reduced_motion="reduce")  # a step else glides for 0.35 s on purpose
    first, cpu = lab.time("keydown", lambda: page.keyboard.press("Shift+Enter"), EXPLORER)
    found = {"first_view_seconds": first / 1000, "first_view_cpu_seconds": cpu / 1000}
    page.locator(".refiner-explorer").scroll_into_view_if_needed()
    page.wait_for_timeout(5000)  # the figure that stays is drawn meanwhile
    clicks, presses = [], []
    ringed = "document.querySelectorAll('.rx-inspector .rx-picture').length > 20"
    for i in range(steps):
        before = page.evaluate(f"{EXPLORER}.state.selected")
        x, y = page.evaluate(f"{EXPLORER}.at({i % 2}, {(i + 1) * n // (steps + 1)})")
        page.mouse.move(x, y)
        page.wait_for_timeout(600)  # its picture is there
        drawn = f"{EXPLORER}.state.selected !== {json.dumps(before)} && {ringed}"
        shown = f"{drawn} && !document.querySelector('.rx-picture:not([style*=url])')"
        clicks.append(lab.time("pointerup", lambda: page.mouse.click(x, y), drawn, shown))  # noqa: B023
    page.get_by_role("slider").focus()
    for i in range(steps):
        key, way = ("ArrowLeft", -1) if i // (BLOCKS - 1) % 2 == 0 else ("ArrowRight", 1)
        block = page.evaluate(f"{EXPLORER}.state.block") + way
        drawn = f"{EXPLORER}.state.block === {block} && {ringed}"
        presses.append(lab.time("keydown", lambda: page.keyboard.press(key), drawn))  # noqa: B023
        page.wait_for_timeout(600)  # its thumbnails are there
    middle = lambda rows: [statistics.median(x) for x in zip(*rows, strict=True)]  # noqa: E731
    names = ("click", "thumbnails", "click_cpu", "step", "step_cpu")
    for name, value in zip(names, middle(clicks) + middle(presses), strict=True):
        found[f"{name}_milliseconds"] = value
    found = {name: float(f"{value:.3g}") for name, value in found.items()}
    memory = {"page_megabytes": lab.megabytes(), "lab_megabytes": without}
    return found | memory | {"heap_megabytes": lab.heap()}


def in_fresh_process(*arguments: str) -> dict:
    """Each part in a process of its own, so that peaks of memory are its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--browser", action="store_true", help="time the page, not the kernel")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one or options.first:
        print(json.dumps(first_view() if options.first else measure(options.one, options.steps)))
        return
    result = json.loads(RESULT.read_text()) if RESULT.is_file() else {}
    if options.browser:
        rows = [in_browser(n, options.steps) for n in options.sizes]
        command = "python benchmarks/explorer.py --browser"
        result["browser"] = {"command": command, "machine": machine(), "sizes": rows}
    else:
        result |= {"command": "python benchmarks/explorer.py", "machine": machine(), "threads": 1}
        result |= {"blocks": BLOCKS, "models": 2, "width": WIDTH}
        result["first_view"] = in_fresh_process("--first")
        arguments = [("--one", str(n), "--steps", str(options.steps)) for n in options.sizes]
        result["sizes"] = [in_fresh_process(*one) for one in arguments]
    print(json.dumps(result, indent=1))
    write_json(RESULT, result)


if __name__ == "__main__":
    main()
