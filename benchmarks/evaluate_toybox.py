"""The embedded pair under every protocol: README's table, notebook 09's numbers, and a figure.

    python benchmarks/evaluate_toybox.py

Runs ``refiner evaluate`` (an interrupted run goes on) and stores its report with the command.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import matplotlib.pyplot as plt

from refiner import plots
from refiner.evaluate import comparison, evaluate
from refiner.evaluate_report import _spokes
from refiner.files import replacing, write_json
from refiner.protocols import EvaluationSettings

RESULTS = Path(__file__).parent / "results"
PAIR = ("mae_toybox", "mae_toybox_refined")
TRANSFERS = ("toybox-new", "digits")


def figure(report: dict) -> plt.Figure:
    """Left every row's main figure, right what changed."""
    with plots.style():
        fig = plt.figure(figsize=(13, 5.8), layout="constrained")
        spokes = _spokes(report)
        values = {side: [s[side] for s in spokes.values()] for side in ("before", "after")}
        left = fig.add_subplot(1, 2, 1, projection="polar")
        plots.spider(values, list(spokes), ax=left)
        mains = [e for e in comparison(report) if e["before"].get("main")]
        names = [f"{report['titles'][e['row']][0]}: {e['name']}" for e in mains]
        numbers = ([e[key] for e in mains] for key in ("difference", "spread"))
        plots.differences(names, *numbers, title="Difference, with two spreads either side",
                          ax=fig.add_subplot(1, 2, 2))  # fmt: skip
    return fig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", default="runs/evaluate_toybox", metavar="FOLDER")
    out = Path(parser.parse_args().out)
    report = evaluate(*PAIR, "toybox", out, transfers=TRANSFERS, resume=True,
                      settings=EvaluationSettings.cpu(), device="cpu")  # fmt: skip
    command = ["refiner", "evaluate", "--before", PAIR[0], "--after", PAIR[1], "--data", "toybox",
               "--transfer", *TRANSFERS, "--preset", "cpu"]  # fmt: skip
    write_json(RESULTS / "evaluate_toybox.json", {"command": shlex.join(command)} | report)
    with replacing(RESULTS / "evaluate_toybox.png") as temporary:
        figure(report).savefig(temporary, format="png", dpi=90)
    seconds = sum(e["cpu_seconds"] for row in report["rows"].values() for e in row.values())
    print(f"{seconds / 60:.1f} minutes of processor time; see {RESULTS / 'evaluate_toybox.json'}")


if __name__ == "__main__":
    main()
