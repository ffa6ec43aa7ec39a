"""Walks over the modules of a `flax.nnx` model."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flax import nnx


def check_module(model: Any) -> None:
    """Refuses a model that is no `nnx.Module`.

    Args:
      model: anything.

    Raises:
      TypeError: if it is none.
    """
    if not isinstance(model, nnx.Module):
        raise TypeError(f"model must be a flax.nnx module, got {type(model).__name__}")


def walk(model: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """All modules of a model, each once, by path, in the order in which attributes were set.

    `flax.nnx` itself goes by the alphabet, which tells nothing of the order of layers.

    Args:
      model: a module, or a list, tuple or dict of them.
      name: what its path starts with.

    Yields:
      Paths joined by ``/`` and modules, a module before its parts.
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
    """What a part of a model is made of, by attribute, key or place, in the order of setting.

    Args:
      node: a module or another pytree of `flax.nnx`, a list, tuple or dict; anything else has none.
    """
    if isinstance(node, nnx.Variable):
        return []
    if isinstance(node, nnx.Pytree):
        return [(key, entry) for key, entry in vars(node).items() if not key.startswith("_")]
    if isinstance(node, dict):
        return list(node.items())
    return list(enumerate(node)) if isinstance(node, list | tuple) else []
