"""Building, saving and loading encoders."""

import json
import os
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from refiner.base import places
from refiner.base.errors import UserError
from refiner.models import encoders, save
from refiner.models import load as models

SMALL = {"dim": 16, "depth": 2, "heads": 2}


def test_same_seed_same_weights_and_no_trace_on_the_global_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a, b = models.build_vit(**SMALL, seed=1), models.build_vit(**SMALL, seed=1)
    assert torch.equal(before, torch.get_rng_state())
    other = models.build_vit(**SMALL, seed=2)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(a(x), b(x)) and not torch.equal(a(x), other(x))


def test_save_and_load_gives_the_same_outputs_and_card(tmp_path):
    model = models.build_vit(**SMALL, seed=0)
    model.refiner_card["note"] = "mine"
    save.save_model(model, tmp_path / "m")
    again = models.load_model(tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    assert again.refiner_card == model.refiner_card and not again.training


def test_timm_opens_the_folder(tmp_path):
    model = models.build_vit(**SMALL, seed=0)
    save.save_model(model, tmp_path / "m")
    opened = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.forward_features(x), opened.forward_features(x), atol=1e-6)
    config = timm.data.resolve_data_config(model=opened)
    assert list(config["mean"]) == model.refiner_card["preprocessing"]["mean"]


def test_a_model_of_timm_survives_saving(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    pre = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    model.eval().refiner_card = {"name": "tiny", "preprocessing": pre}
    save.save_model(model, tmp_path / "m")
    again = models.load_model(tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model.forward_features(x), again.forward_features(x))
    assert again.refiner_card == model.refiner_card
    with pytest.raises(ValueError, match="random_like needs"):
        models.random_like(again)


def test_random_like_is_the_same_architecture_with_other_weights():
    model = models.build_vit(**SMALL, seed=0)
    twin = models.random_like(model, seed=1)
    shapes = [p.shape for p in model.parameters()]
    assert shapes == [p.shape for p in twin.parameters()]
    assert not torch.equal(model.patch_embed.proj.weight, twin.patch_embed.proj.weight)


def test_random_like_says_what_it_needs_of_a_plain_model():
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1, "num_heads": 2}
    with pytest.raises(ValueError, match="random_like needs a model of build_vit or load_model"):
        models.random_like(timm.create_model("vit_tiny_patch16_224", **options))


def test_the_model_card_tells_recipe_and_figures(tmp_path):
    model = models.build_vit(**SMALL, seed=0)
    model.refiner_card |= {
        "name": "mine",
        "method": "MIM-Refiner",
        "refine_recipe": {"lr": 0.5},
        "results": {"knn": [0.25, 0.75]},
    }
    save.save_model(model, tmp_path / "m")
    text = (tmp_path / "m" / "README.md").read_text()
    head, body = text.split("---\n")[1:]
    assert "library_name: timm" in head and body.lstrip().startswith("# mine\n")
    for told in ("Method: MIM-Refiner", '"lr": 0.5', "0.75", "local-dir:", "refiner.load_model"):
        assert told in body, told


def test_a_folder_that_timm_wrote_is_loaded_too(tmp_path):
    options = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
    model = timm.create_model("vit_tiny_patch16_224", num_classes=5, **options).eval()
    folder = tmp_path / "theirs"
    save.save_model(models.build_vit(**SMALL), folder)  # ours, made theirs by what is taken away
    (folder / "card.json").unlink()
    config = json.loads((folder / "config.json").read_text())
    config |= {"architecture": "vit_tiny_patch16_224", "model_args": options, "num_classes": 5}
    config["pretrained_cfg"] |= {"num_classes": 5, "mean": [0.1, 0.2, 0.3], "crop_pct": 0.7}
    (folder / "config.json").write_text(json.dumps(config))
    save_file(model.state_dict(), folder / "model.safetensors")
    found = models.load_model(folder)
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        assert torch.allclose(found.forward_features(x), model.forward_features(x), atol=1e-6)
    how = found.refiner_card["preprocessing"]
    assert how["mean"] == [0.1, 0.2, 0.3] and how["crop_pct"] == 0.7 and how["size"] == 32
    save.save_model(found, tmp_path / "again")
    again = models.load_model(tmp_path / "again")
    assert torch.equal(again.forward_features(x), found.forward_features(x))


@pytest.mark.skipif(os.name != "posix", reason="asks for permissions as on Linux and macOS")
def test_saved_files_can_be_read_by_whom_the_umask_allows(tmp_path):
    """Whatever the library that writes them would choose: a team shares its models."""
    old = os.umask(0o022)
    try:
        save.save_model(models.build_vit(**SMALL), tmp_path / "m")
    finally:
        os.umask(old)
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "m").iterdir()}
    assert set(modes.values()) == {0o644}, modes


def test_the_weights_of_a_saved_folder_are_loaded_as_the_folder(tmp_path):
    """The weights alone would be read as another repository's, with other heads and brightness."""
    model = models.build_vit(size=16, patch=4, dim=128, depth=2, heads=8, seed=0)
    folder = save.save_model(model, tmp_path / "m")
    x = torch.randn(2, 3, 16, 16)
    for _ in range(2):  # with the card, then with timm's config.json alone
        again = models.load_model(folder / "model.safetensors")
        assert torch.equal(model.forward_features(x), again.forward_features(x))
        how = again.refiner_card["preprocessing"]
        assert how["mean"] == model.refiner_card["preprocessing"]["mean"]
        with pytest.raises(ValueError, match="tells its number of heads itself"):
            models.load_model(folder / "model.safetensors", num_heads=2)
        if (folder / "card.json").exists():
            card, encoder, _ = models.read_checkpoint(folder / "model.safetensors")
            assert card == models.read_card(folder / "model.safetensors") == model.refiner_card
            assert set(encoder) == set(model.state_dict())
            (folder / "card.json").unlink()


def test_what_timm_could_not_build_again_is_not_saved(tmp_path):
    model = models.build_vit(**SMALL)
    del model.refiner_card["architecture"]
    model.blocks[1].mlp.fc1 = torch.nn.Linear(16, 7)
    with pytest.raises(ValueError, match="cannot describe this VisionTransformer"):
        save.save_model(model, tmp_path / "m")
    assert not (tmp_path / "m").exists()


def test_a_saved_model_has_another_size_on_request(tmp_path):
    model = models.build_vit(**SMALL, seed=0)
    save.save_model(model, tmp_path / "m")
    larger = models.load_model(tmp_path / "m", size=48)
    encoders.allow_any_size(model)
    x = torch.randn(2, 3, 48, 48)
    with torch.no_grad():
        assert torch.allclose(larger(x), model(x), atol=1e-6)
    assert larger.refiner_card["preprocessing"]["size"] == 48
    save.save_model(larger, tmp_path / "larger")
    assert torch.equal(models.load_model(tmp_path / "larger")(x), larger(x))
    assert models.random_like(larger)(x).shape == larger(x).shape


def test_any_size_leaves_the_own_size_alone():
    model = models.build_vit(**SMALL, seed=0)
    x, small = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.forward_features(x)
        encoders.allow_any_size(model)
        assert torch.allclose(model.forward_features(x), before, atol=1e-6)
        assert model.forward_features(small).shape == (2, 17, 16)


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="must divide"):
        models.build_vit(size=32, patch=5)
    with pytest.raises(ValueError, match="no model 'vit_base_patch16_224.may'.*vit_base_patch16"):
        models.load_model("vit_base_patch16_224.may")
    with pytest.raises(ValueError, match="no model 'mae_refind_l16'.* mae_refined_l16"):
        models.load_model("mae_refind_l16")
    with pytest.raises(ValueError, match="resnet50 is a ResNet; supported are VisionTransformer"):
        models.load_model("resnet50")
    with pytest.raises(ValueError, match="timm has no pretrained weights for vit_base_patch16_gap"):
        models.load_model("vit_base_patch16_gap_224")
    with pytest.raises(FileNotFoundError, match="there is no file or folder runs/w.pth"):
        models.load_model("runs/w.pth")
    with pytest.raises(ValueError, match="mae_toybox tells its number of heads itself"):
        models.load_model("mae_toybox", num_heads=2)
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a saved model.*card.json"):
        models.load_model(tmp_path / "empty")


@pytest.mark.parametrize("name", models.embedded_models())
def test_embedded_checkpoints_load_and_are_small(name):
    model = models.load_model(name)
    card = model.refiner_card
    assert {"command", "machine", "seconds", "results"} <= set(card)
    assert (places.data_folder() / f"{name}.safetensors").stat().st_size <= 12e6
    assert all(p.dtype == torch.float32 for p in model.parameters())


# ---------------------------------------------------------------- what strangers wrote


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A model saved by us, and the same as timm writes it."""
    ours = tmp_path_factory.mktemp("cards") / "ours"
    save.save_model(models.build_vit(**SMALL, seed=0), ours)
    theirs = Path(shutil.copytree(ours, ours.with_name("theirs")))
    (theirs / "card.json").unlink()
    return {"card.json": ours, "config.json": theirs}


def changed_file(folders, tmp_path, name, change):
    """A copy of the folder with that file, its content changed; the folder."""
    folder = Path(shutil.copytree(folders[name], tmp_path / "m"))
    content = (folder / name).read_bytes()
    new = change if isinstance(change, bytes) else change(json.loads(content))
    (folder / name).write_bytes(new if isinstance(new, bytes) else json.dumps(new).encode())
    return folder


def within(*path):
    """A change of one field."""
    *path, key, value = path

    def change(content):
        inner = content
        for step in path:
            inner = inner[step]
        inner[key] = value
        return content

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("card.json", b"", "empty, damaged or no JSON"),
        ("card.json", b'{"name": "half', "empty, damaged or no JSON"),
        ("card.json", b"\xff\xfe\x00", "empty, damaged or no JSON"),
        ("card.json", b"[" * 100_000, "empty, damaged or no JSON"),
        ("card.json", b"null", "its content is None; it needs to be a table"),
        ("card.json", b"{}", "name is missing"),
        (
            "card.json",
            within("preprocessing", [1]),
            r"preprocessing is \[1\]; it needs to be a tab",
        ),
        (
            "card.json",
            within("preprocessing", "mean", [0.5]),
            "mean and deviation of 1 and 3 channels, but its network is for 3",
        ),
        ("card.json", within("preprocessing", "size", "32"), "preprocessing.size is '32'"),
        ("card.json", within("architecture", "depth", 10**9), "depth is 1000000000"),
        ("card.json", within("architecture", "depth", 4), "do not fit .* missing blocks.2.norm1"),
        ("card.json", within("architecture", "dim", 60_000), "do not fit .* of wrong shape"),
        ("card.json", within("architecture", "stages", 3), "there is no setting 'stages'"),
        ("config.json", within("architecture", "hf-hub:a/b"), "one of timm's architectures"),
        ("config.json", within("architecture", "local-dir:/x"), "one of timm's architectures"),
        ("config.json", within("model_args", "checkpoint_path", "x.bin"), "no setting 'checkpoint"),
        ("config.json", within("model_args", "pretrained", True), "no setting 'pretrained'"),
        ("config.json", within("model_args", "depth", 10**9), "model_args.depth is 1000000000"),
        ("config.json", within("model_args", "num_heads", 5), "timm cannot build"),
        (
            "config.json",
            within("model_args", "img_size", [16, 64]),
            r"its network is for \(16, 64\)",
        ),
        ("config.json", within("model_args", "depth", 3), "does not fit .*: missing blocks.2"),
        ("config.json", within("pretrained_cfg", "mean", None), "pretrained_cfg.mean is None"),
    ],
)
def test_a_file_that_is_wrong_is_named_with_its_field(folders, tmp_path, name, change, said):
    folder = changed_file(folders, tmp_path, name, change)
    with pytest.raises(UserError, match=said) as caught:
        models.load_model(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["model.safetensors", "card.json"])
def test_the_first_thousand_bytes_are_no_model(folders, tmp_path, name):
    folder = Path(shutil.copytree(folders["card.json"], tmp_path / "m"))
    (folder / name).write_bytes((folder / name).read_bytes()[: 1000 if name[0] == "m" else 100])
    with pytest.raises(UserError, match=f"{name}.* (damaged|no JSON)"):
        models.load_model(folder)


def test_a_byte_order_mark_is_no_damage(folders, tmp_path):
    content = (folders["card.json"] / "card.json").read_bytes()
    folder = changed_file(folders, tmp_path, "card.json", b"\xef\xbb\xbf" + content)
    assert models.load_model(folder).refiner_card["name"] == "random"


class Runs:
    """A pickle that leaves a trace when it is read by a reader that runs it."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_a_folder_of_strangers_runs_nothing_and_asks_nobody(folders, tmp_path, monkeypatch):
    """Whatever its config says; and weights are read by our reader, which runs no pickle."""

    def asked(*args, **options):
        raise AssertionError("the network was asked")

    monkeypatch.setattr("socket.getaddrinfo", asked)
    where = {"hf_hub_id": "a/b", "url": "http://a/b", "file": "/b", "source": "hf-hub"}

    def misled(content):
        return content | {"pretrained_cfg": content["pretrained_cfg"] | where}

    folder = changed_file(folders, tmp_path, "config.json", misled)
    x = torch.randn(1, 3, 32, 32)
    ours = models.load_model(folders["card.json"])
    assert torch.equal(models.load_model(folder)(x), ours(x))
    (folder / "model.safetensors").unlink()
    torch.save(ours.state_dict(), folder / "pytorch_model.bin")
    assert torch.equal(models.load_model(folder)(x), ours(x))
    trace = tmp_path / "trace"
    torch.save({"state_dict": Runs(trace)}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="was refused: reading it would call"):
        models.load_model(folder)
    assert not trace.exists()
