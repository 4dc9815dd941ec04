"""A simulated site: the same parts as a deployed one, with a file and keys that follow from the simulation."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from fedlora.assemble import Lab
from fedlora.core.events import Event, Report
from fedlora.core.plan import Plan
from fedlora.formats.keys import Identity, PublicIdentity, load_identity
from fedlora.lab.private import private_tables
from fedlora.lab.rehearse import rehearsed
from fedlora.lab.testing import open_policy
from fedlora.site.first import Firsts
from fedlora.site.parts import site_of
from fedlora.site.site_file import SiteFile
from fedlora.site.work import Learner, Site


def virtual_site(
    lab: Lab, identity: Identity, server: PublicIdentity, state: Path, roster: str, report: Report, learner: Learner
) -> Site:
    """A site that takes whatever its simulation's plan asks for: who simulates has written the plan."""
    file = SiteFile(
        name=identity.name,
        roster=roster,
        models={lab.plan.model.model_name_or_path: str(lab.base)},
        policy=open_policy(protect=(lab.plan.protect.mode,)),
        **private_tables(lab.plan, lab.simulation.data, population=identity.name),
    )

    quiet = partial(_named, identity.name, report)
    if lab.plan.lora.init:
        Firsts(state, "approved").keep(lab.first)
    return site_of(identity, server, file, make_learner=lambda plan: learner, state=state, report=quiet)


def _named(site: str, report: Report, event: Event, facts: Mapping[str, Any]) -> None:
    report(event, {"site": site, **facts})


def identity_of(path: Path, name: str, plan: Plan) -> Identity:
    """The keys in ``path``, made if they are missing: the same for every simulation of this seed."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        rehearsed(name, plan).save(path)
    return load_identity(path)
