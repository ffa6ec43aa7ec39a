"""meProp over an LSTM's and a GRU's steps against backpropagation through time in NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from jax.test_util import check_grads

from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams, run_cell

INPUTS, HIDDEN, STEPS, BATCH = 3, 5, 4, 2
CELLS = ("lstm", "gru", "gru without biases")


def draw(rng, *shape, scale=1.0, dtype=jnp.float32):
    return jnp.asarray(scale * rng.normal(size=shape), dtype)


def make(name, *, inputs=INPUTS, hidden=HIDDEN, steps=STEPS, batch=(BATCH,), seed=0, **kwargs):
    rng = np.random.default_rng(seed)
    gates = 4 if name == "lstm" else 3
    kernels = [draw(rng, gates * hidden, n, scale=n**-0.5, **kwargs) for n in (inputs, hidden)]
    state = lambda: draw(rng, *batch, hidden, **kwargs)  # noqa: E731
    if name == "lstm":
        params, carry = (
            LSTMParams(*kernels, draw(rng, gates * hidden, **kwargs)),
            (state(), state()),
        )
    else:
        biases = [draw(rng, n * hidden, **kwargs) for n in (gates, 1)]
        params = GRUParams(*kernels, *(biases if name == "gru" else (None, None)))
        carry = state()
    return params, carry, draw(rng, steps, *batch, inputs, **kwargs)


def cotangents(name, run, args, seed=7):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: draw(rng, *x.shape, dtype=x.dtype), jax.eval_shape(run, *args))


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def kept(dy, k):
    """The gradient of one gate with all but k columns zero: the largest sums of magnitudes."""
    order = np.argsort(-np.abs(dy).sum(0), kind="stable")[:k]
    out = np.zeros_like(dy)
    out[:, order] = dy[:, order]
    return out


def lstm_reference(params, carry, xs, out_bar, k):
    W, U, b = (np.asarray(p, np.float64) for p in params)
    c, h = (np.asarray(x, np.float64) for x in carry)
    xs = np.asarray(xs, np.float64)
    (dc, dh), dhs, (dcs, dhs_again) = jax.tree.map(lambda x: np.asarray(x, np.float64), out_bar)
    tape, hidden = [], h.shape[1]
    for x in xs:
        y = x @ W.T + h @ U.T + b
        i, f, o = (sigmoid(y[:, n * hidden : (n + 1) * hidden]) for n in (0, 1, 3))
        g = np.tanh(y[:, 2 * hidden : 3 * hidden])
        tape.append((x, c, h, i, f, g, o, np.tanh(f * c + i * g)))
        c = f * c + i * g
        h = o * np.tanh(c)
    dW, dU, db, dxs = np.zeros_like(W), np.zeros_like(U), np.zeros_like(b), np.zeros_like(xs)
    for t in reversed(range(len(xs))):
        x, c, h, i, f, g, o, tanh_c = tape[t]
        dh = dh + dhs[t] + dhs_again[t]
        dc = dc + dcs[t] + dh * o * (1 - tanh_c**2)
        gates = (
            dc * g * i * (1 - i),
            dc * c * f * (1 - f),
            dc * i * (1 - g**2),
            dh * tanh_c * o * (1 - o),
        )
        db += np.concatenate(gates, 1).sum(0)
        dy = np.concatenate([kept(gate, k) for gate in gates], 1)
        dW += dy.T @ x
        dU += dy.T @ h
        dxs[t], dh, dc = dy @ W, dy @ U, dc * f
    return LSTMParams(dW, dU, db), (dc, dh), dxs


def gru_reference(params, carry, xs, out_bar, k):
    W, U, b, b_n = (None if p is None else np.asarray(p, np.float64) for p in params)
    h, xs = np.asarray(carry, np.float64), np.asarray(xs, np.float64)
    dh, dhs, dhs_again = jax.tree.map(lambda x: np.asarray(x, np.float64), out_bar)
    tape, hidden = [], h.shape[1]
    for x in xs:
        of_x, of_h = x @ W.T + (0 if b is None else b), h @ U.T
        r, z = (sigmoid((of_x + of_h)[:, n * hidden : (n + 1) * hidden]) for n in (0, 1))
        h_n = of_h[:, 2 * hidden :] + (0 if b_n is None else b_n)
        n = np.tanh(of_x[:, 2 * hidden :] + r * h_n)
        tape.append((x, h, r, z, n, h_n))
        h = (1 - z) * n + z * h
    dW, dU, dxs = np.zeros_like(W), np.zeros_like(U), np.zeros_like(xs)
    db, db_n = np.zeros(3 * hidden), np.zeros(hidden)
    for t in reversed(range(len(xs))):
        x, h, r, z, n, h_n = tape[t]
        dh = dh + dhs[t] + dhs_again[t]
        of_n = dh * (1 - z) * (1 - n**2)
        of_r, of_z = of_n * h_n * r * (1 - r), dh * (h - n) * z * (1 - z)
        db += np.concatenate([of_r, of_z, of_n], 1).sum(0)
        db_n += (of_n * r).sum(0)
        # The two linear maps are given different gradients by the gate n.
        to_x = np.concatenate([kept(g, k) for g in (of_r, of_z, of_n)], 1)
        to_h = np.concatenate([kept(g, k) for g in (of_r, of_z, of_n * r)], 1)
        dW += to_x.T @ x
        dU += to_h.T @ h
        dxs[t], dh = to_x @ W, to_h @ U + dh * z
    return GRUParams(dW, dU, None if b is None else db, None if b_n is None else db_n), dh, dxs


REFERENCES = {"lstm": lstm_reference, "gru": gru_reference, "gru without biases": gru_reference}


def gradients(name, args, k, **kwargs):
    run = lambda *args: run_cell(*args, k=k, all_carries=True, **kwargs)  # noqa: E731
    out_bar = cotangents(name, run, args)

    def total(*args):
        pairs = zip(jax.tree.leaves(run(*args)), jax.tree.leaves(out_bar), strict=True)
        return sum(jnp.sum(y * bar) for y, bar in pairs)

    return jax.jit(jax.grad(total, (0, 1, 2)))(*args), out_bar


def own_gradients(name, k, *args):
    """The outputs, and the gradients that they as cotangents give."""
    out, pull = jax.vjp(lambda *args: run_cell(*args, k=k), *args)
    return out, pull(out)


def assert_close(a, b, tolerance=2e-5):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance), a, b
    )


@pytest.mark.parametrize("name", CELLS)
@pytest.mark.parametrize(
    ("k", "sizes"),
    [(2, {}), (0.5, {"hidden": 8}), (1, {"steps": 1, "batch": (1,)})],
)
def test_gradients_are_the_papers(name, k, sizes):
    args = make(name, **sizes)
    grads, out_bar = gradients(name, args, k)
    count = 4 if k == 0.5 else k
    assert_close(grads, REFERENCES[name](*args, out_bar, count))


def test_the_reference_is_the_derivative_where_all_is_kept():
    for name in CELLS:
        args = make(name)
        grads, out_bar = gradients(name, args, HIDDEN)
        again = REFERENCES[name](*args, out_bar, HIDDEN)
        assert_close(grads, again)
        sparse = REFERENCES[name](*args, out_bar, 2)
        assert not np.allclose(sparse[0].recurrent_kernel, again[0].recurrent_kernel, atol=0.01)


@pytest.mark.parametrize("name", CELLS)
def test_all_kept_is_the_derivative_by_finite_differences(name):
    with jax.enable_x64(True):
        args = make(name, dtype=jnp.float64)
        run = lambda *args: run_cell(*args, k=HIDDEN, all_carries=True)  # noqa: E731
        check_grads(run, args, order=1, modes=["rev"])


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("k", [2, HIDDEN])
def test_batch_dimensions_are_one(name, k):
    params, carry, xs = make(name, batch=(2, 3))
    flat = lambda x, lead=(): x.reshape(*lead, 6, x.shape[-1])  # noqa: E731
    run = jax.jit(own_gradients, static_argnums=(0, 1))
    results = run(name, k, params, carry, xs)
    again = run(name, k, params, jax.tree.map(flat, carry), flat(xs, (STEPS,)))
    jax.tree.map(lambda x, y: np.testing.assert_array_equal(x.ravel(), y.ravel()), results, again)


@pytest.mark.parametrize("name", ["lstm", "gru"])
def test_under_transformations(name):
    params, carry, xs = make(name)
    more = jax.tree.map(lambda p: np.stack([p, 2 * np.asarray(p), -np.asarray(p)]), params)
    run = lambda p: jnp.sum(jnp.sin(run_cell(p, carry, xs, k=2)[1]))  # noqa: E731
    grad = jax.jit(jax.grad(run))
    grads = [grad(jax.tree.map(lambda p, n=n: p[n], more)) for n in range(3)]
    expected = jax.tree.map(lambda *g: np.stack(g), *grads)
    assert_close(jax.jit(jax.vmap(jax.grad(jax.checkpoint(run))))(more), expected)
    total = lambda p: jax.lax.scan(lambda s, p: (s + run(p), None), 0.0, p)[0]  # noqa: E731
    assert_close(jax.jit(jax.grad(total))(more), expected)
    unrolled = lambda p: jnp.sum(jnp.sin(run_cell(p, carry, xs, k=2, unroll=3)[1]))  # noqa: E731
    assert_close(jax.jit(jax.grad(unrolled))(params), grads[0])


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("k", [2, HIDDEN])
def test_no_steps(name, k):
    params, carry, xs = make(name, steps=0)
    (last, hs), grads = jax.jit(own_gradients, static_argnums=(0, 1))(name, k, params, carry, xs)
    assert hs.shape == (0, BATCH, HIDDEN)
    assert_close(last, carry)
    assert_close(grads[1], carry)
    assert not any(np.any(g) for g in jax.tree.leaves(grads[0]))


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("k", [1, HIDDEN])
def test_nan_is_not_dropped(name, k):
    params, carry, xs = make(name)
    _, pull = jax.vjp(lambda *args: run_cell(*args, k=k)[1], params, carry, xs)
    grads, _, dxs = pull(jnp.zeros((STEPS, BATCH, HIDDEN)).at[2, 1, 3].set(jnp.nan))
    assert all(jnp.any(jnp.isnan(g)) for g in grads)
    assert jnp.any(jnp.isnan(dxs[2, 1])) and not jnp.any(jnp.isnan(dxs[3]))


@pytest.mark.parametrize("name", ["lstm", "gru"])
@pytest.mark.parametrize("k", [2, HIDDEN])
def test_bfloat16(name, k):
    args = make(name, steps=40, dtype=jnp.bfloat16)
    grads, _ = gradients(name, args, k)
    assert all(g.dtype == jnp.bfloat16 for g in jax.tree.leaves(grads))
    run = lambda *args: run_cell(*args, k=k)  # noqa: E731
    text = str(jax.make_jaxpr(lambda *args: jax.vjp(run, *args)[1](run(*args)))(*args))
    gates = 4 if name == "lstm" else 3
    assert f"f32[{gates * HIDDEN},{INPUTS}]" in text  # weight gradients are summed in float32
    if k == HIDDEN:
        exact, _ = gradients(name, jax.tree.map(lambda x: x.astype(jnp.float32), args), k)
        for g, e in zip(jax.tree.leaves(grads), jax.tree.leaves(exact), strict=True):
            g, e = np.asarray(g, np.float32), np.asarray(e)
            assert np.linalg.norm(g - e) < 0.1 * np.linalg.norm(e)


AUTO, EXPLICIT = AxisType.Auto, AxisType.Explicit
MESHES = [
    ("lstm", 2, AUTO),
    ("gru", HIDDEN, AUTO),
    ("lstm", HIDDEN, EXPLICIT),
    ("gru", 2, EXPLICIT),
]


@pytest.mark.parametrize(("name", "k", "kind"), MESHES)
def test_batch_sharded_over_a_mesh(name, k, kind):
    args = make(name, batch=(16,))
    grads, out_bar = gradients(name, args, k)
    mesh = jax.make_mesh((8,), ("data",), axis_types=(kind,))
    place = lambda x, *spec: jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))  # noqa: E731
    params, carry, xs = args
    sharded = (
        jax.tree.map(place, params),
        jax.tree.map(lambda x: place(x, "data"), carry),
        place(xs, None, "data"),
    )
    with jax.set_mesh(mesh):
        again, _ = gradients(name, sharded, k)
    assert_close(again, grads)


def test_batch_split_by_hand_over_a_mesh():
    # Each shard keeps columns of its own, as each half of the batch does by itself.
    params, carry, xs = make("lstm", batch=(2,))

    def grads(params, carry, xs):
        return jax.grad(lambda p: jnp.sum(jnp.sin(run_cell(p, carry, xs, k=2)[1])))(params)

    mesh, specs = Mesh(np.array(jax.devices()[:2]), ("x",)), (jax.P(), jax.P("x"), jax.P(None, "x"))
    vary = lambda p: jax.tree.map(lambda x: jax.lax.pcast(x, "x", to="varying"), p)  # noqa: E731
    own = lambda p, *args: jax.lax.psum(grads(vary(p), *args), "x")  # noqa: E731
    found = jax.shard_map(own, mesh=mesh, in_specs=specs, out_specs=jax.P(), check_vma=True)
    halves = [jax.tree.map(lambda x, i=i: x[i : i + 1], carry) for i in range(2)]
    each = [grads(params, halves[i], xs[:, i : i + 1]) for i in range(2)]
    assert_close(jax.jit(found)(params, carry, xs), jax.tree.map(jnp.add, *each))


def test_wrong_input():
    params, carry, xs = make("lstm")
    with pytest.raises(ValueError, match="k=6 is more than the 5"):
        run_cell(params, carry, xs, k=6)
    with pytest.raises(ValueError, match="kernels of lstm have shapes"):
        run_cell(jax.tree.map(jnp.transpose, params), carry, xs, k=2)
    with pytest.raises(ValueError, match="carry of gru"):
        params, carry, xs = make("gru")
        run_cell(params, carry, jnp.moveaxis(xs, 0, 1), k=2)
