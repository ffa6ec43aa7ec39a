"""A traced program, cut into the parts that some of its results need."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from priorityprop_jax.core.fragile import bind, needed_part
from priorityprop_jax.core.walk import acts, is_var, parts_of

_DRAWS = {"random_bits", "random_gamma"}
_LOOPS = {"scan", "while"}
_CALLS = {"jit", "pjit", "closed_call", "core_call"}
# What works number by number: where a choice follows that is the same for all, a compiler's loop
# does nothing for what is not chosen.
_ELEMENTWISE = frozenset(
    "abs add add_any and broadcast_in_dim cbrt clamp convert_element_type copy div eq exp exp2 "
    "expm1 ge gt imag integer_pow is_finite le log log1p logistic lt max min mul ne neg not or "
    "pow real reduce_precision reshape rsqrt select_n sign sqrt square squeeze stop_gradient sub "
    "tanh xor".split()
)
# What keeps zeros zeros.
_MOVES = {"broadcast_in_dim", "convert_element_type", "copy", "neg", "reshape"}


class Cut:
    """A function's program, traced once, of which parts run by themselves.

    Its arguments, of which only types are read, and its results are flat lists.
    """

    def __init__(self, function: Callable[..., Sequence[Any]], args: Sequence[Any]) -> None:
        program = jax.make_jaxpr(lambda *args: function(args))(*args)
        self._jaxpr: Any = program.jaxpr
        self._consts = program.consts
        self._flat = _Flat(self._jaxpr, self._consts)
        self._acts = any(map(acts, self._jaxpr.eqns))

    @property
    def results(self) -> int:
        """How many results the function has."""
        return len(self._flat.results)

    def passes(self, argument: int, result: int) -> bool:
        """Whether a result is one of the arguments as it came in."""
        return self._flat.results[result] == argument

    def is_zero(self, result: int) -> bool:
        """Whether a result is made as zeros, whatever the arguments are."""
        flat = self._flat

        def zero(x: int) -> bool:
            if x in flat.constants:
                value = flat.constants[x]  # what is an array, may be traced
                return not isinstance(value, jax.Array) and np.ndim(value) == 0 and bool(value == 0)
            if x not in flat.makers:
                return False
            eqn, operands, _ = flat.operations[flat.makers[x]]
            name = eqn.primitive.name
            if name == "mul":  # by a number; a rate of 0 freezes nothing
                return any(zero(factor) for factor in operands if factor in flat.makers)
            return name in _MOVES and zero(operands[0])

        return zero(flat.results[result])

    def value(self, result: int) -> int:
        """What a result is called among the values."""
        return self._flat.results[result]

    def numbers(self, known: Collection[int]) -> Part:
        """All that is made of single numbers, from numbers among the arguments that are known.

        What it gives may be handed to a part, by the values in its ``wanted``.
        """
        return self._flat.numbers([] if self._acts else known)

    def part(
        self, results: Sequence[int], known: Collection[int], given: Collection[int] = ()
    ) -> Part | None:
        """What gives some results from the arguments that are known; None if they need others.

        ``given`` are values that need not be made, see `numbers`. A program that does something
        beside its results is not cut.
        """
        if self._acts:
            return None
        part = self._flat.part([self._flat.results[i] for i in results], given)
        known = {*known, *given}
        if part.needed.keys() <= set(known):
            return part
        # An operation of many results, as a branch, may need less for some of them.
        jaxpr, used = needed_part(self._jaxpr, results)
        places = [i for i, on in enumerate(used) if on]
        if not set(places) <= set(known):
            return None
        return _Flat(jaxpr, self._consts).whole(places)

    def whole(self, results: Sequence[int], numbers: Sequence[int]) -> Part:
        """All of the program, its arguments called by other numbers."""
        part = self._flat.whole(numbers)
        return part._replace(wanted=[part.wanted[i] for i in results])


class _Flat:
    """The operations of a program in a row, those of functions that it calls among them.

    Values are numbers: first the arguments, then all others.
    """

    def __init__(self, jaxpr: Any, consts: Iterable[Any]) -> None:
        self.arguments = range(len(jaxpr.invars))
        self.operations: list[tuple[Any, list[int], list[int]]] = []
        self.constants: dict[int, Any] = {}
        self.makers: dict[int, int] = {}  # by the value the place of the operation
        self._next = itertools.count(len(jaxpr.invars))
        self.results = self._add(jaxpr, consts, self.arguments)

    def _add(self, jaxpr: Any, consts: Iterable[Any], args: Iterable[int]) -> list[int]:
        """Adds the operations of a jaxpr; the values of its results."""
        known = dict(zip(jaxpr.invars, args, strict=True))
        known |= {var: self._constant(x) for var, x in zip(jaxpr.constvars, consts, strict=True)}
        value = lambda x: known[x] if is_var(x) else self._constant(x.val)  # noqa: E731
        for eqn in jaxpr.eqns:
            operands = list(map(value, eqn.invars))
            if eqn.primitive.name in _CALLS and len(eqn.outvars) > 1:
                (inner,) = parts_of(eqn)
                made = self._add(inner.jaxpr, inner.consts, operands)
            else:
                made = list(itertools.islice(self._next, len(eqn.outvars)))
                self.makers.update(dict.fromkeys(made, len(self.operations)))
                self.operations.append((eqn, operands, made))
            known.update(zip(eqn.outvars, made, strict=True))
        return list(map(value, jaxpr.outvars))

    def _constant(self, value: Any) -> int:
        self.constants[number := next(self._next)] = value
        return number

    def numbers(self, known: Collection[int]) -> Part:
        """What is made of single numbers alone; see `Cut.numbers`."""
        found, operations = {*known}, []
        for operation in self.operations:
            eqn, operands, results = operation
            follows = found & {*operands} and {*operands} <= found | self.constants.keys()
            single = all(np.ndim(x.aval) == 0 for x in (*eqn.invars, *eqn.outvars))
            if follows and single and _is_elementwise(eqn):
                operations.append(operation)
                found |= {*results}
        made = [x for *_, results in operations for x in results]
        return Part(operations, {i: i for i in known}, self.constants, made)

    def part(self, wanted: list[int], given: Collection[int]) -> Part:
        """What gives some values."""
        found, todo, given = set[int](), list(wanted), {*given}
        while todo:
            n = None if (x := todo.pop()) in given else self.makers.get(x)
            if n is not None and n not in found:
                found.add(n)
                todo += self.operations[n][1]
        operations = [self.operations[n] for n in sorted(found)]
        read = {*wanted, *(x for _, operands, _ in operations for x in operands)}
        constants = {x: self.constants[x] for x in read & self.constants.keys()}
        needed = {i: i for i in (*self.arguments, *sorted(given)) if i in read}
        return Part(operations, needed, constants, wanted)

    def whole(self, numbers: Sequence[int]) -> Part:
        """All of it, its arguments called by other numbers."""
        needed = dict(zip(numbers, self.arguments, strict=True))
        return Part(self.operations, needed, self.constants, self.results)


class Part(NamedTuple):
    """Operations that give some results."""

    operations: Sequence[tuple[Any, list[int], list[int]]]
    needed: Mapping[int, int]  # by the argument's number the value
    constants: Mapping[int, Any]
    wanted: Sequence[int]

    def is_elementwise(self) -> bool:
        """Whether it works number by number."""
        return all(_is_elementwise(eqn) for eqn, *_ in self.operations)

    def run(
        self,
        args: Mapping[int, Any],
        stream: Any = None,
        instead: Mapping[int, Callable[[Any], Any]] | None = None,
    ) -> list[Any]:
        """The results, of arguments by their number.

        ``stream``, a whole number that may be traced, sets apart what random numbers are drawn: 0
        draws those of the program itself. ``instead``, by the place among the results, makes of a
        result what is read in its place by all that comes after it.
        """
        change = {self.wanted[i]: function for i, function in (instead or {}).items()}
        values = dict(self.constants) | {x: args[i] for i, x in self.needed.items()}
        for eqn, operands, made in self.operations:
            own, apart = [values[x] for x in operands], stream is not None and _draws(eqn)
            results = _apart(eqn, own, stream) if apart else bind(eqn, own)
            for x, value in zip(made, results, strict=True):
                values[x] = change[x](value) if x in change else value
        return [values[x] for x in self.wanted]


def _is_elementwise(eqn: Any) -> bool:
    """Whether an equation works number by number."""
    if eqn.primitive.name in _CALLS:
        return all(_is_elementwise(inner) for part in parts_of(eqn) for inner in part.jaxpr.eqns)
    return eqn.primitive.name in _ELEMENTWISE


def _draws(eqn: Any) -> bool:
    """Whether random numbers are drawn in an equation."""
    inner = (part for jaxpr in parts_of(eqn) for part in getattr(jaxpr, "jaxpr", jaxpr).eqns)
    return eqn.primitive.name in _DRAWS or any(map(_draws, inner))


def _apart(eqn: Any, operands: list[Any], stream: Any) -> Sequence[Any]:
    """An equation that draws random numbers, with those of a stream."""
    name, parts = eqn.primitive.name, parts_of(eqn)
    if name in _DRAWS:
        key, *others = operands
        return bind(eqn, [_fold(key, stream), *others])
    if name == "cond":
        branches = [functools.partial(_closed, part, stream) for part in parts]
        return lax.switch(*operands[:1], branches, *operands[1:])
    if name in _LOOPS or len(parts) != 1:
        raise TypeError(
            f"the optimizer draws random numbers within a {name!r}, where the layers of a stack "
            "cannot be given numbers of their own: draw them outside of it"
        )
    return _closed(parts[0], stream, *operands)


def _closed(part: Any, stream: Any, *args: Any) -> list[Any]:
    jaxpr = getattr(part, "jaxpr", part)
    whole = _Flat(jaxpr, getattr(part, "consts", ())).whole(range(len(args)))
    return whole.run(dict(enumerate(args)), stream)


def _fold(keys: Any, stream: Any) -> Any:
    """Keys of another stream; those of stream 0 stay as they are."""

    def fold(key: Any, stream: Any) -> Any:
        # Folded twice: the program's own keys are split in small numbers, and these are not.
        far = jax.random.fold_in(key, jnp.uint32(2**32 - 1))
        return jax.random.fold_in(far, jnp.asarray(stream, jnp.uint32))

    apart = fold
    for _ in range(keys.ndim):
        apart = jax.vmap(apart, (0, None))
    return jnp.where(jnp.asarray(stream) == 0, keys, apart(keys, stream))
