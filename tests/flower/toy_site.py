"""A site's process whose answers are those of a toy: python toy_site.py SITE_FILE."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from pathlib import Path

from toy_parts import CANARY, blob

from fedlora.core.errors import PlanRefused
from fedlora.core.messages import Reply, Request
from fedlora.flower.site import up


def handle(request: Request) -> Reply:
    if request.phase == "train":
        return Reply(request.site, blob(f"{request.site} {hashlib.sha256(request.body).hexdigest()}"))
    if request.phase == "raise":
        raise RuntimeError(CANARY)
    if request.phase == "refuse":
        raise PlanRefused(CANARY)
    if request.phase == "chatty":
        return Reply(request.site, CANARY.encode(), error=CANARY)
    if request.phase == "sized":
        return Reply(request.site, os.urandom(int(request.body)))
    if request.phase == "slow":
        report("toy-works", {})
        time.sleep(30)
    if request.phase == "held":
        report("toy-works", {})
        while not Path(request.body.decode()).exists():
            time.sleep(0.05)
    return Reply(request.site, request.body)


def report(event: str, facts: object) -> None:
    print(json.dumps([event, facts]), flush=True)


if __name__ == "__main__":
    up(Path(sys.argv[1]), report=report, handle=handle, monitor=0 if "FEDLORA_TEST_MONITOR" in os.environ else None)
