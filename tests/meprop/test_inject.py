"""meProp put into models and taken out again: the models stay what they are but for gradients."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax import lax

from benchmarks.tasks.char import CharTransformer
from priorityprop_jax.cli.tasks import MLP
from priorityprop_jax.core.modules import walk
from priorityprop_jax.meprop import meprop, meprop_dot_general, restore, value_and_grad
from priorityprop_jax.meprop.products import MePropDot


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def rngs():
    return nnx.Rngs(0)


class Layer(nnx.Module):
    """One layer, and an output layer behind it."""

    def __init__(self, layer, width, call=None):
        self.layer = layer
        self.out = nnx.Linear(width, 2, rngs=nnx.Rngs(7))
        self.call = call

    def __call__(self, x):
        x = self.layer(x) if self.call is None else self.call(self.layer, x)
        return self.out(x.reshape(*x.shape[:2], -1))


class Stack(nnx.Module):
    """Linear layers stacked by `nnx.vmap` and run by `nnx.scan`."""

    def __init__(self):
        make = nnx.vmap(lambda key: nnx.Linear(8, 8, rngs=nnx.Rngs(key)))
        self.layers = make(jax.random.split(jax.random.key(0), 3))
        self.out = nnx.Linear(8, 2, rngs=rngs())

    def __call__(self, x):
        def body(x, layer):
            return jnp.tanh(layer(x))

        return self.out(nnx.scan(body, in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)(x, self.layers))


def rnn(cell):
    return lambda: Layer(nnx.RNN(cell(6, 8, rngs=rngs()), rngs=False), 8, _run_rnn)


def _run_rnn(layer, x):
    h = jnp.zeros((len(x), 8))
    one = isinstance(layer.cell, nnx.GRUCell | nnx.SimpleCell)
    return layer(x, initial_carry=h if one else (h, h))


def attend(layer, x):
    return layer(x, decode=False)


def einsum(text, *shape, width):
    return lambda: Layer(nnx.Einsum(text, shape, None, rngs=rngs()), width)


# Name: how to make it, how many layers meProp changes in it. Inputs are [4, 5, 6], or made below.
MODELS = {
    "linear": (lambda: Layer(nnx.Linear(6, 8, rngs=rngs()), 8), 1),
    "no bias": (lambda: Layer(nnx.Linear(6, 8, use_bias=False, rngs=rngs()), 8), 1),
    "linear general": (lambda: Layer(nnx.LinearGeneral(6, (2, 4), rngs=rngs()), 8), 1),
    "two axes in": (
        lambda: Layer(nnx.LinearGeneral((2, 3), (8, 2), axis=(-2, -1), rngs=rngs()), 16,
                      lambda layer, x: layer(x.reshape(4, 5, 2, 3))), 1,
    ),
    "batch axis": (
        lambda: Layer(nnx.LinearGeneral(6, 8, axis=-1, batch_axis={0: 4}, rngs=rngs()), 8), 1,
    ),
    "attention": (lambda: Layer(nnx.MultiHeadAttention(2, 6, 8, rngs=rngs()), 6, attend), 4),
    "convolution": (lambda: Layer(nnx.Conv(6, 8, (3,), rngs=rngs()), 8), 1),
    "groups": (
        lambda: Layer(nnx.Conv(6, 8, (3,), strides=2, feature_group_count=2, rngs=rngs()), 8), 1,
    ),
    "einsum": (einsum("btf,fg->btg", 6, 8, width=8), 1),
    "ellipsis": (einsum("...f,gf->...g", 8, 6, width=8), 1),
    "features first": (einsum("btf,ghf->bgth", 5, 8, 6, width=40), 1),
    "lstm": (rnn(nnx.OptimizedLSTMCell), 1),
    "gates apart": (rnn(nnx.LSTMCell), 1),
    "gru": (rnn(nnx.GRUCell), 1),
    "simple cell": (rnn(nnx.SimpleCell), 2),
    "transformer": (
        lambda: CharTransformer(11, context=5, width=8, depth=1, heads=2, rngs=rngs()), 4,
    ),
    "stack": (Stack, 1),
    "mlp": (lambda: MLP((6, 16, 8, 2), rngs=rngs()), 2),
}  # fmt: skip


def inputs(name):
    return jnp.arange(20).reshape(4, 5) % 11 if name == "transformer" else normal(1, 4, 5, 6 + 2 * (name == "stack"))  # fmt: skip # noqa: E501


@nnx.jit
def forward(model, x):
    return model(x)


@nnx.jit
def gradients(model, x):
    return nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)


def snapshot(model):
    return jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(model)))


def assert_same(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize(
    "name, transpose",
    [*((name, True) for name in MODELS), ("lstm", False)],
)
def test_a_model_is_the_same_before_during_and_after(name, transpose):
    make, count = MODELS[name]
    model, x = make(), inputs(name)
    params, graph, value = snapshot(model), nnx.graphdef(model), forward(model, x)
    assert meprop(model, 2, transpose=transpose) == count
    assert nnx.graphdef(model) != graph

    def assert_alike(got, transposed):
        # XLA sums the product with a transposed kernel in another order, and joined gates too.
        if transposed or name == "gates apart":
            np.testing.assert_allclose(got, value, rtol=1e-5, atol=1e-6)
        else:
            assert jnp.array_equal(got, value)

    during = forward(model, x)
    assert_alike(during, transpose)
    if name in ("linear", "attention", "lstm", "stack"):
        shape = nnx.state(model)["layers" if name == "stack" else "layer"]
        shapes = [k.shape for k in jax.tree.leaves(shape) if k.ndim > 1]
        before = [k.shape for k in jax.tree.leaves(params) if k.ndim > 1]
        assert (shapes != before[: len(shapes)]) == (transpose and name != "stack")
    # Again, with other options: as if for the first time.
    assert meprop(model, 0.5, pattern="random", transpose=not transpose) == count
    assert_alike(forward(model, x), not transpose)
    assert meprop(model, 2, transpose=transpose) == count
    hash(nnx.graphdef(model))
    assert jnp.array_equal(forward(model, x), during)
    # Copies compute the same.
    for twin in (nnx.clone(model), nnx.merge(*nnx.split(model))):
        assert nnx.graphdef(twin) == nnx.graphdef(model)
        assert jnp.array_equal(forward(twin, x), during)
    assert restore(model) == count
    assert_same(snapshot(model), params)
    assert jnp.array_equal(forward(model, x), value)
    assert nnx.graphdef(model) == graph
    assert restore(model) == 0


# What the paper's formula keeps of the weights is tested with the products themselves.
@pytest.mark.parametrize(
    "name", ["linear", "batch axis", "groups", "features first", "stack"],
)  # fmt: skip
def test_gradients_change_and_with_all_features_do_not(name):
    make, _ = MODELS[name]
    model, x = make(), inputs(name)
    dense = gradients(model, x)

    def compare():
        grads = gradients(model, x)
        restore(model)  # to bring the layouts back, the gradients have to pose as parameters
        return grads

    meprop(model, 1.0, transpose=False)
    full = compare()
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5), full, dense)
    meprop(model, 2, transpose=False)
    sparse = compare()
    differ = jax.tree.map(lambda a, b: not np.allclose(a, b, atol=1e-4), sparse, dense)
    assert any(jax.tree.leaves(differ["layers" if name == "stack" else "layer"]))
    # The layout changes nothing.
    meprop(model, 2)
    grads = gradients(model, x)
    nnx.update(model, grads)
    restore(model)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5),
        nnx.to_pure_dict(nnx.state(model, nnx.Param)), nnx.to_pure_dict(sparse),
    )  # fmt: skip


def test_the_last_layer_in_the_order_of_definition_stays_dense():
    class Backwards(nnx.Module):
        def __init__(self):
            self.z = nnx.Linear(6, 8, rngs=rngs())
            self.body = nnx.Dict(y=nnx.Linear(8, 8, rngs=rngs()), x=nnx.Linear(8, 8, rngs=rngs()))
            self.a = nnx.Linear(8, 2, rngs=rngs())

    model = Backwards()
    assert meprop(model, 2) == 3
    assert [name for name, layer in walk(model) if isinstance(layer, nnx.Linear)] == [
        "z", "body/y", "body/x", "a",
    ]  # fmt: skip
    assert model.a.dot_general is lax.dot_general and model.a.kernel.shape == (8, 2)
    assert model.z.dot_general == MePropDot(2, name="z", transposed=True, inner=lax.dot_general)
    assert model.body["x"].dot_general.name == "body/x"


@pytest.mark.parametrize(
    "layers, names",
    [
        (nnx.Linear, ["first", "out"]),
        (nnx.Conv, ["conv"]),
        (nnx.PathContains("out"), ["out"]),
        (nnx.Any(nnx.Conv, nnx.PathContains("first")), ["first", "conv"]),
        (lambda path, layer: path == ("first",) and isinstance(layer, nnx.Linear), ["first"]),
        (True, ["first", "conv", "out"]),
        (..., ["first", "conv", "out"]),
        (None, ["first", "conv"]),
    ],
)
def test_a_filter_chooses_the_layers(layers, names):
    class Mixed(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(6, 8, rngs=rngs())
            self.norm = nnx.LayerNorm(8, rngs=rngs())
            self.conv = nnx.Conv(8, 8, (3,), rngs=rngs())
            self.out = nnx.Linear(8, 4, rngs=rngs())

    model = Mixed()
    assert meprop(model, 2, layers=layers) == len(names)
    changed = [
        name
        for name in ("first", "conv", "out")
        if getattr(getattr(getattr(model, name), "dot_general", None), "name", "")
        or getattr(getattr(getattr(model, name), "conv_general_dilated", None), "name", "")
    ]
    assert changed == names
    assert restore(model) == len(names)


@pytest.mark.parametrize(
    "make, options, match",
    [
        ("mlp", {"k": 9}, r"k=9 is more than the 8 output features of layer 'layers/1'"),
        ("mlp", {"k": (2, 12)}, r"k=12 is more than the 8 output features of layer 'layers/1'"),
        ("mlp", {"k": 4, "pattern": "tile", "tile": 16},
         r"the 8 output features of layer 'layers/1' are no multiple of tile=16"),
        ("gru", {"k": 9}, r"k=9 is more than the 8 output features of layer 'layer'"),
        ("gru", {"k": (2, 4)}, "recurrent layer 'layer' takes one k"),
        ("groups", {"k": 16}, "layer 'layer'"),
        ("linear", {"k": 0}, "at least 1"),
        ("linear", {"k": 1.5}, "fraction"),
        ("linear", {"k": ()}, "empty"),
        ("linear", {"k": 2, "pattern": "some"}, "pattern"),
        ("linear", {"k": 2, "tile": 0}, "tile"),
        ("linear", {"k": 2, "layers": nnx.Embed}, "no layer was changed: the model's layers are"),
    ],
)  # fmt: skip
def test_a_call_that_fails_changes_nothing(make, options, match):
    model = MODELS[make][0]()
    # In front of the layer that fails there is one that would have been changed.
    model = nnx.Sequential(nnx.Linear(6, 16, rngs=rngs()), model) if make == "gru" else model
    match = match.replace("'layer'", "'layers/1/layer'") if make == "gru" else match
    for before in (lambda: None, lambda: meprop(model, 2)):  # untouched, and changed before
        before()
        params, graph = snapshot(model), nnx.graphdef(model)
        with pytest.raises(ValueError, match=match):
            meprop(model, **options)
        assert_same(snapshot(model), params)
        assert nnx.graphdef(model) == graph


def test_wrong_models():
    for function in (functools.partial(meprop, k=2), restore):
        with pytest.raises(TypeError, match="must be a flax.nnx module, got dict"):
            function({"a": 1})
    with pytest.raises(ValueError, match=r"no layer was changed: the model's layers are none"):
        meprop(nnx.LayerNorm(4, rngs=rngs()), 2)
    with pytest.raises(ValueError, match="and the last is left out as the output layer"):
        meprop(nnx.Linear(4, 4, rngs=rngs()), 2)
    with pytest.raises(TypeError, match="k must be"):
        meprop(MLP((4, 4, 4), rngs=rngs()), "2")


def test_shared_kernels_keep_their_layout_and_shared_layers_are_changed_once():
    class Shared(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(8, 8, rngs=rngs())
            self.tied = nnx.Linear(8, 8, rngs=rngs())
            self.tied.kernel = self.first.kernel
            self.once = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            self.again = self.once
            self.parts = nnx.List([self.once, nnx.Linear(8, 8, rngs=nnx.Rngs(2))])
            self.out = nnx.Linear(8, 2, rngs=rngs())

        def __call__(self, x):
            for layer in (self.first, self.tied, self.once, self.again, *self.parts):
                x = jnp.tanh(layer(x))
            return self.out(x)

    model, x = Shared(), normal(0, 4, 8)
    # Not by `forward`: `nnx.jit` leaves attributes in the order of the alphabet.
    params, value, kernel = snapshot(model), model(x), model.once.kernel[...]
    assert meprop(model, 2) == 4
    np.testing.assert_allclose(model(x), value, atol=1e-6)
    assert not model.first.dot_general.transposed and not model.tied.dot_general.transposed
    assert model.once.dot_general.transposed and model.again is model.once
    assert jnp.array_equal(model.once.kernel[...].T, kernel)
    assert restore(model) == 4
    assert_same(snapshot(model), params)


def test_a_kernel_that_is_tied_to_an_embedding():
    class Tied(nnx.Module):
        def __init__(self):
            self.embed = nnx.Embed(8, 8, rngs=rngs())
            self.linear = nnx.Linear(8, 8, rngs=rngs())
            self.linear.kernel = self.embed.embedding
            self.out = nnx.Linear(8, 2, rngs=rngs())

        def __call__(self, x):
            return self.out(self.linear(self.embed(x)))

    model, x = Tied(), jnp.arange(8)
    value = forward(model, x)
    assert meprop(model, 2) == 1 and not model.linear.dot_general.transposed
    assert jnp.array_equal(forward(model, x), value)


def test_what_users_put_in_stays_and_is_used():
    calls = []

    def own(*args, **kwargs):
        calls.append(args)
        return lax.dot_general(*args, **kwargs)

    by_class = nnx.LinearGeneral(6, 8, rngs=rngs(), dot_general_cls=lambda: own)
    model = nnx.Sequential(
        by_class, nnx.Linear(8, 8, rngs=rngs(), dot_general=own), nnx.Linear(8, 2, rngs=rngs())
    )
    assert meprop(model, 2) == 1
    assert by_class.kernel.shape == (6, 8)
    assert model.layers[1].dot_general.inner is own
    model(normal(0, 4, 6))
    assert len(calls) == 2
    assert restore(model) == 1 and model.layers[1].dot_general is own


def test_a_cell_works_by_itself_and_names_are_paths():
    rnn = nnx.RNN(nnx.GRUCell(6, 10, rngs=rngs()), rngs=False)
    model = nnx.Sequential(rnn, nnx.Linear(10, 2, rngs=rngs()))
    carry, x = jnp.zeros((4, 10)), normal(0, 4, 6)
    expected = rnn.cell(carry, x)[1]
    for options in ({"pattern": "tile"}, {"pattern": "random"}, {}):
        meprop(model, 0.5, **options)
        assert rnn.cell.dense_i.kernel.shape == (30, 6)
        assert rnn.cell.dense_i.dot_general.name == "layers/0/cell/dense_i"
        np.testing.assert_allclose(rnn.cell(carry, x)[1], expected, atol=1e-6)


def test_compiled_once():
    traces = []

    @nnx.jit
    def step(model, x):
        traces.append(0)
        return value_and_grad(lambda m, x: jnp.sum(m(x) ** 2))(model, x)

    for _ in range(2):  # another model of the same kind, too
        model = MLP((6, 16, 2), rngs=rngs())
        meprop(model, (2, 4), pattern="tile", tile=2, seed=3)
        step(model, normal(0, 4, 6))
        step(model, normal(1, 4, 6))
    assert traces == [0]
    assert meprop_dot_general(2) == meprop_dot_general(2) != meprop_dot_general(3)


def test_layouts_on_a_mesh_follow_the_kernel():
    mesh = jax.make_mesh((2, 4), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    with jax.set_mesh(mesh):
        linear = functools.partial(nnx.Linear, rngs=rngs())
        model = nnx.Sequential(
            linear(6, 16, kernel_metadata={"out_sharding": ("data", "model")}), linear(16, 2)
        )
        kernel = model.layers[0].kernel
        before, metadata, x = kernel[...], kernel.get_metadata("out_sharding"), normal(0, 4, 6)
        value = forward(model, x)
        assert before.sharding.spec == jax.P("data", "model")
        meprop(model, 2)
        assert tuple(kernel.get_metadata("out_sharding")) == ("model", "data")
        assert kernel.shape == (16, 6) and kernel[...].sharding.spec == jax.P("model", "data")
        np.testing.assert_allclose(forward(model, x), value, rtol=5e-6)
        kernel.set_value(kernel[...] + 0)  # as an optimizer does
        restore(model)
        assert tuple(kernel.get_metadata("out_sharding")) == tuple(metadata)
        assert jnp.array_equal(kernel[...], before)
