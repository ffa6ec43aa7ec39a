"""A run that is killed at any moment, of a step or of a save, goes on as if it had not been."""

from __future__ import annotations

import json
import os
import random
import resource
import subprocess
import sys
import time

import pytest

from tests.training.killed import STEPS, told, train
from tests.training.test_trainer import Loader, _assert_same, _batches, _pure, _state

KILLS = int(os.environ.get("PRIORITYPROP_KILLS", 1))  # of each kind; more of them by hand


@pytest.mark.once
@pytest.mark.parametrize("kind", STEPS)
def test_killed_at_any_moment(kind, tmp_path):
    whole = told(train(os.fspath(tmp_path / "whole"), kind))
    command = [sys.executable, "-m", "tests.training.killed", os.fspath(tmp_path / "run"), kind]
    chance = random.Random(kind)
    for kill in range(KILLS + 1):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        if kill < KILLS:
            for _ in range(chance.randrange(1, 20)):
                process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))  # a save takes about as long
            process.kill()
        said = process.communicate(timeout=100)[0].splitlines()
        if said and said[-1] != "alive":
            assert json.loads(said[-1]) == whole
            if kill < KILLS:
                (tmp_path / "run").rename(tmp_path / f"run-{kill}")  # and from the start
    assert json.loads(said[-1]) == whole


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
