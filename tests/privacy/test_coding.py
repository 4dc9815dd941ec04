"""Noise first, rounding last: the right variance, exact rounding, and no more told than by the Gaussian that is accounted for."""

from __future__ import annotations

import hashlib
import math
from decimal import ROUND_HALF_EVEN, Decimal
from itertools import pairwise

import numpy as np
import pytest

from fedlora.privacy import coding
from fedlora.privacy.account import gaussian_delta
from fedlora.privacy.coding import aliasing, encode, failure
from fedlora.privacy.draws import digits, gaussian, normals
from fedlora.privacy.terms import NOISE_LEVELS, PrivacyTerms
from fedlora.protect.secagg.protocol.rings import PROFILES

SECRET = hashlib.sha256(b"a test's secret").digest()
LEVELS = PROFILES["int8"].levels


def terms(**more):
    facts = {"mechanism": "distributed", "unit": "group", "clip_norm": 0.3, "noise_multiplier": 0.84, "sampling_rate": 0.15,
             "delta": 1e-4, "expected_units": 66.0, "threshold": 7, "colluders": 1}  # fmt: skip
    return PrivacyTerms(**{**facts, **more})


# --- terms --------------------------------------------------------------------------------------------------------------


def test_7_a_sites_variance_is_its_part_and_every_sum_that_may_be_opened_has_enough_noise():
    for n in range(3, 33):
        for t in range(2, n + 1):
            for c in range(t):
                one = terms(threshold=t, colluders=c)
                whole = (one.noise_multiplier * one.clip_norm) ** 2
                assert one.site_std**2 == pytest.approx(whole / (t - c), rel=1e-6)
                for there in range(t, n + 1):  # of which c add nothing
                    assert (there - c) * one.site_std**2 >= whole


def test_a_level_is_a_float32_and_an_eighth_of_a_sites_noise():
    one = terms()
    assert np.float32(one.level) == one.level == one.site_std / 8
    assert one.clip_to < one.clip_norm
    assert terms(mechanism="local", threshold=1, colluders=0).site_std == pytest.approx(0.84 * 0.3, rel=1e-6)


@pytest.mark.parametrize(
    "wrong",
    [{"colluders": 7}, {"colluders": -1}, {"clip_norm": 0.0}, {"noise_multiplier": math.nan}, {"sampling_rate": 1.5},
     {"delta": 1.0}, {"expected_units": math.inf}, {"mechanism": "local"}],
    ids=str,
)  # fmt: skip
def test_terms_without_a_meaning_are_refused(wrong):
    with pytest.raises(ValueError, match=r"noise|within"):
        terms(**wrong)


# --- a site's levels ----------------------------------------------------------------------------------------------------


def test_7_what_leaves_has_the_variance_of_the_plan_and_follows_the_secret():
    total = np.zeros(400_000, np.float32)
    out = encode(total, terms(), levels=LEVELS, secret=SECRET, step=0)
    assert out.std() * terms().level == pytest.approx(0.84 * 0.3 / math.sqrt(6), rel=0.01)
    assert np.array_equal(out, encode(total, terms(), levels=LEVELS, secret=SECRET, step=0))
    for more in ({"secret": bytes(32), "step": 0}, {"secret": SECRET, "step": 1}):
        assert np.mean(out == encode(total, terms(), levels=LEVELS, **more)) < 0.05


def test_every_value_is_rounded_as_exact_arithmetic_does(monkeypatch):
    rng = np.random.default_rng(0)
    total = rng.normal(0, 0.05, 300).astype(np.float32)
    fast = encode(total, terms(), levels=LEVELS, secret=SECRET, step=0)
    monkeypatch.setattr(coding, "_MARGIN", 2.0)
    assert np.array_equal(fast, encode(total, terms(), levels=LEVELS, secret=SECRET, step=0))


def test_levels_do_not_depend_on_how_a_machine_rounds_logarithm_and_cosine(monkeypatch):
    total = np.random.default_rng(0).normal(0, 0.05, 200_000)
    here = encode(total, terms(), levels=LEVELS, secret=SECRET, step=0)

    def elsewhere(*args, **more):
        for at, values, rare in normals(*args, **more):
            yield at, values * (1 + np.random.default_rng(at).integers(-8, 9, values.size) * 2.0**-52), rare

    monkeypatch.setattr(coding, "normals", elsewhere)
    assert np.array_equal(here, encode(total, terms(), levels=LEVELS, secret=SECRET, step=0))


def test_a_value_in_the_middle_between_two_levels_is_decided_exactly():
    """Sums that an adversary has chosen so that the last bits of a float64 would decide."""
    noise = gaussian(SECRET, 300, step=0)
    total = (0.5 - 8 * noise + np.arange(300) % 3) * terms().level
    total = total[np.abs(total) < 39 * terms().level]
    out = encode(total, terms(), levels=LEVELS, secret=SECRET, step=0)
    right = [
        int((Decimal(float(x)) + 8 * digits(SECRET, i, step=0)).to_integral_value(ROUND_HALF_EVEN))
        for i, x in enumerate(total / terms().level)
    ]
    assert out.tolist() == right


def test_what_is_not_finite_counts_nothing_and_what_is_too_large_is_cut_before_the_noise():
    total = np.zeros(6000)
    total[:3] = math.nan, math.inf, -math.inf
    quiet = encode(np.zeros(6000), terms(), levels=LEVELS, secret=SECRET, step=0)
    assert np.array_equal(encode(total, terms(), levels=LEVELS, secret=SECRET, step=0), quiet)
    loud = encode(np.full(6000, 1e30), terms(), levels=LEVELS, secret=SECRET, step=0)
    assert np.abs(loud - quiet - (LEVELS - 88)).max() == 0
    with pytest.raises(ValueError, match="too few"):
        encode(total, terms(), levels=PROFILES["int4"].levels, secret=SECRET, step=0)


def test_the_opened_sum_is_the_sum_of_levels_in_every_ring_that_holds_the_noise():
    for name in ("int8", "int12", "int16", "int24"):
        profile = PROFILES[name]
        parts = [
            encode(np.full(50, 1e30), terms(), levels=profile.levels, secret=hashlib.sha256(bytes([s])).digest(), step=0)
            for s in range(256)
        ]
        whole = sum(part.astype(np.int64) for part in parts)
        ring = sum(part.astype(np.uint64) for part in parts) & np.uint64((1 << profile.bits) - 1)
        half = 1 << (profile.bits - 1)
        assert np.array_equal((ring.astype(np.int64) + half) % (2 * half) - half, whole), name


# --- the sum of sites ---------------------------------------------------------------------------------------------------


def rounded(at, std):
    """Probabilities of ``rint(N(at, std^2))`` and the first of its values."""
    low = math.floor(at - 13 * std)
    edges = [math.erfc((at - (low + i - 0.5)) / std / math.sqrt(2)) / 2 for i in range(int(26 * std) + 3)]
    return np.array([b - a for a, b in pairwise(edges)]), low


def summed(offsets, std):
    """The same of the sum over sites."""
    out, low = np.ones(1), 0
    for at in offsets:
        p, first = rounded(at, std)
        out, low = np.convolve(out, p), low + first
    return out, low


def curve(p, q, epsilon):
    (a, low_a), (b, low_b) = p, q
    low, high = min(low_a, low_b), max(low_a + a.size, low_b + b.size)
    a, b = (np.pad(x, (at - low, high - at - x.size)) for x, at in ((a, low_a), (b, low_b)))
    return max(np.maximum(x - math.exp(epsilon) * y, 0).sum() for x, y in ((a, b), (b, a)))


@pytest.mark.parametrize("sites", [1, 2, 3, 10])
@pytest.mark.parametrize("std", [2, 8])
def test_8_the_rounded_sum_tells_no_more_than_the_gaussian_that_is_accounted_for(sites, std):
    rng = np.random.default_rng(sites)
    for offsets in [np.zeros(sites), np.full(sites, 0.5), *rng.uniform(-0.5, 0.5, (6, sites))]:
        for shift in (0.5, 1.0, 4.0, 3.3 * std):  # what one unit changes at one site, in levels
            other = offsets + shift * (np.arange(sites) == 0)
            mu = shift / (std * math.sqrt(sites))
            for epsilon in (0.0, 0.5, 1.0, 2.0, 4.0):
                found = curve(summed(offsets, std), summed(other, std), epsilon)
                assert found <= gaussian_delta(mu, epsilon) + 1e-12


@pytest.mark.parametrize("sites", [2, 3, 4, 10])
def test_8_aliasing_is_within_its_bound(sites):
    """How far the sum of rounded values is from a rounded sum: the convolution of the one, Fourier's integral of the other."""
    rng = np.random.default_rng(1)
    for offsets in [np.full(sites, 0.25), *rng.uniform(-0.5, 0.5, (3, sites))]:
        p, low = summed(offsets, 1.0)
        w = np.linspace(-40, 40, 80_001)
        transform = np.exp(-sites * w**2 / 2) * np.sinc(w / 2 / np.pi) ** sites
        k = np.arange(low, low + p.size)
        q = np.array([np.sum(transform * np.cos(w * (x - offsets.sum()))) for x in k]) * (w[1] - w[0]) / (2 * np.pi)
        assert np.abs(p - q).sum() / 2 <= aliasing(sites, std=1.0)
    assert aliasing(1, std=8) == 0
    assert aliasing(256, std=8) < 1e-260


def test_what_is_computed_costs_delta_nearly_nothing_and_for_both_neighbors():
    assert failure(42_000_000, sites=256, epsilon=8.0) * 1000 < 1e-8
    assert failure(1000, sites=10, epsilon=8.0) == pytest.approx(failure(1000, sites=10, epsilon=0.0) * (1 + math.exp(8)) / 2)
    assert failure(1000, sites=10, epsilon=1e9) == 1.0


@pytest.mark.parametrize("sites", [2, 3, 10, 256])
def test_every_site_of_a_sum_that_may_cut_its_noise_costs_delta(sites):
    """Of sums as large as they may be, which leave the noise no more room than is kept free for it."""
    cut = math.erfc(coding.ROOM / NOISE_LEVELS / math.sqrt(2))
    some = -math.expm1(sites * math.log1p(-cut))  # that at least one of them cuts
    assert 2 * some <= failure(1, sites=sites, epsilon=0.0) < 2.1 * some
