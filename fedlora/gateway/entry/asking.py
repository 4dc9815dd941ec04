"""A site that was invited, as the coordinator sees it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["invited", "expired", "asks"]


@dataclass(frozen=True, slots=True)
class Asking:
    """A site that was invited.

    Attributes:
        site: its name.
        state: invited: its invitation was not used yet; asks: its keys wait for a person's approval.
        until: end of its invitation, seconds since 1970; 0 for a site that asks.
        fingerprint: of its keys; empty: none came.
        words: that its operator sees too; empty: none came.
        digest: of the file that came, SHA-256, hex; empty: none came.
    """

    site: str
    state: State
    until: int
    fingerprint: str
    words: tuple[str, ...]
    digest: str
