"""Which lever counts on Toybox: what the views destroy, or when the neighbors teach?

    python benchmarks/toybox_ladder.py [--seeds 0] [--only mild-none ...] [--collect]

Colour augmentation (mild: the paper's jitter; strong: any hue) × swapping of positives (never; from
the start; a chance that grows during training), everything else alike: the cpu preset. One more
rung has its heads on the patch mean. Each reports every block's k-NN, linear probe, 1/2/5-shot
accuracy, k-means and the factor probe, for class token and patch mean, beside the unrefined model.

Refined encoders are kept in ``runs/toybox_ladder`` and used again; two processes with different
``--only`` share the work. Writes ``benchmarks/results/toybox_ladder.json`` and a figure beside it.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from measured import block_report, header

import refiner
from refiner.base.files import write_json
from refiner.training.recipe import Recipe, complete_recipe, recipe_from
from refiner.training.refining import refine

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/toybox_ladder")
MILD = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.2,
    "hue": 0.1,
    "gray": 0.2,
}
SWAPS = {
    "none": {"swap": "none"},
    "start": {"swap_from": 0.0, "swap_full": 0.0},
    "ramp": {"swap_from": 0.3, "swap_full": 0.9},
}
RUNGS = (*(f"{c}-{s}" for c in ("mild", "strong") for s in SWAPS), "strong-ramp-patch")


def rung_recipe(name: str, seed: int) -> Recipe:
    """The cpu preset with a rung's colours, swap and pooling."""
    colour, swap, *rest = name.split("-")
    recipe = Recipe.cpu(seed=seed, keep="last", **SWAPS[swap])
    if colour == "mild":
        recipe = replace(recipe, views=tuple(replace(v, **MILD) for v in recipe.views))
    return replace(recipe, pooling="patch") if rest else recipe


def train_rung(name: str, seed: int, model_name: str) -> None:
    """Refines one rung, unless that was done."""
    folder = RUNS / f"{name}-seed{seed}"
    images = refiner.load_images("toybox", split="train")
    model = refiner.load_model(model_name)
    recipe = complete_recipe(rung_recipe(name, seed), model, images)
    if (folder / "history.json").is_file() and recipe_from(kept_recipe(folder)) == recipe:
        return
    print(f"{name}, seed {seed}", flush=True)
    refine(model, images, recipe=recipe, out=folder, resume=(folder / "state.pt").is_file())


def kept_recipe(folder: Path) -> dict:
    """The recipe of a finished run."""
    return json.loads((folder / "card.json").read_text())["refine_recipe"]


def measured_rung(name: str, seed: int) -> dict:
    """What a trained rung scores; measured once."""
    folder = RUNS / f"{name}-seed{seed}"
    done, recipe = folder / "cell.json", kept_recipe(folder)
    if done.is_file() and (cell := json.loads(done.read_text()))["recipe"] == recipe:
        return cell
    history = json.loads((folder / "history.json").read_text())
    stage_3 = [h for h in history if h["stage"] == 3]
    cell = {
        "rung": name,
        "seed": seed,
        "recipe": recipe,
        "seconds": history[-1]["seconds"],
        "neighbor_accuracy": [[h["step"], h["neighbor_accuracy"][-1]] for h in stage_3],
        **block_report(refiner.load_model(folder), *bank_and_test()),
    }
    write_json(done, cell)
    return cell


def bank_and_test():
    """The labelled bank (2,048 train images) and 1,024 held-out test images."""
    return (
        refiner.load_images("toybox", split="train")[:2048],
        refiner.load_images("toybox", split="test", n=1024),
    )


def draw(before: dict, cells: list[dict], path: Path) -> None:
    """k-NN of every block, and what the last block tells about each factor."""
    fig, axes = plt.subplots(1, 3, figsize=(16, 4.2), layout="constrained")
    for axis, pooling, title in zip(
        axes, ("cls", "patch"), ("class token", "patch mean"), strict=False
    ):
        rows = [("before", before)] + [(c["rung"], c) for c in cells if c["seed"] == 0]
        for k, (name, cell) in enumerate(rows):
            y = 100 * np.array(cell[pooling]["knn"])
            style = {"color": "black", "lw": 2.5} if name == "before" else {"color": f"C{k - 1}"}
            style["ls"] = "--" if name.startswith("mild") else "-"
            axis.plot(range(1, len(y) + 1), y, label=name, **style)
        axis.set(title=f"k-NN, {title}", xlabel="block", ylabel="accuracy on held-out images, %")
        axis.grid(alpha=0.3)
    axes[0].legend(fontsize=8)
    factors = list(before["cls"]["factors"])
    table = np.array([[c["cls"]["factors"][f][-1] for f in factors] for _, c in rows])
    image = axes[2].imshow(table, vmin=0, vmax=1, cmap="viridis", aspect="auto")
    axes[2].set_xticks(range(len(factors)), factors, rotation=60, ha="right", fontsize=8)
    axes[2].set_yticks(range(len(rows)), [name for name, _ in rows], fontsize=8)
    axes[2].set_title("read from the last block's class token (R² or accuracy)", fontsize=10)
    fig.colorbar(image, ax=axes[2])
    fig.savefig(path, dpi=110)
    plt.close(fig)


def collect(model_name: str, out: Path) -> None:
    """Measures the trained rungs; writes the results file and the figure."""
    trained = [
        (name, seed)
        for name in RUNGS
        for seed in range(10)
        if (RUNS / f"{name}-seed{seed}" / "history.json").is_file()
    ]
    cells = [measured_rung(name, seed) for name, seed in trained]
    before = block_report(refiner.load_model(model_name), *bank_and_test())
    command = f"python benchmarks/toybox_ladder.py --model {model_name}"
    write_json(out, {**header(command), "before": before, "cells": cells})
    draw(before, cells, out.with_suffix(".png"))
    for name, cell in [("before", before), *((c["rung"], c) for c in cells)]:
        last = {
            p: {m: cell[p][m][-1] for m in ("knn", "linear", "1-shot", "5-shot", "kmeans_acc")}
            for p in ("cls", "patch")
        }
        print(f"{name:>18}: {last}")
    print(f"wrote {out}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_toybox")
    parser.add_argument("--only", nargs="+", choices=RUNGS, default=list(RUNGS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="only measure trained rungs")
    parser.add_argument("--out", type=Path, default=RESULTS / "toybox_ladder.json")
    args = parser.parse_args()
    if not args.collect:
        for seed in args.seeds:
            for name in args.only:
                train_rung(name, seed, args.model)
    collect(args.model, args.out)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
