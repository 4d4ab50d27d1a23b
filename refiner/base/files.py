"""Files that are written whole or not at all, and JSON that is checked when it is read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from refiner.base.errors import UserError
from refiner.base.settings import in_range


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it onto ``path`` on success.

    A reader sees the old file or the new one, never half of one; a failed write leaves the old.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    umask = os.umask(0)
    os.umask(umask)
    try:
        yield Path(temporary)
        # mkstemp and safetensors make files that only their owner can read.
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    finally:
        Path(temporary).unlink(missing_ok=True)


def readable(name: object) -> str:
    """A name that can be shown and written: bytes of a file name that are no UTF-8 become "?"."""
    return str(name).encode("utf-8", "replace").decode("utf-8")


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Writes JSON atomically, with a newline at the end; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def read_json(path: str | Path, kind: Any = object) -> Any:
    """What a JSON file holds, checked against a declared type.

    Args:
        path: the file.
        kind: for :func:`refiner.base.settings.in_range`, a TypedDict in the main.

    Raises:
        FileNotFoundError: without such a file.
        UserError: saying what is wrong with the file, or with which of its fields.
    """
    with naming(path):
        try:
            content = json.loads(Path(path).read_text(encoding="utf-8-sig"))
        except (ValueError, RecursionError) as error:
            raise UserError(f"the file is empty, damaged or no JSON ({error})") from error
        return in_range("", content, kind)


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Says the file's name in front of errors about what is in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
