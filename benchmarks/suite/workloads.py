"""What is trained: data, model and budget of each workload.

The numbers of a workload are in `workloads/SUITE/NAME.json`. Its budget is the seconds that AdamW
takes for `steps` steps of the middle batch on the machine that runs the suite: every run of every
arm gets that many seconds or a fixed share of them, whatever a step of it costs.

`small` is cut so that it takes some five hours on two cores. The budget is 3 to 20 seconds (48 to
1,000 steps, on the long transformer twice those of the short one). Validation is on 128 rows of
characters (8,192 or more of them to predict) and 300 sentences to tag. CIFAR-10 is 10,000 images
and a network of width 8. Fine-tuning is on 512 sentences, with two batch sizes, four trials an arm
and twelve evaluations, as one pass over 2,000 validation sentences costs as much as a dozen steps.
The long transformer has three arms.
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
from benchmarks.tasks.cifar import flipped_and_shifted

Augment = Callable[[dict[str, np.ndarray], np.random.Generator], dict[str, np.ndarray]]
FOLDER = Path(__file__).parent / "workloads"
EVALUATED = 256  # rows in a batch of an evaluation


@dataclasses.dataclass(frozen=True, eq=False)  # hashed by identity, as compiled programs are kept
class Workload:
    """One row of the protocol's table of workloads.

    Attributes:
      suite: whose sizes these are.
      name: of the file.
      title: data and model in a line.
      task: as `benchmarks.tasks` knows it.
      options: of the model and the data, see `load`.
      rate: the learning rate that a search starts from, and what an arm on defaults uses.
      batches: the sizes that every arm may choose among; the middle one is the default.
      steps: of AdamW's full budget, at the middle batch.
      fine_tuning: whether the weights are pretrained.
      arms: names of the arms that run here, AdamW first.
      recipes: names of the arms of which the tuning seeds choose one, as the best of this library.
      trials: settings that an arm tries at least, see `search.next_setting`.
      seeds: runs of each arm at its best setting; twice as many of the chosen recipe, of AdamW at
        its batch, and for the target.
      evaluations: in a run that is reported, evenly spread over its seconds.
      least: what the cheapest step costs (forward pass and output layer), as a share of a full one
        by the compiler's count: a budget of a backward pass is spent on what is above it.
      by_steps: every run takes `steps` steps, so that nothing is timed: for arms that differ in
        what they decide and not in what a step costs.
    """

    suite: str
    name: str
    title: str
    task: str
    options: dict[str, Any]
    rate: float
    batches: tuple[int, ...]
    steps: int
    fine_tuning: bool
    arms: tuple[str, ...]
    recipes: tuple[str, ...] = ()
    trials: int = 8
    seeds: int = 5
    evaluations: int = 40
    least: float = 1 / 3
    by_steps: bool = False

    @property
    def batch(self) -> int:
        return self.batches[len(self.batches) // 2]

    @property
    def within(self) -> float:
        """The loss that a run has to come down to, as a multiple of tuned AdamW's."""
        return 1.02 if self.fine_tuning else 1.0

    @property
    def all_arms(self) -> tuple[str, ...]:
        return (*self.arms, *self.recipes)


def read_workload(suite: str, name: str) -> Workload:
    numbers = json.loads((FOLDER / suite / f"{name}.json").read_text(encoding="utf-8"))
    for field in ("batches", "arms", "recipes"):
        numbers[field] = tuple(numbers.get(field, ()))
    return Workload(suite=suite, name=name, **numbers)


def workload_names(suite: str) -> tuple[str, ...]:
    return tuple(sorted(path.stem for path in (FOLDER / suite).glob("*.json")))


def suites() -> tuple[str, ...]:
    return tuple(sorted(path.name for path in FOLDER.iterdir() if path.is_dir()))


@dataclasses.dataclass(frozen=True)
class Rows:
    """Arrays by name, each `[rows, ...]`.

    Attributes:
      train: to train on.
      tuning: to choose settings by; the validation rows themselves but where weights are
        pretrained, whose few sentences are not to be tuned on.
      validation: for all that is reported.
      test: seen once, at the end of a run.
      augment: changes a batch that is trained on.
    """

    train: dict[str, np.ndarray]
    tuning: dict[str, np.ndarray]
    validation: dict[str, np.ndarray]
    test: dict[str, np.ndarray]
    augment: Augment | None = None


@functools.cache
def _loaded(name: str, options: str) -> tuple[Rows, Callable[[int], nnx.Module], Any]:
    chosen = json.loads(options)
    length, train_rows = chosen.pop("length", None), chosen.pop("train_rows", None)
    tuning_rows, most = chosen.pop("tuning_rows", None), chosen.pop("validation_rows", None)
    if name == "cifar-conv":  # its images are decoded one by one
        chosen["train_rows"] = train_rows
    if "hidden" in chosen:
        chosen["hidden"] = tuple(chosen["hidden"])
    task = tasks.load(name, **chosen)
    parts = []
    for loader in (task.train_data, task.eval_data, task.test_data):
        arrays = dict(loader.arrays)
        if length is not None and name == "sst2":
            arrays["x"] = shortened(arrays["x"], length)
        elif length is not None:
            arrays = {key: array[:, :length] for key, array in arrays.items()}
        parts.append(arrays)
    train, validation, test = parts
    cut = slice(0, train_rows)
    if name == "sst2":  # either is too little alone; the test is on what validation leaves
        validation = {key: np.concatenate([validation[key], test[key]]) for key in test}
        test = {key: array[most:] for key, array in validation.items()}
    validation = {key: array[:most] for key, array in validation.items()}
    tuning = validation
    if tuning_rows is not None:
        tuning = {key: array[-tuning_rows:] for key, array in train.items()}
        cut = slice(0, min(train_rows or 10**9, len(train["y"]) - tuning_rows))
    train = {key: array[cut] for key, array in train.items()}

    def model(seed: int) -> nnx.Module:
        # Cheap to load again, and weights are a function of the seed.
        return tasks.load(name, seed=seed, **chosen).model

    augment = flipped_and_shifted if name == "cifar-conv" else None
    return Rows(train, tuning, validation, test, augment), model, task.loss_fn


def shortened(tokens: np.ndarray, length: int) -> np.ndarray:
    """The first tokens of each row `[rows, time]`, its last one, [SEP], kept at the end."""
    last = tokens[np.arange(len(tokens)), (tokens != 0).sum(1) - 1]
    cut = tokens[:, :length].copy()
    cut[:, -1] = np.where(tokens[:, length:].any(1), last, cut[:, -1])
    return cut


def load(workload: Workload) -> tuple[Rows, Callable[[int], nnx.Module], Any]:
    """Data, a function that makes the model of a seed, and the loss.

    Options: `length` cuts sequences, `train_rows` and `validation_rows` leave so many of each,
    `tuning_rows` takes so many off the end of the training rows to tune on, and all others go to
    `benchmarks.tasks.load`.
    """
    return _loaded(workload.task, json.dumps(workload.options, sort_keys=True))


class Stream:
    """The batches of a run, the same for all arms of a seed that have the same batch size."""

    def __init__(self, rows: Rows, batch: int, seed: int):
        self.arrays, self.augment, self.batch, self.seed = rows.train, rows.augment, batch, seed
        self.size = len(next(iter(rows.train.values())))
        self.epoch, self.place, self.order = -1, 0, np.zeros(0, np.int64)

    @property
    def per_epoch(self) -> int:
        return self.size // self.batch

    def take(self, n: int) -> list[dict[str, np.ndarray]]:
        found = []
        for _ in range(n):
            if self.place + self.batch > len(self.order):
                self.epoch, self.place = self.epoch + 1, 0
                rng = np.random.default_rng((self.seed, self.epoch))
                self.order = rng.permutation(self.size)
            rows = self.order[self.place : self.place + self.batch]
            self.place += self.batch
            batch = {name: array[rows] for name, array in self.arrays.items()}
            if self.augment is not None:
                batch = self.augment(
                    batch, np.random.default_rng((self.seed, self.epoch, self.place))
                )
            found.append(batch)
        return found
