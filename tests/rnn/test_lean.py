"""The lean backward pass inside Flax's RNN modules: the plain modules are the reference."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import rnn as rnn_room
from priorityprop_jax.meprop.inject import meprop, restore
from priorityprop_jax.meprop.rnn import MePropRNN
from priorityprop_jax.rnn import native
from priorityprop_jax.rnn.lean import LeanRNN, LinenLeanRNN, lean_rnn

INPUTS, HIDDEN, STEPS, BATCH = 3, 4, 5, 2
LENGTHS = jnp.array([3, 5])
NNX_CELLS = {cell.__name__: cell for cell in (nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell)}
LINEN_CELLS = {cell.__name__: cell for cell in (nn.OptimizedLSTMCell, nn.LSTMCell, nn.GRUCell)}
ROUNDS = {"OptimizedLSTMCell": None, "LSTMCell": None, "GRUCell": STEPS}
OPTIONS = {
    "OptimizedLSTMCell": {"time_major": True, "reverse": True, "return_carry": True},
    "LSTMCell": {"return_carry": True, "unroll": 2},
    "GRUCell": {
        "reverse": True,
        "keep_order": True,
        "seq_lengths": LENGTHS,
        "return_carry": True,
    },
}


def draw(seed, *shape, dtype=jnp.float64):
    return np.asarray(0.5 * np.random.default_rng(seed).normal(size=shape), dtype)


def make_inputs(options, cell, dtype=jnp.float64):
    shape = (STEPS, BATCH) if options.get("time_major") else (BATCH, STEPS)
    h, c = draw(2, BATCH, HIDDEN, dtype=dtype), draw(3, BATCH, HIDDEN, dtype=dtype)
    return draw(1, *shape, INPUTS, dtype=dtype), h if "GRU" in cell else (c, h)


def nnx_rnn(cell, unroll=1, **kwargs):
    """With parameters from NumPy, as initializers take long to compile."""
    init = lambda key, shape, dtype: draw(len(shape), *shape, dtype=dtype)  # noqa: E731
    inits = {"kernel_init": init, "recurrent_kernel_init": init, "bias_init": init}
    cell = NNX_CELLS[cell](INPUTS, HIDDEN, **inits, rngs=nnx.Rngs(0), **kwargs)
    return nnx.RNN(cell, unroll=unroll)


def assert_close(a, b, tolerance=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def passes(runs, *args):
    """Outputs and gradients of a weighted sum of them, of several functions in one program."""

    def of(run):
        def loss_fn(*args):
            out = run(*args)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

        return lambda *args: jax.grad(loss_fn, (0, 1, 2), has_aux=True)(*args)

    return jax.jit(lambda *args: [of(run)(*args) for run in runs])(*args)


@pytest.mark.parametrize("cell", NNX_CELLS)
def test_nnx_is_the_plain_module(cell):
    options = dict(OPTIONS[cell])
    with jax.enable_x64(True):
        rnn = nnx_rnn(cell, options.pop("unroll", 1), param_dtype=jnp.float64)
        x, carry = make_inputs(options, cell)
        runs = []
        for lean in (False, True):
            if lean:
                assert lean_rnn(rnn, iterations=ROUNDS[cell]) == 1
            graph, params, rest = nnx.split(rnn, nnx.Param, ...)
            runs.append(
                lambda params, x, carry, parts=(graph, rest): nnx.merge(parts[0], params, parts[1])(
                    x, initial_carry=carry, **options
                )
            )
        expected, own = passes(runs, params, x, carry)
        assert_close(own, expected)


@pytest.mark.parametrize("cell", ["OptimizedLSTMCell", "GRUCell"])
def test_linen_is_the_plain_module(cell):
    options = dict(OPTIONS[cell])
    unroll = options.pop("unroll", 1)
    with jax.enable_x64(True):
        inner = LINEN_CELLS[cell](HIDDEN, param_dtype=jnp.float64)
        rnns = [
            nn.RNN(inner, unroll=unroll),
            LinenLeanRNN(inner, unroll=unroll, iterations=ROUNDS[cell]),
        ]
        x, carry = make_inputs(options, cell)
        shapes = jax.eval_shape(rnns[0].init, jax.random.key(0), x)
        assert jax.eval_shape(rnns[1].init, jax.random.key(0), x) == shapes
        variables = jax.tree.map(lambda leaf: draw(4, *leaf.shape), shapes)
        runs = [
            lambda variables, x, carry, rnn=rnn: rnn.apply(
                variables, x, initial_carry=carry, **options
            )
            for rnn in rnns
        ]
        expected, own = passes(runs, variables, x, carry)
        assert_close(own, expected)


def test_linen_inside_a_model_with_metadata_on_its_kernels():
    class Model(nn.Module):
        rnn: type

        @nn.compact
        def __call__(self, x):
            init = nn.with_partitioning(nn.initializers.uniform(0.5), (None, None))
            x = self.rnn(nn.GRUCell(HIDDEN, kernel_init=init, parent=None), name="rnn")(x)
            return nn.Dense(2)(x)

    x = jnp.asarray(draw(1, BATCH, STEPS, INPUTS), jnp.float32)
    plain, own = Model(nn.RNN), Model(LinenLeanRNN)
    variables = plain.init(jax.random.key(0), x)
    assert_close(own.init(jax.random.key(0), x), variables, 0)
    passed = [
        jax.jit(jax.value_and_grad(lambda v, m=model: jnp.sum(jnp.sin(m.apply(v, x)))))(variables)
        for model in (plain, own)
    ]
    assert_close(*passed, 2e-5)


def test_nnx_model_and_its_tree():
    class Model(nnx.Module):
        def __init__(self):
            self.both = nnx.Bidirectional(nnx_rnn("LSTMCell"), nnx_rnn("GRUCell"))
            self.other = nnx.RNN(nnx.SimpleCell(2 * HIDDEN, 2, rngs=nnx.Rngs(0)))  # unknown

        def __call__(self, x):
            return self.both(x)

    model, x = Model(), jnp.asarray(draw(1, BATCH, STEPS, INPUTS, dtype=jnp.float32))
    graph, params, rest = nnx.split(model, nnx.Param, ...)
    assert lean_rnn(model, iterations=1) == lean_rnn(model) == 2
    assert type(model.both.backward_rnn) is LeanRNN and type(model.other) is nnx.RNN
    assert_close(nnx.state(model, nnx.Param), params)

    @nnx.jit
    def run(*models):
        loss_fn = lambda model: jnp.sum(jnp.sin(model(x)))  # noqa: E731
        return [nnx.value_and_grad(loss_fn)(model) for model in models]

    results = [
        (value, nnx.as_pure(grads)) for value, grads in run(model, nnx.merge(graph, params, rest))
    ]
    assert_close(*results, tolerance=1e-5)
    assert restore(model) == 2 and nnx.graphdef(model) == graph


def test_nnx_instead_of_meprop():
    rnn = nnx_rnn("GRUCell")
    graph = nnx.graphdef(rnn)
    meprop(rnn, 2, layers=nnx.RNN)
    assert type(rnn) is MePropRNN
    x, carry = make_inputs({}, "GRUCell", jnp.float32)
    assert lean_rnn(rnn, iterations=2, tol=0.5) == 1 and not hasattr(rnn, "meprop_name")
    run = jax.jit(lambda probe: jnp.sum(rnn(x, initial_carry=carry, probe=probe)))
    assert jax.grad(run)(jnp.zeros(3))[0] in (1, 2)
    meprop(rnn, 2, layers=nnx.RNN)
    assert type(rnn) is MePropRNN and "lean_tol" not in vars(rnn)
    assert restore(rnn) == 1 and nnx.graphdef(rnn) == graph


def test_bfloat16():
    rnn = nnx_rnn("GRUCell", dtype=jnp.bfloat16)
    x, carry = make_inputs({}, "GRUCell", jnp.float32)
    graphs = []
    for lean in (False, True):
        if lean:
            lean_rnn(rnn)
        graph, params, rest = nnx.split(rnn, nnx.Param, ...)
        graphs.append(graph)
    runs = [
        lambda params, x, carry, graph=graph: nnx.merge(graph, params, rest)(x, initial_carry=carry)
        for graph in graphs
    ]
    for plain, own in zip(*map(jax.tree.leaves, passes(runs, params, x, carry)), strict=True):
        assert own.dtype == plain.dtype
        own, plain = np.asarray(own, np.float32), np.asarray(plain, np.float32)
        np.testing.assert_allclose(own, plain, atol=0.03 * np.abs(plain).max())


def test_wrong_input():
    rnn = nnx_rnn("GRUCell")
    with pytest.raises(TypeError, match="must be a flax.nnx module"):
        lean_rnn({})
    with pytest.raises(ValueError, match="the model's are none"):
        lean_rnn(rnn.cell)
    with pytest.raises(ValueError, match="'SimpleCell'.*the cells known are GRUCell"):
        lean_rnn(nnx.RNN(nnx.SimpleCell(3, 4, rngs=nnx.Rngs(0))))
    with pytest.raises(ValueError, match="0 or more"):
        lean_rnn(rnn, iterations=-1)
    assert type(rnn) is nnx.RNN
    x = jnp.ones((1, 2, 3))
    with pytest.raises(TypeError, match="LinenLeanRNN knows the cells .* got SimpleCell"):
        LinenLeanRNN(nn.SimpleCell(4)).init(jax.random.key(0), x)
    with pytest.raises(ValueError, match="give both"):
        LinenLeanRNN(nn.GRUCell(4), tol=0.1).init(jax.random.key(0), x)
    with pytest.raises(TypeError, match="sigmoid and tanh"):
        LinenLeanRNN(nn.GRUCell(4, gate_fn=nn.hard_sigmoid)).init(jax.random.key(0), x)


@pytest.mark.parametrize(("rows", "iterations", "own"), [(64, None, 1), (65, None, 0), (65, 2, 1)])
def test_many_rows_are_left_to_autodiff(rows, iterations, own, monkeypatch):
    monkeypatch.setattr(native, "are_here", lambda *_: False)
    rnn, x = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), rngs=False), jnp.ones((rows, 2, 3))
    lean_rnn(rnn, iterations=iterations)
    graph, state = nnx.split(rnn)
    call = lambda state, x: nnx.merge(graph, state)(x, initial_carry=jnp.zeros((rows, 4)))  # noqa: E731
    assert str(jax.make_jaxpr(call)(state, x)).count("custom_vjp_call") == own
    linen = LinenLeanRNN(nn.GRUCell(4), iterations=iterations)
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    traced = jax.make_jaxpr(linen.apply)(variables, x)
    assert str(traced).count("custom_vjp_call") == own
    for wrong in ({"lengths": 1}, {"probe": jnp.zeros(2)}):
        with pytest.raises((TypeError, ValueError), match=f"{next(iter(wrong))}"):
            rnn(x, initial_carry=jnp.zeros((rows, 4)), **wrong)


@pytest.mark.parametrize("steps", [7, 8])
def test_many_rows_of_few_steps_are_left_to_autodiff_too(steps):
    rnn, x = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), rngs=False), jnp.ones((65, steps, 3))
    lean_rnn(rnn)
    linen = LinenLeanRNN(nn.GRUCell(4))
    variables = jax.eval_shape(linen.init, jax.random.key(0), x)
    calls = [
        jax.make_jaxpr(lambda x: nnx.clone(rnn)(x, initial_carry=jnp.zeros((65, 4))))(x),
        jax.make_jaxpr(linen.apply)(variables, x),
    ]
    own = steps == 8 and native.are_here()
    assert ["custom_vjp_call" in str(call) for call in calls] == [own, own]


def test_a_cell_that_is_put_in_later_runs_as_ever():
    class Sum(nnx.Module):
        def __call__(self, carry, x):
            return carry + x, carry

        def initialize_carry(self, shape, rngs=None):
            return jnp.zeros(shape)

        num_feature_axes = 1

    rnn, x = nnx.RNN(nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)), rngs=False), jnp.ones((65, 9, 3))
    lean_rnn(rnn)
    rnn.cell = Sum()
    expected = jnp.broadcast_to(jnp.arange(9.0)[:, None], x.shape)
    np.testing.assert_array_equal(rnn(x, initial_carry=jnp.zeros((65, 3))), expected)


@pytest.mark.parametrize("cell", NNX_CELLS)
def test_a_mesh_with_explicit_axes(cell):
    options = {"seq_lengths": jnp.array([3, 5] * 4), "return_carry": True, "reverse": True}
    rnn, x = nnx_rnn(cell), draw(1, 8, STEPS, INPUTS, dtype=jnp.float32)
    h = jnp.zeros((8, HIDDEN))
    carry = h if "GRU" in cell else (h, h)
    graph, state = nnx.split(rnn)
    expected = rnn(x, initial_carry=carry, **options)
    lean_rnn(rnn)
    mesh = jax.make_mesh((8,), ("x",))
    with jax.set_mesh(mesh):
        shards = jax.device_put(x, jax.NamedSharding(mesh, jax.P("x")))
        call = lambda state, x: nnx.merge(nnx.graphdef(rnn), state)(  # noqa: E731
            x, initial_carry=carry, **options
        )
        found = jax.jit(call)(state, shards)
    assert_close(found, expected, 1e-5)


def test_a_symbolic_batch_is_exported():
    rnn = nnx_rnn("GRUCell")
    lean_rnn(rnn)
    graph, state = nnx.split(rnn)
    call = lambda x: nnx.merge(graph, state)(x, initial_carry=jnp.zeros((x.shape[0], HIDDEN)))  # noqa: E731
    (batch,) = jax.export.symbolic_shape("batch")
    x = jax.ShapeDtypeStruct((batch, STEPS, INPUTS), jnp.float32)
    exported = jax.export.export(jax.jit(call))(x)
    x = draw(1, 3, STEPS, INPUTS, dtype=jnp.float32)
    assert_close(exported.call(x), call(x), 1e-5)


BIASES = [("OptimizedLSTMCell", "dense_i"), ("LSTMCell", "if_"), ("GRUCell", "dense_h")]


@pytest.mark.parametrize(("cell", "name"), BIASES)
def test_a_bias_that_the_formula_lacks_is_left_to_autodiff(cell, name):
    x, carry = make_inputs({}, cell, jnp.float32)
    rnn, later = nnx_rnn(cell), nnx_rnn(cell)
    lean_rnn(later)
    for one in (rnn, later):
        layer = getattr(one.cell, name)
        layer.bias = nnx.Param(jnp.linspace(-2.0, 2.0, layer.out_features))
        layer.use_bias = True
    with pytest.raises(ValueError, match="no RNN was changed"):
        lean_rnn(rnn)
    expected = rnn(x, initial_carry=carry)
    np.testing.assert_array_equal(later(x, initial_carry=carry), expected)
    assert np.abs(expected - nnx_rnn(cell)(x, initial_carry=carry)).max() > 0.01


@pytest.mark.parametrize(("cell", "name"), [("OptimizedLSTMCell", "dense_h"), ("LSTMCell", "ho")])
def test_an_lstm_without_a_bias_is_left_to_autodiff(cell, name):
    rnn = nnx_rnn(cell)
    getattr(rnn.cell, name).bias = None
    with pytest.raises(ValueError, match="no RNN was changed"):
        lean_rnn(rnn)


def test_restore_gives_the_plain_modules_back():
    model = nnx.Bidirectional(nnx_rnn("GRUCell"), nnx_rnn("LSTMCell"))
    assert rnn_room.restore(model) == 0
    assert lean_rnn(model, iterations=1) == rnn_room.restore(model) == 2
    assert type(model.forward_rnn) is type(model.backward_rnn) is nnx.RNN
    assert not hasattr(model.forward_rnn, "lean_iterations")
    with pytest.raises(TypeError, match="must be a flax.nnx module"):
        rnn_room.restore({})
