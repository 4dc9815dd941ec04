"""A table of the files that people write: strict, frozen, every error at once."""

from __future__ import annotations

import re
import unicodedata
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

SITE_NAME = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
SiteName = Annotated[str, Field(pattern=SITE_NAME)]
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
