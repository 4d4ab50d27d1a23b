"""Extraction against a plain reference, for every kind of model and input it promises to take."""

import errno
import os
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.data import DataLoader, TensorDataset

import refiner
from refiner.images.sets import ImageSet
from refiner.models.encoders import preprocess, preprocessing_card
from refiner.probing.features import Features, extract, extract_part

CARD = {
    "preprocessing": {
        "size": 16,
        "mean": [0.5, 0.4, 0.3],
        "std": [0.2, 0.25, 0.5],
        "interpolation": "bicubic",
    }
}


def tiny(**options) -> VisionTransformer:
    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=16, patch_size=4, embed_dim=24, depth=3, num_heads=2, num_classes=0, **options
    )
    # Positions start at nearly zero and norms at one; large random values reveal a mix-up.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model.refiner_card = CARD
    return model.eval()


KINDS = {
    "class token": {},
    "registers": {"reg_tokens": 3, "no_embed_class": True},
    "no class token": {"class_token": False, "global_pool": "avg", "fc_norm": False},
    "norm after pooling": {"class_token": False, "global_pool": "avg"},
    "registers alone": {"class_token": False, "reg_tokens": 2, "global_pool": "avg"},
    "norm before the blocks": {"pre_norm": True},
}


def pixels(n=10, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)


def quiet(model, images, **options) -> Features:
    return extract(model, images, progress=False, **options)


def reference(model, images):
    """Image by image in float64, block after block, tokens named one by one."""
    model = model.double()
    mean, std = (torch.tensor(CARD["preprocessing"][k]).double() for k in ("mean", "std"))
    rows = []
    for image in images:
        x = (image.double() / 255 - mean[:, None, None]) / std[:, None, None]
        with torch.no_grad():
            tokens = model.norm_pre(model._pos_embed(model.patch_embed(x[None])))
            row = {"cls": [], "patch": [], "registers": []}
            patches = range(tokens.shape[1] - 16, tokens.shape[1])
            for block in model.blocks:
                tokens = block(tokens)
                row["cls"].append(tokens[0, 0])
                row["patch"].append(sum(tokens[0, i] for i in patches) / 16)
                between = tokens[0, model.has_class_token : patches.start]
                row["registers"].append(sum(between, 0 * tokens[0, 0]) / max(1, len(between)))
            normed = model.norm(tokens)
            pooled = normed[0, 0] if model.has_class_token else normed[0, -16:].mean(0)
            rows.append(row | {"final": [model.fc_norm(pooled[None])[0]]})
    model.float()
    joined = {k: torch.stack([torch.stack(row[k]) for row in rows], dim=1) for k in rows[0]}
    joined["final"] = joined["final"][0]
    return joined


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("double", [False, True])
def test_features_equal_a_plain_reference(kind, double):
    model, images = tiny(**KINDS[kind]), pixels()
    expected = reference(model, images)
    found = quiet(model.double() if double else model, images, batch_size=4)
    has_class = KINDS[kind].get("class_token", True)
    kinds = {"cls": has_class, "registers": "registers" in kind, "patch": True, "final": True}
    assert set(found) == {name for name, there in kinds.items() if there}
    for name, x in found.items():
        assert x.dtype == torch.float32 and x.shape == expected[name].shape
        # float32 rounding, relative to the features' size
        error = (x - expected[name]).abs().max() / expected[name].abs().max()
        assert error < (1e-6 if double else 1e-5), name


@pytest.mark.parametrize("kind", ["class token", "no class token", "norm after pooling"])
def test_final_is_what_timm_feeds_to_its_head(kind):
    model, images = tiny(**KINDS[kind]), pixels()
    with torch.no_grad():
        x = preprocess(images, CARD)
        expected = model.forward_head(model.forward_features(x), pre_logits=True)
    assert torch.allclose(quiet(model, images)["final"], expected, atol=1e-5)


def test_the_batch_size_does_not_matter():
    model, images = tiny(), pixels(13)
    whole = quiet(model, images, batch_size=13)
    for batch_size in (1, 5, 100, None):
        part = quiet(model, images, batch_size=batch_size)
        for name in whole:
            assert torch.allclose(part[name], whole[name], rtol=1e-5, atol=1e-5)


def test_images_do_not_mix():
    model, images = tiny(), pixels(6)
    found, turned = quiet(model, images), quiet(model, images.flip(0))
    for name in found:
        assert torch.allclose(turned[name].flip(-2), found[name], rtol=1e-5, atol=1e-5)


def pictures(images):
    return [Image.fromarray(x.permute(1, 2, 0).numpy()) for x in images]


KINDS_OF_INPUT = {
    "set": lambda x: ImageSet(x, torch.arange(10), tuple("0123456789")),
    "loader of pairs": lambda x: DataLoader(TensorDataset(x, torch.arange(10)), batch_size=3),
    "batches": lambda x: [x[:7], x[7:]],
    "generator": lambda x: (x[i : i + 1] for i in range(10)),
    "floats are already preprocessed": lambda x: [preprocess(x, CARD)],
    "float tensor": lambda x: preprocess(x, CARD).double(),
    "array": lambda x: x.numpy(),
    "array, channels last": lambda x: x.permute(0, 2, 3, 1).numpy(),
    "tensors": list,
    "single ones and a batch": lambda x: [x[0], x[1], x[2:9], x[9]],
    "dataset of pairs": lambda x: TensorDataset(x, torch.arange(10)),
    "pictures": pictures,
    "batches of pictures": lambda x: [(pictures(x[:4]), 1), (pictures(x[4:]), 2)],
    "rows with pictures": lambda x: [{"label": 3, "image": p} for p in pictures(x)],
    "dicts": lambda x: [{"labels": 0, "pixel_values": preprocess(x, CARD)}],
    "one view": lambda x: [([x[:5]], torch.arange(5)), ([x[5:]], torch.arange(5))],
}


@pytest.mark.parametrize("kind", KINDS_OF_INPUT)
def test_every_kind_of_input_gives_the_same(kind):
    model, images = tiny(), pixels()
    expected, found = quiet(model, images), quiet(model, KINDS_OF_INPUT[kind](images))
    for name in expected:
        assert torch.allclose(found[name], expected[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("top", [1, 255])
def test_floats_that_are_not_normalised_are_scaled_with_a_warning(top):
    model, images = tiny(), pixels()
    for kind in ("tensors", "batches", "dicts"):
        floats = images.float() * (top / 255)
        some = [{"image": floats}] if kind == "dicts" else KINDS_OF_INPUT[kind](floats)
        with pytest.warns(UserWarning, match=f"are taken as 0 to {top}, and resized"):
            found = quiet(model, some)
        assert torch.allclose(found["cls"], quiet(model, images)["cls"], rtol=1e-5, atol=1e-5)


def test_pictures_of_any_size_are_fitted_one_by_one():
    model, images = tiny(), [pixels(1), pixels(1, size=20), pixels(1, size=9)]
    alone = torch.cat([quiet(model, x)["cls"] for x in images], dim=1)
    together = quiet(model, [x for (picture,) in map(pictures, images) for x in [picture]])
    assert torch.allclose(together["cls"], alone, rtol=1e-5, atol=1e-5)


class Compiled(nn.Module):
    """As torch.compile wraps a model, without its import of seven seconds."""

    def __init__(self, model):
        super().__init__()
        self._orig_mod = model


@pytest.mark.parametrize("wrap", [Compiled, nn.DataParallel])
def test_a_wrapped_model_is_unwrapped(wrap):
    model, images = tiny(), pixels()
    assert torch.equal(quiet(wrap(model), images)["cls"], quiet(model, images)["cls"])


def test_no_blocks_tokens_outlive_the_next_block():
    model = tiny()
    alive = []

    def hook(_, __, x):
        alive.append(StorageWeakRef(x.untyped_storage()))
        assert all(tokens.expired() for tokens in alive[:-2])

    for block in model.blocks:
        block.register_forward_hook(hook)
    quiet(model, pixels(), batch_size=10)
    assert len(alive) == 3


def test_chosen_blocks_are_those_blocks_in_the_asked_order():
    model, images = tiny(), pixels()
    every = quiet(model, images)
    assert every.blocks == (1, 2, 3)
    some = quiet(model, images, blocks=[-1, 1])
    assert some.blocks == (3, 1)
    assert torch.equal(some["patch"], every["patch"][[2, 0]])
    assert torch.equal(some["final"], every["final"])
    for bad in ([0], [4], [-4], []):
        with pytest.raises(ValueError, match="blocks count from 1: choose among 1 to 3"):
            quiet(model, images, blocks=bad)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("first", [1, 2])
def test_walked_in_two_parts_the_features_are_the_same(kind, first):
    model, images, cpu = tiny(**KINDS[kind]), pixels(), torch.device("cpu")
    below, tokens = extract_part(model, images, range(1, first + 1), device=cpu)
    above, _ = extract_part(model, images, range(first + 1, 4), (first, tokens), device=cpu)
    whole = quiet(model, images)
    assert below.blocks + above.blocks == whole.blocks
    for name in set(whole) - {"final"}:
        found = torch.cat([below[name], above[name]])
        assert torch.allclose(found, whole[name], atol=1e-5), name


def test_without_a_class_token_cls_is_an_error_that_says_what_to_use():
    found = quiet(tiny(**KINDS["no class token"]), pixels())
    assert "cls" not in found and found.get("cls") is None
    with pytest.raises(KeyError, match="no class token"):
        found["cls"]
    with pytest.raises(KeyError, match="no features 'head'"):
        found["head"]
    assert found.main is found["patch"]
    assert quiet(tiny(), pixels()).main.shape == (3, 10, 24)


@pytest.mark.parametrize("broken", [False, True])
def test_the_model_is_left_as_it_was(broken):
    model = tiny(drop_path_rate=0.5, proj_drop_rate=0.5).train()
    model.blocks[0].eval()
    model.pos_embed.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    wants = [p.requires_grad for p in model.parameters()]
    if broken:
        with pytest.raises(ValueError):
            quiet(model, [pixels(), pixels()[:, :1]])
    else:
        first = quiet(model, pixels())
        assert torch.equal(first["final"], quiet(model, pixels())["final"])  # no dropout
    assert [module.training for module in model.modules()] == modes
    assert [p.requires_grad for p in model.parameters()] == wants
    assert torch.is_grad_enabled()


def test_a_disk_that_is_too_small_is_said_before_it_kills(tmp_path, monkeypatch):
    """A mapped file without space behind it ends the process by SIGBUS."""

    def full(file, start, size):
        assert (start, size % 4) == (0, 0) and size > 0
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(OSError, match="temporary file of .* cannot be made: No space left"):
        quiet(tiny(), pixels(), memory=1, folder=tmp_path)


def test_features_can_train_a_probe():
    found = quiet(tiny(), pixels())["final"]
    weight = torch.zeros(24, requires_grad=True)
    (found @ weight).sum().backward()
    assert torch.allclose(weight.grad, found.sum(0), rtol=1e-5, atol=1e-5)


def test_low_precision_is_close_and_still_returned_in_float32():
    model, images = tiny(), pixels()
    exact, rough = quiet(model, images), quiet(model, images, dtype=torch.bfloat16)
    assert rough["patch"].dtype == torch.float32
    error = (rough["patch"] - exact["patch"]).abs().mean() / exact["patch"].abs().mean()
    assert 0 < error < 0.05


def test_float32_turns_an_outer_autocast_off():
    model, x = tiny(), pixels(4)
    expected = quiet(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        for dtype in (torch.float32, None):
            found = quiet(model, x, dtype=dtype)
            assert all(torch.equal(found[kind], expected[kind]) for kind in expected)


def test_not_finite_features_name_the_block():
    model = tiny()
    model.blocks[1].mlp.fc2.bias.data[0] = torch.nan
    with pytest.raises(ValueError, match="after block 2 are not finite"):
        quiet(model, pixels())


@pytest.mark.parametrize("nothing", [pixels(0), [], ImageSet(pixels(0))])
def test_no_images_is_an_error(nothing):
    with pytest.raises(ValueError, match="no images"):
        quiet(tiny(), nothing)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (
            lambda x: [x[:, :1]],
            "takes images of 3 channels, and these have 1: refiner.fit_channels",
        ),
        (lambda x: torch.cat([x, x[:, :1]], 1), "of 3 channels, and these have 4"),
        (lambda x: torch.randn(2, 1, 16, 16), "of 3 channels, and these have 1"),
        (lambda x: x[0, 0], "not torch.uint8"),
        (lambda x: [x.long()], "uint8 or float"),
        (lambda x: "folder", "pictures, or batches of them, not str"),
        (lambda x: ["a.png"], "not str"),
        (lambda x: None, "not NoneType"),
        (lambda x: [([x, x], torch.arange(10))], "2 views of its images: give one of them"),
        (lambda x: [[x, x]], "2 views"),
        (lambda x: [{"mask": x}], "a dict with mask, and none of them is called pixel_values"),
        (lambda x: torch.randn(2, 3, 20, 20), "of 20×20 pixels do not fit the model.*give 16×16"),
        (lambda x: [preprocess(x, CARD)[0], torch.randn(3, 8, 8)], "have different sizes"),
    ],
)
def test_what_is_not_a_batch_of_images_is_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        quiet(tiny(), wrong(pixels()))


@pytest.mark.filterwarnings("ignore:float images without")
def test_floats_of_two_ranges_are_refused():
    images = pixels()
    with pytest.raises(ValueError, match="but those before them from 0 to 1"):
        quiet(tiny(), [images / 255, preprocess(images, CARD)])


def test_preprocess_and_batch_sizes_are_checked():
    for wrong in (pixels()[0], pixels().long()):
        with pytest.raises(ValueError, match="uint8 images"):
            preprocess(wrong, CARD)
    with pytest.raises(ValueError, match="batch_size"):
        quiet(tiny(), pixels(), batch_size=0)


def test_models_without_tokens_are_refused_saying_what_is_supported():
    resnet = timm.create_model("resnet10t", num_classes=0)
    with pytest.raises(ValueError, match="is a ResNet; supported are VisionTransformer, Beit"):
        quiet(resnet, pixels())
    with pytest.raises(ValueError, match="in a DataParallel: give what it holds"):
        refiner.refine(nn.DataParallel(tiny()), pixels(), progress=False)


# ---------------------------------------------------------------- memory


@pytest.mark.parametrize("memory", [0, 3 * 4 * 24 * 4, 10**9])
def test_features_beyond_the_limit_are_in_a_file_and_the_same(memory, tmp_path):
    model, images = tiny(), pixels(13)
    expected = quiet(model, images, batch_size=4)
    batches = (images[i : i + 4] for i in range(0, 13, 4))  # of unknown number
    found = quiet(model, batches, memory=memory, folder=tmp_path)
    for kind in expected:
        assert torch.equal(found[kind], expected[kind])
    found["patch"].mul_(2)  # an ordinary tensor
    assert torch.equal(found["patch"], 2 * expected["patch"])
    assert list(tmp_path.iterdir()) == []
    assert is_mapped(found["cls"]) == (memory < 10**9)


def is_mapped(x: torch.Tensor) -> bool:
    """Whether a tensor's memory is a mapped file's, by the system's own list."""
    for line in Path("/proc/self/maps").read_text().splitlines():
        first, last = (int(edge, 16) for edge in line.split()[0].split("-"))
        if first <= x.data_ptr() < last:
            return int(line.split()[4]) != 0  # the file's inode
    return False


def test_the_same_whether_images_come_by_a_loader_with_workers_or_not():
    model, images = tiny(), pixels(9)
    loader = DataLoader(TensorDataset(images), batch_size=4, num_workers=1)
    assert torch.equal(quiet(model, loader)["cls"], quiet(model, images, batch_size=4)["cls"])


# ---------------------------------------------------------------- preprocessing


def test_preprocessing_normalises_by_the_card():
    images = pixels(2)
    x = preprocess(images, CARD)
    for channel, (mean, std) in enumerate(zip([0.5, 0.4, 0.3], [0.2, 0.25, 0.5], strict=True)):
        expected = (images[:, channel] / 255 - mean) / std
        assert torch.allclose(x[:, channel], expected, atol=1e-6)


def test_preprocessing_crops_the_centre_and_stays_within_the_range():
    images = torch.zeros(1, 3, 40, 80, dtype=torch.uint8)
    images[..., 20:60] = 255
    x = preprocess(images, CARD)
    assert x.shape == (1, 3, 16, 16)
    white = preprocess(torch.full((1, 3, 16, 16), 255, dtype=torch.uint8), CARD)
    assert torch.allclose(x, white, atol=1e-5)
    sharp = (torch.arange(32) // 8 % 2 * 255).to(torch.uint8).expand(1, 3, 32, 32)
    black = preprocess(torch.zeros(1, 3, 16, 16, dtype=torch.uint8), CARD)
    resized = preprocess(sharp.contiguous(), CARD)
    assert (resized <= white + 1e-5).all() and (resized >= black - 1e-5).all()


def test_a_model_without_a_card_falls_back_to_timm_and_imagenet():
    model = tiny()
    del model.refiner_card
    how = preprocessing_card(model)["preprocessing"]
    assert how["size"] == 16 and how["mean"][0] == pytest.approx(0.485)
    model.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (1, 1, 1), "interpolation": "bilinear"}
    how = preprocessing_card(model)["preprocessing"]
    assert (how["mean"], how["interpolation"]) == ([0.1, 0.2, 0.3], "bilinear")
    assert torch.isfinite(quiet(model, pixels(3, size=20))["final"]).all()
    known = timm.create_model("vit_tiny_patch16_224", depth=1)
    config = timm.data.resolve_data_config(model=known)  # as load_model's card
    assert preprocessing_card(known)["preprocessing"]["crop_pct"] == config["crop_pct"] < 1
