"""The server app with a toy in place of a real run: what it does is the plan's name."""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

from toy_parts import BLOB_BYTES, DUE, blob, record

from fedlora.core.errors import RunFailed
from fedlora.core.events import Event, Report
from fedlora.core.facts import Ask, Other, Recorded, Rejected, Start
from fedlora.core.messages import Request
from fedlora.flower.server_app import main
from fedlora.formats.plans import load_plan
from fedlora.rounds.transport import Transport


def serve(
    home: Path, plan_file: Path, transport: Transport, *, resume: bool, report: Report, between: Callable[[int, int], None]
) -> None:
    name = load_plan(plan_file).run.name
    if name == "steps":
        steps(report, between)
        return
    report(Event.START, Start(run="0" * 64, round=0, rounds=1))
    report(Event.OTHER, Other(name="started", facts={"argv": sys.argv, "resume": resume}))
    if name == "quorum":
        raise RunFailed("one site of two", hint="wait for the other", code="quorum")
    if name == "bug":
        raise ZeroDivisionError
    if name == "wait":
        time.sleep(60)
    if name.startswith("rounds"):
        rounds(plan_file.with_suffix(".json"), transport, report)
        return
    body = blob("broadcast")
    requests = [Request(s, "train", body, BLOB_BYTES) for s in transport.sites()]
    if name == "held":  # until this file is there
        requests = [Request("beta", "held", str(plan_file.with_suffix(".go")).encode(), DUE)]
    began = time.monotonic()
    for reply in transport.exchange(requests, deadline_s=30):
        digest = hashlib.sha256(reply.body).hexdigest()
        facts = {"site": reply.site, "error": reply.error, "sha256": digest, "seconds": time.monotonic() - began}
        report(Event.OTHER, Other(name="reply", facts=facts))
        if name == "full" and reply.error:
            raise RunFailed("what the rounds say of it", hint="bring the sites back", code="quorum")


def steps(report: Report, between: Callable[[int, int], None]) -> None:
    """Nine hundred rounds of a quarter of a second, without sites."""
    report(Event.START, Start(run="0" * 64, round=0, rounds=900))
    for done in range(900):
        between(done, 900)
        report(Event.ASK, Ask(round=done + 1, attempt=0, kind="train", sites=["alpha", "beta"], need=1))
        report(Event.REJECTED, Rejected(site="beta", code="data"))
        time.sleep(0.25)
        report(Event.ROUND, Recorded(record=record(done + 1)))


def rounds(file: Path, transport: Transport, report: Report) -> None:
    """Exchanges in which each site sends as many bytes as the file says for each; ``DUE`` are asked for."""
    for number, sizes in enumerate(json.loads(file.read_text())):
        began = time.monotonic()
        width = 100_000 if file.stem.startswith("rounds-long") else 0  # longer than what stands beside the names
        requests = [Request(s, "sized", str(size).encode().ljust(width), DUE) for s, size in sizes.items()]
        for reply in transport.exchange(requests, deadline_s=55):
            facts = {"round": number, "site": reply.site, "error": reply.error, "size": len(reply.body)}
            report(Event.OTHER, Other(name="reply", facts=facts))
        report(Event.OTHER, Other(name="exchange", facts={"seconds": time.monotonic() - began}))


if __name__ == "__main__":
    sys.exit(main(serve))
