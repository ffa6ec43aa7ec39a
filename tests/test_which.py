"""Which should I use?, and the FAQ's answer to 200x: every figure is one of a committed record."""

import importlib.util
import json
import re
from pathlib import Path

import pytest

from benchmarks.suite.harness import EVIDENCE
from benchmarks.suite.report import shown, standings
from benchmarks.suite.words import gap, ratio

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results"
OTHER_SHAPES = {"lstm-1", "lstm-32", "lstm-500", "lstm-128", "minilm-48", "smollm2-512"}
PAGE = (ROOT / "docs/which.md").read_text(encoding="utf-8")


def record(name):
    return json.loads((RESULTS / name).read_text(encoding="utf-8"))


def exact():
    models = record("speed/exact-cpu.json")["models"]
    temporary = models["scan"]["processes"][0]["temporary_bytes"]
    share = temporary["applied"] / temporary["as written"]
    memory = f"in {share:.2f} of the temporary memory"
    said = {"lstm": "a step is {}x sooner", "scan": f"{{}}x, {memory}"}
    for name in models.keys() - OTHER_SHAPES:
        one = models[name]
        sooner = said.get(name, "{}x").format(f"{one['times_sooner_with_memory']:.2f}")
        yield f"| {sooner} | measuring for {one['processes'][0]['apply_seconds']:.0f} seconds"
    lengths = record("speed/sentences-cpu.json")["lengths"]
    padded, short = (f"{lengths[n]['times_sooner']:.2f}x" for n in ("64", "24"))
    yield f"| sentences padded to 64 tokens | {padded}, cut at 24 {short} |"
    torch = {name: f"{one['torch_over_applied']:.2f}" for name, one in models.items()}
    yield f"LSTM {torch['lstm']}, GRU {torch['gru']},"
    yield f"tagger {torch['tagger']}, scan {torch['scan']}, list {torch['list']}, "
    yield f"BERT {torch['minilm']} and {torch['minilm-128']}, decoder {torch['smollm2']}, "
    yield f"residual network {torch['resnet']}."


def fine_tuning():
    arms = record("finetune_llm/steps-smollm2-135m-cpu.json")["arms"]
    lora = arms["lora:8"]
    time, memory = lora["of_full"], lora["of_full_bytes"]
    yield f"{time:.2f} of full training's time and {memory:.2f} of its memory"
    for own in (arms["suffix:8"], arms["badam:1 every 4"]):
        yield f"| {own['of_full']:.2f} of the time, {own['of_full_bytes']:.2f} of the memory |"
    found = record("finetune_llm/learning-smollm2-135m-sst2-1-epochs-cpu.json")["arms"]
    losses = {arm: f"{own['loss']:.3f}" for arm, own in found.items()}
    for arm in ("lora:8", "suffix:8"):
        yield f"on SST-2 a loss of {losses[arm]}, in place of {losses['full']} |"
    yield f"a block at a time: there a loss of {losses['badam:1 every 4']} |"
    rate = found["lora:8"]["rate"] / found["full"]["rate"]
    yield f"a learning rate {round(rate)} times as high"
    steps = record("speed/partial_steps-cpu.json")["minilm"]["milliseconds"]
    one, two = (steps[f"suffix({k})"] / steps["full"] for k in (1, 2))
    yield f"a step takes {two:.2f} of full training's time, `suffix(1)` {one:.2f}"


def muon():
    problems = record("muon/learning-cpu.json")["problems"]
    said = lambda found: "{:.2f}x ({:.2f} to {:.2f})".format(found["mean"], *found["interval"])  # noqa: E731
    arm = problems["characters, width 256"]["arms"]["budget 1/4"]
    yield f"characters, width 256: {said(arm['over nadam'])} over NAdam"
    yield f"{said(arm['over budget 1'])} over full Muon"
    arm = problems["MiniLM, SST-2"]["arms"]["budget 1/4"]
    yield f"a quarter of Muon is {said(arm['over nadam'])} as soon as NAdam"


def second_edition():
    """Of the suite's records, as its report reads them."""
    done = {s.workload.name: s for s in standings("small", EVIDENCE / "small-cpu")[0]}
    over = lambda task, arm: ratio(done[task].same_batch(arm, done[task].workload.within))  # noqa: E731

    def over_best(task, arm):
        """Over the best baseline, with its name."""
        standing = done[task]
        level = standing.workload.within
        baseline = standing.best_baseline(level)
        return f"{ratio(standing.over(baseline, standing.own[arm], level))} over `{baseline.name}`"

    for task, arm in (
        ("char-gru", "lean + nadam"), ("pos-tag", "lean + nadam"), ("cifar-conv", "muon 1/4"),
        ("char-transformer", "sparse 90%"), ("char-transformer-long", "sparse 90%"),
    ):  # fmt: skip
        yield f"{over(task, arm)} sooner than AdamW, {over_best(task, arm)}"
        yield f"accuracy {gap(done[task].price(arm))}"
    yield f"a GRU {over('char-gru', 'highway')}"
    tuned, cached = done["sst2"], "suffix, cached"
    yield f"a step takes {tuned.cost(cached):.2f} of AdamW's"
    there = tuned.workload.seeds * 2 - tuned.missed(cached, tuned.workload.within)
    yield f"accuracy {gap(tuned.price(cached))}, loss within 2 % of AdamW's on {there} of 10 seeds"
    for standing in done.values():  # "sooner on none"
        for arm in set(standing.own) & {"priorityprop", "partial 0.5", "meprop 8%"}:
            found = shown(standing, arm)
            assert found is None or found.interval[0] <= 1


SOURCES = {make.__name__: make for make in (exact, fine_tuning, muon, second_edition)}


@pytest.mark.parametrize("source", SOURCES)
def test_figures_are_those_of_the_records(source):
    assert [text for text in SOURCES[source]() if text not in PAGE] == []


def test_how_far_processes_differ():
    models = record("speed/exact-cpu.json")["models"]
    assert "which differ by up to a quarter, those of steps under 30 milliseconds by 60 %" in PAGE
    for name in models.keys() - OTHER_SHAPES:
        small = name in ("tagger", "lstm", "gru")
        for field in ("times_sooner_with_memory", "torch_over_applied"):
            found = [process[field] for process in models[name]["processes"]]
            assert len(found) == 3 and max(found) / min(found) < (1.605 if small else 1.25), name


def test_no_figure_stands_alone():
    left = PAGE
    for text in sorted(
        (text for make in SOURCES.values() for text in make()), key=len, reverse=True
    ):
        left = left.replace(text, "")
    assert re.findall(r"\d+\.\d+x?", left) == []


def pictures_of_docs():
    spec = importlib.util.spec_from_file_location("docs_pictures", ROOT / "docs/pictures.py")
    pictures = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(pictures)
    return pictures


def test_what_the_faq_says_of_magnitudes_is_what_the_ablations_show():
    pictures = pictures_of_docs()
    tasks = pictures.over("uniform", pictures.ABLATED)
    assert pictures.TASKS.keys() <= tasks.keys()
    for task in pictures.TASKS:
        mean = {arm: found.mean for arm, found in tasks[task].items()}
        low, high = ({arm: x.interval[i] for arm, x in tasks[task].items()} for i in range(2))
        assert low["magnitude gain"] > 0 and low["magnitude norm"] > 0
        gru = task == "char-gru"
        assert (mean["default"] > mean["random"]) == gru
        assert task.startswith("char") or high["default"] < min(0, mean["random"])
        assert mean["no count discount"] < mean["default"]
        assert (low["default"] > mean["depth_base 1.0"]) == (task == "char-transformer")
        assert (mean["magnitude gain"] > mean["adamw"]) == (
            task in ("mnist-mlp", "char-transformer")
        )


def test_what_the_faq_says_of_elements_is_what_the_ablations_show():
    tasks = pictures_of_docs().over("nadam", ["cautious"])
    mnist, characters, digits = (
        tasks[task]["cautious"] for task in ("mnist-mlp", "char-transformer", "digits")
    )
    assert max(mnist.interval[1], characters.interval[1]) < 0
    assert digits.interval[0] < 0 < digits.interval[1]
    answer = " ".join((ROOT / "docs/faq.md").read_text("utf-8").split())
    said = (
        f"end {-mnist.mean:.3f} above a tuned NAdam on MNIST, {-characters.mean:.3f} on characters"
    )
    assert said in answer


@pytest.mark.parametrize(
    "base, arms, tasks, page",
    [
        (
            "uniform", ("adamw", "magnitude gain", "random", "default"),
            ("char-transformer", "char-transformer-long", "char-transformer-wide"), "faq.md",
        ),
        (
            "muon", ("muon 1/4", "muon 1/4, random", "muon 1/4, priority", "muon 1/4, change"),
            ("char-transformer",), "guides/muon.md",
        ),
    ],
)  # fmt: skip
def test_tables_of_ablations_are_those_of_the_records(base, arms, tasks, page):
    found, text = pictures_of_docs().over(base, arms), (ROOT / "docs" / page).read_text("utf-8")
    for arm in arms:
        cells = [
            "{:+.3f} ({:+.3f} to {:+.3f})".format(one.mean, *one.interval)
            if (one := found[task].get(arm))
            else "-"
            for task in tasks
        ]
        assert f"| {' | '.join(cells)} |" in text


def test_the_answer_to_200x_is_that_of_the_records():
    pictures = pictures_of_docs()
    known = pictures.found_over_adamw()
    answer = (ROOT / "docs/faq.md").read_text("utf-8").partition("## ")[2].partition("\n## ")[0]
    answer = " ".join(answer.split())
    leaves = [known[arm] for group in ("leaves", "layers") for arm in pictures.GROUPS[group]]
    assert f"a step at most {max(step for step, _ in leaves):.1f}x cheaper" in answer
    assert all(2 * over.pairs < over.pairs + over.misses for _, over in leaves)  # "most of these"
    assert f"make it {known['meprop 8%'][0]:.1f}x cheaper" in answer
    assert known["meprop 8%"][1].pairs == 0  # "none gets there either"
    assert known["sparse 90%"][1].misses == 0
    assert f"the training {known['sparse 90%'][1].mean:.1f}x sooner" in answer
