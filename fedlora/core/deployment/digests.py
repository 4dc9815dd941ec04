"""Digests as people compare them: over the telephone, or two that should be one."""

from __future__ import annotations

_GROUP = 4


def grouped(digest: str) -> str:
    """In groups of four digits, to be read aloud."""
    return " ".join(digest[i : i + _GROUP] for i in range(0, len(digest), _GROUP))


def apart(one: str, other: str) -> str:
    """Where two digests part: the first group of four digits that differs, with its neighbor, in both of them.

    Law: what is shown of two digests that differ, differs.
    """
    length = max(len(one), len(other))
    first = next((i for i in range(0, length, _GROUP) if one[i : i + _GROUP] != other[i : i + _GROUP]), length)
    here, there = (grouped(digest[first : first + 2 * _GROUP]) or "nothing" for digest in (one, other))
    return f"from digit {first + 1} on: {here}, not {there}"
