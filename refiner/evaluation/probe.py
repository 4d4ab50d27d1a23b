"""``refiner probe``: everything that is known about a model's blocks, as JSON, figures and a page.

The parts are those of :mod:`refiner.probing.neighbors`, :mod:`refiner.probing.probes` and
:mod:`refiner.probing.measures`. Each is written down as soon as it is done, so that an interrupted
run goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from pathlib import Path
from typing import Annotated, Literal, get_args

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.files import write_json, write_text
from refiner.base.pages import BAR, STYLE, json_ready
from refiner.base.parallel import check_device
from refiner.base.places import machine
from refiner.base.settings import Count, Entries, Portion, Whole, checked
from refiner.images.load import check_source, train_and_test
from refiner.images.sets import ImageSet
from refiner.models.load import load_model
from refiner.probing import clusters, measures, neighbors, probes
from refiner.probing.features import extract
from refiner.visuals import plots
from refiner.visuals.style import save_figures

# What a part costs, roughly, so that the bar's estimate of the time that is left means something.
COST = {
    "features": 30,
    "knn": 5,
    "linear": 20,
    "low_shot": 15,
    "clustering": 15,
    "measures": 10,
    "factors": 10,
}
Part = Literal["knn", "linear", "low_shot", "clustering", "measures", "factors"]
PARTS = get_args(Part)
NAMES = {"cls": "class token", "patch": "patch mean", "final": "after the final norm"}


@dataclass(frozen=True)
class Settings:
    """What :func:`probe` measures; see there."""

    parts: Annotated[tuple[Part, ...], Entries(1)] = PARTS
    k: Annotated[tuple[Count, ...], Entries(1)] = (1, 10, 20)
    shots: tuple[Count, ...] = (1, 2, 5, 10)
    fractions: tuple[Portion, ...] = ()
    draws: Count = 10
    seed: Whole = 0


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


def probe(
    models: str | Sequence[str],
    data: str | Path = "toybox",
    out: str | Path = "runs/probe",
    *,
    n: int | None = None,
    n_test: int | None = None,
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
        out: gets ``report.json``, ``figures/*.png`` and ``index.html``.
        n, n_test: only so many train and test images; default all.
        settings: parts and their options, a :class:`Settings`.
        resume: keep the parts that are in ``out`` already, from the same data and settings.
        device: where to run; default CUDA if there is one.
        progress: show a bar with the remaining time.

    Returns:
        The content of ``report.json``: ``models`` → name → "cls" / "patch" / "final" → part →
        numbers, lists over blocks. A part that the data do not allow is listed in ``left_out``.

    Raises:
        ValueError: for unknown parts, the same model twice, or data that do not load.
        FileNotFoundError: for a model or image set that is not there.
    """
    settings = checked(settings or Settings())
    names = [models] if isinstance(models, str | Path) else list(models)
    names = [str(name) for name in names]
    check_source(data)
    check_device(device)
    if not names or len(set(names)) < len(names):
        raise UserError(f"give each model once, not {names}")
    out = Path(out)
    asked = {"data": str(data), "n": n, "n_test": n_test, "settings": json_ready(asdict(settings))}
    report = _started(out, asked, resume)
    loaded = {name: load_model(name) for name in names}  # a wrong name is told before the work
    with tqdm(
        total=len(names) * _total(settings),
        desc="probing",
        unit="",
        disable=not progress,
        bar_format=BAR,
    ) as bar:
        by_size: dict[int, tuple[ImageSet, ImageSet]] = {}  # models of one size share the images
        for name, model in loaded.items():
            size = model.refiner_card["preprocessing"]["size"]
            if size not in by_size:
                by_size[size] = train_and_test(data, n, n_test, size)
            train, test = by_size[size]
            report["images"] = {
                "train": len(train),
                "test": len(test),
                "classes": len(train.classes),
            }
            origin = model.refiner_card.get("origin", "")
            found = report["models"].setdefault(name, {"origin": origin})
            _probe_model(
                model, found, train, test, settings, device, bar, lambda: _write(out, report)
            )
    report["left_out"] = _left_out(report)
    _write(out, report)
    write_page(out, report)
    return report


def _total(settings: Settings) -> int:
    """The cost of one model."""
    return COST["features"] + sum(COST[part] for part in settings.parts)


def _started(out: Path, asked: dict, resume: bool) -> dict:
    """What was done before, or an empty report."""
    path = out / "report.json"
    if resume and path.exists():
        report = json.loads(path.read_text(encoding="utf-8"))
        changed = [key for key, value in asked.items() if report.get(key) != value]
        if changed:
            raise UserError(
                f"cannot resume {out}: {', '.join(changed)} differ from the earlier run; use the "
                "same options, or another --out"
            )
        return report
    return asked | {"machine": machine(), "models": {}}


def _probe_model(
    model,
    found: dict,
    train: ImageSet,
    test: ImageSet,
    settings: Settings,
    device,
    bar: tqdm,
    save: Callable[[], None],
) -> None:
    """Fills ``found`` with the parts that are missing."""
    wanted = [p for p in settings.parts if p != "factors" or train.factors]
    poolings = ("cls", "patch", "final")
    if all(part in found.get("done", []) for part in wanted):
        bar.update(_total(settings))
        return
    bar.set_description_str("features")
    keys, queries = (
        extract(model, images, device=device, progress=False) for images in (train, test)
    )
    found["blocks"] = list(keys.blocks)
    bar.update(COST["features"])
    for part in settings.parts:
        bar.set_description_str(part.replace("_", "-"))
        if part in wanted and part not in found.get("done", []):
            for pooling in (p for p in poolings if p in keys):
                sides = _Sides(keys[pooling], train, queries[pooling], test, settings, device)
                if pooling == "final" and part not in ("knn", "linear"):
                    continue
                found.setdefault(pooling, {})[part] = _tried(part, sides)
            found.setdefault("done", []).append(part)
            save()
        bar.update(COST[part])


def _tried(part: str, sides: _Sides) -> dict:
    """A part's numbers, or why the data do not allow it."""
    if part != "measures" and (sides.train.labels is None or sides.test.labels is None):
        return {"left_out": "the images have no labels"}
    try:
        return json_ready(_DO[part](sides))
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
    shots = probes.possible_shots(s.settings.shots, s.settings.fractions, s.train.labels)
    found = probes.low_shot(
        *s.data,
        shots=shots,
        fractions=s.settings.fractions,
        draws=s.settings.draws,
        seed=s.settings.seed,
        device=s.device,
    )
    return {
        "sizes": found.sizes,
        "images": found.images,
        "mean": found.mean,
        "spread": found.spread,
    }


def _clustering(s: _Sides) -> dict:
    return clusters.clustering(s.z, s.test.labels, seed=s.settings.seed, device=s.device)


def _measures(s: _Sides) -> dict:
    found = {
        "rankme": measures.rankme(s.z),
        "participation_ratio": measures.participation_ratio(s.z),
        "alpha_req": measures.alpha_req(s.z),
        "uniformity": measures.uniformity(s.z),
        "collapse_std": measures.collapse_std(s.z),
        "intrinsic_dimension": measures.intrinsic_dimension(s.z),
    }
    return found | {"cka": measures.linear_cka(s.z)}


def _factors(s: _Sides) -> dict:
    known = [dict(images.factors) for images in (s.train, s.test)]
    constant = {name for f in known for name, values in f.items() if np.ptp(values) == 0}
    known = [{k: v for k, v in f.items() if k not in constant} for f in known]
    for factors, images in zip(known, (s.train, s.test), strict=True):
        factors["class"] = images.labels
    return probes.factor_probe(s.x, known[0], s.z, known[1], seed=s.settings.seed, device=s.device)


_DO: dict[str, Callable[[_Sides], dict]] = {
    "knn": _knn,
    "linear": _linear,
    "low_shot": _low_shot,
    "clustering": _clustering,
    "measures": _measures,
    "factors": _factors,
}


def _left_out(report: dict) -> list[str]:
    """One sentence for each part that the data do not allow."""
    sentences = []
    for model, found in report["models"].items():
        for pooling in NAMES:
            for part, numbers in found.get(pooling, {}).items():
                if "left_out" in numbers:
                    sentences.append(f"{part} of {model}, {NAMES[pooling]}: {numbers['left_out']}")
    return sentences


def _write(out: Path, report: dict) -> None:
    write_json(out / "report.json", report)


# ---------------------------------------------------------------- figures


def _per_model(report: dict, pooling: str, part: str) -> dict[str, dict]:
    """Each model's numbers of a part, where there are any."""
    found = {name: m.get(pooling, {}).get(part) for name, m in report["models"].items()}
    return {name: part for name, part in found.items() if part and "left_out" not in part}


def _curves(report: dict, pooling: str, part: str, pick: Callable[[dict], object]) -> dict:
    return {name: pick(p) for name, p in _per_model(report, pooling, part).items()}


def figures(report: dict) -> Iterator[tuple[str, str, plt.Figure]]:
    """The report's figures: file name, caption, figure."""
    chance, k = 1 / max(1, report["images"]["classes"]), _main_k(report)
    for pooling in ("cls", "patch"):
        where = NAMES[pooling]
        if curves := _curves(report, pooling, "knn", lambda p: p["accuracy"][p["k"].index(k)]):
            ax = plots.block_curve(curves, ylabel=f"k-NN accuracy (k = {k})", chance=chance)
            caption = f"k-NN, {where}: are near images of the same class?"
            yield f"knn_{pooling}", caption, ax.figure
        if curves := _curves(report, pooling, "linear", lambda p: p["accuracy"]):
            ax = plots.block_curve(curves, ylabel="linear probe, accuracy", chance=chance)
            yield f"linear_{pooling}", f"Linear probe, {where}: can the class be read?", ax.figure
        yield from _low_shot_figures(report, pooling, chance)
        yield from _other_figures(report, pooling)


def _main_k(report: dict) -> int:
    """The k that is drawn: 10 if it was measured, else the first; with k above N there is less."""
    found = [p["k"] for pooling in NAMES for p in _per_model(report, pooling, "knn").values()]
    ks = found[0] if found else report["settings"]["k"]
    return 10 if 10 in ks else ks[0]


def _low_shot_figures(report: dict, pooling: str, chance: float):
    found = _per_model(report, pooling, "low_shot")
    if not found:
        return
    sizes = next(iter(found.values()))["sizes"]
    for i in sorted({0, len(sizes) - 1}):
        share = f"{sizes[i]:.0%} of the labels"
        text = f"labels a class: {sizes[i]}" if isinstance(sizes[i], int) else share
        curves = {
            name: (np.array(p["mean"][i]), np.array(p["spread"][i])) for name, p in found.items()
        }
        ax = plots.block_curve(curves, ylabel="accuracy", chance=chance, title=text.capitalize())
        caption = f"Few labels, {NAMES[pooling]}: {text}; bands: deviation over draws"
        yield f"low_shot_{pooling}_{i}", caption, ax.figure


def _other_figures(report: dict, pooling: str):
    where = NAMES[pooling]
    if curves := _curves(report, pooling, "clustering", lambda p: p["nmi"]):
        ax = plots.block_curve(curves, ylabel="normalised mutual information", percent=False)
        yield f"clusters_{pooling}", f"k-means against the classes, {where}", ax.figure
    found = _per_model(report, pooling, "measures")
    if found:
        yield f"measures_{pooling}", f"Measures without labels, {where}", _measures_figure(found)
        yield f"cka_{pooling}", f"Linear CKA: how similar are blocks? {where}", _cka_figure(found)
    if tables := _per_model(report, pooling, "factors"):
        names = list(next(iter(tables.values())))
        scores = {
            model: np.array([t[f] for f in names], dtype=float).T for model, t in tables.items()
        }
        axes = plots.factor_heatmap(scores, names, label="R²; pattern and class: accuracy")
        yield f"factors_{pooling}", f"What can be read from a block, {where}", axes[0].figure


def _measures_figure(found: dict[str, dict]) -> plt.Figure:
    names = [name for name in next(iter(found.values())) if name != "cka"]
    fig, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained")
    for ax, name in zip(axes.flat, names, strict=True):
        curves = {m: np.array(p[name], dtype=float) for m, p in found.items()}
        plots.block_curve(
            curves,
            ylabel=name.replace("_", " "),
            best=False,
            percent=False,
            title=name.replace("_", " "),
            ax=ax,
        )
        if ax is not axes.flat[0]:
            ax.get_legend().remove()
    return fig


def _cka_figure(found: dict[str, dict]) -> plt.Figure:
    fig, axes = plt.subplots(
        1, len(found), figsize=(4.8 * len(found), 4.0), layout="constrained", squeeze=False
    )
    for ax, (name, p) in zip(axes[0], found.items(), strict=True):
        plots.similarity_map(np.array(p["cka"], dtype=float), title=name, ax=ax)
    return fig


def write_page(out: Path, report: dict) -> None:
    """Writes ``figures/*.png`` and ``index.html`` with all of them inside."""
    shown = save_figures(out, lambda: figures(report))
    images, models = report["images"], ", ".join(report["models"])
    facts = ", ".join(f"{key} {value}" for key, value in report["machine"].items())
    notes = "".join(f"<li>{escape(text)}</li>" for text in report.get("left_out", []))
    notes = f"<h2>Left out</h2><ul>{notes}</ul>" if notes else ""
    write_text(
        out / "index.html",
        f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Probes of {escape(models)}</title>
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>
<body><h1>Probes of {escape(models)}</h1>
<p>{escape(report["data"])}: {images["train"]} train and {images["test"]} test images,
{images["classes"]} classes. {escape(facts)}. All numbers:
<a href="report.json">report.json</a>.</p>
<h2>Last and best block</h2>
{_table(report)}
<p>Best blocks are chosen on the test images that they are scored on, so they are a little too good.
The measures without labels compare only models of the same width on the same images.</p>
{notes}
<h2>Every block</h2>
{"".join(shown)}
</body></html>
""",
    )


def _table(report: dict) -> str:
    """Accuracies of the last and of the best block, a row a model and pooling."""
    k = _main_k(report)
    rows = []
    for name, found in report["models"].items():
        for pooling in (p for p in NAMES if p in found):
            cells = []
            for part in ("knn", "linear"):
                numbers = found[pooling].get(part, {"left_out": ""})
                values = None
                if "left_out" not in numbers:
                    values = numbers["accuracy"]
                    if part == "knn":
                        values = values[numbers["k"].index(k)] if k in numbers["k"] else None
                cells += _last_and_best(values, found["blocks"])
            cells = "".join(f'<td class="number">{cell}</td>' for cell in cells)
            rows.append(f"<tr><td>{escape(name)}</td><td>{NAMES[pooling]}</td>{cells}</tr>")
    heads = (f"k-NN (k = {k}), last", "best (block)", "linear probe, last", "best (block)")
    heads = "".join(f'<th class="number">{head}</th>' for head in heads)
    return (
        f"<table><thead><tr><th>Model</th><th>Features</th>{heads}</tr></thead>"
        f"<tbody>{''.join(rows)}</tbody></table>"
    )


def _last_and_best(values: list | float | None, blocks: list[int]) -> list[str]:
    if values is None:
        return ["–", "–"]
    if not isinstance(values, list):
        return [f"{values:.1%}", "–"]
    best = int(np.argmax(values))
    return [f"{values[-1]:.1%}", f"{values[best]:.1%} ({blocks[best]})"]
