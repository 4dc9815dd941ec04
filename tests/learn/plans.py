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


TWO_SITES = """
[run]
name = "toy"

[model]
model_name_or_path = "fedlora/toy"

[lora]
r = 4
lora_alpha = 8

[training]
prompt = "plain"
learning_rate = 1e-2
per_device_train_batch_size = 2
max_length = 64

[federation]
num_rounds = 2
local_steps = 2
min_sites = 2
"""
"""A plan file of two short rounds on the toy base."""
