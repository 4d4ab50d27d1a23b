"""Is the sentence that refining ends with right, judged on test images?

    python benchmarks/verdicts.py [--data toybox=toybox clothes=FOLDER] [--seeds 0 1 2 3 4]

Refines ``mae_toybox`` on Toybox and ``mae_cifar10`` on a folder of clothes (parts ``train`` and
``test``) with the cpu preset. Then the models before, kept and at the end of training are read by
what their train images choose, and asked about the test images (k-NN, k = 10). A verdict is right
if the difference on test lies within the interval that it was given with; ``sides`` says whether
the two differ on test in the direction that "keep" claims.

Each run is written to ``benchmarks/results/verdicts.json`` as soon as it is done, and not repeated.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path

import torch
from measured import header, rounded

import refiner
from refiner.base.files import write_json
from refiner.models.load import copy_model
from refiner.probing.choosing import bootstrap
from refiner.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "verdicts.json"
MODELS = {"toybox": "mae_toybox", "clothes": "mae_cifar10"}


def right_on_test(model, train, test) -> tuple[torch.Tensor, str]:
    """Which test images the reading that train images choose gets right, [M], and its name."""
    x, z = (refiner.extract(model, images, progress=False) for images in (train, test))
    tested = refiner.best_reading(x, train.labels).test(z, test.labels)
    return tested.right["best"][0].double(), str(tested.readings["best"])


def judged(before, after) -> dict:
    """What a model gains on test over the one before."""
    (old, _), (new, reading) = before, after
    return {
        "reading": reading,
        "accuracy": round(float(new.mean()), 4),
        "gain": round(float((new - old).mean()), 4),
        "interval": rounded(bootstrap((new - old)[None])),
    }


def row(name: str, seed: int, train, test, bank: int) -> dict:
    """One refinement, its verdict, and what the test images say to it."""
    model, last = refiner.load_model(MODELS[name]), []
    recipe = Recipe.cpu(seed=seed)
    run = refiner.refine(
        model,
        train,
        recipe=recipe,
        evaluate=lambda m: last.append(copy_model(m)) or {},
        evaluate_every=recipe.steps,
        progress=False,
    )
    some = train[: min(bank, len(train))]
    before, kept, end = (right_on_test(m, some, test) for m in (model, run.model, last[-1]))
    found = {"kept": judged(before, kept), "end": judged(before, end)}
    low, high = run.verdict.gain
    claimed = found["end" if run.verdict.kept == "before" else "kept"]["gain"]
    return {
        "set": name,
        "seed": seed,
        "images": [len(train), len(test)],
        "seconds": run.history[-1]["seconds"],
        "verdict": asdict(run.verdict) | {"sentence": str(run.verdict)},
        "followed": [[e["step"], e["held_out"]] for e in run.history if "held_out" in e],
        "before": {"reading": before[1], "accuracy": round(float(before[0].mean()), 4)},
        **found,
        "right": bool(low <= claimed <= high),
        "sides": bool(claimed * low > 0) if run.verdict.real else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="*", default=["toybox=toybox"], metavar="NAME=FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--bank", type=int, default=4096, help="train images to read by")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    for name, data in (pair.split("=", 1) for pair in args.data):
        train, test = (
            refiner.load_images(data, split=split, size=32, progress=False)
            for split in ("train", "test")
        )
        for seed in args.seeds:
            found = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
            if any((r["set"], r["seed"]) == (name, seed) for r in found["rows"]):
                continue
            new = row(name, seed, train, test, args.bank)
            found |= header("python benchmarks/verdicts.py --data toybox=toybox clothes=FOLDER")
            write_json(args.out, found | {"rows": [*found["rows"], new]})
            print(json.dumps(new), flush=True)


if __name__ == "__main__":
    main()
