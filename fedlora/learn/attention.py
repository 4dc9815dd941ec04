"""Attention within documents that lie one behind another, without padding and without a mask: torch's variable-length kernel."""

from __future__ import annotations

import inspect
from itertools import pairwise
from typing import Any, TypeAlias

import torch
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface

__all__ = ["VARLEN", "can_vary", "document_ends"]

Tensor: TypeAlias = torch.Tensor
VARLEN = "fedlora_varlen"
"""Under this name transformers' models find :func:`_attend`."""
_FOREIGN = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models ask of their attention beyond its scale, and this kernel does not compute."""


def can_vary(config: Any) -> bool:
    """Whether a model of this configuration computes attention that the kernel knows."""
    text = config.get_text_config()
    asks = ("attn_logit_softcapping", "attn_logit_softcap", "alibi", "attn_config", "attention_chunk_size")
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return not any(getattr(text, name, None) for name in asks) and width <= 256


def document_ends(documents: Tensor) -> tuple[Tensor, int]:
    """Where documents begin and end in a row of them.

    Args:
        documents: (tokens,) int64 on the CPU, each document's tokens side by side; any number that its neighbours do not have.

    Returns:
        (documents + 1,) int32: 0 and the end of each; and the tokens of the longest.
    """
    counts = torch.unique_consecutive(documents, return_counts=True)[1]
    ends = functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
    return ends, int(counts.max())


_KERNEL: Any = varlen.varlen_attn  # its arguments differ between torch's versions
_PARAMETERS = frozenset(inspect.signature(_KERNEL).parameters)
_CAUSAL: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in _PARAMETERS else {"is_causal": True}
_OPTIONS = _CAUSAL | ({"enable_gqa": True} if "enable_gqa" in _PARAMETERS else {})
"""Causal, and with fewer heads for keys than for queries, by this torch's names of it."""


def _attend(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """For transformers: query (1, heads, tokens, width), key and value (1, fewer heads, tokens, width).

    ``cu_seq_lens_q`` and ``max_length_q`` come with the model's arguments, by the names that transformers has for them.

    Raises:
        ValueError: the model asks for something that would silently be left out.
    """
    foreign = [n for n in _FOREIGN if kwargs.get(n) is not None]
    if attention_mask is not None or dropout or foreign:
        raise ValueError(f"{type(module).__name__} asks its attention for {foreign or 'a mask or dropout'}")
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # t[0] would copy on the way back
    if not q.is_cuda:
        return _one_by_one(q, k, v, ends.tolist(), scaling).unsqueeze(0), None
    if scaling is not None and "scale" not in _PARAMETERS and scaling != q.shape[-1] ** -0.5:
        q = q * (scaling * q.shape[-1] ** 0.5)
    options = _OPTIONS | ({"scale": scaling} if "scale" in _PARAMETERS else {})
    attended: Tensor = _KERNEL(q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, **options)
    return attended.unsqueeze(0), None


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: list[int], scaling: float | None) -> Tensor:
    """The same, (tokens, heads, width), where there is no such kernel: document by document."""
    parts = []
    for at, end in pairwise(ends):
        one, its_keys, its_values = (t[at:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        attended = functional.scaled_dot_product_attention(
            one, its_keys, its_values, is_causal=True, scale=scaling, enable_gqa=True
        )
        parts.append(attended.squeeze(0))
    return torch.cat(parts, dim=1).transpose(0, 1)


AttentionInterface.register(VARLEN, _attend)
