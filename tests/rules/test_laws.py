"""The laws of fedlora.rules.Aggregator, over the registry, and what an exact rule must give."""

import itertools
import tracemalloc
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.adapter import Adapter, Layout, Update
from fedlora.core.errors import FedLoRAError, NonFiniteUpdate, UpdateRejected, WrongContext
from fedlora.core.plan import Aggregate, Federation, Plan, Protect
from fedlora.core.registry import MODES, RULES
from fedlora.rules import (
    BUILT_IN,
    FedAvg,
    FedSVD,
    Product,
    Robust,
    ServerOptimizer,
    Sums,
    add,
    rule_of,
)
from fedlora.rules.factored import product_norm
from fedlora.rules.sums import MAX_DELTA, Each, gap

LAYOUT = Layout.of({"q.lora_A.weight": (2, 5), "q.lora_B.weight": (4, 2), "v.lora_A.weight": (2, 3), "v.lora_B.weight": (3, 2)})
SCALE = 2.0
REGISTRY = {
    **{name: rule() for name, rule in BUILT_IN.items()},
    "fedavg-share-A": FedAvg(share="A"),
    "product-procrustes": Product(factorization="procrustes"),
    "product-r_max": Product(rank="r_max", max_rank=3),
    "product-energy": Product(rank="energy", energy=0.9),
    "product-full": Product(rank="full"),
    "robust-median": Robust(statistic="median"),
    "robust-trimmed": Robust(statistic="trimmed", trim=0.3),
    "robust-krum": Robust(statistic="multi-krum", byzantine=1),
    "robust-clip": Robust(statistic="clip"),
}


def rules(*names):
    chosen = {n: r for n, r in REGISTRY.items() if not names or n in names}
    return pytest.mark.parametrize("rule", chosen.values(), ids=chosen)


def adapter(seed: int = 0, layout: Layout = LAYOUT) -> Adapter:
    return Adapter(np.random.default_rng(seed).normal(size=layout.size).astype(np.float32), layout)


def moved(start: Adapter, seed: int, *, scale: float = 1e-2) -> Adapter:
    """A local adapter after training."""
    step = np.random.default_rng(seed).normal(scale=scale, size=start.vector.size)
    return Adapter((start.vector + step).astype(np.float32), start.layout)


def trained(rule, start: Adapter, seed: int, *, scale: float = 1e-2, rank: int = 0, round: int = 1) -> Adapter:
    """The same, with only those factors moved that the rule trains, at the rank that the site has."""
    begin = start.at_rank(rank or start.layout.rank)
    return begin.replaced(moved(begin, seed, scale=scale).part(begin.layout.only(rule.trains(round))))


@dataclass
class Result:
    adapter: Adapter
    record: dict = field(default_factory=dict)


def apply(rule, sites, start=None, *, round=1):
    """One whole round: from (name, local adapter, weight) to the next global adapter."""
    start = start or adapter()
    sums = rule.start(start, cohort=8, round=round)
    for name, local, weight in sites:
        sums.add(name, Update(rule.encode(start, local, round=round), weight, {}))
    found = rule.finish(sums, start, scale=SCALE, round=round, state={})
    return Result(found.adapter or add(start, found.delta), dict(found.record))


def products(a: Adapter) -> list[np.ndarray]:
    v = a.vector.astype(np.float64)
    return [v[p.b].reshape(p.d_out, p.rank) @ v[p.a].reshape(p.rank, p.d_in) for p in a.layout.pairs()]


def mean_products(sites) -> list[np.ndarray]:
    """The oracle: dense, in float64."""
    total = sum(w for _, _, w in sites)
    parts = [[w / total * p for p in products(local)] for _, local, w in sites]
    return [sum(m) for m in zip(*parts, strict=True)]


def distance(found, wanted) -> float:
    """Relative Frobenius distance over all modules."""
    off = sum(np.sum((f - w) ** 2) for f, w in zip(found, wanted, strict=True))
    return float(np.sqrt(off / sum(np.sum(w * w) for w in wanted)))


population = st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 10**7)), min_size=1, max_size=5)


def of(rule, rows, start):
    return [(f"s{i}", trained(rule, start, seed), w) for i, (seed, w) in enumerate(rows)]


def enough(rule, rows):
    """Multi-Krum against one liar needs five."""
    lacking = 5 - len(rows) if isinstance(rule, Robust) and rule.statistic == "multi-krum" else 0
    return rows + [(10 + i, 1 + i) for i in range(lacking)]


# --- laws ---------------------------------------------------------------------------------------------------------


def test_every_name_that_a_plan_may_use_is_under_these_laws():
    made = set()
    for name in RULES:
        for mode in MODES:
            if RULES[name].needs == "each" and MODES[mode].reveals == "sum":
                continue  # refused when the plan is read
            protect = Protect(mode=mode, **({"secagg": {"first_range": 0.1}} if mode == "secagg" else {}))
            plan = Plan(aggregate=Aggregate(name=name, weighting="uniform"), protect=protect, federation=Federation(min_sites=3))
            made.add(type(rule_of(plan)))
    assert made == {type(r) for r in REGISTRY.values()}


@rules()
@given(population, st.randoms(use_true_random=False))
@settings(max_examples=20, deadline=None)
def test_the_order_of_arrival_does_not_show_in_a_single_bit(rule, rows, rng):
    start = adapter()
    sites = of(rule, enough(rule, rows), start)
    shuffled = list(sites)
    rng.shuffle(shuffled)
    one, other = apply(rule, sites, start), apply(rule, shuffled, start)
    assert one.adapter.vector.tobytes() == other.adapter.vector.tobytes()
    assert one.record == other.record


@rules(*(n for n in REGISTRY if not n.startswith("robust")))  # those count sites, not weights
@given(population, st.integers(1, 10**6))
@settings(max_examples=20, deadline=None)
def test_an_update_split_in_two_counts_the_same(rule, rows, extra):
    start = adapter()
    (name, first, weight), *rest = of(rule, rows, start)
    whole = apply(rule, [(name, first, weight + extra), *rest], start)
    split = apply(rule, [(name, first, weight), ("split", first, extra), *rest], start)
    if rule.refactorizes:  # a basis of nearly equal singular values may turn; the product must not
        assert distance(products(split.adapter), products(whole.adapter)) < 1e-5
    else:
        np.testing.assert_allclose(split.adapter.vector, whole.adapter.vector, rtol=1e-6, atol=1e-6)


@rules()
@given(st.integers(0, 2**32), st.lists(st.integers(1, 10**6), min_size=5, max_size=6))
@settings(max_examples=25, deadline=None)
def test_identical_sites_are_one_site(rule, seed, weights):
    """Would have caught the published baseline that returned p_0 times the first site's factors."""
    start = adapter()
    local = trained(rule, start, seed)
    many = apply(rule, [(f"s{i}", local, w) for i, w in enumerate(weights)], start)
    after = local if not isinstance(rule, FedAvg) or rule.share == "AB" else start.replaced(local.part(LAYOUT.only("A")))
    assert distance(products(many.adapter), products(after)) < 2e-6
    if "gap/ratio" in many.record:
        assert many.record["gap/ratio"] < 1e-3  # identical sites have no covariance


@rules()
def test_nothing_learned_changes_nothing(rule):
    """The weights sum to one: a mean of what stands still stands still."""
    start = adapter()
    after = apply(rule, [(f"s{i}", start, w) for i, w in enumerate((3, 1, 4, 1, 5))], start)
    assert distance(products(after.adapter), products(start)) < 1e-6


@rules()
@given(st.sampled_from([np.nan, np.inf, MAX_DELTA + 1]), st.integers(0, 2**32))
@settings(max_examples=10, deadline=None)
def test_a_bad_update_is_refused_alone(rule, value, seed):
    start = adapter()
    sites = of(rule, [(seed + i, 3) for i in range(5)], start)
    good = rule.start(start, cohort=8, round=1)
    mixed = rule.start(start, cohort=8, round=1)
    bad = Update(np.full(good.layout.size, value, np.float32), 1, {})
    for name, local, weight in sites:
        update = Update(rule.encode(start, local, round=1), weight, {})
        good.add(name, update)
        for wrong in (bad, Update(update.delta, 0, {}), Update(update.delta[:-1], 1, {}), Update(update.delta, 1 << 40, {})):
            with pytest.raises((NonFiniteUpdate, WrongContext, UpdateRejected)):
                mixed.add("bad", wrong)
        mixed.add(name, update)
        with pytest.raises(UpdateRejected, match="already"):
            mixed.add(name, update)
    one, other = (rule.finish(s, start, scale=SCALE, round=1, state={}) for s in (good, mixed))
    for a, b in ((one.adapter, other.adapter), (one.delta, other.delta)):
        assert (a is None) == (b is None)
        assert a is None or a.vector.tobytes() == b.vector.tobytes()


@rules()
def test_nothing_to_combine_is_an_error_and_no_division_by_zero(rule):
    start = adapter()
    with pytest.raises(FedLoRAError):
        rule.finish(rule.start(start, cohort=8, round=1), start, scale=SCALE, round=1, state={})


@rules()
@pytest.mark.parametrize("round", [1, 2])
def test_what_a_site_sends_is_what_the_server_waits_for(rule, round):
    start = adapter()
    sent = rule.encode(start, trained(rule, start, 1, round=round), round=round)
    sums = rule.start(start, cohort=5, round=round)
    assert sent.dtype == np.float32
    assert sent.size == sums.layout.size == rule.reply(LAYOUT, round).size


# --- exact rules against dense float64 ----------------------------------------------------------------------------------


@rules("ffa", "rolora", "fedsvd", "product-full")
@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 10**5)), min_size=1, max_size=5), st.booleans())
@settings(max_examples=40, deadline=None)
def test_an_exact_rule_gives_the_mean_of_the_products(rule, rows, even):
    round, start = 2 if even and not isinstance(rule, FedSVD) else 1, adapter()
    sites = [(f"s{i}", trained(rule, start, seed, scale=0.3, round=round), w) for i, (seed, w) in enumerate(rows)]
    result = apply(rule, sites, start, round=round)
    assert distance(products(result.adapter), mean_products(sites)) < 2e-6
    if isinstance(rule, Product):
        assert result.record["product/kept"] == pytest.approx(1)
    else:
        assert result.record["gap/bound"] == 0


WIDE = Layout.of({"m.lora_A.weight": (4, 40), "m.lora_B.weight": (32, 4)})


@pytest.mark.parametrize("rule", [Product(), Product(factorization="procrustes")], ids=["svd", "procrustes"])
@pytest.mark.parametrize("sites", [1, 2])
def test_a_product_that_was_cut_is_the_best_approximation(rule, sites):
    """Two sites of rank r: the mean product has rank 2 r, of which the best half is kept."""
    start = adapter(5, WIDE)
    rows = [(f"s{i}", moved(start, i, scale=0.5), 1 + i) for i in range(sites)]
    (wanted,) = mean_products(rows)
    u, values, vt = np.linalg.svd(wanted)
    best = (u[:, :4] * values[:4]) @ vt[:4]
    (found,) = products(apply(rule, rows, start).adapter)
    assert np.linalg.norm(found - best) < 2e-6 * np.linalg.norm(wanted)


@given(st.lists(st.tuples(st.integers(0, 2**32), st.integers(1, 100), st.integers(1, 2)), min_size=2, max_size=5))
@settings(max_examples=30, deadline=None)
def test_mixed_ranks_product_is_the_mean_of_what_the_sites_hold(rows):
    start, rule = adapter(), Product(rank="full")
    sites = [(f"s{i}", trained(rule, start, seed, scale=0.3, rank=rank), w) for i, (seed, w, rank) in enumerate(rows)]
    assert distance(products(apply(rule, sites, start).adapter), mean_products(sites)) < 2e-6


# --- gauges -------------------------------------------------------------------------------------------------------


@rules("product")
def test_the_balanced_gauge_gives_both_factors_the_same_size(rule):
    start = adapter()
    after = apply(rule, of(rule, [(i, 1) for i in range(4)], start), start).adapter
    for p in after.layout.pairs():
        b, a = after.vector[p.b].reshape(p.d_out, p.rank), after.vector[p.a].reshape(p.rank, p.d_in)
        np.testing.assert_allclose(b.T @ b, a @ a.T, atol=1e-5)


def test_procrustes_stays_near_the_mean_factors():
    start = adapter()
    sites = of(Product(), [(i, 1) for i in range(4)], start)
    mean = apply(FedAvg(), sites, start).adapter.vector
    off = {
        g: np.linalg.norm(apply(Product(factorization=g), sites, start).adapter.vector - mean) for g in ("balanced", "procrustes")
    }
    assert off["procrustes"] < off["balanced"]


def test_fedsvd_leaves_orthonormal_rows_and_the_row_space_where_it_is():
    start = adapter()
    after = apply(FedSVD(), of(FedSVD(), [(i, 1) for i in range(4)], start), start).adapter
    for p in LAYOUT.pairs():
        a0, a = start.vector[p.a].reshape(p.rank, p.d_in), after.vector[p.a].reshape(p.rank, p.d_in).astype(float)
        np.testing.assert_allclose(a @ a.T, np.eye(p.rank), atol=1e-6)
        assert np.linalg.matrix_rank(np.concatenate([a0, a]), tol=1e-5) == p.rank


@rules("product", "product-procrustes", "fedsvd")
def test_a_module_that_has_not_moved_can_still_learn(rule):
    """B = 0 everywhere, as in the first round for a module without gradient: A must not become zero, too."""
    zero = adapter()
    start = zero.replaced(Adapter(np.zeros(LAYOUT.only("B").size, np.float32), LAYOUT.only("B")))
    after = apply(rule, [("a", start, 1), ("b", start, 1)], start).adapter
    for p in LAYOUT.pairs():
        assert not after.vector[p.b].any()
        assert np.linalg.matrix_rank(after.vector[p.a].reshape(p.rank, p.d_in)) == p.rank


def test_ranks_follow_the_energy():
    start = adapter()
    sites = [(f"s{i}", moved(start, i, scale=0.5), 1) for i in range(3)]
    ranks = [apply(Product(rank="energy", energy=e), sites, start).adapter.layout.rank for e in (0.5, 0.9, 0.9999)]
    assert ranks == sorted(ranks)
    for e, rank in zip((0.5, 0.9, 0.9999), ranks, strict=True):
        values = [np.linalg.svd(m, compute_uv=False) for m in mean_products(sites)]
        least = max(int(np.argmax(np.cumsum(v * v) >= e * np.sum(v * v))) + 1 for v in values)
        assert rank == least
    assert apply(Product(rank="r_max", max_rank=3), sites, start).adapter.layout.rank == 3


# --- robust ---------------------------------------------------------------------------------------------------------


@rules("robust-median", "robust-trimmed", "robust-krum", "robust-clip")
def test_one_liar_of_seven_moves_a_robust_rule_little(rule):
    start = adapter()
    honest = [(f"s{i}", moved(start, i, scale=1e-2), 1) for i in range(6)]
    liar = ("z", Adapter(start.vector + np.float32(20), LAYOUT), 1)
    clean, lied = apply(rule, honest, start).adapter.vector, apply(rule, [*honest, liar], start).adapter.vector
    fedavg = apply(FedAvg(), [*honest, liar], start).adapter.vector
    assert np.linalg.norm(lied - clean) < 0.02 * np.linalg.norm(fedavg - clean)


def test_the_median_is_numpys():
    start = adapter()
    for n in (1, 2, 5, 6):
        sites = [(f"s{i}", moved(start, i), 1 + i) for i in range(n)]
        wanted = start.vector + np.median([local.vector - start.vector for _, local, _ in sites], axis=0)
        np.testing.assert_allclose(apply(Robust(statistic="median"), sites, start).adapter.vector, wanted, atol=3e-7)


def test_krum_says_how_many_updates_it_needs():
    start = adapter()
    with pytest.raises(UpdateRejected, match="needs 7 updates, 5 arrived"):
        apply(Robust(statistic="multi-krum", byzantine=2), of(FedAvg(), [(i, 1) for i in range(5)], start), start)


def test_krum_by_hand():
    """Seven points on a line, f = 2: three neighbors each, the three with the smallest sums of squares are averaged."""
    layout = Layout.of({"m.lora_A.weight": (1, 1), "m.lora_B.weight": (1, 1)})
    start = Adapter(np.zeros(2, np.float32), layout)
    places = [0.0, 1.0, 2.0, 3.0, 10.0, 30.0, -30.0]
    sites = [(f"s{i}", Adapter(np.array([x, 0], np.float32), layout), 1) for i, x in enumerate(places)]
    # sums of squares to the 3 nearest: 14, 6, 6, 14, 177, ..; n - f - 2 = 3 are kept: 1, 2 and, by name, 0
    assert apply(Robust(statistic="multi-krum", byzantine=2), sites, start).adapter.vector.tolist() == [1.0, 0.0]


def test_the_clipping_bound_is_the_running_median_of_the_norms():
    start, rule = adapter(), Robust(statistic="clip")
    unit = np.zeros(LAYOUT.size, np.float32)
    unit[0] = 1

    def one_round(norms, state):
        sums = rule.start(start, cohort=8, round=1)
        for i, n in enumerate(norms):
            sums.add(f"s{i}", Update(unit * np.float32(n), 1, {}))
        return rule.finish(sums, start, scale=1.0, round=1, state=state)

    first = one_round([1, 2, 9], {})
    assert first.record["robust/bound"] == 2
    assert first.delta.vector[0] == pytest.approx((1 + 2 + 2) / 3)
    second = one_round([4, 4, 4], first.state)
    assert second.record["robust/bound"] == 4  # of 1, 2, 9, 4, 4, 4
    assert one_round([8, 8, 8], first.state).record["robust/bound"] == 8


# --- server optimizers ------------------------------------------------------------------------------------------------


def walk(optimizer, moves, layout=LAYOUT):
    state, out = {}, []
    for move in moves:
        step, state = optimizer.step(Adapter(move, layout), state)
        out.append(step.vector)
    return out, state


MOVES = [np.random.default_rng(i).normal(scale=1e-3, size=LAYOUT.size).astype(np.float32) for i in range(4)]


@given(st.lists(st.lists(st.floats(-64, 64, width=32), min_size=26, max_size=26), min_size=1, max_size=3))
@settings(max_examples=60, deadline=None)
def test_nesterov_with_rate_one_and_no_momentum_is_fedavg_bit_for_bit(rows):
    moves = [np.resize(np.array(r, np.float32), LAYOUT.size) for r in rows]
    for name in ("nesterov", "fedavgm", "sgd", "none"):
        steps, _ = walk(ServerOptimizer(name, learning_rate=1.0, momentum=0.0), moves)
        assert [s.tobytes() for s in steps] == [m.tobytes() for m in moves]


@pytest.mark.torch
@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_is_that_of_torch(nesterov):
    import torch

    p = torch.zeros(LAYOUT.size, dtype=torch.float64, requires_grad=True)
    peer = torch.optim.SGD([p], lr=0.7, momentum=0.9, nesterov=nesterov)
    optimizer = ServerOptimizer("nesterov" if nesterov else "fedavgm", learning_rate=0.7, momentum=0.9)
    steps, _ = walk(optimizer, MOVES)
    for move, step in zip(MOVES, steps, strict=True):
        before = p.detach().clone()
        p.grad = -torch.from_numpy(move.astype(np.float64))
        peer.step()
        np.testing.assert_allclose(step, (p.detach() - before).numpy(), rtol=1e-5, atol=1e-9)


def test_fedadam_by_hand():
    optimizer = ServerOptimizer("fedadam", learning_rate=1e-2, beta1=0.9, beta2=0.99, tau=1e-3)
    m, v = 0.0, 1e-6
    for move, step in zip(MOVES, walk(optimizer, MOVES)[0], strict=True):
        m, v = 0.9 * m + 0.1 * move.astype(float), 0.99 * v + 0.01 * move.astype(float) ** 2
        np.testing.assert_allclose(step, 1e-2 * m / (np.sqrt(v) + 1e-3), rtol=1e-5)


def test_a_factor_that_rests_keeps_its_momentum():
    optimizer = ServerOptimizer("fedavgm", learning_rate=1.0, momentum=0.5)
    a, b = (Adapter(np.ones(LAYOUT.only(f).size, np.float32), LAYOUT.only(f)) for f in "AB")
    _, state = optimizer.step(b, {})
    _, state = optimizer.step(a, state)
    step, state = optimizer.step(b, state)
    assert np.all(step.vector == 1.5)
    assert set(state) == {"velocity.A", "velocity.B"}


# --- sums -----------------------------------------------------------------------------------------------------------


def deltas(n: int, seed: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).normal(scale=1e-3, size=(n, LAYOUT.size)).astype(np.float32))


updates = population.map(lambda rows: [(f"s{i}", Update(deltas(1, seed)[0], w, {})) for i, (seed, w) in enumerate(rows)])


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


def test_no_mean_of_several_sites_passes_for_one_update():
    each = Each(LAYOUT, 8, 8)
    with pytest.raises(UpdateRejected):
        each.add("*", Update(deltas(1, 0)[0], 1, {}))


@given(updates)
@settings(max_examples=40, deadline=None)
def test_the_certificate_bounds_the_true_gap(ups):
    """Against dense float64 products: |mean of B_i A_i - mean B times mean A| <= gap/bound, per run over all pairs."""
    start, rule = adapter(), FedAvg()
    sums = rule.start(start, cohort=8, round=1)
    for site, u in ups:
        sums.add(site, u)
    found = rule.finish(sums, start, scale=SCALE, round=1, state={})
    total, exact = sum(u.weight for _, u in ups), start.vector.astype(np.float64)

    def dense(v):
        return [SCALE * v[p.b].reshape(p.d_out, p.rank) @ v[p.a].reshape(p.rank, p.d_in) for p in LAYOUT.pairs()]

    locals_ = [(u.weight / total, dense(exact + u.delta)) for _, u in ups]
    mean = exact + sum(u.weight / total * u.delta.astype(np.float64) for _, u in ups)
    true = [sum(p * d[i] for p, d in locals_) - m for i, m in enumerate(dense(mean))]
    norm = np.sqrt(sum(np.sum(g * g) for g in true))
    assert norm <= found.record["gap/bound"] * (1 + 1e-6) + 1e-9
    change = [m - b for m, b in zip(dense(mean), dense(exact), strict=True)]
    assert found.record["gap/update"] == pytest.approx(np.sqrt(sum(np.sum(c * c) for c in change)), rel=3e-6, abs=1e-9)


def test_the_certificate_is_not_vacuous():
    """Two sites whose displacements are opposite reach their bound."""
    start = adapter()
    d = moved(start, 3)
    other = Adapter(2 * start.vector - d.vector, LAYOUT)
    record = apply(FedAvg(), [("a", d, 1), ("b", other, 1)], start).record
    assert record["gap/bound"] > 0
    assert record["drift"] >= 1


def test_product_norm_needs_no_product():
    x, y = np.random.default_rng(0).normal(size=(2, 7, 7))
    assert product_norm(x[:, :3], y[:3]) == pytest.approx(np.linalg.norm(x[:, :3] @ y[:3]))


def test_fedavg_weights_sum_to_one():
    d = np.ones(LAYOUT.size, np.float32)
    sums = Sums.start(LAYOUT, cohort=4, max_weight=100)
    for site, w in zip("abcd", itertools.count(1), strict=False):
        sums.add(site, Update(d, w, {}))
    assert np.all(sums.mean() == 1)


def test_gap_of_nothing_is_zero():
    sums = Sums.start(LAYOUT, cohort=2, max_weight=2)
    sums.add("a", Update(np.zeros(LAYOUT.size, np.float32), 1, {}))
    assert gap(sums, sums.mean(), adapter(), scale=1.0)["gap/ratio"] == 0


# --- memory -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_product_never_takes_the_space_of_the_dense_matrix():
    """d = k = 4096, 16 sites of rank 16: the dense mean alone has 134 MB in float64, 67 MB in float32."""
    layout = Layout.of({"m.lora_A.weight": (16, 4096), "m.lora_B.weight": (4096, 16)})
    start, rule = adapter(0, layout), Product()
    sums = rule.start(start, cohort=16, round=1)
    for i in range(16):
        local = moved(start, i)
        sums.add(f"s{i}", Update(rule.encode(start, local, round=1), 1, {}))
    tracemalloc.start()
    try:
        rule.finish(sums, start, scale=1.0, round=1, state={})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < 4 * 4096 * 4096 - (4 << 20)
