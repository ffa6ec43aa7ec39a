"""Temporary memory that a step finds again, where the C library would give it back."""

from __future__ import annotations

import ctypes

# Of glibc's <malloc.h>: one heap for all threads, which what is large is from too, never to shrink.
_SETTINGS = {"M_ARENA_MAX": (-8, 1), "M_MMAP_MAX": (-4, 0), "M_TRIM_THRESHOLD": (-1, -1)}


def keep_memory() -> bool:
    """Has this process keep the memory that it frees, for the next training step on a CPU.

    Each run of a compiled step takes memory for its temporary arrays and gives it back at the end.
    Where it is much, the C library fetches it from the system each time, which fills every page
    with zeros first. Results are the same bits. The process stays as large as its largest step was,
    and may become larger than without, as what is free is in pieces.

    It is a setting of the whole process: a library should leave it to the program. Call it before
    anything runs on JAX, as threads that have a heap of their own by then keep it.

    Returns:
      Whether it could be set: with glibc, which most of Linux has, and nowhere else.

    Example:
      >>> from priorityprop_jax import exact
      >>> kept = exact.keep_memory()

    References:
      mallopt(3), https://man7.org/linux/man-pages/man3/mallopt.3.html
    """
    try:
        libc = ctypes.CDLL(None)
        libc.gnu_get_libc_version  # noqa: B018  # others number the settings otherwise
        mallopt = libc.mallopt
    except (AttributeError, OSError, TypeError):
        return False
    return all([mallopt(name, value) == 1 for name, value in _SETTINGS.values()])
