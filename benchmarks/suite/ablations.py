"""The report's part on ablations: which factor of the priority earns anything."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping

from benchmarks.suite import statistics
from benchmarks.suite.details import provenance
from benchmarks.suite.standing import DEFAULTS, Describe, Standing
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


def ablation_blocks(suite: Mapping, describe: Describe) -> list[str]:
    """Which factor of the priority earns anything, by differences of the last validation metric."""
    blocks = [
        f"## Ablations of PriorityProp, {suite['device']}",
        provenance(suite),
        "Paired differences of the last validation metric, signed so that more is better, with "
        "95 % bootstrap intervals.",
    ]
    for name, workload in suite["workloads"].items():
        blocks += [f"### {name}", workload.get("title", "(its file is missing)")]
        runs = [r for r in suite["runs"] if r["workload"] == name]
        standing = Standing(workload, runs, None, describe)
        if not standing.runs:  # all that there is without tuning
            standing = Standing(workload, runs, None, describe, DEFAULTS)
        last = {arm: standing.metrics(arm, "last") for arm in standing.runs}
        if not last:
            blocks.append("No seeds yet.")
            continue
        against = [arm for arm in ("uniform", "random", "default") if arm in last]
        rows = []
        for arm, own in last.items():
            median = abs(plain.median(own.values())) if own else None
            cells = [str(len(own)), number(median)]
            for base in against:
                edge = statistics.difference(last[base], own)
                cells.append("base" if arm == base else gap(edge))
            rows.append(" | ".join([arm, *cells]))
        over = " | ".join(f"over {base}" for base in against)
        blocks.append(table(f"arm | seeds | median last{' | ' * bool(over)}{over}", rows))
        if "uniform" not in last:
            blocks.append("Uniform allocation has not been run: nothing to compare with.")
        if "default" in last:
            own, bases = last["default"], against[:-1]
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
