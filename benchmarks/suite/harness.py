"""Times arms, tunes them, trains them on paired seeds: records that can be resumed.

All is kept in `results/evidence/SUITE-DEVICE/`, a line a record, and what is there is left as it
is. The order:

- `take_times`, on an idle machine: seconds of a step of every arm at every batch, in turn, to
  `times.jsonl`. This alone reads a clock that counts.
- `train`, on any machine: settings by `search`, then AdamW's target, the length of each arm's
  runs, and runs on seeds, to `runs.jsonl`. Seconds of a run are its steps times those of a step,
  so that a budget of seconds is a number of steps.

The target is the median, over twice the seeds of an arm, of the lowest validation loss of AdamW
at its best rate and batch in the whole budget. It is frozen in `targets.jsonl` before any other
arm is run.
"""

from __future__ import annotations

import dataclasses
import datetime
import gc
import math
import os
import statistics
import subprocess
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from tqdm import tqdm

from benchmarks.records import RESULTS, about, add_line, read_lines
from benchmarks.suite import search
from benchmarks.suite.arms import BASE, SHORTER, arm_of
from benchmarks.suite.runners import build, transformation
from benchmarks.suite.workloads import Stream, Workload, load

EVIDENCE = RESULTS / "evidence"
BLOCK = 0.5  # seconds that an arm is timed for in a round, about
MOST_FOREIGN = 0.1  # cores that other processes may use while the clock counts
MOST_SPREAD = 1.25  # of AdamW's rounds, the median over the fastest: other machines disturb as well
TUNING_EVALUATIONS = 4  # of a run on a tuning seed


def device_name() -> str:
    device = jax.devices()[0]
    return "cpu" if device.platform == "cpu" else device.device_kind.lower().replace(" ", "-")


def folder(suite: str, results: Path = EVIDENCE) -> Path:
    return results / f"{suite}-{device_name()}"


def revision() -> str:
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        capture_output=True, text=True, cwd=Path(__file__).parent,
    )  # fmt: skip
    return found.stdout.strip() or "unknown"


def provenance(load_before: tuple[float, ...]) -> dict[str, Any]:
    found = about("suite", load_before)
    return {
        "date": found["date"], "device": found["device"], "cores": found["cores"],
        "versions": found["versions"], "load": found["load_before_and_after"],
        "revision": revision(),
    }  # fmt: skip


# Seconds.


def latest_times(path: Path, name: str) -> Mapping[str, Any] | None:
    """The last timing of a workload that no foreign load spoilt; else the last; None without."""
    found = [r for r in read_lines(path / "times.jsonl") if r["workload"] == name]
    return next((r for r in found[::-1] if not r["void"]), found[-1] if found else None)


def seconds_of(times: Mapping[str, Any], name: str, batch: int) -> dict[str, float]:
    """Seconds of a step by phase, medians over rounds."""
    phases = times["seconds"][name if name != SHORTER else BASE][str(batch)]
    return {phase: statistics.median(rounds) for phase, rounds in phases.items()}


def budget_of(workload: Workload, times: Mapping[str, Any]) -> float:
    """Seconds of the whole budget."""
    return workload.steps * seconds_of(times, BASE, workload.batch)["train"]


def phases(name: str, per_epoch: int, step: int) -> dict[str, int]:
    """The steps so far, by what they cost: a cache is filled in the first epoch, then read."""
    if not arm_of(name).cached:
        return {"train": step}
    filling = min(step, per_epoch)
    done = {"filling": filling, "cached": step - filling}
    return {phase: steps for phase, steps in done.items() if steps}


def steps_in(seconds: float, per_step: Mapping[str, float], per_epoch: int) -> int:
    """Steps that so many seconds pay for; at least one."""
    if "train" in per_step:
        return max(1, round(seconds / per_step["train"]))
    filling = per_epoch * per_step["filling"]
    if seconds <= filling:
        return max(1, round(seconds / per_step["filling"]))
    return per_epoch + round((seconds - filling) / per_step["cached"])


def take_times(
    workload: Workload, names: Sequence[str], rounds: int, batches: Sequence[int] | None = None
) -> dict[str, Any]:
    """Seconds a step of every arm, in turn, a batch size after another; parts of AdamW's step."""
    before, busy = os.getloadavg(), _Foreign()
    seconds: dict[str, dict[str, Any]] = {name: {} for name in names}
    compiling: dict[str, dict[str, float]] = {name: {} for name in names}
    memory: dict[str, dict[str, Any]] = {name: {} for name in names}
    for batch in batches or workload.batches:
        blocks = []
        for name in names:
            blocks += _blocks(workload, name, batch)
            runner = blocks[-1][2]
            compiling[name][str(batch)] = runner.compile_seconds
            memory[name][str(batch)] = runner.peak_bytes
        bar = tqdm(
            total=rounds * len(blocks), desc=f"{workload.name}: seconds at {batch}", disable=None
        )
        for _ in range(rounds):
            for name, phase, runner, source, repeats in blocks:
                spent = _seconds(runner, source, repeats)
                seconds[name].setdefault(str(batch), {}).setdefault(phase, []).append(spent)
                bar.update()
        bar.close()
        gc.collect()
    splits = _split_programs(workload)
    split: dict[str, list[float]] = {part: [] for part in splits}
    for _ in range(rounds):
        for part, again in splits.items():
            again()
            started = time.perf_counter()
            for _ in range(10):
                again()
            split[part].append((time.perf_counter() - started) / 10)
    runner, rows = build(workload, BASE, workload.batch, workload.rate, 0, 1), load(workload)[0]
    looks = {}
    for part in ("tuning", "validation"):
        runner.evaluate(getattr(rows, part))
        started = time.perf_counter()
        runner.evaluate(getattr(rows, part))
        looks[part] = time.perf_counter() - started
    foreign = busy.cores()
    rounds_of_base = [own["train"] for own in seconds.get(BASE, {}).values()]
    spread = max((statistics.median(own) / min(own) for own in rounds_of_base), default=1.0)
    return {
        "suite": workload.suite, "workload": workload.name, "seconds": seconds, "split": split,
        "evaluation": looks, "compile_seconds": compiling,
        "peak_bytes": memory, "foreign_cores": foreign, "spread": spread,
        "void": (foreign or 0.0) > MOST_FOREIGN or spread > MOST_SPREAD,
        **provenance(before),
    }  # fmt: skip


def _blocks(workload: Workload, name: str, batch: int) -> list[tuple[str, str, Any, Any, int]]:
    """What is timed of an arm, for each phase, compiled and warm."""
    arm = arm_of(name)
    # Gains that a policy weighs must not come to an end with a schedule.
    runner = build(workload, name, batch, workload.rate / 10, 0, 100_000)
    stream = Stream(load(workload)[0], batch, 0)
    batches = stream.take(5 if arm.policy is None else 50)
    for _ in range(1 if arm.policy is None else 2):  # compiles; a policy has several programs
        runner.train(batches)
    started = time.perf_counter()
    runner.train(batches)
    repeats = min(50, max(1, round(BLOCK / (time.perf_counter() - started))))
    return [
        (name, phase, runner, stream if phase == "filling" else batches, repeats)
        for phase in phases(name, 1, 2)
    ]


def _seconds(runner: Any, source: Any, repeats: int) -> float:
    if isinstance(source, Stream):
        given = [source.take(10)]
    else:
        given = [source] * repeats
        runner.train(source[:1])  # its data and program come back into the caches
    compiling, started = runner.compile_seconds, time.perf_counter()
    for part in given:
        runner.train(part)
    spent = time.perf_counter() - started - (runner.compile_seconds - compiling)
    return spent / sum(map(len, given))


# Training.


def run_arm(
    workload: Workload, name: str, batch: int, rate: float, seed: int, steps: int, tuning: bool
) -> dict[str, Any]:
    """Trains once; the loss at each evaluation, of the tuning rows or of the validation rows."""
    gc.collect()  # arrays of the run before
    before = os.getloadavg()
    rows = load(workload)[0]
    runner, stream = build(workload, name, batch, rate, seed, steps), Stream(rows, batch, seed)
    points = TUNING_EVALUATIONS if tuning else workload.evaluations
    evals: list[dict[str, Any]] = []
    done, wall, failed = 0, 0.0, None
    for mark in sorted({math.ceil(steps * (i + 1) / points) for i in range(points)}):
        batches = stream.take(mark - done)
        compiling, started = runner.compile_seconds, time.perf_counter()
        try:
            runner.train(batches)
        except FloatingPointError as error:
            failed = str(error)
            break
        finally:
            wall += time.perf_counter() - started - (runner.compile_seconds - compiling)
        done = mark
        found = runner.evaluate(rows.tuning if tuning else rows.validation)
        evals.append({"step": done, **found, "phases": phases(name, stream.per_epoch, done)})
    test = runner.evaluate(rows.test) if evals and failed is None and not tuning else None
    return {
        "suite": workload.suite, "workload": workload.name, "arm": name, "batch": batch,
        "rate": rate, "seed": seed, "steps": steps, "evals": evals, "test": test,
        "flops": runner.flops, "where": runner.where() if evals else None,
        "wall_seconds": wall, "failed": failed, **provenance(before),
    }  # fmt: skip


def best(record: Mapping[str, Any]) -> float:
    """The lowest loss of a run; infinite for one that diverged."""
    if record["failed"] or not record["evals"]:
        return math.inf
    return min((e["loss"] for e in record["evals"] if math.isfinite(e["loss"])), default=math.inf)


class OutOfTime(Exception):
    """The time budget is spent; what is finished is kept."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """How an arm is run: found on tuning seeds, and then the same for all others."""

    name: str
    batch: int
    rate: float
    share: float = 1.0


class Training:
    """The runs of one workload: those on record are read, the others made.

    Args:
      workload: what is trained.
      path: folder of the suite's records.
      names: arms, of those of the workload.
      deadline: `time.monotonic()` after which no run is started.
      bar: counts finished runs.
    """

    def __init__(
        self, workload: Workload, path: Path, names: Sequence[str] | None = None,
        deadline: float = math.inf, bar: tqdm | None = None,
    ):  # fmt: skip
        self.workload, self.path, self.deadline, self.bar = workload, path, deadline, bar
        self.names = [n for n in workload.arms if names is None or n in names]
        self.recipes = [n for n in workload.recipes if names is None or n in names]
        self.known = [r for r in read_lines(path / "runs.jsonl") if r["workload"] == workload.name]
        self.chosen: str | None = None  # the recipe, once `settings` has found it

    def once(self, own: Setting, seed: int, track: str) -> dict[str, Any]:
        """The record of a run."""
        key = {"arm": own.name, "batch": own.batch, "rate": own.rate, "share": own.share}
        key |= {"seed": seed, "track": track}
        for record in self.known:
            if key.items() <= record.items():
                return record
        if time.monotonic() > self.deadline:
            raise OutOfTime
        if self.bar is not None:
            self.bar.set_description(f"{self.workload.name}: {own.name}, {track}")
        steps = self._steps(own)
        record = key | run_arm(
            self.workload, own.name, own.batch, own.rate, seed, steps, track == "tune"
        )
        add_line(self.path / "runs.jsonl", record)
        self.known.append(record)
        if self.bar is not None:
            self.bar.update()
        return record

    def _steps(self, own: Setting) -> int:
        """The steps of a run, as many as its seconds pay for."""
        if self.workload.by_steps:
            return self.workload.steps
        times = latest_times(self.path, self.workload.name)
        if times is None:
            raise ValueError(f"{self.workload.name} has no seconds yet: run --stage time first")
        if times["void"] and self.workload.suite != "smoke":
            # Load slows some arms more than others, and a budget would not be the same for all.
            raise ValueError(
                f"the seconds of {self.workload.name} are void, as the machine was busy: run "
                "--stage time on an idle one first"
            )
        seconds = own.share * budget_of(self.workload, times)
        per_epoch = Stream(load(self.workload)[0], own.batch, 0).per_epoch
        return steps_in(seconds, seconds_of(times, own.name, own.batch), per_epoch)

    def tuned(self, name: str, batches: Sequence[int], trials: int) -> tuple[Setting, float] | None:
        """The best setting of an arm and its loss; None where it diverged throughout."""
        tried: dict[tuple[int, int], float] = {}
        while at := search.next_setting(tried, batches, trials):
            own = Setting(name, at[0], search.rate_of(self.workload.rate, at[1]))
            tried[at] = best(self.once(own, search.TUNING_SEEDS[0], "tune"))
        at = search.best_setting(tried)
        if at is None:
            return None
        return Setting(name, at[0], search.rate_of(self.workload.rate, at[1])), tried[at]

    def base(self) -> dict[int, Setting]:
        """AdamW's best setting at each batch, as every arm is compared with it at its own."""
        # At each batch as many trials as any other arm has in all: rates as fine as theirs.
        trials, batches = self.workload.trials, self.workload.batches
        found = {batch: self.tuned(BASE, (batch,), trials) for batch in batches}
        kept = {batch: own for batch, own in found.items() if own is not None}
        ordered = sorted(kept, key=lambda batch: kept[batch][1])  # the best batch first
        return {batch: kept[batch][0] for batch in ordered}

    def target(self, own: Setting) -> Mapping[str, Any]:
        """Frozen once, by AdamW at its best setting."""
        path = self.path / "targets.jsonl"
        for record in read_lines(path):
            if record["workload"] == self.workload.name:
                return record
        if time.monotonic() > self.deadline:
            raise OutOfTime  # who only looks at the records writes none
        losses = [best(self.once(own, s, "seeds")) for s in range(2 * self.workload.seeds)]
        tuning = [best(self.once(own, seed, "tune")) for seed in search.TUNING_SEEDS]
        rows = load(self.workload)[0]
        value = statistics.median(losses)
        apart = rows.tuning is not rows.validation
        record = {
            "workload": self.workload.name, "value": value, "seeds": len(losses),
            "tuning": statistics.fmean(tuning) if apart else value,
            "batch": own.batch, "rate": own.rate,
            "date": datetime.date.today().isoformat(), "revision": revision(),
        }  # fmt: skip
        if not math.isfinite(value + record["tuning"]):
            raise ValueError(f"{self.workload.name}: AdamW diverged at its best setting")
        add_line(path, record)
        return record

    def shortened(self, own: Setting, target: Mapping[str, Any] | None) -> Setting:
        """The same in the share of the budget that it needs."""
        arrived: dict[int, bool] = {}
        while target is not None and (rung := search.next_share(arrived)) is not None:
            part = dataclasses.replace(own, share=search.share_of(rung))
            aim = self.workload.within * target["tuning"]
            arrived[rung] = all(
                best(self.once(part, seed, "tune")) <= aim for seed in search.TUNING_SEEDS
            )
        return dataclasses.replace(own, share=search.chosen_share(arrived))

    def settings(self) -> dict[str, list[Setting]]:
        """All settings that run on seeds, by arm; AdamW has one for each batch that is used."""
        base, target = {}, None
        compared = BASE in self.workload.arms and not self.workload.by_steps
        if compared:
            base = self.base()
            if not base:
                raise ValueError(f"{self.workload.name}: AdamW diverged at every rate")
            target = self.target(next(iter(base.values())))
        found: dict[str, list[Setting]] = {}
        losses: dict[str, float] = {}
        for name in (*self.names, *self.recipes):
            if name == SHORTER:
                own = self.shortened(
                    dataclasses.replace(next(iter(base.values())), name=name), target
                )
                if own.share < 1:
                    found[name] = [own]
            elif not (compared and name == BASE) and (
                tuned := self.tuned(name, self.workload.batches, self.workload.trials)
            ):
                found[name], losses[name] = [self.shortened(tuned[0], target)], tuned[1]
        candidates = [n for n in self.recipes if n in found]
        chosen = min(candidates, key=lambda n: (found[n][0].share, losses[n]), default=None)
        for name in candidates:
            if name != chosen and name not in self.names:
                del found[name]
        if base:
            first = next(iter(base))
            used = {first, *(own.batch for settings in found.values() for own in settings)}
            found = {BASE: [own for batch, own in base.items() if batch in used]} | found
        self.chosen = chosen
        return found

    def train(self) -> dict[str, list[Setting]]:
        """Everything of the workload, in the order of the protocol."""
        found, seeds = self.settings(), self.workload.seeds
        twice = found.get(self.chosen or "", [])
        twice = twice + [
            own for own in found.get(BASE, []) if own.batch in {o.batch for o in twice}
        ]
        # One seed of all arms before the next: what is cut short has something of every arm.
        for seed in range(2 * seeds):
            for own in (own for settings in found.values() for own in settings):
                if seed < seeds or own in twice:
                    self.once(own, seed, "seeds")
        return found


def finished(workload: Workload, path: Path) -> dict[str, list[Setting]] | None:
    """The settings of a workload all of whose runs are on record, the chosen recipe as such."""
    training = Training(workload, path, deadline=-math.inf)
    try:
        return training.train()
    except OutOfTime:
        return None


def estimate(workload: Workload, times: Mapping[str, Any]) -> tuple[int, float]:
    """Runs of a workload at most, about, and hours: what a step takes, times what may be run.

    Each arm's trials last the whole budget; to find the length of its runs takes up to eight that
    add up to four budgets; runs on seeds are counted as of the whole budget, which those that are
    worth it are not. Programs are compiled once, those of a `Trainer` in every run (less, where
    JAX keeps them on disk).
    """
    budget, look = budget_of(workload, times), times["evaluation"]
    arms = [name for name in workload.all_arms if name not in (BASE, SHORTER)]
    seeded = len(workload.arms) - 1 + bool(workload.recipes)
    tuning = (len(workload.batches) + len(arms)) * workload.trials
    length = 8 * (len(arms) + 1)
    seeds = workload.seeds * (2 + len(workload.batches) + seeded + 2)
    training = tuning + length / 2 + seeds
    looking = TUNING_EVALUATIONS * (tuning + length) * look["tuning"]
    looking += workload.evaluations * seeds * look["validation"]
    compiling = 0.0
    for name, own in times["compile_seconds"].items():
        again = 1 if arm_of(name).policy is None else workload.trials + 8 + workload.seeds
        compiling += sum(own.values()) / len(own) * (len(own) if again == 1 else again)
    return tuning + length + seeds, (training * budget + looking + compiling) / 3600


def _split_programs(workload: Workload) -> dict[str, Any]:
    """Parts of AdamW's step: forward pass, with gradients, and whole."""
    rows, make_model, loss_fn = load(workload)
    graph, params, rest = nnx.split(make_model(0), nnx.Param, ...)
    params = jax.tree.map(jnp.array, nnx.as_pure(params))
    batch = {name: array[: workload.batch] for name, array in rows.train.items()}
    tx = transformation(arm_of(BASE), workload.rate / 10, 100_000)

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
