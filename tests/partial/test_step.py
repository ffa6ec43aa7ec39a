"""Tests of `partial.step`, in a trainer."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import os
import signal
import subprocess
import sys
import textwrap

import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.core.slots import find_slots
from priorityprop_jax.partial import engine
from priorityprop_jax.partial.costs import StepCosts, measure_costs
from priorityprop_jax.partial.engine import step
from priorityprop_jax.partial.policies import make_policy
from priorityprop_jax.partial.prefix_cache import PrefixCache
from priorityprop_jax.partial.stages import (
    chain,
    function_stage,
    nnx_stages,
)
from priorityprop_jax.partial.update import update_active
from priorityprop_jax.rnn import lean_rnn
from priorityprop_jax.training import Trainer

ROWS, SIZE, WIDTH = 48, 8, 8
NAMES = ("embed", "block_0", "block_1", "block_2", "head")
X = np.random.default_rng(0).normal(size=(1024, 6)).astype(np.float32)
Y = np.sin(X[:, :1] + X[:, 1:2] * X[:, 2:3]).astype(np.float32)


def _batches(rows=ROWS, size=SIZE):
    ids = np.arange(rows)
    return [
        {"x": X[:rows][i : i + size], "y": Y[:rows][i : i + size], "id": ids[i : i + size]}
        for i in range(0, rows, size)
    ]


class Loader:
    """Rows shuffled by epoch; sends a signal before one of the batches on request."""

    def __init__(self, interrupt_at=None, number=signal.SIGINT):
        self.interrupt_at, self.number, self.epoch = interrupt_at, number, 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        order = np.random.default_rng(self.epoch).permutation(ROWS)
        for i in range(0, ROWS, SIZE):
            if (self.epoch, i // SIZE) == self.interrupt_at:
                os.kill(os.getpid(), self.number)
            rows = order[i : i + SIZE]
            yield {"x": X[rows], "y": Y[rows], "id": rows}


def _normal(rng, *shape):
    return (rng.normal(size=shape) / np.sqrt(shape[0])).astype(np.float32)


def _params():
    rng = np.random.default_rng(1)
    blocks = {
        f"block_{i}": {"up": _normal(rng, WIDTH, WIDTH), "down": _normal(rng, WIDTH, WIDTH)}
        for i in range(3)
    }
    head = {"w": _normal(rng, WIDTH, 1), "b": np.zeros(1, np.float32)}
    return {"embed": {"w": _normal(rng, 6, WIDTH)}, **blocks, "head": head}


def _embed(p, x):
    return x @ p["w"]


def _block(p, x):
    return x + jnp.tanh(x @ p["up"]) @ p["down"]


def _head(p, x):
    return x @ p["w"] + p["b"]


APPLY = {"embed": _embed, "block": _block, "head": _head}


def _predict(params, x):
    for name in NAMES:
        x = APPLY[name.split("_")[0]](params[name], x)
    return x


def _chain():
    params = _params()
    return chain(*(function_stage(name, APPLY[name.split("_")[0]], params[name]) for name in NAMES))


class Block(nnx.Module):
    def __init__(self, rngs, rate=0.0):
        self.up = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.down = nnx.Linear(WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(rate, rngs=rngs.fork()) if rate else None

    def __call__(self, x):
        y = nnx.tanh(self.up(x))
        return x + self.down(y if self.dropout is None else self.dropout(y))


class Net(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.embed = nnx.Linear(6, WIDTH, rngs=rngs)
        self.block_0, self.block_1, self.block_2 = Block(rngs), Block(rngs), Block(rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        return self.head(self.block_2(self.block_1(self.block_0(self.embed(x)))))


def _modules(dropout_in=None):
    rngs = nnx.Rngs(0)
    return [
        ("embed", nnx.Linear(6, WIDTH, rngs=rngs)),
        *((f"block_{i}", Block(rngs, 0.5 if i == dropout_in else 0.0)) for i in range(3)),
        ("head", nnx.Linear(WIDTH, 1, rngs=rngs)),
    ]


def _loss(model, batch):
    error = model(batch["x"]) - batch["y"]
    return jnp.mean(error**2), {"worst": jnp.max(jnp.abs(error))}


def _tree_loss(params, batch):
    return _loss(lambda x: _predict(params, x), batch)


def _group(path):
    return path.split("/")[0]


@functools.cache
def _costs():
    slots = find_slots(_params(), group=_group)
    return measure_costs(_tree_loss, _params(), _batches()[0], slots, has_aux=True)


def _trainer(
    model=None, *, optimizer=None, share=None, every=4, loss=_loss, where=None, policy="priority",
    **options,
):  # fmt: skip
    """A trainer, with a share of 0.6 for policies that need a budget and are given none."""
    model = _chain() if model is None else model
    if policy in ("priority", "random"):
        options = {"costs": _costs()} | options
        share = 0.6 if share is None and not {"flops", "milliseconds"} & options.keys() else share
    options["share"] = share
    return Trainer(
        model, optimizer or optax.adamw(0.01), loss,
        step(policy, recalc_every=every, **options),
        checkpoint_dir=where, progress=False,
    )  # fmt: skip


def _add(table):
    return lambda x: x + table


def _leaves(tree):
    return [
        np.asarray(jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x)
        for x in jax.tree.leaves(tree)
    ]


def _assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(_leaves(a), _leaves(b), strict=True):
        np.testing.assert_array_equal(x, y)


def _complete(trainer):
    """The optimizer state of all slots, those in host memory included."""
    return trainer.step.complete(trainer.optimizer_state)


def _slot_bytes(trainer):
    """For each slot its parameters and its optimizer state, as they are."""
    params, state = trainer.params, _complete(trainer).inner_state
    moments = state[0]
    return {
        name: [x.tobytes() for x in _leaves((params[name], moments.mu[name], moments.nu[name]))]
        + [np.asarray(moments.count)[i].tobytes()]
        for i, name in enumerate(trainer.step.slots.names)
    }


def _books(trainer):
    """The report without what the clock says, and without what a new process compiles anew."""
    report = trainer.get_step_report()
    del report["programs"]
    for row in report["layers"]:
        del row["milliseconds"]
    return report


def _values(history):
    return [{k: v for k, v in record.items() if k != "seconds"} for record in history.steps]


def _alternating(*sets):
    """A policy function that goes through sets of slots, one a cycle."""
    return lambda at: [frozenset(sets[at.cycle % len(sets)])] * at.steps


class TestFull:
    def _by_hand(self, loss_fn, params, batches):
        tx = optax.adamw(0.01)
        params = jax.tree.map(lambda x: jnp.array(x, copy=True), params)

        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, batch):
            (loss, _), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state, loss

        state, losses = tx.init(params), []
        for batch in batches:
            params, state, loss = step(params, state, batch)
            losses.append(float(loss))
        return params, state, losses

    @pytest.mark.parametrize("kind", ["stages", "pytree", "nnx"])
    def test_is_the_plain_loop(self, kind):
        loss_fn, start, model, loss = _tree_loss, _params(), _params(), _tree_loss
        if kind == "stages":
            model, loss = _chain(), _loss
        elif kind == "nnx":
            model, loss = Net(), _loss
            graph, start = nnx.split(model, nnx.Param)
            loss_fn = lambda params, batch: _loss(nnx.merge(graph, params), batch)  # noqa: E731
        trainer = _trainer(model, loss=loss, policy="full")
        batches = (_batches() * 4)[:20]
        params, state, losses = self._by_hand(loss_fn, start, batches)
        history = trainer.train(batches)
        assert history.loss == losses
        ours = trainer.optimizer_state.inner_state[0]
        for mine, theirs in [
            (trainer.params, params), (ours.mu, state[0].mu), (ours.nu, state[0].nu)
        ]:  # fmt: skip
            for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
                np.testing.assert_array_equal(a, b)
        assert set(np.asarray(ours.count).tolist()) == {20}
        assert trainer.get_step_report()["programs"] == 1


class TestInactiveSlots:
    @pytest.mark.parametrize("policy", ["badam(1)", "priority"])
    def test_keep_parameters_and_state_bit_for_bit(self, policy):
        planned = []

        def watched(at):
            planned.append([frozenset(s) for s in make_policy(policy)(at)])
            return planned[-1]

        share = {"share": 0.6} if policy == "priority" else {}
        trainer = _trainer(policy=watched, every=3, **share)
        batches, before = _batches(), _slot_bytes(trainer)
        frozen = 0
        for number in range(9):
            trainer.train(batches[number % 6 : number % 6 + 1])
            after = _slot_bytes(trainer)
            active = planned[-1][number % 3]
            assert len(planned) == number // 3 + 1
            for name in NAMES:
                assert (after[name] != before[name]) == (name in active), (number, name)
            frozen += len(set(NAMES) - active)
            before = after
        assert frozen > 8

    def test_active_gradients_are_those_of_the_full_loss(self):
        active = {"block_0", "block_2", "head"}
        trainer = _trainer(optimizer=optax.sgd(1.0), policy=_alternating(active))
        batch = _batches()[0]
        trainer.train([batch])
        grads, _ = jax.jit(jax.grad(_tree_loss, has_aux=True))(_params(), batch)
        for name in NAMES:
            moved = jax.tree.map(lambda a, b: a - b, _params()[name], trainer.params[name])
            for ours, full in zip(_leaves(moved), _leaves(grads[name]), strict=True):
                expected = full if name in active else np.zeros_like(full)
                np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-6)


class TestCache:
    def _run(self, cache, policy="suffix(1)", epochs=3, every=4):
        trainer = _trainer(policy=policy, cache=cache, every=every)
        trainer.train(Loader(), epochs)
        return trainer

    def test_is_the_uncached_run(self, tmp_path):
        plain = self._run(None)
        assert plain.get_step_report()["cached_steps"] == 0
        for directory in (None, tmp_path):
            with PrefixCache(directory, examples=ROWS, dtype="float32") as cache:
                cached = self._run(cache)
                assert cached.history.loss == plain.history.loss
                _assert_same(cached.params, plain.params)
                _assert_same(cached.optimizer_state, plain.optimizer_state)
                # The first epoch fills it; later batches are other mixtures of the same rows.
                report = cached.get_step_report()
                assert report["cached_steps"] == 12
                assert cached.history.column("cached") == [0] * 6 + [1] * 12
                assert (cache.hits, cache.misses) == (2 * ROWS, ROWS)
                assert report["flops"] < plain.get_step_report()["flops"]
        # What is on the disk serves another run from its first step.
        with PrefixCache(tmp_path, examples=ROWS, dtype="float32") as cache:
            again = self._run(cache, epochs=1)
            assert again.get_step_report()["cached_steps"] == 6
            assert again.history.loss == plain.history.loss[:6]

        with PrefixCache(None, examples=ROWS) as cache:  # bfloat16
            rounded = self._run(cache)
        assert rounded.get_step_report()["cached_steps"] == 12
        assert rounded.history.loss != plain.history.loss
        np.testing.assert_allclose(rounded.history.loss, plain.history.loss, rtol=0.05)

    def test_an_updated_prefix_is_computed_anew(self):
        policy = _alternating(
            {"head"}, {"block_2", "head"}, set(NAMES), {"head"}, {"block_1", "head"}
        )
        plain = self._run(None, policy, epochs=10, every=12)
        with PrefixCache(None, examples=ROWS, dtype="float32") as cache:
            cached = self._run(cache, policy, epochs=10, every=12)
        assert cached.history.loss == plain.history.loss
        _assert_same(cached.params, plain.params)
        # In every cycle but that of everything, the second epoch of the two.
        assert cached.get_step_report()["cached_steps"] == 24

    def test_the_boundary_within_a_cycle(self):
        # One prefix serves all steps of the cycle: the shortest of them.
        sets = [frozenset({"block_1", "head"}), frozenset({"head"})] * 2
        plain = self._run(None, lambda at: sets)
        with PrefixCache(None, examples=ROWS, dtype="float32") as cache:
            cached = self._run(cache, lambda at: sets, epochs=3)
        assert cached.get_step_report()["cached_steps"] == 12
        # The head's prefix comes from two programs in place of one.
        np.testing.assert_allclose(cached.history.loss, plain.history.loss, rtol=1e-5)

    def test_stays_where_an_earlier_stage_was_trained(self):
        early, late = {"block_0", "head"}, {"block_2", "head"}

        def policy(at):
            return [frozenset(early if at.cycle in (0, 2) else late)] * at.steps

        plain = self._run(None, policy, epochs=7, every=6)
        with PrefixCache(None, examples=ROWS, dtype="float32") as cache:
            cached = self._run(cache, policy, epochs=7, every=6)
        # The later stage is served too, by what is cached in front of the earlier one.
        assert cached.history.column("cached") == [0] * 6 + [1] * 36
        assert cached.step._prefix.at == NAMES.index("block_0")
        assert cached.history.loss == plain.history.loss
        _assert_same(cached.params, plain.params)

    def test_two_trainers_may_take_turns_with_one_cache(self):
        alone = self._run(None, epochs=2)
        other = _chain()
        other.params["embed"] = {"w": other.params["embed"]["w"] + 1}
        with PrefixCache(None, examples=ROWS, dtype="float32") as cache:
            first = self._run(cache, epochs=1)
            second = _trainer(other, policy="suffix(1)", cache=cache)
            second.train(Loader())
            loader = Loader()
            first.train(loader)
            assert first.history.loss == alone.history.loss
            cache.close()
            first.train(loader)

    def test_dropout_in_the_prefix_is_refused(self):
        cache = PrefixCache(None, examples=ROWS)
        trainer = _trainer(nnx_stages(_modules(dropout_in=0)), policy="suffix(1)", cache=cache)
        with pytest.raises(ValueError, match="prefix with 'block_0' cannot be cached.*dropout"):
            trainer.train(_batches())

    @pytest.mark.parametrize(
        "mix",
        [
            lambda x: x - x.mean(0),
            lambda x: x[::-1],
            lambda x: x + jnp.roll(x, 1, 0),
            lambda x: jnp.sort(x, 0),
            lambda x: x / jnp.abs(x).max(),
            lambda x: x * jnp.arange(1.0, 1 + len(x))[:, None],
            lambda x: x + jax.random.normal(jax.random.key(0), x.shape),
        ],
    )
    @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
    def test_a_prefix_that_mixes_examples_is_refused(self, mix, dtype):
        stages = _chain()
        mixing = chain(function_stage("mix", lambda _, x: mix(x)), stages)
        cache = PrefixCache(None, examples=ROWS, dtype=dtype)
        trainer = _trainer(mixing, policy="suffix(1)", cache=cache)
        # One example alone tells nothing; the next batch does.
        trainer.train([jax.tree.map(lambda x: x[:1], _batches()[1])])
        with pytest.raises(ValueError, match="cannot be cached.*on its place or on the others"):
            trainer.train(_batches())

    @pytest.mark.parametrize("kind", ["gru", "lstm", "both ways", "lean"])
    def test_a_recurrent_stage(self, kind):
        """Its random streams move on at every call, and no output reads them."""

        def modules():
            rngs = nnx.Rngs(0)
            cell = functools.partial(nnx.OptimizedLSTMCell if kind == "lstm" else nnx.GRUCell, 6)
            rnn = nnx.RNN(cell(6, rngs=rngs))
            if kind == "both ways":
                halves = (nnx.RNN(cell(3, rngs=rngs)) for _ in range(2))
                rnn = nnx.Bidirectional(*halves, rngs=rngs)
            if kind == "lean":
                assert lean_rnn(rnn) == 1
            last = lambda x: x[:, -1]  # noqa: E731
            rest = nnx.Sequential(last, nnx.Linear(6, 8, rngs=rngs))
            return [("rnn", rnn), ("mid", rest), ("head", nnx.Linear(8, 1, rngs=rngs))]

        batches = [{**b, "x": np.stack([b["x"], b["x"] ** 2], 1)} for b in _batches()]
        made = {"cached": {"policy": "suffix(1)", "cache": PrefixCache(None, examples=ROWS,
                dtype="float32")}, "suffix": {"policy": "suffix(1)"}, "full": {"policy": "full"},
                "lisa": {"policy": "lisa(1)"}}  # fmt: skip
        runs = {}
        for name, options in made.items():
            runs[name] = _trainer(nnx_stages(modules()), **options)
            runs[name].train(batches, 2)
        plain = Trainer(nnx.Sequential(*(m for _, m in modules())), optax.adamw(0.01), _loss,
                        progress=False)  # fmt: skip
        plain.train(batches, 2)
        np.testing.assert_allclose(runs["full"].history.loss, plain.history.loss, rtol=1e-4)
        np.testing.assert_allclose(
            runs["cached"].history.loss, runs["suffix"].history.loss, rtol=1e-4
        )
        assert runs["cached"].get_step_report()["cached_steps"] == len(batches)
        slots = runs["lisa"].step.slots
        assert dict(zip(slots.names, slots.depths, strict=True)) == {"rnn": 2, "mid": 1, "head": 0}

    def test_a_stream_that_outputs_read_is_refused_however_seldom(self):
        modules = [("drop", nnx.Dropout(1e-9, rngs=nnx.Rngs(0))), *_modules()]
        cache = PrefixCache(None, examples=ROWS)
        with pytest.raises(ValueError, match="prefix with 'drop' cannot be cached.*dropout"):
            _trainer(nnx_stages(modules), policy="suffix(1)", cache=cache).train(_batches())

    def test_state_that_changes_in_the_prefix_is_refused(self):
        modules = [("norm", nnx.BatchNorm(6, rngs=nnx.Rngs(0))), *_modules()]
        cache = PrefixCache(None, examples=ROWS)
        with pytest.raises(ValueError, match="prefix with 'norm' cannot be cached.*BatchNorm"):
            _trainer(nnx_stages(modules), policy="suffix(1)", cache=cache).train(_batches())
        norm = modules[0][1]
        norm.eval()
        before = np.array(norm.mean[...])
        trainer = _trainer(nnx_stages(modules), policy="suffix(1)", cache=cache)
        assert trainer.train(_batches()[:1] * 2).column("cached") == [0, 1]
        np.testing.assert_array_equal(norm.mean[...], before)

    def test_evaluation_is_compiled_once(self):
        plan = [{"head"}, {"block_2"}, {"block_0", "head"}]
        trainer = _trainer(policy=lambda at: [frozenset(plan[at.cycle])], every=1)
        trainer.evaluate(_batches()[:1])
        for _ in plan:
            trainer.train(_batches()[:1], eval_data=_batches()[:1])
        assert trainer._evaluate.compiled._cache_size() == 1

    def test_dropout_behind_the_prefix_is_drawn_anew(self):
        cache = PrefixCache(None, examples=ROWS)
        trainer = _trainer(
            nnx_stages(_modules(dropout_in=2)), optimizer=optax.sgd(0.0), policy="suffix(1)",
            cache=cache,
        )  # fmt: skip
        history = trainer.train(_batches()[:1] * 4)
        assert len(set(history.loss)) == 4
        assert history.column("cached") == [0, 1, 1, 1]
        assert trainer.evaluate(_batches()) == trainer.evaluate(_batches())

    @pytest.mark.parametrize("policy", ["suffix(1)", "full"])
    def test_frozen_dropout_without_a_cache_is_drawn_anew(self, policy):
        trainer = _trainer(
            nnx_stages(_modules(dropout_in=0)), optimizer=optax.sgd(0.0), policy=policy
        )
        assert len(set(trainer.train(_batches()[:1] * 3).loss)) == 3

    def test_the_key_is_what_the_prefix_computes(self, tmp_path):
        def stages(heads=2, function=jnp.tanh, scale=1.0, constant=0.0, embed=None):
            table = np.full(WIDTH, constant, np.float32)  # closed over

            def attend(p, x):  # shapes tell nothing of the heads
                parts = x.reshape(len(x), heads, -1)
                weights = jax.nn.softmax(parts @ parts.swapaxes(1, 2), axis=-1)
                return function(
                    scale * (weights @ parts).reshape(x.shape) + jax.jit(_add(table))(x)
                )

            embed = {"w": _params()["embed"]["w"]} if embed is None else embed
            return chain(
                function_stage("embed", _embed, embed),
                function_stage("attend", attend),
                function_stage("head", _head, _params()["head"]),
            )

        def hits(size=SIZE, **options):
            with PrefixCache(tmp_path, examples=ROWS) as cache:
                _trainer(stages(**options), policy="suffix(0)", cache=cache).train(
                    _batches(ROWS, size)
                )
                return cache.hits

        other = {"w": _params()["embed"]["w"] * 2}
        for change in (
            {"heads": 4}, {"function": jax.nn.relu}, {"scale": 1.0000001}, {"constant": 1.0},
            {"embed": other},
        ):  # fmt: skip
            assert hits() == 0
            assert hits() == ROWS
            assert hits(**change) == 0, change

    def test_needs_ids_and_inputs_that_stay(self):
        cache = PrefixCache(None, examples=ROWS)
        trainer = _trainer(policy="suffix(1)", cache=cache)
        with pytest.raises(ValueError, match='array "id"'):
            trainer.train([{"x": X[:8], "y": Y[:8]}])
        trainer.train(_batches()[:1])
        with pytest.raises(ValueError, match="inputs of example 0"):
            trainer.train([_batches()[0] | {"x": X[8:16]}])
        with pytest.raises(ValueError, match="needs a model in stages"):
            _trainer(Net(), policy="suffix(1)", cache=cache)
        changed = lambda model, batch: _loss(lambda x: model(x * 2), batch)  # noqa: E731
        trainer = _trainer(loss=changed, policy="suffix(1)", cache=PrefixCache(None, examples=ROWS))
        with pytest.raises(ValueError, match=r"batch\['x'\] as it is"):
            trainer.train(_batches())


class TestAccount:
    def test_charges_what_was_run(self):
        with PrefixCache(None, examples=ROWS, dtype="float32") as cache:
            trainer = _trainer(policy="suffix(1)", cache=cache)
            history = trainer.train(Loader(), 2)
        ((run,),) = (p.values() for p in trainer.step._programs.values())
        (forward,) = trainer.step._prefix._programs.values()
        assert history.column("flops") == [run.flops + forward.flops] * 6 + [run.flops] * 6
        report = trainer.get_step_report()
        assert report["flops"] == 12 * run.flops + 6 * forward.flops
        # Products, forward and backward: of the prefix, and of what is behind it.
        products = 2 * SIZE * WIDTH
        assert forward.flops == pytest.approx(products * (6 + 4 * WIDTH), rel=0.15)
        assert 1 < run.flops / (products * (5 * WIDTH + 2)) < 2  # Adam's are in it

    def test_the_share_is_that_of_unrolled_products(self):
        """With a model whose layers are a loop: the compiler would count it once."""
        layers, width, rows = 6, 64, 32
        rng = np.random.default_rng(0)
        params = {"stack": _normal(rng, layers, width, width), "head": _normal(rng, width, 1)}
        batch = {"x": _normal(rng, rows, width)}

        def loss(params, batch):
            body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
            x, _ = jax.lax.scan(body, batch["x"], params["stack"])
            return jnp.mean((x @ params["head"]) ** 2)

        trainer = _trainer(params, optimizer=optax.sgd(0.1), loss=loss, policy="suffix(0)")
        trainer.train([batch] * 4)
        head, forward = 2 * rows * width, layers * 2 * rows * width**2
        expected = (forward + 2 * head) / (3 * forward + 3 * head)
        assert trainer.get_step_report()["share"] == pytest.approx(expected, rel=0.05)

    @pytest.mark.parametrize(
        ("policy", "cached"), [("priority", False), ("priority", True), ("random", False)]
    )
    def test_stays_within_the_budget(self, policy, cached):
        cache = PrefixCache(None, examples=256, dtype="float32") if cached else None
        trainer = _trainer(policy=policy, share=0.5, every=5, cache=cache, costs=None)
        history = trainer.train(_batches(256, 32), 20)
        report = trainer.get_step_report()
        assert report["steps"] == 160 and len(history.loss) == 160
        assert report["flops"] == pytest.approx(sum(history.column("flops")))
        assert report["share"] == pytest.approx(report["flops"] / report["full_flops"])
        # The optimizer is charged and not foreseen, which the next cycle makes up for.
        assert 0.35 < report["share"] <= 0.505
        if policy == "priority":  # Scoring, which is paid for out of the same budget.
            full = [v for v in report["variants"] if len(v["active"]) == 5]
            assert full and full[0]["steps"] > 1
        assert json.loads(json.dumps(report)) == report
        layers = report["layers"]
        assert [row["layer"] for row in layers] == list(NAMES)
        counts = np.asarray(trainer.optimizer_state.update_counts)
        assert sum(row["updates"] for row in layers) == counts.sum() == sum(history.updates)
        by_slot = dict(zip(trainer.step.slots.names, counts.tolist(), strict=True))
        assert {row["layer"]: row["updates"] for row in layers} == by_slot
        assert len(report["variants"]) <= 8
        assert sum(v["steps"] for v in report["variants"]) == 160

    def test_unknown_costs_before_the_first_step(self):
        report = _trainer().get_step_report()
        assert report["steps"] == report["flops"] == 0 and json.dumps(report)

    def test_what_is_asked_for_is_run_and_compiling_anew_is_said(self):
        seen = []

        def drawn(at):
            seen.append(frozenset(at.rng(1).choice(NAMES, size=2, replace=False).tolist()))
            return [seen[-1]] * at.steps

        trainer = _trainer(policy=drawn, every=2, max_variants=3, share=1.0, costs=_costs())
        with pytest.warns(UserWarning) as caught:
            trainer.train(_batches(), 4)
        (warning,) = caught
        for part in ("drawn", "max_variants=3", "compiled again", "Stack"):
            assert part in str(warning.message)
        report = trainer.get_step_report()
        ran = {frozenset(v["active"]): v["steps"] for v in report["variants"]}
        asked = collections.Counter(seen)
        assert ran == {names: 2 * n for names, n in asked.items()} and len(asked) > 3
        assert set(trainer.history.updates) == {2}
        assert report["programs"] > len(asked) and len(trainer.step._programs) == 3

    @pytest.mark.parametrize("policy", ["lisa(1)", "badam(1)", "function"])
    def test_without_a_budget_what_is_asked_for_is_run(self, policy):
        asked = []

        def watched(at):
            asked.extend(make_policy("badam(1)" if policy == "function" else policy)(at))
            return asked[-at.steps :]

        name = watched if policy == "function" else policy
        trainer = _trainer(policy=name, every=1, max_variants=1)
        with pytest.warns(UserWarning, match="compiled again"):
            trainer.train(_batches(), 2)
        report = trainer.get_step_report()
        assert len(report["variants"]) == 3 and report["programs"] > 3  # made anew
        assert trainer.history.updates == [3 if policy == "lisa(1)" else 2] * 12
        if asked:
            ran = {frozenset(v["active"]): v["steps"] for v in report["variants"]}
            assert ran == collections.Counter(asked)

    @pytest.mark.parametrize("policy", ["suffix(1)", "lisa(1)", "badam(1)", "full"])
    def test_costs_that_nobody_spends_are_not_measured(self, policy, monkeypatch):
        trainer = _trainer(policy=policy)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "measure_costs", None)
            trainer.train(_batches())
        report = trainer.get_step_report()  # where they are asked for after all
        assert sum(row["flops"] for row in report["layers"]) > 0
        ran = {frozenset(v["active"]) for v in report["variants"]}
        compiled = {names for names, *_ in trainer.step._programs}
        assert compiled == ran  # and no full step for its FLOPs

    def test_a_smaller_last_batch_compiles_once(self):
        trainer = _trainer(policy="suffix(1)")
        trainer.train(_batches(44), 1)
        # Prefix and step, twice.
        assert trainer.get_step_report()["programs"] == 4
        trainer.train(_batches(44), 2)
        assert trainer.get_step_report()["programs"] == 4

    def test_budget_in_flops(self):
        share = _trainer(share=0.6)
        a = share.train(_batches(), 3)
        full = share.get_step_report()["full_flops"] / 18
        flops = _trainer(flops=0.6 * full)
        b = flops.train(_batches(), 3)
        assert a.loss == b.loss and a.updates == b.updates
        assert _books(share) == _books(flops)

    def test_budget_in_milliseconds(self):
        costs = StepCosts((1.0,) * 5, (5.0, 6.0, 7.0, 8.0, 9.0), "milliseconds")
        trainer = _trainer(policy="random", milliseconds=9.0, costs=costs)
        trainer.train(_batches(), 2)
        assert trainer.step._account.charged <= 9.0 * 12
        assert min(trainer.history.updates) > 1
        # And as they are measured here.
        trainer = _trainer(policy="random", milliseconds=1e4, costs=None)
        assert trainer.train(_batches()).updates == [5] * 6
        assert trainer.step._planner.costs.unit == "milliseconds"

    @pytest.mark.parametrize("unit", ["flops", "milliseconds"])
    def test_given_costs_are_not_measured(self, unit, monkeypatch):
        fifth = {"flops": _costs().full / 5, "milliseconds": 1.0}[unit]
        given = StepCosts((0.0,) * 5, tuple(fifth * depth for depth in range(1, 6)), unit)
        trainer = _trainer(policy="random", costs=given, share=0.6)
        with monkeypatch.context() as patch:
            patch.setattr(engine, "measure_costs", None)
            trainer.train(_batches(), 2)
        assert trainer.step._planner.costs == given
        if unit == "milliseconds":
            assert trainer.step._account.charged <= 0.6 * given.full * 12
        # The optimizer's FLOPs are in it.
        assert trainer.get_step_report()["full_flops"] > 12 * _costs().full

    def test_costs_of_another_model(self):
        slots = find_slots({"a": 1.0, "b": 1.0})
        other = measure_costs(lambda p, x: p["a"] * p["b"] * x, {"a": 1.0, "b": 1.0}, 2.0, slots)
        with pytest.raises(ValueError, match="costs are of 2 slots"):
            _trainer(costs=other).train(_batches())

    def test_costs_in_another_unit(self):
        """They would keep no budget."""
        counted = _costs()
        for scale in (1e-3, 1e3):
            own, floors = (tuple(scale * x for x in part) for part in (counted.own, counted.floors))
            with pytest.raises(ValueError, match="costs say that a step with all slots takes"):
                _trainer(costs=StepCosts(own, floors)).train(_batches())


class TestWrongArguments:
    @pytest.mark.parametrize(
        ("options", "error", "match"),
        [
            ({"policy": "best"}, ValueError, "no policy 'best'"),
            ({"policy": "suffix"}, ValueError, r"suffix\(k\)"),
            ({"policy": 3}, TypeError, "policy"),
            ({"costs": 3}, TypeError, "measure_costs"),
            ({"max_variants": 0}, ValueError, "max_variants"),
            ({"state": "drop"}, ValueError, "state must be one of keep"),
            ({"cache": "here"}, TypeError, "PrefixCache"),
            ({"gain_decay": 1.0}, ValueError, "gain_decay"),
            ({"share": True}, TypeError, "share must be a number"),
            ({"share": 0}, ValueError, "share must be above 0 and at most 1, got 0"),
            ({"share": 1.1}, ValueError, "share must be above 0 and at most 1, got 1.1"),
            ({"share": None, "flops": float("nan")}, ValueError, "flops must be above 0"),
            ({"share": None}, ValueError, "'priority' was given no budget"),
            ({"flops": 1e9}, ValueError, "given share=0.5, flops=1e\\+09"),
            ({"policy": "full"}, ValueError, "full' was given share=0.5.*others memory or none"),
            ({"policy": "lisa:2"}, ValueError, "memory or none"),
            ({"share": None, "milliseconds": 1, "costs": StepCosts((1.0,), (1.0,))}, ValueError,
             "in milliseconds, but costs are in flops"),
            ({"recalc_every": 0}, ValueError, "at least 1"),
            ({"recalc_every": 2.5}, TypeError, "whole number"),
        ],
    )  # fmt: skip
    def test_options(self, options, error, match):
        with pytest.raises(error, match=match):
            step(**({"share": 0.5} | options))

    @pytest.mark.parametrize(
        ("policy", "match"),
        [
            (lambda at: [{"head"}] * 3, "4 sets"),
            (lambda at: [{"head"}, set()] * 2, "not empty"),
            (lambda at: [{"tail"}] * 4, "unknown slot 'tail'"),
        ],
    )
    def test_policy_function(self, policy, match):
        trainer = _trainer(policy=policy)
        with pytest.raises(ValueError, match=match):
            trainer.train(_batches())
        _assert_same(trainer.params, _params())

    @pytest.mark.parametrize("policy", ["priority", "random"])
    def test_budget_below_the_cheapest_step(self, policy):
        with pytest.raises(ValueError, match="with the output layer alone"):
            _trainer(policy=policy, share=0.01).train(_batches())

    def test_loss_that_calls_the_stages_twice(self):
        def twice(model, batch):
            return _loss(model, batch)[0] + _loss(model, batch)[0]

        with pytest.raises(ValueError, match="call the model once"):
            _trainer(loss=twice).train(_batches())

    def test_several_processes(self):
        for options in ({"state": "reset"}, {"cache": PrefixCache(None, examples=ROWS)}):
            with pytest.raises(ValueError, match="several processes"):
                _trainer(policy="full", **options).step.check_processes()
        _trainer(policy="full").step.check_processes()


class TestState:
    def test_offload_is_keep_and_reset_is_not(self):
        runs = {}
        for mode in ("keep", "offload", "reset"):
            trainer = _trainer(policy="badam(1)", every=2, state=mode)
            runs[mode] = trainer, trainer.train(_batches(), 3)
        keep, offload, reset = (runs[mode][0] for mode in ("keep", "offload", "reset"))
        assert keep.history.loss == offload.history.loss
        _assert_same(keep.params, offload.params)
        _assert_same(keep.optimizer_state, _complete(offload))
        # All are the same for the first round of turns, and the head keeps its state.
        assert reset.history.loss[:6] == keep.history.loss[:6]
        assert reset.history.loss != keep.history.loss
        resident = {
            "keep": set(NAMES),
            "offload": {"head", "block_0"},
            "reset": {"head", "block_0"},
        }
        for mode, (trainer, _) in runs.items():
            params = trainer.params
            for row in trainer.get_step_report()["layers"]:
                own = sum(x.nbytes for x in jax.tree.leaves(params[row["layer"]]))
                expected = 2 * own if row["layer"] in resident[mode] else 0
                assert row["state_bytes"] == expected, (mode, row)


class TestResume:
    @pytest.mark.parametrize(
        ("policy", "mode"), [("priority", "keep"), ("priority", "offload"), ("random", "reset")]
    )
    def test_within_a_cycle_bit_for_bit(self, policy, mode, tmp_path):
        def make(name, where=None):
            cache = PrefixCache(tmp_path / name, examples=ROWS)
            return _trainer(policy=policy, state=mode, share=0.55, cache=cache, where=where), cache

        whole, cache = make("whole")
        whole.train(Loader(), 3)
        cache.close()
        folder = tmp_path / "checkpoints"
        stopped, cache = make("cache", folder)
        history = stopped.train(Loader((1, 3)), 3)
        cache.close()
        assert history.interrupted and len(history.loss) == 9  # One step into a cycle of four.
        resumed, cache = make("cache", folder)
        resumed.train(Loader(), 3, resume_from=folder)
        cache.close()
        assert resumed.history.loss == whole.history.loss
        _assert_same(resumed.params, whole.params)
        _assert_same(_complete(resumed), _complete(whole))
        ours, theirs = _books(resumed), _books(whole)
        # A cache on the disk may save a resumed run what the unbroken one had to compute.
        assert [v["active"] for v in ours["variants"]] == [v["active"] for v in theirs["variants"]]
        assert ours == theirs
        again, cache = make("cache")
        again.train(Loader(), 3, resume_from=folder)
        assert _books(again) == theirs

    def test_the_boundary_of_the_cache_is_that_of_the_unbroken_run(self, tmp_path):
        # Stopped with outputs of three stages cached; then comes a step of everything, and after
        # it a longer prefix. Rounding to bfloat16 tells where they were cached.
        everything = frozenset(NAMES)
        plan = [{"block_2"}, {"block_2"}, everything, {"head"}, {"head"}, {"head"}]

        def make(where=None):
            cache = PrefixCache(None, examples=ROWS)
            return _trainer(
                policy=lambda at: [frozenset(s) for s in plan], every=6, cache=cache, where=where
            )

        whole = make()
        whole.train(Loader(), 2)
        make(tmp_path).train(Loader((0, 2)), 2)
        again = make(tmp_path)  # Stopped again before its first step.
        again.train(Loader((0, 2)), 2, resume_from=tmp_path)
        resumed = make(tmp_path)
        resumed.train(Loader(), 2, resume_from=tmp_path)
        assert resumed.history.loss == whole.history.loss
        _assert_same(resumed.params, whole.params)

    def test_refuses_a_run_with_other_options(self, tmp_path):
        _trainer(policy="badam(1)", where=tmp_path).train(_batches())
        for options, match in (
            ({"policy": "lisa(1)"}, r"run with policy badam\(1\), not lisa\(1\)"),
            ({"policy": _alternating({"head"})}, "not the function _alternating"),
            ({"policy": "badam(1)", "every": 5}, "run with recalc_every 4, not 5"),
            ({"policy": "badam(1)", "state": "reset"}, "run with state keep, not reset"),
            ({"policy": "priority"}, "run with policy badam"),
        ):
            trainer = _trainer(**options)
            with pytest.raises(ValueError, match=match):
                trainer.train(_batches(), 2, resume_from=tmp_path)
            _assert_same(trainer.params, _params())
            assert trainer.get_step_report()["steps"] == 0

    def test_refuses_another_budget_or_unit(self):
        record = _trainer(share=0.5).step.record()
        for options in ({"share": 0.6}, {"flops": 0.5}):
            with pytest.raises(ValueError, match="run with budget share=0.5, not"):
                _trainer(**options).step.restore(record, ())

    @pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
    def test_after_a_kill(self, tmp_path):
        script = textwrap.dedent(f"""
            import importlib.util, sys, jax
            jax.config.update("jax_num_cpu_devices", 8)
            spec = importlib.util.spec_from_file_location("killed", {__file__!r})
            killed = importlib.util.module_from_spec(spec)
            sys.modules["killed"] = killed
            spec.loader.exec_module(killed)
            trainer, _ = killed._with_disk({str(tmp_path)!r}, "cache")
            trainer.train(killed.Loader((2, 4), killed.signal.SIGKILL), 4)
        """)
        root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
        path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
        done = subprocess.run(
            [sys.executable, "-c", script], env=os.environ | {"PYTHONPATH": path}, check=False,
            capture_output=True, timeout=300,
        )  # fmt: skip
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        whole, cache = _with_disk(tmp_path / "unbroken", "cache")
        whole.train(Loader(), 4)
        cache.close()
        resumed, cache = _with_disk(tmp_path, "cache")
        resumed.train(Loader(), 4, resume_from=tmp_path / "checkpoints")
        cache.close()
        assert len(resumed.history.loss) == 24
        assert resumed.history.loss == whole.history.loss
        _assert_same(resumed.params, whole.params)


def _with_disk(folder, name):
    cache = PrefixCache(os.path.join(folder, name), examples=ROWS)
    where = os.path.join(folder, "checkpoints")
    policy = _alternating({"head"}, {"block_2", "head"}, {"block_1", "head"})
    return _trainer(policy=policy, cache=cache, where=where), cache


class TestOptimizers:
    @pytest.mark.parametrize("state", ["keep", "offload"])
    def test_schedule_and_clipping_by_hand(self, state):
        schedule = optax.cosine_decay_schedule(1.0, 12)
        active = [("block_1", "head"), ("block_0", "block_1")]
        optimizer = optax.chain(
            optax.clip_by_global_norm(0.3), update_active(optax.adam(0.05)),
            optax.scale_by_schedule(schedule),
        )  # fmt: skip
        trainer = _trainer(optimizer=optimizer, policy=_alternating(*active), state=state)
        history = trainer.train(_batches(), 2)
        assert trainer.get_priority_report().total == 24

        params = jax.tree.map(jnp.asarray, _params())
        tx, clip = optax.adam(0.05), optax.clip_by_global_norm(0.3)
        states = {name: tx.init(params[name]) for name in NAMES}
        clipped, losses = 0, []
        gradients = jax.jit(jax.value_and_grad(_tree_loss, has_aux=True))
        for number, batch in enumerate(_batches() * 2):
            (loss, _), grads = gradients(params, batch)
            losses.append(float(loss))
            grads = {name: grads[name] for name in active[number // 4 % 2]}
            clipped += sum(float(np.sum(x**2)) for x in _leaves(grads)) ** 0.5 > 0.3
            grads, _ = clip.update(grads, clip.init(grads))
            for name, grad in grads.items():
                updates, states[name] = tx.update(grad, states[name])
                updates = jax.tree.map(lambda u, n=number: u * schedule(n), updates)
                params[name] = optax.apply_updates(params[name], updates)
        assert 0 < clipped
        np.testing.assert_allclose(history.loss, losses, rtol=1e-4)
        for ours, theirs in zip(_leaves(trainer.params), _leaves(params), strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-3, atol=1e-5)

    def test_slots_of_its_own(self):
        optimizer = update_active(optax.sgd(0.1), group=lambda path: path)
        trainer = _trainer(optimizer=optimizer, policy="suffix(1)", state="reset")
        assert trainer.train(_batches()).updates == [4] * 6
        assert "block_2/up" in trainer.step.slots.names

    def test_more_than_one(self):
        two = optax.chain(update_active(optax.sgd(0.1)), update_active(optax.sgd(0.1)))
        with pytest.raises(ValueError, match="update_active 2 times"):
            _trainer(optimizer=two, policy="full")


class TestModels:
    def test_nnx_stages_are_written_back_and_evaluated_in_their_mode(self):
        modules = _modules(dropout_in=2)
        trainer = _trainer(nnx_stages(modules), policy="suffix(1)")
        before = trainer.params
        trainer.train(_batches(), 2)
        params, by_name = trainer.model, dict(modules)
        _assert_same(params, trainer.params)
        for name in NAMES:
            module = by_name[name]
            held = nnx.to_pure_dict(nnx.state(module, nnx.Param))
            _assert_same(held, params[name])
            same = all(
                np.array_equal(a, b)
                for a, b in zip(_leaves(held), _leaves(before[name]), strict=True)
            )
            assert same == (name not in ("block_2", "head"))
        assert int(by_name["block_2"].dropout.rngs.count[...]) == 12
        x = X[:ROWS]
        for module in by_name.values():
            module.eval()
            x = module(x)
        expected = float(jnp.mean((x - Y[:ROWS]) ** 2))
        values = trainer.evaluate(_batches())
        assert values["loss"] == pytest.approx(expected, rel=1e-5)
        assert values == trainer.evaluate(_batches())

    @pytest.mark.parametrize("kind", ["linen", "nnx", "stacked"])
    def test_other_models_train(self, kind):
        params, options, costs = _params(), {}, _costs()
        blocks = [params[f"block_{i}"] for i in range(3)]
        stack = jax.tree.map(lambda *rows: np.stack(rows), *blocks)
        loss = _loss
        if kind == "linen":
            layers = {
                "embed": flax.linen.Dense(WIDTH),
                **{f"block_{i}": flax.linen.Dense(WIDTH) for i in range(3)},
                "head": flax.linen.Dense(1),
            }
            x, parts = X[:1], []
            for i, (name, layer) in enumerate(layers.items()):
                x, variables = layer.init_with_output(jax.random.key(i), x)
                parts.append(function_stage(name, layer.apply, variables))
            model = chain(*parts)
        elif kind == "nnx":
            model = Net()
            options = {"group": _group}
        else:
            model = {"embed": params["embed"], "block": stack, "head": params["head"]}
            options = {"stacked_axis": lambda path: 0 if path.startswith("block") else None}
            options["group"] = _group
            costs = None

            def loss(params, batch):
                x = _embed(params["embed"], batch["x"])
                for i in range(3):
                    x = _block(jax.tree.map(lambda leaf, i=i: leaf[i], params["block"]), x)
                return _loss(lambda _: _head(params["head"], x), batch)

        trainer = _trainer(
            model, optimizer=optax.adamw(0.02), loss=loss, every=3, costs=costs, state="offload",
            max_variants=32, **options,
        )  # fmt: skip
        before = trainer.evaluate(_batches())["loss"]
        trainer.train(_batches(), 8)
        assert trainer.evaluate(_batches())["loss"] < 0.7 * before
        assert len(trainer.get_step_report()["layers"]) == 5
        assert len(trainer.get_step_report()["variants"]) > 1


class TestDevices:
    def test_eight_choose_as_one(self):
        mesh = jax.sharding.Mesh(np.array(jax.devices()), ("data",))
        whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
        rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
        batches, runs = _batches(1024, 512), []
        for spread in (False, True):
            stages = _chain()
            if spread:
                params = jax.device_put(stages.params, whole)
                stages = dataclasses.replace(stages, params=params)
                batches = [jax.device_put(batch, rows) for batch in batches]
            trainer = _trainer(stages, every=3, state="offload", costs=None)
            history = trainer.train(batches, 6)
            runs.append((history, trainer.get_step_report()))
        (one, a), (eight, b) = runs
        assert all(len(x.sharding.device_set) == 8 for x in jax.tree.leaves(trainer.params))
        sequence = [[(v["active"], v["steps"]) for v in report["variants"]] for report in (a, b)]
        assert sequence[0] == sequence[1] and len(sequence[0]) > 1
        assert one.updates == eight.updates
        np.testing.assert_allclose(one.loss, eight.loss, rtol=1e-5, atol=1e-6)

        # FLOPs are those of one device with all of the batch, or the budget would buy other things.
        assert a["flops"] == b["flops"] and a["full_flops"] == b["full_flops"]

    @pytest.mark.parametrize("policy", ["full", "lisa(1)", "priority"])
    def test_a_device_that_is_not_the_first(self, policy):
        losses = []
        for device in (jax.devices()[0], jax.devices()[3]):
            stages = _chain()
            params = jax.device_put(stages.params, device)
            share = {"share": 0.9} if policy == "priority" else {}
            trainer = _trainer(dataclasses.replace(stages, params=params), policy=policy, **share)
            losses.append(trainer.train(_batches(), 1).loss)
            assert {leaf.device for leaf in jax.tree.leaves(trainer.params)} == {device}
        assert losses[0] == losses[1]


class TestUnusualParameters:
    def test_what_has_no_value_yet_is_no_nan(self):
        with jax.debug_nans(True):
            assert _trainer(policy="priority", share=0.9).train(_batches(), 1).loss

    @pytest.mark.parametrize("make", [None, step("suffix(0)")])
    def test_whole_numbers_stay(self, make):
        """As in a quantized base below an adapter."""

        class Quantized(nnx.Module):
            def __init__(self):
                self.base = nnx.Param(jnp.full((X.shape[1], WIDTH), 3, jnp.int8))
                self.head = nnx.Linear(WIDTH, 1, rngs=nnx.Rngs(0))

            def __call__(self, x):
                return self.head(x @ (self.base[...] * 0.1))

        model = Quantized()
        trainer = Trainer(model, optax.adam(1e-2), _loss, make, progress=False)
        history = trainer.train(_batches(), 4)
        assert history.loss[-1] < history.loss[0]
        assert model.base.dtype == jnp.int8 and (model.base[...] == 3).all()
