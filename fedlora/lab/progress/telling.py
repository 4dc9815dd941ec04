"""What a script is told of a simulation: a line a round, and a sign of life in every silence."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Final

from fedlora.core.errors import plain
from fedlora.core.events import Event, Report
from fedlora.core.told.lines import QUIET, line_of
from fedlora.lab.progress.pulse import Pulse

_INSIDE_A_ROUND: Final = frozenset([Event.START, Event.ASK, Event.UPDATE, Event.SUM, Event.SESSION, Event.MASKED])
"""What every round of a simulation has; its own line sums it up."""


@contextmanager
def shown(report: Report | None, *, quiet: bool) -> Iterator[Report]:
    """The report of a script that names none: a line on stderr for each round, arm and whatever else is worth one.

    Args:
        report: is called instead.
        quiet: nothing is printed.
    """
    began, arm = time.monotonic(), [""]

    def say(text: str) -> None:
        if sys.stderr is not None:
            sys.stderr.write(f"{time.monotonic() - began:7.1f} s  {plain(text)}\n")
            sys.stderr.flush()

    pulse = Pulse(say)

    def tell(event: Event, facts: Mapping[str, Any]) -> None:
        arm[0] = facts["name"] if event == Event.ARM else arm[0]
        told = event not in QUIET and event not in _INSIDE_A_ROUND
        if told:
            say(line_of(event, facts, arm=arm[0]))
        pulse.heard(event, facts, shown=told)

    try:
        yield report or (_silent if quiet else tell)
    finally:
        pulse.close()


def _silent(event: Event, facts: Mapping[str, Any]) -> None:
    """Nobody listens."""
