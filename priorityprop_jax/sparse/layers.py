"""`flax.nnx` layers whose weights are sparse."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, ClassVar, Self, TypedDict, Unpack

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.linen.dtypes import promote_dtype
from flax.nnx import initializers
from jax import lax
from jax.core import Tracer

from priorityprop_jax.sparse.functional import Padding, sparse_conv, sparse_linear
from priorityprop_jax.sparse.masks import kept_of, random_mask
from priorityprop_jax.sparse.pattern import (
    ARRAYS,
    SparsePattern,
    carry,
    change_pattern,
    check_pattern,
    densify_values,
    make_pattern,
    mask_of,
    take_values,
)


class SparseIndex(nnx.Variable):
    """Index arrays of a sparse weight: saved with the model, and no parameters."""


class Options(TypedDict, total=False):
    """What all sparse layers are made with; see `SparseLinear`."""

    sparsity: float | None
    mask: Any
    use_bias: bool
    dtype: Any
    param_dtype: Any
    kernel_init: Any
    bias_init: Any
    capacity: int | None
    backend: str | None
    preferred_element_type: Any


class SparseLayer(nnx.Module):
    """What `SparseLinear` and `SparseConv` share: a kernel kept as values at places."""

    _dense: ClassVar[Any]  # the kind of layer that it stands for
    _own: ClassVar[tuple[str, ...]] = ()  # options that this kind has beside those of all

    values: nnx.Param[jax.Array]  # [capacity]
    index: nnx.Dict  # `SparseIndex` arrays of the pattern, by name
    bias: nnx.Param[jax.Array] | None  # [out]
    kernel_shape: tuple[int, ...]  # as `flax.nnx` stores it: (..., in, out)
    backend: str | None
    dtype: Any
    preferred_element_type: Any

    def _make(
        self,
        shape: tuple[int, ...],
        *,
        rngs: nnx.Rngs,
        sparsity: float | None = None,
        mask: Any = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = initializers.lecun_normal(),  # noqa: B008
        bias_init: Any = initializers.zeros_init(),  # noqa: B008
        capacity: int | None = None,
        backend: str | None = None,
        preferred_element_type: Any = None,
    ) -> None:
        """Draws a dense kernel of this shape and a bias, and keeps of them what the mask keeps."""
        if (sparsity is None) == (mask is None):
            raise ValueError("give either sparsity=, for places at random, or mask=")
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        bias = bias_init(rngs.params(), shape[-1:], param_dtype) if use_bias else None
        if sparsity is not None:
            mask = random_mask(rngs.params(), shape, sparsity)
            # What is drawn under `nnx.jit` or `nnx.eval_shape` is not known, but how much is.
            kept = max(kept_of(math.prod(shape), sparsity), 1)
            capacity = kept if capacity is None and isinstance(mask, Tracer) else capacity
        if np.shape(mask) != shape:
            raise ValueError(
                f"the mask must be of the kernel's shape, {shape}, got {np.shape(mask)}"
            )
        mask = mask if isinstance(mask, Tracer) else np.asarray(mask)
        pattern = make_pattern(as_matrix(mask), capacity=capacity)
        self.kernel_shape = tuple(shape)
        self.index = nnx.Dict({name: SparseIndex(getattr(pattern, name)) for name in ARRAYS})
        self.values = nnx.Param(take_values(as_matrix(kernel), pattern))  # type: ignore[arg-type]
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        self.dtype, self.backend = dtype, backend
        self.preferred_element_type = preferred_element_type

    @classmethod
    def from_dense(
        cls,
        layer: Any,
        mask: Any = None,
        *,
        capacity: int | None = None,
        backend: str | None = None,
    ) -> Self:
        """A new layer with copies of what an `nnx.Linear` or `nnx.Conv` holds.

        Args:
          layer: the dense layer.
          mask: bool, of the kernel's shape: what to keep; by default what is not zero.
          capacity: as for `SparseLinear`.
          backend: as there.

        Raises:
          TypeError: if the layer is of another kind.
          ValueError: if a mask does not fit, or the layer does what this one does not.
        """
        if not isinstance(layer, cls._dense):
            raise TypeError(
                f"the layer must be an nnx.{cls._dense.__name__}, got {type(layer).__name__}"
            )
        if not convertible(layer):
            raise ValueError(
                "the layer multiplies by a dot_general of its own: call restore(model) first"
                if isinstance(layer, nnx.Linear)
                else "sparse convolutions have one or two axes, no input_dilation and no "
                "conv_general_dilated of their own (see restore); this layer has "
                f"kernel_size={layer.kernel_size}, input_dilation={layer.input_dilation}"
            )
        kernel = layer.kernel[...]
        own = getattr(layer, "mask", None)  # of a convolution
        if own is not None:
            kernel = kernel * own
        bias = None if layer.bias is None else layer.bias[...]
        kind: Any = cls
        return kind(
            layer.in_features,
            layer.out_features,
            **{name: getattr(layer, name) for name in cls._own},
            mask=kernel != 0 if mask is None else mask,
            use_bias=bias is not None,
            dtype=layer.dtype,
            param_dtype=kernel.dtype,
            kernel_init=lambda *_: kernel,
            bias_init=lambda *_: bias,
            capacity=capacity,
            backend=backend,
            preferred_element_type=layer.preferred_element_type,
            rngs=nnx.Rngs(0),
        )

    def to_dense(self) -> Any:
        """The dense layer, with zeros where this one has no places."""
        *_, ins, outs = self.kernel_shape
        layer: Any = self._dense(
            ins * getattr(self, "feature_group_count", 1),
            outs,
            **{name: getattr(self, name) for name in self._own},
            use_bias=self.bias is not None,
            dtype=self.dtype,
            param_dtype=self.values.dtype,
            kernel_init=initializers.zeros_init(),
            preferred_element_type=self.preferred_element_type,
            rngs=nnx.Rngs(0),
        )
        layer.kernel.set_value(self.kernel())
        if self.bias is not None:
            layer.bias.set_value(self.bias[...])
        return layer

    @property
    def pattern(self) -> SparsePattern:
        """Where the values stand; of a kernel as a matrix ``(out, ...)``."""
        arrays = {name: variable[...] for name, variable in self.index.items()}
        shape = (self.kernel_shape[-1], math.prod(self.kernel_shape[:-1]))
        return SparsePattern(**arrays, shape=shape)

    @property
    def nonzeros(self) -> int:
        """The places that are in use."""
        return int(self.index["row_starts"][...][-1])

    def kernel(self) -> jax.Array:
        """The kernel as a dense array, as `flax.nnx` stores it: ``(..., in, out)``."""
        return _unmatrix(densify_values(self.values[...], self.pattern), self.kernel_shape)

    def mask(self) -> np.ndarray:
        """The mask of the kernel, bool ``(..., in, out)``."""
        return _unmatrix(mask_of(self.pattern), self.kernel_shape)

    def change_mask(self, mask: Any) -> jax.Array:
        """Another mask of the kernel's shape and at most as many places, in place.

        Values that stay are kept, new ones are zero; nothing is compiled anew. Returns where each
        comes from, int32 ``[capacity]``: what an optimizer keeps follows by `carry`.

        Raises:
          ValueError: if the mask has another shape or too many places.
        """
        mask = np.asarray(mask)
        if mask.shape != self.kernel_shape:
            raise ValueError(f"the mask must be of shape {self.kernel_shape}, got {mask.shape}")
        pattern, source = change_pattern(self.pattern, as_matrix(mask))
        for name in ARRAYS:
            self.index[name].set_value(getattr(pattern, name))
        self.values.set_value(carry(self.values[...], source))
        return source

    def check(self) -> None:
        """Refuses index arrays of no mask, as in a damaged file: see `check_pattern`."""
        check_pattern(self.pattern)

    def _finish(self, y: jax.Array, bias: jax.Array | None) -> jax.Array:
        """The output in the dtype that was asked for, and the bias."""
        if self.preferred_element_type is not None:
            y = y.astype(self.preferred_element_type)
        return y if bias is None else y + bias.reshape((1,) * (y.ndim - 1) + (-1,))

    def _promoted(self, inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
        """Inputs and parameters in the dtype of the computation, as `flax.nnx` layers have it."""
        bias = None if self.bias is None else self.bias[...]
        x, values, bias = promote_dtype(inputs, self.values[...], bias, dtype=self.dtype)
        if self.preferred_element_type is not None:
            # Sums are not rounded on the way to a wider output.
            wide = jnp.promote_types(x.dtype, self.preferred_element_type)
            x, values = x.astype(wide), values.astype(wide)
        return x, values, bias


class SparseLinear(SparseLayer):
    """`nnx.Linear` with a sparse weight: ``y = x W + b`` in time in proportion to the non-zeros.

    Values are a parameter, index arrays are state: `nnx.grad` and optimizers see the former,
    checkpoints hold both. Gradients of values are those of the dense layer at the places of the
    mask. See `sparse_linear` for what happens, `sparsify` to swap the layers of a model.

    Args:
      in_features: inputs.
      out_features: outputs.
      rngs: for initial values and places.
      **options: ``sparsity``, the share of the weight that has no place, in ``[0, 1]``, with places
        at random; or ``mask``, bool ``[in, out]``, instead. As `nnx.Linear` has them: ``use_bias``,
        ``dtype``, ``param_dtype``, ``kernel_init`` (of the dense weight from which values are
        taken), ``bias_init`` and ``preferred_element_type``. ``capacity``: places to make room for,
        which `change_mask` may use; by default as many as there are. ``backend``: which kernels; by
        default the choice of `sparse_backend`.

    Raises:
      ValueError: if both or neither of ``sparsity`` and ``mask`` are given, or they do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> layer = sparse.SparseLinear(64, 32, sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer.values.shape, layer(jnp.ones((8, 64))).shape
      ((205,), (8, 32))
      >>> layer.to_dense()
      Linear(...
    """

    _dense = nnx.Linear

    def __init__(
        self, in_features: int, out_features: int, *, rngs: nnx.Rngs, **options: Unpack[Options]
    ):
        self._make((in_features, out_features), rngs=rngs, **options)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Multiplies ``[..., in]`` to ``[..., out]``."""
        x, values, bias = self._promoted(inputs)
        return self._finish(sparse_linear(x, values, self.pattern, backend=self.backend), bias)


class SparseConv(SparseLayer):
    """`nnx.Conv` over one or two axes with a sparse kernel; see `SparseLinear`.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one or two sizes.
      strides, padding, kernel_dilation, feature_group_count: as `sparse_conv` has them.
      rngs: for initial values and places.
      **options: those of `SparseLinear`; the mask is bool ``[*kernel_size, in / groups, out]``.

    Raises:
      ValueError: if both or neither of ``sparsity`` and ``mask`` are given, or they do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> layer = sparse.SparseConv(8, 16, (3, 3), strides=2, sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 10, 10, 8))).shape
      (4, 5, 5, 16)
    """

    _dense = nnx.Conv
    _own = ("kernel_size", "strides", "padding", "kernel_dilation", "feature_group_count")

    kernel_size: tuple[int, ...]
    strides: int | Sequence[int] | None
    padding: Padding
    kernel_dilation: int | Sequence[int] | None
    feature_group_count: int

    def __init__(
        self,
        in_features: int,
        out_features: int,
        kernel_size: int | Sequence[int],
        strides: int | Sequence[int] | None = 1,
        *,
        padding: Padding = "SAME",
        kernel_dilation: int | Sequence[int] | None = 1,
        feature_group_count: int = 1,
        rngs: nnx.Rngs,
        **options: Unpack[Options],
    ):
        sizes = tuple(int(size) for size in np.atleast_1d(kernel_size))
        if feature_group_count < 1 or in_features % feature_group_count:
            raise ValueError(f"{feature_group_count} groups do not divide {in_features} channels")
        shape = (*sizes, in_features // feature_group_count, out_features)
        self._make(shape, rngs=rngs, **options)
        self.kernel_size, self.strides, self.padding = sizes, strides, padding
        self.kernel_dilation, self.feature_group_count = kernel_dilation, feature_group_count

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves ``[..., *sizes, in]`` to ``[..., *sizes, out]``."""
        x, values, bias = self._promoted(inputs)
        y = sparse_conv(
            x,
            values,
            self.pattern,
            **{name: getattr(self, name) for name in self._own},
            backend=self.backend,
        )
        return self._finish(y, bias)


def convertible(layer: Any) -> bool:
    """Whether a dense layer has a sparse one that does the same."""
    # What works on another product, as `meprop` makes it do, may store its kernel differently.
    if isinstance(layer, nnx.Linear):
        return layer.dot_general is lax.dot_general
    if not isinstance(layer, nnx.Conv):
        return False
    dilation = layer.input_dilation
    return (
        layer.conv_general_dilated is lax.conv_general_dilated
        and len(layer.kernel_size) in (1, 2)
        and (dilation is None or set(np.atleast_1d(dilation)) == {1})
    )


def as_matrix(kernel: Any) -> Any:
    """A kernel ``(*sizes, in, out)`` as the matrix ``(out, in * sizes)`` of a pattern."""
    axes = kernel.ndim
    return kernel.transpose(axes - 1, axes - 2, *range(axes - 2)).reshape(kernel.shape[-1], -1)


def _unmatrix(matrix: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `as_matrix`."""
    *sizes, ins, outs = shape
    axes = len(shape)
    return matrix.reshape(outs, ins, *sizes).transpose(*range(2, axes), 1, 0)
