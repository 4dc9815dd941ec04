"""Training that is fast. All of training works without it: ``fedlora.learn.hooks`` looks for this package, nobody else below.

What is here implements :class:`fedlora.learn.hooks.Fast`. It imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch

    from fedlora.core.events import Report
    from fedlora.core.plan import Plan
    from fedlora.learn import fast
    from fedlora.learn.forward import Forward
    from fedlora.learn.hooks import Fast, MicroBatches, WorkerPool
    from fedlora.learn.options import Checkpointing

    _: Fast = fast  # a type checker compares them


def use_varlen(model: Any) -> bool:
    """See :func:`fedlora.learn.fast.attention.use_varlen`."""
    from fedlora.learn.fast import attention

    return attention.use_varlen(model)


def forward(model: Any, device: torch.device) -> Forward | None:
    """Over documents one behind another, where the model's attention takes them."""
    from fedlora.learn.fast.documents import DocumentForward, takes_documents

    return DocumentForward(model, device) if takes_documents(model) else None


def fused_layer(model: Any, device: torch.device) -> type:
    """:class:`fedlora.learn.fast.fused.FusedLora`, after Liger's kernels went into the model."""
    from fedlora.learn.fast.fused import FusedLora
    from fedlora.learn.fast.kernels import install_kernels

    install_kernels(model, device)
    return FusedLora


def micro_batches(
    model: Any,
    *,
    checkpointing: Checkpointing | Literal["auto"] = "auto",
    floor: Checkpointing = "none",
    tokens: int = 0,
    limit_bytes: int = 0,
    report: Report = lambda event, facts: None,
) -> MicroBatches:
    """See :class:`fedlora.learn.fast.tuning.MicroBatchTuner`."""
    from fedlora.learn.fast.tuning import MicroBatchTuner

    return MicroBatchTuner(model, checkpointing=checkpointing, floor=floor, tokens=tokens, limit_bytes=limit_bytes, report=report)


def team(
    spawn: Sequence[str],
    site_file: Path,
    plan: Plan,
    *,
    devices: Sequence[str],
    state: Path,
    training_digest: bytes,
    report: Report,
) -> WorkerPool:
    """See :class:`fedlora.learn.fast.workers.WorkerPool`."""
    from fedlora.learn.fast import workers

    return workers.WorkerPool(
        spawn, site_file, plan, devices=devices, state=state, training_digest=training_digest, report=report
    )
