"""Where things lie and how they are said: folders of data and caches, the machine, amounts."""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path

from refiner.base.errors import UserError


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


# ---------------------------------------------------------------- data and caches


def data_folder() -> Path:
    """Where the embedded checkpoints lie: in the installed package, or in the repository."""
    package = Path(__file__).resolve().parent.parent
    installed = package / "_data"  # see setup.py
    return installed if installed.is_dir() else package.parent / "data"


# What names each library's cache, and the folder that it gets where there is no other place.
CACHES = {
    "REFINER_CACHE": "refiner",
    "NUMBA_CACHE_DIR": "numba",
    "MPLCONFIGDIR": "matplotlib",
    "TORCH_HOME": "torch",
    "TORCHINDUCTOR_CACHE_DIR": "torchinductor",
    "TRITON_CACHE_DIR": "triton",
    "HF_HOME": "huggingface",
}


def cache_folder() -> Path:
    """Where rendered and downloaded images are kept; safe to delete at any time.

    ``$REFINER_CACHE`` if it is set, else ``refiner`` in the platform's cache folder:
    ``$XDG_CACHE_HOME`` or ``~/.cache``, ``~/Library/Caches`` on a Mac, ``%LOCALAPPDATA%`` on
    Windows.
    """
    if os.environ.get("REFINER_CACHE"):
        return Path(os.environ["REFINER_CACHE"]).expanduser()
    return _platforms_caches() / "refiner"


def settle_caches() -> None:
    """Gives every cache a temporary folder where the platform's cannot be written.

    Containers and services often run without a home. ``import refiner`` calls this, before a
    library looks for its own cache; processes that are started later inherit the places.

    Warns:
        UserWarning: naming the folder, when a cache had no place.
    """
    homeless = [name for name in CACHES if not os.environ.get(name)]
    usual = _platforms_caches()
    if not homeless or _writable(usual):
        return
    folder = _temporary_caches()
    for name in homeless:
        os.environ[name] = str(folder / CACHES[name])
        Path(os.environ[name]).mkdir(exist_ok=True)
    warnings.warn(
        f"{usual} cannot be written: caches go to {folder} and may be lost. To keep them, set "
        "XDG_CACHE_HOME to a folder of yours",
        stacklevel=3,
    )


def _platforms_caches() -> Path:
    """By hand: where torch is, platformdirs often is not, and importing it takes its time."""
    home = Path(os.path.expanduser("~"))  # stays "~" where there is no home
    if sys.platform == "darwin":
        return home / "Library" / "Caches"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or home / "AppData" / "Local")
    return Path(os.environ.get("XDG_CACHE_HOME") or home / ".cache")


def _writable(folder: Path) -> bool:
    """Whether a folder can be written, or be made."""
    if not folder.is_absolute():
        return False
    there = next(p for p in (folder, *folder.parents) if os.path.exists(p))  # or may not be seen
    return os.path.isdir(there) and os.access(there, os.W_OK | os.X_OK)


def _temporary_caches() -> Path:
    """This user's temporary folder, the same at the next start unless somebody else made it."""
    import tempfile  # slow to import, and needed rarely

    user = os.getuid() if hasattr(os, "getuid") else "user"
    folder = Path(tempfile.gettempdir(), f"refiner-caches-{user}")
    folder.mkdir(mode=0o700, exist_ok=True)
    state = folder.lstat()
    ours = user == "user" or (state.st_uid == user and not state.st_mode & 0o022)
    return folder if ours and folder.is_dir() else Path(tempfile.mkdtemp(prefix="refiner-"))


# ---------------------------------------------------------------- words


GB = 1e9


def amount(size: float) -> str:
    """Bytes for people."""
    return f"{size / GB:.1f} GB" if size >= GB else f"{size / 1e6:.0f} MB"


def check_memory(size: float, what: str) -> None:
    """Refuses what this machine cannot hold, before it is tried.

    Raises:
        UserError: saying how much was wanted and how much there is.
    """
    import psutil

    free = psutil.virtual_memory().available
    if size > free:
        raise UserError(f"{what} needs {amount(size)} of memory; {amount(free)} are free")


def duration(seconds: float) -> str:
    """Seconds for people."""
    for unit, length in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{seconds:.0f} seconds"


def machine() -> dict[str, object]:
    """The machine in words, for cards and result files: processor, cores, GPU, versions."""
    import torch  # here, so that `import refiner` stays instant

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
