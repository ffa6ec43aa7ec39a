"""Spend backprop where it matters: budgeted training for Flax and Optax."""

from priorityprop_jax.core.row_optimizers import (
    apply_row_updates,
    row_counts,
    row_sparse,
    row_sparse_adam,
    row_sparse_sgd,
)
from priorityprop_jax.core.rows import RowSparse
from priorityprop_jax.core.slots import Slots, find_slots
from priorityprop_jax.highway.quality import (
    format_quality,
    gradient_quality,
    gradient_quality_table,
    plot_quality,
)
from priorityprop_jax.highway.scan import (
    HighwayReport,
    highway_nnx,
    highway_report,
    highway_scan,
)
from priorityprop_jax.highway.stages import communication, highway_stages
from priorityprop_jax.meprop.grad import meprop_value_and_grad
from priorityprop_jax.meprop.inject import meprop, restore
from priorityprop_jax.meprop.products import meprop_conv_general_dilated, meprop_dot_general
from priorityprop_jax.meprop.simplify import prune_unused
from priorityprop_jax.meprop.step import TopKCompute
from priorityprop_jax.partial.costs import Costs, StepCosts, measure_costs
from priorityprop_jax.partial.grad import (
    apply_active_updates,
    nnx_partial_value_and_grad,
    partial_value_and_grad,
)
from priorityprop_jax.partial.offload import BlockState
from priorityprop_jax.partial.policies import (
    Situation,
    active_sets,
    choose_active,
    make_policy,
)
from priorityprop_jax.partial.prefix_cache import PrefixCache
from priorityprop_jax.partial.stages import (
    Stages,
    chain,
    function_stage,
    linen_stages,
    nnx_stages,
    scanned_stages,
    stack_params,
)
from priorityprop_jax.partial.step import Compute
from priorityprop_jax.partial.update import update_active
from priorityprop_jax.partial.variants import Variants, merge_upward
from priorityprop_jax.priority.allocation import allocate
from priorityprop_jax.priority.ledger import Ledger
from priorityprop_jax.priority.schedule import repeats
from priorityprop_jax.priority.top_k import TopKUpdatesState, top_k_updates
from priorityprop_jax.priority.transform import (
    PriorityPropState,
    priorityprop,
    scale_by_priority,
)
from priorityprop_jax.rnn.fused import LinenMePropRNN
from priorityprop_jax.rnn.highway import highway_rnn
from priorityprop_jax.rnn.lean import LinenLeanRNN, lean_rnn
from priorityprop_jax.sparse.backends import sparse_backend
from priorityprop_jax.sparse.functional import sparse_conv, sparse_linear
from priorityprop_jax.sparse.gradual import gradual_pruning
from priorityprop_jax.sparse.layers import SparseConv, SparseIndex, SparseLinear
from priorityprop_jax.sparse.masks import magnitude_masks
from priorityprop_jax.sparse.pattern import SparsePattern, make_pattern
from priorityprop_jax.sparse.sparsify import sparsify
from priorityprop_jax.sparse.swap import apply_further_mask, densify, prune, sparse_start
from priorityprop_jax.sparse.training import DynamicSparsity
from priorityprop_jax.training.trainer import (
    History,
    NonFiniteLossError,
    PriorityPropTrainer,
    WorkerLostError,
)

__version__ = "0.1.0"

__all__ = [
    "BlockState",
    "Compute",
    "Costs",
    "DynamicSparsity",
    "HighwayReport",
    "History",
    "Ledger",
    "LinenLeanRNN",
    "LinenMePropRNN",
    "NonFiniteLossError",
    "PrefixCache",
    "PriorityPropState",
    "PriorityPropTrainer",
    "RowSparse",
    "Situation",
    "Slots",
    "SparseConv",
    "SparseIndex",
    "SparseLinear",
    "SparsePattern",
    "Stages",
    "StepCosts",
    "TopKCompute",
    "TopKUpdatesState",
    "Variants",
    "WorkerLostError",
    "active_sets",
    "allocate",
    "apply_active_updates",
    "apply_further_mask",
    "apply_row_updates",
    "chain",
    "choose_active",
    "communication",
    "densify",
    "find_slots",
    "format_quality",
    "function_stage",
    "gradient_quality",
    "gradient_quality_table",
    "gradual_pruning",
    "highway_nnx",
    "highway_report",
    "highway_rnn",
    "highway_scan",
    "highway_stages",
    "lean_rnn",
    "linen_stages",
    "magnitude_masks",
    "make_pattern",
    "make_policy",
    "measure_costs",
    "meprop",
    "meprop_conv_general_dilated",
    "meprop_dot_general",
    "meprop_value_and_grad",
    "merge_upward",
    "nnx_partial_value_and_grad",
    "nnx_stages",
    "partial_value_and_grad",
    "plot_quality",
    "priorityprop",
    "prune",
    "prune_unused",
    "repeats",
    "restore",
    "row_counts",
    "row_sparse",
    "row_sparse_adam",
    "row_sparse_sgd",
    "scale_by_priority",
    "scanned_stages",
    "sparse_backend",
    "sparse_conv",
    "sparse_linear",
    "sparse_start",
    "sparsify",
    "stack_params",
    "top_k_updates",
    "update_active",
]
