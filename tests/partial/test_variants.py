"""A few programs for many active sets: supersets, few of them, and the cheap ones."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax.partial.variants import Variants, merge_upward

properties = settings(derandomize=True, deadline=None, max_examples=150)
FULL = frozenset("abcde")
WEIGHTS = dict(zip("abcde", (1.0, 2.5, 4.0, 7.0, 11.0), strict=True))
SETS = st.frozensets(st.sampled_from("abcde"))
PLANS = st.lists(SETS, max_size=8)


def weight(names):
    return sum(WEIGHTS[name] for name in names)


def total(merged, plan, cost):
    return sum(cost(merged[names]) for names in plan)


def partitions(items):
    """All partitions of a list into groups."""
    if not items:
        yield []
        return
    first, rest = items[0], items[1:]
    for groups in partitions(rest):
        yield [[first], *groups]
        for i, group in enumerate(groups):
            yield [*groups[:i], [first, *group], *groups[i + 1 :]]


def cheapest(plan, most, cost):
    """What the best merge costs, by trying all."""
    kinds = sorted(set(plan), key=sorted)
    return min(
        sum(
            plan.count(names) * cost(frozenset().union(*group))
            for group in groups
            for names in group
        )
        for groups in partitions(kinds)
        if len(groups) <= most
    )


@properties
@given(PLANS, st.integers(1, 6), st.sampled_from([len, weight]))
def test_merged_sets_are_few_supersets(plan, most, cost):
    merged = merge_upward(plan, most, cost)
    assert merged.keys() == set(plan)
    assert all(merged[names] >= names for names in plan)
    assert len(set(merged.values())) <= most
    if len(set(plan)) <= most:
        assert all(merged[names] == names for names in plan)
    assert merged == merge_upward(list(plan), most, cost)
    # Only unions of what the plan wants are run.
    for to in set(merged.values()):
        assert to == frozenset().union(*(names for names in plan if merged[names] == to))


@properties
@given(PLANS.filter(lambda plan: len(set(plan)) > 1))
def test_one_merge_is_the_best_of_all(plan):
    most = len(set(plan)) - 1
    merged = merge_upward(plan, most, weight)
    assert total(merged, plan, weight) == pytest.approx(cheapest(plan, most, weight))
    merged = merge_upward(plan, 1, weight)
    assert total(merged, plan, weight) == pytest.approx(cheapest(plan, 1, weight))


@pytest.mark.parametrize("most", [1, 2, 3, 4])
def test_merges_of_nested_sets_are_close_to_the_best(most):
    chain = [frozenset("abcde"[:n]) for n in range(1, 6)]
    for counts in itertools.product((1, 4), repeat=5):
        plan = [names for names, n in zip(chain, counts, strict=True) for _ in range(n)]
        found = total(merge_upward(plan, most, weight), plan, weight)
        best = cheapest(plan, most, weight)
        assert best <= found <= 1.25 * best + 1e-9


def test_how_often_a_set_occurs_counts():
    a, b, c = frozenset("a"), frozenset("ab"), frozenset("abc")
    assert merge_upward([a] * 9 + [b, c], 2) == {a: a, b: c, c: c}
    assert merge_upward([a] + [b] * 9 + [c], 2) == {a: b, b: b, c: c}


def test_the_cost_decides():
    plan = [frozenset("a"), frozenset("b"), frozenset("e")]
    assert merge_upward(plan, 2, weight)[frozenset("a")] == frozenset("ab")
    dear_a = lambda names: 100.0 * ("a" in names) + len(names)  # noqa: E731
    assert merge_upward(plan, 2, dear_a)[frozenset("b")] == frozenset("be")


def test_nothing_to_merge():
    assert merge_upward([], 1) == {}
    with pytest.raises(ValueError, match="at least 1"):
        merge_upward([FULL], 0)


# Variants.


@properties
@given(st.lists(PLANS, max_size=5), st.integers(1, 5), st.booleans())
def test_variants_are_never_too_many_and_always_supersets(plans, most, one_by_one):
    variants, twin = Variants(FULL, most, weight), Variants(FULL, most, weight)
    if one_by_one:
        plans = [[names] for plan in plans for names in plan]
    for plan in plans:
        chosen = variants.plan(plan)
        assert twin.plan(plan) == chosen
        assert len(chosen) == len(plan)
        for wanted, names in zip(plan, chosen, strict=True):
            assert wanted <= names <= FULL
            assert names in variants.sets
        assert len(variants.sets) == len(set(variants.sets)) <= most
        assert len(variants.sets) < most or FULL in variants.sets  # its place is kept
    assert variants.plan([FULL]) == [FULL]
    assert len(variants.sets) <= most


@properties
@given(PLANS)
def test_what_has_a_place_stays(plan):
    variants = Variants(FULL, 3)
    variants.plan(plan)
    assert all(variants.plan([names]) == [names] for names in list(variants.sets))


def test_the_cheapest_superset_is_chosen():
    variants = Variants(FULL, 3, weight)
    plans = ["ad", "ab", "a", "d", "bd"]
    chosen = [variants.plan([frozenset(names)])[0] for names in plans]
    # 3.5 for ab rather than 8 for ad.
    assert ["".join(sorted(names)) for names in chosen] == ["ad", "ab", "ab", "ad", "abcde"]
    assert variants.sets == [frozenset("ad"), frozenset("ab"), FULL]


def test_a_plan_is_merged_before_places_are_given():
    variants = Variants(FULL, 3)
    a, ab, abcd = frozenset("a"), frozenset("ab"), frozenset("abcd")
    # One by one, the first two would have taken the places.
    assert variants.plan([a, ab, abcd]) == [ab, ab, abcd]
    assert variants.plan([a, frozenset("e")]) == [ab, FULL]


def test_one_variant_is_the_full_one():
    variants = Variants(FULL, 1)
    assert variants.plan([frozenset("a"), FULL, frozenset()]) == [FULL] * 3
    assert variants.sets == [FULL]


@properties
@given(st.lists(SETS, max_size=20), st.integers(1, 3))
def test_exact_variants_run_what_is_asked_for(plan, most):
    variants, built = Variants(FULL, most, exact=True), []
    assert variants.plan(plan) == plan
    used: list[frozenset[str]] = []
    for names in plan:
        known, before = names in used[-most:], len(built)
        program = variants.program(names, "key", lambda names=names: built.append(names) or names)
        assert program == names
        assert len(built) == before + (not known)
        used = [*(other for other in used if other != names), names]
        assert variants.sets == used[-most:]


def test_programs_are_built_once():
    variants, built = Variants(FULL, 2), []

    def build():
        built.append(1)
        return f"program {len(built)}"

    first = variants.program(FULL, "small", build)
    assert variants.program(FULL, "small", build) is first
    assert variants.program(FULL, "large", build) == "program 2"
    assert variants.program(frozenset("a"), "small", build) == "program 3"
    assert len(built) == 3


@pytest.mark.parametrize("most", [0, -1, 1.5, True, "2", None])
def test_wrong_numbers_of_variants(most):
    with pytest.raises(ValueError, match="max_variants must be a whole number"):
        Variants(FULL, most)
