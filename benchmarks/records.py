"""What the benchmarks' results have in common: where they were measured, and their files."""

from __future__ import annotations

import datetime
import json
import os
import platform
from pathlib import Path

import jax
import optax

import priorityprop_jax

RESULTS = Path(__file__).parent / "results"


def about(benchmark: str, load: tuple[float, ...] | None = None) -> dict:
    """The machine, the versions and the date; the load before (as given) and now."""
    return {
        "benchmark": benchmark,
        "date": datetime.date.today().isoformat(),
        "device": jax.devices()[0].device_kind,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load_before_and_after": [load, os.getloadavg()],
        "versions": {
            "priorityprop_jax": priorityprop_jax.__version__,
            "jax": jax.__version__,
            "optax": optax.__version__,
            "python": platform.python_version(),
        },
    }


def write(path: Path, record: dict) -> None:
    """All or nothing: to a temporary name, then renamed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    temporary.replace(path)


def add_line(path: Path, run: dict) -> None:
    """Adds a run that is finished, in one write: a killed process leaves at most half a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(run) + "\n"
    with path.open("ab+") as file:
        if file.tell():  # what was left without an end stays a line of its own
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode())


def read_lines(path: Path) -> list[dict]:
    """The runs that are finished, one a line; what a killed process left of its last is not."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines if line.endswith("}")]
