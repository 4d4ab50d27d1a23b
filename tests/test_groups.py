"""Batches of one group, losses within it, and neighbors from it or from others."""

import importlib
import itertools

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import tiny

from refiner.base.errors import UserError
from refiner.cli import main
from refiner.images.load import load_images
from refiner.images.sets import ImageSet
from refiner.images.views import View
from refiner.models.load import build_vit
from refiner.training.groups import GroupedOrder, barred, groups_of
from refiner.training.heads import NeighborQueue, nna_loss
from refiner.training.planning import plan
from refiner.training.recipe import complete_recipe
from refiner.training.step import batch_features, projected

R = importlib.import_module(
    "refiner.training.refining"
)  # the attribute of that name is the function
VIEWS = (View(size=8, keep=0.5), View(size=8))


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_vit(size=8, patch=4, dim=16, depth=2, heads=2)


def pictures(n=24, labs=3):
    g = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, 8, 8), generator=g, dtype=torch.uint8)
    return ImageSet(pixels, torch.arange(n) % 2, ("a", "b"), {"lab": np.arange(n) % labs})


@pytest.mark.parametrize("a, batch", [(1, 4), (2, 8), (4, 8)])
def test_every_part_of_a_batch_is_of_one_group(a, batch):
    groups = torch.tensor([0] * 21 + [1] * 10 + [2] * 5)[torch.randperm(36)]
    order = GroupedOrder(groups, tiny(batch=batch, groups_a_step=a))
    m = batch // a
    parts = sum(n // m for n in (21, 10, 5))
    assert order.per_epoch == parts // a
    for epoch in range(2):
        seen = []
        for step in range(order.per_epoch):
            ids = order(epoch * order.per_epoch + step)
            assert all(len(groups[ids[part::a]].unique()) == 1 for part in range(a))
            seen += ids.tolist()
        assert len(set(seen)) == len(seen) == batch * order.per_epoch, "nobody twice an epoch"
    again = GroupedOrder(groups, tiny(batch=batch, groups_a_step=a))
    assert torch.equal(again(3), order(3)) and not torch.equal(order(3), order(4))


def test_groups_are_met_as_often_as_they_are_large():
    groups = torch.tensor([0] * 40 + [1] * 20)
    order = GroupedOrder(groups, tiny(batch=4))
    met = torch.stack([groups[order(step)[0]] for step in range(order.per_epoch)])
    assert met.bincount().tolist() == [10, 5]


def test_small_groups_are_one_group_or_left_out():
    groups = torch.tensor([0] * 8 + [1, 1, 2, 2, 3, 3])
    with pytest.warns(UserWarning, match="3 of 4 groups have fewer than the 4 .* they are one"):
        order = GroupedOrder(groups, tiny(batch=4))
    assert {frozenset(groups[order(s)].tolist()) & {0} for s in range(3)} == {
        frozenset(),
        frozenset({0}),
    }
    with pytest.warns(UserWarning, match="1 of 2 groups .* left out"):
        assert GroupedOrder(groups[:10], tiny(batch=4)).per_epoch == 2
    with pytest.warns(UserWarning), pytest.raises(UserError, match="groups_a_step=0"):
        GroupedOrder(torch.tensor([0, 1, 1]), tiny(batch=4))


def test_the_loss_of_parts_is_the_mean_of_their_losses(model):
    """Heads, BatchNorm and loss see one part at a time, as if each had been a batch."""
    recipe = complete_recipe(
        tiny(batch=8, groups_a_step=2, swap="none", views=VIEWS), model, pictures()
    )
    run = R.begin(model, recipe, torch.device("cpu"))
    pixels, ids = pictures().images[:8], torch.arange(8)
    how = {"stage": 3, "generator": torch.Generator().manual_seed(1)}
    x_LVBD = batch_features(run.model, pixels, recipe, total=8, **how)
    z, p = projected(run.heads, x_LVBD, 2)
    naive = 0
    for part in range(2):
        own_z, own_p = run.heads(x_LVBD[:, :, part::2])
        assert torch.equal(z[:, :, part::2], own_z) and torch.equal(p[:, :, part::2], own_p)
        targets = own_z[:, :2]
        naive = naive + nna_loss(own_p, targets, targets, per_head=True, temperature=0.2) / 2
    step = R.refine_step(
        run.model,
        run.heads,
        run.queue,
        None,
        ids,
        recipe,
        stage=3,
        swap_chance=0.0,
        generator=torch.Generator(),
        groups=ids % 2,
        features=x_LVBD,
    )
    assert torch.allclose(step.loss, naive, atol=1e-5)


@pytest.mark.parametrize("which", ["anywhere", "own", "others"])
def test_neighbors_come_from_where_they_shall(which):
    g = torch.Generator().manual_seed(0)
    groups = torch.arange(40) % 4
    queue = NeighborQueue(16, 6, heads=2)
    queue.push(torch.randn(2, 12, 6, generator=g), torch.arange(12))  # four places are empty
    own = torch.arange(20, 28)
    mask = barred(groups, queue.ids, own, which)
    found = queue.lookup(torch.randn(2, 16, 6, generator=g), own, k=3, barred=mask, generator=g)
    asked, got = groups[own].repeat(2), groups[queue.ids[found.positions]]
    assert (found.positions >= 0).all()
    if which == "anywhere":
        assert mask is None and (asked == got).any() and (asked != got).any()
    else:
        assert ((asked == got) if which == "own" else (asked != got)).all()


def test_who_has_no_neighbor_of_the_own_group_keeps_itself():
    queue, z = NeighborQueue(4, 3), torch.randn(2, 3)
    queue.push(torch.randn(4, 3), torch.arange(4))
    found = queue.lookup(z, torch.tensor([8, 9]), barred=torch.ones(2, 4, dtype=torch.bool))
    assert (found.positions == -1).all()
    assert torch.allclose(found.vectors, torch.nn.functional.normalize(z, dim=-1))


def test_a_run_in_groups_goes_on_where_it_was(model, tmp_path):
    options = {"recipe": tiny(views=VIEWS), "groups": "lab", "progress": False, "log_every": 1}
    whole = R.refine(model, pictures(), **options)
    left = itertools.count()
    stop = lambda: next(left) == 6  # noqa: E731
    R.refine(model, pictures(), out=tmp_path, stop=stop, **options)
    with pytest.raises(UserError, match="grouped in another way"):
        R.refine(model, pictures(), out=tmp_path, resume=True, **options | {"groups": "class"})
    resumed = R.refine(model, pictures(), out=tmp_path, resume=True, **options)
    assert [e["loss"] for e in resumed.history] == [e["loss"] for e in whole.history]
    groups = pictures().factors["lab"]
    last = resumed.queue.ids.roll(-int(resumed.queue.pushed)).reshape(-1, 4)
    assert all(len(set(groups[ids])) == 1 for ids in last.numpy())
    mixed = R.refine(model, pictures(), **options | {"recipe": tiny(views=VIEWS, groups_a_step=0)})
    plain = R.refine(model, pictures(), **options | {"recipe": tiny(views=VIEWS), "groups": None})
    assert [e["loss"] for e in mixed.history] == [e["loss"] for e in plain.history]


def test_groups_have_many_names():
    images = pictures()
    for groups in ("lab", images.factors["lab"], [f"lab {i % 3}" for i in range(24)]):
        assert groups_of(images, groups).tolist() == [i % 3 for i in range(24)]
    assert groups_of(images, "class").tolist() == images.labels.tolist()
    assert groups_of(images, None) is None
    with pytest.raises(UserError, match="no 'colour' to group by, but class, lab"):
        groups_of(images, "colour")
    with pytest.raises(UserError, match="24 images need as many groups"):
        groups_of(images, [1, 2])


@pytest.mark.parametrize(
    "changes, groups, said",
    [
        ({"neighbors_from": "others"}, None, "need groups"),
        ({"cached_views": 1}, "lab", "leave cached_views at 0"),
        ({"groups_a_step": 3}, "lab", "3 groups a step do not share 4 images"),
        ({"groups_a_step": 4}, "lab", "4 groups a step do not share 4 images"),
    ],
)
def test_what_cannot_be_grouped_is_refused_before_the_start(model, changes, groups, said):
    for function in (R.refine, plan):
        with pytest.raises(UserError, match=said):
            function(model, pictures(), recipe=tiny(**changes), groups=groups)


def test_the_plan_tells_of_the_groups(model):
    said = str(plan(model, pictures(), recipe=tiny(groups_a_step=2), groups="lab", device="cpu"))
    assert (
        "groups   3 of 8 to 8 images, 2 a step, 2 images of each; neighbors from anywhere" in said
    )


def test_folders_of_labs_inside_of_classes(tmp_path, capsys):
    g = np.random.default_rng(0)
    for name, lab, i in itertools.product(("cat", "dog"), ("north", "south"), range(6)):
        path = tmp_path / "set" / name / lab / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(g.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(path)
    images = load_images(tmp_path / "set", group_by="parent", progress=False)
    assert images.labels.bincount().tolist() == [12, 12]
    pairs = {
        (int(y), int(lab)) for y, lab in zip(images.labels, images.factors["parent"], strict=True)
    }
    assert len(pairs) == 4
    with pytest.raises(UserError, match="grouped by 'parent'"):
        load_images(tmp_path / "set", group_by="folder")
    with pytest.raises(UserError, match="toybox has no folders"):
        load_images("toybox", n=16, group_by="parent")
    words = ["refine", "--plan", "--data", str(tmp_path / "set"), "--group-by", "parent"]
    words += ["--set", "batch=4", "--set", "queue=16", "--device", "cpu"]
    assert main(words) == 0
    assert "groups   2 of 12 to 12 images, 1 a step, 4 images of each" in capsys.readouterr().out
    assert main([*words[:-1], "cpu", "--group-by", "lab"]) == 2
    assert "no 'lab' to group by, but class" in capsys.readouterr().err
