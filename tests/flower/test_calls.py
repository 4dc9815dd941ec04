"""Whose call it is, from its head; how often; and how much a site may push. Pure parts, with a clock of our own."""

from __future__ import annotations

import json
import os
from hashlib import sha256
from pathlib import Path

import pytest
from flower.signed import Node
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedlora.gateway.allowance import Allowance, Quota
from fedlora.gateway.calls import CALL, KEY, TIME, Callers, Refused
from fedlora.gateway.connections import ConnectionSlots
from fedlora.gateway.limits import Bucket, Buckets

PATH = "/v1/fleet/push-object"


class Clock:
    def __init__(self, now: float) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def home(tmp_path: Path) -> Path:
    for part in ("sites", "flower"):
        (tmp_path / part).mkdir()
    return tmp_path


def callers(home: Path, *, now: float | None = None, started: float = 0.0) -> Callers:
    import time

    return Callers(home / "sites", time.time if now is None else lambda: now, started)


def pairs(headers: dict[str, str]) -> list[tuple[bytes, bytes]]:
    return [(k.encode(), v.encode()) for k, v in headers.items()]


def test_a_signed_call_is_its_sites_and_says_which_body_it_has(home):
    node, known = Node(home, "alpha", home=home), callers(home)
    found = known.check("POST", PATH, pairs(node.headers(PATH, b"body")))
    assert found.site == "alpha"
    assert found.body == "230d8358dc8e8890b4c58deeb62912ee2f20357ae92a5cc861b98e68fe31acb5"


@pytest.mark.attack(
    "B17",
    "who sees inside TLS sends a site's signed call again, as it is, to another route or with another time",
    stops="the site signs method, route, body, time and a number that counts once; the gateway refuses the rest",
)
@pytest.mark.parametrize(
    "change", ["again", "path", "method", "time", "nonce", "body", "signature", "other", "none", "twice", "key"]
)
def test_a_call_that_is_changed_or_repeated_is_refused(home, change):
    node, beta, known = Node(home, "alpha", home=home), Node(home, "beta", home=home), callers(home)
    headers, method, path = node.headers(PATH, b"body"), "POST", PATH
    once, digest, signature = headers[CALL].split()
    more: list[tuple[bytes, bytes]] = []
    if change == "again":
        known.check(method, path, pairs(headers))
    elif change == "path":
        path = "/v1/fleet/pull-messages"
    elif change == "method":
        method = "GET"
    elif change == "time":
        headers[TIME] = node.headers(PATH, late_s=1)[TIME]
    elif change == "nonce":
        headers[CALL] = f"{os.urandom(16).hex()} {digest} {signature}"
    elif change == "body":
        headers[CALL] = f"{once} {'0' * 64} {signature}"
    elif change == "signature":
        headers[CALL] = f"{once} {digest} {node.headers(PATH, b'body')[CALL].split()[2]}"
    elif change == "other":
        headers[CALL] = beta.headers(PATH, b"body")[CALL]
    elif change == "none":
        del headers[CALL]
    elif change == "key":  # Flower's part is beta's, ours alpha's own
        more = [(KEY.encode(), beta.headers(PATH)[KEY].encode())]
    else:
        more = [(CALL.encode(), headers[CALL].encode())]
    with pytest.raises(Refused) as error:
        known.check(method, path, pairs(headers) + more)
    assert error.value.status == 401


def test_the_golden_call_is_taken_once_and_no_other(home):
    golden = json.loads((Path(__file__).parents[1] / "vectors" / "call.json").read_text())
    (home / "sites" / "alpha.pub").write_text(golden["pub"])
    method, path, headers = golden["method"], golden["path"], golden["headers"]
    known = callers(home, now=golden["now"])
    for other in (
        ("PUT", path, headers),
        (method, path + "x", headers),
        (method, path, headers | {TIME: headers[TIME][:-7] + "1+00:00"}),
    ):
        with pytest.raises(Refused, match="a signature of another call"):
            known.check(other[0], other[1], pairs(other[2]))
    assert known.check(method, path, pairs(headers)).body == sha256(golden["body"].encode()).hexdigest()
    with pytest.raises(Refused, match="made before"):
        known.check(method, path, pairs(headers))


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from([KEY, TIME, CALL]), st.binary(max_size=200))
def test_no_header_makes_it_fail_otherwise(home, name, value):
    if not (home / "alpha.key").exists():
        Node(home, "alpha", home=home)
    headers = dict(pairs({KEY: "x", TIME: "2026-01-01T00:00:00+00:00", CALL: "x"}))
    headers[name.encode()] = value
    with pytest.raises(Refused):
        callers(home).check("POST", PATH, list(headers.items()))


@pytest.mark.parametrize(("late_s", "works"), [(0, True), (-4, True), (-6, False), (300, True), (310, False)])
def test_clocks_may_differ_as_much_as_flower_allows(home, late_s, works):
    node, known = Node(home, "alpha", home=home), callers(home)
    if works:
        assert known.check("POST", PATH, pairs(node.headers(PATH, late_s=late_s))).site == "alpha"
    else:
        with pytest.raises(Refused, match=r"its clock is [+-]\d+ s off"):
            known.check("POST", PATH, pairs(node.headers(PATH, late_s=late_s)))


def test_a_key_that_is_not_enrolled_is_refused_as_flower_does(home):
    stranger = Node(home, "stranger", home=None)
    Node(home, "alpha", home=home)
    for path, status in ((PATH, 401), ("/v1/fleet/activate-node", 412)):
        with pytest.raises(Refused, match="not enrolled") as error:
            callers(home).check("POST", path, pairs(stranger.headers(path)))
        assert error.value.status == status


def test_what_was_signed_before_the_gateway_began_is_to_be_signed_again(home):
    import time

    node = Node(home, "alpha", home=home)
    known = callers(home, started=time.time() + 1)
    with pytest.raises(Refused) as error:
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert error.value.status == 503  # a SuperNode tries again, with a new signature


def test_a_site_that_is_added_or_taken_away_counts_within_a_second(home):
    import time

    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0)
    node = Node(home, "alpha", home=home)
    assert known.check("POST", PATH, pairs(node.headers(PATH))).site == "alpha"
    (home / "sites" / "alpha.pub").unlink()
    clock.now += 1.1
    with pytest.raises(Refused, match="not enrolled"):
        known.check("POST", PATH, pairs(node.headers(PATH)))


def test_a_site_that_is_taken_away_is_so_whatever_is_wrong_with_another_file(home):
    import time

    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0)
    node, other = Node(home, "alpha", home=home), Node(home / "b", "beta", home=home)
    assert known.check("POST", PATH, pairs(node.headers(PATH))).site == "alpha"
    (home / "sites" / "alpha.pub").unlink()
    (home / "sites" / "gamma.pub").write_text("half a fi")
    clock.now += 1.1
    with pytest.raises(Refused, match="not enrolled"):
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert known.check("POST", PATH, pairs(other.headers(PATH))).site == "beta"


def test_a_call_counts_once_whatever_the_site_is_called_by_then(home):
    import time

    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0)
    call = pairs(Node(home, "alpha", home=home).headers(PATH))
    assert known.check("POST", PATH, call).site == "alpha"
    (home / "sites" / "alpha.pub").rename(home / "sites" / "alpha-2.pub")
    clock.now += 1.1
    with pytest.raises(Refused, match="made before"):
        known.check("POST", PATH, call)


def test_numbers_are_forgotten_when_their_time_is_over(home):
    import time

    clock = Clock(time.time())
    node, known = Node(home, "alpha", home=home), Callers(home / "sites", clock, 0.0)
    for _ in range(20):
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert len(next(iter(known._nonces.values()))) == 20
    clock.now += 400
    for _ in range(15):
        known.check("POST", PATH, pairs(node.headers(PATH, late_s=-400)))
    assert len(next(iter(known._nonces.values()))) == 15


# --- how often ------------------------------------------------------------------------------------------------------


def test_a_bucket_gives_its_burst_and_then_its_rate():
    clock = Clock(0.0)
    bucket = Bucket(10.0, 5.0, 60.0, clock)
    assert [bucket.wait_s() for _ in range(5)] == [0.0] * 5
    assert [bucket.wait_s() for _ in range(3)] == pytest.approx([0.1, 0.2, 0.3])
    clock.now = 0.8
    assert bucket.wait_s() == 0.0
    clock.now = 100.0
    assert [bucket.wait_s() for _ in range(6)] == pytest.approx([0.0] * 5 + [0.1])


def test_a_debt_ends_at_the_longest_wait_and_names_do_not_pile_up():
    clock = Clock(0.0)
    buckets = Buckets(10.0, 5.0, 2.0, clock)
    assert max(buckets.of("a").wait_s() for _ in range(1000)) == pytest.approx(2.0)
    assert buckets.of("b").wait_s() == 0.0
    for i in range(5000):
        buckets.of(str(i))
    assert len(buckets._of) == 4096


class Held:
    def __init__(self) -> None:
        self.cuts = 0

    def cut(self) -> None:
        self.cuts += 1


def test_the_oldest_of_the_address_with_most_strangers_gives_way_and_a_site_never():
    guests, held = ConnectionSlots(4), {}
    for i, address in enumerate(["flood", "other", "flood", "flood"]):
        held[i] = Held()
        guests.come(held[i], (address, i))
    guests.known(("flood", 0), "alpha")  # a site behind the same address
    for i in (4, 5):
        held[i] = Held()
        guests.come(held[i], ("flood", i))
    assert [held[i].cuts for i in range(6)] == [0, 0, 1, 0, 0, 0]
    assert guests.here(("flood", 0))
    guests.go(("flood", 0))
    assert not guests.here(("flood", 0))


def test_a_site_holds_so_many_connections_and_no_more():
    guests, held = ConnectionSlots(1000), [Held() for _ in range(70)]
    for i, one in enumerate(held):
        guests.come(one, ("a", i))
        guests.known(("a", i), "alpha")
        if one.cuts == 0 and sum(h.cuts for h in held) > 0:
            cut = next(j for j, h in enumerate(held) if h.cuts and guests.here(("a", j)))
            guests.go(("a", cut))
    assert [h.cuts for h in held] == [1] * 6 + [0] * 64


# --- how much -------------------------------------------------------------------------------------------------------

WHOLE = 19_000 + (1 << 16) + (1 << 10)  # of a reply of 19 kB in Flower's form
SPARE = 1 << 18


def quota(home: Path, clock: Clock) -> Quota:
    return Quota(home / "flower", clock)


@pytest.mark.attack(
    "D3",
    "a site pushes 300 MiB to the relay where 19 kB are due, in one piece or in many",
    stops="the gateway counts each body by its stated length against what the run said is due; none of it is read",
)
@pytest.mark.parametrize("piece", [300 << 20, 5 << 20, 300_000])
def test_a_reply_is_stored_up_to_what_is_due_and_not_beyond(home, piece):
    said, kept = Allowance(home / "flower"), quota(home, Clock(0.0))
    said.grant({"alpha": 19_000, "beta": 19_000})
    taken = sum(piece for _ in range(max((300 << 20) // piece, 1)) if kept.take("alpha", piece))
    assert taken <= WHOLE + SPARE
    assert said.refused("alpha")
    assert not said.refused("beta")
    assert kept.take("beta", WHOLE)


def test_a_late_reply_does_not_use_up_what_the_next_one_needs(home):
    said, kept = Allowance(home / "flower"), quota(home, Clock(0.0))
    for _ in range(9):  # it was away for most of them
        said.grant({"alpha": 10 << 20})
        kept.take("alpha", 0)
    piece = (10 << 20) + 5000
    assert [kept.take("alpha", piece) for _ in range(4)] == [True, True, True, False]


def test_every_round_brings_its_own_and_a_run_takes_away_what_the_last_one_left(home):
    kept = quota(home, Clock(0.0))
    first = Allowance(home / "flower")
    for _ in range(50):
        first.grant({"alpha": 10 << 20})
        assert kept.take("alpha", 10 << 20)
        assert not first.refused("alpha")
    first.grant({"alpha": 10 << 20})
    Allowance(home / "flower").grant({"alpha": 100})
    assert not kept.take("alpha", 10 << 20)


def test_what_was_not_stored_counts_not(home):
    said, kept = Allowance(home / "flower"), quota(home, Clock(0.0))
    said.grant({"alpha": 10 << 20})
    for _ in range(100):  # the relay is away
        assert kept.take("alpha", 5 << 20)
        kept.give_back("alpha", 5 << 20)
    assert [kept.take("alpha", 5 << 20) for _ in range(2)] == [True, True]


def test_a_site_that_owes_nothing_may_still_send_codes(home):
    clock = Clock(0.0)
    kept = quota(home, clock)
    assert sum(kept.take("alpha", 1000) for _ in range(1000)) == SPARE // 1000
    clock.now += 60
    assert sum(kept.take("alpha", 1000) for _ in range(1000)) == 61
    (home / "flower" / "due.json").write_text("{")  # nothing that it cannot read makes it fail
    assert not kept.take("alpha", 1 << 20)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.one_of(st.integers(0, 1 << 24).map(lambda n: ("grant", n)), st.integers(0, 1 << 22).map(lambda n: ("take", n))))
)
def test_no_order_lets_more_through_than_three_of_the_largest_beyond_what_was_granted(tmp_path_factory, steps):
    directory = tmp_path_factory.mktemp("q")
    said, kept = Allowance(directory), Quota(directory, lambda: 0.0)
    granted = stored = 0
    for what, n in steps:
        if what == "grant":
            said.grant({"alpha": n})
            granted += n + (1 << 16) + (1 << 10) * (n // (5 << 20) + 1)
        elif kept.take("alpha", n):
            stored += n
    assert stored <= granted + SPARE
