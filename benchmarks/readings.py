"""Which reading is the best, does the choice find it, and which measure without labels would?

    python benchmarks/readings.py [--data cifar10=FOLDER clothes=FOLDER] [--n 3000] [--n-test 2000]

For each image set and embedded checkpoint: the reading that train images choose, the usual one and
the best on the test images (k-NN, k = 10), and Spearman's rank correlation of every measure without
labels with the accuracy of the standardised class token and patch mean of every block. Then the
processor time of a choice among 144 readings of 5,000 images, 192 wide.

``--data`` names folders with parts ``train`` and ``test``; sets that are not named keep the rows
that they have in ``benchmarks/results/readings.json``.
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
from refiner.base.tensors import step_generator
from refiner.images.views import View, make_view
from refiner.probing.choosing import Candidate, Choice, by_knn
from refiner.probing.features import Features
from refiner.probing.readings import Reading, Transform

RESULTS = Path(__file__).parent / "results" / "readings.json"
CHECKPOINTS = {
    "toybox": ["mae_toybox", "mae_toybox_refined", "simmim_toybox", "simmim_toybox_refined"],
    "cifar10": ["mae_cifar10", "mae_cifar10_refined"],
    "clothes": ["mae_cifar10", "mae_cifar10_refined", "mae_toybox"],
}
VIEW = View(size=32, scale=(0.3, 1.0), jitter=0.8, brightness=0.4, contrast=0.4, saturation=0.4)
VIEWS, SEEN = 4, 400  # views an image, and of how many images


def load(data: str, split: str, n: int):
    """At most so many images of 32 pixels."""
    images = refiner.load_images(data, split=split, size=32, progress=False)
    return images[: min(n, len(images))]


def on_test(choice: Choice, z: Features, t: torch.Tensor) -> dict[Candidate, float]:
    """k-NN accuracy of every candidate on the test images."""
    found = {}
    for candidate in choice.scores:
        reading = Reading.fit(choice.features, *candidate)
        right = by_knn().right(reading.apply(choice.features), choice.labels, reading.apply(z), t)
        found[candidate] = float(right.double().mean())
    return found


def without_labels(model, train, x: Features, accuracy: dict) -> dict[str, dict]:
    """Each measure's rank correlation with the accuracy, and what its first choice loses."""
    views = [
        refiner.extract(
            model,
            make_view(train.images[:SEEN], VIEW, step_generator(0, v)).mul(255).byte(),
            progress=False,
        )
        for v in range(VIEWS)
    ]
    some = Features({kind: f[..., :1000, :] for kind, f in x.items()}, x.blocks)
    ranking = refiner.rank_readings(some, views)
    known = [accuracy[Candidate(*place, Transform())] for place in ranking.places]
    return {
        measure: {
            "correlation": round(correlation, 3),
            "loses": round(max(known) - known[ranking.places.index(ranking.order(measure)[0])], 4),
        }
        for measure, correlation in ranking.agreement(known).items()
    }


def row(name: str, checkpoint: str, train, test) -> dict:
    """Everything about one checkpoint on one image set."""
    model = refiner.load_model(checkpoint)
    x, z = (refiner.extract(model, images, progress=False) for images in (train, test))
    start = time.process_time()
    choice = refiner.best_reading(x, train.labels)
    seconds = time.process_time() - start
    tested, accuracy = choice.test(z, test.labels), on_test(choice, z, test.labels)
    best = max(accuracy, key=accuracy.get)
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
    start, clock = time.process_time(), time.monotonic()
    tried = refiner.best_reading(features, labels).scores
    spent = time.process_time() - start
    return {"readings": len(tried), "seconds": round(spent, 1), "clock": time.monotonic() - clock}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", nargs="+", default=[], metavar="NAME=FOLDER")
    parser.add_argument("--n", type=int, default=3000)
    parser.add_argument("--n-test", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    args = parser.parse_args()
    torch.set_num_threads(1)
    sources = {"toybox": "toybox"} | dict(text.split("=", 1) for text in args.data)
    before = json.loads(args.out.read_text())["rows"] if args.out.exists() else []
    rows = {(r["set"], r["checkpoint"]): r for r in before}
    found = header("python benchmarks/readings.py --data cifar10=FOLDER clothes=FOLDER")
    found["speed"] = speed()
    print(found["speed"], flush=True)
    for name, data in sources.items():
        train, test = (load(data, s, n) for s, n in (("train", args.n), ("test", args.n_test)))
        for checkpoint in CHECKPOINTS[name]:
            new = rows[name, checkpoint] = row(name, checkpoint, train, test)
            write_json(args.out, {**found, "rows": list(rows.values())})
            print(json.dumps({k: v for k, v in new.items() if k != "measures"}), flush=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
