"""The report's part on ablations: which factor of the priority earns anything."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.records import read_lines
from benchmarks.suite import statistics
from benchmarks.suite.statistics import Estimate
from benchmarks.suite.words import gap, number, table


def factor(arm: str, edge: Estimate) -> str:
    """One sentence on a change of PriorityProp's default, from the interval of what it changes.

    Args:
      arm: `no X` is the default without X; any other name puts that in place of the default.
      edge: the metric of the arm over the default's.
    """
    if not arm.startswith("no "):
        return sentence(f"**{arm}**, in place of the default", edge)
    turned = None if edge.interval is None else (-edge.interval[1], -edge.interval[0])
    mean = None if edge.mean is None else -edge.mean
    subject = f"**{arm.removeprefix('no ')}**, against leaving it out"
    return sentence(subject, Estimate(mean, turned, edge.pairs))


def sentence(subject: str, edge: Estimate) -> str:
    """Whether it earns anything, as far as the interval says."""
    if edge.interval is None:
        return f"- {subject}: too few seeds for an interval."
    lower, upper = edge.interval
    if lower > 0 or upper < 0:
        return f"- {subject}: {'earns' if lower > 0 else 'costs'}, {gap(edge)}."
    return f"- {subject}: no difference that {edge.pairs} seeds show, {gap(edge)}."


def last_losses(runs: Sequence[Mapping]) -> dict[str, dict[int, float]]:
    """By arm and seed the last validation loss, signed so that more is better."""
    found: dict[str, dict[int, float]] = {}
    for run in runs:
        if run["track"] == "seeds" and run["evals"]:
            found.setdefault(run["arm"], {})[run["seed"]] = -run["evals"][-1]["loss"]
    return found


def ablation_blocks(results: Path) -> list[str]:
    """Which factor of the priority earns anything, by differences of the last validation loss."""
    runs = read_lines(results / "evidence/ablation-cpu/runs.jsonl")
    if not runs:
        return []
    blocks = [
        "## Ablations of PriorityProp",
        f"Paired differences of the last validation loss, signed so that more is better, with "
        f"95 % bootstrap intervals; {len(runs)} runs up to {max(r['date'] for r in runs)}.",
    ]
    for name in sorted({r["workload"] for r in runs}):
        blocks.append(f"### {name}, ablations")
        last = last_losses([r for r in runs if r["workload"] == name])
        against = [arm for arm in ("uniform", "random", "default") if arm in last]
        rows = []
        for arm, own in last.items():
            cells = [str(len(own)), number(abs(plain.median(own.values())))]
            for base in against:
                edge = statistics.difference(last[base], own)
                cells.append("base" if arm == base else gap(edge))
            rows.append(" | ".join([arm, *cells]))
        over = " | ".join(f"over {base}" for base in against)
        blocks.append(table(f"arm | seeds | median last{' | ' * bool(over)}{over}", rows))
        if "default" in last:
            own, bases = last["default"], [base for base in against if base != "default"]
            subject = "**priority as it is by default**, against"
            edges = {base: statistics.difference(last[base], own) for base in bases}
            lines = [sentence(f"{subject} {base}", edge) for base, edge in edges.items()]
            lines += [
                factor(arm, statistics.difference(own, last[arm]))
                for arm in last
                if arm not in against
            ]
            blocks.append("\n".join(lines))
    return blocks
