"""Tests of `priorityprop_jax.partial.stages`."""

from __future__ import annotations

import functools

import flax.linen as nn
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
    linen_stages,
    nnx_stages,
    scanned_stages,
    stack_params,
)

X = np.random.default_rng(0).normal(size=(6, 3)).astype(np.float32)


def _assert_equal(got, expected):
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        if jnp.issubdtype(a.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))
        assert a.dtype == b.dtype


def _found(stages: Stages, x=X, **options) -> tuple[str, ...]:
    return stages.stochastic(stages.params, stages.state, x, **options)


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
        with pytest.raises(ValueError, match="missing: head"):
            stages.write_back({k: v for k, v in params.items() if k != "head"}, state)

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
        message = "'embed' and 'head' share parameters; tied weights"
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

    def test_functions_that_hide_modules(self):
        module = nnx.Linear(3, 3, rngs=nnx.Rngs(0))
        hidden = [
            lambda x: module(x),
            lambda x: GLOBAL(x),
            functools.partial(lambda m, x: m(x), module),
            functools.partial(lambda x, m: m(x), m=module),
            module.__call__,
        ]
        for function in hidden:
            with pytest.raises(TypeError, match="'f' uses a module.*constants"):
                nnx_stages([("f", function)])

    def test_new_variables(self):
        class Growing(nnx.Module):
            def __call__(self, x):
                self.count = nnx.BatchStat(jnp.zeros(()))
                return x

        stages = nnx_stages([("grow", Growing())])
        with pytest.raises(ValueError, match="'grow' makes or removes variables.*count"):
            stages.run(stages.params, stages.state, X)


GLOBAL = nnx.Linear(3, 3, rngs=nnx.Rngs(0))


class TestScanned:
    stacked = {
        "kernel": np.random.default_rng(1).normal(size=(4, 3, 3)).astype(np.float32),
        "bias": np.random.default_rng(2).normal(size=(4, 3)).astype(np.float32),
    }

    @staticmethod
    def layer(params, x):
        return jnp.tanh(x @ params["kernel"] + params["bias"])

    def model(self, stacked, x):
        return jax.lax.scan(lambda x, params: (self.layer(params, x), None), x, stacked)[0]

    def test_is_the_scan(self):
        stages = scanned_stages(self.layer, self.stacked)
        y, state = stages.run(stages.params, stages.state, X)
        np.testing.assert_allclose(y, self.model(self.stacked, X), rtol=1e-6)
        assert state == {f"block_{i}": {} for i in range(4)}
        _assert_equal(stack_params(stages.params), jax.tree.map(jnp.asarray, self.stacked))
        assert stages.write_back is None

    def test_gradients(self):
        stages = scanned_stages(self.layer, self.stacked)
        grads = jax.grad(lambda p: stages.run(p, stages.state, X)[0].sum())(stages.params)
        expected = jax.grad(lambda p: self.model(p, X).sum())(self.stacked)
        jax.tree.map(
            functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6),
            stack_params(grads),
            expected,
        )

    def test_between_others(self):
        embed = nnx.Linear(2, 3, rngs=nnx.Rngs(0))
        stages = chain(
            nnx_stages([("embed", embed), ("relu", nnx.relu)]),
            scanned_stages(self.layer, self.stacked, name="layer"),
            function_stage("head", lambda w, x: x @ w, jnp.ones([3, 1])),
        )
        assert stages.names == (
            *("embed", "relu", "layer_0", "layer_1", "layer_2", "layer_3", "head"),
        )
        x = X[:, :2]
        y, state = stages.run(stages.params, stages.state, x)
        expected = self.model(self.stacked, nnx.relu(embed(x))) @ jnp.ones([3, 1])
        np.testing.assert_allclose(y, expected, rtol=1e-6)
        _assert_equal(
            stack_params(stages.params, name="layer"), jax.tree.map(jnp.asarray, self.stacked)
        )
        stages.write_back(jax.tree.map(jnp.zeros_like, stages.params), state)
        assert not np.asarray(embed.kernel).any()

    def test_another_axis(self):
        moved = jax.tree.map(lambda leaf: np.moveaxis(leaf, 0, -1), self.stacked)
        stages = scanned_stages(self.layer, moved, axis=-1)
        _assert_equal(stages.params, scanned_stages(self.layer, self.stacked).params)
        _assert_equal(stack_params(stages.params, axis=-1), jax.tree.map(jnp.asarray, moved))

    def test_twelve_layers_in_order(self):
        stages = scanned_stages(lambda w, x: x * w, np.arange(12.0))
        np.testing.assert_array_equal(stack_params(stages.params), np.arange(12.0))

    def test_wrong_input(self):
        with pytest.raises(ValueError, match=r"have \[4, 5\] layers along axis 0"):
            scanned_stages(self.layer, {"a": np.zeros([4, 1]), "b": np.zeros([5, 1])})
        with pytest.raises(ValueError, match="layers along axis 0.*shape"):
            scanned_stages(self.layer, {"a": 1.0})
        with pytest.raises(ValueError, match="no arrays"):
            scanned_stages(self.layer, {})
        with pytest.raises(ValueError, match="no stages"):
            scanned_stages(self.layer, np.zeros([0, 3]))
        with pytest.raises(ValueError, match="without a gap, got block_0, block_2"):
            stack_params({"block_0": 1.0, "block_2": 1.0})


class LinenBlock(nn.Module):
    """Batch statistics and dropout."""

    rate: float = 0.5
    norm: bool = True

    @nn.compact
    def __call__(self, x, train: bool = False):
        x = nn.Dense(4)(x)
        self.sow("intermediates", "seen", x)
        if self.norm:
            x = nn.BatchNorm(use_running_average=not train)(x)
        return nn.Dropout(self.rate, deterministic=not train)(x)


def _linen(rate=0.5, norm=True, rng=None):
    modules = [("block", LinenBlock(rate, norm)), ("relu", nn.relu), ("head", nn.Dense(2))]
    variables = {
        "block": modules[0][1].init(jax.random.key(0), X),
        "head": modules[2][1].init(jax.random.key(1), jnp.ones([1, 4])),
    }
    stages = linen_stages(
        modules,
        variables,
        rng=jax.random.key(2) if rng is None else rng,
        train_kwargs={"train": True},
        eval_kwargs={"train": False},
    )
    return modules, variables, stages


class TestLinen:
    @pytest.mark.parametrize("train", [True, False])
    def test_is_the_plain_model(self, train):
        modules, variables, stages = _linen(rate=0.0)
        (_, block), _, (_, head) = modules

        def plain(params):
            hidden, updated = block.apply(
                {"params": params["block"], "batch_stats": variables["block"]["batch_stats"]},
                X,
                train=train,
                mutable=["batch_stats"],
            )
            return head.apply({"params": params["head"]}, nn.relu(hidden)), updated

        y, state = stages.run(stages.params, stages.state, X, train=train)
        expected, updated = plain(stages.params)
        _assert_equal(y, expected)
        _assert_equal(state["block"]["batch_stats"], updated["batch_stats"])
        assert set(state["block"]) == {"batch_stats", "rng"}
        got = jax.grad(lambda p: stages.run(p, stages.state, X, train=train)[0].sum())(
            stages.params
        )
        grads = jax.grad(lambda p: plain(p)[0].sum())(stages.params)
        _assert_equal(got, grads)

    def test_names(self):
        _, _, stages = _linen()
        assert _names(stages.params) == [
            *(f"block/BatchNorm_0/{name}" for name in ("bias", "scale")),
            *(f"block/Dense_0/{name}" for name in ("bias", "kernel")),
            "head/bias",
            "head/kernel",
        ]

    def test_dropout_differs_between_runs_and_not_in_evaluation(self):
        _, _, stages = _linen(norm=False)
        run = jax.jit(stages.run, static_argnames="train")
        first, state = run(stages.params, stages.state, X)
        second, _ = run(stages.params, state, X)
        again, _ = run(stages.params, stages.state, X)
        assert (first != second).any()
        _assert_equal(first, again)
        y, same = run(stages.params, state, X, train=False)
        _assert_equal(y, run(stages.params, stages.state, X, train=False)[0])
        _assert_equal(same, state)

    def test_keys_of_stages_differ(self):
        drop = nn.Dropout(0.5, deterministic=False)
        stages = linen_stages(
            [("a", drop), ("b", drop)], {"a": {}, "b": {}}, rng=jax.random.PRNGKey(0)
        )
        x = jnp.ones([64])
        a, _ = stages.run(stages.params, stages.state, x, stop=1)
        b, _ = stages.run(stages.params, stages.state, x, start=1)
        assert (a != b).any()
        assert _found(stages, x) == ("a", "b")

    def test_stochastic(self):
        assert _found(_linen(rate=0.5, norm=False)[2]) == ("block",)
        assert _found(_linen(rate=0.0, norm=True)[2]) == ("block",)
        assert _found(_linen(rate=0.0, norm=False)[2]) == ()
        _, state = (stages := _linen(rate=0.0, norm=False)[2]).run(stages.params, stages.state, X)
        _assert_equal(state, stages.state)

    def test_drawing_depends_on_the_shapes(self):
        class Sometimes(nn.Module):
            @nn.compact
            def __call__(self, x):
                return nn.Dropout(0.5, deterministic=len(x) < 3)(x)

        stages = linen_stages([("some", Sometimes())], {"some": {}}, rng=jax.random.key(0))
        assert _found(stages, X) == ("some",)
        assert _found(stages, X[:2]) == ()

    def test_wrong_input(self):
        dense = nn.Dense(2)
        variables = dense.init(jax.random.key(0), X)
        with pytest.raises(ValueError, match="variables must have.*missing: b, unknown: c"):
            linen_stages([("a", dense), ("b", dense)], {"a": variables, "c": variables})
        with pytest.raises(ValueError, match="no module takes the keyword argument 'training'"):
            linen_stages([("a", dense)], {"a": variables}, train_kwargs={"training": True})
        with pytest.raises(TypeError, match="variables must be a dict"):
            linen_stages([("a", dense)], [variables])  # pyright: ignore
        with pytest.raises(TypeError, match="uses a module"):
            linen_stages([("a", lambda x: dense.apply(variables, x))], {})


class Noise(nnx.Module):
    """Augmentation with a random stream."""

    def __init__(self, *, rngs):
        self.rngs = rngs

    def __call__(self, x):
        return x + jax.random.normal(self.rngs.noise(), x.shape, x.dtype)


class Unused(nnx.Module):
    """Has everything and uses nothing of it, by way of transformations."""

    def __init__(self, *, rngs):
        self.rngs = rngs
        self.stat = nnx.BatchStat(jnp.zeros(3))
        self.linear = nnx.Linear(3, 3, rngs=rngs)

    def __call__(self, x):
        return self.linear(x) + self.stat[...]


class Wrapped(nnx.Module):
    """Calls a module under `jit` and `remat`."""

    def __init__(self, module):
        self.module = module

    def __call__(self, x):
        x = nnx.jit(lambda module, x: module(x))(self.module, x)
        return nnx.remat(lambda module, x: module(x))(self.module, x)


class Counter(nnx.Module):
    """Counts its runs, which changes no output."""

    def __init__(self):
        self.runs = nnx.BatchStat(jnp.zeros((), jnp.int32))

    def __call__(self, x):
        self.runs[...] += 1
        return x


class TestStochastic:
    @pytest.mark.parametrize(
        ("module", "found"),
        [
            (lambda r: nnx.Dropout(0.1, rngs=r), True),
            (lambda r: nnx.Dropout(0.0, rngs=r), False),
            (lambda r: Noise(rngs=r), True),
            (lambda r: nnx.BatchNorm(3, rngs=r), True),
            (lambda r: nnx.LayerNorm(3, rngs=r), False),
            (lambda r: nnx.Linear(3, 3, rngs=r), False),
            (lambda r: Unused(rngs=r), False),
            (lambda r: Wrapped(Unused(rngs=r)), False),
            (lambda r: Wrapped(nnx.Dropout(0.5, rngs=r)), True),
            (lambda r: Wrapped(nnx.BatchNorm(3, rngs=r)), True),
            (lambda r: Counter(), True),
            (lambda r: nnx.Sequential(nnx.Linear(3, 3, rngs=r), nnx.Dropout(0.5, rngs=r)), True),
            (lambda r: nnx.relu, False),
        ],
    )
    def test_nnx(self, module, found):
        module = module(nnx.Rngs(0))
        if isinstance(module, nnx.Module):
            module.eval()  # What counts is the training mode.
        stages = nnx_stages([("before", nnx.tanh), ("it", module)])
        for x in (X[:1].astype(jnp.bfloat16), jax.ShapeDtypeStruct((7, 3), np.float32)):
            assert _found(stages, x) == (("it",) if found else ())
        assert _found(stages, X, stop=1) == ()
        # And it is so.
        if found:
            with pytest.raises(ValueError, match="'it'.*cannot be reused.*BatchNorm"):
                stages.check_pure(stages.params, stages.state, X)
            _, state = stages.run(stages.params, stages.state, X)
            with pytest.raises(AssertionError):
                _assert_equal(state, stages.state)
        else:
            assert stages.check_pure(stages.params, stages.state, X) is None
            y, state = stages.run(stages.params, stages.state, X)
            _assert_equal(state, stages.state)
            _assert_equal(y, stages.run(stages.params, state, X)[0])
        stages.check_pure(stages.params, stages.state, X, stop=1)

    def test_transformed_state(self):
        def scanned(change):
            def apply(params, state, x):
                def body(carry, row):
                    a, b, x = carry
                    if change in ("swap", "swap back"):
                        a, b = b, a
                    elif change == "carry":
                        a = a + 1
                    return (a, b, x * 2), row + 1 if change == "rows" else row

                (a, b, x), rows = jax.lax.scan(body, (state["a"], state["b"], x), state["rows"])
                if change == "swap back":  # Four swaps and one more.
                    a, b = b, a
                return x, {"a": a, "b": b, "rows": rows}

            return apply

        def conditional(change):
            def apply(params, state, x):
                other = (lambda s: {**s, "a": s["a"] + 1}) if change else (lambda s: s)
                return x, jax.lax.cond(x.sum() > 0, lambda s: s, other, state)

            return apply

        state = {"a": jnp.zeros(()), "b": jnp.ones(()), "rows": jnp.zeros([4])}
        cases = [
            (scanned(change), bool(change))
            for change in (None, "swap", "swap back", "carry", "rows")
        ]
        cases += [(conditional(change), change) for change in (False, True)]
        cases += [
            (lambda p, s, x: (x, {**s, "a": s["b"]}), True),
            (lambda p, s, x: (x, {**s, "a": 0.0}), True),
            (lambda p, s, x: (x, {}), True),
            (lambda p, s, x: (x, {**s, "a": s["a"] * 1}), True),
        ]
        for apply, found in cases:
            stages = Stages(("it",), (apply,), (apply,), {"it": {}}, {"it": state})
            assert _found(stages) == (("it",) if found else ())

    def test_nothing_is_computed(self):
        def apply(params, x):
            jax.debug.callback(lambda: pytest.fail("was run"))
            return x

        stages = function_stage("it", apply)
        assert _found(stages) == ()

    @pytest.mark.parametrize("x", [2.0, np.float32(2), jnp.ones((), jnp.bfloat16), np.ones([0, 3])])
    def test_any_x(self, x):
        stages = function_stage("it", lambda params, x: params * x, jnp.ones((), jnp.bfloat16))
        assert _found(stages, x) == ()
        y, _ = stages.run(stages.params, stages.state, x)
        assert y.shape == jnp.shape(x)


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
        with pytest.raises(error, match=message):
            linen_stages(modules, {})

    def test_stages(self):
        def apply(params, state, x):
            return x, state

        with pytest.raises(ValueError, match="applies must have one function a stage, got 1 for 2"):
            Stages(("a", "b"), (apply,), (apply,), {"a": {}, "b": {}}, {"a": {}, "b": {}})
        with pytest.raises(TypeError, match="eval_applies of stage 'a' must be a function"):
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
            scanned_stages(lambda p, x: x * p, np.full(2, 2.0), eval_apply=lambda p, x: x / p),
        )
        assert float(stages.run(stages.params, stages.state, 3.0)[0]) == 16
        assert float(stages.run(stages.params, stages.state, 3.0, train=False)[0]) == 0.5

    @pytest.mark.parametrize(("start", "stop"), [(-1, None), (2, 1), (0, 3), (3, None)])
    def test_ranges(self, start, stop):
        stages = nnx_stages([("a", nnx.relu), ("b", nnx.relu)])
        with pytest.raises(ValueError, match="0 <= start <= stop <= 2 stages, got"):
            stages.run({"a": {}, "b": {}}, {"a": {}, "b": {}}, X, start=start, stop=stop)
        with pytest.raises(TypeError, match="start must be a whole number"):
            stages.run(stages.params, stages.state, X, start="a")  # pyright: ignore

    def test_missing_params(self):
        stages = nnx_stages([("a", nnx.relu), ("b", nnx.relu)])
        with pytest.raises(ValueError, match="params must have.*missing: b"):
            stages.run({"a": {}}, stages.state, X)
        with pytest.raises(ValueError, match="state must have.*missing: a"):
            stages.stochastic(stages.params, {"b": {}}, X)
        with pytest.raises(TypeError, match="params must be a dict by stage name, got list"):
            stages.run([], stages.state, X)  # pyright: ignore
