"""Finds files of data and of weights, and proves by SHA-256 checksums that they are whole."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import importlib
import json
import os
import struct
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

ENV_VAR = "PRIORITYPROP_DATA"


def package(name: str, need: str, extra: str) -> Any:
    """Imports what one of the project's extras brings; the project itself is not on an index."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ImportError(f'{need}: pip install -e ".[{extra}]" in a checkout') from error


class DataError(OSError):
    """A data file is missing, damaged or out of reach; the message says what to do about it."""


@dataclasses.dataclass(frozen=True)
class DataFile:
    """One file with a public home.

    Attributes:
      names: file names under which it may lie in a local folder. A download gets the first one.
      urls: public homes that serve the same bytes, best first.
      sha256: checksum of the bytes at the public home, in hexadecimal.
    """

    names: tuple[str, ...]
    urls: tuple[str, ...]
    sha256: str


def cache_folder() -> Path:
    """The folder that downloads go to: `$XDG_CACHE_HOME/priorityprop_jax`, or under `~/.cache`."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "priorityprop_jax"


def read_file(file: DataFile, *, data_dir: str | os.PathLike[str] | None = None) -> bytes:
    """The bytes of a file as its public home serves them, verified; downloaded if nowhere here.

    Args:
      file: what to find. A local `NAME.gz` of a home that serves plain `NAME` is decompressed
        before its checksum is taken.
      data_dir: the only folder to look in. By default the folder of `PRIORITYPROP_DATA` (if it is
        set), then the cache folder, then the public homes, which fill the cache.

    Raises:
      DataError: the file is missing from `data_dir`, damaged in a folder of the user's, or no
        public home gave it whole. What is damaged in the cache is downloaded anew.
    """
    named = (os.environ.get(ENV_VAR) or None) if data_dir is None else data_dir
    if named is not None:
        folder = Path(named).expanduser()
        if data_dir is None and not folder.is_dir():
            raise DataError(f"{ENV_VAR}={named!r} is not a folder; correct it or unset it")
        if paths := _find(file, folder):
            return _verified(paths[0], file)
        if data_dir is not None:
            raise DataError(
                f"no {' or '.join(file.names)} in {os.fspath(data_dir)!r}; get the file from "
                f"{file.urls[0]} and put it there, or leave data_dir out to download it"
            )
    for path in _find(file, cache_folder()):
        try:
            return _verified(path, file)
        except DataError:
            pass  # The cache is ours: a damaged copy there is worth no more than none.
    return _verified(_download(file, cache_folder()), file)


def gunzip(raw: bytes, *, source: str, advice: str = "") -> bytes:
    """Decompresses `raw`; a `DataError` that names `source` where it is no whole gzip stream."""
    try:
        return gzip.decompress(raw)
    except (EOFError, zlib.error, gzip.BadGzipFile, struct.error) as error:
        raise DataError(f"{source} is damaged: not a whole gzip file ({error}){advice}") from error


def needed(directory: Path, *names: str) -> Path:
    """The first of the files of a model that its folder holds."""
    if not directory.is_dir():
        raise DataError(f"{str(directory)!r} is not a folder; give the one of a model")
    for name in names:
        if (directory / name).is_file():
            return directory / name
    raise DataError(
        f"no {' or '.join(names)} in {str(directory)!r}; a model's folder holds config.json, "
        "model.safetensors (or its parts and their index), and the tokenizer's files"
    )


def written(path: Path, content: str | Callable[[Path], Any]) -> None:
    """Writes text, or what a function writes to a path; all or nothing, by a temporary name."""
    temporary = path.with_name(f".{path.stem}.{os.getpid()}{path.suffix}")
    try:
        if isinstance(content, str):
            temporary.write_text(content + "\n", encoding="utf-8")
        else:
            content(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(path: Path, default: dict[str, Any] | None = None) -> dict[str, Any]:
    """The object in a JSON file, or the default where there is no file."""
    if default is not None and not path.is_file():
        return default
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(value, dict):
        raise DataError(f"{path} is damaged: not a JSON object")
    return value


def _find(file: DataFile, folder: Path) -> list[Path]:
    return [folder / name for name in file.names if (folder / name).is_file()]


def _verified(path: Path, file: DataFile) -> bytes:
    advice = f"; delete it, then get it again from {file.urls[0]}"
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}") from error
    if path.suffix == ".gz" and not file.urls[0].endswith(".gz"):
        raw = gunzip(raw, source=str(path), advice=advice)
    found = hashlib.sha256(raw).hexdigest()
    if found != file.sha256:
        raise DataError(
            f"{path} is damaged or not the expected file: {len(raw)} bytes with SHA-256 {found}, "
            f"expected {file.sha256}{advice}"
        )
    return raw


def _download(file: DataFile, folder: Path) -> Path:
    """Downloads `file` into `folder` from the first public home that serves it whole."""
    name = file.names[0]
    need = f"name a folder that holds {name}, or to download it get the package pooch"
    pooch = package("pooch", need, "demo")
    downloader = pooch.HTTPDownloader(progressbar=sys.stderr.isatty(), chunk_size=1 << 16)
    known, failures = f"sha256:{file.sha256}", []
    for url in file.urls:
        try:
            # pooch writes to a temporary name in `folder`, and renames it once the checksum fits.
            return Path(pooch.retrieve(url, known, name, path=folder, downloader=downloader))
        except (OSError, ValueError) as error:
            failures.append(f"{url}: {_reason(error)}")
    raise DataError(
        f"could not download {name} ({'; '.join(failures)}); fetch it on a machine that can, and "
        f"put it at {folder / name}, or in a folder that data_dir or {ENV_VAR} names"
    )


def _reason(error: Exception) -> str:
    """A few words for what a download raised; the network's own messages run over many lines."""
    response = getattr(error, "response", None)
    if response is not None:
        return f"HTTP status {response.status_code}"
    if isinstance(error, ValueError):
        return "the checksum does not match"
    return getattr(error, "strerror", None) or type(error).__name__
