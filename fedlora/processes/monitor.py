"""What monitoring asks a process over loopback: plain HTTP to 127.0.0.1, without a password, and nothing can be changed by it."""

from __future__ import annotations

import os
import re
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Final

from fedlora.core.errors import ConfigError, FedLoRAError
from fedlora.core.events import Event, Report
from fedlora.core.facts import Process

TEXT: Final = "text/plain; charset=utf-8"
EXPOSITION: Final = "text/plain; version=0.0.4; charset=utf-8"
"""Prometheus' text format 0.0.4."""
STALE_S: Final = 30.0
"""A process that has not looked around for so long should be restarted."""

_LOOPBACK = "127.0.0.1"
_HOSTS = re.compile(r"(127\.0\.0\.1|localhost)(:\d{1,5})?")

Answer = Callable[[str], tuple[int, str, str]]
"""Path -> status, content type and body."""


def probed(path: str, *, healthz: Callable[[], str], readyz: Callable[[], str]) -> tuple[int, str, str] | None:
    """Answers the two probes; None for another path.

    Args:
        healthz: empty: it works. Else what is wrong: it should be restarted.
        readyz: empty: it can do its work now. Else why not.
    """
    if path not in ("/healthz", "/readyz"):
        return None
    wrong = healthz() if path == "/healthz" else readyz()
    return (503, TEXT, f"{wrong}\n") if wrong else (200, TEXT, "ok\n")


def metric(name: str, text: str, values: Mapping[str, float]) -> list[str]:
    """The lines of a gauge. ``values``: labels, of :func:`labels`, or empty -> value."""
    return [f"# HELP {name} {text}", f"# TYPE {name} gauge", *(f"{name}{inside} {value:g}" for inside, value in values.items())]


def labels(**given: str) -> str:
    """Names and values as they stand behind a metric's name."""
    inside = ",".join(f'{k}="{v.translate(_ESCAPED)}"' for k, v in given.items())
    return f"{{{inside}}}"


_ESCAPED = str.maketrans({"\\": "\\\\", '"': '\\"', "\n": "\\n"})


@contextmanager
def monitored(answer: Answer, port: int | None, report: Report) -> Iterator[None]:
    """Answers monitoring meanwhile, if a port is given, and says where.

    Raises:
        ConfigError: the port is taken.
    """
    if port is None:
        yield
        return
    with answering(answer, port) as at:
        report(Event.PROCESS, Process(name="monitor", state=f"answers at http://{_LOOPBACK}:{at}/"))
        yield


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A caller that hangs up is nobody's fault; of anything else socketserver prints the traceback."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)  # type: ignore[arg-type]


@contextmanager
def answering(answer: Answer, port: int) -> Iterator[int]:
    """Answers on loopback while inside, in threads of its own; yields the port.

    Args:
        port: 0: any free one.

    Raises:
        ConfigError: the port is taken.
    """

    class Handler(BaseHTTPRequestHandler):
        timeout = 10

        def do_GET(self) -> None:
            if not _HOSTS.fullmatch(self.headers.get("Host", "")):  # another page in a browser of this host, under its own name
                status, kind, body = 403, TEXT, "only as 127.0.0.1 or localhost\n"
            else:
                try:
                    status, kind, body = answer(self.path)
                except (FedLoRAError, OSError) as e:
                    status, kind, body = 503, TEXT, f"{type(e).__name__}\n"
            blob = body.encode("utf-8", "replace")
            self.send_response(status)
            for name, value in (("Content-Type", kind), ("Content-Length", str(len(blob))), ("Cache-Control", "no-store")):
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(blob)

        def log_message(self, format: str, *args: object) -> None:
            """Nothing is printed for a request."""

    try:
        server = _Server((_LOOPBACK, port), Handler)
    except OSError as e:
        raise ConfigError(
            f"cannot listen on {_LOOPBACK}:{port}: {os.strerror(e.errno or 0)}", hint="choose another port"
        ) from None
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
