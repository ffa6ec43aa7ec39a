"""Runs the frozen stages of a model forward, or takes what they gave before from a cache."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from priorityprop_jax.core.layout import layout_of, spread
from priorityprop_jax.core.program import Program, abstract, build, constants, program_flops
from priorityprop_jax.core.slots import Slots
from priorityprop_jax.partial.prefix_cache import PrefixCache, fingerprint, rounded
from priorityprop_jax.partial.stages import Stages


class Prefix:
    """The stages in front of the first one that is trained.

    Outputs are cached in front of one stage, which moves back where an earlier one is to be
    trained, and forward where that has not been so for two cycles.

    Args:
      stages: the model.
      slots: its slots, none of two stages.
      cache: for outputs, or None.

    Attributes:
      at: the stage in front of which outputs are cached; None if nowhere.
      programs: how many programs have been compiled.
      compile_seconds: wall time spent on it.
    """

    def __init__(self, stages: Stages, slots: Slots, cache: PrefixCache | None) -> None:
        self._stages, self._cache = stages, cache
        first = {name: min(slots.leaves({name})).split("/")[0] for name in slots.names}
        self._where = {name: stages.names.index(stage) for name, stage in first.items()}
        self.at: int | None = None
        self.programs, self.compile_seconds = 0, 0.0
        self._programs: dict[Hashable, Program] = {}
        self._key: str | None = None
        self._checked = False  # whether what is cached has been found to be of each example alone
        self._reopen_at: int | None = None  # as `at`, of the run that this one goes on with
        self._cycles_above = 0  # cycles in a row that would have been served by a later stage

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
            self.at = self._reopen_at = None  # every stage changes
            return None, rest, 0.0, False
        cache, x = self._cache, jax.tree.map(jnp.asarray, batch["x"])
        if cache is None:
            return *self._forward(params, rest, x, 0, start), False
        if not isinstance(batch, Mapping) or "id" not in batch:
            raise ValueError(
                'a prefix cache needs to know the examples: give batches an array "id", one whole '
                "number for each example"
            )
        ids, inputs = np.asarray(batch["id"]), jax.tree.map(np.asarray, batch["x"])
        at = self._open(cache, params, rest, x, start, upcoming)
        found, flops = cache.lookup(ids, inputs), 0.0
        if found is None:
            self._check(params, rest, x, at)
            x, rest, flops = self._forward(params, rest, x, 0, at)
            cache.store(ids, inputs, jax.device_get(x))
        else:
            x = jax.tree.map(jnp.asarray, found)
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
            self._programs[key] = build(forward, arguments, (None, layout_of(arguments[1])))
            self.programs += 1
            self.compile_seconds += self._programs[key].seconds
        program = self._programs[key]
        y, changed = program.run(*arguments)
        return y, {**rest, **changed}, program.flops

    def _run(self, params: Any, rest: Any, x: Any, begin: int, stop: int) -> tuple[Any, Any]:
        """Runs some stages with what is theirs alone."""
        stages = self._stages
        whole = {**stages.params, **params}, {**stages.state, **rest}
        y, after = stages.run(*whole, x, start=begin, stop=stop)
        return y, {name: after[name] for name in rest}

    def _open(
        self, cache: PrefixCache, params: Any, rest: Any, x: Any, start: int, upcoming: Any
    ) -> int:
        """Makes the cache that of the present prefix; returns the stage that it enters."""
        if self.at is not None and cache.key != self._key:
            # Closed meanwhile, or opened by another trainer.
            self.at, self._reopen_at = None, self.at
        if self.at is not None and self.at <= start:
            return self.at
        at = min([start, *(stage for stage in upcoming if stage > 0)])
        if self._reopen_at is not None and self._reopen_at <= start:
            # Outputs are rounded where they are cached, so it has to be the same place.
            at = self._reopen_at
        self._reopen_at = None
        names = self._stages.names[:at]
        prefix = _of(names, params, rest)
        shapes = jax.tree.map(abstract, (*prefix, x))
        program, (outputs, _) = jax.make_jaxpr(
            lambda *arguments: self._run(*arguments, begin=0, stop=at), return_shape=True
        )(*shapes)
        # What the prefix computes: its program without the addresses of Python's objects, which
        # differ between processes, and what that closes over.
        text = re.sub(r"0x[0-9a-f]+", "", str(program))
        tree = (prefix, list(constants(program)))
        self._key = fingerprint(tree, *names, text, jax.__version__, jax.default_backend())
        like = jax.tree.map(lambda y: jax.ShapeDtypeStruct(y.shape[1:], y.dtype), outputs)
        cache.open(self._key, like)
        self.at, self._checked = at, False
        return at

    def _check(self, params: Any, rest: Any, x: Any, at: int) -> None:
        """Raises unless outputs are the same at each run, and each of its own example alone.

        The prefix is run on the batch, and on one with the first example in every place: all
        outputs must be that example's. (What depends on an average of the batch would not be told
        by a batch in another order.)
        """
        rows = len(jax.tree.leaves(x)[0])
        if self._checked or rows < 2:  # of one example nothing is told; another batch will tell
            return

        def first(leaf: jax.Array) -> jax.Array:
            return jax.device_put(np.repeat(np.asarray(leaf)[:1], rows, 0), leaf.sharding)

        y, after, _ = self._forward(params, rest, x, 0, at)
        same, _, _ = self._forward(params, rest, jax.tree.map(first, x), 0, at)
        names = [
            name
            for name in self._stages.names[:at]
            if fingerprint(after[name]) != fingerprint(rest[name])
        ]
        pairs = zip(jax.tree.leaves(y), jax.tree.leaves(same), strict=True)
        if names or not all(_close(a, b) for a, b in pairs):
            who = ", ".join(map(repr, names or self._stages.names[:at]))
            why = (
                "they draw random numbers or change their state at each run (dropout, "
                "augmentation, BatchNorm)"
                if names
                else "what one of them makes of an example depends on its place or on the others"
            )
            raise ValueError(
                f"the outputs of a prefix with {who} cannot be cached: {why}; end the prefix "
                "before that, set rates to 0, run frozen stages in evaluation mode, or leave the "
                "cache out"
            )
        self._checked = True

    def plan(self, starts: Iterable[int]) -> None:
        """Gives the place up where a later stage would serve this cycle, and served the last.

        What froze since is then cached too. One such cycle alone may be followed by another that
        needs the earlier stage.
        """
        at = self._reopen_at if self.at is None else self.at
        if at is None or not min(starts) > at:
            self._cycles_above = 0
            return
        self._cycles_above += 1
        if self._cycles_above > 1:
            self.at, self._reopen_at, self._cycles_above = None, None, 0

    def flops(self, params: Any, rest: Any, x: Any, stop: int) -> float:
        """FLOPs of the forward pass of all stages in front of one. Only shapes are read."""
        names = self._stages.names[:stop]
        arguments = (*_of(names, params, rest), x)
        traced = jax.make_jaxpr(lambda *arguments: self._run(*arguments, begin=0, stop=stop)[0])
        return program_flops(traced(*jax.tree.map(abstract, arguments))) if stop else 0.0

    def record(self) -> dict[str, Any]:
        """What a resumed run needs, ready for JSON."""
        return {
            "at": self._reopen_at if self.at is None else self.at,
            "cycles_above": self._cycles_above,
        }

    def restore(self, record: Mapping[str, Any]) -> None:
        """The inverse of `record`."""
        self.at, self._reopen_at = None, record["at"]
        self._cycles_above = record["cycles_above"]


def arguments_key(arguments: Any) -> Hashable:
    """Tells arguments apart that need a program of their own."""
    leaves, treedef = jax.tree.flatten(arguments)
    several = jax.device_count() > 1
    return treedef, tuple(
        (np.shape(x), x.dtype, x.sharding if several and spread(x) else None) for x in leaves
    )


def _of(names: Iterable[str], *trees: Any) -> tuple[dict[str, Any], ...]:
    return tuple({name: tree[name] for name in names} for tree in trees)


def _close(a: Any, b: Any) -> bool:
    """Whether all rows of ``b`` are the first of ``a``, but for rounding."""
    a, b = np.asarray(a)[:1], np.asarray(b)
    if not jnp.issubdtype(a.dtype, jnp.inexact):
        return bool((a == b).all())
    # Outputs may have been rounded to bfloat16, and the sums behind them in another order.
    a, b = a.astype(np.complex128), b.astype(np.complex128)
    scale = np.abs(a[np.isfinite(a)]).max(initial=0.0)
    return bool(np.allclose(b, a, rtol=0, atol=2.0**-6 * scale, equal_nan=True))
