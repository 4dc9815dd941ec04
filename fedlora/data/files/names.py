"""Names of a file's columns that an operator may be shown. Others may be values, of a file whose first line is missing."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping
from typing import Final

_NAME: Final = re.compile(r"(?:column |key )?[^\W\d][\w.-]{0,31}(?: [\w.-]{1,20}){0,2}(?: of a [a-z]+(?: of the [a-z]+)?)?")
"""What may be shown as a name of a column: up to three words of letters, digits, points and dashes."""
_MOST: Final = 20


def is_name(name: str, count: int, *, rows: int) -> bool:
    """Whether most rows have it and it looks like a name."""
    return 2 * count >= rows and _NAME.fullmatch(name) is not None


def has_instead(wanted: str, counts: Mapping[str, int], *, known: Collection[str], rows: int) -> str:
    """What a file has where no row has a column that is named: what is near, and all names that may be shown.

    Args:
        wanted: the column that is not there.
        counts: column -> rows that have it.
        known: columns that are read. Where none is there and nothing is near, the first line may hold values of a row.
        rows: of all files.

    Returns:
        Words; empty: nothing may be shown.
    """
    names = sorted(name for name, count in counts.items() if is_name(name, count, rows=rows))
    folded = {name.casefold(): name for name in names}
    near = difflib.get_close_matches(wanted.casefold(), folded, n=1, cutoff=0.7)
    if not names or (not near and not counts.keys() & {*known}):
        return ""
    meant = f"did you mean {folded[near[0]]!r}? " if near else ""
    more = f" and {len(names) - _MOST:,} more" * (len(names) > _MOST)
    return f"{meant}the file has {', '.join(names[:_MOST])}{more}"
