"""Tests of `priorityprop_jax.models.texts`."""

import collections
import gzip
import json
import sys
import types

import numpy as np
import pytest

from priorityprop_jax.models.files import DataError
from priorityprop_jax.models.texts import (
    Texts,
    check_labels,
    labels_of,
    numbers_of,
    read_texts,
    split,
)

CHAT = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


@pytest.fixture
def write(tmp_path):
    """Writes a file of a name, gzipped where the name says so."""

    def written(name, content):
        raw = content if isinstance(content, bytes) else content.encode()
        path = tmp_path / name
        path.write_bytes(gzip.compress(raw) if name.endswith(".gz") else raw)
        return path

    return written


def labelled(*labels):
    rows = [{"row": i, "text": f"text {i}", "label": x} for i, x in enumerate(labels, 1)]
    return Texts("label", rows, [])


def lines(*objects):
    return "\n".join(json.dumps(one) for one in objects) + "\n"


@pytest.mark.parametrize(
    "name, content, kind, rows",
    [
        ("a.csv", 'text,label\n"a ""b"",\nc",1\n\nd , 0 \n', "label",
         [('a "b",\nc', "1"), ("d ", "0")]),
        ("a.CSV.gz", "\ufeffLabel,no,Sentence \r\nx,1,a\r\n", "label", [("a", "x")]),
        ("a.tsv", 'review\tlabel\n"a\t1\nb"\t0\n', "label", [('"a', "1"), ('b"', "0")]),
        ("a.tsv.gz", "prompt\tcompletion\na\t b\n", "completion", [("a", " b")]),
        ("a.jsonl", lines({"text": "a", "label": 0}, {"TEXT": "b", "Label": 1}), None, None),
        ("b.jsonl", lines({"text": "a\u2028", "label": True}, {"text": "b", "label": 1.5}), "label",
         [("a\u2028", "true"), ("b", "1.5")]),
        ("a.jsonl.gz", lines({"messages": CHAT, "x": []}), "messages", [(CHAT,)]),
        ("m.tsv", "messages\n" + json.dumps(CHAT) + "\n", "messages", [(CHAT,)]),
        ("t.csv", "id,text\n1,a\n", "text", [("a",)]),
        ("p.jsonl", lines({"prompt": "a"}), "prompt", [("a",)]),
    ],
)  # fmt: skip
def test_formats_and_kinds(write, name, content, kind, rows):
    path = write(name, content)
    if kind is None:  # two spellings of one column
        with pytest.raises(DataError, match="'text', 'label', 'TEXT', 'Label'"):
            read_texts(path)
        return
    texts = read_texts(path)
    found = [tuple(v for k, v in row.items() if k != "row") for row in texts.rows]
    assert (texts.kind, found, texts.skipped) == (kind, rows, [])
    assert [row["row"] for row in texts.rows] == list(range(1, len(rows) + 1))


CSV = {
    "a,1\n,1\n": "row 2: text is empty",
    "a,1\n \t,1\n": "row 2: text is empty",
    "a,\n": "row 1: label is empty",
    "a\nb,1\n": "row 1: 1 cells, where the header has 2",
    "a,1,2\n": "row 1: 3 cells, where the header has 2",
    "a\0b,1\n": "row 1: text has a NUL",
    '"a"b,1\n': r"row 1: bad quotation marks .* \(lines 2 to 2\)",
    'a,1\n"b,1\nc,1\nd,1\n': r"row 2: bad quotation marks .* unexpected end .* \(lines 3 to 5\)",
    "a" * 140_000 + ",1\n": "row 1: .* too long, field larger than field limit",
}


@pytest.mark.parametrize("body, reason", CSV.items(), ids=range(len(CSV)))
def test_bad_rows_of_csv(write, body, reason):
    path = write("a.csv", "text,label\n" + body)
    with pytest.raises(DataError, match=reason) as raised:
        read_texts(path)
    message = str(raised.value)
    assert message.startswith(f"{path}: row ") and message.endswith("(--skip-bad leaves it out)")
    assert "\n" not in message
    path = write("b.csv", "text,label\nz,9\n" + body)
    texts = read_texts(path, skip_bad=True)
    assert texts.rows[0] == {"row": 1, "text": "z", "label": "9"}
    assert len(texts.skipped) == 1 and texts.skipped[0].startswith("row ")


CHATS = {
    "no list": CHAT[0],
    "list of objects": [CHAT[0], "x"],
    "content is missing": [{"role": "user"}, CHAT[1]],
    "content is empty": [CHAT[0], {"role": "assistant", "content": " "}],
    "role is of the type list": [{"role": ["user"], "content": "a"}],
    "the roles none": [],
    "the roles 'user';": CHAT[:1],
    "the roles 'assistant', 'user'": CHAT[::-1],
    "the roles 'user', 'tool', 'assistant'": [CHAT[0], {"role": "tool", "content": "x"}, CHAT[1]],
    "the roles 'user', 'system'": [CHAT[0], {"role": "system", "content": "x"}, CHAT[1]],
    "not JSON: Expecting": "[",
}


@pytest.mark.parametrize("reason, messages", CHATS.items())
def test_bad_messages(write, reason, messages):
    system = [{"role": "system", "content": "be kind"}, *CHAT, *CHAT]
    path = write("a.jsonl", lines({"messages": system}, {"messages": messages}))
    with pytest.raises(DataError, match=f"row 2: .*{reason}"):
        read_texts(path)
    assert read_texts(path, skip_bad=True).rows == [{"row": 1, "messages": system}]


def test_bad_rows_of_jsonl(write):
    deep = '{"text": "a", "label": 1, "x": ' + "[" * 200_000 + "]" * 200_000 + "}"
    nested = '{"text": "a", "label": ' + "[" * 50 + "]" * 50 + "}"
    bad = [
        "",
        "{",
        "3",
        "{}",
        nested,
        deep,
        '{"text": "a", "label": null}',
        '{"text": 3, "label": 1}',
    ]
    bad += ['{"text": "\\ud800", "label": 1}', '{"text": "\\u0000", "label": 1}', "1" * 5000]
    bad += ['{"text": "a", "label": %s}' % ("1" * 5000)]
    path = write("a.jsonl", "\n".join(['{"text": "a", "label": 1}', *bad]))
    texts = read_texts(path, skip_bad=True)
    assert len(texts.rows) == 1
    reasons = [
        "not JSON", "not a JSON object", "text is missing", "label is of the type list",
        "nested too deep", "label is missing", "text is of the type int", "surrogate", "NUL",
        "not JSON", "not JSON",
    ]  # fmt: skip
    for number, reason, line in zip(range(3, 14), reasons, texts.skipped, strict=True):
        assert line.startswith(f"row {number}: ") and reason in line and "\n" not in line
    with pytest.raises(
        DataError, match=r"row 3: not JSON.* \(and 10 more; --skip-bad leaves them out"
    ):
        read_texts(path)


FILES = {
    "columns 'id', 'words'; needed are text and label": ("a.csv", "id,words\n1,2\n"),
    "columns 'label'": ("a.csv", "label\n2\n"),
    "columns 'text', 'completion'": ("a.csv", "text,completion\n1,2\n"),
    "columns 'text', 'prompt'": ("a.csv", "text,prompt\n1,2\n"),
    "columns 'text', 'review', 'label'": ("a.csv", "text,review,label\n1,2,3\n"),
    r"columns '0', .*'9' and 90 more": ("a.csv", ",".join(map(str, range(100))) + "\n"),
    "columns 'a stirring": ("a.tsv", "a stirring" + " film" * 99 + "\t1\nbad\t0\n"),
    "has no rows": ("a.csv", "text,label\n"),
    r"\.jsonl has no rows": ("a.jsonl", "\n\n"),
    "row 1: not JSON": ("a.jsonl", "[\n"),
    "no header": ("a.csv", ""),
    "begins with no header": ("a.csv", "text,label\na,1\n".encode("utf-16-le")),
    r"not UTF-8 at byte 0 \(line 1\)": ("a.csv", "text,label\na,1\n".encode("utf-16")),
    r"not UTF-8 at byte 14 \(line 2\): .*UTF-8": ("a.csv", b"text,label\nabc\xe9,1\n"),
    "not UTF-8": ("a.csv", gzip.compress(b"text,label\n")),
    "should end in .csv": ("a.xlsx", "PK"),
}


@pytest.mark.parametrize("reason", FILES)
def test_bad_files(write, reason):
    with pytest.raises(DataError, match=reason) as raised:
        read_texts(write(*FILES[reason]))
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 400


def test_bad_paths(tmp_path, write):
    (tmp_path / "cut.csv.gz").write_bytes(gzip.compress(b"text,label\na,1\n" * 99)[:-9])
    paths = {"none.csv": "no file", ".": "is a folder, and not", "cut.csv.gz": "whole gzip"}
    for name, reason in paths.items():
        with pytest.raises(DataError, match=reason):
            read_texts(tmp_path / name)
    with pytest.raises(DataError, match="no good row: row 1: text is empty"):
        read_texts(write("a.csv", "text,label\n,1\n,2\n"), skip_bad=True)


class _Dataset:
    """What is used of `datasets.Dataset`."""

    def __init__(self, columns, names=None):
        self.columns, self.column_names = columns, list(columns)
        self.features = {name: types.SimpleNamespace() for name in columns}
        if names:
            self.features["Label"].names = names

    def __getitem__(self, name):
        assert name != "image"  # it would be decoded
        return self.columns[name]


def test_folder_of_datasets(tmp_path, monkeypatch):
    (tmp_path / "state.json").write_text("{}")
    monkeypatch.setitem(sys.modules, "datasets", None)  # as if not installed
    with pytest.raises(ImportError, match="pip install"):
        read_texts(tmp_path)
    stub = types.ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", stub)
    columns = {"image": None, "text": ["a", "b", "c"], "Label": [1, 0, -1]}
    stub.load_from_disk = lambda path: _Dataset(columns, ["no", "yes"])
    texts = read_texts(tmp_path, skip_bad=True)
    assert [(row["text"], row["label"]) for row in texts.rows] == [("a", "yes"), ("b", "no")]
    assert texts.skipped == ["row 3: label is missing"]
    stub.load_from_disk = lambda path: _Dataset(columns)
    assert [row["label"] for row in read_texts(tmp_path).rows] == ["1", "0", "-1"]
    stub.load_from_disk = lambda path: {"train": _Dataset(columns)}
    with pytest.raises(DataError, match="the splits 'train'"):
        read_texts(tmp_path)

    def fails(path):
        raise TypeError("wrong\nschema")

    stub.load_from_disk = fails
    with pytest.raises(DataError, match="damaged: wrong schema"):
        read_texts(tmp_path)


class TestSplit:
    def test_keeps_every_row_once_and_each_label_its_share(self):
        texts = labelled(*(["a"] * 300 + ["b"] * 60 + ["c"] * 30 + list("defghijklm")))
        train, dev = split(texts, share=0.2, seed=1)
        assert (len(train.rows), len(dev.rows)) == (320, 80)
        for part in (train, dev):
            assert part.rows == sorted(part.rows, key=lambda row: row["row"])
        assert sorted(row["row"] for row in train.rows + dev.rows) == list(range(1, 401))
        count = collections.Counter(row["label"] for row in dev.rows)
        assert set(count) == set("abc")  # training keeps the only row of a label
        assert abs(count["a"] - 61) <= 1 and abs(count["b"] - 12) <= 1 and abs(count["c"] - 6) <= 1
        assert split(texts, share=0.2, seed=1) == (train, dev)
        assert split(texts, share=0.2, seed=2) != (train, dev)

    @pytest.mark.parametrize("kind", ["label", "text"])
    @pytest.mark.parametrize("labels", ["aa", "ab", "aab", "abcdefghij", "aaaaaaaaaaab"])
    def test_no_part_is_empty(self, kind, labels):
        for share in (0.01, 0.5, 0.99):
            train, dev = split(labelled(*labels)._replace(kind=kind), share=share)
            assert train.rows and dev.rows and len(train.rows + dev.rows) == len(labels)

    def test_most(self):
        assert len(split(labelled(*"ab" * 50), share=0.5, most=7)[1].rows) == 7

    def test_rows_of_numbers_are_split_by_value(self):
        texts = labelled(*map(str, np.random.default_rng(0).permutation(100)))
        values = sorted(int(row["label"]) for row in split(texts)[1].rows)
        assert values == list(range(5, 100, 10))

    def test_errors(self):
        with pytest.raises(DataError, match="1 rows"):
            split(labelled("a"))
        for wrong in ({"share": 0}, {"share": 1.0}, {"most": 0}, {"seed": -1}):
            with pytest.raises(ValueError, match="needed"):
                split(labelled("a", "b"), **wrong)


def test_labels():
    assert labels_of(labelled("10", "9", "-1", "9")) == ["-1", "9", "10"]
    assert labels_of(labelled("10", "9", "b")) == ["10", "9", "b"]
    assert labels_of(labelled("1" * 5000, "9")) == ["1" * 5000, "9"]
    with pytest.raises(DataError, match="every row has the label 'a'"):
        labels_of(labelled("a", "a"))
    with pytest.raises(DataError, match="'text' have no labels"):
        labels_of(Texts("text", [{"row": 1, "text": "a"}], []))
    check_labels(labelled("a", "b", "a"), ["a", "b"], "my.csv")
    message = "my.csv: row 2: training has not seen the labels 'c', 'd'; it has 'a', 'b'"
    with pytest.raises(DataError, match=message):
        check_labels(labelled("a", "d", "c", "d", "c"), ["a", "b"], "my.csv")


def test_numbers():
    numbers = numbers_of(labelled("1", "-2.5", "1e-3"))
    assert numbers.dtype == np.float32
    np.testing.assert_array_equal(numbers, np.array([1, -2.5, 1e-3], np.float32))
    for wrong in ("nan", "inf", "1e39", "3,5", "good"):
        with pytest.raises(DataError, match=f"row 2: the label '{wrong}' is no finite number"):
            numbers_of(labelled("1", wrong, "x"))
