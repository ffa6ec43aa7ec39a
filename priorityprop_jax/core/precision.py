"""In which precision sums are taken."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp


def wide_type(*arrays: Any) -> Any:
    """What arrays promote to together, float32 at least; None is no array.

    Under strict promotion too, where JAX refuses to say it.
    """
    kinds = [jnp.result_type(x) for x in arrays if x is not None]
    with jax.numpy_dtype_promotion("standard"):
        return functools.reduce(jnp.promote_types, kinds, jnp.dtype(jnp.float32))
