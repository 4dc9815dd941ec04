"""The part of a run's page that says what goes on now, between two marks: `server up` replaces it, and draws nothing for that."""

from __future__ import annotations

from typing import Final

MARKS: Final = ("<!-- now -->", "<!-- until here -->")


def in_page(page: str, part: str) -> str:
    """The page with this part between its marks; as it is if it has none, as that of a run that is done.

    Args:
        part: HTML, escaped.
    """
    before, mark, rest = page.partition(MARKS[0])
    _, end, after = rest.partition(MARKS[1])
    return f"{before}{mark}{part}{end}{after}" if mark and end else page
