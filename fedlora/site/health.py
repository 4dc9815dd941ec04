"""What monitoring asks `site up` over loopback: ``/healthz``, ``/readyz``, ``/metrics``. Nothing of any row is in it."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from fedlora.core.errors import FedLoRAError
from fedlora.core.sites.facts import SiteState
from fedlora.core.sites.standing import STANDINGS
from fedlora.processes.monitor import EXPOSITION, STALE_S, TEXT, labels, metric, probed
from fedlora.site.progress import load_state

READY: Final = ("connected", "ready", "training", "uploading", "idle")
"""Standings in which a site does, or waits for, its part of a run."""


class SiteHealth:
    """What is asked for, from the status file that `site up` writes.

    Args:
        name: of the site.
        state: its state directory.
        clock: seconds, rising.
    """

    def __init__(self, name: str, state: Path, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._name, self._state, self._clock = name, state, clock
        self._looked = clock()

    def note(self) -> None:
        """`site up` has looked at its processes."""
        self._looked = self._clock()

    def healthz(self) -> str:
        """Empty: `site up` works. Else what is wrong with it: it should be restarted."""
        still_s = self._clock() - self._looked
        return f"site up has not looked at its processes for {still_s:.0f} s" if still_s > STALE_S else ""

    def readyz(self) -> str:
        """Empty: this site can take part in a run. Else why not."""
        if wrong := self.healthz():
            return wrong
        found = self._found()
        if found is None:
            return "nothing is known yet"
        if found["standing"] in READY:
            return ""
        return ": ".join(filter(None, (found["standing"], found["why"]))) + (f"; {found['cure']}" if found["cure"] else "")

    def metrics(self) -> str:
        """All numbers, in Prometheus' text format 0.0.4."""
        lines = metric("fedlora_up", "Whether this site can take part in a run.", {"": float(not self.readyz())})
        if (found := self._found()) is not None:
            lines += _numbers(self._name, found)
        return "\n".join(lines) + "\n"

    def answer(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body for a path."""
        if (found := probed(path, healthz=self.healthz, readyz=self.readyz)) is not None:
            return found
        return (200, EXPOSITION, self.metrics()) if path == "/metrics" else (404, TEXT, "there is: /healthz /readyz /metrics\n")

    def _found(self) -> SiteState | None:
        try:
            return load_state(self._state)
        except FedLoRAError:
            return None


def _numbers(name: str, found: SiteState) -> list[str]:
    last = found["last"]
    losses = {} if last is None else {"before": last["before"], "after": last["after"], "held-out": last["nll"]}
    known = {labels(of=of): value for of, value in losses.items() if value is not None}
    return [
        *metric(
            "fedlora_site_standing",
            "1 for the standing of this site, 0 for each other one.",
            {labels(site=name, standing=word): float(found["standing"] == word) for word in STANDINGS},
        ),
        *metric("fedlora_site_round", "Round of the run that it is in.", {"": float(found["round"])}),
        *metric("fedlora_site_rounds", "Rounds of that run.", {"": float(found["rounds"])}),
        *metric("fedlora_site_messages", "Messages that have left since it was started.", {"": float(found["messages"])}),
        *metric("fedlora_site_sent_bytes", "Their bytes.", {"": float(found["sent_bytes"])}),
        *metric("fedlora_site_loss", "Own loss of the last round, nats per token.", known),
        *metric(
            "fedlora_site_refusals",
            "Error codes that have left in place of a message.",
            {labels(code=code): float(count) for code, count in found["codes"].items()},
        ),
    ]
