"""``refiner evaluate``: protocols against peers and loops, honest choices, rows that survive."""

import importlib
import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

import refiner
from refiner.cli import main
from refiner.evaluation import protocols
from refiner.evaluation.compare import ROWS, evaluate, rows_for
from refiner.evaluation.protocols import EvaluationSettings, Subject, choose_probe, shifted_toybox
from refiner.evaluation.report import comparison, findings, write_page
from refiner.images.dense import object_maps
from refiner.images.sets import ImageSet
from refiner.models.load import build_vit
from refiner.models.save import save_model
from refiner.probing import probes
from refiner.probing.features import Features
from refiner.training import finetuning
from refiner.training.finetuning import FinetuneRecipe

module = importlib.import_module("refiner.evaluation.compare")
STEP = FinetuneRecipe.cpu(epochs=0.1, batch=8)
TINY = EvaluationSettings.cpu(
    n=160,
    n_test=64,
    linear_blocks=2,
    shots=(1, 2),
    fractions=(0.1,),
    draws=2,
    kmeans_seeds=2,
    corrupted=8,
    severities=(1, 5),
    shifted=32,
    dense=16,
    dense_test=8,
    dense_pixels=4,
    full=STEP,
    full_images=16,
    few=replace(STEP, least_steps=2),
    few_sizes=(1,),
    finetune_test=16,
)


def small(**options):
    return build_vit(size=16, patch=4, dim=24, depth=2, heads=2, **{"seed": 0} | options)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Two small random encoders."""
    folders = []
    for seed in (0, 1):
        folders.append(str(tmp_path_factory.mktemp(f"model{seed}")))
        save_model(small(seed=seed), folders[-1])
    return folders


@pytest.fixture(scope="module")
def sides():
    return tuple(
        refiner.load_images("toybox", split=s, n=n, size=16, progress=False)
        for s, n in (("train", 160), ("test", 64))
    )


@pytest.fixture(scope="module")
def report(models, tmp_path_factory):
    """Every row of two models, once."""
    out = tmp_path_factory.mktemp("report")
    found = evaluate(*models, out=out, transfers=["toybox-new"], settings=TINY, progress=False)
    return out, found


def subject(sides, **changes):
    dense = tuple(object_maps(s[:12]) for s in sides)
    return Subject(small(), *sides, replace(TINY, **changes), dense=dense)


# ---------------------------------------------------------------- the report


def test_every_row_is_filled_for_both_models_with_spread(report):
    out, found = report
    assert json.loads((out / "report.json").read_text()) == found
    assert found["failed"] == {} and found["left_out"] == {}
    assert set(found["rows"]) == {*ROWS, "transfer:toybox-new"}
    for name, row in found["rows"].items():
        assert set(row) == {"before", "after"}
        for side in row.values():
            assert sum(bool(x.get("main")) for x in side["scores"]) == 1, name
            for x in side["scores"]:
                assert 0 <= x["value"] <= 1 or x["name"].startswith("ARI")
                assert math.isfinite(x["spread"])
                varied = x["of"].split(" and ")
                assert set(varied) <= {"test images", "draws", "seeds"}
    names = [
        [x["name"] for x in row[side]["scores"]]
        for row in found["rows"].values()
        for side in ("before", "after")
    ]
    assert names[::2] == names[1::2]


def test_the_page_stands_alone_and_names_every_figure(report):
    out, found = report
    page = (out / "index.html").read_text()
    assert page.count("data:image/png;base64,") == len(list((out / "figures").glob("*.png"))) == 3
    assert "http" not in page and "Not measured" not in page
    for row in ROWS.values():
        assert row.title in page
    for entry in comparison(found):
        assert f"{100 * entry['difference']:+.1f}" in page
    assert found["images"] == {"train": 160, "test": 64, "classes": 16}


def test_names_of_users_are_text_on_the_page(report, tmp_path):
    evil = "<script>x</script>"
    content = json.loads((report[0] / "report.json").read_text())
    content["models"] = {side: f"runs/{evil}" for side in content["models"]}
    content["data"] = content["machine"]["gpu"] = content["titles"]["knn"][0] = evil
    content["rows"]["linear"]["before"]["scores"][0] |= {"name": evil, "of": evil}
    content["rows"]["linear"]["after"]["scores"][0]["choice"]["poolings"] = [evil]
    content["failed"] = {"knn": {"before": evil}}
    content["left_out"] = {"few": evil}
    write_page(tmp_path, content)
    page = (tmp_path / "index.html").read_text()
    assert "<script" not in page and page.count("&lt;script&gt;x&lt;/script&gt;") >= 10
    assert page.count("<figure>") == 3  # figures themselves are not escaped


def test_a_comparison_asks_for_more_than_two_spreads():
    def row(value, spread):
        return {"scores": [{"name": "x", "value": value, "spread": spread, "of": "draws"}]}

    for change, verdict in ((0.11, "better"), (-0.11, "worse"), (0.09, "unclear")):
        rows = {"knn": {"before": row(0.5, 0.03), "after": row(0.5 + change, 0.04)}}
        (entry,) = comparison({"rows": rows})
        assert entry["spread"] == pytest.approx(0.05) and entry["verdict"] == verdict
    report = {"rows": rows, "titles": {}, "models": {}}
    assert findings(report)[0].startswith("Of 1 scores 0 are better, 0 worse, and 1 moved")
    assert findings({"rows": {"knn": {"before": row(0.5, 0.0)}}}) == []


def test_one_model_alone_has_a_report_without_differences(models, tmp_path):
    found = evaluate(models[0], out=tmp_path, rows=["knn"], settings=TINY, progress=False)
    assert set(found["rows"]["knn"]) == {"before"} and comparison(found) == []
    assert ">difference<" not in (tmp_path / "index.html").read_text()


# ---------------------------------------------------------------- no test label chooses anything


def test_shuffled_test_labels_change_no_choice(sides):
    """Every choice of every row stays the same; the scores do not."""
    train, test = sides
    g = torch.Generator().manual_seed(0)
    shuffled = replace(test, labels=test.labels[torch.randperm(len(test), generator=g)])
    runs = [subject((train, t)) for t in (test, shuffled)]
    runs[1].dense = runs[0].dense[0], replace(runs[0].dense[1], maps=runs[0].dense[1].maps.flip(1))
    frozen = (
        protocols.knn,
        protocols.linear,
        protocols.low_shot,
        protocols.clusters,
        protocols.transfer,
        protocols.segmentation,
    )
    choices = 0
    for protocol in frozen:
        first, second = (protocol(s) for s in runs)
        assert [x.get("choice") for x in first] == [x.get("choice") for x in second]
        assert [x["value"] for x in first] != [x["value"] for x in second]
        choices += sum("choice" in x for x in first)
    chosen = [s.linear for s in runs]
    assert torch.equal(chosen[0].probe.weights, chosen[1].probe.weights)
    assert choices == 6  # k-NN, linear (three), transfer, segmentation


def test_fine_tuning_never_sees_a_test_image(sides, monkeypatch):
    seen = []
    original = finetuning.finetune

    def watched(model, images, **options):
        seen.append(images)
        return original(model, images, **options)

    monkeypatch.setattr(protocols, "finetune", watched)
    s = subject(sides)
    for protocol in (protocols.full_finetuning, protocols.few_finetuning):
        protocol(s)
    train = {x.numpy().tobytes() for x in sides[0].images}
    assert len(seen) == TINY.full_seeds + TINY.few_draws
    assert all(x.numpy().tobytes() in train for images in seen for x in images.images)
    assert len({tuple(i.labels.tolist()) for i in seen[TINY.full_seeds :]}) <= 2


# ---------------------------------------------------------------- each protocol against a peer


def test_knn_is_scikit_learns(sides):
    s = subject(sides)
    scores = {x["name"]: x for x in protocols.knn(s)}
    x, z = (f["cls"][-1].double().numpy() for f in s.features)
    scaler = StandardScaler().fit(x)
    x, z = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in map(scaler.transform, (x, z)))
    peer = KNeighborsClassifier(
        n_neighbors=10, algorithm="brute", weights=lambda d: np.exp((1 - d**2 / 2) / 0.07)
    ).fit(x, s.train.labels)
    right = peer.predict(z) == s.test.labels.numpy()
    found = scores["last block, class token"]
    assert found["value"] == pytest.approx(right.mean())
    assert found["spread"] == pytest.approx(math.sqrt(right.mean() * (1 - right.mean()) / 64))
    # The chosen block is that of the best leave-one-out accuracy, over blocks and poolings.
    accuracy = {p: refiner.knn_accuracy(s.features[0][p], s.train.labels) for p in s.poolings}
    alone = {(p, b): float(v) for p, each in accuracy.items() for b, v in enumerate(each, 1)}
    choice = scores["chosen block and pooling"]["choice"]
    best = alone[choice["pooling"], choice["block"]]
    assert best == max(alone.values()) == pytest.approx(choice["leave_one_out"], abs=1e-4)


def test_the_linear_probe_is_the_best_of_the_grid_and_scikit_learns(sides):
    """All blocks, poolings, widths and penalties by hand, chosen on the same held-out images."""
    g = torch.Generator().manual_seed(1)
    y = torch.arange(160) % 4
    blocks = [
        torch.randn(160, 5, generator=g) + s * torch.nn.functional.one_hot(y, 5)
        for s in (0.1, 0.4, 0.2, 0.6, 0.3)
    ]
    features = Features(
        {"cls": torch.stack(blocks), "patch": torch.stack(blocks[::-1])}, (1, 2, 3, 4, 5)
    )
    chosen = choose_probe(features, y, seed=3)
    fit, held = refiner.probing.probes.held_out(y, 0.2, 3)
    best = {}
    for poolings in (("cls",), ("cls", "patch")):
        for width in (1, 4):
            for end in range(width - 1, 5):
                rows = range(end - width + 1, end + 1)
                x = torch.cat([features[p][r] for r in rows for p in poolings], 1).numpy()
                x = StandardScaler().fit_transform(x)
                for penalty in (1e-3, 1e-2, 3e-2):
                    peer = LogisticRegression(C=1 / (penalty * len(fit)), tol=1e-8, max_iter=5000)
                    score = peer.fit(x[fit], y[fit]).score(x[held], y[held])
                    key = tuple(r + 1 for r in rows), poolings
                    best[key] = max(best.get(key, 0), score)
    key = tuple(chosen.choice["blocks"]), tuple(chosen.choice["poolings"])
    assert chosen.choice["validation"] >= max(best.values()) - 1e-6
    assert best[key] == pytest.approx(chosen.choice["validation"], abs=1.5 / len(held))
    x = chosen.joined(features).numpy()
    scaler = StandardScaler().fit(x)
    peer = LogisticRegression(C=1 / (chosen.choice["penalty"] * 160), tol=1e-8, max_iter=5000)
    peer.fit(scaler.transform(x), y)
    other = Features({k: v + 0.3 for k, v in features.items()}, features.blocks)
    z = scaler.transform(chosen.joined(other).numpy())
    assert (chosen.predict(other).numpy() == peer.predict(z)).mean() > 0.99


def test_blocks_to_choose_from_are_spread_over_the_second_half():
    features = Features({"patch": torch.randn(12, 40, 4)}, tuple(range(1, 13)))
    tried = []
    original = probes.linear_probe

    def watched(x, *args, **options):
        tried.append(len(x))
        # The joined features are large: what is scored besides is no copy of them.
        assert args[1].data_ptr() == x.data_ptr()
        return original(x, *args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(protocols, "linear_probe", watched)
        chosen = choose_probe(features, torch.arange(40) % 2, count=3)
        assert tried == [3, 3] and set(chosen.choice["blocks"][-1:]) <= {7, 9, 10, 12}
        tried.clear()
        choose_probe(features, torch.arange(40) % 2)
        assert tried == [12, 9]  # four blocks end at block 4 at the earliest


def test_few_labels_and_clusters_are_the_librarys(sides):
    s = subject(sides)
    scores = {x["name"]: x for x in protocols.low_shot(s)}
    x, z = s.features
    expected = refiner.low_shot(
        x["patch"][-1],
        s.train.labels,
        z["patch"][-1],
        s.test.labels,
        shots=(1, 2),
        fractions=(0.1,),
        draws=2,
    )
    found = scores["2 labels a class, patch mean"]
    assert found["value"] == pytest.approx(float(expected.mean[1]))
    assert found["spread"] == pytest.approx(float(expected.draws[1].std(correction=0)), abs=1e-6)
    assert "10 % of the labels, class token" in scores
    runs = [refiner.clustering(z["cls"][-1], s.test.labels, k=16, seed=i)["nmi"] for i in (0, 1)]
    found = {x["name"]: x for x in protocols.clusters(s)}["NMI, class token"]
    assert found["value"] == pytest.approx(float(np.mean(runs)), abs=1e-6)


def test_corruptions_are_a_loop_over_images_and_kinds(sides):
    from refiner.images.corruptions import CORRUPTIONS, corrupted

    s = subject(sides, corrupted=6)
    found = {x["name"]: x for x in protocols.corruptions(s)}["linear probe"]
    right = np.zeros((len(CORRUPTIONS), 2, 6))
    for i, name in enumerate(CORRUPTIONS):
        for j, severity in enumerate((1, 5)):
            (batch,) = corrupted(s.test[:6], name, severity)
            features = refiner.extract(s.model, batch, progress=False)
            right[i, j] = s.linear.predict(features) == s.test.labels[:6]
    np.testing.assert_allclose(found["detail"]["accuracy"], right.mean(2), atol=1e-4)
    assert found["value"] == pytest.approx(right.mean())
    each = right.mean((0, 1))  # trials of one image are not independent
    assert found["spread"] == pytest.approx(each.std() / math.sqrt(6))


def test_shifted_factors_lie_outside_of_the_train_range(sides):
    shown = sides[0].factors
    outside = {
        "turned": lambda f: np.abs(f["yaw"]) > np.abs(shown["yaw"]).max(),
        "tilted": lambda f: np.abs(f["roll"]) > np.abs(shown["roll"]).max(),
        "smaller": lambda f: f["scale"] < shown["scale"].min(),
        "moved": lambda f: np.maximum(np.abs(f["x"]), np.abs(f["y"])) > 0.12,
        "stronger": lambda f: f["saturation"] > shown["saturation"].max(),
    }
    for name in protocols.SHIFTS:
        images = shifted_toybox(name, 48, size=16)
        assert 15 <= len(images) <= 48 and images.classes == sides[0].classes
        test = outside.pop(name.split()[0], None)
        assert test is None or test(images.factors).all(), name
    assert not outside
    s = subject(sides)
    scores = protocols.shifts(s)
    assert scores[0]["value"] == pytest.approx(np.mean([x["value"] for x in scores[1:]]))


def test_runs_are_averaged_with_their_deviation(sides, monkeypatch):
    values = iter([0.5, 0.7, 0.2, 0.4])
    monkeypatch.setattr(protocols, "_finetuned", lambda *a: next(values))
    (full,) = protocols.full_finetuning(subject(sides))
    assert full["value"] == pytest.approx(0.6) and full["of"] == "seeds and test images"
    assert full["spread"] == pytest.approx(math.sqrt(0.2**2 / 2 + 0.6 * 0.4 / 16))
    few = protocols.few_finetuning(subject(sides))
    assert few[0]["name"] == "1 label a class" and few[0]["detail"]["runs"] == [0.2, 0.4]
    monkeypatch.setattr(protocols, "_finetuned", lambda *a: 0.5)
    (one,) = protocols.full_finetuning(subject(sides, full_seeds=1))
    assert one["of"] == "test images" and one["spread"] == pytest.approx(math.sqrt(0.25 / 16))


# ---------------------------------------------------------------- rows that survive


def test_an_interrupted_run_goes_on_row_by_row(models, tmp_path, monkeypatch):
    options = {"out": tmp_path, "rows": ["knn", "few"], "settings": TINY, "progress": False}
    done = []
    monkeypatch.setattr(module, "write_page", lambda *_: None)

    def counted(name, row):
        def measure(s):
            if len(done) == 3 and not resumed:
                raise KeyboardInterrupt
            done.append(name)
            return row.measure(s)

        return replace(row, measure=measure)

    rows = {name: counted(name, row) for name, row in ROWS.items()}
    monkeypatch.setattr(module, "ROWS", rows)
    resumed = False
    with pytest.raises(KeyboardInterrupt):
        evaluate(*models, **options)
    kept = json.loads((tmp_path / "report.json").read_text())["rows"]
    assert done == ["knn", "few", "knn"] and set(kept["knn"]) == {"before", "after"}
    resumed = True
    again = evaluate(*models, **options, resume=True)
    assert done[3:] == ["few"]
    assert again["rows"]["knn"] == kept["knn"]
    whole = evaluate(*models, **options | {"out": tmp_path / "whole"})
    for name in whole["rows"]:
        for side in ("before", "after"):
            assert again["rows"][name][side]["scores"] == whole["rows"][name][side]["scores"]
    with pytest.raises(ValueError, match="settings differ"):
        evaluate(*models, **options | {"settings": replace(TINY, draws=3)}, resume=True)


def test_a_failing_row_loses_no_other_and_is_tried_again(models, tmp_path, monkeypatch):
    def broken(s):
        raise MemoryError("no room\nfor this")

    working = ROWS["few"]
    monkeypatch.setitem(ROWS, "few", replace(working, measure=broken))
    options = {"out": tmp_path, "rows": ["few", "knn"], "settings": TINY, "progress": False}
    found = evaluate(*models, **options)
    assert found["failed"] == {
        "few": dict.fromkeys(("before", "after"), "MemoryError: no room for this")
    }
    assert set(found["rows"]) == {"knn"}
    assert "MemoryError: no room for this" in (tmp_path / "index.html").read_text()
    monkeypatch.setitem(ROWS, "few", working)
    again = evaluate(*models, **options, resume=True)
    assert again["failed"] == {} and list(again["rows"]) == ["knn", "few"]


def test_a_transfer_set_that_cannot_be_loaded_fails_alone(models, tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    found = evaluate(
        models[0],
        out=tmp_path / "out",
        rows=["knn", "transfer"],
        settings=TINY,
        transfers=[empty],
        progress=False,
    )
    assert str(empty) in found["failed"][f"transfer:{empty}"]["before"]
    assert set(found["rows"]) == {"knn"}


@pytest.mark.parametrize(
    "options", [{"transfers": ["no_such_set"]}, {"dense": "no_such_set"}, {"data": "no_such_set"}]
)
def test_a_misspelt_set_is_told_before_the_work(models, tmp_path, options):
    with pytest.raises(FileNotFoundError, match="no_such_set"):
        evaluate(models[0], out=tmp_path / "out", settings=TINY, progress=False, **options)
    assert not (tmp_path / "out").exists()


def test_other_data_leave_out_what_they_do_not_allow(models, tmp_path):
    found = evaluate(
        models[0],
        data="digits",
        out=tmp_path,
        rows=["shifts", "segmentation", "few"],
        settings=replace(TINY, n=5000),
        progress=False,
    )
    assert set(found["left_out"]) == {"shifts", "segmentation"} and set(found["rows"]) == {"few"}
    assert found["images"]["train"] == 1438  # fewer than asked for: all of them
    assert "no masks" in (tmp_path / "index.html").read_text()


def test_a_model_without_class_token(sides):
    s = Subject(small(class_token=False), *sides, TINY)
    assert [x["name"] for x in protocols.knn(s)] == [
        "last block, patch mean",
        "chosen block and pooling",
    ]
    assert s.linear.choice["poolings"] == ["patch"]


def test_without_labels_one_sentence(models, tmp_path, monkeypatch):
    bare = ImageSet(torch.zeros(8, 3, 16, 16, dtype=torch.uint8))
    monkeypatch.setattr(module, "train_and_test", lambda *a: (bare, bare))
    with pytest.raises(ValueError, match="has no labels: evaluate needs"):
        evaluate(models[0], out=tmp_path, settings=TINY)


def test_rows_are_named_and_known():
    assert list(rows_for(["knn", "transfer"], ["digits"])) == ["knn", "transfer:digits"]
    with pytest.raises(ValueError, match="unknown row 'knnn'"):
        rows_for(["knnn"], [])
    with pytest.raises(ValueError, match="each transfer set once"):
        rows_for(None, ["digits", "digits"])


def test_the_command(models, tmp_path, capsys):
    out = tmp_path / "out"
    code = main(
        [
            "evaluate",
            "--before",
            models[0],
            "--after",
            models[1],
            "--rows",
            "clusters",
            "--set",
            "n=48",
            "--set",
            "n_test=32",
            "--out",
            str(out),
        ]
    )
    said = capsys.readouterr().out
    assert code == 0 and "Of 6 scores" in said and str(out / "index.html") in said
    (tmp_path / "empty").mkdir()
    assert (
        main(
            [
                "evaluate",
                "--before",
                models[0],
                "--rows",
                "clusters",
                "transfer",
                "--transfer",
                str(tmp_path / "empty"),
                "--set",
                "n=48",
                "--set",
                "n_test=32",
                "--out",
                str(tmp_path / "b"),
            ]
        )
        == 1
    )
    told = capsys.readouterr().err
    assert f"failed: transfer:{tmp_path / 'empty'}, before: " in told and "no images" in told
    assert main(["evaluate", "--rows", "knnn", "--out", str(out)]) == 2
    assert "unknown row" in capsys.readouterr().err
