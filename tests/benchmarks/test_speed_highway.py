"""The benchmark of Highway-BP runs, resumes, and says what its record says."""

import json
import sys

import pytest

from benchmarks.speed import highway

pytestmark = pytest.mark.once


def test_highway_runs_and_resumes(tmp_path, monkeypatch, capsys):
    small = [
        {"model": "gru", "width": 4, "batch": 1, "steps": 8},
        {"model": "transformer", "width": 8, "batch": 1, "steps": 2},
    ]
    monkeypatch.setattr(highway, "cases", lambda device, quick: small)
    monkeypatch.setattr(highway, "DEPTH", 3)
    monkeypatch.setattr(highway, "KS", (1,))
    monkeypatch.setattr(sys, "argv", ["highway", "--quick", "--out", str(tmp_path)])
    highway.main()
    assert "| transformer | 8 |" in capsys.readouterr().out
    path = tmp_path / "highway-cpu-quick.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".png").stat().st_size > 1000
    result, stack = record["results"]
    assert list(stack["arms"]) == ["autodiff", "highway, k=1"]
    arms = result["arms"]
    assert list(arms) == ["autodiff", "lean", "highway, k=1"]
    assert abs(arms["lean"]["cosine_to_exact"] - 1) < 1e-5
    assert 0.5 < arms["highway, k=1"]["cosine_to_exact"] < 1
    assert highway.markdown(record).count("\n| ") == 4
    # What is finished is not run again.
    monkeypatch.setattr(highway, "measure", lambda case, repeats: pytest.fail("run again"))
    highway.main()
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == [result, stack]


def test_cases_and_the_best():
    on_cpu, on_gpu = highway.cases("cpu", False), highway.cases("gpu", False)
    assert len(on_cpu) == 20 and {case["steps"] for case in on_cpu} == {256}
    assert {case["steps"] for case in on_gpu if case["model"] == "lstm"} == {256, 1024, 4096}
    arm = lambda ratio, cosine: {"times_faster_than_autodiff": ratio, "cosine_to_exact": cosine}  # noqa: E731
    arms = {"autodiff": arm(1.0, 1.0), "lean": arm(2.0, 1.0), "highway, k=1": arm(3.0, 0.9)}
    assert highway.best({"arms": arms}) == ("lean", 2.0)
    assert highway.best({"arms": arms}, 0.9) == ("highway, k=1", 3.0)
