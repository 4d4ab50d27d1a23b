"""How much pooling every block adds to timm's plain forward pass, in time.

    python benchmarks/extract.py [--model small|base] [--images 512] [--rounds 9]

Both passes see the same preprocessed batches. Rounds alternate between them, so that a machine
that is busy for a while slows both; the table shows medians, of wall time and of processor time,
and their ratio.
Writes ``benchmarks/results/extract-<device>-<model>.json``.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent))

from refiner.base.files import write_json
from refiner.base.places import machine
from refiner.models.load import build_vit
from refiner.probing.features import extract

MODELS = {
    "small": {"size": 32, "patch": 4, "dim": 96, "depth": 12, "heads": 3},
    "base": {"size": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12},
    "large": {"size": 224, "patch": 16, "dim": 1024, "depth": 24, "heads": 16},
}


def plain(model, batches, device) -> None:
    """What anyone would write to get timm's final features, copied back like ours."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    with torch.no_grad(), torch.autocast(device, dtype, enabled=device == "cuda"):
        for x in batches:
            model.forward_features(x.to(device))[:, 0].float().cpu()


def timed(function) -> tuple[float, float]:
    """Wall and processor seconds; both ways end with a copy to the CPU, which waits for a GPU."""
    wall, processor = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - processor


def compare(
    name: str, *, images: int = 512, batch: int = 128, rounds: int = 16, device: str = "cpu"
) -> dict:
    """Medians of both passes over the same images, and their ratio."""
    how = MODELS[name]
    model = build_vit(**how, seed=0).to(device)
    batches = list(torch.randn(images, 3, how["size"], how["size"]).split(batch))
    ways = {
        "timm": lambda: plain(model, batches, device),
        "refiner": lambda: extract(model, batches, device=device, progress=False),
    }
    for way in ways.values():
        way()  # warm up
    seconds = {name: [] for name in ways}
    for turn in range(rounds):
        # Who goes first alternates too.
        for way in list(ways)[:: 1 if turn % 2 else -1]:
            seconds[way].append(timed(ways[way]))
    result = {"model": name, "images": images, "batch": batch, "rounds": rounds}
    for clock, kind in enumerate(("wall", "cpu")):
        taken = {way: [times[clock] for times in several] for way, several in seconds.items()}
        ratios = [a / b for a, b in zip(taken["refiner"], taken["timm"], strict=True)]
        medians = {way: round(statistics.median(v), 4) for way, v in taken.items()}
        result[kind] = {
            "median_seconds": medians,
            "ratio": round(medians["refiner"] / medians["timm"], 4),
        }
        if rounds > 1:
            quartiles = statistics.quantiles(ratios, n=4)[::2]
            result[kind]["quartiles_of_rounds"] = [round(q, 4) for q in quartiles]
        print(f"{kind} seconds, {name}, {images} images: {result[kind]}")
    return result | {"machine": machine()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="small")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=16)
    arguments = vars(parser.parse_args())
    name = arguments.pop("model")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = Path(__file__).parent / "results"
    command = {"command": f"python benchmarks/extract.py --model {name}"}
    found = compare(name, device=device, **arguments)
    write_json(folder / f"extract-{device}-{name}.json", command | found)


if __name__ == "__main__":
    main()
