"""The plan's table [protect.secagg]."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from fedlora.core.plan import Plan
from fedlora.core.section import Section


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


def measure(plan: Plan) -> dict[str, Any]:
    """The settings by which a site's update becomes a summand, by the plan's keys: weight, levels, clipping.

    Two sums over the same updates with different settings are two equations for them; so a site uses one measure per base model.
    """
    s, a = settings_of(plan), plan.aggregate
    return {
        "aggregate.weighting": a.weighting,
        "aggregate.max_weight": a.max_weight,
        "protect.secagg.weight_unit": s.weight_unit,
        "protect.secagg.profile": s.profile,
        "protect.secagg.first_range": repr(float(first_range(plan))),
    }
