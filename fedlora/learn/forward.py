"""From a packed batch to the loss of each supervised token, with logits only where there is a label."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora.data import IGNORE, Batch
from fedlora.learn._internals import attention_of

HEAD_ROWS = 2048
"""Supervised tokens whose logits are held at once while training: 0.4 GB in float32 for a vocabulary of 49,152."""
I64: TypeAlias = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Scored:
    """One batch, at its n supervised tokens in row-major order.

    Attributes:
        nll: (n,) float32, nats.
        right: (n,) bool, whether the token is the most likely one; empty while gradients are recorded.
        document: (n,) int64, the batch's document number of each.
    """

    nll: torch.Tensor
    right: torch.Tensor
    document: I64


def block_mask(documents: torch.Tensor) -> torch.Tensor:
    """Who may look at whom: each token at itself and at what stands before it in its own document.

    Args:
        documents: (rows, length) int64; padding is -1 and sees padding only.

    Returns:
        (rows, 1, length, length) bool, True where query (third axis) may attend to key (fourth).
    """
    same = documents[:, :, None] == documents[:, None, :]
    return torch.tril(same)[:, None]


def supervised(batch: Batch) -> tuple[I64, I64]:
    """Row and column of each supervised token, (n,) each, in row-major order.

    Raises:
        ValueError: a label has no token of its own document before it.
    """
    row, column = np.nonzero(batch.labels != IGNORE)
    if (column == 0).any() or (batch.documents[row, column - 1] != batch.documents[row, column]).any():
        raise ValueError("the first label of a document must be IGNORE: nothing predicts it")
    return row, column


class Forward:
    """The causal language model of a base, applied to packed batches.

    The vocabulary dominates training on short completions, so the output head is applied only at positions that predict a
    supervised token. That is exact if the model's logits are its head applied to its decoder's output, which is tried once,
    here; models that scale or cap their logits go through their own ``logits_to_keep``.

    Attributes:
        padded: whether attention takes rows with padding and a mask, rather than documents one behind another.

    Raises:
        ValueError: the model can do neither.
    """

    padded = True

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._additive = attention_of(model) == "eager"
        self.split = self._split_is_exact()
        if not self.split and "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{type(model).__name__} offers no way to compute logits at chosen positions only")

    def __call__(self, batch: Batch) -> Scored:
        """Losses at the batch's supervised tokens.

        Raises:
            ValueError: a label has no token of its own document before it.
        """
        row, column = supervised(batch)
        targets = torch.from_numpy(batch.labels[row, column]).to(self._device)
        where = (torch.from_numpy(row).to(self._device), torch.from_numpy(column - 1).to(self._device))
        recording = torch.is_grad_enabled()
        if self.split:
            hidden = self._model.base_model(**self._inputs(batch)).last_hidden_state[where]
            parts = [self._head(hidden[i : i + HEAD_ROWS], targets[i : i + HEAD_ROWS], recording, many=len(targets) > HEAD_ROWS)
                     for i in range(0, len(targets), HEAD_ROWS)]  # fmt: skip
        else:
            kept, index = torch.unique(where[1], return_inverse=True)
            logits = self._model(**self._inputs(batch), logits_to_keep=kept).logits[where[0], index]
            parts = [_score(logits, targets, recording)]
        nll = torch.cat([p[0] for p in parts]) if parts else torch.zeros(0, device=self._device)
        right = torch.cat([p[1] for p in parts]) if parts else torch.zeros(0, dtype=torch.bool, device=self._device)
        return Scored(nll, right, batch.documents[row, column])

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments."""
        mask = block_mask(torch.from_numpy(batch.documents).to(self._device))
        if self._additive:  # the eager kernel adds its mask to the scores
            dtype = self._model.get_input_embeddings().weight.dtype
            mask = torch.zeros(mask.shape, dtype=dtype, device=self._device).masked_fill(~mask, torch.finfo(dtype).min)
        return {
            "input_ids": torch.from_numpy(batch.input_ids).to(self._device),
            "position_ids": torch.from_numpy(batch.position_ids).to(self._device),
            "attention_mask": mask,
            "use_cache": False,
        }

    def _one_document(self, length: int) -> dict[str, Any]:
        """What the model's attention wants besides the tokens of one document."""
        return {}

    @torch.no_grad()
    def _split_is_exact(self) -> bool:
        model = self._model
        ids = torch.arange(1, 9, device=self._device)[None] % model.config.get_text_config().vocab_size
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False, **self._one_document(ids.shape[1])}
        hidden = model.base_model(**given).last_hidden_state
        ours, its = model.get_output_embeddings()(hidden), model(**given).logits
        return ours.dtype == its.dtype and torch.equal(ours, its)

    def _head(
        self, hidden: torch.Tensor, targets: torch.Tensor, recording: bool, *, many: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = self._model.get_output_embeddings()

        def run(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _score(head(rows), targets, recording)

        # Several slices: drop each one's logits and recompute them in the backward pass, or slicing would save nothing.
        result: tuple[torch.Tensor, torch.Tensor] = (
            checkpoint(run, hidden, use_reentrant=False) if recording and many else run(hidden)
        )
        return result


def _score(logits: torch.Tensor, targets: torch.Tensor, recording: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    nll = functional.cross_entropy(logits, targets, reduction="none")
    return nll, torch.zeros(0, dtype=torch.bool, device=nll.device) if recording else logits.argmax(-1) == targets
