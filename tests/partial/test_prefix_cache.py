"""Tests of `priorityprop_jax.partial.prefix_cache`."""

from __future__ import annotations

import errno
import gc
import os
import subprocess
import sys
import textwrap
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
        record = 4 + 30 + 3 + 4 + 4  # Checksum, hidden, mask, length, half.
        with pytest.warns(UserWarning, match=f"holds 5 of 20.*raise max_bytes to {20 * record}"):
            cache = _open(home, max_bytes=5 * record + record - 1)
        ids = list(range(20))
        _fill(cache, ids)
        assert [i for i in ids if _has(cache, i)] == ids[:5]
        assert cache.lookup([4, 5], _inputs([4, 5])) is None
        assert cache.misses == 15 + 2
        cache.close()
        if home is not None:
            (file,) = home.iterdir()
            assert file.stat().st_size == 5 * record

    def test_memory_is_taken_as_it_is_filled(self):
        with _open(None, examples=10**7, max_bytes=2**30) as cache:
            ids = [0, 5_000_000, 3]
            _fill(cache, ids)
            assert [_has(cache, i) for i in (*ids, 1)] == [True, True, True, False]

    def test_nothing_fits(self, home):
        with pytest.warns(UserWarning, match="holds 0 of 20"):
            cache = _open(home, max_bytes=1)
        _fill(cache, [0])
        assert not _has(cache, 0)
        cache.close()


class TestOnTheDisk:
    def test_counts_once_it_is_closed(self, tmp_path):
        cache = _open(tmp_path)
        _fill(cache, [0])
        (filling,) = tmp_path.iterdir()
        copy = filling.read_bytes()
        cache.close()
        (kept,) = tmp_path.iterdir()
        assert kept.suffix == ".prefix" and kept.read_bytes() == copy
        # As a kill would have left it.
        kept.rename(filling)
        with _open(tmp_path) as cache:
            assert not _has(cache, 0)
        assert not filling.exists()

    def test_one_that_is_there_goes_on(self, tmp_path):
        for ids in ([0], [1], [2]):
            with _open(tmp_path) as cache:
                assert [_has(cache, i) for i in range(3)] == [i < ids[0] for i in range(3)]
                _fill(cache, ids)

    def test_cut_short(self, tmp_path):
        with _open(tmp_path) as cache:
            _fill(cache, [0, 1])
        (kept,) = tmp_path.iterdir()
        os.truncate(kept, kept.stat().st_size - 1)
        with _open(tmp_path) as cache:
            assert not _has(cache, 0) and not _has(cache, 1)

    def test_a_dropped_cache_is_kept_and_lets_go(self, tmp_path):
        cache = _open(tmp_path)
        _fill(cache, [0])
        del cache
        gc.collect()
        with _open(tmp_path) as cache:
            assert _has(cache, 0)

    def test_several_share_a_directory(self, tmp_path):
        with _open(tmp_path) as first:
            _fill(first, [0])
            with _open(tmp_path) as second:
                assert not _has(second, 0)
                _fill(second, [1])
                assert _has(first, 0) and not _has(first, 1)
            assert _has(first, 0)
        with _open(tmp_path) as cache:
            assert [_has(cache, i) for i in range(2)] == [False, True]

    def test_kill_9(self, tmp_path):
        """A run that is killed leaves nothing that is used; one that ends leaves all it stored."""
        program = textwrap.dedent("""
            import os, signal, sys
            import jax, numpy as np
            from priorityprop_jax.partial.prefix_cache import PrefixCache
            cache = PrefixCache(sys.argv[1], examples=4, dtype="float32")
            cache.open("key", jax.ShapeDtypeStruct((50_000,), np.float32))
            print(cache.lookup([0, 1], np.arange(2)) is not None)
            cache.store([0, 1], np.arange(2), np.ones((2, 50_000), np.float32))
            sys.stdout.flush()
            if sys.argv[2] == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
        """)
        root = Path(prefix_cache.__file__).parents[2]
        environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
        found = [
            subprocess.run(
                [sys.executable, "-c", program, str(tmp_path), how],
                env=environment, capture_output=True, text=True, check=False,
            ).stdout.strip()
            for how in ("killed", "ends", "killed", "ends")
        ]  # fmt: skip
        # The second one that was killed had taken what was there.
        assert found == ["False", "False", "True", "False"]


class TestFailure:
    def test_disk_full(self, tmp_path, monkeypatch):
        def full(*_):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
        with pytest.warns(UserWarning, match="switched off.*No space left") as caught:
            cache = _open(tmp_path)
        assert len(caught) == 1 and not list(tmp_path.iterdir())
        _fill(cache, [0])
        assert not _has(cache, 0) and cache.misses == 1
        cache.open("other", LIKE)
        assert not _has(cache, 0)

    def test_folder_that_cannot_be_made(self, tmp_path):
        (tmp_path / "file").write_bytes(b"")
        with pytest.warns(UserWarning, match="switched off"):
            cache = _open(tmp_path / "file" / "cache")
        _fill(cache, [0])
        assert not _has(cache, 0)
        cache.close()


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
