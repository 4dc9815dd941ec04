"""The process of one run at the server: maps sites to nodes, opens the transport, runs the rounds.

Started by the executor, which hands it the task's token on standard input, where no other user of the host sees it.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

from fedlora.core.errors import FedLoRAError, PlanRefused
from fedlora.core.events import Report
from fedlora.flower._internals import Control, TaskClient
from fedlora.flower.control import nodes_by_site
from fedlora.flower.coordinator.absences import Absences
from fedlora.flower.coordinator.runs import between_rounds
from fedlora.flower.jobs import Events, Outcome, full, load_job, save_outcome
from fedlora.flower.libraries import ServerApp
from fedlora.flower.transport import Channel, FlowerTransport
from fedlora.gateway.addresses import LOOPBACK
from fedlora.gateway.allowance import Allowance
from fedlora.gateway.certificates import load_node_keys
from fedlora.rounds.transport import Transport

log = logging.getLogger("fedlora.server_app")

_PATIENCE_S = 900.0


class Serve(Protocol):
    """All rounds of a run."""

    def __call__(
        self,
        home: Path,
        plan_file: Path,
        transport: Transport,
        *,
        resume: bool,
        report: Report,
        between: Callable[[int, int], None],
    ) -> object: ...


@dataclass(frozen=True, slots=True)
class Handover:
    """What the executor passes to this process on standard input, as one line of JSON."""

    token: str
    home: str
    superlink_port: int
    run_id: int
    task_id: int
    node_id: int
    job: str

    def dump(self) -> bytes:
        return json.dumps(asdict(self)).encode() + b"\n"

    @classmethod
    def parse(cls, line: bytes) -> Handover:
        return cls(**json.loads(line))


class _Refuses(ServerApp):  # type: ignore[misc]  # flwr is untyped here
    def __call__(self, grid: object, context: object) -> None:
        raise PlanRefused("the server does not run bundles", hint="start runs with `fedlora server start`")


app = _Refuses()


def run_server_app(grid: Channel, *, home: Path, job: str, control: Callable[[], Control], serve: Serve) -> Outcome:
    """Carries out a job. An error becomes an outcome with a code; its text goes to this process's log.

    Args:
        grid: the channel to the nodes.
        control: opens the Control API, to learn which node is which site.
        serve: runs the rounds; a test has its own.
    """
    events = Events(home, job)
    told = Absences(home, events)
    try:
        todo = load_job(home, job)
        client = control()
        try:
            nodes = nodes_by_site(client, load_node_keys(home / "sites"))
        finally:
            client.close()
        serve(
            home,
            Path(todo.plan),
            FlowerTransport(grid, nodes, allowance=Allowance(home / "flower"), away=told.away, left=told.left, back=told.back),
            resume=todo.resume,
            report=told,
            between=between_rounds(home, job, events),
        )
    except FedLoRAError as e:
        log.error("%s: %s", e.code, e)
        return Outcome.of(full(home) or e)  # Flower's answer to a full disk says nothing of it
    except Exception as e:
        log.exception("internal error")
        if error := full(home):
            return Outcome.of(error)
        return Outcome("internal", f"internal error: {type(e).__name__}: {e}", "see flower/log/executor.log")
    return Outcome("", "", "")


def _serve(
    home: Path, plan_file: Path, transport: Transport, *, resume: bool, report: Report, between: Callable[[int, int], None]
) -> object:
    from fedlora import assemble  # in here, so that even a broken installation becomes an outcome

    return assemble.server(home, plan_file, resume=resume, report=report).run(transport, between=between, wait=time.sleep)


def main(serve: Serve = _serve) -> int:
    """Reads the handover, does the job, writes its outcome. Returns the exit status: 0 only for a run that completed."""
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    task = Handover.parse(sys.stdin.buffer.readline())
    home, ca = Path(task.home), Path(task.home) / "tls" / "ca.crt"
    grid = TaskClient(f"{LOOPBACK}:{task.superlink_port}", token=task.token, ca=ca, patience_s=_PATIENCE_S)
    grid.identify(run_id=task.run_id, task_id=task.task_id, node_id=task.node_id)
    outcome = run_server_app(
        grid,
        home=home,
        job=task.job,
        control=lambda: Control(task.superlink_port, ca=ca, patience_s=_PATIENCE_S),
        serve=serve,
    )
    save_outcome(home, task.job, outcome)
    grid.close()
    return 1 if outcome.code else 0


if __name__ == "__main__":
    sys.exit(main())
