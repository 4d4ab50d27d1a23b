"""How much faster heads, queue and loss are when all heads and pairs of views run at once.

    python benchmarks/refine_step.py          # reduced sizes, a few minutes on two cores
    python benchmarks/refine_step.py --full   # [GPU] the paper's widths, batch and queue; not run

A ladder for the encoders' widths of Ti, S, B and L: one loop per head and pair of views with
torch's own layers; the stacked heads and one product for all pairs, with a queue that is normalised
at every lookup; the queue stored normalised; AdamW fused; the step compiled. A step is: heads,
lookup of neighbors, loss, backward, optimiser, push. Features are given; the encoder is no part of
it. Last comes the floor: the matrix products of a step and its backward pass and nothing else. On a
GPU the heads of every rung run in bfloat16 and the rest in float32, as in training.

Every round runs all rungs once, in changing order; medians of the rounds are reported, on a CPU of
processor time, as others may use the machine. Launches are the operations that reach the device
(none counted for compiled code), memory is what the forward pass keeps for the backward pass. On a
CPU the products take most of the time, and no ladder goes below them; a GPU waits for launches.

Then a whole step of the cpu preset on the embedded autoencoder, part by part, and a step of stage 2
with features that were kept. Writes ``benchmarks/results/refine_step-<device>.json``.
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

import refiner
from refiner.base.files import write_json
from refiner.base.tensors import step_generator
from refiner.images.views import make_views
from refiner.training.heads import IDHeads, NeighborQueue, StackedLinear, nna_loss
from refiner.training.loop import autocast
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import Steps, begin, loop_of
from refiner.training.step import batch_features, view_features

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


FULL = Shape(
    heads=8, views=12, batch=512, hidden=2048, predictor_hidden=4096, out=256, queue=65_536
)


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
            with autocast(x_VBD.device):
                z = projector(x_VBD.flatten(0, 1))
                p = predictor(z)
            p = F.normalize(p.float(), dim=-1).reshape(v, b, -1)
            z = F.normalize(z.detach().float(), dim=-1).reshape(v, b, -1)
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

    def __init__(
        self,
        dim: int,
        shape: Shape,
        device: str,
        *,
        queue=NeighborQueue,
        compiled=False,
        fused=False,
    ):
        self.heads = IDHeads(
            shape.heads,
            dim,
            hidden=shape.hidden,
            out=shape.out,
            predictor_hidden=shape.predictor_hidden,
        ).to(device)
        self.queue = queue(shape.queue, shape.out, heads=shape.heads).to(device)
        stored = torch.randn(shape.heads, shape.queue, shape.out, device=device)
        self.queue.push(stored, torch.arange(10**6, 10**6 + shape.queue, device=device))
        self.optimizer = torch.optim.AdamW(self.heads.parameters(), foreach=not fused, fused=fused)
        self.forward = torch.compile(self.compute, dynamic=False) if compiled else self.compute

    def compute(self, x_TVBD, ids):
        with autocast(x_TVBD.device):
            z, p = self.heads(x_TVBD)
        targets = z[:, :GLOBAL].detach().float()
        found = self.queue.lookup(targets.flatten(1, 2), ids, k=1)
        return nna_loss(p.float(), targets, found.vectors.reshape(targets.shape)), targets[:, 0]

    def loss(self, x_TVBD, ids):
        loss, self.pushed = self.forward(x_TVBD, ids)
        return loss

    def push(self, ids):
        self.queue.push(self.pushed, ids)


class Products:
    """The floor: all matrix products of a step, forward and backward, without what is between."""

    def __init__(self, dim: int, shape: Shape, device: str):
        heads = IDHeads(
            shape.heads,
            dim,
            hidden=shape.hidden,
            out=shape.out,
            predictor_hidden=shape.predictor_hidden,
        ).to(device)
        self.weights = [m.weight for m in heads.modules() if isinstance(m, StackedLinear)]
        self.queue = torch.randn(shape.heads, shape.queue, shape.out, device=device)
        self.targets = GLOBAL * shape.batch

    @torch.no_grad()
    def step(self, x_TVBD, ids) -> None:
        flowing, inputs = x_TVBD.flatten(1, 2), []
        with autocast(x_TVBD.device):
            for layer, weight in enumerate(self.weights):
                inputs.append(flowing)
                flowing = torch.bmm(flowing, weight)
                if layer == 2:  # the projection
                    z = flowing[:, : self.targets].float()
        torch.bmm(z, self.queue.mT)
        logits = torch.bmm(z, flowing.float().mT)
        gradient = torch.bmm(logits.mT, z)
        with autocast(x_TVBD.device):
            for layer in reversed(range(len(self.weights))):
                torch.bmm(inputs[layer].mT, gradient)
                if layer:
                    gradient = torch.bmm(gradient, self.weights[layer].mT)


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
    found["products only"] = Products(dim, shape, device)
    return found


def step(rung, x_TVBD, ids) -> None:
    """One step."""
    if isinstance(rung, Products):
        return rung.step(x_TVBD, ids)
    loss = rung.loss(x_TVBD, ids)
    rung.optimizer.zero_grad(set_to_none=True)
    loss.backward()
    rung.optimizer.step()
    rung.push(ids)


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


def timed(work, device: str) -> float:
    """Seconds of a function without arguments: wall time on a GPU, processor time on a CPU."""
    wait, clock = torch.cuda.synchronize, time.perf_counter
    if device == "cpu":
        wait, clock = (lambda: None), time.process_time
    wait()
    began = clock()
    work()
    wait()
    return clock() - began


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
        found[name] = {}
        if name != "products only":
            found[name]["megabytes"] = round(kept_bytes(rung, x_TVBD, ids) / 1e6, 1)
        if name != "compiled":
            with Launches() as launches:
                step(rung, x_TVBD, ids)
            found[name]["launches"] = launches.count
    seconds = {name: [] for name in ladder}
    order = list(ladder)
    for turn in range(rounds):
        random.Random(turn).shuffle(order)
        for name in order:
            seconds[name].append(timed(lambda: step(ladder[name], x_TVBD, ids), device))  # noqa: B023
    for name, values in seconds.items():
        found[name]["milliseconds"] = round(1000 * statistics.median(values), 2)
        ratios = [a / b for a, b in zip(seconds["loop"], values, strict=True)]
        found[name]["times_faster"] = round(statistics.median(ratios), 2)
    return found


def parts_of_the_cpu_preset(device: str, rounds: int) -> dict:
    """Milliseconds of each part of a step on the embedded autoencoder, in rounds as above."""
    images = refiner.load_images("toybox", n=1024, progress=False)
    model = refiner.load_model("mae_toybox")
    recipe = complete_recipe(Recipe.cpu(head_steps=1000, cached_views=1), model, images)
    steps = Steps(begin(model, recipe, torch.device(device)), images, torch.device(device))
    training, run, rng = loop_of(steps), steps.run, step_generator(0, 0, device)
    steps.kept_features(8)  # fills the first epoch
    pixels = images.images[: recipe.batch].to(device)
    ids = torch.arange(recipe.batch, device=device)
    views = make_views(pixels, recipe.views, rng)
    frozen = {"frozen_blocks": recipe.frozen_blocks, "generator": rng}
    x_TVBD = batch_features(run.model, pixels, recipe, stage=2, total=len(ids), generator=rng)
    z_TVBO, p_TVBO = (x.detach() for x in run.heads(x_TVBD))
    targets, p_TVBO = z_TVBO[:, :GLOBAL], p_TVBO.requires_grad_()
    encode = lambda: view_features(run.model.train(), views, recipe, **frozen)  # noqa: E731
    state = {}

    def encode_only():
        state["features"] = encode()

    work = {
        "step of stage 3": lambda: training.one_step(3, 0),
        "step of stage 2": lambda: steps.keep_features(0) and training.one_step(2, 8),
        "step of stage 2, features kept": lambda: training.one_step(2, 8),
        "views": lambda: make_views(pixels, recipe.views, rng),
        "encoder, forward": encode_only,
        "encoder, backward": lambda: state.pop("features").sum().backward(),
        "heads, both ways": lambda: sum(x.sum() for x in run.heads(x_TVBD)).backward(),
        "lookup": lambda: run.queue.lookup(targets.flatten(1, 2), ids, k=recipe.top_k),
        "loss, both ways": lambda: nna_loss(p_TVBO, targets, targets).backward(),
        "optimiser": training.stages[3].optimizer.step,
        "average": lambda: training.ema.update(run.model, 10**6),
    }
    seconds = {name: [] for name in work}
    for turn in range(rounds + 1):  # the first is thrown away
        for name, part in work.items():
            took = timed(part, device)
            if turn:
                seconds[name].append(took)
    return {name: round(1000 * statistics.median(v), 1) for name, v in seconds.items()}


def save(args: argparse.Namespace, device: str, shape: Shape, **found) -> Path:
    """Writes what was found so far."""
    command = "python benchmarks/refine_step.py" + (" --full" if args.full else "")
    command += " --no-compile" if args.no_compile else ""
    out = args.out or RESULTS / f"refine_step-{device}.json"
    write_json(
        out,
        {
            **header(command),
            "rounds": args.rounds,
            "shape": vars(shape),
            "global_views": GLOBAL,
            **found,
        },
    )
    return out


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
    save(args, device, shape, cells=cells)  # kept, whatever happens to the rest
    preset = parts_of_the_cpu_preset(device, args.rounds)
    for name, milliseconds in preset.items():
        print(f"cpu preset, {name:32} {milliseconds:8.1f} ms")
    out = save(args, device, shape, cells=cells, cpu_preset=preset)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
