"""Dynamic sparse training at a fixed number of non-zeros (RigL; Evci et al., 2020)."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.sparse.layers import as_matrix
from priorityprop_jax.sparse.pattern import ARRAYS, SparsePattern, change_pattern, mask_of
from priorityprop_jax.sparse.swap import by_all_names, move_state, replace, sparse_layers


def dynamic(end: int, *, every: int = 100, fraction: float = 0.3) -> Callable[[Any], Any]:
    """Makes the training step of dynamic sparse training, for ``Trainer(step=...)``.

    Before step ``every``, ``2 * every`` and so on, up to ``end``, each `SparseLinear` and
    `SparseConv` of an `nnx` module drops a fraction of its places, where values are smallest, and
    grows as many where the magnitude of the dense gradient of that batch is largest. New values are
    zero, and so is what the optimizer keeps of them. In between, steps cost what the non-zeros
    cost, and nothing is compiled anew.

    Args:
      end: the step from which places stay, such as three quarters of the run.
      every: steps between two changes.
      fraction: of the places that move, at first; at step ``t`` it is this times
        ``(1 + cos(pi t / end)) / 2``.

    Returns:
      A function of a `Setup` that wraps its plain step. It raises a ValueError where the model has
      no sparse layers.

    Raises:
      ValueError: an option makes no sense.

    Example:
      >>> from priorityprop_jax import sparse
      >>> make_step = sparse.dynamic(end=7500, every=100)

    References:
      Evci et al., Rigging the Lottery, https://arxiv.org/abs/1911.11134
    """
    for name, value in {"end": end, "every": every}.items():
        if isinstance(value, bool) or int(value) != value or value < 1:
            raise ValueError(f"{name} must be a whole number of steps from 1 on, got {value}")
    if not 0 <= fraction <= 1:
        raise ValueError(f"fraction must be from 0 to 1, got {fraction}")
    options = {"end": int(end), "every": int(every), "fraction": float(fraction)}
    return functools.partial(DynamicStep, **options)


class DynamicStep:
    """The step of `dynamic`: the plain one, and before it a change of places when it is time."""

    def __init__(self, setup: Any, *, end: int, every: int, fraction: float) -> None:
        module = setup.model.evaluator(*setup.model.split())
        if not isinstance(module, nnx.Module) or not sparse_layers(module):
            raise ValueError(
                "the model has no SparseLinear or SparseConv whose places could move: put them "
                "into an nnx module first, such as by sparse_start(model, 0.9)"
            )
        self._options = {"end": end, "every": every, "fraction": fraction}
        self._model, self._loss_fn = setup.model, setup.loss_fn
        self._plain = setup.plain()
        self._scores = jax.jit(self._dense_gradients)
        self._compiling: float | None = None  # seconds; None before the first change
        self._steps = 0

    def __getattr__(self, name: str) -> Any:
        """All else is the plain step's."""
        return getattr(self._plain, name)

    @property
    def compile_seconds(self) -> float:
        """Wall seconds spent on tracing and compiling so far."""
        return self._plain.compile_seconds + (self._compiling or 0.0)

    def __call__(
        self, params: Any, rest: Any, opt_state: Any, batch: Any
    ) -> tuple[Any, Any, Any, dict[str, Any]]:
        """Moves places, if it is time, and runs the plain step."""
        end, every, fraction = self._options.values()
        if 0 < self._steps < end and self._steps % every == 0:
            now = cosine_fraction(self._steps, end, fraction)
            params, rest, opt_state = self._move(now, params, rest, opt_state, batch)
        result = self._plain(params, rest, opt_state, batch)
        self._steps += 1
        return result

    def record(self) -> dict[str, Any]:
        """The options, and how many steps were run: what a resumed run goes on with."""
        return {"dynamic": self._options, "steps": self._steps, "plain": self._plain.record()}

    def restore(self, record: Mapping[str, Any], opt_state: Any) -> Any:
        """Goes on from a record; one of other options is a ValueError."""
        if record.get("dynamic") != self._options:
            raise ValueError(
                f"the run was recorded with dynamic sparsity {record.get('dynamic')}, this one has "
                f"{self._options}: give it the same options"
            )
        state = self._plain.restore(record["plain"], opt_state)
        self._steps = record["steps"]
        return state

    def check_processes(self) -> None:
        """Raises a ValueError: several processes cannot run this step."""
        raise ValueError(
            "the places of sparse layers are chosen in the host memory of one process: leave "
            "sparse.dynamic out where several train together"
        )

    def _move(
        self, fraction: float, params: Any, rest: Any, opt_state: Any, batch: Any
    ) -> tuple[Any, Any, Any]:
        """Parameters, index arrays and optimizer state after a change of places; shapes stay."""
        start = time.perf_counter()
        scores = jax.device_get(self._scores(params, rest, batch))
        if self._compiling is None:
            self._compiling = time.perf_counter() - start
        model = self._model.evaluator(params, rest)
        changes = {}
        for name, layer in sparse_layers(model).items():
            changes[id(layer)] = drop_and_grow(
                layer.values[...], layer.pattern, as_matrix(scores[name]), fraction=fraction
            )
        # A shared layer stands in the trees under one of its names.
        moved, arrays = {}, {}
        for name, layer in by_all_names(model, sparse_layers(model).values()).items():
            pattern, source = changes[id(layer)]
            moved[name] = layer.values.shape, source
            for array in ARRAYS:
                arrays[f"{name}/index/{array}".lstrip("/")] = getattr(pattern, array)

        def indices(path, leaf):
            name = path_name(path)
            return _like(arrays[name], leaf) if name in arrays else leaf

        return (
            move_state(params, moved, _like),
            jax.tree_util.tree_map_with_path(indices, rest),
            move_state(opt_state, moved, _like),
        )

    def _dense_gradients(self, params: Any, rest: Any, batch: Any) -> dict[str, jax.Array]:
        """Magnitudes of the gradients of all kernels as if they were dense, by layer."""

        def loss(kernels):
            def densely(model, batch):
                model, dense = nnx.clone(model), {}  # as the layers are not the model's
                for name, layer in sparse_layers(model).items():
                    dense[id(layer)] = layer.to_dense()
                    dense[id(layer)].kernel.set_value(kernels[name])
                return self._loss_fn(replace(model, dense), batch)

            result, _ = self._model.loss(densely, params, rest, batch)
            return result[0] if isinstance(result, tuple) else result

        layers = sparse_layers(self._model.evaluator(params, rest))
        kernels = {name: layer.kernel() for name, layer in layers.items()}
        return jax.tree.map(jnp.abs, jax.grad(loss)(kernels))


def _like(new: jax.Array, old: jax.Array) -> jax.Array:
    """Where the old one was, as for anything else a step would be compiled anew."""
    return jax.device_put(new, old.sharding) if old.committed else new


def drop_and_grow(
    values: Any, pattern: SparsePattern, scores: Any, *, fraction: float
) -> tuple[SparsePattern, jax.Array]:
    """Moves a fraction of the places of a weight from small values to where scores are large.

    Of ``n`` places the ``round(fraction * n)`` of the smallest values ``[capacity]`` are dropped,
    and as many grown where nothing stood and scores ``[out, in]`` are largest. Only when there are
    too few of these do dropped places stay, those with the largest scores. Of equal ones the
    earlier place by row is kept, or grown. A value of NaN counts as infinite, a score of NaN as
    minus infinity. On concrete arrays, on the host; returns what `change_pattern` does.
    """
    values, scores = _to_float(values), _to_float(scores)
    mask = mask_of(pattern).reshape(-1)
    places, free = np.flatnonzero(mask), np.flatnonzero(~mask)
    magnitudes = np.abs(values[: len(places)])
    magnitudes = np.where(np.isnan(magnitudes), np.inf, magnitudes)
    scores = np.where(np.isnan(scores), -np.inf, scores).reshape(-1)

    moved = round(float(fraction) * len(places))
    dropped = places[~_largest(magnitudes, len(places) - moved)]
    mask[dropped] = False
    grown = min(moved, len(free))
    mask[free[_largest(scores[free], grown)]] = True
    mask[dropped[_largest(scores[dropped], moved - grown)]] = True
    return change_pattern(pattern, mask.reshape(pattern.shape))


def cosine_fraction(step: int, end: int, initial: float) -> float:
    """The fraction to move at a step up to ``end``, as RigL has it."""
    return initial / 2 * (1 + math.cos(math.pi * step / end))


def _largest(scores: np.ndarray, count: int) -> np.ndarray:
    """Which are the `count` largest, of equal ones the first; without a sort. No NaN."""
    if count == 0:
        return np.zeros(len(scores), bool)
    threshold = np.partition(scores, len(scores) - count)[len(scores) - count]
    chosen = scores > threshold
    ties = np.flatnonzero(scores == threshold)
    chosen[ties[: count - int(chosen.sum())]] = True
    return chosen


def _to_float(array: Any) -> np.ndarray:
    """Floating point that NumPy computes in: bfloat16 as float32."""
    array = np.asarray(array)
    return array if array.dtype in (np.float32, np.float64) else array.astype(np.float32)
