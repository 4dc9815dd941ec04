"""What the server gathers for a session: advertisements, deals, masked updates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.core.adapter import F32
from fedlora.core.errors import (
    BadShare,
    BadSignature,
    DealerLied,
    LoneChange,
    RemoteError,
    WireError,
    WrongContext,
)
from fedlora.core.messages import Reply, Request
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.protect import Exchange
from fedlora.protect.link import Context, receive, reply_bytes
from fedlora.protect.secagg.attempt import Attempt, Errors, dropped_out
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Advert, Cohort, read_session
from fedlora.protect.secagg.protocol.complaints import (
    dump_opened,
)
from fedlora.protect.secagg.protocol.dealing import Opened
from fedlora.protect.secagg.protocol.lengths import ADVERT_BYTES
from fedlora.protect.secagg.protocol.opening import Deal, deal_bytes, relay
from fedlora.protect.secagg.protocol.rings import Words, packed_bytes, unpack
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.sessions import Ended, ServerSession
from fedlora.protect.secagg.settling import settle
from fedlora.protect.secagg.terms import Offer, codec

_LIED_TO = frozenset({BadShare.code})
"""Codes of a site whose share from a dealer does not match that dealer's commitment."""


def advertised(at: Attempt, asked: Sequence[str], scales: F32) -> Generator[Any, Any, Cohort]:
    """Offers the task; returns the cohort of the sites that have trained, sent an advertisement and are in whole groups."""
    phase = "advertise"
    kem = at.link.reply_key.public.kem
    context = at.terms.context(at.task, scales, at.link.roster, kem)
    adverts: list[Advert] = []

    def take(reply: Reply) -> None:
        payload = at.open(reply, phase, max_payload=ADVERT_BYTES)
        reader = Reader(payload, "advertisement")
        advert = Advert.read(reader)
        reader.end()
        if advert.name != reply.site:
            raise WrongContext("the advertisement of another site")
        if advert.context != context:
            raise WrongContext("this site has been shown another task, or its roster says other terms")
        advert.verify(at.link.sites[reply.site])
        adverts.append(advert)

    inner = wire.dump_task(at.task, reply_key=kem)
    offer = Offer(at.signed.dump(), inner).dump()
    body = at.link.seal(Context.of(at.task), offer, phase=phase, codec=codec(phase), to=asked)
    del offer, inner
    replies = yield [Request(site, phase, body, reply_bytes(ADVERT_BYTES)) for site in asked]
    del body
    receive(replies, asked, take, at.noting(at.errors))
    together = at.whole([a.name for a in adverts], at.errors, least=at.terms.requirements.smallest)
    return Cohort.of([a for a in adverts if a.name in together], at.terms.requirements)


def dealt(at: Attempt, cohort: Cohort) -> Generator[Any, Any, dict[int, bytes]]:
    """Asks each site for its deal; returns the deals by the dealer's number, as bytes, each checked."""
    deals: dict[int, bytes] = {}

    def take(reply: Reply) -> None:
        number = cohort.number(reply.site)
        payload = at.open(reply, "share", max_payload=deal_bytes(cohort, number))
        deal = Deal.parse(cohort, number, payload)
        try:
            deal.verify(cohort, number, at.known(reply.site))
        except BadSignature:  # in an envelope that it has signed
            at.caught(reply.site)
            raise DealerLied(f"{reply.site} has not signed what it deals", site=reply.site) from None
        deals[number] = payload

    most = max(deal_bytes(cohort, cohort.number(name)) for name in cohort.names)
    yield from at.ask_all("share", cohort.dump(), take, names=cohort.names, max_payload=most)
    return deals


def gather(at: Attempt, session: ServerSession, ended: Ended) -> Exchange:
    """Adds up the masked updates of a session, one in memory at a time.

    After a restart all sites are asked again: they send the same bytes. Sites that complain are asked a second time, once dealers
    have shown what they dealt to them. At the end, updates of partly present groups are fetched again and subtracted.
    """
    cohort, requirements = session.cohort, at.terms.requirements
    gathering = _Gathering.of(at, session, ended)
    deals, first = gathering.deals, Errors()
    complete = requirements.whole(session.names(sorted(deals)))  # sites of other groups would refuse: not all of them dealt
    shown: dict[int, Mapping[int, Opened]] = {n: {} for n in deals if cohort.advert(n).name in complete}
    yield from gathering.ask(shown, gathering.add, errors=first)
    complaining = [s for s, e in first.items() if isinstance(e, RemoteError) and e.remote_code in _LIED_TO]
    for site in first.keys() - set(complaining):
        at.errors.setdefault(site, first[site])
    lied = False
    if complaining:
        settled = yield from settle(at, session, complaining, deals)
        lied = settled is None
        for site in complaining:
            if settled is not None and cohort.number(site) not in settled:
                at.errors.setdefault(site, first[site])
        if settled:
            yield from gathering.ask(settled, gathering.add, errors=at.errors)
            shown |= settled
    delivered = gathering.delivered
    together = at.whole(session.names(sorted(delivered)), at.errors, least=0)
    alone = [n for n in sorted(delivered) if cohort.advert(n).name not in together]
    if alone and not lied and len(together) >= requirements.fewest_inputs(len(cohort.adverts)):
        yield from gathering.ask({n: shown[n] for n in alone}, gathering.subtract, errors=at.errors)
    session.delivered = sorted(delivered.values(), key=lambda d: d.number)
    if lied or not _enough(at, session):
        session.stage = "abort"
        if not lied:
            _name_dropped(at, session, shown)
    else:
        session.stage, session.vector, session.numbers = "vote", gathering.vector, gathering.numbers
        at.sessions.save_sum(session)
    at.sessions.save(session)


@dataclass(slots=True, eq=False)
class _Gathering:
    """The sum of a session's masked updates so far.

    Attributes:
        deals: dealer's number -> what it dealt.
        delivered: number of each site whose update is in the sum -> its signed statement of that.
        vector, numbers: the sum.
    """

    at: Attempt
    session: ServerSession
    ended: Ended
    deals: Mapping[int, Deal]
    vector: Words
    numbers: NDArray[np.uint64]
    delivered: dict[int, Delivered] = field(default_factory=dict)

    @classmethod
    def of(cls, at: Attempt, session: ServerSession, ended: Ended) -> _Gathering:
        layout, profile = at.task.reply_layout, at.terms.profile
        numbers = np.zeros(at.terms.numbers(layout).size, np.uint64)
        return cls(at, session, ended, session.deals, np.zeros(layout.size, profile.word), numbers)

    def ask(self, shown: Mapping[int, Mapping[int, Opened]], take: Callable[[Reply], None], *, errors: Errors) -> Exchange:
        """Asks these holders for their masked updates.

        Args:
            shown: holder's number -> what dealers have shown to it after a complaint.
        """
        head = bytes([len(self.ended)]) + b"".join(t1 + proof for t1, proof in self.ended)
        requests = []
        for number in sorted(shown):
            (name,) = self.session.names([number])
            payload = head + dump_opened(self.session.cohort, shown[number]) + relay(self.session.cohort, self.deals, number)
            body = self.at.seal("mask", payload, names=[name], session=self.session)
            requests.append(Request(name, "mask", body, reply_bytes(self._limit)))
        replies = yield requests
        names = [r.site for r in requests]
        del requests
        self.at.receive(replies, take, names=names, errors=errors, session=self.session)

    def add(self, reply: Reply) -> None:
        """Adds a masked update to the sum."""
        one, words, numbers = self._read(reply)
        if one.number in self.delivered:
            raise WireError("masked update: it is in the sum already")
        self.delivered[one.number] = one
        self._combine(np.add, words, numbers)

    def subtract(self, reply: Reply) -> None:
        """Takes a masked update, which the site has sent again, out of the sum."""
        one, words, numbers = self._read(reply)
        if self.delivered[one.number].digest != one.digest:
            raise WireError("masked update: not the one that it sent before")
        del self.delivered[one.number]
        self._combine(np.subtract, words, numbers)

    def _combine(self, how: np.ufunc, words: Words, numbers: NDArray[np.uint64]) -> None:
        how(self.vector, words, out=self.vector)
        how(self.numbers, numbers, out=self.numbers)

    def _read(self, reply: Reply) -> tuple[Delivered, Words, NDArray[np.uint64]]:
        cohort, bits = self.session.cohort, self.at.terms.profile.bits
        payload = self.at.open(reply, "mask", max_payload=self._limit, session=self.session)
        reader = Reader(payload, "masked update")
        read_session(reader, cohort.t1)
        signature, body = reader.take(SIGNATURE), reader.view(self._body_bytes)
        reader.end()
        one = Delivered(cohort.number(reply.site), hashlib.sha256(body).digest(), signature)
        one.verify(cohort, self.at.known)
        words = unpack(body[self.numbers.nbytes :], self.vector.size, bits)
        if words is None:
            raise WireError("masked update: the padding is not zero")
        return one, words, np.frombuffer(body[: self.numbers.nbytes], "<u8")

    @property
    def _body_bytes(self) -> int:
        return self.numbers.nbytes + packed_bytes(self.vector.size, self.at.terms.profile.bits)

    @property
    def _limit(self) -> int:
        """Longest reply."""
        return 32 + SIGNATURE + self._body_bytes


def _name_dropped(at: Attempt, session: ServerSession, asked: Collection[int]) -> None:
    """Names the sites that gave no update to a session that ends without a sum, and leaves out who alone has ended it.

    That are sites that have measured something where the others would be enough, but for the evaluations of too few that would be
    in the sum. Asked again, one of them could end each session so; without them fewer have measured, and all send zeros.
    """
    requirements, names = at.terms.requirements, session.names(session.counted)
    for name in session.names(sorted(set(asked).difference(session.counted))):
        at.errors.setdefault(name, dropped_out())
    if requirements.whole(names) == set(names) and len(names) >= requirements.fewest_inputs(len(session.cohort.adverts)):
        for name in sorted(requirements.counting(session.cohort.measured).difference(names)):
            at.sessions.exclude(name, round=at.task.round, code=dropped_out().code)


def _enough(at: Attempt, session: ServerSession) -> bool:
    """Whether the sites may agree to the sum of what was delivered."""
    requirements, names = at.terms.requirements, session.names(session.counted)
    whole = len(requirements.whole(names)) == len(names)
    try:
        requirements.check_counting(requirements.counting(session.cohort.measured), names)
    except LoneChange:
        return False
    return whole and len(names) >= requirements.fewest_inputs(len(session.cohort.adverts))
