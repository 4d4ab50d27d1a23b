"""Before and after refining, each at its best: what no reading of the unrefined encoder gives.

    python benchmarks/fair.py                                # Toybox, with and without a decoder
    python benchmarks/fair.py --data path/to/cifar10         # CIFAR-10 as well
    python benchmarks/fair.py --also toybox=runs/controls/mae_longer  # and a control of your own

For every encoder block, pooling and transform are chosen on 4,096 train images, with the same
freedom (``refiner.best_reading``), once for each thing that is measured; 1,024 test images are
asked once. The embedded pairs have one seed.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

from measured import at_its_best, features_of, header

import refiner
from refiner.base.files import read_json, write_json

RESULTS = Path(__file__).parent / "results" / "fair.json"
PAIRS = {
    "toybox": ["mae_toybox", "mae_toybox_refined"],
    "no decoder": ["simmim_toybox", "simmim_toybox_refined"],
    "cifar10": ["mae_cifar10", "mae_cifar10_refined"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="CIFAR-10 as a folder")
    parser.add_argument("--also", nargs="*", default=[], metavar="SET=MODEL")
    parser.add_argument("--n", type=int, default=4096, help="train images")
    parser.add_argument("--n-test", type=int, default=1024, help="test images")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    pairs = {kind: list(names) for kind, names in PAIRS.items() if args.data or kind != "cifar10"}
    for item in args.also:
        kind, name = item.split("=", 1)
        pairs[kind].append(name)
    rows = read_json(args.out)["rows"] if args.out.is_file() else {}
    for kind, names in pairs.items():
        source = args.data if kind == "cifar10" else "toybox"
        train, test = (
            refiner.load_images(source, split=split, n=n, size=32, progress=False)
            for split, n in (("train", args.n), ("test", args.n_test))
        )
        for name in names:
            if name in rows.get(kind, {}):
                continue
            began = time.process_time()
            x, z = features_of(refiner.load_model(name), train, test)
            row = at_its_best(x, z, train.labels, test.labels)
            row["processor_seconds"] = round(time.process_time() - began)
            rows.setdefault(kind, {})[name] = row
            print(kind, name, row, flush=True)
            write_json(args.out, header("python benchmarks/fair.py") | {"rows": rows})


if __name__ == "__main__":
    main()
