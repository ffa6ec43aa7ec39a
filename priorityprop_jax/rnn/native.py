"""The recurrence of an LSTM by kernels in C++, where the installation has them: see `core.native`.

What goes from step to step is one call forward and one backward. The product with the inputs, and
the gradients of weights, are products over all steps around it.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from priorityprop_jax.core import native
from priorityprop_jax.core.fragile import (
    custom_partitioning,
    custom_vmap,
    here_or,
    no_mesh,
    varying,
)
from priorityprop_jax.rnn import recurrent
from priorityprop_jax.rnn.recurrent import LSTMParams

# Whose kernels were measured to be sooner than JAX's loops, and with how many steps: with fewer it
# takes longer to pack the recurrent kernel than that saves.
_SOONER = ("avx512", "avx2")
_LEAST_STEPS = 8


def are_here() -> bool:
    """Whether there are kernels that are worth it, and arrays are where they run."""
    return native.platform() == "cpu" and native.instruction_set() in _SOONER


def knows(params: Any, carry: Any, xs: jax.Array) -> bool:
    """Whether the kernels run this: an LSTM in float32 with some steps, of sizes that are known."""
    arrays = (*params, *carry, xs)
    return (
        isinstance(params, LSTMParams)
        and all(x.dtype == jnp.float32 for x in arrays)
        and all(isinstance(size, int) and size > 0 for x in arrays for size in x.shape)
        and len(xs) >= _LEAST_STEPS
        and are_here()
    )


def run(options: Any, params: Any, carry: Any, xs: jax.Array, probe: jax.Array) -> Any:
    """`recurrent.run` with all columns and no adjoint, by kernels where they know it."""
    if not knows(params, carry, xs):
        return recurrent.run(options, params, carry, xs, probe)
    states: Any = _states  # custom rules have no type of their own
    return states(options, False, params, carry, xs)[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _states(options: Any, keep: bool, params: Any, carry: Any, xs: Any) -> Any:
    of_x = jnp.dot(xs, params.input_kernel.T)
    operands = (of_x, params.recurrent_kernel.T, params.bias, *carry)
    *gates, cs, hs = _mapped(_FORWARD if keep else _VALUES)(*operands)
    others = (cs,) if options.all_carries else ()
    return (cs[-1], hs[-1]), hs, others, (*gates, cs) if keep else ()


def _states_forward(options: Any, keep: bool, params: Any, carry: Any, xs: Any) -> Any:
    # By the rule itself, not by the kernel: who differentiates twice comes through here.
    states: Any = _states
    final, hs, others, saved = states(options, True, params, carry, xs)
    return (final, hs, others, saved if keep else ()), (params, carry, xs, hs, *saved)


def _states_backward(options: Any, _: bool, residuals: Any, cotangents: Any) -> Any:
    gradients: Any = _gradients
    return gradients(options, residuals, cotangents[:3])


_states.defvjp(_states_forward, _states_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gradients(options: Any, residuals: Any, cotangents: Any) -> Any:
    params, (c0, h0), xs, hs, gates, cs = residuals
    (dc, dh), dhs, dothers = cotangents
    dcs = dothers[0] if dothers else jnp.zeros_like(cs, shape=(0, *c0.shape))
    operands = (gates, cs, params.recurrent_kernel.T, c0, dcs, dhs, dc, dh)
    dgates, dbias, dc0, dh0 = _mapped(_BACKWARD)(*operands)
    before = jnp.concatenate([h0[None], hs[:-1]])  # h that enters each step
    of_input, of_state = (recurrent.over_steps(dgates, x, jnp.float32) for x in (xs, before))
    dparams = LSTMParams(of_input, of_state, jnp.sum(dbias, axis=0))
    return dparams, (dc0, dh0), jnp.dot(dgates, params.input_kernel)


def _gradients_forward(options: Any, residuals: Any, cotangents: Any) -> Any:
    gradients: Any = _gradients
    return gradients(options, residuals, cotangents), (*residuals[:3], cotangents)


def _gradients_backward(options: Any, arguments: Any, more: Any) -> Any:
    """Gradients of gradients, by JAX alone; what was saved follows from the rest."""

    def again(params, carry, xs, cotangents):
        lean = functools.partial(recurrent.run, options, probe=jnp.zeros(3))
        return jax.vjp(lean, params, carry, xs)[1](cotangents)

    *found, dcotangents = jax.vjp(again, *arguments)[1](more)
    return (*found, None, None, None), dcotangents


_gradients.defvjp(_gradients_forward, _gradients_backward)


class _Kernel(NamedTuple):
    """A kernel: ``(*operands) -> list of results``; those of all steps are ``[time, batch, ...]``.

    Sides have an axis of the batch or None for each array, and its number of axes.
    """

    handler: str
    operands: tuple[tuple[int | None, int], ...]
    results: tuple[tuple[int | None, int], ...]
    values_only: bool = False


_STEPS, _STATE = (1, 3), (0, 2)
_FORWARD = _Kernel(
    "lstm_forward",  # of_x, kernel [hidden, gates * hidden], bias, c, h -> gates, cs, hs
    (_STEPS, (None, 2), (None, 1), _STATE, _STATE),
    (_STEPS, _STEPS, _STEPS),
)
_VALUES = _FORWARD._replace(results=(_STEPS, _STEPS), values_only=True)  # cs, hs
_BACKWARD = _Kernel(
    "lstm_backward",  # gates, cs, kernel, c, dcs, dhs, dc, dh -> dgates, dbias, dc, dh
    (_STEPS, _STEPS, (None, 2), _STATE, _STEPS, _STEPS, _STATE, _STATE),
    (_STEPS, _STATE, _STATE, _STATE),  # dbias [batch, gates * hidden]
)


@functools.cache
def _mapped(kernel: _Kernel) -> Any:
    """A kernel with a rule for `jax.vmap`: mapped examples join the batch."""

    @custom_vmap
    def mapped(*operands):
        return _partitioned(kernel, *operands)

    @mapped.def_vmap
    def rule(size, batched, *operands):
        whole = [
            x if there else jnp.broadcast_to(x, (size, *x.shape))
            for x, there in zip(operands, batched, strict=True)
        ]
        results = [True] * len(kernel.results)
        rows = [axis for axis, _ in kernel.operands]
        if any(there for there, axis in zip(batched, rows, strict=True) if axis is None):
            return lax.map(lambda one: mapped(*one), tuple(whole)), results

        def join(x, axis):
            x = jnp.moveaxis(x, 0, axis)
            return x.reshape(*x.shape[:axis], -1, *x.shape[axis + 2 :])

        def part(x, axis):
            x = x.reshape(*x.shape[:axis], size, -1, *x.shape[axis + 1 :])
            return jnp.moveaxis(x, axis, 0)

        joined = [
            one if axis is None else join(every, axis)
            for one, every, axis in zip(operands, whole, rows, strict=True)
        ]
        found = mapped(*joined)
        axes = [axis for axis, _ in kernel.results]
        return [part(x, axis) for x, axis in zip(found, axes, strict=True)], results

    return mapped


def _partitioned(kernel: _Kernel, *operands: Any) -> list[Any]:
    """A kernel under a rule by which a compiler that shards arrays may split the batch."""
    function = functools.partial(_call, kernel)

    def partition(mesh, shapes, _):
        spec = shapes[0].sharding.spec
        names = spec[1] if len(spec) > 1 else None

        def place(side):
            specs = [[names if axis == row else None for axis in range(n)] for row, n in side]
            return [NamedSharding(mesh, jax.P(*spec)) for spec in specs]

        def lower(*parts):
            with no_mesh():  # of the caller: all is split already
                return function(*parts)

        return mesh, lower, place(kernel.results), tuple(place(kernel.operands))

    if not any(map(varying, operands)):  # inside of `jax.shard_map` all is split already
        by_side = [
            [" ".join("b" if axis == row else f"x{place}y{axis}" for axis in range(n))]
            for place, (row, n) in enumerate((*kernel.operands, *kernel.results))
        ]
        count, names = len(kernel.operands), [name for [name] in by_side]
        axes = dict.fromkeys(axis for name in names for axis in name.split())
        function = custom_partitioning(function)
        function.def_partition(
            partition=partition,
            infer_sharding_from_operands=None,
            sharding_rule=f"{', '.join(names[:count])} -> {', '.join(names[count:])}",
            need_replication_factors=tuple(axis for axis in axes if axis != "b"),
        )
    portable = _backward if kernel is _BACKWARD else functools.partial(_forward, kernel)
    return here_or(function, portable)(*operands)


def _call(kernel: _Kernel, *operands: jax.Array) -> list[jax.Array]:
    """Calls the kernel, which may write gates over what enters them, and the reverse."""
    steps, state = operands[0].shape, operands[3].shape
    every = (steps[0], *state)
    if kernel.handler == "lstm_backward":
        shapes = [steps, (state[0], steps[-1]), state, state]
        return [*native.call(kernel.handler, _flops_backward, shapes, *operands, in_place={0: 0})]
    if kernel.values_only:
        return [*native.call(kernel.handler, _flops, [(0,), every, every], *operands)][1:]
    shapes = [steps, every, every]
    return [*native.call(kernel.handler, _flops, shapes, *operands, in_place={0: 0})]


def _flops(operands: Sequence[Any], _: Any, __: Mapping[str, Any]) -> float:
    """Of the product, the sums, the functions of gates, and the states."""
    of_x, kernel, *_ = operands
    return of_x.size * (2 * kernel.shape[0] + 3 + 5 / 4)


def _flops_backward(operands: Sequence[Any], _: Any, __: Mapping[str, Any]) -> float:
    """Of the product and of what stands before it."""
    gates, _, kernel, *_ = operands
    return gates.size * (2 * kernel.shape[0] + 6)


def _forward(kernel: _Kernel, of_x: Any, weight: Any, bias: Any, c: Any, h: Any) -> list[Any]:
    """What the kernel computes, by JAX alone."""

    def step(carry, of_x):
        c, h = carry
        i, f, g, o = jnp.split(of_x + (jnp.dot(h, weight) + bias), 4, axis=-1)
        i, f, g, o = jax.nn.sigmoid(i), jax.nn.sigmoid(f), jnp.tanh(g), jax.nn.sigmoid(o)
        c = f * c + i * g
        h = o * jnp.tanh(c)
        return (c, h), (jnp.concatenate([i, f, g, o], axis=-1), c, h)

    results = lax.scan(step, (c, h), of_x)[1]
    return [*results][kernel.values_only :]


def _backward(
    gates: Any, cs: Any, weight: Any, c: Any, dcs: Any, dhs: Any, dc: Any, dh: Any
) -> list[Any]:
    """What the kernel computes, by JAX alone."""

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
