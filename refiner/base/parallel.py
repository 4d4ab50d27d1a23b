"""Several processes that take one step together, on one machine or many.

``accelerate launch -m refiner refine …`` (or torchrun) starts the processes; :func:`join` makes
them one group. Each has its rows of the same global batch, and everything that looks across samples
is exchanged, so that W processes take the step that one process takes with the whole batch:

* predictions, gathered with their gradient: every target meets every negative;
* mean and variance of each BatchNorm, one exchange a layer for all heads;
* projections for the queue, which stays identical everywhere;
* gradients, averaged at the end in a few large pieces.

With one process every function returns what it got.

Shape legend: W processes, B samples of the global batch, b = B / W of them here.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import lru_cache

import torch
import torch.distributed as dist
from torch import Tensor

from refiner.base.errors import UserError

# How many processes a launcher has started: torchrun and accelerate, Open MPI, Intel's, MVAPICH2.
WORLD_SIZES = ("WORLD_SIZE", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE")
CPU_ONLY = "ACCELERATE_USE_CPU"
_alone = False  # see alone()


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process trains by itself, however many there are: nothing is exchanged."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


def world() -> int:
    """How many processes share a step."""
    if _alone:
        return 1
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0; number 0 writes the files and talks."""
    return dist.get_rank() if world() > 1 else 0


def join(device: str | torch.device | None = None) -> torch.device:
    """Joins the processes that a launcher started, if one did, and gives this one's device.

    Raises:
        ValueError: for a device that is not here, and for processes that were not started.
    """
    check_device(device)
    cpu = not torch.cuda.is_available() if device is None else torch.device(device).type == "cpu"
    started = [int(os.environ[name]) for name in WORLD_SIZES if name in os.environ]
    if not started and "MASTER_ADDR" in os.environ and os.environ.get(CPU_ONLY) == "True":
        raise UserError(
            "without MPI, accelerate launch --cpu starts one process only; for several say "
            "torchrun --nproc-per-node N -m refiner refine ..."
        )
    if max(started, default=1) > 1:
        from accelerate import PartialState

        return PartialState(cpu=cpu).device
    return torch.device("cpu" if cpu else device or "cuda")


def check_device(device: str | torch.device | None) -> None:
    """Does nothing for a device that is here, or None.

    Raises:
        ValueError: for another, where torch's errors would be of several types and long.
    """
    if device is not None and not _is_here(str(device)):
        raise UserError(f"there is no device {str(device)!r} here; leave it out")


def _is_here(device: str) -> bool:
    try:
        asked = torch.device(device)
        if asked.type == "cuda":  # asked without touching one, as that would take its memory
            return torch.cuda.is_available() and (asked.index or 0) < torch.cuda.device_count()
        torch.empty(0, device=asked)
    except (RuntimeError, AssertionError, NotImplementedError):
        return False
    return True


def rows(batch: int) -> tuple[int, int]:
    """This process's samples of a global batch, as (first, count).

    Raises:
        ValueError: when the batch cannot be shared out evenly.
    """
    if batch % world():
        raise UserError(f"a batch of {batch} cannot be shared by {world()} processes evenly")
    count = batch // world()
    return rank() * count, count


class _Gather(torch.autograd.Function):
    """[...] of each process → [W, ...] everywhere; the gradient is the sum of all processes'."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(world())]
        dist.all_gather(parts, x)
        return torch.stack(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        own = torch.empty_like(gradient[0])
        dist.reduce_scatter(own, list(gradient.contiguous()))
        return own


def gather(x: Tensor, dim: int = 0) -> Tensor:
    """Joins the processes' tensors of one shape along an axis, in their order; with gradient."""
    if world() == 1:
        return x
    return torch.cat(_Gather.apply(x.contiguous()).unbind(), dim=dim)


def pooled_statistics(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and (biased) variance of all processes' samples from each one's, in one exchange."""
    mean_W, var_W = gather(torch.stack([mean, var])[None]).unbind(1)
    return mean_W.mean(0), var_W.mean(0) + mean_W.var(0, correction=0)


@torch.no_grad()
def average(x: Tensor) -> Tensor:
    """The mean over the processes of a tensor, bit for bit the same in each."""
    return gather(x[None]).mean(0) if world() > 1 else x


@torch.no_grad()
def mean(x: Tensor) -> Tensor:
    """The mean over the processes, written into the tensor; the cheapest exchange for it."""
    if world() > 1:
        dist.all_reduce(x)
        x.div_(world())
    return x


@torch.no_grad()
def average_gradients(parameters: Iterable[torch.nn.Parameter], *, piece: int = 2**24) -> None:
    """Replaces gradients by their mean over the processes.

    Args:
        parameters: those without a gradient are passed over; the same ones everywhere.
        piece: numbers that travel in one message, about; 64 MB in float32.
    """
    if world() == 1:
        return
    waiting: list[Tensor] = []
    size = 0
    for parameter in (p for p in parameters if p.grad is not None):
        waiting.append(parameter.grad)
        size += parameter.numel()
        if size >= piece:
            _average(waiting)
            waiting, size = [], 0
    if waiting:
        _average(waiting)


def _average(gradients: list[Tensor]) -> None:
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    pieces = flat.div_(world()).split([g.numel() for g in gradients])
    torch._foreach_copy_(gradients, [x.view_as(g) for x, g in zip(pieces, gradients, strict=True)])


def check_same(value: int, what: str) -> None:
    """Stops when the processes do not agree on a number.

    Raises:
        ValueError: naming what differs.
    """
    if world() > 1:
        every = [None] * world()
        dist.all_gather_object(every, value)
        if len(set(every)) > 1:
            raise UserError(f"the processes differ in {what}: {every}; give all the same data")


def first_decides(answer: bool) -> bool:
    """The first process's answer, in every process.

    Hosts ask each other, and none of them waits for its GPU: a message takes about 0.1 ms.
    """
    if world() == 1:
        return answer
    said = torch.tensor([int(answer)], dtype=torch.uint8)
    dist.broadcast(said, 0, group=_hosts(dist.group.WORLD))
    return bool(said)


def first_gives(value):
    """The first process's value, in every process; it travels pickled, through the hosts."""
    if world() == 1:
        return value
    given = [value]
    dist.broadcast_object_list(given, 0, group=_hosts(dist.group.WORLD))
    return given[0]


@lru_cache(maxsize=1)
def _hosts(everyone):
    """The processes as a group that exchanges tensors of the hosts' memory."""
    return everyone if dist.get_backend(everyone) == "gloo" else dist.new_group(backend="gloo")


def wait() -> None:
    """Until all processes are here."""
    if world() > 1:
        dist.barrier()
