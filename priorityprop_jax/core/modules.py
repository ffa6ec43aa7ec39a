"""Walks over the modules of a `flax.nnx` model, and tells their modes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx


class FrozenWeight(nnx.Variable):
    """A weight that is not trained. Checkpoints do not hold it: whoever made the model has it."""


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


def trainable(path: Any, variable: Any) -> bool:
    """A filter of `flax.nnx`: parameters that can be differentiated, as whole numbers cannot."""
    dtypes = (getattr(leaf, "dtype", jnp.float32) for leaf in jax.tree.leaves(variable))
    return isinstance(variable, nnx.Param) and all(jnp.issubdtype(d, jnp.inexact) for d in dtypes)


def pure_loss(
    module: nnx.Module, loss_fn: Callable[..., Any]
) -> tuple[Callable[..., tuple[Any, Any]], Any, Any]:
    """A pure ``(params, rest, batch) -> (loss, new rest)``, the parameters and the rest.

    ``loss_fn`` is ``(module, batch) -> loss`` or ``(loss, aux)``; the module is left alone.
    """
    graph = modes(module).given
    _, params, _, rest = nnx.split(module, trainable, nnx.Intermediate, ...)

    def loss(params, rest, batch):
        # A fresh tree: variables may only change at the trace level that made them.
        merged = nnx.merge(graph, params, jax.tree.map(lambda leaf: leaf, rest))
        value = first(loss_fn(merged, batch))
        nnx.pop(merged, nnx.Intermediate)
        return value, nnx.state(merged, nnx.Not(trainable))

    return loss, params, rest


def first(result: Any) -> Any:
    """The loss, without what may come along with it."""
    return result[0] if isinstance(result, tuple) else result


class Modes(NamedTuple):
    """The static graphs of a module, which its modes are a part of."""

    given: Any  # as its parts are; those of training where one is None, unset
    evaluation: Any  # all after `.eval()`
    off: bool  # whether there are modes, and all of them are those of evaluation


def modes(module: nnx.Module) -> Modes:
    """The graphs of a module in its modes; it is left alone."""
    twin = nnx.clone(module)
    nnx.pop(twin, nnx.Intermediate)  # What `sow` collects is no state: it would grow at each step.
    for _, part in walk(twin):
        for mode in ("deterministic", "use_running_average"):
            if getattr(part, mode, False) is None:
                setattr(part, mode, False)
    given = nnx.graphdef(twin)
    twin.train()
    training = nnx.graphdef(twin)
    twin.eval()
    evaluation = nnx.graphdef(twin)
    return Modes(given, evaluation, given == evaluation != training)


def as_it_was(module: nnx.Module, mark: str) -> bool:
    """Gives a module the class that its own names under a mark, in place; whether there was one."""
    plain = vars(type(module)).get(mark)
    if plain is not None:
        object.__setattr__(module, "__class__", plain)
    return plain is not None


def warn_off(what: str, stacklevel: int) -> None:
    """Warns that a whole model is given in evaluation mode, which may be a slip."""
    warnings.warn(
        f"{what} is in evaluation mode as a whole, and is trained so: dropout drops nothing, and "
        "BatchNorm keeps its statistics; call .train() before, on the model or on some parts",
        stacklevel=stacklevel,
    )


def attributes(module: nnx.Module) -> dict[str, Any]:
    """What a module and its parts consist of, by path: variables by their kinds."""
    found = {}
    for path, part in walk(module):
        for key, entry in parts_of(part):
            known = isinstance(entry, nnx.Pytree | nnx.Variable | jax.Array)
            name = "/".join(filter(None, (path, str(key))))
            found[name] = type(entry) if known else entry
    return found


def check_unchanged(module: nnx.Module, graph: Any, before: dict[str, Any], who: str) -> None:
    """Raises a ValueError if a module's graph is another one than ``before``, its `attributes`.

    Compiled steps hand on arrays alone: any other change would be lost.
    """
    if nnx.graphdef(module) == graph:
        return
    after, absent = attributes(module), object()
    names = sorted(before.keys() | after.keys())
    changed = [k for k in names if before.get(k, absent) != after.get(k, absent)]
    raise ValueError(
        f"{who} has changed the model's {', '.join(changed) or 'structure'}, which a compiled step "
        "cannot hand on, as it does with values of variables: set modes (.train(), .eval()) and "
        "make variables before the model is given, and keep counters in an nnx.Variable"
    )
