"""Settings: read from the command line, changed, and put right."""

from __future__ import annotations

import ast
from dataclasses import fields, replace

from refiner.base.errors import UserError


def changed(recipe, settings: list[str]):
    """A recipe with ``NAME=VALUE`` settings applied.

    Raises:
        ValueError: for a name that the recipe lacks, or a value of another kind.
    """
    from dataclasses import fields, replace

    from refiner.base.settings import whole_numbers

    known = {field.name: field.type for field in fields(recipe)}
    values = dict(map(parse_setting, settings))
    for name, value in values.items():
        if name not in known:
            raise UserError(f"the recipe has no {name!r}; it has {', '.join(known)}")
        values[name] = suited(name, value, known[name], getattr(recipe, name))
    recipe = whole_numbers(replace(recipe, **values))
    if recipe.seed < 0:
        raise UserError(f"seed is {recipe.seed}; it needs to be 0 or more")
    return recipe


KINDS = {"int": (int, float), "float": (int, float), "bool": (bool, int), "str": (str,),
         "tuple": (tuple, list), "None": (type(None),)}  # fmt: skip


def suited(name: str, value: object, annotation: str, now: object) -> object:
    """A setting's value as the recipe has it; a number alone may stand for a tuple of numbers.

    Raises:
        ValueError: for a value of another kind.
    """
    kinds = [part.split("[")[0].strip() for part in annotation.split("|")]
    several = any(f"tuple[{kind}, ...]" in annotation for kind in ("int", "float"))
    if several and isinstance(value, int | float):
        value = (value,)
    truth = isinstance(value, bool) and "bool" not in kinds  # which Python counts as a number
    if truth or not any(isinstance(value, KINDS.get(kind, ())) for kind in kinds):
        such = f", such as {now!r}" if now is not None and len(repr(now)) < 80 else ""
        wanted = " or ".join(kind for kind in kinds if kind != "None")
        raise UserError(f"{name}={value!r}: expected a value of type {wanted}{such}")
    return tuple(value) if isinstance(value, list) else value


def parse_setting(text: str) -> tuple[str, object]:
    """``name=value`` → name and value; what is no Python literal is taken as a text.

    Raises:
        ValueError: without an equal sign or a name.
    """
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise UserError(f"--set needs NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


def whole_numbers(recipe):
    """A recipe whose counts are ints: 1e4 becomes 10000.

    Raises:
        ValueError: for a count that is no whole number.
    """
    changes = {}
    for field in fields(recipe):
        value = getattr(recipe, field.name)
        if field.type == "int" or (field.type == "int | None" and value is not None):
            try:
                whole = int(value) == value and not isinstance(value, bool)
            except (TypeError, ValueError, OverflowError):  # None, texts, NaN, infinity
                whole = False
            if not whole:
                raise UserError(f"{field.name} is {value!r}; it needs to be a whole number")
            changes[field.name] = int(value)
    return replace(recipe, **changes)
