"""Every notebook of the course runs, measures what its bands promise, and is stored clean."""

import json
import re
import sys
from itertools import pairwise
from pathlib import Path

import nbformat
import pytest

from refiner.base.places import clock
from refiner.course.execute import (
    ABSOLUTE_PATH,
    machine_paths,
    parameters_of,
    reading_minutes,
    title_of,
)
from refiner.course.exercises import find_exercises
from refiner.course.pages import key_figures
from refiner.course.run import run_course
from refiner.visuals.alt_text import UNLABELLED

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
def test_the_notebook_runs_and_its_figures_lie_in_their_bands(name, report, record_property):
    entry = run_course(ROOT / "notebooks", report, only=name)["notebooks"][name]
    figures = key_figures(entry["metrics"])
    record_property(
        "notebook", f"{name}: {entry['status']} in {clock(entry['seconds'])}, {figures}"
    )
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


def test_it_has_between_8_and_25_code_cells(notebook):
    assert 8 <= len(code_cells(notebook)) <= 25


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


# ---------------------------------------------------------------- the shape of a lesson

BANDS = json.loads((ROOT / "tests" / "bands.json").read_text())
SPELLED = "two|three|four|five|six|seven|eight|nine|ten|eleven|twelve|fifteen|twenty|thirty|forty"


def prose_of(notebook):
    """The markdown without code blocks: what a learner reads."""
    texts = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    return re.sub(r"^```.*?^```", "", "\n\n".join(texts), flags=re.DOTALL | re.MULTILINE)


def outputs_of(notebook):
    return [output for cell in code_cells(notebook) for output in cell.outputs]


def test_its_head_says_claim_aims_needs_and_measured_time(notebook):
    head = notebook.cells[0].source
    for part in ("**The claim.**", "**You will be able to** ", "| Prerequisites |", "| Needs |"):
        assert part in head, part
    time = re.search(
        r"^\| Time \| reading: about (\d+) minutes; "
        r"running: about ([\d.]+) minutes? on two CPU cores, "
        r"(?:not measured on a GPU|[\d.]+ minutes? on an? [^;|]+); exercises: (\d+) minutes \|$",
        head,
        re.MULTILINE,
    )
    assert time, "the row of the time is: reading: about N minutes; running: about N minutes on …"
    assert abs(int(time[1]) - reading_minutes(notebook)) <= 1, reading_minutes(notebook)
    assert float(time[2]) == notebook.metadata["refiner"]["minutes_cpu"]
    exercises = find_exercises(notebook, notebook.metadata["name"])
    assert int(time[3]) == sum(exercise.minutes for exercise in exercises)
    assert 2 <= len(exercises) <= 4


def test_its_stored_run_took_no_longer_than_stated_by_half(notebook):
    """By the clock, or by processor time where the machine did other work as well."""
    facts = notebook.metadata["refiner"]
    took = facts["measured"]
    assert facts["measured"]["cores"] >= 2
    assert min(took["seconds"], took["processor_seconds"]) <= 1.5 * 60 * facts["minutes_cpu"]


def test_the_whole_course_takes_at_most_fifteen_minutes_as_stated():
    stated = [
        nbformat.read(path_of(name), as_version=4).metadata["refiner"]["minutes_cpu"]
        for name in NAMES
    ]
    assert sum(stated) <= 15


def test_its_headings_are_in_order(notebook):
    cells = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    plain = re.sub(r"^```.*?^```", "", "\n\n".join(cells), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^(#+) (.+)$", plain, re.MULTILINE)
    levels = [len(marks) for marks, _ in headings]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    second = [text for marks, text in headings if marks == "##"]
    numbers = [int(m[1]) for text in second if (m := re.match(r"(\d+)\. ", text))]
    assert numbers == list(range(1, len(numbers) + 1)) and len(numbers) >= 2
    last = [text for text in second if text in ("Try it yourself", "Takeaways", "Read next")]
    assert last == ["Try it yourself", "Takeaways", "Read next"] and second[-1] == "Read next"
    exercises = [m[1] for _, text in headings if (m := re.match(r"Exercise (\d+): ", text))]
    assert exercises == [str(i + 1) for i in range(len(exercises))]


def test_it_asks_for_a_prediction_and_shows_a_control(notebook):
    assert "**Before you run this:**" in prose_of(notebook)
    everything = "\n".join(cell.source for cell in notebook.cells)
    assert re.search(r"\bcontrol\b", everything)
    assert notebook.metadata["name"] in BANDS and "record(" in everything


@pytest.mark.parametrize("number", ["00", "01", "03", "04", "06", "09"])
def test_questions_to_discuss_have_as_many_answers_which_are_collapsed(number):
    (path,) = (ROOT / "notebooks").glob(f"{number}_*.ipynb")
    cells = nbformat.read(path, as_version=4).cells
    (cell,) = (cell for cell in cells if "### To discuss" in cell.source)
    parts = re.fullmatch(
        r"### To discuss\n\n(.*)\n\n<details><summary>Answers</summary>\n\n(.*?)\n</details>.*",
        cell.source,
        re.DOTALL,
    )
    assert parts, "### To discuss, the questions, <details> with the answers"
    questions, answers = (re.findall(r"^(\d)\. ", part, re.MULTILINE) for part in parts.groups())
    assert questions == answers == [str(i + 1) for i in range(len(questions))]
    assert 1 <= len(questions) <= 3


def test_it_ends_with_at_most_six_things_to_read(notebook):
    reading = prose_of(notebook).rpartition("## Read next")[2]
    assert 1 <= len(re.findall(r"^- ", reading, re.MULTILINE)) <= 6


def test_the_cell_for_hosted_notebooks_is_the_same_everywhere_and_does_nothing_at_home(notebook):
    hosted = code_cells(notebook)[1]
    first = nbformat.read(path_of(NAMES[0]), as_version=4)
    assert hosted.source == code_cells(first)[1].source and hosted.outputs == []
    before = list(sys.path)
    exec(hosted.source, {})
    assert sys.path == before


def test_the_cell_for_hosted_notebooks_installs_the_clone_it_lies_in(monkeypatch, tmp_path):
    hosted = code_cells(nbformat.read(path_of(NAMES[0]), as_version=4))[1].source
    calls = []
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("subprocess.run", lambda command, check: calls.append((command, check)))
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.chdir(ROOT / "notebooks")
    exec(hosted, {})
    pip = [sys.executable, "-m", "pip", "install", "-q", "-e", ".."]
    assert calls == [(pip, True)] and sys.path[0] == str(ROOT)
    calls.clear()
    monkeypatch.chdir(tmp_path)
    (tmp_path / "course" / "notebooks").mkdir(parents=True)
    exec(hosted, {})
    assert calls[0][0][:2] == ["git", "clone"] and calls[1] == (pip, True)


# ---------------------------------------------------------------- figures


def test_every_figure_has_alt_text_and_labelled_axes(notebook):
    for cell in code_cells(notebook):
        for output in cell.outputs:
            if "image/png" in output.get("data", {}):
                told = output.metadata.get("image/png", {}).get("alt", "")
                assert len(told) >= 30, f"no alt text below {cell.source[:60]!r}"
                assert UNLABELLED not in told, told
    for picture in re.findall(r"!\[(.*?)\]\(", prose_of(notebook)):
        assert len(picture) >= 20, "a picture in the text needs alt text too"


# ---------------------------------------------------------------- numbers

AMOUNT = r"(?=((?: (?:to|–|…) \d+(?:\.\d+)?)?\s?(?:%|points\b))?)"
NUMBER = re.compile(r"(?<![\w./\-–−,])(\d+(?:\.\d+)?)(?![\w/]|-\w|[.,]\d)" + AMOUNT)


def stated_numbers(prose):
    """Numbers in running text with the words around: no code, links, headings, years, sections."""
    text = re.sub(r"<[^>]+>|`[^`]*`|\]\([^)]*\)|^#.*$|^\|.*$", " ", prose, flags=re.MULTILINE)
    text = re.sub(
        r"\b(?:sections?|equations?|issue|exercises?)(?: \d[\d.]*(?:,| and)?)+", " ", text
    )
    text = re.sub(r"\((?:[^()]*\b(?:19|20)\d\d\b[^()]*)\)|data2vec 2\.0|\[\d+\]", " ", text)
    text = text.replace("−", "-")
    for match in NUMBER.finditer(text):
        around = " ".join(text[max(0, match.start() - 30) : match.end() + 20].split())
        yield match[1], bool(match[2]), around


def known_numbers(notebook):
    """Numbers that cells print or contain, and the ends of the bands of what they record."""
    texts = [cell.source for cell in code_cells(notebook)]
    for output in outputs_of(notebook):
        texts += [output.get("text", ""), output.get("data", {}).get("text/plain", "")]
    found = re.findall(r"(\d+(?:\.\d+)?)(e-?\d+)?", "\n".join(texts).replace("_", ""))
    return [float(x) for a, e in found for x in {a, a + e}], band_ends(notebook)


def band_ends(notebook):
    bands = BANDS.get(notebook.metadata["name"], {}).values()
    return [band[end] for band in bands for end in ("min", "max") if end in band]


def is_known(text, share, found, ends):
    """Whether a number as written is one of the known ones, rounded to its own decimals."""
    decimals = len(text.partition(".")[2])
    known = [*found, *ends]
    if share:  # shares are printed as 0.25 or 25 %
        known += [100 * x for x in known]
    return any(
        abs(float(text) - x) <= 0.5001 * 10**-decimals * (decimals > 0) + 1e-9
        or float(text) == round(x, decimals)
        for x in known
    )


def test_text_states_no_number_that_no_cell_prints(notebook):
    found, ends = known_numbers(notebook)
    unknown = [
        around
        for text, share, around in stated_numbers(prose_of(notebook))
        if not is_known(text, share, found, ends)
    ]
    assert unknown == []


def test_measured_amounts_are_written_in_digits(notebook):
    """So that the test above sees them."""
    spelled = rf"\b(?:{SPELLED})(?:-\w+)?\s+(?:points|per ?cent|%)"
    assert re.findall(spelled, prose_of(notebook)) == []


RANGE = re.compile(r"(\d+(?:\.\d+)?) (?:to|–|…) (\d+(?:\.\d+)?)(?:\s?%| points)")


def test_ranges_in_the_text_are_bands_of_recorded_metrics(notebook):
    bands = BANDS[notebook.metadata["name"]].values()
    known = {(round(100 * b["min"], 6), round(100 * b["max"], 6)) for b in bands if len(b) == 2}
    for low, high in RANGE.findall(prose_of(notebook)):
        assert (float(low), float(high)) in known, f"{low} to {high}"


def test_the_tests_of_numbers_see_what_is_wrong():
    text = "It rose to 91.2 % (Smith 2019), see section 3 and `x = 7`; 12 blocks, 4 to 16 points."
    assert [n for n, _, _ in stated_numbers(text)] == ["91.2", "12", "4", "16"]
    assert is_known("91.2", True, [0.9123], []) and not is_known("91.2", True, [0.9134], [])
    assert not is_known("91.2", False, [0.912], []) and is_known("12", False, [12.0], [])
    assert RANGE.findall(text) == [("4", "16")]


# ---------------------------------------------------------------- the instructors' table


def claims_of(page):
    """The measured values and the controls of each notebook, as the instructors' page has them."""
    rows = page.partition("<!-- claims -->")[2].partition("<!-- end -->")[0].strip().splitlines()
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows[2:]]
    return {number: f"{measured}; {control}" for number, _, measured, control, _ in cells}


CLAIMS = claims_of((ROOT / "docs" / "teaching.md").read_text(encoding="utf-8"))


@pytest.mark.parametrize("number", CLAIMS)
def test_the_instructors_table_states_what_the_notebook_measured(number):
    (name,) = (name for name in NAMES if name.startswith(number))
    notebook = nbformat.read(path_of(name), as_version=4)
    notebook.metadata["name"] = name
    found, ends = known_numbers(notebook)
    numbers = re.findall(r"(?<![\w.])(\d+(?:\.\d+)?(?:e-\d+)?)", CLAIMS[number])
    assert any("." in text or "e-" in text for text in numbers), "no measured value"
    assert [n for n in numbers if not _printed(n, found, ends)] == []


def _printed(text, found, ends):
    return float(text) in found if "e-" in text else is_known(text, True, found, ends)


def test_the_instructors_table_has_every_notebook_but_the_explorer():
    assert sorted(CLAIMS) == [name[:2] for name in NAMES if name[:2] != "08"]
