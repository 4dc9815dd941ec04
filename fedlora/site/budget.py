"""What a population has spent of its privacy budget, for the people of its site: to see, to set aside, to make good."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from fedlora.core.errors import ConfigError, FedLoRAError, PlanRefused, StateLost, StoreError
from fedlora.core.plan import Plan
from fedlora.privacy.account import accountant
from fedlora.privacy.claims import run_event
from fedlora.privacy.spending import Spending
from fedlora.site.parts import ledger_of, load_site_key
from fedlora.site.private import PrivateRuns, WatchedLedger, private_refusals
from fedlora.site.site_file import SiteFile, load_site_file


@dataclass(frozen=True, slots=True)
class Account:
    """A population's budget, in epsilon at one delta; infinite where delta is used up.

    Attributes:
        spent: by what may have been released.
        committed: by that and all that is set aside.
        own_noise: committed, if no noise is counted but this site's; the same where no plan shares its noise.
        reserved: run, or plan that was set aside for by hand -> epsilon of what is set aside for it alone.
        charges: rounds that were charged.
    """

    population: str
    budget: float
    delta: float
    spent: float
    committed: float
    own_noise: float
    reserved: dict[str, float]
    charges: int
    accountant: str

    @property
    def left(self) -> float:
        """Epsilon between the budget and what is spent or set aside, at least 0."""
        return max(self.budget - self.committed, 0.0)

    def lines(self) -> list[str]:
        """The account in words."""
        return [
            f"population {self.population}: epsilon {self.spent:.2f} of {self.budget:g} spent at delta {self.delta:g}, "
            f"{self.committed:.2f} with all that is set aside, {self.left:.2f} left",
            f"  {self.charges} rounds were charged; counted together by {self.accountant}",
            *([f"  {own} with nobody's noise but ours"] if (own := f"{self.own_noise:.2f}") != f"{self.committed:.2f}" else []),
            *(f"  set aside for {name[:12]}: epsilon {alone:.2f} alone" for name, alone in self.reserved.items()),
        ]


@dataclass(frozen=True, slots=True)
class PlanCost:
    """What a plan would do to a population's budget if it runs to its end.

    Attributes:
        spent: epsilon of what may have been released, and of what is set aside for other runs.
        after: epsilon with this plan.
        own_noise: the same, if no noise is counted but this site's.
    """

    population: str
    budget: float
    spent: float
    after: float
    own_noise: float

    @property
    def fits(self) -> bool:
        return self.after <= self.budget

    def line(self) -> str:
        """In words."""
        so_far = f"population {self.population}: epsilon {self.spent:.2f} of {self.budget:g} spent or set aside"
        said = f"{so_far}; this plan: +{self.after - self.spent:.2f} if it runs to the end"
        left = f"; after it {self.budget - self.after:.2f} left"
        own = f"{self.own_noise:.2f}"
        alone = f"; {own} in all with nobody's noise but ours" if own != f"{self.after:.2f}" else ""
        return said + (left if self.fits else ": over the budget, this site refuses it") + alone


@dataclass(frozen=True, slots=True)
class BudgetDesk:
    """The privacy budget of a site's population.

    Args:
        path: the site file.

    Raises:
        ConfigError: the site file names no population.
        KeyFileError: the site's key is missing or damaged; it signs the ledger's lines.
    """

    path: Path

    def account(self) -> Account:
        """What is spent and set aside.

        Raises:
            StateLost, StoreError: the ledger is older than this site remembers, or damaged.
        """
        file, watched = self._open()
        spending, honest = self._spending(file, watched), file.privacy.honest_others
        return Account(
            population=file.privacy.population,
            budget=file.privacy.budget_epsilon,
            delta=spending.delta,
            spent=spending.spent(honest_others=honest),
            committed=spending.committed(honest_others=honest),
            own_noise=spending.committed(honest_others=False),
            reserved={
                name: Spending(spending.delta, events).spent(honest_others=honest) for name, events in spending.reserved.items()
            },
            charges=spending.charges,
            accountant=accountant(),
        )

    def cost(self, plan: Plan) -> PlanCost:
        """What a plan with [privacy] would add, were it to run here once more.

        Raises:
            ConfigError, StateLost, StoreError: as :meth:`account`, or its noise is not known yet.
        """
        file, watched = self._open()
        spending = self._spending(file, watched)
        aside = {name: events for name, events in spending.reserved.items() if name != plan.digest()}
        others = Spending(spending.delta, spending.charged, aside, spending.charges)
        return PlanCost(
            population=file.privacy.population,
            budget=file.privacy.budget_epsilon,
            spent=others.committed(honest_others=file.privacy.honest_others),
            after=others.committed([run_event(plan)], honest_others=file.privacy.honest_others),
            own_noise=others.committed([run_event(plan)], honest_others=False),
        )

    def reserve(self, plan: Plan) -> Account:
        """Sets aside what one run of a plan may release, so that no other plan takes it first. The run takes it over.

        Raises:
            PlanRefused: this site would not take part in the plan.
            BudgetSpent (budget): it does not fit.
        """
        file, watched = self._open()
        if no := list(private_refusals(plan, file.privacy, file.data)):
            raise PlanRefused("; ".join(no), hint="change [privacy] or [data] in the site file, or the plan")
        if plan.privacy is None:
            raise ConfigError("this plan has no [privacy]: it takes nothing of the budget", hint="nothing has to be set aside")
        ledger = watched.checked()
        ledger.begin(delta=file.privacy.budget_delta, units=file.privacy.units)
        ledger.reserve(plan.digest(), [run_event(plan)], budget=PrivateRuns(file.privacy, file.data, watched).budget)
        watched.note()
        return self.account()

    def release(self, name: str) -> Account:
        """Frees what is set aside for a run that is over, or for a plan. What was released stays spent.

        Args:
            name: of the run or plan, or the first digits of it.

        Raises:
            ConfigError: nothing is set aside under this name, or under several.
        """
        _, watched = self._open()
        ledger = watched.checked()
        found = [known for known in ledger.spending().reserved if known.startswith(name)]
        if len(found) != 1:
            raise ConfigError(
                f"{len(found) or 'nothing'} set aside under {name[:64]!r}", hint="`fedlora budget show SITE.TOML` lists what is"
            )
        ledger.close(found[0])
        watched.note()
        return self.account()

    def accept_loss(self, plans: Sequence[Plan]) -> Account:
        """Counts as spent whatever lost lines of the ledger can have held; the ledger then works again.

        Args:
            plans: that this site took part in and whose charges may be lost, each once for each run.

        Raises:
            ConfigError: nothing is missing and no plan is named, or nothing says what the lost lines held.
        """
        file, watched = self._open()
        if not plans and self._whole(watched):
            raise ConfigError(
                "nothing is missing in the privacy ledger",
                hint="if an older copy of the whole state directory stands in its place, name the plans that ran since: --plan",
            )
        known = ""
        with suppress(StoreError):
            known = watched.known_head
        also = [run_event(plan) for plan in plans]
        settings = file.privacy
        watched.ledger.accept_loss(echoed=known, delta=settings.budget_delta, units=settings.units, also=also)
        watched.note()
        return self.account()

    def _whole(self, watched: WatchedLedger) -> bool:
        try:
            watched.checked().spending()
        except (StateLost, StoreError):
            return False
        except ConfigError:
            return True  # none has begun
        return True

    def _open(self) -> tuple[SiteFile, WatchedLedger]:
        file, root = load_site_file(self.path), self.path.resolve().parent
        watched = ledger_of(file, load_site_key(file, root), root / file.state, entropy=os.urandom)
        if watched is None:
            raise ConfigError(
                "this site has no privacy budget: privacy.population in the site file is empty",
                hint="set privacy.population, privacy.units, privacy.budget_epsilon and privacy.budget_delta",
            )
        return file, watched

    def _spending(self, file: SiteFile, watched: WatchedLedger) -> Spending:
        if not watched.ledger.directory.exists() and not watched.known_head:
            return Spending(file.privacy.budget_delta)
        return watched.checked().spending()


def cost_at(path: Path, plan: Plan) -> tuple[PlanCost | None, str]:
    """What a plan would cost at a site, or why that is not known, for a command that goes on in either case."""
    if plan.privacy is None:
        return None, ""
    try:
        found = BudgetDesk(path).cost(plan)
    except FedLoRAError as e:
        return None, f"privacy budget: {e}"
    return found, found.line()


def finite(epsilon: float) -> float | None:
    """As JSON can say it; None: infinite."""
    return epsilon if math.isfinite(epsilon) else None
