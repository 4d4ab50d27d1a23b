"""Every exercise: its solution passes its check, the empty stub is told apart, nothing raises."""

import ast
import re
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

FOLDER = Path(__file__).parent.parent / "notebooks"
IMPORTS = (
    "import torch\nimport torch.nn.functional as F\nimport refiner\nfrom refiner import course, mae"
)


def exercises():
    """(notebook, cell with the stub and its check, solution) of the whole course."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for cell, following in pairwise(cells):
            if cell.cell_type == "code" and "course.check(" in cell.source:
                solution = re.search(r"```python\n(.*?)```", following.source, re.DOTALL)
                yield pytest.param(cell.source, solution.group(1), id=f"{path.stem}-{cell.id}")


EXERCISES = list(exercises())


def run_check(source: str, solution: str | None) -> None:
    """Runs a cell up to its check, with the solution put after the stub that it replaces."""
    nodes = ast.parse(source).body
    checked = next(i for i, node in enumerate(nodes) if "course.check(" in ast.unparse(node))
    extra = ast.parse(solution).body if solution else []
    tree = ast.Module([*nodes[:checked], *extra, nodes[checked]], type_ignores=[])
    names = {}
    exec(IMPORTS, names)
    exec(compile(tree, "exercise", "exec"), names)


@pytest.mark.parametrize("source, solution", EXERCISES)
def test_the_solution_is_accepted_and_the_stub_is_not(source, solution, capsys):
    run_check(source, solution)
    assert "solved ✓" in capsys.readouterr().out
    run_check(source, None)
    assert "not solved yet" in capsys.readouterr().out


@pytest.mark.parametrize("source, solution", EXERCISES)
def test_a_wrong_answer_is_refused(source, solution, capsys):
    name = re.search(r"def (my_\w+)", source).group(1)
    wrong = f"{solution}\nright = {name}\ndef {name}(*args):\n    return right(*args) + 1"
    run_check(source, wrong)
    said = capsys.readouterr().out
    assert "solved" not in said and "library's version is used" in said


def test_the_course_has_exercises():
    assert len(EXERCISES) >= 7
