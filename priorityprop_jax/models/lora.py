"""LoRA, the usual way to train little of a model: thin matrices beside frozen ones."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.modules import FrozenWeight
from priorityprop_jax.exact.products import dot_general


class LoRALinear(nnx.Module):
    """A linear layer and a product of two thin matrices; see `add_lora`."""

    def __init__(self, base: nnx.Linear, rank: int, scale: float, rngs: nnx.Rngs):
        *layers, inputs, outputs = base.kernel.shape  # of a stack the layers come first
        self.base, self.scale = base, scale
        bound = 1 / math.sqrt(inputs)
        start = jax.random.uniform(rngs(), (*layers, inputs, rank), minval=-bound, maxval=bound)
        self.a, self.b = nnx.Param(start), nnx.Param(jnp.zeros((*layers, rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[..., inputs]` to `[..., outputs]`."""
        a, b = (matrix[...].astype(x.dtype) for matrix in (self.a, self.b))
        last = (((x.ndim - 1,), (0,)), ((), ()))
        # As `x @ a @ b`, but XLA's CPU backend would write what comes back to `b` transposed.
        return self.base(x) + dot_general(dot_general(x, a, last), b, last) * self.scale


def add_lora(model: Any, *, rank: int = 8, alpha: float = 16.0, seed: int = 0) -> None:
    r"""Freezes a model in place, and puts LoRA around every linear layer of its `blocks`.

    .. math:: y = x W + b + \frac{\alpha}{r} (x A) B

    with `A`, ``[inputs, rank]``, at random and `B`, ``[rank, outputs]``, zero, so that the model
    computes at first what it did before. A head that tells classes is trained too.

    Args:
      model: a `Decoder` or a `BertClassifier`.
      rank: of the matrices, at least 1.
      alpha: how much they count.
      seed: of the matrices.

    Raises:
      ValueError: `rank` or `alpha` is out of range.

    References:
      Hu et al., [LoRA](https://arxiv.org/abs/2106.09685), 2021.
    """
    if rank < 1 or not 0 < alpha < math.inf:
        raise ValueError(f"rank is {rank} and alpha {alpha}: at least 1 and above 0 are needed")
    classes = getattr(model.config, "classes", None)
    fresh = model.head.out if hasattr(model.head, "out") else model.head if classes else None
    for module in _modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Param) and module is not fresh:
                setattr(module, name, FrozenWeight(value[...]))
    rngs = nnx.Rngs(seed)
    for module in _modules(model.blocks):
        for name, value in list(vars(module).items()):
            if isinstance(value, nnx.Linear):
                setattr(module, name, LoRALinear(value, rank, alpha / rank, rngs))


def merge_lora(model: Any) -> None:
    """Adds the matrices of `add_lora` to the weights beside them, which are parameters again."""
    for module in _modules(model):
        for name, value in list(vars(module).items()):
            if isinstance(value, LoRALinear):
                base = value.base
                base.kernel[...] += value.a[...] @ value.b[...] * value.scale
                setattr(module, name, base)
            elif isinstance(value, FrozenWeight):
                setattr(module, name, nnx.Param(value[...]))


def _modules(model: Any) -> list[Any]:
    return list({id(m): m for _, m in nnx.iter_modules(model)}.values())
