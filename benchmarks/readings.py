"""Which reading is the best, does the choice find it, and which measure without labels would?

    python benchmarks/readings.py [--data cifar10=FOLDER clothes=FOLDER] [--n 3000] [--n-test 1000]
                                  [--only CHECKPOINT ...] [--speed]

For each image set and embedded checkpoint: the reading that train images choose, the usual one and
the best on the test images (k-NN, k = 10), and Spearman's rank correlation of every measure without
labels with the accuracy of the standardised class token and patch mean of every block. ``--speed``
measures the processor time of a choice among 144 readings of 5,000 images, 192 wide, instead.

``--data`` names folders with parts ``train`` and ``test``. What is not measured again stays as it
is in ``benchmarks/results/readings.json``.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from measured import header, rounded

import refiner
from refiner.base.files import write_json
from refiner.evaluation.advice import views_of
from refiner.probing.choosing import Candidate
from refiner.probing.features import Features
from refiner.probing.readings import STANDARDISED, Reading

RESULTS = Path(__file__).parent / "results" / "readings.json"
CHECKPOINTS = {
    "toybox": ["mae_toybox", "mae_toybox_refined", "simmim_toybox", "simmim_toybox_refined"],
    "cifar10": ["mae_cifar10", "mae_cifar10_refined"],
    "clothes": ["mae_cifar10", "mae_cifar10_refined"],
}


def load(data: str, split: str, n: int):
    """At most so many images of 32 pixels."""
    images = refiner.load_images(data, split=split, size=32, progress=False)
    return images[: min(n, len(images))]


def without_labels(model, train, x: Features, accuracy: dict) -> dict[str, dict]:
    """Each measure's rank correlation with the accuracy, and what its first choice loses."""
    ranking = refiner.rank_readings(x.rows(slice(1000)), views_of(model, train))
    known = [accuracy[Candidate(*place, STANDARDISED)] for place in ranking.places]
    return {
        measure: {
            "correlation": round(correlation, 3),
            "loses": round(max(known) - known[ranking.places.index(ranking.order(measure)[0])], 4),
        }
        for measure, correlation in ranking.agreement(known).items()
    }


def best_of_halves(choice, z: Features, labels) -> float:
    """Accuracy of the best of all readings, found on one half of the test images, on the other.

    The best on the very images that it is reported on is too good: of 144 readings one is lucky.
    """
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    halves = order.chunk(2)
    scores = [choice.on_test(z.rows(half), labels[half]) for half in halves]
    judged = [other[max(own, key=own.get)] for own, other in zip(scores, scores[::-1], strict=True)]
    return sum(a * len(half) for a, half in zip(judged, halves[::-1], strict=True)) / len(labels)


def row(name: str, checkpoint: str, train, test) -> dict:
    """Everything about one checkpoint on one image set."""
    model = refiner.load_model(checkpoint)
    x, z = (refiner.extract(model, images, progress=False) for images in (train, test))
    start = time.process_time()
    choice = refiner.best_reading(x, train.labels)
    seconds = time.process_time() - start
    tested, accuracy = choice.test(z, test.labels), choice.on_test(z, test.labels)
    best = max(accuracy, key=accuracy.get)
    fair = best_of_halves(choice, z, test.labels)
    return {
        "set": name,
        "checkpoint": checkpoint,
        "images": [len(train), len(test)],
        "chosen": str(tested.readings["best"]),
        "accuracy": round(tested.accuracy(), 4),
        "interval": rounded(tested.interval()),
        "usual": round(tested.accuracy("usual"), 4),
        "best": str(Reading.fit(x, *best)),
        "best_accuracy": round(accuracy[best], 4),
        "best_of_halves": round(fair, 4),
        "runner_up": str(tested.readings["runner_up"]),
        "real": tested.real(),
        "seconds": round(seconds, 1),
        "measures": without_labels(model, train, x, accuracy),
    }


def speed() -> dict:
    """Processor time of a choice among 12 blocks × 3 poolings × 4 transforms."""
    g = torch.Generator().manual_seed(0)
    mix = torch.randn(192, 192, generator=g)
    kinds = {kind: torch.randn(12, 5000, 192, generator=g) @ mix for kind in ("cls", "patch")}
    features, labels = Features(kinds, tuple(range(1, 13))), torch.arange(5000) % 10
    start = time.process_time()
    tried = refiner.best_reading(features, labels).scores
    spent = time.process_time() - start
    return {"readings": len(tried), "seconds": round(spent, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--n-test", type=int, default=1000)
    parser.add_argument("--only", nargs="+", metavar="CHECKPOINT")
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    found = json.loads(args.out.read_text()) if args.out.exists() else {"rows": []}
    found |= header("python benchmarks/readings.py --data cifar10=FOLDER clothes=FOLDER")
    if args.speed:
        write_json(args.out, found | {"speed": speed()})
        return
    rows = {(r["set"], r["checkpoint"]): r for r in found["rows"]}
    for name, data in ({"toybox": "toybox"} | dict(d.split("=", 1) for d in args.data)).items():
        train, test = (load(data, s, n) for s, n in (("train", args.n), ("test", args.n_test)))
        for checkpoint in (c for c in CHECKPOINTS[name] if not args.only or c in args.only):
            new = rows[name, checkpoint] = row(name, checkpoint, train, test)
            write_json(args.out, found | {"rows": list(rows.values())})
            print(json.dumps({k: v for k, v in new.items() if k != "measures"}), flush=True)


if __name__ == "__main__":
    main()
