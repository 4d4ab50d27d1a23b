"""Tokens of several blocks: kept in memory, or made again each time they are asked for.

Shape legend: L blocks, N images, B images of a batch, T tokens, D width.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.tensors import mean_and_scale
from refiner.images.sets import ImageSet
from refiner.models.encoders import (
    Encoder,
    default_batch,
    prefix_tokens,
    preprocess,
    preprocessing_card,
    walk,
)
from refiner.probing.logistic import group_chunks


@dataclass(frozen=True, eq=False)
class Tokens:
    """Tokens of some blocks and any of the images: from memory, or from the encoder each time."""

    model: Encoder
    images: ImageSet
    blocks: tuple[int, ...]
    class_token: bool
    device: torch.device
    mean_L11D: Tensor | float = 0.0
    scale_L11D: Tensor | float = 1.0
    kept_LNTD: Tensor | None = None

    def __call__(self, index: Tensor) -> Tensor:
        """float32 [L, B, T, D], rounded to half precision whether they were kept or not."""
        if self.kept_LNTD is not None:
            return self.kept_LNTD[:, index.to(self.device)].float()
        return self.standardized(index).float()

    @torch.no_grad()
    def raw(self, index: Tensor) -> Tensor:
        """float32 [L, B, T, D], as they leave the blocks."""
        x = preprocess(self.images.batch(index).to(self.device), preprocessing_card(self.model))
        x, prefix, found = x.to(next(self.model.parameters()).dtype), prefix_tokens(self.model), []
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            for number, x_BTD in walk(self.model, x, top=max(self.blocks)):
                if number in self.blocks:
                    first = x_BTD[:, : int(self.class_token)]
                    found.append(torch.cat([first, x_BTD[:, prefix:]], dim=1).float())
                    if not found[-1].sum().isfinite():
                        raise UserError(f"the tokens after block {number} are not finite")
        if len({x_BTD.shape for x_BTD in found}) > 1:
            raise UserError("blocks differ in tokens or width: give blocks=… of one stage")
        return torch.stack(found)

    def standardized(self, index: Tensor) -> Tensor:
        return ((self.raw(index) - self.mean_L11D) * self.scale_L11D).half()

    def standardized_by_some(self, seed: int) -> Tokens:
        """The same, less each channel's mean on some images and by its deviation."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(seed))
        some = order[: default_batch(self.model, self.device)]
        moments = [mean_and_scale(x_BTD.flatten(0, 1)) for x_BTD in self.raw(some)]
        mean, scale = (torch.stack(part)[:, None, None] for part in zip(*moments, strict=True))
        return replace(self, mean_L11D=mean.float(), scale_L11D=scale.float())

    def parts(self, memory: int, bytes_a_block: int) -> Iterator[Tokens]:
        """Some blocks at a time, their tokens kept; all blocks, made again, if not one's would fit.

        Args:
            memory: bytes for the tokens that are kept.
            bytes_a_block: what else is done with a block takes, to suit the device's cache.
        """
        blocks, images = len(self.blocks), len(self.images)
        size = self.raw(torch.arange(1)).shape[2:]
        room = min(blocks, memory // (images * size.numel() * 2))
        if not room:
            yield self
            return
        buffer = torch.empty(room, images, *size, dtype=torch.half, device=self.device)
        for first in range(0, blocks, room):
            kept = self[first : first + room]._kept_in(buffer)
            for chunk in group_chunks(len(kept.blocks), bytes_a_block, self.device):
                yield kept[chunk]

    def __getitem__(self, chosen: slice) -> Tokens:
        """The same for some of the blocks."""
        names = ("blocks", "mean_L11D", "scale_L11D", "kept_LNTD")
        held = {name: getattr(self, name) for name in names}
        return replace(self, **{k: None if x is None else x[chosen] for k, x in held.items()})

    def _kept_in(self, buffer: Tensor) -> Tokens:
        for index in self.batches():
            buffer[: len(self.blocks), index[0] : index[-1] + 1] = self.standardized(index)
        return replace(self, kept_LNTD=buffer[: len(self.blocks)])

    def batches(self) -> tuple[Tensor, ...]:
        """All images' positions, as many at once as suit the encoder."""
        return torch.arange(len(self.images)).split(default_batch(self.model, self.device))
