"""Signed and sealed messages between the server and its sites. Every mode of protection sends its messages through these."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from fedlora.core.errors import EnvelopeError, FedLoRAError, RemoteError, StateLost, StoreError
from fedlora.core.limits import MAX_SITES
from fedlora.core.messages import SERVER, Reply, Request, Task
from fedlora.formats.envelope import BROADCAST, NONE, SUITE, VERSION, Header, match, open_envelope, overhead, parse, seal, verify
from fedlora.formats.keys import Identity, PublicIdentity, key_id
from fedlora.formats.roster import federation
from fedlora.formats.state.commitment import note_commitment, split_codec, with_commitment
from fedlora.formats.state.memory import Memory, get_record, put_record
from fedlora.protect import Tally

log = logging.getLogger(__name__)


def take(message: Request | Reply) -> bytes:
    """A message's body, for who opens it.

    It leaves a message that came over a connection: a site does not hold its request for the hours in which it trains, nor a
    server a reply beside what is in it. In a process that has both ends it stays, because it may be sent again.
    """
    body = message.body
    if message.once:
        object.__setattr__(message, "body", b"")  # the one change that a message knows
    return body


@dataclass(frozen=True, slots=True)
class Context:
    """The task that a message belongs to; the signature and the encryption cover every field."""

    run: str
    plan: str
    round: int
    attempt: int
    base: str
    adapter: str
    layout: str
    n_params: int

    @classmethod
    def of(cls, task: Task) -> Context:
        digest, layout = task.adapter.digest(), task.adapter.layout
        return cls(task.run, task.plan_digest, task.round, task.attempt, task.base, digest, layout.digest(), layout.size)

    @classmethod
    def named(cls, header: Header) -> Context:
        """The context that a header states."""
        return cls(**{name: getattr(header, name) for name in cls.__slots__})

    def fields(self) -> dict[str, Any]:
        """The values by the names of the header's fields."""
        return {name: getattr(self, name) for name in self.__slots__}


def _all_of(kem_ids: Iterable[str]) -> str:
    """Digest of all recipients, for the header of a message from the server."""
    return key_id("".join(sorted(kem_ids)).encode())


def pinned(server: PublicIdentity) -> str:
    """Digest of the server's keys, which both ends pin. It takes the place of the roster's digest where there is no roster."""
    return hashlib.sha256(b"fedlora/v1/pinned\0" + server.signing + server.kem).hexdigest()


def reply_bytes(max_payload: int) -> int:
    """Most bytes of a reply whose payload has at most that many bytes."""
    return max_payload + overhead(1, max_payload)


@dataclass(frozen=True, slots=True)
class _Counter:
    """Highest sequence number and last digest on one path, durable before it is used."""

    memory: Memory
    path: str

    def last(self) -> tuple[int, str]:
        found = get_record(self.memory, self.path, "counter")
        return (0, NONE) if found is None else (int(found["seq"]), str(found["digest"]))

    def put(self, seq: int, digest: str) -> None:
        put_record(self.memory, self.path, "counter", {"seq": seq, "digest": digest})

    def admit(self, seq: int, digest: str, *, again: bool) -> None:
        """Takes a number that is higher than all before; the very same message only if ``again``.

        Raises:
            EnvelopeError (replayed, equivocation): not higher; other content under the same number.
        """
        _check_number(seq, digest, *self.last(), again=again)
        self.put(seq, digest)


def _check_number(seq: int, digest: str, last: int, known: str, *, again: bool) -> None:
    if seq == last and digest != known:
        raise EnvelopeError(f"two messages under number {seq}", code="equivocation")
    if seq < last or (seq == last and not again):
        raise EnvelopeError(f"number {seq} is not above {last}", code="replayed")


def raise_number(memory: Memory, path: str, *, now: int) -> int:
    """Raises a sender's sequence number above any that it may have used, even if its memory is lost; returns the new number.

    Sequence numbers protect the receiver: a sender may skip numbers but must never use one twice.

    Args:
        path: ``RUN/down`` at the server, ``RUN/up`` at a site.
        now: seconds since 1970. A sender of less than a million messages a second has stayed below ``now * 2**20``.
    """
    counter = _Counter(memory, path)
    try:
        last, _ = counter.last()
    except StoreError:
        last = 0
    number = max(last, now << 20) + (1 << 20)
    counter.put(number, NONE)
    return number


@dataclass(frozen=True, slots=True, eq=False)
class ServerLink:
    """The server's end.

    Args:
        identity: the server's own keys; the signing key is what sites pin.
        reply_key: keys of this run only; replies are sealed to its KEM key.
        sites: the enrolled sites.
        roster: digest of the roster, or what :func:`pinned` gives.
        memory: sequence numbers, durable.
        clock: seconds since 1970, for ``created``.
        entropy: n random bytes.
        audited: the plan has an [audit]: sites commit to their canaries, see :mod:`fedlora.formats.state.commitment`.
    """

    identity: Identity
    reply_key: Identity
    sites: Mapping[str, PublicIdentity]
    roster: str
    memory: Memory
    clock: Callable[[], int]
    entropy: Callable[[int], bytes]
    audited: bool = False

    def known(self, sites: Sequence[str], tally: Tally) -> list[str]:
        """Those of ``sites`` that are enrolled; the others are rejected."""
        for stranger in (s for s in sites if s not in self.sites):
            tally.reject(stranger, EnvelopeError(f"{stranger} is not enrolled", code="unknown-site"))
        return [s for s in sites if s in self.sites]

    def seal(self, context: Context, payload: bytes, *, phase: str, codec: str, to: Sequence[str]) -> bytes:
        """One message for all of ``to``. Its number is on the disk before it is sent: a restarted server never uses one twice."""
        counter = _Counter(self.memory, f"{context.run}/down")
        last, prev = counter.last()
        to_all = [self.sites[s] for s in to]
        header = self.header(context, payload, phase=phase, codec=codec, to=to_all, seq=last + 1, prev=prev)
        blob, digest = seal(payload, header=header, signer=self.identity, recipients=to_all, entropy=self.entropy)
        counter.put(last + 1, digest)
        return blob

    def header(
        self, context: Context, payload: bytes, *, phase: str, codec: str, to: Sequence[PublicIdentity], seq: int, prev: str
    ) -> Header:
        """Header of a message to sites. A site builds the header of its reply from it."""
        return Header(
            v=VERSION,
            suite=SUITE,
            fed=federation(self.identity.public),
            phase=phase,
            dir="down",
            sender=SERVER,
            to=BROADCAST,
            from_key=self.identity.public.signing_id,
            to_key=_all_of(p.kem_id for p in to),
            roster=self.roster,
            codec=codec,
            seq=seq,
            prev=prev,
            created=self.clock(),
            len=len(payload),
            sha=hashlib.sha256(payload).hexdigest(),
            **context.fields(),
        )

    def open(self, context: Context, reply: Reply, *, phase: str, codec: str, max_payload: int) -> bytes:
        """The payload of a genuine, new reply of this context.

        Raises:
            RemoteError: the site answered with a code.
            EnvelopeError: each its own, see :mod:`fedlora.formats.envelope`.
        """
        if reply.error:
            raise RemoteError(reply.site, reply.error[:64])
        envelope = parse(take(reply), max_bytes=reply_bytes(max_payload))
        name = envelope.header.sender
        if name not in self.sites:
            raise EnvelopeError("the sender is not enrolled", code="unknown-site")
        verify(envelope, self.sites[name])
        plain, committed = split_codec(envelope.header.codec) if self.audited else (envelope.header.codec, "")
        match(
            replace(envelope.header, codec=plain),
            fed=federation(self.identity.public),
            dir="up",
            phase=phase,
            sender=reply.site,
            to=SERVER,
            to_key=self.reply_key.public.kem_id,
            roster=self.roster,
            codec=codec,
            **context.fields(),
        )
        self._check_chain(envelope.header, envelope.digest, reply.site)
        counter = _Counter(self.memory, f"{context.run}/up/{reply.site}")
        counter.admit(envelope.header.seq, envelope.digest, again=False)
        if committed:
            note_commitment(self.memory, context.run, name, committed, round=context.round)
        return open_envelope(envelope, self.reply_key)

    def _check_chain(self, header: Header, digest: str, site: str) -> None:
        """Checks that a message continues the chain: each message of a site names the digest of the one before it.

        A message that does not continue the chain means that the site has lost its state or restored a backup. While its numbers
        are not above the last one, its messages are refused as replays anyway; this check refuses them from then on, too. It
        stops when a message continues the chain, or when the site's operator has decided to go on: that message has a higher
        number and names none before it.

        Raises:
            StateLost: the chain is broken.
        """
        last, last_digest = _Counter(self.memory, f"{header.run}/up/{site}").last()
        if not last or (header.seq, digest) == (last, last_digest):
            return  # the first message, or the last one again, which is refused as a replay
        # A number that was heard before, in an answer to what was asked just now: no copy of an earlier answer has this context.
        is_next, begins_anew = header.seq == last + 1, header.prev == NONE
        continues = is_next and header.prev == last_digest
        breaks = header.seq <= last or (is_next and not begins_anew and not continues)
        mark = f"{header.run}/lost/{site}"
        was_broken = bool(self.memory.get(mark))
        if breaks and not was_broken:
            self.memory.put(mark, b"1")
        if header.seq <= last:
            return  # refused in any case, as a replay or as equivocation
        if breaks or (was_broken and not begins_anew and not continues):
            raise StateLost(f"{site} does not continue from its earlier messages: its state is lost, or is that of a backup")
        if was_broken:
            self.memory.put(mark, b"")
        if begins_anew:
            log.warning("%s goes on without what it knew of the rounds before, as its operator has decided", site)


def receive(
    replies: Iterator[Reply],
    asked: Collection[str],
    take: Callable[[Reply], None],
    reject: Callable[[str, FedLoRAError], object],
) -> None:
    """Calls ``take`` with each site's first reply, one at a time. If ``take`` raises, only that site is rejected."""
    waiting = set(asked)
    for reply in replies:
        if reply.site not in waiting:
            continue  # not asked, or a second reply: the first one counts
        waiting.remove(reply.site)
        try:
            take(reply)
        except FedLoRAError as e:
            reject(reply.site, e)
        del reply  # one update in memory at a time


@dataclass(frozen=True, slots=True, eq=False)
class SiteLink:
    """A site's end.

    Args:
        identity: this site's keys.
        server: the server's public keys, pinned.
        memory: sequence numbers, durable.
        max_request_bytes: limit for a message from the server.
        clock: seconds since 1970, for ``created``.
        entropy: n random bytes.
        expects: whether the run of a genuine message's header has begun here; refuses one in which this site does not take part.
            Until it has, its number is in memory only, and on the disk before it is answered: nothing is written for a run that
            is none.
    """

    identity: Identity
    server: PublicIdentity
    memory: Memory
    max_request_bytes: int
    clock: Callable[[], int]
    entropy: Callable[[int], bytes]
    expects: Callable[[Header], bool] = lambda header: True
    _waiting: dict[str, tuple[int, str]] = field(default_factory=dict, init=False, repr=False)  # of the last run not yet begun

    def open(self, request: Request, *, codec: str, roster: str | None, max_payload: int | None = None) -> tuple[Header, bytes]:
        """Header and payload of a genuine request. The last one may come a second time, an older one may not.

        Args:
            roster: digest that the header must have; None where the payload brings the roster and the caller compares them.
            max_payload: most bytes of the payload, if they are known; nothing of a longer request is copied.

        Raises:
            EnvelopeError: each its own, see :mod:`fedlora.formats.envelope`; and what ``expects`` raises.
        """
        most = self.max_request_bytes
        if max_payload is not None:
            most = min(most, max_payload + overhead(MAX_SITES, max_payload))
        envelope = parse(take(request), max_bytes=most)
        header = envelope.header
        verify(envelope, self.server)
        fed = federation(self.server)
        same = {} if roster is None else {"roster": roster}
        sealed_to = _all_of(envelope.stanzas)
        match(header, fed=fed, dir="down", phase=request.phase, to=BROADCAST, to_key=sealed_to, codec=codec, **same)
        counter, begun = _Counter(self.memory, f"{header.run}/down"), self.expects(header)
        held = self._waiting.get(header.run, (0, NONE))
        _check_number(header.seq, envelope.digest, *held, again=True)  # the relay may deliver one message twice
        self._waiting.clear()
        if begun:
            counter.admit(header.seq, envelope.digest, again=True)
        else:
            self._waiting[header.run] = header.seq, envelope.digest
        return header, open_envelope(envelope, self.identity)

    def reply_key(self, kem: bytes) -> PublicIdentity:
        """The run's key, to which replies are sealed.

        Raises:
            KeyFileError: not a key.
        """
        # Only the sealing key is used; the signing key is a placeholder.
        return PublicIdentity(SERVER, self.server.signing, kem)

    def seal(self, down: Header, payload: bytes | memoryview, *, codec: str, n_params: int, to: PublicIdentity) -> bytes:
        """The reply to the request with header ``down``. Its number is on the disk before it is sent."""
        if held := self._waiting.pop(down.run, None):  # the run has begun with this message
            _Counter(self.memory, f"{down.run}/down").put(*held)
        counter = _Counter(self.memory, f"{down.run}/up")
        last, prev = counter.last()
        header = replace(
            down,
            dir="up",
            sender=self.identity.name,
            to=SERVER,
            from_key=self.identity.public.signing_id,
            to_key=to.kem_id,
            codec=with_commitment(codec, self.memory, down.run),
            seq=last + 1,
            prev=prev,
            created=self.clock(),
            n_params=n_params,
            len=len(payload),
            sha=hashlib.sha256(payload).hexdigest(),
        )
        blob, digest = seal(payload, header=header, signer=self.identity, recipients=[to], entropy=self.entropy)
        counter.put(last + 1, digest)
        return blob
