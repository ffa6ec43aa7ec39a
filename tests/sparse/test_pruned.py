"""What `gradual_pruning` has pruned goes on as sparse layers, as if nothing had happened."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import priorityprop
from priorityprop_jax.sparse import gradual_pruning
from priorityprop_jax.sparse.pruned import masks_of, sparse_from_pruned


def test_there_must_be_one_state():
    with pytest.raises(ValueError, match="found 0 states"):
        masks_of(optax.sgd(0.1).init({}))


def test_pruning_ends_in_sparse_layers_that_go_on_where_it_stopped():
    rngs, x = nnx.Rngs(0), np.random.default_rng(0).normal(size=(16, 8)).astype(np.float32)
    model = nnx.Sequential(
        nnx.Linear(8, 24, rngs=rngs), nnx.relu, nnx.Linear(24, 24, rngs=rngs), nnx.relu,
        nnx.Linear(24, 1, rngs=rngs),
    )  # fmt: skip
    adam = priorityprop(optax.adam(1e-2), None, 4, 4, 4)
    chosen = {f"layers/{i}/kernel" for i in (0, 2)}
    prune = gradual_pruning(0.75, begin=1, end=5, every=2, where=lambda path: path in chosen)

    def trained(model, tx, state, steps):
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        @jax.jit
        def step(params, state):
            def loss(params):
                return jnp.mean((nnx.merge(graph, params, rest)(x) - np.sin(x[:, :1])) ** 2)

            updates, state = tx.update(jax.grad(loss)(params), state, params)
            return optax.apply_updates(params, updates), state

        for _ in range(steps):
            params, state = step(params, state)
        return nnx.merge(graph, params, rest), state

    tx = optax.chain(adam, prune)
    dense, state = trained(model, tx, tx.init(nnx.state(model, nnx.Param)), 7)
    sparse, sparse_state = sparse_from_pruned(dense, state, adam)
    assert isinstance(dense.layers[0], nnx.Linear) and isinstance(sparse.layers[4], nnx.Linear)
    for i in (0, 2):
        kernel = dense.layers[i].kernel[...]
        assert sparse.layers[i].nonzeros == round(kernel.size / 4) == np.count_nonzero(kernel)
        np.testing.assert_array_equal(sparse.layers[i].kernel(), kernel)
    # The same without the change of layers, as masks keep what is pruned at zero.
    dense, _ = trained(dense, tx, state, 4)
    sparse, sparse_state = trained(sparse, adam, sparse_state, 4)
    for i in (0, 2):
        kernel = dense.layers[i].kernel[...]
        np.testing.assert_allclose(sparse.layers[i].kernel(), kernel, rtol=1e-4, atol=1e-6)
    np.testing.assert_array_equal(sparse_state.update_counts, 11)

    with pytest.raises(ValueError, match="give the optimizer in front"):
        sparse_from_pruned(dense, state, optax.adam(0.1))
    state = optax.chain(adam, gradual_pruning(0.5, begin=0, end=0, every=1, where=lambda _: True))
    norm = nnx.Sequential(nnx.Embed(3, 4, rngs=rngs))
    state = state.init(nnx.state(norm, nnx.Param))
    with pytest.raises(ValueError, match="pruned are also layers/0/embedding"):
        sparse_from_pruned(norm, state, adam)
