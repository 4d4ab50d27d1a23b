"""When does a small encoder's best block move away from its last? Curves at equal compute.

    python benchmarks/small_vit_study.py [--preset cpu|gpu] [--only d12-dec1 ...] [--collect]

Masked autoencoders on Toybox that differ in the encoder's depth and in the decoder's depth and
width, trained from scratch with the same arithmetic (multiply-adds of all forward passes; a cheaper
model gets more steps). Each cell reports, for every block and for class token and patch mean, k-NN
(k=10) and a linear probe on held-out images, beside an untrained twin.

The hypothesis on trial: a weak decoder pushes the decoding into the encoder, whose late blocks fall
behind. Pooling is the control: a block that looks bad may only be pooled badly.

Cells are kept in ``runs/small_vit_study`` and used again, an interrupted one goes on; two processes
with different ``--only`` share the work. Writes ``benchmarks/results/small_vit_study.json`` and a
figure beside it; cells in that file that were made with the same budget elsewhere stay.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from measured import features_of, rounded

import refiner
from refiner.base.files import write_json
from refiner.base.places import machine
from refiner.models.load import random_like
from refiner.models.mae import MAERecipe
from refiner.training.pretraining import pretrain

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/small_vit_study")

# name -> what differs from the course's recipe
CELLS = {
    "d12-dec0": {"decoder_depth": 0},  # no decoder: mask tokens enter the encoder, as in SimMIM
    "d12-dec1": {},
    "d12-dec1-narrow": {"decoder_dim": 48, "decoder_heads": 2},
    "d12-dec2": {"decoder_depth": 2},
    "d12-dec4": {"decoder_depth": 4},
    "d12-dec8": {"decoder_depth": 8},
    "d16-dec1": {"depth": 16},
    "d24-dec1": {"depth": 24},
    "d24-dec8": {"depth": 24, "decoder_depth": 8},
}
# Steps of d12-dec1; the others get as many as the same arithmetic pays for.
PRESETS = {"cpu": {"steps": 1200, "images": 8192}, "gpu": {"steps": 60_000, "images": 65_536}}


def multiply_adds(recipe: MAERecipe) -> float:
    """Multiply-adds of one image's forward pass: encoder on the visible, decoder on all patches.

    Without a decoder the encoder meets all patches.
    """
    patches = (recipe.size // recipe.patch) ** 2
    hidden = recipe.mask_ratio if recipe.decoder_depth else 0
    visible = 1 + round(patches * (1 - hidden))

    def blocks(depth: int, dim: int, tokens: int) -> float:
        return depth * (12 * dim**2 * tokens + 2 * tokens**2 * dim)

    return blocks(recipe.depth, recipe.dim, visible) + blocks(
        recipe.decoder_depth, recipe.decoder_dim, 1 + patches
    )


def cell_recipe(name: str, preset: str, *, seed: int = 0) -> MAERecipe:
    """The recipe of a cell with the number of steps that the common budget pays for."""
    base = MAERecipe(seed=seed, compile=True)
    recipe = replace(base, **CELLS[name])
    steps = PRESETS[preset]["steps"] * multiply_adds(base) / multiply_adds(recipe)
    return replace(recipe, steps=round(steps))


def curves(model, bank, test) -> dict[str, list[float]]:
    """k-NN and linear accuracy of every block for both poolings."""
    keys, queries = features_of(model, bank, test)
    found = {}
    for pooling in ("cls", "patch"):
        data = keys[pooling], bank.labels, queries[pooling], test.labels
        found[f"knn_{pooling}"] = refiner.knn_accuracy(*data, k=10)
        found[f"linear_{pooling}"] = refiner.linear_probe(*data).accuracy
    return {name: rounded(value) for name, value in found.items()}


def train_cell(name: str, preset: str, seed: int) -> None:
    """Trains one cell, unless that was done."""
    recipe = cell_recipe(name, preset, seed=seed)
    folder = RUNS / preset / f"{name}-seed{seed}"
    if (folder / "history.json").is_file() and recipe == MAERecipe(**kept_recipe(folder)):
        return
    images = refiner.load_images("toybox", split="train", n=PRESETS[preset]["images"])
    print(f"{name}, seed {seed}: {recipe.steps} steps", flush=True)
    pretrain(images, recipe=recipe, out=folder, resume=(folder / "state.pt").is_file())


def kept_recipe(folder: Path) -> dict:
    """The recipe of a finished run."""
    return json.loads((folder / "card.json").read_text())["recipe"]


def measured_cell(name: str, preset: str, seed: int) -> dict:
    """The curves of a trained cell; measured once."""
    folder = RUNS / preset / f"{name}-seed{seed}"
    done, recipe = folder / "cell.json", kept_recipe(folder)
    if done.is_file() and (cell := json.loads(done.read_text()))["recipe"] == recipe:
        return cell
    bank = refiner.load_images("toybox", split="train", n=2048)
    test = refiner.load_images("toybox", split="test", n=1024)
    last = json.loads((folder / "history.json").read_text())[-1]
    model = refiner.load_model(folder)
    cell = {
        "name": name,
        "seed": seed,
        "recipe": recipe,
        "loss": last["loss"],
        "seconds": last["seconds"],
        "machine": machine(),
        "untrained": curves(random_like(model), bank, test),
        **curves(model, bank, test),
    }
    write_json(done, cell)
    return cell


def kept_cells(out: Path, trained: list[tuple[str, int]], budget: float) -> list[dict]:
    """Cells of an earlier results file with the same budget that are not trained here."""
    earlier = json.loads(out.read_text()) if out.is_file() else {"cells": []}
    if earlier.get("multiply_adds_forward") != budget:
        return []
    return [c for c in earlier["cells"] if (c["name"], c["seed"]) not in trained]


def draw(cells: list[dict], path: Path) -> None:
    """One panel a measure and pooling; one line a cell; a dot on each line's best block."""
    measures = ("knn_cls", "knn_patch", "linear_cls", "linear_patch")
    titles = ("k-NN, class token", "k-NN, patch mean", "linear, class token", "linear, patch mean")
    fig, axes = plt.subplots(1, 4, figsize=(16, 3.8), sharey=True, layout="constrained")
    for axis, measure, title in zip(axes, measures, titles, strict=True):
        for k, name in enumerate(CELLS):
            for cell in (c for c in cells if c["name"] == name):
                y = [100 * v for v in cell[measure]]
                x = [(i + 1) / len(y) for i in range(len(y))]
                best = max(range(len(y)), key=y.__getitem__)
                style = "--" if "d12" not in name else "-"
                label = name if cell["seed"] == 0 else None
                axis.plot(x, y, style, color=f"C{k}", lw=1.3, label=label)
                axis.plot(x[best], y[best], "o", color=f"C{k}")
        axis.set(title=title, xlabel="share of the encoder's blocks")
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accuracy on held-out Toybox, %")
    fig.legend(
        *axes[0].get_legend_handles_labels(),
        loc="outside right center",
        fontsize=8,
        title="encoder depth, decoder;\ndot: best block",
    )
    fig.savefig(path, dpi=110)
    plt.close(fig)


def collect(preset: str, out: Path) -> None:
    """Measures the trained cells; writes the results file and the figure."""
    trained = [
        (name, seed)
        for name in CELLS
        for seed in range(10)
        if (RUNS / preset / f"{name}-seed{seed}" / "history.json").is_file()
    ]
    cells = [measured_cell(name, preset, seed) for name, seed in trained]
    budget = multiply_adds(MAERecipe()) * MAERecipe().batch * PRESETS[preset]["steps"]
    cells = sorted(
        cells + kept_cells(out, trained, budget),
        key=lambda c: (list(CELLS).index(c["name"]), c["seed"]),
    )
    write_json(
        out,
        {
            "command": f"python benchmarks/small_vit_study.py --preset {preset}",
            "data": {
                "set": "toybox",
                "train": PRESETS[preset]["images"],
                "bank": 2048,
                "test": 1024,
            },
            "multiply_adds_forward": budget,
            "cells": cells,
        },
    )
    draw(cells, out.with_suffix(".png"))
    print(f"wrote {out} with {len(cells)} cells")
    for cell in cells:
        row = []
        for measure in ("knn_cls", "knn_patch", "linear_cls", "linear_patch"):
            y = cell[measure]
            best = max(range(len(y)), key=y.__getitem__)
            row.append(
                f"{measure} last {100 * y[-1]:.1f}, best {100 * y[best]:.1f} (block {best + 1})"
            )
        print(f"{cell['name']:>16} ({cell['seconds'] / 60:.0f} min): " + "; ".join(row))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", choices=tuple(PRESETS), default="cpu")
    parser.add_argument("--only", nargs="+", choices=tuple(CELLS), default=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--collect", action="store_true", help="only measure trained cells")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if not args.collect:
        for seed in args.seeds:
            for name in args.only:
                train_cell(name, args.preset, seed)
    suffix = "" if args.preset == "cpu" else f"_{args.preset}"
    collect(args.preset, args.out or RESULTS / f"small_vit_study{suffix}.json")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    sys.exit(main())
