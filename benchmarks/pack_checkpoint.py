"""Packs a run's folder into an embedded checkpoint of the course: half precision, with its card.

    python benchmarks/pack_checkpoint.py runs/mae_toybox --command "refiner pretrain --out …"

Writes ``data/<name>.safetensors`` (encoder, and decoder where there is one) and
``data/<name>.json``, the card, with the k-NN accuracy of every block on Toybox's test split,
measured from the packed file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from safetensors.torch import save_file

import refiner
from refiner.files import replacing, write_json
from refiner.models import data_folder, load_model, read_checkpoint
from refiner.training import machine


def measure(model) -> dict[str, object]:
    """k-NN (k=10, 4,096 bank images) of every block on 2,048 test images, both poolings."""
    bank, test = (
        refiner.load_images("toybox", split="train", n=4096),
        refiner.load_images("toybox", split="test", n=2048),
    )
    keys, queries = refiner.extract(model, bank), refiner.extract(model, test)
    score = {
        pooling: refiner.knn_accuracy(keys[pooling], bank.labels, queries[pooling], test.labels)
        for pooling in ("cls", "patch")
    }
    return {
        "knn_" + pooling: [round(float(v), 4) for v in value] for pooling, value in score.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the folder")
    parser.add_argument("--name", help="default: the folder's name")
    args = parser.parse_args()
    name = args.name or args.folder.name
    card, encoder, decoder = read_checkpoint(args.folder)
    state = encoder | decoder
    target = data_folder() / f"{name}.safetensors"
    with replacing(target) as temporary:
        save_file({k: v.half().contiguous() for k, v in state.items()}, temporary)
    card |= {"name": name, "command": args.command, "results": {}}
    write_json(target.with_suffix(".json"), card)
    card["results"] = measure(load_model(name)) | {"measured_on": machine()}
    write_json(target.with_suffix(".json"), card)
    print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB, {card['results']}")


if __name__ == "__main__":
    main()
