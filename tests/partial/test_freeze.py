"""`freeze` against the optimizer on what is left, and in other people's loops."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

from priorityprop_jax import partial
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.rows import Frozen
from priorityprop_jax.partial import freeze

NAMES = ["encoder/0/bias", "encoder/0/kernel", "encoder/1/bias", "encoder/1/kernel", "head/kernel"]


def make_params():
    rng = np.random.default_rng(0)

    def layer():
        return {
            "kernel": jnp.asarray(rng.normal(size=(3, 3)), jnp.float32),
            "bias": jnp.array([-0.0, 1.0, 2.0]),
        }

    return {"encoder": [layer(), layer()], "head": {"kernel": layer()["kernel"]}}


def loss_fn(params, x):
    for layer in params["encoder"]:
        x = jnp.tanh(x @ layer["kernel"] + layer["bias"])
    return jnp.mean((x @ params["head"]["kernel"]) ** 2)


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, 3)), jnp.float32)


def labelled(params):
    return {"encoder": [{"kernel": "freeze", "bias": "train"}, "frozen"], "head": False}


WHICH = {
    "glob": ("encoder/*", {0, 1, 2, 3}),
    "module": ("encoder/1", {2, 3}),
    "leaf and glob": (["head/kernel", "*/bias"], {0, 2, 4}),
    "predicate": (lambda path, leaf: leaf.ndim > 1 and path != "head/kernel", {1, 3}),
    "nothing": (lambda path, leaf: False, set()),
    "everything": ("*", {0, 1, 2, 3, 4}),
    "labels": (labelled, {1, 2, 3}),
    "booleans": (lambda params: jax.tree.map(lambda x: x.ndim == 1, params), {0, 2}),
}


@pytest.mark.parametrize("gradients", ["all", "partial"])
@pytest.mark.parametrize("which", WHICH)
def test_the_rest_is_trained_as_if_alone(which, gradients):
    which, frozen = WHICH[which]
    params = make_params()
    leaves, treedef = jax.tree.flatten(params)
    tx = freeze(which, optax.adamw(1e-2, weight_decay=0.1))
    state = tx.init(params)
    rest = {name: x for i, (name, x) in enumerate(zip(NAMES, leaves, strict=True))}
    rest = {name: x for i, (name, x) in enumerate(rest.items()) if i not in frozen}
    plain, plain_state = optax.adamw(1e-2, weight_decay=0.1), None
    plain_state = plain.init(rest)
    assert len(jax.tree.leaves(state)) == len(
        jax.tree.leaves(plain_state)
    )  # no state of the frozen
    grad_fn = jax.value_and_grad(loss_fn)
    if gradients == "partial":
        grad_fn = partial.value_and_grad(loss_fn, list(rest))

    @jax.jit
    def step(params, state):
        _, grads = grad_fn(params, X)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, updates

    for _ in range(3):
        mixed = [rest.get(name, x) for name, x in zip(NAMES, leaves, strict=True)]
        full = jax.tree.leaves(jax.grad(loss_fn)(treedef.unflatten(mixed), X))
        grads = {name: g for name, g in zip(NAMES, full, strict=True) if name in rest}
        updates, plain_state = plain.update(grads, plain_state, rest)
        rest = optax.apply_updates(rest, updates)
        params, state, updates = step(params, state)
    assert step._cache_size() == 1
    updates = treedef.flatten_up_to(updates)
    for i, (old, new) in enumerate(zip(leaves, jax.tree.leaves(params), strict=True)):
        assert isinstance(updates[i], Frozen) == (i in frozen)
        if i in frozen:
            np.testing.assert_array_equal(old, new)
            np.testing.assert_array_equal(np.signbit(old), np.signbit(new))
        else:
            np.testing.assert_allclose(new, rest[NAMES[i]], rtol=1e-5, atol=1e-7)


def test_what_is_frozen_is_not_computed():
    layers, width, batch = 6, 64, 32
    params = {
        f"Dense_{i}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(layers)
    }

    def loss(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"Dense_{i}"])
        return jnp.mean(x**2)

    tx = freeze([f"Dense_{i}" for i in range(layers - 1)], optax.sgd(0.1))

    def step(params, state, x):
        _, grads = jax.value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    x = jax.ShapeDtypeStruct((batch, width), jnp.float32)
    program = jax.jit(step, donate_argnums=(0, 1)).lower(params, jax.eval_shape(tx.init, params), x)
    # Every product forward, and one weight gradient.
    flops = program_flops(program.compile())
    np.testing.assert_allclose(flops, (layers + 1) * 2 * batch * width**2, rtol=0.05)


# In other people's loops.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.encoder = nnx.Sequential(
            nnx.Linear(3, 4, rngs=rngs), nnx.relu, nnx.Linear(4, 4, rngs=rngs)
        )
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.head = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.head(self.norm(self.encoder(x)))


def params_of(model):
    state = nnx.as_pure(nnx.state(model, nnx.Param))
    return {"/".join(map(str, path)): np.asarray(x) for path, x in nnx.to_flat_state(state)}


@pytest.mark.parametrize("gradients", ["all", "partial"])
def test_nnx_optimizer(gradients):
    model = Net(nnx.Rngs(0))
    model.train()
    model.norm.eval()  # a frozen normalization keeps its statistics
    before, mean = params_of(model), np.asarray(model.norm.mean[...])
    tx = freeze(["encoder/*", "norm"], optax.adamw(1e-2))
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer, x):
        loss = lambda model: jnp.mean((model(x) - 1) ** 2)  # noqa: E731
        grad_fn = nnx.value_and_grad(loss)
        if gradients == "partial":
            grad_fn = partial.value_and_grad(loss, "head/*")
        value, grads = grad_fn(model)
        optimizer.update(model, grads)
        return value

    values = [float(step(model, optimizer, X)) for _ in range(5)]
    assert values[-1] < values[0]
    for name, x in params_of(model).items():
        assert np.array_equal(x, before[name]) == (not name.startswith("head")), name
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    sizes = [x.size for x in jax.tree.leaves(nnx.as_pure(optimizer.opt_state)) if x.ndim]
    assert sum(sizes) == 2 * (4 * 2 + 2)


def test_linens_train_state():
    class Mlp(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))

    model = Mlp()
    params = model.init(jax.random.key(0), X)["params"]
    state = TrainState.create(
        apply_fn=model.apply, params=params, tx=freeze("Dense_0", optax.adam(1e-2))
    )

    @jax.jit
    def step(state):
        loss = lambda params: jnp.mean((state.apply_fn({"params": params}, X) - 1) ** 2)  # noqa: E731
        return state.apply_gradients(grads=jax.grad(loss)(state.params))

    for _ in range(3):
        state = step(state)
    jax.tree.map(np.testing.assert_array_equal, state.params["Dense_0"], params["Dense_0"])
    assert not np.array_equal(state.params["Dense_1"]["kernel"], params["Dense_1"]["kernel"])


def test_the_last_layers_alone_in_one_s_own_nnx_loop():
    class Classifier(nnx.Module):
        def __init__(self, rngs):
            self.encoder = nnx.List([nnx.Linear(8, 8, rngs=rngs) for _ in range(6)])
            self.head = nnx.Linear(8, 2, rngs=rngs)

        def __call__(self, x):
            for layer in self.encoder:
                x = nnx.relu(layer(x))
            return self.head(x)

    model = Classifier(nnx.Rngs(0))
    before = params_of(model)
    optimizer = nnx.Optimizer(model, partial.update_active(optax.adamw(1e-2)), wrt=nnx.Param)

    def loss_fn(model, x, y):
        return optax.softmax_cross_entropy_with_integer_labels(model(x), y).mean()

    @nnx.jit
    def train_step(model, optimizer, x, y):
        loss, grads = partial.value_and_grad(loss_fn, ["encoder/5", "head/*"])(model, x, y)
        optimizer.update(model, grads)
        return loss

    x, y = jax.random.normal(jax.random.key(1), (16, 8)), jnp.arange(16) % 2
    losses = [float(train_step(model, optimizer, x, y)) for _ in range(20)]
    assert losses[-1] < losses[0]
    for name, new in params_of(model).items():
        trained = name.startswith(("encoder/5", "head"))
        assert np.array_equal(new, before[name]) != trained, name


# Optax's contract.


def test_state_and_dtypes():
    params = make_params() | {"half": jnp.ones(2, jnp.bfloat16), "nothing": None}
    tx = freeze("encoder", optax.adam(1e-2))
    state = tx.init(params)
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), params)
    for other in (tx.init(shapes), jax.eval_shape(tx.init, params)):
        assert jax.tree.structure(other) == jax.tree.structure(state)
    updates, after = tx.update(params, state, params)
    assert updates["half"].dtype == jnp.bfloat16 and updates["nothing"] is None
    assert jax.tree.structure(after) == jax.tree.structure(state)
    tx = freeze("encoder", optax.inject_hyperparams(optax.adam)(1e-2))
    state = tx.init(params)
    state.inner_state.hyperparams["learning_rate"] = 0.5
    updates, after = tx.update(params, state, params)
    np.testing.assert_allclose(np.asarray(updates["half"], np.float32), -0.5, rtol=1e-2)
    doubled = optax.tree.map_params(tx, lambda x: 2 * x, after)
    assert jax.tree.structure(doubled) == jax.tree.structure(after)


def test_extra_arguments_and_parameters_that_are_not_given():
    def update(updates, state, params=None, *, factor):
        return jax.tree.map(lambda g: factor * g, updates), state

    inner = optax.GradientTransformationExtraArgs(lambda params: optax.EmptyState(), update)
    tx, params = freeze("a", inner), {"a": jnp.ones(2), "b": jnp.ones(2)}
    updates, _ = tx.update(params, tx.init(params), factor=3.0)
    assert isinstance(updates["a"], Frozen)
    np.testing.assert_array_equal(updates["b"], [3.0, 3.0])


@pytest.mark.parametrize("inside", [True, False])
def test_multi_steps(inside):
    params = {"a": jnp.array([-0.0, 1.0]), "b": jnp.ones(2)}
    if inside:
        tx = freeze("a", optax.MultiSteps(optax.sgd(0.5), 2))
    else:
        tx = optax.MultiSteps(freeze("a", optax.sgd(0.5)), 2)
    state, new, update = tx.init(params), params, jax.jit(tx.update)
    for scale in (1.0, 3.0, 1.0):
        updates, state = update({k: jnp.full(2, scale) for k in params}, state, new)
        new = optax.apply_updates(new, updates)
    assert np.signbit(new["a"][0])
    np.testing.assert_array_equal(new["b"], 1 - 0.5 * 2)


def test_a_clip_inside_sees_what_is_trained_only_and_a_chain_behind_too():
    params = {"a": jnp.ones(2), "b": jnp.zeros(2)}
    tx = optax.chain(freeze("a", optax.clip_by_global_norm(1.0)), optax.scale(-2.0))
    grads = {"a": jnp.full(2, 1e6), "b": jnp.array([3.0, 4.0])}
    updates, _ = tx.update(grads, tx.init(params), params)
    assert isinstance(updates["a"], Frozen)
    np.testing.assert_allclose(updates["b"], [-1.2, -1.6], rtol=5e-6)


def test_multi_transform_and_masked_around():
    params = {"a": jnp.ones(2), "b": jnp.ones(2), "c": jnp.ones(2)}
    tx = optax.multi_transform(
        {"x": freeze("a", optax.sgd(0.5)), "y": optax.sgd(1.0)},
        lambda params: {"a": "x", "b": "x", "c": "y"},
    )
    updates, _ = jax.jit(tx.update)(params, tx.init(params), params)
    new = optax.apply_updates(params, updates)
    assert [float(x[0]) for x in new.values()] == [1.0, 0.5, 0.0]


# Errors.


def test_errors():
    params = make_params()
    with pytest.raises(TypeError, match="GradientTransformation"):
        freeze("encoder", 0.1)
    with pytest.raises(ValueError, match=r"no leaf is called 'encoder/2/\*'.*'encoder/1/bias'"):
        freeze("encoder/2/*", optax.sgd(0.1)).init(params)
    with pytest.raises(ValueError, match="the label 'encoder' is none of"):
        freeze(lambda params: {"encoder": "encoder", "head": "train"}, optax.sgd(0.1)).init(params)
    tx = freeze("encoder", optax.sgd(0.1))
    with pytest.raises(ValueError, match="a gradient 'hat', but no parameter"):
        tx.update({"hat": jnp.ones(2)}, tx.init(params), params)
