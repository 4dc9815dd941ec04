"""Canonical JSON (FORMAT.md, 1.2): plans, headers, layouts, rosters and records are hashed in it."""

from __future__ import annotations

import json
import re
from typing import Any

_DIGEST = re.compile(r"[0-9a-f]{64}")


def is_digest(text: str) -> bool:
    """Whether a text is 64 lowercase hex digits, as a SHA-256 and the id of a run are."""
    return _DIGEST.fullmatch(text) is not None


def canonical(value: object) -> bytes:
    """ASCII, keys in rising order, no white space.

    Raises:
        ValueError: NaN or an infinity in it.
        TypeError: something that JSON has not.
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode("ascii")


def parse_canonical(text: bytes) -> Any:
    """Inverse of :func:`canonical`. Law: what it returns is written as these bytes again.

    Raises:
        ValueError: other bytes than :func:`canonical` gives, so that they repeat a key, hold NaN or have another spelling.
    """
    try:
        value = json.loads(text)
        same = canonical(value) == text
    except (ValueError, TypeError, RecursionError):
        same = False
    if not same:
        raise ValueError("not canonical JSON")
    return value


def parse_object(text: bytes) -> dict[str, Any]:
    """The same of an object.

    Raises:
        ValueError: another value, or as :func:`parse_canonical`.
    """
    value = parse_canonical(text)
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value
