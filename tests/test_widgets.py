"""The small explorers compute what they say, and redraw when a control moves."""

import matplotlib.pyplot as plt
import pytest
import torch
import torch.nn.functional as F

from refiner.images.views import View, make_view
from refiner.models import encoders
from refiner.models.load import build_vit
from refiner.models.mae import MAERecipe, reconstruct
from refiner.training.heads import IDHeads, NeighborQueue
from refiner.training.recipe import Recipe
from refiner.visuals import static_copy, widgets

SMALL = {"size": 16, "patch": 4, "dim": 24, "depth": 3, "heads": 3}


def images(n=6, size=16):
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, size, size), generator=generator, dtype=torch.uint8)


@pytest.fixture(scope="module")
def mae():
    return MAERecipe(**SMALL, decoder_dim=24).build().eval()


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return build_vit(**SMALL).eval()


def picture(panel):
    return bytes(panel._picture.value)


# ---------------------------------------------------------------- masks


def test_painting_is_that_of_reconstruct_for_the_same_mask(mae):
    whole = reconstruct(mae, images(1), mask_ratio=0.5, seed=3)
    ours = widgets.paint(mae, images(1)[0], whole["mask"][0])
    for name in ("original", "masked", "painted"):
        assert torch.allclose(ours[name], whole[name][0], atol=1e-5)
    assert torch.allclose(ours["error"], whole["loss"], atol=1e-5)


@pytest.mark.parametrize("hidden", [torch.zeros(16), torch.ones(16), torch.zeros(9)])
def test_a_mask_must_hide_and_show_something(mae, hidden):
    with pytest.raises(ValueError, match="at least one patch|must be bool"):
        widgets.paint(mae, images(1)[0], hidden)


def test_patches_are_hidden_by_hand_or_by_share(mae):
    panel = widgets.mask_explorer(mae, images(), ratio=0.5)
    patches, first = panel.controls["hidden"], picture(panel)
    assert sum(patches.value) == 8
    patches.value = [on ^ (i == 5) for i, on in enumerate(patches.value)]  # as a click does
    assert sum(patches.value) in (7, 9) and picture(panel) != first
    panel.controls["ratio"].value = 0.75
    assert sum(patches.value) == 12
    before = patches.value
    panel.controls["seed"].value = 1
    assert sum(patches.value) == 12 and patches.value != before
    shown, first = patches.picture, picture(panel)
    panel.controls["image"].value = 3
    assert patches.picture != shown and picture(panel) != first, "the board shows the image"


# ---------------------------------------------------------------- attention


def test_attention_is_what_the_block_applies(model):
    image = images(1)[0]
    maps = widgets.attention_maps(model, image)
    assert maps.shape == (3, 3, 17, 17)
    assert torch.allclose(maps.sum(-1), torch.ones(3, 3, 17), atol=1e-5)
    from refiner.models.encoders import preprocess

    x, _ = encoders.embed(model, preprocess(image[None], model.refiner_card))
    for weights, block in zip(maps, model.blocks, strict=True):
        inside = block.norm1(x)
        values = block.attn.qkv(inside).reshape(1, 17, 3, 3, 8)[:, :, 2].transpose(1, 2)
        mixed = (weights[None] @ values).transpose(1, 2).reshape(1, 17, 24)
        assert torch.allclose(block.attn.proj(mixed), block.attn(inside), atol=1e-5)
        x = block(x)


def test_the_attention_explorer_follows_its_controls(model):
    panel = widgets.attention_explorer(model, images())
    maps = widgets.attention_maps(model, images()[2])
    for token, row in (
        ("cls", maps[1][:, 0]),
        (4, maps[1][:, 5]),
        ("mean", maps[1][:, 1:].mean(1)),
    ):
        drawn = panel.set(image=2, block=2, token=token)
        shown = torch.stack(
            [torch.as_tensor(ax.images[0].get_array().data) for ax in drawn.axes[1:4]]
        )
        assert torch.allclose(shown.flatten(1), row[:, 1:], atol=1e-6)
        plt.close(drawn)


def test_a_click_on_a_patch_lets_it_ask(model):
    panel = widgets.attention_explorer(model, images())
    board = panel.widget.children[-1].children[0]
    board.value = [i == 7 for i in range(16)]
    assert panel.controls["token"].value == 7
    panel.controls["token"].value = 3
    assert [i for i, on in enumerate(board.value) if on] == [3]
    board.value = [False] * 16
    assert panel.controls["token"].value == "cls" and not any(board.value)


def test_attention_of_other_encoders_is_refused():
    with pytest.raises(ValueError, match="VisionTransformer, not Linear"):
        widgets.attention_maps(torch.nn.Linear(2, 2), images(1)[0])


# ---------------------------------------------------------------- views


def test_views_are_those_of_make_view_beside_the_image():
    image, view = images(1)[0], View(size=16, scale=(0.2, 0.5), hue=0.5)
    ours = widgets.augmented(image, view, 5, seed=7)
    wanted = make_view(image.expand(5, 3, 16, 16), view, torch.Generator().manual_seed(7))
    assert torch.equal(ours[1:], wanted) and torch.allclose(ours[0], image / 255, atol=1e-6)


def test_turning_everything_off_shows_the_image_itself():
    panel = widgets.view_explorer(images(), View(size=16, flip=0.0), n=3)
    seen = []
    panel.draw = lambda **now: seen.append(now) or plt.figure()
    plt.close(panel.set(scale=(1, 1), strength=0, hue=0, gray=0, blur=0, solarize=0))
    still = View(size=16, flip=0, scale=(1, 1), ratio=(1, 1), jitter=0, gray=0)
    assert torch.allclose(*widgets.augmented(images(1)[0], still, 1), atol=1e-5)
    assert seen[-1]["scale"] == (1, 1) and len(seen) == 2, "drawn once, and returned once"


# ---------------------------------------------------------------- the queue


def test_candidates_are_the_nearest_others_and_the_draw_is_the_lookups():
    generator = torch.Generator().manual_seed(0)
    queue = NeighborQueue(30, 8, heads=2)
    z = torch.randn(2, 20, 8, generator=generator)
    queue.push(z, torch.arange(20))
    query = torch.randn(2, 8, generator=generator)
    for head in (0, 1):
        cosine = F.cosine_similarity(z[head], query[head][None], dim=1)
        cosine[4] = -2
        order = cosine.argsort(descending=True)[:6]
        drawn = set()
        for seed in range(40):
            found = widgets.queue_candidates(queue, query, 4, k=6, head=head, seed=seed)
            assert found["ids"].tolist() == order.tolist()
            assert torch.allclose(found["similarities"], cosine[order], atol=1e-6)
            looked = queue.lookup(
                query[:, None], torch.tensor([4]), 6, torch.Generator().manual_seed(seed)
            )
            where = int(looked.positions[head, 0])
            assert int(found["ids"][found["drawn"]]) == int(queue.ids[where])
            drawn.add(int(found["drawn"]))
        assert len(drawn) == 6, "in forty draws each of the six comes up"


def test_a_queue_of_nobody_else_is_an_error():
    queue = NeighborQueue(3, 8)
    queue.push(torch.ones(1, 8), torch.tensor([5]))
    with pytest.raises(ValueError, match="holds no other sample"):
        widgets.queue_candidates(queue, torch.ones(1, 8), 5)


def test_the_queue_explorer_shows_a_query_and_its_candidates(model):
    recipe = Recipe.cpu(size=16, blocks=(2, 3), hidden=16, predictor_hidden=16, out=8)
    torch.manual_seed(0)
    heads = IDHeads(2, 24, hidden=16, predictor_hidden=16, out=8).eval()
    panel = widgets.queue_explorer(model, heads, recipe, images(6), k=4)
    drawn = panel.set(image=3, k=3, block=2)
    titles = [ax.get_title() for ax in drawn.axes if ax.get_title()]
    assert titles[0] == "query\n3" and len(titles) == 4
    assert sum("★ drawn" in title for title in titles) == 1
    assert not any(title.split()[-2] == "3" for title in titles[1:]), "never itself"
    plt.close(drawn)


# ---------------------------------------------------------------- errors


def test_an_error_is_shown_and_raised():
    import ipywidgets

    def draw(x):
        if x > 1:
            raise ValueError("<too much>")
        return plt.figure()

    panel = widgets.Panel(draw, {"x": ipywidgets.IntSlider(0, 0, 5)})
    with pytest.raises(ValueError, match="too much"):
        panel.controls["x"].value = 2
    assert "ValueError: &lt;too much&gt;" in panel._message.value
    panel.controls["x"].value = 1
    assert panel._message.value == ""
    with pytest.raises(KeyError):
        panel.set(y=1)


def test_showing_again_closes_what_the_same_cell_showed_before(monkeypatch):
    import ipywidgets

    runs = iter(
        [
            ("cell", "run 1"),
            ("cell", "run 1"),
            ("other", "run 2"),
            ("cell", "run 3"),
            ("cell", "run 4"),
        ]
    )
    monkeypatch.setattr(static_copy, "_cell_and_run", lambda: next(runs))
    monkeypatch.setattr("IPython.display.display", lambda _: None)
    monkeypatch.setattr(static_copy, "_shown", {})
    made = []
    for _ in range(4):
        slider = ipywidgets.IntSlider()
        made.append(widgets.Panel(lambda x: plt.figure(), {"x": slider}))
        made[-1]._ipython_display_()
    opened = [panel.controls["x"].comm is not None for panel in made]
    assert opened == [False, False, True, True]
    parts = (made[0].widget, made[0]._picture, made[0].controls["x"].layout)
    assert all(part.comm is None for part in parts)
    made[3]._ipython_display_()
    parts = (made[3].widget, made[3]._picture, made[3].controls["x"])
    assert all(part.comm for part in parts), "the same again stays open"
