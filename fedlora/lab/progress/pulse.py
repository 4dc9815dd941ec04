"""A sign of life in every silence. Every command imports this: nothing heavy stands above."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from fedlora.core.events import Event

SILENCE_S: Final = 20.0
"""Longest silence during work, seconds."""


class Pulse:
    """Says what goes on, after each :data:`SILENCE_S` in which nothing was said: libraries, weights and scores are loaded and
    computed by code that reports nothing. Outside of simulations this is while a base loads, until the next event.

    Args:
        say: is given the line, in a thread.
    """

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._doing = self._arm = self._round = ""
        self._simulates = False
        self._spoke = time.monotonic()
        self._over = threading.Event()
        self._thread: threading.Thread | None = None

    def heard(self, event: Event, facts: Mapping[str, Any], *, shown: bool) -> None:
        """Takes what was reported.

        Args:
            shown: a line was printed of it.
        """
        if shown:
            self._spoke = time.monotonic()
        self._simulates |= event in ("reading", "sweep", "arm")
        self._doing = self._goes_on(event, facts)
        if self._doing and self._thread is None:
            self._thread = threading.Thread(target=self._beat, daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Nothing is said any more."""
        self._over.set()

    def _goes_on(self, event: Event, facts: Mapping[str, Any]) -> str:
        self._arm = "" if event in ("load", "reading", "sweep") else self._arm
        if event == "load":
            return f"still loading {facts['model']}: this machine is busy, or the files are large"
        if not self._simulates:
            return ""
        if event == "reading":
            return f"still reading the rows of {facts['what']}"
        if event == "sweep" and facts["jobs"] > 1:
            return "runs at once begin: each imports its libraries, reads the rows and loads a base of its own"
        if event == "arm":
            self._arm, self._round = facts["name"], ""
        elif event == "train":
            self._round = f"round {facts['round']} of {facts['rounds']}, "
        if not self._arm:
            return "still preparing: rows become tokens, and the speed of a step is measured"
        if event == "step":
            step = f"step {facts['step']} of {facts['steps']}, loss {facts['loss']:.3f}"
            site = f"{facts['site']}, " if facts["site"] != self._arm else ""
            return f"arm {self._arm} goes on: {self._round}{site}{step}"
        return f"arm {self._arm} goes on: {self._round.rstrip(', ') or 'it is prepared or scored'}"

    def _beat(self) -> None:
        while not self._over.wait(max(self._spoke + SILENCE_S - time.monotonic(), 0.001)):
            if time.monotonic() - self._spoke >= SILENCE_S:
                self._spoke = time.monotonic()
                if doing := self._doing:
                    self._say(doing)
