"""Every exercise: its solution passes its check, wrong answers are explained, nothing raises.

Answers of a learner are kept outside of the notebooks and come back when a stub is empty again.
"""

import ast
import math  # noqa: F401  (a kept answer uses what its notebook has imported)
import re
from pathlib import Path

import nbformat
import pytest
import torch
from solutions import check_of, solutions_of

from refiner import course
from refiner.course import exercises, references
from refiner.course.references import MISTAKES

FOLDER = Path(__file__).parent.parent / "notebooks"
IMPORTS = """
from types import SimpleNamespace
import torch
import torch.nn.functional as F
import refiner
from refiner import course
from refiner.course import references
model = SimpleNamespace(blocks=[None] * 12)  # what a choice of blocks asks about
recipe = refiner.Recipe.cpu()
images = torch.zeros(32, 3, 32, 32)
"""


def collect():
    """(cell with the stub and its check, solution) of every exercise of the course."""
    for path in sorted(FOLDER.glob("*.ipynb")):
        for cell, solution in solutions_of(nbformat.read(path, as_version=4)):
            yield pytest.param(cell.source, solution, id=f"{path.stem}-{cell.id}")


EVERY = list(collect())
FUNCTIONS = [case for case in EVERY if "course.check(" in case.values[0]]
CHOICES = [case for case in EVERY if "course.choose(" in case.values[0]]


def run_check(source: str, answer: str | None) -> None:
    """Runs a cell up to its check, with an answer put after the stub that it replaces."""
    nodes, checked = check_of(source)
    extra = ast.parse(answer).body if answer else []
    tree = ast.Module([*nodes[:checked], *extra, nodes[checked]], type_ignores=[])
    names = {}
    exec(IMPORTS, names)
    exec(compile(tree, "exercise", "exec"), names)


@pytest.mark.parametrize("source, solution", EVERY)
def test_the_solution_is_accepted_and_the_stub_is_not(source, solution, capsys):
    run_check(source, solution)
    assert "solved ✓" in capsys.readouterr().out
    run_check(source, None)
    assert "not solved yet" in capsys.readouterr().out


WRONG = {
    "value": ("right(*args) + 1", r"is .* where .* is right|times what it should be"),
    "scale": ("right(*args) * 2", r"is .* where .* is right|times what it should be"),
    "shape": ("torch.as_tensor(right(*args))[..., None]", r"has shape .* not"),
    "type": ("'a text'", r"is of type str"),
    "crash": ("nothing_like_it", r"your version raises NameError"),
}


@pytest.mark.parametrize("kind", WRONG)
@pytest.mark.parametrize("source, solution", FUNCTIONS)
def test_a_wrong_answer_is_refused_and_explained(source, solution, kind, capsys):
    name = re.search(r"def (my_\w+)", source).group(1)
    wrong, explanation = WRONG[kind]
    run_check(source, f"{solution}\nright = {name}\ndef {name}(*args):\n    return {wrong}")
    said = capsys.readouterr().out
    assert re.search(explanation, said) and "solved ✓" not in said
    assert "The library's version is used below" in said


def arguments_of(source: str, monkeypatch, cases: int = 3):
    """The arguments that a check would call an answer with, and what it compares with."""
    seen = {}
    monkeypatch.setattr(
        course,
        "check",
        lambda answer, reference, make_args, **_: seen.update(made=make_args, reference=reference),
    )
    run_check(source, None)
    found = []
    for case in range(cases):
        with exercises._seeded(case):
            found.append(seen["made"]())
    return found, seen["reference"]


@pytest.mark.parametrize("source, solution", FUNCTIONS)
def test_no_constant_can_stand_for_a_number_in_the_arguments(source, solution, monkeypatch):
    cases, _ = arguments_of(source, monkeypatch)
    for values in zip(*cases, strict=True):
        if isinstance(values[0], int | float):
            assert len(set(values)) > 1, values


@pytest.mark.parametrize("source, solution", FUNCTIONS)
def test_numbers_in_place_of_a_tensor_are_refused(source, solution, monkeypatch, capsys):
    """They would pass as equal, and what follows in the notebook would raise."""
    (arguments, *_), reference = arguments_of(source, monkeypatch)
    monkeypatch.undo()
    if not torch.is_tensor(reference(*arguments)):
        return
    name = re.search(r"def (my_\w+)", source).group(1)
    run_check(
        source, f"{solution}\nright = {name}\ndef {name}(*args):\n    return right(*args).tolist()"
    )
    assert re.search(r"is of type (list|float|int); a tensor is needed", capsys.readouterr().out)


KNOWN = [c for c in FUNCTIONS if any(f"references.{f.__name__}" in c[0][0] for f in MISTAKES)]


@pytest.mark.parametrize("source, solution", KNOWN)
def test_a_known_mistake_is_named(source, solution, monkeypatch, capsys):
    """Of each wrong version that the references keep, in the check of the notebook itself."""
    _, reference = arguments_of(source, monkeypatch)
    monkeypatch.undo()
    name = re.search(r"def (my_\w+)", source).group(1)
    for what, wrong in MISTAKES[reference].items():
        monkeypatch.setitem(exercises.__dict__, "wrong", wrong)
        run_check(source, f"from refiner.course.exercises import wrong as {name}")
        said = capsys.readouterr().out
        assert f"({what})" in said and "solved ✓" not in said
    assert {c.values[0].count("course.check(") for c in KNOWN} == {1}
    assert len(KNOWN) == len(MISTAKES), "a known mistake that no exercise uses"


def test_an_own_entry_has_to_score_below_negative_cosines(capsys):
    (source,) = (case.values[0] for case in EVERY if "my_lookup" in case.values[0])
    run_check(
        source,
        "from functools import partial\nmy_lookup = partial(references.lookup, own=0.0)",
    )
    assert "an image has found itself" in capsys.readouterr().out


def test_an_error_in_an_answer_is_told_with_its_line(capsys):
    def my_answer(x):
        y = x.T
        return x @ y.nothing

    course.check(my_answer, torch.square, lambda: (torch.ones(2, 3),), name="a line")
    assert "(in the line `return x @ y.nothing`)" in capsys.readouterr().out


@pytest.mark.parametrize("source, solution", [c for c in FUNCTIONS if "gradient=True" in c[0][0]])
def test_a_detached_answer_is_refused_for_its_gradient(source, solution, capsys):
    name = re.search(r"def (my_\w+)", source).group(1)
    run_check(
        source, f"{solution}\nright = {name}\ndef {name}(*args):\n    return right(*args).detach()"
    )
    assert "gradient" in capsys.readouterr().out


@pytest.mark.parametrize("choice", ["[-1]", "[99]", "'all'", "[]", "[3, 3]"])
@pytest.mark.parametrize("source, solution", CHOICES)
def test_an_impossible_choice_is_refused_and_explained(source, solution, choice, capsys):
    name = ast.parse(solution).body[-1].targets[0].id
    run_check(source, f"{name} = {choice}")
    said = capsys.readouterr().out
    assert "solved" not in said and "library's version is used" in said and len(said) > 60


def test_every_exercise_says_goal_difficulty_importance_and_time_and_hides_its_solution():
    """``find_exercises`` refuses a heading without the three labels; see below."""
    progress = course.status(FOLDER)
    assert len(progress.exercises) == len(EVERY) >= 24
    assert len({exercise.name for exercise in progress.exercises}) == len(EVERY)
    assert all(5 <= exercise.minutes <= 40 for exercise in progress.exercises)
    for path in sorted(FOLDER.glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        for cell, check, after in zip(cells, cells[1:], cells[2:], strict=False):
            if "### Exercise" in cell.source:
                place = f"{path.stem}: {cell.source[:60]!r}"
                assert "**Goal:**" in cell.source and "<summary>Hint" in cell.source, place
                assert re.search(r"course\.(check|choose)\(", check.source), place
                assert after.source.startswith("<details><summary>Solution"), place


def test_six_hard_exercises_are_essential_and_come_in_the_order_in_which_they_build_on_each_other():
    hard = [e for e in course.status(FOLDER).exercises if e.difficulty == "hard"]
    assert [(e.notebook[:2], e.title) for e in hard] == [
        ("01", "attention"),
        ("02", "choose without test labels"),
        ("03", "the neighbor"),
        ("03", "NNA"),
        ("04", "the loss of one head"),
        ("09", "few labels, without a leak"),
    ]
    assert all(e.importance == "essential" and 20 <= e.minutes <= 40 for e in hard)


def reference_of(source):
    """What a check compares with, as written; of a choice, what its problem is looked up in."""
    nodes, checked = check_of(source)
    node = nodes[checked]
    call = next(
        x for x in ast.walk(node) if isinstance(x, ast.Call) and "course." in ast.unparse(x)
    )
    if ast.unparse(call.func) == "course.check":
        return ast.unparse(call.args[1])
    return next(iter(re.findall(r"references\.\w+", source)), "")


@pytest.mark.parametrize("source, solution", EVERY)
def test_the_reference_is_out_of_sight(source, solution):
    room, _, name = reference_of(source).rpartition(".")
    assert room == "references", f"{reference_of(source)!r} is none of references.py"
    assert callable(getattr(references, name))


def test_the_test_of_references_sees_one_in_the_cell():
    cell = (
        "def mine(x): ...\ndef right(x): return x\nf = course.check(mine, right, right, name='a')"
    )
    assert reference_of(cell) == "right"
    assert reference_of(cell.replace("mine, right", "mine, references.iou")) == "references.iou"
    assert reference_of("x = course.choose(None, 1, lambda x: None, name='a')") == ""


def test_the_stored_progress_of_the_tour_lists_every_exercise():
    tour = nbformat.read(FOLDER / "00_tour.ipynb", as_version=4)
    (cell,) = (c for c in tour.cells if c.cell_type == "code" and c.source == "course.status()")
    stored = "".join(str(output) for output in cell.outputs)
    exercises_now = course.status(FOLDER).exercises
    assert all(exercise.title in stored for exercise in exercises_now)
    assert f"0 of {len(exercises_now)} exercises" in stored


@pytest.mark.parametrize(
    ("labels", "problem"),
    [
        ("(easy, essential, 5 minutes)", "00_a: no check right below the exercise 'adding'"),
        (
            "(easy, 5 minutes)",
            r"00_a: '### Exercise: adding \(easy, 5 minutes\)' does not end with",
        ),
        ("(easy, essential)", "does not end with"),
        ("(simple, essential, 5 minutes)", "does not end with"),
        ("(easy, nice, 5 minutes)", "does not end with"),
        ("", "does not end with"),
    ],
)
def test_an_exercise_without_a_check_or_one_of_its_labels_is_named(labels, problem):
    heading = nbformat.v4.new_markdown_cell(f"## 1. Sums\n\n### Exercise: adding {labels}".strip())
    book = nbformat.v4.new_notebook(cells=[heading, nbformat.v4.new_code_cell("1 + 1")])
    with pytest.raises(ValueError, match=problem):
        exercises.find_exercises(book, "00_a")


# ---------------------------------------------------------------- kept answers


def double(x):
    return 2 * x


def stub(x):
    """Nothing yet."""


@pytest.fixture
def at_work(tmp_path, monkeypatch):
    """As if somebody worked in a notebook, with an empty folder for the answers."""
    monkeypatch.setenv("REFINER_ANSWERS", str(tmp_path / "answers"))
    monkeypatch.delenv("REFINER_RECORD", raising=False)
    monkeypatch.setattr(exercises, "_interactive", lambda: True)
    return tmp_path / "answers"


def checked(answer):
    return course.check(answer, lambda x: x + x, lambda: (3.0,), name="Twice as much!")


def test_a_right_answer_is_kept_and_stands_in_for_an_empty_stub(at_work, capsys):
    checked(stub)
    assert not at_work.exists(), "nothing to keep"
    assert checked(double) is double
    assert (at_work / "twice_as_much.py").read_text() == "def double(x):\n    return 2 * x\n"
    capsys.readouterr()
    earlier = checked(stub)
    assert earlier(4) == 8 and earlier is not double
    assert "solved ✓ (with your answer in answers/twice_as_much.py)" in capsys.readouterr().out


def test_a_kept_answer_that_no_longer_passes_is_not_used(at_work, capsys):
    checked(double)
    (at_work / "twice_as_much.py").write_text("def double(x):\n    return 3 * x\n")
    assert checked(stub)(4) == 8
    said = capsys.readouterr().out
    assert "no longer passes: the result is 9 where 6 is right" in said
    (at_work / "twice_as_much.py").write_text("def broken(")
    assert checked(stub)(4) == 8
    assert "no longer passes: SyntaxError" in capsys.readouterr().out


def test_an_earlier_notebooks_answer_is_taken_up_and_else_the_library_s(at_work, capsys):
    assert course.earlier("Twice as much!", stub) is stub and not capsys.readouterr().out
    at_work.mkdir()
    (at_work / "twice_as_much.py").write_text("def double(x):\n    return torch.add(x, x)\n")
    assert course.earlier("Twice as much!", stub)(torch.tensor(4)) == 8
    assert "your own, from answers/twice_as_much.py" in capsys.readouterr().out
    (at_work / "twice_as_much.py").write_text("def broken(")
    assert course.earlier("Twice as much!", stub) is stub
    assert "cannot be read (SyntaxError" in capsys.readouterr().out


def test_what_is_taken_up_is_an_exercise_of_an_earlier_notebook():
    titles = {e.name: e.notebook for e in course.status(FOLDER).exercises}
    found = [
        (path.stem, name)
        for path in sorted(FOLDER.glob("*.ipynb"))
        for cell in nbformat.read(path, as_version=4).cells
        for name in re.findall(r'course\.earlier\("([^"]+)"', cell.source)
    ]
    assert len(found) >= 3 and all(titles[name] < notebook for notebook, name in found)


def test_a_tuple_of_tensors_with_gradient_is_refused_not_raised(capsys):
    """For one tensor of two rows; numpy cannot read what has a gradient."""
    course.check(
        lambda x: (x.mean(), x.sum()),
        lambda x: torch.stack([x.mean(), x.sum()]),
        lambda: (torch.rand(3),),
        name="two rows",
        gradient=True,
    )
    assert "of type tuple; a tensor is needed" in capsys.readouterr().out


def test_a_wrong_answer_does_not_replace_a_kept_one(at_work):
    checked(double)
    before = (at_work / "twice_as_much.py").read_text()
    assert checked(lambda x: x)(4) == 8
    assert (at_work / "twice_as_much.py").read_text() == before


def test_a_choice_is_kept_too(at_work):
    def problem(choice):
        return None if choice in (1, 2) else f"{choice} is not possible"

    assert course.choose(2, 1, problem, name="pick") == 2
    assert course.choose(None, 1, problem, name="pick") == 2
    assert course.choose(5, 1, problem, name="pick") == 1


def test_the_course_runner_neither_reads_nor_writes_answers(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINER_ANSWERS", str(tmp_path))
    monkeypatch.setenv("REFINER_RECORD", str(tmp_path / "recorded.json"))
    checked(double)
    assert list(tmp_path.iterdir()) == []
    for exercise in course.status(FOLDER).exercises:
        (tmp_path / f"{exercise.name}.py").write_text("")
    assert course.status(FOLDER).solved == 0


def test_progress_counts_kept_answers_in_text_and_table(at_work):
    total = len(course.status(FOLDER).exercises)
    assert str(course.status(FOLDER)).splitlines()[-1].startswith(f"0 of {total} exercises solved")
    at_work.mkdir()
    (at_work / "patchify.py").write_text("def my_patchify(): ...\n")
    progress = course.status(FOLDER)
    assert progress.solved == 1 and "✓ 01_masked_image_modeling  patchify" in str(progress)
    html = progress._repr_html_()
    assert html.count("✓ solved") == 1 and html.count("○ open") == total - 1


def test_answers_lie_beside_the_notebooks_where_git_does_not_look(monkeypatch):
    monkeypatch.delenv("REFINER_ANSWERS", raising=False)
    monkeypatch.chdir(FOLDER)
    assert exercises.answers_folder() == FOLDER.parent / "my_answers"
    assert "my_answers/" in (FOLDER.parent / ".gitignore").read_text().splitlines()


def test_the_check_leaves_the_notebooks_random_numbers_alone():
    import torch

    torch.manual_seed(3)
    wanted = torch.rand(2)
    torch.manual_seed(3)
    seen = []
    course.check(stub, lambda x: x, lambda: seen.append(torch.rand(1)) or (seen[-1],), name="a")
    course.check(stub, lambda x: x, lambda: seen.append(torch.rand(1)) or (seen[-1],), name="b")
    assert torch.equal(torch.rand(2), wanted) and torch.equal(seen[0], seen[1])


def test_a_constant_factor_is_named_as_one(capsys):
    course.check(lambda x: [6.0, 9.0], lambda x: [2.0, 3.0], lambda: (0,), name="scaled")
    assert "3 times what it should be" not in capsys.readouterr().out, "a list has no one factor"
    import torch

    course.check(lambda x: 3 * x, lambda x: x, lambda: (torch.rand(5),), name="scaled")
    assert "3 times what it should be, everywhere" in capsys.readouterr().out


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.ipynb")), ids=lambda path: path.stem)
def test_what_a_check_returns_is_used_in_the_rest_of_the_notebook(path):
    code = [c.source for c in nbformat.read(path, as_version=4).cells if c.cell_type == "code"]
    everything = "\n".join(code)
    for name, call in re.findall(
        r"^(\w+) = (course\.(?:check|choose)\()", everything, re.MULTILINE
    ):
        after = everything.partition(f"{name} = {call}")[2]
        assert re.search(rf"\b{name}\b", after), f"{name} is not used"


def test_a_real_notebook_keeps_the_source_for_later(at_work, monkeypatch):
    """A kernel as a learner would start it, without the course runner."""
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    solved = "def double(x):\n    return math.ldexp(x, 1)"
    check = "course.check(double, lambda x: x + x, lambda: (3.0,), name='Twice as much!')"
    sources = ("import math\nfrom refiner import course", solved, check)
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    NotebookClient(nbformat.v4.new_notebook(cells=cells), kernel_name="python3").execute()
    assert cells[2].outputs[0].text == "Twice as much!: solved ✓\n"
    assert (at_work / "twice_as_much.py").read_text().strip() == solved
    assert checked(stub)(4) == 8
