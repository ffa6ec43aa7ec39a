"""Repeats some arms of a finished suite: other seeds, seconds taken anew, the same settings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.records import add_line
from benchmarks.suite import statistics
from benchmarks.suite.arms import BASE, SHORTER
from benchmarks.suite.harness import Setting, run_arm, seconds_of, take_times
from benchmarks.suite.standing import Standing, standing_of
from benchmarks.suite.statistics import Estimate
from benchmarks.suite.words import ratio, table
from benchmarks.suite.workloads import Workload

FIRST_SEED = 100  # none of the seeds that are reported, nor of those that were tuned on


def agrees(before: Estimate, after: Estimate) -> bool:
    """The same side of 1x, and intervals that overlap."""
    if not before.mean or not after.mean or not before.interval or not after.interval:
        return False
    (a, b), (c, d) = before.interval, after.interval
    return (before.mean > 1) == (after.mean > 1) and a <= d and c <= b


def cells(done: Sequence[Standing], n: int, draw: int) -> list[tuple[Standing, str]]:
    """Arms of workloads, drawn among all that have a ratio with an interval."""
    every = [
        (standing, name)
        for standing in done
        for name in standing.own
        if name not in (BASE, SHORTER)
        and (over := standing.same_batch(name, standing.workload.within)) is not None
        and over.interval is not None
    ]
    order = np.random.default_rng(draw).permutation(len(every))
    return [every[i] for i in order[:n]]


def again(standing: Standing, name: str) -> tuple[Estimate, Mapping]:
    """The ratio over AdamW at the same batch on other seeds, with seconds of now."""
    workload, own = standing.workload, standing.own[name]
    base = standing.bases[own.batch]
    times = take_times(workload, [BASE, name], 5, [own.batch])
    aim = workload.within * standing.target
    hits: dict[Setting, dict[int, float | None]] = {base: {}, own: {}}
    budgets: dict[int, float | None] = {}
    for seed in range(FIRST_SEED, FIRST_SEED + workload.seeds):
        for one in (base, own):
            steps = next(iter(standing.runs(one).values()))["steps"]
            run = run_arm(workload, one.name, one.batch, one.rate, seed, steps, False)
            seconds = seconds_of(times, one.name, one.batch)
            hits[one][seed] = statistics.time_to_target(run, seconds, aim)
            if one is base:
                budgets[seed] = statistics.whole(run, seconds)
    return statistics.speed_up(hits[base], hits[own], budgets), times


def repeat(workloads: Sequence[Workload], path: Path, n: int, draw: int) -> tuple[str, bool]:
    """Repeats `n` arms; a table of both results, and whether all agree.

    Writes a line for each to `rerun.jsonl` in the folder of the records.

    Raises:
      ValueError: no workload is finished and timed on a quiet machine.
    """
    done = [found for workload in workloads if (found := standing_of(workload, path))]
    chosen = cells(done, n, draw)
    if not chosen:
        raise ValueError(f"{path} has no workload that is finished and timed on a quiet machine")
    rows, same = [], True
    for standing, name in chosen:
        before = standing.same_batch(name, standing.workload.within)
        assert before is not None
        after, times = again(standing, name)
        fine = agrees(before, after)
        same &= fine
        record = {
            "workload": standing.workload.name, "arm": name, "before": vars(before),
            "after": vars(after), "agrees": fine, "void": times["void"], "date": times["date"],
        }  # fmt: skip
        add_line(path / "rerun.jsonl", record)
        said = ("agrees" if fine else "DIFFERS") + ", but the machine was busy" * times["void"]
        rows.append(
            f"{standing.workload.name} | {name} | {ratio(before)} | {ratio(after)} | {said}"
        )
    return table("task | method | on record | again | ", rows), same
