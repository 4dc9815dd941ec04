"""The server's computations in a session, as pure functions: relay the deals, check revealed shares, unmask the sum."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Literal

from numpy.typing import NDArray

from fedlora.core.errors import BadShare, CannotOpen, DealerLied, WireError
from fedlora.core.reader import Reader
from fedlora.formats.keys import PublicIdentity
from fedlora.protect.secagg.protocol.cohort import Cohort, leads, read_session
from fedlora.protect.secagg.protocol.dealing import (
    BUNDLE_BYTES,
    Dealt,
    MaskKeys,
    dealt_bytes,
    open_ingredient,
    promise,
    self_keys,
)
from fedlora.protect.secagg.protocol.masks import add_masks
from fedlora.protect.secagg.protocol.shamir import SHARE_BYTES, join, weights


@dataclass(frozen=True, slots=True)
class Deal:
    """What one site has dealt; the server cannot open any of it.

    Attributes:
        commitments: by holder's number: to the share of the mask seed, to that of the self seed.
        dealt: by holder's number, without the dealer's own.
    """

    commitments: Mapping[int, tuple[bytes, bytes]]
    dealt: Mapping[int, Dealt]

    @classmethod
    def parse(cls, cohort: Cohort, dealer: int, blob: bytes) -> Deal:
        """Reads the public parts of what :func:`fedlora.protect.secagg.protocol.dealing.deal` gives.

        Raises:
            WireError, WrongContext: malformed, or of another session.
        """
        reader, n = Reader(blob, "shares"), len(cohort.adverts)
        read_session(reader, cohort.t1)
        commitments = {j: (reader.take(32), reader.take(32)) for j in range(1, n + 1)}
        dealt = {}
        for j in range(1, n + 1):
            if j != dealer:
                dealt[j] = Dealt.read(reader, commitments[j], leads=leads(dealer, j))
        reader.end()
        return cls(commitments, dealt)

    def verify(self, cohort: Cohort, dealer: int, identity: PublicIdentity) -> None:
        """Checks that the dealer has signed each part, for the right holder.

        Raises:
            BadSignature.
        """
        for holder, one in self.dealt.items():
            one.statement.verify(cohort, identity, dealer=dealer, holder=holder)


def deal_bytes(cohort: Cohort, dealer: int) -> int:
    """Exact length of this dealer's message."""
    n = len(cohort.adverts)
    return 32 + 64 + sum(dealt_bytes(leads=leads(dealer, j)) for j in range(1, n + 1) if j != dealer)


def relay(cohort: Cohort, deals: Mapping[int, Deal], holder: int) -> bytes:
    """The parts of all deals that are for one site; see :func:`fedlora.protect.secagg.protocol.dealing.receive`."""
    dealers = [d for d in sorted(deals) if d != holder]
    out = [struct.pack(">H", len(dealers))]
    for dealer in dealers:
        out += [struct.pack(">H", dealer), deals[dealer].dealt[holder].dump()]
    return b"".join(out)


def parse_reveal(cohort: Cohort, deals: Mapping[int, Deal], counted: Iterable[int], holder: int, blob: bytes) -> dict[int, bytes]:
    """The shares that one site reveals, each checked against its dealer's commitment.

    Returns:
        Dealer's number -> share.

    Raises:
        WireError, WrongContext: malformed, or of another session.
        BadShare: a share is not the one that was dealt to this site.
    """
    reader, kinds = Reader(blob, "revealed shares"), {n: 1 for n in counted}
    read_session(reader, cohort.t1)
    if reader.number() != len(deals):
        raise WireError("revealed shares: one for each site that dealt is expected")
    out = {}
    for dealer in sorted(deals):
        if reader.number() != dealer:
            raise WireError("revealed shares: not in the order of the sites")
        share, kind = reader.take(SHARE_BYTES), kinds.get(dealer, 0)
        label = ("mask", "self")[kind]
        if cohort.commitment(label, dealer=dealer, holder=holder, share=share) != deals[dealer].commitments[holder][kind]:
            raise BadShare(f"{cohort.advert(holder).name} did not give the share that it was dealt")
        out[dealer] = share
    reader.end()
    return out


def reveal_bytes(deals: Mapping[int, Deal]) -> int:
    """Exact length of a site's message in the step ``unmask``."""
    return 34 + len(deals) * (2 + SHARE_BYTES)


def unmask(
    cohort: Cohort,
    deals: Mapping[int, Deal],
    counted: Iterable[int],
    revealed: Mapping[int, Mapping[int, bytes]],
    vector: NDArray[Any],
    numbers: NDArray[Any],
) -> None:
    """Removes all masks from the sum, in place: the counted sites' self masks, and their pair masks with sites that dropped out.

    Args:
        counted: numbers of the sites whose masked updates are in the sum.
        revealed: holder's number -> what :func:`parse_reveal` gave; at least ``cohort.threshold`` of them.

    Raises:
        DealerLied: a rebuilt secret differs from what its owner advertised.
        ValueError: too few holders.
    """
    holders = sorted(revealed)[: cohort.threshold]
    if len(holders) < cohort.threshold:
        raise ValueError(f"{len(holders)} holders, {cohort.threshold} are needed")
    lagrange, present = weights(holders), sorted(counted)
    masks: list[tuple[tuple[bytes, bytes], Literal[1, -1]]] = []
    for dealer in sorted(deals):
        seed = join({h: revealed[h][dealer] for h in holders}, lagrange)
        advert = cohort.advert(dealer)
        if dealer in present:
            if promise(seed) != advert.promise:
                raise DealerLied(_lie(advert.name), site=advert.name)
            masks.append((self_keys(seed, cohort), -1))
            continue
        keys = MaskKeys(seed)
        if keys.public != advert.mask:
            raise DealerLied(_lie(advert.name), site=advert.name)
        for peer in present:
            pair = keys.pair(cohort, own=dealer, peer=peer, ingredient=_ingredient(cohort, deals, keys, dealer, peer))
            masks.append((pair, -1 if peer < dealer else 1))
    for i, target in enumerate((vector, numbers)):
        add_masks(target, [(both[i], sign) for both, sign in masks])


def _ingredient(cohort: Cohort, deals: Mapping[int, Deal], keys: MaskKeys, gone: int, peer: int) -> bytes:
    """The ingredient of a pair's key: derived from the rebuilt seed if ``gone`` leads the pair, else opened with its key."""
    dealer, holder = (gone, peer) if leads(gone, peer) else (peer, gone)
    dealt, found = deals[dealer].dealt[holder], b""
    with suppress(CannotOpen):
        found = (
            keys.ingredient(cohort, dealer=gone, holder=peer)
            if dealer == gone
            else open_ingredient(cohort, keys, dealt.sealed[BUNDLE_BYTES:], dealer=peer, holder=gone)
        )
    if cohort.commitment("ingredient", dealer=dealer, holder=holder, share=found) != dealt.commitments[2]:
        raise DealerLied(_lie(cohort.advert(dealer).name), site=cohort.advert(dealer).name)
    return found


def _lie(name: str) -> str:
    return f"{name} dealt shares that do not give the secret which it has advertised"
