"""Which kernels are chosen, and what is said about it."""

import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import native
from priorityprop_jax.sparse.backends import choose_backend, sparse_backend
from priorityprop_jax.sparse.pattern import ConvGeometry, make_pattern

IMAGE = ConvGeometry((1, 1))


def kept(share):
    mask = np.zeros(100, bool)
    mask[: round(share * 100)] = True
    return make_pattern(mask.reshape(10, 10))


@pytest.fixture
def with_native(monkeypatch):
    monkeypatch.setattr(native, "native_status", lambda: (True, "AVX-9 kernels"))


@pytest.fixture
def without_native(monkeypatch):
    monkeypatch.setattr(native, "native_status", lambda: (False, "there was no compiler"))


def test_with_native_kernels(with_native):
    for pattern, options, name, why in [
        (None, {}, "native", "AVX-9 kernels"),
        (kept(0.1), {}, "native", "AVX-9 kernels"),
        (kept(0.1), {"dtype": jnp.bfloat16}, "native", "AVX-9 kernels"),
        (kept(0.1), {"dtype": np.float16}, "native", "AVX-9 kernels"),
        (kept(0.1), {"geometry": IMAGE}, "native", "AVX-9 kernels"),
        (kept(0.9), {}, "masked", "90% of the weight is kept: dense is faster"),
        (kept(0.1), {"dtype": np.float64}, "csr", "float64 has no native kernels"),
        (kept(0.3), {"dtype": np.float64}, "masked", "float64 has no native kernels, and with 30%"),
        (kept(0.1), {"dtype": np.float64, "geometry": IMAGE}, "masked", "only these convolve"),
        (kept(0.1), {"platform": "gpu"}, "masked", "single values are no work for a gpu"),
        (None, {"platform": "tpu"}, "masked", "single values are no work for a tpu"),
    ]:
        backend = sparse_backend(pattern, **{"platform": "cpu", **options})
        assert backend.name == name and why in backend.why, (options, backend)


def test_without_native_kernels(without_native):
    assert sparse_backend(platform="cpu") == ("csr", "there was no compiler")
    assert sparse_backend(kept(0.1), platform="cpu").name == "csr"
    dense = sparse_backend(kept(0.3), platform="cpu")
    assert dense.name == "masked" and "there was no compiler, and with 30% kept" in dense.why
    image = sparse_backend(kept(0.1), platform="cpu", geometry=IMAGE)
    assert image.name == "masked" and "there was no compiler, and only these convolve" in image.why


def test_room_counts_as_if_it_were_used():
    # Another mask of the same capacity must not need another kernel.
    roomy = make_pattern(np.eye(10), capacity=90)
    assert sparse_backend(roomy, platform="cpu").name == "masked"


def test_the_platform_is_where_jax_puts_arrays(with_native):
    assert sparse_backend().name == "native"
    with jax.default_device(jax.devices("cpu")[3]):
        assert sparse_backend().name == "native"
    with jax.default_device("cpu"):
        assert sparse_backend().name == "native"


def test_a_choice_is_kept_if_it_can_be(with_native):
    for asked, geometry in [
        ("native", None),
        ("native", IMAGE),
        ("csr", None),
        ("masked", None),
        ("masked", IMAGE),
    ]:
        assert choose_backend(asked, kept(0.9), np.dtype(np.float32), geometry, (2, 4)) == asked
    assert choose_backend(None, kept(0.9), np.dtype(np.float32), None, (2, 4)) == "masked"


@pytest.mark.parametrize(
    ("asked", "dtype", "geometry", "message"),
    [
        ("dense", np.float32, None, "must be one of native, csr, masked or None"),
        ("csr", np.float32, IMAGE, "has no convolutions"),
        ("native", np.float64, None, "in float32, not in float64"),
    ],
)
def test_choices_that_cannot_be(with_native, asked, dtype, geometry, message):
    with pytest.raises(ValueError, match=message):
        choose_backend(asked, kept(0.1), np.dtype(dtype), geometry, (2, 4))


def test_native_where_there_is_none(without_native):
    with pytest.raises(ValueError, match="cannot be used here: there was no compiler, on cpu"):
        choose_backend("native", kept(0.1), np.dtype(np.float32), None, (2, 4))


def test_native_on_another_platform(with_native, monkeypatch):
    monkeypatch.setattr(native, "platform", lambda: "gpu")
    with pytest.raises(ValueError, match="cannot be used here: AVX-9 kernels, on gpu"):
        choose_backend("native", kept(0.1), np.dtype(np.float32), None, (2, 4))
    assert choose_backend(None, kept(0.1), np.dtype(np.float32), None, (2, 4)) == "masked"


@pytest.mark.skipif(
    os.environ.get("PRIORITYPROP_REQUIRE_NATIVE") != "1",
    reason="PRIORITYPROP_REQUIRE_NATIVE=1 asks for native kernels",
)
def test_native_kernels_are_there_where_they_are_asked_for():
    assert sparse_backend().name == "native", sparse_backend().why
