"""Settings: one declared range per field, and every error that comes of it.

A field says its range in its type, ``batch: Annotated[int, Range(2)]``. What ``--set`` changes,
what a notebook gives and what a file on disk says are checked by the same few lines.
"""

from __future__ import annotations

import ast
import math
import reprlib
from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from numbers import Real
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Literal,
    NotRequired,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    is_typeddict,
)

from refiner.base.errors import UserError

S = TypeVar("S")
KINDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
LIMIT = 2**32  # whole numbers are below, as NumPy's seeds are; larger ones are slips


@dataclass(frozen=True)
class Range:
    """Which numbers a field takes."""

    low: float = -math.inf
    high: float = math.inf
    above: float = -math.inf  # a lower end that is left out itself

    def __contains__(self, value: float) -> bool:
        return self.low <= value <= self.high and value > self.above

    def __str__(self) -> str:
        if self.above > -math.inf:
            return f"above {self.above:g}" + f" and at most {self.high:g}" * (self.high < math.inf)
        if self.high < math.inf:
            return f"between {self.low:g} and {self.high:,g}"
        return f"{self.low:g} or more"


@dataclass(frozen=True)
class Entries:
    """Which tuples or lists a field takes: of how many values, and in which order."""

    least: int = 0
    rising: bool = False
    most: float = math.inf

    def __contains__(self, values: tuple | list) -> bool:
        in_order = not self.rising or list(values) == sorted(values)
        return self.least <= len(values) <= self.most and in_order

    def __str__(self) -> str:
        if self.rising:
            return "in rising order"
        return f"{self.least} {'' if self.least == self.most else 'or more '}values"


Count = Annotated[int, Range(1)]
Whole = Annotated[int, Range(0)]
Share = Annotated[float, Range(0, 1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(0)]
Portion = Annotated[float, Range(above=0, high=1)]  # of what would be nothing at 0


def checked(settings: S) -> S:
    """Settings whose values have the kind and the range that their fields declare.

    Args:
        settings: a dataclass.

    Returns:
        The same with 1e4 as 10000 where a whole number is declared, and with a list or a single
        value as a tuple where one is.

    Raises:
        UserError: naming the field, its value, and what it needs to be.
    """
    hints = _hints(type(settings))
    return replace(settings, **{n: in_range(n, getattr(settings, n), h) for n, h in hints.items()})


def in_range(name: str, value: Any, hint: Any) -> Any:
    """A value as a declared type has it, such as ``in_range("depth", 12, Count)``.

    A ``TypedDict`` declares a table of a file: it needs the fields that are not ``NotRequired``
    and may have others. Of one with ``total=False`` none is needed, and others are refused.

    Raises:
        UserError: naming the value and what it needs to be.
    """
    origin, parts = get_origin(hint), get_args(hint)
    if origin is Annotated:
        value = in_range(name, value, parts[0])
        for limits in parts[1:]:
            if value not in limits:
                raise UserError(f"{name} is {reprlib.repr(value)}; it needs to be {limits}")
    elif origin in (Union, UnionType):
        return None if value is None and NoneType in parts else _first(name, value, parts)
    elif origin is tuple:
        value = tuple(value) if isinstance(value, list | tuple) else (value,)
        hints = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(value) != len(hints):
            raise UserError(f"{name} is {value!r}; it needs {len(hints)} values")
        value = tuple(in_range(name, v, h) for v, h in zip(value, hints, strict=True))
    elif origin is NotRequired:
        return in_range(name, value, parts[0])
    elif origin is list:
        value = [in_range(f"{name}[{i}]", v, parts[0]) for i, v in enumerate(_a(list, name, value))]
    elif origin is dict:
        value = {
            k: in_range(_joined(name, k), v, parts[1]) for k, v in _a(dict, name, value).items()
        }
    elif is_typeddict(hint):
        value = _table(name, _a(dict, name, value), hint)
    elif origin is Literal:
        if not isinstance(value, str | int | float | NoneType) or value not in parts:
            raise UserError(f"{name} is {value!r}; choose {', '.join(map(repr, parts))}")
    elif is_dataclass(hint) and isinstance(value, hint | Mapping):
        if isinstance(value, Mapping):
            _check_names(hint, value)
            value = hint(**value)
        value = checked(value)
    else:
        value = _plain(name, value, hint)
    return value


def settings_from(kind: type[S], values: Mapping) -> S:
    """Settings from plain values, as a card holds them; what is missing has its default.

    Raises:
        UserError: for a name that the settings lack, or a value out of its range.
    """
    return in_range(kind.__name__, values, kind)


def changed(settings: S, texts: list[str]) -> S:
    """Settings with ``NAME=VALUE`` texts applied.

    Raises:
        UserError: for a name that the settings lack, or a value out of its range.
    """
    values = dict(map(parse_setting, texts))
    _check_names(type(settings), values)
    return checked(replace(settings, **values))


def parse_setting(text: str) -> tuple[str, object]:
    """``name=value`` → name and value; what is no Python literal is taken as a text.

    Raises:
        UserError: without an equal sign or a name.
    """
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise UserError(f"--set needs NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return name, value


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return hints if is_typeddict(kind) else {f.name: hints[f.name] for f in fields(kind)}


def _table(name: str, value: dict, kind: type) -> dict:
    """A table with the fields of a TypedDict in their ranges, and its others as they are."""
    hints = _hints(kind)
    if not kind.__total__:
        _check_names(kind, value)
    for key, hint in hints.items():
        if kind.__total__ and key not in value and get_origin(hint) is not NotRequired:
            raise UserError(f"{_joined(name, key)} is missing")
    found = {k: in_range(_joined(name, k), value[k], h) for k, h in hints.items() if k in value}
    return value | found


def _joined(name: str, key: str) -> str:
    return f"{name}.{key}" if name else str(key)


def _a(kind: type, name: str, value: Any) -> Any:
    """A value that has to be a list or a table."""
    if not isinstance(value, kind):
        needed = {list: "a list", dict: "a table of names and values"}[kind]
        raise UserError(
            f"{name or 'its content'} is {reprlib.repr(value)}; it needs to be {needed}"
        )
    return value


def _check_names(kind: type, values: Mapping) -> None:
    for name in values:
        if name not in _hints(kind):
            raise UserError(f"there is no setting {name!r}; there are {', '.join(_hints(kind))}")


def _first(name: str, value: Any, hints: tuple) -> Any:
    """A value as the first of several types that takes it, or the last one's complaint."""
    *others, last = (hint for hint in hints if hint is not NoneType)
    for hint in others:
        try:
            return in_range(name, value, hint)
        except UserError:
            continue
    return in_range(name, value, last)


def _plain(name: str, value: Any, kind: type) -> Any:
    """A number, truth value or text. A truth value is no number here, and NaN is none either."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    if kind is int and number and -LIMIT < value < LIMIT and int(value) == value:
        return int(value)
    if kind is float and number and -math.inf < value < math.inf:
        return value if isinstance(value, int) else float(value)
    if kind not in (int, float) and isinstance(value, kind):
        return value
    needed = KINDS.get(kind, f"a {kind.__name__}")
    if kind is int and number and abs(value) >= LIMIT:
        needed += f" below {LIMIT:,}"
    raise UserError(f"{name} is {reprlib.repr(value)}; it needs to be {needed}")
