"""A site's records of its session: saved to survive a power cut, secrets deleted when the session ends."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fedlora.core.canonical import is_digest
from fedlora.core.errors import StoreError
from fedlora.core.messages import Task
from fedlora.formats.derive import derive
from fedlora.formats.files import Damaged, frame, unframe
from fedlora.formats.keys import Identity
from fedlora.formats.state.encrypted import EncryptedMemory
from fedlora.formats.state.journal import check_takes_part, sits_out
from fedlora.formats.state.memory import Memory
from fedlora.protect.ledger import USED, Base, Contribution
from fedlora.protect.secagg.protocol.cohort import SessionRequirements
from fedlora.protect.secagg.protocol.rings import Words
from fedlora.protect.secagg.terms import Terms

_ENCODED = b"FLE3"
_ENCODED_HEAD = struct.Struct("<HHQQQ")  # bytes of the key, bytes of a level, round, counts of levels and numbers


@dataclass(frozen=True, slots=True)
class Session:
    """A site's state in a session. Stored encrypted: a stolen disk reveals nothing without the site's key.

    Attributes:
        root: 32 bytes from which all its secrets are derived; empty once they are deleted.
        reply_key: the run's key, to which replies are sealed.
        bits: width of the ring.
        plan, base: digests of the plan and of the base model.
        model: the plan's name for the base model.
        groups: of the roster when the session began, see :class:`SessionRequirements`; None where the plan allows sums that
            differ by single sites.
        evaluation: where in this site's numbers the counters of its evaluation stand.
        measured: whether these are not all zero, as it has advertised.
        contribution: this site's part in the sum, see :meth:`fedlora.protect.ledger.Contribution.facts`; None in the same case.
        t1: the session's name, once its sites are fixed.
        digest: of the masked update, from just before it is sent.
        verdict: of the vote; 0 before it.
        delivered: the deliveries that the vote was on.
        final: the message that revealed shares; kept to be sent again, because the secrets are deleted by then.
        opened: numbers of the sites to which it was asked to show their shares.
    """

    round: int
    attempt: int
    context: bytes
    reply_key: bytes
    root: bytes
    bits: int
    max_colluding: int
    min_cohort: int
    plan: str
    base: str
    model: str
    groups: Sequence[Sequence[str]] | None
    contribution: Mapping[str, Any] | None
    evaluation: Sequence[int]
    measured: bool
    t1: bytes = b""
    digest: bytes = b""
    verdict: int = 0
    delivered: bytes = b""
    final: bytes = b""
    opened: Sequence[int] = ()

    @classmethod
    def begin(
        cls,
        task: Task,
        terms: Terms,
        base: Base,
        contribution: Contribution | None,
        *,
        context: bytes,
        reply_key: bytes,
        **more: Any,
    ) -> Session:
        """Of a task whose terms both ends have derived. ``more``: what the site alone knows: root, evaluation, measured."""
        r = terms.requirements
        return cls(
            round=task.round,
            attempt=task.attempt,
            context=context,
            reply_key=reply_key,
            bits=terms.profile.bits,
            max_colluding=r.max_colluding,
            min_cohort=r.min_cohort,
            plan=task.plan_digest,
            base=base.digest,
            model=base.model,
            groups=None if r.groups is None else [sorted(group) for group in r.groups],
            contribution=None if contribution is None else contribution.facts(),
            **more,
        )

    @property
    def requirements(self) -> SessionRequirements:
        groups = None if self.groups is None else tuple(frozenset(g) for g in self.groups)
        return SessionRequirements(self.max_colluding, self.min_cohort, groups)

    def but(self, **changes: Any) -> Session:
        """The same with these fields changed."""
        return replace(self, **changes)

    def __repr__(self) -> str:
        return f"Session(round={self.round}, attempt={self.attempt})"


@dataclass(frozen=True, slots=True)
class Used:
    """Records that this site has sent its masked update of a round, and in which session. No secret; outlives the session."""

    round: int
    t1: str
    digest: str
    names: list[str]
    threshold: int


@dataclass(frozen=True, slots=True, eq=False)
class Encoded:
    """An update as integer levels.

    Attributes:
        key: see :func:`fedlora.protect.secagg.encoding.work_key`.
        levels: (n,) ring elements.
        numbers: (m,) uint64, see :class:`fedlora.protect.secagg.protocol.numbers.Numbers`.
    """

    key: str
    round: int
    levels: Words
    numbers: NDArray[np.uint64]


class Records:
    """One run's records. Law: a saved record is there after a restart; nothing is sent before its record is saved.

    Args:
        memory: durable.
        identity: the encryption key of the session's records is derived from its signing key.
        entropy: n random bytes.
    """

    def __init__(self, memory: Memory, run: str, identity: Identity, entropy: Callable[[int], bytes]) -> None:
        self._memory, self._run, self._identity, self._entropy = memory, run, identity, entropy
        self._hidden = EncryptedMemory(
            memory, derive(identity.signing.private_bytes_raw(), "site-records", context=run.encode()), entropy
        )

    @classmethod
    def of_part(cls, memory: Memory, run: str, identity: Identity, entropy: Callable[[int], bytes]) -> Records:
        """The records of a run that this site takes part in.

        Raises:
            PlanRefused (sits-out): its operator has ended what is open, too, so that the session's secrets are deleted.
        """
        records = cls(memory, run, identity, entropy)
        if sits_out(memory, run):
            records.end_session()
        check_takes_part(memory, run)
        return records

    def session(self) -> Session | None:
        """The session that was opened last; None if there is none or its file is damaged: the site then counts as dropped out."""
        try:
            found = self._hidden.get(self._name("session"), "session")
        except ValueError:
            return None
        if not found:
            return None
        known = {f.name: f.type for f in fields(Session)}
        values: dict[str, Any] = {k: bytes.fromhex(v) if known[k] == "bytes" else v for k, v in found.items()}
        return Session(**values)

    def save_session(self, session: Session) -> None:
        values = {f.name: getattr(session, f.name) for f in fields(Session)}
        facts = {k: v.hex() if isinstance(v, bytes) else v for k, v in values.items()}
        self._hidden.put(self._name("session"), "session", facts)

    def end_other_runs(self) -> None:
        """Deletes the secrets of unfinished sessions of all other runs, so that they cannot be opened later."""
        for one in self._of_other_runs():
            one.end_session()

    def end_session(self) -> None:
        """Deletes the secrets of this run's session. A record that cannot be read is written over: it may still hold them."""
        name = self._name("session")
        try:
            found = self._hidden.get(name, "session")
        except (StoreError, ValueError):
            self._hidden.put(name, "session", {})
        else:
            if found and found["root"]:
                self._hidden.put(name, "session", {**found, "root": ""})

    def used(self) -> Used | None:
        """The last masked update that this site has sent in this run; None if it has sent none.

        Raises:
            StoreError: damaged. The site then takes part in nothing, because it cannot know what it has sent.
        """
        try:
            found = self._hidden.get(f"{self._run}/{USED}", "used")
        except ValueError:
            hint = "let this site sit out the run (`fedlora site repair`): it no longer knows what it has sent"
            raise StoreError("the record of what this site has sent in secure aggregation is damaged", hint=hint) from None
        return None if found is None else Used(**found)

    def _of_other_runs(self) -> list[Records]:
        runs = {key.partition("/")[0] for key in self._memory.keys()}  # noqa: SIM118  # a memory is no dict
        return [Records(self._memory, run, self._identity, self._entropy) for run in runs - {self._run} if is_digest(run)]

    def save_used(self, used: Used) -> None:
        self._hidden.put(f"{self._run}/{USED}", "used", asdict(used))

    def blob(self, kind: str) -> bytes:
        """Bytes of a kind, such as ``cohort`` or ``relay``, as received; empty if there are none."""
        return self._memory.get(self._name(kind)) or b""

    def save_blob(self, kind: str, blob: bytes) -> None:
        self._memory.put(self._name(kind), blob)

    def encoded(self) -> Encoded | None:
        """The encoded update; None if there is none or it is damaged. It is then encoded again, to the same levels."""
        blob = self._memory.get(self._name("encoded"))
        if not blob:
            return None
        try:
            reader = unframe(blob, _ENCODED, "encoded")
            length, word, round_, *sizes = reader.unpack(_ENCODED_HEAD)
            key = reader.take(length).decode()
            kinds: tuple[np.dtype[Any], ...] = (np.dtype(f"<u{word}"), np.dtype("<u8"))
            levels, numbers = (np.frombuffer(reader.view(n * kind.itemsize), kind) for n, kind in zip(sizes, kinds, strict=True))
            reader.end()
        except (Damaged, struct.error, UnicodeDecodeError, TypeError):
            return None
        return Encoded(key, round_, levels, numbers)

    def save_encoded(self, e: Encoded) -> None:
        key, arrays = e.key.encode(), (e.levels, e.numbers)
        head = _ENCODED_HEAD.pack(len(key), e.levels.itemsize, e.round, *(a.size for a in arrays))
        little = (a.astype(a.dtype.newbyteorder("<"), copy=False).view(np.uint8).data for a in arrays)
        self._memory.put(self._name("encoded"), *frame(_ENCODED, head, key, *little))

    def _name(self, kind: str) -> str:
        return f"{self._run}/secagg/{kind}"
