"""The script for a GPU's few minutes, rehearsed on a CPU without the optional packages."""

import importlib
import json
import math
import os
import subprocess
import sys
import tarfile
import time
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch._dynamo
from PIL import Image
from safetensors.torch import load_file

from refiner.images.toybox import render

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"
PARTS = ("smoke", "cifar", "utilisation", "probing", "notebook04", "deep")
# As on a machine that was not made for this course; refiner is not installed there either.
BLOCKER = """
import sys
from pathlib import Path

MISSING = {"umap", "IPython", "nbformat", "papermill", "ipywidgets", "anywidget", "faiss",
           "lightly", "kornia"}

class Blocker:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.split(".")[0] in MISSING:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def installed_here(finder):
    return "editable" in f"{finder} {getattr(finder, '__module__', '')}"

sys.meta_path[:] = [Blocker, *(f for f in sys.meta_path if not installed_here(f))]
sys.path[:] = [p for p in sys.path if not Path(p, "refiner").is_dir()]
"""
# In one process: the imports of every script, as if it were alone, then the script for the GPU.
STARTS = f"""
import runpy, sys
from pathlib import Path
fresh = list(sys.path)
scripts = sorted(Path({str(BENCHMARKS)!r}).glob("*.py"))
ours = {{"refiner", "benchmarks", *(p.stem for p in scripts)}}

def run(path, name):
    for module in [n for n in sys.modules if n.split(".")[0] in ours]:
        del sys.modules[module]
    sys.path[:] = [str(path.parent), *fresh]
    runpy.run_path(str(path), run_name=name)

for path in scripts:
    if "__main__" in path.read_text():
        run(path, "looked at")
        print("imported", path.name)
run(Path({str(BENCHMARKS / "one_gpu.py")!r}), "__main__")
"""


@pytest.fixture(scope="module")
def bare(tmp_path_factory):
    """Environment variables of a Python without this package and without its optional ones."""
    folder = tmp_path_factory.mktemp("bare")
    (folder / "sitecustomize.py").write_text(BLOCKER)
    return os.environ | {
        "PYTHONPATH": str(folder),
        "OMP_NUM_THREADS": "1",
        "REFINER_CACHE": str(folder / "cache"),
    }


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """An archive in the form of CIFAR-10's, of a few toys."""
    folder, number = tmp_path_factory.mktemp("archive"), 0
    for split, count in (("train", 40), ("test", 16)):
        scene = render(count, split=split)
        for image, label in zip(scene.images, scene.labels % 2, strict=True):
            path = folder / "cifar10" / split / "ab"[label] / f"{number:04}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
            number += 1
    with tarfile.open(folder / "cifar10.tar.gz", "w:gz") as tar:
        tar.add(folder / "cifar10", "cifar10")
    return folder / "cifar10.tar.gz"


@pytest.fixture
def here(script, monkeypatch):
    """The script in this process."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["one_gpu.py", "--tiny", *map(str, arguments)])
        return script.main()

    with torch._dynamo.config.patch(disable=True):
        yield run
    torch.set_float32_matmul_precision("highest")


def results(folder):
    return json.loads((folder / "results.json").read_text())


@pytest.fixture(scope="module")
def started(bare, archive, tmp_path_factory):
    """Every script's imports and all parts of the rehearsal: its folder, and what was said."""
    out = tmp_path_factory.mktemp("rehearsal")
    command = [sys.executable, "-c", STARTS, "--tiny", "--cifar", str(archive), "--out", str(out)]
    done = subprocess.run(command, env=bare, cwd=archive.parent, capture_output=True, text=True)
    assert (out / "results.json").is_file(), done.stderr[-3000:]
    failed = {n: p.get("trace") for n, p in results(out)["parts"].items() if p.get("trace")}
    assert done.returncode == 0, f"{done.stderr[-3000:]}\n{failed}"
    return out, done.stdout


@pytest.fixture(scope="module")
def rehearsal(started):
    return started[0]


def test_every_script_starts_without_the_package_and_its_peers(started):
    scripts = [p for p in BENCHMARKS.glob("*.py") if "__main__" in p.read_text()]
    assert started[1].count("imported ") == len(scripts) > 10


def test_every_part_is_done_and_tells_what_it_found(rehearsal):
    found = results(rehearsal)
    assert found["rehearsal"] and tuple(found["parts"]) == PARTS
    assert all(p["status"] == "done" and p["seconds"] > 0 for p in found["parts"].values())
    assert found["parts"]["smoke"]["green"], found["parts"]["smoke"]["checks"]
    assert '"error"' not in (rehearsal / "results.json").read_text()
    assert '"not_compiled"' not in (rehearsal / "results.json").read_text()
    cifar = found["parts"]["cifar"]
    for when in ("before", "after"):
        assert len(cifar[when]["cls"]["k200"]) == len(cifar[when]["patch"]["linear"]) == 4
        assert 0 <= cifar[when]["reading"]["k10"] <= 1
    assert cifar["mae"]["steps"] == cifar["mae"]["planned_steps"] == 6
    assert set(found["parts"]["deep"]["arms"]) == {"decoder", "no decoder"}
    assert len(found["parts"]["notebook04"]["recorded"]["knn_refined"]) == 12


def test_what_comes_home_is_eight_small_files_side_by_side(rehearsal):
    files = [p for p in rehearsal.rglob("*")]
    assert all(p.is_file() and p.stat().st_size < 16 * 2**20 for p in files) and len(files) <= 8
    assert {p.suffix for p in files} == {".json", ".zip", ".safetensors"}
    with zipfile.ZipFile(rehearsal / "figures.zip") as pictures:
        assert {"cifar.png", "deep.png"} < set(pictures.namelist())
        assert all(len(pictures.read(name)) > 5000 for name in pictures.namelist())
    weights = load_file(rehearsal / "weights-1.safetensors")
    assert {name.split(".")[0] for name in weights} == {"mae", "refined", "heads"}


def test_a_chain_goes_on_from_what_came_home(rehearsal, here, archive, tmp_path):
    arguments = "--parts", "cifar", "--continue", rehearsal, "--cifar", archive, "--out", tmp_path
    assert here(*arguments) == 0
    first, second = (results(folder)["parts"]["cifar"] for folder in (rehearsal, tmp_path))
    assert second["went_on_from"] == rehearsal.name and second["mae"] == first["mae"]
    # The encoder as it came home, in half precision, and heads that need no stage of their own.
    assert second["before"]["cls"]["k10"] == pytest.approx(first["after"]["cls"]["k10"], abs=0.13)
    assert second["refine"]["planned_steps"][0] == 0 < second["refine"]["planned_steps"][1]


def test_without_time_everything_is_skipped_and_said_so(here, tmp_path):
    assert here("--budget", 0.1, "--out", tmp_path) == 0
    assert {p["status"] for p in results(tmp_path)["parts"].values()} == {"skipped"}


# ---------------------------------------------------------------- the pieces


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.import_module("one_gpu")


@pytest.fixture
def job(script, tmp_path):
    return script.Job(torch.device("cpu"), True, None, None, tmp_path, tmp_path)


def test_a_part_that_fails_costs_no_other_and_a_second_run_repeats_nothing(script, job):
    asked = []

    def breaks(job):
        job.note(halfway=1)
        raise RuntimeError("out of luck")

    def works(job):
        asked.append(job.left)
        job.note(value=float("nan"))  # what JSON has no word for must not lose the rest

    parts = {"breaks": script.Part(1, breaks), "works": script.Part(1, works)}
    for turn in (1, 2):
        found = script.run(job, parts, "command", math.inf)["parts"]
        assert found["breaks"]["error"] == "RuntimeError: out of luck" and len(asked) == 1
        assert found["breaks"]["halfway"] == 1 and found["works"]["status"] == "done"
        assert results(job.out)["parts"]["works"]["value"] is None, turn


def test_the_time_is_shared_so_that_later_parts_still_fit(script, job):
    given = {}
    parts = {
        name: script.Part(least, lambda job, name=name: given.update({name: job.left}))
        for name, least in (("first", 10), ("too long", 500), ("last", 30))
    }
    found = script.run(job, parts, "command", time.monotonic() + 100)["parts"]
    assert found["too long"]["status"] == "skipped" and "needs 500 s" in found["too long"]["why"]
    assert given["last"] == pytest.approx(100, abs=2) and given["first"] == pytest.approx(70, abs=2)


def test_weights_come_home_in_files_that_are_small_enough(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "SHARD", 1000)
    state = {"a": torch.randn(20, 10), "b": torch.arange(50), "c": torch.randn(300)}
    assert script.keep_weights(tmp_path, {"mae": state, "refined": state}) == 3
    files = list(tmp_path.iterdir())
    assert len(files) == 3 and max(len(load_file(f)) for f in files) == 2
    back = script.kept_weights(tmp_path)
    for part in ("mae", "refined"):
        assert torch.equal(back[part]["b"], state["b"])
        assert torch.equal(back[part]["a"], state["a"].half().float())
    assert script.keep_weights(tmp_path, {"mae": {"b": state["b"]}}) == 1  # old ones go
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(ValueError, match="more than may come home"):
        script.keep_weights(tmp_path, {str(i): state for i in range(9)})


def test_a_machine_that_cannot_compile_trains_without(job, monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    training = importlib.import_module("gpu_training")

    def train(recipe, log_every):
        if recipe.compile:
            raise RuntimeError("no compiler")
        entries = [{"step": s, "seconds": 0.5 * s} for s in range(log_every, recipe.steps + 1)]
        return SimpleNamespace(history=entries)

    recipe, seconds = training.paced(train, training.MAE, ("steps",), job)
    assert not recipe.compile and recipe.steps == training.MAE.steps and seconds == 0.5
    assert job.found["not_compiled"] == "RuntimeError: no compiler"
