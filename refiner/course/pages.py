"""Pages of a course run that open without a network: an index with figures, and each notebook."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NotRequired, TypedDict

from refiner.base import pages
from refiner.base.files import read_json, write_text

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


_INDEX = """
<p>{{ facts(machine) }}</p>
<table><thead><tr><th>Notebook</th><th>Question</th><th>Status</th><th class="number">Seconds</th>
<th>Key figures</th></tr></thead><tbody>
{% for name, entry in notebooks.items() %}
<tr><td><a href="#{{ name }}">{{ name }}</a></td><td>{{ entry.title }}</td>
<td class="{{ entry.status }}">{{ entry.status }}</td>
<td class="number">{{ "%.0f" % entry.seconds }}</td><td>{{ key_figures(entry.metrics) }}</td></tr>
{% endfor %}
</tbody></table>
{% for name, entry in notebooks.items() %}
<h2 id="{{ name }}">{{ name }}: {{ entry.title }}</h2>
<p><a href="{{ name | urlencode }}.html">the whole notebook</a>,
<a href="{{ name | urlencode }}.ipynb">as .ipynb</a>; preset {{ entry.preset }}
{%- set memory = entry.get("peak_memory_mb") %}
{%- if memory %}, at most {{ memory }} MiB of memory{% endif %}</p>
<ul>{% for text in entry.problems %}<li class="failed">{{ text }}</li>{% endfor %}</ul>
<table>{% for key, value in entry.metrics.items() %}
<tr><td>{{ key }}</td><td class="number">{{ short(value) }}</td></tr>
{% endfor %}</table>
{% for png, caption, alt in figures[name] %}{{ figure(png, caption, alt) }}{% endfor %}
{% endfor %}
"""


def write_index(out: Path, summary: dict) -> None:
    """Writes ``index.html``: a table of the notebooks, then what each measured and drew."""
    figures = {name: _figures(out / f"{name}.ipynb") for name in summary["notebooks"]}
    values = {"figures": figures, "key_figures": key_figures, "short": _short}
    title = "MIM-Refiner Lab: the course"
    pages.write_page(out / "index.html", _INDEX, title, **summary, **values)


def key_figures(metrics: dict[str, object], *, limit: int | None = 3) -> str:
    """The first few recorded values in one line: ``knn 0.353, by_block 0.08 → 0.35``."""
    shown = list(metrics.items())[:limit]
    return ", ".join(f"{name} {_short(value)}" for name, value in shown)


def _short(value: object) -> str:
    if isinstance(value, list):
        ends = value if len(value) <= 2 else [value[0], value[-1]]
        return " → ".join(map(_short, ends)) if ends else "none"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Cell(TypedDict):
    """A notebook's cell, as far as pictures are looked for."""

    cell_type: str
    source: str | list[str]
    outputs: NotRequired[list[dict[str, object]]]


class Notebook(TypedDict):
    """A notebook's cells."""

    cells: list[Cell]


def _figures(path: Path) -> list[tuple[str, str, str]]:
    """Every picture among the outputs, the heading it appeared below, and what it shows."""
    notebook = read_json(path, Notebook)
    heading, figures = "", []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "markdown":
            found = re.findall(r"^#+\s+(.+)$", "".join(cell["source"]), re.MULTILINE)
            heading = found[-1].strip() if found else heading
        for output in cell.get("outputs", []):
            png = output.get("data", {}).get("image/png")
            if png:
                told = output.get("metadata", {}).get("image/png", {}).get("alt", heading)
                figures.append(("".join(png).strip(), heading, told))
    return figures
