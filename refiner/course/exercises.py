"""The course's exercises: checks that explain what is wrong, answers that are kept, progress.

An answer that passes in a notebook somebody works in is written to the learner's own folder
``my_answers`` beside the notebooks' folder, which git ignores. When the course is updated and a
stub is empty again, the kept answer takes its place. The course runner neither reads nor writes
answers: its results are those of the library.
"""

from __future__ import annotations

import ast
import copy
import inspect
import os
import re
import sys
import textwrap
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from html import escape
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch

from refiner.base.errors import UserError
from refiner.base.files import write_text
from refiner.base.places import find_notebooks
from refiner.course.references import MISTAKES

UNSOLVED = "not solved yet"


# ---------------------------------------------------------------- checks


def check(
    answer: Callable,
    reference: Callable,
    make_args: Callable[[], tuple],
    *,
    name: str,
    atol: float = 1e-5,
    rtol: float = 1e-5,
    gradient: bool = False,
    cases: int = 3,
) -> Callable:
    """Compares a learner's function with the library's, says what is wrong, and never raises.

    Args:
        answer: the learner's function. Returning None or raising NotImplementedError means that it
            is not solved yet.
        reference: the library's function.
        make_args: makes the arguments of one case, as a tuple; called once a case, each time with
            another but fixed seed of torch's generator, which is put back afterwards.
        name: what the exercise is called in the messages, and its file in ``my_answers``.
        atol, rtol: largest difference allowed in values and gradients, absolute and relative to
            the right value; the larger counts.
        gradient: compare the gradients with respect to every floating-point tensor too.
        cases: how many cases to compare.

    Returns:
        ``answer`` if it is right, an answer kept earlier if ``answer`` is empty, else
        ``reference``: the rest of a notebook works in any case.
    """

    def first_problem(function: Callable) -> str | None:
        for case in range(cases):
            with _seeded(case):
                args = make_args()
                problem = _compare(function, reference, args, (atol, rtol), gradient)
                if problem and problem != UNSOLVED:
                    problem += _known_mistake(function, reference, args, (atol, rtol))
            if problem:
                return problem
        return None

    source = _source_of(answer) if callable(answer) else ""
    kept = partial(_kept_function, name, answer)
    return _settle(answer, reference, first_problem, kept, name=name, source=source)


def choose(answer, default, problem: Callable[[object], str | None], *, name: str):
    """Takes a learner's choice if it is possible, says what is wrong with it, and never raises.

    Args:
        answer: a literal, such as a list of numbers; None means not chosen yet.
        default: what the course takes.
        problem: says what is wrong with a choice; None if nothing is.
        name: what the exercise is called in the messages, and its file in ``my_answers``.

    Returns:
        ``answer``, or one kept earlier, or ``default``.
    """

    def first_problem(choice) -> str | None:
        try:
            return UNSOLVED if choice is None else problem(choice)
        except Exception as error:
            return f"{choice!r} cannot be used ({type(error).__name__}: {error})"

    def kept():
        return ast.literal_eval(_file_of(name).read_text(encoding="utf-8"))

    return _settle(answer, default, first_problem, kept, name=name, source=f"{answer!r}\n")


def _settle(answer, default, first_problem: Callable, kept: Callable, *, name: str, source: str):
    """The answer to go on with; prints the verdict and keeps what is right."""
    problem = first_problem(answer)
    if problem is None:
        _keep(name, source)
        print(f"{name}: solved ✓")
        return answer
    if problem == UNSOLVED and _interactive() and _file_of(name).is_file():
        file = f"{_file_of(name).parent.name}/{_file_of(name).name}"
        try:
            earlier = kept()
            old_problem = first_problem(earlier)
        except Exception as error:
            old_problem = f"{type(error).__name__}: {error}"
        if old_problem is None:
            print(f"{name}: solved ✓ (with your answer in {file})")
            return earlier
        problem = f"{UNSOLVED} here, and {file} no longer passes: {old_problem}"
    print(f"{name}: {problem}. The library's version is used below.")
    return default


def draw_int(low: int, high: int) -> int:
    """A whole number from ``low`` to ``high``, both included, for the arguments of a check.

    Sizes that change from case to case: an answer with a constant in their place does not pass.
    """
    return int(torch.randint(low, high + 1, ()))


def draw_float(low: float, high: float) -> float:
    """A number between ``low`` and ``high``, for the arguments of a check."""
    return low + (high - low) * float(torch.rand(()))


@contextmanager
def _seeded(seed: int) -> Iterator[None]:
    """A fixed state of torch's generator inside, the old one afterwards."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield


def _compare(answer, reference, args: tuple, tolerance, gradient: bool) -> str | None:
    """What is wrong with an answer in one case; None if nothing is."""
    wanted, wanted_inputs = _call(reference, args, gradient)
    try:
        given, given_inputs = _call(answer, args, gradient)
    except NotImplementedError:
        return UNSOLVED
    except Exception as error:
        return f"your version raises {type(error).__name__}: {error}{_line_of(error, answer)}"
    if given is None:
        return UNSOLVED
    problem = _difference(given, wanted, tolerance, "the result")
    if problem or not gradient:
        return problem
    return _compare_gradients(given, given_inputs, wanted, wanted_inputs, tolerance)


def _line_of(error: Exception, answer: Callable) -> str:
    """The last line of an answer that an error came from, where its source is known."""
    file = getattr(getattr(answer, "__code__", None), "co_filename", None)
    lines = [f.line for f in traceback.extract_tb(error.__traceback__) if f.filename == file]
    return f" (in the line `{lines[-1]}`)" if lines and lines[-1] else ""


def _call(function: Callable, args: tuple, gradient: bool) -> tuple[object, list]:
    """Calls with fresh copies, so that a function that changes its input harms nobody."""
    args = copy.deepcopy(args)
    inputs = [x for x in args if torch.is_tensor(x) and x.is_floating_point()] if gradient else []
    for tensor in inputs:
        tensor.requires_grad_()
    return function(*args), inputs


def _known_mistake(answer, reference, args: tuple, tolerance) -> str:
    """What went wrong, where the answer gives what a known wrong version gives; else nothing."""
    try:
        given = _call(answer, args, gradient=False)[0]
    except Exception:
        return ""
    for what, wrong in MISTAKES.get(reference, {}).items():
        if _difference(given, _call(wrong, args, gradient=False)[0], tolerance, "") is None:
            return f" ({what})"
    return ""


def _difference(given, wanted, tolerance: tuple[float, float], what: str) -> str | None:
    """Compares numbers, arrays, tensors, and tuples or lists of them."""
    if isinstance(wanted, tuple | list):
        if not isinstance(given, tuple | list) or len(given) != len(wanted):
            return f"{what} should hold {len(wanted)} values"
        pairs = enumerate(zip(given, wanted, strict=True))
        found = (_difference(g, w, tolerance, f"part {i} of {what}") for i, (g, w) in pairs)
        return next(filter(None, found), None)
    if torch.is_tensor(wanted) and not torch.is_tensor(given):
        # Equal numbers would do here, but what follows in the notebook uses a tensor's methods.
        return f"{what} is of type {type(given).__name__}; a tensor is needed"
    try:
        mine, theirs = (
            (x.detach().cpu().double().numpy() if torch.is_tensor(x) else np.asarray(x, float))
            for x in (given, wanted)
        )
    except (TypeError, ValueError, RuntimeError):  # the last: a list of tensors with gradient
        return f"{what} is of type {type(given).__name__}, not {type(wanted).__name__}"
    if mine.shape != theirs.shape:
        swapped = mine.ndim > 1 and mine.shape == theirs.shape[::-1]
        hint = " (are the axes swapped?)" if swapped else ""
        return f"{what} has shape {list(mine.shape)}, not {list(theirs.shape)}{hint}"
    if np.isnan(mine).any() and not np.isnan(theirs).any():
        return f"{what} holds NaN"
    atol, rtol = tolerance
    if np.allclose(mine, theirs, rtol=rtol, atol=atol, equal_nan=True):
        return None
    return _worst(mine, theirs, what)


def _worst(mine, theirs, what: str) -> str:
    """The largest difference of two arrays of one shape, or the factor between them."""
    with np.errstate(all="ignore"):
        ratio = (mine / theirs)[np.abs(theirs) > 1e-6]
    if ratio.size > 1 and np.ptp(ratio) < 1e-3 * abs(ratio.mean()):
        return f"{what} is {ratio.mean():.4g} times what it should be, everywhere"
    gap = np.abs(np.where(mine == theirs, 0.0, mine - theirs))
    worst = np.unravel_index(np.argmax(gap), gap.shape)
    place = f" at {list(map(int, worst))}" if worst else ""
    return f"{what} is {mine[worst]:.4g}{place} where {theirs[worst]:.4g} is right"


def _compare_gradients(given, given_inputs, wanted, wanted_inputs, tolerance) -> str | None:
    mine, theirs = _gradients(given, given_inputs), _gradients(wanted, wanted_inputs)
    for i, (g, w) in enumerate(zip(mine, theirs, strict=True)):
        what = f"the gradient for tensor {i + 1} of the arguments"
        if g is None and w is not None:
            return f"{what} is missing: is something detached?"
        if g is not None and w is None:
            return f"{what} should not exist: detach it"
        problem = None if g is None else _difference(g, w, tolerance, what)
        if problem:
            return problem
    return None


def _gradients(result, inputs: list) -> list:
    """Gradients of a fixed weighted sum of all results; None where an input has no part in it."""
    results = result if isinstance(result, tuple | list) else [result]
    results = [x for x in results if torch.is_tensor(x) and x.requires_grad]
    if not results:
        return [None] * len(inputs)
    generator = torch.Generator().manual_seed(0)
    total = sum(
        (x.double() * torch.rand(x.shape, generator=generator, dtype=torch.float64)).sum()
        for x in results
    )
    return list(torch.autograd.grad(total, inputs, allow_unused=True))


# ---------------------------------------------------------------- kept answers


def answers_folder() -> Path:
    """``my_answers`` beside the course's notebooks folder, or what REFINER_ANSWERS says."""
    if "REFINER_ANSWERS" in os.environ:
        return Path(os.environ["REFINER_ANSWERS"])
    try:
        return find_notebooks().parent / "my_answers"
    except FileNotFoundError:
        return Path("my_answers")


def _file_of(name: str) -> Path:
    return answers_folder() / (re.sub(r"\W+", "_", name.lower()).strip("_") + ".py")


def _interactive() -> bool:
    """Whether this is a notebook that somebody works in."""
    if "REFINER_RECORD" in os.environ:  # the course runner
        return False
    ipython = sys.modules.get("IPython")
    return getattr(ipython and ipython.get_ipython(), "kernel", None) is not None


def _keep(name: str, source: str) -> None:
    if not _interactive():
        return
    try:
        write_text(_file_of(name), source)
    except OSError as error:  # a read-only course can be worked through all the same
        print(f"(your answer could not be kept: {error.strerror or error})")


def _source_of(function: Callable) -> str:
    try:
        return textwrap.dedent(inspect.getsource(function))
    except (OSError, TypeError):
        return "# solved, but the source could not be read\n"


def earlier(name: str, reference: Callable) -> Callable:
    """A learner's kept answer to an exercise of an earlier notebook, or the library's version.

    Args:
        name: what the exercise is called there.
        reference: the library's version, which the course runner uses always.
    """
    if _interactive() and _file_of(name).is_file():
        try:
            answer = _kept_function(name, reference)
        except Exception as error:
            print(f"{name}: your answer cannot be read ({type(error).__name__}: {error})")
        else:
            print(f"{name}: your own, from {_file_of(name).parent.name}/{_file_of(name).name}")
            return answer
    return reference


def _kept_function(name: str, stub: Callable) -> Callable:
    """The function in an answer's file, which sees what the notebook has imported and defined."""
    source = _file_of(name).read_text(encoding="utf-8")
    names = stub.__globals__ | vars(sys.modules["__main__"])
    exec(compile(source, str(_file_of(name)), "exec"), names)
    defined = [node.name for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return names[defined[-1]]


# ---------------------------------------------------------------- progress

_EXERCISE = re.compile(r"^### Exercise.*$", re.MULTILINE)
_HEADING = re.compile(
    r"### Exercise(?: \d+)?: (?P<title>.+) "
    r"\((?P<difficulty>easy|medium|hard), (?P<importance>essential|useful|optional), "
    r"(?P<minutes>\d+) minutes\)"
)


@dataclass
class Exercise:
    """An exercise of the course; ``name`` is what its check is called with."""

    notebook: str
    name: str
    title: str
    difficulty: str
    importance: str
    minutes: int
    solved: bool = False


@dataclass
class Progress:
    """Which exercises are solved; shows itself as a table, in a notebook too."""

    exercises: list[Exercise]

    @property
    def solved(self) -> int:
        return sum(exercise.solved for exercise in self.exercises)

    def _summary(self) -> str:
        left = sum(e.minutes for e in self.exercises if not e.solved)
        note = f"about {left} minutes to go" if left else "all done"
        return f"{self.solved} of {len(self.exercises)} exercises solved, {note}"

    def __str__(self) -> str:
        width = max((len(e.notebook) for e in self.exercises), default=0)
        title = max((len(e.title) for e in self.exercises), default=0)
        rows = [
            f"{'✓' if e.solved else '·'} {e.notebook:<{width}}  {e.title:<{title}}  "
            f"{e.difficulty}, {e.importance}, {e.minutes} minutes"
            for e in self.exercises
        ]
        return "\n".join([*rows, self._summary()])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = "".join(
            f"<tr><td>{'✓ solved' if e.solved else '○ open'}</td>"
            f'<td style="text-align:left">{escape(e.notebook)}</td>'
            f'<td style="text-align:left">{escape(e.title)}</td>'
            f"<td>{e.difficulty}</td><td>{e.importance}</td><td>{e.minutes}</td></tr>"
            for e in self.exercises
        )
        return (
            f"<p>{self._summary()}</p><table><thead><tr><th></th><th>notebook</th>"
            f"<th>exercise</th><th>difficulty</th><th>importance</th>"
            f"<th>minutes</th></tr></thead>"
            f"<tbody>{rows}</tbody></table>"
        )


def find_exercises(notebook, name: str) -> list[Exercise]:
    """The exercises of a notebook: headings with the check in the next code cell.

    Args:
        notebook: as nbformat reads it.
        name: the notebook's, without ``.ipynb``.

    Raises:
        ValueError: for an exercise without a check below it, or without one of its labels.
    """
    found = []
    for cell, following in pairwise(notebook.cells):
        if cell.cell_type != "markdown" or not (line := _EXERCISE.search(cell.source)):
            continue
        heading = _HEADING.fullmatch(line[0])
        if heading is None:
            raise UserError(
                f"{name}: {line[0]!r} does not end with (easy, essential, 5 minutes) or the like"
            )
        calls = re.search(
            r"course\.(?:check|choose)\(.*?\bname=\"([^\"]+)\"", following.source, re.DOTALL
        )
        if following.cell_type != "code" or calls is None:
            raise UserError(f"{name}: no check right below the exercise {heading['title']!r}")
        *labels, minutes = heading.groups()  # title, difficulty, importance
        found.append(Exercise(name, calls[1], *labels, int(minutes)))
    return found


def status(notebooks: str | Path | None = None) -> Progress:
    """Which exercises of the course are solved, by the answers in the learner's folder.

    Args:
        notebooks: their folder; None finds it.

    Returns:
        the progress, which a notebook shows as a table. Under the course runner all are open.

    Raises:
        FileNotFoundError: when there are no notebooks.
    """
    import nbformat

    exercises = []
    for path in sorted(find_notebooks(notebooks).glob("*.ipynb")):
        exercises += find_exercises(nbformat.read(path, as_version=4), path.stem)
    if "REFINER_RECORD" not in os.environ:
        for exercise in exercises:
            exercise.solved = _file_of(exercise.name).is_file()
    return Progress(exercises)
