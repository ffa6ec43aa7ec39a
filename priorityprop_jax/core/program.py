"""What a program costs, read off its jaxpr or off what was compiled."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def program_flops(compiled: Any) -> float:
    """The FLOPs of a compiled program, by the compiler's own account.

    Args:
      compiled: what ``jax.jit(f).lower(...).compile()`` returns.

    Returns:
      Floating-point operations of one run.
    """
    return analysis(compiled)["flops"]


def product_flops(jaxpr: Any) -> float:
    """The FLOPs of all products and convolutions of a traced program, loops as often as they run.

    A compiler counts the body of a loop once, and not what a custom derivative will come to. Here a
    `jax.lax.scan` counts its body times its length, a branch as its dearest, and a loop of unknown
    length once. A convolution counts every tap of its window, those on padding too.

    Args:
      jaxpr: what ``jax.make_jaxpr(f)(...)`` returns.

    Returns:
      Floating-point operations of one run: two for every product of two numbers.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.core.program import product_flops
      >>> def f(x, w):
      ...     return jax.lax.scan(lambda x, _: (x @ w, None), x, length=3)[0]
      >>> product_flops(jax.make_jaxpr(f)(jnp.ones((4, 8)), jnp.ones((8, 8))))
      1536.0
    """
    total = 0.0
    for eqn in getattr(jaxpr, "jaxpr", jaxpr).eqns:
        name, params = eqn.primitive.name, eqn.params
        if name == "dot_general":
            (contracted, _), _ = params["dimension_numbers"]
            shape = eqn.invars[0].aval.shape
            total += 2.0 * eqn.outvars[0].aval.size * math.prod(shape[axis] for axis in contracted)
        elif name == "conv_general_dilated":
            kernel = eqn.invars[1].aval
            features = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
            total += 2.0 * eqn.outvars[0].aval.size * kernel.size / features
        else:
            inner = [product_flops(part) for part in _parts(list(params.values()))]
            if name == "cond":
                total += max(inner)
            else:
                total += sum(inner) * (params["length"] if name == "scan" else 1)
    return total


def _parts(values: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    found = []
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            found.append(value)
        elif isinstance(value, list | tuple):
            found += _parts(value)
    return found


def abstract(x: Any) -> jax.ShapeDtypeStruct:
    """Shape and dtype of an array, as JAX will have it.

    Args:
      x: an array, a number, or what is abstract already and stays as it is.
    """
    if isinstance(x, jax.ShapeDtypeStruct):
        return x  # with its sharding, if it has one
    dtype = getattr(x, "dtype", None)
    if dtype is None:
        dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jax.dtypes.extended):  # keys of random streams
        dtype = jax.dtypes.canonicalize_dtype(dtype)
    return jax.ShapeDtypeStruct(np.shape(x), dtype)


def analysis(compiled: Any) -> Mapping[str, float]:
    """What the compiler counts of a program, by name."""
    analysis = compiled.cost_analysis()
    if isinstance(analysis, list):  # older JAX: one a device
        analysis = analysis[0]
    return {key: float(analysis.get(key, 0.0)) for key in ("flops", "bytes accessed")}


def has_shape(x: Any) -> bool:
    """Whether this is an array, or stands for one."""
    return hasattr(x, "shape")
