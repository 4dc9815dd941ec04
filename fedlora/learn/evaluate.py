"""Scores on held-out examples, as counters: loss, and whether greedy decoding would give the completion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.errors import ResourceError
from fedlora.core.metrics import NATS, to_nats
from fedlora.core.plan import Training
from fedlora.data import IGNORE, Tokens, in_order
from fedlora.learn.bases.memory import is_out_of_memory
from fedlora.learn.lora import LoraModel

_AT_ONCE = 16_384
"""Tokens of a batch in evaluation, at most, where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Sums over held-out examples.

    Law: the scores of two sets of examples added are those of all of them scored in the same batches, bit for bit.

    Attributes:
        nats: loss in units of 2^-16 nats, rounded half to even for each example.
        exact: examples whose every supervised token, the end token included, is the most likely one.
        coarse: examples whose first characters are right; None if not asked for.
        tokens: supervised tokens.
        examples: examples.
    """

    nats: int
    exact: int
    coarse: int | None
    tokens: int
    examples: int

    def __add__(self, other: Scores) -> Scores:
        """Over the examples of both; coarse matches only where both have asked for them."""
        coarse = None if self.coarse is None or other.coarse is None else self.coarse + other.coarse
        return Scores(
            self.nats + other.nats, self.exact + other.exact, coarse, self.tokens + other.tokens, self.examples + other.examples
        )

    @property
    def nll(self) -> float:
        """Nats per supervised token, each token weighing the same; 0 without any."""
        return self.nats / (max(self.tokens, 1) * NATS)

    @property
    def exact_match(self) -> float:
        """Share of examples that match; 0 without any."""
        return self.exact / max(self.examples, 1)

    @property
    def coarse_match(self) -> float | None:
        """Share of examples whose first characters match; None if not asked for."""
        return None if self.coarse is None else self.coarse / max(self.examples, 1)

    def counters(self) -> dict[str, int]:
        """By their names in :mod:`fedlora.core.metrics`."""
        found = {
            "eval/nats": self.nats,
            "eval/tokens": self.tokens,
            "eval/exact": self.exact,
            "eval/examples": self.examples,
        }
        return found if self.coarse is None else {**found, "eval/coarse": self.coarse}


def evaluated_at_once(training: Training, tokens: int) -> int:
    """Rows of a batch in evaluation: a plan's batch may be larger than what a device computes at once.

    Args:
        tokens: most tokens of a micro-batch in training; 0: not measured.
    """
    return max(1, min(training.per_device_train_batch_size, (tokens or _AT_ONCE) // training.max_length))


def evaluate(
    model: LoraModel, examples: Sequence[Tokens], *, max_length: int, rows: int = 8, coarse_chars: int = 0, packing: bool = False
) -> Scores:
    """Scores the adapter as it is, without dropout and without generating.

    Exact match is teacher-forced: all supervised tokens of the example must be the most likely ones given the true tokens
    before them. For one completion at the end of an example this is the same as greedy decoding that gives exactly this
    completion: the first wrong token spoils both, and before it both have read the same tokens.

    Out of memory: half as many rows at once.

    Args:
        max_length: tokens of a row.
        rows: rows of a batch, at most.
        packing: put several examples into a row where the model keeps them apart; False: one a row.
        coarse_chars: k > 0 also counts completions whose first k characters, once stripped, are right: the tokens up to
            the one that completes them must all be the most likely ones.

    Raises:
        ValueError: there are no examples.
        ResourceError: out of memory on a single row.
        NonFiniteUpdate: the loss of an example is NaN or infinite.
    """
    if not examples:
        raise ValueError("nothing to evaluate on")
    while True:
        try:
            return _evaluate(model, examples, max_length=max_length, rows=rows, coarse_chars=coarse_chars, packing=packing)
        except (RuntimeError, MemoryError) as e:
            if not is_out_of_memory(e):
                raise
        if rows == 1:
            raise ResourceError("out of memory on one row of evaluation", hint="use a smaller max_length in the plan")
        rows //= 2


def _evaluate(
    model: LoraModel, examples: Sequence[Tokens], *, max_length: int, rows: int, coarse_chars: int, packing: bool
) -> Scores:
    tokenizer = model.tokenizer
    depth = [_tokens_needed(tokenizer, e, coarse_chars) for e in examples]
    was_training = model.peft_model.training
    model.peft_model.eval()
    nats, tokens, exact, coarse, seen = 0, 0, 0, 0, 0
    try:
        with torch.no_grad():
            packs, pad = packing and model.packs, model.pad_token_id
            for batch in in_order(examples, rows=rows, max_length=max_length, packing=packs, pad_token_id=pad):
                scored = model.forward(batch)
                losses = scored.nll.double().cpu().numpy()
                tokens += len(scored.document)
                right = scored.right.cpu().numpy()
                for number, source in enumerate(batch.sources):
                    own = scored.document == number
                    hits: NDArray[np.bool_] = right[own]
                    nats += to_nats(math.fsum(losses[own]))
                    exact += bool(hits.all())
                    coarse += bool(hits[: depth[source]].all())
                    seen += 1
    finally:
        model.peft_model.train(was_training)
    return Scores(nats, exact, coarse if coarse_chars else None, tokens, seen)


def _tokens_needed(tokenizer: Any, example: Tokens, characters: int) -> int:
    """How many supervised tokens it takes until their stripped text has this many characters; all, if it never has."""
    labels = [int(t) for t in example.labels if t != IGNORE]
    for count in range(1, len(labels) + 1):
        if characters and len(tokenizer.decode(labels[:count], skip_special_tokens=True).strip()) >= characters:
            return count
    return len(labels)
