"""Large libraries imported without Python's search for garbage.

Each search walks through all modules that are there by then and finds nothing, because modules stay: a third of the processor
time of a start with Flower's libraries, more than a tenth with torch's family. The interpreter searches once more at its end.
"""

from __future__ import annotations

import atexit
import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collecting() -> Iterator[None]:
    """Imports in this block are not searched for garbage, nor is this process at its end."""
    own = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if own:
            gc.enable()


atexit.register(gc.freeze)  # at the end only: what is frozen earlier is never freed, a notebook's own models too
