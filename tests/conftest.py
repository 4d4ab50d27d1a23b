"""Settings for every test."""

import json
import os
from pathlib import Path

# The tests' device is the CPU, also where there is a GPU: they compare with tensors that lie there.
# What a GPU does is looked at by test_simulated.py and, on a real one, benchmarks/one_gpu.py.
# Set before torch starts; processes that tests start inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: the notebooks' threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import pytest
import torch

matplotlib.use("Agg")  # no window, whatever the machine
# The tensors of tests are small: on a busy machine, more threads only wait for each other.
torch.set_num_threads(1)

NOTEBOOKS = Path(__file__).parent.parent / "notebooks"
NOTEBOOK = "test_the_notebook_runs_and_its_figures_lie_in_their_bands"
# Files that take half a minute or more, the longest first.
LONG = ("test_browser", "test_one_gpu", "test_kill", "test_parallel", "test_course", "test_site")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Keeps a file in one process, where what its tests have in common is made once.

    The notebooks are shared out one by one.
    """
    from xdist.scheduler import LoadScopeScheduling

    class ByFile(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return nodeid if NOTEBOOK in nodeid else nodeid.partition("::")[0]

    return ByFile(config, log)


def pytest_collection_modifyitems(items):
    """What takes long comes first, so that processes which share the tests end together."""
    order = {name: place for place, name in enumerate(LONG)}
    items.sort(key=lambda item: (-_seconds(item), order.get(item.path.stem, len(LONG))))


def _seconds(item) -> float:
    """Processor time of the notebook that a test runs, as stored in it; 0 for other tests."""
    if item.originalname != NOTEBOOK:
        return 0
    path = NOTEBOOKS / f"{item.callspec.params['name']}.ipynb"
    return json.loads(path.read_text())["metadata"]["refiner"]["measured"]["processor_seconds"]


def pytest_terminal_summary(terminalreporter):
    """What the notebooks measured, also where tests ran in several processes."""
    reports = (r for state in ("passed", "failed") for r in terminalreporter.getreports(state))
    said = sorted(v for r in reports for k, v in r.user_properties if k == "notebook")
    if said:
        terminalreporter.section("notebooks")
        for line in said:
            terminalreporter.write_line(line)
