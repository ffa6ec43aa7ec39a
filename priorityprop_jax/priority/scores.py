"""Who deserves the budget: magnitude x count discount x depth factor, or a score of one's own."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.slots import Slots

Magnitude = str | Callable[[Any], jax.typing.ArrayLike]


def precision(leaves: Iterable[Any]) -> Any:
    """What scores are computed in: float64 where a leaf is of double precision, else float32."""
    doubles = (jnp.float64, jnp.complex128)
    return jnp.float64 if any(jnp.result_type(x) in doubles for x in leaves) else jnp.float32


def _sizes(grads: Sequence[jax.Array]) -> list[jax.Array]:
    wide = precision(grads)
    return [jnp.abs(g).astype(wide) for g in grads] or [jnp.zeros(0, wide)]


def _sum(grads: Sequence[jax.Array]) -> jax.Array:
    return functools.reduce(jnp.add, map(jnp.sum, _sizes(grads)))


def _mean(grads: Sequence[jax.Array]) -> jax.Array:
    return _sum(grads) / _number(grads)


def _number(grads: Sequence[jax.Array]) -> float:
    # An empty slot has the magnitude 0, not 0 / 0.
    return float(max(sum(g.size for g in grads), 1))


def _norm(grads: Sequence[jax.Array]) -> jax.Array:
    """Scaled by the largest: squares of what is above 1e19 or below 1e-19 are no float32."""
    sizes = _sizes(grads)
    largest = functools.reduce(jnp.maximum, (jnp.max(x, initial=0) for x in sizes))
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, jnp.ones_like(largest))
    return unit * jnp.sqrt(functools.reduce(jnp.add, (jnp.sum((x / unit) ** 2) for x in sizes)))


MAGNITUDES: Mapping[str, Callable[[Sequence[jax.Array]], jax.Array]] = {
    "mean": _mean,
    "sum": _sum,
    "rms": lambda grads: _norm(grads) / math.sqrt(_number(grads)),
    "norm": _norm,
}


def magnitude(grads: Any, kind: Magnitude = "mean") -> jax.Array:
    r"""The magnitude of one slot's gradient, accumulated in float32, of doubles in float64.

    Args:
      grads: pytree of the slot's gradients, real or complex.
      kind: ``"mean"`` (PriorityProp's) or ``"sum"`` of ``|g|``, ``"rms"``, ``"norm"`` (Euclidean),
        or a function of the list of the slot's gradients, such as `optax.tree.norm`.

    Returns:
      A scalar, not negative. NaN and infinite values are passed on.

    Raises:
      ValueError: if ``kind`` is an unknown name.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority.scores import magnitude
      >>> float(magnitude(jnp.array([3.0, -4.0])))
      3.5
      >>> float(magnitude(jnp.array([3.0, -4.0]), "norm"))
      5.0
    """
    leaves = jax.tree.leaves(grads)
    if isinstance(kind, str):
        check_magnitude(kind)
        return MAGNITUDES[kind](leaves)
    return jnp.abs(jnp.asarray(kind(leaves), precision(leaves))).reshape(())


def gain(grads: Any, updates: Any) -> jax.Array:
    r"""The first-order decrease of the loss that an update promises, ``|<g, u>|``.

    Args:
      grads: pytree of one slot's gradients.
      updates: pytree of the inner optimizer's updates for them.

    Returns:
      A scalar, in the precision of `magnitude`. For complex leaves the real part counts.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority.scores import gain
      >>> float(gain(jnp.array([1.0, 2.0]), jnp.array([-0.1, -0.2])))
      0.5
    """
    real = precision(jax.tree.leaves((grads, updates)))

    def product(g, u):
        wide = real
        if jnp.iscomplexobj(g) or jnp.iscomplexobj(u):
            wide = jnp.complex128 if real == jnp.float64 else jnp.complex64
        return jnp.sum(jnp.real(jnp.conj(g.astype(wide)) * u.astype(wide)))

    products = jax.tree.leaves(jax.tree.map(product, grads, updates))
    return jnp.abs(functools.reduce(jnp.add, products, jnp.zeros((), real)))


def priority(
    magnitudes: jax.typing.ArrayLike,
    update_counts: jax.typing.ArrayLike,
    depth_factors: jax.typing.ArrayLike,
    costs: jax.typing.ArrayLike = 1.0,
) -> jax.Array:
    r"""The priority of every slot.

    .. math:: s_i = m_i \cdot \frac{1}{c_i} \cdot d_i \,/\, \text{cost}_i

    Args:
      magnitudes: ``[slots]``, float32 or float64; NaN and infinite ones count as 0.
      update_counts: ``int32[slots]``, updates that each slot has had so far. The count ``c_i`` is
        from 1: a slot without an update has ``c_i = 1``.
      depth_factors: ``float32[slots]``.
      costs: ``float32[slots]`` or a scalar, the relative price of one update.

    Returns:
      ``[slots]``, of the magnitudes' dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority.scores import priority
      >>> priority(jnp.array([1.0, 1.0]), jnp.array([0, 3]), jnp.array([1.0, 2.0])).tolist()
      [1.0, 0.5]

    References:
      PriorityProp 0.1.0 (Omur Bera Isik): ``|gradient| x (1 / update_count) x depth_factor``.
    """
    return _priority(magnitudes, update_counts, depth_factors, costs)


@functools.partial(jax.jit, inline=True)  # a host asks for it too, once a cycle
def _priority(magnitudes, update_counts, depth_factors, costs):
    magnitudes = jnp.asarray(magnitudes)
    wide = precision([magnitudes])
    magnitudes = magnitudes.astype(wide)
    usable = jnp.where(jnp.isfinite(magnitudes), magnitudes, 0.0)
    counts = jnp.maximum(jnp.asarray(update_counts).astype(wide) + 1.0, 1.0)
    factors = jnp.asarray(depth_factors, wide) / jnp.asarray(costs, wide)
    return usable * (1.0 / counts) * factors


@dataclasses.dataclass(frozen=True)
class Look:
    """What a score may look at. Vectors are over slots, ``[slots]``; all but `slots` is traced.

    Attributes:
      slots: names, shapes, sizes and depths. Static.
      step: ``int32[]``, steps taken so far.
      counts: ``int32``, updates that each slot has had.
      depth_factors: ``float32``.
      costs: ``float32``, the relative price of one update.
      last: ``float32``, magnitudes of the last cycle; in `budgeted`, of each slot's last update.
      measure: ``measure(fn)`` gives ``float32``: the number ``fn(grads, params, updates)`` of every
        slot, each a list of the slot's leaves, one layer's where they are stacked; 0 where there is
        no gradient. ``params`` is None where ``update`` was given none; ``updates`` are those that
        the inner optimizer would make, None where there is no inner optimizer.
      weigh: makes `magnitudes`.
    """

    slots: Slots
    step: jax.Array
    counts: jax.Array
    depth_factors: jax.typing.ArrayLike
    costs: jax.typing.ArrayLike
    last: jax.Array
    measure: Callable[[Callable[..., Any]], jax.Array]
    weigh: Callable[[], jax.Array]

    @functools.cached_property
    def magnitudes(self) -> jax.Array:
        """``float32[slots]``, of the gradients; computed where a score asks for them."""
        return self.weigh()


Score = str | Callable[[Look], jax.typing.ArrayLike]


def _priorityprop(look: Look) -> jax.Array:
    return priority(look.magnitudes, look.counts, look.depth_factors, look.costs)


def _gain(look: Look) -> jax.Array:
    """What the loss should fall by, per cost."""
    return look.measure(lambda grads, params, updates: gain(grads, updates)) / look.costs


def _change(look: Look) -> jax.Array:
    """How far the magnitude is from the last one."""
    return jnp.abs(look.magnitudes - look.last)


def _random(look: Look) -> jax.Array:
    return jax.random.uniform(jax.random.fold_in(jax.random.key(0), look.step), look.counts.shape)


def _robin(look: Look) -> jax.Array:
    """In turn: how many updates a slot is behind."""
    return jnp.max(look.counts, initial=0) - look.counts


def _uniform(look: Look) -> jax.Array:
    return jnp.ones(look.counts.shape)


SCORES: Mapping[str, Callable[[Look], jax.Array]] = {
    "priorityprop": _priorityprop,
    "gain": _gain,
    "change": _change,
    "random": _random,
    "robin": _robin,
    "uniform": _uniform,
}


def score(look: Look, kind: Score) -> jax.Array:
    """``[slots]``: the score of every slot by name or function; 0 where it is not finite."""
    values = jnp.asarray(SCORES[kind](look) if isinstance(kind, str) else kind(look))
    if values.shape != look.counts.shape:
        raise ValueError(
            f"a score must return a vector of one number a slot, [{look.counts.size}], "
            f"got shape {values.shape}"
        )
    return jnp.where(jnp.isfinite(values), values, 0)


def measure(
    slots: Slots, fn: Callable[..., Any], grads: Sequence[Any], params: Sequence[Any] | None = None
) -> jax.Array:
    """`Look.measure` where there is no inner optimizer; ``grads`` and ``params`` are flat."""
    wide = precision(jax.tree.leaves(grads))
    values = [jnp.zeros(0, wide)]
    for bundle in slots.bundles:
        own = [grads[leaf] for leaf in bundle.leaves]
        beside = None if params is None else [params[leaf] for leaf in bundle.leaves]

        def of_layer(own, beside):
            return jnp.asarray(fn(own, beside, None), wide).reshape(())

        axes = list(bundle.axes)
        if own[0] is None:
            values.append(jnp.zeros(bundle.slots, wide))
        elif bundle.layers is None:
            values.append(of_layer(own, beside)[None])
        else:
            over = (axes, None if beside is None else axes)
            values.append(jax.vmap(of_layer, over)(own, beside))
    return jnp.concatenate(values)


def depth_factors(
    slots: Slots,
    depth_base: float | jax.Array = 1.1,
    depth_factor: Callable[[str], float] | None = None,
) -> np.ndarray | jax.Array:
    """``float32[slots]``: ``depth_base ** depth_i``, or the user's own factors, by slot name.

    Of NumPy where all is static; a ValueError then if one is not finite and above 0.
    """
    if isinstance(depth_base, jax.Array) and depth_factor is None:
        return jnp.asarray(depth_base, jnp.float32) ** np.asarray(slots.depths, np.float32)
    if depth_factor is None:
        with np.errstate(all="ignore"):
            values = np.float64(depth_base) ** np.asarray(slots.depths, np.float64)
        names = [f"depth_base={depth_base} at depth {depth}" for depth in slots.depths]
    else:
        values = [float(depth_factor(name)) for name in slots.names]
        names = [f"depth_factor({name!r})" for name in slots.names]
    return _positive(values, names)


def cost_vector(slots: Slots, costs: Mapping[str, float]) -> np.ndarray:
    """``float32[slots]``: the costs by slot name as a vector; a ValueError if they do not fit."""
    if set(costs) != set(slots.names):
        odd = sorted(set(costs) ^ set(slots.names))
        raise ValueError(f"costs must name every slot and no other; look at {odd[0]!r}")
    names = [f"costs[{name!r}]" for name in slots.names]
    return _positive([float(costs[name]) for name in slots.names], names)


def _positive(values: Sequence[float] | np.ndarray, names: Sequence[str]) -> np.ndarray:
    with np.errstate(over="ignore", under="ignore"):
        vector = np.asarray(values, np.float32)
    for value, given, name in zip(vector, values, names, strict=True):
        if not (np.isfinite(value) and value > 0):
            raise ValueError(f"{name} is {given}, but must be a finite float32 above 0")
    return vector


def check_magnitude(kind: Magnitude, extra: Sequence[str] = ()) -> None:
    """Raises a ValueError if ``kind`` is neither a known magnitude nor a function."""
    if not callable(kind) and kind not in (*MAGNITUDES, *extra):
        raise ValueError(
            f"magnitude must be one of {(*MAGNITUDES, *extra)} or a function, got {kind!r}"
        )


def check_score(kind: Score, extra: Sequence[str] = ()) -> None:
    """Raises a ValueError if ``kind`` is neither a known score nor a function."""
    names = [name for name in SCORES if name != "gain" or name in extra]
    if not callable(kind) and kind not in names:
        raise ValueError(f"score must be one of {(*names,)} or a function, got {kind!r}")
