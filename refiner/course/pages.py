"""Pages of a course run that open without a network: an index with figures, and each notebook."""

from __future__ import annotations

import json
import re
from html import escape
from pathlib import Path

from refiner.base.files import write_text
from refiner.base.pages import STYLE, figure_html

# nbconvert's page loads scripts for formulas, diagrams and old widgets from the network. Without
# them formulas stay as they were typed; JupyterLab shows them set. Its pictures have no alt text.
_OFFLINE_PAGE = """{%- extends 'lab/index.html.j2' -%}
{%- block html_head_js -%}{%- endblock -%}
{%- block html_head_js_mathjax -%}{%- endblock -%}
{%- block html_head_js_mermaidjs -%}{%- endblock -%}
{%- block data_png -%}
<div class="jp-RenderedImage jp-OutputArea-output" tabindex="0">
<img src="data:image/png;base64,{{ output.data['image/png'] | escape_html }}"
{%- set alt = output | get_metadata('alt', 'image/png') %}{% if alt %} alt="{{ alt | escape_html }}"
{%- endif %}></div>
{%- endblock -%}
"""


def write_page(path: Path, notebook, *, title: str, folder: Path) -> None:
    """Writes an executed notebook as one HTML file with everything in it.

    Args:
        path: the file to write.
        notebook: the executed notebook.
        title: the page's title.
        folder: where relative pictures in the text are found.
    """
    from jinja2 import DictLoader
    from nbconvert import HTMLExporter

    exporter = HTMLExporter(
        extra_loaders=[DictLoader({"offline.html.j2": _OFFLINE_PAGE})],
        template_file="offline.html.j2",
        embed_images=True,
    )
    resources = {"metadata": {"name": title, "path": str(folder)}}
    html, _ = exporter.from_notebook_node(notebook, resources=resources)
    write_text(path, html)


def write_index(out: Path, summary: dict) -> None:
    """Writes ``index.html``: a table of the notebooks, then what each measured and drew."""
    entries = summary["notebooks"]
    machine = ", ".join(f"{key} {value}" for key, value in summary["machine"].items())
    rows = "\n".join(_row(name, entry) for name, entry in entries.items())
    sections = "\n".join(_section(out, name, entry) for name, entry in entries.items())
    write_text(
        out / "index.html",
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>MIM-Refiner Lab: the course</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>MIM-Refiner Lab: the course</h1><p>{escape(machine)}</p>
<table><thead><tr><th>Notebook</th><th>Question</th><th>Status</th><th class="number">Seconds</th>
<th>Key figures</th></tr></thead><tbody>
{rows}
</tbody></table>
{sections}
</body></html>
""",
    )


def key_figures(metrics: dict[str, object], *, limit: int | None = 3) -> str:
    """The first few recorded values in one line: ``knn 0.353, by_block 0.08 → 0.35``."""
    shown = list(metrics.items())[:limit]
    return ", ".join(f"{name} {_short(value)}" for name, value in shown)


def _short(value: object) -> str:
    if isinstance(value, list):
        ends = value if len(value) <= 2 else [value[0], value[-1]]
        return " → ".join(map(_short, ends)) if ends else "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


def _row(name: str, entry: dict) -> str:
    return (
        f'<tr><td><a href="#{escape(name)}">{escape(name)}</a></td><td>{escape(entry["title"])}'
        f'</td><td class="{entry["status"]}">{entry["status"]}</td>'
        f'<td class="number">{entry["seconds"]:.0f}</td>'
        f"<td>{escape(key_figures(entry['metrics']))}</td></tr>"
    )


def _section(out: Path, name: str, entry: dict) -> str:
    facts = [f"preset {entry['preset']}"]
    if entry["peak_memory_mb"]:
        facts.append(f"at most {entry['peak_memory_mb']} MiB of memory")
    problems = "".join(f'<li class="failed">{escape(text)}</li>' for text in entry["problems"])
    metrics = "".join(
        f'<tr><td>{escape(key)}</td><td class="number">{escape(_short(value))}</td></tr>'
        for key, value in entry["metrics"].items()
    )
    return f"""<h2 id="{escape(name)}">{escape(name)}: {escape(entry["title"])}</h2>
<p><a href="{escape(name)}.html">the whole notebook</a>,
<a href="{escape(name)}.ipynb">as .ipynb</a>; {escape(", ".join(facts))}</p>
<ul>{problems}</ul><table>{metrics}</table>
{"".join(_figures(out / f"{name}.ipynb"))}"""


def _figures(path: Path) -> list[str]:
    """Every picture among the outputs, under the heading it appeared below."""
    notebook = json.loads(path.read_text(encoding="utf-8"))
    heading, figures = "", []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            found = re.findall(r"^#+\s+(.+)$", "".join(cell["source"]), re.MULTILINE)
            heading = found[-1].strip() if found else heading
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                told = output.get("metadata", {}).get("image/png", {}).get("alt", heading)
                figures.append(figure_html("".join(png), heading, told))
    return figures
