"""What the gateway lets through, without a socket: the app itself, in front of a relay that notes what reaches it."""

from __future__ import annotations

import asyncio
import itertools
import os
import time
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest
from flower.signed import AUTHORITY, Node, announcement
from flwr.proto import fleet_pb2
from google.protobuf.message import DecodeError
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.gateway.allowance import Allowance, Quota
from fedlora.gateway.app import FLEET_CALLS, Gateway
from fedlora.gateway.bodies import Stop
from fedlora.gateway.calls import Callers
from fedlora.gateway.connections import ConnectionSlots
from fedlora.gateway.exposure import FORBIDDEN
from fedlora.gateway.invitations import Invitations
from fedlora.gateway.replies import check_announcement

PUSH = "/v1/fleet/push-object"
PULL = "/v1/fleet/pull-messages"
ANNOUNCE = "/v1/fleet/push-messages"
LIMIT = 300_000


class Relay:
    """Answers with a status, 200 unless told otherwise, and notes (method, path, body)."""

    def __init__(self) -> None:
        self.status = 200
        self.pulled = b""
        self.seen: list[tuple[str, str, bytes]] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            body, more = body + message.get("body", b""), message.get("more_body", False)
        self.seen.append((scope["method"], scope["raw_path"].decode(), body))
        await send({"type": "http.response.start", "status": self.status, "headers": []})
        await send({"type": "http.response.body", "body": self.pulled if scope["raw_path"] == PULL.encode() else b"relay"})


class Place:
    """A gateway with one enrolled site, ``alpha``, which may push."""

    def __init__(self, home: Path) -> None:
        for part in ("sites", "flower"):
            (home / part).mkdir()
        self.home, self.relay = home, Relay()
        self.node = Node(home, "alpha", home=home)
        self.allowance = Allowance(home / "flower")
        self.allowance.grant({"alpha": 1 << 20})
        self.quota = Quota(home / "flower", time.monotonic)

    def call(self, method: str, path: str, *, query: bytes = b"", headers: dict[str, str] | None = None,
             body: bytes = b"", stated: int | str | None = None, times: int = 1) -> int:  # fmt: skip
        """The status, of all that are made at once; ``headers`` None: as the site signs them."""
        return asyncio.run(self._call(method, path, query, headers, body, len(body) if stated is None else stated, times))

    async def _call(self, method: str, path: str, query: bytes, headers: Any, body: bytes, stated: Any, times: int) -> int:
        signed = self.node.headers(path, body, method=method) if headers is None else headers
        pairs = [(k.lower().encode(), v.encode()) for k, v in signed.items()]
        if stated != "":
            pairs.append((b"content-length", str(stated).encode()))
        scope = {"type": "http", "method": method, "raw_path": path.encode(), "query_string": query, "headers": pairs,
                 "client": ("192.0.2.7", 1)}  # fmt: skip
        statuses: list[int] = []
        read = itertools.repeat({"type": "http.request", "body": body, "more_body": False})

        async def receive() -> Any:
            return next(read)

        async def send(message: Any) -> None:
            if message["type"] == "http.response.start":
                statuses.append(message["status"])

        transport = httpx.ASGITransport(app=self.relay)
        async with httpx.AsyncClient(transport=transport, base_url="https://relay") as upstream:
            gateway = Gateway(
                upstream,
                callers=Callers(self.home / "sites", time.time, 0.0, AUTHORITY),
                quota=self.quota,
                guests=ConnectionSlots(8),
                invitations=Invitations(self.home, time.time),
                body_limit_bytes=LIMIT,
                timeout_s=20.0,
            )
            await asyncio.gather(*(gateway(scope, receive, send) for _ in range(times)))
        (status,) = set(statuses)
        return status


@pytest.fixture
def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


def test_the_calls_of_a_supernode_reach_the_relay_as_they_were_sent(place):
    bodies = {path: announcement().SerializeToString() if path == ANNOUNCE else b"x" for path in sorted(FLEET_CALLS)}
    for path, body in bodies.items():
        assert place.call("POST", path, body=body) == 200
    assert place.call("GET", "/health", headers={}) == 200
    assert place.relay.seen == [*(("POST", *call) for call in bodies.items()), ("GET", "/health", b"")]


@pytest.mark.attack(
    "B12",
    "a flood of questions for its health, which need no signature",
    stops="the gateway asks the SuperLink once a second and answers the others itself",
)
def test_the_relay_is_asked_for_its_health_once_a_second(place):
    assert place.call("GET", "/health", headers={}, times=50) == 200
    assert len(place.relay.seen) == 1


@pytest.mark.parametrize(
    ("method", "path", "query"),
    [
        *(("POST", path, b"") for path in FORBIDDEN),
        ("POST", "/v1/fleet/register-node", b""),
        ("POST", "/v1/fleet/../control/stop-run", b""),
        ("POST", PULL + "/", b""),
        ("POST", PULL, b"x=1"),
        ("GET", "/health", b"x=1"),
        ("GET", PULL, b""),
        ("PUT", PUSH, b""),
        ("POST", "/health", b""),
    ],
)
def test_no_path_but_the_listed_ones_reaches_the_relay(place, method, path, query):
    """Not even with an enrolled site's own signature under it."""
    assert place.call(method, path, query=query) == 404
    assert place.relay.seen == []


@pytest.mark.parametrize(
    ("path", "stated", "status"),
    [
        (PUSH, LIMIT + 1, 413),
        (PULL, 4097, 413),
        (ANNOUNCE, 4096 + 80 * 9 + 1, 413),
        (PUSH, "", 411),
        (PUSH, "+1", 411),
        (PUSH, "0x10", 411),
        (PUSH, "9" * 13, 411),
    ],
)
def test_a_body_over_its_limit_or_without_a_length_is_refused_unread(place, path, stated, status):
    assert place.call("POST", path, stated=stated) == status
    assert place.relay.seen == []


@pytest.mark.parametrize("size", [1, 1 << 16, (1 << 16) + 1, 200_000])
def test_another_body_than_the_signed_one_is_not_passed_on(place, size):
    signed = place.node.headers(PUSH, b"a" * size)
    assert place.call("POST", PUSH, headers=signed, body=b"b" * size) == 401
    assert not any(len(body) == size for *_, body in place.relay.seen)


@pytest.mark.parametrize(("relays", "sites"), [(500, 503), (503, 503), (404, 404), (403, 403)])
@pytest.mark.parametrize("path", [PULL, PUSH])
def test_a_site_is_told_to_try_again_what_failed_in_the_relay(place, path, relays, sites):
    place.relay.status = relays
    assert place.call("POST", path, body=b"x") == sites


LIES: dict[str, tuple[int, Any]] = {
    "the server's own message": (400, lambda r: setattr(r.messages_list[0].metadata, "src_node_id", 1)),
    "another node's message": (400, lambda r: setattr(r.messages_list[0].metadata, "src_node_id", 8)),
    "nobody's message": (400, lambda r: r.messages_list[0].metadata.ClearField("src_node_id")),
    "nobody's call": (400, lambda r: r.ClearField("node")),
    "to another site": (400, lambda r: setattr(r.messages_list[0].metadata, "dst_node_id", 7)),
    "a reply to nothing": (400, lambda r: r.messages_list[0].metadata.ClearField("reply_to_message_id")),
    "a reply to an empty name": (400, lambda r: setattr(r.messages_list[0].metadata, "reply_to_message_id", "")),
    "two messages": (400, lambda r: r.messages_list.add().CopyFrom(r.messages_list[0])),
    "no message": (400, lambda r: r.ClearField("messages_list")),
    "two trees": (400, lambda r: r.message_object_trees.add().CopyFrom(r.message_object_trees[0])),
    "no tree": (400, lambda r: r.ClearField("message_object_trees")),
    "its content": (400, lambda r: r.messages_list[0].content.items.add(key="x")),
    **{f"{what} of {seconds} s": (400, partial(change, seconds=seconds)) for seconds in (float("nan"), float("inf"), -1.0, 1e300)
       for what, change in {
           "work": lambda r, seconds: r.clientapp_runtime_list.__setitem__(0, seconds),
           "a life": lambda r, seconds: setattr(r.messages_list[0].metadata, "ttl", seconds),
           "an age": lambda r, seconds: setattr(r.messages_list[0].metadata, "created_at", seconds),
       }.items()},
    "work of two times": (400, lambda r: r.clientapp_runtime_list.append(1.0)),
    "another message's tree": (400, lambda r: setattr(r.message_object_trees[0], "object_id", "f" * 64)),
    "ten parts": (413, lambda r: [r.message_object_trees[0].children.add(object_id=fresh()) for _ in range(9)]),
    "ten parts, deep": (413, lambda r: deepen(r.message_object_trees[0], 9)),
    "a deep tree": (400, lambda r: deepen(r.message_object_trees[0], 20)),
    **{f"a part named {name}": (400, lambda r, n=name: r.message_object_trees[0].children.add(object_id=n))
       for name in ("x", "", "a" * 63, "a" * 65, "A" * 64, "g" * 64, "0x" + "a" * 62, "a" * 64 + "\n")},
    "a part named so far below": (400, lambda r: setattr(deepest(r.message_object_trees[0]), "object_id", "x")),
    "a message named so": (400, lambda r: rename(r, "x")),
    "a part twice": (400, lambda r: [r.message_object_trees[0].children.add(object_id="a" * 64) for _ in range(2)]),
    "a part twice far below": (400, lambda r: [deepest(r.message_object_trees[0]).children.add(object_id="a" * 64),
                                               deepest(r.message_object_trees[0], 1).children.add(object_id="a" * 64)]),
}  # fmt: skip


def fresh() -> str:
    return os.urandom(32).hex()


def deepest(tree: Any, short_of: int = 0) -> Any:
    """The last part of each level, down to the lowest or so many levels above it."""
    path = [tree]
    while path[-1].children:
        path.append(path[-1].children[-1])
    return path[-1 - short_of]


def rename(request: Any, name: str) -> None:
    request.message_object_trees[0].object_id = request.messages_list[0].metadata.message_id = name


def deepen(tree: Any, levels: int) -> None:
    for _ in range(levels):
        tree = tree.children.add(object_id=fresh())


@pytest.mark.attack(
    "D23",
    "a site pushes messages in the server's name, to another site, to no request, or with the trees of others",
    stops="the gateway takes one reply a call, of the node that calls, to the server, with its own tree",
)
@pytest.mark.attack(
    "D24",
    "one message of 7000 parts locks the relay's database for seconds, so that the run's own calls fail and it ends",
    stops="a reply has as many parts as what is due needs, counted before the SuperLink hears of it",
)
@pytest.mark.attack(
    "D29",
    "a site announces without end what Flower refuses only after it has stored a row for it: parts without a digest, or twice",
    stops="the gateway reads each id before the SuperLink hears of it",
)
@pytest.mark.parametrize("lie", LIES)
def test_an_announcement_is_one_reply_of_the_site_that_calls(place, lie):
    status, change = LIES[lie]
    request = announcement()
    change(request)
    assert place.call("POST", ANNOUNCE, body=request.SerializeToString()) == status
    assert place.relay.seen == []
    assert place.allowance.refused("alpha")  # the run does not wait for it


@pytest.mark.parametrize(
    "more",
    [
        b"\x0a\x02\x08\x01",  # the node again, which Flower would merge with the first
        b"\x2a\x01x",  # a field that Flower does not know
        b"\x08\x01",  # the node as a number
        b"\x0b\x0c",  # a group
        b"\x0a",  # cut
        b"\x22\x05x",
        b"\x8a" * 11,
        b"",
    ],
)
def test_an_announcement_has_one_meaning_only(place, more):
    body = announcement().SerializeToString() + more
    assert place.call("POST", ANNOUNCE, body=body) == (400 if more else 200)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 500), st.integers(0, 3))
def test_what_passes_is_read_by_flower_as_by_the_gateway(junk, at, cut):
    """Whatever is changed: what the gateway lets through, Flower takes for a reply of the node that calls."""
    body = announcement().SerializeToString()
    body = body[: at % len(body)] + junk + body[at % len(body) + cut :]
    try:
        check_announcement(body, most_parts=9, sent=frozenset())
        found = fleet_pb2.PushMessagesRequest.FromString(body)
    except (Stop, DecodeError):
        return
    (message,), (tree,) = found.messages_list, found.message_object_trees
    assert message.metadata.src_node_id == found.node.node_id
    assert message.metadata.dst_node_id == 1
    assert message.metadata.reply_to_message_id
    assert message.metadata.message_id == tree.object_id


@pytest.mark.attack(
    "D29",
    "a site announces without end what Flower refuses after it has stored a row: parts whose children differ from time to time",
    stops="an announcement counts to what is due, even if it fails",
)
def test_an_announcement_counts_even_if_it_fails(place):
    place.allowance.grant({"alpha": 0})
    place.relay.status = 500
    request, passed = announcement(), 0
    request.messages_list[0].metadata.group_id = "x" * 4000
    while (status := place.call("POST", ANNOUNCE, body=request.SerializeToString())) == 503 and passed < 1 << 20:
        passed += request.ByteSize()
    assert status == 413
    assert 2 * (1 << 16) < passed < (1 << 18) + 2 * (1 << 16) + 10_000  # these come back while it runs
    assert place.allowance.refused("alpha")


def requested(levels: int = 5) -> tuple[fleet_pb2.PullMessagesResponse, list[list[str]]]:
    """A request with an array of two chunks, and its ids by level."""
    ids = [[fresh()], [fresh()], [fresh(), fresh()], [fresh()], [fresh(), fresh()]]
    found = fleet_pb2.PullMessagesResponse(reconnect=fleet_pb2.Reconnect(reconnect=5))
    found.messages_list.add().CopyFrom(announcement().messages_list[0])
    tree = found.message_object_trees.add(object_id=ids[0][0])
    for level in ids[1:levels]:
        for name in level:
            child = tree.children.add(object_id=name)
        tree = child
    return found, ids


@pytest.mark.attack(
    "D25",
    "a site announces in its reply, at any place of the tree, what the server has sent to it or to another site",
    stops="the gateway reads each answer to a pull and refuses the ids that several requests may share, of any site",
)
@pytest.mark.parametrize("place_in_tree", ["child", "below", "instead"])
def test_no_reply_names_what_requests_share(place, place_in_tree):
    found, ids = requested()
    place.relay.pulled = found.SerializeToString()
    assert place.call("POST", PULL, body=b"x") == 200
    for number, level in enumerate(ids):
        for name in level:
            lie = announcement()
            at = deepest(lie.message_object_trees[0]) if place_in_tree == "below" else lie.message_object_trees[0]
            if place_in_tree == "instead":
                rename(lie, name)
            else:
                at.children.add(object_id=name)
            shared = number > 2 or name == ids[2][1]
            assert place.call("POST", ANNOUNCE, body=lie.SerializeToString()) == (400 if shared else 200)
    place.allowance.grant({"alpha": 1 << 20})  # the next round
    assert place.call("POST", ANNOUNCE, body=lie.SerializeToString()) == 400
    assert place.quota.sent == {name.encode() for name in (ids[2][1], *ids[3], *ids[4])}
    Allowance(place.home / "flower").grant({"alpha": 1 << 20})  # the next run
    assert place.call("POST", ANNOUNCE, body=lie.SerializeToString()) == 200
    assert place.quota.sent == set()


@pytest.mark.parametrize("cause", ["unknown field", "no digest", "too long", "none"])
def test_a_request_that_the_gateway_cannot_read_reaches_no_site(place, cause):
    found, _ = requested()
    if cause == "no digest":
        found.message_object_trees[0].children[0].object_id = "x"
    if cause == "too long":
        found.messages_list[0].metadata.group_id = "x" * (1 << 20)
    place.relay.pulled = found.SerializeToString() + (b"\x22\x01x" if cause == "unknown field" else b"")
    assert place.call("POST", PULL, body=b"x") == (200 if cause == "none" else 503)
    assert bool(place.quota.sent) == (cause == "none")


def test_a_call_that_nobody_signed_does_not_reach_the_relay(place, tmp_path):
    assert place.call("POST", PULL, headers={}) == 401
    (tmp_path / "other").mkdir()
    stranger = Node(tmp_path / "other", "mallory", home=None)
    assert place.call("POST", PULL, headers=stranger.headers(PULL)) == 401
    assert place.call("POST", "/v1/fleet/activate-node", headers=stranger.headers("/v1/fleet/activate-node")) == 412
    assert place.relay.seen == []
