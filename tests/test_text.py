"""What people read: spelled right, and links of a form that can work, checked without a network."""

import re
import subprocess
import sys
from pathlib import Path
from urllib.parse import urlsplit

import nbformat
import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
TEXTS = [*PAGES, *NOTEBOOKS]
# Names that codespell takes for slips of other words.
NO_SLIPS = "hart"  # of the sphere-tracing paper


def markdown_of(path):
    if path.suffix == ".md":
        return path.read_text(encoding="utf-8")
    cells = nbformat.read(path, as_version=4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def sources_of(path):
    if path.suffix != ".ipynb":
        return path.read_text(encoding="utf-8")
    return "\n\n".join(cell.source for cell in nbformat.read(path, as_version=4).cells)


def test_the_spelling_is_right(tmp_path):
    pytest.importorskip("codespell_lib")
    for path in [*TEXTS, *(ROOT / "refiner").glob("*.py"), *(ROOT / "benchmarks").glob("*.py")]:
        (tmp_path / f"{path.parent.name}_{path.name}.txt").write_text(sources_of(path))
    command = [sys.executable, "-m", "codespell_lib", "--ignore-words-list", NO_SLIPS, tmp_path]
    found = subprocess.run(command, capture_output=True, text=True)
    assert found.returncode == 0, found.stdout.replace(str(tmp_path), "") + found.stderr


AMERICAN = re.compile(
    r"\b(colou?red|colors?|centere?d?|gr[a]y|(?:normal|standard|optim|organ|visual|summar)iz\w+|"
    r"analyz\w+|behavior|favor|recogniz\w+|labeled|neighbours?)\b",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_the_spelling_is_british_but_for_the_method_s_neighbor(path):
    text = re.sub(
        r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->", "", markdown_of(path), flags=re.DOTALL
    )
    found = {word for word in AMERICAN.findall(text) if word.lower() != "coloured"}
    assert not found - {"organization"}, found


def test_the_spelling_test_sees_a_slip(tmp_path):
    pytest.importorskip("codespell_lib")
    (tmp_path / "a.txt").write_text("the neighbor recieves\n")  # codespell:ignore
    command = [sys.executable, "-m", "codespell_lib", str(tmp_path / "a.txt")]
    assert subprocess.run(command, capture_output=True).returncode != 0


def link_problems(text, folder):
    """What is wrong with the links of a Markdown text that lies in a folder."""
    problems = []
    text = re.sub(r"^```.*?^```|`[^`]*`", "", text, flags=re.DOTALL | re.MULTILINE)
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)]*)\)", text):
        address = urlsplit(target)
        if not label.strip():
            problems.append(f"{target}: no words to click on")
        if address.scheme:
            if address.scheme != "https" or "." not in address.netloc or " " in target:
                problems.append(f"{target}: not https://host.name/…")
        elif not address.path:
            problems.append(f"{target}: leads nowhere")
        elif not (folder / address.path).exists():
            problems.append(f"{target}: no such file")
    without = re.sub(r"\]\([^)]*\)|<https://[^>\s]+>", "", text)
    return problems + [f"{url}: bare" for url in re.findall(r"https?://\S+", without)]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_links_have_the_right_form(path):
    assert link_problems(markdown_of(path), path.parent) == []


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_arxiv_numbers_have_their_form(path):
    for target in re.findall(r"arxiv\.org/([^)\s]+)", markdown_of(path)):
        assert re.fullmatch(r"abs/\d{4}\.\d{4,5}", target), target


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.stem)
def test_notebooks_are_called_by_their_names(path):
    names = {other.stem for other in NOTEBOOKS}
    for name in re.findall(r"`(\d\d_[a-z_]+)`", markdown_of(path)):
        assert name in names, f"{path.name} names {name}"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("[a](http://x.org)", "not https"),
        ("[a](https://nohost/x)", "not https"),
        ("[](https://x.org/y)", "no words"),
        ("[a](gone.md)", "no such file"),
        ("[a]()", "leads nowhere"),
        ("see https://x.org/y", "bare"),
        ("[a](https://x.org/y), `[b](gone.md)`", None),
    ],
)
def test_the_test_of_links_sees_what_is_wrong(text, problem, tmp_path):
    found = link_problems(text, tmp_path)
    assert (problem is None and not found) or problem in found[0]


def test_readme_lists_every_notebook_by_its_question():
    readme = (ROOT / "README.md").read_text()
    for path in NOTEBOOKS:
        question = markdown_of(path).partition("\n")[0].removeprefix("# ")
        row = re.search(rf"^\| \[{path.stem}\]\(notebooks/{path.name}\) \| (.*) \|$", readme, re.M)
        assert row and question in row[1], f"{path.stem}: {question}"
