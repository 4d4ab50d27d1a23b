"""Builds the course's static site: the notebooks as they ran, with search, for offline reading.

    python docs/build.py [--out build/site] [--explorer 1024]

Sphinx with MyST-NB does the work; here its sources are put together in a temporary folder. No
notebook is executed, nothing is fetched, and the pages open from the file system. The explorer of
the embedded checkpoints, which needs no kernel, is one of them.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat

ROOT = Path(__file__).resolve().parent.parent
EXPLORER = (  # made after the pages, so Sphinx does not know it
    'Look around first: <a href="explorer.html">the explorer</a> shows the encoder of the course '
    "before and after refining, block by block, and needs no installation."
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default=ROOT / "build" / "site", type=Path)
    parser.add_argument("--notebooks", default=ROOT / "notebooks", type=Path)
    parser.add_argument("--explorer", default=1024, type=int, help="its images; 0 leaves it out")
    args = parser.parse_args()
    try:
        from sphinx.cmd.build import build_main
    except ModuleNotFoundError:
        print("The site needs Sphinx: pip install 'mim-refiner-lab[site]'", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder, "source")
        collect(source, args.notebooks, EXPLORER if args.explorer else "")
        shutil.rmtree(args.out, ignore_errors=True)
        options = ["-q", "-W", "--keep-going", "-b", "html", "-d", str(Path(folder, "trees"))]
        status = build_main([*options, str(source), str(args.out)])
    if status == 0 and args.explorer:
        explorer(args.out / "explorer.html", args.explorer)
    if status == 0:
        print(f"Site: {args.out / 'index.html'}")
    return status


def explorer(path: Path, n: int) -> None:
    """Writes the explorer of the embedded checkpoints, before and after refining."""
    import refiner
    from refiner.visuals.explorer_page import write_html
    from refiner.visuals.explorer_state import prepare

    images = refiner.load_images("toybox", split="test", n=n)
    models = {"before": "mae_toybox", "after": "mae_toybox_refined"}
    features = {
        side: refiner.extract(refiner.load_model(name), images, progress=False)
        for side, name in models.items()
    }
    explored = prepare(images, features, progress=False)
    write_html(explored, explored.start(), path)


def collect(source: Path, notebooks: Path, explorer: str = "") -> None:
    """Puts pages, settings, figures and the notebooks into one folder."""
    source.mkdir(parents=True)
    shutil.copytree(ROOT / "benchmarks" / "results", source / "benchmarks" / "results")
    shutil.copy(ROOT / "docs" / "conf.py", source)
    shutil.copy(ROOT / "docs" / "schematic.png", source)
    paths = sorted(notebooks.glob("*.ipynb"))
    names = [path.stem for path in paths]
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        nbformat.write(prepared(notebook, names), source / path.name)
    for path in (ROOT / "docs").glob("*.md"):
        text = path.read_text(encoding="utf-8").replace("<!-- times -->", times(paths))
        text = text.replace("<!-- explorer -->", explorer)
        text = text.replace("{notebooks}", "\n".join(names))
        (source / path.name).write_text(linked(text, names), encoding="utf-8")


def prepared(notebook, names: list[str]):
    """A notebook whose pictures have their alt text where MyST-NB looks for it, and with links."""
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            cell.source = linked(cell.source, names)
        if cell.cell_type == "code" and "repository = " in cell.source:
            cell.metadata["tags"] = ["hide-cell"]  # the installation on a hosted Jupyter
        pictures = [o.get("metadata", {}).get("image/png", {}) for o in cell.get("outputs", [])]
        alt = " ".join(picture["alt"] for picture in pictures if picture.get("alt"))
        if alt:
            cell.metadata["mystnb"] = {"image": {"alt": alt}}
    return notebook


def linked(text: str, names: list[str]) -> str:
    """Text in which every notebook's name leads to its page, and every file to its copy."""
    text = text.replace("](../notebooks/", "](").replace("](../benchmarks/", "](benchmarks/")
    known = "|".join(map(re.escape, names))
    return re.sub(rf"(?<!\[)`({known})`", r"[\1](\1.ipynb)", text)


def times(paths: list[Path]) -> str:
    """A table of what the notebooks state and what their stored run took."""
    from refiner.base.places import clock
    from refiner.course.execute import reading_minutes
    from refiner.course.exercises import find_exercises

    rows = [
        "| Notebook | reading | stated | measured | processor | memory | exercises |",
        "|---|---|---|---|---|---|---|",
    ]
    for path in paths:
        notebook = nbformat.read(path, as_version=4)
        facts = notebook.metadata.get("refiner", {})
        run = facts.get("measured", {})
        spent = [clock(run[k]) if run.get(k) else "–" for k in ("seconds", "processor_seconds")]
        memory = f"{run['peak_memory_mb']} MiB" if run.get("peak_memory_mb") else "–"
        minutes = sum(e.minutes for e in find_exercises(notebook, path.stem))
        stated = clock(60 * facts["minutes_cpu"])
        reading = f"{reading_minutes(notebook):.0f} minutes"
        row = [f"`{path.stem}`", reading, stated, *spent, memory, f"{minutes} minutes"]
        rows.append("| " + " | ".join(row) + " |")
    return "\n".join(rows)


if __name__ == "__main__":
    sys.exit(main())
