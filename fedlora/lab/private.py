"""Simulated sites under a plan with [privacy]: each has a population, a budget and a privacy ledger of its own.

The noise is as secret as a site's: two simulations of one plan differ by it. One that was interrupted goes on to the same bits.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, TypedDict

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.simulation import Simulation
from fedlora.site.private import SitePrivacy

if TYPE_CHECKING:
    from fedlora.assemble import Lab
    from fedlora.learn.private.learner import PrivateLearner


class PrivateTables(TypedDict, total=False):
    """Tables of a simulated site's file."""

    data: SiteData
    privacy: SitePrivacy


def check_private(plan: Plan, simulation: Simulation, *, batch_sites: bool) -> None:
    """Whether a plan with [privacy] can be simulated on these rows.

    Raises:
        ConfigError: nothing says whose rows are whose, held-out rows are not declared public, or sites train in one pass.
    """
    data = simulation.data
    if plan.privacy is not None and plan.privacy.unit == "group" and not data.group_key:
        raise ConfigError(
            "privacy.unit = 'group', and simulation.data.group_key is empty: whose rows are whose is not known",
            hint="name the column of the patient or customer; or privacy.unit = 'row' where each row is another person",
        )
    if plan.evaluation.share and not data.held_out_public:
        raise ConfigError(
            "evaluation.share sends counts over held-out rows, which are not declared public",
            hint="evaluation.share = [], or simulation.data.held_out_public = true",
        )
    if batch_sites:
        raise ConfigError("--batch-sites is not built for plans with [privacy]", hint="leave it out")


def private_tables(plan: Plan, data: SiteData, *, population: str) -> PrivateTables:
    """What a simulated site's file says of its rows and their privacy; nothing for a plan without [privacy]."""
    private = plan.privacy
    if private is None:
        return {}
    return PrivateTables(
        data=SiteData(
            group_key=data.group_key,
            held_out_path="held out by the simulation",
            held_out_public=data.held_out_public,
        ),
        privacy=SitePrivacy(
            population=population,
            units=private.units_per_site,
            budget_epsilon=private.epsilon,
            budget_delta=private.delta,
            unit=private.unit,
        ),
    )


def private_learners(lab: Lab) -> Mapping[str, PrivateLearner]:
    """A learner for each site, on the base that all of them share."""
    from fedlora.learn.private.learner import PrivateLearner

    checkpointing = lab.micro_batches.checkpointing
    return {
        name: PrivateLearner(lab.lora, rows["train"], rows["validation"], lab.plan, site=name, checkpointing=checkpointing)
        for name, rows in lab.rows.items()
    }
