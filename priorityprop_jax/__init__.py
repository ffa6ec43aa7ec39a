"""Spend backprop where it matters: budgeted training for Flax and Optax.

The names below are the whole of the front door; everything else is in the room of its feature, such
as `priorityprop_jax.partial`. A room is imported when it is first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from priorityprop_jax import core as core
    from priorityprop_jax import exact as exact
    from priorityprop_jax import highway as highway
    from priorityprop_jax import meprop as meprop
    from priorityprop_jax import models as models
    from priorityprop_jax import partial as partial
    from priorityprop_jax import priority as priority
    from priorityprop_jax import rnn as rnn
    from priorityprop_jax import sparse as sparse
    from priorityprop_jax import training as training
    from priorityprop_jax.core import Slots, find_slots
    from priorityprop_jax.priority import (
        Ledger,
        PriorityPropState,
        allocate,
        priorityprop,
        scale_by_priority,
    )
    from priorityprop_jax.training import (
        History,
        NonFiniteLossError,
        PriorityPropTrainer,
        Trainer,
    )

__version__ = "0.1.0"

__all__ = [
    "History",
    "Ledger",
    "NonFiniteLossError",
    "PriorityPropState",
    "PriorityPropTrainer",
    "Slots",
    "Trainer",
    "allocate",
    "find_slots",
    "priorityprop",
    "scale_by_priority",
]

_ROOMS = frozenset({
    "core", "exact", "highway", "meprop", "models", "partial", "priority", "rnn", "sparse",
    "training",
})  # fmt: skip
_ROOM_OF = {
    "Slots": "core",
    "find_slots": "core",
    "Ledger": "priority",
    "PriorityPropState": "priority",
    "allocate": "priority",
    "priorityprop": "priority",
    "scale_by_priority": "priority",
    "History": "training",
    "NonFiniteLossError": "training",
    "PriorityPropTrainer": "training",
    "Trainer": "training",
}

if not TYPE_CHECKING:  # type checkers are to see the names above, and to report all others

    def __getattr__(name: str) -> Any:
        if name in _ROOMS:
            return importlib.import_module(f"{__name__}.{name}")
        if name in _ROOM_OF:
            value = getattr(importlib.import_module(f"{__name__}.{_ROOM_OF[name]}"), name)
            globals()[name] = value
            return value
        from priorityprop_jax._renamed import old_name

        return old_name(name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_ROOMS})
