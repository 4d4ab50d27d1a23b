"""Every notebook of the course runs, measures what its bands promise, and is stored clean."""

import re
from pathlib import Path

import nbformat
import pytest

from refiner.course import clock, run_course
from refiner.execute import ABSOLUTE_PATH, machine_paths, parameters_of, title_of
from refiner.report import key_figures

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


def path_of(name):
    return ROOT / "notebooks" / f"{name}.ipynb"


@pytest.fixture(scope="session")
def report(tmp_path_factory):
    """One report for all: each test adds its notebook."""
    return tmp_path_factory.mktemp("course")


@pytest.mark.notebooks
@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_runs_and_its_figures_lie_in_their_bands(name, report, capsys):
    entry = run_course(ROOT / "notebooks", report, only=name)["notebooks"][name]
    with capsys.disabled():
        figures = key_figures(entry["metrics"])
        print(f"\n{name}: {entry['status']} in {clock(entry['seconds'])}, {figures}", flush=True)
    assert entry["status"] == "ok", "\n".join(entry["problems"])


# ---------------------------------------------------------------- as stored


@pytest.fixture(params=NAMES)
def notebook(request):
    notebook = nbformat.read(path_of(request.param), as_version=4)
    notebook.metadata["name"] = request.param
    return notebook


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_the_course_has_notebooks_numbered_in_reading_order():
    assert NAMES
    numbers = [re.fullmatch(r"(\d\d)_[a-z0-9_]+", name).group(1) for name in NAMES]
    assert numbers[0] == "00" and len(set(numbers)) == len(numbers)


def test_it_opens_with_a_question(notebook):
    assert notebook.cells[0].cell_type == "markdown"
    assert notebook.cells[0].source.startswith("# ") and title_of(notebook).endswith("?")


def test_it_states_its_runtime(notebook):
    assert 0 < notebook.metadata["refiner"]["minutes_cpu"] < 60


def test_its_parameters_are_literals_in_the_first_code_cell(notebook):
    tagged = [c for c in code_cells(notebook) if "parameters" in c.metadata.get("tags", [])]
    assert tagged == code_cells(notebook)[:1]
    parameters = parameters_of(notebook)  # refuses what is computed
    assert parameters.get("preset", "cpu") == "cpu"


def test_it_has_between_8_and_20_code_cells(notebook):
    assert 8 <= len(code_cells(notebook)) <= 20


def test_it_was_run_once_from_top_to_bottom_and_shows_results(notebook):
    cells = [cell for cell in code_cells(notebook) if cell.source.strip()]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert any("image/png" in o.get("data", {}) for cell in cells for o in cell.outputs)
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]


def test_it_is_stored_without_what_only_the_run_knew(notebook):
    assert not {"widgets", "papermill"} & set(notebook.metadata)
    for cell in notebook.cells:
        assert not {"papermill", "execution"} & set(cell.metadata)
        assert "injected-parameters" not in cell.metadata.get("tags", [])
        for output in cell.get("outputs", []):
            assert "application/vnd.jupyter.widget-view+json" not in output.get("data", {})


def test_it_is_under_one_and_a_half_megabytes(notebook):
    assert path_of(notebook.metadata["name"]).stat().st_size < 1_500_000


def test_it_shows_no_path_of_a_machine(notebook):
    assert machine_paths(notebook) == []
    assert not [c.source for c in notebook.cells if ABSOLUTE_PATH.search(c.source)]


def test_it_uses_no_shell_commands_whose_failure_nobody_sees(notebook):
    sources = "\n".join(cell.source for cell in code_cells(notebook))
    assert not re.search(r"^\s*(!|%%(bash|sh|script)|[\w, ]+=\s*!)", sources, re.MULTILINE)
