"""Where things lie and how they are said: folders of data and caches, the machine, amounts."""

from __future__ import annotations

import json
import os
import sys
from importlib.resources import files
from pathlib import Path

import torch


def measured(name: str) -> dict:
    """A study's result that comes with the course, for runs too long for a notebook.

    Args:
        name: of a file in ``benchmarks/results``, without ``.json``.

    Returns:
        Its content; ``["command"]`` makes it again.

    Raises:
        FileNotFoundError: for an unknown name, with the known ones.
    """
    folder = Path(__file__).resolve().parent.parent.parent / "benchmarks" / "results"
    path = folder / f"{name}.json"
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.json")))
        raise FileNotFoundError(
            f"no measured result {name!r} in benchmarks/results; there are: {known or 'none'} "
            "(they come with the repository, not with an installed package)"
        )
    return json.loads(path.read_text())


def find_notebooks(folder: str | Path | None = None) -> Path:
    """The notebooks' folder: the given one, ``notebooks`` here, or the one beside the library.

    Raises:
        FileNotFoundError: when there is none, or no notebook in it.
    """
    beside = Path(__file__).resolve().parent.parent.parent / "notebooks"
    places = [Path(folder)] if folder is not None else [Path("notebooks"), beside]
    found = next((place.resolve() for place in places if place.is_dir()), None)
    if found is None:
        raise FileNotFoundError(f"the notebooks folder {places[0]} does not exist")
    if not any(found.glob("*.ipynb")):
        raise FileNotFoundError(f"there are no notebooks in {places[0]}")
    return found


# ---------------------------------------------------------------- progress


def clock(seconds: float) -> str:
    """Seconds as ``m:ss`` or ``h:mm:ss``."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def cache_folder() -> Path:
    """Where rendered and downloaded images are kept; safe to delete at any time.

    ``$REFINER_CACHE`` if it is set, else ``refiner`` in the platform's cache folder:
    ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on a Mac, ``%LOCALAPPDATA%`` on
    Windows.
    """
    if os.environ.get("REFINER_CACHE"):
        return Path(os.environ["REFINER_CACHE"]).expanduser()
    if sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    elif sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local")
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / "refiner"


def data_folder() -> Path:
    """Where the embedded checkpoints lie: in the installed package, or in the repository."""
    package = Path(str(files("refiner")))
    installed = package / "_data"  # see setup.py
    return installed if installed.is_dir() else package.parent / "data"


GB = 1e9


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def machine() -> dict[str, object]:
    """The machine in words, for cards and result files: processor, cores, GPU, versions."""
    processor = "unknown"
    info = Path("/proc/cpuinfo")
    if info.is_file():
        names = [x.split(":", 1)[1] for x in info.read_text().splitlines() if "model name" in x]
        processor = names[0].strip() if names else processor
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": gpu,
        "torch": torch.__version__,
    }
