"""Adam at the server, along gradients that sites have summed: torch's steps, at the plan's rates, the same after a restart."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from privacy.test_distributed import shared
from protect.secagg.test_published import check_published
from raising import raising

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.errors import PlanRefused
from fedlora.core.grids import to_bfloat16
from fedlora.core.plan import Aggregate, Training
from fedlora.formats.files import load_vectors, save_adapter
from fedlora.protect.secagg.mode import SecAgg
from fedlora.rules import add, optimizer_of, rounded, rule_of
from fedlora.rules.first import first_adapter
from fedlora.rules.server_optimizer import Adam, ServerOptimizer, gradient_rate

LAYOUT = Layout.of({"m.lora_A.weight": (3, 6), "m.lora_B.weight": (5, 3)})
GRADIENTS = [np.random.default_rng(i).normal(scale=10.0 ** (i - 4), size=LAYOUT.size).astype(np.float32) for i in range(6)]


def plan_of(rule="fedavg", *, rounds=6, rate=0.1, schedule="linear"):
    made = shared(rounds=rounds)
    training = Training(learning_rate=rate, lr_scheduler_type=schedule, warmup_ratio=0.2)
    return made.model_copy(update={"training": training, "aggregate": Aggregate(name=rule, weighting="uniform")})


def walk(plan, gradients, *, state=None, begin=1):
    state, out = state or {}, []
    for round, gradient in enumerate(gradients, begin):
        step, state = optimizer_of(plan, round=round).step(Adapter(gradient, LAYOUT), state)
        out.append(step.vector)
    return out, state


@pytest.mark.torch
def test_steps_are_those_of_torch_in_float64_against_the_gradient_at_the_plans_rates():
    import torch

    plan = plan_of()
    p = torch.zeros(LAYOUT.size, dtype=torch.float64, requires_grad=True)
    peer = torch.optim.Adam([p], lr=1.0, betas=(0.9, 0.99), eps=1e-8)
    for round, (gradient, step) in enumerate(zip(GRADIENTS, walk(plan, GRADIENTS)[0], strict=True), 1):
        peer.param_groups[0]["lr"] = gradient_rate(plan, round=round)
        before = p.detach().clone()
        p.grad = torch.from_numpy(gradient.astype(np.float64))
        peer.step()
        np.testing.assert_allclose(step, (p.detach() - before).numpy(), rtol=1e-5, atol=1e-8)
    assert np.array_equal(np.sign(walk(plan, GRADIENTS[:1])[0][0]), -np.sign(GRADIENTS[0]))


def test_the_rates_are_those_that_a_site_would_have_with_one_step_a_round():
    from fedlora.learn.loop import rate_of

    plan = plan_of(schedule="cosine")
    for round in range(1, 7):
        assert gradient_rate(plan, round=round) == rate_of(plan, round=round, step=0, steps=1)
    assert gradient_rate(plan, round=1) > 0


def test_moments_and_their_count_come_back_from_a_checkpoint_to_the_same_bits(tmp_path):
    plan = plan_of()
    whole, after = walk(plan, GRADIENTS)
    _, state = walk(plan, GRADIENTS[:3])
    file = tmp_path / "round.safetensors"
    save_adapter(file, Adapter(GRADIENTS[0], LAYOUT), {"round": 3}, state)
    _, _, back = load_vectors(file)
    rest, ended = walk(plan, GRADIENTS[3:], state=back, begin=4)
    assert [step.tobytes() for step in rest] == [step.tobytes() for step in whole[3:]]
    assert {name: v.digest() for name, v in ended.items()} == {name: v.digest() for name, v in after.items()}


def test_a_factor_that_rests_keeps_its_moments_and_its_count():
    optimizer, state = ServerOptimizer("adam", learning_rate=0.1), {}
    alone = ServerOptimizer("adam", learning_rate=0.1)
    lone: dict = {}
    for n in range(4):
        for factor in "BA":
            layout = LAYOUT.only(factor)
            gradient = Adapter(np.full(layout.size, 1.0 + n, np.float32), layout)
            step, state = optimizer.step(gradient, state)
            if factor == "A":
                expected, lone = alone.step(gradient, lone)
                assert step.digest() == expected.digest()
    assert set(state) == {f"adam-{name}.{factor}" for name in ("mean", "square", "steps") for factor in "AB"}


def test_a_round_that_was_void_is_no_step():
    plan = plan_of(schedule="constant", rounds=10)
    first, _ = walk(plan, [GRADIENTS[5]], begin=5)  # rounds 1 to 4 were void
    assert np.abs(first[0]) == pytest.approx(np.full(LAYOUT.size, 0.1), rel=1e-3)


def publish(plan, gradients, *, void=()):
    rule, now, state = rule_of(plan), first_adapter(LAYOUT, seed=plan.run.seed), {}
    yield now
    for round, gradient in enumerate(gradients, 1):
        if round not in void:
            sent = rule.reply(now.layout, round)
            moved, state = optimizer_of(plan, round=round).step(Adapter(gradient(sent.size), sent), state)
            now, state = rounded(add(now, moved), state, sent=now.layout.only(rule.down()), dtype=SecAgg.down(plan))
        yield now


@given(
    st.sampled_from(["fedavg", "ffa", "rolora"]), st.sampled_from(["cosine", "linear", "constant"]), st.integers(0, 2**32),
    st.sets(st.integers(1, 6)), st.sampled_from(["noise", "ahead", "rising"]),
)  # fmt: skip
@settings(max_examples=80, deadline=None)
def test_whatever_gradients_give_is_taken_by_a_site(rule, schedule, seed, void, kind):
    plan, rng = plan_of(rule, schedule=schedule), np.random.default_rng(seed)

    def gradient(round):
        def make(n):
            found = rng.normal(size=n) if kind == "noise" else np.full(n, 1.0 if kind == "ahead" else 10.0**round)
            return (1e-3 * found).astype(np.float32)

        return make

    for round, adapter in enumerate(publish(plan, [gradient(r) for r in range(6)], void=void), 1):
        check_published(plan, adapter.part(adapter.layout.only(rule_of(plan).down())), round=round)


@pytest.mark.parametrize(("beta1", "beta2"), [(0.0, 1e-9), (0.9, 0.8100001), (0.99, 0.999), (0.999, 0.9999)])
def test_steps_of_any_number_are_bounded_for_all_betas_that_a_plan_may_have(beta1, beta2):
    Adam(beta1=beta1, beta2=beta2)
    most = (1 - beta1) / ((1 - beta2) * (1 - beta1**2 / beta2)) ** 0.5
    reached = ServerOptimizer("adam", beta1=beta1, beta2=beta2).adam_reach([1.0] * 100_000)
    assert 1.0 <= reached / 100_000 <= 1.001 * max(most, 1.0)


@pytest.mark.parametrize("rule", ["fedavg", "ffa"])
def test_no_more_is_taken_than_steps_so_far_can_have_moved(rule):
    plan = plan_of(rule, schedule="constant")
    sent = LAYOUT.only(rule_of(plan).down())
    first = first_adapter(LAYOUT, seed=plan.run.seed).part(sent)
    rate = gradient_rate(plan, round=1)
    check_published(plan, Adapter(to_bfloat16(first.vector + np.float32(0.99 * rate)), sent), round=2)
    for round, far in ((1, 0.02), (2, 1.05 * rate)):
        with raising(PlanRefused, code="impossible-adapter"):
            check_published(plan, Adapter(to_bfloat16(first.vector + np.float32(far)), sent), round=round)


def test_the_gradients_that_move_a_value_furthest_are_taken_and_the_bound_is_near():
    """They rise by beta2 / beta1 from round to round: a step is then longer than the learning rate."""
    plan = plan_of("ffa", rounds=40, rate=0.01, schedule="constant")
    gradients = [lambda n, k=k: np.full(n, -1e-3 * (0.99 / 0.9) ** k, np.float32) for k in range(40)]
    sent = LAYOUT.only("B")
    for round, adapter in enumerate(publish(plan, gradients), 1):
        last = adapter.part(sent)
        check_published(plan, last, round=round)
    rates = [gradient_rate(plan, round=r) for r in range(1, 41)]
    moved, bound = float(last.vector.max()), optimizer_of(plan).adam_reach(rates)
    assert 1.1 * sum(rates) < moved < 1.01 * bound < 1.1 * moved  # published in bfloat16
