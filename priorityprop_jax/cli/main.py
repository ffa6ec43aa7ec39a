"""The command `priorityprop`: its subcommands, and what it says where something is wrong."""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import priorityprop_jax


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code, 1 where something failed and 130 after Ctrl-C."""
    return ended(lambda: _run(argv))


def ended(run: Callable[[], int]) -> int:
    """Runs a command; Ctrl-C ends it in a line, and a pipe that nobody reads on in silence."""
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:  # as after >&-
                sys.stdout.flush()  # not when Python ends, where nothing catches the error
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    except BrokenPipeError:
        if sys.stdout is not None:  # for what is left to write
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # as shells tell of SIGPIPE


def _run(argv: Sequence[str] | None) -> int:
    # Here, as importing takes seconds, in which Ctrl-C may come.
    from priorityprop_jax.cli import models, report
    from priorityprop_jax.cli.runs import Failure

    # argparse exits by itself, with 2, where an argument is wrong
    arguments = _parser().parse_args(argv)
    if arguments.run not in (report.run, models.run):
        keep_programs()
    try:
        return arguments.run(arguments)
    except BrokenPipeError:
        raise
    # What a user can mend; anything else is a bug, and shows where it is.
    except (Failure, FloatingPointError, OSError, ImportError) as error:
        if arguments.traceback:
            traceback.print_exc()
        message = str(error)
        if isinstance(error, OSError) and error.strerror:
            message = error.strerror + (f" ({error.filename})" if error.filename else "")
        return _fail(message, error.code if isinstance(error, Failure) else 1)


def keep_programs() -> None:
    """What takes long to compile is kept from run to run."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ and importlib.util.find_spec("pooch"):
        import jax
        import pooch

        folder = pooch.os_cache("priorityprop_jax") / "programs"
        jax.config.update("jax_compilation_cache_dir", os.fspath(folder))


def _fail(message: str, code: int) -> int:
    print(f"priorityprop: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Help(argparse.HelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        given = type(action.default) in (int, str, float) or isinstance(action.default, Path)
        hidden = not given or action.default == argparse.SUPPRESS or "default" in text
        return text if hidden else f"{text} (default: %(default)s)"


def _parser() -> argparse.ArgumentParser:
    from priorityprop_jax.cli import (
        finetune,
        generate,
        meshes,
        models,
        plan,
        predict,
        report,
        runs,
        train,
    )

    parser = argparse.ArgumentParser(
        prog="priorityprop", description="Spend backprop where it matters: budgeted training."
    )
    parser.add_argument(
        "--version", action="version", version=f"priorityprop {priorityprop_jax.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, finetune, predict, generate, models, plan, report):
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.TEXT[0].lower() + command.TEXT[1:].partition(".")[0],
            description=command.TEXT,
            formatter_class=_Help,
        )
        own.add_argument(
            "--traceback", action="store_true", help="where something fails, show where"
        )
        for name, option in getattr(command, "POSITIONAL", {}).items():
            own.add_argument(name, **option)
        places = runs.PLACES if command in (train, finetune) else {}
        machines = meshes.PROCESSES if command is finetune else {}
        for name, option in {**command.OPTIONS, **places, **machines}.items():
            short = ["--lr"] if name == "learning_rate" else []
            own.add_argument(f"--{name.replace('_', '-')}", *short, **option)
        own.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
