"""How soon Muon on a budget reaches the loss of a tuned NAdam.

A character transformer on Tiny Shakespeare, 1,024 characters a step, and all of MiniLM on SST-2,
32 sentences a step, 4,608 in all; the learning rate decayed by a cosine to zero
within each run's own number of steps; the loss of 2,048 windows, or 2,688 sentences, that training
never sees. Arms are those of `benchmarks.speed.muon`, each in several numbers of steps. PROBLEM is
a name of `benchmarks.tasks.problems`.

- `python -m benchmarks.muon_learning tune --problem PROBLEM`: three rates on seed 0, and more by
  factors of two until the best has a worse one on either side.
- `python -m benchmarks.muon_learning learn --problem PROBLEM`: each arm's best rate, on seeds 1 to
  5; longer runs where shorter ones don't reach the target.
- `python -m benchmarks.muon_learning report`: the target is the median of NAdam's losses. The steps
  that an arm needs to it lie between the two lengths on either side, by a straight line over the
  logarithm of steps; its time is those steps times the milliseconds of a step that
  `benchmarks.speed.muon` measured. So training may be done on a busy machine.

What is finished is not run again. Writes `benchmarks/results/muon/`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import math
from statistics import median
from typing import Any, NamedTuple

import jax
import optax

from benchmarks.rates import best_rate, next_rates
from benchmarks.records import RESULTS, about, add_line, read_lines, write
from benchmarks.speed.muon import arms
from benchmarks.suite import statistics
from benchmarks.tasks.problems import PROBLEMS, Problem

FOLDER = RESULTS / "muon"
SEEDS = (1, 2, 3, 4, 5)


class Plan(NamedTuple):
    """Which runs there are of a problem.

    Attributes:
      rates: the first ones that are tried.
      target: steps of NAdam, whose loss is the target, and for which it is tuned.
      tuned_at: steps of the others where they are tuned.
      steps: of the others, from short to long.
    """

    rates: tuple[float, ...]
    target: int
    tuned_at: int
    steps: dict[str, tuple[int, ...]]


SHORT = (200, 250, 300, 400)
CHARACTERS = Plan((3e-3, 6e-3, 1.2e-2), 600, 400, {"budget 1": SHORT, "budget 1/4": (*SHORT, 500)})
MINILM = Plan(
    (5e-5, 1e-4, 2e-4), 144, 144, {"budget 1/4": (72, 144, 216), "budget 1": (72, 144, 216)}
)
PLANS = {name: MINILM if name.startswith("MiniLM") else CHARACTERS for name in PROBLEMS}


def lengths_of(name: str) -> dict[str, tuple[int, ...]]:
    """The numbers of steps of each arm."""
    return {"nadam": (PLANS[name].target,), **PLANS[name].steps}


def program(problem: Problem, tx: optax.GradientTransformation) -> Any:
    """Functions that start, take a step at a rate, which multiplies updates, and evaluate."""

    def start(seed: int) -> Any:
        params = problem.start(seed)
        return params, tx.init(params)

    def step(params: Any, state: Any, key: Any, rate: Any) -> Any:
        loss, grads = jax.value_and_grad(problem.loss_fn)(params, problem.draw(key))
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, optax.tree.scale(rate, updates)), state, loss

    @jax.jit
    def evaluate(params: Any) -> jax.Array:
        return jax.lax.map(lambda batch: problem.loss_fn(params, batch), problem.dev).mean()

    return start, jax.jit(step, donate_argnums=(0, 1)), evaluate


def train(made: Any, steps: int, rate: float, seed: int) -> dict[str, float]:
    """The loss at the end of one run."""
    start, step, evaluate = made
    (params, state), key = start(seed), jax.random.key(1000 + seed)
    for i in range(steps):
        now = rate * 0.5 * (1 + math.cos(math.pi * i / steps))
        params, state, _ = step(params, state, jax.random.fold_in(key, i), now)
    return {"loss": float(evaluate(params))}


def tuned(done: list[dict], name: str, arm: str) -> tuple[float, list[float]]:
    """The rate of the lowest loss on the tuning seed, and the rates to try next."""
    found = {
        run["rate"]: run["loss"] for run in done
        if (run["problem"], run["arm"], run["seed"]) == (name, arm, 0)
    }  # fmt: skip
    missing = next_rates(found, PLANS[name].rates)
    return best_rate(found) if found else 0.0, missing


def run(name: str, what: str) -> None:
    """Tunes all arms, or trains them at their best rates; what is finished is not run again."""
    problem, plan = PROBLEMS[name](), PLANS[name]
    made: dict[str, Any] = {}
    path = FOLDER / "runs.jsonl"

    def run_one(arm: str, steps: int, rate: float, seed: int) -> None:
        line = {"problem": name, "arm": arm, "steps": steps, "rate": rate, "seed": seed}
        if any(line.items() <= run.items() for run in read_lines(path)):
            return
        if arm not in made:
            made[arm] = program(problem, arms(rate=1.0)[arm])
        line |= train(made[arm], steps, rate, seed)
        add_line(path, line)
        print(line, flush=True)

    for arm, lengths in lengths_of(name).items():
        tuning = plan.target if arm == "nadam" else plan.tuned_at
        while what == "tune" and (rates := tuned(read_lines(path), name, arm)[1]):
            for rate in rates:
                run_one(arm, tuning, rate, 0)
        if what == "tune":
            continue
        rate, missing = tuned(read_lines(path), name, arm)
        if missing:
            raise SystemExit(f"{arm} is not tuned for {name}: run tune first")
        for seed, steps in itertools.product(SEEDS, lengths):
            if not has_arrived(read_lines(path), name, arm, steps, seed):
                run_one(arm, steps, rate, seed)


def target_of(done: list[dict], name: str) -> float | None:
    """The median loss of NAdam; None before all its seeds are run."""
    found = [
        run["loss"] for run in done if run["seed"]
        and (run["problem"], run["arm"], run["steps"]) == (name, "nadam", PLANS[name].target)
    ]  # fmt: skip
    return median(found) if len(found) == len(SEEDS) else None


def has_arrived(done: list[dict], name: str, arm: str, steps: int, seed: int) -> bool:
    """Whether a run of fewer steps is at the target already, so that a longer one tells nothing."""
    target = target_of(done, name)
    key = {"problem": name, "arm": arm, "seed": seed}
    return target is not None and any(
        run["loss"] <= target for run in done if key.items() <= run.items() and run["steps"] < steps
    )


def steps_to(target: float, losses: dict[int, float]) -> float | None:
    """The steps to a loss, of losses by steps; the least of them where that reaches it already."""
    lengths = sorted(losses)
    if losses[lengths[0]] <= target:
        return float(lengths[0])
    for short, long in itertools.pairwise(lengths):
        if losses[long] <= target:
            share = (losses[short] - target) / (losses[short] - losses[long])
            return short * (long / short) ** share
    return None


def report() -> dict[str, Any]:
    """For each problem how many times sooner than NAdam, and than full Muon, an arm is."""
    done = read_lines(FOLDER / "runs.jsonl")
    steps = json.loads((RESULTS / "speed" / "muon-cpu.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = about("muon_learning")
    found |= {"steps_measured_on": steps["date"], "problems": {}}
    for result in steps["results"]:
        name, seconds = result["problem"], {}
        runs = [run for run in done if run["problem"] == name and run["seed"]]
        target, entries = target_of(done, name), {}
        begun = {(run["arm"], run["seed"]) for run in runs}
        if target is None or len(begun) < len(lengths_of(name)) * len(SEEDS):
            continue
        for arm in lengths_of(name):
            losses: dict[int, dict[int, float]] = {seed: {} for seed in SEEDS}
            for run in runs:
                if run["arm"] == arm:
                    losses[run["seed"]][run["steps"]] = run["loss"]
            per_step = result["arms"][arm]["median_seconds"]
            needed = {
                seed: float(PLANS[name].target) if arm == "nadam" else steps_to(target, own)
                for seed, own in losses.items()
            }
            seconds[arm] = {s: None if n is None else n * per_step for s, n in needed.items()}
            entries[arm] = {
                "rate": tuned(done, name, arm)[0], "milliseconds": 1e3 * per_step,
                "losses": losses, "steps": needed,
            }  # fmt: skip
        for arm, entry in entries.items():
            for base in ("nadam", "budget 1"):
                sooner = statistics.speed_up(seconds[base], seconds[arm], {})
                entry[f"over {base}"] = dataclasses.asdict(sooner)
        found["problems"][name] = {"target": target, "arms": entries}
    return found


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "Times sooner to the loss that NAdam reaches in its steps, geometric mean of "
        f"{len(SEEDS)} seeds and 95 % bootstrap interval (`python -m benchmarks.muon_learning`):",
        "",
        "| problem | arm | rate | ms a step | steps, median | over NAdam | over full Muon |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, result in record["problems"].items():
        for arm, entry in result["arms"].items():
            cells = []
            for base in ("nadam", "budget 1"):
                sooner = entry[f"over {base}"]
                interval = "too few reach it"
                if sooner["interval"] is not None:
                    interval = "{:.2f} to {:.2f}".format(*sooner["interval"])
                cells.append(f"{sooner['mean'] or math.nan:.2f}x ({interval})")
            steps = median(n or math.inf for n in entry["steps"].values())
            lines.append(
                f"| {name} | {arm} | {entry['rate']:g} | {entry['milliseconds']:.0f} | "
                f"{steps:.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "learn", "report"))
    parser.add_argument("--problem", choices=PROBLEMS, default=next(iter(PROBLEMS)))
    options = parser.parse_args()
    if options.what != "report":
        run(options.problem, options.what)
        return
    record = report()
    write(FOLDER / "learning-cpu.json", record)
    print(markdown(record))


if __name__ == "__main__":
    main()
