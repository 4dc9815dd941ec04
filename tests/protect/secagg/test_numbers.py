"""What rides beside the vector says sums, and no site's own number even over many rounds."""

from dataclasses import replace
from math import gcd

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from protect.secagg.world import World, secagg_plan

from fedlora.core.plan import Evaluation, Protect
from fedlora.protect.modes import mode_of
from fedlora.protect.secagg.protocol.numbers import Numbers, with_counts

NAMES = ("eval/exact_match", "eval/examples", "eval/nll", "eval/tokens", "train/loss")
RIDE = Numbers(1, NAMES)


def packed(nll, tokens, right, examples, loss, counted):
    metrics = {
        "eval/nll": nll, "eval/tokens": float(tokens), "eval/exact_match": right / examples,
        "eval/examples": float(examples), "train/loss": loss,
    }  # fmt: skip
    return RIDE.pack(weight=1, counted=counted, squares=np.ones(1), cut=np.zeros(1, np.int64), metrics=metrics)


counts = st.integers(1, 1 << 24)


@given(st.lists(st.tuples(st.floats(0, 20), counts, counts, st.floats(0, 20), counts), min_size=1, max_size=8))
def test_the_pooled_figures_are_those_of_the_pooled_rows(sites):
    total = np.zeros(RIDE.size, np.uint64)
    for i, (nll, tokens, examples, loss, counted) in enumerate(sites):
        total += packed(nll, tokens, i % (examples + 1), examples, loss, counted)
    found = RIDE.unpack(total, sites=len(sites)).metrics
    tokens = sum(t for _, t, *_ in sites)
    assert found["eval/exact_match"] == sum(i % (e + 1) for i, (_, _, e, *_) in enumerate(sites)) / sum(
        e for _, _, e, *_ in sites
    )
    assert abs(found["eval/nll"] - sum(n * t for n, t, *_ in sites) / tokens) <= len(sites) * 2.0**-11 / tokens + 1e-9


@given(st.floats(0, 20), st.integers(2, 1 << 20), st.floats(0, 20), st.integers(2, 1 << 20))
def test_a_total_is_rounded_after_it_is_one(nll, tokens, loss, counted):
    """So that it is the next whole number to nats, whatever the count; not a multiple of the count."""
    listed = packed(nll, tokens, 1, 2, loss, counted)[5:].astype(np.int64)
    assert abs(listed[4] - nll * tokens * 1024) <= 0.5
    assert abs(listed[8] - loss * counted * 1024) <= 0.5
    assert listed[:4].tolist() == [1, 2, 2, 1]  # right examples, examples; examples once more as a figure of their own


@pytest.mark.attack(
    "D2", "each honest site's loss and count of tokens from the sums of many rounds", stops="a total is rounded once it is one"
)
@pytest.mark.slow
def test_no_common_factor_of_a_sites_numbers_shows_over_rounds():
    """An outsider's attack: with ``round(x) * count`` the true count left the smallest remainders of all, in every round."""
    tokens = {"site-1": 9011, "site-2": 6508, "site-3": 3000}
    world, rng, sums, seen, unpack = World(3, plan=secagg_plan(rounds=14)), np.random.default_rng(7), [], [], Numbers.unpack

    def spy(self, total, *, sites):
        seen.append((self, total))
        return unpack(self, total, sites=sites)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Numbers, "unpack", spy)
        for r in range(1, 15):
            nll = {s: 2.2 - 0.05 * r + float(rng.normal(0, 0.02)) for s in tokens}
            for s, n in tokens.items():
                metrics = {"train/loss": 1.0, "eval/nll": nll[s], "eval/tokens": float(n)}
                world.updates[s] = replace(world.updates[s], metrics=metrics)
            assert world.collect(world.task(round=r)).sums
            numbers, total = seen.pop()
            at = 3 + 2 * numbers.tensors + 2 * numbers.metrics.index("eval/nll")
            colluding = world.__dict__["sites"]["site-3"]._encoded.numbers
            sums.append(int((total - colluding).view(np.int64)[at]))
            world.next_round(np.zeros(14, np.float32), round=r)
    whole = tokens["site-1"] + tokens["site-2"]

    def rest(count):
        inverse = pow(count, -1, whole)
        return max(min(d, whole - d) for d in (x * inverse % whole for x in sums))

    true = rest(tokens["site-1"])
    others = [rest(c) for c in range(1, whole, 7) if gcd(c, whole) == 1]
    assert sum(one <= true for one in others) > len(others) / 100


def test_a_mean_needs_the_count_that_it_is_over():
    plan = secagg_plan().model_copy(update={"evaluation": Evaluation(share=("train/loss", "eval/exact_match"))})
    world = World(3, plan=plan)
    for s, update in world.updates.items():
        world.updates[s] = replace(update, metrics={"train/loss": 1.0, "eval/exact_match": 0.5})
    assert set(world.collect(world.task()).codes().values()) == {"metric-missing"}
    for s, update in world.updates.items():
        world.updates[s] = replace(update, metrics={"train/loss": 1.0, "eval/exact_match": 0.5, "eval/examples": 4.0})
    assert world.collect(world.task(attempt=1)).sums
    assert with_counts(["eval/exact_match", "train/loss"]) == {"eval/exact_match", "eval/examples", "train/loss"}


def test_a_site_sends_what_the_plans_metrics_need():
    """A plan of defaults lists exact_match and not the examples that it is over."""
    plan = secagg_plan().model_copy(update={"evaluation": Evaluation()})
    assert mode_of(plan).sends(plan.evaluation.share) == {*plan.evaluation.share, "eval/examples"}
    sealed = plan.model_copy(update={"protect": Protect()})
    assert mode_of(sealed).sends(plan.evaluation.share) == {*plan.evaluation.share}
