"""Attention within documents that lie one behind another, without padding and without a mask: torch's variable-length kernel."""

from __future__ import annotations

import inspect
import logging
from itertools import accumulate, pairwise
from typing import Any, TypeAlias

import torch
from torch.nn import functional
from torch.nn.attention import varlen
from transformers import AttentionInterface

from fedlora.learn.bases._internals import attention_of
from fedlora.learn.packing import short_windows

log = logging.getLogger(__name__)
Tensor: TypeAlias = torch.Tensor
VARLEN = "fedlora_varlen"
"""Under this name transformers' models find :func:`_attend`."""
_FOREIGN = ("softcap", "s_aux", "position_bias", "head_mask")
"""What some models ask of their attention beyond its scale, and this kernel does not compute."""
_FIRST, _SECOND = 7, 9
"""Tokens of the two documents with which it is tried."""
_SAME = 1e-6
"""Relative distance of states that must not depend on what was changed: the same kernels on the same shapes, so the same bits."""
_ROUNDED = 0.05
"""The same of states that another kernel computed, in bfloat16, through all layers."""


def use_varlen(model: Any) -> bool:
    """Switches a model to the kernel if it computes the same with it; otherwise the model stays as it is.

    Names of configurations tell too little: some models never ask for attention by name, some carry a state from token to
    token, and all of those would look into other documents or into the future without a mask. So it is tried: what stands in
    one document must not change anything in another one or before it, and one document must come out as with the model's own
    attention. Whatever goes wrong on the way means no.
    """
    own, was_training = attention_of(model), model.training
    device = model.get_input_embeddings().weight.device
    try:
        forked = torch.random.fork_rng([device] if device.type == "cuda" else [])
        with torch.no_grad(), forked, short_windows(model):
            if _asks_more(model.config.get_text_config()):
                raise ValueError("its configuration asks for more than the kernel computes")
            model.eval()
            alone = model.base_model(input_ids=_ids(model, [_SECOND], skip=_FIRST), use_cache=False).last_hidden_state
            model.set_attn_implementation(VARLEN)
            right = _is_right(model, alone[0])
            model.train()
            _states(model, [_FIRST, _SECOND])  # a model with dropout in its attention says so now
    except Exception as e:
        log.info("no variable-length attention for %s: %s", type(model).__name__, str(e).splitlines()[:1])
        right = False
    finally:
        model.train(was_training)
    if not right:
        log.warning("%s keeps its own attention, with masks: slower than documents one behind another", type(model).__name__)
        model.set_attn_implementation(own)
    return right


def _asks_more(config: Any) -> bool:
    """What the trial's small numbers would not show."""
    asks = ("attn_logit_softcapping", "attn_logit_softcap", "alibi", "attention_chunk_size", "attention_dropout", "attn_pdrop")
    scaling = getattr(config, "rope_scaling", None) or getattr(config, "rope_parameters", None) or {}
    by_length = "longrope" in str(scaling) or "dynamic" in str(scaling)  # the angles follow from the longest row
    return by_length or any(getattr(config, name, None) for name in asks)


def _is_right(model: Any, alone: Tensor) -> bool:
    both = [_FIRST, _SECOND]
    states = _states(model, both)
    other_first = _states(model, both, change=range(_FIRST))
    other_last = _states(model, both, change=range(sum(both) - 1, sum(both)))
    apart = _far(other_first[_FIRST:], states[_FIRST:]) < _SAME and _far(other_last[:-1], states[:-1]) < _SAME
    same = max(_far(_states(model, [_SECOND], skip=_FIRST), alone), _far(states[_FIRST:], alone)) < _ROUNDED
    return apart and same and attention_of(model) == VARLEN


def _ids(model: Any, lengths: list[int], *, skip: int = 0, change: range = range(0)) -> Tensor:
    known = model.config.get_text_config().vocab_size
    ids = [(3 + 7 * (n + skip) + (11 if n in change else 0)) % known for n in range(sum(lengths))]
    return torch.tensor([ids], device=model.get_input_embeddings().weight.device)


def _states(model: Any, lengths: list[int], *, skip: int = 0, change: range = range(0)) -> Tensor:
    """Last hidden states (tokens, width) of documents of these lengths one behind another."""
    ids = _ids(model, lengths, skip=skip, change=change)
    ends = torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=ids.device)
    positions = torch.cat([torch.arange(n, device=ids.device) for n in lengths])[None]
    given = arguments(ends, max(lengths))
    states: Tensor = model.base_model(input_ids=ids, position_ids=positions, use_cache=False, **given).last_hidden_state[0]
    return states


def _far(a: Tensor, b: Tensor) -> float:
    """Relative distance; NaN is far."""
    found = float((a.float() - b.float()).norm() / b.float().norm().clamp(min=1e-30))
    return found if found == found else float("inf")


def arguments(ends: Tensor, longest: int) -> dict[str, Any]:
    """What a model hands on to its attention, by transformers' names."""
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}


def document_ends(documents: Tensor) -> tuple[Tensor, int]:
    """Where documents begin and end in a row of them.

    Args:
        documents: (tokens,) int64 on the CPU, each document's tokens side by side; any number that its neighbors do not have.

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
    window = int(kwargs.get("sliding_window") or 0)
    if attention_mask is not None or dropout or foreign:
        raise ValueError(f"{type(module).__name__} asks its attention for {foreign or 'a mask or dropout'}")
    ends, longest = kwargs["cu_seq_lens_q"], kwargs["max_length_q"]
    q, k, v = (t.squeeze(0).transpose(0, 1) for t in (query, key, value))  # t[0] would copy in the backward pass
    if not q.is_cuda:
        return _one_by_one(q, k, v, ends.tolist(), scaling, window).unsqueeze(0), None
    if scaling is not None and "scale" not in _PARAMETERS and scaling != q.shape[-1] ** -0.5:
        q = q * (scaling * q.shape[-1] ** 0.5)
    options = _OPTIONS | ({"scale": scaling} if "scale" in _PARAMETERS else {})
    if window:
        if "window_size" not in _PARAMETERS:
            raise ValueError(f"{type(module).__name__} asks for a window, which this torch's kernel does not have")
        options |= {"window_size": (window - 1, 0)}
    attended: Tensor = _KERNEL(q.contiguous(), k.contiguous(), v.contiguous(), ends, ends, longest, longest, **options)
    return attended.unsqueeze(0), None


def _one_by_one(q: Tensor, k: Tensor, v: Tensor, ends: list[int], scaling: float | None, window: int) -> Tensor:
    """The same, (tokens, heads, width), where there is no such kernel: document by document.

    Args:
        window: tokens that each sees, itself included; 0: all.
    """
    parts = []
    for at, end in pairwise(ends):
        one, its_keys, its_values = (t[at:end].transpose(0, 1).unsqueeze(0) for t in (q, k, v))
        beyond = 0 < window < end - at
        seen = torch.ones(end - at, end - at, dtype=torch.bool, device=q.device).tril().triu(1 - window) if beyond else None
        attended = functional.scaled_dot_product_attention(
            one, its_keys, its_values, attn_mask=seen, is_causal=seen is None, scale=scaling, enable_gqa=True
        )
        parts.append(attended.squeeze(0))
    return torch.cat(parts, dim=1).transpose(0, 1)


AttentionInterface.register(VARLEN, _attend)
