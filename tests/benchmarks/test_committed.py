"""What is committed says what the committed records say: the report, the README, the notebook.

Apart from test_report.py, whose suite is an invented one.
"""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from benchmarks.suite import harness, report

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


def test_the_committed_report_is_that_of_the_committed_records():
    committed = (RESULTS / "REPORT.md").read_text("utf-8")
    for name in re.findall(r"\(report/([^)]+)\)", committed):
        assert (RESULTS / "report" / name).exists()
    assert re.findall(r"\b(?:bars?|met|missed|goals?)\b", committed, re.IGNORECASE) == []
    if not report.stands(harness.EVIDENCE):
        assert "First edition" in committed.splitlines()[2]
        return
    assert report.report_text(RESULTS, harness.EVIDENCE) == committed, (
        "run `python -m benchmarks.suite report`"
    )
    readme = (ROOT / "README.md").read_text("utf-8")
    assert "(benchmarks/results/report/small-cpu.png)" in readme
    assert [line for line in report.readme_lines(harness.EVIDENCE) if line not in readme] == []


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
