"""Gradients as the backward pass makes them: a few rows, never a whole array of zeros."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from priorityprop_jax.core.fragile import is_cast, is_stop, name_of, vary, varying
from priorityprop_jax.core.frame import Call, Frame, LayerUse, Tap
from priorityprop_jax.core.rows import RowSparse, summed
from priorityprop_jax.core.walk import is_var, needed_by

_MARK = "row tap of "


def value_and_grad(
    loss_fn: Callable[..., Any], *, has_aux: bool = False, wrt: Any = nnx.Param
) -> Callable[..., tuple[Any, Any]]:
    r"""`nnx.value_and_grad` or `jax.value_and_grad`, with gradients as rows where few exist.

    The gradient of a kernel ``(out, in)`` behind a `meprop` layer has ``k`` rows that are not zero,
    and that of the table of an embedding after `priorityprop_jax.exact.embed_rows` those of its
    ids ``t``,

    .. math:: dW_{K,:} = dy_{:,K}^\top x, \qquad dE_{i,:} = \sum_{n : t_n = i} dy_n,

    and is returned as `RowSparse`: the rows' numbers and values, which `row_sparse_adam` and
    `optax.apply_updates` take. All other gradients are arrays. So is that of a kernel that is used
    twice, or otherwise than by its layer (in a penalty on weights, say), whose layer runs inside
    `jax.lax.scan`, `jax.checkpoint` or a function jitted by itself, or whose pattern is
    ``"example"``; and that of a table that is read otherwise than by look-ups, such as one tied to
    the output layer, inside such a function, or by shards, of which the first time warns. `densify`
    makes every gradient an array.

    The loss is traced twice: once abstractly, to see which layer is called how.

    Args:
      loss_fn: ``(model, *args, **kwargs) -> loss``, or ``(loss, aux)`` with ``has_aux``.
      has_aux: as in `jax.value_and_grad`.
      wrt: filter of the variables of an `nnx` module that are parameters.

    Returns:
      A function ``(model, *args, **kwargs) -> (value, grads)``. The model is an `nnx` module, or a
      pytree of parameters, whose `meprop_dot_general` needs a ``name`` for this. For a module all
      is as with `nnx.value_and_grad`.

    Raises:
      TypeError: if ``loss_fn`` is no function.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import meprop
      >>> model = nnx.Sequential(nnx.Linear(4, 32, rngs=nnx.Rngs(0)))
      >>> meprop.meprop(model, 3, layers=nnx.Linear)
      1
      >>> optimizer = nnx.Optimizer(model, meprop.row_sparse_adam(1e-3), wrt=nnx.Param)
      >>> loss_fn = lambda model, x: (model(x) ** 2).sum()
      >>> value, grads = meprop.value_and_grad(loss_fn)(model, jnp.ones((5, 4)))
      >>> grads["layers"][0]["kernel"].values.shape
      (3, 4)
      >>> updates = optimizer.update(model, grads)
    """
    if not callable(loss_fn):
        raise TypeError(f"loss_fn must be a function, got {loss_fn!r}")

    @functools.wraps(loss_fn)
    def run(model, *args, **kwargs):
        if isinstance(model, nnx.Module):
            return _of_module(loss_fn, model, args, kwargs, has_aux, wrt)
        return row_value_and_grad(loss_fn, model, *args, has_aux=has_aux, **kwargs)

    return run


def _of_module(
    loss_fn: Callable[..., Any], model: nnx.Module, args: Any, kwargs: Any, has_aux: bool, wrt: Any
) -> tuple[Any, Any]:
    leaves, tree = jax.tree.flatten((args, kwargs), is_leaf=_is_object)
    # In one graph, as the model may share random streams with the arguments.
    objects = [model, *filter(_is_object, leaves)]
    chosen = nnx.filterlib.to_predicate(wrt)
    trained = lambda path, x: path[0] == 0 and chosen(path[1:], x)  # noqa: E731
    graph, params, rest = nnx.split(objects, trained, ...)
    params = params[0] if params else nnx.State({})

    def loss(pure, rest):
        # A fresh tree: variables may only change at the trace level that made them.
        rest = jax.tree.map(lambda leaf: leaf, rest)
        merged = nnx.merge(graph, nnx.State({0: pure} if pure else {}), rest)
        others = iter(merged[1:])
        inside = [next(others) if _is_object(x) else x for x in leaves]
        args, kwargs = tree.unflatten(inside)
        result = loss_fn(merged[0], *args, **kwargs)
        value, aux = result if has_aux else (result, None)
        return value, (aux, nnx.state(merged, nnx.Not(trained)))

    (value, (aux, rest)), grads = row_value_and_grad(loss, nnx.as_pure(params), rest, has_aux=True)
    nnx.update(objects, rest)
    grads = jax.tree.map(
        lambda x, g: x.replace(g), params, grads, is_leaf=lambda x: isinstance(x, nnx.Variable)
    )
    return ((value, aux) if has_aux else value), grads


def _is_object(x: Any) -> bool:
    return isinstance(x, nnx.Pytree | nnx.Variable)


def row_value_and_grad(
    loss_fn: Callable[..., Any],
    params: Any,
    *args: Any,
    has_aux: bool = False,
    sizes: Mapping[str, jax.Array] | None = None,
    look_ups: bool = True,
    **kwargs: Any,
) -> tuple[Any, Any]:
    """`value_and_grad` for a pure function of a pytree of parameters.

    ``sizes`` says by layer name which of its compiled sizes a layer uses, int32[], or the largest;
    ``look_ups`` whether gradients of embeddings may be rows too.
    """

    def loss(params):
        return loss_fn(params, *args, **kwargs)

    leaves, treedef = jax.tree.flatten(params)
    # A tap takes the gradient of a leaf that nothing else depends on.
    tapped = _tappable(loss, params, look_ups)
    taps = {call: _tap(k, leaves[i]) for i, calls in tapped.items() for call, k in calls}

    def of_parts(parts, taps):
        parts = iter(parts)
        mixed = [leaf if i in tapped else next(parts) for i, leaf in enumerate(leaves)]
        with Frame(taps, sizes, look_ups)():
            return loss(treedef.unflatten(mixed))

    parts = [leaf for i, leaf in enumerate(leaves) if i not in tapped]
    value, (part_grads, tap_grads) = jax.value_and_grad(of_parts, (0, 1), has_aux=has_aux)(
        parts, taps
    )
    part_grads = iter(part_grads)
    grads = [
        _rows({call: tap_grads[call] for call, _ in tapped[i]}, leaf)
        if i in tapped
        else next(part_grads)
        for i, leaf in enumerate(leaves)
    ]
    return value, treedef.unflatten(grads)


def find_uses(loss_fn: Callable[..., Any], params: Any, *args: Any) -> dict[str, LayerUse]:
    """How a pure loss uses its meProp layers that have a name, found by tracing it abstractly."""
    frame = Frame()

    def traced(params, *args):
        with frame():
            return loss_fn(params, *args)

    jax.eval_shape(traced, params, *args)
    return frame.uses


class _Probe(Frame):
    """Gives taps that can be found again in the program that is traced."""

    def __init__(self, look_ups: bool) -> None:
        super().__init__(look_ups=look_ups)
        self.tapped: list[tuple[Call, LayerUse]] = []  # by mark

    def tap(self, call: Call, use: LayerUse) -> Tap | None:
        """See `Frame`."""
        if not use.by_rows:
            self.indirect += [] if call[0] else [use]
            return None
        k, mark = use.sizes[-1], f"{_MARK}{len(self.tapped)}"
        self.tapped.append((call, use))
        return Tap(checkpoint_name(jnp.zeros((k, use.inputs)), mark), jnp.zeros(k))


def _tappable(
    loss: Callable[..., Any], params: Any, look_ups: bool
) -> dict[int, list[tuple[Call, int]]]:
    """Leaves of which taps bring the whole gradient, by place: the calls, their largest sizes.

    They are kernels that one call of a layer alone depends on, and tables that are looked up alone.
    What the layer multiplies by must be the leaf itself, at most in another precision: what is
    computed from it, or stopped on the way, has another gradient than the tap brings.
    """
    probe = _Probe(look_ups)

    def traced(params):
        with probe():
            return loss(params)

    jaxpr = jax.make_jaxpr(traced)(params).jaxpr
    marks: dict[Any, int] = {}  # by variable of the tap
    leaf = {var: i for i, var in enumerate(jaxpr.invars)}  # that a variable is, but for precision
    found: list[tuple[int, int]] = []  # place of the kernel, mark of its tap
    others: set[int] = set()  # that something else depends on
    floating = lambda x: jnp.issubdtype(x.aval.dtype, jnp.floating)  # noqa: E731
    for eqn in needed_by(jaxpr, 1)[0]:
        operands: list[Any] = [x if is_var(x) else None for x in eqn.invars]
        out = eqn.outvars[0]
        if (mark := name_of(eqn)) is not None and mark.startswith(_MARK):
            marks[out] = int(mark.removeprefix(_MARK))
        elif is_cast(eqn) and operands[0] in marks:
            marks[out] = marks[operands[0]]
        elif is_cast(eqn) and operands[0] in leaf and floating(out):
            leaf[out] = leaf[operands[0]]
        elif not is_stop(eqn):
            for at, x in enumerate(operands):
                if x in marks and operands[at - 1] in leaf:  # the kernel, then its tap
                    found.append((leaf[operands[at - 1]], marks[x]))
                    operands[at - 1] = None
            others.update(leaf[x] for x in operands if x in leaf)
    others.update(leaf[x] for x in jaxpr.outvars[:1] if x in leaf)
    alone: dict[int, list[tuple[Call, int]]] = {}
    whole = list(probe.indirect)
    for place in dict.fromkeys(place for place, _ in found):
        own = [probe.tapped[mark] for at, mark in found if at == place]
        looked_up = not any(name for (name, _), _ in own)
        if place not in others and (looked_up or len(own) == 1):
            alone[place] = [(call, use.sizes[-1]) for call, use in own]
        else:
            whole += [use for (name, _), use in own if not name]
    for use in whole:
        _warn_whole((use.outputs, use.inputs))
    return alone


@functools.cache  # once
def _warn_whole(shape: tuple[int, int]) -> None:
    warnings.warn(
        f"the gradient of an embedding of shape {shape} is a whole array, not rows: its table is "
        "read otherwise than by look-ups too, as one tied to the output layer is, looked up inside "
        "of a scan, a checkpoint or a jitted function, or shared by shards of a mesh",
        stacklevel=2,
    )


def _tap(k: int, kernel: jax.Array) -> Tap:
    """Zeros, which differ between the shards of a `jax.shard_map` where the kernel does."""
    zeros = Tap(jnp.zeros((k, kernel.shape[1]), kernel.dtype), jnp.zeros(k, jnp.float32))
    return jax.tree.map(lambda x: vary(x, varying(kernel)), zeros)


def _rows(taps: Mapping[Call, Tap], leaf: jax.Array) -> RowSparse:
    rows = jnp.concatenate([tap.rows for tap in taps.values()]).astype(jnp.int32) - 1
    values = jnp.concatenate([tap.values for tap in taps.values()]).astype(leaf.dtype)
    padding = leaf.shape[0] + jnp.arange(len(rows), dtype=rows.dtype)
    # Where no gradient came back to the layer, all rows are padding.
    rows = jnp.where(rows < 0, padding, rows)
    if any(name for name, _ in taps):
        return RowSparse.of_sorted(rows, values, leaf.shape)
    return summed(rows, values, leaf.shape)
