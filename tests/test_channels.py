"""Images and models of other than three channels: satellites' bands, microscopes, X-rays, radar."""

import struct
import sys
import types
import warnings
import zlib
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from tiny import tiny

from refiner import fit_channels
from refiner.cli import main
from refiner.evaluation.compare import evaluate
from refiner.evaluation.probe import Settings, probe
from refiner.evaluation.protocols import EvaluationSettings
from refiner.images import load as load_module
from refiner.images.corruptions import corrupt
from refiner.images.load import load_images
from refiner.images.sets import ImageSet, shown_channels
from refiner.images.views import View, by_channel, make_view, without_colour
from refiner.models.encoders import preprocess
from refiner.models.load import build_vit, load_model
from refiner.models.mae import MAERecipe, load_mae, reconstruct
from refiner.models.save import save_model
from refiner.probing.features import extract
from refiner.training.pretraining import pretrain, start_from
from refiner.training.recipe import Recipe, refine_preset
from refiner.training.refining import refine
from refiner.visuals.pictures import contact_sheet

SIZES = {"size": 16, "patch": 8, "dim": 24, "depth": 2, "heads": 2}


def pixels(n, channels, size=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, channels, size, size), dtype=torch.uint8, generator=generator)


def vit(channels, seed=0, **changes):
    return build_vit(**SIZES | changes, channels=channels, seed=seed)


def save_arrays(folder, arrays):
    folder.mkdir(parents=True, exist_ok=True)
    for i, array in enumerate(arrays):
        np.save(folder / f"{i}.npy", array)


def quiet(*args, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_images(*args, **options, progress=False)


def features(model, images):
    return extract(model, images, progress=False)["cls"]


# ---------------------------------------------------------------- end to end


@pytest.mark.parametrize("channels", [1, 2, 4, 12])
def test_from_a_folder_to_a_refined_model_that_is_opened_again(channels, tmp_path, monkeypatch):
    x = pixels(8, channels, 20).permute(0, 2, 3, 1).numpy()  # [N, H, W, C]
    save_arrays(tmp_path / "set/a", x[:4])
    save_arrays(tmp_path / "set/b", x[4:].transpose(0, 3, 1, 2) if channels > 1 else x[4:, ..., 0])
    images = quiet(tmp_path / "set", size=16)
    assert images.images.shape == (8, channels, 16, 16) and len(images.classes) == 2
    monkeypatch.setattr(load_module, "MEMORY_LIMIT", 1)
    lazy = quiet(tmp_path / "set", size=16)
    assert torch.equal(lazy.images[:], images.images)

    torch.save(vit(channels).state_dict(), tmp_path / "x.pth")
    with pytest.warns(UserWarning, match=f"of its {channels} channels; refiner.fit_channels"):
        model = load_model(tmp_path / "x.pth", num_heads=2)
    assert torch.equal(features(model, images), features(vit(channels), images))
    recipe = tiny(views="channels", head_steps=1, steps=1)
    run = refine(model, images, recipe=recipe, progress=False)
    assert not torch.equal(features(run.model, images), features(model, images))
    save_model(run.model, tmp_path / "refined")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # mean and deviation are known from now on
        again = load_model(tmp_path / "refined")
    assert torch.equal(features(again, images), features(run.model, images))
    how = again.refiner_card["preprocessing"]
    brightness = images.images.double() / 255
    assert torch.allclose(torch.tensor(how["mean"]).double(), brightness.mean((0, 2, 3)), atol=1e-5)
    std = brightness.transpose(0, 1).flatten(1).std(1, correction=0)
    assert torch.allclose(torch.tensor(how["std"]).double(), std, atol=1e-5)
    assert model.refiner_card["preprocessing"]["mean"] == [0.5] * channels  # it is left alone
    theirs = timm.create_model(f"local-dir:{tmp_path / 'refined'}", pretrained=True).eval()
    with torch.no_grad():
        ours = again.forward_features(preprocess(images.images, again.refiner_card))
        assert torch.equal(
            theirs.forward_features(preprocess(images.images, again.refiner_card)), ours
        )


@pytest.mark.parametrize("channels", [1, 4])
def test_a_masked_autoencoder_of_any_channels(channels, tmp_path):
    images = ImageSet(pixels(8, channels))
    recipe = MAERecipe(**SIZES, channels=channels, decoder_dim=24, steps=1, batch=4)
    run = pretrain(images, recipe=recipe, out=tmp_path / "mae", progress=False)
    found = reconstruct(load_mae(tmp_path / "mae"), images.images[:2])
    assert torch.allclose(found["original"], images.images[:2] / 255, atol=1e-6)
    assert found["painted"].shape == (2, channels, 16, 16)
    started = start_from(tmp_path / "mae", recipe).encoder
    how = run.model.refiner_card["preprocessing"]
    assert how["mean"] == started.refiner_card["preprocessing"]["mean"] != [0.5] * channels
    with pytest.raises(ValueError, match=f"have 3 channels but the recipe is for {channels}"):
        pretrain(pixels(8, 3), recipe=recipe, progress=False)


def test_a_probe_adapts_a_model_to_the_folder(tmp_path):
    for part in ("train", "test"):
        for seed, name in enumerate("ab"):
            save_arrays(tmp_path / "set" / part / name, pixels(6, 5, seed=seed).numpy())
    save_model(vit(3), tmp_path / "model")
    with pytest.warns(UserWarning, match="have 5 channels: the patch embedding of 3 channels, rep"):
        report = probe(
            str(tmp_path / "model"),
            tmp_path / "set",
            tmp_path / "out",
            settings=Settings(parts=("reading",)),
            progress=False,
        )
    assert "block" in report["models"][str(tmp_path / "model")]["reading"]["sentence"]


def test_the_command_line_reads_pictures_as_a_gray_model_needs_them(tmp_path):
    for part in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "set" / part).mkdir(parents=True)
        for i, x in enumerate(pixels(6, 3, seed=len(part))):
            picture = Image.fromarray(x.permute(1, 2, 0).numpy())
            picture.save(tmp_path / "set" / part / f"{i}.png")
    save_model(vit(1), tmp_path / "model")
    changes = {"batch": 4, "head_steps": 1, "steps": 1, "queue": 12, "blocks": (1, 2)}
    changes |= {"frozen_blocks": 0, "hidden": 8, "predictor_hidden": 8, "keep": "last"}
    options = [f"--set={name}={value}" for name, value in changes.items()]
    places = {"model": tmp_path / "model", "data": tmp_path / "set", "out": tmp_path / "refined"}
    assert main(["refine", *(f"--{k}={v}" for k, v in places.items()), *options]) == 0
    refined = load_model(places["out"])
    assert refined.patch_embed.proj.in_channels == 1
    gray = quiet(places["data"], channels=1).images / 255
    mean = refined.refiner_card["preprocessing"]["mean"]
    assert mean == pytest.approx([float(gray.double().mean())], abs=1e-5)
    report = evaluate(
        str(places["model"]),
        data=places["data"],
        out=tmp_path / "report",
        rows=("knn", "corruptions"),
        settings=replace(EvaluationSettings.cpu(), n=12, n_test=12),
        progress=False,
    )
    assert not report["failed"] and set(report["rows"]) == {"knn"}
    assert "photographs" in report["left_out"]["corruptions"]


# ---------------------------------------------------------------- files


def test_three_channels_as_arrays_are_exactly_the_pictures(tmp_path):
    x = pixels(4, 3, 23).permute(0, 2, 3, 1).numpy()
    save_arrays(tmp_path / "arrays", x)
    (tmp_path / "pictures").mkdir()
    for i, one in enumerate(x):
        Image.fromarray(one).save(tmp_path / "pictures" / f"{i}.png")
    np.save(tmp_path / "pictures" / "features.npy", np.zeros((4, 8)))  # is no picture
    for size in (16, (10, 20), 23):
        arrays, pictures = (quiet(tmp_path / x, size=size).images for x in ("arrays", "pictures"))
        assert torch.equal(arrays, pictures)
    gray, rgba = (quiet(tmp_path / "pictures", channels=c).images for c in (1, 4))
    order = {x[0].tobytes(): i for i, x in enumerate(pictures.numpy())}  # read in the same order
    assert len(order) == 4 and torch.equal(rgba[:, :3], pictures) and (rgba[:, 3] == 255).all()
    weights = torch.tensor([0.299, 0.587, 0.114])[:, None, None]
    assert ((pictures * weights).sum(1, keepdim=True) - gray).abs().max() <= 1
    with pytest.raises(ValueError, match="pictures are read with 1, 3 or 4 channels, not 12"):
        quiet(tmp_path / "pictures", channels=12)
    with pytest.raises(ValueError, match="the images of toybox have 3 channels, not 4"):
        quiet("toybox", channels=4)


def test_files_of_other_channels_are_left_out_and_named(tmp_path):
    save_arrays(tmp_path, [np.zeros((8, 8, 5), np.uint8)] * 3 + [np.zeros((8, 8, 4), np.uint8)])
    np.save(tmp_path / "complex.npy", np.zeros((8, 8, 5), np.complex64))
    with pytest.warns(UserWarning, match="2 of 5 images cannot be read .*: 3.npy, complex.npy"):
        images = load_images(tmp_path, progress=False)
    assert images.images.shape == (3, 5, 8, 8)


def test_gray_pages_of_a_tiff_are_channels(tmp_path):
    pages = [np.full((8, 6), 10 * (i + 1), np.uint16) for i in range(5)]
    first, *rest = map(Image.fromarray, pages)
    first.save(tmp_path / "0.tif", save_all=True, append_images=rest)
    images = quiet(tmp_path, size=(8, 6), value_range=(0, 100))
    assert images.images[0, :, 0, 0].tolist() == [26, 51, 76, 102, 128]


def test_bands_of_a_tiff_are_read_by_tifffile(tmp_path, monkeypatch):
    """Pillow would drop the fourth channel of this file."""
    image = Image.fromarray(pixels(1, 4, 8)[0].permute(1, 2, 0).numpy(), "RGBA")
    image.save(tmp_path / "0.tif")
    tag = struct.pack("<HHIH", 338, 3, 1, 2)  # extra samples, of type short, one, transparency
    content = (tmp_path / "0.tif").read_bytes()
    assert content.count(tag) == 1
    (tmp_path / "0.tif").write_bytes(content.replace(tag, tag[:-2] + b"\0\0"))
    with Image.open(tmp_path / "0.tif") as opened:
        assert opened.mode == "RGB"
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ModuleNotFoundError, match="pip install tifffile"):
        quiet(tmp_path)
    fake = types.SimpleNamespace(imread=lambda path: np.asarray(image))
    monkeypatch.setitem(sys.modules, "tifffile", fake)
    assert torch.equal(quiet(tmp_path).images, pixels(1, 4, 8))


def test_a_broken_tiff_among_pictures_is_left_out(tmp_path, monkeypatch):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    (tmp_path / "x.tif").write_bytes(b"II*\0, and then nothing of the kind")
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.warns(UserWarning, match="1 of 4 images cannot be read .*: x.tif"):
        assert len(load_images(tmp_path, progress=False)) == 3


@pytest.mark.parametrize("channels", [0, 2, -1, "3", 2.5])
def test_pictures_have_no_other_number_of_channels(channels, tmp_path):
    for i in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{i}.png")
    for load in (load_module.load_images, partial(load_module.load_holdout, share=0.5)):
        with pytest.raises(ValueError, match=f"1, 3 or 4 channels, not {channels!r}"):
            load(tmp_path, channels=channels)


VALUES = {  # kind: values of a set, and what becomes black and white
    "12 bits in 16": (np.uint16, (3, 4000), (0, 4095)),
    "16 bits": (np.uint16, (3, 60000), (0, 65535)),
    "few counts": (np.uint16, (0, 9), (0, 15)),
    "a mask": (np.bool_, (0, 1), (0, 1)),
    "signed": (np.int16, (-1200, 3000), (-1200, 3000)),
    "decibels": (np.float32, (-30, -5), (-30, -5)),
    "floats": (np.float32, (0.1, 0.9), (0, 1)),
    "signed floats": (np.float64, (-0.4, 0.9), (-1, 1)),
    "small floats": (np.float32, (1e-5, 0.003), (0, 0.01)),
    "reflectance": (np.int32, (0, 10500), (0, 16383)),
}


@pytest.mark.parametrize("kind", VALUES)
def test_one_range_for_all_channels_and_files_and_never_black(kind, tmp_path):
    dtype, (least, most), (low, high) = VALUES[kind]
    x = np.full((2, 6, 8, 5), least, dtype)  # [N, H, W, C]
    x[0, :3, :, 2] = most  # one channel of one image reaches the top
    x[1, :, :, 4] = (least + most) / 2
    save_arrays(tmp_path, x)
    with pytest.warns(UserWarning, match=f"values from {low:g} to {high:g} become 0 to 255, as 2"):
        images = load_images(tmp_path, size=(6, 8), progress=False).images
    expected = np.clip((x.astype(float) - low) / (high - low) * 255, 0, 255).transpose(0, 3, 1, 2)
    found = np.stack(sorted(images.numpy(), key=lambda x: -int(x.max())))
    assert np.abs(found - expected).max() <= 0.51
    assert found.max() >= 25


def png_of_16_bits(x_HWC: np.ndarray) -> bytes:
    """Pillow writes none with colours."""
    height, width, channels = x_HWC.shape
    kind = {2: 4, 3: 2, 4: 6}[channels]  # gray and alpha, colours, colours and alpha
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in x_HWC)
    chunks = {
        b"IHDR": struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0),
        b"IDAT": zlib.compress(rows),
        b"IEND": b"",
    }
    parts = [
        struct.pack(">I", len(content))
        + name
        + content
        + struct.pack(">I", zlib.crc32(name + content))
        for name, content in chunks.items()
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def tiff_of_16_bits(x_HW3: np.ndarray, order: str = "<", packed: bool = False) -> bytes:
    """One strip, plain or deflated; the bits of each colour lie behind it, then the tags."""
    height, width, _ = x_HW3.shape
    strip = x_HW3.astype(f"{order}u2").tobytes()
    strip = zlib.compress(strip) if packed else strip
    strip += bytes(len(strip) % 2)
    tags = [(256, 4, 1, width), (257, 4, 1, height), (258, 3, 3, 8 + len(strip))]
    tags += [(259, 4, 1, 8 if packed else 1), (262, 4, 1, 2), (273, 4, 1, 8), (277, 4, 1, 3)]
    tags += [(278, 4, 1, height), (279, 4, 1, len(strip))]
    start = struct.pack(f"{order}2sHI", b"II" if order == "<" else b"MM", 42, 14 + len(strip))
    ends = struct.pack(f"{order}4H", 16, 16, 16, len(tags))
    return start + strip + ends + b"".join(struct.pack(f"{order}HHII", *t) for t in tags) + bytes(4)


DEEP_FILES = {
    "0.png": png_of_16_bits,
    "0.tif": tiff_of_16_bits,
    "1.tif": partial(tiff_of_16_bits, order=">"),
    "2.tif": partial(tiff_of_16_bits, packed=True),
    "3.tif": partial(tiff_of_16_bits, order=">", packed=True),
}


@pytest.mark.parametrize(("name", "channels"), [("0.png", 4), *((x, 3) for x in DEEP_FILES)])
def test_colours_of_12_bits_in_16_are_not_black(name, channels, tmp_path):
    """Pillow drops the lower byte of colours, and so 12 bits would reach a value of 15."""
    x = np.random.default_rng(0).integers(0, 4096, (9, 7, channels)).astype(np.uint16)
    x[..., 3:] = 65535  # nothing is transparent
    x[0, 0, 0], x[1, 1, 1] = 0, 4095
    (tmp_path / name).write_bytes(DEEP_FILES[name](x))
    with Image.open(tmp_path / name) as cut_by_pillow:
        assert np.array_equal(np.asarray(cut_by_pillow), x >> 8)
    expected = x[..., :3].transpose(2, 0, 1) * (255 / 4095)
    with pytest.warns(UserWarning, match="values from 0 to 4095 become 0 to 255"):
        images = load_images(tmp_path, size=(9, 7), progress=False).images
    assert np.abs(images[0].numpy() - expected).max() <= 0.51
    x[2, 2], x[2, 2, 3:] = 0, 0  # transparent, if that is told: white
    (tmp_path / name).write_bytes(DEEP_FILES[name](x))
    found = quiet(tmp_path, size=(9, 7), value_range=(0, 4095)).images[0]
    assert found[:, 2, 2].tolist() == [255 * (channels == 4)] * 3


def test_a_picture_of_16_bits_a_colour_is_turned_as_its_camera_said(tmp_path):
    x = np.random.default_rng(0).integers(0, 4096, (4, 6, 3)).astype(np.uint16)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by a quarter
    content, tag = png_of_16_bits(x), exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = (
        struct.pack(">I", len(tag)) + b"eXIf" + tag + struct.pack(">I", zlib.crc32(b"eXIf" + tag))
    )
    (tmp_path / "0.png").write_bytes(content[:33] + chunk + content[33:])
    found = quiet(tmp_path, size=(6, 4), value_range=(0, 4095)).images[0].numpy()
    assert np.abs(found - np.rot90(x, -1).transpose(2, 0, 1) * (255 / 4095)).max() <= 0.51


def test_a_hole_is_black_and_does_not_move_the_range(tmp_path):
    x = np.full((4, 4, 2), 0.5, np.float32)
    x[0, 0], x[1, 1] = np.nan, np.inf
    save_arrays(tmp_path, [x])
    image = quiet(tmp_path).images[0]
    assert image[:, 0, 0].tolist() == [0, 0] and image[:, 2, 2].tolist() == [128, 128]


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("channels", [1, 2, 4, 6, 13])
def test_an_adapted_embedding_is_timms(channels, tmp_path):
    """A gray picture means the same to a model of one channel, colours twice to one of six."""
    x, own = pixels(2, 3), vit(3)
    save_model(own, tmp_path)
    with pytest.warns(UserWarning) as told:
        model = load_model(tmp_path, channels=channels)
    assert "assumed is the patch embedding of 3 channels" in str(told[0].message)
    theirs = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, in_chans=channels)
    weight = model.patch_embed.proj.weight
    assert torch.equal(weight, theirs.patch_embed.proj.weight) and weight.shape[1] == channels
    given = {1: x[:, :1].expand(-1, 3, -1, -1), 6: x}.get(channels)
    if given is not None:
        mine = (x[:, :1] if channels == 1 else x.repeat(1, 2, 1, 1)).float()
        with torch.no_grad():
            same = torch.allclose(model.patch_embed(mine), own.patch_embed(given.float()), atol=0.1)
        assert same
    save_model(model, tmp_path)
    with pytest.warns(UserWarning, match=f"a deviation of 0.25 of its {channels} channels"):
        assert load_model(tmp_path).refiner_card == model.refiner_card


def test_a_mean_that_is_known_is_not_measured_again():
    model = fit_channels(vit(4), pixels(6, 4))
    assert fit_channels(model, pixels(6, 4, seed=1)) is model
    own = vit(3)
    assert fit_channels(own, pixels(6, 3)) is own
    floats = fit_channels(vit(4), pixels(6, 4).double() / 255)
    assert floats.refiner_card["preprocessing"] == model.refiner_card["preprocessing"]
    flat = fit_channels(vit(2), torch.full((3, 2, 16, 16), 7, dtype=torch.uint8))
    assert features(flat, pixels(2, 2)).isfinite().all()


def test_a_card_of_other_channels_than_its_network_is_refused(tmp_path):
    model = fit_channels(vit(4), pixels(6, 4))
    save_model(model, tmp_path)
    card = tmp_path / "card.json"
    mean = model.refiner_card["preprocessing"]["mean"]
    card.write_text(card.read_text().replace(f"{mean[0]},", "", 1))
    with pytest.raises(ValueError, match="mean and deviation of 3 and 4 channels, but .* for 4"):
        load_model(tmp_path)


# ---------------------------------------------------------------- views

WHOLE = {"size": 6, "scale": (1.0, 1.0), "ratio": (1.0, 1.0), "flip": 0.0}
PLAIN = without_colour(View(**WHOLE, jitter=0.0))


def naive(x_BCHW, view, seed):
    """One view a sample, written out; the numbers are drawn in the same order."""
    generator = torch.Generator().manual_seed(seed)
    n, c, _, _ = x_BCHW.shape
    draw = lambda *shape: torch.rand(*shape, generator=generator).numpy()  # noqa: E731
    for _ in range(5):  # area, shape and place of the crop, flip
        draw(n)
    turned, quarters = draw(n) < view.turn, (1 + 3 * draw(n)).astype(int)
    jittered = draw(n) < view.jitter
    light, contrast = (
        [1 - s + 2 * s * u for u in draw(n)] for s in (view.brightness, view.contrast)
    )
    own, dropping = draw(n, c), draw(n, c)
    strength = draw(n) * view.noise
    grain = sum(draw(n, c, 6, 6) for _ in range(3))
    found = (x_BCHW.numpy() / 255).astype(np.float64)
    for i in range(n):
        if turned[i]:
            found[i] = np.rot90(found[i], quarters[i], (1, 2)).copy()
        for k in range(c):
            mean = found[i, k].mean()
            if jittered[i]:
                found[i, k] = light[i] * (contrast[i] * found[i, k] + (1 - contrast[i]) * mean)
            size = view.channel_brightness
            found[i, k] *= 1 - size + 2 * size * own[i, k]
            if dropping[i, k] < view.drop and dropping[i, k] < dropping[i].max():
                found[i, k] = found[i, k].mean()
        found[i] = np.clip(np.clip(found[i], 0, 1) + strength[i] * (2 * grain[i] - 3), 0, 1)
    return torch.from_numpy(found).float()


@pytest.mark.parametrize("channels", [1, 2, 5])
def test_views_of_channels_are_those_of_a_slow_reference(channels):
    x = pixels(40, channels, 6)
    view = replace(by_channel(PLAIN), jitter=0.5, brightness=0.4, contrast=0.3, drop=0.4)
    found = make_view(x, view, torch.Generator().manual_seed(3))
    assert torch.allclose(found, naive(x, view, 3), atol=1e-5)
    part = make_view(x[8:16], view, torch.Generator().manual_seed(3), rows=(8, 40))
    assert torch.allclose(part, found[8:16], atol=1e-6)


def test_turns_are_quarters_and_oblong_views_are_turned_by_halves():
    x = pixels(60, 3, 6)
    turned = make_view(x, replace(PLAIN, turn=1.0), torch.Generator().manual_seed(0))
    kinds = [
        next(k for k in (1, 2, 3) if torch.allclose(a, b.rot90(k, (1, 2)) / 255, atol=1e-6))
        for a, b in zip(turned, x, strict=True)
    ]
    assert set(kinds) == {1, 2, 3}
    oblong = torch.cat([x, x], dim=3)
    half = make_view(oblong, replace(PLAIN, size=(6, 12), turn=1.0))
    assert torch.allclose(half, oblong.rot90(2, (2, 3)) / 255, atol=1e-6)


def test_a_dropped_channel_is_flat_and_one_always_stays():
    x = pixels(200, 4, 6)
    found = make_view(x, replace(PLAIN, drop=1.0), torch.Generator().manual_seed(0))
    flat = found.std((2, 3)) < 1e-6
    assert (flat.sum(1) == 3).all() and (flat.sum(0) > 100).all()
    assert torch.allclose(found.mean((2, 3)), (x / 255).mean((2, 3)), atol=1e-5)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"jitter": 1.0, "hue": 0.1}, "hue"),
        ({"jitter": 1.0, "saturation": 0.1}, "saturation"),
        ({"gray": 0.1}, "gray"),
        ({"solarize": 0.1}, "solarize"),
    ],
)
def test_colours_of_no_colours_are_refused_by_name(change, named):
    view = replace(PLAIN, **change)
    make_view(pixels(2, 3), view)
    with pytest.raises(ValueError, match=f"^{named} in a view: .*have 4 channels; .*'channels'"):
        make_view(pixels(2, 4), view)
    with pytest.raises(ValueError, match=f"^{named} in a view"):
        refine(vit(4), pixels(8, 4), recipe=tiny(views=(view, view)), progress=False)


def test_refining_takes_the_views_of_channels_by_itself_and_by_name():
    model, images = vit(4, depth=12), pixels(128, 4)
    for preset in ("cpu", "gpu", "fitted"):
        recipe = refine_preset(preset, model, 16, images, [])
        assert all(by_channel(view) == view for view in recipe.views)
    by_name = refine_preset("cpu", vit(3), 16, images, ["views=channels"])
    assert [view.size for view in by_name.views] == [16, 16, 8, 8]
    assert all(by_channel(view) == view for view in by_name.views)
    given = refine_preset("cpu", vit(3), 16, images, [])
    assert given.views == Recipe.cpu(size=16).views


def test_corruptions_are_of_photographs():
    with pytest.raises(ValueError, match=r"photographs: .*not torch.uint8 \[2, 4, 16, 16\]"):
        corrupt(pixels(2, 4), "fog", 1)


# ---------------------------------------------------------------- figures


def test_figures_show_three_chosen_channels():
    x = pixels(2, 5)
    assert torch.equal(shown_channels(x), x[:, :3])
    assert torch.equal(shown_channels(x, (4, 0, 2)), x[:, [4, 0, 2]])
    assert torch.equal(shown_channels(x[:, :1]), x[:, :1].expand(-1, 3, -1, -1))
    assert torch.equal(shown_channels(x[:, :2])[:, :2], x[:, :2])
    assert not shown_channels(x[:, :2])[:, 2].any()
    axes = contact_sheet(ImageSet(x, shown=(4, 0, 2))[1:])
    drawn = torch.from_numpy(np.asarray(axes.images[0].get_array())).permute(2, 0, 1)
    assert torch.allclose(drawn.float(), x[1, [4, 0, 2]] / 255)
    with pytest.raises(ValueError, match="choose one to three of the channels 0 to 4"):
        contact_sheet(ImageSet(x, shown=(4, 5)))
