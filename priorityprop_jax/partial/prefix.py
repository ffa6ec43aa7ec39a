"""Runs the frozen stages of a model forward, or takes what they gave before from a cache."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.layout import layout_of, spread
from priorityprop_jax.core.program import Program, abstract, constants, program_flops
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.core.walk import needed_by
from priorityprop_jax.partial.prefix_cache import PrefixCache, fingerprint, rounded
from priorityprop_jax.partial.stages import Stages


class Prefix:
    """The stages in front of the first one that is trained.

    Outputs are cached in front of one stage, the first that needs it. It moves back where an
    earlier one is trained, and is chosen anew after a step that trains all stages.
    """

    def __init__(
        self, stages: Stages, slots: Slots, cache: PrefixCache | None, build: Callable[..., Program]
    ) -> None:
        self._stages, self._slots, self._cache, self._build = stages, slots, cache, build
        first = {name: min(slots.leaves({name})).split("/")[0] for name in slots.names}
        self._where = {name: stages.names.index(stage) for name, stage in first.items()}
        self.at: int | None = None  # the stage in front of which outputs are cached
        self._key: str | None = None  # of the cache as it was opened; None before
        self._read: Any = None  # of each array of the stages' state, whether an output reads it
        self._checked = False  # whether what is cached has been found to be of each example alone
        self._programs: dict[Hashable, Program] = {}
        self.beside = 0  # the most bytes that a program has taken, see `bytes_beside`

    def start(self, active: Iterable[str]) -> int:
        """The first stage that these slots train."""
        return min(self._where[name] for name in active)

    def enter(
        self, params: Any, rest: Any, batch: Any, start: int, upcoming: Iterable[int]
    ) -> tuple[Any, Any, float, bool]:
        """What enters stage ``start`` (None for stage 0), the state, FLOPs, whether it was cached.

        ``upcoming`` are the stages that the steps to come start at.
        """
        if start == 0:
            self.at = None  # every stage changes
            return None, rest, 0.0, False
        cache, x = self._cache, jax.tree.map(jnp.asarray, batch["x"])
        if cache is None:
            return *self._forward(params, rest, x, 0, start), False
        if not isinstance(batch, Mapping) or "id" not in batch:
            raise ValueError(
                'a prefix cache needs an array "id" in each batch, a whole number for each example'
            )
        ids, inputs = np.asarray(batch["id"]), jax.tree.map(np.asarray, batch["x"])
        at = self._open(cache, params, rest, x, start, upcoming)
        found, flops = cache.lookup(ids, inputs), 0.0
        if found is None:
            self._check(params, rest, x, at)
            x, rest, flops = self._forward(params, rest, x, 0, at)
            cache.store(ids, inputs, jax.device_get(x))
        else:
            x = _beside(jax.tree.leaves(batch["x"])[0], found)
        if start > at:
            x, rest, more = self._forward(params, rest, x, at, start)
            flops += more
        return x, rest, flops, found is not None

    def _forward(
        self, params: Any, rest: Any, x: Any, begin: int, stop: int
    ) -> tuple[Any, Any, float]:
        """Runs stages; state that they change, such as random streams, moves on."""
        names = self._stages.names[begin:stop]
        round_to = self._cache.dtype if self._cache is not None and begin == 0 else None
        arguments = (*_of(names, params, rest), x)

        def forward(params, rest, x):
            y, rest = self._run(params, rest, x, begin, stop)
            return (y if round_to is None else rounded(y, round_to)), rest

        key = (begin, stop, arguments_key(arguments))
        if key not in self._programs:
            self._programs[key] = self._build(forward, arguments, (None, layout_of(arguments[1])))
        program = self._programs[key]
        self.beside = max(self.beside, program.beside)
        y, changed = program.run(*arguments)
        return y, {**rest, **changed}, program.flops

    def _run(self, params: Any, rest: Any, x: Any, begin: int, stop: int) -> tuple[Any, Any]:
        """Runs some stages with what is theirs alone."""
        stages = self._stages
        whole = {**stages.params, **params}, {**stages.state, **rest}
        y, after = stages.run(*whole, x, start=begin, stop=stop)
        return y, {name: after[name] for name in rest}

    def _traced(self, params: Any, rest: Any, x: Any, stop: int) -> tuple[Any, Any]:
        """The stages in front of one as a jaxpr, and their outputs. Only shapes are read."""
        arguments = jax.tree.map(abstract, (*_of(self._stages.names[:stop], params, rest), x))
        run = functools.partial(self._run, begin=0, stop=stop)
        traced, (outputs, _) = jax.make_jaxpr(run, return_shape=True)(*arguments)
        return traced, outputs

    def _open(
        self, cache: PrefixCache, params: Any, rest: Any, x: Any, start: int, upcoming: Any
    ) -> int:
        """Makes the cache that of the present prefix; returns the stage that it enters."""
        at = self.at
        if at is None or at > start:
            at, self._key = min([start, *(stage for stage in upcoming if stage > 0)]), None
            self.at = at
        # Another key: the cache was closed meanwhile, or opened by another trainer. In a resumed
        # run too it is opened at the same place, as outputs are rounded there.
        if self._key is None or cache.key != self._key:
            names = self._stages.names[:at]
            program, outputs = self._traced(params, rest, x, at)
            # What the prefix computes: its program without the addresses of Python's objects,
            # which differ between processes, and what that closes over.
            text = re.sub(r"0x[0-9a-f]+", "", str(program))
            tree = (_of(names, params, rest), list(constants(program)))
            self._key = fingerprint(tree, *names, text, jax.__version__, jax.default_backend())
            like = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), outputs)
            cache.open(self._key, like)
            reads = needed_by(program.jaxpr, len(jax.tree.leaves(outputs)))[1]
            leaves, treedef = jax.tree.flatten((tree[0], x))
            flags = [var in reads for var in program.jaxpr.invars]
            self._read, self._checked = treedef.unflatten(flags)[0][1], False
        return at

    def _check(self, params: Any, rest: Any, x: Any, at: int) -> None:
        """Raises unless outputs are the same at each run, and each of its own example alone.

        All outputs of a batch with the first example in every place must be that example's. (What
        depends on an average of the batch would not be told by a batch in another order.) Random
        streams may move on where no output reads them, as those of an `nnx.RNN` do.
        """
        rows = len(jax.tree.leaves(x)[0])
        if self._checked or rows < 2:  # of one example nothing is told; another batch will tell
            return

        def first(leaf: jax.Array) -> jax.Array:
            return jax.device_put(np.repeat(np.asarray(leaf)[:1], rows, 0), leaf.sharding)

        y, after, _ = self._forward(params, rest, x, 0, at)
        same, _, _ = self._forward(params, rest, jax.tree.map(first, x), 0, at)
        front = self._stages.names[:at]
        states = ({n: _settled(s[n], self._read[n]) for n in front} for s in (rest, after))
        pairs = zip(front, *(map(fingerprint, s.values()) for s in states), strict=True)
        changed = [name for name, a, b in pairs if a != b]
        why = "what one of them makes of an example depends on its place or on the others"
        if changed:
            why = "they draw random numbers or change their state (dropout, BatchNorm)"
        if changed or not jax.tree.all(jax.tree.map(_close, y, same)):
            raise ValueError(
                f"the outputs of a prefix with {', '.join(map(repr, changed or front))} cannot be "
                f"cached: {why}; end the prefix before that, set rates to 0, run frozen stages in "
                "evaluation mode, or leave the cache out"
            )
        self._checked = True

    def flops(self, params: Any, rest: Any, x: Any) -> list[float]:
        """FLOPs of the forward pass in front of the layers of each depth. Only shapes are read."""
        stops = [0] * (max(self._slots.depths) + 1)
        for name, depth in zip(self._slots.names, self._slots.depths, strict=True):
            stops[depth] = self._where[name]
        front = lambda stop: program_flops(self._traced(params, rest, x, stop)[0])  # noqa: E731
        return [front(stop) if stop else 0.0 for stop in stops]

    def restore(self, at: int | None) -> None:
        """Goes on with the place of another run's cache, its `at`."""
        self.at, self._key = at, None


def _beside(inputs: Any, found: Any) -> Any:
    """What the cache gave, with its rows on the devices that those of the inputs are on."""
    sharding = getattr(inputs, "sharding", None)
    if not isinstance(sharding, jax.sharding.NamedSharding) or not spread(inputs):
        return jax.tree.map(jnp.asarray, found)
    rows = jax.sharding.PartitionSpec(*sharding.spec[:1])
    return jax.device_put(found, jax.sharding.NamedSharding(sharding.mesh, rows))


def arguments_key(arguments: Any) -> Hashable:
    """Tells arguments apart that need a program of their own."""
    leaves, treedef = jax.tree.flatten(arguments)
    return treedef, shapes_of(leaves)


def shapes_of(leaves: list[Any]) -> Hashable:
    """Shapes and dtypes of arrays, and where they are if there are several devices."""
    if jax.device_count() == 1:
        return tuple([(x.shape, x.dtype) for x in leaves])
    return tuple([(x.shape, x.dtype, x.sharding if spread(x) else None) for x in leaves])


def _of(names: Iterable[str], *trees: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: tree[name] for name in names} for tree in trees)


def _settled(state: Any, read: Any) -> Any:
    """A stage's state without how far those of its random streams are that are not ``read``."""
    if not isinstance(state, Mapping):
        return state
    dtype = getattr(state.get("key"), "dtype", None)
    stream = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    unread = {"count"} if stream and not read.get("count", True) else set()
    return {name: _settled(x, read[name]) for name, x in state.items() if name not in unread}


def _close(a: Any, b: Any) -> bool:
    """Whether all rows of ``b`` are the first of ``a``, but for rounding."""
    a, b = np.asarray(a)[:1], np.asarray(b)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return bool((a == b).all())
    # Outputs may have been rounded to bfloat16, and the sums behind them in another order.
    a, b = a.astype(np.complex128), b.astype(np.complex128)
    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return bool(np.allclose(b, a, rtol=0, atol=2.0**-6 * scale, equal_nan=True))
