"""The HTML reports' one page maker, and what else they share. Whatever a page is given is escaped.

A report writes the ``body`` of a page as a jinja2 template; the frame and the macros are here.
"""

from __future__ import annotations

import math
from pathlib import Path

from jinja2 import DictLoader, Environment, StrictUndefined
from torch import Tensor

from refiner.base.errors import UserError
from refiner.base.files import read_json, write_text
from refiner.base.places import machine

BAR = "{desc}: {percentage:3.0f}%|{bar}| {elapsed}<{remaining}"

_FRAME = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>{{ title }}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem;
       color: #1c2733; background: #fff; overflow-wrap: anywhere }
table { border-collapse: collapse; width: 100%; overflow-wrap: break-word }
th, td { text-align: left; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid #8884;
         vertical-align: top }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums }
.ok { color: #12703d } .failed { color: #b3261e; font-weight: 600 }
.answer { font-size: 1.25rem } a { color: #0b62a8 }
pre { background: #8882; padding: .6rem .8rem; white-space: pre-wrap }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 600; padding: .35rem 0 }
.figures { display: grid; gap: 1rem;
           grid-template-columns: repeat(auto-fit, minmax(min(100%, 27rem), 1fr)) }
figure { display: inline-block; margin: .5rem 1rem .5rem 0; max-width: 100%; vertical-align: top }
.figures figure { margin: 0 }
figure img { max-width: 100%; height: auto } figcaption { color: #52606d; font-size: .85rem }
@media (prefers-color-scheme: dark) {
  body { color: #dfe5ec; background: #14191f } figcaption { color: #a3afbc } a { color: #7ab8f5 }
  .ok { color: #6fcf97 } .failed { color: #ff8a80 } }
@media (max-width: 40rem) { body { margin: 1rem auto } table { font-size: .85rem }
  table { display: block; overflow-x: auto } th, td { padding-right: .4rem } }
@media print { body { max-width: none; margin: 0 } figure, tr { break-inside: avoid }
  details::details-content { content-visibility: visible; height: auto } }
</style></head>
<body><h1>{{ title }}</h1>
{% block body %}{% endblock %}
</body></html>
"""
_MACROS = """
{%- macro figure(png, caption, alt) -%}
<figure><img alt="{{ alt }}" src="data:image/png;base64,{{ png }}">
<figcaption>{{ caption }}</figcaption></figure>
{%- endmacro %}
{%- macro facts(of) -%}
{% for key, value in of.items() if value is not none -%}
{{ key }} {{ value }}{{ ", " if not loop.last }}
{%- endfor %}
{%- endmacro %}
{%- macro measured(report) -%}
{{ report.data }}: {{ report.images.train }} train and {{ report.images.test }} test images,
{{ report.images.classes }} classes. {{ facts(report.machine) }}. All numbers:
<a href="report.json">report.json</a>.
{%- endmacro %}
"""
_MAKER = Environment(
    loader=DictLoader({"frame": _FRAME, "macros": _MACROS}),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(body: str, title: str, **values) -> str:
    """A whole page.

    Args:
        body: a jinja2 template, which may use the macros ``figure``, ``facts`` and ``measured``.
        title: of the page and its heading.
        values: what the template names.
    """
    page = "{% extends 'frame' %}{% from 'macros' import figure, facts, measured %}"
    page = f"{page}{{% block body %}}{body}{{% endblock %}}"
    return _MAKER.from_string(page).render(title=title, **values)


def write_page(path: Path, body: str, title: str, **values) -> None:
    """Writes :func:`render`'s page atomically."""
    write_text(path, render(body, title, **values))


def figure_html(png: str, caption: str, alt: str) -> str:
    """A figure of a report, for templates: they do not escape it a second time."""
    return _MAKER.get_template("macros").module.figure(png.strip(), caption, alt)


def begin(out: Path, asked: dict, resume: bool, kind: type, **empty) -> dict:
    """What an interrupted run left in ``report.json``, or an empty report.

    Args:
        out: the report's folder.
        asked: the options that an earlier run must share.
        resume: whether to go on with what is there.
        kind: a TypedDict: what it has to hold then.
        empty: the parts of an empty report.

    Raises:
        UserError: when the earlier run had other options, or its report is damaged.
    """
    path = out / "report.json"
    if not (resume and path.exists()):
        return asked | {"machine": machine()} | empty
    report = read_json(path, kind)
    changed = [key for key, value in asked.items() if report.get(key) != value]
    if changed:
        raise UserError(
            f"cannot resume {out}: {', '.join(changed)} differ from the earlier run; use the same "
            "options, or another --out"
        )
    return report


def json_ready(value):
    """Tensors and tuples as JSON's lists, NaN as null, numbers to five digits."""
    if isinstance(value, dict):
        return {key: json_ready(v) for key, v in value.items()}
    if isinstance(value, Tensor):
        return json_ready(value.tolist())
    if isinstance(value, list | tuple):
        return [json_ready(v) for v in value]
    if isinstance(value, float):
        return float(f"{value:.5g}") if math.isfinite(value) else None
    return value
