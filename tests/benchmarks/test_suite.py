"""The harness: records that survive a kill, arms that do what they say, the command."""

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from benchmarks.records import read_lines
from benchmarks.suite import arms, harness, runners, statistics, workloads
from benchmarks.suite.__main__ import main
from benchmarks.suite.workloads import Rows, Stream
from tests.benchmarks import invented

ROOT = Path(__file__).parents[2]


def rows(n=20):
    return Rows({"x": np.arange(n), "y": np.arange(n)}, {}, {}, {})


def test_a_stream_is_a_function_of_the_seed():
    one, other, third = Stream(rows(), 6, 3), Stream(rows(), 6, 3), Stream(rows(), 6, 4)
    a = [batch["x"].tolist() for batch in one.take(7)]
    b = [batch["x"].tolist() for batch in [*other.take(2), *other.take(5)]]
    assert a == b != [batch["x"].tolist() for batch in third.take(7)]
    assert one.per_epoch == 3 and len({x for batch in a[:3] for x in batch}) == 18


def test_every_workload_names_arms_that_there_are():
    for suite in workloads.suites():
        for name in workloads.workload_names(suite):
            workload = workloads.read_workload(suite, name)
            for arm in workload.all_arms:
                found = arms.arm_of(arm)
                assert found.family in arms.FAMILIES and found.text
            assert workload.arms[0] == arms.BASE
            assert not set(workload.arms) & set(workload.recipes)
            if suite == "small":  # the protocol, and its one exception
                assert workload.seeds == 5 and len(workload.batches) == 3 - workload.fine_tuning
                assert workload.evaluations == (12 if workload.fine_tuning else 40)


def test_a_mask_keeps_no_update_against_the_gradient():
    inner = optax.trace(0.9)
    tx = runners.cautious(inner)
    first, second = jnp.array([1.0, 1.0, -2.0, 0.0]), jnp.array([-0.5, 1.0, 3.0, 1.0])
    state = tx.init(first)
    _, state = tx.update(first, state)
    updates, _ = tx.update(second, state)
    # Momentum is [0.4, 1.9, 1.2, 1]; the first entry is against its gradient, and three of four
    # remain.
    np.testing.assert_allclose(updates, np.array([0, 1.9, 1.2, 1.0]) * 4 / 3, rtol=5e-6)


def test_the_pace_is_that_of_a_schedule_of_numbers():
    given = [float(runners.pace(jnp.int32(t), jnp.int32(40))) for t in range(41)]
    first = 2
    for t, value in enumerate(given):
        cosine = 0.5 * (1 + np.cos(np.pi * np.clip((t - first) / (40 - first), 0, 1)))
        assert value == pytest.approx(min((t + 1) / first, cosine), abs=1e-6)
    tx = runners.paced(0.5, 40)
    updates, state = tx.update(jnp.ones(2), tx.init(None))
    np.testing.assert_allclose(updates, 0.25)
    assert int(state.count) == 1


def test_seconds_are_steps_of_each_phase():
    assert harness.steps_in(2.0, {"train": 0.1}, 7) == 20
    assert harness.steps_in(1e-9, {"train": 0.1}, 7) == 1
    cached = {"filling": 0.2, "cached": 0.05}
    assert harness.steps_in(1.0, cached, 7) == 5  # within the first epoch
    assert harness.steps_in(2.4, cached, 7) == 7 + 20
    assert harness.phases("suffix, cached", 7, 27) == {"filling": 7, "cached": 20}


def test_training_tunes_freezes_shortens_and_resumes(tmp_path, monkeypatch):
    started = []

    def counted(*arguments):
        if len(started) == 40:
            raise KeyboardInterrupt
        started.append(arguments[1:])
        return invented.fake_run(*arguments)

    monkeypatch.setattr(workloads, "FOLDER", tmp_path / "workloads")
    invented.write_workloads(tmp_path / "workloads")
    monkeypatch.setattr(harness, "run_arm", counted)
    workload, path = workloads.read_workload("small", "plain"), tmp_path / "records"
    with pytest.raises(ValueError, match="plain has no seconds yet"):
        harness.Training(workload, path).train()
    harness.add_line(path / "times.jsonl", invented.times(workload, void=True))
    with pytest.raises(ValueError, match="the seconds of plain are void"):
        harness.Training(workload, path).train()
    harness.add_line(path / "times.jsonl", invented.times(workload))
    harness.add_line(path / "times.jsonl", invented.times(workload, void=True))  # the other stays
    with pytest.raises(KeyboardInterrupt):
        harness.Training(workload, path).train()
    assert len(read_lines(path / "runs.jsonl")) == 40
    with (path / "runs.jsonl").open("a") as file:  # what a killed process may leave
        file.write('{"workload": "plain", "arm": "adamw", "ra')
    assert harness.finished(workload, path) is None
    monkeypatch.setattr(harness, "run_arm", invented.fake_run)
    settings = harness.Training(workload, path).train()
    lines = read_lines(path / "runs.jsonl")
    keys = [tuple(r[k] for k in ("arm", "batch", "rate", "share", "seed", "track")) for r in lines]
    assert len(set(keys)) == len(keys)
    # Every rate is found, also that beyond the first three; batch 16 is the best for all.
    assert {own.batch for some in settings.values() for own in some} == {16}
    assert settings["sparse 90%"][0].rate == 3.162e-2 and settings["nadam"][0].rate == 1.778e-3
    # Four times as fast: a quarter of the budget, a rung for the luck of seeds, and one more.
    assert settings["sparse 90%"][0].share == pytest.approx(2**-1.5, abs=1e-4)
    assert settings["muon"][0].share == 1 and "lean" not in settings  # the slower recipe
    assert "cautious" not in settings  # it diverges throughout
    [target] = read_lines(path / "targets.jsonl")
    base = [r for r in lines if r["arm"] == "adamw" and r["track"] == "seeds"]
    assert target["value"] == np.median([harness.best(r) for r in base]) and len(base) == 10
    # Ten seeds of the recipe, five of the others.
    seeds = [r["arm"] for r in lines if r["track"] == "seeds"]
    assert seeds.count("sparse 90%") == 10 and seeds.count("muon") == 5
    # What is finished is not run again, and the target stays.
    monkeypatch.setattr(harness, "run_arm", None)
    assert harness.Training(workload, path).train() == settings
    assert harness.finished(workload, path) == settings
    assert read_lines(path / "targets.jsonl") == [target]
    late = harness.Training(workload, tmp_path / "other", deadline=time.monotonic() - 1)
    with pytest.raises(harness.OutOfTime):
        late.train()


def test_tuning_is_on_rows_of_its_own_where_weights_are_pretrained(tmp_path, monkeypatch):
    path = invented.write_suite(tmp_path, monkeypatch)
    targets = {r["workload"]: r for r in read_lines(path / "targets.jsonl")}
    assert targets["plain"]["tuning"] == targets["plain"]["value"]
    assert targets["tuned"]["tuning"] == pytest.approx(targets["tuned"]["value"] + 0.1, abs=0.02)
    rows = workloads.load(workloads.read_workload("small", "tuned"))[0]
    whole = workloads.load(workloads.read_workload("small", "plain"))[0]
    assert len(rows.tuning["y"]) == 100 and whole.tuning is whole.validation
    assert len(rows.train["y"]) == len(whole.train["y"]) - 100


def test_the_estimate_bounds_what_is_run(tmp_path, monkeypatch):
    path = invented.write_suite(tmp_path, monkeypatch)
    for name in invented.WORKLOADS:
        workload = workloads.read_workload("small", name)
        times = harness.latest_times(path, name)
        runs, hours = harness.estimate(workload, times)
        lines = [r for r in read_lines(path / "runs.jsonl") if r["workload"] == name]
        assert 0.4 * runs < len(lines) <= runs
        spent = sum(
            statistics.clock(r, harness.seconds_of(times, r["arm"], r["batch"]))[-1]
            + 0.1 * len(r["evals"])
            for r in lines
        )
        assert 0.3 * hours < spent / 3600 < hours


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
    line, environment = command(
        "run", "smoke", "--workload", "digits", "--results", str(tmp_path), "--rounds", "2",
        "--arms", "adamw", "partial 0.5", "meprop 8%",
    )  # fmt: skip
    path = harness.folder("smoke", tmp_path) / "runs.jsonl"
    process = subprocess.Popen(line, env=environment, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 200
    while len(read_lines(path)) < 2 and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    done = read_lines(path)
    assert len(done) >= 2

    again = subprocess.run(line, env=environment, capture_output=True, text=True)
    assert again.returncode == 0, again.stderr
    assert "seeds  lowest loss, median\nadamw  " in again.stdout
    assert "benchmarks.suite report" not in again.stdout  # which leaves this suite out
    records = read_lines(path)
    assert records[: len(done)] == done
    for record in records:
        points = record["track"] == "seeds" and 4 or harness.TUNING_EVALUATIONS
        assert len(record["evals"]) == min(points, record["steps"]) and record["failed"] is None
        assert record["evals"][-1]["phases"] == {"train": record["steps"]}
        assert record["flops"]["train"] > 0 and record["wall_seconds"] > 0
        assert record["versions"]["jax"] and record["revision"] and record["cores"]
        assert record["track"] == "tune" or np.isfinite(record["test"]["loss"])
    shares = {r["arm"]: dict(r["where"]) for r in records if r["where"]}
    assert sum(shares["partial 0.5"].values()) == pytest.approx(1)
    proofs = {p["arm"]: p for p in read_lines(path.with_name("engagement.jsonl"))}
    assert proofs["adamw"]["unchanged"] < 0.01 < 0.5 < proofs["meprop 8%"]["unchanged"]
    assert all(p["full"] < 1e-6 for p in proofs.values())
    assert proofs["partial 0.5"]["flops"] < 0.9 * proofs["adamw"]["flops"]
    (times,) = read_lines(path.with_name("times.jsonl"))
    for arm in proofs:
        assert len(times["seconds"][arm]["32"]["train"]) == 2
        assert times["peak_bytes"][arm]["32"]["train"] > 0
    assert all(min(times["split"][part]) > 0 for part in ("forward", "gradient", "step"))
    busy, uneven = (times["foreign_cores"] or 0) > 0.1, times["spread"] > 1.25
    assert times["void"] == (busy or uneven)
    [target] = read_lines(path.with_name("targets.jsonl"))
    assert target["seeds"] == 2 and target["value"] > 0
    listed, _ = command("list", "--results", str(tmp_path))
    listed = subprocess.run(listed, env=environment, capture_output=True, text=True)
    assert re.search(rf"digits +\d+ +0\.\d.* {len(records)} +{target['value']:.4g}", listed.stdout)


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
    assert [p["arm"] for p in proofs] == [a for a in workload.all_arms if a != arms.SHORTER]


def test_an_ablation_takes_the_same_steps_of_every_arm_and_no_seconds(tmp_path, monkeypatch):
    steps, plain = set(), workloads.read_workload("ablation", "digits")
    workload = dataclasses.replace(
        plain, arms=("adamw", "default", "in turn"), seeds=3, batches=(16,)
    )

    def counted(*arguments):
        steps.add(arguments[5])
        return invented.fake_run(*arguments)

    monkeypatch.setattr(harness, "run_arm", counted)
    settings = harness.Training(workload, tmp_path).train()
    assert settings.keys() == {*workload.arms} and steps == {workload.steps}
    assert all(own.share == 1 for [own] in settings.values())
    assert not (tmp_path / "targets.jsonl").exists()
    # The optimizer inside takes the place of AdamW.
    params = {"a": jnp.ones((2, 2)), "b": jnp.ones(2)}
    moved = {}
    for name in ("uniform", "uniform, b1 0.8", "uniform, nadam inside"):
        tx = runners.transformation(arms.arm_of(name), 0.1, 100)
        state = tx.init(params)
        for sign in (1.0, 1.0, -0.3, 0.1):
            updates, state = tx.update(jax.tree.map(lambda x, s=sign: s * x, params), state, params)
        moved[name] = float(updates["b"][0])
    assert len(set(moved.values())) == 3
