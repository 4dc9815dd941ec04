"""The server app with a toy in place of ``build.serve``: what it does is the plan's name."""

from __future__ import annotations

import hashlib
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from toy_parts import blob

from fedlora.config import load_plan
from fedlora.errors import QuorumNotReached
from fedlora.flower.server_app import main
from fedlora.messages import Request
from fedlora.transport import Transport


def serve(
    home: Path, plan_file: Path, transport: Transport, *, resume: bool, report: Callable[[str, Mapping[str, Any]], None]
) -> None:
    name = load_plan(plan_file).run.name
    report("start", {"argv": sys.argv, "resume": resume})
    if name == "quorum":
        raise QuorumNotReached("one site of two", hint="wait for the other")
    if name == "bug":
        raise ZeroDivisionError
    if name == "wait":
        time.sleep(60)
    body = blob("broadcast")
    began = time.monotonic()
    for reply in transport.exchange([Request(s, "train", body) for s in transport.sites()], deadline_s=30):
        digest = hashlib.sha256(reply.body).hexdigest()
        facts = {"site": reply.site, "error": reply.error, "sha256": digest, "seconds": time.monotonic() - began}
        report("reply", facts)
        if name == "full" and reply.error:
            raise QuorumNotReached("what the rounds say of it", hint="bring the sites back")


if __name__ == "__main__":
    sys.exit(main(serve))
