"""Changing which layers of a model are sparse, and which of their weights there are, in place."""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from priorityprop_jax.core.modules import check_module, parts_of, walk
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.sparse.layers import SparseConv, SparseLayer, SparseLinear, convertible
from priorityprop_jax.sparse.masks import as_mask, kept_of, magnitude_masks, random_mask
from priorityprop_jax.sparse.pattern import carry


def prune(
    model: nnx.Module,
    sparsity: float | None = None,
    *,
    masks: Any = None,
    scope: str = "uniform",
    layers: Any = None,
) -> dict[str, jax.Array]:
    """Sets the smallest weights of dense layers to zero, in place; `sparsify` then swaps layers.

    Args:
      model: the module.
      sparsity: the share to prune, in [0, 1].
      masks: instead: what to keep, by layer (``{"layers/0": mask}``) or as a tree of parameters, as
        `jaxpruner` has them; see `as_mask`. Layers that it does not name are left alone.
      scope: ``"uniform"``: every layer to this sparsity; ``"global"``: all of them together.
      layers: which layers, an `nnx` filter; by default all `nnx.Linear` and `nnx.Conv` but the
        last, the output layer, in the order in which attributes were set.

    Returns:
      The masks by path of the layer, bool in the shape of its kernel.

    Raises:
      ValueError: if there is no such layer, masks do not fit, or an option makes no sense.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1)))
      >>> masks = sparse.prune(model, 0.9)
      >>> list(masks), int((model.layers[0].kernel[...] != 0).sum())
      (['layers/0'], 51)
    """
    check_module(model)
    if (sparsity is None) == (masks is None):
        raise ValueError("give either a sparsity or masks=")
    if sparsity is None:
        found = by_all_names(model, dense_layers(model).values())
        chosen = _by_layer(masks, {name: layer.kernel.shape for name, layer in found.items()})
    else:
        found = layers_to_prune(model, layers)
        kernels = {name: layer.kernel[...] for name, layer in found.items()}
        by_name = magnitude_masks(kernels, sparsity, scope=scope)
        chosen = {name: by_name[name] for name in found}  # in the order of the layers
    for name, mask in chosen.items():
        kernel = found[name].kernel
        kernel.set_value(jnp.where(mask, kernel[...], 0))
    return chosen


def sparse_start(
    model: nnx.Module, sparsity: float, *, places: str = "random", layers: Any = None, seed: int = 0
) -> int:
    """Makes the layers of a model sparse, in place, to train it so from the start.

    For a model that is trained, and to swap only what gets faster, see `prune` and `sparsify`. A
    layer whose parameters another module shares stays dense: both would go ways of their own.

    Args:
      model: the module.
      sparsity: of each layer, in [0, 1): of ``n`` weights ``round((1 - sparsity) * n)`` are kept.
      places: ``"random"``: drawn, with the dense layer's initial values times
        ``(1 - sparsity) ** -0.5``, as a feature sums over fewer; ``"largest"``: of the largest
        values, as they are.
      layers: which layers, as for `prune`.
      seed: of random places.

    Returns:
      How many layers were changed.

    Raises:
      ValueError: if there is no such layer, or an option makes no sense.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1)))
      >>> sparse.sparse_start(model, 0.9), type(model.layers[0]).__name__, model.layers[0].nonzeros
      (1, 'SparseLinear', 51)
    """
    check_module(model)
    if not 0 <= sparsity < 1:
        raise ValueError(f"sparsity must be from 0 to below 1, got {sparsity}")
    if places not in ("random", "largest"):
        raise ValueError(f'places must be "random" or "largest", got {places!r}')
    found = untied(model, layers_to_prune(model, layers))
    if not found:
        raise ValueError("there is no layer to make sparse: all share parameters with others")
    kernels = {name: layer.kernel[...] for name, layer in found.items()}
    if places == "largest":
        masks = magnitude_masks(kernels, sparsity)
    else:
        keys = jax.random.split(jax.random.key(seed), len(found))
        masks = {
            name: random_mask(key, kernel.shape, sparsity)
            for key, (name, kernel) in zip(keys, kernels.items(), strict=True)
        }
    new = {}
    for name, layer in found.items():
        # Known without the mask, which under `nnx.jit` is not.
        capacity = max(kept_of(layer.kernel.size, sparsity), 1)
        new[id(layer)] = to_sparse(layer, masks[name], capacity=capacity)
        if places == "random":
            values = new[id(layer)].values
            values.set_value(values[...] * jnp.asarray((1 - sparsity) ** -0.5, values.dtype))
    replace(model, new)
    return len(new)


def densify(model: nnx.Module) -> int:
    """Makes the sparse layers of a model dense, in place, with zeros where there were no places.

    The inverse of `sparsify` and of `sparse_start`. Make a new optimizer behind it, as for them.

    Args:
      model: the module; a sparse layer itself is a ValueError.

    Returns:
      How many layers were changed.

    Example:
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> model = nnx.Sequential(
      ...     nnx.Linear(8, 64, rngs=nnx.Rngs(0)), nnx.relu, nnx.Linear(64, 4, rngs=nnx.Rngs(1)))
      >>> sparse.sparse_start(model, 0.9), sparse.densify(model), type(model.layers[0]).__name__
      (1, 1, 'Linear')
    """
    check_module(model)
    if isinstance(model, SparseLayer):
        raise ValueError("the model is one sparse layer: take its to_dense()")
    new = {id(layer): layer.to_dense() for layer in sparse_layers(model).values()}
    replace(model, new)
    return len(new)


def apply_further_mask(model: nnx.Module, masks: Any, optimizer: Any = None) -> Any:
    """Prunes sparse layers further, in place; nothing is compiled anew.

    Args:
      model: a module with sparse layers, or one of these.
      masks: what to keep of each layer to prune, as for `prune`; for one layer the mask itself.
        What is not in the layer stays out of it.
      optimizer: what belongs to the model's parameters and should go along: an `nnx.Optimizer`,
        changed in place, or any pytree whose paths end as theirs do, such as an Optax state.

    Returns:
      The optimizer, with moments where the values are now.

    Raises:
      ValueError: if masks do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax import sparse
      >>> layer = sparse.SparseLinear(4, 4, sparsity=0.25, rngs=nnx.Rngs(0))
      >>> sparse.apply_further_mask(layer, jnp.ones((4, 4)).at[:2].set(0))
      >>> layer.values.shape, bool((layer.kernel()[:2] == 0).all())
      ((12,), True)
    """
    check_module(model)
    layers = by_all_names(model, sparse_layers(model).values())
    masks = {"": masks} if isinstance(model, SparseLayer) else masks
    further = _by_layer(masks, {name: layer.kernel_shape for name, layer in layers.items()})
    sources = {
        id(layers[name]): layers[name].change_mask(layers[name].mask() & mask)
        for name, mask in further.items()
    }
    # What an optimizer keeps for a shared layer may go by any of its names.
    moved = {
        name: (layer.values.shape, sources[id(layer)])
        for name, layer in layers.items()
        if id(layer) in sources
    }
    if isinstance(optimizer, nnx.Optimizer):
        nnx.update(optimizer, move_state(nnx.state(optimizer), moved))
        return optimizer
    return move_state(optimizer, moved)


def move_state(
    tree: Any,
    moved: Mapping[str, tuple[tuple[int, ...], jax.Array]],
    like: Callable[[jax.Array, jax.Array], jax.Array] = lambda new, old: new,
) -> Any:
    """What is kept for values of sparse layers, as by an optimizer, brought to where these are now.

    `carry` is done to each leaf that has the shape of values and a path that ends like theirs.
    ``moved`` holds by path of a layer this shape and where the values come from; ``like`` makes of
    a new leaf and the old one what to put there.
    """
    owners = {f"/{name}/values".replace("//", "/"): entry for name, entry in moved.items()}

    def move(path: Any, leaf: Any) -> Any:
        where = f"/{path_name(path)}"
        # One name may end like another: the longest is meant.
        owner = max(filter(where.endswith, owners), key=len, default=None)
        if owner is None or leaf.shape != owners[owner][0]:
            return leaf
        return like(carry(leaf, owners[owner][1]), leaf)

    return jax.tree_util.tree_map_with_path(move, tree)


def sparse_layers(model: nnx.Module) -> dict[str, Any]:
    """The sparse layers of a model, by path."""
    return {name: layer for name, layer in walk(model) if isinstance(layer, SparseLayer)}


def dense_layers(model: nnx.Module) -> dict[str, Any]:
    """The layers of a model that could be sparse, by path."""
    return {name: layer for name, layer in walk(model) if is_dense(layer)}


def layers_to_prune(model: nnx.Module, layers: Any = None) -> dict[str, Any]:
    """The dense layers that an `nnx` filter means, by path; by default all but the output layer."""
    found = dense_layers(model)
    if layers is None:
        chosen = dict(list(found.items())[:-1])
    else:
        predicate = nnx.filterlib.to_predicate(layers)
        chosen = {n: layer for n, layer in found.items() if predicate(tuple(n.split("/")), layer)}
    if not chosen:
        raise ValueError(
            "there is no layer to make sparse: of the nnx.Linear and nnx.Conv of the model "
            f"({', '.join(name or 'itself' for name in found) or 'none'}) "
            + ("the last is left out as the output layer" if layers is None else "none is named")
        )
    return chosen


def is_dense(layer: Any) -> bool:
    """Whether something is a dense layer that has a sparse one that does the same."""
    # Other classes that are derived from these do something else with a kernel.
    return type(layer) in (nnx.Linear, nnx.Conv) and convertible(layer)


def untied(model: nnx.Module, layers: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the dense layers of a model whose parameters no other module holds too."""
    seen: set[int] = set()
    shared: set[int] = set()

    def visit(node: Any) -> None:
        if id(node) in seen:
            if isinstance(node, nnx.Variable):
                shared.add(id(node))
            return
        if isinstance(node, nnx.Variable | nnx.Pytree | list | tuple | dict):
            seen.add(id(node))
            for _, entry in parts_of(node):
                visit(entry)

    visit(model)
    parameters = {name: {id(layer.kernel), id(layer.bias)} for name, layer in layers.items()}
    return {name: layers[name] for name, ids in parameters.items() if ids.isdisjoint(shared)}


def to_sparse(layer: Any, mask: Any = None, *, capacity: int | None = None) -> Any:
    """The sparse layer in place of a dense one, as its `from_dense` makes it."""
    kind: Any = SparseLinear if isinstance(layer, nnx.Linear) else SparseConv
    return kind.from_dense(layer, mask, capacity=capacity)


def replace(node: Any, new: Mapping[int, Any], seen: set[int] | None = None) -> Any:
    """Puts other modules in place of those with these ids, in place but for tuples.

    The node is a module or a list, tuple or dict of them; returns it, or what is in its place.
    """
    seen = set() if seen is None else seen
    if id(node) in new:
        return new[id(node)]
    if id(node) in seen:
        return node
    seen.add(id(node))
    if isinstance(node, tuple):
        others = tuple(replace(entry, new, seen) for entry in node)
        return node if all(map(operator.is_, others, node)) else others
    holder: Any = node
    for key, entry in parts_of(node):
        other = replace(entry, new, seen)
        if other is not entry and isinstance(node, nnx.Pytree):
            setattr(node, str(key), other)
        elif other is not entry:
            holder[key] = other
    return node


def by_all_names(model: nnx.Module, layers: Iterable[Any]) -> dict[str, Any]:
    """Layers by path: by each of them, where a model has a layer twice."""
    wanted = set(map(id, layers))
    found: dict[str, Any] = {}

    def visit(node: Any, path: tuple[str, ...], above: frozenset[int]) -> None:
        if id(node) in wanted:
            found["/".join(path)] = node
        elif id(node) not in above:
            for key, entry in parts_of(node):
                visit(entry, (*path, str(key)), above | {id(node)})

    visit(model, (), frozenset())
    return found


def _by_layer(masks: Any, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, jax.Array]:
    """Masks given by layer, or as a tree of parameters, by layer; those of all ones left out."""
    flat, _ = jax.tree_util.tree_flatten_with_path(masks)
    given: dict[str, Any] = {}
    for path, mask in flat:
        name = path_name(path) if path else ""
        layer = name.removesuffix("/kernel").removesuffix("/values")
        layer = "" if name in ("kernel", "values", "params") and "" in shapes else layer
        if layer in shapes:
            given[layer] = mask
        elif not jnp.all(jnp.asarray(mask) != 0):
            raise ValueError(
                f"there is a mask for {name!r}, but the layers are {', '.join(shapes) or 'none'}"
            )
    return {name: as_mask(mask, shapes[name], name) for name, mask in given.items()}
