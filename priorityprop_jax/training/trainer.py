"""The training loop around `priorityprop`: history, ledger, checkpoints, progress."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from tqdm import tqdm

from priorityprop_jax.core.layout import layout_of, put_beside
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.slots import find_slots
from priorityprop_jax.meprop.step import TopKCompute, TopKStep
from priorityprop_jax.partial.stages import Stages
from priorityprop_jax.partial.step import BudgetedStep, Compute
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.transform import Budget, PriorityPropState, priorityprop
from priorityprop_jax.sparse.training import DynamicSparsity, SparsityChange

LossFn = Callable[[Any, Any], Any]
Record = dict[str, Any]

_RESERVED = ("step", "epoch", "loss", "updates", "seconds", "kind", "flops", "cached")
# Steps between two fetches of the losses where `recalc_every` is not a number yet.
_FETCH_EVERY = 10
# What JAX, gloo, NCCL and its coordinator say when a process does not answer.
_LOST = ("gloo", "nccl", "unavailable", "connection", "heartbeat", "barrier", "deadline_exceeded")


class NonFiniteLossError(FloatingPointError):
    """The loss, or the parameters, became NaN or infinite.

    Attributes:
      step: the first bad step, counted from 1.
    """

    def __init__(self, message: str, step: int):
        super().__init__(message)
        self.step = step


class WorkerLostError(RuntimeError):
    """Of several processes that train together, one has ended or does not answer.

    The arrays on the devices are of no more use; the latest checkpoint is.
    """


@dataclasses.dataclass
class History:
    """What a training run did, step by step.

    Steps and epochs count from 1.

    Attributes:
      steps: one record a step: `step`, `epoch`, `loss` and the metrics of `loss_fn` (of the batch,
        before the update), `updates` (updates of slots in that step) and `seconds` (wall time, the
        loader's included and compilation left out, as the mean over the steps that were fetched
        together); on a budget of compute also `flops` (of the programs run, as compiled) and
        `cached` (1 if the frozen prefix came from the cache).
      evals: one record an evaluation: `epoch`, `step` and the averages over the data.
      interrupted: whether Ctrl-C ended the last call of `train`.
      compile_seconds: wall time spent on tracing and compiling the training step, in all.

    Example:
      >>> from priorityprop_jax.training.trainer import History
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


class PriorityPropTrainer:
    """Trains a model with `priorityprop`.

    One compiled step computes the gradients, hands out the updates and applies them. Its buffers
    are donated, so that parameters and optimizer state exist once; losses stay on the device and
    are fetched once a cycle.

    An `nnx` model is trained in place: at the end of `train` the module holds the new parameters
    and state, and its mode (`train()` or `eval()`) is what it was. During training and evaluation
    the trainer uses the right mode by itself. Parameters given as a pytree are copied; `params`
    holds the trained ones.

    With `compute` the budget is one of compute rather than of updates: a policy chooses the slots
    that are active at each step, and only their part of the backward pass is run, in a program
    compiled for them. Slots that are inactive cost nothing, and keep parameters and optimizer state
    bit for bit.

    With ``compute=TopKCompute()``, for a model with `meprop` layers, gradients and updates of these
    layers are of the rows alone that the gradient flowed through, and ``total_budget`` decides how
    many that are in which layer.

    Parameters on a `jax.sharding.Mesh` stay laid out as they are, and so does the optimizer state;
    decisions are those of one device. Several processes (`jax.distributed`) all call the same, with
    parameters and batches on one mesh; the first of them shows the progress bar.

    Args:
      model: a `flax.nnx.Module`, a pytree of parameters, or `Stages`, a model as a chain of stages
        (what a prefix cache needs).
      optimizer: the Optax optimizer to spend the budget with; the trainer wraps it in
        `priorityprop`. It sees one slot at a time, so a clipping by norm inside it clips each slot
        by itself. It is given the loss as the extra argument ``value``.
      loss_fn: `(model, batch) -> loss` or `(loss, metrics)`: a scalar, and a dict of scalars. It is
        given the module, or the parameters if `model` is a pytree; for `Stages` a function that
        maps the inputs `batch["x"]` to outputs, which it must call once, with these.
      total_budget: updates a cycle, see `priorityprop`, as for the three that follow. With
        `compute`, the fraction of a full step's cost that a step may cost on average, scoring
        included, or above 1 the FLOPs of a cycle.
      min_updates: the least updates of a slot in a cycle.
      max_updates: the most updates of a slot in a cycle.
      recalc_every: steps in a cycle.
      metric_fn: `(model or params, batch) -> dict` of scalars, to evaluate with; by default the
        loss and the metrics of `loss_fn`. It is compiled.
      checkpoint_dir: a folder for checkpoints, made if need be: one at the end of each epoch and
        one when interrupted; the latest two are kept.
      progress: whether to show a progress bar, which stays quiet if the output is no terminal.
      compute: the options of a budget of compute; None for a budget of updates. With `TopKCompute`
        ``total_budget`` is a fraction, or None for layers whose k is fixed.
      sparsity: when the places of a module's sparse layers move; None for places that stay. Not
        together with `compute`.
      **options: further options of `priorityprop`, such as `spread`, `magnitude` or `group`; with
        `compute` only `stacked_axis` and `group`.

    Attributes:
      history: the `History` of all training so far, up to an error if there was one.
      transformation: the wrapped optimizer.
      checkpoint_dir: as given; may be changed between two calls of `train`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: options make no sense, the budget does not fit the number of slots, the optimizer
        is wrapped already, or of several processes each has parameters of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.training.trainer import PriorityPropTrainer
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((x * params["slope"] + params["offset"] - y) ** 2)
      >>> x = jnp.linspace(0.0, 1.0, 8)
      >>> trainer = PriorityPropTrainer(
      ...     {"slope": jnp.zeros(()), "offset": jnp.zeros(())}, optax.sgd(0.2), loss_fn,
      ...     total_budget=0.75)
      >>> history = trainer.train([(x, 2 * x + 1)] * 20)
      >>> len(history.loss), history.loss[0] > 4, history.loss[-1] < 0.1
      (20, True, True)
      >>> sum(history.updates)  # 0.75 of 2 slots x 20 steps
      30
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        loss_fn: LossFn,
        total_budget: Budget = 100,
        min_updates: jax.typing.ArrayLike = 1,
        max_updates: jax.typing.ArrayLike = 20,
        recalc_every: jax.typing.ArrayLike = 10,
        *,
        metric_fn: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        compute: Compute | TopKCompute | None = None,
        sparsity: DynamicSparsity | None = None,
        **options: Any,
    ):
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (model, batch) -> loss, got {loss_fn!r}")
        if metric_fn is not None and not callable(metric_fn):
            raise TypeError(f"metric_fn must be a function or None, got {metric_fn!r}")
        if checkpoint_dir is not None and not isinstance(checkpoint_dir, str | os.PathLike):
            raise TypeError(f"checkpoint_dir must be a path or None, got {checkpoint_dir!r}")
        if sparsity is not None:
            _check_sparsity(sparsity, model, compute)
        if compute is not None:
            _check_compute(compute, min_updates, max_updates, options)
        else:
            self.transformation = priorityprop(
                optimizer, total_budget, min_updates, max_updates, recalc_every, **options
            )
        self._loss_fn = loss_fn
        self._metric_fn = metric_fn
        self.checkpoint_dir = checkpoint_dir
        self._progress = progress
        whole = isinstance(recalc_every, int | np.integer)
        self._fetch_every = int(recalc_every) if whole else _FETCH_EVERY

        self._model = model if isinstance(model, nnx.Module) else None
        self._stages = model if isinstance(model, Stages) else None
        self._params: Any = None
        self._rest: Any = None
        self._training = False
        self._change: SparsityChange | None = None
        if self._stages is not None:
            self._params, self._rest = _copy(self._stages.params), _copy(self._stages.state)
        elif self._model is None:
            _check_params(model)
            # The training step donates its arguments, and the caller may go on using these.
            self._params, self._rest = _copy(model), {}
        else:
            # Modes are part of the static graph, so both come from a copy, and the module's own
            # mode is left alone. What `sow` collects is no state: it would grow at each step.
            twin = nnx.clone(self._model)
            nnx.pop(twin, nnx.Intermediate)
            twin.train()
            self._train_graph = nnx.graphdef(twin)
            if sparsity is not None:
                self._change = SparsityChange(sparsity, loss_fn, twin)
            twin.eval()
            self._eval_graph = nnx.graphdef(twin)
        params, _ = self._current()
        if not jax.tree.leaves(params):
            raise ValueError("the model has no parameters to train")
        if jax.process_count() > 1:
            _check_processes(params, compute, sparsity)
        if any(
            isinstance(node, PriorityPropState)
            for node in jax.tree.leaves(
                jax.eval_shape(optimizer.init, params),
                is_leaf=lambda node: isinstance(node, PriorityPropState),
            )
        ):
            raise ValueError(
                "the optimizer holds a priorityprop or scale_by_priority already; give the trainer "
                "the inner optimizer, such as optax.adam(1e-3), and it wraps it itself"
            )
        self._budgeted: BudgetedStep | TopKStep | None = None
        if isinstance(compute, TopKCompute):
            if self._stages is not None:
                raise ValueError("TopKCompute takes an nnx module or a pytree, not Stages")
            self._budgeted = TopKStep(
                self._loss, params, optimizer, compute, total_budget, recalc_every  # type: ignore[arg-type]
            )  # fmt: skip
        elif compute is not None:
            self._budgeted = BudgetedStep(
                self._loss, params, optimizer, compute, total_budget, recalc_every,  # type: ignore[arg-type]
                stages=self._stages, **options,
            )  # fmt: skip
        if self._budgeted is not None:
            self.transformation = self._budgeted.transformation
            state, slots = self._budgeted.init(params), self._budgeted.slots
        else:
            state = self.transformation.init(params)
            slots = find_slots(
                params, stacked_axis=options.get("stacked_axis"), group=options.get("group")
            )
        # Some optimizers keep the parameters themselves or one array twice in their state, and a
        # buffer can be donated only once.
        self._rest, self._opt_state = put_beside(params, (self._rest, _copy(state)))
        self._ledger = Ledger(slots)

        self.history = History()
        self._step, self._epoch, self._batch = 0, 0, 0  # Steps, epochs, batches of this epoch done.
        self._pending: list[tuple[Record, dict[str, jax.Array]]] = []
        self._clock = time.perf_counter()
        self._compiling = 0.0  # Seconds spent on compilation since `_clock`.
        self._traces = 0
        self._saved_to: str | None = None  # The folder that holds checkpoints of this run.
        self._log: Callable[[Record], Any] | None = None
        self._layout: Any = None  # of parameters, rest and optimizer state
        self._asked = threading.Event()  # by this process, to stop
        self._compiled_step: Any = None
        self._compiled_eval = jax.jit(self._eval_step)

    # What a user can look at.

    @property
    def params(self) -> Any:
        """The parameters: an `nnx.State`, or a pytree like the one that was given."""
        params, _ = self._current()
        return _copy(params)

    @property
    def model(self) -> Any:
        """The trained `nnx` module, or the parameters if there is none.

        The parameters of `Stages` are by stage name; `nnx` modules that they were made of are
        brought up to date.
        """
        if self._stages is not None and self._stages.write_back is not None:
            self._stages.write_back(_copy(self._params), _copy(self._rest))
        if self._model is None:
            return self.params
        if self._training:
            nnx.update(self._model, _copy(self._params), _copy(self._rest))
        return self._model

    @property
    def optimizer_state(self) -> PriorityPropState:
        """The state of the transformation."""
        return _copy(self._opt_state)

    def get_priority_report(self) -> Ledger:
        """What was spent on whom so far."""
        return self._ledger

    def get_compute_report(self) -> dict[str, Any]:
        """What the compute went to so far, in all, by active set and by layer.

        Returns:
          See `BudgetedStep.report`.

        Raises:
          ValueError: if the trainer was made without `compute`.
        """
        if self._budgeted is None:
            raise ValueError("the trainer has no budget of compute: give it compute=Compute(...)")
        seconds = math.fsum(record["seconds"] for record in self.history.steps)
        return self._budgeted.report(self._opt_state, seconds)

    # Training.

    def train(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        eval_data: Iterable[Any] | None = None,
        resume_from: str | os.PathLike[str] | None = None,
        log: Callable[[Record], Any] | None = None,
    ) -> History:
        """Trains for some epochs more, or continues a run from its checkpoint.

        Ctrl-C ends the training between two steps: the checkpoint is saved, and the history is
        returned with `interrupted` set. A second Ctrl-C raises `KeyboardInterrupt` at once. After
        an interruption, `resume_from` continues within the epoch, while a plain `train` begins a
        new one. Several processes stop together, at the end of a cycle, once one is interrupted.

        Args:
          loader: batches, pytrees of arrays; iterated anew each epoch. Its `set_epoch(epoch)`, if
            it has one, is called before, with epochs that count from 0. To resume bit for bit it
            must give the same batches again. Several processes need as many batches each, made by
            `jax.make_array_from_process_local_data`.
          epochs: how many more; with `resume_from`, how many in all.
          eval_data: batches to evaluate on at the end of each epoch.
          resume_from: a folder that holds checkpoints of a trainer made with the same arguments;
            training continues from the latest, at the batch where it stopped.
          log: called with every record of the history as it becomes available, `kind` (`"step"`
            or `"eval"`) added.

        Returns:
          The history of all training so far, that before `resume_from` included.

        Raises:
          ValueError: `epochs` is below 1, the loader is empty or can be iterated only once, the
            checkpoint does not fit, or `checkpoint_dir` holds the checkpoints of another run.
          FileNotFoundError: there is no checkpoint in `resume_from`.
          NonFiniteLossError: the loss became NaN or infinite.
          WorkerLostError: another process has ended, and no step can be run without it.
        """
        if isinstance(epochs, bool) or not isinstance(epochs, int | np.integer):
            raise TypeError(f"epochs must be a whole number, got {epochs!r}")
        if epochs < 1:
            raise ValueError(f"epochs must be at least 1, got {epochs}")
        source = None if resume_from is None else _directory(resume_from)
        with contextlib.ExitStack() as stack:
            if source is not None:
                self._restore(source)
            elif self._batch:
                self._epoch, self._batch = self._epoch + 1, 0
            last = epochs if source is not None else self._epoch + epochs
            _check_iterable("loader", loader, last - self._epoch)
            if eval_data is not None:
                _check_iterable("eval_data", eval_data, last - self._epoch)
            manager = self._open_manager(stack, source)
            self._enter(stack)
            self._log = log
            self.history.interrupted = False
            if not self._ledger.steps:
                self._ledger.record(self._opt_state)
            bar = stack.enter_context(self._bar(loader, last))
            self._asked = stop = stack.enter_context(_interrupt_flag())
            if jax.process_count() > 1:
                # None may leave a step that the others run, so they stop where all know of it.
                stop = threading.Event()
            try:
                while self._epoch < last and not stop.is_set():
                    self._run_epoch(loader, last, eval_data, manager, bar, stop)
            except BaseException as error:
                _raise_if_lost(error, self._saved_to)
                # What the device has finished is history, whatever went wrong after it.
                with contextlib.suppress(NonFiniteLossError):
                    self._fetch()
                raise
            if self._epoch < last:
                self.history.interrupted = True
                if manager is not None:
                    self._save(manager)
                self._ledger.record(self._opt_state)
        return self.history

    def restore(self, source: str | os.PathLike[str]) -> None:
        """Loads the latest checkpoint, and trains nothing.

        Args:
          source: a folder that holds checkpoints of a trainer made with the same arguments.

        Raises:
          ValueError: if the checkpoint does not fit.
          FileNotFoundError: if there is none.
        """
        self._restore(_directory(source))

    def take_over(self, other: PriorityPropTrainer, optimizer_state: PriorityPropState) -> None:
        """Goes on where another trainer stopped, as after a change of the model's layers.

        The next `train` is of the epoch after the other's last, and adds to the same history.

        Args:
          other: a trainer of as many slots, at the end of an epoch.
          optimizer_state: what the other's has become, for this trainer's parameters.
        """
        ledger = Ledger.from_dict(other._ledger.as_dict())
        for name in ("names", "depths", "layers", "shapes"):
            setattr(ledger, name, getattr(self._ledger, name))
        self._ledger, self._opt_state = ledger, _copy(optimizer_state)
        self.history = History.from_dict(other.history.as_dict())
        self._step, self._epoch, self._batch = other._step, other._epoch, other._batch

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Averages the metrics over all rows of some data, with the model in evaluation mode.

        Args:
          data: batches. Each counts by its rows: the first axis of its first array.

        Returns:
          The averages by name.

        Raises:
          ValueError: there are no batches or no rows.
        """
        values = self._evaluate(data, threading.Event())
        if values is None:
            raise KeyboardInterrupt  # while getting a batch, which nothing here waits for
        return values

    def _run_epoch(
        self,
        loader: Iterable[Any],
        last: int,
        eval_data: Iterable[Any] | None,
        manager: ocp.CheckpointManager | None,
        bar: tqdm,
        stop: threading.Event,
    ) -> None:
        """Runs what is left of an epoch and closes it, unless it is stopped before."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch)  # type: ignore[attr-defined]
        done = self._batch
        batches = _until(stop, loader)
        skipped = sum(1 for _ in itertools.islice(batches, done))
        if skipped < done and not stop.is_set():
            raise ValueError(
                f"the loader ended after {skipped} batches, but the checkpoint is {done} batches "
                "into the epoch; resume with the loader that the run was started with"
            )
        self._clock, self._compiling = time.perf_counter(), 0.0
        for batch in batches:
            self._run_step(batch)
            if self._step % self._fetch_every == 0:
                self._fetch(bar)
                self._ledger.record(self._opt_state)
                _share(self._asked, stop)
        self._fetch(bar)
        _share(self._asked, stop)
        # The epoch is open until it has been evaluated, so that a resumed run makes up for it.
        if stop.is_set():
            return
        if self._batch == 0:
            raise ValueError("the loader is empty: it gave no batch to train on")
        if eval_data is not None:
            values = self._evaluate(eval_data, stop)
            if values is None:
                return
            self._add("eval", {"epoch": self._epoch + 1, "step": self._step, **values})
        self._epoch, self._batch = self._epoch + 1, 0
        if self._epoch == last:
            self._ledger.record(self._opt_state)
        if manager is not None:
            self._save(manager)

    def _run_step(self, batch: Any) -> None:
        _check_batch(batch)
        if self._change is not None:
            before = self._change.compile_seconds
            self._params, self._rest, self._opt_state = self._change(
                self._step, self._params, self._rest, self._opt_state, batch
            )
            self._compiling += self._change.compile_seconds - before
        traces, start = self._traces, time.perf_counter()
        if self._budgeted is not None:
            before = self._budgeted.compile_seconds
            self._params, self._rest, self._opt_state, values = self._budgeted(
                self._params, self._rest, self._opt_state, batch
            )
            self._compiling += self._budgeted.compile_seconds - before
        else:
            self._params, self._rest, self._opt_state, values = self._compiled_step(
                self._params, self._rest, self._opt_state, batch
            )
            if self._traces > traces:
                self._compiling += time.perf_counter() - start
        self._step += 1
        self._batch += 1
        self._pending.append(({"step": self._step, "epoch": self._epoch + 1}, values))

    def _fetch(self, bar: tqdm | None = None) -> None:
        """Waits for the steps that are on their way and adds them to the history."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        values = _wait_and_get([values for _, values in pending])
        now = time.perf_counter()
        seconds = max(now - self._clock - self._compiling, 0.0) / len(pending)
        self.history.compile_seconds += self._compiling
        self._clock, self._compiling = now, 0.0
        for (record, _), numbers in zip(pending, values, strict=True):
            updates = int(numbers.pop("updates"))
            record |= {name: float(number) for name, number in numbers.items()}
            record |= {"updates": updates, "seconds": seconds}
            if self._budgeted is not None:
                record["cached"] = int(record["cached"])
            if not math.isfinite(record["loss"]):
                raise _non_finite(f"the loss is {record['loss']}", record["step"])
            self._add("step", record)
        if bar is not None:
            shown = {"loss": f"{self.history.steps[-1]['loss']:.4g}"}
            if self._budgeted is not None:
                shown["saved"] = f"{self._budgeted.saved:.0%}"
            bar.set_postfix(shown, refresh=False)
            bar.update(len(pending))

    def _add(self, kind: str, record: Record) -> None:
        records = self.history.steps if kind == "step" else self.history.evals
        records.append(record)
        if self._log is not None:
            self._log({"kind": kind, **record})

    def _evaluate(self, data: Iterable[Any], stop: threading.Event) -> dict[str, float] | None:
        """The averages, or None if it was stopped."""
        params, rest = self._current()
        results, rows = [], []
        for batch in _until(stop, data):
            _check_batch(batch)
            rows.append(_rows(batch))
            results.append(self._compiled_eval(params, rest, batch))
        if stop.is_set():
            return None
        total = sum(rows)
        if total == 0:
            raise ValueError("the data to evaluate on are empty")
        values = _wait_and_get(results)
        return {
            name: math.fsum(n * float(value[name]) for n, value in zip(rows, values, strict=True))
            / total
            for name in values[0]
        }

    # What is compiled.

    def _train_step(self, params, rest, opt_state, batch):
        self._traces += 1

        x = batch["x"] if self._stages is not None else ()
        (loss, (metrics, rest)), grads = jax.value_and_grad(self._loss, has_aux=True)(
            params, rest, batch, x
        )
        # Descent goes along the conjugate of what JAX gives for complex parameters.
        grads = jax.tree.map(jnp.conj, grads)
        before = opt_state.update_counts  # [slots]
        result: Any = self.transformation.update(grads, opt_state, params, value=loss)
        updates, opt_state = result
        params = optax.apply_updates(params, updates)
        spent = jnp.sum(opt_state.update_counts - before)
        return params, rest, opt_state, {"loss": loss, **metrics, "updates": spent}

    def _loss(self, params, rest, batch, x, start=0):
        """The loss, the metrics and the new rest; for stages, with ``x`` entering stage `start`."""
        if self._stages is not None:
            outputs, stages = [], self._stages

            def forward(_):
                outputs.append(stages.run(params, rest, x, start=start))
                return outputs[-1][0]

            loss, metrics = _split_loss(self._loss_fn(forward, batch))
            if len(outputs) != 1:
                raise ValueError(
                    f"loss_fn must call the model once, with batch['x'], but did {len(outputs)} "
                    "times"
                )
            return loss, (metrics, outputs[0][1])
        if self._model is None:
            loss, metrics = _split_loss(self._loss_fn(params, batch))
            return loss, (metrics, rest)
        # A fresh tree: variables may only change at the trace level that made them.
        model = nnx.merge(self._train_graph, params, jax.tree.map(lambda leaf: leaf, rest))
        loss, metrics = _split_loss(self._loss_fn(model, batch))
        nnx.pop(model, nnx.Intermediate)
        return loss, (metrics, nnx.state(model, nnx.Not(nnx.Param)))

    def _eval_step(self, params, rest, batch):
        model = params
        if self._stages is not None:
            stages = self._stages
            model = lambda x: stages.run(params, rest, x, train=False)[0]  # noqa: E731
        if self._model is not None:
            model = nnx.merge(self._eval_graph, params, rest)
        if self._metric_fn is not None:
            return _check_metrics("metric_fn", self._metric_fn(model, batch))
        loss, metrics = _split_loss(self._loss_fn(model, batch))
        return {"loss": loss, **metrics}

    # Who holds the arrays: the module outside of `train`, the trainer within.

    def _current(self) -> tuple[Any, Any]:
        if self._model is None or self._training:
            return self._params, self._rest
        _, params, _, rest = nnx.split(self._model, nnx.Param, nnx.Intermediate, ...)
        return params, put_beside(params, rest)

    def _enter(self, stack: contextlib.ExitStack) -> None:
        if self._model is not None:
            params, rest = self._current()
            # The originals may have other holders, so the copies are donated, and the module lets
            # go of the originals at once, lest they take memory throughout.
            self._params, self._rest = _copy(params), _copy(rest)
            nnx.update(self._model, self._params, self._rest)
        self._rest, self._opt_state = put_beside(self._params, (self._rest, self._opt_state))
        self._training = True
        stack.callback(self._leave)
        layout = (layout_of(self._params), layout_of(self._rest), layout_of(self._opt_state))
        if jax.tree.flatten(layout) != jax.tree.flatten(self._layout):
            self._layout = layout
            self._compiled_step = jax.jit(
                self._train_step, donate_argnums=(0, 1, 2), out_shardings=(*layout, None)
            )
            if isinstance(self._budgeted, TopKStep):
                self._budgeted.lay_out(layout)

    def _leave(self) -> None:
        self._training = False
        if self._model is not None:
            nnx.update(self._model, self._params, self._rest)
            self._params = self._rest = None

    def _bar(self, loader: Any, last: int) -> tqdm:
        batches = len(loader) if hasattr(loader, "__len__") else None
        return tqdm(
            total=None if batches is None else (last - self._epoch) * batches,
            initial=self._batch,
            desc="training",
            unit="step",
            disable=None if self._progress and jax.process_index() == 0 else True,
        )

    # Checkpoints.

    def _open_manager(
        self, stack: contextlib.ExitStack, source: str | None
    ) -> ocp.CheckpointManager | None:
        if self.checkpoint_dir is None:
            return None
        directory = _directory(self.checkpoint_dir)
        manager = stack.enter_context(_manager(directory, create=True))
        if manager.latest_step() is not None and directory not in (self._saved_to, source):
            raise ValueError(
                f"{directory} holds the checkpoints of another run; continue that with "
                "resume_from, choose another checkpoint_dir, or remove the folder"
            )
        return manager

    def _sections(self) -> dict[str, Any]:
        params, rest = self._current()
        state = self._opt_state
        if self._budgeted is not None:
            state = self._budgeted.complete(state)
        return {"params": params, "rest": rest, "opt_state": state}

    def _save(self, manager: ocp.CheckpointManager) -> None:
        if any(bool(bad) for bad in jax.device_get(_any_nan(self._params))):
            raise _non_finite("the parameters became NaN", self._step)
        sections = self._sections()
        arrays = {
            key: jax.random.key_data(leaf) if _is_key(leaf) else leaf
            for key, leaf in _numbered(sections)
            if leaf.size  # Orbax refuses arrays of no elements.
        }
        about = {
            "format": "priorityprop_jax-1",
            "leaves": _describe(sections),
            "step": self._step,
            "epoch": self._epoch,
            "batch": self._batch,
            "history": self.history.as_dict(),
            "ledger": self._ledger.as_dict(),
            "compute": None if self._budgeted is None else self._budgeted.record(),
        }
        latest = manager.latest_step()
        manager.save(
            # Not the training step: an interruption can end two runs at the same one.
            0 if latest is None else latest + 1,
            args=ocp.args.Composite(
                arrays=ocp.args.StandardSave(arrays), about=ocp.args.JsonSave(about)
            ),
        )
        self._saved_to = os.fspath(manager.directory)
        self._clock = time.perf_counter()

    def _restore(self, source: str) -> None:
        if "://" not in source and not os.path.isdir(source):
            raise FileNotFoundError(f"there is no folder {source} to resume from")
        with _manager(source, create=False) as manager:
            latest = manager.latest_step()
            if latest is None:
                raise FileNotFoundError(f"there is no checkpoint in {source} to resume from")
            where = f"checkpoint {latest} in {source}"
            sections = self._sections()
            about = _read(manager, latest, where, about=ocp.args.JsonRestore())
            if not isinstance(about, dict) or about.get("format") != "priorityprop_jax-1":
                raise ValueError(f"{where} was not written by PriorityPropTrainer")
            _check_fit(where, about["leaves"], _describe(sections))
            if (about.get("compute") is None) != (self._budgeted is None):
                raise ValueError(
                    f"{where} does not fit this trainer: one of the two has a budget of compute, "
                    "the other one of updates"
                )
            leaves = _numbered(sections)
            arrays = _read(
                manager,
                latest,
                where,
                arrays=ocp.args.StandardRestore(
                    {key: _abstract(leaf) for key, leaf in leaves if leaf.size}
                ),
            )
        restored = [
            leaf
            if not leaf.size
            else jax.random.wrap_key_data(arrays[key], impl=jax.random.key_impl(leaf))
            if _is_key(leaf)
            else arrays[key]
            for key, leaf in leaves
        ]
        sections = jax.tree.unflatten(jax.tree.structure(sections), restored)
        history = History.from_dict(about["history"])
        ledger = Ledger.from_dict(about["ledger"])
        if self._model is None:
            self._params, self._rest = sections["params"], sections["rest"]
        else:
            nnx.update(self._model, sections["params"], sections["rest"])
        self._opt_state = sections["opt_state"]
        if self._budgeted is not None:
            self._opt_state = self._budgeted.restore(about["compute"], self._opt_state)
        self._step, self._epoch, self._batch = about["step"], about["epoch"], about["batch"]
        self.history, self._ledger = history, ledger
        self._pending = []


def _directory(path: str | os.PathLike[str]) -> str:
    path = os.fspath(path)
    # Orbax wants absolute paths; those of cloud storage are.
    return path if "://" in path else os.path.realpath(os.path.expanduser(path))


def _manager(directory: str, *, create: bool) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        directory,
        options=ocp.CheckpointManagerOptions(
            max_to_keep=2, create=create, enable_async_checkpointing=False
        ),
    )


def _read(manager: ocp.CheckpointManager, number: int, where: str, **item: Any) -> Any:
    """Restores the one item of a checkpoint."""
    (name,) = item
    try:
        return manager.restore(number, args=ocp.args.Composite(**item))[name]
    except Exception as error:  # Orbax and its file formats raise many kinds.
        raise ValueError(
            f"{where} cannot be read; it is damaged or was not written by PriorityPropTrainer. "
            "Remove it to resume from the one before"
        ) from error


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _numbered(tree: Any) -> list[tuple[str, Any]]:
    # Numbers rather than paths, in which a user may have put any character.
    return [(f"{i:05d}", leaf) for i, leaf in enumerate(jax.tree.leaves(tree))]


def _abstract(leaf: jax.Array) -> jax.ShapeDtypeStruct:
    data = jax.random.key_data(leaf) if _is_key(leaf) else leaf
    sharding = getattr(data, "sharding", None)  # none for what is in host memory
    return jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=sharding)


def _describe(tree: Any) -> list[list[str]]:
    """Name, and dtype with shape, of every leaf."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [[path_name(path), f"{leaf.dtype}{list(leaf.shape)}"] for path, leaf in leaves]


def _check_fit(where: str, saved: list[list[str]], present: list[list[str]]) -> None:
    for theirs, ours in itertools.zip_longest(saved, present, fillvalue=["nothing", ""]):
        if list(theirs) != list(ours):
            raise ValueError(
                f"{where} does not fit this trainer: it has {' '.join(theirs).strip()} where the "
                f"trainer has {' '.join(ours).strip()}. Resume with the model, the optimizer and "
                "the slots that it was saved with"
            )


@contextlib.contextmanager
def _interrupt_flag() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets in place of raising; the second Ctrl-C raises as usual.

    An exception between the donation of the parameters and the assignment of the new ones would
    lose both.
    """
    stop = threading.Event()
    before = None
    if threading.current_thread() is threading.main_thread():
        before = signal.getsignal(signal.SIGINT)
    # None is a handler that Python cannot put back; who ignores SIGINT has a reason to.
    if before is None or before == signal.SIG_IGN:
        yield stop
        return

    def handler(number, frame):
        if stop.is_set():
            signal.default_int_handler(number, frame)
        stop.set()

    signal.signal(signal.SIGINT, handler)
    try:
        yield stop
    finally:
        signal.signal(signal.SIGINT, before)


def _until(stop: threading.Event, batches: Iterable[Any]) -> Iterator[Any]:
    """The batches, up to an interruption before or while getting one."""
    try:
        iterator = iter(batches)
        while not stop.is_set():
            try:
                batch = next(iterator)
            except StopIteration:
                return
            if stop.is_set():
                return
            yield batch
    except KeyboardInterrupt:
        if jax.process_count() > 1:
            raise  # The others know nothing of it.
        stop.set()


def _share(asked: threading.Event, stop: threading.Event) -> None:
    """Sets `stop` at every process if one was asked to; all must call it at the same step."""
    if asked is not stop and np.any(multihost_utils.process_allgather(np.array(asked.is_set()))):
        stop.set()


def _wait_and_get(tree: Any) -> Any:
    """`jax.device_get` that raises what has gone wrong at any device of this process.

    Where a process is lost, some devices of the others learn of it and some wait on: to wait for
    one after the other could be to wait for the wrong one.
    """
    if jax.process_count() == 1:
        return jax.device_get(tree)
    left = [
        shard.data
        for leaf in jax.tree.leaves(tree)
        if isinstance(leaf, jax.Array)
        for shard in leaf.addressable_shards
    ]
    while left:
        ready = [array.is_ready() for array in left]
        jax.block_until_ready([array for array, done in zip(left, ready, strict=True) if done])
        left = [array for array, done in zip(left, ready, strict=True) if not done]
        time.sleep(1e-3 if left else 0)
    return jax.device_get(tree)


def _raise_if_lost(error: BaseException, saved_to: str | None) -> None:
    if jax.process_count() == 1 or not isinstance(error, jax.errors.JaxRuntimeError):
        return
    said = str(error).strip().partition("\n")[0]
    if any(word in said.lower() for word in _LOST):
        how = "" if saved_to is None else f", with resume_from={saved_to!r}"
        raise WorkerLostError(
            f"another process has ended or does not answer; start all of them again{how} "
            f"({said[:200]})"
        ) from None


def _check_processes(params: Any, compute: Any, sparsity: Any) -> None:
    alone = [path for path, leaf in jax.tree_util.tree_leaves_with_path(params) if _alone(leaf)]
    if alone:
        raise ValueError(
            f"{jax.process_count()} processes train together, but {path_name(alone[0])!r} is an "
            "array of this one alone: put the parameters on a mesh of all devices first, with "
            "jax.device_put and a NamedSharding"
        )
    if isinstance(compute, Compute) and (
        compute.block_state != "keep" or compute.cache is not None
    ):
        raise ValueError(
            "several processes have no host memory in common: leave block_state as 'keep', and "
            "the cache out"
        )
    if sparsity is not None:
        raise ValueError(
            "the places of sparse layers are chosen in the host memory of one process: leave "
            "sparsity out where several train together"
        )


def _check_batch(batch: Any) -> None:
    if jax.process_count() == 1:
        return
    if any(np.ndim(leaf) and _alone(leaf) for leaf in jax.tree.leaves(batch)):
        raise ValueError(
            "several processes train together, but a batch holds an array of this one alone: make "
            "it with jax.make_array_from_process_local_data(sharding, rows_of_this_process)"
        )


def _alone(leaf: Any) -> bool:
    return not isinstance(leaf, jax.Array) or leaf.is_fully_addressable


def _check_iterable(name: str, batches: Any, epochs: int) -> None:
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise TypeError(f"{name} must be an iterable of batches, got {batches!r}")
    if epochs > 1 and isinstance(batches, Iterator):
        raise ValueError(
            f"{name} is an iterator, which can be gone through once, but {epochs} epochs need it "
            "anew each time: give a list or an object whose __iter__ starts afresh, or train one "
            "epoch"
        )


def _check_params(params: Any) -> None:
    """Raises a TypeError unless all leaves are arrays that can be trained."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        dtype = getattr(leaf, "dtype", None)
        if dtype is None and isinstance(leaf, float | complex):
            continue
        if dtype is None or not jnp.issubdtype(dtype, jnp.inexact):
            found = type(leaf).__name__ if dtype is None else f"an array of {dtype}"
            raise TypeError(
                "model must be a flax.nnx.Module, Stages or a pytree of floating-point arrays, but "
                f"{path_name(path)!r} is {found}; for a Linen module give its parameters, and a "
                "loss_fn that applies it"
            )


def _check_compute(compute: Any, min_updates: Any, max_updates: Any, options: Any) -> None:
    if not isinstance(compute, Compute | TopKCompute):
        raise TypeError(f"compute must be Compute(...), TopKCompute(...) or None, got {compute!r}")
    if (min_updates, max_updates) != (1, 20):
        raise ValueError(
            "min_updates and max_updates are of a budget of updates; with compute a slot is "
            "updated once at each step in which it is active"
        )
    known = {"stacked_axis", "group"} if isinstance(compute, Compute) else set()
    unknown = set(options) - known
    if unknown:
        raise TypeError(f"{min(unknown)!r} is no option of a trainer with compute")


def _check_sparsity(sparsity: Any, model: Any, compute: Any) -> None:
    if not isinstance(sparsity, DynamicSparsity):
        raise TypeError(f"sparsity must be DynamicSparsity(...) or None, got {sparsity!r}")
    if not isinstance(model, nnx.Module) or compute is not None:
        raise ValueError(
            "sparsity moves the places of the sparse layers of an nnx module, trained without "
            "compute; leave one of the two out"
        )


def _split_loss(result: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    pair: Any = result if isinstance(result, tuple) and len(result) == 2 else (result, {})
    loss, metrics = pair
    if jnp.shape(loss) != () or not jnp.issubdtype(jnp.result_type(loss), jnp.floating):
        raise ValueError(
            "loss_fn must return a real scalar, or a pair of one and a dict of metrics; got a loss "
            f"of shape {jnp.shape(loss)} and dtype {jnp.result_type(loss)}"
        )
    return loss, _check_metrics("the second result of loss_fn", metrics, _RESERVED)


def _check_metrics(
    what: str, metrics: Any, reserved: tuple[str, ...] = ("step", "epoch", "kind")
) -> dict[str, Any]:
    if not isinstance(metrics, Mapping):
        raise TypeError(f"{what} must be a dict of scalars, got {type(metrics).__name__}")
    for name, value in metrics.items():
        if name in reserved:
            raise ValueError(f"{what} has a metric named {name!r}, which the history has a use for")
        if jnp.shape(value) != ():
            raise ValueError(f"metric {name!r} must be a scalar, got shape {jnp.shape(value)}")
    return dict(metrics)


def _rows(batch: Any) -> int:
    leaves = jax.tree.leaves(batch)
    # A batch of scalars is one example.
    return np.shape(leaves[0])[0] if leaves and np.ndim(leaves[0]) else 1


def _copy(tree: Any) -> Any:
    # An explicit dtype also makes Python floats strongly typed, as the step returns them.
    return jax.tree.map(lambda leaf: jnp.array(leaf, dtype=jnp.result_type(leaf), copy=True), tree)


@jax.jit
def _any_nan(tree: Any) -> list[jax.Array]:
    return [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]


def _non_finite(what: str, step: int) -> NonFiniteLossError:
    return NonFiniteLossError(
        f"{what} at step {step}; lower the learning rate, clip the gradients (as in "
        "optax.chain(optax.clip_by_global_norm(1.0), optimizer)), or leave out updates from bad "
        "gradients with optax.apply_if_finite(optimizer, 5). Look for NaN in the data if it "
        "happens at once",
        step,
    )
