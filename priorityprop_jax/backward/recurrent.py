"""meProp for LSTM and GRU: at every time step few columns of each gate's gradient flow back.

Both run one custom backward pass over the scan. The forward pass keeps each step's Jacobian
diagonal, a product of gates, so that the backward pass has no transcendental function in it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.backward.selection import largest, magnitudes, resolve_k

_ROWS: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class LSTMParams(NamedTuple):
    """Parameters of `lstm`; gates in the order input, forget, cell, output."""

    input_kernel: jax.Array  # [4 * hidden, inputs]
    recurrent_kernel: jax.Array  # [4 * hidden, hidden]
    bias: jax.Array  # [4 * hidden]


class GRUParams(NamedTuple):
    """Parameters of `gru`; gates in the order reset, update, new."""

    input_kernel: jax.Array  # [3 * hidden, inputs]
    recurrent_kernel: jax.Array  # [3 * hidden, hidden]
    input_bias: jax.Array | None = None  # [3 * hidden]
    recurrent_bias: jax.Array | None = None  # [hidden], of the new gate, inside r * (...)


class _Cell(NamedTuple):
    """What tells LSTM and GRU apart. A carry is a tuple that ends in h.

    Of the four blocks of columns of a step's gradient, those that enter the linear map of the
    input and of the state are named in the order of the kernel's gates.
    """

    step: Callable[..., Any]  # (params, carry, x) -> carry, diagonals
    pull: Callable[..., Any]  # (diagonals, gradient of the carry) -> [batch, 4 * hidden], the same
    bias: Callable[..., Any]  # (params, sum of the former over batch and time) -> gradients
    to_input: tuple[int, ...]
    to_state: tuple[int, ...]


class _Options(NamedTuple):
    cell: _Cell
    k: int
    all_carries: bool
    unroll: int
    per_gate: bool


def _linear(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.dot(x.astype(k.dtype), k) for k in kernels], axis=-1)


def _lstm_step(params: Any, carry: Any, x: jax.Array) -> Any:
    c, h = carry
    y = _linear(x, params.input_kernel) + (_linear(h, params.recurrent_kernel) + params.bias)
    i, f, g, o = jnp.split(y, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    new_c = f * c + i * g
    t = jnp.tanh(new_c)
    gates = (g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), t * o * (1 - o))
    return (new_c, o * t), (jnp.concatenate(gates, axis=-1), o * (1 - t * t), f)


def _lstm_pull(diagonals: Any, dcarry: Any) -> Any:
    gates, of_c, f = diagonals
    dc, dh = dcarry
    dc = dc + dh * of_c
    return jnp.concatenate([dc, dc, dc, dh], axis=-1) * gates, (dc * f, jnp.zeros_like(dh))


def _gru_step(params: Any, carry: Any, x: jax.Array) -> Any:
    (h,) = carry
    of_x = _linear(x, params.input_kernel)
    if params.input_bias is not None:
        of_x = of_x + params.input_bias
    x_r, x_z, x_n = jnp.split(of_x, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(_linear(h, params.recurrent_kernel), 3, axis=-1)
    if params.recurrent_bias is not None:
        h_n = h_n + params.recurrent_bias
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    of_n = (1 - z) * (1 - n * n)
    gates = (of_n * h_n * r * (1 - r), (h - n) * z * (1 - z), of_n, of_n * r)
    return ((1.0 - z) * n + z * h,), (jnp.concatenate(gates, axis=-1), z)


def _gru_pull(diagonals: Any, dcarry: Any) -> Any:
    gates, z = diagonals
    (dh,) = dcarry
    return jnp.concatenate([dh] * 4, axis=-1) * gates, (dh * z,)


def _gru_bias(params: GRUParams, total: jax.Array) -> dict[str, Any]:
    cut = params.recurrent_kernel.shape[0]
    parts = {"input_bias": total[:cut], "recurrent_bias": total[cut:]}
    return {name: g for name, g in parts.items() if getattr(params, name) is not None}


_LSTM = _Cell(_lstm_step, _lstm_pull, lambda _, total: {"bias": total}, (0, 1, 2, 3), (0, 1, 2, 3))
_GRU = _Cell(_gru_step, _gru_pull, _gru_bias, (0, 1, 2), (0, 1, 3))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _run(options, params, carry, xs):
    return _forward(options, False, params, carry, xs)[0]


def _forward(options, keep, params, carry, xs):
    gates = len(params.recurrent_kernel) // carry[-1].shape[-1] if options.per_gate else 1
    # The products of Flax's cells have the kernel (in, out): so laid out, they agree to the bit.
    # Hoisting the input's product out of the scan would be faster, and round otherwise.
    turned = params._replace(
        input_kernel=jnp.split(params.input_kernel.T, gates, axis=1),
        recurrent_kernel=jnp.split(params.recurrent_kernel.T, gates, axis=1),
    )

    def step(carry, x):
        carry, diagonals = options.cell.step(turned, carry, x)
        others = carry[:-1] if options.all_carries else ()
        return carry, (carry[-1], others, diagonals if keep else None)

    carry, (hs, others, diagonals) = lax.scan(step, carry, xs, unroll=options.unroll)
    return (carry, hs, others), diagonals


def _run_fwd(options, params, carry, xs):
    out, diagonals = _forward(options, True, params, carry, xs)
    return out, (params, carry[-1], out[1], xs, diagonals)


def _run_bwd(options, residuals, cotangents):
    cell, k = options.cell, options.k
    params, h0, hs, xs, diagonals = residuals
    dcarry, dhs, dothers = cotangents
    width = h0.shape[-1]
    before = jnp.concatenate([h0[None], hs])[: len(xs)]  # h that enters each step
    kernels = (params.input_kernel, params.recurrent_kernel)
    blocks = (cell.to_input, cell.to_state)
    wide = [jnp.promote_types(kernel.dtype, jnp.float32) for kernel in kernels]

    def pull(dcarry, dh, dothers, diagonals):
        inner = tuple(map(jnp.add, dcarry[:-1], dothers)) if dothers else dcarry[:-1]
        dz, direct = cell.pull(diagonals, (*inner, dcarry[-1] + dh))
        return dz, tuple(map(lambda new, old: new.astype(old.dtype), direct, dcarry))

    def through(dcarry, dh):
        return (*dcarry[:-1], dcarry[-1] + dh.astype(dcarry[-1].dtype))

    def dense_step(dcarry, at):
        dz, dcarry = pull(dcarry, *at)
        dh = jnp.dot(_take(dz, cell.to_state).astype(kernels[1].dtype), kernels[1])
        return through(dcarry, dh), dz

    def sparse_step(state, at):
        dcarry, (dbias, *dkernels) = state
        *at, x, h = at
        dz, dcarry = pull(dcarry, *at)
        scores = magnitudes(dz).reshape(4, width)
        columns = jax.vmap(functools.partial(largest, k=k))(scores)  # [4, k]
        dinputs = []
        for n, (kernel, block, of) in enumerate(zip(kernels, blocks, (x, h), strict=True)):
            kept = columns[np.array(block)]
            rows = (kept + width * np.arange(len(block))[:, None]).ravel()
            d = dz[:, (kept + width * np.array(block)[:, None]).ravel()].astype(kernel.dtype)
            dinputs.append(jnp.dot(d, kernel.at[rows].get(**_ROWS)))
            added = _outer(d, of.astype(kernel.dtype), wide[n])
            dkernels[n] = dkernels[n].at[rows].add(added, **_ROWS)
        dbias = dbias + jnp.sum(dz, axis=0, dtype=dbias.dtype)
        return (through(dcarry, dinputs[1]), (dbias, *dkernels)), dinputs[0]

    scan = functools.partial(lax.scan, reverse=True, unroll=options.unroll)
    if k == width:
        dcarry, dz = scan(dense_step, dcarry, (dhs, dothers, diagonals))
        dz = dz.reshape(-1, dz.shape[-1])  # [time * batch, 4 * hidden]
        to_input, to_state = (
            _take(dz, block).astype(kernel.dtype)
            for kernel, block in zip(kernels, blocks, strict=True)
        )
        flat = lambda x, like: x.reshape(-1, x.shape[-1]).astype(like.dtype)  # noqa: E731
        dkernels = [
            _outer(to_input, flat(xs, kernels[0]), wide[0]),
            _outer(to_state, flat(before, kernels[1]), wide[1]),
        ]
        dxs = jnp.dot(to_input, kernels[0]).reshape(xs.shape)
        dbias = jnp.sum(dz, axis=0, dtype=jnp.promote_types(dz.dtype, jnp.float32))
    else:
        summed = jnp.promote_types(jnp.result_type(diagonals[0], *dcarry), jnp.float32)
        zeros = (
            jnp.zeros(4 * width, summed),
            *(jnp.zeros(kernel.shape, w) for kernel, w in zip(kernels, wide, strict=True)),
        )
        (dcarry, (dbias, *dkernels)), dxs = scan(
            sparse_step, (dcarry, zeros), (dhs, dothers, diagonals, xs, before)
        )
    names = {"input_kernel": dkernels[0], "recurrent_kernel": dkernels[1]}
    dparams = params._replace(**names, **cell.bias(params, dbias))
    dparams = jax.tree.map(lambda g, p: g.astype(p.dtype), dparams, params)
    return dparams, dcarry, dxs.astype(xs.dtype)


_run.defvjp(_run_fwd, _run_bwd)


def _take(dz: jax.Array, blocks: tuple[int, ...]) -> jax.Array:
    if len(blocks) == 4:
        return dz
    parts = jnp.split(dz, 4, axis=-1)
    return jnp.concatenate([parts[block] for block in blocks], axis=-1)


def _outer(d: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """``d^T x`` over rows ``[rows, features]``, summed in ``dtype``."""
    return lax.dot_general(d, x, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def _checked(cell, gates, name, params, carry, xs, k, all_carries, unroll, per_gate) -> Any:
    """Checks shapes, flattens the batch dimensions and runs the scan."""
    width = params.recurrent_kernel.shape[-1]
    expected = (gates * width, xs.shape[-1]), (gates * width, width)
    given = params.input_kernel.shape, params.recurrent_kernel.shape
    if given != expected:
        raise ValueError(
            f"the kernels of {name} have shapes {given}, expected {expected}: (out, in), gates "
            "stacked on axis 0"
        )
    steps, *batch = xs.shape[:-1]
    state = (*batch, width)
    if any(x.shape != state for x in carry):
        raise ValueError(
            f"the carry of {name} has shapes {[x.shape for x in carry]}, expected {state} for "
            f"inputs of shape {xs.shape}: time first, features last"
        )
    options = _Options(cell, resolve_k(k, width, name), all_carries, unroll, per_gate)
    rows = math.prod(batch)
    flat = tuple(x.reshape(rows, width) for x in carry)
    out: Any = _run(options, params, flat, xs.reshape(steps, rows, xs.shape[-1]))
    final, hs, others = out
    final = tuple(x.reshape(state) for x in final)
    others = tuple(x.reshape(steps, *state) for x in others)
    return final, hs.reshape(steps, *state), others


def lstm(
    params: LSTMParams,
    carry: tuple[jax.Array, jax.Array],
    xs: jax.Array,
    *,
    k: int | float,
    all_carries: bool = False,
    unroll: int = 1,
    per_gate: bool = False,
) -> tuple[Any, ...]:
    r"""An LSTM over a sequence, of whose gradients few columns flow back at each step.

    The forward pass is exact,

    .. math::
        y_t = W x_t + U h_{t-1} + b, \quad
        c_t = \sigma(f) c_{t-1} + \sigma(i) \tanh(g), \quad h_t = \sigma(o) \tanh(c_t)

    with i, f, g, o the four parts of y. Backward, the gradient of each part of :math:`y_t`
    keeps the ``k`` columns of its ``hidden`` whose magnitudes, summed over the batch, are largest.
    Only these reach :math:`x_t`, :math:`h_{t-1}` and the kernels: the products have ``4 * k`` rows
    of the kernels in place of ``4 * hidden``. The gradient of the bias is cheap, and kept
    exact, as is the path through c.

    With ``k`` = hidden the gradient is exact, the weight gradients being one product after the
    scan. Weight gradients are summed in float32 at least. NaN is never dropped. Forward-mode
    derivatives are not defined.

    Args:
      params: kernels ``(out, in)``, whose rows are cheap to pick. Inputs and h enter a product in
        the dtype of its kernel.
      carry: ``(c, h)``, each ``[*batch, hidden]``.
      xs: ``[time, *batch, inputs]``.
      k: columns kept of each gate: a number, or a fraction of hidden. Static.
      all_carries: whether to return the carries of all steps too.
      unroll: steps a turn of both loops, as in `jax.lax.scan`.
      per_gate: whether the forward pass has a product for each gate, as cells with a layer for each
        gate do. Rounds as they do.

    Returns:
      The last carry, and h of all steps ``[time, *batch, hidden]``; with ``all_carries`` also
      ``(c, h)`` of all steps.

    Raises:
      ValueError: if ``k`` is impossible, or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.backward.recurrent import LSTMParams, lstm
      >>> params = LSTMParams(jnp.ones((16, 3)), jnp.ones((16, 4)), jnp.zeros(16))
      >>> carry, xs = (jnp.ones((2, 4)), jnp.ones((2, 4))), jnp.ones((1, 2, 3)) / 3
      >>> loss_fn = lambda params: jnp.sum(lstm(params, carry, xs, k=1)[1])
      >>> grads = jax.grad(loss_fn)(params)
      >>> int(jnp.sum(jnp.any(grads.input_kernel != 0, axis=1)))
      4

    References:
      Sun et al., `meProp <https://arxiv.org/abs/1706.06197>`_, 2017
    """
    final, hs, cs = _checked(_LSTM, 4, "lstm", params, carry, xs, k, all_carries, unroll, per_gate)
    return (final, hs, (*cs, hs)) if all_carries else (final, hs)


def gru(
    params: GRUParams,
    carry: jax.Array,
    xs: jax.Array,
    *,
    k: int | float,
    all_carries: bool = False,
    unroll: int = 1,
    per_gate: bool = False,
) -> tuple[Any, ...]:
    r"""A GRU over a sequence, of whose gradients few columns flow back at each step.

    The forward pass is exact,

    .. math::
        r = \sigma(W_r x + b_r + U_r h), \quad z = \sigma(W_z x + b_z + U_z h), \
        n = \tanh(W_n x + b_n + r (U_n h + b_{hn})), \quad h' = (1 - z) n + z h.

    Backward as in `lstm`. In the gate n the gradients that enter W and U differ by the factor r,
    and each keeps its own ``k`` columns.

    Args:
      params: kernels ``(out, in)``; either bias may be None.
      carry: ``[*batch, hidden]``.
      xs: ``[time, *batch, inputs]``.
      k: columns kept of each gate: a number, or a fraction of hidden. Static.
      all_carries: whether to return the carries of all steps too.
      unroll: see `lstm`.
      per_gate: see `lstm`.

    Returns:
      The last h, and h of all steps ``[time, *batch, hidden]``; with ``all_carries`` the latter
      again, as the carries.

    Raises:
      ValueError: if ``k`` is impossible, or shapes do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from priorityprop_jax.backward.recurrent import GRUParams, gru
      >>> params = GRUParams(jnp.ones((12, 3)), jnp.ones((12, 4)))
      >>> h, xs = jnp.ones((2, 4)), jnp.ones((1, 2, 3)) / 3
      >>> loss_fn = lambda params: jnp.sum(gru(params, h, xs, k=1)[1])
      >>> grads = jax.grad(loss_fn)(params)
      >>> int(jnp.sum(jnp.any(grads.input_kernel != 0, axis=1)))
      3
    """
    final, hs, _ = _checked(_GRU, 3, "gru", params, (carry,), xs, k, all_carries, unroll, per_gate)
    return (final[0], hs, hs) if all_carries else (final[0], hs)
