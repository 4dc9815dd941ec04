"""The runs that have begun at a site: which go on, by the site's own history, and whether a further one was refused."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedlora.formats.state.history import NAME, read_history
from fedlora.formats.state.memory import FileMemory
from fedlora.formats.state.outbox import read_codes
from fedlora.site.admission import Begun, Runs
from fedlora.site.site_file import SiteFile


@dataclass(frozen=True, slots=True)
class BegunRuns:
    """Attributes:
    runs: all, in order.
    going_on: those whose last evaluation has not been answered here.
    refused: when a run beyond those that are approved was refused, if no run has begun to answer since; 0: none was.
    """

    runs: tuple[Begun, ...]
    going_on: tuple[Begun, ...]
    refused: int

    @classmethod
    def of(cls, file: SiteFile, root: Path) -> BegunRuns:
        """Raises StoreError: what this site remembers cannot be read."""
        state = root / file.state
        memory, history = FileMemory(state / "memory"), read_history(state / NAME)
        runs = Runs(memory).load()
        done = {one.run for one in history if one.kind == "evaluate" or 0 < one.rounds < one.round}
        first = {one.run: one.at for one in reversed(history)}
        _, at = read_codes(memory).get("run-not-approved", (0, 0))
        since = max((first[one.run] for one in runs if one.run in first), default=0)
        return cls(tuple(runs), tuple(one for one in runs if one.run not in done), at if at >= since else 0)

    def may_begin(self, file: SiteFile, digest: str) -> bool:
        """Whether another run of this plan is approved."""
        return file.plans.count(digest) > Counter(one.plan for one in self.runs)[digest]

    def goes_on(self, digest: str) -> bool:
        """Whether a run of this plan has begun here and is not over."""
        return any(one.plan == digest for one in self.going_on)
