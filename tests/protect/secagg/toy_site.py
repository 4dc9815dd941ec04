"""A site's process with a toy learner, which kills itself once with -9: python toy_site.py SITE_FILE TARGET [PHASE ROUND]."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flower.harness import descendants, running, until

from fedlora.core.messages import Reply, Request
from fedlora.flower.site import up
from fedlora.formats.envelope import parse
from fedlora.formats.keys import load_identity, load_public
from fedlora.lab.testing import ToyLearner
from fedlora.site.parts import site_of
from fedlora.site.site_file import load_site_file


def say_goodbye() -> None:
    """Ends the SuperNode first, as gently as Flower wants it: otherwise Flower lets no other one in for a minute."""
    time.sleep(1)  # it has just handed the message over
    for pid in descendants(os.getpid()):
        os.kill(pid, signal.SIGTERM)
        until(lambda pid=pid: not running(pid))


def main(path: Path, target: float, phase: str = "", round: int = 0) -> None:
    file, root = load_site_file(path), path.parent
    site = site_of(
        load_identity(root / file.key),
        load_public(root / file.server_key),
        file,
        make_learner=lambda plan: ToyLearner(target),
        state=root / file.state,
        report=lambda event, facts: None,
    )
    mark = root / "killed"

    def handle(request: Request) -> Reply:
        at = parse(request.body, max_bytes=1 << 24).header.round
        print(f"{time.time():.2f} {request.phase} {at}", flush=True)
        if (request.phase, at) == (phase, round) and not mark.exists():
            mark.touch()
            say_goodbye()
            os.kill(os.getpid(), signal.SIGKILL)
        return site.handle(request)

    def report(event: str, facts: Mapping[str, Any]) -> None:
        if event == "died":
            print(f"died: {facts['doing']} {facts['cause']} (a toy)", flush=True)

    up(path, report=report, handle=handle)


if __name__ == "__main__":
    main(Path(sys.argv[1]), float(sys.argv[2]), *sys.argv[3:4], *map(int, sys.argv[4:5]))
