"""Connection status of a site: connecting, lost, refused, connected or ready, and which part is missing.

A state machine without I/O. Its inputs are lines of the SuperNode's log, the results of probes of the server, and of the checks
of base and data.
``connected`` is not ``ready``: ready is a site whose parts (:data:`fedlora.processes.causes.PARTS`) are all there.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from typing import Literal

from fedlora.core.events import Event, Report
from fedlora.core.facts import Clock, SiteStatus
from fedlora.core.sites.standing import standing_of
from fedlora.flower.supernode import SAYS
from fedlora.gateway.clock import MAX_CORRECTION_S
from fedlora.gateway.probe import Finding
from fedlora.processes.causes import CAUSES, PARTS, Part, cause_of, telling

State = Literal["connecting", "lost", "refused", "connected", "ready", "stopped"]
"""connecting: not accepted yet; lost: was accepted, now the server does not answer; refused: the server answers and rejects this
site; connected: accepted, but something at this site is missing; ready: can do every task."""

_OURS = re.compile(re.escape(SAYS) + r"(accepted|back|lost|refused|clock) ?(.*)")
_LONGEST_RETRY_S = 60.0
_REFUSALS = {"in-use": "in-use", "withdrawn": "withdrawn", "unknown": "not-enrolled", "clock": "clock"}
_AMISS_S = 5.0
_FLICKER_S = 3.0  # shorter interruptions are not reported


class StatusTracker:
    """The state machine. Thread-safe; reports ``("site", facts)`` on each change, once.

    The facts are ``site``, ``state``, ``part``, ``cause``, ``why`` (one sentence), ``cure``, ``next_s`` (seconds to the next try,
    0: none) and ``said``, which is all of it in one line for people.

    Args:
        facts: values for the sentences: ``server``, ``host``, ``port``, ``ca``, ``log``, ``secret``, ``site``, ``words`` (empty
            unless this site waits for approval).
        known: whether the server accepted this node key before; then an unknown key means that it was withdrawn.
        on_accepted: called whenever the server accepts this site.
        on_lost: called when the connection is lost, so that the server can be probed.
        clock: seconds, rising.
    """

    def __init__(
        self,
        site: str,
        *,
        facts: Mapping[str, str],
        report: Report,
        known: bool = False,
        on_accepted: Callable[[], None] = lambda: None,
        on_lost: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._site, self._facts, self._report = site, dict(facts), report
        self._known, self._on_accepted, self._on_lost, self._clock = known, on_accepted, on_lost, clock
        self._lock = threading.RLock()
        self._missing: dict[Part, tuple[str, dict[str, str]]] = {}
        self._connected = False
        """The server accepts this site's calls now."""
        self._child_accepted = False
        """The server has accepted the SuperNode process that runs now."""
        self._ever_accepted = False
        """The server has accepted some SuperNode since this tracker was made."""
        self._worker_connected = False
        """The SuperNode accepts our own process, which works for it."""
        self._stopped = False
        self._resting = False
        self._flicker: tuple[float, str] | None = None
        self._last: Finding | None = None
        self._said_ahead_s = 0.0
        self._said: State | None = None
        self._told: dict[Part, str] = {}
        self._failures: dict[str, int] = {}
        self._ended_by = ""

    # --- inputs -------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Reports the first state."""
        self._change()

    def read_line(self, line: str) -> None:
        """Takes a line of the SuperNode's log."""
        if match := _OURS.search(line):
            self._read_own(match[1], match[2])
        elif code := cause_of(line):
            self.miss(CAUSES[code].part, code, detail=telling([line]))
            self._ended_by = code

    def _read_own(self, word: str, rest: str) -> None:
        with self._lock:
            if self._missing.get("process", ("", {}))[0] != "wrong-secret":
                self._missing.pop("process", None)  # it runs
            if word == "accepted" or (word == "back" and self._child_accepted):
                self._on_server_accepted()
            elif word == "back":
                self._missing.pop("server", None)  # the next line says what the server thinks of us
            elif word == "lost" and self._connected:
                self._flicker = (self._clock(), rest)
                self._on_lost()
            elif word == "lost":
                self._lost(rest)
            elif word == "refused":
                self._refused(rest)
            elif word == "clock" and (seconds := _number(rest)) is not None:
                self.measured(seconds)

    def _on_server_accepted(self) -> None:
        self._connected = self._child_accepted = self._ever_accepted = self._known = True
        self._flicker = None
        self._failures.clear()
        for part in ("server", "accepted", "clock"):
            self._missing.pop(part, None)
        self._on_accepted()
        self._change()

    def _lost(self, why: str) -> None:
        self._flicker, self._connected = None, False
        finding, self._last = self._last, None
        if finding is not None and finding.cause:
            self.miss("server", finding.cause, **finding.facts)
        elif "server" not in self._missing:
            self.miss("server", "lost", detail=why)

    def tick(self) -> None:
        """Reports a lost connection once it has been lost long enough. Call this a few times a second."""
        with self._lock:
            if self._flicker is not None and self._clock() - self._flicker[0] > _FLICKER_S:
                self._lost(self._flicker[1])

    def worker(self, state: Literal["in", "away", "wrong-secret"]) -> None:
        """Takes whether the SuperNode accepts our own process."""
        with self._lock:
            self._worker_connected = state == "in"
            if state == "wrong-secret":
                self.miss("process", "wrong-secret")
            elif state == "in" and self._missing.get("process", ("", {}))[0] == "wrong-secret":
                self.has("process")
            else:
                self._change()

    def _refused(self, rest: str) -> None:
        why, _, seconds = rest.partition(" ")
        code = _REFUSALS.get(why, "refused")
        if code == "not-enrolled" and (self._known or self._facts.get("words")):
            code = "withdrawn" if self._known else "awaits-approval"
        self._connected = self._child_accepted = False
        self._flicker = None
        self._missing.pop("server", None)  # it has answered
        self._ended_by = code
        if code == "clock":
            self.measured(_number(seconds) or 0.0, refused=True)
        else:
            self.miss("accepted", code, detail=f"status {why}" if why.isdigit() else why)

    def probed(self, finding: Finding) -> None:
        """Takes the result of a probe. It does not count while the SuperNode is connected: that knows better."""
        with self._lock:
            self._last = finding
            if finding.cause and not self._connected:
                self.miss("server", finding.cause, **finding.facts)
            elif not finding.cause and self._missing.get("server", ("lost", {}))[0] != "lost":
                self.has("server")
        if finding.ahead_s is not None:
            self.measured(finding.ahead_s)

    def measured(self, ahead_s: float, *, refused: bool = False) -> None:
        """Takes this machine's clock minus the server's, seconds. A large offset is reported, although signatures correct it."""
        facts = {"seconds": f"{abs(ahead_s):.0f}", "way": "ahead" if ahead_s > 0 else "behind"}
        with self._lock:
            if abs(ahead_s) > MAX_CORRECTION_S or (refused and abs(ahead_s) > _AMISS_S):
                self.miss("clock", "clock", **facts)
                return
            self.has("clock")
            changed = abs(ahead_s - self._said_ahead_s) > max(_AMISS_S, abs(self._said_ahead_s) / 5)
            if changed and max(abs(ahead_s), abs(self._said_ahead_s)) > _AMISS_S:
                self._said_ahead_s = ahead_s
                way, seconds = ("ahead" if ahead_s > 0 else "behind"), round(abs(ahead_s))
                self._report(Event.CLOCK, Clock(site=self._site, ahead_s=ahead_s, seconds=seconds, way=way))

    def ended(self, status: int, lines: list[str]) -> tuple[str, float]:
        """Takes that the SuperNode ended; returns why, and the pause before the next start, seconds."""
        with self._lock:
            self._connected = self._child_accepted = self._worker_connected = False
            self._flicker = None
            code, self._ended_by = self._ended_by, ""
            if not code:
                code = next((self._missing[p][0] for p in ("process", "server", "accepted", "clock") if p in self._missing), "")
            if not code:
                code = "ended"
                self.miss("process", code, detail=f"status {status}: {telling(lines) or 'its log says nothing'}")
            part = CAUSES[code].part
            facts = {**self._facts, **self._missing.get(part, ("", {}))[1]}
            self._failures[code] = self._failures.get(code, -1) + 1
            pause = min(CAUSES[code].retry_s * 2 ** min(self._failures[code], 10), _LONGEST_RETRY_S)
            self._change()
            return CAUSES[code].sentence(facts), pause

    def miss(self, part: Part, code: str, **facts: str) -> None:
        """Takes that a part is missing, with a cause of :data:`fedlora.processes.causes.CAUSES`."""
        with self._lock:
            self._missing[part] = (code, facts)
            self._change(part)

    def has(self, part: Part) -> None:
        """Takes that a part is present."""
        with self._lock:
            self._missing.pop(part, None)
            self._told.pop(part, None)
            self._change()

    def rest(self, resting: bool) -> None:
        """Takes that this site is paused: it is not connected, and nothing is reported until it goes on."""
        with self._lock:
            self._connected = self._child_accepted = self._worker_connected = False
            self._flicker, self._resting, self._said = None, resting, None
            self._missing.clear()
            self._change()

    def stop(self) -> None:
        """Takes that this site is being stopped; nothing is reported after that."""
        with self._lock:
            self._stopped = True

    # --- reports ------------------------------------------------------------------------------------------------

    @property
    def state(self) -> State:
        with self._lock:
            if self._stopped:
                return "stopped"
            if self._connected and "accepted" not in self._missing and "clock" not in self._missing:
                return "ready" if self._worker_connected and not self._missing else "connected"
            if "server" not in self._missing and ("accepted" in self._missing or "clock" in self._missing):
                return "refused"
            return "lost" if self._ever_accepted and self._missing else "connecting"

    def retry_s(self, code: str) -> float:
        """Pause before something with this cause is checked again, seconds."""
        return CAUSES[code].retry_s if code else 600.0

    def _words(self, part: Part) -> dict[str, str]:
        code, own = self._missing[part]
        facts = {**self._facts, **own}
        return {"cause": code, "why": CAUSES[code].sentence(facts), "cure": CAUSES[code].remedy(facts)}

    def _change(self, news: Part | None = None) -> None:
        """Reports the state if it changed, or the cause of a missing part if that changed."""
        with self._lock:
            if self._stopped or self._resting:
                return
            for gone in set(self._told) - set(self._missing):
                del self._told[gone]
            state, part = self.state, news or next((p for p in PARTS if p in self._missing), None)
            words = self._words(part) if part else {"cause": "", "why": "", "cure": ""}
            if state == self._said and (part is None or self._told.get(part) == words["cause"]):
                return
            self._said = state
            if part:
                self._told[part] = words["cause"]
            next_s = self.retry_s(words["cause"]) if part else 0.0
            why, cure = words["why"], words["cure"]
            standing = standing_of(state, cause=words["cause"], known=self._known, doing="ready")
            word = standing if standing in ("pending", "degraded", "revoked") else state
            facts = SiteStatus(
                site=self._site, state=state, standing=standing, part=part or "", cause=words["cause"], why=why, cure=cure,
                next_s=next_s, said=self._line(word, why=why, cure=cure, next_s=next_s),
            )  # fmt: skip
            self._report(Event.SITE, facts)

    def _line(self, state: str, *, why: str, cure: str, next_s: float) -> str:
        if not why:
            return {
                "connecting": f"connecting to {self._facts['server']}",
                "ready": f"ready: connected to {self._facts['server']}",
            }.get(state, str(state))
        return f"{state}: {why}{f'; {cure}' if cure else ''}; next try in {next_s:g} s"


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
