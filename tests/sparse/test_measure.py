"""Swapping what is measured to be faster."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax.core import timing
from priorityprop_jax.sparse import (
    SparseConv,
    SparseLinear,
    native,
    prune,
    sparse_start,
    sparsify,
)
from priorityprop_jax.sparse import (
    measure as module,
)
from priorityprop_jax.sparse.measure import layer_table


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0, dropout=1)
        self.conv = nnx.Conv(2, 4, (3,), padding="CIRCULAR", rngs=rngs)
        self.shared = nnx.Linear(4, 4, rngs=rngs)
        self.unused = nnx.Linear(4, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.output = nnx.Linear(4, 3, rngs=rngs)

    def __call__(self, x, shift):
        x = self.conv(x) + shift
        x = self.dropout(self.norm(self.shared(self.shared(x)[:, 0])))
        return self.output(x)


def pruned(sparsity=0.9):
    model = Net()
    prune(model, sparsity)
    return model


SAMPLE = (jnp.ones((5, 6, 2)), 1.0)


def timed(dense, sparse, seen):
    """In place of a clock: known times for layers, and what they were asked for."""

    def milliseconds(layer, other, inputs):
        seen[type(other).__name__] = [(x.shape, x.dtype) for x in inputs]
        times = (dense, sparse) if isinstance(layer, nnx.Linear) else (sparse, dense)
        return np.array([[each, each] for each in times])  # median and fastest

    return milliseconds


def test_a_median_that_is_lower_by_chance_alone_is_not_swapped(monkeypatch):
    rounds = [[3.0, 2.7, 3.1, 3.0, 2.8], [2.7, 2.7, 2.9, 2.7, 2.7]]
    monkeypatch.setattr(timing, "in_turns", lambda runs, seconds, least: rounds)
    rows = [row for row in sparsify(pruned(), SAMPLE) if row.dense_ms is not None]
    assert rows and {row.choice for row in rows} == {"dense"}
    assert all(row.sparse_ms / row.dense_ms == pytest.approx(0.9) for row in rows)


def test_what_is_faster_is_swapped(monkeypatch, capsys):
    seen = {}
    monkeypatch.setattr(module, "_milliseconds", timed(2.0, 1.0, seen))
    model = pruned()
    expected = [np.asarray(x) for x in jax.tree.leaves(nnx.state(model.norm))]
    rows = sparsify(model, SAMPLE)
    # One input for each call of a layer, with the batch that it has there; a convolution's as it is
    # given, before padding.
    f32 = jnp.float32
    assert seen == {
        "SparseConv": [((5, 6, 2), f32)],
        "SparseLinear": [((5, 6, 4), f32), ((5, 4), f32)],
    }
    assert type(model.shared) is SparseLinear and type(model.conv) is nnx.Conv
    assert type(model.unused) is type(model.output) is nnx.Linear
    choices = [(row.layer, row.dense_ms, row.sparse_ms, row.choice) for row in rows]
    assert choices == [
        ("conv", 1.0, 2.0, "dense"),
        ("shared", 2.0, 1.0, "sparse"),
        ("unused", None, None, "dense"),
        ("output", None, None, "dense"),
    ]
    assert rows[1].sparsity == pytest.approx(14 / 16) and rows[3].sparsity == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].split() == "layer sparsity dense ms sparse ms backend choice".split()
    assert printed[2].split() == ["shared", "87.5%", "2.000", "1.000", rows[1].backend, "sparse"]
    # Tracing the call has left the model as it was.
    for old, new in zip(expected, jax.tree.leaves(nnx.state(model.norm)), strict=True):
        np.testing.assert_array_equal(old, new)
    assert int(model.dropout.rngs.count[...]) == 0
    model(*SAMPLE)


def test_only_what_is_sparse_enough_is_tried(monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "_milliseconds", timed(2.0, 1.0, seen))
    model = pruned(0.75)
    sparsify(model, SAMPLE)
    assert not seen
    sparsify(model, SAMPLE, min_sparsity=0.7)
    assert set(seen) == {"SparseConv", "SparseLinear"}
    # What is sparse already is no layer to choose for.
    assert [row.layer for row in sparsify(model, SAMPLE)] == ["conv", "unused", "output"]


def test_times_are_measured_and_large_sparse_layers_are_faster(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.05)
    rngs = nnx.Rngs(0)
    model = nnx.Sequential(
        nnx.Linear(512, 1024, rngs=rngs), nnx.relu, nnx.Linear(1024, 8, rngs=rngs)
    )
    prune(model, 0.99)
    x = jax.random.normal(jax.random.key(0), (128, 512))
    expected = model(x)
    row, output = sparsify(model, x)
    faster = 0 < row.sparse_ms < row.dense_ms
    assert row.choice == ("sparse" if faster else "dense")
    assert faster or not native.native_status()[0]  # JAX alone promises nothing
    assert output.choice == "dense"
    np.testing.assert_allclose(model(x), expected, rtol=1e-4, atol=1e-5)


def test_convolutions_are_measured_too(monkeypatch):
    monkeypatch.setattr(module, "SECONDS", 0.01)
    model = pruned()
    times = lambda runs, _: np.array([[run() and i, i] for i, run in enumerate(runs, 1)])  # noqa: E731
    monkeypatch.setattr(module, "compared", times)
    rows = sparsify(model, SAMPLE)
    assert [row.dense_ms for row in rows][:2] == [1000.0, 2000.0]  # one call, and two
    assert isinstance(model.conv, nnx.Conv) and not isinstance(model.conv, SparseConv)


def test_bad_input_is_refused():
    with pytest.raises(TypeError, match="got function"):
        sparsify(lambda x: x, SAMPLE)
    with pytest.raises(ValueError, match=r"min_sparsity must be in \[0, 1\], got 80"):
        sparsify(Net(), SAMPLE, min_sparsity=80)
    with pytest.raises(ValueError, match=r"SparseLinear\.from_dense"):
        sparsify(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones((1, 2)))


def test_a_table_of_layers():
    model = nnx.Sequential(nnx.Linear(4, 6, rngs=nnx.Rngs(0)), nnx.Linear(6, 1, rngs=nnx.Rngs(0)))
    sparse_start(model, 0.75)
    first, last = layer_table(model)
    assert first == {"layer": "layers/0", "shape": [4, 6], "nonzeros": 6, "weights": 24}
    assert last == {"layer": "layers/1", "shape": [6, 1], "nonzeros": 6, "weights": 6}


def test_layers_that_share_a_kernel_stay_dense(monkeypatch):
    seen = {}
    monkeypatch.setattr(module, "_milliseconds", timed(2.0, 1.0, seen))
    model = pruned()
    model.unused.kernel = model.shared.kernel
    sparsify(model, SAMPLE)
    assert set(seen) == {"SparseConv"} and model.unused.kernel is model.shared.kernel
