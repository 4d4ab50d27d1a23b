"""The memory that a plan foretells beside what a simulated step of refining holds at its peak.

    python benchmarks/memory.py [--models S B L] [--batch 256] [--cards 80 141]

No GPU is needed: the steps run on tensors without numbers (``simulated.py``), in the precision of a
GPU, with the ``gpu`` preset at 224 pixels, forwards and backwards and through the optimiser. The
second step is the one that counts: only then AdamW's averages are there. What a GPU's allocator
adds in gaps, and the space that its kernels need for themselves, no simulation sees; the plan adds
a tenth for them. ``--cards`` (GB) asks for the largest batch of ViT-L whose simulated peak and a
tenth more fit. Writes ``benchmarks/results/memory.json``.
"""

from __future__ import annotations

import argparse
import gc
from functools import lru_cache
from pathlib import Path
from unittest import mock

import torch
from measured import header
from simulated import CPU, Peak, hollow, simulated
from utilisation import largest

from refiner.base.files import write_json
from refiner.base.places import GB
from refiner.models.load import build_vit
from refiner.training import planning
from refiner.training.planning import NOT_COUNTED
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import Steps, begin, loop_of

RESULTS = Path(__file__).parent / "results"
SHAPES = {
    "S": {"dim": 384, "depth": 12, "heads": 6},
    "B": {"dim": 768, "depth": 12, "heads": 12},
    "L": {"dim": 1024, "depth": 24, "heads": 16},
}
WAYS = {"plain": {}, "checkpointing": {"checkpoint": True}, "half frozen": {"frozen_blocks": 0.5}}
SIZE, PATCH = 224, 16


@lru_cache(maxsize=1)
def encoder(name: str):
    return build_vit(size=SIZE, patch=PATCH, **SHAPES[name], seed=0)


def recipe_of(name: str, batch: int, way: str) -> Recipe:
    """The gpu preset with a batch and one of WAYS."""
    changes = dict(WAYS[way])
    if "frozen_blocks" in changes:
        changes["frozen_blocks"] = SHAPES[name]["depth"] // 2
    recipe = Recipe.gpu(size=SIZE, patch=PATCH, batch=batch, **changes)
    noise = torch.randint(0, 256, (batch, 3, 8, 8)).byte().repeat_interleave(SIZE // 8, 2)
    return complete_recipe(recipe, encoder(name), noise.repeat_interleave(SIZE // 8, 3))


def foretold(name: str, recipe: Recipe) -> dict[str, float]:
    """Bytes by what needs them, as the plan counts them."""
    run = begin(encoder(name), recipe, CPU)
    with simulated(CPU), mock.patch.object(planning, "begin", lambda *_: run):
        hollow(run.model, run.heads, run.queue, device=CPU)
        images = torch.empty(recipe.batch, 3, SIZE, SIZE, dtype=torch.uint8)
        return planning.memory_needed(run.model, images, recipe, CPU)


def simulated_peak(name: str, recipe: Recipe) -> int:
    """Bytes of all tensors at the worst moment of the second step of stage 3."""
    run = begin(encoder(name), recipe, CPU)
    with simulated(CPU):
        hollow(run.model, run.heads, run.queue, device=CPU)
        images = torch.empty(recipe.batch, 3, SIZE, SIZE, dtype=torch.uint8)
        training = loop_of(Steps(run, images, CPU))
        modules = (run.model, run.heads, run.queue)
        held = [x for m in modules for x in (*m.parameters(), *m.buffers())]
        with Peak(*held, *training.ema.module.state_dict().values()) as memory:
            for _ in range(2):
                training.one_step(3, 0)
    return memory.peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--models", nargs="+", choices=tuple(SHAPES), default=list(SHAPES))
    add("--batch", type=int, default=256)
    add("--cards", type=float, nargs="*", default=[80, 141], help="GB of GPU memory")
    add("--out", type=Path, default=RESULTS / "memory.json")
    args = parser.parse_args()
    cells, batches = [], []
    for name in args.models:
        for way in WAYS:
            recipe = recipe_of(name, args.batch, way)
            parts, peak = foretold(name, recipe), simulated_peak(name, recipe)
            cells.append(
                {
                    "model": name,
                    "way": way,
                    "batch": args.batch,
                    "foretold_GB": round(sum(parts.values()) / GB, 2),
                    "simulated_GB": round(peak / GB, 2),
                    "parts_GB": {part: round(size / GB, 3) for part, size in parts.items()},
                }
            )
            print(
                f"ViT-{name} {way:13} foretold {cells[-1]['foretold_GB']} GB, "
                f"simulated {cells[-1]['simulated_GB']} GB",
                flush=True,
            )
            gc.collect()
    for way in ("plain", "checkpointing"):
        for card in args.cards:
            fits = lambda n: (  # noqa: E731
                NOT_COUNTED * simulated_peak("L", recipe_of("L", n, way)) <= card * GB  # noqa: B023
            )
            batches.append({"model": "L", "way": way, "GB": card, "batch": largest(fits)})
            print(
                f"ViT-L {way}: the largest batch on {card} GB is {batches[-1]['batch']}", flush=True
            )
    command = "python benchmarks/memory.py"
    write_json(args.out, {**header(command), "cells": cells, "largest_batch": batches})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
