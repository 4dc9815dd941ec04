"""The laws of fedlora.aggregate.Aggregator, over the registry."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.adapter import Adapter, Layout, Update
from fedlora.aggregate import AGGREGATORS
from fedlora.aggregate.factored import product_norm
from fedlora.aggregate.sums import MAX_DELTA, Sums, gap
from fedlora.errors import FedLoRAError, NonFiniteUpdate, UpdateRejected, WrongLayout

LAYOUT = Layout.of({"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "v.lora_A.weight": (2, 3), "v.lora_B.weight": (3, 2)})
RULES = pytest.mark.parametrize("rule", [cls() for cls in AGGREGATORS.values()], ids=list(AGGREGATORS))
SCALE = 2.0


def adapter(seed: int = 0) -> Adapter:
    return Adapter(np.random.default_rng(seed).normal(size=LAYOUT.size).astype(np.float32), LAYOUT)


def apply(rule, updates, start=None):
    start = start or adapter()
    sums = rule.start(start, cohort=8)
    for site, update in updates:
        sums.add(site, update)
    return rule.finish(sums, start, scale=SCALE)


def deltas(n: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(scale=1e-3, size=(n, LAYOUT.size)).astype(np.float32))


updates = st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 10**7)), min_size=1, max_size=5).map(
    lambda rows: [(f"s{i}", Update(deltas(1, seed)[0], w, {})) for i, (seed, w) in enumerate(rows)]
)


@RULES
@given(updates, st.randoms(use_true_random=False))
@settings(max_examples=40, deadline=None)
def test_the_order_of_arrival_changes_no_bit(rule, ups, rng):
    shuffled = list(ups)
    rng.shuffle(shuffled)
    one, other = apply(rule, ups), apply(rule, shuffled)
    assert one.adapter.vector.tobytes() == other.adapter.vector.tobytes()
    assert one.record == other.record


@RULES
@given(updates, st.integers(1, 10**6))
@settings(max_examples=40, deadline=None)
def test_an_update_split_in_two_counts_the_same(rule, ups, extra):
    (_, first), *rest = ups
    whole = [("s0", Update(first.delta, first.weight + extra, {})), *rest]
    split = [("s0", first), ("split", Update(first.delta, extra, {})), *rest]
    np.testing.assert_allclose(apply(rule, split).adapter.vector, apply(rule, whole).adapter.vector, rtol=2.4e-7, atol=2e-7)


@RULES
@given(st.integers(0, 2**32), st.lists(st.integers(1, 10**6), min_size=1, max_size=6))
@settings(max_examples=30, deadline=None)
def test_identical_sites_are_one_site(rule, seed, weights):
    delta = deltas(1, seed)[0]
    many = apply(rule, [(f"s{i}", Update(delta, w, {})) for i, w in enumerate(weights)])
    one = apply(rule, [("s", Update(delta, 1, {}))])
    np.testing.assert_allclose(many.adapter.vector, one.adapter.vector, rtol=2.4e-7, atol=2e-7)
    assert many.record["gap/ratio"] < 1e-3  # identical sites have no covariance


@given(updates)
@settings(max_examples=40, deadline=None)
def test_fedavg_is_the_weighted_mean_in_float64(ups):
    total = sum(u.weight for _, u in ups)
    oracle = sum(u.weight / total * u.delta.astype(np.float64) for _, u in ups)
    sums = Sums.start(LAYOUT, cohort=8, max_weight=1 << 26)
    for site, u in ups:
        sums.add(site, u)
    bound = len(ups) * 2.0 ** -(sums.exponent + 1) / total
    np.testing.assert_allclose(sums.mean(), oracle, rtol=1.2e-7, atol=bound)


def test_uniform_weights_get_a_finer_grid():
    assert Sums.start(LAYOUT, cohort=8, max_weight=1).exponent >= Sums.start(LAYOUT, cohort=8, max_weight=1 << 26).exponent + 26


def test_the_largest_values_of_a_full_cohort_do_not_overflow():
    sums = Sums.start(LAYOUT, cohort=64, max_weight=1 << 26)
    for i in range(64):
        sums.add(f"s{i}", Update(np.full(LAYOUT.size, MAX_DELTA, np.float32), 1 << 26, {}))
    assert np.all(sums.mean() == np.float32(MAX_DELTA))


@pytest.mark.parametrize(
    ("update", "error"),
    [
        (Update(np.full(LAYOUT.size, np.nan, np.float32), 1, {}), NonFiniteUpdate),
        (Update(np.zeros(LAYOUT.size + 1, np.float32), 1, {}), WrongLayout),
        (Update(np.full(LAYOUT.size, 65, np.float32), 1, {}), UpdateRejected),
        (Update(np.zeros(LAYOUT.size, np.float32), -1, {}), UpdateRejected),
        (Update(np.zeros(LAYOUT.size, np.float32), (1 << 26) + 1, {}), UpdateRejected),
    ],
)
def test_a_bad_update_is_refused_alone(update, error):
    rule = AGGREGATORS["fedavg"]()
    good = [(s, Update(d, 3, {})) for s, d in zip("abc", deltas(3, 1), strict=True)]
    sums = rule.start(adapter(), cohort=8)
    for site, u in good:
        with pytest.raises(error):
            sums.add("bad", update)
        sums.add(site, u)
    assert rule.finish(sums, adapter(), scale=SCALE).adapter.vector.tobytes() == apply(rule, good).adapter.vector.tobytes()


def test_a_site_counts_once():
    sums = Sums.start(LAYOUT, cohort=8, max_weight=8)
    sums.add("a", Update(deltas(1, 0)[0], 1, {}))
    with pytest.raises(UpdateRejected):
        sums.add("a", Update(deltas(1, 0)[0], 1, {}))


def test_a_weight_of_zero_is_refused_because_it_would_fill_the_quorum_with_nothing():
    sums = Sums.start(LAYOUT, cohort=8, max_weight=8)
    with pytest.raises(UpdateRejected, match="weight 0"):
        sums.add("a", Update(deltas(1, 0)[0], 0, {}))
    with pytest.raises(FedLoRAError):
        sums.mean()  # of nothing: an error, no division by zero


def dense(vector: np.ndarray) -> list[np.ndarray]:
    v = vector.astype(np.float64)
    return [SCALE * v[p.b].reshape(p.d_out, p.rank) @ v[p.a].reshape(p.rank, p.d_in) for p in LAYOUT.pairs()]


@given(updates)
@settings(max_examples=40, deadline=None)
def test_the_certificate_bounds_the_true_gap(ups):
    """Against dense float64 products: |mean of B_i A_i - mean B times mean A| <= gap/bound, per run over all pairs."""
    start = adapter()
    result = apply(AGGREGATORS["fedavg"](), ups, start)
    total = sum(u.weight for _, u in ups)
    locals_ = [(u.weight / total, dense(start.vector.astype(np.float64) + u.delta)) for _, u in ups]
    mean_vector = start.vector.astype(np.float64) + sum(u.weight / total * u.delta.astype(np.float64) for _, u in ups)
    true = [sum(p * d[i] for p, d in locals_) - m for i, m in enumerate(dense(mean_vector))]
    norm = np.sqrt(sum(np.sum(g * g) for g in true))
    assert norm <= result.record["gap/bound"] * (1 + 1e-6) + 1e-9
    change = [m - b for m, b in zip(dense(result.adapter.vector), dense(start.vector), strict=True)]
    assert result.record["gap/update"] == pytest.approx(np.sqrt(sum(np.sum(c * c) for c in change)), rel=1e-6, abs=1e-9)


def test_the_certificate_is_not_vacuous():
    """Two sites whose displacements are aligned reach their bound."""
    d = deltas(1, 3)[0]
    record = apply(AGGREGATORS["fedavg"](), [("a", Update(d, 1, {})), ("b", Update(-d, 1, {}))]).record
    assert record["gap/bound"] > 0
    assert record["drift"] >= 1


def test_product_norm_needs_no_product():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 7))
    assert product_norm(x[:, :3], y[:3]) == pytest.approx(np.linalg.norm(x[:, :3] @ y[:3]))


def test_fedavg_weights_sum_to_one():
    """Would have caught the published baseline that returned p_0 * site_0."""
    d = np.ones(LAYOUT.size, np.float32)
    sums = Sums.start(LAYOUT, cohort=4, max_weight=100)
    for site, w in zip("abcd", itertools.count(1), strict=False):
        sums.add(site, Update(d, w, {}))
    assert np.all(sums.mean() == 1)


def test_gap_of_nothing_is_zero():
    sums = Sums.start(LAYOUT, cohort=2, max_weight=2)
    sums.add("a", Update(np.zeros(LAYOUT.size, np.float32), 1, {}))
    assert gap(sums, sums.mean(), adapter(), adapter(), scale=1.0)["gap/ratio"] == 0
