"""The choice under a budget against brute force; the policies against what their papers say."""

import dataclasses
import itertools
import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from priorityprop_jax import find_slots
from priorityprop_jax.partial import policies
from priorityprop_jax.partial.choose import choose_active
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.partial.policies import Situation, make_policy

properties = settings(derandomize=True, deadline=None, max_examples=150)


def make_costs(own, floors):
    return StepCosts(tuple(own), tuple(floors))


def cost_of(chosen, depths, costs):
    deepest = max((d for d, on in zip(depths, chosen, strict=True) if on), default=0)
    return costs.floors[deepest] + sum(c for c, on in zip(costs.own, chosen, strict=True) if on)


def brute_force(values, depths, costs, budget, always=()):
    """The most that any set is worth which the budget pays, or None."""
    best = None
    for chosen in itertools.product([False, True], repeat=len(values)):
        if not all(chosen[i] for i in always) or cost_of(chosen, depths, costs) > budget:
            continue
        worth = sum(v for v, on in zip(values, chosen, strict=True) if on)
        best = worth if best is None else max(best, worth)
    return best


@st.composite
def problems(draw, costs, values):
    n = draw(st.integers(1, 8))
    count = draw(st.integers(1, 4))
    depths = draw(st.lists(st.integers(0, count - 1), min_size=n, max_size=n))
    own = draw(st.lists(costs, min_size=n, max_size=n))
    floors = np.cumsum(draw(st.lists(costs, min_size=count, max_size=count))).tolist()
    values = draw(st.lists(values, min_size=n, max_size=n))
    always = draw(st.sets(st.integers(0, n - 1), max_size=2))
    return values, depths, make_costs(own, floors), always


# The choice.


@properties
@given(problems(st.integers(0, 9), st.integers(0, 20)), st.integers(1, 60))
def test_the_choice_is_the_best_of_all(problem, budget):
    values, depths, costs, always = problem
    chosen = choose_active(values, depths, costs, budget, always=always, resolution=budget)
    best = brute_force(values, depths, costs, budget, always)
    if best is None:
        assert set(np.flatnonzero(chosen)) == always
        return
    assert cost_of(chosen, depths, costs) <= budget
    assert all(chosen[i] for i in always)
    assert sum(v for v, on in zip(values, chosen, strict=True) if on) == best


FLOATS = st.floats(0.0, 10.0, allow_subnormal=False)


@pytest.mark.parametrize("resolution", [7, 64, 4096])
def test_the_budget_is_never_exceeded(resolution):
    rng = np.random.default_rng(resolution)
    chosen_slots = 0
    for _ in range(300):
        n = int(rng.integers(1, 9))
        costs = make_costs(rng.exponential(2.0, n), np.cumsum(rng.exponential(2.0, 4)))
        depths, budget = rng.integers(0, 4, n).tolist(), rng.uniform(1.0, 30.0)
        chosen = choose_active(rng.random(n), depths, costs, budget, resolution=resolution)
        chosen_slots += chosen.sum()
        if chosen.any():
            assert cost_of(chosen, depths, costs) <= budget * (1 + 1e-9)
    assert chosen_slots > 300


@properties
@given(problems(FLOATS, st.floats(0.0, 1e3)), st.floats(0.5, 50.0))
def test_a_fine_resolution_is_close_to_the_best(problem, budget):
    values, depths, costs, _ = problem
    chosen = choose_active(values, depths, costs, budget)
    best = brute_force(values, depths, costs, budget * (1 - 0.005))  # 9 roundings up of 1 / 4096
    if best is not None:
        found = sum(v for v, on in zip(values, chosen, strict=True) if on)
        assert found >= best * (1 - 1e-9)


def test_odd_values_count_as_nothing():
    costs = make_costs([1.0] * 5, [1.0])
    odd = [np.nan, np.inf, -np.inf, -3.0, 2.0]
    chosen = choose_active(odd, [0] * 5, costs, 10.0)
    assert chosen.tolist() == [False, False, False, False, True]
    assert not choose_active(np.zeros(5), [0] * 5, costs, 10.0).any()


def test_always_is_active_whatever_the_budget_and_pays_for_its_depth():
    costs = make_costs([1, 1, 1], [1, 2, 3])
    assert choose_active([9, 9, 9], [0, 1, 2], costs, 0.5, always=[2]).tolist() == [0, 0, 1]
    # With the deepest slot the floor is 3 anyway, and 2 are left of 5: one for the second.
    chosen = choose_active([0, 9, 0], [0, 1, 2], costs, 5, always=[2], resolution=5)
    assert chosen.tolist() == [False, True, True]
    assert choose_active([5, 4, 0], [0, 1, 2], costs, 5, always=[2], resolution=5).tolist() == [
        True, False, True,
    ]  # fmt: skip


def test_no_slots():
    assert choose_active([], [], make_costs([], [1.0]), 1.0).tolist() == []


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"values": [1.0]}, "1 values, 2 depths and 2 own costs"),
        ({"depths": [0]}, "2 values, 1 depths"),
        ({"depths": [0, 5]}, "slots at depth 5, but 2 floors"),
        ({"budget": 0.0}, "budget must be finite and above 0"),
        ({"budget": math.inf}, "budget must be finite"),
        ({"budget": math.nan}, "budget must be finite"),
        ({"costs": make_costs([1.0, -1.0], [1.0, 2.0])}, "must not be negative"),
        ({"costs": make_costs([1.0, 1.0], [-1.0, 2.0])}, "must not be negative"),
    ],
)
def test_errors_of_the_choice(changes, match):
    arguments = {
        "values": [1.0, 2.0],
        "depths": [0, 1],
        "costs": make_costs([1.0, 1.0], [1.0, 2.0]),
        "budget": 5.0,
    }
    with pytest.raises(ValueError, match=match):
        choose_active(**(arguments | changes))


# Policies.

DEEPEST = 5
SLOTS = find_slots(
    {
        "embed": {"table": 1.0},
        **{f"layer_{i}": {"kernel": 1.0, "bias": 1.0} for i in range(4)},
        "head": {"kernel": 1.0},
    }
)
COSTS = make_costs([1.0] * len(SLOTS), [4.0, 6.0, 8.0, 10.0, 12.0, 14.0])
FULL = 14.0 + len(SLOTS)
HEAD, EMBED = "head/kernel", "embed/table"


def situation(**changes):
    fields = {
        "slots": SLOTS,
        "costs": COSTS,
        "budget": 0.5 * FULL,
        "full": FULL,
        "cycle": 1,
        "steps": 4,
        "values": np.ones(len(SLOTS)),
        "update_counts": np.zeros(len(SLOTS), int),
    }
    return Situation(**(fields | changes))


def layers_of(active):
    """The depths that a set is of; checks that it has all slots of each."""
    depths = {d for name, d in zip(SLOTS.names, SLOTS.depths, strict=True) if name in active}
    assert active == situation().at_depths(depths)
    return depths


def one(policy, **changes):
    """The one active set of a cycle."""
    at = situation(**changes)
    sets = policy(at)
    assert len(sets) == at.steps and len(set(sets)) == 1
    return sets[0]


def test_the_slots_are_as_the_tests_say():
    depths = dict(zip(SLOTS.names, SLOTS.depths, strict=True))
    assert depths[HEAD] == 0 and depths[EMBED] == DEEPEST
    assert depths["layer_3/kernel"] == 1


def test_full_and_suffix():
    assert one(make_policy("full")) == frozenset(SLOTS.names)
    for cycle in range(3):
        assert layers_of(one(make_policy("suffix(0)"), cycle=cycle)) == {0}
        assert layers_of(one(make_policy("suffix(2)"), cycle=cycle)) == {0, 1, 2}
    assert one(make_policy("suffix(99)")) == frozenset(SLOTS.names)


def test_lisa_draws_middle_layers_beside_input_and_output():
    policy = make_policy("lisa(2)")
    drawn = []
    for cycle in range(300):
        depths = layers_of(one(policy, cycle=cycle))
        assert {0, DEEPEST} <= depths and len(depths) == 4
        assert depths == layers_of(one(policy, cycle=cycle))  # a function of seed and cycle
        drawn.append(frozenset(depths - {0, DEEPEST}))
    pairs = Counter(drawn)
    assert len(pairs) == 6  # of 4 layers; each expected 50 times
    assert min(pairs.values()) > 25 and max(pairs.values()) < 80
    other = [layers_of(one(policy, cycle=cycle, seed=1)) for cycle in range(20)]
    assert other != [layers_of(one(policy, cycle=cycle)) for cycle in range(20)]
    assert one(make_policy("lisa(9)")) == frozenset(SLOTS.names)


@pytest.mark.parametrize("k", [1, 2, 3])
def test_badam_takes_turns_from_the_output_inwards(k):
    policy = make_policy(f"badam({k})")
    turns = [layers_of(one(policy, cycle=cycle)) for cycle in range(8)]
    assert all(0 in depths and DEEPEST not in depths for depths in turns)
    layers = [sorted(depths - {0}) for depths in turns]
    period = math.ceil(4 / k)
    assert [d for turn in layers[:period] for d in turn] == [1, 2, 3, 4]
    assert all(len(turn) <= k for turn in layers)
    assert layers[period:] == layers[: 8 - period]


@pytest.mark.parametrize("name", ["lisa(1)", "badam(1)", "suffix(1)", "random", "priority"])
@pytest.mark.parametrize("layers", [1, 2])
def test_models_without_middle_layers(name, layers):
    slots = find_slots({f"Dense_{i}": 1.0 for i in range(layers)})
    costs = make_costs([1.0] * layers, [1.0, 2.0][:layers])
    at = Situation(slots, costs, 3.0, 4.0, 1, 2, np.ones(layers), np.zeros(layers, int))
    sets = make_policy(name)(at)
    assert len(sets) == 2
    assert all(f"Dense_{layers - 1}" in active for active in sets)


def test_random_is_uniform_within_the_budget():
    policy = make_policy("random")
    # Two slots more at depth 4 are just paid; the input layer at depth 5 is not.
    budget = COSTS.floors[4] + 1 + 2
    drawn = Counter()
    for cycle in range(600):
        active = one(policy, cycle=cycle, budget=budget)
        assert situation().cost(active) <= budget and HEAD in active
        layers_of(active)
        # The layer drawn first is in whatever it costs: by then the budget pays for each.
        first = situation(cycle=cycle).rng().permutation([1, 2, 3, 4, 5])[0]
        drawn[first] += 1
        assert (first in layers_of(active)) == (first < 5 or budget >= 14 + 2)
    assert min(drawn.values()) > 80 and max(drawn.values()) < 160


def test_random_leaves_no_room_for_another_layer():
    policy = make_policy("random")
    for cycle, share in itertools.product(range(30), (0.3, 0.5, 0.8)):
        at = situation(cycle=cycle, budget=share * FULL)
        active = one(policy, cycle=cycle, budget=share * FULL)
        for depth in set(SLOTS.depths) - layers_of(active):
            assert at.cost(active | at.at_depths([depth])) > at.budget


def test_a_random_budget_too_small_leaves_the_output_layer():
    assert one(make_policy("random"), budget=0.1) == {HEAD}


@pytest.mark.parametrize("make", [policies.at_random, policies.by_priority])
def test_without_slots_that_are_always_active_something_is(make):
    unknown = np.full(len(SLOTS), np.nan)
    for cycle in range(4):
        at = situation(cycle=cycle, budget=0.1, values=unknown)
        assert all(active >= {HEAD} for active in make(always=())(at))


# PriorityProp's own.


def test_the_first_cycle_starts_with_everything():
    at = situation(cycle=0, values=np.full(len(SLOTS), np.nan))
    sets = make_policy("priority")(at)
    assert sets[0] == frozenset(SLOTS.names)
    assert sets[1:] == [sets[1]] * 3 and HEAD in sets[1]
    assert sum(map(at.cost, sets)) <= at.budget * at.steps + 1e-9


@pytest.mark.parametrize("share", [0.3, 0.5, 0.9])
@pytest.mark.parametrize("steps", [1, 2, 3])
def test_no_step_scores_where_its_cycle_cannot_make_up_for_it(steps, share):
    for cycle in range(20):
        at = situation(cycle=cycle, steps=steps, budget=share * FULL)
        sets = policies.by_priority(scoring_share=1.0)(at)
        left = FULL + (steps - 1) * at.cost({HEAD}) - steps * at.budget
        if left > 0.1 * steps * at.budget:
            assert at.everything not in sets
        elif cycle == 0:
            assert sets[0] == at.everything


def test_what_was_never_updated_counts_as_the_best():
    values = np.full(len(SLOTS), 0.1)
    tried = frozenset({"layer_3/kernel"})
    values[SLOTS.names.index(*tried)] = np.nan
    values[SLOTS.names.index("layer_2/kernel")] = np.inf  # tells nothing
    policy = policies.by_priority(scoring_share=0.0)
    budget = COSTS.of(SLOTS, [HEAD, *tried]) + 0.1
    equal = np.full(len(SLOTS), 0.1)
    counts = np.array([9 if name not in tried else 1 for name in SLOTS.names])
    given = {"budget": budget, "update_counts": counts}
    assert one(policy, **given, values=values) == one(policy, **given, values=equal)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [7, 12])
def test_scoring_spends_its_share_and_no_more(share, steps):
    policy = policies.by_priority(scoring_share=share)
    cycles, budget = 200, 0.3 * FULL
    scored = 0
    for cycle in range(1, cycles):
        sets = policy(situation(cycle=cycle, budget=budget, steps=steps))
        assert len(sets) == steps
        scored += sets[0] == frozenset(SLOTS.names)
        assert scored * FULL <= share * budget * steps * (cycle + 1) + 1e-6
    if steps * 0.3 * share <= 1:  # at most one a cycle
        assert (scored + 2) * FULL >= share * budget * steps * cycles


@pytest.mark.parametrize("cycle", [0, 1, 2, 3, 9])
def test_a_cycle_costs_no_more_than_its_budget(cycle):
    rng = np.random.default_rng(cycle)
    policy = policies.by_priority(scoring_share=0.5)
    for share in (0.3, 0.45, 0.6, 0.9, 1.0):
        steps = 8
        at = situation(
            cycle=cycle,
            steps=steps,
            budget=share * FULL,
            values=rng.random(len(SLOTS)),
            update_counts=rng.integers(0, 9, len(SLOTS)),
        )
        sets = policy(at)
        cheapest = at.everything if cycle == 0 else frozenset()
        scoring = sets[0] == at.everything
        least = scoring * at.full + (steps - scoring) * at.cost({HEAD})
        assert sum(map(at.cost, sets)) <= max(at.budget * steps, least) + 1e-9
        assert sets[0] >= cheapest and all(HEAD in active for active in sets)


def test_what_is_worth_most_is_chosen():
    # The budget pays for the chain to the input, the head, and two slots more.
    budget = COSTS.floors[DEEPEST] + 3.1  # costs are rounded up
    values = np.full(len(SLOTS), 0.1)
    values[SLOTS.names.index(EMBED)] = 50.0
    values[SLOTS.names.index("layer_0/bias")] = 20.0
    policy = policies.by_priority(scoring_share=0.0)
    assert one(policy, budget=budget, values=values) == {HEAD, EMBED, "layer_0/bias"}
    # A deep slot that is worth little is not worth its chain.
    values[:] = 1.0
    assert max(layers_of_any(one(policy, budget=budget, values=values))) < DEEPEST
    # Nothing is worth anything: the output layer alone.
    assert one(policy, budget=budget, values=np.zeros(len(SLOTS))) == {HEAD}


def layers_of_any(active):
    return {d for name, d in zip(SLOTS.names, SLOTS.depths, strict=True) if name in active}


def test_the_count_discount_rotates_between_equal_slots():
    policy = policies.by_priority(scoring_share=0.0, always=())
    costs = make_costs([1.0] * len(SLOTS), [4.0] * (DEEPEST + 1))
    counts = np.zeros(len(SLOTS), int)
    for cycle in range(1, 41):
        # Four of ten slots at a time.
        active = one(policy, costs=costs, budget=8.0, cycle=cycle, update_counts=counts)
        assert len(active) == 4
        counts += np.isin(SLOTS.names, list(active))
    assert counts.max() - counts.min() <= 1


def test_policies_that_need_costs_say_so():
    for name in ("priority", "random"):
        with pytest.raises(ValueError, match="measure_costs"):
            make_policy(name)(situation(costs=None))
    for name in ("full", "suffix(1)", "lisa(1)", "badam(1)"):
        make_policy(name)(situation(costs=None))


# Names of policies.


def test_names_of_policies():
    assert layers_of(one(make_policy("suffix:2"))) == {0, 1, 2}
    own = lambda at: [at.everything] * at.steps  # noqa: E731
    assert make_policy(own) is own


@pytest.mark.parametrize(
    ("policy", "error", "match"),
    [
        ("", ValueError, "no policy ''"),
        ("best", ValueError, "the policies are priority"),
        ("Suffix(1)", ValueError, "no policy"),
        ("suffix(-1)", ValueError, "no policy"),
        ("suffix(1.5)", ValueError, "no policy"),
        ("suffix", ValueError, r"written suffix\(k\)"),
        ("full(2)", ValueError, "written full"),
        ("lisa(0)", ValueError, "from 1 on, got 'lisa.0.'"),
        ("badam(0)", ValueError, "from 1 on, got 'badam.0.'"),
        (3, TypeError, "a name or a function"),
        (None, TypeError, "a name or a function"),
    ],
)
def test_wrong_policies(policy, error, match):
    with pytest.raises(error, match=match):
        make_policy(policy)


def test_step_cost_counts_the_deepest_floor_once():
    assert COSTS.of(SLOTS, {HEAD}) == 5.0
    assert COSTS.of(SLOTS, {EMBED}) == 15.0
    assert COSTS.of(SLOTS, {EMBED, HEAD, "layer_0/bias"}) == 17.0
    assert COSTS.of(SLOTS, ()) == 4.0
    assert COSTS.of(SLOTS, SLOTS.names) == FULL
    assert situation().cost(SLOTS.names) == FULL


def test_situations_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        situation().cycle = 3
