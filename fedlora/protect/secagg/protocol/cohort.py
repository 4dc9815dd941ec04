"""The sites of a session and their signed statements: advertisements, the cohort.

Everything here is public. A session's name, ``t1``, is the digest of everything that its sites must agree on: the task's context
and all advertisements. All keys are salted with it: if a server shows different things to two sites, their masks do not cancel.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PublicKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PublicKey

from fedlora.core.errors import (
    BadSignature,
    CohortTooSmall,
    EnvelopeError,
    LoneChange,
    WireError,
    WrongContext,
)
from fedlora.core.limits import MAX_SITES
from fedlora.core.reader import Reader
from fedlora.formats.keys import KEM_BYTES, PublicIdentity

SIGNATURE: Final = 64
"""Bytes of an Ed25519 signature."""


@dataclass(frozen=True, slots=True)
class SessionRequirements:
    """A site's minimum requirements for a session. They come from its own roster and the plan, never from a message.

    Attributes:
        max_colluding: number of sites that may collude with the server without learning another site's update.
        min_cohort: fewest sites in a session, and fewest updates in a sum.
        groups: the roster's groups of at least ``max_colluding + 2`` sites. A session and a sum cover whole groups only. None:
            any sites.
    """

    max_colluding: int
    min_cohort: int
    groups: tuple[frozenset[str], ...] | None = None

    @property
    def smallest(self) -> int:
        """Fewest sites with which a session may begin: security needs ``2 t > n + c``, two honest inputs at the least."""
        return max(3, 3 * self.max_colluding, self.min_cohort)

    def threshold(self, n: int) -> int:
        """Number of shares that rebuild a secret, and of votes that decide a session: more than two thirds of the sites.

        Any two sets of that many sites have more than ``max_colluding`` sites in common.
        """
        return 2 * n // 3 + 1

    def whole(self, names: Collection[str]) -> frozenset[str]:
        """The sites among these whose whole group is among these."""
        here = frozenset(names)
        return here if self.groups is None else frozenset().union(*(group for group in self.groups if group <= here))

    def group_of(self, name: str) -> frozenset[str] | None:
        """The group of a site; None where any sites may be added up.

        Raises:
            LoneChange: it belongs to none.
        """
        if self.groups is None:
            return None
        for group in self.groups:
            if name in group:
                return group
        raise LoneChange(
            f"{name} is in no complete group of at least {self.max_colluding + 2} sites on the roster",
            hint="ask a coordinator to look at `fedlora roster show`: a new site waits for others, and a site whose group had a "
            "revoked member sits out",
        )

    def check_whole(self, names: Collection[str]) -> None:
        """Refuses a set of sites that is not made of whole groups.

        Raises:
            LoneChange.
        """
        if parts := frozenset(names) - self.whole(names):
            raise LoneChange(
                f"{', '.join(sorted(parts))} without the others of their groups: a sum over parts of groups, compared with "
                "other sums, could reveal single updates",
                hint="bring the others back, or continue without these; `fedlora roster show` prints the groups",
            )

    def counting(self, measured: Collection[str]) -> frozenset[str]:
        """Those of these sites, which have measured something, whose evaluation counters go into a sum; all others send zeros.

        They are ``max_colluding + 2`` at least, and as many in each group: however sums over whole groups are compared, no figure
        is one site's, or few sites' of which all but one may collude.

        Args:
            measured: of the cohort. Of what the relay says no site may make this depend: it can say something else to each.
        """
        return frozenset().union(*(p for p in self._parts(measured) if len(p) >= self.max_colluding + 2))

    def check_counting(self, counting: Collection[str], names: Collection[str]) -> None:
        """Refuses a sum over ``names`` that would hold the evaluation of a few sites only.

        Args:
            counting: see :meth:`counting`.

        Raises:
            LoneChange.
        """
        here = frozenset(names)
        for part in self._parts(counting):
            if 0 < len(part & here) < self.max_colluding + 2:
                raise LoneChange(
                    f"the sum would hold the evaluation of only {', '.join(sorted(part & here))}",
                    hint=f"nothing to do: it is asked for again among the sites that are left; at least {self.max_colluding + 2} "
                    "must have enough held-out rows, or all send zeros",
                )

    def _parts(self, names: Collection[str]) -> list[frozenset[str]]:
        here = frozenset(names)
        return [here] if self.groups is None else [here & group for group in self.groups]

    def fewest_inputs(self, n: int) -> int:
        """Fewest updates in a sum."""
        return max(self.threshold(n), self.max_colluding + 2, self.min_cohort)


def count_of_sites(reader: Reader, what: str) -> int:
    """The next number, which counts sites. It is compared before anything of that number is read.

    Raises:
        WireError: more than a roster has.
    """
    if (count := reader.number()) > MAX_SITES:
        raise WireError(f"{what}: {count} sites, at most {MAX_SITES}")
    return count


def read_session(reader: Reader, t1: bytes) -> None:
    """Reads a session's name, which must be this one.

    Raises:
        WrongContext: of another session.
    """
    if reader.take(32) != t1:
        raise WrongContext("a message of another session")


def sign(key: Ed25519PrivateKey, label: str, text: bytes) -> bytes:
    """A signature of a text under a label that says what kind of text it is; 64 bytes."""
    return key.sign(_signed(label, text))


def check_signature(identity: PublicIdentity, label: str, text: bytes, signature: bytes) -> None:
    """Inverse of :func:`sign`.

    Raises:
        BadSignature.
    """
    try:
        identity.verify_key().verify(signature, _signed(label, text))
    except InvalidSignature:
        raise BadSignature(f"{label}: not signed by {identity.name}") from None


def _signed(label: str, text: bytes) -> bytes:
    return b"fedlora/v1/sa/" + label.encode() + b"\0" + hashlib.sha256(text).digest()


@dataclass(frozen=True, slots=True)
class Advert:
    """A site's keys for one session, signed by it.

    Attributes:
        context: digest of the task as this site has seen it.
        seal: public key to which its shares are sealed (ML-KEM-768 then X25519, raw).
        mask: public key from which pair masks are derived; if the site drops out, its shares rebuild the private key.
        promise: digest of the seed of its self mask.
        measured: whether the counters of its evaluation are not all zero.
    """

    name: str
    context: bytes
    seal: bytes
    mask: bytes
    promise: bytes
    measured: bool
    signature: bytes = b""

    def signed(self, key: Ed25519PrivateKey) -> Advert:
        """The same under the site's signature."""
        return replace(self, signature=sign(key, "advertise", self._text()))

    def dump(self) -> bytes:
        return self._text() + self.signature

    def _text(self) -> bytes:
        name = self.name.encode()
        return bytes([len(name)]) + name + self.context + self.seal + self.mask + self.promise + bytes([self.measured])

    @classmethod
    def read(cls, reader: Reader) -> Advert:
        """Inverse of :meth:`dump`; checks no signature.

        Raises:
            WireError: malformed.
        """
        try:
            name = reader.take(reader.take(1)[0]).decode("ascii")
        except UnicodeDecodeError:
            raise WireError("advertisement: the name is not ASCII") from None
        context, seal, mask, promise = (reader.take(n) for n in (32, KEM_BYTES, KEM_BYTES, 32))
        measured = reader.take(1)[0]
        if measured > 1:
            raise WireError("advertisement: whether the site has measured something is 0 or 1")
        return cls(name, context, seal, mask, promise, bool(measured), reader.take(SIGNATURE))

    def verify(self, identity: PublicIdentity) -> None:
        """Checks the signature against the site's keys on the roster, and that both session keys are valid.

        Raises:
            BadSignature, KeyFileError.
        """
        check_signature(identity, "advertise", self._text(), self.signature)
        self.seal_key(), self.mask_key()

    def seal_key(self) -> MLKEM768X25519PublicKey:
        return _kem_key(self.seal)

    def mask_key(self) -> MLKEM768X25519PublicKey:
        return _kem_key(self.mask)

    def mask_point(self) -> X25519PublicKey:
        """The classical part of the mask key."""
        return X25519PublicKey.from_public_bytes(self.mask[-32:])


def _kem_key(raw: bytes) -> MLKEM768X25519PublicKey:
    # PublicIdentity checks the sealing key (points of small order are refused). The signing key is a placeholder.
    return PublicIdentity("session", _BASE_POINT, raw).kem_key()


_BASE_POINT: Final = bytes([0x58, *[0x66] * 31])


@dataclass(frozen=True, slots=True)
class Cohort:
    """The sites of one session, in order of name, and the session's name.

    Attributes:
        adverts: verified.
        threshold: shares that rebuild a secret.
        t1: 32 bytes that name the session.
    """

    adverts: tuple[Advert, ...]
    threshold: int
    t1: bytes

    @classmethod
    def of(cls, adverts: Sequence[Advert], requirements: SessionRequirements) -> Cohort:
        """A session among verified sites.

        Raises:
            CohortTooSmall: fewer than the rules demand.
            LoneChange: a group is incomplete.
            WireError: too many, or one twice.
            WrongContext: they have not all seen the same task.
        """
        order = tuple(sorted(adverts, key=lambda a: a.name))
        n = len(order)
        if n < requirements.smallest:
            raise CohortTooSmall(f"{n} sites are ready, a session needs {requirements.smallest}")
        if n > MAX_SITES or len({a.name for a in order}) < n:
            raise WireError(f"{n} advertisements, at most {MAX_SITES} and one a site")
        if len({a.context for a in order}) > 1:
            raise WrongContext("the sites of this session have been shown different tasks")
        requirements.check_whole([a.name for a in order])
        t = requirements.threshold(n)
        text = b"".join(a.dump() for a in order)
        t1 = hashlib.sha256(b"fedlora/v1/sa/session\0" + order[0].context + struct.pack(">HH", n, t) + text).digest()
        return cls(order, t, t1)

    @property
    def names(self) -> list[str]:
        return [a.name for a in self.adverts]

    @property
    def measured(self) -> frozenset[str]:
        """The sites that have measured something."""
        return frozenset(a.name for a in self.adverts if a.measured)

    def dump(self) -> bytes:
        return struct.pack(">H", len(self.adverts)) + b"".join(a.dump() for a in self.adverts)

    @classmethod
    def parse(cls, blob: bytes, requirements: SessionRequirements, known: Callable[[str], PublicIdentity]) -> Cohort:
        """Inverse of :meth:`dump`; every advertisement is checked against the roster.

        Args:
            known: gives a site's keys on the roster; raises EnvelopeError (unknown-site) or RevokedSite.

        Raises:
            WireError, BadSignature, EnvelopeError (unknown-site), CohortTooSmall, WrongContext.
        """
        reader = Reader(blob, "cohort")
        adverts = [Advert.read(reader) for _ in range(count_of_sites(reader, "cohort"))]
        reader.end()
        for advert in adverts:
            advert.verify(known(advert.name))
        return cls.of(adverts, requirements)

    def number(self, name: str) -> int:
        """A site's number in the session, from 1. It is also the x coordinate of its shares.

        Raises:
            EnvelopeError (unknown-site): not in this session.
        """
        for i, advert in enumerate(self.adverts, 1):
            if advert.name == name:
                return i
        raise EnvelopeError("not in this session", code="unknown-site")

    def advert(self, number: int) -> Advert:
        """The advertisement of the site with this number.

        Raises:
            WireError: there is none.
        """
        if not 1 <= number <= len(self.adverts):
            raise WireError(f"site {number} of {len(self.adverts)}")
        return self.adverts[number - 1]

    def commitment(self, kind: str, *, dealer: int, holder: int, share: bytes) -> bytes:
        """A dealer's commitment to a share, 32 bytes. It hides the share, which has 256 random bits."""
        text = self.t1 + kind.encode() + struct.pack(">HH", dealer, holder) + share
        return hashlib.sha256(b"fedlora/v1/sa/share\0" + text).digest()


def leads(one: int, other: int) -> bool:
    """Whether site ``one`` sends the pair's ingredient to ``other``. Each site leads half of its pairs to balance traffic."""
    return (one < other) == ((one + other) % 2 == 1)
