"""The benchmark of Highway-BP runs, resumes, and says what its record says."""

import json
import sys

import pytest

from benchmarks import highway


def test_highway_runs_and_resumes(tmp_path, monkeypatch, capsys):
    small = [{"model": "gru", "width": 4, "batch": 1, "steps": 8}]
    missing = {"model": "transformer", "width": 4, "batch": 1, "steps": 2}
    monkeypatch.setattr(highway, "cases", lambda device, quick: [*small, missing])

    def stack_arms(case):
        raise ModuleNotFoundError("no highway_scan")

    monkeypatch.setattr(highway, "stack_arms", stack_arms)
    monkeypatch.setattr(highway, "KS", (1,))
    monkeypatch.setattr(sys, "argv", ["highway", "--quick", "--out", str(tmp_path)])
    highway.main()
    assert "left out" in capsys.readouterr().out
    path = tmp_path / "highway-cpu-quick.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert path.with_suffix(".png").stat().st_size > 1000
    (result,) = record["results"]
    arms = result["arms"]
    assert list(arms) == ["autodiff", "lean", "highway, k=1"]
    assert abs(arms["lean"]["cosine_to_exact"] - 1) < 1e-5
    assert 0.5 < arms["highway, k=1"]["cosine_to_exact"] < 1
    assert highway.readme_table(record).count("\n| ") == 3
    # What is finished is not run again.
    monkeypatch.setattr(highway, "measure", lambda case, repeats: pytest.fail("run again"))
    monkeypatch.setattr(highway, "cases", lambda device, quick: small)
    highway.main()
    assert json.loads(path.read_text(encoding="utf-8"))["results"] == [result]


def test_cases_and_the_best():
    on_cpu, on_gpu = highway.cases("cpu", False), highway.cases("gpu", False)
    assert len(on_cpu) == 18 and {case["steps"] for case in on_cpu} == {256}
    assert {case["steps"] for case in on_gpu if case["model"] == "lstm"} == {256, 1024, 4096}
    arm = lambda ratio, cosine: {"times_faster_than_autodiff": ratio, "cosine_to_exact": cosine}  # noqa: E731
    arms = {"autodiff": arm(1.0, 1.0), "lean": arm(2.0, 1.0), "highway, k=1": arm(3.0, 0.9)}
    assert highway.best({"arms": arms}) == ("lean", 2.0)
    assert highway.best({"arms": arms}, 0.9) == ("highway, k=1", 3.0)
