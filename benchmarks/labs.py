"""Images from several labs, labels from some of them: what refining brings, and what misleads it.

    python benchmarks/labs.py                       # all rungs, three seeds: hours on two cores
    python benchmarks/labs.py --rungs one_lab --seeds 0

Six labs of ``toybox-labs`` without labels; the bank's labels are of labs 0 to 2, the queries come
from labs 3 to 5. All start from ``mae_toybox``, which has seen none of these labs. The rungs:

* ``before``: ``mae_toybox`` itself;
* ``more_mae``: the autoencoder trained on, on all six labs' images, for as many processor seconds
  as ``one_lab`` takes;
* ``long_mae``: the autoencoder trained on for 4,000 steps (``refiner pretrain --start mae_toybox
  --data toybox-labs --n 16320 --set steps=4000 --out runs/mae_labs``);
* ``long_more_mae``, ``long_refined``, ``long_nna``: from there on as ``more_mae``, as ``one_lab``,
  and with neighbors as positives from the start, one lab a batch;
* ``nna_mixed``: neighbors as positives from the start, all labs in each batch;
* ``mixed``: plain instance discrimination, all labs in each batch;
* ``one_lab``: the same with every batch from one lab (``Recipe.labs``);
* ``four_labs``: four labs a batch, each compared by itself;
* ``other_labs``: one lab a batch, neighbors from other labs, swapped in more and more;
* ``narrow``: one lab a batch, and views that change colours as little as the labs do not.

Each is read as well as can be without training: block, pooling and transform are chosen on the
bank, each of its labs asked of the other two (``best_reading(..., groups=lab)``), once as they are
and once without each lab's mean and deviation. A finished rung is kept in ``runs/labs``,
and an interrupted one goes on.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path

import torch
from measured import at_its_best, header, rounded

import refiner
from refiner.base.files import read_json, write_json
from refiner.images.views import View
from refiner.models.mae import MAERecipe, load_mae
from refiner.probing.features import Features
from refiner.probing.readings import Reading
from refiner.training.pretraining import pretrain
from refiner.training.recipe import Recipe

RESULTS = Path(__file__).parent / "results" / "labs.json"
RUNS = Path("runs")
KNOWN, NEW = (0, 1, 2), (3, 4, 5)
RUNGS = (
    "before",
    "long_mae",
    "more_mae",
    "nna_mixed",
    "mixed",
    "one_lab",
    "four_labs",
    "other_labs",
    "narrow",
    "long_more_mae",
    "long_refined",
    "long_nna",
)


def recipe_of(rung: str, seed: int) -> Recipe:
    """The recipe of a rung; all have the same number of steps and views."""
    labs = Recipe.labs(seed=seed)
    mild = {"jitter": 0.8, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2, "hue": 0.05}
    plain = [View(size=v.size, scale=v.scale, keep=v.keep, gray=0.0, **mild) for v in labs.views]
    changes = {
        "nna_mixed": {"swap": "neighbor", "groups_a_step": 0},
        "mixed": {"groups_a_step": 0},
        "one_lab": {},
        "long_refined": {},
        "long_nna": {"swap": "neighbor"},
        "four_labs": {"groups_a_step": 4},
        "other_labs": {
            "swap": "neighbor",
            "swap_from": 0.2,
            "swap_full": 0.8,
            "neighbors_from": "others",
        },
        "narrow": {"views": tuple(plain)},
    }
    return replace(labs, **changes[rung])


# ---------------------------------------------------------------- what is measured


def measure(model, bank, queries, own) -> dict:
    """Everything the table says about an encoder.

    Args:
        model: the encoder.
        bank: labelled images of some labs.
        queries: test images of the others.
        own: labelled images of the queries' labs.
    """
    x, z, o = (refiner.extract(model, images, progress=False) for images in (bank, queries, own))
    labs = [images.factors["lab"] for images in (bank, queries)]
    alike = (refiner.standardize_groups(f, lab) for f, lab in zip((x, z), labs, strict=True))
    sides = bank.labels, queries.labels, labs[0]
    found = {"as they are": at_its_best(x, z, *sides), "per lab": at_its_best(*alike, *sides)}
    choice = refiner.best_reading(o, own.labels)
    found["knn_own_labs"] = rounded([choice.test(z, queries.labels).accuracy()])[0]
    return found | {"lab_read": lab_read(z, choice.reading, labs[1])}


def lab_read(z: Features, reading: Reading, lab) -> float:
    """How well a linear probe tells the queries' labs, trained on every other query."""
    x, lab = reading.apply(z), torch.as_tensor(lab).long()
    probe = refiner.linear_probe(x[::2], lab[::2], x[1::2], lab[1::2])
    return round(float(probe.accuracy), 4)


# ---------------------------------------------------------------- what is trained


def trained(rung: str, seed: int, images, start: str, steps: int | None):
    """A rung's encoder and its processor seconds; finished ones are read, others go on."""
    folder = RUNS / "labs" / f"{rung}-{seed}"
    seconds = folder / "processor_seconds.json"
    if seconds.is_file():
        return refiner.load_model(folder), read_json(seconds)["seconds"]
    began = time.process_time()
    if rung.endswith("more_mae"):
        model = more_mae(images, start, seed, folder)
    else:
        recipe = recipe_of(rung, seed)
        recipe = replace(recipe, steps=steps) if steps else recipe
        run = refiner.refine(
            refiner.load_model(start),
            images,
            recipe=recipe,
            groups="lab",
            out=folder,
            resume=resumes(folder),
        )
        model = run.model
    spent = {"seconds": round(time.process_time() - began, 1)}
    write_json(seconds, spent)
    return model, spent["seconds"]


def resumes(folder: Path) -> bool:
    return (folder / "state.pt").is_file()


def more_mae(images, start: str, seed: int, folder: Path):
    """The autoencoder trained on for as long as ``one_lab`` of the same seed took."""
    limit = read_json(RUNS / "labs" / f"one_lab-{seed}" / "processor_seconds.json")["seconds"]
    mae = load_mae(start)
    recipe = replace(
        MAERecipe(**mae.encoder.refiner_card["recipe"]), compile=False, seed=1000 + seed, ema=0.98
    )
    began = time.process_time()
    pretrain(images, recipe=replace(recipe, steps=10), start=mae, progress=False)
    steps = round(10 * limit / (time.process_time() - began))
    recipe = replace(recipe, steps=steps, lr=recipe.lr / 3)
    return pretrain(images, recipe=recipe, start=mae, out=folder, resume=resumes(folder)).model


def rows_of(path: Path) -> dict:
    return read_json(path)["rows"] if path.is_file() else {}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rungs", nargs="+", choices=RUNGS, default=RUNGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="of stage 3, to try it out")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    options = {"progress": False}
    images = refiner.load_images("toybox-labs", n=16_320, **options)
    bank = refiner.load_images("toybox-labs", labs=KNOWN, n=2496, **options)
    own = refiner.load_images("toybox-labs", labs=NEW, n=2496, **options)
    queries = refiner.load_images("toybox-labs", split="test", labs=NEW, n=1008, **options)
    for seed in args.seeds:
        for rung in sorted(args.rungs, key=lambda r: (r.endswith("more_mae"), RUNGS.index(r))):
            name = rung if rung in ("before", "long_mae") else f"{rung}-{seed}"
            if name in rows_of(args.out):
                continue
            start = str(RUNS / "mae_labs") if rung.startswith("long") else "mae_toybox"
            if name == rung:
                model, seconds = refiner.load_model(start), 0.0
            else:
                model, seconds = trained(rung, seed, images, start, args.steps)
            row = {"processor_seconds": seconds} | measure(model, bank, queries, own)
            said = {how: row[how]["knn"] for how in ("as they are", "per lab")}
            print(name, said, row["knn_own_labs"], f"{seconds:.0f} s", flush=True)
            rows = rows_of(args.out) | {name: row}  # read again: another process may have written
            write_json(args.out, header("python benchmarks/labs.py") | {"rows": rows})
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
