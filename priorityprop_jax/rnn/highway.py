"""Highway backpropagation through time: the backward pass of all time steps at once, in rounds."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.core.fragile import zeros
from priorityprop_jax.rnn import native
from priorityprop_jax.rnn.recurrent import (
    GRUParams,
    LSTMParams,
    absorb,
    in_turn,
    plus,
    run,
    run_cell,
    through_step,
    to_state,
)
from priorityprop_jax.rnn.rounds import check_iterations, iterate

# Rows up to which a product with the input for each step is dearer on a CPU than one over all
# steps, which for more rows costs only memory; measured.
HOIST_ROWS = 4


def _along_residual(a: jax.Array, b: jax.Array) -> jax.Array:
    """``y_t = b_t + a_{t+1} y_{t+1}`` over axis 0 of ``[time, ...]``."""
    if jax.default_backend() == "cpu":
        # Sooner there at all sizes measured, 256 to 2048 steps of 8 to 4096 elements.
        def step(y, at):
            a, b = at
            y = y + b
            return a * y, y

        nothing = zeros(b.shape[1:], jnp.result_type(a, b), a, b)
        return lax.scan(step, nothing, (a, b), reverse=True, unroll=min(8, len(b)))[1]

    def join(first, second):
        return first[0] * second[0], second[0] * first[1] + second[1]

    a = jnp.roll(a, -1, axis=0)  # nothing comes after the last step, whatever its factor
    return lax.associative_scan(join, (a, b), reverse=True)[1]


class _Highway(NamedTuple):
    """The gradients of all carries from the paths with few products; see `highway_rnn`."""

    iterations: int
    tol: float | None

    def __call__(self, options, product, diagonals, dcarries, dcarry):
        *_, dh = dcarries
        steps = len(dh)
        if not steps:
            return in_turn(options, product, diagonals, dcarries, dcarry)
        like = tuple(zeros((steps, *x.shape), x.dtype, x) for x in dcarry)
        last = tuple(y.at[-1].set(x) for y, x in zip(like, dcarry, strict=True))
        given = plus(last, dcarries)

        def along(products):
            """Adds up along the residual path what comes in at each step."""
            dcarry = absorb(diagonals, (*given[:-1], given[-1] + products))
            return (_along_residual(diagonals.direct, dcarry[0]), *dcarry[1:])

        def improved(absorbed):
            through = product(to_state(diagonals, absorbed))[1:].astype(dh.dtype)
            return along(jnp.concatenate([through, jnp.zeros_like(through, shape=dh[:1].shape)]))

        # With more rounds nothing changes.
        rounds = min(self.iterations, steps - 1)
        absorbed, report = iterate(improved, along(jnp.zeros_like(dh)), rounds, self.tol)
        dstate = to_state(diagonals, absorbed)
        first, of_first = jax.tree.map(lambda x: x[0], (diagonals, absorbed))
        dcarry = through_step(first, of_first, product(dstate[0]), dcarry)
        return dcarry, dstate, absorbed, jnp.stack(report)


def highway_rnn(
    params: LSTMParams | GRUParams,
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

    The cell is chosen by the type of ``params``: an LSTM,

    .. math::
        y_t = W x_t + U h_{t-1} + b, \quad
        c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    with i, f, g, o the four parts of y, or a GRU,

    .. math::
        r = \sigma(W_r x + b_r + U_r h), \quad z = \sigma(W_z x + b_z + U_z h), \
        n = \tanh(W_n x + b_n + r (U_n h + b_{hn})), \quad h' = (1 - z) n + z h.

    Each carry splits into a residual path and the rest,
    :math:`s_t = a_t s_{t-1} + g(h_{t-1}, x_t)`, where a is the forget gate of an LSTM, on c, and
    the update gate z of a GRU. Backward, with b the gradients of the losses at each step,

    .. math::
        w^{(0)} = S(b), \quad w^{(j+1)} = S(b + U^T D w^{(j)})

    S adds up along the residual path, an elementwise recurrence with factors a. The product with
    the recurrent kernel U is one over all steps in each round; D is a diagonal of gates. After
    ``k`` rounds the gradient is the sum over all paths that pass U at most ``k`` times between two
    steps; from one less than the number of steps on it is exact. Gradients of parameters and
    inputs follow from the last w by one product each.

    With ``iterations=None`` the gradient is exact, found in one scan backward without any
    gradient of a kernel in it: these are products over all steps. On a CPU with AVX2 native kernels
    run cells in float32 over eight steps and more, where the installation has them.

    A guard ends rounds that diverge as in `highway_scan`: one whose correction is larger than the
    last one's is taken back.

    Args:
      params: `LSTMParams` or `GRUParams`; kernels ``(out, in)``.
      carry: h, ``[*batch, hidden]``; of an LSTM ``(c, h)``.
      xs: ``[time, *batch, inputs]``.
      iterations: rounds at most, or None for the exact gradient. Static.
      tol: rounds stop when the norm of a correction over that of w is at most this. Static.
      probe: three zeros, an array or a `HighwayReport`, whose gradient is no derivative but the
        numbers of that report; zeros where nothing is iterated.
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
      >>> from priorityprop_jax.rnn import GRUParams, highway_rnn
      >>> params = GRUParams(jnp.ones((12, 3)), jnp.ones((12, 4)) / 9)
      >>> h, xs = jnp.zeros((2, 4)), jnp.ones((6, 2, 3)) / 9
      >>> def loss_fn(params, probe):
      ...     return jnp.sum(highway_rnn(params, h, xs, iterations=2, probe=probe)[1])
      >>> grads, report = jax.grad(loss_fn, argnums=(0, 1))(params, jnp.zeros(3))
      >>> rounds, correction, stopped = report.tolist()
      >>> rounds, 0 < correction < 0.1, stopped
      (2.0, True, 0.0)

    References:
      Fagnou et al., `Accelerated Training through Iterative Gradient Propagation Along the
      Residual Path <https://arxiv.org/abs/2501.17086>`_, 2025
    """
    check_iterations(iterations, tol)
    check_probe(probe)
    if probe is not None:
        probe = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(probe)])
    rows = math.prod(xs.shape[1:-1])
    return run_cell(
        params,
        carry,
        xs,
        all_carries=all_carries,
        unroll=unroll,
        hoist=jax.default_backend() != "cpu" or isinstance(rows, int) and rows <= HOIST_ROWS,
        adjoint=None if iterations is None else _Highway(iterations, tol),
        probe=probe,
        inner=native.run if iterations is None else run,
    )


def check_probe(probe: Any) -> None:
    """Raises a ValueError for what cannot take the numbers of a report."""
    count = sum(math.prod(jnp.shape(x)) for x in jax.tree.leaves(probe))
    if probe is not None and count != 3:
        raise ValueError(f"probe must be three zeros, got {count} numbers")
