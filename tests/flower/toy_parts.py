"""What the toy processes agree on."""

from __future__ import annotations

import hashlib

BLOB_BYTES = 12_000_000
DUE = 19_000
CANARY = "patient Erika Mustermann, born 1964"


def blob(seed: str) -> bytes:
    """12 MB that do not compress or repeat."""
    return hashlib.shake_256(seed.encode()).digest(BLOB_BYTES)
