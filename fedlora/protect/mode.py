"""The interface of a mode of protection: its phases, its server and site halves, its settings, its checks of a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from fedlora.answers import Survives
from fedlora.core.adapter import Adapter, Layout
from fedlora.core.codes import Code
from fedlora.core.errors import WrongContext
from fedlora.core.events import Report
from fedlora.core.messages import Reveals
from fedlora.core.plan import Dtype, Plan
from fedlora.core.section import Section
from fedlora.formats import update as wire
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import Memory
from fedlora.formats.trust import RosterKeeper
from fedlora.protect import Protection, SiteProtection
from fedlora.protect.link import ServerLink, SiteLink


@dataclass(frozen=True, slots=True, eq=False)
class ServerParts:
    """The parts that a server's half is built from.

    Attributes:
        rosters: opens the signed roster and returns a function that gives the current one; for modes that need a roster.
    """

    plan: Plan
    link: ServerLink
    memory: Memory
    rosters: Callable[[], Callable[[], SignedRoster]]
    report: Report


@dataclass(frozen=True, slots=True, eq=False)
class SiteParts:
    """The parts that a site's half is built from.

    Attributes:
        uncovers: a plan's digest -> sites whose update it may reveal beside earlier sums, as a person here has agreed.
    """

    link: SiteLink
    roster: RosterKeeper
    entropy: Callable[[int], bytes]
    uncovers: Callable[[str], Collection[str]]


class Limits(Protocol):
    """The part of a site's policy that modes check."""

    @property
    def max_first_range(self) -> float: ...
    @property
    def lone_change(self) -> Literal["refuse", "allow"]: ...
    @property
    def share(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class SumExposure:
    """What the sums of a plan may reveal.

    Attributes:
        colluding: number of sites that may collude with the server.
        alone: whether sums may differ by one site.
        measure: keys of the plan -> values as text: everything that decides what a site adds to a sum.
    """

    colluding: int
    alone: bool
    measure: Mapping[str, str]


def check_mode(plan: Plan, name: str) -> None:
    """At a site: checks that a task came in the mode that its approved plan names.

    Raises:
        WrongContext: another mode; a server may try to use a weaker one.
    """
    if plan.protect.mode != name:
        raise WrongContext(f"the plan promises protect.mode = {plan.protect.mode!r}, the server speaks {name!r}")


class Mode:
    """A mode of protection. No two modes share a phase. A class must define ``server``, ``site`` and ``words``.

    Attributes:
        Settings: its own table of the plan.
        reveals: what the server learns.
        phases: names of its requests.
        work: phases whose answer may take a site hours; all others take seconds.
        goes_on: phases after whose answer the server asks the site for more in the same round.
        carries: phases whose answer carries the update, or the numbers of the last evaluation.
        steps: where a rehearsal can drop a site; ``train`` stands for the request that brings the work.
        needs_roster: the coordinator's signed roster says who takes part.
        once: no round can be repeated, so that its result is kept in two files.
    """

    Settings: ClassVar[type[Section]] = Section
    reveals: ClassVar[Reveals] = "each"
    phases: ClassVar[frozenset[str]] = frozenset()
    work: ClassVar[frozenset[str]] = frozenset()
    goes_on: ClassVar[frozenset[str]] = frozenset()
    carries: ClassVar[frozenset[str]] = frozenset()
    steps: ClassVar[tuple[str, ...]] = ("train",)
    needs_roster: ClassVar[bool] = False
    once: ClassVar[bool] = False

    def __init_subclass__(cls) -> None:
        if lacking := [m for m in ("server", "site", "words") if getattr(getattr(cls, m), "__isabstractmethod__", False)]:
            raise TypeError(f"the mode {cls.__name__} lacks {', '.join(lacking)}")

    @classmethod
    @abstractmethod
    def server(cls, parts: ServerParts) -> Protection:
        """The server's half.

        Raises:
            StoreError, RosterInvalid, RosterExpired: it needs a roster, and there is none in force.
        """

    @classmethod
    @abstractmethod
    def site(cls, parts: SiteParts) -> SiteProtection:
        """The site's half."""

    @classmethod
    @abstractmethod
    def words(cls, plan: Plan, said: Mapping[str, str]) -> dict[str, str]:
        """What the plan means for a site, by topic, for the person who approves it: above all who can read its update.

        Args:
            said: the topics of every plan; one of the same name is replaced.
        """

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        """Settings of the plan that exclude this mode, each in a sentence that says what to do."""
        yield from ()

    @classmethod
    def refusals(cls, plan: Plan, limits: Limits) -> Iterator[tuple[Code, str]]:
        """Why a site with this policy would not take part: a code, which may leave the site, and a sentence, which may not."""
        yield from ()

    @classmethod
    def check_adapter(cls, plan: Plan, adapter: Adapter, *, first: Callable[[], Adapter], round: int) -> None:
        """At a site: checks the adapter that the server has sent, before training from it.

        Args:
            first: gives the whole adapter with which the plan begins, as this site has it.

        Raises:
            PlanRefused, PlanRefused (impossible-adapter): it must not be trained from.
        """

    @classmethod
    def down(cls, plan: Plan) -> Dtype:
        """Type of the values to which the server rounds the next adapter, so that a task costs no more than its answer."""
        return "bfloat16"

    @classmethod
    def update_bytes(cls, plan: Plan, layout: Layout) -> int:
        """Bytes in which the values of an update leave a site."""
        return wire.max_update_bytes(layout, dtype=plan.wire.dtype) - wire.MAX_HEADER_BYTES

    @classmethod
    def step_timeout_s(cls, plan: Plan) -> float:
        """Time limit of each step that is not work, seconds."""
        return 300.0

    @classmethod
    def more_s(cls, plan: Plan, phase: str) -> float:
        """Seconds within which the server asks a site that has answered this phase for more; 0: it has all of this round."""
        if phase not in cls.goes_on:
            return 0.0
        return plan.federation.round_deadline if phase in cls.work else cls.step_timeout_s(plan)

    @classmethod
    def told(cls, plan: Plan) -> SumExposure | None:
        """What sums may reveal; None for a mode without sums."""
        return None

    @classmethod
    def survives(cls, plan: Plan) -> tuple[list[Survives], str] | None:
        """How many absences a round survives, for programs and in words; None: any that leave ``min_sites``."""
        return None
