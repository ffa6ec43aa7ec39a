"""Ctrl-C as a wish to stop, which is granted between two steps."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils


class Stop:
    """Whether to stop: true once Ctrl-C was pressed.

    Of several processes none may leave a step that the others run, so there it is true once all
    know, by `share`, that it was pressed at one of them.
    """

    def __init__(self) -> None:
        self._pressed = self._shared = self._shielded = self._late = False

    def __bool__(self) -> bool:
        return self._pressed if jax.process_count() == 1 else self._shared

    @property
    def pressed(self) -> bool:
        """Whether Ctrl-C was pressed, be it too late to stop anything."""
        return self._pressed or self._shared

    def share(self) -> None:
        """Tells all processes; all must call it at the same step."""
        if jax.process_count() > 1:
            pressed = multihost_utils.process_allgather(np.array(self._pressed))
            self._shared = bool(np.any(pressed))

    @contextlib.contextmanager
    def catching(self) -> Iterator[None]:
        """Within, the first Ctrl-C is a wish, and the second raises as usual."""
        before = None
        if threading.current_thread() is threading.main_thread():
            before = signal.getsignal(signal.SIGINT)
        # None is a handler that Python cannot put back; who ignores SIGINT has a reason to.
        if before is None or before == signal.SIG_IGN:
            yield
            return
        signal.signal(signal.SIGINT, self._handle)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _handle(self, number: int, frame: Any) -> None:
        if not self._pressed:
            self._pressed = True
        elif self._shielded and not self._late:
            self._late = True
        else:
            signal.default_int_handler(number, frame)

    @contextlib.contextmanager
    def shielded(self) -> Iterator[None]:
        """Within, the second Ctrl-C waits for the end; only the third raises at once.

        An exception between the donation of arrays and the assignment of new ones would lose both.
        """
        self._shielded = True
        try:
            yield
        finally:
            self._shielded = False
        if self._late:
            self._late = False
            raise KeyboardInterrupt

    def until(self, batches: Iterable[Any]) -> Iterator[Any]:
        """The batches, up to an interruption before or while getting one."""
        try:
            iterator = iter(batches)
            end = object()
            while not self and (batch := next(iterator, end)) is not end and not self:
                yield batch
        except KeyboardInterrupt:
            if jax.process_count() > 1:
                raise  # The others know nothing of it.
            self._pressed = True
