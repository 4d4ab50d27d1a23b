"""Executes one notebook with papermill in a fresh process, and finds everything that went wrong.

Papermill alone would miss errors that a widget swallows, ``sys.exit(0)``, and tracebacks that a
thread or a logger prints; here the kernel's messages are watched one by one.
"""

from __future__ import annotations

import ast
import asyncio
import json
import logging
import math
import os
import re
import sys
import tempfile
import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from queue import Empty

import nbformat
import papermill
import psutil
import zmq
from jupyter_client.asynchronous import AsyncKernelClient
from jupyter_client.channels import AsyncZMQSocketChannel
from jupyter_client.kernelspec import KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import ensure_event_loop
from nbclient.exceptions import DeadKernelError
from nbformat import NotebookNode
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines
from papermill.exceptions import PapermillExecutionError
from papermill.execute import ERROR_MARKER_TAG
from traitlets import Type, default

from refiner.base.errors import UserError
from refiner.base.files import write_text

WIDGET = "application/vnd.jupyter.widget-view+json"
_ERROR = ("ename", "evalue")  # the two parts of an error message
TRACEBACK = "Traceback (most recent call last)"
LOOK_MS = 1000  # how often a channel looks for messages without having been told of one

_log = logging.getLogger("refiner.course.execute")
_log.addHandler(logging.NullHandler())  # what nbclient would log here is reported as a problem
_log.propagate = False


# ---------------------------------------------------------------- reading


def read_notebook(path: Path) -> NotebookNode:
    """Reads a notebook.

    Raises:
        ValueError: when the file is no valid notebook, naming it.
    """
    try:
        notebook = nbformat.read(path, as_version=4)
        nbformat.validate(notebook)
    except OSError:
        raise
    except Exception as error:  # nbformat raises many kinds for broken files
        raise UserError(f"{path} is not a valid notebook ({one_line(error, 120)})") from error
    return notebook


def title_of(notebook: NotebookNode) -> str:
    """The first heading of the first markdown cell; an empty text if there is none."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            heading = re.search(r"^#+\s+(.+)$", cell.source, re.MULTILINE)
            return heading.group(1).strip() if heading else ""
    return ""


def reading_minutes(notebook: NotebookNode) -> float:
    """How long its text takes to read at 200 words a minute, without code, links and tags."""
    texts = (cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    text = re.sub(r"^```.*?^```", "", "\n\n".join(texts), flags=re.DOTALL | re.MULTILINE)
    return len(re.sub(r"\]\([^)]*\)|<[^>]+>", " ", text).split()) / 200


def parameters_of(notebook: NotebookNode) -> dict[str, object]:
    """Names and default values in the cell tagged ``parameters``.

    The cell is parsed here, since ``papermill.inspect_notebook`` reads line by line and passes over
    lines with two equal signs.

    Raises:
        ValueError: when a value is not a literal. Papermill sets parameters after this cell ran, so
            a value computed in it would keep what it was computed from.
    """
    sources = [
        cell.source
        for cell in notebook.cells
        if cell.cell_type == "code" and "parameters" in cell.metadata.get("tags", [])
    ]
    try:
        statements = ast.parse("\n".join(sources)).body
    except SyntaxError as error:
        raise UserError(f"the parameters cell is no valid Python ({error.msg})") from None
    values = {}
    for x in statements:
        if isinstance(x, ast.Assign | ast.AnnAssign) and x.value:
            name = ast.unparse(x.targets[0] if isinstance(x, ast.Assign) else x.target)
            try:
                values[name] = ast.literal_eval(x.value)
            except ValueError:
                problem = f"the parameter {name} must be a literal, not computed"
                raise UserError(problem) from None
    return values


# ---------------------------------------------------------------- running


@dataclass
class Problem:
    """One thing that went wrong: the code cell (from 1), its first line, and the error."""

    cell: int | None
    line: str
    error: str

    def __str__(self) -> str:
        place = f"cell {self.cell} ({self.line}): " if self.cell else ""
        return place + self.error


@dataclass
class Executed:
    """An executed notebook, cleaned for saving, and what its run cost and recorded."""

    notebook: NotebookNode
    seconds: float
    processor_seconds: float | None
    peak_memory_mb: int | None
    metrics: dict[str, object]
    problems: list[Problem]


@dataclass
class _Watch:
    """What is seen of a running notebook; cells are indices into its list of cells."""

    on_cell: Callable[[int], None]
    cell: int | None = None
    errors: list[tuple[int | None, str]] = field(default_factory=list)
    stopped: tuple[int | None, str] | None = None  # an error that is no message of the kernel
    stderr: dict[int, str] = field(default_factory=dict)
    peak_memory_mb: int | None = None
    processor_seconds: float | None = None

    def start(self, cell: NotebookNode, cell_index: int) -> None:
        self.cell = cell_index
        self.on_cell(cell_index)

    def message(self, msg: dict, cell_index: int) -> None:
        content = msg["content"]
        if msg["msg_type"] == "error":
            self.errors.append((cell_index, ": ".join(filter(None, map(content.get, _ERROR)))))
        elif msg["msg_type"] == "stream" and content["name"] == "stderr":
            self.stderr[cell_index] = self.stderr.get(cell_index, "") + content["text"]


class _Channel(AsyncZMQSocketChannel):
    """Looks for messages itself every second.

    ZeroMQ's notice of a new message is now and then lost, and pyzmq then finds the message only
    when its wait ends (its issue 1558): a cell that had long finished took the whole timeout.
    """

    async def get_msg(self, timeout: float | None = None) -> dict:
        end = math.inf if timeout is None else time.monotonic() + timeout
        left = end - time.monotonic()
        while not await self.socket.poll(int(min(LOOK_MS, max(0, 1000 * left)))):
            left = end - time.monotonic()
            if left <= 0:
                raise Empty
        return await super().get_msg(timeout=0)


class _KernelClient(AsyncKernelClient):
    shell_channel_class = Type(_Channel)
    iopub_channel_class = Type(_Channel)


class _Kernel(AsyncKernelManager):
    """This very interpreter, whatever kernels are installed: without folders to search, Jupyter
    falls back to ``sys.executable -m ipykernel_launcher``."""

    client_factory = Type(_KernelClient)

    @default("transport_encryption")
    def _transport_encryption_default(self) -> str:
        return "auto" if zmq.has("curve") else "disabled"  # without, the kernel prints a warning

    @default("kernel_spec_manager")
    def _kernel_spec_manager_default(self) -> KernelSpecManager:
        return KernelSpecManager(kernel_dirs=[])


class _Client(PapermillNotebookClient):
    """Shows every message of the kernel to a watch, before a widget can swallow it."""

    def __init__(self, *args, watch: _Watch, **kwargs):
        super().__init__(*args, **kwargs)
        self.watch = watch

    def process_message(self, msg, cell, cell_index):
        self.watch.message(msg, cell_index)
        return super().process_message(msg, cell, cell_index)

    def papermill_execute_cells(self):
        try:
            super().papermill_execute_cells()
        except BaseException:  # too long, dead, or Ctrl-C: asking the kernel to stop is no use
            self.shutdown_kernel = "immediate"
            for task in asyncio.all_tasks(ensure_event_loop()):
                task.add_done_callback(_take_note)
                task.cancel()
            raise


def _take_note(task: asyncio.Task) -> None:
    """Asks an abandoned task for its error; asyncio prints those that nobody asked for."""
    if not task.cancelled():
        task.exception()


class _Engine(NBClientEngine):
    """Papermill's way to plug in a client: papermill injects, times and saves, ours runs."""

    @classmethod
    def execute_managed_notebook(
        cls, nb_man, kernel_name, *, watch, timeout, cwd_of_kernel, env, **unused
    ):
        kernel = {"kernel_name": kernel_name, "kernel_manager_class": _Kernel, "log": _log}
        limits = {"timeout": math.ceil(timeout), "startup_timeout": 120}
        client = _Client(nb_man, watch=watch, on_cell_execute=watch.start, **kernel, **limits)

        def measure(cell, cell_index, execute_reply):
            pid = client.km.provisioner.pid
            watch.peak_memory_mb = _peak_memory_mb(pid)
            watch.processor_seconds = _processor_seconds(pid)

        client.on_cell_executed = measure
        client.execute(env=env, cwd=str(cwd_of_kernel))


papermill_engines.register("refiner", _Engine)


def execute(
    notebook: NotebookNode,
    *,
    cwd: Path,
    parameters: dict[str, object] | None = None,
    timeout: float = 900.0,
    on_cell: Callable[[int], None] = lambda index: None,
) -> Executed:
    """Executes a notebook in a fresh process of this interpreter.

    Args:
        notebook: the notebook; it is not changed.
        cwd: the folder the notebook runs in.
        parameters: values to inject; without any, no cell is injected.
        timeout: seconds one cell may take.
        on_cell: called with the index of each code cell that starts.

    Returns:
        the executed notebook and what was seen. A failing notebook raises nothing: see
        ``problems``.
    """
    watch = _Watch(on_cell)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="refiner-") as folder:
        saved, recorded = Path(folder, "executed.ipynb"), Path(folder, "recorded.json")
        try:
            how = {"kernel_name": "python3", "language": "python", "progress_bar": False}
            own = {"watch": watch, "timeout": timeout, "cwd_of_kernel": cwd}  # for _Engine
            own["env"] = _environment(Path(folder), recorded)
            papermill.execute_notebook(
                notebook, str(saved), parameters=parameters, engine_name="refiner", **how, **own
            )
        except Exception as error:  # a dead kernel, a timeout; or an error seen in the messages
            if not (isinstance(error, PapermillExecutionError) and watch.errors):
                watch.stopped = (watch.cell, _say(error, timeout))
        seconds = time.perf_counter() - start
        done = nbformat.read(saved, as_version=4) if saved.exists() else deepcopy(notebook)
        metrics = json.loads(recorded.read_text()) if recorded.exists() else {}
    done = clean(done)
    problems = _problems(done, watch)
    spent = watch.processor_seconds
    return Executed(done, seconds, spent, watch.peak_memory_mb, metrics, problems)


def _environment(folder: Path, recorded: Path) -> dict[str, str]:
    env = dict(os.environ)
    env["REFINER_RECORD"] = str(recorded)
    env["IPYTHONDIR"] = str(folder / "ipython")  # a user's start-up files would run in the lesson
    env["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    env["TQDM_DISABLE"] = "1"  # bars of plain text; for those of widgets see _settle_widgets
    checkout = Path(__file__).resolve().parent.parent.parent
    if (checkout / "pyproject.toml").is_file():  # the notebooks meet the library that runs them
        env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(checkout), env.get("PYTHONPATH")]))
    return env


def _say(error: Exception, timeout: float) -> str:
    if isinstance(error, TimeoutError):
        return f"TimeoutError: the cell took longer than {timeout:g} s"
    if isinstance(error, DeadKernelError):
        return "DeadKernelError: the notebook's process ended, perhaps for lack of memory"
    return f"{type(error).__name__}: {error}"


def _peak_memory_mb(pid: int) -> int | None:
    """The largest resident size so far of a process in MiB; None where /proc does not tell."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return None
    peak = re.search(r"VmHWM:\s+(\d+) kB", status)
    return int(peak.group(1)) // 1024 if peak else None


def _processor_seconds(pid: int) -> float | None:
    """Processor time so far of a process and the children it waited for; None if it is gone.

    On a machine that does other work too it says more than the clock.
    """
    try:
        return sum(psutil.Process(pid).cpu_times()[:4])
    except psutil.Error:
        return None


def _problems(notebook: NotebookNode, watch: _Watch) -> list[Problem]:
    """At most one problem a cell: the first error, else a traceback printed to stderr."""
    first = dict([watch.stopped]) if watch.stopped else {}
    for index, error in watch.errors:
        shown = any(o.output_type == "error" for o in notebook.cells[index].outputs)
        first.setdefault(index, error if shown else f"{error} (inside a widget)")
    for index, text in watch.stderr.items():
        if TRACEBACK in text:
            first.setdefault(index, f"{text.strip().splitlines()[-1]} (printed to stderr)")
    order = sorted(first, key=lambda index: -1 if index is None else index)
    return [_problem(notebook, index, first[index]) for index in order]


def _problem(notebook: NotebookNode, index: int | None, error: str) -> Problem:
    if index is None:  # not one cell was reached
        return Problem(None, "", one_line(error))
    before = notebook.cells[: index + 1]
    number = sum(cell.cell_type == "code" and not is_injected(cell) for cell in before)
    lines = [line.strip() for line in before[-1].source.splitlines() if line.strip()]
    return Problem(number, one_line(lines[0] if lines else "", 80), one_line(error))


def one_line(text: object, width: int = 300) -> str:
    """A text without colour codes and line breaks, cut to ``width`` characters."""
    plain = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(text)).split())
    return plain if len(plain) <= width else plain[: width - 1] + "…"


# ---------------------------------------------------------------- saving


def is_injected(cell: NotebookNode) -> bool:
    """Whether papermill added this cell to set parameters."""
    return "injected-parameters" in cell.metadata.get("tags", [])


def clean(notebook: NotebookNode) -> NotebookNode:
    """Removes in place what only the run knew: widget state, times, papermill's notes."""
    for key in ("widgets", "papermill"):
        notebook.metadata.pop(key, None)
    notebook.cells = [
        c for c in notebook.cells if ERROR_MARKER_TAG not in c.metadata.get("tags", [])
    ]
    for cell in notebook.cells:
        for key in ("papermill", "execution"):
            cell.metadata.pop(key, None)
        if cell.metadata.get("tags") == []:
            del cell.metadata["tags"]
        if cell.cell_type == "code":
            cell.outputs = _settle_widgets(cell.outputs)
    return notebook


def _settle_widgets(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Drops progress bars and says what the other widgets were.

    A widget without its state shows an error in JupyterLab.
    """
    kept = []
    for output in outputs:
        data = output.get("data", {})
        if WIDGET in data and re.search(r"\[\d+:\d\d", data.get("text/plain", "")):
            continue  # tqdm's bar describes itself with its clock: 40%|████ | 2/5 [00:01<…
        if WIDGET in data:
            output.data = {"text/plain": "[interactive panel: run this cell to use it]"}
        kept.append(output)
    return kept


def write_back(path: Path, executed: NotebookNode, measured: dict[str, object]) -> None:
    """Copies outputs into the notebook they came from; its ids and sources stay.

    Args:
        path: the notebook.
        executed: what ran.
        measured: what the run cost and where it ran; becomes ``metadata.refiner.measured``.
    """
    notebook = read_notebook(path)
    notebook.metadata.setdefault("refiner", {})["measured"] = measured
    code = ([c for c in n.cells if c.cell_type == "code"] for n in (notebook, executed))
    for cell, done in zip(*code, strict=True):  # a text added during a run harms nobody
        cell.outputs, cell.execution_count = done.outputs, done.execution_count
    save_notebook(path, clean(notebook))


def save_notebook(path: Path, notebook: NotebookNode) -> None:
    """Writes a notebook atomically."""
    write_text(path, nbformat.writes(notebook).rstrip("\n") + "\n")


ABSOLUTE_PATH = re.compile(
    r"(?<![\w.:/<-])(?:/(?:home|Users|root|tmp|var|opt|usr|mnt|work|srv|private)/[^\s'\"<>:,)]+"
    r"|[A-Za-z]:\\\\?[^\s'\"<>:,)]+)"
)


def machine_paths(notebook: NotebookNode) -> list[str]:
    """Absolute paths in the outputs: they mean nothing on another machine.

    Returns:
        the paths found, each once.
    """
    here = [os.path.expanduser("~"), sys.prefix, str(Path(__file__).resolve().parent.parent.parent)]
    found = []
    for cell in notebook.cells:
        for output in cell.get("outputs", []):
            text = _text_of(output)
            found += ABSOLUTE_PATH.findall(text)
            found += [place for place in here if place != "/" and f"{place}/" in text]
    return sorted(set(found))


def _text_of(output: NotebookNode) -> str:
    parts = [output.get("text", ""), *output.get("traceback", [])]
    parts += [v for k, v in output.get("data", {}).items() if not k.startswith("image/")]
    return "\n".join(v if isinstance(v, str) else json.dumps(v) for v in parts)
