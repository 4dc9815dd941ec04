"""How far a run is, from its events. Pure: events in, sentences out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fedlora.core.deployment.status import RunState
from fedlora.core.events import Event
from fedlora.core.records import RoundRecord
from fedlora.core.sites.cures import CURES
from fedlora.core.words import number

_LAST = 5
"""So many rounds say how long the next one may take."""
_PHASES = {
    Event.SESSION: "; their session is open, masked updates are to come",
    Event.MASKED: "; their masked updates are here: they vote on one set of them, then the sum is opened",
    Event.SUM: "; the sum is opened",
}
_AT_ONCE_S = 10.0
"""A refusal, or an answer from a journal, comes within so many seconds."""


@dataclass(slots=True)
class Progress:
    """A run as its events tell it.

    Attributes:
        round: rounds that are done.
        rounds: of the plan; 0 before the run has begun.
        now: round of the attempt that goes on; 0: none does.
        phase: of a session of secure aggregation, in words; empty before it.
        since: when that attempt began, seconds since 1970.
        answers: site that was asked -> None before its answer; then an empty string if it counts, or its error code.
        there, missing, need: while it waits for sites: who is there, who is not, how many are needed.
        blocked: sites that only people there can bring back, each with its code, while the round waits for that.
        record: of the last attempt of which one is known, even if that had too few sites.
        took_s: how long the last rounds took, waiting for sites left out.
    """

    round: int = 0
    rounds: int = 0
    now: int = 0
    kind: str = ""
    phase: str = ""
    since: float = 0.0
    answers: dict[str, str | None] = field(default_factory=dict)
    waiting: bool = False
    there: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    need: int = 0
    paused: bool = False
    blocked: dict[str, str] = field(default_factory=dict)
    record: RoundRecord | None = None
    took_s: list[float] = field(default_factory=list)

    def take(self, at: float, event: Event, facts: Mapping[str, Any]) -> None:
        """One more event, at this time."""
        if event == Event.START:
            self.round, self.rounds = facts["round"], facts["rounds"]
        elif event in (Event.WAITING, Event.WAITING_FOR):
            self.waiting, self.since = True, at
            self.there, self.missing, self.need = facts["sites"], facts["missing"], facts["need"]
        elif event == Event.ASK:
            self.waiting, self.since = False, at
            self.now, self.kind, self.answers = facts["round"], facts["kind"], dict.fromkeys(facts["sites"])
            self.phase = ""
        elif event in (Event.UPDATE, Event.REJECTED, Event.ERRED):
            self.answers[facts["site"]] = facts.get("code", "")
        elif event in (Event.MASKED, Event.SUM):
            self.answers |= dict.fromkeys(facts["sites"], "")
            self.phase = _PHASES[event]
        elif event == Event.SESSION:
            self.phase = _PHASES[event]
        elif event in (Event.ROUND, Event.ROUND_VOID, Event.VOID, Event.BLOCKED, Event.FINAL):
            self.record, self.now = facts["record"], 0
            self.blocked = dict(facts["sites"]) if event == Event.BLOCKED else {}
            if event in (Event.ROUND, Event.ROUND_VOID):
                self.round = self.record.round
                self.took_s = [*self.took_s, self.record.seconds.round + self.record.seconds.aggregate][-_LAST:]
        self.paused = facts["state"] == "paused" if event == Event.RUN else self.paused and event not in (Event.ASK, Event.START)

    @property
    def state(self) -> RunState:
        if self.paused:
            return "paused"
        if not self.rounds:
            return "starting"
        return "waiting" if self.waiting or (self.blocked and not self.now) else "running"

    def held(self, now: float) -> bool:
        """Whether the round waits for people. It does so too while it has just asked again: they answer that at once."""
        return bool(self.blocked) and not (self.waiting or self.paused) and (not self.now or now - self.since < _AT_ONCE_S)

    def eta_s(self, now: float) -> float | None:
        """Seconds until the end, if rounds last as long as the last five of this process did; None before one is done, and while
        the present one does not end: its last attempt was void, or it lasts twice as long as those.

        The last evaluation is counted as a round. Waiting for sites is not foreseen.
        """
        if not self.took_s:
            return None
        mean = sum(self.took_s) / len(self.took_s)
        if (self.record is not None and self.record.void) or (self.now and now - self.since > 2 * mean + _AT_ONCE_S):
            return None
        left = self.rounds + 1 - self.round
        return max(mean * left - (min(now - self.since, mean) if self.now else 0.0), 0.0)

    def said(self) -> str:
        """What goes on, in a sentence without the run's name."""
        if self.paused:
            return f"paused after round {self.round} of {self.rounds}"
        if not self.rounds:
            return "starting"
        at = step(min(self.round + 1, self.rounds + 1) if not self.now else self.now, self.rounds)
        if self.waiting:
            here = ", ".join(self.there) or "nobody"
            return f"{at}: waiting for sites: {self.need} needed, now {here}; missing: {', '.join(self.missing) or '-'}"
        if not self.now and self.blocked:
            return f"{at}: waits for people, is asked again every minute and goes on by itself; {'. '.join(self._needs())}"
        if not self.now:
            return f"{at}: between two rounds"
        answered = [s for s, code in self.answers.items() if code is not None]
        still = ", ".join(s for s, code in self.answers.items() if code is None)
        counted = f"{at}: {len(answered)} of {len(self.answers)} sites have answered"
        return f"{counted}{f'; not yet: {still}' if still else ''}{self.phase}"

    def _needs(self) -> Iterator[str]:
        for site, code in self.blocked.items():
            what, cure = CURES.get(code, (code, "its log says why"))
            yield f"{site}: {what} ({code}); {cure}"


def step(round: int, rounds: int) -> str:
    """``round 3 of 8``, or the last evaluation, which comes after all rounds."""
    return f"round {round} of {rounds}" if round <= rounds else f"last evaluation, after {rounds} rounds"


def told(record: RoundRecord, rounds: int) -> str:
    """A round's record in a sentence."""
    at = step(record.round, rounds)
    if record.void:
        at += f" was void ({record.void})"
    metrics = record.together.metrics if record.together else {}
    by = {"eval/nll": record.measured_by}
    losses = [f"{name} {number(metrics[key])}{by.get(key, '')}" for key, name in _METRICS.items() if key in metrics]
    missing = ", ".join(f"{site}: {code}" for site, code in record.missing.items()) or "none"
    took = f"{record.seconds.round + record.seconds.aggregate:.0f} s"
    return "; ".join([f"{at} in {took}: {len(record.sites)} of {len(record.asked)} sites", *losses, f"not counted: {missing}"])


_METRICS = {"train/loss": "training loss", "eval/nll": "held-out NLL"}
