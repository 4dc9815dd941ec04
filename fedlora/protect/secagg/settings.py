"""The plan's table [protect.secagg]."""

from __future__ import annotations

import json
from typing import Annotated, Final, Literal

from pydantic import Field

from fedlora.core.canonical import canonical
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.core.told.changes import flat


class Settings(Section):
    """For mode = "secagg"."""

    profile: Literal["int4", "int8", "int12", "int16", "int24"] = "int8"
    """quantization of a value: 12, 16, 20, 24 or 32 bits on the wire. Use int12 or more if weights differ, int24 for audits"""
    weight_unit: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """tokens or examples that count as weight 1; weights are whole numbers of at most 16; 0: for weighting = uniform"""
    first_range: Annotated[float, Field(ge=0, le=64)] = 0.0
    """quantization range of round 1: largest expected change of a parameter; 0: learning_rate x local_steps. Later: measured"""
    max_colluding: Annotated[int, Field(ge=1, le=85)] = 1
    """up to this many sites may collude with the server and not learn another's update; a round needs three times as many"""
    lone_change: Literal["refuse", "allow"] = "refuse"
    """refuse: sums are over whole groups of the roster, so that no difference of sums shows one site; allow: no such guard"""
    phase_deadline: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """time limit of each step after training, seconds; the step that sends the masked update takes longest"""


def settings_of(plan: Plan) -> Settings:
    """The table of a plan of this mode."""
    return plan.protect.own(Settings)


def first_range(plan: Plan) -> float:
    """Largest change of a value that the levels can represent in the first round."""
    return settings_of(plan).first_range or plan.training.learning_rate * plan.federation.local_steps


SAYS_NOTHING: Final = frozenset({
    "run.name", "federation.round_deadline", "federation.round_attempts", "protect.secagg.phase_deadline",
})  # fmt: skip
"""Keys of a plan that change neither what a site computes nor what it adds to a sum: a name, and time limits."""


def measure(plan: Plan) -> dict[str, str]:
    """Everything that decides what a site adds to a sum: the plan's keys except :data:`SAYS_NOTHING`, values as canonical JSON.

    Sums with two measures are two equations for one group's updates: they may weigh the sites differently, clip elsewhere, or
    train one site differently and leave all others as they were. So a site uses one measure per base model.
    """
    keys = flat(json.loads(plan.canonical()))
    return {key: canonical(value).decode() for key, value in keys if key not in SAYS_NOTHING}
