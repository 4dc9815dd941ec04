"""Every attack of the table is named, and the round goes on with the others."""

import hashlib
import struct
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.core.adapter import Update
from fedlora.core.errors import FedLoRAError, KeyFileError
from fedlora.core.messages import Reply, Request, Task
from fedlora.core.plan import Aggregate, Protect
from fedlora.formats import update as wire
from fedlora.formats.envelope import Header, match, open_envelope, parse, seal, verify
from fedlora.formats.keys import Identity, PublicIdentity, load_identity, load_public
from fedlora.formats.state.memory import DictMemory
from fedlora.lab.testing import TOY_BASE, server_link, site_link, toy_adapter, toy_layout, toy_plan
from fedlora.protect.link import Context
from fedlora.protect.sealed import SealedServer, SealedSite

SERVER, RUN, STRANGER = Identity.generate("server"), Identity.generate("run"), Identity.generate("mallory")
SITES = {n: Identity.generate(n) for n in ("a", "b", "c")}
PLAN = toy_plan().canonical()


def entropy(n: int) -> bytes:
    return bytes(range(n))  # a fixed file key is fine here: HPKE draws its own randomness


def server(**changes) -> SealedServer:
    publics = {n: i.public for n, i in SITES.items()}
    dtype = changes.pop("dtype", "bfloat16")
    link = server_link(SERVER, RUN, publics, DictMemory(), entropy=entropy)
    return SealedServer(replace(link, **changes), dtype)


def site(name: str, **changes) -> SealedSite:
    link = site_link(SITES.get(name, STRANGER), SERVER.public, DictMemory(), entropy=entropy)
    return SealedSite(replace(link, **changes))


def task(**changes) -> Task:
    return replace(Task("1" * 64, PLAN, TOY_BASE, "train", 1, 0, toy_adapter(2.0)), **changes)


def work(_: Task, admitted=lambda: None) -> Update:
    admitted()
    return Update(np.full(toy_layout().size, 0.5, np.float32), 3, {"eval/nats": 65536})


class Notes:
    def __init__(self):
        self.accepted, self.rejected = {}, {}

    def accept(self, name, update):
        self.accepted[name] = update

    def reject(self, name, error):
        self.rejected[name] = error.code


def exchange(answers, *, at=None, todo=None) -> Notes:
    """One round; ``answers`` maps a request to the replies of its site."""
    notes = Notes()
    talk = (at or server()).collect(todo or task(), sorted(SITES), notes)
    requests = next(talk)
    with pytest.raises(StopIteration):
        talk.send(iter([reply for r in requests for reply in answers(r)]))
    return notes


def honest(request) -> Reply:
    return Reply(request.site, site(request.site).answer(request, work))


def attacked(attack, **where) -> Notes:
    """Site b lies, a and c do not."""
    return exchange(lambda r: attack(r) if r.site == "b" else [honest(r)], **where)


def test_every_update_arrives_as_it_was_sent():
    notes = exchange(lambda r: [honest(r)])
    assert sorted(notes.accepted) == ["a", "b", "c"]
    assert notes.rejected == {}
    assert all((u.delta == np.float32(0.5)).all() and u.weight == 3 for u in notes.accepted.values())


def test_the_broadcast_is_one_body_for_all():
    assert len({r.body for r in next(server().collect(task(), sorted(SITES), Notes()))}) == 1


def flip(body: bytes, at: int) -> bytes:
    return body[:at] + bytes([body[at] ^ 1]) + body[at + 1 :]


def resealed(request, **fields) -> Reply:
    """Site b's own reply with some header fields changed, signed again by its own key."""
    good = parse(honest(request).body, max_bytes=1 << 20)
    payload = bytes(open_envelope(good, RUN))
    blob, _ = seal(payload, header=replace(good.header, **fields), signer=SITES["b"], recipients=[RUN.public], entropy=entropy)
    return Reply("b", blob)


def _forged(request) -> bytes:
    """A genuine header, signed by a key that is not b's."""
    good = parse(honest(request).body, max_bytes=1 << 20)
    blob, _ = seal(bytes(open_envelope(good, RUN)), header=good.header, signer=STRANGER, recipients=[RUN.public], entropy=entropy)
    return blob


def mislabeled(request) -> Reply:
    """Values of another dtype than the header says."""
    good = parse(honest(request).body, max_bytes=1 << 20)
    payload = wire.dump_update(work(task()), toy_layout(), dtype="int8")
    header = replace(good.header, len=len(payload), sha=hashlib.sha256(payload).hexdigest())
    blob, _ = seal(payload, header=header, signer=SITES["b"], recipients=[RUN.public], entropy=entropy)
    return Reply("b", blob)


def other_task(request, **changes) -> Reply:
    """A genuine answer to another task."""
    elsewhere = next(server().collect(task(**changes), ["b"], Notes()))[0]
    return Reply("b", site("b").answer(elsewhere, work))


ATTACKS = {
    "forged": (lambda r: [Reply("b", _forged(r))], "bad-signature"),
    "unknown-site": (lambda r: [resealed(r, sender="mallory")], "unknown-site"),
    "somebody-else": (lambda r: [Reply("b", site("a").answer(replace(r, site="a"), work))], "wrong-context"),
    "truncated": (lambda r: [Reply("b", honest(r).body[:-1])], "truncated"),
    "empty": (lambda r: [Reply("b", b"")], "truncated"),
    "trailing": (lambda r: [Reply("b", honest(r).body + b"\0")], "trailing-bytes"),
    "oversized": (lambda r: [Reply("b", honest(r).body + bytes(1 << 20))], "oversized"),
    "lies-about-its-size": (
        lambda r: [Reply("b", honest(r).body[:14] + struct.pack(">Q", 1 << 60) + honest(r).body[22:])],
        "oversized",
    ),
    "not-ours": (lambda r: [Reply("b", b"X" * 3000)], "malformed-header"),
    "suite": (lambda r: [Reply("b", flip(honest(r).body, 5))], "suite-downgrade"),
    "version": (lambda r: [Reply("b", flip(honest(r).body, 4))], "version-unsupported"),
    "signature": (lambda r: [Reply("b", flip(honest(r).body, -1 + len(honest(r).body)))], "bad-signature"),
    "wrong-round": (lambda r: [other_task(r, round=2)], "wrong-round"),
    "wrong-attempt": (lambda r: [other_task(r, attempt=1)], "wrong-round"),
    "wrong-run": (lambda r: [other_task(r, run="2" * 64)], "wrong-run"),
    "wrong-plan": (lambda r: [other_task(r, plan=toy_plan(rounds=9).canonical())], "wrong-plan"),
    "wrong-base": (lambda r: [resealed(r, base="3" * 64)], "wrong-base"),
    "wrong-global": (lambda r: [other_task(r, adapter=toy_adapter(1.0))], "wrong-global"),
    "wrong-layout": (lambda r: [resealed(r, layout="3" * 64)], "wrong-layout"),
    "wrong-federation": (lambda r: [resealed(r, fed="3" * 64)], "wrong-federation"),
    "wrong-direction": (lambda r: [Reply("b", r.body)], "unknown-site"),
    "turned-round": (lambda r: [resealed(r, dir="down")], "wrong-direction"),
    "wrong-recipient": (lambda r: [resealed(r, to_key="3" * 64)], "wrong-recipient"),
    "wrong-codec": (lambda r: [resealed(r, codec="update/1/float32")], "wrong-context"),
    "wrong-digest": (lambda r: [resealed(r, sha="3" * 64)], "payload-mismatch"),
    "wrong-dtype": (lambda r: [mislabeled(r)], "wire"),
    "error": (lambda r: [Reply("b", error="data")], "remote"),
}


@pytest.mark.parametrize("name", ATTACKS)
def test_an_attack_is_named_and_the_round_goes_on(name):
    attack, code = ATTACKS[name]
    notes = attacked(attack)
    assert notes.rejected == {"b": code}
    assert sorted(notes.accepted) == ["a", "c"]


def test_a_reply_of_an_earlier_exchange_is_replayed():
    at, kept = server(), {}

    def first(request):
        kept[request.site] = honest(request)
        return [kept[request.site]]

    exchange(first, at=at)
    again = exchange(lambda r: [kept["b"]] if r.site == "b" else [Reply(r.site, site(r.site).answer(r, work))], at=at)
    assert again.rejected["b"] == "replayed"


def test_another_body_under_the_same_number_is_equivocation():
    at = server()
    exchange(lambda r: [honest(r)], at=at)
    # A site that was restored from a backup counts from one again, with a fresh body.
    assert exchange(lambda r: [honest(r)], at=at).rejected == dict.fromkeys("abc", "equivocation")


def test_the_first_of_two_replies_counts():
    notes = attacked(lambda r: [honest(r), Reply("b", b"junk")])
    assert "b" in notes.accepted
    assert notes.rejected == {}


def test_a_stranger_nobody_asked_is_not_even_noted():
    notes = exchange(lambda r: [honest(r), Reply("zoe", b"junk")])
    assert sorted(notes.accepted) == ["a", "b", "c"]
    assert notes.rejected == {}


def test_the_same_request_twice_is_answered_twice():
    request = next(server().collect(task(), ["a"], Notes()))[0]
    here = site("a")
    one, two = here.answer(request, work), here.answer(request, work)
    assert parse(two, max_bytes=1 << 20).header.seq == parse(one, max_bytes=1 << 20).header.seq + 1
    assert parse(two, max_bytes=1 << 20).header.prev == parse(one, max_bytes=1 << 20).digest


def test_a_site_refuses_an_older_request():
    at, here = server(), site("a")
    old = next(at.collect(task(), ["a"], Notes()))[0]
    new = next(at.collect(task(attempt=1), ["a"], Notes()))[0]
    here.answer(new, work)
    with pytest.raises(FedLoRAError) as error:
        here.answer(old, work)
    assert error.value.code == "replayed"


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"server": STRANGER.public}, "bad-signature"),
        ({"identity": STRANGER}, "wrong-recipient"),
        ({"max_request_bytes": 100}, "oversized"),
    ],
)
def test_a_site_refuses_what_is_not_from_its_server_or_not_for_it(changes, code):
    request = next(server().collect(task(), ["a"], Notes()))[0]
    with pytest.raises(FedLoRAError) as error:
        site("a", **changes).answer(request, work)
    assert error.value.code == code


SECRET = toy_plan(
    min_sites=3, aggregate=Aggregate(weighting="uniform"), protect=Protect(mode="secagg", secagg={"first_range": 1.0})
)
LIES = {
    "run": {"run": "2" * 64},
    "plan": {"plan": toy_plan(rounds=9).canonical()},
    "base": {"base": "3" * 64},
    "kind": {"kind": "evaluate"},
    "round": {"round": 2},
    "attempt": {"attempt": 1},
    "adapter": {"adapter": toy_adapter(1.0)},
}


def refused_without_work(request) -> str:
    worked = []
    with pytest.raises(FedLoRAError) as error:
        site("a").answer(request, lambda todo, admitted: worked.append(todo) or work(todo))
    assert worked == []
    return error.value.code


@pytest.mark.parametrize("lie", LIES)
def test_a_site_does_no_work_for_a_task_under_the_header_of_another(lie):
    """Signed by the server itself: what its envelope says that it is about, and what lies in it."""
    payload = wire.dump_task(task(**LIES[lie]), reply_key=RUN.public.kem)
    body = server().link.seal(Context.of(task()), payload, phase="train", codec="task/1", to=["a"])
    assert refused_without_work(Request("a", "train", body, 1 << 20)).startswith("wrong-")


def test_a_site_gives_no_sealed_update_for_a_plan_that_promises_secure_aggregation():
    request = next(server().collect(task(plan=SECRET.canonical()), ["a"], Notes()))[0]
    assert refused_without_work(request) == "wrong-context"


def test_a_site_does_no_work_for_a_flipped_request():
    request = next(server().collect(task(), ["a"], Notes()))[0]

    def never(_):
        raise AssertionError("worked")

    for at in range(0, len(request.body), 97):
        with pytest.raises(FedLoRAError):
            site("a").answer(replace(request, body=flip(request.body, at)), never)


ONE = honest(next(server().collect(task(), ["b"], Notes()))[0]).body


def opened(blob: bytes) -> bytes:
    envelope = parse(blob, max_bytes=1 << 20)
    verify(envelope, SITES["b"].public)
    match(envelope.header, sender="b")
    return bytes(open_envelope(envelope, RUN))


def test_every_truncation_is_refused():
    for end in range(len(ONE)):
        with pytest.raises(FedLoRAError):
            opened(ONE[:end])


def test_every_flipped_byte_is_refused():
    assert opened(ONE)
    for at in range(len(ONE)):
        with pytest.raises(FedLoRAError):
            opened(flip(ONE, at))


@given(st.binary(max_size=4000))
@settings(max_examples=300, deadline=None)
def test_random_bytes_are_refused_by_name(junk):
    for blob in (junk, ONE[:22] + junk, b"FLSE\x01\x01\0\0" + junk):
        with pytest.raises(FedLoRAError):
            opened(blob)


@given(st.integers(0, 5), st.integers(-2, 2))
@settings(max_examples=20, deadline=None)
def test_payloads_around_the_chunk_size_survive(chunks, more):
    payload = bytes(max(chunks * (1 << 20) + more, 0))
    fields = parse(ONE, max_bytes=1 << 20).header
    header = replace(fields, len=len(payload), sha=__import__("hashlib").sha256(payload).hexdigest())
    blob, _ = seal(payload, header=header, signer=SITES["b"], recipients=[RUN.public, SERVER.public], entropy=entropy)
    envelope = parse(blob, max_bytes=1 << 23)
    verify(envelope, SITES["b"].public)
    assert open_envelope(envelope, RUN) == payload == open_envelope(envelope, SERVER)


def test_the_key_encapsulation_is_x_wing():
    """Its ciphertext is ML-KEM-768's 1088 bytes and X25519's 32 (draft-connolly-cfrg-xwing-kem)."""
    stanza = next(iter(parse(ONE, max_bytes=1 << 20).stanzas.values()))
    assert len(stanza) == 1088 + 32 + 32 + 16


def test_a_header_has_exactly_its_fields():
    raw = parse(ONE, max_bytes=1 << 20).raw_header
    assert Header.parse(raw).dump() == raw
    sequences = (b'"seq":1.0,', b'"seq":true,', b'"seq":-1,', b"")
    changed = [raw.replace(b'"seq":1,', other) for other in sequences]
    for bad in (*changed, raw[:-1] + b',"x":1}', raw + b" ", b"[]", b"[" * 5000):
        with pytest.raises(FedLoRAError):
            Header.parse(bad)


# --- keys ---------------------------------------------------------------------------------------------------


def test_keys_survive_their_files_and_show_nothing(tmp_path):
    identity = SITES["a"]
    identity.save(tmp_path / "a.key")
    again = load_identity(tmp_path / "a.key")
    assert again.public == identity.public
    assert (tmp_path / "a.key").stat().st_mode & 0o777 == 0o600
    secret = identity.mlkem.private_bytes_raw().hex()
    assert secret not in repr(identity)
    assert repr(identity).startswith("Identity('a'")
    with pytest.raises(KeyFileError, match="exists"):
        identity.save(tmp_path / "a.key")


def test_a_key_that_others_can_read_is_refused(tmp_path):
    SITES["a"].save(tmp_path / "a.key")
    (tmp_path / "a.key").chmod(0o640)
    with pytest.raises(KeyFileError, match="by others"):
        load_identity(tmp_path / "a.key")


@pytest.mark.parametrize(
    "damage", [lambda t: "", lambda t: t[:200], lambda t: t.replace("fedlora-key-v1", "x"), lambda t: t.replace("A", "B")]
)
def test_a_damaged_key_is_refused(tmp_path, damage):
    SITES["a"].save(tmp_path / "a.key")
    text = (tmp_path / "a.key").read_text()
    (tmp_path / "a.key").write_text(damage(text))
    with pytest.raises(KeyFileError):
        load_identity(tmp_path / "a.key")


def test_a_public_key_survives_its_line(tmp_path):
    (tmp_path / "a.pub").write_text(SITES["a"].public.line() + "\necdsa-sha2-nistp384 AAAA\n")
    assert load_public(tmp_path / "a.pub") == SITES["a"].public
    for bad in ("", "x", SITES["a"].public.line()[:-9], SITES["a"].public.line().replace("v1", "v2")):
        (tmp_path / "a.pub").write_text(bad)
        with pytest.raises(KeyFileError):
            load_public(tmp_path / "a.pub")


@pytest.mark.parametrize(
    "point",
    [
        bytes([1]) + bytes(31),
        bytes(32),
        bytes([0xEC]) + b"\xff" * 30 + b"\x7f",
        bytes([0xED]) + b"\xff" * 30 + b"\x7f",
        b"\xff" * 32,
    ],
)
def test_a_key_for_which_anybody_can_sign_is_refused(point):
    with pytest.raises(FedLoRAError) as error:
        PublicIdentity("evil", point, SITES["a"].public.kem)
    assert error.value.code == "bad-signature"


def test_wire_limits_are_those_of_the_server():
    blob = wire.dump_update(work(task()), toy_layout(), dtype="bfloat16")
    assert len(blob) <= wire.max_update_bytes(toy_layout(), dtype="bfloat16")


def test_a_sealing_key_to_which_nothing_can_be_sealed_is_refused():
    """One such key among the recipients would otherwise end every round for all sites."""
    good = SITES["a"].public
    for point in (bytes(32), b"\x01" + bytes(31)):
        with pytest.raises(KeyFileError):
            PublicIdentity("a", good.signing, good.kem[:1184] + point)
