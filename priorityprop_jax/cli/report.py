"""The command `priorityprop report`: what a finished run has printed, again."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from priorityprop_jax.cli import finetune, train
from priorityprop_jax.cli.runs import Failure, read_config, reading

TEXT = "Prints again what a finished run has printed at its end."
POSITIONAL: dict[str, dict[str, Any]] = {
    "directory": {"metavar": "RUN", "type": Path, "help": "folder of the run"}
}
OPTIONS: dict[str, dict[str, Any]] = {}


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    directory = arguments.directory
    path = directory / "report.json"
    if not path.exists():
        owner, _ = read_config(directory)
        raise Failure(f"{directory} is not finished: priorityprop {owner} --resume {directory}")
    with reading(path, "train again") as record:
        print({"train": train, "finetune": finetune}[record["command"]].report(record))
    return 0
