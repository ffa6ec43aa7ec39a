"""Names of leaves: the words in which all wings speak of a parameter."""

from __future__ import annotations

from typing import Any

import jax

Path = tuple[Any, ...]


def path_name(path: Path) -> str:
    """Joins a key path of `jax.tree_util` by ``/``; ``"params"`` for that of a single array.

    The trailing ``.value`` that `flax.nnx` variables add is left out, as it is there when an
    optimizer is initialised and gone when it updates.
    """
    if path and isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "value":
        path = path[:-1]
    return "/".join(jax.tree_util.keystr((entry,), simple=True) for entry in path) or "params"
