"""The command line: ``refiner course`` and its sisters.

One function adds a subcommand, one runs it; what is heavy is imported where it runs, so that
``refiner --help`` is instant.
"""

from __future__ import annotations

import argparse
import ast
import sys
import traceback
from pathlib import Path

import refiner

USER_ERRORS = (ValueError, OSError, FloatingPointError, ModuleNotFoundError)


def main(argv: list[str] | None = None) -> int:
    """Runs a command line.

    Returns:
        0 if all went well, 1 if something that ran failed, 2 for bad input, 130 after Ctrl-C.
    """
    args = build_parser().parse_args(argv)
    try:
        return args.command(args)
    except KeyboardInterrupt:
        print("\nInterrupted.", file=sys.stderr)
        return 130
    except USER_ERRORS as error:
        if getattr(args, "debug", False) or not is_for_user(error):
            raise
        print(f"refiner: {sentence(error)}", file=sys.stderr)
        return 2


def build_parser() -> argparse.ArgumentParser:
    """The parser with every subcommand."""
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show where an error arose")
    parser = argparse.ArgumentParser(prog="refiner", description=refiner.__doc__.split("\n")[0])
    parser.add_argument("--version", action="version", version=refiner.__version__)
    subparsers = parser.add_subparsers(title="commands", metavar="command", required=True)
    add_course(subparsers, common)
    return parser


def is_for_user(error: BaseException) -> bool:
    """Whether an error is a user's to mend: files, and what this library raises itself.

    A ValueError from inside another library is a bug of ours and keeps its traceback.
    """
    last = traceback.extract_tb(error.__traceback__)[-1].filename
    return isinstance(error, OSError) or Path(last).parent == Path(__file__).parent


def sentence(error: BaseException) -> str:
    """An error's message on one line; for the system's own, what and which file."""
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split())


# ---------------------------------------------------------------- course


def add_course(subparsers, common: argparse.ArgumentParser) -> None:
    """``refiner course``: runs the notebooks."""
    parser = subparsers.add_parser(
        "course",
        parents=[common],
        help="run the course's notebooks and write a report",
        description="Runs the notebooks, each in a fresh process, and writes a report that opens "
        "without a network. The exit status is 1 if a notebook failed.",
    )
    add = parser.add_argument
    add("--preset", choices=("cpu", "gpu"), default="cpu", help="how big the experiments are")
    add("--only", action="append", metavar="NAME", help="a notebook's name or number; repeatable")
    add("--out", default="runs/course", metavar="FOLDER", help="default: %(default)s")
    add("--resume", action="store_true", help="keep notebooks that finished and did not change")
    add("--set", action="append", default=[], metavar="NAME=VALUE", dest="parameters",
        help="set a notebook's parameter; repeatable")  # fmt: skip
    add("--timeout", type=float, default=900.0, metavar="SECONDS",
        help="longest time for one cell; default: %(default)g")  # fmt: skip
    add("--notebooks", metavar="FOLDER", help="default: notebooks")
    add("--write-back", action="store_true",
        help="store the outputs in the notebooks themselves")  # fmt: skip
    parser.set_defaults(command=course_command)


def course_command(args: argparse.Namespace) -> int:
    """Runs the notebooks; 1 if one failed."""
    from refiner.course import run_course

    try:
        summary = run_course(
            args.notebooks,
            args.out,
            preset=args.preset,
            only=args.only,
            parameters=dict(map(parse_setting, args.parameters)),
            resume=args.resume,
            timeout=args.timeout,
            write_back=args.write_back,
        )
    except KeyboardInterrupt:
        print("\nFinished notebooks are kept; go on with the same command and --resume.",
              file=sys.stderr)  # fmt: skip
        raise
    entries = [summary["notebooks"][name] for name in summary["selected"]]
    return int(any(entry["status"] != "ok" for entry in entries))


def parse_setting(text: str) -> tuple[str, object]:
    """``name=value`` → name and value; what is no Python literal is taken as a text.

    Raises:
        ValueError: without an equal sign or a name.
    """
    name, equal, value = text.partition("=")
    if not equal or not name.isidentifier():
        raise ValueError(f"--set needs NAME=VALUE, got {text!r}")
    try:
        return name, ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return name, value


if __name__ == "__main__":
    sys.exit(main())
