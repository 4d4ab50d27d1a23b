"""Linear segmentation against scikit-learn and pixel-by-pixel loops; folders in ADE20K's form."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from timm.models.hiera import Hiera

import refiner
from refiner.evaluation.segmentation import (
    at_pixels,
    class_counts,
    iou_of,
    linear_segmentation,
    patch_maps,
)
from refiner.images.dense import IGNORE, DenseSet, load_dense, object_maps
from refiner.images.sets import ImageSet
from refiner.models.encoders import preprocess
from refiner.models.load import build_vit


def encoder(**options):
    return build_vit(size=16, patch=4, dim=24, depth=3, heads=2, seed=0, **options)


def halves(n=12, seed=0):
    """Two flat colours meet at a random column; noise on top."""
    g = torch.Generator().manual_seed(seed)
    cut = torch.randint(4, 13, (n, 1, 1), generator=g)
    maps = (torch.arange(16)[None, None] >= cut).expand(n, 16, 16).to(torch.uint8)
    colour = torch.where(
        maps[:, None] > 0,
        torch.tensor([220, 60, 60])[None, :, None, None],
        torch.tensor([60, 60, 200])[None, :, None, None],
    )
    colour = colour + torch.randint(-200, 201, colour.shape, generator=g)
    return DenseSet(
        colour.clamp(0, 255).to(torch.uint8), maps.clone(), ("left", "right"), "halves", 0
    )


@pytest.mark.parametrize("options", [{}, {"class_token": False}, {"registers": 2}])
def test_maps_are_the_patches_that_extract_averages(options):
    model, x = encoder(**options), halves().images
    maps = patch_maps(model, x, [1, 3])
    means = refiner.extract(model, x, progress=False)["patch"]
    assert maps[0].shape == (12, 24, 4, 4)
    for found, block in zip(maps, (0, 2), strict=True):
        torch.testing.assert_close(found.mean((2, 3)), means[block], atol=1e-5, rtol=1e-4)


def test_maps_keep_the_patches_in_their_places():
    """The first row of the image decides the first row of embedded patches."""
    model = encoder(class_token=False)
    x = halves(2).images
    changed = x.clone()
    changed[:, :, :4] = 0
    embedded = [
        model.patch_embed(preprocess(s, model.refiner_card)).mT.unflatten(2, (4, 4))
        for s in (x, changed)
    ]
    moved = (embedded[0] - embedded[1]).abs().sum((0, 1))
    assert (moved[0] > 0).all() and (moved[1:] == 0).all()
    block = model.blocks[0]
    model.blocks[0] = torch.nn.Identity()
    model.pos_embed.data.zero_()
    torch.testing.assert_close(patch_maps(model, x, [1])[0], embedded[0])
    model.blocks[0] = block


def hiera():
    model = Hiera(
        img_size=(64, 64), embed_dim=16, num_heads=1, stages=(1, 2, 1), num_classes=0, q_pool=2
    ).eval()
    how = {"size": 64, "mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}
    model.refiner_card = {"name": "hiera", "preprocessing": how}
    return model


def test_hieras_maps_are_those_of_its_blocks_in_their_places():
    model, x = hiera(), torch.randint(0, 256, (2, 3, 64, 64), dtype=torch.uint8)
    maps = patch_maps(model, x, [1, 2, 3, 4])
    assert [list(m.shape[1:]) for m in maps] == [[64, 16, 16], [64, 8, 8], [64, 8, 8], [64, 4, 4]]
    means = refiner.extract(model, x, progress=False)["patch"]
    torch.testing.assert_close(torch.stack([m.mean((2, 3)) for m in maps]), means)
    model.blocks[0] = torch.nn.Identity()
    embedded = model._pos_embed(model.patch_embed(preprocess(x, model.refiner_card)))
    found = patch_maps(model, x, [1])[0]
    torch.testing.assert_close(found[:, :16], embedded.mT.unflatten(2, (16, 16)))
    assert not found[:, 16:].any()


def test_a_hiera_segments():
    small = halves()
    x = F.interpolate(small.images.float(), (64, 64)).to(torch.uint8)
    maps = F.interpolate(small.maps[:, None].float(), (64, 64))[:, 0].to(torch.uint8)
    large = DenseSet(x, maps, small.classes, "halves", 0)
    found = linear_segmentation(hiera(), large, large, blocks=(1, 3, -1), penalties=[1e-2])
    assert found.blocks == (1, 3, 4) and (found.pixel_accuracy > 0.5).all()


def test_features_at_pixels_are_those_of_the_interpolated_map():
    maps = torch.randn(3, 5, 4, 6)
    whole = F.interpolate(maps, (16, 24), mode="bilinear", align_corners=False)
    rows, columns = torch.randint(0, 16, (3, 40)), torch.randint(0, 24, (3, 40))
    found = at_pixels(maps, rows, columns, (16, 24))
    for b in range(3):
        torch.testing.assert_close(found[b], whole[b][:, rows[b], columns[b]].T)


@pytest.mark.parametrize("height", [16, 8])
def test_the_whole_protocol_against_scikit_learn_and_loops(height):
    model = build_vit(size=(height, 16), patch=4, dim=24, depth=3, heads=2, seed=0)
    train, test = (
        replace(s, images=s.images[:, :, :height], maps=s.maps[:, :height])
        for s in (halves(10), halves(6, seed=9))
    )
    train.maps[0, :8], test.maps[0, 5:9] = IGNORE, IGNORE
    penalty, seed = 1e-2, 3
    found = linear_segmentation(model, train, test, pixels=12, penalties=[penalty], seed=seed)
    generator = np.random.default_rng(seed)
    drawn = np.stack([generator.integers(0, side, (10, 12)) for side in (height, 16)])
    upsampled = [
        F.interpolate(
            patch_maps(model, s.images, [3])[0], (height, 16), mode="bilinear", align_corners=False
        ).numpy()
        for s in (train, test)
    ]
    x, y = [], []
    for i in range(10):
        for q in range(12):
            r, c = drawn[:, i, q]
            if train.maps[i, r, c] != IGNORE:
                x.append(upsampled[0][i, :, r, c])
                y.append(int(train.maps[i, r, c]))
    scaler = StandardScaler().fit(np.array(x))
    peer = LogisticRegression(C=1 / (penalty * len(x)), tol=1e-8, max_iter=2000)
    peer.fit(scaler.transform(np.array(x)), y)
    intersection, union, right, known = np.zeros(2), np.zeros(2), 0, 0
    for i in range(6):
        for r in range(height):
            for c in range(16):
                truth = int(test.maps[i, r, c])
                if truth == IGNORE:
                    continue
                guess = int(peer.predict(scaler.transform(upsampled[1][i, :, r, c][None]))[0])
                known, right = known + 1, right + (guess == truth)
                for k in range(2):
                    intersection[k] += guess == truth == k
                    union[k] += guess == k or truth == k
    assert found.iou[0].tolist() == pytest.approx((intersection / union).tolist(), abs=0.01)
    assert float(found.miou) == pytest.approx((intersection / union).mean(), abs=0.01)
    assert float(found.pixel_accuracy) == pytest.approx(right / known, abs=0.005)
    assert float(found.object_iou) == pytest.approx(float(found.iou[0, 1]))  # one object class
    assert 0.5 < found.miou < 0.97  # neither chance nor trivial


def test_counts_and_iou_by_hand():
    truth = torch.tensor([[[0, 0], [1, 2]], [[1, 1], [IGNORE, 2]]])
    guess = torch.tensor([[[0, 1], [1, 0]], [[1, 2], [0, 2]]])
    counts = class_counts(truth, guess, 4)
    assert counts[0].tolist() == [[2, 1, 1, 0], [2, 2, 0, 0], [1, 1, 0, 0]]
    assert counts[1].tolist() == [[0, 2, 1, 0], [0, 1, 2, 0], [0, 1, 1, 0]]
    iou = iou_of(counts.sum(0))
    assert iou[:3].tolist() == pytest.approx([1 / 3, 2 / 4, 1 / 3]) and iou[3].isnan()
    merged = class_counts(truth, guess, 2, background=0)
    assert merged[0].tolist() == [[2, 2], [2, 2], [1, 1]]
    assert class_counts(truth, guess, 2, background=None).sum() == 0


def test_penalty_and_block_are_chosen_on_train_images_alone():
    model, train, test = encoder(), halves(20), halves(8, seed=4)
    options = {"blocks": (1, 2, -1), "pixels": 8, "penalties": [1e-3, 1e-1]}
    found = linear_segmentation(model, train, test, **options)
    shuffled = DenseSet(test.images, test.maps.flip(2), test.classes, background=0)
    other = linear_segmentation(model, train, shuffled, **options)
    assert found.blocks == (1, 2, 3) and found.miou.shape == (3,)
    assert torch.equal(found.penalty, other.penalty) and found.best == other.best
    assert torch.equal(found.validation, other.validation)
    assert not torch.equal(found.miou, other.miou)


def test_one_image_at_least_is_fitted_on_and_one_chosen_with():
    train, test = halves(4), halves(6, seed=1)
    options = {"pixels": 8, "penalties": [1e-2, 1.0]}
    most = linear_segmentation(encoder(), train, test, validation=1.0, **options)
    three = linear_segmentation(encoder(), train, test, validation=0.75, **options)
    assert torch.equal(most.miou, three.miou) and torch.equal(most.validation, three.validation)
    train.maps[1:] = IGNORE
    with pytest.raises(ValueError, match="only one train image has known pixels"):
        linear_segmentation(encoder(), train, test, **options)
    one = linear_segmentation(encoder(), train, test, pixels=8, penalties=[1e-2])
    assert 0 <= one.miou <= 1


def test_the_spread_shrinks_with_more_test_images():
    model, train = encoder(), halves(20)
    few, many = (
        linear_segmentation(model, train, halves(n, seed=2), penalties=[1e-2]) for n in (10, 160)
    )
    assert 0 < float(many.spread) < 0.6 * float(few.spread)
    assert 0 < float(many.object_spread) < 0.6 * float(few.object_spread)


def test_toybox_objects():
    images = refiner.load_images("toybox", n=48, progress=False)
    dense = object_maps(images)
    assert dense.background == 0 and dense.classes[1] == images.classes[0]
    inside = images.masks >= 0.5
    assert torch.equal(dense.maps > 0, inside)
    for i in (0, 7):
        assert set(dense.maps[i].unique().tolist()) == {0, int(images.labels[i]) + 1}
    test = object_maps(refiner.load_images("toybox", split="test", n=32, progress=False))
    found = linear_segmentation(
        refiner.load_model("mae_toybox"), dense, test, pixels=8, penalties=[1e-2]
    )
    covered = float((test.maps > 0).float().mean())
    assert found.object_iou > covered + 0.2  # what calling everything an object would give
    with pytest.raises(ValueError, match="no masks"):
        object_maps(ImageSet(images.images, images.labels))


# ---------------------------------------------------------------- folders


def write(folder, part, n, *, size=(20, 30), seed=0):
    rng = np.random.default_rng(seed)
    for i in range(n):
        for kind in ("images", "annotations"):
            (folder / kind / part).mkdir(parents=True, exist_ok=True)
        values = rng.integers(0, 4, (size[1], size[0]), dtype=np.uint8)
        picture = np.stack([values * 60] * 3, axis=2)
        Image.fromarray(picture).save(folder / "images" / part / f"{i}.png")
        Image.fromarray(values).save(folder / "annotations" / part / f"{i}.png")


def test_a_folder_in_ade20ks_form(tmp_path):
    write(tmp_path, "training", 4)
    write(tmp_path, "validation", 2, seed=1)
    train = load_dense(tmp_path, size=20, progress=False)
    test = load_dense(tmp_path, split="test", size=20, progress=False)
    assert (len(train), len(test)) == (4, 2) and train.classes == ("class 1", "class 2", "class 3")
    for dense in (train, test):  # at this size nothing is resized, so image and map must agree
        value = dense.images[:, 0] // 60
        assert torch.equal(dense.maps, torch.where(value == 0, IGNORE, value - 1))
    assert load_dense(tmp_path, size=(10, 16), n=3, progress=False).maps.shape == (3, 10, 16)
    sides = [load_dense(tmp_path, split=s, size=16, progress=False) for s in ("train", "test")]
    found = linear_segmentation(encoder(), *sides)
    assert 0 <= found.miou <= 1 and found.object_iou.isnan().all()
    assert found.object_spread.isnan().all()


def test_a_flat_folder_lends_every_fifth(tmp_path):
    write(tmp_path, "", 10)
    sets = [load_dense(tmp_path, split=s, size=20, progress=False) for s in ("train", "test")]
    assert [len(s) for s in sets] == [8, 2]


@pytest.mark.parametrize("part", ["training", "validation"])
def test_with_one_split_folder_no_file_is_in_both_splits(part, tmp_path):
    write(tmp_path, part, 10)
    write(tmp_path, ".", 5, seed=1)  # files beside it belong to no split
    train, test = (
        load_dense(tmp_path, split=s, size=20, progress=False) for s in ("train", "test")
    )
    seen = {bytes(x) for x in train.images.numpy()}
    assert (len(train), len(test), len(seen)) == (8, 2, 8)
    assert not seen & {bytes(x) for x in test.images.numpy()}


def test_what_is_missing_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="no sub-folder 'images'"):
        load_dense(tmp_path)
    write(tmp_path, "", 3)
    with pytest.raises(ValueError, match="splits train and test"):
        load_dense(tmp_path, split="val")
    (tmp_path / "annotations" / "1.png").unlink()
    with pytest.raises(FileNotFoundError, match="1.png has no annotation"):
        load_dense(tmp_path, progress=False)
    Image.new("RGB", (20, 30)).save(tmp_path / "annotations" / "1.png")
    with pytest.raises(ValueError, match="one channel of 8 bits"):
        load_dense(tmp_path, size=20, progress=False)
    with pytest.raises(ValueError, match="blocks count from 1: choose among 1 to 3"):
        linear_segmentation(encoder(), halves(), halves(), blocks=(4,))
