"""A CPU that has no products of a base's type computes in float32, on the same values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of

from fedlora.core.metrics import LISTED, finish
from fedlora.data import Tokens, in_order
from fedlora.learn import base as module
from fedlora.learn.base import has_products
from fedlora.learn.learner import HFLearner

pytestmark = pytest.mark.torch
HELD: list[dict[str, Any]] = [
    {},
    {"dtype": "float16"},
    {"load_in_4bit": True},
    {"load_in_4bit": True, "keep_dequantized": True},
    {"load_in_4bit": True, "dtype": "float32"},
    {"load_in_8bit": True},
]
FUSED = {"load_in_4bit": True, "fused": True, "attn_implementation": "varlen"}


@pytest.fixture
def without(load: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """From its call on, this CPU has float32's products only; ``load`` before it says that it has all."""
    return lambda: monkeypatch.setattr(module, "has_products", lambda device, dtype: dtype == "float32")


def gradient(model: Any, rows: Sequence[Tokens]) -> np.ndarray:
    model.peft_model.train()
    for batch in in_order(rows, rows=4, max_length=96, packing=True, pad_token_id=256):
        model.forward(batch).nll.sum().backward()
    return np.concatenate([p.grad.reshape(-1).double().numpy() for p in model.trainable()])


def distance(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.linalg.norm(a - b) / np.linalg.norm(b))


@pytest.mark.parametrize("held", HELD)
def test_values_stay_and_everything_is_float32(load: Callable[..., Any], without: Callable[[], None], held: dict[str, Any]):
    asked = load(**held)
    without()
    computed = load(**held)
    assert computed.digest == asked.digest
    theirs = dict(asked.model.named_parameters())
    for name, ours in computed.model.named_parameters():
        assert torch.equal(ours.to(theirs[name].dtype), theirs[name])
        assert ours.dtype in (torch.float32, torch.uint8, torch.int8)
    ids = torch.tensor([[1, 70, 33, 250]])
    assert computed.model(input_ids=ids).logits.dtype == torch.float32


@pytest.mark.parametrize("held", [*HELD[:5], FUSED])
def test_its_gradient_is_float32s_and_that_of_the_asked_type_is_further_away(
    lora: Callable[..., Any], rows: Sequence[Tokens], moved: Callable[..., Any], without: Callable[[], None], held: dict[str, Any]
):
    exact = lora({**held, "dtype": "float32", "bnb_4bit_compute_dtype": "float32"})
    rough = lora(held)
    without()
    computed = lora(held)
    for model in (exact, rough, computed):
        model.set(moved(model.get(), size=0.1))
    right = gradient(exact, rows)
    near, far = distance(gradient(computed, rows), right), distance(gradient(rough, rows), right)
    # Not the same: the values that the code stands for were rounded to 16 bits when they were quantized or written out.
    assert near < 0.5 * far


def test_written_out_weights_give_the_same_bits(
    lora: Callable[..., Any], rows: Sequence[Tokens], moved: Callable[..., Any], without: Callable[[], None]
):
    without()
    found = []
    for keep in (False, True):
        model = lora({"load_in_4bit": True, "keep_dequantized": keep})
        model.set(moved(model.get()))
        found.append(gradient(model, rows))
    assert np.array_equal(*found)


def test_training_learns_and_says_what_it_computes_in(
    lora: Callable[..., Any], rows: Sequence[Tokens], without: Callable[[], None]
):
    without()
    options = plan_of(local_steps=6, num_rounds=1, per_device_train_batch_size=4, max_length=96, learning_rate=1e-2)
    model = lora({"load_in_4bit": True})
    learner = HFLearner(model, rows, rows[:4], options, site="a")
    first = model.get()
    assert "float32" in learner.forecast().device
    before = finish(LISTED, learner.evaluate(first))["eval/nll"]
    assert finish(LISTED, learner.evaluate(learner.train(first, round=1, state=b"").adapter))["eval/nll"] < before - 0.1


def test_the_processor_is_asked_and_no_clock() -> None:
    """The same answer every time, on every machine, for what it knows; float32 and GPUs are never in question."""
    cpu = torch.device("cpu")
    assert has_products(cpu, "float32")
    assert has_products(torch.device("cuda"), "bfloat16")
    assert {has_products(cpu, "bfloat16") for _ in range(5)} in ({True}, {False})


def test_a_torch_without_the_question_computes_in_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    class Nothing:
        pass

    monkeypatch.setattr(torch.ops, "mkldnn", Nothing(), raising=False)
    assert not has_products(torch.device("cpu"), "bfloat16")
