"""How much of a step a device computes at once, and what it computes twice to have room: measured, not guessed.

What a step consists of is the plan's business and never changes here: its examples are cut into micro-batches, whose gradients
add up to the step's.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch

from fedlora.core.errors import ResourceError
from fedlora.core.events import Event, Report
from fedlora.core.facts import MicroBatches as MicroBatchFacts
from fedlora.core.facts import OutOfMemory
from fedlora.data import Batch, by_rows, regroup
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.fast.documents import LENGTH_MULTIPLE
from fedlora.learn.lora import LoraModel
from fedlora.learn.options import Checkpointing

log = logging.getLogger(__name__)
_ROOM = 0.94
"""Share of the memory at hand that is planned for; the rest is for what the allocator cannot join."""
_UNMEASURED = 2048
"""A step of so few tokens is tried as it is: measuring would take longer than it wins."""
_FIRST = 1024
"""Tokens of the first micro-batch that is tried; each further one has at most three times as many."""
_MOST = 32_768
"""Tokens of a micro-batch, at most, unless a site says more: larger ones are not faster."""


@dataclass(frozen=True, slots=True)
class Measured:
    """One setting, tried on this device with this site's own rows.

    Attributes:
        checkpointing: see :data:`fedlora.learn.options.Checkpointing`.
        tokens: most tokens of a micro-batch.
        peak_bytes: most memory that a step needs, the base, gradients and the optimizer's moments included.
        token_s: seconds a token, forward and backward.
    """

    checkpointing: Checkpointing
    tokens: int
    peak_bytes: int
    token_s: float


@dataclass(frozen=True, slots=True)
class _Probe:
    """One micro-batch: its tokens, the bytes it took above what was held, the seconds."""

    tokens: int
    peak: int
    seconds: float


class MicroBatchTuner:
    """Cuts steps into micro-batches; all learners that share a model share one tuner.

    Args:
        checkpointing: what to recompute; ``auto``, or a mode that these layers do not have: the fastest mode that fits.
        floor: the least that ``auto`` recomputes.
        tokens: most tokens of a micro-batch; 0: as many as fit, or as the plan says where nothing is to be measured.
        limit_bytes: most GPU memory to use; 0: what is free.
        report: told ``("micro-batches", facts)`` when something is chosen, ``("out-of-memory", facts)`` when it did not fit.

    Attributes:
        chosen: the last setting that was measured; None before, and where nothing is measured (on a CPU).
    """

    def __init__(
        self,
        model: LoraModel,
        *,
        checkpointing: Checkpointing | Literal["auto"] = "auto",
        floor: Checkpointing = "none",
        tokens: int = 0,
        limit_bytes: int = 0,
        report: Report = lambda event, facts: None,
    ) -> None:
        self._model = model
        self._wanted = checkpointing
        self._floor = floor
        self._wanted_tokens = tokens
        self._limit = limit_bytes
        self._report = report
        self._checkpointing: Checkpointing | None = None
        self._tokens = tokens
        self.chosen: Measured | None = None
        device = model.base.device
        if limit_bytes and device.type == "cuda":
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, limit_bytes / total), device)

    @property
    def checkpointing(self) -> Checkpointing:
        """What is recomputed now."""
        return self._checkpointing or "none"

    @property
    def tokens(self) -> int:
        """Most tokens of a micro-batch now; 0: the batches of the plan."""
        return self._tokens

    def prepare(self, batches: Sequence[Batch]) -> None:
        """Makes ready for steps like this one; measures on the first of them that is large, on CUDA."""
        size = self._size(batches)
        if (
            self._model.base.device.type == "cuda"
            and self.chosen is None
            and size
            and (size > _UNMEASURED or self._wanted_tokens)
        ):
            self.measure(batches)
        elif self._checkpointing is None and size:
            self._checkpointing = self._modes()[0]
        self._model.set_checkpointing(self.checkpointing)

    def cut(self, batches: Sequence[Batch]) -> Sequence[Batch]:
        """The micro-batches of a step: of documents one behind another, or of rows where attention takes a mask."""
        if self._model.forward.padded:
            return by_rows(batches, tokens=self._tokens) if self._tokens else batches
        on_gpu = self._model.base.device.type == "cuda"
        if not self._tokens and not on_gpu:
            return batches
        return self._regrouped(batches, self._tokens or sum(b.tokens for b in batches))

    def _regrouped(self, batches: Sequence[Batch], tokens: int) -> list[Batch]:
        pad = self._model.pad_token_id
        multiple = LENGTH_MULTIPLE if self._model.base.device.type == "cuda" else 1
        return regroup(batches, tokens=tokens, pad_token_id=pad, multiple=multiple)

    def _least(self, batches: Sequence[Batch]) -> int:
        """Tokens of the smallest micro-batch that can be cut: the longest example, or the longest row."""
        return max(b.labels.shape[1] for b in batches) if self._model.forward.padded else max(_lengths(batches))

    def _size(self, batches: Sequence[Batch]) -> int:
        """Tokens of a step, with padding where it is computed."""
        return sum(b.labels.size if self._model.forward.padded else b.tokens for b in batches)

    def shrink(self, batches: Sequence[Batch]) -> None:
        """After a step that did not fit: halves the micro-batch; once that is a single example, computes more again instead.

        Raises:
            ResourceError: nothing smaller is left.
        """
        longest, size = self._least(batches), self._size(batches)
        now = min(self._tokens or size, size)
        later = [
            d
            for d in self._model.checkpointing_modes
            if self._model.checkpointing_modes.index(d) > self._model.checkpointing_modes.index(self.checkpointing)
        ]
        if now > longest:
            self._tokens = max(longest, now // 2)
        elif later:
            self._checkpointing = later[0]
            self._model.set_checkpointing(later[0])
        else:
            raise ResourceError(
                f"out of memory on one example of {longest} tokens with full activation checkpointing",
                hint="use a smaller max_length in the plan, a smaller base, or a larger GPU",
            )
        self._report(Event.OUT_OF_MEMORY, OutOfMemory(tokens=self._tokens, checkpointing=self.checkpointing))
        log.warning("out of memory: micro-batches of %d tokens, activation checkpointing %s", self._tokens, self._checkpointing)

    def _modes(self) -> tuple[Checkpointing, ...]:
        offered, floor = self._model.checkpointing_modes, self._floor
        if self._wanted in offered:
            return tuple(d for d in offered if d == self._wanted)
        return offered[offered.index(floor) :] if floor in offered else offered[:1]

    def measure(self, batches: Sequence[Batch]) -> None:
        """Tries each setting of checkpointing on these rows, on CUDA, and takes the fastest that fits.

        Both factors are trained meanwhile: that takes most, and a rule may train them in turn.
        """
        began, modes = time.perf_counter(), self._modes()
        step, trained = self._size(batches), self._model.trained
        self._model.set_trained("AB")
        found = [m for checkpointing in modes if (m := self._try(batches, checkpointing, step)) is not None]
        self._model.set_trained(trained)
        if not found:
            self._checkpointing, self._tokens = modes[-1], self._least(batches)  # the step itself will say what is wrong
            self.chosen = Measured(self._checkpointing, self._tokens, 0, 0.0)
            self._report(Event.OUT_OF_MEMORY, OutOfMemory(tokens=self._tokens, checkpointing=self.checkpointing))
            return
        best = min(found, key=lambda m: m.token_s)
        self.chosen, self._checkpointing, self._tokens = best, best.checkpointing, best.tokens
        gib, took = best.peak_bytes / 2**30, time.perf_counter() - began
        facts = MicroBatchFacts(
            checkpointing=best.checkpointing, tokens=best.tokens, gib=gib, tokens_per_s=1 / best.token_s, seconds=took
        )
        self._report(Event.MICRO_BATCHES, facts)
        for m in found:
            log.info(
                "micro-batches: %s, %d tokens at once: %.1f GiB, %.0f tokens/s",
                m.checkpointing,
                m.tokens,
                m.peak_bytes / 2**30,
                1 / m.token_s,
            )

    def _try(self, batches: Sequence[Batch], checkpointing: Checkpointing, step: int) -> Measured | None:
        """The largest micro-batch that fits under one setting of checkpointing, and its speed; None if nothing fits."""
        device, longest = self._model.base.device, self._least(batches)
        self._model.set_checkpointing(checkpointing)
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated(device)
        free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
        moments = 8 * sum(p.numel() for p in self._model.trainable())
        room = _ROOM * (min(free, self._limit) if self._limit else free) - held - moments
        most = max(longest, self._wanted_tokens or _MOST)
        try:
            probe = self._probe(batches, min(most, max(_FIRST, longest)))
            before = _Probe(0, 0, 0.0)
            if probe.peak > room and probe.tokens > longest:  # a line through nothing would hide what does not shrink with it
                before = self._probe(batches, max(longest, probe.tokens // 2))
            while True:
                # A line through the last two: what a token takes grows less than in proportion while matrices are small.
                slope = max(1.0, (probe.peak - before.peak) / max(1, probe.tokens - before.tokens))
                fits = min(most, int(probe.tokens + (room - probe.peak) / slope))
                if fits < longest:
                    return None
                parts = -(-step // fits)
                tokens = min(fits, -(-step // parts) + longest // 2)  # cuts fall between examples
                if probe.tokens >= 0.8 * tokens:
                    break
                larger = self._larger(batches, min(tokens, 3 * probe.tokens))
                if larger is None:
                    tokens = probe.tokens  # what did fit
                    break
                if larger.tokens <= probe.tokens:
                    break  # long examples cannot be cut finer: this is as large as it gets
                before, probe = probe, larger
        except (RuntimeError, MemoryError) as e:
            self._model.clear_gradients()
            if not is_out_of_memory(e):
                raise
            return None
        peak = probe.peak * max(1.0, tokens / probe.tokens)
        return Measured(checkpointing, tokens, int(held + moments + peak), probe.seconds / probe.tokens)

    def _larger(self, batches: Sequence[Batch], tokens: int) -> _Probe | None:
        """A further micro-batch; None if it does not fit, whatever the line through the smaller ones says."""
        try:
            return self._probe(batches, tokens)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        self._model.clear_gradients()
        torch.cuda.empty_cache()
        return None

    def _probe(self, batches: Sequence[Batch], tokens: int) -> _Probe:
        """Forward and backward of one micro-batch of about this many tokens."""
        device = self._model.base.device
        pool = list(batches) * (1 + tokens // max(1, sum(b.tokens for b in batches)))
        padded = self._model.forward.padded
        one = max(by_rows(pool, tokens=tokens) if padded else self._regrouped(pool, tokens), key=lambda b: b.tokens)
        held = torch.cuda.memory_allocated(device)
        self._model.peft_model.train()
        with torch.random.fork_rng([device]):
            for _ in range(2):  # the first compiles kernels
                torch.cuda.synchronize(device)
                torch.cuda.reset_peak_memory_stats(device)
                began = time.perf_counter()
                (self._model.forward(one).nll.sum() / one.supervised).backward()  # type: ignore[no-untyped-call]
                torch.cuda.synchronize(device)
                seconds = time.perf_counter() - began
                peak = torch.cuda.max_memory_allocated(device) - held
                self._model.clear_gradients()
        return _Probe(self._size([one]), peak, seconds)


def _lengths(batches: Sequence[Batch]) -> list[int]:
    return [int(n) for b in batches for n in torch.bincount(torch.from_numpy(b.documents[b.documents >= 0])).tolist()]
