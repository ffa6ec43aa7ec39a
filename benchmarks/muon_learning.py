"""How soon Muon on a budget reaches the loss of a tuned NAdam.

A character transformer on Tiny Shakespeare, 1,024 characters a step, the learning rate decayed by
a cosine to zero within each run's own number of steps; the loss of 2,048 windows that training
never sees. Arms are those of `benchmarks.speed.muon`, each in several numbers of steps.

- `python -m benchmarks.muon_learning tune --width 128`: three rates on seed 0, and more by factors
  of two until the best has a worse one on either side.
- `python -m benchmarks.muon_learning learn --width 128`: each arm's best rate, on seeds 1 to 5;
  longer runs where shorter ones don't reach the target.
- `python -m benchmarks.muon_learning report`: the target is the median loss of NAdam in `TARGET`
  steps. The steps that an arm needs to it lie between the two lengths on either side, by a straight
  line over the logarithm of steps; its time is those steps times the milliseconds of a step that
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
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from benchmarks.records import RESULTS, about, add_line, read_lines, write
from benchmarks.speed.muon import CONTEXT, DEPTH, TOKENS, arms, loss_of, transformer
from benchmarks.suite import statistics
from benchmarks.tasks import char

FOLDER = RESULTS / "muon"
TARGET = 600
RATES = (3e-3, 6e-3, 1.2e-2)
TUNED_AT = {"nadam": TARGET, "budget 1": 400, "budget 1/4": 400}
SHORT = (200, 250, 300, 400)
STEPS = {"nadam": (TARGET,), "budget 1": SHORT, "budget 1/4": (*SHORT, 500)}
SEEDS = (1, 2, 3, 4, 5)


def program(tx: optax.GradientTransformation, width: int, depth: int, characters: int) -> Any:
    """Functions that start, take a step at a rate, which updates are multiplied by, and evaluate.

    A step sees so many characters.
    """
    tokens, _ = char.read_tokens(None)
    n = len(tokens) * 90 // 100
    text = jnp.asarray(tokens[:n])
    starts = np.linspace(n, len(tokens) - CONTEXT - 1, 2048).astype(int)
    dev = jnp.asarray(tokens[starts[:, None] + np.arange(CONTEXT + 1)]).reshape(32, 64, -1)
    loss_fn = loss_of(nnx.eval_shape(lambda: transformer(width, depth)))

    def start(seed: int) -> Any:
        params = nnx.as_pure(nnx.state(transformer(width, depth, seed), nnx.Param))
        return params, tx.init(params)

    def step(params: Any, state: Any, key: Any, rate: Any) -> Any:
        first = jax.random.randint(key, (characters // CONTEXT,), 0, n - CONTEXT)
        loss, grads = jax.value_and_grad(loss_fn)(
            params, text[first[:, None] + jnp.arange(CONTEXT + 1)]
        )
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, optax.tree.scale(rate, updates)), state, loss

    evaluate = jax.jit(lambda params: jax.lax.map(lambda part: loss_fn(params, part), dev).mean())
    return start, jax.jit(step, donate_argnums=(0, 1)), evaluate


def train(made: Any, steps: int, rate: float, seed: int) -> dict[str, float]:
    """The loss at the end of one run."""
    start, step, evaluate = made
    (params, state), key = start(seed), jax.random.key(1000 + seed)
    for i in range(steps):
        now = rate * 0.5 * (1 + math.cos(math.pi * i / steps))
        params, state, _ = step(params, state, jax.random.fold_in(key, i), now)
    return {"loss": float(evaluate(params))}


def tuned(done: list[dict], width: int, arm: str) -> tuple[float, list[float]]:
    """The rate of the lowest loss on the tuning seed, and the rates to try next."""
    found = {
        run["rate"]: run["loss"] for run in done
        if (run["width"], run["arm"], run["seed"]) == (width, arm, 0)
    }  # fmt: skip
    missing = [rate for rate in RATES if rate not in found]
    best = min(found, key=lambda rate: found[rate], default=0.0)
    if not missing and best in (low := min(found), high := max(found)):
        missing = [low / 2 if best == low else 2 * high]
    return best, missing


def run_one(made: dict, width: int, arm: str, steps: int, rate: float, seed: int) -> None:
    """Runs one, unless it is there already, and writes its line."""
    line = {"width": width, "arm": arm, "steps": steps, "rate": rate, "seed": seed}
    path = FOLDER / "runs.jsonl"
    if any(line.items() <= run.items() for run in read_lines(path)):
        return
    if arm not in made:
        made[arm] = program(arms(rate=1.0)[arm], width, DEPTH, TOKENS)
    line |= train(made[arm], steps, rate, seed)
    add_line(path, line)
    print(line, flush=True)


def run(width: int, what: str) -> None:
    """Tunes all arms, or trains them at their best rates."""
    made: dict[str, Any] = {}
    lines = lambda: read_lines(FOLDER / "runs.jsonl")  # noqa: E731
    for arm, steps in TUNED_AT.items():
        while what == "tune" and (rates := tuned(lines(), width, arm)[1]):
            for rate in rates:
                run_one(made, width, arm, steps, rate, 0)
    for arm, lengths in STEPS.items() if what == "learn" else ():
        rate, missing = tuned(lines(), width, arm)
        if missing:
            raise SystemExit(f"{arm} is not tuned at width {width}: run tune first")
        for seed, steps in itertools.product(SEEDS, lengths):
            if not has_arrived(lines(), width, arm, steps, seed):
                run_one(made, width, arm, steps, rate, seed)


def target_of(done: list[dict], width: int) -> float | None:
    """The median loss of NAdam; None before all its seeds are run."""
    found = [
        run["loss"] for run in done if run["seed"]
        and (run["width"], run["arm"], run["steps"]) == (width, "nadam", TARGET)
    ]  # fmt: skip
    return median(found) if len(found) == len(SEEDS) else None


def has_arrived(done: list[dict], width: int, arm: str, steps: int, seed: int) -> bool:
    """Whether a run of fewer steps is at the target already, so that a longer one tells nothing."""
    target = target_of(done, width)
    key = {"width": width, "arm": arm, "seed": seed}
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
    """For each width how many times sooner than NAdam, and than full Muon, an arm is."""
    done = read_lines(FOLDER / "runs.jsonl")
    steps = json.loads((RESULTS / "speed" / "muon-cpu.json").read_text(encoding="utf-8"))
    found: dict[str, Any] = about("muon_learning")
    found |= {"steps_measured_on": steps["date"], "widths": []}
    for result in steps["results"]:
        width, seconds = result["width"], {}
        runs = [run for run in done if run["width"] == width and run["seed"]]
        target, entries = target_of(done, width), {}
        begun = {(run["arm"], run["seed"]) for run in runs}
        if target is None or len(begun) < len(STEPS) * len(SEEDS):
            continue
        for arm in STEPS:
            losses: dict[int, dict[int, float]] = {seed: {} for seed in SEEDS}
            for run in runs:
                if run["arm"] == arm:
                    losses[run["seed"]][run["steps"]] = run["loss"]
            per_step = result["arms"][arm]["median_seconds"]
            needed = {
                seed: float(TARGET) if arm == "nadam" else steps_to(target, own)
                for seed, own in losses.items()
            }
            seconds[arm] = {s: None if n is None else n * per_step for s, n in needed.items()}
            entries[arm] = {
                "rate": tuned(done, width, arm)[0], "milliseconds": 1e3 * per_step,
                "losses": losses, "steps": needed,
            }  # fmt: skip
        for arm, entry in entries.items():
            for base in ("nadam", "budget 1"):
                sooner = statistics.speed_up(seconds[base], seconds[arm], {})
                entry[f"over {base}"] = dataclasses.asdict(sooner)
        found["widths"].append({"width": width, "target": target, "arms": entries})
    return found


def markdown(record: dict[str, Any]) -> str:
    """The result as a table."""
    lines = [
        "Times sooner to the loss that NAdam reaches in 600 steps, geometric mean of "
        f"{len(SEEDS)} seeds and 95 % bootstrap interval (`python -m benchmarks.muon_learning`):",
        "",
        "| width | arm | rate | ms a step | steps, median | over NAdam | over full Muon |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for result in record["widths"]:
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
                f"| {result['width']} | {arm} | {entry['rate']:g} | {entry['milliseconds']:.0f} | "
                f"{steps:.0f} | {' | '.join(cells)} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("tune", "learn", "report"))
    parser.add_argument("--width", type=int, default=128)
    options = parser.parse_args()
    if options.what != "report":
        run(options.width, options.what)
        return
    record = report()
    write(FOLDER / "learning-cpu.json", record)
    print(markdown(record))


if __name__ == "__main__":
    main()
