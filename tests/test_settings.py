"""Every field of every recipe refuses what lies outside of its range, and says its name."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Union, get_args, get_origin, get_type_hints

import numpy as np
import pytest
import torch

import refiner
from refiner.base.settings import Count, Entries, Range, Share, changed, checked, settings_from
from refiner.evaluation.probe import Settings
from refiner.evaluation.protocols import EvaluationSettings
from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.models.mae import MAERecipe
from refiner.training.finetuning import FinetuneRecipe
from refiner.training.recipe import Recipe

KINDS = (Recipe, View, MAERecipe, FinetuneRecipe, EvaluationSettings, Settings)


def fields_of(kind):
    return get_type_hints(kind, include_extras=True).items()


def beyond(hint):
    """Values outside of what a type declares: of another kind, and on both sides of its range."""
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        yield from beyond(parts[0])
        for limits in parts[1:]:
            if isinstance(limits, Range):
                step = 1 if parts[0] is int else 1e-3
                yield from (e for e in (limits.low - step, limits.above) if e > -math.inf)
                yield from (e for e in (limits.high + step,) if e < math.inf)
            elif limits.least:
                yield ()
            else:
                yield (0.9, 0.1)
    elif origin is Union or hint.__class__.__name__ == "UnionType":
        yield from beyond(parts[0])  # the others are None, or a tuple of the same
    elif origin is tuple:
        if parts[-1] is not ...:
            yield (0.5,) * (len(parts) + 1)
        yield from (
            (value,) * (1 if parts[-1] is ... else len(parts)) for value in beyond(parts[0])
        )
    elif hint is int:
        yield from (2.5, True, "many", 1e100, 10**400, math.nan, math.inf, [1, 2], {})
    elif hint is float:
        yield from (True, "much", math.nan, math.inf, -math.inf, {})
    else:  # choices, truth values, other settings
        yield from ("nonsense", 7, {"nonsense": 1})


CASES = [
    (kind, name, value)
    for kind in KINDS
    for name, hint in fields_of(kind)
    for value in beyond(hint)
]


def test_every_field_has_values_that_it_refuses():
    covered = {(kind, name) for kind, name, _ in CASES}
    assert covered == {(kind, name) for kind in KINDS for name, _ in fields_of(kind)}
    ranged = {(k, n) for k in KINDS for n, h in fields_of(k) if h not in (int, float)}
    assert {(k, n) for k in KINDS for n, _ in fields_of(k)} - ranged == set(), "a bare number"


@pytest.mark.parametrize(
    ("kind", "name", "value"), CASES, ids=lambda x: getattr(x, "__name__", repr(x))[:40]
)
def test_what_is_beyond_a_range_is_refused_by_name(kind, name, value):
    """From Python, from a card, and, where it can be written so, by ``--set``."""
    with pytest.raises(refiner.UserError, match=r"\w+ is |there is no setting") as caught:
        checked(replace(kind(), **{name: value}))
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 500
    with pytest.raises(refiner.UserError):
        settings_from(kind, {name: value})
    with pytest.raises(refiner.UserError):
        changed(kind(), [f"{name}={value!r}"])


@pytest.mark.parametrize("kind", KINDS)
def test_defaults_and_presets_are_within_their_ranges(kind):
    presets = [kind(), *(getattr(kind, p)() for p in ("cpu", "gpu") if hasattr(kind, p))]
    for settings in presets:
        assert checked(settings) == settings


@dataclass(frozen=True)
class Some:
    n: Count = 1
    share: Share = 0.5
    few: Annotated[tuple[Count, ...], Entries(1)] = (1,)
    how: Literal["a", "b"] | tuple[Literal["a", "b"], ...] | None = None


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n=1e3", 1000),
        ("share=0", 0),
        ("share=1", 1),
        ("few=2", (2,)),
        ("few=[1, 2.0]", (1, 2)),
        ("how=a", "a"),
        ("how=('b',)", ("b",)),
        ("how=None", None),
    ],
)
def test_what_is_in_range_is_taken_in_any_writing(text, value):
    found = getattr(changed(Some(), [text]), text.partition("=")[0])
    assert found == value and type(found) is type(value)


def test_numpys_numbers_become_pythons_own():
    found = checked(Some(n=np.int64(3), share=np.float32(0.25)))
    assert (found.n, found.share) == (3, 0.25)
    assert type(found.n) is int and type(found.share) is float


def test_what_lies_in_a_card_is_checked_and_the_rest_has_its_default():
    assert settings_from(Some, {"few": [3]}) == Some(few=(3,))
    with pytest.raises(refiner.UserError, match="there is no setting 'm'; there are n, share"):
        settings_from(Some, {"m": 1})
    with pytest.raises(refiner.UserError, match="Some is .*; it needs to be a Some"):
        settings_from(Some, [1])


@pytest.mark.parametrize("name", ["size", "patch", "dim", "depth", "heads"])
@pytest.mark.parametrize("value", [0, -4, 2.5, "many", 1e12])
def test_an_encoder_of_no_size_is_refused(name, value):
    with pytest.raises(refiner.UserError, match=f"{name} is "):
        build_vit(**{name: value})


@pytest.mark.parametrize(
    "name, value", [("log_every", 0), ("save_every", 0), ("save_every", -5), ("log_every", 2.5)]
)
def test_steps_between_entries_and_states_are_counts(name, value):
    images = torch.zeros(4, 3, 8, 8, dtype=torch.uint8)
    recipe = MAERecipe(size=8, depth=1, batch=4, steps=1)
    with pytest.raises(refiner.UserError, match=f"{name} is "):
        refiner.pretrain(images, recipe=recipe, progress=False, **{name: value})
