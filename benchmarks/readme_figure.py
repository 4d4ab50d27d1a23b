"""Draws the figure of README and docs/results.md from committed results and checkpoints.

    python benchmarks/readme_figure.py

Left: k-NN of every block before and after refining, and after more MAE training, three seeds, from
``benchmarks/results/refine_controls.json``. Right: UMAP of 1,024 test images before and after.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import refiner
from refiner.visuals import plots
from refiner.visuals.maps import umap_embedding

HERE = Path(__file__).parent


def maps(images) -> dict[str, np.ndarray]:
    """UMAP of the last block's class token, the second map starting from the first."""
    found, start = {}, None
    for name in ("mae_toybox", "mae_toybox_refined"):
        x = refiner.extract(refiner.load_model(name), images)["cls"][-1]
        x = (x - x.mean(0)) / x.std(0)
        graph = refiner.nearest_neighbors(x, x, k=20, exclude_self=True)
        start = found[name] = umap_embedding(x, graph, init=start)
    return found


def spread(results: dict, key: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and standard deviation over the seeds, per block."""
    seeds = np.array([row[key]["cls"] for row in results["seeds"]])
    return seeds.mean(0), seeds.std(0)


def main() -> None:
    plots.style()
    results = json.loads((HERE / "results" / "refine_controls.json").read_text())
    images = refiner.load_images("toybox", split="test", n=1024)
    figure, axes = plt.subplots(1, 3, figsize=(15, 4.4), width_ratios=(1.2, 1, 1))
    curves = {"refined": spread(results, "refined")}
    curves["before"] = results["before"]["cls"]
    curves["more MAE training (control)"] = spread(results, "mae_same_steps")
    plots.block_curve(
        curves,
        ylabel="k-NN accuracy (class token)",
        chance=results["chance"],
        title="Held-out Toybox images, 3 seeds",
        best=False,
        ax=axes[0],
    )
    axes[0].legend(loc="upper left")
    names = {"mae_toybox": "last block, before", "mae_toybox_refined": "last block, after"}
    found = {names[name]: xy for name, xy in maps(images).items()}
    plots.embedding(found, images.labels, images.classes, ax=axes[1:])
    figure.tight_layout()
    figure.savefig(HERE / "results" / "before_after.png", dpi=90)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
