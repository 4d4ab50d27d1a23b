"""Trainings that fit into given seconds on one GPU: the parts *cifar* and *deep* of one_gpu.py."""

from __future__ import annotations

import json
import math
import statistics
import tarfile
import time
from dataclasses import asdict, replace
from functools import partial
from itertools import pairwise

from measured import knn_curves, rounded

import refiner
from refiner.images.views import View
from refiner.models.load import copy_model
from refiner.models.mae import MAERecipe
from refiner.training.recipe import recipe_dict, recipe_from
from refiner.visuals import plots

COLOUR = {
    "jitter": 0.8,
    "brightness": 0.4,
    "contrast": 0.4,
    "saturation": 0.4,
    "hue": 0.1,
    "gray": 0.2,
}
LARGE = View(size=32, scale=(0.2, 1.0), keep=0.5, **COLOUR)
SMALL = View(size=16, scale=(0.08, 0.35), **COLOUR)
MAE = MAERecipe(
    dim=256,
    depth=12,
    heads=4,
    decoder_dim=128,
    decoder_depth=2,
    decoder_heads=4,
    normalize_targets=True,
    crop=(0.3, 1.0),
    flip=True,
    batch=1024,
    lr=1.5e-3,
    ema=0.998,
    compile=True,
)
REFINE = refiner.Recipe(
    blocks=(-4, -3, -2, -1),
    hidden=1024,
    predictor_hidden=2048,
    views=(LARGE,) * 2 + (SMALL,) * 4,
    batch=512,
    head_steps=150,
    head_lr=1e-3,
    lr=7.5e-4,
    layer_decay=0.9,
    clip=3.0,
    warmup=0.1,
    queue=16_384,
    top_k=5,
    swap_from=0.3,
    swap_full=0.9,
    ema=0.998,
    compile=True,
)
DEEP = MAERecipe(
    dim=192,
    depth=24,
    heads=3,
    decoder_dim=96,
    decoder_depth=1,
    decoder_heads=3,
    batch=512,
    lr=1.5e-3,
    ema=0.998,
    compile=True,
)
TINY = {"dim": 24, "depth": 4, "heads": 2, "decoder_dim": 16, "decoder_heads": 2, "batch": 8}
TINY_REFINE = {
    "hidden": 16,
    "predictor_hidden": 16,
    "out": 8,
    "batch": 8,
    "queue": 32,
    "head_steps": 2,
    "blocks": (-2, -1),
}
UNLIMITED = (600.0, 1500.0)  # seconds of the two trainings where no time is given
AFTERWARDS = 50.0  # seconds to measure what was trained
WARM = 24  # steps that tell the pace


# ---------------------------------------------------------------- trainings of given seconds


def pace(history: list[dict]) -> float:
    """Seconds of a step: the median between logged entries, without the first (compiling)."""
    gaps = [(b["seconds"] - a["seconds"]) / (b["step"] - a["step"]) for a, b in pairwise(history)]
    return max(statistics.median(gaps), 1e-4)


def paced(train, recipe, counts: tuple[str, ...], job):
    """The recipe, and the seconds of a step by a few that are thrown away.

    Args:
        train: :func:`refiner.pretrain` or :func:`refiner.refine` without recipe.
        recipe: compiled no more where a machine cannot compile.
        counts: the recipe's number of steps to time, then those to leave out.
    """
    warm = 4 if job.tiny else WARM
    few = {counts[0]: warm, **dict.fromkeys(counts[1:], 0)}
    try:
        timed = train(recipe=replace(recipe, **few), log_every=warm // 4)
    except Exception as error:
        if not recipe.compile:
            raise
        job.note(not_compiled=f"{type(error).__name__}: {error}"[:500])
        return paced(train, replace(recipe, compile=False), counts, job)
    return recipe, pace(timed.history)


def pretrained_in(seconds: float, images, recipe: MAERecipe, job, start=None):
    """An autoencoder that was trained for so many seconds, the measuring of the pace included."""
    end, quiet = time.monotonic() + seconds, {"progress": False, "device": job.device}
    train = partial(refiner.pretrain, images, **quiet)
    recipe, took = paced(train, recipe, ("steps",), job)
    steps = max(1, int(0.97 * (end - time.monotonic()) / took))
    recipe = replace(recipe, steps=min(steps, 6) if job.tiny else steps)
    job.note(mae={"planned_steps": recipe.steps, "seconds_a_step": took, "recipe": asdict(recipe)})
    run = train(recipe=recipe, start=start, stop=end, log_every=20)
    done = {"steps": run.steps, "history": thinned(run.history)}
    job.note(mae=job.found["mae"] | done)
    return run.mae


def refined_in(seconds: float, model, images, recipe, job, **begin):
    """A refinement of so many seconds, the measuring of both stages' paces included."""
    end, quiet = time.monotonic() + seconds, {"progress": False, "device": job.device}
    train, heads_took = partial(refiner.refine, model, images, **quiet), 0.0
    if recipe.head_steps:
        recipe, heads_took = paced(train, recipe, ("head_steps", "steps"), job)
    recipe, took = paced(train, recipe, ("steps", "head_steps"), job)
    left = 0.97 * (end - time.monotonic())
    heads = min(recipe.head_steps, int(left / 5 / max(heads_took, 1e-4)))
    steps = max(1, int((left - heads * heads_took) / took))
    if job.tiny:
        heads, steps = min(heads, 2), min(steps, 4)
    recipe = replace(recipe, head_steps=heads, steps=steps)
    job.note(refine={"planned_steps": [heads, steps], "seconds_a_step": [heads_took, took]})
    run = train(recipe=recipe, stop=end, log_every=20, **begin)
    done = {"steps": run.steps, "recipe": recipe_dict(run.recipe), "history": thinned(run.history)}
    job.note(refine=job.found["refine"] | done)
    return run


def thinned(history: list[dict], entries: int = 40) -> list[dict]:
    """Some entries of a history, the last among them, with short numbers."""
    every = max(1, math.ceil(len(history) / entries))

    def short(value):
        if isinstance(value, list):
            return [short(v) for v in value]
        return float(f"{value:.4g}") if isinstance(value, float) else value

    return [{k: short(v) for k, v in e.items()} for e in history[::-1][::every][::-1]]


# ---------------------------------------------------------------- what an encoder knows


def report(model, bank, test, job) -> dict:
    """Every block by k-NN of both conventions, the best training-free reading, linear probes.

    Args:
        bank: the labelled images that vote, that probes are fitted on and a reading is chosen by.
        test: asked once for each figure.
    """
    keys, asked = (
        refiner.extract(model, s, device=job.device, progress=False) for s in (bank, test)
    )
    labels = bank.labels, test.labels
    k = min(200, len(bank) // 2)
    found = {}
    for pooling in ("cls", "patch"):
        data = keys[pooling], labels[0], asked[pooling], labels[1]
        at = {"device": job.device}
        found[pooling] = {
            "k200": rounded(
                refiner.knn_accuracy(*data, k=k, temperature=0.1, standardize=False, **at)
            ),
            "k10": rounded(refiner.knn_accuracy(*data, k=10, **at)),
        }
    found["reading"] = best_reading(keys, asked, labels, k, job.device)
    some = slice(0, 64 if job.tiny else 10_000)
    for pooling in ("cls", "patch"):
        if job.left > 20:  # the only slow ones
            probe = refiner.linear_probe(
                keys[pooling][:, some],
                labels[0][some],
                asked[pooling],
                labels[1],
                device=job.device,
            )
            found[pooling]["linear"] = rounded(probe.accuracy)
    return found


def best_reading(keys, asked, labels, k: int, device) -> dict:
    """The block, pooling and whitening that vote best on train images, and their test accuracy."""
    choice = refiner.best_reading(keys, labels[0], device=device)
    best, chosen_by = next(iter(choice.scores.items()))
    x, z = (choice.reading.apply(features) for features in (keys, asked))
    how = {"k": [10, k], "standardize": False, "device": device}
    few, many = refiner.knn_accuracy(x, labels[0], z, labels[1], **how).tolist()
    chosen = {"block": best.block, "pooling": best.pooling, "power": best.transform.power}
    return chosen | {"chosen_by": chosen_by, "k10": round(few, 4), "k200": round(many, 4)}


# ---------------------------------------------------------------- CIFAR-10


def cifar(job) -> None:
    """MAE → refine, in the time there is, and every block before and after."""
    train, test = cifar_sets(job)
    mae_seconds, refine_seconds = lengths(job)
    mae_recipe, recipe = MAE, REFINE
    if job.tiny:
        mae_recipe, recipe = replace(MAE, **TINY), replace(REFINE, **TINY_REFINE)
    mae, model, heads, parts = gone_on(job) if job.earlier else (None, None, {}, {})
    if mae_seconds:
        mae = pretrained_in(mae_seconds, train, mae_recipe, job, start=mae)
        model, heads, parts["mae"] = mae.encoder, {}, mae.state_dict()
        job.note(files=keep(job, parts))
    if heads:  # they know this encoder already
        recipe = replace(recipe, head_steps=0)
    before = report(model, train, test, job)
    job.note(before=before)
    if refine_seconds:
        if job.left < math.inf and not job.seconds:  # as measuring took longer or shorter
            refine_seconds = max(1.0, job.left - afterwards(job))
        run = refined_in(refine_seconds, model, train, recipe, job, **heads)
        parts |= {"refined": run.model.state_dict(), "heads": run.heads.state_dict()}
        job.note(files=keep(job, parts), card=run.model.refiner_card["architecture"])
        after = report(run.model, train, test, job)
        job.note(after=after)
        job.draw("cifar", drawn({"before": before, "refined": after}))


def lengths(job) -> tuple[float, float]:
    """Seconds for pretraining and refining; without an earlier run about a quarter pretrains."""
    if job.seconds or job.left == math.inf:
        return job.seconds or ((0.0, UNLIMITED[1]) if job.earlier else UNLIMITED)
    room = max(2.0, job.left - 2 * afterwards(job))
    return (0.0, room) if job.earlier else (0.27 * room, 0.73 * room)


def afterwards(job) -> float:
    """Seconds that measuring an encoder may take."""
    return 2.0 if job.tiny else AFTERWARDS


def cifar_sets(job):
    """Train and test images."""
    source = job.cifar or "cifar10"
    if job.cifar and job.cifar.is_file():
        with tarfile.open(job.cifar) as archive:
            archive.extractall(job.scratch, filter="data")
        (source,) = (p for p in job.scratch.iterdir() if p.is_dir() and (p / "train").is_dir())
    train, test = (
        refiner.load_images(source, split=s, size=32, progress=False) for s in ("train", "test")
    )
    return train, test


def keep(job, parts: dict) -> int:
    """Brings home what the next run goes on from."""
    from one_gpu import keep_weights

    return keep_weights(job.out, parts)


def gone_on(job):
    """Autoencoder, encoder, heads and weights that an earlier run brought home."""
    from one_gpu import kept_weights

    told = json.loads((job.earlier / "results.json").read_text())["parts"]["cifar"]
    parts = kept_weights(job.earlier)
    mae = MAERecipe(**told["mae"]["recipe"]).build()
    mae.load_state_dict(parts["mae"])
    job.note(mae=told["mae"], went_on_from=job.earlier.name)
    if "refined" not in parts:
        return mae, mae.encoder, {}, parts
    model, recipe = copy_model(mae.encoder), recipe_from(told["refine"]["recipe"])
    model.load_state_dict(parts["refined"])
    heads = refiner.IDHeads(
        len(recipe.blocks),
        model.embed_dim,
        hidden=recipe.hidden,
        predictor_hidden=recipe.predictor_hidden,
        out=recipe.out,
    )
    heads.load_state_dict(parts["heads"])
    return mae, model, {"heads": heads}, parts


def drawn(reports: dict[str, dict]):
    """k-NN (k = 200) of every block, a panel a pooling."""
    import matplotlib.pyplot as plt

    with plots.style():
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True, layout="constrained")
        for ax, (pooling, name) in zip(
            axes, (("cls", "class token"), ("patch", "patch mean")), strict=True
        ):
            curves = {name: found[pooling]["k200"] for name, found in reports.items()}
            plots.block_curve(curves, ylabel="k-NN accuracy (k = 200)", title=name, ax=ax)
    return figure


# ---------------------------------------------------------------- deep


def deep(job) -> None:
    """Toybox, 24 blocks, with and without a decoder: k-NN of every block, before and after."""
    n = 64 if job.tiny else None
    train = refiner.load_images("toybox", split="train", n=n, progress=False)
    test = refiner.load_images("toybox", split="test", n=n or 1024, progress=False)
    bank = train[: n or 4096]
    room = 1200 if job.left == math.inf else job.left - (4 if job.tiny else 40)
    arms, curves = {}, {}
    for name, depth in (("decoder", 1), ("no decoder", 0)):
        base = replace(DEEP, **TINY) if job.tiny else DEEP
        mae = pretrained_in(0.3 * room, train, replace(base, decoder_depth=depth), job)
        recipe = refiner.Recipe.gpu(
            size=32,
            patch=4,
            blocks=tuple(range(-8, 0)),
            head_steps=100,
            ema=0.998,
            compile=True,
            keep="last",
        )
        if job.tiny:
            recipe = replace(recipe, **TINY_REFINE)
        before = knn_curves(mae.encoder, bank, test)
        run = refined_in(0.18 * room, mae.encoder, train, recipe, job)
        arms[name] = {
            "before": before,
            "after": knn_curves(run.model, bank, test),
            "mae": job.found.pop("mae"),
            "refine": job.found.pop("refine"),
        }
        curves |= {f"{name}, {when}": arms[name][when] for when in ("before", "after")}
        job.note(arms=arms)
    job.draw("deep", drawn({n: {p: {"k200": v[p]} for p in v} for n, v in curves.items()}))
