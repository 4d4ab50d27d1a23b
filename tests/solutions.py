"""The exercises' solutions as the notebooks give them, and what a learner would make of a stub."""

import ast
import re
from itertools import pairwise

CALLS = ("course.check(", "course.choose(")


def solutions_of(notebook):
    """(cell with the stub and its check, solution) of every exercise of a notebook."""
    for cell, following in pairwise(notebook.cells):
        if cell.cell_type == "code" and any(call in cell.source for call in CALLS):
            solution = re.search(r"```python\n(.*?)```", following.source, re.DOTALL)
            assert solution, f"no solution right below {cell.source[:40]!r}"
            yield cell, solution.group(1)


def check_of(source):
    """Statements of the cell, and which of them is the check."""
    nodes = ast.parse(source).body
    return nodes, next(i for i, x in enumerate(nodes) if any(c in ast.unparse(x) for c in CALLS))


def answered(source, answer):
    """The cell with an answer right before its check, where it replaces the stub."""
    nodes, checked = check_of(source)
    lines, at = source.splitlines(), nodes[checked].lineno - 1
    return "\n".join([*lines[:at], *answer.splitlines(), *lines[at:]])
