"""Plans for tests of training: keys without their sections."""

from __future__ import annotations

from typing import Any

from fedlora.core.plan import Evaluation, Federation, Plan, Run, Training

_SECTIONS = {"training": Training, "federation": Federation, "run": Run, "evaluation": Evaluation}


def plan_of(**keys: Any) -> Plan:
    """A plan from keys of the sections that say how one site trains; the rest is as usual."""
    given = {name: {k: keys.pop(k) for k in list(keys) if k in section.model_fields} for name, section in _SECTIONS.items()}
    if keys:
        raise ValueError(f"not of these sections: {', '.join(keys)}")
    return Plan.model_validate({**given, "aggregate": {"weighting": "uniform"}})  # epochs go with no other without a largest one
