"""The command `priorityprop`: its subcommands, and what it says where something is wrong."""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

import priorityprop_jax
from priorityprop_jax.cli import finetune, report, train
from priorityprop_jax.cli.runs import Failure, add_options


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
      argv: arguments without the program's name; those of the process by default.

    Returns:
      The exit code: 0; 1 where something failed; 2 for wrong arguments; 130 after Ctrl-C.
    """
    # argparse exits by itself, with 2, where an argument is wrong
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except KeyboardInterrupt:
        return _fail("interrupted", 130)
    # What a user can mend; anything else is a bug, and shows where it is.
    except (Failure, FloatingPointError, OSError, ImportError) as error:
        if arguments.traceback:
            traceback.print_exc()
        return _fail(_message(error), error.code if isinstance(error, Failure) else 1)


def _message(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror} ({error.filename})" if error.filename else error.strerror
    return str(error)


def _fail(message: str, code: int = 1) -> int:
    print(f"priorityprop: {' '.join(message.split())}", file=sys.stderr)
    return code


class _Help(argparse.HelpFormatter):
    """Shows the defaults of options that have one."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        hidden = action.default in (None, False, argparse.SUPPRESS) or "default" in text
        return text if hidden else f"{text} (default: %(default)s)"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="priorityprop", description="Spend backprop where it matters: budgeted training."
    )
    parser.add_argument(
        "--version", action="version", version=f"priorityprop {priorityprop_jax.__version__}"
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in (train, finetune, report):
        own = commands.add_parser(
            command.__name__.rpartition(".")[2],
            help=command.HELP,
            description=command.DESCRIPTION,
            formatter_class=_Help,
        )
        own.add_argument(
            "--traceback", action="store_true", help="where something fails, show where"
        )
        if command is report:
            own.add_argument("directory", metavar="RUN", type=Path, help="folder of the run")
        else:
            add_options(own, command.OPTIONS)
        own.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
