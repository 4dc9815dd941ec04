"""Who takes part: only what the operator approved, and what the coordinators of that signed next. FORMAT.md, section 9."""

import base64
import hashlib
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from hypothesis import given, settings
from hypothesis import strategies as st
from vectors.make import identities, read_vector

from fedlora.core.errors import FedLoRAError, RosterInvalid
from fedlora.formats import roster as module
from fedlora.formats.epochs import first_epoch, next_epoch
from fedlora.formats.keys import Identity
from fedlora.formats.roster import Member, Roster, federation
from fedlora.formats.signed_roster import SignedRoster, load_roster
from fedlora.formats.state.memory import DictMemory
from fedlora.formats.trust import RosterKeeper, accept

ROOT = Path(__file__).resolve().parents[1]
VECTORS = sorted((ROOT / "vectors" / "roster").glob("*.txt"))
FORMAT = (ROOT.parent / "fedlora" / "FORMAT.md").read_text()
NOW, DAY = 1_700_000_000, 86_400
SERVER = Identity.generate("server")
CAROL, DAVE, ERIN, STRANGER = (Identity.generate(n) for n in ("carol", "dave", "erin", "mallory"))
SITES = {n: Identity.generate(n) for n in ("a", "b", "c", "d")}


def members(*names):
    return tuple(Member(SITES[n].public, "active") for n in names)


FIRST = Roster(
    fed=federation(SERVER.public),
    epoch=1,
    previous="0" * 64,
    not_before=NOW,
    not_after=NOW + 365 * DAY,
    min_version="0.1.0",
    suites=(1,),
    max_colluding=1,
    min_cohort=3,
    server=SERVER.public,
    coordinators=(CAROL.public, DAVE.public),
    needed=2,
    sites=members("a", "b", "c"),
)
PIN = FIRST.digest()


def signed(roster, *coordinators):
    made = SignedRoster(roster)
    for identity in coordinators:
        made = made.sign(identity)
    return made


ONE = signed(FIRST, CAROL, DAVE)
SECOND = next_epoch(FIRST, add=[SITES["d"].public], revoke=["b"], now=NOW + DAY)
THIRD = next_epoch(SECOND, revoke=["a"], now=NOW + 2 * DAY)
NEW_PEOPLE = replace(SECOND, coordinators=(CAROL.public, ERIN.public))  # dave hands over to erin


def refused(work):
    with pytest.raises(FedLoRAError) as error:
        work()
    return error.value


# --- the object ------------------------------------------------------------------------------------------------


def test_a_roster_survives_its_bytes():
    for roster in (FIRST, SECOND, THIRD, NEW_PEOPLE):
        assert Roster.parse(roster.dump()) == roster
        both = signed(roster, DAVE, CAROL)
        assert SignedRoster.parse(both.dump()) == both
        assert both.dump() == signed(roster, CAROL, DAVE).dump()  # the order of signing leaves no trace


def test_a_roster_survives_its_file(tmp_path):
    (tmp_path / "r.json").write_bytes(ONE.dump())
    assert load_roster(tmp_path / "r.json") == ONE
    assert refused(lambda: load_roster(tmp_path / "none.json")).code == "store"


def test_a_revoked_site_stays_on_the_roster_and_counts_no_more():
    assert list(SECOND.active()) == ["a", "c", "d"]
    assert [SECOND.index(n) for n in "abcd"] == [1, 2, 3, 4]
    assert SECOND.site("d") == SITES["d"].public
    assert refused(lambda: SECOND.site("b")).code == "revoked-site"
    assert refused(lambda: SECOND.site("mallory")).code == "unknown-site"
    assert refused(lambda: SECOND.index("mallory")).code == "unknown-site"


def test_the_next_epoch_follows_and_changes_only_what_is_asked():
    assert (SECOND.epoch, SECOND.previous, SECOND.not_before) == (2, PIN, NOW + DAY)
    assert SECOND.not_after == FIRST.not_after
    assert next_epoch(FIRST, days=10, now=NOW).not_after == NOW + 10 * DAY
    assert replace(SECOND, epoch=1, previous="0" * 64, not_before=NOW, sites=FIRST.sites) == FIRST


MANY = tuple(Identity.generate(f"s{k:02d}") for k in range(30))


def grown(history, *, colluding=1):
    """Rosters of a federation that changes: how many sites begin, then of each epoch how many come and which go."""
    start, changes = history
    fresh = iter(MANY)
    epochs = [
        first_epoch(SERVER.public, [next(fresh).public for _ in range(start)], [CAROL.public], max_colluding=colluding,
                    min_cohort=3 * colluding, now=NOW)
    ]  # fmt: skip
    for come, gone in changes:
        active = sorted(epochs[-1].active())
        revoke = sorted({active[g % len(active)] for g in gone})[: len(active) - 1]
        add = [p.public for p, _ in zip(fresh, range(come), strict=False)]
        epochs.append(next_epoch(epochs[-1], add=add, revoke=revoke, now=NOW))
    return epochs


HISTORIES = st.tuples(
    st.integers(3, 9), st.lists(st.tuples(st.integers(0, 5), st.lists(st.integers(0, 20), max_size=2)), max_size=4)
)


@settings(max_examples=150, deadline=None)
@given(HISTORIES, st.integers(1, 2))
def test_groups_are_large_enough_and_no_site_ever_changes_its_group(history, colluding):
    seen = {}
    for roster in grown(history, colluding=colluding):
        assert Roster.parse(roster.dump()) == roster
        groups = roster.groups()
        together = sorted(name for group in groups for name in group)
        assert together == sorted(set(together) & set(roster.active()))
        for group in groups if len(roster.active()) >= colluding + 2 else ():
            assert len(group) >= colluding + 2
            for name in group:
                assert seen.setdefault(name, group) == group


def test_new_sites_wait_until_they_are_a_group_and_a_revoked_one_takes_its_group_with_it():
    first = first_epoch(SERVER.public, [m.public for m in MANY[:6]], [CAROL.public], now=NOW)
    assert first.groups() == (frozenset({"s00", "s02", "s04"}), frozenset({"s01", "s03", "s05"}))
    two = next_epoch(first, add=[m.public for m in MANY[6:8]], now=NOW)
    assert two.groups() == first.groups()
    three = next_epoch(two, add=[MANY[8].public], revoke=["s00"], now=NOW)
    assert three.groups() == (frozenset({"s01", "s03", "s05"}), frozenset({"s06", "s07", "s08"}))
    anew = next_epoch(three, regroup=True, now=NOW)
    assert sorted(map(len, anew.groups())) == [4, 4]
    larger = next_epoch(three, regroup=True, group_size=5, now=NOW)
    assert larger.groups() == (frozenset(larger.active()),)
    assert refused(lambda: next_epoch(three, regroup=True, group_size=9, now=NOW)).code == "roster-invalid"
    assert refused(lambda: next_epoch(three, regroup=True, group_size=2, now=NOW)).code == "roster-invalid"
    assert refused(lambda: replace(first, sites=(replace(first.sites[0], group=257), *first.sites[1:]))).code == "roster-invalid"


def test_a_roster_without_groups_is_one_group_and_has_the_bytes_that_it_always_had():
    assert FIRST.groups() == (frozenset("abc"),)
    assert json.loads(FIRST.dump())["v"] == 1
    assert b"group" not in FIRST.dump()
    one = next_epoch(FIRST, add=[SITES["d"].public], now=NOW)
    assert one.groups() == (frozenset("abc"),)  # d waits
    assert next_epoch(FIRST, revoke=["a"], now=NOW).groups() == ()
    assert json.loads(one.dump())["v"] == 2
    none = json.loads(one.dump())
    none["sites"] = [{**s, "group": 0} for s in none["sites"]]
    assert (
        refused(lambda: Roster.parse(json.dumps(none, sort_keys=True, separators=(",", ":")).encode())).code == "roster-invalid"
    )


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"add": [SITES["a"].public]}, "roster-invalid"),  # there already
        ({"add": [SITES["b"].public]}, "roster-invalid"),  # revoked: never again
        ({"add": [Identity.generate("b").public]}, "roster-invalid"),  # nor another key under its name
        ({"add": [replace(SITES["b"].public, name="bb")]}, "roster-invalid"),  # nor its key under another name
        ({"add": [SITES["d"].public, SITES["d"].public]}, "roster-invalid"),
        ({"revoke": ["zoe"]}, "unknown-site"),
        ({"revoke": ["b"]}, "revoked-site"),
        ({"days": -1}, "roster-invalid"),
        ({"now": FIRST.not_after}, "roster-invalid"),  # without days the end stays, and it has passed
    ],
)
def test_an_impossible_next_epoch_is_refused(change, code):
    without_b = replace(FIRST, sites=(FIRST.sites[0], replace(FIRST.sites[1], status="revoked"), FIRST.sites[2]))
    assert refused(lambda: next_epoch(without_b, **{"now": NOW, **change})).code == code


# --- the trust rule ----------------------------------------------------------------------------------------------

OTHER_SERVER = Identity.generate("server")
ELSEWHERE = replace(SECOND, server=OTHER_SERVER.public, fed=federation(OTHER_SERVER.public))
BAD = replace(ONE, signatures={**ONE.signatures, "dave": ONE.signatures["carol"]})


def with_site(roster, name, identity):
    """This roster with another identity of a site's name, or without that site."""
    sites = [replace(m, identity=identity) if m.identity.name == name else m for m in roster.sites]
    return replace(roster, sites=tuple(m for m in sites if m.identity is not None))


TRUST = {
    "fresh": (ONE, None, PIN, ""),
    "fresh, a later epoch": (signed(THIRD, CAROL, DAVE), None, THIRD.digest(), ""),
    "fresh, signed by those of the epoch before too": (signed(NEW_PEOPLE, CAROL, DAVE, ERIN), None, NEW_PEOPLE.digest(), ""),
    "the same again": (ONE, ONE, PIN, ""),
    "the next epoch": (signed(SECOND, CAROL, DAVE), ONE, PIN, ""),
    "the next epoch, other coordinators": (signed(NEW_PEOPLE, CAROL, DAVE, ERIN), ONE, PIN, ""),
    "a gap, approved by hand": (signed(THIRD, CAROL, DAVE), ONE, THIRD.digest(), ""),
    "other coordinators, approved by hand": (signed(NEW_PEOPLE, CAROL, ERIN), ONE, NEW_PEOPLE.digest(), ""),
    "not-approved": (ONE, None, "1" * 64, "roster-invalid"),
    "not-approved, nothing pinned": (ONE, None, "", "roster-invalid"),
    "rollback": (ONE, signed(SECOND, CAROL, DAVE), PIN, "roster-rollback"),
    "rollback, the same epoch": (signed(replace(FIRST, min_cohort=4), CAROL, DAVE), ONE, PIN, "roster-rollback"),
    "rollback, the same epoch, pinned": (signed(NEW_PEOPLE, CAROL, ERIN), signed(SECOND, CAROL, DAVE),
                                         NEW_PEOPLE.digest(), "roster-rollback"),
    "gap": (signed(THIRD, CAROL, DAVE), ONE, PIN, "roster-invalid"),
    "chain": (signed(replace(SECOND, previous="3" * 64), CAROL, DAVE), ONE, PIN, "roster-invalid"),
    "site-changed, other keys": (signed(with_site(SECOND, "a", Identity.generate("a").public), CAROL, DAVE), ONE, PIN,
                                 "roster-invalid"),
    "site-changed, gone": (signed(with_site(SECOND, "a", None), CAROL, DAVE), ONE, PIN, "roster-invalid"),
    "site-changed, a revoked one": (signed(with_site(THIRD, "b", Identity.generate("b").public), CAROL, DAVE),
                                      signed(SECOND, CAROL, DAVE), PIN, "roster-invalid"),
    "other-federation": (signed(ELSEWHERE, CAROL, DAVE), ONE, PIN, "roster-invalid"),
    "signature, none": (SignedRoster(FIRST), None, PIN, "roster-invalid"),
    "signature, too few": (signed(FIRST, CAROL), None, PIN, "roster-invalid"),
    "signature, not valid": (BAD, None, PIN, "roster-invalid"),
    "signature, a stranger's instead": (signed(FIRST, CAROL, STRANGER), None, PIN, "roster-invalid"),
    "signature, a stranger's besides": (signed(SECOND, CAROL, DAVE, STRANGER), ONE, PIN, "roster-invalid"),
    "signature, too few old": (signed(NEW_PEOPLE, CAROL, ERIN), ONE, PIN, "roster-invalid"),
    "signature, old ones only": (signed(NEW_PEOPLE, CAROL, DAVE), ONE, PIN, "roster-invalid"),
    "signature, new ones only": (signed(replace(SECOND, coordinators=(ERIN.public,), needed=1), ERIN), ONE,
                                 PIN, "roster-invalid"),
    "signature, less needed than before": (signed(replace(SECOND, needed=1), CAROL), ONE, PIN, "roster-invalid"),
    "signature, of the epoch before": (replace(ONE, roster=SECOND), ONE, PIN, "roster-invalid"),
    "signature, of a namesake": (signed(replace(SECOND, coordinators=(CAROL.public, replace(ERIN.public, name="dave"))), CAROL,
                                        replace(ERIN, name="dave")), ONE, PIN, "roster-invalid"),
}  # fmt: skip


@pytest.mark.parametrize("case", TRUST)
def test_a_roster_is_trusted_by_approval_and_then_by_the_signatures_of_the_one_before(case):
    new, current, pinned, code = TRUST[case]
    now = NOW + 3 * DAY
    if code:
        error = refused(lambda: accept(new, current=current, pinned=pinned, now=now))
        assert error.code == code, error
        assert error.exit_status == 4
        return
    accepted = accept(new, current=current, pinned=pinned, now=now)
    assert accepted.roster == new.roster
    assert accept(new, current=accepted, pinned=pinned, now=now) is accepted


def test_what_is_accepted_holds_no_signature_that_was_not_checked():
    forged = replace(
        signed(NEW_PEOPLE, CAROL, ERIN), signatures={**signed(NEW_PEOPLE, CAROL, ERIN).signatures, "dave": bytes(64)}
    )
    accepted = accept(forged, current=None, pinned=NEW_PEOPLE.digest(), now=NOW + 3 * DAY)
    assert sorted(accepted.signatures) == ["carol", "erin"]


@pytest.mark.parametrize(
    ("now", "in_force"),
    [
        (NOW - 901, False),
        (NOW - 900, True),
        (NOW, True),
        (FIRST.not_after, True),
        (FIRST.not_after + 1, False),
        (FIRST.not_after + 900, False),
        (NOW - 2 * 365 * DAY, False),
    ],
)
def test_a_roster_holds_to_its_end_and_from_a_quarter_of_an_hour_before_it_begins(now, in_force):
    for current in (None, ONE):
        if in_force:
            assert accept(ONE, current=current, pinned=PIN, now=now) == ONE
            continue
        error = refused(lambda at=current: accept(ONE, current=at, pinned=PIN, now=now))
        assert error.code == "roster-expired"
        assert "clock" in error.hint
        assert ("expired" in str(error)) == (now > NOW)


def test_what_is_not_trusted_is_not_called_expired():
    assert refused(lambda: accept(ONE, current=None, pinned="1" * 64, now=0)).code == "roster-invalid"


def test_one_signature_more_than_needed_does_not_mend_a_wrong_one():
    three = replace(FIRST, coordinators=(CAROL.public, DAVE.public, ERIN.public))
    good = signed(three, CAROL, DAVE, ERIN)
    good.verify(three.coordinators, 2)
    assert good.signers(three.coordinators) == ("carol", "dave", "erin")
    with pytest.raises(RosterInvalid, match="erin is not valid"):
        replace(good, signatures={**good.signatures, "erin": bytes(64)}).verify(three.coordinators, 2)


# --- what a keeper adds: the pinned server, this release and its suite -----------------------------------------------


def keeper(memory=None, *, version="0.1.0", pin=PIN, server=SERVER.public):
    return RosterKeeper(memory or DictMemory(), server, lambda: pin, lambda: NOW, version)


def approved(**changes):
    """A signed roster with these fields, and a keeper whose operator approved just that one."""
    made = signed(replace(FIRST, **changes), CAROL, DAVE)
    return made, made.roster.digest()


@pytest.mark.parametrize(
    ("version", "asked", "taken"),
    [
        ("0.1.0", "0.1.0", True),
        ("0.1.0", "0.0.9", True),
        ("0.10.0", "0.9.9", True),  # numbers, not text
        ("1.0.0", "0.99.99", True),
        ("0.1.0", "0.1.1", False),
        ("0.1.9", "0.2.0", False),
        ("0.9.9", "0.10.0", False),
        ("0.9.9", "1.0.0", False),
    ],
)
def test_a_roster_that_asks_for_a_newer_release_is_refused_and_not_kept(version, asked, taken):
    made, pin = approved(min_version=asked)
    memory = DictMemory()
    if taken:
        assert keeper(memory, version=version, pin=pin).take(made.dump()) == made
        return
    error = refused(lambda: keeper(memory, version=version, pin=pin).take(made.dump()))
    assert error.code == "version-unsupported"
    assert asked in str(error)
    assert memory.values == {}


@pytest.mark.parametrize("part", ["signing", "kem"])
def test_a_roster_with_another_server_than_the_pinned_one_is_refused_whichever_key_differs(part):
    """Half a server is another server: what is sealed to a foreign sealing key is read by whoever holds it."""
    foreign = replace(SERVER.public, **{part: getattr(OTHER_SERVER.public, part)})
    made, pin = approved(server=foreign, fed=federation(foreign))
    memory = DictMemory()
    error = refused(lambda: keeper(memory, pin=pin).take(made.dump()))
    assert (error.code, memory.values) == ("roster-invalid", {})
    assert "another server" in str(error)


def test_a_roster_without_this_releases_suite_is_refused_and_not_kept():
    made, pin = approved(suites=(2, 3))
    memory = DictMemory()
    assert refused(lambda: keeper(memory, pin=pin).take(made.dump())).code == "suite-downgrade"
    assert memory.values == {}


def test_what_a_keeper_took_is_known_to_the_next_one_and_no_older_epoch_comes_back():
    memory = DictMemory()
    keeper(memory).take(ONE.dump())
    later = RosterKeeper(memory, SERVER.public, lambda: PIN, lambda: NOW + 3 * DAY, "0.1.0")
    later.take(signed(SECOND, CAROL, DAVE).dump())
    again = RosterKeeper(memory, SERVER.public, lambda: PIN, lambda: NOW + 3 * DAY, "0.1.0")
    assert again.current == SECOND
    assert refused(lambda: again.take(ONE.dump())).code == "roster-rollback"
    assert again.current == SECOND


# --- bytes: each condition of the format ---------------------------------------------------------------------------

PLAIN = json.loads(ONE.dump())
WEAK = base64.b64encode(bytes([1]) + bytes(31) + SITES["a"].public.kem).decode()
NO_KEM = base64.b64encode(SITES["a"].public.signing + b"\xff" * 1216).decode()


def rewritten(**fields):
    """The bytes with other fields in the roster, canonical again; None takes a field away."""
    inner = {k: v for k, v in {**PLAIN["roster"], **fields}.items() if v is not None}
    return outer(roster=inner)


def outer(**fields):
    return json.dumps({**PLAIN, **fields}, sort_keys=True, separators=(",", ":")).encode()


def site(line, status="active"):
    return {"public": line, "status": status}


LINES = {n: i.public.line() for n, i in SITES.items()} | {"carol": CAROL.public.line(), "dave": DAVE.public.line()}
SPACES = LINES["a"].replace(" ", "  ")
TWICE = replace(SITES["a"].public, name="z").line()
MALFORMED = {
    "too-long": [b"{" + b" " * (4 << 20)],
    "json": [b"", b"\0", b"[]", b"[" * 100_000, b"1", ONE.dump() + b"\n", ONE.dump()[:-1], ONE.dump().replace(b":", b": ", 1),
             ONE.dump().replace(b'"epoch":1', b'"epoch":1,"epoch":1'), ONE.dump().replace(b'"epoch":1', b'"epoch":NaN')],
    "outer-fields": [outer(more=1), FIRST.dump(), outer(signatures=[])],
    "version": [rewritten(v=3), outer(roster={"v": 3, "new": 1})],
    "fields": [rewritten(more=1), rewritten(v=True), rewritten(v=None), outer(roster=[]), outer(roster="x"),
               *(rewritten(**{f: None}) for f in PLAIN["roster"])],
    "count": [rewritten(sites=[]), rewritten(sites=[0] * 257), rewritten(sites={}), rewritten(coordinators=[]),
              rewritten(coordinators=[0] * 17), rewritten(suites=[]), rewritten(suites=list(range(1, 18))), rewritten(suites=1)],
    "key": [*(rewritten(sites=[site(x)]) for x in ("", 1, "x", LINES["a"][:-8], LINES["a"][:-1], SPACES, LINES["a"] * 2,
              LINES["a"] + "\n", f"fedlora-public-v1 a {NO_KEM}", LINES["a"].replace(" a ", " A "))),
            rewritten(server=7), rewritten(sites=["a"]), rewritten(sites=[{"public": LINES["a"]}])],
    "small-order": [rewritten(sites=[site(f"fedlora-public-v1 a {WEAK}")]),
                    rewritten(coordinators=[f"fedlora-public-v1 c {WEAK}"]),
                    rewritten(server=f"fedlora-public-v1 server {WEAK}")],
    "range": [rewritten(**{f: v}) for f, v in (
        ("epoch", 0), ("epoch", 1.0), ("epoch", True), ("epoch", "1"), ("epoch", 1 << 53), ("epoch", 2), ("previous", "1" * 64),
        ("previous", "0" * 63), ("previous", 0), ("not_before", -1), ("not_before", FIRST.not_after), ("not_after", 1 << 60),
        ("min_version", "1.0"), ("min_version", "01.0.0"), ("min_version", "1.0.0\n"), ("min_version", 1), ("suites", [0]),
        ("suites", [256]), ("suites", [True]), ("suites", [2, 1]), ("suites", [1, 1]), ("max_colluding", 0), ("max_colluding", 2),
        ("min_cohort", 2), ("min_cohort", 257), ("needed", 0), ("needed", 3), ("needed", 17),
        ("sites", [site(LINES["a"], "paused")]), ("sites", [site(LINES["a"], [])]),
        ("sites", [site(LINES["a"].replace(" a ", " -a "))]),
        ("sites", [site(LINES["a"].replace(" a ", " server "))]))],
    "order": [rewritten(sites=[site(LINES["b"]), site(LINES["a"])]), rewritten(coordinators=[LINES["dave"], LINES["carol"]]),
              rewritten(sites=[site(LINES["a"]), site(LINES["a"])])],
    "one-key-twice": [rewritten(sites=[site(LINES["a"]), site(TWICE)]), rewritten(sites=[site(LINES["carol"])]),
                      rewritten(sites=[site(SERVER.public.line().replace("server", "z"))]),
                      rewritten(sites=[site(LINES["a"]), site(replace(SITES["b"].public, kem=SITES["a"].public.kem).line())])],
    "federation": [rewritten(fed="1" * 64), rewritten(fed=1), rewritten(server=SITES["d"].public.line()),
                   rewritten(server=LINES["d"].replace(" d ", " server "))],
    "signature-form": [outer(signatures={"carol": x}) for x in ("", 1, "x", "AA==", base64.b64encode(bytes(65)).decode(),
                                                                base64.b64encode(bytes(64)).decode().replace("A==", "B=="))]
                      + [outer(signatures={f"c{i}": base64.b64encode(bytes(64)).decode() for i in range(33)}),
                         outer(signatures={"../x": base64.b64encode(bytes(64)).decode()})],
}  # fmt: skip
CODES = dict(re.findall(r"^\| `roster-([a-z0-9-]+)`: .* \| `([a-z-]+)` \|$", FORMAT, re.MULTILINE))


@pytest.mark.parametrize("condition", MALFORMED)
def test_a_malformed_roster_is_refused_with_the_code_of_the_format(condition):
    for raw in MALFORMED[condition]:
        assert refused(lambda blob=raw: SignedRoster.parse(blob)).code == CODES[condition], raw[:200]


def test_every_condition_of_the_format_is_tried_here():
    trust = {case.partition(",")[0] for case, (*_, code) in TRUST.items() if code}
    assert set(CODES) == set(MALFORMED) | trust | {"time"}
    assert all(code == CODES[case.partition(",")[0]] for case, (*_, code) in TRUST.items() if code)


def test_too_many_sites_are_refused_before_a_single_key_is_looked_at(monkeypatch):
    monkeypatch.setattr(module, "_public", lambda line: pytest.fail("looked"))
    assert refused(lambda: SignedRoster.parse(rewritten(sites=[site(LINES["a"])] * 257))).code == "roster-invalid"


def test_256_sites_fit_and_257_do_not():
    many = [Identity.generate(f"s{i:03}") for i in range(257)]
    full = replace(FIRST, sites=tuple(Member(i.public, "active") for i in many[:256]))
    raw = signed(full, CAROL, DAVE).dump()
    assert len(raw) < 1 << 20
    assert SignedRoster.parse(raw).roster.index("s255") == 256
    assert refused(lambda: next_epoch(full, add=[many[256].public], now=NOW)).code == "roster-invalid"


# --- bytes: everything else ---------------------------------------------------------------------------------------

RAW = ONE.dump()


def believed(raw):
    """What comes of these bytes where this very roster is approved."""
    found = SignedRoster.parse(raw)
    found.verify(FIRST.coordinators, FIRST.needed)
    return accept(found, current=None, pinned=PIN, now=NOW)


@given(st.integers(0, len(RAW) - 1), st.integers(1, 255))
@settings(max_examples=600, deadline=None)
def test_every_flipped_byte_is_refused(at, mask):
    try:
        found = believed(RAW[:at] + bytes([RAW[at] ^ mask]) + RAW[at + 1 :])
    except FedLoRAError:
        return
    assert found == ONE


@given(st.integers(0, len(RAW) - 1))
@settings(max_examples=100, deadline=None)
def test_every_truncation_is_refused(end):
    with pytest.raises(FedLoRAError):
        believed(RAW[:end])


@given(st.binary(max_size=2000))
@settings(max_examples=200, deadline=None)
def test_random_bytes_are_refused_by_name(junk):
    for raw in (junk, b'{"roster":' + junk, RAW + junk if junk else junk):
        with pytest.raises(FedLoRAError):
            SignedRoster.parse(raw)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@given(st.sampled_from(sorted(PLAIN["roster"])), JSON)
@settings(max_examples=300, deadline=None)
def test_any_value_in_any_field_is_refused_by_name_or_parsed_as_it_is(name, value):
    raw = outer(roster={**PLAIN["roster"], name: value})
    try:
        found = SignedRoster.parse(raw)
    except FedLoRAError:
        return
    assert found.dump() == raw


# --- vectors -----------------------------------------------------------------------------------------------------


def of_the_vectors():
    """Both rosters of the folder, made again: signing is deterministic (RFC 8032)."""
    keys = identities()
    carol, dave = replace(keys["mallory"], name="carol"), replace(keys["run"], name="dave")
    one = Roster(
        fed=federation(keys["server"].public),
        epoch=1,
        previous="0" * 64,
        not_before=1_800_000_000,
        not_after=1_831_536_000,
        min_version="0.1.0",
        suites=(1,),
        max_colluding=1,
        min_cohort=3,
        server=keys["server"].public,
        coordinators=(carol.public, dave.public),
        needed=2,
        sites=tuple(Member(keys[n].public, "active") for n in ("a", "b")),
    )
    two = next_epoch(one, revoke=["b"], now=1_810_000_000)
    return {"epoch_1": signed(one, carol, dave), "epoch_2": signed(two, carol, dave)}


def test_the_vectors_are_what_is_made_today():
    made = of_the_vectors()
    assert sorted(made) == [p.stem for p in VECTORS]
    for path in VECTORS:
        head, blob = read_vector(path)
        assert made[path.stem].dump() == blob
        assert made[path.stem].roster.digest() == head["digest"]
        assert SignedRoster.parse(blob) == made[path.stem]
        assert path.stat().st_size < 40_000
    one, two = made["epoch_1"], made["epoch_2"]
    assert accept(two, current=one, pinned=one.roster.digest(), now=1_810_000_000) == two


@pytest.mark.parametrize("path", VECTORS, ids=lambda p: p.stem)
def test_a_roster_can_be_verified_with_nothing_but_the_specification(path):
    head, blob = read_vector(path)
    value = json.loads(blob)
    inner = json.dumps(value["roster"], sort_keys=True, separators=(",", ":")).encode()
    digest = hashlib.sha256(b"fedlora/v1/roster\0" + inner).digest()
    assert digest.hex() == head["digest"]
    coordinators = {line.split()[1]: base64.b64decode(line.split()[2]) for line in value["roster"]["coordinators"]}
    assert len(value["signatures"]) == value["roster"]["needed"] == 2
    for name, signature in value["signatures"].items():
        key = Ed25519PublicKey.from_public_bytes(coordinators[name][:32])
        key.verify(base64.b64decode(signature), b"fedlora/v1/roster-signature\0" + digest)
    server = base64.b64decode(value["roster"]["server"].split()[2])
    assert value["roster"]["fed"] == hashlib.sha256(b"fedlora/v1/genesis\0" + server[:32]).hexdigest()
