"""One attempt of a round at the server: what it is about, who it is with, and how a step asks sites and hears them."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from fedlora.core.errors import (
    CohortTooSmall,
    DealerLied,
    FedLoRAError,
    LoneChange,
    RemoteError,
    SessionError,
)
from fedlora.core.events import Event, Report
from fedlora.core.facts import LoneChange as LoneChangeFacts
from fedlora.core.messages import Reply, Request, Task
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.protect import Exchange
from fedlora.protect.link import Context, ServerLink, receive, reply_bytes
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.sessions import ServerSession, SessionStore
from fedlora.protect.secagg.terms import Terms, codec

_FINAL = frozenset({"secrets-gone", "session-spent", "both-secrets", LoneChange.code})
"""What a site says when it can never answer in this session."""


Errors: TypeAlias = dict[str, FedLoRAError]
"""Each site's first error, until it is known who counts."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """One attempt.

    Attributes:
        link: keys and sequence numbers, with the sites of ``signed``.
        terms: of the plan under ``signed``.
        signed: the roster, checked.
        sessions: durable.
        report: told about the steps.
        errors: what each site did wrong first, until it is known who counts.
    """

    task: Task
    link: ServerLink
    terms: Terms
    signed: SignedRoster
    sessions: SessionStore
    report: Report
    errors: Errors = field(default_factory=dict)

    def admitted(self, sites: Sequence[str]) -> list[str]:
        """Those that may take part. Who was caught is left out, unless too few would be left: else one lie would stop a run."""
        requirements, admitted, caught = self.terms.requirements, list[str](), Errors()
        for site in sites:
            try:
                self.signed.roster.site(site)
            except FedLoRAError as e:
                self.errors.setdefault(site, e)
                continue
            code = self.sessions.excluded(site, round=self.task.round)
            if code == DealerLied.code:
                caught[site] = DealerLied("left out: what it dealt is not what it had signed for", site=site)
            elif code:
                caught[site] = SessionError(
                    "left out of this round: it did not show what it had dealt to a site that complained",
                    code="complaint-unanswered",
                )
            else:
                admitted.append(site)
        if caught and len(requirements.whole(admitted)) < requirements.smallest <= len(requirements.whole([*admitted, *caught])):
            return [site for site in sites if site in caught or site in admitted]
        for site, error in caught.items():
            self.errors.setdefault(site, error)
        return admitted

    def whole(self, names: Sequence[str], errors: Errors, *, least: int) -> list[str]:
        """Those of these sites whose groups are there as a whole.

        Raises:
            CohortTooSmall, LoneChange: fewer than ``least``; which would be enough with the others of their groups.
        """
        requirements = self.terms.requirements
        whole, absent = requirements.whole(names), away(requirements, names)
        if len(names) < least:
            raise CohortTooSmall(f"{len(names)} sites are ready, {least} are needed")
        if len(whole) < least:
            self.report(Event.LONE_CHANGE, LoneChangeFacts(sites=sorted(names), missing=absent))
            raise LoneChange(
                f"too few of the sites {', '.join(sorted(names))} are in complete groups; "
                f"missing: {', '.join(absent) or 'new sites'}",
                hint="bring the other sites of their groups back; `fedlora roster show` prints the groups. Or agree on a plan "
                "and policies with lone_change = 'allow'",
            )
        for name in set(names) - whole:
            errors.setdefault(name, LoneChange(f"left out: {', '.join(absent) or 'a site'} of its group is not there"))
        return sorted(whole)

    def ask_all(
        self,
        attempt: int,
        names: Sequence[str],
        phase: str,
        payload: bytes,
        take: Callable[[Reply], None],
        errors: Errors,
        session: ServerSession | None = None,
        *,
        max_payload: int,
    ) -> Exchange:
        """Asks these sites the same, and takes what they answer."""
        body = self.seal(attempt, names, phase, payload)
        replies = yield [Request(name, phase, body, reply_bytes(max_payload)) for name in names]
        del body
        self.receive(session, replies, names, take, errors)

    def receive(
        self,
        session: ServerSession | None,
        replies: Iterator[Reply],
        names: Sequence[str],
        take: Callable[[Reply], None],
        errors: Errors,
    ) -> None:
        """Takes replies as they come; what is wrong with one is noted, and who can never answer is gone from the session."""
        now: Errors = {}
        receive(replies, names, take, now.setdefault)
        for site, error in now.items():
            errors.setdefault(site, error)
            if session is not None and isinstance(error, RemoteError) and error.remote_code in _FINAL:
                session.gone.add(session.cohort.number(site))

    def seal(self, attempt: int, names: Sequence[str], phase: str, payload: bytes) -> bytes:
        """A request to these sites."""
        context = Context.of(replace(self.task, attempt=attempt))
        return self.link.seal(context, payload, phase=phase, codec=codec(phase), to=names)

    def answer(self, attempt: int, reply: Reply, phase: str, *, max_payload: int) -> bytes:
        """What a site has answered, opened."""
        context = Context.of(replace(self.task, attempt=attempt))
        return self.link.open(context, reply, phase=phase, codec=codec(phase), max_payload=max_payload)

    def known(self, name: str) -> PublicIdentity:
        """A site's keys by the roster."""
        return self.signed.roster.site(name)

    def caught(self, site: str) -> None:
        """Leaves a proven liar out of the rest of this round and of the next one."""
        for round in (self.task.round, self.task.round + 1):
            self.sessions.exclude(site, round=round, code=DealerLied.code)


def away(requirements: SessionRequirements, names: Collection[str]) -> list[str]:
    """The others of the groups that some of these sites are in."""
    return sorted(frozenset().union(*(g for g in requirements.groups or () if g & frozenset(names))).difference(names))
