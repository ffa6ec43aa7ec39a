"""The README: its examples run as they stand, its figures are measured, it stays short."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
PRINTED = ["[0 0]", "True", "1 RNN changed", "layers/0     95.0%"]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert PRINTED[number] in printed


def test_there_are_examples():
    assert len(EXAMPLES) == len(PRINTED)
    assert all(len(example.strip().splitlines()) <= 20 for example in EXAMPLES)


def test_figures_are_those_of_the_report():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    figures = {figure for row in rows for figure in re.findall(r"[-+]?\d+\.\d+x?", row)}
    report = (ROOT / "benchmarks/results/REPORT.md").read_text(encoding="utf-8")
    words = set(re.findall(r"[-+]?\d+\.\d+x?", report))
    assert len(rows) == 6 and len(figures) > 10
    assert figures - words == set()


def test_it_is_short_and_leads_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target
