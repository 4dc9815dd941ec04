"""What is said of a run's differential privacy, in the same words and numbers everywhere. FORMAT.md, 11.4."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from fedlora.core.records import Count, Record
from fedlora.core.tables.privacy import Mechanism, Unit


class PrivacyClaim(Record):
    """Of one unit of one site, over the whole run."""

    mechanism: Mechanism
    unit: Unit
    """whose presence is hidden: all rows of one group (patient, customer), or one row"""
    relation: str = "add or remove one unit"
    """which data sets cannot be told apart"""
    epsilon: Annotated[float, Field(gt=0)]
    """at most"""
    delta: Annotated[float, Field(gt=0, lt=1)]
    clip_norm: Annotated[float, Field(gt=0)]
    """C"""
    noise_multiplier: Annotated[float, Field(ge=0)]
    """z: standard deviation of the noise of a step over C"""
    sampling_rate: Annotated[float, Field(gt=0, le=1)]
    """q: probability with which a step draws a unit, by secret Poisson sampling"""
    releases: Count
    """T: noisy steps of one site in the whole run"""
    units_per_site: Count
    """public number by which sums were divided, times q"""
    sum_of: Annotated[int, Field(ge=1)]
    """t: fewest sites of a sum that is opened; 1: each site adds all of the noise"""
    colluding: Count
    """c: sites of it whose noise is not counted on"""
    own_epsilon: Annotated[float, Field(gt=0)] | None
    """with no noise but that of the unit's own site; null: not known yet, or no bound"""
    accountant: str
    """by what epsilon was counted, and its version"""
    claimed: bool
    """false: the federation is too small for a claim of use; see ``fedlora.privacy.claims.FEWEST_UNITS``"""
