"""What a program costs, read off its jaxpr or off what was compiled."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core as jex_core

# What moves numbers, makes them, or tells of them, and computes none.
_FREE = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice concatenate pad "
    "dynamic_update_slice gather iota copy copy_p convert_element_type bitcast_convert_type rev "
    "stop_gradient device_put sharding_constraint reshard mesh_cast pvary pcast split empty "
    "optimization_barrier random_wrap random_unwrap random_bits random_fold_in random_split "
    "random_seed threefry2x32 shift_right_logical shift_left create_token ffi_call".split()
)
_REDUCE = ("reduce_", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")


def program_flops(program: Any) -> float:
    """The FLOPs of one run of a jaxpr, or of a compiled program by the compiler's own account.

    In a jaxpr every operation that computes numbers counts one for each of its results, a product
    of matrices and a convolution two for each product of two numbers, padding included. What
    nothing reads counts nothing. A `jax.lax.scan` counts its body times its length, a branch as its
    dearest, a kernel as often as its grid says, and a loop of unknown length once. For the compiler
    every loop counts once.
    """
    if hasattr(program, "cost_analysis"):
        return analysis(program)["flops"]
    return _count(program, None, products_only=False)[0]


def product_flops(jaxpr: Any) -> float:
    """`program_flops` of all products and convolutions of a traced program, and of nothing else."""
    return _count(jaxpr, None, products_only=True)[0]


def _count(jaxpr: Any, live: Any, products_only: bool) -> tuple[float, list[bool]]:
    """The FLOPs of what the outputs that are ``live`` need, and which inputs that reads."""
    jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
    needed = _chosen(jaxpr.outvars, live or [True] * len(jaxpr.outvars))
    total = 0.0
    for eqn in reversed(jaxpr.eqns):
        used = [var in needed for var in eqn.outvars]
        if not (any(used) or eqn.effects):
            continue
        name, inner = eqn.primitive.name, _parts(list(eqn.params.values()))
        read = [True] * len(eqn.invars)
        if inner and name != "scan" and not name.startswith(("reduce", "scatter", "custom_lin")):
            counts = []
            for part in inner:
                # Where a part has the results of the whole, what nothing reads of them is not run.
                body = getattr(part, "jaxpr", part)
                same = len(body.outvars) == len(used) and name not in ("while", "pallas_call")
                count, inputs = _count(part, used if same else None, products_only)
                counts.append(count)
                if same and len(inner) == 1 and len(inputs) == len(read):
                    read = inputs
            total += max(counts) if name == "cond" else _times(eqn) * sum(counts)
        elif name == "scan":
            # What a loop carries is read by its next round.
            carried = eqn.params["num_carry"]
            live = [True] * carried + used[carried:]
            total += _times(eqn) * _count(inner[0], live, products_only)[0]
        else:
            total += _flops(eqn, name, products_only)
        needed |= _chosen(eqn.invars, read)
    return total, [var in needed for var in jaxpr.invars]


def _chosen(variables: Any, flags: Any) -> set[Any]:
    """Those of a true flag, literals left out."""
    pairs = zip(variables, flags, strict=True)
    return {var for var, flag in pairs if flag and isinstance(var, jex_core.Var)}


def _flops(eqn: Any, name: str, products_only: bool) -> float:
    """The FLOPs of an operation that has none in it."""
    result, params = eqn.outvars[0].aval, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * result.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * result.size * kernel.size / outs
    if products_only or name in _FREE or not hasattr(result, "size"):
        return 0.0
    if name.startswith(_REDUCE):
        return float(eqn.invars[0].aval.size)
    return float(eqn.invars[-1].aval.size if name.startswith("scatter") else result.size)


def _times(eqn: Any) -> float:
    """How often an operation runs what is in it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        return params["length"]
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # what is in it, is of one device
        manual = params.get("manual_axes", params["mesh"].axis_names)
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    return 1


def _parts(values: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _parts(value)
    return found


def constants(jaxpr: Any) -> Iterator[Any]:
    """The arrays that a traced program closes over, those of all its parts included."""
    yield from getattr(jaxpr, "consts", ())
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for part in _parts(list(eqn.params.values())):
            yield from constants(part)


class Program(NamedTuple):
    """A compiled program."""

    run: Callable[..., Any]
    flops: float  # of one run, see `program_flops`, on all devices together
    seconds: float  # of wall time that tracing and compiling took


def build(
    function: Callable[..., Any], arguments: Any, out: Any, donate: tuple[int, ...] = ()
) -> Program:
    """Compiles a pure function for arguments like these; ``out``: see `layout_of`."""
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate, out_shardings=out).trace(*arguments)
    program = traced.lower().compile()
    return Program(program, program_flops(traced.jaxpr), time.perf_counter() - start)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or a number, as JAX will have it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x  # with its sharding, if it has one
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random streams
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)


def analysis(compiled: Any) -> Mapping[str, float]:
    """What the compiler counts of a program, by name."""
    found = compiled.cost_analysis()
    return {key: float(found.get(key, 0.0)) for key in ("flops", "bytes accessed")}
