"""Claims runs from the SuperLink and starts one :mod:`fedlora.flower.server_app` at a time.

It replaces Flower's own ``flower-superexec``, which imports the bundle of any run, while the Control API lets everybody on this
host start a run; and which passes the task's token on the command line, where every user sees it.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

from fedlora.core.errors import ConnectionFailed, FedLoRAError, RunFailed
from fedlora.flower._internals import Claim, Claimer, TaskClient
from fedlora.flower.bundle import BUNDLE_SHA256
from fedlora.flower.database import shrink
from fedlora.flower.jobs import Outcome, full, load_outcome, only_run, save_outcome
from fedlora.flower.server_app import Handover
from fedlora.gateway.addresses import LOOPBACK
from fedlora.processes.parent import die_with_parent

log = logging.getLogger("fedlora.executor")

_POLL_S = 0.25
_HEARTBEAT_S = 2.0
_PATIENCE_S = 900.0
_EMPTY_AGAIN_S = 5.0  # between attempts to empty the database
_EMPTY_FIRST_S = 60.0  # so long the next run waits for that
_STOP_S = 10.0
_APP = [sys.executable, "-P", "-m", "fedlora.flower.server_app"]


def execute(token: str, *, home: Path, superlink_port: int, app: list[str]) -> str:
    """Carries out one claimed run.

    Args:
        app: command line of the server app.

    Returns:
        The code of the error that ended it, empty if it completed.
    """
    client = TaskClient(f"{LOOPBACK}:{superlink_port}", token=token, ca=home / "tls" / "ca.crt", patience_s=_PATIENCE_S)
    error = "internal"
    try:
        claim = client.start()
        if hashlib.sha256(claim.bundle).hexdigest() != BUNDLE_SHA256:
            error = "bundle-refused"
        else:
            error = _run(client, claim, token, home=home, superlink_port=superlink_port, app=app)
    except _Asked as e:
        error = e.error
        raise
    finally:
        try:
            client.finish(error)
        except ConnectionFailed as e:
            log.warning("the end of the run could not be reported: %s", e)
        client.close()
    return error


def _run(client: TaskClient, claim: Claim, token: str, *, home: Path, superlink_port: int, app: list[str]) -> str:
    job = str(claim.config.get("job", ""))
    task = Handover(token, str(home), superlink_port, claim.run_id, claim.task_id, claim.node_id, job)
    parent = os.getpid()
    process = subprocess.Popen(  # noqa: S603  argv is ours, without a shell
        app,
        stdin=subprocess.PIPE,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
    )
    next_beat = 0.0
    try:
        if process.stdin is not None:
            with suppress(BrokenPipeError), process.stdin:
                process.stdin.write(task.dump())
        with only_run(home, job):
            while process.poll() is None:
                if time.monotonic() >= next_beat:
                    next_beat = time.monotonic() + _HEARTBEAT_S
                    if not client.heartbeat():
                        return _stopped(home, job, RunFailed("the run was stopped", hint=_RESUME, code="stopped"))
                time.sleep(_POLL_S)
    except SystemExit:
        hint = f"start it again with `fedlora server up`; then {_RESUME}"
        raise _Asked(_stopped(home, job, RunFailed("the server was stopped during the run", hint=hint, code="stopped"))) from None
    finally:
        _end(process)
    if process.returncode == 0:
        return ""
    outcome, error = load_outcome(home, job), full(home)
    if outcome is None and error is not None:
        outcome = Outcome.of(error)
        _said(home, job, outcome)
    return outcome.code if outcome else "server-app-died"


_RESUME = "continue with `fedlora server start HOME PLAN --resume`; nothing is lost"


class _Asked(SystemExit):
    """This process was asked to end during a run."""

    def __init__(self, code: str) -> None:
        super().__init__(0)
        self.error = code


def _stopped(home: Path, job: str, error: RunFailed) -> str:
    """Records that the run was stopped, unless it has already ended; returns the error's code."""
    if load_outcome(home, job) is None:
        _said(home, job, Outcome.of(error))
    return error.code


def _said(home: Path, job: str, outcome: Outcome) -> None:
    with suppress(FedLoRAError):  # no job of this server, or the disk is full
        save_outcome(home, job, outcome)


def _end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def main(argv: list[str] | None = None, *, app: list[str] | None = None) -> None:
    """Claims runs until signaled."""
    parser = argparse.ArgumentParser(prog="fedlora-executor")
    parser.add_argument("--home", type=Path, required=True)
    parser.add_argument("--superlink-port", type=int, required=True)
    args = parser.parse_args(argv)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(name)s %(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    secret = (args.home / "superexec.secret").read_bytes()
    claimer = Claimer(
        "flwr-serverapp", address=f"{LOOPBACK}:{args.superlink_port}", secret=secret, ca=args.home / "tls" / "ca.crt"
    )
    used, next_try, ended = True, 0.0, time.monotonic()  # perhaps, by an executor before this one that was killed
    log.info("ready")
    while True:
        try:
            if used and time.monotonic() >= next_try:
                used = not shrink(args.home / "flower" / "state.db")
                next_try = time.monotonic() + _EMPTY_AGAIN_S
            waits = used and time.monotonic() < ended + _EMPTY_FIRST_S
            token = "" if waits else claimer.claim()
            if token:
                used, next_try = True, 0.0
                error = execute(token, home=args.home, superlink_port=args.superlink_port, app=app or _APP)
                log.info("run ended: %s", error or "completed")
                ended = time.monotonic()
        except ConnectionFailed as e:
            log.warning("%s", e)
            time.sleep(1.0)
        time.sleep(_POLL_S)


if __name__ == "__main__":
    main()
