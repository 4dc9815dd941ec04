"""Secret chance: test vectors of the cipher, what is drawn, and that the noise is normal."""

from __future__ import annotations

import hashlib
import math
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from test_house import impure

from fedlora.privacy.draws import Stream, digits, gaussian, normals, poisson

SECRET = hashlib.sha256(b"a test's secret").digest()
OTHER = hashlib.sha256(b"another").digest()


def test_blocks_are_those_of_the_standards():
    """FIPS 197, C.3, and NIST SP 800-38A, F.5.5: what is encrypted is the number and the counter."""
    block = Stream(bytes(range(32)), 0x0011223344556677).blocks(1, at=0x8899AABBCCDDEEFF)
    assert block.hex() == "8ea2b7ca516745bfeafc49904b496089"
    key = bytes.fromhex("603deb1015ca71be2b73aef0857d77811f352c073b6108d72d9810a30914dff4")
    plain, secret = (int(x, 16) for x in ("6bc1bee22e409f96e93d7e117393172a", "601ec313775789a5b7a7f504bbf3d228"))
    assert int(Stream(key, 0xF0F1F2F3F4F5F6F7).blocks(1, at=0xF8F9FAFBFCFDFEFF).hex(), 16) == plain ^ secret


def test_a_stream_can_be_read_from_any_block_and_does_not_show_its_secret():
    whole = Stream(SECRET, 7).blocks(100)
    assert Stream(SECRET, 7).blocks(10, at=42) == whole[42 * 16 : 52 * 16]
    assert SECRET.hex() not in repr(Stream(SECRET, 7))
    with pytest.raises(ValueError, match="32 bytes"):
        Stream(b"short", 0)


@pytest.mark.parametrize("name", ["terms", "draws", "coding", "account", "spending"])
def test_nothing_here_draws_from_a_generator_a_clock_or_the_system(name):
    assert not impure((Path(__file__).resolve().parents[2] / "fedlora" / "privacy" / f"{name}.py").read_text())


# --- which units --------------------------------------------------------------------------------------------------------


def drawn(units, rate, steps, secret=SECRET):
    """(steps, units), 1 where a unit is drawn."""
    table = np.zeros((steps, units))
    for step in range(steps):
        table[step, poisson(secret, units, rate, step=step)] = 1
    return table


def test_6_each_unit_is_drawn_with_the_same_probability_and_sizes_are_binomial():
    units, rate, steps = 1000, 0.064, 1000
    table = drawn(units, rate, steps)
    by_unit = table.sum(0)
    square = float(((by_unit - steps * rate) ** 2 / (steps * rate * (1 - rate))).sum())
    assert abs(square - units) < 5 * math.sqrt(2 * units)
    sizes = table.sum(1)
    edges = [0, 55, 60, 64, 68, 73, units + 1]
    pmf = [math.exp(math.lgamma(units + 1) - math.lgamma(k + 1) - math.lgamma(units - k + 1)
                    + k * math.log(rate) + (units - k) * math.log1p(-rate)) for k in range(units + 1)]  # fmt: skip
    expected = steps * np.array([sum(pmf[a:b]) for a, b in pairwise(edges)])
    assert float(((np.histogram(sizes, edges)[0] - expected) ** 2 / expected).sum()) < 20.5  # chi-square, 5 degrees: 1e-3


def test_6_steps_and_units_are_drawn_independently():
    table = drawn(1000, 0.2, 400) - 0.2
    spread = 0.16 * math.sqrt(table.size)
    assert abs((table[:-1] * table[1:]).sum()) < 5 * spread
    assert abs((table[:, :-1] * table[:, 1:]).sum()) < 5 * spread
    assert abs((drawn(1000, 0.2, 400, OTHER) - 0.2).ravel() @ table.ravel()) < 5 * spread


def test_6_the_same_secret_draws_the_same_in_another_process():
    code = f"from fedlora.privacy.draws import *; print(poisson(bytes.fromhex('{SECRET.hex()}'), 500, 0.1, step=3).tolist())"
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert other.strip() == str(poisson(SECRET, 500, 0.1, step=3).tolist())


def test_rates_at_the_ends_and_draws_of_nobody():
    assert poisson(SECRET, 77, 1.0, step=0).tolist() == [*range(77)]
    assert poisson(SECRET, 77, 1e-30, step=0).size == 0
    assert poisson(SECRET, 0, 0.5, step=0).size == 0
    for rate in (0.0, -0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match="rate"):
            poisson(SECRET, 5, rate, step=0)


# --- noise --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_7_the_noise_is_normal():
    n = 10_000_000
    x = gaussian(SECRET, n, step=0)
    root = math.sqrt(n)
    assert abs(x.mean()) < 5 / root
    assert abs(x.var() - 1) < 5 * math.sqrt(2) / root
    assert abs((x**3).mean()) < 5 * math.sqrt(15) / root
    assert abs((x**4).mean() - 3) < 5 * math.sqrt(96) / root
    for beyond in (1, 2, 3, 4, 5):
        expected = n * math.erfc(beyond / math.sqrt(2))
        assert abs(np.count_nonzero(np.abs(x) > beyond) - expected) < 5 * math.sqrt(expected) + 1, beyond
    for lag in (1, 2, 3, 16):
        assert abs(x[:-lag] @ x[lag:]) < 5 * root, lag
    assert abs(x @ gaussian(SECRET, n, step=1)) < 5 * root


def test_any_part_of_the_noise_is_the_same():
    whole = gaussian(SECRET, 100_001, step=2)
    assert np.array_equal(gaussian(SECRET, 50_001, step=2), whole[:50_001])


def test_a_value_is_that_of_exact_arithmetic_to_two_to_the_minus_26():
    x = gaussian(SECRET, 200_000, step=0)
    radius = x[0::2] ** 2 + x[1::2] ** 2
    worst = [*range(60), 2 * int(radius.argmin()), 2 * int(radius.argmin()) + 1, 2 * int(radius.argmax())]
    assert max(abs(float(digits(SECRET, i, step=0)) - x[i]) for i in worst) < 2.0**-26


def test_a_radius_that_a_word_does_not_hold_is_named(monkeypatch):
    monkeypatch.setattr("fedlora.privacy.draws._RARE", 1 << 56)  # one pair of 256
    x = gaussian(SECRET, 10_001, step=0)
    rare = np.concatenate([numbers for _, _, numbers in normals(SECRET, 10_001, step=0)])
    pairs = x[:10_000:2] ** 2 + x[1::2] ** 2
    assert set(rare.tolist()) - {10_000} == {i for p in np.flatnonzero(pairs > 16 * math.log(2)) for i in (2 * p, 2 * p + 1)}
