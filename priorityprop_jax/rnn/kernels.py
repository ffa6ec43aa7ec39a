"""The kernels of `rnn.native`, and what each computes by JAX alone.

Arrays of all steps are ``[time, batch, ...]``, kernels ``[hidden, gates * hidden]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from priorityprop_jax.core import native

Side = tuple[tuple[int | None, int], ...]


class Kernel(NamedTuple):
    """A kernel: ``(*operands) -> list of results``; the last operand is ``[batch, hidden]``.

    Sides have an axis of the batch or None for each array, and its number of axes.
    """

    handler: str  # in csrc/ffi.cc
    operands: Side
    results: Side
    shapes: Callable[[Any, Any], list[Any]]  # of the handler's results, of the first and the last
    flops: Callable[[Sequence[Any], Any, Mapping[str, Any]], float]
    portable: Callable[..., list[Any]]
    dropped: int = 0  # results in front that are not asked for

    def __call__(self, *operands: jax.Array) -> list[jax.Array]:
        """Calls it; gates may be written over what enters them, and the reverse."""
        shapes = self.shapes(operands[0].shape, operands[-1].shape)
        shapes[: self.dropped] = [(0,)] * self.dropped
        in_place = None if self.dropped else {0: 0}
        found = native.call(self.handler, self.flops, shapes, *operands, in_place=in_place)
        return [*found][self.dropped :]

    def by_jax(self, *operands: jax.Array) -> list[jax.Array]:
        """The same by JAX alone."""
        return self.portable(*operands)[self.dropped :]


class Cell(NamedTuple):
    """What a cell's recurrence runs; forward the last result is h of all steps."""

    forward: Kernel
    values: Kernel  # where there will be no backward pass
    backward: Kernel


_STEPS, _STATE, _MATRIX, _VECTOR = (1, 3), (0, 2), (None, 2), (None, 1)


def _everywhere(of_x: Any, state: Any) -> list[Any]:
    every = (of_x[0], *state)
    return [of_x, every, every]


def _flops(operands: Sequence[Any], _: Any, __: Mapping[str, Any]) -> float:
    """Of the product, the sums, the functions of gates, and the states."""
    of_x, kernel, *_ = operands
    return of_x.size * (2 * kernel.shape[0] + 3 + 5 / 4)


def _flops_backward(operands: Sequence[Any], _: Any, __: Mapping[str, Any]) -> float:
    """Of the product and of what stands before it."""
    gates, kernel = operands[0], next(x for x in operands[2:] if len(x.shape) == 2)
    return gates.size * (2 * kernel.shape[0] + 6)


def _lstm_forward(of_x: Any, weight: Any, bias: Any, c: Any, h: Any) -> list[Any]:
    def step(carry, of_x):
        c, h = carry
        i, f, g, o = jnp.split(of_x + (jnp.dot(h, weight) + bias), 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (c, h), (jnp.concatenate([i, f, g, o], axis=-1), c, h)

    return [*lax.scan(step, (c, h), of_x)[1]]


def _lstm_backward(
    gates: Any, cs: Any, weight: Any, c: Any, dcs: Any, dhs: Any, dc: Any, dh: Any
) -> list[Any]:
    def step(carry, at):
        dc, dh, dbias = carry
        gates, before, c, dcs, dhs = at
        i, f, g, o = jnp.split(gates, 4, axis=-1)
        t, dh = jnp.tanh(c), dh + dhs
        dc = dc + dcs + dh * o * (1 - t * t)
        of_gates = (g * i * (1 - i), before * f * (1 - f), i * (1 - g * g), t * o * (1 - o))
        dgates = [d * gate for d, gate in zip((dc, dc, dc, dh), of_gates, strict=True)]
        dgates = jnp.concatenate(dgates, axis=-1)
        return (dc * f, jnp.dot(dgates, weight.T), dbias + dgates), dgates

    dcs = dcs if dcs.size else jnp.zeros_like(cs)
    before = jnp.concatenate([c[None], cs[:-1]])
    start = (dc, dh, jnp.zeros_like(gates[0]))
    (dc, dh, dbias), dgates = lax.scan(step, start, (gates, before, cs, dcs, dhs), reverse=True)
    return [dgates, dbias, dc, dh]


_LSTM_FORWARD = Kernel(
    "lstm_forward",  # of_x, kernel, bias, c, h -> gates, cs, hs
    (_STEPS, _MATRIX, _VECTOR, _STATE, _STATE),
    (_STEPS, _STEPS, _STEPS),
    _everywhere, _flops, _lstm_forward,
)  # fmt: skip
LSTM = Cell(
    _LSTM_FORWARD,
    _LSTM_FORWARD._replace(results=(_STEPS, _STEPS), dropped=1),
    Kernel(
        "lstm_backward",  # gates, cs, kernel, c, dcs, dhs, dc, dh -> dgates, dbias, dc, dh
        (_STEPS, _STEPS, _MATRIX, _STATE, _STEPS, _STEPS, _STATE, _STATE),
        (_STEPS, _STATE, _STATE, _STATE),  # dbias [batch, 4 * hidden]
        lambda gates, state: [gates, gates[1:], state, state], _flops_backward, _lstm_backward,
    ),
)  # fmt: skip


def _gru_forward(of_x: Any, weight: Any, bias: Any, h: Any) -> list[Any]:
    def step(h, of_x):
        x_r, x_z, x_n = jnp.split(of_x, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(jnp.dot(h, weight), 3, axis=-1)
        r, z, h_n = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z), h_n + bias
        n = jnp.tanh(x_n + r * h_n)
        h = (1 - z) * n + z * h
        return h, (jnp.concatenate([r, z, n], axis=-1), h_n, h)

    return [*lax.scan(step, h, of_x)[1]]


def _gru_backward(
    gates: Any, products: Any, hs: Any, weight: Any, h: Any, dhs: Any, dh: Any
) -> list[Any]:
    def step(carry, at):
        dh, dbias = carry
        gates, h_n, before, dhs = at
        r, z, n = jnp.split(gates, 3, axis=-1)
        dh = dh + dhs
        d_n = dh * ((1 - z) * (1 - n * n))
        shared = [d_n * (h_n * r * (1 - r)), dh * ((before - n) * z * (1 - z))]
        dgates = jnp.concatenate([*shared, d_n * r], axis=-1)
        dbias = dbias + jnp.concatenate([dgates, d_n], axis=-1)
        dinputs = jnp.concatenate([*shared, d_n], axis=-1)
        return (dh * z + jnp.dot(dgates, weight.T), dbias), (dinputs, dgates)

    before = jnp.concatenate([h[None], hs[:-1]])
    start = (dh, jnp.tile(jnp.zeros_like(dh), 4))
    (dh, dbias), (dinputs, dgates) = lax.scan(
        step, start, (gates, products, before, dhs), reverse=True
    )
    return [dinputs, dgates, dbias, dh]


_GRU_FORWARD = Kernel(
    "gru_forward",  # of_x, kernel, bias of the new gate, h -> gates, its products, hs
    (_STEPS, _MATRIX, _VECTOR, _STATE),
    (_STEPS, _STEPS, _STEPS),
    _everywhere, _flops, _gru_forward,
)  # fmt: skip
GRU = Cell(
    _GRU_FORWARD,
    _GRU_FORWARD._replace(results=(_STEPS,), dropped=2),
    Kernel(
        "gru_backward",  # gates, products, hs, kernel, h, dhs, dh -> dinputs, dgates, dbias, dh
        (_STEPS, _STEPS, _STEPS, _MATRIX, _STATE, _STEPS, _STATE),
        (_STEPS, _STEPS, _STATE, _STATE),  # dbias [batch, 4 * hidden]: dgates, then dinputs of n
        lambda gates, state: [gates, gates, (state[0], 4 * state[1]), state],
        _flops_backward, _gru_backward,
    ),
)  # fmt: skip
