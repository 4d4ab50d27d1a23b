"""torchvision's image sets by name: its own classes, on small files in their layout."""

import json
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
from PIL import Image

from refiner.images.load import BUILT_IN, load_images
from refiner.images.named_sets import SOURCES, list_files

SHADE = 40  # the pixels of class c have the value 40 c


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("REFINER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("torchvision.datasets.flowers102.check_integrity", lambda *a: True)
    return tmp_path / "cache"


def picture(path: Path, label: int, size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (SHADE * label,) * 3).save(path)


def flowers102(root):
    from scipy.io import savemat

    base = root / "flowers-102"
    labels = [1 + i % 3 for i in range(12)]
    for i, label in enumerate(labels, 1):
        picture(base / "jpg" / f"image_{i:05d}.jpg", label - 1)
    savemat(base / "imagelabels.mat", {"labels": labels})
    parts = {"trnid": [1, 2, 3, 4, 5, 6], "valid": [7, 8, 9], "tstid": [10, 11, 12]}
    savemat(base / "setid.mat", parts)


def oxfordiiitpet(root):
    base = root / "oxford-iiit-pet"
    for split, numbers in (("trainval", range(4)), ("test", range(4, 6))):
        lines = []
        for c, breed in enumerate(("Abyssinian", "yorkshire_terrier")):
            for i in numbers:
                picture(base / "images" / f"{breed}_{i}.jpg", c)
                lines.append(f"{breed}_{i} {c + 1} 1 {i}")
        (base / "annotations").mkdir(exist_ok=True)
        (base / "annotations" / f"{split}.txt").write_text("\n".join(lines))


def dtd(root):
    base = root / "dtd" / "dtd"
    for split, numbers in (("train", (1, 2)), ("val", (3,)), ("test", (4,))):
        lines = []
        for c, name in enumerate(("banded", "woven")):
            for i in numbers:
                picture(base / "images" / name / f"{name}_{i}.jpg", c)
                lines.append(f"{name}/{name}_{i}.jpg")
        (base / "labels").mkdir(parents=True, exist_ok=True)
        (base / "labels" / f"{split}1.txt").write_text("\n".join(lines))


def caltech101(root):
    base = root / "caltech101" / "101_ObjectCategories"
    for c, name in enumerate(("BACKGROUND_Google", "accordion", "wrench")):
        for i in range(1, 34):
            picture(base / name / f"image_{i:04d}.jpg", max(0, c - 1), size=(8, 8))


def sun397(root):
    base = root / "SUN397"
    for c, name in enumerate(("abbey", "zoo/outdoor")):
        for i in range(53):
            picture(base / name[0] / name / f"sun_{i:04d}.jpg", c, size=(8, 8))
    (base / "ClassName.txt").write_text("/a/abbey\n/z/zoo/outdoor\n")


def food101(root):
    base = root / "food-101"
    for split, numbers in (("train", (1, 2, 3)), ("test", (4,))):
        meta = {}
        for c, name in enumerate(("apple_pie", "waffles")):
            for i in numbers:
                picture(base / "images" / name / f"{i}.jpg", c)
            meta[name] = [f"{name}/{i}" for i in numbers]
        (base / "meta").mkdir(parents=True, exist_ok=True)
        (base / "meta" / f"{split}.json").write_text(json.dumps(meta))


def imagenette(root):
    for split, count in (("train", 3), ("val", 2)):
        for c, name in enumerate(("n01440764", "n02102040")):
            for i in range(count):
                picture(root / "imagenette2" / split / name / f"{i}.JPEG", c)


LAYOUTS = {
    f.__name__: f for f in (flowers102, oxfordiiitpet, dtd, caltech101, sun397, food101, imagenette)
}
COUNTS = {
    "flowers102": (6, 3),
    "oxfordiiitpet": (8, 4),
    "dtd": (4, 2),
    "caltech101": (60, 6),
    "sun397": (100, 6),
    "food101": (6, 2),
    "imagenette": (6, 4),
}


@pytest.mark.parametrize("name", SOURCES)
def test_files_labels_and_classes_belong_together(name, cache):
    assert name in BUILT_IN
    LAYOUTS[name](cache / name)
    train, test = (load_images(name, split=s, size=8, progress=False) for s in ("train", "test"))
    assert (len(train), len(test)) == COUNTS[name]
    for images in (train, test):
        assert images.images.shape[1:] == (3, 8, 8) and images.name.startswith(name)
        shade = images.images[:, 0, 4, 4].float() / SHADE
        assert torch.equal(shade.round().long(), images.labels)
    assert len(train.classes) >= len(train.labels.unique()) and all(train.classes)
    some = load_images(name, n=2, size=8, progress=False)
    assert torch.equal(some.images, train.images[:2])  # a prefix


@pytest.mark.parametrize("name", ["caltech101", "sun397"])
def test_without_splits_the_same_images_are_always_held_out(name, cache):
    LAYOUTS[name](cache / name)
    sides = [list_files(name, s, cache)[:2] for s in ("train", "test", "train")]
    assert sides[0] == sides[2]
    assert not set(sides[0][0]) & set(sides[1][0])
    assert torch.tensor(sides[0][1]).bincount().tolist() == [SOURCES[name].train] * 2


def test_a_validation_split_where_there_is_one(cache):
    dtd(cache / "dtd")
    assert len(load_images("dtd", split="val", progress=False)) == 2
    with pytest.raises(ValueError, match="food101 has no split 'val': choose one of train, test"):
        load_images("food101", split="val")


def test_the_size_is_that_of_photographs_unless_told(cache):
    dtd(cache / "dtd")
    assert load_images("dtd", progress=False).images.shape[-1] == 224


MODULES = {
    "flowers102": "flowers102",
    "oxfordiiitpet": "oxford_iiit_pet",
    "dtd": "dtd",
    "caltech101": "caltech",
    "sun397": "sun397",
    "food101": "food101",
    "imagenette": "imagenette",
}


@pytest.mark.parametrize("name", SOURCES)
def test_without_network_one_sentence(name, cache, monkeypatch):
    def offline(*args, **kwargs):
        raise URLError("no route\nto host")

    monkeypatch.setattr(
        f"torchvision.datasets.{MODULES[name]}.download_and_extract_archive", offline
    )
    with pytest.raises(ConnectionError, match=f"^{name} could not be downloaded") as error:
        load_images(name)
    assert str(cache / name) in str(error.value) and "\n" not in str(error.value)
    assert not (cache / name).exists()


def test_an_interrupted_unpacking_is_not_taken_for_the_set(cache, monkeypatch):
    calls = []

    def fetch(url, download_root, md5):
        archive = Path(download_root) / "dtd-r1.0.1.tar.gz"
        archive.parent.mkdir(parents=True, exist_ok=True)
        calls.append(archive.exists())
        archive.write_text("whole")
        if len(calls) == 1:
            picture(Path(download_root) / "dtd" / "images" / "banded" / "banded_1.jpg", 0)
            raise KeyboardInterrupt
        dtd(cache / "dtd.partial")

    monkeypatch.setattr("torchvision.datasets.dtd.download_and_extract_archive", fetch)
    with pytest.raises(KeyboardInterrupt):
        load_images("dtd")
    assert not (cache / "dtd").exists()
    assert len(load_images("dtd", progress=False)) == 4
    assert calls == [False, True]  # the archive was kept
    assert len(load_images("dtd", progress=False)) == 4 and len(calls) == 2
    assert not (cache / "dtd.partial").exists()


def test_a_damaged_folder_is_named(cache):
    (cache / "food101").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match="does not hold food101") as error:
        load_images("food101")
    assert str(cache / "food101") in str(error.value)
