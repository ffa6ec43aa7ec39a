"""The README: its examples run as they stand, its figures are measured, it stays short."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
OTHER_LENGTHS = ("minilm-48", "smollm2-512")  # of one process, in the guide alone
PRINTED = ["[0 0]", "True", "1 RNN changed", "layers/0     95.0%"]


@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_example_runs(number, capsys):
    exec(compile(EXAMPLES[number], f"README example {number}", "exec"), {})
    printed = capsys.readouterr().out
    assert PRINTED[number] in printed


def test_there_are_examples():
    assert len(EXAMPLES) == len(PRINTED)
    assert all(len(example.strip().splitlines()) <= 20 for example in EXAMPLES)


def test_figures_are_those_of_the_report():
    rows = [line for line in README.splitlines() if line.startswith("| [")]
    of_steps = ("guides/exact", "guides/muon", "guides/my-decoder")
    single = [row for row in rows if any(guide in row for guide in of_steps)]
    rows = [row for row in rows if row not in single]  # these are of single steps
    number = r"[-+]?\d+\.\d+"
    figure = rf"{number}x? \({number} to {number}\)|{number}"  # with its interval, where it has one
    figures = {found for row in rows for found in re.findall(figure, row)}
    report = (ROOT / "benchmarks/results/REPORT.md").read_text(encoding="utf-8")
    assert len(rows) == 6 and len(figures) > 8
    assert [found for found in figures if f" {found} " not in report] == []


def test_figures_of_single_steps_are_those_of_their_records():
    read = lambda name: json.loads(  # noqa: E731
        (ROOT / f"benchmarks/results/speed/{name}-cpu.json").read_text(encoding="utf-8")
    )
    models, problems = read("exact")["models"], read("muon")["results"]
    sooner = lambda name: models[name]["times_sooner_with_memory"]  # noqa: E731
    shown = [model["processes"] for name, model in models.items() if name not in OTHER_LENGTHS]
    waits = [processes[0]["apply_seconds"] for processes in shown]
    wide = "characters, width 256"
    arms = next(result["arms"] for result in problems if result["problem"] == wide)
    quarter, other = arms["budget 1/4"], arms["optax"]
    learning = json.loads((ROOT / "benchmarks/results/muon/learning-cpu.json").read_text("utf-8"))
    sooner_than_nadam = learning["problems"][wide]["arms"]["budget 1/4"]["over nadam"]
    low, high = sooner_than_nadam["interval"]
    for figure in (
        f"tagger is {sooner('tagger'):.1f}x",
        f"24 tokens {sooner('minilm'):.2f}x and at 128 tokens {sooner('minilm-128'):.2f}x",
        f"transformer {sooner('scan'):.2f}x",
        f"it measures for {min(waits):.0f} to {max(waits):.0f} seconds",
        f"{quarter['median_seconds'] / other['median_seconds']:.2f} of Optax's Muon",
        f"{quarter['ratio']:.2f} of NAdam",
        f"ends {sooner_than_nadam['mean']:.2f} times sooner ({low:.2f} to {high:.2f}, 5 seeds)",
    ):
        assert figure in README, figure


def test_it_is_short_and_leads_somewhere():
    assert len(README.splitlines()) <= 150
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def shown(arm):
    """As one types it behind --policy."""
    return arm.replace(" every", " --recalc-every").replace(" remat", " --remat")


def test_figures_of_the_decoder_s_guide_are_those_of_its_record():
    record = ROOT / "benchmarks/results/finetune_llm/steps-smollm2-135m-cpu.json"
    guide = (ROOT / "docs/guides/my-decoder.md").read_text(encoding="utf-8")
    for arm, found in json.loads(record.read_text(encoding="utf-8"))["arms"].items():
        time, memory = f"{found['of_full']:.2f}", f"{found['of_full_bytes']:.2f}"
        row = f"| `{shown(arm)}` | {time} | {memory} |"
        assert row in guide, row
        if arm == "suffix:8":
            assert f"{time} of the time and {memory} of the memory; LoRA " in README
        if arm == "lora:8":
            assert f"of the memory; LoRA {time} and {memory} |" in README


@pytest.mark.parametrize(("model", "guide"), [("smollm2-135m", "decoder"), ("minilm", "bert")])
def test_what_training_a_part_reaches_is_that_of_its_record(model, guide):
    record = ROOT / f"benchmarks/results/finetune_llm/learning-{model}-sst2-1-epochs-cpu.json"
    text = (ROOT / f"docs/guides/my-{guide}.md").read_text(encoding="utf-8")
    for arm, found in json.loads(record.read_text(encoding="utf-8"))["arms"].items():
        reached = f"{found['loss']:.3f} | {found['accuracy']:.3f} | {found['of_full_time']:.2f}"
        assert f"| `{shown(arm)}` | {reached} |" in text, arm
    if model == "smollm2-135m":
        arms = json.loads(record.read_text(encoding="utf-8"))["arms"]
        losses = (f"{arms[arm]['loss']:.3f}" for arm in ("suffix:8", "full", "lora:8"))
        assert "on SST-2 a loss of {}, in place of {}; LoRA {} |".format(*losses) in README


def test_what_three_epochs_reach_is_that_of_their_record():
    folder = ROOT / "benchmarks/results/finetune_llm"
    record = folder / "learning-smollm2-135m-sst2-3-epochs-cpu.json"
    text = (ROOT / "docs/guides/my-decoder.md").read_text(encoding="utf-8")
    arms = json.loads(record.read_text(encoding="utf-8"))["arms"]
    losses = [f"{arms[arm]['loss']:.3f}" for arm in ("full", "suffix:15", "suffix:8", "suffix:4")]
    soon = f"{arms['suffix:15']['within 5 %']['of_full_time']:.2f}"
    said = "{} of all blocks, {}, {} and {} of the last 15, 8 and 4".format(*losses)
    words = " ".join(text.split())
    assert f"{said}; the last 15 are within 5 % of all blocks' in {soon} of the time" in words
    for line in (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines():
        curve, key = json.loads(line)["curve"], json.loads(line)["key"]
        if key["model"] == "smollm2-135m" and key["epochs"] == 3 and key["arm"] in arms:
            assert min(curve, key=lambda point: point["loss"])["step"] == 126


def test_parts_of_a_step_are_those_of_their_record():
    record = json.loads((ROOT / "benchmarks/results/speed/exact-cpu.json").read_text("utf-8"))
    guide = (ROOT / "docs/guides/exact.md").read_text(encoding="utf-8")
    shown = lambda ms: f"{ms:,.0f}" if ms > 99 else f"{ms:.1f}"  # noqa: E731
    shown_there = "list scan minilm minilm-128 smollm2 tagger lstm resnet".split()
    for name in shown_there:
        process = record["models"][name]["processes"][0]
        written, applied = process["split_milliseconds"].values()
        parts = [f"{shown(written[part])} → {shown(applied[part])}" for part in written]
        whole = " → ".join(shown(sum(arm.values())) for arm in (written, applied))
        row = " | ".join((*parts, whole, shown(process["products_milliseconds"])))
        assert f" | {row} |" in guide, (name, row)
    words = " ".join(guide.split())
    for name, said in {
        "minilm-48": "32 x 48 tokens is {}x sooner than as one writes it, and PyTorch takes {} of",
        "smollm2-512": "the decoder at 1 x 512 {}x, and PyTorch {}.",
    }.items():
        own = record["models"][name]
        ratios = own["times_sooner_with_memory"], own["torch_over_applied"]
        assert said.format(*(f"{ratio:.2f}" for ratio in ratios)) in words, name


def test_figures_of_rows_of_embeddings_are_those_of_their_record():
    record = ROOT / "benchmarks/results/speed/embed_rows-cpu.json"
    tables = json.loads(record.read_text(encoding="utf-8"))["tables"]
    guide = " ".join((ROOT / "docs/guides/exact.md").read_text(encoding="utf-8").split())
    arms = ("sgd rows", "adam rows")
    found = {
        n: [f"{table[arm]['times_sooner']:.2f}x" for arm in arms] for n, table in tables.items()
    }
    singles = [p["arms"][a]["times_sooner"] for p in tables["minilm"]["processes"] for a in arms]
    assert "is {} sooner with SGD and {} with AdamW".format(*found["minilm"]) in guide
    assert f"({min(singles):.2f}x to {max(singles):.2f}x in single processes)" in guide
    assert "and {} and {} where it has 250,002".format(*found["multilingual"]) in guide


def test_what_free_text_reaches_is_that_of_its_record():
    folder = ROOT / "benchmarks/results/finetune_llm"
    record = folder / "learning-smollm2-135m-shakespeare-1-epochs-cpu.json"
    text = (ROOT / "docs/guides/my-decoder.md").read_text(encoding="utf-8")
    arms = json.loads(record.read_text(encoding="utf-8"))["arms"]
    lines = (folder / "runs.jsonl").read_text(encoding="utf-8").splitlines()
    keys = [json.loads(line) for line in lines]
    points = [p for one in keys if one["key"]["data"] == "shakespeare" for p in one["curve"]]
    before = {f"{point['loss']:.2f}" for point in points if point["step"] == 0}
    names = ("full", "lora:8", "lisa:2", "badam:1 every 4", "suffix:8")
    losses = [f"{arms[name]['loss']:.2f}" for name in names]
    said = (
        "from {} to {} by all blocks, {} by LoRA, {} by LISA, {} by BAdam and {} by the last eight"
    )
    assert said.format(*before, *losses) in " ".join(text.split())
