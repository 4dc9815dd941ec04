"""Whether the way in which a simulation is to be run fits its plan and its rows."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from fedlora.core.errors import ConfigError
from fedlora.core.plan import Plan
from fedlora.lab.claims import Options
from fedlora.lab.leakage import check_audited
from fedlora.lab.private import check_private
from fedlora.rules import rule_of

if TYPE_CHECKING:
    from fedlora.learn.simulated.rows import SimulatedRows

Lost: TypeAlias = frozenset[tuple[str, str, int]]
"""Site, step and round at which it is lost, see :func:`fedlora.rounds.transport.parse_dropouts`."""


def check_way(plan: Plan, options: Options, found: SimulatedRows, lost: Lost) -> None:
    """Checks that the processes and passes that are asked for fit the plan and its rows.

    Raises:
        ConfigError: they do not.
        NotInstalled: what real processes need is missing.
    """
    check_audited(plan, batch_sites=options.batch_sites)
    if plan.privacy is not None:
        check_private(plan, found.simulation, batch_sites=options.batch_sites)
    if options.transport != "local":
        _check_over_flower(found, lost)
    apart = plan.federation.fraction_train < 1 or plan.lora.ranks or rule_of(plan).keeps_local_factor
    if options.batch_sites and (options.transport != "local" or apart):
        raise ConfigError(
            "--batch-sites needs --transport local, and sites that all train one adapter: "
            "federation.fraction_train = 1, no lora.ranks, aggregate.fedavg.share = 'AB'",
            hint="leave --batch-sites out",
        )


def _check_over_flower(found: SimulatedRows, lost: Lost) -> None:
    if not found.files:
        raise ConfigError(
            "--transport flower needs a file for each split of each site: SITE.train.csv, SITE.validation.csv and SITE.test.csv",
            hint="--transport local deals rows and holds them out itself",
        )
    if lost:
        raise ConfigError("--drop needs --transport local", hint="over Flower, kill a site's process instead")
