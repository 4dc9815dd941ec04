"""Server half: opens a session among the sites that have trained, and gets the sum of their updates or nothing.

"The aggregator, even malicious, learns only the sum over >= t sites of the round, if fewer than 2t-n of the n session sites
collude with it." The sites enforce this (site.py); nothing in this module is trusted.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from fedlora.core.adapter import F32, Update
from fedlora.core.errors import (
    CohortTooSmall,
    DealerLied,
    SessionError,
    UpdateRejected,
    WrongContext,
)
from fedlora.core.events import Event, Report
from fedlora.core.facts import Masked, Rejected
from fedlora.core.facts import Session as SessionFacts
from fedlora.core.messages import Reply, Reveals, Task
from fedlora.core.plan import Plan
from fedlora.core.reader import Reader
from fedlora.formats.signed_roster import SignedRoster
from fedlora.protect import Exchange, Tally
from fedlora.protect.link import ServerLink
from fedlora.protect.secagg.attempt import Attempt, Errors, away, code_of
from fedlora.protect.secagg.gathering import advertised, dealt, gather
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, read_session
from fedlora.protect.secagg.protocol.opening import parse_reveal, reveal_bytes, unmask
from fedlora.protect.secagg.protocol.rings import sum_to_mean
from fedlora.protect.secagg.protocol.votes import ABORT, COMMIT, Delivered, certificate, check_vote, vote_text
from fedlora.protect.secagg.sessions import Ended, ServerSession, SessionStore
from fedlora.protect.secagg.terms import Terms
from fedlora.rules import max_site_weight

log = logging.getLogger(__name__)

_VOTE_BYTES = 33 + SIGNATURE


@dataclass(slots=True, eq=False)
class SecAggServer:
    """One session a round: offer, share, mask, vote, unmask; see FORMAT.md, section 10.

    A server that was killed continues the session that is on its disk. Before the first masked update it may begin a new session
    at any time; afterwards that needs a certificate that the first one has ended, or the round is void.

    Args:
        link: keys and sequence numbers; its sites and roster are replaced by those of the signed roster.
        roster: gives the current signed roster, checked; called once a round, so that a new epoch takes effect in the next round.
        plan: of the run.
        sessions: durable.
        report: gets an event for each step.
    """

    link: ServerLink
    roster: Callable[[], SignedRoster]
    plan: Plan
    sessions: SessionStore
    report: Report = lambda event, facts: None

    @property
    def reveals(self) -> Reveals:
        return "sum"

    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Exchange:
        """Carries the round's session as far as possible in this attempt.

        The tally gets one sum over the sites whose updates are in it, or none; it gets the sites' errors in either case.
        """
        session, ended = None, self.sessions.ended(task)
        stored = self.sessions.roster(task)
        at = self._attempt(task, stored or self.roster())
        scales = at.terms.scales(task)
        asked: list[str] = []
        try:
            if stored:
                numbers = at.terms.numbers(task.reply_layout).size
                session = self.sessions.load(task, at.terms.requirements, at.known, at.terms.profile, numbers=numbers)
                yield from self._go_on(at, session, ended=ended, scales=scales, tally=tally)
                if session.stage == "aborted":
                    at = self._attempt(task, self.roster(), at.errors)
                    session = None
            if session is None and (asked := at.admitted(sites)):
                together = at.whole(asked, at.errors, least=at.terms.requirements.smallest)
                session = yield from self._open(at, together, scales)
                yield from self._go_on(at, session, ended=ended, scales=scales, tally=tally)
        except CohortTooSmall as e:
            for site in session.cohort.names if session is not None else asked:
                at.errors.setdefault(site, e)
        if session is not None and session.stage == "void":
            for site in session.cohort.names:
                at.errors.setdefault(site, SessionError("its session has ended without a sum"))
        for site, error in at.errors.items():
            if session is None or session.stage != "done" or site not in session.names(session.counted):
                tally.reject(site, error)
            else:
                self.report(Event.UNHEARD, Rejected(site=site, code=code_of(error)))  # its update counts

    def _attempt(self, task: Task, signed: SignedRoster, errors: Errors | None = None) -> Attempt:
        roster = signed.roster
        link = replace(self.link, sites=roster.active(), roster=roster.digest())
        terms = Terms.of(self.plan, roster)
        return Attempt(task, link, terms, signed, self.sessions, self.report, {} if errors is None else errors)

    def missing(self, task: Task, sites: Sequence[str]) -> list[str]:
        """Absent members of partly present groups, if too few groups are whole; none once a session has begun."""
        if self.sessions.roster(task):
            return []
        requirements = Terms.of(self.plan, self.roster().roster).requirements
        if len(requirements.whole(sites)) >= requirements.smallest or requirements.groups is None:
            return []
        return away(requirements, sites) or sorted(frozenset().union(*requirements.groups).difference(sites))

    # --- a new session ------------------------------------------------------------------------------------------

    def _open(self, at: Attempt, asked: Sequence[str], scales: F32) -> Generator[Any, Any, ServerSession]:
        cohort = yield from advertised(at, asked, scales)
        at.report(Event.SESSION, SessionFacts(round=at.task.round, sites=cohort.names, threshold=cohort.threshold))
        deals = yield from dealt(at, cohort)
        fewest = at.terms.requirements.fewest_inputs(len(cohort.adverts))
        if len(deals) < fewest:
            raise CohortTooSmall(f"{len(deals)} of {len(cohort.adverts)} sites have dealt their shares, {fewest} are needed")
        at.whole([cohort.advert(n).name for n in deals], {}, least=fewest)  # nothing has been given yet
        session = ServerSession(at.task.round, at.task.kind, cohort, deals, at.task.attempt)
        at.sessions.open(session, at.signed)
        return session

    # --- a session that has begun ---------------------------------------------------------------------------------

    def _go_on(self, at: Attempt, session: ServerSession, *, ended: Ended, scales: F32, tally: Tally) -> Exchange:
        """Carries a session on from its stage to its end, as far as the sites answer."""
        if session.stage == "void":  # and killed before that was noted
            return tally.void(CohortTooSmall("too few sites of the session were left to end it"))
        if session.stage == "mask":
            yield from gather(at, session, ended)
            if session.delivered:
                at.report(Event.MASKED, Masked(round=at.task.round, sites=session.names(session.counted)))
        if session.stage == "vote":
            yield from self._voted(at, session)
            if session.stage == "vote" and self._too_few_left(session, session.votes):
                session.stage = "abort"  # it cannot end with a sum; sites that have not voted are asked to confirm that
        if session.stage == "abort":
            yield from self._aborted(at, session, ended)
        if session.stage == "unmask":
            yield from self._revealed(at, session)
        if session.stage == "done":
            self._tell(at, session, scales, tally)
        elif session.stage != "aborted":
            self._note_failure(session, tally)
            raise CohortTooSmall("too few sites have answered to the end of the session")
        elif session.attempt == at.task.attempt:
            raise CohortTooSmall("the session has ended without a sum; it will be tried anew")

    def _voted(self, at: Attempt, session: ServerSession) -> Exchange:
        text = vote_text(session.cohort.t1, COMMIT, Delivered.digest_of(session.delivered))
        payload = session.cohort.t1 + bytes([COMMIT]) + Delivered.dump_all(session.delivered)
        waiting = [n for n in session.counted if n not in session.votes]
        yield from self._poll(at, session, waiting=waiting, payload=payload, text=text, votes=session.votes)
        if len(session.votes) >= session.cohort.threshold:
            session.stage = "unmask"
        at.sessions.save(session)

    def _aborted(self, at: Attempt, session: ServerSession, ended: Ended) -> Exchange:
        """Asks the sites that have not voted COMMIT to vote ABORT. Enough votes prove to a next session that this one is over."""
        cohort = session.cohort
        text, payload = vote_text(cohort.t1, ABORT), cohort.t1 + bytes([ABORT])
        waiting = [n for n in range(1, len(cohort.adverts) + 1) if n not in session.aborts and n not in session.votes]
        yield from self._poll(at, session, waiting=waiting, payload=payload, text=text, votes=session.aborts)
        if len(session.aborts) >= cohort.threshold:
            session.stage = "aborted"
            ended.append((cohort.t1, certificate(session.aborts)))
            at.sessions.save_ended(at.task, ended)
        at.sessions.save(session)

    def _poll(
        self,
        at: Attempt,
        session: ServerSession,
        *,
        waiting: Sequence[int],
        payload: bytes,
        text: bytes,
        votes: dict[int, bytes],
    ) -> Exchange:
        """Asks these sites for their vote and adds the signatures to ``votes``.

        Args:
            payload: the request; its 33rd byte is the verdict.
            text: what a vote has to sign.
        """

        def take(reply: Reply) -> None:
            reader = Reader(at.open(reply, "vote", max_payload=_VOTE_BYTES, session=session), "vote")
            read_session(reader, session.cohort.t1)
            verdict, signature, number = reader.take(1), reader.take(SIGNATURE), session.cohort.number(reply.site)
            reader.end()
            if verdict != payload[32:33]:
                raise WrongContext("a vote on something else")
            check_vote(signature, text, identity=at.link.sites[reply.site])
            votes[number] = signature

        if waiting:
            names = session.names(waiting)
            yield from at.ask_all("vote", payload, take, names=names, max_payload=_VOTE_BYTES, session=session)

    def _revealed(self, at: Attempt, session: ServerSession) -> Exchange:
        cohort, deals, counted = session.cohort, session.deals, session.counted

        def take(reply: Reply) -> None:
            number = cohort.number(reply.site)
            payload = at.open(reply, "unmask", max_payload=reveal_bytes(deals), session=session)
            parse_reveal(cohort, deals, counted, number, payload)
            session.revealed[number] = payload

        waiting = [n for n in sorted(session.votes) if n not in session.revealed]
        if len(session.revealed) < cohort.threshold:
            payload = cohort.t1 + certificate(session.votes)
            names, most = session.names(waiting), reveal_bytes(deals)
            yield from at.ask_all("unmask", payload, take, names=names, max_payload=most, session=session)
        if len(session.revealed) >= cohort.threshold:
            session.stage = "done"
        at.sessions.save(session)

    def _tell(self, at: Attempt, session: ServerSession, scales: F32, tally: Tally) -> None:
        deals, counted = session.deals, session.counted
        shares = {n: parse_reveal(session.cohort, deals, counted, n, raw) for n, raw in session.revealed.items()}
        vector, numbers = session.vector.copy(), session.numbers.copy()
        try:
            unmask(session.cohort, deals, counted, shares, vector, numbers)
            totals = at.terms.numbers(at.task.reply_layout).unpack(numbers, sites=len(counted))
            weight = self._weight(at, totals.weight, len(counted))
            most = at.terms.most(weight=totals.weight, sites=len(counted)) if at.task.kind == "train" else 0
            mean = sum_to_mean(vector, at.task.reply_layout, at.terms.profile, scales, weight=weight, most=most)
            counters, counted_in_all = dict(totals.counters), totals.counted
            if at.terms.private is not None:
                counted_in_all = totals.weight  # sites count nothing: each weighs 1
            elif at.task.kind == "train":
                values, cut = len(counted) * mean.size, sum(int(n) for n in totals.cut)
                counters |= {"secagg/cut": min(max(cut, 0), values), "secagg/values": values}
            update = Update(mean, totals.weight, counters)
            tally.accept_sum(session.names(counted), update, squares=totals.squares, counted=counted_in_all)
        except DealerLied as e:
            at.caught(e.site)
            at.errors[e.site] = e  # replaces a lesser error of this site
            session.stage = "void"
            tally.void(e)
        except (SessionError, UpdateRejected) as e:  # no site can be blamed
            session.stage = "void"
            tally.void(e)

    def _weight(self, at: Attempt, weight: int, sites: int) -> float:
        """Sum of the weights over the largest weight of one, times :attr:`Terms.divisor`.

        Raises:
            SessionError: not a possible sum of that many weights.
        """
        if at.task.kind == "evaluate":
            return 1.0
        most = at.terms.weight(max_site_weight(self.plan))
        if not sites <= weight <= sites * most:
            raise SessionError("the sum of the weights is none of this many sites", hint="a site has sent numbers out of range")
        return weight / at.terms.max_weight * at.terms.divisor

    def _too_few_left(self, session: ServerSession, votes: Mapping[int, bytes]) -> bool:
        return len(votes) + len([n for n in session.counted if n not in session.gone and n not in votes]) < (
            session.cohort.threshold
        )

    def _note_failure(self, session: ServerSession, tally: Tally) -> None:
        """Makes the round void once the plan's attempts are used up, or if the session can no longer succeed."""
        session.tries += 1
        left = [n for n in session.votes if n not in session.gone and n not in session.revealed]
        hopeless = session.stage == "unmask" and len(session.revealed) + len(left) < session.cohort.threshold
        if hopeless or session.tries >= self.plan.federation.round_attempts:
            session.stage = "void"
            tally.void(CohortTooSmall("too few sites of the session are left to end it"))
        self.sessions.save(session)
