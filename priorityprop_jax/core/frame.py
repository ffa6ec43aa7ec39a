"""What a layer is told while its model is traced, and what that tells of the model."""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax

from priorityprop_jax.core.fragile import current_trace


class Tap(NamedTuple):
    """A zero argument whose cotangent carries the compact gradient out of the backward pass."""

    values: jax.Array  # [k, in]
    # [k] float32, exact for whole numbers up to 2**24; from 1 on, so that a cotangent that never
    # came, of zeros, names no row.
    rows: jax.Array


Call = tuple[str, int]  # of a layer by its name, and which of its calls


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
    """What a loss is traced with: taps by call, sizes by layer; records who is called.

    ``look_ups``: whether gradients of embeddings may be rows too.
    """

    def __init__(
        self,
        taps: Mapping[Call, Any] | None = None,
        sizes: Mapping[str, Any] | None = None,
        look_ups: bool = True,
    ) -> None:
        self.taps, self.sizes, self.look_ups = dict(taps or {}), dict(sizes or {}), look_ups
        self.uses: dict[str, LayerUse] = {}
        self.calls: dict[str, int] = {}  # outside of functions that trace
        self.indirect: list[LayerUse] = []  # look-ups inside of such functions, or by shards
        self.level: Any = None

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Makes this the frame of what is traced inside."""
        # A layer inside a scan or a jitted function is traced once and run often, or traced never
        # as its program is cached: what belongs to this pass must not be handed to it.
        self.level = current_trace()
        token = _frame.set(self)
        try:
            yield
        finally:
            _frame.reset(token)

    def enter(self, name: str, use: LayerUse) -> tuple[Tap | None, Any]:
        """Records a call; its tap and its size."""
        direct = current_trace() == self.level
        last = self.uses.get(name)
        self.uses[name] = dataclasses.replace(
            use,
            calls=last.calls + 1 if last else 1,
            direct=direct and (last is None or last.direct),
        )
        if not direct:
            return None, None
        # Two models that were prepared apart may both have a layer of this name.
        call = name, self.calls.get(name, 0)
        self.calls[name] = call[1] + 1
        return self.tap(call, use), self.sizes.get(name)

    def look_up(self, use: LayerUse) -> Tap | None:
        """The tap of a look-up of rows of a table; in place of a layer's its name is empty."""
        if not self.look_ups:
            return None
        if current_trace() != self.level:
            self.indirect.append(use)
            return None
        call = "", self.calls.get("", 0)
        self.calls[""] = call[1] + 1
        return self.tap(call, use)

    def tap(self, call: Call, use: LayerUse) -> Tap | None:
        """What a call is to put its gradient into, if anything."""
        return self.taps.get(call)


_frame: contextvars.ContextVar[Frame | None] = contextvars.ContextVar("frame", default=None)


def enter(name: str, use: LayerUse) -> tuple[Tap | None, Any]:
    """Tells the frame, if there is one, that a layer is called; the layer's tap and size."""
    frame = _frame.get()
    return (None, None) if frame is None or not name else frame.enter(name, use)


def look_up(use: LayerUse) -> Tap | None:
    """Tells the frame, if there is one, that rows of a table are looked up; their tap."""
    frame = _frame.get()
    return None if frame is None else frame.look_up(use)
