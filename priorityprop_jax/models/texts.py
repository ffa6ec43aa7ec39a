"""Examples for fine-tuning: CSV, TSV, JSONL and `datasets` folders to rows, split and checked."""

from __future__ import annotations

import csv
import importlib
import io
import json
import os
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from priorityprop_jax.models.files import DataError, gunzip

# The columns of each kind of example; the last two are for prediction.
_KINDS = {
    "label": ("text", "label"),
    "completion": ("prompt", "completion"),
    "messages": ("messages",),
    "text": ("text",),
    "prompt": ("prompt",),
}
_PARTS = {"sentence": "text", "review": "text"}
_PARTS |= {part: part for parts in _KINDS.values() for part in parts}
_Table = tuple[list[str], Iterable[tuple[int, dict[str, Any] | str]]]  # columns; number and row


class Texts(NamedTuple):
    """Examples of one kind.

    Attributes:
      kind: "label", "completion" or "messages"; "text" or "prompt" where nothing is to be learnt.
      rows: one dict for each example: `row`, its number in the file, and `text` and `label`;
        `prompt` and `completion`; or `messages`, a list of `{"role": ..., "content": ...}`. All of
        these are strings; a label has no space around it, and JSON's true is "true".
      skipped: a line for each bad row that was left out, such as "row 7: label is empty".
    """

    kind: str
    rows: list[dict[str, Any]]
    skipped: list[str]


def read_texts(path: str | os.PathLike[str], *, skip_bad: bool = False) -> Texts:
    r"""Reads examples; what kind they are of, the columns tell.

    - `text` (or `sentence`, `review`) and `label`: "label";
    - `prompt` and `completion`: "completion";
    - `messages`, first the system's or none, then the user's, the last the assistant's: "messages";
    - `text` or `prompt`, and none of the others: "text" or "prompt".

    Names are taken without regard to case, and other columns are passed over.

    Args:
      path: a file of UTF-8 whose name tells its format; or a folder that `save_to_disk` of the
        package `datasets` wrote.

        - `.csv`: a header, then rows, numbered from 1; quoted cells may hold line ends;
        - `.tsv`: the same with tabs, and a quotation mark is a mark like any other;
        - `.jsonl`: an object a line, and a row's number is its line's;
        - each of these with `.gz` behind.

        In a cell of CSV or TSV, `messages` are JSON.
      skip_bad: whether to leave out the rows that are no example instead of raising.

    Raises:
      DataError: there is nothing that can be read, columns that make no kind, no row, or (unless
        `skip_bad`) a row with a part that is missing, empty or no text. The message is one line.
      ImportError: a folder needs `datasets`, which is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     path = Path(folder) / "reviews.csv"
      ...     _ = path.write_text("id,Text,Label\n1,a joy,kind\n2,,unkind\n3,a bore,unkind\n")
      ...     texts = read_texts(path, skip_bad=True)
      >>> texts.kind, texts.rows[0]
      ('label', {'row': 1, 'text': 'a joy', 'label': 'kind'})
      >>> texts.skipped
      ['row 2: text is empty']
    """
    path = Path(path)
    columns, table = _folder(path) if path.is_dir() else _file(path)
    parts = [_part(name) for name in columns]
    found = sorted(part for part in parts if part)
    kind = next((kind for kind, needed in _KINDS.items() if sorted(needed) == found), None)
    if kind is None and columns:
        raise DataError(
            f"{path} has the columns {_listed(columns)}; needed are text and label, prompt and "
            "completion, or messages (to predict, text or prompt), and only one of these choices"
        )
    kind = kind or "text"  # of a file in which no row is good
    names = {part: name for part, name in zip(parts, columns, strict=True) if part}
    rows, bad = [], []
    for number, cells in table:
        try:
            if isinstance(cells, str):
                raise ValueError(cells)
            parts = {part: _value(part, cells.get(names.get(part, ""))) for part in _KINDS[kind]}
            rows.append({"row": number, **parts})
        except ValueError as error:
            bad.append(f"row {number}: {error}")
    if bad and not skip_bad:
        others = f"and {len(bad) - 1} more; " if bad[1:] else ""
        out = "them" if bad[1:] else "it"
        raise DataError(f"{path}: {bad[0]} ({others}--skip-bad leaves {out} out)")
    if not rows:
        raise DataError(f"{path} has no {'good row: ' + bad[0] if bad else 'rows'}")
    return Texts(kind, rows, bad)


def split(
    texts: Texts, *, share: float = 0.1, seed: int = 0, most: int = 2000
) -> tuple[Texts, Texts]:
    """Parts examples into those to train on and those to judge by, the same for the same seed.

    The second part has a `share` of the rows, at least one and at most `most`, and its share of
    each label; the first keeps a row of each label where it can. Both keep the order of the file.

    Raises:
      DataError: there are fewer than 2 rows.
      ValueError: a number is out of range.
    """
    if not 0 < share < 1 or most < 1 or seed < 0:
        given = f"share={share}, most={most}, seed={seed}"
        raise ValueError(f"{given}: between 0 and 1, at least 1, and at least 0 are needed")
    total = len(texts.rows)
    if total < 2:
        raise DataError(f"{total} rows cannot be split in two: give at least 2")
    count = max(1, min(round(share * total), most, total - 1))
    order = np.random.default_rng(seed).permutation(total).tolist()
    if texts.kind == "label":
        labels = [row["label"] for row in texts.rows]
        rank = {label: i for i, label in enumerate(_in_order(labels))}
        order.sort(key=lambda i: rank[labels[i]])  # stable: still shuffled within a label
        again = [j for i, j in zip(order, order[1:], strict=False) if labels[i] == labels[j]]
        order = again if len(again) >= count else order
    # Evenly spaced through the labels, so that each has its share, one row more or less.
    chosen = {order[(2 * i + 1) * len(order) // (2 * count)] for i in range(count)}
    parts = [[row for i, row in enumerate(texts.rows) if (i in chosen) == dev] for dev in (0, 1)]
    return texts._replace(rows=parts[0]), texts._replace(rows=parts[1])


def labels_of(texts: Texts) -> list[str]:
    """The distinct labels, sorted, as numbers where all are whole numbers.

    Raises:
      DataError: there are no labels, or all are the same.

    Example:
      >>> labels_of(Texts("label", [{"text": "a", "label": label} for label in ("10", "9")], []))
      ['9', '10']
    """
    labels = _in_order(_labels(texts))
    if len(labels) < 2:
        raise DataError(f"every row has the label {_listed(labels)}: to tell classes takes two")
    return labels


def check_labels(texts: Texts, labels: Sequence[str], where: str) -> None:
    """Raises a DataError about `where`, such as a path, for labels that are not among these."""
    unseen = {}
    for row, label in zip(texts.rows, _labels(texts), strict=True):
        unseen |= {} if label in labels else {label: unseen.get(label, row["row"])}
    if unseen:
        raise DataError(
            f"{where}: row {min(unseen.values())}: training has not seen the labels "
            f"{_listed(_in_order(unseen))}; it has {_listed(labels)}"
        )


def numbers_of(texts: Texts) -> np.ndarray:
    """The labels as float32 `[rows]`; a DataError names the first that is no finite number."""
    numbers = []
    for row, label in zip(texts.rows, _labels(texts), strict=True):
        try:
            numbers.append(float(label))
        except ValueError:
            numbers.append(float("nan"))
        if not abs(numbers[-1]) <= float(np.finfo(np.float32).max):
            raise DataError(f"row {row['row']}: the label {_listed([label])} is no finite number")
    return np.array(numbers, np.float32)


def _labels(texts: Texts) -> list[str]:
    if texts.kind != "label":
        raise DataError(f"examples of the kind {texts.kind!r} have no labels: add a column label")
    return [row["label"] for row in texts.rows]


def _in_order(labels: Iterable[str]) -> list[str]:
    labels = sorted(set(labels))
    whole = all(re.fullmatch(r"[+-]?[0-9]{1,18}", label) for label in labels)
    return sorted(labels, key=int) if whole else labels


def _listed(names: Sequence[str]) -> str:
    """A few of the names, none of them long, in quotation marks."""
    some = [repr(name if len(name) <= 30 else name[:27] + "...") for name in names[:10]]
    return ", ".join(some or ["none"]) + (f" and {len(names) - 10} more" if names[10:] else "")


def _part(column: str) -> str | None:
    return _PARTS.get(column.strip().lower())


def _file(path: Path) -> _Table:
    """The columns and the rows of a file; in place of a bad row, what is wrong with it."""
    name = path.name.lower()
    suffix = name.removesuffix(".gz").rpartition(".")[2]
    if not path.is_file():
        raise DataError(f"{path} is no file: give one of .csv, .tsv or .jsonl")
    if suffix not in ("csv", "tsv", "jsonl"):
        raise DataError(f"{path} should end in .csv, .tsv or .jsonl, or one of them with .gz")
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    raw = gunzip(raw, source=str(path)) if name.endswith(".gz") else raw
    try:
        text = raw.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = 1 + raw.count(b"\n", 0, error.start)
        raise DataError(
            f"{path} is not UTF-8 at byte {error.start} (line {line}): if it is text, save it anew "
            "in the encoding UTF-8"
        ) from error
    if suffix == "jsonl":
        lines = enumerate(text.split("\n"), 1)
        rows = [(number, _object(line)) for number, line in lines if line.strip()]
        objects = [row for _, row in rows if isinstance(row, dict)]
        return list(dict.fromkeys(key for row in objects for key in row)), rows
    rows = _cells(text, suffix)
    header = next(rows, "no header")
    if isinstance(header, str) or "\0" in "".join(header):
        raise DataError(f"{path} begins with no header of columns: it is empty, damaged or no text")
    return list(header), enumerate(rows, 1)


def _cells(text: str, suffix: str) -> Iterator[Any]:
    """The list of columns, then each row by column, or what is wrong with it."""
    style: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if suffix == "tsv" else {}
    reader, header = csv.reader(io.StringIO(text, newline=""), strict=True, **style), None
    while True:
        first = reader.line_num + 1
        try:
            row = next(reader, None)
        except csv.Error as error:
            yield f"bad quotation marks or too long, {error} (lines {first} to {reader.line_num})"
            continue
        if row is None:
            return
        if header is None and row:
            yield (header := row)
        elif header and len(row) == len(header):
            yield dict(zip(header, row, strict=True))
        elif header and row:  # a blank line is no row
            yield f"{len(row)} cells, where the header has {len(header)}"


def _object(line: str) -> dict[str, Any] | str:
    try:
        row = _parsed(line)
    except ValueError as error:
        return str(error)
    return row if isinstance(row, dict) else "not a JSON object"


def _parsed(text: str) -> Any:
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("not JSON: nested too deep") from None
    except ValueError as error:
        raise ValueError(f"not JSON: {getattr(error, 'msg', error)}") from None


def _folder(path: Path) -> _Table:
    """The columns and the rows of a folder that `datasets` wrote."""
    if not any((path / name).is_file() for name in ("state.json", "dataset_dict.json")):
        raise DataError(f"{path} is a folder, and not one that save_to_disk of datasets wrote")
    try:
        datasets = importlib.import_module("datasets")
    except ImportError as error:
        raise ImportError(f"to read {path} takes the package datasets: pip install it") from error
    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # its own, Arrow's and Python's
        raise DataError(f"{path} is damaged: {' '.join(str(error).split())[:200]}") from error
    if isinstance(data, dict):
        raise DataError(f"{path} holds the splits {_listed(sorted(data))}: give the folder of one")
    names, columns = [name for name in data.column_names if _part(name)], []
    for name in names:  # by columns: others may be pictures or sound, which a row would decode
        classes = getattr(data.features[name], "names", None)
        if classes is None:
            columns.append(data[name])
        else:
            columns.append([classes[i] if i in range(len(classes)) else None for i in data[name]])
    rows = (dict(zip(names, row, strict=True)) for row in zip(*columns, strict=True))
    return list(data.column_names), enumerate(rows, 1)


def _value(part: str, value: Any) -> Any:
    """A part of an example; a ValueError says what is wrong with it."""
    if part == "messages":
        return _messages(_parsed(value) if isinstance(value, str) else value)
    if part == "label":
        value = json.dumps(value) if isinstance(value, int | float) else value
        value = value.strip() if isinstance(value, str) else value
    if value is None:
        raise ValueError(f"{part} is missing")
    if not isinstance(value, str):
        raise ValueError(f"{part} is of the type {type(value).__name__}, not text")
    if not value.strip():
        raise ValueError(f"{part} is empty")
    if re.search("[\0\ud800-\udfff]", value):
        raise ValueError(f"{part} has a NUL or half a surrogate pair in it, which is no text")
    return value


def _messages(messages: Any) -> list[dict[str, str]]:
    if not isinstance(messages, list) or not all(isinstance(one, dict) for one in messages):
        raise ValueError("messages are no list of objects with role and content")
    parts = ("role", "content")
    found = [{part: _value(part, message.get(part)) for part in parts} for message in messages]
    roles = [message["role"] for message in found]
    turns = roles[1:] if roles[:1] == ["system"] else roles
    if turns[:1] != ["user"] or turns[-1] != "assistant" or not set(turns) <= {"user", "assistant"}:
        raise ValueError(
            f"messages have the roles {_listed(roles)}; the first is the user's (or the system's, "
            "then the user's), the last the assistant's"
        )
    return found
