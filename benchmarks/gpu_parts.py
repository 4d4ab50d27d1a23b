"""What one_gpu.py measures on a card without training anything that is kept."""

from __future__ import annotations

import json
import linecache
import math
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest import mock

import matplotlib.pyplot as plt
import torch
import utilisation as utilising
from probing import features, knn_sides
from refine_step import timed

import refiner
from refiner.base.tensors import step_generator
from refiner.course.run import RECORDED
from refiner.images.views import make_views
from refiner.models.load import build_vit

ROOT = Path(__file__).parent.parent
CPU = torch.device("cpu")


# ---------------------------------------------------------------- smoke


def smoke(job) -> None:
    """Whether the device computes what the CPU does, and what the card can do at most."""
    job.note(limits=limits(job))
    checks = {}
    for name, check in CHECKS.items():
        checks[name] = attempt(lambda: check(job))  # noqa: B023
        job.note(checks=checks, green=all(c.get("ok") for c in checks.values()))


def attempt(work) -> dict:
    """What a function finds and its seconds, or the error, which shall not cost what follows."""
    began = time.monotonic()
    try:
        found = work()
    except Exception as error:
        found = {"error": f"{type(error).__name__}: {error}"[:500]}
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**found, "seconds": round(time.monotonic() - began, 1)}


def close(value: float, wanted: float, tolerance: float) -> dict:
    """A figure beside the CPU's; the tolerance is a share of the CPU's."""
    return {
        "value": value,
        "cpu": wanted,
        "tolerance": tolerance,
        "ok": abs(value - wanted) <= tolerance * max(abs(wanted), 1e-6),
    }


def some_features(job, n: int, seed: int, blocks: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    """Features [L, n, D] of ten overlapping classes, each block noisier, and their labels."""
    x, labels = features(20 * n, 24 if job.tiny else 192, seed)  # of a hundred classes
    some = (labels < 10).nonzero()[:n, 0]
    noise = torch.randn(blocks, n, x.shape[1], generator=torch.Generator().manual_seed(seed))
    return x[some] + torch.linspace(0, 1, blocks)[:, None, None] * noise, labels[some]


def same_neighbors(job) -> dict:
    (x, _), (y, _) = (some_features(job, n, s) for n, s in ((2000, 0), (500, 50)))
    there, here = (refiner.nearest_neighbors(y, x, k=20, device=d) for d in (job.device, CPU))
    differ = int((there.indices.cpu() != here.indices).sum())
    # Neighbors whose similarities differ by a rounding may change places.
    apart = float((there.similarities.cpu() - here.similarities).abs().max())
    places = here.indices.numel()
    return {
        "places": places,
        "differ": differ,
        "similarities_apart": apart,
        "ok": apart < 1e-5 and differ < 1e-3 * places,
    }


def same_probe(job) -> dict:
    n = 300 if job.tiny else 3000
    (x, labels), (y, truth) = some_features(job, n, 0), some_features(job, n, 50)
    fit = partial(refiner.linear_probe, x, labels, y, truth)
    there, here = (fit(device=d).accuracy.mean() for d in (job.device, CPU))
    return close(float(there), float(here), 0.01)


def same_clusters(job) -> dict:
    x, labels = some_features(job, 1000, 0, blocks=1)
    there, here = (refiner.clustering(x, labels, restarts=3, device=d) for d in (job.device, CPU))
    return close(float(there["nmi"]), float(here["nmi"]), 0.1)


def same_measures(job) -> dict:
    x, _ = some_features(job, 500, 0)
    pairs = {}
    for name in ("rankme", "participation_ratio", "linear_cka", "uniformity"):
        there, here = (getattr(refiner, name)(x.to(d)).mean() for d in (job.device, CPU))
        pairs[name] = close(float(there), float(here), 0.005)
    return {"measures": pairs, "ok": all(p["ok"] for p in pairs.values())}


def same_features(job) -> dict:
    """bfloat16 on the card against float32 there, and that against the CPU."""
    model = refiner.load_model("mae_toybox")
    images = refiner.load_images("toybox", split="test", n=32 if job.tiny else 512, progress=False)
    extract = partial(refiner.extract, model, images, progress=False)
    plain = extract(device=CPU)["patch"]
    found = {}
    for name, dtype, least in (
        ("bfloat16", torch.bfloat16, 0.995),
        ("float32", torch.float32, 0.9999),
    ):
        other = extract(device=job.device, dtype=dtype)["patch"]
        cosine = torch.nn.functional.cosine_similarity(other, plain, dim=-1).mean(1).min()
        found[name] = {"least_cosine": float(cosine), "ok": float(cosine) >= least}
    return {**found, "ok": all(f["ok"] for f in found.values())}


def views_repeat(job) -> dict:
    pixels = refiner.load_images("toybox", split="test", n=32, progress=False).images
    recipe = refiner.Recipe.cpu()
    one, two = (
        make_views(pixels.to(job.device), recipe.views, step_generator(0, 7, job.device))
        for _ in range(2)
    )
    return {"ok": all(torch.equal(a, b) for a, b in zip(one, two, strict=True))}


def short_recipe(job, **changes):
    tiny = {"batch": 16, "hidden": 16, "predictor_hidden": 16, "out": 8}
    sizes = tiny | {"blocks": (2, 3), "frozen_blocks": 1} if job.tiny else {}
    few = 6 if job.tiny else 10
    base = {"head_steps": few, "steps": few, "ema": 0.5, "keep": "last"}
    return refiner.Recipe.cpu(**base | sizes | changes)


def small_encoder(job):
    """The embedded one; in a rehearsal one that costs next to nothing."""
    if not job.tiny:
        return refiner.load_model("mae_toybox")
    return build_vit(size=32, patch=4, dim=24, depth=3, heads=3, seed=0)


def training_falls_and_resumes(job) -> dict:
    """Some steps; the loss falls; stopped in the middle and resumed, it ends at the same loss."""
    model = small_encoder(job)
    images = refiner.load_images("toybox", n=64 if job.tiny else 1024, progress=False)
    run = partial(
        refiner.refine,
        model,
        images,
        recipe=short_recipe(job),
        device=job.device,
        log_every=1,
        progress=False,
    )
    whole = [sum(entry["loss"]) for entry in run().history]
    half, asked = len(whole) // 2, []
    run(out=job.scratch / "resumed", stop=lambda: asked.append(1) or len(asked) > half + 2)
    again = run(out=job.scratch / "resumed", resume=True)
    last = sum(again.history[-1]["loss"])
    falls = {"first": whole[0], "last_of_heads": whole[half - 1], "last": whole[-1]}
    resumed = close(last, whole[-1], 1e-6 if job.device == CPU else 0.02)
    return {**falls, "resumed": resumed, "ok": resumed["ok"] and whole[half - 1] < whole[0]}


def compiled_blocks(job) -> dict:
    """The loss with compiled blocks is the loss without."""
    model = small_encoder(job)
    images = refiner.load_images("toybox", n=64 if job.tiny else 1024, progress=False)
    losses, seconds = [], []
    for compiled in (False, True):
        began = time.monotonic()
        recipe = short_recipe(job, head_steps=0, steps=3, compile=compiled)
        run = refiner.refine(
            model, images, recipe=recipe, device=job.device, log_every=1, progress=False
        )
        losses.append(sum(run.history[-1]["loss"]))
        seconds.append(round(time.monotonic() - began, 2))
    return {**close(losses[1], losses[0], 0.02), "seconds_plain_and_compiled": seconds}


CHECKS = {
    "k-NN finds what the CPU finds": same_neighbors,
    "linear probe": same_probe,
    "k-means": same_clusters,
    "measures": same_measures,
    "features in bfloat16 and float32": same_features,
    "views repeat": views_repeat,
    "training falls and resumes": training_falls_and_resumes,
    "compiled blocks": compiled_blocks,
}


def limits(job) -> dict:
    """Products and copies, as fast as the card does them."""
    side, words = (256, 2**20) if job.tiny else (8192, 2**28)
    found = {}
    for name, dtype in (("bfloat16", torch.bfloat16), ("tf32", torch.float32)):
        x = torch.randn(side, side, device=job.device, dtype=dtype)
        seconds = repeated(lambda: x @ x, job)  # noqa: B023
        found[f"{name}_teraflop_a_second"] = round(2 * side**3 / seconds / 1e12, 2)
    a = torch.empty(words, device=job.device, dtype=torch.int32)
    b = torch.empty_like(a)
    found["copy_GB_a_second"] = round(2 * a.nbytes / repeated(lambda: b.copy_(a), job) / 1e9, 1)
    if job.device.type == "cuda":
        found["memory_GB"] = round(torch.cuda.mem_get_info()[1] / 1e9, 1)
    return found


def repeated(work, job, rounds: int = 10) -> float:
    """The median seconds of a function; wall time on a GPU, processor time on a CPU."""
    work()
    seconds = sorted(timed(work, job.device.type) for _ in range(3 if job.tiny else rounds))
    return max(seconds[len(seconds) // 2], 1e-9)


# ---------------------------------------------------------------- utilisation


def utilisation(job) -> None:
    """ViT-B and L: share of the ceiling, memory planned and measured, the largest batch."""
    models, rounds = (("B", 128), ("L", 64)), 5
    if job.tiny:
        models, rounds = (("toybox", 8),), 1
    cells = {}
    for name, batch in models:
        for compiled in (False, True):
            if job.left < (1 if job.tiny else 40):
                return
            kind = f"{name}, compiled" if compiled else name
            options = {"compile": True} if compiled else {}
            cells[kind] = attempt(
                partial(utilising.utilisation, name, batch, job.device.type, rounds, **options)
            )
            job.note(cells=cells)
    if job.device.type == "cuda" and job.left > 40:
        card = torch.cuda.mem_get_info()[1]
        told = json.loads((ROOT / "benchmarks/results/memory.json").read_text())["largest_batch"]
        near = min(told, key=lambda c: (c["way"] != "plain", abs(c["GB"] - card / 1e9)))
        room = float(torch.cuda.mem_get_info()[0])
        job.note(simulated=near, largest=attempt(lambda: utilising.largest_batch("L", room)))


# ---------------------------------------------------------------- probing


def probing(job) -> None:
    """k-NN and linear probes on the card, beside plain torch, scikit-learn and our own on a CPU."""
    sizes = [(300, 1000, 24)] if job.tiny else [(10_000, 50_000, 192), (5000, 20_000, 768)]
    rows = []
    for queries, keys, dim in sizes:
        data = (*features(keys, dim, 0), *features(queries, dim, 1))
        sides = knn_sides(*data, device=job.device.type)
        sides = {name: sides[name] for name in ("refiner", "torch")}
        if job.device.type == "cuda":
            sides["refiner, CPU"] = knn_sides(*data)["refiner"]
        seconds = {n: wall(call, once="CPU" in n) for n, call in sides.items()}
        same = bool((sides["refiner"]() == sides["torch"]()).float().mean() > 0.999)
        rows.append(
            {
                "queries": queries,
                "keys": keys,
                "dim": dim,
                "seconds": seconds,
                "same_predictions": same,
            }
        )
        job.note(knn=rows)
    job.note(probe=probe_times(job))


def probe_times(job) -> dict:
    """Seconds of all probes of an encoder: 12 blocks, eight penalties each."""
    from sklearn.linear_model import LogisticRegression

    blocks, n = (2, 200) if job.tiny else (12, 10_000)
    (x, labels), (y, truth) = (some_features(job, m, s, blocks) for m, s in ((n, 0), (n // 4, 90)))
    found = {"blocks": blocks, "images": n, "dim": x.shape[2]}
    for name, device in (("card", job.device), ("CPU", CPU)):
        fit = partial(refiner.linear_probe, x, labels, y, truth, device=device)
        found[name] = wall(fit, once=device == CPU)
    unit = ((x[0] - x[0].mean(0)) / x[0].std(0)).numpy()
    fit = LogisticRegression(C=1 / (1e-3 * n), max_iter=1000).fit
    found["scikit-learn, one block and penalty"] = wall(lambda: fit(unit, labels), once=True)
    found["times_faster_than_CPU"] = round(found["CPU"] / found["card"], 2)
    return found


def wall(work, *, once: bool = False) -> float:
    """Seconds by the clock, the first call left out unless it is the only one."""
    seconds = []
    for _ in range(1 if once else 4):
        began = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    return round(sorted(seconds[0 if once else 1 :])[(len(seconds) - 1) // 2], 4)


# ---------------------------------------------------------------- notebook 04


def notebook04(job) -> None:
    """Runs the notebook's code at the gpu preset, without Jupyter; its trainings stop in time."""
    path = next((ROOT / "notebooks").glob("04_*.ipynb"))
    cells = json.loads(path.read_text(encoding="utf-8"))["cells"]
    names = {
        "__name__": "notebook",
        "preset": "gpu",
        "data": "toybox",
        "model_name": "mae_toybox",
        "seed": 0,
    }
    with ExitStack() as stack:
        for what, changed in stand_ins(job).items():
            stack.enter_context(mock.patch.object(refiner, what, changed))
        for number, cell in enumerate(cells):
            tags, source = cell["metadata"].get("tags", []), "".join(cell["source"])
            if cell["cell_type"] != "code" or "parameters" in tags or "Only for Colab" in source:
                continue
            place = f"<cell {number} of {path.name}>"
            linecache.cache[place] = (len(source), None, source.splitlines(keepends=True), place)
            exec(compile(source, place, "exec"), names)
    job.note(
        recorded=dict(RECORDED),
        refine_steps=names["refined"].steps,
        planned_steps=names["recipe"].head_steps + names["recipe"].steps,
    )
    for number in plt.get_fignums():
        job.draw(f"notebook04-{number}", plt.figure(number))


def stand_ins(job) -> dict:
    """The library's functions as the notebook sees them: stopped by the clock, tiny in a test."""
    half = math.inf if job.left == math.inf else job.left / 2 - (0 if job.tiny else 20)

    def in_time(train):
        quiet = {"progress": False}
        return lambda *a, **k: train(*a, **{"stop": time.monotonic() + half} | k | quiet)

    clocked = {name: in_time(getattr(refiner, name)) for name in ("refine", "pretrain")}
    if not job.tiny:
        return clocked
    load, gpu = refiner.load_images, refiner.Recipe.gpu

    class Recipe(refiner.Recipe):
        @classmethod
        def gpu(cls, **options):
            sizes = {"hidden": 16, "predictor_hidden": 16, "out": 8, "queue": 32}
            return replace(gpu(**options), batch=16, head_steps=2, steps=3, **sizes)

    return clocked | {"Recipe": Recipe, "load_images": lambda *a, **k: load(*a, **{**k, "n": 128})}
