"""Settings for every test."""

import os

# The tests' device is the CPU, also where there is a GPU: they compare with tensors that lie there.
# What a GPU does is looked at by test_simulated.py and, on a real one, benchmarks/one_gpu.py.
# Set before torch starts; processes that tests start inherit it.
os.environ["CUDA_VISIBLE_DEVICES"] = ""

if "PYTEST_XDIST_WORKER" in os.environ:
    # Several processes share the cores: the notebooks' threads would wait for each other.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import matplotlib
import torch

matplotlib.use("Agg")  # no window, whatever the machine
# The tensors of tests are small: on a busy machine, more threads only wait for each other.
torch.set_num_threads(1)


def pytest_terminal_summary(terminalreporter):
    """What the notebooks measured, also where tests ran in several processes."""
    reports = (r for state in ("passed", "failed") for r in terminalreporter.getreports(state))
    said = sorted(v for r in reports for k, v in r.user_properties if k == "notebook")
    if said:
        terminalreporter.section("notebooks")
        for line in said:
            terminalreporter.write_line(line)
