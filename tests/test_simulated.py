"""What a GPU would meet, on tensors without numbers: one device, no waiting, and the memory."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException

from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.models.mae import MAERecipe, reconstruct
from refiner.probing import clusters, measures
from refiner.probing.features import Features, extract
from refiner.probing.logistic import fit_logistic
from refiner.probing.neighbors import knn_accuracy, knn_predict
from refiner.probing.readings import whiten
from refiner.probing.search import nearest_neighbors
from refiner.training import decoders, pretraining
from refiner.training.planning import NOT_COUNTED
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import Steps, begin, loop_of
from refiner.training.watch import online_knn
from refiner.visuals import widgets

pytestmark = pytest.mark.skipif(
    not torch.backends.cuda.is_built(), reason="this torch knows no CUDA devices"
)
CPU = torch.device("cpu")
NAMES = ("simulated", "memory", "refine_step", "probing", "gpu_training")
SHAPE = {"size": 32, "patch": 4, "dim": 48, "depth": 4, "heads": 3}
VIEWS = (View(size=32, blur=1.0, solarize=0.2), View(size=32, blur=0.1), View(size=16, keep=0.5))


@pytest.fixture(scope="module")
def scripts():
    folder = str(Path(__file__).parent.parent / "benchmarks")
    sys.path.insert(0, folder)
    yield {name: importlib.import_module(name) for name in NAMES}
    sys.path.remove(folder)


@pytest.fixture(scope="module")
def tools(scripts):
    return scripts["simulated"]


# ---------------------------------------------------------------- the tools themselves


def test_the_simulation_notices_whoever_makes_the_host_wait(tools):
    with tools.simulated(tools.GPU):
        x = torch.rand(3, device=tools.GPU)
        with pytest.raises(DataDependentOutputException):
            x.sum().item()
        with tools.Waits() as waits:
            torch.ones(2).to(tools.GPU, non_blocking=True)
            x + torch.arange(3, device=tools.GPU)
        assert waits.found == []
        with tools.Waits() as waits:
            torch.ones(2).to(tools.GPU)
            x.to("cpu")
            x.copy_(torch.ones(3))
        assert waits.found == [("cpu to cuda", [2]), ("cuda to cpu", [3]), ("cpu to cuda", [3])]


def test_the_simulation_notices_tensors_on_different_devices(tools):
    with tools.simulated(tools.GPU), pytest.raises(RuntimeError, match="device"):
        torch.rand(3, device=tools.GPU) + torch.rand(3)


def test_the_peak_is_that_of_all_tensors_alive_at_once(tools):
    with tools.simulated(CPU):
        held = torch.empty(100)
        with tools.Peak(held) as memory:
            assert memory.now == 400
            x = held + 1  # 400 more
            y = x.view(10, 10)[2:]  # a view is no memory of its own
            del x
            assert memory.now == 800
            del y
            z = torch.empty(50, dtype=torch.bfloat16)
            assert memory.now == 500
            del z
        assert memory.peak == 800


# ---------------------------------------------------------------- what a GPU would run


@pytest.mark.parametrize(
    "changes",
    [
        {"swap_from": 0.3, "swap_full": 0.9},
        {"swap": "both", "frozen_blocks": 2, "pooling": "patch"},
        {"swap": "none", "checkpoint": True},
        {"cached_views": 1, "loss_weights": "staggered"},
    ],
    ids=str,
)
def test_a_step_of_refining_never_makes_the_host_wait(tools, changes):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (32, 3, 32, 32), dtype=torch.uint8, generator=generator)
    model = build_vit(**SHAPE, seed=0)
    recipe = Recipe.gpu(size=32, patch=4, batch=16, blocks=(3, 4), views=VIEWS, **changes)
    run = begin(model, complete_recipe(recipe, model, images), CPU)
    with tools.simulated(tools.GPU):
        tools.hollow(run.model, run.heads, run.queue, device=tools.GPU)
        empty = torch.empty(images.shape, dtype=torch.uint8, device=tools.GPU)
        labels = torch.empty(32, dtype=torch.int64, device=tools.GPU)
        training = loop_of(Steps(run, ImageSet(empty, labels), tools.GPU))
        for stage in (2, 3):
            with tools.no_backward(run.model, run.heads):
                training.one_step(stage, 0)  # constants go to the GPU once
                with tools.Waits() as waits:  # the second epoch: features may have been kept
                    training.one_step(stage, 2)
            assert waits.found == []


def test_the_measured_parts_of_a_step_run_on_a_gpu(tools, scripts, monkeypatch):
    """All that benchmarks/refine_step.py times; its last part once kept an index on the host."""
    bench, parts = scripts["refine_step"], []
    images = torch.randint(256, (256, 3, 32, 32), dtype=torch.uint8)
    model = build_vit(**SHAPE, seed=0)
    recipe = Recipe.cpu(head_steps=9, cached_views=1, blocks=(3, 4), frozen_blocks=2)
    recipe = complete_recipe(recipe, model, images)
    run = begin(model, recipe, CPU)
    with tools.simulated(tools.GPU), tools.no_backward(run.model, run.heads):
        tools.hollow(run.model, run.heads, run.queue, device=tools.GPU)
        empty = torch.empty(images.shape, dtype=torch.uint8)
        monkeypatch.setattr(bench.refiner, "load_model", lambda *_: model)
        monkeypatch.setattr(bench.refiner, "load_images", lambda *_, **__: ImageSet(empty))
        monkeypatch.setattr(bench, "complete_recipe", lambda *_: recipe)
        monkeypatch.setattr(bench, "begin", lambda *_: run)
        monkeypatch.setattr(bench, "step_generator", lambda *_: None)
        monkeypatch.setattr(bench, "timed", lambda part, _: parts.append(part()) or 0.0)
        found = bench.parts_of_the_cpu_preset(tools.GPU.type, rounds=1)
    assert len(parts) == 2 * len(found) > 0


@pytest.mark.parametrize("changes", [{}, {"crop": (0.2, 1.0), "flip": True}], ids=str)
def test_a_step_of_pretraining_never_makes_the_host_wait(tools, changes):
    recipe = MAERecipe(batch=16, **changes)
    mae = recipe.build()
    with tools.simulated(tools.GPU):
        tools.hollow(mae, device=tools.GPU)
        pixels = torch.empty(16, 3, 32, 32, dtype=torch.uint8, device=tools.GPU)
        training = pretraining.loop_of(mae, pixels, recipe, tools.GPU)
        with tools.no_backward(mae):
            for step in range(2):
                with tools.Waits() as waits:
                    training.one_step(1, step)
        assert waits.found == [] and training.seen[0]["loss"].device == tools.GPU


def test_a_step_of_the_decoders_never_makes_the_host_wait(tools):
    model = build_vit(**SHAPE, seed=0).eval()
    source = decoders._Frozen(model, (2, 4), 0.75, True, tools.GPU)
    decoder = source.decoder(0, {"dim": 16, "depth": 1, "heads": 2})
    with tools.simulated(tools.GPU):
        tools.hollow(model, decoder, device=tools.GPU)
        pixels = torch.empty(8, 3, 32, 32, dtype=torch.uint8, device=tools.GPU)
        for _ in range(2):
            with tools.Waits() as waits:
                loss = decoders._loss(decoder, source.problem(pixels, None)[1])
        assert waits.found == [] and loss.device == tools.GPU


def features(*shape: int, device) -> torch.Tensor:
    return torch.empty(*shape, device=device)


def classes(*shape: int, device="cpu") -> torch.Tensor:
    return torch.empty(*shape, dtype=torch.int64, device=device)


PROBING = {  # what it gives, and where that has to lie
    "neighbors": lambda at: (
        nearest_neighbors(
            features(2, 50, 16, device=at), features(2, 300, 16, device=at), k=5
        ).indices,
        at,
    ),
    "from the host": lambda at: (
        nearest_neighbors(
            features(50, 16, device="cpu"), features(300, 16, device="cpu"), k=5, device=at
        ).similarities,
        CPU,
    ),
    "leave one out": lambda at: (
        nearest_neighbors(*[features(200, 16, device=at)] * 2, k=5, exclude_self=True).indices,
        at,
    ),
    "k-NN": lambda at: (
        knn_accuracy(
            features(2, 300, 16, device=at),
            classes(300),
            features(2, 50, 16, device=at),
            classes(50),
            k=[1, 5],
        ),
        CPU,
    ),
    "votes": lambda at: (
        knn_predict(features(300, 16, device=at), classes(300), features(50, 16, device=at), k=5)[
            0
        ],
        CPU,
    ),
    "linear probes": lambda at: (
        fit_logistic(
            features(2, 300, 17, device=at),
            classes(2, 300, device=at),
            torch.empty(3, 2, dtype=torch.float64, device=at),
            classes=4,
        ).weights,
        at,
    ),
    "k-means": lambda at: (
        clusters.kmeans(
            features(2, 300, 16, device="cpu"), 4, restarts=2, max_iter=3, device=at
        ).inertia,
        CPU,
    ),
    "whitening": lambda at: (whiten(features(3, 60, 16, device=at)), at),
    "CKA": lambda at: (measures.linear_cka(*[features(3, 60, 16, device=at)] * 2), CPU),
    "LiDAR": lambda at: (measures.lidar(features(2, 60, 5, 16, device=at)), CPU),
}


LOOKING = {  # what notebooks ask of a model on the GPU, about images on the host
    "reconstruct": lambda t: reconstruct(t["mae"], t["images"], seed=0)["painted"],
    "the loss of reconstruct": lambda t: reconstruct(t["mae"], t["images"])["loss"],
    "attention": lambda t: widgets.attention_maps(t["model"], t["images"][0]).cpu(),
    "project": lambda t: widgets.project(t["model"], t["heads"], t["recipe"], t["images"]),
    "online k-NN": lambda t: online_knn(t["set"], t["set"], k=3)(t["model"]),
    "plain k-NN": lambda t: t["probing"].knn_sides(
        *(t["x"][0], t["y"]) * 2, ks=[1, 5], device=t["at"]
    )["torch"](),
    "our k-NN": lambda t: t["probing"].knn_sides(
        *(t["x"][0], t["y"]) * 2, ks=[1, 5], device=t["at"]
    )["refiner"](),
    "the best reading": lambda t: t["gpu_training"].best_reading(
        *[Features({"cls": t["x"], "patch": t["x"]}, (1, 2))] * 2, [t["y"]] * 2, 5, t["at"]
    ),
}


@pytest.mark.parametrize("what", LOOKING)
def test_what_notebooks_look_at_comes_back_to_the_images(tools, scripts, what):
    mae = MAERecipe(dim=48, depth=4, decoder_dim=24, decoder_heads=2).build().eval()
    recipe = Recipe.gpu(size=32, patch=4, batch=4, blocks=(3, 4), pooling="cls", views=VIEWS)
    pixels = torch.randint(256, (8, 3, 32, 32), dtype=torch.uint8)
    run = begin(mae.encoder, complete_recipe(recipe, mae.encoder, pixels), CPU)
    things = {"mae": mae, "model": mae.encoder, "heads": run.heads.eval(), "recipe": recipe}
    with tools.answering(2000), tools.simulated(tools.GPU):
        tools.hollow(mae, run.heads, device=tools.GPU)
        images = torch.empty(8, 3, 32, 32, dtype=torch.uint8)
        labelled = ImageSet(images, torch.empty(8, dtype=torch.int64))
        things |= {"images": images, "set": labelled, "at": tools.GPU, **scripts}
        things |= {"x": torch.empty(2, 60, 16), "y": torch.empty(60, dtype=torch.int64)}
        found = LOOKING[what](things)
        assert not isinstance(found, torch.Tensor) or found.device == CPU


@pytest.mark.parametrize("what", PROBING)
def test_probing_keeps_to_the_gpu_and_gives_back_where_it_says(tools, what):
    with tools.answering(), tools.simulated(tools.GPU):
        result, home = PROBING[what](tools.GPU)
        assert result.device == home


def test_extraction_runs_on_the_gpu_and_gives_back_on_the_host(tools):
    model = build_vit(**SHAPE, seed=0)
    with tools.answering(), tools.simulated(tools.GPU):
        tools.hollow(model, device=tools.GPU)
        images = torch.empty(40, 3, 32, 32, dtype=torch.uint8)
        found = extract(model, images, device=tools.GPU, progress=False)
        assert {x.device for x in found.values()} == {CPU}
        assert found["patch"].shape == (4, 40, 48) and found["patch"].dtype == torch.float32


# ---------------------------------------------------------------- memory


@pytest.fixture
def small(scripts, monkeypatch):
    memory = scripts["memory"]
    monkeypatch.setattr(memory, "SHAPES", {"T": {"dim": 192, "depth": 4, "heads": 3}})
    memory.encoder.cache_clear()
    yield memory
    memory.encoder.cache_clear()


@pytest.mark.parametrize("way", ["plain", "checkpointing", "half frozen"])
def test_the_plan_foretells_the_peak_of_a_simulated_step(small, way):
    recipe = small.recipe_of("T", 64, way)
    peak = small.simulated_peak("T", recipe)
    foretold = NOT_COUNTED * sum(small.foretold("T", recipe).values())
    assert peak < foretold < 1.2 * peak
