"""An Optax optimizer on one slot at a time, with one shared state.

The state has the inner optimizer's own structure. What belongs to a parameter (Adam's moments) is
stored as the optimizer stores it; what belongs to none (Adam's count) becomes a vector over slots,
but for what an update leaves as it is (a learning rate that was injected), which stays one value.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.sharding import PartitionSpec

from priorityprop_jax.core.cut import Cut
from priorityprop_jax.core.fragile import laid_out, spec_of
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
        self._programs: dict[Any, Cut] = {}
        nobodys = [i for i, owner in enumerate(self.owners) if owner == _SHARED]
        # The leaves of the state that no update changes, one value for all slots.
        self.fixed = self._fixed(nobodys)
        # The other ones that belong to no parameter, one value a slot.
        self.shared = [i for i in nobodys if i not in self.fixed]
        # The layers of a state leaf lie along its parameter's axis if it has its parameter's shape.
        self.state_axis = {
            i: self.stack_axis[owner] if x.shape == self.shapes[owner].shape else 0
            for i, (x, owner) in enumerate(zip(self.state_shapes, self.owners, strict=True))
            if owner in self.stack_axis
        }

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

        stand_ins = map(self.stand_in, range(len(self.shapes)))
        try:
            marked = self.inner.init(self.treedef.unflatten(stand_ins))
            return jax.tree.leaves(jax.tree.map(owner, marked, state, is_leaf=is_mark))
        except Exception as error:  # a function of the tree may raise what it likes
            if (found := self._owners_by_structure(state)) is not None:
                return found
            raise TypeError(
                "cannot tell which part of the inner optimizer's state belongs to which parameter "
                f"({error}); its state must hold one array for each parameter, or none"
            ) from error

    def _owners_by_structure(self, state: Any) -> list[int] | None:
        """The owners where the state has trees like that of the parameters, and numbers beside.

        For masks and labels that are a function of the tree and count its leaves, which stand-ins
        have not. None where the state is no such one.
        """
        if jax.tree_util.treedef_is_leaf(self.treedef):
            return None
        hidden = lambda x: isinstance(x, optax.MaskedNode)  # noqa: E731
        like = lambda x: jax.tree.structure(x, is_leaf=hidden) == self.treedef  # noqa: E731
        found = []
        for part in jax.tree.leaves(state, is_leaf=like):
            if like(part):
                own = enumerate(jax.tree.leaves(part, is_leaf=hidden))
                found += [i for i, x in own if not hidden(x)]
            elif part.ndim == 0:
                found.append(_SHARED)
            else:
                return None
        return found

    def stand_in(self, i: int) -> optax.MaskedNode:
        """What hides a parameter, and has its shape."""
        return _StandIn(i, self.shapes[i])

    def _fixed(self, nobodys: list[int]) -> dict[int, jax.ShapeDtypeStruct]:
        """The leaves of the state that the inner update hands on as they came.

        Counts always change: without a real number there is nothing to look for. An update that
        can't be told without its extra arguments has none.
        """
        real = [i for i in nobodys if jnp.issubdtype(self.state_shapes[i].dtype, jnp.inexact)]
        if not real:
            return {}
        try:
            program = self.program(self.shapes, self.state_shapes, self.shapes, {})
        except Exception:
            return {}
        place = len(self.shapes)
        passed = [i for i in real if program.passes(place + i, place + i)]
        return {i: self.state_shapes[i] for i in passed}

    def program(
        self, grads: list[Any], state: list[Any], params: list[Any] | None, extra_args: Any
    ) -> Cut:
        """The inner update of all slots: gradients, state, parameters; to updates and state.

        Of all but the extra arguments types are read, of one layer where they are stacked.
        """
        given = [*grads, *state, *(params or ())]
        key = None if extra_args else (params is None, *given)
        if key in self._programs:
            return self._programs[key]

        def update(args):
            new, found = jax.tree.flatten(self.update(args, extra_args))
            if found != (own := jax.tree_util.treedef_tuple((self.treedef, self.state_treedef))):
                raise TypeError(
                    "the inner optimizer changed the structure of its updates or of its state: "
                    f"from {own} to {found}"
                )
            return new

        program = Cut(update, given)
        if key is not None:
            self._programs[key] = program
        return program

    def update(self, flat: Sequence[Any], extra_args: dict[str, Any]) -> tuple[Any, Any]:
        """The inner update of flat gradients, state and, where they are given, parameters."""
        count, after = len(self.shapes), len(self.shapes) + len(self.state_shapes)
        given = len(flat) > after or not self.shapes
        params = self.treedef.unflatten(flat[after:]) if given else None
        state = self.state_treedef.unflatten(flat[count:after])
        return self.inner.update(self.treedef.unflatten(flat[:count]), state, params, **extra_args)

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
            state[i] = self.for_every_slot(jnp.asarray(state[i]))
        return treedef.unflatten(state)

    def for_every_slot(self, value: jax.Array) -> jax.Array:
        """``[slots, ...]``: one value of a shared leaf of the inner state, for every slot."""
        return jnp.broadcast_to(value, (len(self.slots), *value.shape))

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
        self.fill_in(flat)
        return flat

    def fill_in(self, flat: list[Any]) -> None:
        """Puts what a user has set into the leaves of a state as it belongs there.

        A hyperparameter that is set to one value holds for every slot.
        """
        for i in (*self.fixed, *self.shared):
            one, value = self.state_shapes[i], flat[i]
            if jnp.shape(value) == one.shape:
                value = jnp.asarray(value, one.dtype)
                flat[i] = value if i in self.fixed else self.for_every_slot(value)
            elif i in self.fixed:
                raise ValueError(
                    f"a hyperparameter is one value of shape {one.shape} for all slots, got one of "
                    f"shape {jnp.shape(value)}"
                )

    def init_slot(self, bundle: Bundle, params: Sequence[Any]) -> dict[int, Any]:
        """A fresh state of one slot, by the number of the state's leaf; the shared part included.

        ``params`` are those of the slot's leaves, of the one layer where they are stacked.
        """
        if "init" not in self._programs:
            init = lambda args: jax.tree.leaves(self.inner.init(self.treedef.unflatten(args)))  # noqa: E731
            self._programs["init"] = Cut(init, self.shapes)
        mine = sorted({*self.owned(bundle), *self.shared})
        part = self._programs["init"].part(mine, bundle.leaves)
        if part is None:
            raise TypeError("the inner optimizer makes the state of one slot from all parameters")
        fresh = part.run(dict(zip(bundle.leaves, params, strict=True)))
        return dict(zip(mine, map(jnp.asarray, fresh), strict=True))


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
    optax.contrib.DifferentiallyPrivateAggregateState: "but private gradients are those of each "
    "example together: put optax.contrib.differentially_private_aggregate in front, as in "
    "optax.chain(differentially_private_aggregate(...), priorityprop(optax.sgd(0.1)))",
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


def layer_of(x: Any, axis: int | None, layer: Any) -> Any:
    """One layer of an array that is stacked on an axis; all of one that is not."""
    if axis is None:
        return x
    without = lambda x: PartitionSpec(*[s for i, s in enumerate(spec_of(x)) if i != axis])  # noqa: E731
    return laid_out(lambda x: lax.dynamic_index_in_dim(x, layer, axis, keepdims=False), without)(x)


def like(x: jax.Array, reference: jax.Array) -> jax.Array:
    """``x`` in the dtype of ``reference``, not weakly typed: loops must not change types."""
    return lax.convert_element_type(x, reference.dtype)
