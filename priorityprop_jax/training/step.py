"""What a trainer runs: a model, a step on it, and the plain step of any Optax optimizer."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.priority.ledger import find_state

# (params, rest, batch, **kwargs) -> (loss, (metrics, rest)), pure; kwargs are for `Model.loss`.
Loss = Callable[..., tuple[jax.Array, tuple[dict[str, jax.Array], Any]]]
LossFn = Callable[[Any, Any], Any]  # (model, batch) -> loss, or (loss, metrics)
StepResult = tuple[Any, Any, Any, dict[str, Any]]  # parameters, rest, optimizer state, values


class Model(Protocol):
    """What a trainer can train: arrays that leave a user's object, and come back."""

    def split(self) -> tuple[Any, Any]:
        """The parameters and all other arrays, as they are now; after `join` those it was given."""
        ...

    def join(self, params: Any, rest: Any) -> None:
        """Puts trained arrays into the user's object, which keeps them."""

    def loss(self, loss_fn: LossFn, params, rest, batch, **kwargs) -> tuple[Any, Any]:
        """What ``loss_fn`` returns for the model as it is trained, and the new rest. Pure."""
        ...

    def evaluator(self, params: Any, rest: Any) -> Any:
        """What ``loss_fn`` and ``metric_fn`` are given to evaluate with. Pure."""


class Step(Protocol):
    """One training step, and the account of all that were run."""

    slots: Slots  # what the ledger has rows for
    unit: str  # what the ledger counts, such as "updates"
    compile_seconds: float  # wall time spent on tracing and compiling so far

    def init(self, params: Any) -> Any:
        """The optimizer state before the first step."""

    def __call__(self, params: Any, rest: Any, opt_state: Any, batch: Any) -> StepResult:
        """Runs one step; the first three arguments are donated.

        Values are ``loss`` and the metrics, as arrays on the device, and ``updates``; where they
        are counted also ``flops`` and ``cached``.
        """
        ...

    def lay_out(self, layout: tuple[Any, Any, Any]) -> None:
        """Keeps parameters, rest and state laid out as `layout_of` says, from the next step on."""

    @property
    def saved(self) -> float | None:
        """The share of a full run's FLOPs not spent so far; None where they are not counted."""
        return None

    def report(self, opt_state: Any, seconds: float) -> dict[str, Any]:
        """What the steps have cost, which took so many seconds, ready for JSON."""
        return {}

    def record(self) -> dict[str, Any]:
        """What a resumed run needs beside the arrays, ready for JSON."""
        return {}

    def restore(self, record: Mapping[str, Any], opt_state: Any) -> Any:
        """The inverse of `record` and `complete`: the state to go on with.

        Raises a ValueError, and changes nothing, if the record is of other options.
        """
        return opt_state

    def complete(self, opt_state: Any) -> Any:
        """The optimizer state whole, for a checkpoint."""
        return opt_state

    def check_processes(self) -> None:
        """Raises a ValueError where several processes cannot run this step together."""


class Setup(NamedTuple):
    """What a step is made for."""

    loss: Loss  # of the model; only its own `loss` may take more than params, rest and batch
    loss_fn: LossFn  # the user's
    model: Model
    params: Any  # only shapes are read
    optimizer: optax.GradientTransformationExtraArgs
    plain: Callable[[], Step]  # makes the step of all gradients, to be wrapped


MakeStep = Callable[[Setup], Step]


class PlainStep(Step):
    """The step of an Optax optimizer: all gradients, one compiled and donated program.

    The optimizer is given ``value``, ``grad`` and ``value_fn``. By default a slot is a leaf.
    """

    unit = "updates"

    def __init__(self, loss: Loss, params: Any, optimizer: Any, slots: Slots | None) -> None:
        self.slots = find_slots(params) if slots is None else slots
        self.compile_seconds, self.traces = 0.0, 0
        self.init = optimizer.init
        self._loss, self._optimizer = loss, optimizer
        self.lay_out((None, None, None))

    def lay_out(self, layout: tuple[Any, Any, Any]) -> None:
        """See `Step`."""
        shardings = (*layout, None)
        self.compiled = jax.jit(self._program, donate_argnums=(0, 1, 2), out_shardings=shardings)

    def __call__(self, params: Any, rest: Any, opt_state: Any, batch: Any) -> StepResult:
        """See `Step`."""
        traces, start = self.traces, time.perf_counter()
        result = self.compiled(params, rest, opt_state, batch)
        if self.traces > traces:
            self.compile_seconds += time.perf_counter() - start
        result[-1].setdefault("updates", len(self.slots))  # where nobody counts them
        return result

    def _program(self, params, rest, opt_state, batch):
        self.traces += 1  # while tracing, so once a program
        value_and_grad = jax.value_and_grad(self._loss, has_aux=True)
        (loss, (metrics, new_rest)), grads = value_and_grad(params, rest, batch)
        # Descent goes along the conjugate of what JAX gives for complex parameters.
        grads = jax.tree.map(jnp.conj, grads)
        value_fn = lambda params: self._loss(params, rest, batch)[0]  # noqa: E731
        updates, new_state = self._optimizer.update(
            grads, opt_state, params, value=loss, grad=grads, value_fn=value_fn
        )
        before, after = counts(opt_state), counts(new_state)
        spent = {} if before is None else {"updates": jnp.sum(after - before)}
        params = optax.apply_updates(params, updates)
        return params, new_rest, new_state, {"loss": loss, **metrics, **spent}


def counts(opt_state: Any) -> Any:
    """Updates of every slot so far, ``int32[slots]``; None where the state does not count them."""
    try:
        return find_state(opt_state).update_counts
    except ValueError:
        return None
