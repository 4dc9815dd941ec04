"""Floods: the gateway as a process in front of an upstream that counts, then the whole server while rounds go on."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import ssl
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from flower.harness import Federation, descendants, toys
from flower.harness import opened as federation_of
from flower.signed import Node
from flower.test_gateway import CALL, Place, opened
from flower.toy_parts import DUE

from fedlora.flower.coordinator.follow import start
from fedlora.gateway.addresses import split_address
from fedlora.gateway.allowance import Allowance

pytestmark = pytest.mark.flower

JUNK = b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n\r\n" + b"\xff" * 1000
SLOW = b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n"
MIB = 1 << 20


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    with opened(tmp_path_factory.mktemp("wide"), strangers=256, limit=8 * MIB, timeout_s=20.0) as found:
        yield found


def send_junk(t: ssl.SSLSocket) -> None:
    t.sendall(JUNK)
    t.recv(65536)


def send_and_leave(t: ssl.SSLSocket) -> None:
    t.sendall(JUNK)


def send_slowly(t: ssl.SSLSocket) -> None:
    t.sendall(SLOW)
    while True:
        t.sendall(b"x")
        time.sleep(0.5)


@contextlib.contextmanager
def flood(address: tuple[str, int], ca: Path, *, connections: int, one: Callable[[ssl.SSLSocket], None]) -> Iterator[list[int]]:
    """``one`` on each of so many connections, anew whenever it is cut; yields how often each was."""
    over, counts, context = threading.Event(), [0] * connections, ssl.create_default_context(cafile=str(ca))

    def work(i: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError):
                raw = socket.create_connection(address, timeout=20)
                with context.wrap_socket(raw, server_hostname="localhost") as t:
                    one(t)
            counts[i] += 1

    for i in range(connections):
        threading.Thread(target=work, args=(i,), daemon=True).start()
    try:
        yield counts
    finally:
        over.set()


def timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds, and what came."""
    began = time.monotonic()
    found = work()
    return time.monotonic() - began, found


@pytest.mark.attack(
    "B12",
    "1000 junk calls a second from 64 connections of a site's own address",
    stops="unsigned calls are answered from their head (to join: 4 KiB), the later the more; the SuperLink hears of none",
)
@pytest.mark.parametrize(("one", "most"), [(send_junk, 30), (send_and_leave, 150)])  # 20 answers, 100 handshakes a second
def test_junk_costs_the_superlink_nothing_and_a_sites_call_no_wait(wide, one, most):
    with flood(wide.address, wide.tls / "ca.crt", connections=64, one=one) as counts:
        time.sleep(3)
        before, seen, began = sum(counts), len(wide.upstream.seen), time.monotonic()
        with ThreadPoolExecutor(1) as pool:
            stranger = pool.submit(timed, lambda: wide.unsigned(CALL))
            took = [timed(lambda: wide.call(CALL, b"a site's")) for _ in range(20)]
            waited, said = stranger.result()
        rate = (sum(counts) - before) / (time.monotonic() - began)
    assert [answer for _, answer in took] == [(200, b"a site's")] * 20
    assert len(wide.upstream.seen) == seen + 20
    assert rate < most  # a slow machine has fewer
    assert said == 401
    assert statistics.median(seconds for seconds, _ in took) < waited  # however busy the machine is


@pytest.mark.attack(
    "B15",
    "240 bodies that come a byte at a time, from a stranger",
    stops="a stranger's body is not read, but for a request to join (4 KiB, ten seconds); its connection is one that gives way",
)
def test_slow_bodies_of_strangers_hold_nothing_of_the_superlink_and_no_place_of_a_site(wide):
    with flood(wide.address, wide.tls / "ca.crt", connections=240, one=send_slowly):
        time.sleep(3)
        seen = len(wide.upstream.seen)
        for _ in range(10):
            assert wide.call(CALL, b"a site's") == (200, b"a site's")
        assert len(wide.upstream.seen) == seen + 10


@pytest.mark.attack(
    "B15",
    "the same from an enrolled site, with signed heads",
    stops="a body has to bring 4 KiB a second after its first ten; the SuperLink hears of a call when its body is whole or large",
)
def test_a_sites_body_that_does_not_come_is_ended(wide):
    seen, began = len(wide.upstream.seen), time.monotonic()
    head = "".join(f"{k}: {v}\r\n" for k, v in wide.node.headers(CALL, bytes(50_000)).items())
    context = ssl.create_default_context(cafile=str(wide.tls / "ca.crt"))
    with context.wrap_socket(socket.create_connection(wide.address), server_hostname="localhost") as t:
        t.sendall(f"POST {CALL} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: 50000\r\n\r\n".encode())
        t.settimeout(0.25)
        answer = b""
        while not answer:
            t.sendall(b"\0" * 100)
            with contextlib.suppress(TimeoutError):
                answer = t.recv(65536)
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert time.monotonic() - began > 9
    assert len(wide.upstream.seen) == seen


@pytest.mark.attack(
    "B17",
    "the head of a site's call is sent with another body",
    stops="the gateway compares the body with what was signed, and never passes the last piece of another one on",
)
@pytest.mark.parametrize("size", [1, 1000, 65_536, 65_537, 5 * MIB])
def test_another_body_never_reaches_the_superlink_whole(wide, size):
    body = os.urandom(size)
    other = body[:-1] + bytes([body[-1] ^ 1])
    seen = len(wide.upstream.seen)
    connection = wide.connect()
    with contextlib.suppress(ConnectionError, http.client.HTTPException):
        connection.request("POST", CALL, body=other, headers=wide.node.headers(CALL, body))
        assert connection.getresponse().status == 401
    connection.close()
    assert not any(length == size for _, _, _, length in wide.upstream.seen[seen:])
    assert wide.call(CALL, body)[1] == body


FRAMINGS = (
    "Content-Length: {n}\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked\r\nContent-Length: {n}",
    "Content-Length: {n}\r\ntransfer-encoding:  Chunked",
    "Content-Length: 7\r\nTransfer-Encoding: chunked",
    "Transfer-Encoding: chunked",
    "Content-Length: {n}\r\nContent-Length: 7",
    "Content-Length: +{n}",
)


@pytest.mark.attack(
    "B17",
    "the same, framed twice: a stated length, and chunks beyond it, so that the relay has its body whole",
    stops="a body is framed by one stated length or refused, and ends where that does",
)
@pytest.mark.attack(
    "D3",
    "a site states 100 bytes and sends 100 MiB in chunks",
    stops="the same",
)
@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("size", [1000, 70_000])
def test_a_body_has_one_framing(wide, framing, size):
    other = b"EVIL" * (size // 4)
    seen = len(wide.upstream.seen)
    head = "".join(f"{k}: {v}\r\n" for k, v in wide.node.headers(CALL, b"genuine").items())
    request = f"POST {CALL} HTTP/1.1\r\nHost: x\r\n{head}{framing.format(n=size)}\r\n\r\n".encode()
    with contextlib.suppress(OSError):
        answer = wide.raw(request + b"%x\r\n" % size + other + b"\r\n1\r\n!\r\n0\r\n\r\n")
        assert answer.split()[1] in (b"400", b"411", b"413")
    assert len(wide.upstream.seen) == seen


def test_a_body_beyond_what_is_due_is_refused_unread(wide, tmp_path):
    node = Node(tmp_path, "little", home=wide.home)
    Allowance(wide.home / "flower").grant({"alpha": 1 << 30, "little": DUE})
    time.sleep(1.2)  # until the gateway has read the key
    wide.announce(node)
    seen, connection = len(wide.upstream.seen), wide.connect()
    head = "".join(f"{k}: {v}\r\n" for k, v in node.headers(CALL, bytes(2 * MIB)).items())
    answer = wide.raw(f"POST {CALL} HTTP/1.1\r\nHost: x\r\n{head}Content-Length: {2 * MIB}\r\n\r\n".encode())
    assert answer.startswith(b"HTTP/1.1 413 ")
    assert len(wide.upstream.seen) == seen
    body = bytes(DUE)
    connection.request("POST", CALL, body=body, headers=node.headers(CALL, body))
    assert connection.getresponse().status == 200
    connection.close()


def test_the_very_same_call_counts_once(wide):
    headers = wide.node.headers(CALL, b"once")
    assert wide.call(CALL, b"once", **headers)[0] == 200
    seen = len(wide.upstream.seen)
    assert wide.call(CALL, b"once", **headers)[0] == 401
    assert len(wide.upstream.seen) == seen


def test_large_updates_and_a_hundred_sites_behind_one_address_are_not_slowed(wide, tmp_path):
    """Each site makes the calls of a session's steps at once; one pushes 200 MB; all beside a flood from the same address."""
    nodes = [Node(tmp_path, f"s{i}", home=wide.home) for i in range(100)]
    Allowance(wide.home / "flower").grant({"alpha": 220 * MIB, **{f"s{i}": 1 << 20 for i in range(100)}})
    time.sleep(1.2)  # until the gateway has read the keys
    for node in [wide.node, *nodes]:
        wide.announce(node)
    context = ssl.create_default_context(cafile=str(wide.tls / "ca.crt"))

    def session(node: Node) -> list[int]:
        connection, found = http.client.HTTPSConnection(*wide.address, context=context, timeout=50), []
        for size in (2_000, 184_000, 1_000, 1_000, 10_000):
            body = os.urandom(size)
            connection.request("POST", CALL, body=body, headers=node.headers(CALL, body))
            answer = connection.getresponse()
            found.append(answer.status if answer.read() == body else 0)
        connection.close()
        return found

    with flood(wide.address, wide.tls / "ca.crt", connections=16, one=send_junk), ThreadPoolExecutor(24) as pool:
        sites = [pool.submit(session, node) for node in nodes]
        large = [wide.call(CALL, os.urandom(5 * MIB))[0] for _ in range(40)]
        assert [site.result() for site in sites] == [[200] * 5] * 100
    assert large == [200] * 40


# --- the whole server -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    with federation_of(tmp_path_factory.mktemp("flood")) as found:
        yield found


def rounds(server: Federation, name: str, asked: list[dict[str, int]]) -> tuple[list[float], list[tuple[int, str, str]]]:
    """Seconds of each exchange, and (exchange, site, error) of each reply."""
    import json

    plan = server.plan(name)
    plan.with_suffix(".json").write_text(json.dumps(asked))
    events: list[tuple[str, Any]] = []
    start(server.home, plan, resume=False, report=lambda e, f: events.append((e, f)))
    took = [f["seconds"] for f in toys(events, "exchange")]
    return took, sorted((f["round"], f["site"], f["error"]) for f in toys(events, "reply"))


def memory(server: Federation, word: str) -> int:
    """Most bytes that the process with this word in its command line has ever held."""
    (pid,) = [p for p, argv in descendants(server.server.process.pid).items() if any(word in a for a in argv)]
    (line,) = [row for row in Path(f"/proc/{pid}/status").read_text().splitlines() if row.startswith("VmHWM")]
    return int(line.split()[1]) * 1024


SMALL = {"alpha": DUE, "beta": DUE}


@pytest.mark.attack(
    "D3",
    "a site answers with 64 MiB where 19 kB are due",
    stops="oversized at once, by the number of its parts; the relay stores none of it and the others count",
)
@pytest.mark.parametrize("size", [64 * MIB, *(pytest.param(n, marks=pytest.mark.long) for n in (2 * MIB, 500_000))])
def test_a_long_reply_is_refused_by_its_length_and_stored_nowhere(server, size):
    rounds(server, f"rounds-warm-{size}", [SMALL])
    relay = memory(server, ".superlink")
    took, replies = rounds(server, f"rounds-long-{size}", [{**SMALL, "alpha": size}, SMALL, SMALL])
    assert [r for r in replies if r[1] == "beta"] == [(n, "beta", "") for n in range(3)]
    alpha = [error for _, site, error in replies if site == "alpha"]  # what it still pushes may cost it the next one, too
    assert (alpha[0], alpha[2]) == ("oversized", "")
    assert max(took) < 50
    assert memory(server, ".superlink") - relay < 8 * MIB
    assert sum(p.stat().st_size for p in (server.home / "flower").glob("state.db*")) < 8 * MIB


@pytest.mark.long  # compares times, which a busy machine makes of
def test_rounds_go_on_beside_junk_from_the_sites_own_address(server):
    quiet, _ = rounds(server, "rounds-quiet", [SMALL] * 4)
    ca = server.home / "tls" / "ca.crt"
    with flood(split_address(server.listen), ca, connections=64, one=send_junk):
        busy, replies = rounds(server, "rounds-busy", [SMALL] * 4)
    assert {error for _, _, error in replies} == {""}
    assert len(replies) == 8
    assert statistics.median(busy) < 1.5 * statistics.median(quiet) + 1.0  # it was eight times as long


@pytest.mark.attack(
    "D3",
    "the relay's database keeps what floods and runs have left",
    stops="it is emptied and made small between runs",
)
def test_the_database_is_small_after_a_run_with_large_replies(server):
    start(server.home, server.plan("large"), resume=False, report=lambda e, f: None)  # 12 MB to both sites and from both

    def size() -> int:
        return sum(p.stat().st_size for p in (server.home / "flower").glob("state.db*"))

    end = time.monotonic() + 20
    while size() > 8 * MIB and time.monotonic() < end:
        time.sleep(0.2)
    assert size() < 8 * MIB
