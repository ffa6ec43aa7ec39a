"""Fine-tuning on the clock: steps become seconds, and arms find their rates."""

import argparse
import json

import pytest

from benchmarks import finetune_llm
from benchmarks.finetune_llm import phases, seconds_at, seconds_to, tuned, tuned_as

RECORD = {
    "model": "smollm2-135m",
    "forward_ms": 100.0,
    "arms": {"full": {"ms": 400.0, "of_full": 1.0}, "suffix:15": {"of_full": 0.5}},
}


def line(arm, steps=30, **key):
    curve = [{"step": 0, "loss": 4.0}, {"step": 10, "loss": 2.0}, {"step": 30, "loss": 3.0}]
    return {"key": {"arm": arm, "rows": 320, **key}, "steps": steps, "curve": curve}


def arguments(**given):
    about = {"model": "smollm2-135m", "data": "sst2", "rows": 320, "dev": 8, "epochs": 3}
    return argparse.Namespace(**{**about, "trial_epochs": 1, **given})


def test_seconds_are_those_of_the_policies_and_of_the_frozen_blocks():
    assert phases("full, then suffix:15", 30) == [("full", 10), ("suffix:15", 20)]
    assert seconds_at(5, line("full"), RECORD) == pytest.approx(2.0)
    # 320 rows once through half of the blocks, 16 at a time
    once = 0.5 * 0.1 * 20
    assert seconds_at(5, line("suffix:15"), RECORD) == pytest.approx(once + 1.0)
    both = line("full, then suffix:15")
    assert seconds_at(10, both, RECORD) == pytest.approx(4.0)
    assert seconds_at(30, both, RECORD) == pytest.approx(4.0 + once + 4.0)


def test_a_loss_is_reached_between_evaluations():
    assert seconds_to(4.0, line("full"), RECORD) == 0
    assert seconds_to(3.0, line("full"), RECORD) == pytest.approx(2.0)
    assert seconds_to(1.9, line("full"), RECORD) is None


def test_rates_of_shorter_runs_serve_all_of_a_family(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_llm, "FOLDER", tmp_path)
    own = arguments()
    assert tuned_as(own, "suffix:4") == "suffix:8"
    assert tuned_as(own, "lora:8 remat all") == "lora:8"
    # After a first part in full the rate of the last blocks alone is far too high.
    assert tuned_as(own, "full, then suffix:8") == "full, then suffix:8"
    assert tuned_as(arguments(model="minilm"), "suffix:4") == "suffix:4"
    assert tuned_as(arguments(trial_epochs=3), "suffix:4") == "suffix:4"
    first = finetune_llm.first_rate("smollm2-135m", "suffix:4")
    assert tuned(own, "suffix:4") == (first, [first, 2 * first, first / 2])
    for rate, loss in ((first, 0.3), (2 * first, 0.2), (first / 2, 0.4)):
        key = finetune_llm.key_of(arguments(epochs=1), "suffix:8", rate, 1)
        finetune_llm.add_line(tmp_path / "runs.jsonl", {"key": key, "curve": [{"loss": loss}]})
    assert tuned(own, "suffix:4") == (2 * first, [4 * first])
    assert tuned(own, "full")[1]  # which has a rate of its own


def test_runs_are_compared_at_their_ends_where_one_is_looked_at_there_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(finetune_llm, "FOLDER", tmp_path)
    own = arguments(epochs=1, arms=["full", "lisa:2"], device="cpu")
    steps = {"model": own.model, "forward_ms": 1.0}
    steps["arms"] = {"full": {"ms": 10.0, "of_full": 1.0}, "lisa:2": {"of_full": 0.5}}
    (tmp_path / "steps-smollm2-135m-cpu.json").write_text(json.dumps(steps))
    early = [{"step": 4, "loss": 0.1}]
    for arm, before in (("full", []), ("lisa:2", early)):
        curve = [*before, {"step": 8, "loss": 0.2}]
        key = finetune_llm.key_of(own, arm, 1e-4, 1)
        line = {"key": key, "steps": 8, "curve": curve}
        finetune_llm.add_line(tmp_path / "runs.jsonl", line)
    found = finetune_llm.summary(own)["lisa:2"]
    assert found["loss"] == 0.2 and found["within 5 %"]["of_full_time"] == pytest.approx(0.5)


def test_an_arm_may_say_how_many_steps_a_cycle_has_and_what_is_made_again():
    about = {"data": "sst2", "model": "smollm2-135m", "cycle": 10, "seed": 1, "epochs": 1}
    about = argparse.Namespace(**about, rows=8)
    for arm, *want in (
        ("badam:1 every 4", "badam:1", 4, "products"),
        ("badam:1", "badam:1", 10, "products"),
        ("lora:8 remat all", "lora:8", 10, "all"),
    ):
        config = finetune_llm.config_of(about, arm)
        assert [config.policy, config.recalc_every, config.remat] == want
    assert finetune_llm.first_rate("smollm2-135m", "full, then suffix:8") == 8e-4
