"""Texts as rows of tokens for a decoder, with the answers that it is to learn, and their loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.exact.answers import cross_entropy
from priorityprop_jax.models.hub import Language

_QUESTION = "\nLabel:"  # stands between a text and its label


class Rows(NamedTuple):
    """Tokens, and what the model is to say after each of them."""

    x: list[np.ndarray]  # int32 [tokens], by row
    y: list[np.ndarray]  # int32 [tokens]: the next token where it is part of the answer, or -1
    cut: int  # of how many rows something was left out


def answer_rows(
    language: Language, kind: str, rows: Iterable[Mapping[str, Any]], length: int
) -> Rows:
    """Makes tokens of texts, each with the answer behind it.

    Args:
      language: the words of the decoder.
      kind: of the rows, as `read_texts` has it: ``"label"`` (a text, then its label),
        ``"completion"`` or ``"messages"``; or ``"text"``, without an answer.
      rows: of the texts.
      length: at most so many tokens in a row: a text loses its end, a prompt its beginning.

    Raises:
      ValueError: `length` leaves no room, or the chat's template refuses messages.
    """
    plain = lambda text: language.tokenizer.encode(text, add_special_tokens=False).ids  # noqa: E731
    question = plain(_QUESTION)
    xs, ys, cut = [], [], 0
    for row in rows:
        if kind in ("label", "text"):
            answer = plain(f" {row['label']}") if kind == "label" else []
            prompt, room = language.encode(row["text"]), length - len(question) - len(answer)
            if room < 1:
                raise ValueError(f"a length of {length} leaves no room for texts")
            cut += len(prompt) > room
            prompt = prompt[:room] + question
        else:
            if kind == "completion":
                prompt, answer = language.encode(row["prompt"]), plain(row["completion"])
                answer.append(language.end)
            else:
                asked = language.chat(row["messages"][:-1], answer=True)
                whole = language.chat(row["messages"])
                if not whole.startswith(asked):
                    raise ValueError("the chat template writes an answer not behind its question")
                prompt, answer = plain(asked), plain(whole[len(asked) :])
            cut += len(prompt) + len(answer) > length
            answer = answer[: length - 1]
            prompt = prompt[max(0, len(prompt) + len(answer) - length) :]
        ids = np.array(prompt + answer, np.int32)
        if kind == "text":
            xs.append(ids)
            ys.append(np.full(len(ids), -1, np.int32))
        else:
            xs.append(ids[:-1])
            ys.append(np.where(np.arange(1, len(ids)) < len(prompt), -1, ids[1:]).astype(np.int32))
    return Rows(xs, ys, cut)


def class_rows(
    language: Language, rows: Iterable[Mapping[str, Any]], length: int, labels: Sequence[str]
) -> Rows:
    """Makes tokens of texts alone, for a head that tells classes.

    `y` has the number of a row's label, where it has one, at its last token; a text that is longer
    than `length` loses its end.
    """
    xs, ys, cut = [], [], 0
    for row in rows:
        ids = language.encode(row["text"]) or [language.end]
        cut += len(ids) > length
        xs.append(np.array(ids[:length], np.int32))
        ys.append(np.full(len(xs[-1]), -1, np.int32))
        if "label" in row:
            ys[-1][-1] = labels.index(row["label"])
    return Rows(xs, ys, cut)


def label_tokens(language: Language, labels: Sequence[str]) -> list[int]:
    """The first token of each label, by which an answer is told.

    Raises:
      ValueError: two labels begin with the same token.
    """
    found: dict[int, str] = {}
    for label in labels:
        token = language.tokenizer.encode(f" {label}", add_special_tokens=False).ids[0]
        if token in found:
            raise ValueError(
                f"the labels {found[token]!r} and {label!r} begin with the same token, by which "
                "the model could not tell them apart: give them names that begin differently"
            )
        found[token] = label
    return list(found)


def label_logits(outputs: Any, places: jax.Array, tokens: Sequence[int]) -> jax.Array:
    """Logits `[batch, labels]` of the first tokens of labels, behind a place `[batch]` of each row.

    Others are not computed.
    """
    at = outputs.hidden[jnp.arange(len(places)), places]  # [batch, width]
    return (at @ outputs.weight[jnp.array(tokens)].T).astype(jnp.float32)


def answer_loss(tokens: Sequence[int] | None = None) -> Callable[[Any, Any], Any]:
    """A loss on batches of `x` and `y`, `-1` where there is no answer, of a `Decoder` or its top.

    It is the mean cross-entropy of the tokens of answers, in nats; other logits are not computed.
    With the first tokens of labels, `label_tokens`, there is an `accuracy` of these too; for a head
    that tells classes they are 0, 1 and so on. A batch may have `segments`, see `Decoder`.
    """

    def loss_fn(model: Any, batch: Any) -> Any:
        y, segments = batch["y"], batch.get("segments")
        hidden, weight = model.outputs(batch["x"], segments)
        # Of a label there is a token or two, and of several texts in a row several.
        chunk = 256 if tokens is None else 64 if segments is not None else min(256, len(y))
        labels, where = jnp.maximum(y, 0), y >= 0
        loss = cross_entropy(hidden, weight, labels, where, chunk=chunk, transposed=True)
        if tokens is None:
            return loss
        before = lambda a: jnp.pad(a[:, :-1], ((0, 0), (1, 0)), constant_values=-1)  # noqa: E731
        begins = before(y) < 0
        if segments is not None:
            begins |= before(segments) != segments
        known = jnp.array(tokens)
        right = known[(hidden @ weight[known].T).argmax(-1)] == y  # [batch, time]
        return loss, {"accuracy": jnp.average(right, weights=(y >= 0) & begins)}

    return loss_fn
