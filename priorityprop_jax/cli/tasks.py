"""What the commands train on: digits, characters, and sentences for a pretrained encoder."""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from priorityprop_jax.models.decoder import Decoder, DecoderConfig
from priorityprop_jax.models.files import DataFile, package, read_file
from priorityprop_jax.models.packages import find_model
from priorityprop_jax.models.texts import Texts, numbers_of, read_texts
from priorityprop_jax.models.tokenizer import check_tokens, cut_rows, load_tokenizer
from priorityprop_jax.models.weights import load_bert
from priorityprop_jax.training.loader import ArrayLoader

_HOME = "https://raw.githubusercontent.com/clairett/pytorch-sentiment-classification/master/data"
_SST2 = tuple(
    DataFile(
        names=(f"sst2.{part}.tsv", f"sst2.{part}.tsv.gz", f"{part}.tsv"),
        urls=(f"{_HOME}/SST2/{part}.tsv",),
        sha256=sha256,
    )
    for part, sha256 in (
        ("train", "ec192f833a64da08f475488a77b0d0b47db47acd0f458bd18433fc793b569920"),
        ("dev", "eddea6b39e601dd4e7a672b53cc40fdf6019fa80522f351206c24340ca5d9359"),
        ("test", "831169c7e2e429d6026e1bdbb542f33b636e3e596caad9602ebc953c205928b7"),
    )
)


def cross_entropy(model: Any, batch: Any) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Mean cross-entropy in nats and `accuracy` of a model from `x` to logits `[..., classes]`.

    `y` are class numbers `[...]`; with a `mask` of that shape the means are of where it is 1.
    """
    logits = model(batch["x"])  # [..., classes]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["y"])  # [...]
    right = jnp.argmax(logits, axis=-1) == batch["y"]  # [...]
    mask = batch.get("mask")
    return jnp.average(losses, weights=mask), {
        "accuracy": jnp.average(right.astype(jnp.float32), weights=mask)
    }


def squared_error(model: Any, batch: Any) -> jax.Array:
    """Mean squared error of a model from `x` to `[batch, 1]` and numbers `y`, `[batch]`."""
    return jnp.mean((model(batch["x"])[:, 0] - batch["y"]) ** 2)


@dataclasses.dataclass(frozen=True)
class Task:
    """A model with the data, the loss and the defaults to train it."""

    name: str
    model: nnx.Module  # untrained; its weights are a function of the seed
    parts: tuple[dict[str, np.ndarray], ...]  # training, validation, test: [rows, ...] by name
    seed: int  # of the order of the training rows
    batch_size: int  # rows
    learning_rate: float  # a good one for Adam
    epochs: int  # enough of them to see the task learned
    max_batches: int | None = None  # of training rows in an epoch; None for all of them
    loss_fn: Callable[[Any, Any], Any] = cross_entropy
    labels: Sequence[str] = ()  # of the numbers in `y`, where they have names
    spread: tuple[float, float] = (0.0, 1.0)  # `y` is numbers less the first, by the second
    cut: int = 0  # texts whose end is left out

    def adjusted(self, config: Any) -> Task:
        """With the learning rate, batch size and epochs that are not None."""
        given = {name: getattr(config, name) for name in ("learning_rate", "batch_size", "epochs")}
        return dataclasses.replace(self, **{k: v for k, v in given.items() if v is not None})

    @functools.cached_property
    def train_data(self) -> ArrayLoader:
        """Full batches only, shuffled anew each epoch."""
        return ArrayLoader(
            self.parts[0], self.batch_size, shuffle=True, seed=self.seed, drop_last=True,
            max_batches=self.max_batches,
        )  # fmt: skip

    @functools.cached_property
    def eval_data(self) -> ArrayLoader:
        """Every validation row once, in order; the last batch may be smaller."""
        return ArrayLoader(self.parts[1], self.batch_size)

    @functools.cached_property
    def test_data(self) -> ArrayLoader | None:
        """The same for the test rows, if there are any."""
        return ArrayLoader(self.parts[2], self.batch_size) if len(self.parts) > 2 else None

    @property
    def data(self) -> tuple[Any, ...]:
        """Batches to train on, to try on, and to test on or None."""
        return self.train_data, self.eval_data, self.test_data


class MLP(nnx.Module):
    """Linear layers with ReLU between them, `widths` from the input to the output."""

    def __init__(self, widths: tuple[int, ...], *, rngs: nnx.Rngs):
        if min(widths) < 1:
            raise ValueError(f"widths are {widths}: every one is at least 1")
        self.layers = nnx.List(
            nnx.Linear(din, dout, rngs=rngs)
            for din, dout in zip(widths[:-1], widths[1:], strict=True)
        )

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[batch, features]` to logits `[batch, classes]`."""
        for layer in self.layers[:-1]:
            x = nnx.relu(layer(x))
        return self.layers[-1](x)


def digits(*, seed: int = 0, hidden: tuple[int, ...] = (128, 128)) -> Task:
    """scikit-learn's 1,797 digits of 8 x 8 pixels, and an MLP with hidden layers of some widths."""
    datasets = package("sklearn.datasets", "the digits come with scikit-learn", "demo")
    x, y = datasets.load_digits(return_X_y=True)
    # The rows are in the order of their writers, and RandomState's stream is frozen for ever.
    order = np.random.RandomState(0).permutation(len(y))
    x, y = (x[order] / 16).astype(np.float32), y[order].astype(np.int32)  # [1797, 64] in [0, 1]
    model = MLP((64, *hidden, 10), rngs=nnx.Rngs(seed))
    return Task("digits", model, split(x, y, 250, 250), seed, 32, 1e-3, 20)


def characters(*, seed: int = 0) -> Task:
    """The short messages that come along, by characters, for a small decoder."""
    texts = [row["text"] for row in read_texts(Path(__file__).with_name("messages.csv")).rows]
    order = np.random.RandomState(0).permutation(len(texts))
    alphabet, context = sorted({*"\n".join(texts)}), 32
    config = DecoderConfig(len(alphabet), 64, 128, 3, 4, 4, 16, context, initializer_range=0.1)

    def windows(part: np.ndarray, stride: int) -> dict[str, np.ndarray]:
        tokens = [alphabet.index(character) for i in part for character in texts[i] + "\n"]
        shifted = np.lib.stride_tricks.sliding_window_view(np.array(tokens, np.int32), context + 1)
        return {"x": shifted[::stride, :-1], "y": shifted[::stride, 1:]}  # [windows, context]

    cut = len(order) * 85 // 100
    parts = windows(order[:cut], 1), windows(order[cut:], 2 * context)
    model = Decoder(config, rngs=nnx.Rngs(seed))
    return Task("characters", model, parts, seed, 8, 8e-3, 10, max_batches=15)


def split(x: np.ndarray, y: np.ndarray, validation: int, test: int) -> tuple[Any, ...]:
    """Training rows in front, then so many for validation, and so many for the test at the end."""
    cuts = [len(y) - validation - test, len(y) - test]
    pairs = zip(np.split(x, cuts), np.split(y, cuts), strict=True)
    return tuple({"x": x, "y": y} for x, y in pairs)


def sst2_texts(data_dir: str | os.PathLike[str] | None = None) -> tuple[Texts, ...]:
    """Kind and unkind sentences of film critics, labelled 1 and 0: to train, to try and to test.

    `data_dir` is as for `read_file`.
    """
    parts = []
    for file in _SST2:
        lines = read_file(file, data_dir=data_dir).decode().removesuffix("\n").split("\n")
        pairs = (line.rsplit("\t", 1) for line in lines)
        parts.append(Texts("label", [{"text": text, "label": label} for text, label in pairs], []))
    return tuple(parts)


def encoded(
    name: str, parts: Sequence[Texts], folder: Path, *, length: int, seed: int, labels: list[str]
) -> Task:
    """Texts for a pretrained encoder with a fresh head; without labels it learns their numbers.

    Batches are `x`, tokens `[batch, length]`; `y`, the number of the label, or the number to learn
    less the mean of those to train on, by their deviation; and `id`, the number of each row through
    all parts, so that what a frozen layer makes of it can be kept. What is wrong with the files
    raises as `load_bert` does.
    """
    tokenizer, rows, start, cut = load_tokenizer(folder), [], 0, 0
    mean, deviation = 0.0, 1.0
    if not labels:
        numbers = numbers_of(parts[0])
        mean, deviation = float(numbers.mean()), float(numbers.std()) or 1.0
    for part in parts:
        x, more = cut_rows(tokenizer, [row["text"] for row in part.rows], length)  # [rows, length]
        if labels:
            y = np.array([labels.index(row["label"]) for row in part.rows], np.int32)
        else:
            y = ((numbers_of(part) - mean) / deviation).astype(np.float32)
        ids = np.arange(start, start + len(y), dtype=np.int32)  # [rows]
        rows.append({"x": x, "y": y, "id": ids})
        start, cut = start + len(y), cut + more
    model = load_bert(folder, classes=len(labels) or 1, seed=seed)
    check_tokens([row for part in rows for row in part["x"]], model.config.vocab_size)
    loss_fn = cross_entropy if labels else squared_error
    about = {"loss_fn": loss_fn, "labels": labels, "spread": (mean, deviation), "cut": cut}
    return Task(name, model, tuple(rows), seed, 32, 1e-4, 2, **about)


def sst2(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    model_dir: str | os.PathLike[str] | None = None,
) -> Task:
    """`sst2_texts` for an encoder, by default MiniLM; of 100 sentences, 2 have over 48 tokens."""
    folder = find_model("minilm") if model_dir is None else Path(model_dir)
    parts = sst2_texts(data_dir)
    return encoded("sst2", parts, folder, length=48, seed=seed, labels=["0", "1"])
