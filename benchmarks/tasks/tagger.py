"""Parts of speech of English, for a bidirectional LSTM."""

from __future__ import annotations

import collections
import functools
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from priorityprop_jax.cli.tasks import Task
from priorityprop_jax.models.files import ENV_VAR, DataError, DataFile, cache_folder, read_file

# Forms and tags alone, drawn from the CoNLL-U files of the first home, which are read as well.
_EWT_HOME = "https://raw.githubusercontent.com/UniversalDependencies/UD_English-EWT/r2.16/"
_EWT = tuple(
    DataFile(
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


class _Data(NamedTuple):
    parts: tuple[dict[str, np.ndarray], ...]  # train, validation and test
    values: tuple[int, ...]  # of each feature of a token, how many there are
    tags: int


def load(
    *,
    data_dir: str | os.PathLike[str] | None = None,
    seed: int = 0,
    sizes: Mapping[str, Any] | None = None,
) -> Task:
    """Rows of 64 tokens: a longer sentence goes on in the next row, a shorter one is padded.

    Batches are `x`, the features `[batch, 64, 3]` that `Tagger` takes; `y`, the tags `[batch, 64]`,
    where 0 is one that the training data lack; and `mask`, 1 at the tokens and 0 at the padding.

    Args:
      data_dir: folder of `ud_ewt_pos.{train,dev,test}.tsv`, lines of form, UPOS and XPOS with an
        empty line between sentences, which are verified; or `en_ewt-ud-{train,dev,test}.conllu` of
        any release, which are not. They are not downloaded.
      seed: of the weights and of the order of the training rows.
      sizes: of the model, as `Tagger` takes them.
    """
    data = _read(_folders(data_dir))
    model = Tagger(data.values, data.tags, rngs=nnx.Rngs(seed), **(sizes or {}))
    return Task("pos-tag", model, data.parts, seed, 32, 2e-3, 5)


def _folders(data_dir: str | os.PathLike[str] | None) -> list[Path]:
    if data_dir is not None:
        return [Path(data_dir).expanduser()]
    env = os.environ.get(ENV_VAR)
    return [*([Path(env).expanduser()] if env else []), cache_folder()]


def _read(folders: list[Path]) -> _Data:
    length = 64  # Of 1,000 sentences, 5 are longer.
    parts = [_read_ewt(file, folders) for file in _EWT]
    forms, tags = zip(*(token for sentence in parts[0] for token in sentence), strict=True)
    words = _numbers((form.lower() for form in forms), first=2, least=2)
    suffixes = _numbers((form[-3:].lower() for form in forms), first=1, least=2)
    classes = _numbers(tags, first=1, least=1)

    @functools.cache
    def features(form: str) -> tuple[int, int, int]:
        # 0 is the padding, 1 a word that the training data do not have twice.
        return words.get(form.lower(), 1), suffixes.get(form[-3:].lower(), 0), _shape(form)

    def arrays(sentences: list[list[tuple[str, str]]]) -> dict[str, np.ndarray]:
        rows = [s[i : i + length] for s in sentences for i in range(0, len(s), length)]
        x = np.zeros((len(rows), length, 3), np.int32)
        y = np.zeros((len(rows), length), np.int32)
        mask = np.zeros((len(rows), length), np.float32)
        for i, row in enumerate(rows):
            x[i, : len(row)] = [features(form) for form, _ in row]
            y[i, : len(row)] = [classes.get(tag, 0) for _, tag in row]
            mask[i, : len(row)] = 1
        return {"x": x, "y": y, "mask": mask}

    return _Data(
        tuple(arrays(part) for part in parts),
        (len(words) + 2, len(suffixes) + 1, 16),
        len(classes) + 1,
    )


def _read_ewt(file: DataFile, folders: list[Path]) -> list[list[tuple[str, str]]]:
    """Sentences of pairs (form, tag), from the verified file or else from the CoNLL-U file."""
    url = file.urls[0]
    conllu = url.rpartition("/")[2]
    for folder in folders:
        if any((folder / name).is_file() for name in file.names):
            text = read_file(file, data_dir=folder).decode()
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
                raise DataError(f"{path} is no CoNLL-U file; get it from {url}") from error
            if not any(tables):
                raise DataError(f"{path} has no word in it; get it from {url}")
            return tables
    raise DataError(
        f"no {', '.join((*file.names, conllu))} in {' or '.join(map(str, folders))}; get {url} and "
        f"put it in a folder that data_dir or {ENV_VAR} names"
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
