"""Gradients of the active slots only: what is not asked for is not computed.

XLA leaves out the dead part of a backward pass only where it is dead for every value of the
arguments, so the set of active slots is static: one compiled program for each set.
"""

from __future__ import annotations

import dataclasses
import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.rows import Held, RowSparse, are_ascending, put, take
from priorityprop_jax.core.slots import Bundle, Slots, find_slots
from priorityprop_jax.partial.stack import Tap, tapped

Names = str | Iterable[str] | Callable[[str], bool]


def choose(names: Iterable[str], which: Names, what: str = "slot") -> frozenset[str]:
    """Those of the names that are meant; ValueError where something matches none.

    ``which`` is a name; a glob, whose ``*`` and ``?`` match ``/`` too and whose brackets are
    brackets; a module or a stacked leaf, for all in it; several of these; or a predicate.
    """
    names = tuple(names)
    if callable(which):
        return frozenset(name for name in names if which(name))
    chosen, known = set(), set(names)
    for pattern in (which,) if isinstance(which, str) else which:
        glob, inside = pattern.replace("[", "[[]"), (f"{pattern}/", f"{pattern}[")
        found = (
            [pattern]
            if pattern in known
            else [
                name for name in names if fnmatch.fnmatchcase(name, glob) or name.startswith(inside)
            ]
        )
        if not found:
            close = difflib.get_close_matches(pattern, names, n=4, cutoff=0.3) or names[:4]
            raise ValueError(
                f"no {what} is called {pattern!r}, and none matches it; the closest are "
                f"{', '.join(map(repr, close)) or 'none: there are no parameters'} (layers of a "
                "stacked leaf have names of their own where stacked_axis says so)"
            )
        chosen.update(found)
    return frozenset(chosen)


def active_rows(bundle: Bundle, slots: Slots, active: Iterable[str]) -> tuple[int, ...]:
    """The active layers of a bundle, in ascending order; ``(0,)`` for one that is not stacked."""
    active = frozenset(active)
    return tuple(i for i in range(bundle.slots) if slots.names[bundle.start + i] in active)


@dataclasses.dataclass(frozen=True)
class ActiveLeaves:
    """Which leaves of a pytree, and which layers of its stacked leaves, are active.

    ``rows`` has for every leaf None (inactive), True (the whole leaf), or the active layers of a
    leaf that stacks layers on axis 0, in ascending order: a tuple, or traced.
    """

    treedef: Any
    rows: tuple[bool | tuple[int, ...] | Held | None, ...]
    good: Any = True  # or traced: whether traced layers are in order

    def part(self, tree: Any) -> Any:
        """The active leaves of a tree, ``[k, ...]`` for ``k`` layers of a stack; else None."""
        return self.map(lambda rows, x: take(x, rows) if _some(rows) else x if rows else None, tree)

    def replace(self, tree: Any, part: Any) -> Any:
        """The tree with its active leaves and layers replaced by ``part``'s."""

        def replaced(rows, x, new):
            return put(x, rows, new) if _some(rows) else new if rows else x

        return self.map(replaced, tree, part)

    def as_rows(self, tree: Any, part: Any) -> Any:
        """The part, with layers of a stacked leaf as a `RowSparse` that says which they are.

        NaN where they turn out not to be in order.
        """

        def marked(rows, x, own):
            if self.good is not True and own is not None:
                own = jnp.where(self.good, own, jnp.nan)
            return RowSparse(rows, own, x.shape) if _some(rows) else own

        return self.map(marked, tree, part)

    def split(self, tree: Any) -> tuple[list[Any], list[Any]]:
        """The leaves of a tree with anything active, and the others."""
        pairs = list(zip(self.rows, jax.tree.leaves(tree), strict=True))
        return [x for rows, x in pairs if rows is not None], [
            x for rows, x in pairs if rows is None
        ]

    def join(self, active: list[Any], other: list[Any]) -> Any:
        """The inverse of `split`."""
        mine, theirs = iter(active), iter(other)
        return self.treedef.unflatten(next(theirs if r is None else mine) for r in self.rows)

    def taps(self, tree: Any, part: Any, mixed: Any) -> dict[int, Tap]:
        """For a `stack`: the leaves of ``mixed`` of which some layers are active, by their id."""
        found = {}

        def note(rows, x, own, new):
            if _some(rows):
                found[id(new)] = Tap(x, rows.array if isinstance(rows, Held) else rows, own)

        self.map(note, tree, part, mixed)
        return found

    def map(self, function: Callable[..., Any], *trees: Any) -> Any:
        """Maps ``(rows, leaf of each tree)`` to a tree; None counts as a leaf."""
        leaves = (self.treedef.flatten_up_to(tree) for tree in trees)
        return self.treedef.unflatten(map(function, self.rows, *leaves))


def _some(rows: Any) -> bool:
    """Whether some layers of a leaf are active, one by one."""
    return isinstance(rows, tuple | Held)


def find_active(
    params: Any,
    slots: Slots,
    active: Names,
    rows: Mapping[int, Any] | None = None,
    good: Any = True,
) -> ActiveLeaves:
    """The leaves, and layers of stacked leaves, that active slots stand for.

    ``rows`` are traced layers ``int32[k]`` beside these, by the first slot of a stack, ascending
    and distinct if ``good``. Of ``params`` only shapes are read. Raises a ValueError if there is no
    slot of a name, if the slots are of other parameters, or for single layers of a stack on another
    axis than 0.
    """
    active, traced = choose(slots.names, active), {at: Held(r) for at, r in (rows or {}).items()}
    paths, treedef = jax.tree_util.tree_flatten_with_path(params)
    for bundle in slots.bundles:
        mark = "" if bundle.layers is None else "[0]"
        for leaf, name in zip(bundle.leaves, slots.leaf_names[bundle.start], strict=False):
            if leaf >= len(paths) or path_name(paths[leaf][0]) + mark != name:
                raise ValueError(
                    f"the slots have a leaf {name!r}, but the parameters have none of that name in "
                    "its place; give the slots that find_slots finds in them"
                )
    found: list[bool | tuple[int, ...] | Held | None] = [None] * treedef.num_leaves
    for bundle in slots.bundles:
        own = traced.get(bundle.start) or active_rows(bundle, slots, active)
        if own and len(own) < bundle.slots:
            check_axis(bundle)
        for leaf in bundle.leaves if own else ():
            found[leaf] = True if len(own) == bundle.slots else own
    return ActiveLeaves(treedef, tuple(found), good)


def _told(slots: Slots, active: Names | Mapping[str, Any]) -> tuple[Names, dict[int, Any], Any]:
    """Active slots; layers told by number, by the first slot of a stack; if all is in order."""
    if not isinstance(active, Mapping):
        return active, {}, True
    static, traced, good = set(), {}, True
    for which, rows in active.items():
        names = choose(slots.names, which)
        if rows is True:
            static |= names
            continue
        if not jnp.issubdtype(getattr(rows, "dtype", bool), jnp.integer) or jnp.ndim(rows) != 1:
            raise TypeError(f"{which!r} must be True or an int32[k] of layers, got {rows!r}")
        for bundle in slots.bundles:
            mine = {slots.names[bundle.start + i] for i in range(bundle.slots)} & names
            if mine and (bundle.layers is None or len(mine) < bundle.slots):
                raise ValueError(
                    f"{which!r} is given layers by number, but {bundle.name!r} is not stacked, or "
                    "only partly meant: say stacked_axis, and name the whole stack"
                )
            if mine:
                traced[bundle.start] = rows
                good &= are_ascending(rows, bundle.slots, padding=False)
    return static, traced, good


def check_axis(bundle: Bundle) -> None:
    """Raises where layers of a bundle cannot be active one by one."""
    if any(bundle.axes):
        raise ValueError(
            f"{bundle.name!r} is stacked on axis {max(axis or 0 for axis in bundle.axes)}; layers "
            "can be active one by one where they are stacked on axis 0"
        )


def value_and_grad_of(
    loss_fn: Callable[..., Any], chosen: ActiveLeaves, *, has_aux: bool = False
) -> Callable[..., tuple[Any, Any]]:
    """`value_and_grad` of a pytree whose active leaves have been looked up already."""

    def value_and_grad(params, *args, **kwargs):
        def of_part(part):
            mixed = chosen.replace(params, part)
            with tapped(chosen.taps(params, part, mixed)):
                return loss_fn(mixed, *args, **kwargs)

        value, part = jax.value_and_grad(of_part, has_aux=has_aux)(chosen.part(params))
        return value, chosen.as_rows(params, part)

    return value_and_grad


def value_and_grad(
    loss_fn: Callable[..., Any],
    active: Names | Mapping[str, Any],
    *,
    has_aux: bool = False,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
    wrt: Any = nnx.Param,
) -> Callable[..., tuple[Any, Any]]:
    r"""`jax.value_and_grad` and `flax.nnx.value_and_grad` for the active slots only.

    The loss is the same function of all parameters,

    .. math:: g_i = \partial L(\theta) / \partial \theta_i \quad \text{for active } i,

    but what is inactive enters it as a constant, so that XLA has neither its weight gradients nor
    the part of the chain that only they need to compute. Over layers of a stacked leaf in a
    `jax.lax.scan`, or picked from it one by one, the chain and weight gradients are those of all;
    in a `stack` they stop at the deepest active one.

    The gradients go into `update_active` or `freeze`, also through `flax.nnx.Optimizer.update` and
    Linen's ``TrainState.apply_gradients``.

    Args:
      loss_fn: ``(params, *args, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux``. The first
        argument is a pytree of parameters or an `nnx.Module`.
      active: names of slots, ``"encoder/0/kernel"``, or ``"blocks/kernel[3]"`` for layer 3 of a
        stack; names of modules; globs such as ``"head/*"``, whose ``*`` matches ``/`` too; or a
        predicate of a slot's name. Static. Or a dict from names, globs or modules to True, or to
        the layers of a stack that are active, ``int32[k]``, ascending and distinct, which may be
        traced: with `stack` in the loss they share one program. Traced layers that repeat or are
        out of order have gradients of NaN.
      has_aux: as in `jax.value_and_grad`.
      stacked_axis: see `find_slots`.
      group: see `find_slots`.
      wrt: of a module, the filter of the variables that are parameters.

    Returns:
      A function ``(params, *args, **kwargs) -> (value, grads)``. The value is what ``loss_fn``
      returns, ``aux`` included. For a pytree, ``grads`` has its structure, None where inactive. For
      a module it is the `nnx.State` that `nnx.value_and_grad` returns, without inactive variables;
      what else the loss changes in the module is changed. Where some layers of a stacked leaf are
      active, its gradient is a `RowSparse` of these.

    Raises:
      TypeError: if ``loss_fn`` is no function.
      ValueError: when called, if a name or a glob means no slot, or layers that are known repeat or
        are out of order.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import partial
      >>> params = {"Dense_0": jnp.ones((2, 2)), "Dense_1": jnp.ones(2)}
      >>> loss_fn = lambda p, x: jnp.sum(x @ p["Dense_0"] @ p["Dense_1"])
      >>> value, grads = partial.value_and_grad(loss_fn, {"Dense_1"})(params, jnp.ones(2))
      >>> float(value), grads["Dense_0"], grads["Dense_1"].tolist()
      (4.0, None, [2.0, 2.0])

      >>> model = nnx.Linear(2, 1, rngs=nnx.Rngs(0))
      >>> grad_fn = partial.value_and_grad(lambda model, x: model(x).sum(), "bias")
      >>> value, grads = grad_fn(model, jnp.ones((3, 2)))
      >>> list(grads), grads["bias"][...].tolist()
      (['bias'], [3.0])
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")

    def looked_up(params):
        slots = find_slots(params, stacked_axis=stacked_axis, group=group)
        return find_active(params, slots, *_told(slots, active))

    def value_and_grad(params, *args, **kwargs):
        if isinstance(params, nnx.Module):
            return _of_module(loss_fn, looked_up, params, args, kwargs, has_aux, wrt)
        of_pytree = value_and_grad_of(loss_fn, looked_up(params), has_aux=has_aux)
        return of_pytree(params, *args, **kwargs)

    return value_and_grad


def _of_module(
    loss_fn: Any, looked_up: Any, model: Any, args: Any, kwargs: Any, has_aux: bool, wrt: Any
) -> tuple[Any, Any]:
    state = nnx.state(model, wrt)
    params = nnx.as_pure(state)
    chosen = looked_up(params)

    # What `flax.nnx` does for whole variables, it does here for a part put into them, so that
    # whatever the loss changes in the module (statistics, random numbers, modes) comes out.
    def of_part(part, model, args, kwargs):
        before = nnx.as_pure(nnx.state(model, wrt))
        mixed = chosen.replace(before, part)
        nnx.update(model, mixed)
        with tapped(chosen.taps(before, part, mixed)):
            result = loss_fn(model, *args, **kwargs)
        after = nnx.as_pure(nnx.state(model, wrt))
        unchanged = lambda old, put, new: old if new is put else new  # noqa: E731
        nnx.update(model, jax.tree.map(unchanged, before, mixed, after))
        return result

    grad_fn = nnx.value_and_grad(of_part, has_aux=has_aux)
    value, part = grad_fn(chosen.part(params), model, args, kwargs)
    rows = chosen.as_rows(params, part)
    is_variable = lambda x: isinstance(x, nnx.Variable)  # noqa: E731
    grads = jax.tree.map(lambda v, grad: v.replace(grad), state, rows, is_leaf=is_variable)
    present = [(path, grad) for path, grad in nnx.to_flat_state(grads) if jax.tree.leaves(grad)]
    return value, nnx.from_flat_state(present)
