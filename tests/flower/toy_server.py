"""The server's process with a toy in place of the rounds: python toy_server.py HOME LISTEN."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from fedlora.flower.server import up


def report(event: str, facts: object) -> None:
    print(json.dumps([event, facts]), flush=True)


if __name__ == "__main__":
    executor = [sys.executable, str(Path(__file__).with_name("toy_executor.py"))]
    up(Path(sys.argv[1]), listen=sys.argv[2], body_limit_bytes=8 << 20, report=report, hosts=["localhost"], executor=executor)
