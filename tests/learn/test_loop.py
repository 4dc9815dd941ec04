from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
import pytest
import torch

from fedlora.core.errors import ConfigError, DataError, NonFiniteUpdate, StoreError
from fedlora.core.plan import Training
from fedlora.core.schedule import learning_rate
from fedlora.data import IGNORE, Batch, Tokens, in_order
from fedlora.learn.loop import TrainTotals, derived_seed, train_steps
from fedlora.learn.optimizer import dump_moments, forget_moments, load_moments, make_optimizer

pytestmark = pytest.mark.torch


def batches(rows: Sequence[Tokens], *, size: int, length: int = 96, packing: bool = True) -> list[Batch]:
    return list(in_order(rows, rows=size, max_length=length, packing=packing, pad_token_id=256))


def run(model: Any, group: Sequence[Batch], *, steps: int = 1, seed: int = 0, rate: float = 1e-2, **options: Any) -> TrainTotals:
    optimizer = make_optimizer(model, Training(**options))
    return train_steps(
        model, repeat(group), steps=steps, optimizer=optimizer, rate=lambda s: rate, seed=lambda s: seed + s, max_grad_norm=1.0
    )


def gradient(model: Any, group: Sequence[Batch]) -> list[np.ndarray]:
    """The gradient of a step, seen by an optimizer that only looks."""
    seen: list[np.ndarray] = []

    class Look(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:
            seen.extend(p.grad.numpy().copy() for p in self.param_groups[0]["params"])

    look = Look(model.trainable(), lr=0.0)
    train_steps(model, repeat(group), steps=1, optimizer=look, rate=lambda s: 0.0, seed=lambda s: 0, max_grad_norm=1e9)
    return seen


def test_pitfall_17_splitting_a_batch_leaves_the_gradient(
    lora: Callable[..., Any], moved: Callable[..., Any], row: Callable[..., Tokens]
):
    # completions of very different length: a mean of means would weigh the short ones too much
    rows = [row("a:", "x" * n) for n in (1, 40, 2, 1)]
    model = lora({"dtype": "float32"})
    model.set(moved(model.get()))
    (whole,) = batches(rows, size=4, packing=False)
    split = batches(rows, size=1, packing=False)
    assert len(split) == 4
    for one, four in zip(gradient(model, [whole]), gradient(model, split), strict=True):
        np.testing.assert_allclose(one, four, rtol=1e-4, atol=1e-6)
    means = [gradient(model, [b]) for b in split]
    assert max(np.abs(sum(m[i] for m in means) / 4 - g).max() for i, g in enumerate(gradient(model, [whole]))) > 1e-3


def test_the_reported_loss_is_the_mean_over_tokens(lora: Callable[..., Any], row: Callable[..., Tokens]):
    model = lora({"dtype": "float32"})
    group = batches([row("a:", "x" * n) for n in (1, 30, 4)], size=1, packing=False)
    with torch.no_grad():
        nll = torch.cat([model.forward(b).nll for b in group])
    spent = run(model, group)
    assert spent.loss == pytest.approx(float(nll.mean()), rel=1e-6)
    assert (spent.tokens, spent.examples) == (2 + 31 + 5, 3)


def test_training_lowers_the_loss_and_pitfall_7_moves_every_tensor(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora({"load_in_4bit": True})
    before, group = model.get().tensors(), batches(rows, size=8)
    first = run(model, group, steps=1).loss
    run(model, group, steps=8)
    assert run(model, group, steps=1).loss < first - 0.5
    for name, values in model.get().tensors().items():
        assert not np.array_equal(values, before[name]), name


def test_pitfall_5_training_moves_the_factors_and_nothing_else(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora({"load_in_4bit": True})
    factors = {id(p) for p in model.trainable()}
    frozen = {n: p.detach().clone() for n, p in model.peft_model.named_parameters() if id(p) not in factors}
    run(model, batches(rows, size=4), steps=2, weight_decay=0.5)
    now = dict(model.peft_model.named_parameters())
    assert len(frozen) > 10
    assert all(torch.equal(now[n], p) for n, p in frozen.items())


def test_weight_decay_shrinks_the_factors(lora: Callable[..., Any], rows: Sequence[Tokens]):
    norms = []
    for decay in (0.0, 0.9):
        model = lora()
        run(model, batches(rows, size=4), steps=3, rate=0.1, weight_decay=decay)
        norms.append(float(np.linalg.norm(model.get().vector)))
    assert norms[1] < norms[0] * 0.95


@pytest.mark.parametrize(
    "base", [{}, {"load_in_4bit": True}, {"load_in_4bit": True, "keep_dequantized": True}, {"load_in_8bit": True}]
)
def test_pitfall_27_recomputing_activations_keeps_the_gradient(
    lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens], base: dict[str, Any]
):
    found = []
    for on in (False, True):
        model = lora(base)
        model.set(moved(model.get(), size=0.1))
        model.set_checkpointing("full" if on else "none")
        assert model.base.model.is_gradient_checkpointing is on
        found.append(gradient(model, batches(rows, size=4)))
    for plain, recomputed in zip(*found, strict=True):
        assert np.abs(plain).max() > 0
        np.testing.assert_array_equal(plain, recomputed)


def test_checkpointing_can_be_switched_off_again(lora: Callable[..., Any]):
    model = lora()
    for on in (True, True, False, False):
        model.set_checkpointing("full" if on else "none")
        assert model.base.model.is_gradient_checkpointing is on


def test_pitfall_24_dropout_depends_on_the_given_seeds_only(lora: Callable[..., Any], rows: Sequence[Tokens]):
    def trained(seed: int, state: int) -> str:
        model = lora(lora_dropout=0.3)
        torch.manual_seed(state)
        run(model, batches(rows, size=4), steps=2, seed=seed)
        return str(model.get().digest())

    assert trained(1, 10) == trained(1, 11) != trained(2, 10)


def test_training_leaves_the_callers_random_state(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora(lora_dropout=0.3)
    torch.manual_seed(4)
    expected = torch.rand(3)
    torch.manual_seed(4)
    run(model, batches(rows, size=4), steps=2)
    assert torch.equal(torch.rand(3), expected)


def test_gradients_are_clipped_to_the_norm(lora: Callable[..., Any], moved: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora({"dtype": "float32"})
    model.set(moved(model.get()))
    before = model.get().vector.astype(np.float64)
    sgd = torch.optim.SGD(model.trainable(), lr=1.0)
    train_steps(
        model, repeat(batches(rows, size=4)), steps=1, optimizer=sgd, rate=lambda s: 1.0, seed=lambda s: 0, max_grad_norm=0.01
    )
    assert np.linalg.norm(model.get().vector - before) == pytest.approx(0.01, rel=1e-3)


def test_a_loss_that_is_not_finite_stops_before_the_step(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora()
    with torch.no_grad():
        model.trainable()[1].fill_(float("nan"))
    others = model.trainable()[2].detach().clone()
    with pytest.raises(NonFiniteUpdate, match="step 1"):
        run(model, batches(rows, size=4))
    assert torch.equal(model.trainable()[2], others)
    assert all(p.grad is None for p in model.trainable())


def test_a_step_without_a_supervised_token_is_a_data_error(lora: Callable[..., Any]):
    ids = np.array([1, 2, 3], np.int32)
    with pytest.raises(DataError, match="no token of a whole step has a loss"):
        run(lora(), batches([Tokens(ids, np.full(3, IGNORE, np.int32), 1)], size=1))


# --- schedule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cosine", "linear", "constant"])
def test_pitfall_22_the_rate_rises_once_and_then_never_again(name: str):
    rates = [learning_rate(name, (k + 0.5) / 400, peak=1.0, warmup_ratio=0.1) for k in range(400)]
    top = rates.index(max(rates))
    assert 38 <= top <= 41
    assert rates[: top + 1] == sorted(rates[: top + 1])
    assert rates[top:] == sorted(rates[top:], reverse=True)
    assert 0 < rates[0] < 0.02
    assert rates[-1] == (1.0 if name == "constant" else pytest.approx(0, abs=2e-3))
    assert rates[-1] > 0


def test_the_rate_at_points_one_can_check_by_hand():
    at = lambda name, p, w=0.0: learning_rate(name, p, peak=2.0, warmup_ratio=w)  # noqa: E731
    assert at("linear", 0.25) == pytest.approx(1.5)
    assert at("cosine", 0.5) == pytest.approx(1.0)
    assert at("cosine", 1 / 3) == pytest.approx(2 * 0.5 * (1 + math.cos(math.pi / 3)))
    assert at("constant", 0.9) == 2.0
    assert at("cosine", 0.05, 0.1) == pytest.approx(1.0)
    assert at("linear", 0.55, 0.1) == pytest.approx(1.0)
    assert at("linear", 0.5, 1.0) == pytest.approx(1.0)


def test_derived_seeds_differ_and_fit():
    seeds = {derived_seed("dropout", 0, s, r, k) for s in ("a", "b") for r in range(10) for k in range(10)}
    assert len(seeds) == 200
    assert all(0 <= s < 2**63 for s in seeds)


# --- optimizers ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optim", ["paged_adamw_8bit", "paged_adamw_32bit"])
def test_a_paged_optimizer_on_a_cpu_is_a_config_error_that_says_why(lora: Callable[..., Any], optim: str):
    with pytest.raises(ConfigError, match=f"{optim}.*needs CUDA") as err:
        make_optimizer(lora(), Training(optim=optim))
    assert "adamw_torch" in err.value.hint


def test_moments_survive_as_bytes_bit_for_bit(lora: Callable[..., Any], rows: Sequence[Tokens]):
    def go_on(model: Any, optimizer: torch.optim.Optimizer) -> Any:
        train_steps(
            model,
            repeat(batches(rows, size=4)),
            steps=2,
            optimizer=optimizer,
            rate=lambda s: 1e-2,
            seed=lambda s: 0,
            max_grad_norm=1,
        )
        return model.get()

    model = lora()
    optimizer = make_optimizer(model, Training())
    half = go_on(model, optimizer)
    blob = dump_moments(optimizer)
    uninterrupted = go_on(model, optimizer)
    other = lora()
    other.set(half)
    load_moments(restored := make_optimizer(other, Training()), blob)
    assert go_on(other, restored).digest() == uninterrupted.digest()
    other.set(half)
    fresh = go_on(other, make_optimizer(other, Training()))
    assert fresh.digest() != uninterrupted.digest()
    other.set(half)
    forget_moments(restored)
    assert go_on(other, restored).digest() == fresh.digest()


def test_damaged_or_foreign_moments_are_a_store_error(lora: Callable[..., Any], rows: Sequence[Tokens]):
    model = lora()
    optimizer = make_optimizer(model, Training())
    train_steps(
        model, repeat(batches(rows, size=4)), steps=1, optimizer=optimizer, rate=lambda s: 1e-2, seed=lambda s: 0, max_grad_norm=1
    )
    blob = dump_moments(optimizer)
    with pytest.raises(StoreError, match="damaged"):
        load_moments(make_optimizer(model, Training()), blob[:-8])
    with pytest.raises(StoreError, match="another adapter"):
        load_moments(make_optimizer(lora(target_modules=("q_proj",)), Training()), blob)
