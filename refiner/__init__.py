"""MIM-Refiner Lab: look inside masked-image models, and refine them.

``import refiner`` is instant; a name brings its module along when it is first used.
"""

import importlib
import sys
from types import ModuleType

__version__ = "0.1.0"

_HOME = {
    "load_images": "images",
    "ImageSet": "images",
    "load_model": "models",
    "save_model": "models",
    "extract": "features",
    "knn_accuracy": "neighbors",
    "knn_predict": "neighbors",
    "knn_report": "neighbors",
    "nearest_neighbors": "neighbors",
    "rankme": "measures",
    "participation_ratio": "measures",
    "alpha_req": "measures",
    "lidar": "measures",
    "alignment": "measures",
    "uniformity": "measures",
    "collapse_std": "measures",
    "linear_cka": "measures",
    "intrinsic_dimension": "measures",
    "kmeans": "measures",
    "clustering": "measures",
    "linear_probe": "probes",
    "low_shot": "probes",
    "factor_probe": "probes",
    "probe": "probe_report",
    "nna_loss": "heads",
    "NeighborQueue": "heads",
    "IDHeads": "heads",
    "refine": "refine",
    "Recipe": "recipe",
    "plan": "planning",
    "LiveFigure": "watch",
    "TensorBoard": "watch",
    "online_knn": "watch",
    "load_heads": "refine",
    "open_stream": "streams",
    "pretrain": "mae",
    "reconstruct": "mae",
    "decode_blocks": "decoders",
    "finetune": "finetune",
    "FinetuneRecipe": "finetune",
    "few_labels": "finetune",
    "linear_segmentation": "segmentation",
    "load_dense": "segmentation",
    "object_maps": "segmentation",
    "corrupt": "corruptions",
    "corrupted": "corruptions",
    "explore": "explorer",
    "mask_explorer": "widgets",
    "attention_explorer": "widgets",
    "view_explorer": "widgets",
    "queue_explorer": "widgets",
    "evaluate": "evaluate",
    "EvaluationSettings": "protocols",
    "record": "course",
}

__all__ = list(_HOME)


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'refiner' has no attribute {name!r}")
    value = getattr(importlib.import_module(f"refiner.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOME})


class _Package(ModuleType):
    """Keeps ``refiner.refine`` the function.

    Python stores every submodule it imports as an attribute of its package, so importing the module
    ``refiner.refine`` would hide the function of that name. Here the function is stored instead;
    ``from refiner.refine import Recipe`` does not look at the attribute and works as always.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if _HOME.get(name) == name and isinstance(value, ModuleType):
            value = getattr(value, name)
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
