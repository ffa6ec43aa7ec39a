"""An encoder for Flax: BERT, RoBERTa and DistilBERT."""

from __future__ import annotations

import dataclasses
import math
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
# The kinds of encoders: what their `config.json` calls otherwise than BERT's, and what it is where
# it says nothing.
ENCODERS: dict[str, tuple[dict[str, str], dict[str, Any]]] = {
    "bert": ({}, {}),
    "roberta": ({}, {"pad_token_id": 1}),
    "xlm-roberta": ({}, {"pad_token_id": 1}),
    "distilbert": (
        {
            "hidden_size": "dim",
            "num_hidden_layers": "n_layers",
            "num_attention_heads": "n_heads",
            "intermediate_size": "hidden_dim",
            "hidden_act": "activation",
        },
        {"type_vocab_size": 0},
    ),
}


@dataclasses.dataclass(frozen=True)
class BertConfig:
    """The shape of an encoder: what its `config.json` says about the layers.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: features of a position, the "width".
      num_hidden_layers: number of blocks.
      num_attention_heads: attention heads; they divide `hidden_size`.
      intermediate_size: features between the two layers of a block's MLP.
      max_position_embeddings: number of positions.
      type_vocab_size: number of token types, of which only the first is used here, or 0.
      hidden_act: `"gelu"` (exact), `"gelu_new"` (by tanh) or `"relu"`.
      layer_norm_eps: added to the variance in each LayerNorm.
      pad_token_id: the token that fills up a short input.
      initializer_range: standard deviation of fresh weights.
      model_type: `"bert"`, `"distilbert"`, `"roberta"` or `"xlm-roberta"`. The last two count the
        tokens that are no padding, from `pad_token_id + 1` on.

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
    model_type: str = "bert"

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        _kind(self.model_type)
        for field in dataclasses.fields(self):
            name, value = field.name, getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            least = int(name not in ("pad_token_id", "type_vocab_size"))
            if field.type == "int" and not (whole and least <= value < 2**31):
                raise ValueError(f"{name} is {value!r}, a whole number from {least} on is needed")
            if field.type == "float" and not (
                (whole or isinstance(value, float)) and 0 <= value < math.inf
            ):
                raise ValueError(f"{name} is {value!r}, a number from 0 on is needed")
        act, heads, pad = self.hidden_act, self.num_attention_heads, self.pad_token_id
        if act not in list(_ACTIVATIONS):
            known = ", ".join(_ACTIVATIONS)
            raise ValueError(f"hidden_act {act!r} is not supported; those that are: {known}")
        if self.hidden_size % heads:
            raise ValueError(
                f"num_attention_heads={heads} does not divide hidden_size={self.hidden_size}"
            )
        if pad >= self.vocab_size:
            raise ValueError(f"pad_token_id={pad} is no token: vocab_size={self.vocab_size}")
        if self.max_length < 1:
            raise ValueError(
                f"max_position_embeddings={self.max_position_embeddings} leaves no position, as "
                f"the first one is {self.first_position}"
            )

    @property
    def first_position(self) -> int:
        """The position of the first token of a text."""
        return self.pad_token_id + 1 if "roberta" in self.model_type else 0

    @property
    def max_length(self) -> int:
        """The longest input, in tokens."""
        return self.max_position_embeddings - self.first_position

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BertConfig:
        """Takes what matters out of a `config.json`; other names are ignored.

        Raises:
          ValueError: a name without a default is missing, or a value is not supported.
          DataError: the file is missing or damaged.
        """
        config = read_json(Path(path))
        try:
            kind = config.get("model_type") or "bert"
            names, given = _kind(kind)
            given, lacking = {**given, "model_type": kind}, []
            for field in dataclasses.fields(cls):
                name = names.get(field.name, field.name)
                if config.get(name) is not None:
                    given[field.name] = config[name]
                elif field.default is dataclasses.MISSING:
                    lacking.append(name)  # Every encoder writes these down.
            if lacking:
                raise ValueError(f"the configuration lacks {', '.join(lacking)}")
            if (place := config.get("position_embedding_type") or "absolute") != "absolute":
                raise ValueError(
                    f"position_embedding_type {place!r} is not supported, only 'absolute' is"
                )
            return cls(**given)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error

    def contents(self) -> dict[str, Any]:
        """What a `config.json` holds of it, by the names of its kind."""
        names, _ = _kind(self.model_type)
        return {names.get(name, name): value for name, value in vars(self).items()}


def _kind(model_type: Any) -> tuple[dict[str, str], dict[str, Any]]:
    if model_type not in list(ENCODERS):  # which compares what cannot be hashed, too
        raise ValueError(
            f"model_type {model_type!r} is no encoder that is known, which are "
            f"{', '.join(ENCODERS)}; load_decoder loads those of the Llama family"
        )
    return ENCODERS[model_type]


class BertEmbeddings(nnx.Module):
    """The sum of word, position and any token-type embedding, normalized; see `BertClassifier`."""

    def __init__(self, config: BertConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.pad, self.max_length = config.pad_token_id, config.max_length
        self.counted = config.first_position > 0
        init = _initializer(config)
        embed = partial(nnx.Embed, features=config.hidden_size, embedding_init=init, rngs=rngs)
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        types = config.type_vocab_size
        self.token_type = embed(types) if types else None
        self.norm = _norm(config, rngs)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps int32 `[batch, time]` to hidden `[batch, time, width]` and mask `[batch, time]`.

        The mask is false at the padding. A ValueError: there are fewer positions than tokens.
        """
        time, mask = tokens.shape[1], tokens != self.pad  # [batch, time]
        if time > self.max_length:
            raise ValueError(
                f"an input of {time} tokens is longer than the {self.max_length} positions of this "
                "model; truncate it (tokenize does, with its length)"
            )
        if self.counted:  # RoBERTa's padding is at the position `pad`.
            count = jnp.cumsum(mask, axis=1, dtype=tokens.dtype)
            place = self.position(self.pad + jnp.where(mask, count, 0))  # [batch, time, width]
        else:
            # A slice, not a lookup: its gradient needs no scatter.
            place = self.position.embedding[:time]  # [time, width]
        hidden = self.word(tokens) + place  # [batch, time, width]
        if self.token_type is not None:
            hidden = hidden + self.token_type.embedding[0]
        return self.dropout(self.norm(hidden)), mask


class BertBlock(nnx.Module):
    """A post-norm block: attention, then an MLP, each added to its input and then normalized.

    Query, key and value are leaves of their own, as in the files; on a CPU that is also faster
    than a fused product, whose result has to be taken apart. See `BertClassifier`.
    """

    layout: Any = None  # of hidden, where weights are split over the devices that batches are

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
        if self.layout is not None:
            hidden = jax.lax.with_sharding_constraint(hidden, self.layout)
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
    """An encoder that classifies texts: a BERT, RoBERTa or DistilBERT.

    `embed`, each of `blocks` and `head` take what the one before them returns, so they are also
    the stages of a chain. Padding has no influence on the logits.

    Args:
      config: of the encoder.
      classes: number of classes.
      dropout: rate, in every place where a BERT has it; without it there is no randomness at all.
        The model drops out until `eval()`, and again after `train()`.
      empty: whether the encoder's weights are zeros, for those of a file; not the head's.
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
      Devlin et al., [BERT](https://arxiv.org/abs/1810.04805), 2018; Liu et al.,
      [RoBERTa](https://arxiv.org/abs/1907.11692), 2019; Sanh et al.,
      [DistilBERT](https://arxiv.org/abs/1910.01108), 2019.
    """

    def __init__(
        self,
        config: BertConfig,
        *,
        classes: int = 2,
        dropout: float = 0.0,
        empty: bool = False,
        rngs: nnx.Rngs,
    ):
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout is {dropout}, a rate from 0 to less than 1 is needed")
        self.config = config
        encoder = dataclasses.replace(config, initializer_range=0.0) if empty else config
        self.embed = BertEmbeddings(encoder, dropout=dropout, rngs=rngs)
        self.blocks = nnx.List(
            BertBlock(encoder, dropout=dropout, rngs=rngs) for _ in range(config.num_hidden_layers)
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


def _initializer(config: BertConfig) -> nnx.Initializer:
    """Of fresh embeddings and kernels; a range of 0 takes no random numbers."""
    scale = config.initializer_range
    return nnx.initializers.normal(scale) if scale else nnx.initializers.zeros


def _linear(din: int, dout: int, *, config: BertConfig, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(din, dout, kernel_init=_initializer(config), rngs=rngs)


def _norm(config: BertConfig, rngs: nnx.Rngs) -> nnx.LayerNorm:
    # The fast variance is a difference of two large numbers: too coarse for an epsilon of 1e-12.
    return nnx.LayerNorm(
        config.hidden_size, epsilon=config.layer_norm_eps, use_fast_variance=False, rngs=rngs
    )


def _dropout(rate: float, rngs: nnx.Rngs) -> Callable[[jax.Array], jax.Array]:
    """No module at a rate of 0, so that a model without dropout has no random state either."""
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else nnx.identity
