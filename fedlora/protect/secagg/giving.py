"""What a site sends after the shares are dealt: its masked update, its vote, its shares. FORMAT.md, 10.5 to 10.8."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Callable, Sequence
from typing import Final, Literal, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from numpy.typing import NDArray

from fedlora.core.errors import CohortTooSmall, WireError
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Cohort, SessionRequirements, leads
from fedlora.protect.secagg.protocol.dealing import Inbox, Secrets, self_keys
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.rings import Words, pack_into, packed_bytes, room
from fedlora.protect.secagg.protocol.votes import Delivered

HEAD_BYTES: Final = 32 + SIGNATURE
"""Bytes before the body of a masked update."""


_Masks: TypeAlias = list[tuple[bytes, Literal[1, -1]]]


def masks_of(cohort: Cohort, own: int, secrets: Secrets, inbox: Inbox) -> tuple[_Masks, _Masks]:
    """Keys and signs of a site's masks, for its vector and for its numbers: its own mask, plus the pair masks with later peers,
    minus the pair masks with earlier peers."""
    keys = secrets.mask_keys
    masks: list[tuple[tuple[bytes, bytes], Literal[1, -1]]] = [(self_keys(secrets.self_seed, cohort), 1)]
    for peer in inbox.shares:
        if peer != own:
            ingredient = inbox.ingredients[peer] if leads(peer, own) else keys.ingredient(cohort, dealer=own, holder=peer)
            masks.append((keys.pair(cohort, own=own, peer=peer, ingredient=ingredient), 1 if own < peer else -1))
    return [(pair[0], sign) for pair, sign in masks], [(pair[1], sign) for pair, sign in masks]


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
    """Message of the step ``mask``: the masked update. Session (32) | signature (64) | body: numbers, then the vector, packed.

    Args:
        levels: (n,) words of the ring; not changed.
        numbers: (m,) uint64; not changed.
        bits: width of the ring.

    Returns:
        The message, and the digest of its body.
    """
    at, more = HEAD_BYTES + numbers.nbytes, packed_bytes(levels.size, bits)
    out = memoryview(bytearray(at + more))
    counts, vector = np.frombuffer(out[HEAD_BYTES:at], "<u8"), room(out[at:], levels.size, bits)
    counts[:], vector[:] = numbers, levels
    of_vector, of_numbers = masks_of(cohort, own, secrets, inbox)
    add_masks(counts, of_numbers)
    body = hashlib.sha256(out[HEAD_BYTES:at])

    def pack_and_hash(part: slice) -> None:  # while the next parts are masked
        packed = out[at + packed_bytes(part.start, bits) : at + packed_bytes(part.stop, bits)]
        pack_into(packed, vector[part], bits)
        body.update(packed)

    add_masks(vector, of_vector, done=pack_and_hash)
    digest = body.digest()
    out[:HEAD_BYTES] = cohort.t1 + Delivered.make(cohort, own, digest, key=key).signature
    return out, digest


def check_deliveries(
    cohort: Cohort,
    own: int,
    digest: bytes,
    delivered: Sequence[Delivered],
    *,
    dealers: Sequence[int],
    requirements: SessionRequirements,
    known: Callable[[str], PublicIdentity],
) -> None:
    """Checks that this site may agree to a sum of exactly these updates.

    Args:
        digest: of this site's own masked update.
        dealers: the sites whose shares it holds.

    Raises:
        CohortTooSmall: too few.
        LoneChange: a group is incomplete, or the evaluations of too few sites are among the updates.
        WireError: its own update is missing or differs, or one is of a site that has dealt no shares.
        BadSignature: one is not signed by its site.
    """
    fewest = requirements.fewest_inputs(len(cohort.adverts))
    if len(delivered) < fewest:
        raise CohortTooSmall(f"{len(delivered)} updates would be added up, at least {fewest} must be")
    by_number = {d.number: d for d in delivered}
    if own not in by_number or by_number[own].digest != digest:
        raise WireError("this site's own update is missing among those to be added up, or it is not the one that was sent")
    if not by_number.keys() <= set(dealers):
        raise WireError("an update would count although its site has dealt no shares")
    names = [cohort.advert(number).name for number in by_number]
    requirements.check_whole(names)
    requirements.check_counting(requirements.counting(cohort.measured), names)
    for one in delivered:
        one.verify(cohort, known)


def reveal(cohort: Cohort, inbox: Inbox, delivered: Sequence[Delivered]) -> bytes:
    """Message of the step ``unmask``: one share for each site that dealt, never both of its shares.

    The share of the self seed if the site's update counts, of the mask seed if the site dropped out. Session (32) | count | per
    site: number, share (33).
    """
    counted = {d.number for d in delivered}
    out = [cohort.t1, struct.pack(">H", len(inbox.shares))]
    for number, (mask_share, self_share) in sorted(inbox.shares.items()):
        out.append(struct.pack(">H", number) + (self_share if number in counted else mask_share))
    return b"".join(out)
