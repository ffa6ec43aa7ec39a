"""The ledger: what it enters, prints and draws."""

import json
from typing import NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import matplotlib.image
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import Ledger, find_slots, priorityprop, scale_by_priority

PARAMS = {
    f"Dense_{i}": {"kernel": np.ones((3, 2), np.float32), "bias": np.ones(2, np.float32)}
    for i in range(3)
}
STEPS, EVERY = 12, 4
TX = optax.chain(optax.clip(1.0), scale_by_priority(0.5, 0, 8, EVERY))
UPDATE = jax.jit(TX.update)


def run():
    state, ledger = TX.init(PARAMS), Ledger(find_slots(PARAMS))
    ledger.record(state)
    for i in range(STEPS):
        grads = jax.tree.map(lambda x, i=i: x * np.float32(i + 1), PARAMS)
        grads["Dense_1"]["bias"] = grads["Dense_1"]["bias"] * np.float32("nan")
        _, state = UPDATE(grads, state)
        if (i + 1) % EVERY == 0:
            ledger.record(state)
    return ledger, state[1]


def test_rows_are_the_state():
    ledger, state = run()
    rows = ledger.rows()
    assert [row["slot"] for row in rows] == list(find_slots(PARAMS).names)
    assert [row["updates"] for row in rows] == state.update_counts.tolist()
    assert [row["granted"] for row in rows] == state.allocation.tolist()
    assert (
        [row["non-finite"] for row in rows] == state.nonfinite_counts.tolist() == [0, 0, 3, 0, 0, 0]
    )
    np.testing.assert_allclose([row["priority"] for row in rows], state.priorities)
    assert ledger.total == int(state.update_counts.sum()) == 36
    assert sum(row["share"] for row in rows) == pytest.approx(1)
    assert rows[0]["shape"] == "2" and rows[1]["shape"] == "3x2" and rows[0]["depth"] == 2
    assert ledger.steps == [0, 4, 8, 12] and [sum(x) for x in ledger.history] == [0, 12, 24, 36]


def test_survives_json():
    ledger, _ = run()
    again = Ledger.from_dict(json.loads(json.dumps(ledger.as_dict())))
    assert again.as_dict() == ledger.as_dict()
    assert str(again) == str(ledger) and again.to_markdown() == ledger.to_markdown()
    for broken in (
        {},
        {"slots": 3},
        {**ledger.as_dict(), "history": {"steps": [1], "update_counts": []}},
    ):
        with pytest.raises(ValueError, match="not a ledger"):
            Ledger.from_dict(broken)


def test_table_is_aligned():
    ledger, _ = run()
    lines = str(ledger).splitlines()
    assert len(lines) == 1 + 6 + 1 + 1
    assert {line.index("%") for line in lines[1:-1]} == {lines[0].index("share") + 4}
    assert len({len(line) for line in lines[:-1]}) == 1
    assert lines[-2].split()[:3] == ["total", "36", "100.0%"]
    assert lines[-1] == "step 12, 6 slots, budget clamped in 0 cycles"
    markdown = ledger.to_markdown().splitlines()
    assert {line.count("|") for line in markdown[:-2]} == {9}


def test_finds_the_state_inside_a_flax_optimizer():
    model = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, priorityprop(optax.adam(0.1), 2, 1, 2, 1), wrt=nnx.Param)

    @nnx.jit
    def step(model, optimizer):
        optimizer.update(model, nnx.grad(lambda m: jnp.sum(m(jnp.ones((1, 3)))))(model))

    step(model, optimizer)
    ledger = Ledger(find_slots(nnx.state(model, nnx.Param)))
    ledger.record(optimizer.opt_state)
    assert ledger.total == 2 and ledger.names == ("bias", "kernel")


def test_recording_a_step_again_replaces_it():
    ledger, state = run()
    ledger.record(state)
    assert ledger.steps == [0, 4, 8, 12]


class Features(NamedTuple):
    """A state of another engine: it counts features and has neither NaN nor clamping to tell of."""

    step: np.ndarray
    update_counts: np.ndarray
    priorities: np.ndarray
    allocation: np.ndarray


def test_reads_any_state_that_counts_and_says_its_unit(tmp_path):
    slots = find_slots({"a|b": np.ones(2), "c": np.ones(3)})
    ledger = Ledger(slots, unit="features")
    state = Features(*map(np.asarray, (4, [3, 1], [0.5, 0.25], [6, 2])))
    ledger.record((optax.EmptyState(), {"inner": state}))
    assert ledger.total == 4 and ledger.rows()[0]["features"] == 3
    assert ledger.rows()[0]["share"] == 0.75 and "non-finite" not in ledger.rows()[0]
    lines = str(ledger).splitlines()
    assert lines[0].split() == [
        "slot",
        "depth",
        "shape",
        "features",
        "share",
        "priority",
        "granted",
    ]
    assert lines[-2].split() == ["total", "4", "100.0%", "8"]
    assert lines[-1] == "step 4, 2 slots"
    assert r"| a\|b | " in ledger.to_markdown()
    again = Ledger.from_dict(json.loads(json.dumps(ledger.as_dict())))
    assert str(again) == str(ledger) and again.as_dict() == ledger.as_dict()
    labels = []
    with mock.patch("matplotlib.axes.Axes.set_ylabel", lambda self, text: labels.append(text)):
        ledger.plot(tmp_path / "features.png")
    assert labels == ["share of features"]


def test_reads_records_from_before_units():
    ledger, _ = run()
    record = ledger.as_dict()
    del record["unit"]
    assert Ledger.from_dict(record).as_dict() == ledger.as_dict()


def test_what_is_not_a_budgeted_state_is_refused():
    ledger, state = run()
    with pytest.raises(ValueError, match="expected one state with the fields update_counts"):
        ledger.record(optax.adam(0.1).init(PARAMS))
    with pytest.raises(ValueError, match="got 2"):
        ledger.record((state, state))
    with pytest.raises(ValueError, match="has 1 slots"):
        Ledger(find_slots({"a": jnp.ones(1)})).record(state)


@pytest.mark.parametrize("layers", [1, 3, 40])
def test_draws_a_picture(tmp_path, layers):
    params = {f"layer_{i}": np.ones(2, np.float32) for i in range(layers)}
    state, ledger = scale_by_priority(0.5).init(params), Ledger(find_slots(params))
    for step in range(6):
        ledger.record(state._replace(step=step, update_counts=np.full(layers, 2 * step)))
    path = ledger.plot(tmp_path / "priorities.png")
    image = matplotlib.image.imread(path)
    assert image.shape[0] > 400 and image.shape[1] > 800
    colors = {tuple(c) for c in np.round(image[::7, ::7, :3] * 255).astype(int).reshape(-1, 3)}
    assert len(colors) > min(layers, 3) + 1


def test_an_empty_ledger_prints_and_says_why_it_cannot_be_drawn(tmp_path):
    ledger = Ledger(find_slots(PARAMS))
    assert "step 0" in str(ledger)
    with pytest.raises(ValueError, match="nothing has been spent"):
        ledger.plot(tmp_path / "x.png")
    assert not list(tmp_path.iterdir())
