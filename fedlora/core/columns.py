"""How wide text is on a terminal, at the most, and text that is cut to a width."""

from __future__ import annotations

_CUT = "..."


def columns(text: str) -> int:
    """Columns that printable characters take: one in ASCII, two beyond it. No terminal takes more for one, and many take as much
    for one that Unicode calls narrow, combining or ambiguous."""
    return sum(1 if c.isascii() else 2 for c in text)


def fitting(text: str, most: int) -> int:
    """Number of characters of ``text``, from its beginning, that take at most so many columns."""
    for number, c in enumerate(text):
        most -= columns(c)
        if most < 0:
            return number
    return len(text)


def shortened(text: str, most: int) -> str:
    """``text``, or as much of its beginning as fits before ``...``. Law: ``columns(shortened(text, most)) <= most``, if that is
    three at least."""
    return text if columns(text) <= most else text[: fitting(text, most - len(_CUT))] + _CUT
