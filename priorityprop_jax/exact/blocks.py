"""What the blocks of a model keep for their backward pass: products alone, or as XLA has it."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
from flax import nnx

from priorityprop_jax.core.modules import as_it_was, parts_of, walk

_PRODUCTS = (nnx.Linear, nnx.LinearGeneral, nnx.Conv, nnx.Einsum)


def blocks(model: nnx.Module) -> list[nnx.Module]:
    """Modules with several products in them that are several of a kind, or one over all layers.

    Those are in one list, tuple, dict or module, or made by `nnx.vmap`, with kernels of an axis
    more. Blocks within blocks are left out.
    """
    found: list[nnx.Module] = []

    def visit(node: Any) -> None:
        parts = [entry for _, entry in parts_of(node) if isinstance(entry, nnx.Module)]
        kinds = Counter(map(type, parts))
        for part in parts:
            products = [own for _, own in walk(part) if isinstance(own, _PRODUCTS)]
            many = kinds[type(part)] > 1 or any(map(_is_stacked, products))
            if part in found or type(part) in _PRODUCTS:
                continue
            if many and len(products) > 1 and not isinstance(part, nnx.List | nnx.Dict):
                found.append(part)
            else:
                visit(part)
        for _, entry in parts_of(node):
            if isinstance(entry, list | tuple | dict):
                visit(entry)

    visit(model)
    return found


def _is_stacked(layer: Any) -> bool:
    return type(layer) is nnx.Linear and layer.kernel.ndim > 2


def save_products(block: nnx.Module, *, in_scan: bool) -> None:
    """Has a block keep its products alone for the backward pass, which makes the rest again.

    A module becomes one of a subclass in place, so that its variables and their paths stay.
    ``in_scan``: whether it is the body of a loop, which needs no barrier between the passes.
    """
    # An assignment would be noted down as an attribute of the module's graph.
    object.__setattr__(block, "__class__", _saving(type(block), in_scan))


def restore_block(block: nnx.Module) -> bool:
    """Undoes `save_products`, in place; whether there was anything to undo."""
    return as_it_was(block, "saves_products_of")


@functools.cache
def _saving(kind: type, in_scan: bool) -> type:
    def __call__(self, *args, **kwargs):
        given, treedef = jax.tree.flatten((args, kwargs), is_leaf=_is_whole)
        traced = [x for x in given if _is_traced(x)]

        def run(self, *traced):
            values: Iterator[Any] = iter(traced)
            all_of_them = [next(values) if _is_traced(x) else x for x in given]
            args, kwargs = jax.tree.unflatten(treedef, all_of_them)
            return kind.__call__(self, *args, **kwargs)

        policy = jax.checkpoint_policies.dots_saveable
        return nnx.remat(run, policy=policy, prevent_cse=not in_scan)(self, *traced)

    names = {"__module__": kind.__module__, "__doc__": kind.__doc__, "__call__": __call__}
    return type(kind.__name__, (kind,), {**names, "saves_products_of": kind})


def _is_whole(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def _is_traced(x: Any) -> bool:
    """Whether an argument is an array or holds some; others, such as a mode, stay in Python."""
    return isinstance(x, jax.Array | np.ndarray) or _is_whole(x)
