"""A table of the files that people write: strict, frozen, every error at once."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated, Any, Final

from pydantic import BaseModel, ConfigDict, Field

WORDS: Final[dict[str, str]] = {}
"""Pattern -> what may stand there, in words: who writes a file by hand reads no regular expressions."""


def worded(pattern: str, words: str) -> Any:
    """A field's pattern, which :func:`fedlora.core.toml.readable` says in words."""
    WORDS[pattern] = words
    return Field(pattern=pattern)


SITE_NAME: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
SiteName = Annotated[str, worded(SITE_NAME, "the name of a site has 1 to 63 characters: a-z, 0-9, and - between them")]
_LETTERS = str.maketrans(
    {
        "ä": "ae",
        "ö": "oe",
        "ü": "ue",
        "ß": "ss",
        "æ": "ae",
        "œ": "oe",
        "ø": "oe",
        "å": "aa",
        "ł": "l",
        "đ": "d",
        "ð": "d",
        "þ": "th",
    }
)
"""Letters whose ASCII spelling is not what is left without their marks."""


def site_name(text: str) -> str:
    """The name of a site that people call otherwise: ``St. Jürgen`` is ``st-juergen``; empty if nothing of it can stand there."""
    plainly = unicodedata.normalize("NFC", text).lower().translate(_LETTERS)
    letters = "".join(c for c in unicodedata.normalize("NFKD", plainly) if not unicodedata.combining(c))
    return re.sub(r"[^a-z0-9]+", "-", letters).strip("-")[:63].strip("-")


class Section(BaseModel):
    """A table of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True, allow_inf_nan=False)
