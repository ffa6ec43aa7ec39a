"""What a budget can address: names, sizes and depths of the slots of a parameter pytree.

Everything here is static: it is worked out from paths and shapes while tracing, never from values.
"""

from __future__ import annotations

import dataclasses
import math
import os.path
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from priorityprop_jax.core.paths import path_name


@dataclasses.dataclass(frozen=True)
class Bundle:
    """Leaves that share their slots: one slot, or one a layer where they are stacked."""

    name: str  # of its slot, without the layer
    leaves: tuple[int, ...]  # indices into the flattened parameters
    axes: tuple[int | None, ...]  # for every leaf that of its layers; None where it is not stacked
    layers: int | None  # how many layers are stacked
    start: int  # the index of its first slot

    @property
    def slots(self) -> int:
        """How many slots it has."""
        return 1 if self.layers is None else self.layers


@dataclasses.dataclass(frozen=True)
class Slots:
    """The slots of a parameter pytree, in the order of the vectors over slots.

    Attributes:
      names: one a slot: ``"encoder/0/kernel"``, ``"decoder/kernel[3]"`` for layer 3 of a stack.
      shapes: the shapes of the arrays in each slot.
      sizes: elements in each slot.
      depths: distance of each slot's layer from the loss, 0 at the output layer.
      layers: the name of the layer that each slot belongs to, as its path has it.
      bundles: the leaves behind the slots.
      leaf_names: the leaves of each slot, ``[3]`` behind those of layer 3 of a stack; none where
        it is stacked on another axis than 0.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[tuple[int, ...], ...], ...]
    sizes: tuple[int, ...]
    depths: tuple[int, ...]
    layers: tuple[str, ...]
    bundles: tuple[Bundle, ...]
    leaf_names: tuple[tuple[str, ...], ...] = ()

    def __len__(self) -> int:
        return len(self.names)

    def leaves(self, active: Iterable[str]) -> frozenset[str]:
        """The leaves that slots stand for, by path, ``[3]`` behind those of layer 3 of a stack.

        Raises:
          ValueError: if there is no slot of a name, or a leaf is stacked on another axis than 0.
        """
        index = {name: i for i, name in enumerate(self.names)}
        found: set[str] = set()
        for name in active:
            if name not in index:
                raise ValueError(f"there is no slot {name!r}")
            if not self.leaf_names[index[name]]:
                raise ValueError(f"slot {name!r} is not stacked on axis 0: its layers have no name")
            found.update(self.leaf_names[index[name]])
        return frozenset(found)


def find_slots(
    params: Any,
    *,
    stacked_axis: Callable[[str], int | None] | None = None,
    group: Callable[[str], str | None] | None = None,
) -> Slots:
    """Finds the slots of a parameter pytree.

    Without a loss, depths are read from the paths (`partial.step` reads the program): numbers count
    (``Dense_2`` comes before ``Dense_10``), layers of a stack follow one another, words such as
    ``embed`` mean the input and ``head`` or ``logits`` the output. The order in which a pytree
    flattens means nothing. Where paths do not tell, give the transformation a ``depth_factor`` of
    your own.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      stacked_axis: given the path of a leaf, the axis along which it stacks layers (as scanned
        modules do, usually 0), or None for a leaf of one layer. Each layer becomes a slot.
      group: given the path of a leaf, the name of the slot that it shares with all leaves of the
        same name, or None for a slot of its own. Stacked leaves of a group share layer by layer.

    Returns:
      The slots.

    Raises:
      ValueError: if two slots have one name, if a stacked axis does not exist, or if a group mixes
        stacked leaves of different lengths, or stacked leaves with others.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import find_slots
      >>> params = {"blocks": {"kernel": jnp.ones((2, 3, 3))}, "head": {"kernel": jnp.ones((3, 1))}}
      >>> slots = find_slots(params, stacked_axis=lambda path: 0 if "blocks" in path else None)
      >>> slots.names
      ('blocks/kernel[0]', 'blocks/kernel[1]', 'head/kernel')
      >>> slots.depths
      (2, 1, 0)
    """
    with_paths, _ = jax.tree_util.tree_flatten_with_path(params)
    names = [path_name(path) for path, _ in with_paths]
    shapes = [tuple(np.shape(leaf)) for _, leaf in with_paths]
    axes = [_axis(stacked_axis, name, shape) for name, shape in zip(names, shapes, strict=True)]

    members: dict[str, list[int]] = {}
    grouped: set[str] = set()
    for i, name in enumerate(names):
        shared = group(name) if group is not None else None
        if shared is not None:
            grouped.add(shared)
        elif name in members:
            raise ValueError(f"two leaves have the path {name!r}; rename a key of the parameters")
        members.setdefault(name if shared is None else shared, []).append(i)

    wrappers = len(os.path.commonprefix([name.split("/")[:-1] for name in names]))
    stacks = _stack_roots(names, axes)
    keys: list[str] = []
    slot_names: list[str] = []
    slot_shapes: list[tuple[tuple[int, ...], ...]] = []
    leaf_names: list[tuple[str, ...]] = []
    bundles: list[Bundle] = []
    for name, leaves in members.items():
        if name in grouped and any(names[i] == name for i in leaves) and len(leaves) > 1:
            raise ValueError(f"the group {name!r} has the name of a leaf; choose another name")
        lengths = {None if axes[i] is None else shapes[i][axes[i] or 0] for i in leaves}
        if len(lengths) > 1:
            raise ValueError(
                f"group {name!r} mixes leaves with stacks of {sorted(map(str, lengths))} layers; "
                "all leaves of a group must be stacked alike"
            )
        layers = lengths.pop()
        own_axes = tuple(axes[i] for i in leaves)
        bundles.append(Bundle(name, tuple(leaves), own_axes, layers, len(slot_names)))
        inside = tuple(
            tuple(n for place, n in enumerate(shapes[i]) if place != axes[i]) for i in leaves
        )
        named = [names[i] for i in leaves] if set(own_axes) <= {None, 0} else []
        for layer in [None] if layers is None else range(layers):
            mark = "" if layer is None else f"[{layer}]"
            slot_names.append(name + mark)
            slot_shapes.append(inside)
            leaf_names.append(tuple(leaf + mark for leaf in named))
            keys.append(_layer_name(names[leaves[-1]], layer, stacks, wrappers))
    if len(set(slot_names)) < len(slot_names):
        twice = sorted({name for name in slot_names if slot_names.count(name) > 1})
        raise ValueError(f"two slots have the name {twice[0]!r}; rename a group or a key")

    in_order = sorted(set(keys), key=forward_key)
    depth = {key: len(in_order) - 1 - place for place, key in enumerate(in_order)}
    return Slots(
        names=tuple(slot_names),
        shapes=tuple(slot_shapes),
        sizes=tuple(sum(math.prod(shape) for shape in shapes) for shapes in slot_shapes),
        depths=tuple(depth[key] for key in keys),
        layers=tuple(keys),
        bundles=tuple(bundles),
        leaf_names=tuple(leaf_names),
    )


def _axis(stacked_axis: Callable | None, name: str, shape: tuple[int, ...]) -> int | None:
    axis = stacked_axis(name) if stacked_axis is not None else None
    if axis is None:
        return None
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"stacked_axis({name!r}) is {axis}, but the leaf has shape {shape}")
    return axis % len(shape)


def _cuts(path: str) -> list[str]:
    """The path up to each of its parts, from ``""`` to the whole."""
    parts = path.split("/")
    return ["/".join(parts[:n]) for n in range(len(parts) + 1)]


def _stack_roots(names: Sequence[str], axes: Sequence[int | None]) -> set[str]:
    """The shortest prefixes below which every leaf is stacked: the scanned modules."""
    mixed: set[str] = set()
    for name, axis in zip(names, axes, strict=True):
        if axis is None:
            mixed.update(_cuts(name)[:-1])
    stacked = (name for name, axis in zip(names, axes, strict=True) if axis is not None)
    return {next(cut for cut in _cuts(name) if cut not in mixed) for name in stacked}


def _layer_name(path: str, layer: int | None, stacks: set[str], wrappers: int) -> str:
    """The part of a path that names its layer: up to the first number, else the parent module.

    Numbers in the first parts that wrap the whole model (``MLP_0``) tell no layers apart.
    """
    if layer is not None:
        return f"{next((cut for cut in _cuts(path) if cut in stacks), '')}[{layer}]"
    parts = path.split("/")
    for n, part in enumerate(parts):
        if n >= wrappers and re.search(r"\d+$", part):
            return "/".join(parts[: n + 1])
    return "/".join(parts[:-1]) or path


_INPUT = re.compile(r"^(embed|wte|wpe|tok|pos(?!t)|patch|stem|input)|embedding", re.IGNORECASE)
_OUTPUT = re.compile(r"^(lm_?head|head|output|out|logits?|classifier|readout)", re.IGNORECASE)
_LAST_NORM = re.compile(
    r"^(final|last|ln_?f|norm_?f|pooler)|^(layer_?norm|norm|ln|rms_?norm)$", re.I
)
_ENCODER = re.compile(r"^encoder$", re.IGNORECASE)
_DECODER = re.compile(r"^decoder$", re.IGNORECASE)
_KINDS = (_INPUT, _ENCODER, None, _DECODER, _LAST_NORM, _OUTPUT)  # None: whatever is left


def forward_key(name: str) -> tuple[tuple[int, str, int], ...]:
    """A sort key that puts layer names in forward order, input first.

    For every part of the name its kind (place in ``_KINDS``), then its word, then its number.
    """
    key = []
    for part in re.sub(r"\[(\d+)\]$", r"/\1", name).split("/"):
        word, number = re.fullmatch(r"(.*?)_?(\d*)", part, re.DOTALL).groups()  # type: ignore[union-attr]
        kind = next((i for i, rule in enumerate(_KINDS) if rule and rule.search(word)), 2)
        key.append((kind, word, int(number or 0)))
    return tuple(key)


def by_layer(params: Any) -> Callable[[str], str | None]:
    """Puts leaves of one layer in one slot."""
    slots = find_slots(params)
    layer = dict(zip(slots.names, slots.layers, strict=True))
    return lambda path: layer[path]
