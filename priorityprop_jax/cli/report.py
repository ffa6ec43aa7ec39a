"""The command `priorityprop report`: what a finished run has printed, again."""

from __future__ import annotations

import argparse
import json

from priorityprop_jax.cli import finetune, train
from priorityprop_jax.cli.runs import Failure, command_of

HELP = "print a finished run again"
DESCRIPTION = "Prints what a finished run has printed at its end."


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    directory = arguments.directory
    path = directory / "report.json"
    if not path.exists():
        if (directory / "config.json").exists():
            again = f"priorityprop {command_of(directory)} --resume {directory}"
            raise Failure(f"{directory} is not finished: {again}")
        raise Failure(f"{directory} is not a run: it has no report.json")
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        command = {"train": train, "finetune": finetune}[record["command"]]
        print(command.report(record))
    except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        raise Failure(f"{path} is damaged ({error!r}); train again") from error
    return 0
