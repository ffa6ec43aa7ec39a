"""meProp inside Flax's RNN modules: the plain modules are the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax.core.program import program_flops
from priorityprop_jax.meprop.rnn import MePropRNN, swap_rnn
from priorityprop_jax.rnn.fused import restore_rnn

INPUTS, HIDDEN, STEPS, BATCH = 3, 8, 5, 4
LENGTHS = jnp.array([3, 5, 1, 4])
NNX_CELLS = {cell.__name__: cell for cell in (nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell)}
OPTIONS = {
    "time major, reverse, carry": {"time_major": True, "reverse": True, "return_carry": True},
    "reverse, in order, lengths, carry": {
        "reverse": True,
        "keep_order": True,
        "seq_lengths": LENGTHS,
        "return_carry": True,
    },
}


def draw(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def make_inputs(options=None, batch=BATCH, steps=STEPS):
    shape = (steps, batch) if (options or {}).get("time_major") else (batch, steps)
    return draw(1, *shape, INPUTS)


def make_carry(cell, batch=BATCH):
    h = draw(2, batch, HIDDEN)
    return h if "GRU" in cell else (draw(3, batch, HIDDEN), h)


def make_zeros(cell, *shape):
    return jnp.zeros(shape) if "GRU" in cell else (jnp.zeros(shape), jnp.zeros(shape))


def nnx_rnn(cell, **kwargs):
    """With parameters from NumPy, as initializers take long to compile."""
    init = lambda key, shape, dtype: jnp.zeros(shape, dtype)  # noqa: E731
    inits = {"kernel_init": init, "recurrent_kernel_init": init, "bias_init": init}
    rnn = nnx.RNN(NNX_CELLS[cell](INPUTS, HIDDEN, **inits, rngs=nnx.Rngs(0), **kwargs))
    params = nnx.state(rnn, nnx.Param)
    rng = np.random.default_rng(0)
    nnx.update(
        rnn, jax.tree.map(lambda x: jnp.asarray(0.5 * rng.normal(size=x.shape), x.dtype), params)
    )
    return rnn


def pass_through(rnn, options):
    """Jitted: outputs and the gradients of a weighted sum of them."""
    graph, params, rest = nnx.split(rnn, nnx.Param, ...)

    @jax.jit
    def run(params, x, carry):
        def loss_fn(params, x, carry):
            out = nnx.merge(graph, params, rest)(x, initial_carry=carry, **options)
            return sum(jnp.sum(jnp.sin(leaf)) for leaf in jax.tree.leaves(out)), out

        grads, out = jax.grad(loss_fn, (0, 1, 2), has_aux=True)(params, x, carry)
        return out, grads

    return lambda x, carry: run(params, x, carry)


def assert_equal(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(np.testing.assert_array_equal, a, b)


def assert_close(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-5, atol=2e-5), a, b)


@pytest.mark.parametrize(
    ("cell", "options"),
    [
        *((cell, "reverse, in order, lengths, carry") for cell in NNX_CELLS),
        ("LSTMCell", "time major, reverse, carry"),
    ],
)
def test_nnx_with_all_kept_is_the_plain_module(cell, options):
    rnn, options = nnx_rnn(cell), OPTIONS[options]
    x, carry = make_inputs(options), make_carry(cell)
    out, grads = pass_through(rnn, options)(x, carry)
    assert swap_rnn(rnn, HIDDEN, "rnn") and type(rnn) is MePropRNN
    own_out, own_grads = pass_through(rnn, options)(x, carry)
    assert_equal(own_out, out)  # to the bit
    assert_close(own_grads, grads)


@pytest.mark.parametrize("cell", NNX_CELLS)
def test_nnx_keeps_k_columns_of_each_gate(cell):
    rnn = nnx_rnn(cell)
    x, carry = make_inputs(steps=1), make_carry(cell)
    plain_out, _ = pass_through(rnn, {})(x, carry)
    assert swap_rnn(rnn, 0.25, "rnn")
    out, (grads, _, _) = pass_through(rnn, {})(x, carry)
    assert_equal(out, plain_out)
    gates = 3 if "GRU" in cell else 4
    for layers in ("i", "h"):
        kept = [
            np.asarray(leaf).any(axis=0)
            for path, leaf in nnx.to_flat_state(nnx.as_pure(grads))
            if path[-1] == "kernel" and layers == (path[-2].removeprefix("dense_")[0])
        ]
        kept = np.concatenate(kept).reshape(gates, HIDDEN)
        assert kept.sum(axis=1).tolist() == [2] * gates
    # The defaults: options of the module, a carry of zeros
    rnn.return_carry = True
    restored = nnx.clone(rnn)
    assert restore_rnn(restored)
    assert_close(*nnx.jit(lambda *modules: [module(x) for module in modules])(rnn, restored))


@pytest.mark.parametrize("cell", ["OptimizedLSTMCell"])
def test_nnx_tree_is_unchanged(cell):
    rnn = nnx_rnn(cell)
    graph, params, rest = nnx.split(rnn, nnx.Param, ...)
    assert not restore_rnn(rnn)
    assert swap_rnn(rnn, 2, "rnn") and swap_rnn(rnn, 3, "rnn") and rnn.meprop_k == 3
    own_graph, own_params, own_rest = nnx.split(rnn, nnx.Param, ...)
    assert_equal(own_params, params)
    assert jax.tree.structure(own_rest) == jax.tree.structure(rest)
    merged = nnx.merge(own_graph, params, rest)
    assert type(merged) is MePropRNN and merged.meprop_k == 3
    x = make_inputs()
    run = nnx.jit(nnx.value_and_grad(lambda rnn: jnp.sum(rnn(x))))
    (value, grads), (own_value, own_grads) = run(merged), run(rnn)
    assert_equal((own_value, nnx.as_pure(own_grads)), (value, nnx.as_pure(grads)))
    nnx.update(rnn, own_grads)
    assert restore_rnn(rnn) and type(rnn) is nnx.RNN and not hasattr(rnn, "meprop_k")
    assert nnx.graphdef(rnn) == graph


def transposed_dot_general(x, kernel, dimension_numbers, **kwargs):
    (((axis,), _), batch) = dimension_numbers
    return jax.lax.dot_general(x, kernel, (((axis,), (1,)), batch), **kwargs)


transposed_dot_general.transposed = True


@pytest.mark.parametrize("cell", ["LSTMCell", "GRUCell"])
def test_nnx_kernels_stored_transposed(cell):
    rnn = nnx_rnn(cell)
    x, carry = make_inputs(), make_carry(cell)
    swap_rnn(rnn, 2, "rnn")
    out, (grads, *others) = pass_through(rnn, {})(x, carry)
    restore_rnn(rnn)
    for _, layer in nnx.iter_modules(rnn):
        if isinstance(layer, nnx.Linear):
            layer.kernel.set_value(layer.kernel[...].T)
            layer.dot_general = transposed_dot_general
    graph, params = nnx.split(rnn)
    plain = jax.jit(lambda params: nnx.merge(graph, params)(x, initial_carry=carry))
    assert_close(plain(params), out)
    assert swap_rnn(rnn, 2, "rnn")
    own_out, (own_grads, *own_others) = pass_through(rnn, {})(x, carry)
    turned = jax.tree.map(lambda g: g.T if g.ndim == 2 else g, grads)
    assert_close((own_out, own_grads, own_others), (out, turned, others))


@pytest.mark.parametrize("cell", ["OptimizedLSTMCell", "GRUCell"])
def test_nnx_dtype(cell):
    rnn = nnx_rnn(cell, dtype=jnp.bfloat16)
    x, carry = make_inputs(), make_carry(cell)
    out, grads = pass_through(rnn, {})(x, carry)
    swap_rnn(rnn, HIDDEN, "rnn")
    own_out, own_grads = pass_through(rnn, {})(x, carry)
    assert_equal(own_out, out)
    for own, g in zip(jax.tree.leaves(own_grads), jax.tree.leaves(grads), strict=True):
        assert own.dtype == g.dtype
        np.testing.assert_allclose(own, g, atol=0.03 * np.abs(g).max())


def test_nnx_bidirectional():
    layer = nnx.Bidirectional(nnx_rnn("LSTMCell"), nnx_rnn("GRUCell"))
    x = make_inputs()
    run = nnx.jit(lambda layer, x: layer(x, seq_lengths=LENGTHS))
    out = run(layer, x)
    assert swap_rnn(layer.forward_rnn, 2) and swap_rnn(layer.backward_rnn, 2)
    assert_close(run(layer, x), out)
    grads = nnx.jit(nnx.grad(lambda layer: jnp.sum(layer(x[:, :1]))))(layer)
    kernel = grads["backward_rnn"]["cell"]["dense_i"]["kernel"][...]
    kept = np.asarray(kernel).any(axis=0).reshape(3, HIDDEN).sum(axis=1)
    assert kept.tolist() == [0, 2, 2]  # r has no effect on a state of zeros


def test_nnx_leaves_others_alone():
    class Own(nnx.RNN):
        pass

    class OwnCell(nnx.GRUCell):
        pass

    def leaves(make):
        return not swap_rnn(nnx.eval_shape(lambda: make(nnx.Rngs(0))), 2)

    assert leaves(lambda rngs: Own(nnx.GRUCell(3, 8, rngs=rngs)))
    assert leaves(lambda rngs: nnx.RNN(OwnCell(3, 8, rngs=rngs)))
    assert leaves(lambda rngs: nnx.RNN(nnx.SimpleCell(3, 8, rngs=rngs)))
    assert leaves(lambda rngs: nnx.RNN(nnx.GRUCell(3, 8, gate_fn=nnx.hard_sigmoid, rngs=rngs)))
    assert leaves(lambda rngs: nnx.Linear(3, 8, rngs=rngs))
    assert not leaves(lambda rngs: nnx.RNN(nnx.GRUCell(3, 8, rngs=rngs)))
    other = nnx.eval_shape(lambda: nnx.RNN(nnx.GRUCell(3, 8, rngs=nnx.Rngs(0))))
    other.cell.dense_i.dot_general = lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs)
    assert not swap_rnn(other, 2)
    plain = nnx.RNN(nnx.SimpleCell(3, 8, rngs=nnx.Rngs(0)))
    own = MePropRNN(plain.cell)
    assert_equal(own(make_inputs()), plain(make_inputs()))


def test_nnx_impossible_k():
    rnn = nnx_rnn("GRUCell")
    with pytest.raises(ValueError, match="more than the 8 output features of layer 'encoder/0'"):
        swap_rnn(rnn, 9, "encoder/0")
    with pytest.raises(TypeError, match="k must be"):
        swap_rnn(rnn, "all", "encoder/0")
    assert type(rnn) is nnx.RNN


@pytest.mark.parametrize("cell", ["OptimizedLSTMCell", "GRUCell"])
def test_compiled_backward_pass_is_cheaper(cell):
    steps, hidden = 2, 128

    def make():
        return nnx.RNN(NNX_CELLS[cell](128, hidden, rngs=nnx.Rngs(0)), unroll=steps)

    rnn = nnx.eval_shape(make)  # unrolled, no loop is left
    x = jax.ShapeDtypeStruct((16, steps, 128), jnp.float32)

    def flops():
        graph, params, rest = nnx.split(rnn, nnx.Param, ...)

        def run(params, x):
            return nnx.merge(graph, params, rest)(x, initial_carry=make_zeros(cell, 16, hidden))

        pull = jax.eval_shape(lambda params, x: jax.vjp(run, params, x)[1], params, x)
        dy = jax.ShapeDtypeStruct((16, steps, hidden), jnp.float32)
        return program_flops(jax.jit(lambda pull, dy: pull(dy)).lower(pull, dy).compile())

    plain = flops()
    swap_rnn(rnn, 4, "rnn")
    assert flops() < 0.25 * plain
