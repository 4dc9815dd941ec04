"""Statistics of the leakage audit against oracles that share no code with them: exact sums, brute force, simulated mechanisms."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pytest
from test_house import ROOT, impure

from fedlora.privacy.audit import (
    chance_exposure,
    count_right,
    epsilon_bound,
    exposure,
    guess,
    guesses_each_side,
    largest_bound,
    membership,
    one_run_p_value,
)


def oracle_p_value(m, r, v, epsilon, delta):
    """The distribution of right guesses by convolution, one guess at a time, and the theorem's maximum by its definition."""
    right = 1 / (1 + math.exp(-epsilon))
    law = np.array([1.0])
    for _ in range(r):
        law = np.convolve(law, [1 - right, right])
    alpha = max((sum(law[v - i : v]) / i for i in range(1, v + 1)), default=0.0)
    return min(1.0, sum(law[v:]) + 2 * m * delta * alpha)


def test_18_the_p_value_is_that_of_an_independent_computation_on_1000_random_settings():
    random = np.random.default_rng(18)
    for _ in range(1000):
        m = int(random.integers(1, 300))
        r = int(random.integers(0, m + 1))
        v = int(random.integers(0, r + 1))
        epsilon, delta = float(random.uniform(0, 8)), float(10 ** random.uniform(-9, -1))
        found = one_run_p_value(canaries=m, guesses=r, right=v, epsilon=epsilon, delta=delta)
        assert found == pytest.approx(oracle_p_value(m, r, v, epsilon, delta), rel=1e-9, abs=1e-12)


def test_18_without_delta_it_is_the_exact_binomial_tail():
    """Epsilon 0: fair coins, counted one by one."""
    for r in range(8):
        for v in range(r + 1):
            ways = sum(sum(coins) >= v for coins in product((0, 1), repeat=r))
            found = one_run_p_value(canaries=r, guesses=r, right=v, epsilon=0, delta=0)
            assert found == pytest.approx(float(Fraction(ways, 2**r)), abs=1e-12)


def test_the_p_value_rises_with_epsilon_and_falls_with_right_guesses():
    grid = [one_run_p_value(canaries=256, guesses=64, right=50, epsilon=e, delta=1e-5) for e in np.linspace(0, 8, 60)]
    assert all(a <= b + 1e-12 for a, b in pairwise(grid))
    by_right = [one_run_p_value(canaries=256, guesses=64, right=v, epsilon=1, delta=0) for v in range(65)]
    assert all(a >= b - 1e-12 for a, b in pairwise(by_right))
    assert one_run_p_value(canaries=256, guesses=64, right=0, epsilon=1, delta=0) == pytest.approx(1)
    assert one_run_p_value(canaries=64, guesses=0, right=0, epsilon=0, delta=0) == 1


@pytest.mark.parametrize(("m", "r", "v"), [(8, 9, 1), (8, 4, 5), (8, 4, -1)])
def test_impossible_counts_are_refused(m, r, v):
    with pytest.raises(ValueError, match="guesses"):
        one_run_p_value(canaries=m, guesses=r, right=v, epsilon=1, delta=0)


def test_the_bound_is_where_the_p_value_crosses_five_percent():
    bound = epsilon_bound(canaries=256, guesses=64, right=60, delta=1e-5)
    assert one_run_p_value(canaries=256, guesses=64, right=60, epsilon=bound - 1e-6, delta=1e-5) < 0.05
    assert one_run_p_value(canaries=256, guesses=64, right=60, epsilon=bound + 1e-6, delta=1e-5) >= 0.05
    assert epsilon_bound(canaries=256, guesses=64, right=32, delta=1e-5) == 0


@pytest.mark.parametrize(("guesses", "most"), [(16, 1.6), (32, 2.3), (64, 3.0), (128, 3.7), (256, 4.4)])
def test_the_largest_bound_of_so_many_guesses(guesses, most):
    """All right and no delta: q^r = 0.05."""
    q = 0.05 ** (1 / guesses)
    assert largest_bound(canaries=guesses, guesses=guesses, delta=0) == pytest.approx(math.log(q / (1 - q)), abs=1e-9)
    assert largest_bound(canaries=guesses, guesses=guesses, delta=1e-5) == pytest.approx(most, abs=0.1)
    for right in (0, guesses // 2, guesses - 1):
        assert epsilon_bound(canaries=guesses, guesses=guesses, right=right, delta=1e-5) < largest_bound(
            canaries=guesses, guesses=guesses, delta=1e-5
        )


def test_the_figures_of_the_privacy_page():
    """server/PRIVACY.md: what audits can show at the most."""
    said = " ".join((ROOT / "server" / "PRIVACY.md").read_text().split())
    assert "With 64 canaries at each of four sites the most that it can show is 3, with two numbers of repeats 2.1" in said
    assert largest_bound(canaries=256, guesses=64, delta=1e-5) == pytest.approx(3, abs=0.05)
    assert largest_bound(canaries=128, guesses=32, delta=1e-5, confidence=0.975) == pytest.approx(2.1, abs=0.05)
    assert "the most is 6.9 at a delta of 1e-5, and 4.6 at 1e-4" in said
    for delta, most in ((1e-5, 6.9), (1e-4, 4.6)):
        found = [largest_bound(canaries=4 * r, guesses=r, delta=delta) for r in (500, 700, 900, 2000, 7000, 9000, 30_000)]
        assert most - 0.1 < max(found) <= most


def audited(mu, m, random):
    """Right guesses about m values, each of which a Gaussian mechanism releases with its coin: N(mu, 1) in, N(0, 1) out."""
    inside = random.integers(0, 2, m).astype(bool)
    scores = random.normal(size=m) + mu * inside
    return count_right(scores, inside, each_side=guesses_each_side(m))


@cache
def bound(m, right, delta):
    return epsilon_bound(canaries=m, guesses=2 * guesses_each_side(m), right=right, delta=delta)


def test_18_false_alarms_are_at_most_five_percent_of_2000_null_runs():
    """Nothing is learned: every bound above 0 is a false alarm. Beyond 5 % by more than three standard deviations: a bug."""
    random = np.random.default_rng(1)
    alarms = sum(bound(64, audited(0.0, 64, random), 1e-5) > 0 for _ in range(2000))
    assert alarms <= 0.05 * 2000 + 3 * math.sqrt(2000 * 0.05 * 0.95)
    assert alarms > 0  # the test would not see a bound that is always 0


def true_epsilon(mu, delta):
    """Of the Gaussian mechanism, closed form (Balle and Wang, 2018), by bisection."""

    def phi(x):
        return 0.5 * math.erfc(-x / math.sqrt(2))

    low, high = 0.0, 50.0
    for _ in range(200):
        middle = (low + high) / 2
        there = phi(mu / 2 - middle / mu) - math.exp(middle) * phi(-mu / 2 - middle / mu)
        low, high = (middle, high) if there > delta else (low, middle)
    return high


@pytest.mark.parametrize("mu", [0.5, 1.0, 2.0])
def test_18_the_bound_stays_below_the_truth_of_a_gaussian_mechanism(mu):
    random, delta = np.random.default_rng(int(10 * mu)), 1e-5
    bounds = [bound(256, audited(mu, 256, random), delta) for _ in range(300)]
    truth = true_epsilon(mu, delta)
    assert sum(found > truth for found in bounds) <= 0.05 * 300
    if mu == 2.0:
        assert np.median(bounds) > 1.5  # and it finds something


def test_guesses_are_the_extremes_and_ties_do_not_look_at_the_coins():
    scores = np.array([1.0, 5.0, 5.0, 2.0, 0.0, 0.0, 3.0, 4.0])
    said_in, said_out = guess(scores, each_side=1)
    assert (said_in.tolist(), said_out.tolist()) == ([1], [5])
    inside = np.array([0, 1, 0, 0, 0, 1, 0, 0], bool)
    assert count_right(scores, inside, each_side=1) == 1
    assert count_right(scores, ~inside, each_side=1) == 1
    assert count_right(scores, np.array([0, 1, 0, 0, 0, 0, 0, 0], bool), each_side=1) == 2
    with pytest.raises(ValueError, match="guesses"):
        guess(scores, each_side=5)
    with pytest.raises(ValueError, match="finite"):
        guess(np.array([math.nan, 1.0]), each_side=1)


def test_exposure_is_that_of_the_rank():
    others = np.arange(1, 1000) / 10
    assert exposure(0.0, others) == pytest.approx(math.log2(1000))
    assert exposure(1000.0, others) == 0
    assert exposure(0.2, others) == pytest.approx(math.log2(1000) - math.log2(2.5))  # one lower, one equal
    every = [exposure(rank - 0.5, range(1000 - 1)) for rank in range(1000)]
    assert np.mean(every) == pytest.approx(chance_exposure(1000), abs=0.01)
    assert chance_exposure(1000) == pytest.approx(1.44, abs=0.01)


def test_membership_by_brute_force():
    random = np.random.default_rng(3)
    for trial in range(50):
        a, b = random.integers(0, 9, 37).astype(float), random.integers(0, 9, 150).astype(float)
        if trial % 2:  # no ties: which threshold it is matters
            a, b = random.normal(1, 1, 37), random.normal(0, 1, 150)
        found = membership(a, b)
        pairs = [(x > y) + 0.5 * (x == y) for x in a for y in b]
        assert found.auc == pytest.approx(np.mean(pairs))
        for rate, tpr in ((0.01, found.tpr_1), (0.001, found.tpr_01)):
            best = max(np.mean(a > t) for t in [*b, -9.0, 10.0] if np.mean(b > t) <= rate)
            assert tpr == pytest.approx(best)
    assert membership([2.0, 3.0], [1.0]).auc == 1
    with pytest.raises(ValueError, match="finite"):
        membership([], [1.0])


def test_nothing_here_draws_from_a_generator_a_clock_or_the_system():
    assert not impure((Path(__file__).resolve().parents[2] / "fedlora" / "privacy" / "audit.py").read_text())
