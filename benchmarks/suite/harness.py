"""Tunes arms, trains them on paired seeds, and takes their seconds: records that can be resumed.

`train` writes one JSON line a finished run to `results/suite/SUITE-DEVICE/runs.jsonl`: metrics at
each evaluation, the steps by phase up to it, FLOPs, bytes, compile seconds, versions. What is there
is left as it is, and what was cut short is trained again. `take_times` writes one line a workload
to `times.jsonl`: seconds a step of every arm, all arms in turn, on an idle machine. As only
`take_times` reads a clock that counts, training may run on a busy one.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import json
import os
import statistics
import subprocess
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.records import RESULTS, about, read_lines
from benchmarks.suite.arms import Arm, arm_of
from benchmarks.suite.runners import build, cycle_of, transformation
from benchmarks.suite.workloads import TUNING_SEED, Stream, Workload, freeze, load

SUITES = RESULTS / "suite"
BLOCK = 1.0  # seconds that an arm is timed for in a round, about
MOST_FOREIGN = 0.1  # cores that other processes may use while the clock counts


def device_name() -> str:
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "-")


def folder(suite: str, results: Path = SUITES) -> Path:
    return results / f"{suite}-{device_name()}"


def revision() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def append(path: Path, record: dict[str, Any]) -> None:
    """One line in one write, so that a killed process leaves at most a line without an end."""
    path.parent.mkdir(parents=True, exist_ok=True)
    line = json.dumps(record) + "\n"
    with path.open("ab+") as file:
        if file.tell():  # what was left without an end stays a line of its own
            file.seek(-1, os.SEEK_END)
            line = line if file.read() == b"\n" else "\n" + line
        file.write(line.encode())


def provenance(load_before: tuple[float, ...]) -> dict[str, Any]:
    found = about("suite", load_before)
    return {
        "date": found["date"], "device": found["device"], "cores": found["cores"],
        "versions": found["versions"], "load": found["load_before_and_after"],
        "revision": revision(),
    }  # fmt: skip


# Training.


def run_arm(workload: Workload, name: str, rate: float, seed: int) -> dict[str, Any]:
    """Trains once; metrics at each evaluation."""
    arm = arm_of(workload, name)
    before, steps = os.getloadavg(), arm.steps(workload)
    rows, _, _ = load(workload)
    runner = build(arm, workload, rate, seed)
    stream = Stream(rows, arm.rows_of(workload), seed, pruned=arm.pruned)
    marks = [round(steps * (i + 1) / workload.evaluations) for i in range(workload.evaluations)]
    evals: list[dict[str, Any]] = []
    done, wall, failed = 0, 0.0, None
    for mark in sorted(set(marks)):
        batches = stream.take(mark - done)
        compiling, started = runner.compile_seconds, time.perf_counter()
        try:
            runner.train(batches)
        except FloatingPointError as error:
            failed = str(error)
            break
        finally:
            wall += time.perf_counter() - started - (runner.compile_seconds - compiling)
        for seen, losses in runner.row_losses:
            stream.record(seen, losses)
        done = mark
        found = runner.evaluate(rows.validation, workload.batch)
        evals.append(
            {"step": done, "metric": found[workload.metric], **found,
             "phases": phases(arm, stream.per_epoch, done)}
        )  # fmt: skip
    test = runner.evaluate(rows.test, workload.batch) if evals and failed is None else None
    return {
        "suite": workload.suite, "workload": workload.name, "arm": name, "rate": rate, "seed": seed,
        "steps": steps, "batch": arm.rows_of(workload), "metric": workload.metric,
        "evals": evals, "test": test and test[workload.metric],
        "test_accuracy": test and test["accuracy"],
        "flops": runner.flops, "peak_bytes": runner.peak_bytes,
        "compile_seconds": runner.compile_seconds, "wall_seconds": wall,
        "where": runner.where() if evals else None, "failed": failed,
        "options": workload.options, **provenance(before),
    }  # fmt: skip


def phases(arm: Arm, per_epoch: int, step: int) -> dict[str, int]:
    """The steps so far, by what they cost: a cache is filled in the first epoch, then read."""
    if not arm.cached:
        return {"train": step}
    filling = min(step, per_epoch)
    done = {"filling": filling, "cached": step - filling}
    return {phase: steps for phase, steps in done.items() if steps}


def best(workload: Workload, record: dict[str, Any]) -> float:
    """The best metric of a run; the worst there is for one that diverged."""
    sign = 1.0 if workload.higher_is_better else -1.0
    if record["failed"] or not record["evals"]:
        return -sign * float("inf")
    return sign * max(sign * e["metric"] for e in record["evals"])


def best_rate(workload: Workload, records: Iterable[dict[str, Any]], name: str) -> float | None:
    """The rate with the best last metric on the tuning seed; None before any trial."""
    sign = 1.0 if workload.higher_is_better else -1.0
    tried = {
        r["rate"]: sign * r["evals"][-1]["metric"]
        for r in records
        if r["arm"] == name and r["track"] == "tune" and not r["failed"] and r["evals"]
    }
    return max(tried, key=lambda rate: tried[rate]) if tried else None


@dataclasses.dataclass
class Plan:
    """What is asked for.

    Attributes:
      arms: names; None for all of the workload.
      seeds: runs of each arm at its best rate.
      trials: learning rates tried by each arm.
      target_seeds: runs of tuned AdamW that the target is the median of.
      deadline: `time.monotonic()` after which no run is started.
      results: the folder of all suites.
    """

    arms: tuple[str, ...] | None = None
    seeds: int = 5
    trials: int = 4
    target_seeds: int = 10
    deadline: float = float("inf")
    results: Path = SUITES


class OutOfTime(Exception):
    """The time budget is spent; what is finished is kept."""


def train(workload: Workload, plan: Plan, bar: tqdm | None = None) -> None:
    """Tunes AdamW, freezes the target, tunes every arm, and trains all on paired seeds."""
    path = folder(workload.suite, plan.results) / "runs.jsonl"
    known = [r for r in read_lines(path) if r["workload"] == workload.name]

    def once(name: str, rate: float, seed: int, track: str) -> dict[str, Any]:
        for r in known:
            if (r["arm"], r["rate"], r["seed"]) == (name, rate, seed):
                break
        else:
            if time.monotonic() > plan.deadline:
                raise OutOfTime
            if bar is not None:
                bar.set_description(f"{workload.name}: {name}, {track}")
            r = {"track": track, **run_arm(workload, name, rate, seed)}
            append(path, r)
            known.append(r)
            gc.collect()
        if bar is not None:
            bar.update()
        return r

    def tune(name: str) -> float | None:
        for rate in workload.trials(plan.trials):
            once(name, rate, TUNING_SEED, "tune")
        return best_rate(workload, known, name)

    names = [name for name in workload.arms if plan.arms is None or name in plan.arms]
    if workload.target is None and plan.target_seeds and "adamw" in workload.arms:
        rate = tune("adamw")
        assert rate is not None, "AdamW diverged at every rate"
        found = [
            best(workload, once("adamw", rate, seed, "seeds")) for seed in range(plan.target_seeds)
        ]
        worst = min(found) if workload.higher_is_better else max(found)
        workload = freeze(
            workload,
            {"value": statistics.median(found), "reachable": worst, "seeds": len(found),
             "rate": rate, "date": datetime.date.today().isoformat(), "revision": revision()},
        )  # fmt: skip
    rates = {name: tune(name) for name in names}
    # One seed of all arms before the next: what is cut short has something of every arm.
    for seed in range(plan.seeds):
        for name in names:
            own = rates[name]
            if own is not None:
                once(name, own, seed, "seeds")


def runs_in(workload: Workload, plan: Plan) -> int:
    """How many runs `train` comes to, for a progress bar."""
    names = [name for name in workload.arms if plan.arms is None or name in plan.arms]
    trials = len(workload.trials(plan.trials))
    freezes = workload.target is None and plan.target_seeds and "adamw" in workload.arms
    return (trials + plan.target_seeds if freezes else 0) + len(names) * (trials + plan.seeds)


# Seconds.


def take_times(
    workload: Workload, names: Sequence[str], rounds: int, results: Path, *, share: float = 1.0
) -> dict[str, Any]:
    """Seconds a step of every arm and of parts of AdamW's step, all in turn."""
    before, busy = os.getloadavg(), _Foreign()
    rows, _, _ = load(workload)
    blocks: list[tuple[str, str, Any, Any, int]] = []
    for name in names:
        arm = arm_of(workload, name)
        planned = arm.policy is not None or arm.top_k is not None
        # Gains that a policy weighs must not come to an end with a schedule.
        steps = 100_000 if planned else arm.steps(workload)
        runner = build(arm, workload, workload.default_rate / 10, 0, steps)
        stream = Stream(rows, arm.rows_of(workload), 0, pruned=arm.pruned)
        batches = stream.take(cycle_of(arm, workload) if planned else 5)
        for _ in range(3 if planned else 1):  # compiles; a policy has several programs
            runner.train(batches)
        started = time.perf_counter()
        runner.train(batches)
        repeats = max(1, round(share * BLOCK / (time.perf_counter() - started)))
        repeats = min(repeats, 50)
        for phase in phases(arm, 1, 2):
            blocks.append((name, phase, runner, stream if phase == "filling" else batches, repeats))
    seconds: dict[str, dict[str, list[float]]] = {}
    splits = _split_programs(workload)
    split: dict[str, list[float]] = {part: [] for part in splits}
    bar = tqdm(
        total=rounds * (len(blocks) + len(splits)), desc=f"{workload.name}: seconds", disable=None
    )
    for _ in range(rounds):
        for part, again in splits.items():
            again()
            started = time.perf_counter()
            for _ in range(10):
                again()
            split[part].append((time.perf_counter() - started) / 10)
            bar.update()
        for name, phase, runner, source, repeats in blocks:
            batches = source.take(10) if isinstance(source, Stream) else source
            given = [batches] if isinstance(source, Stream) else [batches] * repeats
            if not isinstance(source, Stream):
                runner.train(batches[:1])  # its data and program come back into the caches
            compiling, started = runner.compile_seconds, time.perf_counter()
            for part in given:
                runner.train(part)
            spent = time.perf_counter() - started - (runner.compile_seconds - compiling)
            steps = sum(map(len, given))
            seconds.setdefault(name, {}).setdefault(phase, []).append(spent / steps)
            bar.update()
    bar.close()
    foreign = busy.cores()
    record = {
        "suite": workload.suite, "workload": workload.name, "seconds": seconds, "split": split,
        "foreign_cores": foreign, "void": (foreign or 0.0) > MOST_FOREIGN, **provenance(before),
    }  # fmt: skip
    append(folder(workload.suite, results) / "times.jsonl", record)
    return record


def _split_programs(workload: Workload) -> dict[str, Any]:
    """Parts of AdamW's step: forward pass, with gradients, and whole."""
    rows, make_model, loss_fn = load(workload)
    arm = arm_of(workload, "adamw")
    graph, params, rest = nnx.split(make_model(0), nnx.Param, ...)
    params = jax.tree.map(jnp.array, nnx.as_pure(params))
    batch = {name: array[: workload.batch] for name, array in rows.train.items()}
    tx = transformation(arm, workload.default_rate / 10, 100_000)

    def loss(params: Any) -> Any:
        return loss_fn(nnx.merge(graph, params, rest), batch)[0]

    def step(params: Any, state: Any) -> Any:
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return jax.tree.map(jnp.add, params, updates), state

    forward, gradient = jax.jit(loss), jax.jit(jax.grad(loss))
    whole = jax.jit(step, donate_argnums=(0, 1))
    held = {"now": (jax.tree.map(jnp.array, params), tx.init(params))}

    def again() -> None:
        held["now"] = jax.block_until_ready(whole(*held["now"]))

    return {
        "forward": lambda: jax.block_until_ready(forward(params)),
        "gradient": lambda: jax.block_until_ready(gradient(params)),
        "step": again,
    }


class _Foreign:
    """Cores that other processes keep busy, by Linux's count; None elsewhere."""

    def __init__(self) -> None:
        self._start = self._now()

    @staticmethod
    def _now() -> tuple[float, float, float] | None:
        try:
            ticks = Path("/proc/stat").read_text().splitlines()[0].split()[1:]
        except OSError:
            return None
        user, nice, system, _, _, irq, soft = map(int, ticks[:7])
        busy = (user + nice + system + irq + soft) / os.sysconf("SC_CLK_TCK")
        return busy, sum(os.times()[:4]), time.monotonic()

    def cores(self) -> float | None:
        now = self._now()
        if now is None or self._start is None:
            return None
        busy, own, wall = (a - b for a, b in zip(now, self._start, strict=True))
        return float(np.clip((busy - own) / wall, 0.0, None))
