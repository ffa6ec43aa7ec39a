"""The recurrence of LSTM and GRU by native kernels, each instruction set that runs here.

`flax.nnx.RNN` and automatic derivatives are the reference.
"""

import concurrent.futures
import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding

from priorityprop_jax.core import native as core_native
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.rnn import kernels, native
from priorityprop_jax.rnn.highway import highway_rnn
from priorityprop_jax.rnn.lean import LinenLeanRNN, lean_rnn
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams

P = jax.P
AVAILABLE, STATUS = core_native.native_status()
needs_kernels = pytest.mark.skipif(not AVAILABLE, reason=STATUS)
needs_native = pytest.mark.skipif(not native.are_here(), reason=STATUS)
NAMES = ["avx512", "avx2", "base"]
# rows, steps, inputs, hidden
SIZES = [
    (1, 1, 1, 1),
    (2, 5, 3, 3),
    (7, 3, 2, 17),
    (1, 6, 4, 33),
    (70, 2, 5, 257),
    (13, 4, 40, 100),
    (24, 3, 9, 130),
]


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    """What runs is what is to be tested, not what takes long."""
    monkeypatch.setattr(native, "_LEAST_STEPS", 1)


@pytest.fixture(params=NAMES)
def instruction_set(request, monkeypatch):
    """Has the kernels of one instruction set used."""
    paths = core_native._installed()
    if request.param not in paths or not core_native._can_run(paths, request.param):
        pytest.skip(f"{request.param} was not built, or does not run here")
    library = core_native._Library(request.param, "forced")
    monkeypatch.setattr(core_native, "_load_best", lambda: library)
    monkeypatch.setattr(native, "_SOONER", NAMES)
    jax.clear_caches()  # of programs with other kernels


CELLS = ("lstm", "gru")
each_cell = pytest.mark.parametrize("cell", CELLS)


def make(rows, steps, inputs, hidden, cell="lstm"):
    rng, gates = np.random.default_rng(0), 4 if cell == "lstm" else 3
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)  # noqa: E731
    kernels = draw(gates * hidden, inputs), draw(gates * hidden, hidden) / hidden**0.5
    bias, carry = draw(gates * hidden), (draw(rows, hidden), draw(rows, hidden))
    if cell == "lstm":
        return LSTMParams(*kernels, bias), carry, draw(steps, rows, inputs)
    return GRUParams(*kernels, bias, draw(hidden)), carry[0], draw(steps, rows, inputs)


def alone(function):
    """By JAX alone."""

    @functools.wraps(function)
    def run(*args):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(native, "knows", lambda *_: False)
            return function(*args)

    return run


def plain(params, carry, xs):
    """The cell of Flax, in a scan."""

    def gru(h, x):
        x_r, x_z, x_n = jnp.split(x @ params.input_kernel.T + params.input_bias, 3, axis=-1)
        h_r, h_z, h_n = jnp.split(h @ params.recurrent_kernel.T, 3, axis=-1)
        r, z = jax.nn.sigmoid(x_r + h_r), jax.nn.sigmoid(x_z + h_z)
        n = jnp.tanh(x_n + r * (h_n + params.recurrent_bias))
        h = (1 - z) * n + z * h
        return h, (h, h)

    def lstm(carry, x):
        y = params.input_kernel @ x.T + params.recurrent_kernel @ carry[1].T
        i, f, g, o = jnp.split(y.T + params.bias, 4, axis=-1)
        c = jax.nn.sigmoid(f) * carry[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
        carry = c, jax.nn.sigmoid(o) * jnp.tanh(c)
        return carry, (carry[1], carry)

    step = lstm if isinstance(params, LSTMParams) else gru
    final, (hs, carries) = jax.lax.scan(step, carry, xs)
    return final, hs, carries


own = functools.partial(highway_rnn, all_carries=True)


def both_passes(function, *args):
    out, pull = jax.vjp(function, *args)
    rng = np.random.default_rng(7)
    return out, pull(jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), out))


def assert_close(a, b, tolerance=1e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(*map(jax.tree.leaves, (a, b)), strict=True):
        assert x.shape == y.shape and x.dtype == y.dtype
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.linalg.norm(x - y) <= tolerance * (np.linalg.norm(y) + 1e-30)


def kernels_in(function, *args):
    traced = jax.make_jaxpr(lambda *args: function(*args))(*args)  # anew
    return sum(str(traced).count(f"priorityprop_{cell}") for cell in CELLS)


@needs_kernels
@each_cell
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_values_and_gradients_are_those_of_a_scan(instruction_set, sizes, cell):
    args = make(*sizes, cell)
    found = jax.jit(functools.partial(both_passes, own))(*args)
    assert_close(found, jax.jit(functools.partial(both_passes, plain))(*args))
    values = jax.jit(own)(*args)  # where nothing is kept for a backward pass
    assert_close(values, found[0], 0)
    without_carries = lambda *args: highway_rnn(*args)[1]  # noqa: E731
    grads = [both_passes(f, *args) for f in (without_carries, lambda *args: plain(*args)[1])]
    assert_close(*grads)


@needs_kernels
def test_functions_of_gates_are_precise(instruction_set):
    """Of each gate alone, in double precision."""
    xs = np.concatenate([np.linspace(-105, 105, 4001), np.geomspace(1e-30, 1, 200)])
    xs = np.concatenate([xs, [3e38, -3e38, 0.0]]).astype(np.float32)
    big, one = np.float32(1e4), jnp.ones((len(xs), 1))
    still = jnp.zeros((4, 1))
    one_gate = lambda gate, rest: LSTMParams(  # noqa: E731
        jnp.zeros((4, 1)).at[gate].set(1), still, jnp.full(4, rest).at[gate].set(0)
    )
    with np.errstate(over="ignore"):
        sigmoid, tanh = 1 / (1 + np.exp(-xs.astype(np.float64))), np.tanh(xs.astype(np.float64))
    inputs = jnp.asarray(xs)[None, :, None]
    (c, _), _ = highway_rnn(one_gate(1, -big), (one, one), inputs)
    np.testing.assert_allclose(c[:, 0], sigmoid, rtol=4e-7, atol=1e-37)
    (c, h), _ = highway_rnn(one_gate(2, big), (0 * one, one), inputs)
    np.testing.assert_allclose(c[:, 0], tanh, rtol=4e-7, atol=1e-37)
    np.testing.assert_allclose(h[:, 0], np.tanh(tanh), rtol=8e-7, atol=1e-37)


@needs_kernels
@each_cell
def test_nan_goes_where_it_belongs(instruction_set, cell):
    params, carry, xs = make(9, 4, 3, 21, cell)
    hs = highway_rnn(params, carry, xs.at[2, 5, 1].set(jnp.nan))[1]
    expected = np.zeros(hs.shape, bool)
    expected[2:, 5] = True
    np.testing.assert_array_equal(np.isnan(hs), expected)
    _, pull = jax.vjp(lambda *args: highway_rnn(*args)[1], params, carry, xs)
    dparams, _, dxs = pull(jnp.ones_like(hs).at[1, 4, 20].set(jnp.nan))
    expected = np.zeros(xs.shape, bool)
    expected[:2, 4] = True
    np.testing.assert_array_equal(np.isnan(dxs), expected)
    assert np.isnan(dparams[2]).any() and np.isnan(dparams.recurrent_kernel).all()


def model(hidden=20, cell=nnx.OptimizedLSTMCell, **options):
    rnn = nnx.RNN(cell(6, hidden, rngs=nnx.Rngs(0), **options))
    x = jnp.asarray(np.random.default_rng(1).normal(size=(8, 7, 6)), jnp.float32)
    return rnn, x


OPTIONS = {
    "lengths": {"seq_lengths": jnp.array([3, 7, 1, 5, 2, 7, 4, 6]), "return_carry": True},
    "reverse": {"reverse": True, "keep_order": True},
    "both": {"seq_lengths": jnp.arange(8) % 7 + 1, "return_carry": True, "reverse": True},
    "last": {"return_carry": True},
}


@needs_native
@pytest.mark.parametrize("cell", [nnx.OptimizedLSTMCell, nnx.LSTMCell, nnx.GRUCell])
@pytest.mark.parametrize("name", OPTIONS)
def test_the_module_of_flax(name, cell):
    rnn, x = model(cell=cell)
    carry = (jnp.full((8, 20), 0.3), jnp.full((8, 20), -0.2))
    carry = carry[1] if cell is nnx.GRUCell else carry

    def run(rnn, x):
        graph, params, rest = nnx.split(rnn, nnx.Param, ...)
        function = lambda params, x: nnx.merge(graph, params, rest)(  # noqa: E731
            x, initial_carry=carry, **OPTIONS[name]
        )
        step = jax.jit(functools.partial(both_passes, function))
        return step(params, x), kernels_in(step, params, x)

    expected, none = run(rnn, x)
    lean_rnn(rnn)
    found, some = run(rnn, x)
    assert (none, some) == (0, 2)
    assert_close(found, expected)


@needs_native
@each_cell
def test_many_rows_are_theirs_too(monkeypatch, cell):
    x, carry = jnp.ones((65, 2, 3)), (jnp.zeros((65, 4)),) * 2
    kind, other, of_linen = (nnx.OptimizedLSTMCell, nnx.LSTMCell, nn.LSTMCell)
    if cell == "gru":
        carry, kind, other, of_linen = carry[0], nnx.GRUCell, nnx.GRUCell, nn.GRUCell
    rnn = nnx.RNN(kind(3, 4, rngs=nnx.Rngs(0)), rngs=False)
    half = nnx.RNN(other(3, 4, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)), rngs=False)
    linen = LinenLeanRNN(of_linen(4))
    variables = linen.init(jax.random.key(0), x)
    assert lean_rnn(rnn) == lean_rnn(half) == 1

    def own(rnn):
        if rnn is linen:
            call = lambda x: linen.apply(variables, x)  # noqa: E731
        else:
            call = lambda x: nnx.clone(rnn)(x, initial_carry=carry)  # noqa: E731
        return "custom_vjp_call" in str(jax.make_jaxpr(call)(x))

    assert [own(rnn) for rnn in (rnn, linen, half)] == [True, True, False]
    monkeypatch.setattr(core_native, "_load_best", lambda: core_native._Library(None, "none"))
    assert not any(own(rnn) for rnn in (rnn, linen, half))


@needs_native
@pytest.mark.parametrize("what", ["bfloat16", "float64", "rounds", "symbolic", "gpu"])
def test_what_the_kernels_do_not_know_runs_by_jax(what, monkeypatch):
    params, carry, xs = make(3, 4, 5, 6)
    run, call = highway_rnn, jax.make_jaxpr
    with jax.enable_x64(what == "float64"):
        if what in ("bfloat16", "float64"):
            cast = lambda x: x.astype(what)  # noqa: E731
            params, carry, xs = jax.tree.map(cast, (params, carry, xs))
        elif what == "rounds":
            run = functools.partial(highway_rnn, iterations=2)
        elif what == "symbolic":
            (rows,) = jax.export.symbolic_shape("rows")

            def shape(x, at):
                sizes = (*x.shape[:at], rows, *x.shape[at + 1 :])
                return jax.ShapeDtypeStruct(sizes, x.dtype)

            carry, xs = tuple(shape(x, 0) for x in carry), shape(xs, 1)
        else:
            monkeypatch.setattr(core_native, "platform", lambda: "gpu")
        assert "priorityprop" not in str(call(run)(params, carry, xs))


@needs_native
def test_where_kernels_are_not_sooner_there_is_none(monkeypatch):
    steps = 8
    monkeypatch.setattr(native, "_LEAST_STEPS", steps)
    assert [kernels_in(own, *make(3, n, 5, 6)) for n in (steps - 1, steps)] == [0, 1]
    monkeypatch.setattr(core_native, "_load_best", lambda: core_native._Library("base", "old"))
    assert kernels_in(own, *make(3, steps, 5, 6)) == 0


def test_without_native_kernels(monkeypatch):
    args = make(3, 4, 5, 6)
    expected = both_passes(own, *args)
    monkeypatch.setattr(core_native, "_load_best", lambda: core_native._Library(None, "none"))
    assert kernels_in(own, *args) == 0
    assert_close(both_passes(own, *args), expected)


@needs_native
@each_cell
def test_no_steps_and_no_rows(cell):
    for sizes in ((0, 3, 2, 4), (2, 0, 2, 4)):
        out, (grads, *_) = both_passes(own, *make(*sizes, cell))
        assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(out))
        assert not any(np.any(g) for g in grads)


@needs_native
@each_cell
def test_gradients_of_gradients(cell):
    args = make(3, 4, 5, 6, cell)

    def twice(function):
        def norm(params, carry, xs):
            loss = lambda *args: sum(  # noqa: E731
                jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(function(*args))
            )
            grads = jax.grad(loss, (0, 1, 2))(params, carry, xs)
            return sum(jnp.sum(jnp.cos(g)) for g in jax.tree.leaves(grads))

        return jax.jit(jax.grad(norm, (0, 1, 2)))(*args)

    assert kernels_in(lambda *args: jax.grad(lambda *a: jnp.sum(own(*a)[1]))(*args), *args) == 2
    assert_close(twice(own), twice(plain), 2e-5)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda xs: own(*args[:2], xs), args[2:], args[2:])


@needs_native
@each_cell
def test_rematerialized_and_eager(cell):
    args = make(3, 4, 5, 6, cell)
    loss = lambda *args: jnp.sum(jnp.sin(own(*args)[1]))  # noqa: E731
    expected = jax.grad(lambda *args: jnp.sum(jnp.sin(plain(*args)[1])), (0, 1, 2))(*args)
    assert_close(jax.jit(jax.grad(jax.checkpoint(loss), (0, 1, 2)))(*args), expected)
    assert_close(jax.grad(loss, (0, 1, 2))(*args), expected)
    with jax.disable_jit():
        assert_close(jax.grad(loss, (0, 1, 2))(*args), expected)
    # What a backward pass may write over is still there for a second one.
    _, pull = jax.vjp(own, *args)
    ones = jax.tree.map(jnp.ones_like, own(*args))
    assert_close(pull(ones), pull(ones), 0)


def mapped_cases(cell="lstm"):
    params, carry, xs = make(3, 4, 5, 6, cell)
    more = jax.tree.map(lambda x: jnp.stack([x, 0.5 * x]), (params, carry, xs))
    return {
        "inputs": ((None, None, 0), (params, carry, more[2])),
        "states": ((None, 0, 0), (params, *more[1:])),
        "parameters": ((0, None, None), (more[0], carry, xs)),
        "all": ((0, 0, 0), more),
        "bias": (
            (type(params)(None, None, 0), None, None),
            (params._replace(**{params._fields[2]: more[0][2]}), carry, xs),
        ),
    }


@needs_native
@each_cell
@pytest.mark.parametrize("name", mapped_cases())
def test_vmap(name, cell):
    axes, args = mapped_cases(cell)[name]
    runs = [
        jax.jit(jax.vmap(functools.partial(both_passes, function), axes))(*args)
        for function in (own, plain)
    ]
    assert_close(*runs)
    twice = [
        jax.jit(jax.vmap(jax.vmap(function, axes), (None, None, 0)))(
            *args[:2], jnp.stack([args[2], -args[2]])
        )
        for function in (own, plain)
    ]
    assert_close(*twice)


@needs_native
@each_cell
@pytest.mark.parametrize("check_vma", [True, False])
def test_shards_by_hand(check_vma, cell):
    params, carry, xs = make(8, 4, 5, 6, cell)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))

    def grads(function, sum_up=lambda x: x):
        loss = lambda *args: sum_up(jnp.sum(jnp.sin(function(*args)[1])))  # noqa: E731
        return lambda *args: jax.grad(loss, (1, 2))(*args)

    specs = P(), P("data"), P(None, "data")
    shard = functools.partial(
        jax.shard_map, mesh=mesh, in_specs=specs, out_specs=specs[1:], check_vma=check_vma
    )
    found = jax.jit(shard(grads(own)))(params, carry, xs)
    assert_close(found, grads(plain)(params, carry, xs))


@needs_native
@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
@each_cell
def test_shards_by_the_compiler(kind, cell):
    args = params, carry, xs = make(8, 4, 5, 6, cell)
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, P(*spec)))  # noqa: E731
    placed = (
        jax.tree.map(place, params),
        jax.tree.map(lambda x: place(x, "data"), carry),
        place(xs, None, "data"),
    )
    loss = lambda function, *args: jnp.sum(jnp.sin(function(*args)[1]))  # noqa: E731
    grads = jax.jit(jax.grad(functools.partial(loss, own), (0, 1, 2)))
    with jax.set_mesh(mesh):
        found = grads(*placed)
        compiled = grads.lower(*placed).compile().as_text()
    assert_close(found, jax.grad(functools.partial(loss, plain), (0, 1, 2))(*args))
    assert f"f32[4,2,{24 if cell == 'lstm' else 18}]" in compiled, (
        "the batch of the kernels is not split"
    )


@needs_native
@each_cell
def test_an_exported_program_has_no_kernels(cell):
    args = make(3, 4, 5, 6, cell)
    step = jax.jit(functools.partial(both_passes, own))
    exported = jax.export.export(step)(*args)
    assert f"priorityprop_{cell}" not in exported.mlir_module()
    assert f"priorityprop_{cell}" in step.lower(*args).as_text()
    assert_close(exported.call(*args), step(*args))
    everywhere = jax.export.export(step, platforms=("cpu", "tpu"))(*args)
    assert_close(everywhere.call(*args), step(*args))


@needs_native
@each_cell
def test_flops_are_those_of_jax_alone(cell):
    args = make(3, 4, 20, 30, cell)
    for function in (own, functools.partial(both_passes, own)):
        counts = [program_flops(jax.make_jaxpr(f)(*args)) for f in (function, alone(function))]
        assert abs(counts[0] / counts[1] - 1) < 0.05


@needs_native
@each_cell
def test_threads_at_once(cell):
    """More calls than cores, of which each has too few helpers."""
    args = make(16, 30, 32, 64, cell)
    step = jax.jit(functools.partial(both_passes, own))
    expected = step(*args)
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: jax.block_until_ready(step(*args)), range(40)):
            assert_close(found, expected, 0)  # whoever computes what


@needs_native
@each_cell
def test_shapes_that_do_not_fit_are_an_error(cell):
    params, carry, xs = make(3, 4, 5, 6, cell)
    kernel = {"lstm": kernels.LSTM, "gru": kernels.GRU}[cell].forward
    gates = len(params.recurrent_kernel)
    of_x = jnp.ones((4, 3, gates))
    for operands in ((of_x[..., :-1],), (of_x, jnp.ones((gates, 6))), (of_x[:, :2],)):
        bias = params[2] if cell == "lstm" else params.recurrent_bias
        whole = [of_x, params.recurrent_kernel.T, bias, *jax.tree.leaves(carry)]
        whole[: len(operands)] = operands
        with pytest.raises(jax.errors.JaxRuntimeError, match="shapes of a recurrent cell"):
            jax.block_until_ready(kernel(*whole))


@needs_native
@pytest.mark.parametrize("without", [(), ("recurrent_bias",), ("input_bias", "recurrent_bias")])
def test_biases_that_a_gru_may_lack(without):
    params, carry, xs = make(5, 4, 3, 9, "gru")
    zeros = {name: jnp.zeros_like(getattr(params, name)) for name in without}
    _, (expected, *others) = both_passes(own, params._replace(**zeros), carry, xs)
    lacking = params._replace(**dict.fromkeys(without))
    assert kernels_in(own, lacking, carry, xs) == 1
    _, (found, *rest) = both_passes(own, lacking, carry, xs)
    assert_close((found, *rest), (expected._replace(**dict.fromkeys(without)), *others), 0)


@needs_kernels
@each_cell
def test_what_runs_elsewhere_is_the_same(cell):
    """In exported programs: values and gradients by JAX alone, of the kernels' operands."""
    rng = np.random.default_rng(3)
    both = {"lstm": kernels.LSTM, "gru": kernels.GRU}[cell]
    wide = 4 * 9 if cell == "lstm" else 3 * 9
    sizes = {3: (4, 3, 9), 2: (3, 9)}
    for kernel in both:
        operands = []
        for place, (row, axes) in enumerate(kernel.operands):
            shape = sizes[axes] if row is not None else {2: (9, wide), 1: (wide,)}[axes]
            if place == 0:
                shape = (4, 3, wide)
            if axes == 1 and cell == "gru":
                shape = (9,)
            operands.append(jnp.asarray(rng.uniform(0.1, 0.9, size=shape), jnp.float32))
        expected = kernel.by_jax(*operands)
        assert_close(kernel(*operands), expected)
