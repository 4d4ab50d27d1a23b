"""How good must the MAE be before refining helps? MAEs of different length, each refined.

    python benchmarks/mae_maturity.py [--steps 1500 3000 11000] [--refine 160] [--seeds 0]
                                      [--collect]

Every MAE has its own complete schedule (the embedded checkpoint's recipe with fewer steps; 11,000
is that checkpoint) and is refined by the cpu preset, or by one with more steps. Each reports every
block's k-NN, linear probe, 1/2/5-shot accuracy, k-means and factor probe before and after, and how
often the neighbors that NNA drew were right. Finished encoders are kept in ``runs/mae_maturity``
and used again; ``--collect`` takes all of them. Writes ``benchmarks/results/mae_maturity.json`` and
a figure beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from measured import block_report, header
from toybox_ladder import bank_and_test

import refiner
from refiner.base.files import write_json
from refiner.models.mae import MAERecipe
from refiner.training.pretraining import pretrain
from refiner.training.recipe import Recipe
from refiner.training.refining import refine

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/mae_maturity")
EMBEDDED = 11_000  # steps of mae_toybox
PRESET = 160  # steps of the cpu preset with the encoder


def pretrained(steps: int, seed: int, images):
    """The MAE of a rung; the embedded checkpoint where its steps and seed are meant."""
    if steps == EMBEDDED and seed == 0:
        return refiner.load_model("mae_toybox")
    out = RUNS / f"mae-{steps}-seed{seed}"
    if not (out / "history.json").is_file():
        embedded = MAERecipe(**refiner.load_model("mae_toybox").refiner_card["recipe"])
        recipe = replace(embedded, steps=steps, seed=seed)
        pretrain(images, recipe=recipe, out=out, resume=(out / "state.pt").is_file())
    return refiner.load_model(out)


def refined(steps: int, longer: int, seed: int, images):
    """The rung's refined encoder and its history."""
    out = RUNS / f"refined-{steps}{_suffix(longer)}-seed{seed}"
    if not (out / "history.json").is_file():
        recipe = Recipe.cpu(seed=seed, steps=longer, keep="last")
        resume = (out / "state.pt").is_file()
        refine(pretrained(steps, seed, images), images, recipe=recipe, out=out, resume=resume)
    return refiner.load_model(out), json.loads((out / "history.json").read_text())


def _suffix(longer: int) -> str:
    return "" if longer == PRESET else f"-refine{longer}"


def measured_rung(steps: int, longer: int, seed: int, images) -> dict:
    """Everything about one MAE before and after refining; measured once."""
    done = RUNS / f"cell-{steps}{_suffix(longer)}-seed{seed}.json"
    if done.is_file():
        return json.loads(done.read_text())
    before = pretrained(steps, seed, images)
    after, history = refined(steps, longer, seed, images)
    cell = {
        "steps": steps,
        "refine_steps": longer,
        "seed": seed,
        "mae_loss": before.refiner_card["loss"],
        "seconds": {"mae": before.refiner_card["seconds"], "refine": history[-1]["seconds"]},
        "neighbor_accuracy": [h["neighbor_accuracy"][-1] for h in history if h["stage"] == 3],
        "before": block_report(before, *bank_and_test()),
        "after": block_report(after, *bank_and_test()),
    }
    write_json(done, cell)
    return cell


def last(report: dict, measure: str) -> float:
    """A measure of the last block's class token, in percent."""
    return 100 * report["cls"][measure][-1]


def draw(cells: list[dict], path: Path) -> None:
    """Before and after against the MAE's steps, one panel a measure."""
    panels = {
        "knn": "k-NN",
        "linear": "linear probe",
        "1-shot": "one label a class",
        "kmeans_acc": "k-means accuracy",
    }
    fig, axes = plt.subplots(1, 4, figsize=(15, 3.6), sharey=True, layout="constrained")
    first = [c for c in cells if c["seed"] == 0 and c["refine_steps"] == PRESET]
    more = [c for c in cells if c["seed"] == 0 and c["refine_steps"] > PRESET]
    for axis, (measure, title) in zip(axes, panels.items(), strict=True):
        for when, style in (("before", "o--"), ("after", "s-")):
            color = "C0" if when == "before" else "C1"
            y = [last(c[when], measure) for c in first]
            axis.plot([c["steps"] for c in first], y, style, color=color, label=f"{when} refining")
        for steps in sorted({c["refine_steps"] for c in more}):
            same = [c for c in more if c["refine_steps"] == steps]
            axis.plot(
                [c["steps"] for c in same],
                [last(c["after"], measure) for c in same],
                "^",
                color="C2",
                label=f"after, {steps:,} steps instead of {PRESET}",
            )
        axis.set(title=title, xlabel="MAE steps before refining", xscale="log", ylim=(0, 100))
        axis.set_xticks([c["steps"] for c in first], [f"{c['steps']:,}" for c in first])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("last block, class token: held-out images, %")
    axes[0].legend()
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, nargs="+", default=[1500, 3000, EMBEDDED])
    parser.add_argument("--refine", type=int, nargs="+", default=[PRESET])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="only rungs that were measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "mae_maturity.json")
    args = parser.parse_args()
    images = refiner.load_images("toybox", split="train")
    if args.collect:
        cells = [json.loads(p.read_text()) for p in RUNS.glob("cell-*.json")]
    else:
        cells = [
            measured_rung(n, r, s, images)
            for s in args.seeds
            for n in args.steps
            for r in args.refine
        ]
    cells.sort(key=lambda c: (c["seed"], c["steps"], c["refine_steps"]))
    write_json(args.out, {**header("python benchmarks/mae_maturity.py"), "cells": cells})
    draw(cells, args.out.with_suffix(".png"))
    for c in cells:
        shown = {
            m: [round(last(c[w], m), 1) for w in ("before", "after")]
            for m in ("knn", "linear", "1-shot", "kmeans_acc")
        }
        print(f"{c['steps']:>6} + {c['refine_steps']} steps, seed {c['seed']}: {shown}")
    print(f"wrote {args.out}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
