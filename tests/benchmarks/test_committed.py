"""What is committed says what the committed records say: the report, the README, the notebook.

Apart from test_report.py, whose suite is an invented one.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suite import harness, report, statistics

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_the_committed_report_is_that_of_the_committed_records():
    committed = (RESULTS / "REPORT.md").read_text("utf-8")
    for name in re.findall(r"\(report/([^)]+)\)", committed):
        assert (RESULTS / "report" / name).exists()
    assert re.findall(r"\b(?:bars?|met|missed|goals?)\b", committed, re.IGNORECASE) == []
    assert report.report_text(RESULTS, harness.EVIDENCE) == committed, (
        "run `python -m benchmarks.suite report`"
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "(benchmarks/results/report/small-cpu.png)" in readme
    assert [line for line in report.readme_lines(harness.EVIDENCE) if line not in readme] == []
    figures = re.findall(r"≥ \S+x \([^)]*\)", readme)
    done = {
        s.workload.name: s for s in report.standings("small", harness.EVIDENCE / "small-cpu")[0]
    }
    cached, tuned = "suffix, cached", done["sst2"]
    there = (runs := len(tuned.losses(cached))) - tuned.missed(cached, tuned.workload.within)
    assert f"its loss is within 2 % of AdamW's on {there} of {runs} seeds" in readme
    assert (
        report.shown(done["mnist-mlp"], "sparse 80%") is None
    )  # "not sooner with an MLP on MNIST"
    assert len(figures) > 5 and [found for found in figures if found not in committed] == []


def test_layers_by_priority_beside_layers_at_random():
    more = less = 0
    done = report.standings("small", harness.EVIDENCE / "small-cpu")[0]
    both = [standing for standing in done if "partial 0.5" in standing.own]
    for standing in both:
        tests = [standing.tests(standing.own[name]) for name in ("random 0.5", "partial 0.5")]
        low, high = statistics.difference(*tests).interval
        more, less = more + (low > 0), less + (high < 0)
        over = report.shown(standing, "partial 0.5")
        assert over is None or over.interval[0] <= 1  # "sooner than AdamW on none"
    said = f"at the same cost on {more} of {len(both)} tasks, less accurate on {less}, and sooner"
    assert said in (ROOT / "README.md").read_text("utf-8")
    number = {3: "three", 1: "one", 5: "five"}
    said = f"accurate on {number[more]} tasks of {number[len(both)]}, less on {number[less]}, and"
    assert said in (ROOT / "docs/guides/my-cnn.md").read_text("utf-8")


def test_the_notebook_finds_in_the_records_what_the_report_says():
    path = ROOT / "notebooks/05_reading_the_evidence.ipynb"
    cells = json.loads(path.read_text("utf-8"))["cells"]
    sources = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"][1:]
    scope = {}
    exec("\n".join(sources).replace("plt.show()", "plt.close()"), scope)
    compared = 0
    for standing in report.standings("small", harness.EVIDENCE / "small-cpu")[0]:
        lines = "\n".join(report.page(standing, "")).splitlines()
        record = scope["records"][standing.workload.name]
        for own in record["runs"]:
            ratios = scope["ratios_over_base"](record, own, say=str)
            if own[0] == "adamw" or len(ratios) < 3:
                continue
            logs = np.log(list(ratios.values()))
            low, high = np.exp(scope["bootstrap"](logs)[0])
            said = f"{np.exp(logs.mean()):.2f}x ({low:.2f} to {high:.2f})"
            assert said in next(x for x in lines if x.startswith(f"| {own[0]} | ")), own
            compared += 1
    assert compared > 20
