"""Convolutions with strides as products, against JAX's own."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from jax import lax

from priorityprop_jax import exact
from tests.exact.test_exact import always, assert_same  # noqa: F401

AS_FLAX = {1: ("NHC", "HIO", "NHC"), 2: ("NHWC", "HWIO", "NHWC"), 3: ("NHWDC", "HWDIO", "NHWDC")}


def case(spatial, window, strides, padding="SAME", **options):
    numbers = lax.conv_dimension_numbers(
        (2, *spatial, 3), (*window, 3, 4), options.pop("numbers", AS_FLAX[len(spatial)])
    )
    return spatial, window, strides, padding, {"dimension_numbers": numbers} | options


CASES = {
    "shortcut": case((8, 8), (1, 1), (2, 2)),
    "shortcut, odd": case((7, 5), (1, 1), (2, 2)),
    "patches": case((8, 8), (4, 4), (4, 4), "VALID"),
    "patches with a rest": case((9, 10), (4, 4), (4, 4), "VALID"),
    "patches apart": case((11, 10), (2, 3), (4, 5), "VALID"),
    "3 x 3": case((8, 8), (3, 3), (2, 2)),
    "3 x 3, odd": case((9, 7), (3, 3), (2, 2)),
    "3 x 3, valid": case((9, 8), (3, 3), (2, 2), "VALID"),
    "7 x 7": case((14, 15), (7, 7), (2, 2)),
    "each axis its own": case((9, 8), (3, 2), (3, 1), [(1, 2), (0, 1)]),
    "a negative edge": case((9, 9), (3, 3), (2, 2), [(-1, 0), (0, -2)]),
    "a sequence": case((11,), (5,), (3,)),
    "a volume": case((5, 4, 6), (3, 2, 3), (2, 2, 3)),
    "in double": case((8, 8), (3, 3), (2, 2), preferred_element_type=jnp.float64),
}
AS_IT_WAS = {
    "no strides": case((8, 8), (3, 3), (1, 1)),
    "dilated": case((9, 9), (3, 3), (2, 2), "VALID", rhs_dilation=(2, 2)),
    "transposed": case((8, 8), (3, 3), (2, 2), [(1, 1), (1, 1)], lhs_dilation=(2, 2)),
    "nothing to see": case((2, 2), (3, 3), (2, 2), "VALID"),
}


def both(conv, x, w, strides, padding, options):
    def run(x, w):
        y = conv(x, w, strides, padding, **options)
        return jnp.sum(jnp.sin(y)), y

    return jax.value_and_grad(run, (0, 1), has_aux=True)(x, w)


@pytest.mark.parametrize("name", CASES | AS_IT_WAS)
def test_values_and_gradients_are_those_of_jax(name):
    spatial, window, strides, padding, options = (CASES | AS_IT_WAS)[name]
    with jax.enable_x64(name == "in double"):
        x = jax.random.normal(jax.random.key(0), (2, *spatial, 3), jnp.float32)
        w = jax.random.normal(jax.random.key(1), (*window, 3, 4), jnp.float32)
        w /= np.sqrt(3 * np.prod(window), dtype=np.float32)  # outputs of the size of inputs
        ours, theirs = (
            both(conv, x, w, strides, padding, options)
            for conv in (exact.conv_general_dilated, lax.conv_general_dilated)
        )
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max(initial=1.0))
        program = str(jax.make_jaxpr(lambda x, w: both(
            exact.conv_general_dilated, x, w, strides, padding, options))(x, w))  # fmt: skip
    assert ("conv_general_dilated" in program) == (name in AS_IT_WAS)


def test_groups_and_other_orders_are_left_alone():
    x, w = jnp.ones((2, 8, 8, 4)), jnp.ones((3, 3, 2, 6))
    numbers = ("NHWC", "HWIO", "NHWC")
    y = exact.conv_general_dilated(
        x, w, (2, 2), "SAME", dimension_numbers=numbers, feature_group_count=2
    )
    assert y.shape == (2, 4, 4, 6)
    y = exact.conv_general_dilated(jnp.ones((2, 3, 8, 8)), jnp.ones((5, 3, 3, 3)), (2, 2), "SAME")
    assert y.shape == (2, 5, 4, 4)


@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_on_meshes(kind):
    mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(kind,) * 2)
    put = lambda x, *axes: jax.device_put(x, jax.NamedSharding(mesh, jax.P(*axes)))  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (4, 8, 8, 3))
    layer = nnx.Conv(3, 6, (2, 2), 2, rngs=nnx.Rngs(0))
    plain = layer(x)
    layer.conv_general_dilated = exact.conv_general_dilated
    with jax.set_mesh(mesh):
        np.testing.assert_allclose(
            nnx.jit(lambda m, x: m(x))(layer, put(x, "data")), plain, atol=1e-5
        )


def test_in_linen():
    make = lambda **own: linen.Conv(4, (3, 3), 2, **own)  # noqa: E731
    x = jax.random.normal(jax.random.key(0), (2, 9, 9, 3))
    params = make().init(jax.random.key(1), x)
    ours = make(conv_general_dilated=exact.conv_general_dilated).apply(params, x)
    np.testing.assert_allclose(ours, make().apply(params, x), atol=1e-5)


class Net(nnx.Module):
    """A block with a shortcut, patches, and what is left alone."""

    def __init__(self, rngs):
        self.patches = nnx.Conv(3, 4, (2, 2), (2, 2), rngs=rngs)
        self.shortcut = nnx.Conv(4, 6, (1, 1), 2, rngs=rngs)
        self.conv = nnx.Conv(4, 6, (3, 3), 2, rngs=rngs)
        self.plain = nnx.Conv(6, 6, (3, 3), rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.patches(x))
        return self.plain(self.shortcut(x) + self.conv(x))


def test_they_are_tried_by_themselves_and_taken_out_again(always):  # noqa: F811
    model, plain = Net(nnx.Rngs(0)), Net(nnx.Rngs(0))
    x = jax.random.normal(jax.random.key(0), (2, 16, 16, 3))
    loss_fn = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    before = nnx.graphdef(model)
    kept = {row.saving: row.parts for row in exact.apply(model, loss_fn, x) if row.kept}
    assert kept["patches"] == 2 and kept["strided convolutions"] == 1
    grads = [nnx.value_and_grad(loss_fn)(m, x) for m in (model, plain)]
    assert_same(*grads)
    assert exact.restore(model) == 3 and nnx.graphdef(model) == before
