"""Who deserves an update. Pure Optax; knows no models."""

from priorityprop_jax.priority.allocation import allocate, repeats
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.scores import gain, magnitude, priority
from priorityprop_jax.priority.top_k import TopKUpdatesState, top_k_updates
from priorityprop_jax.priority.transform import PriorityPropState, priorityprop, scale_by_priority

__all__ = [
    "Ledger",
    "PriorityPropState",
    "TopKUpdatesState",
    "allocate",
    "gain",
    "magnitude",
    "priority",
    "priorityprop",
    "repeats",
    "scale_by_priority",
    "top_k_updates",
]
