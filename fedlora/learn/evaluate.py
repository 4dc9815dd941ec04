"""Scores on held-out examples: loss, and whether greedy decoding would give the completion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fedlora.core.errors import ResourceError
from fedlora.core.plan import Training
from fedlora.data import IGNORE, Tokens, in_order
from fedlora.learn.lora import LoraModel
from fedlora.learn.memory import is_out_of_memory

_AT_ONCE = 16_384
"""Tokens of a batch in evaluation, at most, where nothing was measured."""


@dataclass(frozen=True, slots=True)
class Scores:
    """Means over held-out examples.

    Attributes:
        nll: nats per supervised token, each token weighing the same.
        exact_match: share of examples whose every supervised token, the end token included, is the most likely one.
        coarse_match: share of those whose first characters are right; None if not asked for.
        tokens: supervised tokens.
        examples: examples.
    """

    nll: float
    exact_match: float
    coarse_match: float | None
    tokens: int
    examples: int

    def metrics(self) -> dict[str, float]:
        """By the names that a plan's ``evaluation.share`` uses."""
        found = {
            "eval/nll": self.nll,
            "eval/exact_match": self.exact_match,
            "eval/tokens": float(self.tokens),
            "eval/examples": float(self.examples),
        }
        return found if self.coarse_match is None else {**found, "eval/coarse_match": self.coarse_match}


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
    nats, tokens, exact, coarse, seen = 0.0, 0, 0, 0, 0
    try:
        with torch.no_grad():
            packs, pad = packing and model.packs, model.pad_token_id
            for batch in in_order(examples, rows=rows, max_length=max_length, packing=packs, pad_token_id=pad):
                scored = model.forward(batch)
                nats += float(scored.nll.double().sum())
                tokens += len(scored.document)
                right = scored.right.cpu().numpy()
                for number, source in enumerate(batch.sources):
                    hits: NDArray[np.bool_] = right[scored.document == number]
                    exact += bool(hits.all())
                    coarse += bool(hits[: depth[source]].all())
                    seen += 1
    finally:
        model.peft_model.train(was_training)
    return Scores(nats / max(tokens, 1), exact / seen, coarse / seen if coarse_chars else None, tokens, seen)


def _tokens_needed(tokenizer: Any, example: Tokens, characters: int) -> int:
    """How many supervised tokens it takes until their stripped text has this many characters; all, if it never has."""
    labels = [int(t) for t in example.labels if t != IGNORE]
    for count in range(1, len(labels) + 1):
        if characters and len(tokenizer.decode(labels[:count], skip_special_tokens=True).strip()) >= characters:
            return count
    return len(labels)
