"""Tests of `priorityprop_jax.partial.stages`."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from priorityprop_jax.core.paths import path_name
from priorityprop_jax.partial.stages import (
    Stages,
    chain,
    function_stage,
    nnx_stages,
)

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def _names(tree) -> list[str]:
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]


class Normalised(nnx.Module):
    """A layer with batch statistics, dropout, an intermediate and a list."""

    def __init__(self, *, rngs):
        self.layers = nnx.List([nnx.Linear(3, 4, rngs=rngs)])
        self.norm = nnx.BatchNorm(4, rngs=rngs)
        self.drop = nnx.Dropout(0.5, rngs=rngs)

    def __call__(self, x):
        x = self.norm(self.layers[0](x))
        self.seen = nnx.Intermediate(x)
        return self.drop(x)


class Masked(nnx.Module):
    """Takes and gives a pair."""

    def __init__(self, *, rngs):
        self.linear = nnx.Linear(4, 4, rngs=rngs)

    def __call__(self, pair):
        x, mask = pair
        return self.linear(x) * mask, mask


def _nnx_model():
    rngs = nnx.Rngs(0)
    return [
        ("first", Normalised(rngs=rngs)),
        ("pair", lambda x: (x, x > 0)),
        ("second", Masked(rngs=rngs)),
        ("unpair", lambda pair: pair[0]),
        ("head", nnx.Linear(4, 2, rngs=rngs)),
    ]


def _plain(modules, x):
    for _, module in modules:
        x = module(x)
    return x


class TestNnx:
    @pytest.mark.parametrize("train", [True, False])
    def test_is_the_plain_model(self, train):
        modules = _nnx_model()
        stages = nnx_stages(modules)
        y, state = stages.run(stages.params, stages.state, X, train=train)
        for _, module in modules:
            if isinstance(module, nnx.Module):
                module.train() if train else module.eval()
        _assert_equal(y, _plain(modules, X))
        nnx.pop(modules[0][1], nnx.Intermediate)
        again = nnx_stages(modules)
        _assert_equal(state, again.state)
        _assert_equal(stages.params, again.params)
        if not train:
            _assert_equal(state, stages.state)

    def test_gradients(self):
        modules = _nnx_model()
        stages = nnx_stages(modules)

        def plain_loss(first, second, head):
            x = first(X)
            x, _ = second((x, x > 0))
            return (head(x) ** 2).sum()

        by_name = dict(modules)
        expected = nnx.grad(plain_loss, argnums=(0, 1, 2))(
            by_name["first"], by_name["second"], by_name["head"]
        )
        got = jax.grad(lambda p: (stages.run(p, stages.state, X)[0] ** 2).sum())(stages.params)
        assert set(got) == {"first", "pair", "second", "unpair", "head"}
        for name, grads in zip(("first", "second", "head"), expected, strict=True):
            assert _names(grads) == _names(got[name])
            for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(got[name]), strict=True):
                np.testing.assert_array_equal(a, b)

    def test_names(self):
        stages = nnx_stages(_nnx_model())
        assert _names(stages.params) == [
            "first/layers/0/bias",
            "first/layers/0/kernel",
            "first/norm/bias",
            "first/norm/scale",
            "head/bias",
            "head/kernel",
            "second/linear/bias",
            "second/linear/kernel",
        ]
        assert stages.params["pair"] == {} and stages.state["head"] == {}
        assert set(_names(stages.state)) == {
            "first/drop/rngs/count",
            "first/drop/rngs/key",
            "first/norm/mean",
            "first/norm/var",
        }

    def test_halves_are_the_whole(self):
        stages = nnx_stages(_nnx_model())
        whole, whole_state = stages.run(stages.params, stages.state, X)
        for cut in range(len(stages) + 1):
            hidden, state = stages.run(stages.params, stages.state, X, stop=cut)
            y, state = stages.run(stages.params, state, hidden, start=cut)
            _assert_equal(y, whole)
            _assert_equal(state, whole_state)

    def test_compiled_halves(self):
        stages = nnx_stages(_nnx_model())
        run = jax.jit(stages.run, static_argnames=("start", "stop"))
        hidden, state = run(stages.params, stages.state, X, stop=2)
        y, state = run(stages.params, state, hidden, start=2)
        # Fusions differ between programs, and so may the last bits.
        expected, _ = stages.run(stages.params, stages.state, X)
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
        assert int(state["first"]["drop"]["rngs"]["count"]) == 1

    def test_stages_not_run_keep_their_state(self):
        stages = nnx_stages(_nnx_model())
        state = jax.tree.map(lambda leaf: leaf, stages.state)
        _, new_state = stages.run(stages.params, state, jnp.ones([6, 4]), start=4)
        assert all(
            a is b for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(new_state), strict=True)
        )

    def test_modes_are_left_alone(self):
        modules = _nnx_model()
        first = dict(modules)["first"]
        for mode in (first.train, first.eval):
            mode()
            before = nnx.graphdef(first)
            stages = nnx_stages(modules)
            _, state = stages.run(stages.params, stages.state, X)
            stages.run(stages.params, stages.state, X, train=False)
            stages.write_back(stages.params, state)
            assert nnx.graphdef(first) == before
            assert not jax.tree.leaves(nnx.state(first, nnx.Intermediate))

    def test_write_back(self):
        modules = _nnx_model()
        stages = nnx_stages(modules)
        params = jax.tree.map(lambda leaf: leaf + 1, stages.params)
        y, state = stages.run(params, stages.state, X)
        stages.write_back(params, state)
        again = nnx_stages(modules)
        _assert_equal(again.params, params)
        _assert_equal(again.state, state)
        kernel = dict(modules)["head"].kernel
        assert isinstance(kernel, nnx.Param)

    def test_trains(self):
        rngs = nnx.Rngs(0)
        modules = [("a", nnx.Linear(3, 8, rngs=rngs)), ("head", nnx.Linear(8, 1, rngs=rngs))]
        stages = nnx_stages(modules)
        optimizer = optax.adam(1e-2)

        @jax.jit
        def step(params, opt_state):
            def loss_fn(params):
                return jnp.mean((stages.run(params, stages.state, X)[0] - 1.0) ** 2)

            loss, grads = jax.value_and_grad(loss_fn)(params)
            updates, opt_state = optimizer.update(grads, opt_state)
            return optax.apply_updates(params, updates), opt_state, loss

        params, opt_state = stages.params, optimizer.init(stages.params)
        losses = []
        for _ in range(20):
            params, opt_state, loss = step(params, opt_state)
            losses.append(float(loss))
        assert losses[-1] < 0.3 * losses[0]
        assert step._cache_size() == 1

    def test_variable_that_is_a_dict(self):
        class Pair(nnx.Module):
            def __init__(self):
                self.both = nnx.Param({"a": jnp.ones(3), "b": jnp.zeros(3)})

            def __call__(self, x):
                both = self.both.get_value()
                return x * both["a"] + both["b"]

        module = Pair()
        stages = nnx_stages([("pair", module)])
        _assert_equal(stages.run(stages.params, stages.state, X)[0], jnp.asarray(X))
        assert _names(stages.params) == ["pair/both/a", "pair/both/b"]
        stages.write_back(jax.tree.map(lambda leaf: leaf + 2, stages.params), stages.state)
        np.testing.assert_array_equal(module.both.get_value()["b"], 2.0)

    def test_tied(self):
        rngs = nnx.Rngs(0)
        embed, other = nnx.Linear(3, 3, rngs=rngs), nnx.Linear(3, 3, rngs=rngs)
        message = "'embed' and 'head' share parameters, which cannot be trained by halves"
        with pytest.raises(ValueError, match=message):
            nnx_stages([("embed", embed), ("head", embed)])
        other.kernel = embed.kernel
        with pytest.raises(ValueError, match=message):
            nnx_stages([("embed", embed), ("head", other)])
        with pytest.raises(ValueError, match=message):
            chain(nnx_stages([("embed", embed)]), nnx_stages([("head", other)]))
        drop = nnx.Dropout(0.5, rngs=rngs)
        with pytest.raises(ValueError, match=r"share random streams or state.*fork"):
            nnx_stages([("a", drop), ("b", drop)])
        # Within one stage they are what they are.
        stages = nnx_stages([("both", nnx.Sequential(embed, embed))])
        _assert_equal(stages.run(stages.params, stages.state, X)[0], embed(embed(X)))

    def test_new_variables(self):
        class Growing(nnx.Module):
            def __call__(self, x):
                self.count = nnx.BatchStat(jnp.zeros(()))
                return x

        stages = nnx_stages([("grow", Growing())])
        with pytest.raises(ValueError, match="'grow' has changed the model's count,"):
            stages.run(stages.params, stages.state, X)


class TestModel:
    """What a trainer asks of a model."""

    def _stages(self):
        return nnx_stages(_nnx_model())

    def test_loss_from_any_stage(self):
        stages, batch = self._stages(), {"x": X}

        def loss_fn(model, batch):
            return (model(batch["x"]) ** 2).sum()

        whole, state = stages.loss(loss_fn, *stages.split(), batch)
        y, expected = stages.run(*stages.split(), X)
        assert float(whole) == float((y**2).sum())
        _assert_equal(state, expected)
        hidden, state = stages.run(*stages.split(), X, stop=3)
        part, state = stages.loss(loss_fn, stages.params, state, batch, x=hidden, start=3)
        assert float(part) == float(whole)
        _assert_equal(state, expected)

    def test_a_loss_that_changes_the_inputs_is_refused_where_they_were_used_already(self):
        stages = self._stages()
        loss_fn = lambda model, batch: model(batch["x"] + 1.0).sum()  # noqa: E731
        stages.loss(loss_fn, *stages.split(), {"x": X})
        with pytest.raises(ValueError, match=r"batch\['x'\] as it is"):
            stages.loss(loss_fn, *stages.split(), {"x": X}, x=jnp.ones([6, 4]), start=4)

    @pytest.mark.parametrize("times", [0, 2])
    def test_a_loss_calls_the_model_once(self, times):
        stages = self._stages()
        with pytest.raises(ValueError, match=f"call the model once, but did {times} times"):
            stages.loss(lambda m, b: [m(b["x"]) for _ in range(times)], *stages.split(), {"x": X})

    def test_join_and_split(self):
        modules = _nnx_model()
        stages = nnx_stages(modules)
        params = jax.tree.map(lambda leaf: leaf + 1, stages.params)
        _, state = stages.run(params, stages.state, X)
        stages.join(params, state)
        _assert_equal(stages.split(), (params, state))
        _assert_equal(nnx_stages(modules).params, params)
        with pytest.raises(ValueError, match="missing: head"):
            stages.join({k: v for k, v in params.items() if k != "head"}, state)

    def test_evaluator(self):
        stages = self._stages()
        y = stages.evaluator(*stages.split())(X)
        _assert_equal(y, stages.run(*stages.split(), X, train=False)[0])


class TestArguments:
    @pytest.mark.parametrize(
        ("modules", "error", "message"),
        [
            ([], ValueError, "there are no stages"),
            ([("a", nnx.relu), ("a", nnx.tanh)], ValueError, "different names, got a twice"),
            ([("a/b", nnx.relu)], ValueError, "'/' in it.*got 'a/b'"),
            ([("", nnx.relu)], ValueError, "must not be empty"),
            ([(1, nnx.relu)], TypeError, "must be a string, got 1"),
            ([nnx.relu], TypeError, r"must be a pair \(name, module\)"),
            ([("a", 3)], TypeError, "'a' must be a module or a function"),
            ([("a", nnx.Linear)], TypeError, "'a' must be a module or a function"),
        ],
    )
    def test_lists(self, modules, error, message):
        with pytest.raises(error, match=message):
            nnx_stages(modules)

    def test_stages(self):
        def apply(params, state, x):
            return x, state

        with pytest.raises(ValueError, match="applies must have one function.*each of a, b"):
            Stages(("a", "b"), (apply,), (apply,), {"a": {}, "b": {}}, {"a": {}, "b": {}})
        with pytest.raises(ValueError, match="eval_applies must have one function"):
            Stages(("a",), (apply,), (None,), {"a": {}}, {"a": {}})  # pyright: ignore
        with pytest.raises(ValueError, match="params must have.*missing: a, unknown: b"):
            Stages(("a",), (apply,), (apply,), {"b": {}}, {"a": {}})
        with pytest.raises(TypeError, match="state must be a dict"):
            Stages(("a",), (apply,), (apply,), {"a": {}}, None)  # pyright: ignore

    def test_chain(self):
        part = function_stage("a", lambda params, x: x)
        with pytest.raises(ValueError, match="got a twice"):
            chain(part, part)
        with pytest.raises(ValueError, match="no stages"):
            chain()
        with pytest.raises(TypeError, match="chain takes Stages, got function"):
            chain(part, lambda x: x)  # pyright: ignore
        with pytest.raises(TypeError, match="apply must be a function"):
            function_stage("a", 3)  # pyright: ignore

    def test_evaluation_mode_of_functions(self):
        stages = chain(
            function_stage("a", lambda p, x: x + 1, eval_apply=lambda p, x: x - 1),
            function_stage("b", lambda p, x: x * p, 4.0, eval_apply=lambda p, x: x / p),
        )
        assert float(stages.run(stages.params, stages.state, 3.0)[0]) == 16
        assert float(stages.run(stages.params, stages.state, 3.0, train=False)[0]) == 0.5

    @pytest.mark.parametrize(("start", "stop"), [(-1, None), (2, 1), (0, 3), (3, None)])
    def test_ranges(self, start, stop):
        stages = nnx_stages([("a", nnx.relu), ("b", nnx.relu)])
        with pytest.raises(ValueError, match="0 <= start <= stop <= 2 stages, got"):
            stages.run({"a": {}, "b": {}}, {"a": {}, "b": {}}, X, start=start, stop=stop)

    def test_missing_params(self):
        stages = nnx_stages([("a", nnx.relu), ("b", nnx.relu)])
        with pytest.raises(ValueError, match="params must have.*missing: b"):
            stages.run({"a": {}}, stages.state, X)
        with pytest.raises(ValueError, match="state must have.*missing: a"):
            stages.run(stages.params, {"b": {}}, X)
        with pytest.raises(TypeError, match="params must be a dict by stage name, got list"):
            stages.run([], stages.state, X)  # pyright: ignore
