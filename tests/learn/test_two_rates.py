"""LoRA+: B learns at a multiple of A's rate, as PEFT's own optimizer for it does."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of
from peft.optimizers import create_loraplus_optimizer
from privacy.test_distributed import shared

from fedlora.core.plan import Plan
from fedlora.learn.learner import HFLearner
from fedlora.learn.optimizer import dump_moments, load_moments, make_optimizer, set_rate

pytestmark = pytest.mark.torch
OPTIONS: dict[str, Any] = {"local_steps": 3, "num_rounds": 2, "per_device_train_batch_size": 2, "max_length": 48,
                           "learning_rate": 1e-2, "warmup_ratio": 0.0, "lr_scheduler_type": "constant"}  # fmt: skip


@pytest.mark.parametrize("ratio", [1.0, 4.0, 16.0])
def test_each_step_is_that_of_peft_s_optimizer(lora: Any, moved: Any, ratio: float):
    """Given the same gradients: PEFT makes groups by the names of its own parameters."""
    models = [lora(), lora()]
    for model in models:
        model.set(moved(model.get(), size=0.1))
    training = plan_of(loraplus_lr_ratio=ratio, learning_rate=1e-2, weight_decay=0.1).training
    ours = make_optimizer(models[0], training)
    theirs = create_loraplus_optimizer(
        models[1].peft_model, torch.optim.AdamW, lr=1e-2, loraplus_lr_ratio=ratio, loraplus_weight_decay=0.1
    )
    for step in range(3):
        for model in models:
            generator = torch.Generator().manual_seed(step)
            for parameter in model.trainable():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
        set_rate(ours, 1e-2)
        ours.step()
        theirs.step()
    a, b = (model.get().vector for model in models)
    np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7)
    if ratio > 1:
        plain = lora()
        assert not np.allclose(a, plain.get().vector)


def test_a_ratio_of_one_changes_no_bit(lora: Any, rows: Any):
    plans = [plan_of(**OPTIONS), plan_of(**OPTIONS, loraplus_lr_ratio=1.0)]
    assert plans[0] == plans[1]
    assert "loraplus_lr_ratio" not in plans[0].agreed()["training"]
    faster = plan_of(**OPTIONS, loraplus_lr_ratio=4.0)
    assert faster.agreed()["training"]["loraplus_lr_ratio"] == 4.0
    found = []
    for plan in (plans[0], faster):
        model = lora()
        found.append(HFLearner(model, rows, [], plan, site="a").train(model.get(), round=1, state=b"").adapter.tensors())
    for name, values in found[0].items():
        further = np.abs(found[1][name] - values).max()
        assert further > (1e-3 if name.endswith(".lora_B.weight") else 0), name


@pytest.mark.parametrize("factors", ["A", "B", "AB"])
def test_only_b_is_faster_whatever_is_trained(lora: Any, factors: Any):
    model = lora()
    model.set_trained(factors)
    optimizer = make_optimizer(model, plan_of(loraplus_lr_ratio=8.0).training, factors=factors)
    set_rate(optimizer, 0.5)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    for factor, rate in (("A", 0.5), ("B", 4.0)):
        if factor in factors:
            assert {rates[id(p)] for p in model.trainable(factor)} == {rate}
    assert len(rates) == len(model.trainable(factors))


def test_kept_moments_come_back_to_the_same_factors(lora: Any, rows: Any):
    """A run that goes on is the run that was not interrupted."""
    plan = plan_of(**OPTIONS, loraplus_lr_ratio=4.0, optimizer_state="keep")

    def trained(adapter: Any, number: int, state: bytes) -> Any:
        model = lora()
        return HFLearner(model, rows, [], plan, site="a").train(adapter or model.get(), round=number, state=state)

    model = lora()
    one = HFLearner(model, rows, [], plan, site="a")
    first = one.train(model.get(), round=1, state=b"")
    second = one.train(first.adapter, round=2, state=first.state)
    again = trained(trained(None, 1, b"").adapter, 2, first.state)
    assert np.array_equal(second.adapter.vector, again.adapter.vector)
    other = make_optimizer(lora(), plan.training)
    load_moments(other, dump_moments(one._optimizer))  # type: ignore[arg-type]
    assert dump_moments(other) == dump_moments(one._optimizer)  # type: ignore[arg-type]


def test_sums_and_private_steps_are_of_one_rate():
    table = {"loraplus_lr_ratio": 2.0}
    Plan.model_validate({"training": table})
    secagg = {"protect": {"mode": "secagg"}, "aggregate": {"weighting": "uniform"}, "federation": {"min_sites": 3}}
    private = shared().model_dump()
    for plan in (secagg | {"training": table}, private | {"training": private["training"] | table}):
        with pytest.raises(ValueError, match="of one rate for A and B"):
            Plan.model_validate(plan)
