"""What the subcommands of `priorityprop` share: wrong options, a run's folder, its tables."""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from priorityprop_jax.cli.tasks import Task
    from priorityprop_jax.training.trainer import History, PriorityPropTrainer

RUNS = Path("runs")

Config = TypeVar("Config")


class Failure(Exception):
    """What a user can mend: one line, and the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


# Options.


def whole(least: int) -> Callable[[str], int]:
    """A parser of whole numbers from `least` on, for argparse."""

    def parse(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if not least <= value < 2**31:
            raise argparse.ArgumentTypeError(f"{text!r} is not a whole number from {least} on")
        return value

    return parse


def rate(text: str) -> float:
    """A parser of finite numbers above 0, for argparse."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return value


# A run's folder.


def new_directory(name: str) -> Path:
    """Makes `runs/NAME-1`, or the first number after that which is free."""
    for number in itertools.count(1):
        directory = RUNS / f"{name}-{number}"
        try:
            directory.mkdir(parents=True)
        except FileExistsError:
            continue
        return directory
    raise AssertionError("unreachable")


def read_config(kind: Callable[..., Config], directory: Path, command: str) -> Config:
    """Reads `config.json`.

    Args:
      kind: made of what is in the file; raises a ValueError or TypeError if that is damaged.
      directory: of the run.
      command: the subcommand that asks: only its own runs are right.

    Returns:
      The `kind`.

    Raises:
      Failure: there is no such run.
    """
    path = directory / "config.json"
    if not path.exists():
        raise Failure(f"{directory} is not a run: it has no config.json")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise TypeError("not a JSON object")
        owner = values.pop("command", "train")
        if owner == command:
            return kind(**values)
    except (ValueError, TypeError) as error:
        raise Failure(f"{path} is damaged ({error}); start a new run") from error
    raise Failure(f"{directory} is a run of {owner}: priorityprop {owner} --resume {directory}")


def command_of(directory: Path) -> str:
    """The subcommand that made a run, as far as its `config.json` tells."""
    try:
        values = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        return "finetune" if values.get("command") == "finetune" else "train"
    except (OSError, ValueError, AttributeError):
        return "train"


def has_checkpoint(directory: Path) -> bool:
    """Whether a trainer has saved to this folder."""
    return directory.is_dir() and any(path.name.isdecimal() for path in directory.iterdir())


def write(path: Path, text: str) -> None:
    """Writes all or nothing: to a temporary name in the same folder, then renamed."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


class Metrics:
    """metrics.jsonl, one record a line; what a resumed run does again replaces the old lines.

    Args:
      path: of the file.
      arm: put into every record; lines of other arms stay.
    """

    def __init__(self, path: Path, arm: str) -> None:
        self.path = path
        self.arm = arm
        self.file: Any = None

    def __enter__(self) -> Metrics:
        return self

    def __exit__(self, *_: Any) -> None:
        if self.file is not None:
            self.file.close()

    def write(self, record: dict[str, Any]) -> None:
        """Adds a record of a trainer's `log`."""
        if self.file is None:
            self._drop_from(record)
            self.file = self.path.open("a", encoding="utf-8")
        self.file.write(json.dumps({"arm": self.arm, **record}) + "\n")
        self.file.flush()

    def _drop_from(self, first: dict[str, Any]) -> None:
        def place(record):  # a step is entered before its evaluation
            return record["step"], record["kind"] == "eval"

        kept = []
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
                try:
                    old = json.loads(line)
                except json.JSONDecodeError:
                    continue  # the last line of a run that was killed
                if old["arm"] != self.arm or place(old) < place(first):
                    kept.append(line)
        write(self.path, "".join(kept))


# Results.


def result(trainer: PriorityPropTrainer, history: History, task: Task) -> dict[str, Any]:
    """What a finished training has come to, ready for JSON; evaluates on the test data."""
    best = max(history.evals, key=lambda record: record[task.metric])
    test = {} if task.test_data is None else trainer.evaluate(task.test_data)
    return {
        "steps": len(history.steps),
        "updates": trainer.get_priority_report().total,
        "train_loss": history.steps[-1]["loss"],
        "validation_loss": history.evals[-1]["loss"],
        "validation": history.evals[-1][task.metric],
        "best_validation": best[task.metric],
        "best_epoch": best["epoch"],
        "test": test.get(task.metric),
        "seconds": sum(record["seconds"] for record in history.steps),
        "compile_seconds": history.compile_seconds,
    }
