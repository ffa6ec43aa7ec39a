"""The suite's report says what its records say."""

import json
import re
import shutil
from pathlib import Path

import pytest

from benchmarks.records import read_lines
from benchmarks.suite import report, rerun, statistics, workloads
from benchmarks.suite.standing import standing_of
from tests.benchmarks import invented

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results"


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A whole suite of two workloads whose answers are known."""
    root = tmp_path_factory.mktemp("suite")
    with pytest.MonkeyPatch.context() as patch:
        invented.write_suite(root, patch)
        for place in ("speed/exact-cpu.json", "evidence/ablation-cpu/runs.jsonl"):
            path = root / "results" / place
            path.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(RESULTS / place, path)
        yield root


@pytest.fixture(scope="module")
def found(tree):
    """The standings by workload."""
    done, left = report.standings("small", tree / "evidence/small-cpu")
    assert not left
    return {one.workload.name: one for one in done}


@pytest.fixture(scope="module")
def text(tree, found):
    return report.report_text(tree / "results", tree / "evidence")


def cells(text, heading, first):
    """The cells of the first line that begins so below a heading."""
    part = text[text.index(f"{heading}\n") :]
    line = next(x for x in part.splitlines() if x.startswith(f"| {first} |"))
    return line.strip("| ").split(" | ")


def test_ratios_are_those_that_were_put_in(found):
    plain = found["plain"]
    # Down at AdamW's loss in a quarter of the seconds, and a run that ends two rungs above that.
    over = plain.same_batch("sparse 90%", 1.0)
    assert 2.5 < over.interval[0] <= over.mean <= over.interval[1] < 4.1
    assert over.pairs == 10 and over.misses == 0
    assert plain.recipe() == "sparse 90%" and plain.best_baseline(1.0).name == "nadam"
    mine, base = plain.own["sparse 90%"], plain.bases[16]
    for seed, seconds in plain.hits(mine, 1.0).items():
        run = plain.runs(mine)[seed]
        assert seconds <= run["steps"] * invented.STEP[16] * 0.5 + 1e-9
        # At the end of the run, as the invented loss comes down in a straight line.
        end = run["evals"][-1]["loss"]
        assert end <= plain.target
        assert seconds == pytest.approx(
            (1 - (plain.target - end)) * run["steps"] * invented.STEP[16] * 0.5, rel=0.02
        )
    assert len(plain.hits(base, 1.0)) == 10 and None in plain.hits(base, 1.0).values()
    assert plain.missed("partial 0.5", 1.0) == 5  # it takes twice the steps
    assert plain.same_batch("partial 0.5", 1.0).mean is None


def test_prices_and_memory(found):
    price = found["plain"].price("muon")
    assert price.mean == pytest.approx(-0.01) and price.pairs == 5
    assert found["plain"].memory("sparse 90%") == 1
    assert found["tuned"].memory("suffix, cached") == 0.5
    split = found["plain"].split()
    assert split["backward"] == pytest.approx(0.005) and split["step"] == 0.01


def test_page_one(text):
    first = text[: text.index("## How to read this")]
    assert first.count("![") == 1 and "(report/small-cpu.png)" in first
    rows = [line for line in first.splitlines() if line.startswith("| ")]
    assert len(rows) - 2 == 2 <= 10
    plain, tuned = (
        cells(
            first,
            "Second edition. Generated from the records under "
            "`benchmarks/results`; a test fails where the two\ndiffer.",
            "plain",
        ),
        None,
    )
    tuned = next(r for r in rows if r.startswith("| tuned"))
    assert plain[1] == "`sparse 90%`" and re.fullmatch(r"(≥ )?3\.\d\dx \(.*\)", plain[2])
    assert "over `nadam`" in plain[3] and plain[4] == "10 of 10"
    assert "| 0.50 |" in tuned
    sentences = first.strip().rsplit("\n\n", 1)[1].splitlines()
    assert len(sentences) == 3
    assert "plain" in sentences[0] and "`partial 0.5`" in sentences[1]
    exact = json.loads((RESULTS / "speed/exact-cpu.json").read_text("utf-8"))["models"]
    tagger = exact["tagger"]["times_sooner_with_memory"]
    assert f"a bidirectional LSTM tagger {tagger:.2f}x" in sentences[2]


def test_every_method_is_shown_and_what_fails_is_said(text, found):
    for name, one in found.items():
        page = text[text.index(f"## {name}\n") :]
        for arm in one.own:
            assert f"| {arm} |" in page
    assert cells(text, "## plain", "partial 0.5")[4] == "0 of 5"
    raw = cells(text, "### plain", "partial 0.5")
    assert raw[6] == "nothing may be claimed: 5 fell short"
    assert cells(text, "### plain", "sparse 90%")[6].startswith("at least")
    # Its best rate is a rung off what was tried in the first stage, and inside of all.
    assert "(end)" not in cells(text, "### plain", "sparse 90%")[2]
    models = json.loads((RESULTS / "speed/exact-cpu.json").read_text("utf-8"))["models"]
    alone = f"| an LSTM alone | {models['lstm']['times_sooner_with_memory']:.2f}x |"
    assert "## Exact savings" in text and alone in text


def test_build_writes_all_that_the_text_names(tree, text, found):
    out = report.build(tree / "results", tree / "evidence", tree / "preview")
    assert Path(out).read_text("utf-8") == text
    named = set(re.findall(r"\(report/([^)]+)\)", text))
    drawn = list((tree / "preview/report").iterdir())
    assert named == {path.name for path in drawn} and len(named) == 3
    assert all(path.stat().st_size > 5_000 for path in drawn)
    assert report.stands(tree / "evidence") is True
    assert report.build(tree / "results", tree / "evidence") == str(tree / "results/REPORT.md")
    lines = report.readme_lines(tree / "evidence")
    assert len(lines) == 2 and lines[0].startswith("plain ")


def test_what_is_not_finished_or_not_quiet_is_not_shown(tmp_path, monkeypatch):
    path = invented.write_suite(tmp_path, monkeypatch)
    lines = read_lines(path / "runs.jsonl")
    (path / "runs.jsonl").write_text("".join(json.dumps(r) + "\n" for r in lines[:-1]))
    assert report.standings("small", path)[1] == ["tuned"]
    said = report.build(tmp_path, tmp_path / "evidence")
    assert "not finished, or not timed on a quiet machine: tuned; REPORT.md stays" in said
    assert not (tmp_path / "REPORT.md").exists()
    preview = Path(report.build(tmp_path, tmp_path / "evidence", tmp_path / "preview"))
    assert "Not finished: tuned." in preview.read_text("utf-8")
    workload = workloads.read_workload("small", "plain")
    assert standing_of(workload, path) is not None
    (path / "times.jsonl").write_text(json.dumps(invented.times(workload, void=True)) + "\n")
    assert standing_of(workload, path) is None
    assert "There are no records yet." in report.report_text(tmp_path, tmp_path / "nothing")


def test_a_rerun_compares_sign_and_intervals(tree, found, monkeypatch):
    path = tree / "evidence/small-cpu"
    monkeypatch.setattr(rerun, "take_times", lambda workload, *_: invented.times(workload))
    monkeypatch.setattr(rerun, "run_arm", invented.fake_run)
    chosen = [workloads.read_workload("small", name) for name in invented.WORKLOADS]
    text, same = rerun.repeat(chosen, path, 3, 0)
    assert same and text.count("agrees") == 3
    records = read_lines(path / "rerun.jsonl")
    assert len(records) == 3 and all(r["agrees"] for r in records)
    assert rerun.repeat(chosen, path, 3, 0)[0] == text  # the same draw
    with pytest.raises(ValueError, match="no workload that is finished"):
        rerun.repeat(chosen, tree / "nothing", 3, 0)
    one = lambda mean, low, high: statistics.Estimate(mean, (low, high), 5)  # noqa: E731
    assert rerun.agrees(one(2, 1.8, 2.2), one(1.9, 1.7, 1.85))
    assert not rerun.agrees(one(2, 1.8, 2.2), one(1.5, 1.4, 1.6))
    assert not rerun.agrees(one(1.05, 0.9, 1.2), one(0.95, 0.8, 1.1))
    assert not rerun.agrees(one(2, 1.8, 2.2), statistics.Estimate(None, None, 0))


def test_ablations_name_the_factor(text):
    part = text.partition("### digits, ablations")[2]
    assert "by default**, against random: costs, -0.0274" in part
    assert "- **count discount**, against leaving it out: earns, +0.0180" in part
    part = text.partition("### char-gru, ablations")[2]
    assert "by default**, against uniform: no difference that 5 seeds show, +0.0190" in part
