"""Which runs a site takes part in: the approvals given by people at this site, and the runs that have used them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.core.errors import PlanRefused, StoreError, WrongContext
from fedlora.core.messages import Task
from fedlora.core.plan import Plan
from fedlora.formats.state.memory import Memory, get_record, put_record
from fedlora.site.site_file import SiteFile

RUNS = "runs"
"""Key of the runs in a site's memory."""

_SHOWS = (
    "in two runs of one plan every site trains from the same adapters with the same seeds: the difference of their sums is the "
    "sum of the updates of those sites that took part in only one of them"
)


@dataclass(frozen=True, slots=True)
class Approvals:
    """What people at this site have approved.

    Attributes:
        plans: digests, hex; an entry that occurs twice allows two runs.
        uncovers: plan -> sites whose update its sums may reveal beside sums of earlier plans on the same base.
        roster: digest of the roster that they compared by telephone; empty: none.
    """

    plans: Sequence[str] = ()
    uncovers: Mapping[str, Sequence[str]] = field(default_factory=dict)
    roster: str = ""

    @classmethod
    def of(cls, file: SiteFile) -> Approvals:
        return cls(file.plans, file.uncovers, file.roster)


@dataclass(frozen=True, slots=True)
class Begun:
    """A run that this site has taken part in, and its plan's digest."""

    run: str
    plan: str


def admit(begun: Sequence[Begun], one: Begun, *, plans: Sequence[str] | None) -> Sequence[Begun]:
    """Admits a run, new or continued, or refuses it.

    Law: a run keeps the plan that it began with, and so its mode. A plan has at most as many runs as it has entries in ``plans``;
    the first runs are admitted.

    Args:
        begun: the runs so far, in order.
        plans: digests of approved plans; None: all are approved.

    Returns:
        ``begun``, with this run added if it is new.

    Raises:
        WrongContext (wrong-plan): the run began with another plan.
        PlanRefused (plan-not-approved, run-not-approved).
    """
    for known in begun:
        if known.run == one.run and known.plan != one.plan:
            raise WrongContext(
                f"run {one.run[:12]} began here with plan {known.plan[:12]}; plan {one.plan[:12]} cannot be used in it",
                hint="start another run for another plan: a run keeps its plan and its protection to its end",
                code="wrong-plan",
            )
    after = begun if one in begun else (*begun, one)
    if plans is None:
        return after
    allowed, number = plans.count(one.plan), [b for b in after if b.plan == one.plan].index(one) + 1
    if not allowed:
        raise PlanRefused(
            f"nobody at this site has approved plan {one.plan}; {_approved(plans)}",
            hint="run `fedlora site approve PLAN.toml --site site.toml`: it shows what the plan asks for and approves one run",
            code="plan-not-approved",
        )
    if number > allowed:
        raise PlanRefused(
            f"plan {one.plan} is approved for {allowed} of its runs, and this is run {number}",
            hint=f"{_SHOWS}. If you accept this: `fedlora site approve PLAN.toml --site site.toml --again` allows one more run",
            code="run-not-approved",
        )
    return after


def _approved(plans: Sequence[str]) -> str:
    """Which plans are, the last approved first: it may have been changed by a word since."""
    known = [digest[:12] for digest in dict.fromkeys(reversed(plans))]
    more = f" and {len(known) - _MOST} more" if len(known) > _MOST else ""
    return f"approved here: plan {', '.join(known[:_MOST])}{more}" if known else "no plan is approved here"


_MOST = 6
_WAY = (
    "empty `plans` in the site file, delete both copies, and approve again (`fedlora site approve`) each plan that may continue: "
    "once for each run, also for the run in progress"
)


@dataclass(frozen=True, slots=True)
class Runs:
    """The runs of a site, stored in its memory."""

    memory: Memory

    def load(self) -> list[Begun]:
        """In the order in which they began.

        Raises:
            StoreError: damaged.
        """
        try:
            found = get_record(self.memory, RUNS, "runs") or {"begun": []}
        except StoreError as e:
            raise StoreError(f"the record of the runs that this site has taken part in: {e}", hint=_WAY) from None
        return [Begun(run, plan) for run, plan in found["begun"]]

    def save(self, begun: Sequence[Begun]) -> None:
        """Stores the runs; they are on the disk when this returns."""
        put_record(self.memory, RUNS, "runs", {"begun": [[b.run, b.plan] for b in begun]})


def check_round(plan: Plan, task: Task) -> None:
    """Refuses a round that the plan has not: with it, an entry of the journal would be replaced.

    Raises:
        WrongContext (wrong-round).
    """
    last = plan.federation.num_rounds
    if not (1 <= task.round <= last if task.kind == "train" else task.round == last + 1):
        raise WrongContext(f"a task to {task.kind} in round {task.round} of {last}", code="wrong-round")


_MAX_ADAPTERS = 2
_SIT_OUT = "nothing more is computed in this run here: `fedlora site repair SITE.TOML --sit-out RUN`; the next run is as ever"


def note_adapter(memory: Memory, task: Task, *, begun: bool) -> None:
    """Notes with which adapter a round has come, before anything is computed from it.

    What a site answers, a code of an error too, may follow from its rows: under secure aggregation a server must not ask it again
    and again, each time with an adapter made up for the question. An honest one has a second adapter for a round at the most, if
    it had to do the round before again.

    Args:
        begun: the run has begun here before, and so its first adapter was noted.

    Raises:
        WrongContext (wrong-global): the round has come with too many others.
        StoreError: what was noted is damaged or gone, so that nobody knows with how many it has come.
    """
    key = f"{task.run}/secagg/adapters"
    found = get_record(memory, key, "adapters", hint=_SIT_OUT)
    if found is None and begun:
        raise StoreError(f"the record of the adapters of run {task.run[:12]} is gone: {memory.where(key)}", hint=_SIT_OUT)
    rounds: dict[str, list[str]] = (found or {"rounds": {}})["rounds"]
    seen, adapter = rounds.get(str(task.round), []), task.adapter.digest()
    if adapter in seen:
        return
    if len(seen) >= _MAX_ADAPTERS:
        raise WrongContext(
            f"the server has sent {len(seen)} other adapters for round {task.round}; this site computes with no more of them",
            hint="treat this as an incident and ask the coordinator: a round has one adapter",
            code="wrong-global",
        )
    put_record(memory, key, "adapters", {"rounds": rounds | {str(task.round): [*seen, adapter]}})
