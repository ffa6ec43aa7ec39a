"""Muon on a budget: momentum for all matrices at every step, orthogonalization for some of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from priorityprop_jax.priority.budgeted import Share, budgeted, on_any_mesh
from priorityprop_jax.priority.scores import Score

Dimensions = optax.contrib.MuonDimensionNumbers
NS_COEFFS = ((3.4445, -4.7750, 2.0315),) * 5  # Keller Jordan's, five steps


def orthogonalize(
    x: jax.Array,
    ns_coeffs: Sequence[Sequence[float]] = NS_COEFFS,
    eps: jax.typing.ArrayLike = 1e-8,
) -> jax.Array:
    r"""Brings the singular values of matrices near 1, by a Newton-Schulz iteration.

    From ``X`` over its Frobenius norm, for each row ``(a, b, c)`` of coefficients

    .. math:: X \leftarrow (a I + b A + c A^2) X, \qquad A = X X^\top,

    with the shorter side in front. Where the longer side is at least twice as long, on a CPU and in
    32 or more bits, the iteration is on the small square ``A`` alone: all factors commute, so that
    their product ``Q`` and the next ``A`` are had without ``X``, and ``Q X`` is taken once, at the
    end. It is the same to rounding: at four times the length, in 0.56 of the FLOPs.

    Args:
      x: ``[..., m, n]``, real or complex.
      ns_coeffs: ``[steps][3]``, one row for each step; those of Polar Express differ by step.
      eps: added to the norm.

    Returns:
      An array of the shape and dtype of ``x``; zeros for zeros.

    Raises:
      ValueError: if ``x`` has fewer than two axes.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority import orthogonalize
      >>> values = jnp.linalg.svdvals(orthogonalize(jnp.array([[3.0, 1.0, 0.0], [0.0, 0.1, 0.0]])))
      >>> bool(jnp.all((values > 0.5) & (values < 1.5)))
      True

    References:
      K. Jordan et al., *Muon*, 2024, https://kellerjordan.github.io/posts/muon/; Amsel et al., *The
      Polar Express*, 2025, arXiv 2505.16932.
    """
    x = jnp.asarray(x)
    if x.ndim < 2:
        raise ValueError(f"only matrices can be orthogonalized, got shape {x.shape}")
    if x.shape[-2] > x.shape[-1]:
        return jnp.matrix_transpose(orthogonalize(jnp.matrix_transpose(x), ns_coeffs, eps))
    m, n = x.shape[-2:]
    wide = x.dtype if x.dtype.itemsize >= 4 else jnp.dtype(jnp.float32)
    norm = jnp.linalg.norm(x.astype(wide), axis=(-2, -1), keepdims=True)
    x = (x.astype(wide) / (norm + eps).astype(wide)).astype(x.dtype)
    if 2 * m > n or x.dtype != wide:
        return _on_matrix(x, ns_coeffs)
    # In the few bits of other devices' products small singular values of A would be lost.
    return lax.platform_dependent(
        x, cpu=lambda x: _on_gram(x, ns_coeffs), default=lambda x: _on_matrix(x, ns_coeffs)
    )


def _gram(x: jax.Array) -> jax.Array:
    return x @ jnp.matrix_transpose(x).conj()


def _on_matrix(x: jax.Array, ns_coeffs: Sequence[Sequence[float]]) -> jax.Array:
    y = x
    for a, b, c in ns_coeffs:
        gram = _gram(y)
        y = (a * y + (b * gram + c * gram @ gram) @ y).astype(x.dtype)
    return y


def _on_gram(x: jax.Array, ns_coeffs: Sequence[Sequence[float]]) -> jax.Array:
    gram, product = _gram(x), None
    identity = jnp.eye(x.shape[-2], dtype=x.dtype)
    for a, b, c in ns_coeffs:
        factor = a * identity + b * gram + c * gram @ gram
        product = factor if product is None else factor @ product
        gram = factor @ gram @ factor  # the last one is read by nobody, and not computed
    return x if product is None else (product @ x).astype(x.dtype)


def muon(
    learning_rate: optax.ScalarOrSchedule,
    budget: Share = 0.25,
    *,
    score: Score = "robin",
    mask: Any = None,
    weight_dimension_numbers: Any = None,
    ns_coeffs: Sequence[Sequence[float]] = NS_COEFFS,
    beta: jax.typing.ArrayLike = 0.95,
    eps: jax.typing.ArrayLike = 1e-8,
    weight_decay: optax.ScalarOrSchedule = 0.0,
    weight_decay_mask: Any = None,
    mu_dtype: jax.typing.DTypeLike | None = None,
    consistent_rms: jax.typing.ArrayLike | None = 0.2,
    adam_b1: jax.typing.ArrayLike = 0.9,
    adam_b2: jax.typing.ArrayLike = 0.999,
    adam_learning_rate: optax.ScalarOrSchedule | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Muon that orthogonalizes a share of its matrices a step; NAdam for all other parameters.

    For a matrix with the momentum ``M`` (Nesterov's, with bias correction, as Optax's), of ``n``
    matrices of its shape of which ``k`` have their turn,

    .. math:: u = 0.2 \sqrt{\max(m, n)} \cdot \sqrt{n / k}\; \mathrm{orthogonalize}(M)

    for those and 0 for the others, see `budgeted`. All momenta go on at every step: only the
    orthogonalization, which is most of an update, is on the budget. At ``budget=1`` it is
    `optax.contrib.muon` with ``consistent_rms=0.2``.

    What is orthogonalized is chosen as in `optax.contrib.muon`: leaves of two axes, or what
    ``weight_dimension_numbers`` says. Embeddings and output heads are better left to NAdam, which
    is what ``mask`` is for. Matrices that are wide and those that are tall count as of one shape.

    Gradients may be absent (None): that keeps the update absent and the moments as they are.

    Args:
      learning_rate: a number or a schedule of steps.
      budget: the share of the matrices of each shape, at least one, or a schedule of it; see
        `budgeted`.
      score: who is next, see `budgeted`.
      mask: a tree of bools, which may be a prefix of the parameters', or a function from the
        parameters to one: False where NAdam is to be used all the same.
      weight_dimension_numbers: a tree of `optax.contrib.MuonDimensionNumbers` and None (for NAdam),
        or a function from the parameters to one. Axes that it does not name, such as the layers of
        a scanned stack, are over matrices.
      ns_coeffs: see `orthogonalize`.
      beta: decay of Muon's momentum.
      eps: of Muon and NAdam.
      weight_decay: of all parameters, times the learning rate.
      weight_decay_mask: see `optax.add_decayed_weights`.
      mu_dtype: of the momentum, by default that of the parameter.
      consistent_rms: makes updates as long as Adam's mostly are, so that one learning rate suits
        all; None for Keller Jordan's ``sqrt(max(1, outputs / inputs))`` instead.
      adam_b1: of NAdam.
      adam_b2: of NAdam.
      adam_learning_rate: of NAdam; by default ``learning_rate``.

    Returns:
      An `optax.GradientTransformationExtraArgs`.

    Raises:
      ValueError: as `budgeted`.

    Example:
      >>> import jax.numpy as jnp
      >>> from priorityprop_jax.priority import muon
      >>> params = {"embed": jnp.ones((9, 4)), "hidden": jnp.ones((4, 4)), "bias": jnp.ones(4)}
      >>> tx = muon(1e-3, mask={"embed": False, "hidden": True, "bias": True})
      >>> updates, state = tx.update(params, tx.init(params), params)
      >>> {name: update.shape for name, update in updates.items()}
      {'bias': (4,), 'embed': (9, 4), 'hidden': (4, 4)}

    References:
      Muon: see `orthogonalize`. The length: Liu et al., 2025, arXiv 2502.16982.
    """
    some = budgeted(lambda x: orthogonalize(x, ns_coeffs, eps), budget, score=score)

    def parts(tree):
        """The transformation for parameters of one structure."""
        numbers = _numbers(tree, weight_dimension_numbers, mask)
        kinds = ["adam" if number is None else "muon" for number in numbers]
        labels = jax.tree.structure(tree).unflatten(kinds)
        hidden = [number for number in numbers if number is not None]
        matrices = _as_matrices(some, hidden, consistent_rms)
        momentum = _if_present(_momentum(beta, mu_dtype))
        adam = optax.scale_by_adam(adam_b1, adam_b2, eps, mu_dtype=mu_dtype, nesterov=True)
        both: dict[Any, Any] = {"muon": optax.chain(momentum, matrices), "adam": _if_present(adam)}
        rate = optax.scale_by_learning_rate(learning_rate)
        if adam_learning_rate is not None:
            rates: dict[Any, Any] = {"muon": rate}
            rates["adam"] = optax.scale_by_learning_rate(adam_learning_rate)
            rate = optax.partition(rates, labels)
        decay = optax.add_decayed_weights(weight_decay, weight_decay_mask)
        if isinstance(weight_decay, int | float) and weight_decay == 0:
            decay = optax.identity()  # which needs no parameters
        return optax.chain(optax.partition(both, labels), decay, rate)

    def update_fn(updates, state, params=None, **extra_args):
        tx = parts(updates if params is None else params)
        return tx.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(
        lambda params: parts(params).init(params), update_fn
    )


def _momentum(
    beta: jax.typing.ArrayLike, dtype: jax.typing.DTypeLike | None
) -> optax.GradientTransformation:
    """Nesterov's momentum with bias correction, as in `optax.contrib.scale_by_muon`."""

    def init_fn(params):
        mean = optax.tree.zeros_like(params, dtype=dtype)
        return optax.EmaState(count=jnp.zeros((), jnp.int32), ema=mean)

    def update_fn(updates, state, params=None):
        del params
        mean = optax.tree.update_moment(updates, state.ema, beta, 1)
        count = optax.safe_increment(state.count)
        ahead = optax.tree.bias_correction(mean, beta, optax.safe_increment(count))
        now = optax.tree.bias_correction(updates, beta, count)
        new = jax.tree.map(lambda m, g: (beta * m + (1 - beta) * g).astype(g.dtype), ahead, now)
        return new, optax.EmaState(count, optax.tree.cast(mean, dtype))

    return optax.GradientTransformation(init_fn, update_fn)


def _if_present(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """``inner``, whose state is a count and moments; those of absent gradients stay as they are."""

    def update_fn(updates, state, params=None):
        treedef = jax.tree.structure(updates if params is None else params)
        flatten = treedef.flatten_up_to
        absent = [g is None for g in flatten(updates)]
        nothing = treedef.unflatten([optax.MaskedNode()] * len(absent))

        def put(there, tree):
            """``there`` in the places of what is absent."""
            own = zip(absent, flatten(there), flatten(tree), strict=True)
            return treedef.unflatten([x if gone else y for gone, x, y in own])

        hidden = type(state)(state[0], *(put(nothing, tree) for tree in state[1:]))
        after: Any
        new, after = inner.update(put(nothing, updates), hidden)
        kept = (put(old, tree) for old, tree in zip(state[1:], after[1:], strict=True))
        return put(updates, new), type(state)(after[0], *kept)

    return optax.GradientTransformation(inner.init, update_fn)


def _numbers(tree: Any, given: Any, mask: Any) -> list[Dimensions | None]:
    """For every leaf its dimension numbers, None where it is not Muon's."""

    def spread(prefix):
        """A value for every leaf."""
        leaf = lambda x: x is None or isinstance(x, Dimensions)  # noqa: E731
        found: list[Any] = []
        add = lambda value, below: found.extend([value] * len(jax.tree.leaves(below)))  # noqa: E731
        jax.tree.map(add, prefix(tree) if callable(prefix) else prefix, tree, is_leaf=leaf)
        return found

    if not jax.tree.leaves(tree):  # of nothing, or what `optax.tree.map_params` puts in its place
        return []
    if given is None:
        numbers = [Dimensions() if jnp.ndim(x) == 2 else None for x in jax.tree.leaves(tree)]
    else:
        numbers = spread(given)
    if mask is None:
        return numbers
    return [number if own else None for number, own in zip(numbers, spread(mask), strict=True)]


def _as_matrices(
    inner: optax.GradientTransformation,
    numbers: Sequence[Dimensions],
    consistent_rms: jax.typing.ArrayLike | None,
) -> optax.GradientTransformation:
    """``inner`` on leaves as wide ``[..., m, n]``, and updates as long as Muon wants them."""

    def forth(treedef, tree):
        pairs = zip(treedef.flatten_up_to(tree), numbers, strict=True)
        return treedef.unflatten([x if x is None else _matrices(x, own)[0] for x, own in pairs])

    def update_fn(updates, state, params=None):
        treedef = jax.tree.structure(updates if params is None else params)
        given = None if params is None else forth(treedef, params)
        new, state = inner.update(forth(treedef, updates), state, given)
        flat, new, back = treedef.flatten_up_to(updates), treedef.flatten_up_to(new), []
        for x, own, y in zip(flat, numbers, new, strict=True):
            if x is not None:
                _, undo, inputs, outputs = _matrices(x, own)
                if consistent_rms is None:
                    length = max(1.0, outputs / max(inputs, 1)) ** 0.5
                else:
                    length = max(inputs, outputs) ** 0.5 * consistent_rms
                y = (length * undo(y)).astype(x.dtype)
            back.append(y)
        return treedef.unflatten(back), state

    def init_fn(params):
        treedef = jax.tree.structure(params)
        return inner.init(jax.eval_shape(lambda tree: forth(treedef, tree), params))

    return optax.GradientTransformation(init_fn, on_any_mesh(update_fn))


def _matrices(
    x: jax.Array, numbers: Dimensions
) -> tuple[jax.Array, Callable[[jax.Array], jax.Array], int, int]:
    """A leaf as wide matrices ``[..., m, n]``, the way back, and the inputs and outputs of one."""
    whole = lambda axes: tuple(axis % x.ndim for axis in np.atleast_1d(axes).tolist())  # noqa: E731
    first, second = whole(numbers.reduction_axis), whole(numbers.output_axis)
    size = lambda axes: math.prod(x.shape[axis] for axis in axes)  # noqa: E731
    inputs, outputs = size(first), size(second)
    if len({*first, *second}) < len(first) + len(second):
        raise ValueError(f"{numbers} name an axis of a leaf of shape {x.shape} twice")
    if inputs > outputs:
        first, second = second, first
    over = tuple(axis for axis in range(x.ndim) if axis not in first + second)
    order = over + first + second
    moved = x.transpose(order)
    matrices = moved.reshape(*moved.shape[: len(over)], size(first), size(second))
    place = [order.index(axis) for axis in range(x.ndim)]
    return matrices, lambda y: y.reshape(moved.shape).transpose(place), inputs, outputs
