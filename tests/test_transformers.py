"""transformers' folders against the models that transformers builds from them."""

import json

import pytest
import timm
import torch
from tiny import tiny

from refiner.images.views import View
from refiner.models.encoders import final_features, final_pooling, last_tokens, walk
from refiner.models.load import load_model, random_like
from refiner.models.mae import load_mae
from refiner.models.save import save_model
from refiner.models.transformers_names import preprocessing
from refiner.training.refining import refine

transformers = pytest.importorskip("transformers")
SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 96,
    "image_size": 32,
    "patch_size": 8,
}
DECODER = {
    "decoder_hidden_size": 32,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128,
}
# A class, and what differs from SIZES.
KINDS = {
    "ViTMAEForPreTraining": DECODER,
    "ViTMAEModel": {"mask_ratio": 0.5},
    "ViTModel": {"qkv_bias": False},
    "ViTForImageClassification": {"num_labels": 4},
    "Dinov2Model": {"patch_size": 4},
    "Dinov2WithRegistersModel": {"num_register_tokens": 3},
    "Dinov2Model, gated": {"use_swiglu_ffn": True, "patch_size": 16},
    "IJepaModel": {"layer_norm_eps": 1e-5},
    "BeitModel": {"use_relative_position_bias": True},
    "BeitForMaskedImageModeling": {
        "use_shared_relative_position_bias": True,
        "use_absolute_position_embeddings": True,
        "use_mean_pooling": False,
        "vocab_size": 8,
    },
    "BeitForImageClassification": {"use_absolute_position_embeddings": True, "num_labels": 3},
    "Data2VecVisionModel": {"use_relative_position_bias": True},
    "DINOv3ViTModel": {"num_register_tokens": 2},
    "DINOv3ViTModel, gated": {"use_gated_mlp": True, "hidden_act": "silu", "query_bias": False},
}


SHORT = tiny(views=(View(size=16), View(size=16)), steps=1, head_steps=1)
LARGER = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "image_size": 48}


def built(kind, larger=False):
    """A model of transformers with weights that no norm, bias or scale hides behind."""
    sizes = SIZES | KINDS[kind] | (LARGER | {"patch_size": 12} if larger else {})
    kind = getattr(transformers, kind.split(",")[0])
    settings = kind.config_class(**sizes)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = kind(settings).eval()
        for parameter in model.parameters():
            parameter.data = torch.randn_like(parameter) * 0.3
    return model


def hidden_states(model, images):
    """transformers' tokens after the embedding and after each block, every patch visible."""
    options = {"output_hidden_states": True}
    if "MAE" in type(model).__name__:
        model.config.mask_ratio = 0.0
        n = (images.shape[-1] // model.config.patch_size) ** 2
        options["noise"] = torch.arange(n).expand(len(images), n).float()
    with torch.no_grad():
        return model(images, **options).hidden_states


def agree(model, theirs):
    """Whether all tokens are those of transformers, block by block."""
    size = theirs.config.image_size
    x = torch.randn(2, 3, size, size)
    with torch.no_grad():
        found = [x_BTD for _, x_BTD in walk(model, x)]
    expected = hidden_states(theirs, x)
    assert len(found) == len(expected) == 1 + theirs.config.num_hidden_layers
    for ours, others in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, others, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("larger", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_every_block_is_that_of_transformers_and_stays_so(kind, larger, tmp_path):
    theirs = built(kind, larger)
    theirs.save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs")
    agree(model, theirs)
    save_model(model, tmp_path / "ours")
    agree(load_model(tmp_path / "ours"), theirs)
    assert model.refiner_card["preprocessing"]["size"] == theirs.config.image_size


@pytest.mark.parametrize("kind", [kind for kind in KINDS if "For" not in kind])
def test_it_is_refined_resized_and_drawn_anew(kind, tmp_path):
    built(kind).save_pretrained(tmp_path / "theirs")
    model = load_model(tmp_path / "theirs", size=16)
    images = torch.randint(0, 256, (12, 3, 16, 16), dtype=torch.uint8)
    refined = refine(model, images, recipe=SHORT).model
    save_model(refined, tmp_path / "refined")
    opened = load_model(tmp_path / "refined")
    x = torch.randn(2, 3, 16, 16)
    timms = timm.create_model(f"local-dir:{tmp_path / 'refined'}", pretrained=True).eval()
    with torch.no_grad():
        expected = refined.forward_features(x)
        torch.testing.assert_close(opened.forward_features(x), expected)
        # timm has its own epsilon.
        torch.testing.assert_close(timms.forward_features(x), expected, atol=1e-4, rtol=1e-4)
    assert opened.blocks[0].norm1.eps == random_like(opened).blocks[0].norm1.eps
    assert opened.blocks[0].norm1.eps == built(kind).config.layer_norm_eps


def test_the_last_norm_of_a_beit_is_that_of_its_pooler(tmp_path):
    theirs = built("BeitModel")
    theirs.save_pretrained(tmp_path)
    model, x = load_model(tmp_path), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = final_features(model, last_tokens(model, x), final_pooling(model))
        torch.testing.assert_close(found, theirs(x).pooler_output, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("kind", "left_out"),
    [
        ("Dinov2Model", ["mask_token"]),
        ("BeitForImageClassification", ["classifier"]),
        ("BeitForMaskedImageModeling", ["lm_head"]),
        ("ViTModel", ["pooler"]),
        ("ViTMAEForPreTraining", []),
    ],
)
def test_heads_are_left_out_by_name(kind, left_out, tmp_path):
    built(kind).save_pretrained(tmp_path)
    assert load_model(tmp_path).refiner_card["left_out"] == left_out


def test_a_norm_that_a_folder_lacks_is_told(tmp_path):
    built("Data2VecVisionModel").save_pretrained(tmp_path)
    card = load_model(tmp_path).refiner_card
    assert card["assumed"].startswith("a last norm without scale") and card["left_out"] == []


def in_shards(theirs, folder):
    theirs.save_pretrained(folder, max_shard_size="20KB")
    assert len(list(folder.glob("*.safetensors"))) > 2


def as_pickle(theirs, folder):
    theirs.config.save_pretrained(folder)
    torch.save(theirs.state_dict(), folder / "pytorch_model.bin")  # names of version 5


def as_pickled_shards(theirs, folder):
    theirs.config.save_pretrained(folder)
    keys = list(state := theirs.state_dict())
    files = {key: f"pytorch_model-{i % 2 + 1:05}-of-00002.bin" for i, key in enumerate(keys)}
    for file in set(files.values()):
        torch.save({k: v for k, v in state.items() if files[k] == file}, folder / file)
    index = {"metadata": {}, "weight_map": files}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize("saved", [in_shards, as_pickle, as_pickled_shards])
def test_weights_in_one_file_or_several(saved, tmp_path):
    theirs = built("ViTModel")
    saved(theirs, tmp_path)
    for path in (tmp_path, tmp_path / "pytorch_model.bin"):
        if path.exists():
            agree(load_model(path), theirs)


def test_a_shard_is_a_file_beside_its_index(tmp_path):
    as_pickled_shards(built("ViTModel"), tmp_path)
    index = tmp_path / "pytorch_model.bin.index.json"
    for name, message in (("../x.bin", "is no file beside it"), ("x.bin", "x.bin is missing")):
        index.write_text(json.dumps({"weight_map": {"a": name}}))
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            load_model(tmp_path)


def test_the_decoder_of_a_vitmae_paints_what_it_paints_there(tmp_path):
    theirs = built("ViTMAEForPreTraining")
    theirs.save_pretrained(tmp_path)
    mae = load_mae(tmp_path, decoder_heads=2)
    x, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    with torch.no_grad():
        expected = theirs(x, noise=noise)
        _, found = mae(x, noise.argsort(1)[:, :4], expected.mask.bool())
    torch.testing.assert_close(found, expected.logits, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A ViT with a classifier and the preprocessing of a folder from the hub."""
    folder = tmp_path_factory.mktemp("vit")
    built("ViTForImageClassification").save_pretrained(folder)
    processor = {
        "image_mean": [0.1, 0.2, 0.3],
        "image_std": [0.4, 0.5, 0.6],
        "resample": 2,
        "size": {"shortest_edge": 40},
        "crop_size": {"height": 32, "width": 32},
        "do_center_crop": True,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


def test_the_card_says_what_the_files_say(folder):
    card = load_model(folder / "model.safetensors").refiner_card
    assert card["preprocessing"] == {
        "size": 32,
        "mean": [0.1, 0.2, 0.3],
        "std": [0.4, 0.5, 0.6],
        "interpolation": "bilinear",
        "crop_pct": 0.8,
    }
    assert card["left_out"] == ["classifier"] and card["format"] == "transformers' vit"
    assert card["architecture"]["heads"] == 3 and card["architecture"]["eps"] == 1e-12


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ({}, {"crop_pct": 1.0}),
        ({"size": 32, "crop_size": None, "resample": 3}, {"interpolation": "bicubic"}),
        ({"size": {"height": 32, "width": 32}, "image_mean": None}, {"crop_pct": 1.0}),
        ({"size": 40, "crop_size": 20, "do_center_crop": True}, {"crop_pct": 0.5}),
        ({"size": "x", "crop_size": [], "do_center_crop": None}, {"crop_pct": 1.0}),
    ],
)
def test_preprocessing_in_the_words_of_several_years(told, expected, tmp_path):
    (tmp_path / "p.json").write_text(json.dumps(told))
    found = preprocessing(tmp_path / "p.json")
    assert found == found | expected and "mean" not in found


def test_a_repository_is_told_by_its_config_before_weights_are_fetched(folder, monkeypatch):
    asked = []

    def from_hub(repository, file):
        asked.append(file)
        if not (folder / file).is_file():
            raise FileNotFoundError(file)
        return folder / file

    monkeypatch.setattr("refiner.models.load.from_hub", from_hub)
    assert load_model("hf-hub:owner/name").refiner_card["name"] == "hf-hub:owner/name"
    files = ["config.json", "model.safetensors", "preprocessor_config.json"]
    assert list(dict.fromkeys(asked)) == files
    asked.clear()
    monkeypatch.setattr("refiner.models.transformers_names.SUPPORTED", ())
    with pytest.raises(ValueError, match="of transformers' model_type 'vit'; supported are"):
        load_model("hf-hub:owner/name")
    assert set(asked) == {"config.json"}
    with pytest.raises(ValueError, match="tells its number of heads itself"):
        load_model("hf-hub:owner/name", num_heads=2)


@pytest.mark.parametrize("kind", ["ViTModel", "BeitModel"])
def test_a_key_makes_no_endless_model(kind, tmp_path):
    theirs = built(kind)
    theirs.config.save_pretrained(tmp_path)
    state = theirs.state_dict() | {"layers.99999999.norm1.bias": torch.zeros(3)}
    torch.save(state, tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="depth is 100000000"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("model_type", "swin", "'swin'; supported are vit_mae.*nearest of them is 'hiera_base"),
        ("model_type", ["vit"], r"\['vit'\]; supported are"),
        ("num_attention_heads", "3", "num_attention_heads is '3'; it needs to be a whole number"),
        ("num_attention_heads", 5, "num_heads=5 does not divide the width 24"),
        ("layer_norm_eps", 7, "layer_norm_eps is 7; it needs to be above 0"),
        ("hidden_act", "relu", "hidden_act is 'relu'; choose 'gelu'"),
        ("hidden_act", "silu", "hidden_act is 'silu'; timm's network has 'gelu'"),
        ("num_channels", 0, "num_channels is 0; it needs to be between 1 and 1,024"),
        ("image_size", [32, 64], "images of 32 × 64 pixels, but has as many"),
    ],
)
def test_a_config_that_cannot_be(key, value, message, folder, tmp_path):
    config = json.loads((folder / "config.json").read_text()) | {key: value}
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").symlink_to(folder / "model.safetensors")
    with pytest.raises(ValueError, match=message) as caught:
        load_model(tmp_path)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
