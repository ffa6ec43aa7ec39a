"""What is spent is what was asked for: within 2 % over any 50 cycles."""

import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import find_slots, partial
from priorityprop_jax.partial.account import Account
from priorityprop_jax.partial.costs import StepCosts
from priorityprop_jax.partial.planner import Options, Planner
from priorityprop_jax.training import Trainer

pytestmark = pytest.mark.usefixtures("quickly_compiled")

WINDOW, CYCLES = 50, 120


def windows(spent, asked):
    """The mean of each 50 cycles in a row, as a share of what was asked for."""
    return np.convolve(spent, np.ones(WINDOW) / WINDOW, "valid") / asked


def simulated(policy, share, *, layers, steps, each=1, dearer=1.0, noise=0.0, hits=None):
    """What cycles cost of a model with random costs, whose steps may cost other than planned.

    With ``hits`` that share of the steps finds its prefix in a cache, drawn cycle by cycle.
    """
    rng = np.random.default_rng((layers, steps, each))
    slots = find_slots({f"Dense_{i:02d}": {f"w{j}": 1.0 for j in range(each)}
                        for i in range(layers)})  # fmt: skip
    own, floors = rng.uniform(0.5, 2, len(slots)), np.cumsum(rng.uniform(0.2, 1, layers))
    floors += floors[-1] / 4
    costs = StepCosts(tuple(own.tolist()), tuple(floors.tolist()))
    front = np.linspace(floors[0] / 2, 0, layers) if hits is not None else None
    account = Account(slots)
    account.full_flops = costs.full
    planner = Planner(
        Options(policy, ("share", share), steps, None, 8, "keep", None, 0.9, 0, {}), slots, account
    )
    planner.know(costs, front)
    spent, counts = [], np.zeros(len(slots), int)
    worth = rng.exponential(size=len(slots))
    for _ in range(CYCLES):
        values = np.where(counts > 0, worth * rng.uniform(0.5, 1.5, len(slots)), np.nan)
        counts += planner.new_cycle(values, counts)
        before, rate = account.charged, rng.random() if hits is None else hits * rng.uniform(0, 2)
        while planner.plan:
            active = planner.plan.pop(0)
            cost = costs.of(slots, active) * dearer * (1 + noise * rng.normal())
            cached = front is not None and rng.random() < rate
            if front is not None and cached:
                cost -= front[max(slots.depths[slots.names.index(name)] for name in active)]
            account.charge(active, cost, planner.charge(active, cost, cached), cached)
        spent.append(account.charged - before)
    return windows(spent, share * costs.full * steps)


@pytest.mark.parametrize("share", [0.5, 0.6, 0.8, 1.0])
@pytest.mark.parametrize("policy", ["random", "priority"])
def test_a_budget_is_kept_over_any_50_cycles(policy, share):
    for layers, steps, each in ((4, 5, 1), (3, 10, 2), (6, 5, 1), (12, 10, 3), (30, 5, 1)):
        found = simulated(policy, share, layers=layers, steps=steps, each=each)
        np.testing.assert_allclose(found, 1, atol=0.02)


@pytest.mark.parametrize("policy", ["random", "priority"])
@pytest.mark.parametrize(
    "otherwise",
    [{"dearer": 1.1}, {"dearer": 0.9}, {"noise": 0.1}, {"hits": 0.5}, {"hits": 0.0}],
    ids=str,
)
def test_steps_that_cost_other_than_planned_are_made_up_for(policy, otherwise):
    found = simulated(policy, 0.65, layers=8, steps=10, **otherwise)
    np.testing.assert_allclose(found, 1, atol=0.02)


@pytest.mark.parametrize("steps", [1, 2, 3, 4])
@pytest.mark.parametrize("policy", ["random", "priority"])
def test_short_cycles_keep_it(policy, steps):
    for layers, each in ((4, 1), (6, 2), (12, 3)):
        for share in (0.4, 0.5, 0.8):
            found = simulated(policy, share, layers=layers, steps=steps, each=each)
            np.testing.assert_allclose(found, 1, atol=0.02)


@pytest.mark.parametrize("policy", ["random", "priority"])
@pytest.mark.parametrize("share", [0.5, 0.75])
def test_programs_that_run_cost_what_was_asked_for(policy, share):
    rng = np.random.default_rng(0)
    params = {f"Dense_{i}": rng.normal(size=(16, 16)).astype(np.float32) / 4 for i in range(4)}

    def loss_fn(params, x):
        for name in sorted(params):
            x = jnp.tanh(x @ params[name])
        return jnp.mean((x - 0.5) ** 2)

    step = partial.step(policy, share=share, recalc_every=5, max_variants=32)
    trainer = Trainer(params, optax.adam(1e-3), loss_fn, step, progress=False)
    cycles = WINDOW + 10
    history = trainer.train([np.ones((64, 16), np.float32)] * (5 * cycles))
    spent = np.reshape(history.column("flops"), (cycles, 5)).sum(1)
    full = trainer.get_step_report()["full_flops"] / (5 * cycles)
    np.testing.assert_allclose(windows(spent, share * full * 5), 1, atol=0.02)
    assert trainer.get_step_report()["share"] == pytest.approx(share, abs=0.02)
