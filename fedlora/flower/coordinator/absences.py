"""What it means for a round that a site goes away in its middle, said when it goes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedlora.core.events import Event, Report
from fedlora.core.facts import Away
from fedlora.flower.coordinator.watch import Seen, load_seen


@dataclass(slots=True)
class Absences:
    """Reports a run's events, and between them who goes away.

    Args:
        home: the server's directory, in which `server up` notes who has said good-bye.
        report: gets the events.
    """

    home: Path
    report: Report
    _asked: list[str] = field(default_factory=list)
    _need: int = 0
    _session: bool = False
    """a session of secure aggregation is open: who is gone cannot come into it again"""
    _failed: set[str] = field(default_factory=set)
    _gone: set[str] = field(default_factory=set)

    def __call__(self, event: Event, facts: Mapping[str, Any]) -> None:
        """One of the run's events. An attempt says how many answers have to count, a session how many sites have to stay."""
        if event in (Event.ASK, Event.SESSION):
            self._session, self._gone, self._failed = event == Event.SESSION, set(), set()
            self._asked, self._need = facts["sites"], facts["threshold" if self._session else "need"]
        elif event in (Event.ERRED, Event.REJECTED) and not self._session:
            self._failed.add(facts["site"])
        report = self.report
        report(event, facts)
        if event in (Event.WAITING, Event.WAITING_FOR):
            self._in_vain(facts, group=event == Event.WAITING_FOR)

    def _in_vain(self, facts: Mapping[str, Any], *, group: bool) -> None:
        """Says so if the run waits for sites that do not come back."""
        gone = [site for site in facts["missing"] if self.left(site)]
        if gone and (group or len(facts["sites"]) + len(facts["missing"]) - len(gone) < facts["need"]):
            said = (
                f"{', '.join(gone)}: left for good, or not enrolled any more, so that this run waits in vain: end it by "
                "`fedlora server stop`; those that stay need a new plan, under secure aggregation the next epoch of the roster"
            )
            self.report(Event.AWAY, Away(site=gone[0], waits_s=0.0, said=said))

    def left(self, site: str) -> bool:
        """Whether a site that is away will not come back: its operator has it leave, or its enrollment was taken back here."""
        said_so = load_seen(self.home).get(site, Seen()).gone == "left"
        return said_so or not (self.home / "sites" / f"{site}.pub").exists()

    def back(self, site: str) -> None:
        """A site that was away is asked again."""
        self._gone.discard(site)

    def away(self, site: str, waits_s: float) -> None:
        """A site is gone; it is waited for so many seconds, or has left for good (0)."""
        self._gone.add(site)
        if waits_s:
            said = (
                f"{site} is gone in the middle of its work; it is waited for up to {waits_s:.0f} s, until it is connected again"
            )
        else:
            said = f"{site} has left for good, or its enrollment was taken back: it is not waited for"
        self.report(Event.AWAY, Away(site=site, waits_s=waits_s, said=f"{said}. {self._verdict()}"))

    def _verdict(self) -> str:
        """Whether the session, or before one the attempt of the round, can end with the sites that are left."""
        left = [one for one in self._asked if one not in self._gone | self._failed]
        ends = "can" if len(left) >= self._need else "CANNOT"
        if self._session:
            return (
                f"{self._need} of {len(self._asked)} sites have to stay, {len(left)} are here: this session {ends} end without it"
            )
        return (
            f"{self._need} of {len(self._asked)} sites have to answer, {len(left)} have answered or are here: "
            f"this round {ends} end without it"
        )
