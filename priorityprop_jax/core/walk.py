"""One walk over a traced program tells which work each of its outputs needs."""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
from jax.extend import core as jex_core

# What moves numbers, makes them, or tells of them, and computes none.
_FREE = frozenset(
    "broadcast_in_dim reshape transpose squeeze expand_dims slice dynamic_slice concatenate pad "
    "dynamic_update_slice gather iota copy copy_p convert_element_type bitcast_convert_type rev "
    "stop_gradient device_put sharding_constraint reshard mesh_cast pvary pcast split empty "
    "optimization_barrier random_wrap random_unwrap random_bits random_fold_in random_split "
    "random_seed threefry2x32 shift_right_logical shift_left create_token".split()
)
# Whose backward pass computes nothing either.
_PASSES_BACK = _FREE | {"add", "add_any", "sub", "neg", "reduce_sum", "select_n"}
_REDUCE = ("reduce_", "argmax", "argmin", "cumsum", "cumprod", "cummax", "cummin", "cumlogsumexp")
_KEEPS_ROWS = {"convert_element_type", "copy", "sharding_constraint", "transpose"}

Mark = int | tuple[int, ...]  # bits; in a walk forward also those of each row of axis 0
Formula = Callable[[Sequence[Any], Sequence[Any], Mapping[str, Any]], float]
_formulas: dict[str, Formula] = {}


def register_flops(target_name: str, formula: Formula) -> None:
    """Says what `jax.ffi.ffi_call` of a target costs: FLOPs of operands, results and attributes.

    Without a formula a custom call counts nothing.
    """
    _formulas[target_name] = formula


@dataclasses.dataclass(frozen=True)
class Walk:
    """Carries bits through a jaxpr: from its outputs to what they need, or forward.

    Backward, an operation has the bits of all outputs that need it. Forward, it has those of all
    inputs that its backward pass leads to: input ``i`` comes in as bit ``inputs + i``, and is bit
    ``i`` behind the first operation that brings it together with data, whose backward pass gives
    its own gradient. Nothing goes backward through what has no gradient, as a whole number.
    """

    products_only: bool = False
    inputs: int | None = None  # so many go forward; None for a walk back

    @property
    def data(self) -> int:
        """The bit, in a walk forward, of what is no input."""
        return 1 << 2 * (self.inputs or 0)

    def ends(self, of: Any) -> tuple[Sequence[Any], Sequence[Any]]:
        """Where a walk through a jaxpr or an equation starts, and where it ends."""
        return (of.outvars, of.invars) if self.inputs is None else (of.invars, of.outvars)

    def over(
        self, jaxpr: Any, marks: Sequence[Mark], always: int = 0
    ) -> tuple[collections.Counter[int], list[Mark]]:
        """FLOPs by bits, and the bits that arrive at the other end.

        ``marks`` are of the outputs, or forward of the inputs; ``always`` of what has an effect.
        """
        jaxpr = getattr(jaxpr, "jaxpr", jaxpr)
        forward = self.inputs is not None
        start, end = self.ends(jaxpr)
        known: dict[Any, Mark] = {var: self.data for var in jaxpr.constvars if forward}
        parts = collections.Counter[int]()
        _mark(known, start, marks)
        for eqn in jaxpr.eqns if forward else reversed(jaxpr.eqns):
            near, far = self.ends(eqn)
            found, effect = _get(known, near), always if acts(eqn) else 0
            if any(map(_whole, found)) or effect:
                counts, arriving = self._equation(eqn, found, effect, always)
                parts.update(counts)
                _mark(known, far, arriving)
        return parts, _get(known, end)

    def _equation(
        self, eqn: Any, marks: list[Mark], effect: int, always: int
    ) -> tuple[Mapping[int, float], Sequence[Mark]]:
        name, inner, back = eqn.primitive.name, parts_of(eqn), self.inputs is None
        if name == "scan":
            return self._scan(eqn, inner[0], marks, always)
        whole = functools.reduce(operator.or_, map(_whole, marks), effect)
        if not inner or name.startswith(("reduce", "scatter", "custom_lin")):
            return self._operation(eqn, name, marks, whole)
        if name == "cond":
            walks = [self.over(branch, marks if back else marks[1:], always) for branch in inner]
            dearest = max((counts for counts, _ in walks), key=lambda counts: sum(counts.values()))
            ends = zip(*(end for _, end in walks), strict=True)
            return dearest, [whole] * back + [functools.reduce(_either, end) for end in ends]
        times, parts, (_, far) = _times(eqn), collections.Counter[int](), self.ends(eqn)
        arriving: Sequence[Mark] = [self._through(whole, name)[1]] * len(far)
        for part in inner:
            start, end = self.ends(getattr(part, "jaxpr", part))
            # Where a part has the results of the whole, what nothing reads of them is not run.
            same = len(start) == len(marks) and name not in ("while", "pallas_call")
            given = marks if same else [whole] * len(start)
            counts, ending = self.over(part, given, always if same else whole)
            parts.update({bits: times * flops for bits, flops in counts.items()})
            if same and len(inner) == 1 and len(end) == len(far):
                arriving = ending
        return parts, arriving

    def _scan(
        self, eqn: Any, body: Any, marks: list[Mark], always: int
    ) -> tuple[Mapping[int, float], Sequence[Mark]]:
        """Round by round, until a round finds what the one before has found.

        Backward all count as that one, since all run one program.
        """
        left, back = eqn.params["length"], self.inputs is None
        constants, carried = _carries(eqn, body)
        fixed, first = (0, constants)[:: 1 if back else -1]
        given, carry = marks[:fixed], list(map(_whole, marks[fixed : fixed + carried]))
        each = marks[fixed + carried :]
        by_row = any(isinstance(mark, tuple) for mark in each)
        parts, ends = collections.Counter[int](), {}
        rounds = range(max(left, 1))
        forward = reversed(rounds) if eqn.params["reverse"] else rounds
        for i in itertools.repeat(0) if back else forward:
            counts, end = self.over(body, [*given, *carry, *(_row(m, i) for m in each)], always)
            ends[i] = list(map(_whole, end))
            after = ends[i][first : first + carried]
            if back or len(ends) > 8:  # what goes round and round comes to rest
                after = list(map(operator.or_, after, carry))
            times = left if after == carry and not by_row else 0 if back else min(left, 1)
            parts.update({bits: times * flops for bits, flops in counts.items()})
            left, carry = left - times, after
            if not left:
                break
        found = zip(*(ends[i] for i in sorted(ends)), strict=True)
        arriving: list[Mark] = [mark if by_row else _whole(mark) for mark in found]
        return parts, [*arriving[:first], *carry, *arriving[first + carried :]]

    def _operation(
        self, eqn: Any, name: str, marks: list[Mark], whole: int
    ) -> tuple[Mapping[int, float], Sequence[Mark]]:
        """Of what has no program in it."""
        if any(isinstance(mark, tuple) for mark in marks) and (rows := _rows(eqn, name, marks)):
            return {}, [rows]
        counted, behind = self._through(whole, name)
        back, (_, far) = self.inputs is None, self.ends(eqn)
        real = [back or jnp.issubdtype(var.aval.dtype, jnp.inexact) for var in far]
        flops = _flops(eqn, name, self.products_only) if any(real) else 0.0
        return {counted: flops}, [behind if on else self.data for on in real]

    def _through(self, bits: int, name: str) -> tuple[int, int]:
        """Which bits an operation counts for, and which there are behind it."""
        if self.inputs is None:
            return bits, bits
        if not bits & self.data:
            return 0, bits
        every = (1 << self.inputs) - 1
        behind = bits & every | bits >> self.inputs & every | self.data
        blocked = name == "stop_gradient"
        return 0 if name in _PASSES_BACK else bits & every, self.data if blocked else behind


def _carries(eqn: Any, body: Any) -> tuple[int, int]:
    """How many constants a scan has, and how many carries; how JAX says so differs by release.

    What is handed out row by row has an axis that its body does not see.
    """
    body = getattr(body, "jaxpr", body)
    takes, gives = (
        [whole.aval.ndim == part.aval.ndim for whole, part in zip(*pair, strict=True)]
        for pair in ((eqn.invars, body.invars), (eqn.outvars, body.outvars))
    )
    return sum(takes) - sum(gives), sum(gives)


def _rows(eqn: Any, name: str, marks: Sequence[Mark]) -> tuple[int, ...]:
    """Bits of each row of the result where rows are moved, and nothing else comes in; else none."""
    shape, own, operands = eqn.outvars[0].aval.shape, marks[0], eqn.invars
    moved = isinstance(own, tuple) and shape and not any(map(is_var, operands[1:]))
    if not moved or not isinstance(own, tuple):
        return ()
    first, dimensions = 0, eqn.params.get("permutation", (0,))
    if name == "slice" and not eqn.params["strides"]:
        first = eqn.params["start_indices"][0]
    elif name == "dynamic_slice":
        first = min(max(int(operands[1].val), 0), len(own) - shape[0])
    elif name not in _KEEPS_ROWS or dimensions[0] != 0 or len(own) != shape[0]:
        return ()
    return own[first : first + shape[0]]


def acts(eqn: Any) -> bool:
    """Whether an operation does something beside its results; to speak of a mesh is nothing."""
    return any(type(effect).__name__ != "NamedAxisEffect" for effect in eqn.effects)


def needed_by(jaxpr: Any, outputs: int) -> tuple[list[Any], set[Any]]:
    """The equations that the first outputs need, whole, and all variables that these read."""
    needed, eqns = {*filter(is_var, jaxpr.outvars[:outputs])}, []
    for eqn in reversed(jaxpr.eqns):
        if needed.intersection(eqn.outvars):
            needed.update(filter(is_var, eqn.invars))
            eqns.insert(0, eqn)
    return eqns, needed


def is_var(x: Any) -> bool:
    """Whether it is no literal."""
    return isinstance(x, jex_core.Var)


def _get(known: Mapping[Any, Mark], variables: Sequence[Any]) -> list[Mark]:
    return [known.get(var, 0) if is_var(var) else 0 for var in variables]


def _mark(known: dict[Any, Mark], variables: Sequence[Any], marks: Sequence[Mark]) -> None:
    """Adds marks to those of variables."""
    for var, mark in zip(variables, marks, strict=True):
        if is_var(var):
            fits = not isinstance(mark, tuple) or var.aval.shape[:1] == (len(mark),)
            mark = mark if fits else _whole(mark)
            known[var] = _either(known[var], mark) if var in known else mark


def _either(a: Mark, b: Mark) -> Mark:
    if isinstance(a, tuple) and isinstance(b, tuple) and len(a) == len(b):
        return tuple(map(operator.or_, a, b))
    if not (a and b):
        return a or b
    return _whole(a) | _whole(b)


def _whole(mark: Mark) -> int:
    return functools.reduce(operator.or_, mark, 0) if isinstance(mark, tuple) else mark


def _row(mark: Mark, i: int) -> int:
    return mark[i] if isinstance(mark, tuple) else mark


def _flops(eqn: Any, name: str, products_only: bool) -> float:
    """The FLOPs of an operation that has none in it."""
    if not eqn.outvars:
        return 0.0
    result, params = eqn.outvars[0].aval, eqn.params
    if name == "dot_general":
        (contracted, _), _ = params["dimension_numbers"]
        shape = eqn.invars[0].aval.shape
        return 2.0 * result.size * math.prod(shape[axis] for axis in contracted)
    if name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        outs = kernel.shape[params["dimension_numbers"].rhs_spec[0]]
        return 2.0 * result.size * kernel.size / outs
    if name == "ffi_call" and params["target_name"] in _formulas:
        operands, results = ([v.aval for v in side] for side in (eqn.invars, eqn.outvars))
        formula = _formulas[params["target_name"]]
        return float(formula(operands, results, dict(params["attributes"])))
    if products_only or name in _FREE or name == "ffi_call" or not hasattr(result, "size"):
        return 0.0
    if name.startswith(_REDUCE):
        return float(eqn.invars[0].aval.size)
    return float(eqn.invars[-1].aval.size if name.startswith("scatter") else result.size)


def _times(eqn: Any) -> float:
    """How often an operation runs what is in it."""
    name, params = eqn.primitive.name, eqn.params
    if name == "pallas_call":
        return math.prod(params["grid_mapping"].grid)
    if name == "shard_map":  # what is in it, is of one device
        manual = params.get("manual_axes", params["mesh"].axis_names)
        return math.prod(params["mesh"].shape[axis] for axis in manual)
    return 1


def parts_of(eqn: Any) -> list[Any]:
    """The jaxprs among the parameters of an equation."""
    return list(_jaxprs(eqn.params.values()))


def _jaxprs(values: Any) -> Iterator[Any]:
    for value in values:
        if hasattr(value, "eqns") or hasattr(value, "jaxpr"):
            yield value
        elif isinstance(value, list | tuple):
            yield from _jaxprs(value)
