"""A model's row for the public benchmark of frozen encoders: k-NN, linear probe, attentive probe.

The benchmark is results.csv of github.com/billpsomas/efficient-probing (Psomas et al., ICLR 2026):
37 encoders on ImageNet-1k, each by its last block before the final norm.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path

from refiner.base.files import replacing
from refiner.base.tensors import sides
from refiner.images.sets import ImageSet
from refiner.models.encoders import Encoder, has_class_token, patch_count
from refiner.probing.attentive import AttentiveProbe, attentive_probe
from refiner.probing.features import extract
from refiner.probing.neighbors import knn_swept
from refiner.probing.probes import linear_probe

FIELDS = (  # the benchmark's columns, in its order
    *("family", "method", "arch", "pretrain", "eval", "image_size", "lp", "lp_gap", "ep"),
    *("ep_queries", "ep_variant", "model", "loader", "pretrain_tag", "finetune", "lp_variant"),
    *("lp_log", "ep_log", "notes", "verified", "amp", "waiting", "gap_reason", "knn", "knn_k"),
    *("knn_T", "knn_log", "extra_flags"),
)
SIZES = {192: "Ti", 384: "S", 768: "B", 1024: "L", 1280: "H"}  # names of ViTs by their width
NOTES = (
    "Chosen on train images: k and temperature leaving one out, penalty and learning rate on a "
    "fifth. Linear probe by Newton steps, EP by AdamW without augmentation, scored after its end."
)


def benchmark_row(
    model: Encoder,
    train: ImageSet,
    test: ImageSet,
    *,
    family: str = "MIM",
    pretrain: str = "",
    class_token: bool = False,
    attentive: AttentiveProbe | None = None,
    seed: int = 0,
    device=None,
    progress: bool = True,
) -> dict[str, str | int | float]:
    """The model's last block under the three protocols, in the benchmark's columns.

    As there, k-NN and linear probe read the class token, or the patch mean in a model without one;
    k-NN takes the features as they come; accuracies are percent. Unlike there, nothing is chosen on
    the test images, which makes our figures the lower ones.

    Args:
        model: an encoder with a ``refiner_card``, such as :func:`refiner.load_model` gives.
        train, test: labelled images.
        family: "MIM", "JEA", "Hybrid", "VLM" or "GEN".
        pretrain: the data that the encoder was trained on.
        class_token: EP attends the class token, too ("ep_all"), as the benchmark has it where
            pretraining is defined on that token.
        attentive: a probe whose last block is the model's, instead of training one.
        seed, device, progress: see :func:`refiner.attentive_probe`.

    Returns:
        A value for each of ``FIELDS``, for :class:`csv.DictWriter`; "" where nothing is known.

    Raises:
        ValueError: as :func:`refiner.attentive_probe`.
    """
    how = {"device": device, "progress": progress}
    keys, queries = (extract(model, images, blocks=[-1], **how).main[0] for images in (train, test))
    data = keys, train.labels, queries, test.labels
    nearest = knn_swept(*data, standardize=False, device=device)
    linear = linear_probe(*data, seed=seed, device=device)
    options = {"blocks": [-1], "class_token": class_token, "seed": seed}
    attentive = attentive or attentive_probe(model, train, test, **options, **how)
    card, width, mean = model.refiner_card, model.num_features, not has_class_token(model)
    kind, size = type(model).__name__, card["preprocessing"]["size"]
    kind = "ViT" if kind == "VisionTransformer" else kind
    patch = round((math.prod(sides(size)) / patch_count(model)) ** 0.5)
    told = {"family": family, "pretrain": pretrain, "notes": NOTES, "eval": train.name}
    told |= {"method": card.get("method", card["name"]), "model": card["name"], "image_size": size}
    known = told | {
        "arch": f"{kind}-{SIZES.get(width, width)}/{patch}",
        "lp": round(100 * float(linear.accuracy), 2),
        "lp_gap": "yes" if mean else "no",
        "gap_reason": "no_cls" if mean else "",
        "lp_variant": "pos" if mean else "cls",
        "ep": round(100 * float(attentive.accuracy[-1]), 2),
        "ep_queries": attentive.queries.shape[1],
        "ep_variant": "ep_all" if attentive.class_token else "ep",
        "knn": round(100 * float(nearest.accuracy), 2),
        "knn_k": int(nearest.k),
        "knn_T": round(float(nearest.temperature), 4),
    }
    return {field: known.get(field, "") for field in FIELDS}


def write_rows(path: Path, rows: Sequence[dict]) -> None:
    """Writes rows under the benchmark's header, or nothing where there are none."""
    if rows:
        with replacing(path) as temporary, open(temporary, "w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
