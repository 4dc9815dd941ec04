"""On PYTHONPATH of every process of the tests: notes each look-up or connection that would leave this host."""

import os
import sys

_OUT = os.environ.get("FEDLORA_TEST_AUDIT", "")
_LOCAL = ("127.", "::1", "localhost", "0.0.0.0")


def _hook(event: str, args: tuple) -> None:
    host = None
    if event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    elif event == "socket.getaddrinfo":
        host = args[0]
    if isinstance(host, bytes):
        host = host.decode(errors="replace")
    if host and not host.startswith(_LOCAL):
        with open(_OUT, "a") as file:
            file.write(f"{os.getpid()} {sys.argv[:1]} {event} {host}\n")


if _OUT:
    sys.addaudithook(_hook)
    with open(_OUT + ".on", "a") as on:
        on.write(f"{os.getpid()}\n")
