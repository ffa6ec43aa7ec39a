"""Another process, such as one with PyTorch, that runs programs in turn with a benchmark."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Other:
    """The other process, and what it can run."""

    def __init__(self, *command: str) -> None:
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **asked: Any) -> dict[str, Any]:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(asked) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            raise RuntimeError(f"{self.process.args} ended: see what it printed")
        return json.loads(line)

    def runners(self, case: dict[str, Any]) -> dict[str, Callable[[], float]]:
        """Programs of a case by their names; each runs once and returns its seconds."""

        def one(name: str) -> Callable[[], float]:
            return lambda: self.ask(run=name)["seconds"]

        return {name: one(name) for name in self.ask(case=case)["runs"]}

    def close(self) -> None:
        """Ends it."""
        with self.process:
            self.process.kill()


def torch(python: str, script: str, threads: int) -> Other:
    """An interpreter that has PyTorch, which this project's environments do not need.

    It runs a script beside this file that answers lines.
    """
    return Other(python, str(Path(__file__).parent / script), str(threads))
