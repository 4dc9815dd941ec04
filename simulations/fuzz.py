"""Damaged messages for every parser of secure aggregation and of the roster: `python simulations/fuzz.py --inputs 1000000`.

Law: a parser gives back a value that stands for just these bytes, or a FedLoRAError, or None where its docstring says so; and it
allocates no more than the length of its input warrants. Inputs are valid messages with flipped bits, cuts, splices and changed
lengths; half of them get a right checksum or signature again afterwards, to come past the first gate.

JSON lines: parser, inputs, seconds, refused, accepted, codes of the refusals, peak_bytes. The first broken law ends it with
status 1, the seed and the input in hex. `--guided --only PARSER`: atheris (`pip install atheris`) looks for inputs by coverage.
"""

from __future__ import annotations

import argparse
import base64
import hashlib
import json
import random
import sys
import tempfile
import time
import traceback
import tracemalloc
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.asymmetric.mlkem import MLKEM768PrivateKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.core.canonical import canonical
from fedlora.core.errors import BadShare, FedLoRAError
from fedlora.core.messages import Task
from fedlora.core.plan import Protect
from fedlora.core.reader import Reader
from fedlora.formats import update as wire
from fedlora.formats.epochs import first_epoch
from fedlora.formats.keys import Identity, PublicIdentity
from fedlora.formats.signed_roster import SignedRoster
from fedlora.formats.state.memory import DictMemory
from fedlora.lab.testing import TOY_BASE, toy_adapter, toy_plan
from fedlora.protect.ledger import Base, Contribution, ContributionStore, Ledger
from fedlora.protect.secagg.giving import reveal
from fedlora.protect.secagg.protocol.cohort import SIGNATURE, Advert, Cohort, SessionRequirements, sign
from fedlora.protect.secagg.protocol.complaints import (
    Complaint,
    dump_complaints,
    dump_opened,
    read_complaints,
    read_opened,
    read_settled,
)
from fedlora.protect.secagg.protocol.dealing import Inbox, Opened, Secrets, advertise, deal, opened, receive
from fedlora.protect.secagg.protocol.numbers import Numbers
from fedlora.protect.secagg.protocol.opening import Deal, parse_reveal, relay
from fedlora.protect.secagg.protocol.rings import PROFILES, pack, packed_bytes, unpack
from fedlora.protect.secagg.protocol.votes import COMMIT, Delivered, certificate, read_certificate, sign_vote, vote_text
from fedlora.protect.secagg.records import Encoded, Records, Session, Used
from fedlora.protect.secagg.terms import Offer

SITES = ("site-1", "site-2", "site-3", "site-4")
RULES = SessionRequirements(max_colluding=1, min_cohort=3)
MOST_BYTES = 1 << 20
"""Most that a parser may allocate, besides 64 times the length of its input (a number in JSON is an object of Python)."""


class LawBroken(Exception):
    """A parser did what it must not."""


@dataclass(frozen=True)
class Parser:
    """What is fuzzed.

    Attributes:
        samples: valid inputs.
        again: parses, and gives the bytes that the result stands for; None: refused without an error.
        lengths: (offset, size) of counts and lengths in the samples.
        repair: makes checksum or signature right again, as far as the bytes still have the shape for it.
    """

    name: str
    samples: Sequence[bytes]
    again: Callable[[bytes], bytes | None]
    lengths: Sequence[tuple[int, int]] = ()
    repair: Callable[[bytes, random.Random], bytes] = lambda blob, rng: blob


def check(parser: Parser, blob: bytes) -> tuple[str, int]:
    """The code with which the parser refuses this, empty if it takes it; the most bytes that it had allocated at once.

    Raises:
        LawBroken: it allocates too much, or takes what it would not write. Anything else is a crash.
    """
    found, code = None, "none"
    tracemalloc.start()
    try:
        found = parser.again(blob)
    except FedLoRAError as e:
        code = e.code
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    if peak > MOST_BYTES + 64 * len(blob):
        raise LawBroken(f"{peak} bytes allocated for an input of {len(blob)}")
    if found is not None and found != blob:
        raise LawBroken("accepted, but written again it is not the same")
    return code if found is None else "", peak


# --- damage ---------------------------------------------------------------------------------------------------------

_TELLING = (0, 1, 2, 3, 4, 5, 0x7F, 0x80, 0xFF, 0x7FFF, 0x8000, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF, (1 << 64) - 1)


def damaged(parser: Parser, rng: random.Random) -> bytes:
    """A valid message with one to four changes."""
    blob = bytearray(rng.choice(parser.samples))
    for _ in range(rng.choice((1, 1, 1, 2, 3, 4))):
        rng.choice(_CHANGES)(blob, parser, rng)
    return parser.repair(bytes(blob), rng) if rng.random() < 0.5 else bytes(blob)


def _flip(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    if blob:
        blob[rng.randrange(len(blob))] ^= 1 << rng.randrange(8)


def _put_byte(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    if blob:
        blob[rng.randrange(len(blob))] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, rng.randrange(256)))


def _put_number(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    """A number where a length stands, or anywhere."""
    at, size = rng.choice(parser.lengths) if parser.lengths and rng.random() < 0.7 else (rng.randrange(len(blob) + 1), 4)
    orders: tuple[Literal["big", "little"], ...] = ("big", "little")
    old, order = int.from_bytes(blob[at : at + size], "big"), rng.choice(orders)
    new = rng.choice((*_TELLING, old + 1, old - 1, len(blob), rng.getrandbits(8 * size))) % (1 << 8 * size)
    blob[at : at + size] = new.to_bytes(size, order)


def _cut(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    at = rng.randrange(len(blob) + 1)
    del blob[at : rng.choice((len(blob), at + 1, at + rng.randrange(1, 64)))]


def _grow(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    at = rng.choice((len(blob), rng.randrange(len(blob) + 1)))
    blob[at:at] = rng.choice((b"\0", bytes(32), rng.randbytes(rng.randrange(1, 64)), bytes(blob[at : at + 40])))


def _splice(blob: bytearray, parser: Parser, rng: random.Random) -> None:
    """A piece of another valid message, in place of as much of this one."""
    other = rng.choice(parser.samples)
    at, size = rng.randrange(len(blob) + 1), rng.choice((1, 2, 32, 64, 1216, rng.randrange(1, 2000)))
    start = rng.choice((at, rng.randrange(len(other) + 1)))
    piece = other[start : start + size]
    blob[at : at + len(piece)] = piece


_CHANGES = (_flip, _put_byte, _put_number, _cut, _grow, _splice)


# --- a session to take messages from: the same bytes each time, but for what HPKE draws -----------------------------


def _secret(label: str, size: int) -> bytes:
    return hashlib.shake_256(b"fedlora fuzz, public: " + label.encode()).digest(size)


@cache
def identity(name: str) -> Identity:
    """Keys that anybody can make again."""
    return Identity(
        name,
        Ed25519PrivateKey.from_private_bytes(_secret(f"{name} ed25519", 32)),
        MLKEM768PrivateKey.from_seed_bytes(_secret(f"{name} mlkem", 64)),
        X25519PrivateKey.from_private_bytes(_secret(f"{name} x25519", 32)),
    )


def known(name: str) -> PublicIdentity:
    """As :meth:`fedlora.formats.roster.Roster.site`."""
    return _roster().roster.site(name)


@cache
def _roster() -> SignedRoster:
    publics = [identity(s).public for s in SITES]
    return SignedRoster(first_epoch(identity("server").public, publics, [identity("carol").public], now=0)).sign(
        identity("carol")
    )


@cache
def _session(label: str) -> tuple[Cohort, dict[int, Secrets], dict[int, bytes], dict[int, Deal], dict[int, Inbox]]:
    secrets = {i: Secrets(_secret(f"{label} {s}", 32)) for i, s in enumerate(SITES, 1)}
    adverts = [advertise(s, bytes(32), secrets[i], key=identity(s).signing, measured=True) for i, s in enumerate(SITES, 1)]
    cohort = Cohort.of(adverts, RULES)
    raw = {i: deal(cohort, i, s, key=identity(SITES[i - 1]).signing) for i, s in secrets.items()}
    deals = {i: Deal.parse(cohort, i, r) for i, r in raw.items()}
    inboxes = {i: _receive(cohort, i, s, relay(cohort, deals, i)) for i, s in secrets.items()}
    return cohort, secrets, raw, deals, inboxes


def _receive(cohort: Cohort, own: int, secrets: Secrets, blob: bytes) -> Inbox:
    reader = Reader(blob, "relay")
    received = receive(cohort, own, secrets, reader, requirements=RULES, known=known)
    reader.end()
    if received.lies:
        raise BadShare("what was dealt does not open")
    return received.inbox


# --- the parsers ----------------------------------------------------------------------------------------------------


@cache
def parsers() -> dict[str, Parser]:
    """All of them, by name."""
    made = [_advert(), _cohort(), *_lists(), _deal(), *_complaints(), _relay(), _reveal(), _offer(), _task(), _signed_roster()]
    made += [_packed(name) for name in PROFILES] + [_numbers(), *_records()]
    return {p.name: p for p in made}


def _whole(read: Callable[[Reader], Any], blob: bytes) -> Any:
    reader = Reader(blob, "fuzz")
    found = read(reader)
    reader.end()
    return found


def _sign_again(blob: bytes, name: str) -> bytes:
    text = blob[:-SIGNATURE]
    return text + identity(name).signing.sign(b"fedlora/v1/sa/advertise\0" + hashlib.sha256(text).digest())


def _advert() -> Parser:
    """Its keys are looked at, too: a site may sign what is no key."""

    def again(blob: bytes) -> bytes:
        found: Advert = _whole(Advert.read, blob)
        found.verify(known(found.name))
        return found.dump()

    samples = [a.dump() for label in "ab" for a in _session(label)[0].adverts]
    return Parser("advert", samples, again, [(0, 1)], lambda blob, rng: _sign_again(blob, SITES[0]))


def _cohort() -> Parser:
    def again(blob: bytes) -> bytes | None:
        found = Cohort.parse(blob, RULES, known)
        return blob if Cohort.parse(found.dump(), RULES, known) == found else b""  # in any order it is the same session

    def repair(blob: bytes, rng: random.Random) -> bytes:
        parts = [blob[2 + i * size : 2 + (i + 1) * size] for i in range(len(SITES))]
        return blob[:2] + b"".join(_sign_again(p, s) for p, s in zip(parts, SITES, strict=True)) + blob[2 + 4 * size :]

    samples = [_session(label)[0].dump() for label in "ab"]
    size = (len(samples[0]) - 2) // len(SITES)
    return Parser("cohort", samples, again, [(0, 2), *((2 + i * size, 1) for i in range(4))], repair)


def _lists() -> list[Parser]:
    delivered, votes = [], []
    for label in "ab":
        cohort = _session(label)[0]
        keys = {i: identity(s).signing for i, s in enumerate(SITES, 1)}
        listed = [Delivered.make(cohort, i, _secret(f"{i}", 32), key=key) for i, key in keys.items()]
        text = vote_text(cohort.t1, COMMIT, Delivered.digest_of(listed))
        delivered += [Delivered.dump_all(listed), Delivered.dump_all(listed[1:])]
        votes += [certificate({i: sign_vote(text, key=key) for i, key in keys.items() if i != out}) for out in range(5)]
    return [
        Parser("delivered", delivered, lambda b: Delivered.dump_all(_whole(Delivered.read_all, b)), [(0, 2), (2, 2), (100, 2)]),
        Parser("certificate", votes, lambda b: certificate(_whole(read_certificate, b)), [(0, 2), (2, 2), (68, 2)]),
    ]


def _deal() -> Parser:
    cohort, _, raw, _, _ = _session("a")

    def again(blob: bytes) -> bytes:
        found = Deal.parse(cohort, 1, blob)
        out = [cohort.t1, *(part for pair in found.commitments.values() for part in pair)]
        return b"".join(out + [one.dump()[64:] for one in found.dealt.values()])

    return Parser("deal", [raw[1], _session("b")[2][1]], again, repair=lambda blob, rng: cohort.t1 + blob[32:])


def _relay() -> Parser:
    cohort, secrets, _, deals, inboxes = _session("a")

    def again(blob: bytes) -> bytes | None:
        found = _receive(cohort, 2, secrets[2], blob)
        genuine = (
            found.shares.items() <= inboxes[2].shares.items() and found.ingredients.items() <= inboxes[2].ingredients.items()
        )
        return blob if genuine and len(found.shares) >= 3 else b""

    some = {d: deals[d] for d in (1, 2, 4)}
    return Parser("relay", [relay(cohort, deals, 2), relay(cohort, some, 2)], again, [(0, 2), (2, 2)])


def _reveal() -> Parser:
    cohort, _, _, deals, inboxes = _session("a")
    counted = (1, 2, 3)
    listed = [Delivered(i, bytes(32), bytes(SIGNATURE)) for i in counted]

    def again(blob: bytes) -> bytes:
        shares = parse_reveal(cohort, deals, counted, 2, blob)
        return cohort.t1 + len(shares).to_bytes(2, "big") + b"".join(n.to_bytes(2, "big") + s for n, s in shares.items())

    samples = [reveal(cohort, inboxes[2], listed), reveal(cohort, inboxes[2], listed[:2])]
    return Parser("reveal", samples, again, [(32, 2), (34, 2), (69, 2)], lambda blob, rng: cohort.t1 + blob[32:])


@cache
def _tasks() -> list[bytes]:
    plan = toy_plan(min_sites=3, protect=Protect.model_validate({"mode": "secagg", "secagg": {"weight_unit": 100}}))
    made = [
        Task("ab" * 32, plan.canonical(), TOY_BASE, "train", 1, 0, toy_adapter()),
        Task("cd" * 32, plan.canonical(), TOY_BASE, "evaluate", 4, 2, toy_adapter(0.5)),
    ]
    return [wire.dump_task(task, reply_key=identity("run").public.kem) for task in made]


def _offer() -> Parser:
    samples = [Offer(_roster().dump(), task).dump() for task in _tasks()]
    return Parser("offer", samples, lambda b: Offer.parse(b).dump(), [(0, 4)])


def _task() -> Parser:
    """What an offer brings."""

    def again(blob: bytes) -> bytes:
        task, key = Offer(b"", blob).open_task()
        return wire.dump_task(task, reply_key=key)

    lengths = [(8, 8), *((at, 4) for at in (16, 20, 24, 28)), (len(_tasks()[0]) - 20, 4)]
    return Parser("task", _tasks(), again, lengths, lambda b, rng: b[:-16] + hashlib.sha256(b[:-16]).digest()[:16])


@cache
def _complained() -> tuple[Cohort, Complaint, dict[int, Opened]]:
    """The second of four sites has sealed to the first what does not open."""
    cohort, secrets, _, deals, _ = _session("a")
    dealt = deals[2].dealt[1]
    text = cohort.t1 + b"\0\2\0\1" + b"".join(dealt.commitments) + hashlib.sha256(bytes(1202)).digest()
    false = replace(dealt, sealed=bytes(1202), signature=sign(identity(SITES[1]).signing, "deal", text))
    return (
        cohort,
        Complaint.make(cohort, 1, {2: false.statement}, key=identity(SITES[0]).signing),
        opened(cohort, 2, secrets[2], [1]),
    )


def _complaints() -> list[Parser]:
    cohort, complaint, shown = _complained()
    due = {1: _session("a")[3][2].dealt[1].commitments}

    def verified(blob: bytes) -> bytes:
        found: Complaint = _whole(lambda reader: Complaint.read(reader, cohort), blob)
        found.verify(cohort, known)
        return found.dump()

    def asked(blob: bytes) -> bytes:
        holders = read_complaints(cohort, 2, blob, known)
        return dump_complaints(cohort, [complaint][: len(holders)])

    return [
        Parser("complaint", [complaint.dump()], verified, [(0, 2), (2, 2), (4, 2)]),
        Parser("complaints", [dump_complaints(cohort, [complaint])], asked, [(32, 2), (34, 2)]),
        Parser("opened", [dump_opened(cohort, shown)], lambda b: dump_opened(cohort, read_opened(cohort, 2, b, due)), [(32, 2)]),
        Parser(
            "settled",
            [dump_opened(cohort, {2: shown[1]}), dump_opened(cohort, {})],
            lambda b: dump_opened(cohort, _whole(lambda reader: read_settled(cohort, 1, reader), b)),
            [(32, 2), (34, 2)],
            lambda blob, rng: cohort.t1 + blob[32:],
        ),
    ]


def _signed_roster() -> Parser:
    """Few random changes leave canonical JSON behind; hence one that changes a value and writes the rest again as it was."""

    def repair(blob: bytes, rng: random.Random) -> bytes:
        value = json.loads(rng.choice(samples))
        at: Any = rng.choice((value, value["roster"], value["signatures"], *value["roster"]["sites"]))
        key = rng.choice(sorted(at) or ["carol"])
        at[key] = rng.choice((rng.choice((*_ODD, *at.values())), _other_key(at.get(key), rng)))
        return canonical(value)

    more = first_epoch(identity("server").public, [identity(s).public for s in SITES[:3]], [identity("dave").public], now=9)
    samples = [_roster().dump(), SignedRoster(more).dump()]
    return Parser("roster", samples, lambda b: SignedRoster.parse(b).dump(), repair=repair)


_ODD: tuple[Any, ...] = (None, True, 0, 1, 2, -1, 1.5, 1 << 53, "", "0" * 64, "a" * 5000, "server", [], [[]], {}, [1], [1, 255])


def _other_key(value: object, rng: random.Random) -> object:
    """A line with a key of which some bytes are zeros or another's; what is no such line as it is."""
    if not isinstance(value, str) or value.count(" ") != 2:
        return value
    head, name, text = value.split()
    raw = bytearray(base64.b64decode(text))
    at, size = rng.choice(((0, 32), (32, 1184), (1216, 32), (rng.randrange(len(raw)), 1)))
    raw[at : at + size] = rng.choice((bytes(size), b"\xff" * size, rng.randbytes(size), identity("dave").public.kem[:size]))
    return f"{head} {name} {base64.b64encode(raw).decode()}"


def _packed(name: str) -> Parser:
    profile, n = PROFILES[name], 33
    rng = np.random.default_rng(0)
    samples = [pack(rng.integers(0, 1 << profile.bits, n, dtype=np.uint64).astype(profile.word), profile.bits) for _ in range(3)]

    def again(blob: bytes) -> bytes | None:
        words = unpack(blob, n, profile.bits)
        return None if words is None else pack(words, profile.bits)

    size = packed_bytes(n, profile.bits)
    return Parser(f"packed-{name}", samples, again, repair=lambda blob, rng: blob[:size].ljust(size, b"\0"))


def _numbers() -> Parser:
    """Their length is right when they come here: what the masks leave is any numbers at all."""
    ride = Numbers(4, ("eval/nats", "eval/tokens", "train/nats"))

    def again(blob: bytes) -> bytes:
        whole = np.frombuffer(blob[: 8 * ride.size].ljust(8 * ride.size, b"\0"), "<u8").astype(np.uint64)
        totals = ride.unpack(whole, sites=4)
        if not np.isfinite(totals.squares).all() or any(value < 0 for value in totals.counters.values()):
            raise LawBroken(f"no sum of sites: {totals}")
        return blob

    said = {"eval/nats": 163_840, "eval/tokens": 10, "train/nats": 16_384}
    one = ride.pack(weight=3, counted=100, squares=np.ones(4), cut=np.ones(4, np.int64), counters=said)
    return Parser("numbers", [(4 * one).tobytes(), (4 * ride.pack(weight=1, counted=0, squares=np.zeros(4),
                  cut=np.zeros(4, np.int64), counters={})).tobytes()], again, [(8 * i, 8) for i in range(ride.size)])  # fmt: skip


CONTRIBUTION = Contribution.of([identity(name).public for name in SITES], {"protect.secagg.profile": "int8"})


def _records() -> list[Parser]:
    """A site's own files, damaged."""
    session = Session(
        1, 0, bytes(32), identity("run").public.kem, bytes(32), 16, 1, 3, plan="12" * 32, base="34" * 32, model="model",
        groups=[list(SITES)],
        contribution=CONTRIBUTION.facts(), evaluation=[5, 6], measured=True, t1=bytes(32),
    )  # fmt: skip
    encoded = Encoded("key", 3, np.arange(14, dtype=np.uint16), np.arange(9, dtype=np.uint64))
    mark = Used(1, "ab" * 32, "cd" * 32, list(SITES), 3)
    ledger = Ledger().after(Base("model", "34" * 32), CONTRIBUTION)

    def records(memory: DictMemory) -> Records:
        return Records(memory, "run", identity(SITES[0]), lambda n: bytes(n))

    def file(kind: str, save: Callable[[Records, Any], None], load: Callable[[Records], Any], values: Sequence[Any]) -> Parser:
        key = f"run/secagg/{kind}"

        def dump(value: Any) -> bytes:
            memory = DictMemory()
            save(records(memory), value)
            return memory.values[key]

        def again(blob: bytes) -> bytes | None:
            found = load(records(DictMemory({key: blob})))
            return None if found is None else dump(found)

        return Parser(f"records-{kind}", [dump(v) for v in values], again)

    later = session.but(root=b"", verdict=1, delivered=bytes(200), final=bytes(99))
    return [
        file("session", Records.save_session, Records.session, [session, later]),
        file("encoded", Records.save_encoded, Records.encoded, [encoded]),
        file("used", Records.save_used, Records.used, [mark]),
        _ledger([ledger, ledger.after(Base("b", "56" * 32), None).after_sealed(Base("c", "78" * 32))]),
    ]


def _ledger(samples: Sequence[Ledger]) -> Parser:
    """The one record that outlives runs."""

    def given(memory: DictMemory) -> ContributionStore:
        return ContributionStore(memory, identity(SITES[0]), lambda n: bytes(n))

    def dump(ledger: Ledger) -> bytes:
        memory = DictMemory()
        given(memory).save(ledger)
        return memory.values["secagg/given"]

    return Parser("given", [dump(s) for s in samples], lambda blob: dump(given(DictMemory({"secagg/given": blob})).load()))


# --- the run --------------------------------------------------------------------------------------------------------


def fuzz(parser: Parser, inputs: int, seed: int) -> Mapping[str, object]:
    """So many inputs, the same for the same seed.

    Raises:
        SystemExit: a law is broken; 1.
    """
    rng, codes, peak, began = random.Random(f"{seed}/{parser.name}"), Counter[str](), 0, time.perf_counter()
    for i in range(inputs):
        blob = damaged(parser, rng)
        try:
            code, most = check(parser, blob)
        except Exception as e:
            found = "".join(traceback.format_exception(e)).splitlines()
            print(
                json.dumps({"parser": parser.name, "seed": seed, "input": i, "error": repr(e), "hex": blob.hex(), "trace": found})
            )
            raise SystemExit(1) from None
        codes[code] += 1
        peak = max(peak, most)
    seconds, accepted = round(time.perf_counter() - began, 1), codes.pop("", 0)
    return {"parser": parser.name, "inputs": inputs, "seconds": seconds, "refused": inputs - accepted, "accepted": accepted,
            "codes": dict(codes.most_common()), "peak_bytes": peak}  # fmt: skip


def guided(parser: Parser, inputs: int) -> None:
    """So many inputs that libFuzzer makes from the samples, by what of the code they reach. Ends the process."""
    import atheris

    def one(blob: bytes) -> None:
        check(parser, blob)

    with tempfile.TemporaryDirectory() as corpus:
        for i, sample in enumerate(parser.samples):
            (Path(corpus) / str(i)).write_bytes(sample)
        atheris.instrument_all()
        longest = 2 * max(map(len, parser.samples))
        atheris.Setup([sys.argv[0], f"-runs={inputs}", f"-max_len={longest}", corpus], one)
        atheris.Fuzz()


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--inputs", type=int, default=100_000, help="over all parsers")
    arguments.add_argument("--seed", type=int, default=0)
    arguments.add_argument("--only", choices=sorted(parsers()), action="append", help="this parser; may be given several times")
    arguments.add_argument("--guided", action="store_true", help="by coverage, with atheris; needs --only with one parser")
    given = arguments.parse_args()
    if given.guided:
        if len(given.only or []) != 1:
            arguments.error("--guided takes one parser: --only NAME")
        guided(parsers()[given.only[0]], given.inputs)
        return
    chosen = [p for p in parsers().values() if not given.only or p.name in given.only]
    np.seterr(all="raise")
    for i, parser in enumerate(chosen):
        share = given.inputs * (i + 1) // len(chosen) - given.inputs * i // len(chosen)
        print(json.dumps(fuzz(parser, share, given.seed)), flush=True)


if __name__ == "__main__":
    main()
