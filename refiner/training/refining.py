"""MIM-Refiner: turn a masked-image model into one whose last blocks know what they see.

Alkin et al. 2025, arXiv 2402.10093. Instance-discrimination heads are attached to several late
blocks. Stage 2 trains the heads on the frozen encoder (stage 1 was the masked pretraining);
stage 3 trains the encoder with them. A step (views → blocks → heads → NNA loss; the queue feeds
neighbors) is in :mod:`refiner.training.step`. What is done is decided in
:mod:`refiner.training.recipe`; several processes share it by :mod:`refiner.base.parallel`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.files import one_run_a_folder, write_json
from refiner.base.places import machine
from refiner.base.tensors import step_generator
from refiner.images.channels import fit_channels
from refiner.images.sources import count, open_source
from refiner.models.encoders import Encoder, allow_any_size, freeze_first
from refiner.models.load import copy_model
from refiner.models.save import check_savable, save_model
from refiner.training.groups import GroupedOrder, check_groups, groups_of
from refiner.training.heads import (
    IDHeads,
    NeighborQueue,
    check_ids,
    copy_weights,
    fresh_heads,
    save_heads,
)
from refiner.training.keeping import Keeper, Verdict, keeper_of
from refiner.training.loop import (
    EMA,
    Loop,
    Stage,
    Stop,
    autocast,
    batch_indices,
    compile_blocks,
    layer_groups,
    repeated_indices,
)
from refiner.training.recipe import (
    Recipe,
    complete_recipe,
    head_loss_weights,
    recipe_dict,
    recipe_from,
    swap_chance,
)
from refiner.training.states import origin
from refiner.training.step import batch_features, refine_step
from refiner.training.watch import CollapseGuard

# What a resumed run may do otherwise than before, as after a loss that was not finite.
CHANGEABLE = ("lr", "head_lr", "clip", "checkpoint", "compile")


# ---------------------------------------------------------------- the two stages


@dataclass
class Refined:
    """What :func:`refine` returns.

    Attributes:
        model: the refined encoder (averaged weights), eval mode; the input model is untouched.
        heads: the trained heads.
        queue: the neighbor queue as it was at the end.
        history: one dict per logged step: stage, step, loss, similarity, age, spread (see
            :class:`Step`) and neighbor_accuracy per head (None without labels), lr, seconds, and
            what ``evaluate`` returned.
        recipe: with blocks and pooling filled in.
        steps: taken in both stages together; fewer than the recipe's where the run was stopped.
        verdict: whether to keep the refined model, in a sentence; None unless the recipe's ``keep``
            is "best", and before stage 3.
    """

    model: Encoder
    heads: IDHeads
    queue: NeighborQueue
    recipe: Recipe
    history: list[dict] = field(default_factory=list)
    steps: int = 0
    verdict: Verdict | None = None


@one_run_a_folder
def refine(
    model: Encoder,
    images,
    *,
    recipe: Recipe | None = None,
    groups=None,
    out: str | Path | None = None,
    resume: bool = False,
    evaluate: Callable[[Encoder], dict] | None = None,
    evaluate_every: int = 0,
    watch: Sequence[Callable[[list[dict]], None]] = (),
    save_every: int | None = None,
    log_every: int = 10,
    stop: Stop = None,
    heads: IDHeads | None = None,
    queue: NeighborQueue | None = None,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> Refined:
    """Refines a masked-image model with ID heads and Nearest Neighbor Alignment.

    Called in several processes at once (``accelerate launch``, ``torchrun``, or accelerate's
    ``notebook_launcher``), with the same arguments in each, they share every batch and end with the
    same model; the first one writes.

    Args:
        model: an encoder with a ``refiner_card`` (any but a Hiera); it is copied, not changed.
        images: an ImageSet, uint8 [N, C, H, W], or an ImageStream (:mod:`refiner.images.streams`).
            Labels are only used to watch the neighbors, and to choose the weights that are kept.
        recipe: default :meth:`Recipe.cpu`; for other than three channels with its views "channels".
        groups: which group (lab, microscope, season) each image comes from, for batches of one
            group: the name of a factor, "class", or N numbers or words; see
            :mod:`refiner.training.groups`.
        out: folder for the refined model, heads, ``history.json`` and the last two training
            states. The state of an earlier run there becomes ``state.old.pt``.
        resume: go on from the state in ``out``, with the same model and images; ``lr``,
            ``head_lr``, ``clip``, ``checkpoint`` and ``compile`` may be others than before.
        evaluate: called with the averaged encoder; its dict of numbers goes into the history
            (:func:`refiner.training.watch.online_knn` makes one), with None for what is not finite.
        evaluate_every: steps of stage 3 between evaluations, which are logged too; 0: never.
        watch: each is called with the history after every logged step
            (:class:`refiner.visuals.live.LiveFigure`, :class:`refiner.training.watch.TensorBoard`).
        save_every: steps between saved states; by default every 100th, if the last was a minute
            ago. The last step is always saved.
        log_every: steps.
        stop: ends the run early: a function that is asked before each step (True stops), or a
            moment of ``time.monotonic()``. The average of that moment is returned and saved;
            ``resume`` goes on from there. Of several processes the first is asked.
        heads, queue: trained ones to go on from, such as :func:`refiner.load_heads`
            gives, instead of fresh heads and an empty queue; they are copied.
        device: default CUDA if there is one, else CPU.
        progress: show a bar with the loss, the neighbors' accuracy and the remaining time.

    Returns:
        A :class:`Refined`.

    Raises:
        ValueError: for data, recipes, heads or a queue that do not fit and, with ``out``, for a
            model that cannot be saved, before training starts.
        TypeError: when ``evaluate`` returns other things than numbers.
        FloatingPointError, refiner.training.watch.Collapse: when the loss is no longer finite, or
        all projections became the same; saved states stay.
    """
    device = parallel.join(device)
    if evaluate_every and evaluate is None:
        raise UserError(
            "evaluate_every needs an evaluate, such as refiner.training.watch.online_knn makes"
        )
    recipe = complete_recipe(recipe, model, images)
    model, groups = fit_channels(model, images), groups_of(images, groups)
    check_groups(recipe, groups)
    if not recipe.head_steps + recipe.steps:
        raise UserError("head_steps and steps are both 0: there is nothing to train")
    run = begin(model, recipe, device, heads=heads, queue=queue)
    check_ids(run.queue, images)
    if out:
        check_savable(run.model)
    keeper = keeper_of(recipe, model, images, device, groups)
    options = {"evaluate": evaluate, "evaluate_every": evaluate_every, "watch": watch}
    options |= {"save_every": save_every, "log_every": log_every, "stop": stop}
    options["file"] = Path(out) / "state.pt" if out else None
    options["origin"] = origin(images, model, groups=groups) if out or resume else None
    steps = Steps(run, images, device, groups, keeper and keeper.used)
    loop = loop_of(steps, keeper=keeper, **options)
    loop.run("refining", resume=resume, progress=progress)
    run.model, run.history, run.steps = loop.ema.module, loop.history, loop.done
    run.verdict = _verdict(run, keeper, progress and parallel.rank() == 0)
    if out and parallel.rank() == 0:
        save_refined(run, Path(out), model)
    parallel.wait()
    return run


def _verdict(run: Refined, keeper: Keeper | None, progress: bool) -> Verdict | None:
    """On a run that took steps of stage 3, if it has a keeper; the model gets its best weights."""
    step = run.steps - run.recipe.head_steps
    return keeper.decide(step, run.model, progress=progress) if keeper and step > 0 else None


def begin(
    model: Encoder,
    recipe: Recipe,
    device: torch.device,
    *,
    heads: IDHeads | None = None,
    queue: NeighborQueue | None = None,
) -> Refined:
    """A run before its first step: copies of the encoder and of the heads and queue, if given.

    Without them the heads are fresh and the queue is empty.

    Raises:
        ValueError: for heads or a queue of other sizes than the recipe's.
    """
    student = allow_any_size(copy_model(model)).to(device).eval()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        new_heads, new_queue = fresh_heads(recipe, student.embed_dim)
    for name, new, given in (("heads", new_heads, heads), ("queue", new_queue, queue)):
        if given is not None:
            copy_weights(name, given, new)
    if recipe.compile:
        compile_blocks(student.blocks)
    return Refined(student, new_heads.to(device).train(), new_queue.to(device), recipe)


def loop_of(steps: Steps, **options) -> Loop:
    """The loop of both stages: stage 2 trains the heads, stage 3 the encoder with them.

    Args:
        steps: what takes the steps.
        **options: others of :class:`refiner.training.loop.Loop`.
    """
    run, recipe = steps.run, steps.run.recipe

    def stage(number: int, count: int, lr: float, warmup: float) -> Stage:
        first = int(warmup * count + 1e-6)  # 4 / 30 of 30 epochs are 4, rounding or not
        take, peak = partial(steps.take, number), lr * (recipe.batch / 256)
        return Stage(count, take, _optimizer(run, number), peak, first, averaged=number == 3)

    early = recipe.warmup if recipe.head_warmup is None else recipe.head_warmup
    stages = {2: stage(2, recipe.head_steps, recipe.head_lr, early)}
    stages[3] = stage(3, recipe.steps, recipe.lr, recipe.warmup)
    parts = {"model": run.model, "heads": run.heads, "queue": run.queue}
    where = steps.source, steps.device, recipe, recipe_dict, recipe_from, CHANGEABLE
    options |= {"ema": EMA(run.model, recipe.ema), "clip": recipe.clip, "shown": _shown}
    guard = CollapseGuard(recipe, options.get("file"))
    return Loop(parts, stages, *where, guard=guard, **options)


def _shown(entry: dict) -> dict:
    """What the bar shows of an entry."""
    shown = {"stage": entry["stage"], "loss": f"{sum(entry['loss']) / len(entry['loss']):.3f}"}
    if entry["neighbor_accuracy"] is not None:
        shown["neighbors right"] = f"{entry['neighbor_accuracy'][-1]:.0%}"
    if "held_out" in entry:
        shown["held out"] = f"{entry['held_out']:.4g}"
    return shown


class Steps:
    """What takes a step of either stage: a batch's images in, its loss out.

    Args:
        run: of :func:`begin`.
        images: as for :func:`refine`.
        device: of both.
        groups: of :func:`refiner.training.groups.groups_of`.
        used: positions of the images that are trained on; default all.
    """

    def __init__(
        self,
        run: Refined,
        images,
        device: torch.device,
        groups: Tensor | None = None,
        used: Tensor | None = None,
    ):
        recipe, n = run.recipe, count(images) if used is None else len(used)
        self.run, self.device, self.n = run, device, count(images)
        self.epoch_steps = n // recipe.batch
        self.order = partial(_indices, recipe, n)
        if groups is not None and recipe.groups_a_step:
            self.order = GroupedOrder(groups if used is None else groups[used], recipe)
        if used is not None:
            self.order = partial(_among, used, self.order)
        self.groups = None if groups is None else groups.to(device)
        how = {"batch": recipe.batch, "steps": recipe.head_steps + recipe.steps}
        how |= {"device": device, "seed": recipe.seed}
        self.source = open_source(images, self.order, **how)
        labels = getattr(images, "labels", None)
        self.labels = None if labels is None else labels.to(device)
        self.kept_KNLVD: Tensor | None = None  # K epochs' features of N images
        self.kept_steps: set[int] = set()

    def take(self, stage: int, step: int) -> tuple[Tensor, dict[str, Tensor | None]]:
        """A step of a stage: its loss, summed over the heads, and a :class:`Step` to be logged."""
        run, recipe = self.run, self.run.recipe
        run.model.train(stage == 3)
        at = step if stage == 2 else recipe.head_steps + step
        pixels = features = weights = None
        with autocast(self.device):
            if stage == 2 and recipe.cached_views:
                features, ids = self.kept_features(at)
            else:
                pixels, ids = self.source.batch(at)
            how = {"stage": stage, "generator": self.generator(at), "features": features}
            how["swap_chance"] = 1.0 if stage == 2 else swap_chance(recipe, step)
            how |= {"labels": self.labels, "groups": self.groups}
            result = refine_step(run.model, run.heads, run.queue, pixels, ids, recipe, **how)
        loss_L = result.loss
        if stage == 3:
            self.kept_KNLVD, weights = None, head_loss_weights(recipe, step)
        if weights is not None:
            loss_L = loss_L * torch.tensor(weights).to(loss_L.device, non_blocking=True)
        return loss_L.sum(), vars(result)

    def generator(self, step: int) -> torch.Generator:
        return step_generator(self.run.recipe.seed, step, self.device)

    def kept_features(self, step: int) -> tuple[Tensor, Tensor]:
        """Features [L, V, b, D] of a step's views and the batch's ids, computed or found again."""
        recipe, per_epoch = self.run.recipe, self.epoch_steps
        epoch = step // per_epoch
        if epoch < recipe.cached_views:
            return self.keep_features(step)
        for earlier in range(recipe.cached_views * per_epoch):
            if earlier not in self.kept_steps:  # in a resumed run
                self.keep_features(earlier)
        first, own = parallel.rows(recipe.batch)
        ids = self.order(step).to(self.device, non_blocking=True)
        x_BLVD = self.kept_KNLVD[epoch % recipe.cached_views, ids[first : first + own]]
        return x_BLVD.permute(1, 2, 0, 3), ids

    def keep_features(self, step: int) -> tuple[Tensor, Tensor]:
        recipe = self.run.recipe
        pixels, ids = self.source.batch(step)
        x_LVBD = batch_features(
            self.run.model, pixels, recipe, stage=2, total=len(ids), generator=self.generator(step)
        )
        l, v, _, d = x_LVBD.shape
        if self.kept_KNLVD is None:
            self.kept_KNLVD = x_LVBD.new_empty(recipe.cached_views, self.n, l, v, d)
        everyone = parallel.gather(x_LVBD, dim=2).permute(2, 0, 1, 3)
        self.kept_KNLVD[step // self.epoch_steps, ids] = everyone
        self.kept_steps.add(step)
        return x_LVBD, ids


def _among(used: Tensor, order: Callable[[int], Tensor], step: int) -> Tensor:
    """The batch of a step whose order is one of the images at some positions."""
    return used[order(step)]


def _indices(recipe: Recipe, n: int, step: int) -> Tensor:
    """Which of n images are the batch of a step."""
    if recipe.cached_views and step < recipe.head_steps:
        return repeated_indices(
            n, recipe.batch, seed=recipe.seed, step=step, epochs=recipe.cached_views
        )
    return batch_indices(n, recipe.batch, seed=recipe.seed, step=step)


def _optimizer(run: Refined, stage: int) -> torch.optim.Optimizer:
    """The heads' and, in stage 3, the encoder's with layer-wise decay below them."""
    recipe, model, groups = run.recipe, run.model, []
    if stage == 3:
        freeze_first(model, recipe.frozen_blocks)
        groups = layer_groups(
            model, recipe.weight_decay, recipe.layer_decay, decay_last=recipe.decay_last
        )
    heads = {"params": list(run.heads.parameters()), "weight_decay": recipe.head_weight_decay}
    return torch.optim.AdamW([*groups, heads], lr=recipe.lr, betas=(0.9, 0.95), fused=True)


def save_refined(run: Refined, out: Path, origin: Encoder) -> None:
    """Writes encoder, card, heads with their queue, and history of a run into a folder."""
    card = run.model.refiner_card
    card |= {
        "name": out.name,
        "method": "MIM-Refiner (Alkin et al. 2025, arXiv 2402.10093)",
        "refined_from": origin.refiner_card.get("name", "unknown"),
        "refine_recipe": recipe_dict(run.recipe),
        "machine": machine(),
        "seconds": run.history[-1]["seconds"] if run.history else 0.0,
    }
    for name in ("stopped_after_steps", "verdict", "held_out"):  # of what was refined
        card.pop(name, None)
    if run.steps < run.recipe.head_steps + run.recipe.steps:
        card["stopped_after_steps"] = run.steps
    if run.verdict:
        card |= {"verdict": str(run.verdict), "held_out": asdict(run.verdict)}
    save_model(run.model, out)
    save_heads(out / "heads.pt", run.heads, run.queue)
    write_json(out / "history.json", run.history)
