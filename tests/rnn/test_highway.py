"""Highway backpropagation through time against a sum over all paths, and the exact derivative."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from priorityprop_jax.rnn.highway import _along_residual, highway_rnn
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams
from priorityprop_jax.rnn.rounds import HighwayReport

INPUTS, HIDDEN, STEPS, BATCH = 3, 4, 5, 2
CELLS = ("gru", "gru without biases", "lstm")


def draw(rng, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


def make(name, *, steps=STEPS, batch=(BATCH,), seed=0, scale=0.3, **kwargs):
    rng = np.random.default_rng(seed)
    gates = 4 if name == "lstm" else 3
    kernel = draw(rng, gates * HIDDEN, INPUTS, **kwargs)
    recurrent = draw(rng, gates * HIDDEN, HIDDEN, scale=scale, **kwargs)
    bias, small = (draw(rng, n * HIDDEN, **kwargs) for n in (gates, 1))
    h, c = (draw(rng, *batch, HIDDEN, **kwargs) for _ in range(2))
    xs = draw(rng, steps, *batch, INPUTS, **kwargs)
    if name == "lstm":
        return LSTMParams(kernel, recurrent, bias), (c, h), xs
    biases = (bias, small) if name == "gru" else (None, None)
    return GRUParams(kernel, recurrent, *biases), h, xs


def step(params, direct, through, x):
    """A plain cell; the state enters once past the recurrent kernel and once through it."""
    if isinstance(params, LSTMParams):
        y = params.input_kernel @ x + params.recurrent_kernel @ through[1] + params.bias
        i, f, g, o = jnp.split(y, 4)
        c = jax.nn.sigmoid(f) * direct[0] + jax.nn.sigmoid(i) * jnp.tanh(g)
        return c, jax.nn.sigmoid(o) * jnp.tanh(c)
    of_x, of_h = params.input_kernel @ x, params.recurrent_kernel @ through
    if params.input_bias is not None:
        of_x = of_x + params.input_bias
        of_h = of_h.at[2 * HIDDEN :].add(params.recurrent_bias)
    (x_r, x_z, x_n), (h_r, h_z, h_n) = jnp.split(of_x, 3), jnp.split(of_h, 3)
    z = jax.nn.sigmoid(x_z + h_z)
    return (1 - z) * jnp.tanh(x_n + jax.nn.sigmoid(x_r + h_r) * h_n) + z * direct


def plain(params, carry, xs):
    def one(carry, x):
        cell = jax.vmap(functools.partial(step, params))
        carry = cell(carry, carry, x)
        return carry, (carry[1] if isinstance(carry, tuple) else carry, carry)

    final, (hs, carries) = jax.lax.scan(one, carry, xs)
    return final, hs, carries


def cotangents(out, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw(rng, *x.shape, dtype=x.dtype), out)


def assert_close(a, b, tolerance=1e-10):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


def own(iterations=None, probe=None, **options):
    options = {"iterations": iterations, "probe": probe, "all_carries": True} | options
    return functools.partial(highway_rnn, **options)


@pytest.mark.parametrize("name", CELLS)
def test_exact(name):
    with jax.enable_x64(True):
        args = make(name, dtype=jnp.float64)

        @jax.jit
        def run(args):
            results = []
            for function in (plain, own(unroll=2), own(STEPS - 1)):
                out, pull = jax.vjp(function, *args)
                results.append((out, pull(cotangents(out))))
            return results

        expected, *others = run(args)
        for result in others:
            assert_close(result, expected)


def states_of(jacobian, carry):
    """A Jacobian of trees as one matrix."""
    rows = jax.tree.leaves(jacobian, is_leaf=lambda x: jax.tree.structure(x) == carry)
    return jnp.concatenate([jnp.concatenate(jax.tree.leaves(row), axis=1) for row in rows])


def sums_over_paths(params, carry, xs, out_bar):
    """For each k, gradients from the paths with at most k passes of the kernel; no batch."""
    steps, structure = len(xs), jax.tree.structure(carry)
    flat = lambda state: np.concatenate(jax.tree.leaves(state))  # noqa: E731
    states, past, through = [carry], [], []

    @jax.jit
    def linear(state, x):
        jacobians = [jax.jacrev(step, n)(params, state, state, x) for n in (1, 2)]
        return [states_of(jacobian, structure) for jacobian in jacobians]

    once = lambda p, state, x: step(p, state, state, x)  # noqa: E731
    pull = jax.jit(lambda state, x, bar: jax.vjp(once, params, state, x)[1](bar))
    run = jax.jit(once)
    for x in xs:
        for ways, jacobian in zip((past, through), linear(states[-1], x), strict=True):
            ways.append(np.asarray(jacobian))
        states.append(run(params, states[-1], x))
    out_bar = jax.tree.map(np.asarray, out_bar)
    for k in range(steps):
        w = []
        for s in range(steps):
            total = 0
            for t in range(s, steps):  # from the loss at t back to s
                for path in itertools.product((0, 1), repeat=t - s):
                    if sum(path) <= k:
                        sent = flat(jax.tree.map(lambda g, t=t: g[t], out_bar))
                        for u, kernel in zip(range(t, s, -1), reversed(path), strict=True):
                            sent = (through if kernel else past)[u].T @ sent
                        total = total + sent
            w.append(total)
        dparams, dxs = jax.tree.map(lambda p: np.zeros(p.shape), params), []
        for s, x in enumerate(xs):
            like = jax.tree.leaves(carry)
            bar = jax.tree.unflatten(structure, np.split(w[s], len(like)))
            dp, dstate, dx = pull(states[s], x, bar)
            dparams = jax.tree.map(np.add, dparams, dp)
            dxs.append(dx)
            dcarry = dstate if s == 0 else dcarry  # noqa: F821
        yield (dparams, dcarry, np.stack(dxs)), np.stack(w)


@pytest.mark.parametrize("name", ["gru", "lstm"])
def test_rounds_are_sums_over_paths(name):
    steps = 4
    with jax.enable_x64(True):
        params, carry, xs = make(name, steps=steps, batch=(), dtype=jnp.float64)

        @jax.jit
        def run(*args):
            results = []
            for k in range(steps):
                probe = jnp.zeros(3)
                function = lambda *args, k=k: own(k, args[-1])(*args[:-1])[2]  # noqa: E731
                out, pull = jax.vjp(function, *args, probe)
                out_bar = cotangents(out)
                results.append((pull(out_bar), out_bar))
            return results

        results = run(params, carry, xs)
        sums = list(sums_over_paths(params, carry, xs, results[0][1]))
        for k, ((*grads, report), _) in enumerate(results):
            (expected, w), (_, earlier) = sums[k], sums[k - 1]
            assert_close(tuple(grads), expected)
            rounds, correction, stopped = report
            assert (rounds, stopped) == (k, 0)
            if name == "gru" and k:
                change = np.linalg.norm(w - earlier) / np.linalg.norm(w)
                np.testing.assert_allclose(correction, change, rtol=1e-5)
        # It is engaged: few rounds are not the derivative.
        first, last = (results[k][0][0].recurrent_kernel for k in (0, -1))
        assert np.linalg.norm(first - last) > 1e-3 * np.linalg.norm(last)


def report_of(args, **options):
    def loss_fn(params, probe):
        final, hs = highway_rnn(params, *args[1:], probe=probe, **options)
        return jnp.sum(hs[-1]) + jnp.sum(jax.tree.leaves(final)[0])

    return jax.grad(loss_fn, (0, 1))(args[0], jnp.zeros(3))


def test_rounds_stop():
    # One with kernels so large that corrections grow: what they would break is taken back.
    args, wild = make("gru", steps=8), make("gru", steps=8, scale=4.0)
    run = jax.jit(
        lambda args, wild: (
            report_of(args, iterations=7, tol=0.05),
            report_of(args, iterations=0)[1],
            report_of(wild, iterations=7),
            [report_of(args)[1]],
        )
    )
    (_, report), none, (grads, broken), (exact,) = run(args, wild)
    rounds, correction, stopped = report
    assert 1 <= rounds < 7 and correction <= 0.05 and not stopped
    assert not np.any(none) and not np.any(exact)
    assert broken[2] == 1 and broken[0] < 7
    rounds, wild_rounds = int(rounds), int(broken[0])
    again = jax.jit(
        lambda args, wild: (
            report_of(args, iterations=rounds)[1],
            report_of(wild, iterations=wild_rounds)[0],
        )
    )
    same, kept = again(args, wild)
    np.testing.assert_allclose(same, report, rtol=1e-5)
    assert_close(grads, kept, 1e-5)


def total(iterations):
    def loss_fn(params, carry, xs):
        return jnp.sum(jnp.sin(highway_rnn(params, carry, xs, iterations=iterations)[1]))

    return loss_fn


def test_under_transformations():
    params, carry, xs = make("gru")
    more = jax.tree.map(lambda p: jnp.stack([0.5 * p, p]), params)
    flat = lambda x, *lead: x.reshape(*lead, BATCH, x.shape[-1])  # noqa: E731

    @jax.jit
    def run(more, carry, xs):
        loss_fn = total(2)
        grad = jax.grad(loss_fn)
        lean = total(None)
        directed = lambda x: jnp.vdot(xs, jax.grad(lean, 2)(params, carry, x))  # noqa: E731
        plainly = lambda x: jnp.sum(jnp.sin(plain(params, carry, x)[1]))  # noqa: E731
        return (
            grad(params, carry, xs),
            jax.vmap(jax.grad(jax.checkpoint(loss_fn)), (0, None, None))(more, carry, xs),
            grad(params, flat(carry, 1), flat(xs, STEPS, 1)),  # batch dimensions are one
            jax.grad(directed)(xs),
            jax.grad(lambda x: jnp.vdot(xs, jax.grad(plainly)(x)))(xs),
        )

    grads, mapped, flattened, second, plain_second = run(more, carry, xs)
    assert_close(jax.tree.map(lambda g: g[1], mapped), grads, 1e-5)
    assert_close(flattened, grads, 1e-5)
    assert_close(second, plain_second, 1e-4)
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda xs: highway_rnn(params, carry, xs)[1], (xs,), (xs,))
    with pytest.raises(ValueError, match="Reverse-mode"):  # JAX's own words
        inner = lambda xs: jnp.sum(jax.grad(total(2), 2)(params, carry, xs))  # noqa: E731
        jax.make_jaxpr(jax.grad(inner))(xs)


def test_bfloat16_and_nan():
    args = make("lstm", dtype=jnp.bfloat16)

    @jax.jit
    def run(args):
        out, pull = jax.vjp(lambda *args: own(STEPS)(*args)[1], *args)
        ones = jnp.ones_like(out)
        loss_fn = lambda *args: jnp.sum(plain(*args)[1])  # noqa: E731
        exact = jax.grad(loss_fn, (0, 1, 2))(*jax.tree.map(jnp.float32, args))
        return pull(ones), pull(ones.at[2, 1, 3].set(jnp.nan)), exact

    grads, broken, exact = run(args)
    for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
        assert g.dtype == jnp.bfloat16
        assert np.linalg.norm(np.asarray(g, np.float32) - e) < 0.05 * np.linalg.norm(e)
    nan = jax.tree.map(lambda g: np.isnan(np.asarray(g, np.float32)), broken)
    assert all(np.any(g) for g in nan[0])
    assert np.any(nan[2][2, 1]) and not np.any(nan[2][3])


def test_few_steps():
    args = make("gru", steps=0)
    grad = jax.jit(jax.grad(lambda *args: jnp.sum(own(2)(*args)[0]), 1))
    assert_close(grad(*args), np.ones((BATCH, HIDDEN)))
    one = make("gru", steps=1)
    report = jax.jit(lambda args: report_of(args, iterations=3)[1])(one)
    assert not np.any(report)  # exact without a round
    probe = HighwayReport(*[jnp.zeros(())] * 3)
    loss_fn = lambda probe: jnp.sum(highway_rnn(*one, iterations=3, probe=probe)[0])  # noqa: E731
    assert type(jax.eval_shape(jax.grad(loss_fn), probe)) is HighwayReport


@pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda kind: kind.name)
def test_batch_sharded_over_a_mesh(kind):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    args = make("gru", batch=(8,))
    params, carry, xs = args
    sharded = jax.tree.map(place, params), place(carry, "data"), place(xs, None, "data")
    run = jax.jit(jax.grad(total(2), (0, 2)))
    with jax.set_mesh(mesh):
        found = run(*sharded)
    assert_close(found, run(*args), 1e-5)


# JAX checks along which axes of a mesh arrays differ between shards, loops' carries above all.
@pytest.mark.parametrize(("name", "iterations"), [("lstm", None), ("lstm", 2), ("gru", 2)])
def test_batch_split_by_hand_over_a_mesh(name, iterations):
    params, carry, xs = make(name, batch=(8,))
    mesh, over_batch = Mesh(np.array(jax.devices()), ("data",)), PartitionSpec("data")

    def grads(params, carry, xs, sum_up=lambda x: x):
        def loss(params, carry, xs):
            hs = highway_rnn(params, carry, xs, iterations=iterations)[1]
            return sum_up(jnp.sum(jnp.sin(hs)))

        return jax.grad(loss, (0, 1, 2))(params, carry, xs)

    summed = functools.partial(grads, sum_up=lambda x: jax.lax.psum(x, "data"))
    specs = PartitionSpec(), over_batch, PartitionSpec(None, "data")
    shards = jax.shard_map(summed, mesh=mesh, in_specs=specs, out_specs=specs, check_vma=True)
    assert_close(jax.jit(shards)(params, carry, xs), grads(params, carry, xs), 1e-5)


@pytest.mark.parametrize(("name", "iterations"), [("lstm", None), ("gru", 2)])
def test_no_rows(name, iterations):
    iterations = None if iterations is None else np.int64(iterations)
    args = make(name, batch=(0,))
    grads = jax.grad(total(iterations), (0, 2))(*args)
    assert grads[1].shape == args[2].shape and not any(np.any(g) for g in jax.tree.leaves(grads[0]))


def test_the_residual_path_is_the_same_one_step_after_the_other_and_all_at_once(monkeypatch):
    rng = np.random.default_rng(0)
    a, b = (rng.normal(size=(6, 3)).astype(np.float32) for _ in range(2))
    expected = np.zeros_like(b)
    for t in range(6):
        expected[t] = sum(np.prod(a[t + 1 : s + 1], axis=0) * b[s] for s in range(t, 6))
    for backend in ("cpu", "tpu"):
        monkeypatch.setattr(jax, "default_backend", lambda backend=backend: backend)
        assert_close(_along_residual(a, b), expected, 1e-5)


def test_wrong_input():
    params, carry, xs = make("gru")
    run = functools.partial(highway_rnn, params, carry, xs)
    with pytest.raises(TypeError, match="got dict"):
        highway_rnn({}, carry, xs)
    with pytest.raises(TypeError, match="iterations must be"):
        run(iterations=1.0)
    with pytest.raises(ValueError, match="0 or more, or None"):
        run(iterations=-1)
    with pytest.raises(ValueError, match="tol must be 0 or more"):
        run(iterations=1, tol=-1.0)
    with pytest.raises(TypeError, match="tol must be a number"):
        run(iterations=1, tol="small")
    with pytest.raises(ValueError, match="give both"):
        run(tol=0.1)
    with pytest.raises(ValueError, match="carry of gru"):
        highway_rnn(params, carry[:1], xs)
    with pytest.raises(ValueError, match="probe"):
        run(probe=jnp.zeros(2))
