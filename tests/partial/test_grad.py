"""Partial gradients against the same leaves of the full gradient."""

import functools
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from priorityprop_jax import find_slots, partial, priorityprop
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.rows import Frozen, is_row_sparse, put, take
from priorityprop_jax.partial.grad import choose, find_active
from priorityprop_jax.priority import repeats

LAYERS, WIDTH = 4, 3
TREE_NAMES = ("embed", "mix/0", "mix/1", "out/kernel", "stack/bias", "stack/kernel")
ACTIVE = {
    "nothing": set(),
    "everything": set(TREE_NAMES),
    "one leaf": {"out/kernel"},
    "tuple and list": {"mix/1", "embed"},
    "a run of layers": {"stack/kernel[1]", "stack/kernel[2]"},
    "the last layer": {"stack/kernel[3]", "stack/bias[3]", "out/kernel"},
    "layers apart": {"stack/kernel[0]", "stack/kernel[3]", "stack/bias[2]", "stack/bias[0]"},
    "all layers": {f"stack/bias[{i}]" for i in range(LAYERS)},
    "a leaf and a layer of it": {"stack/kernel", "stack/kernel[1]"},
}


def make_params(dtype=jnp.float32, seed=0):
    rng = np.random.default_rng(seed)

    def normal(*shape):
        x = rng.normal(size=shape) / 2
        if jnp.issubdtype(dtype, jnp.complexfloating):
            x = x + 1j * rng.normal(size=shape) / 2
        return jnp.asarray(x, dtype)

    return {
        "embed": normal(WIDTH),
        "mix": (normal(WIDTH, WIDTH), [normal(WIDTH)][0]),
        "stack": {"kernel": normal(LAYERS, WIDTH, WIDTH), "bias": normal(LAYERS, WIDTH)},
        "out": {"kernel": normal(WIDTH)},
    }


def stacked_axis(path):
    return 0 if path.startswith("stack") else None


value_and_grad = functools.partial(partial.value_and_grad, stacked_axis=stacked_axis)


def find(params, active):
    return find_active(params, find_slots(params, stacked_axis=stacked_axis), active)


def apply(params, updates):
    """One step of an optimizer that hands its gradients on."""
    tx = partial.update_active(optax.identity(), stacked_axis=stacked_axis)
    return optax.apply_updates(params, tx.update(updates, tx.init(params), params)[0])


def loss_fn(params, x, *, scale=1.0):
    h = jnp.tanh(x * params["embed"]) @ params["mix"][0] + params["mix"][1]
    for i in range(LAYERS):
        h = h + jnp.sin(h @ params["stack"]["kernel"][i] + params["stack"]["bias"][i])
    return scale * jnp.mean(jnp.abs(h @ params["out"]["kernel"]) ** 2)


def scanned_loss_fn(params, x, *, scale=1.0):
    def layer(h, p):
        return h + jnp.sin(h @ p["kernel"] + p["bias"]), None

    h = jnp.tanh(x * params["embed"]) @ params["mix"][0] + params["mix"][1]
    h, _ = jax.lax.scan(jax.checkpoint(layer), h, params["stack"])
    return scale * jnp.mean(jnp.abs(h @ params["out"]["kernel"]) ** 2)


X = jnp.asarray(np.random.default_rng(1).normal(size=(5, WIDTH)), jnp.float32)


def expected_part(grads, active):
    """The full gradient's active leaves and layers by their names; slow and plain."""
    part = {}
    for path, g in jax.tree_util.tree_flatten_with_path(grads)[0]:
        name = "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path)
        rows = [i for i in range(len(g)) if f"{name}[{i}]" in active]
        part[name] = g if name in active else np.stack([g[i] for i in rows]) if rows else None
    return part


def is_leaf(g):
    return g is None or is_row_sparse(g)


def full_shape(tree, name):
    for key in name.split("/"):
        tree = tree[key]
    return tree.shape


def assert_part(grads, full, active, **tolerance):
    expected = expected_part(full, active)
    found = {
        "/".join(str(getattr(k, "key", getattr(k, "idx", k))) for k in path): g
        for path, g in jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_leaf)[0]
    }
    assert found.keys() == expected.keys()
    for name, g in expected.items():
        if g is None:
            assert found[name] is None, name
        else:
            own = found[name]
            if is_row_sparse(own):
                assert own.shape == full_shape(full, name) and len(own.rows) < own.shape[0]
                own = own.values
            assert own.dtype == g.dtype, name
            np.testing.assert_allclose(
                np.asarray(own, np.complex64),
                np.asarray(g, np.complex64),
                err_msg=name,
                **({"rtol": 1e-5, "atol": 1e-6} | tolerance),
            )


# Gradients of the active leaves.


@pytest.mark.parametrize("active", ACTIVE.values(), ids=ACTIVE.keys())
def test_gradients_are_those_of_the_full_gradient(active):
    params = make_params()
    value, full = jax.value_and_grad(loss_fn)(params, X)
    partial_value, grads = value_and_grad(loss_fn, active)(params, X)
    assert partial_value == value
    assert_part(grads, full, active)


def test_nested_lists_of_leaves():
    params = [jnp.ones(2), [jnp.full(2, 2.0), (jnp.full(2, 3.0),)]]

    def product(params):
        return jnp.sum(params[0] * params[1][0] * params[1][1][0])

    _, grads = value_and_grad(product, ["1/1/0"])(params)
    assert grads[0] is None and grads[1][0] is None
    np.testing.assert_array_equal(grads[1][1][0], [2.0, 2.0])


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.complex64], ids=lambda d: d.__name__)
def test_dtypes(dtype):
    active = ACTIVE["layers apart"] | {"embed"}
    params, x = make_params(dtype), X.astype(dtype)
    value, full = jax.jit(jax.value_and_grad(loss_fn))(params, x)
    partial_value, grads = jax.jit(value_and_grad(loss_fn, active))(params, x)
    np.testing.assert_allclose(partial_value, value, rtol=1e-2)
    assert partial_value.dtype == value.dtype
    tolerance = {"rtol": 0.05, "atol": 0.05} if dtype == jnp.bfloat16 else {}
    assert_part(grads, full, active, **tolerance)


def test_inactive_leaves_may_be_what_has_no_gradient():
    params = {"table": jnp.arange(3), "w": jnp.ones(3)}
    _, grads = value_and_grad(lambda p: jnp.sum(p["table"] * p["w"]), {"w"})(params)
    assert grads["table"] is None
    np.testing.assert_array_equal(grads["w"], [0.0, 1.0, 2.0])


@pytest.mark.parametrize("active", ["a run of layers", "layers apart"])
def test_numpy_parameters(active):
    params = make_params()
    _, full = jax.value_and_grad(loss_fn)(params, X)
    _, grads = value_and_grad(loss_fn, ACTIVE[active])(jax.tree.map(np.asarray, params), X)
    assert_part(grads, full, ACTIVE[active])


def test_aux_keyword_and_further_arguments_are_as_in_value_and_grad():
    def with_aux(params, x, offset, *, scale):
        loss = loss_fn(params, x, scale=scale) + offset
        return loss, {"loss": loss, "offset": offset}

    params, active = make_params(), ACTIVE["the last layer"]
    (value, aux), full = jax.value_and_grad(with_aux, has_aux=True)(params, X, 0.5, scale=3.0)
    result, grads = value_and_grad(with_aux, active, has_aux=True)(params, X, offset=0.5, scale=3.0)
    assert result[0] == value and result[1] == aux
    assert_part(grads, full, active)


@pytest.mark.parametrize("loss", [loss_fn, scanned_loss_fn], ids=["loop", "scan and remat"])
def test_under_jit(loss):
    params, active = make_params(), ACTIVE["layers apart"] | {"mix/0"}
    _, full = jax.value_and_grad(loss_fn)(params, X)
    _, grads = jax.jit(value_and_grad(loss, active))(params, X)
    assert_part(grads, full, active)


def test_under_vmap():
    params, active = make_params(), ACTIVE["the last layer"]
    some = value_and_grad(loss_fn, active)
    full = jax.jit(jax.vmap(jax.grad(loss_fn), (None, 0)))(params, X[:, None])
    _, grads = jax.jit(jax.vmap(some, (None, 0)))(params, X[:, None])
    np.testing.assert_allclose(
        grads["stack"]["kernel"].values, full["stack"]["kernel"][:, 3:], rtol=1e-5, atol=1e-6
    )
    np.testing.assert_allclose(grads["out"]["kernel"], full["out"]["kernel"], rtol=1e-5, atol=1e-6)
    assert grads["embed"] is None


def test_a_training_loop_inside_scan():
    params, active = make_params(), ACTIVE["layers apart"]
    grad_fn = value_and_grad(loss_fn, active)

    def step(params, _):
        value, grads = grad_fn(params, X)
        updates = jax.tree.map(lambda g: -0.1 * g, grads)
        return apply(params, updates), value

    trained, values = jax.jit(lambda p: jax.lax.scan(step, p, None, length=3))(params)
    by_hand = params
    for value in values:
        found, grads = grad_fn(by_hand, X)
        np.testing.assert_allclose(value, found, rtol=1e-5)
        by_hand = apply(by_hand, jax.tree.map(lambda g: -0.1 * g, grads))
    jax.tree.map(functools.partial(np.testing.assert_allclose, atol=1e-6), trained, by_hand)


def test_gradient_of_a_gradient():
    def loss(params):
        return jnp.sum(params["a"] ** 3 * params["b"])

    def norm(params):
        _, grads = value_and_grad(loss, {"b"})(params)
        return jnp.sum(grads["b"] ** 2)  # sum(a ** 6)

    params = {"a": jnp.array([1.0, 2.0]), "b": jnp.array([3.0, 4.0])}
    grads = jax.grad(norm)(params)
    np.testing.assert_allclose(grads["a"], 6 * params["a"] ** 5, rtol=5e-6)
    np.testing.assert_array_equal(grads["b"], [0.0, 0.0])


def test_groups_of_slots_stand_for_their_leaves():
    params = make_params()
    group = lambda path: path.split("/")[0] if "/" in path else None  # noqa: E731
    _, full = jax.value_and_grad(loss_fn)(params, X)
    _, grads = value_and_grad(loss_fn, {"stack[3]", "mix"}, group=group)(params, X)
    assert_part(grads, full, {"stack/kernel[3]", "stack/bias[3]", "mix/0", "mix/1"})


def test_globs_modules_and_functions_mean_slots():
    params = make_params()
    _, full = jax.value_and_grad(loss_fn)(params, X)
    names = find_slots(params, stacked_axis=stacked_axis).names
    for active, meant in (
        ("mix/*", {"mix/0", "mix/1"}),
        ("mix", {"mix/0", "mix/1"}),
        ("stack/*[2]", {"stack/kernel[2]", "stack/bias[2]"}),
        (["stack/bias", "e?bed"], {"stack/bias", "embed"}),
        (lambda path: path.endswith("[0]"), {"stack/kernel[0]", "stack/bias[0]"}),
        (lambda path: False, set()),
        ("*", set(names)),
    ):
        _, grads = value_and_grad(loss_fn, active)(params, X)
        every = {f"stack/{leaf}" for leaf in ("bias", "kernel")} if active == "*" else set()
        assert_part(grads, full, meant | every)


def test_what_matches_nothing_is_told_what_is_close():
    with pytest.raises(ValueError, match="no slot is called 'head/kernal'.*'head/kernel'"):
        choose(["head/kernel", "body/bias"], "head/kernal")
    with pytest.raises(ValueError, match=r"no slot is called 'hea/\*'"):
        choose(["head/kernel", "body/bias"], {"hea/*"})
    with pytest.raises(ValueError, match="there are no parameters"):
        choose([], "*")


def test_single_layers_on_another_axis_are_refused_and_all_of_them_taken():
    params = {"w": jnp.ones((2, 3))}
    loss = lambda p: jnp.sum(p["w"] ** 2)  # noqa: E731
    with pytest.raises(ValueError, match="stacked on axis 1"):
        partial.value_and_grad(loss, "w[1]", stacked_axis=lambda path: 1)(params)
    _, grads = partial.value_and_grad(loss, "w", stacked_axis=lambda path: 1)(params)
    np.testing.assert_array_equal(grads["w"], 2 * params["w"])


# What is computed.


def mlp(layers=6, width=64, batch=32):
    def loss(params, x):
        for i in range(layers):
            x = jnp.tanh(x @ params[f"Dense_{i}"])
        return jnp.mean(x**2)

    params = {
        f"Dense_{i}": jax.ShapeDtypeStruct((width, width), jnp.float32) for i in range(layers)
    }
    return loss, params, jax.ShapeDtypeStruct((batch, width), jnp.float32), 2 * batch * width**2


def flops_of(function, *args):
    return program_flops(jax.jit(function).lower(*args).compile())


def test_a_suffix_costs_what_its_own_backward_pass_costs():
    loss, params, x, product = mlp()
    for k in (1, 3, 6):
        active = {f"Dense_{i}" for i in range(6 - k, 6)}
        found = flops_of(value_and_grad(loss, active), params, x)
        # 6 products forward, k weight gradients, and the chain through all but the deepest.
        np.testing.assert_allclose(found, (6 + k + k - 1) * product, rtol=0.05)
    one = flops_of(value_and_grad(loss, {"Dense_0"}), params, x)
    np.testing.assert_allclose(one, (6 + 1 + 5) * product, rtol=0.05)


def test_a_traced_mask_saves_nothing():
    loss, params, x, _ = mlp()

    def masked(params, x, mask):
        value, grads = jax.value_and_grad(loss)(params, x)
        return value, jax.tree.map(lambda g, on: jnp.where(on, g, 0.0), grads, mask)

    mask = dict.fromkeys(params, jax.ShapeDtypeStruct((), jnp.bool_))
    full = flops_of(jax.value_and_grad(loss), params, x)
    assert flops_of(masked, params, x, mask) >= full
    assert flops_of(value_and_grad(loss, {"Dense_5"}), params, x) < 0.5 * full


# Devices.


def test_sharded_parameters_keep_their_layout():
    mesh = Mesh(np.array(jax.devices()), ("x",))
    rows = NamedSharding(mesh, PartitionSpec("x"))
    layers = NamedSharding(mesh, PartitionSpec(None, "x"))
    rng = np.random.default_rng(0)
    host = {
        "Dense_0": rng.normal(size=(8, 8)).astype(np.float32),
        "stack": rng.normal(size=(3, 8, 8)).astype(np.float32),
    }
    params = {
        "Dense_0": jax.device_put(host["Dense_0"], rows),
        "stack": jax.device_put(host["stack"], layers),
    }

    def loss(params, x):
        x = jnp.tanh(x @ params["Dense_0"])
        for i in range(3):
            x = jnp.tanh(x @ params["stack"][i])
        return jnp.mean(x**2)

    active = {"stack[0]", "stack[2]"}
    x = jnp.asarray(rng.normal(size=(16, 8)), jnp.float32)
    full = jax.grad(loss)(host, x)

    @jax.jit
    def step(params, x):
        _, grads = value_and_grad(loss, active)(params, x)
        return grads, apply(params, jax.tree.map(jnp.negative, grads))

    grads, new = step(params, jax.device_put(x, rows))
    assert grads["stack"].rows == (0, 2)
    np.testing.assert_allclose(grads["stack"].values, full["stack"][np.array([0, 2])], atol=1e-6)
    assert grads["Dense_0"] is None
    np.testing.assert_array_equal(new["Dense_0"], host["Dense_0"])
    np.testing.assert_array_equal(new["stack"][1], host["stack"][1])
    assert new["Dense_0"].sharding.is_equivalent_to(rows, 2)
    assert len(new["stack"].sharding.device_set) == 8


# Flax.


class Net(nnx.Module):
    def __init__(self, rngs):
        self.first = nnx.Linear(3, 4, rngs=rngs)
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, rngs=rngs)
        self.last = nnx.Linear(4, 2, rngs=rngs)

    def __call__(self, x):
        return self.last(self.dropout(nnx.relu(self.norm(self.first(x)))))


@pytest.mark.parametrize("has_aux", [False, True])
def test_nnx_changes_the_module_as_value_and_grad_does(has_aux):
    def loss(model, x, scale=1.0):
        y = model(x)
        value = scale * jnp.mean(y**2)
        return (value, y) if has_aux else value

    ours, theirs = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    ours.train(), theirs.train()
    mean = np.array(ours.norm.mean[...])
    active = {"last/kernel", "norm/scale"}
    for _ in range(2):  # the second draws other random numbers
        result, grads = value_and_grad(loss, active, has_aux=has_aux)(ours, X, scale=2.0)
        expected, full = nnx.value_and_grad(loss, has_aux=has_aux)(theirs, X, scale=2.0)
        jax.tree.map(np.testing.assert_array_equal, result, expected)
        assert {"/".join(path) for path, _ in nnx.to_flat_state(grads)} == active
        assert all(type(grad) is nnx.Param for _, grad in nnx.to_flat_state(grads))
        for name in active:
            module, leaf = name.split("/")
            np.testing.assert_allclose(
                grads[module][leaf][...], full[module][leaf][...], rtol=1e-5, atol=1e-6
            )
    after, wanted = nnx.as_pure(nnx.state(ours)), nnx.as_pure(nnx.state(theirs))
    jax.tree.map(np.testing.assert_array_equal, _numbers(after), _numbers(wanted))
    assert not np.array_equal(after["norm"]["mean"], mean)


def _numbers(tree):
    return jax.tree.map(
        lambda x: (
            jax.random.key_data(x) if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        ),
        tree,
    )


def test_nnx_inside_jit_and_another_filter():
    class Scaled(nnx.Module):
        def __init__(self):
            self.w = nnx.Param(jnp.ones(2))
            self.v = nnx.Variable(jnp.full(2, 3.0))

    model = Scaled()

    @nnx.jit
    def gradients(model):
        return value_and_grad(
            lambda model: jnp.sum(model.w[...] * model.v[...]), {"v"}, wrt=nnx.Variable
        )(model)

    value, grads = gradients(model)
    assert value == 6.0 and list(grads) == ["v"]
    np.testing.assert_array_equal(grads["v"][...], [1.0, 1.0])


def test_nnx_modes_and_attributes():
    """What a loss does to a module is kept, and what was in eval mode stays so."""
    model = Net(nnx.Rngs(0))
    model.train()
    model.norm.eval()
    mean = np.array(model.norm.mean[...])

    def loss(model, x):
        model.calls = getattr(model, "calls", 0) + 1
        model.dropout.eval()
        return jnp.mean(model(x) ** 2)

    frozen = model.first.kernel[...]
    for calls in (1, 2):
        _, grads = value_and_grad(loss, "last")(model, X)
        assert model.calls == calls and model.dropout.deterministic
    assert model.norm.use_running_average and list(grads) == ["last"]
    np.testing.assert_array_equal(model.norm.mean[...], mean)
    assert model.first.kernel[...] is frozen  # not even copied


def test_nnx_layers_of_a_stack():
    class Scanned(nnx.Module):
        def __init__(self):
            self.stack = nnx.Param(jnp.arange(1.0, 13.0).reshape(4, 3) / 9)
            self.head = nnx.Param(jnp.ones(3))

        def __call__(self, x):
            for i in range(4):
                x = jnp.tanh(x * self.stack[i])
            return x @ self.head[...]

    loss = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    model = Scanned()
    _, full = nnx.value_and_grad(loss)(model, X)
    _, grads = nnx.jit(value_and_grad(loss, {"stack[1]", "stack[3]"}))(model, X)
    assert list(grads) == ["stack"] and grads["stack"].get_value().rows == (1, 3)
    np.testing.assert_allclose(
        grads["stack"].get_value().values, full["stack"][np.array([1, 3])], rtol=1e-5
    )


def test_nnx_arguments_that_are_modules_are_changed_too():
    model, rngs = Net(nnx.Rngs(0)), nnx.Rngs(3)
    loss = lambda model, rngs, *, scale: jnp.sum(model(X)) * rngs.uniform() * scale  # noqa: E731
    values = {float(value_and_grad(loss, "last")(model, rngs, scale=2.0)[0]) for _ in range(2)}
    assert len(values) == 2


def test_linen_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.tanh(nn.Dense(4)(x)))

    model = Net()
    variables = model.init(jax.random.key(0), X)

    def loss(variables, x):
        return jnp.mean(model.apply(variables, x) ** 2)

    full = jax.grad(loss)(variables, X)
    _, grads = value_and_grad(loss, {"params/Dense_1/kernel"})(variables, X)
    assert jax.tree.leaves(grads["params"]["Dense_0"]) == []
    assert grads["params"]["Dense_1"]["bias"] is None
    np.testing.assert_allclose(
        grads["params"]["Dense_1"]["kernel"], full["params"]["Dense_1"]["kernel"], rtol=1e-5
    )


# Finding what is active.


def test_split_join_part_and_replace_are_inverses():
    params = make_params()
    chosen = find(params, ACTIVE["layers apart"] | {"embed"})
    active, others = chosen.split(params)
    assert any(params["out"]["kernel"] is x for x in others)
    assert any(params["embed"] is x for x in active) and len(active) + len(others) > len(active)
    joined = chosen.join(active, others)
    assert all(a is b for a, b in zip(*map(jax.tree.leaves, (joined, params)), strict=True))
    same = chosen.replace(params, chosen.part(params))
    jax.tree.map(np.testing.assert_array_equal, same, params)
    shapes = chosen.part(jax.eval_shape(lambda: params))
    assert shapes["stack"]["bias"].shape == (2, WIDTH)


def test_take_and_put_layers():
    x = jnp.arange(8.0).reshape(4, 2)
    for rows in ((0, 1), (1, 2, 3), (0, 3), (2,)):
        np.testing.assert_array_equal(take(x, rows), np.asarray(x)[list(rows)])
        expected = np.asarray(x).copy()
        expected[list(rows)] = -1
        np.testing.assert_array_equal(put(x, rows, jnp.full((len(rows), 2), -1.0)), expected)


@pytest.mark.parametrize("active", ["head", "head[0]", "stack/kernel[4]", "stack/kernel[-1]"])
def test_wrong_names(active):
    params = make_params()
    with pytest.raises(ValueError, match=f"no slot is called {re.escape(repr(active))}"):
        find(params, {active})
    with pytest.raises(ValueError, match="the closest are"):
        value_and_grad(loss_fn, active)(params, X)


def test_other_errors():
    with pytest.raises(TypeError, match="must be a function"):
        value_and_grad(3, {"a"})
    with pytest.raises(ValueError, match="same path|have the path"):
        value_and_grad(loss_fn, "a/b")({"a/b": 1.0, "a": {"b": 2.0}})
    with pytest.raises(ValueError, match="no slot is called 'weight'"):
        value_and_grad(lambda m: m(X).sum(), {"weight"})(Net(nnx.Rngs(0)))
    for other in ({"v": 1.0}, {"w": 1.0, "x": 2.0}, {"x": 1.0, "w": 2.0}):
        with pytest.raises(ValueError, match="the parameters have none of that name in its place"):
            find_active({"a": {"w": 1.0}}, find_slots(other), set())


# Updates.


def test_inactive_leaves_are_the_very_same_arrays():
    params = make_params()
    _, grads = value_and_grad(loss_fn, ACTIVE["the last layer"])(params, X)
    new = apply(params, grads)
    for old, kept in ((params["embed"], new["embed"]), (params["mix"][0], new["mix"][0])):
        assert kept is old
    kernel = params["stack"]["kernel"]
    np.testing.assert_array_equal(new["stack"]["kernel"][:3], kernel[:3])
    np.testing.assert_array_equal(
        new["stack"]["kernel"][3], kernel[3] + grads["stack"]["kernel"].values[0]
    )
    np.testing.assert_array_equal(
        new["out"]["kernel"], params["out"]["kernel"] + grads["out"]["kernel"]
    )


# The active sets of the transformation's own allocation.


def run_cycles(front, only_active, cycles=3, every=2):
    """Each cycle starts with all gradients, which are scored; then only what the plan needs."""
    loss, shapes, *_ = mlp(layers=3, width=4)
    rng = np.random.default_rng(0)
    params = {name: jnp.asarray(rng.normal(size=s.shape), s.dtype) for name, s in shapes.items()}
    x = jnp.asarray(rng.normal(size=(8, 4)), jnp.float32)
    slots = find_slots(params)
    tx = optax.chain(front, priorityprop(optax.adam(1e-2), 0.5, 0, every, every, spread="nested"))
    state = tx.init(params)

    @functools.partial(jax.jit, static_argnames="active")
    def step(params, state, active):
        _, grads = value_and_grad(loss, active)(params, x)
        updates, state = tx.update(grads, state, params)
        updates = {k: Frozen() if u is None else u for k, u in updates.items()}
        return optax.apply_updates(params, updates), state

    skipped = 0
    for _ in range(cycles):
        plan = [frozenset(slots.names)] * every
        for t in range(every):
            active = plan[t] if only_active else frozenset(slots.names)
            new, new_state = step(params, state, active)
            if t == 0:
                granted = new_state[1].allocation
                counts = [repeats(granted, at, every, spread="nested") for at in range(every)]
                plan = [
                    frozenset(n for n, on in zip(slots.names, row, strict=True) if on)
                    for row in counts
                ]
            adam, new_adam = state[1].inner_state[0], new_state[1].inner_state[0]
            for i, name in enumerate(slots.names):
                if name in plan[t]:
                    continue
                skipped += 1
                for a, b in ((params, new), (adam.mu, new_adam.mu), (adam.nu, new_adam.nu)):
                    np.testing.assert_array_equal(a[name], b[name])
                assert adam.count[i] == new_adam.count[i]
            params, state = new, new_state
    assert skipped == cycles * every * len(slots) // 2  # half the budget
    return params, state


def test_sets_of_an_allocation_train_as_full_gradients_do():
    full = run_cycles(optax.identity(), only_active=False)
    part = run_cycles(optax.identity(), only_active=True)
    np.testing.assert_array_equal(full[1][1].update_counts, part[1][1].update_counts)
    jax.tree.map(functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6), full, part)


def test_sets_of_an_allocation_behind_a_clip():
    run_cycles(optax.clip_by_global_norm(1e-3), only_active=True)
