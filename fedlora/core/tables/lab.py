"""What the commands of a researcher answer and report: rows of sites, runs side by side."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NotRequired

from pydantic import ConfigDict, with_config
from typing_extensions import TypedDict

_exact = with_config(ConfigDict(extra="forbid", strict=True, use_attribute_docstrings=True, allow_inf_nan=False))


@_exact
class SiteRows(TypedDict):
    """What a site of a simulation has."""

    site: str
    train: int
    """rows"""
    validation: int
    """rows"""
    test: int
    """rows"""
    groups: int
    """of patients, customers or equal texts, none of which stands on two sides"""
    elsewhere: NotRequired[int]
    """scored rows of groups that another site trains on"""
    labels: NotRequired[list[int]]
    """rows of each value of split_label, by the order of the values; empty where rows are dealt otherwise"""


@_exact
class Spread(TypedDict):
    """A number over the seeds."""

    mean: float | None
    sd: float | None
    """n - 1 in the denominator; null for one seed"""


@_exact
class Difference(TypedDict):
    """A number minus that of the first run, over the seeds that both have."""

    mean: float | None
    low: float | None
    """of the 95 % t-interval; null for fewer than three seeds"""
    high: float | None


@_exact
class ComparedRun(TypedDict):
    """One row of a comparison."""

    run: str
    seeds: list[int]
    scores: Mapping[str, Spread]
    """metric -> over all seeds"""
    differences: Mapping[str, Difference]
    """metric -> against the first run, seed by seed; empty for the first run, and where no seed is common"""


@_exact
class Compared(TypedDict):
    """Runs side by side."""

    arm: str
    runs: list[ComparedRun]
    about: list[str]
    """rounds, learning rates and rows that were scored, in sentences"""
    warnings: list[str]
    """what besides the method differs, in sentences"""


@_exact
class TunedRule(TypedDict):
    """At which learning rate a rule was compared."""

    learning_rate: float
    edge: bool
    """it is the first or the last of those that were tried: a better one may lie outside"""


@_exact
class ComparedRules(TypedDict):
    out: str
    """path"""
    compared: Compared
    tuned: Mapping[str, TunedRule]
    failed: Mapping[str, str]
    """run -> why; a rate may be too high for a rule"""


@_exact
class Reading(TypedDict):
    """The rows of a simulation are about to be read."""

    what: str
    """the path that the plan names, or ``toy``"""


@_exact
class Sweep(TypedDict):
    """Several simulations begin that differ in some keys."""

    runs: list[str]
    seeds: list[int]
    jobs: int
    """runs at once"""


@_exact
class SweepRun(TypedDict):
    """One of them begins or is done."""

    run: str
    number: int
    of: int
    state: str
