"""`flax.nnx` layers whose weights are sparse."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx import initializers
from flax.nnx.nn.dtypes import promote_dtype
from jax import lax

from priorityprop_jax.sparse.functional import Padding, sparse_conv, sparse_linear
from priorityprop_jax.sparse.masks import random_mask
from priorityprop_jax.sparse.pattern import (
    SparsePattern,
    carry,
    change_pattern,
    check_pattern,
    densify_values,
    make_pattern,
    mask_of,
    take_values,
)
from priorityprop_jax.sparse.two_four import (
    TwoFourPattern,
    densify_two_four,
    is_two_four,
    mask_of_two_four,
    pack_two_four,
    take_two_four,
)


class SparseIndex(nnx.Variable):
    """Index arrays of a sparse weight: saved with the model, and no parameters."""


class SparseLayer(nnx.Module):
    """What `SparseLinear` and `SparseConv` share: a kernel kept as values at places.

    Attributes:
      values: the parameter, ``[capacity]`` (``[capacity, block, block]`` of blocks,
        ``[out, in / 2]`` of a 2:4 mask).
      index: `SparseIndex` arrays of the pattern by name.
      bias: the parameter ``[out]``, or None.
    """

    values: nnx.Param[jax.Array]
    index: nnx.Dict
    bias: nnx.Param[jax.Array] | None
    backend: str | None
    kernel_shape: tuple[int, ...]  # as `flax.nnx` stores it: (..., in, out)
    block: int
    dtype: Any

    def _set(
        self, kernel: Any, mask: Any, bias: Any, *, capacity: int | None, block: int, **others: Any
    ) -> None:
        """Takes a dense kernel and bias over, in the layout of `flax.nnx`."""
        mask, matrix = as_matrix(np.asarray(mask)) != 0, as_matrix(kernel)
        self.kernel_shape = tuple(kernel.shape)
        self.block = block
        packs = block == 1 and capacity is None and kernel.ndim == 2 and is_two_four(mask)
        pattern = (
            pack_two_four(mask) if packs else make_pattern(mask, capacity=capacity, block=block)
        )
        self.index = nnx.Dict(
            {name: SparseIndex(array) for name, array in _arrays(pattern).items()}
        )
        if packs:
            self.values = nnx.Param(take_two_four(matrix, pattern))  # type: ignore[arg-type]
        else:
            # A block is kept whole, and what the mask leaves out in it starts at zero.
            kept = jnp.where(mask, matrix, 0)
            self.values = nnx.Param(take_values(kept, pattern))  # type: ignore[arg-type]
        self.bias = nnx.data(None) if bias is None else nnx.Param(bias)
        for name, value in others.items():
            setattr(self, name, value)

    @property
    def pattern(self) -> SparsePattern | TwoFourPattern:
        """Where the values stand; of a kernel as a matrix ``(out, ...)``."""
        arrays = {name: variable[...] for name, variable in self.index.items()}
        shape = (self.kernel_shape[-1], math.prod(self.kernel_shape[:-1]))
        if "positions" in arrays:
            return TwoFourPattern(**arrays, shape=shape)
        return SparsePattern(**arrays, shape=shape, block=self.block)

    @property
    def nonzeros(self) -> int:
        """The places that are in use."""
        pattern = self.pattern
        if isinstance(pattern, TwoFourPattern):
            return self.values.size
        return int(pattern.row_starts[-1]) * self.block**2

    @property
    def sparsity(self) -> float:
        """The share of the kernel that has no place."""
        return 1 - self.nonzeros / max(math.prod(self.kernel_shape), 1)

    def kernel(self) -> jax.Array:
        """The kernel as a dense array, as `flax.nnx` stores it: ``(..., in, out)``."""
        pattern, values = self.pattern, self.values[...]
        if isinstance(pattern, TwoFourPattern):
            return _unmatrix(densify_two_four(values, pattern), self.kernel_shape)
        return _unmatrix(densify_values(values, pattern), self.kernel_shape)

    def mask(self) -> np.ndarray:
        """The mask of the kernel, bool ``(..., in, out)``."""
        pattern = self.pattern
        of_matrix = mask_of_two_four if isinstance(pattern, TwoFourPattern) else mask_of
        return np.asarray(_unmatrix(of_matrix(pattern), self.kernel_shape))  # type: ignore[arg-type]

    def change_mask(self, mask: Any) -> jax.Array:
        """Another mask of at most as many places, in place; nothing is compiled anew.

        Args:
          mask: bool, of the shape of the kernel. Values at places that stay are kept, those at
            new places are zero.

        Returns:
          Where each value comes from, int32 ``[capacity]``: see `change_pattern`. What an optimizer
          keeps follows by `carry`.

        Raises:
          ValueError: if the mask has another shape or too many places, or the layer is 2:4.
        """
        pattern = self.pattern
        if isinstance(pattern, TwoFourPattern):
            raise ValueError("a 2:4 layer has no other mask: make a new one, by from_dense")
        mask = np.asarray(mask)
        if mask.shape != self.kernel_shape:
            raise ValueError(f"the mask must be of shape {self.kernel_shape}, got {mask.shape}")
        changed, source = change_pattern(pattern, as_matrix(mask))
        self.move(changed, source)
        return source

    def move(
        self,
        pattern: SparsePattern,
        source: jax.Array,
        like: Callable[[jax.Array, jax.Array], jax.Array] = lambda new, old: new,
    ) -> None:
        """Takes a pattern made by `change_pattern`, in place.

        Args:
          pattern: of the same size.
          source: int32 ``[capacity]``: where each value comes from.
          like: makes of a new array and the old one what to keep.
        """
        for name, array in _arrays(pattern).items():
            self.index[name].set_value(like(array, self.index[name][...]))
        values = self.values[...]
        self.values.set_value(like(carry(values, source), values))

    def check(self) -> None:
        """Refuses index arrays that belong to no mask, as after a file was damaged.

        Raises:
          ValueError: if anything about them is wrong.
        """
        pattern = self.pattern
        if isinstance(pattern, TwoFourPattern):
            if not is_two_four(mask_of_two_four(pattern)):
                raise ValueError("the positions of a 2:4 layer repeat within a group")
        else:
            check_pattern(pattern)


class SparseLinear(SparseLayer):
    """`nnx.Linear` with a sparse weight: ``y = x W + b`` in time in proportion to the non-zeros.

    Values are a parameter, index arrays are state: `nnx.grad` and optimizers see the former,
    checkpoints hold both. Gradients of values are those of the dense layer at the places of the
    mask. See `sparse_linear` for what happens, `sparsify` to swap the layers of a model.

    Args:
      in_features: inputs.
      out_features: outputs.
      sparsity: the share of the weight that has no place, in ``[0, 1]``; places are drawn at
        random.
      mask: bool ``[in, out]`` instead.
      use_bias: whether there is a bias.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
      kernel_init: of the dense weight from which values are taken.
      bias_init: of the bias.
      capacity: places to make room for; by default as many as are used. `change_mask` may use
        them.
      block: the side of the blocks of places.
      backend: which kernels; by default the choice of `sparse_backend`.
      rngs: for initial values and places.

    Raises:
      ValueError: if both or neither of ``sparsity`` and ``mask`` are given, or they do not fit.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import SparseLinear
      >>> layer = SparseLinear(64, 32, sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer.values.shape, layer(jnp.ones((8, 64))).shape
      ((205,), (8, 32))
      >>> layer.to_dense()
      Linear(...
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        sparsity: float | None = None,
        mask: Any = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = initializers.lecun_normal(),  # noqa: B008
        bias_init: Any = initializers.zeros_init(),  # noqa: B008
        capacity: int | None = None,
        block: int = 1,
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        shape = (in_features, out_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        mask = _mask(sparsity, mask, shape, rngs)
        self._set(kernel, mask, bias, capacity=capacity, block=block, dtype=dtype, backend=backend)

    @classmethod
    def from_dense(
        cls,
        layer: nnx.Linear,
        mask: Any = None,
        *,
        capacity: int | None = None,
        block: int = 1,
        backend: str | None = None,
    ) -> Self:
        """The layer with its weight kept sparsely.

        Args:
          layer: the dense layer; it is left alone.
          mask: bool ``[in, out]``: what to keep; by default what is not zero.
          capacity: places to make room for.
          block: the side of the blocks of places.
          backend: which kernels.

        Returns:
          A new layer with copies of its values.

        Raises:
          TypeError: if the layer is no `nnx.Linear`.
          ValueError: if a mask does not fit.
        """
        options = _taken_over(layer, mask, nnx.Linear)
        return cls(
            layer.in_features,
            layer.out_features,
            capacity=capacity,
            block=block,
            backend=backend,
            **options,
        )

    def to_dense(self) -> nnx.Linear:
        """The dense layer, with zeros where this one has no places."""
        *ins, outs = self.kernel_shape
        return _dense(self, nnx.Linear, math.prod(ins), outs)

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Multiplies.

        Args:
          inputs: ``[..., in]``.

        Returns:
          ``[..., out]``.
        """
        x, values, bias = _promoted(self, inputs)
        y = sparse_linear(x, values, self.pattern, backend=self.backend)
        return y if bias is None else y + bias


class SparseConv(SparseLayer):
    """`nnx.Conv` over one or two axes with a sparse kernel; see `SparseLinear`.

    Args:
      in_features: channels of the input.
      out_features: channels of the output.
      kernel_size: one or two sizes.
      strides: see `sparse_conv`, as for the three that follow.
      padding: see there.
      kernel_dilation: see there.
      feature_group_count: see there.
      sparsity: the share of the kernel that has no place, in ``[0, 1]``; places are random.
      mask: bool ``[*kernel_size, in / groups, out]`` instead.
      use_bias: whether there is a bias.
      dtype: of the computation; by default what inputs and parameters promote to.
      param_dtype: of the parameters.
      kernel_init: of the dense kernel from which values are taken.
      bias_init: of the bias.
      capacity: places to make room for; by default as many as are used.
      backend: which kernels; by default the choice of `sparse_backend`.
      rngs: for initial values and places.

    Raises:
      ValueError: if both or neither of ``sparsity`` and ``mask`` are given, or they do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import SparseConv
      >>> layer = SparseConv(8, 16, (3, 3), strides=2, sparsity=0.9, rngs=nnx.Rngs(0))
      >>> layer(jnp.ones((4, 10, 10, 8))).shape
      (4, 5, 5, 16)
    """

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
        sparsity: float | None = None,
        mask: Any = None,
        use_bias: bool = True,
        dtype: Any = None,
        param_dtype: Any = jnp.float32,
        kernel_init: Any = initializers.lecun_normal(),  # noqa: B008
        bias_init: Any = initializers.zeros_init(),  # noqa: B008
        capacity: int | None = None,
        backend: str | None = None,
        rngs: nnx.Rngs,
    ):
        sizes = (kernel_size,) if isinstance(kernel_size, int) else tuple(kernel_size)
        if feature_group_count < 1 or in_features % feature_group_count:
            raise ValueError(f"{feature_group_count} groups do not divide {in_features} channels")
        shape = (*sizes, in_features // feature_group_count, out_features)
        kernel = kernel_init(rngs.params(), shape, param_dtype)
        bias = bias_init(rngs.params(), (out_features,), param_dtype) if use_bias else None
        mask = _mask(sparsity, mask, shape, rngs)
        self._set(
            kernel,
            mask,
            bias,
            capacity=capacity,
            block=1,
            dtype=dtype,
            backend=backend,
            strides=strides,
            padding=padding,
            kernel_dilation=kernel_dilation,
            feature_group_count=feature_group_count,
        )

    @classmethod
    def from_dense(
        cls,
        layer: nnx.Conv,
        mask: Any = None,
        *,
        capacity: int | None = None,
        backend: str | None = None,
    ) -> Self:
        """The layer with its kernel kept sparsely.

        Args:
          layer: the dense layer over one or two axes; it is left alone.
          mask: bool, of the kernel's shape: what to keep; by default what is not zero.
          capacity: places to make room for.
          backend: which kernels.

        Returns:
          A new layer with copies of its values.

        Raises:
          TypeError: if the layer is no `nnx.Conv`.
          ValueError: if a mask does not fit, or the layer has more axes or dilates its input.
        """
        options = _taken_over(layer, mask, nnx.Conv)
        if not convertible(layer):
            raise ValueError(
                "sparse convolutions have one or two axes, no input_dilation and no "
                "conv_general_dilated of their own (see restore); this layer has "
                f"kernel_size={layer.kernel_size}, input_dilation={layer.input_dilation}"
            )
        return cls(
            layer.in_features,
            layer.out_features,
            layer.kernel_size,
            layer.strides,
            padding=layer.padding,
            kernel_dilation=layer.kernel_dilation,
            feature_group_count=layer.feature_group_count,
            capacity=capacity,
            backend=backend,
            **options,
        )

    def to_dense(self) -> nnx.Conv:
        """The dense layer, with zeros where this one has no places."""
        *sizes, ins, outs = self.kernel_shape
        return _dense(
            self,
            nnx.Conv,
            ins * self.feature_group_count,
            outs,
            tuple(sizes),
            self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
        )

    def __call__(self, inputs: jax.Array) -> jax.Array:
        """Convolves.

        Args:
          inputs: ``[..., *sizes, in]``.

        Returns:
          ``[..., *sizes, out]``.
        """
        x, values, bias = _promoted(self, inputs)
        y = sparse_conv(
            x,
            values,
            self.pattern,
            kernel_size=self.kernel_shape[:-2],
            strides=self.strides,
            padding=self.padding,
            kernel_dilation=self.kernel_dilation,
            feature_group_count=self.feature_group_count,
            backend=self.backend,
        )
        return y if bias is None else y + bias


def convertible(layer: Any) -> bool:
    """Whether a dense layer has a sparse one that does the same.

    Args:
      layer: any module.
    """
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
    """A kernel ``(*sizes, in, out)`` as the matrix ``(out, in * sizes)`` of a pattern.

    Args:
      kernel: an array of NumPy or JAX.
    """
    axes = kernel.ndim
    return kernel.transpose(axes - 1, axes - 2, *range(axes - 2)).reshape(kernel.shape[-1], -1)


def _unmatrix(matrix: Any, shape: tuple[int, ...]) -> Any:
    """The inverse of `as_matrix`."""
    *sizes, ins, outs = shape
    axes = len(shape)
    return matrix.reshape(outs, ins, *sizes).transpose(*range(2, axes), 1, 0)


def _arrays(pattern: SparsePattern | TwoFourPattern) -> dict[str, jax.Array]:
    fields = {field.name: getattr(pattern, field.name) for field in dataclasses.fields(pattern)}
    return {name: value for name, value in fields.items() if name not in ("shape", "block")}


def _mask(sparsity: Any, mask: Any, shape: tuple[int, ...], rngs: nnx.Rngs) -> Any:
    if (sparsity is None) == (mask is None):
        raise ValueError("give either sparsity=, for places at random, or mask=")
    if mask is None:
        return random_mask(rngs.params(), shape, sparsity)
    if np.shape(mask) != shape:
        raise ValueError(f"the mask must be of the kernel's shape, {shape}, got {np.shape(mask)}")
    return mask


def _taken_over(layer: Any, mask: Any, kind: type) -> dict[str, Any]:
    """What a sparse layer is made with to have the mask and the parameters of a dense one."""
    if not isinstance(layer, kind):
        raise TypeError(f"the layer must be an nnx.{kind.__name__}, got {type(layer).__name__}")
    if isinstance(layer, nnx.Linear) and not convertible(layer):
        raise ValueError(
            "the layer multiplies by a dot_general of its own: call restore(model) first"
        )
    kernel = layer.kernel[...]
    own = getattr(layer, "mask", None)  # of a convolution
    if own is not None:
        kernel = kernel * own
    bias = None if layer.bias is None else layer.bias[...]
    return {
        "mask": kernel != 0 if mask is None else mask,
        "kernel_init": lambda *_: kernel,
        "bias_init": lambda *_: bias,
        "use_bias": bias is not None,
        "dtype": layer.dtype,
        "param_dtype": kernel.dtype,
        "rngs": nnx.Rngs(0),
    }


def _dense(sparse: SparseLayer, kind: Any, *sizes: Any, **options: Any) -> Any:
    """A dense layer with the parameters of a sparse one."""
    layer = kind(
        *sizes,
        use_bias=sparse.bias is not None,
        dtype=sparse.dtype,
        param_dtype=sparse.values.dtype,
        kernel_init=initializers.zeros_init(),
        rngs=nnx.Rngs(0),
        **options,
    )
    layer.kernel.set_value(sparse.kernel())
    if sparse.bias is not None:
        layer.bias.set_value(sparse.bias[...])
    return layer


def _promoted(layer: Any, inputs: Any) -> tuple[jax.Array, jax.Array, jax.Array | None]:
    """Inputs and parameters in the dtype of the computation, as `flax.nnx` layers have it."""
    bias = None if layer.bias is None else layer.bias[...]
    return promote_dtype((inputs, layer.values[...], bias), dtype=layer.dtype)
