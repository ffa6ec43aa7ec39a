"""Puts cheaper backward passes into an existing `flax.nnx` model, and takes them out again."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.modules import check_module, walk
from priorityprop_jax.core.selection import Pattern
from priorityprop_jax.meprop.convolutions import MePropConv
from priorityprop_jax.meprop.keep import K, MeProp
from priorityprop_jax.meprop.products import MePropDot, MePropEinsum
from priorityprop_jax.meprop.rnn import swap_rnn
from priorityprop_jax.rnn.fused import is_fusible, restore_rnn

# Where a layer keeps the function that multiplies, and what to put there.
_PLACES: tuple[tuple[type, str, type[MeProp]], ...] = (
    (nnx.Linear, "dot_general", MePropDot),
    (nnx.LinearGeneral, "dot_general", MePropDot),
    (nnx.Conv, "conv_general_dilated", MePropConv),
    (nnx.Einsum, "einsum_op", MePropEinsum),
)


def meprop(
    model: nnx.Module,
    k: K,
    *,
    layers: Any = None,
    pattern: Pattern = "unified",
    tile: int = 16,
    seed: int = 0,
    transpose: bool = True,
) -> int:
    """Gives the layers of an existing model meProp's backward pass, in place.

    `nnx.Linear`, `nnx.LinearGeneral` (so attention's projections), `nnx.Conv` and `nnx.Einsum` get
    `meprop_dot_general` and its kin; `nnx.RNN` with an LSTM or GRU cell gets one backward pass over
    the whole sequence, where ``k`` counts the features of each gate. Call it before the optimizer
    is made, as the shapes of kernels change: those of `nnx.Linear` and `nnx.LinearGeneral` are from
    here on stored ``(out, in)``, the layout in which the kept rows lie together. A product in that
    layout may round otherwise; ``transpose=False`` keeps values to the bit. `restore` undoes it.

    Args:
      model: the module; changed in place.
      k: see `meprop_dot_general`. A tuple of sizes is for a budget to choose from.
      layers: which layers: a filter of `flax.nnx` for the modules, such as ``nnx.Linear``,
        ``nnx.PathContains("mlp")`` or ``lambda path, layer: ...``. By default all but the output
        layer, which is taken to be the last in the order in which attributes were set (`nnx.jit`,
        `nnx.clone` and `nnx.merge` put them in that of the alphabet: name the layers after those).
      pattern: see `meprop_dot_general`, as for the two that follow. Recurrent layers always choose
        for the whole batch by magnitude.
      tile: features in a tile.
      seed: of random choices; every layer has a stream of its own.
      transpose: whether to store kernels ``(out, in)``.

    Returns:
      How many layers were changed.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`.
      ValueError: if no layer was changed, an option makes no sense, or ``k`` or ``tile`` does not
        fit a layer, which the error names.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax.meprop import meprop, restore
      >>> model = nnx.Linear(4, 32, rngs=nnx.Rngs(0))
      >>> meprop(model, 3, layers=nnx.Linear), model.kernel.shape
      (1, (32, 4))
      >>> restore(model), model.kernel.shape
      (1, (4, 32))
    """
    check_module(model)
    found = _layers(model)
    if layers is None:
        chosen = list(found)[:-1]
    else:
        predicate = nnx.filterlib.to_predicate(layers)
        chosen = [name for name in found if predicate(tuple(name.split("/")), found[name])]
    plan = MeProp(k, pattern, tile, seed)
    # All that can be wrong shows before anything is changed.
    for name in chosen:
        _check_fit(dataclasses.replace(plan, name=name), found[name])
    if not chosen:
        raise ValueError(
            f"no layer was changed: the model's layers are {list(found) or 'none'}"
            + (", and the last is left out as the output layer" if found and layers is None else "")
            + "; name the layers to change with layers="
        )
    shared = _shared(model)
    for name in chosen:
        layer = found[name]
        _take_out(layer)
        if isinstance(layer, nnx.RNN):
            for part, linear in walk(layer.cell, f"{name}/cell"):
                # The fused pass needs rows, and the cell works by itself too.
                if isinstance(linear, nnx.Linear) and transpose:
                    _put_in(linear, MeProp(1.0, name=part), shared)
            swap_rnn(layer, k, name)  # type: ignore[arg-type]  # one k, as has been checked
        else:
            _put_in(layer, dataclasses.replace(plan, name=name), shared if transpose else None)
    return len(chosen)


def restore(model: nnx.Module) -> int:
    """Takes out what `meprop` put in, in place: the plain layers, with their trained parameters.

    Returns:
      How many layers were changed back. `meprop` has an example.

    Raises:
      TypeError: if ``model`` is no `nnx.Module`.
    """
    check_module(model)
    return sum(_take_out(layer) for layer in _layers(model).values())


def _layers(model: nnx.Module) -> dict[str, Any]:
    """What can be changed, by path: layers, and recurrent ones without the layers of their cell."""
    found = dict(walk(model))
    inside = {
        id(part)
        for layer in found.values()
        if isinstance(layer, nnx.RNN) and is_fusible(layer)
        for _, part in walk(layer.cell)
    }
    return {
        name: layer
        for name, layer in found.items()
        if id(layer) not in inside
        and (_place(layer) or (isinstance(layer, nnx.RNN) and is_fusible(layer)))
    }


def _place(layer: Any) -> tuple[str, type[MeProp]] | None:
    """The attribute of a layer to replace, and with what."""
    for kind, place, drop_in in _PLACES:
        # A `dot_general_cls` of the user's own goes before what could be put in.
        if isinstance(layer, kind) and getattr(layer, "dot_general_cls", None) is None:
            return place, drop_in
    return None


def _check_fit(plan: MeProp, layer: Any) -> None:
    """Raises where ``k`` is impossible for a layer."""
    if isinstance(layer, nnx.Einsum):
        return  # its features show when it is called
    if isinstance(layer, nnx.RNN):
        if isinstance(plan.k, tuple):
            raise ValueError(
                f"the recurrent layer {plan.name!r} takes one k, not {plan.k}: a budget cannot "
                "choose among them; leave it out with layers=, and change it by itself"
            )
        width, groups = layer.cell.hidden_features, 1  # type: ignore[attr-defined]
        plan = dataclasses.replace(plan, pattern="unified")
    else:
        out = layer.out_features
        width = math.prod(out) if isinstance(out, tuple) else out
        groups = layer.feature_group_count if isinstance(layer, nnx.Conv) else 1
    plan.rules(width, groups)


def _put_in(layer: Any, plan: MeProp, shared: set[int] | None) -> None:
    """Puts a drop-in into a layer; ``shared``: kernels that keep their layout, None for all."""
    place, kind = _place(layer)  # type: ignore[misc]
    dense = isinstance(layer, nnx.Linear | nnx.LinearGeneral)
    transposed = dense and shared is not None and id(layer.kernel) not in shared
    if transposed:
        _transpose(layer, inputs_first=True)
    options = {field.name: getattr(plan, field.name) for field in dataclasses.fields(plan)}
    options |= {"transposed": transposed, "inner": getattr(layer, place)}
    setattr(layer, place, kind(**options))


def _take_out(layer: Any) -> bool:
    """The inverse of `_put_in`; whether there was anything."""
    if isinstance(layer, nnx.RNN):
        taken = restore_rnn(layer)
        return any([_take_out(part) for _, part in walk(layer.cell)]) or taken
    place = _place(layer)
    drop_in = getattr(layer, place[0]) if place else None
    if not isinstance(drop_in, MeProp):
        return False
    if drop_in.transposed:
        _transpose(layer, inputs_first=False)
    setattr(layer, place[0], drop_in.inner)  # type: ignore[index]
    return True


def _transpose(layer: Any, *, inputs_first: bool) -> None:
    """Exchanges input and output axes of a kernel; axes in front, of stacked layers, stay."""
    kernel = layer.kernel
    ins, outs = (
        len(features) if isinstance(features, tuple) else 1
        for features in (layer.in_features, layer.out_features)
    )
    stacked, first = kernel.ndim - ins - outs, ins if inputs_first else outs
    axes = range(kernel.ndim)
    order = (*axes[:stacked], *axes[stacked + first :], *axes[stacked : stacked + first])
    kernel.set_value(jnp.transpose(kernel[...], order))
    sharding = kernel.get_metadata("out_sharding", None)
    if sharding is not None and len(sharding) == len(order):
        kernel.set_metadata("out_sharding", jax.P(*(sharding[axis] for axis in order)))


def _shared(model: nnx.Module) -> set[int]:
    """Variables that more than one module holds: another one reads them in their own layout."""
    seen: set[int] = set()
    shared: set[int] = set()
    for _, module in walk(model):
        for entry in vars(module).values():
            if isinstance(entry, nnx.Variable):
                (shared if id(entry) in seen else seen).add(id(entry))
        if isinstance(module, nnx.WeightNorm | nnx.SpectralNorm):  # reads those of its layer
            parts = [vars(part).values() for _, part in walk(module)]
            shared |= {id(x) for entries in parts for x in entries if isinstance(x, nnx.Variable)}
    return shared
