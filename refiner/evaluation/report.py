"""The page of ``refiner evaluate``: what changed, in tables, figures and plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from refiner.base import pages
from refiner.probing.features import NAMES
from refiner.visuals import plots
from refiner.visuals.style import plain, save_figures

# ---------------------------------------------------------------- before and after


def comparison(report: dict) -> list[dict]:
    """One entry a figure that both models have: what changed, and whether that is more than spread.

    Returns:
        Dicts with "row", "name", "before", "after" (the scores), "difference", "spread" (of the
        difference, as if both were independent) and "verdict": "better" or "worse" where the
        difference is more than twice its spread, else "unclear".
    """
    entries = []
    for row, sides in report["rows"].items():
        if not {"before", "after"} <= set(sides):
            continue
        after = {x["name"]: x for x in sides["after"]["scores"]}
        for a in sides["before"]["scores"]:
            b = after.get(a["name"])
            if b is None:
                continue
            difference, spread = b["value"] - a["value"], math.hypot(a["spread"], b["spread"])
            clear = abs(difference) > 2 * spread
            verdict = ("better" if difference > 0 else "worse") if clear else "unclear"
            entry = {"row": row, "name": a["name"], "before": a, "after": b}
            entries.append(entry | dict(difference=difference, spread=spread, verdict=verdict))
    return entries


WORDS = {"better": "better", "worse": "worse", "unclear": "within twice the spread"}
MARKS = {"better": "▲ better", "worse": "▼ worse", "unclear": "unclear"}
# What the paper reports, for the two places where it does not promise a gain.
EXPECTED = {
    "finetune": "In the paper full fine-tuning barely moves (MAE L/16: 85.7 → 85.6).",
    "segmentation": "Heads that read the class token could have cost the patches; that is why this "
    "is measured.",
}


# ---------------------------------------------------------------- figures


def figures(report: dict) -> Iterator[tuple[str, str, plt.Figure]]:
    """The report's figures: file name, caption, figure."""
    spokes = spokes_of(report)
    if len(spokes) >= 3:
        sides = list(report["models"])
        values = {_label(report, side): [s[side] for s in spokes.values()] for side in sides}
        ax = plots.spider(values, list(spokes))
        yield "spider", "One figure of every row; compare the outlines on a spoke only", ax.figure
    entries = comparison(report)
    if entries:
        names = [f"{_title(report, e['row'])}: {e['name']}" for e in entries]
        numbers = ([e[key] for e in entries] for key in ("difference", "spread"))
        ax = plots.differences(names, *numbers, title="What changed")
        yield "differences", "After − before; bars: two spreads; filled: more than that", ax.figure
    if "corruptions" in report["rows"]:
        yield "corruptions", "The chosen linear probe on corrupted images", _corruptions(report)


def spokes_of(report: dict) -> dict[str, dict[str, float]]:
    """Each row's main figure of every model, by the spoke's label."""
    found = {}
    for name, sides in report["rows"].items():
        if set(sides) < set(report["models"]):
            continue
        mains = {
            side: next((s["value"] for s in entry["scores"] if s.get("main")), None)
            for side, entry in sides.items()
        }
        if None not in mains.values():
            found[report["titles"].get(name, ("", name))[1]] = mains
    return found


def _corruptions(report: dict) -> plt.Figure:
    """Mean over corruptions by severity, and mean over severities by corruption."""
    how = {"figsize": (11.5, 4.4), "layout": "constrained", "width_ratios": (1, 1.25)}
    fig, (left, right) = plt.subplots(1, 2, **how)
    for i, (side, entry) in enumerate(report["rows"]["corruptions"].items()):
        detail = entry["scores"][0]["detail"]
        table, look = np.array(detail["accuracy"]), plots.curve_style(i)
        severity = [0, *detail["severities"]]
        look["label"] = plain(_label(report, side))
        left.plot(severity, [detail["clean"], *table.mean(0)], **look)
        right.plot(table.mean(1), range(len(table)), **look | {"linestyle": ""})
    left.set(xlabel="severity, 0 = clean", ylabel="accuracy", title="Mean of all corruptions")
    left.set_xticks(severity)
    left.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    left.legend()
    names = [name.replace("_", " ") for name in detail["corruptions"]]
    right.set_yticks(range(len(names)), names)
    right.invert_yaxis()
    right.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    right.set(xlabel="accuracy, mean of all severities", title="Each corruption")
    return fig


# ---------------------------------------------------------------- sentences


def findings(report: dict) -> list[str]:
    """What the comparison shows, one sentence each; empty for a single model."""
    entries = comparison(report)
    if not entries:
        return []
    counts = {v: sum(e["verdict"] == v for e in entries) for v in MARKS}
    said = [
        f"Of {len(entries)} scores {counts['better']} are better, {counts['worse']} worse, and "
        f"{counts['unclear']} moved by no more than twice their spread."
    ]
    most = max(entries, key=lambda e: e["difference"])
    if most["verdict"] == "better":
        said.append(f"The largest gain: {_moved(report, most)}.")
    least = min(entries, key=lambda e: e["difference"])
    if least["verdict"] == "worse":
        said.append(f"The largest loss: {_moved(report, least)}.")
    for row, expected in EXPECTED.items():
        own = [e for e in entries if e["row"] == row and e["before"].get("main")]
        said += [f"{_moved(report, e)}: {WORDS[e['verdict']]}. {expected}" for e in own]
    return said


def _moved(report: dict, entry: dict) -> str:
    """``Linear probe, chosen probe: 96.9 → 97.5 (+0.6 ± 0.7)``."""
    before, after = (100 * entry[side]["value"] for side in ("before", "after"))
    change, spread = 100 * entry["difference"], 100 * entry["spread"]
    title = _title(report, entry["row"])
    return f"{title}, {entry['name']}: {before:.1f} → {after:.1f} ({change:+.1f} ± {spread:.1f})"


def _title(report: dict, row: str) -> str:
    return report["titles"].get(row, (row, ""))[0]


def _label(report: dict, side: str) -> str:
    return f"{side}: {Path(report['models'][side]).name}"


# ---------------------------------------------------------------- the page

_PAGE = """
<p>{{ measured(report) }} The run took {{ "%.1f" % (seconds / 60) }} minutes.</p>
<ul>{% for text in said %}<li>{{ text }}</li>{% endfor %}</ul>
{% if report.failed or report.left_out %}
<h2>Not measured</h2><ul>
{% for row, sides in report.failed.items() %}{% for side, reason in sides.items() %}
<li class="failed">{{ title_of(row) }}, {{ side }}: {{ reason }}</li>
{% endfor %}{% endfor %}
{% for row, reason in report.left_out.items() %}
<li>{{ title_of(row) }}: {{ reason }}</li>
{% endfor %}
</ul>
{% endif %}
{{ shown[:1] | join }}
<h2>Every figure</h2>
<table><thead><tr><th>Figure, %</th>
{% for side in report.models %}<th class="number">{{ side }}</th>{% endfor %}
{% if report.models | length == 2 %}<th class="number">difference</th><th></th>{% endif %}
<th>spread over</th></tr></thead><tbody>
{% for row, lines in table.items() %}
<tr><th colspan="{{ 2 + 2 * report.models | length }}">{{ title_of(row) }}</th></tr>
{% for line in lines %}
<tr><td>{{ line.name }}</td>
{%- for cell in line.cells %}
<td class="number">{% if cell %}{{ cell[0] }} <small>± {{ cell[1] }}</small>{% else %}–{% endif %}
</td>{% endfor %}
{% if report.models | length == 2 %}
<td class="number">{{ line.change }}</td><td class="{{ line.look }}">{{ line.mark }}</td>
{%- endif %}
<td>{{ line.of }}</td></tr>
{% endfor %}{% endfor %}
</tbody></table>
<p>k-NN: k = 10. Few labels: a linear classifier. Shifted factors: Toybox images whose factors lie
outside of what the train images show. Segmentation: a linear classifier on patch features.
Spread: one standard deviation over what the last column names; of test images, the standard
error. “Better” and “worse” need a difference of more than two spreads, the models' spreads taken as
independent. With that many scores one or two cross that line by chance.</p>
{{ shown[1:] | join }}
<h2>What was chosen</h2>
<p>Blocks, poolings and penalties were chosen on held-out train images; no test label was used.</p>
<ul>{% for text in choices %}<li>{{ text }}</li>{% endfor %}</ul>
"""


def write_page(out: Path, report: dict) -> None:
    """Writes ``figures/*.png`` and ``index.html`` with all of them inside."""
    pages.write_page(
        out / "index.html",
        _PAGE,
        f"Evaluation of {' and '.join(Path(name).name for name in report['models'].values())}",
        report=report,
        seconds=sum(e["seconds"] for sides in report["rows"].values() for e in sides.values()),
        said=findings(report),
        title_of=lambda row: _title(report, row),
        table={row: _lines(report, row) for row in report["rows"]},
        choices=_choices(report),
        shown=list(save_figures(out, lambda: figures(report)).values()),
    )


def _lines(report: dict, row: str) -> list[dict]:
    """A row's scores as texts: each model's with its spread, and what changed."""
    found, lines = report["rows"][row], []
    changes = {e["name"]: e for e in comparison({**report, "rows": {row: found}})}
    for name in (x["name"] for x in next(iter(found.values()))["scores"]):
        line = {"name": name, "cells": [], "of": "", "change": "–", "mark": "", "look": ""}
        for side in report["models"]:
            scores = {x["name"]: x for x in found.get(side, {"scores": []})["scores"]}
            if x := scores.get(name):
                line["of"] = x["of"]
                x = f"{100 * x['value']:.1f}", f"{100 * x['spread']:.1f}"
            line["cells"].append(x)
        if change := changes.get(name):
            verdict = change["verdict"]
            line["change"], line["mark"] = f"{100 * change['difference']:+.1f}", MARKS[verdict]
            line["look"] = {"better": "ok", "worse": "failed"}.get(verdict, "")
        lines.append(line)
    return lines


def _choices(report: dict) -> list[str]:
    """What was chosen on held-out train images."""
    lines = []
    for row in (row for row in report["rows"] if row != "corruptions"):
        for side, entry in report["rows"][row].items():
            for choice in (x["choice"] for x in entry["scores"] if len(x.get("choice", ())) > 1):
                told = ", ".join(f"{k.replace('_', ' ')} {_short(v)}" for k, v in choice.items())
                lines.append(f"{_title(report, row)}, {side}: {told}")
    return lines


def _short(value) -> str:
    if isinstance(value, list):
        return " + ".join(NAMES.get(v, str(v)) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else NAMES.get(value, str(value))
