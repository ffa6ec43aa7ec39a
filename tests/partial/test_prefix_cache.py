"""Tests of `priorityprop_jax.partial.prefix_cache`."""

from __future__ import annotations

import errno
import gc
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.partial import prefix_cache
from priorityprop_jax.partial.prefix_cache import PrefixCache, fingerprint, rounded

LIKE = {
    "hidden": jax.ShapeDtypeStruct((3, 5), np.float32),
    "mask": jax.ShapeDtypeStruct((3,), np.bool_),
    "length": jax.ShapeDtypeStruct((), np.int32),
    "half": jax.ShapeDtypeStruct((2,), jnp.bfloat16),
    "none": jax.ShapeDtypeStruct((0, 4), np.float32),
}


def _inputs(ids, salt: int = 0):
    """Inputs that depend on the id alone."""
    ids = np.asarray(ids, np.int64)
    return {"x": ids[:, None] * 7 + np.arange(4) + salt, "y": ids.astype(np.float32)}


def _outputs(ids):
    """Outputs that depend on the id alone, with values that bfloat16 cannot hold."""
    rows = [np.random.default_rng(int(i)) for i in ids]
    return {
        "hidden": np.stack([r.normal(size=(3, 5)) for r in rows]).astype(np.float32),
        "mask": np.stack([r.random(3) < 0.5 for r in rows]),
        "length": np.asarray([r.integers(-9, 9) for r in rows], np.int32),
        "half": np.stack([r.normal(size=2) for r in rows]).astype(jnp.bfloat16),
        "none": np.zeros((len(rows), 0, 4), np.float32),
    }


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        a, b = np.asarray(a), np.asarray(b)
        assert a.dtype == b.dtype and a.shape == b.shape
        assert a.tobytes() == b.tobytes()


def _open(directory, *, key="key", like=LIKE, **options) -> PrefixCache:
    cache = PrefixCache(directory, **({"examples": 20} | options))
    cache.open(key, like)
    return cache


def _fill(cache, ids):
    cache.store(np.array(ids), _inputs(ids), _outputs(ids))


def _has(cache, i: int) -> bool:
    return cache.lookup(np.array([i]), _inputs([i])) is not None


@pytest.fixture(params=["disk", "memory"])
def home(request, tmp_path):
    return tmp_path / "cache" if request.param == "disk" else None


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_equals_rounded(self, home, dtype):
        ids = [4, 0, 19, 7]
        with _open(home, dtype=dtype) as cache:
            assert cache.lookup(ids, _inputs(ids)) is None
            _fill(cache, ids)
            got = cache.lookup(np.array(ids[::-1]), _inputs(ids[::-1]))
            expected = jax.jit(rounded, static_argnums=1)(_outputs(ids[::-1]), dtype)
            _assert_equal(got, expected)
            if dtype == "float32":
                _assert_equal(got, _outputs(ids[::-1]))
            assert (cache.hits, cache.misses) == (4, 4)

    def test_what_is_looked_up_is_the_callers(self, home):
        with _open(home) as cache:
            _fill(cache, [1])
            got = cache.lookup([1], _inputs([1]))
            for leaf in jax.tree.leaves(got):
                leaf[...] = 0
            _assert_equal(cache.lookup([1], _inputs([1])), rounded(_outputs([1])))

    def test_a_part_of_a_batch_is_a_miss(self, home):
        with _open(home) as cache:
            _fill(cache, [1, 2])
            assert cache.lookup([1, 3], _inputs([1, 3])) is None
            assert cache.lookup([1, 2, 1], _inputs([1, 2, 1])) is not None  # Twice in a batch.
            assert (cache.hits, cache.misses) == (3, 2)

    def test_any_order_of_strides_and_jax_arrays(self, home):
        like = jax.ShapeDtypeStruct((2, 3), np.float32)
        y = np.arange(24, dtype=np.float32).reshape(3, 2, 4).transpose(2, 1, 0)  # [4, 2, 3]
        x = np.asfortranarray(np.arange(20.0).reshape(4, 5))
        with _open(home, like=like) as cache:
            cache.store(jnp.arange(4), jnp.asarray(x, jnp.float32), jnp.asarray(y))
            got = cache.lookup(np.arange(4, dtype=np.uint8), x.astype(np.float32))
            np.testing.assert_array_equal(got, y)

    @pytest.mark.parametrize("like", [{}, jax.ShapeDtypeStruct((), np.float32)])
    def test_empty_and_scalar(self, home, like):
        y = jax.tree.map(lambda leaf: np.ones((2, *leaf.shape), leaf.dtype), like)
        with _open(home, like=like) as cache:
            cache.store([0, 1], (), y)
            _assert_equal(cache.lookup([0, 1], ()), y)
            empty = jax.tree.map(lambda leaf: leaf[:0], y)
            cache.store([], (), empty)
            _assert_equal(cache.lookup([], ()), empty)

    def test_reopened(self, tmp_path):
        ids = list(range(20))
        with _open(tmp_path) as cache:
            _fill(cache, ids)
        with _open(tmp_path) as cache:
            _assert_equal(cache.lookup(ids, _inputs(ids)), rounded(_outputs(ids)))
            cache.open("key", LIKE)
            assert _has(cache, 3)

    def test_memory_is_forgotten(self):
        cache = _open(None)
        _fill(cache, [1])
        cache.close()
        cache.open("key", LIKE)
        assert not _has(cache, 1)

    @pytest.mark.parametrize("change", ["key", "like", "dtype"])
    def test_another_prefix_drops_all(self, tmp_path, change):
        with _open(tmp_path) as cache:
            _fill(cache, [1])
        like = LIKE | ({"mask": jax.ShapeDtypeStruct((3,), np.int8)} if change == "like" else {})
        options = {"dtype": "float32"} if change == "dtype" else {}
        with _open(tmp_path, key="x" if change == "key" else "key", like=like, **options) as cache:
            assert cache.lookup([1], _inputs([1])) is None
        with _open(tmp_path) as cache:
            assert not _has(cache, 1)

    def test_key_change_while_open(self, home):
        with _open(home) as cache:
            _fill(cache, [1, 2])
            cache.open("other", LIKE)
            assert not _has(cache, 1)
            _fill(cache, [1])
            assert _has(cache, 1) and not _has(cache, 2)

    def test_records_of_another_key_never_fit(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [1])
        records = (tmp_path / "prefix.bin").read_bytes()
        with _open(tmp_path, key="other"):
            (tmp_path / "prefix.bin").write_bytes(records)  # As after a loss of power.
        with _open(tmp_path, key="other") as cache:
            assert not _has(cache, 1)


class TestRounded:
    @given(st.lists(st.floats(width=32), min_size=1, max_size=40))
    @settings(max_examples=60, deadline=None)
    def test_is_the_nearest_bfloat16(self, values):
        x = np.zeros(40, np.float32)
        x[: len(values)] = values
        expected = x.astype(ml_dtypes.bfloat16).astype(np.float32)
        got = np.asarray(jax.jit(rounded)(x))
        same = (got.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(got) & np.isnan(x))
        assert same.all(), (x[~same], got[~same], expected[~same])

    def test_survives_compilation_among_other_operations(self):
        x = jnp.linspace(1.0, 2.0, 1001)
        got = jax.jit(lambda x: rounded(x * 1.5) * 3.0)(x)
        expected = (x * 1.5).astype(jnp.bfloat16).astype(jnp.float32) * 3.0
        np.testing.assert_array_equal(got, expected)

    def test_leaves_the_rest(self):
        tree = {"a": np.arange(3), "b": np.array([True]), "c": jnp.ones(2, jnp.float16) / 3}
        _assert_equal(rounded(tree), tree)
        x = np.float32([1 / 3])
        assert rounded(x, "float32") is x

    @pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
    def test_float64(self, dtype):
        with jax.enable_x64(True):
            y = np.random.default_rng(0).normal(size=(3, 100))
            expected = np.asarray(jax.jit(rounded, static_argnums=1)(y, dtype))
            assert expected.dtype == np.float64 and (expected != y).all()
            like = jax.ShapeDtypeStruct((100,), np.float64)
            with _open(None, like=like, dtype=dtype) as cache:
                cache.store(range(3), (), y)
                _assert_equal(cache.lookup(range(3), ()), expected)

    def test_idempotent(self):
        x = jax.random.normal(jax.random.key(0), (100,))
        _assert_equal(rounded(rounded(x)), rounded(x))


class TestChangedInputs:
    @pytest.mark.parametrize("reopen", [False, True])
    def test_lookup(self, tmp_path, reopen):
        cache = _open(tmp_path)
        _fill(cache, [1, 2])
        if reopen:
            cache.close()
            cache.open("key", LIKE)
        other = _inputs([1, 2])
        other["y"][1] += 1
        # Even in a batch that is a miss.
        ids, more = [1, 2, 9], {k: np.concatenate([v, v[:1]]) for k, v in other.items()}
        for act in (
            lambda: cache.lookup([1, 2], other),
            lambda: cache.lookup(ids, more),
        ):
            with pytest.raises(ValueError, match="example 2 .*augmented.*switch.*an id of its own"):
                act()
        assert _has(cache, 2)
        cache.close()

    @pytest.mark.parametrize(
        "change", [lambda x: x.astype(np.int32), lambda x: x.reshape(-1, 2, 2)]
    )
    def test_dtype_and_shape_count(self, home, change):
        with _open(home) as cache:
            _fill(cache, [1])
            inputs = _inputs([1])
            with pytest.raises(ValueError, match="example 1"):
                cache.lookup([1], inputs | {"x": change(inputs["x"])})

    def test_one_id_twice_in_a_batch(self, home):
        with _open(home) as cache:
            with pytest.raises(ValueError, match="example 3"):
                cache.store([3, 3], _inputs([3, 4]), _outputs([3, 3]))
            assert not _has(cache, 3)
            cache.store([3, 3], _inputs([3, 3]), _outputs([3, 3]))
            assert _has(cache, 3)


class TestSize:
    def test_first_ids_that_fit(self, home):
        record = 8 + 30 + 3 + 4 + 4  # Head, hidden, mask, length, half.
        with pytest.warns(UserWarning, match=f"holds 5 of 20.*raise max_bytes to {20 * record}"):
            cache = _open(home, max_bytes=5 * record + record - 1)
        ids = list(range(20))
        _fill(cache, ids)
        assert [i for i in ids if _has(cache, i)] == ids[:5]
        assert cache.lookup([4, 5], _inputs([4, 5])) is None
        assert cache.misses == 15 + 2
        if home is not None:
            assert (home / "prefix.bin").stat().st_size == 5 * record
        cache.close()

    def test_grows_sparsely(self, home):
        with _open(home, examples=10**7, max_bytes=2**30) as cache:
            ids = [0, 5_000_000, 3]
            _fill(cache, ids)
            assert [_has(cache, i) for i in (*ids, 1)] == [True, True, True, False]
            if home is not None and hasattr(os.stat_result, "st_blocks"):
                assert 512 * (home / "prefix.bin").stat().st_blocks < 2**20

    def test_nothing_fits(self, home):
        with pytest.warns(UserWarning, match="holds 0 of 20"):
            cache = _open(home, max_bytes=1)
        _fill(cache, [0])
        assert not _has(cache, 0)
        cache.close()


class TestDamage:
    def test_every_flipped_byte_is_seen(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [0, 1, 2])
        records = (tmp_path / "prefix.bin").read_bytes()
        size = len(records) // 3
        for position in range(size, 2 * size):
            torn = bytearray(records)
            torn[position] ^= 1 << position % 8
            (tmp_path / "prefix.bin").write_bytes(torn)
            with _open(tmp_path) as cache:
                assert [_has(cache, i) for i in range(3)] == [True, False, True]
        with _open(tmp_path) as cache:
            _fill(cache, [1])  # Mended.
            assert _has(cache, 1)

    def test_a_record_in_another_place(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [0, 1])
        records = (tmp_path / "prefix.bin").read_bytes()
        half = len(records) // 2
        (tmp_path / "prefix.bin").write_bytes(records[half:] + records[:half])
        with _open(tmp_path) as cache:
            # Not an error about changed inputs.
            assert not _has(cache, 0) and not _has(cache, 1)

    def test_cut_short(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [0, 1])
        file = tmp_path / "prefix.bin"
        os.truncate(file, file.stat().st_size - 1)
        with _open(tmp_path) as cache:
            assert _has(cache, 0) and not _has(cache, 1)
            os.truncate(file, 3)  # While it is open.
            assert not _has(cache, 0)

    @pytest.mark.parametrize("content", [b"", b"{", b"\xff\0", None])
    def test_header(self, tmp_path, content):
        with _open(tmp_path) as cache:
            _fill(cache, [0])
        header = tmp_path / "prefix.json"
        if content is None:
            header.unlink()
        else:
            header.write_bytes(content)
        with _open(tmp_path) as cache:
            assert not _has(cache, 0)
            _fill(cache, [0])
        with _open(tmp_path) as cache:
            assert _has(cache, 0)

    def test_kill_9(self, tmp_path):
        """A writer of large records is killed at random moments; no record is read wrongly."""
        program = textwrap.dedent("""
            import sys
            import jax, numpy as np
            from priorityprop_jax.partial.prefix_cache import PrefixCache
            cache = PrefixCache(sys.argv[1], examples=400, dtype="float32")
            cache.open("key", jax.ShapeDtypeStruct((50_000,), np.float32))
            rng = np.random.default_rng(int(sys.argv[2]))
            print("ready", flush=True)
            while True:
                ids = rng.integers(0, 400, 4)
                y = ids[:, None].astype(np.float32) + np.arange(50_000, dtype=np.float32)
                cache.store(ids, ids, y)
        """)
        root = Path(prefix_cache.__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        rng = np.random.default_rng(0)
        found = 0
        for seed in range(4):
            process = subprocess.Popen(
                [sys.executable, "-c", program, str(tmp_path), str(seed)],
                stdout=subprocess.PIPE,
                env=environment,
            )
            assert process.stdout is not None
            with process, process.stdout:
                assert process.stdout.readline() == b"ready\n"
                time.sleep(rng.uniform(0.005, 0.25))
                process.send_signal(signal.SIGKILL if os.name == "posix" else signal.SIGTERM)
            with PrefixCache(tmp_path, examples=400, dtype="float32") as cache:
                cache.open("key", jax.ShapeDtypeStruct((50_000,), np.float32))
                for i in range(400):
                    y = cache.lookup([i], np.array([i]))
                    if y is not None:
                        found += 1
                        expected = np.float32(i) + np.arange(50_000, dtype=np.float32)
                        np.testing.assert_array_equal(y, [expected])
        assert found > 20

    def test_torn_writes(self, tmp_path, monkeypatch):
        """A write that stops after any part of a record, as a kill may leave it."""
        whole = PrefixCache._write
        for part in range(0, 49, 7):  # of 49 bytes
            with _open(tmp_path, key=str(part)) as cache:
                _fill(cache, [0])
                with monkeypatch.context() as patch:

                    def torn(self, i, row, part=part):
                        whole(
                            self, i, np.concatenate([row[:part], np.full(len(row) - part, 7, "u1")])
                        )
                        raise KeyboardInterrupt

                    patch.setattr(PrefixCache, "_write", torn)
                    with pytest.raises(KeyboardInterrupt):
                        _fill(cache, [0])
                assert not _has(cache, 0)
            with _open(tmp_path, key=str(part)) as cache:
                assert not _has(cache, 0)


class TestFailure:
    def test_disk_full(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        with _open(tmp_path) as cache:
            _fill(cache, [0])
            monkeypatch.setattr(PrefixCache, "_write", full)
            with pytest.warns(UserWarning, match="switched off.*No space left") as caught:
                _fill(cache, [1])
                _fill(cache, [2])
            assert len(caught) == 1
            assert not _has(cache, 0)
            cache.open("other", LIKE)
            assert not _has(cache, 0)

    @pytest.mark.skipif(not os.path.exists("/dev/full"), reason="there is no such device")
    def test_device_that_is_full(self, tmp_path):
        with _open(tmp_path):
            pass
        (tmp_path / "prefix.bin").unlink()
        (tmp_path / "prefix.bin").symlink_to("/dev/full")
        with _open(tmp_path) as cache:
            with pytest.warns(UserWarning, match="No space left"):
                _fill(cache, [1])
            assert not _has(cache, 1)

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.warns(UserWarning, match="switched off"):
            cache = _open(tmp_path / "file" / "cache")
        _fill(cache, [0])
        assert not _has(cache, 0)
        cache.close()

    def test_read_error(self, tmp_path, monkeypatch):
        def broken(*_):
            raise OSError(errno.EIO, "Input/output error")

        with _open(tmp_path) as cache:
            _fill(cache, [0])
            monkeypatch.setattr(PrefixCache, "_read", broken)
            with pytest.warns(UserWarning, match="Input/output error"):
                assert not _has(cache, 0)
            assert cache.misses == 1

    @pytest.mark.skipif(prefix_cache.fcntl is None, reason="there are no locks")
    def test_lock(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [0])
            second = PrefixCache(tmp_path, examples=20)
            with pytest.raises(ValueError, match="open already.*its own directory"):
                second.open("key", LIKE)
            with pytest.raises(ValueError, match="not open"):
                second.lookup([0], _inputs([0]))
            program = (
                "import sys, jax, numpy as np\n"
                "from priorityprop_jax.partial.prefix_cache import PrefixCache\n"
                "PrefixCache(sys.argv[1], examples=20).open('other', {})\n"
            )
            root = Path(prefix_cache.__file__).parents[2]
            done = subprocess.run(
                [sys.executable, "-c", program, str(tmp_path)],
                env=os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"},
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 1 and "open already" in done.stderr
            assert _has(cache, 0)
        second.open("key", LIKE)
        assert _has(second, 0)
        second.close()

    @pytest.mark.skipif(prefix_cache.fcntl is None, reason="there are no locks")
    def test_a_dropped_cache_lets_go_of_its_folder(self, tmp_path):
        cache = _open(tmp_path)
        _fill(cache, [0])
        del cache
        gc.collect()
        with _open(tmp_path) as cache:
            assert _has(cache, 0)


class TestArguments:
    @pytest.mark.parametrize(
        ("options", "error", "message"),
        [
            ({"directory": 3}, TypeError, "directory must be a path"),
            ({"examples": 0}, ValueError, "examples must be at least 1, got 0"),
            ({"examples": 2.0}, TypeError, "examples must be a whole number"),
            ({"max_bytes": 0}, ValueError, "max_bytes must be at least 1"),
            ({"max_bytes": True}, TypeError, "max_bytes must be a whole number"),
            ({"dtype": "float16"}, ValueError, "dtype must be 'bfloat16' or 'float32'"),
        ],
    )
    def test_construction(self, options, error, message):
        with pytest.raises(error, match=message):
            PrefixCache(**({"directory": None, "examples": 3} | options))

    @pytest.mark.parametrize(
        ("ids", "message"),
        [
            ([-1, 0], "ids must be from 0 on.*got -1 to 0"),
            ([0.0, 1.0], "ids must be whole numbers"),
            ([True, False], "ids must be whole numbers"),
            ([[0, 1]], "ids must be whole numbers"),
            ([0, 20], "below the 20 examples"),
            ([0], "one row an id"),
        ],
    )
    def test_ids(self, ids, message):
        with _open(None) as cache:
            with pytest.raises(ValueError, match=message):
                cache.lookup(np.array(ids), _inputs([0, 1]))
            with pytest.raises(ValueError, match=message):
                cache.store(np.array(ids), _inputs([0, 1]), _outputs([0, 1]))

    def test_open_and_outputs(self):
        cache = PrefixCache(None, examples=1)
        with pytest.raises(ValueError, match="not open"):
            cache.lookup([0], ())
        with pytest.raises(TypeError, match="hidden"):
            cache.open("key", {"hidden": 1.0})
        with pytest.raises(TypeError, match="key<fry>"):
            cache.open("key", jax.eval_shape(lambda: jax.random.key(0)))
        cache.open("key", LIKE)
        y = _outputs([0])
        with pytest.raises(ValueError, match="outputs must be .*mask.*bool.*got.*int64"):
            cache.store([0], _inputs([0]), y | {"mask": np.zeros((1, 3), np.int64)})
        with pytest.raises(ValueError, match="outputs must be"):
            cache.store([0], _inputs([0]), y | {"hidden": np.zeros((1, 5, 3), np.float32)})
        with pytest.raises(ValueError, match="outputs must be"):
            cache.store([0], _inputs([0]), y["hidden"])


class TestFingerprint:
    def test_everything_counts(self):
        kernel = np.arange(6, dtype=np.float32).reshape(2, 3)
        changed = kernel.copy()
        changed[1, 2] = -changed[1, 2]
        trees = [
            ({"kernel": kernel},),
            ({"kernel": changed},),
            ({"kernel": kernel.T},),
            ({"kernel": kernel.reshape(3, 2)},),
            ({"kernel": kernel.view(np.int32)},),
            ({"bias": kernel},),
            ({"a": {"kernel": kernel}},),
            ({"kernel": kernel, "key": jax.random.key(0)},),
            ({"kernel": kernel, "key": jax.random.key(1)},),
            ({"kernel": kernel.astype(jnp.bfloat16)},),
            ({"kernel": kernel}, "ab", "c"),
            ({"kernel": kernel}, "a", "bc"),
            ({},),
            ({"kernel": kernel[:0]},),
            (0,),
            (1,),
        ]
        prints = [fingerprint(*tree) for tree in trees]
        assert len(set(prints)) == len(prints)
        assert prints == [fingerprint(*jax.tree.map(lambda leaf: leaf, tree)) for tree in trees]
        assert prints[0] == fingerprint({"kernel": jnp.asarray(kernel)})
