"""Does refining help, or only training longer? Three seeds, with both controls.

    python benchmarks/refine_controls.py [--seeds 0 1 2] [--time-control] [--set steps=100 ...]
    python benchmarks/refine_controls.py --add-views   # adds a control

For each seed: the refined encoder; the unrefined one; and the MAE trained on for the same number
of steps of the same batch (with --time-control also for the same time). k-NN (k=10) of every block
on held-out Toybox images of the test split, with class token and patch mean. A step of refining
shows several views of each image, a step of the MAE one: ``--add-views`` adds the MAE trained on
for as many steps of as many masked views, which is the dearest of the controls. Writes
``benchmarks/results/refine_controls.json``.
"""

from __future__ import annotations

import argparse
import ast
import time
from dataclasses import replace
from pathlib import Path

import torch
from measured import knn_curves

import refiner
from refiner.base.files import read_json, write_json
from refiner.base.places import machine
from refiner.models.mae import MAERecipe, load_mae
from refiner.training.pretraining import pretrain
from refiner.training.recipe import Recipe, complete_recipe, recipe_dict, recipe_from
from refiner.training.refining import save_refined

RESULTS = Path(__file__).parent / "results"


def more_mae(name: str, images, *, batch: int, steps: int, seed: int):
    """The embedded MAE trained on for some steps.

    At a tenth of the rate it was made with: the full rate would first undo the end of the cosine,
    and a control has to be as good as it can be.
    """
    mae = load_mae(name)
    recipe = MAERecipe(**mae.encoder.refiner_card["recipe"])
    recipe = replace(
        recipe,
        batch=batch,
        steps=steps,
        lr=recipe.lr / 10,
        seed=1000 + seed,
        compile=False,
        ema=0.98,
    )
    return pretrain(images, recipe=recipe, start=mae, progress=False).model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="mae_toybox")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=VALUE", help="recipe changes")
    parser.add_argument(
        "--time-control", action="store_true", help="also train the MAE for the same time"
    )
    parser.add_argument(
        "--keep", type=Path, help="keep refined encoders here, and use those that are"
    )
    parser.add_argument(
        "--add-views", action="store_true", help="add the MAE of as many views to --out, no more"
    )
    parser.add_argument("--out", type=Path, default=RESULTS / "refine_controls.json")
    args = parser.parse_args()
    if args.add_views:
        return add_views(args)
    changes = {k: _literal(v) for k, v in (item.split("=", 1) for item in args.set)}
    images = refiner.load_images("toybox", split="train")
    bank, test = images[:2048], refiner.load_images("toybox", split="test", n=1024)
    model = refiner.load_model(args.model)
    before = knn_curves(model, bank, test)
    rows = []
    for seed in args.seeds:
        recipe = Recipe.cpu(seed=seed, **{"keep": "last"} | changes)
        refined, seconds = refined_model(model, images, recipe, args.keep)
        row = {
            "seed": seed,
            "seconds": round(seconds, 1),
            "refined": knn_curves(refined, bank, test),
        }
        steps = recipe.head_steps + recipe.steps
        began = time.monotonic()
        row["mae_same_steps"] = knn_curves(
            more_mae(args.model, images, batch=recipe.batch, steps=steps, seed=seed), bank, test
        )
        if args.time_control:
            longer = int(steps * seconds / (time.monotonic() - began))
            longest = more_mae(args.model, images, batch=recipe.batch, steps=longer, seed=seed)
            row["mae_same_time"] = knn_curves(longest, bank, test)
            row["mae_same_time_steps"] = longer
        rows.append(row)
        print(_line(row, before), flush=True)
    result = {
        "command": "python benchmarks/refine_controls.py"
        + (" --time-control" if args.time_control else "")
        + (f" --set {' '.join(args.set)}" if args.set else ""),
        "machine": machine(),
        "recipe": recipe_dict(Recipe.cpu(**{"keep": "last"} | changes)),
        "chance": 1 / len(images.classes),
        "before": before,
        "seeds": rows,
    }
    write_json(args.out, result)
    print(f"wrote {args.out}")


def add_views(args) -> None:
    """The control with as many views a step as refining has, for the seeds in the results."""
    images = refiner.load_images("toybox", split="train")
    bank, test = images[:2048], refiner.load_images("toybox", split="test", n=1024)
    result = read_json(args.out)
    recipe = recipe_from(result["recipe"])
    size = {"batch": recipe.batch * len(recipe.views), "steps": recipe.head_steps + recipe.steps}
    for row in result["seeds"]:
        if row["seed"] not in args.seeds or "mae_same_views" in row:
            continue
        began = time.process_time()
        longer = more_mae(args.model, images, seed=row["seed"], **size)
        row["mae_same_views"] = knn_curves(longer, bank, test)
        row["mae_same_views_processor_seconds"] = round(time.process_time() - began)
        print(_line(row, result["before"]), flush=True)
        write_json(args.out, result)


def refined_model(model, images, recipe: Recipe, keep: Path | None):
    """The refined encoder and its seconds; one kept by an interrupted call is used again."""
    recipe = complete_recipe(recipe, model, images)
    folder = keep and keep / f"seed{recipe.seed}"
    if folder and (folder / "card.json").is_file():
        kept = refiner.load_model(folder)
        if recipe_from(kept.refiner_card["refine_recipe"]) == recipe:
            return kept, kept.refiner_card["seconds"]
    run = refiner.refine(model, images, recipe=recipe)
    if folder:
        save_refined(run, folder, model)
    return run.model, run.history[-1]["seconds"]


def _literal(text: str):
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def _line(row: dict, before: dict) -> str:
    names = [
        n for n in ("refined", "mae_same_steps", "mae_same_views", "mae_same_time") if n in row
    ]
    last = lambda s: f"{s['cls'][-1]:.3f}/{s['patch'][-1]:.3f}"  # noqa: E731
    cells = [f"before {last(before)}"] + [f"{n} {last(row[n])}" for n in names]
    return f"seed {row['seed']} ({row['seconds']:.0f} s), last block cls/patch: " + ", ".join(cells)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
