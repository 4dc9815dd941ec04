"""On PYTHONPATH of the tests' processes: notes each look-up or connection that would leave this host, and sets a clock wrong."""

import datetime
import os
import sys
import time

_OUT = os.environ.get("FEDLORA_TEST_AUDIT", "")
_LOCAL = ("127.", "::1", "localhost", "0.0.0.0")
_SHIFT_S = float(os.environ.get("FEDLORA_TEST_CLOCK_AHEAD_S", "0"))


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

if _SHIFT_S:
    _time, _time_ns, _real = time.time, time.time_ns, datetime.datetime
    time.time = lambda: _time() + _SHIFT_S
    time.time_ns = lambda: _time_ns() + int(_SHIFT_S * 1e9)

    class _Any(type(_real)):
        def __instancecheck__(cls, value: object) -> bool:
            return isinstance(value, _real)

        def __subclasscheck__(cls, other: type) -> bool:
            return issubclass(other, _real)

    class _Shifted(_real, metaclass=_Any):
        @classmethod
        def now(cls, tz: object = None) -> object:
            return _real.now(tz) + datetime.timedelta(seconds=_SHIFT_S)

    datetime.datetime = _Shifted
