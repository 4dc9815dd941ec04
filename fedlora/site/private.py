"""A site's half of differential privacy: what it agrees to, and the ledger that is charged before anything is computed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Annotated, Final

from pydantic import Field

from fedlora.core.errors import PlanRefused, StateLost
from fedlora.core.messages import Task
from fedlora.core.plan import Plan
from fedlora.core.section import Section, worded
from fedlora.core.tables.data import SiteData
from fedlora.core.tables.privacy import MOST_EPSILON, Mechanism, Unit
from fedlora.formats.state.memory import Memory, get_record, put_record
from fedlora.privacy.account import accountant
from fedlora.privacy.claims import round_event, run_epsilon, run_event
from fedlora.privacy.ledger import Budget, PrivacyLedger, Release

LEDGERS: Final = "privacy"
"""Directory of a site's privacy ledgers, one below it for each population."""
_LOST: Final = "stop the site; restore the newest copy of the ledger's directory, or `fedlora budget accept-loss SITE.TOML`"
_SIT_OUT: Final = "`fedlora site repair SITE.TOML --sit-out RUN`: this site takes part in the next run"


class SitePrivacy(Section):
    """Privacy of the people behind this site's rows: what all plans together may cost them. It overrides every plan."""

    population: Annotated[str, worded(r"^[a-z0-9-]{0,63}$", "up to 63 characters: a-z, 0-9, -")] = ""
    """name for the people behind the rows, a-z, 0-9 and -; one budget each; empty: plans with [privacy] are refused"""
    units: Annotated[int, Field(ge=1, le=1 << 31)] = 1000
    """how many they are, about: patients or customers, or rows with unit = "row"; delta must be below one over it"""
    budget_epsilon: Annotated[float, Field(ge=0, le=MOST_EPSILON)] = 8.0
    """epsilon of all plans ever at budget_delta, at most; a plan that would exceed it is refused. Higher: less privacy"""
    budget_delta: Annotated[float, Field(gt=0, lt=1)] = 1e-4
    """delta at which the budget is counted; it cannot be changed once the first plan is charged"""
    required: bool = False
    """refuse plans without [privacy]"""
    unit: Unit = "group"
    """weakest unit accepted; row: also plans that hide single rows, because here each row is another person"""
    mechanisms: tuple[Mechanism, ...] = ("local", "distributed")
    """mechanisms accepted; without distributed: only plans whose noise does not count on other sites"""
    honest_others: bool = True
    """count on the noise of other sites in the budget; false: distributed is charged as if nobody else added any"""
    canaries: bool = True
    """whether synthetic canary rows of a plan's [audit] may be mixed in; false: this site takes no part in leakage audits"""


def private_refusals(plan: Plan, settings: SitePrivacy, data: SiteData) -> Iterator[str]:
    """Reasons why a site would refuse a plan for its privacy. They follow from plan and site file, never from rows.

    What is spent already is another matter: the ledger refuses by itself, see :meth:`PrivateRuns.admit`.
    """
    private = plan.privacy
    if private is None:
        if settings.required:
            yield "it has no [privacy], and privacy.required in the site file is true"
        return
    if not settings.population:
        yield "it has [privacy], and no population is named here: set privacy.population in the site file"
    if private.unit == "row" and settings.unit == "group":
        yield "it hides single rows, and privacy.unit in the site file is 'group': choose 'row' if each row is another person"
    if private.unit == "group" and not data.group_key:
        yield "it hides groups, and data.group_key in the site file is empty: whose rows are whose is not known"
    if not data.held_out_path and data.held_out_fraction > 0:
        yield (
            "rows would be held out by a fraction, and then who is held out depends on the others: set "
            "data.held_out_fraction = 0, or name data.held_out_path"
        )
    if plan.evaluation.share and not (data.held_out_public and data.held_out_path):
        yield (
            "evaluation.share sends counts over held-out rows, and this site has not declared them public: name "
            "data.held_out_path and set data.held_out_public = true, or have evaluation.share = []"
        )
    if private.mechanism not in settings.mechanisms:
        yield f"its mechanism is {private.mechanism!r}, which privacy.mechanisms in the site file does not list"
    if private.delta * settings.units > 1:
        yield f"its delta {private.delta:g} is more than 1 / {settings.units} (privacy.units): it may publish one person's rows"
    if private.noise_multiplier and not (found := run_epsilon(plan)) <= private.epsilon:
        yield (
            f"it claims epsilon {private.epsilon:g}, and this site counts {found:.3g} by {accountant()}; the extra `dp` "
            "(pip install 'fedlora[dp]') counts most exactly"
        )


@dataclass(frozen=True, slots=True)
class WatchedLedger:
    """A privacy ledger, and the site's memory in another directory, which knows its last line: an older copy is noticed."""

    ledger: PrivacyLedger
    memory: Memory

    @property
    def known_head(self) -> str:
        """The last line that the memory knows; empty: none."""
        found = get_record(self.memory, self._key, "privacy-head", hint=_LOST)
        return "" if found is None else str(found["head"])

    def checked(self) -> PrivacyLedger:
        """The ledger, once it is not older than the memory.

        Raises:
            StateLost: it is.
        """
        if known := self.known_head:
            self.ledger.check_head(known)
        return self.ledger

    def note(self) -> None:
        """Notes the ledger's last line as the newest."""
        head = self.ledger.head()
        if self.known_head != head:
            put_record(self.memory, self._key, "privacy-head", {"head": head})

    @property
    def _key(self) -> str:
        return f"privacy/{self.ledger.population}"


@dataclass(frozen=True, slots=True)
class PrivateRuns:
    """The runs of plans with [privacy] at one site.

    Attributes:
        settings: the site file's [privacy].
        data: its [data].
        watched: the ledger of the population; None: none is named, and every such plan is refused.
    """

    settings: SitePrivacy = field(default_factory=SitePrivacy)
    data: SiteData = field(default_factory=SiteData)
    watched: WatchedLedger | None = None

    def admit(self, plan: Plan, task: Task, *, begun: bool) -> None:
        """Checks that this site takes part in a plan, and sets aside what its run may release, before anything is read or loaded.

        Args:
            begun: this run has begun here before.

        Raises:
            PlanRefused: the site file says no.
            BudgetSpent (budget): the run would exceed the population's budget.
            StateLost: the ledger is older than this site remembers, or lines of this run were lost.
            ConfigError, StoreError, ResourceError: the ledger counts at another delta, is damaged, or cannot be written.
        """
        if no := list(private_refusals(plan, self.settings, self.data)):
            raise PlanRefused("; ".join(no), hint="change [privacy] or [data] in the site file, or the plan")
        if plan.privacy is None or task.kind != "train":
            return
        ledger = self._watched.checked()
        ledger.begin(delta=self.settings.budget_delta, units=self.settings.units)
        if begun and not ledger.knows(task.run):
            raise StateLost(f"what run {task.run[:12]} has released is not in the privacy ledger any more", hint=_SIT_OUT)
        if not begun:
            ledger.close(task.plan_digest)  # set aside by hand for this run of the plan
        ledger.reserve(task.run, [run_event(plan)], budget=self.budget)
        self._watched.note()

    def charge(self, plan: Plan, task: Task, *, sent: bool) -> bytes:
        """Charges a round; the charge is on the disk when this returns. To be called before the first unit is drawn.

        Args:
            sent: something of this round may have been sent already.

        Returns:
            The secret of the charge, 32 bytes; that of an interrupted attempt if nothing of it can have been sent.

        Raises:
            BudgetSpent, BudgetDrained, ClaimSpent (budget): see :meth:`fedlora.privacy.ledger.PrivacyLedger.charge`.
            StateLost, StoreError, ResourceError: nothing may be drawn.
        """
        release = Release(task.run, task.round, task.adapter.digest(), round_event(plan))
        secret = self._watched.checked().charge(release, budget=self.budget, repeatable=not sent)
        self._watched.note()
        return secret

    def finished(self, task: Task) -> None:
        """The round's result is in the journal: its secret goes. After the last evaluation, so does what is still set aside."""
        if task.kind == "train":
            self._watched.ledger.forget(task.run, through=task.round)
        else:
            self._watched.ledger.close(task.run)
            self._watched.note()

    @property
    def budget(self) -> Budget:
        """What the site allows its population."""
        return Budget(self.settings.budget_epsilon, honest_others=self.settings.honest_others, within_reserve=True)

    @property
    def _watched(self) -> WatchedLedger:
        if self.watched is None:
            raise PlanRefused("no population is named here", hint="set privacy.population in the site file")
        return self.watched


def evaluates(plan: Plan) -> bool:
    """Whether a site computes anything over its held-out rows: with [privacy] only what may leave, as an error in it would."""
    return plan.privacy is None or bool(plan.evaluation.share)
