"""Before a refinement starts: what it will do, how long, how much memory, and what would fit.

Time comes from a few steps that are taken and thrown away. Memory is counted: weights, gradients
and averages by their numbers, activations by what a small batch really leaves behind for its
backward pass, scaled to the batch.
"""

from __future__ import annotations

import gc
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import psutil
import torch

from refiner.base import parallel
from refiner.base.places import amount, duration
from refiner.base.tensors import sides, step_generator, take
from refiner.images.sets import pixels_of
from refiner.images.sources import count, in_words, some
from refiner.models.encoders import Encoder, channels_of, freeze_first
from refiner.training.groups import check_groups, groups_of
from refiner.training.keeping import TIMES, Keeper, keeper_of
from refiner.training.loop import autocast
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import Refined, Steps, begin, loop_of
from refiner.training.step import refine_step

NOT_COUNTED = 1.1  # the allocator's gaps and what is held for a moment only


@dataclass(frozen=True)
class Plan:
    """What a refinement will do and need; ``print`` it.

    Attributes:
        recipe: filled in.
        images: how many; 0 for a stream that does not say.
        step_seconds: of a step of stage 2 and of stage 3; NaN where not even a few images fit.
        memory: bytes a process by what needs them, at the peak of stage 3.
        available: bytes that the device has free; on a CPU all of its memory.
        changes: where it does not fit: ``NAME=VALUE`` settings with the bytes needed then.
        what: lines that describe it.
        measuring: seconds that measuring held-out images takes.
    """

    recipe: Recipe
    images: int
    step_seconds: tuple[float, float]
    memory: dict[str, float]
    available: float
    changes: dict[str, float]
    what: tuple[str, ...]
    measuring: float = 0.0

    @property
    def seconds(self) -> float:
        """Of all of it but the steps from kept features, which take little."""
        heads, encoder = self.step_seconds
        steps, kept = self.recipe.head_steps, self.recipe.cached_views
        if kept:
            steps = min(steps, kept * (self.images // self.recipe.batch))
        return heads * steps + encoder * self.recipe.steps + self.measuring

    @property
    def bytes(self) -> float:
        """Of everything together."""
        return NOT_COUNTED * sum(self.memory.values())

    @property
    def fits(self) -> bool:
        """Whether the memory is there."""
        return self.bytes <= self.available

    def __str__(self) -> str:
        heads, encoder = self.step_seconds
        parts = ", ".join(f"{name} {amount(size)}" for name, size in self.memory.items())
        took = (
            f"about {duration(self.seconds)} ({heads:.2g} s a step of stage 2, {encoder:.2g} s of "
            "stage 3; a few were timed here)"
        )
        lines = [
            *self.what,
            f"time     {'unknown: no step fits' if math.isnan(encoder) else took}",
            f"memory   about {amount(self.bytes)} of {amount(self.available)}:",
            f"         {parts}",
        ]
        if not self.fits:
            lines.append("         this will probably not fit; it would need")
            lines += [f"           {amount(size)} with {how}" for how, size in self.changes.items()]
        return "\n".join(lines)


def plan(
    model: Encoder,
    images,
    *,
    recipe: Recipe | None = None,
    groups=None,
    device: str | torch.device | None = None,
    available: float | None = None,
) -> Plan:
    """Says what :func:`refiner.training.refining.refine` with the same arguments will do and need.

    Takes a few steps on copies; nothing of what it is given changes. They are not compiled: a
    recipe with ``compile`` takes less time than foretold.

    Args:
        model, images, recipe, groups, device: as for :func:`refiner.training.refining.refine`.
        available: bytes of memory to plan for; default the device's.

    Raises:
        ValueError: for data or recipes that do not fit together, as ``refine`` does.
    """
    device = parallel.join(device)
    recipe = complete_recipe(recipe, model, images)
    groups = groups_of(images, groups)
    check_groups(recipe, groups)
    what = (*describe(model, images, recipe), *in_groups(recipe, groups))
    keeper = keeper_of(recipe, model, images, device, groups)
    if keeper:
        kept = f"keeps    the best weights, measured {TIMES} times on {len(keeper.held)} images"
        what = (*what, kept)
    n = count(images)
    images = some(images, recipe.batch)
    if available is None:
        _free(device)  # what earlier runs of this process have left is there for this one
        available = float(parallel.average(torch.tensor(_available(device), device=device)))
    memory, changes = _memory(model, images, recipe, device), {}

    def needed(other: Recipe) -> float:
        return NOT_COUNTED * sum(_memory(model, images, other, device).values())

    too_large = NOT_COUNTED * sum(memory.values()) > available

    def fits(batch: int) -> bool:
        return not too_large or needed(replace(recipe, batch=batch)) <= available

    if too_large:
        changes = {how: needed(x) for how, x in smaller(recipe, len(model.blocks)).items()}
    seconds = _step_seconds(model, images, recipe, device, fits=fits)
    measuring = _measuring(keeper, seconds[0]) if keeper else 0.0
    return Plan(recipe, n, seconds, memory, available, changes, what, measuring)


def smaller(recipe: Recipe, depth: int) -> dict[str, Recipe]:
    """What to change to need less memory, the mildest first; all of it at last."""
    blocks, half = recipe.blocks, min(depth // 2, recipe.blocks[0] - 1)  # heads stay above it
    fewer = blocks[::-2][::-1] if len(blocks) > 1 else blocks  # every other, with the last
    changes: dict[str, dict] = {"checkpoint=True": {"checkpoint": True}}
    if recipe.frozen_blocks < half:
        changes[f"frozen_blocks={half}"] = {"frozen_blocks": half}
    if len(fewer) < len(blocks) and isinstance(recipe.pooling, str):
        changes[f"blocks={fewer}"] = {"blocks": fewer}
    changes[f"batch={recipe.batch // 2}"] = {"batch": recipe.batch // 2}
    everything = {k: v for change in changes.values() for k, v in change.items()}
    changes["all of these"] = everything
    return {how: replace(recipe, **change) for how, change in changes.items()}


# ---------------------------------------------------------------- in words


def describe(model: Encoder, images, recipe: Recipe) -> list[str]:
    """The recipe as lines of text."""
    n, depth = count(images), len(model.blocks)
    where = [str(b) if b < depth else f"{b} (the final output)" for b in recipe.blocks]
    sizes = [v.size for v in recipe.views]
    named = {size: "×".join(map(str, dict.fromkeys(sides(size)))) for size in sizes}
    views = ", ".join(f"{sizes.count(size)} of {name} px" for size, name in named.items())

    def epochs(steps: int) -> str:
        count = steps * recipe.batch / n if n else 0
        shown = f"{count:,.0f}" if count >= 100 else f"{count:.3g}"
        return f"{steps} steps" + (f", {shown} epochs" if n else "")

    frozen = f", first {recipe.frozen_blocks} blocks frozen" if recipe.frozen_blocks else ""
    many = parallel.world()
    return [
        f"model    {model.refiner_card.get('name', 'unnamed')}: {depth} blocks of width "
        f"{model.embed_dim}",
        f"data     {in_words(images)}; views: {views}",
        f"heads    on blocks {', '.join(where)}; pooling {recipe.pooling}",
        f"stage 2  heads only: {epochs(recipe.head_steps)} of batch {recipe.batch}"
        + (f" on {many} processes" if many > 1 else "")
        + (f", views of {recipe.cached_views} epochs" if recipe.cached_views else ""),
        f"stage 3  encoder and heads: {epochs(recipe.steps)}{frozen}",
        f"targets  {_swapping(recipe)}; temperature {recipe.temperature}, queue {recipe.queue}, "
        f"one of the {recipe.top_k} nearest",
    ]


def in_groups(recipe: Recipe, groups: torch.Tensor | None) -> list[str]:
    """How batches are made of groups, as a line of text; none without groups."""
    if groups is None:
        return []
    sizes, a = torch.bincount(groups), recipe.groups_a_step
    batches = f"{a} a step, {recipe.batch // a} images of each" if a else "mixed in every batch"
    where = "the own group" if recipe.neighbors_from == "own" else recipe.neighbors_from
    return [
        f"groups   {len(sizes)} of {int(sizes.min())} to {int(sizes.max())} images, {batches}; "
        f"neighbors from {where}"
    ]


def _swapping(recipe: Recipe) -> str:
    if recipe.swap == "none":
        return "plain instance discrimination, no neighbors"
    name = "NNA" if recipe.swap == "neighbor" else "NNCLR's swap of both roles"
    if recipe.swap_full <= 0:
        return name
    if recipe.swap_from == recipe.swap_full:
        return f"{name}, from {recipe.swap_full:.0%} of stage 3 on"
    return f"{name}, growing from {recipe.swap_from:.0%} to {recipe.swap_full:.0%} of stage 3"


# ---------------------------------------------------------------- memory


def memory_needed(model: Encoder, images, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """Bytes one process needs at the peak of stage 3, by what needs them.

    Weights, their average, gradients and AdamW's two averages in float32; the images, where a copy
    of them is kept on the device; activations as a few images leave them; the loss's products of
    all pairs and the lookup's similarities by their shapes.
    """
    run = begin(model, replace(recipe, queue=min(recipe.queue, 64), compile=False), device)
    freeze_first(run.model, recipe.frozen_blocks)
    weights = list(run.model.parameters())
    trained = sum(p.numel() for p in weights if p.requires_grad)
    t, v, g = len(recipe.blocks), len(recipe.views), recipe.global_views
    own, channels = recipe.batch // parallel.world(), channels_of(model)
    image, copies = activations(run, images, device)
    if recipe.checkpoint:  # one block at a time is there in full, for views of one size
        plain = replace(run, recipe=replace(run.recipe, checkpoint=False))
        whole, all_copies = activations(plain, images, device)
        blocks = max(1, len(model.blocks) - recipe.frozen_blocks)
        image += (whole - image) / blocks * _largest_share(recipe)
        copies += (all_copies - copies) / blocks
    kept = {}
    if recipe.cached_views:
        kept["features"] = 4.0 * recipe.cached_views * len(images) * t * v * model.embed_dim
    if resident := _resident(images, device):
        kept["images"] = resident
    return kept | {
        "encoder": 4.0 * (2 * sum(p.numel() for p in weights) + 3 * trained),
        "heads": 16.0 * sum(p.numel() for p in run.heads.parameters()),
        "queue": 4.0 * recipe.queue * recipe.out * t,
        "views": 4.0 * own * sum(channels * view.pixels for view in recipe.views),
        "activations": own * image + copies,
        "pairs of views": 4.0 * 3 * t * g * v * own * recipe.batch,
        "lookup": 4.0 * t * g * own * recipe.queue,
    }


def _memory(model: Encoder, images, recipe: Recipe, device: torch.device) -> dict[str, float]:
    """As :func:`memory_needed`; where the device is too small even to look, it looks on the CPU."""
    try:
        return memory_needed(model, images, recipe, device)
    except torch.OutOfMemoryError:
        if parallel.world() > 1:  # the others wait for this process in the midst of a step
            raise
    _free(device)
    found = memory_needed(model, images, recipe, torch.device("cpu"))
    return found | {"images": _resident(images, device)}


def _resident(images, device: torch.device) -> float:
    """Bytes of the copy of all images that a run keeps on the device.

    None where they lie there already, or are read from files, batch by batch.
    """
    pixels = pixels_of(images)
    copied = isinstance(pixels, torch.Tensor) and pixels.device.type != device.type
    return float(pixels.nbytes) if copied else 0.0


def _largest_share(recipe: Recipe) -> float:
    """Of all pixels, those in the views that share a forward pass and are the most."""
    pixels: dict[tuple[int, float], float] = {}
    for v in recipe.views:
        key = (v.size, v.keep)
        pixels[key] = pixels.get(key, 0.0) + v.pixels * v.keep
    return max(pixels.values()) / sum(pixels.values())


def activations(run: Refined, images, device: torch.device) -> tuple[float, float]:
    """What the forward pass of stage 3 keeps for the backward pass: bytes an image, and bytes
    whatever the batch, such as a GPU's copies of the weights in bfloat16."""
    two, four = (saved_bytes(run, images, device, n) for n in (2, 4))
    image = (four - two) / 2
    return image, max(0.0, two - 2 * image)


def saved_bytes(run: Refined, images, device: torch.device, n: int) -> float:
    """Bytes that the forward pass of stage 3 keeps for the backward pass of n images."""
    weights = [*run.model.parameters(), *run.heads.parameters()]
    held = {id(s): s for s in (p.untyped_storage() for p in weights)}
    kept: dict[int, torch.UntypedStorage] = {}  # views share theirs, which is counted once

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if id(storage) not in held:
            kept[id(storage)] = storage
        return x

    pixels = pixels_of(images)
    pixels = take(pixels, torch.arange(n) % len(pixels), device)
    ids = torch.arange(n * parallel.world(), device=device)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast(device):
        how = {"stage": 3, "swap_chance": 1.0, "generator": step_generator(0, 0, device)}
        refine_step(run.model.train(), run.heads, run.queue, pixels, ids, run.recipe, **how)
    return float(sum(storage.nbytes() for storage in kept.values()))


def _available(device: torch.device) -> float:
    if device.type == "cuda":
        return float(torch.cuda.mem_get_info(device)[0])
    return float(psutil.virtual_memory().total)


# ---------------------------------------------------------------- time


def _step_seconds(
    model: Encoder,
    images,
    recipe: Recipe,
    device: torch.device,
    *,
    fits: Callable[[int], bool] = lambda batch: True,
    patience: float = 4.0,
) -> tuple[float, float]:
    """Seconds of a step of each stage; NaN if not even the smallest batch fits.

    Batches grow fourfold until they are whole, take too long or would not fit; a straight line
    through the last two then leads to the whole.
    """
    batch = min(recipe.batch, 4 * parallel.world())
    points: list[tuple[int, torch.Tensor]] = []
    while True:
        took = _timed_if_it_fits(
            model, images, replace(recipe, batch=batch), device, rounds=1 if points else 2
        )
        if took is None:
            break
        points.append((batch, took))
        larger = min(recipe.batch, 4 * batch)
        if batch == recipe.batch or took.sum() > patience or not fits(larger):
            break
        batch = larger
    if not points:
        return math.nan, math.nan
    (b, last), (a, before) = points[-1], points[-2] if len(points) > 1 else (0, torch.zeros(2))
    slope = ((last - before) / (b - a)).clamp(min=0)
    return tuple((last + slope * (recipe.batch - b)).tolist())


def _measuring(keeper: Keeper, step: float) -> float:
    """Seconds of all measuring, by the forward passes of a step of stage 2."""
    recipe, model = keeper.recipe, keeper.model
    pixels = math.prod(sides(model.refiner_card["preprocessing"]["size"]))
    images = recipe.batch / parallel.world() * sum(v.keep * v.pixels for v in recipe.views)
    trained = 1 - recipe.frozen_blocks / len(model.blocks)
    return step * pixels / images * TIMES * trained * (len(keeper.bank) + len(keeper.held))


def _timed_if_it_fits(model, images, recipe: Recipe, device, *, rounds: int) -> torch.Tensor | None:
    """As :func:`_timed`, or None without the memory for it; leaves the device as it was."""
    try:
        return _timed(model, images, recipe, device, rounds=rounds)
    except torch.OutOfMemoryError:
        if parallel.world() > 1:  # the others wait for this process in the midst of the step
            raise
        return None
    finally:
        _free(device)


def _timed(model, images, recipe: Recipe, device, *, rounds: int) -> torch.Tensor:
    """The last round's seconds of one step of stage 2 and one of stage 3, on the CPU."""
    # A whole epoch of features would be kept, and every batch compiled, for longer than it takes.
    recipe = replace(recipe, cached_views=0, compile=False)
    loop = loop_of(Steps(begin(model, recipe, device), images, device))
    seconds = [0.0, 0.0]
    try:
        for _ in range(rounds):
            for stage in (2, 3):
                _finish(device)
                began = time.monotonic()
                loop.one_step(stage, 0)
                _finish(device)
                seconds[stage - 2] = time.monotonic() - began
    finally:
        loop.source.close()
    # All processes have to come to the same decisions.
    return parallel.average(torch.tensor(seconds, device=device)).cpu()


def _free(device: torch.device) -> None:
    """Gives memory that nobody uses back to the GPU, where the next batch needs it."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# ---------------------------------------------------------------- several processes


def traffic(recipe: Recipe, trained: int, world: int) -> dict[str, float]:
    """Bytes that each process hands to the others in a step of stage 3, by kind of exchange.

    Args:
        recipe: with its blocks filled in.
        trained: numbers that get a gradient, the heads' included.
        world: processes.

    Returns:
        ``all_gather``: predictions, projections for the queue, statistics of the heads' five
        BatchNorms; ``reduce_scatter``: gradients of the predictions that belong to each process;
        ``all_reduce``: gradients of the weights and the BatchNorms' means of gradients. All are
        float32, as on a CPU; on a GPU the predictions travel in bfloat16, half of it.
    """
    t, v, own = len(recipe.blocks), len(recipe.views), recipe.batch // world
    widths = 2 * recipe.hidden + recipe.predictor_hidden + 2 * recipe.out
    statistics, predictions = 4.0 * 2 * t * widths, 4.0 * t * v * own * recipe.out
    return {
        "all_gather": predictions + predictions / v + statistics,
        "reduce_scatter": predictions,
        "all_reduce": 4.0 * trained + statistics,
    }
