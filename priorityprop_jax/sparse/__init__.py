"""Weights that are sparse: layers, native kernels, pruning, and places that move."""

from priorityprop_jax.sparse.backends import sparse_backend
from priorityprop_jax.sparse.functional import sparse_conv, sparse_linear
from priorityprop_jax.sparse.gradual import gradual_pruning
from priorityprop_jax.sparse.layers import SparseConv, SparseIndex, SparseLinear
from priorityprop_jax.sparse.masks import magnitude_masks
from priorityprop_jax.sparse.measure import sparsify
from priorityprop_jax.sparse.pattern import SparsePattern, make_pattern
from priorityprop_jax.sparse.pruned import sparse_from_pruned
from priorityprop_jax.sparse.step import dynamic
from priorityprop_jax.sparse.swap import apply_further_mask, densify, prune, sparse_start

__all__ = [
    "SparseConv",
    "SparseIndex",
    "SparseLinear",
    "SparsePattern",
    "apply_further_mask",
    "densify",
    "dynamic",
    "gradual_pruning",
    "magnitude_masks",
    "make_pattern",
    "prune",
    "sparse_backend",
    "sparse_conv",
    "sparse_from_pruned",
    "sparse_linear",
    "sparse_start",
    "sparsify",
]
