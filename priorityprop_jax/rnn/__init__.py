"""Backward passes over time: exact and lean, or in rounds (Highway-BP)."""

from priorityprop_jax.rnn.fused import restore
from priorityprop_jax.rnn.highway import highway_rnn
from priorityprop_jax.rnn.lean import LinenLeanRNN, lean_rnn
from priorityprop_jax.rnn.recurrent import GRUParams, LSTMParams

__all__ = ["GRUParams", "LSTMParams", "LinenLeanRNN", "highway_rnn", "lean_rnn", "restore"]
