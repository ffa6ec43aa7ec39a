"""A decoder of the Llama family for Flax: Llama, Mistral, Qwen 2 and 3, SmolLM2."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from priorityprop_jax.core.modules import FrozenWeight, trainable
from priorityprop_jax.exact.products import dot_general
from priorityprop_jax.partial.stack import Stack

KINDS = ("llama", "mistral", "qwen2", "qwen3")
_CLASSIFIER = "ForSequenceClassification"
_product = partial(checkpoint_name, name="product")  # that of a layer, with LoRA's added to it
_KEPT = jax.checkpoint_policies.save_only_these_names("product")
_REMAT = {"none": None, "products": _KEPT, "all": None}


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """The shape of a decoder: what its `config.json` says about the layers.

    Attributes:
      vocab_size: number of tokens.
      hidden_size: features of a position, the "width".
      intermediate_size: features between the layers of a block's MLP.
      num_hidden_layers: number of blocks.
      num_attention_heads: heads of the queries.
      num_key_value_heads: heads of keys and values; they divide those of the queries.
      head_dim: features of a head, even.
      max_position_embeddings: the longest input, in tokens.
      model_type: `"llama"`, `"mistral"`, `"qwen2"` or `"qwen3"`.
      rms_norm_eps: added to the mean square in each norm.
      rope_theta: base of the rotary positions.
      rope_scaling: factor, low and high frequency factor and original length of Llama 3's longer
        contexts; or a factor alone, by which positions are divided.
      tie_word_embeddings: whether the output layer is the embedding, where there is no head.
      qkv_bias: whether queries, keys and values have a bias.
      out_bias: whether the attention's output has one.
      sliding_window: how many tokens a token attends to, itself included; None for all before it.
      initializer_range: standard deviation of fresh weights.
      classes: how many a head tells of a text by its last token; None for an output layer of
        tokens.

    Raises:
      ValueError: a value is one that the decoder cannot work with.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    model_type: str = "llama"
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: tuple[float, ...] | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    out_bias: bool = False
    sliding_window: int | None = None
    initializer_range: float = 0.02
    classes: int | None = None

    def __post_init__(self) -> None:
        """Checks the values against each other."""
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            whole = isinstance(value, int) and not isinstance(value, bool)
            if field.type == "int" and (not whole or not 1 <= value < 2**31):
                raise ValueError(f"{field.name} is {value!r}, a whole number from 1 on is needed")
            number = whole or isinstance(value, float)
            if field.type == "float" and not (number and 0 < value < math.inf):
                raise ValueError(f"{field.name} is {value!r}, a number above 0 is needed")
            if field.type == "bool" and not isinstance(value, bool):
                raise ValueError(f"{field.name} is {value!r}, true or false is needed")
        if self.model_type not in KINDS:
            raise ValueError(
                f"model_type {self.model_type!r} is no decoder that is known; those that are: "
                + ", ".join(KINDS)
            )
        heads, shared = self.num_attention_heads, self.num_key_value_heads
        if heads % shared:
            raise ValueError(f"num_key_value_heads={shared} do not divide {heads} heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, an even number is needed")
        for name in ("sliding_window", "classes"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} is {value!r}, a whole number from 1 on is needed")

    @property
    def tied(self) -> bool:
        """Whether the output layer is the embedding."""
        return self.tie_word_embeddings and self.classes is None

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> DecoderConfig:
        """Takes what matters out of the contents of a `config.json`; other names are ignored.

        Raises:
          ValueError: a name without a default is missing, or a value is not supported.
        """
        given = {
            f.name: config[f.name]
            for f in dataclasses.fields(cls)
            if config.get(f.name) is not None
            and f.name not in ("rope_scaling", "sliding_window", "classes")
        }
        kind, heads = given.get("model_type", "llama"), given.get("num_attention_heads")
        # Only Qwen's have biases though they do not say so.
        given["qkv_bias"] = kind == "qwen2" or bool(config.get("attention_bias"))
        given["out_bias"] = kind == "llama" and bool(config.get("attention_bias"))
        given.setdefault("num_key_value_heads", heads)
        if isinstance(heads, int) and heads > 0 and isinstance(given.get("hidden_size"), int):
            given.setdefault("head_dim", given["hidden_size"] // heads)
        if config.get("use_sliding_window", kind == "mistral"):
            given["sliding_window"] = config.get("sliding_window")
        if str(config.get("architectures")).rstrip("']").endswith(_CLASSIFIER):
            labels = config.get("id2label")
            given["classes"] = len(labels) if isinstance(labels, Mapping) else 2
        act = config.get("hidden_act", "silu")
        if act != "silu":
            raise ValueError(f"hidden_act {act!r} is not supported, only 'silu' is")
        if config.get("mlp_bias"):
            raise ValueError("mlp_bias is not supported")
        rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
        if not isinstance(rope, Mapping):
            raise ValueError(f"rope_scaling is {rope!r}, an object is needed")
        if isinstance(theta := rope.get("rope_theta"), int | float):
            given["rope_theta"] = theta
        given["rope_scaling"] = _scaling(rope)
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        if missing := [name for name in needed if given.get(name) is None]:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        return cls(**given)

    def as_dict(self) -> dict[str, Any]:
        """What `from_dict` takes, and `transformers` understands."""
        config = dataclasses.asdict(self)
        out = config.pop("out_bias")
        config["attention_bias"] = (config.pop("qkv_bias") and self.model_type != "qwen2") or out
        config["use_sliding_window"] = self.sliding_window is not None
        config["hidden_act"] = "silu"
        kind = self.model_type
        what = "ForCausalLM" if (classes := config.pop("classes")) is None else _CLASSIFIER
        config["architectures"] = [kind.title() + what]
        if classes is not None:
            config["id2label"] = {str(i): f"LABEL_{i}" for i in range(classes)}
        if (scaling := self.rope_scaling) is not None:
            names = ["factor", "low_freq_factor", "high_freq_factor"]
            found = dict(zip(names, scaling, strict=False))
            if len(scaling) == 1:
                config["rope_scaling"] = {"rope_type": "linear", **found}
            else:
                found["original_max_position_embeddings"] = int(scaling[3])
                config["rope_scaling"] = {"rope_type": "llama3", **found}
        return config


def _scaling(rope: Mapping[str, Any]) -> tuple[float, ...] | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    names = {
        "default": (),
        "linear": ("factor",),
        "llama3": (
            "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"
        ),
    }.get(kind)  # fmt: skip
    if names is None:
        raise ValueError(f"rope_scaling of type {kind!r} is not supported: default, linear, llama3")
    values = [rope.get(name) for name in names]
    if not all(isinstance(value, int | float) and value > 0 for value in values):
        raise ValueError(f"rope_scaling of type {kind!r} needs {', '.join(names)}, got {rope!r}")
    return tuple(float(value) for value in values) or None  # pyright: ignore[reportArgumentType]


class DecoderOutput(NamedTuple):
    """What makes logits; for a loss `exact.cross_entropy` takes the two, ``transposed=True``."""

    hidden: jax.Array  # [batch, time, width]
    weight: jax.Array  # [vocabulary, width], of the output layer

    def logits(self) -> jax.Array:
        """All of them, `[batch, time, vocabulary]`."""
        return self.hidden @ self.weight.T


class DecoderBlock(nnx.Module):
    """A pre-norm block: attention with rotary positions, then a gated MLP; see `Decoder`."""

    layout: Any = None  # of hidden, where weights are split over the devices that batches are

    def __init__(
        self, config: DecoderConfig, *, dtype: Any = None, remat: str = "none", rngs: nnx.Rngs
    ):
        c = config
        init = nnx.initializers.normal(c.initializer_range)
        linear = partial(
            nnx.Linear, use_bias=False, dtype=dtype, kernel_init=init, dot_general=dot_general,
            rngs=rngs,
        )  # fmt: skip
        norm = partial(nnx.RMSNorm, epsilon=c.rms_norm_eps, dtype=dtype, rngs=rngs)
        own, shared = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.head_dim, self.remat = c.head_dim, remat
        self.attention_norm = norm(c.hidden_size)
        self.query = linear(c.hidden_size, own, use_bias=c.qkv_bias)
        self.key = linear(c.hidden_size, shared, use_bias=c.qkv_bias)
        self.value = linear(c.hidden_size, shared, use_bias=c.qkv_bias)
        self.attention_out = linear(own, c.hidden_size, use_bias=c.out_bias)
        if c.model_type == "qwen3":
            self.query_norm, self.key_norm = norm(c.head_dim), norm(c.head_dim)
        self.mlp_norm = norm(c.hidden_size)
        self.gate = linear(c.hidden_size, c.intermediate_size)
        self.up = linear(c.hidden_size, c.intermediate_size)
        self.down = linear(c.intermediate_size, c.hidden_size)

    def __call__(self, hidden: jax.Array, angles: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps hidden `[batch, time, width]` to the same; angles and mask are of `places`."""

        def run(block, hidden, angles, mask):
            return block.attend(hidden, angles, mask)[0]

        if self.layout is not None:  # or the compiler may bring all rows to a part of the weights
            hidden = jax.lax.with_sharding_constraint(hidden, self.layout)
        if self.remat != "none":
            # It is the body of a loop, which needs no barrier between the passes.
            run = nnx.remat(run, policy=_REMAT[self.remat], prevent_cse=False)
        return run(self, hidden, angles, mask)

    def attend(
        self, hidden: jax.Array, angles: jax.Array, mask: jax.Array, cache: Any = None, at: Any = 0
    ) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
        """The block, and its keys and values, which are put into a cache of them at a place."""
        h = self.attention_norm(hidden)
        split = (*h.shape[:2], -1, self.head_dim)
        q, k, v = (_product(part(h)).reshape(split) for part in (self.query, self.key, self.value))
        if hasattr(self, "query_norm"):
            q, k = self.query_norm(q), self.key_norm(k)
        q, k = _rotated(q, angles), _rotated(k, angles)
        if cache is not None:
            put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=at, axis=1)
            k, v = (put(old, new) for old, new in zip(cache, (k, v), strict=True))
        y = jax.nn.dot_product_attention(q, k, v, mask=mask)  # [batch, time, heads, head_dim]
        hidden = hidden + _product(self.attention_out(_product(y.reshape(*h.shape[:2], -1))))
        h = self.mlp_norm(hidden)
        gate, up = _product(self.gate(h)), _product(self.up(h))
        return hidden + self.down(nnx.silu(gate) * up), (k, v)


class DecoderHead(nnx.Module):
    """The last norm, and the output layer or head where that is no embedding; see `Decoder`."""

    def __init__(self, config: DecoderConfig, *, dtype: Any = None, rngs: nnx.Rngs):
        c = config
        self.norm = nnx.RMSNorm(c.hidden_size, epsilon=c.rms_norm_eps, dtype=dtype, rngs=rngs)
        if not c.tied:
            init = nnx.initializers.normal(c.initializer_range)
            shape = c.classes or c.vocab_size, c.hidden_size
            self.weight = nnx.Param(init(rngs.params(), shape))


class DecoderTop(nnx.Module):
    """The last blocks and the head of a decoder; what is below them is not even in memory.

    It is trained on what `Decoder.below` makes of the tokens. A tied output layer is frozen, as
    the embedding that it is.
    """

    def __init__(self, config: DecoderConfig, blocks: Stack, head: DecoderHead, weight: Any):
        self.config, self.blocks, self.head = config, blocks, head
        if weight is not None:
            self.weight = weight  # a variable that is not trained

    def outputs(self, hidden: jax.Array, segments: jax.Array | None = None) -> DecoderOutput:
        """Maps hidden `[batch, time, width]` of a lower block to what makes logits."""
        angles, mask = places(self.config, hidden, segments)
        hidden = self.head.norm(self.blocks(hidden, angles, mask))
        weight = self.weight if self.config.tied else self.head.weight
        return DecoderOutput(hidden, weight[...].astype(hidden.dtype))


class Decoder(nnx.Module):
    """A language model of the Llama family.

    Blocks are a `partial.Stack`, `[blocks, ...]` each of their variables, so that they compile once
    and one program trains whichever of them. Inputs are tokens, int32 `[batch, time]`, filled up at
    the end with any token. Where several texts share a row there are segments beside them, int32 of
    the same shape: 0 is padding, and a token attends to those of its own number alone. With
    `classes` in the configuration there are logits of these instead of tokens, and those behind the
    last token of a text count.

    Args:
      config: of the decoder.
      dtype: of the computation, such as `jnp.bfloat16`; weights are float32.
      remat: what the backward pass makes again of a block: ``"none"`` of it, all but the
        ``"products"`` of its layers and of its attention, or ``"all"`` from the block's input.
      rngs: of the weights.

    Raises:
      ValueError: `remat` is none of the three, or an input is longer than the context.

    Example:
      >>> config = DecoderConfig.from_dict(dict(vocab_size=50, hidden_size=16,
      ...     intermediate_size=32, num_hidden_layers=3, num_attention_heads=4,
      ...     num_key_value_heads=2, max_position_embeddings=64))
      >>> model = Decoder(config, rngs=nnx.Rngs(0))
      >>> model(jnp.array([[7, 8, 9, 0], [5, 4, 3, 2]])).shape  # [batch, time, vocabulary]
      (2, 4, 50)

    References:
      Touvron et al., [LLaMA](https://arxiv.org/abs/2302.13971), 2023; Su et al.,
      [RoFormer](https://arxiv.org/abs/2104.09864), 2021.
    """

    def __init__(
        self, config: DecoderConfig, *, dtype: Any = None, remat: str = "none", rngs: nnx.Rngs
    ):
        if remat not in _REMAT:
            raise ValueError(f"remat is {remat!r}, one of {', '.join(_REMAT)} is needed")
        self.config = config
        init = nnx.initializers.normal(config.initializer_range)
        self.embed = nnx.Embed(
            config.vocab_size, config.hidden_size, dtype=dtype, embedding_init=init, rngs=rngs
        )
        one = partial(DecoderBlock, config, dtype=dtype, remat=remat)
        keys = jax.random.split(rngs.params(), config.num_hidden_layers)
        self.blocks = Stack(nnx.vmap(lambda key: one(rngs=nnx.Rngs(key)))(keys))
        self.head = DecoderHead(config, dtype=dtype, rngs=rngs)

    def __call__(self, tokens: jax.Array, segments: jax.Array | None = None) -> jax.Array:
        """Maps tokens, and segments if there are any, to logits `[batch, time, vocabulary]`."""
        return self.outputs(tokens, segments).logits()

    def outputs(self, tokens: jax.Array, segments: jax.Array | None = None) -> DecoderOutput:
        """What makes the logits; the loss at some positions needs no others' logits."""
        angles, mask = places(self.config, tokens, segments)
        hidden = self.head.norm(self.blocks(self.embed(tokens), angles, mask))
        return DecoderOutput(hidden, self._weight().astype(hidden.dtype))

    def below(self, tokens: jax.Array, blocks: int, segments: jax.Array | None = None) -> jax.Array:
        """What the first `blocks` blocks make of the tokens: hidden `[batch, time, width]`."""
        angles, mask = places(self.config, tokens, segments)
        hidden = self.embed(tokens)
        return self._part(0, blocks)(hidden, angles, mask) if blocks else hidden

    def top(self, blocks: int) -> DecoderTop:
        """The last `blocks` blocks and the head, of arrays of their own; see `put_top`."""
        count = self.config.num_hidden_layers
        if not 0 < blocks <= count:
            raise ValueError(f"blocks is {blocks}, from 1 to the decoder's {count} are needed")
        head = nnx.clone(self.head)
        tied = FrozenWeight(jnp.copy(self._weight())) if self.config.tied else None
        return DecoderTop(self.config, self._part(count - blocks, count), head, tied)

    def put_top(self, top: DecoderTop) -> None:
        """Puts the weights of `top` in the place of those it was made from."""
        whole, part = nnx.state(self.blocks), nnx.state(top.blocks)
        put = lambda old, new: jnp.concatenate([old[: len(old) - len(new)], new])  # noqa: E731
        nnx.update(self.blocks, jax.tree.map(put, whole, part))
        nnx.update(self.head, nnx.state(top.head))

    def _part(self, start: int, stop: int) -> Stack:
        graph, state = nnx.split(self.blocks)
        return nnx.merge(graph, jax.tree.map(lambda leaf: leaf[start:stop], state))

    def _weight(self) -> jax.Array:
        return (self.embed.embedding if self.config.tied else self.head.weight)[...]

    def empty_cache(self, batch: int, length: int) -> tuple[jax.Array, jax.Array]:
        """Keys and values of no token: two arrays `[blocks, batch, length, heads, head_dim]`."""
        c = self.config
        shape = (c.num_hidden_layers, batch, length, c.num_key_value_heads, c.head_dim)
        return jnp.zeros(shape, dtype := self.embed.dtype or jnp.float32), jnp.zeros(shape, dtype)

    def step(self, tokens: jax.Array, cache: Any, at: Any) -> tuple[DecoderOutput, Any]:
        """Outputs of tokens `[batch, time]` behind `at` others, and the cache with them."""
        time, length = tokens.shape[1], cache[0].shape[2]
        positions = at + jnp.arange(time)
        mask = _near(self.config, positions[:, None], jnp.arange(length))[None, None]
        angles = _angles(self.config, positions[None])
        graph, params, rest = nnx.split(self.blocks.block, trainable, ...)

        def one(hidden, of_block):
            params, rest, cache = of_block
            block: Any = nnx.merge(graph, params, rest)
            return block.attend(hidden, angles, mask, cache, at)

        hidden, cache = jax.lax.scan(one, self.embed(tokens), (params, rest, cache))
        hidden = self.head.norm(hidden)
        return DecoderOutput(hidden, self._weight().astype(hidden.dtype)), cache


def places(
    config: DecoderConfig, x: jax.Array, segments: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Where tokens of `x`, `[batch, time, ...]`, are, and whom each attends to.

    Returns:
      The angles of the rotary positions, float32 `[batch or 1, time, head_dim / 2]`, and the mask,
      bool `[batch or 1, 1, time, time]`.

    Raises:
      ValueError: there are more tokens than the context holds, or segments of another shape.
    """
    batch, time = x.shape[:2]
    if time > config.max_position_embeddings:
        raise ValueError(
            f"an input of {time} tokens is longer than the context of "
            f"{config.max_position_embeddings}; cut it"
        )
    index = jnp.arange(time)
    mask = _near(config, index[:, None], index)[None, None]
    if segments is None:
        return _angles(config, index[None]), mask
    if segments.shape != (batch, time):
        raise ValueError(f"segments are of shape {segments.shape}, tokens of {(batch, time)}")
    fresh = jnp.diff(segments, axis=1, prepend=segments[:, :1]) != 0  # the first of a segment
    start = jax.lax.cummax(jnp.where(fresh, index, 0), axis=1)
    same = segments[:, None, :, None] == segments[:, None, None, :]
    return _angles(config, index - start), mask & same


def _near(config: DecoderConfig, query: jax.Array, key: jax.Array) -> jax.Array:
    """Whether positions of keys may be attended to."""
    mask = key <= query
    window = config.sliding_window
    return mask if window is None else mask & (query - key < window)


def _angles(config: DecoderConfig, positions: jax.Array) -> jax.Array:
    """Positions `[batch, time]` times the frequency of every pair of features."""
    half = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = 1.0 / config.rope_theta**half
    if (scaling := config.rope_scaling) is not None:
        factor, low, high, length = (*scaling, 0.0, 0.0, 0.0)[:4]
        if len(scaling) == 1:
            frequency = frequency / factor
        else:
            # Slow ones are stretched, fast ones are left, those between are mixed.
            turns = length * frequency / (2 * math.pi)
            mix = np.clip((turns - low) / (high - low), 0, 1)
            frequency = (1 - mix) * frequency / factor + mix * frequency
    return positions[..., None].astype(jnp.float32) * frequency.astype(np.float32)


def _rotated(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Turns the pairs of features `[i]` and `[i + head_dim / 2]` of each head by their angles."""
    cos, sin = (f(angles)[:, :, None] for f in (jnp.cos, jnp.sin))
    one, other = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([one * cos - other * sin, other * cos + one * sin], -1).astype(x.dtype)
