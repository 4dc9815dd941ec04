"""Waiting for people: what keeps a round from its quorum may be a thing that only somebody at a site can mend."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from fedlora.core.errors import LoneChange
from fedlora.core.records import RoundRecord
from fedlora.core.sites.cures import CURES, FOR_PEOPLE, GOES_ON
from fedlora.core.words import duration

_AWAY = frozenset({*GOES_ON, "site-process", "dropped-out"})
_FIRST_S = 5.0
_LONGEST_S = 60.0
_LEAST_S = 1e-3

Wait = Callable[[float], None]
"""Waits so many seconds."""


def blockers(
    record: RoundRecord, answered: Mapping[str, str], *, need: int, missing: Callable[[Sequence[str]], Sequence[str]]
) -> dict[str, str]:
    """The sites that only people can bring back, each with its code, if no round can count without them; else none.

    Args:
        record: of an attempt that had too few sites.
        answered: codes that sites have answered themselves: the server gives some for what it has found out of all of them.
        need: fewest sites of a round.
        missing: sites without which those that are named would be no sum that may be opened.
    """
    silent = any(record.missing.get(site) in _AWAY for site in record.asked)
    found = {site: code for site, code in sorted(answered.items()) if code in FOR_PEOPLE}
    if silent:  # then it may be for the one that has gone away that a sum would be too small
        found = {site: code for site, code in found.items() if code != LoneChange.code}
    others = [site for site in record.asked if site not in found]
    return found if found and (len(others) < need or missing(others)) else {}


def in_words(sites: Mapping[str, str], *, limit_s: float) -> str:
    """What is missing, at whom, and what is done about it there."""
    parts = []
    for code in dict.fromkeys(sites.values()):
        what, cure = CURES[code]
        parts.append(f"{', '.join(site for site in sites if sites[site] == code)}: {what} ({code}); {cure}")
    return (
        f"too few sites without what only people can mend: {'. '.join(parts)}. It is asked again for up to {duration(limit_s)} "
        "and goes on by itself; if the plan has to change: `fedlora server stop`"
    )


@dataclass(slots=True)
class Patience:
    """How long a round has waited for people. The pauses grow to a minute: each attempt sends the adapter again.

    Args:
        limit_s: longest wait, seconds, from the first attempt that was in vain on. The attempts count: a site that answers late
            each time holds a round up no longer than one that answers at once, but for one attempt.
        wait: None: nobody could mend anything meanwhile, as in a simulation.
        clock: seconds, rising.
    """

    limit_s: float
    wait: Wait | None
    clock: Callable[[], float] = time.monotonic
    _began: float | None = field(default=None, init=False)
    _paused_s: float = field(default=0.0, init=False)
    _next_s: float = field(default=_FIRST_S, init=False)

    @property
    def waited_s(self) -> float:
        """Seconds since the first attempt that was in vain, and no less than all pauses."""
        return 0.0 if self._began is None else max(self.clock() - self._began, self._paused_s)

    def once_more(self) -> bool:
        """Waits a while; False if there is no time left."""
        if self._began is None:
            self._began = self.clock()
        pause = min(self._next_s, self.limit_s - self.waited_s)
        if self.wait is None or pause < _LEAST_S:
            return False
        self.wait(pause)
        self._paused_s += pause
        self._next_s = min(2 * self._next_s, _LONGEST_S)
        return True
