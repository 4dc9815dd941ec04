"""Sealed mode: each update is encrypted to the aggregator's key of this run and signed by its site.

"No one but the holder of the aggregator key can read an update; nobody can forge, replay, move or truncate one unnoticed."
The key is made when the run starts and deleted when it ends: later theft of the server's keys opens nothing recorded before.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

from fedlora import wire
from fedlora.adapter import MAX_PARAMETERS, Update
from fedlora.errors import Equivocation, FedLoRAError, RemoteError, Replayed, UnknownSite, WrongContext
from fedlora.messages import SERVER, Reply, Request, Reveals, Task
from fedlora.protect import Memory, Talk, Tally
from fedlora.protect.envelope import BROADCAST, NONE, SUITE, VERSION, Header, match, open_envelope, overhead, parse, seal, verify
from fedlora.protect.keys import KEM_BYTES, Identity, PublicIdentity, key_id

__all__ = ["SealedServer", "SealedSite"]

_PHASES = {"train": "train", "evaluate": "global"}


def _federation(server: PublicIdentity) -> str:
    """Names the federation: the digest of the server's signing key, from which all trust comes."""
    return hashlib.sha256(b"fedlora/v1/genesis\0" + server.signing).hexdigest()


def _roster(server: PublicIdentity) -> str:
    """Both ends pin the server's keys; until there is a signed roster, their digest stands in its place."""
    return hashlib.sha256(b"fedlora/v1/pinned\0" + server.signing + server.kem).hexdigest()


def _header(task: Task, server: PublicIdentity, *, payload: bytes, codec: str, seq: int, prev: str, created: int) -> Header:
    """A down-header of this task; the site turns it round."""
    return Header(
        v=VERSION,
        suite=SUITE,
        fed=_federation(server),
        run=task.run,
        plan=task.plan_digest,
        round=task.round,
        attempt=task.attempt,
        phase=_PHASES[task.kind],
        dir="down",
        sender=SERVER,
        to=BROADCAST,
        from_key=server.signing_id,
        to_key=NONE,
        roster=_roster(server),
        base=task.base,
        adapter=task.adapter.digest(),
        layout=task.adapter.layout.digest(),
        codec=codec,
        seq=seq,
        prev=prev,
        created=created,
        n_params=task.adapter.layout.size,
        len=len(payload),
        sha=hashlib.sha256(payload).hexdigest(),
    )


@dataclass(frozen=True, slots=True)
class _Counter:
    """Highest sequence number and last digest on one path, durable before it is used."""

    memory: Memory
    path: str

    def last(self) -> tuple[int, str]:
        found = self.memory.get(self.path)
        if found is None:
            return 0, NONE
        seq, digest = json.loads(found)
        return int(seq), str(digest)

    def put(self, seq: int, digest: str) -> None:
        self.memory.put(self.path, json.dumps([seq, digest]).encode())

    def admit(self, seq: int, digest: str, *, again: bool) -> None:
        """Takes a number that is higher than all before; the very same message only if ``again``.

        Raises:
            Replayed, Equivocation: not higher; other content under the same number.
        """
        last, known = self.last()
        if seq == last and digest != known:
            raise Equivocation(f"two messages under number {seq}")
        if seq < last or (seq == last and not again):
            raise Replayed(f"number {seq} is not above {last}")
        self.put(seq, digest)


@dataclass(frozen=True, slots=True, eq=False)
class SealedServer:
    """Server half.

    Args:
        identity: the server's own keys; the signing key is what sites pin.
        reply_key: keys of this run only; replies are sealed to its KEM key.
        sites: the enrolled sites.
        memory: sequence numbers, durable.
        dtype: of the updates on the wire.
        clock: seconds since 1970, for ``created``.
        entropy: n random bytes.
    """

    identity: Identity
    reply_key: Identity
    sites: Mapping[str, PublicIdentity]
    memory: Memory
    dtype: str
    clock: Callable[[], int]
    entropy: Callable[[int], bytes]

    @property
    def reveals(self) -> Reveals:
        return "each"

    def collect(self, task: Task, sites: Sequence[str], tally: Tally) -> Talk:
        """One exchange: the task, sealed once for all; the replies, opened one at a time."""
        asked = [s for s in sites if s in self.sites]
        for stranger in (s for s in sites if s not in self.sites):
            tally.reject(stranger, UnknownSite(f"{stranger} is not enrolled"))
        if not asked:
            return
        body = self._task(task, asked)
        replies = yield [Request(site, _PHASES[task.kind], body) for site in asked]
        del body
        self._take(task, replies, frozenset(asked), tally)

    def _take(self, task: Task, replies: Iterator[Reply], asked: frozenset[str], tally: Tally) -> None:
        heard: set[str] = set()
        for reply in replies:
            if reply.site not in asked or reply.site in heard:
                continue  # a stranger, or a second word: the first counts
            heard.add(reply.site)
            try:
                if reply.error:
                    raise RemoteError(reply.site, reply.error[:64])
                tally.accept(reply.site, self._open(task, reply))
            except FedLoRAError as e:
                tally.reject(reply.site, e)
            del reply  # one update in memory at a time

    def _task(self, task: Task, asked: Sequence[str]) -> bytes:
        counter = _Counter(self.memory, f"{task.run}/down")
        last, prev = counter.last()
        payload = wire.dump_task(task, reply_key=self.reply_key.public.kem)
        header = _header(
            task, self.identity.public, payload=payload, codec="task/1", seq=last + 1, prev=prev, created=self.clock()
        )
        to = [self.sites[s] for s in asked]
        header = replace(header, to_key=key_id("".join(sorted(p.kem_id for p in to)).encode()))
        blob, digest = seal(payload, header=header, signer=self.identity, recipients=to, entropy=self.entropy)
        counter.put(last + 1, digest)  # before it leaves: a restarted server never uses a number twice
        return blob

    def _open(self, task: Task, reply: Reply) -> Update:
        layout = task.reply_layout
        dtype = self.dtype if task.kind == "train" else "float32"
        limit = wire.max_update_bytes(layout, dtype=dtype) + overhead(1)
        envelope = parse(reply.body, max_bytes=limit)
        verify(envelope, self._known(envelope.header.sender))
        server = self.identity.public
        match(
            envelope.header,
            fed=_federation(server),
            run=task.run,
            plan=task.plan_digest,
            dir="up",
            phase=_PHASES[task.kind],
            round=task.round,
            attempt=task.attempt,
            sender=reply.site,
            to=SERVER,
            to_key=self.reply_key.public.kem_id,
            roster=_roster(server),
            base=task.base,
            adapter=task.adapter.digest(),
            layout=task.adapter.layout.digest(),
            codec=f"update/1/{dtype}",
            n_params=layout.size,
        )
        counter = _Counter(self.memory, f"{task.run}/up/{reply.site}")
        counter.admit(envelope.header.seq, envelope.digest, again=False)
        return wire.parse_update(open_envelope(envelope, self.reply_key), layout, dtype=dtype)

    def _known(self, name: str) -> PublicIdentity:
        if name not in self.sites:
            raise UnknownSite("the sender is not enrolled")
        return self.sites[name]


@dataclass(frozen=True, slots=True, eq=False)
class SealedSite:
    """Site half.

    Args:
        identity: this site's keys.
        server: the server's public keys, pinned.
        memory: sequence numbers, durable.
        max_request_bytes: limit for a task.
        clock: seconds since 1970, for ``created``.
        entropy: n random bytes.
    """

    identity: Identity
    server: PublicIdentity
    memory: Memory
    max_request_bytes: int
    clock: Callable[[], int]
    entropy: Callable[[int], bytes]

    def answer(self, request: Request, work: Callable[[Task], Update]) -> bytes:
        task, down, reply_key, dtype = self._open(request)
        update = work(task)
        payload = wire.dump_update(update, task.reply_layout, dtype=dtype)
        counter = _Counter(self.memory, f"{task.run}/up")
        last, prev = counter.last()
        header = replace(
            down,
            dir="up",
            sender=self.identity.name,
            to=SERVER,
            from_key=self.identity.public.signing_id,
            to_key=reply_key.kem_id,
            codec=f"update/1/{dtype}",
            seq=last + 1,
            prev=prev,
            created=self.clock(),
            n_params=task.reply_layout.size,
            len=len(payload),
            sha=hashlib.sha256(payload).hexdigest(),
        )
        blob, digest = seal(payload, header=header, signer=self.identity, recipients=[reply_key], entropy=self.entropy)
        counter.put(last + 1, digest)  # before it leaves
        return blob

    def _open(self, request: Request) -> tuple[Task, Header, PublicIdentity, str]:
        from fedlora.config import parse_plan

        envelope = parse(request.body, max_bytes=self.max_request_bytes)
        header = envelope.header
        verify(envelope, self.server)
        match(
            header,
            fed=_federation(self.server),
            dir="down",
            phase=request.phase,
            to=BROADCAST,
            roster=_roster(self.server),
            codec="task/1",
        )
        counter = _Counter(self.memory, f"{header.run}/down")
        counter.admit(header.seq, envelope.digest, again=True)  # the relay may deliver one message twice
        task, key = wire.parse_task(open_envelope(envelope, self.identity), max_parameters=MAX_PARAMETERS)
        said = _header(task, self.server, payload=b"", codec="task/1", seq=0, prev=NONE, created=0)
        match(
            said,
            **{
                k: getattr(header, k)
                for k in ("run", "plan", "round", "attempt", "phase", "base", "adapter", "layout", "n_params")
            },
        )
        if len(key) != KEM_BYTES:
            raise WrongContext("the reply key has a wrong length")
        dtype = parse_plan(task.plan).wire.dtype if task.kind == "train" else "float32"
        # The signing half is not used for the run's key; the server's stands in, which is known to be sound.
        return task, header, PublicIdentity(SERVER, self.server.signing, key), dtype
