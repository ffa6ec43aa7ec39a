"""SOAP of the benchmark against its definition, and which bases are refreshed when."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import soap_refreshes

pytestmark = pytest.mark.once

SHAPES = {f"m{i}": (4, 6) for i in range(8)} | {"n": (5, 5)}


def gradients(step):
    rng = np.random.default_rng(step)
    # Of different sizes by row and column, or bases would not matter
    size = np.logspace(0, -0.5, 6)
    return {k: rng.normal(size=s) * size[: s[0], None] * size[: s[1]] for k, s in SHAPES.items()}


def bases_of(state):
    """Every basis, and its factor."""
    halves = [soap_refreshes.halves(x) for x in state[3]]
    return [[np.asarray(y) for x in side for y in x] for side in zip(*halves, strict=True)]


def run(arm, steps):
    tx = soap_refreshes.soap(arm)
    state, made = tx.init(jax.tree.map(jnp.float32, gradients(0))), []
    step = jax.jit(tx.update)
    for t in range(steps):
        updates, state = step(jax.tree.map(jnp.float32, gradients(t)), state)
        made.append((updates, bases_of(state)))
    return made


def reference(name, every, steps):
    """The definition, for one matrix."""
    b1, b2 = soap_refreshes.BETAS
    g = gradients(0)[name]
    left, right = g @ g.T, g.T @ g
    a, b = np.linalg.eigh(left)[1], np.linalg.eigh(right)[1]
    m, v, found = (1 - b1) * g, np.zeros_like(g), [0 * g]
    for t in range(1, steps):
        g = gradients(t)[name]
        left, right = b2 * left + (1 - b2) * g @ g.T, b2 * right + (1 - b2) * g.T @ g
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * (a.T @ g @ b) ** 2
        scaled = (a.T @ m @ b) / (1 - b1 ** (t + 1)) / np.sqrt(v / (1 - b2**t))
        found.append(a @ scaled @ b.T)
        if (t - 1) % every == 0:
            a, b = np.linalg.qr(left @ a)[0], np.linalg.qr(right @ b)[0]
    return found


@pytest.mark.parametrize(("arm", "every"), [("every step", 1), ("interval 3", 3)])
def test_it_is_the_definition(arm, every):
    made = run(arm, 8)
    # A square one: of the long side of others the first basis is not unique.
    for (updates, _), wanted in zip(made, reference("n", every, 8), strict=True):
        np.testing.assert_allclose(updates["n"], wanted, atol=1e-3 * np.abs(wanted).max())


@pytest.mark.parametrize(
    ("arm", "refreshed"),
    [("interval 8", [18, *[0] * 7]), ("robin 1/8", [3] * 8), ("change 1/8", [3] * 8)],
)
def test_so_many_bases_are_refreshed(arm, refreshed):
    made = [bases for _, (_, bases) in run(arm, 9)]
    for bases in made:
        for basis in bases:
            np.testing.assert_allclose(basis.T @ basis, np.eye(len(basis)), atol=1e-5)
    changes = [
        sum(not np.array_equal(x, y) for x, y in zip(old, new, strict=True))
        for old, new in zip(made[:-1], made[1:], strict=True)
    ]
    assert changes == refreshed


def test_the_basis_that_fits_worst_is_next():
    made = run("change 1/8", 4)
    sides = lambda n: [i for i, basis in enumerate(made[2][1][1]) if len(basis) == n]  # noqa: E731
    _, old = made[2][1]
    factors, new = made[3][1]
    for n in (4, 6):
        stale = {}
        for i in sides(n):
            seen = old[i].T @ factors[i].astype(float) @ old[i]
            stale[i] = 1 - np.sum(np.diag(seen) ** 2) / np.sum(seen**2)
        (chosen,) = [i for i in sides(n) if not np.array_equal(old[i], new[i])]
        assert chosen == max(stale, key=lambda i: stale[i])


def test_the_report_is_of_all_seeds(tmp_path, monkeypatch):
    monkeypatch.setattr(soap_refreshes, "FOLDER", tmp_path)
    for arm, loss in (("interval 8", 2.0), ("robin 1/8", 1.9), ("nadam", 2.5)):
        rates = {1e-3: 3.0, 2e-3: 1.0, 4e-3: 2.0} if arm != "robin 1/8" else {}
        for rate, its in rates.items():
            soap_refreshes.add_line(
                tmp_path / "runs.jsonl", {"arm": arm, "rate": rate, "seed": 0, "loss": its}
            )
        for seed in soap_refreshes.SEEDS if arm != "nadam" else (1,):
            soap_refreshes.add_line(
                tmp_path / "runs.jsonl", {"arm": arm, "rate": 2e-3, "seed": seed, "loss": loss}
            )
    monkeypatch.setattr(soap_refreshes, "RATES", (1e-3, 2e-3))
    arms = soap_refreshes.report()["arms"]
    assert set(arms) == {"interval 8", "robin 1/8"}  # NAdam has one seed
    assert arms["robin 1/8"]["rate"] == 2e-3
    np.testing.assert_allclose(arms["robin 1/8"]["over interval 8"], -0.1)
    assert "| robin 1/8 | 0.002 | 1.900 | -0.100, -0.100, -0.100 |" in soap_refreshes.markdown(
        soap_refreshes.report()
    )
