"""A few compiled programs for many active sets."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Generic, TypeVar

Names = frozenset[str]
Program = TypeVar("Program")


def merge_upward(
    sets: Iterable[Names], most: int, cost: Callable[[Names], float] = len
) -> dict[Names, Names]:
    """Merges active sets until they are few, each into a superset.

    The two whose union adds the least cost, weighed by how often they occur, are merged first.

    Args:
      sets: the active sets of a plan, with repetition.
      most: at most so many different sets are left, at least 1.
      cost: of a step with an active set.

    Returns:
      For every set the one to run in its place.

    Raises:
      ValueError: if ``most`` is below 1.

    Example:
      >>> from priorityprop_jax.partial.variants import merge_upward
      >>> plan = [frozenset("abc"), frozenset("ab"), frozenset("a")]
      >>> merged = merge_upward(plan, 2)
      >>> [sorted(merged[names]) for names in plan]
      [['a', 'b', 'c'], ['a', 'b'], ['a', 'b']]
    """
    if most < 1:
        raise ValueError(f"at least 1 set has to be left, got {most}")
    counts = Counter(sets)
    merged = {names: names for names in counts}

    def added(pair: tuple[Names, Names]) -> float:
        return sum(counts[one] * (cost(pair[0] | pair[1]) - cost(one)) for one in pair)

    while len(counts) > most:
        a, b = min(itertools.combinations(sorted(counts, key=sorted), 2), key=added)
        number = counts.pop(a) + counts.pop(b)
        counts[a | b] += number
        merged = {names: a | b if to in (a, b) else to for names, to in merged.items()}
    return merged


class Variants(Generic[Program]):
    """The programs of one run, of at most ``most`` active sets.

    A set gets a program while there is room; then it runs in the cheapest superset that has one.
    Room for the full set is kept from the start, so there always is one.

    Args:
      full: the set of everything.
      most: at most so many sets have programs, at least 1.
      cost: of a step with an active set.
      exact: every set is run as it is; what was not used for longest makes room for its program.

    Attributes:
      sets: the sets that have a place; where they lose it, those used last come last.

    Raises:
      ValueError: if ``most`` is below 1.

    Example:
      >>> from priorityprop_jax.partial.variants import Variants
      >>> variants = Variants(frozenset("abc"), most=2)
      >>> [sorted(names) for names in variants.plan([frozenset("a"), frozenset("b")])]
      [['a', 'b'], ['a', 'b']]
    """

    def __init__(
        self, full: Names, most: int, cost: Callable[[Names], float] = len, *, exact: bool = False
    ) -> None:
        if isinstance(most, bool) or not isinstance(most, int) or most < 1:
            raise ValueError(f"max_variants must be a whole number of at least 1, got {most!r}")
        self.full, self.most, self.cost, self.exact = full, most, cost, exact
        self.sets: list[Names] = []
        self._programs: dict[tuple[Names, Hashable], Program] = {}

    def plan(self, sets: Sequence[Names]) -> list[Names]:
        """For every step of a cycle the set that it wants, or a superset of it that has a place."""
        if self.exact:
            return list(sets)
        fresh = [names for names in sets if names not in self.sets and names != self.full]
        room = self._room()
        merged = merge_upward(fresh, room, self.cost) if fresh and room > 0 else {}
        return [self._choose(merged.get(names, names)) for names in sets]

    def _room(self) -> int:
        return self.most - len(self.sets) - (self.full not in self.sets)

    def _choose(self, wanted: Names) -> Names:
        fitting = [names for names in self.sets if names >= wanted]
        if wanted in fitting or wanted == self.full or self._room() > 0:
            fitting = [wanted]
        elif self.full not in fitting:
            fitting.append(self.full)
        best = min(fitting, key=lambda names: (self.cost(names), sorted(names)))
        if best not in self.sets:
            self.sets.append(best)
        return best

    def program(self, names: Names, key: Hashable, build: Callable[[], Program]) -> Program:
        """The program of a set, built when first asked for; ``key`` tells shapes apart."""
        if self.exact:
            self.sets = [*(other for other in self.sets if other != names), names]
            while len(self.sets) > self.most:
                out = self.sets.pop(0)
                self._programs = {k: p for k, p in self._programs.items() if k[0] != out}
        if (names, key) not in self._programs:
            self._programs[names, key] = build()
        return self._programs[names, key]
