"""Parts of a program against the whole of it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from priorityprop_jax.core.cut import Cut

ARGS = [jnp.arange(3.0), jnp.arange(3.0) + 1, jnp.float32(2.0), jnp.int32(1)]


def function(args):
    a, b, rate, count = args
    half = jax.jit(lambda a, b: (jnp.sin(a), jnp.cos(b)))
    branch = lambda a, b: (a * rate, b - count)  # noqa: E731
    both = lax.cond(count > 0, branch, lambda a, b: (a, b), a, b)
    total = jnp.sum(a) + jnp.sum(b)
    return [*half(a, b), *both, total * a, a * 2, rate, jnp.zeros_like(a), jnp.zeros(3) * rate]


@pytest.mark.parametrize(
    ("results", "needs"),
    [([0], {0}), ([1], {1}), ([2], {0, 2, 3}), ([3], {1, 3}), ([5, 1], {0, 1}), ([7, 6], {2})],
)
def test_a_part_is_as_the_whole_and_takes_what_it_needs(results, needs):
    cut = Cut(function, ARGS)
    part = cut.part(results, needs)
    assert part is not None and set(part.needed) == needs
    found = part.run({i: ARGS[i] for i in needs})
    whole = function(ARGS)
    for i, x in zip(results, found, strict=True):
        np.testing.assert_array_equal(x, whole[i])
    for one in needs:
        assert cut.part(results, needs - {one}) is None
    if len(results) == 1:
        assert len(part.operations) < len(jax.make_jaxpr(lambda *x: function(x))(*ARGS).eqns)


def test_what_all_arguments_make_is_no_part():
    assert Cut(function, ARGS).part([4], {0, 2}) is None
    everything = Cut(function, ARGS).whole(range(9), [7, 8, 9, 10])
    found = everything.run(dict(zip([7, 8, 9, 10], ARGS, strict=True)))
    for x, y in zip(found, function(ARGS), strict=True):
        np.testing.assert_array_equal(x, y)


def test_what_passes_and_what_is_zero():
    cut = Cut(function, ARGS)
    assert cut.results == 9
    assert [i for i in range(9) if cut.passes(2, i)] == [6]
    assert [i for i in range(9) if cut.is_zero(i)] == [7, 8]
    off = Cut(lambda args: [args[0] * 0.0, args[0] - args[0]], [jnp.ones(2)])
    assert not off.is_zero(0) and not off.is_zero(1), "a rate of zero is no label"


def test_a_program_that_acts_is_not_cut():
    def speaks(args):
        jax.debug.callback(lambda x: None, args[1])
        return args

    assert Cut(speaks, ARGS[:2]).part([0], {0, 1}) is None


DRAWS = {
    "key": lambda args: jax.random.normal(args[0], (4,)),
    "count": lambda args: jax.random.normal(jax.random.fold_in(jax.random.key(0), args[1]), (4,)),
    "raw": lambda args: jax.random.uniform(jax.random.PRNGKey(args[1]), (4,)),
    "split": lambda args: jax.vmap(lambda k: jax.random.normal(k))(jax.random.split(args[0], 4)),
    "branch": lambda args: lax.cond(
        args[1] > 0, lambda: jax.random.normal(args[0], (4,)), lambda: jnp.zeros(4)
    ),
    "gamma": lambda args: jax.random.gamma(args[0], 2.0, (4,)),
    "rademacher": lambda args: jax.random.rademacher(args[0], (64,)).astype(jnp.float32),
}


@pytest.mark.parametrize("name", DRAWS)
def test_streams_draw_numbers_of_their_own(name):
    args = [jax.random.key(3), jnp.int32(5)]
    part = Cut(lambda args: [DRAWS[name](args)], args).part([0], {0, 1})
    run = jax.jit(lambda stream: part.run(dict(enumerate(args)), stream)[0])
    draws = [run(stream) for stream in range(5)]
    np.testing.assert_allclose(draws[0], DRAWS[name](args), rtol=5e-6)
    np.testing.assert_array_equal(part.run(dict(enumerate(args)))[0], DRAWS[name](args))
    assert len({x.tobytes() for x in map(np.asarray, draws)}) == 5
    together = jax.vmap(run)(jnp.arange(5))
    np.testing.assert_allclose(together, draws, rtol=5e-6)


def test_draws_in_a_loop_are_refused_where_streams_differ():
    def loop(args):
        draw = lambda i, x: x + jax.random.normal(jax.random.fold_in(args[0], i))  # noqa: E731
        return [lax.fori_loop(0, 3, draw, jnp.float32(0))]

    args = [jax.random.key(3)]
    part = Cut(loop, args).part([0], {0})
    np.testing.assert_array_equal(part.run({0: args[0]})[0], loop(args)[0])
    with pytest.raises(TypeError, match="random numbers within a '(scan|while)'"):
        part.run({0: args[0]}, 1)
