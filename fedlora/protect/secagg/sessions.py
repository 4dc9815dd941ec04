"""The server's records of a session, from the first masked update on, so that it can be killed at any time."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from fedlora.core.errors import SessionError
from fedlora.core.messages import Kind, Task
from fedlora.core.reader import Reader
from fedlora.formats.keys import PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import Memory, get_record, put_record
from fedlora.protect.secagg.protocol.cohort import Cohort, SessionRequirements
from fedlora.protect.secagg.protocol.opening import Deal, deal_bytes
from fedlora.protect.secagg.protocol.rings import Profile, Words
from fedlora.protect.secagg.protocol.votes import Delivered, certificate, read_certificate

Stage = Literal["mask", "vote", "unmask", "done", "abort", "aborted", "void"]
"""The next step. ``done``: the masks can be removed. ``aborted``: a certificate proves that they never will be."""

Ended: TypeAlias = list[tuple[bytes, bytes]]
"""Sessions of this round that have ended without a sum: name, certificate."""


@dataclass(slots=True, eq=False)
class ServerSession:
    """A session, from the first request for masked updates on.

    Attributes:
        raw_deals: dealer's number -> what it dealt, as it came.
        attempt: number of the attempt in which it began; its messages keep it in later attempts.
        delivered: the updates in the sum.
        votes, aborts: voter's number -> signature.
        revealed: holder's number -> the shares as they came.
        gone: numbers of the sites that can never answer in it again.
        tries: number of failed attempts to finish it.
        vector, numbers: the masked sum.
    """

    round: int
    kind: Kind
    cohort: Cohort
    raw_deals: Mapping[int, bytes]
    attempt: int
    stage: Stage = "mask"
    delivered: list[Delivered] = field(default_factory=list)
    votes: dict[int, bytes] = field(default_factory=dict)
    aborts: dict[int, bytes] = field(default_factory=dict)
    revealed: dict[int, bytes] = field(default_factory=dict)
    gone: set[int] = field(default_factory=set)
    tries: int = 0
    vector: Words = field(default_factory=lambda: np.zeros(0, np.uint16))
    numbers: NDArray[np.uint64] = field(default_factory=lambda: np.zeros(0, np.uint64))

    @property
    def deals(self) -> dict[int, Deal]:
        return {n: Deal.parse(self.cohort, n, raw) for n, raw in self.raw_deals.items()}

    @property
    def counted(self) -> list[int]:
        return [d.number for d in self.delivered]

    def names(self, numbers: Sequence[int]) -> list[str]:
        return [self.cohort.advert(n).name for n in numbers]


@dataclass(frozen=True, slots=True)
class SessionStore:
    """The files of the current session, and the excluded sites.

    Damage stops the run but cannot make a sum wrong: every share and signature is checked again after loading.

    Args:
        memory: durable, of this run.
    """

    memory: Memory

    def open(self, session: ServerSession, signed: SignedRoster) -> None:
        """Saves a session before masked updates are requested."""
        self._put("roster", signed.dump())
        self._put("cohort", session.cohort.dump())
        self._put("deals", b"".join(n.to_bytes(2, "big") + raw for n, raw in sorted(session.raw_deals.items())))
        self.save(session)

    def save_sum(self, session: ServerSession) -> None:
        little = session.vector.astype(session.vector.dtype.newbyteorder("<"))
        self._put("sum", session.numbers.astype("<u8").tobytes() + little.tobytes())

    def save(self, session: ServerSession) -> None:
        facts = {
            "round": session.round,
            "kind": session.kind,
            "attempt": session.attempt,
            "t1": session.cohort.t1.hex(),
            "stage": session.stage,
            "delivered": Delivered.dump_all(session.delivered).hex(),
            "votes": certificate(session.votes).hex(),
            "aborts": certificate(session.aborts).hex(),
            "revealed": {str(n): raw.hex() for n, raw in session.revealed.items()},
            "gone": sorted(session.gone),
            "tries": session.tries,
        }
        put_record(self.memory, "secagg/session", "session", facts)

    def roster(self, task: Task) -> SignedRoster | None:
        """The roster of the unfinished session of this round; None if there is no such session."""
        return SignedRoster.parse(self.memory.get("secagg/roster") or b"") if self._facts(task) else None

    def load(
        self,
        task: Task,
        requirements: SessionRequirements,
        known: Callable[[str], PublicIdentity],
        profile: Profile,
        *,
        numbers: int,
    ) -> ServerSession:
        """Loads the unfinished session of this round.

        Args:
            numbers: how many numbers are summed with the vector.

        Raises:
            SessionError: the files do not belong together.
        """
        facts = self._facts(task)
        cohort = Cohort.parse(self.memory.get("secagg/cohort") or b"", requirements, known)
        if cohort.t1.hex() != facts["t1"]:
            raise SessionError("the files of the session do not belong together", hint="start the run anew under another name")
        reader, deals = Reader(self.memory.get("secagg/deals") or b"", "deals"), {}
        while reader.left:
            number = reader.number()
            deals[number] = reader.take(deal_bytes(cohort, number))
        session = ServerSession(
            task.round, task.kind, cohort, deals, facts["attempt"], facts["stage"], gone=set(facts["gone"]), tries=facts["tries"]
        )
        session.delivered = Delivered.read_all(Reader(bytes.fromhex(facts["delivered"]), "deliveries"))
        session.votes = read_certificate(Reader(bytes.fromhex(facts["votes"]), "votes"))
        session.aborts = read_certificate(Reader(bytes.fromhex(facts["aborts"]), "votes"))
        session.revealed = {int(n): bytes.fromhex(raw) for n, raw in facts["revealed"].items()}
        if session.stage in ("vote", "unmask", "done"):
            blob = self.memory.get("secagg/sum") or b""
            session.numbers = np.frombuffer(blob[: 8 * numbers], "<u8").astype(np.uint64)
            session.vector = np.frombuffer(blob[8 * numbers :], np.dtype(profile.word).newbyteorder("<")).astype(profile.word)
        return session

    def _facts(self, task: Task) -> dict[str, Any]:
        facts = get_record(self.memory, "secagg/session", "session") or {}
        this = (facts.get("round"), facts.get("kind")) == (task.round, task.kind)
        return facts if this and facts["stage"] != "aborted" else {}

    def ended(self, task: Task) -> Ended:
        """Sessions of this round that have ended without a sum."""
        facts = get_record(self.memory, "secagg/ended", "ended") or {}
        if (facts.get("round"), facts.get("kind")) != (task.round, task.kind):
            return []
        return [(bytes.fromhex(t1), bytes.fromhex(proof)) for t1, proof in facts["ended"]]

    def save_ended(self, task: Task, ended: Ended) -> None:
        facts = {"round": task.round, "kind": task.kind, "ended": [[t1.hex(), proof.hex()] for t1, proof in ended]}
        put_record(self.memory, "secagg/ended", "ended", facts)

    def exclude(self, site: str, *, round: int, code: str) -> None:
        """Excludes a site from further sessions of one round. Exclusions of earlier rounds are deleted."""
        known = self._excluded()
        sites = known["sites"] if known["round"] == round else {}
        self._save_excluded(known | {"round": round, "sites": sites | {site: code}})

    def expel(self, site: str, *, code: str) -> None:
        """Excludes a site from all further sessions of the run."""
        known = self._excluded()
        self._save_excluded(known | {"expelled": known["expelled"] | {site: code}})

    def excluded(self, site: str, *, round: int) -> str:
        """The code for which this site is excluded from this round; empty if it is not."""
        known = self._excluded()
        sites = known["sites"] if known["round"] == round else {}
        return str((sites | known["expelled"]).get(site, ""))

    def _excluded(self) -> dict[str, Any]:
        found = get_record(self.memory, "secagg/excluded", "excluded") or {}
        return {"round": 0, "sites": {}, "expelled": {}} | dict(found)

    def _save_excluded(self, known: dict[str, Any]) -> None:
        put_record(self.memory, "secagg/excluded", "excluded", known)

    def _put(self, kind: str, blob: bytes) -> None:
        self.memory.put(f"secagg/{kind}", blob)
