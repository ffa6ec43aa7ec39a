"""Layers with sparse weights: against dense layers, and as parts of a model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx

from priorityprop_jax.sparse.layers import SparseConv, SparseIndex, SparseLinear
from priorityprop_jax.sparse.pattern import carry, make_pattern, mask_of
from priorityprop_jax.sparse.swap import sparse_start


def check(pattern):
    """Index arrays by row and by column go through the places of one mask."""
    again = make_pattern(mask_of(pattern), capacity=pattern.capacity)
    for found, expected in zip(*map(jax.tree.leaves, (pattern, again)), strict=True):
        assert found.dtype == expected.dtype == jnp.int32
        np.testing.assert_array_equal(found, expected)


def pruned(layer, share=0.7, seed=0):
    """A dense layer with so many zeros, and a bias that is none."""
    rng = np.random.default_rng(seed)
    kernel = rng.normal(size=layer.kernel.shape) * (rng.random(layer.kernel.shape) >= share)
    layer.kernel.set_value(jnp.asarray(kernel, layer.kernel.dtype))
    if layer.bias is not None:
        layer.bias.set_value(jnp.asarray(rng.normal(size=layer.bias.shape), layer.bias.dtype))
    return layer


@functools.cache
def compiled(structure):
    """The output of a layer and the gradients of its parameters and input."""

    @jax.jit
    def run(params, rest, x):
        def loss(params, x):
            y = nnx.merge(structure, params, rest)(x)
            return jnp.sum(jnp.sin(y)), y

        return jax.grad(loss, (0, 1), has_aux=True)(params, x)

    return run


def run(layer, x):
    structure, params, rest = nnx.split(layer, nnx.Param, ...)
    (params, dx), y = compiled(structure)(params, rest, x)
    return y, dx, nnx.to_pure_dict(params)


# Weights are put in where they matter: to draw them at first would have to be compiled.
PLAIN = {"kernel_init": nnx.initializers.ones_init(), "rngs": nnx.Rngs(0)}
DENSE = {
    "linear": (lambda: nnx.Linear(6, 4, **PLAIN), (2, 3, 6)),
    "image": (
        lambda: nnx.Conv(4, 6, (3, 2), (1, 2), padding="SAME", feature_group_count=2, **PLAIN),
        (2, 5, 6, 4),
    ),
    "sequence": (
        lambda: nnx.Conv(4, 6, 4, padding="CIRCULAR", kernel_dilation=3, use_bias=False, **PLAIN),
        (2, 3, 8, 4),
    ),
}


@pytest.mark.parametrize("name", DENSE)
def test_layers_do_what_dense_ones_do(name):
    make, shape = DENSE[name]
    dense = pruned(make())
    kind = SparseConv if isinstance(dense, nnx.Conv) else SparseLinear
    layer = kind.from_dense(dense, capacity=int((dense.kernel[...] != 0).sum()) + 3)
    x = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    y, dx, params = run(layer, x)
    dense_y, dense_dx, dense_params = run(dense, x)
    pairs = [(y, dense_y), (dx, dense_dx)]
    # Values stand in the order of the kernel as a matrix (out, in, *sizes).
    axes = (dense.kernel.ndim - 1, dense.kernel.ndim - 2, *range(dense.kernel.ndim - 2))
    places = np.asarray(dense.kernel[...]).transpose(axes) != 0
    values = np.asarray(dense_params["kernel"]).transpose(axes)[places]
    pairs.append((params["values"], np.append(values, np.zeros(3))))
    if dense.bias is None:
        assert layer.bias is None and list(params) == ["values"]
    else:
        pairs.append((params["bias"], dense_params["bias"]))
    for found, expected in pairs:
        assert found.shape == expected.shape
        assert np.max(np.abs(found - expected)) <= 5e-6 * np.max(np.abs(expected))

    back = layer.to_dense()
    assert type(back) is type(dense)
    assert np.array_equal(back.kernel[...], dense.kernel[...])
    assert np.array_equal(layer.mask(), np.asarray(dense.kernel[...]) != 0)
    if dense.bias is not None:
        assert np.array_equal(back.bias[...], dense.bias[...])
    for option in ("strides", "padding", "kernel_dilation", "feature_group_count", "dtype"):
        assert getattr(back, option, None) == getattr(dense, option, None)
    # And again, by the mask rather than by what is not zero.
    again = kind.from_dense(back, np.ones(back.kernel.shape, bool))
    assert again.nonzeros == back.kernel.size
    assert np.array_equal(again.to_dense().kernel[...], dense.kernel[...])


def test_dtypes():
    linear = functools.partial(SparseLinear, 6, 4, mask=np.eye(6, 4), **PLAIN)
    conv = functools.partial(SparseConv, 6, 4, 1, mask=np.eye(6, 4)[None], **PLAIN)
    for make, dtype, param_dtype, of_x, expected in [
        (linear, None, jnp.float32, jnp.float32, jnp.float32),
        (linear, None, jnp.bfloat16, jnp.bfloat16, jnp.bfloat16),
        (linear, None, jnp.bfloat16, jnp.float32, jnp.float32),
        (linear, jnp.bfloat16, jnp.float32, jnp.float32, jnp.bfloat16),
        (conv, jnp.float16, jnp.bfloat16, jnp.float32, jnp.float16),
    ]:
        layer = make(dtype=dtype, param_dtype=param_dtype)
        assert layer.values.dtype == layer.bias.dtype == param_dtype
        assert jax.eval_shape(layer, jnp.ones((3, 6), of_x)).dtype == expected
        dense = layer.to_dense()
        assert dense.kernel.dtype == param_dtype and dense.dtype == dtype
        assert type(layer).from_dense(dense).values.dtype == param_dtype


def test_places_at_random():
    layer = SparseLinear(6, 4, sparsity=0.75, rngs=nnx.Rngs(0))
    assert layer.nonzeros == layer.values.size == 6
    assert np.asarray(layer.values[...]).all()
    other = SparseLinear(6, 4, sparsity=0.75, rngs=nnx.Rngs(1))
    assert not np.array_equal(layer.mask(), other.mask())
    empty = SparseLinear(6, 4, sparsity=1.0, rngs=nnx.Rngs(0))
    assert empty.nonzeros == 0 and empty.values.shape == (1,)
    assert not np.asarray(jax.jit(empty)(jnp.ones((2, 6)))).any()


def test_index_arrays_are_state_and_no_parameters():
    layer = SparseLinear(6, 4, mask=np.arange(24).reshape(6, 4) % 2, **PLAIN)
    names = {"row_starts", "columns", "column_starts", "rows", "order"}
    assert set(nnx.to_pure_dict(nnx.state(layer, nnx.Param))) == {"values", "bias"}
    assert set(nnx.to_pure_dict(nnx.state(layer, SparseIndex))["index"]) == names
    assert not nnx.to_pure_dict(nnx.state(layer, nnx.Not(nnx.Any(nnx.Param, SparseIndex))))


class Model(nnx.Module):
    def __init__(self, seed):
        rng, shape = np.random.default_rng(seed), (2, 2, 3, 4)
        mask = np.zeros(shape, bool)
        mask.flat[rng.permutation(mask.size)[:20]] = True

        def normal(key, shape, dtype):
            return jnp.asarray(rng.normal(size=shape), dtype)

        options = {"kernel_init": normal, "rngs": nnx.Rngs(seed)}
        self.conv = SparseConv(3, 4, (2, 2), mask=mask, **options)
        mask = rng.random((16, 5)) < 0.4
        self.linear = SparseLinear(16, 5, mask=mask, capacity=40, **options)

    def __call__(self, x):
        return self.linear(jax.nn.relu(self.conv(x)).reshape(len(x), -1))


X = np.random.default_rng(4).normal(size=(6, 2, 2, 3)).astype(np.float32)


def test_other_masks_compile_nothing_and_carry_moments():
    model, optimizer, traces = Model(0), optax.adam(0.01), []
    structure = nnx.graphdef(model)

    @jax.jit
    def step(params, rest, state, x):
        traces.append(None)
        gradient = jax.grad(lambda params: jnp.sum(nnx.merge(structure, params, rest)(x) ** 2))
        updates, state = optimizer.update(gradient(params), state)
        return optax.apply_updates(params, updates), state

    def train(state, times=1):
        for _ in range(times):
            _, params, rest = nnx.split(model, nnx.Param, ...)
            params, state = step(params, rest, state, X)
            nnx.update(model, params)
        return state

    state = train(jax.jit(optimizer.init)(nnx.state(model, nnx.Param)), 3)
    layer = model.linear
    before, kernel = layer.mask(), np.asarray(layer.kernel())
    pattern, moment = layer.pattern, np.asarray(state[0].mu["linear"]["values"][...])
    mask = np.random.default_rng(5).random(before.shape) < 0.4
    source = layer.change_mask(mask)
    check(layer.pattern)
    assert np.array_equal(layer.mask(), mask)
    assert np.array_equal(layer.kernel(), np.where(mask & before, kernel, 0))
    state = jax.tree.map(
        lambda leaf: carry(leaf, source) if leaf.shape == layer.values.shape else leaf, state
    )
    dense = np.zeros(before.shape[::-1])
    dense[before.T] = moment[: before.sum()]
    moved = np.asarray(state[0].mu["linear"]["values"][...])
    np.testing.assert_array_equal(moved[: mask.sum()], np.where(before.T, dense, 0)[mask.T])
    assert not moved[mask.sum() :].any()
    assert jax.tree.structure(layer.pattern) == jax.tree.structure(pattern)
    before = np.asarray(layer.values[...])
    train(state)
    assert len(traces) == 1
    assert not np.array_equal(layer.values[...], before)
    with pytest.raises(ValueError, match=r"must be of shape \(16, 5\), got \(5, 16\)"):
        layer.change_mask(mask.T)
    with pytest.raises(ValueError, match="80 places, more than the capacity, 40"):
        layer.change_mask(np.ones((16, 5)))


def test_checkpoints_hold_places_and_values(tmp_path):
    model, other = Model(0), Model(1)
    assert not np.array_equal(model.linear.mask(), other.linear.mask())
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.to_pure_dict(nnx.state(model)))
        checkpointer.wait_until_finished()
        structure, state = nnx.split(other)
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, nnx.to_pure_dict(state))
        restored = checkpointer.restore(tmp_path / "model", target)
    nnx.replace_by_pure_dict(state, restored)
    other = nnx.merge(structure, state)
    for layer, expected in ((other.linear, model.linear), (other.conv, model.conv)):
        check(layer.pattern)
        assert np.array_equal(layer.mask(), expected.mask())
        assert np.array_equal(layer.kernel(), expected.kernel())
        assert layer.index["rows"][...].dtype == jnp.int32
    np.testing.assert_array_equal(jax.jit(other)(X), jax.jit(model)(X))


def test_options_that_do_not_fit():
    linear = functools.partial(SparseLinear, 6, 4, **PLAIN)
    conv = functools.partial(SparseConv, 6, 4, (2, 2), **PLAIN)
    for make, options, message in [
        (linear, {}, "give either sparsity=, for places at random, or mask="),
        (linear, {"sparsity": 0.5, "mask": np.ones((6, 4))}, "give either sparsity="),
        (linear, {"mask": np.ones((4, 6))}, r"must be of the kernel's shape, \(6, 4\)"),
        (linear, {"sparsity": 1.5}, "sparsity"),
        (linear, {"sparsity": 0.5, "capacity": 3}, "more than the capacity, 3"),
        (conv, {}, "give either sparsity="),
        (conv, {"mask": np.ones((2, 2, 6, 5))}, "must be of the kernel's shape"),
        (conv, {"sparsity": 0.5, "feature_group_count": 4}, "4 groups do not divide 6 channels"),
        (conv, {"sparsity": 0.5, "feature_group_count": 0}, "0 groups do not divide"),
    ]:
        with pytest.raises(ValueError, match=message):
            make(**options)
    with pytest.raises(TypeError, match=r"must be an nnx\.Linear, got Conv"):
        SparseLinear.from_dense(nnx.Conv(2, 2, 2, **PLAIN))
    with pytest.raises(TypeError, match=r"must be an nnx\.Conv, got Linear"):
        SparseConv.from_dense(nnx.Linear(2, 2, **PLAIN))
    with pytest.raises(ValueError, match="one or two axes"):
        SparseConv.from_dense(nnx.Conv(2, 2, (1, 1, 1), **PLAIN))
    with pytest.raises(ValueError, match="input_dilation"):
        SparseConv.from_dense(nnx.Conv(2, 2, 2, input_dilation=2, **PLAIN))
    with pytest.raises(ValueError, match="the mask must be of"):
        SparseLinear.from_dense(nnx.Linear(6, 4, **PLAIN), np.ones((4, 6)))


def start_sparse():
    model = nnx.Sequential(
        nnx.Conv(3, 4, (2, 2), rngs=nnx.Rngs(0)), nnx.Linear(4, 8, rngs=nnx.Rngs(1))
    )
    sparse_start(model, 0.75, layers=nnx.Any(nnx.Linear, nnx.Conv))
    return model


@pytest.mark.parametrize(
    "make",
    [
        lambda: SparseLinear(6, 4, sparsity=0.75, rngs=nnx.Rngs(0)),
        lambda: SparseConv(6, 4, (2,), sparsity=1.0, rngs=nnx.Rngs(0)),
        lambda: SparseLinear(6, 4, sparsity=0.5, capacity=20, rngs=nnx.Rngs(0)),
        lambda: SparseLinear(6, 4, mask=np.eye(6, 4), rngs=nnx.Rngs(0)),
        start_sparse,
    ],
)
def test_layers_are_the_same_made_under_transformations(make):
    plain = nnx.state(make())
    compiled = nnx.state(nnx.jit(make)())
    abstract = nnx.state(nnx.eval_shape(make))
    for a, b, c in zip(*map(jax.tree.leaves, (plain, compiled, abstract)), strict=True):
        np.testing.assert_allclose(a, b, rtol=5e-6)
        assert (a.shape, a.dtype) == (b.shape, b.dtype) == (c.shape, c.dtype)


def test_a_checkpoint_restores_into_a_model_that_was_never_made(tmp_path):
    model = start_sparse()
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "model", nnx.state(model))
        checkpointer.wait_until_finished()
        abstract = nnx.eval_shape(start_sparse)
        graph, state = nnx.split(abstract)
        device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        state = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), state
        )
        restored = nnx.merge(graph, checkpointer.restore(tmp_path / "model", state))
    for layer, expected in zip(restored.layers, model.layers, strict=True):
        check(layer.pattern)
        np.testing.assert_array_equal(layer.kernel(), expected.kernel())


def test_the_output_has_the_type_that_was_preferred():
    x = np.random.default_rng(0).normal(size=(3, 5, 64)).astype(np.float32)
    for dense in (
        nnx.Linear(64, 8, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)),
        nnx.Conv(
            64, 8, 3, dtype=jnp.bfloat16, preferred_element_type=jnp.float32, rngs=nnx.Rngs(0)
        ),
        nnx.Linear(64, 8, preferred_element_type=jnp.bfloat16, rngs=nnx.Rngs(0)),
    ):
        kind = SparseConv if isinstance(dense, nnx.Conv) else SparseLinear
        layer = kind.from_dense(pruned(dense))
        y, expected = jax.jit(layer)(x), jax.jit(dense)(x)
        assert y.dtype == expected.dtype == jnp.float32  # also by the bias
        tolerance = 2e-5 if dense.preferred_element_type == jnp.float32 else 2e-2
        np.testing.assert_allclose(y, expected, rtol=tolerance, atol=tolerance)
        assert layer.to_dense().preferred_element_type == dense.preferred_element_type


def test_ranks_are_promoted_by_nobody_else():
    with jax.numpy_rank_promotion("raise"):
        linear = SparseLinear(6, 4, sparsity=0.5, rngs=nnx.Rngs(0))
        conv = SparseConv(6, 4, 2, sparsity=0.5, rngs=nnx.Rngs(0))
        for layer in (linear, conv):
            run(layer, np.ones((2, 3, 6), np.float32))


def test_damaged_places_are_refused():
    layer = SparseLinear(6, 4, mask=np.arange(24).reshape(6, 4) % 2, **PLAIN)
    for name, change in [
        ("columns", lambda columns: columns + 6),
        ("columns", lambda columns: columns[::-1]),
        ("row_starts", lambda starts: starts[::-1]),
        ("order", lambda order: order * 0),
    ]:
        kept = layer.index[name][...]
        layer.index[name].set_value(change(kept))
        with pytest.raises(ValueError, match="row_starts|columns|order"):
            layer.check()
        layer.index[name].set_value(kept)
    layer.check()
