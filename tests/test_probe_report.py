"""``refiner probe``: its numbers are the library's, its page stands alone, and it goes on."""

import importlib
import json
import shutil
from functools import partial

import pytest
import torch
from markupsafe import escape
from PIL import Image

import refiner
from refiner.cli import main
from refiner.evaluation.probe import PARTS, Settings, figures, probe, write_page
from refiner.images.load import train_and_test
from refiner.models.load import build_vit
from refiner.models.save import save_model

probe_module = importlib.import_module("refiner.evaluation.probe")
QUICK = Settings(k=(1, 5), shots=(1, 2), draws=2)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small random encoders."""
    folders = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        model = build_vit(size=16, patch=4, dim=24, depth=2, heads=2)
        folders.append(str(tmp_path_factory.mktemp(f"model{seed}")))
        save_model(model, folders[-1])
    return folders


@pytest.fixture(scope="module")
def report(models, tmp_path_factory):
    out = tmp_path_factory.mktemp("report")
    found = probe(models, "toybox", out, n=192, n_test=96, settings=QUICK, progress=False)
    return out, found


def test_the_numbers_are_the_librarys(models, report):
    out, found = report
    assert json.loads((out / "report.json").read_text()) == found
    train, test = (
        refiner.load_images("toybox", split=s, n=n, size=16)
        for s, n in (("train", 192), ("test", 96))
    )
    model = refiner.load_model(models[1])
    x, z = (refiner.extract(model, s, progress=False)["patch"] for s in (train, test))
    numbers = found["models"][models[1]]["patch"]
    assert {"reading", *numbers} == set(PARTS)
    knn = refiner.knn_accuracy(x, train.labels, z, test.labels, k=[1, 5])
    assert numbers["knn"]["k"] == [1, 5]
    assert torch.tensor(numbers["knn"]["accuracy"]) == pytest.approx(knn, abs=1e-4)
    linear = refiner.linear_probe(x, train.labels, z, test.labels)
    assert numbers["linear"]["accuracy"] == pytest.approx(linear.accuracy.tolist(), abs=1e-4)
    shots = refiner.low_shot(x, train.labels, z, test.labels, shots=(1, 2), draws=2)
    assert torch.tensor(numbers["low_shot"]["mean"]) == pytest.approx(shots.mean, abs=1e-4)
    assert numbers["measures"]["rankme"] == pytest.approx(refiner.rankme(z).tolist(), rel=1e-4)
    hue = refiner.factor_probe(x, {"hue": train.factors["hue"]}, z, {"hue": test.factors["hue"]})
    assert numbers["factors"]["hue"] == pytest.approx(hue["hue"].tolist(), abs=1e-4)
    assert len(numbers["factors"]["class"]) == 2


def test_attentive_probes_are_asked_for_and_bring_a_row(models, tmp_path, monkeypatch):
    assert "attentive" not in PARTS
    short = partial(refiner.attentive_probe, epochs=1, queries=2)
    monkeypatch.setattr("refiner.evaluation.probe.attentive_probe", short)
    monkeypatch.setattr("refiner.evaluation.probe.write_page", lambda out, report: None)
    command = ["probe", "--model", models[0], "--n", "48", "--n-test", "32", "--attentive"]
    assert main([*command, "--parts", "attentive", "--out", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    told = report["models"][models[0]]["attentive"]
    header, values = (tmp_path / "benchmark.csv").read_text().splitlines()
    assert header.startswith("family,method,arch") and len(told["accuracy"]) == 2
    assert told["row"]["ep_queries"] == 2 and f",{told['row']['ep']},2,ep," in values
    assert told["row"]["ep"] == pytest.approx(100 * told["accuracy"][-1], abs=0.006)
    assert [name for name, _, _ in figures(report)] == ["attentive"]


def test_the_page_stands_alone(report):
    out, found = report
    page = (out / "index.html").read_text()
    drawn = sorted((out / "figures").glob("*.png"))
    assert page.count("data:image/png;base64,") == len(drawn) >= 14
    assert "http" not in page.replace('href="report.json"', "").replace("https://", "http")
    last = found["models"][next(iter(found["models"]))]["cls"]["knn"]["accuracy"][0][-1]
    assert f"{last:.1%}" in page and "Left out" not in page
    assert "gpu None" not in page and page.index('class="answer"') < page.index("<details>")
    for told in (m["reading"]["sentence"] for m in found["models"].values()):
        assert told.startswith("Use block ") and str(escape(told)) in page


def test_names_of_users_are_text_on_the_page(report, tmp_path):
    evil = "<script>x</script>"
    content = json.loads((report[0] / "report.json").read_text())
    content["models"] = {evil: next(iter(content["models"].values()))}
    content |= {"data": evil, "left_out": [evil]}
    write_page(tmp_path, content)
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;x&lt;/script&gt;") >= 6
    assert page.count("<figure>") == len(list((tmp_path / "figures").iterdir()))


def test_a_resumed_run_does_only_what_is_missing(models, tmp_path, monkeypatch):
    monkeypatch.setattr("refiner.evaluation.probe.write_page", lambda out, report: None)
    options = {"n": 64, "n_test": 48, "progress": False}
    some = Settings(parts=("knn", "measures"), k=(1,))
    first = probe(models[0], out=tmp_path, settings=some, **options)
    path = tmp_path / "report.json"
    content = json.loads(path.read_text())
    found = content["models"][models[0]]
    found["done"].remove("measures")
    del found["cls"]["measures"], found["patch"]["measures"]
    found["cls"]["knn"]["accuracy"][0][0] = 0.123  # would be measured again if it were not kept
    path.write_text(json.dumps(content))
    again = probe(models[0], out=tmp_path, settings=some, resume=True, **options)
    kept = again["models"][models[0]]["cls"]
    assert kept["knn"]["accuracy"][0][0] == 0.123
    assert kept["measures"] == first["models"][models[0]]["cls"]["measures"]
    monkeypatch.setattr("refiner.evaluation.probe.extract", None)  # all is done: nothing to extract
    probe(models[0], out=tmp_path, settings=some, resume=True, **options)
    with pytest.raises(ValueError, match="settings differ"):
        probe(models[0], out=tmp_path, settings=QUICK, resume=True, **options)


def folder_of_images(root, classes: int, each: int):
    g = torch.Generator().manual_seed(0)
    for c in range(classes):
        (root / f"class{c}" if classes > 1 else root).mkdir(parents=True, exist_ok=True)
        for i in range(each):
            pixels = torch.randint(0, 256, (16, 16, 3), generator=g, dtype=torch.uint8).numpy()
            where = root / f"class{c}" / f"{i}.png" if classes > 1 else root / f"{i}.png"
            Image.fromarray(pixels).save(where)
    return root


def test_a_plain_folder_lends_a_fifth(tmp_path):
    root = folder_of_images(tmp_path / "data", 3, 10)
    train, test = train_and_test(root, None, None, 16)
    assert (len(train), len(test)) == (24, 6)
    assert sorted(test.labels.tolist()) == [0, 0, 1, 1, 2, 2]


def test_the_number_of_train_images_is_what_was_asked_for(tmp_path):
    """And the fifth that is lent does not depend on it."""
    root = folder_of_images(tmp_path / "data", 2, 20)
    everything, tests = train_and_test(root, None, None, 16)
    train, test = train_and_test(root, 20, 3, 16)
    assert (len(train), len(test)) == (20, 3)
    kept, held = ({x.numpy().tobytes() for x in part.images} for part in (everything, tests))
    assert len(kept | held) == 40
    assert {x.numpy().tobytes() for x in train.images} <= kept
    assert {x.numpy().tobytes() for x in test.images} <= held
    assert train.labels.bincount().tolist() == [10, 10]
    for limits, name in (((33, None), "train"), ((None, 9), "test")):
        with pytest.raises(ValueError, match=f"the {name} part of .* fewer than the"):
            train_and_test(root, *limits, 16)
    with pytest.raises(ValueError, match="at least 1"):
        train_and_test(root, 10, 0, 16)


@pytest.mark.parametrize("val", [True, False])
def test_an_unlabelled_test_part_hides_no_labels(val, tmp_path):
    """ImageNet's layout: the labels to test on are those of val, or of a part of train."""
    root = folder_of_images(tmp_path / "data" / "train", 2, 10).parent
    folder_of_images(root / "test", 1, 4)
    if val:
        folder_of_images(root / "val", 2, 3)
    train, test = train_and_test(root, None, None, 16)
    assert (len(train), len(test)) == ((20, 6) if val else (16, 4))
    assert test.labels.bincount().tolist() == [len(test) // 2] * 2
    shutil.rmtree(root / "train")
    folder_of_images(root / "train", 1, 4)
    assert train_and_test(root, None, None, 16)[1].labels is None  # nothing to lose


def test_a_class_missing_in_the_test_part_shifts_no_label(tmp_path):
    root = folder_of_images(tmp_path / "train", 3, 10).parent
    for name in ("class0", "class2"):
        shutil.copytree(root / "train" / name, root / "test" / name)
    train, test = train_and_test(root, None, None, 16)
    assert train.classes == test.classes == ("class0", "class1", "class2")
    x, z = (s.images.flatten(1).float() for s in (train, test))
    # Each test image is a train image too, so its nearest neighbor has its label.
    assert refiner.knn_accuracy(x, train.labels, z, test.labels, k=1) == 1


def test_sets_of_different_classes_are_not_compared(tmp_path, monkeypatch):
    def load(data, *, split, n, size, channels):
        classes = ("a", "b") if split == "train" else ("a", "c")
        pixels = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
        return refiner.ImageSet(pixels, torch.tensor([0, 1]), classes)

    monkeypatch.setattr("refiner.images.load.load_images", load)
    with pytest.raises(ValueError, match="differ in b, c"):
        train_and_test("digits", None, None, 4)


def test_without_labels_the_measures_remain(models, tmp_path):
    root = folder_of_images(tmp_path / "data", 1, 20)
    found = probe(models[0], root, tmp_path / "out", settings=QUICK, progress=False)
    assert any("no labels" in text for text in found["left_out"])
    reading = found["models"][models[0]]["reading"]
    assert "By participation ratio block" in reading["sentence"] and "agreement" not in reading
    pasted = {}
    exec(reading["code"], pasted)  # three lines that work
    assert pasted["x"].shape == (20, 24) and len(reading["code"].splitlines()) == 3
    assert list((tmp_path / "out" / "figures").glob("neighbors_*"))
    assert "left_out" not in found["models"][models[0]]["cls"]["measures"]
    assert "Left out" in (tmp_path / "out" / "index.html").read_text()


def test_test_labels_have_no_part_in_the_reading(models, tmp_path, monkeypatch):
    def shuffled(*args):
        train, test = train_and_test(*args)
        test.labels = test.labels.roll(1)
        return train, test

    options = {"n": 64, "n_test": 32, "settings": Settings(parts=("reading",)), "progress": False}
    found = [probe(models[0], out=tmp_path / "as they are", **options)]
    monkeypatch.setattr("refiner.evaluation.probe.train_and_test", shuffled)
    found.append(probe(models[0], out=tmp_path / "shuffled", **options))
    plain, moved = (report["models"][models[0]]["reading"] for report in found)
    assert plain["chosen"] == moved["chosen"] and plain["rows"] != moved["rows"]


@pytest.mark.parametrize(("k", "measured"), [((1, 20), [1]), ((20, 5, 10), [5, 10])])
def test_k_above_the_number_of_train_images_is_left_out(k, measured, models, tmp_path):
    root = folder_of_images(tmp_path / "data", 2, 9)  # 14 train images
    settings = Settings(parts=("knn",), k=k)
    found = probe(models[0], root, tmp_path / "out", settings=settings, progress=False)
    assert found["models"][models[0]]["cls"]["knn"]["k"] == measured
    assert {path.stem for path in (tmp_path / "out" / "figures").iterdir()} == {
        "knn_cls",
        "knn_patch",
    }
    assert f"k-NN (k = {measured[-1]}), last" in (tmp_path / "out" / "index.html").read_text()


def test_k_above_the_number_of_train_images_through_the_command(models, tmp_path, capsys):
    root = folder_of_images(tmp_path / "data", 2, 9)
    command = ["probe", "--model", models[0], "--data", str(root), "--parts", "knn"]
    assert main([*command, "--out", str(tmp_path / "out")]) == 0
    assert main([*command, "--k", "20", "30", "--out", str(tmp_path / "other")]) == 0
    assert "14 train images have fewer neighbors than k = 20" in capsys.readouterr().out


def test_shots_beyond_the_smallest_class_are_named(models, tmp_path):
    root = folder_of_images(tmp_path / "data", 2, 10)
    settings = Settings(parts=("low_shot",), shots=(50, 90))
    found = probe(models[0], root, tmp_path / "out", settings=settings, progress=False)
    assert "has 8 train images, too few for 50 labels a class" in found["left_out"][0]


def test_the_command(models, tmp_path, capsys):
    code = main(
        [
            "probe",
            "--model",
            models[0],
            "--n",
            "64",
            "--n-test",
            "32",
            "--parts",
            "knn",
            "--k",
            "3",
            "--out",
            str(tmp_path / "out"),
        ]
    )
    assert code == 0 and "index.html" in capsys.readouterr().out
    assert (tmp_path / "out" / "index.html").exists()
    content = json.loads((tmp_path / "out" / "report.json").read_text())
    assert content["models"][models[0]]["cls"]["knn"]["k"] == [3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--parts", "knnn"], "parts is 'knnn'; choose 'reading', 'knn'"),
        (["--k", "0"], "k is 0; it needs to be 1 or more"),
        (["--model", "no_such_model"], "no_such_model"),
        (["--data", "no_such_folder"], "no_such_folder"),
        (["--n", "0"], "n must be at least 1"),
        (["--device", "foo"], "there is no device 'foo' here; leave it out"),
        (["--device", "cuda:99"], "there is no device 'cuda:99' here"),
    ],
)
def test_bad_options_are_one_line(arguments, message, models, tmp_path, capsys):
    if "--model" not in arguments:
        arguments = ["--model", models[0], *arguments]
    assert main(["probe", *arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert message in error and error.startswith("refiner: ")


def test_minutes_choose_as_many_images_as_they_allow(models, tmp_path, monkeypatch, capsys):
    """A folder has fewer; half of the time is for reading images, three quarters of them train."""
    monkeypatch.setattr(probe_module, "in_minutes", lambda *_: (160, 48))
    assert (
        main(["probe", "--model", models[0], "--minutes", "2", "--out", str(tmp_path / "a")]) == 0
    )
    assert "Use block" in capsys.readouterr().out
    found = json.loads((tmp_path / "a" / "report.json").read_text())
    assert found["images"] == {"train": 160, "test": 48, "classes": 16}
    assert found["models"][models[0]]["done"] == ["reading"]
    for i in range(40):
        file = tmp_path / "few" / "ab"[i % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (6 * i, 90 * (i % 2), 0)).save(file)
    few = probe(models[0], tmp_path / "few", tmp_path / "b", minutes=1, progress=False)
    assert few["images"] == {"train": 32, "test": 8, "classes": 2}
    for wrong in (["--minutes", "0"], ["--minutes", "2", "--n", "64"], ["--minutes", "nan"]):
        assert main(["probe", "--model", models[0], *wrong, "--out", str(tmp_path / "c")]) == 2
        assert "minutes, above 0, choose the images" in capsys.readouterr().err


def test_images_a_minute_follow_the_models_pace(models, monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr(probe_module.time, "monotonic", lambda: next(clock))
    n, n_test = probe_module.in_minutes(refiner.load_model(models[0]), 2.0, "cpu")
    assert n + n_test == 60 * 16 / 2 and n == 3 * n_test
