"""Memory that the C library holds free for this process, given back to the system."""

from __future__ import annotations

import ctypes
from contextlib import suppress
from typing import Final

GIVES_BACK: Final = {"MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_ARENA_MAX": "2"}
"""Environment of a process that passes long messages on: whatever has 1 MiB or more goes back as soon as it is freed. glibc would
keep up to 32 MiB of each size in each thread, at a relay as much as an adapter of 84 million values. Not for training, where
memory of the same sizes is wanted again at every step."""


def give_back() -> None:
    """Gives back what is free now. Does nothing without glibc."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
