"""What readers give: rows, and the fixed reasons why something is none. No reason ever quotes a row."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Row: TypeAlias = Mapping[str, object] | str
"""Column -> value, or the reason why this row cannot be read."""

NOT_TEXT = "not UTF-8 text"
NOT_JSON = "not JSON"
NOT_OBJECT = "not a JSON object"
NOT_FIELDS = "wrong number of fields"
NOT_CLOSED = "a quotation mark too many or too few"
TOO_DEEP = "nested too deeply"
TOO_LONG = "longer than 64 Mi characters"
NOT_VALUES = "a value that cannot be read"
OTHER_SHAPE = "another shape than the other rows"
PYTHON_LIST = "a list as Python writes it, not JSON"


def not_fields(found: int, width: int) -> str:
    """:data:`NOT_FIELDS` of a record, with its number and that of the first line."""
    return f"{NOT_FIELDS}, {found:,} instead of the first line's {width:,}"
