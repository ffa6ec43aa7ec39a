"""Characters of Shakespeare, for a small transformer or a recurrent network."""

from __future__ import annotations

import functools
import os
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.cli.tasks import Task
from priorityprop_jax.highway.scan import highway_nnx
from priorityprop_jax.models.files import DataFile, read_file

MODELS = ("transformer", "gru", "lstm")

_SHAKESPEARE = DataFile(
    names=("tinyshakespeare.txt", "tinyshakespeare.txt.gz", "input.txt"),
    urls=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)


class Block(nnx.Module):
    """A pre-norm transformer block: causal self-attention, then an MLP, each added to its input.

    Args:
      width: features of a position.
      heads: attention heads; they divide `width`.
      rngs: of the weights.
    """

    def __init__(self, width: int, heads: int, *, rngs: nnx.Rngs):
        self.heads = heads
        self.attention_norm = nnx.LayerNorm(width, rngs=rngs)
        self.qkv = nnx.Linear(width, 3 * width, rngs=rngs)
        self.attention_out = nnx.Linear(width, width, rngs=rngs)
        self.mlp_norm = nnx.LayerNorm(width, rngs=rngs)
        self.mlp_in = nnx.Linear(width, 4 * width, rngs=rngs)
        self.mlp_out = nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, time, width]` to the same shape."""
        qkv = self.qkv(self.attention_norm(x))  # [batch, time, 3 * width]
        qkv = qkv.reshape(*x.shape[:2], 3, self.heads, -1)
        q, k, v = qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2]  # [batch, time, heads, features]
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attention_out(attended.reshape(x.shape))
        return x + self.mlp_out(nnx.gelu(self.mlp_in(self.mlp_norm(x))))


class CharTransformer(nnx.Module):
    """A causal transformer that predicts the next character at each position.

    Args:
      vocabulary: number of characters.
      context: the longest input, in characters.
      width: features of a position.
      depth: number of blocks.
      heads: attention heads; they divide `width`.
      rngs: of the weights.

    Attributes:
      iterations: rounds of `highway_nnx`, by which the blocks go backward; None for plain autodiff.
    """

    def __init__(
        self,
        vocabulary: int,
        *,
        context: int = 128,
        width: int = 128,
        depth: int = 4,
        heads: int = 4,
        rngs: nnx.Rngs,
    ):
        self.iterations: int | None = None
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        self.position = nnx.Embed(context, width, rngs=rngs)
        self.blocks = nnx.List(Block(width, heads, rngs=rngs) for _ in range(depth))
        self.norm = nnx.LayerNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[batch, time]` to logits `[batch, time, vocabulary]`."""
        x = self.embed(tokens) + self.position(jnp.arange(tokens.shape[1]))
        if self.iterations is None:
            for block in self.blocks:
                x = block(x)
        else:
            x = highway_nnx(self.blocks, x, iterations=self.iterations)
        return self.head(self.norm(x))


class CharRNN(nnx.Module):
    """A recurrent layer that predicts the next character at each position.

    Args:
      vocabulary: number of characters.
      cell: ``"gru"`` or ``"lstm"``.
      width: of the embedding and of the state.
      rngs: of the weights.
    """

    def __init__(self, vocabulary: int, *, cell: str, width: int = 256, rngs: nnx.Rngs):
        self.width = width
        self.embed = nnx.Embed(vocabulary, width, rngs=rngs)
        kind: Any = nnx.GRUCell if cell == "gru" else nnx.OptimizedLSTMCell
        # Without streams of random numbers: the first state is given, and zero.
        self.rnn = nnx.RNN(kind(width, width, rngs=rngs), rngs=False)
        self.head = nnx.Linear(width, vocabulary, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens `[batch, time]` to logits `[batch, time, vocabulary]`."""
        zero = jnp.zeros((len(tokens), self.width))  # [batch, width]
        carry: Any = zero if isinstance(self.rnn.cell, nnx.GRUCell) else (zero, zero)
        states: Any = self.rnn(self.embed(tokens), initial_carry=carry)  # [batch, time, width]
        return self.head(states)


@functools.lru_cache(maxsize=2)
def read_tokens(data_dir: str | None) -> tuple[np.ndarray, int]:
    """The text by numbers of characters, `[characters]`, and how many of these there are."""
    text = np.frombuffer(read_file(_SHAKESPEARE, data_dir=data_dir), np.uint8)
    alphabet, tokens = np.unique(text, return_inverse=True)
    return tokens.astype(np.int32), len(alphabet)


def load(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    model: str = "transformer",
    sizes: Mapping[str, int] | None = None,
) -> Task:
    """Windows of 128 characters of Tiny Shakespeare.

    Args:
      data_dir: folder of the text.
      seed: of the weights and of the order of the training rows.
      model: `transformer`, `gru` or `lstm`.
      sizes: of the model, as `CharTransformer` or `CharRNN` takes them.
    """
    if model not in MODELS:
        raise ValueError(f"model is {model!r}, not one of {', '.join(MODELS)}")
    context = 128
    tokens, characters = read_tokens(None if data_dir is None else os.fspath(data_dir))
    n = len(tokens)

    def windows(part: np.ndarray, stride: int) -> dict[str, np.ndarray]:
        # A view: the million overlapping windows of the training text take no memory.
        view = np.lib.stride_tricks.sliding_window_view(part, context + 1)[::stride]
        return {"x": view[:, :-1], "y": view[:, 1:]}  # [windows, context] each

    rngs, sizes = nnx.Rngs(seed), dict(sizes or {})
    made = (
        CharTransformer(characters, rngs=rngs, **{"context": context, **sizes})
        if model == "transformer"
        else CharRNN(characters, cell=model, rngs=rngs, **sizes)
    )
    parts = (
        # Windows start anywhere, so an epoch over all of them would show each character 128 times.
        windows(tokens[: n * 90 // 100], 1),
        windows(tokens[n * 90 // 100 : n * 95 // 100], context),
        windows(tokens[n * 95 // 100 :], context),
    )
    return Task("char-lm", made, parts, seed, 16, 2e-3, 10, max_batches=100)
