"""One question to a base with an adapter on it, asked as it was trained."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fedlora.formats.published.records import Prompt
from fedlora.learn.published.loaded import Loaded, load


def ask(adapter: Path, base: Path, text: str, *, max_tokens: int) -> tuple[str, str, int]:
    """The most likely answer, token by token.

    Args:
        adapter, base: see :func:`fedlora.learn.published.loaded.load`.
        max_tokens: longest answer.

    Returns:
        What the model was given, its answer, and the answer's tokens.

    Raises:
        StoreError, ModelError: see :func:`fedlora.learn.published.loaded.load`.
    """
    loaded = load(adapter, base)
    given = _given(loaded.tokenizer, loaded.prompt, text)
    ids = loaded.tokenizer(given, return_tensors="pt", add_special_tokens=given == text)["input_ids"]
    answer = go_on(loaded, ids, max_tokens=max_tokens)
    return given, loaded.tokenizer.decode(answer, skip_special_tokens=True), len(answer)


def go_on(loaded: Loaded, ids: torch.Tensor, *, max_tokens: int) -> torch.Tensor:
    """The most likely tokens after a prompt.

    Args:
        ids: (1, n) int64, the prompt.

    Returns:
        (m,) int64, m <= max_tokens, with the token that ends them.
    """
    ids = ids.to(loaded.model.device)
    with torch.inference_mode():
        out: torch.Tensor = loaded.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False,
            eos_token_id=loaded.stops, pad_token_id=loaded.pad,
        )  # fmt: skip
    return out[0, ids.shape[1] :]


def _given(tokenizer: Any, prompt: Prompt, text: str) -> str:
    if prompt.kind == "plain" or not tokenizer.chat_template:
        return text
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
