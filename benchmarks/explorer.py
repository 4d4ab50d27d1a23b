"""What a step of the explorer costs in the kernel.

    python benchmarks/explorer.py [--sizes 10000 100000] [--steps 24]

Random features of 12 blocks and 2 models, 16 classes, 32×32 images, one thread. A step moves the
slider by a block with an image selected and 200 images in the group: it computes the view that
Python sees, coloured by the wrong votes (where only a sample's neighbors are known: by class). The
page has drawn by then, as it holds all blocks. Also measured: the first view of the embedded
checkpoints' 1,024 Toybox images, from ``explore`` to the widget, in a process of its own that has
not imported the widgets yet. Writes ``explorer.json`` into benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent.parent
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


def table(result: dict) -> list[str]:
    """The table of docs/results.md."""
    head = (
        "images × 12 blocks × 2 models",
        "a step of the slider, processor ms",
        "opening, s",
        "peak memory, MB",
    )
    lines = [f"| {' | '.join(head)} |", "|---|---|---|---|"]
    for row in result["sizes"]:
        cells = [f"{row['images']:,}", f"{row['step_cpu_milliseconds']:.0f}"]
        cells += [f"{row['open_seconds']:.0f}", str(row["peak_megabytes"])]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def in_fresh_process(*arguments: str) -> dict:
    """Each part in a process of its own, so that peaks of memory are its own."""
    command = [sys.executable, __file__, *arguments]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--first", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.one or options.first:
        print(json.dumps(first_view() if options.first else measure(options.one, options.steps)))
        return
    result = {
        "command": "python benchmarks/explorer.py",
        "machine": machine(),
        "threads": 1,
        "blocks": BLOCKS,
        "models": 2,
        "width": WIDTH,
    }
    result["first_view"] = in_fresh_process("--first")
    print(result["first_view"])
    result["sizes"] = []
    for n in options.sizes:
        result["sizes"].append(in_fresh_process("--one", str(n), "--steps", str(options.steps)))
        print(result["sizes"][-1], flush=True)
    write_json(ROOT / "benchmarks" / "results" / "explorer.json", result)


if __name__ == "__main__":
    main()
