"""A stack of like blocks whose backward pass is as long as what is trained, in one program.

Which blocks are trained may be a traced value: the loop of the backward pass ends at the deepest of
them, and weight gradients are computed for them alone.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero


class Tap(NamedTuple):
    """A stacked leaf of which some rows are differentiated, and the others are constants."""

    whole: Any  # [layers, ...]
    rows: Any  # int32[k], ascending and distinct
    part: Any  # [k, ...], what is differentiated


# What `value_and_grad` differentiates by rows, by the id of the leaf that the loss is given.
_TAPS: contextvars.ContextVar[dict[int, Tap] | None] = contextvars.ContextVar("taps", default=None)


@contextlib.contextmanager
def tapped(taps: dict[int, Tap]) -> Iterator[None]:
    """Within, a stack that is given one of these leaves differentiates its rows alone."""
    token = _TAPS.set(taps)
    try:
        yield
    finally:
        _TAPS.reset(token)


def stack(
    block: Callable[..., Any],
    params: Any,
    x: Any,
    active: Any = None,
    *,
    per_layer: Any = None,
    has_aux: bool = False,
) -> Any:
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

    def one(leaves: Any, extra: Any, h: Any) -> tuple[Any, Any]:
        more = () if per_layer is None else (extra_def.unflatten(extra),)
        out = block(treedef.unflatten(leaves), h, *more)
        return out if has_aux else (out, None)

    taps = [(_TAPS.get() or {}).get(id(leaf)) for leaf in leaves]
    if active is None and not any(taps) or not layers:
        y, outs = lax.scan(lambda h, at: one(*at, h), x, (leaves, extra))
    else:
        example = jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape[1:], a.dtype), (leaves, extra))
        one, consts = jax.closure_convert(one, *example, x)
        on = jnp.ones(layers, bool) if active is None else jnp.asarray(active)
        whole, parts, rows = [], [], []
        for leaf, tap in zip(leaves, taps, strict=True):
            whole.append(leaf if tap is None else tap.whole)
            parts.append(None if tap is None else tap.part)
            rows.append(None if tap is None else tap.rows)
        y, outs = _partial(one)(whole, parts, rows, on, extra, x, consts)
    return (y, outs) if has_aux else y


def _partial(one: Callable[..., tuple[Any, Any]]) -> Callable[..., tuple[Any, Any]]:
    """The stack with its backward pass.

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
        lowest = 0 if through else jnp.argmax(jnp.append(trained, True))
        at = lambda layer: _row((whole, extra), layer)  # noqa: E731

        example = jax.eval_shape(functools.partial(pullback, moved), *at(0), x, consts)
        outs, saved = (_empty(tree, layers) for tree in example[1:])

        def skip(layer, carry):
            h, outs = carry
            h, out = one(*at(layer), h, *consts)
            return h, _put(outs, layer, out)

        def keep(layer, carry):
            h, outs, saved = carry
            h, out, values = pullback(moved, *at(layer), h, consts)
            return h, _put(outs, layer, out), _put(saved, layer, values)

        h, outs = lax.fori_loop(0, lowest, skip, (x, outs)) if not through else (x, outs)
        h, outs, saved = lax.fori_loop(lowest, layers, keep, (h, outs, saved))
        static = _Static((moved, through, *layout))
        return (h, outs), (static, saved, whole, parts, rows, on, trained, lowest, extra, consts)

    def backward(kept, cotangents):
        static, saved, whole, parts, rows, on, trained, lowest, extra, consts = kept
        moved, through, treedef, given = static.value
        d_weights, d_extra, d_consts = moved
        dy, d_outs = jax.tree.map(_instantiated, cotangents, is_leaf=_is_zero)
        layers = len(trained)

        def pulled(layer, dh):
            at_hand = jax.tree.leaves((*_row((whole, extra), layer), consts))
            values = iter(_row(saved, layer))
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
            return layer - 1, dh, buffers, _put(extras, layer, e), jax.tree.map(jnp.add, constants, c)

        zeros = lambda tree, moves: jax.tree.map(jnp.zeros_like, _split(tree, moves)[0])  # noqa: E731
        start = (jnp.int32(layers - 1), dy, buffers, zeros(extra, d_extra), zeros(consts, d_consts))
        stop = lowest if through else lowest + 1  # there the cotangent goes no further
        layer, dh, buffers, extras, constants = lax.while_loop(lambda c: c[0] >= stop, round_, start)
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

    def empty(like: Any) -> jax.Array:
        shape = (layers, *like.shape)
        if jnp.issubdtype(like.dtype, jax.dtypes.prng_key):
            key = jax.random.key(0, impl=jax.random.key_impl(like))
            return jnp.broadcast_to(key, shape)
        return jnp.zeros(shape, like.dtype)

    return jax.tree.map(empty, tree)


def _trained(rows: list[Any], moved: list[bool], on: jax.Array) -> jax.Array:
    """Which layers have weights to differentiate: ``bool[layers]``."""
    found = jnp.zeros_like(on)
    for row, d in zip(rows, moved, strict=True):
        if d:
            found |= on if row is None else jnp.zeros_like(on).at[row].set(True) & on
    return found


def _places(rows: Any, on: jax.Array) -> jax.Array:
    """Where the gradient of each layer goes among those of a leaf; out of bounds for nowhere."""
    layers = len(on)
    if rows is None:
        return jnp.where(on, jnp.arange(layers), layers)
    place = jnp.full(layers, layers).at[rows].set(jnp.arange(len(rows)))
    return jnp.where(on, place, layers)


def _is_zero(x: Any) -> bool:
    return isinstance(x, SymbolicZero)


def _instantiated(x: Any) -> Any:
    if not _is_zero(x) or not jnp.issubdtype(x.dtype, jnp.inexact):
        return x
    return jnp.zeros(x.shape, x.dtype)
