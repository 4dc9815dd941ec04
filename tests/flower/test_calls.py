"""Whose call it is, from its head; how often; and how much a site may push. Pure parts, with a clock of our own."""

from __future__ import annotations

import json
import os
import time
from contextlib import nullcontext
from hashlib import sha256
from pathlib import Path

import pytest
from flower.signed import AUTHORITY, Node, pulled
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from raising import raising

from fedlora.core.errors import KeyFileError
from fedlora.gateway import calls
from fedlora.gateway.allowance import Allowance, Quota, Taken
from fedlora.gateway.calls import CALL, KEY, TIME, Callers, Refused
from fedlora.gateway.certificates import authority_digest, make_tls
from fedlora.gateway.connections import ConnectionSlots
from fedlora.gateway.limits import Bucket, Buckets
from fedlora.gateway.probe import probe
from fedlora.gateway.replies import CHUNK_BYTES, most_bytes, most_parts

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
    return Callers(home / "sites", time.time if now is None else lambda: now, started, AUTHORITY)


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


@pytest.mark.attack(
    "B17",
    "a site is in two federations with one node key: one server passes its call on to the other's gateway",
    stops="the site signs for the authority that it pins, which the server's TLS certificate is of",
)
def test_a_call_counts_at_the_gateway_of_one_federation(tmp_path):
    nodes, known = [], []
    for name in ("one", "two"):
        make_tls(tmp_path / name / "tls", [])
        (tmp_path / name / "sites").mkdir()
        nodes.append(Node(tmp_path, "alpha", home=tmp_path / name))  # the same key
        known.append(Callers(tmp_path / name / "sites", time.time, 0.0, authority_digest(tmp_path / name / "tls" / "ca.crt")))
    call = pairs(nodes[0].headers(PATH, b"body"))
    with pytest.raises(Refused, match="a signature of another call") as error:
        known[1].check("POST", PATH, call)
    assert error.value.status == 401
    assert known[0].check("POST", PATH, call).site == "alpha"
    make_tls(tmp_path / "one" / "tls", ["new.example"])  # renewed
    again = Node(tmp_path, "alpha", home=tmp_path / "one")
    assert known[0].check("POST", PATH, pairs(again.headers(PATH, b"body"))).site == "alpha"


@pytest.mark.attack(
    "B17",
    "one server has the site pin the other's authority beside its own, so that the site signs for the other",
    stops="a site pins one certificate, counted as TLS reads the file; with more it does not connect",
)
@pytest.mark.parametrize("label", ["CERTIFICATE", "TRUSTED CERTIFICATE", "X509 CERTIFICATE"])
def test_a_federation_is_named_by_one_authority(tmp_path, label):
    for name in ("one", "two"):
        make_tls(tmp_path / name, [])
    ours, others = ((tmp_path / name / "ca.crt").read_bytes() for name in ("one", "two"))
    (tmp_path / "both").write_bytes(others + ours.replace(b" CERTIFICATE", b" " + label.encode()))
    assert authority_digest(tmp_path / "one" / "ca.crt") != authority_digest(tmp_path / "two" / "ca.crt")
    for bad in (tmp_path / "both", tmp_path / "one" / "ca.key", tmp_path / "none", tmp_path / "one"):
        with raising(KeyFileError, code="key-file"):
            authority_digest(bad)
        assert probe("localhost:1", ca=bad).cause == "bad-ca"


def test_the_golden_call_is_taken_once_and_no_other(home):
    golden = json.loads((Path(__file__).parents[1] / "vectors" / "call.json").read_text())
    (home / "sites" / "alpha.pub").write_text(golden["pub"])
    method, path, headers = golden["method"], golden["path"], golden["headers"]
    known = Callers(home / "sites", lambda: golden["now"], 0.0, golden["authority"])
    for other in (
        ("PUT", path, headers),
        (method, path + "x", headers),
        (method, path, headers | {TIME: headers[TIME][:-7] + "1+00:00"}),
    ):
        with pytest.raises(Refused, match="a signature of another call"):
            known.check(other[0], other[1], pairs(other[2]))
    with pytest.raises(Refused, match="a signature of another call"):
        callers(home, now=golden["now"]).check(method, path, pairs(headers))
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
    node = Node(home, "alpha", home=home)
    known = callers(home, started=time.time() + 1)
    with pytest.raises(Refused) as error:
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert error.value.status == 503  # a SuperNode tries again, with a new signature


def test_a_site_that_is_added_or_taken_away_counts_within_a_second(home):
    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0, AUTHORITY)
    node = Node(home, "alpha", home=home)
    assert known.check("POST", PATH, pairs(node.headers(PATH))).site == "alpha"
    (home / "sites" / "alpha.pub").unlink()
    clock.now += 1.1
    with pytest.raises(Refused, match="not enrolled"):
        known.check("POST", PATH, pairs(node.headers(PATH)))


def test_a_site_that_is_taken_away_is_so_whatever_is_wrong_with_another_file(home):
    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0, AUTHORITY)
    node, other = Node(home, "alpha", home=home), Node(home / "b", "beta", home=home)
    assert known.check("POST", PATH, pairs(node.headers(PATH))).site == "alpha"
    (home / "sites" / "alpha.pub").unlink()
    (home / "sites" / "gamma.pub").write_text("half a fi")
    clock.now += 1.1
    with pytest.raises(Refused, match="not enrolled"):
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert known.check("POST", PATH, pairs(other.headers(PATH))).site == "beta"


def test_a_damaged_file_costs_the_other_sites_nothing_and_its_own_one_nothing_that_it_had(home):
    clock = Clock(time.time())
    (home / "sites" / "gamma.pub").write_text("half a fi")
    known = Callers(home / "sites", clock, 0.0, AUTHORITY)
    node, other = Node(home, "alpha", home=home), Node(home / "b", "beta", home=home)
    for each, site in ((node, "alpha"), (other, "beta")):
        assert known.check("POST", PATH, pairs(each.headers(PATH))).site == site
    (home / "sites" / "beta.pub").write_text("half a fi")
    delta = Node(home / "d", "delta", home=home)
    clock.now += 1.1
    for each, site in ((node, "alpha"), (other, "beta"), (delta, "delta")):
        assert known.check("POST", PATH, pairs(each.headers(PATH))).site == site
    for file in (home / "sites").glob("*.pub"):
        file.unlink()
    clock.now += 1.1
    for each in (node, other, delta):
        with pytest.raises(Refused, match="not enrolled"):
            known.check("POST", PATH, pairs(each.headers(PATH)))


def test_a_call_counts_once_whatever_the_site_is_called_by_then(home):
    clock = Clock(time.time())
    known = Callers(home / "sites", clock, 0.0, AUTHORITY)
    call = pairs(Node(home, "alpha", home=home).headers(PATH))
    assert known.check("POST", PATH, call).site == "alpha"
    (home / "sites" / "alpha.pub").rename(home / "sites" / "alpha-2.pub")
    clock.now += 1.1
    with pytest.raises(Refused, match="made before"):
        known.check("POST", PATH, call)


@pytest.mark.parametrize("set_back_s", [2.0, 119.0])
def test_a_call_counts_once_though_the_clock_goes_back(home, set_back_s):
    clock = Clock(time.time())
    node, known = Node(home, "alpha", home=home), Callers(home / "sites", clock, 0.0, AUTHORITY)
    call = pairs(node.headers(PATH))
    known.check("POST", PATH, call)
    for later in range(300, 308):  # its time is over, and the site goes on calling
        clock.now += 300 if later == 300 else 1
        known.check("POST", PATH, pairs(node.headers(PATH, late_s=-(later + 1))))
    clock.now -= set_back_s
    with pytest.raises(Refused, match="made before"):
        known.check("POST", PATH, call)


def test_numbers_are_forgotten_when_their_time_is_over(home):
    clock = Clock(time.time())
    node, known = Node(home, "alpha", home=home), Callers(home / "sites", clock, 0.0, AUTHORITY)
    for _ in range(20):
        known.check("POST", PATH, pairs(node.headers(PATH)))
    assert len(next(iter(known._nonces.values()))) == 20
    clock.now += 600
    for _ in range(15):
        known.check("POST", PATH, pairs(node.headers(PATH, late_s=-600)))
    assert len(next(iter(known._nonces.values()))) == 15


def test_a_site_that_calls_without_end_fills_no_memory(home, monkeypatch):
    monkeypatch.setattr(calls, "_MOST_NONCES", 5)
    clock = Clock(time.time())
    node, other = (Node(home, name, home=home) for name in ("alpha", "beta"))
    known = Callers(home / "sites", clock, 0.0, AUTHORITY)
    for number in range(8):
        with nullcontext() if number < 5 else pytest.raises(Refused, match="more calls than") as refused:
            known.check("POST", PATH, pairs(node.headers(PATH)))
    assert refused.value.status == 503
    assert known.check("POST", PATH, pairs(other.headers(PATH))).site == "beta"
    clock.now += 600
    for _ in range(5):
        known.check("POST", PATH, pairs(node.headers(PATH, late_s=-600)))
    assert len(known._nonces[next(iter(known._nonces))]) <= 5


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
    guests, held = ConnectionSlots(1000), [Held() for _ in range(14)]
    for i, one in enumerate(held):
        guests.come(one, ("a", i))
        guests.known(("a", i), "alpha")
        guests.known(("a", 0), "alpha")  # in use: the one whose last call began longest ago is cut
    assert [h.cuts for h in held] == [0] + [1] * 6 + [0] * 7


# --- how much -------------------------------------------------------------------------------------------------------

WHOLE = 19_000 + (1 << 16) + (1 << 10)  # of a reply of 19 kB in Flower's form
SPARE = 1 << 18
HEAD = 1000  # of an announcement


class Site:
    """Alpha, who pushes; ``said`` is the run's end."""

    def __init__(self, home: Path, clock: Clock | None = None) -> None:
        self.said, self.kept = Allowance(home / "flower"), Quota(home / "flower", clock or Clock(0.0))

    def ask(self, size: int, *, announced: bool = True) -> None:
        self.said.grant({"alpha": size})
        if announced:
            self.pull()
            assert self.announce() is not None

    def pull(self) -> None:
        self.kept.note_pulled("alpha", pulled())

    def announce(self, size: int = HEAD) -> Taken | None:
        return self.kept.take("alpha", size, announces=True)

    def push(self, size: int) -> Taken | None:
        return self.kept.take("alpha", size, announces=False)


@pytest.mark.attack(
    "D3",
    "a site pushes 300 MiB to the relay where 19 kB are due, in one piece or in many",
    stops="the gateway counts each body by its stated length against what the run said is due; none of it is read",
)
@pytest.mark.parametrize("piece", [300 << 20, 5 << 20, 300_000, 4000])
@pytest.mark.parametrize("announces", [True, False])
def test_a_reply_is_stored_up_to_what_is_due_and_not_beyond(home, piece, announces):
    site = Site(home)
    site.said.grant({"alpha": 19_000, "beta": 19_000})
    assert site.announce()
    taken = sum(piece for _ in range(max((300 << 20) // piece, 1)) if site.kept.take("alpha", piece, announces=announces))
    assert taken <= 2 * WHOLE + SPARE
    assert site.said.refused("alpha")
    assert not site.said.refused("beta")
    assert site.kept.take("beta", HEAD, announces=True)
    assert site.kept.take("beta", WHOLE, announces=False)


@pytest.mark.attack(
    "D3",
    "19 kB are due of a site that has left out three replies of 12 MB before",
    stops="a grant ends with the next one, and what it left with it",
)
@pytest.mark.parametrize("aborted", [False, True])
def test_what_an_earlier_grant_left_is_gone(home, aborted):
    """Nor does it come back by parts that were under way and then cut."""
    site = Site(home)
    for _ in range(3):
        site.ask(12_000_000)
    held = [t for t in [site.push(5 << 20), site.push(5 << 20)] if t]
    assert len(held) == 2
    site.ask(19_000)
    taken = 0
    for _ in range(100):
        taken += sum(4000 for _ in range(100) if site.push(4000))
        if aborted and held:
            site.kept.give_back(held.pop())
    assert taken <= 2 * WHOLE + SPARE


def test_parts_of_a_late_reply_cost_the_next_one_nothing(home):
    """The SuperNode sends one reply after the other: what comes before the announcement belongs to the last one."""
    site = Site(home)
    site.ask(12_000_000)
    assert site.push(5 << 20)
    site.ask(19_000, announced=False)
    assert not site.push(5 << 20)
    assert not all(site.push(60_000) for _ in range(20))
    assert not site.said.refused("alpha")
    site.pull()
    assert site.announce()
    assert site.push(WHOLE)
    assert not site.push(5 << 20)
    assert site.said.refused("alpha")


@pytest.mark.parametrize("parts", [1, 100])
def test_the_announcement_of_a_late_reply_costs_the_next_one_nothing(home, parts):
    """It is late while no request was pulled under the grant of now, whether its length or its tree is refused."""
    site = Site(home)
    site.ask(parts * CHUNK_BYTES)
    site.ask(19_000, announced=False)
    site.kept.note_pulled("alpha", b"")  # a pull that brings nothing
    assert (site.announce(most_bytes(most_parts(parts * CHUNK_BYTES))) is None) == (parts > 1)
    site.kept.refuse("alpha")  # as of a tree with too many parts
    assert not site.push(5 << 20)
    assert not site.said.refused("alpha")
    site.pull()
    assert site.announce()
    assert site.push(WHOLE)
    assert not site.said.refused("alpha")
    site.kept.refuse("alpha")
    assert site.said.refused("alpha")


def test_a_gateway_that_begins_in_the_middle_takes_the_reply_that_is_due(home):
    site = Site(home)
    site.said.grant({"alpha": 12_000_000})
    assert site.announce()
    assert site.push(5 << 20)


def test_every_round_brings_its_own_and_a_run_takes_away_what_the_last_one_left(home):
    site = Site(home)
    for _ in range(50):
        site.ask(10 << 20)
        assert site.push(10 << 20)
        assert not site.said.refused("alpha")
    site.ask(10 << 20)
    Allowance(home / "flower").grant({"beta": 100})  # another run, that has not asked alpha yet
    assert not site.push(10 << 20)
    assert sum(4000 for _ in range(1000) if site.push(4000)) <= SPARE


@pytest.mark.parametrize("due", [0, 19_000, 12_000_000, 1 << 30])
def test_a_reply_that_is_announced_forty_times_still_fits(home, due):
    """An announcement counts each time, also if the relay was away. With 72 bytes for each part, as Flower has them."""
    site = Site(home)
    site.ask(due, announced=False)
    assert all(site.announce(300 + 72 * most_parts(due)) for _ in range(40))
    chunks = [min(5 << 20, due - at) + 256 for at in range(0, due, 5 << 20)]
    assert all(site.push(size) for size in (*chunks, 1000, 1000, 1000, 1000))
    assert not site.said.refused("alpha")


def test_what_was_not_stored_counts_not(home):
    site = Site(home)
    site.ask(10 << 20)
    for _ in range(100):  # the relay is away
        taken = site.push(5 << 20)
        assert taken
        site.kept.give_back(taken)
    assert [bool(site.push(5 << 20)) for _ in range(4)] == [True, True, True, False]  # one again, whose answer was lost


def test_a_site_that_owes_nothing_may_still_send_codes(home):
    clock = Clock(0.0)
    site = Site(home, clock)
    assert sum(bool(site.announce()) for _ in range(1000)) == SPARE // HEAD
    clock.now += 60
    assert sum(bool(site.announce()) for _ in range(1000)) == 61
    (home / "flower" / "due.json").write_text("{")  # nothing that it cannot read makes it fail
    assert not site.push(1 << 20)


@pytest.mark.attack(
    "D3",
    "a site announces a reply in 500 kB: a long name of its group, or 7000 parts",
    stops="an announcement may be as long as the tree of the reply that is due makes it; more is refused unread",
)
@pytest.mark.parametrize(("due", "most"), [(0, 4096 + 80 * 9), (19_000, 4096 + 80 * 9), (1 << 30, 4096 + 80 * (8 + 205))])
def test_an_announcement_is_as_long_as_the_tree_of_what_is_due(home, due, most):
    site = Site(home)
    site.ask(due)
    assert site.announce(most).most_parts == (most - 4096) // 80
    assert not site.announce(most + 1)
    assert site.said.refused("alpha")


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.one_of(
            st.integers(0, 1 << 24).map(lambda n: ("grant", n)),
            st.integers(0, 1 << 22).map(lambda n: ("take", n)),
            st.just(("announce", HEAD)),
            st.just(("give back", 0)),
        )
    )
)
def test_under_no_grant_more_is_stored_than_twice_what_it_gave(tmp_path_factory, steps):
    (home := tmp_path_factory.mktemp("q") / "flower").mkdir()
    site = Site(home.parent)
    grants, held = [[0, 0]], []  # what each allows, and what is stored under it
    for what, n in steps:
        if what == "grant":
            site.said.grant({"alpha": n})
            grants.append([2 * (n + (1 << 16) + (1 << 10) * -(-n // (5 << 20))), 0])
        elif what == "give back" and held:
            grant, taken = held.pop()
            site.kept.give_back(taken)
            grant[1] -= taken.credit + taken.spare
        elif taken := site.kept.take("alpha", n, announces=what == "announce"):
            grants[-1][1] += n
            held.append((grants[-1], taken))
    assert sum(max(stored - most, 0) for most, stored in grants) <= SPARE
