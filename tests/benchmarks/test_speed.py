"""The speed benchmarks run on tiny shapes, and show what they have measured."""

import json
import runpy
import sys
from pathlib import Path

import pytest

from benchmarks.speed import (
    embed_rows,
    exact,
    meprop_lstm,
    meprop_speed,
    muon,
    other,
    sparse_layers,
    transform_overhead,
)
from priorityprop_jax.sparse import sparse_backend

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


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


def test_muon_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    chosen = {name: tx for name, tx in muon.arms().items() if name in ("nadam", "budget 1/4")}
    monkeypatch.setattr(muon, "arms", lambda: chosen)
    options = ["--repeats", "1", "--small", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["muon", *options])
    muon.main()
    (path,) = tmp_path.glob("muon-*-small.json")
    (result,) = json.loads(path.read_text())["results"]
    assert [*result["arms"]] == ["nadam", "budget 1/4"]
    assert all(arm["ratio"] > 0 and len(arm["seconds"]) == 1 for arm in result["arms"].values())
    assert "| problem | nadam | budget 1/4 |" in capsys.readouterr().out


def test_its_options_are_explained(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["transform_overhead", "--help"])
    monkeypatch.delitem(sys.modules, "benchmarks.speed.transform_overhead")  # or runpy warns
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(
            str(ROOT / "benchmarks" / "speed" / "transform_overhead.py"), run_name="__main__"
        )
    assert ended.value.code == 0 and "--repeats" in capsys.readouterr().out


def test_sparse_layers_run_on_tiny_shapes(monkeypatch):
    few = {"native": (0.9,), "csr": (0.9,)}
    monkeypatch.setattr(sparse_layers, "LINEAR", few)
    monkeypatch.setattr(sparse_layers, "CONV", {"native": (0.9,)})
    small = {"batch": 4, "width": 32, "depth": 1}
    conv = {"batch": 2, "size": 4, "channels": 2, "features": 3, "kernel": 3, "stride": 2}
    cases = {
        "linear": {"kind": "linear", **small},
        "conv": {"kind": "conv", **conv},
    }
    results = {name: sparse_layers.measure(case, 1) for name, case in cases.items()}
    for name, result in results.items():
        assert set(result["arms"]) == set(sparse_layers.arms_of(cases[name]))
        for arm in result["arms"].values():
            assert arm["programs"] and arm["weight_bytes"] > 0
            assert all(program["speedup"] > 0 for program in arm["programs"].values())
    shown = sparse_layers.markdown(json.loads(json.dumps({"threads": {"1": results}})))
    assert "| linear | pure JAX |" in shown
    if sparse_backend().name == "native":
        assert "| linear | native |" in shown and "| conv | native |" in shown


def test_a_speed_is_over_the_same_round_or_the_fastest_layout():
    def programs(**milliseconds):
        return {"programs": {name: {"milliseconds": ms} for name, ms in milliseconds.items()}}

    arms = {
        "dense": programs(forward=10.0, backward=90.0),
        "native 0.9": programs(forward=2.0, backward=20.0),
        "csr 0.85": {"programs": {"forward": {"skipped_after_seconds": 3.0}}},
        "torch": programs(forward=4.0, backward=58.0),
        "torch, channels last": programs(forward=2.4, backward=60.0),
    }
    result = {"arms": arms}
    speed = lambda *asked: sparse_layers.speedup(result, *asked)  # noqa: E731
    assert speed("native 0.9", "forward") == 5 and speed("native 0.9", "backward") == 4.5
    assert speed("native 0.9", "both") == pytest.approx(100 / 22)
    assert speed("native 0.9", "forward", "torch") == pytest.approx(1.2)
    assert speed("native 0.9", "backward", "torch") == pytest.approx(2.9)
    assert speed("csr 0.85", "forward") is None


def test_committed_overhead_is_of_bert_base():
    path = ROOT / "benchmarks" / "results" / "speed" / "transform_overhead-cpu.json"
    record = json.loads(path.read_text(encoding="utf-8"))
    assert record["leaves"] == 199 and record["parameters"] == 109_482_240
    text = " ".join((ROOT / "docs" / "how-it-works.md").read_text(encoding="utf-8").split())
    found = {name: f"{arm['ratio']:.2f}" for name, arm in record["results"]["step"].items()}
    full, tenth, *more = (
        found[f"{budget}, by priority, max {most}"]
        for most in (10, 20)
        for budget in ("full", "tenth")
    )
    assert f"takes {full} of Adam's time with the full budget and {tenth} with a tenth" in text
    assert f"looped over: {more[0]} and {more[1]}." in text


def test_exact_runs_on_tiny_shapes_beside_another_interpreter(tmp_path, monkeypatch):
    """The other one is this Python, and a script that answers as the one with PyTorch does."""
    script = tmp_path / "answers.py"
    script.write_text(
        "import json, sys\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    runs = [asked['case']['kind'], 'torch, compiled'] if 'case' in asked else None\n"
        "    found = {'runs': runs, 'seconds': 0.5, 'version': sys.argv[1]}\n"
        "    print(json.dumps(found), flush=True)\n"
    )
    monkeypatch.setattr(
        other, "torch", lambda python, _, n: other.Other(python, str(script), str(n))
    )
    case = exact.recurrent(2, 5, 3, 4, both_ways=True)
    found = exact.measure(case, 2, sys.executable)
    ms = found["milliseconds"]
    assert list(ms) == ["as written", "applied", "rnn", "torch, compiled"]
    assert ms["rnn"] == 500 and found["gradients_off_by"] < 1e-5
    parts = found["split_milliseconds"]["applied"]
    assert sum(parts.values()) > 0 and found["products_milliseconds"] > 0
    assert exact.parts_of(1.0, 3.0, 3.5) == {"forward": 1.0, "backward": 2.0, "optimizer": 0.5}
    assert found["torch_over_applied"] == 500 / ms["applied"] and int(found["torch_version"]) > 0
    assert set(exact.measure(case, 1)["milliseconds"]) == {"as written", "applied"}


def test_exact_beside_a_process_that_keeps_its_memory(monkeypatch):
    monkeypatch.chdir(ROOT)
    found = exact.measure(exact.recurrent(2, 5, 3, 4, cell="gru"), 2, memory=True)
    ms = found["milliseconds"]
    assert list(ms) == ["as written, memory kept", "applied, memory kept", "as written"]
    applied = ms["applied, memory kept"]
    assert found["times_sooner"] == ms["as written, memory kept"] / applied
    assert found["times_sooner_with_memory"] == ms["as written"] / applied


def test_embed_rows_runs_on_a_tiny_model(tmp_path, monkeypatch, capsys):
    config = embed_rows.BertConfig(60, 8, 1, 2, 8, max_position_embeddings=24)
    monkeypatch.setattr(embed_rows, "SHAPE", (2, 6))
    found = embed_rows.measure(config, 1)
    assert list(found["arms"]) == ["sgd", "sgd rows", "adam", "adam rows", "lazy rows"]
    assert found["arms"]["adam"]["times_sooner"] == 1 and found["rows_a_batch"] < 12
    monkeypatch.setattr(embed_rows, "fresh", lambda name, options: found)
    argv = ["embed_rows", "--tables", "minilm", "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", argv)
    embed_rows.main()
    record = json.loads((tmp_path / "embed_rows-cpu.json").read_text(encoding="utf-8"))
    assert record["tables"]["minilm"]["sgd rows"] == found["arms"]["sgd rows"]
    assert capsys.readouterr().out.startswith("minilm")
