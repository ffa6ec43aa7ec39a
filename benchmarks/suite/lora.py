"""LoRA for the encoders that are fine-tuned."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import nnx


class Frozen(nnx.Variable):
    """A weight that LoRA leaves as it is."""


class LoRALinear(nnx.Module):
    """A linear layer plus a product of two thin matrices, ``x @ W + b + (x @ A) @ B * 2``.

    LoRA (Hu et al., 2021, arXiv 2106.09685), with alpha = 2 * rank.
    """

    def __init__(self, base: nnx.Linear, rank: int, rngs: nnx.Rngs):
        self.base = base
        inputs, outputs = base.kernel.shape
        bound = 1 / math.sqrt(inputs)
        self.a = nnx.Param(jax.random.uniform(rngs(), (inputs, rank), minval=-bound, maxval=bound))
        self.b = nnx.Param(jnp.zeros((rank, outputs)))

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.base(x) + (x @ self.a[...]) @ self.b[...] * 2.0


def add_lora(model: nnx.Module, rank: int, seed: int) -> None:
    """Freezes all but the head, and puts LoRA around all linear layers of the blocks."""
    rngs = nnx.Rngs(seed)
    for part in (model.embed, *model.blocks):
        for node in {id(n): n for _, n in nnx.iter_modules(part)}.values():
            for name, value in list(vars(node).items()):
                if isinstance(value, nnx.Param):
                    setattr(node, name, Frozen(value[...]))
    for block in model.blocks:
        for name, value in list(vars(block).items()):
            if isinstance(value, nnx.Linear):
                setattr(block, name, LoRALinear(value, rank, rngs))
