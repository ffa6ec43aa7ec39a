"""A stack of like blocks whose backward pass is as long as what is trained, in one program.

Which blocks are trained may be a traced value: the loop of the backward pass ends at the deepest of
them, and weight gradients are computed for them alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero

from priorityprop_jax.core.modules import FrozenWeight, trainable
from priorityprop_jax.core.slots import Bundle, Slots
from priorityprop_jax.core.work import Work, read_loss


class Tap(NamedTuple):
    """A stacked leaf of which some rows are differentiated, and the others are constants."""

    whole: Any  # [layers, ...]
    rows: Any  # int32[k], ascending and distinct
    part: Any  # [k, ...], what is differentiated


class _Mode(NamedTuple):
    """What a stack is to do in a trace."""

    taps: dict[int, Tap]  # what `value_and_grad` differentiates by rows, by the leaf's id
    given: set[int] | None = None  # takes the ids of leaves that a stack is given
    unrolled: bool = False  # a program whose FLOPs can be counted


_DEFAULT = _Mode({})
_MODE = contextvars.ContextVar("mode", default=_DEFAULT)


@contextlib.contextmanager
def _mode(**changes: Any) -> Iterator[None]:
    token = _MODE.set(_MODE.get()._replace(**changes))
    try:
        yield
    finally:
        _MODE.reset(token)


def tapped(taps: dict[int, Tap]) -> contextlib.AbstractContextManager[None]:
    """Within, a stack that is given one of these leaves differentiates its rows alone."""
    return _mode(taps=taps)


def unrolled() -> contextlib.AbstractContextManager[None]:
    """Within, a stack is traced layer by layer, to be counted; the rows of its taps are known."""
    return _mode(unrolled=True)


def _seen(loss: Callable[..., Any], params: Any, *args: Any) -> frozenset[int]:
    """The leaves of ``params`` that a loss gives to a stack as they are. Only shapes are read."""
    found: list[int] = []

    def traced(params: Any, *args: Any) -> None:
        with _mode(given=(given := set())):
            loss(params, *args)
        found.extend(i for i, leaf in enumerate(jax.tree.leaves(params)) if id(leaf) in given)

    jax.eval_shape(traced, params, *args)
    return frozenset(found)


def read(
    loss: Callable[..., Any], params: Any, *args: Any, slots: Slots
) -> tuple[Work, frozenset[Bundle]]:
    """`read_loss` of a loss with aux, layer by layer of its stacks; and the leaves of these."""
    own = [bundle for bundle in slots.bundles if bundle.layers and not any(bundle.axes)]
    if own:
        given = _seen(loss, params, *args)
        own = [bundle for bundle in own if given.issuperset(bundle.leaves)]
    loss, *arguments, apart = _by_slot(loss, params, args, slots, own)
    return read_loss(loss, *arguments, slots=apart, has_aux=True), frozenset(own)


def _by_slot(
    loss: Callable[..., Any], params: Any, args: Any, slots: Slots, stacks: Iterable[Bundle]
) -> tuple[Callable[..., Any], Any, Any, Slots]:
    """A loss of the layers of its stacks apart, and what else `read_loss` takes.

    It is traced layer by layer, so that the work that each of them needs is told apart.
    """
    leaves, treedef = jax.tree.flatten(params)
    stacks, first, parts = set(stacks), [], []
    apart = {leaf for bundle in stacks for leaf in bundle.leaves}
    for i, leaf in enumerate(leaves):
        first.append(sum(len(part) for part in parts))
        row = jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
        parts.append([row] * leaf.shape[0] if i in apart else [leaf])
    bundles = []
    for bundle in slots.bundles:
        places = [first[leaf] for leaf in bundle.leaves]
        if bundle not in stacks:
            bundles.append(dataclasses.replace(bundle, leaves=tuple(places)))
            continue
        for i in range(bundle.slots):
            at, axes = tuple(place + i for place in places), (None,) * len(places)
            bundles.append(Bundle(bundle.name, at, axes, None, bundle.start + i))

    def of_parts(parts: Any, args: Any) -> Any:
        whole, taps = [], {}
        for i, part in enumerate(parts):
            whole.append(jnp.stack(part) if i in apart else part[0])
            if i in apart:
                taps[id(whole[i])] = Tap(whole[i], range(len(part)), part)
        with _mode(taps=taps, unrolled=True):
            return loss(treedef.unflatten(whole), *args)

    return of_parts, parts, args, dataclasses.replace(slots, bundles=tuple(bundles))


def stack(
    block: Callable[..., Any],
    params: Any,
    x: Any,
    active: Any = None,
    *,
    per_layer: Any = None,
    has_aux: bool = False,
) -> Any:
    r"""Runs like blocks one after another; the backward pass ends at the deepest active one.

    .. math:: x_{l+1} = \operatorname{block}(\theta_l, x_l)

    It is a `jax.lax.scan` over the layers, and where every layer is active, that is what runs.
    Otherwise the gradient's loop runs from the top down to the deepest active layer (to the bottom
    where ``x`` needs a gradient), computes weight gradients of active layers only, and keeps
    nothing of those below. Which layers are active may be traced: one program serves all sets.

    Gradients are those of the scan where a layer is active, and zero elsewhere. From `jax.grad`
    they come as arrays of all layers; `value_and_grad` of this package, and so `step`, tells the
    stack itself which layers are active, and has rows of these alone. For that the loss must give
    the stack the leaves of its parameters as they are; behind others, such as copies in
    another dtype, the backward pass goes through all layers.

    Args:
      block: one layer, ``(layer_params, x) -> x``. May be a `jax.checkpoint` of one, and close over
        traced values, which get their gradients.
      params: pytree of arrays ``[layers, ...]``.
      x: pytree of arrays, what the first block is given; a block returns the like.
      active: ``bool[layers]``, or None for all, or those of `value_and_grad`.
      per_layer: pytree of arrays ``[layers, ...]``, such as keys for dropout; ``block`` gets those
        of its layer as its third argument.
      has_aux: ``block`` returns a pair, ``x`` and an output.

    Returns:
      What the last block returns; with ``has_aux`` a pair of it and the outputs ``[layers, ...]``.

    Raises:
      ValueError: if numbers of layers differ, or ``active`` is not ``bool[layers]``.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import partial
      >>> loss = lambda w, active: partial.stack(lambda w, x: w * x, w, 2.0, active)
      >>> grad_fn = jax.jit(jax.grad(loss))
      >>> grad_fn(jnp.array([3.0, 5.0, 7.0]), jnp.array([False, True, True])).tolist()
      [0.0, 42.0, 30.0]
    """
    leaves, treedef = jax.tree.flatten(params)
    extra, extra_def = jax.tree.flatten(per_layer)
    shapes = [np.shape(leaf) for leaf in (*leaves, *extra)]
    if not leaves or len({shape[:1] for shape in shapes}) != 1 or () in shapes:
        raise ValueError(
            "params and per_layer must hold arrays with the same number of layers along axis 0; "
            f"got the shapes {shapes}"
        )
    layers = shapes[0][0]
    if active is not None and (np.shape(active) != (layers,) or active.dtype != bool):
        raise ValueError(f"active must be None or bool[{layers}], one for each layer; got {active}")

    def layer(leaves: Any, extra: Any, h: Any) -> tuple[Any, Any]:
        more = () if per_layer is None else (extra_def.unflatten(extra),)
        out = block(treedef.unflatten(leaves), h, *more)
        return out if has_aux else (out, None)

    mode = _MODE.get()
    taps = [mode.taps.get(id(leaf)) for leaf in leaves]
    if mode.given is not None:
        mode.given.update(map(id, leaves))
    if mode.unrolled:
        y, outs = _layer_by_layer(layer, layers, leaves, taps, extra, x)
    elif (active is None and not any(taps)) or not layers:
        y, outs = lax.scan(lambda h, at: layer(*at, h), x, (leaves, extra))
    else:
        example = jax.tree.map(
            lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (leaves, extra)
        )
        one, consts = jax.closure_convert(layer, *example, x)
        on = np.ones(layers, bool) if active is None else active
        lowest = [_lowest(on, None if tap is None else tap.rows) for tap in taps]
        whole, parts, rows = [], [], []
        for leaf, tap in zip(leaves, taps, strict=True):
            whole.append(leaf if tap is None else tap.whole)
            parts.append(None if tap is None else tap.part)
            rows.append(None if tap is None else jnp.asarray(tap.rows))
        y, outs = _partial(one, lowest)(whole, parts, rows, jnp.asarray(on), extra, x, consts)
    return (y, outs) if has_aux else y


class Stack(nnx.Module):
    """Like modules in a row, run by `stack`; their variables are stacked, ``[layers, ...]``.

    Called as each of them is: ``stack(x, *args)``. Variables that are not trained, such as
    statistics, random streams and weights of whole numbers, are those of each layer too.

    Args:
      modules: of one type and structure, at least one, which are copied; or one whose variables are
        stacked already, as `nnx.vmap` makes it.

    Raises:
      ValueError: if there is none, or they differ in more than the values of their variables.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import partial
      >>> rngs = nnx.Rngs(0)
      >>> stack = partial.Stack([nnx.Linear(2, 2, rngs=rngs) for _ in range(3)])
      >>> stack.block.kernel.shape, stack(jnp.ones((4, 2))).shape
      ((3, 2, 2), (4, 2))
    """

    def __init__(self, modules: nnx.Module | Iterable[nnx.Module]) -> None:
        if isinstance(modules, nnx.Module):
            self.block = modules
            return
        split = [nnx.split(module) for module in modules]
        if len({graph for graph, _ in split}) != 1:
            raise ValueError(
                f"a stack needs modules that differ in the values of their variables only, got "
                f"{len(split)} with {len({graph for graph, _ in split})} structures"
            )
        stacked = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(state for _, state in split))
        self.block = nnx.merge(split[0][0], stacked)

    def __call__(self, x: Any, *args: Any, **kwargs: Any) -> Any:
        """What the last of them returns."""
        graph, params, fixed, rest = nnx.split(self.block, trainable, FrozenWeight, ...)

        def block(params: Any, x: Any, others: Any) -> Any:
            before, treedef = jax.tree.flatten(others[1])
            module = nnx.merge(graph, params, *others)
            x = module(x, *args, **kwargs)
            after, new = jax.tree.flatten(nnx.split(module, trainable, FrozenWeight, ...)[-1])
            # What is not changed is not collected; `nnx.remat` hides it from all but the type.
            same = zip(after, before, strict=True) if new == treedef else ()
            return x, new.unflatten([None if a is b else a for a, b in same] or after)

        x, new = stack(block, params, x, per_layer=(fixed, rest), has_aux=True)
        nnx.update(self.block, _merge(new, rest))
        return x


def _partial(one: Callable[..., Any], lowest_of: list[int | None]) -> Callable[..., Any]:
    """The stack with its backward pass; ``lowest_of`` each leaf, see `_lowest`.

    ``one(leaves, extra, h, *consts) -> (h, out)`` is a layer. The function is ``(whole, parts,
    rows, on, extra, x, consts) -> (y, outs)``: a leaf with a part has its gradient there, one row
    for each of its rows, another one in ``whole``, where ``on`` says so and zero elsewhere.
    """
    layout: list[Any] = []  # how the saved values of a layer make its pullback

    def plain(whole, parts, rows, on, extra, x, consts):
        del parts, rows, on
        return lax.scan(lambda h, at: one(*at, h, *consts), x, (whole, extra))

    def pullback(moved, weights, extra, h, consts):
        """One layer forward: what it returns, and what its pullback needs and is not at hand."""
        at_hand = (weights, extra, consts)
        keep, fixed = _split(at_hand, moved)

        def varied(keep, h):
            weights, extra, consts = _merge(keep, fixed)
            h, out = one(weights, extra, h, *consts)
            return (h, _only(out, True)), _only(out, False)

        (h, out), pull, other = jax.vjp(varied, keep, h, has_aux=True)
        values, treedef = jax.tree.flatten(pull)
        given = {id(leaf): i for i, leaf in enumerate(jax.tree.leaves(at_hand))}
        # Weights are not copied: those of the layer are at hand in the backward pass too.
        layout[:] = [treedef, [given.get(id(value)) for value in values]]
        return h, _merge(out, other), [v for v in values if id(v) not in given]

    def forward(*primals):
        unpacked = lambda pick: jax.tree.map(  # noqa: E731
            pick, primals, is_leaf=lambda p: isinstance(p, CustomVJPPrimal)
        )
        whole, parts, rows, on, extra, x, consts = unpacked(lambda p: p.value)
        d_whole, d_parts, _, _, d_extra, d_x, d_consts = unpacked(lambda p: p.perturbed)
        d_weights = [b if a is None else a for a, b in zip(d_parts, d_whole, strict=True)]
        moved, layers = (d_weights, d_extra, d_consts), len(on)
        trained = _trained(rows, d_weights, on)
        # Layers below the lowest whose pullback is needed run without keeping anything.
        through = any(jax.tree.leaves((d_extra, d_x, d_consts)))
        own = [at for at, d in zip(lowest_of, d_weights, strict=True) if d]
        lowest = 0 if through else min((at for at in own if at is not None), default=layers)
        if not through and None in own:
            lowest = jnp.argmax(jnp.append(trained, True)).astype(jnp.int32)
        # Nothing is kept of what is below; there is room for one layer at least.
        base = min(lowest, layers - 1) if isinstance(lowest, int) else 0

        def at(layer: Any) -> Any:
            return _row((whole, extra), layer)

        example = jax.eval_shape(functools.partial(pullback, moved), *at(0), x, consts)
        outs, saved = _empty(example[1], layers), _empty(example[2], layers - base)

        def skip(layer, carry):
            h, outs = carry
            h, out = one(*at(layer), h, *consts)
            return h, _put(outs, layer, out)

        def keep(layer, carry):
            h, outs, saved = carry
            weights, own = at(layer)
            h, out, values = pullback(moved, weights, own, h, consts)
            return h, _put(outs, layer, out), _put(saved, layer - base, values)

        h, outs = lax.fori_loop(0, lowest, skip, (x, outs)) if not through else (x, outs)
        h, outs, saved = lax.fori_loop(lowest, layers, keep, (h, outs, saved))
        static = _Static((moved, through, base, *layout))
        return (h, outs), (static, saved, whole, parts, rows, on, trained, lowest, extra, consts)

    def backward(kept, cotangents):
        static, saved, whole, parts, rows, on, trained, lowest, extra, consts = kept
        moved, through, base, treedef, given = static.value
        d_weights, d_extra, d_consts = moved
        dy, d_outs = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
        layers = len(trained)

        def pulled(layer, dh):
            at_hand = jax.tree.leaves((*_row((whole, extra), layer), consts))
            values = iter(_row(saved, layer - base))
            pull = treedef.unflatten([next(values) if i is None else at_hand[i] for i in given])
            (weights, extras, constants), dh = pull((dh, _row(_only(d_outs, True), layer)))
            return weights, extras, constants, dh

        buffers = [
            None if not d else jnp.zeros_like(a if b is None else b)
            for d, a, b in zip(d_weights, whole, parts, strict=True)
        ]
        places = [_places(r, on) for r in rows]

        def with_weights(layer, dh, buffers):
            weights, extras, constants, dh = pulled(layer, dh)
            buffers = [
                None if buffer is None else buffer.at[place[layer]].set(new, mode="drop")
                for buffer, place, new in zip(buffers, places, weights, strict=True)
            ]
            return dh, buffers, extras, constants

        def without(layer, dh, buffers):
            _, extras, constants, dh = pulled(layer, dh)
            return dh, buffers, extras, constants

        def round_(carry):
            layer, dh, buffers, extras, constants = carry
            dh, buffers, e, c = lax.cond(trained[layer], with_weights, without, layer, dh, buffers)
            return (
                layer - 1,
                dh,
                buffers,
                _put(extras, layer, e),
                jax.tree.map(jnp.add, constants, c),
            )

        zeros = lambda tree, moves: jax.tree.map(jnp.zeros_like, _split(tree, moves)[0])  # noqa: E731
        start = (jnp.int32(layers - 1), dy, buffers, zeros(extra, d_extra), zeros(consts, d_consts))
        stop = lowest if through else lowest + 1  # there the cotangent goes no further
        layer, dh, buffers, extras, constants = lax.while_loop(
            lambda c: c[0] >= stop, round_, start
        )
        if not through:
            last = lambda: with_weights(layer, dh, buffers)[1]  # noqa: E731
            buffers = lax.cond(trained[layer], last, lambda: buffers)
        separate = [part is not None for part in parts]
        in_whole = [None if s else b for s, b in zip(separate, buffers, strict=True)]
        in_parts = [b if s else None for s, b in zip(separate, buffers, strict=True)]
        return in_whole, in_parts, None, None, extras, dh if through else None, constants

    run = jax.custom_vjp(plain)
    run.defvjp(forward, backward, symbolic_zeros=True)
    return run


def _layer_by_layer(
    one: Callable[..., Any], layers: int, leaves: list[Any], taps: list[Any], extra: Any, x: Any
) -> tuple[Any, Any]:
    """The stack without a loop."""
    outs = []
    for layer in range(layers):
        weights = []
        for leaf, tap in zip(leaves, taps, strict=True):
            if tap is not None and layer in (rows := list(tap.rows)):
                weights.append(tap.part[rows.index(layer)])
            else:
                weights.append((leaf if tap is None else tap.whole)[layer])
        x, out = one(weights, jax.tree.map(lambda a, i=layer: a[i], extra), x)
        outs.append(out)
    return x, jax.tree.map(lambda *rows: jnp.stack(rows), *outs)


@jax.tree_util.register_static
class _Static:
    """What a forward pass tells the backward pass beside arrays."""

    def __init__(self, value: Any) -> None:
        self.value = value


def _split(tree: Any, flags: Any) -> tuple[Any, Any]:
    """The leaves with a true flag, and the others; None for absent."""
    return (
        jax.tree.map(lambda x, flag: x if flag else None, tree, flags),
        jax.tree.map(lambda x, flag: None if flag else x, tree, flags),
    )


def _merge(one: Any, other: Any) -> Any:
    """The inverse of `_split`."""
    return jax.tree.map(lambda a, b: b if a is None else a, one, other, is_leaf=lambda x: x is None)


def _only(tree: Any, inexact: bool) -> Any:
    """The leaves that can be differentiated, or those that can not; None for the others."""
    kind = lambda x: jnp.issubdtype(x.dtype, jnp.inexact) == inexact  # noqa: E731
    return jax.tree.map(lambda x: x if kind(x) else None, tree)


def _row(tree: Any, layer: Any) -> Any:
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, layer, 0, keepdims=False), tree)


def _put(tree: Any, layer: Any, new: Any) -> Any:
    return jax.tree.map(lambda a, b: lax.dynamic_update_index_in_dim(a, b, layer, 0), tree, new)


def _empty(tree: Any, layers: int) -> Any:
    """Buffers for what every layer makes."""
    return jax.tree.map(lambda like: lax.full((layers, *like.shape), 0, like.dtype), tree)


def _lowest(on: Any, rows: Any) -> int | None:
    """The lowest layer of a leaf that is trained, or how many there are; None if traced."""
    if isinstance(on, jax.Array) or isinstance(rows, jax.Array):
        return None
    own = np.flatnonzero(on) if rows is None else [row for row in rows if on[row]]
    return int(min(own, default=len(on)))


def _trained(rows: list[Any], moved: list[bool], on: jax.Array) -> jax.Array:
    """Which layers have weights to differentiate: ``bool[layers]``."""
    found = jnp.zeros_like(on)
    for row, d in zip(rows, moved, strict=True):
        if d:
            found |= on if row is None else jnp.zeros_like(on).at[row].set(True) & on
    return found


def _places(rows: Any, on: jax.Array) -> jax.Array:
    """Where the gradient of each layer goes among those of a leaf; out of bounds for nowhere."""
    layers, numbers = len(on), functools.partial(jnp.arange, dtype=jnp.int32)
    if rows is None:
        return jnp.where(on, numbers(layers), layers)
    place = jnp.full(layers, layers, jnp.int32).at[rows].set(numbers(len(rows)))
    return jnp.where(on, place, layers)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(x: Any) -> Any:
    if not _is_zero(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jnp.zeros(x.shape, x.dtype)
