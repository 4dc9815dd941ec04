"""Differential privacy, as JSON lines: `python simulations/bench.py privacy`. Noise and levels of an adapter, what a charge costs
on this disk, and how long the noise multiplier of a plan takes to find."""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path

import numpy as np
from bench import median_s, row

from fedlora.formats.keys import Identity
from fedlora.formats.state.budget import Event
from fedlora.privacy.account import accountant, calibrate, epsilon
from fedlora.privacy.coding import encode, failure
from fedlora.privacy.draws import gaussian, poisson
from fedlora.privacy.ledger import Budget, PrivacyLedger, Release
from fedlora.privacy.terms import PrivacyTerms
from fedlora.protect.secagg.protocol.rings import PROFILES

VALUES = 2_442_240
"""Of the demo's adapter."""
PLANS = {"64 of 1000, 100 rounds": (0.064, 100, 1e-4), "15 %, 60 rounds": (0.15, 60, 1e-3), "20 %, 50 rounds": (0.2, 50, 3.3e-4)}
"""Sampling rate, releases, delta."""


def terms(noise_multiplier: float = 0.84, rate: float = 0.15, delta: float = 1e-4) -> PrivacyTerms:
    return PrivacyTerms(
        mechanism="distributed", unit="group", clip_norm=0.3, noise_multiplier=noise_multiplier, sampling_rate=rate, delta=delta,
        expected_units=66.0, threshold=7, colluders=1,
    )  # fmt: skip


def main() -> None:
    bench_noise()
    for lines in (0, 1000):
        bench_ledger(lines)
    bench_calibration()


def bench_noise() -> None:
    """Beside numpy's generator, which is not made to keep secrets. MB are of float64 values."""
    secret, megabytes = os.urandom(32), 8 * VALUES / 1e6
    total = np.random.default_rng(0).normal(0, terms().clip_to / VALUES**0.5, VALUES).astype(np.float32)
    noise = median_s(partial(gaussian, secret, VALUES, step=0))
    levels = median_s(partial(encode, total, terms(), levels=PROFILES["int8"].levels, secret=secret, step=0))
    plain = median_s(partial(np.random.default_rng(0).standard_normal, VALUES))
    units = median_s(partial(poisson, secret, 1_000_000, 0.15, step=0))
    row("privacy/noise", values=VALUES, site_std=terms().site_std, noise_mb_s=megabytes / noise, levels_mb_s=megabytes / levels,
        numpy_mb_s=megabytes / plain, draw_million_units_s=units)  # fmt: skip


def bench_ledger(lines: int) -> None:
    """A plan's life beside so many charges of earlier ones; the first charge after a start computes epsilon."""
    identity, run, budget = Identity.generate("bench"), "1" * 64, Budget(1e6, honest_others=True)
    event = terms(8.0, rate=1.0).event(1, failure=failure(VALUES, sites=10, epsilon=8.0))
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as home:
        ledger = PrivacyLedger(Path(home), "bench", identity, os.urandom, time.time, "bench")
        ledger.begin(delta=1e-4, units=1000)
        for exchange in range(lines):
            ledger.charge(Release("2" * 64, exchange, "0" * 64, event), budget=budget, repeatable=True)
        ledger.forget("2" * 64, through=lines)
        ledger.reserve(run, [event.model_copy(update={"count": 60})], budget=budget)
        seconds, again = list[float](), list[float]()
        for exchange in range(20):
            release = Release(run, exchange, "0" * 64, event)
            for times in (seconds, again):
                began = time.perf_counter()
                ledger.charge(release, budget=budget, repeatable=True)
                times.append(time.perf_counter() - began)
            ledger.forget(run, through=exchange)
        head = ledger.head()
        check = median_s(partial(ledger.check_head, head))
        ledger.close(run)
        found = ledger.accept_loss(echoed="f" * 64, delta=1e-4, units=1000)
        row("privacy/ledger", lines_before=lines, charge_ms=1e3 * statistics.median(seconds),
            repeat_ms=1e3 * statistics.median(again), check_head_ms=1e3 * check, charges=found.charges,
            epsilon=found.committed(honest_others=True), alone=found.spent(honest_others=False))  # fmt: skip


def bench_calibration() -> None:
    """By privacy loss distributions with the extra ``dp``, else by the closed form."""
    for name, (rate, releases, delta) in PLANS.items():
        for most in (1.0, 3.0, 8.0):
            lost = failure(VALUES, sites=10, epsilon=most)

            def make(z: float, rate: float = rate, releases: int = releases, lost: float = lost) -> list[Event]:
                return [terms(z, rate).event(releases, failure=lost)]

            began = time.perf_counter()
            found = calibrate(make, epsilon_most=most, delta=delta)
            took = time.perf_counter() - began
            began = time.perf_counter()
            epsilon([terms(found * 1.01, rate).event(releases, failure=lost)], delta=delta)
            row("privacy/calibration", plan=name, epsilon=most, delta=delta, noise_multiplier=found, calibrate_s=took,
                check_s=time.perf_counter() - began, accountant=accountant())  # fmt: skip
