"""`priorityprop train` by itself: three optimizers over seeds, and what it says of them."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from priorityprop_jax.cli import compare
from priorityprop_jax.cli import main as cli

pytestmark = pytest.mark.once

FILES = {"config.json", "metrics.jsonl", "losses.png", "report.json", "report.md"}
ARMS = ("adam", "nadam", "muon")


def without_seconds(runs):
    return [{name: value for name, value in run.items() if name != "seconds"} for run in runs]


def test_three_optimizers_over_two_seeds(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--seeds", "2", "--epochs", "2"]) == 0
    out, directory = capsys.readouterr().out, tmp_path / "runs" / "characters-muon-1"
    assert {path.name for path in directory.iterdir()} == FILES
    record = json.loads((directory / "report.json").read_text())
    assert [(run["arm"], run["seed"]) for run in record["runs"]] == [
        (arm, seed) for seed in (0, 1) for arm in ARMS
    ]
    for run in record["runs"]:
        assert run["steps"] == 30 and len(run["loss"]) == len(run["seconds"]) == 3
        assert run["seconds"][0] == 0 and sorted(set(run["seconds"])) == run["seconds"]
        assert run["loss"][-1] < run["loss"][0] and 0 < run["accuracy"][-1] < 1
    # All arms of a seed start at the same weights, and seeds at others.
    starts = [run["loss"][0] for run in record["runs"]]
    assert len({*starts[:3]}) == len({*starts[3:]}) == 1 and starts[0] != starts[3]
    # Of twelve matrices of one shape three a step, of nine of another two
    (ledger, *_) = [run["ledger"] for run in record["runs"] if run["arm"] == "muon"]
    assert ledger["total"] == 30 * (3 + 2) and len(ledger["slots"]) == 21
    shares = compare.shares([run for run in record["runs"] if run["arm"] == "muon"])
    assert shares["query"] == pytest.approx(3 / 12, abs=0.02)
    assert shares["gate"] == pytest.approx(2 / 9, abs=0.02)
    assert "where muon's updates went" in out and out.count("muon ") > 2
    assert "](losses.png)" in (directory / "report.md").read_text()
    assert cli.main(["report", str(directory)]) == 0
    assert capsys.readouterr().out.strip() in out

    # What is missing is trained when it is resumed, and comes out the same.
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    (directory / "metrics.jsonl").write_text("\n".join(lines[:4]) + "\n" + lines[4][:50])
    (directory / "report.json").unlink()
    assert cli.main(["train", "--resume", str(directory)]) == 0
    again = json.loads((directory / "report.json").read_text())["runs"]
    assert again[:4] == record["runs"][:4]
    assert without_seconds(again) == without_seconds(record["runs"])


def test_a_loss_that_is_not_finite_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--seeds", "1", "--epochs", "1", "--learning-rate", "1e30"]) == 1
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1 and "loss of adam is not finite" in error


def test_intervals_are_student_s():
    mean, low, high = compare.interval([1, 2, 3, 4, 5])
    half = 2.7764451 * math.sqrt(2.5) / math.sqrt(5)  # of 4 degrees of freedom
    np.testing.assert_allclose((mean, low, high), (3, 3 - half, 3 + half), rtol=1e-6)
    assert math.isnan(compare.interval([1.0])[1])


@pytest.mark.parametrize(
    ("loss", "seconds"), [(3, 1), (2.5, 1.25), (2, 1.5), (1, 2), (0.5, None), (5, 1)]
)
def test_when_a_loss_is_reached(loss, seconds):
    one = {"seconds": [0.0, 1.0, 2.0, 3.0], "loss": [4.0, 3.0, 1.0, 2.0]}
    assert compare.seconds_to(one, loss) == seconds


def made(arm, seed, seconds, losses):
    """A run of so many seconds, evaluated evenly."""
    at = np.linspace(0, seconds, len(losses)).tolist()
    one = {"arm": arm, "seed": seed, "steps": 10, "seconds": at, "loss": losses}
    slots = [{"slot": "blocks/block/query/kernel[0]", "updates": 4}]
    return one | {"accuracy": [0.5] * len(losses), "ledger": {"slots": slots}}


def record(muon, seeds=3, nadam=2.0, seconds=2.0):
    """A report's record: Muon ends at some losses, by seed; the others at `nadam` and at 3."""
    runs = []
    for seed in range(seeds):
        runs.append(made("adam", seed, 2.0, [4.0, 3.0 + 0.01 * seed]))
        runs.append(made("nadam", seed, 2.0, [4.0, nadam + 0.01 * seed]))
        runs.append(made("muon", seed, seconds + 0.01 * seed, [4.0, muon[seed]]))
    return {"config": {"seed": 0, "learning_rate": None}, "runs": runs}


def said(**what):
    return compare.verdict(compare.by_arm(record(**what))).splitlines()


def test_it_says_by_how_much_it_is_better():
    nadam, adam = said(muon=[1.0, 1.0, 1.0])
    # NAdam's 2.0 is two thirds of the way from 4 to 1, Adam's 3.0 a third
    assert nadam.startswith("muon is where nadam ends 1.5 times sooner (95 %: 1.5 to 1.5)")
    assert nadam.endswith("loss at the end -1.01") and adam.startswith(
        "muon is where adam ends 3.0 times sooner"
    )


@pytest.mark.parametrize(
    ("muon", "seconds", "words"),
    [
        ([2.5, 2.5, 2.5], 2.0, "it does not come to that loss with every seed"),
        ([1.0, 1.0, 2.5], 2.0, "it does not come to that loss with every seed"),
        ([1.0, 1.0, 1.0], 3.5, "0.9 times sooner"),  # better by steps, not by the clock
        ([1.0, 1.9, 0.2], 2.2, "95 %: 0."),  # sooner, by less than the interval
    ],
)
def test_it_says_plainly_that_it_is_not_better(muon, seconds, words):
    nadam, _ = said(muon=muon, seconds=seconds)
    assert nadam.startswith("muon is NOT better than nadam by more than its interval")
    assert words in nadam


def test_one_seed_tells_nothing():
    assert said(muon=[1.0], seeds=1)[0].endswith("one seed has no interval, and tells nothing")
    assert "one seed" in str(compare.report(record(muon=[1.0], seeds=1)))


def test_the_table_has_means_and_intervals():
    text = str(compare.report(record(muon=[1.0, 1.1, 1.2])))
    half = 4.3026527 * 0.1 / math.sqrt(3)
    row = next(line for line in text.splitlines() if line.startswith("muon "))
    assert f"1.100  {1.1 - half:.3f} to {1.1 + half:.3f}" in row and "201.0" in row
    assert "query" in text and "40%" in text


@pytest.mark.parametrize("muon", [[1.0, 1.1, 1.2], [2.5, 2.5, 2.5], [1.0]])
def test_the_picture_is_drawn_whatever_came_out(tmp_path, muon):
    compare.draw(tmp_path / "losses.png", record(muon=muon, seeds=len(muon)))
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")


def test_rates_are_the_best_that_were_measured():
    path = Path(__file__).parents[2] / "benchmarks/results/compare_rates-cpu.json"
    for arm, found in json.loads(path.read_text(encoding="utf-8"))["loss_by_rate"].items():
        rates = sorted(found, key=float)
        best = min(rates, key=lambda rate: found[rate])
        assert compare.RATES[arm] == float(best) and best not in (rates[0], rates[-1])
