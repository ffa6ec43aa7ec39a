"""Benchmarks run, and what the README shows is what their results say."""

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest

from benchmarks import (
    finetune_sst2,
    highway,
    highway_char,
    meprop_lstm,
    meprop_mlp,
    meprop_speed,
    meprop_tagging,
    records,
    sparse_layers,
    sparse_mlp,
    transform_overhead,
)
from priorityprop_jax import sparse_backend
from priorityprop_jax.cli.tasks import ArrayLoader

pytestmark = pytest.mark.once

ROOT = Path(__file__).parent.parent


def test_readme_shows_the_committed_result():
    path = ROOT / "benchmarks" / "results" / "transform_overhead-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert transform_overhead.readme_table(record) in (ROOT / "README.md").read_text("utf-8")
    assert record["leaves"] == 199 and record["parameters"] == 109_482_240


def test_readme_shows_the_committed_fine_tuning():
    path = ROOT / "benchmarks" / "results" / "finetune_sst2-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert finetune_sst2.readme_table(record) in (ROOT / "README.md").read_text("utf-8")
    # The summary is that of the committed runs and times.
    times = json.loads(path.with_name("finetune_sst2-cpu-times.json").read_text("utf-8"))
    runs = records.read_lines(path.with_suffix(".jsonl"))
    again = finetune_sst2.summary(runs, times["seconds"])
    assert json.loads(json.dumps(again)) == record["summary"]


@pytest.mark.parametrize(
    "benchmark",
    [meprop_speed, meprop_lstm, meprop_mlp, meprop_tagging, sparse_layers, sparse_mlp],
)
def test_readme_shows_the_committed_results(benchmark):
    name = benchmark.__name__.rpartition(".")[2]
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert benchmark.readme_table(record) in (ROOT / "README.md").read_text("utf-8")
    runs = path.with_suffix(".jsonl")
    if runs.exists():  # the summary is that of the committed runs and times
        times = json.loads(path.with_name(f"{name}-cpu-times.json").read_text("utf-8"))
        again = benchmark.summary(records.read_lines(runs), times["seconds"])
        assert json.loads(json.dumps(again)) == record["summary"]


@pytest.mark.parametrize("benchmark", [highway, highway_char])
def test_readme_shows_the_committed_highway(benchmark):
    name = benchmark.__name__.rpartition(".")[2]
    path = ROOT / "benchmarks" / "results" / f"{name}-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert benchmark.readme_table(record) in (ROOT / "README.md").read_text("utf-8")
    runs = records.read_lines(path.with_suffix(".jsonl"))
    if benchmark is highway:
        assert {highway.key_of(run) for run in runs} >= set(map(highway.key_of, record["results"]))
    else:
        again = json.loads(json.dumps(highway_char.summary(runs)))
        assert again == record["summary"]


def test_meprop_speed_runs_on_tiny_shapes(tmp_path, monkeypatch, capsys):
    options = ["--repeats", "2", "--small", "--fractions", "0.1", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["meprop_speed", *options])
    meprop_speed.main()
    (path,) = tmp_path.glob("*.json")
    layer, step = json.loads(path.read_text())["cases"]
    for case in (layer, step):
        assert set(case["results"]) == {"dense", *(f"{arm} 0.1" for arm in meprop_speed.ARMS)}
    # By rows it writes k rows of the kernel, else the whole of it.
    assert layer["results"]["rows 0.1"]["flops_ratio"] > 7
    assert "| 10% | 10.0x |" in capsys.readouterr().out


def test_meprop_lstm_runs_on_tiny_shapes():
    results = meprop_lstm.measure(1, 8, 6, 3, 2, (2, 8))
    assert set(results) == {"autodiff", "dense", "meprop, k=2", "meprop, k=8", "swapped, k=2"}
    assert all(kinds["backward"]["median_seconds"] > 0 for kinds in results.values())


def test_time_to_target_of_meprop_with_known_answers():
    def runs(arm, rate, validation):
        return [
            {"width": 500, "arm": arm, "rate": r, "seed": seed, "epochs": 3,
             "validation": v if r == rate else [0.1], "test": v[-1]}
            for r in meprop_mlp.RATES
            for seed, v in enumerate(validation)
            if seed == 0 or r == rate
        ]  # fmt: skip

    rate = meprop_mlp.RATES[1]
    found = meprop_mlp.summary(
        runs("dense", rate, [[0.9], [0.5, 0.8, 0.9], [0.5, 0.9, 0.8], [0.4, 0.4, 0.9]])
        + runs("unified 20", rate, [[0.8], [0.8, 0.9, 0.9], [0.8, 0.8, 0.8], [0.9, 0.9, 0.9]]),
        {"500": {"dense": {"None": 0.004}, "unified 20": {"20": 0.002}}},
    )["500"]
    dense, ours = found
    assert dense["rate"] == rate and dense["reached"] == 3 and dense["speedup"] == 1.0
    assert ours["reached"] == 2 and ours["pairs"] == 2 and ours["interval"] is None
    # Seed 1: 3 epochs at 4 ms against 2 at 2 ms; seed 3: 3 against 1.
    assert ours["speedup"] == pytest.approx((3 * 6) ** 0.5)
    assert ours["difference"] == pytest.approx(0.0)


def test_transform_overhead_runs_on_tiny_shapes(tmp_path, monkeypatch):
    monkeypatch.setattr(
        transform_overhead,
        "bert_base",
        lambda: {"Dense_0/kernel": (8, 8), "Dense_0/bias": (8,), "Dense_1/kernel": (8, 2)},
    )
    arms = transform_overhead.arms
    monkeypatch.setattr(
        transform_overhead, "arms", lambda adam: dict([*arms(adam).items()][:: len(arms(adam)) - 1])
    )
    monkeypatch.setattr(
        sys, "argv", ["transform_overhead", "--repeats", "1", "--out", str(tmp_path)]
    )
    transform_overhead.main()
    (path,) = tmp_path.glob("*.json")
    record = json.loads(path.read_text())
    for results in record["results"].values():
        assert all(r["ratio"] > 0 and len(r["seconds"]) == 1 for r in results.values())


def test_its_options_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transform_overhead", "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "benchmarks" / "transform_overhead.py"), run_name="__main__")
    assert ended.value.code == 0 and "--repeats" in capsys.readouterr().out


def _run_record(arm, seed, accuracies, best_at_rate=1e-4):
    evals = [
        {"step": 36 * (i + 1), "accuracy": a, "loss": 0.0, "flops": 10.0 * (i + 1),
         "programs": [["everything", 36 * (i + 1), 0]]}
        for i, a in enumerate(accuracies)
    ]  # fmt: skip
    return {
        "arm": arm, "rate": best_at_rate, "seed": seed, "evals": evals,
        "best": max(accuracies), "full_flops": 1.0, "compile_seconds": 0.0, "programs": 1,
    }  # fmt: skip


def test_time_to_target_of_runs_with_known_answers():
    runs = [
        _run_record("full", 0, [0.7, 0.8, 0.9]),
        _run_record("full", 1, [0.7, 0.9, 0.8]),
        _run_record("LoRA", 0, [0.9, 0.9, 0.9]),
        _run_record("LoRA", 1, [0.8, 0.8, 0.8]),
    ]
    full = json.dumps([None, 32, None, "keep", "everything", 0])
    lora = json.dumps([8, 32, None, "keep", "everything", 0])
    found = finetune_sst2.summary(runs, {full: 2.0, lora: 1.0, "open": 0.0})
    assert found["target"] == 0.9
    assert found["full_seconds_to_target"] == {0: 216.0, 1: 144.0}
    # Seed 0 gets there with its first 36 steps of a second, seed 1 never.
    row = found["arms"]["LoRA"]
    assert row["ratios"] == [6.0] and row["missed"] == 1 and row["interval"] is None
    assert row["seconds_to_target"] == [36.0, None]
    assert found["arms"]["full"]["ratio"] == pytest.approx(1.0)
    low, high = finetune_sst2.bootstrap([1.0, 4.0])
    assert (low, high) == (pytest.approx(1.0), pytest.approx(4.0))


def test_chunks_of_an_epoch_are_the_epoch():
    arrays = {"x": np.arange(10), "id": np.arange(10)}
    loader = ArrayLoader(arrays, 2, shuffle=True, seed=3, drop_last=True)
    chunks = finetune_sst2.Chunks(loader, 3)
    seen = []
    for chunk in range(5):  # 15 batches: three epochs of 5
        chunks.set_epoch(chunk)
        seen += [batch["x"] for batch in chunks]
    for epoch in range(3):
        loader.set_epoch(epoch)
        expected = [batch["x"] for batch in loader]
        np.testing.assert_array_equal(seen[5 * epoch : 5 * epoch + 5], expected)


def test_sparse_layers_run_on_tiny_shapes(monkeypatch):
    few = {"native": (0.9,), "csr": (0.9,)}
    monkeypatch.setattr(sparse_layers, "LINEAR", few)
    monkeypatch.setattr(sparse_layers, "CONV", few)
    monkeypatch.setattr(sparse_layers, "BLOCKS", (0.5,))
    monkeypatch.setattr(sparse_layers, "SIDES", (16,))
    small = {"batch": 4, "width": 32, "depth": 1}
    conv = {"batch": 2, "size": 4, "channels": 2, "features": 3, "kernel": 3, "stride": 2}
    cases = {
        "linear": {"kind": "linear", **small},
        "blocks": {"kind": "blocks", **small},
        "conv": {"kind": "conv", **conv},
    }
    results = {name: sparse_layers.measure(case, 1) for name, case in cases.items()}
    for name, result in results.items():
        assert set(result["arms"]) == set(sparse_layers.arms_of(cases[name]))
        for arm in result["arms"].values():
            assert arm["programs"] and arm["weight_bytes"] > 0
            assert all(program["speedup"] > 0 for program in arm["programs"].values())
    record = {"threads": {"1": results}, "bars": sparse_layers.bars({"1": results})}
    shown = sparse_layers.readme_table(json.loads(json.dumps(record)))
    assert "| blocks | blocks of 16 |" in shown and "| conv | pure JAX |" in shown


def test_bars_of_sparse_layers_with_known_answers():
    def programs(**milliseconds):
        return {"programs": {name: {"milliseconds": ms} for name, ms in milliseconds.items()}}

    arms = {
        "dense": programs(forward=10.0, backward=90.0),
        "native 0.9": programs(forward=2.0, backward=20.0),
        "csr 0.9": programs(forward=40.0, backward=40.0),
        "csr 0.85": {"programs": {"forward": {"skipped_after_seconds": 3.0}}},
        "torch": programs(forward=4.0, backward=58.0),
        "torch, channels last": programs(forward=2.4, backward=60.0),
    }
    found = sparse_layers.bars({"2": {"a": {"case": {"kind": "conv"}, "arms": arms}}})
    at = {bar["what"]: (bar["measured"], bar["met"]) for bar in found if bar["sparsity"] == 0.9}
    if sparse_backend().name == "native":
        assert at["forward over dense"] == (5.0, True)
        assert at["backward over dense"] == (4.5, False)
        # The faster of torch's layouts, of each pass.
        assert at["forward over dense torch"] == (pytest.approx(1.2), False)
        assert at["backward over dense torch"] == (pytest.approx(2.9), True)
    assert at["pure JAX, both passes, over dense"] == (1.25, True)
    (skipped,) = [bar for bar in found if bar["sparsity"] == 0.85]
    assert skipped["measured"] is None and not skipped["met"]


def test_sparse_mlp_trains_and_is_timed_on_tiny_shapes(monkeypatch):
    rng = np.random.default_rng(0)
    y = rng.integers(0, 10, 300)
    # Pictures of ten kinds, and noise.
    x = (rng.normal(size=(10, 784))[y] + rng.normal(size=(300, 784))).astype(np.float32)
    parts = [part for part in np.split(np.arange(300), [200, 250])]
    arrays = tuple(array[part] for part in parts for array in (x, y))
    monkeypatch.setattr(sparse_mlp, "data", lambda: arrays)
    for method in ("rigl", "gmp"):
        found = sparse_mlp.train(sparse_mlp.Arm(method, batch=50), 4, 0.01, 0, width=64)
        assert len(found["validation"]) == 4 and found["test"] > 0.5
    results = sparse_mlp.measure(1, (50,), width=64)
    assert {"dense", "sparse", "pruning", "pruning, when it prunes", "move"} <= set(results["50"])
    assert all(len(turns) == 1 and turns[0] > 0 for turns in results["50"].values())


def test_time_to_target_of_sparse_training_with_known_answers():
    def runs(arm, validation):
        return [
            {"arm": arm, "rate": rate, "seed": seed, "epochs": 3,
             "validation": v if rate == 1e-3 else [0.1], "test": v[-1]}
            for rate in sparse_mlp.RATES
            for seed, v in enumerate(validation)
            if seed == 0 or rate == 1e-3
        ]  # fmt: skip

    times = {"dense": 0.01, "sparse": 0.002, "pruning": 0.02, "pruning, when it prunes": 1.02}
    seconds = {"128": {name: [t, t] for name, t in (times | {"move": 0.5}).items()}}
    found = sparse_mlp.summary(
        runs("dense", [[0.9], [0.5, 0.9, 0.9]])
        + runs("rigl", [[0.8], [0.5, 0.8, 0.9]])
        + runs("gmp", [[0.8], [0.5, 0.6, 0.7]]),
        seconds,
    )
    dense, rigl, gmp = found["arms"]
    steps = 8000 // 128
    assert found["steps"]["128"]["sparse"]["speedup"] == pytest.approx(5)
    assert dense["speedup"] == 1.0 and dense["seconds"] == pytest.approx(steps * 0.03)
    # Places move behind the second of three epochs.
    assert rigl["seconds"] == pytest.approx(steps * 0.006 + 0.5)
    assert rigl["speedup"] == pytest.approx(steps * 0.02 / (steps * 0.006 + 0.5))
    # One epoch is dense and ends with a pruning.
    assert gmp["seconds"] == pytest.approx(steps * 0.024 + 1.0)
    assert gmp["reached"] == 0 and gmp["speedup"] is None
    assert gmp["difference"] == pytest.approx(-20)
