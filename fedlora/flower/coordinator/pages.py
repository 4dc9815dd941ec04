"""Has the page of a run written again whenever it begins or a round is done, by `fedlora report` in a process of its own.

Drawing takes seconds, and nothing of a deployment depends on what draws.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from fedlora.core.errors import NotInstalled
from fedlora.core.events import Event, Report
from fedlora.core.facts import Process
from fedlora.flower.coordinator.live import Live
from fedlora.processes.parent import die_with_parent


class Pages:
    """Writes one page at a time.

    Args:
        home: the server's directory.
        report: is told when a page could not be written.

    Raises:
        NotInstalled: what draws is not there.
    """

    def __init__(self, home: Path, report: Report) -> None:
        for module in ("jinja2", "vl_convert"):
            if importlib.util.find_spec(module) is None:
                raise NotInstalled(module, extra="report", what="the page and its figures")
        self._home, self._report, self._live = home, report, Live(home)
        self._wanted: dict[str, None] = {}
        self._child: tuple[str, subprocess.Popen[bytes]] | None = None

    def want(self, run: str) -> None:
        """This run's page has changed."""
        self._wanted[run] = None

    def look(self) -> None:
        """Looks after the process that draws, and starts the next one. To be called about once a second."""
        self._live.look(time.time())
        if self._child is not None:
            name, process = self._child
            if (status := process.poll()) is None:
                return
            self._child = None
            if status:
                said = f"was not written, status {status}; `fedlora report {self._home / 'runs' / name}` says why"
                self._report(Event.PROCESS, Process(name=f"page of {name}", state=said))
        for name in list(self._wanted):
            del self._wanted[name]
            if (directory := self._home / "runs" / name).is_dir():
                self._child = name, _draw(directory)
                return

    def stop(self) -> None:
        """Ends the process that draws."""
        if self._child is not None:
            self._child[1].kill()
            self._child[1].wait()
            self._child = None


def _draw(directory: Path) -> subprocess.Popen[bytes]:
    parent = os.getpid()
    return subprocess.Popen(  # noqa: S603  argv is ours, without a shell
        [sys.executable, "-P", "-m", "fedlora", "report", str(directory)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
    )
