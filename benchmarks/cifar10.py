"""CIFAR-10 from scratch without labels: MAE, then refining, and the ladder between them.

    python benchmarks/cifar10.py --preset gpu --split test          # one H200; not yet run
    python benchmarks/cifar10.py --preset cpu --data path/to/cifar10 # two cores

Rungs, all from one MAE: ``mae`` alone; ``mae_longer`` (MAE for as long again as refining takes);
``swap_both`` (NNCLR swaps positives and negatives); ``one_head`` (NNA on the last block);
``all_heads`` (NNA); and ``from_scratch`` (NNA without MAE in the same total time). On two cores
``all_heads`` sees less than half an epoch, so there are ``long_heads`` (8 times the steps) and its
own controls ``long_mae`` and ``long_scratch``. "As long" is counted in steps, by paces that are
timed side by side. All train on 45,000 train images; 5,000 are held out, and everything was chosen
on them (``--split val``, the default). ``--split test`` asks the test images once, for a result
that is to be committed.

k-NN in two conventions, over every block and both poolings: lightly's benchmark (k=200, temperature
0.1, cosine without standardising; in its table for CIFAR-10 the best is 0.910, BYOL in 401 minutes,
and NNCLR has 0.892) and this course's (k=10, 0.07, standardised). Finished rungs are kept in
``runs/cifar10`` and used again; an interrupted one goes on. ``--embedded`` takes the MAE of the cpu
preset and seed 0 from ``data/`` (``mae_cifar10``, made by this script). Results of rungs that were
not asked for stay in the file, and a figure of all blocks is drawn beside it.
"""

from __future__ import annotations

import argparse
import json
import statistics
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from measured import features_of, header, rounded

import refiner
from refiner.base.files import write_json
from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.models.mae import MAERecipe, load_mae
from refiner.training.pretraining import pretrain
from refiner.training.recipe import Recipe
from refiner.training.refining import refine
from refiner.visuals import plots

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/cifar10")
TIMED = 12  # steps timed of each training
LONGER = 8  # times the steps, for the rungs named "long"
EMBEDDED = "mae_cifar10"
DRAWN = {
    "mae": "MAE",
    "long_mae": "MAE, longer (control)",
    "mae_longer": "MAE, longer (control)",
    "from_scratch": "NNA without MAE, short (control)",
    "all_heads": "refined",
    "long_heads": f"refined, {LONGER} times the steps",
}
LONG_RUNGS = ("long_heads", "long_mae", "long_scratch")
RUNGS = ("mae", "all_heads", "one_head", "swap_both", "mae_longer", "from_scratch", *LONG_RUNGS)

_COLOUR = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "gray": 0.2,
}


@dataclass(frozen=True)
class Preset:
    """Recipes and sizes of one machine class; ``bank`` and ``queries`` limit the k-NN."""

    mae: MAERecipe
    refine: Recipe
    bank: int
    queries: int


def _views(globals_: int, locals_: int, keep: float = 1.0) -> tuple[View, ...]:
    large = View(size=32, scale=(0.3, 1.0), keep=keep, **_COLOUR)
    small = View(size=16, scale=(0.1, 0.35), **_COLOUR)
    return (large,) * globals_ + (small,) * locals_


PRESETS = {
    "cpu": Preset(
        mae=MAERecipe(steps=3000, normalize_targets=True, compile=True),
        # The swap grows late: this short an autoencoder's neighbors are mostly wrong at first.
        refine=Recipe.cpu(views=_views(2, 2, keep=0.5), swap_from=0.3, swap_full=0.9, keep="last"),
        bank=10_000,
        queries=2_000,
    ),
    "gpu": Preset(
        mae=MAERecipe(
            dim=384,
            heads=6,
            decoder_dim=192,
            decoder_depth=2,
            decoder_heads=3,
            batch=1024,
            steps=16_000,
            lr=1.5e-3,
            normalize_targets=True,
            compile=True,
        ),
        refine=Recipe(
            blocks=(8, 9, 10, 11, 12),
            hidden=1024,
            predictor_hidden=2048,
            out=256,
            views=_views(2, 4),
            batch=512,
            head_steps=400,
            steps=7_000,
            head_lr=1e-3,
            lr=1e-3,
            layer_decay=0.8,
            queue=16_384,
            top_k=10,
            ema=0.999,
            warmup=0.1,
            swap_from=0.2,
            swap_full=0.7,
        ),
        bank=45_000,
        queries=10_000,
    ),
}


def measure(model, bank, queries) -> dict:
    """Both k-NN conventions for every block and pooling, and the last block's best."""
    keys, asked = features_of(model, bank, queries)
    found = {}
    for pooling in ("cls", "patch"):
        data = keys[pooling], bank.labels, asked[pooling], queries.labels
        found[pooling] = {
            "k200": rounded(refiner.knn_accuracy(*data, k=200, temperature=0.1, standardize=False)),
            "k10": rounded(refiner.knn_accuracy(*data, k=10)),
        }
    return found


def pace(run) -> float:
    """Seconds of a step: the median between logged entries, without the first (compiling)."""
    seconds = [entry["seconds"] for entry in run.history]
    gaps = [b - a for a, b in pairwise(seconds)]
    return statistics.median(gaps) / (run.history[1]["step"] - run.history[0]["step"])


class Ladder:
    """The rungs of one preset and seed: trains each at most once."""

    def __init__(self, preset: str, seed: int, images, *, embedded: bool = False):
        self.preset, self.seed, self.images = PRESETS[preset], seed, images
        # Apart, so that results of two autoencoders never meet.
        self.folder = RUNS / preset / (f"seed{seed}" + "-embedded" * embedded)
        self.mae_recipe = replace(self.preset.mae, seed=seed)
        self.recipe = replace(self.preset.refine, seed=seed)
        self.longer = replace(self.recipe, steps=LONGER * self.recipe.steps)
        # A setting that is younger than the card has its default.
        if embedded and self.mae_recipe != MAERecipe(
            **refiner.load_model(EMBEDDED).refiner_card["recipe"]
        ):
            raise ValueError(f"{EMBEDDED} belongs to the cpu preset with seed 0")
        self.mae_name = EMBEDDED if embedded else self.folder / "mae"

    def train(self, rung: str):
        """The rung's encoder, its training seconds and its steps."""
        if rung == "mae" and self.mae_name == EMBEDDED:
            model = refiner.load_model(EMBEDDED)
            return model, model.refiner_card["seconds"], self.mae_recipe.steps
        out = self.folder / rung
        if not (out / "done.json").is_file():
            print(f"training {rung}", flush=True)
            history = getattr(self, f"_{rung}")(out)
            last = history[-1]
            write_json(out / "done.json", {"seconds": last["seconds"], "steps": last["step"]})
        done = json.loads((out / "done.json").read_text())
        return refiner.load_model(out), done["seconds"], done["steps"]

    def _mae(self, out: Path):
        return self._pretrain(out, self.mae_recipe)

    def _all_heads(self, out: Path):
        return self._refine(out, self.recipe)

    def _one_head(self, out: Path):
        return self._refine(out, replace(self.recipe, blocks=(self.recipe.blocks[-1],)))

    def _swap_both(self, out: Path):
        return self._refine(out, replace(self.recipe, swap="both"))

    def _long_heads(self, out: Path):
        return self._refine(out, self.longer)

    def _mae_longer(self, out: Path):
        return self._more_mae(out, self.recipe)

    def _long_mae(self, out: Path):
        return self._more_mae(out, self.longer)

    def _from_scratch(self, out: Path):
        return self._without_mae(out, self.recipe)

    def _long_scratch(self, out: Path):
        return self._without_mae(out, self.longer)

    def _more_mae(self, out: Path, recipe: Recipe):
        """The MAE trained on for as long as ``recipe`` takes."""
        seconds = self.paces()
        more = self._refining_seconds(recipe) / seconds["mae"]
        # A tenth of the rate: the full one would first undo the end of the first cosine.
        recipe = replace(
            self.mae_recipe,
            steps=max(1, round(more)),
            lr=self.mae_recipe.lr / 10,
            seed=self.seed + 1,
        )
        return self._pretrain(out, recipe, start=load_mae(self.mae_name))

    def _without_mae(self, out: Path, recipe: Recipe):
        """NNA on a random encoder, for as long as the MAE and ``recipe`` take together."""
        seconds = self.paces()
        both = self.mae_recipe.steps * seconds["mae"] + self._refining_seconds(recipe)
        recipe = replace(self._scratch_recipe(), steps=max(1, round(both / seconds["scratch"])))
        return self._refine(out, recipe, model=self._random())

    def _scratch_recipe(self) -> Recipe:
        views = tuple(replace(v, keep=1.0) for v in self.recipe.views)
        return replace(self.recipe, head_steps=0, frozen_blocks=0, layer_decay=1.0, views=views)

    def _random(self):
        shape = {k: getattr(self.mae_recipe, k) for k in ("size", "patch", "dim", "depth", "heads")}
        return build_vit(**shape, seed=self.seed)

    def _refining_seconds(self, recipe: Recipe) -> float:
        seconds = self.paces()
        return recipe.head_steps * seconds["heads"] + recipe.steps * seconds["refine"]

    def paces(self) -> dict[str, float]:
        """Seconds of a step of each training, timed one after the other; once, and kept.

        The times of the trainings themselves would not do: other work may have shared the machine.
        """
        kept = self.folder / "paces.json"  # a new timing must not change a resumed recipe
        if kept.is_file():
            return json.loads(kept.read_text())
        few = {"log_every": 2, "progress": False}
        model = self.train("mae")[0]
        mae = pretrain(self.images, recipe=replace(self.mae_recipe, steps=TIMED), **few)
        refined = {
            "heads": refine(
                model, self.images, recipe=replace(self.recipe, head_steps=TIMED, steps=1), **few
            ),
            "refine": refine(
                model, self.images, recipe=replace(self.recipe, head_steps=0, steps=TIMED), **few
            ),
            "scratch": refine(
                self._random(),
                self.images,
                recipe=replace(self._scratch_recipe(), steps=TIMED),
                **few,
            ),
        }
        found = {"mae": pace(mae)} | {name: pace(run) for name, run in refined.items()}
        write_json(kept, found)
        return found

    def _pretrain(self, out: Path, recipe: MAERecipe, start=None):
        resume = (out / "state.pt").is_file()
        return pretrain(self.images, recipe=recipe, start=start, out=out, resume=resume).history

    def _refine(self, out: Path, recipe: Recipe, model=None):
        model = model or self.train("mae")[0]
        resume = (out / "state.pt").is_file()
        return refine(model, self.images, recipe=recipe, out=out, resume=resume).history


def merged(out: Path, found: dict) -> dict:
    """``found`` and the cells of an earlier result of the same command that it does not have."""
    old = json.loads(out.read_text()) if out.is_file() else {}
    if all(old.get(k) == found[k] for k in ("command", "train", "bank", "queries", "split")):
        have = {(c["rung"], c["seed"]) for c in found["cells"]}
        found["cells"] += [c for c in old["cells"] if (c["rung"], c["seed"]) not in have]
    found["cells"].sort(key=lambda c: (c["seed"], RUNGS.index(c["rung"])))
    return found


def draw(cells: list[dict], path: Path) -> None:
    """k-NN (k=10) of every block, a panel a pooling; the first seed and the longest control."""
    first = {c["rung"]: c for c in cells if c["seed"] == min(c["seed"] for c in cells)}
    left_out = {"mae_longer"} if "long_mae" in first else set()
    shown = [rung for rung in DRAWN if rung in first and rung not in left_out]
    with plots.style():
        fig, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
        for ax, (pooling, name) in zip(
            axes, (("cls", "class token"), ("patch", "patch mean")), strict=True
        ):
            for i, rung in enumerate(shown):
                y = torch.tensor(first[rung][pooling]["k10"]) * 100
                ax.plot(
                    range(1, 1 + len(y)), y, label=DRAWN[rung], markersize=5, **plots.curve_style(i)
                )
            ax.set(title=f"CIFAR-10, {name}", xlabel="block")
        axes[0].set_ylabel("k-NN accuracy, %")
        axes[1].legend(loc="upper left", bbox_to_anchor=(1.02, 1))
        fig.savefig(path, dpi=90)
        plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=tuple(PRESETS), default="cpu")
    add("--data", default="cifar10", help="torchvision's CIFAR-10, or a folder train/…, test/…")
    add("--split", choices=("val", "test"), default="val")
    add("--only", nargs="+", choices=RUNGS, help="default: all, on a GPU without the long ones")
    add("--embedded", action="store_true", help=f"the MAE is {EMBEDDED} instead of a new one")
    add("--seeds", type=int, nargs="+", default=[0])
    add("--out", type=Path)
    args = parser.parse_args()
    preset = PRESETS[args.preset]
    rungs = args.only or [r for r in RUNGS if args.preset == "cpu" or r not in LONG_RUNGS]
    train, held_out = refiner.load_images(args.data, split="train", size=32).holdout(0.1)
    asked = (
        held_out if args.split == "val" else refiner.load_images(args.data, split="test", size=32)
    )
    bank, queries = (
        s[: min(n, len(s))] for s, n in ((train, preset.bank), (asked, preset.queries))
    )
    cells = []
    for seed in args.seeds:
        ladder = Ladder(args.preset, seed, train, embedded=args.embedded)
        for rung in rungs:
            model, seconds, steps = ladder.train(rung)
            kept = ladder.folder / rung / f"scores_{args.split}.json"
            if not kept.is_file():
                write_json(kept, measure(model, bank, queries))
            cell = {
                "rung": rung,
                "seed": seed,
                "embedded": args.embedded,
                "seconds": seconds,
                "steps": steps,
                **json.loads(kept.read_text()),
            }
            cells.append(cell)
            last = {p: [cell[p][k][-1] for k in ("k200", "k10")] for p in ("cls", "patch")}
            print(f"{rung}, seed {seed}, {seconds / 60:.1f} min: last block {last}", flush=True)
    name = f"cifar10_{args.preset}" + ("" if args.split == "test" else "_val")
    out = args.out or RESULTS / f"{name}.json"
    command = f"python benchmarks/cifar10.py --preset {args.preset} --split {args.split}"
    sizes = {"train": len(train), "bank": len(bank), "queries": len(queries), "split": args.split}
    found = merged(out, {**header(command), **sizes, "cells": cells})
    write_json(out, found)
    draw(found["cells"], out.with_suffix(".png"))
    print(f"wrote {out}")


if __name__ == "__main__":
    torch.set_float32_matmul_precision("high")
    main()
