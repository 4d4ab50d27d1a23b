"""The rooms of the library: their order is kept, and none grows too large."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import refiner

PACKAGE = Path(refiner.__file__).parent
ROOMS = ["base", "course", "evaluation", "images", "models", "probing", "training", "visuals"]


def test_a_room_imports_only_from_the_rooms_below_it():
    lint = "import sys; from importlinter.cli import lint_imports_command as lint; lint()"
    done = subprocess.run(
        [sys.executable, "-c", lint, "--no-logo", "--no-cache"],
        cwd=PACKAGE.parent,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 kept, 0 broken" in done.stdout


def test_a_reader_finds_eight_rooms_and_a_door():
    folders = sorted(path.name for path in PACKAGE.iterdir() if (path / "__init__.py").is_file())
    assert folders == ROOMS
    assert {path.name for path in PACKAGE.glob("*.py")} == {"__init__.py", "__main__.py", "cli.py"}
    for room in ROOMS:
        assert f"    {room} " in refiner.__doc__ or f"``{room}``" in refiner.__doc__


def test_the_floor_plan_in_the_docs_has_the_order_that_is_checked():
    root = PACKAGE.parent
    layers = tomllib.loads((root / "pyproject.toml").read_text())["tool"]["importlinter"]
    order = [name.removeprefix("refiner.") for name in layers["contracts"][0]["layers"]]
    plan = re.findall(r"^\| `(\w+)(?:/|\.py)` \|", (root / "docs" / "rooms.md").read_text(), re.M)
    assert plan == order
    assert re.findall(r"^    (\w+)  +\w", refiner.__doc__, re.M) == [
        r for r in order if r != "course"
    ]
