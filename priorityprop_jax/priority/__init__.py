"""Who deserves an update. Pure Optax; knows no models."""

from priorityprop_jax.priority.allocation import allocate, repeats
from priorityprop_jax.priority.budgeted import BudgetedState, budgeted, matrix_slots
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.muon import muon, orthogonalize
from priorityprop_jax.priority.scores import Look, gain, magnitude, priority
from priorityprop_jax.priority.top_k import TopKUpdatesState, top_k_updates
from priorityprop_jax.priority.transform import (
    PriorityPropState,
    inner_state,
    priorityprop,
    scale_by_priority,
)

__all__ = [
    "BudgetedState",
    "Ledger",
    "Look",
    "PriorityPropState",
    "TopKUpdatesState",
    "allocate",
    "budgeted",
    "gain",
    "inner_state",
    "magnitude",
    "matrix_slots",
    "muon",
    "orthogonalize",
    "priority",
    "priorityprop",
    "repeats",
    "scale_by_priority",
    "top_k_updates",
]
