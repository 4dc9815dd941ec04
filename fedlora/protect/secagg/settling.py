"""Settles complaints: a dealer shows the shares that it dealt to a site which cannot open them. FORMAT.md, 10.4."""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any

from fedlora.core.errors import (
    BadShare,
    DealerLied,
    SessionError,
    WireError,
    WrongContext,
)
from fedlora.core.events import Event
from fedlora.core.facts import Complaint as ComplaintFacts
from fedlora.core.messages import Reply, Request
from fedlora.core.reader import Reader
from fedlora.protect.link import reply_bytes
from fedlora.protect.secagg.attempt import Attempt, Errors
from fedlora.protect.secagg.protocol.complaints import (
    Complaint,
    dump_complaints,
    most_complaint_bytes,
    opened_bytes,
    read_opened,
)
from fedlora.protect.secagg.protocol.dealing import Opened
from fedlora.protect.secagg.protocol.opening import Deal, relay
from fedlora.protect.secagg.sessions import ServerSession


def _complaints(
    at: Attempt, session: ServerSession, complaining: Sequence[str], deals: Mapping[int, Deal]
) -> Generator[Any, Any, dict[int, Complaint]]:
    """The complaints, by complaining site: dealers whose shares do not match their commitments. Each is checked."""
    cohort, complaints = session.cohort, dict[int, Complaint]()

    def receive_complaint(reply: Reply) -> None:
        payload = at.open(reply, "complain", max_payload=most_complaint_bytes(len(cohort.adverts)), session=session)
        reader = Reader(payload, "complaint")
        one = Complaint.read(reader, cohort)
        reader.end()
        if cohort.advert(one.holder).name != reply.site:
            raise WrongContext("the complaint of another site")
        one.verify(cohort, at.known)
        if any(d not in deals or deals[d].dealt[one.holder].statement != said for d, said in one.lies.items()):
            raise WrongContext("a complaint about something else than what was relayed")
        complaints[one.holder] = one

    requests = []
    for name in complaining:
        body = at.seal("complain", relay(cohort, deals, cohort.number(name)), names=[name], session=session)
        requests.append(Request(name, "complain", body, reply_bytes(most_complaint_bytes(len(cohort.adverts)))))
    replies = yield requests
    at.receive(replies, receive_complaint, names=complaining, errors=at.errors, session=session)
    return complaints


def settle(
    at: Attempt, session: ServerSession, complaining: Sequence[str], deals: Mapping[int, Deal]
) -> Generator[Any, Any, dict[int, dict[int, Opened]] | None]:
    """Asks dealers to show the shares that they dealt to the sites which complain.

    Returns:
        What was shown, by holder and dealer. None: a dealer has not shown what it had signed, or more sites complain of it than
        can be in league; the session must end and be tried again without that dealer.
    """
    cohort, complaints = session.cohort, (yield from _complaints(at, session, complaining, deals))
    settled: dict[int, dict[int, Opened]] = {holder: {} for holder in complaints}
    by_dealer = {d: [c for _, c in sorted(complaints.items()) if d in c.lies] for d in deals}
    by_dealer = {d: found for d, found in by_dealer.items() if found}
    for dealer, found in by_dealer.items():
        holders = session.names([c.holder for c in found])
        at.report(Event.COMPLAINT, ComplaintFacts(about=cohort.advert(dealer).name, sites=holders))
    liars: Errors = {}
    most = at.terms.requirements.max_colluding  # this many may lie about a dealer; one more says the truth
    for dealer, found in by_dealer.items():
        if len(found) > most:
            name = cohort.advert(dealer).name
            liars[name] = DealerLied(f"what it dealt does not open at {len(found)} sites, more than can be in league", site=name)
    at.errors.update(liars)

    def receive_opened(reply: Reply) -> None:
        dealer = cohort.number(reply.site)
        due = {c.holder: deals[dealer].dealt[c.holder].commitments for c in by_dealer[dealer]}
        payload = at.open(reply, "open", max_payload=opened_bytes(len(due)), session=session)
        try:
            shown = read_opened(cohort, dealer, payload, due)
        except (BadShare, WireError) as e:
            liars[reply.site] = DealerLied(str(e), site=reply.site)
            raise liars[reply.site] from None
        for holder, one in shown.items():
            settled[holder][dealer] = one

    requests = []
    for dealer, found in by_dealer.items():
        (name,) = session.names([dealer])
        if name in liars:
            continue
        body = at.seal("open", dump_complaints(cohort, found), names=[name], session=session)
        requests.append(Request(name, "open", body, reply_bytes(opened_bytes(most))))
    replies = yield requests
    at.receive(replies, receive_opened, names=[r.site for r in requests], errors=at.errors, session=session)
    for name in liars:
        at.caught(name)
    silent = {d for d, found in by_dealer.items() if any(d not in settled[c.holder] for c in found)}
    for dealer in silent:
        name = cohort.advert(dealer).name
        if name not in liars:
            at.sessions.exclude(name, round=at.task.round, code="complaint-unanswered")
            at.errors[name] = SessionError(
                "it did not show what it had dealt to a site that says it does not open", code="complaint-unanswered"
            )
    return None if silent else settled
