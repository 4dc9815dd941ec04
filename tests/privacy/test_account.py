"""The accountant: the table of published and independent values, the closed form, and laws."""

from __future__ import annotations

import math
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.formats.state.budget import Event
from fedlora.privacy import account
from fedlora.privacy.account import accountant, calibrate, epsilon, gaussian_delta, gaussian_epsilon, merged


def event(z, q=1.0, count=1, *, honest=1, failure=0.0):
    return Event(mechanism="distributed", unit="group", noise_multiplier=z, sampling_rate=q,
                 honest_sites=honest, failure=failure, count=count)  # fmt: skip


def pld():
    pytest.importorskip("dp_accounting", reason="needs the extra dp")


CLOSED = [
    ((2.0, 10, 1e-5), 7.5113),
    ((0.3, 1, 1e-5), 19.1308),
    ((0.5, 1, 1e-5), 9.9973),
    ((5.0, 1, 1e-5), 0.72552),
]
"""Without sampling: noise multiplier, releases, delta -> epsilon."""
TABLE = [
    ((2.0, 1.0, 10, 1e-5), 7.5113, 7.461, 8.079),
    ((0.8, 0.064, 200, 1e-4), 8.364, 8.314, 9.62),
    ((1.0, 0.064, 100, 1e-4), 3.718, 3.668, 4.331),
    ((0.7, 0.0032, 500, 1e-5), 1.471, 1.421, 2.306),
]
"""Noise multiplier, rate, releases, delta -> epsilon by PLD; lower bound of prv-accountant 0.2.0; upper bound by RDP."""


@pytest.mark.parametrize(("at", "right"), CLOSED)
def test_12_without_sampling_epsilon_is_that_of_the_closed_form(at, right):
    z, count, delta = at
    assert gaussian_epsilon(math.sqrt(count) / z, delta) == pytest.approx(right, rel=1e-5)
    assert epsilon([event(z, 1.0, count)], delta=delta) == pytest.approx(right, rel=1e-4)


@pytest.mark.parametrize(("at", "right", "below", "above"), TABLE)
def test_12_epsilon_is_that_of_independent_accountants(at, right, below, above):
    pld()
    z, q, count, delta = at
    found = epsilon([event(z, q, count)], delta=delta)
    assert found == pytest.approx(right, abs=6e-4)
    assert below <= found <= above


SPREAD = [
    *(at for at, *_ in TABLE[1:]),
    (1.46, 0.15, 60, 1e-3),
    (0.84, 0.15, 60, 1e-3),
    (3.2, 0.5, 40, 1e-5),
    (0.6, 0.01, 1000, 1e-6),
]


@pytest.mark.slow
@pytest.mark.parametrize(("z", "q", "count", "delta"), SPREAD)
def test_12_epsilon_lies_within_the_bounds_of_prv_accountant(z, q, count, delta):
    """Gopi, Lee, Wutschitz, Numerical Composition of Differential Privacy, 2021: their program, by Fourier transforms."""
    pld()
    prv = pytest.importorskip("prv_accountant")
    one = prv.PoissonSubsampledGaussianMechanism(noise_multiplier=z, sampling_probability=q)
    theirs = prv.PRVAccountant(prvs=[one], max_self_compositions=[count], eps_error=0.02, delta_error=delta / 1e4)
    low, _, high = theirs.compute_epsilon(delta=delta, num_self_compositions=[count])
    assert low <= epsilon([event(z, q, count)], delta=delta) <= high


@pytest.mark.torch
@pytest.mark.parametrize(("z", "q", "count", "delta"), SPREAD)
def test_12_epsilon_is_at_most_that_of_opacus_and_hardly_less(z, q, count, delta):
    """Its PRV accountant answers with an upper bound, 0.01 above what it finds."""
    pld()
    opacus = pytest.importorskip("opacus.accountants")
    theirs = opacus.PRVAccountant()
    theirs.history = [(z, q, count)]
    found, theirs = epsilon([event(z, q, count)], delta=delta), theirs.get_epsilon(delta=delta)
    assert theirs - 0.03 <= found <= theirs


@pytest.mark.slow
@settings(max_examples=4, deadline=None)
@given(
    st.floats(0.8, 4), st.floats(0.01, 1), st.integers(1, 20), st.sampled_from([1e-3, 1e-5]), st.floats(1.01, 2),
)  # fmt: skip
def test_12_epsilon_falls_with_noise_grows_with_releases_and_rate_and_is_never_above_the_closed_form(z, q, count, delta, factor):
    here = epsilon([event(z, q, count)], delta=delta)
    slack = 1e-3 + 1e-3 * here  # of the grid
    assert epsilon([event(z * factor, q, count)], delta=delta) <= here + slack
    assert epsilon([event(z, q, count), event(z, q)], delta=delta) >= here - slack
    assert epsilon([event(z, min(q * factor, 1.0), count)], delta=delta) >= here - slack
    assert here <= gaussian_epsilon(math.sqrt(count) / z, delta) + 1e-9


def test_12_without_the_extra_epsilon_is_the_closed_form_and_the_report_says_so(monkeypatch):
    for name in [m for m in sys.modules if m.partition(".")[0] == "dp_accounting"] or ["dp_accounting"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    account._epsilon.cache_clear()
    account._losses.cache_clear()
    try:
        found = epsilon([event(1.0, 0.064, 100)], delta=1e-4)
    finally:
        account._epsilon.cache_clear()
        account._losses.cache_clear()
    assert found == gaussian_epsilon(10.0, 1e-4)
    monkeypatch.setattr(account, "version", lambda name: (_ for _ in ()).throw(account.PackageNotFoundError))
    assert "closed form" in accountant()


def test_the_report_names_the_accountant_and_its_version():
    pld()
    assert accountant().startswith("PLD (dp-accounting 0.")


def test_the_curve_of_a_gaussian_mechanism_at_the_ends():
    assert gaussian_delta(1.0, 0.0) == pytest.approx(math.erf(0.5 / math.sqrt(2)))  # total variation
    assert gaussian_epsilon(1e-3, 0.01) < 1e-9
    for mu in (0.1, 1.0, 5.0):
        for delta in (1e-3, 1e-8):
            found = gaussian_epsilon(mu, delta)
            assert gaussian_delta(mu, found) <= delta < gaussian_delta(mu, found * (1 - 1e-6) - 1e-9) or found < 1e-9


def test_equal_releases_are_counted_together_in_any_order():
    parts = [event(1.0, 0.1), event(2.0, 0.1), event(1.0, 0.1, 4), event(1.0, 0.2)]
    assert merged(parts) == merged(parts[::-1])
    assert sorted(one.count for one in merged(parts)) == [1, 1, 5]
    assert epsilon(parts, delta=1e-4) == epsilon(merged(parts), delta=1e-4)


def test_runs_compose_jointly_and_not_by_adding():
    pld()
    one, two = event(1.0, 0.064, 100), event(1.5, 0.064, 100)
    both = epsilon([one, two], delta=1e-4)
    assert max(epsilon([x], delta=1e-4) for x in (one, two)) < both < sum(epsilon([x], delta=5e-5) for x in (one, two))


def test_what_is_computed_is_taken_from_delta():
    plain = epsilon([event(2.0, 1.0, 10)], delta=1e-5)
    assert epsilon([event(2.0, 1.0, 10, failure=5e-7)], delta=1e-5) == pytest.approx(
        gaussian_epsilon(math.sqrt(10) / 2, 5e-6), rel=1e-4
    )
    assert epsilon([event(2.0, 1.0, 10, failure=1.01e-6)], delta=1e-5) == math.inf
    assert epsilon([], delta=1e-5) == 0.0 < plain


def test_a_site_that_counts_on_nobody_has_the_noise_that_it_adds():
    shared = event(2.0, 1.0, 10, honest=4)
    assert epsilon([shared], delta=1e-5, honest_others=False) == epsilon([event(1.0, 1.0, 10)], delta=1e-5)


def test_noise_so_small_that_nothing_is_hidden_gives_a_large_number_at_once():
    assert epsilon([event(0.01, 0.1, 1000)], delta=1e-5) > 1e6


@pytest.mark.parametrize(
    ("rate", "count", "delta", "most", "right"),
    [(1.0, 10, 1e-5, 3.0, 4.398), (0.15, 60, 1e-3, 3.0, 1.454), (0.2, 50, 3.3e-4, 1.0, 4.258)],
)
def test_12_calibration_finds_the_least_noise_to_four_digits(rate, count, delta, most, right):
    if rate < 1:
        pld()

    def make(z):
        return [event(z, rate, count)]

    found = calibrate(make, epsilon_most=most, delta=delta)
    assert found == pytest.approx(right, abs=1e-9)
    assert epsilon(make(found), delta=delta) <= most < epsilon(make(found - 0.001), delta=delta)


def test_calibration_beside_other_plans_and_where_no_noise_is_enough():
    before = event(2.0, 1.0, 10)
    found = calibrate(lambda z: [before, event(z, 1.0, 10)], epsilon_most=8.0, delta=1e-5)
    assert 4 < found < 20
    with pytest.raises(ValueError, match="no noise"):
        calibrate(lambda z: [before, event(z, 1.0, 10)], epsilon_most=7.0, delta=1e-5)
    with pytest.raises(ValueError, match="no noise"):
        calibrate(lambda z: [event(z, 1.0, 10, failure=1e-5)], epsilon_most=8.0, delta=1e-5)
