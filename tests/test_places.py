"""Caches have a place even where no home can be written, and nobody is asked to do anything."""

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest

import refiner
from refiner.base import places

ROOT = Path(refiner.__file__).parent.parent
HOMES = {
    "a home that does not exist": lambda tmp: f"{tmp / 'file'}/home",
    "a home that is a file": lambda tmp: str(tmp / "file"),
    "a home that may not be written": lambda tmp: str(tmp / "closed"),
    "no absolute home": lambda tmp: "~",
}


@pytest.fixture
def homeless(tmp_path, monkeypatch):
    """No cache has a place yet, and the temporary folder is the test's."""
    for name in (*places.CACHES, "XDG_CACHE_HOME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "closed").mkdir()
    access = os.access  # root may write everywhere
    monkeypatch.setattr(os, "access", lambda p, mode: "closed" not in str(p) and access(p, mode))
    return tmp_path


@pytest.mark.parametrize("home", HOMES)
def test_caches_go_to_a_temporary_folder_with_one_warning(home, homeless, monkeypatch):
    monkeypatch.setenv("HOME", HOMES[home](homeless))
    with pytest.warns(UserWarning, match="cannot be written: caches go to .* may be lost") as told:
        places.settle_caches()
    assert len(told) == 1
    for name in places.CACHES:
        assert Path(os.environ[name]).is_dir() and homeless in Path(os.environ[name]).parents
    assert places.cache_folder() == Path(os.environ["REFINER_CACHE"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        places.settle_caches()  # as in a process started later


def test_what_is_set_stays_and_a_home_that_can_be_written_is_used(homeless, monkeypatch):
    monkeypatch.setenv("HOME", str(homeless / "home"))  # can be made
    places.settle_caches()
    assert not set(places.CACHES) & set(os.environ) and not (homeless / "home").exists()
    monkeypatch.setenv("HOME", str(homeless / "file"))
    monkeypatch.setenv("HF_HOME", "/mine")
    with pytest.warns(UserWarning):
        places.settle_caches()
    assert os.environ["HF_HOME"] == "/mine"


def test_a_folder_of_somebody_else_is_not_used(homeless, monkeypatch):
    """Others could put code where compiled functions are kept."""
    monkeypatch.setenv("HOME", str(homeless / "file"))
    with pytest.warns(UserWarning):
        places.settle_caches()
    first = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    first.chmod(0o777)
    for name in places.CACHES:
        monkeypatch.delenv(name)
    with pytest.warns(UserWarning):
        places.settle_caches()
    second = Path(os.environ["NUMBA_CACHE_DIR"]).parent
    assert second != first and second.stat().st_mode & 0o077 == 0


def test_without_a_home_images_load_and_libraries_know_their_places(tmp_path):
    code = (
        "import json, refiner\n"
        "images = refiner.load_images('toybox', n=4, progress=False)\n"
        "import huggingface_hub.constants, matplotlib, numba, torch\n"
        "print(json.dumps([len(images), numba.config.CACHE_DIR, matplotlib.get_cachedir(),"
        " torch.hub.get_dir(), huggingface_hub.constants.HF_HOME]))\n"
    )
    (tmp_path / "file").touch()
    names = (*places.CACHES, "XDG_CACHE_HOME", "HF_HUB_CACHE")
    env = {name: value for name, value in os.environ.items() if name not in names}
    env |= {"HOME": str(tmp_path / "file"), "TMPDIR": str(tmp_path), "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    count, *found = json.loads(done.stdout)
    assert count == 4 and all(Path(place).is_relative_to(tmp_path) for place in found), found
    assert done.stderr.count("caches go to") == 1
    assert list(tmp_path.glob("refiner-caches-*/refiner/toybox-*.npz"))
