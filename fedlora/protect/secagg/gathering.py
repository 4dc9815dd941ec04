"""What the server gathers for a session: advertisements, deals, masked updates."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Any

import numpy as np

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
from fedlora.protect.secagg.attempt import Attempt, Errors
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Advert, Cohort, read_session
from fedlora.protect.secagg.protocol.complaints import (
    dump_opened,
)
from fedlora.protect.secagg.protocol.dealing import Opened
from fedlora.protect.secagg.protocol.opening import Deal, deal_bytes, relay
from fedlora.protect.secagg.protocol.rings import packed_bytes, unpack
from fedlora.protect.secagg.protocol.votes import Delivered
from fedlora.protect.secagg.sessions import Ended, ServerSession
from fedlora.protect.secagg.settling import settle
from fedlora.protect.secagg.terms import Offer, codec

_ADVERT_BYTES = 4096

_LIED_TO = frozenset({BadShare.code})
"""What a site says when what a dealer has signed for it does not open to what that dealer has committed to."""


def advertised(at: Attempt, asked: Sequence[str], scales: F32) -> Generator[Any, Any, Cohort]:
    """Offers the task; the cohort of those that have trained and advertise, as far as their groups are whole."""
    phase = "advertise"
    kem = at.link.reply_key.public.kem
    context = at.terms.context(at.task, scales, at.link.roster, kem)
    adverts: list[Advert] = []

    def take(reply: Reply) -> None:
        payload = at.answer(at.task.attempt, reply, phase, max_payload=_ADVERT_BYTES)
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
    replies = yield [Request(site, phase, body, reply_bytes(_ADVERT_BYTES)) for site in asked]
    del body
    receive(replies, asked, take, at.errors.setdefault)
    together = at.whole([a.name for a in adverts], at.errors, least=at.terms.requirements.smallest)
    return Cohort.of([a for a in adverts if a.name in together], at.terms.requirements)


def dealt(at: Attempt, cohort: Cohort) -> Generator[Any, Any, dict[int, bytes]]:
    """What each site has dealt, as bytes; each checked."""
    deals: dict[int, bytes] = {}

    def take(reply: Reply) -> None:
        number = cohort.number(reply.site)
        payload = at.answer(at.task.attempt, reply, "share", max_payload=deal_bytes(cohort, number))
        deal = Deal.parse(cohort, number, payload)
        try:
            deal.verify(cohort, number, at.known(reply.site))
        except BadSignature:  # in an envelope that it has signed
            at.caught(reply.site)
            raise DealerLied(f"{reply.site} has not signed what it deals", site=reply.site) from None
        deals[number] = payload

    most = max(deal_bytes(cohort, cohort.number(name)) for name in cohort.names)
    yield from at.ask_all(at.task.attempt, cohort.names, "share", cohort.dump(), take, at.errors, max_payload=most)
    return deals


def gather(at: Attempt, session: ServerSession, ended: Ended) -> Exchange:
    """Adds up what comes, one update in memory at a time. After a restart all are asked again, and say the same."""
    cohort, deals = session.cohort, session.deals
    layout, profile = at.task.reply_layout, at.terms.profile
    vector, numbers = np.zeros(layout.size, profile.word), np.zeros(at.terms.numbers(layout).size, np.uint64)
    packed = packed_bytes(layout.size, profile.bits)
    delivered: dict[int, Delivered] = {}
    limit = 32 + SIGNATURE + numbers.nbytes + packed

    def take(reply: Reply) -> None:
        """Adds it; when it comes a second time, takes it out again."""
        reader = Reader(at.answer(session.attempt, reply, "mask", max_payload=limit), "masked update")
        read_session(reader, cohort.t1)
        signature, body = reader.take(SIGNATURE), reader.view(numbers.nbytes + packed)
        reader.end()
        one = Delivered(cohort.number(reply.site), hashlib.sha256(body).digest(), signature)
        one.verify(cohort, at.known)
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
    dealt = at.terms.requirements.whole(session.names(sorted(deals)))  # the others would refuse: theirs are not all there
    shown: dict[int, Mapping[int, Opened]] = {n: {} for n in deals if cohort.advert(n).name in dealt}
    yield from _ask_masked(at, session, ended, shown, deals, take, first, limit)
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
            yield from _ask_masked(at, session, ended, settled, deals, take, at.errors, limit)
            shown |= settled
    together = at.whole(session.names(sorted(delivered)), at.errors, least=0)
    alone = [n for n in sorted(delivered) if cohort.advert(n).name not in together]
    if alone and not lied and len(together) >= at.terms.requirements.fewest_inputs(len(cohort.adverts)):
        yield from _ask_masked(at, session, ended, {n: shown[n] for n in alone}, deals, take, at.errors, limit)
    del deals
    session.delivered = sorted(delivered.values(), key=lambda d: d.number)
    if lied or not _enough(at, session):
        session.stage = "abort"
    else:
        session.stage, session.vector, session.numbers = "vote", vector, numbers
        at.sessions.save_sum(session)
    at.sessions.save(session)


def _ask_masked(
    at: Attempt,
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
        body = at.seal(session.attempt, [name], "mask", payload)
        requests.append(Request(name, "mask", body, reply_bytes(limit)))
    replies = yield requests
    names = [r.site for r in requests]
    del requests
    at.receive(session, replies, names, take, errors)


def _enough(at: Attempt, session: ServerSession) -> bool:
    """Whether the sites may agree to the sum of what was delivered."""
    requirements, names = at.terms.requirements, session.names(session.counted)
    whole = len(requirements.whole(names)) == len(names)
    try:
        requirements.check_counting(requirements.counting(session.cohort.measured), names)
    except LoneChange:
        return False
    return whole and len(names) >= requirements.fewest_inputs(len(session.cohort.adverts))
