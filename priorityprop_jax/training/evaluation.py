"""Averages over data, with the model in evaluation mode."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from priorityprop_jax.training.history import check_metrics
from priorityprop_jax.training.interrupts import Stop
from priorityprop_jax.training.loader import rows_in
from priorityprop_jax.training.model import split_result
from priorityprop_jax.training.processes import check_batch, wait_and_get
from priorityprop_jax.training.step import LossFn, Model

MetricFn = Callable[[Any, Any], Mapping[str, Any]]


class Evaluation:
    """A compiled evaluation, by a ``metric_fn`` or, if that is None, by the loss."""

    def __init__(self, model: Model, loss_fn: LossFn, metric_fn: MetricFn | None) -> None:
        self._model, self._loss_fn, self._metric_fn = model, loss_fn, metric_fn
        self.compiled = jax.jit(self._metrics)

    def __call__(
        self, params: Any, rest: Any, data: Iterable[Any], stop: Stop
    ) -> dict[str, float] | None:
        """The averages over the rows of some batches, or None if it was stopped."""
        results, rows = [], []
        for batch in stop.until(data):
            check_batch(batch)
            rows.append(rows_in(batch))
            results.append(self.compiled(params, rest, batch))
        if stop:
            return None
        if not sum(rows):
            raise ValueError("the data to evaluate on are empty")
        values = wait_and_get(results)
        sums = {
            name: math.fsum(n * float(value[name]) for n, value in zip(rows, values, strict=True))
            for name in values[0]
        }
        return {name: total / sum(rows) for name, total in sums.items()}

    def _metrics(self, params: Any, rest: Any, batch: Any) -> dict[str, Any]:
        model = self._model.evaluator(params, rest)
        if self._metric_fn is not None:
            return check_metrics("metric_fn", self._metric_fn(model, batch))
        loss, metrics = split_result(self._loss_fn(model, batch))
        return {"loss": loss, **metrics}
