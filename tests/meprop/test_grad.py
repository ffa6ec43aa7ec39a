"""Row-sparse gradients of meProp's backward pass against JAX's own gradients of the same model."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec

from priorityprop_jax.core.row_grad import find_uses, row_value_and_grad
from priorityprop_jax.core.row_optimizers import row_counts, row_sparse_adam
from priorityprop_jax.core.rows import RowSparse, densify, is_row_sparse
from priorityprop_jax.meprop import meprop, meprop_dot_general, restore, value_and_grad

ROWS = (((1,), (1,)), ((), ()))  # kernel (out, in)
COLUMNS = (((1,), (0,)), ((), ()))


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


X = normal(9, 8, 5)


def net(*, k=4, dtype=None, **options):
    model = nnx.Sequential(
        nnx.Linear(5, 16, dtype=dtype, rngs=nnx.Rngs(0)),
        nnx.tanh,
        nnx.Linear(16, 24, dtype=dtype, rngs=nnx.Rngs(1)),
        nnx.tanh,
        nnx.Linear(24, 3, dtype=dtype, rngs=nnx.Rngs(2)),
    )
    meprop(model, k, **options)
    return model


def loss_fn(model, x):
    return jnp.sum(jnp.sin(model(x)).astype(jnp.float32) ** 2)


def pure(grads):
    return nnx.to_pure_dict(grads) if isinstance(grads, nnx.State) else grads


def assert_close(got, want, **tolerance):
    tolerance = {"rtol": 1e-5, "atol": 1e-5} | tolerance
    got, want = densify(got), want
    got, want = ([np.asarray(x) for x in jax.tree.leaves(t)] for t in (got, want))
    assert len(got) == len(want)
    for x, y in zip(got, want, strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_allclose(x.astype(np.float32), y.astype(np.float32), **tolerance)


def kinds(grads):
    """The kernels whose gradients are row-sparse, by the path of the tree."""
    paths, _ = jax.tree_util.tree_flatten_with_path(grads, is_leaf=is_row_sparse)
    names = [jax.tree_util.keystr(path) for path, g in paths if isinstance(g, RowSparse)]
    return [name.removesuffix(".value") for name in names]


# Modules.


@pytest.mark.parametrize(
    "options, jit",
    [({}, False), ({}, True), ({"pattern": "tile", "tile": 4}, True),
     ({"pattern": "random"}, False), ({"k": 0.25}, True), ({"k": (2, 4)}, True)],
)  # fmt: skip
def test_gradients_of_a_module_are_whole_gradients_in_rows(options, jit):
    model = net(**options)
    function = value_and_grad(loss_fn)
    run = nnx.jit if jit else lambda f: f
    value, grads = run(function)(model, X)
    # In the same mode: a random choice goes by the last bit of the output gradients.
    plain, expected = run(nnx.value_and_grad(loss_fn))(model, X)
    np.testing.assert_allclose(value, plain, rtol=5e-6)
    assert isinstance(grads, nnx.State)
    assert_close(grads, expected)
    for i, k in ((0, 4), (2, 6 if options.get("k") == 0.25 else 4)):
        kernel = grads["layers"][i]["kernel"].get_value()
        assert isinstance(kernel, RowSparse) and kernel.values.shape[0] == k
        assert kernel.rows.dtype == jnp.int32 and (np.diff(kernel.rows) > 0).all()
        assert kernel.values.dtype == jnp.float32
    assert len(kinds(grads)) == 2
    # Not the gradient of the dense model: the backward pass is engaged.
    restore(model)
    dense = nnx.grad(loss_fn)(model, X)["layers"][0]["kernel"][...]
    assert not np.allclose(grads["layers"][0]["kernel"].densify(), dense.T, atol=1e-3)


@pytest.mark.parametrize("options", [{"pattern": "example"}, {"transpose": False}, {"k": 1.0}])
def test_what_has_no_rows_gives_arrays(options):
    model = net(**options)
    _, grads = value_and_grad(loss_fn)(model, X)
    assert kinds(grads) == []
    assert_close(grads, nnx.grad(loss_fn)(model, X))


@pytest.mark.parametrize("penalty", ["kernel", "bias", "stopped", "metric"])
def test_a_penalty_on_weights_is_part_of_the_gradient(penalty):
    def loss(model, x):
        kernel, value = model.layers[0].kernel[...], loss_fn(model, x)
        if penalty == "kernel":
            value += 0.5 * jnp.sum(kernel**2)
        if penalty == "bias":
            value += 0.5 * jnp.sum(model.layers[0].bias[...] ** 2)
        if penalty == "stopped":
            value += 0.5 * jnp.sum(jax.lax.stop_gradient(kernel) ** 2)
        return value, {"norm": jnp.linalg.norm(kernel)}

    model = net()
    (value, aux), grads = value_and_grad(loss, has_aux=True)(model, X)
    (plain, more), expected = nnx.value_and_grad(loss, has_aux=True)(model, X)
    np.testing.assert_allclose([value, aux["norm"]], [plain, more["norm"]], rtol=5e-6)
    assert_close(grads, expected)
    assert len(kinds(grads)) == (1 if penalty == "kernel" else 2)


def test_a_layer_called_twice_and_a_kernel_in_two_layers():
    class Twice(nnx.Module):
        def __init__(self, tied):
            self.first = nnx.Linear(8, 8, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(8, 8, rngs=nnx.Rngs(1))
            if tied:
                self.second.kernel = self.first.kernel
            self.other = nnx.Linear(8, 8, rngs=nnx.Rngs(2))
            self.out = nnx.Linear(8, 2, rngs=nnx.Rngs(3))

        def __call__(self, x):
            x = self.second(jnp.tanh(self.first(x)))
            return self.out(self.other(jnp.tanh(self.other(x))))

    x = normal(0, 6, 8)
    for tied in (False, True):
        model = Twice(tied)
        meprop(model, 3)
        _, grads = nnx.jit(value_and_grad(loss_fn))(model, x)
        assert_close(grads, nnx.jit(nnx.grad(loss_fn))(model, x))
        assert len(kinds(grads)) == (0 if tied else 2)


def test_two_layers_of_one_name():
    params = {"a": {"kernel": normal(0, 16, 5)}, "b": {"kernel": normal(1, 16, 16)}}
    dot = meprop_dot_general(4, name="a")
    loss = lambda p: jnp.sum(jnp.sin(dot(dot(X, p["a"]["kernel"], ROWS), p["b"]["kernel"], ROWS)))  # noqa: E731
    _, grads = value_and_grad(loss)(params)
    assert len(kinds(grads)) == 2
    assert_close(grads, jax.grad(loss)(params))


def test_parts_of_a_model_that_were_prepared_apart():
    model = nnx.Dict(encoder=net(), decoder=nnx.Sequential(nnx.Linear(3, 16, rngs=nnx.Rngs(3))))
    meprop(model.decoder, 4, layers=nnx.Linear)  # its layers/0 is not the encoder's
    loss = lambda model, x: loss_fn(model.decoder, model.encoder(x))  # noqa: E731
    _, grads = value_and_grad(loss)(model, X)
    assert len(kinds(grads)) == 3
    assert_close(grads, nnx.grad(loss)(model, X))


@pytest.mark.parametrize("wrap", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_differentiating_what_it_gives(wrap):
    # The value and the gradients, as those of jax.value_and_grad.
    dot = meprop_dot_general(4, name="a")
    params = {"a": {"kernel": normal(0, 16, 5)}}
    loss = lambda p: jnp.sum(jnp.sin(dot(X, p["a"]["kernel"], ROWS)))  # noqa: E731

    def penalty(value_and_grad):
        def total(params):
            value, grads = value_and_grad(loss)(params)
            return value + jnp.sum(densify(grads)["a"]["kernel"] ** 2)

        return wrap(jax.grad(total))(params)

    assert_close(penalty(value_and_grad), penalty(jax.value_and_grad), atol=1e-4)


LAYOUTS = [((), ("x",)), ((None, "x"), ()), (("x",), ())]


@pytest.mark.parametrize(("of_kernel", "of_x"), LAYOUTS, ids=str)
def test_a_mesh_with_explicit_axes(of_kernel, of_x):
    dot, kernel = meprop_dot_general(4, name="a"), normal(0, 16, 8)
    loss = lambda p, x: jnp.sum(jnp.sin(dot(x, p["a"]["kernel"], ROWS)))  # noqa: E731
    x = normal(1, 8, 8)
    mesh = jax.make_mesh((8,), ("x",))
    place = lambda x, spec: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*spec)))  # noqa: E731
    with jax.set_mesh(mesh):
        params = {"a": {"kernel": place(kernel, of_kernel)}}
        _, grads = jax.jit(value_and_grad(loss))(params, place(x, of_x))
        whole = jax.device_get(jax.jit(densify)(grads))
    assert len(kinds(grads)) == 1
    assert_close(whole, jax.grad(loss)({"a": {"kernel": kernel}}, x))


def test_a_layer_that_is_not_called_and_its_namesake_in_another_model():
    # Both are called by the paths in a model of their own.
    student, teacher = net(), net(k=8)

    def loss(student, x, teacher):
        x = jnp.tanh(teacher.layers[0](x))
        return jnp.sum(jnp.sin(student.layers[2](x)))

    _, grads = value_and_grad(loss)(student, X, teacher)
    assert not np.any(densify(grads["layers"][0]["kernel"]))
    assert_close(grads, nnx.grad(loss)(student, X, teacher))


@pytest.mark.parametrize("wrapper", [nnx.WeightNorm, nnx.SpectralNorm])
def test_layers_whose_kernel_another_module_computes(wrapper):
    class Wrapped(nnx.Module):
        def __init__(self):
            self.wrapped = wrapper(nnx.Linear(5, 5, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(1))
            self.out = nnx.Linear(5, 2, rngs=nnx.Rngs(2))

        def __call__(self, x):
            return self.out(self.wrapped(x))

    model = Wrapped()
    model.eval() if wrapper is nnx.SpectralNorm else None
    value = model(X)
    assert meprop(model, 2) == 1
    # These wrappers normalize what they have normalized before, each time they are called.
    np.testing.assert_allclose(model(X), value, atol=1e-5)
    _, grads = value_and_grad(loss_fn)(model, X)
    assert_close(grads, nnx.grad(loss_fn)(model, X))


@pytest.mark.parametrize("jit", [False, True])
def test_gradients_go_into_the_optimizer_of_nnx(jit):
    def train(value_and_grad):
        model = net(k=4)
        optimizer = nnx.Optimizer(model, row_sparse_adam(0.1), wrt=nnx.Param)

        def step(model, optimizer):
            value, grads = value_and_grad(loss_fn)(model, X)
            assert isinstance(grads["layers"][0]["kernel"], nnx.Param)
            optimizer.update(model, grads)
            return value

        step = nnx.jit(step) if jit else step
        return [float(step(model, optimizer)) for _ in range(3)], model, optimizer.opt_state

    losses, model, state = train(value_and_grad)
    dense, reference, _ = train(nnx.value_and_grad)
    np.testing.assert_allclose(losses[0], dense[0], rtol=5e-6)
    counts = row_counts(state, nnx.state(model, nnx.Param))
    assert {name: int(n.sum()) for name, n in counts.items()} == {
        "layers/0/kernel": 12, "layers/2/kernel": 12, "layers/4/kernel": 72,
    }  # fmt: skip
    # Rows without a gradient stay; those of a dense Adam, whose moments go on, would not.
    still = np.asarray(counts["layers/0/kernel"] == 0)
    start = net(k=4)
    kernels = [m.layers[0].kernel[...] for m in (model, start, reference)]
    np.testing.assert_array_equal(kernels[0][still], kernels[1][still])
    assert (kernels[0][~still] != kernels[1][~still]).any(1).all()


def test_random_streams_and_modules_among_the_arguments():
    def loss(model, x, teacher, rngs):
        noise = jax.random.normal(rngs.noise(), x.shape)
        return jnp.sum(jnp.sin(model(x + 0.1 * noise) - teacher.norm(model(x))) ** 2)

    class Teacher(nnx.Module):
        def __init__(self):
            self.norm = nnx.BatchNorm(3, rngs=nnx.Rngs(0))

    results = []
    for function in (value_and_grad, nnx.value_and_grad):
        model, teacher, rngs = net(), Teacher(), nnx.Rngs(noise=7)
        run = function(loss)
        for _ in range(2):
            value, grads = run(model, X, teacher, rngs)
        assert rngs.noise.count[...] == 2
        results.append((value, densify(grads), teacher.norm.mean[...]))
    assert np.any(results[0][2] != 0)
    assert_close(results[0], results[1], rtol=1e-4)


@pytest.mark.parametrize("stop", [jax.lax.stop_gradient, lambda y: jnp.argmax(y, -1) * 1.0])
def test_rows_of_a_gradient_that_never_came_are_no_rows(stop):
    model = net(k=5)

    def only(model, x):
        stopped = stop(model.layers[2](model.layers[0](x)))
        return jnp.sum(stopped) + jnp.sum(model.layers[4].bias[...] ** 2)

    def also(model, x):
        return only(model, x) + loss_fn(model, x)

    for function in (only, also):
        _, grads = value_and_grad(function)(model, X)
        for i in (0, 2):
            kernel = grads["layers"][i]["kernel"].get_value()
            rows = kernel.rows if isinstance(kernel, RowSparse) else np.zeros(0)
            assert (np.diff(rows) > 0).all()
        assert_close(grads, nnx.grad(function)(model, X))


def test_batch_statistics_and_dropout_counts_are_those_of_nnx():
    class Noisy(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(5, 16, rngs=nnx.Rngs(0))
            self.norm = nnx.BatchNorm(16, rngs=nnx.Rngs(1))
            self.dropout = nnx.Dropout(0.5, rngs=nnx.Rngs(2))
            self.out = nnx.Linear(16, 2, rngs=nnx.Rngs(3))
            self.steps = nnx.BatchStat(jnp.array(0))

        def __call__(self, x):
            self.steps[...] += 1
            return self.out(self.dropout(self.norm(self.first(x))))

    ours, theirs = Noisy(), Noisy()
    meprop(ours, 4), meprop(theirs, 4)
    run, reference = nnx.jit(value_and_grad(loss_fn)), nnx.jit(nnx.value_and_grad(loss_fn))
    for _ in range(2):
        value, grads = run(ours, X)
        plain, expected = reference(theirs, X)
        np.testing.assert_allclose(value, plain, rtol=1e-5)
        assert_close(grads, expected, atol=1e-4)
        assert len(kinds(grads)) == 1
        for got, want in zip(
            jax.tree.leaves(nnx.state(ours)), jax.tree.leaves(nnx.state(theirs)), strict=True
        ):
            if not jnp.issubdtype(got.dtype, jax.dtypes.prng_key):
                np.testing.assert_allclose(got, want, rtol=5e-6)
    assert int(ours.steps[...]) == 2 and int(ours.dropout.rngs.count[...]) == 2


def test_wrt_chooses_the_parameters():
    model = net()
    _, grads = value_and_grad(loss_fn, wrt=nnx.PathContains(0))(model, X)
    expected = nnx.grad(loss_fn, argnums=nnx.DiffState(0, nnx.PathContains(0)))(model, X)
    assert_close(grads, expected)
    assert len(kinds(grads)) == 1


@pytest.mark.parametrize("by_layer", [True, False])
def test_bfloat16(by_layer):
    # The layer casts, or the loss casts its parameters.
    model = net(dtype=jnp.bfloat16 if by_layer else None)
    graph, params = nnx.split(model)
    params = nnx.as_pure(params)

    def loss(params):
        if not by_layer:
            params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
        return loss_fn(nnx.merge(graph, params), X.astype(jnp.bfloat16))

    _, grads = jax.jit(lambda p: value_and_grad(loss)(p))(params)
    assert len(kinds(grads)) == 2
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(densify(grads)))
    assert_close(grads, jax.jit(jax.grad(loss))(params), rtol=2e-2, atol=2e-2)


def test_nan_is_seen_in_the_rows():
    model = net()
    _, grads = nnx.jit(value_and_grad(loss_fn))(model, X.at[3, 1].set(jnp.nan))
    assert all(np.isnan(densify(g)).any() for g in (grads["layers"][i]["kernel"] for i in (0, 2)))


def test_no_tracer_leaks_when_the_loss_raises():
    model, fail = net(), [True]

    def loss(model, x):
        value = loss_fn(model, x)
        if fail:
            raise RuntimeError("on purpose")
        return value

    before = nnx.to_pure_dict(nnx.state(model))
    for run in (lambda f: f, nnx.jit):
        with pytest.raises(RuntimeError, match="on purpose"):
            run(value_and_grad(loss))(model, X)
        jax.tree.map(np.testing.assert_array_equal, before, nnx.to_pure_dict(nnx.state(model)))
    # No frame is left behind either.
    assert_close(nnx.grad(loss_fn)(model, X), nnx.grad(loss_fn)(model, X))
    fail.clear()
    with jax.checking_leaks():
        _, grads = nnx.jit(value_and_grad(loss))(model, X)
    assert_close(grads, nnx.grad(loss_fn)(model, X))


def test_wrong_use():
    with pytest.raises(TypeError, match="loss_fn must be a function"):
        value_and_grad(3)
    with pytest.raises(TypeError, match="scalar"):
        value_and_grad(lambda model, x: model(x))(net(), X)


# Pytrees.


def tree(dims=ROWS):
    shape = (16, 5) if dims is ROWS else (5, 16)
    return {"a": {"kernel": normal(0, *shape), "bias": normal(1, 16)}, "v": normal(2, 16)}


def tree_loss(multiply, p, x):
    return jnp.sum(jnp.sin(multiply(p["a"]["kernel"], x) + p["a"]["bias"]) * p["v"])


def test_a_tree_is_found_by_name_and_aux_is_handed_on():
    dot = meprop_dot_general(4, name="a")

    def loss(p, x, *, scale):
        h = dot(x, p["a"]["kernel"], ROWS)
        return scale * jnp.sum(jnp.sin(h + p["a"]["bias"]) * p["v"]), h

    function = value_and_grad(loss, has_aux=True)
    (value, aux), grads = function(tree(), X, scale=2.0)
    (plain, more), expected = jax.value_and_grad(loss, has_aux=True)(tree(), X, scale=2.0)
    assert value == plain and jnp.array_equal(aux, more)
    assert kinds(grads) == ["['a']['kernel']"]
    assert_close(grads, expected)


def test_kernels_in_the_layout_of_linen_give_arrays():
    dot = meprop_dot_general(4, name="a")
    loss = functools.partial(tree_loss, lambda w, x: dot(x, w, COLUMNS))
    _, grads = value_and_grad(loss)(tree(COLUMNS), X)
    assert kinds(grads) == []
    assert_close(grads, jax.grad(loss)(tree(COLUMNS), X))
    assert np.any(grads["a"]["kernel"] != 0, axis=0).sum() == 4


def _in_scan(multiply, w, x):
    return jax.lax.scan(lambda w, x: (w, multiply(w, x)), w, x[None])[1][0]


# Functions that live on: JAX keeps their traces, from one pass to the next.
DOT = meprop_dot_general(4, name="a")


def direct(w, x):
    return DOT(x, w, ROWS)


def _body(w, x):
    return w, direct(w, x)


WRAPPED = {
    "jit": jax.jit(direct),
    "checkpoint": jax.checkpoint(direct),
    "scan": lambda w, x: jax.lax.scan(_body, w, x[None])[1][0],
    "vmap": jax.vmap(lambda w, x: direct(w, x[None])[0], (None, 0)),
    "cond": lambda w, x: jax.lax.cond(x[0, 0] < 99, direct, lambda w, x: x @ w.T, w, x),
    "scaled": lambda w, x: direct(w * jnp.arange(16.0)[:, None], x),
    "stopped": lambda w, x: direct(jax.lax.stop_gradient(w), x),
    "other rows": lambda w, x: direct(w[::-1], x),
    "integers": lambda w, x: direct(w.astype(jnp.int32).astype(jnp.float32), x),
}


@pytest.mark.parametrize("kind", WRAPPED)
def test_layers_out_of_reach_give_arrays_with_the_same_gradient(kind):
    loss = functools.partial(tree_loss, WRAPPED[kind])
    function = value_and_grad(loss)
    for run in (function, function, jax.jit(function)):
        _, grads = run(tree(), X)
        assert kinds(grads) == []
        assert_close(grads, jax.grad(loss)(tree(), X))
    if kind not in ("stopped", "integers"):
        # JAX may hand out to `jax.grad` what was traced for us: a second opinion.
        kernel = grads["a"]["kernel"]
        assert np.any(kernel)
        if kind in ("jit", "checkpoint", "scan", "cond"):
            fresh = meprop_dot_general(4, seed=1, name="a")
            _, rows = value_and_grad(functools.partial(tree_loss, lambda w, x: fresh(x, w, ROWS)))(
                tree(), X
            )
            np.testing.assert_allclose(kernel, densify(rows)["a"]["kernel"], atol=1e-5)


def test_nnx_remat_and_jit_inside():
    class Inside(nnx.Module):
        def __init__(self):
            self.first = nnx.Linear(5, 16, rngs=nnx.Rngs(0))
            self.second = nnx.Linear(16, 16, rngs=nnx.Rngs(1))
            self.third = nnx.Linear(16, 16, rngs=nnx.Rngs(2))
            self.out = nnx.Linear(16, 2, rngs=nnx.Rngs(3))

        def __call__(self, x):
            x = nnx.remat(lambda layer, x: layer(x))(self.first, x)
            return self.out(self.third(nnx.jit(lambda layer, x: layer(x))(self.second, x)))

    model = Inside()
    meprop(model, 4)
    expected = nnx.grad(loss_fn)(model, X)
    for _ in range(2):
        _, grads = value_and_grad(loss_fn)(model, X)
        assert kinds(grads) == ["['third']['kernel']"]
        assert_close(grads, expected)


def test_uses_are_found():
    model = net(k=(2, 4))
    graph, params = nnx.split(model)
    uses = find_uses(lambda p: loss_fn(nnx.merge(graph, p), X), params)
    assert list(uses) == ["layers/0", "layers/2"]
    use = uses["layers/2"]
    assert (use.rows, use.inputs, use.outputs, use.sizes) == (8, 16, 24, (2, 4))
    assert use.by_rows and use.direct and use.calls == 1
    assert use.flops(3) == 4 * 8 * 16 * 3


# Several sizes.


def test_every_size_is_that_of_a_model_with_a_single_k():
    sizes = (3, 16)
    loss = lambda dot, p: tree_loss(lambda w, x: dot(x, w, ROWS), p, X)  # noqa: E731
    several = functools.partial(loss, meprop_dot_general(sizes, name="a"))
    run = jax.jit(lambda p, i: row_value_and_grad(several, p, sizes={"a": i}))
    for place, k in enumerate(sizes):
        single = functools.partial(loss, meprop_dot_general(k, name="a"))
        value, grads = run(tree(), jnp.int32(place))
        plain, expected = jax.value_and_grad(single)(tree())
        np.testing.assert_allclose(value, plain, rtol=5e-6)
        assert_close(grads, expected)
        kernel = grads["a"]["kernel"]
        assert kernel.values.shape == (16, 5)
        assert int((kernel.rows < 16).sum()) == k and (np.diff(kernel.rows) > 0).all()
        if k < 16:
            _, exact = value_and_grad(single)(tree())
            assert jnp.array_equal(exact["a"]["kernel"].rows, kernel.rows[:k])
    assert run._cache_size() == 1


# Training.


@pytest.mark.parametrize("k", [1.0, (4, 16)])
def test_a_step_that_keeps_every_row_is_adams(k):
    # At k = n of a single size nothing is compact; of several sizes the largest has every row.
    dot = meprop_dot_general(k, name="a")
    loss = functools.partial(tree_loss, lambda w, x: dot(x, w, ROWS))
    plain = functools.partial(tree_loss, lambda w, x: x @ w.T)
    ours, theirs = row_sparse_adam(0.1), optax.adam(0.1)

    @jax.jit
    def step(params, state, reference, other):
        _, grads = value_and_grad(loss)(params, X)
        updates, state = ours.update(grads, state, params)
        grads = jax.grad(plain)(reference, X)
        more, other = theirs.update(grads, other, reference)
        return (
            optax.apply_updates(params, updates), state, optax.apply_updates(reference, more), other
        )  # fmt: skip

    params = reference = tree()
    state, other = ours.init(params), theirs.init(params)
    for _ in range(3):
        params, state, reference, other = step(params, state, reference, other)
    assert_close(params, reference, atol=1e-4)


def test_a_step_is_that_of_lazy_adam():
    dot = meprop_dot_general(4, name="a")
    loss = functools.partial(tree_loss, lambda w, x: dot(x, w, ROWS))
    tx = row_sparse_adam(0.1)

    @jax.jit
    def step(params, state, x):
        _, grads = value_and_grad(loss)(params, x)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    params = tree()
    state, kernel = tx.init(params), np.asarray(params["a"]["kernel"])
    m, v, t = np.zeros((16, 5)), np.zeros((16, 5)), np.zeros((16, 1))
    for i in range(6):
        x = normal(i, 8, 5)
        grad = np.asarray(jax.grad(loss)(params, x)["a"]["kernel"], np.float64)
        for row in np.flatnonzero(grad.any(axis=1)):
            t[row] += 1
            m[row] = 0.9 * m[row] + 0.1 * grad[row]
            v[row] = 0.999 * v[row] + 0.001 * grad[row] ** 2
            corrected = m[row] / (1 - 0.9 ** t[row]), v[row] / (1 - 0.999 ** t[row])
            kernel = kernel.copy()
            kernel[row] -= 0.1 * corrected[0] / (np.sqrt(corrected[1]) + 1e-8)
        params, state = step(params, state, x)
        np.testing.assert_allclose(params["a"]["kernel"], kernel, atol=1e-4)
    assert 0 < t.min(initial=99, where=t > 0) < 6


# Several devices.


def test_a_sharded_batch_gives_the_same_rows():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    model = net()
    run = nnx.jit(value_and_grad(loss_fn))
    _, expected = run(model, X)
    model = nnx.merge(
        *(
            lambda graph, state: (
                graph,
                jax.device_put(state, NamedSharding(mesh, PartitionSpec())),
            )
        )(*nnx.split(model))
    )
    _, grads = run(model, jax.device_put(X, NamedSharding(mesh, PartitionSpec("data"))))
    assert kinds(grads) == kinds(expected)
    for i in (0, 2):
        assert jnp.array_equal(
            grads["layers"][i]["kernel"].rows, expected["layers"][i]["kernel"].rows
        )
    assert_close(grads, jax.tree.map(lambda x: x, densify(expected)))


@pytest.mark.parametrize("varying", [False, True])
def test_shard_map_sums_over_shards(varying):
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    loss = functools.partial(tree_loss, direct)
    spec = PartitionSpec("data")

    def of_shard(function):
        def inside(p, x):
            if varying:  # each shard's own gradients, summed by hand
                p = jax.tree.map(lambda w: jax.lax.pcast(w, "data", to="varying"), p)
            grads = densify(function(p, x))
            return jax.tree.map(lambda g: jax.lax.psum(g, "data") if varying else g, grads)

        whole = PartitionSpec()
        return jax.jit(jax.shard_map(inside, mesh=mesh, in_specs=(whole, spec), out_specs=whole))

    seen = []

    def ours(p, x):
        _, grads = value_and_grad(loss)(p, x)
        seen.append(kinds(grads))
        return grads

    x = normal(3, 32, 5)
    grads = of_shard(ours)(tree(), x)
    assert bool(seen[0]) == varying
    parts = [jax.grad(loss)(tree(), part) for part in jnp.split(x, 8)]
    assert_close(grads, jax.tree.map(lambda *g: sum(g), *parts), atol=1e-4)
