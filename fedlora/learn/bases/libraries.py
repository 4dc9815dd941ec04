"""bitsandbytes and PEFT, without torch's compiler: every other file takes them from here.

bitsandbytes decorates its fallbacks with ``torch.compile``, which loads the compiler with all its parts while it is imported:
2.3 of 6.9 seconds of processor time before a process can train (simulations/LOG.md). The fallbacks (an odd width, blocks of 2,048
on a CPU) then compile themselves by the machine's C++ compiler, if it has one: minutes, and bits that depend on it. Here they run
as they are written. Once bitsandbytes is there, ``torch.compile`` is torch's own again.

Python's search for garbage is off while they are imported, and at the process's end: 2.0 of 6.6 seconds of processor time of a
process that does no more (simulations/LOG.md).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from fedlora.processes.imports import without_collecting


@contextmanager
def _without_compiler() -> Iterator[None]:
    def as_written(function: Callable[..., Any] | None = None, **_: object) -> Callable[..., Any]:
        return function if function is not None else as_written

    own, torch.compile = torch.compile, as_written  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = own


with without_collecting():
    with _without_compiler():
        import bitsandbytes as bitsandbytes

    import peft as peft  # it imports bitsandbytes
