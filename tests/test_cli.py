"""The command line answers at once, and says in one sentence what a user can mend."""

import ast
import os
import pkgutil
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

import refiner
from refiner import cli
from refiner.base import errors, settings
from refiner.training import watch

ROOT = Path(refiner.__file__).parent.parent


def python(*args):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True)


# ---------------------------------------------------------------- start-up


def test_help_is_instant():
    def seconds():
        before = os.times()
        assert python("-m", "refiner", "--help").returncode == 0
        after = os.times()
        return sum(after[2:4]) - sum(before[2:4])  # processor time of children: others do not count

    assert min(seconds() for _ in range(5)) < 0.3


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys; from refiner.cli import main\n"
        "for arguments in ['--version'], ['--help'], ['course', '--help'], ['refine', '--help']:\n"
        "    try: main(arguments)\n"
        "    except SystemExit: pass\n"
        "print(sorted({'torch', 'numpy', 'timm', 'matplotlib', 'papermill'} & set(sys.modules)))"
    )
    done = python("-c", code)
    assert done.stdout.splitlines()[0] == refiner.__version__
    assert done.stdout.splitlines()[-1] == "[]", done.stderr


def test_the_status_of_a_command_is_the_process_own(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["refiner", "course", "--notebooks", "nowhere"])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("refiner", run_name="__main__")
    assert left.value.code == 2 and capsys.readouterr().err.startswith("refiner: ")


# ---------------------------------------------------------------- lazy names


def test_every_public_name_has_a_home():
    for name, home in refiner._HOME.items():
        path = ROOT / "refiner" / f"{home.replace('.', '/')}.py"
        assert path.is_file(), f"refiner.{name} has no module {home}"
        assert re.search(rf"^(def|class) {name}\b", path.read_text(), re.MULTILINE), name
    assert set(refiner.__all__) <= set(dir(refiner))
    assert refiner.record is refiner.record and callable(refiner.record)


def test_editors_are_told_the_homes_that_python_uses():
    tree = ast.parse(Path(refiner.__file__).read_text())
    (block,) = (node for node in tree.body if isinstance(node, ast.If))
    told = {alias.asname: node.module for node in block.body for alias in node.names}
    assert told == {name: f"refiner.{home}" for name, home in refiner._HOME.items()}


def test_no_public_name_is_hidden_by_a_module_of_that_name():
    """Python stores an imported module as an attribute of its package."""
    modules = {module.name for module in pkgutil.iter_modules(refiner.__path__)}
    assert not modules & set(refiner.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'refines'"):
        refiner.refines  # noqa: B018


# ---------------------------------------------------------------- errors


def test_a_users_error_is_one_sentence_and_debug_shows_where(capsys):
    command = ["course", "--notebooks", "nowhere"]
    assert cli.main(command) == 2
    shown = capsys.readouterr()
    assert shown.err == "refiner: the notebooks folder nowhere does not exist\n" and not shown.out
    with pytest.raises(FileNotFoundError):
        cli.main([*command, "--debug"])


@pytest.mark.parametrize(
    ("setting", "parsed"),
    [
        ("steps=3", ("steps", 3)),
        ("rate=1e-3", ("rate", 1e-3)),
        ("flag=True", ("flag", True)),
        ("blocks=[1, 2]", ("blocks", [1, 2])),
        ("name=mae_toybox", ("name", "mae_toybox")),
        ("name=a=b", ("name", "a=b")),
        ("name=", ("name", "")),
    ],
)
def test_settings(setting, parsed):
    assert settings.parse_setting(setting) == parsed


@pytest.mark.parametrize("setting", ["steps", "=3", "a b=3"])
def test_a_setting_without_name_or_value_is_refused(setting, capsys):
    assert cli.main(["course", "--set", setting]) == 2
    assert capsys.readouterr().err == f"refiner: --set needs NAME=VALUE, got {setting!r}\n"


def test_the_commands_options_reach_the_runner(monkeypatch):
    from refiner.course import run as runner

    seen = {}

    def run(notebooks, out, **options):
        seen.update(options, notebooks=notebooks, out=out)
        return {"selected": ["a", "b"], "notebooks": {"a": {"status": "ok"}, "b": status}}

    monkeypatch.setattr(runner, "run_course", run)
    command = "course --preset gpu --only 03 --only 04 --out o --resume --set n=3 --timeout 9"
    status = {"status": "ok"}
    assert cli.main([*command.split(), "--notebooks", "books"]) == 0
    assert seen == {
        "notebooks": "books",
        "out": "o",
        "preset": "gpu",
        "only": ["03", "04"],
        "resume": True,
        "parameters": {"n": 3},
        "timeout": 9.0,
        "write_back": False,
    }
    status = {"status": "failed"}
    assert cli.main(["course", "--write-back"]) == 1
    assert seen["write_back"] and seen["out"] == "runs/course" and seen["preset"] == "cpu"


FAULTS = [kind("seven") for kind in (ValueError, KeyError, RuntimeError, FloatingPointError)]
MENDED = [errors.UserError("seven"), errors.NotFinite("seven"), errors.MissingPackage("seven")]
MENDED += [watch.Collapse("seven"), FileNotFoundError("seven")]


def raising(error):
    def run(*args, **options):
        raise error

    return run


@pytest.mark.parametrize("error", FAULTS, ids=lambda error: type(error).__name__)
def test_a_fault_of_ours_keeps_its_traceback(error, monkeypatch):
    monkeypatch.setattr("refiner.course.run.run_course", raising(error))
    with pytest.raises(type(error), match="seven"):
        cli.main(["course"])


@pytest.mark.parametrize("error", MENDED, ids=lambda error: type(error).__name__)
def test_what_a_user_can_mend_is_one_line_and_status_2(error, monkeypatch, capsys):
    """Wherever it was raised, here outside of the library."""
    monkeypatch.setattr("refiner.course.run.run_course", raising(error))
    assert cli.main(["course"]) == 2
    assert capsys.readouterr().err == "refiner: seven\n"
    with pytest.raises(type(error)):
        cli.main(["course", "--debug"])


@pytest.mark.parametrize(("command", "status"), [(["models"], 0), (["course", "--status"], 1)])
def test_a_closed_pipe_is_no_success(command, status, monkeypatch, capsys):
    """`refiner course | true` has not said what it found; `refiner models | head` has."""
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert cli.main(command) == status
    assert ("refiner: the output was closed; " in capsys.readouterr().err) == bool(status)


def test_the_errors_keep_the_kinds_that_python_has_for_them():
    assert issubclass(errors.NotFinite, FloatingPointError)
    assert issubclass(errors.MissingPackage, ModuleNotFoundError)
    assert issubclass(watch.Collapse, ArithmeticError)
    assert issubclass(refiner.UserError, ValueError)


def test_ctrl_c_is_status_130(monkeypatch, capsys):
    from refiner.course import run as runner

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run_course", interrupted)
    assert cli.main(["course"]) == 130
    assert "--resume" in capsys.readouterr().err


def test_a_second_ctrl_c_and_names_with_control_characters_are_quiet():
    code = """
import os, signal, sys, time, warnings
from refiner import cli
def run(args):
    warnings.warn("\x1b[2J.png cannot be read")
    raise KeyboardInterrupt
cli.models_command, sys.argv = run, ["refiner", "models"]
cli.main()
os.kill(os.getpid(), signal.SIGINT)
time.sleep(9)
"""
    done = python("-c", code)
    assert done.returncode == 130
    assert done.stderr == "UserWarning: ?[2J.png cannot be read\n\nInterrupted.\n"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (MemoryError("Unable to allocate 14.0 TiB for an array"), "suffice: 14.0 TiB were wanted"),
        (MemoryError(), "the memory does not suffice;"),
        (
            RuntimeError("DefaultCPUAllocator: can't allocate: you tried to allocate 4000 bytes."),
            "suffice: 4000 bytes were wanted at once",
        ),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 GiB."), "suffice: 20.00 GiB"),
    ],
)
def test_too_little_memory_says_how_much_was_wanted(error, said, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(cli, "models_command", run)
    assert cli.main(["models"]) == 2
    assert said in capsys.readouterr().err


def test_the_extra_is_named_when_papermill_is_missing(tmp_path, monkeypatch, capsys):
    (tmp_path / "00_a.ipynb").write_text("{}")
    monkeypatch.setitem(sys.modules, "papermill", None)
    monkeypatch.delitem(sys.modules, "refiner.course.execute", raising=False)
    assert cli.main(["course", "--notebooks", str(tmp_path)]) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "needs the package papermill: pip install 'mim-refiner-lab[lab]'" in said


def test_a_files_own_error_names_the_file():
    error = PermissionError(13, "Permission denied", "runs/x")
    assert cli.sentence(error) == "runs/x: Permission denied"
    assert cli.sentence(ValueError("two\nlines")) == "two lines"
