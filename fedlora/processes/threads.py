"""Long arrays on several cores: numpy, AES and SHA-256 leave the interpreter's lock alone while they work."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Final, TypeVar

_Piece = TypeVar("_Piece")
_Result = TypeVar("_Result")

_MOST: Final = 4  # beyond that memory is the limit, and a site's machine has other work


def cores() -> int:
    """Cores that this process may use, at most four."""
    allowed = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(allowed, _MOST)


def in_threads(work: Callable[[_Piece], _Result], pieces: Sequence[_Piece]) -> Iterator[_Result]:
    """The results for all pieces, in the order of the pieces, each as soon as it is there.

    The first error of a piece is raised when its turn comes. A single piece needs no thread.
    """
    if len(pieces) == 1 or cores() == 1:
        yield from map(work, pieces)
        return
    with ThreadPoolExecutor(cores()) as pool:
        yield from pool.map(work, pieces)
