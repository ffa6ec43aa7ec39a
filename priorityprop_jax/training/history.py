"""What a training run did, step by step."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

Record = dict[str, Any]

_OF_ALL = ("step", "epoch", "kind")
_OF_STEPS = (*_OF_ALL, "loss", "updates", "seconds", "flops", "cached")


class NonFiniteLossError(FloatingPointError):
    """The loss, or the parameters, became NaN or infinite.

    Args:
      what: became so.
      step: the first bad step, counted from 1; an attribute too.
    """

    def __init__(self, what: str, step: int):
        super().__init__(
            f"{what} at step {step}; lower the learning rate, clip the gradients (as in "
            "optax.chain(optax.clip_by_global_norm(1.0), optimizer)), or leave out updates from "
            "bad gradients with optax.apply_if_finite(optimizer, 5). Look for NaN in the data if "
            "it happens at once"
        )
        self.step = step


@dataclasses.dataclass
class History:
    """What a training run did, step by step.

    Steps and epochs count from 1.

    Attributes:
      steps: one record a step: `step`, `epoch`, `loss` and the metrics of `loss_fn` (of the batch,
        before the update), `updates` (updates of slots in that step) and `seconds` (wall time, the
        loader's included and compilation left out, as the mean over the steps that were fetched
        together); where the step counts them also `flops` (of the programs run, as compiled) and
        `cached` (1 if a frozen prefix came from a cache).
      evals: one record an evaluation: `epoch`, `step` and the averages over the data.
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
        return cls(
            steps=[dict(record) for record in values["steps"]],
            evals=[dict(record) for record in values["evals"]],
            interrupted=bool(values["interrupted"]),
            compile_seconds=float(values["compile_seconds"]),
        )


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
