"""LSTM and GRU over a sequence with one backward pass of our own over the scan.

The forward pass keeps each step's Jacobian diagonal, a product of gates, so that the backward pass
has no transcendental function in it. Backward, either all columns of each gate's gradient flow, one
step after the other or by an ``adjoint`` of all steps at once, or few of them, as in meProp.
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

from priorityprop_jax.core.fragile import laid_out, spec_of, vary_alike, zeros
from priorityprop_jax.core.precision import wide_type
from priorityprop_jax.core.selection import largest, magnitudes, resolve_k

_ROWS: dict[str, Any] = {
    "mode": "promise_in_bounds",
    "unique_indices": True,
    "indices_are_sorted": True,
}


class LSTMParams(NamedTuple):
    """Parameters of an LSTM; gates in the order input, forget, cell, output."""

    input_kernel: jax.Array  # [4 * hidden, inputs]
    recurrent_kernel: jax.Array  # [4 * hidden, hidden]
    bias: jax.Array  # [4 * hidden]


class GRUParams(NamedTuple):
    """Parameters of a GRU; gates in the order reset, update, new."""

    input_kernel: jax.Array  # [3 * hidden, inputs]
    recurrent_kernel: jax.Array  # [3 * hidden, hidden]
    input_bias: jax.Array | None = None  # [3 * hidden]
    recurrent_bias: jax.Array | None = None  # [hidden], of the new gate, inside r * (...)


class Diagonals(NamedTuple):
    """A step's Jacobian without the kernels: products of gates, ``[..., hidden]`` or a few of it.

    What enters the linear maps of the state and of the input is the same but for a GRU's new gate.
    """

    to_state: jax.Array  # [..., gates * hidden]
    to_input: jax.Array | None  # [..., hidden], the last gate's where it differs
    of_h: jax.Array | None  # of h on c, where the state is not h itself
    direct: jax.Array  # of the state before on the state


class _Cell(NamedTuple):
    """What tells LSTM and GRU apart. A carry is a tuple that ends in h.

    Of the four blocks of columns that meProp chooses from, those of the input and of the state are
    named in the order of the kernel's gates.
    """

    name: str
    gates: int
    step: Callable[..., Any]  # (params, carry, product with the input) -> carry, Diagonals
    bias: Callable[..., Any]  # (params, sum of all blocks over all rows) -> gradients
    to_input: tuple[int, ...]
    to_state: tuple[int, ...]


class _Options(NamedTuple):
    cell: _Cell
    k: int
    all_carries: bool
    unroll: int
    per_gate: bool
    hoist: bool
    adjoint: Callable[..., Any] | None


def _linear(x: jax.Array, kernels: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate([jnp.dot(x.astype(k.dtype), k) for k in kernels], axis=-1)


def _lstm_step(params: Any, carry: Any, of_x: jax.Array) -> Any:
    c, h = carry
    y = of_x + (_linear(h, params.recurrent_kernel) + params.bias[None])
    i, f, g, o = jnp.split(y, 4, axis=-1)
    i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
    new_c = f * c + i * g
    t = jnp.tanh(new_c)
    gates = (g * i * (1 - i), c * f * (1 - f), i * (1 - g * g), t * o * (1 - o))
    return (new_c, o * t), Diagonals(jnp.concatenate(gates, axis=-1), None, o * (1 - t * t), f)


def _gru_step(params: Any, carry: Any, of_x: jax.Array) -> Any:
    (h,) = carry
    if params.input_bias is not None:
        of_x = of_x + params.input_bias[None]
    x_r, x_z, x_n = jnp.split(of_x, 3, axis=-1)
    h_r, h_z, h_n = jnp.split(_linear(h, params.recurrent_kernel), 3, axis=-1)
    if params.recurrent_bias is not None:
        h_n = h_n + params.recurrent_bias[None]
    r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
    n = jnp.tanh(x_n + r * h_n)
    of_n = (1 - z) * (1 - n * n)
    gates = (of_n * h_n * r * (1 - r), (h - n) * z * (1 - z), of_n * r)
    return ((1.0 - z) * n + z * h,), Diagonals(jnp.concatenate(gates, axis=-1), of_n, None, z)


def _gru_bias(params: GRUParams, total: jax.Array) -> dict[str, Any]:
    parts = {"input_bias": _take(total, (0, 1, 3)), "recurrent_bias": _take(total, (2,))}
    return {name: g for name, g in parts.items() if getattr(params, name) is not None}


_CELLS: dict[type, _Cell] = {
    LSTMParams: _Cell(
        "lstm", 4, _lstm_step, lambda _, total: {"bias": total}, (0, 1, 2, 3), (0, 1, 2, 3)
    ),
    GRUParams: _Cell("gru", 3, _gru_step, _gru_bias, (0, 1, 3), (0, 1, 2)),
}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def run(options, params, carry, xs, probe):
    """The last carry, h of all steps and, if asked for, c of all steps; the batch is one axis."""
    return _forward(options, False, params, carry, xs)[0]


def _forward(options, keep, params, carry, xs):
    gates = options.cell.gates if options.per_gate else 1
    # The products of Flax's cells have the kernel (in, out): so laid out, and made at each step,
    # they agree to the bit.
    turned = params._replace(
        input_kernel=jnp.split(params.input_kernel.T, gates, axis=1),
        recurrent_kernel=jnp.split(params.recurrent_kernel.T, gates, axis=1),
    )

    def step(carry, x):
        of_x = x if options.hoist else _linear(x, turned.input_kernel)
        carry, diagonals = options.cell.step(turned, carry, of_x)
        others = carry[:-1] if options.all_carries else ()
        return carry, (carry[-1], others, diagonals if keep else None)

    if options.hoist:
        xs = _linear(xs, turned.input_kernel)
    carry, (hs, others, diagonals) = lax.scan(step, carry, xs, unroll=options.unroll)
    return (carry, hs, others), diagonals


def _run_fwd(options, params, carry, xs, probe):
    out, diagonals = _forward(options, True, params, carry, xs)
    return out, (params, carry[-1], out[1], xs, diagonals, probe)


def absorb(diagonals: Diagonals, dcarry: Any) -> Any:
    """The gradient of a step's carry, with what reaches c by way of h counted in."""
    of_h = diagonals.of_h
    return dcarry if of_h is None else (dcarry[0] + dcarry[-1] * of_h, *dcarry[1:])


def to_state(diagonals: Diagonals, absorbed: Any) -> jax.Array:
    """The gradient of the linear map of the state, ``[..., gates * hidden]``."""
    of_gates = diagonals.to_state
    wide = absorbed[0][..., None, :]
    # Broadcast over the gates: a concatenation would be an array more for the compiler.
    count = of_gates.shape[-1] // wide.shape[-1]
    gates = of_gates.reshape(*wide.shape[:-2], count, wide.shape[-1])
    if diagonals.of_h is not None:  # the last gate opens on h
        last = np.arange(gates.shape[-2])[:, None] == gates.shape[-2] - 1
        wide = jnp.where(last, absorbed[-1][..., None, :], wide)
    return (wide * gates).reshape(of_gates.shape)


def to_input(diagonals: Diagonals, absorbed: Any, dstate: jax.Array) -> jax.Array:
    """The gradient of the linear map of the input, from `to_state`'s."""
    if diagonals.to_input is None:
        return dstate
    width = diagonals.to_input.shape[-1]
    last = absorbed[0] * diagonals.to_input
    return jnp.concatenate([dstate[..., :-width], last], axis=-1)


def through_step(diagonals: Diagonals, absorbed: Any, product: jax.Array, like: Any) -> Any:
    """The gradient of the carry before, where ``product`` reaches h by the recurrent kernel."""
    direct = (absorbed[0] * diagonals.direct, *map(jnp.zeros_like, absorbed[1:]))
    direct = tuple(d.astype(x.dtype) for d, x in zip(direct, like, strict=True))
    return (*direct[:-1], direct[-1] + product.astype(like[-1].dtype))


def plus(dcarry: Any, more: Any) -> Any:
    """The sum of two gradients of a carry; None is zero."""
    return tuple(
        x if y is None else x + y.astype(x.dtype) for x, y in zip(dcarry, more, strict=True)
    )


def in_turn(options, product, diagonals, dcarries, dcarry):
    """The exact gradients of all carries, absorbed, one step after the other."""

    def step(dcarry, at):
        diagonals, dcarries = at
        absorbed = absorb(diagonals, plus(dcarry, dcarries))
        dstate = to_state(diagonals, absorbed)
        dcarry = through_step(diagonals, absorbed, product(dstate), dcarry)
        return dcarry, (dstate, absorbed if diagonals.to_input is not None else None)

    xs = (diagonals, dcarries)
    dcarry, out = lax.scan(step, dcarry, xs, reverse=True, unroll=options.unroll)
    return dcarry, *out, None


def _run_bwd(options, residuals, cotangents):
    cell, k = options.cell, options.k
    params, h0, hs, xs, diagonals, probe = residuals
    dcarry, dhs, dothers = cotangents
    dcarries = (*(dothers or [None] * (len(dcarry) - 1)), dhs)
    width = h0.shape[-1]
    before = jnp.concatenate([h0[None], hs])[: len(xs)]  # h that enters each step
    kernels = (params.input_kernel, params.recurrent_kernel)
    blocks = (cell.to_input, cell.to_state)
    wide = [wide_type(kernel) for kernel in kernels]
    dprobe = jnp.zeros_like(probe)

    def sparse_step(state, at):
        dcarry, (dbias, *dkernels) = state
        diagonals, dcarries, x, h = at
        absorbed = absorb(diagonals, plus(dcarry, dcarries))
        dz = to_state(diagonals, absorbed)
        if diagonals.to_input is not None:
            dz = jnp.concatenate([dz, absorbed[0] * diagonals.to_input], axis=-1)
        scores = magnitudes(dz).reshape(4, width)
        columns = jax.vmap(functools.partial(largest, k=k))(scores)  # [4, k]
        dinputs = []
        for n, (kernel, block, of) in enumerate(zip(kernels, blocks, (x, h), strict=True)):
            kept = columns[np.array(block)]
            rows, places = (
                (kept + np.array(of, kept.dtype)[:, None] * width).ravel()
                for of in (range(len(block)), block)
            )
            d = dz[:, places].astype(kernel.dtype)
            dinputs.append(jnp.dot(d, kernel.at[rows].get(**_ROWS)))
            added = _outer(d, of.astype(kernel.dtype), wide[n])
            dkernels[n] = dkernels[n].at[rows].add(added, **_ROWS)
        dbias = dbias + jnp.sum(dz, axis=0, dtype=dbias.dtype)
        dcarry = through_step(diagonals, absorbed, dinputs[1], dcarry)
        return (dcarry, (dbias, *dkernels)), dinputs[0]

    if k == width:

        def product(dstate):
            return jnp.dot(dstate.astype(kernels[1].dtype), kernels[1])

        adjoint = options.adjoint or in_turn
        found = adjoint(options, product, diagonals, dcarries, dcarry)
        dcarry, dstate, absorbed, report = found
        dprobe = dprobe if report is None else report.astype(probe.dtype)
        flat = lambda x: x.reshape(-1, x.shape[-1])  # noqa: E731
        dinput = flat(to_input(diagonals, absorbed, dstate))
        dstate = flat(dstate)  # [time * batch, gates * hidden]
        dbias = jnp.sum(dstate, axis=0, dtype=wide_type(dstate))
        if diagonals.to_input is not None:
            extra = jnp.sum(dinput[:, -width:], axis=0, dtype=dbias.dtype)
            dbias = jnp.concatenate([dbias, extra])
        dinput, dstate = dinput.astype(kernels[0].dtype), dstate.astype(kernels[1].dtype)
        dkernels = [
            over_steps(dinput, xs.astype(kernels[0].dtype), wide[0]),
            over_steps(dstate, before.astype(kernels[1].dtype), wide[1]),
        ]
        dxs = jnp.dot(dinput, kernels[0]).reshape(xs.shape)
    else:
        summed = wide_type(diagonals[0], *dcarry)
        nothing = (
            zeros((4 * width,), summed, xs),
            *(zeros(kernel.shape, w, xs) for kernel, w in zip(kernels, wide, strict=True)),
        )
        (dcarry, (dbias, *dkernels)), dxs = lax.scan(
            sparse_step,
            (dcarry, nothing),
            (diagonals, dcarries, xs, before),
            reverse=True,
            unroll=options.unroll,
        )
    names = {"input_kernel": dkernels[0], "recurrent_kernel": dkernels[1]}
    dparams = params._replace(**names, **cell.bias(params, dbias))
    dparams = jax.tree.map(lambda g, p: g.astype(p.dtype), dparams, params)
    return dparams, dcarry, dxs.astype(xs.dtype), dprobe


run.defvjp(_run_fwd, _run_bwd)


def _take(blocks: jax.Array, which: tuple[int, ...]) -> jax.Array:
    parts = jnp.split(blocks, 4, axis=-1)
    return jnp.concatenate([parts[block] for block in which], axis=-1)


def _outer(d: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """``d^T x`` over rows ``[rows, features]``, summed in ``dtype``."""
    return lax.dot_general(d, x, (((0,), (0,)), ((), ())), preferred_element_type=dtype)


def over_steps(d: jax.Array, x: jax.Array, dtype: Any) -> jax.Array:
    """``d^T x`` over all rows of all steps ``[..., features]``, summed in ``dtype``."""
    d, x = (flat.reshape(-1, flat.shape[-1]) for flat in (d, x))
    return _outer(x, d, dtype).T  # sooner on a CPU, and as Flax has its kernels


def run_cell(
    params: LSTMParams | GRUParams,
    carry: Any,
    xs: jax.Array,
    *,
    k: int | float = 1.0,
    all_carries: bool = False,
    unroll: int = 1,
    per_gate: bool = False,
    hoist: bool = False,
    adjoint: Callable[..., Any] | None = None,
    probe: jax.Array | None = None,
    inner: Callable[..., Any] = run,
) -> tuple[Any, ...]:
    r"""Runs the cell that the type of ``params`` chooses; `highway_rnn` has the formulas.

    Backward, the gradient of what enters each gate keeps the ``k`` columns of its ``hidden`` whose
    magnitudes, summed over the batch, are largest. Only these reach :math:`x_t`, :math:`h_{t-1}`
    and the kernels, whose products have ``k`` rows for each gate. The gradients of biases are
    cheap, and kept exact, as is the path through c of an LSTM. In the gate n of a GRU the gradients
    that enter W and U differ by the factor r, and each keeps its own ``k`` columns. Weight
    gradients are summed in float32 at least. NaN is never dropped.

    With ``hoist`` the product with the input is one over all steps, and rounds otherwise; with
    ``per_gate`` there is a product for each gate, as in cells with a layer for each gate. With all
    columns the gradient is exact, and ``adjoint`` may stand in for the recursion backward, which
    writes its report into the gradient of ``probe``; ``inner`` may stand in for `run`.
    """
    if type(params) not in _CELLS:
        raise TypeError(
            "params must be LSTMParams or GRUParams, which choose the cell, got "
            f"{type(params).__name__}"
        )
    cell = _CELLS[type(params)]
    state = tuple(carry) if cell.name == "lstm" else (carry,)
    name, gates, width = cell.name, cell.gates, params.recurrent_kernel.shape[-1]
    expected = (gates * width, xs.shape[-1]), (gates * width, width)
    given = params.input_kernel.shape, params.recurrent_kernel.shape
    if given != expected:
        raise ValueError(
            f"the kernels of {name} have shapes {given}, expected {expected}: (out, in), gates "
            "stacked on axis 0"
        )
    steps, *batch = xs.shape[:-1]
    shape = (*batch, width)
    if any(x.shape != shape for x in state):
        raise ValueError(
            f"the carry of {name} has shapes {[x.shape for x in state]}, expected {shape} for "
            f"inputs of shape {xs.shape}: time first, features last"
        )
    k = resolve_k(k, width, name)
    options = _Options(cell, k, all_carries, unroll, per_gate, hoist, adjoint)
    rows = math.prod(batch)
    probe = jnp.zeros(3) if probe is None else probe

    def on_rows(params, state, xs, probe):
        flat = tuple(x.reshape(rows, width) for x in state)
        arrays = vary_alike((params, flat, xs.reshape(steps, rows, xs.shape[-1]), probe))
        final, hs, others = inner(options, *arrays)
        final = tuple(x.reshape(shape) for x in final)
        return final, tuple(x.reshape(steps, *shape) for x in (*others, hs))

    def results(params, state, xs, probe):
        time, *over_batch, _ = spec_of(xs)
        outputs = [jax.P(time, *over_batch, None)] * (len(state) if all_carries else 1)
        return (jax.P(*over_batch, None),) * len(state), tuple(outputs)

    final, carries = laid_out(on_rows, results)(params, state, xs, probe)
    hs = carries[-1]
    if cell.name != "lstm":
        (final,), (carries,) = final, carries
    return (final, hs, carries) if all_carries else (final, hs)
