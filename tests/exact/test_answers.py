"""Tests of the loss at labelled positions: value and gradients are those of all logits at once."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import exact

WIDTH, CLASSES = 5, 11


def arrays(*shape, dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0), 4)
    hidden = jax.random.normal(keys[0], (*shape, WIDTH)).astype(dtype)
    kernel = jax.random.normal(keys[1], (WIDTH, CLASSES)).astype(dtype)
    bias = jax.random.normal(keys[2], (CLASSES,)).astype(dtype)
    return hidden, kernel, bias, jax.random.randint(keys[3], shape, 0, CLASSES)


def whole(hidden, kernel, bias, labels, where):
    """All logits at once."""
    logits = (hidden @ kernel + (0 if bias is None else bias)).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return jnp.sum(jnp.where(where, losses, 0)) / jnp.maximum(where.sum(), 1)


def ours(hidden, kernel, bias, labels, where, chunk=4):
    return exact.cross_entropy(hidden, kernel, labels, where, bias=bias, chunk=chunk)


def of_a_table(hidden, kernel, bias, labels, where, chunk=4):
    """The same of a kernel that lies the other way."""
    options = {"bias": bias, "chunk": chunk, "transposed": True}
    return exact.cross_entropy(hidden, kernel.T, labels, where, **options)


@pytest.mark.parametrize("lies", [ours, of_a_table])
@pytest.mark.parametrize("chunk", [1, 4, 100])
def test_value_and_gradients(chunk, lies):
    hidden, kernel, bias, labels = arrays(3, 7)
    masks = [labels >= 0, labels < 4, labels < 0, jnp.arange(21).reshape(3, 7) == 20]

    @jax.jit
    def both(where):
        loss = lambda f, **o: lambda *a: 3.0 * f(*a, labels, where, **o)  # noqa: E731
        args = hidden, kernel, bias
        return [
            jax.value_and_grad(f, (0, 1, 2))(*args) for f in (loss(lies, chunk=chunk), loss(whole))
        ]

    for where in masks:
        got, expected = both(where)
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, expected
        )


def test_without_a_bias_and_for_what_is_wanted_alone():
    hidden, kernel, _, labels = arrays(9)
    where = labels > 3
    for i in range(2):
        got, expected = (
            jax.grad(lambda *a, f=f: f(*a, None, labels, where), i)(hidden, kernel)
            for f in (ours, whole)
        )
        np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
    # A frozen output layer has no product for its gradient.
    dots = str(jax.make_jaxpr(jax.grad(lambda h: ours(h, kernel, None, labels, where)))(hidden))
    assert dots.count("dot_general") == 2
    assert exact.cross_entropy(hidden, kernel, labels) == pytest.approx(
        float(whole(hidden, kernel, None, labels, labels >= 0)), rel=1e-6
    )


def test_what_is_not_labelled_is_not_looked_at():
    hidden, kernel, bias, labels = arrays(4, 4)
    where = jnp.arange(16).reshape(4, 4) % 3 == 0
    bad = jnp.where(where[..., None], hidden, jnp.nan)
    labels = jnp.where(where, labels, -100)
    grads = jax.grad(ours, (0, 1, 2))(bad, kernel, bias, labels, where, chunk=4)
    expected = jax.grad(ours, (0, 1, 2))(hidden, kernel, bias, labels, where, chunk=16)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), grads, expected
    )
    assert not grads[0][~where].any()


def test_there_is_no_array_of_all_logits():
    shape = jax.ShapeDtypeStruct
    hidden, kernel = shape((512, 8), jnp.float32), shape((8, 4096), jnp.float32)
    labels = shape((512,), jnp.int32)

    def bytes_of(loss):
        program = jax.jit(jax.grad(loss, (0, 1))).lower(hidden, kernel, labels).compile()
        return program.memory_analysis().temp_size_in_bytes

    chunks = bytes_of(lambda h, k, y: exact.cross_entropy(h, k, y, y >= 0, chunk=32))
    at_once = bytes_of(lambda h, k, y: whole(h, k, None, y, y >= 0))
    assert at_once > 4 * 512 * 4096 > 4 * chunks


def test_narrow_numbers_are_summed_wide():
    hidden, kernel, bias, labels = arrays(64, dtype=jnp.bfloat16)
    loss = ours(hidden, kernel, bias, labels, labels >= 0)
    wide = whole(*(x.astype(jnp.float32) for x in (hidden, kernel, bias)), labels, labels >= 0)
    assert loss.dtype == jnp.float32 and float(loss) == pytest.approx(float(wide), rel=1e-2)
    grads = jax.grad(ours, (0, 1, 2))(hidden, kernel, bias, labels, labels >= 0)
    assert {g.dtype for g in grads} == {jnp.dtype(jnp.bfloat16)}


def test_vmap_and_nothing_at_all():
    hidden, kernel, bias, labels = arrays(3, 4)
    each = jax.vmap(ours, (0, None, None, 0, 0))(hidden, kernel, bias, labels, labels > 4)
    for i in range(3):
        one = whole(hidden[i], kernel, bias, labels[i], labels[i] > 4)
        np.testing.assert_allclose(each[i], one, rtol=1e-5)
    assert exact.cross_entropy(jnp.ones((0, 5)), kernel, jnp.ones((0,), int)) == 0


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kernel": jnp.ones((4, 11))}, "do not fit"),
        ({"where": jnp.ones(2, bool)}, "do not fit"),
        ({"bias": jnp.ones(4)}, "do not fit"),
        ({"chunk": 0}, "at least 1 row"),
    ],
)
def test_wrong(change, match):
    hidden, kernel, bias, labels = arrays(6)
    given = {"hidden": hidden, "kernel": kernel, "labels": labels, "bias": bias}
    with pytest.raises(ValueError, match=match):
        exact.cross_entropy(**given | change)
