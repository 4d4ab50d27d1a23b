"""``refiner evaluate``: one or two models under every protocol, row by row.

A row is one protocol of :mod:`refiner.evaluation.protocols`. Each row of each model is written down
as soon as it is done, so an interrupted run goes on there, and a row that fails is noted without
losing the others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import torch
from tqdm.auto import tqdm

from refiner.base.errors import UserError
from refiner.base.files import fitting, one_run_a_folder, write_json
from refiner.base.pages import BAR, begin, json_ready
from refiner.base.parallel import check_device
from refiner.base.settings import checked
from refiner.evaluation import protocols
from refiner.evaluation.protocols import EvaluationSettings, Subject
from refiner.evaluation.report import write_page
from refiner.images.channels import fit_channels
from refiner.images.dense import DenseSet, check_dense, load_dense, object_maps
from refiner.images.load import check_source, train_and_test
from refiner.images.sets import ImageSet
from refiner.models.encoders import Encoder, channels_of
from refiner.models.load import load_model

# ---------------------------------------------------------------- the rows


@dataclass(frozen=True)
class Row:
    """A protocol.

    Attributes:
        title, short: for people, and for the spider plot.
        measure: from a subject to its scores.
        cost: of one model, in seconds on a CPU, for the estimate of the time that is left.
        needs: what it needs of the data: "toybox", "dense", or nothing.
    """

    title: str
    measure: Callable[[Subject], list[dict]]
    cost: float
    needs: str = ""
    short: str = ""


class Measured(TypedDict):
    """One row of one model in a report."""

    seconds: float
    scores: list[dict[str, object]]


class Report(TypedDict):
    """What the ``report.json`` holds that a run goes on from."""

    machine: dict[str, object]
    rows: dict[str, dict[str, Measured]]
    failed: dict[str, dict[str, str]]
    titles: NotRequired[dict[str, list[str]]]


_FEW = "Fine-tuning, few labels"
ROWS = {
    "knn": Row("k-NN", protocols.knn, 15, short="k-NN"),
    "linear": Row("Linear probe", protocols.linear, 30, short="linear"),
    "few": Row("Few labels", protocols.low_shot, 5, short="1 label\na class"),
    "clusters": Row("k-means", protocols.clusters, 10, short="clusters\n(ACC)"),
    "corruptions": Row("Corrupted images", protocols.corruptions, 30, "colours", "corrupted"),
    "shifts": Row("Shifted factors", protocols.shifts, 8, "toybox", "shifted\nfactors"),
    "segmentation": Row("Segmentation", protocols.segmentation, 8, "dense", "segmentation\n(mIoU)"),
    "finetune": Row("Full fine-tuning", protocols.full_finetuning, 40, short="fine-tuning"),
    "finetune_few": Row(_FEW, protocols.few_finetuning, 25, short="fine-tuning,\nfew labels"),
}
TRANSFER = Row("Transfer", protocols.transfer, 25)


def rows_for(rows: Sequence[str] | None, transfers: Sequence[str]) -> dict[str, Row]:
    """The rows of a run by name, each transfer set its own.

    Raises:
        ValueError: for an unknown row, or a transfer set that is given twice.
    """
    unknown = [r for r in rows or () if r not in (*ROWS, "transfer")]
    if unknown:
        known = ", ".join((*ROWS, "transfer"))
        raise UserError(f"unknown row {', '.join(unknown)!r}: choose among {known}")
    if len(set(transfers)) < len(transfers):
        raise UserError(f"give each transfer set once, not {list(transfers)}")
    chosen = {name: row for name, row in ROWS.items() if not rows or name in rows}
    if not rows or "transfer" in rows:
        for data in transfers:
            title = f"Transfer: {Path(data).name}"
            chosen[f"transfer:{data}"] = replace(TRANSFER, title=title, short=Path(data).name)
    return chosen


# ---------------------------------------------------------------- running


@one_run_a_folder
def evaluate(
    before: str,
    after: str | None = None,
    data: str | Path = "toybox",
    out: str | Path = "runs/evaluate",
    *,
    transfers: Sequence[str] = (),
    dense: str | Path | None = None,
    rows: Sequence[str] | None = None,
    settings: EvaluationSettings | None = None,
    resume: bool = False,
    device: str | torch.device | None = None,
    progress: bool = True,
) -> dict:
    """Measures one or two models under every protocol and writes a report.

    Args:
        before, after: models as :func:`refiner.load_model` takes them; ``after`` may be left out.
        data: an image set or a folder, with labels. A folder without a test (or val) part lends a
            fifth of its images.
        out: gets ``report.json`` after every row, and ``index.html`` with figures at the end.
        transfers: more image sets or folders, for k-NN and linear probes.
        dense: a folder with ``images`` and ``annotations`` (:func:`refiner.load_dense`); without
            one, Toybox's objects are segmented where the data are Toybox.
        rows: only these rows; default all that the data allow.
        settings: default :meth:`EvaluationSettings.cpu`, or with CUDA
            :meth:`EvaluationSettings.gpu`.
        resume: keep the rows that are in ``out``; failed ones are tried again.
        device: where to run; default CUDA if there is one.
        progress: show a bar with the remaining time.

    Returns:
        The content of ``report.json``: ``rows`` → row → "before" / "after" → scores and seconds;
        ``failed`` → row → "before" / "after" → reason; ``left_out`` → row → reason.

    Raises:
        ValueError: for unknown rows, data without labels, or another run's folder to resume.
        FileNotFoundError: for a model or image set that is not there.
    """
    on_gpu = torch.cuda.is_available() if device is None else str(device).startswith("cuda")
    settings = settings or (EvaluationSettings.gpu() if on_gpu else EvaluationSettings.cpu())
    settings = checked(settings)
    transfers, out = [str(t) for t in transfers], Path(out)
    wanted = rows_for(rows, transfers)
    for source in (data, *transfers):  # what is misspelt is told before the work
        check_source(source)
    if dense is not None:
        check_dense(dense)
    check_device(device)
    models = {"before": str(before)} | ({"after": str(after)} if after else {})
    asked = {"models": models, "data": str(data), "dense": None if dense is None else str(dense)}
    asked["settings"] = json_ready(asdict(settings))
    loaded = {side: load_model(name) for side, name in models.items()}
    report = begin(out, asked, resume, Report, rows={}, failed={})
    bench = _Bench(loaded, settings, data, dense, device, progress)
    report["images"] = bench.facts()
    report["left_out"] = left_out = bench.left_out(wanted)
    todo = [(r, side) for side in models for r in wanted if r not in left_out]
    total = sum(wanted[r].cost for r, _ in todo)
    with tqdm(total=total, desc="evaluating", unit="", bar_format=BAR, disable=not progress) as bar:
        for name, side in todo:
            bar.set_description_str(f"{side}: {wanted[name].title}")
            if side not in report["rows"].get(name, {}):
                _measure(report, name, wanted[name], side, bench)
                write_json(out / "report.json", report)
            bar.update(wanted[name].cost)
    titles = {name: [row.title, row.short] for name, row in wanted.items()}
    report["titles"] = report.get("titles", {}) | titles
    done = report["rows"]  # in the order of the protocols, whatever was tried again
    report["rows"] = {name: done[name] for name in (*wanted, *done) if name in done}
    with fitting(out / "report.json", resume):
        write_json(out / "report.json", report)
        write_page(out, report)
    return report


def _measure(report: dict, name: str, row: Row, side: str, bench: _Bench) -> None:
    """Adds a row's scores to the report, or why there are none."""
    began, worked = time.monotonic(), time.process_time()
    try:
        scores = row.measure(bench.subject(side, name))
    # Whatever a protocol stumbles over (memory, a download, a model that cannot do it), the other
    # rows must not be lost; the reason is shown in the report.
    except Exception as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        report["failed"].setdefault(name, {})[side] = reason
        return
    seconds = time.monotonic() - began, time.process_time() - worked
    spent = dict(zip(("seconds", "cpu_seconds"), (round(x, 2) for x in seconds), strict=True))
    report["rows"].setdefault(name, {})[side] = spent | {"scores": scores}
    report["failed"].get(name, {}).pop(side, None)
    if not report["failed"].get(name, True):
        del report["failed"][name]


class _Bench:
    """The images of a run, loaded once for each size, and a subject for each model."""

    def __init__(self, models: dict[str, Encoder], settings, data, dense, device, progress: bool):
        self.models, self.settings = models, settings
        self.data, self.dense, self.device, self.progress = data, dense, device, progress
        self.loaded: dict[tuple, object] = {}
        self.main: dict[str, Subject] = {}
        for side in models:
            train, test = self.images(data, side)
            self.models[side] = fit_channels(self.models[side], train)
            if train.labels is None or test.labels is None:
                raise UserError(
                    f"{data} has no labels: evaluate needs one sub-folder a class (refiner probe "
                    "measures images without labels)"
                )

    def size(self, side: str) -> int:
        return self.models[side].refiner_card["preprocessing"]["size"]

    def images(self, data, side: str) -> tuple[ImageSet, ImageSet]:
        key = str(data), self.size(side), channels_of(self.models[side])
        if key not in self.loaded:
            n, n_test = self.settings.n, self.settings.n_test
            try:
                self.loaded[key] = train_and_test(data, n, n_test, *key[1:])
            except UserError:  # the set may have fewer; anything else is raised again
                train, test = train_and_test(data, None, None, *key[1:])
                self.loaded[key] = train[:n], test[:n_test]
        return self.loaded[key]

    def dense_images(self, side: str) -> tuple[DenseSet, DenseSet]:
        settings, size = self.settings, self.size(side)
        limits = zip(("train", "test"), (settings.dense, settings.dense_test), strict=True)
        if self.dense is None:
            pairs = zip(self.images(self.data, side), limits, strict=True)
            return tuple(object_maps(images[:n]) for images, (_, n) in pairs)
        if ("dense", size) not in self.loaded:
            self.loaded["dense", size] = tuple(
                load_dense(self.dense, split=split, n=n, size=size, progress=False)
                for split, n in limits
            )
        return self.loaded["dense", size]

    def facts(self) -> dict:
        train, test = self.images(self.data, "before")
        return {"train": len(train), "test": len(test), "classes": len(train.labels.unique())}

    def left_out(self, rows: dict[str, Row]) -> dict[str, str]:
        """Rows that the data do not allow, and why."""
        train, _ = self.images(self.data, "before")
        masks = self.dense is not None or train.masks is not None
        have = {"": True, "toybox": str(self.data) == "toybox", "dense": masks}
        have["colours"] = train.images.shape[1] == 3
        why = {
            "toybox": "only Toybox's factors can be drawn from outside of their range",
            "colours": "photographs are corrupted, images of 3 channels",
            "dense": "the images have no masks; --dense names a folder with images and annotations",
        }
        return {name: why[row.needs] for name, row in rows.items() if not have[row.needs]}

    def subject(self, side: str, row: str) -> Subject:
        """What a row measures."""
        kind, _, data = row.partition(":")
        if kind == "transfer":
            return Subject(self.models[side], *self.images(data, side), self.settings, self.device)
        if side not in self.main:  # one model's features at a time
            parts = self.models[side], *self.images(self.data, side), self.settings, self.device
            self.main = {side: Subject(*parts, progress=self.progress)}
        subject = self.main[side]
        if kind == "segmentation":
            subject.dense = self.dense_images(side)
        return subject
