"""Groups: batches of one lab each, for images that come from several.

What an image's negatives share with it is what its features learn to ignore. In mixed batches the
lab (microscope, stain, season, sensor) tells most other images of a batch apart, so that features
keep it; where all images of a batch come from one lab, it tells nothing.

Shape legend: N images, B samples of the global batch, A groups a step, m = B / A samples of each.
"""

from __future__ import annotations

import warnings

import numpy as np
import torch
from torch import Tensor

from refiner.base import parallel
from refiner.base.errors import UserError
from refiner.base.tensors import group_numbers
from refiner.images.sources import come_again
from refiner.training.recipe import Recipe


def groups_of(images, groups) -> Tensor | None:
    """The group of each image, int64 [N] from 0; None for None.

    Args:
        images: what is trained on.
        groups: the name of a factor of the set such as "lab", "class" for its labels, or N numbers
            or words.

    Raises:
        ValueError: for streams, for a name that the set does not know, or another number of them.
    """
    if groups is None:
        return None
    if not come_again(images):
        raise UserError("images of a stream have no known groups; unpack it into a folder")
    if isinstance(groups, str):
        known = dict(getattr(images, "factors", {}))
        labels = getattr(images, "labels", None)
        known |= {} if labels is None else {"class": labels.cpu()}
        if groups not in known:
            names = ", ".join(sorted(known)) or "nothing to group by"
            raise UserError(f"the images have no {groups!r} to group by, but {names}")
        groups = known[groups]
    return group_numbers(groups, len(images))


def check_groups(recipe: Recipe, groups: Tensor | None) -> None:
    """Refuses recipes that need groups, or other batches, than there are.

    Raises:
        ValueError: in one sentence.
    """
    if groups is None:
        if recipe.neighbors_from != "anywhere":
            raise UserError(
                f"neighbors from {recipe.neighbors_from!r} groups need groups=…, such as the lab "
                "of each image"
            )
        return
    if recipe.cached_views:
        raise UserError("kept features are dealt out in mixed batches; leave cached_views at 0")
    a, own = recipe.groups_a_step, recipe.batch // parallel.world()
    if a and (own % a or own // a < 2):
        raise UserError(
            f"{a} groups a step do not share {own} images evenly, two or more each: choose "
            "groups_a_step or the batch so that they do"
        )


class GroupedOrder:
    """Which images are the batch of a step, where each batch holds A groups of m images.

    An epoch shuffles each group, cuts it into parts of m and deals the parts out in random order.
    Groups of fewer than m images are put together as one. What fills no part waits for another
    epoch. A step's parts are interleaved, sample j belongs to part j mod A, so that every process's
    rows hold as many of each.

    Args:
        groups_N: int64, from 0.
        recipe: batch, groups a step and seed.
    """

    def __init__(self, groups_N: Tensor, recipe: Recipe):
        self.a, self.seed = recipe.groups_a_step, recipe.seed
        self.m = recipe.batch // self.a
        sizes = torch.bincount(groups_N)
        small = (sizes > 0) & (sizes < self.m)
        members = [(groups_N == g).nonzero()[:, 0].numpy() for g in (sizes >= self.m).nonzero()]
        rest = small[groups_N].nonzero()[:, 0].numpy()
        if len(rest):
            warnings.warn(
                f"{int(small.sum())} of {int((sizes > 0).sum())} groups have fewer than the "
                f"{self.m} images of a batch's part; "
                + ("they are one group" if len(rest) >= self.m else "they are left out"),
                stacklevel=4,
            )
        self.members = [part for part in (*members, rest) if len(part) >= self.m]
        self.per_epoch = sum(len(part) // self.m for part in self.members) // self.a
        if not self.per_epoch:
            raise UserError(
                f"no {self.a} parts of {self.m} images of one group each: choose a smaller batch, "
                "or more groups a step, or groups_a_step=0 for mixed batches"
            )
        self.epoch, self.parts = -1, np.empty((0, self.m), dtype=np.int64)

    def __call__(self, step: int) -> Tensor:
        """int64 [B], the same in every process."""
        epoch, position = divmod(step, self.per_epoch)
        if epoch != self.epoch:
            self.epoch, self.parts = epoch, self._dealt(epoch)
        parts_Am = self.parts[position * self.a : (position + 1) * self.a]
        return torch.from_numpy(parts_Am.T.reshape(-1).copy())

    def _dealt(self, epoch: int) -> np.ndarray:
        """All parts of an epoch in order, [parts, m]."""
        rng = np.random.default_rng([self.seed, epoch, 2])
        parts = []
        for members in self.members:
            shuffled = rng.permutation(members)
            parts.append(shuffled[: len(members) // self.m * self.m].reshape(-1, self.m))
        return rng.permutation(np.concatenate(parts))


def barred(groups_N: Tensor, queue_ids_Q: Tensor, own_b: Tensor, neighbors_from: str):
    """Which entries of the queue are no neighbors of which samples, bool [b, Q]; None for none."""
    if neighbors_from == "anywhere":
        return None
    same_bQ = groups_N[own_b][:, None] == groups_N[queue_ids_Q]
    return ~same_bQ if neighbors_from == "own" else same_bQ
