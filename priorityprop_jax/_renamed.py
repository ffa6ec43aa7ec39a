"""Names of the flat door before the rooms had doors of their own. They work for one release."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# What has moved: the old name, and its room and name there.
MOVED = {
    "BlockState": "partial.ActiveState",
    "HighwayReport": "highway.HighwayReport",
    "LinenLeanRNN": "rnn.LinenLeanRNN",
    "LinenMePropRNN": "meprop.LinenMePropRNN",
    "PrefixCache": "partial.PrefixCache",
    "RowSparse": "core.rows.RowSparse",
    "Situation": "partial.Situation",
    "SparseConv": "sparse.SparseConv",
    "SparseIndex": "sparse.SparseIndex",
    "SparseLinear": "sparse.SparseLinear",
    "SparsePattern": "sparse.SparsePattern",
    "Stages": "partial.Stages",
    "StepCosts": "partial.StepCosts",
    "TopKUpdatesState": "priority.top_k.TopKUpdatesState",
    "Variants": "partial.Variants",
    "WorkerLostError": "training.WorkerLostError",
    "active_sets": "partial.active_sets",
    "apply_further_mask": "sparse.apply_further_mask",
    "chain": "partial.chain",
    "choose_active": "partial.choose_active",
    "densify": "sparse.densify",
    "format_quality": "highway.format_quality",
    "function_stage": "partial.function_stage",
    "gradient_quality": "highway.gradient_quality",
    "gradient_quality_table": "highway.gradient_quality_table",
    "gradual_pruning": "sparse.gradual_pruning",
    "highway_nnx": "highway.highway_nnx",
    "highway_report": "highway.highway_report",
    "highway_rnn": "rnn.highway_rnn",
    "highway_scan": "highway.highway_scan",
    "lean_rnn": "rnn.lean_rnn",
    "magnitude_masks": "sparse.magnitude_masks",
    "make_pattern": "sparse.make_pattern",
    "make_policy": "partial.make_policy",
    "measure_costs": "partial.measure_costs",
    "meprop_conv_general_dilated": "meprop.meprop_conv_general_dilated",
    "meprop_dot_general": "meprop.meprop_dot_general",
    "meprop_value_and_grad": "meprop.value_and_grad",
    "merge_upward": "partial.merge_upward",
    "nnx_partial_value_and_grad": "partial.value_and_grad",
    "nnx_stages": "partial.nnx_stages",
    "partial_value_and_grad": "partial.value_and_grad",
    "plot_quality": "highway.plot_quality",
    "prune": "sparse.prune",
    "repeats": "priority.schedule.repeats",
    "restore": "meprop.restore",
    "row_counts": "meprop.row_counts",
    "row_sparse": "meprop.row_sparse",
    "row_sparse_adam": "meprop.row_sparse_adam",
    "scanned_stages": "partial.scanned_stages",
    "sparse_backend": "sparse.sparse_backend",
    "sparse_conv": "sparse.sparse_conv",
    "sparse_linear": "sparse.sparse_linear",
    "sparse_start": "sparse.sparse_start",
    "sparsify": "sparse.sparsify",
    "stack_params": "partial.stack_params",
    "top_k_updates": "priority.top_k.top_k_updates",
    "update_active": "partial.update_active",
}

# What is gone: the old name, and what to use instead.
GONE: dict[str, str] = {
    "Compute": "use Trainer(step=priorityprop_jax.partial.step(policy, share=...))",
    "Costs": "priorityprop_jax.partial.measure_costs(..., unit=...) gives StepCosts",
    "DynamicSparsity": "use Trainer(step=priorityprop_jax.sparse.dynamic(end))",
    "TopKCompute": "use Trainer(step=priorityprop_jax.meprop.step(share))",
    "apply_active_updates": "optax.apply_updates takes the updates of update_active",
    "apply_row_updates": "optax.apply_updates takes row-sparse updates",
    "communication": "read the text of the compiled program",
    "highway_stages": "split the batch and run an exact pipeline",
    "linen_stages": "priorityprop_jax.partial.function_stage takes the apply of a Linen module",
    "prune_unused": "train the narrower model",
    "row_sparse_sgd": "use priorityprop_jax.meprop.row_sparse(optax.sgd(...))",
}


def old_name(name: str) -> Any:
    """What a name of the old flat door stands for now.

    Raises:
      AttributeError: if it is gone, or has never been; says what to use instead.
    """
    if name in GONE:
        raise AttributeError(f"priorityprop_jax.{name} is gone: {GONE[name]}")
    if name not in MOVED:
        raise AttributeError(f"module 'priorityprop_jax' has no attribute {name!r}")
    room, _, new = MOVED[name].rpartition(".")
    warnings.warn(
        f"priorityprop_jax.{name} is now priorityprop_jax.{MOVED[name]}; "
        "the old name goes with the next release",
        DeprecationWarning,
        stacklevel=3,
    )
    return getattr(importlib.import_module(f"priorityprop_jax.{room}"), new)
