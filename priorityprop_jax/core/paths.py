"""Names of leaves: the words in which all wings speak of a parameter."""

from __future__ import annotations

from typing import Any

import jax

Path = tuple[Any, ...]


def path_name(path: Path) -> str:
    """Joins a key path of `jax.tree_util` by ``/``.

    The trailing ``.value`` that `flax.nnx` variables add is left out, as it is there when an
    optimizer is initialised and gone when it updates.

    Args:
      path: a key path, as `jax.tree_util.tree_flatten_with_path` gives it.

    Returns:
      The name; ``"params"`` for the empty path of a tree that is a single array.

    Example:
      >>> import jax
      >>> from priorityprop_jax.core.paths import path_name
      >>> paths, _ = jax.tree_util.tree_flatten_with_path({"encoder": [{"kernel": 0.0}]})
      >>> path_name(paths[0][0])
      'encoder/0/kernel'
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(str(_key(entry)) for entry in path) or "params"


def _key(entry: Any) -> Any:
    for attribute in ("key", "name", "idx"):
        if hasattr(entry, attribute):
            return getattr(entry, attribute)
    return entry
