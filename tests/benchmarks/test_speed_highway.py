"""The benchmark of Highway-BP runs, resumes, and says what its record says."""

import json
import sys

import numpy as np
import pytest
from flax import nnx

from benchmarks import highway, highway_char
from priorityprop_jax.cli import tasks

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
    assert highway.readme_table(record).count("\n| ") == 4
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


def test_characters_are_learned_on_tiny_data(monkeypatch):
    text = (np.cumsum(np.random.default_rng(0).integers(0, 2, 500)) % 5).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(text, 9)
    arrays = {"x": windows[:, :-1], "y": windows[:, 1:]}

    def load(name, *, seed):
        train = tasks.ArrayLoader(arrays, 16, shuffle=True, seed=seed, drop_last=True)
        return tasks.Task(
            name=name, model=tasks.CharRNN(5, cell="gru", width=8, rngs=nnx.Rngs(seed)),
            loss_fn=tasks.cross_entropy, train_data=train,
            eval_data=tasks.ArrayLoader(arrays, 16), test_data=None, batch_size=16,
            learning_rate=1e-2, epochs=1,
        )  # fmt: skip

    for name, value in {"load_task": load, "EVERY": 4, "DEPTH": 3, "WIDTH": 8}.items():
        monkeypatch.setattr(highway_char, name, value)
    runs = []
    for arm in ("GRU, plain", "GRU, lean", "GRU, 1 round", "transformer, 1 round"):
        found = highway_char.train(highway_char.ARMS[arm], 8, 0)
        assert list(found["validation"]) == ["4", "8"] and found["stopped_steps"] <= 8
        runs.append({"arm": arm, "seed": 0, "steps": 8} | found)
    plain, lean = (run["validation"]["8"] for run in runs[:2])
    assert abs(plain - lean) < 1e-3 and plain < np.log(5)
    rows = {row["arm"]: row for row in highway_char.summary(runs)}
    assert rows["GRU, plain"]["gap"] == 0
    assert rows["GRU, lean"]["gap"] == pytest.approx(lean - plain)
    shown = highway_char.readme_table({"summary": list(rows.values())})
    assert shown.count("\n| GRU") == 3
