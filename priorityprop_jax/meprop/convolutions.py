"""meProp for convolutions: they go where Flax's layers take a ``conv_general_dilated``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax import lax

from priorityprop_jax.core.frame import LayerUse, enter
from priorityprop_jax.meprop.keep import Compute, K, MeProp, Rule, apply, at_size, pull_kept


@dataclasses.dataclass(frozen=True)
class _Convolution:
    compute: Callable[..., jax.Array]
    y_axis: int  # of the output features in the output
    kernel_axis: int  # of the output features in the kernel
    rules: tuple[Rule, ...]

    def pull(self, x: Any, kernel: Any, dy: Any, size: Any, compact: bool) -> tuple[Any, Any]:
        """See `apply`; never compact."""
        axes = self.y_axis, self.kernel_axis
        branches = [
            functools.partial(pull_kept, rule, self.compute, axes=axes) for rule in self.rules
        ]
        return at_size(size, branches, x, kernel, dy)


class MePropConv(MeProp):
    """A convolution with meProp's backward pass, made by `meprop_conv_general_dilated`."""

    def __call__(
        self,
        lhs: jax.Array,
        rhs: jax.Array,
        window_strides: Any,
        padding: Any,
        lhs_dilation: Any = None,
        rhs_dilation: Any = None,
        dimension_numbers: Any = None,
        feature_group_count: int = 1,
        batch_group_count: int = 1,
        **kwargs: Any,
    ) -> jax.Array:
        """As `jax.lax.conv_general_dilated`; ``rhs`` is the kernel."""
        numbers = lax.conv_dimension_numbers(lhs.shape, rhs.shape, dimension_numbers)
        keywords = {
            "window_strides": _hashable(window_strides),
            "padding": _hashable(padding),
            "lhs_dilation": _hashable(lhs_dilation),
            "rhs_dilation": _hashable(rhs_dilation),
            "dimension_numbers": numbers,
            "feature_group_count": feature_group_count,
            "batch_group_count": batch_group_count,
            **{name: value for name, value in kwargs.items() if value is not None},
        }
        compute = Compute(self.inner or lax.conv_general_dilated, (), tuple(keywords.items()))
        axis = numbers.rhs_spec[0]
        width = rhs.shape[axis]
        rules = self.rules(width, feature_group_count) if batch_group_count == 1 else ()
        if not rules:
            return compute(lhs, rhs)
        convolution = _Convolution(compute, numbers.out_spec[1], axis, rules)
        y = jax.eval_shape(compute, lhs, rhs)
        sizes = tuple(rule.k * rule.groups for rule in rules)
        use = LayerUse(y.size // width, rhs.size // width, width, sizes, by_rows=False)
        _, size = enter(self.name, use)
        return apply(convolution, lhs, rhs, None, size)


def _hashable(option: Any) -> Any:
    if isinstance(option, list | tuple | np.ndarray):
        return tuple(_hashable(entry) for entry in option)
    return option


def meprop_conv_general_dilated(k: K, **options: Any) -> MePropConv:
    """A `jax.lax.conv_general_dilated` whose gradient flows back through few output channels.

    As `meprop_dot_general`, with output channels for features and all positions for examples. With
    feature groups every group keeps its share of ``k``. With batch groups nothing is changed.

    Args:
      k: output channels to keep, see `meprop_dot_general`.
      **options: see there.

    Returns:
      A function with the signature of `jax.lax.conv_general_dilated`, for the argument
      ``conv_general_dilated`` of Flax's layers.

    Raises:
      TypeError, ValueError: see `meprop_dot_general`.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.meprop import meprop_conv_general_dilated
      >>> conv = nnx.Conv(3, 8, (3, 3), rngs=nnx.Rngs(0),
      ...                 conv_general_dilated=meprop_conv_general_dilated(2))
      >>> grads = nnx.grad(lambda conv: (conv(jnp.ones((1, 8, 8, 3))) ** 2).sum())(conv)
      >>> int(jnp.any(grads["kernel"][...] != 0, axis=(0, 1, 2)).sum())
      2
    """
    return MePropConv(k, **options)
