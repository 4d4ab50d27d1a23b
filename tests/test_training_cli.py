"""``refiner pretrain`` and ``refiner refine`` as a user types them."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image

from refiner.base.settings import changed
from refiner.cli import main
from refiner.evaluation.protocols import EvaluationSettings
from refiner.images import load as images
from refiner.images import sets

TINY_MAE = ["steps=3", "batch=4", "dim=16", "depth=12", "heads=2", "decoder_dim=12"]
TINY_HEADS = ["steps=2", "head_steps=2", "batch=4", "hidden=8", "predictor_hidden=8", "out=4"]


def settings(values):
    return [part for value in values for part in ("--set", value)]


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for name in ("cats", "dogs"):
        (folder / name).mkdir()
        for i in range(4):
            pixels = rng.integers(256, size=(40, 50, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{i}.png")
    return folder


@pytest.fixture(scope="module")
def trained(photos, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "mae"
    assert main(["pretrain", "--data", str(photos), "--out", str(out), *settings(TINY_MAE)]) == 0
    return out


def test_from_photos_to_a_refined_model(photos, trained, tmp_path, capsys):
    out = tmp_path / "refined"
    command = ["refine", "--model", str(trained), "--data", str(photos), "--out", str(out)]
    assert main([*command, *settings(TINY_HEADS)]) == 0
    assert "refined in" in capsys.readouterr().out
    card = json.loads((out / "card.json").read_text())
    assert card["refined_from"] == "mae" and card["refine_recipe"]["steps"] == 2
    history = json.loads((out / "history.json").read_text())
    assert [entry["stage"] for entry in history] == [2, 3]
    assert history[-1]["neighbor_accuracy"] is not None, "class folders are watched"


def test_pretraining_goes_on_from_a_checkpoint(photos, trained, tmp_path, capsys):
    command = ["pretrain", "--start", str(trained), "--data", str(photos), "--out"]
    changes = settings(["steps=2", "batch=4", "decoder_depth=0"])
    assert main([*command, str(tmp_path / "more"), *changes]) == 0
    card = json.loads((tmp_path / "more" / "card.json").read_text())
    assert card["started_from"] == "mae" and card["recipe"]["dim"] == 16
    assert main([*command, str(tmp_path / "other"), *changes, "--set", "depth=3"]) == 2
    assert "not the recipe's encoder" in capsys.readouterr().err


def test_the_gpu_preset_takes_the_same_steps_on_a_cpu(photos, trained, tmp_path):
    command = [
        "refine",
        "--model",
        str(trained),
        "--data",
        str(photos),
        "--preset",
        "gpu",
        "--out",
        str(tmp_path / "r"),
    ]
    assert main([*command, *settings(TINY_HEADS)]) == 0


def test_the_plan_comes_first_and_may_be_all(photos, trained, tmp_path, capsys):
    command = [
        "refine",
        "--model",
        str(trained),
        "--data",
        str(photos),
        "--plan",
        "--out",
        str(tmp_path / "r"),
        *settings(TINY_HEADS),
    ]
    assert main(command) == 0
    out = capsys.readouterr().out
    assert "8 images of 32×32" in out and "memory   about" in out and "refined in" not in out
    assert not (tmp_path / "r").exists()


def test_knn_is_followed_on_a_held_out_part(photos, trained, tmp_path):
    pytest.importorskip("tensorboard")
    command = [
        "refine",
        "--model",
        str(trained),
        "--data",
        str(photos),
        "--knn-every",
        "1",
        "--tensorboard",
        "--out",
        str(tmp_path / "r"),
        *settings(TINY_HEADS),
    ]
    assert main(command) == 0
    history = json.loads((tmp_path / "r" / "history.json").read_text())
    assert 0 <= history[-1]["knn"] <= history[-1]["knn_best"] <= 1
    assert list((tmp_path / "r" / "tensorboard").glob("events*"))


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["pretrain", "--set", "size_of_patch=4"], "no setting 'size_of_patch'; there are size"),
        (["pretrain", "--set", "steps=many"], "steps is 'many'; it needs to be a whole number"),
        (["pretrain", "--set", "steps"], "--set needs NAME=VALUE"),
        (["pretrain", "--set", "steps=1.5"], "steps is 1.5; it needs to be a whole number"),
        (["refine", "--set", "steps=True"], "steps is True; it needs to be a whole number"),
        (["refine", "--set", "queue=inf"], "queue is 'inf'; it needs to be a whole number"),
        (["refine", "--set", "queue=1e999"], "queue is inf; it needs to be a whole number"),
        (["refine", "--set", "clip=much"], "clip is 'much'; it needs to be a number"),
        (["refine", "--set", "blocks=('a',)"], "blocks is 'a'; it needs to be a whole number"),
        (["refine", "--preset", "gpu", "--set", "blocks=13"], "different blocks from 1 to 12"),
        (["refine", "--set", "blocks=0"], "heads on blocks [0]: blocks count from 1"),
        (["refine", "--set", "seed=-1"], "seed is -1; it needs to be 0 or more"),
        (["pretrain", "--set", "seed=-1"], "seed is -1; it needs to be 0 or more"),
        (
            ["refine", "--preset", "fitted", "--set", "batch=0"],
            "batch is 0; it needs to be 2 or more",
        ),
        (["pretrain", "--data", "nowhere"], "nowhere"),
        (["refine", "--model", "mae_toybix"], "Did you mean mae_toybox"),
        (["refine", "--set", "blocks=(1,99)"], "choose different blocks from 1 to 12"),
        (["refine", "--preset", "L/16", "--n", "64"], "64 images are fewer than one batch of 1024"),
        (["refine", "--n", "8"], "8 images are fewer than one batch of 128"),
        (["refine", "--set", "blocks=(6,)"], "a head on block 6 trains nothing when 6 blocks are"),
        (["refine", "--device", "gpu"], "there is no device 'gpu' here"),
        (["pretrain", "--device", "cuda:99"], "there is no device 'cuda:99' here"),
        (["evaluate", "--device", "gpu"], "there is no device 'gpu' here"),
        (["refine", "--set", "hidden=0"], "hidden is 0; it needs to be 1 or more"),
        (["refine", "--preset", "L/16", "--set", "batch=8"], "different blocks from 1 to 12"),
        (["pretrain", "--resume", "--n", "64"], "nothing to resume"),
        (["pretrain", "--set", "size=-32"], "size is -32; it needs to be between 1 and"),
        (["pretrain", "--set", "decoder_dim=0"], "decoder_dim is 0; it needs to be between 1 and"),
        (["pretrain", "--set", "ema=5"], "ema is 5; it needs to be between 0 and 1"),
        (["pretrain", "--set", "warmup=-3"], "warmup is -3; it needs to be between 0 and 1"),
        (["refine", "--set", "seed=1e100"], "needs to be a whole number below"),
        (["refine", "--set", "queue=1e12"], "needs to be a whole number below"),
        (["refine", "--set", "views=()"], "views is (); it needs to be 2 or more values"),
        (["refine", "--knn-every", "-1"], "--knn-every is -1; it needs to be 0 or more"),
        (["refine", "--save-every", "0"], "--save-every is 0; it needs to be 1 or more"),
        (["refine", "--data", ""], "the name of the images is empty"),
        (["pretrain", "--data", ""], "the name of the images is empty"),
        (["probe", "--data", ""], "the name of the images is empty"),
        (["evaluate", "--data", ""], "the name of the images is empty"),
        (["probe", "--draws", "0"], "draws is 0; it needs to be 1 or more"),
        (["probe", "--device", "gpu"], "there is no device 'gpu' here"),
        (["evaluate", "--transfer", "digits", "toyboks"], "did you mean 'toybox'"),
        (["evaluate", "--dense", "nowhere"], "nowhere has no sub-folder 'images'"),
        (["evaluate", "--set", "draws=0"], "draws is 0; it needs to be 1 or more"),
    ],
)
def test_bad_input_is_one_sentence(arguments, message, tmp_path, capsys):
    assert main([*arguments, "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert error.strip().splitlines()[-1].startswith("refiner: ")
    assert not (tmp_path / "out").exists()


def test_whole_numbers_and_single_blocks_in_any_writing(photos, trained, tmp_path):
    command = ["refine", "--model", str(trained), "--data", str(photos), "--preset", "gpu"]
    changes = settings([*TINY_HEADS, "blocks=12", "steps=2e0", "batch=4.0", "queue=1e2"])
    assert main([*command, *changes, "--out", str(tmp_path)]) == 0
    recipe = json.loads((tmp_path / "card.json").read_text())["refine_recipe"]
    assert recipe["blocks"] == [12]
    given = [recipe[name] for name in ("steps", "batch", "queue")]
    assert given == [2, 4, 100] and all(type(x) is int for x in given)


def test_settings_of_an_evaluation_are_read_in_the_same_way():
    settings = changed(EvaluationSettings(), ["shots=2", "fractions=0.5", "n=1e3", "dense=None"])
    assert (settings.shots, settings.fractions, settings.dense) == ((2,), (0.5,), None)
    assert settings.n == 1000 and type(settings.n) is int
    with pytest.raises(ValueError, match="full is 1; it needs to be a FinetuneRecipe"):
        changed(EvaluationSettings(), ["full=1"])


def save_images(folder, n, side, *, same=False):
    folder.mkdir()
    rng = np.random.default_rng(0)
    first = rng.integers(256, size=(side, side, 3), dtype=np.uint8)
    for i in range(n):
        pixels = first if same else rng.integers(256, size=(side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")


def test_images_that_are_too_small_or_all_alike(trained, tmp_path, capsys):
    """A view has 16 pixels, the model 32; what lies between is enlarged, and said."""
    save_images(tmp_path / "tiny", 8, 12)
    save_images(tmp_path / "small", 8, 20)
    save_images(tmp_path / "same", 8, 40, same=True)
    expected = {
        "tiny": "have 12 pixels a side, fewer than a view of 16",
        "small": "have 20 pixels a side and are enlarged to 32",
        "same": "the images look all alike",
    }
    for name, message in expected.items():
        command = ["refine", "--model", str(trained), "--data", str(tmp_path / name), "--plan"]
        done = main([*command, "--out", str(tmp_path / "r"), *settings(TINY_HEADS)])
        assert done == (0 if name == "small" else 2)
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error


def test_a_folder_too_large_for_memory_is_refined(photos, trained, tmp_path, monkeypatch):
    """Its files are read for each batch; the result is that of the same folder in memory."""
    results = []
    for limit in (images.MEMORY_LIMIT, 1000):
        monkeypatch.setattr(images, "MEMORY_LIMIT", limit)
        out = tmp_path / str(limit)
        command = ["refine", "--model", str(trained), "--data", str(photos), "--out", str(out)]
        assert main([*command, "--knn-every", "1", *settings(TINY_HEADS)]) == 0
        history = json.loads((out / "history.json").read_text())
        results.append([(entry["loss"], entry.get("knn")) for entry in history])
    assert isinstance(images.load_images(photos, size=32).images, sets.LazyImages)
    assert results[0] == results[1]


def test_a_file_in_the_way_of_the_output(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert main(["pretrain", "--n", "64", "--out", str(tmp_path / "file" / "out")]) == 2
    assert str(tmp_path / "file") in capsys.readouterr().err


def test_models_are_listed(capsys):
    assert main(["models"]) == 0
    assert "mae_toybox: masked autoencoder" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["m", "m/", "./m", "m/model.safetensors", "link"])
@pytest.mark.parametrize("command", [["refine", "--model"], ["pretrain", "--start"]])
def test_a_model_is_not_overwritten_by_what_is_made_of_it(
    trained, tmp_path, monkeypatch, capsys, command, model
):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "m")
    (tmp_path / "link").symlink_to("m")
    before = {p.name: p.stat().st_mtime_ns for p in (tmp_path / "m").iterdir()}
    assert main([*command, model, "--out", "m", "--data", "digits"]) == 2
    assert "--out is" in capsys.readouterr().err
    assert before == {p.name: p.stat().st_mtime_ns for p in (tmp_path / "m").iterdir()}
