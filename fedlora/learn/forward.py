"""From a packed batch to the loss of each supervised token, with logits only where there is a label."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora.data import IGNORE, Batch, regroup
from fedlora.learn.fast.attention import VARLEN, arguments, document_ends

__all__ = ["HEAD_ROWS", "LENGTH_MULTIPLE", "Forward", "Scored", "block_mask"]

HEAD_ROWS = 2048
"""Supervised tokens whose logits are held at once while training: 0.4 GB in float32 for a vocabulary of 49,152."""
LENGTH_MULTIPLE = 64
"""Tokens to whose multiple a row of documents is padded."""
_HEAD_BYTES = 1 << 29
"""The same for the fused loss, in bytes of logits."""


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
    document: np.ndarray[Any, np.dtype[np.int64]]


def block_mask(documents: torch.Tensor) -> torch.Tensor:
    """Who may look at whom: each token at itself and at what stands before it in its own document.

    Args:
        documents: (rows, length) int64; padding is -1 and sees padding only.

    Returns:
        (rows, 1, length, length) bool, True where query (third axis) may attend to key (fourth).
    """
    same = documents[:, :, None] == documents[:, None, :]
    return torch.tril(same)[:, None]


class Forward:
    """The causal language model of a base, applied to packed batches.

    The vocabulary dominates training on short completions, so the output head is applied only at positions that predict a
    supervised token. That is exact if the model's logits are its head applied to its decoder's output, which is tried once,
    here; models that scale or cap their logits go through their own ``logits_to_keep``.

    Raises:
        ValueError: the model can do neither.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._additive = model.config._attn_implementation == "eager"
        self._varies = model.config._attn_implementation == VARLEN
        self.split = _split_is_exact(model, device)
        if not self.split and "logits_to_keep" not in inspect.signature(model.forward).parameters:
            raise ValueError(f"{type(model).__name__} offers no way to compute logits at chosen positions only")

    @property
    def padded(self) -> bool:
        """Whether attention takes rows with padding and a mask, rather than documents one behind another."""
        return not self._varies

    def __call__(self, batch: Batch) -> Scored:
        """Losses at the batch's supervised tokens.

        Raises:
            ValueError: a label has no token of its own document before it.
        """
        if self._varies and len(batch.labels) > 1:
            (batch,) = regroup([batch], tokens=batch.labels.size, pad_token_id=0, multiple=LENGTH_MULTIPLE)
        row, column = np.nonzero(batch.labels != IGNORE)
        if (column == 0).any() or (batch.documents[row, column - 1] != batch.documents[row, column]).any():
            raise ValueError("the first label of a document must be IGNORE: nothing predicts it")
        targets = torch.from_numpy(batch.labels[row, column]).to(self._device)
        where = (torch.from_numpy(row).to(self._device), torch.from_numpy(column - 1).to(self._device))
        recording = torch.is_grad_enabled()
        if self.split and self._varies:
            states = self._model.base_model(**self._inputs(batch)).last_hidden_state[0]
            return self._fused_loss(states.index_select(0, where[1]), targets, batch.documents[row, column])
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

    def _fused_loss(self, hidden: torch.Tensor, targets: torch.Tensor, document: np.ndarray[Any, np.dtype[np.int64]]) -> Scored:
        head = self._model.get_output_embeddings()
        rows = max(1, _HEAD_BYTES // (8 * head.weight.shape[0]))
        nll, right = _Nats.apply(hidden, targets, head.weight, head.bias, rows, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return Scored(nll, right, document)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        if self._varies:
            ends, longest = document_ends(torch.from_numpy(batch.documents[0]))
            return {
                "input_ids": torch.from_numpy(batch.input_ids).to(self._device),
                "position_ids": torch.from_numpy(batch.position_ids).to(self._device),
                **arguments(ends.to(self._device), longest),
                "use_cache": False,
            }
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

    def _head(
        self, hidden: torch.Tensor, targets: torch.Tensor, recording: bool, *, many: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        head = self._model.get_output_embeddings()

        def run(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return _score(head(rows), targets, recording)

        # Several slices: forget each one's logits and compute them again on the way back, or slicing would save nothing.
        result: tuple[torch.Tensor, torch.Tensor] = (
            checkpoint(run, hidden, use_reentrant=False) if recording and many else run(hidden)
        )
        return result


class _Nats(torch.autograd.Function):
    """Hidden states (n, d) and targets (n,) -> nats (n,) float32 and whether each target is the most likely token (n,) bool.

    A slice of rows at a time: its logits, the loss and at once the gradient of the loss, then the logits go. The gradient of
    a row's loss depends on that row alone, so that the way back only scales it (as in Hsu et al., Liger Kernel, 2024). What is
    most likely is told only where no gradient is recorded.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        targets: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        rows: int,
        recording: bool,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        nll = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
        right = torch.zeros(0 if recording else len(hidden), dtype=torch.bool, device=hidden.device)
        gradient = torch.empty_like(hidden) if recording else None
        for at in range(0, len(hidden), rows):
            part = slice(at, at + rows)
            logits = functional.linear(hidden[part], weight, bias)
            if gradient is None:
                right[part] = logits.argmax(-1) == targets[part]
            log_p = functional.log_softmax(logits, -1, dtype=torch.float32)
            picked = log_p.gather(1, targets[part, None])
            nll[part] = -picked[:, 0]
            if gradient is not None:
                p = torch.exp(log_p, out=logits)  # in the logits' own type and memory
                p.scatter_(1, targets[part, None], torch.expm1(picked).to(p.dtype))  # p - 1 where the target is
                torch.mm(p, weight, out=gradient[part])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(right)
        return nll, right

    @staticmethod
    def backward(ctx: Any, nats: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (gradient * nats[:, None]).to(gradient.dtype), None, None, None, None, None  # multiplied in float32


def _score(logits: torch.Tensor, targets: torch.Tensor, recording: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    nll = functional.cross_entropy(logits, targets, reduction="none")
    return nll, torch.zeros(0, dtype=torch.bool, device=nll.device) if recording else logits.argmax(-1) == targets


@torch.no_grad()
def _split_is_exact(model: Any, device: torch.device) -> bool:
    ids = torch.arange(1, 9, device=device)[None] % model.config.get_text_config().vocab_size
    given: dict[str, Any] = {"input_ids": ids, "use_cache": False}
    if model.config._attn_implementation == VARLEN:
        given |= arguments(torch.tensor([0, 8], dtype=torch.int32, device=device), 8)
    hidden = model.base_model(**given).last_hidden_state
    ours, its = model.get_output_embeddings()(hidden), model(**given).logits
    return ours.dtype == its.dtype and torch.equal(ours, its)
