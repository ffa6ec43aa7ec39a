"""Stages over devices against the same iteration on one."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from priorityprop_jax.highway.scan import highway_scan
from priorityprop_jax.highway.stages import Collective, communication, highway_stages

LAYERS, BATCH, WIDTH = 8, 2, 3


def stage_fn(params, x):
    def layer(x, p):
        return x + jnp.where(p["keep"], jnp.tanh(x @ p["kernel"]), 0), None

    return lax.scan(layer, x, params)[0]


def stack(stages, data=1):
    devices = np.array(jax.devices()[: stages * data]).reshape(data, stages)
    mesh = Mesh(devices, ("data", "stage")) if data > 1 else Mesh(devices[0], ("stage",))
    rng = np.random.default_rng(0)
    params = {
        "kernel": jnp.asarray(0.5 * rng.normal(size=(LAYERS, WIDTH, WIDTH))),
        "keep": jnp.asarray(rng.random((LAYERS, WIDTH)) < 0.9),
    }
    x, bar = (jnp.asarray(rng.normal(size=(BATCH, WIDTH))) for _ in range(2))
    params = jax.device_put(params, NamedSharding(mesh, PartitionSpec("stage")))
    rows = PartitionSpec("data") if data > 1 else PartitionSpec()
    return mesh, params, jax.device_put(x, NamedSharding(mesh, rows)), bar


def gradients(apply, params, x, bar):
    """Compiled, and their values; differentiated from outside a compiled function."""

    @jax.jit
    def run(kernel, x):
        return apply({**params, "kernel": kernel}, x)

    def loss(kernel, x):
        y = run(kernel, x)
        return jnp.sum(y * bar), y

    args = params["kernel"], x
    compiled = jax.jit(jax.grad(loss, (0, 1), has_aux=True)).lower(*args).compile()
    return compiled, compiled(*args)


def single(stages, iterations):
    """The same on one device: a stage is a block."""

    def run(params, x):
        blocks = jax.tree.map(lambda p: p.reshape(stages, -1, *p.shape[1:]), params)
        return highway_scan(stage_fn, blocks, x, iterations=iterations, guard=False)

    return run


@pytest.mark.parametrize(("stages", "iterations"), [(4, 1), (4, 9), (8, 2)])
def test_stages_compute_what_one_device_does(stages, iterations):
    with jax.enable_x64(True):
        mesh, params, x, bar = stack(stages)
        run = lambda p, x: highway_stages(stage_fn, p, x, mesh, iterations=iterations)  # noqa: E731
        compiled, (grads, y) = gradients(run, params, x, bar)
        alone = jax.device_put((params, x, bar), jax.devices()[0])
        # With as many rounds as there are stages to cross, that is plain autodiff.
        _, (expected, y_expected) = gradients(single(stages, iterations), *alone)
        for a, b in zip((*grads, y), (*expected, y_expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-10, atol=1e-10)
        assert grads[0].sharding.spec[0] == "stage"

        permutes = 1 + math.ceil(math.log2(stages - 1))
        rounds = min(iterations, stages - 1)
        activation = x.nbytes
        assert permutes <= stages - 1  # what a gather would bring to each device
        counts = communication(compiled.as_text())
        number = 1 + rounds * permutes  # the forward pass is a loop of one
        assert counts["collective-permute"] == Collective(number, number * activation)
        assert counts["all-reduce"].bytes == 2 * activation
        assert set(counts) == {"collective-permute", "all-reduce"}


def test_other_axes_of_the_mesh_stay_the_compilers():
    mesh, params, x, bar = stack(4, data=2)
    params["kernel"] = params["kernel"].astype(jnp.bfloat16)
    x = x.astype(jnp.bfloat16)
    _, (grads, y) = gradients(lambda p, x: highway_stages(stage_fn, p, x, mesh), params, x, bar)
    alone = jax.device_put((params, x, bar), jax.devices()[0])
    _, (expected, y_expected) = gradients(single(4, 1), *alone)
    for a, b in zip((*grads, y), (*expected, y_expected), strict=True):
        assert a.dtype == jnp.bfloat16
        np.testing.assert_allclose(*(np.asarray(c, np.float32) for c in (a, b)), atol=0.05)


def test_a_program_of_a_gpu_counts_an_operation_in_two_halves_once():
    text = """
      %s = (bf16[4,2]{1,0}, bf16[4,2]{1,0}) collective-permute-start(%x), channel_id=1
      %d = bf16[4,2]{1,0} collective-permute-done(%s)
      %g = (f32[8]{0}, pred[3]{0}) all-gather(%a, %b), dimensions={0}
      %f = f32[8]{0} fusion(%all-gather.1), calls=%fused
    """
    assert communication(text) == {
        "collective-permute": Collective(1, 16),
        "all-gather": Collective(1, 35),
    }


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"axis": "pipe"}, ValueError, "no axis 'pipe', but stage"),
        ({"params": {"keep": jnp.ones((6, 3)), "kernel": jnp.ones((6, 3, 3))}}, ValueError, "6 la"),
        ({"iterations": -1}, ValueError, "at least 0"),
        ({"iterations": None}, TypeError, "got None"),
        ({"stage_fn": lambda p, x: x[0]}, TypeError, "like of x"),
    ],
)
def test_what_can_not_be(change, error, match):
    mesh, params, x, _ = stack(4)
    args = {"stage_fn": stage_fn, "params": params, "x": x, "mesh": mesh}
    with pytest.raises(error, match=match):
        highway_stages(**(args | change))


def test_a_stage_must_not_close_over_what_is_traced():
    mesh, params, x, _ = stack(4)

    def run(gain):
        return highway_stages(lambda p, x: gain * stage_fn(p, x), params, x, mesh)

    with pytest.raises(TypeError, match=r"traced arrays, .*float32\[\].* into params"):
        jax.jit(run)(1.0)
