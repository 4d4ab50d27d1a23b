"""MIM-Refiner Lab: look inside masked-image models, and refine them.

The rooms, each importing only from those below it:

    cli          the command line
    evaluation   a whole model under every protocol; two models compared; reports
    visuals      figures, maps, the explorer
    training     pretraining, heads and their loss, refining, fine-tuning, planning
    probing      features of every block, neighbors, probes, measures without labels
    images       sets, folders, streams, Toybox, views, corruptions
    models       encoders, their blocks, loading, saving, converting
    base         files, places, processes, tensors, errors  (``course`` stands on it, too)

``import refiner`` is instant; a name brings its module along when it is first used.

Axes stand in names, ``x_LND``, and in brackets, [L, N, D]:

    N: images of a set; patches of an image      B: images of a batch, H and W (or S, S) large
    L: blocks, or the heads on them              T: tokens: class token, registers, patches
    D: width of the encoder                      E: width of a decoder; D + 1, with a bias
    K: kept patches; nearest neighbors           P: numbers of a patch
    V: views, the first G of them global         A: attention heads
    O: width of a projection                     C: classes
    Q: entries of the queue; queries             M: what is asked together: views times images
"""

import importlib
from typing import TYPE_CHECKING

from refiner.base.places import settle_caches

__version__ = "0.1.0"

if TYPE_CHECKING:  # what editors and type checkers read; the table below is what Python does
    from refiner.base.errors import UserError as UserError
    from refiner.course.run import record as record
    from refiner.evaluation.benchmark_row import benchmark_row as benchmark_row
    from refiner.evaluation.compare import evaluate as evaluate
    from refiner.evaluation.probe import probe as probe
    from refiner.evaluation.protocols import EvaluationSettings as EvaluationSettings
    from refiner.evaluation.segmentation import linear_segmentation as linear_segmentation
    from refiner.images.channels import fit_channels as fit_channels
    from refiner.images.corruptions import corrupt as corrupt
    from refiner.images.corruptions import corrupted as corrupted
    from refiner.images.dense import load_dense as load_dense
    from refiner.images.dense import object_maps as object_maps
    from refiner.images.load import load_images as load_images
    from refiner.images.sets import ImageSet as ImageSet
    from refiner.images.streams import open_stream as open_stream
    from refiner.models.load import load_model as load_model
    from refiner.models.mae import reconstruct as reconstruct
    from refiner.models.save import save_model as save_model
    from refiner.probing.attentive import attentive_probe as attentive_probe
    from refiner.probing.choosing import best_reading as best_reading
    from refiner.probing.choosing import rank_readings as rank_readings
    from refiner.probing.clusters import clustering as clustering
    from refiner.probing.clusters import kmeans as kmeans
    from refiner.probing.features import extract as extract
    from refiner.probing.measures import alignment as alignment
    from refiner.probing.measures import alpha_req as alpha_req
    from refiner.probing.measures import collapse_std as collapse_std
    from refiner.probing.measures import intrinsic_dimension as intrinsic_dimension
    from refiner.probing.measures import lidar as lidar
    from refiner.probing.measures import linear_cka as linear_cka
    from refiner.probing.measures import participation_ratio as participation_ratio
    from refiner.probing.measures import rankme as rankme
    from refiner.probing.measures import uniformity as uniformity
    from refiner.probing.neighbors import knn_accuracy as knn_accuracy
    from refiner.probing.neighbors import knn_predict as knn_predict
    from refiner.probing.neighbors import knn_report as knn_report
    from refiner.probing.neighbors import knn_swept as knn_swept
    from refiner.probing.probes import factor_probe as factor_probe
    from refiner.probing.probes import linear_probe as linear_probe
    from refiner.probing.probes import low_shot as low_shot
    from refiner.probing.readings import Reading as Reading
    from refiner.probing.readings import Transform as Transform
    from refiner.probing.readings import standardize_groups as standardize_groups
    from refiner.probing.readings import whiten as whiten
    from refiner.probing.search import nearest_neighbors as nearest_neighbors
    from refiner.training.decoders import decode_blocks as decode_blocks
    from refiner.training.finetuning import FinetuneRecipe as FinetuneRecipe
    from refiner.training.finetuning import few_labels as few_labels
    from refiner.training.finetuning import finetune as finetune
    from refiner.training.heads import IDHeads as IDHeads
    from refiner.training.heads import NeighborQueue as NeighborQueue
    from refiner.training.heads import load_heads as load_heads
    from refiner.training.heads import nna_loss as nna_loss
    from refiner.training.planning import plan as plan
    from refiner.training.pretraining import pretrain as pretrain
    from refiner.training.recipe import Recipe as Recipe
    from refiner.training.refining import refine as refine
    from refiner.training.watch import TensorBoard as TensorBoard
    from refiner.training.watch import online_knn as online_knn
    from refiner.visuals.explorer import explore as explore
    from refiner.visuals.live import LiveFigure as LiveFigure
    from refiner.visuals.widgets import attention_explorer as attention_explorer
    from refiner.visuals.widgets import mask_explorer as mask_explorer
    from refiner.visuals.widgets import queue_explorer as queue_explorer
    from refiner.visuals.widgets import view_explorer as view_explorer

_HOME = {
    "UserError": "base.errors",
    "load_model": "models.load",
    "reconstruct": "models.mae",
    "save_model": "models.save",
    "fit_channels": "images.channels",
    "corrupt": "images.corruptions",
    "corrupted": "images.corruptions",
    "load_dense": "images.dense",
    "object_maps": "images.dense",
    "load_images": "images.load",
    "ImageSet": "images.sets",
    "open_stream": "images.streams",
    "extract": "probing.features",
    "rankme": "probing.measures",
    "participation_ratio": "probing.measures",
    "alpha_req": "probing.measures",
    "lidar": "probing.measures",
    "alignment": "probing.measures",
    "uniformity": "probing.measures",
    "collapse_std": "probing.measures",
    "linear_cka": "probing.measures",
    "intrinsic_dimension": "probing.measures",
    "attentive_probe": "probing.attentive",
    "kmeans": "probing.clusters",
    "clustering": "probing.clusters",
    "knn_accuracy": "probing.neighbors",
    "knn_predict": "probing.neighbors",
    "knn_report": "probing.neighbors",
    "knn_swept": "probing.neighbors",
    "linear_probe": "probing.probes",
    "low_shot": "probing.probes",
    "factor_probe": "probing.probes",
    "Reading": "probing.readings",
    "Transform": "probing.readings",
    "best_reading": "probing.choosing",
    "rank_readings": "probing.choosing",
    "standardize_groups": "probing.readings",
    "whiten": "probing.readings",
    "nearest_neighbors": "probing.search",
    "decode_blocks": "training.decoders",
    "finetune": "training.finetuning",
    "FinetuneRecipe": "training.finetuning",
    "few_labels": "training.finetuning",
    "nna_loss": "training.heads",
    "NeighborQueue": "training.heads",
    "IDHeads": "training.heads",
    "plan": "training.planning",
    "pretrain": "training.pretraining",
    "Recipe": "training.recipe",
    "refine": "training.refining",
    "load_heads": "training.heads",
    "TensorBoard": "training.watch",
    "online_knn": "training.watch",
    "explore": "visuals.explorer",
    "LiveFigure": "visuals.live",
    "mask_explorer": "visuals.widgets",
    "attention_explorer": "visuals.widgets",
    "view_explorer": "visuals.widgets",
    "queue_explorer": "visuals.widgets",
    "benchmark_row": "evaluation.benchmark_row",
    "evaluate": "evaluation.compare",
    "probe": "evaluation.probe",
    "EvaluationSettings": "evaluation.protocols",
    "linear_segmentation": "evaluation.segmentation",
    "record": "course.run",
}

__all__ = list(_HOME)
settle_caches()


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'refiner' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"refiner.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})
