"""Schedules, averages, and writing without loss."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from refiner.base import files, places, tensors
from refiner.base.errors import UserError
from refiner.training import loop, states


def test_schedule_has_the_textbook_values():
    schedule = {"total": 100, "warmup": 10, "peak": 2.0, "floor": 0.0}
    lr = [loop.cosine_schedule(step, **schedule) for step in range(101)]
    assert lr[0] == pytest.approx(0.2) and lr[9] == pytest.approx(2.0) and lr[10] == 2.0
    assert lr[55] == pytest.approx(1.0) and lr[100] == pytest.approx(0.0)
    assert lr[10:] == sorted(lr[10:], reverse=True)
    assert loop.cosine_schedule(5, total=5, warmup=0, peak=1.0) == pytest.approx(1e-6)


def test_each_epoch_is_a_permutation_and_depends_on_seed_and_step_alone():
    steps = [loop.batch_indices(103, 10, seed=1, step=s) for s in range(20)]
    for epoch in (steps[:10], steps[10:]):
        seen = torch.cat(epoch)
        assert len(seen.unique()) == 100
    assert not torch.equal(steps[0], steps[10])
    assert torch.equal(steps[13], loop.batch_indices(103, 10, seed=1, step=13))
    assert not torch.equal(steps[3], loop.batch_indices(103, 10, seed=2, step=3))


def test_step_generators_are_distinct_and_repeatable():
    draw = lambda seed, step: torch.rand(4, generator=tensors.step_generator(seed, step))  # noqa: E731
    assert torch.equal(draw(0, 5), draw(0, 5))
    assert len({tuple(draw(s, t).tolist()) for s in range(4) for t in range(4)}) == 16


def test_ema_is_the_recursion():
    layer = nn.Linear(2, 1, bias=False)
    ema = loop.EMA(layer, decay=0.9)
    expected = layer.weight.detach().double().clone()
    for step in range(1, 40):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(1, 2))
        ema.update(layer, step)
        decay = min(0.9, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * layer.weight.detach().double()
    assert torch.allclose(ema.module.weight.double(), expected, atol=1e-6)


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path):
    target = tmp_path / "state.pt"
    states.save_state(target, {"step": 1})
    with pytest.raises(RuntimeError), files.replacing(target) as temporary:
        temporary.write_bytes(b"half")
        raise RuntimeError("disk full")
    assert states.load_state(target) == {"step": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_json_refuses_nan_and_keeps_the_old(tmp_path):
    files.write_json(tmp_path / "a.json", {"x": 1})
    with pytest.raises(ValueError):
        files.write_json(tmp_path / "a.json", {"x": math.nan})
    assert '"x": 1' in (tmp_path / "a.json").read_text()


def test_nothing_to_resume_is_said(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing to resume.*without --resume"):
        states.load_state(tmp_path / "state.pt")


def test_a_state_with_strange_objects_is_not_called_damaged(tmp_path):
    states.save_state(tmp_path / "state.pt", {"accuracy": np.float64(0.5)})
    with (
        pytest.warns(UserWarning, match="holds numpy.*; only tensors and plain"),
        pytest.raises(UserError, match="state.pt holds numpy"),
    ):
        states.load_state(tmp_path / "state.pt")


def test_machine_has_no_host_name():
    import socket

    facts = places.machine()
    assert facts["cores"] >= 1 and facts["torch"] == torch.__version__
    assert socket.gethostname() not in str(facts)
