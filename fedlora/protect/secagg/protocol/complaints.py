"""Complaints of a holder whose shares do not match the dealer's commitments, and the dealer's answer, which shows the shares.

Only lying sites complain about an honest dealer, and its answer tells them nothing new. A dealer that cannot show shares that
match its commitments has lied, and its own signature proves it.

Source: the complaints of verifiable secret sharing (Feldman, A Practical Scheme for Non-interactive Verifiable Secret Sharing,
1987; Gennaro et al., Secure Distributed Key Generation for Discrete-Log Based Cryptosystems, 1999).
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.core.errors import BadShare, WireError
from fedlora.core.reader import Reader
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Cohort, check_signature, leads, read_session, sign
from fedlora.protect.secagg.protocol.dealing import Opened, Statement


@dataclass(frozen=True, slots=True)
class Complaint:
    """A holder's signed statement that what some dealers sent to it does not match their commitments.

    Attributes:
        lies: dealer's number -> its signed statement.
    """

    holder: int
    lies: Mapping[int, Statement]
    signature: bytes

    @classmethod
    def make(cls, cohort: Cohort, holder: int, lies: Mapping[int, Statement], *, key: Ed25519PrivateKey) -> Complaint:
        return cls(holder, lies, sign(key, "complaint", cls._text(cohort, holder, lies)))

    @staticmethod
    def _text(cohort: Cohort, holder: int, lies: Mapping[int, Statement]) -> bytes:
        return cohort.t1 + struct.pack(">H", holder) + _dump_lies(lies)

    def dump(self) -> bytes:
        """Holder | count | per dealer: number, statement | signature."""
        return struct.pack(">H", self.holder) + _dump_lies(self.lies) + self.signature

    @classmethod
    def read(cls, reader: Reader, cohort: Cohort) -> Complaint:
        """Inverse of :meth:`dump`.

        Raises:
            WireError: malformed, without a dealer, or the dealers do not rise strictly.
        """
        holder = reader.number()
        cohort.advert(holder)
        lies: dict[int, Statement] = {}
        for _ in range(reader.number()):
            dealer = reader.number()
            cohort.advert(dealer)
            if dealer <= max(lies, default=0) or dealer == holder:
                raise WireError("complaint: dealers are not in strictly rising order")
            lies[dealer] = Statement.read(reader, leads=leads(dealer, holder))
        if not lies:
            raise WireError("complaint: about nobody")
        return cls(holder, lies, reader.take(SIGNATURE))

    def verify(self, cohort: Cohort, known: Callable[[str], PublicIdentity]) -> None:
        """Checks the signatures of the holder and of each dealer.

        Raises:
            BadSignature.
        """
        text = self._text(cohort, self.holder, self.lies)
        check_signature(known(cohort.advert(self.holder).name), "complaint", text, self.signature)
        for dealer, statement in self.lies.items():
            statement.verify(cohort, known(cohort.advert(dealer).name), dealer=dealer, holder=self.holder)


def _dump_lies(lies: Mapping[int, Statement]) -> bytes:
    return struct.pack(">H", len(lies)) + b"".join(struct.pack(">H", d) + s.dump() for d, s in sorted(lies.items()))


def most_complaint_bytes(sites: int) -> int:
    """Length of the longest complaint of one holder, which is about all other sites of so many."""
    return 4 + SIGNATURE + sites * (2 + 4 * 32 + SIGNATURE)


def dump_complaints(cohort: Cohort, complaints: Iterable[Complaint]) -> bytes:
    """The complaints about one dealer, for that dealer. Session (32) | count | complaints."""
    found = list(complaints)
    return cohort.t1 + struct.pack(">H", len(found)) + b"".join(c.dump() for c in found)


def read_complaints(cohort: Cohort, dealer: int, blob: bytes, known: Callable[[str], PublicIdentity]) -> list[int]:
    """The holders that complain about ``dealer``, in strictly rising order; each complaint is checked.

    Raises:
        WireError, WrongContext: malformed, of another session, or about somebody else.
        BadSignature: a holder has not signed its complaint, or the dealer not what it is said to have dealt.
    """
    reader, holders = Reader(blob, "complaints"), list[int]()
    read_session(reader, cohort.t1)
    for _ in range(reader.number()):
        one = Complaint.read(reader, cohort)
        if dealer not in one.lies or one.holder <= max(holders, default=0):
            raise WireError("complaints: about another site, or not in strictly rising order")
        one.verify(cohort, known)
        holders.append(one.holder)
    reader.end()
    return holders


def dump_opened(cohort: Cohort, shown: Mapping[int, Opened]) -> bytes:
    """A dealer's answer, by holder; or the answers for one holder, by dealer. Session (32) | count | per site: number, what was
    dealt, in clear."""
    return cohort.t1 + struct.pack(">H", len(shown)) + b"".join(struct.pack(">H", j) + o.dump() for j, o in sorted(shown.items()))


def opened_bytes(count: int) -> int:
    """Longest message of :func:`dump_opened`."""
    return 34 + count * (2 + 2 * 33 + 32)


def read_opened(cohort: Cohort, dealer: int, blob: bytes, due: Mapping[int, tuple[bytes, ...]]) -> dict[int, Opened]:
    """A dealer's answer to complaints, checked against its commitments.

    Args:
        due: holder's number -> the dealer's commitments to what it has dealt to that site.

    Raises:
        WireError, WrongContext: malformed, or of another session.
        BadShare: it does not match the dealer's commitments.
    """
    reader = Reader(blob, "opened shares")
    read_session(reader, cohort.t1)
    shown: dict[int, Opened] = {}
    for _ in range(reader.number()):
        holder = reader.number()
        if holder not in due or holder in shown:
            raise WireError("opened shares: of a site that has not complained")
        shown[holder] = Opened.read(reader, leads=leads(dealer, holder))
    reader.end()
    for holder, commitments in due.items():
        if holder not in shown or shown[holder].commitments(cohort, dealer=dealer, holder=holder) != commitments:
            raise BadShare(f"{cohort.advert(dealer).name} cannot show what it has committed to")
    return shown


def read_settled(cohort: Cohort, own: int, reader: Reader) -> dict[int, Opened]:
    """At a holder: the answers to its complaints, by dealer. :func:`fedlora.protect.secagg.protocol.dealing.receive` checks them.

    Raises:
        WireError, WrongContext: malformed, or of another session.
    """
    read_session(reader, cohort.t1)
    shown: dict[int, Opened] = {}
    for _ in range(reader.number()):
        dealer = reader.number()
        cohort.advert(dealer)
        if dealer == own or dealer <= max(shown, default=0):
            raise WireError("opened shares: dealers are not in strictly rising order")
        shown[dealer] = Opened.read(reader, leads=leads(dealer, own))
    return shown
