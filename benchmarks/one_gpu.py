"""What waits for a GPU, the most valuable first, within the minutes that there are.

    python3 benchmarks/one_gpu.py                             # everything, into runs/one_gpu
    python3 benchmarks/one_gpu.py --parts smoke cifar --cifar cifar10.tar.gz --budget 540 --out out
    python3 benchmarks/one_gpu.py --parts cifar --continue out --budget 540 --out longer --cifar ...

Made also for a machine with a GPU that is lent for minutes and has no network. Nothing has to be
installed there but torch, torchvision, timm and what scientists' machines have anyway: bring the
repository, an archive of CIFAR-10 (``{train,test}/<class>/<number>.jpg``), and a wheel of timm if
that machine's is old, and start

    python3 -m pip install --no-index --no-deps --target site wheels/*.whl
    PYTHONPATH=site python3 benchmarks/one_gpu.py --cifar cifar10.tar.gz --budget 540 --out out

Parts run in the order below; one that no longer fits into ``--budget`` (seconds) is skipped, an
exception is written down and the next part runs. ``results.json`` is rewritten after every part and
within long ones; started again, finished parts are not repeated. All that comes home lies in
``--out``: at most eight files of at most 16 MiB, that is ``results.json``, ``figures.zip`` and
weights in half precision. A training is planned once, from a measured pace, before its cosine
starts, and is stopped by the clock should the pace have changed. With ``--continue`` the part
*cifar* goes on from the weights in the folder of an earlier run.

smoke       does a GPU compute what the CPU does? And the card's own limits.
cifar       CIFAR-10 from scratch: MAE, refining, and every block before and after.
utilisation what share of the card's products a refining step of ViT-B and L reaches; memory.
probing     k-NN and linear probes beside plain torch, scikit-learn and the CPU.
notebook04  the code of the notebook at the gpu preset.
deep        Toybox, 24 blocks, with and without a decoder, refined: the curve of the paper.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import tempfile
import time
import traceback
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import torch
from measured import header
from safetensors.torch import load_file, save_file

from refiner.base.files import replacing, write_json
from refiner.base.pages import json_ready

FILES, BYTES = 8, 16 * 2**20  # that may come home, and the size of each
SHARD = 15 * 2**20


@dataclass
class Part:
    """What can be run: how many seconds it needs at least, and the function that does it."""

    least: float
    work: Callable[[Job], None]


@dataclass
class Job:
    """What a part gets, and where it leaves what it finds.

    Attributes:
        device: where to work.
        tiny: sizes of a rehearsal on a CPU.
        cifar: an archive, a folder, or None.
        earlier: folder of the run to go on from.
        out: what comes home.
        scratch: what does not.
        seconds: given lengths of pretraining and refining CIFAR-10.
        end: ``time.monotonic()`` at which the part has to be over; infinity without a budget.
        found: the part's results so far.
        publish: writes the results down.
    """

    device: torch.device
    tiny: bool
    cifar: Path | None
    earlier: Path | None
    out: Path
    scratch: Path
    seconds: tuple[float, float] | None = None
    end: float = math.inf
    found: dict = field(default_factory=dict)
    publish: Callable[[], None] = lambda: None

    @property
    def left(self) -> float:
        """Seconds until the part has to be over."""
        return self.end - time.monotonic()

    def note(self, **found) -> None:
        """Adds to the part's results and writes them down at once."""
        self.found |= found
        self.publish()

    def draw(self, name: str, figure) -> None:
        """Puts a figure into the archive, in the place of an earlier one of that name."""
        picture = io.BytesIO()
        figure.savefig(picture, format="png", dpi=90, bbox_inches="tight")
        matplotlib.pyplot.close(figure)
        path, pictures = self.out / "figures.zip", {}
        if path.is_file():
            with zipfile.ZipFile(path) as archive:
                pictures = {n: archive.read(n) for n in archive.namelist()}
        pictures[f"{name}.png"] = picture.getvalue()
        with replacing(path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            for n, content in pictures.items():
                archive.writestr(n, content)


# ---------------------------------------------------------------- weights that come home


def keep_weights(folder: Path, parts: dict[str, dict[str, torch.Tensor]]) -> int:
    """Writes state dicts in half precision as ``weights-1.safetensors``, …; how many files.

    Raises:
        ValueError: for more than may come home.
    """
    shards: list[dict] = [{}]
    size = 0
    for name, value in ((f"{p}.{k}", v) for p, state in parts.items() for k, v in state.items()):
        value = value.detach().cpu().contiguous()
        value = value.half() if value.is_floating_point() else value.clone()
        if size + value.nbytes > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = value
        size += value.nbytes
    if len(shards) > FILES - 2 or any(v.nbytes > SHARD for s in shards for v in s.values()):
        raise ValueError(f"the weights need {len(shards)} files, more than may come home")
    for number, shard in enumerate(shards, start=1):
        with replacing(folder / f"weights-{number}.safetensors") as temporary:
            save_file(shard, temporary)
    for old in folder.glob("weights-*.safetensors"):
        if int(old.stem.split("-")[1]) > len(shards):
            old.unlink()
    return len(shards)


def kept_weights(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    """What :func:`keep_weights` wrote, in single precision."""
    parts: dict[str, dict] = {}
    for path in sorted(folder.glob("weights-*.safetensors")):
        for name, value in load_file(path).items():
            part, _, key = name.partition(".")
            value = value.float() if value.is_floating_point() else value
            parts.setdefault(part, {})[key] = value
    return parts


# ---------------------------------------------------------------- the run


def parts() -> dict[str, Part]:
    """By name, the most valuable first; imported late, so that a broken part harms no other."""
    import gpu_parts
    import gpu_training

    return {
        "smoke": Part(60, gpu_parts.smoke),
        "cifar": Part(180, gpu_training.cifar),
        "utilisation": Part(100, gpu_parts.utilisation),
        "probing": Part(60, gpu_parts.probing),
        "notebook04": Part(150, gpu_parts.notebook04),
        "deep": Part(180, gpu_training.deep),
    }


def run(job: Job, wanted: dict[str, Part], command: str, end: float) -> dict:
    """Runs what fits and is not done; returns the content of ``results.json``."""
    path = job.out / "results.json"
    results = json.loads(path.read_text()) if path.is_file() else {"parts": {}}
    results = {**header(command), "rehearsal": job.tiny, "parts": results["parts"]}
    todo = [n for n in wanted if results["parts"].get(n, {}).get("status") != "done"]
    for n in [n for n in wanted if n not in todo]:
        print(f"{n}: done before", flush=True)
    for place, name in enumerate(todo):
        left = end - time.monotonic()
        if left < wanted[name].least:
            why = f"needs {wanted[name].least:.0f} seconds, {max(0, left):.0f} are left"
            results["parts"].setdefault(name, {"status": "skipped", "why": why})
        else:
            later = reserved(left - wanted[name].least, [wanted[n] for n in todo[place + 1 :]])
            job.end = end - later
            results["parts"][name] = one_part(
                job, wanted[name], lambda: write_json(path, json_ready(results))
            )
        entry = results["parts"][name]
        said = entry.get("why") or entry.get("error") or f"{entry['seconds']:.0f} s"
        print(f"{name}: {entry['status']}, {said}", flush=True)
        write_json(path, json_ready(results))
    write_json(path, json_ready(results))
    return results


def reserved(left: float, later: list[Part]) -> float:
    """Seconds that are kept for later parts: for each that still fits, the least that it needs."""
    kept = 0.0
    for part in later:
        if kept + part.least <= left:
            kept += part.least
    return kept


def one_part(job: Job, part: Part, write: Callable[[], None]) -> dict:
    """A part's entry: its status, seconds, and what it found up to where it came."""
    began = time.monotonic()
    job.found = {}
    entry = {"status": "running"}

    def publish() -> None:
        entry.update(job.found, seconds=round(time.monotonic() - began, 1))
        write()

    job.publish = publish
    try:
        part.work(job)
        status = {"status": "done"}
    except Exception as error:  # whatever it is, the other parts must not be lost
        lines = traceback.format_exc().splitlines()
        status = {
            "status": "failed",
            "error": f"{type(error).__name__}: {error}",
            "trace": lines[-12:],
        }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return {**status, "seconds": round(time.monotonic() - began, 1), **job.found}


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    names = ("smoke", "cifar", "utilisation", "probing", "notebook04", "deep")
    add("--parts", nargs="+", choices=names, help="default: all")
    add("--cifar", type=Path, help="an archive or a folder; without one, what torchvision has")
    add("--budget", type=float, help="seconds for everything; default: no limit")
    add("--out", type=Path, default=Path("runs/one_gpu"))
    add("--continue", type=Path, dest="earlier", metavar="FOLDER", help="of an earlier run")
    add("--seconds", type=float, nargs=2, metavar=("MAE", "REFINE"), help="lengths for cifar")
    add("--device", help="default: cuda if there is one, else cpu")
    add("--tiny", action="store_true", help="a rehearsal of seconds on a CPU; its figures are none")
    return parser.parse_args()


def main() -> int:
    began = time.monotonic()
    args = parsed()
    device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    if device.type == "cpu" and not args.tiny:
        raise SystemExit("no GPU here: --tiny rehearses on a CPU, the tests do so too")
    if args.tiny:
        torch._dynamo.config.disable = True  # compiling takes longer than all of the rehearsal
    torch.set_float32_matmul_precision("high")
    chosen = {n: p for n, p in parts().items() if not args.parts or n in args.parts}
    if args.tiny:
        for part in chosen.values():
            part.least = 1
    args.out.mkdir(parents=True, exist_ok=True)
    command = "python benchmarks/one_gpu.py --parts " + " ".join(chosen)
    command += f" --budget {args.budget:.0f}" if args.budget else ""
    with tempfile.TemporaryDirectory() as scratch:
        job = Job(
            device,
            args.tiny,
            args.cifar,
            args.earlier,
            args.out,
            Path(scratch),
            tuple(args.seconds) if args.seconds else None,
        )
        end = began + args.budget if args.budget else math.inf
        results = run(job, chosen, command, end)
    print(f"wrote {args.out}")
    return int(any(results["parts"][n]["status"] == "failed" for n in chosen))


if __name__ == "__main__":
    raise SystemExit(main())
