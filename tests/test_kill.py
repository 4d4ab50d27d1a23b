"""A training that is killed (SIGKILL, no clean-up) and resumed gives the uninterrupted run.

``python tests/test_kill.py FOLDER`` is the process whose children are killed: it imports once and
forks, so that twenty runs cost what they train.
"""

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from refiner.images.views import View
from refiner.models.load import build_vit, load_model
from refiner.training.recipe import Recipe
from refiner.training.refining import refine
from refiner.training.states import load_state

TINY = {
    "pretrain": [
        "--set",
        "dim=16",
        "--set",
        "depth=2",
        "--set",
        "heads=2",
        "--set",
        "decoder_dim=16",
        "--set",
        "decoder_heads=2",
        "--set",
        "batch=8",
        "--set",
        "steps=60",
    ],
    "refine": [
        "--set",
        "batch=8",
        "--set",
        "head_steps=6",
        "--set",
        "steps=24",
        "--set",
        "hidden=16",
        "--set",
        "predictor_hidden=16",
        "--set",
        "out=8",
        "--set",
        "queue=24",
    ],
}


def command(which: str, out: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        "-m",
        "refiner",
        which,
        "--data",
        "digits",
        "--n",
        "64",
        "--out",
        str(out),
        "--save-every",
        "7",
        *TINY[which],
        *more,
    ]


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


# ---------------------------------------------------------------- twenty kills at random moments

SMALL = Recipe.cpu(
    batch=4,
    head_steps=15,
    steps=45,
    hidden=8,
    predictor_hidden=8,
    out=4,
    queue=12,
    blocks=(1, 2),
    frozen_blocks=0,
    views=(View(size=8, keep=0.5), View(size=8)),
    cached_views=1,
)


def run(out: Path) -> None:
    """A run of a second or so that saves after every step."""
    rng = torch.Generator().manual_seed(0)
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=rng)
    refine(
        build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0),
        images,
        recipe=SMALL,
        out=out,
        resume=(out / "state.pt").is_file(),
        save_every=1,
        log_every=1,
        progress=False,
    )


def in_child(task, *arguments) -> int:
    """Starts a task in a fork and returns its process id."""
    child = os.fork()
    if child:
        return child
    try:
        task(*arguments)
        os._exit(0)
    except OSError:
        os._exit(3)
    finally:
        os._exit(1)


def kill_at(out: Path, moment: float, saves: int) -> str | None:
    """Kills a run after some seconds or, if ``saves``, amid about so many saves; where it then was.

    None when the run was over before. Half a state that an earlier kill left does not count.
    """
    old, seen = set(out.glob(".state*")), set()
    child, began = in_child(run, out), time.monotonic()
    while (late := time.monotonic() - began) < 5 * moment:
        half = set(out.glob(".state*")) - old
        seen |= half
        if (half and len(seen) >= saves) if saves else late >= moment:
            break
        if os.waitpid(child, os.WNOHANG)[0]:
            return None
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if set(out.glob(".state*")) - old else "training"


def run_on_a_full_disk(out: Path, room: int) -> None:
    """No file can grow beyond some bytes: what a full disk does to a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    run(out)


def ordeal(folder: Path) -> None:
    """An undisturbed run, twenty kills, a full disk, and what was found."""
    torch.set_num_threads(1)
    began = time.monotonic()
    os.waitpid(in_child(run, folder / "whole"), 0)
    length = time.monotonic() - began
    rng, deaths, done, out = random.Random(0), [], [], folder / "killed"
    while len(deaths) < 20 or not (out / "state.pt").is_file():
        where = kill_at(out, rng.uniform(0.02, 0.15) * length, rng.choice((0, 0, 1, 2, 3)))
        if where is None:  # on a machine that suddenly became fast; begin another run
            shutil.rmtree(out)
            done.clear()
            continue
        deaths.append(where)
        if (out / "state.pt").is_file():
            done.append(load_state(out / "state.pt")["done"])
    room = (out / "state.pt").stat().st_size // 2
    before = (out / "state.pt").read_bytes()
    status = os.waitstatus_to_exitcode(os.waitpid(in_child(run_on_a_full_disk, out, room), 0)[1])
    intact = (out / "state.pt").read_bytes() == before
    os.waitpid(in_child(run, out), 0)
    found = {
        "deaths": deaths,
        "done": done,
        "full": status,
        "intact": intact,
        "rest": [p.name for p in out.glob(".state*")],
    }
    (folder / "found.json").write_text(json.dumps(found))


@pytest.fixture(scope="module")
def survived(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ordeal")
    subprocess.run(
        [sys.executable, __file__, str(folder)],
        check=True,
        timeout=300,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return folder, json.loads((folder / "found.json").read_text())


def test_twenty_kills_at_random_moments_lose_nothing(survived):
    folder, found = survived
    assert len(found["deaths"]) >= 20 and set(found["deaths"]) == {"saving", "training"}
    assert found["deaths"].count("saving") >= 3
    assert found["done"] == sorted(found["done"]) and found["done"][-1] > found["done"][0]
    one, two = (load_model(folder / name).state_dict() for name in ("whole", "killed"))
    assert all(torch.equal(one[k], two[k]) for k in one)
    losses = [
        [e["loss"] for e in json.loads((folder / name / "history.json").read_text())]
        for name in ("whole", "killed")
    ]
    assert losses[0] == losses[1] and len(losses[0]) == 60


def test_a_full_disk_ends_a_run_and_leaves_its_state(survived):
    _, found = survived
    assert found["full"] == 3, "an OSError, nothing else"
    assert found["intact"] and not found["rest"]


if __name__ == "__main__":
    ordeal(Path(sys.argv[1]))
