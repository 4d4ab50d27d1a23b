"""Training steps without arithmetic: what they would hold in memory, and where they would wait.

torch's FakeTensorMode runs a step on tensors that have a shape, a type and a device but no numbers.
That tells, without a GPU, how much memory a step needs at its peak (:class:`Peak`), whether all its
tensors lie on the same device, and whether the host ever waits for a number (an ``.item()``, a
count, an index by a mask): there are none to wait for, and the step fails.
"""

from __future__ import annotations

import importlib
import itertools
import sys
import weakref
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import nn
from torch._subclasses import fake_impls
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from refiner.base import tensors

sys.path.insert(0, str(Path(__file__).parent.parent))

from refiner.images import views
from refiner.training import decoders, heads, planning, pretraining, step

refining = importlib.import_module(
    "refiner.training.refining"
)  # the name refiner.refine is the function's
GPU, CPU = torch.device("cuda", 0), torch.device("cpu")


class Peak(TorchDispatchMode):
    """Counts the bytes of all tensors alive; ``peak`` is the most there were at once.

    Args:
        held: tensors that are there before.
    """

    def __init__(self, *held: torch.Tensor):
        super().__init__()
        self.alive: dict[int, weakref.ref] = {}
        self.now = self.peak = 0
        for x in held:
            self.see(x)

    def see(self, x: torch.Tensor) -> None:
        storage = x.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive[key] = weakref.ref(storage, lambda _: self.gone(key, size))
            self.now += size
            self.peak = max(self.peak, self.now)

    def gone(self, key: int, size: int) -> None:
        self.alive.pop(key)
        self.now -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor):
                self.see(x)
        return result


class Waits(TorchDispatchMode):
    """Notes copies between host and GPU that the host waits for: ``found`` holds their shapes."""

    def __init__(self):
        super().__init__()
        self.found: list[tuple[str, list[int]]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[0] if func is torch.ops.aten._to_copy.default else args[1]
            waits = not (kwargs.get("non_blocking") or (len(args) > 2 and args[2]))
            if waits and source.device.type != result.device.type:
                self.found.append(
                    (f"{source.device.type} to {result.device.type}", list(source.shape))
                )
        return result


def hollow(*modules: nn.Module, device: torch.device) -> None:
    """Replaces all weights and buffers by tensors without numbers on the device."""
    for module in (m for whole in modules for m in whole.modules()):
        for name, p in module._parameters.items():
            if p is not None:
                empty = torch.empty(p.shape, dtype=p.dtype, device=device)
                module._parameters[name] = nn.Parameter(empty, requires_grad=p.requires_grad)
        for name, b in module._buffers.items():
            if b is not None:
                module._buffers[name] = torch.empty(b.shape, dtype=b.dtype, device=device)


@contextmanager
def simulated(device: torch.device) -> Iterator[None]:
    """What runs inside has no numbers, and computes in the precision of a GPU.

    On ``cuda`` everything but the backward pass runs, which needs a driver; on ``cpu`` all of it.
    """
    caches = (tensors.constant, heads._pair_weights)
    with ExitStack() as stack:
        put = lambda *what: stack.enter_context(mock.patch.object(*what))  # noqa: E731
        put(torch.cuda, "is_bf16_supported", lambda *_, **__: True)
        put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
        put(torch.cuda, "mem_get_info", lambda *_: (10**12, 10**12))
        # A generator of the GPU's cannot be made here.
        draw = lambda *shape, device=device, **_: torch.rand(*shape, device=device or GPU)  # noqa: E731
        for module in (step, heads, views):
            put(module, "draw", draw)
        for module in (refining, planning, pretraining, decoders):
            put(module, "step_generator", lambda *_: None)
            put(module, "autocast", lambda _: torch.autocast(device.type, torch.bfloat16))
        put(views, "_blur_some", views._blur_all)  # on "cpu" the GPU's way as well
        for cache in caches:
            cache.cache_clear()
            stack.callback(cache.cache_clear)
        # A copy of a module belongs to the same simulation.
        same = mock.patch.object(FakeTensorMode, "__deepcopy__", lambda mode, _: mode, create=True)
        stack.enter_context(same)
        stack.enter_context(FakeTensorMode())
        yield


@contextmanager
def answering(yes: int = 30) -> Iterator[None]:
    """Inside, a host that asks for a number gets 1 or True, and masks choose up to 3 elements.

    So that code that does ask can run as well; only shapes, types and devices are looked at. After
    ``yes`` answers it gets 0 or False, which ends loops that wait for convergence.
    """
    aten, asked = torch.ops.aten, itertools.count()

    def number(_mode, _func, x):
        kind = bool if x.dtype == torch.bool else float if x.dtype.is_floating_point else int
        return kind(next(asked) < yes)

    def nonzero(_mode, _func, x):
        return x.new_empty((min(x.numel(), 3), x.ndim), dtype=torch.int64)

    answers = {aten._local_scalar_dense.default: number, aten.nonzero.default: nonzero}
    with mock.patch.dict(fake_impls.op_implementations_dict, answers):
        yield


def no_backward(*modules: nn.Module):
    """Instead of a backward pass every weight gets a gradient without numbers."""

    def backward(_loss: torch.Tensor) -> None:
        for p in (p for m in modules for p in m.parameters() if p.requires_grad):
            p.grad = torch.empty_like(p)

    return mock.patch.object(torch.Tensor, "backward", backward)
