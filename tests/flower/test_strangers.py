"""What strangers and a site that lies hold takes nothing from the other sites: the gateway as a process, and its counts alone."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import http.client
import os
import random
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from flower.signed import Node
from flower.test_gateway import Place, opened
from hypothesis import given
from hypothesis import strategies as st

from fedlora.flower.enrol import make_server_home
from fedlora.gateway.app import upstream_client
from fedlora.gateway.certificates import make_tls
from fedlora.gateway.connections import SITE_CONNECTIONS, ConnectionSlots, open_files

SLOW = "/v1/fleet/get-run"  # answered after four seconds
BEAT = "/v1/fleet/send-node-heartbeat"
FEW, MANY = 8, 256  # places of strangers


@dataclass
class Crowd:
    """A gateway with enrolled sites, and one more that lies."""

    place: Place
    nodes: list[Node]
    liar: Node
    strangers: int

    @property
    def context(self) -> ssl.SSLContext:
        return ssl.create_default_context(cafile=str(self.place.tls / "ca.crt"))

    def files(self) -> int:
        """Files that the gateway has open now."""
        return len(os.listdir(f"/proc/{self.place.pid}/fd"))


@contextlib.contextmanager
def crowd(home: Path, *, sites: int, strangers: int) -> Iterator[Crowd]:
    with opened(home, strangers=strangers, timeout_s=20.0) as place:
        nodes = [Node(home, f"s{i}", home=place.home) for i in range(sites)]
        liar = Node(home, "liar", home=place.home)
        time.sleep(1.2)  # until the gateway has read the keys
        yield Crowd(place, nodes, liar, strangers)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Crowd]:
    with crowd(tmp_path_factory.mktemp("small"), sites=16, strangers=FEW) as found:
        yield found


def ask(connection: http.client.HTTPSConnection, node: Node) -> int | str:
    """The status of a short call, or what has happened to the connection."""
    try:
        connection.request("POST", BEAT, body=b"", headers=node.headers(BEAT))
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException) as e:
        connection.close()
        return type(e).__name__
    return answer.status


class Held(contextlib.ExitStack):
    """All connections of a test, closed at its end."""

    def __init__(self, here: Crowd) -> None:
        super().__init__()
        self.here, self.context = here, here.context

    def connect(self, source: str = "127.0.0.1") -> http.client.HTTPSConnection:
        made = http.client.HTTPSConnection(*self.here.place.address, context=self.context, timeout=30, source_address=(source, 0))
        self.callback(made.close)
        return made

    def lie(self, count: int) -> None:
        """So many connections of the site that lies, each with a call that is not answered for long."""
        for _ in range(count):
            with contextlib.suppress(OSError):
                self.connect().request("POST", SLOW, body=b"", headers=self.here.liar.headers(SLOW))

    def say_nothing(self, count: int, source: str) -> None:
        """So many connections that sign nothing."""
        for _ in range(count):
            with contextlib.suppress(OSError):
                self.connect(source).connect()


def answers(here: Crowd, sites: int, *, each: int, strangers: int, liar: int, source: str) -> collections.Counter[int | str]:
    """What sites are told, on connections that they had before the others came and on new ones."""
    with Held(here) as held:
        kept = [(held.connect(), node) for node in here.nodes[:sites] for _ in range(each)]
        found = collections.Counter(ask(*one) for one in kept)
        held.lie(liar)
        held.say_nothing(strangers, source)
        assert here.files() <= open_files(len(here.nodes) + 2, strangers=here.strangers)
        found += collections.Counter(ask(*one) for one in kept[:: max(len(kept) // 64, 1)])
        kept[0][0].close()  # where a site has all that it may, one of its own gives way to a new one
        for node in here.nodes[:sites]:
            new = held.connect()
            found[ask(new, node)] += 1
            new.close()
    return found


@pytest.mark.flower
@pytest.mark.attack(
    "B12",
    "silent connections in all places of strangers, beside sites that hold theirs",
    stops="each enrolled site has eight places of its own, whatever strangers hold; no limit is over both",
)
@pytest.mark.attack(
    "B15",
    "an enrolled site that opens connections without end, each with a call that takes long",
    stops="it has eight connections and eight calls at a time; of more, its own oldest are cut, of other sites none",
)
@pytest.mark.parametrize("source", ["127.0.0.1", "127.0.0.2"], ids=["of-a-sites-address", "of-another"])
@pytest.mark.parametrize(
    ("sites", "each", "strangers", "liar"),
    [(1, 7, 20, 0), (3, SITE_CONNECTIONS - 1, 0, 0), (8, 2, 9, 0), (8, 1, 0, 40), (16, 3, 20, 20)],
)
def test_no_site_is_refused_or_cut_whatever_others_hold(small, sites, each, strangers, liar, source):
    found = answers(small, sites, each=each, strangers=strangers, liar=liar, source=source)
    assert set(found) == {200}


@pytest.mark.flower
def test_a_hundred_and_twenty_eight_sites_are_served_beside_all_that_strangers_may_hold(tmp_path):
    with crowd(tmp_path, sites=128, strangers=MANY) as here:
        found = answers(here, 128, each=2, strangers=MANY, liar=40, source="127.0.0.2")
    assert set(found) == {200}


@pytest.mark.flower
def test_a_site_that_is_enrolled_beside_a_flood_gets_in(small, tmp_path):
    with Held(small) as held:
        held.say_nothing(20, "127.0.0.2")
        node = Node(tmp_path, "late", home=small.place.home)
        time.sleep(1.2)
        assert [ask(held.connect(), node) for _ in range(SITE_CONNECTIONS)] == [200] * SITE_CONNECTIONS
        (small.place.home / "sites" / "late.pub").unlink()
        time.sleep(1.2)
        assert ask(held.connect(), node) == 401


def test_as_many_calls_are_at_the_superlink_at_a_time_as_the_sites_make(tmp_path):
    """A relay that answers none before all have come."""
    make_tls(tmp_path, [])
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "server.crt", tmp_path / "server.key")
    calls = 5 * SITE_CONNECTIONS

    async def statuses() -> set[int]:
        all_here = asyncio.Barrier(calls)

        async def relay(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            await reader.readuntil(b"\r\n\r\n")
            await all_here.wait()
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")

        server = await asyncio.start_server(relay, "127.0.0.1", 0, ssl=context)
        port = server.sockets[0].getsockname()[1]
        async with server, upstream_client(port, ca=tmp_path / "ca.crt", timeout_s=10.0) as client:
            return {answer.status_code for answer in await asyncio.gather(*(client.get("/") for _ in range(calls)))}

    assert asyncio.run(statuses()) == {200}


class Counted:
    def __init__(self) -> None:
        self.open = True

    def cut(self) -> None:
        self.open = False


@given(st.integers(0, 2**32))
def test_of_any_sequence_strangers_have_their_places_and_each_site_its_own(seed):
    """Of whom each connection is, is counted here once more, from the steps alone."""
    draw, slots, held, whose = random.Random(seed), ConnectionSlots(4), {}, {}
    for _ in range(100):
        client, what = (draw.choice("xy"), draw.randrange(40)), draw.choice(["come", "go", "a", "a", "b"])
        one = held.get(client)
        if one is None and what != "go":
            held[client] = one = Counted()
            whose[client] = ""
            slots.come(one, client)
        if what == "go" and one is not None:
            slots.go(client)
            del held[client], whose[client]
        elif one is not None and what in "ab" and whose[client] in ("", what):
            before = {c for c, w in whose.items() if w and w != what}
            slots.known(client, what)
            whose[client] = what
            assert all(held[c].open for c in before)  # a site's call costs no other site a connection
        count = collections.Counter(whose.values())
        for client in [c for c, h in held.items() if not h.open]:
            assert whose[client] == "" or count[whose[client]] > SITE_CONNECTIONS
            slots.go(client)
            del held[client], whose[client]
        left = collections.Counter(whose.values())
        assert left.pop("", 0) <= 4
        assert all(n <= SITE_CONNECTIONS for n in left.values())


def test_a_server_says_before_it_starts_that_it_could_run_out_of_open_files(tmp_path):
    home = tmp_path / "server"
    make_server_home(home, hosts=["127.0.0.1"])
    few = open_files(0, strangers=MANY) - 1
    run = subprocess.run([sys.executable, "-c", STARTED, str(home), str(few)], capture_output=True, text=True, timeout=20)
    assert run.stdout.startswith("resources: a server of 0 sites may need 640 open files at a time")
    assert not (home / "flower" / "log").exists()


STARTED = """
import resource, sys
from pathlib import Path
from fedlora.core.errors import FedLoRAError
from fedlora.flower.server import up
from fedlora.gateway.exposure import free_port
resource.setrlimit(resource.RLIMIT_NOFILE, (64, int(sys.argv[2])))
try:
    up(Path(sys.argv[1]), listen=f"127.0.0.1:{free_port()}", body_limit_bytes=1, report=print)
except FedLoRAError as e:
    print(f"{e.code}: {e}")
"""
LIMITED = """
import resource, sys
from fedlora.core.errors import ResourceError
from fedlora.processes.files import allow_open_files
soft, hard, needed, at_most = map(int, sys.argv[1:])
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
try:
    allow_open_files(needed, at_most=at_most, whose="a server of 7 sites")
except ResourceError as e:
    print(f"{e} | {e.hint}")
else:
    print(resource.getrlimit(resource.RLIMIT_NOFILE))
"""


@pytest.mark.parametrize(
    ("limits", "said"),
    [
        ((64, 512, 100, 300), "(300, 512)"),  # what may be needed later is raised at once
        ((64, 200, 100, 300), "(200, 200)"),
        ((400, 512, 100, 300), "(400, 512)"),  # never lowered
        ((64, 99, 100, 300), "a server of 7 sites may need 100 open files at a time, and this system allows 99"),
    ],
)
def test_the_limit_of_open_files_is_raised_or_what_is_missing_is_said(limits, said):
    run = subprocess.run([sys.executable, "-c", LIMITED, *map(str, limits)], capture_output=True, text=True, check=True)
    assert run.stdout.startswith(said)
    if limits[1] < limits[2]:
        assert "LimitNOFILE=" in run.stdout
