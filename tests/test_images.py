"""Image sets: order, indexing, the cache's promises, and real files of every awkward kind."""

import math
import os
import sys
import warnings
from pathlib import Path
from urllib.error import URLError

import matplotlib.pyplot as plt
import numpy as np
import pandas
import pytest
import torch
from PIL import Image

from refiner.base import places
from refiner.images import load as module
from refiner.images import toybox
from refiner.images.corruptions import corrupt
from refiner.images.decode import read_files, resize
from refiner.images.load import load_images
from refiner.images.sets import ImageSet, LazyImages, balanced_order, pixels_of
from refiner.images.streams import open_stream
from refiner.images.views import View, make_view
from refiner.models.encoders import preprocess
from refiner.visuals.plots import contact_sheet


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv("REFINER_CACHE", str(folder))
    return folder


def quiet(name, **options):
    return load_images(name, progress=False, **options)


def small_set(n=12) -> ImageSet:
    return ImageSet(
        torch.arange(n, dtype=torch.uint8)[:, None, None, None].expand(n, 3, 4, 4).clone(),
        torch.arange(n) % 3,
        ("a", "b", "c"),
        {"number": np.arange(n) * 10.0},
        "small",
        torch.arange(n).float()[:, None, None].expand(n, 4, 4),
    )


def first_pixels(images: ImageSet) -> list[int]:
    return images.batch(slice(None))[:, 0, 0, 0].tolist()


# ---------------------------------------------------------------- ImageSet


@pytest.mark.parametrize(
    ("index", "expected"),
    [
        (slice(3), [0, 1, 2]),
        (slice(None, None, -5), [11, 6, 1]),
        ([5, -1, 5], [5, 11, 5]),
        (torch.tensor([7, 2]), [7, 2]),
        (np.array([4]), [4]),
        (torch.arange(12) % 4 == 1, [1, 5, 9]),
        (3, [3]),
        ([], []),
    ],
)
def test_every_kind_of_index_selects_all_fields_together(index, expected):
    some = small_set()[index]
    assert first_pixels(some) == expected
    assert some.labels.tolist() == [i % 3 for i in expected]
    assert some.factors["number"].tolist() == [10 * i for i in expected]
    assert some.masks[:, 0, 0].tolist() == expected
    assert (some.classes, some.name, len(some)) == (("a", "b", "c"), "small", len(expected))


@pytest.mark.parametrize("index", [12, [-13], [0.5], torch.ones(5, dtype=torch.bool)])
def test_a_bad_index_is_an_error(index):
    with pytest.raises(IndexError):
        small_set()[index]


def test_iteration_ends():
    assert [first_pixels(one) for one in small_set(3)] == [[0], [1], [2]]


def test_repr_is_one_line_that_tells_what_it_is():
    text = repr(small_set())
    assert "\n" not in text
    for part in ("small", "12 images", "3×4×4", "3 classes", "1 factors"):
        assert part in text
    assert "unlabelled" in repr(ImageSet(torch.zeros(1, 3, 2, 2, dtype=torch.uint8)))


def test_fields_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="2 images do not match 3 labels"):
        ImageSet(torch.zeros(2, 3, 4, 4, dtype=torch.uint8), torch.zeros(3, dtype=torch.int64))


def test_batch_resizes_on_request_and_leaves_constant_images_constant():
    pixels = small_set().batch([2, 9], size=7)
    assert pixels.dtype == torch.uint8 and pixels.shape == (2, 3, 7, 7)
    assert torch.equal(pixels[0], torch.full((3, 7, 7), 2, dtype=torch.uint8))


def test_holdout_is_balanced_disjoint_and_complete():
    rest, held = small_set(30).holdout(0.2, seed=1)
    assert sorted(first_pixels(rest) + first_pixels(held)) == list(range(30))
    assert held.labels.bincount().tolist() == [2, 2, 2]
    with pytest.raises(ValueError, match="empty"):
        small_set(3).holdout(0.1)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.5, 0.9])
@pytest.mark.parametrize(
    "sizes", [(1000, 200, 50, 20, 5), (90, 1, 0, 9, 2), (7, 2, 2, 2, 1), (30,) * 9 + (3,)]
)
def test_holdout_takes_the_same_share_of_every_class(sizes, share):
    """Dealt out in equal numbers, rare classes would leave the rest."""
    labels = torch.cat([torch.full((size,), c) for c, size in enumerate(sizes)])
    n = len(labels)
    images = ImageSet(torch.arange(n)[:, None, None, None].expand(n, 3, 1, 1), labels)
    rest, held = images.holdout(share, seed=2)
    assert sorted(first_pixels(rest) + first_pixels(held)) == list(range(n))
    total, most = 0, 0
    for size, count in zip(sizes, held.labels.bincount(minlength=len(sizes)), strict=True):
        assert abs(int(count) - min(share * size, max(0, size - 1))) < 1
        assert size == 0 or count < size
        total, most = total + int(count), most + max(0, min(size - 1, math.ceil(share * size)))
    assert total == min(round(share * n), most)


@pytest.mark.parametrize("share", [0.1, 0.2, 1 / 3])
def test_holdout_deals_equal_classes_out_in_turn(share):
    """What was held out of balanced sets for published numbers stays what it is."""
    for n in (*range(20, 90), 333, 1001):
        labels = torch.from_numpy(np.random.default_rng(n).permutation(n) % 7)
        images = ImageSet(torch.arange(n)[:, None, None, None].expand(n, 3, 1, 1), labels)
        _, held = images.holdout(share, seed=n)
        dealt = balanced_order(labels, n, seed=n)[: round(share * n)]
        assert first_pixels(held) == dealt.sort().values.tolist()


def test_holdout_of_single_images_is_refused_and_ids_may_be_huge():
    pixels = torch.zeros(4, 3, 2, 2, dtype=torch.uint8)
    with pytest.raises(ValueError, match="every class has one image"):
        ImageSet(pixels, torch.arange(4)).holdout(0.5)
    rest, held = ImageSet(pixels, [10**15, 7, 10**15, 7]).holdout(0.5)
    assert sorted(rest.labels.tolist()) == sorted(held.labels.tolist()) == [7, 10**15]


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        (["b", "a", "b", "c"], ()),
        (np.array(["b", "a", "b", "c"], dtype=object), ("a", "b", "c")),
        (pandas.Series(["b", "a", "b", "c"], index=[9, 8, 7, 6]), ["a", "b", "c"]),
        (pandas.Series(["b", "a", "b", "c"], dtype="category"), ()),
        (pandas.Series([1, 0, 1, 2], index=[9, 8, 7, 6]), ("a", "b", "c")),
        ([1, 0, 1, 2], np.array(["a", "b", "c"])),
        (np.array([1, 0, 1, 2], dtype=np.uint16), ("a", "b", "c")),
        (np.array([1, 0, 1, 2], dtype=object), ("a", "b", "c")),
        (torch.tensor([1, 0, 1, 2], dtype=torch.int8), ("a", "b", "c")),
    ],
)
def test_labels_of_every_kind_become_places_among_the_classes(labels, classes):
    images = ImageSet(np.zeros((4, 2, 2, 3), dtype=np.uint8), labels, classes, {"f": [1, 2, 3, 4]})
    assert images.labels.dtype == torch.int64 and images.labels.tolist() == [1, 0, 1, 2]
    assert images.classes == ("a", "b", "c") and images.images.shape == (4, 3, 2, 2)
    assert images[1:3].labels.tolist() == [0, 1] and images[[0]].factors["f"].tolist() == [1]


KINDS_OF_PIXELS = {
    "set": ImageSet,
    "tensor": lambda x: x,
    "array": lambda x: x.numpy(),
    "channels last": lambda x: x.permute(0, 2, 3, 1).numpy(),
    "tensors": list,
    "pictures": lambda x: [Image.fromarray(one.permute(1, 2, 0).numpy()) for one in x],
}


@pytest.mark.parametrize("kind", KINDS_OF_PIXELS)
def test_pixels_come_in_many_containers(kind):
    x = small_set().images
    given = KINDS_OF_PIXELS[kind](x)
    assert torch.equal(pixels_of(given), x)
    assert torch.equal(corrupt(given, "contrast", 1), corrupt(x, "contrast", 1))
    assert len(quiet_axes(given).images) == len(x)


def quiet_axes(given):
    axes = contact_sheet(given)
    plt.close(axes.figure)
    return axes


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda x: x[0], "\\[3, 4, 4\\]"),
        (lambda x: [x[0], x[0, :, :2]], "different sizes: image 0 is 3×4×4 and image 1 is 3×2×4"),
        (lambda x: "folder", "not str"),
    ],
)
def test_what_is_no_image_never_reaches_an_operation(wrong, message):
    given = wrong(small_set().images)
    for door in (pixels_of, ImageSet, contact_sheet, lambda x: corrupt(x, "fog", 1)):
        with pytest.raises(ValueError, match=message):
            door(given)
    if isinstance(given, torch.Tensor):
        for door in (lambda x: make_view(x, View(size=4)), lambda x: preprocess(x, {})):
            with pytest.raises(ValueError, match=message):
                door(given)


def test_numbers_as_classes_are_names():
    pixels = torch.zeros(2, 3, 2, 2, dtype=torch.uint8)
    assert ImageSet(pixels, [True, False], classes=[1, 2]).classes == ("1", "2")
    assert ImageSet(pixels, ["2", "1"], classes=[1, 2]).labels.tolist() == [1, 0]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"labels": [0, -1]}, "that of image 1 is -1: leave images without a class out"),
        ({"labels": [0, 2]}, "label 2 has no name among 2 classes"),
        ({"labels": ["a", "x"]}, "the label 'x' is none of the 2 classes"),
        ({"labels": [0.0, 1.0]}, "must be words or whole numbers from 0, not float64"),
        ({"labels": [0, None]}, "must be words or whole numbers from 0, not object"),
        ({"labels": [[0], [1]]}, r"do not match labels of shape \[2, 1\]"),
        ({"images": torch.zeros(2, 2, 2)}, r"\[N, C, H, W\], not torch.float32 \[2, 2, 2\]"),
    ],
)
def test_what_is_no_set_is_refused_in_a_sentence(changed, message):
    given = {"images": torch.zeros(2, 3, 2, 2, dtype=torch.uint8), "classes": ("a", "b")}
    with pytest.raises(ValueError, match=message):
        ImageSet(**given | changed)


def test_balanced_order_deals_classes_out_as_far_as_they_last():
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 3)
    order = balanced_order(labels, 73, seed=4)
    assert sorted(order.tolist()) == list(range(73))
    assert labels[order[:9]].bincount(minlength=3).tolist() == [3, 3, 3]
    assert labels[order[:23]].bincount(minlength=3).tolist() == [10, 10, 3]
    for end in range(1, 9):
        counts = labels[order[:end]].bincount(minlength=3)
        assert counts.max() - counts.min() <= 1
    assert torch.equal(order, balanced_order(labels, 73, seed=4))
    assert not torch.equal(order, balanced_order(labels, 73, seed=5))


def test_resize_crops_the_centre_of_the_longer_side():
    wide = torch.zeros(1, 3, 4, 12, dtype=torch.uint8)
    wide[..., 4:8] = 200
    assert torch.equal(resize(wide, 4), torch.full((1, 3, 4, 4), 200, dtype=torch.uint8))


def test_resize_agrees_with_pillow():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    ours = resize(torch.from_numpy(pixels).permute(2, 0, 1)[None], 8)[0].permute(1, 2, 0)
    theirs = np.asarray(Image.fromarray(pixels).resize((8, 8), Image.Resampling.BICUBIC))
    assert np.abs(ours.numpy().astype(int) - theirs.astype(int)).max() <= 1


# ---------------------------------------------------------------- Toybox and its cache


def test_toybox_is_what_the_renderer_gives_fresh_and_from_the_cache(cache):
    scene = toybox.render(20, split="test", size=16, seed=3)
    for _ in range(2):
        images = quiet("toybox", split="test", n=20, size=16, seed=3)
        assert torch.equal(images.images, scene.images)
        assert torch.equal(images.labels, scene.labels)
        assert torch.equal(images.masks, scene.masks)
        assert images.classes == scene.classes
        for name in toybox.FACTORS:
            assert np.array_equal(images.factors[name], scene.factors[name])
    assert len(list(cache.iterdir())) == 1


def test_the_cache_is_used_serves_less_and_grows_by_what_is_missing(monkeypatch):
    quiet("toybox", n=20, size=8)
    asked = []
    render = toybox.render
    monkeypatch.setattr(
        toybox, "render", lambda indices, **o: asked.append(list(indices)) or render(indices, **o)
    )
    fewer = quiet("toybox", n=5, size=8)
    assert asked == [[19]]  # the last one tells whether the cache is of these images
    more = quiet("toybox", n=24, size=8)
    assert asked == [[19], [19], [20, 21, 22, 23]]
    assert torch.equal(more.images, render(24, size=8).images)
    assert torch.equal(fewer.images, more.images[:5])
    quiet("toybox", n=5, size=8, cache=False)
    assert asked[-1] == [0, 1, 2, 3, 4]


def test_different_images_never_share_a_cache_file(cache):
    variants = [
        {},
        {"seed": 1},
        {"size": 9},
        {"split": "val"},
    ]
    seen = [quiet("toybox", **{"n": 2, "size": 8} | v).batch([0, 1], 8) for v in variants]
    seen.append(quiet("toybox-hard", n=2, size=8).images)
    seen.append(quiet("toybox-new", n=2, size=8).images)
    assert len(list(cache.iterdir())) == 6
    for i, a in enumerate(seen):
        assert not any(torch.equal(a, b) for b in seen[:i])


def test_an_edited_renderer_never_gets_old_images(tmp_path, monkeypatch, cache):
    quiet("toybox", n=2, size=8)
    edited = tmp_path / "edited.py"
    edited.write_text(Path(toybox.__file__).read_text() + "\n# changed\n")
    monkeypatch.setattr(toybox, "__file__", str(edited))
    quiet("toybox", n=2, size=8)
    assert len(list(cache.iterdir())) == 2


def cut(data: bytes) -> bytes:
    return data[: len(data) // 2]


def flip(data: bytes) -> bytes:
    where = data.index(b"images.npy") + 600  # inside of the pixels
    return data[:where] + bytes([data[where] ^ 1]) + data[where + 1 :]


@pytest.mark.parametrize("damage", [cut, flip, lambda data: b"", lambda data: b"not an archive"])
def test_a_damaged_cache_is_rendered_again_with_a_warning(cache, damage):
    fresh = quiet("toybox", n=16, size=8)
    (path,) = cache.iterdir()
    path.write_bytes(damage(path.read_bytes()))
    with pytest.warns(UserWarning, match="damaged"):
        again = quiet("toybox", n=16, size=8)
    assert torch.equal(again.images, fresh.images)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(quiet("toybox", n=16, size=8).images, fresh.images)


@pytest.mark.parametrize(
    "change",
    [
        lambda arrays: {"images": arrays["images"][..., :4]},
        lambda arrays: {"images": arrays["images"][::-1]},
        lambda arrays: {"images": arrays["images"].astype(np.float32)},
        lambda arrays: {"labels": arrays["labels"] + 1},
        lambda arrays: {"masks": arrays["masks"][:-1]},
        lambda arrays: {"factor/hue": arrays["factor/hue"] + 0.5},
        lambda arrays: {k: v[:0] for k, v in arrays.items()},
    ],
)
def test_a_whole_cache_of_other_images_is_rendered_again(cache, change):
    fresh = quiet("toybox", n=4, size=8)
    (path,) = cache.iterdir()
    with np.load(path) as archive:
        arrays = dict(archive)
    np.savez(path, **arrays | change(arrays))
    with pytest.warns(UserWarning, match="no images|not the images that belong there"):
        again = quiet("toybox", n=4, size=8)
    assert torch.equal(again.images, fresh.images) and torch.equal(again.labels, fresh.labels)


def test_an_unwritable_cache_only_warns(tmp_path, monkeypatch):
    blocked = tmp_path / "a_file"
    blocked.write_text("in the way")
    monkeypatch.setenv("REFINER_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="cannot be kept"):
        assert len(quiet("toybox", n=2, size=8)) == 2


def test_an_interrupted_write_leaves_the_old_cache_and_nothing_else(cache, monkeypatch):
    quiet("toybox", n=4, size=8)
    (path,) = cache.iterdir()
    old = path.read_bytes()

    def half(file, **arrays):
        file.write(b"half a file")
        assert path.read_bytes() == old  # a reader meets the old file while the new one is written
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", half)
    with pytest.raises(KeyboardInterrupt):
        quiet("toybox", n=8, size=8)
    assert path.read_bytes() == old and list(cache.iterdir()) == [path]


def test_two_processes_fill_the_same_cache_at_once(cache):
    def fill():
        """In a fork, which has imported everything: a few kilobytes fit into its pipe."""
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            for n in (8, 24, 40):
                found = load_images("toybox", n=n, size=8, progress=False)
        os.write(writer, found.images.numpy().tobytes())

    expected = toybox.render(40, size=8).images.numpy().tobytes()
    runs = []
    for _ in range(2):
        reader, writer = os.pipe()
        child = os.fork()
        if not child:
            try:
                fill()
                os._exit(0)
            finally:
                os._exit(1)
        os.close(writer)
        runs.append((child, reader))
    for child, reader in runs:
        with open(reader, "rb") as pipe:
            assert pipe.read() == expected
        assert os.waitpid(child, 0)[1] == 0
    assert [path.suffix for path in cache.iterdir()] == [".npz"]  # no temporary files are left


def test_the_cache_folder_follows_the_platform(monkeypatch, tmp_path):
    monkeypatch.delenv("REFINER_CACHE")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert places.cache_folder() == tmp_path / "refiner"


# ---------------------------------------------------------------- digits and CIFAR


def test_digits_splits_are_disjoint_and_complete():
    train, test = quiet("digits", size=8), quiet("digits", split="test", size=8)
    assert len(train) + len(test) == 1797
    assert train.images.shape[1:] == (3, 8, 8)
    assert train.labels[:100].bincount().tolist() == [10] * 10
    seen = {bytes(x) for x in train.images.numpy().reshape(len(train), -1)}
    # scikit-learn's set holds no digit twice, so any shared picture would be a leak.
    assert not any(bytes(x) in seen for x in test.images.numpy().reshape(len(test), -1))
    assert torch.equal(quiet("digits", n=50, size=8).images, train.images[:50])


def test_cifar_without_a_network_says_which_file_to_put_where(monkeypatch, cache):
    def offline(*args, **kwargs):
        raise URLError("no route")

    monkeypatch.setattr("torchvision.datasets.utils.download_url", offline)
    with pytest.raises(ConnectionError, match="cifar-10-python.tar.gz") as error:
        quiet("cifar10")
    assert str(cache / "cifar10") in str(error.value) and "\n" not in str(error.value)
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_cifar_comes_through_torchvision(monkeypatch):
    data = np.random.default_rng(0).integers(0, 256, (20, 32, 32, 3), dtype=np.uint8)

    class Stub:
        url = filename = tgz_md5 = ""

        def __init__(self, root, train, download):
            self.data, self.targets, self.classes = data, [0, 1] * 10, ["cat", "dog"]

    monkeypatch.setattr("torchvision.datasets.CIFAR10", Stub)
    monkeypatch.setattr(module, "_fetch", lambda *args: None)
    images = quiet("cifar10", n=6)
    assert images.labels.bincount().tolist() == [3, 3] and images.classes == ("cat", "dog")
    where = [
        int(np.flatnonzero((data == x.permute(1, 2, 0).numpy()).all((1, 2, 3)))[0])
        for x in images.images
    ]
    assert [[0, 1][i % 2] for i in where] == images.labels.tolist()


# ---------------------------------------------------------------- folders


def save(path: Path, colour=(10, 20, 30), size=(8, 8), **options) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path, **options)
    return path


def test_a_folder_of_classes(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / "zebra" / f"{i}.png", (200, 0, i))
        save(tmp_path / "set" / "ant" / "deep" / f"{i}.PNG", (100, 0, i))
    save(tmp_path / "set" / ".hidden" / "0.png")
    save(tmp_path / "set" / "ant" / ".hidden.png")
    (tmp_path / "set" / "ant" / "notes.txt").write_text("not an image")
    (tmp_path / "set" / "empty").mkdir()
    images = quiet(tmp_path / "set")
    assert images.classes == ("ant", "zebra")
    assert images.images.shape == (6, 3, 8, 8)  # the files' own size
    assert images.images[:, 0, 0, 0].tolist() == [[100, 200][y] for y in images.labels]
    assert sorted(images.images[:, 2, 0, 0].tolist()) == [0, 0, 1, 1, 2, 2]
    assert torch.equal(quiet(tmp_path / "set", n=4).images, images.images[:4])
    assert quiet(tmp_path / "set", n=4).labels.bincount().tolist() == [2, 2]
    with pytest.raises(ValueError, match="6 images, fewer than the 7"):
        quiet(tmp_path / "set", n=7)


def test_an_unlabelled_folder_and_loose_files(tmp_path):
    for i in range(3):
        save(tmp_path / "set" / f"{i}.png", (i, 0, 0))
    images = quiet(tmp_path / "set")
    assert images.labels is None and images.classes == ()
    assert sorted(first_pixels(images)) == [0, 1, 2]
    save(tmp_path / "set" / "class" / "0.png")
    with pytest.warns(UserWarning, match="3 images directly in .* belong to no class"):
        assert len(quiet(tmp_path / "set")) == 1


def test_splits_are_folders(tmp_path):
    save(tmp_path / "set" / "train" / "a" / "0.png", (1, 0, 0))
    save(tmp_path / "set" / "valid" / "a" / "0.png", (2, 0, 0))
    save(tmp_path / "set" / "unlabelled" / "0.png")
    assert first_pixels(quiet(tmp_path / "set")) == [1]
    assert first_pixels(quiet(tmp_path / "set", split="val")) == [2]
    with pytest.raises(ValueError, match="no test sub-folder, only train, valid"):
        quiet(tmp_path / "set", split="test")


@pytest.mark.parametrize("emptied", [False, True])
def test_a_class_has_the_same_number_in_every_split(emptied, tmp_path):
    """Numbered in each split by itself, c of the test images would be b of the train images."""
    shades = {"a": 10, "b": 20, "c": 30, "d": 40}
    for split, names in (("train", "abc"), ("val", "cd"), ("test", "ac")):
        for name in names:
            save(tmp_path / "set" / split / name / "0.png", (shades[name], 0, 0))
    if emptied:
        (tmp_path / "set" / "test" / "a" / "0.png").unlink()
        save(tmp_path / "set" / "test" / "b" / "0.png", (20, 0, 0))
    for split in ("train", "val", "test"):
        images = quiet(tmp_path / "set", split=split)
        assert images.classes == ("a", "b", "c", "d")
        assert first_pixels(images) == [shades[images.classes[y]] for y in images.labels]


def test_a_split_may_be_unlabelled_or_of_one_class_beside_a_labelled_one(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/0.png", "val/b/0.png"):
        save(tmp_path / "set" / name)
    assert quiet(tmp_path / "set").classes == ("a", "b")
    assert quiet(tmp_path / "set", split="test").labels is None
    with pytest.warns(UserWarning, match="of one class, 'b'.*the set has 2 classes"):
        assert quiet(tmp_path / "set", split="val").labels.tolist() == [1]


def test_splits_are_found_one_folder_further_inside(tmp_path):
    """As archives unpack; read as a class, train and test images would be one."""
    for split, name in (("train", "a"), ("train", "b"), ("test", "a"), ("test", "b")):
        save(tmp_path / "unpacked" / "set-1.0" / split / name / "0.png", (len(split), 0, 0))
    (tmp_path / "unpacked" / ".hidden").mkdir()
    images = quiet(tmp_path / "unpacked")
    assert images.classes == ("a", "b") and first_pixels(images) == [5, 5]
    assert first_pixels(quiet(tmp_path / "unpacked", split="test")) == [4, 4]
    # Without splits inside the lone folder is a class, and that is said.
    for name in ("deep", "deeper"):
        save(tmp_path / "lone" / "class" / name / "0.png")
    with pytest.warns(UserWarning, match="of one class, 'class': k-NN and probes have nothing"):
        assert quiet(tmp_path / "lone").classes == ("class",)


def test_a_class_may_be_called_train(tmp_path):
    for name in ("car", "train"):
        save(tmp_path / "set" / name / "0.png")
    assert quiet(tmp_path / "set").classes == ("car", "train")
    with pytest.raises(ValueError, match="holdout"):
        quiet(tmp_path / "set", split="test")


@pytest.mark.parametrize(
    "names",
    [
        ("Train", "Test"),
        ("Training", "Testing"),
        ("TRAIN", "eval"),
        ("train_set", "dev_set"),
        ("train+dev", "test"),
        ("seg_train/seg_train", "seg_test/seg_test"),
        ("train2017/images", "val2017/images"),
    ],
)
def test_splits_go_by_many_names(names, tmp_path):
    for shade, name in enumerate(names, 1):
        for c in "ab":
            save(tmp_path / "set" / name / c / "0.png", (shade, 0, 0))
    images = quiet(tmp_path / "set")
    assert images.classes == ("a", "b") and first_pixels(images) == [1, 1]
    split = "val" if names[1][:3] in ("dev", "val") else "test"
    assert first_pixels(quiet(tmp_path / "set", split=split)) == [2, 2]


def test_splits_are_found_past_folders_without_images(tmp_path):
    for split in ("train", "test"):
        for c in "ab":
            save(tmp_path / "got" / "set" / split / c / "0.png", (len(split), 0, 0))
            (tmp_path / "got" / "__MACOSX" / "set" / split / c).mkdir(parents=True)
            (tmp_path / "got" / "__MACOSX" / "set" / split / c / "._0.png").write_bytes(b"x")
    (tmp_path / "got" / "docs").mkdir()
    (tmp_path / "got" / "docs" / "license.txt").write_text("free")
    images = quiet(tmp_path / "got")
    assert images.classes == ("a", "b") and first_pixels(images) == [5, 5]
    (tmp_path / "got" / "set" / "test").rename(tmp_path / "got" / "set" / "readme")
    for c in "ab":
        (tmp_path / "got" / "set" / "readme" / c / "0.png").unlink()
    assert quiet(tmp_path / "got").classes == ("a", "b")  # train beside a folder without images


def test_classes_with_the_same_sub_folders_are_doubted(tmp_path):
    for name in ("toy_train", "test_tube"):
        for c in "ab":
            save(tmp_path / "set" / name / c / "0.png")
    with pytest.warns(UserWarning, match="test_tube, toy_train in .* the same sub-folders a, b"):
        assert quiet(tmp_path / "set").classes == ("test_tube", "toy_train")


def test_files_that_pillow_reads_are_images_and_a_folder_of_others_is_named(tmp_path):
    kinds = ("jfif", "jpe", "jp2", "tga", "apng", "png")
    for extension in kinds:
        save(tmp_path / "set" / "a" / f"0.{extension}", (0, 90, 0))
    save(tmp_path / "set" / "b" / "0.png")
    assert len(quiet(tmp_path / "set")) == len(kinds) + 1
    (tmp_path / "set" / "c").mkdir()
    for name in ("0.heic", "1.heic", ".hidden.raw", "notes"):
        (tmp_path / "set" / "c" / name).write_bytes(b"x")
    with pytest.warns(UserWarning, match="c holds no images and is left out.*in .heic, notes"):
        assert quiet(tmp_path / "set").classes == ("a", "b")


def test_mixed_sizes_become_224_and_one_size_is_kept(tmp_path):
    save(tmp_path / "set" / "0.png", size=(30, 30))
    assert quiet(tmp_path / "set").images.shape[-1] == 30
    save(tmp_path / "set" / "1.png", size=(300, 260))
    assert quiet(tmp_path / "set").images.shape[-1] == 224
    assert quiet(tmp_path / "set", size=16).images.shape[-1] == 16


def read_one(path: Path, size: int) -> np.ndarray:
    pixels, broken = read_files([path], size, progress=False)
    assert not broken
    return pixels[0].permute(1, 2, 0).numpy()


def test_every_mode_becomes_rgb(tmp_path):
    modes = {
        "L": (Image.new("L", (4, 4), 77), 77),
        "1": (Image.new("1", (4, 4), 1), 255),
        "P": (Image.new("RGB", (4, 4), (9, 9, 9)).convert("P", palette=Image.Palette.ADAPTIVE), 9),
        "LA": (Image.new("LA", (4, 4), (5, 255)), 5),
        "RGBA": (Image.new("RGBA", (4, 4), (0, 0, 0, 0)), 255),  # fully transparent: white
        "I;16": (Image.fromarray(np.full((4, 4), 257 * 90, dtype=np.uint16)), 90),
    }
    for name, (image, value) in modes.items():
        image.save(tmp_path / "x.png")
        assert (read_one(tmp_path / "x.png", 4) == value).all(), name
    clear = Image.new("P", (4, 4), 0)
    clear.putpalette([0, 0, 0])
    clear.save(tmp_path / "clear.gif", transparency=0)
    assert (read_one(tmp_path / "clear.gif", 4) == 255).all()
    Image.new("CMYK", (16, 16), (0, 0, 0, 255)).save(tmp_path / "x.jpg")
    assert (read_one(tmp_path / "x.jpg", 4) < 5).all()


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.float32([[0, 0.5], [1, 0.25]]), [[0, 128], [255, 64]]),
        (np.float32([[0, 90], [200.4, 3]]), [[0, 90], [200, 3]]),
        (np.float32([[-1, 0], [0.5, 1]]), [[0, 128], [191, 255]]),
        (np.float32([[0, np.nan], [1, np.inf]]), [[0, 0], [255, 0]]),
        (np.int32([[0, 90], [255, 3]]), [[0, 90], [255, 3]]),
        (np.int32([[-1000, 0], [1000, 500]]), [[0, 128], [255, 191]]),
        (np.uint16([[0, 4095], [2048, 1]]), [[0, 255], [128, 0]]),
        (np.int32([[0, 257 * 90], [257 * 200, 300]]), [[0, 90], [200, 1]]),
        (np.int32([[0, 10**6], [2 * 10**6, 0]]), [[0, 128], [255, 0]]),
        (np.uint16([[0, 255], [257, 257 * 90]]), [[0, 1], [1, 90]]),
    ],
)
def test_gray_of_more_than_8_bits_keeps_its_brightness(values, expected, tmp_path):
    Image.fromarray(values).save(tmp_path / "x.tif")
    pixels = read_one(tmp_path / "x.tif", 2)
    assert (pixels == np.array(expected)[:, :, None]).all()


@pytest.mark.parametrize("kind", [np.uint16, np.int32, np.float32])
def test_scans_share_one_range_over_all_splits(kind, tmp_path, monkeypatch):
    """Each by its own maximum would be equally bright; by 16 bits nearly black."""
    tops = {"train/a": 1000, "train/b": 4000, "test/a": 500, "test/b": 250}
    for name, top in tops.items():
        (tmp_path / "set" / name).mkdir(parents=True)
        Image.fromarray(np.full((4, 4), top, dtype=kind)).save(tmp_path / "set" / name / "0.tif")
    expected = {"train": [62, 249], "test": [16, 31]}
    for limit, split in ((2**31, "train"), (2**31, "test"), (1, "test")):
        monkeypatch.setattr(module, "MEMORY_LIMIT", limit)
        with pytest.warns(UserWarning, match="values from 0 to 4095 become 0 to 255, as 4 of"):
            images = quiet(tmp_path / "set", split=split)
        assert sorted(first_pixels(images)) == expected[split]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        images = quiet(tmp_path / "set", value_range=(1000, 3000))
        assert first_pixels(images[images.labels.argsort()]) == [0, 255]


def test_a_photo_is_turned_upright(tmp_path):
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4] = 255  # bright half on top, as stored
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise: the top goes to the right
    Image.fromarray(pixels).save(tmp_path / "x.png", exif=exif)
    upright = read_one(tmp_path / "x.png", 8)
    assert (upright[:, 4:] == 255).all() and (upright[:, :4] == 0).all()


def test_resized_shorter_side_and_centre_crop(tmp_path):
    pixels = np.zeros((10, 30, 3), dtype=np.uint8)
    pixels[:, 10:20] = 255
    Image.fromarray(pixels).save(tmp_path / "x.png")
    assert (read_one(tmp_path / "x.png", 10) == 255).all()


def test_a_large_jpeg_looks_as_if_decoded_in_full(tmp_path):
    rows, columns = np.mgrid[0:512, 0:512]
    checks = (rows // 16 + columns // 16) % 2 * 60
    pixels = np.stack([rows // 4 + checks, columns // 4 + checks, checks], -1).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.jpg", quality=95)
    for size in (32, 128):
        with Image.open(tmp_path / "x.jpg") as image:
            full = np.asarray(image.convert("RGB").resize((size, size), Image.Resampling.BICUBIC))
        assert np.abs(read_one(tmp_path / "x.jpg", size).astype(int) - full).mean() < 4


def test_broken_images_are_left_out_counted_and_named(tmp_path):
    good = save(tmp_path / "set" / "a" / "good.jpg", (200, 200, 200), (64, 64))
    save(tmp_path / "set" / "b" / "fine.png", (200, 200, 200), (64, 64))
    (tmp_path / "set" / "a" / "empty.jpg").write_bytes(b"")
    (tmp_path / "set" / "a" / "text.png").write_text("hello")
    (tmp_path / "set" / "b" / "cut.jpg").write_bytes(good.read_bytes()[:-200])
    with pytest.warns(UserWarning) as caught:
        images = quiet(tmp_path / "set")
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "3 of 5" in text and all(name in text for name in ("empty.jpg", "text.png", "cut.jpg"))
    assert sorted(images.labels.tolist()) == [0, 1]
    assert (images.images[:, :, 0, 0] - 200 <= 1).all()


def test_a_picture_of_too_many_pixels_is_left_out_with_and_without_a_size(tmp_path, monkeypatch):
    """Pillow's error for it is no OSError."""
    save(tmp_path / "set" / "good.png", (200, 0, 0))
    save(tmp_path / "set" / "large.png", (9, 0, 0), (300, 300))
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    for size in (None, 8):
        with pytest.warns(UserWarning, match="1 of 2 images cannot be read.*large.png"):
            assert first_pixels(quiet(tmp_path / "set", size=size)) == [200]


def test_a_very_long_picture_is_resized_in_the_middle_only(tmp_path):
    shades = np.zeros((60_000, 1, 3), dtype=np.uint8)
    shades[29_980:30_020] = 80
    Image.fromarray(shades).save(tmp_path / "x.png")
    assert (read_one(tmp_path / "x.png", 16) == 80).all()
    rows = torch.from_numpy(shades).permute(2, 1, 0)[None]  # [1, 3, 1, 60000]
    assert (resize(rows, 16) == 80).all()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_what_is_no_file_is_skipped(tmp_path):
    """Opening a FIFO would wait for somebody to write into it."""
    save(tmp_path / "set" / "a" / "0.png")
    os.mkfifo(tmp_path / "set" / "a" / "1.png")
    (tmp_path / "set" / "a" / "2.png").symlink_to("/dev/zero")
    (tmp_path / "set" / "a" / "3.png").symlink_to("3.png")
    (tmp_path / "set" / "a" / "4.png").symlink_to("nowhere")
    (tmp_path / "set" / "itself").symlink_to("itself")
    save(tmp_path / "set" / "b" / "0.png")
    assert len(quiet(tmp_path / "set")) == 2


def test_links_in_a_circle_count_no_image_twice(tmp_path):
    for i, name in enumerate(("a/0.png", "a/deep/1.png", "b/2.png")):
        save(tmp_path / "set" / name, (i, 0, 0))
    save(tmp_path / "other" / "3.png", (3, 0, 0))
    for link, target in (
        ("a/up", "set/a"),
        ("a/deep/root", "set"),
        ("b/itself", "set/b"),
        ("self", "set"),
        ("b/linked", "other"),
        ("b/again", "other"),
    ):
        (tmp_path / "set" / link).symlink_to(tmp_path / target)
    images = quiet(tmp_path / "set")
    assert images.classes == ("a", "b")
    found = sorted(zip(images.labels.tolist(), first_pixels(images), strict=True))
    assert found == [(0, 0), (0, 1), (1, 2), (1, 3)]
    (tmp_path / "link").symlink_to(tmp_path / "set")
    assert len(quiet(tmp_path / "link")) == 4


def test_a_folder_of_only_broken_images_is_an_error(tmp_path):
    (tmp_path / "x.png").write_text("hello")
    with pytest.raises(ValueError, match="none of the 1 images"):
        quiet(tmp_path)


def test_an_empty_folder_says_what_was_looked_for(tmp_path):
    (tmp_path / "set").mkdir()
    with pytest.raises(ValueError, match=r"holds no images.*\.jpg.*\.png"):
        quiet(tmp_path / "set")


@pytest.mark.parametrize(
    ("name", "hint"),
    [("toybx", "'toybox'"), ("cifar-10", "'cifar10'"), ("/nowhere/at/all", "digits")],
)
def test_an_unknown_name_suggests_the_nearest(name, hint):
    with pytest.raises(FileNotFoundError, match=hint):
        load_images(name)


@pytest.mark.parametrize("name", ["toybox", "digits", "cifar10"])
def test_an_unknown_split_is_an_error(name):
    with pytest.raises(ValueError, match="no split 'validate': choose one of train"):
        load_images(name, split="validate")


@pytest.mark.parametrize("options", [{"n": 0}, {"n": -1}, {"size": 0}])
def test_senseless_numbers_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        load_images("toybox", **options)


@pytest.mark.parametrize("wrong", [(5, 5), (9, 0), 4095, (0, float("nan")), (0, 1, 2), "ab"])
def test_a_range_of_values_has_to_rise(wrong):
    for open_it in (load_images, lambda name, **o: open_stream("x.tar", size=8, **o)):
        with pytest.raises(ValueError, match="value_range must be the values of black and white"):
            open_it("toybox", value_range=wrong)


def test_a_folder_larger_than_memory_stays_on_disk(tmp_path, monkeypatch):
    for i in range(10):
        save(tmp_path / "set" / "ab"[i % 2] / f"{i}.png", (i, 0, 0))
    loaded = quiet(tmp_path / "set")
    monkeypatch.setattr(module, "MEMORY_LIMIT", 100)
    lazy = quiet(tmp_path / "set")
    assert isinstance(lazy.images, LazyImages) and "on demand" in repr(lazy)
    assert lazy.images.shape == loaded.images.shape and lazy.images.dtype == loaded.images.dtype
    assert torch.equal(lazy.labels, loaded.labels)
    assert torch.equal(lazy.images[torch.tensor([4, 1])], loaded.images[[4, 1]])
    assert torch.equal(lazy.images[3], loaded.images[3])
    part = lazy[2:7]
    assert isinstance(part.images, LazyImages)  # selecting does not read
    assert torch.equal(part.batch([0, 3], size=4), loaded[2:7].batch([0, 3], size=4))
    part.images.paths[0].write_text("broken")
    with pytest.raises(OSError, match=part.images.paths[0].name):
        part.batch([0])
