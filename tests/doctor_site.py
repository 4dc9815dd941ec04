"""A site on which nothing is amiss but what a test does to it, and a gateway that knows it."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import fedlora
from fedlora.core.plan import Plan
from fedlora.core.toml import dump_toml
from fedlora.flower import launch
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.formats.files import write_atomic
from fedlora.gateway.exposure import free_port
from fedlora.processes.parent import die_with_parent
from fedlora.site.site_file import SiteFile, load_site_file

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
ROOT = Path(fedlora.__file__).parents[1]


class Relay(BaseHTTPRequestHandler):
    """Healthy, and nothing else: what stands behind the gateway here."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@contextlib.contextmanager
def gateway(home: Path, *, host: str = "127.0.0.1") -> Iterator[str]:
    """The real gateway, over TLS, before a relay that is only healthy."""
    import ssl

    relay = HTTPServer(("127.0.0.1", 0), Relay)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "tls" / "server.crt", home / "tls" / "server.key")
    relay.socket = context.wrap_socket(relay.socket, server_side=True)
    threading.Thread(target=relay.serve_forever, daemon=True).start()
    listen, parent = f"{host}:{free_port()}", os.getpid()
    argv = launch.gateway(
        listen, superlink_port=relay.server_port, home=home, body_limit_bytes=1 << 20, timeout_s=5, strangers=16
    )
    child = subprocess.Popen(
        argv, env={**os.environ, "PYTHONPATH": str(ROOT)}, stderr=subprocess.DEVNULL,
        preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
    )  # fmt: skip
    host, port = listen.split(":")
    end = time.monotonic() + 60
    while socket.socket().connect_ex((host, int(port))) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        yield listen
    finally:
        child.kill()
        child.wait()
        relay.shutdown()
        relay.server_close()


def rows(number: int = 300) -> list[dict[str, str]]:
    return [{"prompt": f"question {n}:", "completion": f" answer {n}", "patient": f"p{n // 2}"} for n in range(number)]


class Place:
    """A server's directory, a site's, and its site file."""

    def __init__(self, root: Path, *, server: str = "127.0.0.1:9", base: Path | None = None) -> None:
        self.root, self.home, self.file = root, root / "home", root / "site.toml"
        root.mkdir(parents=True, exist_ok=True)
        make_server_home(self.home, hosts=["127.0.0.1"])
        for name in ("alpha", "beta"):
            make_site_keys(name, root / name)
        (root / "ca.crt").write_bytes((self.home / "tls" / "ca.crt").read_bytes())
        (root / "server.pub").write_bytes((self.home / "server.pub").read_bytes())
        (self.home / "sites" / "alpha.pub").write_bytes((root / "alpha" / "alpha.pub").read_bytes())
        self.base = base or root / "base"
        if base is None:
            self.base.mkdir()
            (self.base / "config.json").write_text("{}")
            (self.base / "model.safetensors").write_bytes(b"")
        self.write_rows(rows())
        self.settings = {
            "name": "alpha", "server": server, "ca": "ca.crt", "server_key": "server.pub", "key": "alpha/alpha.key",
            "node_key": "alpha/alpha.node.key", "models": {MODEL: str(self.base)}, "local_port": free_port(), "device": "cpu",
            "data": {"path": "rows.jsonl", "group_key": "patient"},
        }  # fmt: skip
        self.change()

    def change(self, **settings: object) -> None:
        data = {**self.settings["data"], **settings.pop("data", {})}
        self.settings |= {**settings, "data": data}
        self.file.write_text(dump_toml(SiteFile(**self.settings)))

    def write_rows(self, found: list[dict[str, str]], *more: str) -> None:
        (self.root / "rows.jsonl").write_text("".join(f"{line}\n" for line in [*map(json.dumps, found), *more]))

    def approve(self, plan: Plan, *, times: int = 1) -> Plan:
        """As `fedlora site approve` does."""
        state = self.root / load_site_file(self.file).state
        write_atomic(state / "approved" / f"{plan.digest()}.json", plan.canonical())
        self.change(plans=(*self.settings.get("plans", ()), *(plan.digest(),) * times))
        return plan
