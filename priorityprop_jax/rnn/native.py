"""The recurrence of LSTM and GRU by kernels in C++, where they are installed: see `core.native`.

What goes from step to step is one call forward and one backward. The product with the inputs, and
the gradients of weights, are products over all steps around it.
"""

from __future__ import annotations

import functools
from typing import Any

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
from priorityprop_jax.rnn import kernels, recurrent
from priorityprop_jax.rnn.kernels import Kernel
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams

# Whose kernels were measured to be sooner than JAX's loops, and with how many steps: with fewer it
# takes longer to pack the recurrent kernel than that saves.
_SOONER = ("avx512", "avx2")
_LEAST_STEPS = 8
_CELLS: dict[type, kernels.Cell] = {LSTMParams: kernels.LSTM, GRUParams: kernels.GRU}


def are_here(steps: int = _LEAST_STEPS) -> bool:
    """Whether there are kernels worth it for so many steps, and arrays are where they run."""
    here = native.platform() == "cpu" and native.instruction_set() in _SOONER
    return here and steps >= _LEAST_STEPS


def knows(params: Any, carry: Any, xs: jax.Array) -> bool:
    """Whether the kernels run this: a cell in float32 with some steps, of sizes that are known."""
    arrays = jax.tree.leaves((params, carry, xs))
    return (
        all(x.dtype == jnp.float32 for x in arrays)
        and all(isinstance(size, int) and size > 0 for x in arrays for size in x.shape)
        and are_here(len(xs))
    )


def run(options: Any, params: Any, carry: Any, xs: jax.Array, probe: jax.Array) -> Any:
    """`recurrent.run` with all columns and no adjoint, by kernels where they know it."""
    if not knows(params, carry, xs):
        return recurrent.run(options, params, carry, xs, probe)
    states: Any = _states  # custom rules have no type of their own
    return states(options, False, params, carry, xs)[:3]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _states(options: Any, keep: bool, params: Any, carry: Any, xs: Any) -> Any:
    cell = _CELLS[type(params)]
    of_x = jnp.dot(xs, params.input_kernel.T)
    bias = params[-1]
    if isinstance(params, GRUParams):
        of_x = of_x if params.input_bias is None else of_x + params.input_bias
        bias = jnp.zeros_like(of_x, shape=carry[0].shape[1:]) if bias is None else bias
    operands = (of_x, params.recurrent_kernel.T, bias, *carry)
    *saved, hs = _mapped(cell.forward if keep else cell.values)(*operands)
    cs = saved[-1:] if isinstance(params, LSTMParams) else []
    others = tuple(cs) if options.all_carries else ()
    return tuple(x[-1] for x in (*cs, hs)), hs, others, tuple(saved) if keep else ()


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
    params, carry, xs, hs, *saved = residuals
    dfinal, dhs, dothers = cotangents
    kernel, run = params.recurrent_kernel.T, _mapped(_CELLS[type(params)].backward)
    if isinstance(params, LSTMParams):
        dcs = dothers[0] if dothers else jnp.zeros_like(hs, shape=(0, *hs.shape[1:]))
        dgates, dbias, *dcarry = run(*saved, kernel, carry[0], dcs, dhs, *dfinal)
        dinputs = dgates
    else:
        dinputs, dgates, dbias, *dcarry = run(*saved, hs, kernel, *carry, dhs, *dfinal)
    before = jnp.concatenate([carry[-1][None], hs[:-1]])  # h that enters each step
    dparams = params._replace(
        input_kernel=recurrent.over_steps(dinputs, xs, jnp.float32),
        recurrent_kernel=recurrent.over_steps(dgates, before, jnp.float32),
        **options.cell.bias(params, jnp.sum(dbias, axis=0)),
    )
    return dparams, tuple(dcarry), jnp.dot(dinputs, params.input_kernel)


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


@functools.cache
def _mapped(kernel: Kernel) -> Any:
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


def _partitioned(kernel: Kernel, *operands: Any) -> list[Any]:
    """A kernel under a rule by which a compiler that shards arrays may split the batch."""
    function = kernel.__call__

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
    return here_or(function, kernel.by_jax)(*operands)
