"""What a step would cost: against programs written by hand, and in the three forms of a model."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import find_slots, partial
from priorityprop_jax.core.program import program_flops
from priorityprop_jax.core.work import read_loss
from priorityprop_jax.partial.plan import _ends

pytestmark = pytest.mark.usefixtures("quickly_compiled")

WIDTH, LAYERS = 16, 5


def pytree():
    return {f"Dense_{i}": jnp.eye(WIDTH) * (i + 1) for i in range(LAYERS)}


def loss_fn(params, x):
    for i in range(LAYERS):
        x = jnp.tanh(x @ params[f"Dense_{i}"])
    return x.mean()


def by_name(found):
    return {choice.name: choice for choice in found.choices}


@functools.cache
def unlimited():
    """The plan of the small network."""
    params, before = pytree(), pytree()
    found = partial.plan(params, loss_fn, jnp.ones((4, WIDTH)), optax.adam(1e-3), repeats=1)
    jax.tree.map(np.testing.assert_array_equal, params, before)  # nothing was donated
    return found


def test_costs_are_those_of_a_loop_by_hand():
    params, x, tx, found = pytree(), jnp.ones((4, WIDTH)), optax.adam(1e-3), unlimited()
    rows = by_name(found)
    suffixes = ["suffix(0)", "suffix(1)", "suffix(2)", "suffix(3), all but Dense_0"]
    assert list(rows) == ["full", *suffixes, "lisa(2)", "badam(1), dearest turn"]
    assert found.choices[0].share == 1 and all(c.fits for c in found.choices)
    assert all(c.milliseconds for c in found.choices)

    def step(head, frozen, state):  # suffix(1): the last two layers
        value, grads = jax.value_and_grad(lambda head: loss_fn(head | frozen, x))(head)
        updates, state = tx.update(grads, state, head)
        return optax.apply_updates(head, updates), state, value

    names = [f"Dense_{i}" for i in (LAYERS - 2, LAYERS - 1)]
    head = {name: params[name] for name in names}
    frozen = {name: w for name, w in params.items() if name not in names}
    flops = program_flops(jax.make_jaxpr(step)(head, frozen, tx.init(head)))
    assert rows["suffix(1)"].flops == pytest.approx(flops, rel=0.01)
    assert rows["suffix(1)"].share == rows["suffix(1)"].flops / rows["full"].flops
    layer = WIDTH * WIDTH
    for name, layers in {"full": 5, "suffix(0)": 1, "suffix(1)": 2, "lisa(2)": 4}.items():
        assert rows[name].parameters == layers * layer
        assert rows[name].state_bytes == 2 * layers * layer * 4 + 4
        held = 4 * (LAYERS * layer + x.size) + rows[name].state_bytes
        assert held <= rows[name].peak_bytes < 2 * held
    costs = [rows[name].flops for name in ("suffix(0)", "suffix(1)", "suffix(2)", "full")]
    assert (
        costs == sorted(set(costs)) and rows["badam(1), dearest turn"].flops < rows["lisa(2)"].flops
    )


def test_limits_say_what_fits_and_what_is_not_run(tmp_path):
    """Of like layers two are run, here the last of those that fit; the others are on the line."""
    params, x, free = pytree(), jnp.ones((4, WIDTH)), by_name(unlimited())
    second, third = "suffix(2)", "suffix(3), all but Dense_0"
    assert [n for n, c in free.items() if not c.measured] == ["suffix(1)", second]
    memory = (free[second].peak_bytes + free[third].peak_bytes) / 2
    found = partial.plan(params, loss_fn, x, optax.adam(1e-3), memory=f"{memory}B", repeats=1)
    rows = by_name(found)
    fitting = ["suffix(0)", "suffix(1)", second, "badam(1), dearest turn"]
    assert [name for name, c in rows.items() if c.fits] == fitting
    assert [name for name, c in rows.items() if not c.measured] == ["suffix(1)"]
    assert rows[third].milliseconds is rows["full"].milliseconds is None
    ms = {name: rows[name].milliseconds or 0.0 for name in fitting}
    assert ms["suffix(1)"] == pytest.approx((ms["suffix(0)"] + ms[second]) / 2)
    for name in ("flops", "parameters", "state_bytes", "peak_bytes"):  # guessed there, run here
        assert getattr(free[second], name) == pytest.approx(getattr(rows[second], name), rel=0.04)
    lines = str(found).splitlines()
    assert lines[0].endswith("fits") and len(lines) == 1 + len(rows)
    assert lines[1].split()[0] == "full" and " - " in lines[1] and lines[1].endswith("no")
    assert lines[3].startswith("suffix(1)") and lines[3].count("~") == 2
    assert found.plot(tmp_path / "plan.png").stat().st_size > 0
    assert found.as_dict()["choices"][0]["name"] == "full"
    slow = partial.plan(params, loss_fn, x, optax.sgd(0.1), milliseconds=1e-9, repeats=1)
    assert not any(c.fits for c in slow.choices) and slow.choices[0].milliseconds


def test_layers_that_differ_are_not_on_a_line():
    def ends(widths):
        shapes = zip(widths, widths[1:], strict=False)
        params = {f"Dense_{i:02}": jnp.ones(shape) for i, shape in enumerate(shapes)}

        def loss_fn(params, x):
            for kernel in params.values():
                x = jnp.tanh(x @ kernel)
            return x.mean()

        slots = find_slots(params)
        work = read_loss(loss_fn, params, jnp.ones((4, widths[0])), slots=slots)
        return _ends(dataclasses.replace(slots, depths=work.depths), work)

    assert ends([3, 8, 8, 8, 8, 8, 2]) == ([0, 1, 4], [2, 3])
    assert ends([3, 8, 8, 8, 4, 8, 2]) == ([0, 1, 2, 3, 4], [])
    assert ends([*range(3, 15)]) == ([0, 2, 4, 5, 7, 9], [])


class Net(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List(nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(3))
        self.dropout = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        for layer in self.layers:
            x = self.dropout(nnx.relu(layer(x)))
        return x


def test_a_module_and_stages_cost_the_same_and_a_cached_prefix_costs_no_forward_pass():
    net, batch = Net(nnx.Rngs(0)), {"x": jnp.ones((4, WIDTH)), "y": jnp.ones((4, WIDTH))}
    error = lambda model, batch: (((model(batch["x"]) - batch["y"]) ** 2).mean(), {})  # noqa: E731
    options = {"batch": batch, "optimizer": optax.sgd(0.1), "repeats": 1}
    before = jax.tree.map(np.asarray, nnx.to_pure_dict(nnx.state(net, nnx.Param)))
    whole = by_name(partial.plan(net, error, **options))
    after = nnx.to_pure_dict(nnx.state(net, nnx.Param))
    jax.tree.map(np.testing.assert_array_equal, after, before)
    assert list(whole) == ["full", "suffix(0)", "suffix(1), all but layers/0"]

    model = net.layers
    stages = partial.nnx_stages([(f"block_{i}", model[i]) for i in range(3)])
    staged = by_name(partial.plan(stages, error, **options))
    names = ["suffix(0)", "suffix(1), all but block_0"]
    assert list(staged) == ["full", *names, "suffix(0), cached"]
    cached, plain = staged["suffix(0), cached"], staged["suffix(0)"]
    assert cached.parameters == plain.parameters
    forward = 2 * 2 * 4 * WIDTH * WIDTH + 2 * 4 * WIDTH  # two layers' products and biases
    assert plain.flops - cached.flops == pytest.approx(forward, rel=0.02)


def test_layers_of_a_stack_and_one_layer_alone():
    params = {"blocks": jnp.ones((4, WIDTH, WIDTH)), "head": jnp.ones((WIDTH, 1))}

    def scanned(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["blocks"])
        return (x @ params["head"]).mean()

    stacked = lambda path: 0 if path == "blocks" else None  # noqa: E731
    found = partial.plan(
        params, scanned, jnp.ones((2, WIDTH)), optax.adam(0.1), repeats=1, stacked_axis=stacked
    )
    one = by_name(found)["badam(1), dearest turn"]
    assert one.parameters == WIDTH * WIDTH + WIDTH
    assert one.state_bytes == 8 * one.parameters + 4
    alone = partial.plan({"w": jnp.ones(3)}, lambda p, x: (p["w"] * x).sum(), 2.0, optax.sgd(0.1))
    assert [choice.name for choice in alone.choices] == ["full"]


def test_what_is_frozen_of_a_stack_still_runs_forward():
    params = {"blocks": jnp.ones((6, WIDTH, WIDTH)), "head": jnp.ones((WIDTH, 1))}

    def loss_fn(params, x):
        x = partial.stack(lambda w, x: jnp.tanh(x @ w), params["blocks"], x)
        return (x @ params["head"]).mean()

    stacked = lambda path: 0 if path == "blocks" else None  # noqa: E731
    x, tx = jnp.ones((2, WIDTH)), optax.sgd(0.1)
    rows = by_name(partial.plan(params, loss_fn, x, tx, repeats=1, stacked_axis=stacked))
    forward = 6 * 2 * 2 * WIDTH * WIDTH
    assert rows["suffix(0)"].flops == pytest.approx(forward, rel=0.06)
    # The first trained block has its weights' product and update, each further one its chain too;
    # the gradient of tanh takes a few operations on `[2, WIDTH]`, how many differs by release.
    extra = rows["suffix(1)"].flops - rows["suffix(0)"].flops
    assert 0 <= extra - (forward / 6 + 2 * WIDTH * WIDTH) <= 7 * x.size


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"memory": 0}, "memory must"),
        ({"memory": "lots"}, "'lots' is not a size such as 4GiB"),
        ({"milliseconds": -1.0}, "ms|millis"),
        ({"repeats": 0}, "rep"),
    ],
)
def test_wrong_limits(options, match):
    with pytest.raises(ValueError, match=match):
        partial.plan(pytree(), loss_fn, jnp.ones((4, WIDTH)), optax.sgd(0.1), **options)
    with pytest.raises(ValueError, match="no parameters"):
        partial.plan({}, loss_fn, jnp.ones((4, WIDTH)), optax.sgd(0.1))


def test_other_models_stand_beside(capsys):
    params = {f"Dense_{i}": jnp.ones((8, 8)) for i in range(3)}

    def loss_fn(params, x):
        for kernel in params.values():
            x = jnp.tanh(x @ kernel)
        return x.mean()

    other = {"Dense_9": jnp.ones((8, 8))}, jnp.ones((2, 8))
    found = partial.plan(
        params, loss_fn, jnp.ones((4, 8)), optax.adam(1e-3), repeats=1, beside={"small": other}
    )
    full, small = found.choices[0], found.choices[-1]
    assert small.name == "small" and small.flops < full.flops / 4 and (small.milliseconds or 0) > 0
    assert small.state_bytes == 2 * 64 * 4 + 4
