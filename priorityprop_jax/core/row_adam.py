"""Adam that touches the rows which have a gradient, and is Adam of all rows all the same."""

from __future__ import annotations

import dataclasses
import difflib
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx, serialization
from jax import lax

from priorityprop_jax.core.fragile import spec_of
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.row_optimizers import (
    all_first,
    beside_rows,
    check_number,
)
from priorityprop_jax.core.rows import SCATTER, RowSparse, distinct, is_row_sparse, row_numbers

_ROWS = 4096  # of a table that are caught up at once, where all are


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Rule:
    """The numbers of Adam, which say what a row has missed."""

    learning_rate: Any
    b1: float
    b2: float
    eps: float
    weight_decay: float

    def rate(self, step: jax.Array) -> Any:
        """The learning rate of one step, counted from 0."""
        return self.learning_rate(step) if callable(self.learning_rate) else self.learning_rate

    @property
    def inner(self) -> optax.GradientTransformation:
        """What a step does to moments and gradients."""
        return optax.scale_by_adam(self.b1, self.b2, self.eps)


# What a file of Flax holds of it is nothing: the optimizer that reads it has its own.
serialization.register_serialization_state(Rule, lambda rule: {}, lambda rule, _: rule)


class RowAdamState(NamedTuple):
    """The state of `row_adam`; tuples are of the leaves of the parameters in flatten order."""

    rule: Any  # a `Rule`, static
    adam: optax.ScaleByAdamState
    last: tuple[Any, ...]  # int32[rows], steps that a row has seen; () below two dimensions
    decay: Any  # float[2], sum of log(1 - rate * weight decay) in two parts; () without decay
    decay_at: tuple[Any, ...]  # float[rows, 2], what it was at a row's last step; or ()


def row_adam(
    learning_rate: optax.ScalarOrSchedule,
    b1: float = 0.9,
    b2: float = 0.999,
    eps: float = 1e-8,
    *,
    weight_decay: float = 0.0,
) -> optax.GradientTransformationExtraArgs:
    r"""`optax.adam`, or `optax.adamw`, that touches only the rows that have a gradient.

    Adam moves a row that has no gradient too, by what its moments still hold. Here it stands still
    until it is needed, and `catch_up` then makes up for the ``n`` steps that it has missed,

    .. math:: \theta \leftarrow \theta - m \sum_{j=1}^{n} \frac{\eta_{t+j}\, b_1^j / (1 -
       b_1^{t+j})}{\sqrt{v b_2^j / (1 - b_2^{t+j})} + \epsilon}, \quad m \leftarrow b_1^n m, \quad
       v \leftarrow b_2^n v,

    with decay of weights in its place between. The result is that of `optax` to rounding, unlike
    that of `row_sparse_adam`, whose untouched rows keep their moments: another algorithm. A row
    must be caught up before the model reads it, at the start of each step, and all rows before
    anybody else does, to evaluate or to save. A row with a gradient that was not gets NaN.

    The sum takes no loop over steps: all of a row's elements share its weights, the denominator is
    smooth in :math:`\log b_2^j / (1 - b_2^{t+j})`, and some ten Chebyshev nodes, weighted for each
    row, stand for all steps until :math:`b_1^j` is below rounding.

    Args:
      learning_rate: a number, or a schedule of steps, which is asked about past steps again.
      b1: decay of the first moment, in [0, 1) and below ``sqrt(b2)``, as else what is missed never
        fades.
      b2: decay of the second moment, in (0, 1).
      eps: added to the root of the second moment, above 0.
      weight_decay: decoupled, times the learning rate; of all leaves. At least 0.

    Returns:
      An `optax.GradientTransformationExtraArgs`. Where the gradient is `RowSparse` so is the
      update, of the same rows; dense gradients give what `optax.adamw` gives.

    Raises:
      TypeError: if an argument is of the wrong kind; none may be traced, nor injected.
      ValueError: if a number is out of its range; when called, if a gradient is None or does not
        fit, or one of rows is of no table in float32 or float64.

    Example:
      >>> import jax.numpy as jnp
      >>> import optax
      >>> from priorityprop_jax import exact
      >>> params, tx = {"table": jnp.ones((1000, 4))}, exact.row_adam(0.1)
      >>> loss_fn = lambda params, ids: (exact.take(params["table"], ids) ** 2).sum()
      >>> state = tx.init(params)
      >>> for ids in (jnp.array([3, 7]), jnp.array([3, 3]), jnp.array([7, 1])):
      ...     params, state = exact.catch_up(params, state, {"table": ids})
      ...     value, grads = exact.value_and_grad(loss_fn)(params, ids)
      ...     updates, state = tx.update(grads, state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> params, state = exact.catch_up(params, state)  # all rows, to be read
      >>> params["table"][jnp.array([0, 1, 3, 7]), 0].round(2).tolist()
      [1.0, 0.9..., 0.7..., 0.7...]
    """
    if not callable(learning_rate):
        check_number("learning_rate", learning_rate, "a number or a schedule")
    given = {"b1": b1, "b2": b2, "eps": eps, "weight_decay": weight_decay}
    given |= {} if callable(learning_rate) else {"learning_rate": learning_rate}
    for name, number in given.items():
        check_number(name, number, below=1 if name in ("b1", "b2") else math.inf)
        if not isinstance(number, int | float | np.number):
            raise TypeError(
                f"{name} must be a number that stays, as rows are caught up by it: got {number!r}; "
                "a learning rate that changes is a schedule of steps"
            )
    if not (b1 < math.sqrt(b2) and eps > 0):
        raise ValueError(
            f"b1 must be below the root of b2, and eps above 0: got b1={b1}, b2={b2}, eps={eps}"
        )
    if not callable(learning_rate):
        learning_rate = float(learning_rate)
        if learning_rate * weight_decay >= 1:
            raise ValueError("learning_rate * weight_decay must be below 1: nothing else is left")
    rule = Rule(learning_rate, float(b1), float(b2), float(eps), float(weight_decay))
    inner: Any = rule.inner
    decayed: Any = optax.add_decayed_weights(rule.weight_decay)

    def init_fn(params):
        def zeros(x, dtype, *more):
            if jnp.ndim(x) < 2:
                return ()
            return beside_rows(jnp.zeros((jnp.shape(x)[0], *more), dtype), x)

        leaves, decays = jax.tree.leaves(params), weight_decay > 0
        last = tuple(zeros(x, jnp.int32) for x in leaves)
        decay_at = tuple(zeros(x, float, 2) if decays else () for x in leaves)
        return RowAdamState(
            rule, inner.init(params), last, jnp.zeros(2) if decays else (), decay_at
        )

    def update_fn(updates, state, params=None, **extra_args):
        del extra_args
        grads, treedef = jax.tree.flatten(updates, is_leaf=is_row_sparse)
        moments = [jax.tree.leaves(x) for x in (state.adam.mu, state.adam.nu)]
        leaves = moments[0] if params is None else jax.tree.leaves(params)
        if not len(grads) == len(leaves) == len(state.last):
            raise ValueError(
                f"there are {len(grads)} gradients and {len(state.last)} parameters: row_adam "
                "takes a gradient for each, and optax.partition splits off what is not trained"
            )
        for grad, leaf in zip(grads, leaves, strict=True):
            _check(grad, leaf)
        now, rate = state.adam.count, rule.rate(state.adam.count)
        rows = [jnp.asarray(g.index, jnp.int32) if is_row_sparse(g) else None for g in grads]

        def part(x, rows):
            return x if rows is None else x.at[rows].get(mode="clip")

        parts = [[*map(part, own, rows)] for own in (*moments, leaves)]
        values = [grad.values if is_row_sparse(grad) else grad for grad in grads]
        with jax.numpy_dtype_promotion("standard"):  # the optimizer's own affair
            moved, adam = inner.update(values, optax.ScaleByAdamState(now, *parts[:2]))
            if weight_decay:
                own = None if params is None else parts[2]
                moved, _ = decayed.update(moved, optax.EmptyState(), own)
        seen = [_seen(last, at, now) for last, at in zip(state.last, rows, strict=True)]
        moved = [
            jnp.where(good, jnp.asarray(-rate, u.dtype) * u, jnp.nan).astype(u.dtype)
            for good, u in zip(seen, moved, strict=True)
        ]
        decay = state.decay
        if weight_decay:
            decay = _plus(decay, jnp.log1p(-rate * rule.weight_decay))
        # Every read of the old rows comes before the first write to them.
        mu, nu = adam.mu, adam.nu
        for i in (i for i, at in enumerate(rows) if at is not None):
            own = moved[i], mu[i], nu[i], rows[i]
            moved[i], mu[i], nu[i], rows[i] = lax.optimization_barrier(own)

        def put(x, new, rows):
            if isinstance(x, tuple):
                return x
            if rows is not None:
                return x.at[rows].set(new.astype(x.dtype), **SCATTER)
            return new.astype(x.dtype) if new.shape == x.shape else jnp.full_like(x, new)

        mu, nu = ([*map(put, *own, rows)] for own in zip(moments, (mu, nu), strict=True))
        back = jax.tree.structure(state.adam.mu).unflatten
        last = tuple(put(x, adam.count, at) for x, at in zip(state.last, rows, strict=True))
        decay_at = tuple(put(x, decay, at) for x, at in zip(state.decay_at, rows, strict=True))
        adam = optax.ScaleByAdamState(adam.count, back(mu), back(nu))
        moved = [
            u if at is None else RowSparse.of_sorted(at, u, grad.shape)
            for grad, u, at in zip(grads, moved, rows, strict=True)
        ]
        state = RowAdamState(rule, adam, last, decay, decay_at)
        return treedef.unflatten(all_first(moved)), state

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)


def catch_up(params: Any, opt_state: Any, ids: Mapping[str, Any] | None = None) -> Any:
    """Gives rows what they have missed under `row_adam`, so that they may be read.

    Args:
      params: pytree of parameters; or an `nnx.Module`, changed in place.
      opt_state: the state of an optimizer with `row_adam` in it; or the `nnx.Optimizer`, changed in
        place.
      ids: by the name of a table, such as ``"embed/word/embedding"``, the rows that are about to be
        read, whole numbers ``[...]`` that may repeat. By default all rows of all tables: before the
        model is evaluated or saved.

    Returns:
      The parameters and the state; None for a module.

    Raises:
      ValueError: if there is no table of a name, or not one `row_adam` in the state.

    `row_adam` has an example.
    """
    if isinstance(params, nnx.Module):
        state = nnx.state(params, opt_state.wrt)
        found = catch_up(nnx.as_pure(state), nnx.as_pure(opt_state.opt_state), ids)
        nnx.update(params, found[0])
        nnx.update(opt_state.opt_state, nnx.state(found[1]))
        return None
    is_ours = lambda node: isinstance(node, RowAdamState)  # noqa: E731
    states = [node for node in jax.tree.leaves(opt_state, is_leaf=is_ours) if is_ours(node)]
    if len(states) != 1:
        raise ValueError(f"expected one row_adam in the optimizer's state, found {len(states)}")
    params, new = _caught_up(params, states[0], ids)
    return params, jax.tree.map(lambda x: new if is_ours(x) else x, opt_state, is_leaf=is_ours)


def _caught_up(params: Any, state: RowAdamState, ids: Any) -> tuple[Any, RowAdamState]:
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    leaves = {path_name(path): leaf for path, leaf in paths}
    # The optimizer may be of a part of the parameters.
    own, _ = jax.tree_util.tree_flatten_with_path(state.adam.mu)
    mu, nu = (jax.tree.leaves(x) for x in (state.adam.mu, state.adam.nu))
    last, decay_at = list(state.last), list(state.decay_at)
    tables = {path_name(path): i for i, (path, leaf) in enumerate(own) if _is_table(leaf)}
    for name in ids or ():
        if name not in tables:
            close = difflib.get_close_matches(name, tables, n=4, cutoff=0.3) or list(tables)[:4]
            raise ValueError(
                f"no table of float32 or float64 is called {name!r}; the closest are {close}"
            )
    now, decay = jnp.asarray(state.adam.count), state.decay

    def one(row):
        return _missed(state.rule, now, decay, *row)

    for name, i in tables.items():
        if any(spec_of(leaves[name])) or 0 in leaves[name].shape:
            continue  # gradients are whole arrays, or there is nothing
        whole = leaves[name], mu[i], nu[i], last[i], decay_at[i]
        if ids is None:
            size = min(_ROWS, len(last[i]))
            every = lambda x, size=size: lax.map(one, x, batch_size=size)  # noqa: E731
            new = lax.cond(jnp.all(last[i] == now), lambda x: x, every, whole)
        elif name in ids:
            rows = distinct(row_numbers(ids[name], len(last[i])), len(last[i]))
            own = jax.tree.map(lambda x, at=rows: x.at[at].get(mode="clip"), whole)
            own, rows = lax.optimization_barrier((jax.vmap(one)(own), rows))
            new = jax.tree.map(lambda x, y, at=rows: x.at[at].set(y, **SCATTER), whole, own)
        else:
            continue
        leaves[name], mu[i], nu[i], last[i], decay_at[i] = new
    back = jax.tree.structure(state.adam.mu).unflatten
    adam = state.adam._replace(mu=back(mu), nu=back(nu))
    state = state._replace(adam=adam, last=tuple(last), decay_at=tuple(decay_at))
    return treedef.unflatten(leaves.values()), state


def _missed(
    rule: Rule, now: jax.Array, decay: Any, p: Any, m: Any, v: Any, last: jax.Array, decay_at: Any
) -> tuple[Any, ...]:
    """One row after all steps up to ``now``, none of which had a gradient for it."""
    dtype = p.dtype
    steps, nodes = _sizes(rule.b1, rule.b2, int(jnp.finfo(dtype).nmant))
    j = jnp.arange(1, steps + 1, dtype=jnp.int32)
    gap = now - last
    is_missed, at = j <= gap, last + j
    rate = rule.rate(now) if not callable(rule.learning_rate) else jax.vmap(rule.rate)(at - 1)
    rate = jnp.broadcast_to(jnp.asarray(rate, dtype), j.shape)
    t, since = at.astype(dtype), j.astype(dtype)
    b1, b2 = (jnp.asarray(b, dtype) for b in (rule.b1, rule.b2))
    weights = rate * b1**since / -jnp.expm1(t * jnp.log(b1))
    left = jnp.ones((), dtype)
    if rule.weight_decay:
        total = jnp.sum(decay - decay_at).astype(dtype)
        left = jnp.exp(total)
        # What a step moves is decayed by the steps after it.
        weights *= jnp.exp(total - jnp.cumsum(jnp.log1p(-rate * rule.weight_decay)))
    # m sum_j weights_j / (sqrt(v) c_j + eps) = m sum_j (weights_j / c_j) / (sqrt(v) + eps / c_j),
    # and of x = log c_j the last fraction is smooth, whatever v is.
    x = (since * jnp.log(b2) - jnp.log(-jnp.expm1(t * jnp.log(b2)))) / 2
    weights = jnp.where(is_missed, weights * jnp.exp(-x), 0)
    high, low = x[0], x[jnp.clip(gap, 1, steps) - 1]
    middle, half = (high + low) / 2, (high - low) / 2
    order, places = np.arange(nodes), (np.arange(nodes) + 0.5) * np.pi / nodes
    z = jnp.clip((x - middle) / jnp.maximum(half, 1e-30), -1, 1)
    polynomials = [jnp.ones_like(z), z]  # Chebyshev's
    while len(polynomials) < nodes:
        polynomials.append(2 * z * polynomials[-1] - polynomials[-2])
    sums = jnp.stack([jnp.sum(weights * own) for own in polynomials[:nodes]])
    basis = np.cos(order[:, None] * places) * np.where(order, 2, 1)[:, None] / nodes
    weights = sums @ jnp.asarray(basis, dtype)
    near_zero = rule.eps * jnp.exp(-(middle + half * jnp.asarray(np.cos(places), dtype)))
    root, moved = jnp.sqrt(v), jnp.zeros_like(v)
    for k in range(nodes):
        moved += weights[k] / (root + near_zero[k])
    shrunk = [(b ** gap.astype(dtype)) for b in (b1, b2)]
    fresh = left * p - m * moved, shrunk[0] * m, shrunk[1] * v
    fresh = [jnp.where(gap > 0, new, old) for new, old in zip(fresh, (p, m, v), strict=True)]
    return *fresh, now, decay


def _sizes(b1: float, b2: float, bits: int) -> tuple[int, int]:
    """After how many steps nothing is left of a gradient, and the nodes that stand for them."""
    steps = math.ceil(-(bits + 6) * math.log(2) / math.log(max(b1, 1e-9) / math.sqrt(b2)))
    # The fraction has its poles pi away from the real axis; steps after the first spread furthest.
    x = [(j * math.log(b2) - math.log1p(-(b2 ** (1 + j)))) / 2 for j in (1, steps)]
    away = 2 * math.pi / max(x[0] - x[1], 1e-9)
    return steps, math.ceil((bits + 2) * math.log(2) / math.asinh(away)) + 1


def _is_table(leaf: Any) -> bool:
    return jnp.ndim(leaf) > 1 and leaf.dtype in (jnp.float32, jnp.float64)


def _check(grad: Any, leaf: Any) -> None:
    if is_row_sparse(grad) and not (_is_table(leaf) and grad.shape == jnp.shape(leaf)):
        raise ValueError(
            f"gradients as rows of a shape {grad.shape} need a table of that shape in float32 or "
            f"float64, in which moments fade as they should: got {jnp.shape(leaf)}, {leaf.dtype}"
        )


def _seen(last: Any, rows: Any, now: jax.Array) -> Any:
    """Whether each row that has a gradient has seen all steps so far."""
    if isinstance(last, tuple):
        return True
    if rows is None:
        return jnp.all(last == now)
    return jnp.all((last.at[rows].get(mode="clip") == now) | (rows >= len(last)))


def _plus(pair: jax.Array, x: jax.Array) -> jax.Array:
    """A sum in two parts, the second what rounding took from the first."""
    whole = pair[0] + x
    back = whole - pair[0]
    lost = (pair[0] - (whole - back)) + (x - back)
    return jnp.stack([whole, pair[1] + lost]).astype(pair.dtype)
