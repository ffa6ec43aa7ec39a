"""The report's first page: one chart, one table, three sentences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from benchmarks.suite.plots import figure, save
from benchmarks.suite.standing import BASE, OURS, Standing
from benchmarks.suite.statistics import Estimate
from benchmarks.suite.words import listed, ratio, table

WHICH = "reachable"  # what tuned AdamW reaches on every seed: no run of its is charged a budget
NAMES = {"combination": "best combination"}


def arrived(standing: Standing, arm: str) -> Estimate | None:
    """The speed-up over tuned AdamW of an arm that arrives on every seed, with its interval."""
    over = standing.over(BASE, arm, WHICH)
    if over is None or over.interval is None or standing.missed(arm, WHICH):
        return None
    return over


def chosen(tuned: Sequence[Standing]) -> dict[str, dict[str, Estimate]]:
    """By workload, the arms that arrive on every seed, the fastest first."""
    found = {}
    for standing in tuned:
        arms = [arm for arm in standing.runs if arm != BASE and arm not in standing.of("random")]
        own = {arm: over for arm in arms if (over := arrived(standing, arm))}
        if own:
            found[standing.workload["name"]] = dict(
                sorted(own.items(), key=lambda item: -(item[1].mean or 0.0))
            )
    return found


def overview_blocks(suite: Mapping, tuned: Sequence[Standing]) -> list[str]:
    """The first page of one suite; empty where nothing is timed yet."""
    found = chosen(tuned)
    if not found:
        return []
    by_name = {standing.workload["name"]: standing for standing in tuned}
    best = {}
    for name, arms in found.items():
        ours = [arm for arm in arms if arm in by_name[name].of(*OURS)]
        if ours:
            best[name] = (ours[0], arms[ours[0]].mean or 0.0)
    methods = {arm: about for s in tuned for arm, about in s.arms.items()}
    methods = {arm: about for arm, about in methods.items() if about["family"] in OURS}
    never = [f"`{arm}`" for arm in methods if not any(arm in arms for arms in found.values())]
    winners = [f"{name} {speed:.1f}x (`{arm}`)" for name, (arm, speed) in best.items()]
    sentences = [
        "The chart shows how much sooner than with AdamW, its learning rate tuned, a training is "
        "as good as AdamW gets on all of its seeds, for every method that gets there on all of "
        "its own.",
        f"The fastest of this library's methods: {listed(winners)}.",
        f"Given as many examples as AdamW, {len(never)} of the {len(methods)} methods do "
        f"not get there on all seeds of any workload: {listed(never)}.",
    ]
    rows = []
    speeds = {
        arm: [arms[arm].mean or 0 for arms in found.values() if arm in arms] for arm in methods
    }
    for arm in sorted(methods, key=lambda arm: (-len(speeds[arm]), -max(speeds[arm], default=0))):
        cells = [cell(standing, arm) for standing in by_name.values()]
        text = "what was best by trying, see there" if arm in NAMES else methods[arm]["text"]
        rows.append(" | ".join([NAMES.get(arm, arm), text, *cells]))
    return [
        "\n".join(sentences),
        f"![How much sooner than tuned AdamW](report/{suite['folder']}-overview.png)",
        table(" | ".join(["method", "what it does", *by_name]), rows),
        f"Times sooner than tuned AdamW on {suite['device']}, with 95 % intervals; in words: on "
        "how many seeds it gets there, where that is not all of them.",
    ]


def cell(standing: Standing, arm: str) -> str:
    if arm not in standing.runs:
        return "-"
    missed, n = standing.missed(arm, WHICH), len(standing.runs[arm])
    if missed is None:
        return "no target yet"
    if missed:
        return f"on {n - missed} of {n}" if missed < n else "never"
    return ratio(standing.over(BASE, arm, WHICH)) if standing.seconds.get(arm) else "not timed"


def plot_overview(suite: Mapping, tuned: Sequence[Standing], path: Path) -> None:
    """Every workload, every method that arrives: its speed-up and interval, a line at 1x."""
    found = chosen(tuned)
    by_name = {standing.workload["name"]: standing for standing in tuned}
    made, (axes,) = figure(8.6, 1.4 + 0.24 * (sum(map(len, found.values())) + 1.5 * len(found)))
    beside = axes.get_yaxis_transform()  # x in parts of the width, y in rows
    y, ticks, ends = 0, {}, [0.9, 1.1]
    for name, arms in found.items():
        title = ", ".join(by_name[name].workload.get("title", name).split(", ")[:2])
        axes.text(
            -0.2, y, title, transform=beside, fontsize=9, fontweight="bold", va="center",
            bbox={"color": "white", "pad": 1.5},
        )  # fmt: skip
        for arm, over in arms.items():
            y += 1
            ours = arm in by_name[name].of(*OURS)
            colour = "#0072B2" if ours else "0.5"
            axes.plot(over.interval, (y, y), color=colour, lw=6, alpha=0.35, solid_capstyle="butt")
            axes.plot(over.mean, y, "o", color=colour, ms=6)
            ticks[y] = (NAMES.get(arm, arm), colour)
            ends += over.interval or ()
            axes.text(
                1.01, y, f"{over.mean:.1f}x", transform=beside, color=colour, fontsize=9,
                va="center", fontweight="bold" if ours else None,
            )  # fmt: skip
        y += 2
    axes.axvline(1, color="black", lw=1.2, zorder=0)
    axes.set_xscale("log", base=2)
    left, right = min(ends) / 1.1, max(ends) * 1.1
    marks = [mark for mark in (0.25, 0.5, 1, 2, 3, 4, 8) if left <= mark <= right]
    axes.set_xlim(left, right)
    axes.set_xticks(marks, [f"{mark:g}x" for mark in marks])
    axes.set_xticks([], minor=True)
    axes.set_yticks(list(ticks), [label for label, _ in ticks.values()], fontsize=9)
    for label, (_, colour) in zip(axes.get_yticklabels(), ticks.values(), strict=True):
        label.set_color(colour)
    axes.set_ylim(y - 1, -0.8)
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", length=0)
    for side in ("top", "left", "right"):
        axes.spines[side].set_visible(False)
    axes.set_xlabel("slower  \N{LEFTWARDS ARROW}  tuned AdamW  \N{RIGHTWARDS ARROW}  sooner")
    made.suptitle(
        "How much sooner is training as good as with tuned AdamW?\n"
        "blue: this library, grey: other ways; bands: 95 % intervals over seeds",
        fontsize=10.5,
    )
    save(made, path)
