"""The suite's report: `REPORT.md`, its plots and README's table, made from the records alone.

The same records give the same text. What is missing (a timing, a target, enough seeds) is said in
place of the number.
"""

from __future__ import annotations

import statistics as plain
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.suite import statistics
from benchmarks.suite.plots import PLOTS, plot_accuracy, plot_profile
from benchmarks.suite.standing import (
    ASKED,
    BASE,
    DEFAULTS,
    OURS,
    TARGETS,
    Describe,
    Standing,
    accuracies,
    described_arms,
    goal_of,
    load,
    profiles,
    standings,
)
from benchmarks.suite.statistics import Estimate
from priorityprop_jax.core.tables import markdown


def table(header: str, rows: Sequence[str]) -> str:
    """Cells are parted by ` | `."""
    return "\n".join(markdown([line.split(" | ") for line in (header, *rows)]))


def number(value: float | None, pattern: str = ".4g") -> str:
    return "-" if value is None else format(value, pattern)


def ratio(estimate: Estimate | None) -> str:
    if estimate is None or estimate.mean is None:
        return "-"
    text = f"{'≥ ' if estimate.charged else ''}{estimate.mean:.2f}x"
    if estimate.interval is None:
        return f"{text} (too few for an interval)"
    return f"{text} ({estimate.interval[0]:.2f} to {estimate.interval[1]:.2f})"


def gap(estimate: Estimate) -> str:
    if estimate.mean is None:
        return "-"
    if estimate.interval is None:
        return f"{estimate.mean:+.4f} (too few for an interval)"
    return "{:+.4f} ({:+.4f} to {:+.4f})".format(estimate.mean, *estimate.interval)


def said(estimate: Estimate, base: str) -> str:
    may = statistics.claim(estimate.interval, estimate.misses)
    return f"{ratio(estimate)} over {base} on {estimate.pairs} seeds: {may}."


def of(count: int | None, n: int) -> str:
    return "-" if count is None else f"{count} of {n}"


def relative(value: float | None, base: float | None) -> str:
    return "-" if value is None or not base else f"{value / base:.2f}"


def listed(words: Sequence[str]) -> str:
    return ", ".join(words) if words else "none"


def met(over: Estimate | None, goal: float) -> bool:
    return bool(over and over.interval and over.interval[0] >= goal and not over.misses)


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
        "arm | rate | seeds | median best | best over AdamW's | missed | sooner than AdamW | "
        "sooner than random | missed (reachable) | sooner than AdamW (reachable)",
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
    """The fastest way to a target, over AdamW and over random selection, and the goal."""
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
    shares = {a: standing.missed(a, which) / len(r) for a, r in standing.runs.items()}  # type: ignore[operator]
    if first is None:
        fewest = min(shares, key=lambda arm: shares[arm])
        text = (
            f"no timed arm reaches it on every seed, so nothing may be claimed; the fewest misses "
            f"has `{fewest}` ({shares[fewest]:.0%})."
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
    goal = goal_of(standing.workload)
    if met(standing.over(BASE, ours, which) if ours else None, goal):
        return head + text + f" The goal ({goal:g}x at the interval's lower end) is met."
    return (
        f"{head}{text} The goal ({goal:g}x at the interval's lower end) is not met. "
        f"{limit(standing, ours, which, goal)}"
    )


def limit(standing: Standing, ours: str | None, which: str, goal: float) -> str:
    """What keeps the best of our arms from the goal, by the split of a step."""
    split = standing.split()
    if split is None:
        return "The split of a step is not measured yet, so the limiting term is not known."
    parts = {name: split[name] / split["step"] for name in ("forward", "backward", "update")}
    bound = split["step"] / split["forward"]
    if bound < goal:
        return (
            f"Limiting term: the forward pass, {parts['forward']:.0%} of a step. With backward "
            f"pass and update free, a step would still be only {bound:.2f}x cheaper; beyond that "
            "only fewer steps or forward work left out can help."
        )
    steps = standing.mean_steps(ours, which) if ours else None
    plainly = standing.mean_steps(BASE, which)
    if not (ours and steps and plainly):
        return (
            f"The split would allow {bound:.2f}x (backward pass and update free); limiting are the "
            "steps, as there is no arm to compare that reaches the target on every seed."
        )
    share = standing.cost(ours) / standing.cost(BASE)  # type: ignore[operator]
    text = (
        f"A step of `{ours}` costs {share:.2f} of AdamW's, where the split would allow "
        f"{1 / bound:.2f}, and it takes {steps / plainly:.2f} times the steps of AdamW's runs that "
        "arrive. "
    )
    if share * goal <= 1:
        return text + "Limiting term: the steps, not their cost."
    largest = max(parts, key=lambda name: parts[name])
    return text + (
        f"Limiting term: the cost of a step, of which AdamW's {largest} is the largest part "
        f"({parts[largest]:.0%})."
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
    """What did not work: no better than random selection, missing the target, diverging."""
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
        lines.append(f"- Misses of {standing.target['value']:.4g}: {listed(missing)}.")
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
        lines.append(f"- Failed runs, counted as misses: {listed(failed)}.")
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
        blocks.append(table("arm | seeds | median best | missed | sooner than AdamW", rows))
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
            "factor of the fastest arm, each arm over the problems that it was run on; a miss is "
            "never solved."
        )
        taus, rows = (1, 1.5, 2, 4), []
        for arm, shares in statistics.performance_profile(found["value"], taus).items():
            own = found["value"][arm]
            cells = (f"{x:.0%}" for x in (statistics.miss_share(own), *shares))
            rows.append(f"{arm} | {len(own)} | {' | '.join(cells)}")
        within = " | ".join(f"within {tau:g}x" for tau in taus)
        blocks.append(table(f"arm | problems | missed | {within}", rows))
        blocks.append(f"![Performance profile](report/{suite['folder']}-profile.png)")
    about = {arm: text for s in tuned for arm, text in s.arms.items()}
    rows = [f"{arm} | {text['family']} | {text['text']}" for arm, text in about.items()]
    return [*blocks, "### Arms", table("arm | family | what it is", rows)]


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


HEAD = """\
# Results of the benchmark suite

Generated from the records under `benchmarks/results`; a test fails where the two differ.

How to read it: a ratio is the seconds to the target of one arm over another's on the same seed,
and its mean is geometric, with a 95 % percentile bootstrap over seeds. Seconds are steps times the
median seconds of a step, measured with all arms interleaved; they count training alone, not
compiling. "≥" stands where the arm compared with misses the target on some seeds and is charged
its whole budget. A ratio of an arm that misses is over the seeds that it reaches, and nothing may
be claimed from it. "2x" may be said when the interval's lower end is 2. With few seeds such
intervals tend to be too narrow, and the fastest of many arms is chosen on the seeds that it is
shown on. "Random" is the arm's own random counterpart, or else the random selection whose whole run
costs nearest to the arm's. "(edge)" marks a learning rate at an end of those that were tried: a
better one may lie beyond. Combinations were chosen by trying a few on the tuning seed and on up to
two of the seeds that they are shown on. FLOPs are the compiler's count, which takes the body of a
loop once and native kernels not at all. Smoke runs are not reported."""


def report_text(results: Path, workloads: Path, describe: Describe = described_arms) -> str:
    """`REPORT.md`, from the records alone."""
    blocks, suites = [HEAD], load(results, workloads)
    if not suites:
        blocks.append("There are no records yet.")
    if rows := summary(suites, describe):
        blocks += ["## In short", rows]
    for suite in suites:
        make = ablation_blocks if suite["suite"] == "ablation" else suite_blocks
        blocks += make(suite, describe)
    if accuracies(results):
        blocks += [
            "## Accuracy against k",
            "meProp on MNIST's MLPs (`meprop_mlp`): test accuracy over the features kept in the "
            "backward pass; bars are one standard deviation over seeds.",
            "![Accuracy against k](report/accuracy-against-k.png)",
        ]
    return "\n\n".join(blocks) + "\n"


def summary(suites: Sequence[Mapping], describe: Describe) -> str:
    """A line for each workload and target; empty where there is none."""
    rows = []
    for suite in suites:
        for standing in standings(suite, describe) if suite["suite"] != "ablation" else ():
            name, goal = standing.workload["name"], goal_of(standing.workload)
            if not standing.target or BASE not in standing.seconds:
                why = "not timed yet" if standing.target else "no target yet"
                rows.append(f"{name}, {suite['device']} | {why} | - | - | - | - | {goal:g}x | -")
                continue
            for which in TARGETS:
                ours = standing.fastest(standing.of(*OURS), which)
                over = standing.over(BASE, ours, which) if ours else None
                random = standing.over(standing.rival(ours), ours, which) if ours else None
                aim = f"{standing.target[which]:.4g}{' (reachable)' * (which != 'value')}"
                claimed = statistics.claim(over.interval, over.misses) if over else "nothing"
                rows.append(
                    f"{name}, {suite['device']} | {aim} | {ours or 'none on every seed'} | "
                    f"{ratio(over)} | {ratio(random)} | {claimed} | "
                    f"{goal:g}x, {'met' if met(over, goal) else 'missed'} | "
                    f"{standing.fastest(list(standing.runs), which) or 'none on every seed'}"
                )
    header = (
        "workload | target | fastest of ours | sooner than AdamW | sooner than random | "
        "may be said | goal | fastest of all"
    )
    return table(header, rows) if rows else ""


def readme_table(results: Path, workloads: Path, describe: Describe = described_arms) -> str:
    """README's table, as it stands between its markers."""
    rows = summary(load(results, workloads), describe)
    if not rows:
        return "There are no results of the benchmark suite yet."
    return (
        "How much sooner than tuned AdamW our fastest arm reaches the validation metric that tuned "
        "AdamW reaches (median of its seeds; *reachable*: what it reaches on every seed), with "
        "95 % intervals over paired seeds; all arms, losses included, are in "
        f"[benchmarks/results/REPORT.md](benchmarks/results/REPORT.md):\n\n{rows}"
    )


def build(results: Path, workloads: Path, out: Path, describe: Describe = described_arms) -> None:
    """Writes the report and, in the folder `report` beside it, its plots.

    Args:
      results: the folder `benchmarks/results`.
      workloads: the folder of the workloads' files, `SUITE/NAME.json`.
      out: of `REPORT.md`.
      describe: family and text of each arm of a workload.
    """
    out.write_text(report_text(results, workloads, describe), encoding="utf-8")
    folder = out.parent / "report"
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.png"):
        old.unlink()
    for suite in load(results, workloads):
        if suite["suite"] == "ablation":
            continue
        tuned = standings(suite, describe)
        for standing in tuned:
            name = f"{suite['folder']}-{standing.workload['name']}"
            for kind in pictures(standing):
                PLOTS[kind](standing, folder / f"{name}-{kind}.png")
        if found := profiles(tuned):
            about = {arm: text for s in tuned for arm, text in s.arms.items()}
            plot_profile(found, about, folder / f"{suite['folder']}-profile.png")
    if found := accuracies(results):
        plot_accuracy(found, folder / "accuracy-against-k.png")
