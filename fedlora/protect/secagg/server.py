"""Server half: opens a session among the sites that have trained, and gets the sum of their updates or nothing.

"The aggregator, even malicious, learns only the sum over >= t sites of the round, if fewer than 2t-n of the n session sites
collude with it." The sites enforce this (site.py); nothing in this module is trusted.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeAlias

import numpy as np

from fedlora.core.adapter import F32, Update
from fedlora.core.errors import (
    BadShare,
    BadSignature,
    CohortTooSmall,
    DealerLied,
    FedLoRAError,
    LoneChange,
    RemoteError,
    SessionError,
    UpdateRejected,
    WireError,
    WrongContext,
)
from fedlora.core.events import Event, Report
from fedlora.core.facts import Complaint as ComplaintFacts
from fedlora.core.facts import LoneChange as LoneChangeFacts
from fedlora.core.facts import Masked, Rejected
from fedlora.core.facts import Session as SessionFacts
from fedlora.core.messages import Reply, Request, Reveals, Task
from fedlora.core.plan import Plan
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.protect import Talk, Tally
from fedlora.protect.link import Context, ServerLink, hear, reply_bytes
from fedlora.protect.secagg.book import Book, Ended, ServerSession
from fedlora.protect.secagg.cohort import SIGNATURE, Advert, Cohort, Rules, read_session
from fedlora.protect.secagg.complaints import (
    Complaint,
    dump_complaints,
    dump_opened,
    most_complaint_bytes,
    opened_bytes,
    read_opened,
)
from fedlora.protect.secagg.dealing import Opened
from fedlora.protect.secagg.opening import Deal, deal_bytes, parse_reveal, relay, reveal_bytes, unmask
from fedlora.protect.secagg.rings import packed_bytes, sum_to_mean, unpack
from fedlora.protect.secagg.terms import Offer, Terms, codec
from fedlora.protect.secagg.votes import ABORT, COMMIT, Delivered, certificate, check_vote, vote_text

log = logging.getLogger(__name__)

_ADVERT_BYTES = 4096
_VOTE_BYTES = 33 + SIGNATURE

_LIED_TO = frozenset({BadShare.code})
"""What a site says when what a dealer has signed for it does not open to what that dealer has committed to."""

_FINAL = frozenset({"secrets-gone", "session-spent", "both-secrets", LoneChange.code})
"""What a site says when it can never answer in this session."""

Exchange = Generator[Sequence[Request], Iterator[Reply], None]


Errors: TypeAlias = dict[str, FedLoRAError]
"""Each site's first error, until it is known who counts."""


@dataclass(slots=True, eq=False)
class SecAggServer:
    """One session a round: offer, share, mask, vote, unmask; see FORMAT.md, section 10.

    A server that was killed goes on with the session that it has on the disk. Before the first masked update it may begin anew
    as it likes; afterwards a second session needs a certificate that the first has ended, or the round is void.

    Args:
        link: keys, sequence numbers; sites and roster in it give way to those of the signed roster.
        roster: the signed roster of now, checked; asked for once a round, so that a new epoch holds from the next round on.
        plan: of the run.
        book: durable.
        report: told ``(event, facts)`` about the steps.
    """

    link: ServerLink
    roster: Callable[[], SignedRoster]
    plan: Plan
    book: Book
    report: Report = lambda event, facts: None
    terms: Terms = field(init=False)
    _signed: SignedRoster = field(init=False)

    @property
    def reveals(self) -> Reveals:
        return "sum"

    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Talk:
        """A round's session, as far as it gets in this attempt.

        Gives the tally the sum of the sites whose updates are in it, or nothing. What a site did wrong is told in either case.
        """
        session, ended = None, self.book.ended(task)
        errors: Errors = {}
        stored = self.book.roster(task)
        self._use(stored or self.roster())
        scales = self.terms.scales(task)
        asked: list[str] = []
        try:
            if stored:
                numbers = self.terms.numbers(task.reply_layout).size
                session = self.book.load(task, self.terms.rules, self._known, self.terms.profile, numbers=numbers)
                yield from self._go_on(task, session, ended, scales, tally, errors)
                if session.stage == "aborted":
                    self._use(self.roster())
                    session = None
            if session is None and (asked := self._admitted(task, sites, errors)):
                together = self._whole(asked, errors, least=self.terms.rules.smallest)
                session = yield from self._open(task, together, scales, errors)
                yield from self._go_on(task, session, ended, scales, tally, errors)
        except CohortTooSmall as e:
            for site in session.cohort.names if session is not None else asked:
                errors.setdefault(site, e)
        if session is not None and session.stage == "void":
            for site in session.cohort.names:
                errors.setdefault(site, SessionError("its session has ended without a sum"))
        for site, error in errors.items():
            if session is None or session.stage != "done" or site not in session.names(session.counted):
                tally.reject(site, error)
            else:
                self.report(Event.UNHEARD, Rejected(site=site, code=_code(error)))  # its update counts

    def missing(self, task: Task, sites: Sequence[str]) -> list[str]:
        """The others of groups of which some are at hand, where too few groups are whole; none once a session has begun."""
        if self.book.roster(task):
            return []
        rules = Terms.of(self.plan, self.roster().roster).rules
        if len(rules.whole(sites)) >= rules.smallest or rules.groups is None:
            return []
        return self._away(rules, sites) or sorted(frozenset().union(*rules.groups).difference(sites))

    @staticmethod
    def _away(rules: Rules, names: Collection[str]) -> list[str]:
        return sorted(frozenset().union(*(g for g in rules.groups or () if g & frozenset(names))).difference(names))

    def _whole(self, names: Sequence[str], errors: Errors, *, least: int) -> list[str]:
        """Those of these sites whose groups are there as a whole.

        Raises:
            CohortTooSmall, LoneChange: fewer than ``least``; which would be enough with the others of their groups.
        """
        rules = self.terms.rules
        whole, away = rules.whole(names), self._away(rules, names)
        if len(names) < least:
            raise CohortTooSmall(f"{len(names)} sites are ready, {least} are needed")
        if len(whole) < least:
            self.report(Event.LONE_CHANGE, LoneChangeFacts(sites=sorted(names), missing=away))
            raise LoneChange(
                f"too few of the sites {', '.join(sorted(names))} are in complete groups; "
                f"missing: {', '.join(away) or 'new sites'}",
                hint="bring the other sites of their groups back; `fedlora roster show` prints the groups. Or agree on a plan "
                "and policies with lone_change = 'allow'",
            )
        for name in set(names) - whole:
            errors.setdefault(name, LoneChange(f"left out: {', '.join(away) or 'a site'} of its group is not there"))
        return sorted(whole)

    # --- a new session ------------------------------------------------------------------------------------------

    def _open(self, task: Task, asked: Sequence[str], scales: F32, errors: Errors) -> Generator[Any, Any, ServerSession]:
        cohort = yield from self._advertised(task, asked, scales, errors)
        self.report(Event.SESSION, SessionFacts(round=task.round, sites=cohort.names, threshold=cohort.threshold))
        deals = yield from self._dealt(task, cohort, errors)
        fewest = self.terms.rules.fewest_inputs(len(cohort.adverts))
        if len(deals) < fewest:
            raise CohortTooSmall(f"{len(deals)} of {len(cohort.adverts)} sites have dealt their shares, {fewest} are needed")
        self._whole([cohort.advert(n).name for n in deals], {}, least=fewest)  # nothing has been given yet
        session = ServerSession(task.round, task.kind, cohort, deals, task.attempt)
        self.book.open(session, self._signed)
        return session

    def _advertised(self, task: Task, asked: Sequence[str], scales: F32, errors: Errors) -> Generator[Any, Any, Cohort]:
        phase = "advertise"
        kem = self.link.reply_key.public.kem
        context = self.terms.context(task, scales, self.link.roster, kem)
        adverts: list[Advert] = []

        def take(reply: Reply) -> None:
            payload = self._answer(task, task.attempt, reply, phase, max_payload=_ADVERT_BYTES)
            reader = Reader(payload, "advertisement")
            advert = Advert.read(reader)
            reader.end()
            if advert.name != reply.site:
                raise WrongContext("the advertisement of another site")
            if advert.context != context:
                raise WrongContext("this site has been shown another task, or its roster says other terms")
            advert.verify(self.link.sites[reply.site])
            adverts.append(advert)

        inner = wire.dump_task(task, reply_key=kem)
        offer = Offer(self._signed.dump(), inner).dump()
        body = self.link.seal(Context.of(task), offer, phase=phase, codec=codec(phase), to=asked)
        del offer, inner
        replies = yield [Request(site, phase, body, reply_bytes(_ADVERT_BYTES)) for site in asked]
        del body
        hear(replies, asked, take, errors.setdefault)
        together = self._whole([a.name for a in adverts], errors, least=self.terms.rules.smallest)
        return Cohort.of([a for a in adverts if a.name in together], self.terms.rules)

    def _dealt(self, task: Task, cohort: Cohort, errors: Errors) -> Generator[Any, Any, dict[int, bytes]]:
        deals: dict[int, bytes] = {}

        def take(reply: Reply) -> None:
            number = cohort.number(reply.site)
            payload = self._answer(task, task.attempt, reply, "share", max_payload=deal_bytes(cohort, number))
            deal = Deal.parse(cohort, number, payload)
            try:
                deal.verify(cohort, number, self._known(reply.site))
            except BadSignature:  # in an envelope that it has signed
                self._caught(task, reply.site)
                raise DealerLied(f"{reply.site} has not signed what it deals", site=reply.site) from None
            deals[number] = payload

        most = max(deal_bytes(cohort, cohort.number(name)) for name in cohort.names)
        yield from self._ask_all(task, task.attempt, cohort.names, "share", cohort.dump(), take, errors, max_payload=most)
        return deals

    # --- a session that has begun ---------------------------------------------------------------------------------

    def _go_on(self, task: Task, session: ServerSession, ended: Ended, scales: F32, tally: Tally, errors: Errors) -> Talk:
        if session.stage == "void":  # and killed before that was noted
            return tally.void(CohortTooSmall("too few sites of the session were left to end it"))
        if session.stage == "mask":
            yield from self._masked(task, session, ended, errors)
            if session.delivered:
                self.report(Event.MASKED, Masked(round=task.round, sites=session.names(session.counted)))
        if session.stage == "vote":
            yield from self._voted(task, session, errors)
            if session.stage == "vote" and self._too_few_left(session, session.votes):
                session.stage = "abort"  # it cannot end with a sum; whoever has not voted may say so
        if session.stage == "abort":
            yield from self._aborted(task, session, ended, errors)
        if session.stage == "unmask":
            yield from self._revealed(task, session, errors)
        if session.stage == "done":
            self._tell(task, session, scales, tally, errors)
        elif session.stage != "aborted":
            self._in_vain(session, tally)
            raise CohortTooSmall("too few sites have answered to the end of the session")
        elif session.attempt == task.attempt:
            raise CohortTooSmall("the session has ended without a sum; it will be tried anew")

    def _masked(self, task: Task, session: ServerSession, ended: Ended, errors: Errors) -> Talk:
        """Adds up what comes, one update in memory at a time. After a restart all are asked again, and say the same."""
        cohort, deals = session.cohort, session.deals
        layout, profile = task.reply_layout, self.terms.profile
        vector, numbers = np.zeros(layout.size, profile.word), np.zeros(self.terms.numbers(layout).size, np.uint64)
        packed = packed_bytes(layout.size, profile.bits)
        delivered: dict[int, Delivered] = {}
        limit = 32 + SIGNATURE + numbers.nbytes + packed

        def take(reply: Reply) -> None:
            """Adds it; when it comes a second time, takes it out again."""
            reader = Reader(self._answer(task, session.attempt, reply, "mask", max_payload=limit), "masked update")
            read_session(reader, cohort.t1)
            signature, body = reader.take(SIGNATURE), reader.view(numbers.nbytes + packed)
            reader.end()
            one = Delivered(cohort.number(reply.site), hashlib.sha256(body).digest(), signature)
            one.verify(cohort, self._known)
            words = unpack(body[numbers.nbytes :], layout.size, profile.bits)
            if words is None:
                raise WireError("masked update: the padding is not zero")
            before = delivered.pop(one.number, None)
            if before is None:
                delivered[one.number] = one
            elif before.digest != one.digest:
                delivered[one.number] = before
                raise WireError("masked update: not the one that it sent before")
            combine = np.add if before is None else np.subtract
            combine(vector, words, out=vector)
            combine(numbers, np.frombuffer(body[: numbers.nbytes], "<u8"), out=numbers)

        first: Errors = {}
        dealt = self.terms.rules.whole(session.names(sorted(deals)))  # the others would refuse: theirs are not all there
        shown: dict[int, Mapping[int, Opened]] = {n: {} for n in deals if cohort.advert(n).name in dealt}
        yield from self._ask_masked(task, session, ended, shown, deals, take, first, limit)
        complaining = [s for s, e in first.items() if isinstance(e, RemoteError) and e.remote_code in _LIED_TO]
        for site in first.keys() - set(complaining):
            errors.setdefault(site, first[site])
        lied = False
        if complaining:
            settled = yield from self._settle(task, session, complaining, deals, errors)
            lied = settled is None
            for site in complaining:
                if settled is not None and cohort.number(site) not in settled:
                    errors.setdefault(site, first[site])
            if settled:
                yield from self._ask_masked(task, session, ended, settled, deals, take, errors, limit)
                shown |= settled
        together = self._whole(session.names(sorted(delivered)), errors, least=0)
        alone = [n for n in sorted(delivered) if cohort.advert(n).name not in together]
        if alone and not lied and len(together) >= self.terms.rules.fewest_inputs(len(cohort.adverts)):
            yield from self._ask_masked(task, session, ended, {n: shown[n] for n in alone}, deals, take, errors, limit)
        del deals
        session.delivered = sorted(delivered.values(), key=lambda d: d.number)
        if lied or not self._enough(session):
            session.stage = "abort"
        else:
            session.stage, session.vector, session.numbers = "vote", vector, numbers
            self.book.save_sum(session)
        self.book.save(session)

    def _ask_masked(
        self,
        task: Task,
        session: ServerSession,
        ended: Ended,
        settled: Mapping[int, Mapping[int, Opened]],
        deals: Mapping[int, Deal],
        take: Callable[[Reply], None],
        errors: Errors,
        limit: int,
    ) -> Exchange:
        """Asks these holders for their masked updates, with what was shown to them after a complaint."""
        head = bytes([len(ended)]) + b"".join(t1 + proof for t1, proof in ended)
        requests = []
        for number in sorted(settled):
            (name,) = session.names([number])
            payload = head + dump_opened(session.cohort, settled[number]) + relay(session.cohort, deals, number)
            body = self._seal(task, session.attempt, [name], "mask", payload)
            requests.append(Request(name, "mask", body, reply_bytes(limit)))
        replies = yield requests
        names = [r.site for r in requests]
        del requests
        self._hear(session, replies, names, take, errors)

    def _settle(
        self, task: Task, session: ServerSession, complaining: Sequence[str], deals: Mapping[int, Deal], errors: Errors
    ) -> Generator[Any, Any, dict[int, dict[int, Opened]] | None]:
        """Has dealers show what they dealt to the sites that say it does not open.

        Returns:
            By holder and dealer what was shown. None: a dealer has not shown what it has signed for; the session has to be ended,
            and tried anew without that dealer.
        """
        cohort, complaints = session.cohort, dict[int, Complaint]()

        def hear_complaint(reply: Reply) -> None:
            payload = self._answer(task, session.attempt, reply, "complain", max_payload=most_complaint_bytes(cohort))
            reader = Reader(payload, "complaint")
            one = Complaint.read(reader, cohort)
            reader.end()
            if cohort.advert(one.holder).name != reply.site:
                raise WrongContext("the complaint of another site")
            one.verify(cohort, self._known)
            if any(d not in deals or deals[d].dealt[one.holder].statement != said for d, said in one.lies.items()):
                raise WrongContext("a complaint about something else than what was relayed")
            complaints[one.holder] = one

        requests = []
        for name in complaining:
            body = self._seal(task, session.attempt, [name], "complain", relay(cohort, deals, cohort.number(name)))
            requests.append(Request(name, "complain", body, reply_bytes(most_complaint_bytes(cohort))))
        replies = yield requests
        self._hear(session, replies, complaining, hear_complaint, errors)
        settled: dict[int, dict[int, Opened]] = {holder: {} for holder in complaints}
        by_dealer = {d: [c for _, c in sorted(complaints.items()) if d in c.lies] for d in deals}
        by_dealer = {d: found for d, found in by_dealer.items() if found}
        for dealer, found in by_dealer.items():
            holders = session.names([c.holder for c in found])
            self.report(Event.COMPLAINT, ComplaintFacts(about=cohort.advert(dealer).name, sites=holders))
        liars: Errors = {}
        most = self.terms.rules.max_colluding  # this many may lie about a dealer, which answers no more complaints

        def hear_opened(reply: Reply) -> None:
            dealer = cohort.number(reply.site)
            due = {c.holder: deals[dealer].dealt[c.holder].commitments for c in by_dealer[dealer][:most]}
            payload = self._answer(task, session.attempt, reply, "open", max_payload=opened_bytes(len(due)))
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
            body = self._seal(task, session.attempt, [name], "open", dump_complaints(cohort, found[:most]))
            requests.append(Request(name, "open", body, reply_bytes(opened_bytes(most))))
        replies = yield requests
        self._hear(session, replies, [r.site for r in requests], hear_opened, errors)
        for name in liars:
            self._caught(task, name)
        silent = {d for d, found in by_dealer.items() if any(d not in settled[c.holder] for c in found)}
        for dealer in silent:
            name = cohort.advert(dealer).name
            if name not in liars:
                self.book.exclude(name, round=task.round, code="complaint-unanswered")
                errors[name] = SessionError(
                    "it did not show what it had dealt to a site that says it does not open", code="complaint-unanswered"
                )
        return None if silent else settled

    def _caught(self, task: Task, site: str) -> None:
        """Leaves a proven liar out of the rest of this round and of the next one."""
        for round in (task.round, task.round + 1):
            self.book.exclude(site, round=round, code=DealerLied.code)

    def _enough(self, session: ServerSession) -> bool:
        """Whether the sites may agree to the sum of what was delivered."""
        rules, names = self.terms.rules, session.names(session.counted)
        whole = len(rules.whole(names)) == len(names)
        return whole and len(names) >= rules.fewest_inputs(len(session.cohort.adverts))

    def _voted(self, task: Task, session: ServerSession, errors: Errors) -> Talk:
        text = vote_text(session.cohort.t1, COMMIT, Delivered.digest_of(session.delivered))
        payload = session.cohort.t1 + bytes([COMMIT]) + Delivered.dump_all(session.delivered)
        waiting = [n for n in session.counted if n not in session.votes]
        yield from self._poll(task, session, waiting, payload, text, session.votes, errors)
        if len(session.votes) >= session.cohort.threshold:
            session.stage = "unmask"
        self.book.save(session)

    def _aborted(self, task: Task, session: ServerSession, ended: Ended, errors: Errors) -> Talk:
        """Asks for ABORT whoever has not said COMMIT: with enough of both, a second session proves that the first is over."""
        cohort = session.cohort
        text, payload = vote_text(cohort.t1, ABORT), cohort.t1 + bytes([ABORT])
        waiting = [n for n in range(1, len(cohort.adverts) + 1) if n not in session.aborts and n not in session.votes]
        yield from self._poll(task, session, waiting, payload, text, session.aborts, errors)
        if len(session.aborts) >= cohort.threshold:
            session.stage = "aborted"
            ended.append((cohort.t1, certificate(session.aborts)))
            self.book.save_ended(task, ended)
        self.book.save(session)

    def _poll(
        self,
        task: Task,
        session: ServerSession,
        waiting: Sequence[int],
        payload: bytes,
        text: bytes,
        votes: dict[int, bytes],
        errors: Errors,
    ) -> Talk:
        def take(reply: Reply) -> None:
            reader = Reader(self._answer(task, session.attempt, reply, "vote", max_payload=_VOTE_BYTES), "vote")
            read_session(reader, session.cohort.t1)
            verdict, signature, number = reader.take(1), reader.take(SIGNATURE), session.cohort.number(reply.site)
            reader.end()
            if verdict != payload[32:33]:
                raise WrongContext("a vote on something else")
            check_vote(signature, text, identity=self.link.sites[reply.site])
            votes[number] = signature

        if waiting:
            names = session.names(waiting)
            yield from self._ask_all(
                task, session.attempt, names, "vote", payload, take, errors, session, max_payload=_VOTE_BYTES
            )

    def _revealed(self, task: Task, session: ServerSession, errors: Errors) -> Talk:
        cohort, deals, counted = session.cohort, session.deals, session.counted

        def take(reply: Reply) -> None:
            number = cohort.number(reply.site)
            payload = self._answer(task, session.attempt, reply, "unmask", max_payload=reveal_bytes(deals))
            parse_reveal(cohort, deals, counted, number, payload)
            session.revealed[number] = payload

        waiting = [n for n in sorted(session.votes) if n not in session.revealed]
        if len(session.revealed) < cohort.threshold:
            payload = cohort.t1 + certificate(session.votes)
            names, most = session.names(waiting), reveal_bytes(deals)
            yield from self._ask_all(task, session.attempt, names, "unmask", payload, take, errors, session, max_payload=most)
        if len(session.revealed) >= cohort.threshold:
            session.stage = "done"
        self.book.save(session)

    def _tell(self, task: Task, session: ServerSession, scales: F32, tally: Tally, errors: Errors) -> None:
        deals, counted = session.deals, session.counted
        shares = {n: parse_reveal(session.cohort, deals, counted, n, raw) for n, raw in session.revealed.items()}
        vector, numbers = session.vector.copy(), session.numbers.copy()
        try:
            unmask(session.cohort, deals, counted, shares, vector, numbers)
            totals = self.terms.numbers(task.reply_layout).unpack(numbers, sites=len(counted))
            weight = self._weight(task, totals.weight, len(counted))
            most = self.terms.most(weight=totals.weight, sites=len(counted)) if task.kind == "train" else 0
            mean = sum_to_mean(vector, task.reply_layout, self.terms.profile, scales, weight=weight, most=most)
            metrics = dict(totals.metrics)
            if task.kind == "train":
                metrics["secagg/cut"] = int(totals.cut.sum()) / (len(counted) * mean.size)
            update = Update(mean, totals.weight, metrics)
            tally.accept_sum(session.names(counted), update, squares=totals.squares, counted=totals.counted)
        except DealerLied as e:
            self._caught(task, e.site)
            errors[e.site] = e  # worse than whatever else it did
            session.stage = "void"
            tally.void(e)
        except (SessionError, UpdateRejected) as e:  # whose fault it is nobody can tell
            session.stage = "void"
            tally.void(e)

    def _weight(self, task: Task, weight: int, sites: int) -> float:
        """Sum of the weights over the largest weight of one.

        Raises:
            SessionError: not a possible sum of that many weights.
        """
        if task.kind == "evaluate":
            return 1.0
        if not sites <= weight <= sites * self.terms.max_weight:
            raise SessionError(
                "the sum of the weights is not possible for this many sites", hint="a site has sent numbers out of range"
            )
        return weight / self.terms.max_weight

    def _too_few_left(self, session: ServerSession, votes: Mapping[int, bytes]) -> bool:
        return len(votes) + len([n for n in session.counted if n not in session.gone and n not in votes]) < (
            session.cohort.threshold
        )

    def _in_vain(self, session: ServerSession, tally: Tally) -> None:
        """After as many attempts as the plan gives a round, or if it can never be done: the round is void."""
        session.tries += 1
        left = [n for n in session.votes if n not in session.gone and n not in session.revealed]
        hopeless = session.stage == "unmask" and len(session.revealed) + len(left) < session.cohort.threshold
        if hopeless or session.tries >= self.plan.federation.round_attempts:
            session.stage = "void"
            tally.void(CohortTooSmall("too few sites of the session are left to end it"))
        self.book.save(session)

    # --- asking ---------------------------------------------------------------------------------------------------

    def _ask_all(
        self,
        task: Task,
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
        body = self._seal(task, attempt, names, phase, payload)
        replies = yield [Request(name, phase, body, reply_bytes(max_payload)) for name in names]
        del body
        self._hear(session, replies, names, take, errors)

    def _hear(
        self,
        session: ServerSession | None,
        replies: Iterator[Reply],
        names: Sequence[str],
        take: Callable[[Reply], None],
        errors: Errors,
    ) -> None:
        now: Errors = {}
        hear(replies, names, take, now.setdefault)
        for site, error in now.items():
            errors.setdefault(site, error)
            if session is not None and isinstance(error, RemoteError) and error.remote_code in _FINAL:
                session.gone.add(session.cohort.number(site))

    def _seal(self, task: Task, attempt: int, names: Sequence[str], phase: str, payload: bytes) -> bytes:
        context = Context.of(replace(task, attempt=attempt))
        return self.link.seal(context, payload, phase=phase, codec=codec(phase), to=names)

    def _answer(self, task: Task, attempt: int, reply: Reply, phase: str, *, max_payload: int) -> bytes:
        context = Context.of(replace(task, attempt=attempt))
        return self.link.open(context, reply, phase=phase, codec=codec(phase), max_payload=max_payload)

    def _known(self, name: str) -> PublicIdentity:
        return self._signed.roster.site(name)

    def _use(self, signed: SignedRoster) -> None:
        roster = signed.roster
        self._signed, self.terms = signed, Terms.of(self.plan, roster)
        self.link = replace(self.link, sites=roster.active(), roster=roster.digest())

    def _admitted(self, task: Task, sites: Sequence[str], errors: Errors) -> list[str]:
        """Those that may take part. Who was caught is left out, unless too few would be left: else one lie would stop a run."""
        rules, admitted, caught = self.terms.rules, list[str](), Errors()
        for site in sites:
            try:
                self._signed.roster.site(site)
            except FedLoRAError as e:
                errors.setdefault(site, e)
                continue
            code = self.book.excluded(site, round=task.round)
            if code == DealerLied.code:
                caught[site] = DealerLied("left out: what it dealt is not what it had signed for", site=site)
            elif code:
                caught[site] = SessionError(
                    "left out of this round: it did not show what it had dealt to a site that complained",
                    code="complaint-unanswered",
                )
            else:
                admitted.append(site)
        if caught and len(rules.whole(admitted)) < rules.smallest <= len(rules.whole([*admitted, *caught])):
            return [site for site in sites if site in caught or site in admitted]
        for site, error in caught.items():
            errors.setdefault(site, error)
        return admitted


def _code(error: FedLoRAError) -> str:
    return error.remote_code if isinstance(error, RemoteError) else error.code
