"""What every room needs: names of leaves, slots, rows, programs. Imports no other room."""

from priorityprop_jax.core.rows import RowSparse, densify
from priorityprop_jax.core.slots import Slots, find_slots

__all__ = ["RowSparse", "Slots", "densify", "find_slots"]
