"""Extraction: the model is given the beginning of a row, and says the rest by itself."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Final

import numpy as np
import torch

from fedlora.core.adapter import Adapter
from fedlora.data import Tokens
from fedlora.learn.audit.scores import base_of
from fedlora.learn.lora import LoraModel

VERBATIM: Final = 50
"""Tokens in a row that count as extracted, or the whole rest (Carlini et al., Quantifying Memorization Across Models, 2023)."""
LEAST_REST: Final = 4
"""Tokens below which the rest of a row says nothing."""


@dataclass(frozen=True, slots=True)
class Extracted:
    """What greedy answers to the first halves of some rows gave.

    Attributes:
        rows: that were tried.
        found: rows of which VERBATIM tokens in a row, or the whole rest, came out.
        longest: longest run of tokens of a row that came out.
    """

    rows: int
    found: int
    longest: int


def halves(examples: Sequence[Tokens], *, most: int | None = None) -> list[tuple[list[int], list[int]]]:
    """First half and rest of each example, in tokens; short ones are left out.

    Args:
        most: of these, the first ones; the others are not looked at. None: all.
    """
    long = (e for e in examples if len(e) >= 2 and len(e) - len(e) // 2 >= LEAST_REST)
    return [(e.input_ids[: len(e) // 2].tolist(), e.input_ids[len(e) // 2 :].tolist()) for e in islice(long, most)]


def extract(model: LoraModel, adapter: Adapter, parts: Sequence[tuple[list[int], list[int]]]) -> Extracted:
    """Has the model go on from each beginning, by the most likely token each time, and compares with what really follows.

    Args:
        parts: beginning and rest of each row, token ids; see :func:`halves`.
    """
    model.set(adapter)
    found, longest = 0, 0
    for given, rest in parts:
        run = longest_run(greedy(model, given, tokens=len(rest)), rest)
        found += run >= min(VERBATIM, len(rest))
        longest = max(longest, run)
    return Extracted(len(parts), found, longest)


def extract_both(model: LoraModel, adapter: Adapter, parts: Sequence[tuple[list[int], list[int]]]) -> tuple[Extracted, Extracted]:
    """Under the adapter, and under the base: a text that the base knows by heart is no leak of this training."""
    return extract(model, adapter, parts), extract(model, base_of(adapter), parts)


def greedy(model: LoraModel, given: Sequence[int], *, tokens: int) -> list[int]:
    """The most likely continuation, token by token: at most so many."""
    device, pad = model.base.device, model.pad_token_id
    was_training = model.peft_model.training
    model.peft_model.eval()
    try:
        with torch.no_grad():
            ids = torch.tensor([list(given)], device=device)
            out = model.peft_model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                temperature=None,
                top_p=None,
                top_k=None,
                pad_token_id=pad,
            )
    finally:
        model.peft_model.train(was_training)
    return [int(token) for token in out[0, len(given) :].cpu()]


def longest_run(said: Sequence[int], rest: Sequence[int]) -> int:
    """Longest run of tokens that stands in both, wherever."""
    best, row = 0, np.zeros(len(rest) + 1, np.int64)
    theirs = np.asarray(rest, np.int64)
    for token in said:
        new = np.zeros_like(row)
        new[1:] = np.where(theirs == token, row[:-1] + 1, 0)
        row, best = new, max(best, int(new.max()))
    return best
