"""A model as a chain of stages, so that a step can start at the output of a frozen prefix.

Everything is pure: parameters and state go in, outputs and new state come out.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
from flax import nnx

from priorityprop_jax.core.modules import (
    Modes,
    attributes,
    check_unchanged,
    modes,
    trainable,
    warn_off,
)
from priorityprop_jax.core.slots import Slots, by_layer
from priorityprop_jax.partial.stack import Stack

# (params, state, x) -> (y, new_state)
Apply = Callable[[Any, Any, Any], tuple[Any, Any]]


@dataclasses.dataclass(eq=False)
class Stages:
    """A model as a chain of named, pure stages; what one returns, the next is given.

    What passes between two stages is any pytree, such as `(hidden, mask)`. A `Trainer` takes a
    chain for a model; its `loss_fn` is given a function from inputs to outputs, to be called once.

    Attributes:
      names: of the stages, in forward order.
      applies: for every stage `(params, state, x) -> (y, new_state)` in training mode, pure and
        traceable.
      eval_applies: the same in evaluation mode.
      params: by stage name a pytree of trainable arrays, `{}` for none.
      state: by stage name a pytree of everything else that a run reads or changes (random
        streams, batch statistics), `{}` for none.
      write_back: puts params and state of all stages back to where they came from, or None.

    Raises:
      TypeError, ValueError: there are no stages; a name is no string, occurs twice, is empty or has
        a ``/`` in it; or functions, params or state do not fit the names.

    Example:
      >>> from priorityprop_jax.partial.stages import chain, function_stage
      >>> stages = chain(
      ...     function_stage("double", lambda params, x: params["factor"] * x, {"factor": 2.0}),
      ...     function_stage("shift", lambda params, x: x + params["offset"], {"offset": 1.0}))
      >>> hidden, state = stages.run(stages.params, stages.state, 3.0, stop=1)
      >>> y, _ = stages.run(stages.params, state, hidden, start=1)
      >>> hidden, y
      (6.0, 7.0)
    """

    names: tuple[str, ...]
    applies: tuple[Apply, ...]
    eval_applies: tuple[Apply, ...]
    params: dict[str, Any]
    state: dict[str, Any]
    write_back: Callable[[Any, Any], None] | None = None

    def __post_init__(self):
        if not self.names:
            raise ValueError("there are no stages; give at least one")
        for name in self.names:
            if not isinstance(name, str):
                raise TypeError(f"the name of a stage must be a string, got {name!r}")
            if not name or "/" in name:
                raise ValueError(
                    "the name of a stage must not be empty or have a '/' in it, which separates "
                    f"the parts of a parameter's name, got {name!r}"
                )
        if twice := sorted({name for name in self.names if self.names.count(name) > 1}):
            raise ValueError(f"stages must have different names, got {', '.join(twice)} twice")
        for field in ("applies", "eval_applies"):
            applies = getattr(self, field)
            if len(applies) != len(self.names) or not all(map(callable, applies)):
                raise ValueError(
                    f"{field} must have one function (params, state, x) -> (y, new_state) for each "
                    f"of {', '.join(self.names)}; got {applies!r}"
                )
        self._check_trees(self.params, self.state)

    def __len__(self) -> int:
        return len(self.names)

    def run(
        self,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        x: Any,
        *,
        start: int = 0,
        stop: int | None = None,
        train: bool = True,
    ) -> tuple[Any, dict[str, Any]]:
        """Runs the stages `start`, ..., `stop - 1` (by default all), in training mode or not.

        Stage `start` is given `x`. Returns what the last of them returns (`x` if none runs), and
        the new state of all stages.
        """
        stop = len(self) if stop is None else stop
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"start and stop must satisfy 0 <= start <= stop <= {len(self)} stages, got "
                f"start={start}, stop={stop}"
            )
        self._check_trees(params, state)
        new_state = dict(state)
        applies = self.applies if train else self.eval_applies
        for name, apply in zip(self.names[start:stop], applies[start:stop], strict=True):
            x, new_state[name] = apply(params[name], state[name], x)
        return x, new_state

    # What a trainer asks of a model.

    def split(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """The parameters and the state, by stage name, as they are now."""
        return self.params, self.state

    def join(self, params: dict[str, Any], rest: dict[str, Any]) -> None:
        """Keeps trained parameters and state, and writes them back to where they came from."""
        self._check_trees(params, rest)
        self.params, self.state = params, rest
        if self.write_back is not None:
            self.write_back(params, rest)

    def loss(
        self, loss_fn: Any, params: Any, rest: Any, batch: Any, *, x: Any = None, start: int = 0
    ) -> tuple[Any, dict[str, Any]]:
        """What a loss returns for the stages from `start` on in training mode, and the new state.

        Stage `start` is given `x`, what the stages before it make of ``batch["x"]``; by default
        stage 0 is given what `loss_fn` calls the model with. `loss_fn` must call it once, and where
        `x` is given, with ``batch["x"]`` itself.
        """
        states = []

        def model(inputs: Any) -> Any:
            if x is not None:
                given, expected = (list(map(id, jax.tree.leaves(t))) for t in (inputs, batch["x"]))
                if given != expected:
                    raise ValueError(
                        "loss_fn must call the model with batch['x'] as it is, which frozen stages "
                        "have been run on already; change the data in the loader or in a stage"
                    )
                inputs = x
            y, state = self.run(params, rest, inputs, start=start)
            states.append(state)
            return y

        result = loss_fn(model, batch)
        if len(states) != 1:
            raise ValueError(f"loss_fn must call the model once, but did {len(states)} times")
        return result, states[0]

    def evaluator(self, params: Mapping[str, Any], rest: Mapping[str, Any]) -> Callable[[Any], Any]:
        """The model in evaluation mode: a function from inputs to outputs."""
        return lambda x: self.run(params, rest, x, train=False)[0]

    def _check_trees(self, params: Any, state: Any) -> None:
        for field, tree in (("params", params), ("state", state)):
            if not isinstance(tree, Mapping):
                raise TypeError(f"{field} must be a dict by stage name, got {type(tree).__name__}")
            missing = ", ".join(name for name in self.names if name not in tree)
            unknown = ", ".join(str(name) for name in tree if name not in self.names)
            if missing or unknown:
                raise ValueError(
                    f"{field} must have an entry, {{}} for none, for each of the stages; missing: "
                    f"{missing or 'none'}, unknown: {unknown or 'none'}"
                )


def chain(*parts: Stages) -> Stages:
    """One chain out of several, in this order.

    Args:
      *parts: chains of any kind: an embedding as `nnx_stages`, a head as `function_stage`.

    Returns:
      The stages of all. Its `write_back` writes to those parts that have one.

    Raises:
      TypeError, ValueError: a part is no `Stages`, there is none, two have a stage of the same
        name, or an array of one `nnx` part is held by another one (tied weights).
    """
    for part in parts:
        if not isinstance(part, Stages):
            raise TypeError(f"chain takes Stages, got {type(part).__name__}")
    written = [part for part in parts if part.write_back is not None]
    owners: dict[int, str] = {}
    for part in written:
        trees = {"parameters": part.params, "random streams or state": part.state}
        for kind, name in itertools.product(trees, part.names):
            for x in jax.tree.leaves(trees[kind][name]):
                owner = owners.setdefault(id(x), name) if isinstance(x, jax.Array) else name
                if owner != name:
                    raise ValueError(
                        f"the stages {owner!r} and {name!r} share {kind}, which cannot be trained "
                        "by halves: put both uses into one stage, or give each its own (a copy, or "
                        "rngs.fork())"
                    )

    def write_back(params: dict[str, Any], state: dict[str, Any]) -> None:
        for part in written:
            part.join(*({name: tree[name] for name in part.names} for tree in (params, state)))

    return Stages(
        names=tuple(name for part in parts for name in part.names),
        applies=tuple(apply for part in parts for apply in part.applies),
        eval_applies=tuple(apply for part in parts for apply in part.eval_applies),
        params={name: part.params[name] for part in parts for name in part.names},
        state={name: part.state[name] for part in parts for name in part.names},
        write_back=write_back if written else None,
    )


def function_stage(
    name: str,
    apply: Callable[[Any, Any], Any],
    params: Any = None,
    *,
    eval_apply: Callable[[Any, Any], Any] | None = None,
) -> Stages:
    """A chain of one pure function, such as the ``apply`` of a Linen module.

    Args:
      name: of the stage.
      apply: `(params, x) -> y`.
      params: a pytree of arrays; by default there are none.
      eval_apply: the same in evaluation mode; by default `apply`.

    Returns:
      The chain, without state. For an example see `Stages`.
    """

    def stateless(function: Any) -> tuple[Apply]:
        if not callable(function):
            raise TypeError(f"apply must be a function (params, x) -> y, got {function!r}")
        return (lambda params, state, x: (function(params, x), state),)

    applies = stateless(apply), stateless(eval_apply or apply)
    return Stages((name,), *applies, {name: {} if params is None else params}, {name: {}})


def nnx_stages(modules: Sequence[tuple[str, Any]]) -> Stages:
    """A chain of `flax.nnx` modules.

    The parameters are the `nnx.Param` variables of floating-point numbers, nested plain dicts of
    arrays; the state is all other variables but `nnx.Intermediate`. The arrays are those of the
    modules, not copies: copy them before a step that donates them. Training is in the modes that
    the modules have now, so that a BatchNorm after `.eval()` keeps its statistics; evaluation is
    with all in `.eval()`. The modules themselves keep their modes. What one assigns to its
    parameters while it runs is dropped.

    Args:
      modules: pairs of a name and a module `x -> y`, or a function without parameters.

    Returns:
      The chain. Its `write_back` puts parameters and state into the modules.

    Raises:
      TypeError, ValueError: as `Stages` does; or a stage is no pair, no module and no function, or
        two share a variable, such as tied weights; or, when it runs, a module makes variables or
        changes its plain attributes.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.partial.stages import nnx_stages
      >>> rngs = nnx.Rngs(0)
      >>> stages = nnx_stages([
      ...     ("hidden", nnx.Linear(3, 4, rngs=rngs)), ("relu", nnx.relu),
      ...     ("head", nnx.Linear(4, 2, rngs=rngs))])
      >>> y, state = stages.run(stages.params, stages.state, jnp.ones([5, 3]))
      >>> y.shape, sorted(stages.params["head"])
      ((5, 2), ['bias', 'kernel'])
    """
    parts, off = [], []
    for pair in modules:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"a stage must be a pair (name, module), got {pair!r}")
        name, module = pair
        if isinstance(module, nnx.Module):
            graphs = modes(module)
            parts.append(_module_stage(name, module, graphs))
            off.append(graphs.off)
        elif callable(module) and not isinstance(module, type):
            parts.append(function_stage(name, lambda _, x, module=module: module(x)))
        else:
            raise TypeError(f"stage {name!r} must be a module or a function x -> y, got {module!r}")
    if off and all(off):  # else only a part is, such as a frozen front
        warn_off("every module", 3)
    return chain(*parts)


def _module_stage(name: str, module: nnx.Module, graphs: Modes) -> Stages:
    # Empty where `sow` collects, which is no state.
    _, params, _, rest = nnx.split(module, trainable, nnx.Intermediate, ...)
    structure = jax.tree.structure([params, rest])

    def merged(*trees: Any) -> list[Any]:
        """Arrays in nested dicts as the variables that they came from."""
        return structure.unflatten(jax.tree.leaves(trees))

    def applied(graph: Any) -> Apply:
        def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
            module = nnx.merge(graph, *merged(params, state))
            before = attributes(module)
            y = module(x)
            nnx.pop(module, nnx.Intermediate)
            check_unchanged(module, graph, before, f"stage {name!r}")
            return y, nnx.to_pure_dict(nnx.state(module, nnx.Not(trainable)))

        return apply

    def write_back(params: dict[str, Any], state: dict[str, Any]) -> None:
        nnx.update(module, *merged(params[name], state[name]))

    params, state = ({name: nnx.to_pure_dict(part)} for part in (params, rest))
    applies = (applied(graphs.given),), (applied(graphs.evaluation),)
    return Stages((name,), *applies, params, state, write_back)


def in_order(slots: Slots, names: tuple[str, ...], params: Any) -> Slots:
    """Slots whose layers are the stages: what is known need not be read from paths."""
    trained = [name for name in names if jax.tree.leaves(params[name])]
    layers = []
    for slot in slots.names:
        stages = {leaf.split("/")[0] for leaf in slots.leaves({slot})}
        if len(stages) > 1:
            raise ValueError(f"slot {slot!r} spans the stages {sorted(stages)}; group within one")
        layers.append(stages.pop())
    depths = tuple(len(trained) - 1 - trained.index(layer) for layer in layers)
    return dataclasses.replace(slots, layers=tuple(layers), depths=depths)


def slots_of(module: Any, params: Any, staged: bool) -> dict[str, Any]:
    """``stacked_axis`` and ``group`` where nobody gave any.

    A slot is a layer of a `Stack` in the module, or else a layer, of a chain of stages a stage.
    """
    group = (lambda path: path.split("/")[0]) if staged else by_layer(params)
    found = nnx.iter_modules(module) if isinstance(module, nnx.Module) else ()
    roots = ["/".join(map(str, path)) for path, node in found if isinstance(node, Stack)]
    roots.sort(key=len)  # of one in another, the outer

    def root(path: str) -> str | None:
        return next((r for r in roots if path.startswith(f"{r}/" if r else "")), None)

    return {
        "stacked_axis": lambda path: None if root(path) is None else 0,
        "group": lambda path: group(path) if root(path) is None else root(path) or "stack",
    }
