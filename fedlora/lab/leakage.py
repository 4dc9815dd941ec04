"""The leakage audit of a simulated run: with the canaries of all sites at hand, more is measured than a deployment can."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.core.adapter import Adapter
from fedlora.core.errors import ConfigError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Data
from fedlora.core.plan import Plan
from fedlora.core.tables.audit import audited
from fedlora.core.tables.audited import AuditRecord
from fedlora.formats.state.commitment import load_planted
from fedlora.formats.state.memory import FileMemory
from fedlora.library.leakage import write_audit
from fedlora.privacy.planted import canaries_of
from fedlora.rounds.store import RunStore

if TYPE_CHECKING:
    from fedlora.assemble import Lab


def check_audited(plan: Plan, *, batch_sites: bool) -> None:
    """Whether a plan with [audit] can be simulated so.

    Raises:
        ConfigError: it cannot.
    """
    if audited(plan) is not None and batch_sites:
        raise ConfigError("--batch-sites is not built for plans with [audit]", hint="leave it out")


def audit_simulation(lab: Lab, out: Path, store: RunStore, report: Report) -> AuditRecord | None:
    """Measures and writes ``audit.json``; None for a plan without canaries.

    Args:
        out: of one seed.
    """
    audit = audited(lab.plan)
    if audit is None:
        return None
    from fedlora.learn.audit.measured import measure
    from fedlora.learn.evaluate import evaluated_at_once

    sown = []
    for site in lab.simulation.sites:
        places = out / "sites" / site, out / "flower" / site / "state"
        state = next((place for place in places if place.is_dir()), None)
        planted = None if state is None else load_planted(FileMemory(state / "memory"), store.run)  # None: it was never asked
        if planted is not None and planted.seed:
            sown += [(planted.seed, canary) for canary in canaries_of(planted.seed, audit)]
    adapter: Adapter = store.load().adapter
    said = f"leakage audit: attacking {len(sown)} canaries; each of up to 32 that are in is ranked among 256 secrets"
    report(Event.DATA, Data(file="audit", lines=[said]))
    rows = evaluated_at_once(lab.plan.training, lab.micro_batches.tokens)
    measured = measure(lab.lora, adapter, sown, lab.plan, audit, rows=rows) if sown else None
    return write_audit(out, store, measured=measured)
