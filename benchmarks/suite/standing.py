"""What the records say: runs by arm and seed, seconds, hits of the target."""

from __future__ import annotations

import functools
import json
import math
import re
import statistics as plain
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.records import read_lines
from benchmarks.suite import statistics
from benchmarks.suite.statistics import Estimate

BASE = "adamw"
OURS = ("ours", "combination")
# AdamW's own runs at its tuned rate may stand in the track that froze the target.
TUNED, DEFAULTS = ("target", "seeds"), ("defaults",)
TARGETS = {
    "value": "the median over seeds of tuned AdamW's best",
    "reachable": "the worst of tuned AdamW's bests, which it reaches on every one of these seeds",
}
SHORT = {"value": "median", "reachable": "reachable"}
ASKED = 5  # seeds, by the protocol

UNKNOWN = {"family": "unknown", "text": "not described"}
Describe = Callable[[Mapping[str, Any]], Mapping[str, Mapping[str, Any]]]


def described_arms(workload: Mapping[str, Any]) -> Mapping[str, Mapping[str, Any]]:
    """What the suite itself says of the arms of a workload."""
    from benchmarks.suite import arms, workloads

    if "title" not in workload:  # its file is gone
        return {}
    return arms.describe(workloads.read_workload(workload["suite"], workload["name"]))


def load(results: Path, workloads: Path) -> list[dict]:
    """Every measured suite but `smoke`: name, device, workloads, runs and times, in order."""
    suites = []
    folders = sorted((results / "suite").glob("*-*"))
    for folder in sorted(folders, key=lambda folder: folder.name.startswith("ablation")):
        name, _, device = folder.name.partition("-")
        runs = read_lines(folder / "runs.jsonl")
        if name == "smoke" or not runs:
            continue
        files = sorted((workloads / name).glob("*.json"))
        known = {f.stem: json.loads(f.read_text("utf-8")) | {"suite": name} for f in files}
        for run in runs:  # a workload whose file is gone is still reported
            known.setdefault(run["workload"], {"name": run["workload"], "suite": name})
        times = {
            line["workload"]: line
            for line in read_lines(folder / "times.jsonl")
            if not line.get("void")
        }
        suites.append(
            {"suite": name, "device": device, "folder": folder.name}
            | {"workloads": known, "runs": runs, "times": times}
        )
    return suites


def chosen(runs: Sequence[Mapping], tracks: Sequence[str]) -> dict[str, dict[int, Mapping]]:
    """By arm and seed, the runs at the rate that the arm was last run with."""
    found: dict[str, dict[int, Mapping]] = {}
    for arm in dict.fromkeys(r["arm"] for r in runs):
        for track in tracks:
            mine = [r for r in runs if r["arm"] == arm and r["track"] == track]
            if mine:
                rate = mine[-1]["rate"]
        own = {
            r["seed"]: r
            for track in tracks
            for r in runs
            if r["arm"] == arm and r["track"] == track and r["rate"] == rate
        }
        if own:
            found[arm] = dict(sorted(own.items()))
    return found


class Standing:
    """What the records say of one workload and track.

    Attributes:
      workload: the numbers of its file.
      runs: by arm and seed.
      arms: by arm, `family` and `text`.
      tried: by arm, the learning rates that it was tuned over.
      seconds: by arm and phase, the median of a step; only for arms with all phases timed.
    """

    def __init__(
        self,
        workload: Mapping,
        runs: Sequence[Mapping],
        times: Mapping | None,
        describe: Describe,
        tracks: Sequence[str] = TUNED,
    ):
        self.workload, self.times = workload, times
        mine = [r for r in runs if r["workload"] == workload["name"]]
        described = describe(workload)
        if tracks == DEFAULTS:
            # A trial at the default rate is a run on defaults, whatever it was made for.
            rate = workload.get("default_rate")
            mine = [{**r, "track": DEFAULTS[0]} for r in mine if r["rate"] == rate]
        self.runs = chosen(mine, tracks)
        self.tried: dict[str, set[float]] = {}
        for run in mine:
            if run["track"] == "tune":
                self.tried.setdefault(run["arm"], set()).add(run["rate"])
        # In the order of their description, so that kin stand together.
        order = [*described, *(arm for arm in self.runs if arm not in described)]
        self.runs = {arm: self.runs[arm] for arm in order if arm in self.runs}
        self.arms = {arm: described.get(arm, UNKNOWN) for arm in self.runs}
        self.higher = workload.get("higher_is_better", True)
        self.target = workload.get("target")
        rounds = times["seconds"] if times else {}
        self.seconds = {}
        for arm, own in self.runs.items():
            phases = {p for r in own.values() for e in r["evals"] for p in e["phases"]}
            if arm in rounds and phases <= set(rounds[arm]):
                self.seconds[arm] = {p: plain.median(rounds[arm][p]) for p in rounds[arm]}

    def of(self, *families: str) -> list[str]:
        return [arm for arm, about in self.arms.items() if about["family"] in families]

    def metrics(self, arm: str, which: str) -> dict[int, float]:
        """By seed, the `best` or the `last` validation metric, signed so that more is better."""
        sign = 1 if self.higher else -1
        found = {}
        for seed, run in self.runs[arm].items():
            values = [sign * e["metric"] for e in run["evals"] if math.isfinite(e["metric"])]
            if values:
                found[seed] = max(values) if which == "best" else values[-1]
        return found

    def median_best(self, arm: str) -> float | None:
        best = self.metrics(arm, "best").values()
        return (1 if self.higher else -1) * plain.median(best) if best else None

    def reached(
        self, arm: str, which: str, seconds: Mapping[str, float]
    ) -> dict[int, float | None]:
        """What the clock says at the target by seed; empty without a target."""
        if not self.target:
            return {}
        return {
            seed: statistics.time_to_target(
                run, seconds, self.target[which], higher_is_better=self.higher
            )
            for seed, run in self.runs[arm].items()
        }

    @functools.cache  # noqa: B019 (lives as long as one report)
    def hits(self, arm: str, which: str) -> dict[int, float | None]:
        """Seconds to the target by seed; empty without a target or without times."""
        return self.reached(arm, which, self.seconds[arm]) if arm in self.seconds else {}

    @functools.cache  # noqa: B019
    def steps(self, arm: str, which: str) -> dict[int, float | None]:
        """Steps to the target by seed, for which no clock is needed."""
        phases = {p for r in self.runs[arm].values() for e in r["evals"] for p in e["phases"]}
        return self.reached(arm, which, dict.fromkeys(phases, 1.0))

    def missed(self, arm: str, which: str) -> int | None:
        """Runs that never reached the target; None without one."""
        return list(self.steps(arm, which).values()).count(None) if self.target else None

    def mean_steps(self, arm: str, which: str) -> float | None:
        """Steps to the target, the geometric mean over the seeds that reach it."""
        found = [steps for steps in self.steps(arm, which).values() if steps]
        return statistics.geometric_mean(found) if found else None

    def over(self, base: str | None, arm: str, which: str) -> Estimate | None:
        """The speed-up over another arm; None where one of the two has no clock."""
        if base is None or not (self.hits(base, which) and self.hits(arm, which)):
            return None
        budgets = {s: statistics.whole(r, self.seconds[base]) for s, r in self.runs[base].items()}
        return statistics.speed_up(self.hits(base, which), self.hits(arm, which), budgets)

    def cost(self, arm: str) -> float | None:
        """Seconds of a step, averaged over the phases as they were run."""
        runs = [r for r in self.runs[arm].values() if r["evals"]]
        if arm not in self.seconds or not runs:
            return None
        return plain.mean(
            statistics.clock(r, self.seconds[arm])[-1] / r["evals"][-1]["step"] for r in runs
        )

    def budget(self, arm: str) -> float | None:
        cost = self.cost(arm)
        return None if cost is None else cost * max(r["steps"] for r in self.runs[arm].values())

    def rival(self, arm: str) -> str | None:
        """The random selection to compare with: the arm's namesake, else of the nearest cost."""
        randoms = self.of("random")
        if arm in randoms:
            return None
        own = self.budget(arm)
        timed = {other: cost for other in randoms if (cost := self.budget(other))}
        if f"random {arm}" in randoms:
            return f"random {arm}"
        if own and timed:
            return min(timed, key=lambda other: abs(math.log(timed[other] / own)))
        return randoms[0] if randoms else None

    def fastest(self, arms: Sequence[str], which: str) -> str | None:
        """The shortest geometric mean time to the target among arms that never miss it."""
        means = {}
        # An arm of one lucky seed is not to win while others have enough for an interval.
        enough = [arm for arm in arms if len(self.runs[arm]) >= statistics.FEWEST]
        for arm in enough or arms:
            hits = self.hits(arm, which)
            if hits and None not in hits.values():
                means[arm] = statistics.geometric_mean(list(hits.values()))  # type: ignore[arg-type]
        return min(means, key=lambda arm: means[arm]) if means else None

    def split(self) -> dict[str, float] | None:
        """Seconds a step of plain AdamW: forward, backward, update, and the whole."""
        parts = (self.times or {}).get("split")
        if not parts:
            return None
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


def standings(suite: Mapping, describe: Describe, tracks: Sequence[str] = TUNED) -> list[Standing]:
    return [
        Standing(w, suite["runs"], suite["times"].get(name), describe, tracks)
        for name, w in suite["workloads"].items()
    ]


def profiles(tuned: Sequence[Standing]) -> dict[str, dict[str, dict]]:
    """By target and arm, seconds by (workload, seed)."""
    found: dict[str, dict[str, dict]] = {which: {} for which in TARGETS}
    for standing in tuned:
        for which in TARGETS:
            for arm in standing.runs:
                for seed, seconds in standing.hits(arm, which).items():
                    problem = (standing.workload["name"], seed)
                    found[which].setdefault(arm, {})[problem] = seconds
    return {which: arms for which, arms in found.items() if arms}


def accuracies(results: Path) -> dict[str, dict[str, list[tuple[float, float, float]]]]:
    """By width and series, (share of the features kept, test accuracy, its spread)."""
    path = results / "archive" / "meprop_mlp-cpu.json"
    if not path.exists():
        return {}
    found: dict[str, dict[str, list[tuple[float, float, float]]]] = {}
    for width, rows in json.loads(path.read_text("utf-8"))["summary"].items():
        series = found.setdefault(width, {})
        for row in rows:
            fixed = re.fullmatch(r"(unified|random) (\d+)(%?)(, dropout)?", row["arm"])
            if fixed:
                kind, k, percent, dropout = fixed.groups()
                share = float(k) / 100 if percent else float(k) / float(width)
                kind = {"unified": "top-k", "random": "random k"}[kind]
                point = (share, row["test"], row["spread"])
                series.setdefault(kind + (dropout or ""), []).append(point)
            elif row["arm"] in ("dense", "dense, dropout"):
                series[row["arm"]] = [(1.0, row["test"], row["spread"])]
    return {width: {k: sorted(v) for k, v in series.items()} for width, series in found.items()}
