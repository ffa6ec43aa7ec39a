"""The command `priorityprop predict`: labels of texts, by a model that was fine-tuned."""

from __future__ import annotations

import argparse
import csv
import io
from pathlib import Path
from typing import Any

import numpy as np

from priorityprop_jax.cli.runs import Failure, reading, tell_cut, told, whole, write

TEXT = "Labels the texts of a file with a model that was fine-tuned, and writes a CSV file."
POSITIONAL: dict[str, dict[str, Any]] = {
    "run_dir": {"metavar": "RUN", "type": Path, "help": "folder of the run"},
    "file": {"metavar": "FILE", "type": Path, "help": "CSV, TSV or JSONL with a column text"},
}
OPTIONS: dict[str, dict[str, Any]] = {
    "out": {"type": Path, "metavar": "CSV", "help": "default: FILE.predicted.csv beside FILE"},
    "batch_size": {"type": whole(1), "default": 32, "help": "rows at a time"},
    "skip_bad": {"action": "store_true", "help": "leave out rows that cannot be read"},
}


def run(arguments: argparse.Namespace) -> int:
    """Runs this command; the exit code."""
    from priorityprop_jax.models.files import DataError
    from priorityprop_jax.models.texts import check_labels, numbers_of, read_texts

    folder = arguments.run_dir / "model"
    out = arguments.out or arguments.file.with_name(f"{arguments.file.stem}.predicted.csv")
    if out.is_dir() or not out.parent.is_dir() or out.resolve() == arguments.file.resolve():
        raise Failure(f"--out {out} is FILE itself, a folder, or in no folder: give another", 2)
    if not (folder / "task.json").is_file():
        raise Failure(f"{arguments.run_dir} holds no fine-tuned model: it is no finished run")
    with reading(folder / "task.json", "fine-tune again") as task:
        labels = [str(label) for label in task["labels"]]
        length, kind = int(task["length"]), task["kind"]
    if kind not in ("label", "number"):
        raise Failure("the model has learnt no labels; priorityprop generate shows what it writes")
    with told(ValueError):
        texts = read_texts(arguments.file, skip_bad=arguments.skip_bad)
        if texts.kind not in ("label", "text"):
            raise Failure(f"{arguments.file} has no column text")
        for line in texts.skipped:
            print(f"left out: {line}")
        labelled = texts.kind == "label"
        numbers = numbers_of(texts) if labelled and kind == "number" else None
        predict = _decoder if task["model"] == "decoder" else _encoder
        scores = predict(folder, [row["text"] for row in texts.rows], labels, length, arguments)
    if scores.shape[1] != (len(labels) or 1):
        raise Failure(f"{folder} has {scores.shape[1]} classes and {len(labels)} labels; tune anew")
    file = io.StringIO(newline="")
    table = csv.writer(file, lineterminator="\n")
    if kind == "number":
        table.writerow(["text", "predicted"])
        found = [f"{score[0]:.6g}" for score in scores]
        for row, value in zip(texts.rows, found, strict=True):
            table.writerow([row["text"], value])
        if numbers is not None:
            errors = numbers - scores[:, 0]
            print(f"root mean square error {np.sqrt(np.mean(errors**2)):.4g}")
    else:
        shares = np.exp(scores - scores.max(1, keepdims=True))
        shares /= shares.sum(1, keepdims=True)
        found = [labels[i] for i in shares.argmax(1)]
        table.writerow(["text", "predicted", "probability"])
        for row, label, share in zip(texts.rows, found, shares.max(1), strict=True):
            table.writerow([row["text"], label, f"{share:.4f}"])
        if labelled:
            pairs = zip(texts.rows, found, strict=True)
            right = np.mean([row["label"] == label for row, label in pairs])
            print(f"accuracy {right:.2%} of {len(found)} labelled texts")
            try:
                check_labels(texts, labels, "some are counted as wrong")
            except DataError as error:
                print(error)
    write(out, file.getvalue().rstrip("\n"))
    print(f"wrote {out}")
    return 0


def _decoder(
    folder: Path, texts: list[str], labels: list[str], length: int, arguments: argparse.Namespace
) -> np.ndarray:
    """Scores `[texts, labels]` by the first token of an answer, or by a head."""
    import jax.numpy as jnp
    from flax import nnx

    from priorityprop_jax.models import load_decoder, load_language
    from priorityprop_jax.models.prompts import answer_rows, class_rows, label_logits, label_tokens
    from priorityprop_jax.models.tokenizer import check_tokens
    from priorityprop_jax.training import buckets

    model, language = load_decoder(folder), load_language(folder)
    rows: Any = [{"text": text} for text in texts]
    if model.config.classes:
        tokens = range(model.config.classes)
        rows = class_rows(language, rows, length, labels)
    else:
        tokens, rows = label_tokens(language, labels), answer_rows(language, "text", rows, length)
    tell_cut(rows.cut, len(texts), length)
    x = rows.x
    check_tokens(x, model.config.vocab_size)
    score = nnx.jit(lambda model, x, last: label_logits(model.outputs(x), last, tokens))
    rows = {"x": x, "last": [len(row) - 1 for row in x], "id": list(range(len(x)))}
    scores = np.zeros((len(x), len(tokens)), np.float32)
    for batch in buckets(rows, arguments.batch_size, by="x", most=4, longest=length):
        found = score(model, batch["x"], jnp.asarray(batch["last"]))
        scores[np.asarray(batch["id"])] = np.asarray(found)
    return scores


def _encoder(
    folder: Path, texts: list[str], labels: list[str], length: int, arguments: argparse.Namespace
) -> np.ndarray:
    """Scores `[texts, labels]`, or the number itself `[texts, 1]`."""
    from flax import nnx

    from priorityprop_jax.models import load_bert, load_tokenizer
    from priorityprop_jax.models.tokenizer import check_tokens, cut_rows
    from priorityprop_jax.training import ArrayLoader

    model, (x, cut) = load_bert(folder), cut_rows(load_tokenizer(folder), texts, length)
    tell_cut(cut, len(texts), length)
    check_tokens(x, model.config.vocab_size)
    model.eval()
    score = nnx.jit(lambda model, x: model(x))
    loader = ArrayLoader({"x": x}, arguments.batch_size)
    return np.concatenate([np.asarray(score(model, batch["x"])) for batch in loader])
