"""The audit canaries of a site in one run: synthetic rows and fair coins, all of it from 32 secret bytes. FORMAT.md, 16.

A canary here is a row that is trained on or not; the strings that a scan of outgoing bytes looks for are another thing, see
:mod:`fedlora.doctor.canaries`. Nothing of a canary comes from a row of the site, so that it may be shown when the run is over.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Final

import numpy as np

from fedlora.core.tables.audit import Audit
from fedlora.privacy.draws import Stream

WORDS: Final = 4
"""Random words of a prompt, and again of the secret that answers it: 44 bits each."""
_COINS, _TEXTS, _FILLERS = 0, 1, 2
_LIST_BITS: Final = 11


@dataclass(frozen=True, slots=True)
class Canary:
    """One synthetic row.

    Attributes:
        number: 0 .. canaries_per_site - 1.
        repeats: how often it stands among the training rows, if it does.
        inside: whether it is trained on; a fair coin.
        prompt: what is given.
        secret: what has to be learned.
    """

    number: int
    repeats: int
    inside: bool = field(repr=False)
    prompt: str = field(repr=False)
    secret: str = field(repr=False)


def canaries_of(seed: bytes, audit: Audit) -> list[Canary]:
    """All canaries of one site in one run, in order. The same seed gives the same ones; canary i has the (i mod k)-th repeats.

    Args:
        seed: 32 secret bytes.
    """
    count = audit.canaries_per_site
    coins = Stream(seed, _COINS).words(-(-count // 2))[:count] & np.uint64(1)
    texts = _texts(seed, _TEXTS, 2 * count)
    return [
        Canary(i, audit.repeats[i % len(audit.repeats)], bool(coins[i]), f"{texts[2 * i]}:", f" {texts[2 * i + 1]}")
        for i in range(count)
    ]


def fillers(seed: bytes, number: int, count: int) -> list[str]:
    """Other secrets that canary ``number`` might have had, none of them used: what its exposure is measured against."""
    return [f" {text}" for text in _texts(seed, _FILLERS + number, count)]


def _texts(seed: bytes, use: int, count: int) -> list[str]:
    """Texts of WORDS words each, uniform over the list and independent."""
    wanted = count * WORDS
    bits = Stream(seed, use).words(-(-wanted // 2))[:wanted] & np.uint64((1 << _LIST_BITS) - 1)
    words = _list()
    chosen = [words[int(bit)] for bit in bits]
    return [" ".join(chosen[at : at + WORDS]) for at in range(0, wanted, WORDS)]


@cache
def _list() -> Sequence[str]:
    """The 2048 English words of BIP 39."""
    from mnemonic import Mnemonic

    return tuple(Mnemonic("english").wordlist)


def commitment(seed: bytes, nonce: bytes) -> str:
    """What a site says of its canaries before the first round, hex: it fixes them and shows nothing of them.

    Args:
        seed, nonce: 32 secret bytes each.
    """
    return hashlib.sha256(b"fedlora/v1/audit\0" + seed + nonce).hexdigest()
