"""A tiny random Llama (width 64, 2 layers, one token a byte) and rows for it, shared by the tests of ``learn``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fedlora.core.plan import Lora, Model
from fedlora.data import IGNORE, Tokens


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the tiny base: bfloat16, untied head."""
    from fedlora.learn.toy import toy_base

    return toy_base(tmp_path_factory.mktemp("base") / "toy")


@pytest.fixture
def load(toy: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads the tiny base; keyword arguments are those of a plan's [model] and of Machine. Not quantized unless asked for.

    It computes in the type that it is asked for on every machine, also where that is slow: see test_arithmetic.py.
    """
    from fedlora.learn import base
    from fedlora.learn.base import load_base
    from fedlora.learn.hooks import fast
    from fedlora.learn.options import Machine

    monkeypatch.setattr(base, "has_products", lambda device, dtype: True)

    def make(path: Path = toy, **options: Any) -> Any:
        if options.get("fused") and fast() is None:
            pytest.skip("needs fedlora/learn/fast")  # see test_plain.py, which takes it away
        model = {k: options.pop(k) for k in list(options) if k in Model.model_fields}
        return load_base(Model(**{"load_in_4bit": False, **model}), path, Machine(**{"device": "cpu", "threads": 1, **options}))

    return make


@pytest.fixture
def lora(load: Callable[..., Any]) -> Callable[..., Any]:
    """A LoraModel of rank 4 on the tiny base; ``base`` holds the arguments of ``load``, the rest are [lora]'s."""
    from fedlora.learn.lora import attach

    def make(base: dict[str, Any] | None = None, *, seed: int = 0, **options: Any) -> Any:
        return attach(load(**(base or {})), Lora(**{"r": 4, "lora_alpha": 6, **options}), seed=seed)

    return make


@pytest.fixture
def row() -> Callable[..., Tokens]:
    """An example from a prompt and a completion, one token a byte (any byte is a token of the tiny base), ended by 257."""

    def make(prompt: str, completion: str) -> Tokens:
        head, tail = list(prompt.encode()), [*completion.encode(), 257]
        return Tokens(np.array(head + tail, np.int32), np.array([IGNORE] * len(head) + tail, np.int32), 1)

    return make


@pytest.fixture
def rows(row: Callable[..., Tokens]) -> Sequence[Tokens]:
    """Twelve examples of different lengths."""
    words = ("red", "green", "blue")
    return [row(f"{'apple' * (1 + i % 3)} {i}:", f" {words[i % 3]}") for i in range(12)]


def moved(adapter: Any, *, seed: int = 5, size: float = 0.3) -> Any:
    """An adapter of the same layout with every value random: B is not zero."""
    from fedlora.core.adapter import Adapter

    values = np.random.default_rng(seed).normal(0, size, adapter.layout.size).astype(np.float32)
    return Adapter(values, adapter.layout)


@pytest.fixture(name="moved")
def _moved() -> Callable[..., Any]:
    return moved
