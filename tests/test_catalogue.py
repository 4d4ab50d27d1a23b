"""Every entry of the catalogue names a model that exists and is what it says."""

import json
import re

import pytest
import timm
import torch
from timm.models import get_pretrained_cfg

from refiner import cli
from refiner.models.catalogue import CATALOGUE, find, nearest, search, table
from refiner.models.download import cache_path
from refiner.models.encoders import Encoder, check_supported, has_class_token

TIMM = [entry for entry in CATALOGUE if not entry.address]
FILES = [entry for entry in CATALOGUE if entry.address]
REFINED = {
    "mae_refined_l16": (1024, 24, 16),
    "mae_refined_h14": (1280, 32, 16),
    "mae_refined_twob14": (2560, 24, 32),
    "d2v2_refined_l16": (1024, 24, 16),
    "d2v2_refined_h14": (1280, 32, 16),
    "dbot_refined_l16": (1024, 24, 16),
    "dbot_refined_h14": (1280, 32, 16),
    "crossmae_refined_l16": (1024, 24, 16),
}


def test_names_and_places_in_the_cache_are_each_used_once():
    names = [entry.name for entry in CATALOGUE]
    assert len(set(names)) == len(names) >= 60
    places = [cache_path(entry.address, entry.file) for entry in FILES]
    assert len(set(places)) == len(places)
    assert all(re.fullmatch(r"\d{4}\.\d{5}|10\.\d+/\S+", entry.paper) for entry in CATALOGUE)
    assert all(set(entry.pooling.split()) <= {"cls", "patch"} for entry in CATALOGUE)
    assert all(entry.address.startswith("https://") for entry in FILES)


def test_the_released_encoders_and_their_originals_are_there():
    for name, shape in REFINED.items():
        assert find(name).shape == shape
        assert find(name).post_norm == name.startswith("d2v2")
    for method, names in {
        "MAE": "mae_b16 mae_l16 mae_h14 mae_2b14",
        "data2vec 2.0": "data2vec2_b16 data2vec2_l16 data2vec2_h14",
        "dBOT": "dbot_l16 dbot_h14",
        "CrossMAE": "crossmae_l16",
        "Web-MAE": "webmae_l16 webmae_h14 webmae_1b14 webmae_2b14 webmae_3b14",
        "Scale-MAE": "scalemae_l16",
        "RETFound": "retfound_cfp_l16 retfound_oct_l16",
        "MAE SSL4EO-S12": "ssl4eo_s2_b16 ssl4eo_s1_s16",
        "Bird-MAE": "bird_mae_b16",
        "I-JEPA": "ijepa_h14 ijepa_h16_448",
    }.items():
        assert {find(name).method for name in names.split()} == {method}


def test_every_name_of_timm_has_pretrained_weights_there():
    assert {entry.name for entry in TIMM} <= set(timm.list_pretrained())
    for pattern in (
        "vit_*.mae",
        "*ijepa",
        "eva02_*.mim_in22k",
        "eva02_*.mim_m38m",
        "hiera_*.mae",
        "beit_*",
        "beitv2_*",
    ):
        missing = set(timm.list_pretrained(pattern)) - {entry.name for entry in TIMM}
        assert not missing, f"timm also has {missing}"


@pytest.mark.parametrize("entry", TIMM, ids=lambda entry: entry.name)
def test_a_model_of_timm_is_what_its_entry_says(entry, shapes):
    config, model = get_pretrained_cfg(entry.name), shapes(entry.name.split(".")[0])
    check_supported(model, entry.name)
    assert isinstance(model, Encoder) and type(model).__name__ == entry.kind
    millions = sum(p.numel() for p in model.parameters()) / 1e6
    assert millions == pytest.approx(entry.parameters, abs=0.06)
    width, depth, heads = entry.shape
    assert model.num_features == width and len(model.blocks) == depth
    assert config.input_size[1] == entry.size
    if entry.kind == "Hiera":
        assert model.patch_stride[0] == entry.patch and not heads
    else:
        assert model.blocks[0].attn.num_heads == heads
        assert model.patch_embed.patch_size[0] == entry.patch
    assert has_class_token(model) or "cls" not in entry.pooling
    licences = {"cc-by-nc-4.0": "CC-BY-NC 4.0", "apache-2.0": "Apache 2.0", "mit": "MIT"}
    licences |= {"dinov3-license": "DINOv3", "apple-ascl": "Apple ASCL"}
    licences |= {"fair-noncommercial-research-license": "FAIR noncommercial"}
    pooled = entry.training == "masked-image" or has_class_token(model) == ("cls" in entry.pooling)
    assert pooled
    assert licences[config.license] == entry.licence
    assert entry.labels == ("_ft_" in entry.name)


@pytest.fixture(scope="module")
def shapes():
    """Architectures on the meta device, each built once."""
    built = {}

    def build(name):
        if name not in built:
            with torch.device("meta"):
                built[name] = timm.create_model(name, num_classes=0)
        return built[name]

    return build


def test_searching_and_nearest_names():
    assert search() == list(CATALOGUE)
    assert {e.name for e in search("refined")} == set(REFINED)
    assert {e.kind for e in search("hiera mae")} == {"Hiera"}
    assert search("no such thing") == []
    assert nearest("mae_refined_l61", [])[0] == "mae_refined_l16"
    assert find("mae_refined_l61") is None


def test_each_says_how_it_was_trained():
    kinds = {"masked-image", "self-distilled", "with text"}
    assert {entry.training for entry in CATALOGUE} == kinds
    distilled = {e.method for e in search("self-distilled")}
    assert {"DINO", "DINOv2", "DINOv2 with registers", "DINOv3", "DINOv3, satellite"} == distilled
    text = {"PE core", "PE spatial", "PE lang", "AIMv2", "SigLIP 2", "MetaCLIP 2"}
    text |= {"TIPSv2", "EUPE"}  # EUPE's teachers were trained with text
    assert {e.method for e in search("with text")} == text


def test_the_table_has_a_line_for_each_in_columns():
    lines = table(search("dbot")).splitlines()
    assert len(lines) == 1 + len(search("dbot"))
    assert lines[0].startswith("name") and lines[0].endswith("from")
    at = lines[0].index("params")
    assert all(re.match(r"[\d,]+M ", line[at:]) for line in lines[1:])


def test_the_command_lists_searches_and_gives_json(capsys):
    assert cli.main(["models"]) == 0
    shown = capsys.readouterr().out
    assert "mae_toybox" in shown and all(entry.name in shown for entry in CATALOGUE)
    assert cli.main(["models", "data2vec", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [e["name"] for e in listed] == [e.name for e in search("data2vec")]
    assert listed[0]["gigabytes"] == pytest.approx(listed[0]["parameters"] * 4 / 1000, abs=0.01)
    assert cli.main(["models", "resnet"]) == 2
    assert "no model of the catalogue has 'resnet'" in capsys.readouterr().err
