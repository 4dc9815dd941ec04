"""The server's process with a toy in place of the rounds: python toy_server.py HOME LISTEN."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedlora.core.events import Event, dump_facts_of
from fedlora.flower.server import up


def report(event: Event, facts: Mapping[str, Any]) -> None:
    print(json.dumps([event, dump_facts_of(event, facts)]), flush=True)


if __name__ == "__main__":
    executor = [sys.executable, str(Path(__file__).with_name("toy_executor.py"))]
    up(
        Path(sys.argv[1]),
        listen=sys.argv[2],
        body_limit_bytes=8 << 20,
        report=report,
        hosts=["localhost"],
        executor=executor,
        monitor=0,
    )
