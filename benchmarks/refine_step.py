"""How much faster heads, queue and loss are when all heads and pairs of views run at once.

    python benchmarks/refine_step.py          # reduced sizes, a few minutes on two cores
    python benchmarks/refine_step.py --full   # [GPU] the paper's widths, batch and queue; not run

A ladder for the encoders' widths of Ti, S, B and L: one loop per head and pair of views with
torch's own layers; the stacked heads and one product for all pairs, with a queue that is normalised
at every lookup; the queue stored normalised; AdamW fused; the step compiled. A step is: heads,
lookup of neighbors, loss, backward, optimiser, push. Features are given; the encoder is no part of
it.

Every round runs all rungs once, in changing order; medians of the rounds are reported. Launches are
the operations that reach the device (none counted for compiled code), memory is what the forward
pass keeps for the backward pass. On a CPU the products of the heads take most of the time in every
rung, and no ladder shortens those; a GPU waits for launches. Writes
``benchmarks/results/refine_step-<device>.json``.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from measured import header
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from refiner.files import write_json
from refiner.heads import IDHeads, NeighborQueue, nna_loss

RESULTS = Path(__file__).parent / "results"
WIDTHS = {"Ti": 192, "S": 384, "B": 768, "L": 1024}
GLOBAL = 2


@dataclass(frozen=True)
class Shape:
    """Sizes of a step; the defaults are reduced ones for a CPU."""

    heads: int = 4
    views: int = 6
    batch: int = 32
    hidden: int = 256
    predictor_hidden: int = 512
    out: int = 128
    queue: int = 4096


FULL = Shape(heads=8, views=12, batch=512, hidden=2048, predictor_hidden=4096, out=256,
             queue=65_536)  # fmt: skip


class Loop:
    """One head, one pair of views after the other, with torch's layers and a raw queue."""

    def __init__(self, dim: int, shape: Shape, device: str):
        self.shape = shape

        def mlp(*sizes):
            layers = []
            for a, b in pairwise(sizes):
                layers += [nn.Linear(a, b, bias=False), nn.BatchNorm1d(b, affine=False), nn.GELU()]
            return nn.Sequential(*layers[:-1])

        h, p, o = shape.hidden, shape.predictor_hidden, shape.out
        self.heads = nn.ModuleList(
            nn.ModuleList([mlp(dim, h, h, o), mlp(o, p, o)]) for _ in range(shape.heads)
        ).to(device)
        self.queues = [torch.randn(shape.queue, o, device=device) for _ in range(shape.heads)]
        self.ids = torch.arange(10**6, 10**6 + shape.queue, device=device)
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), foreach=False, fused=False)

    def loss(self, x_TVBD, ids):
        total = 0.0
        self.pushed = []
        for (projector, predictor), queue, x_VBD in zip(
            self.heads, self.queues, x_TVBD, strict=True
        ):
            v, b, _ = x_VBD.shape
            z = projector(x_VBD.flatten(0, 1))
            p = F.normalize(predictor(z), dim=-1).reshape(v, b, -1)
            z = F.normalize(z.detach(), dim=-1).reshape(v, b, -1)
            self.pushed.append(z[0])
            count = GLOBAL * (v - 1)
            for g in range(GLOBAL):
                similarity = z[g] @ F.normalize(queue, dim=-1).T
                similarity[ids[:, None] == self.ids] = -torch.inf
                neighbor = F.normalize(queue[similarity.argmax(dim=1)], dim=-1)
                for other in (w for w in range(v) if w != g):
                    logits = z[g] @ p[other].T / 0.2
                    positive = (neighbor * p[other]).sum(-1) / 0.2
                    logits = torch.diagonal_scatter(logits, positive)
                    target = torch.arange(b, device=z.device)
                    total = total + F.cross_entropy(logits, target) / count
        return total

    def push(self, ids):
        b = len(ids)
        for t, z in enumerate(self.pushed):
            self.queues[t] = torch.cat([self.queues[t][b:], z])
        self.ids = torch.cat([self.ids[b:], ids])


class RawQueue(NeighborQueue):
    """The stacked queue as it would be if vectors were stored as they come."""

    def lookup(self, *args, **kwargs):
        self.vectors = F.normalize(self.vectors, dim=-1)
        return super().lookup(*args, **kwargs)


class Stacked:
    """The library's heads, queue and loss."""

    def __init__(self, dim: int, shape: Shape, device: str, *, queue=NeighborQueue,
                 compiled=False, fused=False):  # fmt: skip
        self.heads = IDHeads(shape.heads, dim, hidden=shape.hidden, out=shape.out,
                             predictor_hidden=shape.predictor_hidden).to(device)  # fmt: skip
        self.queue = queue(shape.queue, shape.out, heads=shape.heads).to(device)
        stored = torch.randn(shape.heads, shape.queue, shape.out, device=device)
        self.queue.push(stored, torch.arange(10**6, 10**6 + shape.queue, device=device))
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), foreach=not fused, fused=fused)
        self.forward = torch.compile(self.compute, dynamic=False) if compiled else self.compute

    def compute(self, x_TVBD, ids):
        z, p = self.heads(x_TVBD)
        targets = z[:, :GLOBAL].detach()
        found = self.queue.lookup(targets.flatten(1, 2), ids, k=1)
        return nna_loss(p, targets, found.vectors.reshape(targets.shape)), targets[:, 0]

    def loss(self, x_TVBD, ids):
        loss, self.pushed = self.forward(x_TVBD, ids)
        return loss

    def push(self, ids):
        self.queue.push(self.pushed, ids)


def rungs(dim: int, shape: Shape, device: str, *, compiled: bool) -> dict:
    """The ladder, lowest first."""
    found = {
        "loop": Loop(dim, shape, device),
        "stacked": Stacked(dim, shape, device, queue=RawQueue),
        "normalised queue": Stacked(dim, shape, device),
        "fused optimiser": Stacked(dim, shape, device, fused=True),
    }
    if compiled:
        found["compiled"] = Stacked(dim, shape, device, fused=True, compiled=True)
    return found


def step(rung, x_TVBD, ids) -> float:
    """One step; its loss."""
    loss = rung.loss(x_TVBD, ids)
    rung.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    rung.optimizer.step()
    rung.push(ids)
    return loss


class Launches(TorchDispatchMode):
    """Counts operations that compute something; views are free."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        self.count += not operation.is_view
        return operation(*args, **(kwargs or {}))


def kept_bytes(rung, x_TVBD, ids) -> int:
    """What the forward pass keeps, without the weights."""
    known = {p.untyped_storage().data_ptr() for p in rung.heads.parameters()}
    kept: dict[int, int] = {}

    def pack(x):
        if x.untyped_storage().data_ptr() not in known:
            kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        loss = rung.loss(x_TVBD, ids)
    del loss
    return sum(kept.values())


def timed(rung, x_TVBD, ids) -> float:
    wait = torch.cuda.synchronize if x_TVBD.is_cuda else lambda: None
    wait()
    began = time.perf_counter()
    step(rung, x_TVBD, ids)
    wait()
    return time.perf_counter() - began


def measure(size: str, shape: Shape, device: str, rounds: int, *, compiled: bool) -> dict:
    """All rungs of one width, interleaved."""
    torch.manual_seed(0)
    ladder = rungs(WIDTHS[size], shape, device, compiled=compiled)
    x_TVBD = torch.randn(shape.heads, shape.views, shape.batch, WIDTHS[size], device=device)
    ids = torch.arange(shape.batch, device=device)
    found = {}
    for name, rung in ladder.items():
        for _ in range(2):
            step(rung, x_TVBD, ids)  # warm up, compile, make the optimiser's averages
        found[name] = {"megabytes": round(kept_bytes(rung, x_TVBD, ids) / 1e6, 1)}
        if name != "compiled":
            with Launches() as launches:
                step(rung, x_TVBD, ids)
            found[name]["launches"] = launches.count
    seconds = {name: [] for name in ladder}
    order = list(ladder)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(timed(ladder[name], x_TVBD, ids))
    for name, values in seconds.items():
        found[name]["milliseconds"] = round(1000 * statistics.median(values), 2)
        ratios = [a / b for a, b in zip(seconds["loop"], values, strict=True)]
        found[name]["times_faster"] = round(statistics.median(ratios), 2)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--sizes", nargs="+", choices=tuple(WIDTHS), default=list(WIDTHS))
    add("--rounds", type=int, default=5)
    add("--full", action="store_true", help="the paper's widths, batch and queue; for a GPU")
    add("--no-compile", action="store_true", help="leave the compiled rung out")
    add("--out", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = FULL if args.full else Shape()
    cells = {}
    for size in args.sizes:
        cells[size] = measure(size, shape, device, args.rounds, compiled=not args.no_compile)
        for name, cell in cells[size].items():
            print(f"{size:3} {name:17}", "  ".join(f"{k} {v}" for k, v in cell.items()), flush=True)
    command = "python benchmarks/refine_step.py" + (" --full" if args.full else "")
    command += " --no-compile" if args.no_compile else ""
    out = args.out or RESULTS / f"refine_step-{device}.json"
    write_json(out, {**header(command), "rounds": args.rounds, "shape": vars(shape),
                     "global_views": GLOBAL, "cells": cells})  # fmt: skip
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
