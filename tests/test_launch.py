"""Launchers as a user calls them: `accelerate launch`, and accelerate's from a notebook."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_parallel import ROOT, TINY, assert_alike, images, model

from refiner.base import parallel
from refiner.cli import main
from refiner.models.load import load_model
from refiner.models.save import save_model
from refiner.training.refining import refine

ENVIRONMENT = os.environ | {
    "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")]),
    "OMP_NUM_THREADS": "1",
}
SMALL = [
    "batch=16",
    "head_steps=2",
    "steps=3",
    "blocks=(2,3)",
    "frozen_blocks=1",
    "hidden=16",
    "predictor_hidden=16",
    "out=8",
    "queue=32",
]


def test_accelerate_launch_is_one_process_with_the_same_batch(tmp_path):
    """On GPUs the command is this one without --device; there is none here, so gloo talks."""
    save_model(model(), tmp_path / "mae")
    command = [
        "refine",
        "--model",
        str(tmp_path / "mae"),
        "--data",
        "digits",
        "--images",
        "64",
        "--device",
        "cpu",
    ]
    command += [part for value in SMALL for part in ("--set", value)]
    assert main([*command, "--out", str(tmp_path / "one")]) == 0
    launch = [
        sys.executable,
        "-m",
        "accelerate.commands.launch",
        "--multi_gpu",
        "--num_processes",
        "2",
        "--num_machines",
        "1",
        "--mixed_precision",
        "no",
        "--dynamo_backend",
        "no",
        "--main_process_port",
        "0",
        "-m",
        "refiner",
    ]
    done = subprocess.run(
        [*launch, *command, "--out", str(tmp_path / "two")],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "of batch 16 on 2 processes" in done.stdout and done.stdout.count("refined in") == 1
    one, two = (json.loads((tmp_path / n / "history.json").read_text()) for n in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        for key in ("loss", "similarity", "neighbor_accuracy"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert_alike(load_model(tmp_path / "two"), load_model(tmp_path / "one"))


def train(folder: str) -> None:
    """What a notebook hands to its launcher."""
    run = refine(
        model(), images(), recipe=TINY, progress=False, log_every=1, device="cpu", out=folder
    )
    assert parallel.world() == 2 and run.history


def test_a_notebooks_launcher_shares_the_batch_too(tmp_path):
    """accelerate's debug_launcher is its notebook_launcher for several processes without a GPU."""
    code = "import sys, test_launch; from accelerate import debug_launcher as launch; "
    code += "launch(test_launch.train, (sys.argv[1],), num_processes=2)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    alone = refine(model(), images(), recipe=TINY, progress=False, log_every=1)
    assert_alike(load_model(tmp_path), alone.model)
    losses = [e["loss"] for e in json.loads(Path(tmp_path, "history.json").read_text())]
    expected = [e["loss"] for e in alone.history]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-4)


def test_accelerates_launcher_that_starts_one_process_only_is_noticed(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` without MPI sets these, and starts one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="one process only.*torchrun --nproc-per-node"):
        parallel.join("cpu")
