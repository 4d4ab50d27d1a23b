"""A learner's own copies of the notebooks: without the answers below, and updated without losses.

Beside each copy, in ``.given``, lies what was handed out. A cell that still is as it was handed out
takes the course's newest version; a cell that the learner changed, added or deleted stays so.
"""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbformat import NotebookNode

from refiner.base.files import write_text
from refiner.base.places import find_notebooks
from refiner.course.execute import read_notebook, save_notebook

INSTALLS = "# Only for Colab, Binder and the like"


def open_copies(
    folder: str | Path = "my_course",
    *,
    notebooks: str | Path | None = None,
    with_outputs: bool = False,
) -> list[Path]:
    """Makes or updates working copies of all notebooks.

    Args:
        folder: where they lie; made if it is missing. It has to be beside the notebooks' folder,
            because their pictures and the install cell point there.
        notebooks: the course's own; None finds them.
        with_outputs: hand out the stored results, too: cells that the learner has not changed get
            them.

    Returns:
        The copies, in reading order.

    Raises:
        ValueError: when a copy is no valid notebook, naming it.
    """
    folder, copies = Path(folder), []
    for path in sorted(find_notebooks(notebooks).glob("*.ipynb")):
        newest, copy, given = _fresh(path, with_outputs), folder / path.name, folder / ".given"
        mine = newest
        if copy.is_file() and (given / path.name).is_file():
            mine = merged(read_notebook(copy), read_notebook(given / path.name), newest)
        for place, notebook in ((copy, mine), (given / path.name, newest)):
            place.parent.mkdir(parents=True, exist_ok=True)
            save_notebook(place, notebook)
        copies.append(copy)
    write_text(folder / ".gitignore", "*\n")
    return copies


def _fresh(path: Path, with_outputs: bool) -> NotebookNode:
    """The course's notebook as it is handed out."""
    notebook = read_notebook(path)
    for cell in notebook.cells:
        if cell.cell_type != "code":
            continue
        if cell.source.startswith(INSTALLS):
            cell.metadata["jupyter"] = {"source_hidden": True}
        if not with_outputs:
            cell.outputs, cell.execution_count = [], None
    return notebook


def merged(mine: NotebookNode, given: NotebookNode, newest: NotebookNode) -> NotebookNode:
    """The newest notebook with everything that a learner did to the given one.

    Args:
        mine: the learner's copy.
        given: what was handed out when it was made or last updated.
        newest: what would be handed out now.
    """
    before = {cell.id: cell.source for cell in given.cells}
    now = {cell.id: cell for cell in newest.cells}
    own = {cell.id: cell for cell in mine.cells}
    cells = []
    for cell in newest.cells:
        if cell.id in own:
            kept = own[cell.id]
            untouched = kept.source == before.get(cell.id)
            outdated = untouched and kept.source != cell.source
            blank = untouched and not kept.get("outputs")
            cells.append(cell if outdated or blank else kept)
        elif cell.id not in before:  # new in the course, not deleted by the learner
            cells.append(cell)
    for at, cell in enumerate(mine.cells):
        changed = cell.source != before.get(cell.id)
        if cell.id not in now and changed:  # the learner's own, or no longer in the course
            earlier = {c.id for c in mine.cells[:at]}
            place = max((i + 1 for i, c in enumerate(cells) if c.id in earlier), default=0)
            cells.insert(place, cell)
    return nbformat.from_dict({**newest, "cells": cells})
