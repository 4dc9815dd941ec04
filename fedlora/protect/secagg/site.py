"""Site half: trains, then takes part in the session, and refuses everything that could reveal more than the sum."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from fedlora.core.adapter import F32, Update
from fedlora.core.errors import BadShare, SessionError, WireError, WrongContext
from fedlora.core.messages import Request, Task
from fedlora.core.plan import Plan, parse_plan
from fedlora.core.reader import Reader
from fedlora.formats.envelope import Header, match
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.roster import Roster
from fedlora.formats.trust import RosterKeeper
from fedlora.protect.ledger import Base, Contribution, ContributionStore
from fedlora.protect.link import SiteLink
from fedlora.protect.mode import check_mode
from fedlora.protect.sealed import check_task
from fedlora.protect.secagg.encoding import encode_update, work_key
from fedlora.protect.secagg.giving import check_deliveries, masked, reveal
from fedlora.protect.secagg.protocol.cohort import Advert, Cohort, SessionRequirements, read_session
from fedlora.protect.secagg.protocol.complaints import Complaint, dump_opened, read_complaints, read_settled
from fedlora.protect.secagg.protocol.dealing import Inbox, Opened, Received, Secrets, advertise, deal, opened, receive
from fedlora.protect.secagg.protocol.lengths import most_request_bytes
from fedlora.protect.secagg.protocol.votes import (
    ABORT,
    BURNED,
    COMMIT,
    Delivered,
    check_certificate,
    read_certificate,
    sign_vote,
    vote_text,
)
from fedlora.protect.secagg.records import Encoded, Records, Session, Used
from fedlora.protect.secagg.settings import measure
from fedlora.protect.secagg.terms import Offer, Terms, codec

log = logging.getLogger(__name__)

_Step: TypeAlias = Callable[[bytes, Records, Session], bytes | memoryview]


@dataclass(slots=True, eq=False)
class SecAggSite:
    """Takes part in one session a round.

    It refuses, whatever the server asks for: a cohort that is too small or has a site that is not on its roster; a second masked
    update in one round, unless a certificate proves that the first session ended without a sum; a set of updates that lacks its
    own, is too small, is not signed, or could reveal one site's update beside earlier sums of any run; a second vote; both kinds
    of share of one site. It refuses them after a restart, too.

    Args:
        link: keys, the pinned server, sequence numbers.
        roster: its peers, and the minimum requirements of a session.
        entropy: n random bytes.
        uncovers: a plan's digest -> sites whose update it may reveal beside earlier sums, as a person here has agreed.
    """

    link: SiteLink
    roster: RosterKeeper
    entropy: Callable[[int], bytes]
    uncovers: Callable[[str], Collection[str]] = lambda plan: ()
    _run: str = field(default="", init=False)  # of the fields below, which are caches of records on the disk
    _encoded: Encoded | None = field(default=None, init=False)
    _cohort: Cohort | None = field(default=None, init=False)
    _inbox: tuple[bytes, Inbox] | None = field(default=None, init=False)  # t1; saves opening the shares again

    def answer(self, request: Request, work: Callable[[Task], Update]) -> bytes:
        """See :class:`fedlora.protect.SiteProtection`; the phase of the request is the step of the session.

        Raises:
            SessionError: the session does not allow this request; the code says why.
        """
        steps: dict[str, _Step] = {
            "share": self._share,
            "mask": self._mask,
            "complain": self._complain,
            "open": self._open,
            "vote": self._vote,
            "unmask": self._unmask,
        }
        if request.phase == "advertise":  # an offer brings the roster itself
            return self._advertise(*self._open_offer(request), work)
        if request.phase not in steps:
            raise WrongContext("no phase of this protection", code="wrong-direction")
        roster, most = self.roster.current.digest(), most_request_bytes(request.phase, len(self.roster.current.sites))
        header, payload = self.link.open(request, codec=codec(request.phase), roster=roster, max_payload=most)
        self.roster.check_time()
        session = (records := self._records(header.run)).session()
        if session is None or (session.round, session.attempt) != (header.round, header.attempt):
            raise SessionError("no session of this round and attempt is open here", code="secrets-gone")
        return self._reply(header, session.reply_key, steps[request.phase](payload, records, session))

    def _records(self, run: str) -> Records:
        if run != self._run:
            self._run, self._encoded, self._cohort, self._inbox = run, None, None, None
        return Records.of_part(self.link.memory, run, self.link.identity, self.entropy)

    def _reply(self, header: Header, reply_key: bytes, payload: bytes | memoryview) -> bytes:
        self.roster.check_time()  # a step takes its time, too
        to = self.link.reply_key(reply_key)
        return self.link.seal(header, payload, codec=codec(header.phase), n_params=header.n_params, to=to)

    @property
    def _name(self) -> str:
        return self.link.identity.name

    def _known(self, name: str) -> PublicIdentity:
        return self.roster.current.site(name)

    # --- train, then advertise --------------------------------------------------------------------------------

    def _open_offer(self, request: Request) -> tuple[Header, Records, Roster, Task, bytes]:
        """A genuine offer, opened. Its bytes, as many as the adapter's, are gone when this returns."""
        header, payload = self.link.open(request, codec=codec("advertise"), roster=None)
        records, offer = self._records(header.run), Offer.parse(payload)
        roster = self.roster.take(offer.roster).roster
        match(header, roster=roster.digest())
        roster.site(self._name)  # revoked: nothing is trained any more
        task, key = offer.open_task()
        check_task(header, task, key, phase="advertise")
        return header, records, roster, task, key

    def _advertise(
        self, header: Header, records: Records, roster: Roster, task: Task, key: bytes, work: Callable[[Task], Update]
    ) -> bytes:
        self.link.reply_key(key)  # an invalid key is refused before hours of training
        plan = parse_plan(task.plan)
        check_mode(plan, "secagg")
        used = records.used()
        if used is not None and task.round < used.round:
            raise WrongContext(
                f"round {task.round} is over; this site has sent its update of round {used.round}", code="wrong-round"
            )
        terms = Terms.of(plan, roster)
        contribution = self._contribution(terms.requirements, plan)
        base = Base.of(plan)
        self._compare(contribution, base, task.plan_digest)  # before anything is trained
        scales = terms.scales(task)
        context = terms.context(task, scales, roster.digest(), key)
        session = records.session()
        if session is not None and session.root and session.context != context:
            # It will never end: its secrets must not be opened later, and what is encoded now must not be masked in it.
            self._forget(records, session)
        self._encoded = self._encode(task, terms, scales, records, work)
        self.roster.check_time()  # hours may have passed
        evaluation = terms.numbers(task.reply_layout).evaluation
        measured = bool(self._encoded.numbers[evaluation].any())
        records.end_other_runs()  # not before the run was admitted, with the work
        session = records.session()
        if session is None or (session.context, session.measured) != (context, measured) or session.t1 or not session.root:
            # Never the same keys in two sessions: the server may have lost the first one, or try to get them used twice.
            own = {"root": self.entropy(32), "evaluation": evaluation, "measured": measured}
            session = Session.begin(task, terms, base, contribution, context=context, reply_key=key, **own)
            records.save_session(session)
        return self._reply(header, key, self._advert(session).dump())

    def _encode(self, task: Task, terms: Terms, scales: F32, records: Records, work: Callable[[Task], Update]) -> Encoded:
        key, self._encoded = work_key(task, scales), None  # an earlier round's goes before this one is trained
        update = work(task)  # from the journal if it has been done
        if (known := records.encoded()) is not None and known.key == key:
            return known
        made = encode_update(task, terms, scales, update, identity=self.link.identity)
        records.save_encoded(made)
        return made

    def _advert(self, session: Session) -> Advert:
        secrets, key = Secrets(session.root), self.link.identity.signing
        return advertise(self._name, session.context, secrets, key=key, measured=session.measured)

    # --- the session ----------------------------------------------------------------------------------------------

    def _share(self, payload: bytes, records: Records, session: Session) -> bytes:
        cohort = Cohort.parse(payload, session.requirements, self._known)
        own = cohort.number(self._name)
        if cohort.advert(own) != self._advert(session):
            raise WrongContext("this site's own advertisement is not the one that it made")
        if session.t1 and session.t1 != cohort.t1:
            raise SessionError("these keys are bound to a session with other sites", code="session-spent")
        if not session.t1:
            records.save_blob("cohort", payload)
            records.save_session(session.but(t1=cohort.t1))
        self._cohort = cohort
        return deal(cohort, own, Secrets(session.root), key=self.link.identity.signing)

    def _mask(self, payload: bytes, records: Records, session: Session) -> memoryview:
        """The request: number of certificates (u8) | per certificate: the session's name (32), votes | what dealers have shown to
        this site after a complaint, see :func:`dump_opened` | the relayed deals."""
        cohort = self._open_cohort(records, session)
        own, reader = cohort.number(self._name), Reader(payload, "mask")
        ended = {reader.take(32): read_certificate(reader) for _ in range(reader.take(1)[0])}
        settled = read_settled(cohort, own, reader)
        used = records.used()
        if used is not None and used.round == session.round and used.t1 != cohort.t1.hex():
            t1 = bytes.fromhex(used.t1)
            if t1 not in ended:
                raise SessionError(
                    "this site has given its update of this round to another session, and nothing proves that that session ended",
                    code="session-spent",
                )
            text = vote_text(t1, ABORT)
            check_certificate(ended[t1], text, names=used.names, threshold=used.threshold, known=self._known)
        if session.verdict:
            raise SessionError("this site has voted in this session; it masks nothing more", code="session-spent")
        relayed = reader.rest()
        if session.digest and relayed != records.blob("relay"):
            raise SessionError("this site has masked its update for another set of sites; it does so once", code="session-spent")
        dealers = self._open_inbox(cohort, session, relayed=relayed, settled=settled).shares.keys()
        group = session.requirements.group_of(self._name)
        if not session.digest:
            session.requirements.check_whole((group or frozenset()) & {cohort.advert(n).name for n in dealers})
            contribution = None if session.contribution is None else Contribution.parse(session.contribution)
            base = Base(session.model, session.base)
            self._compare(contribution, base, session.plan)
        out, digest = self._masked(cohort, session, records, relayed=relayed, settled=settled)
        if session.digest and digest != session.digest:
            raise SessionError("what this site has sent can not be made again", code="session-spent")
        if not session.digest:
            # On the disk before it is sent. The ledger first: an entry too many is safe, a missing one is not.
            given = self._given()
            given.save(given.load().after(base, contribution))
            records.save_used(Used(session.round, cohort.t1.hex(), digest.hex(), cohort.names, cohort.threshold))
            records.save_blob("relay", relayed)
            records.save_blob("settled", dump_opened(cohort, settled))
            records.save_session(session.but(digest=digest))
        return out

    def _masked(
        self, cohort: Cohort, session: Session, records: Records, *, relayed: bytes, settled: Mapping[int, Opened]
    ) -> tuple[memoryview, bytes]:
        inbox = self._open_inbox(cohort, session, relayed=relayed, settled=settled)
        encoded = self._encoded or records.encoded()
        if encoded is None or encoded.round != session.round:
            raise SessionError("the update of this round is not here any more", code="secrets-gone")
        numbers = encoded.numbers.copy()
        if self._name not in session.requirements.counting(cohort.measured):
            numbers[list(session.evaluation)] = 0  # among too few it would be this site's own
        secrets, key, own = Secrets(session.root), self.link.identity.signing, cohort.number(self._name)
        return masked(cohort, own, secrets, inbox, encoded.levels, numbers, bits=session.bits, key=key)

    def _complain(self, payload: bytes, records: Records, session: Session) -> bytes:
        """The request: the relayed deals. The answer is this site's signed complaint about dealers whose part is wrong."""
        cohort = self._open_cohort(records, session)
        received = self._receive(cohort, session, relayed=payload, settled={})
        if not received.lies:
            raise WireError("there is nothing to complain about")
        return Complaint.make(cohort, cohort.number(self._name), received.lies, key=self.link.identity.signing).dump()

    def _open(self, payload: bytes, records: Records, session: Session) -> bytes:
        """Complaints about this site, as :func:`fedlora.protect.secagg.protocol.complaints.dump_complaints` writes them.
        The answer shows the shares that it has dealt to those that complain.

        The complaining sites know these shares already: this site deals correctly, so that only a lying site complains. At most
        as many complaints are answered as sites may collude with the server.
        """
        cohort = self._open_cohort(records, session)
        own = cohort.number(self._name)
        if session.verdict:
            raise SessionError("this site has voted in this session", code="secrets-gone")
        holders = read_complaints(cohort, own, payload, self._known)
        shown = sorted({*session.opened, *holders})
        if len(shown) > session.max_colluding:
            raise SessionError(
                "more sites complain about this one than may collude with the server; it reveals nothing more",
                code="session-spent",
            )
        if shown != list(session.opened):
            records.save_session(session.but(opened=shown))  # on the disk before it is sent
        log.warning("%s complain of what this site has dealt", ", ".join(cohort.advert(j).name for j in holders))
        return dump_opened(cohort, opened(cohort, own, Secrets(session.root), holders))

    def _vote(self, payload: bytes, records: Records, session: Session) -> bytes:
        """Session (32) | verdict (u8) | for COMMIT: who has delivered."""
        cohort = self._open_cohort(records, session)
        reader = Reader(payload, "vote")
        read_session(reader, cohort.t1)
        verdict = reader.take(1)[0]
        listed = reader.rest()
        if verdict not in (COMMIT, ABORT) or (verdict == ABORT and listed):
            raise WireError("vote: neither COMMIT with deliveries nor ABORT without")
        if session.verdict == COMMIT and verdict == COMMIT and listed != session.delivered:
            # Votes on two sets would have both kinds of share of the sites between them revealed.
            self._forget(records, session, final=b"", verdict=BURNED)
            log.error("INCIDENT: the server asked for a vote on two sets of updates in one session; the session is burnt")
            raise SessionError("a second, different vote in one session is refused; the session is burnt", code="both-secrets")
        if session.verdict and session.verdict != verdict:
            raise SessionError("this site has voted in this session, and votes once", code="session-spent")
        if verdict == ABORT:
            return self._abort(cohort, records, session)
        text = self._agree(cohort, listed, records, session)
        if not session.verdict:
            records.save_session(session.but(verdict=COMMIT, delivered=listed))  # on the disk before it is sent
        return cohort.t1 + bytes([COMMIT]) + sign_vote(text, key=self.link.identity.signing)

    def _abort(self, cohort: Cohort, records: Records, session: Session) -> bytes:
        if not session.verdict:
            self._forget(records, session, verdict=ABORT)
        return cohort.t1 + bytes([ABORT]) + sign_vote(vote_text(cohort.t1, ABORT), key=self.link.identity.signing)

    def _agree(self, cohort: Cohort, listed: bytes, records: Records, session: Session) -> bytes:
        """The text of a COMMIT vote, if this site agrees to this set of updates."""
        reader, own = Reader(listed, "deliveries"), cohort.number(self._name)
        delivered = Delivered.read_all(reader)
        reader.end()
        if session.verdict == COMMIT:
            return vote_text(cohort.t1, COMMIT, Delivered.digest_of(delivered))  # agreed before
        if not session.digest:
            raise SessionError("this site has sent no update in this session", code="secrets-gone")
        dealers = self._kept_inbox(cohort, own, records, session).shares.keys()
        check_deliveries(
            cohort, own, session.digest, delivered, dealers=list(dealers), requirements=session.requirements, known=self._known
        )
        return vote_text(cohort.t1, COMMIT, Delivered.digest_of(delivered))

    def _contribution(self, requirements: SessionRequirements, plan: Plan) -> Contribution | None:
        """To a sum of this plan under the current roster; None where sums may differ by single sites. Raises: LoneChange."""
        group = requirements.group_of(self._name)
        return None if group is None else Contribution.of(map(self._known, group), measure(plan))

    def _compare(self, contribution: Contribution | None, base: Base, plan: str) -> None:
        """Refuses a contribution that, with earlier ones, could expose single updates, see :meth:`ContributionStore.compare`."""
        shown = self._given().compare(contribution, base, known=self._known, uncovers=self.uncovers(plan))
        if shown:
            log.warning("beside what was given before, sums of this plan may show updates of %s", ", ".join(sorted(shown)))

    def _given(self) -> ContributionStore:
        return ContributionStore(self.link.memory, self.link.identity, self.entropy)

    def _unmask(self, payload: bytes, records: Records, session: Session) -> bytes:
        """The request: session (32) | the COMMIT votes. The answer: one share of each site that dealt."""
        cohort = self._open_cohort(records, session)
        reader = Reader(payload, "unmask")
        read_session(reader, cohort.t1)
        votes = read_certificate(reader)
        reader.end()
        if session.verdict != COMMIT:
            raise SessionError("this site has not agreed to any set of updates in this session", code="votes-missing")
        delivered = Delivered.read_all(Reader(session.delivered, "deliveries"))
        text = vote_text(cohort.t1, COMMIT, Delivered.digest_of(delivered))
        check_certificate(votes, text, names=cohort.names, threshold=cohort.threshold, known=self._known)
        if session.final:
            return session.final  # the secrets are deleted; the server may have lost the answer
        own = cohort.number(self._name)
        out = reveal(cohort, self._kept_inbox(cohort, own, records, session), delivered)
        self._forget(records, session, final=out)
        return out

    def _forget(self, records: Records, session: Session, **changes: Any) -> None:
        """Deletes the session's secrets, on the disk and in memory: nothing more is masked, shown or complained of in it."""
        self._inbox = None
        records.save_session(session.but(root=b"", **changes))

    def _open_cohort(self, records: Records, session: Session) -> Cohort:
        if self._cohort is None or self._cohort.t1 != session.t1:
            blob = records.blob("cohort")
            cohort = Cohort.parse(blob, session.requirements, self._known) if session.t1 and blob else None
            if cohort is None or cohort.t1 != session.t1:
                raise SessionError("the sites of this session are not known here", code="secrets-gone")
            self._cohort = cohort
        return self._cohort

    def _kept_inbox(self, cohort: Cohort, own: int, records: Records, session: Session) -> Inbox:
        """The shares and ingredients with which this site masked its update."""
        settled = Reader(records.blob("settled"), "opened shares")
        return self._open_inbox(cohort, session, relayed=records.blob("relay"), settled=read_settled(cohort, own, settled))

    def _open_inbox(self, cohort: Cohort, session: Session, *, relayed: bytes, settled: Mapping[int, Opened]) -> Inbox:
        """What other sites have dealt to this one.

        Args:
            relayed: the deals, as the server has relayed them.
            settled: dealer's number -> what it has shown after a complaint.

        Raises:
            BadShare: something does not match its dealer's commitments.
        """
        name = hashlib.sha256(dump_opened(cohort, settled) + relayed).digest()
        if self._inbox is None or self._inbox[0] != name:
            received = self._receive(cohort, session, relayed=relayed, settled=settled)
            if received.lies:
                names = ", ".join(cohort.advert(dealer).name for dealer in received.lies)
                raise BadShare(f"what {names} dealt to this site, and signed, is not what was committed to")
            self._inbox = name, received.inbox
        return self._inbox[1]

    def _receive(self, cohort: Cohort, session: Session, *, relayed: bytes, settled: Mapping[int, Opened]) -> Received:
        reader, own, secrets = Reader(relayed, "shares"), cohort.number(self._name), Secrets(session.root)
        received = receive(cohort, own, secrets, reader, requirements=session.requirements, known=self._known, settled=settled)
        reader.end()
        return received
