"""A proxy as hospitals have it: HTTP CONNECT, and nothing else gets out."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field

import pytest


@dataclass
class Tunnel:
    """What it was asked for, and every byte that went out through it."""

    url: str
    asked: list[str] = field(default_factory=list)
    sent: bytearray = field(default_factory=bytearray)


@contextlib.contextmanager
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Tunnel]:
    """Serves, and stands in HTTPS_PROXY, while inside. Servers on 127.0.0.2 are behind it; 127.0.0.1 is never asked for."""
    door = socket.create_server(("127.0.0.1", 0))
    found = Tunnel(f"http://127.0.0.1:{door.getsockname()[1]}")

    def pump(a: socket.socket, b: socket.socket, *, note: bool) -> None:
        with contextlib.suppress(OSError):
            while data := a.recv(65536):
                if note:
                    found.sent += data
                b.sendall(data)
        for end in (a, b):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def serve() -> None:
        while True:
            try:
                client, _ = door.accept()
            except OSError:
                return
            head = client.recv(4096).decode()
            found.asked.append(head.partition("\r\n")[0])
            host, _, port = head.split()[1].rpartition(":")
            try:
                behind = socket.create_connection((host, int(port)), 10)
            except OSError:
                client.sendall(b"HTTP/1.1 502 Bad Gateway\r\n\r\n")
                client.close()
                continue
            behind.settimeout(None)
            client.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            for a, b, note in ((client, behind, True), (behind, client, False)):
                threading.Thread(target=pump, args=(a, b), kwargs={"note": note}, daemon=True).start()

    threading.Thread(target=serve, daemon=True).start()
    for name in ("https_proxy", "HTTPS_PROXY"):
        monkeypatch.setenv(name, found.url)
    for name in ("NO_PROXY", "no_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    try:
        yield found
    finally:
        door.close()
