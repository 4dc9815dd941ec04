"""Recognizes out-of-memory errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error means a lack of memory: torch's own class, or one of the texts of the driver, Triton, cuBLAS or a CPU."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("out of memory", "not enough memory", "alloc_failed"))
    )
