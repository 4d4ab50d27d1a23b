"""Tells the course where it is published: badges for Colab and Binder, and the address to clone.

    python docs/badges.py OWNER/NAME

Run it once in a fork or after publishing on GitHub. It writes two badges below each notebook's
title and below README's, and the address into the cell that installs the course on a hosted
Jupyter. Running it again, also for another place, replaces what it wrote.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat

from refiner.base.files import write_text
from refiner.course.execute import save_notebook

ROOT = Path(__file__).resolve().parent.parent
COLAB = "https://colab.research.google.com"
BINDER = "https://mybinder.org"
LINE = re.compile(r"\n\n\[!\[Open this page in Colab\][^\n]*(?=\n|$)")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("repository", help="on GitHub, as OWNER/NAME")
    parser.add_argument("--branch", default="main", help="default: %(default)s")
    parser.add_argument("--root", default=ROOT, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", args.repository):
        print(f"badges: {args.repository!r} is not OWNER/NAME", file=sys.stderr)
        return 2
    for path in sorted((args.root / "notebooks").glob("*.ipynb")):
        notebook = nbformat.read(path, as_version=4)
        where = f"notebooks/{path.name}"
        first = notebook.cells[0]
        first.source = with_badges(first.source, badges(args.repository, args.branch, where))
        for cell in notebook.cells:
            if cell.cell_type == "code" and "repository = " in cell.source:
                address = f'repository = "https://github.com/{args.repository}"'
                cell.source = re.sub(r'^repository = "[^"]*"', address, cell.source, flags=re.M)
        save_notebook(path, notebook)
    readme = args.root / "README.md"
    line = badges(args.repository, args.branch, "notebooks/00_tour.ipynb")
    write_text(readme, with_badges(readme.read_text(encoding="utf-8"), line))
    return 0


def badges(repository: str, branch: str, path: str) -> str:
    """Colab opens the notebook alone; Binder sets up the repository's environment.yml first."""
    colab = f"{COLAB}/github/{repository}/blob/{branch}/{path}"
    binder = f"{BINDER}/v2/gh/{repository}/{branch}?labpath={path}"
    return (
        f"[![Open this page in Colab]({COLAB}/assets/colab-badge.svg)]({colab}) "
        f"[![Open this page in Binder]({BINDER}/badge_logo.svg)]({binder})"
    )


def with_badges(text: str, line: str) -> str:
    """A text whose first line, the title, is followed by the badges."""
    title, _, rest = LINE.sub("", text, count=1).partition("\n")
    return f"{title}\n\n{line}\n{rest}"


if __name__ == "__main__":
    sys.exit(main())
