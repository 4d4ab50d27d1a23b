"""The probe's first answer: which reading to use, or, without labels, which block to look at."""

from __future__ import annotations

from collections.abc import Iterator

import matplotlib.pyplot as plt
import numpy as np
import torch

from refiner.base.pages import json_ready
from refiner.base.tensors import as_size, step_generator
from refiner.images.sets import ImageSet
from refiner.images.views import View, make_view, without_colour
from refiner.models.encoders import Encoder
from refiner.probing import choosing
from refiner.probing.features import Features, extract
from refiner.probing.readings import STANDARDISED, Reading, Transform, pooling_words, poolings_of
from refiner.probing.search import nearest_neighbors
from refiner.visuals import pictures, plots
from refiner.visuals.style import plain

VIEWS, SEEN = 4, 256  # views an image for the measures that need them, and of how many images
UNLABELLED = Transform(0.5)  # half way: more can hurt where images are few
WHICH = {"best": "chosen on train images", "runner_up": "runner-up", "usual": "the usual reading"}
# How to read each measure without labels, by its proper name.
READS = {
    "rankme": ("RankMe", "how many directions the features use; more is better, up to the width"),
    "participation_ratio": ("Participation ratio", "the same, ruled by the largest directions"),
    "alpha_req": ("α-ReQ", "how fast the spectrum decays; near 1 is neither collapsed nor white"),
    "uniformity": ("Uniformity", "how evenly features cover the sphere; lower is more even"),
    "collapse_std": ("Collapse", "deviation of unit vectors; 1 in all directions, 0 collapsed"),
    "intrinsic_dimension": ("Intrinsic dimension", "TwoNN: of the surface that features lie on"),
    "lidar": ("LiDAR", "directions that tell images apart beyond their views; more is better"),
    "alignment": ("Alignment", "how far apart an image's views lie; lower is closer"),
    "cka": ("Linear CKA", "how alike two blocks are; 1 up to a rotation and a scale"),
}


def advise(model: Encoder, x: Features, train: ImageSet, z: Features, test: ImageSet, **how):
    """What stands first in a probe's report, as JSON, and the reading that it names.

    Args:
        model: the encoder.
        x, z: features of the train and test images.
        how: ``by``, ``seed`` and ``device`` of :func:`refiner.best_reading`.

    Raises:
        ValueError: for labels that cannot choose, such as of one class.
    """
    ranking = choosing.rank_readings(z, views_of(model, test, how["seed"], how["device"]))
    if train.labels is None or test.labels is None:
        reading = Reading.fit(x, *ranking.order()[0], UNLABELLED)
        return json_ready(_without_labels(ranking, reading)), reading
    choice = choosing.best_reading(x, train.labels, **how)
    tested = choice.test(z, test.labels, seed=how["seed"])
    reading = tested.readings["best"]
    accuracy = choice.on_test(z, test.labels, (reading.transform, STANDARDISED))
    curves = {p: [accuracy[b, p, reading.transform] for b in x.blocks] for p in poolings_of(x)}
    known = [accuracy[*place, STANDARDISED] for place in ranking.places]
    found = {
        "sentence": str(tested),
        "by": choice.objective.words,
        "chosen": [reading.block, reading.pooling, str(reading.transform)],
        "curves": curves,
        "rows": [_row(tested, which) for which in WHICH if which in tested.readings],
        "agreement": ranking.agreement(known),
    }
    return json_ready(found), reading


def _row(tested: choosing.Tested, which: str) -> dict:
    row = {"which": WHICH[which], "reading": str(tested.readings[which])}
    row |= {"accuracy": tested.accuracy(which), "interval": tested.interval(which)}
    return row if which == "best" else row | {"real": tested.real(than=which)}


def views_of(model: Encoder, images: ImageSet, seed: int = 0, device=None) -> list[Features]:
    """Features of several views of some images, for the measures that compare views."""
    pixels = images.batch(torch.arange(min(SEEN, len(images))))
    view = View(size=as_size(*pixels.shape[-2:]), scale=(0.3, 1.0), jitter=0.8)
    view = view if pixels.shape[1] == 3 else without_colour(view)
    made = (make_view(pixels, view, step_generator(seed, v)) for v in range(VIEWS))
    return [extract(model, v.mul(255).byte(), device=device, progress=False) for v in made]


def _without_labels(ranking: choosing.Ranking, reading: Reading) -> dict:
    name = choosing.MEASURES[choosing.TRUSTED].name
    sentence = (
        f"The images have no labels, so that no reading is measured. By {name} block "
        f"{reading.block}, {pooling_words(reading.pooling)}, comes first: look at its neighbors "
        "before you rely on it."
    )
    firsts = {m: ranking.order(m)[0] for m in ranking.values}
    return {
        "sentence": sentence,
        "chosen": [reading.block, reading.pooling, str(reading.transform)],
        "firsts": {m: f"block {b}, {pooling_words(p)}" for m, (b, p) in firsts.items()},
        "scores": {m: ranking.scores(m) for m in ranking.values},
        "places": ranking.places,
    }


def code(model: str, data: str, size: int, path: str) -> str:
    """Three lines of Python that apply the reading."""
    return (
        "import refiner\n"
        f"model, images = refiner.load_model({model!r}), "
        f"refiner.load_images({data!r}, size={size})\n"
        f"x = refiner.Reading.load({path!r}).apply(refiner.extract(model, images))"
    )


# ---------------------------------------------------------------- figures and tables


def figure(name: str, found: dict, chance: float) -> plt.Figure:
    """Accuracy of every block and pooling with the chosen one, or the ranking without labels."""
    block, pooling, transform = found["chosen"]
    if "curves" in found:
        curves = {pooling_words(p): values for p, values in found["curves"].items()}
        title = f"{name}, {transform}: accuracy by {found['by']}"
        ax = plots.block_curve(curves, chance=chance, best=False, blocks=found["blocks"])
        at = found["curves"][pooling][found["blocks"].index(block)]
        told = f"chosen: block {block}, {at:.1%}"
    else:
        values = np.array(found["scores"][choosing.TRUSTED], dtype=float)
        kinds = list(dict.fromkeys(p for _, p in found["places"]))
        split = dict(zip(kinds, values.reshape(len(kinds), -1), strict=True))
        measure = choosing.MEASURES[choosing.TRUSTED].name
        curves = {pooling_words(p): v for p, v in split.items()}
        title = f"{name}: {measure}, which needs no labels"
        how = {"ylabel": measure, "best": False, "percent": False}
        ax = plots.block_curve(curves, blocks=found["blocks"], **how)
        at = split[pooling][found["blocks"].index(block)]
        told = f"first: block {block}, {pooling_words(pooling)}"
    ax.plot(block, at, "o", markersize=15, fillstyle="none", color="0", label=told)
    ax.set_title(plain(title))
    ax.legend()
    return ax.figure


def neighbors(images: ImageSet, z: Features, reading: Reading) -> plt.Figure:
    """Some images and their nearest neighbors by a reading."""
    x, k = reading.apply(z), min(6, len(images) - 1)
    graph = nearest_neighbors(x, x, k=k, exclude_self=True)
    some = np.linspace(0, len(images) - 1, 6).astype(int)
    title = f"Nearest neighbors by {reading}"
    return pictures.neighbor_grid(images, some, {"neighbors": graph}, k=k, title=title).figure


def worths(found: dict) -> Iterator[tuple[str, str]]:
    """What each measure without labels is worth here: a rank correlation, or what it puts first."""
    for measure, worth in (found.get("agreement") or found["firsts"]).items():
        number = "–" if worth is None else worth if isinstance(worth, str) else f"{worth:+.2f}"
        yield measure, number
