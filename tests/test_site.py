"""The static site: builds offline, has every notebook and page, and needs no network to be read."""

import importlib.util
import json
import re
import subprocess
import sys
from html import unescape
from pathlib import Path

import matplotlib.pyplot as plt
import nbformat
import pytest

import refiner

ROOT = Path(__file__).parent.parent
NAMES = sorted(path.stem for path in (ROOT / "notebooks").glob("*.ipynb"))


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    if not importlib.util.find_spec("myst_nb"):
        pytest.skip("needs the extra site")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, str(ROOT / "docs" / "build.py"), "--out", str(out)]
    command += ["--explorer", "64"]  # all 1,024 take half a minute
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr  # Sphinx's warnings are errors: no broken link
    return out


def page(site, name):
    return (site / f"{name}.html").read_text(encoding="utf-8")


def test_every_notebook_and_page_is_there_and_linked(site):
    index = page(site, "index")
    for name in [*NAMES, "results", "guide", "gpu", "rooms", "cheat_sheet", "glossary", "teaching"]:
        assert f'href="{name}.html"' in index, name
        assert "<h1>" in page(site, name)
    assert {p.stem for p in (ROOT / "docs").glob("*.md")} <= {p.stem for p in site.glob("*.html")}


def test_nothing_is_loaded_from_a_network(site):
    for path in [*site.glob("*.html"), *site.glob("_static/**/*.css")]:
        text = path.read_text(encoding="utf-8")
        tags = "".join(re.findall(r"<(?:script|link|img|iframe)[^>]*>", text))
        loaded = re.findall(r"(?:src|href)=\"((?:https?:)?//[^\"]+)", tags)
        loaded += re.findall(r"(?:@import|url\()\s*[\"']?((?:https?:)?//[^\"')]+)", text)
        assert loaded == [], path.name


def test_the_explorer_is_a_page_and_is_found(site):
    """That it works with the network out of reach is seen by test_explorer_page.py."""
    assert '<a href="explorer.html">' in page(site, "index")
    assert "openExplorer(" in page(site, "explorer") and "mug" in page(site, "explorer")
    assert 1024 / 64 * (site / "explorer.html").stat().st_size < 8e6


def test_search_works_from_the_file_system(site):
    """The index is a script, not data that a page would have to fetch."""
    index = (site / "searchindex.js").read_text(encoding="utf-8")
    assert index.startswith("Search.setIndex(") and "searchindex.js" in page(site, "search")
    content = json.loads(index.removeprefix("Search.setIndex(").removesuffix(")"))
    assert set(NAMES) <= set(content["docnames"])
    assert "patchifi" in content["terms"] or "patchify" in content["terms"]


def test_figures_are_there_with_their_alt_text_and_solutions_are_folded(site):
    for name in NAMES:
        html, notebook = (
            page(site, name),
            nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4),
        )
        told = [
            output.metadata["image/png"]["alt"]
            for cell in notebook.cells
            for output in cell.get("outputs", [])
            if output.get("metadata", {}).get("image/png", {}).get("alt")
        ]
        shown = " ".join(map(unescape, re.findall(r'<img alt="([^"]*)"', html)))
        for text in told:
            assert " ".join(text.split()) in " ".join(shown.split()), name
        for picture in re.findall(r'src="(_images/[^"]+)"', html):
            assert (site / picture).is_file()
        solutions = sum(cell.source.count("<summary>Solution") for cell in notebook.cells)
        assert html.count("<summary>Solution</summary>") == solutions


def test_the_timing_table_lists_every_notebook(site):
    html = page(site, "teaching")
    for name in NAMES:
        assert re.search(rf'<td><p><a[^>]*href="{name}.html"', html), name


def test_make_site_installs_its_extra_and_builds():
    rule = re.search(r"^site: \$\(READY\)\n(?:\t.*\n)+", (ROOT / "Makefile").read_text(), re.M)[0]
    assert "'.[site]'" in rule and "docs/build.py" in rule


# ---------------------------------------------------------------- pages that state facts


def row(page_name, start):
    text = (ROOT / "docs" / f"{page_name}.md").read_text()
    line = next(x for x in text.splitlines() if x.startswith(f"| {start}"))
    return [cell.strip() for cell in line.strip("|").split("|")][1:]


def test_the_cheat_sheet_states_the_recipes_that_the_library_has():
    paper, small = refiner.Recipe.paper("L/16"), refiner.Recipe.cpu()
    assert row("cheat_sheet", "batch, queue") == [f"{r.batch}, {r.queue}" for r in (paper, small)]
    assert row("cheat_sheet", "layer-wise decay") == [
        f"{r.layer_decay} a block" for r in (paper, small)
    ]
    assert row("cheat_sheet", "neighbor") == [
        f"among the {r.top_k} nearest" for r in (paper, small)
    ]
    assert row("cheat_sheet", "stage 2")[1] == f"{small.head_steps} steps"
    assert row("cheat_sheet", "stage 3")[1] == f"{small.steps} steps"
    epochs = [round(s * paper.batch / 1_281_167) for s in (paper.head_steps, paper.steps)]
    assert [row("cheat_sheet", f"stage {i}")[0] for i in (2, 3)] == [f"{e} epochs" for e in epochs]
    sizes = [[view.size for view in r.views] for r in (paper, small)]
    assert row("cheat_sheet", "views") == [
        f"2 of {s[0]} and {len(s) - 2} of {s[-1]} pixels" for s in sizes
    ]
    assert list(paper.blocks) == list(range(17, 25))


def test_pages_name_what_exists():
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text()
        for name in re.findall(r"`refiner\.(\w+)[`(]", text):
            assert hasattr(refiner, name), f"{path.name}: refiner.{name}"
        for name in re.findall(r"`(\d\d_\w+)`", text):
            assert name in NAMES or name[:2] in ("08", "09"), f"{path.name}: {name}"


def test_the_glossary_is_in_alphabetical_order():
    text = (ROOT / "docs" / "glossary.md").read_text()
    terms = [term.lower() for term in re.findall(r"^\*\*(.+)\*\*$", text, re.MULTILINE)]
    assert len(terms) > 20 and terms == sorted(terms)


def test_the_schematic_numbers_its_blocks_and_draws_a_head_on_each_that_has_one(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import schematic

    figure = schematic.draw()
    words = [text.get_text() for text in figure.axes[0].texts]
    plt.close(figure)
    assert [w for w in words if w.isdigit()] == [str(i + 1) for i in range(schematic.DEPTH)]
    assert words.count("head") == len(schematic.HEADS)


# ---------------------------------------------------------------- badges


def test_badges_are_written_once_and_nothing_else_changes(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import badges

    (tmp_path / "notebooks").mkdir()
    (tmp_path / "README.md").write_text("# Lab\n\nText.\n")
    name = f"{NAMES[0]}.ipynb"
    original = nbformat.read(ROOT / "notebooks" / name, as_version=4)
    nbformat.write(original, tmp_path / "notebooks" / name)
    for place in ("one/lab", "two/lab"):
        assert badges.main([place, "--root", str(tmp_path)]) == 0
    assert badges.main(["nonsense", "--root", str(tmp_path)]) == 2
    head = (tmp_path / "README.md").read_text()
    assert head.startswith("# Lab\n\n[![Open this page in Colab](") and head.endswith("\n\nText.\n")
    written = nbformat.read(tmp_path / "notebooks" / name, as_version=4)
    changed = [
        (a.source, b.source)
        for a, b in zip(original.cells, written.cells, strict=True)
        if a.source != b.source
    ]
    assert len(changed) == 2, "the title's cell and the hosted one"
    assert "one/lab" not in str(written) and "one/lab" not in head
    link = "https://colab.research.google.com/github/two/lab/blob/main/notebooks/00_tour.ipynb"
    assert link in changed[0][1] and changed[0][1].count("![") == 2
    assert 'repository = "https://github.com/two/lab"' in changed[1][1]
