"""Walks over the modules of a `flax.nnx` model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx


def check_module(model: Any) -> None:
    """Raises a TypeError for a model that is no `nnx.Module`."""
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx module, got {type(model).__name__}")


def walk(model: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All modules of a model, each once, by path: a module, then its parts as they were set.

    `flax.nnx` itself goes by the alphabet, which tells nothing of the order of layers.
    """
    seen: set[int] = set()

    def visit(node: Any, path: tuple[str, ...]) -> Iterator[tuple[str, Any]]:
        if id(node) in seen:
            return
        if isinstance(node, nnx.Pytree) and not isinstance(node, nnx.Variable):
            seen.add(id(node))
            if isinstance(node, nnx.Module):
                yield "/".join(path), node
        for key, entry in parts_of(node):
            yield from visit(entry, (*path, str(key)))

    yield from visit(model, (name,) if name else ())


def parts_of(node: Any) -> list[tuple[Any, Any]]:
    """What a module, list, tuple or dict is made of, by attribute, key or place, as it was set."""
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        return [(key, entry) for key, entry in vars(node).items() if not key.startswith("_")]
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else []
