"""What pretraining and refining share: schedule, averaged weights, and state that survives a kill.

Every random draw of a step comes from ``step_generator(seed, step)`` and every batch from
``batch_indices(seed, step)``. Neither needs a stored random state, so a resumed run meets exactly
the batches, masks and views that an uninterrupted run meets.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn
from tqdm.auto import tqdm

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.files import fitting, naming
from refiner.base.settings import Count, Range, Whole, in_range, settings_from
from refiner.images.sources import Source, open_source
from refiner.training.keeping import Keeper
from refiner.training.states import (
    as_now,
    check_origin,
    check_recipe,
    load_state,
    save_state,
    set_states_aside,
)
from refiner.training.watch import Guard, plain_numbers

SAVE_EVERY, SAVE_SECONDS = 100, 60.0  # by default, both have to be over
Stop = Callable[[], bool] | float | None


def cosine_schedule(step: int, *, total: int, warmup: int, peak: float, floor: float = 1e-6):
    """Learning rate: linear warm-up to ``peak``, then half a cosine down to ``floor``.

    Args:
        step: the step about to be taken, from 0.
        total: steps of the whole run.
        warmup: steps of the linear part.

    Returns:
        The learning rate as a float (Loshchilov & Hutter 2017, as in MAE and MIM-Refiner).
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def batch_indices(n: int, batch: int, step: int, *, seed: int) -> Tensor:
    """Indices of the images of one step, int64 [batch].

    Each epoch is its own permutation of all n images; what does not fill a last batch is left to
    the next epoch's draw. A set smaller than a batch is an error upstream.
    """
    epoch, position = divmod(step, n // batch)
    order = _epoch_order(n, seed, epoch)
    return torch.from_numpy(order[position * batch : (position + 1) * batch].copy())


def shuffled(images, batch: int, steps: int, device: torch.device, seed: int) -> Source:
    """A source that gives the batches of :func:`batch_indices`."""
    order = partial(batch_indices, len(images), batch, seed=seed)
    return open_source(images, order, batch=batch, steps=steps, device=device)


def repeated_indices(n: int, batch: int, *, seed: int, step: int, epochs: int) -> Tensor:
    """Like :func:`batch_indices`, but epoch e holds the images of epoch e modulo ``epochs``.

    The first ``epochs`` are those of :func:`batch_indices`; later ones deal their images out anew.
    Only where n is no multiple of the batch do epochs differ in their images.
    """
    epoch, position = divmod(step, n // batch)
    if epoch < epochs:
        return batch_indices(n, batch, seed=seed, step=step)
    seen = _epoch_order(n, seed, epoch % epochs)[: n // batch * batch]
    order = np.random.default_rng([seed, epoch, 1]).permutation(len(seen))
    return torch.from_numpy(seen[order[position * batch : (position + 1) * batch]])


# Every step of an epoch asks for it, and shuffling a million images takes time.
@lru_cache(maxsize=4)
def _epoch_order(n: int, seed: int, epoch: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(n)


def autocast(device: torch.device):
    """bf16 products on a GPU, nothing on a CPU, where they would be slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


def layer_groups(
    model: nn.Module, weight_decay: float, layer_decay: float, *, decay_last: bool = False
) -> list[dict]:
    """AdamW's groups of an encoder with layer-wise decay of the rate, as timm makes them.

    Vectors, positions and tokens have no weight decay.

    Args:
        model: the encoder.
        weight_decay: of all else.
        layer_decay: each block's rate is this share of the next one's.
        decay_last: the last block's is below the final norm's. MIM-Refiner's authors count the norm
            as a layer (``LayerwiseLrDecayModifier``, after BEiT), timm counts it to that block.
    """
    how = {"weight_decay": weight_decay, "layer_decay": layer_decay}
    groups = param_groups_layer_decay(model, no_weight_decay_list=model.no_weight_decay(), **how)
    kept = [{key: group[key] for key in ("params", "weight_decay", "lr_scale")} for group in groups]
    return _below_the_norm(model, kept, layer_decay) if decay_last else kept


def _below_the_norm(model: nn.Module, groups: list[dict], decay: float) -> list[dict]:
    """Everything but the final norm one decay lower."""
    final = [getattr(model, name, None) for name in ("norm", "fc_norm")]
    ids = {id(p) for module in final if module is not None for p in module.parameters()}
    found = []
    for group in groups:
        norm = [p for p in group["params"] if id(p) in ids]
        below = [p for p in group["params"] if id(p) not in ids]
        if norm:
            found.append(group | {"params": norm, "lr_scale": 1.0})
        if below:
            found.append(group | {"params": below, "lr_scale": group["lr_scale"] * decay})
    return found


def compile_blocks(blocks: Iterable[nn.Module]) -> None:
    """Fuses each block by torch.compile, for every shape that it meets.

    Blocks share their code: one of them takes seconds, the others none. Shapes are fixed, as a
    graph for all sizes would be slower at each. Every size of the views, with and without
    gradients, is one of the graphs that torch would by default stop at eight of.
    """
    from torch import _dynamo

    _dynamo.config.recompile_limit = max(64, _dynamo.config.recompile_limit)
    for block in blocks:
        block.compile(dynamic=False)


def stopper(stop: Stop) -> Callable[[], bool]:
    """The question for before each step whether to stop; the first process answers for all.

    Args:
        stop: None for never, a function that says True to stop, or a moment of
            ``time.monotonic()``.
    """
    if stop is None:
        return lambda: False
    ask = stop if callable(stop) else lambda: time.monotonic() >= stop
    return lambda: parallel.first_decides(bool(ask()))


def save_is_due(done: int, total: int, every: int | None, saved: float) -> bool:
    """Whether to save after so many steps; the first process answers for all.

    Args:
        done, total: steps taken, and steps of the whole run; after the last one is always saved.
        every: steps between two saves. None saves after every 100th if the last was a minute ago:
            a state is large, and a GPU waits while it is written.
        saved: the moment of the last save, by ``time.monotonic()``.
    """
    if done == total:
        return True
    if every is not None:
        return done % every == 0
    if done % SAVE_EVERY:
        return False
    return parallel.first_decides(time.monotonic() - saved >= SAVE_SECONDS)


class EMA:
    """Exponential moving average of a module's weights, for evaluation; ``module`` has them.

    The decay grows with the number of updates t, so that a short run is not an average with its own
    starting point. timm's and torch's averages follow other rules there, which would change runs.

    Args:
        module: what is averaged; it is copied.
        decay: the largest decay.
        warmup: the decay at update t, while it is below the largest; by default TensorFlow's.
    """

    def __init__(
        self,
        module: nn.Module,
        decay: float,
        *,
        warmup: Callable[[int], float] = lambda t: (1 + t) / (10 + t),
    ):
        self.module = deepcopy(module).requires_grad_(True).eval()
        self.decay, self.warmup = decay, warmup

    @torch.no_grad()
    def update(self, module: nn.Module, t: int) -> None:
        """Moves the average towards the module, for the t-th time, counted from 1."""
        floats, news = [], []
        ours, theirs = self.module.state_dict().values(), module.state_dict().values()
        for average, value in zip(ours, theirs, strict=True):
            if value.dtype.is_floating_point:
                floats.append(average)
                news.append(value)
            else:
                average.copy_(value)
        torch._foreach_lerp_(floats, news, 1 - min(self.decay, self.warmup(t)))


# ---------------------------------------------------------------- the loop


@dataclass
class Stage:
    """Steps in a row with one optimiser and one schedule.

    Attributes:
        steps: how many.
        step: takes a step's number in the stage, from 0. Gives the scalar that is minimised, or
            None where it has left its gradients already, and what is logged: tensors of one shape,
            the "loss" among them, and None for what is not known.
        optimizer: the rates of its groups are the schedule's, times their ``lr_scale``.
        peak, warmup: of :func:`cosine_schedule`.
        averaged: whether its weights enter the average, and are evaluated.
    """

    steps: int
    step: Callable[[int], tuple[Tensor | None, dict[str, Tensor | None]]]
    optimizer: torch.optim.Optimizer | None
    peak: float
    warmup: int
    averaged: bool = True

    def set_rate(self, step: int) -> float:
        """Sets a step's learning rate and returns it, without any ``lr_scale``."""
        lr = cosine_schedule(step, total=self.steps, warmup=self.warmup, peak=self.peak)
        for group in self.optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1.0)
        return lr


@dataclass(eq=False)
class Loop:
    """The loop of every training: rate, gradients, average, log, guard, save, resume, stop.

    Attributes:
        parts: modules whose weights are saved, by their names in the state; the first is averaged.
        stages: by their numbers, in order. Entries of the history name it where there are several.
        source: of the images; the place where it reads on is saved.
        device: of everything.
        recipe: a dataclass that is saved; a resumed run's may differ in ``changeable`` only.
        write_recipe, read_recipe: to plain values and back; older ones get defaults. None checks
            them against the recipe's kind.
        origin: what the run starts from, see :func:`origin`.
        ema: the average.
        keeper: measures it at moments of its own.
        clip: largest norm of the gradient.
        file: of the state, beside which the one before is kept; without it nothing is saved.
        save_every: see :func:`save_is_due`.
        log_every: steps between two entries of the history.
        mean: entries have means over the steps since the last one, not the values of one step.
        stop: see :func:`stopper`.
        guard: looks at every entry, and at all weights before they are saved.
        watch: each is called with the history after every entry.
        evaluate, evaluate_every: see :func:`refiner.refine`.
        shown: what the bar shows of an entry.
    """

    parts: dict[str, nn.Module]
    stages: dict[int, Stage]
    source: Source
    device: torch.device
    recipe: object = None
    write_recipe: Callable[[object], dict] = asdict
    read_recipe: Callable[[dict], object] | None = None
    changeable: tuple[str, ...] = ()
    origin: dict | None = None
    ema: EMA | None = None
    keeper: Keeper | None = None
    clip: float | None = None
    file: Path | None = None
    save_every: int | None = None
    log_every: int = 10
    mean: bool = False
    stop: Stop = None
    guard: Guard | None = None
    watch: Sequence[Callable[[list[dict]], None]] = ()
    evaluate: Callable[[nn.Module], dict] | None = None
    evaluate_every: int = 0
    shown: Callable[[dict], dict] | None = None

    def __post_init__(self):
        self.save_every = in_range("save_every", self.save_every, Count | None)
        self.log_every = in_range("log_every", self.log_every, Count)
        self.evaluate_every = in_range("evaluate_every", self.evaluate_every, Whole)
        self.guard = self.guard or Guard(self.file)
        self.is_over = stopper(self.stop)
        self.history: list[dict] = []
        self.seen: list[dict] = []  # what the steps since the last entry gave
        self.done, self.total = 0, sum(stage.steps for stage in self.stages.values())
        self.before = 0.0  # seconds of the run that this one goes on from
        self.began = self.saved = time.monotonic()

    def run(self, name: str, *, resume: bool = False, progress: bool = True) -> None:
        """Takes all steps, or those that are left.

        Args:
            name: what the bar calls it.
            resume: go on from the state in ``file``; without, that of an earlier run is set aside.
            progress: show a bar.

        Raises:
            FileNotFoundError, ValueError: when there is nothing to go on from, or another run.
            FloatingPointError: when the loss or a weight is no longer finite.
        """
        hidden = not progress or parallel.rank() > 0
        try:
            self.begin(resume)
            how = {"total": self.total, "initial": self.done, "unit": "step", "disable": hidden}
            with tqdm(desc=name, mininterval=1.0, leave=None, **how) as bar:
                all(self.run_stage(number, bar) for number in self.stages)
        finally:
            self.source.close()

    def begin(self, resume: bool) -> None:
        """Takes the states of earlier runs up or out of the way."""
        if self.file and parallel.rank() == 0 and not resume:
            set_states_aside(self.file)
        if resume:
            self.restore()

    def run_stage(self, number: int, bar: tqdm) -> bool:
        """Takes a stage's steps; False when it was stopped before the last of them."""
        first, stage = self.first(number), self.stages[number]
        for step in range(max(self.done - first, 0), stage.steps):
            if self.is_over():
                self.save()
                return False
            lr = self.one_step(number, step)
            bar.update()
            self.look(number, step + 1, lr, bar)
            if save_is_due(self.done, self.total, self.save_every, self.saved):
                self.save()
        stage.optimizer = None  # its averages are as large as what it trained, twice
        return True

    def first(self, number: int) -> int:
        """How many steps come before a stage."""
        return sum(stage.steps for n, stage in self.stages.items() if n < number)

    def one_step(self, number: int, step: int) -> float:
        """Learns from one batch, in a step of a stage; the learning rate."""
        stage = self.stages[number]
        lr = stage.set_rate(step)
        objective, seen = stage.step(step)
        if objective is not None:
            stage.optimizer.zero_grad(set_to_none=True)
            objective.backward()
        parameters = [p for group in stage.optimizer.param_groups for p in group["params"]]
        parallel.average_gradients(parameters)
        if self.clip:
            nn.utils.clip_grad_norm_(parameters, self.clip)
        stage.optimizer.step()
        if self.ema and stage.averaged:
            self.ema.update(next(iter(self.parts.values())), step + 1)
        seen = {name: value if value is None else value.detach() for name, value in seen.items()}
        self.seen = [*(self.seen if self.mean else ()), seen]
        self.done = self.first(number) + step + 1
        return lr

    def look(self, number: int, step: int, lr: float, bar: tqdm) -> None:
        """Logs and evaluates where that is due; what is found belongs to its own step."""
        stage = self.stages[number]
        last = step == stage.steps
        evaluates = self.evaluate_every and stage.averaged
        due = evaluates and (step % self.evaluate_every == 0 or last)
        measured = self.keeper and stage.averaged and self.keeper.due(step)
        if step % self.log_every == 0 or last or due or measured:
            at = {"stage": number, "step": step} if len(self.stages) > 1 else {"step": step}
            self.log(at, lr, bar)
        if due and parallel.rank() == 0:
            self.history[-1] |= plain_numbers(self.evaluate(self.ema.module))
            self.ema.module.eval()
        if measured:
            self.history[-1] |= self.keeper.look(step, self.ema.module)
        if due or measured:
            self.tell(bar)

    def log(self, at: dict, lr: float, bar: tqdm) -> None:
        """Adds an entry to the history; on a GPU, here the host waits for the numbers."""
        names = [name for name, value in self.seen[-1].items() if value is not None]
        means = [torch.stack([s[name].float() for s in self.seen]).mean(0) for name in names]
        entry = at | dict.fromkeys(self.seen[-1])
        entry |= dict(zip(names, parallel.average(torch.stack(means)).tolist(), strict=True))
        entry |= {"lr": lr, "seconds": round(self.before + time.monotonic() - self.began, 3)}
        self.seen = []
        self.guard.check(entry)
        self.history.append(entry)
        self.tell(bar)

    def tell(self, bar: tqdm) -> None:
        """Shows the newest entry, and hands the history to those who watch."""
        entry = self.history[-1]
        mean = torch.tensor(entry["loss"]).mean()
        bar.set_postfix(self.shown(entry) if self.shown else {"loss": f"{mean:.4f}"})
        for watcher in self.watch if parallel.rank() == 0 else ():
            watcher(self.history)

    def save(self) -> None:
        """Writes the state, if all weights are good."""
        if self.file is None:
            return
        self.guard.check_weights(self.done, *self.parts.values())
        place, self.saved = self.source.state(self.done), time.monotonic()
        if parallel.rank():
            return
        optimizers = {str(n): s.optimizer for n, s in self.stages.items() if s.optimizer}
        state = {
            "done": self.done,
            "source": place,
            "origin": self.origin,
            "recipe": self.write_recipe(self.recipe),
            **{name: module.state_dict() for name, module in self.parts.items()},
            "ema": self.ema and self.ema.module.state_dict(),
            "keeper": self.keeper and self.keeper.state(),
            "optimizers": {n: optimizer.state_dict() for n, optimizer in optimizers.items()},
            "history": self.history,
            "seen": self.seen if self.mean else [],
        }
        save_state(self.file, state, keep_previous=True)
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Goes on from the state in the file, if it is that of the same run."""
        file = self.file or Path("state.pt")
        state = load_state(file)
        with fitting(file), naming(file):
            state = as_now(state)
            if missing := [name for name in self.parts if name not in state]:
                raise UserError(f"it holds no {', '.join(missing)}: it is of another command")
            read = self.read_recipe or partial(settings_from, type(self.recipe))
            saved = read(state["recipe"])
        check_recipe(saved, self.recipe, self.changeable, file.parent)
        with fitting(file):
            check_origin(state.get("origin"), self.origin, file.parent)
            with naming(file):
                in_range("done", state["done"], Annotated[int, Range(0, self.total)])
            self.take_up(state)

    def take_up(self, state: dict) -> None:
        """Goes on from a state of this run."""
        for name, module in self.parts.items():
            module.load_state_dict(state[name])
        if self.ema:
            self.ema.module.load_state_dict(state["ema"])
        if self.keeper:
            self.keeper.restore(state["keeper"])
        for number, saved in state["optimizers"].items():
            optimizer = self.stages[int(number)].optimizer
            optimizer.load_state_dict(saved)
            check_averages(optimizer)
        json.dumps(state["history"], allow_nan=False)  # as it will be written at the end
        self.history[:], self.done = state["history"], state["done"]
        self.seen = [{k: v.to(self.device) for k, v in seen.items()} for seen in state["seen"]]
        self.before = float(self.history[-1]["seconds"]) if self.history else 0.0
        self.source.restore(state["source"])


def check_averages(optimizer: torch.optim.Optimizer) -> None:
    """Makes sure that an optimiser can step on from what it has loaded.

    Raises:
        ValueError: when its averages have other shapes than what they belong to.
    """
    for weight, averages in optimizer.state.items():
        shapes = [averages[name].shape for name in ("exp_avg", "exp_avg_sq")]
        if shapes != [weight.shape] * 2 or averages["step"].numel() != 1:
            raise ValueError("the averages of the optimiser have other shapes than the weights")
