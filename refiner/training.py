"""What pretraining and refining share: schedule, averaged weights, and state that survives a kill.

Every random draw of a step comes from ``step_generator(seed, step)`` and every batch from
``batch_indices(seed, step)``. Neither needs a stored random state, so a resumed run meets exactly
the batches, masks and views that an uninterrupted run meets.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import numpy as np
import torch
from torch import nn

from refiner.files import replacing

Tensor = torch.Tensor


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


def step_generator(seed: int, step: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A generator that depends on (seed, step) alone."""
    mixed = np.random.SeedSequence([seed, step]).generate_state(1, np.uint64)[0]
    return torch.Generator(device).manual_seed(int(mixed >> np.uint64(1)))


def batch_indices(n: int, batch: int, *, seed: int, step: int) -> Tensor:
    """Indices of the images of one step, int64 [batch].

    Each epoch is its own permutation of all n images; what does not fill a last batch is left to
    the next epoch's draw. A set smaller than a batch is an error upstream.
    """
    per_epoch = n // batch
    epoch, position = divmod(step, per_epoch)
    order = np.random.default_rng([seed, epoch]).permutation(n)
    return torch.from_numpy(order[position * batch : (position + 1) * batch])


def take(pixels, index: Tensor, device: torch.device) -> Tensor:
    """The images of one step on the device; a tensor that lies there already is not copied."""
    on_device = isinstance(pixels, Tensor) and pixels.device.type == device.type
    return pixels[index.to(device)] if on_device else pixels[index].to(device)


def autocast(device: torch.device):
    """bf16 products on a GPU, nothing on a CPU, where they would be slower."""
    return torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")


class EMA:
    """Exponential moving average of a module's weights, for evaluation.

    The decay grows with the number of updates, ``min(decay, (1+t)/(10+t))``, so that a short run
    is not an average with its own starting point (the rule of TensorFlow's moving averages).
    """

    def __init__(self, module: nn.Module, decay: float):
        self.decay, self.updates = decay, 0
        self.shadow = {k: v.detach().clone() for k, v in module.state_dict().items()}

    @torch.no_grad()
    def update(self, module: nn.Module) -> None:
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        floats, news = [], []
        for key, value in module.state_dict().items():
            if value.dtype.is_floating_point:
                floats.append(self.shadow[key])
                news.append(value)
            else:
                self.shadow[key].copy_(value)
        torch._foreach_lerp_(floats, news, 1 - decay)

    def copy_to(self, module: nn.Module) -> None:
        module.load_state_dict(self.shadow)

    def state_dict(self) -> dict:
        return {"shadow": self.shadow, "updates": self.updates}

    def load_state_dict(self, state: dict) -> None:
        self.shadow, self.updates = state["shadow"], state["updates"]


def save_state(path: str | Path, state: dict) -> None:
    """Writes a training state atomically."""
    with replacing(path) as temporary:
        torch.save(state, temporary)


def load_state(path: str | Path) -> dict:
    """Reads a training state; tensors and plain containers only, no code is run.

    Raises:
        FileNotFoundError: when there is nothing to resume from, saying so.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"nothing to resume: {path} does not exist; start without --resume")
    return torch.load(path, map_location="cpu", weights_only=True)


def machine() -> dict[str, object]:
    """The machine in words, for cards and result files: processor, cores, GPU, versions."""
    processor = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        processor = names[0].strip() if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }
