"""Files that are written whole or not at all, folders that one run holds, JSON that is checked."""

from __future__ import annotations

import inspect
import json
import math
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import wraps
from pathlib import Path
from typing import Any, BinaryIO

from refiner.base.errors import UserError
from refiner.base.places import amount
from refiner.base.settings import in_range


@contextmanager
def replacing(path: str | Path) -> Iterator[Path]:
    """Yields a temporary path beside ``path`` and renames it onto ``path`` on success.

    A reader sees the old file or the new one, never half of one; a failed write leaves the old.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = f".{path.name}.{os.getpid()}-"
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=prefix, suffix=".half")
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


HALF_WRITTEN = re.compile(r"\..+\.(\d+)-\w{8}\.half")  # by which process; see replacing
RANKS = ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "MV2_COMM_WORLD_RANK")


def one_run_a_folder(function: Callable) -> Callable:
    """Lets a function with an argument ``out`` run only while it :func:`holds <holding>` that."""
    signature = inspect.signature(function)

    @wraps(function)
    def alone(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        with holding(given.arguments["out"]):
            return function(*args, **kwargs)

    return alone


def _leads() -> bool:
    """Whether this is the first of the processes that share a run, or the only one."""
    if any(os.environ.get(name, "0") != "0" for name in RANKS):
        return False
    if "torch" not in sys.modules:  # nothing trains yet, and the import takes seconds
        return True
    from refiner.base.parallel import rank

    return rank() == 0


@contextmanager
def holding(folder: str | Path | None) -> Iterator[None]:
    """Keeps other runs out of a folder, and removes what killed ones left half-written there.

    Of processes that share a run the first holds it. A folder in which nothing can be locked is
    not held; one that was made for the lock alone goes again.

    Args:
        folder: made where it is missing; None holds nothing.

    Raises:
        UserError: when a living run holds it.
    """
    if folder is None or not _leads():
        yield
        return
    from filelock import FileLock, Timeout

    folder = Path(folder)
    new = [place for place in (folder, *folder.parents) if not place.exists()]
    lock = FileLock(folder / ".lock")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire(blocking=False)
    except Timeout:
        raise UserError(
            f"another run writes to {folder}: wait for it, or give another out"
        ) from None
    except (OSError, NotImplementedError):  # the function will say what is wrong with the folder
        yield
        return
    try:
        remove_half_written(folder)
        yield
    finally:
        with suppress(OSError):
            (folder / ".lock").unlink(missing_ok=True)
        lock.release()
        for place in new:
            with suppress(OSError):  # not empty
                place.rmdir()


def remove_half_written(folder: Path) -> None:
    """Removes what :func:`replacing` left in a folder and its figures, but for living processes."""
    import psutil

    for path in (*folder.glob(".*.half"), *folder.glob("figures/.*.half")):
        found = HALF_WRITTEN.fullmatch(path.name)
        if found and not psutil.pid_exists(int(found[1])):
            path.unlink(missing_ok=True)


def readable(name: object) -> str:
    """A name that can be shown and written: what is no UTF-8, or moves a cursor, becomes "?"."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in str(name))


def reserve(file: BinaryIO, size: int) -> None:
    """Takes a file's space on the disk at once, where the system can.

    A disk that fills up under a memory-mapped file kills the process, without a word.

    Raises:
        OSError: saying how much was wanted.
    """
    if hasattr(os, "posix_fallocate"):  # not on a Mac
        try:
            os.posix_fallocate(file.fileno(), 0, size)
        except OSError as error:
            raise OSError(
                f"a temporary file of {amount(size)} cannot be made: {error.strerror}; choose a "
                "folder on a larger disk"
            ) from error


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file atomically."""
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, content: object) -> None:
    """Writes JSON atomically, with a newline at the end; NaN and infinity are refused."""
    write_text(path, json.dumps(content, indent=1, allow_nan=False) + "\n")


def keep_in_cache(path: Path, what: str, write: Callable[[BinaryIO], object]) -> None:
    """Writes a file of a cache. Where that cannot be, it warns: what is kept is made again."""
    try:
        with replacing(path) as temporary, open(temporary, "wb") as file:
            write(file)
    except OSError as error:
        warnings.warn(
            f"{what} cannot be kept in {path.parent} ({error.strerror or error}) and will be made "
            "again next time. Set REFINER_CACHE to a writable folder.",
            stacklevel=5,
        )


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
            text = Path(path).read_text(encoding="utf-8-sig")
            content = json.loads(text, parse_constant=_finite, parse_float=_finite)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the file is empty, damaged or no JSON ({error})") from error
        return in_range("", content, kind)


def _finite(word: str) -> float:
    if not math.isfinite(value := float(word)):
        raise ValueError(f"{word} is no number")
    return value


@contextmanager
def naming(path: str | Path) -> Iterator[None]:
    """Says the file's name in front of errors about what is in it."""
    try:
        yield
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


@contextmanager
def fitting(path: str | Path, read: bool = True) -> Iterator[None]:
    """Says of a file what Python and torch say of its inner tables.

    Args:
        path: the file.
        read: whether what is worked on was read from it; else errors are those of the code.

    Raises:
        UserError: naming the file.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not read:
            raise
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(
            f"{path} does not hold what it should ({reason}): it was changed, or another version "
            "wrote it"
        ) from error
