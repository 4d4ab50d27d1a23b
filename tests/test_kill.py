"""A training that is killed (SIGKILL, no clean-up) and resumed gives the uninterrupted run.

``python tests/test_kill.py FOLDER`` is the process whose children are killed: it imports once and
forks, so that runs cost what they train.
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

import nbformat
import pytest
import torch
from nbformat.v4 import new_code_cell, new_notebook
from safetensors.torch import load_file
from tiny import tiny

from refiner.cli import main
from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models.load import build_vit, load_model
from refiner.models.mae import MAERecipe
from refiner.models.save import save_model
from refiner.training.finetuning import FinetuneRecipe, finetune
from refiner.training.pretraining import pretrain
from refiner.training.refining import refine
from refiner.training.states import load_state

COMMANDS = {
    "pretrain": "dim=16 depth=2 heads=2 decoder_dim=16 decoder_heads=2 batch=8 steps=24",
    "refine": "batch=8 head_steps=4 steps=12 hidden=16 predictor_hidden=16 out=8 queue=24 "
    "blocks=(1,2) frozen_blocks=0",
}


def command(which: str, folder: Path, out: Path, *more: str) -> list[str]:
    """A command line for a run of a second that saves every fifth step."""
    words = [which, "--data", "digits", "--n", "64", "--out", str(out), "--save-every", "5", *more]
    if which == "refine":
        words += ["--model", str(folder / "model")]
    for value in COMMANDS[which].split():
        words += ["--set", value]
    return words


def kill_after_first_save(words: list[str], out: Path) -> int:
    """Starts a command and kills it a moment after its first saved state; how it ended."""
    child = in_child(main, words)
    while not (out / "state.pt").is_file():
        if os.waitpid(child, os.WNOHANG)[0]:
            raise RuntimeError("the run ended before it saved a state")
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    return ended(child)


def commands(folder: Path) -> dict:
    """Each command undisturbed, killed, and resumed; how the three processes ended."""
    save_model(build_vit(size=8, patch=4, dim=16, depth=2, heads=2, seed=0), folder / "model")
    ends = {}
    for which in COMMANDS:
        whole, killed = folder / which / "whole", folder / which / "killed"
        first = ended(in_child(main, command(which, folder, whole)))
        second = kill_after_first_save(command(which, folder, killed), killed)
        posing = (killed / "model.safetensors").exists()
        third = ended(in_child(main, command(which, folder, killed, "--resume")))
        ends[which] = [first, second, posing, third]
    return ends


@pytest.mark.parametrize("which", COMMANDS)
def test_killed_and_resumed_is_the_uninterrupted_run(which, survived):
    folder, found = survived
    # The second process was killed amid its work, and nothing unfinished posed as a result.
    assert found["commands"][which] == [0, -signal.SIGKILL, False, 0]
    whole, killed = folder / which / "whole", folder / which / "killed"
    losses = [
        [entry["loss"] for entry in json.loads((out / "history.json").read_text())]
        for out in (whole, killed)
    ]
    assert losses[0] and losses[0] == losses[1]
    one, two = (load_file(out / "model.safetensors") for out in (whole, killed))
    assert one.keys() == two.keys() and all(one[k].equal(two[k]) for k in one)


# ---------------------------------------------------------------- twenty kills at random moments

SMALL = tiny(head_steps=15, steps=45, views=(View(size=8, keep=0.5), View(size=8)), cached_views=1)


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
        os._exit(task(*arguments) or 0)
    except OSError:
        os._exit(3)
    finally:
        os._exit(1)


def ended(child: int) -> int:
    """Waits for a process; its exit status, negative for the signal that killed it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


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
        time.sleep(0.0005)  # a state is written in a few milliseconds; watching takes no core
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "saving" if set(out.glob(".state*")) - old else "training"


def run_on_a_full_disk(out: Path, room: int) -> None:
    """No file can grow beyond some bytes: what a full disk does to a write."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, resource.RLIM_INFINITY))
    run(out)


def ordeal(folder: Path) -> None:
    """Two commands, an undisturbed run, twenty kills, a full disk, and what was found."""
    torch.set_num_threads(1)
    ends = commands(folder)
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
    status = ended(in_child(run_on_a_full_disk, out, room))
    intact = (out / "state.pt").read_bytes() == before
    os.waitpid(in_child(run, out), 0)
    found = {
        "commands": ends,
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
        timeout=900,
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


# ---------------------------------------------------------------- every long command


def noise() -> ImageSet:
    rng = torch.Generator().manual_seed(0)
    pixels = torch.randint(256, (24, 3, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet(pixels, torch.arange(24) % 2, ("a", "b"), name="noise")


def a_model():
    return build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)


def run_pretrain(out: Path) -> None:
    sizes = {"size": 8, "patch": 4, "dim": 8, "depth": 2, "heads": 2, "batch": 4, "steps": 60}
    recipe = MAERecipe(**sizes, decoder_dim=8, decoder_heads=2)
    resume = (out / "state.pt").is_file()
    options = {"save_every": 1, "log_every": 1, "resume": resume, "progress": False}
    pretrain(noise(), recipe=recipe, out=out, **options)


def run_finetune(out: Path) -> None:
    recipe, resume = FinetuneRecipe.cpu(batch=4, epochs=8), (out / "finetune.pt").is_file()
    options = {"save_every": 1, "resume": resume, "progress": False}
    finetune(a_model(), noise(), recipe=recipe, out=out, **options)


def run_probe(out: Path) -> None:
    from refiner.evaluation import probe

    settings = probe.Settings(parts=("knn", "linear", "low_shot", "clustering"), draws=2)
    options = {"n": 40, "n_test": 20, "settings": settings, "resume": True, "progress": False}
    probe.probe(str(out.parent / "model"), "digits", out, **options)


def run_evaluate(out: Path) -> None:
    from refiner.evaluation import compare, protocols

    settings = protocols.EvaluationSettings.cpu(
        n=40, n_test=20, draws=2, kmeans_seeds=2, shots=(1,)
    )
    options = {"rows": ("knn", "linear", "few", "clusters"), "resume": True}
    model = str(out.parent / "model")
    compare.evaluate(model, None, "digits", out, settings=settings, progress=False, **options)


def run_course_of_three(out: Path) -> None:
    from refiner.course import run as course

    course.run_course(out.parent / "notebooks", out, resume=True)


def outcome(which: str, out: Path):
    """What has to be the same, however often a run was killed."""
    if which == "course":
        entries = json.loads((out / "summary.json").read_text())["notebooks"]
        return {name: (e["status"], e["metrics"]) for name, e in entries.items()}
    if which == "evaluate":  # scores, without the seconds that they took
        rows = json.loads((out / "report.json").read_text())["rows"]
        return {name: row["before"]["scores"] for name, row in rows.items()}
    if which == "probe":
        report = json.loads((out / "report.json").read_text())
        return {k: v for k, v in report.items() if k != "machine"}
    if which == "finetune":
        state = load_state(out / "finetune.pt")
        return {k: v.tolist() for part in ("model", "ema") for k, v in state[part].items()}
    history = json.loads((out / "history.json").read_text())
    weights = {file.name: file.read_bytes() for file in out.glob("*.safetensors")}
    return weights, [entry["loss"] for entry in history]


LONG = {"refine": run, "pretrain": run_pretrain, "finetune": run_finetune}
LONG |= {"probe": run_probe, "evaluate": run_evaluate, "course": run_course_of_three}


def kill_often(which: str, folder: Path, kills: int) -> None:
    """Kills a command at random moments, until it was so often; writes down what came of it."""
    torch.set_num_threads(1)
    task, rng, out, whole = LONG[which], random.Random(which), folder / "out", folder / "whole"
    save_model(a_model(), folder / "model")
    for i in range(3):
        cells = [new_code_cell(f"import refiner, time; time.sleep(0.3); refiner.record('a', {i})")]
        (folder / "notebooks").mkdir(exist_ok=True)
        nbformat.write(new_notebook(cells=cells), folder / "notebooks" / f"0{i}_a.ipynb")
    began = time.monotonic()
    assert os.waitpid(in_child(task, whole), 0)[1] == 0
    length, expected = time.monotonic() - began, outcome(which, whole)
    dead, ends = 0, 0
    while dead < kills or not ends:
        child, moment = in_child(task, out), time.monotonic() + rng.uniform(0.05, 0.6) * length
        while dead < kills and time.monotonic() < moment:
            if os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT):
                break
            time.sleep(0.002)
        else:
            if dead < kills:
                os.kill(child, signal.SIGKILL)
        killed = os.waitpid(child, 0)[1] == signal.SIGKILL
        dead += killed
        if not killed:
            assert outcome(which, out) == expected, f"{which}: another result after {dead} kills"
            left = [str(p) for p in out.rglob(".*") if ".ipynb" not in str(p)]
            assert not left, f"{which} leaves {left}"
            shutil.rmtree(out)
            ends += 1
    said = f"{which}: {dead} kills, {ends} runs to the end, each with the result of {length:.1f} s"
    (folder / "found.txt").write_text(said)
    print(said)


@pytest.mark.skipif("KILLS" not in os.environ, reason="takes minutes: KILLS=20 runs it")
@pytest.mark.parametrize("which", LONG)
def test_however_often_it_is_killed_the_result_is_the_same(which, tmp_path):
    count = os.environ["KILLS"]
    subprocess.run([sys.executable, __file__, str(tmp_path), which, count], check=True)


if __name__ == "__main__":
    if len(sys.argv) > 2:
        kill_often(sys.argv[2], Path(sys.argv[1]), int(sys.argv[3]))
    else:
        ordeal(Path(sys.argv[1]))
