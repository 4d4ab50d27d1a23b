"""Training studies: budgets are equal, rungs differ where they say, results tell their origin."""

import importlib
import json
import sys
import time
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch

from refiner.models.mae import MAERecipe

ROOT = Path(__file__).parent.parent
BENCHMARKS = ROOT / "benchmarks"


@pytest.fixture(scope="module")
def scripts():
    sys.path.insert(0, str(BENCHMARKS))
    names = ("toybox_ladder", "cifar10", "utilisation", "no_decoder", "length")
    yield {name: importlib.import_module(name) for name in names}
    sys.path.remove(str(BENCHMARKS))


def test_rungs_of_the_ladder_differ_in_colour_and_swap_only(scripts):
    ladder = scripts["toybox_ladder"]
    base = asdict(ladder.rung_recipe("strong-ramp", 0))
    for rung in ladder.RUNGS:
        other = asdict(ladder.rung_recipe(rung, 0))
        changed = {key for key in base if base[key] != other[key]}
        assert changed <= {"swap", "swap_from", "swap_full", "views", "pooling"}, rung
        assert ("views" in changed) == rung.startswith("mild")
        crops = [(v["size"], v["scale"], v["keep"]) for v in other["views"]]
        assert crops == [(v["size"], v["scale"], v["keep"]) for v in base["views"]]


def test_the_arms_differ_in_their_decoder_only_and_start_alike(scripts):
    script = scripts["no_decoder"]
    new, none = (script.arm_recipe(arm, 5, 0) for arm in ("new", "none"))
    assert replace(none, decoder_depth=new.decoder_depth) == new and none.decoder_depth == 0
    embedded = MAERecipe(**json.loads((ROOT / "data" / "mae_toybox.json").read_text())["recipe"])
    kept = {"steps": embedded.steps, "lr": embedded.lr, "compile": embedded.compile}
    assert replace(new, **kept) == embedded


def test_cifar_rungs_start_from_one_mae_and_are_kept(scripts, tmp_path):
    """A whole ladder of seconds: every rung is trained, kept, and found again."""
    from refiner.images.sets import ImageSet
    from refiner.images.toybox import render
    from refiner.training.recipe import Recipe

    cifar = scripts["cifar10"]
    scene = render(232)
    images = ImageSet(images=scene.images, labels=scene.labels, classes=scene.classes)
    tiny = cifar.Preset(
        mae=MAERecipe(dim=16, depth=3, heads=2, decoder_dim=16, decoder_heads=2, batch=8, steps=4),
        refine=Recipe.cpu(
            batch=8,
            head_steps=1,
            steps=2,
            hidden=8,
            predictor_hidden=8,
            out=4,
            queue=16,
            frozen_blocks=1,
            blocks=(2, 3),
            keep="last",
        ),
        bank=24,
        queries=8,
    )
    cifar.PRESETS["tiny"], cifar.RUNS = tiny, tmp_path
    ladder = cifar.Ladder("tiny", 0, images)
    steps = {rung: ladder.train(rung)[2] for rung in cifar.RUNGS}
    assert steps["mae"] == 4 and steps["all_heads"] == 2 and steps["long_heads"] == 16
    # "As long" by the paces: steps times pace are equal, up to half a step.
    pace = ladder.paces()
    assert set(pace) == {"mae", "heads", "refine", "scratch"} and min(pace.values()) > 0
    assert pace == json.loads((tmp_path / "tiny" / "seed0" / "paces.json").read_text())
    for more, scratch, refined in (
        ("mae_longer", "from_scratch", 2),
        ("long_mae", "long_scratch", 16),
    ):
        seconds = pace["heads"] + refined * pace["refine"]
        assert steps[more] == max(1, round(seconds / pace["mae"]))
        assert steps[scratch] == max(1, round((4 * pace["mae"] + seconds) / pace["scratch"]))
    cards = {rung: ladder.train(rung)[0].refiner_card for rung in cifar.RUNGS}  # found again
    refined = ("all_heads", "one_head", "swap_both", "long_heads")
    assert all(cards[r]["refined_from"] == "mae" for r in refined)
    assert all(cards[r]["refined_from"] == "random" for r in ("from_scratch", "long_scratch"))
    assert cards["one_head"]["refine_recipe"]["blocks"] == [3]
    assert cards["swap_both"]["refine_recipe"]["swap"] == "both"
    found = cifar.measure(ladder.train("mae")[0], images[:200], images[200:])
    assert len(found["cls"]["k200"]) == len(found["patch"]["k10"]) == 3
    cells = [{"rung": rung, "seed": 0, **found} for rung in cifar.RUNGS]
    cifar.draw(cells, tmp_path / "blocks.png")
    assert (tmp_path / "blocks.png").stat().st_size > 10_000


def test_cifar_takes_the_embedded_mae_for_its_own_recipe_only(scripts):
    ladder = scripts["cifar10"].Ladder("cpu", 0, None, embedded=True)
    model, seconds, steps = ladder.train("mae")
    assert model.refiner_card["name"] == "mae_cifar10" and steps == 3000 and seconds > 0
    with pytest.raises(ValueError, match="cpu preset with seed 0"):
        scripts["cifar10"].Ladder("cpu", 1, None, embedded=True)


def test_a_result_keeps_the_rungs_that_were_not_asked_for(scripts, tmp_path):
    merged, out = scripts["cifar10"].merged, tmp_path / "cifar10.json"
    same = {"command": "c", "train": 9, "bank": 5, "queries": 3, "split": "val"}
    old = [{"rung": "one_head", "seed": 0, "x": 1}, {"rung": "mae", "seed": 0, "x": 2}]
    assert merged(out, {**same, "cells": list(old)})["cells"] == old[::-1]  # in the rungs' order
    out.write_text(json.dumps({**same, "cells": old}))
    new = [{"rung": "one_head", "seed": 0, "x": 3}, {"rung": "long_mae", "seed": 0, "x": 4}]
    assert [c["x"] for c in merged(out, {**same, "cells": list(new)})["cells"]] == [2, 3, 4]
    asked_of_others = {**same, "split": "test", "cells": list(new)}
    assert [c["x"] for c in merged(out, asked_of_others)["cells"]] == [3, 4]


def test_a_long_training_in_pieces_is_the_whole_one(scripts, tmp_path, monkeypatch):
    """Stopped after every second step, with an encoder kept each time, and gone on with."""
    from safetensors.torch import load_file
    from tiny import tiny

    import refiner
    from refiner.models.load import build_vit

    length, recipe = scripts["length"], tiny(head_steps=1, steps=4)
    images = torch.randint(256, (12, 3, 8, 8), dtype=torch.uint8)
    start = build_vit(size=8, patch=4, dim=8, depth=2, heads=2, seed=0)
    refiner.save_model(start, tmp_path / "start")
    monkeypatch.setattr(length, "RUNS", tmp_path)
    monkeypatch.setattr(length, "EMBEDDED", tmp_path / "start")
    monkeypatch.setattr(length, "EVERY", {"refined": 2})
    monkeypatch.setattr(length, "recipe_of", lambda rung, steps: recipe)
    length.train("refined", images, None, time.monotonic() - 1)  # no time left: nothing is done
    assert not (tmp_path / "refined").exists()
    length.train("refined", images, None, time.monotonic() + 60)
    kept = length.points("refined")
    assert [steps for steps, _, _ in kept] == [2, 4, 5]
    assert [s for _, s, _ in kept] == sorted(s for _, s, _ in kept)
    assert not list(tmp_path.glob("refined/at*/*state*"))
    loaded = refiner.load_model(tmp_path / "start")
    whole = refiner.refine(loaded, images, recipe=recipe, progress=False).model.state_dict()
    last = load_file(kept[-1][2] / "model.safetensors")
    assert all(torch.equal(last[name], whole[name]) for name in last)


@pytest.mark.parametrize("preset", ["cpu", "gpu"])
def test_cifar_presets_fit_together(scripts, preset):
    """The recipe refines the network that the preset pretrains, heads included."""
    refine_module = importlib.import_module("refiner.training.refining")
    chosen = scripts["cifar10"].PRESETS[preset]
    mae = chosen.mae.build()
    images = torch.randint(256, (chosen.refine.batch, 3, 32, 32), dtype=torch.uint8)
    recipe = refine_module.complete_recipe(chosen.refine, mae.encoder, images)
    assert recipe.blocks[-1] == chosen.mae.depth and recipe.pooling == "cls"
    assert chosen.mae.patch <= 4 and chosen.mae.size == 32


@pytest.mark.parametrize(("limit", "found"), [(0, 0), (15, 0), (16, 16), (200, 192), (1024, 1024)])
def test_the_largest_batch_is_the_last_that_works(scripts, limit, found):
    tried = []

    def works(batch):
        tried.append(batch)
        return batch <= limit

    assert scripts["utilisation"].largest(works) == found
    assert len(tried) == len(set(tried)) < 14  # each costs a start on the GPU


def test_arithmetic_of_a_step_grows_with_what_is_trained(scripts):
    """Counted by torch, so frozen blocks and local views have to show."""
    script = scripts["utilisation"]
    all_trained, half_frozen = (
        script.arithmetic("toybox", 32, "cpu", frozen_blocks=frozen) for frozen in (0, 6)
    )
    # Products of a block at T tokens: 12 D² T, and attention's 2 T² D; multiply and add. Of the
    # large views half of the patches are left, small ones have 16.
    dim, tokens, twice = 96, (33, 33, 17, 17), 2 * 32
    block = sum(12 * dim**2 * t + 2 * t**2 * dim for t in tokens)
    # The backward pass takes two for one; the embedding of patches has no input to go on to.
    entry = sum(3 * 4 * 4 * dim * (t - 1) for t in tokens)
    assert all_trained - half_frozen == pytest.approx(twice * (6 * 2 * block + entry), rel=0.005)


def test_arithmetic_of_a_small_batch_tells_that_of_a_large_one(scripts, monkeypatch):
    script = scripts["utilisation"]
    scaled = script.arithmetic("toybox", 16, "cpu")
    monkeypatch.setattr(script, "COUNTED", 16)
    assert script.arithmetic("toybox", 16, "cpu") == scaled


def test_two_plans_tell_the_memory_of_every_batch(scripts):
    script = scripts["utilisation"]
    for batch in (24, 64):
        parts = script.memory_needed(*script.setup_of("toybox", batch), torch.device("cpu"))
        whole = script.NOT_COUNTED * sum(parts.values())
        assert script.planned_memory("toybox", "cpu")(batch) == pytest.approx(whole, rel=1e-6)


def test_every_result_tells_its_command_and_machine():
    results = sorted((BENCHMARKS / "results").glob("*.json"))
    assert results
    cli = (BENCHMARKS.parent / "refiner" / "cli.py").read_text()
    for path in results:
        content = json.loads(path.read_text())
        parts = [content] if "command" in content else list(content.values())
        for part in parts:  # a file of several measurements has one command each
            cells = [cell for cell in part.get("cells", []) if isinstance(cell, dict)]
            machines = [part.get("machine"), *(cell.get("machine") for cell in cells)]
            program, what = part["command"].split()[:2]
            if program == "refiner":
                assert f"def {what}_command" in cli, path.name
            else:
                assert program == "python" and what.startswith("benchmarks/"), path.name
                assert (BENCHMARKS.parent / what).is_file(), path.name
            assert any(m and m["processor"] for m in machines), path.name
