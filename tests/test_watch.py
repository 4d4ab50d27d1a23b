"""Watching: what stops a run, what it sees, and where it is shown."""

import importlib
import json
import math
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from tiny import tiny

from refiner.images.sets import ImageSet
from refiner.images.sources import Batches
from refiner.models.encoders import allow_any_size, head_features
from refiner.models.load import build_vit
from refiner.probing.features import extract
from refiner.probing.neighbors import knn_accuracy
from refiner.training import watch
from refiner.training.heads import IDHeads, NeighborQueue
from refiner.training.recipe import complete_recipe
from refiner.training.step import _age, _spread
from refiner.visuals import live

R = importlib.import_module(
    "refiner.training.refining"
)  # the attribute of that name is the function
TINY = tiny(head_steps=2, steps=4)


def pictures(n, seed=0):
    rng = torch.Generator().manual_seed(seed)
    x = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8, generator=rng)
    return ImageSet(images=x, labels=torch.arange(n) % 2, classes=("a", "b"))


@pytest.fixture(scope="module")
def model():
    return build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)


def entry(loss=1.0, spread=0.9, stage=3, step=1):
    return {"stage": stage, "step": step, "loss": [1.0, loss], "spread": [0.9, spread]}


# ---------------------------------------------------------------- what stops a run


def test_healthy_entries_pass():
    guard = watch.CollapseGuard(TINY)
    for step in range(50):
        guard.check(entry(loss=math.log(4) * (1 + 0.01 * (-1) ** step), spread=0.2, step=step))


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops(loss):
    with pytest.raises(FloatingPointError, match="not finite at stage 3, step 1"):
        watch.CollapseGuard(TINY).check(entry(loss=loss))


def test_collapsed_projections_stop():
    with pytest.raises(watch.Collapse, match="head on block 2 collapsed at stage 2, step 7"):
        watch.CollapseGuard(TINY).check(entry(spread=0.01, stage=2, step=7))


def test_a_loss_that_stays_at_the_uniform_value_stops():
    guard, uniform = watch.CollapseGuard(TINY), math.log(4) + 1e-5
    for stage in (2, 2, 2, 2, 2, 2, 3, 3, 3, 3):  # in stage 2 it may be; then four times
        guard.check(entry(loss=uniform, stage=stage))
    guard.check(entry(loss=1.3))  # recovered
    for _ in range(4):
        guard.check(entry(loss=uniform))
    with pytest.raises(watch.Collapse, match=r"block 2 stays at log\(batch\) = 1.386"):
        guard.check(entry(loss=uniform))


def test_a_run_that_collapses_says_where_the_last_good_state_is(model, tmp_path):
    with pytest.raises(watch.Collapse, match="collapsed at stage 2, step 2.*last good state"):
        R.refine(
            model,
            pictures(8),
            recipe=replace(TINY, head_lr=1e38),
            progress=False,
            log_every=1,
            save_every=1,
            out=tmp_path,
        )


# ---------------------------------------------------------------- what it sees


def test_age_is_counted_in_steps_and_spread_is_that_of_directions():
    queue = NeighborQueue(6, 3)
    for step in range(3):
        queue.push(torch.eye(3)[step : step + 1], torch.tensor([step]))
    found = queue.lookup(torch.eye(3)[None, [2, 0, 0]], torch.tensor([10, 11, 12]))
    assert _age(found, queue).item() == pytest.approx((1 + 3 + 3) / 3)
    assert _spread(torch.ones(1, 5, 3)).item() == pytest.approx(0, abs=1e-6)
    torch.manual_seed(0)
    assert _spread(torch.randn(1, 4000, 64)).item() == pytest.approx(1, abs=0.01)


def test_every_entry_tells_loss_similarity_age_and_spread_of_every_head(model):
    run = R.refine(model, pictures(8), recipe=TINY, progress=False, log_every=1)
    for e in run.history:
        for name in ("loss", "similarity", "neighbor_accuracy", "age", "spread"):
            assert len(e[name]) == 2, name
    assert run.history[0]["age"] == [0, 0], "the queue was empty"
    # Four of eight images a step, twelve entries: no neighbor is older than three steps.
    assert all(0 < a <= 3 for e in run.history[1:] for a in e["age"])


def test_online_knn_is_extract_and_knn(model):
    bank, queries = pictures(20), pictures(10, seed=1)
    found = watch.online_knn(bank, queries, k=3)(model)
    keys, asked = (extract(model, s, progress=False)["cls"] for s in (bank, queries))
    expected = knn_accuracy(keys, bank.labels, asked, queries.labels, k=3)
    assert found["knn"] == pytest.approx(float(expected[-1]), abs=1e-4)
    assert found["knn_best"] == pytest.approx(float(expected.max()), abs=1e-4)
    with pytest.raises(ValueError, match="needs labels"):
        watch.online_knn(ImageSet(images=bank.images), queries)


def test_online_knn_enters_the_history(model):
    run = R.refine(
        model,
        pictures(8),
        recipe=TINY,
        progress=False,
        log_every=1,
        evaluate_every=2,
        evaluate=watch.online_knn(pictures(8), pictures(6, seed=1), k=2),
    )
    assert [e["step"] for e in run.history if "knn" in e] == [2, 4]


@pytest.mark.parametrize("head_steps", [0, 2])
def test_each_result_belongs_to_the_step_that_it_saw(model, head_steps):
    """Also at steps that are not logged otherwise."""
    seen = []
    recipe = replace(TINY, head_steps=head_steps, steps=8)
    history = R.refine(
        model,
        pictures(8),
        recipe=recipe,
        progress=False,
        log_every=4,
        evaluate_every=3,
        evaluate=lambda encoder: seen.append(1) or {"count": len(seen)},
    ).history
    third = {e["step"]: e.get("count") for e in history if e["stage"] == 3}
    assert third == {3: 1, 4: None, 6: 2, 8: 3} and len(seen) == 3


def test_numbers_of_every_kind_can_be_saved_and_resumed(model, tmp_path):
    """Numpy's, tensors of one element and what is not finite, in the state and in JSON."""
    numbers = {
        "a": np.float32(0.5),
        "b": torch.tensor(3),
        "c": torch.tensor([0.25]),
        "d": math.nan,
        "e": np.float64("inf"),
        "f": np.int64(2),
        "g": [np.float64(1.5), 2],
        "h": True,
    }
    plain = {"a": 0.5, "b": 3, "c": 0.25, "d": None, "e": None, "f": 2, "g": [1.5, 2], "h": True}
    options = {
        "recipe": TINY,
        "progress": False,
        "save_every": 1,
        "out": tmp_path,
        "evaluate": lambda _: numbers,
        "evaluate_every": 2,
    }
    R.refine(model, pictures(8), **options)
    history = R.refine(model, pictures(8), resume=True, **options).history
    assert {name: history[-1][name] for name in plain} == plain
    assert all(type(history[-1][name]) is type(plain[name]) for name in plain)
    assert json.loads((tmp_path / "history.json").read_text()) == history


@pytest.mark.parametrize(
    "found, message",
    [
        (0.5, "returned a float; let it return a dict"),
        ({"acc": torch.rand(3)}, r"a Tensor of shape \[3\] as 'acc'"),
        ({"acc": "high"}, "a str as 'acc'; let it return numbers"),
        ({1: 0.5}, "named a number 1"),
    ],
)
def test_an_evaluation_without_numbers_stops_at_once(model, found, message):
    with pytest.raises(TypeError, match=message):
        R.refine(
            model,
            pictures(8),
            recipe=TINY,
            progress=False,
            evaluate=lambda _: found,
            evaluate_every=1,
        )


# ---------------------------------------------------------------- where it is shown


def test_the_live_figure_replaces_itself(model, monkeypatch):
    shown, updates = [], []

    def display(figure, display_id):
        shown.append((figure, display_id))
        return SimpleNamespace(update=updates.append)

    monkeypatch.setattr("IPython.display.display", display)
    figure = live.LiveFigure(every=0)
    history = R.refine(
        model, pictures(8), recipe=TINY, progress=False, log_every=1, watch=[figure]
    ).history
    assert len(shown) == 1 and shown[0][1] is True and len(updates) == len(history) - 1
    assert len(figure.figure.axes[0].lines[0].get_xdata()) == len(history)
    rarely = live.LiveFigure(every=3600)
    R.refine(model, pictures(8), recipe=TINY, progress=False, log_every=1, watch=[rarely])
    assert len(shown) == 2, "one drawing an hour"


def test_tensorboard_gets_every_number(model, tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = R.refine(
        model,
        pictures(8),
        recipe=TINY,
        progress=False,
        log_every=1,
        watch=[watch.TensorBoard(tmp_path)],
    )
    events = EventAccumulator(str(tmp_path)).Reload()
    for head in range(2):
        scalars = events.Scalars(f"loss/head {head + 1}")
        assert [s.step for s in scalars] == [1, 2, 3, 4, 5, 6]
        expected = [e["loss"][head] for e in run.history]
        assert [s.value for s in scalars] == pytest.approx(expected, rel=1e-6)
    assert len(events.Scalars("lr")) == 6


class Written:
    """What TensorBoard would get: steps by name."""

    def __init__(self, folder):
        self.steps = {}

    def add_scalar(self, name, value, step):
        self.steps.setdefault(name, []).append(step)

    def flush(self):
        pass


def test_tensorboards_steps_go_on_after_a_resume(model, tmp_path, monkeypatch):
    """Stage 3 comes after stage 2, which the resumed process has not seen."""
    stand_in = SimpleNamespace(SummaryWriter=Written)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", stand_in)

    def stop(history):
        if (history[-1]["stage"], history[-1]["step"]) == (3, 2):
            raise KeyboardInterrupt

    first, second = watch.TensorBoard(tmp_path), watch.TensorBoard(tmp_path)
    options = {"recipe": TINY, "out": tmp_path, "save_every": 1, "log_every": 1, "progress": False}
    with pytest.raises(KeyboardInterrupt):
        R.refine(model, pictures(8), watch=[first, stop], **options)
    R.refine(model, pictures(8), watch=[second], resume=True, **options)
    assert first.writer.steps["lr"] == [1, 2, 3, 4] and second.writer.steps["lr"] == [4, 5, 6]


# ---------------------------------------------------------------- options of a step


def test_checkpointing_changes_memory_not_gradients(model):
    recipe = complete_recipe(TINY, model, pictures(8))
    gradients = []
    for checkpoint in (False, True):
        run = R.begin(model, replace(recipe, checkpoint=checkpoint), torch.device("cpu"))
        step = R.refine_step(
            run.model,
            run.heads,
            run.queue,
            pictures(8).images[:4],
            torch.arange(4),
            run.recipe,
            stage=3,
            swap_chance=1.0,
            generator=torch.Generator().manual_seed(0),
        )
        step.loss.sum().backward()
        gradients.append([p.grad for p in run.model.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1]) > 0
    assert all(map(torch.equal, *gradients))


def test_each_head_can_have_its_own_pooling(model):
    allow_any_size(model)
    x = torch.randn(3, 3, 8, 8)
    one = {p: head_features(model, x, (1, 2), pooling=p) for p in ("cls", "patch")}
    mixed = head_features(model, x, (1, 2), pooling=("patch", "cls"))
    assert torch.equal(mixed[0], one["patch"][0]) and torch.equal(mixed[1], one["cls"][1])
    run = R.refine(
        model, pictures(8), recipe=replace(TINY, pooling=("patch", "cls")), progress=False
    )
    assert run.recipe.pooling == ("patch", "cls")


def test_loss_weights_scale_each_heads_gradient(model, monkeypatch):
    """A head whose weight is 0 from the start does not move in stage 3."""
    monkeypatch.setattr(R, "head_loss_weights", lambda recipe, step: [0.0, 1.0])
    recipe = replace(TINY, head_steps=0, head_weight_decay=0.0)
    run = R.refine(model, pictures(8), recipe=recipe, progress=False)
    torch.manual_seed(TINY.seed)
    fresh = IDHeads(2, 8, hidden=8, predictor_hidden=8, out=4)
    for now, before in zip(run.heads.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(now[0], before[0]) and not torch.equal(now[1], before[1])


# ---------------------------------------------------------------- reading ahead


class Files:
    """Images that are read when indexed, and count it."""

    def __init__(self):
        self.read = []

    def __len__(self):
        return 100

    def __getitem__(self, index):
        self.read.append(index.tolist())
        if 99 in index:
            raise OSError("cannot read photo99.jpg")
        return index.to(torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2)


def test_files_are_read_ahead_in_order():
    files = Files()
    batches = Batches(files, lambda s: torch.tensor([s, s + 1]), 2, torch.device("cpu"), steps=5)
    for step in range(5):
        pixels, ids = batches.batch(step)
        assert pixels[:, 0, 0, 0].tolist() == ids.tolist() == [step, step + 1]
    batches.close()
    assert files.read == [[s, s + 1] for s in range(5)], "each once, none too many"


def test_an_unreadable_file_stops_with_its_name():
    index = lambda s: torch.tensor([99 if s == 2 else s])  # noqa: E731
    batches = Batches(Files(), index, 1, torch.device("cpu"), steps=4)
    assert [batches.batch(step)[1].item() for step in range(2)] == [0, 1]
    with pytest.raises(OSError, match="photo99"):
        batches.batch(2)
    batches.close()
