"""Which kernels are chosen, and what is said about it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from priorityprop_jax.sparse import backends, native
from priorityprop_jax.sparse.backends import choose_backend, kernel_of, sparse_backend
from priorityprop_jax.sparse.geometry import ConvGeometry
from priorityprop_jax.sparse.pattern import make_pattern
from priorityprop_jax.sparse.two_four import pack_two_four

IMAGE = ConvGeometry((1, 1))


def kept(share, block=1):
    mask = np.zeros(100, bool)
    mask[: round(share * 100)] = True
    return make_pattern(np.kron(mask.reshape(10, 10), np.ones((block, block))), block=block)


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


@pytest.mark.parametrize("platform", ["cpu", "gpu", "tpu"])
def test_blocks_and_two_of_four_are_for_all_platforms(platform):
    assert sparse_backend(kept(0.1, 4), platform=platform) == ("block", "blocks of 4 x 4")
    dense = sparse_backend(kept(0.8, 4), platform=platform)
    assert dense.name == "masked" and "80% of the blocks" in dense.why
    image = sparse_backend(kept(0.1, 4), platform=platform, geometry=IMAGE)
    assert image.name == "masked" and "no kernels for blocks" in image.why
    packed = pack_two_four(np.array([[1, 0, 0, 1]]))
    assert sparse_backend(packed, platform=platform).name == "two_four"


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
    single, blocks = kept(0.9), kept(0.9, 4)
    packed = pack_two_four(np.array([[1, 0, 0, 1]]))
    for asked, pattern, geometry in [
        ("native", single, None),
        ("native", single, IMAGE),
        ("csr", single, IMAGE),
        ("masked", single, IMAGE),
        ("masked", blocks, None),
        ("block", blocks, None),
        ("two_four", packed, None),
    ]:
        assert choose_backend(asked, pattern, np.dtype(np.float32), geometry) == asked
    assert choose_backend(None, packed, np.dtype(np.float32), None) == "two_four"
    assert choose_backend(None, single, np.dtype(np.float32), None) == "masked"


@pytest.mark.parametrize(
    ("asked", "what", "dtype", "geometry", "message"),
    [
        (
            "dense",
            "single",
            np.float32,
            None,
            "must be one of native, csr, block, masked, two_four",
        ),
        ("two_four", "single", np.float32, None, "does not fit a SparsePattern"),
        ("masked", "packed", np.float32, None, "does not fit a TwoFourPattern"),
        ("block", "blocks", np.float32, IMAGE, "has no convolutions"),
        ("native", "blocks", np.float32, None, "takes single values, not blocks"),
        ("csr", "blocks", np.float32, None, "takes single values, not blocks"),
        ("block", "single", np.float32, None, "takes blocks"),
        ("native", "single", np.float64, None, "in float32, not in float64"),
    ],
)
def test_choices_that_cannot_be(with_native, asked, what, dtype, geometry, message):
    pattern = {
        "single": kept(0.1), "blocks": kept(0.1, 4), "packed": pack_two_four([[1, 0, 0, 1]]),
    }[what]  # fmt: skip
    with pytest.raises(ValueError, match=message):
        choose_backend(asked, pattern, np.dtype(dtype), geometry)


def test_native_where_there_is_none(without_native):
    with pytest.raises(ValueError, match="cannot be used here: there was no compiler, on cpu"):
        choose_backend("native", kept(0.1), np.dtype(np.float32), None)


def test_native_on_another_platform(with_native, monkeypatch):
    monkeypatch.setattr(backends, "_platform", lambda: "gpu")
    with pytest.raises(ValueError, match="cannot be used here: AVX-9 kernels, on gpu"):
        choose_backend("native", kept(0.1), np.dtype(np.float32), None)
    assert choose_backend(None, kept(0.1), np.dtype(np.float32), None) == "masked"


def test_only_native_kernels_are_closed_to_the_compiler():
    for name in ("native", "csr", "block", "masked", "two_four"):
        assert kernel_of(name, None).opaque == (name == "native")
    assert kernel_of("csr", IMAGE) is kernel_of("csr", ConvGeometry((1, 1)))
