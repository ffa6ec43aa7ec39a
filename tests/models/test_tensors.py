"""Tests of `priorityprop_jax.models.tensors`: shards, types, and damage of every kind."""

from __future__ import annotations

import json
import os

import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.models import DataError, read_tensors, write_tensors
from priorityprop_jax.models.files import read_json

INDEX = "model.safetensors.index.json"


def raw_file(header, data: bytes = b"", length: int | None = None) -> bytes:
    """A file of safetensors by hand: the length of the header, the header in JSON, the bytes."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def tensor(dtype, shape, start, stop):
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, stop]}


@pytest.fixture
def folder(tmp_path):
    """Two shards and their index."""
    one = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "n": np.arange(3)}
    two = {"b": np.float64(1.5), "c": np.zeros((0, 4), np.float16), "d": np.ones((2, 2)).T}
    names = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
    for name, tensors in zip(names, (one, two), strict=True):
        write_tensors(tmp_path / name, tensors)
    places = dict.fromkeys(one, names[0]) | dict.fromkeys(two, names[1])
    (tmp_path / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return tmp_path


def edit(folder, change):
    contents = json.loads((folder / INDEX).read_text())
    change(contents)
    (folder / INDEX).write_text(json.dumps(contents))


class TestRead:
    def test_shards(self, folder):
        tensors = read_tensors(folder)
        assert list(tensors) == ["a", "b", "c", "d"] and len(tensors) == 4  # no whole numbers
        assert "a" in tensors and "n" not in tensors and tensors.get("n") is None
        assert {name: value.shape for name, value in tensors.items()} == {
            "a": (2, 3), "b": (), "c": (0, 4), "d": (2, 2),
        }  # fmt: skip
        assert {value.dtype for value in tensors.values()} == {np.dtype(np.float32)}
        np.testing.assert_array_equal(tensors["a"], [[0, 1, 2], [3, 4, 5]])
        assert tensors["b"] == 1.5

    def test_the_whole_file_goes_first(self, folder):
        write_tensors(folder / "model.safetensors", {"z": np.ones(1, np.float32)})
        assert list(read_tensors(folder)) == ["z"]

    @pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
    def test_types(self, tmp_path, dtype):
        values = np.array([[1.5, -2.25], [3e-5, 7.0]]).astype(jnp.dtype(dtype))
        code = {"float16": "F16", "bfloat16": "BF16", "float32": "F32", "float64": "F64"}[dtype]
        by_hand = raw_file({"a": tensor(code, [2, 2], 0, values.nbytes)}, values.tobytes())
        (tmp_path / "model.safetensors").write_bytes(by_hand)
        found = read_tensors(tmp_path)["a"]
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, values.astype(np.float32))
        write_tensors(tmp_path / "model.safetensors", {"a": values})
        np.testing.assert_array_equal(read_tensors(tmp_path)["a"], found)


class TestDamage:
    @pytest.mark.parametrize(
        "contents",
        [
            b"",
            b"\x00\x01",
            raw_file({"a": tensor("F32", [2], 0, 8)}, bytes(8))[:-3],
            raw_file({"a": tensor("F32", [2], 0, 8)}, bytes(12)),
            raw_file({"a": tensor("F32", [2], 0, 8)}, bytes(8), length=10**6),
            raw_file({"a": tensor("F32", [2], 0, 8)}, bytes(8), length=2**64 - 1),
            raw_file({"a": tensor("F32", [3], 0, 8)}, bytes(8)),
            raw_file({"a": tensor("F32", [2**62, 2**62], 0, 8)}, bytes(8)),
            raw_file({"a": tensor("F32", [2], 2**64 - 8, 2**64 - 1)}, bytes(8)),
            raw_file({"a": tensor("F32", [2], 8, 0)}, bytes(8)),
            raw_file({"a": tensor("F32", [-2], 0, 8)}, bytes(8)),
            raw_file({"a\nb": tensor("F32", [2], 0, 9)}, bytes(9)),
            raw_file({"a": tensor("F33", [2], 0, 8)}, bytes(8)),
            raw_file(b"[" * 100_000),
            raw_file(b'{"a":' * 100_000),
            raw_file(b"\xff\xfe"),
        ],
        ids=range(16),
    )
    def test_one_line(self, tmp_path, contents):
        (tmp_path / "model.safetensors").write_bytes(contents)
        with pytest.raises(DataError, match=r"^[^\n]*model.safetensors (is damaged|cannot)[^\n]*$"):
            read_tensors(tmp_path)

    @pytest.mark.parametrize(
        ("change", "match"),
        [
            (lambda c: c.pop("weight_map"), "no weight_map"),
            (lambda c: c.update(weight_map=["a"]), "no weight_map"),
            (lambda c: c["weight_map"].update(a=3), "no weight_map"),
            (lambda c: c["weight_map"].update(x=c["weight_map"]["a"]), "says that 'x' is in model"),
            (lambda c: c["weight_map"].update(a="model-00003.safetensors"), "'model-00003.*get it"),
            (lambda c: c["weight_map"].update(a="../model.safetensors"), "not the name of a file"),
            (lambda c: c["weight_map"].update(a=".."), "not there"),
            (lambda c: c["weight_map"].update(a="a\0b"), "not there"),
        ],
    )
    def test_index(self, folder, change, match):
        edit(folder, change)
        with pytest.raises(DataError, match=f"index.json .*{match}"):
            read_tensors(folder)

    def test_a_shard(self, folder):
        path = folder / "model-00002-of-00002.safetensors"
        path.write_bytes(path.read_bytes()[:-1])
        with pytest.raises(DataError, match="model-00002-of-00002.safetensors is damaged"):
            read_tensors(folder)

    def test_deep_json(self, tmp_path):
        (tmp_path / INDEX).write_text("[" * 100_000)
        for read in (lambda: read_tensors(tmp_path), lambda: read_json(tmp_path / INDEX)):
            with pytest.raises(DataError, match="index.json is damaged: not JSON"):
                read()

    def test_pickles_are_not_opened(self, tmp_path):
        (tmp_path / "pytorch_model-00001-of-00002.bin").write_bytes(b"\x80\x04.")
        with pytest.raises(DataError, match="pickle alone, pytorch_model-00001.*save_pretrained"):
            read_tensors(tmp_path)
        write_tensors(tmp_path / "model.safetensors", {})
        assert len(read_tensors(tmp_path)) == 0

    def test_no_file(self, tmp_path):
        with pytest.raises(DataError, match="no model.safetensors or model.safetensors.index.json"):
            read_tensors(tmp_path)
        with pytest.raises(DataError, match="absent' is not a folder"):
            read_tensors(tmp_path / "absent")


class TestWrite:
    def test_all_or_nothing(self, tmp_path):
        path = tmp_path / "model.safetensors"
        write_tensors(path, {"a": np.ones(2)}, {"about": "me"})
        assert b'"about":"me"' in path.read_bytes() and b'"format":"pt"' in path.read_bytes()
        before = path.read_bytes()
        with pytest.raises(DataError, match="cannot be written"):
            write_tensors(tmp_path / "absent" / path.name, {"a": np.ones(2)})
        with pytest.raises(TypeError):
            write_tensors(path, {"a": np.ones(2)}, {"about": 3})  # type: ignore[dict-item]
        assert path.read_bytes() == before and os.listdir(tmp_path) == [path.name]
