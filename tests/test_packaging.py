"""What installs, what is promised about it, and what the repository says of itself agree."""

import ast
import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import refiner

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
CONDA_NAMES = {"torch": "pytorch"}
PIP_ONLY = {"playwright"}  # its conda package has another name and channel


def canonical(name):
    return re.sub(r"[-_.]+", "-", name).lower()


def split(requirement):
    """``"timm>=1.0"`` → name and version part."""
    name, rest = re.fullmatch(r"([A-Za-z0-9._-]+?)(\[.*\])?([<>=!~].*)?", requirement).group(1, 3)
    return canonical(name), rest or ""


def pinned():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return {canonical(line.split("==")[0]): line.split("==")[1] for line in lines}


# ---------------------------------------------------------------- dependencies


def test_conda_and_pip_install_the_same_packages():
    wanted = PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["site"] + EXTRAS["test"]
    wanted = dict(split(r) for r in wanted if not r.startswith(PROJECT["name"]))
    wanted = {CONDA_NAMES.get(n, n): rest for n, rest in wanted.items() if n not in PIP_ONLY}
    wanted |= {"python": PROJECT["requires-python"], "pip": ""}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    plain = [d for d in environment["dependencies"] if isinstance(d, str)]
    assert dict(split(d) for d in plain) == wanted and len(plain) == len(wanted)
    assert environment["dependencies"][-1] == {"pip": ["--editable .", *PIP_ONLY]}


def test_the_test_extra_brings_the_lab_and_the_site():
    assert f"{PROJECT['name']}[lab,site]" in EXTRAS["test"]


def test_constraints_are_names_and_versions_only():
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        assert re.fullmatch(r"[A-Za-z0-9._-]+==[0-9][A-Za-z0-9.+!]*", line), line
    # torch pins its own, and they exist for Linux only
    assert not [n for n in pinned() if n.startswith(("nvidia-", "cuda-")) or n == "triton"]


def test_every_direct_dependency_is_pinned_within_its_own_bound():
    everything = PROJECT["dependencies"] + [r for extra in EXTRAS.values() for r in extra]
    for name, bound in map(split, everything):
        if name == PROJECT["name"]:
            continue
        assert name in pinned(), f"{name} has no tested version in constraints.txt"
        if bound:
            low = [int(x) for x in re.fullmatch(r">=([\d.]+)", bound).group(1).split(".")]
            assert [int(x) for x in re.findall(r"\d+", pinned()[name])] >= low
    assert (pinned()["torch"], pinned()["torchvision"]) == ("2.14.1", "0.29.1")


def test_every_import_of_the_library_is_a_declared_dependency():
    imported = {"pillow": "PIL", "scikit-learn": "sklearn", "umap-learn": "umap"}
    declared = [
        split(r)[0]
        for r in PROJECT["dependencies"] + EXTRAS["lab"] + EXTRAS["stream"] + EXTRAS["bands"]
    ]
    declared = {imported.get(name, name.replace("-", "_")) for name in declared}
    brought_along = {"jupyter_client", "jupyter_core", "traitlets", "zmq", "IPython"}
    brought_along |= {"matplotlib_inline"}
    for path in (ROOT / "refiner").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            for name in {n.split(".")[0] for n in names}:
                known = declared | brought_along | sys.stdlib_module_names | {"refiner"}
                assert name in known, f"{path.name} imports {name}"


# ---------------------------------------------------------------- the package


def test_the_command_is_the_modules_main():
    assert PROJECT["scripts"] == {"refiner": "refiner.cli:main"}
    from refiner.cli import main

    assert callable(main) and PROJECT["name"] == "mim-refiner-lab"


def test_the_version_is_one_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["version"] == refiner.__version__ and "version" in PROJECT["dynamic"]


def test_the_paper_is_cited():
    reference = yaml.safe_load((ROOT / "CITATION.cff").read_text())["references"][0]
    assert "2402.10093" in reference["url"]
    names = [author["family-names"] for author in reference["authors"]]
    assert names == ["Alkin", "Miklautz", "Hochreiter", "Brandstetter"]


def test_the_licence_is_the_declared_one():
    text = (ROOT / "LICENSE").read_text()
    assert text.startswith("MIT License") and "2026 MIM-Refiner Lab authors" in text
    assert PROJECT["license"] == "MIT"


# ---------------------------------------------------------------- make and continuous integration


def make(*arguments, cwd=ROOT, **changes):
    # this very test may run under `make test ARGS=…`, which hands its variables down
    outer = {"MAKEFLAGS", "MAKELEVEL", "ARGS", "CONSTRAINTS", "PYTHON"}
    environment = {k: v for k, v in os.environ.items() if k not in outer}
    return subprocess.run(
        ["make", "--no-print-directory", *arguments],
        cwd=cwd,
        capture_output=True,
        text=True,
        env=environment | changes,
    )


def test_ci_runs_the_command_that_readme_names():
    readme = (ROOT / "README.md").read_text()
    script = ROOT / ".ci" / "run"
    command = script.read_text().strip().splitlines()[-1]
    assert command == "make test" and re.search(rf"^\s*{command}\b", readme, re.MULTILINE)
    assert os.access(script, os.X_OK) and "set -euo pipefail" in script.read_text()
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text()
    assert "run: .ci/run" in workflow


def test_the_workflow_has_its_three_jobs():
    workflow = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())
    triggers = workflow[True]  # YAML reads the key "on" as a truth value
    assert set(triggers) == {"push", "pull_request", "schedule", "workflow_dispatch"}
    runs = {
        n: [s.get("run") for s in j["steps"] if "run" in s] for n, j in workflow["jobs"].items()
    }
    assert runs["newest"] == ["make test CONSTRAINTS="]
    assert runs["gpu"] == ['make course ARGS="--only 04 --preset gpu"']


@pytest.fixture
def toy_project(tmp_path):
    """Our Makefile over stand-ins: a python whose venv holds commands that only say their name."""
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    python = tmp_path / "python"
    python.write_text(
        "#!/bin/sh\n"
        'case "$1" in\n'
        "-c) exit 0;;\n"
        "--version) echo Python 3.11.0; exit 0;;\n"
        "-m) [ $2 = venv ] || { echo python $*; exit 0; };;\n"
        "*.py) echo python $*; exit 0;;\n"
        "esac\n"
        "mkdir -p .venv/bin\n"
        "for name in refiner ruff jupyter; do\n"
        '  printf "#!/bin/sh\\necho $name \\$*\\n" > .venv/bin/$name; chmod +x .venv/bin/$name\n'
        "done\n"
        "cp python .venv/bin/python\n"
    )
    python.chmod(0o755)
    return tmp_path


def test_make_sets_up_once_and_again_when_the_packages_change(toy_project):
    def run(*arguments):
        done = make(*arguments, "PYTHON=./python", cwd=toy_project)
        assert done.returncode == 0, done.stderr
        return done.stdout

    first = run("course", "ARGS=--only 03")
    install = "install --disable-pip-version-check --constraint constraints.txt"
    assert install in first and "--editable .[test]" in first
    assert "several GB" in first and "minutes" in first
    assert first.splitlines()[-1] == "refiner course --only 03"
    assert "install" not in run("course"), "the environment is ready"
    ready = (toy_project / ".venv" / ".ready").stat().st_mtime
    for name in ("pyproject.toml", "constraints.txt"):
        os.utime(toy_project / name, (ready + 10, ready + 10))
        assert install in run("course")
        os.utime(toy_project / name, (0, 0))
    commands = [line for line in run("test", "ARGS=-k x").splitlines() if not line[0].isupper()]
    assert commands == [
        "ruff check .",
        "ruff format --check .",
        "python -m pytest -n 2 --dist loadscope --no-loadscope-reorder -k x",
    ]
    assert run("lab", "ARGS=--with-outputs --no-browser").splitlines()[-2:] == [
        "refiner course --copies my_course --with-outputs",
        "jupyter lab my_course/00_tour.ipynb --no-browser",
    ]
    benches = run("bench").splitlines()
    scripts = [line.removeprefix("python ") for line in benches if line.startswith("python bench")]
    assert any("--editable .[bench]" in line for line in benches)
    assert scripts and all((ROOT / script).is_file() for script in scripts)
    run("clean")
    assert not (toy_project / ".venv").exists()
    assert "--constraint" not in run("test", "CONSTRAINTS=")


def test_make_says_so_when_python_is_too_old_and_sets_up_nothing(toy_project):
    for name in ("python3.11", "python3"):
        old = toy_project / name
        old.write_text("#!/bin/sh\nexit 1\n")
        old.chmod(0o755)
    path = f"{toy_project}:{os.environ['PATH']}"
    done = make("course", cwd=toy_project, PATH=path)
    assert done.returncode != 0 and "No Python 3.11 or newer found" in done.stderr
    assert not (toy_project / ".venv").exists()


# ---------------------------------------------------------------- the repository


def tracked():
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_large_file_outside_data_and_no_leftovers():
    for path in tracked():
        where = path.relative_to(ROOT)
        assert where.parts[0] == "data" or path.stat().st_size < 2 * 1024**2, where
        assert not {".venv", "runs", "__pycache__", ".ipynb_checkpoints"} & set(where.parts)


def test_bands_name_existing_notebooks():
    path = ROOT / "tests" / "bands.json"
    for name in json.loads(path.read_text()):
        assert (ROOT / "notebooks" / f"{name}.ipynb").is_file(), name
