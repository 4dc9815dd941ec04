"""Who is connected, who is gone, and who has fallen silent: Flower drops a node only a minute after its last sign of life."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from fedlora.core.events import Event, Report
from fedlora.core.facts import Silent, SiteName
from fedlora.core.words import duration
from fedlora.flower.coordinator.watch import load_seen

_SILENT_S = 20.0  # a sign of life comes every 7 to 9 s


class Presence:
    """Reports the sites that come, fall silent, are heard again, and go.

    Args:
        report: gets ``site-online``, ``site-silent`` and ``site-offline``.
    """

    def __init__(self, report: Report) -> None:
        self._report = report
        self._silent: set[str] = set()
        self.online: set[str] = set()

    def note(self, heard: Mapping[str, float], *, now: float) -> None:
        """One look: when each site that Flower takes for connected has given its last sign of life, seconds since 1970."""
        silent = {site for site, at in heard.items() if now - at > _SILENT_S}
        again = (self._silent - silent) & heard.keys()
        for site in sorted((heard.keys() - self.online) | again):
            self._report(Event.SITE_ONLINE, SiteName(site=site))
        for site in sorted(silent - self._silent):
            self._report(Event.SITE_SILENT, _silence(site, heard[site], now=now))
        for site in sorted(self.online - heard.keys()):
            self._report(Event.SITE_OFFLINE, SiteName(site=site))
        self.online, self._silent = {*heard}, silent


class Silences:
    """Passes on which sites have fallen silent, as `server up` has noted it, once each time; for who follows a run.

    Args:
        clock: seconds since 1970.
    """

    def __init__(self, home: Path, report: Report, *, clock: Callable[[], float]) -> None:
        self._home, self._report, self._clock = home, report, clock
        self._said: dict[str, float] = {}

    def look(self) -> None:
        silent = {site: seen.silent for site, seen in load_seen(self._home).items() if seen.online and seen.silent}
        for site, at in silent.items():
            if site not in self._said:
                self._report(Event.SITE_SILENT, _silence(site, at, now=self._clock()))
        self._said = silent


def _silence(site: str, at: float, *, now: float) -> Silent:
    return Silent(site=site, since=int(at), said=f"{site}: {silent_for(now - at)}; it counts as gone a minute after its last one")


def silent_for(seconds: float) -> str:
    """What a silence of so many seconds means."""
    return f"no sign of life for {duration(max(seconds, 0.0))}: its machine, or the network between, may be down"
