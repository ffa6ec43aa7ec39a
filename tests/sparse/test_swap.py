"""Pruning, swapping and masking the layers of a model in place."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.meprop.inject import meprop
from priorityprop_jax.sparse import (
    SparseConv,
    SparseLinear,
    apply_further_mask,
    densify,
    prune,
    sparse_start,
)
from priorityprop_jax.sparse.swap import layers_to_prune, replace, sparse_layers


class Net(nnx.Module):
    """Layers in all places where a model may keep them."""

    def __init__(self, seed: int = 0):
        rngs = nnx.Rngs(seed)
        # As few shapes as show something: each is compiled by itself.
        self.stem = nnx.Conv(2, 8, (3, 3), rngs=rngs)
        self.blocks = nnx.List([nnx.Linear(8, 8, rngs=rngs), nnx.Linear(8, 8, rngs=rngs)])
        self.named = nnx.Dict(inner=nnx.Sequential(nnx.Linear(8, 8, rngs=rngs), nnx.relu))
        self.again = self.blocks[1]
        self.output = nnx.Linear(8, 8, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.stem(x)).mean((1, 2))
        for block in (*self.blocks, self.again):
            x = nnx.relu(block(x))
        return self.output(self.named["inner"](x))


PATHS = ["stem", "blocks/0", "blocks/1", "named/inner/layers/0"]
X = jax.random.normal(jax.random.key(0), (3, 5, 5, 2))


def forward(model, x):
    """Compiled, without the new order of attributes that `nnx.jit` leaves."""
    graph, state = nnx.split(model)
    return jax.jit(lambda state, x: nnx.merge(graph, state)(x))(state, x)


def kernels(model):
    return {path: np.asarray(layer.kernel[...]) for path, layer in layers_to_prune(model).items()}


def test_layers_are_found_wherever_they_stand_but_for_the_last():
    model = Net()
    assert list(layers_to_prune(model)) == PATHS
    assert list(layers_to_prune(model, nnx.Conv)) == ["stem"]
    assert list(layers_to_prune(model, nnx.PathContains("output"))) == ["output"]
    with pytest.raises(ValueError, match="none is named"):
        layers_to_prune(model, nnx.BatchNorm)
    with pytest.raises(ValueError, match="the last is left out"):
        layers_to_prune(nnx.Linear(2, 2, rngs=nnx.Rngs(0)))


def test_layers_with_another_product_or_kind_are_left_alone():
    model = Net()
    meprop(model, 2, layers=nnx.PathContains("named"))
    assert list(layers_to_prune(model)) == PATHS[:3]

    class Special(nnx.Linear):
        pass

    model.blocks[0] = Special(8, 8, rngs=nnx.Rngs(0))
    assert list(layers_to_prune(model)) == ["stem", "blocks/1"]


@pytest.mark.parametrize("scope", ["uniform", "global"])
def test_prune_keeps_the_largest(scope):
    model = Net()
    before = kernels(model)
    masks = prune(model, 0.75, scope=scope)
    after = kernels(model)
    assert list(masks) == PATHS
    for path, mask in masks.items():
        np.testing.assert_array_equal(after[path], np.where(mask, before[path], 0))
        if scope == "uniform":
            assert mask.sum() == round(mask.size / 4)
    everything = np.abs(np.concatenate([kernel.ravel() for kernel in before.values()]))
    kept = np.concatenate([np.asarray(mask).ravel() for mask in masks.values()])
    if scope == "global":
        assert everything[kept].min() >= everything[~kept].max()
    assert np.asarray(model.output.kernel[...]).all()


def test_prune_by_masks_of_others():
    model = Net()
    rng = np.random.default_rng(0)
    mask = rng.random((8, 8)) < 0.5
    bias = np.ones(8, np.uint8)
    tree = {"blocks": {"0": {"kernel": mask.astype(np.uint8), "bias": bias}, "1": None}}
    assert list(prune(model, masks=tree)) == ["blocks/0"]
    np.testing.assert_array_equal(np.asarray(model.blocks[0].kernel[...]) != 0, mask)
    prune(model, masks={"output": np.packbits(np.arange(64) < 9)})
    assert np.count_nonzero(model.output.kernel[...]) == 9
    with pytest.raises(ValueError, match="there is a mask for 'blocks/0/bias', but"):
        prune(model, masks={"blocks": {"0": {"bias": 0 * bias}}})
    with pytest.raises(ValueError, match="blocks/0"):
        prune(model, masks={"blocks/0": np.ones((8, 4))})
    for wrong in ({}, {"sparsity": 0.5, "masks": tree}):
        with pytest.raises(ValueError, match="either a sparsity or masks="):
            prune(model, **wrong)
    with pytest.raises(TypeError, match=r"flax\.nnx module, got dict"):
        prune({}, 0.5)


def test_a_pruned_model_computes_the_same_sparse_and_dense_again():
    model = Net()
    prune(model, 0.6)
    expected = forward(model, X)
    assert sparse_start(model, 0.6, places="largest") == 4
    assert model.again is model.blocks[1] and isinstance(model.again, SparseLinear)
    assert isinstance(model.stem, SparseConv) and isinstance(model.output, nnx.Linear)
    assert list(sparse_layers(model)) == PATHS
    np.testing.assert_allclose(forward(model, X), expected, rtol=1e-5, atol=1e-6)
    # As parameters that are differentiated and split.
    assert nnx.state(model, nnx.Param)["blocks"][0]["values"].shape == (26,)
    assert densify(model) == 4 and densify(model) == 0
    assert model.again is model.blocks[1] and type(model.again) is nnx.Linear
    np.testing.assert_allclose(forward(model, X), expected, rtol=1e-5, atol=1e-6)


def test_a_start_at_random_keeps_the_variance_of_outputs():
    model = Net()
    before = kernels(model)
    sparse_start(model, 0.75, seed=3)
    for path, layer in sparse_layers(model).items():
        kernel = np.asarray(layer.kernel())
        assert layer.nonzeros == round(kernel.size / 4)
        at = kernel != 0
        np.testing.assert_allclose(kernel[at], 2 * before[path][at], rtol=5e-6)
    other = Net()
    sparse_start(other, 0.75, seed=4)
    assert (other.stem.mask() != model.stem.mask()).any()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sparsity": 1.0}, "below 1"),
        ({"sparsity": 0.5, "places": "some"}, '"random" or "largest"'),
    ],
)
def test_starts_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        sparse_start(Net(), **options)


def test_what_is_one_layer_itself_cannot_be_swapped():
    layer = SparseLinear(4, 4, sparsity=0.5, rngs=nnx.Rngs(0))
    with pytest.raises(ValueError, match=r"to_dense\(\)"):
        densify(layer)


def test_a_further_mask_takes_moments_along():
    model = Net()
    sparse_start(model, 0.5)
    optimizer = nnx.Optimizer(model, optax.adam(1e-2), wrt=nnx.Param)
    traces = []

    @nnx.jit
    def step(model, optimizer, x):
        traces.append(1)
        grads = nnx.grad(lambda model: (model(x) ** 2).sum())(model)
        optimizer.update(model, grads)

    def moments():
        return {
            path: np.asarray(leaf[...])
            for path, leaf in nnx.to_flat_state(nnx.state(optimizer))
            if path[-1] == "values"
        }

    step(model, optimizer, X)
    layer = model.blocks[1]
    before, old = layer.kernel(), moments()
    mask = np.random.default_rng(1).random((8, 8)) < 0.5
    kept = mask & layer.mask()
    source_mask = layer.mask()
    assert apply_further_mask(model, {"blocks/1": mask}, optimizer) is optimizer
    np.testing.assert_array_equal(layer.mask(), kept)
    np.testing.assert_array_equal(layer.kernel(), np.where(kept, before, 0))
    # Values stand by rows of (out, in), as the kernel's transpose is read.
    stays = kept.T[source_mask.T]
    new = moments()
    changed = 0
    for path, moment in new.items():
        if "again" in path:  # by the alphabet its first name
            changed += 1
            np.testing.assert_array_equal(moment[: stays.sum()], old[path][stays])
            assert not moment[stays.sum() :].any()
        else:
            np.testing.assert_array_equal(moment, old[path])
    assert changed == 2
    step(model, optimizer, X)
    assert len(traces) == 1
    np.testing.assert_array_equal(layer.kernel() != 0, kept)


def test_a_further_mask_of_one_layer_and_of_an_optax_state():
    layer = SparseLinear(6, 5, mask=np.ones((6, 5)), rngs=nnx.Rngs(0))
    params = nnx.state(layer, nnx.Param)
    tx = optax.sgd(0.1, momentum=0.9)
    state = jax.tree.map(lambda x: x + jnp.arange(x.size, dtype=x.dtype), tx.init(params))
    mask = np.zeros((6, 5))
    mask[2, 3] = 1
    state = apply_further_mask(layer, mask, state)
    [trace] = [x for x in jax.tree.leaves(state) if x.shape == (30,)]
    assert trace[0] == 3 * 6 + 2 and not trace[1:].any()
    with pytest.raises(ValueError, match="shape"):
        apply_further_mask(layer, np.zeros((5, 6)))


def test_replacing_in_containers():
    old, new = nnx.Linear(1, 1, rngs=nnx.Rngs(0)), nnx.Linear(1, 1, rngs=nnx.Rngs(1))
    fixed = (1, "a")
    node = {"a": [old, (old, 2)], "b": fixed}
    replace(node, {id(old): new})
    assert node["a"][0] is new and node["a"][1][0] is new and node["b"] is fixed


def test_layers_that_share_a_kernel_stay_dense():
    model = Net()
    model.blocks[0].kernel = model.output.kernel
    assert sparse_start(model, 0.5) == 3
    assert model.blocks[0].kernel is model.output.kernel
    assert type(model.blocks[0]) is nnx.Linear and list(sparse_layers(model)) == [
        PATHS[0],
        *PATHS[2:],
    ]
    one = nnx.Sequential(nnx.Linear(4, 4, rngs=nnx.Rngs(0)), nnx.Linear(4, 4, rngs=nnx.Rngs(0)))
    one.layers[1].kernel = one.layers[0].kernel
    with pytest.raises(ValueError, match="all share parameters with others"):
        sparse_start(one, 0.5)
