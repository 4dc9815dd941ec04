"""How a base reads several documents in one row without one seeing another: found out by trying, on this machine.

Names of configurations tell too little. Some bases take a mask for each kind of layer, some build their own from positions, and
those with a state (or with distances as a bias) cannot be kept apart in a row at all: they get one document a row.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, Literal, TypeAlias

import numpy as np
import torch

from fedlora.data import IGNORE, Batch

Way: TypeAlias = Literal["blocks", "positions", "documents", "alone"]
"""What tells a model's layers where a document ends. blocks: a mask for each kind of layer. positions: the positions alone, of
which the model makes its own masks. documents: where each ends, for a kernel without padding
(:mod:`fedlora.learn.fast.documents`). alone: nothing, there is one document in a row."""

PACKED: tuple[Way, ...] = ("blocks", "positions")
"""Ways to have several documents in a row, in the order in which they are tried."""
_FIRST, _SECOND = 7, 9
"""Tokens of the two documents with which it is tried."""
_WINDOW = 5
"""Tokens to which windows are cut for the trial: fewer than those of either document."""
_EXACT = 2e-6
"""Nats between losses that the same arithmetic on the same shapes gave."""
_ROUNDED = {torch.float32: 1e-3}
_ROUNDED_OTHERWISE = 0.1
"""Nats between losses of the same tokens in rows of other shapes, by the type that is computed in."""
_SEEN = 0.1
"""Share of what a neighbor changes when it is seen; more is no rounding."""
_NOISE = 8.0
"""How many times more than rounding (experts: a token's group depends on other tokens) is no rounding any more."""


@dataclass(frozen=True, slots=True)
class Apart:
    """What a trial of one way found, in nats by which a token's loss moved at most.

    Attributes:
        before: when the document before it in the row changed.
        behind: when the document behind it changed: rounding, or a look ahead.
        alone: against its loss in a row of its own.
        joined: the same if the two documents are one: what seeing the other changes.
    """

    before: float
    behind: float
    alone: float
    joined: float

    def right(self, dtype: torch.dtype) -> bool:
        """Whether no document sees another."""
        rounded = _ROUNDED.get(dtype, _ROUNDED_OTHERWISE)
        apart = self.before <= max(_EXACT, _NOISE * self.behind) and self.behind <= rounded
        return apart and self.alone <= max(rounded, _SEEN * self.joined)


Losses: TypeAlias = Callable[[Batch, Way], torch.Tensor]
"""(n,) losses at the supervised tokens of a batch that is read in this way, nats."""


def try_way(way: Way, losses: Losses, model: Any) -> Apart:
    """Tries one way on two short documents, with windows cut shorter than them.

    Raises:
        Exception: whatever the model raises if it cannot be given its rows in this way.
    """
    first, second = _ids(model, _FIRST, skip=0), _ids(model, _SECOND, skip=_FIRST)
    others = _ids(model, _FIRST, skip=0, change=11), _ids(model, _SECOND, skip=_FIRST, change=11)
    with short_windows(model):
        both = losses(row_of([first, second]), way)
        before = losses(row_of([others[0], second]), way)
        behind = losses(row_of([first, others[1]]), way)
        alone = losses(row_of([second]), "alone")
        joined = losses(row_of([np.concatenate([first, second])]), "alone")
    own, its = slice(_FIRST - 1, None), slice(None, _FIRST - 1)  # a document of n tokens has n - 1 losses
    return Apart(
        before=farthest(before[own], both[own]),
        behind=farthest(behind[its], both[its]),
        alone=farthest(both[own], alone),
        joined=farthest(joined[-len(alone) :], alone),
    )


def looks_ahead(losses: Losses, model: Any) -> bool:
    """Whether a token's loss depends on a later token of its document: such a model is no causal one.

    Raises:
        Exception: whatever the model raises if it cannot compute at all.
    """
    tokens, other = _ids(model, _SECOND, skip=0), _ids(model, 1, skip=_SECOND, change=11)
    own = losses(row_of([tokens]), "alone")
    ahead = losses(row_of([np.concatenate([tokens[:-1], other])]), "alone")
    back = losses(row_of([np.concatenate([other, tokens[1:]])]), "alone")
    rounded = _ROUNDED.get(model.get_input_embeddings().weight.dtype, _ROUNDED_OTHERWISE)
    return farthest(ahead[:-1], own[:-1]) > max(rounded, _SEEN * farthest(back[1:], own[1:]))


def farthest(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest distance of two vectors' values; NaN is far."""
    found = float((a.detach().float() - b.detach().float()).abs().max())
    return found if found == found else float("inf")


def row_of(documents: Sequence[np.ndarray[Any, Any]], *, padding: int = 3) -> Batch:
    """One row of documents, each token but the first of each with a loss; 0 behind them.

    Args:
        documents: ids, (tokens,) int64 each.
    """
    sizes = [len(d) for d in documents]
    ids = np.concatenate([*documents, np.zeros(padding, np.int64)])[None]
    positions = np.concatenate([*map(np.arange, sizes), np.zeros(padding, np.int64)])[None]
    numbers = np.concatenate([np.repeat(np.arange(len(sizes)), sizes), np.full(padding, -1)])[None]
    labels = np.where((numbers < 0) | (positions == 0), IGNORE, ids)
    return Batch(ids, labels, positions, numbers, tuple(range(len(sizes))))


def rows_of(documents: Sequence[np.ndarray[Any, Any]]) -> Batch:
    """The same documents, one in a row."""
    rows = [row_of([d], padding=max(map(len, documents)) - len(d)) for d in documents]
    parts = [np.concatenate([getattr(r, name) for r in rows]) for name in ("input_ids", "labels", "position_ids")]
    numbers = np.concatenate([np.where(r.documents >= 0, n, -1) for n, r in enumerate(rows)])
    return Batch(parts[0], parts[1], parts[2], numbers, tuple(range(len(rows))))


def _ids(model: Any, count: int, *, skip: int, change: int = 0) -> np.ndarray[Any, Any]:
    known = model.get_input_embeddings().weight.shape[0]
    found: np.ndarray[Any, Any] = (3 + 7 * (np.arange(count) + skip) + change) % known
    return found


@contextmanager
def short_windows(model: Any, tokens: int = _WINDOW) -> Iterator[None]:
    """Cuts every window and chunk of a model's attention to a few tokens, so that a short row tells how they are kept."""
    before = []
    for owner in chain([model.config.get_text_config()], model.modules()):
        for name in ("sliding_window", "attention_chunk_size"):
            size = getattr(owner, name, None)
            if type(size) is int and size > tokens:
                before.append((owner, name, size))
    try:
        for owner, name, _ in before:
            setattr(owner, name, tokens)
        yield
    finally:
        for owner, name, size in before:
            setattr(owner, name, size)


def window_of(model: Any) -> int:
    """Tokens that a layer with a window sees; 0: there is none."""
    size = getattr(model.config.get_text_config(), "sliding_window", None)
    return size if type(size) is int and size > 0 and getattr(model.config.get_text_config(), "use_sliding_window", True) else 0


def block_mask(documents: torch.Tensor, *, window: int = 0) -> torch.Tensor:
    """Who may look at whom: each token at itself and at what stands before it in its own document.

    Args:
        documents: (rows, length) int64; padding is -1 and sees padding only.
        window: tokens that each sees, itself included; 0: all.

    Returns:
        (rows, 1, length, length) bool, True where query (third axis) may attend to key (fourth).
    """
    same = torch.tril(documents[:, :, None] == documents[:, None, :])
    return (torch.triu(same, diagonal=1 - window) if window else same)[:, None]
