"""Losses of single rows, under the adapter and under the base: what attacks on membership look at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

import numpy as np
import torch

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ResourceError
from fedlora.core.tables.audit import Score
from fedlora.data import Tokens, in_order
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.lora import LoraModel
from fedlora.privacy.audit import F64

UNREADABLE: Final = 1e6
"""Loss of a row that is NaN or infinite under an adapter, nats: the least likely of all, and no error that depends on a row."""


def losses(model: LoraModel, adapter: Adapter, examples: Sequence[Tokens], *, max_length: int, rows: int = 8) -> F64:
    """Mean loss over an example's supervised tokens, nats, (examples,) float64; each example stands alone in its row.

    Out of memory: half as many rows at once.

    Args:
        max_length: tokens of a row.
        rows: of max_length tokens at once, at most; of shorter ones as many more as have no more tokens.

    Raises:
        ResourceError: out of memory on a single row.
        WrongContext (wrong-layout): the adapter is not this model's.
    """
    rows = rows * max(1, max_length // max(map(len, examples), default=max_length))
    model.set(adapter)
    was_training = model.peft_model.training
    model.peft_model.eval()
    try:
        while True:
            try:
                return _losses(model, examples, max_length=max_length, rows=rows)
            except (RuntimeError, MemoryError) as e:
                if not is_out_of_memory(e):
                    raise
            if rows == 1:
                raise ResourceError("out of memory on one row", hint="use a smaller max_length in the plan")
            rows //= 2
    finally:
        model.peft_model.train(was_training)


def _losses(model: LoraModel, examples: Sequence[Tokens], *, max_length: int, rows: int) -> F64:
    found = np.full(len(examples), UNREADABLE)
    with torch.no_grad():
        for batch in in_order(examples, rows=rows, max_length=max_length, packing=False, pad_token_id=model.pad_token_id):
            scored = model.forward(batch)
            each = scored.nll.double().cpu().numpy()
            for number, source in enumerate(batch.sources):
                own = each[scored.document == number]
                loss = math.fsum(own) / max(len(own), 1)
                found[source] = loss if math.isfinite(loss) else UNREADABLE
    return found


def base_of(adapter: Adapter) -> Adapter:
    """The base without any adapter: every factor is zero."""
    return Adapter(np.zeros(adapter.layout.size, np.float32), adapter.layout)


def scores(
    model: LoraModel, adapter: Adapter, examples: Sequence[Tokens], *, score: Score, max_length: int, rows: int = 8
) -> F64:
    """How much each example looks as if it had been trained on, (examples,) float64: higher is more.

    Args:
        score: ``loss``: minus its loss under the adapter; ``ratio``: its loss under the base minus that, which is the log of the
            ratio of its likelihoods.
    """
    with_adapter = losses(model, adapter, examples, max_length=max_length, rows=rows)
    if score == "loss":
        return -with_adapter
    return losses(model, base_of(adapter), examples, max_length=max_length, rows=rows) - with_adapter
