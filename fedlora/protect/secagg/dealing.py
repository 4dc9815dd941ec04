"""A site's part in a session, as pure functions of its root secret and what it has been shown.

Bonawitz et al., Practical Secure Aggregation for Privacy-Preserving Machine Learning, 2017, in the form against an active
server and on the complete graph; with a post-quantum ingredient in each pair's key, and the votes of FORMAT.md, section 7.

Everything secret comes from 32 bytes, ``root``, so that an interrupted site says the same again and never something else.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.hpke import MLKEM768X25519PrivateKey
from numpy.typing import NDArray

from fedlora.errors import BadShare, CannotOpen, CohortTooSmall, WireError
from fedlora.protect.envelope import HPKE
from fedlora.protect.keys import PublicIdentity
from fedlora.protect.secagg.cohort import SIGNATURE, Advert, Cohort, Delivered, Reader, Rules, leads
from fedlora.protect.secagg.masks import Stream, add_masks, derive
from fedlora.protect.secagg.rings import Words, pack_into, packed_bytes, room
from fedlora.protect.secagg.shamir import SHARE_BYTES, split

__all__ = [
    "BUNDLE_BYTES",
    "HEAD_BYTES",
    "PAIR_BYTES",
    "Inbox",
    "MaskKeys",
    "Secrets",
    "advertise",
    "check_deliveries",
    "deal",
    "mask",
    "masked",
    "promise",
    "receive",
    "reveal",
    "self_keys",
]

BUNDLE_BYTES: Final = 2 * SHARE_BYTES + 1136
"""The two shares for one peer, sealed to it."""
HEAD_BYTES: Final = 32 + SIGNATURE
"""What stands before the body of a masked update."""
PAIR_BYTES: Final = 32 + 1136
"""A pair's ingredient, sealed by the site that leads the pair to the other one's mask key."""


@dataclass(frozen=True, slots=True, repr=False)
class MaskKeys:
    """The keys behind a site's pair masks, from the seed that its peers hold shares of.

    Attributes:
        seed: 32 bytes, shared out. If the site drops out, the shares rebuild it and its masks can be taken off.
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
        """What the site that leads a pair adds to its key; 32 bytes."""
        return derive(self.seed, "ingredient", salt=cohort.t1, context=struct.pack(">HH", dealer, holder))

    def pair(self, cohort: Cohort, *, own: int, peer: int, ingredient: bytes) -> tuple[bytes, bytes]:
        """Keys of the mask that this site and a peer share: for the vector, for the numbers."""
        agreed = self.point.exchange(cohort.advert(peer).mask_point())
        low, high = sorted((own, peer))
        both = derive(agreed + ingredient, "pair", salt=cohort.t1, context=struct.pack(">HH", low, high), length=64)
        return both[:32], both[32:]


@dataclass(frozen=True, slots=True, repr=False)
class Secrets:
    """All that a site keeps secret in one session."""

    root: bytes

    @property
    def mask_keys(self) -> MaskKeys:
        return MaskKeys(derive(self.root, "mask-seed"))

    @property
    def self_seed(self) -> bytes:
        """Seed of the mask that is this site's alone; it is shared out, and rebuilt if the site's update counts."""
        return derive(self.root, "self-seed")

    @property
    def sealing(self) -> MLKEM768X25519PrivateKey:
        """Opens the shares of others. Not shared out."""
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
    """The digest of a self-mask's seed that its owner advertises."""
    return hashlib.sha256(b"fedlora/v1/sa/promise\0" + self_seed).digest()


def self_keys(self_seed: bytes, cohort: Cohort) -> tuple[bytes, bytes]:
    """Keys of a site's own mask: for the vector, for the numbers."""
    both = derive(self_seed, "self", salt=cohort.t1, length=64)
    return both[:32], both[32:]


def advertise(name: str, context: bytes, secrets: Secrets, *, key: Ed25519PrivateKey) -> Advert:
    """First word of a site: its public keys for the session, signed."""
    return Advert.make(name, context, secrets.sealing_public, secrets.mask_keys.public, promise(secrets.self_seed), key=key)


def _info(label: str, cohort: Cohort, dealer: int, holder: int) -> bytes:
    return b"fedlora/v1/sa/" + label.encode() + b"\0" + cohort.t1 + struct.pack(">HH", dealer, holder)


def deal(cohort: Cohort, own: int, secrets: Secrets) -> bytes:
    """Second word: a commitment to each share, and for each peer its shares, sealed.

    Session (32) | per site, itself included: commitments to its share of the mask seed and of the self seed (32 each) | per
    peer: BUNDLE_BYTES, and PAIR_BYTES if this site leads the pair.
    """
    n, shares = len(cohort.adverts), _shares(cohort, secrets)
    out = [cohort.t1]
    for j in range(1, n + 1):
        out += [cohort.commitment(kind, dealer=own, holder=j, share=shares[kind][j - 1]) for kind in ("mask", "self")]
    keys = secrets.mask_keys
    for j, peer in enumerate(cohort.adverts, 1):
        if j == own:
            continue
        both = shares["mask"][j - 1] + shares["self"][j - 1]
        out.append(HPKE.encrypt(both, peer.seal_key(), info=_info("shares", cohort, own, j)))
        if leads(own, j):
            ingredient = keys.ingredient(cohort, dealer=own, holder=j)
            out.append(HPKE.encrypt(ingredient, peer.mask_key(), info=_info("ingredient", cohort, own, j)))
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


def receive(cohort: Cohort, own: int, secrets: Secrets, reader: Reader, *, rules: Rules) -> Inbox:
    """Reads what the server relays: count, then per peer that dealt: its number, two commitments, the bundle, the pair's part.

    Raises:
        CohortTooSmall: too few have dealt.
        CannotOpen: not sealed to this site in this session.
        BadShare: a share is not what its dealer has committed to.
        WireError: malformed.
    """
    mine = _shares(cohort, secrets)
    shares = {own: (mine["mask"][own - 1], mine["self"][own - 1])}
    ingredients: dict[int, bytes] = {}
    count, last = reader.number(), 0
    if count + 1 < rules.fewest_inputs(len(cohort.adverts)):
        raise CohortTooSmall(f"only {count + 1} of {len(cohort.adverts)} sites have dealt their shares")
    sealing, masking = secrets.sealing, secrets.mask_keys.private
    for _ in range(count):
        dealer = reader.number()
        cohort.advert(dealer)
        if dealer <= last or dealer == own:
            raise WireError("dealers are not in strictly rising order")
        last = dealer
        promised = reader.take(32), reader.take(32)
        both = _open(reader.take(BUNDLE_BYTES), sealing, _info("shares", cohort, dealer, own))
        pair = both[:SHARE_BYTES], both[SHARE_BYTES:]
        for kind, share, commitment in zip(("mask", "self"), pair, promised, strict=True):
            if cohort.commitment(kind, dealer=dealer, holder=own, share=share) != commitment:
                raise BadShare(f"{cohort.advert(dealer).name} dealt a share that is not the one it committed to")
        shares[dealer] = pair
        if leads(dealer, own):
            ingredients[dealer] = _open(reader.take(PAIR_BYTES), masking, _info("ingredient", cohort, dealer, own))
    return Inbox(shares, ingredients)


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


def mask(cohort: Cohort, own: int, secrets: Secrets, inbox: Inbox, vector: NDArray[Any], numbers: NDArray[Any]) -> None:
    """Hides the update, in place: its own mask, plus the pair's with each later peer, minus the pair's with each earlier one."""
    keys = secrets.mask_keys
    masks: list[tuple[tuple[bytes, bytes], Literal[1, -1]]] = [(self_keys(secrets.self_seed, cohort), 1)]
    for peer in inbox.shares:
        if peer != own:
            ingredient = inbox.ingredients[peer] if leads(peer, own) else keys.ingredient(cohort, dealer=own, holder=peer)
            masks.append((keys.pair(cohort, own=own, peer=peer, ingredient=ingredient), 1 if own < peer else -1))
    for i, target in enumerate((vector, numbers)):
        add_masks(target, [(pair[i], sign) for pair, sign in masks])


def masked(
    cohort: Cohort,
    own: int,
    secrets: Secrets,
    inbox: Inbox,
    levels: Words,
    numbers: NDArray[np.uint64],
    *,
    bits: int,
    key: Ed25519PrivateKey,
) -> tuple[memoryview, bytes]:
    """Third word: the update under its masks. Session (32) | signature (64) | body: numbers, then the vector, packed.

    Args:
        levels: (n,) words of the ring, which stay as they are.
        numbers: (m,) uint64, likewise.
        bits: width of the ring.

    Returns:
        The message, and the digest of its body.
    """
    at, more = HEAD_BYTES + numbers.nbytes, packed_bytes(levels.size, bits)
    out = memoryview(bytearray(at + more))
    counts, vector = np.frombuffer(out[HEAD_BYTES:at], "<u8"), room(out[at:], levels.size, bits)
    counts[:], vector[:] = numbers, levels
    mask(cohort, own, secrets, inbox, vector, counts)
    pack_into(out[at:], vector, bits)
    digest = hashlib.sha256(out[HEAD_BYTES:]).digest()
    out[:HEAD_BYTES] = cohort.t1 + Delivered.make(cohort, own, digest, key=key).signature
    return out, digest


def check_deliveries(
    cohort: Cohort,
    own: int,
    digest: bytes,
    delivered: Sequence[Delivered],
    *,
    dealers: Sequence[int],
    rules: Rules,
    known: Callable[[str], PublicIdentity],
) -> None:
    """Whether this site may agree that just these updates are added up.

    Args:
        digest: of this site's own masked update.
        dealers: the sites whose shares it holds.

    Raises:
        CohortTooSmall: too few.
        WireError: its own is missing or not the one it sent, or a site is among them that has not dealt.
        BadSignature: one is not signed by its site.
    """
    fewest = rules.fewest_inputs(len(cohort.adverts))
    if len(delivered) < fewest:
        raise CohortTooSmall(f"{len(delivered)} updates would be added up, at least {fewest} must be")
    rules.check_slots(cohort.advert(d.number).name for d in delivered)
    by_number = {d.number: d for d in delivered}
    if own not in by_number or by_number[own].digest != digest:
        raise WireError("this site's own update is missing among those to be added up, or it is not the one that was sent")
    if not by_number.keys() <= set(dealers):
        raise WireError("an update would count whose site has dealt no shares")
    for one in delivered:
        one.verify(cohort, known)


def reveal(cohort: Cohort, inbox: Inbox, delivered: Sequence[Delivered]) -> bytes:
    """Last word: one share for each site that dealt, never both: of the self seed where the update counts, of the mask seed
    where the site dropped out. Session (32) | count | per site: number, share (33)."""
    counted = {d.number for d in delivered}
    out = [cohort.t1, struct.pack(">H", len(inbox.shares))]
    for number, (mask_share, self_share) in sorted(inbox.shares.items()):
        out.append(struct.pack(">H", number) + (self_share if number in counted else mask_share))
    return b"".join(out)
