"""A site's messages in a session, as pure functions of its root secret and of the messages that it has received.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, 2017, in the form against an active
server and on the complete graph; with a post-quantum ingredient in each pair's key, and the votes of FORMAT.md, section 10.7.

All secrets are derived from 32 bytes, ``root``, so that an interrupted site sends the same bytes again.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Final

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey

from fedlora.core.errors import CannotOpen, CohortTooSmall, SessionError, WireError
from fedlora.core.reader import Reader
from fedlora.formats.derive import derive
from fedlora.formats.envelope import HPKE
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Advert, Cohort, SessionRequirements, check_signature, leads, sign
from fedlora.protect.secagg.protocol.masks import Stream
from fedlora.protect.secagg.protocol.shamir import SHARE_BYTES, split

ROOT_BYTES: Final = 32
"""Length of what all of a session's secrets follow from."""
BUNDLE_BYTES: Final = 2 * SHARE_BYTES + 1136
"""The two shares for one peer, sealed to it."""
PAIR_BYTES: Final = 32 + 1136
"""A pair's ingredient, sealed by the site that leads the pair to the other one's mask key."""


@dataclass(frozen=True, slots=True, repr=False)
class MaskKeys:
    """The keys behind a site's pair masks, from the seed that its peers hold shares of.

    Attributes:
        seed: 32 bytes, split into shares. If the site drops out, the shares rebuild it and its masks can be removed.
    """

    seed: bytes

    @property
    def private(self) -> MLKEM768X25519PrivateKey:
        return _private(derive(self.seed, "mask-keys", length=96))

    @property
    def point(self) -> X25519PrivateKey:
        """The classical half."""
        return X25519PrivateKey.from_private_bytes(derive(self.seed, "mask-keys", length=96)[64:])

    @property
    def public(self) -> bytes:
        return _public(derive(self.seed, "mask-keys", length=96))

    def ingredient(self, cohort: Cohort, *, dealer: int, holder: int) -> bytes:
        """The ingredient that the site which leads a pair adds to the pair's key; 32 bytes."""
        return derive(self.seed, "ingredient", salt=cohort.t1, context=struct.pack(">HH", dealer, holder))

    def pair(self, cohort: Cohort, *, own: int, peer: int, ingredient: bytes) -> tuple[bytes, bytes]:
        """Keys of the mask that this site and a peer share: for the vector, for the numbers."""
        agreed = self.point.exchange(cohort.advert(peer).mask_point())
        low, high = sorted((own, peer))
        both = derive(agreed + ingredient, "pair", salt=cohort.t1, context=struct.pack(">HH", low, high), length=64)
        return both[:32], both[32:]


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """All that a site keeps secret in one session.

    Raises:
        SessionError (secrets-gone): the root was deleted. What would follow from an empty one, everybody can compute.
    """

    root: bytes

    def __post_init__(self) -> None:
        if len(self.root) != ROOT_BYTES:
            raise SessionError("the secrets of this session are deleted", code="secrets-gone")

    @property
    def mask_keys(self) -> MaskKeys:
        return MaskKeys(derive(self.root, "mask-seed"))

    @property
    def self_seed(self) -> bytes:
        """Seed of the site's self mask; split into shares, and rebuilt if the site's update counts."""
        return derive(self.root, "self-seed")

    @property
    def sealing(self) -> MLKEM768X25519PrivateKey:
        """Opens the shares of other sites; not split into shares itself."""
        return _private(derive(self.root, "seal-keys", length=96))

    @property
    def sealing_public(self) -> bytes:
        return _public(derive(self.root, "seal-keys", length=96))


def _private(seed: bytes) -> MLKEM768X25519PrivateKey:
    return MLKEM768X25519PrivateKey(MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:]))


def _public(seed: bytes) -> bytes:
    mlkem, x25519 = MLKEM768PrivateKey.from_seed_bytes(seed[:64]), X25519PrivateKey.from_private_bytes(seed[64:])
    return mlkem.public_key().public_bytes_raw() + x25519.public_key().public_bytes_raw()


def promise(self_seed: bytes) -> bytes:
    """The digest of the self mask's seed that a site advertises."""
    return hashlib.sha256(b"fedlora/v1/sa/promise\0" + self_seed).digest()


def self_keys(self_seed: bytes, cohort: Cohort) -> tuple[bytes, bytes]:
    """Keys of a site's own mask: for the vector, for the numbers."""
    both = derive(self_seed, "self", salt=cohort.t1, length=64)
    return both[:32], both[32:]


def advertise(name: str, context: bytes, secrets: Secrets, *, key: Ed25519PrivateKey, measured: bool) -> Advert:
    """Message of the step ``advertise``: the site's public keys for the session, and whether it has measured, signed."""
    own_promise = promise(secrets.self_seed)
    return Advert(name, context, secrets.sealing_public, secrets.mask_keys.public, own_promise, measured).signed(key)


def _info(label: str, cohort: Cohort, dealer: int, holder: int) -> bytes:
    return b"fedlora/v1/sa/" + label.encode() + b"\0" + cohort.t1 + struct.pack(">HH", dealer, holder)


@dataclass(frozen=True, slots=True)
class Dealt:
    """What one dealer has sent to one holder, signed by the dealer: no relay can change it, and the dealer cannot deny it.

    Attributes:
        commitments: to the holder's share of the mask seed, of the self seed, and to the ingredient (empty if the holder leads).
        sealed: the shares, sealed to the holder, and the ingredient, if the dealer leads.
        signature: the dealer's, over :meth:`statement`.
    """

    commitments: tuple[bytes, bytes, bytes]
    sealed: bytes
    signature: bytes

    @property
    def statement(self) -> Statement:
        return Statement(self.commitments, hashlib.sha256(self.sealed).digest(), self.signature)

    def dump(self) -> bytes:
        """As it is relayed: commitments to the shares (64) | part of the deal."""
        return b"".join(self.commitments[:2]) + self.sealed + self.commitments[2] + self.signature

    @classmethod
    def read(cls, reader: Reader, shares: tuple[bytes, bytes], *, leads: bool) -> Dealt:
        """Reads the holder's part of a deal: sealed | commitment to the ingredient | signature.

        Args:
            shares: the commitments to the two shares, which stand elsewhere in a deal.

        Raises:
            WireError: cut short.
        """
        sealed, pair = reader.take(BUNDLE_BYTES + (PAIR_BYTES if leads else 0)), reader.take(32 if leads else 0)
        return cls((*shares, pair), sealed, reader.take(SIGNATURE))


@dataclass(frozen=True, slots=True)
class Statement:
    """What a dealer has signed for one holder, without the sealed bytes: enough to prove a lie."""

    commitments: tuple[bytes, bytes, bytes]
    sealed_digest: bytes
    signature: bytes

    def verify(self, cohort: Cohort, identity: PublicIdentity, *, dealer: int, holder: int) -> None:
        """Checks the dealer's signature.

        Raises:
            BadSignature.
        """
        check_signature(
            identity, "deal", _deal_text(cohort, dealer, holder, self.commitments, self.sealed_digest), self.signature
        )

    def dump(self) -> bytes:
        return b"".join(self.commitments) + self.sealed_digest + self.signature

    @classmethod
    def read(cls, reader: Reader, *, leads: bool) -> Statement:
        """Inverse of :meth:`dump`.

        Raises:
            WireError: cut short.
        """
        commitments = reader.take(32), reader.take(32), reader.take(32 if leads else 0)
        return cls(commitments, reader.take(32), reader.take(SIGNATURE))


def _deal_text(cohort: Cohort, dealer: int, holder: int, commitments: tuple[bytes, bytes, bytes], sealed: bytes) -> bytes:
    return cohort.t1 + struct.pack(">HH", dealer, holder) + b"".join(commitments) + sealed


def dealt_bytes(*, leads: bool) -> int:
    """Exact length of what one dealer sends to one holder."""
    return 64 + BUNDLE_BYTES + SIGNATURE + (32 + PAIR_BYTES if leads else 0)


@dataclass(frozen=True, slots=True, repr=False)
class Opened:
    """What one dealer deals to one holder, in clear: the content of a sealed part, or shown to settle a complaint.

    Attributes:
        mask, own: shares of its two seeds.
        ingredient: of the pair's key, 32 bytes; empty if the holder leads.
    """

    mask: bytes
    own: bytes
    ingredient: bytes

    def commitments(self, cohort: Cohort, *, dealer: int, holder: int) -> tuple[bytes, bytes, bytes]:
        def to(kind: str, secret: bytes) -> bytes:
            return cohort.commitment(kind, dealer=dealer, holder=holder, share=secret)

        return to("mask", self.mask), to("self", self.own), to("ingredient", self.ingredient) if self.ingredient else b""

    def dump(self) -> bytes:
        return self.mask + self.own + self.ingredient

    @classmethod
    def read(cls, reader: Reader, *, leads: bool) -> Opened:
        """Inverse of :meth:`dump`.

        Raises:
            WireError: cut short.
        """
        return cls(reader.take(SHARE_BYTES), reader.take(SHARE_BYTES), reader.take(32 if leads else 0))


def opened(cohort: Cohort, own: int, secrets: Secrets, holders: Iterable[int]) -> dict[int, Opened]:
    """What this site has dealt to each of these holders, in clear."""
    shares, keys = _shares(cohort, secrets), secrets.mask_keys
    return {
        j: Opened(
            shares["mask"][j - 1],
            shares["self"][j - 1],
            keys.ingredient(cohort, dealer=own, holder=j) if j != own and leads(own, j) else b"",
        )
        for j in holders
    }


def deal(cohort: Cohort, own: int, secrets: Secrets, *, key: Ed25519PrivateKey) -> bytes:
    """Message of the step ``share``: a commitment to each share, and for each peer its shares, sealed and signed.

    Session (32) | per site, itself included: commitments to its share of the mask seed and of the self seed (32 each) | per peer:
    BUNDLE_BYTES; if this site leads the pair PAIR_BYTES and a commitment to the ingredient (32); signature.
    """
    peers = [j for j in range(1, len(cohort.adverts) + 1) if j != own]
    clear = opened(cohort, own, secrets, [own, *peers])
    commitments = {j: one.commitments(cohort, dealer=own, holder=j) for j, one in clear.items()}
    out = [cohort.t1, *(b"".join(commitments[j][:2]) for j in sorted(commitments))]
    for j in peers:
        peer, secret = cohort.advert(j), clear[j]
        sealed = HPKE.encrypt(secret.mask + secret.own, peer.seal_key(), info=_info("shares", cohort, own, j))
        if secret.ingredient:
            sealed += HPKE.encrypt(secret.ingredient, peer.mask_key(), info=_info("ingredient", cohort, own, j))
        text = _deal_text(cohort, own, j, commitments[j], hashlib.sha256(sealed).digest())
        out += [sealed, commitments[j][2], sign(key, "deal", text)]
    return b"".join(out)


def _shares(cohort: Cohort, secrets: Secrets) -> dict[str, list[bytes]]:
    n, t = len(cohort.adverts), cohort.threshold
    seeds = {"mask": secrets.mask_keys.seed, "self": secrets.self_seed}
    return {
        kind: split(seed, shares=n, threshold=t, entropy=Stream(derive(secrets.root, f"coefficients/{kind}", salt=cohort.t1)))
        for kind, seed in seeds.items()
    }


@dataclass(frozen=True, slots=True, repr=False)
class Inbox:
    """What a site has received from its peers, itself included.

    Attributes:
        shares: dealer's number -> its share of the mask seed, its share of the self seed.
        ingredients: number of a peer that leads the pair -> its ingredient.
    """

    shares: Mapping[int, tuple[bytes, bytes]]
    ingredients: Mapping[int, bytes]


@dataclass(frozen=True, slots=True, repr=False)
class Received:
    """What a site has received, and the dealers whose part of it is wrong.

    Attributes:
        inbox: complete if there are no lies.
        lies: dealer's number -> its signed statement, where its part does not match its commitments.
    """

    inbox: Inbox
    lies: Mapping[int, Statement]


def receive(
    cohort: Cohort,
    own: int,
    secrets: Secrets,
    reader: Reader,
    *,
    requirements: SessionRequirements,
    known: Callable[[str], PublicIdentity],
    settled: Mapping[int, Opened] = {},
) -> Received:
    """Reads what the server relays: count, then per peer that dealt: its number and what it dealt to this site.

    Args:
        known: gives a site's keys on the roster.
        settled: what dealers have shown after a complaint of this site; used if it matches their commitments.

    Raises:
        CohortTooSmall: too few have dealt.
        BadSignature: changed on the way: the dealer has not signed it for this site in this session.
        WireError: malformed.
    """
    mine = _shares(cohort, secrets)
    shares = {own: (mine["mask"][own - 1], mine["self"][own - 1])}
    ingredients: dict[int, bytes] = {}
    lies: dict[int, Statement] = {}
    count, last = reader.number(), 0
    if count + 1 < requirements.fewest_inputs(len(cohort.adverts)):
        raise CohortTooSmall(f"only {count + 1} of {len(cohort.adverts)} sites have dealt their shares")
    sealing, masking = secrets.sealing, secrets.mask_keys.private
    for _ in range(count):
        dealer = reader.number()
        advert = cohort.advert(dealer)
        if dealer <= last or dealer == own:
            raise WireError("dealers are not in strictly rising order")
        last = dealer
        dealt = Dealt.read(reader, (reader.take(32), reader.take(32)), leads=leads(dealer, own))
        dealt.statement.verify(cohort, known(advert.name), dealer=dealer, holder=own)
        one = _opened(cohort, dealt, sealing, masking, dealer=dealer, holder=own)
        if one is None and (shown := settled.get(dealer)) is not None:
            one = shown if shown.commitments(cohort, dealer=dealer, holder=own) == dealt.commitments else None
        if one is None:
            lies[dealer] = dealt.statement
            continue
        shares[dealer] = one.mask, one.own
        if one.ingredient:
            ingredients[dealer] = one.ingredient
    return Received(Inbox(shares, ingredients), lies)


def _opened(
    cohort: Cohort,
    dealt: Dealt,
    sealing: MLKEM768X25519PrivateKey,
    masking: MLKEM768X25519PrivateKey,
    *,
    dealer: int,
    holder: int,
) -> Opened | None:
    """What was dealt, opened; None if it does not match the dealer's commitments."""
    bundle, pair = dealt.sealed[:BUNDLE_BYTES], dealt.sealed[BUNDLE_BYTES:]
    try:
        both = _open(bundle, sealing, _info("shares", cohort, dealer, holder))
        ingredient = _open(pair, masking, _info("ingredient", cohort, dealer, holder)) if pair else b""
    except CannotOpen:
        return None
    one = Opened(both[:SHARE_BYTES], both[SHARE_BYTES:], ingredient)
    return one if one.commitments(cohort, dealer=dealer, holder=holder) == dealt.commitments else None


def _open(sealed: bytes, key: MLKEM768X25519PrivateKey, info: bytes) -> bytes:
    try:
        return HPKE.decrypt(sealed, key, info=info)
    except (InvalidTag, ValueError, TypeError):
        raise CannotOpen("cannot be opened") from None


def open_ingredient(cohort: Cohort, keys: MaskKeys, sealed: bytes, *, dealer: int, holder: int) -> bytes:
    """The ingredient that ``dealer`` sealed to ``holder``, by the holder's rebuilt keys.

    Raises:
        CannotOpen.
    """
    return _open(sealed, keys.private, _info("ingredient", cohort, dealer, holder))
