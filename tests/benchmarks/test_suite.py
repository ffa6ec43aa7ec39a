"""The harness: records that survive a kill, arms that do what they say, the command."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks.records import read_lines
from benchmarks.suite import arms, harness, workloads
from benchmarks.suite.__main__ import main
from benchmarks.suite.workloads import Rows, Stream

ROOT = Path(__file__).parents[2]


@pytest.fixture
def frozen_nowhere(tmp_path, monkeypatch):
    """Workloads whose files may be written."""
    shutil.copytree(workloads.FOLDER, tmp_path / "workloads")
    monkeypatch.setattr(workloads, "FOLDER", tmp_path / "workloads")
    return tmp_path


def rows(n=20):
    return Rows({"x": np.arange(n), "y": np.arange(n)}, {}, {})


def test_a_stream_is_a_function_of_the_seed():
    one, other, third = Stream(rows(), 6, 3), Stream(rows(), 6, 3), Stream(rows(), 6, 4)
    a = [batch["x"].tolist() for batch in one.take(7)]
    b = [batch["x"].tolist() for batch in [*other.take(2), *other.take(5)]]
    assert a == b != [batch["x"].tolist() for batch in third.take(7)]
    assert one.per_epoch == 3 and len({x for batch in a[:3] for x in batch}) == 18


def test_a_pruned_stream_leaves_out_easy_rows_and_weighs_the_others():
    stream = Stream(rows(1000), 10, 0, pruned=0.75)
    for batch in stream.take(100):
        assert (batch["weight"] == 1).all()
        stream.record(batch["row"], np.where(batch["row"] < 800, 0.1, 9.0))
    kept = []
    while stream.epoch < 1 or stream.place + 10 <= len(stream.order):
        kept.append(stream.take(1)[0])
    seen = np.concatenate([batch["row"] for batch in kept])
    weights = np.concatenate([batch["weight"] for batch in kept])
    assert (weights[seen < 800] == 4).all() and (weights[seen >= 800] == 1).all()
    assert 190 <= (seen >= 800).sum() <= 200 and 150 < (seen < 800).sum() < 250
    # The rows that stay stand for all.
    assert abs(weights.sum() - 1000) < 150


def test_every_workload_names_arms_that_there_are():
    for suite in workloads.suites():
        for name in workloads.workload_names(suite):
            workload = workloads.read_workload(suite, name)
            found = arms.describe(workload)
            assert list(found) == list(workload.arms)
            assert all(a["family"] in arms.FAMILIES and a["text"] for a in found.values())
            assert workload.trials(2) == workload.grid[1:3] if len(workload.grid) == 4 else True
            assert workload.default_rate in workload.grid


def fake_run(workload, name, rate, seed):
    metric = 0.9 + rate + seed / 1e5
    return {
        "workload": workload.name, "arm": name, "rate": rate, "seed": seed, "failed": None,
        "evals": [{"step": 1, "metric": metric}],
    }  # fmt: skip


def test_train_tunes_freezes_and_resumes(frozen_nowhere, monkeypatch):
    workload, started = workloads.read_workload("smoke", "digits"), []

    def counted(workload, name, rate, seed):
        if len(started) == 9:
            raise KeyboardInterrupt
        started.append((name, rate, seed))
        return fake_run(workload, name, rate, seed)

    monkeypatch.setattr(harness, "run_arm", counted)
    plan = harness.Plan(
        arms=("adamw", "muon"), seeds=3, trials=2, target_seeds=4, results=frozen_nowhere
    )
    with pytest.raises(KeyboardInterrupt):
        harness.train(workload, plan)
    path = harness.folder("smoke", frozen_nowhere) / "runs.jsonl"
    assert len(read_lines(path)) == 9
    with path.open("a") as file:  # what a killed process may leave
        file.write('{"workload": "digits", "arm": "adamw", "ra')
    monkeypatch.setattr(harness, "run_arm", fake_run)
    workload = workloads.read_workload("smoke", "digits")
    frozen = workload.target
    assert frozen["value"] == pytest.approx(0.903015) and frozen["seeds"] == 4
    assert frozen["reachable"] == pytest.approx(0.903)
    harness.train(workload, plan)
    lines = read_lines(path)
    runs = [(r["arm"], r["rate"], r["seed"]) for r in lines]
    assert len(set(runs)) == len(runs) == 2 * 2 + 4 + 3
    assert {r["rate"] for r in lines if r["track"] == "seeds"} == {3e-3}  # the better of the grid
    assert workloads.read_workload("smoke", "digits").target == frozen
    with pytest.raises(ValueError, match="has a target already"):
        workloads.freeze(workload, {})
    late = harness.Plan(arms=("suffix",), deadline=time.monotonic() - 1, results=frozen_nowhere)
    with pytest.raises(harness.OutOfTime):
        harness.train(workload, late)


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["nosuch"], 2, "no suite 'nosuch'; the suites are ablation, gpu, small, smoke"),
        (["smoke", "--workload", "x"], 2, "no workload 'x'"),
        (["smoke", "--arms", "x"], 2, "no arm 'x'"),
    ],
)
def test_wrong_arguments_are_one_line(arguments, code, says, capsys):
    assert main(["run", *arguments]) == code
    error = capsys.readouterr().err
    assert says in error and error.count("\n") == 1


def command(*arguments, **options):
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return [sys.executable, "-m", "benchmarks.suite", *arguments], environment


@pytest.mark.once
def test_the_smoke_suite_is_killed_and_resumed(tmp_path):
    options = ["run", "smoke", "--workload", "digits", "--results", str(tmp_path), "--seeds", "1",
               "--trials", "1", "--target-seeds", "0", "--rounds", "2", "--arms", "adamw",
               "partial 0.5", "meprop 8%"]  # fmt: skip
    line, environment = command(*options)
    path = harness.folder("smoke", tmp_path) / "runs.jsonl"
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_lines(path)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_lines(path)
    assert len(done) >= 2

    refused = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert refused.returncode == 1 and "--resume" in refused.stderr
    resumed, _ = command(*options, "--resume")
    again = subprocess.run(resumed, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "best accuracy, median  ms a step\nadamw  " in again.stdout
    assert "benchmarks.suite report" not in again.stdout  # which leaves this suite out
    records = read_lines(path)
    assert records[: len(done)] == done and len(records) == 6
    for record in records:
        assert record["steps"] == 40 and len(record["evals"]) == 4 and record["failed"] is None
        assert record["evals"][-1]["phases"] == {"train": 40} and record["flops"]["train"] > 0
        assert record["versions"]["jax"] and record["revision"] and record["cores"]
        assert np.isfinite(record["test"]) and record["wall_seconds"] > 0
    shares = {r["arm"]: dict(r["where"]) for r in records if r["where"]}
    assert sum(shares["partial 0.5"].values()) == pytest.approx(1)
    proofs = {p["arm"]: p for p in read_lines(path.with_name("engagement.jsonl"))}
    assert proofs["adamw"]["unchanged"] < 0.01 < 0.5 < proofs["meprop 8%"]["unchanged"]
    assert all(p["full"] < 1e-6 for p in proofs.values())
    assert proofs["partial 0.5"]["flops"] < 0.9 * proofs["adamw"]["flops"]
    (times,) = read_lines(path.with_name("times.jsonl"))
    assert all(len(times["seconds"][arm]["train"]) == 2 for arm in proofs)
    assert all(min(times["split"][part]) > 0 for part in ("forward", "gradient", "step"))
    assert times["foreign_cores"] is None or times["void"] == (times["foreign_cores"] > 0.1)


@pytest.mark.once
def test_every_arm_of_the_smoke_suite_is_engaged(tmp_path):
    line, environment = command(
        "run", "smoke", "--workload", "digits", "--stage", "prove", "--results", str(tmp_path)
    )
    environment["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    done = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    path = harness.folder("smoke", tmp_path) / "engagement.jsonl"
    proofs = [json.loads(text) for text in path.read_text("utf-8").splitlines()]
    workload = workloads.read_workload("smoke", "digits")
    assert [p["arm"] for p in proofs] == list(workload.arms)
