"""PriorityProp's trainer: the training loop around an optimizer on a budget of updates."""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
import optax

from priorityprop_jax.core.slots import find_slots
from priorityprop_jax.priority.options import DEFAULT_BUDGET, Budget
from priorityprop_jax.priority.transform import priorityprop
from priorityprop_jax.training.checkpoints import Path
from priorityprop_jax.training.model import MetricFn, as_model
from priorityprop_jax.training.step import LossFn, MakeStep, counts
from priorityprop_jax.training.trainer import Trainer


class PriorityPropTrainer(Trainer):
    """A `Trainer` that wraps the optimizer in `priorityprop`.

    The optimizer sees one slot at a time: a clipping by norm inside it clips each slot by itself.
    The arguments from `total_budget` to `recalc_every` and the ``options`` are those of
    `priorityprop`, the others those of `Trainer`.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import PriorityPropTrainer
      >>> def loss_fn(params, x):
      ...     return (params["slope"] * x + params["offset"] - 1.0) ** 2
      >>> params = {"slope": jnp.zeros(()), "offset": jnp.zeros(())}
      >>> trainer = PriorityPropTrainer(params, optax.sgd(0.2), loss_fn, total_budget=0.75)
      >>> history = trainer.train([jnp.ones(())] * 20)
      >>> sum(history.updates)  # 0.75 of 2 slots x 20 steps
      30
    """

    def __init__(
        self,
        model: Any,
        optimizer: optax.GradientTransformation,
        loss_fn: LossFn,
        total_budget: Budget = DEFAULT_BUDGET,
        min_updates: jax.typing.ArrayLike = 1,
        max_updates: jax.typing.ArrayLike = 20,
        recalc_every: jax.typing.ArrayLike = 10,
        *,
        step: MakeStep | None = None,
        metric_fn: MetricFn | None = None,
        eval_params: Callable[[Any, Any], Any] | None = None,
        checkpoint_dir: Path | None = None,
        checkpoint_every: int | datetime.timedelta | None = None,
        progress: bool = True,
        **options: Any,
    ):
        budget = (total_budget, min_updates, max_updates, recalc_every)
        wrapped = priorityprop(optimizer, *budget, **options)
        model = as_model(model)
        params, _ = model.split()
        if counts(jax.eval_shape(optimizer.init, params)) is not None:
            raise ValueError(
                "the optimizer holds a priorityprop or scale_by_priority already; give the trainer "
                "the inner optimizer, such as optax.adam(1e-3), and it wraps it itself, or give "
                "this one to Trainer"
            )
        where = {name: options.get(name) for name in ("stacked_axis", "group")}
        slots = find_slots(params, **where) if jax.tree.leaves(params) else None
        super().__init__(
            model, wrapped, loss_fn, step, metric_fn=metric_fn, eval_params=eval_params,
            checkpoint_dir=checkpoint_dir, checkpoint_every=checkpoint_every, progress=progress,
            slots=slots,
        )  # fmt: skip
        names = ("total_budget", "min_updates", "max_updates", "recalc_every")
        given = {**dict(zip(names, budget, strict=True)), **options}
        # What is a function or an array JSON cannot hold.
        self._books.options = {k: v for k, v in given.items() if isinstance(v, int | float | str)}
        if isinstance(recalc_every, int | np.integer):
            # Each cycle is in the ledger; where cycles are short, some at a time.
            self._fetch_every = int(recalc_every) * math.ceil(5 / int(recalc_every))
