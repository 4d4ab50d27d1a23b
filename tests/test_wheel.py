"""The wheel works without the repository: it holds the modules, the checkpoints and the cards."""

import os
import shutil
import subprocess
import sys
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parent.parent
pytest.importorskip("setuptools", minversion="77")


def run(*command, cwd, **changes):
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"} | changes
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because setuptools leaves a folder behind where it builds."""
    source, out = (tmp_path_factory.mktemp(name) for name in ("source", "wheel"))
    for name in ("refiner", "data"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    code = f"from setuptools import build_meta; build_meta.build_wheel({str(out)!r})"
    run(sys.executable, "-c", code, cwd=source)  # what pip calls
    return next(out.glob("*.whl"))


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """Unpacked, which is what installing a wheel of Python alone is."""
    target = tmp_path_factory.mktemp("installed")
    ZipFile(wheel).extractall(target)
    return target


def test_the_wheel_holds_the_library_and_its_data_and_nothing_else(wheel):
    names = [name for name in ZipFile(wheel).namelist() if ".dist-info/" not in name]
    modules = {p.relative_to(ROOT).as_posix() for p in (ROOT / "refiner").rglob("*.py")}
    data = {
        f"refiner/_data/{p.relative_to(ROOT / 'data').as_posix()}"
        for p in (ROOT / "data").rglob("*")
        if p.is_file()
    }
    page = {f"refiner/visuals/{p.name}" for p in (ROOT / "refiner" / "visuals").glob("*.[jc]s*")}
    assert set(names) == modules | data | page


def test_the_wheel_loads_and_probes_without_the_repository(installed, tmp_path):
    """In one process, as importing torch is what takes the time."""
    code = (
        "import refiner, runpy\n"
        "print(refiner.__file__)\n"
        "print(refiner.load_model('mae_toybox').refiner_card['method'])\n"
        "print(len(refiner.load_heads('mae_toybox_refined')))\n"
        "runpy.run_module('refiner', run_name='__main__')\n"
    )
    command = ["probe", "--model", "mae_toybox", "--data", "toybox", "--out", "report"]
    command += ["--n", "64", "--n-test", "32", "--parts", "knn"]
    changes = {"PYTHONPATH": str(installed), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    lines = run(sys.executable, "-c", code, *command, cwd=tmp_path, **changes).splitlines()
    assert Path(lines[0]).is_relative_to(installed)
    assert "masked autoencoder" in lines[1] and lines[2] == "3"
    assert "the report" in lines[-1] and (tmp_path / "report" / "index.html").is_file()
