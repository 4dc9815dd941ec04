"""Federated LoRA fine-tuning: each site trains on its own text and sends an encrypted change of the factors, nothing else.

What stands here is for scripts and notebooks of researchers; operators use the command ``fedlora``. Each name is loaded when it
is first used, so that ``import fedlora`` itself loads nothing.

.. include:: EXAMPLE.md
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fedlora.core.adapter import Adapter as Adapter
    from fedlora.core.adapter import Update as Update
    from fedlora.core.errors import FedLoRAError as FedLoRAError
    from fedlora.core.plan import Plan as Plan
    from fedlora.core.registry import RULES as RULES
    from fedlora.core.section import Section as Section
    from fedlora.formats.files import load_adapter as load_adapter
    from fedlora.formats.plans import load_plan as load_plan
    from fedlora.lab.frames import results_frame as results_frame
    from fedlora.lab.simulate import simulate as simulate
    from fedlora.learn.export import export_adapter as export_adapter
    from fedlora.learn.scripts.attach import attach as attach
    from fedlora.protect import Protection as Protection
    from fedlora.rounds.loop import run as run
    from fedlora.rules.protocol import Aggregated as Aggregated
    from fedlora.rules.protocol import Rule as Rule
    from fedlora.site.work import Learner as Learner
    from fedlora.site.work import Site as Site

_HOMES = {
    "Adapter": "fedlora.core.adapter",
    "Aggregated": "fedlora.rules.protocol",
    "FedLoRAError": "fedlora.core.errors",
    "Learner": "fedlora.site.work",
    "Plan": "fedlora.core.plan",
    "Protection": "fedlora.protect",
    "RULES": "fedlora.core.registry",
    "Rule": "fedlora.rules.protocol",
    "Section": "fedlora.core.section",
    "Site": "fedlora.site.work",
    "Update": "fedlora.core.adapter",
    "attach": "fedlora.learn.scripts.attach",
    "export_adapter": "fedlora.learn.export",
    "load_adapter": "fedlora.formats.files",
    "load_plan": "fedlora.formats.plans",
    "results_frame": "fedlora.lab.frames",
    "run": "fedlora.rounds.loop",
    "simulate": "fedlora.lab.simulate",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'fedlora' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES})
