"""The table of a plan that is secure aggregation's own."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from fedlora.core.plan import Plan
from fedlora.core.section import Section


class Settings(Section):
    """For mode = "secagg"."""

    profile: Literal["int4", "int8", "int12", "int16", "int24"] = "int8"
    """levels of a value; in 12, 16, 20, 24 or 32 bits on the wire. int12 or more if weights differ; int24 for audits"""
    weight_unit: Annotated[int, Field(ge=0, le=1 << 26)] = 0
    """tokens or examples that make a weight of 1; weights are whole, at most 16. 0: weighting is uniform"""
    first_range: Annotated[float, Field(ge=0, le=64)] = 0.0
    """largest change of a value that the first round expects; 0: learning_rate x local_steps. Later ones know better"""
    max_colluding: Annotated[int, Field(ge=1, le=85)] = 1
    """so many sites in league with the server learn nothing of the others; a round needs three times as many"""
    lone_change: Literal["refuse", "allow"] = "refuse"
    """refuse: no two sums of this plan from which, with max_colluding sites, one site's update follows; allow: any"""
    phase_deadline: Annotated[float, Field(gt=0, le=86400)] = 300.0
    """seconds for each step after training; the longest one sends the masked update"""


def settings_of(plan: Plan) -> Settings:
    """The table of a plan of this mode."""
    return plan.protect.own(Settings)


def first_range(plan: Plan) -> float:
    """Change of a value for which the levels stand in the first round."""
    return settings_of(plan).first_range or plan.training.learning_rate * plan.federation.local_steps
