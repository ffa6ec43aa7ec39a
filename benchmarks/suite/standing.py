"""What the records say of a finished workload: settings, seconds to the target, costs."""

from __future__ import annotations

import functools
import math
import statistics as plain
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.records import read_lines
from benchmarks.suite import statistics
from benchmarks.suite.arms import BASE, arm_of
from benchmarks.suite.harness import Setting, best, finished, latest_times, seconds_of
from benchmarks.suite.statistics import Estimate
from benchmarks.suite.workloads import Workload

LEVELS = (1.0, 1.02, 1.05)  # of tuned AdamW's loss


class Standing:
    """The finished runs of one workload.

    Args:
      workload: its numbers.
      path: folder of the suite's records.
      settings: by arm, as `harness.finished` gives them.

    Attributes:
      own: by arm, how it is run; AdamW at its best batch.
      bases: AdamW by batch.
      target: tuned AdamW's loss.
      times: the record of the seconds.
    """

    def __init__(self, workload: Workload, path: Path, settings: Mapping[str, list[Setting]]):
        self.workload = workload
        self.own = {name: several[0] for name, several in settings.items()}
        self.bases = {own.batch: own for own in settings[BASE]}
        lines = [r for r in read_lines(path / "runs.jsonl") if r["workload"] == workload.name]
        self.all_runs = lines
        targets = {r["workload"]: r for r in read_lines(path / "targets.jsonl")}
        self.target: float = targets[workload.name]["value"]
        times = latest_times(path, workload.name)
        assert times is not None
        self.times = times

    def recipe(self) -> str | None:
        """The one that the tuning seeds chose."""
        return next((name for name in self.own if name in self.workload.recipes), None)

    def of(self, *families: str) -> list[str]:
        return [name for name in self.own if arm_of(name).family in families]

    def runs(self, own: Setting) -> dict[int, Mapping]:
        """By seed."""
        key = {"arm": own.name, "batch": own.batch, "rate": own.rate, "share": own.share}
        key["track"] = "seeds"
        return {r["seed"]: r for r in self.all_runs if key.items() <= r.items()}

    def seconds(self, own: Setting) -> dict[str, float] | None:
        """Of a step by phase; None where the arm is not timed."""
        if own.name not in self.times["seconds"] and own.name != "adamw, shorter":
            return None
        return seconds_of(self.times, own.name, own.batch)

    @functools.cache  # noqa: B019 (lives as long as one report)
    def hits(self, own: Setting, level: float) -> dict[int, float | None]:
        """Seconds to a multiple of the target by seed; None where a run does not get there."""
        seconds = self.seconds(own)
        if seconds is None:
            return {}
        aim = level * self.target
        return {s: statistics.time_to_target(r, seconds, aim) for s, r in self.runs(own).items()}

    def over(self, base: Setting, own: Setting, level: float) -> Estimate | None:
        """How many times sooner than another; None where one of the two has no clock."""
        seconds = self.seconds(base)
        if seconds is None or not self.hits(own, level):
            return None
        budgets = {s: statistics.whole(r, seconds) for s, r in self.runs(base).items()}
        return statistics.speed_up(self.hits(base, level), self.hits(own, level), budgets)

    def same_batch(self, name: str, level: float) -> Estimate | None:
        """Over tuned AdamW at the arm's own batch."""
        own = self.own[name]
        return self.over(self.beside(own), own, level)

    def best_baseline(self, level: float) -> Setting:
        """The fewest misses, then the shortest mean time; AdamW at every batch is one of them."""
        candidates = [self.own[name] for name in self.of("baseline") if name != BASE]

        def rank(own: Setting) -> tuple[float, float]:
            hits = list(self.hits(own, level).values())
            found = [seconds for seconds in hits if seconds is not None]
            if not found:
                return 2.0, math.inf
            return hits.count(None) / len(hits), statistics.geometric_mean(found)

        return min([*self.bases.values(), *candidates], key=rank)

    def missed(self, name: str, level: float) -> int:
        return list(self.hits(self.own[name], level).values()).count(None)

    def losses(self, name: str) -> list[float]:
        return [best(run) for run in self.runs(self.own[name]).values()]

    def tests(self, own: Setting) -> dict[int, float]:
        """Accuracy on the test rows by seed."""
        runs = self.runs(own)
        return {s: r["test"]["accuracy"] for s, r in runs.items() if r.get("test")}

    def price(self, name: str) -> Estimate:
        """Test accuracy over AdamW's at the same batch, paired."""
        own = self.own[name]
        return statistics.difference(self.tests(self.beside(own)), self.tests(own))

    def beside(self, own: Setting) -> Setting:
        """AdamW at the arm's batch; at its best one where it diverged at that."""
        return self.bases.get(own.batch, self.own[BASE])

    def step(self, own: Setting) -> float | None:
        """Seconds of a step, averaged over the phases as they were run."""
        seconds, runs = self.seconds(own), [r for r in self.runs(own).values() if r["evals"]]
        if seconds is None or not runs:
            return None
        return statistics.clock(runs[0], seconds)[-1] / runs[0]["evals"][-1]["step"]

    def cost(self, name: str) -> float | None:
        """Seconds of a step as a share of AdamW's at the same batch."""
        own = self.own[name]
        mine, base = self.step(own), self.step(self.beside(own))
        return mine / base if mine and base else None

    def bytes(self, own: Setting) -> float | None:
        """The compiler's peak of a step."""
        found = self.times["peak_bytes"].get(own.name, {}).get(str(own.batch), {}).values()
        return max((peak for peak in found if peak is not None), default=None)

    def memory(self, name: str) -> float | None:
        """Peak bytes as a share of AdamW's at the same batch."""
        own = self.own[name]
        mine, base = self.bytes(own), self.bytes(self.beside(own))
        return mine / base if mine and base else None

    def edge(self, own: Setting) -> bool:
        """Whether the best rate is the lowest or the highest that was tried at its batch."""
        tried = [
            r["rate"] for r in self.all_runs
            if (r["arm"], r["batch"], r["track"], r["share"]) == (own.name, own.batch, "tune", 1.0)
        ]  # fmt: skip
        return bool(tried) and own.rate in (min(tried), max(tried))

    def split(self) -> dict[str, float]:
        """Seconds a step of plain AdamW: forward, backward, update, and the whole."""
        parts = self.times["split"]
        forward, gradient, step = (plain.median(parts[k]) for k in ("forward", "gradient", "step"))
        # Three programs timed apart may come out in the wrong order by a hair.
        gradient = max(forward, gradient)
        step = max(step, gradient)
        return {
            "forward": forward,
            "backward": gradient - forward,
            "update": step - gradient,
            "step": step,
        }


def standing_of(workload: Workload, path: Path) -> Standing | None:
    """None where runs are missing, or seconds that may be shown."""
    times: Any = latest_times(path, workload.name)
    if times is None or times["void"] or BASE not in workload.arms:
        return None
    settings = finished(workload, path)
    return None if settings is None else Standing(workload, path, settings)
