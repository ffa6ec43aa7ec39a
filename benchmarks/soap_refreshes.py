"""Whether it matters which eigenbases of SOAP are refreshed, where few of them may be a step.

SOAP (Vyas et al., 2024, arXiv 2409.11321) is Adam in the eigenbases of two factors of each matrix,
``G G^T`` and ``G^T G`` averaged over steps. Keeping a basis fresh, one power iteration and a QR
decomposition, is most of its work; usually all are refreshed at once, every so many steps. The
character transformer of `benchmarks.muon_learning`, 8 blocks of width 32, 512 characters a step,
hidden matrices by SOAP and the rest by NAdam. The arms:

- `every step`: all bases at every step; `interval 8`, `interval 64`: all at once, every so many.
- `robin 1/8`, `random 1/8`, `change 1/8`: an eighth of them a step by `priority.budgeted`, in turn,
  at random, or those whose factor has most of its norm off the diagonal in its own basis.
- `nadam`: NAdam for all parameters.

Run as `python -m benchmarks.soap_refreshes`; counts steps, so that the machine may be busy. The
rate of SOAP is the best of factors of two for `interval 8`, that of NAdam its own, on seed 0; seeds
1 to 3 count. What is finished is not run again. Writes `benchmarks/results/soap/`.
"""

from __future__ import annotations

import argparse
import math
from statistics import fmean
from typing import Any

import jax
import jax.numpy as jnp
import optax

from benchmarks.muon_learning import program, train
from benchmarks.records import RESULTS, about, add_line, read_lines, write
from benchmarks.speed.muon import hidden
from benchmarks.tasks.problems import characters
from priorityprop_jax.priority import budgeted

FOLDER = RESULTS / "soap"
WIDTH, DEPTH, TOKENS, STEPS, SEEDS = 32, 8, 512, 200, (1, 2, 3)
RATES = (3e-3, 6e-3)
SCORES = {"robin 1/8": "robin", "random 1/8": "random"}
ARMS = ("interval 8", "nadam", "robin 1/8", "change 1/8", "random 1/8", "interval 64", "every step")
BETAS, EPS = (0.95, 0.95), 1e-8  # SOAP's own


def halves(both: jax.Array) -> list[jax.Array]:
    """Factors and bases, of the two side by side, ``[..., n, 2 n]``."""
    return jnp.split(both, 2, axis=-1)


def fresh(both: jax.Array) -> jax.Array:
    """A factor beside its basis to zeros beside the basis, refreshed."""
    factor, basis = halves(both)
    # Squares of what is left of small singular values are subnormal, which LAPACK is slow with.
    factor = factor / jnp.maximum(jnp.trace(factor), 1e-30)
    new = jnp.linalg.qr(factor @ basis)[0]
    return jnp.concatenate([jnp.zeros_like(new), new], axis=-1)


def staleness(both: jax.Array) -> jax.Array:
    """The share of a factor's norm that is off the diagonal in its basis."""
    factor, basis = halves(both)
    diagonal = jnp.sum(basis * (factor @ basis), axis=-2)  # of the factor in its basis
    return 1 - jnp.sum(diagonal**2) / (jnp.sum(factor**2) + 1e-30)


def change(look: Any) -> jax.Array:
    """Priority by change: the basis that fits its factor worst is next."""
    return look.measure(lambda factors, params, updates: staleness(factors[0]))


def refreshes(arm: str) -> optax.GradientTransformation:
    """Gives each basis, or zeros where it stays as it is, as updates of factors beside bases."""
    if arm in ("robin 1/8", "random 1/8", "change 1/8"):
        return budgeted(fresh, 1 / 8, score=SCORES.get(arm, change))
    every = {"every step": 1}.get(arm) or int(arm.split()[1])

    def update_fn(both, step, params=None):
        del params
        all_of_them = lambda both: [jax.vmap(fresh)(one) for one in both]  # noqa: E731
        none = lambda both: [jnp.zeros_like(one) for one in both]  # noqa: E731
        return jax.lax.cond(step % every == 0, all_of_them, none, both), step + 1

    return optax.GradientTransformation(lambda both: jnp.zeros((), jnp.int32), update_fn)


def soap(arm: str) -> optax.GradientTransformation:
    """SOAP on leaves that are matrices; the first update is zero and finds the bases."""
    chosen, turned = refreshes(arm), jnp.matrix_transpose

    def by_shape(tree):
        """Stacks ``[matrices, m, n]`` of those of one shape, and the way back."""
        leaves, treedef = jax.tree.flatten(tree)
        groups: dict[Any, list[int]] = {}
        for i, x in enumerate(leaves):
            groups.setdefault(x.shape, []).append(i)

        def back(stacks):
            places = [i for own in groups.values() for i in own]
            flat = dict(zip(places, [x for stack in stacks for x in stack], strict=True))
            return treedef.unflatten([flat[i] for i in range(len(leaves))])

        return [jnp.stack([leaves[i] for i in own]) for own in groups.values()], back

    def init_fn(params):
        stacks, _ = by_shape(params)
        zeros = lambda: [jnp.zeros_like(x) for x in stacks]  # noqa: E731
        both = [
            jnp.tile(jnp.concatenate([jnp.zeros((n, n)), jnp.eye(n)], axis=1), (len(x), 1, 1))
            for x in stacks
            for n in x.shape[1:]
        ]  # of the rows, then of the columns
        return jnp.zeros((), jnp.int32), zeros(), zeros(), both, chosen.init(both)

    def update_fn(updates, state, params=None):
        del params
        stacks, back = by_shape(updates)
        step, mean, square, both, inner = state
        factors, bases = zip(*map(halves, both), strict=True)
        grams = [gram for x in stacks for gram in (x @ turned(x), turned(x) @ x)]
        weight = jnp.where(step == 0, 1.0, 1 - BETAS[1])
        factors = [(1 - weight) * f + weight * g for f, g in zip(factors, grams, strict=True)]
        mean = optax.tree.update_moment(stacks, mean, BETAS[0], 1)
        pairs = list(zip(bases[::2], bases[1::2], strict=True))
        later = step > 0  # from the second step on there are bases
        first, second = 1 - BETAS[0] ** (step + 1), 1 - BETAS[1] ** jnp.maximum(step, 1)
        squares, new = [], []
        for x, m, s, (left, right) in zip(stacks, mean, square, pairs, strict=True):
            s = later * (BETAS[1] * s + (1 - BETAS[1]) * (turned(left) @ x @ right) ** 2)
            scaled = turned(left) @ m @ right / first / (jnp.sqrt(s / second) + EPS)
            squares.append(s)
            new.append(later * (left @ scaled @ turned(right)))

        def refreshed(inner):
            beside = [jnp.concatenate(pair, axis=-1) for pair in zip(factors, bases, strict=True)]
            out, inner = chosen.update(beside, inner)
            found = []
            for basis, (_, new) in zip(bases, map(halves, out), strict=True):
                length = jnp.linalg.norm(new, axis=-2, keepdims=True)  # `budgeted` makes it longer
                found.append(jnp.where(length > 0, new / jnp.maximum(length, EPS), basis))
            return found, inner

        whole = lambda inner: ([jnp.linalg.eigh(f)[1] for f in factors], inner)  # noqa: E731
        bases, inner = jax.lax.cond(step == 0, whole, refreshed, inner)
        both = [jnp.concatenate(pair, axis=-1) for pair in zip(factors, bases, strict=True)]
        return back(new), (step + 1, mean, squares, both, inner)

    return optax.GradientTransformation(init_fn, update_fn)


def optimizer(arm: str) -> optax.GradientTransformation:
    """An arm at the rate of 1."""
    nadam = optax.nadam(1.0)
    if arm == "nadam":
        return nadam
    labels = lambda params: jax.tree.map(lambda own: "soap" if own else "nadam", hidden(params))  # noqa: E731
    both = {"soap": optax.chain(soap(arm), optax.scale(-1.0)), "nadam": nadam}
    return optax.partition(both, labels)


def best(done: list[dict[str, Any]], arm: str) -> tuple[float, list[float]]:
    """The rate of the lowest loss on seed 0, and the rates to try next."""
    found = {run["rate"]: run["loss"] for run in done if (run["arm"], run["seed"]) == (arm, 0)}
    if missing := [rate for rate in RATES if rate not in found]:
        return math.nan, missing
    rate = min(found, key=lambda rate: found[rate])
    edges = {min(found): [rate / 2], max(found): [2 * rate]}
    return rate, edges.get(rate, [])


def run() -> None:
    """Tunes and trains what is not finished."""
    path = FOLDER / "runs.jsonl"
    for arm in ARMS:
        made = program(characters(WIDTH, DEPTH, TOKENS), optimizer(arm))
        tuned = "nadam" if arm == "nadam" else "interval 8"
        jobs = [(rate, 0) for rate in best(read_lines(path), arm)[1]] if arm == tuned else []
        while jobs:
            for rate, seed in jobs:
                line = {"arm": arm, "rate": rate, "seed": seed} | train(made, STEPS, rate, seed)
                add_line(path, line)
                print(line, flush=True)
            jobs = [(rate, 0) for rate in best(read_lines(path), arm)[1]]
        for seed in SEEDS:
            line = {"arm": arm, "rate": best(read_lines(path), tuned)[0], "seed": seed}
            if not any(line.items() <= done.items() for done in read_lines(path)):
                line |= train(made, STEPS, line["rate"], seed)
                add_line(path, line)
                print(line, flush=True)


def report() -> dict[str, Any]:
    """The mean loss of each arm, and its difference from the fixed interval, seed by seed."""
    done = read_lines(FOLDER / "runs.jsonl")
    record = about("soap_refreshes") | {"steps": STEPS, "arms": {}}
    losses = {
        arm: {run["seed"]: run["loss"] for run in done if run["arm"] == arm and run["seed"]}
        for arm in ARMS
    }
    for arm, own in losses.items():
        if len(own) == len(SEEDS):
            apart = [own[seed] - losses["interval 8"][seed] for seed in SEEDS]
            rate = best(done, "nadam" if arm == "nadam" else "interval 8")[0]
            record["arms"][arm] = {
                "rate": rate, "losses": own, "mean": fmean(own.values()), "over interval 8": apart
            }  # fmt: skip
    return record


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        f"Validation loss after {record['steps']} steps, and beyond that of all bases every 8 "
        "steps, seed by seed (`python -m benchmarks.soap_refreshes`):",
        "",
        "| arm | rate | loss | less that of `interval 8` |",
        "| --- | ---: | ---: | ---: |",
    ]
    for arm, found in record["arms"].items():
        apart = ", ".join(f"{value:+.3f}" for value in found["over interval 8"])
        lines.append(f"| {arm} | {found['rate']:g} | {found['mean']:.3f} | {apart} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--report", action="store_true", help="run nothing")
    if not parser.parse_args().report:
        run()
    record = report()
    write(FOLDER / "refreshes-cpu.json", record)
    print(markdown(record))


if __name__ == "__main__":
    main()
