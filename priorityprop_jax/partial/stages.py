"""A model as a chain of stages, so that a step can start at the output of a frozen prefix.

Everything is pure: parameters and state go in, outputs and new state come out.
"""

from __future__ import annotations

import dataclasses
import dis
import functools
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.core
import flax.linen
import jax
import jax.numpy as jnp
from flax import nnx
from jax.extend import core as jex_core

# (params, state, x) -> (y, new_state)
Apply = Callable[[Any, Any, Any], tuple[Any, Any]]

_RNG = "rng"  # Where a Linen stage keeps its key, beside its collections.


@dataclasses.dataclass(frozen=True, eq=False)
class Stages:
    """A model as a chain of named, pure stages; what one returns, the next is given.

    What passes between two stages is any pytree, such as `(hidden, mask)`.

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
      TypeError: a name is no string, or an apply no function, or params or state no mapping.
      ValueError: there are no stages; a name occurs twice, is empty or has a ``/`` in it; lengths
        differ; or params or state are not those of the stages.

    Example:
      >>> import jax.numpy as jnp
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
    write_back: Callable[[dict[str, Any], dict[str, Any]], None] | None = None

    def __post_init__(self):
        _check_names(self.names)
        for field in ("applies", "eval_applies"):
            applies = getattr(self, field)
            if len(applies) != len(self.names):
                raise ValueError(
                    f"{field} must have one function a stage, got {len(applies)} for "
                    f"{len(self.names)} stages"
                )
            for name, apply in zip(self.names, applies, strict=True):
                if not callable(apply):
                    raise TypeError(
                        f"{field} of stage {name!r} must be a function (params, state, x) -> "
                        f"(y, new_state), got {apply!r}"
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
        """Runs the stages `start`, ..., `stop - 1`, one after the other.

        Args:
          params: by stage name, like the attribute; traceable, as are `state` and `x`.
          state: by stage name, like the attribute.
          x: what stage `start` is given.
          start: the first stage to run, static, as are `stop` and `train`.
          stop: the first stage not to run; by default all are run.
          train: whether to run in training mode.

        Returns:
          What the last of them returns (`x` if none runs), and the state of all stages; that of
          those not run is as given.

        Raises:
          TypeError: `start` or `stop` is no whole number, or params or state no mapping.
          ValueError: not `0 <= start <= stop <= stages`, or params or state of a stage are missing.
        """
        stop = self._check_range(start, stop)
        self._check_trees(params, state)
        new_state = dict(state)
        applies = self.applies if train else self.eval_applies
        for name, apply in list(zip(self.names, applies, strict=True))[start:stop]:
            x, new_state[name] = apply(params[name], state[name], x)
        return x, new_state

    def stochastic(
        self,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        x: Any,
        *,
        stop: int | None = None,
    ) -> tuple[str, ...]:
        """Names of the stages whose state changes when they run in training mode.

        Such a stage draws random numbers (dropout, augmentation) or gathers statistics of the
        batches (`BatchNorm`): its output is not the same each time, or skipping it leaves its
        state behind. Found by tracing, without any computation: a stage counts unless each array of
        its state comes out as the very one that went in.

        Args:
          params: by stage name; arrays or `jax.ShapeDtypeStruct`, as for `state` and `x`.
          state: by stage name.
          x: what the first stage is given.
          stop: the first stage not to look at; by default all are looked at.

        Returns:
          The names, in forward order.

        Raises:
          TypeError, ValueError: as for `run`.

        Example:
          >>> import jax.numpy as jnp
          >>> from flax import nnx
          >>> from priorityprop_jax.partial.stages import nnx_stages
          >>> stages = nnx_stages([
          ...     ("drop", nnx.Dropout(0.1, rngs=nnx.Rngs(0))),
          ...     ("head", nnx.Linear(3, 2, rngs=nnx.Rngs(1)))])
          >>> stages.stochastic(stages.params, stages.state, jnp.ones([4, 3]))
          ('drop',)
        """
        stop = self._check_range(0, stop)
        self._check_trees(params, state)
        found = []
        for name, apply in list(zip(self.names, self.applies, strict=True))[:stop]:
            before = state[name]
            jaxpr, out = jax.make_jaxpr(apply, return_shape=True)(params[name], before, x)
            x, after = out
            count = len(jax.tree.leaves(before))
            first = len(jax.tree.leaves(params[name]))
            given = jaxpr.jaxpr.invars[first : first + count]
            outvars = jaxpr.jaxpr.outvars
            returned = outvars[len(outvars) - len(jax.tree.leaves(after)) :]
            sources = [_source(jaxpr.jaxpr, var) for var in returned]
            same = len(sources) == count and all(
                a is b for a, b in zip(sources, given, strict=True)
            )
            if not same or jax.tree.structure(before) != jax.tree.structure(after):
                found.append(name)
        return tuple(found)

    def check_pure(
        self,
        params: Mapping[str, Any],
        state: Mapping[str, Any],
        x: Any,
        *,
        stop: int | None = None,
    ) -> None:
        """Raises unless the stages before `stop` give the same outputs whenever they run.

        Args:
          params: by stage name, as for `stochastic`.
          state: by stage name.
          x: what the first stage is given.
          stop: the first stage behind the prefix.

        Raises:
          ValueError: `stochastic` finds a stage before `stop`.
          TypeError: as for `run`.
        """
        found = self.stochastic(params, state, x, stop=stop)
        if found:
            raise ValueError(
                f"the outputs of a prefix with the stages {', '.join(map(repr, found))} cannot be "
                "reused: in training mode they draw random numbers or change their state at each "
                "run (dropout, augmentation, BatchNorm); end the prefix before them, set their "
                "rate to 0, or run frozen stages in evaluation mode"
            )

    def _check_range(self, start: int, stop: int | None) -> int:
        stop = len(self) if stop is None else stop
        for name, value in (("start", start), ("stop", stop)):
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name} must be a whole number, got {value!r}")
        if not 0 <= start <= stop <= len(self):
            raise ValueError(
                f"start and stop must satisfy 0 <= start <= stop <= {len(self)} stages, got "
                f"start={start}, stop={stop}"
            )
        return stop

    def _check_trees(self, params: Any, state: Any) -> None:
        for field, tree in (("params", params), ("state", state)):
            if not isinstance(tree, Mapping):
                raise TypeError(
                    f"{field} must be a dict by stage name, got {type(tree).__name__}; give "
                    "{} to a stage that has none"
                )
            _check_keys(field, tree, self.names)


def chain(*parts: Stages) -> Stages:
    """One chain out of several, in this order.

    Args:
      *parts: chains of any kind: an embedding as `nnx_stages`, blocks as `scanned_stages`, a head
        as `function_stage`.

    Returns:
      The stages of all. Its `write_back` writes to those parts that have one.

    Raises:
      TypeError: a part is no `Stages`.
      ValueError: there is no part, two have a stage of the same name, or an array of one `nnx`
        part is held by another one (tied weights).
    """
    for part in parts:
        if not isinstance(part, Stages):
            raise TypeError(f"chain takes Stages, got {type(part).__name__}")
    names = tuple(name for part in parts for name in part.names)
    _check_names(names)
    owners: dict[int, str] = {}
    for part in parts:
        if part.write_back is not None:
            for name in part.names:
                for leaf in jax.tree.leaves(part.params[name]):
                    _check_untied(owners.setdefault(id(leaf), name), name, "parameters")

    def write_back(params: dict[str, Any], state: dict[str, Any]) -> None:
        for part in parts:
            if part.write_back is not None:
                part.write_back(
                    {name: params[name] for name in part.names},
                    {name: state[name] for name in part.names},
                )

    return Stages(
        names=names,
        applies=tuple(apply for part in parts for apply in part.applies),
        eval_applies=tuple(apply for part in parts for apply in part.eval_applies),
        params={name: part.params[name] for part in parts for name in part.names},
        state={name: part.state[name] for part in parts for name in part.names},
        write_back=write_back if any(part.write_back for part in parts) else None,
    )


def function_stage(
    name: str,
    apply: Callable[[Any, Any], Any],
    params: Any = None,
    *,
    eval_apply: Callable[[Any, Any], Any] | None = None,
) -> Stages:
    """A chain of one pure function.

    Args:
      name: of the stage.
      apply: `(params, x) -> y`.
      params: a pytree of arrays; by default there are none.
      eval_apply: the same in evaluation mode; by default `apply`.

    Returns:
      The chain, without state.

    Raises:
      TypeError: a function is none.
      ValueError: the name is empty or has a ``/`` in it.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.partial.stages import function_stage
      >>> stages = function_stage("head", lambda params, x: x @ params, jnp.ones([3, 2]))
      >>> stages.run(stages.params, stages.state, jnp.ones([4, 3]))[0].shape
      (4, 2)
    """
    for argument, function in (("apply", apply), ("eval_apply", eval_apply or apply)):
        if not callable(function):
            raise TypeError(f"{argument} must be a function (params, x) -> y, got {function!r}")
    return Stages(
        names=(name,),
        applies=(_stateless(apply),),
        eval_applies=(_stateless(eval_apply or apply),),
        params={name: {} if params is None else params},
        state={name: {}},
    )


def scanned_stages(
    apply: Callable[[Any, Any], Any],
    stacked_params: Any,
    *,
    name: str = "block",
    axis: int = 0,
    eval_apply: Callable[[Any, Any], Any] | None = None,
) -> Stages:
    """The layers of a scanned stack as stages of their own, `block_0`, `block_1`, ...

    Each has its own slice of the parameters, so that a layer can be frozen or skipped.
    `stack_params` is the inverse; `chain` joins the layers to what comes before and behind them.

    Args:
      apply: one layer, `(layer_params, x) -> y`: the body of the scan.
      stacked_params: a pytree of arrays with the layers along `axis`: `[layers, ...]`.
      name: of the stages, before ``_`` and the number of the layer.
      axis: where the layers are.
      eval_apply: the same layer in evaluation mode; by default `apply`.

    Returns:
      The layers in order, without state.

    Raises:
      TypeError: `apply` is no function.
      ValueError: there is no array, or the arrays do not have the same number of layers along
        `axis`.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.partial.stages import scanned_stages, stack_params
      >>> stages = scanned_stages(lambda w, x: jnp.tanh(x @ w), jnp.ones([5, 3, 3]))
      >>> stages.names
      ('block_0', 'block_1', 'block_2', 'block_3', 'block_4')
      >>> stack_params(stages.params).shape
      (5, 3, 3)
    """
    leaves = jax.tree.leaves(stacked_params)
    if not leaves:
        raise ValueError("stacked_params has no arrays, so the number of layers is unknown")
    counts = set()
    for leaf in leaves:
        if not -jnp.ndim(leaf) <= axis < jnp.ndim(leaf):
            raise ValueError(
                f"every array of stacked_params must have its layers along axis {axis}, got one of "
                f"shape {jnp.shape(leaf)}"
            )
        counts.add(jnp.shape(leaf)[axis])
    if len(counts) != 1:
        raise ValueError(
            f"the arrays of stacked_params have {sorted(counts)} layers along axis {axis}; all "
            "must have the same number"
        )
    parts = []
    for layer in range(counts.pop()):
        take = functools.partial(_take, index=layer, axis=axis)
        params = jax.tree.map(take, stacked_params)
        parts.append(function_stage(f"{name}_{layer}", apply, params, eval_apply=eval_apply))
    return chain(*parts)


def stack_params(params: Mapping[str, Any], *, name: str = "block", axis: int = 0) -> Any:
    """Stacks the layers of `scanned_stages` again.

    Args:
      params: parameters (or gradients) by stage name; other stages may be among them.
      name: that of `scanned_stages`.
      axis: where to put the layers.

    Returns:
      A pytree like that of one layer, its arrays with one axis more: `[layers, ...]`.

    Raises:
      ValueError: there is no stage `name_0`, or the numbers have a gap.
    """
    prefix = f"{name}_"
    numbers = sorted(
        int(key.removeprefix(prefix))
        for key in params
        if key.startswith(prefix) and key.removeprefix(prefix).isdecimal()
    )
    if not numbers or numbers != list(range(len(numbers))):
        raise ValueError(
            f"params must have the stages {prefix}0, {prefix}1, ... without a gap, got "
            f"{', '.join(params) or 'none'}"
        )
    layers = [params[f"{prefix}{number}"] for number in numbers]
    return jax.tree.map(lambda *rows: jnp.stack(rows, axis), *layers)


def nnx_stages(modules: Sequence[tuple[str, Any]]) -> Stages:
    """A chain of `flax.nnx` modules.

    The parameters are the `nnx.Param` variables, nested plain dicts of arrays; the state is all
    other variables but `nnx.Intermediate`. The arrays are those of the modules, not copies: copy
    them before a step that donates them. A module's own mode (`train()` or `eval()`) is left alone.
    What a module assigns to its parameters or to plain attributes while it runs is dropped.

    Args:
      modules: pairs of a name and a module `x -> y`, or a function without parameters (a reshape,
        an activation).

    Returns:
      The chain. Its `write_back` puts parameters and state into the modules.

    Raises:
      TypeError: a stage is no pair, no module and no function; or a function uses a module, whose
        parameters would be constants.
      ValueError: there are no stages; a name occurs twice, is empty or has a ``/`` in it; or two
        stages share a variable, such as tied weights.

    Example:
      >>> import jax.numpy as jnp
      >>> from flax import nnx
      >>> from priorityprop_jax.partial.stages import nnx_stages
      >>> rngs = nnx.Rngs(0)
      >>> stages = nnx_stages([
      ...     ("hidden", nnx.Linear(3, 4, rngs=rngs)), ("relu", nnx.relu),
      ...     ("head", nnx.Linear(4, 2, rngs=rngs))])
      >>> hidden, state = stages.run(stages.params, stages.state, jnp.ones([5, 3]), stop=2)
      >>> y, state = stages.run(stages.params, state, hidden, start=2)
      >>> y.shape, sorted(stages.params["head"])
      ((5, 2), ['bias', 'kernel'])
    """
    pairs = _pairs(modules)
    owners: dict[int, str] = {}
    applies, eval_applies, params, state = [], [], {}, {}
    originals: dict[str, tuple[nnx.Module, _Variables, _Variables]] = {}
    for name, module in pairs:
        if not isinstance(module, nnx.Module):
            _check_function(name, module, nnx.Module)
            stage = _stateless(functools.partial(_ignore_params, module))
            applies.append(stage)
            eval_applies.append(stage)
            params[name], state[name] = {}, {}
            continue
        for _, node in nnx.iter_graph(module):
            if isinstance(node, nnx.Variable) and not isinstance(node, nnx.Intermediate):
                kind = "parameters" if isinstance(node, nnx.Param) else "random streams or state"
                _check_untied(owners.setdefault(id(node), name), name, kind)
        # Modes are part of the static graph, so both graphs come from a copy.
        twin = nnx.clone(module)
        nnx.pop(twin, nnx.Intermediate)
        twin.train()
        graph, param_state, rest = nnx.split(twin, nnx.Param, ...)
        twin.eval()
        eval_graph = nnx.graphdef(twin)
        variables = _variables(param_state), _variables(rest)
        applies.append(_nnx_apply(name, graph, *variables))
        eval_applies.append(_nnx_apply(name, eval_graph, *variables))
        params[name], state[name] = _pure(param_state), _pure(rest)
        originals[name] = (module, *variables)

    def write_back(params: dict[str, Any], state: dict[str, Any]) -> None:
        _check_keys("params", params, names)
        _check_keys("state", state, names)
        for name, (module, trainable, others) in originals.items():
            nnx.update(module, _impure(params[name], trainable), _impure(state[name], others))

    names = tuple(name for name, _ in pairs)
    return Stages(names, tuple(applies), tuple(eval_applies), params, state, write_back)


def linen_stages(
    modules: Sequence[tuple[str, Any]],
    variables: Mapping[str, Mapping[str, Any]],
    *,
    rng: jax.Array | None = None,
    rng_names: Sequence[str] = ("dropout",),
    train_kwargs: Mapping[str, Any] | None = None,
    eval_kwargs: Mapping[str, Any] | None = None,
) -> Stages:
    """A chain of `flax.linen` modules.

    Collections other than `params` (and `intermediates`, which are dropped) are carried in the
    state and may change in training mode. So is a key, ``state[stage]["rng"]``, for stages that are
    modules, if `rng` is given: each run in training mode that draws from it leaves a new one.

    Args:
      modules: pairs of a name and a module, or a function `x -> y` without parameters.
      variables: for every module by its stage name what its `init` returned.
      rng: a key for the random streams; by default there are none.
      rng_names: of the random streams that the modules draw from.
      train_kwargs: what to call the modules with in training mode, such as ``{"train": True}``. A
        module is given those that its `__call__` takes.
      eval_kwargs: the same in evaluation mode.

    Returns:
      The chain, without `write_back`.

    Raises:
      TypeError: a stage is no pair, no module and no function.
      ValueError: there are no stages; a name occurs twice, is empty or has a ``/`` in it;
        `variables` are not those of the modules; or no module takes one of the keyword arguments.

    Example:
      >>> import jax
      >>> import jax.numpy as jnp
      >>> from flax import linen as nn
      >>> from priorityprop_jax.partial.stages import linen_stages
      >>> x, dense = jnp.ones([5, 3]), nn.Dense(2)
      >>> stages = linen_stages(
      ...     [("dense", dense), ("relu", nn.relu)],
      ...     {"dense": dense.init(jax.random.key(0), x)})
      >>> stages.run(stages.params, stages.state, x)[0].shape
      (5, 2)
    """
    pairs = _pairs(modules)
    linen = [name for name, module in pairs if isinstance(module, flax.linen.Module)]
    if not isinstance(variables, Mapping):
        raise TypeError(f"variables must be a dict by stage name, got {type(variables).__name__}")
    _check_keys("variables", variables, linen)
    taken: set[str] = set()
    applies, eval_applies, params, state = [], [], {}, {}
    for index, (name, module) in enumerate(pairs):
        if name not in linen:
            _check_function(name, module, flax.linen.Module)
            stage = _stateless(functools.partial(_ignore_params, module))
            applies.append(stage)
            eval_applies.append(stage)
            params[name], state[name] = {}, {}
            continue
        train, evaluate = _accepted(module, train_kwargs), _accepted(module, eval_kwargs)
        taken |= train.keys() | evaluate.keys()
        own = flax.core.unfreeze(flax.core.freeze(dict(variables[name])))
        own.pop("intermediates", None)
        params[name] = own.pop("params", {})
        if _RNG in own:
            raise ValueError(
                f"stage {name!r} has a collection {_RNG!r}, which is the name of the key in the "
                "state; rename the collection"
            )
        state[name] = own if rng is None else own | {_RNG: jax.random.fold_in(rng, index)}
        applies.append(_linen_apply(module, train, tuple(rng_names), mutable=True))
        eval_applies.append(_linen_apply(module, evaluate, (), mutable=False))
    unknown = ({**(train_kwargs or {})}.keys() | {**(eval_kwargs or {})}.keys()) - taken
    if unknown:
        raise ValueError(
            f"no module takes the keyword argument {', '.join(map(repr, sorted(unknown)))} of "
            "train_kwargs or eval_kwargs; correct its name or leave it out"
        )
    names = tuple(name for name, _ in pairs)
    return Stages(names, tuple(applies), tuple(eval_applies), params, state)


# What the adapters are made of.


def _stateless(apply: Callable[[Any, Any], Any]) -> Apply:
    return lambda params, state, x: (apply(params, x), state)


def _ignore_params(function: Callable[[Any], Any], _: Any, x: Any) -> Any:
    return function(x)


def _take(leaf: Any, *, index: int, axis: int) -> jax.Array:
    return jax.lax.index_in_dim(jnp.asarray(leaf), index, axis, keepdims=False)


# For every variable of a module its path, and an empty copy of it where its value is no single
# array: flax takes plain arrays for variables, but not a dict of them.
_Variables = dict[tuple[Any, ...], Any]


def _variables(state: Any) -> _Variables:
    found: _Variables = {}
    for path, leaf in nnx.to_flat_state(state):
        boxed = isinstance(leaf, nnx.Variable) and not jax.tree_util.all_leaves([leaf.get_value()])
        found[path] = leaf.replace(None) if boxed else None
    return found


def _pure(state: Any) -> dict[Any, Any]:
    pure: dict[Any, Any] = {}
    for path, leaf in nnx.to_flat_state(state):
        node = pure
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = leaf.get_value() if isinstance(leaf, nnx.Variable) else leaf
    return pure


def _impure(pure: Any, variables: _Variables) -> Any:
    flat = {}
    for path, box in variables.items():
        value = functools.reduce(lambda node, key: node[key], path, pure)
        flat[path] = value if box is None else box.replace(value)
    return nnx.from_flat_state(flat)


def _nnx_apply(name: str, graph: Any, trainable: _Variables, others: _Variables) -> Apply:
    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        module = nnx.merge(graph, _impure(params, trainable), _impure(state, others))
        y = module(x)
        nnx.pop(module, nnx.Intermediate)
        _, _, rest = nnx.split(module, nnx.Param, ...)
        changed = others.keys() ^ {path for path, _ in nnx.to_flat_state(rest)}
        if changed:
            names = sorted("/".join(map(str, path)) for path in changed)
            raise ValueError(
                f"stage {name!r} makes or removes variables while it runs: {', '.join(names)}; "
                "make them when the module is made"
            )
        return y, _pure(rest)

    return apply


def _linen_apply(
    module: flax.linen.Module,
    kwargs: dict[str, Any],
    rng_names: tuple[str, ...],
    *,
    mutable: bool,
) -> Apply:
    def call(keys: Any, params: Any, collections: Any, x: Any) -> tuple[Any, Any]:
        variables = {"params": params, **collections} if params else dict(collections)
        rngs = dict(zip(rng_names, keys, strict=True)) if keys is not None else None
        if not mutable or not collections:
            return module.apply(variables, x, rngs=rngs, **kwargs), collections
        y, updated = module.apply(variables, x, rngs=rngs, mutable=list(collections), **kwargs)
        return y, {**collections, **updated}

    draws: dict[Any, bool] = {}  # By the shapes of the arguments, as a trace answers for them only.

    def apply(params: Any, state: Any, x: Any) -> tuple[Any, Any]:
        collections = {name: value for name, value in state.items() if name != _RNG}
        if not mutable or not rng_names or _RNG not in state:
            y, collections = call(None, params, collections, x)
            return y, collections | {name: state[name] for name in state if name == _RNG}
        key, *used = jax.random.split(state[_RNG], 1 + len(rng_names))
        arguments = (used, params, collections, x)
        leaves, structure = jax.tree.flatten(arguments)
        shapes = [jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in leaves]
        signature = (structure, *((leaf.shape, leaf.dtype) for leaf in shapes))
        if signature not in draws:
            jaxpr = jax.make_jaxpr(call)(*jax.tree.unflatten(structure, shapes)).jaxpr
            keys = set(jaxpr.invars[: len(used)])
            draws[signature] = any(
                isinstance(var, jex_core.Var) and var in keys
                for var in [*(var for eqn in jaxpr.eqns for var in eqn.invars), *jaxpr.outvars]
            )
        y, collections = call(*arguments)
        # A key that nothing is drawn from stays, so that a stage without randomness shows as one.
        return y, collections | {_RNG: key if draws[signature] else state[_RNG]}

    return apply


def _accepted(module: flax.linen.Module, kwargs: Mapping[str, Any] | None) -> dict[str, Any]:
    parameters = inspect.signature(module.__call__).parameters  # pyright: ignore
    everything = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {
        name: value for name, value in (kwargs or {}).items() if everything or name in parameters
    }


def _source(jaxpr: Any, var: Any) -> Any:
    """The input of `jaxpr` that `var` is a mere copy of, else something else."""
    producers = {out: (eqn, i) for eqn in jaxpr.eqns for i, out in enumerate(eqn.outvars)}
    while isinstance(var, jex_core.Var) and var in producers:
        eqn, index = producers[var]
        position = _forwarded(eqn, index)
        if position is None:
            return None
        var = eqn.invars[position]
    return var


def _forwarded(eqn: Any, index: int) -> int | None:
    """Which operand of `eqn` its output `index` is a copy of, None if not known to be one."""
    name, params = eqn.primitive.name, eqn.params
    if name == "scan":
        # What a body hands on is the same array at the end: each carry at its own place, each row
        # of an input as that row of an output. Rows are what has an axis less in the body; the
        # parameters that count them differ between versions of JAX.
        body = params["jaxpr"]
        body = getattr(body, "jaxpr", body)
        position = _position(body, index)
        if position is None:
            return None
        carried = [
            a.aval.ndim == b.aval.ndim for a, b in zip(eqn.outvars, body.outvars, strict=True)
        ]
        whole = [a.aval.ndim == b.aval.ndim for a, b in zip(eqn.invars, body.invars, strict=True)]
        if carried[index]:
            return position if position == sum(whole) - sum(carried) + index else None
        return None if whole[position] else position
    if name == "cond":
        positions = {_position(branch.jaxpr, index) for branch in params["branches"]}
        position = positions.pop()
        return None if positions or position is None else position + 1
    for key in ("jaxpr", "call_jaxpr"):
        inner = params.get(key)
        inner = getattr(inner, "jaxpr", inner)
        if (
            name in _CALLS
            and inner is not None
            and len(inner.invars) == len(eqn.invars)
            and len(inner.outvars) == len(eqn.outvars)
        ):
            return _position(inner, index)
    return None


_CALLS = frozenset(
    {"jit", "pjit", "closed_call", "core_call", "checkpoint", "remat2", "remat"}
    | {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr"}
)


def _position(jaxpr: Any, index: int) -> int | None:
    source = _source(jaxpr, jaxpr.outvars[index])
    return next((i for i, var in enumerate(jaxpr.invars) if var is source), None)


# Checks.


def _pairs(modules: Any) -> list[tuple[str, Any]]:
    pairs = list(modules.items() if isinstance(modules, Mapping) else modules)
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(f"a stage must be a pair (name, module), got {pair!r}")
    _check_names(tuple(name for name, _ in pairs))
    return [(name, module) for name, module in pairs]


def _check_names(names: Sequence[Any]) -> None:
    if not names:
        raise ValueError("there are no stages; give at least one")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"the name of a stage must be a string, got {name!r}")
        if not name or "/" in name:
            raise ValueError(
                f"the name of a stage must not be empty or have a '/' in it, which separates the "
                f"parts of a parameter's name, got {name!r}"
            )
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"stages must have different names, got {', '.join(twice)} twice")


def _check_keys(field: str, tree: Mapping[str, Any], names: Sequence[str]) -> None:
    missing = [name for name in names if name not in tree]
    unknown = [str(name) for name in tree if name not in names]
    if missing or unknown:
        raise ValueError(
            f"{field} must have an entry for each of {', '.join(names) or 'no stage'}; missing: "
            f"{', '.join(missing) or 'none'}, unknown: {', '.join(unknown) or 'none'}"
        )


def _check_untied(owner: str, name: str, kind: str) -> None:
    if owner != name:
        advice = (
            "tied weights cannot be trained by halves: put both uses into one stage, or give each "
            "its own copy"
            if kind == "parameters"
            else "give each its own, such as rngs.fork()"
        )
        raise ValueError(f"the stages {owner!r} and {name!r} share {kind}; {advice}")


def _check_function(name: str, function: Any, module_type: type) -> None:
    if not callable(function) or isinstance(function, type):
        raise TypeError(f"stage {name!r} must be a module or a function x -> y, got {function!r}")
    if any(isinstance(used, module_type) for used in _used(function)):
        raise TypeError(
            f"the function of stage {name!r} uses a module, whose parameters would be constants "
            "there; give the module itself, or write a module that holds it and does what the "
            "function does"
        )


def _used(function: Any) -> list[Any]:
    """What a function is bound to, closes over, or takes from its globals, as far as one sees."""
    if isinstance(function, functools.partial):
        return [*function.args, *function.keywords.values(), *_used(function.func)]
    used = [getattr(function, "__self__", None)]
    function = inspect.unwrap(getattr(function, "__func__", function))
    code = getattr(function, "__code__", None)
    if code is None:
        return used
    for cell in function.__closure__ or ():
        try:
            used.append(cell.cell_contents)
        except ValueError:
            pass  # Not assigned yet.
    for instruction in dis.get_instructions(code):
        if instruction.opname == "LOAD_GLOBAL":
            used.append(function.__globals__.get(instruction.argval))
    return used
