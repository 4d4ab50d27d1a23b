"""Settings for every test."""

import matplotlib
import torch

matplotlib.use("Agg")  # no window, whatever the machine
# The tensors of tests are small: on a busy machine, more threads only wait for each other.
torch.set_num_threads(1)
