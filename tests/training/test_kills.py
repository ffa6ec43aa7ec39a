"""A run that is killed at any moment, of a step or of a save, goes on as if it had not been."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest

from tests.training import killed
from tests.training.test_trainer import Loader, _assert_same, _batches, _pure, _state

pytestmark = pytest.mark.usefixtures("quickly_compiled")

KILLS = int(os.environ.get("PRIORITYPROP_KILLS", 1))  # in each setting; more of them by hand
KINDS = {
    "alone": ("meprop", "lisa(1)"),
    "mesh": ("cached", "priority"),
    "processes": ("badam(1)",),
}
FAULTS = {"alone": (), "mesh": ("host",), "processes": ("loader@1",)}
if KILLS > 1:
    # Of a frozen prefix that is cached by example, several processes are refused.
    most = ("plain", "lisa(1)", "badam(1)", "priority", "suffix(1)", "meprop")
    KINDS = {where: most + ("cached",) * (where != "processes") for where in KINDS}
    FAULTS = {where: ("loader", "log", "host") for where in KINDS}
    FAULTS["processes"] += ("loader@0", "loader@1", "log@0", "log@1")


def start(folder, where, kinds, fault="none"):
    """The processes of a run, which go on with what is in the folder."""
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(sys.path),
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",
        "JAX_NUM_CPU_DEVICES": "8",
    }
    command = [sys.executable, "-m", "tests.training.killed", os.fspath(folder)]
    command += [",".join(kinds), fault]
    several = [[where]]
    if where == "processes":
        environment["JAX_ENABLE_COMPILATION_CACHE"] = "false"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            several = [[f"127.0.0.1:{free.getsockname()[1]}", process] for process in "01"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return [subprocess.Popen([*command, *more], env=environment, **pipes) for more in several]


def ended(processes):
    """What each said, and how it ended; none may hang."""
    try:
        said = [process.communicate(timeout=300) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(*pair, process.returncode) for pair, process in zip(said, processes, strict=True)]


def results(found):
    for _, err, code in found:
        assert code == 0, err[-3000:]
    return [json.loads(out.splitlines()[-1]) for out, _, _ in found]


def undisturbed(folder, where):
    if where == "processes" and KILLS > 1:
        return results(ended(start(folder, where, KINDS[where])))
    on = "mesh" if where == "processes" else where  # starts no process
    made = json.loads(json.dumps(killed.all_of(os.fspath(folder), KINDS[where], where=on)))
    return [made] * (1 + (where == "processes"))


def assert_same_results(found, whole, where):
    if where != "processes" or KILLS > 1:
        assert found == whole
    for one, other in zip(sum(found, []), sum(whole, []), strict=True):
        np.testing.assert_allclose(one[0], other[0], rtol=1e-5)  # sums have another order
        assert one[1] == other[1]


@pytest.mark.once
@pytest.mark.parametrize("where", KINDS)
def test_ended_at_any_moment(where, tmp_path):
    """By faults, and killed; of two processes one is, and the other ends by itself, and says so."""
    folder, chance = tmp_path / "run", random.Random(where)
    whole = undisturbed(tmp_path / "whole", where)
    kinds = KINDS[where]
    for number, fault in enumerate((*FAULTS[where], *["none"] * KILLS)):
        some = kinds if fault == "none" else [kinds[number % len(kinds)]]
        processes, victim, heard = start(folder, where, some, fault), None, []
        if fault == "none":
            victim = chance.randrange(len(processes))
            for _ in range(chance.randrange(1, killed.BATCHES * len(kinds))):
                heard.append(processes[victim].stdout.readline())
            time.sleep(chance.uniform(0, 0.05))  # a save takes about as long
            processes[victim].kill()
        since = time.monotonic()
        found = ended(processes)
        if heard:
            found[victim] = ("".join(heard) + found[victim][0], *found[victim][1:])
        codes = [code for _, _, code in found]
        print(where, some, fault, victim, codes, f"{time.monotonic() - since:.1f} s", flush=True)
        if not any(codes):  # it had come to its end
            assert_same_results(results(found), whole, where)
            folder.rename(tmp_path / f"run-{number}")  # and from the start
            continue
        for i, (out, err, code) in enumerate(found):
            if i == victim:
                assert code == -signal.SIGKILL
            elif "is gone" in err:
                assert code == 1 and "adds up" in out, err
            else:
                lost = "WorkerLostError: another process has ended" in err
                assert lost and code == 3 or "JAX distributed" in err and code == -6, err
    assert_same_results(results(ended(start(folder, where, kinds))), whole, where)


class TestAFullDisk:
    """A limit on the size of files is what a test can have of it."""

    @pytest.fixture
    def full(self):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)

        def limit(size):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))

        yield limit
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_loses_nothing(self, full, tmp_path):
        whole, trainer = _pure(), _pure(checkpoint_dir=tmp_path)
        whole.train(Loader(_batches()), 3)
        trainer.train(Loader(_batches()), 1)
        full(100)
        with pytest.raises((OSError, ValueError)):  # Orbax and its formats raise either
            trainer.train(Loader(_batches()), 1)
        full(resource.getrlimit(resource.RLIMIT_FSIZE)[1])
        # In memory all is as it was after the last step, and on disk as before.
        assert len(trainer.history.steps) == 16
        again = _pure(checkpoint_dir=tmp_path)
        again.train(Loader(_batches()), 3, resume_from=tmp_path)
        _assert_same(_state(again), _state(whole))
        assert again.history.loss == whole.history.loss
