"""The command, run as a user runs it: in an empty folder, with right and wrong arguments."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flax import nnx

from priorityprop_jax.cli import main as cli
from priorityprop_jax.cli import tasks
from priorityprop_jax.training import trainer

pytestmark = [pytest.mark.usefixtures("compile_once"), pytest.mark.once]

FILES = {"config.json", "metrics.jsonl", "priorities.png", "report.json", "report.md", "checkpoint"}


@pytest.fixture(autouse=True)
def empty_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(*arguments):
    try:
        return cli.main(arguments)
    except SystemExit as error:
        return error.code


def records(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def without_seconds(directory):
    return [{k: v for k, v in x.items() if k != "seconds"} for x in records(directory)]


def test_train_and_report(empty_folder, capsys):
    assert run("train", "--epochs", "3", "--budget", "0.5") == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-adam-1"
    assert {path.name for path in directory.iterdir()} == FILES
    assert "priorityprop(adam)" in out and "layers/0/kernel" in out and "100.0%" in out
    results = json.loads((directory / "report.json").read_text())["results"]
    # Half of the budget: half of the steps for the plain arm, and the same updates for both
    assert results["adam"]["steps"] == 60 and results["priorityprop"]["steps"] == 120
    assert results["adam"]["updates"] == results["priorityprop"]["updates"] == 360
    assert results["priorityprop"]["best_validation"] > 0.5
    lines = records(directory)
    assert [x["step"] for x in lines if x["arm"] == "adam" and x["kind"] == "step"] == [
        *range(1, 61)
    ]
    assert sum(x["kind"] == "eval" for x in lines if x["arm"] == "priorityprop") == 3
    assert sum(x["updates"] for x in lines if x["kind"] == "step") == 720
    assert "| priorityprop(adam) |" in (directory / "report.md").read_text()

    assert run("report", str(directory)) == 0
    again = capsys.readouterr().out
    assert again.strip() in out
    assert run("train", "--resume", str(directory)) == 1  # it is finished
    assert "is finished" in capsys.readouterr().err
    assert run("train", "--epochs", "1") == 0  # a second run does not touch the first
    assert (empty_folder / "runs" / "digits-adam-2").is_dir()
    assert {path.name for path in directory.iterdir()} == FILES


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("train", "--task", "imagenet"), "imagenet"),
        (("train", "--budget", "lots"), "lots"),
        (("train", "--budget", "-1"), "-1"),
        (("train", "--budget", "nan"), "nan"),
        (("train", "--epochs", "0"), "0"),
        (("train", "--seed", "-3"), "-3"),
        (("train", "--learning-rate", "0"), "0"),
        (("train", "--optimizer", "magic"), "magic"),
        (("train", "--budget", "5"), "raise total_budget"),
        (("train", "--budget", "7000"), "raise max_updates"),
        (("train", "--min-updates", "9", "--max-updates", "3"), "more than max_updates"),
        (("train", "--max-updates", "5"), "full budget"),
        (("train", "--k", "20"), "--backward meprop"),
        (("train", "--backward", "meprop"), "--k"),
        (("train", "--backward", "meprop", "--k", "20", "--budget", "0.1"), "either"),
        (("train", "--backward", "meprop", "--budget", "20"), "either"),
        (("train", "--backward", "meprop", "--k", "0"), "0"),
        (("train", "--backward", "meprop", "--k", "1.5"), "1.5"),
        (("train", "--backward", "meprop", "--k", "129"), "128 output features of layer"),
        (("train", "--iterations", "2"), "--backward highway"),
        (("train", "--backward", "highway", "--budget", "0.5"), "without --budget"),
        (("train", "--backward", "highway"), "no RNN was changed"),
        (("train", "--model", "gru"), "--task char-lm"),
        (("train", "--sparsity", "1"), "'1' is not a fraction"),
        (("train", "--sparsity", "nan"), "nan"),
        (("train", "--sparse-method", "rigl"), "need a --sparsity"),
        (("train", "--prune", "runs/digits-adam-1"), "need a --sparsity"),
        (("train", "--sparsity", "0.9", "--budget", "0.5"), "neither --budget nor"),
        (("train", "--sparsity", "0.9", "--sparse-method", "gmp", "--epochs", "1"), "--epochs 2"),
    ],
)
def test_wrong_arguments_exit_with_2_and_leave_nothing(empty_folder, capsys, arguments, said):
    assert run(*arguments) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert said in error and error.startswith("priorityprop")
    assert not (empty_folder / "runs").exists()


def one_line(capsys):
    error = capsys.readouterr().err.strip()
    assert error.startswith("priorityprop: ") and len(error.splitlines()) == 1
    return error


def test_missing_and_damaged_data(empty_folder, capsys):
    data = empty_folder / "data"
    data.mkdir()
    for task, name in (
        ("mnist-mlp", "mnist10k-images-idx3-ubyte.gz"),
        ("char-lm", "tinyshakespeare"),
    ):
        assert run("train", "--task", task, "--data-dir", str(data)) == 1
        assert name in one_line(capsys)
    (data / "tinyshakespeare.txt").write_text("To be, or not")
    assert run("train", "--task", "char-lm", "--data-dir", str(data)) == 1
    assert "tinyshakespeare.txt" in one_line(capsys)
    assert run("train", "--task", "char-lm", "--data-dir", str(empty_folder / "none")) == 1
    one_line(capsys)
    assert not (empty_folder / "runs").exists()


def test_what_is_not_a_run(empty_folder, capsys):
    for arguments in (("report", "nowhere"), ("train", "--resume", "nowhere")):
        assert run(*arguments) == 1
        assert "not a run" in one_line(capsys)
    run_folder = empty_folder / "broken"
    run_folder.mkdir()
    (run_folder / "config.json").write_text("{")
    assert run("train", "--resume", "broken") == 1
    assert "damaged" in one_line(capsys)
    assert run("report", "broken") == 1
    assert "not finished" in one_line(capsys)
    for text in ("{", "{}", "[]", '{"ledger": 3}'):
        (run_folder / "report.json").write_text(text)
        assert run("report", "broken") == 1
        assert "damaged" in one_line(capsys)


def test_a_loss_that_is_not_finite(empty_folder, capsys):
    assert run("train", "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "1") == 1
    error = one_line(capsys)
    assert "loss" in error and "learning rate" in error
    assert (empty_folder / "runs" / "digits-sgd-1" / "config.json").exists()


def test_a_full_disk_loses_nothing(empty_folder, capsys, monkeypatch):
    assert run("train", "--epochs", "1") == 0
    kept = {p: p.read_bytes() for p in (empty_folder / "runs").rglob("*") if p.is_file()}
    capsys.readouterr()

    def full(self, *_, **__):
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert run("train", "--epochs", "1") == 1
    assert "No space left on device" in one_line(capsys)
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert not [p for p in (empty_folder / "runs").rglob(".*") if p.is_file()]


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run("train") == 1
    assert 'pip install "priorityprop-jax[demo]"' in one_line(capsys)


def test_an_interrupted_run_goes_on_to_the_same_end(empty_folder, capsys, monkeypatch):
    assert run("train", "--epochs", "3") == 0
    capsys.readouterr()
    whole = empty_folder / "runs" / "digits-adam-1"

    # Ctrl-C in the middle of the second arm's second epoch
    plain, seen = tasks.ArrayLoader.__iter__, [0]

    def interrupt(loader):
        for batch in plain(loader):
            seen[0] += loader.shuffle
            if seen[0] == 120 + 40 + 13:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(tasks.ArrayLoader, "__iter__", interrupt)
    assert run("train", "--epochs", "3") == 130
    monkeypatch.setattr(tasks.ArrayLoader, "__iter__", plain)
    directory = empty_folder / "runs" / "digits-adam-2"
    assert f"--resume {directory.relative_to(empty_folder)}" in capsys.readouterr().out
    assert run("report", str(directory)) == 1
    assert "--resume" in one_line(capsys)
    with (directory / "metrics.jsonl").open("a") as file:
        file.write('{"arm": "pri')  # as a killed process leaves it
    assert run("train", "--resume", str(directory)) == 0

    assert without_seconds(directory) == without_seconds(whole)
    ledgers = [json.loads((d / "report.json").read_text())["ledger"] for d in (whole, directory)]
    assert ledgers[0]["slots"] == ledgers[1]["slots"]


def test_a_killed_process_leaves_a_run_that_goes_on(empty_folder):
    command = [sys.executable, "-m", "priorityprop_jax.cli.main", "train"]
    process = subprocess.Popen(
        [*command, "--epochs", "400"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    directory = empty_folder / "runs" / "digits-adam-1"
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = [p for p in directory.glob("checkpoint/adam/*") if p.name.isdecimal()]
        if done:
            break
        time.sleep(0.05)
    process.kill()
    process.wait()
    assert done
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "epochs": int(done[0].name) + 30}))
    finished = subprocess.run(
        [*command, "--resume", str(directory)], capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr and "%|" not in finished.stderr  # no bar in a pipe
    steps = [x["step"] for x in records(directory) if x["arm"] == "adam" and x["kind"] == "step"]
    assert steps == [*range(1, len(steps) + 1)]


@pytest.mark.parametrize("option", [("--k", "20"), ("--budget", "0.1")])
def test_meprop_against_the_plain_backward_pass(empty_folder, capsys, option):
    arguments = ("train", "--backward", "meprop", *option, "--epochs", "3")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-adam-1"
    assert {path.name for path in directory.iterdir()} == FILES
    record = json.loads((directory / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["meprop"]
    assert plain["steps"] == ours["steps"] == 120 and ours["best_validation"] > 0.5
    # Of two hidden layers of 128, and all 10 features of the output layer
    kept = sum(slot["updates"] for slot in record["ledger"]["slots"])
    assert kept == ours["updates"] and kept <= 120 * (2 * 20 + 10)
    assert "meprop(adam)" in out and "by meProp" in (directory / "report.md").read_text()
    assert run("report", str(directory)) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.parametrize("method", ["static", "gmp", "rigl"])
def test_sparse_weights_against_dense_ones(empty_folder, capsys, monkeypatch, method):
    arguments = ("train", "--sparsity", "0.8", "--sparse-method", method, "--epochs", "3")
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-adam-1"
    assert {path.name for path in directory.iterdir()} == FILES
    record = json.loads((directory / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["sparse"]
    assert plain["steps"] == ours["steps"] == 120 and ours["best_validation"] > 0.5
    # A fifth of two hidden layers, and all of the output layer
    kept = [layer["nonzeros"] for layer in ours["layers"]]
    assert kept == [round(64 * 128 / 5), round(128 * 128 / 5), 1280]
    assert ours["nonzeros"] == sum(kept) and plain["nonzeros"] == (64 + 128 + 10) * 128
    assert "where the non-zeros are" in out and "sparse(adam)" in out
    assert "## Where the non-zeros are" in (directory / "report.md").read_text()
    assert run("report", str(directory)) == 0
    assert capsys.readouterr().out.strip() in out
    # Interrupted while it prunes (or while places still move), and behind that
    plain_iter, seen = tasks.ArrayLoader.__iter__, [0]
    for place, stop in enumerate({"static": (), "gmp": (25, 60), "rigl": (60,)}[method]):

        def interrupt(loader, stop=stop):
            for batch in plain_iter(loader):
                seen[0] += loader.shuffle
                if seen[0] == 120 + stop:
                    signal.raise_signal(signal.SIGINT)
                yield batch

        seen[0] = 0
        monkeypatch.setattr(tasks.ArrayLoader, "__iter__", interrupt)
        assert run(*arguments) == 130
        monkeypatch.setattr(tasks.ArrayLoader, "__iter__", plain_iter)
        again = empty_folder / "runs" / f"digits-adam-{2 + place}"
        assert run("train", "--resume", str(again)) == 0
        assert without_seconds(again) == without_seconds(directory)


def test_a_trained_network_is_pruned_and_tuned(empty_folder, capsys):
    assert run("train", "--epochs", "2") == 0
    directory = empty_folder / "runs" / "digits-adam-1"
    trained = json.loads((directory / "report.json").read_text())["results"]["adam"]
    assert run("train", "--sparsity", "0.8", "--prune", str(directory), "--epochs", "1") == 0
    record = json.loads((empty_folder / "runs" / "digits-adam-2" / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["sparse"]
    assert plain["steps"] == ours["steps"] == 40
    # Both start where the first run has ended, far from where a new one would.
    assert min(plain["train_loss"], ours["train_loss"]) < trained["train_loss"] + 0.1
    assert ours["validation"] > trained["validation"] - 0.1
    capsys.readouterr()
    assert run("train", "--sparsity", "0.8", "--prune", "nowhere") == 1
    assert "nowhere" in one_line(capsys)


@pytest.fixture
def tiny_characters(monkeypatch):
    """The task char-lm with models and data of a size that trains in no time."""
    rng = np.random.default_rng(0)
    text = (np.cumsum(rng.integers(0, 2, 700)) % 5).astype(np.int32)
    windows = np.lib.stride_tricks.sliding_window_view(text, 13)
    arrays = {"x": windows[:, :-1], "y": windows[:, 1:]}

    def load(name, *, model=None, **_):
        rngs = nnx.Rngs(0)
        made: Any = (
            tasks.CharTransformer(5, context=12, width=16, depth=3, heads=2, rngs=rngs)
            if model in (None, "transformer")
            else tasks.CharRNN(5, cell=model, width=16, rngs=rngs)
        )
        data = tasks.ArrayLoader(arrays, 16, shuffle=True, seed=0, drop_last=True)
        held_out = tasks.ArrayLoader(arrays, 16)
        return tasks.Task(
            name=name, model=made, loss_fn=tasks.cross_entropy, train_data=data,
            eval_data=held_out, test_data=held_out, batch_size=16, learning_rate=1e-2, epochs=1,
        )  # fmt: skip

    monkeypatch.setattr(tasks, "load_task", load)


@pytest.mark.parametrize(
    ("options", "nearest"),
    [
        (("--model", "gru"), 1 - 1e-5),
        (("--model", "lstm", "--iterations", "2"), 0.9),
        (("--iterations", "1"), 0.5),
    ],
)
@pytest.mark.usefixtures("tiny_characters")
def test_highway_against_the_plain_backward_pass(empty_folder, capsys, options, nearest):
    arguments = ("train", "--task", "char-lm", "--backward", "highway", *options)
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "char-lm-adam-1"
    record = json.loads((directory / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["highway"]
    assert plain["steps"] == ours["steps"] and plain["updates"] == ours["updates"]
    assert nearest < ours["cosine"] < 1 + 1e-5 and "cosine" not in plain
    if nearest > 0.99:
        assert ours["train_loss"] == pytest.approx(plain["train_loss"], rel=1e-3)
    assert "highway(adam)" in out and "cosine" in out and "ms a step" in out
    assert "by highway backpropagation" in (directory / "report.md").read_text()


@pytest.mark.usefixtures("tiny_characters")
def test_a_transformer_needs_rounds(empty_folder, capsys):
    assert run("train", "--task", "char-lm", "--backward", "highway") == 2
    assert "--iterations 2" in one_line(capsys)


def test_choices_are_the_tasks():
    assert cli.TASKS == tasks.TASKS and cli.CHAR_MODELS == tasks.CHAR_MODELS
    assert issubclass(trainer.NonFiniteLossError, FloatingPointError)
