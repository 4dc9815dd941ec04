"""What a flood costs the server: real Flower processes on loopback with toy sites; the table of LOG.md.

python simulations/bench_flood.py large      a reply of 300 MiB where 19 kB are due: memory, disk, time
python simulations/bench_flood.py junk       junk bodies from 64 connections: seconds of a round, with and without
python simulations/bench_flood.py slow       240 bodies that come a byte at a time, likewise
"""

from __future__ import annotations

import argparse
import contextlib
import json
import socket
import ssl
import statistics
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "flower")]

from flower.harness import Federation, descendants, opened, toys  # noqa: E402
from flower.toy_parts import DUE  # noqa: E402

from fedlora.flower.coordinator.follow import start  # noqa: E402
from fedlora.gateway.addresses import split_address  # noqa: E402

_MIB = 1 << 20


class Watch:
    """Largest resident memory of each process of the server, and of its database, while it runs."""

    def __init__(self, federation: Federation) -> None:
        self._federation, self._over = federation, threading.Event()
        self.memory: dict[str, int] = {}
        self.disk = 0
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Watch:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            for pid, argv in descendants(self._federation.server.process.pid).items():
                name = next((n for n in ("superlink", "gateway", "server_app") if any(n in a for a in argv)), "")
                with contextlib.suppress(OSError, IndexError):
                    line = Path(f"/proc/{pid}/status").read_text().split("VmRSS:")[1]
                    self.memory[name] = max(self.memory.get(name, 0), int(line.split()[0]) * 1024)
            self.disk = max(self.disk, database(self._federation))


def database(federation: Federation) -> int:
    """Bytes of the relay's database on the disk, its log included."""
    return sum(p.stat().st_size for p in (federation.home / "flower").glob("state.db*"))


def rounds(federation: Federation, asked: list[dict[str, int]], name: str) -> tuple[list[float], list[dict[str, object]]]:
    """Seconds of each round, and the replies, in which each site sends so many bytes."""
    plan = federation.plan(name)
    plan.with_suffix(".json").write_text(json.dumps(asked))
    events: list[tuple[str, dict[str, Any]]] = []
    start(federation.home, plan, resume=False, report=lambda e, f: events.append((e, dict(f))))
    return [f["seconds"] for f in toys(events, "exchange")], toys(events, "reply")


def large(federation: Federation) -> None:
    small = {"alpha": DUE, "beta": DUE}
    rounds(federation, [small], "rounds-warm")
    before = database(federation)
    with Watch(federation) as watch:
        took, replies = rounds(federation, [small, {**small, "alpha": 300 * _MIB}, small], "rounds-large")
    print("seconds of three rounds, the second with the large reply:", [f"{s:.1f}" for s in took])
    print("its answers:", [f for f in replies if f["round"] == 1])
    print("memory, MiB:", {name: round(n / _MIB) for name, n in watch.memory.items() if name})
    time.sleep(12)
    print(f"database, MiB: before {before / _MIB:.1f}, most {watch.disk / _MIB:.1f}, after {database(federation) / _MIB:.1f}")


def _context(federation: Federation) -> ssl.SSLContext:
    context = ssl.create_default_context(cafile=str(federation.home / "tls" / "ca.crt"))
    context.check_hostname = False
    return context


@contextlib.contextmanager
def flood(federation: Federation, connections: int, one: Callable[[ssl.SSLSocket], bool]) -> Iterator[list[int]]:
    """``one`` on each of so many connections again and again, on a new one if it says so, until the block ends; counted."""
    over, counts, context, address = threading.Event(), [0] * connections, _context(federation), split_address(federation.listen)

    def work(i: int) -> None:
        while not over.is_set():
            with contextlib.suppress(OSError), context.wrap_socket(socket.create_connection(address, timeout=10)) as t:
                again = True
                while again and not over.is_set():
                    again = one(t)
                    counts[i] += 1

    threads = [threading.Thread(target=work, args=(i,), daemon=True) for i in range(connections)]
    for thread in threads:
        thread.start()
    try:
        yield counts
    finally:
        over.set()


def rude(t: ssl.SSLSocket) -> bool:
    """A kilobyte of nothing, and gone."""
    body = b"\xff" * 1000
    t.sendall(b"POST /v1/fleet/pull-messages HTTP/1.1\r\nHost: x\r\nContent-Type: application/protobuf\r\n"
              b"Content-Length: %d\r\n\r\n" % len(body) + body)  # fmt: skip
    return False


def junk(t: ssl.SSLSocket) -> bool:
    """The same; the answer is waited for, and the connection kept if the server does."""
    rude(t)
    answer = t.recv(65536)
    return bool(answer) and b"connection: close" not in answer.lower()


def slow(t: ssl.SSLSocket) -> bool:
    """A body of which a byte comes each second."""
    t.sendall(b"POST /v1/fleet/push-object HTTP/1.1\r\nHost: x\r\nContent-Length: 100000\r\n\r\n")
    while True:
        t.sendall(b"x")
        time.sleep(1)


def flooded(federation: Federation, connections: int, one: Callable[[ssl.SSLSocket], bool]) -> None:
    asked = [{"alpha": DUE, "beta": DUE}] * 12
    quiet, _ = rounds(federation, asked, "rounds-quiet")
    with flood(federation, connections, one) as counts:
        time.sleep(2)
        began, before = time.monotonic(), sum(counts)
        busy, replies = rounds(federation, asked, "rounds-busy")
        rate = (sum(counts) - before) / (time.monotonic() - began)
    print(f"median seconds of a round: {statistics.median(quiet):.2f} without, {statistics.median(busy):.2f} with; "
          f"{rate:.0f} calls/s made; errors: {sorted({str(f['error']) for f in replies} - {''})}")  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["large", "junk", "rude", "slow"])
    what = parser.parse_args().what
    with tempfile.TemporaryDirectory() as root, opened(Path(root)) as federation:
        if what == "large":
            large(federation)
        elif what in ("junk", "rude"):
            flooded(federation, 64, junk if what == "junk" else rude)
        else:
            flooded(federation, 240, slow)


if __name__ == "__main__":
    main()
