"""What share of the machine's matrix products a whole refining step reaches; the largest batch.

    python benchmarks/utilisation.py                           # the embedded autoencoder
    python benchmarks/utilisation.py --models B L --largest L  # [GPU] not yet run

A step is all of stage 3: views, encoder, heads, lookup, loss, backward pass, optimiser, average.
Its arithmetic is counted by torch's FlopCounterMode (products, convolutions and attention, both
ways; what checkpointing computes twice is counted once) at a batch of four, scaled to the batch
and divided by the time it takes. The ceiling is a large matrix product in the same precision
(bfloat16 on a GPU), timed in the same rounds. On a GPU the memory that the step held is put beside
the plan's.
``--largest`` takes the largest batch that fits by the plan, with and without checkpointing, tries
it, and tries one a sixth larger. Writes ``benchmarks/results/utilisation-<device>.json``.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from measured import header
from refine_step import timed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import refiner
from refiner.base.files import write_json
from refiner.base.places import GB
from refiner.models.load import build_vit
from refiner.training.loop import Loop
from refiner.training.planning import NOT_COUNTED, memory_needed
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import Steps, begin, loop_of

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "toybox": None,  # the embedded autoencoder with the cpu preset
    "B": {"size": 224, "patch": 16, "dim": 768, "depth": 12, "heads": 12},
    "L": {"size": 224, "patch": 16, "dim": 1024, "depth": 24, "heads": 16},
}
BATCH = {"toybox": 128, "B": 128, "L": 64}
COUNTED = 4  # images of the batch whose arithmetic is counted
SIDE = {"cpu": 2048, "cuda": 8192}  # of the matrices whose product is the ceiling


@lru_cache(maxsize=1)  # large ones take seconds to draw, and nothing here changes them
def encoder(name: str):
    """The model of a name."""
    shape = SHAPES[name]
    return build_vit(**shape, seed=0) if shape else refiner.load_model("mae_toybox")


def setup_of(name: str, batch: int, **changes):
    """Model, images of noise and recipe of a refinement."""
    shape, model = SHAPES[name], encoder(name)
    changes = {"keep": "last"} | changes
    if shape:
        recipe = Recipe.gpu(size=shape["size"], patch=shape["patch"], batch=batch, **changes)
    else:
        recipe = Recipe.cpu(batch=batch, **changes)
    size = shape["size"] if shape else 32
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (2 * batch, 3, size, size), generator=generator).byte()
    return model, images, complete_recipe(recipe, model, images)


def training_of(name: str, batch: int, device: str, **changes) -> Loop:
    """A refinement that is ready to take steps."""
    model, images, recipe = setup_of(name, batch, **changes)
    device = torch.device(device)
    return loop_of(Steps(begin(model, recipe, device), images, device))


def step(training: Loop) -> None:
    """One of stage 3."""
    training.one_step(3, 0)


def arithmetic(name: str, batch: int, device: str, **changes) -> int:
    """Floating-point operations of a step, counted at a small batch and scaled to this one."""
    training = training_of(name, COUNTED, device, **changes)
    # Of attention kernels on a CPU the counter knows nothing; written out, it is two products.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        step(training)
    training.source.close()
    recipe = training.recipe

    def pairs(b: int) -> int:
        """The loss's products of all samples with all, forwards and back: they grow with b²."""
        views = recipe.global_views * len(recipe.views)
        return 2 * 2 * len(recipe.blocks) * views * b**2 * recipe.out

    return (counter.get_total_flops() - pairs(COUNTED)) * batch // COUNTED + pairs(batch)


def utilisation(name: str, batch: int, device: str, rounds: int, **changes) -> dict:
    """Arithmetic and time of a step, beside a large product in the same rounds."""
    training = training_of(name, batch, device, **changes)
    planned = planned_memory(name, device, **changes)(batch)
    side = SIDE[device]
    x = torch.randn(
        side, side, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32
    )
    # Counted without checkpointing: what is computed twice is no work of the model's.
    flops = arithmetic(name, batch, device, **changes | {"checkpoint": False, "compile": False})
    seconds, ceiling = [], []
    for _ in range(2):
        step(training)  # warm up, compile, make the optimiser's averages
        x @ x
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    for _ in range(rounds):
        ceiling.append(2 * side**3 / timed(lambda: x @ x, device))
        seconds.append(timed(lambda: step(training), device))
    training.source.close()
    took, limit = statistics.median(seconds), statistics.median(ceiling)
    return {
        "batch": batch,
        **changes,
        "gigaflop_a_step": round(flops / 1e9, 1),
        "seconds_a_step": round(took, 4),
        "images_a_second": round(batch / took, 1),
        "gigaflop_a_second": round(flops / took / 1e9, 1),
        "ceiling_gigaflop_a_second": round(limit / 1e9, 1),
        "utilisation": round(flops / took / limit, 3),
        "planned_GB": round(planned / GB, 2),
        "measured_GB": peak_GB(device),
    }


def planned_memory(name: str, device: str, **changes) -> Callable[[int], float]:
    """Bytes that the plan foretells, as a function of the batch: two plans give all others."""
    small, twice = (
        memory_needed(*setup_of(name, n, **changes), torch.device(device)) for n in (8, 16)
    )

    def needed(batch: int) -> float:
        pairs = small["pairs of views"] * (batch / 8) ** 2
        rest = ((small[k], (twice[k] - small[k]) / 8) for k in small if k != "pairs of views")
        return NOT_COUNTED * (pairs + sum(at + slope * (batch - 8) for at, slope in rest))

    return needed


def peak_GB(device: str) -> float | None:
    """The most memory that torch held on the GPU since its count began."""
    return round(torch.cuda.max_memory_allocated() / GB, 2) if device == "cuda" else None


def fits(name: str, batch: int, **changes) -> float | None:
    """The GB that two steps of this batch held on the GPU; None if they do not fit."""
    training = None
    try:
        torch.cuda.reset_peak_memory_stats()
        training = training_of(name, batch, "cuda", **changes)
        step(training), step(training)
        return peak_GB("cuda")
    except torch.OutOfMemoryError:
        return None
    finally:
        if training is not None:
            training.source.close()
        del training
        torch.cuda.empty_cache()


def largest_batch(name: str, room: float, **changes) -> dict:
    """The largest batch by the plan in ``room`` bytes, whether it runs, and one a sixth larger."""
    planned = planned_memory(name, "cuda", **changes)
    foretold = largest(lambda n: planned(n) <= room)
    tried = {n: fits(name, n, **changes) for n in (foretold, foretold * 7 // 96 * 16) if n}
    return {
        "room_GB": round(room / GB, 1),
        "foretold": foretold,
        "held_GB": {str(n): held for n, held in tried.items()},
    }


def largest(works, start: int = 32, grain: int = 16) -> int:
    """The largest multiple of ``grain`` for which ``works`` holds, by doubling and halving; 0 if
    not even ``grain`` does."""
    low, high = 0, start
    while works(high):
        low, high = high, 2 * high
    while high - low > grain:
        middle = (low + high) // 2 // grain * grain
        low, high = (middle, high) if works(middle) else (low, middle)
    return low


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(SHAPES), default=["toybox"])
    add("--largest", nargs="+", choices=("B", "L"), default=[], help="needs a GPU")
    add("--compile", action="store_true", help="each block by torch.compile")
    add("--rounds", type=int, default=7)
    add("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if args.largest and device == "cpu":
        parser.error("--largest needs a GPU: a CPU swaps instead of refusing")
    cells, batches = {}, {}
    for name in args.models:
        options = {"compile": True} if args.compile else {}
        cells[name] = utilisation(name, BATCH[name], device, args.rounds, **options)
        print(f"{name:7}", "  ".join(f"{k} {v}" for k, v in cells[name].items()), flush=True)
    for name in args.largest:
        room = float(torch.cuda.mem_get_info()[0])
        batches[name] = {
            way: largest_batch(name, room, checkpoint=way == "checkpointing")
            for way in ("plain", "checkpointing")
        }
        print(f"{name:7} largest batch {batches[name]}", flush=True)
    command = "python benchmarks/utilisation.py --models " + " ".join(args.models)
    command += f" --largest {' '.join(args.largest)}" if args.largest else ""
    command += " --compile" if args.compile else ""
    out = args.out or RESULTS / f"utilisation-{device}.json"
    write_json(
        out, {**header(command), "rounds": args.rounds, "cells": cells, "largest_batch": batches}
    )
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
