"""How long a request of each step can be, from the number of sites on the roster. FORMAT.md, 10.2.

A site compares before it opens anything: what is longer is no honest server's, however long a request its policy takes.
"""

from __future__ import annotations

from typing import Final

from fedlora.protect.secagg.protocol.cohort import SIGNATURE
from fedlora.protect.secagg.protocol.complaints import most_complaint_bytes, opened_bytes
from fedlora.protect.secagg.protocol.dealing import dealt_bytes

ADVERT_BYTES: Final = 4096
"""Longest advertisement."""
_MAX_ENDED: Final = 255
"""Most sessions of a round that are shown to have ended: their number is a byte."""


def most_request_bytes(step: str, sites: int) -> int:
    """Longest payload of a request of a step after ``advertise``, bytes.

    Args:
        sites: on the roster, from 1 to 256.
    """
    votes, relay = 2 + sites * (2 + SIGNATURE), 2 + sites * (2 + dealt_bytes(leads=True))
    return {
        "share": 2 + sites * ADVERT_BYTES,
        "mask": 1 + _MAX_ENDED * (32 + votes) + opened_bytes(sites) + relay,
        "complain": relay,
        "open": 34 + sites * most_complaint_bytes(sites),
        "vote": 35 + sites * (2 + 32 + SIGNATURE),
        "unmask": 32 + votes,
    }[step]
