"""From documents one behind another, without padding or mask, to the loss of each supervised token."""

from __future__ import annotations

from typing import Any

import torch

from fedlora.data import Batch, regroup
from fedlora.learn.bases._internals import attention_of
from fedlora.learn.fast.attention import VARLEN, arguments, document_ends
from fedlora.learn.fast.loss import Nats
from fedlora.learn.forward import Forward, Scored, supervised
from fedlora.learn.packing import Way

LENGTH_MULTIPLE = 64
"""Tokens to whose multiple a row of documents is padded."""
_HEAD_BYTES = 1 << 29
"""Logits that are held at once, bytes."""


def takes_documents(model: Any) -> bool:
    """Whether :func:`fedlora.learn.fast.attention.use_varlen` has switched this model."""
    return attention_of(model) == VARLEN


class DocumentForward(Forward):
    """The same losses for a model that was switched: a batch becomes one row, and the loss does not keep its logits."""

    padded = False

    def _find_way(self) -> Way:
        return "documents"  # tried when the model was switched

    def __call__(self, batch: Batch) -> Scored:
        """Losses at the batch's supervised tokens.

        Raises:
            ValueError: a label has no token of its own document before it.
        """
        if len(batch.labels) > 1:
            (batch,) = regroup([batch], tokens=batch.labels.size, pad_token_id=0, multiple=LENGTH_MULTIPLE)
        if not self.split:
            return super().__call__(batch)
        row, column = supervised(batch)
        targets = torch.from_numpy(batch.labels[row, column]).to(self._device)
        where = torch.from_numpy(column - 1).to(self._device)
        states = self._model.base_model(**self._inputs(batch)).last_hidden_state[0].index_select(0, where)
        head = self._model.get_output_embeddings()
        rows = max(1, _HEAD_BYTES // (8 * head.weight.shape[0]))
        nll, right = Nats.apply(states, targets, head.weight, head.bias, rows, torch.is_grad_enabled())  # type: ignore[no-untyped-call]
        return Scored(nll, right, batch.documents[row, column])

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        ends, longest = document_ends(torch.from_numpy(batch.documents[0]))
        return {
            "input_ids": torch.from_numpy(batch.input_ids).to(self._device),
            "position_ids": torch.from_numpy(batch.position_ids).to(self._device),
            **arguments(ends.to(self._device), longest),
            "use_cache": False,
        }

    def one_document(self, length: int) -> dict[str, Any]:
        return arguments(torch.tensor([0, length], dtype=torch.int32, device=self._device), length)
