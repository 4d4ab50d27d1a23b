"""k-NN, linear probe and attentive probe (EP) of every block, and where the queries look.

    python benchmarks/attentive.py [--models simmim_toybox mae_toybox "random weights"]
                                   [--n 2048] [--n-test 1024]

Of ``mae_toybox`` and of the control with random weights some blocks are measured, of others all. k
and temperature, penalty and learning rate are chosen on train images; the accuracies are of the
test images. A model that was measured is kept in ``runs/attentive`` and not measured again. Writes
``benchmarks/results/attentive.json`` and a figure beside it.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from measured import header, rounded

import refiner
from refiner.base.files import write_json
from refiner.models.load import random_like
from refiner.probing.attentive import AttentiveProbe
from refiner.probing.features import NAMES
from refiner.visuals import plots

RESULTS = Path(__file__).parent / "results"
RUNS = Path("runs/attentive")
CONTROL = "random weights"
SHOWN = range(4)  # test images under the curves
BLOCKS = {"mae_toybox": (3, 6, 9, 12), CONTROL: (3, 12)}


def measured(name: str, train, test) -> dict:
    """Accuracies of every block by each reading, and the attentive probe itself."""
    done = RUNS / f"{name}-{len(train)}-{len(test)}.pt"
    if done.is_file():
        return torch.load(done, weights_only=False)
    model, began = encoder(name), time.process_time()
    which = {"blocks": BLOCKS.get(name), "progress": False}
    keys, queries = (refiner.extract(model, images, **which) for images in (train, test))
    found = {"model": name, "blocks": list(keys.blocks), "knn": {}, "linear": {}}
    for pooling in ("cls", "patch"):
        data = keys[pooling], train.labels, queries[pooling], test.labels
        found["knn"][pooling] = rounded(refiner.knn_swept(*data).accuracy)
        found["linear"][pooling] = rounded(refiner.linear_probe(*data).accuracy)
    between = time.process_time()
    probe = refiner.attentive_probe(model, train, test, blocks=BLOCKS.get(name))
    found["ep"] = {"accuracy": rounded(probe.accuracy), "rate": rounded(probe.rate)}
    found["seconds"] = {
        "k-NN and linear": round(between - began, 1),
        "ep": round(time.process_time() - between, 1),
    }
    RUNS.mkdir(parents=True, exist_ok=True)
    torch.save((found, probe), done)
    return found, probe


def encoder(name: str):
    """An embedded encoder, or one of the same shape that has learnt nothing."""
    return (
        random_like(refiner.load_model("simmim_toybox"))
        if name == CONTROL
        else refiner.load_model(name)
    )


def draw(cells: list[tuple[dict, AttentiveProbe]], test, path: Path) -> None:
    """Above every block's accuracy, below the queries of the block where EP gains most."""
    with plots.style():
        size = 6.4 * len(cells), 7.6
        fig, axes = plt.subplots(2, len(cells), figsize=size, layout="constrained", squeeze=False)
        for (cell, probe), curves, maps in zip(cells, *axes, strict=True):
            lines = {"attentive (EP)": cell["ep"]["accuracy"]}
            for part, words in (("linear", "linear"), ("knn", "k-NN")):
                lines |= {f"{words}, {NAMES[p]}": cell[part][p] for p in ("cls", "patch")}
            plots.block_curve(
                lines, chance=1 / 16, blocks=cell["blocks"], title=cell["model"], ax=curves
            )
            i = best_gain(cell)
            shown = test[list(SHOWN)]
            attention = probe.attention(encoder(cell["model"]), shown)[i]
            plots.query_maps(shown, attention, title=f"Queries at block {probe.blocks[i]}", ax=maps)
        fig.savefig(path, dpi=90)
        plt.close(fig)


def best_gain(cell: dict) -> int:
    """The block, from 0, where EP is farthest above the better of the two linear probes."""
    better = map(max, *cell["linear"].values())
    gains = [a - b for a, b in zip(cell["ep"]["accuracy"], better, strict=True)]
    return max(range(len(gains)), key=gains.__getitem__)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=["simmim_toybox", "mae_toybox", CONTROL])
    parser.add_argument("--n", type=int, default=2048)
    parser.add_argument("--n-test", type=int, default=1024)
    args = parser.parse_args()
    torch.set_num_threads(1)
    train = refiner.load_images("toybox", n=args.n)
    test = refiner.load_images("toybox", split="test", n=args.n_test)
    cells = [measured(name, train, test) for name in args.models]
    sizes = {"images": {"train": len(train), "test": len(test)}}
    found = {**header("python benchmarks/attentive.py"), **sizes, "cells": [c for c, _ in cells]}
    write_json(RESULTS / "attentive.json", found)
    draw([c for c in cells if c[0]["model"] != CONTROL], test, RESULTS / "attentive.png")
    for cell, _ in cells:
        print(cell["model"], cell)


if __name__ == "__main__":
    main()
