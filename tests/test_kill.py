"""A training that is killed (SIGKILL, no clean-up) and resumed gives the uninterrupted run."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file

TINY = {
    "pretrain": ["--set", "dim=16", "--set", "depth=2", "--set", "heads=2", "--set",
                 "decoder_dim=16", "--set", "decoder_heads=2", "--set", "batch=8",
                 "--set", "steps=60"],
    "refine": ["--set", "batch=8", "--set", "head_steps=6", "--set", "steps=24", "--set",
               "hidden=16", "--set", "predictor_hidden=16", "--set", "out=8", "--set", "queue=24"],
}  # fmt: skip


def command(which: str, out: Path, *more: str) -> list[str]:
    return [sys.executable, "-m", "refiner", which, "--data", "digits", "--n", "64", "--out",
            str(out), "--save-every", "7", *TINY[which], *more]  # fmt: skip


def kill_after_first_save(arguments: list[str], out: Path) -> None:
    """Starts a run and kills it a moment after its first saved state."""
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 240
    while not (out / "state.pt").is_file():
        assert process.poll() is None, "the run ended before it saved a state"
        assert time.monotonic() < deadline, "no state was saved"
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, "the run was over before it could be killed"


@pytest.mark.parametrize("which", ["pretrain", "refine"])
def test_killed_and_resumed_is_the_uninterrupted_run(which, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    subprocess.run(command(which, whole), check=True, capture_output=True)
    kill_after_first_save(command(which, killed), killed)
    assert not (killed / "model.safetensors").exists(), "nothing unfinished poses as a result"
    subprocess.run(command(which, killed, "--resume"), check=True, capture_output=True)
    losses = [
        [entry["loss"] for entry in json.loads((out / "history.json").read_text())]
        for out in (whole, killed)
    ]
    assert len(losses[0]) > 1 and losses[0] == losses[1]
    one, two = (load_file(out / "model.safetensors") for out in (whole, killed))
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)
