"""What a training run did, step by step, and who got the updates."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.training.processes import wait_and_get
from priorityprop_jax.training.step import Step, counts

Record = dict[str, Any]

_OF_ALL = ("step", "epoch", "kind")
_OF_STEPS = (*_OF_ALL, "loss", "updates", "seconds", "flops", "cached")


class NonFiniteLossError(FloatingPointError):
    """The loss, or the parameters, became NaN or infinite; `step` is the first such, from 1."""

    def __init__(self, what: str, step: int):
        super().__init__(
            f"{what} at step {step}; lower the learning rate, clip the gradients with "
            "optax.chain(optax.clip_by_global_norm(1.0), optimizer), or skip bad ones with "
            "optax.apply_if_finite(optimizer, 5). If it happens at once, look for NaN in the data"
        )
        self.step = step


@dataclasses.dataclass
class History:
    """What a training run did, step by step; steps and epochs count from 1.

    Attributes:
      steps: one record a step: `step`, `epoch`, `loss` and the metrics of `loss_fn` (of the batch,
        before the update), `updates` (of slots) and `seconds` (wall time, the loader's included and
        compilation left out, averaged over the steps fetched together); where the step counts them
        also `flops` (of the programs run) and `cached` (1 if a frozen prefix came from a cache).
      evals: one record an evaluation: `epoch`, `step` and the averages over the data.
      nonfinite: how many of the steps had a loss that was NaN or infinite, and were skipped by
        `optax.apply_if_finite` around the optimizer; without it such a loss ends the training.
      interrupted: whether Ctrl-C was pressed during the last call of `train`.
      compile_seconds: wall time spent on tracing and compiling the training step, in all.

    Example:
      >>> from priorityprop_jax import History
      >>> history = History(steps=[{"step": 1, "epoch": 1, "loss": 2.5, "accuracy": 0.25}])
      >>> history.loss, history.column("accuracy")
      ([2.5], [0.25])
    """

    steps: list[Record] = dataclasses.field(default_factory=list)
    evals: list[Record] = dataclasses.field(default_factory=list)
    nonfinite: int = 0
    interrupted: bool = False
    compile_seconds: float = 0.0

    def column(self, name: str) -> list[Any]:
        """One value a step: `loss`, `updates`, `seconds`, or a metric by its name."""
        return [record[name] for record in self.steps]

    @property
    def loss(self) -> list[float]:
        """The loss at each step."""
        return self.column("loss")

    @property
    def updates(self) -> list[int]:
        """Updates of slots spent at each step."""
        return self.column("updates")

    @property
    def seconds(self) -> list[float]:
        """Wall seconds of each step."""
        return self.column("seconds")

    def as_dict(self) -> dict[str, Any]:
        """Lists, dicts and numbers only, ready for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> History:
        """The inverse of `as_dict`."""
        return cls(**values)


class Books:
    """Where a run stands: history, ledger, and counts of steps, of epochs and of their batches."""

    def __init__(self, step: Step, opt_state: Any) -> None:
        counted = counts(opt_state)
        fits = counted is not None and len(counted) == len(step.slots)
        self.ledger = Ledger(step.slots, step.unit) if fits else None
        self.history = History()
        self.steps = self.epoch = self.batch = 0  # epochs closed, batches of the open one
        self.log: Callable[[Record], Any] | None = None  # is told every record
        self.options: Record = {}  # that a resumed run must share
        self._step, self.tracing = step, 0.0  # seconds that the trainer itself traced for
        self.pending: list[tuple[Record, dict[str, Any]]] = []  # whose values are on their way
        self.reset_clock()

    def reset_clock(self) -> None:
        """Leaves the time until now out of all records."""
        self._since = time.perf_counter(), self._step.compile_seconds + self.tracing

    def enter(self, values: dict[str, Any]) -> None:
        """Notes a step and its values, on the device."""
        self.steps, self.batch = self.steps + 1, self.batch + 1
        self.pending.append(({"step": self.steps, "epoch": self.epoch + 1}, values))

    def fetch(self, params: Any, opt_state: Any) -> int:
        """Waits for the steps that are still on their way, and tells how many these were.

        A loss that is not finite is an error, unless the optimizer has left the step out.
        """
        if not self.pending:
            return 0
        fetched = wait_and_get([values for _, values in self.pending])
        pending, self.pending = self.pending, []
        clock, compiled = self._since
        self.reset_clock()
        compiling = self._since[1] - compiled
        self.history.compile_seconds += compiling
        seconds = max(self._since[0] - clock - compiling, 0.0) / len(pending)
        records = []
        for (record, _), values in zip(pending, fetched, strict=True):
            for name, value in values.items():
                record[name] = (int if name in ("updates", "cached") else float)(value)
            records.append(record | {"seconds": seconds})
        good = list(itertools.takewhile(lambda record: math.isfinite(record["loss"]), records))
        if len(good) < len(records) and _skips(opt_state) and not any_nan(params):
            bad = [record["step"] for record in records if not math.isfinite(record["loss"])]
            if not self.history.nonfinite:
                warnings.warn(
                    f"the loss of step {bad[0]} is NaN or infinite, and apply_if_finite went on "
                    "without it; history.nonfinite counts such steps",
                    stacklevel=2,
                )
            self.history.nonfinite += len(bad)
            good = records
        self.history.steps += good  # all of them, before a `log` can fail
        for record in good:
            self._tell("step", record)
        if len(good) < len(records):
            bad = records[len(good)]
            raise NonFiniteLossError(f"the loss is {bad['loss']}", bad["step"])
        return len(records)

    def evaluated(self, values: dict[str, float]) -> None:
        """Enters an evaluation at the end of the open epoch."""
        record = {"epoch": self.epoch + 1, "step": self.steps, **values}
        self.history.evals.append(record)
        self._tell("eval", record)

    def _tell(self, kind: str, record: Record) -> None:
        if self.log is not None:
            self.log({"kind": kind, **record})

    def record(self, opt_state: Any) -> None:
        """Enters the state of the optimizer into the ledger."""
        if self.ledger is not None:
            self.ledger.record(opt_state)

    def as_dict(self) -> dict[str, Any]:
        """All of it but the records of steps, ready for JSON."""
        history = dataclasses.replace(self.history, steps=[]).as_dict()
        ledger = None if self.ledger is None else self.ledger.as_dict()
        place = {"steps": self.steps, "epoch": self.epoch, "batch": self.batch}
        return {**place, "history": history, "ledger": ledger, "options": self.options}

    def check(self, saved: Mapping[str, Any]) -> None:
        """Raises a ValueError if what `as_dict` gave is of other options."""
        for name, theirs in saved.get("options", {}).items():
            if name in self.options and self.options[name] != theirs:
                raise ValueError(
                    f"the checkpoint is of a run with {name}={theirs}, and this trainer has "
                    f"{self.options[name]}: resume with the same, or train from the start"
                )

    def restore(self, saved: Mapping[str, Any], steps: list[Record]) -> None:
        """The inverse of `as_dict`, given the records of steps."""
        if self.ledger is not None:
            self.ledger = Ledger.from_dict(saved["ledger"])
        self.history = History.from_dict({**saved["history"], "steps": steps})
        self.steps, self.epoch, self.batch = saved["steps"], saved["epoch"], saved["batch"]
        self.pending = []


def _skips(opt_state: Any) -> bool:
    """Whether the optimizer leaves out updates that are not finite."""
    found = lambda x: isinstance(x, optax.ApplyIfFiniteState)  # noqa: E731
    return any(map(found, jax.tree.leaves(opt_state, is_leaf=found)))


def any_nan(tree: Any) -> bool:
    """Whether there is a NaN in any array. Waits for them."""
    return any(jax.device_get(_nans(tree)))


@jax.jit
def _nans(tree: Any) -> list[jax.Array]:
    return [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]


def check_metrics(what: str, metrics: Any, *, of_step: bool = False) -> dict[str, Any]:
    """The metrics, unless they do not fit into a record, of a step or of an evaluation."""
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{what} must be a dict of scalars, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if name in (_OF_STEPS if of_step else _OF_ALL):
            raise ValueError(f"{what} has a metric named {name!r}, which the history has a use for")
        if jnp.shape(value) != ():
            raise ValueError(f"metric {name!r} must be a scalar, got shape {jnp.shape(value)}")
    return dict(metrics)
