"""Makes the maps that come with the course, so that its first view needs no waiting.

    python benchmarks/prepare_maps.py

UMAP of 1,024 test images for every block's class token of the embedded Toybox checkpoints, chained
from block to block. Written to ``data/maps`` as whole numbers of 16 bits, with the nearest
neighbors by which :func:`refiner.visuals.maps.prepared_maps` recognises a block on other machines.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))

import refiner
from refiner.base.files import replacing
from refiner.base.places import data_folder
from refiner.visuals.explorer_state import prepare
from refiner.visuals.maps import signature

N = 1024
MODELS = ("mae_toybox", "mae_toybox_refined")


def main() -> None:
    images = refiner.load_images("toybox", split="test", n=N)
    features = {name: refiner.extract(refiner.load_model(name), images) for name in MODELS}
    explored = prepare(images, features)
    explored.add_umap()
    unique: dict[bytes, tuple[np.ndarray, np.ndarray]] = {}  # frozen blocks occur in both models
    for table in explored.tables.values():
        for block, xy in enumerate(table.xy["umap"]):
            whole = np.round(np.asarray(xy) * 32767).astype(np.int16)
            unique.setdefault(whole.tobytes(), (signature(table.graph[block]), whole))
    signatures, points = (np.stack(part) for part in zip(*unique.values(), strict=True))
    path = data_folder() / "maps" / f"toybox_test_{N}.npz"
    with replacing(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, signatures=signatures, maps=points)
    print(f"{len(points)} maps, {path.stat().st_size / 1024:.0f} KiB: {path.name}")


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    main()
