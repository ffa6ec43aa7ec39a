"""meProp: backward passes through the top-k output gradients, and updates of their rows."""

import sys
import types
import warnings
from typing import Any

from priorityprop_jax.core.row_grad import value_and_grad
from priorityprop_jax.core.row_optimizers import row_counts, row_sparse, row_sparse_adam
from priorityprop_jax.core.rows import RowSparse, clip_by_global_norm, densify, on_values
from priorityprop_jax.meprop.convolutions import meprop_conv_general_dilated
from priorityprop_jax.meprop.inject import meprop, restore
from priorityprop_jax.meprop.products import meprop_dot_general
from priorityprop_jax.meprop.step import step

__all__ = [
    "RowSparse",
    "clip_by_global_norm",
    "densify",
    "meprop",
    "meprop_conv_general_dilated",
    "meprop_dot_general",
    "on_values",
    "restore",
    "row_counts",
    "row_sparse",
    "row_sparse_adam",
    "step",
    "value_and_grad",
]


class _Room(types.ModuleType):
    """The room, still callable as the function of its name that was a flat name. One release."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        warnings.warn(
            "priorityprop_jax.meprop is now priorityprop_jax.meprop.meprop; "
            "the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return meprop(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
