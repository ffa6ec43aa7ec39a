"""Names of the flat door before the rooms had doors of their own. They work for one release."""

from __future__ import annotations

import importlib
import warnings
from typing import Any

# What has moved under the same name: its room.
_ROOMS = {
    "core": "RowSparse",
    "highway": "HighwayReport format_quality gradient_quality gradient_quality_table "
    "highway_nnx highway_report highway_scan",
    "meprop": "meprop_conv_general_dilated meprop_dot_general restore "
    "row_counts row_sparse row_sparse_adam",
    "partial": "PrefixCache Situation Stages StepCosts chain "
    "choose_active function_stage make_policy measure_costs nnx_stages "
    "update_active",
    "priority": "TopKUpdatesState repeats top_k_updates",
    "rnn": "LinenLeanRNN highway_rnn lean_rnn",
    "sparse": "SparseConv SparseIndex SparseLinear SparsePattern apply_further_mask densify "
    "gradual_pruning magnitude_masks make_pattern prune sparse_backend sparse_conv "
    "sparse_linear sparse_start sparsify",
    "training": "WorkerLostError",
}
MOVED = {name: f"{room}.{name}" for room, names in _ROOMS.items() for name in names.split()}
# And under a new one.
MOVED |= {
    "BlockState": "partial.ActiveState",
    "meprop_value_and_grad": "meprop.value_and_grad",
    "nnx_partial_value_and_grad": "partial.value_and_grad",
    "partial_value_and_grad": "partial.value_and_grad",
}

# What is gone: the old name, and what to use instead.
GONE: dict[str, str] = {
    "Compute": "use Trainer(step=priorityprop_jax.partial.step(policy, share=...))",
    "Costs": "priorityprop_jax.partial.measure_costs(..., unit=...) gives StepCosts",
    "DynamicSparsity": "use Trainer(step=priorityprop_jax.sparse.dynamic(end))",
    "TopKCompute": "use Trainer(step=priorityprop_jax.meprop.step(share))",
    "LinenMePropRNN": "use LinenLeanRNN for Linen, or meProp in an nnx.RNN",
    "active_sets": "an active set is of the slots whose priority.repeats(...) is above 0",
    "apply_active_updates": "optax.apply_updates takes the updates of update_active",
    "apply_row_updates": "optax.apply_updates takes row-sparse updates",
    "communication": "read the text of the compiled program",
    "highway_stages": "split the batch and run an exact pipeline",
    "linen_stages": "priorityprop_jax.partial.function_stage takes the apply of a Linen module",
    "Variants": "partial.step keeps the programs of its active sets itself",
    "merge_upward": "an active set runs as it is: see max_variants of partial.step, and Stack",
    "plot_quality": "rows of gradient_quality_table have what a plot needs",
    "prune_unused": "train the narrower model",
    "scanned_stages": "use partial.Stack, or partial.stack in the place of the scan",
    "stack_params": "layers of a partial.Stack stay stacked",
    "row_sparse_sgd": "use priorityprop_jax.meprop.row_sparse(optax.sgd(...))",
}


def old_name(name: str) -> Any:
    """What a name of the old flat door stands for now; an AttributeError where it is gone."""
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
