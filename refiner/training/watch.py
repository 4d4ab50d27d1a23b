"""Watching a refinement: what stops it, and what shows it.

:class:`Guard` looks at every logged step. :class:`LiveFigure` and :class:`TensorBoard` are handed
to ``refine(…, watch=[…])``, the function that :func:`online_knn` makes to ``evaluate=``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
from torch import nn

from refiner.base.errors import MissingPackage, NotFinite, UserError
from refiner.models.encoders import Encoder, final_pooling


def all_finite(*modules: nn.Module) -> bool:
    """Whether all weights are numbers, so that a state with them is a good one."""
    weights = [p.detach() for m in modules for p in m.parameters()]
    largest = torch._foreach_norm(weights, float("inf"))  # squares would overflow
    return bool(torch.stack(largest).isfinite().all())


class Collapse(UserError, ArithmeticError):
    """All projections became the same, or all predictions: nothing is left to learn from."""


class Guard:
    """Stops a run whose loss or weights are no longer finite; the states saved before stay.

    Args:
        file: of its state, for the message.
    """

    advice = "try a lower learning rate."

    def __init__(self, file: Path | None = None):
        self.file = file

    def check(self, entry: Mapping) -> None:
        """Looks at one entry of the history.

        Raises:
            FloatingPointError: for a loss that is not finite.
        """
        losses = entry["loss"] if isinstance(entry["loss"], list) else [entry["loss"]]
        if not all(map(math.isfinite, losses)):
            at = self.moment(entry)
            raise NotFinite(f"the loss is not finite at {at}; {self.advice}{self.left()}")

    def check_weights(self, step: int, *modules: nn.Module) -> None:
        """Looks at all weights before they are saved, so that a saved state is a good one.

        Raises:
            FloatingPointError: when one is not finite.
        """
        if not all_finite(*modules):
            raise NotFinite(
                f"a weight is no longer finite at step {step}; {self.advice}{self.left()}"
            )

    @staticmethod
    def moment(entry: Mapping) -> str:
        """When an entry was made, in words."""
        stage = f"stage {entry['stage']}, " if "stage" in entry else ""
        return f"{stage}step {entry['step']}"

    def left(self) -> str:
        """Where the last good states are, as a sentence."""
        there = self.file is not None and self.file.is_file()
        return f" The last good state is in {self.file.parent}." if there else ""


class CollapseGuard(Guard):
    """A guard of a refinement, which can also collapse.

    * ``spread`` below 0.05 in a head: all projections point the same way. Random directions have 1.
    * A head's loss at log(batch), what predictions give that are the same for every sample, within
      a thousandth at five logged steps of stage 3 in a row.

    Args:
        recipe: the run's.
        file: of its state, for the message.
    """

    advice = "try a lower learning rate or clip=1.0."

    def __init__(self, recipe, file: Path | None = None):
        super().__init__(file)
        self.recipe, self.uniform = recipe, [0] * len(recipe.blocks)

    def check(self, entry: Mapping) -> None:
        """Looks at one entry of the history.

        Raises:
            FloatingPointError: for a loss that is not finite.
            Collapse: for the other two.
        """
        super().check(entry)
        at = self.moment(entry)
        low = self._named(s < 0.05 for s in entry["spread"])
        if low:
            raise Collapse(
                f"the projections of the head on block {low} collapsed at {at}: all samples point "
                "the same way. Check that the images differ, or try a lower learning rate."
                + self.left()
            )
        floor = math.log(self.recipe.batch)
        for t, loss in enumerate(entry["loss"]):
            near = entry["stage"] == 3 and abs(loss - floor) < 1e-3 * floor
            self.uniform[t] = self.uniform[t] + 1 if near else 0
        stuck = self._named(n >= 5 for n in self.uniform)
        if stuck:
            raise Collapse(
                f"the loss of the head on block {stuck} stays at log(batch) = {floor:.3f} at {at}: "
                "its predictions are the same for every sample. Try a lower learning rate, longer "
                "warm-up or views that keep more of the image." + self.left()
            )

    def left(self) -> str:
        """Where the last good states are, and what to do with them, as a sentence."""
        there = super().left()
        return there and there[:-1] + "; resume from it with a lower lr."

    def _named(self, wrong) -> str:
        return ", ".join(str(b) for b, bad in zip(self.recipe.blocks, wrong, strict=True) if bad)


def plain_numbers(found: object) -> dict[str, object]:
    """What an ``evaluate`` returned, as it can be saved.

    Args:
        found: a dict of numbers, or of lists of them. Numbers of numpy and tensors of one element
            become plain ones; what is not finite becomes None, as JSON has no word for it.

    Raises:
        TypeError: for anything else, naming it.
    """
    if not isinstance(found, Mapping):
        raise TypeError(f"evaluate returned a {type(found).__name__}; let it return a dict")
    for name in found:
        if not isinstance(name, str):
            raise TypeError(f"evaluate named a number {name!r}; let it use texts as names")
    return {str(name): _plain(name, value) for name, value in found.items()}


def _plain(name: str, value: object) -> object:
    if isinstance(value, list | tuple):
        return [_plain(name, one) for one in value]
    item = getattr(value, "item", None)
    if callable(item) and math.prod(getattr(value, "shape", ())) == 1:  # numpy's and tensors
        value = item()
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    if isinstance(value, int):
        return value
    if value is None:
        return None
    shape = f" of shape {list(value.shape)}" if hasattr(value, "shape") else ""
    raise TypeError(
        f"evaluate returned a {type(value).__name__}{shape} as {name!r}; let it return numbers"
    )


def online_knn(bank, queries, *, k: int = 10, pooling: str | None = None) -> Callable:
    """An ``evaluate`` for :func:`refiner.refine`: k-NN on a held-out part, on the way.

    Args:
        bank: an ImageSet with labels, whose votes count.
        queries: a held-out ImageSet with labels.
        k: neighbors that vote, at most the whole bank.
        pooling: "cls" or "patch"; default the class token where there is one.

    Returns:
        A function from an encoder to ``{"knn": the last block's accuracy, "knn_best": the best
        block's}``.

    Raises:
        ValueError: without labels.
    """
    from refiner.probing.features import extract
    from refiner.probing.neighbors import knn_accuracy

    if bank.labels is None or queries.labels is None:
        raise UserError("online k-NN needs labels; give sets with class folders")

    def evaluate(model: Encoder) -> dict[str, float]:
        name = pooling or final_pooling(model)
        keys, asked = (extract(model, s, progress=False)[name] for s in (bank, queries))
        some = min(k, len(bank))
        scores = knn_accuracy(keys, bank.labels, asked, queries.labels, k=some)
        return {"knn": round(float(scores[-1]), 4), "knn_best": round(float(max(scores)), 4)}

    return evaluate


class TensorBoard:
    """Writes the history for TensorBoard: ``pip install 'mim-refiner-lab[watch]'``.

    Args:
        folder: of the event files; look at it with ``tensorboard --logdir <folder>``.

    Raises:
        ModuleNotFoundError: when TensorBoard is not installed, saying how to install it.
    """

    def __init__(self, folder: str | Path):
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            raise MissingPackage(
                "TensorBoard is not installed: pip install 'mim-refiner-lab[watch]'"
            ) from error
        self.writer = SummaryWriter(str(folder))

    def __call__(self, history: list[dict]) -> None:
        """Writes the newest entry; steps count through both stages."""
        entry = history[-1]
        step = entry["step"]
        if entry["stage"] == 3:  # from the history: this may be a resumed run, which met no stage 2
            step += next((e["step"] for e in reversed(history) if e["stage"] == 2), 0)
        for name, value in entry.items():
            if isinstance(value, list):
                for head, one in enumerate(value):
                    if one is not None:
                        self.writer.add_scalar(f"{name}/head {head + 1}", one, step)
            elif isinstance(value, int | float) and name not in ("stage", "step"):
                self.writer.add_scalar(name, value, step)
        self.writer.flush()
