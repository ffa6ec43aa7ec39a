"""The training loop around any step: history, checkpoints, interrupts, several processes."""

from priorityprop_jax.training.buckets import bucket_lengths, buckets, packed
from priorityprop_jax.training.history import History, NonFiniteLossError
from priorityprop_jax.training.loader import ArrayLoader
from priorityprop_jax.training.model import as_model
from priorityprop_jax.training.priorityprop import PriorityPropTrainer
from priorityprop_jax.training.processes import WorkerLostError
from priorityprop_jax.training.step import MakeStep, Model, Setup, Step
from priorityprop_jax.training.trainer import Trainer

__all__ = [
    "ArrayLoader",
    "History",
    "MakeStep",
    "Model",
    "NonFiniteLossError",
    "PriorityPropTrainer",
    "Setup",
    "Step",
    "Trainer",
    "WorkerLostError",
    "as_model",
    "bucket_lengths",
    "buckets",
    "packed",
]
