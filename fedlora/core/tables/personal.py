"""What a site's own adapter was chosen by."""

from __future__ import annotations

from typing import Annotated, ClassVar, Final, Literal, TypeAlias

from pydantic import Field

from fedlora.core.plan import Digest
from fedlora.core.records import Count, Filed, Record

Way: TypeAlias = Literal["global", "further", "alone"]
"""To which adapter a line from the global one goes: none; that after more steps at the site; what the site learned alone."""
Prefer: TypeAlias = Literal["own", "all"]
"""What a site's own adapter is to be good at: its own rows as far as can be; or others' too, and its own no worse than alone."""
PERSONAL: Final = "personal"
"""Among the facts of an adapter's file: it was made by further training at a site, which no noise protects."""
_WORDS: dict[Way, str] = {
    "global": "the global adapter",
    "further": "the global adapter after more steps on its own rows",
    "alone": "what it learned alone",
}


class Candidate(Record):
    """An adapter that was tried on a site's validation rows."""

    way: Way
    share: Annotated[float, Field(ge=0, le=1)]
    """how far along the way from the global adapter, which is 0"""
    nats: float
    """mean loss of a supervised token"""
    distance: Annotated[float, Field(ge=0)]
    """Euclidean norm of its factors minus the global ones"""
    behind: Annotated[float, Field(ge=0)] | None
    """standard errors by which its loss is above the least one; null: there is no standard error of one group"""

    def words(self) -> str:
        """For people."""
        part = f"{self.share:.0%} of the way from the global adapter to " if 0 < self.share < 1 else ""
        return part + _WORDS[self.way]


class Choice(Filed):
    """``personal.json``: how one site's own adapter was chosen. It says something of the site's rows, and stays there."""

    FORMAT: ClassVar[int] = 1

    format: Literal[1] = 1
    start: Digest
    """adapter digest of the global adapter"""
    adapter: Digest
    """adapter digest of the chosen one"""
    chosen: Candidate
    tried: Annotated[tuple[Candidate, ...], Field(min_length=1)]
    """the global adapter first"""
    examples: Count
    """validation examples that chose"""

    def words(self) -> str:
        """For people."""
        start, n = self.tried[0].nats, self.examples
        gain = "" if self.chosen.way == "global" else f": {start:.3f} to {self.chosen.nats:.3f} nats a token"
        return f"{self.chosen.words()}, by {n} validation example{'s' * (n != 1)}{gain}"
