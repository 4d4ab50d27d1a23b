"""An embedded pair under every protocol: the tables of results and notebook 09, and figures.

    python benchmarks/evaluate_pair.py toybox|cifar10 [--preset cpu|gpu] [--data FOLDER]

Runs ``refiner evaluate`` (an interrupted run goes on) and stores its report with the command, as
``benchmarks/results/evaluate_toybox.json`` and a figure beside it; with ``_gpu`` in the name for
that preset. ``--data`` is where CIFAR-10 lies if it shall not be fetched: torchvision's folder, or
``train`` and ``test`` with one folder a class.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).parent.parent))

from refiner.base.files import replacing, write_json
from refiner.evaluation.compare import evaluate
from refiner.evaluation.protocols import EvaluationSettings
from refiner.evaluation.report import comparison, spokes_of
from refiner.visuals import plots

RESULTS = Path(__file__).parent / "results"
TRANSFERS = {"toybox": ("toybox-new", "digits"), "cifar10": ("digits",)}


def figure(report: dict) -> plt.Figure:
    """Left every row's main figure, right what changed."""
    with plots.style():
        fig = plt.figure(figsize=(13, 5.8), layout="constrained")
        spokes = spokes_of(report)
        values = {side: [s[side] for s in spokes.values()] for side in ("before", "after")}
        left = fig.add_subplot(1, 2, 1, projection="polar")
        plots.spider(values, list(spokes), ax=left)
        mains = [e for e in comparison(report) if e["before"].get("main")]
        names = [f"{report['titles'][e['row']][0]}: {e['name']}" for e in mains]
        numbers = ([e[key] for e in mains] for key in ("difference", "spread"))
        plots.differences(
            names,
            *numbers,
            title="Difference, with two spreads either side",
            ax=fig.add_subplot(1, 2, 2),
        )
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("set", choices=tuple(TRANSFERS))
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--data", metavar="FOLDER", help="default: the set by its name")
    parser.add_argument("--out", metavar="FOLDER", help="default: runs/evaluate_SET_PRESET")
    args = parser.parse_args()
    pair = f"mae_{args.set}", f"mae_{args.set}_refined"
    out = Path(args.out or f"runs/evaluate_{args.set}_{args.preset}")
    report = evaluate(
        *pair,
        args.data or args.set,
        out,
        transfers=TRANSFERS[args.set],
        settings=getattr(EvaluationSettings, args.preset)(),
        resume=True,
        device="cpu" if args.preset == "cpu" else None,
    )
    # Where the images lie on this machine is nobody else's business.
    report |= {"data": args.set}
    command = [
        "refiner",
        "evaluate",
        "--before",
        pair[0],
        "--after",
        pair[1],
        "--data",
        args.set,
        "--transfer",
        *TRANSFERS[args.set],
        "--preset",
        args.preset,
    ]
    name = f"evaluate_{args.set}" + ("" if args.preset == "cpu" else "_gpu")
    write_json(RESULTS / f"{name}.json", {"command": shlex.join(command)} | report)
    with replacing(RESULTS / f"{name}.png") as temporary:
        figure(report).savefig(temporary, format="png", dpi=90)
    seconds = sum(e["cpu_seconds"] for row in report["rows"].values() for e in row.values())
    print(f"{seconds / 60:.1f} minutes of processor time; see {RESULTS / name}.json")


if __name__ == "__main__":
    main()
