"""Worker processes for the further GPUs of a site: a :class:`WorkerPool` starts them, watches them and ends them.

What a worker is to do comes on its standard input: the site file, the plan, its rank. It reads the same rows as the site
itself, takes commands from rank 0 only, and ends when rank 0 ends, even if that is killed. The command that starts a worker is an
argument.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import subprocess
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from fedlora.core.canonical import canonical
from fedlora.core.errors import ResourceError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Process
from fedlora.core.plan import Plan

if TYPE_CHECKING:
    from fedlora.learn.fast.gpus import TrainingGroup


log = logging.getLogger(__name__)
_POLL_S = 0.5
_END_S = 10.0
_LOAD_S = 3600.0


class WorkerPool:
    """The processes of a site's GPUs. They are started when a round needs them and again when one of them ended.

    They die with the thread that started them, which must therefore live as long as they.

    Args:
        spawn: the command of a worker; its order comes on standard input.
        devices: ``cuda:0`` and so on, or ``cpu`` as often as there are to be processes; this process computes on the first.
        state: a directory of the site's own.
        training_digest: what all processes must agree on, see :meth:`fedlora.learn.learner.HFLearner.training_digest`.
        report: told of :attr:`Event.PROCESS`.
    """

    def __init__(
        self,
        spawn: Sequence[str],
        site_file: Path,
        plan: Plan,
        *,
        devices: Sequence[str],
        state: Path,
        training_digest: bytes,
        report: Report,
    ) -> None:
        self._command, self._site_file, self._plan, self._devices = list(spawn), site_file.resolve(), plan, list(devices)
        self._state, self._report, self._training_digest = state, report, training_digest
        self._processes: list[subprocess.Popen[bytes]] = []
        self._ranks: TrainingGroup | None = None
        self._broken = threading.Event()
        self._watched = threading.Event()  # set: the watcher has no more to do
        self._watcher: threading.Thread | None = None

    def ranks(self) -> TrainingGroup:
        """The group, all of it alive as far as is known. Loads the base on each GPU the first time.

        Raises:
            ResourceError: they did not start.
        """
        if self._ranks is None or self._broken.is_set():
            self.close()
            self._start()
        assert self._ranks is not None  # noqa: S101  _start sets it
        return self._ranks

    def close(self) -> None:
        """Ends the others."""
        self._watched.set()
        if self._watcher is not None:
            self._watcher.join(_END_S)
        ranks, self._ranks = self._ranks, None
        try:
            if ranks is not None and not self._broken.is_set():
                with contextlib.suppress(ResourceError):  # one ended just now
                    ranks.broadcast(None)
            if ranks is not None:
                ranks.close()
            for process in self._processes if not self._broken.is_set() else ():
                try:
                    process.wait(_END_S)
                except subprocess.TimeoutExpired:
                    log.warning("process %d does not end by itself", process.pid)
        finally:
            self._kill()
            self._sweep()

    def pids(self) -> list[int]:
        """Process ids of the others, by rank from 1."""
        return [p.pid for p in self._processes]

    def _start(self) -> None:
        from fedlora.learn.fast.gpus import TrainingGroup

        self._broken.clear()
        self._watched = threading.Event()
        self._state.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._sweep()  # what a killed process left
        rendezvous = self._state.resolve() / f"rendezvous-{secrets.token_hex(8)}"
        self._report(Event.PROCESS, Process(name="training", state=f"starting on {', '.join(self._devices)}"))
        try:
            for rank in range(1, len(self._devices)):
                self._processes.append(self._spawn(rank, rendezvous))
            self._await(rendezvous)
            self._watch()
            self._ranks = TrainingGroup(
                rank=0,
                count=len(self._devices),
                rendezvous=rendezvous,
                device=self._devices[0],
                training_digest=self._training_digest,
                gone=self._broken,
            )
        except BaseException:
            self._watched.set()
            self._kill()
            raise
        self._report(Event.PROCESS, Process(name="training", state=f"{len(self._devices)} processes are ready"))

    def _await(self, rendezvous: Path) -> None:
        """Waits until every worker has loaded its base. Only then start collectives, which cannot be interrupted."""
        waiting = [ready(rendezvous, rank) for rank in range(1, len(self._devices))]
        end = time.monotonic() + _LOAD_S
        while waiting := [file for file in waiting if not file.exists()]:
            ended = [p.returncode for p in self._processes if p.poll() is not None]
            if ended or time.monotonic() > end:
                why = f"ended with status {ended[0]}" if ended else f"was not ready within {_LOAD_S:.0f} s"
                raise ResourceError(
                    f"the process of a further GPU {why}", hint="see the site's log; set gpus = 1 to train without it"
                )
            time.sleep(_POLL_S / 5)

    def _spawn(self, rank: int, rendezvous: Path) -> subprocess.Popen[bytes]:
        device = self._devices[rank]
        process = subprocess.Popen(  # noqa: S603 - this package's own command
            self._command,
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        order = {"site_file": str(self._site_file), "plan": self._plan.canonical().decode(), "rank": rank,
                 "count": len(self._devices), "device": device, "rendezvous": str(rendezvous), "parent": os.getpid()}  # fmt: skip
        with contextlib.suppress(BrokenPipeError):  # it ended already; waiting for it finds that out
            if process.stdin is not None:
                process.stdin.write(canonical(order))
                process.stdin.close()
        threading.Thread(target=_note, args=(process, device), daemon=True).start()
        return process

    def _watch(self) -> None:
        processes, over = list(self._processes), self._watched

        def run() -> None:
            while not over.wait(_POLL_S):
                ended = [p for p in processes if p.poll() is not None]
                if ended:
                    log.error("the process of a GPU ended with status %s", ended[0].returncode)
                    self._broken.set()
                    if self._ranks is not None:
                        self._ranks.abandon()
                    return

        self._watcher = threading.Thread(target=run, daemon=True)
        self._watcher.start()

    def _sweep(self) -> None:
        for file in self._state.glob("rendezvous-*"):
            file.unlink(missing_ok=True)

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait()
        self._processes = []


def ready(rendezvous: Path, rank: int) -> Path:
    """The file by which a worker says that it has loaded its base."""
    return rendezvous.with_name(f"{rendezvous.name}.{rank}")


def _note(process: subprocess.Popen[bytes], device: str) -> None:
    """What it says on standard error goes into this site's own log."""
    for line in process.stderr or ():
        log.info("%s: %s", device, line.decode(errors="replace").rstrip()[:2000])
