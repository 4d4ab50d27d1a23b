"""``refiner probe``: everything that is known about a model's blocks, as JSON, figures and a page.

The parts are those of :mod:`refiner.probing.neighbors`, :mod:`refiner.probing.probes` and
:mod:`refiner.probing.measures`. Each is written down as soon as it is done, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import base64
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal, NotRequired, TypedDict, get_args

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base import pages
from refiner.base.errors import TooFew, UserError
from refiner.base.files import fitting, one_run_a_folder, write_json
from refiner.base.pages import BAR, begin, json_ready
from refiner.base.parallel import check_device
from refiner.base.settings import Count, Entries, Portion, Whole, checked
from refiner.base.tensors import sides
from refiner.evaluation import advice
from refiner.evaluation.benchmark_row import benchmark_row, write_rows
from refiner.images.channels import fit_channels
from refiner.images.load import check_source, train_and_test
from refiner.images.sets import ImageSet
from refiner.models.encoders import channels_of
from refiner.models.load import load_model
from refiner.probing import clusters, measures, neighbors, probes
from refiner.probing.attentive import attentive_probe
from refiner.probing.choosing import OBJECTIVES
from refiner.probing.features import NAMES, extract
from refiner.visuals import plots
from refiner.visuals.style import save_figures

# What a part costs, roughly, so that the bar's estimate of the time that is left means something.
COST = dict(features=30, reading=20, knn=5, linear=20, low_shot=15, clustering=15, measures=10)
COST |= dict(factors=10, attentive=600)
Part = Literal[
    "reading", "knn", "linear", "low_shot", "clustering", "measures", "factors", "attentive"
]
PARTS = get_args(Part)[:-1]  # attentive probes take minutes: only if they are asked for


@dataclass(frozen=True)
class Settings:
    """What :func:`probe` measures; see there."""

    parts: Annotated[tuple[Part, ...], Entries(1)] = PARTS
    by: Literal[tuple(OBJECTIVES)] = "knn"
    k: Annotated[tuple[Count, ...], Entries(1)] = (1, 10, 20)
    shots: tuple[Count, ...] = (1, 2, 5, 10)
    fractions: tuple[Portion, ...] = ()
    draws: Count = 10
    seed: Whole = 0


Numbers = dict[str, dict[str, object]]  # by part


class Found(TypedDict):
    """What a report holds of a model."""

    origin: str
    done: list[str]
    blocks: NotRequired[list[int]]
    reading: NotRequired[dict[str, object]]
    attentive: NotRequired[dict[str, object]]
    cls: NotRequired[Numbers]
    patch: NotRequired[Numbers]
    registers: NotRequired[Numbers]
    final: NotRequired[Numbers]


class Report(TypedDict):
    """What the ``report.json`` holds that a run goes on from."""

    machine: dict[str, object]
    models: dict[str, Found]


@dataclass(frozen=True, eq=False)
class _Sides:
    """One pooling's features with their images: x, y of train and z, t of test."""

    x: Tensor
    train: ImageSet
    z: Tensor
    test: ImageSet
    settings: Settings
    device: torch.device | None

    @property
    def data(self) -> tuple:
        return self.x, self.train.labels, self.z, self.test.labels


# ---------------------------------------------------------------- running


@one_run_a_folder
def probe(
    models: str | Sequence[str],
    data: str | Path = "toybox",
    out: str | Path = "runs/probe",
    *,
    n: int | None = None,
    n_test: int | None = None,
    minutes: float | None = None,
    settings: Settings | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict:
    """Probes every block of one or several models and writes a report that opens without a network.

    Args:
        models: names or folders, as :func:`refiner.load_model` takes them.
        data: an image set or a folder. A folder without a test (or val) part that has labels if
            the train part has them lends a fifth of each class's train images. Without labels only
            the measures without labels are taken, without factors no factor probes.
        out: gets ``report.json``, ``figures/*.png`` and ``index.html``; with attentive probes
            ``benchmark.csv``, a row a model (:func:`refiner.benchmark_row`).
        n, n_test: only so many train and test images; default all.
        minutes: about as long as it may take for each model: as many images as the model reads in
            half of it, 6,000 at most, and only the reading, unless the settings say otherwise.
        settings: parts and their options, a :class:`Settings`.
        resume: keep the parts that are in ``out`` already, from the same data and settings.
        device: where to run; default CUDA if there is one.
        progress: show a bar with the remaining time.

    Returns:
        The content of ``report.json``: ``models`` → name → "cls" / "patch" / "final" → part →
        numbers, lists over blocks; ``models`` → name → "reading" is which reading to use, and
        ``sentence`` in it says so. What the data do not allow is listed in ``left_out``.

    Raises:
        ValueError: for unknown parts, the same model twice, or data that do not load.
        FileNotFoundError: for a model or image set that is not there.
    """
    settings = checked(settings or settings_for(minutes))
    if minutes is not None and (n or n_test or resume or not 0 < minutes < math.inf):
        raise UserError(
            "minutes, above 0, choose the images: give them without n, n_test and resume"
        )
    names = [str(m) for m in ([models] if isinstance(models, str | Path) else models)]
    check_source(data)
    check_device(device)
    if not names or len(set(names)) < len(names):
        raise UserError(f"give each model once, not {names}")
    out = Path(out)
    asked = {"data": str(data), "n": n, "n_test": n_test, "settings": json_ready(asdict(settings))}
    report = begin(out, asked, resume, Report, models={})
    loaded = {name: load_model(name) for name in names}  # a wrong name is told before the work
    total = len(names) * (COST["features"] + sum(COST[part] for part in settings.parts))
    by_form: dict[tuple, tuple[ImageSet, ImageSet]] = {}  # models of one size share the images
    with tqdm(total=total, desc="probing", unit="", disable=not progress, bar_format=BAR) as bar:
        for name, model in loaded.items():
            size = model.refiner_card["preprocessing"]["size"]
            form = size, channels_of(model)
            if form not in by_form:
                if minutes is None:
                    by_form[form] = train_and_test(data, n, n_test, *form)
                else:
                    by_form[form] = at_most(data, *in_minutes(model, minutes, device), *form)
            train, test = by_form[form]
            model = fit_channels(model, train)
            counts = len(train), len(test), len(train.classes)
            report["images"] = dict(zip(("train", "test", "classes"), counts, strict=True))
            new = {"origin": model.refiner_card.get("origin", ""), "done": []}
            found = report["models"].setdefault(name, new)
            sets = train, test
            file = out / "readings" / f"{names.index(name) + 1}-{Path(name).name}.safetensors"
            lines = advice.code(name, str(data), size, str(file))
            for part in _probe_model(model, found, *sets, settings, device, bar, file):
                if part == "reading" and "sentence" in found[part]:
                    found[part]["code"] = lines
                    if progress and len(settings.parts) > 1:  # the rest takes minutes
                        bar.write(f"{name}: {found[part]['sentence']}", file=sys.stderr)
                write_json(out / "report.json", report)
    with fitting(out / "report.json", resume):
        report["left_out"] = _left_out(report)
        write_json(out / "report.json", report)
        write_page(out, report)
        found = [m.get("attentive", {}) for m in report["models"].values()]
        write_rows(out / "benchmark.csv", [told["row"] for told in found if "row" in told])
    return report


def settings_for(minutes: float | None, **given) -> Settings:
    """Settings of a run of some minutes, which only chooses the reading, or of a whole one."""
    return Settings(**({} if minutes is None else {"parts": ("reading",)}) | given)


def in_minutes(model, minutes: float, device) -> tuple[int, int]:
    """How many train and test images a model reads in half of some minutes, 3 to 1."""
    size = model.refiner_card["preprocessing"]["size"]
    some = torch.zeros(16, channels_of(model), *sides(size), dtype=torch.uint8)
    extract(model, some, device=device, progress=False)  # the first pass is slower
    began = time.monotonic()
    extract(model, some, device=device, progress=False)
    rate = len(some) / (time.monotonic() - began)
    total = min(6000, max(200, int(30 * minutes * rate)))
    return 3 * total // 4, total // 4


def at_most(data, n: int, n_test: int, size: int, channels: int) -> tuple[ImageSet, ImageSet]:
    """Train and test images, so many or all that there are of either."""
    limits = [n, n_test]
    while True:
        try:
            return train_and_test(data, *limits, size, channels)
        except TooFew as error:
            limits[limits.index(error.asked)] = None


def _probe_model(
    model, found: dict, train, test, settings: Settings, device, bar: tqdm, file: Path
) -> Iterator[str]:
    """Fills ``found`` with the parts that are missing, and yields each when it is done."""
    done = found["done"]
    missing = [p for p in settings.parts if p not in done and (p != "factors" or train.factors)]
    bar.update(sum(COST[part] for part in settings.parts if part not in missing))
    if missing:
        bar.set_description_str("features")
        keys, queries = (extract(model, x, device=device, progress=False) for x in (train, test))
        found["blocks"] = list(keys.blocks)
    bar.update(COST["features"])
    for part in missing:
        bar.set_description_str(part.replace("_", "-"))
        if part in _WHOLE:
            sides = keys, train, queries, test
            how = {"device": device, "progress": not bar.disable}
            found[part] = _or_left_out(_WHOLE[part], model, sides, settings, file, **how)
        for pooling in (p for p in NAMES if p in keys and part not in _WHOLE):
            if pooling in ("cls", "patch") or part in ("knn", "linear"):
                sides = _Sides(keys[pooling], train, queries[pooling], test, settings, device)
                found.setdefault(pooling, {})[part] = _tried(part, sides)
        done.append(part)
        yield part
        bar.update(COST[part])


def _reading(model, sides: tuple, settings: Settings, file: Path, *, device, **_) -> dict:
    """Which reading to use; it is saved, and without labels its neighbors are drawn."""
    how = {"by": settings.by, "seed": settings.seed, "device": device}
    found, reading = advice.advise(model, *sides, **how)
    reading.save(file)
    if "firsts" in found:
        name = f"neighbors_{file.stem}"
        save_figures(
            file.parent.parent, lambda: [(name, "", advice.neighbors(sides[3], sides[2], reading))]
        )
    return found | {"file": str(file)}


def _attentive(model, sides: tuple, settings: Settings, file: Path, **how) -> dict:
    """Every block's attentive probe, and the model's row for the public benchmark."""
    _, train, _, test = sides
    probe = attentive_probe(model, train, test, seed=settings.seed, **how)
    row = benchmark_row(model, train, test, attentive=probe, seed=settings.seed, **how)
    return {"accuracy": probe.accuracy, "rate": probe.rate, "row": row}


def _tried(part: str, sides: _Sides) -> dict:
    if part != "measures" and (sides.train.labels is None or sides.test.labels is None):
        return {"left_out": "the images have no labels"}
    return _or_left_out(_DO[part], sides)


def _or_left_out(measure: Callable, *args, **how) -> dict:
    """A part's numbers, or why the data do not allow it."""
    try:
        return json_ready(measure(*args, **how))
    except UserError as error:
        return {"left_out": str(error)}


# ---------------------------------------------------------------- the parts


def _knn(s: _Sides) -> dict:
    n = s.x.shape[-2]
    ks = [k for k in s.settings.k if k <= n]
    if not ks:
        raise UserError(f"{n} train images have fewer neighbors than k = {min(s.settings.k)}")
    accuracy = neighbors.knn_accuracy(*s.data, k=ks, device=s.device)
    return {"k": ks, "accuracy": accuracy}


def _linear(s: _Sides) -> dict:
    found = probes.linear_probe(*s.data, seed=s.settings.seed, device=s.device)
    return {name: getattr(found, name) for name in ("accuracy", "penalty", "gap")}


def _low_shot(s: _Sides) -> dict:
    options = {"fractions": s.settings.fractions, "draws": s.settings.draws}
    shots = probes.possible_shots(s.settings.shots, s.settings.fractions, s.train.labels)
    found = probes.low_shot(*s.data, shots=shots, **options, seed=s.settings.seed, device=s.device)
    return {name: getattr(found, name) for name in ("sizes", "images", "mean", "spread")}


def _clustering(s: _Sides) -> dict:
    return clusters.clustering(s.z, s.test.labels, seed=s.settings.seed, device=s.device)


def _measures(s: _Sides) -> dict:
    m = measures
    spread = m.rankme, m.participation_ratio, m.alpha_req, m.uniformity, m.collapse_std
    found = {f.__name__: f(s.z) for f in (*spread, m.intrinsic_dimension)}
    return found | {"cka": m.linear_cka(s.z)}


def _factors(s: _Sides) -> dict:
    known = [dict(images.factors) for images in (s.train, s.test)]
    constant = {name for f in known for name, values in f.items() if np.ptp(values) == 0}
    known = [{k: v for k, v in f.items() if k not in constant} for f in known]
    for factors, images in zip(known, (s.train, s.test), strict=True):
        factors["class"] = images.labels
    return probes.factor_probe(s.x, known[0], s.z, known[1], seed=s.settings.seed, device=s.device)


_DO = {"knn": _knn, "linear": _linear, "low_shot": _low_shot, "clustering": _clustering}
_DO |= {"measures": _measures, "factors": _factors}
_WHOLE = {"reading": _reading, "attentive": _attentive}  # told of a whole model, not of a pooling


def _left_out(report: dict) -> list[str]:
    """One sentence for each part that the data do not allow."""
    sentences = []
    for model, found in report["models"].items():
        whole = {part: found[part] for part in _WHOLE if "left_out" in found.get(part, ())}
        sentences += [f"{part} of {model}: {told['left_out']}" for part, told in whole.items()]
        for pooling in NAMES:
            for part, numbers in found.get(pooling, {}).items():
                if "left_out" in numbers:
                    sentences.append(f"{part} of {model}, {NAMES[pooling]}: {numbers['left_out']}")
    return sentences


# ---------------------------------------------------------------- figures


def _per_model(report: dict, pooling: str, part: str) -> dict[str, dict]:
    """Each model's numbers of a part, where there are any."""
    found = {name: m.get(pooling, {}).get(part) for name, m in report["models"].items()}
    return {name: part for name, part in found.items() if part and "left_out" not in part}


def figures(report: dict) -> Iterator[tuple[str, str, plt.Figure]]:
    """The report's figures: file name, caption, figure."""
    chance, k = 1 / max(1, report["images"]["classes"]), _main_k(report)
    for number, (name, found) in enumerate(_advised(report).items(), start=1):
        caption = f"{name}: every block and pooling, with the transform of the chosen one"
        yield f"reading_{number}", caption, advice.figure(name, found, chance)
    whole = {name: m.get("attentive", {}) for name, m in report["models"].items()}
    if curves := {name: p["accuracy"] for name, p in whole.items() if "accuracy" in p}:
        ax = plots.block_curve(curves, ylabel="attentive probe, accuracy", chance=chance)
        caption = "Attentive probe (EP): can the class be read from the patches?"
        yield "attentive", caption, ax.figure
    for pooling in ("cls", "patch"):
        where = NAMES[pooling]
        if found := _per_model(report, pooling, "knn"):
            curves = {name: p["accuracy"][p["k"].index(k)] for name, p in found.items()}
            ax = plots.block_curve(curves, ylabel=f"k-NN accuracy (k = {k})", chance=chance)
            caption = f"k-NN, {where}: are near images of the same class?"
            yield f"knn_{pooling}", caption, ax.figure
        if found := _per_model(report, pooling, "linear"):
            curves = {name: p["accuracy"] for name, p in found.items()}
            ax = plots.block_curve(curves, ylabel="linear probe, accuracy", chance=chance)
            yield f"linear_{pooling}", f"Linear probe, {where}: can the class be read?", ax.figure
        yield from _low_shot_figures(_per_model(report, pooling, "low_shot"), pooling, chance)
        yield from _other_figures(report, pooling)


def _advised(report: dict) -> dict[str, dict]:
    """What is said of each model's readings, where anything is."""
    found = {name: m.get("reading", {"left_out": ""}) for name, m in report["models"].items()}
    blocks = {name: m.get("blocks") for name, m in report["models"].items()}
    return {n: m | {"blocks": blocks[n]} for n, m in found.items() if "left_out" not in m}


def _main_k(report: dict) -> int:
    """The k that is drawn: 10 if it was measured, else the first; with k above N there is less."""
    found = [p["k"] for pooling in NAMES for p in _per_model(report, pooling, "knn").values()]
    ks = found[0] if found else report["settings"]["k"]
    return 10 if 10 in ks else ks[0]


def _low_shot_figures(found: dict[str, dict], pooling: str, chance: float):
    sizes = next(iter(found.values()))["sizes"] if found else []
    for i in sorted({0, len(sizes) - 1}) if sizes else ():
        share = f"{sizes[i]:.0%} of the labels"
        text = f"labels a class: {sizes[i]}" if isinstance(sizes[i], int) else share
        bands = {m: (np.array(p["mean"][i]), np.array(p["spread"][i])) for m, p in found.items()}
        ax = plots.block_curve(bands, ylabel="accuracy", chance=chance, title=text.capitalize())
        caption = f"Few labels, {NAMES[pooling]}: {text}; bands: deviation over draws"
        yield f"low_shot_{pooling}_{i}", caption, ax.figure


def _other_figures(report: dict, pooling: str):
    where = NAMES[pooling]
    if found := _per_model(report, pooling, "clustering"):
        curves = {name: p["nmi"] for name, p in found.items()}
        ax = plots.block_curve(curves, ylabel="normalised mutual information", percent=False)
        yield f"clusters_{pooling}", f"k-means against the classes, {where}", ax.figure
    if found := _per_model(report, pooling, "measures"):
        yield f"measures_{pooling}", f"Measures without labels, {where}", _measures_figure(found)
        yield f"cka_{pooling}", f"Linear CKA: how similar are blocks? {where}", _cka_figure(found)
    if found := _per_model(report, pooling, "factors"):
        names = list(next(iter(found.values())))
        scores = {m: np.array([p[f] for f in names], dtype=float).T for m, p in found.items()}
        axes = plots.factor_heatmap(scores, names, label="R²; pattern and class: accuracy")
        yield f"factors_{pooling}", f"What can be read from a block, {where}", axes[0].figure


def _measures_figure(found: dict[str, dict]) -> plt.Figure:
    names = [name for name in next(iter(found.values())) if name != "cka"]
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, name in zip(axes.flat, names, strict=True):
        curves = {m: np.array(p[name], dtype=float) for m, p in found.items()}
        words, look = advice.READS[name][0], {"best": False, "percent": False}
        look["legend"] = ax is axes.flat[0]
        plots.block_curve(curves, ylabel=words, title=words, **look, ax=ax)
    return fig


def _cka_figure(found: dict[str, dict]) -> plt.Figure:
    size = 4.8 * len(found), 4.0
    fig, axes = plt.subplots(1, len(found), figsize=size, layout="constrained", squeeze=False)
    for ax, (name, p) in zip(axes[0], found.items(), strict=True):
        plots.similarity_map(np.array(p["cka"], dtype=float), title=name, ax=ax)
    return fig


# ---------------------------------------------------------------- the page

_PAGE = """
{% for name, found in advised.items() %}
<p class="answer">{% if advised | length > 1 %}{{ name }}: {% endif %}{{ found.sentence }}</p>
{{ shown["reading_%s" % loop.index] }}
{{ near[name] }}
{% if found.rows is defined %}
<table><thead><tr><th>Reading</th><th class="number">Test images, %</th>
<th class="number">95 %</th><th>Does it differ?</th></tr></thead><tbody>
{% for row in found.rows %}
<tr><td>{{ row.reading }} ({{ row.which }})</td>
<td class="number">{{ "%.1f" % (100 * row.accuracy) }}</td>
<td class="number">{{ "%.1f–%.1f" % (100 * row.interval[0], 100 * row.interval[1]) }}</td>
<td>{{ "" if row.real is not defined else "yes" if row.real else "not for sure" }}</td></tr>
{% endfor %}
</tbody></table>
{% endif %}
<pre>{{ found.code }}</pre>
{% endfor %}
{% for title, texts in sections.items() %}
<details><summary>{{ title }}</summary>
{% if title == "k-NN and linear probes" %}
<table><thead><tr><th>Model</th><th>Features, standardised</th>
{% for head in ("k-NN (k = %s), last" % k, "best (block)", "linear probe, last", "best (block)") %}
<th class="number">{{ head }}</th>
{% endfor %}
</tr></thead><tbody>
{% for model, features, cells in rows %}
<tr><td>{{ model }}</td><td>{{ features }}</td>
{%- for cell in cells %}<td class="number">{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
<p>Best blocks are chosen on the test images that they are scored on, so they are a little too good.
</p>
{% elif title == "Measures without labels" %}
<p>They compare only models of the same width on the same images. {{ last_column }}</p>
<table><thead><tr><th>Measure</th><th>How to read it</th>
{% for name in advised %}<th class="number">{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for name, how, worth in worths %}
<tr><td>{{ name }}</td><td>{{ how }}</td>
{%- for w in worth %}<td class="number">{{ w }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endif %}
<div class="figures">{{ texts | join }}</div></details>
{% endfor %}
{% if report.left_out %}
<details><summary>Left out</summary>
<ul>{% for text in report.left_out %}<li>{{ text }}</li>{% endfor %}</ul></details>
{% endif %}
<details><summary>How this was measured</summary><p>{{ measured(report) }}</p>
{% if measured_here %}
<p>The reading (block, pooling, transform) was chosen on train images alone. The intervals hold
95 % of accuracies of resampled test images, and a difference counts where 95 % of its resamples
have one sign. The usual reading is the last block's class token (patch mean without one),
standardised.</p>
{% endif %}</details>
"""
LAST_COLUMN = {
    True: "The last column is each measure's rank correlation with the accuracy, over the "
    "standardised class tokens and patch means of all blocks.",
    False: "The last column is what each measure puts first.",
}
# Figures by the heading that they fold under, by what their names begin with.
SECTIONS = {
    "k-NN and linear probes": ("knn_", "linear_"),
    "Few labels": ("low_shot_",),
    "Clusters": ("clusters_",),
    "Measures without labels": ("measures_",),
    "Similarity of blocks": ("cka_",),
    "Factors of the images": ("factors_",),
}


def write_page(out: Path, report: dict) -> None:
    """Writes ``figures/*.png`` and ``index.html`` with all of them inside."""
    k, advised = _main_k(report), _advised(report)
    labelled = any("rows" in found for found in advised.values())
    shown = save_figures(out, lambda: figures(report))
    by_name = {
        title: [html for name, html in shown.items() if name.startswith(starts)]
        for title, starts in SECTIONS.items()
    }
    pages.write_page(
        out / "index.html",
        _PAGE,
        f"Probes of {', '.join(report['models'])}",
        report=report,
        k=k,
        rows=_rows(report, k),
        advised=advised,
        shown=shown,
        sections={title: texts for title, texts in by_name.items() if texts},
        near={name: _neighbors(out, found) for name, found in advised.items()},
        worths=_worths(advised),
        last_column=LAST_COLUMN[labelled] if advised else "",
        measured_here=labelled,
    )


def _neighbors(out: Path, found: dict) -> str:
    """The figure of neighbors that was drawn where there are no labels."""
    path = out / "figures" / f"neighbors_{Path(found['file']).stem}.png"
    if not path.is_file():
        return ""
    caption = "Images and their nearest neighbors by this reading"
    return pages.figure_html(base64.b64encode(path.read_bytes()).decode(), caption, caption)


def _worths(advised: dict[str, dict]) -> list[tuple[str, str, list[str]]]:
    """Each measure's name, how to read it, and what it is worth for each model."""
    columns = [dict(advice.worths(found)) for found in advised.values()]
    return [
        (name, how, [column.get(measure, "–") for column in columns])
        for measure, (name, how) in advice.READS.items()
    ]


def _rows(report: dict, k: int) -> list[tuple[str, str, list[str]]]:
    """Accuracies of the last and of the best block, for each model and pooling."""
    rows = []
    for name, found in report["models"].items():
        for pooling in (p for p in NAMES if p in found):
            nearest, linear = (found[pooling].get(part, {}) for part in ("knn", "linear"))
            measured = dict(zip(nearest.get("k", ()), nearest.get("accuracy", ()), strict=True))
            cells = _last_and_best(measured.get(k), found["blocks"])
            cells += _last_and_best(linear.get("accuracy"), found["blocks"])
            rows.append((name, NAMES[pooling], cells))
    return rows


def _last_and_best(values: list | float | None, blocks: list[int]) -> list[str]:
    if values is None:
        return ["–", "–"]
    if not isinstance(values, list):
        return [f"{values:.1%}", "–"]
    best = int(np.argmax(values))
    return [f"{values[-1]:.1%}", f"{values[best]:.1%} ({blocks[best]})"]
