"""Images that are not square, from the file to the refined model."""

from dataclasses import replace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import tiny

import refiner
from refiner.cli import main
from refiner.images.load import load_images
from refiner.images.views import View, make_view
from refiner.models.encoders import check_supported, preprocess, walk
from refiner.models.load import build_vit, load_model
from refiner.models.mae import patchify, unpatchify
from refiner.models.save import save_model
from refiner.probing.features import extract
from refiner.training.planning import describe
from refiner.training.recipe import Recipe, complete_recipe
from refiner.training.refining import refine
from refiner.visuals.pictures import grid_like

SIZE = (16, 48)
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 0}
TIMMS = {
    "Beit": ("beit_base_patch16_224", {"use_rel_pos_bias": True, "init_values": 0.1}),
    "Eva": ("eva02_tiny_patch14_224", {"use_rot_pos_emb": True, "dynamic_img_size": True}),
}
SHORT = tiny(views=(View(size=SIZE, blur=1.0, noise=0.1), View(size=(8, 24))), steps=2)


def built(kind):
    """A model for oblong images with weights that no norm hides behind."""
    torch.manual_seed(0)
    if kind == "ViT":
        model = build_vit(size=SIZE, patch=8, dim=24, depth=2, heads=2, registers=1)
    else:
        name, options = TIMMS[kind]
        options = SMALL | options | {"img_size": SIZE}
        model = timm.create_model(name, **options).eval()
        how = {"size": SIZE, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
        made = {"architecture": name, "model_args": options}
        model.refiner_card = {"name": "tiny", "preprocessing": how, "timm": made}
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two classes of pictures twice as large as the models'."""
    home, rng = tmp_path_factory.mktemp("oblong"), np.random.default_rng(0)
    for label in ("a", "b"):
        (home / label).mkdir()
        for i in range(20):
            pixels = rng.integers(0, 256, (2 * SIZE[0], 2 * SIZE[1], 3), dtype=np.uint8)
            Image.fromarray(pixels).save(home / label / f"{i}.png")
    return home


@pytest.mark.parametrize("kind", ["ViT", *TIMMS])
def test_oblong_images_from_the_folder_to_the_refined_model(kind, folder, tmp_path):
    save_model(built(kind), tmp_path / "m")
    model, images = load_model(tmp_path / "m"), load_images(folder, size=SIZE, progress=False)
    assert images.images.shape == (40, 3, *SIZE)
    views = (View(size=SIZE),) * 2 if kind == "Beit" else SHORT.views  # its table is resized slowly
    refined = refine(model, images, recipe=replace(SHORT, views=views)).model
    save_model(refined, tmp_path / "refined")
    opened = load_model(tmp_path / "refined")
    before, after = (extract(m, images, progress=False) for m in (model, opened))
    assert not torch.allclose(before["patch"], after["patch"])
    # Every block is that of timm's own forward pass.
    theirs = timm.create_model(f"local-dir:{tmp_path / 'refined'}", pretrained=True).eval()
    seen, x = [], preprocess(images.images[:4], opened.refiner_card)
    for block in theirs.blocks:
        block.register_forward_hook(lambda module, given, found: seen.append(found))
    with torch.no_grad():
        theirs.forward_features(x)
        ours = [x_BTD for number, x_BTD in walk(opened, x) if number]
    for own, other in zip(ours, seen, strict=True):
        torch.testing.assert_close(own, other, atol=1e-5, rtol=1e-5)
    prefix = theirs.num_prefix_tokens
    torch.testing.assert_close(after["patch"][-1, :4], ours[-1][:, prefix:].mean(1))


def test_oblong_images_are_probed_planned_and_drawn_by_the_presets(folder, tmp_path, monkeypatch):
    save_model(built("ViT"), tmp_path / "m")
    monkeypatch.setattr("refiner.evaluation.probe.write_page", lambda out, report: None)
    command = ["probe", "--model", str(tmp_path / "m"), "--data", str(folder), "--n-test", "8"]
    assert main([*command, "--parts", "reading", "--out", str(tmp_path / "report")]) == 0
    assert "size=(16, 48)" in (tmp_path / "report" / "report.json").read_text()
    model, images = load_model(tmp_path / "m"), load_images(folder, size=SIZE, progress=False)
    assert "1 of 16×48 px, 1 of 8×24 px" in "".join(
        describe(model, images, replace(SHORT, pooling="cls"))
    )
    for recipe in (Recipe.cpu(size=SIZE), Recipe.fitted(model, images, batch=8)):
        given = replace(recipe, batch=8, blocks=(2,), frozen_blocks=0)
        views = complete_recipe(given, model, images).views
        assert views[0].size == SIZE and views[-1].size == (8, 24)
        assert make_view(images.images[:2], views[-1]).shape == (2, 3, 8, 24)
    with pytest.raises(ValueError, match=r"a view of \(8, 20\) pixels.*choose \(8, 16\)"):
        complete_recipe(replace(SHORT, views=(View(size=(8, 20)),) * 2), model, images)
    with pytest.raises(ValueError, match="rendered square"):
        load_images("toybox", size=SIZE)


def test_oblong_crops_are_not_stretched_and_patches_go_back_to_their_places():
    """A ramp along the rows and one along the columns keep the ratio of their slopes."""
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(48.0), indexing="ij")
    x = torch.stack([rows, columns, rows], dim=0)[None] / 48
    view = View(size=SIZE, scale=(0.2, 0.4), ratio=(1, 1), flip=0, jitter=0, gray=0)
    made = make_view(x.expand(8, -1, -1, -1), view, torch.Generator().manual_seed(0))
    down, across = made[:, 0].diff(dim=1).mean((1, 2)), made[:, 1].diff(dim=2).mean((1, 2))
    torch.testing.assert_close(down, across, atol=1e-3, rtol=1e-2)
    assert torch.equal(unpatchify(patchify(x, 8), 8, (2, 6)), x)
    # The part that a card of another shape cuts out of an image is in its middle.
    card = {"preprocessing": {"size": (8, 24), "mean": [0] * 3, "std": [1] * 3}}
    cut = preprocess((255 * x).byte().repeat(1, 1, 3, 1), card)
    torch.testing.assert_close(cut[0, 1, 0], x[0, 1, 0].view(-1, 2).mean(1), atol=0.02, rtol=0)
    assert grid_like(SIZE, 13) == (2, 6) and grid_like((32, 32), 17) == (4, 4)


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("resnet10t", "vit_small_patch16_224.dino"),
        ("convnext_atto", "vit_small_patch16_dinov3.lvd1689m"),
        ("swin_tiny_patch4_window7_224", "hiera_base_224.mae"),
        ("naflexvit_base_patch16_siglip", "vit_base_patch16_siglip_224.v2_webli"),
    ],
)
def test_what_is_not_supported_names_what_would_work(name, nearest):
    with torch.device("meta"):
        model = timm.create_model(name)
    with pytest.raises(ValueError, match=f"supported are .*the nearest of them is '{nearest}'"):
        check_supported(model, name)
    assert nearest in timm.list_pretrained()


@pytest.mark.parametrize("size", [0, -1, 2.5, "big", (0, 32), (32,), (3, 4, 5)])
def test_what_is_no_size_is_told_at_every_door(size):
    doors = [
        lambda: refiner.load_images("digits", n=4, size=size),
        lambda: refiner.load_model("mae_toybox", size=size),
        lambda: refiner.Recipe.cpu(size=size),
        lambda: refiner.Recipe.gpu(size=size),
    ]
    for door in doors:
        with pytest.raises(refiner.UserError, match="at least 1 pixel, a whole number or"):
            door()
