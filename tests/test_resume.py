"""Nothing is lost: kills at any moment, a full disk, damaged states."""

import errno
import importlib
import os
import random
import subprocess
import time
import warnings
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from tiny import tiny

from refiner.base.errors import UserError
from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models.load import build_vit, load_model
from refiner.training import loop, states

R = importlib.import_module(
    "refiner.training.refining"
)  # the attribute of that name is the function
TINY = tiny(head_steps=8, steps=16, views=(View(size=8, keep=0.5), View(size=8)))


class Killed(BaseException):
    """What nobody catches."""


@pytest.fixture(scope="module")
def images():
    rng = torch.Generator().manual_seed(0)
    return torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8, generator=rng)


@pytest.fixture(scope="module")
def model():
    return build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)


@pytest.fixture(scope="module")
def whole(model, images):
    return R.refine(model, images, recipe=TINY, progress=False, log_every=1)


@pytest.fixture(scope="module")
def saved(model, images, tmp_path_factory):
    """A folder with the states of a run; its last one is for a test to replace."""
    out = tmp_path_factory.mktemp("saved")
    run(model, images, out)
    return out


def run(model, images, out, *, recipe=TINY, resume=None):
    resume = (out / "state.pt").is_file() if resume is None else resume
    return R.refine(
        model,
        images,
        recipe=recipe,
        out=out,
        resume=resume,
        save_every=1,
        log_every=1,
        progress=False,
    )


def assert_same(one, two):
    for a, b in ((one.model, two.model), (one.heads, two.heads), (one.queue, two.queue)):
        assert all(torch.equal(v, b.state_dict()[k]) for k, v in a.state_dict().items())
    assert [e["loss"] for e in one.history] == [e["loss"] for e in two.history]


def mortal(monkeypatch, life):
    """Lets a process die at its life-th moment: in a step, before, amid or after writing."""
    left = [life]
    where = []

    def moment(name):
        left[0] -= 1
        if left[0] == 0:
            where.append(name)
            raise Killed

    def dying(module, name, amid=None):
        original = getattr(module, name)

        def wrapped(*args, **kwargs):
            moment(f"before {name}")
            if amid:
                amid(*args)
            result = original(*args, **kwargs)
            moment(f"after {name}")
            return result

        monkeypatch.setattr(module, name, wrapped)

    def half_written(state, file):
        file.write(b"half of a state")
        moment("amid save")
        file.seek(0)

    dying(R, "refine_step")
    dying(torch, "save", half_written)
    dying(os, "link")
    dying(os, "replace")
    return where


def test_twenty_kills_at_random_moments(model, images, whole, tmp_path, monkeypatch):
    rng, deaths = random.Random(0), []
    while len(deaths) < 20:
        with monkeypatch.context() as patch:
            where = mortal(patch, rng.randint(1, 22))
            with pytest.raises(Killed):
                run(model, images, tmp_path)
            deaths += where
    assert len({name.split()[-1] for name in deaths}) >= 3, f"not only in one place: {deaths}"
    assert_same(whole, run(model, images, tmp_path))
    assert not list(tmp_path.glob(".state*"))


def test_by_default_states_are_saved_a_minute_apart(model, images, whole, tmp_path, monkeypatch):
    """A step takes 25 seconds of this clock: three of them are more than a minute."""
    step, saved, taken = R.refine_step, [], []

    def counted(*args, **kwargs):
        taken.append(1)
        if len(taken) == 14:
            raise Killed
        return step(*args, **kwargs)

    monkeypatch.setattr(R, "refine_step", counted)
    monkeypatch.setattr(loop, "time", SimpleNamespace(monotonic=lambda: 25.0 * len(taken)))
    monkeypatch.setattr(loop, "SAVE_EVERY", 2)
    save = loop.Loop.save
    monkeypatch.setattr(loop.Loop, "save", lambda self: (saved.append(self.done), save(self)))
    options = {"recipe": TINY, "out": tmp_path, "log_every": 1, "progress": False}
    with pytest.raises(Killed):
        R.refine(model, images, **options)
    assert saved == [4, 8, 12]
    assert_same(whole, R.refine(model, images, resume=True, **options))
    assert saved == [4, 8, 12, 16, 20, 24]


def test_by_default_the_last_step_is_saved_however_short_the_run(model, images, tmp_path):
    recipe = replace(TINY, head_steps=40, steps=60)
    R.refine(model, images, recipe=recipe, out=tmp_path, progress=False)
    assert states.load_state(tmp_path / "state.pt")["done"] == 100
    assert not (tmp_path / "state.previous.pt").exists()


@pytest.mark.parametrize("at", [0, 3, 8, 13])
def test_stopped_and_resumed_is_the_uninterrupted_run(model, images, whole, tmp_path, at):
    """In stage 2, between the stages and in stage 3; the average of that moment is returned."""
    asked = []
    options = {"recipe": TINY, "out": tmp_path, "log_every": 1, "progress": False}
    stopped = R.refine(model, images, stop=lambda: asked.append(1) or len(asked) > at, **options)
    state = states.load_state(tmp_path / "state.pt")
    assert stopped.steps == state["done"] == len(stopped.history) == at
    for key, value in stopped.model.state_dict().items():
        assert torch.equal(value, state["ema"][key]), key
    assert load_model(tmp_path).refiner_card["stopped_after_steps"] == at
    resumed = R.refine(model, images, resume=True, **options)
    assert_same(whole, resumed)
    assert "stopped_after_steps" not in resumed.model.refiner_card


def test_a_deadline_that_is_over_leaves_the_weights_of_the_start(model, images):
    run = R.refine(model, images, recipe=TINY, stop=time.monotonic(), progress=False)
    assert run.steps == 0 and run.history == []
    for key, value in model.state_dict().items():
        assert torch.equal(value, run.model.state_dict()[key]), key


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    ],
)
def test_full_disk_leaves_the_states_intact(model, images, whole, tmp_path, monkeypatch, error):
    save, calls = torch.save, []

    def full(state, file):
        calls.append(1)
        if len(calls) > 5:
            file.write(b"as much as fits")
            raise error
        save(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full)
        with pytest.raises(OSError, match="No space left|is the disk full"):
            run(model, images, tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["state.previous.pt", "state.pt"]
    assert states.load_state(tmp_path / "state.pt")["done"] == 5
    assert states.load_state(tmp_path / "state.previous.pt")["done"] == 4
    assert_same(whole, run(model, images, tmp_path))


@pytest.mark.parametrize("damage", ["cut", "empty", "missing"])
def test_a_damaged_state_falls_back_to_the_one_before(model, images, whole, tmp_path, damage):
    run(model, images, tmp_path)
    state = tmp_path / "state.pt"
    content = state.read_bytes()
    state.write_bytes(content[: len(content) // 2] if damage == "cut" else b"")
    if damage == "missing":
        state.unlink()
        assert_same(whole, run(model, images, tmp_path, resume=True))
        return
    with pytest.warns(UserWarning, match="is damaged"):
        assert_same(whole, run(model, images, tmp_path))
    for name in ("state.pt", "state.previous.pt"):
        (tmp_path / name).write_bytes(b"")
    with pytest.warns(UserWarning), pytest.raises(UserError, match="cannot resume: .* is damaged"):
        run(model, images, tmp_path)


def test_a_bit_that_flips_anywhere_is_found_or_harmless(tmp_path):
    """torch compares no checksums; between the records of a zip file there is nothing to lose."""
    state, path = {"a": torch.arange(500.0), "b": [1, {"c": "text"}]}, tmp_path / "state.pt"
    for step in (1, 2):
        states.save_state(path, state | {"step": step}, keep_previous=True)
    content, rng, fallen_back = path.read_bytes(), random.Random(0), 0
    for _ in range(200):
        broken = bytearray(content)
        broken[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.unlink()
        path.write_bytes(broken)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = states.load_state(path)
        assert torch.equal(found.pop("a"), state["a"]) and found["b"] == state["b"]
        assert found["step"] == (1 if caught else 2)
        fallen_back += bool(caught)
    assert fallen_back > 50


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda s: s.pop("done"), "done is missing"),
        (lambda s: s.update(done="3"), "done is '3'; it needs to be a whole number"),
        (lambda s: s.update(done=25), "done is 25"),
        (lambda s: s.pop("heads"), "holds no heads: it is of another command"),
        (lambda s: s.update(recipe={"dim": 16}), "there is no setting 'dim'"),
        (lambda s: s.update(recipe=None), "recipe is None"),
        (lambda s: s.update(history=[{"loss": 1}]), "does not hold what it should"),
        (lambda s: s["model"].pop("norm.weight"), "does not hold what it should"),
        (lambda s: s.update(optimizers={"9": {}}), "does not hold what it should"),
        (
            lambda s: s["optimizers"]["3"]["state"][0].update(exp_avg=torch.zeros(3)),
            "other shapes than the weights",
        ),
    ],
)
def test_a_state_that_is_not_of_this_run_is_one_sentence(model, images, saved, change, said):
    state = states.load_state(saved / "state.previous.pt")
    change(state)
    states.save_state(saved / "state.pt", state)
    with pytest.raises(UserError, match=said) as caught:
        run(model, images, saved)
    assert "state.pt" in str(caught.value) and "\n" not in str(caught.value)


def test_a_living_run_keeps_its_folder(model, images, tmp_path):
    def second(*_):
        with pytest.raises(UserError, match="another run writes to"):
            run(model, images, tmp_path, resume=False)

    options = {"recipe": replace(TINY, head_steps=1, steps=1), "out": tmp_path, "log_every": 1}
    R.refine(model, images, watch=[second], progress=False, **options)
    assert states.load_state(tmp_path / "state.pt")["done"] == 2


def test_a_copy_is_kept_where_there_are_no_hard_links(tmp_path, monkeypatch):
    def refused(*_):
        raise OSError("no hard links here")

    monkeypatch.setattr(os, "link", refused)
    for step in (1, 2, 3):
        states.save_state(tmp_path / "state.pt", {"step": step}, keep_previous=True)
    assert states.load_state(tmp_path / "state.pt") == {"step": 3}
    assert states.load_state(tmp_path / "state.previous.pt") == {"step": 2}


@pytest.mark.parametrize("resume", [True, False])
def test_what_killed_runs_left_is_removed(model, images, tmp_path, resume):
    run(model, images, tmp_path, recipe=replace(TINY, steps=1))
    dead = subprocess.Popen(["true"])
    dead.wait()
    left = [tmp_path / f".{name}.{dead.pid}-a1b2c3d4.half" for name in ("state.pt", "card.json")]
    kept = [tmp_path / f".state.pt.{os.getppid()}-a1b2c3d4.half", tmp_path / ".of.another.half"]
    for path in (*left, *kept):
        path.write_bytes(b"half")
    run(model, images, tmp_path, recipe=replace(TINY, steps=1), resume=resume)
    assert not any(p.exists() for p in left) and all(p.exists() for p in kept)
    assert not (tmp_path / ".lock").exists()


def test_only_what_does_not_shape_the_state_may_change(model, images, tmp_path):
    run(model, images, tmp_path)
    run(model, images, tmp_path, recipe=replace(TINY, lr=1e-4, clip=1.0, checkpoint=True))
    with pytest.raises(ValueError, match=r"another one \(queue, seed\)"):
        run(model, images, tmp_path, recipe=replace(TINY, seed=3, queue=5))


def test_only_the_same_model_and_images_go_on(model, images, whole, tmp_path):
    run(model, images, tmp_path)
    other = build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=1)
    with pytest.raises(ValueError, match="cannot resume.*other weights at the start; give it"):
        run(other, images, tmp_path)
    with pytest.raises(ValueError, match=r"has seen 12 images \(or shards\), not 8"):
        run(model, images[:8], tmp_path)
    named = [ImageSet(images=images, name=name) for name in ("a/cats", "b/cats", "dogs")]
    run(model, named[0], tmp_path, resume=False)
    assert_same(whole, run(model, named[1], tmp_path))  # the folder has moved
    with pytest.raises(ValueError, match="images were 'cats', not 'dogs'"):
        run(model, named[2], tmp_path)
    with pytest.raises(ValueError, match="its images had other pixels"):
        run(model, ImageSet(images=images.flip(0), name="cats"), tmp_path)


def test_states_of_older_versions_still_load(model, images, whole, tmp_path):
    run(model, images, tmp_path)
    state = states.load_state(tmp_path / "state.previous.pt")
    del state["origin"], state["seen"], state["keeper"]
    state["stream"] = state.pop("source")
    state["ema"] = {"shadow": state["ema"], "updates": 15}
    states.save_state(tmp_path / "state.pt", state)
    assert_same(whole, run(model, images, tmp_path))


def test_a_fresh_start_sets_the_state_of_an_earlier_run_aside(
    model, images, whole, tmp_path, monkeypatch
):
    """Or an interruption before the first save would go on with that run's weights."""
    run(model, images, tmp_path)
    other = build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=1)
    with monkeypatch.context() as patch:
        mortal(patch, 3)
        with pytest.raises(Killed), pytest.warns(UserWarning, match="now state.old.pt"):
            run(other, images, tmp_path, resume=False)
    with pytest.raises(FileNotFoundError, match="nothing to resume"):
        run(other, images, tmp_path, resume=True)
    (tmp_path / "state.old.pt").rename(tmp_path / "state.pt")  # it was a mistake
    assert_same(whole, run(model, images, tmp_path, resume=True))


def test_a_refused_start_leaves_the_states(model, images, whole, tmp_path):
    run(model, images, tmp_path)
    with pytest.raises(ValueError, match="queue is 0"):
        run(model, images, tmp_path, recipe=replace(TINY, queue=0), resume=False)
    assert_same(whole, run(model, images, tmp_path, resume=True))


def test_a_broken_weight_is_never_saved(model, images, tmp_path, monkeypatch):
    average = loop.EMA.update

    def broken(self, module, t):
        average(self, module, t)
        if t == 5:  # after the step whose loss was fine
            torch.nn.init.constant_(module.norm.weight, float("nan"))

    monkeypatch.setattr(loop.EMA, "update", broken)
    with pytest.raises(FloatingPointError, match=r"weight is no longer finite.*state is in"):
        run(model, images, tmp_path)
    state = states.load_state(tmp_path / "state.pt")
    assert state["done"] == TINY.head_steps + 4
    assert all(v.isfinite().all() for v in state["model"].values())
