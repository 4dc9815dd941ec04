"""From a packed batch to the loss of each supervised token, with logits only where there is a label."""

from __future__ import annotations

import inspect
import logging
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fedlora.core.errors import ModelError
from fedlora.data import IGNORE, Batch, one_a_row
from fedlora.learn.bases._internals import attention_of
from fedlora.learn.bases.failures import MODEL_ERRORS, check_memory
from fedlora.learn.packing import PACKED, Apart, Way, block_mask, looks_ahead, try_way, window_of

log = logging.getLogger(__name__)
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
        way: how the model is told where documents end.
        tried: what was found for each way that was tried, in order; None for one that the model cannot be given.

    Raises:
        ModelError: the model computes nothing here, or looks at later tokens.
    """

    padded = True

    def __init__(self, model: Any, device: torch.device) -> None:
        self._model = model
        self._device = device
        self._additive = attention_of(model) == "eager"
        self.split = self._split_is_exact()
        self._keeps = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.tried: dict[Way, Apart | None] = {}
        self.way: Way = self._find_way()

    @property
    def packs(self) -> bool:
        """Whether a row may hold several documents: none sees another."""
        return self.way != "alone"

    def why_alone(self) -> str:
        """Why a row holds a single document, in words."""
        tried = [t for t in self.tried.values() if t is not None]
        if not tried:
            return "this base takes neither masks nor positions that would keep the examples of a row apart"
        best = min(tried, key=lambda t: max(t.before, t.alone))
        off = f"a token's loss is off by up to {max(best.before, best.alone):.2g} nats"
        if self.tried.get("blocks") is None:
            return f"this base takes no mask that would keep the examples of a row apart, and positions alone do not ({off})"
        if best.before > best.behind:
            return f"this base carries a state from one example of a row into the next ({off})"
        return f"this base computes something else for several examples in a row than for each alone ({off})"

    def _find_way(self) -> Way:
        was_training = self._model.training
        self._model.eval()
        try:
            with torch.no_grad():
                if looks_ahead(self._losses, self._model):
                    raise _looks_ahead(self._model)
                return next((way for way in PACKED if self._keeps_apart(way)), "alone")
        except MODEL_ERRORS as e:
            check_memory(e, self._model)
            raise ModelError(
                f"{type(self._model).__name__} cannot compute here: {type(e).__name__}: {str(e).strip()[:200]}",
                hint="try it without load_in_4bit and load_in_8bit, in another dtype, or choose another base",
            ) from e
        finally:
            self._model.train(was_training)

    def _keeps_apart(self, way: Way) -> bool:
        try:
            self.tried[way] = found = try_way(way, self._losses, self._model)
        except Exception as e:  # whatever a model that cannot take a mask like this makes of it
            check_memory(e, self._model)  # else less memory would mean other rows, and other bits
            log.info("%s takes no %s: %s", type(self._model).__name__, way, str(e).splitlines()[:1])
            self.tried[way] = None
            return False
        return found.right(self._model.get_input_embeddings().weight.dtype)

    def _losses(self, batch: Batch, way: Way) -> torch.Tensor:
        self.way = way
        return self(batch).nll

    def __call__(self, batch: Batch) -> Scored:
        """Losses at the batch's supervised tokens. Where a row may hold one document only, a packed batch is unpacked first.

        Raises:
            ValueError: a label has no token of its own document before it.
        """
        if self.way == "alone" and batch.packed:
            batch = one_a_row(batch, pad_token_id=0)
        row, column = supervised(batch)
        targets = torch.from_numpy(batch.labels[row, column]).to(self._device)
        where = (torch.from_numpy(row).to(self._device), torch.from_numpy(column - 1).to(self._device))
        recording = torch.is_grad_enabled()
        if self.split:
            hidden = self._model.base_model(**self._inputs(batch)).last_hidden_state[where]
            parts = [self._head(hidden[i : i + HEAD_ROWS], targets[i : i + HEAD_ROWS], recording, many=len(targets) > HEAD_ROWS)
                     for i in range(0, len(targets), HEAD_ROWS)]  # fmt: skip
        else:
            parts = [_score(self._own_logits(batch, *where), targets, recording)]
        nll = torch.cat([p[0] for p in parts]) if parts else torch.zeros(0, device=self._device)
        right = torch.cat([p[1] for p in parts]) if parts else torch.zeros(0, dtype=torch.bool, device=self._device)
        return Scored(nll, right, batch.documents[row, column])

    def _own_logits(self, batch: Batch, row: torch.Tensor, column: torch.Tensor) -> torch.Tensor:
        """The model's own logits (n, vocabulary) at chosen positions: all are computed where it cannot leave any out."""
        if not self._keeps:
            all_of_them: torch.Tensor = self._model(**self._inputs(batch)).logits
            return all_of_them[row, column]
        kept, index = torch.unique(column, return_inverse=True)
        logits: torch.Tensor = self._model(**self._inputs(batch), logits_to_keep=kept).logits
        return logits[row, index]

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """The model's arguments."""
        documents = torch.from_numpy(batch.documents).to(self._device)
        given = {"input_ids": torch.from_numpy(batch.input_ids).to(self._device), "use_cache": False}
        if self.way == "alone":
            return given | {"attention_mask": (documents >= 0).long()}
        given["position_ids"] = torch.from_numpy(batch.position_ids).to(self._device)
        return given if self.way == "positions" else given | {"attention_mask": self._masks(documents)}

    def _masks(self, documents: torch.Tensor) -> Any:
        """The mask, or one for each kind of layer where some look back over a window only."""
        kinds = set(getattr(self._model.config.get_text_config(), "layer_types", None) or ())
        window = window_of(self._model)
        if not window or not kinds <= {"full_attention", "sliding_attention"}:
            return self._mask(documents, 0)
        return {"full_attention": self._mask(documents, 0), "sliding_attention": self._mask(documents, window)}

    def _mask(self, documents: torch.Tensor, window: int) -> torch.Tensor:
        mask = block_mask(documents, window=window)
        if not self._additive:
            return mask
        # The eager kernel adds its mask to the scores. No finite number hides a token whatever they are: the others may overflow.
        dtype = self._model.get_input_embeddings().weight.dtype
        return torch.zeros(mask.shape, dtype=dtype, device=self._device).masked_fill(~mask, -torch.inf)

    def one_document(self, length: int) -> dict[str, Any]:
        """What the model's attention wants besides the tokens of one document."""
        return {}

    @torch.no_grad()
    def _split_is_exact(self) -> bool:
        model = self._model
        ids = torch.arange(1, 9, device=self._device)[None] % model.config.get_text_config().vocab_size
        given: dict[str, Any] = {"input_ids": ids, "use_cache": False, **self.one_document(ids.shape[1])}
        try:
            hidden = model.base_model(**given).last_hidden_state
            ours, its = model.get_output_embeddings()(hidden), model(**given).logits
        except MODEL_ERRORS as e:
            check_memory(e, model)
            return False  # a decoder that is called in another way; whether the model computes at all is tried next
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


def _looks_ahead(model: Any) -> ModelError:
    name = type(model).__name__
    if getattr(model, "is_loaded_in_8bit", False):
        return ModelError(
            f"{name} in 8 bits: what it computes for a token changes with later ones",
            hint="8-bit products on a GPU depend on the whole batch, which a state carries on: load it in 4 bits, or in none",
        )
    return ModelError(
        f"{name} is no causal language model: it looks at later tokens",
        hint="choose a base that predicts each token from those before it",
    )


def _score(logits: torch.Tensor, targets: torch.Tensor, recording: bool) -> tuple[torch.Tensor, torch.Tensor]:
    logits = logits.float()
    nll = functional.cross_entropy(logits, targets, reduction="none")
    return nll, torch.zeros(0, dtype=torch.bool, device=nll.device) if recording else logits.argmax(-1) == targets
