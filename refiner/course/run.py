"""``refiner course``: runs the notebooks and collects what they :func:`record`."""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import os
import platform
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypedDict

from refiner.base import places
from refiner.base.errors import MissingPackage, UserError
from refiner.base.files import one_run_a_folder, read_json, write_json
from refiner.base.places import clock, find_notebooks
from refiner.base.settings import NotNegative

if TYPE_CHECKING:
    from nbformat import NotebookNode


PRESETS = ("cpu", "gpu")
UNKNOWN_SECONDS = 60.0  # for a notebook that neither states its runtime nor ran before

RECORDED: dict[str, object] = {}
"""What :func:`record` noted in this process."""


# ---------------------------------------------------------------- recording


def record(name: str, value) -> None:
    """Notes a measurement under a name; the course runner collects and checks it.

    Args:
        name: what was measured, unique within the notebook.
        value: a number, a text, or a list of numbers; arrays and tensors of one axis count as
            lists.

    Raises:
        ValueError: for NaN, infinity, and anything else than the above.
    """
    RECORDED[name] = _plain(name, value)
    path = os.environ.get("REFINER_RECORD")
    if path:
        before = json.loads(Path(path).read_text()) if os.path.exists(path) else {}
        write_json(path, before | {name: RECORDED[name]})


def _plain(name: str, value) -> object:
    plain = value.tolist() if hasattr(value, "tolist") else value
    items = list(plain) if isinstance(plain, list | tuple) else [plain]
    numbers = all(isinstance(x, int | float) for x in items)
    if not numbers and not isinstance(plain, str):
        kind = type(value).__name__
        raise UserError(f"record({name!r}): use a number, a text or a list of numbers, not {kind}")
    bad = [x for x in items if isinstance(x, float) and not math.isfinite(x)]
    if bad:
        raise UserError(f"record({name!r}): {bad[0]} is no measurement; find out where it arose")
    return items if isinstance(plain, list | tuple) else plain


# ---------------------------------------------------------------- running


class Entry(TypedDict):
    """A notebook in ``summary.json``."""

    title: str
    status: Literal["ok", "failed"]
    seconds: NotNegative
    preset: str
    problems: list[str]
    metrics: dict[str, object]
    fingerprint: str


class Summary(TypedDict):
    """What an earlier run wrote to ``summary.json``."""

    notebooks: dict[str, Entry]


@dataclass
class Job:
    """A notebook about to run: ``parameters`` holds only values that differ from its own."""

    name: str
    path: Path
    notebook: NotebookNode
    title: str
    parameters: dict[str, object]
    fingerprint: str
    seconds: float


@one_run_a_folder
def run_course(
    notebooks: str | Path | None = None,
    out: str | Path = "runs/course",
    *,
    preset: str = "cpu",
    only: str | list[str] | None = None,
    parameters: dict[str, object] | None = None,
    resume: bool = False,
    timeout: float = 900.0,
    bands: str | Path | None = None,
    write_back: bool = False,
) -> dict:
    """Runs the notebooks one after another, each in a fresh process, and writes a report.

    Nothing runs and nothing is written before every argument was checked. A notebook that fails
    does not stop the others. ``summary.json`` is written after each, so an interrupted course goes
    on with ``resume=True``.

    Args:
        notebooks: their folder; None finds ``notebooks`` here or beside the library.
        out: receives the executed notebooks, each as a page, ``index.html`` and ``summary.json``.
        preset: "cpu" or "gpu", given to the notebooks that declare a parameter ``preset``.
        only: names, or numbers such as "03"; None runs all.
        parameters: further values; every notebook that runs must declare them.
        resume: keep notebooks that finished and have not changed since.
        timeout: seconds one cell may take.
        bands: JSON file ``{notebook: {metric: {"min", "max" or "equals"}}}``; None takes
            ``tests/bands.json`` beside the notebooks' folder if there is one. Compared wherever a
            notebook runs with its own parameters.
        write_back: copy the outputs into the notebooks themselves, without widget state and times.

    Returns:
        what ``summary.json`` holds: ``machine``; ``notebooks``, by name: ``status`` ("ok" or
        "failed"), ``problems``, ``metrics``, ``seconds``, ``peak_memory_mb``, …; and ``selected``:
        the names this call was about.

    Raises:
        ValueError: unknown notebook, preset or parameter, or a notebook that cannot be read.
        OSError: no such folder, or no place to write.
        ModuleNotFoundError: the packages of the extra ``lab`` are missing.
    """
    if not timeout > 0:
        raise UserError(f"the timeout must be above 0 seconds, got {timeout:g}")
    folder = find_notebooks(notebooks)
    names = _select(folder, only)
    _need_lab()
    out = Path(out).resolve()
    before = _read_summary(out / "summary.json")
    options = {"preset": preset, "parameters": parameters or {}, "before": before}
    jobs = [_job(folder, name, **options) for name in names]
    allowed = _read_bands(folder, bands)
    _check_places(folder, out, jobs, write_back)

    summary = {"machine": machine(), "notebooks": before, "selected": [job.name for job in jobs]}
    progress = _Progress(jobs)
    for job in jobs:
        entry = before.get(job.name, {})
        done = entry.get("status") == "ok" and entry["fingerprint"] == job.fingerprint
        if resume and done and (out / f"{job.name}.ipynb").is_file():
            progress.skip(job)
        else:
            progress.start(job)
            entry = _run(job, out, preset, timeout, allowed.get(job.name, {}), progress)
            progress.finish(entry)
        if write_back and entry["status"] == "ok":
            _write_back(job, out, entry)
        _save(folder, out, summary, job.name, entry)
    print(table(summary), f"\nReport: {out / 'index.html'}", sep="\n", flush=True)
    return summary


def _need_lab() -> None:
    try:
        import refiner.course.execute  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingPackage(
            f"running notebooks needs the package {error.name}: pip install 'mim-refiner-lab[lab]'"
        ) from error


def _select(folder: Path, only: str | list[str] | None) -> list[str]:
    """Names of the notebooks to run, in reading order."""
    names = sorted(path.stem for path in folder.glob("*.ipynb"))
    if only is None:
        return names
    asked = [only] if isinstance(only, str) else only
    asked = [part.strip() for item in asked for part in item.split(",") if part.strip()]
    chosen: set[str] = set()
    for item in asked:
        stem = item.removesuffix(".ipynb")
        number = stem.zfill(2) + "_"
        matches = {name for name in names if name == stem or name.startswith(number)}
        if not matches:
            near = [name for name in names if stem and stem.lower() in name.lower()]
            near = near or difflib.get_close_matches(stem, names, cutoff=0.4) or names
            raise UserError(f"there is no notebook {item!r}; the nearest are {', '.join(near)}")
        chosen |= matches
    if not chosen:
        raise UserError("--only names no notebook")
    return sorted(chosen)


def _job(folder: Path, name: str, *, preset: str, parameters: dict, before: dict) -> Job:
    """Reads a notebook and settles its parameters."""
    from refiner.course.execute import parameters_of, read_notebook, title_of

    if preset not in PRESETS:
        raise UserError(f"there is no preset {preset!r}; choose {' or '.join(PRESETS)}")
    path = folder / f"{name}.ipynb"
    notebook = read_notebook(path)
    try:
        known = parameters_of(notebook)
    except ValueError as error:
        raise UserError(f"{name}: {error}") from error
    for key, value in parameters.items():
        _check_parameter(name, key, value, known)
    wanted = ({"preset": preset} if "preset" in known else {}) | parameters
    changed = {key: value for key, value in wanted.items() if value != known[key]}
    sources = [[cell.cell_type, cell.source] for cell in notebook.cells]
    key = json.dumps([sources, changed], sort_keys=True).encode()
    stated = notebook.metadata.get("refiner", {}).get(f"minutes_{preset}")
    seconds = stated * 60 if isinstance(stated, int | float) else UNKNOWN_SECONDS
    past = before.get(name, {})
    if past.get("status") == "ok" and past.get("preset") == preset:
        seconds = past["seconds"]
    fingerprint = hashlib.sha256(key).hexdigest()
    return Job(name, path, notebook, title_of(notebook) or name, changed, fingerprint, seconds)


def _check_parameter(notebook: str, key: str, value: object, known: dict[str, object]) -> None:
    if key not in known:
        names = ", ".join(known) if known else "none at all"
        raise UserError(f"{notebook} has no parameter {key!r}; it knows {names}")
    own = known[key]
    fits = type(value) is type(own) or (type(own) is float and type(value) is int)
    if own is not None and not fits:
        raise UserError(
            f"{notebook}: the parameter {key} is {type(own).__name__} (its own value is {own!r}), "
            f"not {value!r}"
        )


def _check_places(folder: Path, out: Path, jobs: list[Job], write_back: bool) -> None:
    """Refuses what could not be written later, while nothing has run."""
    if out == folder:
        raise UserError(f"the results cannot go into the notebooks' own folder {out}")
    if write_back and any(job.parameters for job in jobs):
        raise UserError(
            "writing outputs back needs the notebooks' own parameters: leave out --set and --preset"
        )
    for place in [out, folder] if write_back else [out]:
        try:
            place.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=place).close()
        except OSError as error:
            reason = error.strerror or str(error)
            raise type(error)(f"cannot write to {place}: {reason}") from error


def _run(job: Job, out: Path, preset: str, timeout: float, bands: dict, progress) -> dict:
    """Runs one notebook and writes its two files; the entry for the summary says how it went."""
    from refiner.course.execute import execute, save_notebook
    from refiner.course.pages import write_page

    options = {"cwd": job.path.parent, "parameters": job.parameters, "timeout": timeout}
    done = execute(job.notebook, **options, on_cell=progress.cell)
    problems = [f"{job.name}, {problem}" for problem in done.problems]
    if not problems and not job.parameters:
        problems = [f"{job.name}: {text}" for text in outside_bands(done.metrics, bands)]
    save_notebook(out / f"{job.name}.ipynb", done.notebook)
    write_page(out / f"{job.name}.html", done.notebook, title=job.title, folder=job.path.parent)
    return {
        "title": job.title,
        "status": "failed" if problems else "ok",
        "seconds": round(done.seconds, 2),
        "processor_seconds": done.processor_seconds,
        "peak_memory_mb": done.peak_memory_mb,
        "preset": preset,
        "parameters": job.parameters,
        "problems": problems,
        "metrics": done.metrics,
        "fingerprint": job.fingerprint,
        "finished": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
    }


def _write_back(job: Job, out: Path, entry: dict) -> None:
    from refiner.course.execute import machine_paths, read_notebook, write_back

    executed = read_notebook(out / f"{job.name}.ipynb")
    for path in machine_paths(executed):
        print(f"warning: {job.name} shows a path of this machine: {path}", file=sys.stderr)
    facts = places.machine()
    cost = {key: entry.get(key) for key in ("seconds", "processor_seconds", "peak_memory_mb")}
    write_back(job.path, executed, cost | {k: facts[k] for k in ("cores", "processor")})


# ---------------------------------------------------------------- bands and summary


def outside_bands(metrics: dict[str, object], bands: dict[str, dict]) -> list[str]:
    """What is missing among recorded values or lies outside its band.

    Args:
        metrics: recorded values by name; of a list, every number must lie in the band.
        bands: by name: ``min`` and ``max`` (both inclusive, each optional), or ``equals``.

    Returns:
        one sentence for each.
    """
    problems = []
    for name, band in bands.items():
        if name not in metrics:
            problems.append(f"{name} was not recorded")
        elif not _inside(metrics[name], band):
            wanted = f"{band.get('min', '−∞')} … {band.get('max', '∞')}"
            wanted = band.get("equals", wanted)
            problems.append(f"{name} is {metrics[name]}, outside its band {wanted}")
    return problems


def _inside(value: object, band: dict) -> bool:
    if "equals" in band:
        return value == band["equals"]
    items = value if isinstance(value, list) else [value]
    low, high = band.get("min", -math.inf), band.get("max", math.inf)
    return bool(items) and all(not isinstance(x, str) and low <= x <= high for x in items)


def _read_bands(folder: Path, path: str | Path | None) -> dict[str, dict[str, dict]]:
    beside = folder.parent / "tests" / "bands.json"
    if path is None and not beside.is_file():
        return {}
    path = Path(path or beside)
    bands = read_json(path, dict[str, dict[str, dict[str, object]]])
    kinds = [set(band) for metrics in bands.values() for band in metrics.values()]
    for kind in kinds:
        if not (kind == {"equals"} or (kind and kind <= {"min", "max"})):
            raise UserError(f"{path}: a band has min and max, or equals, not {sorted(kind)}")
    return bands


def _read_summary(path: Path) -> dict[str, dict]:
    """The notebooks' entries of an earlier run in the same place; empty without one."""
    try:
        return read_json(path, Summary)["notebooks"]
    except (FileNotFoundError, NotADirectoryError):  # the latter is refused a little later
        return {}


def _save(folder: Path, out: Path, summary: dict, name: str, entry: dict) -> None:
    """Writes the summary and the index with a new entry; notebooks that are gone leave both."""
    from refiner.course.pages import write_index

    entries = summary["notebooks"] | {name: entry}
    summary["notebooks"] = {
        key: entries[key]
        for key in sorted(entries)
        if (folder / f"{key}.ipynb").is_file() and (out / f"{key}.ipynb").is_file()
    }
    write_json(out / "summary.json", summary)
    write_index(out, summary)


def machine() -> dict[str, object]:
    """The machine in words, without its name: cores, system, versions."""
    versions = {}
    for package in ("torch", "timm", "mim-refiner-lab"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return {
        "cores": os.cpu_count(),
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        **versions,
    }


def table(summary: dict) -> str:
    """The selected notebooks in a table of plain text, and what went wrong below it."""
    from refiner.course.pages import key_figures

    entries = {name: summary["notebooks"][name] for name in summary["selected"]}
    width = max(8, *(len(name) for name in entries))
    lines = ["", f"{'notebook':<{width}}  {'time':>7}  status  key figures"]
    for name, entry in entries.items():
        spent, figures = clock(entry["seconds"]), key_figures(entry["metrics"])
        lines.append(f"{name:<{width}}  {spent:>7}  {entry['status']:<6}  {figures}".rstrip())
    problems = [text for entry in entries.values() for text in entry["problems"]]
    return "\n".join([*lines, *(["", *problems] if problems else [])])


class _Progress:
    """Prints where the course is and how long it may still take.

    The estimate is what each notebook states or took last time, scaled by how this run compares
    so far. On a terminal one line follows the cells; in a log each notebook has one line.
    """

    def __init__(self, jobs: list[Job]):
        self.jobs, self.done, self.live = jobs, 0, sys.stdout.isatty()
        self.expected = self.spent = 0.0
        count = f"{len(jobs)} notebook{'s' if len(jobs) > 1 else ''}"
        print(f"{count}, about {clock(sum(job.seconds for job in jobs))}", flush=True)

    def start(self, job: Job) -> None:
        self.job, self.began = job, time.perf_counter()
        self.cells = sum(cell.cell_type == "code" for cell in job.notebook.cells)
        self.reached = 0
        if not self.live:
            self._print(f"started, about {clock(job.seconds)}")

    def cell(self, index: int) -> None:
        self.reached += 1
        if self.live:
            left = self._left(self.done) - (time.perf_counter() - self.began)
            note = f"cell {self.reached}/{self.cells}, about {clock(max(left, 0))} left"
            self._print(note, end="")

    def finish(self, entry: dict) -> None:
        self.expected += self.job.seconds
        self.spent += entry["seconds"]
        self._next(f"{entry['status']} in {clock(entry['seconds'])}")

    def skip(self, job: Job) -> None:
        self.job = job
        self._next("unchanged, kept")

    def _next(self, note: str) -> None:
        left = self._left(self.done + 1)
        self._print(note + (f", about {clock(left)} left" if left else ""))
        self.done += 1

    def _left(self, first: int) -> float:
        # A minute's prior: the first few are noisy.
        scale = (self.spent + 60) / (self.expected + 60)
        return scale * sum(job.seconds for job in self.jobs[first:])

    def _print(self, note: str, end: str = "\n") -> None:
        lead = "\r\x1b[K" if self.live else ""
        place = f"[{self.done + 1}/{len(self.jobs)}] {self.job.name}"
        print(f"{lead}{place}  {note}", end=end, flush=True)
