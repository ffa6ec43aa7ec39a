"""Top-k of output gradients."""

import sys
import types
import warnings
from typing import Any


class _Room(types.ModuleType):
    """The room, still callable as the function of its name that was a flat name. One release."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        from priorityprop_jax.meprop.inject import meprop

        warnings.warn(
            "priorityprop_jax.meprop is now priorityprop_jax.meprop.meprop; "
            "the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return meprop(*args, **kwargs)


sys.modules[__name__].__class__ = _Room
