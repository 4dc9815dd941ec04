from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.errors import NonFiniteUpdate
from fedlora.data import IGNORE, Tokens, in_order
from fedlora.learn.evaluate import evaluate
from fedlora.learn.loop import train_steps

pytestmark = pytest.mark.torch


def greedy(model: Any, prompt: list[int], count: int) -> list[int]:
    """What transformers' own greedy decoding gives after a prompt: at most ``count`` tokens, ended by 257."""
    with torch.no_grad():
        out = model.peft_model.generate(
            input_ids=torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=count,
            do_sample=False, eos_token_id=257, pad_token_id=256,
        )  # fmt: skip
    return out[0, len(prompt) :].tolist()


def example(prompt: list[int], completion: list[int]) -> Tokens:
    return Tokens(np.array(prompt + completion, np.int32), np.array([IGNORE] * len(prompt) + completion, np.int32), 1)


@pytest.fixture
def model(lora: Callable[..., Any], moved: Callable[..., Any]) -> Any:
    found = lora({"dtype": "float32"})
    found.set(moved(found.get(), seed=11))
    return found


def test_exact_match_is_what_greedy_decoding_gives(model: Any):
    rng = np.random.default_rng(0)
    found, expected = [], []
    for i in range(10):
        prompt = rng.integers(1, 256, 6).tolist()
        completion = greedy(model, prompt, 4)
        if i % 2:  # one token wrong: first, second, third or fourth
            completion[i // 2 % len(completion)] = (completion[i // 2 % len(completion)] + 1) % 256
        found.append(evaluate(model, [example(prompt, completion)], max_length=32).exact_match)
        expected.append(float(greedy(model, prompt, len(completion)) == completion))
    assert found == expected
    assert 0 < sum(found) < 10


def test_the_end_token_must_be_right_too(model: Any):
    prompt = [65, 66, 67]
    completion = greedy(model, prompt, 3)
    assert 257 not in completion
    assert evaluate(model, [example(prompt, completion)], max_length=32).exact_match == 1.0
    assert evaluate(model, [example(prompt, [*completion, 257])], max_length=32).exact_match == 0.0


def test_scores_are_means_over_examples_and_tokens(model: Any):
    right = greedy(model, [65, 66], 2)
    rows = [example([65, 66], right), example([65, 66], [(right[0] + 1) % 256] * 5), example([70], [3])]
    one = [evaluate(model, [r], max_length=32) for r in rows]
    together = evaluate(model, rows, max_length=32, rows=2)
    assert together.tokens == 8
    assert together.examples == 3
    assert together.nll == pytest.approx((2 * one[0].nll + 5 * one[1].nll + one[2].nll) / 8, rel=1e-5)
    assert together.exact_match == pytest.approx(sum(s.exact_match for s in one) / 3)


@pytest.mark.parametrize("at", [1, 3])
def test_the_scores_of_two_sets_of_examples_add_up_to_those_of_all(model: Any, rows: Sequence[Tokens], at: int):
    """Bit for bit where the batches are the same, as rows of one example each are."""
    one, two, whole = (
        evaluate(model, part, max_length=96, rows=1, packing=False, coarse_chars=1) for part in (rows[:at], rows[at:], rows)
    )
    assert one + two == whole
    assert whole.nats > 2**16
    assert (one + evaluate(model, rows[at:], max_length=96)).coarse is None


def test_an_example_whose_loss_is_no_number_ends_an_evaluation(model: Any, rows: Sequence[Tokens]):
    with torch.no_grad():
        model.trainable()[0].fill_(float("nan"))
    with pytest.raises(NonFiniteUpdate):
        evaluate(model, rows[:1], max_length=96)


@pytest.mark.parametrize("packing", [True, False])
def test_packing_changes_no_score(model: Any, rows: Sequence[Tokens], packing: bool):
    expected = evaluate(model, rows, max_length=96, rows=1, packing=False, coarse_chars=1)
    found = evaluate(model, rows, max_length=96, rows=3, packing=packing, coarse_chars=1)
    assert (found.exact_match, found.coarse_match, found.tokens, found.examples) == (
        expected.exact_match, expected.coarse_match, expected.tokens, expected.examples,
    )  # fmt: skip
    assert found.nll == pytest.approx(expected.nll, abs=1e-5)


def test_a_coarse_match_needs_the_first_characters_of_the_stripped_completion(lora: Callable[..., Any]):
    model = lora({"dtype": "float32"})
    text = model.tokenizer.encode
    learned, asked = (example(text("Q fever:"), [*text(f" {code}"), 257]) for code in ("C92", "C95"))
    (batch,) = in_order([learned], rows=1, max_length=32, packing=False, pad_token_id=256)
    adam = torch.optim.Adam(model.trainable())
    train_steps(model, repeat([batch]), steps=200, optimizer=adam, rate=lambda s: 1e-2, seed=lambda s: 0, max_grad_norm=1.0)
    assert evaluate(model, [learned], max_length=32).exact_match == 1.0
    scores = [evaluate(model, [asked], max_length=32, coarse_chars=k) for k in (1, 2, 3, 9)]
    assert [s.coarse_match for s in scores] == [1.0, 1.0, 0.0, 0.0]  # C, C9, C95, and more than there is
    assert {s.exact_match for s in scores} == {0.0}
    assert evaluate(model, [learned], max_length=32, coarse_chars=9).coarse_match == 1.0


def test_without_coarse_characters_there_is_no_coarse_score(model: Any, rows: Sequence[Tokens]):
    scores = evaluate(model, rows[:2], max_length=96)
    assert scores.coarse_match is None
    assert set(scores.counters()) == {"eval/nats", "eval/exact", "eval/tokens", "eval/examples"}
    assert "eval/coarse" in evaluate(model, rows[:2], max_length=96, coarse_chars=1).counters()


def test_evaluation_is_without_dropout_and_training_goes_on_with_it(
    lora: Callable[..., Any], moved: Callable[..., Any], rows: Any
):
    model = lora(lora_dropout=0.5)
    model.set(moved(model.get()))
    model.peft_model.train()
    assert evaluate(model, rows, max_length=96) == evaluate(model, rows, max_length=96)
    assert model.peft_model.training
    model.peft_model.eval()
    evaluate(model, rows, max_length=96)
    assert not model.peft_model.training


def test_nothing_to_evaluate_on_is_a_programmers_mistake(model: Any):
    with pytest.raises(ValueError, match="nothing"):
        evaluate(model, [], max_length=32)
