"""A learner's copies of the notebooks: nothing given away, nothing lost."""

from copy import deepcopy

import nbformat
import pytest

from refiner.cli import main
from refiner.course.copies import INSTALLS, merged, open_copies
from refiner.course.execute import save_notebook


def notebook(**sources):
    """A notebook whose cells have these ids and sources, each with a stored result."""
    cells = []
    for name, source in sources.items():
        output = nbformat.v4.new_output("stream", text=f"result of {name}\n")
        cells.append(nbformat.v4.new_code_cell(source, id=name, outputs=[output]))
    return nbformat.v4.new_notebook(cells=cells)


@pytest.fixture
def course(tmp_path):
    """A course of one notebook, and the folder of its copies."""
    book = notebook(install=f"{INSTALLS}: …", stub="def f(): ...", after="f()")
    (tmp_path / "notebooks").mkdir()
    save_notebook(tmp_path / "notebooks" / "00_a.ipynb", book)
    return tmp_path / "notebooks", tmp_path / "mine"


def read(folder):
    return nbformat.read(folder / "00_a.ipynb", as_version=4)


def sources(book):
    return {cell.id: cell.source for cell in book.cells}


def test_copies_give_no_result_away_unless_asked_and_hide_the_install_cell(course, capsys):
    notebooks, mine = course
    command = ["course", "--notebooks", str(notebooks), "--copies", str(mine)]
    assert main(command) == 0 and "1 notebooks to work in" in capsys.readouterr().out
    assert sources(read(mine)) == sources(read(notebooks))
    assert not any(cell.outputs for cell in read(mine).cells)
    assert read(mine).cells[0].metadata["jupyter"] == {"source_hidden": True}
    main([*command, "--with-outputs"])
    assert all(cell.outputs for cell in read(mine).cells)
    assert (mine / ".gitignore").read_text() == "*\n"


def test_an_update_keeps_what_a_learner_did_and_brings_what_is_new(course):
    notebooks, mine = course
    open_copies(mine, notebooks=notebooks)
    own = read(mine)
    own.cells[1].source = "def f(): return 1"
    own.cells[1].outputs = [nbformat.v4.new_output("stream", text="my result\n")]
    own.cells.insert(2, nbformat.v4.new_code_cell("f()  # a try", id="try"))
    save_notebook(mine / "00_a.ipynb", own)
    newest = notebook(install=f"{INSTALLS}: …", stub="def f(x): ...", more="1", after="f(2)")
    save_notebook(notebooks / "00_a.ipynb", newest)
    for _ in range(2):  # a second update changes nothing
        open_copies(mine, notebooks=notebooks)
        found = read(mine)
        assert sources(found) == {
            "install": f"{INSTALLS}: …",
            "stub": "def f(): return 1",
            "try": "f()  # a try",
            "more": "1",
            "after": "f(2)",
        }
        assert [c.id for c in found.cells] == ["install", "stub", "try", "more", "after"]
        assert found.cells[1].outputs[0].text == "my result\n"


def test_what_was_deleted_stays_deleted_on_either_side_unless_it_was_changed():
    given = notebook(a="1", b="2", c="3")
    mine, newest = deepcopy(given), deepcopy(given)
    del mine.cells[0]  # by the learner
    del newest.cells[1:]  # by the course: b as handed out, c with the learner's words
    mine.cells[1].source = "3  # mine"
    assert sources(merged(mine, given, newest)) == {"c": "3  # mine"}
