"""Does an encoder that must paint lose its last blocks? The decoder is taken away, or renewed.

    python benchmarks/no_decoder.py [--steps 3000] [--refine 160 640] [--seeds 0 1 2] [--only none]
                                    [--collect]

Two arms start from the embedded autoencoder's encoder and train on with the same images, masks,
rate and number of steps. *new*: a fresh decoder of one block paints, the control. *none*: no
decoder; mask tokens enter the encoder and a linear layer reads the pixels (as in SimMIM), so that
the encoder's own blocks have to decode. If decoding is what spoils the last blocks of large
autoencoders, the second encoder's best block must move to the middle and the first one's must not.
Then the cpu preset refines both, and one with more steps the second. Each reports every block's
k-NN, linear probe, 1/2/5-shot accuracy, k-means and factor probe.

Encoders are kept in ``runs/no_decoder`` and used again; an interrupted run goes on. Writes
``benchmarks/results/no_decoder.json`` and a figure beside it.
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
from refiner.models.mae import MAERecipe, decoder_state
from refiner.training.pretraining import pretrain, start_from
from refiner.training.recipe import Recipe
from refiner.training.refining import refine

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/no_decoder")
START = "mae_toybox"
ARMS = {"new": {"decoder_depth": 1}, "none": {"decoder_depth": 0}}


def arm_recipe(arm: str, steps: int, seed: int) -> MAERecipe:
    """The embedded autoencoder's recipe, shorter, at a third of its rate, with an arm's decoder."""
    base = MAERecipe(**refiner.load_model(START).refiner_card["recipe"])
    return replace(base, steps=steps, lr=base.lr / 3, seed=seed, compile=True, **ARMS[arm])


def trained_on(arm: str, steps: int, seed: int, images):
    """The embedded encoder trained on with an arm's decoder."""
    out = RUNS / f"{arm}-{steps}-seed{seed}"
    if not (out / "history.json").is_file():
        recipe = arm_recipe(arm, steps, seed)
        mae = start_from(START, recipe)
        if arm == "new":
            mae.load_state_dict(decoder_state(recipe.build()), strict=False)
        resume = (out / "state.pt").is_file()
        pretrain(images, recipe=recipe, start=mae, out=out, resume=resume, save_every=100)
    return refiner.load_model(out)


def refined(arm: str, steps: int, longer: int, seed: int, images):
    """An arm's encoder refined by the cpu preset, or for longer, and the history."""
    out = RUNS / f"{arm}-{steps}-seed{seed}-refined{longer}"
    if not (out / "history.json").is_file():
        model = trained_on(arm, steps, seed, images)
        resume = (out / "state.pt").is_file()
        recipe = Recipe.cpu(seed=seed, steps=longer, keep="last")
        refine(model, images, recipe=recipe, out=out, resume=resume)
    return refiner.load_model(out), json.loads((out / "history.json").read_text())


def measured_arm(arm: str, steps: int, longer: int, seed: int, images) -> dict:
    """Everything about one arm before and after refining; measured once."""
    done = RUNS / f"{arm}-{steps}-seed{seed}-refined{longer}.json"
    if done.is_file():
        return json.loads(done.read_text())
    before = trained_on(arm, steps, seed, images)
    after, history = refined(arm, steps, longer, seed, images)
    card = before.refiner_card
    cell = {
        "arm": arm,
        "steps": steps,
        "refine_steps": longer,
        "seed": seed,
        "loss": card["loss"],
        "recipe": card["recipe"],
        "seconds": {"mae": card["seconds"], "refine": history[-1]["seconds"]},
        "before": block_report(before, *bank_and_test()),
        "after": block_report(after, *bank_and_test()),
    }
    write_json(done, cell)
    return cell


def draw(start: dict, cells: list[dict], path: Path) -> None:
    """k-NN of every block, one panel a pooling: both arms before and after, with all seeds.

    A line is the mean over seeds, its band goes from the lowest to the highest.
    """
    fig, axes = plt.subplots(1, 2, figsize=(11, 3.8), sharey=True, layout="constrained")
    names = {"new": "new decoder (control)", "none": "no decoder"}
    poolings = (("cls", "class token"), ("patch", "patch mean"))
    for axis, (pooling, title) in zip(axes, poolings, strict=True):
        lines = [("not trained on", [start], "C7:")]
        for k, (arm, name) in enumerate(names.items()):
            steps = sorted({c["refine_steps"] for c in cells if c["arm"] == arm})
            groups = [
                [c for c in cells if (c["arm"], c["refine_steps"]) == (arm, s)] for s in steps
            ]
            lines += [(name, [c["before"] for c in group], f"C{k}o--") for group in groups[:1]]
            for count, group, look in zip(steps, groups, ("s-", "^-"), strict=False):
                label = f"{name}, refined, {count} steps"
                lines.append((label, [c["after"] for c in group], f"C{k}{look}"))
        for label, reports, style in lines:
            y_SL = 100 * torch.tensor([report[pooling]["knn"] for report in reports])
            blocks = range(1, 1 + y_SL.shape[1])
            axis.plot(blocks, y_SL.mean(0), style[2:], color=style[:2], label=label, markersize=4)
            axis.fill_between(blocks, y_SL.amin(0), y_SL.amax(0), color=style[:2], alpha=0.15, lw=0)
        axis.set(title=title, xlabel="block", ylim=(0, 100))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("k-NN accuracy on held-out Toybox, %")
    axes[1].legend(fontsize=8, loc="lower right")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=3000)
    parser.add_argument(
        "--refine",
        type=int,
        nargs="+",
        default=[160, 640],
        metavar="STEPS",
        help="the control takes the first",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", choices=tuple(ARMS), default=list(ARMS))
    parser.add_argument("--collect", action="store_true", help="only arms that were measured")
    parser.add_argument("--out", type=Path, default=RESULTS / "no_decoder.json")
    args = parser.parse_args()
    if args.collect:
        cells = [json.loads(p.read_text()) for p in sorted(RUNS.glob("*.json"))]
    else:
        images = refiner.load_images("toybox", split="train")
        cells = [
            measured_arm(arm, args.steps, longer, seed, images)
            for seed in args.seeds
            for arm in args.only
            for longer in args.refine[: 1 + (arm == "none")]
        ]
    cells.sort(key=lambda c: (c["seed"], list(ARMS).index(c["arm"]), c["refine_steps"]))
    start = block_report(refiner.load_model(START), *bank_and_test())
    found = {**header("python benchmarks/no_decoder.py"), "start": start, "cells": cells}
    write_json(args.out, found)
    draw(start, cells, args.out.with_suffix(".png"))
    for cell in cells:
        for when in ("before", "after"):
            for pooling in ("cls", "patch"):
                y = cell[when][pooling]["knn"]
                best = max(range(len(y)), key=y.__getitem__)
                name = f"{cell['arm']:>5} seed {cell['seed']}, {when} {cell['refine_steps']} steps"
                print(
                    f"{name} of refining, {pooling:>5}: last {y[-1]:.1%}, "
                    f"best {y[best]:.1%} (block {best + 1})"
                )
    print(f"wrote {args.out}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
