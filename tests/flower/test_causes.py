"""Why a site is not ready: each cause of the table with real processes and servers, said once, in one sentence, with a cure."""

from __future__ import annotations

import contextlib
import http.server
import os
import re
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from flower.harness import PATIENCE_S, ROOT, descendants, make_home, until, write_site

from fedlora.cli import main
from fedlora.core.errors import FedLoRAError
from fedlora.core.messages import Reply, Request
from fedlora.core.toml import dump_toml
from fedlora.flower import launch
from fedlora.flower.enrol import make_server_home, make_site_keys
from fedlora.flower.site import up
from fedlora.formats.state.lock import hold
from fedlora.gateway.addresses import split_address
from fedlora.gateway.certificates import make_node_key, make_tls
from fedlora.gateway.exposure import free_port
from fedlora.processes.causes import CAUSES, telling
from fedlora.processes.parent import die_with_parent
from fedlora.site.site_file import SiteFile, load_site_file

pytestmark = pytest.mark.flower
NOW = datetime.now(UTC)


# --- a site that runs in this process, with a real SuperNode ------------------------------------------------------


@dataclass
class Running:
    """What a `site up` says; ended with the test."""

    events: list[tuple[str, dict[str, Any]]] = field(default_factory=list)
    failed: list[FedLoRAError] = field(default_factory=list)

    def site(self) -> list[dict[str, Any]]:
        return [f for e, f in self.events if e == "site"]

    def wait(self, test: Callable[[dict[str, Any]], bool], *, timeout_s: float = PATIENCE_S) -> dict[str, Any]:
        """The first thing said of the site that passes."""
        end = time.monotonic() + timeout_s
        while True:
            for facts in self.site():
                if test(facts):
                    return facts
            assert not self.failed, self.failed
            assert time.monotonic() < end, self.events
            time.sleep(0.05)


def echo(request: Request) -> Reply:
    return Reply(request.site, request.body)


@contextlib.contextmanager
def site_up(file: Path, handle: Callable[[Request], Reply] | None = echo) -> Iterator[Running]:
    said, stop = Running(), threading.Event()

    def run() -> None:
        try:
            up(
                file,
                report=lambda e, f: said.events.append((e, dict(f))),
                handle=handle,
                stop=stop,
                probe_s=1.0,
            )
        except FedLoRAError as e:
            said.failed.append(e)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        yield said
    finally:
        stop.set()
        thread.join()


# --- servers ------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def listening(answer: Callable[[socket.socket], None], host: str = "127.0.0.1") -> Iterator[str]:
    """A TCP server on loopback that does ``answer`` with each connection."""
    server = socket.create_server((host, 0))
    open_now: list[socket.socket] = []

    def serve() -> None:
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            open_now.append(connection)
            threading.Thread(target=quietly, args=(connection,), daemon=True).start()

    def quietly(connection: socket.socket) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            answer(connection)

    threading.Thread(target=serve, daemon=True).start()
    try:
        yield f"{host}:{server.getsockname()[1]}"
    finally:
        server.shutdown(socket.SHUT_RDWR)
        server.close()
        for connection in open_now:
            connection.close()


def tls(directory: Path, says: bytes = b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok") -> Callable[[socket.socket], None]:
    """Speaks TLS with the certificate in ``directory`` and answers each request alike."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(directory / "server.crt", directory / "server.key")

    def answer(connection: socket.socket) -> None:
        with context.wrap_socket(connection, server_side=True) as secure:
            while secure.recv(65536):
                secure.sendall(says)

    return answer


class _Plain(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


@dataclass
class Place:
    """A server's certificates, and a site that trusts them."""

    root: Path
    home: Path

    @property
    def tls(self) -> Path:
        return self.home / "tls"

    def site(self, server: str, name: str = "alpha") -> Path:
        path, line = write_site(self.root / name, name, home=self.home, listen=server)
        (self.home / "sites" / f"{name}.pub").write_text(f"identity\n{line}\n")  # so that nothing but the cause is amiss
        return path


@pytest.fixture
def place(tmp_path: Path) -> Place:
    found = Place(tmp_path, tmp_path / "home")
    make_home(found.home)
    return found


# Each sets a server up and gives its address; the certificates are those of ``place`` unless it makes others.


@contextlib.contextmanager
def wrong_ca(place: Place) -> Iterator[str]:
    make_tls(place.root / "other", ["localhost"])
    with listening(tls(place.root / "other")) as server:
        yield server


@contextlib.contextmanager
def expired(place: Place) -> Iterator[str]:
    make_tls(place.tls, ["localhost"], valid_days=10, now=NOW - timedelta(days=30))  # the authority stays
    with listening(tls(place.tls)) as server:
        yield server


@contextlib.contextmanager
def not_yet_valid(place: Place) -> Iterator[str]:
    make_tls(place.tls, ["localhost"], now=NOW + timedelta(days=30))
    with listening(tls(place.tls)) as server:
        yield server


@contextlib.contextmanager
def wrong_host(place: Place) -> Iterator[str]:
    with listening(tls(place.tls), "127.0.0.2") as server:
        yield server


@contextlib.contextmanager
def plain_http(place: Place) -> Iterator[str]:
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Plain)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@contextlib.contextmanager
def ssh(place: Place) -> Iterator[str]:
    with listening(lambda s: s.sendall(b"SSH-2.0-OpenSSH_9.6\r\n")) as server:
        yield server


@contextlib.contextmanager
def no_name(place: Place) -> Iterator[str]:
    yield "no-such-host.invalid:8443"


@contextlib.contextmanager
def port_closed(place: Place) -> Iterator[str]:
    yield f"127.0.0.1:{free_port()}"


@contextlib.contextmanager
def silent(place: Place) -> Iterator[str]:
    with listening(lambda s: time.sleep(30)) as server:
        yield server


@contextlib.contextmanager
def silent_after_tls(place: Place) -> Iterator[str]:
    with listening(tls(place.tls, says=b"")) as server:
        yield server


@contextlib.contextmanager
def cuts(place: Place) -> Iterator[str]:
    with listening(lambda s: (s.recv(1), s.close())[1]) as server:
        yield server


@contextlib.contextmanager
def other_web_server(place: Place) -> Iterator[str]:
    with listening(tls(place.tls)) as server:
        yield server


@contextlib.contextmanager
def other_protocol(place: Place) -> Iterator[str]:
    with listening(tls(place.tls, says=b"220 mail ready\r\n")) as server:
        yield server


@contextlib.contextmanager
def no_relay(place: Place) -> Iterator[str]:
    """The real gateway, with no SuperLink behind it."""
    listen, parent = f"127.0.0.1:{free_port()}", os.getpid()
    argv = launch.gateway(
        listen, superlink_port=free_port(), home=place.home, body_limit_bytes=1 << 20, timeout_s=5, strangers=16
    )
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    gateway = subprocess.Popen(
        argv, env=env, stderr=subprocess.DEVNULL, preexec_fn=lambda: die_with_parent(signal.SIGKILL, parent=parent)
    )
    until(lambda: socket.socket().connect_ex(split_address(listen)) == 0)
    yield listen
    gateway.kill()
    gateway.wait()


@contextlib.contextmanager
def proxied(url: str) -> Iterator[None]:
    """Gone with the test: the next one in this process would go there."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HTTPS_PROXY", url)
        yield


@contextlib.contextmanager
def proxy_away(place: Place) -> Iterator[str]:
    with proxied(f"http://user:word@127.0.0.1:{free_port()}"):
        yield "127.0.0.2:8443"


@contextlib.contextmanager
def proxy_refuses(place: Place) -> Iterator[str]:
    with (
        listening(lambda s: (s.recv(4096), s.sendall(b"HTTP/1.1 403 Forbidden\r\n\r\n"))[1]) as proxy,
        proxied(f"http://{proxy}"),
    ):
        yield "127.0.0.2:8443"


@contextlib.contextmanager
def ca_is_no_certificate(place: Place) -> Iterator[str]:
    (place.tls / "ca.crt").write_text("-----BEGIN CERTIFICATE-----\nno\n-----END CERTIFICATE-----\n")
    yield f"127.0.0.1:{free_port()}"


@pytest.mark.parametrize(
    ("server", "cause", "words"),
    [
        pytest.param(
            wrong_ca,
            "wrong-ca",
            ["not issued by the authority in", "ca.crt"],
            id="wrong CA",
            marks=pytest.mark.fault("E30.01", "the ca.crt of another server", says="whose certificate it is not, by which file"),
        ),
        pytest.param(
            expired,
            "expired",
            [(NOW - timedelta(days=20)).date().isoformat(), "clock"],
            id="expired",
            marks=pytest.mark.fault(
                "E30.02", "the server's certificate has expired", says="both dates; the coordinator makes a new one"
            ),
        ),
        pytest.param(
            not_yet_valid,
            "not-yet-valid",
            [(NOW + timedelta(days=30, hours=-1)).date().isoformat(), "NTP"],
            id="not yet valid",
            marks=pytest.mark.fault(
                "E30.03", "the server's certificate is not valid yet, by this clock", says="both dates; set the clock"
            ),
        ),
        pytest.param(
            wrong_host,
            "wrong-host",
            ["is for localhost, 127.0.0.1", "--host 127.0.0.2"],
            id="host",
            marks=pytest.mark.fault(
                "E30.04", "the certificate is for another name", says="the names that it is for, and how to add one"
            ),
        ),
        pytest.param(
            plain_http,
            "no-tls",
            ["does not use TLS"],
            id="plain HTTP",
            marks=pytest.mark.fault("E30.05", "plain HTTP on that port", says="the program that listens there does not use TLS"),
        ),
        pytest.param(ssh, "no-tls", ["does not use TLS"], id="ssh"),
        pytest.param(
            no_name,
            "no-name",
            ["no-such-host.invalid does not resolve"],
            id="no name",
            marks=pytest.mark.fault("E30.06", "the server's name does not resolve", says="which name"),
        ),
        pytest.param(
            port_closed,
            "port-closed",
            ["nothing listens there"],
            id="port closed",
            marks=pytest.mark.fault(
                "E30.07", "nothing listens at the server's address", says="it refuses connections, and the next try"
            ),
        ),
        pytest.param(
            silent,
            "no-answer",
            ["does not answer within"],
            id="silent",
            marks=pytest.mark.fault(
                "E30.08", "the server is silent, or a firewall drops packets", says="no answer within so many seconds"
            ),
        ),
        pytest.param(silent_after_tls, "no-answer", ["does not answer within"], id="silent after TLS"),
        pytest.param(
            cuts,
            "cut",
            ["is cut"],
            id="cut",
            marks=pytest.mark.fault("E30.09", "the connection is cut in the handshake", says="that it is cut"),
        ),
        pytest.param(
            other_web_server,
            "not-fedlora",
            ["answers with status 200"],
            id="other web server",
            marks=pytest.mark.fault(
                "E30.10", "something else that speaks TLS with the right certificate", says="it answers as no FedLoRA server does"
            ),
        ),
        pytest.param(other_protocol, "not-fedlora", ["in another protocol"], id="other protocol"),
        pytest.param(
            no_relay,
            "relay-down",
            ["its relay does not (status 503)"],
            id="no relay",
            marks=pytest.mark.fault("E30.11", "the gateway is there, the relay behind it is not", says="just that"),
        ),
        pytest.param(
            proxy_away,
            "proxy-away",
            ["the proxy 127.0.0.1:", "HTTPS_PROXY"],
            id="proxy away",
            marks=pytest.mark.fault(
                "E30.12", "HTTPS_PROXY is set and the proxy is away", says="the proxy's address, and what to set"
            ),
        ),
        pytest.param(
            proxy_refuses,
            "proxy-refuses",
            ["status 403"],
            id="proxy refuses",
            marks=pytest.mark.fault("E30.13", "the proxy refuses to pass the connection on", says="its status"),
        ),
        pytest.param(
            ca_is_no_certificate,
            "bad-ca",
            ["does not hold one certificate"],
            id="ca.crt is none",
            marks=pytest.mark.fault("E30.14", "ca.crt holds no certificate, or two", says="that, and who sends it"),
        ),
    ],
)
def test_what_stands_between_a_site_and_its_server_is_said_once(place, monkeypatch, server, cause, words):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy", "NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    with server(place) as address, site_up(place.site(address)) as said:
        if CAUSES[cause].lasts:  # nothing but a person changes it: the command ends, before anything is started
            until(lambda: bool(said.failed))
            ended = f"{said.failed[0]}; {said.failed[0].hint}"
            assert [word for word in words if word not in ended] == []
            assert said.failed[0].exit_status == 4
            assert "process" not in [e for e, _ in said.events]
            return
        facts = said.wait(lambda f: f["cause"] == cause)
        assert facts["part"] == CAUSES[cause].part == "server"
        for word in words:
            assert word in facts["said"], facts["said"]
        assert "word" not in facts["said"].split(), "a proxy's password is not printed"
        assert facts["state"] == "connecting"
        assert facts["next_s"] > 0
        time.sleep(1.5)  # a second probe finds the same
    assert [f["cause"] for f in said.site()].count(cause) == 1
    assert not any(f["state"] == "ready" for f in said.site())
    assert not any("ready" in f.get("state", "") for _, f in said.events)


def test_a_site_looks_for_its_server_through_the_proxy(place, monkeypatch):
    """The probe's own way through a CONNECT proxy, up to the answer of a real gateway."""
    with no_relay(place) as server:
        host, port = split_address(server)

        def pass_on(connection: socket.socket) -> None:
            head = connection.recv(4096)
            assert head.startswith(b"CONNECT 127.0.0.2:8443 HTTP/1.1"), head
            assert b"Proxy-Authorization: Basic dXNlcjp3b3Jk" in head
            connection.sendall(b"HTTP/1.1 200 OK\r\n\r\n")
            with socket.create_connection((host, port)) as behind:
                threading.Thread(target=lambda: pump(behind, connection), daemon=True).start()
                pump(connection, behind)

        def pump(a: socket.socket, b: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while data := a.recv(65536):
                    b.sendall(data)

        make_tls(place.tls, ["127.0.0.2"])
        with listening(pass_on) as proxy:
            monkeypatch.setenv("HTTPS_PROXY", f"http://user:word@{proxy}")
            monkeypatch.delenv("NO_PROXY", raising=False)
            monkeypatch.delenv("no_proxy", raising=False)
            with no_relay(place) as behind:  # again, with the new certificate
                host, port = split_address(behind)
                with site_up(place.site("127.0.0.2:8443")) as said:
                    assert "127.0.0.2:8443 answers, but its relay" in said.wait(lambda f: f["cause"] == "relay-down")["said"]


# --- what is wrong at the site itself ends the command ------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with real keys, a base and data that look right. Its server is away."""
    root = tmp_path_factory.mktemp("good")
    make_server_home(root / "home", hosts=["localhost"])
    for name in ("alpha", "beta"):
        make_site_keys(name, root / name)
    (root / "alpha" / "ca.crt").write_bytes((root / "home" / "tls" / "ca.crt").read_bytes())
    (root / "alpha" / "server.pub").write_bytes((root / "home" / "server.pub").read_bytes())
    (root / "base").mkdir()
    (root / "base" / "config.json").write_text("{}")
    (root / "base" / "model.safetensors").write_bytes(b"")
    (root / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    file = SiteFile(
        name="alpha",
        server=f"127.0.0.1:{free_port()}",
        ca="alpha/ca.crt",
        server_key="alpha/server.pub",
        key="alpha/alpha.key",
        node_key="alpha/alpha.node.key",
        models={"HuggingFaceTB/SmolLM2-135M-Instruct": "base"},
        local_port=free_port(),
        data={"path": "rows.jsonl"},
    )
    (root / "site.toml").write_text(dump_toml(file))
    return root


def changed(good: Path, old: str, new: str) -> None:
    text = (good / "site.toml").read_text()
    assert old in text
    (good / "site.toml").write_text(text.replace(old, new))


def command(file: Path, *, timeout_s: float = PATIENCE_S) -> subprocess.CompletedProcess[str]:
    """`fedlora site up`, a process of its own that ends by itself."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    argv = [sys.executable, "-m", "fedlora", "site", "up", str(file)]
    return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=timeout_s)


def tree(root: Path) -> dict[str, tuple[int, bytes]]:
    """Every file below, with its time and content."""
    return {str(p.relative_to(root)): (p.stat().st_mtime_ns, p.read_bytes()) for p in root.rglob("*") if p.is_file()}


def taken(port: int) -> socket.socket:
    """Another program on that port; a process that was killed needs a moment to leave it."""
    end = time.monotonic() + PATIENCE_S
    while True:
        try:
            return socket.create_server(("127.0.0.1", port))
        except OSError:
            assert time.monotonic() < end
            time.sleep(0.02)


@pytest.mark.parametrize(
    ("what", "status", "words"),
    [
        pytest.param(
            ("state = ", 'state = "rows.jsonl/x" #'),
            3,
            ["cannot write", "rows.jsonl/x"],
            id="state",
            marks=pytest.mark.fault(
                "E30.15", "the state directory cannot be written", says="exit status 3 and its path, before anything is started"
            ),
        ),
        pytest.param(
            ("alpha/server.pub", "alpha/none.pub"),
            3,
            ["none.pub", "hint: "],
            id="server_key missing",
            marks=pytest.mark.fault("E30.16", "server_key is missing", says="exit status 3 and which file"),
        ),
        pytest.param(
            ("alpha/alpha.key", "beta/beta.key"),
            3,
            ["key of 'beta'", "'alpha'"],
            id="key of another site",
            marks=pytest.mark.fault("E30.17", "`key` is another site's", says="exit status 3 and both names"),
        ),
        pytest.param(
            ("alpha/alpha.node.key", "beta/beta.node.key"),
            3,
            ["not the node key of alpha"],
            id="node key of another",
            marks=pytest.mark.fault(
                "E30.18", "`node_key` is another site's", says="exit status 3; until now the server took it for the other site"
            ),
        ),
        pytest.param(("alpha/alpha.node.key", "alpha/alpha.key"), 3, ["not a private node key"], id="node key is none"),
        pytest.param(("alpha/alpha.node.key", "alpha/gone.key"), 3, ["gone.key is missing"], id="node key missing"),
        pytest.param(
            ("alpha/ca.crt", "alpha/gone.crt"),
            3,
            ["gone.crt is missing", "coordinator sends ca.crt"],
            id="ca missing",
            marks=pytest.mark.fault("E30.19", "ca.crt or the node key is missing", says="exit status 3, which, and who sends it"),
        ),
    ],
)
def test_what_is_wrong_at_this_site_ends_the_command_with_its_name(good, capsys, what, status, words):
    before = (good / "site.toml").read_text()
    try:
        changed(good, *what)
        ended = main(["site", "up", str(good / "site.toml")])
    finally:
        (good / "site.toml").write_text(before)
    said = capsys.readouterr().err
    assert ended == status, said
    for word in words:
        assert word in said
    assert "ready" not in said
    assert "supernode" not in said


@pytest.mark.parametrize(
    ("what", "words"),
    [
        pytest.param(
            ('"rows.jsonl"', '"gone.jsonl"'),
            ["gone.jsonl cannot be read: No such file"],
            id="data missing",
            marks=pytest.mark.fault(
                "E30.20",
                "the data file is missing, unreadable or empty",
                says="its path; connected at best, never ready, and looked for twice a minute",
            ),
        ),
        pytest.param(('"rows.jsonl"', '"alpha"'), ["the directory holds no data file"], id="data is a directory"),
        pytest.param(('"rows.jsonl"', '"empty.jsonl"'), ["empty.jsonl has no rows"], id="data empty"),
        pytest.param(
            ('= "base"', '= "gone"'),
            ["gone is not there", "[models]"],
            id="base missing",
            marks=pytest.mark.fault(
                "E30.21",
                "the base model is missing",
                says="its path; connected at best, never ready, and looked for twice a minute",
            ),
        ),
        pytest.param(('= "base"', '= "alpha"'), ["alpha holds no config.json"], id="base is none"),
    ],
)
def test_a_base_or_data_that_are_missing_are_said_before_a_round_needs_them(good, what, words):
    before = (good / "site.toml").read_text()
    (good / "empty.jsonl").write_text("\n")
    try:
        changed(good, *what)
        with site_up(good / "site.toml", handle=None) as said:
            facts = said.wait(lambda f: f["cause"] in ("no-base", "no-data"))
    finally:
        (good / "site.toml").write_text(before)
    for word in words:
        assert word in facts["said"]
    assert not any(f["state"] == "ready" for f in said.site())


@pytest.mark.fault(
    "E16",
    "a second `site up` on one state directory",
    says="exit status 3; process, host and start of the first one; no file is touched",
)
def test_a_second_site_up_is_told_who_is_there_and_touches_nothing(good):
    before = (good / "site.toml").read_text()
    with hold(good / "state", what="fedlora site up"):
        (good / "state" / "flower").mkdir(exist_ok=True)
        (good / "state" / "flower" / "superexec.secret").write_bytes(b"of the first one")
        found = tree(good / "state")
        same = command(good / "site.toml")
        try:  # another file, with the same state and another port
            changed(good, "local_port = ", f"local_port = {free_port()} #")
            other = command(good / "site.toml")
        finally:
            (good / "site.toml").write_text(before)
        assert tree(good / "state") == found
    for done in (same, other):
        assert done.returncode == 3
        assert f"in use by `fedlora site up`, process {os.getpid()} on {os.uname().nodename}" in done.stderr
        assert "since 20" in done.stderr


@pytest.mark.fault("E30.22", "the loopback port is taken by another program", says="exit status 3, the port, and `local_port`")
def test_a_port_that_another_program_has_is_said_apart(good):
    with taken(load_site_file(good / "site.toml").local_port):
        done = command(good / "site.toml")
    assert done.returncode == 3
    assert "is taken by another program" in done.stderr
    assert "local_port" in done.stderr
    assert "in use by `fedlora" not in done.stderr


def test_two_sites_on_one_machine_need_no_setting(place, capsys):
    """Real SuperNodes, each on a port of its own that nobody chose; the server is away."""
    server, files = f"127.0.0.1:{free_port()}", []
    for name in ("alpha", "beta"):
        file = place.site(server, name)
        text, changes = re.subn(r"(?m)^local_port = .*\n", "", file.read_text())
        assert changes == 1
        file.write_text(text)
        files.append(file)

    def ports() -> list[int]:
        nodes = [argv for argv in descendants(os.getpid()).values() if "fedlora.flower.supernode" in argv]
        return [int(argv[argv.index("--port") + 1]) for argv in nodes]

    with site_up(files[0]) as one, site_up(files[1]) as other:
        until(lambda: len(ports()) == 2)
        assert len({*ports()}) == 2
        for port in ports():
            until(lambda port=port: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        for file in files:
            assert main(["site", "status", str(file)]) == 0
        assert [f["cause"] for f in one.site() + other.site() if f["cause"] == "local-port"] == []
    assert (one.failed, other.failed) == ([], [])


@pytest.mark.fault(
    "E30.23", "another program takes the loopback port while the site runs", says="said, and tried again until it is free"
)
def test_a_port_that_is_lost_on_the_way_is_said_and_tried_again(place):
    file = place.site(f"127.0.0.1:{free_port()}")
    port = load_site_file(file).local_port
    with site_up(file) as said:
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)
        (pid,) = [p for p, argv in descendants(os.getpid()).items() if "fedlora.flower.supernode" in argv and str(port) in argv]
        os.kill(pid, signal.SIGKILL)
        with taken(port):
            facts = said.wait(lambda f: f["cause"] == "local-port")
            assert (facts["part"], str(port) in facts["said"]) == ("process", True)
        until(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0)


# --- what the log says --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "told"),
    [
        (["\x1b[92mINFO \x1b[0m:      starting", "\x1b[91mERROR\x1b[0m:     no space left", "", "bye"], "no space left"),
        (["Traceback (most recent call last):", '  File "x", line 1', "ValueError: 3 is no port"], "ValueError: 3 is no port"),
        (["one", "two"], "two"),
        (["ERROR :     Exit Code: 305", "", "For more information, visit: <https://flower.ai>"], "Exit Code: 305"),
        ([], ""),
    ],
)
def test_the_line_that_matters_is_taken_from_a_log(lines, told):
    assert telling(lines) == told


def test_every_cause_has_one_sentence_and_all_its_facts():
    known = {
        "server",
        "host",
        "port",
        "ca",
        "log",
        "secret",
        "timeout",
        "proxy",
        "detail",
        "until",
        "begin",
        "today",
        "names",
    } | {"site", "words"}
    for code, cause in CAUSES.items():
        filled = cause.sentence(dict.fromkeys(known | {"seconds", "way"}, "x"))
        assert "?" not in filled, code
        assert "?" not in cause.remedy(dict.fromkeys(known, "x")), code
        assert not filled.endswith("."), code
        assert cause.part in ("process", "server", "accepted", "clock", "base", "data")
    assert len(CAUSES) >= 20


def test_a_node_key_that_flower_cannot_use_is_found_before(place):
    file = place.site("127.0.0.1:1")
    (file.parent / "node.key").unlink()
    make_node_key(file.parent / "node.key")
    (file.parent / "node.key").write_text("-----BEGIN OPENSSH PRIVATE KEY-----\nno\n-----END OPENSSH PRIVATE KEY-----\n")
    with site_up(file) as said:
        until(lambda: bool(said.failed))
    assert said.failed[0].code == "key-file"
