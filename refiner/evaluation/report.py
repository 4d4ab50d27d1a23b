"""The page of ``refiner evaluate``: what changed, in tables, figures and plain sentences."""

from __future__ import annotations

import math
from collections.abc import Iterator
from html import escape
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.ticker import PercentFormatter

from refiner.base.files import write_text
from refiner.base.pages import STYLE
from refiner.evaluation.probe import NAMES
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
            entries.append(
                {
                    "row": row,
                    "name": a["name"],
                    "before": a,
                    "after": b,
                    "difference": difference,
                    "spread": spread,
                    "verdict": verdict,
                }
            )
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
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(11.5, 4.4), layout="constrained", width_ratios=(1, 1.25)
    )
    for i, (side, entry) in enumerate(report["rows"]["corruptions"].items()):
        detail = entry["scores"][0]["detail"]
        table, look = np.array(detail["accuracy"]), plots.curve_style(i)
        severity = [0, *detail["severities"]]
        left.plot(
            severity, [detail["clean"], *table.mean(0)], label=plain(_label(report, side)), **look
        )
        right.plot(
            table.mean(1),
            range(len(table)),
            **look | {"linestyle": ""},
            label=plain(_label(report, side)),
        )
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
        f"Of {len(entries)} figures {counts['better']} are better, {counts['worse']} worse, and "
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


# ---------------------------------------------------------------- tables


def table(report: dict) -> str:
    """HTML: a line for each figure, grouped by row."""
    sides = list(report["models"])
    heads = "".join(f'<th class="number">{side}</th>' for side in sides)
    if len(sides) == 2:
        heads += '<th class="number">difference</th><th></th>'
    body = []
    for row, found in report["rows"].items():
        body.append(
            f'<tr><th colspan="{2 + 2 * len(sides)}">{escape(_title(report, row))}</th></tr>'
        )
        changes = {e["name"]: e for e in comparison({**report, "rows": {row: found}})}
        first = next(iter(found.values()))["scores"]
        for name in (x["name"] for x in first):
            body.append(_line(name, found, sides, changes.get(name)))
    return (
        f"<table><thead><tr><th>Figure, %</th>{heads}<th>spread over</th></tr></thead>"
        f"<tbody>{''.join(body)}</tbody></table>"
    )


def _line(name: str, found: dict, sides: list[str], change: dict | None) -> str:
    cells, of = [], ""
    for side in sides:
        entry = next(
            (x for x in found.get(side, {"scores": []})["scores"] if x["name"] == name), None
        )
        text = "–"
        if entry:
            text = f"{100 * entry['value']:.1f} <small>± {100 * entry['spread']:.1f}</small>"
            of = entry["of"]
        cells.append(f'<td class="number">{text}</td>')
    if len(sides) == 2:
        text, word = "–", ""
        if change:
            text, word = f"{100 * change['difference']:+.1f}", MARKS[change["verdict"]]
        style = {"▲": "ok", "▼": "failed"}.get(word[:1], "")
        cells.append(f'<td class="number">{text}</td><td class="{style}">{word}</td>')
    return f"<tr><td>{escape(name)}</td>{''.join(cells)}<td>{of}</td></tr>"


def _choices(report: dict) -> str:
    """What was chosen on held-out train images."""
    lines = []
    for row, sides in report["rows"].items():
        if row == "corruptions":
            continue
        for side, entry in sides.items():
            for x in entry["scores"]:
                if "choice" in x and len(x["choice"]) > 1:
                    told = ", ".join(
                        f"{k.replace('_', ' ')} {_short(v)}" for k, v in x["choice"].items()
                    )
                    lines.append(f"<li>{escape(_title(report, row))}, {side}: {escape(told)}</li>")
    return f"<ul>{''.join(lines)}</ul>" if lines else ""


def _short(value) -> str:
    if isinstance(value, list):
        return " + ".join(NAMES.get(v, str(v)) for v in value)
    return f"{value:.3g}" if isinstance(value, float) else NAMES.get(value, str(value))


def _problems(report: dict) -> str:
    lines = []
    for row, sides in report["failed"].items():
        for side, reason in sides.items():
            where = escape(f"{_title(report, row)}, {side}: {reason}")
            lines.append(f'<li class="failed">{where}</li>')
    for row, reason in report["left_out"].items():
        lines.append(f"<li>{escape(f'{_title(report, row)}: {reason}')}</li>")
    return f"<h2>Not measured</h2><ul>{''.join(lines)}</ul>" if lines else ""


# ---------------------------------------------------------------- the page


def write_page(out: Path, report: dict) -> None:
    """Writes ``figures/*.png`` and ``index.html`` with all of them inside."""
    shown = save_figures(out, lambda: figures(report))
    title = " and ".join(escape(Path(name).name) for name in report["models"].values())
    images = report["images"]
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    seconds = sum(e["seconds"] for sides in report["rows"].values() for e in sides.values())
    said = "".join(f"<li>{escape(text)}</li>" for text in findings(report))
    write_text(
        out / "index.html",
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {title}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>Evaluation of {title}</h1>
<p>{escape(report["data"])}: {images["train"]} train and {images["test"]} test images,
{images["classes"]} classes. {escape(facts)}; {seconds / 60:.1f} minutes. All numbers:
<a href="report.json">report.json</a>.</p>
<ul>{said}</ul>
{_problems(report)}
{"".join(shown[:1])}
<h2>Every figure</h2>
{table(report)}
<p>k-NN: k = 10. Few labels: a linear classifier. Shifted factors: Toybox images whose factors lie
outside of what the train images show. Segmentation: a linear classifier on patch features.
Spread: one standard deviation over what the last column names; of test images, the standard
error. “Better” and “worse” need a difference of more than two spreads, the models' spreads taken as
independent. With that many figures one or two cross that line by chance.</p>
{"".join(shown[1:])}
<h2>What was chosen</h2>
<p>Blocks, poolings and penalties were chosen on held-out train images; no test label was used.</p>
{_choices(report)}
</body></html>
""",
    )
