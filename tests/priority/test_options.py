"""Budgets for any number of slots: the default fits, what was asked for is checked."""

import inspect
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from priorityprop_jax import PriorityPropTrainer, priorityprop, scale_by_priority
from priorityprop_jax.core.selection import resolve_k
from priorityprop_jax.priority.options import DEFAULT_BUDGET, Options

REST = ("even", "mean", 0.0, 1.1, None, None, None, None, "priorityprop")  # as they are by default
FACES = {
    "wrap": lambda **options: priorityprop(optax.sgd(0.1), **options),
    "scale": scale_by_priority,
}


def granted(face, slots, **options):
    """Updates that the first cycle hands out."""
    params = {f"layer_{i}": np.full(2, 1.0 + i, np.float32) for i in range(slots)}
    tx = FACES[face](**options)
    _, state = jax.jit(tx.update)(params, tx.init(params), params)
    assert int(state.clamped_cycles) == 0
    return int(state.allocation.sum())


@pytest.mark.parametrize("face", FACES)
@pytest.mark.parametrize("slots", [1, 2, 10, 199])
def test_the_default_is_a_hundred_for_ten_slots(face, slots):
    assert granted(face, slots) == 10 * slots


def test_the_default_stays_within_the_bounds_of_a_slot():
    assert granted("scale", 3, min_updates=12) == 36
    assert granted("scale", 3, max_updates=4) == 12
    assert granted("scale", 3, max_updates=jnp.int32(4)) == 12
    assert granted("wrap", 3, min_updates=jnp.int32(12)) == 36


def test_a_hundred_that_was_asked_for_is_a_hundred():
    assert granted("scale", 10, total_budget=100) == 100
    for slots, match in ((2, "can take 40: lower total_budget"), (199, "need 199: raise")):
        with pytest.raises(ValueError, match=match) as error:
            granted("wrap", slots, total_budget=100)
        assert "the default fits every number of slots" in str(error.value)


@pytest.mark.parametrize("face", [priorityprop, scale_by_priority])
def test_the_signature_shows_the_default(face):
    assert "total_budget: 'Budget' = 100," in str(inspect.signature(face))
    assert DEFAULT_BUDGET == 100


@pytest.mark.parametrize("layers", [1, 2, 25])
def test_a_trainer_takes_a_model_of_any_size(layers):
    params = [{"w": np.ones(2, np.float32), "b": np.ones(2, np.float32)} for _ in range(layers)]
    loss = lambda params, batch: sum(jnp.sum(x) for x in jax.tree.leaves(params)) * batch  # noqa: E731
    trainer = PriorityPropTrainer(params, optax.sgd(0.1), loss, progress=False)
    trainer.train([np.float32(1.0)], epochs=1)
    ledger = trainer.get_priority_report()
    assert sum(ledger.vectors["allocation"]) == 20 * layers


def test_fractions_are_meant_as_they_are_written():
    for percent in range(1, 101):
        for slots in (1, 7, 15, 25, 29, 50, 100):
            exact = Fraction(percent, 100) * slots
            assert resolve_k(percent / 100, slots) == max(1, round(exact))
            budget = Options(percent / 100, 0, 10, 10, *REST).budget(percent / 100, slots)
            assert budget == math.floor(10 * exact + Fraction(1, 2))


def test_what_an_int32_cannot_count_is_refused_or_clamped():
    params = {name: jnp.ones(2) for name in "abc"}
    for budget in (jnp.int32(5), DEFAULT_BUDGET):
        with pytest.raises(ValueError, match="lower min_updates"):
            scale_by_priority(budget, 2**30, 2**31 - 1).init(params)
    tx = scale_by_priority(jnp.int32(5), jnp.int32(2**30), 2**31 - 1)
    _, state = jax.jit(tx.update)(params, tx.init(params))
    assert state.allocation.tolist() == [(2**31 - 1) // 3] * 3 and int(state.clamped_cycles) == 1
