"""The training loop: any model, any Optax optimizer, any step; it knows no feature."""

from __future__ import annotations

import contextlib
import itertools
import math
import os
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import nnx
from tqdm import tqdm

from priorityprop_jax.core.layout import layout_of, put_beside
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.transform import Budget, priorityprop
from priorityprop_jax.training import checkpoints
from priorityprop_jax.training.history import History, NonFiniteLossError, Record, check_metrics
from priorityprop_jax.training.interrupts import Stop
from priorityprop_jax.training.loader import batches_in, check_iterable, rows_in
from priorityprop_jax.training.model import LossFn, as_model, copy, loss_of, split_result
from priorityprop_jax.training.processes import (
    check_batch,
    check_params,
    raise_if_lost,
    wait_and_get,
)
from priorityprop_jax.training.step import MakeStep, Model, PlainStep, Setup, Step, counts

# Steps between two fetches of the losses.
_FETCH_EVERY = 10


class Trainer:
    """Trains a model with any Optax optimizer.

    One compiled step computes the gradients and applies the updates. Its buffers are donated, so
    that parameters and optimizer state exist once; losses stay on the device and are fetched every
    few steps.

    An `nnx` model is trained in place: at the end of `train` the module holds the new parameters
    and state, and its mode (`train()` or `eval()`) is what it was. During training and evaluation
    the trainer uses the right mode by itself. Parameters given as a pytree are copied; `params`
    holds the trained ones.

    Parameters on a `jax.sharding.Mesh` stay laid out as they are, and so does the optimizer state;
    decisions are those of one device. Several processes (`jax.distributed`) all call the same, with
    parameters and batches on one mesh; the first of them shows the progress bar.

    Args:
      model: a `flax.nnx.Module`, a pytree of parameters, or an object with the methods of `Model`.
      optimizer: the Optax optimizer. It is given the extra arguments ``value`` (the loss),
        ``grad`` and ``value_fn``.
      loss_fn: `(model, batch) -> loss` or `(loss, metrics)`: a scalar, and a dict of scalars. It is
        given the module, or the parameters if `model` is a pytree.
      step: makes the step that is run, from a `Setup`; by default all gradients are computed and
        all are given to the optimizer.
      metric_fn: `(model or params, batch) -> dict` of scalars, to evaluate with; by default the
        loss and the metrics of `loss_fn`. It is compiled.
      checkpoint_dir: a folder for checkpoints, made if need be: one at the end of each epoch and
        one when interrupted; the latest two are kept.
      progress: whether to show a progress bar, which stays quiet if the output is no terminal.
      slots: what the optimizer counts updates of, where it was given ``group`` or
        ``stacked_axis``: `find_slots` with the same. Other steps than the plain one know theirs.

    Attributes:
      history: the `History` of all training so far, up to an error if there was one.
      step: the `Step` that is run.
      checkpoint_dir: as given; may be changed between two calls of `train`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: options make no sense, or of several processes each has parameters of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax.training.trainer import Trainer
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((x * params["slope"] + params["offset"] - y) ** 2)
      >>> x = jnp.linspace(0.0, 1.0, 8)
      >>> params = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
      >>> trainer = Trainer(params, optax.chain(optax.clip(1.0), optax.sgd(0.3)), loss_fn)
      >>> history = trainer.train([(x, 2 * x + 1)] * 20)
      >>> len(history.loss), history.loss[0] > 4, history.loss[-1] < 0.1
      (20, True, True)
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation | optax.MultiSteps,
        loss_fn: LossFn,
        step: MakeStep | None = None,
        *,
        metric_fn: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        slots: Slots | None = None,
    ):
        if not callable(loss_fn):
            raise TypeError(f"loss_fn must be a function (model, batch) -> loss, got {loss_fn!r}")
        if step is not None and not callable(step):
            raise TypeError(f"step must be a function of a Setup or None, got {step!r}")
        if metric_fn is not None and not callable(metric_fn):
            raise TypeError(f"metric_fn must be a function or None, got {metric_fn!r}")
        if checkpoint_dir is not None and not isinstance(checkpoint_dir, str | os.PathLike):
            raise TypeError(f"checkpoint_dir must be a path or None, got {checkpoint_dir!r}")
        if isinstance(optimizer, optax.MultiSteps):
            optimizer = optimizer.gradient_transformation()
        if not callable(getattr(optimizer, "init", None)):
            raise TypeError(
                f"optimizer must be an optax.GradientTransformation, got {optimizer!r}; of a "
                "flax.nnx.Optimizer give its .tx"
            )
        self.checkpoint_dir = checkpoint_dir
        self.history = History()
        self._module = model if isinstance(model, nnx.Module) else None
        self._loss_fn, self._metric_fn, self._progress = loss_fn, metric_fn, progress
        self._fetch_every = _FETCH_EVERY
        self._model: Model = as_model(model)
        self._training = False  # and if so, the arrays are here rather than in the model
        self._params: Any = None
        self._rest: Any = None
        params, _ = self._current()
        if not jax.tree.leaves(params):
            raise ValueError("the model has no parameters to train")
        check_params(params)
        loss, optimizer = loss_of(self._model, loss_fn), optax.with_extra_args_support(optimizer)

        def plain() -> Step:
            return PlainStep(loss, params, optimizer, slots)

        self.step: Step = plain()
        if step is not None:
            self.step = step(Setup(loss, loss_fn, self._model, params, optimizer, plain))
        if jax.process_count() > 1:
            self.step.check_processes()
        # Some optimizers keep the parameters themselves or one array twice in their state, and a
        # buffer can be donated only once.
        self._opt_state = put_beside(params, copy(self.step.init(params)))
        counted = counts(self._opt_state)
        fits = counted is not None and len(counted) == len(self.step.slots)
        self._ledger = Ledger(self.step.slots, self.step.unit) if fits else None
        self._layout: Any = None  # of parameters, rest and optimizer state

        self._steps, self._epoch, self._batch = 0, 0, 0  # Steps, epochs, batches of this epoch.
        self._pending: list[tuple[Record, dict[str, jax.Array]]] = []
        self._since = (0.0, 0.0)  # Clock, and seconds of compilation, when last fetched.
        self._saved_to: str | None = None  # The folder that holds checkpoints of this run.
        self._log: Callable[[Record], Any] | None = None
        self._stop = Stop()
        self._compiled_eval = jax.jit(self._eval_step)

    # What a user can look at.

    @property
    def params(self) -> Any:
        """The parameters: an `nnx.State`, or a pytree like the one that was given."""
        return copy(self._current()[0])

    @property
    def model(self) -> Any:
        """The trained `nnx` module, or the parameters if none was given."""
        if self._training:
            self._model.join(copy(self._params), copy(self._rest))
        return self.params if self._module is None else self._module

    @property
    def optimizer_state(self) -> Any:
        """The state of the optimizer."""
        return copy(self._opt_state)

    def get_priority_report(self) -> Ledger:
        """What was spent on whom so far.

        Raises:
          ValueError: the optimizer does not count it, or of other slots than the trainer knows.
        """
        if self._ledger is None:
            raise ValueError(
                "the optimizer's state has no count of the updates of each of the "
                f"{len(self.step.slots)} slots: wrap the optimizer in priorityprop, as "
                "PriorityPropTrainer does, and give the trainer slots=find_slots(params, ...) "
                "where that has a group or a stacked_axis"
            )
        return self._ledger

    def get_step_report(self) -> dict[str, Any]:
        """What the steps have cost so far, ready for JSON; see the `report` of the step."""
        return self.step.report(self._opt_state, math.fsum(self.history.seconds))

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
        returned with `interrupted` set. A second Ctrl-C raises `KeyboardInterrupt`. After an
        interruption, `resume_from` continues within the epoch, while a plain `train` begins a new
        one. Several processes stop together, once every few steps, if one is interrupted.

        After an error, history, ledger and optimizer state are of the same steps, and the model
        holds what they have come to. If the error was raised within a compiled step, the arrays
        are lost: the trainer goes back to the latest checkpoint of this run, if there is one.

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
        source = None if resume_from is None else checkpoints.absolute(resume_from)
        with contextlib.ExitStack() as stack:
            if source is not None:
                self._restore(source)
            elif self._batch:
                self._epoch, self._batch = self._epoch + 1, 0
            last = epochs if source is not None else self._epoch + epochs
            check_iterable("loader", loader, last - self._epoch)
            if eval_data is not None:
                check_iterable("eval_data", eval_data, last - self._epoch)
            manager = self._open_manager(stack, source)
            stack.enter_context(self._holding_arrays())
            self._log = log
            self.history.interrupted = False
            if self._ledger is not None and not self._ledger.steps:
                self._record()
            bar = stack.enter_context(self._bar(loader, last))
            stop = self._stop = Stop()
            stack.enter_context(stop.catching())
            try:
                while self._epoch < last and not stop:
                    self._run_epoch(loader, last, eval_data, manager, bar)
                stop.share()
                if self._epoch < last:
                    self.history.interrupted = True
                    if manager is not None:
                        self._save(manager)
                    self._record()
            except BaseException as error:
                raise_if_lost(error, self._saved_to)
                self._recover(error)
                raise
        # Also after the last step, where there was nothing left to stop.
        self.history.interrupted = bool(stop)
        return self.history

    def restore(self, source: str | os.PathLike[str]) -> None:
        """Loads the latest checkpoint, and trains nothing.

        Args:
          source: a folder that holds checkpoints of a trainer made with the same arguments.

        Raises:
          ValueError: if the checkpoint does not fit.
          FileNotFoundError: if there is none.
        """
        self._restore(checkpoints.absolute(source))

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Averages the metrics over all rows of some data, with the model in evaluation mode.

        Args:
          data: batches. Each counts by its rows: the first axis of its first array.

        Returns:
          The averages by name.

        Raises:
          ValueError: there are no batches or no rows.
        """
        values = self._evaluate(data, Stop())
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
    ) -> None:
        """Runs what is left of an epoch and closes it, unless it is stopped before."""
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(self._epoch)  # type: ignore[attr-defined]
        done, stop = self._batch, self._stop
        batches = stop.until(loader)
        skipped = sum(1 for _ in itertools.islice(batches, done))
        if skipped < done and not stop:
            raise ValueError(
                f"the loader ended after {skipped} batches, but the checkpoint is {done} batches "
                "into the epoch; resume with the loader that the run was started with"
            )
        self._reset_clock()
        for batch in batches:
            check_batch(batch)
            with stop.shielded():
                self._params, self._rest, self._opt_state, values = self.step(
                    self._params, self._rest, self._opt_state, batch
                )
                self._steps, self._batch = self._steps + 1, self._batch + 1
                self._pending.append(({"step": self._steps, "epoch": self._epoch + 1}, values))
            if self._steps % self._fetch_every == 0:
                self._fetch(bar)
                self._record()
                stop.share()
        self._fetch(bar)
        stop.share()
        # The epoch is open until it has been evaluated, so that a resumed run makes up for it.
        if stop:
            return
        if self._batch == 0:
            raise ValueError("the loader is empty: it gave no batch to train on")
        if eval_data is not None:
            values = self._evaluate(eval_data, stop)
            if values is None:
                return
            record = {"epoch": self._epoch + 1, "step": self._steps, **values}
            self.history.evals.append(record)
            self._tell("eval", record)
        self._epoch, self._batch = self._epoch + 1, 0
        if self._epoch == last:
            self._record()
        if manager is not None:
            self._save(manager)

    def _fetch(self, bar: tqdm | None = None) -> None:
        """Waits for the steps that are on their way and adds them to the history."""
        if not self._pending:
            return
        fetched = wait_and_get([values for _, values in self._pending])
        pending, self._pending = self._pending, []
        clock, compiled = self._since
        self._reset_clock()
        compiling = self._since[1] - compiled
        self.history.compile_seconds += compiling
        seconds = max(self._since[0] - clock - compiling, 0.0) / len(pending)
        records = []
        for (record, _), values in zip(pending, fetched, strict=True):
            record |= {name: float(value) for name, value in values.items()}
            whole = {name: int(values[name]) for name in ("updates", "cached") if name in values}
            records.append(record | whole | {"seconds": seconds})
        good = list(itertools.takewhile(lambda record: math.isfinite(record["loss"]), records))
        # All of them, before a `log` can fail.
        self.history.steps += good
        for record in good:
            self._tell("step", record)
        if len(good) < len(records):
            bad = records[len(good)]
            raise NonFiniteLossError(f"the loss is {bad['loss']}", bad["step"])
        if bar is not None:
            shown = {"loss": f"{records[-1]['loss']:.4g}"}
            if self.step.saved is not None:
                shown["saved"] = f"{self.step.saved:.0%}"
            bar.set_postfix(shown, refresh=False)
            bar.update(len(records))

    def _reset_clock(self) -> None:
        self._since = time.perf_counter(), self.step.compile_seconds

    def _tell(self, kind: str, record: Record) -> None:
        if self._log is not None:
            self._log({"kind": kind, **record})

    def _record(self) -> None:
        if self._ledger is not None:
            self._ledger.record(self._opt_state)

    def _recover(self, error: BaseException) -> None:
        """Brings the books up to date after an error, whatever it was."""
        # What the device has finished is history; the error is the one that is raised.
        with contextlib.suppress(Exception):
            self._fetch()
        self._pending = []
        if _are_usable((self._params, self._rest, self._opt_state)):
            self._record()
        elif self._saved_to is not None and jax.process_count() == 1:
            self._restore(self._saved_to)
            error.add_note(
                "the step had the only arrays, so the trainer is back at the latest checkpoint, of "
                f"step {self._steps}"
            )
        else:
            error.add_note(
                "the step had the only arrays, and the model's are deleted: make model and trainer "
                "anew; with a checkpoint_dir the trainer goes back to the latest checkpoint"
            )

    def _evaluate(self, data: Iterable[Any], stop: Stop) -> dict[str, float] | None:
        """The averages, or None if it was stopped."""
        params, rest = self._current()
        results, rows = [], []
        for batch in stop.until(data):
            check_batch(batch)
            rows.append(rows_in(batch))
            results.append(self._compiled_eval(params, rest, batch))
        if stop:
            return None
        total = sum(rows)
        if total == 0:
            raise ValueError("the data to evaluate on are empty")
        values = wait_and_get(results)
        return {
            name: math.fsum(n * float(value[name]) for n, value in zip(rows, values, strict=True))
            / total
            for name in values[0]
        }

    def _eval_step(self, params, rest, batch):
        model = self._model.evaluator(params, rest)
        if self._metric_fn is not None:
            return check_metrics("metric_fn", self._metric_fn(model, batch))
        loss, metrics = split_result(self._loss_fn(model, batch))
        return {"loss": loss, **metrics}

    # Who holds the arrays: the model outside of `train`, the trainer within.

    def _current(self) -> tuple[Any, Any]:
        if self._training:
            return self._params, self._rest
        params, rest = self._model.split()
        return params, put_beside(params, rest) if jax.tree.leaves(params) else rest

    @contextlib.contextmanager
    def _holding_arrays(self):
        # The originals may have other holders, so the copies are donated, and the model lets go of
        # the originals at once, lest they take memory throughout.
        self._params, self._rest = copy(self._current())
        self._model.join(self._params, self._rest)
        self._rest, self._opt_state = put_beside(self._params, (self._rest, self._opt_state))
        self._training = True
        try:
            layout = (layout_of(self._params), layout_of(self._rest), layout_of(self._opt_state))
            if jax.tree.flatten(layout) != jax.tree.flatten(self._layout):
                self._layout = layout
                self.step.lay_out(layout)
            yield
        finally:
            self._training = False
            self._model.join(self._params, self._rest)
            self._params = self._rest = None

    def _bar(self, loader: Any, last: int) -> tqdm:
        batches = batches_in(loader)
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
        folder = checkpoints.absolute(self.checkpoint_dir)
        manager = stack.enter_context(checkpoints.open_folder(folder))
        if manager.latest_step() is not None and folder not in (self._saved_to, source):
            raise ValueError(
                f"{folder} holds the checkpoints of another run; continue that with resume_from, "
                "choose another checkpoint_dir, or remove the folder"
            )
        return manager

    def _arrays(self) -> dict[str, Any]:
        params, rest = self._current()
        return {"params": params, "rest": rest, "opt_state": self.step.complete(self._opt_state)}

    def _save(self, manager: ocp.CheckpointManager) -> None:
        if any(bool(bad) for bad in jax.device_get(_any_nan(self._current()[0]))):
            raise NonFiniteLossError("the parameters became NaN", self._steps)
        about = {
            "made_by": type(self.step).__name__,
            "steps": self._steps,
            "epoch": self._epoch,
            "batch": self._batch,
            "history": self.history.as_dict(),
            "ledger": None if self._ledger is None else self._ledger.as_dict(),
            "step": self.step.record(),
        }
        checkpoints.save(manager, self._arrays(), about)
        self._saved_to = os.fspath(manager.directory)
        self._reset_clock()

    def _restore(self, source: str) -> None:
        arrays, about = checkpoints.load(source, self._arrays(), type(self.step).__name__)
        history = History.from_dict(about["history"])
        ledger = None if self._ledger is None else Ledger.from_dict(about["ledger"])
        # First of all, as it may refuse.
        self._opt_state = self.step.restore(about["step"], arrays["opt_state"])
        if self._training:
            self._params, self._rest = arrays["params"], arrays["rest"]
        else:
            self._model.join(arrays["params"], arrays["rest"])
        self._steps, self._epoch, self._batch = about["steps"], about["epoch"], about["batch"]
        self.history, self._ledger, self._pending = history, ledger, []


class PriorityPropTrainer(Trainer):
    """Trains a model with `priorityprop` around an optimizer.

    Args:
      model: see `Trainer`, as for `loss_fn` and all that follows `recalc_every`.
      optimizer: the Optax optimizer to spend the budget with; the trainer wraps it in
        `priorityprop`. It sees one slot at a time, so a clipping by norm inside it clips each slot
        by itself.
      loss_fn: `(model, batch) -> loss` or `(loss, metrics)`.
      total_budget: updates a cycle, see `priorityprop`, as for the three that follow.
      min_updates: the least updates of a slot in a cycle.
      max_updates: the most updates of a slot in a cycle.
      recalc_every: steps in a cycle.
      step: makes the step that is run.
      metric_fn: to evaluate with.
      checkpoint_dir: a folder for checkpoints.
      progress: whether to show a progress bar.
      **options: further options of `priorityprop`, such as `spread`, `magnitude` or `group`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: options make no sense, the budget does not fit the number of slots, or the
        optimizer is wrapped already.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import PriorityPropTrainer
      >>> def loss_fn(params, batch):
      ...     x, y = batch
      ...     return jnp.mean((x * params["slope"] + params["offset"] - y) ** 2)
      >>> x = jnp.linspace(0.0, 1.0, 8)
      >>> trainer = PriorityPropTrainer(
      ...     {"slope": jnp.zeros(()), "offset": jnp.zeros(())}, optax.sgd(0.2), loss_fn,
      ...     total_budget=0.75)
      >>> history = trainer.train([(x, 2 * x + 1)] * 20)
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
        step: MakeStep | None = None,
        metric_fn: Callable[[Any, Any], Mapping[str, Any]] | None = None,
        checkpoint_dir: str | os.PathLike[str] | None = None,
        progress: bool = True,
        **options: Any,
    ):
        wrapped = priorityprop(
            optimizer, total_budget, min_updates, max_updates, recalc_every, **options
        )
        params, _ = as_model(model).split()
        if counts(jax.eval_shape(optimizer.init, params)) is not None:
            raise ValueError(
                "the optimizer holds a priorityprop or scale_by_priority already; give the trainer "
                "the inner optimizer, such as optax.adam(1e-3), and it wraps it itself, or give "
                "this one to Trainer"
            )
        where = {name: options.get(name) for name in ("stacked_axis", "group")}
        super().__init__(
            model,
            wrapped,
            loss_fn,
            step,
            metric_fn=metric_fn,
            checkpoint_dir=checkpoint_dir,
            progress=progress,
            slots=find_slots(params, **where) if jax.tree.leaves(params) else None,
        )
        if isinstance(recalc_every, int | np.integer):
            self._fetch_every = int(recalc_every)


def _are_usable(tree: Any) -> bool:
    """Whether no array is deleted, or the result of a step that has failed."""
    try:
        jax.block_until_ready(tree)
    except Exception:  # JAX raises many kinds.
        return False
    return not any(
        leaf.is_deleted() for leaf in jax.tree.leaves(tree) if hasattr(leaf, "is_deleted")
    )


@jax.jit
def _any_nan(tree: Any) -> list[jax.Array]:
    return [jnp.any(jnp.isnan(leaf)) for leaf in jax.tree.leaves(tree)]
