"""`python -m benchmarks.suite`: lists, runs and reports the benchmark suites."""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.records import RESULTS, read_lines
from priorityprop_jax.cli.main import ended
from priorityprop_jax.cli.runs import Failure, rate, whole
from priorityprop_jax.core.tables import aligned
from priorityprop_jax.models.files import ENV_VAR, DataError

if TYPE_CHECKING:
    from benchmarks.suite.workloads import Workload


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; the exit code is 1 where something failed, 2 for wrong arguments."""
    return ended(lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = _parser().parse_args(argv)
    if getattr(arguments, "data_dir", None) is not None:
        os.environ[ENV_VAR] = str(arguments.data_dir)
    try:
        return arguments.run(arguments)
    except (Failure, DataError, ImportError) as failure:
        print(f"benchmarks: {' '.join(str(failure).split())}", file=sys.stderr)
        return failure.code if isinstance(failure, Failure) else 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.suite",
        description="Time to target against tuned baselines; see the report for the protocol.",
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    listing = commands.add_parser("list", help="suites, workloads, arms, and what is finished")
    listing.set_defaults(run=_list)

    run = commands.add_parser(
        "run",
        help="tune, train and time the arms of a suite",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    run.set_defaults(run=_run)
    run.add_argument("suite", metavar="SUITE", help="smoke, small, ablation or gpu")
    run.add_argument("--workload", nargs="+", help="these alone (default: all of the suite)")
    run.add_argument("--arms", nargs="+", help="these alone (default: all of the workload)")
    run.add_argument("--seeds", type=whole(0), default=5, help="runs of each arm at its best rate")
    run.add_argument("--trials", type=whole(1), default=4, help="learning rates that an arm tries")
    run.add_argument(
        "--target-seeds", type=whole(0), default=10,
        help="runs of tuned AdamW that a workload's target is the median of, if it has none yet",
    )  # fmt: skip
    run.add_argument(
        "--time-budget", type=rate, metavar="MIN", help="minutes after which no run is started"
    )
    run.add_argument("--resume", action="store_true", help="go on with the results that are there")
    run.add_argument(
        "--stage", choices=("prove", "train", "time", "all"), default="all",
        help="training may share the machine with other work, taking the seconds may not",
    )  # fmt: skip
    run.add_argument("--rounds", type=whole(1), default=7, help="of all arms, when timing")
    run.add_argument("--data-dir", type=Path, help=f"folder with the data (default: ${ENV_VAR})")
    run.add_argument("--results", type=Path, help=argparse.SUPPRESS)

    report = commands.add_parser("report", help="write REPORT.md and its plots from the results")
    report.set_defaults(run=_report)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from benchmarks.suite.harness import folder
    from benchmarks.suite.workloads import read_workload, suites, workload_names

    for suite in suites():
        records = read_lines(folder(suite) / "runs.jsonl")
        print(f"{suite}")
        for name in workload_names(suite):
            workload = read_workload(suite, name)
            done = sum(r["workload"] == name for r in records)
            target = "no target yet"
            if workload.target is not None:
                target = f"target {workload.metric} {workload.target['value']:.4g}"
            print(f"  {name}: {workload.title}; {target}; {done} runs finished here")
            print(f"    arms: {', '.join(workload.arms)}")
    return 0


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks.suite import engagement, harness
    from benchmarks.suite.workloads import load, read_workload, suites, workload_names

    if arguments.suite not in suites():
        raise Failure(f"no suite {arguments.suite!r}; the suites are {', '.join(suites())}", 2)
    known = workload_names(arguments.suite)
    unknown = set(arguments.workload or ()) - set(known)
    if unknown:
        raise Failure(f"no workload {min(unknown)!r}; those of it are {', '.join(known)}", 2)
    chosen = [read_workload(arguments.suite, name) for name in arguments.workload or known]
    arms = {name for workload in chosen for name in workload.arms}
    unknown = set(arguments.arms or ()) - arms
    if unknown:
        raise Failure(f"no arm {min(unknown)!r}; the arms are {', '.join(sorted(arms))}", 2)
    results = arguments.results or harness.SUITES
    path = harness.folder(arguments.suite, results) / "runs.jsonl"
    names = {workload.name for workload in chosen}
    done = sum(r["workload"] in names for r in read_lines(path))
    train = arguments.stage in ("train", "all")
    if done and train and not arguments.resume:
        raise Failure(f"{path} holds {done} finished runs of it: add --resume to go on with them")
    deadline = float("inf")
    if arguments.time_budget is not None:
        deadline = time.monotonic() + 60 * arguments.time_budget
    plan = harness.Plan(
        None if arguments.arms is None else tuple(arguments.arms),
        arguments.seeds, arguments.trials, arguments.target_seeds, deadline, results,
    )  # fmt: skip

    try:
        for workload in chosen:
            load(workload)  # what is missing shows before anything is run
        if arguments.stage in ("prove", "all"):
            for workload in chosen:
                for name in tqdm(_arms(workload, plan), desc=f"{workload.name}: engagement"):
                    record = engagement.prove(workload, name)
                    harness.append(path.with_name("engagement.jsonl"), record)
        if train:
            total = sum(harness.runs_in(workload, plan) for workload in chosen)
            with tqdm(total=total, unit="run") as bar:
                for workload in chosen:
                    harness.train(workload, plan, bar)
        if arguments.stage in ("time", "all"):
            for workload in chosen:
                if time.monotonic() > deadline:
                    raise harness.OutOfTime
                record = harness.take_times(
                    workload, _arms(workload, plan), arguments.rounds, results
                )
                if record["void"]:
                    print(
                        f"{workload.name}: other processes used {record['foreign_cores']:.2f} "
                        "cores meanwhile, so these seconds are void; time it again on an idle "
                        "machine", file=sys.stderr,
                    )  # fmt: skip
    except harness.OutOfTime:
        print("the time budget is spent; go on with --resume")
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; go on with --resume")
        return 130
    except engagement.NotEngaged as error:
        raise Failure(str(error)) from error
    except (DataError, ValueError) as error:
        raise Failure(str(error)) from error
    for workload in chosen:
        print(f"\n{workload.name}: {workload.title}")
        print(_results(workload, _arms(workload, plan), path))
    print(f"\nsaved {path.parent}/", end="")
    # The smoke suite tells whether all runs, and is no result for a report
    print("" if arguments.suite == "smoke" else "; now: python -m benchmarks.suite report")
    return 0


def _results(workload: Workload, names: list[str], path: Path) -> str:
    """What is known of arms by now: their runs at the best rate, and seconds of their steps."""
    from benchmarks.suite import harness

    mine = [r for r in read_lines(path) if r["workload"] == workload.name]
    times = read_lines(path.with_name("times.jsonl"))
    seconds = {
        k: v for r in times if r["workload"] == workload.name for k, v in r["seconds"].items()
    }
    rows = [("arm", "rate", "seeds", f"best {workload.metric}, median", "ms a step")]
    for name in names:
        rate = harness.best_rate(workload, mine, name)
        runs = [r for r in mine if (r["arm"], r["track"], r["rate"]) == (name, "seeds", rate)]
        best = [harness.best(workload, r) for r in runs]
        found = f"{statistics.median(best):.4g}" if best else "-"
        taken = [f"{1e3 * statistics.median(v):.3g}" for v in seconds.get(name, {}).values()]
        rows.append(
            (
                name,
                "-" if rate is None else f"{rate:g}",
                str(len(runs)),
                found,
                " / ".join(taken) or "-",
            )
        )
    return "\n".join(map(str.rstrip, aligned(rows)))


def _arms(workload: object, plan: object) -> list[str]:
    return [n for n in workload.arms if plan.arms is None or n in plan.arms]  # type: ignore[attr-defined]


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks.suite import report
    from benchmarks.suite.workloads import FOLDER

    report.build(RESULTS, FOLDER, RESULTS / "REPORT.md")
    print(RESULTS / "REPORT.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
