"""Delivered updates, the sites' votes on them, and certificates made of votes. FORMAT.md, 10.7."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Final

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.core.errors import (
    RevokedSite,
    SessionError,
    WireError,
)
from fedlora.core.reader import Reader
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Cohort, check_signature, count_of_sites, sign

COMMIT: Final = 1


ABORT: Final = 2


BURNED: Final = 3
"""Never sent: a site's own note after the server asked for two different votes. It then gives neither."""


_NO_DELIVERIES: Final = bytes(32)


@dataclass(frozen=True, slots=True)
class Delivered:
    """A site's signed statement that it has sent its masked update: the update's digest.

    The sites that have made one are the set ``U3`` in Bonawitz et al.
    """

    number: int
    digest: bytes
    signature: bytes

    @classmethod
    def make(cls, cohort: Cohort, number: int, digest: bytes, *, key: Ed25519PrivateKey) -> Delivered:
        return cls(number, digest, sign(key, "masked", cls._text(cohort, number, digest)))

    @staticmethod
    def _text(cohort: Cohort, number: int, digest: bytes) -> bytes:
        return cohort.t1 + struct.pack(">H", number) + digest

    def verify(self, cohort: Cohort, known: Callable[[str], PublicIdentity]) -> None:
        """Checks the site's signature.

        Raises:
            BadSignature.
        """
        identity = known(cohort.advert(self.number).name)
        check_signature(identity, "masked", self._text(cohort, self.number, self.digest), self.signature)

    @staticmethod
    def digest_of(delivered: Sequence[Delivered]) -> bytes:
        """Digest of a set of deliveries, in order of number. A vote is on this digest."""
        text = b"".join(struct.pack(">H", d.number) + d.digest for d in sorted(delivered, key=lambda d: d.number))
        return hashlib.sha256(b"fedlora/v1/sa/delivered\0" + text).digest()

    @staticmethod
    def dump_all(delivered: Sequence[Delivered]) -> bytes:
        order = sorted(delivered, key=lambda d: d.number)
        return struct.pack(">H", len(order)) + b"".join(struct.pack(">H", d.number) + d.digest + d.signature for d in order)

    @staticmethod
    def read_all(reader: Reader) -> list[Delivered]:
        """Inverse of :meth:`dump_all`.

        Raises:
            WireError: malformed, more than a roster has sites, or not in strictly rising order.
        """
        count = count_of_sites(reader, "deliveries")
        found = [Delivered(reader.number(), reader.take(32), reader.take(SIGNATURE)) for _ in range(count)]
        numbers = [d.number for d in found]
        if numbers != sorted(set(numbers)):
            raise WireError("deliveries are not in strictly rising order")
        return found


def vote_text(t1: bytes, verdict: int, delivered: bytes = _NO_DELIVERIES) -> bytes:
    """The text that a vote signs: the session, COMMIT or ABORT, and for COMMIT the digest of the deliveries."""
    return t1 + bytes([verdict]) + delivered


def sign_vote(text: bytes, *, key: Ed25519PrivateKey) -> bytes:
    """The signature of a vote, 64 bytes."""
    return sign(key, "vote", text)


def check_vote(signature: bytes, text: bytes, *, identity: PublicIdentity) -> None:
    """Checks the signature of a vote.

    Raises:
        BadSignature.
    """
    check_signature(identity, "vote", text, signature)


def certificate(votes: Mapping[int, bytes]) -> bytes:
    """The signatures of one vote, by the voters' numbers."""
    return struct.pack(">H", len(votes)) + b"".join(struct.pack(">H", n) + s for n, s in sorted(votes.items()))


def read_certificate(reader: Reader) -> dict[int, bytes]:
    """Inverse of :func:`certificate`.

    Raises:
        WireError: malformed, more than a roster has sites, or not in strictly rising order.
    """
    pairs = [(reader.number(), reader.take(SIGNATURE)) for _ in range(count_of_sites(reader, "votes"))]
    if [n for n, _ in pairs] != sorted({n for n, _ in pairs}):
        raise WireError("votes are not in strictly rising order")
    return dict(pairs)


def check_certificate(
    votes: Mapping[int, bytes],
    text: bytes,
    *,
    names: Sequence[str],
    threshold: int,
    known: Callable[[str], PublicIdentity],
) -> None:
    """Checks that at least ``threshold`` sites of ``names`` (in order of number) have signed this vote.

    A site that has been revoked since does not count.

    Raises:
        SessionError (votes-missing): fewer.
        BadSignature: a signature is not of the site that it is said to be of.
    """
    if any(not 1 <= n <= len(names) for n in votes):
        raise SessionError(f"a vote of a site that is none of {len(names)}", code="votes-missing")
    counted = 0
    for number, signature in votes.items():
        with suppress(RevokedSite):
            check_signature(known(names[number - 1]), "vote", text, signature)
            counted += 1
    if counted < threshold:
        raise SessionError(f"{counted} votes, {threshold} are needed", code="votes-missing")
