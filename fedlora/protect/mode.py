"""What a mode of protection is: a name, its phases, its two halves, its own table, and what it has to say of a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

from fedlora.core.adapter import Adapter, Layout
from fedlora.core.answers import Survives
from fedlora.core.errors import WrongContext
from fedlora.core.events import Report
from fedlora.core.messages import Reveals
from fedlora.core.plan import Plan
from fedlora.core.section import Section
from fedlora.formats.memory import Memory
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.trust import RosterKeeper
from fedlora.protect import Protection, SiteProtection
from fedlora.protect.link import ServerLink, SiteLink


@dataclass(frozen=True, slots=True, eq=False)
class ServerParts:
    """What a server's half is made of.

    Attributes:
        rosters: opens the signed roster and gives a function that returns the one of now; only a mode that needs one calls it.
    """

    plan: Plan
    link: ServerLink
    memory: Memory
    rosters: Callable[[], Callable[[], SignedRoster]]
    report: Report


@dataclass(frozen=True, slots=True, eq=False)
class SiteParts:
    """What a site's half is made of.

    Attributes:
        uncovers: a plan's digest -> sites that a person here has named: beside earlier plans' sums it may show them.
    """

    link: SiteLink
    roster: RosterKeeper
    entropy: Callable[[int], bytes]
    uncovers: Callable[[str], Collection[str]]


class Limits(Protocol):
    """What a site's policy says about modes."""

    @property
    def max_first_range(self) -> float: ...
    @property
    def lone_change(self) -> Literal["refuse", "allow"]: ...
    @property
    def share(self) -> tuple[str, ...]: ...


@dataclass(frozen=True, slots=True)
class SumExposure:
    """What the sums of a plan may tell.

    Attributes:
        colluding: sites that may know their own updates.
        alone: whether sums may differ by one site.
        measure: keys of the plan -> values as text: all that decides what a site adds up.
    """

    colluding: int
    alone: bool
    measure: Mapping[str, str]


def check_mode(plan: Plan, name: str) -> None:
    """At a site: the plan that a person has agreed to promises the mode in which its task has come.

    Raises:
        WrongContext: another one; the server may have stepped down.
    """
    if plan.protect.mode != name:
        raise WrongContext(f"the plan promises protect.mode = {plan.protect.mode!r}, the server speaks {name!r}")


class Mode:
    """A mode. No two share a phase. One that lacks a half, or the words for it, is refused when its class is made.

    Attributes:
        Settings: its own table of the plan.
        reveals: what the server learns.
        phases: of its requests.
        work: those over whose answer a site may take hours; every other one is talk, of seconds.
        steps: at which a site may be lost in a rehearsal; ``train`` stands for the request that brings the work.
        needs_roster: the coordinator's signed roster says who takes part.
        once: no round can be done twice, so that what came of it is kept in two files.
    """

    Settings: ClassVar[type[Section]] = Section
    reveals: ClassVar[Reveals] = "each"
    phases: ClassVar[frozenset[str]] = frozenset()
    work: ClassVar[frozenset[str]] = frozenset()
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
        """What a person who approves the plan is told, by topic: above all who reads a site's update.

        Args:
            said: what is told of every plan; a topic of the same name replaces it.
        """

    @classmethod
    def conflicts(cls, plan: Plan) -> Iterator[str]:
        """What it does not go with in this plan, each in a sentence that says what to do."""
        yield from ()

    @classmethod
    def refusals(cls, plan: Plan, limits: Limits) -> Iterator[str]:
        """Why a site with this policy would not take part, each in a sentence."""
        yield from ()

    @classmethod
    def check_adapter(cls, plan: Plan, adapter: Adapter, *, layout: Layout, round: int) -> None:
        """At a site, before it trains from what the server has sent.

        Args:
            layout: of the whole adapter, as it is here.

        Raises:
            PlanRefused, PlanRefused (impossible-adapter): it must not be trained from.
        """

    @classmethod
    def step_timeout_s(cls, plan: Plan) -> float:
        """Seconds for each step that is not work."""
        return 300.0

    @classmethod
    def told(cls, plan: Plan) -> SumExposure | None:
        """What sums may tell; None where there are none."""
        return None

    @classmethod
    def survives(cls, plan: Plan) -> tuple[list[Survives], str] | None:
        """How many absences a round survives, for programs and in words; None: any that leave ``min_sites``."""
        return None
