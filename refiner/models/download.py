"""Files from the network: into the usual caches, resumed where they broke off, checked.

Plain addresses go where ``torch.hub`` keeps its files, so what torch has fetched is found, and
the other way round; files of the Hugging Face hub go into its own cache.
"""

from __future__ import annotations

import hashlib
import os
import re
import socket
import urllib.request
from pathlib import Path
from urllib.parse import unquote, urlsplit

import torch
from filelock import FileLock
from tqdm.auto import tqdm

from refiner.base.errors import UserError

HUB = "https://huggingface.co/"
CHUNK = 2**20
TIMEOUT = 30.0  # seconds without a byte
ATTEMPTS = 5  # in a row without progress


def offline() -> bool:
    """Whether ``HF_HUB_OFFLINE`` asks for no network at all."""
    return os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")


def cache_path(address: str, file: str | None = None) -> Path:
    """Where a plain address is kept: torch.hub's checkpoints, under ``file`` or its own name."""
    file = file or unquote(Path(urlsplit(address).path).name)
    return Path(torch.hub.get_dir()) / "checkpoints" / file


def download(
    address: str,
    *,
    file: str | None = None,
    sha256: str | None = None,
    md5: str | None = None,
    progress: bool = True,
) -> Path:
    """A file's place on this machine, fetched first if it is not there yet.

    A download grows in ``<name>.part`` beside its place, goes on there if it was interrupted, and
    gets its name only when it is complete and its checksum is right.

    Args:
        address: http(s); addresses of the Hugging Face hub go through its own cache.
        file: name in the cache; default the last part of the address.
        sha256, md5: expected checksum in hex, or how it begins. A name such as
            ``resnet-11ad3fa6.pth`` carries the beginning of its SHA-256, as in torch.hub.
        progress: show a bar.

    Raises:
        FileNotFoundError: when it cannot be fetched, saying which file to put where.
        ValueError: for a wrong checksum; nothing is kept.
    """
    if address.startswith(HUB) and "/resolve/" in address:
        return _from_hub(address)
    target = cache_path(address, file)
    if target.is_file():
        return target
    advice = f"fetch {address} on a connected machine and put it at {target}"
    check_network(address, advice)
    if sha256 is None and (named := re.search(r"-([0-9a-f]{8,64})\.\w+$", target.name)):
        sha256 = named.group(1)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(target.name + ".part")
    with FileLock(part.with_name(f".{part.name}.lock")):  # one process at a time
        if target.is_file():  # another process was faster
            return target
        try:
            _fetch(address, part, progress)
        except OSError as error:
            raise FileNotFoundError(f"{address}: {_reason(error)}; {advice}") from error
        _verify(part, address, sha256=sha256, md5=md5)
        part.replace(target)
    return target


def check_network(address: str, advice: str) -> None:
    """Fails at once where waiting is in vain: offline by wish, or no such host.

    Raises:
        FileNotFoundError: in one sentence that ends with the advice.
    """
    if offline():
        raise FileNotFoundError(f"HF_HUB_OFFLINE is set and the file is in no cache; {advice}")
    host = urlsplit(address).hostname
    if urllib.request.getproxies():
        return  # the proxy knows the names
    try:
        socket.getaddrinfo(host, None)
    except OSError:
        raise FileNotFoundError(f"no network: {host} is not reachable; {advice}") from None


# ---------------------------------------------------------------- the transfer


def _fetch(address: str, part: Path, progress: bool) -> None:
    """Appends to ``part`` until it is complete."""
    attempts, total = 0, None
    with tqdm(desc=part.stem, unit="B", unit_scale=True, disable=not progress) as bar:
        while total is None or part.stat().st_size < total:
            before = part.stat().st_size if part.exists() else 0
            try:
                total = _once(address, part, bar)
            except urllib.error.HTTPError:
                raise
            except (OSError, EOFError) as error:
                gained = part.exists() and part.stat().st_size > before
                attempts = 1 if gained else attempts + 1
                if attempts >= ATTEMPTS:
                    raise OSError(_reason(error)) from error


def _once(address: str, part: Path, bar: tqdm) -> int:
    """One request from where ``part`` ends; the file's total size in bytes.

    Raises:
        EOFError: when the connection ends early.
    """
    have = part.stat().st_size if part.exists() else 0
    headers = {"User-Agent": "mim-refiner-lab"} | ({"Range": f"bytes={have}-"} if have else {})
    request = urllib.request.Request(address, headers=headers)
    try:
        answer = urllib.request.urlopen(request, timeout=TIMEOUT)
    except urllib.error.HTTPError as error:
        if error.code != 416:  # what we have is all there is, or too much
            raise
        part.unlink()
        raise EOFError("the partial file did not fit") from error
    with answer:
        if answer.status != 206:
            have = 0  # the server does not resume
        length = answer.headers.get("Content-Length")
        bar.total = have + int(length) if length else None
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


def _verify(part: Path, address: str, **expected: str | None) -> None:
    """Checks the digests that are known; a wrong file is deleted."""
    for kind, begin in expected.items():
        if begin is None:
            continue
        with open(part, "rb") as content:
            digest = hashlib.file_digest(content, kind).hexdigest()
        if not digest.startswith(begin.lower()):
            part.unlink()
            raise UserError(
                f"the file from {address} has the {kind} {digest}, expected {begin}; it was "
                "deleted: try again, and if it stays so, the file was changed"
            )


def _reason(error: BaseException) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"the server says {error.code} {error.reason}"
    return str(getattr(error, "reason", None) or error)


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

    found = try_to_load_from_cache(repository, file)
    if isinstance(found, str):
        return Path(found)
    address = f"{HUB}{repository}/resolve/main/{file}"
    advice = (
        f"fetch {address} on a connected machine, put it anywhere on this one and give load_model "
        "its path"
    )
    check_network(address, advice)
    try:
        return Path(hf_hub_download(repository, file))
    except OSError as error:
        reason = " ".join(str(error).split())
        raise FileNotFoundError(f"{address}: {reason}; {advice}") from error
