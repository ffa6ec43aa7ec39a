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

import jax

from benchmarks.records import RESULTS, add_line, read_lines
from priorityprop_jax.cli.main import ended, keep_programs
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
    if arguments.run is not _report:
        # Runs of one arm differ in numbers alone; those of a `Trainer` compile each time anew.
        keep_programs()
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.05)
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
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--results", type=Path, help=argparse.SUPPRESS)

    listing = commands.add_parser(
        "list",
        parents=[shared],
        help="suites, workloads, what is finished, and hours that it takes",
    )
    listing.set_defaults(run=_list)

    run = commands.add_parser(
        "run", parents=[shared],
        help="time, tune and train the arms of a suite, or go on with it",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    run.set_defaults(run=_run)
    run.add_argument("suite", metavar="SUITE", help="smoke, small, ablation or gpu")
    run.add_argument("--workload", nargs="+", help="these alone (default: all of the suite)")
    run.add_argument("--arms", nargs="+", help="these alone (default: all of the workload)")
    run.add_argument(
        "--time-budget", type=rate, metavar="MIN", help="minutes after which no run is started"
    )
    run.add_argument(
        "--stage", choices=("prove", "time", "train", "all"), default="all",
        help="training may share the machine with other work, taking the seconds may not; what "
        "has its seconds is not timed again but by --stage time",
    )  # fmt: skip
    run.add_argument("--rounds", type=whole(1), default=7, help="of all arms, when timing")
    run.add_argument("--data-dir", type=Path, help=f"folder with the data (default: ${ENV_VAR})")

    again = commands.add_parser(
        "rerun", parents=[shared],
        help="repeat some arms of a finished suite on other seeds and compare",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )  # fmt: skip
    again.set_defaults(run=_rerun)
    again.add_argument("suite", metavar="SUITE", help="whose records are there")
    again.add_argument(
        "--cells", type=whole(1), default=3, help="arms of workloads, drawn at random"
    )
    again.add_argument("--draw", type=whole(0), default=0, help="the number that draws them")

    report = commands.add_parser(
        "report", parents=[shared], help="write REPORT.md and its plots from the records"
    )
    report.add_argument(
        "--preview", type=Path, metavar="FOLDER",
        help="write it there, of the workloads that are finished (default: in its place, where "
        "all are)",
    )  # fmt: skip
    report.set_defaults(run=_report)
    return parser


def _list(arguments: argparse.Namespace) -> int:
    from benchmarks.suite import harness
    from benchmarks.suite.workloads import read_workload, suites, workload_names

    for suite in suites():
        path, hours = harness.folder(suite, arguments.results or harness.EVIDENCE), 0.0
        records = read_lines(path / "runs.jsonl")
        targets = {r["workload"]: r["value"] for r in read_lines(path / "targets.jsonl")}
        rows = [("workload", "runs at most", "hours", "runs here", "target")]
        for name in workload_names(suite):
            workload, times = read_workload(suite, name), harness.latest_times(path, name)
            done = sum(r["workload"] == name for r in records)
            expected = ("?", "not timed yet")
            if times is not None:
                runs, own = harness.estimate(workload, times)
                hours += own
                expected = (str(runs), f"{own:.1f}{' (void times)' * times['void']}")
            target = f"{targets[name]:.4g}" if name in targets else "-"
            rows.append((name, *expected, str(done), target))
        print(f"{suite}: {hours:.1f} hours" if hours else suite)
        print("\n".join(f"  {line.rstrip()}" for line in aligned(rows)))
    return 0


def _chosen(arguments: argparse.Namespace) -> list[Workload]:
    from benchmarks.suite.workloads import read_workload, suites, workload_names

    if arguments.suite not in suites():
        raise Failure(f"no suite {arguments.suite!r}; the suites are {', '.join(suites())}", 2)
    known = workload_names(arguments.suite)
    names = getattr(arguments, "workload", None) or known
    unknown = set(names) - set(known)
    if unknown:
        raise Failure(f"no workload {min(unknown)!r}; those of it are {', '.join(known)}", 2)
    return [read_workload(arguments.suite, name) for name in names]


def _run(arguments: argparse.Namespace) -> int:
    from tqdm import tqdm

    from benchmarks.suite import engagement, harness
    from benchmarks.suite.workloads import load

    chosen = _chosen(arguments)
    arms = {name for workload in chosen for name in workload.all_arms}
    unknown = set(arguments.arms or ()) - arms
    if unknown:
        raise Failure(f"no arm {min(unknown)!r}; the arms are {', '.join(sorted(arms))}", 2)
    path = harness.folder(arguments.suite, arguments.results or harness.EVIDENCE)
    deadline = float("inf")
    if arguments.time_budget is not None:
        deadline = time.monotonic() + 60 * arguments.time_budget

    def mine(workload: Workload) -> list[str]:
        names = [n for n in workload.all_arms if not arguments.arms or n in arguments.arms]
        return [n for n in names if n != harness.SHORTER]  # its steps are AdamW's

    def checked() -> None:
        if time.monotonic() > deadline:
            raise harness.OutOfTime

    try:
        for workload in chosen:
            load(workload)  # what is missing shows before anything is run
        for workload in chosen if arguments.stage in ("prove", "all") else ():
            proved = read_lines(path / "engagement.jsonl")
            done = {r["arm"] for r in proved if r["workload"] == workload.name}
            left = [name for name in mine(workload) if name not in done]
            for name in tqdm(left, desc=f"{workload.name}: engagement", disable=not left):
                checked()
                add_line(path / "engagement.jsonl", engagement.prove(workload, name))
        for workload in chosen if arguments.stage in ("time", "all") else ():
            if workload.by_steps:
                continue
            known = harness.latest_times(path, workload.name)
            if arguments.stage == "all" and known and set(mine(workload)) <= set(known["seconds"]):
                continue
            checked()
            record = harness.take_times(workload, mine(workload), arguments.rounds)
            add_line(path / "times.jsonl", record)
            if record["void"]:
                print(
                    f"{workload.name}: other processes used {record['foreign_cores'] or 0:.2f} "
                    f"cores meanwhile, and AdamW's rounds took {record['spread']:.2f} of the "
                    "fastest, so these seconds are void, and no report is made from them: "
                    "`--stage time` takes them again on an idle machine", file=sys.stderr,
                )  # fmt: skip
        for workload in chosen if arguments.stage in ("train", "all") else ():
            with tqdm(unit="run") as bar:
                own = harness.Training(workload, path, arguments.arms, deadline, bar).train()
            print(f"\n{workload.name}: {workload.title}")
            print(_results(workload, own, path))
    except harness.OutOfTime:
        print("the time budget is spent; the same command goes on")
        return 0
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on")
        return 130
    except engagement.NotEngaged as error:
        raise Failure(str(error)) from error
    except (DataError, ValueError) as error:
        raise Failure(str(error)) from error
    print(f"\nsaved {path}/", end="")
    # The smoke suite tells whether all runs, and is no result for a report
    print("" if arguments.suite == "smoke" else "; now: python -m benchmarks.suite report")
    return 0


def _results(workload: Workload, settings: dict, path: Path) -> str:
    """What is known of arms by now: their settings, and the losses of their runs on seeds."""
    from benchmarks.suite import harness

    known = [r for r in read_lines(path / "runs.jsonl") if r["workload"] == workload.name]
    rows = [("arm", "batch", "rate", "of the budget", "seeds", "lowest loss, median")]
    for name, several in settings.items():
        for own in several:
            key = {"arm": name, "batch": own.batch, "rate": own.rate, "share": own.share}
            key["track"] = "seeds"
            found = [harness.best(r) for r in known if key.items() <= r.items()]
            loss = f"{statistics.median(found):.4g}" if found else "-"
            cells = (str(own.batch), f"{own.rate:g}", f"{own.share:g}", str(len(found)), loss)
            rows.append((name, *cells))
    return "\n".join(map(str.rstrip, aligned(rows)))


def _rerun(arguments: argparse.Namespace) -> int:
    from benchmarks.suite import harness, rerun

    path = harness.folder(arguments.suite, arguments.results or harness.EVIDENCE)
    try:
        text, same = rerun.repeat(_chosen(arguments), path, arguments.cells, arguments.draw)
    except (DataError, ValueError) as error:
        raise Failure(str(error)) from error
    print(text)
    return 0 if same else 1


def _report(arguments: argparse.Namespace) -> int:
    from benchmarks.suite import report
    from benchmarks.suite.harness import EVIDENCE

    print(report.build(RESULTS, arguments.results or EVIDENCE, arguments.preview))
    return 0


if __name__ == "__main__":
    sys.exit(main())
