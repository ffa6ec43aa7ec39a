"""Where Muon is set against NAdam: characters of Shakespeare, and MiniLM on SST-2."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.tasks import char
from priorityprop_jax.cli.tasks import cross_entropy, sst2

CONTEXT, CHARACTERS, DEPTH, TOKENS = 64, 65, 4, 1024
ROWS, LENGTH = 32, 24


class Problem(NamedTuple):
    """Something to learn.

    Attributes:
      start: the parameters of a seed.
      loss_fn: of parameters and a batch.
      draw: a batch to train on, of a random key.
      dev: batches that are never trained on, with another axis in front.
    """

    start: Callable[[int], Any]
    loss_fn: Callable[[Any, Any], jax.Array]
    draw: Callable[[jax.Array], Any]
    dev: Any


def pure(model: nnx.Module) -> Any:
    """The parameters of a model."""
    return nnx.as_pure(nnx.state(model, nnx.Param))


def characters(
    width: int, depth: int = DEPTH, tokens: int = TOKENS, text: np.ndarray | None = None
) -> Problem:
    """A character transformer on windows of 64 characters, by default Shakespeare's.

    A batch has so many of them.
    """
    text = char.read_tokens(None)[0] if text is None else text
    n = len(text) * 90 // 100
    train = jnp.asarray(text[:n])
    starts = np.linspace(n, len(text) - CONTEXT - 1, 2048).astype(int)
    dev = jnp.asarray(text[starts[:, None] + np.arange(CONTEXT + 1)]).reshape(32, 64, -1)

    def model(seed: int) -> char.CharTransformer:
        rngs = nnx.Rngs(seed)
        return char.CharTransformer(
            CHARACTERS, context=CONTEXT, width=width, depth=depth, rngs=rngs
        )

    graph, _, rest = nnx.split(nnx.eval_shape(lambda: model(0)), nnx.Param, ...)

    def loss_fn(params: Any, windows: jax.Array) -> jax.Array:
        logits = nnx.merge(graph, params, rest)(windows[:, :-1])
        return optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:]).mean()

    def draw(key: jax.Array) -> jax.Array:
        first = jax.random.randint(key, (tokens // CONTEXT,), 0, n - CONTEXT)
        return train[first[:, None] + jnp.arange(CONTEXT + 1)]

    return Problem(lambda seed: pure(model(seed)), loss_fn, draw, dev)


def minilm() -> Problem:
    """All of MiniLM is trained on SST-2: 32 sentences of up to 24 tokens a batch."""
    task = sst2()
    train, *others = ({"x": p["x"][:, :LENGTH], "y": p["y"]} for p in task.parts)
    n = len(train["y"])
    train = jax.tree.map(jnp.asarray, train)
    held_out = jax.tree.map(lambda *parts: np.concatenate(parts), *others)
    rows = len(held_out["y"]) // ROWS * ROWS
    dev = jax.tree.map(lambda a: jnp.asarray(a[:rows]).reshape(-1, ROWS, *a.shape[1:]), held_out)
    graph, _, rest = nnx.split(task.model, nnx.Param, ...)

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return cross_entropy(nnx.merge(graph, params, rest), batch)[0]

    def draw(key: jax.Array) -> Any:
        chosen = jax.random.randint(key, (ROWS,), 0, n)
        return jax.tree.map(lambda a: a[chosen], train)

    return Problem(lambda seed: pure(sst2(seed=seed).model), loss_fn, draw, dev)


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "characters, width 128": functools.partial(characters, 128),
    "characters, width 256": functools.partial(characters, 256),
    "MiniLM, SST-2": minilm,
}
