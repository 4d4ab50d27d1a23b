"""Files from the network: into the usual caches, resumed where they broke off, checked.

Files that the catalogue or timm knows go where ``torch.hub`` keeps its own, so what torch has
fetched is found, and the other way round; other addresses have a folder each beside them; files of
the Hugging Face hub go into its own cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import urllib.request
from http.client import HTTPException
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock
from tqdm.auto import tqdm

from refiner.base.errors import Damaged, UserError
from refiner.base.files import write_text
from refiner.models.convert import read_file

HUB = "https://huggingface.co/"
CHUNK = 2**20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without progress


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` asks for no network at all."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def file_name(address: str) -> str:
    """The last part of an address, as the name of a file.

    Raises:
        UserError: where it is none: empty, or one that leads to another folder.
    """
    try:
        name = unquote(urlsplit(address).path.rpartition("/")[2])
    except ValueError as error:
        raise UserError(f"{address} is no address ({error})") from error
    if name in ("", ".", "..") or not name.isprintable() or set(name) & set('/\\:*?"<>|'):
        raise UserError(f"{address} does not end in a file's name; give the address of a file")
    return name


def cache_path(address: str, file: str | None = None) -> Path:
    """Where an address is kept: under a known ``file``, or in a folder of the address alone."""
    checkpoints = Path(torch.hub.get_dir()) / "checkpoints"
    if file:
        return checkpoints / file
    name, key = file_name(address), hashlib.sha256(address.encode("utf-8", "replace")).hexdigest()
    return checkpoints / "refiner" / key[:16] / name


def download(address: str, *, file: str | None = None, md5: str | None = None) -> Path:
    """A checkpoint's place on this machine, fetched first if it is not there yet.

    A download grows in ``<name>.part`` beside its place, goes on there if it was interrupted, and
    gets its name only when it is complete, its checksum is right, and it can be read.

    Args:
        address: http(s); addresses of the Hugging Face hub go through its own cache.
        file: name in the cache, for an address that is known to be the only one with it; by
            default the address has a folder of its own there.
        md5: expected checksum in hex, or how it begins. A name such as ``resnet-11ad3fa6.pth``
            carries the beginning of its SHA-256, as in torch.hub.

    Raises:
        FileNotFoundError: when it cannot be fetched, saying which file to put where.
        UserError: for an address that names no file, a wrong checksum, or content that is no
            checkpoint; nothing is kept.
    """
    if address.startswith(HUB) and "/resolve/" in address:
        return _from_hub(address)
    target = cache_path(address, file)
    named = re.search(r"-([0-9a-f]{8,64})\.\w+$", target.name)
    expected = ({"sha256": named[1]} if named else {}) | ({"md5": md5} if md5 else {})
    if target.is_file():
        _check_cached(target, expected)
        return target
    advice = f"fetch {address} on a connected machine and put it at {target}"
    check_network(address, advice)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with FileLock(part.with_name(f".{part.name}.lock")):  # one process at a time
        if target.is_file():  # another process was faster
            return target
        try:
            _fetch(address, part, bool(expected))
            _check_fetched(part, address, expected)
            part.replace(target)
        except UserError:
            raise
        except (OSError, HTTPException, ValueError) as error:
            raise FileNotFoundError(f"{address}: {_reason(error)}; {advice}") from error
        finally:
            if not part.exists():
                _version(part).unlink(missing_ok=True)
    return target


def check_network(address: str, advice: str) -> None:
    """Fails at once where waiting is in vain: offline by wish, or no such host.

    Raises:
        FileNotFoundError: in one sentence that ends with the advice.
    """
    if offline():
        raise FileNotFoundError(f"HF_HUB_OFFLINE is set and the file is in no cache; {advice}")
    host = urlsplit(address).hostname
    if not host:
        raise FileNotFoundError(f"{address} names no host; {advice}")
    if urllib.request.getproxies():
        return  # the proxy knows the names
    try:
        socket.getaddrinfo(host, None)
    except (OSError, UnicodeError):
        raise FileNotFoundError(f"no network: {host} is not reachable; {advice}") from None


# ---------------------------------------------------------------- the transfer


def _fetch(address: str, part: Path, checked: bool) -> None:
    """Appends to ``part`` until it is complete; ``checked`` is whether a checksum will tell."""
    attempts, total = 0, None
    with tqdm(desc=part.stem, unit="B", unit_scale=True) as bar:
        while total is None or part.stat().st_size < total:
            before = part.stat().st_size if part.exists() else 0
            try:
                total = _once(address, part, checked, bar)
            except urllib.error.HTTPError:
                raise
            except (OSError, EOFError, HTTPException) as error:
                gained = part.exists() and part.stat().st_size > before
                attempts = 1 if gained else attempts + 1
                if attempts >= ATTEMPTS:
                    raise OSError(_reason(error)) from error


def _version(part: Path) -> Path:
    """Where the server's mark of the version that ``part`` is a part of is kept."""
    return part.with_suffix(".version")


def _once(address: str, part: Path, checked: bool, bar: tqdm) -> int:
    """One request from where ``part`` ends; the file's total size in bytes.

    Raises:
        EOFError: when the connection ends early.
    """
    request, have = _request(address, part, checked)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # what we have is all there is, or too much
            raise
        part.unlink()
        raise EOFError("the partial file did not fit") from error
    with answer:
        if answer.status != 206:
            have = 0  # the server does not resume, or has another version
        elif not answer.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
            part.unlink()
            raise EOFError("the server sent another part than it was asked for")
        mark = answer.headers.get("ETag", "")  # a weak one says nothing about bytes
        write_text(_version(part), "" if mark.startswith("W/") else mark)
        length = answer.headers.get("Content-Length", "")
        bar.total = have + int(length) if length.isdecimal() else None
        bar.n = have
        with open(part, "r+b" if have else "wb") as out:
            out.seek(have)
            while chunk := answer.read(CHUNK):
                out.write(chunk)
                bar.update(len(chunk))
        size = part.stat().st_size
        if bar.total and size < bar.total:
            raise EOFError(f"it broke off after {size:,} of {bar.total:,} bytes")
        return size


def _request(address: str, part: Path, checked: bool) -> tuple[urllib.request.Request, int]:
    """The request, and the bytes that are there already: none where nobody could tell a mixture."""
    have = part.stat().st_size if part.exists() else 0
    mark = _version(part).read_text() if _version(part).is_file() else ""
    headers = {"User-Agent": "mim-refiner-lab"}
    if have and (mark or checked):
        headers["Range"] = f"bytes={have}-"
        if mark:
            headers["If-Range"] = mark
    else:
        have = 0
    return urllib.request.Request(address, headers=headers), have


def _difference(path: Path, expected: dict[str, str]) -> str:
    """How a file's digests differ from those that are known; empty where they do not."""
    for kind, begin in expected.items():
        with open(path, "rb") as content:
            digest = hashlib.file_digest(content, kind).hexdigest()
        if not digest.startswith(begin.lower()):
            return f"has the {kind} {digest}, expected {begin}"
    return ""


def _check_fetched(part: Path, address: str, expected: dict[str, str]) -> None:
    """Deletes what was fetched unless it is the file that is known, or at least a checkpoint."""
    difference = _difference(part, expected)
    try:
        if not expected:
            read_file(part)
    except Damaged:
        difference = "is incomplete or no checkpoint, such as the page of a login"
    # What asks for code is told when it is loaded.
    except UserError:
        pass
    if difference:
        part.unlink()
        raise UserError(
            f"the file from {address} {difference}; it was deleted: try again, and if it stays so, "
            "the file was changed"
        )


def _check_cached(target: Path, expected: dict[str, str]) -> None:
    """Compares a file with its known digests, once for each size and time that it has."""
    seen, state = target.with_name(f".{target.name}.checked"), target.stat()
    now = f"{state.st_size} {state.st_mtime_ns} {expected}"
    if not expected or (seen.is_file() and seen.read_text() == now):
        return
    if difference := _difference(target, expected):
        raise UserError(
            f"{target} {difference}: it is damaged or another file; delete it to fetch it again"
        )
    try:
        write_text(seen, now)
    except OSError:  # a cache that others share: it is compared again next time
        return


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    return " ".join((str(getattr(error, "reason", None) or error) or type(error).__name__).split())


# ---------------------------------------------------------------- Hugging Face's hub


def _from_hub(address: str) -> Path:
    repository, _, rest = address.removeprefix(HUB).partition("/resolve/")
    return from_hub(repository, unquote(rest.partition("/")[2].split("?")[0]))


def from_hub(repository: str, file: str) -> Path:
    """A file of a repository on the Hugging Face hub, in the hub's own cache.

    Raises:
        FileNotFoundError: when it cannot be fetched, saying what to put where.
    """
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    address = f"{HUB}{repository}/resolve/main/{file}"
    advice = (
        f"fetch {address} on a connected machine, put it anywhere on this one and give load_model "
        "its path"
    )
    try:
        found = try_to_load_from_cache(repository, file)
        if not isinstance(found, str):
            check_network(address, advice)
            found = hf_hub_download(repository, file)
        return Path(found)
    # A wrong name, a broken connection: the hub's errors are those of whatever library asks.
    except Exception as error:
        reason = " ".join(str(error).split())
        if isinstance(error, FileNotFoundError) and reason.endswith(advice):
            raise
        raise FileNotFoundError(f"{address}: {reason}; {advice}") from error
