"""The report's details: every arm of every workload, what it costs, what did not work."""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping
from typing import Any

from benchmarks.suite import statistics
from benchmarks.suite.standing import (
    ASKED,
    BASE,
    DEFAULTS,
    OURS,
    TARGETS,
    Describe,
    Standing,
    profiles,
    standings,
)
from benchmarks.suite.words import gap, listed, number, of, ratio, relative, said, table


def verdict(standing: Standing, arm: str) -> tuple[str, str]:
    """Whether a method beats random selection at equal cost, and why."""
    rival, n = standing.rival(arm), len(standing.runs[arm])
    failed = sum(bool(run.get("failed")) for run in standing.runs[arm].values())
    if failed:
        return "not working", f"{failed} of {n} runs failed"
    if rival is None:
        return "unknown", "no random selection was run"
    if not standing.target:
        return "unknown", "no target"
    if not {arm, rival} <= set(standing.seconds):
        return "unknown", f"it or `{rival}` is not timed"
    speed = standing.over(rival, arm, "value")
    # As shares, since the two may not have the same number of seeds.
    missed, others = (
        standing.missed(a, "value") / len(standing.runs[a])  # type: ignore[operator]
        for a in (arm, rival)
    )
    if speed and speed.interval and speed.interval[0] > 1 and missed <= others:
        return "works", f"sooner than `{rival}`: {ratio(speed)}"
    edge = statistics.difference(standing.metrics(rival, "best"), standing.metrics(arm, "best"))
    if edge.interval is None:
        return "unknown", f"too few seeds in common with `{rival}`"
    time = "none arrives" if speed is None or speed.mean is None else ratio(speed)
    why = f"against `{rival}`: time {time}, best metric {gap(edge)}"
    return "better" if edge.interval[0] > 0 else "not working", why


def standing_table(standing: Standing) -> str:
    base = standing.metrics(BASE, "best") if BASE in standing.runs else {}
    rows = []
    for arm, runs in standing.runs.items():
        rate, n, rival = next(iter(runs.values()))["rate"], len(runs), standing.rival(arm)
        tried = standing.tried.get(arm, ())
        edge = " (edge)" if len(tried) > 1 and rate in (min(tried), max(tried)) else ""
        ratios = {w: ratio(standing.over(BASE, arm, w)) for w in TARGETS}
        edges = gap(statistics.difference(base, standing.metrics(arm, "best")))
        random = ratio(standing.over(rival, arm, "value"))
        if arm == BASE:
            ratios, random, edges = dict.fromkeys(TARGETS, "base"), "-", "base"
        rows.append(
            f"{arm} | {rate:g}{edge} | {n} | {number(standing.median_best(arm))} | {edges} | "
            f"{of(standing.missed(arm, 'value'), n)} | {ratios['value']} | "
            f"{random}{'' if random == '-' else f', `{rival}`'} | "
            f"{of(standing.missed(arm, 'reachable'), n)} | {ratios['reachable']}"
        )
    return table(
        "arm | rate | seeds | median best | best over AdamW's | short | sooner than AdamW | "
        "sooner than random | short (reachable) | sooner than AdamW (reachable)",
        rows,
    )


def logged(standing: Standing, arm: str) -> tuple[float | None, ...]:
    """Of an arm's step: compiled FLOPs over the phases as run, peak bytes; seconds of compiling."""
    runs = [r for r in standing.runs.get(arm, {}).values() if r["evals"]]
    if not runs:
        return None, None, None
    phases, flops = runs[0]["evals"][-1]["phases"], runs[0].get("flops") or {}
    spent = None
    if all(flops.get(p) is not None for p in phases):
        spent = sum(n * flops[p] for p, n in phases.items()) / sum(phases.values())
    peaks = [p for p in (runs[0].get("peak_bytes") or {}).values() if p is not None]
    compiles = [r["compile_seconds"] for r in runs if r.get("compile_seconds") is not None]
    return spent, max(peaks, default=None), plain.median(compiles) if compiles else None


def cost_table(standing: Standing) -> str:
    """A step beside AdamW's."""
    base_cost, base = standing.cost(BASE), logged(standing, BASE)
    rows = []
    for arm in standing.runs:
        cost, own = standing.cost(arm), logged(standing, arm)
        rows.append(
            f"{arm} | {number(cost and 1e3 * cost, '.3g')} | {relative(cost, base_cost)} | "
            f"{relative(own[0], base[0])} | {relative(own[1], base[1])} | {number(own[2], '.1f')}"
        )
    return table(
        "arm | milliseconds a step | to AdamW | FLOPs to AdamW | peak bytes to AdamW | "
        "compile seconds",
        rows,
    )


def fastest_text(standing: Standing, which: str) -> str:
    """The fastest way to a target, over AdamW and over random selection, and what makes it so."""
    aim = standing.target[which]  # type: ignore[index]
    head = f"**To {aim:.4g}** ({TARGETS[which]}): "
    if BASE not in standing.seconds:
        return head + "tuned AdamW is not timed yet, so no speed is known."

    def compared(arm: str) -> str:
        over, rival = standing.over(BASE, arm, which), standing.rival(arm)
        random = standing.over(rival, arm, which)
        text = said(over, "tuned AdamW") + " " if over else ""
        if random is None:
            return text + "Over random selection: not measured."
        return text + said(random, f"random selection (`{rival}`)")

    first = standing.fastest(list(standing.runs), which)
    ours = standing.fastest(standing.of(*OURS), which)
    if first is None:
        arrive = {
            arm: 1 - standing.missed(arm, which) / len(runs)  # type: ignore[operator]
            for arm, runs in standing.runs.items()
        }
        most = max(arrive, key=lambda arm: arrive[arm])
        text = (
            "no timed arm reaches it on every seed, so nothing may be claimed; most often arrives "
            f"`{most}` ({arrive[most]:.0%})."
        )
    elif first == BASE:
        text = "tuned AdamW itself is the fastest arm that reaches it on every seed."
    else:
        text = f"fastest is `{first}` ({standing.arms[first]['family']}), {compared(first)}"
    if not standing.of(*OURS):
        text += " None of our arms has been run."
    elif ours is None:
        text += " None of our arms reaches it on every seed."
    elif ours != first:
        text += f" Fastest of ours is `{ours}`, {compared(ours)}"
    return f"{head}{text}{parts_of(standing, ours, which)}"


def parts_of(standing: Standing, ours: str | None, which: str) -> str:
    """What a speed-up is made of: the cost of a step, and the number of steps."""
    steps = standing.mean_steps(ours, which) if ours else None
    plainly = standing.mean_steps(BASE, which)
    if not (ours and steps and plainly):
        return ""
    share = standing.cost(ours) / standing.cost(BASE)  # type: ignore[operator]
    return (
        f" A step of `{ours}` costs {share:.2f} of AdamW's, and it takes {steps / plainly:.2f} "
        "times the steps of AdamW's runs that arrive."
    )


def split_text(standing: Standing) -> str:
    split = standing.split()
    if split is None:
        return "Split of a step: not measured yet."
    names = ("forward", "backward", "update")
    shares = ", ".join(f"{name} {split[name] / split['step']:.0%}" for name in names)
    kept = split["step"] - split["backward"]
    return (
        f"Split of a plain AdamW step ({1e3 * split['step']:.3g} ms): {shares}. A free backward "
        f"pass would make a step {split['step'] / kept:.2f}x cheaper, with a free update as well "
        f"{split['step'] / split['forward']:.2f}x."
    )


def failures(standing: Standing) -> str:
    """What did not work: no better than random selection, short of the target, diverging."""
    words = {
        "not working": "is not working: not shown to beat random selection at equal cost",
        "better": "ends better than random selection, but is not shown to be sooner",
        "unknown": "is not known to beat random selection",
    }
    lines = []
    for arm in standing.of(*OURS):
        kind, why = verdict(standing, arm)
        if kind in words:
            lines.append(f"- `{arm}` {words[kind]} ({why}).")
    if standing.target:
        missing = [
            f"`{arm}` ({missed} of {len(runs)})"
            for arm, runs in standing.runs.items()
            if (missed := standing.missed(arm, "value"))
        ]
        lines.append(f"- Short of {standing.target['value']:.4g}: {listed(missing)}.")
    reasons = {
        # In one line, as a message may have several.
        arm: [" ".join(run["failed"].split()) for run in runs.values() if run.get("failed")]
        for arm, runs in standing.runs.items()
    }
    failed = [
        f"`{arm}` ({len(own)} of {len(standing.runs[arm])}: {'; '.join(dict.fromkeys(own))})"
        for arm, own in reasons.items()
        if own
    ]
    if failed:
        lines.append(f"- Failed runs, counted as short of it: {listed(failed)}.")
    untimed = [f"`{arm}`" for arm in standing.runs if arm not in standing.seconds]
    if untimed and standing.times:
        lines.append(f"- Not timed, so without a ratio: {listed(untimed)}.")
    return "What did not work:\n\n" + "\n".join(lines or ["- nothing that was looked at"])


def workload_blocks(standing: Standing, defaults: Standing, folder: str) -> list[str]:
    workload = standing.workload
    name = workload["name"]
    blocks = [f"### {name}", workload.get("title", "(its file is missing)")]
    if not standing.runs:
        blocks.append("No seeds of tuned arms yet.")
    else:
        if standing.target:
            blocks += [fastest_text(standing, which) for which in TARGETS]
        else:
            blocks.append("No target is frozen yet: no time to target.")
        if standing.times is None:
            blocks.append("No timing session yet: no seconds.")
        blocks.append(split_text(standing))
        few = [f"`{a}` ({len(r)})" for a, r in standing.runs.items() if len(r) < ASKED]
        if few:
            blocks.append(f"Fewer than the {ASKED} seeds of the protocol: {listed(few)}.")
        blocks += [failures(standing), standing_table(standing), cost_table(standing)]
        blocks += [
            f"![{name}: {kind}](report/{folder}-{name}-{kind}.png)" for kind in pictures(standing)
        ]
    if defaults.runs:
        rows = []
        for arm, runs in defaults.runs.items():
            over = "base" if arm == BASE else ratio(defaults.over(BASE, arm, "value"))
            missed = of(defaults.missed(arm, "value"), len(runs))
            best = number(defaults.median_best(arm))
            rows.append(f"{arm} | {len(runs)} | {best} | {missed} | {over}")
        blocks.append("Every arm on its defaults, against AdamW on its own:")
        blocks.append(table("arm | seeds | median best | short | sooner than AdamW", rows))
    return blocks


def pictures(standing: Standing) -> list[str]:
    """The plots that the records of a workload are enough for."""
    kinds = []
    if standing.seconds:
        kinds.append("curves")
        if standing.target and BASE in standing.seconds:
            kinds.append("speed-up")
    if any(r.get("where") for runs in standing.runs.values() for r in runs.values()):
        kinds.append("where")
    return kinds


def provenance(suite: Mapping) -> str:
    runs, times = suite["runs"], list(suite["times"].values())
    revisions = sorted({r["revision"] for r in [*runs, *times] if r.get("revision")})
    versions = sorted({f"{k} {v}" for r in runs for k, v in (r.get("versions") or {}).items()})
    text = f"{len(runs)} runs at revision {listed(revisions)}; {listed(versions)}."
    if times:
        cores = sorted({str(t["cores"]) for t in times if t.get("cores")})
        text += f" Seconds on {suite['device']}, {listed(cores)} cores"
        loads = [x for t in times for x in _numbers(t.get("load"))]
        text += f", load up to {max(loads):.1f}" if loads else ", load not recorded"
        foreign = [t["foreign_cores"] for t in times if t.get("foreign_cores") is not None]
        text += f", other processes on up to {max(foreign):.2f} cores." if foreign else "."
    return text


def _numbers(value: Any) -> list[float]:
    if isinstance(value, list | tuple):
        return [x for item in value for x in _numbers(item)]
    return [] if value is None else [value]


def suite_blocks(suite: Mapping, describe: Describe) -> list[str]:
    blocks = [f"## {suite['suite']}, {suite['device']}", provenance(suite)]
    tuned, defaults = standings(suite, describe), standings(suite, describe, DEFAULTS)
    for standing, own in zip(tuned, defaults, strict=True):
        blocks += workload_blocks(standing, own, suite["folder"])
    if found := profiles(tuned):
        blocks.append("### All workloads")
        blocks.append(
            "Share of problems (a workload and a seed; the target is the median) solved within a "
            "factor of the fastest arm, each arm over the problems that it was run on; one that "
            "it falls short of is never solved."
        )
        taus, rows = (1, 1.5, 2, 4), []
        for arm, shares in statistics.performance_profile(found["value"], taus).items():
            own = found["value"][arm]
            cells = (f"{x:.0%}" for x in (statistics.miss_share(own), *shares))
            rows.append(f"{arm} | {len(own)} | {' | '.join(cells)}")
        within = " | ".join(f"within {tau:g}x" for tau in taus)
        blocks.append(table(f"arm | problems | short | {within}", rows))
        blocks.append(f"![Performance profile](report/{suite['folder']}-profile.png)")
    about = {arm: text for s in tuned for arm, text in s.arms.items()}
    rows = [f"{arm} | {text['family']} | {text['text']}" for arm, text in about.items()]
    return [*blocks, "### Arms", table("arm | family | what it is", rows)]
