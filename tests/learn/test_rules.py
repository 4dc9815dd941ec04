"""What sites train and what the server makes of it, against PEFT's own arithmetic and PyTorch's own training."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from learn.plans import plan_of
from peft.tuners.lora import LoraLayer
from raising import raising

from fedlora.core.adapter import Adapter, Update
from fedlora.core.errors import RunFailed, WrongContext
from fedlora.learn.learner import HFLearner
from fedlora.rules import FFA, FedSVD, Product, RoLoRA, add

pytestmark = pytest.mark.torch

WEIGHTS = (5, 2, 1)


def deltas(model: Any, adapter: Adapter, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """``get_delta_weight`` of every layer, computed in ``dtype``."""
    model.set(adapter)
    found = {}
    for name, module in model.peft_model.named_modules():
        if isinstance(module, LoraLayer):
            for factor in (module.lora_A, module.lora_B):
                factor["default"].weight.data = factor["default"].weight.data.to(dtype)
            found[name] = module.get_delta_weight("default").detach().double().numpy()
            for factor in (module.lora_A, module.lora_B):
                factor["default"].weight.data = factor["default"].weight.data.float()
    return found


def distance(found: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> float:
    off = sum(np.sum((found[n] - wanted[n]) ** 2) for n in wanted)
    return float(np.sqrt(off / sum(np.sum(w * w) for w in wanted.values())))


def one_round(rule: Any, model: Any, *, ranks: tuple[int, ...], round: int, factors: Any, moved: Callable[..., Adapter]) -> Any:
    """The next adapter, and what the sites had trained."""
    start = moved(model.get(), seed=1)
    local = []
    for seed, rank in enumerate(ranks, 2):
        begin = start.at_rank(rank)
        other = moved(begin, seed=seed, size=0.2)
        local.append(begin.replaced(other.part(begin.layout.only(factors or rule.trains(round)))))
    sums = rule.start(start, cohort=len(local), round=round)
    for n, (after, weight) in enumerate(zip(local, WEIGHTS, strict=True)):
        sums.add(f"s{n}", Update(rule.encode(start, after, round=round), weight, {}))
    result = rule.finish(sums, start, scale=model.scale, round=round, state={})
    return (result.adapter if result.adapter is not None else add(start, result.delta)), local


EXACT = {
    "ffa": (FFA(), 1, (4, 4, 4), ""),
    "rolora-B": (RoLoRA(), 1, (4, 4, 4), ""),
    "rolora-A": (RoLoRA(), 2, (4, 4, 4), ""),
    "fedsvd": (FedSVD(), 1, (4, 4, 4), ""),
    "product-full": (Product(rank="full"), 1, (4, 4, 4), ""),
    "product-mixed-ranks": (Product(rank="full"), 1, (4, 2, 1), ""),
    "product-B-moved": (Product(), 1, (4, 4, 4), "B"),  # the mean has the adapter's rank: nothing is cut off
    "product-A-moved": (Product(), 1, (4, 4, 4), "A"),
}


@pytest.mark.parametrize("rslora", [False, True])
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float64, 1e-6), (torch.float32, 1e-5)])
@pytest.mark.parametrize("name", EXACT)
def test_exact_rules_give_the_mean_of_what_peft_adds_to_the_weights(
    lora: Callable[..., Any],
    moved: Callable[..., Adapter],
    name: str,
    dtype: torch.dtype,
    bound: float,
    rslora: bool,
):
    rule, round, ranks, factors = EXACT[name]
    model = lora(use_rslora=rslora)
    after, local = one_round(rule, model, ranks=ranks, round=round, factors=factors, moved=moved)
    parts = [deltas(model, adapter, dtype) for adapter in local]
    mean = {n: sum(w * p[n] for w, p in zip(WEIGHTS, parts, strict=True)) / sum(WEIGHTS) for n in parts[0]}
    assert distance(deltas(model, after, dtype), mean) < bound
    assert distance(parts[0], mean) > 0.1  # the sites do differ


def test_an_adapter_of_another_rank_is_multiplied_by_the_same_number(lora: Callable[..., Any], moved: Callable[..., Adapter]):
    model = lora()
    for rank in (1, 4, 9):
        adapter = moved(model.get().at_rank(rank))
        found = deltas(model, adapter, torch.float64)
        for name, tensor in found.items():
            b, a = (adapter.tensors()[f"{name}.lora_{f}.weight"].astype(np.float64) for f in "BA")
            np.testing.assert_allclose(tensor, 6 / 4 * b @ a, rtol=1e-12, atol=1e-14)
        assert model.get().digest() == adapter.digest()
        assert model.get().layout.rank == rank


def test_an_adapter_of_mixed_ranks_is_refused(lora: Callable[..., Any]):
    model = lora()
    tensors = dict(model.get().tensors())
    module = next(iter(tensors)).removesuffix(".lora_A.weight")
    for factor, keep in (("A", np.s_[:2]), ("B", np.s_[:, :2])):
        tensors[f"{module}.lora_{factor}.weight"] = tensors[f"{module}.lora_{factor}.weight"][keep]
    with raising(WrongContext, code="wrong-layout"):
        model.set(Adapter.of(tensors))


@pytest.fixture
def learner(lora: Callable[..., Any], rows: Any) -> Callable[..., HFLearner]:
    def make(**options: Any) -> HFLearner:
        made = {"local_steps": 3, "num_rounds": 2, "max_length": 64, "learning_rate": 1e-2, "lr_scheduler_type": "constant"}
        return HFLearner(lora(), rows, [], plan_of(**{**made, **options}), site="a")

    return make


@pytest.mark.parametrize("factors", ["A", "B"])
@pytest.mark.parametrize("optimizer_state", ["reset", "keep"])
def test_only_the_named_factor_is_trained_and_the_other_keeps_its_bits(
    learner: Callable[..., HFLearner], moved: Callable[..., Adapter], factors: Any, optimizer_state: str
):
    site = learner(optimizer_state=optimizer_state, weight_decay=0.1)
    start, state = moved(site._model.get()), b""
    for round_ in (1, 2):
        trained = site.train(start, round=round_, state=state, factors=factors)
        still = "B" if factors == "A" else "A"
        for name, tensor in trained.adapter.tensors().items():
            assert np.array_equal(tensor, start.tensors()[name]) == name.endswith(f"lora_{still}.weight"), name
        start, state = trained.adapter, trained.state
    with pytest.raises(RunFailed):
        site._model.check_trainable("AB")


def test_a_learner_goes_from_one_rank_and_factor_to_another_as_a_fresh_one_would(
    learner: Callable[..., HFLearner], moved: Callable[..., Adapter]
):
    one = learner()
    wide, narrow = moved(one._model.get().at_rank(6)), moved(one._model.get().at_rank(2))
    one.train(wide, round=1, state=b"", factors="B")
    again = one.train(narrow, round=1, state=b"")
    fresh = learner().train(narrow, round=1, state=b"")
    assert again.adapter.layout.rank == 2
    assert again.adapter.digest() == fresh.adapter.digest()


def test_the_proximal_term_is_mu_times_the_way_from_the_start(lora: Callable[..., Any], moved: Callable[..., Adapter], rows: Any):
    """Plain gradient descent, worked out beside it: loss + mu / 2 |w - w0|^2."""
    from fedlora.data import in_order
    from fedlora.learn.loop import train_steps

    mu, rate, batches = 0.5, 0.1, list(in_order(rows, rows=4, max_length=64, packing=True, pad_token_id=256))
    model = lora({"dtype": "float32"}, lora_dropout=0.0)  # bfloat16 would round the two apart
    start = moved(model.get(), size=0.05)

    def descend(steps: int, *, proximal_mu: float, penalty: float = 0.0) -> Adapter:
        model.set(start)
        parameters = model.trainable()
        anchors = [p.detach().clone() for p in parameters]
        if penalty:  # by autograd, as the paper writes it
            for _ in range(steps):
                batch = batches[0]
                loss = model.forward(batch).nll.sum() / batch.supervised
                loss = loss + penalty / 2 * sum(((p - a) ** 2).sum() for p, a in zip(parameters, anchors, strict=True))
                gradients = torch.autograd.grad(loss, parameters)
                with torch.no_grad():
                    for p, g in zip(parameters, gradients, strict=True):
                        p.sub_(rate * g)
        else:
            train_steps(
                model,
                iter([[batches[0]]] * steps),
                steps=steps,
                optimizer=torch.optim.SGD(parameters, lr=rate),
                rate=lambda step: rate,
                seed=lambda step: 0,
                max_grad_norm=1e9,
                proximal_mu=proximal_mu,
            )
        return model.get()

    np.testing.assert_allclose(
        descend(4, proximal_mu=mu).vector, descend(4, proximal_mu=0, penalty=mu).vector, rtol=1e-4, atol=1e-6
    )
    free, held = (np.linalg.norm(descend(4, proximal_mu=m).vector - start.vector) for m in (0.0, 5.0))
    assert held < 0.8 * free
    assert descend(1, proximal_mu=mu).digest() == descend(1, proximal_mu=0.0).digest()  # no way yet, nothing to pull back
