"""A model's tensors in files of safetensors: read one at a time, written all or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from priorityprop_jax.models.files import DataError, needed, package, read_json, written

_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_FLOATS = ("F16", "BF16", "F32", "F64")


class _Tensors(Mapping[str, np.ndarray]):
    """Tensors by name, each read as it is asked for, from the open file that holds it."""

    def __init__(self, files: Mapping[str, Any]):
        self._files = files

    def __getitem__(self, name: str) -> np.ndarray:
        return self._files[name].get_tensor(name).astype(np.float32, copy=False)

    def __contains__(self, name: object) -> bool:
        return name in self._files  # without reading it

    def __iter__(self) -> Iterator[str]:
        return iter(self._files)

    def __len__(self) -> int:
        return len(self._files)


def read_tensors(directory: str | os.PathLike[str]) -> Mapping[str, np.ndarray]:
    """Opens the floating-point tensors of a model's folder.

    Args:
      directory: holds `model.safetensors`, or `model.safetensors.index.json` and the files that it
        names. Nothing is unpickled.

    Returns:
      The tensors by name, as float32; each is read when it is asked for, and not kept. Those of
      other types, such as numbers of positions, are left out.

    Raises:
      DataError: a file is missing or damaged, or the weights are in pickles.
      ImportError: the package `safetensors` is not installed.

    Example:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     write_tensors(f"{folder}/model.safetensors", {"a": np.ones(2, np.float16)})
      ...     read_tensors(folder)["a"]
      array([1., 1.], dtype=float32)
    """
    directory = Path(directory)
    pickles = sorted(path.name for path in directory.glob("pytorch_model*.bin"))
    if pickles and not any((directory / name).is_file() for name in (_WHOLE, _INDEX)):
        raise DataError(
            f"{str(directory)!r} holds its weights as a pickle alone, {pickles[0]}, which is not "
            f"opened here; load it with transformers, whose save_pretrained writes {_WHOLE}"
        )
    path = needed(directory, _WHOLE, _INDEX)
    if path.name == _WHOLE:
        file, names = _opened(path)
        return _floats(dict.fromkeys(names, file))
    places = read_json(path).get("weight_map")
    if not isinstance(places, dict) or not all(isinstance(at, str) for at in places.values()):
        raise DataError(f"{path} is damaged: no weight_map that gives the file of each tensor")
    shards = {}
    for shard in sorted(set(places.values())):
        if Path(shard).name != shard:
            raise DataError(f"{path} is damaged: {shard!r} is not the name of a file beside it")
        if not (directory / shard).is_file():
            raise DataError(f"{path} names {shard!r}, which is not there; get it as well")
        shards[shard] = _opened(directory / shard)
    for name, shard in places.items():
        if name not in shards[shard][1]:
            raise DataError(
                f"{path} is damaged: it says that {name!r} is in {shard}, which lacks it"
            )
    return _floats({name: shards[shard][0] for name, shard in places.items()})


def write_tensors(
    path: str | os.PathLike[str],
    tensors: Mapping[str, np.ndarray],
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes tensors to one file of safetensors, under a temporary name until it is whole.

    Args:
      path: of the file, in a folder that is there.
      tensors: arrays by name; each keeps its type.
      metadata: texts for the file's header, beside the `format` that `transformers` asks for.

    Raises:
      DataError: the file cannot be written.
      ImportError: the package `safetensors` is not installed.

    See `read_tensors` for an example.
    """
    path = Path(path)
    safetensors = package("safetensors", f"{path.name} needs the package safetensors", "finetune")
    from safetensors.numpy import save_file

    # It takes the bytes as they lie there.
    whole = {name: np.asarray(tensor, order="C") for name, tensor in tensors.items()}
    about = {"format": "pt", **(metadata or {})}
    try:
        written(path, lambda temporary: save_file(whole, temporary, about))
    except (OSError, safetensors.SafetensorError) as error:
        raise DataError(f"{path} cannot be written: {_line(error)}") from error


def _opened(path: Path) -> tuple[Any, frozenset[str]]:
    """A file whose header has been checked against its size, and the names of its tensors."""
    safetensors = package("safetensors", f"{path.name} needs the package safetensors", "finetune")
    try:
        file = safetensors.safe_open(path, "numpy")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {_line(error)}") from error
    except safetensors.SafetensorError as error:
        line = _line(error)
        raise DataError(f"{path} is damaged: not a whole safetensors file ({line})") from error
    return file, frozenset(file.keys())


def _floats(files: Mapping[str, Any]) -> _Tensors:
    kinds = {name: file.get_slice(name).get_dtype() for name, file in files.items()}
    return _Tensors({name: file for name, file in files.items() if kinds[name] in _FLOATS})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())
