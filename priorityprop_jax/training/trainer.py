"""The training loop: any model, any Optax optimizer, any step; it knows no feature."""

from __future__ import annotations

import contextlib
import datetime
import functools
import math
import os
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import optax
from tqdm import tqdm

from priorityprop_jax.core.layout import layout_of, put_beside
from priorityprop_jax.core.program import abstract
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.training import checkpoints
from priorityprop_jax.training.checkpoints import Path
from priorityprop_jax.training.history import Books, History, NonFiniteLossError, Record, any_nan
from priorityprop_jax.training.interrupts import Stop
from priorityprop_jax.training.loader import check_epochs, check_iterable, check_rows, length, skip
from priorityprop_jax.training.model import Evaluation, MetricFn, as_model, copy, fragile, loss_of
from priorityprop_jax.training.processes import (
    check_batch,
    check_params,
    raise_if_lost,
    telling_others,
    wait,
)
from priorityprop_jax.training.step import LossFn, MakeStep, PlainStep, Setup, Step, StepResult


class Trainer:
    """Trains a model with any Optax optimizer.

    An `nnx` module is trained in place, in the modes that its parts have when the trainer is made
    (`.train()`, or `.eval()` for a frozen BatchNorm), and evaluated with all in evaluation mode;
    its own modes stay as they are. Parameters given as a pytree are copied. Parameters on a
    `jax.sharding.Mesh` and optimizer state stay laid out as they are. Several processes
    (`jax.distributed`) all call the same, with parameters and batches on one mesh.

    Args:
      model: a `flax.nnx.Module`, a pytree of parameters, or an object with the methods of `Model`.
      optimizer: is given the extra arguments ``value`` (the loss), ``grad`` and ``value_fn``.
      loss_fn: `(model or params, batch) -> loss` or `(loss, metrics)`, metrics a dict of scalars.
      step: makes the step that is run; by default the optimizer is given all gradients.
      metric_fn: `(model or params, batch) -> dict` of scalars, to evaluate with; by default the
        loss and the metrics of `loss_fn`.
      eval_params: `(optimizer state, params) -> params` to evaluate with, in place of those that
        are trained, such as `lambda s, p: optax.contrib.schedule_free_eval_params(s, p)`.
      checkpoint_dir: a folder for the latest two checkpoints: of ends of epochs, or interruptions.
      checkpoint_every: a number of steps, or a `datetime.timedelta`, between two checkpoints,
        instead of the end of each epoch; the last step and an interruption are always saved. One
        within an epoch is resumed there, and the batches before it are passed over.
      progress: whether to show a progress bar, which stays quiet if the output is no terminal.
      slots: what the optimizer counts updates of, where it was given ``group`` or
        ``stacked_axis``: `find_slots` with the same. Other steps than the plain one know theirs.

    Attributes:
      step: the `Step` that is run.
      checkpoint_dir: as given; may be changed between two calls of `train`.

    Raises:
      TypeError: an argument is of the wrong kind.
      ValueError: options make no sense, or of several processes each has parameters of its own.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import Trainer
      >>> def loss_fn(params, batch):
      ...     return jnp.mean((batch["x"] * params["slope"] - batch["y"]) ** 2)
      >>> x = jnp.linspace(0.0, 1.0, 8)
      >>> tx = optax.chain(optax.clip(1.0), optax.sgd(0.5))
      >>> trainer = Trainer({"slope": jnp.zeros(())}, tx, loss_fn)
      >>> history = trainer.train([{"x": x, "y": 2 * x}] * 20)
      >>> len(history.loss), history.loss[0] > 1, history.loss[-1] < 0.01
      (20, True, True)
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation | optax.MultiSteps,
        loss_fn: LossFn,
        step: MakeStep | None = None,
        *,
        metric_fn: MetricFn | None = None,
        eval_params: Callable[[Any, Any], Any] | None = None,
        checkpoint_dir: Path | None = None,
        checkpoint_every: int | datetime.timedelta | None = None,
        progress: bool = True,
        slots: Slots | None = None,
    ):
        _check_functions(loss_fn=loss_fn, step=step, metric_fn=metric_fn, eval_params=eval_params)
        checkpoints.check_folder(checkpoint_dir)
        self._due = checkpoints.schedule(checkpoint_every)
        tx = _transformation(optimizer)
        self.checkpoint_dir, self._progress = checkpoint_dir, progress
        self._model = as_model(model)
        self._evaluate = Evaluation(self._model, loss_fn, metric_fn, eval_params)
        self._held: Any = None  # Parameters and rest, while training.
        params, _ = self._current()
        if not jax.tree.leaves(params):
            raise ValueError("the model has no parameters to train")
        check_params(params)
        self._loss = loss = loss_of(self._model, loss_fn)
        shapes = jax.tree.map(abstract, params)  # A step may keep them, but not the arrays.
        plain = functools.partial(PlainStep, loss, shapes, tx, slots)
        setup = Setup(loss, loss_fn, self._model, shapes, tx, plain)
        self.step: Step = plain() if step is None else step(setup)
        if jax.process_count() > 1:
            self.step.check_processes()
        # Some optimizers keep the parameters themselves or one array twice in their state, and a
        # buffer can be donated only once.
        self._opt_state = put_beside(params, copy(self.step.init(params)))
        self._books = Books(self.step, self._opt_state)
        self._fetch_every = 10  # steps
        self._layout: Any = None  # of parameters, rest and optimizer state
        self._saved_to: str | None = None  # The folder that holds checkpoints of this run.
        self._written = checkpoints.Written()
        self._stop = Stop()
        self._careful: bool | None = None  # Whether steps are run on copies; None before the first.

    @property
    def history(self) -> History:
        """What all training so far did, up to an error if there was one."""
        return self._books.history

    @property
    def params(self) -> Any:
        """The parameters: an `nnx.State`, or a pytree like the one that was given."""
        return copy(self._current()[0])

    @property
    def model(self) -> Any:
        """The trained `nnx` module, or the parameters if none was given."""
        if self._held is not None:
            self._model.join(*copy(self._held))
        module = getattr(self._model, "module", None)
        return self.params if module is None else module

    @property
    def optimizer_state(self) -> Any:
        """The state of the optimizer."""
        return copy(self._opt_state)

    def get_priority_report(self) -> Ledger:
        """What was spent on whom so far.

        Raises:
          ValueError: the optimizer does not count it, or of other slots than the trainer knows.
        """
        if self._books.ledger is None:
            raise ValueError(
                "the optimizer's state has no count of the updates of each of the "
                f"{len(self.step.slots)} slots: wrap the optimizer in priorityprop, as "
                "PriorityPropTrainer does, and give the trainer slots=find_slots(params, ...) "
                "where that has a group or a stacked_axis"
            )
        return self._books.ledger

    def get_step_report(self) -> dict[str, Any]:
        """What the steps have cost so far, ready for JSON; see the `report` of the step."""
        return self.step.report(self._opt_state, math.fsum(self.history.seconds))

    def train(
        self,
        loader: Iterable[Any],
        epochs: int = 1,
        *,
        eval_data: Iterable[Any] | None = None,
        resume_from: Path | None = None,
        log: Callable[[Record], Any] | None = None,
    ) -> History:
        """Trains for some epochs more, or continues a run from its checkpoint.

        Ctrl-C ends the training between two steps: the checkpoint is saved, and the history is
        returned with `interrupted` set; a second one raises `KeyboardInterrupt`. Then `resume_from`
        continues within the epoch, while a plain `train` begins a new one. Several processes stop
        together, once every few steps.

        After an error, history, ledger, optimizer state and model are of the same steps, those
        before it. Where `loss_fn` calls the host (`jax.pure_callback` and its like) or JAX looks
        for NaN, steps are run one by one and on copies, as either may raise within a compiled step.
        If anything else does, such as a lack of memory, the arrays are lost: the trainer goes back
        to the latest checkpoint of this run, if there is one.

        Args:
          loader: batches, pytrees of arrays; iterated anew each epoch, after its
            `set_epoch(epoch)`, if it has one, with epochs from 0. To resume bit for bit it must
            give the same batches again. Several processes need as many batches each.
          epochs: how many more; with `resume_from`, how many in all.
          eval_data: batches to evaluate on at the end of each epoch.
          resume_from: a folder with checkpoints of a trainer made with the same arguments.
          log: called with every record of the history, `kind` (`"step"` or `"eval"`) added.

        Returns:
          The history of all training so far, that before `resume_from` included.

        Raises:
          ValueError: `epochs` is below 1, the loader is empty or can be iterated only once, the
            checkpoint does not fit, or `checkpoint_dir` holds the checkpoints of another run.
          FileNotFoundError: there is no checkpoint in `resume_from`.
          NonFiniteLossError: the loss became NaN or infinite.
          WorkerLostError: another process has ended, and no step can be run without it.
        """
        check_epochs(epochs)
        checkpoints.warn_without(self.checkpoint_dir, self._due)
        books, stop = self._books, Stop()
        self._stop = stop
        with telling_others(), contextlib.ExitStack() as stack:
            # Also of Ctrl-C after the last step, where there was nothing left to stop.
            stack.callback(lambda: setattr(self.history, "interrupted", stop.pressed))
            stack.enter_context(stop.catching())
            if resume_from is not None:
                self.restore(resume_from)
            elif books.batch:
                books.epoch, books.batch = books.epoch + 1, 0
            last = epochs if resume_from is not None else books.epoch + epochs
            check_iterable("loader", loader, last - books.epoch)
            check_iterable("eval_data", () if eval_data is None else eval_data, last - books.epoch)
            known = (self._saved_to, resume_from)
            manager = stack.enter_context(checkpoints.open_folder(self.checkpoint_dir, known))
            stack.enter_context(self._holding_arrays())
            books.log = log
            self.history.interrupted = False
            if not books.steps:
                books.record(self._opt_state)
            bar = stack.enter_context(_bar(loader, last - books.epoch, books.batch, self._progress))
            self._careful = None
            try:
                while books.epoch < last and not stop:
                    self._run_epoch(loader, last, eval_data, manager, bar)
                stop.share()
                if books.epoch < last:
                    self.history.interrupted = True
                    self._save(manager)
                    books.record(self._opt_state)
            except BaseException as error:
                raise_if_lost(error, self._saved_to)
                self._recover(error)
                raise
        return self.history

    def restore(self, source: Path) -> None:
        """Loads the latest checkpoint as `train` with `resume_from` does, and trains nothing."""
        like, made_by = self._arrays(), type(self.step).__name__
        (params, rest, opt_state), about, steps, written = checkpoints.load(source, like, made_by)
        self._books.check(about)  # first, as it and the step may refuse
        self._opt_state = self.step.restore(about["step"], opt_state)
        if self._held is None:
            self._model.join(params, rest)
        else:
            self._held = params, rest
        self._written = written
        self._books.restore(about, steps)

    def evaluate(self, data: Iterable[Any]) -> dict[str, float]:
        """Averages metrics over all rows (axis 0 of a batch's first array), in evaluation mode."""
        values = self._evaluate(*self._current(), self._opt_state, data, Stop())
        if values is None:
            raise KeyboardInterrupt  # while getting a batch, which nothing here waits for
        return values

    def _run_epoch(self, loader: Any, last: int, eval_data: Any, manager: Any, bar: tqdm) -> None:
        """Runs what is left of an epoch and closes it, unless it is stopped before."""
        books, stop = self._books, self._stop
        if hasattr(loader, "set_epoch"):
            loader.set_epoch(books.epoch)
        batches = stop.until(loader)
        skip(batches, books.batch, stop)
        books.reset_clock()
        for batch in batches:
            check_rows(batch)
            check_batch(batch)
            with stop.shielded():
                *self._held, self._opt_state, values = self._run_step(batch)
                books.enter(values)
            if books.steps % self._fetch_every == 0:
                self._fetch(bar)
                books.record(self._opt_state)
                stop.share()
            if self._due is not None and self._due(books.steps):
                self._fetch(bar)
                self._save(manager)
        self._fetch(bar)
        stop.share()
        # The epoch is open until it has been evaluated, so that a resumed run makes up for it.
        if stop:
            return
        if books.batch == 0:
            raise ValueError("the loader is empty: it gave no batch to train on")
        if eval_data is not None:
            values = self._evaluate(*self._current(), self._opt_state, eval_data, stop)
            if values is None:
                return
            books.evaluated(values)
        books.epoch, books.batch = books.epoch + 1, 0
        if books.epoch == last:
            books.record(self._opt_state)
        if self._due is None or books.epoch == last:
            self._save(manager)

    def _run_step(self, batch: Any) -> StepResult:
        state = self._held[0], self._held[1], self._opt_state
        if self._careful is None:
            start = time.perf_counter()
            self._careful = fragile(self._loss, *state[:2], batch)
            self._books.tracing += time.perf_counter() - start
        if not self._careful:
            return self.step(*state, batch)
        return wait(self.step(*copy(state), batch))  # pyright: ignore

    def _fetch(self, bar: tqdm) -> None:
        fetched = self._books.fetch(self._current()[0], self._opt_state)
        if fetched:
            saved = {} if self.step.saved is None else {"saved": f"{self.step.saved:.0%}"}
            loss = f"{self.history.steps[-1]['loss']:.4g}"
            bar.set_postfix({"loss": loss, **saved}, refresh=False)
            bar.update(fetched)

    def _recover(self, error: BaseException) -> None:
        """Brings the books up to date after an error, whatever it was."""
        with contextlib.suppress(Exception):  # The first error is the one that is raised.
            self._books.fetch(self._current()[0], self._opt_state)
        self._books.pending = []
        if _are_usable((self._held, self._opt_state)):
            self._books.record(self._opt_state)
            return
        if self._saved_to is not None and jax.process_count() == 1:
            self.restore(self._saved_to)
            now = f"the trainer is back at the latest checkpoint, of step {self._books.steps}"
        else:
            now = (
                "the model's are deleted: make model and trainer anew; with a checkpoint_dir the "
                "trainer goes back to the latest checkpoint"
            )
        error.add_note(f"the step had the only arrays, and {now}")

    # Who holds the arrays: the model outside of `train`, the trainer within.

    def _current(self) -> tuple[Any, Any]:
        if self._held is not None:
            return self._held
        params, rest = self._model.split()
        return params, put_beside(params, rest) if jax.tree.leaves(params) else rest

    @contextlib.contextmanager
    def _holding_arrays(self):
        # The originals may have other holders, so the copies are donated, and the model lets go of
        # the originals at once, lest they take memory throughout.
        self._held = params, rest = copy(self._current())
        self._model.join(params, rest)
        try:
            rest, self._opt_state = put_beside(params, (rest, self._opt_state))
            self._held = params, rest
            layout = tuple(map(layout_of, (params, rest, self._opt_state)))
            if jax.tree.flatten(layout) != jax.tree.flatten(self._layout):
                self._layout = layout
                self.step.lay_out(layout)
            del params, rest
            yield
        finally:
            held, self._held = self._held, None
            self._model.join(*held)

    def _arrays(self) -> tuple[Any, Any, Any]:
        return *self._current(), self.step.complete(self._opt_state)

    def _save(self, manager: Any) -> None:
        if manager is None:
            return
        if any_nan(self._current()[0]):
            raise NonFiniteLossError("the parameters became NaN", self._books.steps)
        about = {"made_by": type(self.step).__name__, "step": self.step.record()}
        about |= self._books.as_dict()
        self._written = checkpoints.save(
            manager, self._arrays(), about, self.history.steps, self._written
        )
        self._saved_to = os.fspath(manager.directory)
        self._books.reset_clock()


def _bar(loader: Any, epochs: int, initial: int, progress: bool) -> tqdm:
    quiet = None if progress and jax.process_index() == 0 else True
    total = length(loader) * epochs or None
    return tqdm(None, "training", total, unit="step", initial=initial, disable=quiet)


def _check_functions(**functions: Any) -> None:
    for name, function in functions.items():
        if not callable(function) and (name == "loss_fn" or function is not None):
            raise TypeError(f"{name} must be a function, got {function!r}")


def _transformation(optimizer: Any) -> optax.GradientTransformationExtraArgs:
    if isinstance(optimizer, optax.MultiSteps):
        optimizer = optimizer.gradient_transformation()
    if not callable(getattr(optimizer, "init", None)):
        raise TypeError(
            f"optimizer must be an optax.GradientTransformation, got {optimizer!r}; of a "
            "flax.nnx.Optimizer give its .tx"
        )
    return optax.with_extra_args_support(optimizer)


def _are_usable(tree: Any) -> bool:
    """Whether no array is deleted, or came out of a step that has failed."""
    try:
        jax.block_until_ready(tree)
    except Exception:  # JAX raises many kinds.
        return False
    arrays = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, jax.Array)]
    return not any(array.is_deleted() for array in arrays)
