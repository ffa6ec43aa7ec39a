"""Steps within a budget of memory: what runs fits, and what cannot fit is told."""

import functools
import json
import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax import find_slots, partial
from priorityprop_jax.partial import engine
from priorityprop_jax.partial.costs import measure_costs
from priorityprop_jax.partial.policies import by_priority
from priorityprop_jax.partial.stages import chain, function_stage
from priorityprop_jax.training import Trainer

LAYERS, WIDTH, ROWS = 6, 32, 128
X = np.random.default_rng(0).normal(size=(ROWS, WIDTH)).astype(np.float32)
NAMES = [f"Dense_{i}" for i in range(LAYERS)]


def weights():
    rng = np.random.default_rng(1)
    return {name: rng.normal(size=(WIDTH, WIDTH)).astype(np.float32) / 6 for name in NAMES}


def block(p, x):
    return x + jnp.tanh(x @ p)


def loss_fn(params, x):
    for name in NAMES:
        x = block(params[name], x)
    return jnp.mean((x - 1) ** 2)


def trainer(policy="priority", model=None, loss=loss_fn, where=None, **options):
    model = weights() if model is None else model
    make = partial.step(policy, recalc_every=2, **options)
    return Trainer(model, optax.adam(1e-3), loss, make, checkpoint_dir=where, progress=False)


def trained(policy="priority", steps=16, batch=X, **options):
    found = trainer(policy, **options)
    found.train([batch] * steps)
    return found


def sets(found):
    return {frozenset(v["active"]): v["steps"] for v in found.get_step_report()["variants"]}


@functools.cache
def by_hand(active, keep=True):
    """Bytes at the peak of a loop of one's own: parameters, state, batch, and the program's."""
    params, tx = weights(), optax.adam(1e-3)
    part = {name: params.pop(name) for name in sorted(active)}
    state = tx.init(part)

    def step(part, frozen, state, x):
        value, grads = jax.value_and_grad(lambda part: loss_fn(part | frozen, x))(part)
        updates, state = tx.update(grads, state, part)
        return optax.apply_updates(part, updates), state, value

    compiled = jax.jit(step, donate_argnums=(0, 2)).lower(part, params, state, X).compile()
    found = compiled.memory_analysis()
    held = 4 * WIDTH * WIDTH * LAYERS + 8 * WIDTH * WIDTH * (LAYERS if keep else len(active))
    beside = found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes
    return held + X.nbytes + beside


class Net(nnx.Module):
    """Layers in a stack, and a head."""

    def __init__(self, layers):
        rngs = nnx.Rngs(0)
        self.stack = partial.Stack([nnx.Linear(WIDTH, WIDTH, rngs=rngs) for _ in range(layers)])
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(nnx.tanh(self.stack(x)))


def suffix(k):
    return frozenset(NAMES[-k - 1 :])


SMALL = 1024  # bytes of counts and averages over slots


@pytest.mark.parametrize(
    ("policy", "state"),
    [("priority", "keep"), ("random", "reset"), (by_priority(scoring_share=0.0), "offload")],
)
def test_what_runs_fits_and_uses_what_there_is(policy, state):
    keep = state == "keep"
    for k in (1, 3):
        memory = by_hand(suffix(k), keep) + SMALL
        ran = sets(trained(policy, memory=memory, state=state))
        assert all(by_hand(active, keep) <= memory for active in ran)
        # Where that many layers fit, about as many are trained.
        assert max(map(len, ran)) >= k
    assert sets(trained(policy, memory="1GiB", state=state)) == {frozenset(NAMES): 16}


def test_every_layer_has_its_turn_where_the_chain_fits():
    # With activations that are small beside the weights, depth costs next to nothing.
    x, found = X[:1], trainer(memory=1e9)
    found.train([x])
    sizes = found.step._planner.costs
    memory = sizes.floors[-1] + 2.5 * sizes.own[0]
    found = trained(memory=memory, batch=x, steps=40)
    assert {len(active) for active in sets(found)} == {2}
    assert min(row["updates"] for row in found.get_step_report()["layers"]) >= 4


@pytest.mark.parametrize("policy", ["priority", "random", "full", "suffix(1)", "lisa(1)"])
def test_what_cannot_fit_is_told_with_what_would_do(policy):
    found = trainer(policy, memory=1e4)
    with pytest.raises(ValueError, match=r"memory is 0\.0 MiB, but .* takes \d+ bytes") as error:
        found.train([X])
    least = int(str(error.value).split("takes ")[1].split(" bytes")[0])
    same = jax.tree.map(lambda a, b: bool((a == b).all()), found.params, weights())
    assert all(same.values())  # it has not run
    with pytest.raises(ValueError, match=f"takes {least} bytes"):
        trained(policy, memory=least - 1)
    active = next(iter(sets(trained(policy, memory=least, steps=1))))
    assert least == pytest.approx(by_hand(active), rel=0.03)


def test_a_function_that_asks_for_too_much_is_told_and_one_that_then_asks_for_less_is_not():
    asked = []

    def shrinking(at):
        asked.append(at.budget)
        return [frozenset(NAMES if len(asked) == 1 else NAMES[-1:])] * at.steps

    everything = lambda at: [at.everything] * at.steps  # noqa: E731
    memory = by_hand(suffix(2)) + SMALL
    with pytest.raises(ValueError, match="of 6 of 6 layers"):
        trained(everything, memory=memory)
    assert sets(trained(shrinking, memory=memory, steps=3)) == {suffix(0): 3}
    assert len(asked) == 3 and asked[0] == memory


def test_costs_that_are_too_low_are_mended_by_what_programs_take(monkeypatch, tmp_path):
    def too_low(*args, **kwargs):
        costs = measure_costs(*args, **kwargs)
        return type(costs)((1.0,) * LAYERS, (costs.floors[0],) * LAYERS, "bytes")

    monkeypatch.setattr(engine, "measure_costs", too_low)
    memory = by_hand(suffix(2)) + SMALL
    ran = sets(whole := trained("random", memory=memory, steps=8))
    assert all(by_hand(active) <= memory for active in ran) and sum(ran.values()) == 8
    assert whole.step._planner.record()["beyond"] > 0
    # A resumed run knows what the first has learned.
    first = trainer("random", memory=memory, where=tmp_path)
    first.train([X] * 5)
    second = trainer("random", memory=memory, where=tmp_path)
    second.train([X] * 5, 2, resume_from=tmp_path)
    assert second.step._planner.record()["beyond"] == first.step._planner.record()["beyond"]
    assert sets(second) == {suffix(0): 10} and second.get_step_report()["programs"] == 1


def test_layers_of_a_stack_take_one_program():
    loss = lambda model, x: jnp.mean(model(x) ** 2)  # noqa: E731
    one = trained("lisa(1)", model=Net(6), loss=loss, memory="1GiB", steps=8)
    assert one.get_step_report()["programs"] == 1 and len(sets(one)) > 1


def test_stages_with_a_prefix_that_runs_apart():
    stages = chain(*(function_stage(name, block, w) for name, w in weights().items()))
    loss = lambda model, batch: jnp.mean((model(batch["x"]) - 1) ** 2)  # noqa: E731
    batch = {"x": X, "id": np.arange(ROWS)}
    memory = by_hand(suffix(1)) + X.nbytes + SMALL
    for cache in (None, partial.PrefixCache(None, examples=ROWS)):
        found = trained("random", model=stages, loss=loss, memory=memory, batch=batch, cache=cache)
        assert all(by_hand(active) <= memory for active in sets(found))
    with pytest.raises(ValueError, match="takes"):
        trained("full", model=stages, loss=loss, memory=memory, batch=batch)


def test_costs_in_bytes_are_those_of_compiled_programs():
    params = weights()
    slots = find_slots(params)
    costs = measure_costs(loss_fn, params, X, slots, unit="bytes")
    assert costs.unit == "bytes" and costs.own == (4.0 * WIDTH * WIDTH,) * LAYERS
    assert list(costs.floors) == sorted(costs.floors)
    for k in (0, LAYERS - 1):
        part = {name: params[name] for name in suffix(k)}
        grad_fn = jax.jit(jax.value_and_grad(lambda part, x: loss_fn(params | part, x)))
        found = grad_fn.lower(part, X).compile().memory_analysis()
        beside = found.temp_size_in_bytes + found.output_size_in_bytes
        held = 4 * WIDTH * WIDTH * LAYERS + X.nbytes
        assert costs.of(slots, suffix(k)) == pytest.approx(held + beside, rel=0.02)
    # They are a budget's own.
    ran = trained("random", memory=by_hand(suffix(2)), costs=costs)
    assert all(by_hand(active) <= by_hand(suffix(2)) for active in sets(ran))


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"memory": "much"}, ValueError, "'much' is not a size such as 4GiB"),
        ({"memory": 0}, ValueError, "memory must be above 0"),
        ({"memory": True}, TypeError, "memory must be a number"),
        ({"memory": 1e9, "share": 0.5}, ValueError, "one of share, flops, milliseconds and memory"),
        ({"policy": "full", "share": 0.5}, ValueError, "the others memory or none"),
    ],
)
def test_wrong_memory(options, error, match):
    with pytest.raises(error, match=match):
        partial.step(**({"policy": "priority"} | options))


def test_costs_in_another_unit_are_refused():
    slots = find_slots(weights())
    costs = measure_costs(loss_fn, weights(), X, slots)
    with pytest.raises(ValueError, match="the budget is in memory, but costs are in flops"):
        partial.step("random", memory="1GiB", costs=costs)


ON_A_MESH = """
    import json, sys
    import jax, numpy as np, optax
    from jax.sharding import NamedSharding, PartitionSpec as P
    sys.path.insert(0, {tests!r})
    from test_memory import *

    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    alone, spread = (jax.device_put(X, NamedSharding(mesh, P(*axes))) for axes in ((), ("data",)))
    params = jax.device_put(weights(), NamedSharding(mesh, P()))
    memory = by_hand(suffix(1)) + SMALL
    print(json.dumps([max(map(len, sets(trained("random", model=dict(params), batch=x,
                                                memory=memory, steps=4))))
                      for x in (alone, spread)]))
"""


def test_memory_is_that_of_one_device():
    flags = {"XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    script = textwrap.dedent(ON_A_MESH).format(tests=os.path.dirname(__file__))
    run = [sys.executable, "-c", script]
    done = subprocess.run(run, capture_output=True, text=True, env=os.environ | flags)
    assert done.returncode == 0, done.stderr
    whole, quarter = json.loads(done.stdout.splitlines()[-1])
    assert quarter > whole >= 1  # a quarter of the activations on each


def test_a_suffix_of_a_stack_keeps_what_its_layers_need():
    x = np.ones((2048, WIDTH), np.float32)

    def net_loss(model, x):
        return jnp.mean((model(x) - 1) ** 2)

    def beside(policy):
        found = trained(policy, model=Net(8), loss=net_loss, batch=x, steps=4)
        (programs,) = found.step._programs.values()
        return max(program.beside for program in programs.values())

    taken = {k: beside(f"suffix({k})") for k in (1, 3, 5)}
    # A layer's inputs are kept for its weight gradient.
    assert taken[3] - taken[1] >= 1.9 * x.nbytes and taken[5] - taken[3] >= 1.9 * x.nbytes
    assert taken[1] < beside("badam(1)") - 5 * x.nbytes
    planned = partial.plan(Net(8), net_loss, x, optax.adam(1e-3), repeats=1)
    peaks = {choice.name.split(",")[0]: choice.peak_bytes for choice in planned.choices}
    # A plan holds the state of what is trained alone; a step holds counts of slots as well.
    for k in (1, 3, 5):
        held = sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(Net(8), nnx.Param))) + x.nbytes
        state = 8 * (k * (WIDTH * WIDTH + WIDTH) + WIDTH + 1)
        assert peaks[f"suffix({k})"] == pytest.approx(held + state + taken[k], rel=0.1)
