"""A BERT encoder for Flax."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.models.files import read_json

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # with the error function itself
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of a BERT: what its `config.json` says about the layers.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: features of a position, the "width".
      num_hidden_layers: number of blocks.
      num_attention_heads: attention heads; they divide `hidden_size`.
      intermediate_size: features between the two layers of a block's MLP.
      max_position_embeddings: the longest input, in tokens.
      type_vocab_size: number of token types; only the first is used here.
      hidden_act: `"gelu"` (exact), `"gelu_new"` (by tanh) or `"relu"`.
      layer_norm_eps: added to the variance in each LayerNorm.
      pad_token_id: the token that fills up a short input.
      initializer_range: standard deviation of fresh weights.

    Raises:
      ValueError: a value is one that the encoder cannot work with.

    See `BertClassifier` for an example.
    """

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512
    type_vocab_size: int = 2
    hidden_act: str = "gelu"
    layer_norm_eps: float = 1e-12
    pad_token_id: int = 0
    initializer_range: float = 0.02

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        for name in [field.name for field in dataclasses.fields(self) if field.type == "int"]:
            value, least = getattr(self, name), int(name != "pad_token_id")
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name} is {value!r}, a whole number from {least} on is needed")
        act, heads, pad = self.hidden_act, self.num_attention_heads, self.pad_token_id
        if act not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"hidden_act {act!r} is not supported; those that are: {known}")
        if self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}"
            )
        if pad >= self.vocab_size:
            raise ValueError(f"pad_token_id={pad} is no token: vocab_size={self.vocab_size}")

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BertConfig:
        """Takes what matters out of a `config.json`; other names are ignored.

        Raises:
          ValueError: a name without a default is missing, or a value is not supported.
          DataError: the file is missing or damaged.
        """
        config, fields = read_json(Path(path)), dataclasses.fields(cls)
        given = {f.name: config[f.name] for f in fields if config.get(f.name) is not None}
        # The few that every BERT writes down; the others' defaults are BERT's own.
        needed = [f.name for f in fields if f.default is dataclasses.MISSING]
        try:
            for name, only in (("model_type", "bert"), ("position_embedding_type", "absolute")):
                if (config.get(name) or only) != only:
                    raise ValueError(f"{name} {config[name]!r} is not supported, only {only!r} is")
            if missing := [name for name in needed if name not in given]:
                raise ValueError(f"the configuration lacks {', '.join(missing)}")
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


class BertEmbeddings(nnx.Module):
    """The sum of word, position and token-type embeddings, normalized; see `BertClassifier`."""

    def __init__(self, config: BertConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.pad = config.pad_token_id
        init = nnx.initializers.normal(config.initializer_range)
        embed = partial(nnx.Embed, features=config.hidden_size, embedding_init=init, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = _norm(config, rngs)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps int32 `[batch, time]` to hidden `[batch, time, width]` and mask `[batch, time]`.

        The mask is false at the padding. A ValueError: there are fewer positions than tokens.
        """
        time, positions = tokens.shape[1], self.position.num_embeddings
        if time > positions:
            raise ValueError(
                f"an input of {time} tokens is longer than the {positions} positions of this "
                "model; truncate it (tokenize does, with its length)"
            )
        # Slices, not lookups: their gradients need no scatter.
        place = self.position.embedding[:time]  # [time, width]
        hidden = self.word(tokens) + place + self.token_type.embedding[0]  # [batch, time, width]
        return self.dropout(self.norm(hidden)), tokens != self.pad


class BertBlock(nnx.Module):
    """A post-norm block: attention, then an MLP, each added to its input and then normalized.

    Query, key and value are leaves of their own, as in the files; on a CPU that is also faster
    than a fused product, whose result has to be taken apart. See `BertClassifier`.
    """

    def __init__(self, config: BertConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        width, inner = config.hidden_size, config.intermediate_size
        linear = partial(_linear, config=config, rngs=rngs)
        self.heads = config.num_attention_heads
        self.activation = config.hidden_act
        self.query = linear(width, width)
        self.key = linear(width, width)
        self.value = linear(width, width)
        self.attention_out = linear(width, width)
        self.attention_norm = _norm(config, rngs)
        self.mlp_in = linear(width, inner)
        self.mlp_out = linear(inner, width)
        self.mlp_norm = _norm(config, rngs)
        self.weights_dropout = _dropout(dropout, rngs)
        self.attention_dropout = _dropout(dropout, rngs)
        self.mlp_dropout = _dropout(dropout, rngs)

    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        """Maps (hidden `[batch, time, width]`, mask `[batch, time]`) to the same shapes."""
        hidden, mask = inputs
        attended = self.attention_out(self._attend(hidden, mask))  # [batch, time, width]
        hidden = self.attention_norm(hidden + self.attention_dropout(attended))
        inner = _ACTIVATIONS[self.activation](self.mlp_in(hidden))  # [batch, time, inner]
        hidden = self.mlp_norm(hidden + self.mlp_dropout(self.mlp_out(inner)))
        return hidden, mask

    def _attend(self, hidden: jax.Array, mask: jax.Array) -> jax.Array:
        split = (*hidden.shape[:2], self.heads, -1)
        q, k, v = (f(hidden).reshape(split) for f in (self.query, self.key, self.value))
        scores = jnp.einsum("bqhf,bkhf->bhqk", q, k) * q.shape[-1] ** -0.5
        # Finite, so that a row that is all padding has no NaN.
        scores = jnp.where(mask[:, None, None, :], scores, jnp.finfo(scores.dtype).min)
        weights = self.weights_dropout(jax.nn.softmax(scores))  # [batch, heads, time, time]
        return jnp.einsum("bhqk,bkhf->bqhf", weights, v).reshape(hidden.shape)


class BertClassifierHead(nnx.Module):
    """The mean over the tokens, then a linear layer; see `BertClassifier`."""

    def __init__(
        self, config: BertConfig, *, classes: int = 2, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        if classes < 1:
            raise ValueError(f"classes is {classes}, at least 1 is needed")
        self.out = _linear(config.hidden_size, classes, config=config, rngs=rngs)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, inputs: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Maps (hidden `[batch, time, width]`, mask `[batch, time]`) to `[batch, classes]`."""
        hidden, mask = inputs
        weights = mask.astype(hidden.dtype)  # [batch, time]
        # At least 1: the mean over no token at all is 0, not NaN.
        count = jnp.maximum(weights.sum(axis=1, keepdims=True), 1)  # [batch, 1]
        mean = jnp.einsum("btw,bt->bw", hidden, weights) / count  # [batch, width]
        return self.out(self.dropout(mean))


class BertClassifier(nnx.Module):
    """A BERT encoder that classifies texts.

    `embed`, each of `blocks` and `head` take what the one before them returns, so they are also
    the stages of a chain. Padding has no influence on the logits.

    Args:
      config: of the BERT.
      classes: number of classes.
      dropout: rate, in every place where a BERT has it; without it there is no randomness at all.
        The model drops out until `eval()`, and again after `train()`.
      rngs: of the weights (`params`) and of the dropout (`dropout`).

    Raises:
      ValueError: `classes` or `dropout` is out of range.

    Example:
      >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
      ...                     num_attention_heads=2, intermediate_size=32)
      >>> model = BertClassifier(config, classes=3, rngs=nnx.Rngs(0))
      >>> tokens = jnp.array([[7, 8, 9, 0], [5, 0, 0, 0]])  # [batch, time], 0 is the padding
      >>> model(tokens).shape
      (2, 3)

    References:
      Devlin et al., [BERT](https://arxiv.org/abs/1810.04805), 2018.
    """

    def __init__(
        self, config: BertConfig, *, classes: int = 2, dropout: float = 0.0, rngs: nnx.Rngs
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, a rate from 0 to less than 1 is needed")
        self.embed = BertEmbeddings(config, dropout=dropout, rngs=rngs)
        self.blocks = nnx.List(
            BertBlock(config, dropout=dropout, rngs=rngs) for _ in range(config.num_hidden_layers)
        )
        self.head = BertClassifierHead(config, classes=classes, dropout=dropout, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Maps tokens, int32 `[batch, time]`, to logits `[batch, classes]`."""
        x: Any = tokens
        for _, stage in self.stages():
            x = stage(x)
        return x

    def stages(self) -> list[tuple[str, nnx.Module]]:
        """The parts by name, from the input on, for a budget of compute (`nnx_stages`)."""
        blocks = [(f"block_{i}", block) for i, block in enumerate(self.blocks)]
        return [("embed", self.embed), *blocks, ("head", self.head)]


def _linear(din: int, dout: int, *, config: BertConfig, rngs: nnx.Rngs) -> nnx.Linear:
    init = nnx.initializers.normal(config.initializer_range)
    return nnx.Linear(din, dout, kernel_init=init, rngs=rngs)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance is a difference of two large numbers: too coarse for an epsilon of 1e-12.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


def _dropout(rate: float, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """No module at a rate of 0, so that a model without dropout has no random state either."""
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else nnx.identity
