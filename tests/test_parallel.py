"""Two processes that share a batch take the step that one takes with all of it.

``accelerate launch`` starts this file itself, as torchrun would; its ``main`` runs in each process.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from test_streams import png, write_tar

from refiner import cli
from refiner.base import parallel
from refiner.images.streams import SHARD, open_stream
from refiner.images.views import View, make_views
from refiner.models.encoders import freeze_first
from refiner.models.load import build_vit, load_model
from refiner.models.save import save_model
from refiner.training import keeping
from refiner.training.heads import IDHeads, NeighborQueue, nna_loss
from refiner.training.keeping import Keeper
from refiner.training.planning import traffic
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import begin, refine

ROOT = Path(__file__).parent.parent
TINY = Recipe.cpu(
    batch=8,
    head_steps=5,
    steps=6,
    hidden=16,
    predictor_hidden=16,
    out=8,
    queue=24,
    top_k=3,
    cached_views=1,
    frozen_blocks=1,
    blocks=(2, 3),
    keep="last",
    head_lr=1e-2,
    lr=1e-2,
    clip=1.0,
    ema=0.5,
    views=(View(size=16, blur=0.7, keep=0.5), View(size=16, solarize=0.5), View(size=8, blur=0.5)),
)

LABS = [i % 3 for i in range(24)]
CHANGES = {"groups_a_step": 2, "neighbors_from": "others", "cached_views": 0}
GROUPED = replace(TINY, **CHANGES, views=(View(size=16, noise=0.1), View(size=16, invert=0.5)))


def images() -> torch.Tensor:
    rng = torch.Generator().manual_seed(0)
    small = torch.rand(24, 3, 5, 5, generator=rng)
    return (torch.nn.functional.interpolate(small, 16, mode="bicubic").clamp(0, 1) * 255).byte()


def model():
    return build_vit(size=16, patch=4, dim=16, depth=3, heads=2, seed=0)


def command(folder: Path, name: str) -> list[str]:
    """A command line that refines the model in a folder."""
    words = ["refine", "--model", str(folder / "mae"), "--data", "digits", "--images", "64"]
    words += ["--device", "cpu", "--out", str(folder / name)]
    sizes = "batch=16 head_steps=2 steps=3 blocks=(2,3) frozen_blocks=1 hidden=16 "
    for value in (sizes + "predictor_hidden=16 out=8 queue=32").split():
        words += ["--set", value]
    return words


def count_bytes() -> dict[str, int]:
    """Lets torch.distributed count what this process hands to each kind of exchange."""
    counted = {}

    def counting(name, payload):
        original = getattr(dist, name)

        def wrapped(*args):
            counted[name] = counted.get(name, 0) + payload(*args).nbytes
            return original(*args)

        setattr(dist, name, wrapped)

    counting("all_gather", lambda parts, x: x)
    counting("reduce_scatter", lambda own, parts: own)
    counting("all_reduce", lambda x: x)
    return counted


def main(out: Path) -> None:
    """What each process does: a counted step, runs, a wrong call, a step in float64, a command."""
    counted = count_bytes()
    refine(
        model(),
        images(),
        recipe=replace(TINY, head_steps=0, steps=1),
        progress=False,
        log_every=1,
        device="cpu",
    )
    counted = dict(counted)
    run = refine(
        model(), images(), recipe=TINY, progress=False, log_every=1, out=out / "run", device="cpu"
    )
    found = {
        "loss": [e["loss"] for e in run.history],
        "queue_ids": run.queue.ids.tolist(),
        "similarity": [e["similarity"] for e in run.history],
        "weights": weights_of(run.model),
    }
    try:
        refine(model(), images()[: 24 - parallel.rank()], recipe=TINY, progress=False)
    except ValueError as error:
        found["error"] = str(error)
    asked = []  # by each process; only the first one's answer counts
    stop = lambda: asked.append(1) or len(asked) > 3 + 2 * parallel.rank()  # noqa: E731
    found["stopped"] = refine(model(), images(), recipe=TINY, progress=False, stop=stop).steps
    found["bytes"] = counted
    run, found["measured"] = kept_of_24()
    found["verdict"], found["kept"] = str(run.verdict), weights_of(run.model)
    stream = open_stream(str(out / "s-{0..1}.tar"), size=16)
    streamed = refine(model(), stream, recipe=replace(TINY, cached_views=0), progress=False)
    found["streamed"] = streamed.queue.ids.tolist()
    found["streamed loss"] = streamed.history[-1]["loss"]
    grouped = refine(model(), images(), recipe=GROUPED, groups=LABS, progress=False, log_every=1)
    found["grouped"] = [e["loss"] + e["similarity"] for e in grouped.history]
    found["gradients"] = [g.tolist() for g in float64_gradients()]
    (out / f"rank{parallel.rank()}.json").write_text(json.dumps(found))
    assert cli.main(command(out, "command")) == 0


def kept_of_24():
    """A run that keeps its best weights, and how often this process measured."""
    measure, calls = Keeper._measure, []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(keeping, "LEAST", 4)
        patch.setattr(Keeper, "_measure", lambda *a: (calls.append(1), measure(*a))[1])
        recipe = replace(TINY, keep="best")
        return refine(model(), images(), recipe=recipe, progress=False, device="cpu"), len(calls)


def weights_of(encoder) -> float:
    return float(sum(p.detach().double().sum() for p in encoder.parameters()))


def float64_gradients() -> list[torch.Tensor]:
    """Gradients of heads and loss for this process's share of a fixed batch."""
    torch.manual_seed(1)
    heads = IDHeads(2, 6, hidden=10, predictor_hidden=12, out=5).double()
    queue = NeighborQueue(16, 5, heads=2).double()
    queue.push(torch.randn(2, 16, 5, dtype=torch.float64), torch.arange(100, 116))
    x = torch.randn(2, 3, 8, 6, dtype=torch.float64)
    first, count = parallel.rows(8)
    z, p = heads(x[:, :, first : first + count])
    targets = z[:, :2].detach()
    found = queue.lookup(
        targets.flatten(1, 2),
        torch.arange(8)[first : first + count],
        k=4,
        generator=torch.Generator().manual_seed(2),
        rows=(first, 8),
    )
    neighbors = found.vectors.reshape(targets.shape)
    nna_loss(parallel.gather(p, dim=2), targets, neighbors, first=first).backward()
    parallel.average_gradients(heads.parameters(), piece=50)
    return [weight.grad for weight in heads.parameters()]


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    for shard in range(2):
        write_tar(out / f"s-{shard}.tar", {f"{i}.png": png(10 * shard + i, 16) for i in range(9)})
    save_model(model(), out / "mae")
    options = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no "
    options += "--dynamo_backend no --main_process_port 0"
    done = subprocess.run(
        [
            *(sys.executable, "-m", "accelerate.commands.launch", *options.split()),
            *(__file__, str(out)),
        ],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    (out / "said.txt").write_text(done.stdout)
    return out


@pytest.fixture(scope="module")
def ranks(two):
    return [json.loads((two / f"rank{r}.json").read_text()) for r in range(2)]


def test_two_processes_are_one_with_the_same_batch(two, ranks):
    alone = refine(model(), images(), recipe=TINY, progress=False, log_every=1)
    assert ranks[0]["queue_ids"] == alone.queue.ids.tolist()
    for key in ("loss", "similarity"):
        expected = torch.tensor([entry[key] for entry in alone.history])
        assert torch.allclose(torch.tensor(ranks[0][key]), expected, rtol=1e-4, atol=1e-4), key
    assert_alike(load_model(two / "run"), alone.model)


def test_the_first_measures_and_all_keep_the_same_weights(ranks):
    alone, measured = kept_of_24()
    assert [r["measured"] for r in ranks] == [measured, 0] and measured == 8
    assert ranks[0]["kept"] == ranks[1]["kept"] and ranks[0]["verdict"] == ranks[1]["verdict"]
    assert ranks[0]["verdict"] == str(alone.verdict)
    assert ranks[0]["kept"] == pytest.approx(weights_of(alone.model), rel=1e-3)


def test_the_command_is_one_process_with_the_same_batch(two):
    """On GPUs the same is said without --device; there is none here, so gloo talks."""
    said = (two / "said.txt").read_text()
    assert "of batch 16 on 2 processes" in said and said.count("refined in") == 1
    assert cli.main(command(two, "alone")) == 0
    one, other = (json.loads((two / n / "history.json").read_text()) for n in ("alone", "command"))
    for a, b in zip(one, other, strict=True):
        for key in ("loss", "similarity", "neighbor_accuracy"):
            assert b[key] == pytest.approx(a[key], rel=1e-4), key
    assert_alike(load_model(two / "command"), load_model(two / "alone"))


def assert_alike(one, two, atol=2e-4) -> None:
    """Equal to rounding, but for weights without a gradient: of its noise AdamW makes whole steps.

    A softmax does not see the keys' biases, nor the heads' first BatchNorm that of the final norm.
    """
    keys = slice(one.embed_dim, 2 * one.embed_dim)
    for name, weight in one.state_dict().items():
        apart = (weight - two.state_dict()[name]).abs()
        if name == "norm.bias":
            continue
        if name.endswith("qkv.bias"):
            apart[keys] = 0
        assert apart.max() <= atol + 1e-5 * weight.abs().max(), name


def test_what_is_exchanged_is_what_the_plan_counts(ranks):
    recipe = complete_recipe(replace(TINY, head_steps=0, steps=1), model(), images())
    run = begin(model(), recipe, torch.device("cpu"))
    freeze_first(run.model, recipe.frozen_blocks)
    weights = [*run.model.parameters(), *run.heads.parameters()]
    trained = sum(p.numel() for p in weights if p.requires_grad)
    expected = traffic(recipe, trained, 2)
    expected["all_gather"] += 4 * 2 * 4  # the log: loss, similarity, age, spread of two heads
    for r in ranks:
        assert r["bytes"] == expected


def test_all_processes_end_alike(ranks):
    for key in ("weights", "queue_ids", "loss", "gradients"):
        assert ranks[0][key] == ranks[1][key], key


def test_gradients_in_float64_are_those_of_one_process(ranks):
    for got, expected in zip(ranks[0]["gradients"], float64_gradients(), strict=True):
        got = torch.tensor(got, dtype=torch.float64)
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-12)
        assert expected.abs().max() > 1e-4


def test_each_process_streams_its_own_shards_into_one_queue(ranks):
    """The queue holds three batches: the first half of each is process 0's."""
    for key in ("streamed", "streamed loss"):
        assert ranks[0][key] == ranks[1][key]
    shards = (torch.tensor(ranks[0]["streamed"]) // SHARD).reshape(3, 2, 4)
    assert (shards[:, 0] == 0).all() and (shards[:, 1] == 1).all()


def test_two_processes_share_groups(ranks):
    """Parts, their BatchNorm, loss and neighbors are those of one process, and so are the views."""
    alone = refine(model(), images(), recipe=GROUPED, groups=LABS, progress=False, log_every=1)
    alone = torch.tensor([e["loss"] + e["similarity"] for e in alone.history])
    assert torch.allclose(torch.tensor(ranks[0]["grouped"]), alone, atol=2e-4)
    assert ranks[0]["grouped"] == ranks[1]["grouped"]


def test_the_first_process_stops_all(ranks):
    assert [found["stopped"] for found in ranks] == [3, 3]


def test_different_data_is_noticed(ranks):
    assert "the processes differ in the number of images: [24, 23]" in ranks[0]["error"]


def test_rows_of_a_batch_get_the_views_of_the_whole():
    whole = make_views(images()[:8], TINY.views, torch.Generator().manual_seed(3))
    for first in (0, 2, 5):
        rng = torch.Generator().manual_seed(3)
        some = make_views(images()[first : first + 3], TINY.views, rng, rows=(first, 8))
        for part, view in zip(some, whole, strict=True):
            assert torch.allclose(part, view[first : first + 3], atol=1e-6)


def test_a_share_of_the_targets_has_its_share_of_the_loss():
    torch.manual_seed(0)
    p, z, n = (torch.randn(2, k, 6, 5, dtype=torch.float64) for k in (3, 2, 2))
    halves = [
        nna_loss(p, z[:, :, i : i + 3], n[:, :, i : i + 3], first=i, per_head=True) for i in (0, 3)
    ]
    assert torch.allclose(sum(halves) / 2, nna_loss(p, z, n, per_head=True))
    with pytest.raises(ValueError, match="targets 4 to 10 of only 6"):
        nna_loss(p, z, n, first=4)


def test_an_uneven_share_is_refused(monkeypatch):
    monkeypatch.setattr(parallel, "world", lambda: 3)
    with pytest.raises(ValueError, match="batch of 8 cannot be shared by 3"):
        parallel.rows(8)


def test_one_process_is_left_alone():
    x = torch.randn(3, 2)
    assert parallel.gather(x) is x and parallel.average(x) is x and parallel.rows(8) == (0, 8)


def train(folder: str) -> None:
    """What a notebook hands to its launcher."""
    run = refine(
        model(), images(), recipe=TINY, progress=False, log_every=1, device="cpu", out=folder
    )
    assert parallel.world() == 2 and run.history


def test_a_notebooks_launcher_shares_the_batch_too(tmp_path):
    """accelerate's debug_launcher is its notebook_launcher for several processes without a GPU."""
    folders = os.pathsep.join([str(ROOT), str(ROOT / "tests")])
    environment = os.environ | {"PYTHONPATH": folders, "OMP_NUM_THREADS": "1"}
    code = "import sys, test_parallel; from accelerate import debug_launcher as launch; "
    code += "launch(test_parallel.train, (sys.argv[1],), num_processes=2)"
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stderr
    alone = refine(model(), images(), recipe=TINY, progress=False, log_every=1)
    assert_alike(load_model(tmp_path), alone.model)
    losses = [e["loss"] for e in json.loads(Path(tmp_path, "history.json").read_text())]
    expected = [e["loss"] for e in alone.history]
    assert torch.allclose(torch.tensor(losses), torch.tensor(expected), rtol=1e-4)


def test_accelerates_launcher_that_starts_one_process_only_is_noticed(monkeypatch):
    """`accelerate launch --cpu --num_processes 2` without MPI sets these, and starts one."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "True")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ValueError, match="one process only.*torchrun --nproc-per-node"):
        parallel.join("cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
