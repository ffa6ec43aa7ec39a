"""`priorityprop finetune` on eight devices and in two processes, beside one device."""

import json
import os
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from flax import nnx

from priorityprop_jax import models
from priorityprop_jax.cli import runs
from priorityprop_jax.core.paths import path_name
from tests.cli import test_decoders as alone
from tests.cli.test_decoders import one_line, report_of, run

tiny, place = alone.tiny, alone.place

PROCESS = """
import json, sys
from priorityprop_jax.cli.main import main
for arguments in json.loads(sys.argv[1]):
    assert main(arguments) == 0
"""


def tune(tiny, *options):
    # Of one length, so that little is compiled.
    return alone.tune(tiny, "--max-length", "8", *options)


def losses(directory):
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def assert_alike(one, other, rtol=1e-4, measure=np.max):
    """Losses and the model are the same to rounding."""
    assert len(losses(one)) > 5
    np.testing.assert_allclose(losses(other), losses(one), rtol=rtol)
    steps, again = (report_of(folder)["results"] for folder in (one, other))
    assert (steps["steps"], steps["updates"]) == (again["steps"], again["updates"])
    pair = (nnx.state(models.load_decoder(folder / "model")) for folder in (one, other))
    for a, b in zip(*map(jax.tree.leaves, pair), strict=True):
        assert measure(np.abs(b - a)) < 2e-3


@pytest.mark.parametrize(
    ("policy", "options"),
    [
        ("full", ()),
        ("suffix:2", ()),
        ("lora:2", ()),
        ("full", ("--accumulate", "2", "--head", "--pack")),
        ("suffix:2", ("--dtype", "bfloat16")),
        pytest.param("badam:1", (), marks=pytest.mark.once),
        pytest.param("badam:1", ("--state", "offload"), marks=pytest.mark.once),
    ],
)
def test_a_mesh_trains_as_one_device(place, tiny, monkeypatch, policy, options):
    train, found = runs.train_arm, {}

    def spy(directory, name, trainer, *more):
        results = train(directory, name, trainer, *more)
        arrays = {"params": trainer.params, "state": trainer.optimizer_state}
        for path, x in jax.tree_util.tree_leaves_with_path(arrays):
            found[path_name(path)] = x.shape, x.sharding.shard_shape(x.shape)
        return results

    monkeypatch.setattr(runs, "train_arm", spy)
    assert tune(tiny, "--policy", policy, *options) == 0
    assert tune(tiny, "--policy", policy, *options, "--mesh", "data=4,model=2") == 0
    name = f"reviews-{policy.replace(':', '')}"
    # bfloat16 has eight bits, and sums of other parts are rounded otherwise.
    within = (3e-2, np.mean) if "bfloat16" in options else ()
    assert_alike(place / "runs" / f"{name}-1", place / "runs" / f"{name}-2", *within)
    whole = [path for path, (shape, part) in found.items() if shape == part]
    assert 10 < len(found) and not [path for path in whole if "block" in path], whole
    if policy == "full" and not options:
        blocks = "params/blocks/block/query/kernel"
        assert found[blocks] == ((4, 8, 8), (4, 4, 2))
        assert found["params/embed/embedding"] == ((18, 8), (9, 2))
        assert found[blocks.replace("params", "state/1/0/mu")][1] == (4, 4, 2)


def stopped(tiny, monkeypatch, *options):
    """Interrupts a run in the middle."""
    writer, pressed = runs.metrics_writer, []

    def pressing(*arguments):
        write = writer(*arguments)

        def press(history):
            write(history)
            if not pressed:
                pressed.append(signal.raise_signal(signal.SIGINT))

        return press

    monkeypatch.setattr(runs, "metrics_writer", pressing)
    assert tune(tiny, *options) == 130
    monkeypatch.setattr(runs, "metrics_writer", writer)


def in_two_processes(*commands):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(sys.path)}
    environment |= {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    environment.pop("JAX_NUM_CPU_DEVICES", None)
    both = []
    for i in range(2):
        joined = ["--coordinator", address, "--processes", "2", "--process", str(i)]
        given = [[*map(str, commands[0]), *joined], *(list(map(str, c)) for c in commands[1:])]
        command = [sys.executable, "-c", PROCESS, json.dumps(given)]
        both.append(
            subprocess.Popen(
                command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True,
            )
        )  # fmt: skip
    try:
        said = [process.communicate(timeout=300)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], "\n\n".join(said)
    return said


@pytest.mark.once
def test_two_processes_train_as_one_device_and_go_on_with_a_run_of_eight(
    place, tiny, capsys, monkeypatch
):
    options = ("--policy", "suffix:2")
    one, other, fresh = (place / "runs" / f"reviews-suffix2-{i}" for i in (1, 2, 3))
    assert tune(tiny, *options) == 0
    stopped(tiny, monkeypatch, "--mesh", "data=4,model=2", *options)
    assert 0 < len(losses(other)) < len(losses(one))
    with monkeypatch.context() as changed:
        changed.setattr(jax, "device_count", lambda: 1)
        capsys.readouterr()
        assert run("finetune", "--resume", other) == 2
        assert "--mesh sets another" in one_line(capsys)
    new = [
        "finetune", "--model", tiny, "--data", "reviews.csv", "--batch-size", "8",
        "--learning-rate", "0.02", "--epochs", "2", "--max-length", "8", *options,
        "--mesh", "data=2",
    ]  # fmt: skip
    first, second = in_two_processes(["finetune", "--resume", other, "--mesh", "data=2"], new)
    assert "dev loss" in first and "dev loss" not in second.partition("writing")[0]
    assert_alike(one, other)
    assert_alike(one, fresh)
    assert {path.name for path in fresh.iterdir()} == {path.name for path in one.iterdir()}


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (("--mesh", "rows=8"), 2, "'rows=8' is not a mesh such as data=4,model=2"),
        (("--mesh", "data=2,data=4"), 2, "is not a mesh"),
        (("--mesh", "data=3"), 2, "of 3 devices, and there are 8"),
        (("--mesh", "data=8", "--batch-size", "12"), 2, "12 cannot be split over data=8"),
        (("--processes", "2"), 2, "need --coordinator"),
    ],
)
def test_a_mesh_that_does_not_fit_is_told_in_one_line(place, tiny, capsys, options, code, said):
    assert tune(tiny, *options) == code
    assert said in capsys.readouterr().err.strip().splitlines()[-1]
    assert not (place / "runs").exists()
