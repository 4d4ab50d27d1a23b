"""What the training studies report about an encoder: one function, shared by their scripts."""

from __future__ import annotations

import importlib
import sys
from functools import lru_cache
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))  # refiner need not be installed

import refiner
from refiner.base.places import machine
from refiner.probing.features import Features
from refiner.probing.readings import STANDARDISED

SHOTS = (1, 2, 5)


def rounded(values) -> list[float]:
    """Plain numbers for JSON, four digits."""
    return [round(float(v), 4) for v in values]


def features_of(model, bank, test):
    """Features of the labelled bank and of the held-out images."""
    return tuple(refiner.extract(model, s, progress=False) for s in (bank, test))


def knn_curves(model, bank, test) -> dict[str, list[float]]:
    """k-NN accuracy (k=10) of each block: ``{"cls": [L], "patch": [L]}``."""
    keys, queries = features_of(model, bank, test)
    return {
        p: rounded(refiner.knn_accuracy(keys[p], bank.labels, queries[p], test.labels, k=10))
        for p in ("cls", "patch")
    }


def block_report(model, bank, test) -> dict:
    """Everything a card reports, per block and for both poolings.

    Returns:
        ``{"cls": {...}, "patch": {...}}``, each with ``knn``, ``linear``, ``1-shot`` … (mean and
        spread over draws), ``kmeans_acc``, ``kmeans_nmi``, and ``factors`` (per factor) where the
        images have any: all lists of L numbers.
    """
    keys, queries = features_of(model, bank, test)
    report = {}
    for pooling in ("cls", "patch"):
        x, y, z, t = keys[pooling], bank.labels, queries[pooling], test.labels
        found = {
            "knn": rounded(refiner.knn_accuracy(x, y, z, t, k=10)),
            "linear": rounded(refiner.linear_probe(x, y, z, t).accuracy),
        }
        shots = refiner.low_shot(x, y, z, t, shots=SHOTS)
        for s, mean, spread in zip(SHOTS, shots.mean, shots.spread, strict=True):
            found[f"{s}-shot"] = rounded(mean)
            found[f"{s}-shot spread"] = rounded(spread)
        groups = refiner.clustering(z, t)
        found |= {"kmeans_acc": rounded(groups["acc"]), "kmeans_nmi": rounded(groups["nmi"])}
        if bank.factors:
            known = ({**s.factors, "class": s.labels} for s in (bank, test))
            scores = refiner.factor_probe(x, next(known), z, next(known))
            found["factors"] = {name: rounded(v) for name, v in scores.items()}
        report[pooling] = found
    return report


def at_its_best(x: Features, z: Features, train_labels, test_labels, groups=None) -> dict:
    """What an encoder is worth when block, pooling and transform are chosen on train images alone.

    Args:
        x, z: features of the train and test images.
        train_labels, test_labels: theirs.
        groups: of the train images; then readings are chosen across them.

    Returns:
        The reading; "knn" with its interval, and of the usual reading and the best on the test
        images; "linear" with a block and pooling of its own; "1-shot" and "5-shot", linear
        classifiers under the reading chosen for five labels; and "clusters", k-means of the test
        images under the k-NN's reading.
    """
    how = {"groups": groups}
    choice = refiner.best_reading(x, train_labels, **how)
    tested = choice.test(z, test_labels)
    # Whitening hardly changes a linear probe, and its penalty is chosen anyway.
    few = {"transforms": [STANDARDISED], "most": 1500}
    linear = refiner.best_reading(x, train_labels, by="linear", **few, **how)
    labels = refiner.best_reading(x, train_labels, by="few", most=1500, **how).reading
    keys, asked = labels.apply(x), labels.apply(z)
    shots = refiner.low_shot(keys, train_labels, asked, test_labels, shots=[1, 5])
    clusters = refiner.clustering(tested.readings["best"].apply(z), test_labels)
    return {
        "reading": str(tested.readings["best"]),
        "knn": round(tested.accuracy(), 4),
        "interval": rounded(tested.interval()),
        "usual": round(tested.accuracy("usual"), 4),
        "best_on_test": round(max(choice.on_test(z, test_labels).values()), 4),
        "linear": round(linear.test(z, test_labels).accuracy(), 4),
        "few reading": str(labels),
        "1-shot": round(float(shots.mean[0]), 4),
        "5-shot": round(float(shots.mean[1]), 4),
        "clusters": round(float(clusters["acc"]), 4),
    }


@lru_cache
def installed(package: str) -> bool:
    """Whether another library is here to be measured; says so where it is not."""
    try:
        importlib.import_module(package)
    except ImportError:
        print(f"{package} is left out: it is not installed", flush=True)
        return False
    return True


def header(command: str) -> dict:
    """Command and machine, for the top of a results file."""
    return {"command": command, "machine": machine()}
