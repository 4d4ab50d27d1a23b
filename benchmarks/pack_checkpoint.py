"""Packs a run's folder into an embedded checkpoint of the course: half precision, with its card.

    python benchmarks/pack_checkpoint.py runs/mae_toybox --command "refiner pretrain --out …"

Writes ``data/<name>.safetensors`` (encoder, and decoder where there is one),
``data/heads/<name>.safetensors`` (ID heads and queue of a refined one) and the card
``data/<name>.json`` with what every block scores on held-out images, measured from the packed file.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from measured import block_report
from safetensors.torch import save_file

import refiner
from refiner.base.files import replacing, write_json
from refiner.base.places import data_folder, machine
from refiner.models.load import load_model, read_checkpoint
from refiner.training.states import load_state


def measure(model, data: str) -> dict[str, object]:
    """:func:`measured.block_report` with 4,096 images in the bank and 2,048 test images."""
    bank, test = (
        refiner.load_images(data, split=s, n=n, size=32)
        for s, n in (("train", 4096), ("test", 2048))
    )
    return {"bank": len(bank), "test": len(test), **block_report(model, bank, test)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--command", required=True, help="the command that made the folder")
    parser.add_argument("--data", default="toybox", help="image set or folder to measure on")
    parser.add_argument("--name", help="default: the folder's name")
    args = parser.parse_args()
    name = args.name or args.folder.name
    card, encoder, decoder = read_checkpoint(args.folder)
    state = encoder | decoder
    target = data_folder() / f"{name}.safetensors"
    with replacing(target) as temporary:
        save_file({k: v.half().contiguous() for k, v in state.items()}, temporary)
    heads = args.folder / "heads.pt"
    if heads.is_file():
        packed = {
            k: (v.half() if v.is_floating_point() else v).contiguous()
            for k, v in load_state(heads).items()
        }
        with replacing(target.parent / "heads" / target.name) as temporary:
            save_file(packed, temporary)
    card |= {"name": name, "command": args.command, "results": {}}
    write_json(target.with_suffix(".json"), card)
    card["results"] = measure(load_model(name), args.data) | {"measured_on": machine()}
    write_json(target.with_suffix(".json"), card)
    print(f"{target.name}: {target.stat().st_size / 1e6:.1f} MB; last block:")
    for pooling in ("cls", "patch"):
        row = card["results"][pooling]
        print(pooling, {k: v[-1] for k, v in row.items() if k != "factors"})


if __name__ == "__main__":
    main()
