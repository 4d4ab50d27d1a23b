"""Settings for every test."""

import os

# The tests' device is the CPU, also where there is a GPU: they compare with tensors that lie there.
# What a GPU does is looked at by test_simulated.py and, on a real one, benchmarks/one_gpu.py.
os.environ["CUDA_VISIBLE_DEVICES"] = (
    ""  # before torch starts; processes that tests start inherit it
)

import matplotlib
import torch

matplotlib.use("Agg")  # no window, whatever the machine
# The tensors of tests are small: on a busy machine, more threads only wait for each other.
torch.set_num_threads(1)
