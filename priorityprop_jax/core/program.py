"""What a program costs, read off its jaxpr or off what was compiled."""

from __future__ import annotations

import concurrent.futures
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.walk import Walk, parts_of


def program_flops(program: Any) -> float:
    """The FLOPs of one run of a jaxpr, or of a compiled program by the compiler's own account.

    In a jaxpr every operation that computes numbers counts one for each of its results, a product
    of matrices and a convolution two for each product of two numbers, padding included. What
    nothing reads counts nothing. A `jax.lax.scan` counts its body times its length, a branch as its
    dearest, a kernel as often as its grid says, a custom call by its formula (see
    `register_flops`), and a loop of unknown length once. For the compiler every loop counts once.
    """
    if hasattr(program, "cost_analysis"):
        return float(program.cost_analysis().get("flops", 0.0))
    return _everything(program, Walk())


def product_flops(jaxpr: Any) -> float:
    """`program_flops` of all products and convolutions of a traced program, and of nothing else."""
    return _everything(jaxpr, Walk(products_only=True))


def _everything(jaxpr: Any, walk: Walk) -> float:
    outputs = len(getattr(jaxpr, "jaxpr", jaxpr).outvars)
    return sum(walk.over(jaxpr, [1] * outputs, always=1)[0].values())


def constants(jaxpr: Any) -> Iterator[Any]:
    """The arrays that a traced program closes over, those of all its parts included."""
    yield from getattr(jaxpr, "consts", ())
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        for part in parts_of(eqn):
            yield from constants(part)


class Program(NamedTuple):
    """A compiled program."""

    run: Callable[..., Any]
    flops: float  # of one run, see `program_flops`, on all devices together
    seconds: float  # of wall time that tracing and compiling took
    beside: int  # see `bytes_beside`


def bytes_beside(compiled: Any) -> int:
    """Bytes that a compiled program takes on one device beside its arguments, as it says itself.

    What it works with, and results that do not take the place of arguments.
    """
    found = compiled.memory_analysis()
    return found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes


def build(
    function: Callable[..., Any],
    arguments: Any,
    out: Any,
    donate: tuple[int, ...] = (),
    meanwhile: Sequence[Callable[[], None]] = (),
) -> Program:
    """Compiles a pure function for arguments like these; ``out``: see `layout_of`.

    ``meanwhile`` are run while XLA compiles, which needs no Python.
    """
    start = time.perf_counter()
    traced = jax.jit(function, donate_argnums=donate, out_shardings=out).trace(*arguments)
    lowered = traced.lower()
    if not meanwhile:
        program = lowered.compile()
    else:
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            compiling = pool.submit(lowered.compile)
            for job in meanwhile:
                job()
            program = compiling.result()
    flops, beside = program_flops(traced.jaxpr), bytes_beside(program)
    return Program(program, flops, time.perf_counter() - start, beside)


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array or a number, as JAX will have it."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return x  # with its sharding, if it has one
    dtype = x.dtype if hasattr(x, "dtype") else jnp.result_type(x)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random streams
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)
