"""One attempt of a round at the server: its task and roster, and how a step sends requests and takes replies."""

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
from fedlora.core.facts import Rejected
from fedlora.core.messages import Reply, Request, Task
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.protect import Exchange
from fedlora.protect.link import Context, ServerLink, receive, reply_bytes
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.sessions import ServerSession, SessionStore
from fedlora.protect.secagg.terms import Terms, codec

_FINAL = frozenset({"secrets-gone", "session-spent", "both-secrets", LoneChange.code})
"""Codes of a site that can never answer in this session again."""


Errors: TypeAlias = dict[str, FedLoRAError]
"""Each site's first error. Errors are reported at the end, when it is known whose updates count."""


@dataclass(frozen=True, slots=True, eq=False)
class Attempt:
    """One attempt.

    Attributes:
        link: keys and sequence numbers, with the sites of ``signed``.
        terms: of the plan under ``signed``.
        signed: the roster, checked.
        sessions: durable.
        report: gets an event for each step.
        errors: see :data:`Errors`.
    """

    task: Task
    link: ServerLink
    terms: Terms
    signed: SignedRoster
    sessions: SessionStore
    report: Report
    errors: Errors = field(default_factory=dict)

    def admitted(self, sites: Sequence[str]) -> list[str]:
        """The sites that may take part. Proven liars are left out, but not if too few sites would remain."""
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
                caught[site] = dropped_out() if code == dropped_out().code else _unanswered()
            else:
                admitted.append(site)
        if caught and len(requirements.whole(admitted)) < requirements.smallest <= len(requirements.whole([*admitted, *caught])):
            return [site for site in sites if site in caught or site in admitted]
        for site, error in caught.items():
            self.errors.setdefault(site, error)
        return admitted

    def whole(self, names: Sequence[str], errors: Errors, *, least: int) -> list[str]:
        """The sites among these whose whole group is among these.

        Raises:
            CohortTooSmall: fewer than ``least`` sites.
            LoneChange: enough sites, but fewer than ``least`` of them in whole groups.
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
        phase: str,
        payload: bytes,
        take: Callable[[Reply], None],
        *,
        names: Sequence[str],
        max_payload: int,
        session: ServerSession | None = None,
    ) -> Exchange:
        """Sends one request to all these sites, under the attempt of ``session`` if there is one, and takes their replies."""
        body = self.seal(phase, payload, names=names, session=session)
        replies = yield [Request(name, phase, body, reply_bytes(max_payload)) for name in names]
        del body
        self.receive(replies, take, names=names, errors=self.errors, session=session)

    def receive(
        self,
        replies: Iterator[Reply],
        take: Callable[[Reply], None],
        *,
        names: Sequence[str],
        errors: Errors,
        session: ServerSession | None,
    ) -> None:
        """Takes replies as they come and collects their errors; a site that can never answer again is gone from the session."""
        now: Errors = {}
        receive(replies, names, take, self.noting(now))
        for site, error in now.items():
            errors.setdefault(site, error)
            if session is not None and isinstance(error, RemoteError) and error.remote_code in _FINAL:
                session.gone.add(session.cohort.number(site))

    def noting(self, errors: Errors) -> Callable[[str, FedLoRAError], object]:
        """Keeps a site's first error, and reports it at once: its round may last until a deadline without it."""

        def note(site: str, error: FedLoRAError) -> None:
            if site not in errors:
                self.report(Event.ERRED, Rejected(site=site, code=code_of(error)))
            errors.setdefault(site, error)

        return note

    def seal(self, phase: str, payload: bytes, *, names: Sequence[str], session: ServerSession | None) -> bytes:
        """A request to these sites."""
        return self.link.seal(self._context(session), payload, phase=phase, codec=codec(phase), to=names)

    def open(self, reply: Reply, phase: str, *, max_payload: int, session: ServerSession | None = None) -> bytes:
        """The payload of a site's reply."""
        return self.link.open(self._context(session), reply, phase=phase, codec=codec(phase), max_payload=max_payload)

    def _context(self, session: ServerSession | None) -> Context:
        """A session goes on under the attempt in which it began."""
        return Context.of(self.task if session is None else replace(self.task, attempt=session.attempt))

    def known(self, name: str) -> PublicIdentity:
        """A site's keys on the roster."""
        return self.signed.roster.site(name)

    def caught(self, site: str) -> None:
        """Excludes a site that has provably lied from the rest of the run."""
        self.sessions.expel(site, code=DealerLied.code)


def dropped_out() -> SessionError:
    """The error of a site that gave no update to a session that could not end without it."""
    return SessionError("it gave no update to a session that could not end without it", code="dropped-out")


def _unanswered() -> SessionError:
    return SessionError(
        "left out of this round: it did not show what it had dealt to a site that complained", code="complaint-unanswered"
    )


def code_of(error: FedLoRAError) -> str:
    """The code of a site's error, as it has said it."""
    return error.remote_code if isinstance(error, RemoteError) else error.code


def away(requirements: SessionRequirements, names: Collection[str]) -> list[str]:
    """The absent members of the groups that some of these sites belong to."""
    return sorted(frozenset().union(*(g for g in requirements.groups or () if g & frozenset(names))).difference(names))
