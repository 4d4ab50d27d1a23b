"""Building, saving and loading encoders."""

import pytest
import timm
import torch

from refiner import models

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
    models.save_model(model, tmp_path / "m")
    again = models.load_model(tmp_path / "m")
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(model(x), again(x))
    assert again.refiner_card == model.refiner_card and not again.training


def test_timm_opens_the_folder(tmp_path):
    model = models.build_vit(**SMALL, seed=0)
    models.save_model(model, tmp_path / "m")
    opened = timm.create_model(f"local-dir:{tmp_path / 'm'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    assert torch.allclose(model.forward_features(x), opened.forward_features(x), atol=1e-6)
    config = timm.data.resolve_data_config(model=opened)
    assert list(config["mean"]) == model.refiner_card["preprocessing"]["mean"]


def test_a_model_of_timm_survives_saving(tmp_path):
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0)
    pre = {"size": 32, "mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic"}
    model.eval().refiner_card = {"name": "tiny", "preprocessing": pre}
    models.save_model(model, tmp_path / "m")
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


def test_any_size_leaves_the_own_size_alone():
    model = models.build_vit(**SMALL, seed=0)
    x, small = torch.randn(2, 3, 32, 32), torch.randn(2, 3, 16, 16)
    with torch.no_grad():
        before = model.forward_features(x)
        models.allow_any_size(model)
        assert torch.allclose(model.forward_features(x), before, atol=1e-6)
        assert model.forward_features(small).shape == (2, 17, 16)


def test_clear_errors(tmp_path):
    with pytest.raises(ValueError, match="must divide"):
        models.build_vit(size=32, patch=5)
    with pytest.raises(ValueError, match="no model 'vit_base_patch16_224.may'.*vit_base_patch16"):
        models.load_model("vit_base_patch16_224.may")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="not a saved model.*card.json"):
        models.load_model(tmp_path / "empty")


@pytest.mark.parametrize("name", models.embedded_models())
def test_embedded_checkpoints_load_and_are_small(name):
    model = models.load_model(name)
    card = model.refiner_card
    assert {"command", "machine", "seconds", "results"} <= set(card)
    assert (models.data_folder() / f"{name}.safetensors").stat().st_size <= 12e6
    assert all(p.dtype == torch.float32 for p in model.parameters())
