"""The command line: ``refiner course`` and its sisters.

One function adds a subcommand, one runs it; what is heavy is imported where it runs, so that
``refiner --help`` is instant.
"""

from __future__ import annotations

import argparse
import os
import re
import signal
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import refiner
from refiner.base.errors import UserError
from refiner.base.files import readable
from refiner.base.settings import Count, Whole, changed, in_range, parse_setting


def main(argv: list[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        0 if all went well, 1 if something that ran failed, 2 for bad input, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    if argv is None:  # names of files may hold what moves a terminal's cursor
        warnings.formatwarning = lambda text, kind, *_: readable(f"{kind.__name__}: {text}\n")
    try:
        status = args.command(args)
        sys.stdout.flush()
        return status
    except KeyboardInterrupt:
        if argv is None:  # a second one ends what still waits, and has nothing to say
            signal.signal(signal.SIGINT, lambda *_: os._exit(130))
        say("\nInterrupted.")
        return 130
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if args.command is models_command:  # `refiner models | head`: the reader has enough
            return 0
        say("refiner: the output was closed; keep it open, or send it to a file")
        return 1
    except (UserError, OSError) as error:  # all else is a bug of ours and keeps its traceback
        if args.debug:
            raise
        say(f"refiner: {sentence(error)}")
        return 2
    except (MemoryError, RuntimeError) as error:
        if args.debug or (wanted := memory_wanted(error)) is None:
            raise
        say(f"refiner: the memory does not suffice{wanted}; take fewer or smaller images at once")
        return 2


def memory_wanted(error: Exception) -> str | None:
    """How much could not be had, in words; None for another error."""
    text = str(error)
    if found := re.search(r"(?i:unable|tried) to allocate ([\d.]+ ?\w+)", text):
        return f": {found[1]} were wanted at once"
    return "" if isinstance(error, MemoryError) or "out of memory" in text else None


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    parser = argparse.ArgumentParser(prog="refiner", description=refiner.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=refiner.__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    for add in (add_course, add_pretrain, add_refine, add_probe, add_evaluate, add_models):
        add(subparsers)
    return parser


def new_command(subparsers, name: str, run: Callable, help: str, description: str) -> Callable:
    """Adds a subcommand; what it returns adds an option to it."""
    parser = subparsers.add_parser(name, help=help, description=description)
    parser.add_argument("--debug", action="store_true", help="show where an error arose")
    parser.set_defaults(command=run)

    def option(flag: str, *names: str, help: str = "", default=None, **more) -> None:
        if default is not None:
            more["default"] = default
            help += f"{'; ' if help else ''}default: {default}"
        parser.add_argument(flag, *names, help=help, **more)

    return option


NAME, FOLDER = {"metavar": "NAME"}, {"metavar": "FOLDER"}
FLAG = {"action": "store_true"}
SETTINGS = {"action": "append", "metavar": "NAME=VALUE"}
DEVICE = {"help": "default: cuda if there is one, else cpu"}


def number(metavar: str) -> dict:
    return {"type": int, "metavar": metavar}


def named(args: argparse.Namespace, *names: str) -> dict:
    """Some arguments, by name."""
    return {name: getattr(args, name) for name in names}


def say(text: str) -> None:
    """To standard error, beside the results."""
    print(readable(text), file=sys.stderr)


def sentence(error: BaseException) -> str:
    """An error's message on one line; for the system's own, what and which file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


# ---------------------------------------------------------------- course


def add_course(subparsers) -> None:
    """``refiner course``: runs the notebooks."""
    add = new_command(
        subparsers,
        "course",
        course_command,
        "run the course's notebooks and write a report",
        "Runs the notebooks, each in a fresh process, and writes a report that opens without a "
        "network. The exit status is 1 if a notebook failed.",
    )
    add("--preset", choices=("cpu", "gpu"), default="cpu", help="how big the experiments are")
    add("--only", action="append", **NAME, help="a notebook's name or number; repeatable")
    add("--out", default="runs/course", **FOLDER)
    add("--resume", **FLAG, help="keep notebooks that finished and did not change")
    add("--set", **SETTINGS, dest="parameters", help="set a notebook's parameter; repeatable")
    cell = "longest time for one cell"
    add("--timeout", type=float, default=900.0, metavar="SECONDS", help=cell)
    add("--notebooks", **FOLDER, help="default: notebooks")
    add("--write-back", **FLAG, help="store the outputs in the notebooks themselves")
    add("--status", **FLAG, help="run nothing; show which exercises you have solved")
    copies = "run nothing; make or update your own copies of the notebooks, without results"
    add("--copies", **FOLDER, help=copies)
    add("--with-outputs", **FLAG, help="with --copies: keep the stored results in them")


def course_command(args: argparse.Namespace) -> int:
    """Runs the notebooks; 1 if one failed. Not so with --status and --copies."""
    from refiner.course.exercises import status
    from refiner.course.run import run_course

    if args.copies:
        from refiner.course.copies import open_copies

        made = open_copies(args.copies, notebooks=args.notebooks, with_outputs=args.with_outputs)
        print(f"{len(made)} notebooks to work in: {made[0].parent}")
        return 0
    if args.status:
        print(status(args.notebooks))
        return 0
    try:
        options = named(args, "preset", "only", "resume", "timeout", "write_back")
        parameters = dict(map(parse_setting, args.parameters or ()))
        summary = run_course(args.notebooks, args.out, parameters=parameters, **options)
    except KeyboardInterrupt:
        say("\nFinished notebooks are kept; go on with the same command and --resume.")
        raise
    entries = [summary["notebooks"][name] for name in summary["selected"]]
    return int(any(entry["status"] != "ok" for entry in entries))


# ---------------------------------------------------------------- pretrain, refine, models


def _add_training(add: Callable, out: str) -> None:
    data = (
        "an image set or a folder of images; refine also takes tar shards, as "
        "'shards-{000..010}.tar' in quotes, and hf:NAME of a Hugging Face set"
    )
    n = (
        "how many images; default: all (of a stream: how many it holds, for the plan). Say "
        "--images under accelerate launch or torchrun, which take --n for their own"
    )
    every = "steps between saved states; default: 100, if the last was a minute ago"
    add("--data", default="toybox", **NAME, help=data)
    add("--n", "--images", **number("IMAGES"), dest="n", help=n)
    add("--out", default=out, **FOLDER)
    add("--resume", **FLAG, help="go on from the state in --out")
    add("--device", **DEVICE)
    add("--save-every", **number("STEPS"), help=every)
    add("--set", **SETTINGS, dest="settings", help="change a value of the recipe; repeatable")


def add_pretrain(subparsers) -> None:
    """``refiner pretrain``: trains a masked autoencoder."""
    add = new_command(
        subparsers,
        "pretrain",
        pretrain_command,
        "train a masked autoencoder",
        "Trains a masked autoencoder with the recipe of the embedded checkpoint. Ctrl-C loses a "
        "minute or two; go on with --resume.",
    )
    start = "a checkpoint to train on: its encoder, and its decoder where it has the recipe's shape"
    add("--start", **NAME, help=start)
    _add_training(add, "runs/mae")


def pretrain_command(args: argparse.Namespace) -> int:
    """Trains and writes model, decoder, card and history."""
    from refiner.base.parallel import check_device
    from refiner.images.load import load_images
    from refiner.models.mae import MAERecipe
    from refiner.training.pretraining import pretrain, recipe_for, start_from

    check_device(args.device)
    recipe = changed(recipe_for(args.start) if args.start else MAERecipe(), args.settings or [])
    start = start_from(args.start, recipe) if args.start else None
    check_out(args.out, args.start)
    images = load_images(args.data, n=args.n, size=recipe.size, channels=recipe.channels)
    run = resumable(pretrain, images, recipe=recipe, start=start, **training_options(args))
    last = run.history[-1]
    print(f"{args.out}: loss {last['loss']:.4f} after {last['seconds'] / 60:.1f} minutes")
    return 0


def add_refine(subparsers) -> None:
    """``refiner refine``: heads and NNA on a masked-image model."""
    add = new_command(
        subparsers,
        "refine",
        refine_command,
        "refine a masked-image model with ID heads and NNA",
        "Refines a model with heads on its last blocks and Nearest Neighbor Alignment. First it "
        "says what it will do, how long that takes and how much memory it needs. The folder that "
        "it writes opens with refiner and with timm. Several GPUs: `accelerate launch -m refiner "
        "refine ...`; several processes without a GPU: `torchrun --nproc-per-node 2 -m refiner "
        "refine ...`.",
    )
    presets = ("cpu", "labs", "gpu", "fitted", "L/16", "H/14", "2B/14")
    what = "fitted scales the paper's recipe to model and data; the sizes are the paper's recipes"
    every = "hold a tenth of the labelled images out and follow their k-NN accuracy"
    add("--model", default="mae_toybox", **NAME, help="a model's name or folder")
    add("--preset", choices=presets, default="cpu", help=what)
    _add_training(add, "runs/refined")
    add("--plan", **FLAG, help="only say what would be done")
    add("--knn-every", **number("STEPS"), help=every)
    by = "batches of one group each: a factor such as lab, class, or parent for images' folders"
    add("--group-by", **NAME, help=by)
    add("--tensorboard", **FLAG, help="write event files to --out as well")


def refine_command(args: argparse.Namespace) -> int:
    """Refines and writes model, heads, card and history."""
    from refiner.base import parallel
    from refiner.base.tensors import sides
    from refiner.images.channels import fit_channels
    from refiner.models.encoders import channels_of
    from refiner.models.load import load_model
    from refiner.training import watch
    from refiner.training.planning import plan
    from refiner.training.recipe import IMAGENET, refine_preset
    from refiner.training.refining import refine

    parallel.join(args.device)
    model = load_model(args.model)
    size = model.refiner_card["preprocessing"]["size"]
    # Errors of a setting come before the images are read; any large number of them will do.
    first = refine_preset(args.preset, model, size, IMAGENET, args.settings or [])
    check_out(args.out, args.model)
    options = training_options(args)
    smallest = min(min(sides(view.size)) for view in first.views)
    images = refinable_images(args, size, smallest, channels_of(model))
    model = fit_channels(model, images)
    if args.knn_every:
        images, held_out = images.holdout(0.1)
        options["evaluate"] = watch.online_knn(images[: min(4096, len(images))], held_out)
        options["evaluate_every"] = args.knn_every
    recipe = refine_preset(args.preset, model, size, images, args.settings or [])
    if args.plan or not args.resume:
        grouped = {"groups": args.group_by, "device": args.device}
        ahead = str(plan(model, images, recipe=recipe, **grouped))
        if parallel.rank() == 0:
            print(ahead, flush=True)
    if args.plan:
        return 0
    if args.tensorboard and parallel.rank() == 0:
        options["watch"] = [watch.TensorBoard(Path(args.out) / "tensorboard")]
    run = resumable(refine, model, images, recipe=recipe, groups=args.group_by, **options)
    if parallel.rank() == 0:
        print(f"{args.out}: refined in {run.history[-1]['seconds'] / 60:.1f} minutes")
        if run.verdict:
            print(run.verdict)
    return 0


def refinable_images(args: argparse.Namespace, size, smallest: int, channels: int):
    """An image set, or a stream for tar shards and ``hf:`` names.

    Args:
        args: the command line.
        size: to which images are resized, pixels.
        smallest: size of the smallest view, which the images need to have.
        channels: as how many a folder's pictures are read.

    Raises:
        ValueError: for images that are too small, and a stream that shall be evaluated.
    """
    from refiner.images.load import check_source, is_stream, load_images
    from refiner.images.streams import open_stream

    if not is_stream(args.data):
        check_source(args.data)
        check_sides(args.data, size if isinstance(size, int) else min(size), smallest)
        parent = "parent" if args.group_by == "parent" else None
        form = {"size": size, "channels": channels}
        return load_images(args.data, n=args.n, **form, group_by=parent)
    if args.knn_every:
        raise UserError("a stream has no labels to hold out; leave --knn-every out")
    return open_stream(args.data, n=args.n, size=size)


def check_sides(folder: str, size: int, smallest: int) -> None:
    """Looks at some image files' sizes; named sets are left alone.

    Raises:
        ValueError: when most are smaller than the smallest view.
    """
    from refiner.images.folders import shorter_sides

    sides = sorted(shorter_sides(Path(folder)))
    if not sides or sides[len(sides) // 2] >= size:
        return
    side = sides[len(sides) // 2]
    if side < smallest:
        raise UserError(
            f"most images of {folder} have {side} pixels a side, fewer than a view of {smallest}; "
            "give larger images, or a model and a recipe for small ones"
        )
    say(f"Most images of {folder} have {side} pixels a side and are enlarged to {size}.")


def add_probe(subparsers) -> None:
    """``refiner probe``: what every block of a model knows."""
    add = new_command(
        subparsers,
        "probe",
        probe_command,
        "measure every block of one or several models",
        "Says which block, tokens and transform to use, and measures every block: k-NN, linear "
        "probes, probes with few labels, clusters, measures without labels and, where they are "
        "known, factors of the images. Writes report.json, figures and index.html, a page that "
        "opens without a network.",
    )
    model = "a model's name or folder; repeat it to compare; default: mae_toybox"
    parts = "only these of reading, knn, linear, low_shot, clustering, measures, factors, attentive"
    shares = "shares of the labels, such as 0.01 0.1; default: none"
    add("--model", action="append", **NAME, dest="models", help=model)
    add("--data", default="toybox", **NAME, help="an image set or a folder")
    add("--out", default="runs/probe", **FOLDER)
    add("--n", **number("IMAGES"), help="how many train images; default: all")
    add("--n-test", **number("IMAGES"), help="how many test images; default: all")
    enough = "only the reading, on as many images as about so many minutes a model allow"
    add("--minutes", type=float, metavar="MINUTES", help=enough)
    add("--parts", nargs="+", metavar="PART", help=parts)
    by = "what the reading is chosen by, on train images: knn, linear or few (labels); default: knn"
    add("--by", metavar="OBJECTIVE", help=by)
    more = "also train attentive probes (EP), and write a row for their public benchmark; minutes"
    add("--attentive", **FLAG, help=more)
    add("--k", **number("K"), nargs="+", help="neighbors that vote; default: 1 10 20")
    add("--shots", **number("N"), nargs="+", help="labels a class; default: 1 2 5 10")
    add("--fractions", type=float, nargs="+", metavar="SHARE", help=shares)
    add("--draws", **number("N"), help="random sets of few labels; default: 10")
    add("--seed", **number("N"), help="default: 0")
    add("--resume", **FLAG, help="keep the parts that are done in --out")
    add("--device", **DEVICE)


def probe_command(args: argparse.Namespace) -> int:
    """Probes and writes the report."""
    from refiner.base.parallel import check_device
    from refiner.evaluation.probe import probe, settings_for

    check_device(args.device)
    names = ("parts", "by", "k", "shots", "fractions", "draws", "seed")
    given = {name: value for name in names if (value := getattr(args, name)) is not None}
    given = {name: tuple(v) if isinstance(v, list) else v for name, v in given.items()}
    if args.attentive:
        usual = settings_for(args.minutes).parts
        given["parts"] = tuple(dict.fromkeys((*given.get("parts", usual), "attentive")))
    check_out(args.out)
    options = named(args, "data", "out", "n", "n_test", "minutes", "resume", "device")
    settings = settings_for(args.minutes, **given)
    report = resumable(probe, args.models or ["mae_toybox"], **options, settings=settings)
    for name, found in report["models"].items():
        if "sentence" in (told := found.get("reading", {})):
            name = f"{name}: " if len(report["models"]) > 1 else ""
            print(f"{name}{told['sentence']}\n\n{told['code']}\n")
    for sentence in report["left_out"]:
        print(readable(f"left out: {sentence}"))
    print(f"{Path(args.out) / 'index.html'}: the report")
    return 0


def add_evaluate(subparsers) -> None:
    """``refiner evaluate``: before and after under every protocol."""
    add = new_command(
        subparsers,
        "evaluate",
        evaluate_command,
        "measure one or two models under every protocol of the paper",
        "k-NN, linear probes, few labels, clusters, corrupted images, shifted factors, dense "
        "labels, fine-tuning and transfer. Every row is written to report.json as soon as it is "
        "done; at the end index.html shows tables and figures. The exit status is 1 if a row "
        "failed; --resume tries it again.",
    )
    dense = "images and annotations in ADE20K's form; default: Toybox's own masks"
    much = "how much is measured; default: gpu where there is one, else cpu"
    rows = (
        "only these of knn, linear, few, clusters, corruptions, shifts, segmentation, finetune, "
        "finetune_few, transfer"
    )
    change = "change a value of the preset, such as n=1000; repeatable"
    add("--before", default="mae_toybox", **NAME, help="a model's name or folder")
    add("--after", **NAME, help="another to compare with it")
    add("--data", default="toybox", **NAME, help="an image set or a folder, with labels")
    add("--transfer", nargs="+", **NAME, help="more image sets or folders")
    add("--dense", **FOLDER, help=dense)
    add("--out", default="runs/evaluate", **FOLDER)
    add("--preset", choices=("cpu", "gpu"), help=much)
    add("--rows", nargs="+", metavar="ROW", help=rows)
    add("--set", **SETTINGS, dest="settings", help=change)
    add("--resume", **FLAG, help="keep the rows that are done in --out")
    add("--device", **DEVICE)


def evaluate_command(args: argparse.Namespace) -> int:
    """Evaluates and writes the report; 1 if a row failed."""
    import torch

    from refiner.base.parallel import check_device
    from refiner.evaluation.compare import evaluate
    from refiner.evaluation.protocols import EvaluationSettings
    from refiner.evaluation.report import findings

    check_device(args.device)
    on_gpu = (args.device or "cuda").startswith("cuda") and torch.cuda.is_available()
    preset = getattr(EvaluationSettings, args.preset or ("gpu" if on_gpu else "cpu"))()
    settings = changed(preset, args.settings or [])
    check_out(args.out)
    names = ("before", "after", "data", "out", "dense", "rows", "resume", "device")
    options = named(args, *names) | {"transfers": args.transfer or [], "settings": settings}
    report = resumable(evaluate, **options)
    for name, reason in report["left_out"].items():
        print(readable(f"left out: {name}: {reason}"))
    for name, sides in report["failed"].items():
        for side, reason in sides.items():
            say(f"failed: {name}, {side}: {reason}")
    print(readable("\n".join(findings(report))))
    print(f"{Path(args.out) / 'index.html'}: the report")
    return int(bool(report["failed"]))


def add_models(subparsers) -> None:
    """``refiner models``: what load_model takes."""
    add = new_command(
        subparsers,
        "models",
        models_command,
        "list the models that can be named",
        "Lists the embedded checkpoints and the catalogue of masked-image models. Any of these "
        "names works where a model is asked for; so do other names of timm, folders, files in the "
        "formats of the listed repositories, and their addresses.",
    )
    words = "only models whose name, method, class or source holds every word"
    add("filter", nargs="*", metavar="WORD", help=words)
    add("--json", **FLAG, help="all that is known of each, as JSON")


def models_command(args: argparse.Namespace) -> int:
    """Prints the embedded checkpoints and the catalogue.

    Raises:
        ValueError: when nothing has the words that were asked for.
    """
    from refiner.models.catalogue import search, table

    words = " ".join(args.filter)
    entries = search(words)
    if args.json:
        import json

        print(json.dumps([entry.as_dict() for entry in entries], indent=1))
        return 0
    if not args.filter:
        print_embedded()
    elif not entries:
        raise UserError(f"no model of the catalogue has {words!r}; `refiner models` lists all")
    print(table(entries))
    print(
        "\nGB: the encoder in float32, files with a decoder or optimizer are larger. labels: also "
        "trained with labels.\nRefining was published for training on masked images. Weights are "
        "fetched when a model is first loaded."
    )
    return 0


def print_embedded() -> None:
    """One line for each checkpoint that comes with the course."""
    from refiner.models.load import embedded_models, read_card

    for name in embedded_models():
        card = read_card(name)
        shape = ", ".join(f"{key} {value}" for key, value in card["architecture"].items())
        print(f"{name}: {card['method']}; {shape}")
    print()


def training_options(args: argparse.Namespace) -> dict:
    """What both trainings take beside data and recipe.

    Raises:
        ValueError: for a number of steps below 1.
    """
    options = named(args, "out", "resume", "device")
    in_range("--knn-every", getattr(args, "knn_every", None), Whole | None)
    options["save_every"] = in_range("--save-every", args.save_every, Count | None)
    return options


def check_out(out: str, *models: str | None) -> None:
    """Makes sure, before the work starts and without making it, that a folder can be written.

    Args:
        out: the folder.
        models: names or folders of models that must not be overwritten.

    Raises:
        UserError: for the folder of one of the models.
        OSError: naming the place that is in the way or not writable.
    """
    place = Path(out).resolve()
    for model in filter(None, models):
        if place in (found := Path(model).resolve(), found.parent) and found.exists():
            raise UserError(f"--out is {model} itself, which would be overwritten; choose another")
    while not place.exists():
        place = place.parent
    if not place.is_dir():
        raise NotADirectoryError(f"{place} is a file, not a folder; choose another --out")
    if not os.access(place, os.W_OK):
        raise PermissionError(f"no permission to write to {place}; choose another --out")


def resumable(train, *args, **kwargs):
    """Runs a training; after Ctrl-C, says how to go on."""
    try:
        return train(*args, **kwargs)
    except KeyboardInterrupt:
        out = kwargs["out"]
        say(f"\nThe last saved state is in {out}; go on with the same command and --resume.")
        raise


if __name__ == "__main__":
    sys.exit(main())
