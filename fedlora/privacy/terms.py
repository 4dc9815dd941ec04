"""What the privacy of a plan means as numbers. They follow from plan and session, never from rows: all of them are public."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final, Self

import numpy as np

from fedlora.core.plan import Plan
from fedlora.core.tables.privacy import Mechanism, Unit
from fedlora.formats.state.budget import Event

NOISE_LEVELS: Final = 8
"""Standard deviation of a site's noise, in levels: so fine that the sum of rounded values is a rounded sum (FORMAT.md, 15.4)."""
SLACK: Final = 1.001
"""By how much computed norms may be wrong: kernels give a document other last bits beside other neighbors."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivacyTerms:
    """The Gaussian mechanism of a plan: ``sum of clipped units + N(0, (z C)^2)``, with units drawn by chance.

    Source: Abadi et al., Deep Learning with Differential Privacy, 2016; shared noise: Dwork et al., Our Data, Ourselves, 2006.

    Args:
        mechanism: ``local``: this site adds all of the noise. ``distributed``: each site adds a part.
        unit: whose presence is hidden.
        clip_norm: C, Euclidean norm of what one unit adds, over all factors together; no unit.
        noise_multiplier: z, standard deviation of the noise in what others see, over C.
        sampling_rate: q, probability that a unit is drawn in a step.
        delta: of the claimed epsilon.
        expected_units: units that a step of one site draws on average; public. A sum is divided by it, and by its sites.
        threshold: t, fewest sites of a sum that may be opened; 1 if ``local``.
        colluders: c, sites that may tell their noise to others; 0 if ``local``.

    Raises:
        ValueError: a number beyond its range, or no honest site is left.
    """

    mechanism: Mechanism
    unit: Unit
    clip_norm: float
    noise_multiplier: float
    sampling_rate: float
    delta: float
    expected_units: float
    threshold: int = 1
    colluders: int = 0

    def __post_init__(self) -> None:
        positive = (self.clip_norm, self.noise_multiplier, self.sampling_rate, self.delta, self.expected_units)
        if not all(math.isfinite(x) and x > 0 for x in positive) or self.sampling_rate > 1 or self.delta >= 1:
            raise ValueError("clip norm, noise multiplier and expected units are > 0, sampling rate and delta within (0, 1)")
        if self.honest_sites < 1 or self.colluders < 0:
            raise ValueError(f"of {self.threshold} sites {self.colluders} may collude: no site's noise can be counted on")
        if self.mechanism == "local" and (self.threshold, self.colluders) != (1, 0):
            raise ValueError("a site with the mechanism 'local' counts on nobody's noise but its own")

    @classmethod
    def of(cls, plan: Plan, *, noise_multiplier: float | None = None) -> Self:
        """The terms of a plan with [privacy].

        Under ``distributed`` t is ``federation.min_sites``: no site agrees to a sum over fewer, however many sites a session has,
        and how many it will have is not known when the noise is added.

        Args:
            noise_multiplier: in place of the plan's, which may not be known yet.

        Raises:
            ValueError: no [privacy], or as for any terms.
        """
        private = plan.privacy
        if private is None:
            raise ValueError("a plan without [privacy]")
        shared = private.mechanism == "distributed"
        z = private.noise_multiplier if noise_multiplier is None else noise_multiplier
        return cls(
            mechanism=private.mechanism, unit=private.unit, clip_norm=private.clip_norm, noise_multiplier=z,
            sampling_rate=private.sampling_rate, delta=private.delta, expected_units=private.expected_units,
            threshold=plan.federation.min_sites if shared else 1,
            colluders=plan.protect.settings.max_colluding if shared else 0,  # type: ignore[attr-defined]
        )  # fmt: skip

    @property
    def honest_sites(self) -> int:
        """t - c: sites of whose noise at least so many is in every sum that is opened."""
        return self.threshold - self.colluders

    @property
    def clip_to(self) -> float:
        """The norm to which training clips a unit: below C, so that rounding in kernels does not exceed C."""
        return self.clip_norm / SLACK

    @property
    def level(self) -> float:
        """gamma, value of one level: the smallest float32 with ``8 gamma >= z C / sqrt(t - c)``."""
        least = self.noise_multiplier * self.clip_norm / (NOISE_LEVELS * math.sqrt(self.honest_sites))
        near = np.float32(least)
        return float(near) if float(near) >= least else float(np.nextafter(near, np.float32(np.inf)))

    @property
    def site_std(self) -> float:
        """s, standard deviation of one site's noise: z C / sqrt(t - c), at most 2^-23 of it more."""
        return NOISE_LEVELS * self.level

    def event(self, releases: int, *, failure: float) -> Event:
        """What so many steps are in a privacy ledger.

        Args:
            failure: :func:`fedlora.privacy.coding.failure` of one of them.
        """
        return Event(
            mechanism=self.mechanism, unit=self.unit, noise_multiplier=self.noise_multiplier, sampling_rate=self.sampling_rate,
            honest_sites=self.honest_sites, failure=failure, count=releases,
        )  # fmt: skip
