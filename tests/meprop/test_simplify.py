"""Tests of `priorityprop_jax.meprop.simplify`."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.meprop.simplify import prune_unused

WIDTHS = (5, 8, 7, 3)
NAMES = [f"layers/{i}" for i in range(len(WIDTHS) - 1)]


@dataclasses.dataclass(frozen=True)
class Transposed:
    """A product with a kernel that is stored `[out, in]`."""

    transposed: bool = True

    def __call__(self, x, kernel, dimension_numbers, precision=None, **keywords):
        del dimension_numbers
        return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (1,)), ((), ())), precision)


class MLP(nnx.Module):
    def __init__(self, widths=WIDTHS, *, use_bias=True, activation=nnx.relu, transposed=False):
        rngs = nnx.Rngs(0)
        self.activation = activation
        self.layers = nnx.List(
            nnx.Linear(*pair, use_bias=use_bias, bias_init=nnx.initializers.normal(1.0), rngs=rngs)
            for pair in zip(widths[:-1], widths[1:], strict=True)
        )
        if transposed:
            for layer in self.layers:
                layer.kernel.set_value(layer.kernel[...].T)
                layer.dot_general = Transposed()

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = self.activation(layer(x))
        return self.layers[-1](x)


def kernels(model: MLP) -> list[np.ndarray]:
    """As `[in, out]`."""
    return [
        np.asarray(layer.kernel[...]).T
        if isinstance(layer.dot_general, Transposed)
        else np.asarray(layer.kernel[...])
        for layer in model.layers
    ]


def reference(model: MLP, x: np.ndarray, kept: list[list[int]]) -> np.ndarray:
    """The whole model, but what hidden units that are gone say to the next layer counts zero."""
    for i, (layer, kernel) in enumerate(zip(model.layers, kernels(model), strict=True)):
        if i:
            x = np.asarray(model.activation(x))
            gone = [j for j in range(len(kernel)) if j not in kept[i - 1]]
            kernel = kernel.copy()
            kernel[gone] = 0
        x = x @ kernel
        if layer.bias is not None:
            x = x + np.asarray(layer.bias[...])
    return x


def expected_rows(counts: list[int], threshold: float) -> list[int]:
    least = threshold if isinstance(threshold, int) else threshold * max(counts) - 1e-9
    kept = [j for j, count in enumerate(counts) if count >= least]
    return kept or [counts.index(max(counts))]


@pytest.mark.parametrize(
    ("transposed", "use_bias", "activation"),
    # A ReLU is 0 at 0, a sigmoid is not.
    [(False, True, nnx.relu), (True, True, nnx.sigmoid), (True, False, nnx.relu)],
)
def test_is_the_model_without_what_the_units_say(transposed, use_bias, activation):
    model = MLP(transposed=transposed, use_bias=use_bias, activation=activation)
    before = jax.tree.map(np.asarray, nnx.state(model))
    counts = {"layers/0": [9, 0, 4, 100, 5, 6, 0, 5], "layers/1/kernel": [1, 50, 2, 2, 50, 50, 3]}
    smaller, kept = prune_unused(model, counts, 0.05)

    assert type(smaller) is MLP and list(kept) == NAMES
    assert [rows.tolist() for rows in kept.values()] == [[0, 3, 4, 5, 7], [1, 4, 5, 6], [0, 1, 2]]
    x = np.random.default_rng(0).normal(size=(6, 5)).astype(np.float32)
    expected = reference(model, x, [rows.tolist() for rows in kept.values()])
    assert np.abs(expected - model(x)).max() > 0.1  # The units were not idle.
    np.testing.assert_allclose(smaller(x), expected, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(nnx.jit(lambda m, x: m(x))(smaller, x), expected, 1e-4, 1e-5)

    assert [kernel.shape for kernel in kernels(smaller)] == [(5, 5), (5, 4), (4, 3)]
    assert [(layer.in_features, layer.out_features) for layer in smaller.layers] == [
        (5, 5),
        (5, 4),
        (4, 3),
    ]
    after = nnx.state(model)
    jax.tree.map(np.testing.assert_array_equal, before, jax.tree.map(np.asarray, after))
    assert [layer.out_features for layer in model.layers] == [8, 7, 3]
    smaller.layers[2].kernel.set_value(jnp.zeros((4, 3)))
    assert kernels(model)[2].any()  # Nothing is shared.


@settings(deadline=None, max_examples=15, derandomize=True)
@given(data=st.data())
def test_rows_against_the_definition(data):
    counts = {
        name: data.draw(st.lists(st.integers(0, 30), min_size=n, max_size=n))
        for name, n in zip(NAMES, WIDTHS[1:], strict=True)
    }
    threshold = data.draw(st.one_of(st.integers(1, 40), st.sampled_from([0.01, 0.1, 0.3, 0.99])))
    smaller, kept = prune_unused(MODEL, counts, threshold)
    expected = [expected_rows(counts[name], threshold) for name in NAMES[:-1]] + [[0, 1, 2]]
    assert [rows.tolist() for rows in kept.values()] == expected
    small, big = kernels(smaller), kernels(MODEL)
    fed = list(range(5))
    for rows, one, other in zip(expected, small, big, strict=True):
        np.testing.assert_array_equal(one, other[fed][:, rows])
        fed = rows


MODEL = MLP()


@pytest.mark.parametrize(
    ("counts", "threshold", "expected"),
    [
        ([0] * 8, 0.5, list(range(8))),  # Nothing is known.
        ([0] * 8, 1, [0]),  # One stays,
        ([1, 3, 3, 0, 0, 0, 0, 0], 7, [1]),  # the first of the most chosen.
        ([3, 30, 2, 0, 0, 0, 0, 0], 0.1, [0, 1]),  # 0.1 * 30 is above 3 in binary.
        (jnp.arange(8), np.int64(6), [6, 7]),
        (np.arange(8), np.float32(0.5), [4, 5, 6, 7]),
    ],
)
def test_edges(counts, threshold, expected):
    _, kept = prune_unused(MODEL, {"layers/0": counts}, threshold)
    assert kept["layers/0"].tolist() == expected
    assert kept["layers/1"].tolist() == list(range(7))  # Without counts it stays whole.


@pytest.mark.parametrize("counts", [[0, 0, 9], [7] * 7])  # Of its outputs, of its inputs.
def test_last_layer_is_never_pruned(counts):
    smaller, kept = prune_unused(MODEL, {"layers/2/kernel": counts}, 0.5)
    assert kept["layers/2"].tolist() == [0, 1, 2]
    x = np.ones((2, 5), np.float32)
    np.testing.assert_array_equal(smaller(x), MODEL(x))


class Mixed(nnx.Module):
    """Its attributes are set in another order than the alphabet's."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.stem = nnx.Linear(4, 6, rngs=rngs)
        self.body = nnx.Sequential(
            nnx.relu, nnx.Linear(6, 6, rngs=rngs), nnx.Dropout(0.5, deterministic=True)
        )
        self.aside = nnx.Linear(6, 2, rngs=rngs)

    def __call__(self, x):
        return self.aside(self.body(self.stem(x)))


def test_order_of_definition():
    model = Mixed()
    smaller, kept = prune_unused(model, {"stem": [0, 1, 0, 1, 0, 1]}, 1)
    assert list(kept) == ["stem", "body/layers/1", "aside"]
    assert smaller.body.layers[1].kernel.shape == (3, 6)
    # A copy has lost the order, so that the layers do not fit; with their names it works.
    with pytest.raises(ValueError, match="'aside' has 2 outputs, and 'body/layers/1'.* 3 inputs"):
        prune_unused(smaller, {}, 1)
    smallest, again = prune_unused(
        smaller, {"body/layers/1": [0, 0, 0, 0, 0, 1]}, 1, chain=list(kept)
    )
    assert again["body/layers/1"].tolist() == [5]
    assert smallest(jnp.ones((2, 4))).shape == (2, 2)


def test_part_of_a_model():
    model = Mixed()
    smaller, kept = prune_unused(
        model, {"body/layers/1": [1, 0, 0, 0, 0, 0]}, 1, chain=("body/layers/1", "aside")
    )
    assert list(kept) == ["body/layers/1", "aside"]
    np.testing.assert_array_equal(smaller.stem.kernel[...], model.stem.kernel[...])
    assert smaller.aside.kernel.shape == (1, 2)


@pytest.mark.parametrize("transposed", [False, True])
def test_smaller_model_trains(transposed):
    smaller, _ = prune_unused(
        MLP(transposed=transposed),
        {name: np.arange(n) for name, n in zip(NAMES, (8, 7), strict=False)},
        4,
    )
    x = np.random.default_rng(0).normal(size=(32, 5)).astype(np.float32)
    y = x[:, :3] ** 2
    optimizer = nnx.Optimizer(smaller, optax.adam(1e-2), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - y) ** 2))(model)
        optimizer.update(model, grads)
        return loss

    losses = [float(step(smaller, optimizer)) for _ in range(60)]
    assert losses[-1] < 0.6 * losses[0]


def test_dtype_and_metadata_stay():
    model = MLP()
    model.layers[0] = nnx.Linear(
        5, 8, param_dtype=jnp.bfloat16, kernel_metadata={"note": "mine"}, rngs=nnx.Rngs(0)
    )
    smaller, _ = prune_unused(model, {"layers/0": np.arange(8)}, 4, chain=NAMES)
    kernel = smaller.layers[0].kernel
    assert kernel.dtype == jnp.bfloat16 and kernel.get_metadata("note") == "mine"


ONES = np.ones(8, int)


@pytest.mark.parametrize(
    ("counts", "threshold", "options", "error", "match"),
    [
        ({"layers/9": ONES}, 1, {}, ValueError, "'layers/9', but the layers are layers/0, lay"),
        ({"layers/0": ONES, "layers/0/kernel": ONES}, 1, {}, ValueError, "'layers/0' twice"),
        ({"layers/1": ONES}, 1, {}, ValueError, r"\(8,\) for layer 'layers/1' of 7 output"),
        ({"layers/0": ONES[:, None]}, 1, {}, ValueError, r"\(8, 1\) for layer 'layers/0' of 8"),
        ({}, 0, {}, ValueError, "threshold is 0"),
        ({}, -3, {}, ValueError, "threshold is -3"),
        ({}, -0.5, {}, ValueError, "threshold is -0.5"),
        ({}, 1.0, {}, ValueError, "threshold is 1.0"),
        ({}, float("nan"), {}, ValueError, "threshold is nan"),
        ({}, True, {}, TypeError, "got True"),
        ({}, "0.1", {}, TypeError, "got '0.1'"),
        ({}, 1, {"chain": "layers/0"}, TypeError, "the string 'layers/0'"),
        ({}, 1, {"chain": []}, ValueError, "nothing to prune"),
        ({}, 1, {"chain": ["head"]}, ValueError, "called 'head'; the model has layers/0, lay"),
        ({}, 1, {"chain": ["layers/0"] * 2}, ValueError, "twice: layers/0, layers/0"),
        (
            {},
            1,
            {"chain": ["layers/0", "layers/2"]},
            ValueError,
            "'layers/0' has 8 outputs, and 'layers/2' behind it 7 inputs",
        ),
    ],
)
def test_errors(counts, threshold, options, error, match):
    with pytest.raises(error, match=match):
        prune_unused(MODEL, counts, threshold, **options)


def test_stacked_kernel():
    model = MLP((4, 4))
    model.layers[0].kernel.set_value(jnp.ones((3, 4, 4)))
    with pytest.raises(ValueError, match=r"'layers/0' is \(3, 4, 4\): only matrices"):
        prune_unused(model, {}, 1)
