"""What is trained: data, model and budget of each workload, and its frozen target.

The numbers of a workload are in `workloads/SUITE/NAME.json`: how many steps of which batch tuned
AdamW gets (the full budget), the learning rates that every arm may try, how often a run is
evaluated, and the target. The target is frozen by tuned AdamW before any other arm is run, and no
run changes it.
"""

from __future__ import annotations

import dataclasses
import functools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from flax import nnx

from benchmarks import tasks
from benchmarks.records import write
from benchmarks.tasks.cifar import flipped_and_shifted

Augment = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]
FOLDER = Path(__file__).parent / "workloads"
TUNING_SEED = 1000  # never compared on


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as compiled programs are kept
class Workload:
    """One row of the protocol's table of workloads.

    Attributes:
      suite: whose sizes these are.
      name: of the file.
      title: data and model in a line.
      task: as `benchmarks.tasks` knows it.
      options: of the model and the data, see `load`.
      metric: `accuracy` or `loss`, on the validation rows.
      higher_is_better: of the metric.
      grid: learning rates, the middle ones first tried where there are few trials.
      default_rate: what an arm without tuning uses.
      steps: of AdamW's full budget.
      batch: rows in a batch of AdamW.
      evaluations: in a run, evenly spread.
      fine_tuning: whether the weights are pretrained.
      least: what the cheapest step costs (forward pass and output layer), as a share of a full one
        by the compiler's count: a budget of a backward pass is spent on what is above it.
      arms: names of the arms that run here.
      target: `value`, `reachable`, `seeds`, `date` and `revision`; None before it is frozen.
    """

    suite: str
    name: str
    title: str
    task: str
    options: dict[str, Any]
    metric: str
    higher_is_better: bool
    grid: tuple[float, ...]
    default_rate: float
    steps: int
    batch: int
    evaluations: int
    fine_tuning: bool
    arms: tuple[str, ...]
    least: float = 1 / 3
    target: dict[str, Any] | None = None

    @property
    def path(self) -> Path:
        return FOLDER / self.suite / f"{self.name}.json"

    def trials(self, n: int) -> tuple[float, ...]:
        """The n middle rates of the grid, rather the upper ones."""
        n = min(n, len(self.grid))
        start = (len(self.grid) - n + 1) // 2
        return self.grid[start : start + n]


def read_workload(suite: str, name: str) -> Workload:
    numbers = json.loads((FOLDER / suite / f"{name}.json").read_text(encoding="utf-8"))
    for field in ("grid", "arms"):
        numbers[field] = tuple(numbers[field])
    return Workload(suite=suite, **numbers)


def workload_names(suite: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (FOLDER / suite).glob("*.json")))


def suites() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))


def freeze(workload: Workload, target: dict[str, Any]) -> Workload:
    """Writes the target into the workload's file; a target that stands is never changed."""
    numbers = json.loads(workload.path.read_text(encoding="utf-8"))
    if numbers.get("target") is not None:
        raise ValueError(f"{workload.path} has a target already")
    write(workload.path, numbers | {"target": target})
    return dataclasses.replace(workload, target=target)


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays by name, each `[rows, ...]`; `augment` changes a batch that is trained on."""

    train: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    augment: Augment | None = None


@functools.cache
def _loaded(name: str, options: str) -> tuple[Rows, Callable[[int], nnx.Module], Any]:
    chosen = json.loads(options)
    length = chosen.pop("length", None)
    first = {0: chosen.pop("train_rows", None), 1: chosen.pop("validation_rows", None)}
    if name == "cifar-conv":  # its images are decoded one by one
        chosen["train_rows"] = first[0]
    if "hidden" in chosen:
        chosen["hidden"] = tuple(chosen["hidden"])
    task = tasks.load(name, **chosen)
    parts = []
    for i, loader in enumerate((task.train_data, task.eval_data, task.test_data)):
        arrays = dict(loader.arrays)
        if length is not None and name == "sst2":
            arrays["x"] = shortened(arrays["x"], length)
        elif length is not None:
            arrays = {key: array[:, :length] for key, array in arrays.items()}
        parts.append({key: array[: first.get(i)] for key, array in arrays.items()})

    def model(seed: int) -> nnx.Module:
        # Cheap to load again, and weights are a function of the seed.
        return tasks.load(name, seed=seed, **chosen).model

    augment = flipped_and_shifted if name == "cifar-conv" else None
    return Rows(*parts, augment), model, task.loss_fn


def shortened(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first tokens of each row `[rows, time]`, its last one, [SEP], kept at the end."""
    last = tokens[np.arange(len(tokens)), (tokens != 0).sum(1) - 1]
    cut = tokens[:, :length].copy()
    cut[:, -1] = np.where(tokens[:, length:].any(1), last, cut[:, -1])
    return cut


def load(workload: Workload) -> tuple[Rows, Callable[[int], nnx.Module], Any]:
    """Data, a function that makes the model of a seed, and the loss.

    Options: `length` cuts sequences, `train_rows` and `validation_rows` leave so many of each, and
    all others go to `benchmarks.tasks.load`.
    """
    return _loaded(workload.task, json.dumps(workload.options, sort_keys=True))


class Stream:
    """The batches of a run, the same for all arms of a seed that have the same batch size.

    With `pruned` an epoch leaves out that share of the rows whose last loss is below the mean,
    drawn anew each epoch, and the ones that stay have a `weight` that makes up for the others.
    """

    def __init__(self, rows: Rows, batch: int, seed: int, *, pruned: float = 0.0):
        self.arrays, self.augment, self.batch, self.seed = rows.train, rows.augment, batch, seed
        self.pruned, self.size = pruned, len(next(iter(rows.train.values())))
        self.losses = np.full(self.size if pruned else 0, np.inf, np.float32)
        self.weights = np.ones(self.size if pruned else 0, np.float32)
        self.epoch, self.place, self.order = -1, 0, np.zeros(0, np.int64)

    @property
    def per_epoch(self) -> int:
        return self.size // self.batch

    def take(self, n: int) -> list[dict[str, np.ndarray]]:
        found = []
        for _ in range(n):
            if self.place + self.batch > len(self.order):
                self._next_epoch()
            rows = self.order[self.place : self.place + self.batch]
            self.place += self.batch
            batch = {name: array[rows] for name, array in self.arrays.items()}
            if self.augment is not None:
                batch = self.augment(
                    batch, np.random.default_rng((self.seed, self.epoch, self.place))
                )
            if self.pruned:
                batch |= {"row": rows.astype(np.int32), "weight": self.weights[rows]}
            found.append(batch)
        return found

    def record(self, rows: np.ndarray, losses: np.ndarray) -> None:
        """What the last step made of these rows."""
        self.losses[rows] = losses

    def _next_epoch(self) -> None:
        self.epoch, self.place = self.epoch + 1, 0
        rng = np.random.default_rng((self.seed, self.epoch))
        self.order = rng.permutation(self.size)
        if not self.pruned:
            return
        seen = np.isfinite(self.losses)
        easy = seen & (self.losses < self.losses[seen].mean()) if seen.any() else seen
        kept = ~easy | (rng.random(self.size) >= self.pruned)
        if kept.sum() >= self.batch:
            self.weights = np.where(easy, 1 / (1 - self.pruned), 1).astype(np.float32)
            self.order = self.order[kept[self.order]]
