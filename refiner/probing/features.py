"""Pooled features of every block in one pass.

Of an image and block only the class token, the mean of the patch tokens and that of the registers
are kept. They are taken while the pass is under way, so no block's tokens have to be stored;
features that outgrow a limit go to a file.

Shape legend: N images, B images of a batch, L blocks, T tokens (prefix tokens, then patches),
D width of the model.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryFile

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.files import reserve
from refiner.base.tensors import sides
from refiner.images.sets import ImageSet
from refiner.models.encoders import (
    Encoder,
    block_numbers,
    borrowed,
    default_batch,
    encoder_of,
    final_features,
    final_pooling,
    has_class_token,
    prefix_tokens,
    preprocess,
    preprocessing_card,
    walk,
)
from refiner.probing.batches import image_batches

NAMES = {
    "cls": "class token",
    "patch": "patch mean",
    "registers": "mean of the registers",
    "final": "after the final norm",
}


@dataclass(frozen=True, repr=False, eq=False)
class Features(Mapping):
    """Features by kind, all float32 on the CPU.

    ``["cls"]`` and ``["patch"]`` are [L, N, D]: class token and mean of the patch tokens after
    each block, before the final norm. ``["registers"]`` is the mean of what else stands before the
    patches, where a model has registers or a second class token. ``["final"]`` is [N, D]: after the
    final norm, the class token or, in a model without one or made for mean pooling, the patch mean.
    Where blocks have different widths (Hiera), narrower ones are filled up with zeros to D, the
    width of the last: distances, cosines and linear probes stay what they are.

    Attributes:
        tensors: the tensors by kind.
        blocks: the number of each of the L blocks, counted from 1.
    """

    tensors: dict[str, Tensor]
    blocks: tuple[int, ...]

    def __getitem__(self, kind: str) -> Tensor:
        if kind == "cls" and kind not in self.tensors:
            raise KeyError('this model has no class token, use features["patch"]')
        if kind not in self.tensors:
            raise KeyError(f"no features {kind!r}, only {', '.join(self.tensors)}")
        return self.tensors[kind]

    def __contains__(self, kind: object) -> bool:
        return kind in self.tensors

    def __iter__(self) -> Iterator[str]:
        return iter(self.tensors)

    def __len__(self) -> int:
        return len(self.tensors)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{kind} {list(x.shape)}" for kind, x in self.tensors.items())
        return f"Features({shapes})"

    def rows(self, index) -> Features:
        """The features of some images, by a slice, a mask or positions."""
        return Features({k: x[..., index, :] for k, x in self.tensors.items()}, self.blocks)

    @property
    def main(self) -> Tensor:
        """What a refined model pools: "cls" if the model has a class token, else "patch"."""
        return self.tensors["cls" if "cls" in self.tensors else "patch"]


# ---------------------------------------------------------------- extraction


def extract(
    model: Encoder,
    images: ImageSet | Tensor | Iterable,
    *,
    batch_size: int | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    blocks: Sequence[int] | None = None,
    memory: int = 2**33,
    folder: str | Path | None = None,
    progress: bool = True,
) -> Features:
    """Class token and patch mean of every block, in one pass over the images.

    The model runs in eval mode without gradients and is left as it was found: mode, gradients,
    device.

    Args:
        model: a timm VisionTransformer, or one of the other classes of
            :mod:`refiner.models.encoders`; also compiled, or in a DataParallel.
        images: an ImageSet, uint8 [N, C, H, W] (a tensor or an array), a list of pictures, a
            dataset of images, or batches such as a DataLoader's: each is ``x``, ``(x, labels, …)``
            or a dict with "pixel_values", "image" or the like. Floats with values below 0 are
            taken as already preprocessed, others as brightness up to 1, or up to 255.
        batch_size: images at once; by default as many as make 8,192 tokens on a CPU and 131,072
            on a GPU. An iterable brings its own batches.
        device: where to run; default CUDA if there is one, else the model's device.
        dtype: of the matrix products, by autocast: bfloat16 by default on CUDA; torch.float32 (the
            default on a CPU) turns autocast off.
        blocks: which blocks to keep, counted from 1, negative from the end; default all.
        memory: bytes of features to hold at most. Larger ones are kept in a file and mapped: the
            same tensors, read from disk where they are used.
        folder: where that file lies (on a disk, not in memory); default the system's folder for
            temporary files. It has no name there and vanishes with the features.
        progress: show a bar.

    Returns:
        :class:`Features`, float32 on the CPU whatever the dtype. They depend on the batch size
        only by rounding.

    Raises:
        ValueError: without images, for features that are not finite, a batch that is not
            [B, C, H, W], floats of a size that the model does not take, another class of model, or
            a block that the model does not have.

    Warns:
        UserWarning: when float images are not normalised yet.
    """
    model = encoder_of(model)
    if device is None and not torch.cuda.is_available():
        device = next(model.parameters()).device
    device = torch.device(device or "cuda")
    numbers = block_numbers(blocks, len(model.blocks))
    card = preprocessing_card(model)
    if batch_size is None:
        batch_size = default_batch(model, device)
    elif batch_size < 1:
        raise UserError(f"batch_size must be at least 1, not {batch_size}")
    if dtype is None and device.type == "cuda":
        dtype = torch.bfloat16
    autocast = dtype is not None and dtype != torch.float32
    store = _Store(memory, folder, numbers)
    total = len(images) if isinstance(images, ImageSet | Tensor) else None
    with (
        borrowed(model, device),
        tqdm(total=total, desc="features", unit="image", disable=not progress) as bar,
    ):
        own = next(model.parameters()).dtype
        for batch in _ahead(image_batches(images, batch_size, card)):
            x = batch.to(device, non_blocking=True)
            x = preprocess(x, card) if x.dtype == torch.uint8 else x
            # Turned off, it is so inside of somebody else's autocast too.
            with torch.autocast(device.type, dtype if autocast else None, enabled=autocast):
                try:
                    pooled, x_BTD = _pooled_pass(model, x.to(own), numbers)
                    pooled["final"] = final_features(model, x_BTD, final_pooling(model))
                except (AssertionError, RuntimeError) as error:  # timm's, for another size
                    _check_sides(x, sides(card["preprocessing"]["size"]), error)
                    raise
            for kind, value in pooled.items():
                store.put(kind, value.float().cpu())
            bar.update(len(batch))
    return Features({kind: store.joined(kind) for kind in list(store.parts)}, numbers)


def extract_part(
    model: Encoder,
    pixels: Tensor,
    blocks: Sequence[int],
    known: tuple[int, Tensor] | None = None,
    *,
    device: torch.device,
) -> tuple[Features, Tensor | None]:
    """Features of some blocks in a row, as of :func:`extract`, for walks in two parts.

    Args:
        model: an encoder.
        pixels: uint8 [N, C, H, W].
        blocks: their numbers, from 1 or from the one after what is known.
        known: a block's number and the tokens [N, T, D] after it, on the CPU.
        device: where to work.

    Returns:
        The features, and the tokens after the last block, on the CPU, if none were known.
    """
    found, tokens, card = [], [], preprocessing_card(model)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda")
    with borrowed(model, device), autocast:
        for some in torch.arange(len(pixels)).split(default_batch(model, device)):
            start = known and (known[0], known[1][some].to(device))
            x = preprocess(pixels[some].to(device), card)
            pooled, x_BTD = _pooled_pass(model, x, blocks, known=start, top=max(blocks))
            found.append({kind: value.float().cpu() for kind, value in pooled.items()})
            if known is None:
                tokens.append(x_BTD.cpu())
    joined = {kind: torch.cat([part[kind] for part in found], dim=1) for kind in found[0]}
    return Features(joined, tuple(blocks)), torch.cat(tokens) if tokens else None


def _pooled_pass(model: Encoder, x: Tensor, numbers: Sequence[int], **how):
    """Pooling after each wanted block of a :func:`walk`: [L, B, D] by kind, and the last tokens."""
    wanted, prefix, with_cls = set(numbers), prefix_tokens(model), has_class_token(model)
    cls, patch, registers = {}, {}, {}
    for number, x_BTD in walk(model, x, **how):
        if number in wanted:
            if with_cls:
                cls[number] = x_BTD[:, 0].clone()  # a view would keep all the block's tokens
            if prefix > with_cls:
                registers[number] = x_BTD[:, with_cls:prefix].mean(1, dtype=torch.float32)
            mean_BD = x_BTD[:, prefix:].mean(1, dtype=torch.float32)
            patch[number] = F.pad(mean_BD, (0, model.num_features - mean_BD.shape[1]))
    kinds = {"cls": cls, "patch": patch, "registers": registers}
    return {k: torch.stack([x[i] for i in numbers]) for k, x in kinds.items() if x}, x_BTD


def _check_sides(x: Tensor, own: tuple[int, int], error: Exception) -> None:
    """Blames what went wrong on the images' size, if that is not the model's."""
    h, w = x.shape[2:]
    if (h, w) != own:
        raise UserError(
            f"normalised images of {h}×{w} pixels do not fit the model ({error}): give {own[0]}×"
            f"{own[1]}, or uint8 images, which are resized"
        ) from error


class _Store:
    """Batches of features by kind, in memory up to a limit and in a file from there on."""

    def __init__(self, memory: int, folder: str | Path | None, numbers: Sequence[int]):
        self.memory, self.folder, self.numbers = memory, folder, numbers
        self.bytes, self.file = 0, None
        self.parts: dict[str, deque] = {}

    def put(self, kind: str, x: Tensor) -> None:
        """Adds [..., B, D].

        Raises:
            ValueError: for values that are not finite, naming the block.
        """
        self._check_finite(kind, x)
        self.bytes += x.nbytes
        parts = self.parts.setdefault(kind, deque())
        if self.bytes <= self.memory:
            parts.append(x)
            return
        self.file = self.file or TemporaryFile(dir=self.folder)  # noqa: SIM115
        parts.append((self.file.tell(), x.shape))
        self.file.write(x.contiguous().numpy().data)

    def joined(self, kind: str) -> Tensor:
        """[..., N, D] of all batches; each is freed once it is copied."""
        parts = self.parts.pop(kind)
        shapes = [x.shape if isinstance(x, Tensor) else x[1] for x in parts]
        n, start = sum(shape[-2] for shape in shapes), 0
        joined = self._empty((*shapes[0][:-2], n, shapes[0][-1]))
        while parts:
            part = self._get(parts.popleft())
            joined[..., start : start + part.shape[-2], :] = part
            start += part.shape[-2]
        return joined

    def _get(self, part: Tensor | tuple[int, torch.Size]) -> Tensor:
        if isinstance(part, Tensor):
            return part
        offset, shape = part
        self.file.seek(offset)
        values = np.fromfile(self.file, np.float32, shape.numel())
        return torch.from_numpy(values).view(shape)

    def _empty(self, shape: tuple[int, ...]) -> Tensor:
        if self.bytes <= self.memory:
            return torch.empty(shape)
        with TemporaryFile(dir=self.folder) as file:  # the mapping keeps it
            reserve(file, 4 * math.prod(shape))
            return torch.from_numpy(np.memmap(file, np.float32, "w+", shape=shape))

    def _check_finite(self, kind: str, x: Tensor) -> None:
        if x.sum(dtype=torch.float64).isfinite():
            return
        finite = x.isfinite().flatten(-2).all(-1)
        first = f" after block {self.numbers[int(finite.int().argmin())]}" if x.ndim == 3 else ""
        raise UserError(
            f"the {kind} features{first} are not finite: the weights or the input hold NaN, or "
            "values overflow (then try dtype=torch.float32)"
        )


def _ahead(batches: Iterator[Tensor]) -> Iterator[Tensor]:
    """The same batches, each fetched by a thread while the one before is worked on."""
    with ThreadPoolExecutor(1) as pool:
        following = pool.submit(next, batches, None)
        while (batch := following.result()) is not None:
            following = pool.submit(next, batches, None)
            yield batch
