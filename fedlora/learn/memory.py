"""How a lack of memory is told from other errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Torch's own error, or one of the many that the driver, Triton, cuBLAS and the allocator on a CPU have for it."""
    said = str(error).lower()
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(word in said for word in ("out of memory", "not enough memory", "alloc_failed"))
    )
