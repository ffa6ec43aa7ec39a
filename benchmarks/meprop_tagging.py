"""meProp on part-of-speech tagging (UD English, LSTM of 500 each way): accuracy and time.

`run` trains every arm with Adam and a cosine decay to zero over its own steps: each learning rate
of the grid on one seed, then the best on further seeds; accuracy on the development set at every
quarter of an epoch. Finished runs are kept in `benchmarks/results/meprop_tagging-<device>.jsonl`.
`time` measures a step of each arm, interleaved. `report` puts both together: seconds to the target,
the median best development accuracy of tuned dense Adam. Only `time` reads a clock.

Run as `python -m benchmarks.meprop_tagging run`, then `time`, then `report`.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from tqdm import tqdm

from benchmarks.finetune_sst2 import bootstrap
from benchmarks.records import about, read_lines, write
from priorityprop_jax import meprop
from priorityprop_jax.cli.tasks import load_task

RATES = (2e-3, 4e-3)


@dataclasses.dataclass(frozen=True)
class Arm:
    """One way to train: k features of each gate (None: dense), of a full run's steps how many."""

    k: int | None = None
    share: float = 1.0


ARMS = {
    "dense": Arm(),
    "dense, half the steps": Arm(share=0.5),
    "meprop 40": Arm(40),
    "meprop 20": Arm(20),
    "meprop 10": Arm(10),
    "meprop 20, half the steps": Arm(20, share=0.5),
}


def prepare(arm: Arm, rate: float, steps: int, seed: int) -> tuple[Any, ...]:
    """The task, the jitted step and evaluation, and their state."""
    task = load_task("pos-tag", seed=seed)
    if arm.k is not None:
        meprop(task.model, arm.k)
    graph, params, rest = nnx.split(task.model, nnx.Param, ...)
    params = jax.tree.map(jnp.array, nnx.as_pure(params))
    tx = optax.adam(optax.cosine_decay_schedule(rate, steps))

    def loss(params, batch):
        return task.loss_fn(nnx.merge(graph, params, rest), batch)

    def step(params, state, batch):
        (value, _), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    return task, jax.jit(step, donate_argnums=(0, 1)), jax.jit(loss), params, tx.init(params)


def train(arm: Arm, rate: float, seed: int, epochs: float) -> dict:
    """Accuracy on the development set at every quarter of an epoch, and on the test set."""
    per_epoch = len(load_task("pos-tag").train_data)
    steps = max(1, round(epochs * arm.share * per_epoch))
    task, step, evaluate, params, state = prepare(arm, rate, steps, seed)

    def accuracy(data: Any) -> float:
        right = tokens = 0.0
        for batch in data:
            weight = float(batch["mask"].sum())
            right += weight * float(evaluate(params, batch)[1]["accuracy"])
            tokens += weight
        return right / tokens

    def batches():
        for epoch in itertools.count():
            task.train_data.set_epoch(epoch)
            yield from task.train_data

    development = []
    for i, batch in enumerate(itertools.islice(batches(), steps)):
        params, state, _ = step(params, state, batch)
        if (i + 1) % (per_epoch // 4) == 0 or i + 1 == steps:
            development.append([i + 1, accuracy(task.eval_data)])
    return {"development": development, "test": accuracy(task.test_data)}


def best_rate(runs: list[dict], name: str) -> float | None:
    tried = {r["rate"]: r["development"][-1][1] for r in runs if (r["arm"], r["seed"]) == (name, 0)}
    return max(tried, key=lambda rate: tried[rate]) if set(tried) >= set(RATES) else None


def run(path: Path, epochs: float, seeds: int, only: list[str] | None) -> None:
    chosen = {name: arm for name, arm in ARMS.items() if only is None or name in only}
    bar = tqdm(total=len(chosen) * (len(RATES) + seeds), disable=None)
    # All first seeds first: a run that is cut short has something of every arm.
    for round_ in range(seeds + 1):
        for name, arm in chosen.items():
            rates = RATES if round_ == 0 else (best_rate(read_lines(path), name),)
            for rate in rates:
                known = {(r["arm"], r["rate"], r["seed"], r["epochs"]) for r in read_lines(path)}
                if (name, rate, round_, epochs) not in known:
                    assert rate is not None
                    record = {"arm": name, "rate": rate, "seed": round_, "epochs": epochs}
                    record |= train(arm, rate, round_, epochs)
                    with path.open("a") as file:
                        file.write(json.dumps(record) + "\n")
                bar.update()
    bar.close()


def measure(repeats: int) -> dict[str, float]:
    """Seconds of a step of every arm, interleaved; arms of the same k share them."""
    programs, carried = {}, {}
    batch: Any = None
    for arm in dict.fromkeys(dataclasses.replace(arm, share=1.0) for arm in ARMS.values()):
        task, step, _, params, state = prepare(arm, 1e-3, 1000, 0)
        batch = next(iter(task.train_data))
        programs[arm] = step.lower(params, state, batch).compile()
        carried[arm] = (params, state)
    times: dict[Arm, list[float]] = {arm: [] for arm in programs}
    for repeat in tqdm(range(repeats + 2), disable=None):
        for arm, program in programs.items():
            start = time.perf_counter()
            *new, _ = jax.block_until_ready(program(*carried[arm], batch))
            if repeat > 1:
                times[arm].append(time.perf_counter() - start)
            carried[arm] = tuple(new)
    return {
        name: statistics.median(times[dataclasses.replace(arm, share=1.0)])
        for name, arm in ARMS.items()
    }


def summary(runs: list[dict], seconds: dict[str, float]) -> list[dict]:
    """One row an arm. Where there is one seed alone it is the one that tuned the rate."""
    chosen = {}
    for name in ARMS:
        rate = best_rate(runs, name)
        mine = [r for r in runs if r["arm"] == name and r["rate"] == rate]
        further = [r for r in mine if r["seed"] > 0]
        if mine:
            chosen[name] = (rate, sorted(further or mine, key=lambda r: r["seed"]))
    if "dense" not in chosen:
        return []
    best = lambda r: max(accuracy for _, accuracy in r["development"])  # noqa: E731
    target = statistics.median(best(r) for r in chosen["dense"][1])

    def clock(name: str, r: dict) -> float | None:
        reached = [steps for steps, accuracy in r["development"] if accuracy >= target]
        return reached[0] * seconds[name] if reached and name in seconds else None

    plain = {r["seed"]: clock("dense", r) for r in chosen["dense"][1]}
    rows = []
    for name, (rate, mine) in chosen.items():
        own = {r["seed"]: clock(name, r) for r in mine}
        ratios = [plain[s] / t for s, t in own.items() if t and plain.get(s)]  # type: ignore[operator]
        rows.append(
            {
                "arm": name,
                "rate": rate,
                "seeds": len(mine),
                "development": statistics.mean(100 * best(r) for r in mine),
                "test": statistics.mean(100 * r["test"] for r in mine),
                "target": 100 * target,
                "step_milliseconds": 1e3 * seconds[name] if name in seconds else None,
                "seconds": statistics.mean(r["development"][-1][0] for r in mine)
                * seconds.get(name, 0.0),
                "reached": sum(t is not None for t in own.values()),
                "speedup": float(np.exp(np.mean(np.log(ratios)))) if ratios else None,
                "interval": bootstrap(ratios) if len(ratios) > 2 else None,
            }
        )
    return rows


def readme_table(record: dict) -> str:
    """The part of README.md that this benchmark's result is shown in."""
    rows = record["summary"]
    lines = [
        f"Tagging UD English, bidirectional LSTM of 500 each way, {rows[0]['seeds']} seed"
        f"{'s' if rows[0]['seeds'] > 1 else ''}, target {rows[0]['target']:.2f} % on the "
        "development set (`python -m benchmarks.meprop_tagging`):",
        "",
        "| arm | development | test | step | seconds in all | reached the target "
        "| time to target |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for row in rows:
        step = "-" if row["step_milliseconds"] is None else f"{row['step_milliseconds']:.0f} ms"
        speed = "-" if row["speedup"] is None else f"{row['speedup']:.2f}x"
        if row["interval"]:
            speed += " ({:.2f} to {:.2f})".format(*row["interval"])
        lines.append(
            f"| {row['arm']} | {row['development']:.2f} % | {row['test']:.2f} % | {step} | "
            f"{row['seconds']:.0f} | {row['reached']} of {row['seeds']} | {speed} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=("run", "time", "report"))
    parser.add_argument("--epochs", type=float, default=1.0, help="the full budget")
    parser.add_argument("--seeds", type=int, default=5, help="beside the one that tunes")
    parser.add_argument("--arms", nargs="+", help="these alone")
    parser.add_argument("--repeats", type=int, default=10, help="of `time`")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args()
    runs = options.out / f"meprop_tagging-{jax.default_backend()}.jsonl"
    times = runs.with_name(f"{runs.stem}-times.json")
    if options.what == "run":
        run(runs, options.epochs, options.seeds, options.arms)
    elif options.what == "time":
        load = os.getloadavg()
        seconds = measure(options.repeats)
        write(times, about("meprop_tagging", load) | {"seconds": seconds})
    else:
        seconds = json.loads(times.read_text())["seconds"] if times.exists() else {}
        record = about("meprop_tagging") | {"summary": summary(read_lines(runs), seconds)}
        write(runs.with_suffix(".json"), record)
        print(readme_table(record))


if __name__ == "__main__":
    main()
