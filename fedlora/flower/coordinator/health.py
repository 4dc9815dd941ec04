"""What monitoring asks `server up` over loopback: ``/healthz``, ``/readyz``, ``/metrics``, and the page of the run.

Plain HTTP, to 127.0.0.1 only. It has no password: everybody on this host can read names of sites and runs, states and losses, as
everybody there can use Flower's own API. Nothing can be changed through it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import get_args

from fedlora.core.deployment.live import in_page
from fedlora.core.deployment.status import RunState, ServerStatus
from fedlora.core.sites.standing import STANDINGS
from fedlora.flower.coordinator.live import live_part
from fedlora.flower.coordinator.look import look
from fedlora.flower.jobs import full
from fedlora.processes.monitor import EXPOSITION, STALE_S, TEXT, labels, metric, probed

_HTML = "text/html; charset=utf-8"


class Health:
    """What is asked for, from what `server up` has noticed last.

    Args:
        home: the server's directory.
        gateway: whether the public port answers.
        clock: seconds, rising.
    """

    def __init__(self, home: Path, *, gateway: Callable[[], bool], clock: Callable[[], float] = time.monotonic) -> None:
        self._home, self._gateway, self._clock = home, gateway, clock
        self._looked = clock()
        self._relay, self._wrong = False, ""

    def note(self, *, relay: bool, wrong: str = "") -> None:
        """`server up` has looked at its processes.

        Args:
            relay: the SuperLink has answered.
            wrong: what is wrong with the server's own files, by name.
        """
        self._looked, self._relay, self._wrong = self._clock(), relay, wrong

    def healthz(self) -> str:
        """Empty: `server up` works. Else what is wrong with it: it should be restarted."""
        still_s = self._clock() - self._looked
        return f"server up has not looked at its processes for {still_s:.0f} s" if still_s > STALE_S else ""

    def readyz(self) -> str:
        """Empty: sites are let in and a run can go on. Else why not."""
        if wrong := self.healthz():
            return wrong
        if self._wrong:
            return self._wrong
        if not self._relay:
            return "the relay does not answer"
        if not self._gateway():
            return "the public port does not answer"
        error = full(self._home)
        return str(error) if error is not None else ""

    def metrics(self) -> str:
        """All numbers, in Prometheus' text format 0.0.4."""
        ready = not self.readyz()
        lines = [*metric("fedlora_up", "Whether sites are let in and a run can go on.", {"": float(ready)})]
        return "\n".join(lines + _numbers(look(self._home))) + "\n"

    def answer(self, path: str) -> tuple[int, str, str]:
        """Status, content type and body for a path."""
        if (found := probed(path, healthz=self.healthz, readyz=self.readyz)) is not None:
            return found
        if path == "/metrics":
            return 200, EXPOSITION, self.metrics()
        if path == "/":
            return self._page()
        return 404, TEXT, "there is: / /healthz /readyz /metrics\n"

    def _page(self) -> tuple[int, str, str]:
        """The page of the run that goes on, or of the last one."""
        found = look(self._home)
        for run in found["runs"]:
            page = self._home / "runs" / run["name"] / "report.html"
            if page.is_file():
                return 200, _HTML, in_page(page.read_text(encoding="utf-8"), live_part(run, found, now=time.time()))
        return 404, TEXT, "there is no page yet: `server up --page` makes one when a run begins\n"


def _numbers(found: ServerStatus) -> list[str]:
    runs, sites = found["runs"], found["sites"]
    live = [run for run in runs if run["place"]]
    at = {run["name"]: run for run in runs}
    losses = {n: value for n, run in at.items() if (value := _metric_of(run["last"], "eval/nll")) is not None}
    etas = {n: run["eta_s"] for n, run in at.items() if run["eta_s"] is not None}
    return [
        *metric("fedlora_sites_enrolled", "Sites whose keys are in HOME/sites.", {"": float(len(sites))}),
        *metric(
            "fedlora_site_standing",
            "1 for the standing of a site, 0 for each other one.",
            {labels(site=s["site"], standing=word): float(s["standing"] == word) for s in sites for word in STANDINGS},
        ),
        *metric("fedlora_runs_waiting", "Runs that wait behind another one.", {"": float(max(len(live) - 1, 0))}),
        *metric(
            "fedlora_run_state",
            "1 for the state of a run, 0 for each other one.",
            {labels(run=n, state=word): float(r["state"] == word) for n, r in at.items() for word in get_args(RunState)},
        ),
        *metric("fedlora_run_rounds_done", "Rounds that are done.", {labels(run=n): float(r["round"]) for n, r in at.items()}),
        *metric("fedlora_run_rounds", "Rounds of the plan.", {labels(run=n): float(r["rounds"]) for n, r in at.items()}),
        *metric(
            "fedlora_run_missing_sites", "Sites that it waits for.", {labels(run=r["name"]): len(r["missing"]) for r in live}
        ),
        *metric("fedlora_run_eta_seconds", "Until its end, by the last rounds.", {labels(run=n): v for n, v in etas.items()}),
        *metric(
            "fedlora_run_held_out_nll",
            "Held-out loss of all sites together that was measured last, nats per token.",
            {labels(run=n): value for n, value in losses.items()},
        ),
    ]


def _metric_of(record: Mapping[str, object] | None, name: str) -> float | None:
    together = record.get("together") if record is not None else None
    value = together["metrics"].get(name) if isinstance(together, Mapping) else None
    return float(value) if isinstance(value, int | float) else None
