"""What a meProp layer is told while its model is traced, and what that tells of the model."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
from flax.core import tracers


class Tap(NamedTuple):
    """A zero argument whose cotangent carries the compact gradient out of the backward pass."""

    values: jax.Array  # [k, in]
    # [k] float32, exact for whole numbers up to 2**24; from 1 on, so that a cotangent that never
    # came, of zeros, names no row.
    rows: jax.Array


@dataclasses.dataclass(frozen=True)
class LayerUse:
    """How a model uses a layer in one pass."""

    rows: int  # examples (and positions) that pass through it
    inputs: int  # features that are contracted, those of one group for convolutions
    outputs: int
    sizes: tuple[int, ...]  # output features that its compiled sizes keep, ascending
    by_rows: bool  # whether its kernel is (out, in), and its gradient can be row-sparse
    calls: int = 1
    # Whether all calls are outside of `jax.jit`, `jax.lax.scan` and other functions that trace.
    direct: bool = True

    def flops(self, k: int) -> float:
        """FLOPs of both products of its backward pass, ``4 rows inputs k``, in all calls."""
        return 4.0 * self.rows * self.inputs * k * self.calls


class Frame:
    """What a loss is traced with: taps and sizes for layers by name; records who is called."""

    def __init__(
        self, taps: Mapping[str, Any] | None = None, sizes: Mapping[str, Any] | None = None
    ) -> None:
        self.taps, self.sizes = dict(taps or {}), dict(sizes or {})
        self.uses: dict[str, LayerUse] = {}
        self.level: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Makes this the frame of what is traced inside."""
        # A layer inside a scan or a jitted function is traced once and run often, or traced never
        # as its program is cached: what belongs to this pass must not be handed to it.
        self.level = tracers.current_trace()
        token = _frame.set(self)
        try:
            yield
        finally:
            _frame.reset(token)

    def enter(self, name: str, use: LayerUse) -> tuple[Tap | None, Any]:
        """Records a call; its tap and its size."""
        direct = tracers.current_trace() == self.level
        if name in self.uses:
            last = self.uses[name]
            use = dataclasses.replace(
                last, calls=last.calls + 1, by_rows=False, direct=last.direct and direct
            )
        else:
            use = dataclasses.replace(use, direct=direct)
        self.uses[name] = use
        return (self.taps.get(name), self.sizes.get(name)) if direct else (None, None)


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("meprop", default=None)


def enter(name: str, use: LayerUse) -> tuple[Tap | None, Any]:
    """Tells the frame, if there is one, that a layer is called; the layer's tap and size."""
    frame = _frame.get()
    return (None, None) if frame is None or not name else frame.enter(name, use)
