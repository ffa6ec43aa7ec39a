"""What a loss does: the work that the gradients of any slots need, and the depth of each slot."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from priorityprop_jax.core.program import abstract
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.core.walk import Walk, needed_by


@dataclasses.dataclass(frozen=True)
class Work:
    """What the gradients of a loss take, see `read_loss`."""

    parts: Mapping[int, float]  # FLOPs by who needs them: bits are slots, the next one the loss
    depths: tuple[int, ...]  # of slots, 0 at the output

    def cost(self, slots: Iterable[int]) -> float:
        """FLOPs of the loss and of the gradients of some slots, given by their indices."""
        bits = sum(1 << i for i in {*slots, len(self.depths)})
        return sum(flops for mask, flops in self.parts.items() if mask & bits)

    def own(self, slot: int) -> float:
        """FLOPs of what no other slot needs, nor the loss."""
        return self.parts.get(1 << slot, 0.0)


def read_loss(
    loss_fn: Callable[..., Any], params: Any, *args: Any, slots: Slots, has_aux: bool = False
) -> Work:
    """Reads from the program of a loss what each gradient needs, and how deep each slot is.

    A slot is as deep as the backward work that must run before its gradient is known: it is deeper
    than another where its backward pass goes through all of the other's, and through more. What has
    no gradient is at depth 0. Layers of a stack follow one another as they are used; where the
    program does not tell (it picks layers by a traced number), the first is taken for the deepest.

    ``loss_fn(params, *args)`` gives the loss, or ``(loss, aux)`` with ``has_aux``. It is traced
    once, by shapes; nothing is compiled. How FLOPs are counted: see `program_flops`.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax import find_slots
      >>> from priorityprop_jax.core.work import read_loss
      >>> params = {"a": jnp.ones((8, 8)), "b": jnp.ones((8, 8)), "c": jnp.ones(8)}
      >>> loss_fn = lambda p, x: jnp.sum(jnp.tanh(x @ p["b"] + p["c"]) @ p["a"])
      >>> work = read_loss(loss_fn, params, jnp.ones((4, 8)), slots=find_slots(params))
      >>> work.depths, work.cost([0]) < work.cost([1]) < work.cost([0, 1])
      ((0, 1, 1), True)
    """
    shapes = jax.tree.map(abstract, (params, args))
    grad_fn = jax.value_and_grad(lambda params, args: loss_fn(params, *args), has_aux=has_aux)
    program = jax.make_jaxpr(grad_fn)(*shapes).jaxpr
    count, given = len(slots), [len(jax.tree.leaves(tree)) for tree in shapes]
    loss = 1 << count  # also what is beside it
    marks = [loss] * (len(program.outvars) - given[0]) + list(map(sum, _bits(slots, 0)))
    parts, _ = Walk().over(program, marks, loss)
    trained = [any(n and mask >> i & 1 and mask < loss for mask, n in parts.items())
               for i in range(count)]  # fmt: skip
    # Forward, the part of it that is the loss.
    eqns, forward = needed_by(program, 1)[0], Walk(inputs=count)
    used = [bits if len(bits) > 1 else sum(bits) for bits in _bits(slots, count)]
    marks = [*used, *[forward.data] * given[1]]
    chains, _ = forward.over(program.replace(eqns=eqns), marks)
    return Work(parts, _depths(slots, chains, trained))


def _bits(slots: Slots, shift: int) -> list[tuple[int, ...]]:
    """For every leaf the bits of its slots."""
    found: dict[int, tuple[int, ...]] = {}
    for bundle in slots.bundles:
        own = tuple(1 << shift + bundle.start + i for i in range(bundle.slots))
        for leaf, axis in zip(bundle.leaves, bundle.axes, strict=True):
            found[leaf] = own if not axis else (sum(own),)
    return [found[leaf] for leaf in range(len(found))]


def _depths(slots: Slots, chains: Mapping[int, float], trained: list[bool]) -> tuple[int, ...]:
    """The longest row of slots of which each goes back through all that the one before does."""
    count = len(slots)
    within = [(1 << count) - 1] * count  # those whose chain has in it that of a slot
    work = [0.0] * count
    for mask, flops in chains.items():
        for i in range(count):
            if flops and mask >> i & 1:
                within[i] &= mask
                work[i] += flops
    place = [0] * count  # from the last layer of a stack, where the program does not tell
    for bundle in slots.bundles:
        mine = range(bundle.start, bundle.start + bundle.slots)
        if all(within[i] == within[mine[0]] for i in mine):
            for i in mine:
                place[i] = mine[-1] - i
    depths = [0] * count
    order = sorted((i for i in range(count) if trained[i]), key=lambda i: (work[i], place[i]))
    for n, i in enumerate(order):
        for j in order[:n]:
            shorter = not within[i] >> j & 1 or place[j] < place[i]
            if within[j] >> i & 1 and shorter:
                depths[i] = max(depths[i], depths[j] + 1)
    return tuple(depths)
