"""One question to a base with an adapter on it, asked as it was trained."""

from __future__ import annotations

from collections.abc import Collection, Sequence
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
    ids = loaded.tokenizer(given, add_special_tokens=given == text)["input_ids"]
    (answer,) = answers(loaded, [ids], max_tokens=max_tokens)
    return given, loaded.tokenizer.decode(answer, skip_special_tokens=True), len(answer)


def answers(loaded: Loaded, prompts: Sequence[Sequence[int]], *, max_tokens: int) -> list[list[int]]:
    """The most likely tokens after each prompt, all at once.

    Returns:
        For each prompt at most ``max_tokens``, with the token that ends them.
    """
    pad, longest = loaded.pad or 0, max(map(len, prompts))
    ids = torch.tensor([[pad] * (longest - len(p)) + [*p] for p in prompts], device=loaded.model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=loaded.model.device)
    with torch.inference_mode():
        out = loaded.model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=max_tokens, do_sample=False,
            eos_token_id=loaded.stops, pad_token_id=pad,
        )  # fmt: skip
    return [_to_its_end(row, loaded.stops) for row in out[:, longest:].tolist()]


def _to_its_end(row: list[int], stops: Collection[int]) -> list[int]:
    """Without what fills the row up once it has ended."""
    end = next((i + 1 for i, token in enumerate(row) if token in stops), len(row))
    return row[:end]


def _given(tokenizer: Any, prompt: Prompt, text: str) -> str:
    if prompt.kind == "plain" or not tokenizer.chat_template:
        return text
    turns = [{"role": "user", "content": text}]
    return str(tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True))
