"""Highway backpropagation through time: the backward pass of all time steps at once, in rounds."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.rnn.recurrent import (
    GRUParams,
    LSTMParams,
    absorb,
    in_turn,
    plus,
    run_cell,
    through_step,
    to_state,
)
from priorityprop_jax.rnn.rounds import associative_affine, iterate

# Rows up to which a product with the input for each step is dearer on a CPU than one over all
# steps, which for more rows costs only memory; measured.
HOIST_ROWS = 4


class MinGRUParams(NamedTuple):
    """Parameters of a minimal GRU; gates in the order update, new."""

    kernel: jax.Array  # [2 * hidden, inputs]
    bias: jax.Array | None = None  # [2 * hidden]


def affine_scan(
    a: jax.Array, b: jax.Array, *, reverse: bool = False, sequential: bool | None = None
) -> jax.Array:
    r"""An elementwise linear recurrence over axis 0.

    .. math::
        y_t = a_t y_{t-1} + b_t, \quad y_{-1} = 0

    or its transpose, :math:`y_t = a_{t+1} y_{t+1} + b_t`.

    Args:
      a: ``[time, ...]``.
      b: as ``a``.
      reverse: whether it is the transpose, which runs from the last step to the first.
      sequential: one step after the other, or `jax.lax.associative_scan`, which has about twice the
        work in a logarithm of the steps. By default the former on a CPU: there it was faster at
        all sizes measured, 256 to 2048 steps of 8 to 4096 elements.

    Returns:
      y, as ``b``.

    Raises:
      ValueError: if the shapes differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.rnn.highway import affine_scan
      >>> affine_scan(jnp.array([9.0, 2.0, 2.0]), jnp.ones(3)).tolist()
      [1.0, 3.0, 7.0]
    """
    if a.shape != b.shape:
        raise ValueError(f"a and b must have one shape, got {a.shape} and {b.shape}")
    if sequential is None:
        sequential = jax.default_backend() == "cpu"
    return _affine(reverse, sequential, a, b)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _affine(reverse, sequential, a, b):
    if sequential:

        def step(y, at):
            a, b = at
            y = y + b if reverse else a * y + b
            return (a * y if reverse else y), y

        zeros = jnp.zeros(b.shape[1:], jnp.result_type(a, b))
        return lax.scan(step, zeros, (a, b), reverse=reverse, unroll=min(8, max(1, len(b))))[1]

    return associative_affine(a, b, reverse=reverse)


def _affine_fwd(reverse, sequential, a, b):
    y: Any = _affine(reverse, sequential, a, b)
    return y, (a, b, y)


def _affine_bwd(reverse, sequential, residuals, dy):
    a, b, y = residuals
    db: Any = _affine(not reverse, sequential, a, dy)
    earlier, later = (db, y) if reverse else (y, db)
    da = jnp.concatenate([jnp.zeros_like(a[:1]), (earlier[:-1] * later[1:]).astype(a.dtype)])
    return da[: len(a)], db.astype(b.dtype)


_affine.defvjp(_affine_fwd, _affine_bwd)


class _Highway(NamedTuple):
    """The gradients of all carries from the paths with few products; see `highway_rnn`."""

    iterations: int
    tol: float | None

    def __call__(self, options, product, diagonals, dcarries, dcarry):
        *_, dh = dcarries
        steps = len(dh)
        if not steps:
            return in_turn(options, product, diagonals, dcarries, dcarry)
        like = tuple(jnp.zeros((steps, *x.shape), x.dtype) for x in dcarry)
        last = tuple(zeros.at[-1].set(x) for zeros, x in zip(like, dcarry, strict=True))
        given = plus(last, dcarries)

        def along(products):
            """Adds up along the residual path what comes in at each step."""
            dcarry = absorb(diagonals, (*given[:-1], given[-1] + products))
            return (affine_scan(diagonals.direct, dcarry[0], reverse=True), *dcarry[1:])

        def improved(absorbed):
            through = product(to_state(diagonals, absorbed))[1:].astype(dh.dtype)
            return along(jnp.concatenate([through, jnp.zeros_like(through, shape=dh[:1].shape)]))

        # With more rounds nothing changes.
        rounds = min(self.iterations, steps - 1)
        absorbed, report = iterate(improved, along(jnp.zeros_like(dh)), rounds, self.tol)
        dstate = to_state(diagonals, absorbed)
        first, of_first = jax.tree.map(lambda x: x[0], (diagonals, absorbed))
        dcarry = through_step(first, of_first, product(dstate[0]), dcarry)
        report = jnp.stack([x.astype(jnp.float32) for x in report])
        return dcarry, dstate, absorbed, report


def highway_rnn(
    params: LSTMParams | GRUParams | MinGRUParams,
    carry: Any,
    xs: jax.Array,
    *,
    iterations: int | None = None,
    tol: float | None = None,
    probe: Any = None,
    all_carries: bool = False,
    unroll: int = 1,
) -> tuple[Any, ...]:
    r"""A recurrent network over a sequence, with a backward pass over all of its steps at once.

    The cells are those of `lstm` and `gru`, chosen by the type of ``params``. Each carry splits
    into a residual path and the rest: :math:`s_t = a_t s_{t-1} + g(h_{t-1}, x_t)`, where a is the
    forget gate of an LSTM, on c, and the update gate z of a GRU. Backward, with b the gradients of
    the losses at each step,

    .. math::
        w^{(0)} = S(b), \quad w^{(j+1)} = S(b + U^T D w^{(j)})

    S adds up along the residual path, an elementwise recurrence with factors a. The product with
    the recurrent kernel U is one over all steps in each round; D is a diagonal of gates. After
    ``k`` rounds the gradient is the sum over all paths that pass U at most ``k`` times between two
    steps; from one less than the number of steps on it is exact. Gradients of parameters and
    inputs follow from the last w by one product each.

    With ``iterations=None`` the gradient is exact, found in one scan backward without any
    gradient of a kernel in it: these are products over all steps. It beats automatic derivatives
    of a scan, and is the default.

    A minimal GRU, :math:`h_t = (1 - z) h_{t-1} + z n` with :math:`z = \sigma(W_z x_t + b_z)` and
    :math:`n = W_n x_t + b_n`, has no U. It runs by `affine_scan` in both directions; all rounds are
    exact there.

    A guard ends rounds that diverge as in `highway_scan`: one whose correction is larger than the
    last one's, or the first if it is larger than w itself, is taken back.

    Args:
      params: `LSTMParams`, `GRUParams` or `MinGRUParams`; kernels ``(out, in)``.
      carry: h, ``[*batch, hidden]``; of an LSTM ``(c, h)``.
      xs: ``[time, *batch, inputs]``.
      iterations: rounds at most, or None for the exact gradient. Static.
      tol: rounds stop when the norm of a correction over that of w is at most this. Static.
      probe: three zeros, an array or a `HighwayReport`, whose gradient is no derivative but the
        report of the backward pass: how many rounds were kept, the norm of the last round's
        correction over that of w, and 1 if that correction had grown. Zeros where nothing is
        iterated.
      all_carries: whether to return the carries of all steps too.
      unroll: steps a turn of the loops over time, as in `jax.lax.scan`.

    Returns:
      The last carry, and h of all steps ``[time, *batch, hidden]``; with ``all_carries`` also the
      carries of all steps.

    Raises:
      TypeError: if ``params`` are of another type, or ``iterations`` is no whole number.
      ValueError: if ``iterations`` or ``tol`` is negative, ``tol`` is given without ``iterations``,
        or shapes, ``probe``'s among them, do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.rnn.highway import highway_rnn
      >>> from priorityprop_jax.rnn.recurrent import GRUParams
      >>> params = GRUParams(jnp.ones((12, 3)), jnp.ones((12, 4)) / 9)
      >>> h, xs = jnp.zeros((2, 4)), jnp.ones((6, 2, 3)) / 9
      >>> loss_fn = lambda params, probe: jnp.sum(
      ...     highway_rnn(params, h, xs, iterations=2, probe=probe)[1]
      ... )
      >>> grads, report = jax.grad(loss_fn, argnums=(0, 1))(params, jnp.zeros(3))
      >>> rounds, correction, stopped = report.tolist()
      >>> rounds, 0 < correction < 0.1, stopped
      (2.0, True, 0.0)

    References:
      Fagnou et al., `Accelerated Training through Iterative Gradient Propagation Along the
      Residual Path <https://arxiv.org/abs/2501.17086>`_, 2025
    """
    check_iterations(iterations, tol)
    if probe is not None:
        probe = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(probe)])
        if probe.shape != (3,):
            raise ValueError(f"probe must be three zeros, got {probe.size} numbers")
    if isinstance(params, MinGRUParams):
        hs = _min_gru(params, carry, xs)
        final = jnp.concatenate([carry[None], hs])[-1]
        return (final, hs, hs) if all_carries else (final, hs)
    if not isinstance(params, LSTMParams | GRUParams):
        raise TypeError(
            "params must be LSTMParams, GRUParams or MinGRUParams, which choose the cell, got "
            f"{type(params).__name__}"
        )
    is_gru = isinstance(params, GRUParams)
    state = (carry,) if is_gru else tuple(carry)
    rows = state[-1].size // state[-1].shape[-1]
    final, hs, others = run_cell(
        params,
        state,
        xs,
        all_carries=all_carries,
        unroll=unroll,
        hoist=jax.default_backend() != "cpu" or rows <= HOIST_ROWS,
        adjoint=None if iterations is None else _Highway(iterations, tol),
        probe=probe,
    )
    final, carries = (final[0], hs) if is_gru else (final, (*others, hs))
    return (final, hs, carries) if all_carries else (final, hs)


def check_iterations(iterations: Any, tol: Any) -> None:
    """Raises unless these can be options of `highway_rnn`."""
    if iterations is not None and (isinstance(iterations, bool) or not isinstance(iterations, int)):
        raise TypeError(f"iterations must be a whole number or None, got {iterations!r}")
    if iterations is not None and iterations < 0:
        raise ValueError(f"iterations must be 0 or more, or None for all, got {iterations}")
    if tol is not None and (isinstance(tol, bool) or not isinstance(tol, int | float)):
        raise TypeError(f"tol must be a number or None, got {tol!r}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"tol must be 0 or more, got {tol}")
    if tol is not None and iterations is None:
        raise ValueError("tol ends rounds, and without iterations there are none: give both")


def _min_gru(params: MinGRUParams, h: jax.Array, xs: jax.Array) -> jax.Array:
    outputs, inputs = params.kernel.shape
    if xs.shape[-1] != inputs or outputs % 2:
        raise ValueError(
            f"the kernel of a minimal GRU has shape {params.kernel.shape}, expected "
            f"(2 * hidden, {xs.shape[-1]})"
        )
    if h.shape != (*xs.shape[1:-1], outputs // 2):
        raise ValueError(
            f"the carry of a minimal GRU has shape {h.shape}, expected "
            f"{(*xs.shape[1:-1], outputs // 2)} for inputs of shape {xs.shape}: time first, "
            "features last"
        )
    y = jnp.dot(xs.astype(params.kernel.dtype), params.kernel.T)
    if params.bias is not None:
        y = y + params.bias
    z, n = jnp.split(y, 2, axis=-1)
    z = jax.nn.sigmoid(z)
    kept, added = 1 - z, z * n
    first = added[:1] + kept[:1] * h
    return affine_scan(kept, jnp.concatenate([first.astype(added.dtype), added[1:]]))
