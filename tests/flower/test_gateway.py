"""The gateway as a process, in front of an upstream that notes what reaches it."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import signal
import socket
import ssl
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import httpx
import pytest
from flower.harness import environment, until
from flower.signed import Node, announcement, pulled
from raising import raising

from fedlora.core.errors import ConnectionFailed
from fedlora.flower import launch
from fedlora.gateway.allowance import Allowance
from fedlora.gateway.app import upstream_client
from fedlora.gateway.bodies import end_to_end
from fedlora.gateway.certificates import make_tls
from fedlora.gateway.exposure import FORBIDDEN, check_public, free_port, healthy, public_status
from fedlora.processes.parent import die_with_parent

pytestmark = pytest.mark.flower
LIMIT = 300_000
TIMEOUT_S = 2.0
CALL = "/v1/fleet/push-object"
ANNOUNCE = "/v1/fleet/push-messages"


@dataclass
class Upstream:
    """Echoes; ``seen`` has (method, path, headers, body length)."""

    port: int
    seen: list[tuple[str, str, dict[str, str], int]] = field(default_factory=list)
    received: int = 0
    first_chunk_read: threading.Event = field(default_factory=threading.Event)


@dataclass
class Place:
    address: tuple[str, int]
    tls: Path
    upstream: Upstream
    log: Path
    pid: int
    home: Path
    node: Node

    def peak_bytes(self) -> int:
        """Most memory that the gateway ever held."""
        (line,) = [row for row in Path(f"/proc/{self.pid}/status").read_text().splitlines() if row.startswith("VmHWM")]
        return int(line.split()[1]) * 1024

    def connect(self) -> http.client.HTTPSConnection:
        context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
        return http.client.HTTPSConnection(*self.address, context=context, timeout=10)

    def call(self, path: str, body: bytes = b"", **more: str) -> tuple[int, bytes]:
        """A site's call: status and body of the answer."""
        connection = self.connect()
        connection.request("POST", path, body=body, headers={**self.node.headers(path, body), **more})
        answer = connection.getresponse()
        found = answer.status, answer.read()
        connection.close()
        return found

    def announce(self, node: Node) -> None:
        """A site's calls before the parts of a reply, once the gateway knows it."""
        for path, body in (("/v1/fleet/pull-messages", pulled()), (ANNOUNCE, announcement().SerializeToString())):
            connection = self.connect()
            connection.request("POST", path, body=body, headers=node.headers(path, body))
            assert connection.getresponse().status == 200
            connection.close()

    def unsigned(self, path: str) -> int:
        """Anybody's call: the status of the answer."""
        context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
        connection = http.client.HTTPSConnection(*self.address, context=context, timeout=50)
        connection.request("POST", path, body=b"")
        found = connection.getresponse().status
        connection.close()
        return found

    def raw(self, request: bytes) -> bytes:
        """Everything that comes back to these very bytes."""
        context = ssl.create_default_context(cafile=str(self.tls / "ca.crt"))
        with socket.create_connection(self.address, timeout=10) as s, context.wrap_socket(s, server_hostname="localhost") as t:
            t.sendall(request)
            t.settimeout(1.0)
            answer = b""
            try:
                while part := t.recv(65536):
                    answer += part
            except TimeoutError:
                pass
            return answer


def serve(upstream: Upstream, tls: Path) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def body(self) -> bytes:
            if "content-length" in self.headers:
                return self.rfile.read(int(self.headers["content-length"]))
            found = b""
            while "transfer-encoding" in self.headers and (size := int(self.rfile.readline() or b"0", 16)):
                found += self.rfile.read(size)
                upstream.received += size
                self.rfile.readline()
            return found

        def do_GET(self) -> None:
            body = self.body()
            headers = {k.lower(): v for k, v in self.headers.items()}
            upstream.seen.append((self.command, self.path, headers, len(body)))
            if self.path.endswith("get-run"):
                time.sleep(2 * TIMEOUT_S)
            if self.path.endswith("pull-object"):
                self.stream()
                return
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Connection", "X-Hop")
            self.send_header("X-Hop", "1")
            self.send_header("X-End", "2")
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def stream(self) -> None:
            self.send_response(200)
            self.send_header("Content-Length", "10")
            self.end_headers()
            self.wfile.write(b"first")
            self.wfile.flush()
            upstream.first_chunk_read.wait(TIMEOUT_S)
            self.wfile.write(b"later" if upstream.first_chunk_read.is_set() else b"early")

        def log_message(self, *args: object) -> None:
            return

    server = ThreadingHTTPServer(("127.0.0.1", upstream.port), Handler)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tls / "server.crt", tls / "server.key")
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@contextlib.contextmanager
def opened(home: Path, *, strangers: int, limit: int = LIMIT, timeout_s: float = TIMEOUT_S) -> Iterator[Place]:
    """A gateway whose one site, alpha, may push as much as it likes."""
    root = home / "tls"
    make_tls(root, [])
    for part in ("sites", "flower"):
        (home / part).mkdir()
    node = Node(home, "alpha", home=home)
    Allowance(home / "flower").grant({"alpha": 1 << 30})
    upstream = Upstream(free_port())
    server = serve(upstream, root)
    port, parent = free_port(), os.getpid()
    argv = launch.gateway(
        f"127.0.0.1:{port}",
        superlink_port=upstream.port,
        home=home,
        body_limit_bytes=limit,
        timeout_s=timeout_s,
        strangers=strangers,
    )
    with (root / "log").open("wb") as log:
        process = subprocess.Popen(
            argv,
            env=environment(root / "audit"),
            stderr=log,
            preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent),
        )
    try:
        until(lambda: healthy(("127.0.0.1", port), ca=root / "ca.crt"))
        place = Place(("127.0.0.1", port), root, upstream, root / "log", process.pid, home, node)
        place.announce(node)
        yield place
    finally:
        process.kill()
        process.wait()
        server.shutdown()
        server.server_close()


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with opened(tmp_path_factory.mktemp("gateway"), strangers=4) as found:
        yield found


@pytest.mark.parametrize(
    "path",
    [
        *FORBIDDEN,
        "/",
        "/v1/fleet",
        "/v1/fleet/",
        "/v1/fleet/pull-messages/",
        "/v1/fleet/pull-messages?x=1",
        "/v1/fleet/pull-messages;x",
        "/v1/fleet/./pull-messages",
        "/v1/fleet/pull%2Dmessages",
        "/v1/FLEET/pull-messages",
        "/V1/fleet/pull-messages",
        "/v1/fleet/\\..\\control/list-nodes",
        "/v1/fleet/%252e%252e/control/list-nodes",
        "/health/../v1/control/list-nodes",
        "https://127.0.0.1/v1/control/list-nodes",
    ],
)
def test_no_other_path_gets_through_however_it_is_written(place, path):
    before = len(place.upstream.seen)
    assert public_status("POST", path, address=place.address, ca=place.tls / "ca.crt") in (400, 404)
    assert len(place.upstream.seen) == before


@pytest.mark.parametrize(
    ("method", "path"), [("GET", CALL), ("PUT", CALL), ("POST", "/health"), ("DELETE", "/health"), ("OPTIONS", CALL)]
)
def test_no_other_method_gets_through(place, method, path):
    before = len(place.upstream.seen)
    assert public_status(method, path, address=place.address, ca=place.tls / "ca.crt") == 404
    assert len(place.upstream.seen) == before


def test_what_is_refused_is_logged(place):
    public_status("POST", "/v1/control/stop-run", address=place.address, ca=place.tls / "ca.crt")
    until(lambda: "refused POST b'/v1/control/stop-run' from 127.0.0.1" in place.log.read_text())


def test_a_supernodes_call_gets_through_with_its_headers_and_body(place):
    for size in (0, 1000, LIMIT):
        body = os.urandom(size)
        headers = place.node.headers(CALL, body)
        connection = place.connect()
        connection.request("POST", CALL, body=body, headers=headers)
        answer = connection.getresponse()
        assert (answer.status, answer.read()) == (200, body)
        connection.close()
        method, path, passed, received = place.upstream.seen[-1]
        assert (method, path, received) == ("POST", CALL, size)
        assert {k: v for k, v in headers.items() if k != "fedlora-call"}.items() <= passed.items()
        assert "fedlora-call" not in passed
        assert passed["host"].startswith("127.0.0.1:")


def test_hop_by_hop_headers_end_here_both_ways(place):
    connection = place.connect()
    smuggled = {
        "Connection": "X-Secret, close",
        "X-Secret": "1",
        "X-Forwarded-For": "10.0.0.1",
        "TE": "trailers",
        "Upgrade": "h2c",
    }
    connection.request("POST", CALL, body=b"", headers={**smuggled, "X-Kept": "1", **place.node.headers(CALL)})
    answer = connection.getresponse()
    answer.read()
    headers = place.upstream.seen[-1][2]
    assert headers["x-kept"] == "1"
    assert not {"x-secret", "x-forwarded-for", "te", "upgrade"} & set(headers)
    assert answer.getheader("X-Hop") is None
    assert answer.getheader("X-End") == "2"
    connection.close()


def test_headers_that_connection_names_do_not_pass():
    headers = [(b"Connection", b"keep-alive, X-A"), (b"x-a", b"1"), (b"X-B", b"2"), (b"Host", b"h"), (b"Content-Length", b"9")]
    assert end_to_end(headers) == [(b"x-b", b"2")]


def test_two_framings_cannot_smuggle_a_second_request(place):
    before = len(place.upstream.seen)
    hidden = b"POST /v1/control/list-nodes HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n"
    head = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n"
    place.raw(head + b"Content-Length: %d\r\n\r\n0\r\n\r\n" % (5 + len(hidden)) + hidden)
    place.raw(head.replace(b"Transfer-Encoding: chunked", b"Content-Length: 0") + b"Content-Length: 5\r\n\r\n" + hidden)
    paths = {path for _, path, _, _ in place.upstream.seen[before:]}
    assert paths <= {CALL}


def test_a_body_that_says_it_is_too_large_is_refused_unread(place):
    before = len(place.upstream.seen)
    head = "".join(f"{k}: {v}\r\n" for k, v in place.node.headers(CALL).items()).encode()
    request = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: localhost\r\n%sContent-Length: %d\r\n\r\n"
    assert place.raw(request % (head, LIMIT + 1)).startswith(b"HTTP/1.1 413 ")
    assert len(place.upstream.seen) == before


def test_a_body_that_states_no_length_is_refused_unread(place):
    pieces = (bytes(65536) for _ in range(3_000))  # 200 MB
    before, peak = len(place.upstream.seen), place.peak_bytes()
    connection = place.connect()
    headers = {"Transfer-Encoding": "chunked", **place.node.headers(CALL)}
    with contextlib.suppress(OSError):  # it is cut while we still send
        connection.request("POST", CALL, body=pieces, encode_chunked=True, headers=headers)
        assert connection.getresponse().status == 411
    connection.close()
    assert len(place.upstream.seen) == before
    assert place.peak_bytes() - peak < 20 << 20


def test_a_call_that_takes_too_long_ends(place):
    assert place.call("/v1/fleet/get-run")[0] == 504  # the relay would have said 200, later


def test_an_answer_is_passed_on_while_it_comes(place):
    connection = place.connect()
    connection.request("POST", "/v1/fleet/pull-object", body=b"", headers=place.node.headers("/v1/fleet/pull-object"))
    answer = connection.getresponse()
    assert answer.read(5) == b"first"
    place.upstream.first_chunk_read.set()
    assert answer.read(5) == b"later"
    connection.close()


def test_who_says_nothing_is_cut_and_no_address_takes_all_places(place):
    context = ssl.create_default_context(cafile=str(place.tls / "ca.crt"))

    def open_and_say(words: bytes) -> ssl.SSLSocket:
        one = context.wrap_socket(socket.create_connection(place.address, timeout=40), server_hostname="localhost")
        one.sendall(words)
        return one

    def ended(one: ssl.SSLSocket) -> bool:
        with one, contextlib.suppress(ConnectionResetError):
            return one.recv(1) == b""
        return True

    silent = [open_and_say(words) for words in (b"", b"POST /v1/fleet/push-obj", b"", b"G")]  # all four places
    began = time.monotonic()
    silent.append(open_and_say(b""))  # one more: the first one gives way
    assert ended(silent.pop(0))
    assert place.call(CALL, b"a site")[0] == 200  # another one gives way to a site
    assert all(ended(one) for one in silent)
    assert time.monotonic() - began > 10  # the last ones in their time
    assert healthy(place.address, ca=place.tls / "ca.crt")


def test_the_public_port_speaks_tls_1_3_only(place):
    context = ssl.create_default_context(cafile=str(place.tls / "ca.crt"))
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    with socket.create_connection(place.address, timeout=5) as s, pytest.raises(ssl.SSLError):
        context.wrap_socket(s, server_hostname="localhost")


def test_the_gateway_believes_our_authority_only(place, tmp_path):
    make_tls(tmp_path, [])

    async def ask(ca: Path) -> int:
        async with upstream_client(place.upstream.port, ca=ca, timeout_s=5) as client:
            return (await client.get("/health")).status_code

    assert asyncio.run(ask(place.tls / "ca.crt")) == 200
    with pytest.raises(httpx.ConnectError, match="CERTIFICATE_VERIFY_FAILED"):
        asyncio.run(ask(tmp_path / "ca.crt"))


def test_the_self_check_passes_behind_the_gateway_and_fails_without_it(place):
    check_public(f"127.0.0.1:{place.address[1]}", ca=place.tls / "ca.crt")
    with raising(ConnectionFailed, code="exposed", match="list-nodes answers 200"):
        check_public(f"127.0.0.1:{place.upstream.port}", ca=place.tls / "ca.crt")
    with pytest.raises(ConnectionFailed, match="does not answer"):
        check_public(f"127.0.0.1:{free_port()}", ca=place.tls / "ca.crt")
