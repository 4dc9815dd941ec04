"""Sums of gradients in which no unit counts more than a fixed norm.

Abadi et al., Deep Learning with Differential Privacy, 2016; units of several documents: McMahan et al., Learning Differentially
Private Recurrent Language Models, 2018.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fedlora.core.adapter import Factors
from fedlora.core.errors import ResourceError
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.hooks import ProcessGroup
from fedlora.learn.lora import LoraModel
from fedlora.learn.options import Checkpointing
from fedlora.learn.private.trial import try_units
from fedlora.learn.private.units import Unit, cut, lay_out, shard_units, supervised_units
from fedlora.learn.private.written_out import unit_gradients


@dataclass(frozen=True, slots=True, eq=False)
class ClippedSum:
    """What some units gave together. All of it is secret until noise is added, the count as well.

    Attributes:
        tensors: of the trained factors' shapes, in the layout's order, float64, where the model computes.
        count: units that were asked for, whatever they gave.
    """

    tensors: tuple[torch.Tensor, ...]
    count: int


class ClippedGradients:
    """Sums of clipped gradients of a model's adapter.

    A unit's gradient is that of the mean over its documents of the mean loss over a document's own supervised tokens, nats; it is
    multiplied by min(1, clip_norm / its Euclidean norm over all trained factors of all modules). So a unit more or less moves
    the sum by clip_norm at most, but for rounding: the products of other units may round differently beside other neighbors.

    Args:
        model: the base with the adapter; its values are those at the time of a sum.
        clip_norm: C, positive and finite, of the same unit as the gradient.
        tokens: of a micro-batch, without padding (with it where a row holds one document only). More is faster and takes more
            memory, also for the gradients themselves: an adapter in float32 for each unit of a micro-batch.
        max_length: tokens of a row.
        checkpointing: what is recomputed in the backward pass.

    Raises:
        ConfigError: the adapter has dropout, or the base is held in 8 bits.
        ModelError: this base does not give each document's own gradient, see :func:`fedlora.learn.private.trial.try_units`.
        ResourceError: not enough memory to try it.
        ValueError: clip_norm is not positive and finite, or tokens is below 1.
    """

    def __init__(
        self, model: LoraModel, *, clip_norm: float, tokens: int, max_length: int, checkpointing: Checkpointing = "none"
    ) -> None:
        if not (math.isfinite(clip_norm) and clip_norm > 0) or tokens < 1:
            raise ValueError(f"clip_norm {clip_norm}, {tokens} tokens")
        self._model, self._clip_norm, self._tokens = model, clip_norm, tokens
        self._max_length, self._checkpointing = max_length, checkpointing
        model.set_checkpointing(checkpointing)
        try_units(model)

    def sum(self, units: Sequence[Unit], *, factors: Factors = "AB", ranks: ProcessGroup | None = None) -> ClippedSum:
        """The sum over these units of their clipped gradients; zeros without any.

        A unit whose gradient is NaN or infinite counts exactly zero, and nothing is raised for it: an error would show that it
        is there. The same holds for a unit without a supervised token. What others in its row took over from such a unit (a
        masked NaN is NaN) is computed again without it.

        Args:
            factors: what is trained.
            ranks: other processes that sum some of the units each; all are given the same units, and get the same bits.

        Raises:
            DataError: a unit is longer than a micro-batch, see :func:`fedlora.learn.private.units.check_units`.
            ResourceError: out of memory on a single unit, or another rank ended or has other units.
            ValueError: a document is longer than max_length.
        """
        model = self._model
        model.set_trained(factors)
        model.set_checkpointing(self._checkpointing)
        model.clear_gradients()
        model.peft_model.train()  # what is recomputed is recomputed in training alone; there is no dropout
        sums = tuple(torch.zeros_like(p, dtype=torch.float64) for p in model.trainable(factors))
        micro_batches = cut(supervised_units(units), tokens=self._tokens, packs=model.packs)
        if ranks is not None:
            own = shard_units(units, part=ranks.rank, parts=ranks.count)
            micro_batches = cut(supervised_units(own), tokens=self._tokens, packs=model.packs)
        for micro_batch in micro_batches:
            self._add(micro_batch, sums)
        if ranks is not None:
            ranks.sum_up(sums, len(units))
        return ClippedSum(sums, len(units))

    def _add(self, units: list[Unit], sums: Sequence[torch.Tensor]) -> None:
        """Adds what these units give, at once or, where that cannot be, in halves."""
        if not self._add_at_once(units, sums) and len(units) > 1:
            half = len(units) // 2
            self._add(units[:half], sums)
            self._add(units[half:], sums)

    def _add_at_once(self, units: list[Unit], sums: Sequence[torch.Tensor]) -> bool:
        """False: something is not finite, or does not fit into memory; ``sums`` are as they were.

        Raises:
            ResourceError: a single unit does not fit.
        """
        try:
            return self._added(units, sums)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        # After the except block: its traceback keeps the failed attempt's tensors alive.
        self._model.clear_gradients()
        if self._model.base.device.type == "cuda":
            torch.cuda.empty_cache()
        if len(units) == 1:
            raise ResourceError(
                f"out of memory on one unit of {len(units[0])} documents",
                hint="use a smaller max_length in the plan, fewer documents a unit, or full activation checkpointing",
            )
        return False

    def _added(self, units: list[Unit], sums: Sequence[torch.Tensor]) -> bool:
        forward = self._model.forward
        micro_batch = lay_out(
            units, packs=forward.packs, padded=forward.padded, max_length=self._max_length, pad_token_id=self._model.pad_token_id
        )
        gradients = unit_gradients(self._model, micro_batch)
        norms = gradients.norms()
        if not bool(torch.isfinite(norms).all()):
            return False
        gradients.add_to(sums, (self._clip_norm / norms).clamp(max=1.0))
        return True
