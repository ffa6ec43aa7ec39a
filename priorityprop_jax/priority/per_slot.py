"""An Optax optimizer on one slot at a time, with one shared state.

The state has the inner optimizer's own structure. What belongs to a parameter (Adam's moments) is
stored as the optimizer stores it; what belongs to none (Adam's count) becomes a vector over slots.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from priorityprop_jax.core.fragile import laid_out, spec_of
from priorityprop_jax.core.paths import path_name
from priorityprop_jax.core.slots import Bundle, Slots

_SHARED = -1


class PerSlot:
    """The inner optimizer, taking extra arguments, over the slots of one parameter tree.

    Of ``tree``, parameters or updates of their structure, only shapes are read. A TypeError if the
    state of ``inner`` cannot be told apart by parameter.
    """

    def __init__(
        self, inner: optax.GradientTransformationExtraArgs, tree: Any, slots: Slots
    ) -> None:
        inner = optax.GradientTransformationExtraArgs(_free(inner.init), _free(inner.update))
        self.inner, self.slots = inner, slots
        self.treedef = jax.tree.structure(tree)
        self.stack_axis: dict[int, int] = {
            leaf: axis
            for bundle in slots.bundles
            for leaf, axis in zip(bundle.leaves, bundle.axes, strict=True)
            if axis is not None
        }
        self.shapes: list[jax.ShapeDtypeStruct] = []
        for i, x in enumerate(jax.tree.leaves(tree)):
            axis = self.stack_axis.get(i, jnp.ndim(x))
            shape = jnp.shape(x)[:axis] + jnp.shape(x)[axis + 1 :]
            self.shapes.append(jax.ShapeDtypeStruct(shape, jnp.result_type(x)))
        state = jax.eval_shape(inner.init, self.treedef.unflatten(self.shapes))
        for kind, advice in _NOT_BY_SLOT.items():
            of_kind = lambda x, kind=kind: isinstance(x, kind)  # noqa: E731
            if any(map(of_kind, jax.tree.leaves(state, is_leaf=of_kind))):
                raise TypeError(f"slots are updated one at a time, {advice}")
        self.state_shapes, self.state_treedef = jax.tree.flatten(state)
        self.owners = self._owners(state)
        # The leaves of the state that belong to no parameter, one value a slot.
        self.shared = [i for i, owner in enumerate(self.owners) if owner == _SHARED]
        # The layers of a state leaf lie along its parameter's axis if it has its parameter's shape.
        self.state_axis = {
            i: self.stack_axis[owner] if x.shape == self.shapes[owner].shape else 0
            for i, (x, owner) in enumerate(zip(self.state_shapes, self.owners, strict=True))
            if owner in self.stack_axis
        }
        paths = [path for path, _ in jax.tree_util.tree_flatten_with_path(state)[0]]
        self._random = {i for i in self.shared if _is_key(paths[i], self.state_shapes[i])}

    def _owners(self, state: Any) -> list[int]:
        """For every leaf of the inner state, the parameter that it belongs to, or _SHARED."""
        is_mark = lambda x: isinstance(x, _StandIn)  # noqa: E731

        def owner(mark, part):
            if not is_mark(mark):
                return _SHARED
            if isinstance(part, optax.MaskedNode):
                return part
            if not jax.tree_util.all_leaves([part]):
                raise TypeError(f"it keeps {jax.tree.structure(part)} for one parameter")
            return mark.owner

        stand_ins = map(self._stand_in, range(len(self.shapes)))
        try:
            marked = self.inner.init(self.treedef.unflatten(stand_ins))
            return jax.tree.leaves(jax.tree.map(owner, marked, state, is_leaf=is_mark))
        except (TypeError, ValueError, AttributeError) as error:
            raise TypeError(
                "cannot tell which part of the inner optimizer's state belongs to which parameter "
                f"({error}); its state must hold one array for each parameter, or none"
            ) from error

    def _stand_in(self, i: int) -> _StandIn:
        return _StandIn(i, self.shapes[i])

    def flatten(self, tree: Any) -> list[Any]:
        """The leaves of a tree of the parameters' structure; None where a leaf is absent."""
        return self.treedef.flatten_up_to(tree)

    def init(self, params: Any) -> optax.OptState:
        """The inner state for all slots."""
        leaves = jax.tree.leaves(params)
        for i in self.stack_axis:
            if isinstance(x := leaves[i], jax.ShapeDtypeStruct):
                leaves[i] = jnp.zeros(x.shape, x.dtype)
        first = [layer_of(x, self.stack_axis.get(i), 0) for i, x in enumerate(leaves)]
        state, treedef = jax.tree.flatten(self.inner.init(self.treedef.unflatten(first)))
        for bundle in self.slots.bundles:
            if bundle.layers is None:
                continue
            axes = {i: self.state_axis[i] for i in self.owned(bundle)}

            def init_layer(*layer, bundle=bundle, own=tuple(axes)):
                replaced = dict(enumerate(first)) | dict(zip(bundle.leaves, layer, strict=True))
                tree = self.treedef.unflatten(replaced.values())
                flat = jax.tree.leaves(self.inner.init(tree))
                return {i: flat[i] for i in own}

            init_all = jax.vmap(init_layer, bundle.axes, axes, axis_size=bundle.layers)
            for i, value in init_all(*(leaves[i] for i in bundle.leaves)).items():
                state[i] = value
        for i in self.shared:
            state[i] = self.for_every_slot(i, jnp.asarray(state[i]))
        return treedef.unflatten(state)

    def for_every_slot(self, i: int, value: jax.Array) -> jax.Array:
        """``[slots, ...]``: one value of a shared leaf of the inner state, for every slot.

        A random key becomes one of its own for every slot, or all would draw the same noise. The
        first keeps its own, so that ordinary training is the inner optimizer's.
        """
        slots = jnp.arange(len(self.slots), dtype=jnp.uint32)
        values = jnp.broadcast_to(value, (len(self.slots), *value.shape))
        if i not in self._random:
            return values
        # Folded twice: the first slot's key is split in small numbers, and these are not.
        far = jax.random.fold_in(value, jnp.uint32(2**32 - 1))
        own = jax.vmap(functools.partial(jax.random.fold_in, far))(slots)
        first = (slots == 0).reshape(-1, *[1] * value.ndim)
        return jnp.where(first, values, own)

    def owned(self, bundle: Bundle) -> list[int]:
        """The leaves of the inner state that belong to the bundle's parameters."""
        return [i for i, owner in enumerate(self.owners) if owner in bundle.leaves]

    def state_leaves(self, state: optax.OptState) -> list[jax.Array]:
        """The leaves of an inner state for all slots; a ValueError if it is of other parameters."""
        flat, treedef = jax.tree.flatten(state)
        if treedef != self.state_treedef:
            raise ValueError(
                "the inner state does not fit these parameters: expected the structure "
                f"{self.state_treedef}, got {treedef}"
            )
        for i in self.shared:
            # A hyperparameter that a user has set to one value holds for every slot.
            one = self.state_shapes[i]
            if jnp.shape(flat[i]) == one.shape:
                flat[i] = self.for_every_slot(i, jnp.asarray(flat[i], one.dtype))
        return flat

    def update_slot(
        self,
        bundle: Bundle,
        grads: Sequence[jax.Array],
        params: Sequence[jax.Array] | None,
        mine: dict[int, jax.Array],
        extra_args: dict[str, Any],
    ) -> tuple[list[jax.Array], dict[int, jax.Array]]:
        """One inner update of one slot, all others hidden.

        Gradients, parameters and updates are those of the slot's leaves; ``mine``, and what it is
        afterwards, its part of the inner state by the number of the state's leaf.
        """

        def run(hide):
            tree = lambda leaves: self._masked(bundle, leaves, hide)  # noqa: E731
            hidden = [hide(owner) for owner in self.owners]
            state = self.state_treedef.unflatten([mine.get(i, x) for i, x in enumerate(hidden)])
            parameters = None if params is None else tree(params)
            return self.inner.update(tree(grads), state, parameters, **extra_args)

        try:
            updates, state = run(lambda leaf: optax.MaskedNode())
        except AttributeError as error:
            if optax.MaskedNode.__name__ not in str(error):
                raise
            # A mask or labels that are a function of the tree: it asks what is hidden for a shape.
            updates, state = run(self._stand_in)
        updates, state = jax.tree.leaves(updates), jax.tree.leaves(state)
        if len(updates) != len(bundle.leaves) or len(state) != len(mine):
            raise TypeError(
                "the inner optimizer changed the structure of its updates or of its state "
                f"when it updated slot {bundle.name!r} alone"
            )
        new = dict(zip(sorted(mine), state, strict=True))
        return updates, {i: like(new[i], mine[i]) for i in new}

    def _masked(self, bundle: Bundle, leaves: Sequence[Any], hide: Callable[[int], Any]) -> Any:
        """A tree of the parameters' structure in which all but one slot is hidden."""
        own = dict(zip(bundle.leaves, leaves, strict=True))
        every = range(self.treedef.num_leaves)
        return self.treedef.unflatten([own[i] if i in own else hide(i) for i in every])

    def init_slot(self, bundle: Bundle, params: Sequence[Any], layer: int = 0) -> dict[int, Any]:
        """A fresh state of one slot, by the number of the state's leaf; the shared part included.

        ``params`` are those of the slot's leaves, of the one layer where they are stacked.
        """
        tree = self._masked(bundle, params, self._stand_in)
        mine = sorted({*self.owned(bundle), *self.shared})
        state = jax.tree.leaves(self.inner.init(tree))
        if len(state) != len(mine):
            raise TypeError("the inner optimizer has another state for one slot than for all")
        new = {i: jnp.asarray(x) for i, x in zip(mine, state, strict=True)}
        for i in self._random:
            new[i] = self.for_every_slot(i, new[i])[bundle.start + layer]
        return new


def _free(function: Callable[..., Any]) -> Callable[..., Any]:
    """The optimizer mixes dtypes as it likes, as Optax's Adam does, whatever the user's mode."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*args, **kwargs)

    return run


_LOSS = "but a line search and Sophia's Hessian need the loss of all parameters together: take "
_SEARCH = _LOSS + "another optimizer, or leave the search out, as optax.lbfgs(1.0, linesearch=None)"
_NOT_BY_SLOT = {
    optax.ScaleByBacktrackingLinesearchState: _SEARCH,
    optax.ScaleByZoomLinesearchState: _SEARCH,
    optax.contrib.HutchinsonState: _SEARCH,
    optax.LookaheadState: "but optax.lookahead has two copies of each: put it around, as in "
    "optax.lookahead(priorityprop(optax.adam(1e-3)), 5, 0.5)",
}


class _StandIn(optax.MaskedNode):
    """In the place of a parameter, where a user's function may ask it for its shape.

    It has no leaves, so that a map over a tree leaves it where it is, and all are equal, as empty
    tuples are: trees of them match.
    """

    def __new__(cls, owner: int, like: jax.ShapeDtypeStruct) -> _StandIn:
        self, about = super().__new__(cls), ("shape", "dtype", "ndim", "size")
        vars(self).update({name: getattr(like, name) for name in about}, owner=owner)
        return self


jax.tree_util.register_pytree_node(_StandIn, lambda x: ((), x), lambda x, _: x)


def _is_key(path: tuple[Any, ...], x: jax.ShapeDtypeStruct) -> bool:
    """Whether a leaf of a state is a random key: by its type, or the old ones by their name."""
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        return True
    named = re.search(r"(^|[/_])(key|p?rng|seed)s?(_state)?$", path_name(path))
    return bool(named) and x.dtype == jnp.uint32 and x.shape == (2,)


def layer_of(x: Any, axis: int | None, layer: Any) -> Any:
    """One layer of an array that is stacked on an axis; all of one that is not."""
    if axis is None:
        return x
    without = lambda x: PartitionSpec(*[s for i, s in enumerate(spec_of(x)) if i != axis])  # noqa: E731
    return laid_out(lambda x: lax.dynamic_index_in_dim(x, layer, axis, keepdims=False), without)(x)


def like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """``x`` in the dtype of ``reference``, not weakly typed: loops must not change types."""
    return lax.convert_element_type(x, reference.dtype)
