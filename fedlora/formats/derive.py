"""Keys from keys, each for one use."""

from __future__ import annotations

from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.kdf.hkdf import HKDF


def derive(key: bytes, label: str, *, salt: bytes = b"", context: bytes = b"", length: int = 32) -> bytes:
    """HKDF-SHA256 (RFC 5869) under one of our labels."""
    info = b"fedlora/v1/sa/" + label.encode() + b"\0" + context
    return HKDF(hashes.SHA256(), length, salt=salt or None, info=info).derive(key)
