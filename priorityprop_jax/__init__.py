"""Spend backprop where it matters: budgeted training for Flax and Optax."""

from priorityprop_jax.priority.allocation import allocate
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.schedule import repeats
from priorityprop_jax.priority.slots import Slots, find_slots
from priorityprop_jax.priority.top_k import TopKUpdatesState, top_k_updates
from priorityprop_jax.priority.transform import (
    PriorityPropState,
    priorityprop,
    scale_by_priority,
)
from priorityprop_jax.training.trainer import History, NonFiniteLossError, PriorityPropTrainer

__version__ = "0.1.0"

__all__ = [
    "History",
    "Ledger",
    "NonFiniteLossError",
    "PriorityPropState",
    "PriorityPropTrainer",
    "Slots",
    "TopKUpdatesState",
    "allocate",
    "find_slots",
    "priorityprop",
    "repeats",
    "scale_by_priority",
    "top_k_updates",
]
