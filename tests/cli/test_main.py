"""The command, run as a user runs it: in an empty folder, with right and wrong arguments."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

import priorityprop_jax
from priorityprop_jax.cli import main as cli
from priorityprop_jax.cli import plan, runs
from priorityprop_jax.cli import report as cli_report
from priorityprop_jax.training.history import History
from priorityprop_jax.training.loader import ArrayLoader

pytestmark = pytest.mark.once

DIGITS = ("train", "--method", "priorityprop")
FILES = {"config.json", "metrics.jsonl", "losses.png", "report.json", "report.md", "checkpoint"}


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
    assert run(*DIGITS, "--epochs", "3", "--budget", "0.5", "--batch-size", "16") == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-priorityprop-1"
    assert {path.name for path in directory.iterdir()} == FILES | {"priorities.png"}
    assert "layers/0/kernel" in out and "100.0%" in out and "adam" in out
    results = json.loads((directory / "report.json").read_text())["results"]
    # Half of the budget: half of the steps for the plain arm, and the same updates for both
    assert results["adam"]["steps"] == 120 and results["priorityprop"]["steps"] == 243
    assert results["adam"]["updates"] == 720
    assert results["priorityprop"]["updates"] == pytest.approx(243 * 3, abs=9)
    assert results["priorityprop"]["best_validation"] > 0.5
    lines = records(directory)
    assert [x["step"] for x in lines if x["arm"] == "adam" and x["kind"] == "step"] == [
        *range(1, 121)
    ]
    assert sum(x["kind"] == "eval" for x in lines if x["arm"] == "priorityprop") == 3
    spent = sum(x["updates"] for x in lines if x["kind"] == "step")
    assert spent == results["adam"]["updates"] + results["priorityprop"]["updates"]
    written = (directory / "report.md").read_text()
    assert "| priorityprop |" in written and "](losses.png)" in written
    assert "](priorities.png)" in written and "by priority, at the same budget" in written

    assert run("report", str(directory)) == 0
    again = capsys.readouterr().out
    assert again.strip() in out
    assert run("train", "--resume", str(directory)) == 1  # it is finished
    assert "is finished" in capsys.readouterr().err


def test_the_run_goes_where_it_is_told(empty_folder):
    for number in ("1", "2"):  # a second run does not touch the first
        assert run(*DIGITS, "--epochs", "1", "--out", "a/b") == 0
        directory = empty_folder / "a" / "b" / f"digits-priorityprop-{number}"
        assert {path.name for path in directory.iterdir()} == FILES | {"priorities.png"}
    assert not (empty_folder / "runs").exists()


def test_a_plan(empty_folder, capsys):
    assert run("plan", "--task", "digits", "--batch-size", "8", "--memory", "1GiB") == 0
    out = capsys.readouterr().out
    assert "suffix(1), all but layers/0" in out and "fits" in out and not list(Path().iterdir())
    assert run("plan", "--task", "digits", "--milliseconds", "1e-6", "--out", "a/b") == 0
    assert capsys.readouterr().out.count(" no\n") == 3
    assert {path.name for path in Path("a/b").iterdir()} == {"plan.json", "plan.png"}
    written = json.loads(Path("a/b/plan.json").read_text())
    assert written["task"] == "digits" and written["choices"][0]["share"] == 1
    assert run("plan", "--task", "digits", "--out", "a/b/plan.json") == 1
    assert "plan.json" in one_line(capsys)


@pytest.mark.parametrize(
    ("text", "bytes_"),
    [("4GiB", 4 * 2**30), ("500MB", 5e8), ("1.5 kB", 1500), ("1e9", 1e9), ("2KiB", 2048)],
)
def test_sizes(text, bytes_):
    assert plan.size(text) == bytes_


def test_help_and_version(capsys):
    assert run("--version") == 0
    assert capsys.readouterr().out == f"priorityprop {priorityprop_jax.__version__}\n"
    for command in ("train", "finetune", "plan", "report"):
        assert run(command, "--help") == 0
        shown = capsys.readouterr().out
        assert "None" not in shown and "False" not in shown and "--traceback" in shown
    assert run("train", "--help") == 0
    out = capsys.readouterr().out
    assert "(default: muon)" in out and "(default: 0)" in out and "(default: runs)" in out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "COMMAND"),
        (("bench",), "bench"),
        (("train", "--method", "magic"), "magic"),
        (("plan", "--memory", "lots"), "'lots' is not a size such as 4GiB"),
        (("plan", "--memory", "0GiB"), "'0GiB' is not a size"),
        (("plan", "--milliseconds", "0"), "'0' is not a number above 0"),
        (("train", "--budget", "lots"), "lots"),
        (("train", "--budget", "-1"), "-1"),
        (("train", "--budget", "nan"), "nan"),
        (("train", "--budget", "1.5"), "1.5"),
        (("train", "--epochs", "0"), "'0' is not a whole number from 1 on"),
        (("train", "--batch-size", "0"), "0"),
        ((*DIGITS, "--batch-size", "5000"), "5000"),
        (("train", "--seed", "-3"), "-3"),
        (("train", "--learning-rate", "0"), "'0' is not a number above 0"),
        (("train", "--optimizer", "magic"), "magic"),
        ((*DIGITS, "--budget", "5"), "raise total_budget"),
        ((*DIGITS, "--budget", "7000"), "raise max_updates"),
        ((*DIGITS, "--min-updates", "9", "--max-updates", "3"), "more than max_updates"),
        ((*DIGITS, "--max-updates", "5"), "full budget"),
        (("train", "--budget", "9"), "muon needs a share"),
        (("train", "--batch-size", "50000"), "lower batch_size"),
        (
            ("train", "--optimizer", "sgd"),
            "--optimizer is of priorityprop and meprop and sparse: a",
        ),
        ((*DIGITS, "--seeds", "2"), "--seeds is of muon: add --method muon"),
        (("train", "--k", "20"), "--k is of meprop: add --method meprop"),
        (("train", "--sparse-method", "rigl"), "--sparse-method is of sparse: add --method sparse"),
        (
            ("train", "--method", "sparse", "--budget", "0.5"),
            "--budget is of muon and priorityprop",
        ),
        (("train", "--method", "meprop", "--min-updates", "2", "--k", "9"), "is of priorityprop"),
        (("train", "--method", "meprop"), "--k"),
        (("train", "--method", "meprop", "--k", "20", "--budget", "0.1"), "either"),
        (("train", "--method", "meprop", "--budget", "20"), "either"),
        (("train", "--method", "meprop", "--k", "0"), "0"),
        (("train", "--method", "meprop", "--k", "1.5"), "1.5"),
        (("train", "--method", "meprop", "--k", "129"), "128 output features of layer"),
        (("train", "--method", "sparse"), "needs a --sparsity"),
        (("train", "--method", "sparse", "--sparsity", "1"), "below 1"),
        (("train", "--method", "sparse", "--sparsity", "nan"), "nan"),
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
    assert "damaged" in one_line(capsys)
    (run_folder / "config.json").write_text('{"command": "train"}')
    assert run("report", "broken") == 1
    assert "not finished: priorityprop train --resume broken" in one_line(capsys)
    for text in ("{", "{}", "[]", '{"command": "train", "ledger": 3}'):
        (run_folder / "report.json").write_text(text)
        assert run("report", "broken") == 1
        assert "damaged" in one_line(capsys)


@pytest.mark.parametrize("arguments", [("--help",), ("models", "list"), ("report", "run")])
def test_a_pipe_that_nobody_reads_on_ends_quietly(empty_folder, capfd, monkeypatch, arguments):
    for name in ("config.json", "report.json"):
        (empty_folder / "run").mkdir(exist_ok=True)
        (empty_folder / "run" / name).write_text('{"command": "train"}')
    monkeypatch.setattr(cli_report.train, "report", lambda record: "a line\n" * 9)
    reader, writer = os.pipe()
    os.close(reader)
    with open(writer, "w") as closed:
        monkeypatch.setattr(sys, "stdout", closed)
        assert run(*arguments) == 141
    assert capfd.readouterr().err == ""


def test_without_any_output_it_works_too(empty_folder, capfd, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)
    assert run("models", "list") == 0
    assert run("report", "nowhere") == 1
    assert "not a run" in capfd.readouterr().err


def test_an_interruption_of_parsing_is_one_line(capsys, monkeypatch):
    def pressed():
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "_parser", pressed)
    assert run("report", "run") == 130
    assert one_line(capsys) == "priorityprop: interrupted"


def test_only_new_records_are_written(empty_folder):
    path, history = Path("metrics.jsonl"), History()
    path.write_text('{"arm": "b", "step": 9}\n{"arm": "a", "step": 7}\n{"arm": "a", "st')
    write_new = runs.metrics_writer(path, "a")
    for epoch in (1, 2, 3):
        history.steps += [{"step": 2 * epoch - 1, "loss": 1.0}, {"step": 2 * epoch, "loss": 1.0}]
        history.evals.append({"step": 2 * epoch, "epoch": epoch})
        before = path.stat()
        write_new(history)
        assert (path.stat().st_ino == before.st_ino) == (epoch > 1)  # appended to, not replaced
    found = [(x["arm"], x.get("kind"), x["step"]) for x in records(empty_folder)]
    steps = [("step", 2 * e - 1, "step", 2 * e, "eval", 2 * e) for e in (1, 2, 3)]
    mine = [("a", *s[i : i + 2]) for s in steps for i in (0, 2, 4)]
    assert found == [("b", None, 9), *mine]


def test_a_loss_that_is_not_finite(empty_folder, capsys):
    assert run(*DIGITS, "--optimizer", "sgd", "--learning-rate", "1e30", "--epochs", "1") == 1
    error = one_line(capsys)
    assert "loss" in error and "learning rate" in error
    assert (empty_folder / "runs" / "digits-priorityprop-1" / "config.json").exists()


def test_the_traceback_is_shown_where_it_is_asked_for(empty_folder, capsys):
    assert run("report", "nowhere", "--traceback") == 1
    error = capsys.readouterr().err
    assert "Traceback" in error and error.strip().splitlines()[-1].startswith("priorityprop: ")
    (empty_folder / "broken").mkdir()
    (empty_folder / "broken" / "report.json").write_text("{")
    assert run("report", "broken", "--traceback") == 1
    assert "JSONDecodeError" in capsys.readouterr().err  # the cause is kept


def test_a_full_disk_loses_nothing(empty_folder, capsys, monkeypatch):
    assert run(*DIGITS, "--epochs", "1") == 0
    kept = {p: p.read_bytes() for p in (empty_folder / "runs").rglob("*") if p.is_file()}
    capsys.readouterr()

    def full(self, *_, **__):
        self.write_bytes(b"{")
        raise OSError(28, "No space left on device", str(self))

    monkeypatch.setattr(Path, "write_text", full)
    assert run(*DIGITS, "--epochs", "1") == 1
    assert "No space left on device" in one_line(capsys)
    for path, content in kept.items():
        assert path.read_bytes() == content
    assert not [p for p in (empty_folder / "runs").rglob(".*") if p.is_file()]


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    assert run(*DIGITS) == 1
    assert 'pip install -e ".[demo]"' in one_line(capsys)


def test_an_interrupted_run_goes_on_to_the_same_end(empty_folder, capsys, monkeypatch):
    assert run(*DIGITS, "--epochs", "3") == 0
    capsys.readouterr()
    whole = empty_folder / "runs" / "digits-priorityprop-1"

    # Ctrl-C in the middle of the second arm's second epoch
    plain, seen = ArrayLoader.__iter__, [0]

    def interrupt(loader):
        for batch in plain(loader):
            seen[0] += loader.shuffle
            if seen[0] == 120 + 40 + 13:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(ArrayLoader, "__iter__", interrupt)
    assert run(*DIGITS, "--epochs", "3") == 130
    monkeypatch.setattr(ArrayLoader, "__iter__", plain)
    directory = empty_folder / "runs" / "digits-priorityprop-2"
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
    command = [sys.executable, "-m", "priorityprop_jax.cli.main"]
    process = subprocess.Popen(
        [*command, *DIGITS, "--epochs", "400"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    directory = empty_folder / "runs" / "digits-priorityprop-1"
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
        [*command, "train", "--resume", str(directory)], capture_output=True, text=True, timeout=240
    )
    assert finished.returncode == 0, finished.stderr
    assert "Traceback" not in finished.stderr and "%|" not in finished.stderr  # no bar in a pipe
    steps = [x["step"] for x in records(directory) if x["arm"] == "adam" and x["kind"] == "step"]
    assert steps == [*range(1, len(steps) + 1)]


@pytest.mark.parametrize("option", [("--k", "20"), ("--budget", "0.1")])
def test_meprop_against_the_plain_backward_pass(empty_folder, capsys, option):
    assert run("train", "--method", "meprop", *option, "--epochs", "3") == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-meprop-1"
    # With one k for all there is nothing to see in the picture.
    pictures = set() if option[0] == "--k" else {"priorities.png"}
    assert {path.name for path in directory.iterdir()} == FILES | pictures
    record = json.loads((directory / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["meprop"]
    assert plain["steps"] == ours["steps"] == 120 and ours["best_validation"] > 0.5
    # Of two hidden layers of 128, and all 10 features of the output layer
    kept = sum(slot["features"] for slot in record["ledger"]["slots"])
    assert 0 < kept <= 120 * (2 * 20 + 10)
    assert "by meProp" in (directory / "report.md").read_text()
    assert run("report", str(directory)) == 0
    assert capsys.readouterr().out.strip() in out


@pytest.mark.parametrize("method", ["static", "rigl"])
def test_sparse_weights_against_dense_ones(empty_folder, capsys, monkeypatch, method):
    arguments = ("train", "--method", "sparse", "--sparsity", "0.8", "--epochs", "3")
    arguments += ("--sparse-method", method)
    assert run(*arguments) == 0
    out = capsys.readouterr().out
    directory = empty_folder / "runs" / "digits-sparse-1"
    assert {path.name for path in directory.iterdir()} == FILES
    record = json.loads((directory / "report.json").read_text())
    plain, ours = record["results"]["adam"], record["results"]["sparse"]
    assert plain["steps"] == ours["steps"] == 120 and ours["best_validation"] > 0.5
    # A fifth of two hidden layers, and all of the output layer
    kept = [layer["nonzeros"] for layer in record["layers"]]
    assert kept == [round(64 * 128 / 5), round(128 * 128 / 5), 1280]
    assert "where the non-zeros are" in out
    assert "## Where the non-zeros are" in (directory / "report.md").read_text()
    assert run("report", str(directory)) == 0
    assert capsys.readouterr().out.strip() in out
    # Interrupted while places still move, and gone on with
    plain_iter, seen = ArrayLoader.__iter__, [0]

    def interrupt(loader):
        for batch in plain_iter(loader):
            seen[0] += loader.shuffle
            if seen[0] == 120 + 60:
                signal.raise_signal(signal.SIGINT)
            yield batch

    monkeypatch.setattr(ArrayLoader, "__iter__", interrupt)
    assert run(*arguments) == 130
    monkeypatch.setattr(ArrayLoader, "__iter__", plain_iter)
    again = empty_folder / "runs" / "digits-sparse-2"
    assert run("train", "--resume", str(again)) == 0
    assert without_seconds(again) == without_seconds(directory)


def test_programs_are_kept_from_run_to_run(empty_folder, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(empty_folder))
    before = jax.config.jax_compilation_cache_dir
    try:
        assert run("train", "--resume", "nowhere") == 1
        assert jax.config.jax_compilation_cache_dir == f"{empty_folder}/priorityprop_jax/programs"
        monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
        jax.config.update("jax_compilation_cache_dir", "mine")
        assert run("train", "--resume", "nowhere") == 1
        assert jax.config.jax_compilation_cache_dir == "mine"
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
