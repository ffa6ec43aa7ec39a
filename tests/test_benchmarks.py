"""Benchmarks run, and what the README shows is what their results say."""

import json
import subprocess
import sys
from pathlib import Path

from benchmarks import transform_overhead

ROOT = Path(__file__).parent.parent


def test_readme_shows_the_committed_result():
    path = ROOT / "benchmarks" / "results" / "transform_overhead-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert transform_overhead.readme_table(record) in (ROOT / "README.md").read_text("utf-8")
    assert record["leaves"] == 199 and record["parameters"] == 109_482_240


def test_transform_overhead_runs_on_tiny_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transform_overhead,
        "bert_base",
        lambda: {"Dense_0/kernel": (8, 8), "Dense_0/bias": (8,), "Dense_1/kernel": (8, 2)},
    )
    monkeypatch.setattr(
        sys, "argv", ["transform_overhead", "--repeats", "1", "--out", str(tmp_path)]
    )
    transform_overhead.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    for results in record["results"].values():
        assert all(r["ratio"] > 0 and len(r["seconds"]) == 1 for r in results.values())


def test_its_options_are_explained():
    command = [sys.executable, "-m", "benchmarks.transform_overhead", "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert shown.returncode == 0 and "--repeats" in shown.stdout
