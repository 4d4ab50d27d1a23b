"""CIFAR-10 at length on one core: does refining go on where masked training stops?

    python benchmarks/length.py --data path/to/cifar10 --rung refined  # hours; goes on
    python benchmarks/length.py --data path/to/cifar10 --rung more_mae
    python benchmarks/length.py --data path/to/cifar10 --measure

Both start from ``mae_cifar10`` and see 45,000 train images without labels; their cost is counted in
processor seconds of one core. ``refined`` has heads on the class token and the patch mean of late
blocks by turns, trains every block, and swaps neighbors in late. ``more_mae`` trains the
autoencoder on, at its first rate. ``refined_after`` refines what ``more_mae`` ended with.

Every few hundred steps the averaged encoder is kept in ``runs/length``; ``--measure`` reads each
kept one at its best (block, pooling and transform are chosen on train images, ``fair.py``'s
freedom) and asks the test images. A point on the way stands at a high learning rate, so that the
ends of the curves are what counts. Writes ``results/length.json``.
"""

from __future__ import annotations

import argparse
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import torch
from cifar10 import EMBEDDED, PRESETS
from measured import at_its_best, features_of, header, rounded

import refiner
from refiner.base.files import read_json, write_json
from refiner.models.mae import MAERecipe, load_mae
from refiner.training.pretraining import pretrain

RESULTS = Path(__file__).parent / "results" / "length.json"
RUNS = Path("runs/length")
RUNGS = ("refined", "more_mae", "refined_after")
EVERY = {"refined": 200, "refined_after": 200, "more_mae": 1500}  # steps between kept encoders


def recipe_of(rung: str, steps: int | None):
    """The recipe of a rung; ``steps`` shortens it, to try it out."""
    if rung == "more_mae":
        recipe = MAERecipe(**refiner.load_model(EMBEDDED).refiner_card["recipe"])
        changes = {"steps": steps or 12_000, "compile": False, "seed": 1}
    else:
        recipe = PRESETS["cpu"].refine
        changes = {
            "pooling": ("cls", "patch", "cls", "patch"),
            "steps": steps or 1600,
            "head_steps": 60,
            "lr": 4e-3,
            "layer_decay": 0.85,
            "frozen_blocks": 0,
            "warmup": 0.05,
            "ema": 0.99,
        }
    return type(recipe)(**(vars(recipe) | changes))


def trainer(rung: str, images, steps: int | None, folder: Path) -> Callable[..., object]:
    """The rung's training as a function of ``resume`` and ``stop``."""
    options = {"recipe": recipe_of(rung, steps), "out": folder, "save_every": EVERY[rung]}
    if rung == "more_mae":
        return lambda **how: pretrain(images, start=load_mae(EMBEDDED), **options, **how)
    start = refiner.load_model(EMBEDDED if rung == "refined" else RUNS / "more_mae")
    return lambda **how: refiner.refine(start, images, **options, **how)


def train(rung: str, images, steps: int | None, until: float) -> None:
    """Trains in pieces; each piece ends with a kept encoder and the processor seconds so far."""
    folder = RUNS / rung
    run, recipe = trainer(rung, images, steps, folder), recipe_of(rung, steps)
    total = recipe.steps + getattr(recipe, "head_steps", 0)
    kept = read_json(folder / "kept.json") if (folder / "kept.json").is_file() else {}
    while (done := max(map(int, kept), default=0)) < total and time.monotonic() < until:
        asked = [0]

        def enough(asked=asked) -> bool:
            asked[0] += 1
            return asked[0] > EVERY[rung] or time.monotonic() > until

        began = time.process_time()
        taken = run(resume=(folder / "state.pt").is_file(), stop=enough).steps
        spent = kept.get(str(done), 0) + time.process_time() - began
        shutil.copytree(
            folder,
            folder / f"at{taken}",
            ignore=shutil.ignore_patterns("*state*", "at*", "kept.json"),
        )
        kept[str(taken)] = round(spent, 1)
        write_json(folder / "kept.json", kept)
        print(rung, taken, "steps", f"{spent / 60:.1f} processor minutes", flush=True)


def measure(name: str | Path, bank, queries, *, whole: bool) -> dict:
    """An encoder at its best reading: by k-NN alone or, if ``whole``, all of the fair table."""
    x, z = features_of(refiner.load_model(name), bank, queries)
    if whole:
        return at_its_best(x, z, bank.labels, queries.labels)
    tested = refiner.best_reading(x, bank.labels).test(z, queries.labels)
    return {
        "reading": str(tested.readings["best"]),
        "knn": round(tested.accuracy(), 4),
        "interval": rounded(tested.interval()),
        "usual": round(tested.accuracy("usual"), 4),
    }


def points(rung: str) -> list[tuple[int, float, Path]]:
    """A rung's kept encoders: steps, processor seconds from the common start, folder."""
    before = points("more_mae")[-1][1] if rung == "refined_after" else 0.0
    kept = read_json(RUNS / rung / "kept.json")
    return [(int(k), before + s, RUNS / rung / f"at{k}") for k, s in kept.items()]


def measure_all(data: str, n: int, n_test: int, out: Path) -> None:
    """Measures what was not measured yet; the start and each rung's last encoder as a whole."""
    bank, queries = (
        refiner.load_images(data, split=split, n=k, size=32, progress=False)
        for split, k in (("train", n), ("test", n_test))
    )
    rows = read_json(out)["rows"] if out.is_file() else {}
    wanted = [("before", 0, 0.0, EMBEDDED, True)]
    for rung in RUNGS:
        if (RUNS / rung / "kept.json").is_file():
            all_of = points(rung)
            wanted += [(f"{rung}-{k}", k, s, at, at == all_of[-1][2]) for k, s, at in all_of]
    for name, steps, seconds, at, whole in wanted:
        if name in rows and (not whole or "linear" in rows[name]):
            continue
        cost = {"steps": steps, "processor_seconds": round(seconds)}
        rows[name] = cost | measure(at, bank, queries, whole=whole)
        print(name, rows[name], flush=True)
        sizes = {"bank": len(bank), "test": len(queries)}
        command = "python benchmarks/length.py --data path/to/cifar10 --measure"
        write_json(out, header(command) | sizes | {"rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", required=True, help="CIFAR-10 as a folder")
    parser.add_argument("--rung", choices=RUNGS)
    parser.add_argument("--steps", type=int, help="of the rung's training, to try it out")
    parser.add_argument(
        "--minutes", type=float, default=1e6, help="stop then; a later call goes on"
    )
    parser.add_argument("--measure", action="store_true")
    parser.add_argument("--n", type=int, default=4096, help="labelled train images to read by")
    parser.add_argument("--n-test", type=int, default=4096, help="test images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.rung:
        until = time.monotonic() + 60 * args.minutes
        images, _ = refiner.load_images(args.data, split="train", size=32).holdout(0.1)
        train(args.rung, images, args.steps, until)
    if args.measure:
        measure_all(args.data, args.n, args.n_test, args.out)


if __name__ == "__main__":
    main()
