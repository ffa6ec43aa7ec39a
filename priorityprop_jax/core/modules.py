"""Walks over the modules of a `flax.nnx` model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import jax
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


def through_module(
    transform: Callable[[Callable[..., Any]], Callable[..., Any]],
    loss_fn: Callable[[Any], Any],
    model: nnx.Module,
    *,
    has_aux: bool,
    wrt: Any,
) -> tuple[Any, Any]:
    """The value and the gradients of a loss of a module, by a transformation of pure functions.

    Args:
      transform: makes of a pure ``(params, rest) -> (loss, aux)`` the function
        ``(params, rest) -> ((loss, aux), grads)``.
      loss_fn: ``model -> loss``, or ``(loss, aux)`` with ``has_aux``.
      model: the module; what else than parameters the loss changes in it is changed.
      has_aux: as in `jax.value_and_grad`.
      wrt: filter of the variables that are parameters.

    Returns:
      What ``loss_fn`` returns, and the gradients.
    """
    graph, params, rest = nnx.split(model, wrt, ...)

    def of_params(pure_params, rest):
        # A fresh tree: variables may only change at the trace level that made them.
        merged = nnx.merge(graph, pure_params, jax.tree.map(lambda leaf: leaf, rest))
        result = loss_fn(merged)
        value, aux = result if has_aux else (result, None)
        return value, (aux, nnx.state(merged, nnx.Not(wrt)))

    (value, (aux, rest)), grads = transform(of_params)(nnx.as_pure(params), rest)
    nnx.update(model, rest)
    return ((value, aux) if has_aux else value), grads
